"""The moments in the state of any transformation: which leaves they are, and their 8-bit format."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft.optimizers import _codes, _common
from jaxsoft.optimizers._codes import DynamicMap
from jaxsoft.optimizers.blockwise import QuantizedArray

Run = Callable[[Any, Any, Any], tuple[Any, Any]]
"""The inner update, `(gradients, state, parameters) -> (updates, new state)`."""


def is_quantized(x: Any) -> bool:
    """Whether a node of a state is a moment in 8 bits."""
    return isinstance(x, QuantizedArray)


def paths(tree: Any) -> dict[tuple, Any]:
    """The leaves of a tree by path; a moment in 8 bits is one leaf."""
    return dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized))


def split(state: Any) -> tuple[Any, list[Any]]:
    """The codes of the moments in place of these, and the scales of each leaf: a scalar 1 if it is not in 8 bits."""
    codes = jax.tree.map(lambda x: x.codes if is_quantized(x) else x, state, is_leaf=is_quantized)
    leaves = jax.tree.leaves(state, is_leaf=is_quantized)
    return codes, [x.scales if is_quantized(x) else jnp.ones([], jnp.float32) for x in leaves]


def join(codes: Any, scales: list[Any]) -> Any:
    """The state that was split."""
    leaves, treedef = jax.tree.flatten(codes)
    return treedef.unflatten(
        [QuantizedArray(x, s) if jnp.ndim(s) else x for x, s in zip(leaves, scales, strict=True)]
    )


def without_names(tree: Any, params: Any) -> Any:
    """The tree with lists in place of all nodes but those of copies of the parameters' tree.

    `optax.tree.get` finds a field by its name, so no name may occur twice in a state.
    """
    if jax.tree.structure(tree) == jax.tree.structure(params):
        return tree
    children = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    return [without_names(x, params) for x in children] if any(x is not tree for x in children) else tree


def _split_path(path: tuple, x: Any, params: dict[tuple, Any]) -> tuple[tuple, tuple | None]:
    """Splits a path in the state into the path of a copy of the parameters' tree and the path in this tree, or None."""
    shape = jnp.shape(x.codes if is_quantized(x) else x)
    for i in range(len(path) + 1):
        place = path[i:]
        # If the parameters are a single array, its path is empty and matches everywhere: compare shapes.
        if place in params and (place or shape == jnp.shape(params[place])):
            return path[:i], place
    return path, None


class Format(NamedTuple):
    """How moments are stored."""

    block_size: int
    unsigned: frozenset[str]

    def locate(self, path: tuple, x: Any, params: dict[tuple, Any]) -> tuple[bool, tuple | None]:
        """Whether this leaf of the state has signs, and the path of its parameter (None: it has none)."""
        prefix, place = _split_path(path, x, params)
        names = (getattr(key, "name", getattr(key, "key", None)) for key in reversed(prefix))
        innermost = next((name for name in names if isinstance(name, str)), None)
        return innermost not in self.unsigned, place

    def map(self, f: Callable[..., Any], state: Any, params: dict[tuple, Any], *rest: Any) -> Any:
        """Maps `f(leaf, signed, path of its parameter, ...)` over the leaves of a state."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x, *others: f(x, *self.locate(path, x, params), *others),
            state,
            *rest,
            is_leaf=is_quantized,
        )

    def encode(self, x: jax.Array, signed: bool, key: Any = None, again: Any = None) -> QuantizedArray:
        """A moment in 8 bits; see `_codes.encode`."""
        x = x.astype(_common.wide(x))
        again = None if again is None else again.astype(x.dtype)
        layout = _codes.layout_of(x.shape, self.block_size)
        return QuantizedArray(*_codes.encode(x, layout, DynamicMap(signed), key, not signed, again))

    def decode(self, x: Any, signed: bool, *_: Any) -> Any:
        """A leaf of the state, in float32 (or wider) if it was in 8 bits."""
        if not is_quantized(x):
            return x
        layout = _codes.layout_of(x.codes.shape, self.block_size)
        return _codes.decode(x.codes, x.scales, layout, DynamicMap(signed))


def is_entrywise(jaxpr: Any) -> bool:
    """Whether no equation mixes entries of an array: each array keeps its shape and is not summed or sorted."""
    for equation in jaxpr.eqns:
        inputs = {v.aval.shape for v in equation.invars if math.prod(v.aval.shape) > 1}
        outputs = {v.aval.shape for v in equation.outvars}
        name = equation.primitive.name
        if inputs and (outputs != inputs or name in ("sort", "rev", "transpose") or name.startswith("cum")):
            return False
        for sub in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns") and not is_entrywise(sub):
                return False
    return True
