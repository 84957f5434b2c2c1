"""Inspection of a sweep's body, for backends to use before they build a kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoft._numerics import accumulation_dtype
from jaxsoft._trees import is_explicitly_sharded, is_float, is_partitioned, varying_axes
from jaxsoft.kernels._sweep import Block, Operands, Plan, Scores, Tiles, of_one


def examples(
    init: Callable, scores: Scores, operands: Operands, plan: Plan, tiles: Tiles
) -> tuple[Block, Any]:
    """Shapes and dtypes of a block and of a carry."""
    br, bc = tiles.rows, tiles.columns

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = jax.tree.map(lambda a: struct((br, *of_one(a)), a.dtype), operands.rows)
    cols = jax.tree.map(lambda a: struct((bc, *of_one(a)), a.dtype), operands.cols)
    entries = jax.tree.map(lambda a: struct((br, bc), a.dtype), operands.entries)
    index = struct((br, bc), jnp.int32)
    inside = struct((br, bc), jnp.bool_) if is_ragged(scores, tiles) else None
    left = right = None
    if scores.values is None:
        depth = scores.left.shape[-1]
        left = struct((br, depth), scores.dtype)
        right = struct((bc, depth) if scores.transposed else (depth, bc), scores.dtype)
    number, raw = struct((), jnp.int32), struct((br, bc), scores.wide)
    block = Block(raw, rows, cols, entries, index, index, number, inside, left, right)
    own, size = (cols, bc) if plan.over == "rows" else (rows, br)
    return block, jax.eval_shape(init, own, struct((size,), scores.wide))


def objection(arrays: Any, interpreted: bool) -> str | None:
    """Why no backend can read these arrays, or None."""
    leaves = jax.tree.leaves(arrays)
    if interpreted and varying_axes(leaves):
        return "Pallas' interpreter does not run inside jax.shard_map, where arrays on a mesh are read"
    if any(a.dtype == jnp.float64 for a in leaves):
        return "kernels compute in float32, but float64 was given"
    if any(map(is_explicitly_sharded, leaves)):
        return "an operand is sharded over Explicit mesh axes: call the function inside jax.shard_map"
    if any(map(is_partitioned, leaves)):
        return "every device would compute all rows of arrays on Auto mesh axes: call the function inside jax.shard_map"
    return None


def plain(a: jax.Array) -> jax.Array:
    """A per-row or per-column array for kernels: booleans as int32; floats as float32, in which gradients add up."""
    if a.dtype == jnp.bool_:
        return a.astype(jnp.int32)
    return a.astype(accumulation_dtype(a.dtype)) if is_float(a) else a


def is_ragged(scores: Scores, tiles: Tiles) -> bool:
    """Whether the last tiles reach beyond the last row or column."""
    _, n, columns = scores.shape
    return n % tiles.rows != 0 or columns % tiles.columns != 0


def unsupported(
    body: Callable,
    init: Callable,
    scores: Scores,
    operands: Operands,
    plan: Plan,
    tiles: Tiles,
    names: Collection[str],
) -> str | None:
    """Why a kernel without the named primitives cannot run a body, in words; None if it can."""
    block, carry = examples(init, scores, operands, plan, tiles)
    jaxpr, out = jax.make_jaxpr(body, return_shape=True)(block, carry)
    same = [
        a.dtype == b.dtype and a.shape == b.shape for a, b in zip(*map(jax.tree.leaves, (carry, out.carry)))
    ]
    if not all(same):
        return "the state of a reduction changes its dtype or shape from tile to tile"
    found = sorted({name for name in _primitives(jaxpr.jaxpr) if name in names})
    return f"a kernel has no {', '.join(found)}" if found else None


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield from _primitives(sub)
