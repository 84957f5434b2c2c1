"""Shared parts of the linear-time and approximate attentions: checks of arguments, and array layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, finite_gauge, log_or_neg_inf, safe_divide
from jaxsoft.attention._dot_product import dot_product_attention


def prepare(
    query: Array,
    key: Array,
    value: Array,
    where: Any,
    is_causal: bool = False,
    *,
    mask_name: str = "key_where",
    self_only: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Checks the arguments; returns them in the accumulation dtype with 0 at masked keys, and the mask.

    `self_only`: whether a causal attention needs as many queries as keys.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _checks.floating(name, x)
    if query.ndim < 3:
        raise ValueError(f"query must have shape [*batch, T, N, H], got {_checks.describe(query)}")
    *batch, t, n, h = query.shape
    s, k = key.shape[-3:-1] if key.ndim >= 3 else (0, 0)
    _checks.shape("key", key, (*batch, s, k, h), "[*batch, S, K, H], batch and width as the query's")
    _checks.shape("value", value, (*batch, s, k, *value.shape[-1:]), "[*batch, S, K, Hv], as the key's")
    if k == 0 or n % k:
        raise ValueError(f"query must have a multiple of the key's {k} heads, got {n} in shape {query.shape}")
    _checks.flag("is_causal", is_causal)
    if self_only and is_causal and t != s:
        raise ValueError(f"key must have the query's length {t} with is_causal=True, got length {s}")
    where = mask_of(mask_name, where, (*batch, s))
    dtype = accumulation_dtype(query.dtype, key.dtype, value.dtype)
    keep = where[..., None, None]
    key, value = (jnp.where(keep, x, 0).astype(dtype) for x in (key, value))
    return query.astype(dtype), key, value, where


def mask_of(name: str, where: Any, shape: tuple[int, ...]) -> Array:
    """A mask of positions, all True by default."""
    if where is None:
        return jnp.ones(shape, bool)
    _checks.boolean(name, where)
    _checks.shape(name, where, shape, "one entry per position")
    return where


def scale_of(scale: Any, width: int) -> float:
    """The scale of the scores, `1 / sqrt(H)` by default."""
    if scale is None:
        return 1 / math.sqrt(width)
    _checks.number("scale", scale)
    return scale


def by_key_head(x: Array, heads: int) -> Array:
    """`[*batch, T, N, H]` as `[*batch, K, G, T, H]`."""
    x = x.reshape(*x.shape[:-2], heads, x.shape[-2] // heads, x.shape[-1])
    return jnp.moveaxis(x, -4, -2)


def from_key_head(x: Array) -> Array:
    """`[*batch, K, G, T, H]` as `[*batch, T, N, H]`."""
    x = jnp.moveaxis(x, -2, -4)
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def to_blocks(x: Array, axis: int, size: int) -> Array:
    """Cuts an axis into blocks, `[blocks, ...]`; the last one is padded with zeros."""
    axis %= x.ndim
    blocks = -(-x.shape[axis] // size)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, blocks * size - x.shape[axis])
    x = jnp.pad(x, pad).reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def from_blocks(x: Array, axis: int, length: int) -> Array:
    """The inverse of `to_blocks`; `axis` is that of the result."""
    axis %= x.ndim - 1
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def streamed(
    query: Array,
    key: Array,
    value: Array,
    where: Array | None,
    *,
    key_bias: Array | None = None,
    normalizer: Callable | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """`dot_product_attention` with a mask of keys: output and log-sum-exp. `key_bias`: `[*batch, S, K]`."""
    *batch, _, n, _ = query.shape

    def by_head(x):
        return jnp.moveaxis(x.reshape(-1, *x.shape[len(batch) :]), -1, -2) if hasattr(x, "shape") else x

    bias = None
    if key_bias is not None:
        bias = jnp.repeat(jnp.moveaxis(key_bias, -1, -2), n // key.shape[-2], axis=-2)[..., None, :]
    mask = None if where is None else where[..., None, None, :]
    if isinstance(normalizer, functools.partial):
        normalizer = functools.partial(normalizer.func, **jax.tree.map(by_head, normalizer.keywords))
    return dot_product_attention(
        query, key, value, bias, mask, normalizer=normalizer, return_residual=True, **options
    )


def merge(out: Array, logsumexp: Array, other_out: Array, other_logsumexp: Array) -> tuple[Array, Array]:
    """Merges the softmax attentions over two disjoint sets of keys into one."""
    m = finite_gauge(jnp.maximum(logsumexp, other_logsumexp))
    a, b = jnp.exp(logsumexp - m), jnp.exp(other_logsumexp - m)
    both = a[..., None] * out + b[..., None] * other_out
    return safe_divide(both, (a + b)[..., None]), m + log_or_neg_inf(a + b)
