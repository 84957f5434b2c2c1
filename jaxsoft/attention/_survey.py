"""What the first pass of a search keeps of a row: some of its largest entries, and the largest one per key block.

The threshold of a few entries of a row bounds that of the row, and equals it if no other entry is above: most rows
need no further pass. A block of keys whose largest entry is below the threshold need not be read again.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft.rows import RowReduction, Tile

# Columns fall into groups, by their index modulo their number; the largest entries per group are kept.
_GROUPS = 64
_LEVELS = 3


def _insert(levels: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
    """The largest entries per group, in decreasing order, after one more entry per group."""
    kept = []
    for level in levels:
        stays = level > x  # unlike `maximum` and `minimum`, which take care of NaN, two cheap instructions
        kept.append(jnp.where(stays, level, x))
        x = jnp.where(stays, x, level)
    return tuple(kept)


def _init(like: Array) -> tuple[Array, ...]:
    empty = jnp.broadcast_to(jnp.full_like(like, -jnp.inf)[..., None], (*like.shape, _GROUPS))
    return (empty,) * _LEVELS


def _update(levels: tuple[Array, ...], tile: Tile) -> tuple[Array, ...]:
    x = tile.scores
    missing = -x.shape[-1] % _GROUPS
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    for start in range(0, x.shape[-1], _GROUPS):
        levels = _insert(levels, x[..., start : start + _GROUPS])
    return levels


def _merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return functools.reduce(_insert, b, a)


def _finalize(levels: tuple[Array, ...]) -> tuple[Array, Array]:
    return jnp.concatenate(levels, axis=-1), jnp.max(levels[-1], axis=-1)


LARGEST = RowReduction(_init, _update, _merge, _finalize)
"""Entries of each row, among them the largest, and a number that no other entry exceeds; without derivatives."""


@functools.cache
def block_maxima(blocks: int, width: int, first: int) -> RowReduction:
    """The largest score of each block of `width` columns, of which the first has the index `first`."""

    def init(like):
        return jnp.broadcast_to(jnp.full_like(like, -jnp.inf)[..., None], (*like.shape, blocks))

    def update(state, tile):
        best = jnp.max(tile.scores, axis=-1)
        return lax.dynamic_update_index_in_dim(state, best, (tile.cols[0] - first) // width, state.ndim - 1)

    return RowReduction(init, update, jnp.maximum)
