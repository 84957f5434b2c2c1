"""Per-row arrays of an attention in blocks of queries, and inputs cut into blocks of another size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility


def to_blocks(spec: AttentionSpec, rows: Array) -> Array:
    """`[B, N, T, ...]` as `[nq, B, K, R, ...]`, padded to whole blocks with the last row (0 may be invalid)."""
    rest = rows.shape[3:]
    # Blocks are cut in the user's order of axes: a kernel that restores this order needs no copy.
    rows = jnp.swapaxes(rows, 1, 2)
    pad = spec.nq * spec.bq - spec.queries
    if pad:
        rows = jnp.pad(rows, ((0, 0), (0, pad), (0, 0), *((0, 0) for _ in rest)), mode="edge")
    rows = rows.reshape(spec.batch, spec.nq, spec.bq, spec.heads, spec.groups, *rest)
    return jnp.moveaxis(rows, (1, 2), (0, 4)).reshape(*spec.rows, *rest)


def from_blocks(spec: AttentionSpec, blocks: Array) -> Array:
    """`[nq, B, K, R, ...]` as `[B, N, T, ...]`."""
    rest = blocks.shape[4:]
    blocks = blocks.reshape(spec.nq, spec.batch, spec.heads, spec.groups, spec.bq, *rest)
    rows = jnp.moveaxis(blocks, 0, 3).reshape(spec.batch, spec.heads * spec.groups, spec.nq * spec.bq, *rest)
    return rows[:, :, : spec.queries]


def to_user(spec: AttentionSpec, blocks: Array, shape: tuple[int, ...]) -> Array:
    """A per-row array in blocks as `[*batch, T, N, ...]`; `shape` is that of the user's query."""
    rows = jnp.swapaxes(from_blocks(spec, blocks), 1, 2)
    return rows.reshape(*shape[:-1], *rows.shape[3:])


def key_blocks(spec: AttentionSpec, keys: Array) -> Array:
    """`[B, S, K, H]` as `[nk, B, K, bk, H]`, padded to whole blocks with zeros."""
    keys = jnp.pad(keys, ((0, 0), (0, spec.nk * spec.bk - spec.keys), (0, 0), (0, 0)))
    keys = keys.reshape(spec.batch, spec.nk, spec.bk, spec.heads, keys.shape[-1])
    return jnp.transpose(keys, (1, 0, 3, 2, 4))


def recut(old: AttentionSpec, new: AttentionSpec, inputs: Inputs, masks: Visibility, args: Any) -> tuple:
    """The inputs, masks and per-row arrays of `old`, cut into the blocks of `new`, which differs in nothing else."""

    def rows(a):
        return recut_rows(old, new, a)

    def keys(a):
        if a is None:
            return None
        a = jnp.moveaxis(a, 0, 1).swapaxes(2, 3).reshape(old.batch, old.nk * old.bk, old.heads, a.shape[-1])
        return key_blocks(new, a[:, : old.keys])

    def padded(a, axis, length, to):
        a = jax.lax.slice_in_dim(a, 0, length, axis=axis)
        return jnp.pad(a, [(0, to - length) if i == axis else (0, 0) for i in range(a.ndim)])

    def entries(a):
        if a is None:
            return None
        a = a if a.shape[3] == 1 else padded(a, 3, old.queries, new.nq * new.bq)
        return a if a.shape[4] == 1 else padded(a, 4, old.keys, new.nk * new.bk)

    query, key, value, scale, bias, slopes = inputs
    scale, slopes = (None if a is None else rows(a) for a in (scale, slopes))
    inputs = Inputs(rows(query), keys(key), keys(value), scale, entries(bias), slopes)
    masks = masks._replace(entries=entries(masks.entries))
    along_queries = {
        name: padded(a, 1, old.queries, new.nq * new.bq)
        for name in ("query_segments", "query_positions")
        if (a := getattr(masks, name)) is not None
    }
    along_keys = {
        name: padded(a, 1, old.keys, new.nk * new.bk)
        for name in ("key_segments", "key_positions")
        if (a := getattr(masks, name)) is not None
    }
    return inputs, masks._replace(**along_queries, **along_keys), jax.tree.map(rows, args)


def recut_rows(old: AttentionSpec, new: AttentionSpec, rows: Array) -> Array:
    """A per-row array in the blocks of `old`, cut into the blocks of `new`."""
    return to_blocks(new, from_blocks(old, rows))
