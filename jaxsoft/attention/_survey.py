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

# The largest entries of at most as many groups of key blocks are kept per row, so that memory is linear in the length.
MOST_BLOCKS = 24


def _insert(levels: list[Array], x: Array) -> list[Array]:
    """The largest entries per group, in decreasing order, after one more entry per group."""
    kept = []
    for level in levels:
        stays = level > x  # unlike `maximum` and `minimum`, which take care of NaN, two cheap instructions
        kept.append(jnp.where(stays, level, x))
        x = jnp.where(stays, x, level)
    return kept


# The state is a single array, `[*rows, levels, groups]`: XLA would copy arrays that depend on each other in each step.


def _init(like: Array) -> Array:
    return jnp.broadcast_to(jnp.full_like(like, -jnp.inf)[..., None, None], (*like.shape, _LEVELS, _GROUPS))


def _levels(state: Array) -> list[Array]:
    return [state[..., i, :] for i in range(_LEVELS)]


def _update(state: Array, tile: Tile) -> Array:
    x, levels = tile.scores, _levels(state)
    missing = -x.shape[-1] % _GROUPS
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    for start in range(0, x.shape[-1], _GROUPS):
        levels = _insert(levels, x[..., start : start + _GROUPS])
    return jnp.stack(levels, axis=-2)


def _merge(a: Array, b: Array) -> Array:
    return jnp.stack(functools.reduce(_insert, _levels(b), _levels(a)), axis=-2)


def _finalize(state: Array) -> tuple[Array, Array]:
    return state.reshape(*state.shape[:-2], _LEVELS * _GROUPS), jnp.max(state[..., -1, :], axis=-1)


LARGEST = RowReduction(_init, _update, _merge, _finalize)
"""Entries of each row, among them the largest, and a number that no other entry exceeds; without derivatives."""


@functools.cache
def block_maxima(blocks: int, width: int, first: int) -> RowReduction:
    """The largest score of each block of `width` columns, of which the first has the index `first`.

    A tile's columns must lie in one block.
    """

    def init(like):
        return jnp.broadcast_to(jnp.full_like(like, -jnp.inf)[..., None], (*like.shape, blocks))

    def update(state, tile):
        index, axis = (tile.cols[0] - first) // width, state.ndim - 1
        old = lax.dynamic_index_in_dim(state, index, axis, keepdims=False)
        best = jnp.maximum(old, jnp.max(tile.scores, axis=-1))
        return lax.dynamic_update_index_in_dim(state, best, index, axis)

    return RowReduction(init, update, jnp.maximum)
