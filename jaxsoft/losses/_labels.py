"""The label's score, for losses whose gradient is 0 for most classes (hinges, sparse normalizers)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._numerics import as_ids
from jaxsoft.losses._common import LabelledRows, poison_of
from jaxsoft.rows import RowReduction, reductions


def _share(state, tile, ids):
    """Of the label's score; an id out of range makes the gradient of the whole row NaN, as finalize multiplies it."""
    outside = jnp.where(state[1] == 2, 1, 0)
    return [tile.at_by_comparison(tile.x, ids) + outside * jnp.sum(tile.x, axis=-1)]


def label_score(ids: Array) -> RowReduction:
    """`take`, but an id out of range makes the gradient of the whole row NaN, as in `label_statistics`."""
    return reductions.take(as_ids(ids))._replace(share=_share)


def finish(rows: LabelledRows, loss: Array, score: Array, count: Array) -> Array:
    """The losses of rows with class ids: +inf where the label is absent, 0 for a row without classes."""
    loss = jnp.where(score == -jnp.inf, jnp.inf, loss)
    return rows.finish(jnp.where(count > 0, loss, 0) * poison_of(score))
