"""`sweep` as a Pallas kernel for TPUs: a grid over matrices, blocks of rows and blocks of columns.

The carry lives in its output blocks, which stay in vector memory while the innermost axis of the grid moves. Numbers
one a row are columns `[rows, 1]` outside of `body` and `[rows]` in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsoft.kernels import _tuning
from jaxsoft.kernels._choice import Kernel
from jaxsoft.kernels._sweep import Block, Operands, Out, Plan, Result, Scores, Tiles
from jaxsoft.kernels._trace import examples, is_ragged, unsupported
from jaxsoft.rows._driver import align_varying

# Vector memory that the blocks of a tile may fill, twice buffered.
_VMEM = 48 * 2**20

# What Mosaic's compiler for TPUs does not lower, of what a reduction might do.
_UNSUPPORTED = {
    "gather", "scatter", "scatter-add", "sort", "top_k", "argmax", "argmin", "dynamic_update_slice", "cumsum",
    "cumlogsumexp", "cummax", "cumprod", "lgamma", "digamma", "erf_inv", "igamma", "igammac", "reduce_prod", "while",
}  # fmt: skip


def unavailable(kernel: Kernel) -> str | None:
    """Why there are no kernels for a device, or None."""
    kind = kernel.device_kind
    if kind and not any(name in kind for name in ("v5", "v6", "v7", "TPU7")):
        return f"the kernels are for TPU v5e and later, this is {kind!r}"
    return None


def refusal(kernel: Kernel, body: Callable, scores: Scores, operands: Operands, init: Callable, plan: Plan):
    """Why a sweep cannot run, or None."""
    tiles = tiles_of(kernel, scores, plan)
    blocks = [tiles.rows * tiles.columns * 4 * 4]
    if scores.values is None:
        depth = scores.left.shape[-1] * scores.left.dtype.itemsize * 2
        blocks.append((tiles.rows + tiles.columns) * depth)
    if sum(blocks) > _VMEM:
        return f"rows of {scores.left.shape[-1]} features leave no room for a tile in vector memory"
    return unsupported(body, init, scores, operands, plan, tiles, _UNSUPPORTED)


def tiles_of(kernel: Kernel, scores: Scores, plan: Plan) -> Tiles:
    """The sizes of tiles: the caller's (which follow the user's), the user's, measured ones, or as large as may be."""
    if plan.tiles is not None:
        return plan.tiles
    _, n, columns = scores.shape
    depth = 0 if scores.values is not None else scores.left.shape[-1] * scores.left.dtype.itemsize * 2
    rows, width = 256, 512 if depth else 1024
    while (rows + width) * depth > _VMEM // 2 and (rows > 128 or width > 128):
        rows, width = (rows // 2, width) if rows >= width else (rows, width // 2)
    for sizes in _tuning.sweep_sizes(kernel, scores, plan):
        r, w = sizes.get("rows", rows), sizes.get("columns", width)
        if kernel.blocks or (r + w) * depth + r * w * 16 <= _VMEM:
            rows, width = r, w
            break
    return Tiles(n if n <= rows else rows, columns if columns <= width else width)


def _whole(a: jax.Array, size: int) -> jax.Array:
    """Numbers of rows or columns in whole blocks; the last stands for those beyond it, and is a number like any."""
    beyond = -a.shape[1] % size
    return jnp.pad(a, [(0, 0), (0, beyond)] + [(0, 0)] * (a.ndim - 2), mode="edge") if beyond else a


def sweep(
    kernel: Kernel, body: Callable, scores: Scores, operands: Operands, init: Callable, plan: Plan
) -> Result:
    """Visits the tiles of `scores`, see `jaxsoft.kernels._sweep`."""
    batch, n, columns = scores.shape
    tiles = tiles_of(kernel, scores, plan)
    br, bc = tiles.rows, tiles.columns
    ni, nj = pl.cdiv(n, br), pl.cdiv(columns, bc)
    by_rows = plan.over == "rows"

    def spec(shape, index):
        """A block at `index(g, i, j)`, whichever of i and j moves first; the last argument is the prefetched start."""
        if by_rows:
            return pl.BlockSpec(shape, lambda g, j, i, start: index(g, i, j))
        return pl.BlockSpec(shape, lambda g, i, j, start: index(g, i, j))

    def matrix(a: Any) -> Callable:
        return (lambda g: g) if a.shape[0] > 1 else (lambda g: 0)

    # The scores.
    arrays, specs = [], []
    if scores.values is not None:
        arrays.append(scores.values)
        specs.append(spec((1, br, bc), lambda g, i, j: (g, i, j)))
    else:
        depth, of_right = scores.left.shape[-1], matrix(scores.right)
        arrays += [scores.left, scores.right]
        specs.append(spec((1, br, depth), lambda g, i, j: (g, i, 0)))
        if scores.transposed:
            specs.append(spec((1, bc, depth), lambda g, i, j: (of_right(g), j, 0)))
        else:
            specs.append(spec((1, depth, bc), lambda g, i, j: (of_right(g), 0, j)))

    # What is beside them.
    rows, rows_tree = jax.tree.flatten(operands.rows)
    cols, cols_tree = jax.tree.flatten(operands.cols)
    entries, entries_tree = jax.tree.flatten(operands.entries)
    for a in rows:
        at, a = matrix(a), _whole(a, br)
        arrays.append(a if a.ndim == 3 else a[..., None])
        specs.append(spec((1, br, arrays[-1].shape[-1]), lambda g, i, j, at=at: (at(g), i, 0)))
    for a in cols:
        at, a = matrix(a), _whole(a, bc)
        if a.ndim == 2:
            arrays.append(a[:, None, :])
            specs.append(spec((1, 1, bc), lambda g, i, j, at=at: (at(g), 0, j)))
        else:
            arrays.append(a)
            specs.append(spec((1, bc, a.shape[-1]), lambda g, i, j, at=at: (at(g), j, 0)))
    for a in entries:
        at = matrix(a)
        arrays.append(a)
        specs.append(spec((1, br, bc), lambda g, i, j, at=at: (at(g), i, j)))

    def beside(values: list) -> tuple:
        """The values of the blocks, in the structure of the operands."""
        r, c, e = (
            values[: len(rows)],
            values[len(rows) : len(rows) + len(cols)],
            values[len(rows) + len(cols) :],
        )
        return rows_tree.unflatten(r), cols_tree.unflatten(c), entries_tree.unflatten(e)

    # The outputs: their shapes are those that `body` gives for a tile.
    ragged = is_ragged(scores, tiles)
    block, carry = examples(init, scores, operands, plan, tiles)
    out = jax.eval_shape(body, block, carry)
    carry_leaves, carry_tree = jax.tree.flatten(carry)
    entry_leaves, entry_tree = jax.tree.flatten(out.entries)
    col_leaves, col_tree = jax.tree.flatten(out.cols)

    arrays = align_varying([jnp.reshape(jnp.asarray(operands.start, jnp.int32), (1,)), *arrays])

    def result(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Inside shard_map results vary as the operands do."""
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(arrays[0]).manual_axis_type)

    out_shapes, out_specs = [], []
    for a in carry_leaves:
        width = math.prod(a.shape[1:])
        out_shapes.append(result((batch, columns if by_rows else n, width), a.dtype))
        if by_rows:
            out_specs.append(spec((1, bc, width), lambda g, i, j: (g, j, 0)))
        else:
            out_specs.append(spec((1, br, width), lambda g, i, j: (g, i, 0)))
    for dtype in plan.entry_dtypes:
        out_shapes.append(result((batch, n, columns), dtype))
        out_specs.append(spec((1, br, bc), lambda g, i, j: (g, i, j)))
    for a in col_leaves:
        if len(a.shape) == 1:
            out_shapes.append(result((batch, ni, 1, columns), a.dtype))
            out_specs.append(spec((1, 1, 1, bc), lambda g, i, j: (g, i, 0, j)))
        else:
            out_shapes.append(result((batch, ni, columns, a.shape[1]), a.dtype))
            out_specs.append(spec((1, 1, bc, a.shape[1]), lambda g, i, j: (g, i, j, 0)))

    def kernel_body(start_ref, *refs):
        inputs, outputs = refs[: len(specs)], refs[len(specs) :]
        carries = outputs[: len(carry_leaves)]
        entry_refs = outputs[len(carry_leaves) : len(carry_leaves) + len(entry_leaves)]
        col_refs = outputs[len(carry_leaves) + len(entry_leaves) :]
        g, first, second = (pl.program_id(axis) for axis in range(3))
        i, j = (second, first) if by_rows else (first, second)
        row = lax.broadcasted_iota(jnp.int32, (br, bc), 0) + i * br
        local = lax.broadcasted_iota(jnp.int32, (br, bc), 1) + j * bc
        inside = (row < n) & (local < columns) if ragged else None

        def read():
            values = [ref[0] for ref in inputs[len(inputs) - len(rows) - len(cols) - len(entries) :]]
            for at, a in enumerate((*rows, *cols)):
                if a.ndim == 2:
                    values[at] = values[at][:, 0] if at < len(rows) else values[at][0]
            return beside(values)

        blocks = read()

        @pl.when(second == 0)
        def _():
            shape = (bc if by_rows else br,)
            start = init(blocks[1 if by_rows else 0], jnp.zeros(shape, jnp.float32))
            for ref, value in zip(carries, jax.tree.leaves(start)):
                ref[0] = value.reshape(ref.shape[1:])

        def work():
            left = right = None
            if scores.values is not None:
                raw = inputs[0][0].astype(jnp.float32)
            else:
                left, right = inputs[0][0], inputs[1][0]
                raw = lax.dot_general(
                    left,
                    right,
                    (((1,), (1 if scores.transposed else 0,)), ((), ())),
                    precision=scores.precision,
                    preferred_element_type=jnp.float32,
                )
            old = [ref[0].reshape(a.shape) for ref, a in zip(carries, carry_leaves)]
            r, c, e = blocks
            block = Block(raw, r, c, e, row, local + start_ref[0], g, inside, left, right)
            new: Out = body(block, carry_tree.unflatten(old))
            for ref, value in zip(carries, jax.tree.leaves(new.carry)):
                ref[0] = value.reshape(ref.shape[1:])
            for ref, value in zip(entry_refs, jax.tree.leaves(new.entries)):
                ref[0] = value.astype(ref.dtype)
            for ref, value in zip(col_refs, jax.tree.leaves(new.cols)):
                ref[0, 0] = value.reshape(ref.shape[2:])

        if plan.live is None:
            work()
            return
        live = plan.live(i, j, br, bc)
        pl.when(live)(work)

        @pl.when(jnp.logical_not(live))
        def _():
            for ref in (*entry_refs, *col_refs):
                ref[...] = jnp.zeros_like(ref)

    grid = (batch, nj, ni) if by_rows else (batch, ni, nj)
    outputs = pl.pallas_call(
        kernel_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=specs, out_specs=out_specs
        ),
        out_shape=out_shapes,
        interpret=kernel.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=2 * _VMEM
        ),
    )(*arrays)

    k, e = len(carry_leaves), len(carry_leaves) + len(entry_leaves)
    length = columns if by_rows else n
    final = [a.reshape(1, batch, length, *leaf.shape[1:]) for a, leaf in zip(outputs[:k], carry_leaves)]
    sums = [a[:, :, 0] if len(leaf.shape) == 1 else a for a, leaf in zip(outputs[e:], col_leaves)]
    return Result(carry_tree.unflatten(final), entry_tree.unflatten(outputs[k:e]), col_tree.unflatten(sums))
