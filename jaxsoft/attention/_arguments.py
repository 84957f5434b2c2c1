"""Checks the arguments of an attention and converts them to the form that its passes take."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.attention._blocks import key_blocks, to_blocks
from jaxsoft.attention._rows import AttentionRows
from jaxsoft.attention._run import choose_block_sizes
from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility
from jaxsoft.kernels.inner import IMPLEMENTATIONS


def prepare(
    query,
    key,
    value,
    bias,
    mask,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_segment_ids=None,
    mask_fn=None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    query_positions=None,
    key_positions=None,
    alibi_slopes=None,
    softcap=None,
    block_sizes=(None, None),
    precision=None,
    implementation=None,
) -> tuple[AttentionRows, tuple[int, ...]]:
    """The rows of scores described by the user's arguments, which are checked, and the shape of the query."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        _checks.floating(name, array)
        if array.ndim < 3 or array.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} must have shape [*batch, length, heads, width] with the query's batch {query.shape[:-3]}, "
                f"got shape {array.shape}"
            )
    shape, batch = query.shape, query.shape[:-3]
    query, key, value = (a.reshape(math.prod(batch), *a.shape[-3:]) for a in (query, key, value))
    b, t, n, h = query.shape
    _, s, k, _ = key.shape
    _checks.shape("key", key, (b, s, k, h), "batch, keys, heads, the query's width")
    _checks.shape("value", value, (b, s, k, value.shape[-1]), "the key's batch, keys and heads; any width")
    if n == 0 or k == 0 or n % k:
        raise ValueError(
            f"query must have a positive multiple of the key's {k} heads, got {n} heads in shape {shape}"
        )
    if h == 0:
        raise ValueError(f"query must have a width of at least 1, got shape {shape}")
    _checks.option("implementation", implementation, (None, *IMPLEMENTATIONS))
    if mask_fn is not None and not callable(mask_fn):
        raise TypeError(f"mask_fn must be a function of two positions, got {_checks.describe(mask_fn)}")
    _checks.flag("is_causal", is_causal)
    if not isinstance(block_sizes, tuple) or len(block_sizes) != 2:
        raise TypeError(f"block_sizes must be a pair (queries, keys), got {_checks.describe(block_sizes)}")
    for name, size in zip(("queries", "keys"), block_sizes):
        if size is not None:
            _checks.integer(f"block_sizes ({name})", size, at_least=1)
    given = query_positions is not None or key_positions is not None
    if query_positions is not None and not (_is_static(query_offset) and query_offset == 0):
        raise ValueError(f"query_offset must be 0 with query_positions, got {_checks.describe(query_offset)}")
    chunks = 2 if given else 1
    bq, bk = choose_block_sizes(block_sizes, implementation, n // k, query, key, chunks)
    static = _is_static(query_offset) and _is_static(key_offset) and not given
    spec = AttentionSpec(
        b,
        k,
        n // k,
        t,
        s,
        bq,
        bk,
        is_causal,
        _window(local_window_size),
        _checks.integer("query_offset", query_offset) if static else None,
        _checks.integer("key_offset", key_offset) if static else 0,
        mask_fn,
        None if softcap is None else _checks.static_number("softcap", softcap, above=0),
        precision,
        implementation,
        block_sizes,
        chunks,
    )
    masks = Visibility(
        query_lengths=_lengths("query_seq_lengths", query_seq_lengths, batch),
        key_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        entries=None if mask is None else entries_of("mask", mask, spec, batch),
        offset=None if static else _offset("query_offset", query_offset, batch),
        key_offset=None if static else _offset("key_offset", key_offset, batch),
        query_positions=_positions("query_positions", query_positions, batch, t, spec.nq * bq),
        key_positions=_positions("key_positions", key_positions, batch, s, spec.nk * bk),
    )
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("query_segment_ids and key_segment_ids must be given together")
    if query_segment_ids is not None:
        ids = [("query_segment_ids", query_segment_ids, t, spec.nq * bq)]
        ids += [("key_segment_ids", key_segment_ids, s, spec.nk * bk)]
        segments = [_segments(name, array, batch, length, padded) for name, array, length, padded in ids]
        masks = masks._replace(query_segments=segments[0], key_segments=segments[1])

    if masks.query_lengths is not None:  # a NaN in a hidden query would spread through the matrix products
        index = masks.query_positions
        index = jnp.arange(t, dtype=jnp.int32) if index is None else index[:, :t]
        keep = index < masks.query_lengths[:, None]
        query = jnp.where(keep[..., None, None], query, 0)
    dtype = accumulation_dtype(query.dtype, key.dtype)
    in_blocks = to_blocks(spec, jnp.swapaxes(query, 1, 2)), key_blocks(spec, key), key_blocks(spec, value)
    rows = AttentionRows(spec, Inputs(*in_blocks), masks)
    inputs = rows.inputs
    scale = 1 / math.sqrt(h) if scale is None else scale
    if _checks.is_concrete_number(scale):
        _checks.number("scale", scale)
    else:
        _per_head("scale", scale, n)
    if query.dtype == dtype:  # scaling the queries loses no precision
        inputs = inputs._replace(query=inputs.query * rows.per_row("scale", scale)[..., None])
    else:
        inputs = inputs._replace(scale=rows.per_row("scale", scale))
    if bias is not None:
        inputs = inputs._replace(bias=entries_of("bias", bias, spec, batch))
    if alibi_slopes is not None:
        _per_head("alibi_slopes", alibi_slopes, n)
        inputs = inputs._replace(slopes=rows.per_row("alibi_slopes", alibi_slopes))
    return dataclasses.replace(rows, inputs=inputs), shape


def _is_static(offset: Any) -> bool:
    return _checks.is_concrete_number(offset) and not isinstance(offset, jax.Array)


def _offset(name: str, offset: Any, batch: tuple[int, ...]) -> Array:
    if _is_static(offset):
        offset = jnp.asarray(_checks.integer(name, offset), jnp.int32)
    _checks.integers(name, offset)
    if offset.shape not in ((), batch):
        raise ValueError(f"{name} must have shape () or {batch} (batch), got shape {offset.shape}")
    return jnp.asarray(offset, jnp.int32).reshape(-1 if offset.shape else ())


def _positions(name: str, given: Any, batch: tuple[int, ...], length: int, padded: int) -> Any:
    """`[B or 1, padded]`: the last position is repeated, so that padding does not widen the range of a block."""
    if given is None:
        return None
    _checks.integers(name, given)
    if given.shape not in ((length,), (*batch, length)):
        raise ValueError(
            f"{name} must have shape {(length,)} or {(*batch, length)} (batch, length), got shape {given.shape}"
        )
    given = jnp.asarray(given, jnp.int32).reshape(-1, length) if length else jnp.zeros((1, 0), jnp.int32)
    return jnp.pad(given, ((0, 0), (0, padded - length)), mode="edge") if padded > length else given


def _window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, tuple):
        window = (window, window)
    if len(window) != 2:
        raise ValueError(f"local_window_size must be a number or a pair (left, right), got {window!r}")
    left, right = (None if w is None else _checks.integer("local_window_size", w, at_least=0) for w in window)
    return left, right


