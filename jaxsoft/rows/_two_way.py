"""Row reductions and the log-sum-exp of each column of one matrix of scores, in one pass over it.

A block contains whole columns, so the sums of its columns are finished with the block, while the sums of the rows
continue. Both use the derivative rule of `reduce_rows`: the log-sum-exp of the columns is a reduction whose state has
one entry per column, and each block fills in the entries of its own columns.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from jaxsoft._numerics import finite_gauge
from jaxsoft.kernels.inner import attach, compiled
from jaxsoft.rows import reductions
from jaxsoft.rows._layout import Layout, layout_of, on_mesh, with_padding
from jaxsoft.rows._logits import Logits
from jaxsoft.rows._masks import Masks
from jaxsoft.rows._pass import align, empty_states, finish, mask_rows, over_blocks, read_block, tangents
from jaxsoft.rows._reduce import as_source, of_shard, with_present
from jaxsoft.rows._reduction import Arrays, RowReduction, Tile
from jaxsoft.rows._shards import joined
from jaxsoft.rows.reductions import LogPartition


def _columns_init(like: Array, columns: Array, first: Array) -> tuple[Array, Array]:
    del like, first
    return jnp.full_like(columns, -jnp.inf), columns


def _columns_update(state, tile: Tile, columns, first):
    del columns
    maximum, total = state
    m = lax.stop_gradient(jnp.max(tile.scores, axis=0, initial=-jnp.inf))
    s = jnp.sum(jnp.exp(tile.scores - finite_gauge(m)), axis=0)
    start = (tile.cols[0] - first,)
    return lax.dynamic_update_slice(maximum, m, start), lax.dynamic_update_slice(total, s, start)


def _columns_merge(a, b, columns, first):
    del columns, first
    m = lax.stop_gradient(jnp.maximum(a[0], b[0]))
    return m, sum(s * jnp.exp(part - finite_gauge(m)) for part, s in (a, b))


def _columns_neutral(state):
    return state[0], jnp.zeros_like(state[1])


_COLUMNS = RowReduction(_columns_init, _columns_update, _columns_merge, neutral=_columns_neutral)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    functions: tuple[RowReduction, ...], block: int, row_axes: tuple[str, ...], source, masks: Masks, arrays
) -> tuple[list, LogPartition]:
    """The results of the rows and of the columns; `row_axes` are the mesh axes over which the rows are sharded."""
    args = [a.args for a in arrays]
    like = jnp.zeros(source._width, source._accumulation_dtype)
    arrays = [*arrays, Arrays((like, jnp.asarray(source._first(), jnp.int32)), (), ())]
    functions = (*functions, _COLUMNS)
    source, masks, arrays = align(source, masks, arrays)
    source, arrays = mask_rows(source, masks, arrays)

    def finished(source, masks, arrays):
        def body(states, start, size, looped):
            del looped
            tiles = read_block(source, start, size, masks, arrays)
            return [r.update(s, tile, *a.args) for r, s, tile, a in zip(functions, states, tiles, arrays)]

        return over_blocks(source._width, block, body, empty_states(functions, source, arrays))

    states = finished(*lax.stop_gradient((source, masks, arrays)))
    rule = functools.partial(tangents, functions, block)
    states = attach(rule, None, states, masks, (source, arrays))
    columns = joined(functions[-1:], states[-1:], row_axes, [arrays[-1].args])[0]
    return finish(functions[:-1], states[:-1], source, args), reductions.partition_of(columns)


@functools.partial(compiled, static_argnums=(0, 1, 2))
def _on_mesh(functions, block: int | None, layout: Layout, source, masks: Masks, arrays: list[Arrays]):
    total, columns = source.shape[-1], layout.columns or None
    source, masks, arrays = with_padding(layout, source, masks, arrays)
    specs = (layout.of_source(source, 0), layout.of_masks(masks), layout.of_arrays(arrays))
    axes = tuple(axis for entry in layout.rows for axis in entry)

    def here(source, masks, arrays):
        source, masks, arrays = layout.localized(total, source, masks, arrays)
        return _run(functions, _block(block, source), axes, source, with_present(source, masks), arrays)

    results = (layout.by_row(), P(columns))
    rows, by_column = on_mesh(layout.mesh, here, specs, (source, masks, arrays), results)
    by_column = jax.tree.map(lambda a: a[:total], by_column)
    if source.shape[0] == total:  # pairs: callers combine the results of row i and column i
        by_column = jax.tree.map(lambda a: layout.restore(a, columns), by_column)
    return jax.tree.map(layout.restore, rows), by_column


def _block(block: int | None, source) -> int:
    return max(min(block or source._default_block_size(source.shape[0]), source._width), 1)


def reduce_two_ways(
    logits: Logits,
    row_reductions: tuple[RowReduction, ...],
    *,
    row_where: Bool[Array, " rows"] | None = None,
    column_where: Bool[Array, " columns"] | None = None,
) -> tuple[list, LogPartition]:
    """Row reductions and the log-sum-exp of each column of a matrix of scores, in one pass.

    Args:
      logits: `[rows, columns]`, a floating array or `linear_logits`.
      row_reductions: the reductions of the rows.
      row_where: `[rows]`, False = the row is absent, also from the columns' sums.
      column_where: `[columns]`, False = the column is absent.

    Returns:
      The results of the row reductions, and the columns' log-partition function `[columns]` in parts.
    """
    source, masks = as_source(logits, 1), Masks(row_where, column_where)
    arrays = [Arrays(r.args, r.col_args, r.entry_args) for r in row_reductions]
    functions = tuple(r._replace(args=(), col_args=(), entry_args=()) for r in row_reductions)
    layout = layout_of(source, [])
    if layout is not None:
        return _on_mesh(functions, source.block_size, layout, source, masks, arrays)
    masks, arrays = of_shard(source, masks, arrays)
    return _run(functions, _block(source.block_size, source), (), source, with_present(source, masks), arrays)
