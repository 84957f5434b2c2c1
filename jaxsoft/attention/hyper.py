"""Estimates of softmax attention in near-linear time.

Exact in part; the rest is estimated from samples or random features.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import finite_gauge, log_or_neg_inf, safe_divide
from jaxsoft.attention._layout import (
    by_key_head,
    from_blocks,
    from_key_head,
    merge,
    prepare,
    scale_of,
    streamed,
    to_blocks,
)
from jaxsoft.rows import logsumexp as row_logsumexp
from jaxsoft.rows.inner import softmax_with


def angular_lsh_buckets(
    x: Float[Array, "*rows H"], directions: Float[Array, "H bits"]
) -> Int[Array, "*rows"]:
    """The bucket of each vector by the signs of its products with random directions (angular hashing).

    Buckets are numbered along a Gray code: the signs of neighbouring buckets differ in one direction only, so
    close numbers mean small angles. (The authors' code permutes the numbers slightly differently.)

    Args:
      x: `[*rows, H]`.
      directions: `[H, bits]`, Gaussian; 30 bits at most.

    Returns:
      `[*rows]` int32 from 0 to `2^bits - 1`.

    Raises:
      TypeError: an argument that is not floating.
      ValueError: an argument of a wrong shape.

    Reference:
      Han et al., "HyperAttention: Long-context Attention in Near-Linear Time".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
      >>> print(jaxsoft.attention.angular_lsh_buckets(x, jnp.eye(2)))
      [2 3 0 1]
    """
    _checks.floating("x", x)
    _checks.floating("directions", directions)
    if directions.ndim != 2 or not 1 <= directions.shape[1] <= 30 or x.shape[-1:] != directions.shape[:1]:
        raise ValueError(
            f"directions must have shape [H, bits], H the width of x and at most 30 bits, got shapes "
            f"{tuple(directions.shape)} and {tuple(x.shape)}"
        )
    bits = (jnp.einsum("...h,hr->...r", x, directions) > 0).astype(jnp.int32)
    # Position in the Gray code: each bit plus all higher ones, modulo 2.
    bits = lax.associative_scan(jnp.bitwise_xor, bits, axis=bits.ndim - 1, reverse=True)
    return jnp.sum(bits << jnp.arange(bits.shape[-1], dtype=jnp.int32), axis=-1)


def _attend(scores: Array, values: Array, where: Array) -> tuple[Array, Array]:
    """Softmax attention of stored scores `[..., T, S]` and its log-sum-exp."""
    weights = softmax_with(scores, where=where)
    return jnp.einsum("...kgts,...ksv->...kgtv", weights, values), row_logsumexp(scores, where=where)


def _gather(x: Array, index: Array) -> Array:
    """Picks positions of `[..., length, width]`."""
    return jnp.take_along_axis(x, index[..., None], axis=-2)


def _hyper(random_key, query, key, value, where, scale, size, samples, bits) -> tuple[Array, Array]:
    """Not causal; query `[*batch, K, G, T, H]`, key `[*batch, K, S, H]`, where `[*batch, K, S]`."""
    t, s = query.shape[-2], key.shape[-2]
    hash_key, sample_key = jax.random.split(random_key)
    directions = jax.random.normal(hash_key, (query.shape[-1], bits), query.dtype)
    # Sort by bucket, hidden keys last.
    fixed_query, fixed_key = lax.stop_gradient((query, key))
    order_q = jnp.argsort(angular_lsh_buckets(fixed_query, directions), axis=-1, stable=True)
    bucket = jnp.where(where, angular_lsh_buckets(fixed_key, directions), 2**bits)
    order_k = jnp.argsort(bucket, axis=-1, stable=True)
    query, key, value = _gather(query, order_q), _gather(key, order_k), _gather(value, order_k)
    where = jnp.take_along_axis(where, order_k, axis=-1)

    # Exact within diagonal blocks, with as many blocks of queries as of keys.
    blocks = -(-max(t, s) // size)
    wide_q, wide_k = -(-t // blocks), -(-s // blocks)
    q = to_blocks(query, -2, wide_q)
    k, v, w = to_blocks(key, -2, wide_k), to_blocks(value, -2, wide_k), to_blocks(where, -1, wide_k)
    if q.shape[0] < blocks or k.shape[0] < blocks:  # short queries or keys: whole blocks of padding
        q, k, v, w = (jnp.pad(x, [(0, blocks - x.shape[0])] + [(0, 0)] * (x.ndim - 1)) for x in (q, k, v, w))
    out, lse = _attend(scale * jnp.einsum("...kgth,...ksh->...kgts", q, k), v, w[..., None, None, :])
    out, lse = from_blocks(out, -2, t), from_blocks(lse, -1, t)

    # The other keys are estimated from a sample of all keys, masked within the query's own block.
    count = jnp.sum(where, axis=-1, keepdims=True, dtype=jnp.int32)
    uniform = jax.random.uniform(sample_key, (*where.shape[:-1], samples))
    drawn = jnp.minimum((uniform * count).astype(jnp.int32), jnp.maximum(count - 1, 0))
    outside = (jnp.arange(t) // wide_q)[:, None] != (drawn // wide_k)[..., None, :]
    outside = (outside & (count > 0)[..., None])[..., None, :, :]
    scores = scale * jnp.einsum("...kgth,...ksh->...kgts", query, _gather(key, drawn))
    other, other_lse = _attend(scores, _gather(value, drawn), outside)
    weight = jnp.log(jnp.maximum(count, 1).astype(scores.dtype)) - math.log(samples)
    out, lse = merge(out, lse, other, other_lse + weight[..., None])
    back = jnp.argsort(order_q, axis=-1)
    return _gather(out, back), jnp.take_along_axis(lse, back, axis=-1)


def _exact(query, key, value, where, scale, is_causal) -> tuple[Array, Array]:
    out, lse = streamed(
        from_key_head(query),
        jnp.moveaxis(key, -3, -2),
        jnp.moveaxis(value, -3, -2),
        where[..., 0, :],
        is_causal=is_causal,
        scale=scale,
    )
    heads = key.shape[-3]
    return by_key_head(out, heads), by_key_head(lse[..., None], heads)[..., 0]


def hyper_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    *,
    random_key: Array,
    key_where: Bool[Array, "*batch S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = 256,
    sample_size: int = 256,
    min_seq_len: int = 4096,
    bits: int = 7,
) -> Float[Array, "*batch T N Hv"]:
    """HyperAttention: an estimate of softmax attention in near-linear time, by hashing and sampling.

    Queries and keys are sorted by angular hashing; blocks on the diagonal of the sorted scores are exact, the
    rest is estimated from a random sample of the keys. The estimate of the rest's mass is unbiased: sampled keys
    in the query's own block are masked. Causal attention is split into halves, recursively: the later half's
    attention to the earlier half is estimated. Computes `block_size + sample_size` scores per query and head
    (times the number of halvings) instead of S. Exact where S <= min_seq_len, or T and S <= block_size; otherwise
    the error falls with `1 / sqrt(sample_size)`.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K. Any length.
      value: `[*batch, S, K, Hv]`.
      random_key: a PRNG key. The output is a deterministic function of it.
      key_where: `[*batch, S]`, True = counts. A masked key is absent, even if it or its value is NaN.
      is_causal: whether query i sees the keys up to i only; then S = T.
      scale: the factor of the scores, `1 / sqrt(H)` by default.
      block_size: the size of the exact blocks.
      sample_size: the number of keys drawn, with replacement.
      min_seq_len: up to this many keys, attention is exact (and streamed).
      bits: the number of hash directions.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider; 0 for a query that sees no key.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Han et al., "HyperAttention: Long-context Attention in Near-Linear Time".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> x = jax.random.normal(jax.random.key(0), (100, 2, 4))
      >>> attend = jaxsoft.attention.hyper_attention
      >>> estimate = attend(x, x, x, random_key=jax.random.key(1), block_size=32, sample_size=64, min_seq_len=16)
      >>> exact = jax.nn.dot_product_attention(x, x, x)
      >>> bool(abs(estimate - exact).mean() < 0.1)
      True
    """
    sizes = dict(block_size=block_size, sample_size=sample_size, min_seq_len=min_seq_len)
    size, samples, shortest = (_checks.integer(name, n, at_least=1) for name, n in sizes.items())
    bits = _checks.integer("bits", bits, at_least=1, at_most=29)
    q, k, v, where = prepare(query, key, value, key_where, is_causal, self_only=True)
    heads, length = k.shape[-2], k.shape[-3]
    scale = scale_of(scale, q.shape[-1])
    q, k, v = by_key_head(q, heads), jnp.moveaxis(k, -2, -3), jnp.moveaxis(v, -2, -3)
    where = jnp.broadcast_to(where[..., None, :], k.shape[:-1])

    def causal(random_key, q, k, v, where):
        length = q.shape[-2]
        if length <= shortest:
            return _exact(q, k, v, where, scale, True)
        random_key, own = jax.random.split(random_key)
        half = length // 2
        halves = [jnp.stack([x[..., :half, :], x[..., half:, :]]) for x in (q, k, v, where[..., None])]
        halves[-1] = halves[-1][..., 0]
        out, lse = causal(random_key, *halves)
        early = [x[0] for x in halves[1:]]
        below = full(own, halves[0][1], *early)
        late, late_lse = merge(out[1], lse[1], *below)
        return jnp.concatenate([out[0], late], axis=-2), jnp.concatenate([lse[0], late_lse], axis=-1)

    def full(random_key, q, k, v, where):
        if k.shape[-2] <= shortest:
            return _exact(q, k, v, where, scale, False)
        return _hyper(random_key, q, k, v, where, scale, size, samples, bits)

    if is_causal:
        parts = 1
        while -(-length // parts) > shortest:
            parts *= 2
        pad = -length % parts
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (q, k, v))
        where = jnp.pad(where, [(0, 0)] * (where.ndim - 1) + [(0, pad)])
    out, _ = (causal if is_causal else full)(random_key, q, k, v, where)
    return from_key_head(out)[..., : query.shape[-3], :, :].astype(query.dtype)


def _orthogonal_directions(random_key: Array, count: int, width: int, dtype: Any) -> Array:
    """`[count, width]`: Gaussian rows, orthogonal in groups of `width`."""
    direction_key, length_key = jax.random.split(random_key)
    groups = -(-count // width)
    q, _ = jnp.linalg.qr(jax.random.normal(direction_key, (groups, width, width), dtype))
    # QR leaves the signs of the rows undetermined, but the features contain both signs of every row.
    rows = jnp.swapaxes(q, -1, -2).reshape(-1, width)[:count]
    lengths = jnp.linalg.norm(jax.random.normal(length_key, (count, width), dtype), axis=-1)
    return rows * lengths[:, None]


def scatterbrain_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch T K H"],
    value: Float[Array, "*batch T K Hv"],
    *,
    random_key: Array,
    window: int = 64,
    num_features: int | None = None,
    key_where: Bool[Array, "*batch T"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "*batch T N Hv"]:
    """Scatterbrain: softmax attention, exact within a local window and by positive random features beyond it.

    The unnormalized weights are `exp(scale q_i . k_j)` where `|i - j| <= window` and `phi(q_i) . phi(k_j)`
    elsewhere, an unbiased estimate of the same. The two sets of keys are summed separately: nothing is
    subtracted, and no mass is counted twice. Linear in the length: `3 window` scores and `num_features` features
    per query and head, and `num_features * (Hv + 1) / window` numbers per token and key head. Exact where the
    window covers everything; otherwise the error falls with `1 / sqrt(num_features)`.

    The exact part is a local window (the authors' `sblocal`); their hashed variant is not implemented.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, T, K, H]`, N a multiple of K, as many positions as the query.
      value: `[*batch, T, K, Hv]`.
      random_key: a PRNG key for the random directions, shared by all heads. The output is a deterministic function of
        it.
      window: the number of exact positions on either side, 1 or more.
      num_features: the size of the feature map, even; by default `H log H`, as the authors', at least 2.
      key_where: `[*batch, T]`, True = counts. A masked key is absent, even if it or its value is NaN.
      is_causal: whether query i sees the keys up to i only.
      scale: the factor of the scores, `1 / sqrt(H)` by default; not negative.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider; 0 for a query that sees no key.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention Approximation".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> x = jax.random.normal(jax.random.key(0), (100, 2, 4))
      >>> estimate = jaxsoft.attention.scatterbrain_attention(x, x, x, random_key=jax.random.key(1), num_features=512)
      >>> exact = jax.nn.dot_product_attention(x, x, x)
      >>> bool(abs(estimate - exact).mean() < 0.1)
      True
    """
    size = _checks.integer("window", window, at_least=1)
    q, k, v, where = prepare(query, key, value, key_where, is_causal)
    _checks.shape("key", key, (*query.shape[:-2], *key.shape[-2:]), "as many positions as the query")
    heads, length, width = k.shape[-2], k.shape[-3], q.shape[-1]
    if num_features is None:
        num_features = max(int(width * math.log(width)) // 2 * 2, 2)
    features = _checks.integer("num_features", num_features, at_least=2)
    if features % 2:
        raise ValueError(f"num_features must be even, got {features}")
    scale = scale_of(scale, width)
    if _checks.is_concrete_number(scale):
        _checks.number("scale", scale, at_least=0)
    size = max(min(size, length), 1)
    root = jnp.sqrt(jnp.asarray(scale, q.dtype))
    q, k, v = by_key_head(q, heads) * root, jnp.moveaxis(k, -2, -3) * root, jnp.moveaxis(v, -2, -3)
    where = jnp.broadcast_to(where[..., None, :], k.shape[:-1])
    directions = _orthogonal_directions(random_key, features // 2, width, q.dtype)

    def exponents(x):  # of phi, without 1 / sqrt(num_features)
        u = jnp.einsum("...h,rh->...r", x, directions)
        return jnp.concatenate([u, -u], axis=-1) - jnp.sum(x * x, axis=-1, keepdims=True) / 2

    # Features relative to the largest one: per query, and over all keys together.
    log_q, log_k = exponents(q), jnp.where(where[..., None], exponents(k), -jnp.inf)
    top_q = finite_gauge(jnp.max(log_q, axis=-1, keepdims=True))
    top_k = finite_gauge(jnp.max(log_k, axis=(-2, -1), keepdims=True, initial=-jnp.inf))
    phi_q, phi_k = jnp.exp(log_q - top_q), jnp.exp(log_k - top_k)
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # the last column is the mass

    # Each block of queries meets its own block of keys, the one before and the one after.
    q, phi_q = to_blocks(q, -2, size), to_blocks(phi_q, -2, size)
    k, phi_k, v, where = (to_blocks(x, -2, size) for x in (k, phi_k, v, where[..., None]))
    blocks = q.shape[0]

    def moved(x, steps):  # the block `steps` later, zeros beyond the ends
        pad = jnp.zeros_like(x[: min(abs(steps), blocks)])
        return jnp.concatenate([x[steps:], pad] if steps > 0 else [pad, x[: blocks - len(pad)]])

    def near(x):
        return jnp.concatenate([moved(x, -1), x, moved(x, 1)], axis=-2)

    far = jnp.einsum("...sr,...sv->...rv", phi_k, v)
    total = moved(jnp.cumsum(far, axis=0), -2)  # of the blocks before those three
    if not is_causal:
        total = total + moved(lax.cumsum(far, axis=0, reverse=True), 2)
    i, j = np.arange(size)[:, None], np.arange(3 * size) - size
    local, seen = np.abs(i - j) <= size, (j <= i) | (not is_causal)
    where, k, phi_k, v = (near(x) for x in (where, k, phi_k, v))
    visible = where[..., 0][..., None, None, :] & seen
    out, lse = _attend(jnp.einsum("...kgth,...ksh->...kgts", q, k), v[..., :-1], visible & local)
    weights = jnp.where(visible & ~local, jnp.einsum("...kgtr,...ksr->...kgts", phi_q, phi_k), 0)
    rest = jnp.einsum("...kgts,...ksv->...kgtv", weights, v)
    rest = rest + jnp.einsum("...kgtr,...krv->...kgtv", phi_q, total)
    mass = from_blocks(rest[..., -1], -1, length)
    other = safe_divide(from_blocks(rest[..., :-1], -2, length), mass[..., None])
    other_lse = log_or_neg_inf(mass) + (top_q[..., 0] + top_k[..., None, :, 0] - math.log(features))
    out, lse = from_blocks(out, -2, length), from_blocks(lse, -1, length)
    return from_key_head(merge(out, lse, other, other_lse)[0]).astype(query.dtype)