def _lengths(name: str, lengths: Any, batch: tuple[int, ...]) -> Any:
    if lengths is None:
        return None
    _checks.integers(name, lengths)
    _checks.shape(name, lengths, batch, "one length per batch element")
    return jnp.asarray(lengths, jnp.int32).reshape(-1)


def _segments(name: str, ids: Any, batch: tuple[int, ...], length: int, padded: int) -> Array:
    _checks.integers(name, ids)
    _checks.shape(name, ids, (*batch, length), "batch and length")
    return jnp.pad(jnp.asarray(ids).reshape(math.prod(batch), length), ((0, 0), (0, padded - length)))


def _per_head(name: str, value: Any, heads: int) -> None:
    _checks.floating(name, value)
    if value.shape not in ((), (heads,)):
        raise ValueError(
            f"{name} must be a number or have shape ({heads},), one per head, got shape {value.shape}"
        )


def entries_of(name: str, array: Any, spec: AttentionSpec, batch: tuple[int, ...]) -> Array:
    """A mask or bias with the five axes of the scores, padded to whole blocks."""
    heads = spec.heads * spec.groups
    full = (*batch, heads, spec.queries, spec.keys)
    if name == "mask":
        _checks.boolean(name, array)
    else:
        _checks.floating(name, array)
    _checks.broadcastable(name, array, full, "batch, heads, queries, keys")
    array = jnp.asarray(array).reshape((1,) * (len(full) - array.ndim) + array.shape)
    lead, (n, t, s) = array.shape[:-3], array.shape[-3:]
    if math.prod(lead) != 1:
        lead = batch
        array = jnp.broadcast_to(array, (*batch, n, t, s))
    split = (1, 1) if n == 1 else (spec.heads, spec.groups)
    array = array.reshape(math.prod(lead), *split, t, s)
    pads = [
        (0, 0 if size == 1 else blocks * width - size)
        for size, blocks, width in ((t, spec.nq, spec.bq), (s, spec.nk, spec.bk))
    ]
    return jnp.pad(array, ((0, 0), (0, 0), (0, 0), *pads)) if any(p[1] for p in pads) else array
