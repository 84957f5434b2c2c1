"""Masks, split by the axes they vary over (rows, columns or both), because each kind has its own best treatment."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft.rows._source import cut


class Masks(NamedTuple):
    """Which rows, columns and entries are present, `[*rows]`, `[columns]` and `[*rows, columns]`; None for all."""

    rows: Any = None
    cols: Any = None
    entries: Any = None


def split_mask(where: Any, shape: tuple[int, ...], axis: int) -> Masks:
    """The masks for a user's `where`, which broadcasts to logits of this shape."""
    if where is None:
        return Masks()
    where = jnp.asarray(where) if isinstance(where, bool) else where
    _checks.boolean("where", where)
    _checks.broadcastable("where", where, shape, "the shape of the logits")
    where = jnp.moveaxis(where.reshape((1,) * (len(shape) - where.ndim) + where.shape), axis, -1)
    rows = (*shape[:axis], *shape[axis + 1 :])
    if where.shape[-1] == 1 and shape[axis] != 1:
        return Masks(rows=jnp.broadcast_to(where[..., 0], rows))
    if math.prod(where.shape[:-1]) == 1:
        return Masks(cols=where.reshape(-1))
    return Masks(entries=jnp.broadcast_to(where, (*rows, shape[axis])))


def row_mask(masks: Masks) -> Array | None:
    """`[n]`, False for rows whose entries are all masked; None without such a mask."""
    if masks.entries is None:
        return masks.rows
    keep = jnp.any(masks.entries, axis=-1)
    return keep if masks.rows is None else keep & masks.rows


def col_mask(masks: Masks, start, size: int) -> Array | None:
    """`[size]`, False for columns of the block that are masked for all rows; None without such a mask."""
    if masks.cols is not None:
        return cut(masks.cols, start, size, 0)
    if masks.entries is not None:
        block = cut(masks.entries, start, size, masks.entries.ndim - 1)
        return jnp.any(block, axis=tuple(range(block.ndim - 1)))
    return None


def unmasked(masks: Masks, *more: Array | None) -> Array | None:
    """Booleans that broadcast to the scores, False for masked entries; None without a mask."""
    keeps = [keep for keep in more if keep is not None]
    if masks.rows is not None:
        keeps.append(masks.rows[..., None])
    if masks.cols is not None:
        keeps.append(masks.cols)
    if masks.entries is not None:
        keeps.append(masks.entries)
    return functools.reduce(jnp.logical_and, keeps) if keeps else None
