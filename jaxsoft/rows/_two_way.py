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
from jaxtyping import Array, Bool

from jaxsoft._numerics import finite_gauge
from jaxsoft.kernels.inner import attach
from jaxsoft.rows import reductions
from jaxsoft.rows._logits import Logits
from jaxsoft.rows._masks import Masks
from jaxsoft.rows._pass import align, empty_states, finish, mask_rows, over_blocks, read_block, tangents
from jaxsoft.rows._reduce import as_source
from jaxsoft.rows._reduction import Arrays, RowReduction, Tile
from jaxsoft.rows.reductions import LogPartition


def _columns_init(like: Array, columns: Array) -> tuple[Array, Array]:
    del like
    return jnp.full_like(columns, -jnp.inf), columns


def _columns_update(state, tile: Tile, columns):
    del columns
    maximum, total = state
    m = lax.stop_gradient(jnp.max(tile.scores, axis=0, initial=-jnp.inf))
    s = jnp.sum(jnp.exp(tile.scores - finite_gauge(m)), axis=0)
    start = (tile.cols[0],)
    return lax.dynamic_update_slice(maximum, m, start), lax.dynamic_update_slice(total, s, start)


def _columns_neutral(state):
    return state[0], jnp.zeros_like(state[1])


_COLUMNS = RowReduction(_columns_init, _columns_update, neutral=_columns_neutral)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(functions: tuple[RowReduction, ...], block: int, source, masks: Masks, arrays: list[Arrays]):
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
    args = [a.args for a in arrays]
    return finish(functions[:-1], states, source, args), reductions.partition_of(states[-1])


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
    source, columns = as_source(logits, 1)._flat(), logits.shape[1]
    block = source.block_size or source._default_block_size(logits.shape[0])
    arrays = [Arrays(r.args, r.col_args, r.entry_args) for r in row_reductions]
    arrays.append(Arrays((jnp.zeros(columns, source._accumulation_dtype),), (), ()))
    functions = tuple(r._replace(args=(), col_args=(), entry_args=()) for r in (*row_reductions, _COLUMNS))
    return _run(functions, max(min(block, columns), 1), source, Masks(row_where, column_where), arrays)
