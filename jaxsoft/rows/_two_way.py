"""Reductions of the rows, and the log-sum-exp of the columns, of one matrix of scores in one pass over it.

A block of columns holds whole columns, so their sums are finished when the block is; those of the rows run on. Both
are attached to the derivative rule of `reduce_rows`: a reduction of the columns is one whose state has an entry a
column, of which a block fills its own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxsoft._numerics import finite_gauge
from jaxsoft.rows import _driver, reductions
from jaxsoft.rows._driver import Arrays, Masks
from jaxsoft.rows._logits import DenseLogits, LinearLogits, Logits
from jaxsoft.rows._reduction import RowReduction, Tile
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
    source, masks, arrays = _driver.align_varying((source, masks, arrays))
    source, arrays = _driver.mask_rows(source, masks, arrays)
    columns = source.shape[-1]

    def finished(source, masks, arrays):
        def body(states, start, size, looped):
            del looped
            x = source._block(start, size, _driver.col_mask(masks, start, size))
            tiles = _driver.tiles(x, start, masks, arrays, columns)
            return [r.update(s, tile, *a.args) for r, s, tile, a in zip(functions, states, tiles, arrays)]

        empty = [r.init(source._like(), *a.args) for r, a in zip(functions, arrays)]
        return _driver.over_blocks(columns, block, body, empty)

    states = finished(*lax.stop_gradient((source, masks, arrays)))
    states = _driver.attach(functions, block, states, source, masks, arrays)
    return _driver.finalize(functions[:-1], states, arrays), reductions.partition_of(states[-1])


def reduce_two_ways(
    logits: Logits,
    row_reductions: tuple[RowReduction, ...],
    *,
    row_where: Bool[Array, " rows"] | None = None,
    column_where: Bool[Array, " columns"] | None = None,
) -> tuple[list, LogPartition]:
    """Reductions of the rows, and the log-sum-exp of each column, of a matrix of scores in one pass.

    Args:
      logits: `[rows, columns]`, a floating array or `linear_logits`.
      row_reductions: of the rows.
      row_where: `[rows]`, False = the row is absent, from the columns' sums too.
      column_where: `[columns]`, False = the column is absent.

    Returns:
      The results of the row reductions, and the columns' log-partition function `[columns]` in parts.
    """
    n, columns = logits.shape
    source: Any = logits._flat() if isinstance(logits, LinearLogits) else DenseLogits(jnp.asarray(logits))
    block = columns
    if isinstance(logits, LinearLogits):
        block = logits.block_size or logits._default_block_size(n)
    arrays = [Arrays(r.args, r.col_args, r.entry_args) for r in row_reductions]
    arrays.append(Arrays((jnp.zeros(columns, source._accumulation_dtype),), (), ()))
    functions = tuple(r._replace(args=(), col_args=(), entry_args=()) for r in (*row_reductions, _COLUMNS))
    return _run(functions, max(min(block, columns), 1), source, Masks(row_where, column_where), arrays)
