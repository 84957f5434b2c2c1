"""Tools for trees of arrays: float leaves and their cotangents, gradients that add up, mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def is_float(a: Any) -> bool:
    """Whether `a` is a floating array."""
    return jnp.issubdtype(a.dtype, jnp.floating)


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into two: its float leaves and its other leaves, each with None in place of the rest."""
    return (
        jax.tree.map(lambda a: a if is_float(a) else None, tree),
        jax.tree.map(lambda a: None if is_float(a) else a, tree),
    )


def combine(floats: Any, others: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(lambda f, o: o if f is None else f, floats, others, is_leaf=lambda x: x is None)


def replaced(leaves: Sequence, at: Iterable[int], new: Iterable) -> list:
    """The leaves, with new ones at some places."""
    out = list(leaves)
    for i, leaf in zip(at, new):
        out[i] = leaf
    return out


def tangent_of(function: Callable, primals: Any, tangents: Any) -> Any:
    """The tangent of `function(*primals)`, without operations for symbolic zeros."""
    leaves, treedef = jax.tree.flatten(primals)
    given = treedef.flatten_up_to(tangents)
    active = [i for i, d in enumerate(given) if not isinstance(d, ad.Zero | SymbolicZero)]

    def of_active(*some):
        return function(*treedef.unflatten(replaced(leaves, active, some)))

    return jax.jvp(of_active, [leaves[i] for i in active], [given[i] for i in active])[1]


def pull(function: Callable, operands: tuple, cotangents: Any) -> Any:
    """The cotangents of the float leaves of `operands`, from those of `function(*operands)`; None for other leaves."""
    floats, others = partition(operands)
    _, pullback = jax.vjp(lambda floats: function(*combine(floats, others)), floats)
    return pullback(cotangents)[0]


def add_at(total: Array, part: Array, starts: dict[int, Any]) -> Array:
    """Adds `part` into `total` in place, at the given start along some of the axes."""
    index = [jnp.asarray(starts.get(axis, 0), jnp.int32) for axis in range(total.ndim)]
    old = lax.dynamic_slice(total, index, part.shape)
    return lax.dynamic_update_slice(total, old + part.astype(total.dtype), index)


def is_explicitly_sharded(a: Any) -> bool:
    """Whether an axis of an array is sharded over an Explicit mesh axis."""
    return any(axis is not None for axis in jax.typeof(a).sharding.spec)


def entries_at(values: Array, ids: Array) -> Array:
    """`values[ids]` along the first axis; on a mesh, the result lies where `ids` do."""
    if not (is_explicitly_sharded(values) or is_explicitly_sharded(ids)):
        return values[ids]
    mesh = next(s.mesh for a in (ids, values) if not (s := jax.typeof(a).sharding).mesh.empty)
    spec = P(*jax.typeof(ids).sharding.spec, *(None,) * (values.ndim - 1))
    return values.at[ids].get(out_sharding=NamedSharding(mesh, spec))


def is_partitioned(a: Any) -> bool:
    """Whether the compiler may partition an array: it lies on a mesh with Auto axes of several devices.

    JAX does not say how, and not always: `in_shardings` of `jit` cannot be seen.
    """
    mesh = jax.typeof(a).sharding.mesh
    return any(
        mesh.shape[name] > 1 and kind == AxisType.Auto for name, kind in zip(mesh.axis_names, mesh.axis_types)
    )


def align_varying(tree: Any) -> Any:
    """Inside shard_map, lets all arrays vary over the same mesh axes.

    Otherwise the loop of a derivative would contain one all-reduce per block; this leaves one per operand.
    """
    return as_varying(tree, varying_axes(tree))


def varying_axes(tree: Any) -> frozenset:
    """Inside shard_map, the mesh axes over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(tree)))


def anywhere(a: Array) -> Array:
    """Whether any entry is True; inside shard_map, on any device."""
    axes = tuple(sorted(varying_axes(a)))
    return lax.pmax(jnp.any(a).astype(jnp.int32), axes) > 0 if axes else jnp.any(a)


def as_varying(tree: Any, axes: Iterable[str]) -> Any:
    """Lets all arrays vary over these mesh axes, in addition to their own."""

    def cast(leaf):
        missing = tuple(sorted(frozenset(axes) - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
