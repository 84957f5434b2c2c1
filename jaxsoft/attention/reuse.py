"""Softmax attention with weights reused, selected or changed.

And statistics of the weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, log_or_neg_inf, safe_divide
from jaxsoft.attention._layout import (
    by_key_head,
    from_blocks,
    from_key_head,
    mask_of,
    prepare,
    scale_of,
    streamed,
    to_blocks,
)
from jaxsoft.normalizers import Normalizer, defined_by, sparse_softmax
from jaxsoft.normalizers.inner import per_row
from jaxsoft.rows import Logits, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis, softmax_with


def _by_query_blocks(function: Callable, queries: Any, block_size: int) -> Any:
    """`function(block of queries, their positions)` for all blocks in sequence; positions are on axis -2."""
    block_size = _checks.integer("block_size", block_size, at_least=1)
    length = jax.tree.leaves(queries)[0].shape[-2]
    size = max(min(block_size, length), 1)
    blocks = jax.tree.map(lambda x: to_blocks(x, -2, size), queries)
    positions = jnp.arange(-(-length // size) * size, dtype=jnp.int32).reshape(-1, size)
    out = lax.map(jax.checkpoint(lambda block: function(*block), prevent_cse=False), (blocks, positions))
    return jax.tree.map(lambda x: from_blocks(x, -2, length), out)


# --- one softmax for several layers -------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query", "key", "logsumexp", "key_where", "scale"],
    meta_fields=["is_causal"],
)
@dataclasses.dataclass(frozen=True)
class SharedSoftmax:
    """The weights of one attention, `exp(scale * query . key - logsumexp)`, in parts (a pytree).

    Attributes:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`.
      logsumexp: `[*batch, T, N]`, over the scores of each query.
      key_where: `[*batch, S]` or None.
      scale: the factor of the scores.
      is_causal: whether the attention was causal (static).
    """

    query: Array
    key: Array
    logsumexp: Array
    key_where: Any
    scale: Any
    is_causal: bool


def _given_terms(tile, state, params):
    logsumexp = params["logsumexp"]
    return (jnp.exp(tile.scores - jnp.where(logsumexp == -jnp.inf, 0, logsumexp)[..., None]),)


def _given_coefficient(state, params):
    return (jnp.ones_like(params["logsumexp"]),)


def _softmax_of(rows, *, logsumexp):
    params = {"logsumexp": rows.per_row("logsumexp", logsumexp)}
    return Normalizer(None, _given_terms, _given_coefficient, params=params)


@defined_by(_softmax_of)
def _given_softmax(*args, **options):
    """Softmax with a known log-sum-exp: one sum, without statistics."""
    raise NotImplementedError


def unified_softmax_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    *,
    key_where: Bool[Array, "*batch S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Float[Array, "*batch T N Hv"], SharedSoftmax]:
    """Softmax attention whose weights later layers reuse (UniAttn): the output, and the weights in parts.

    The later layers call `reuse_softmax_attention`: they need only values, no queries, keys or softmax of their
    own. Exact softmax attention; streamed, memory linear in the length.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K.
      value: `[*batch, S, K, Hv]`.
      key_where: `[*batch, S]`, True = counts. A masked key is absent, even if it or its value is NaN.
      is_causal: whether query i sees the keys up to i only.
      scale: the factor of the scores, `1 / sqrt(H)` by default.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, 0 for a query that sees no key; and a `SharedSoftmax`, of size
      linear in the length.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Xiong et al., "UniAttn: Reducing Inference Costs via Softmax Unification for Post-Training LLMs".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.attention import reuse_softmax_attention, unified_softmax_attention
      >>> x = jnp.linspace(-1, 1, 24).reshape(6, 2, 2)
      >>> out, shared = unified_softmax_attention(x, x, x, is_causal=True)
      >>> bool(jnp.allclose(reuse_softmax_attention(shared, 2 * x), 2 * out, atol=1e-6))
      True
    """
    q, k, v, _ = prepare(query, key, value, key_where, is_causal)
    scale = scale_of(scale, query.shape[-1])
    out, logsumexp = streamed(q, k, v, key_where, is_causal=is_causal, scale=scale)
    return out.astype(query.dtype), SharedSoftmax(query, key, logsumexp, key_where, scale, is_causal)


def reuse_softmax_attention(
    shared: SharedSoftmax,
    value: Float[Array, "*batch S K Hv"],
    *,
    hidden: Float[Array, "*batch T D"] | None = None,
    compensation: Float[Array, "D N Hv"] | None = None,
) -> Float[Array, "*batch T N Hv"]:
    """The weights of an earlier layer applied to this layer's values, `P v + hidden @ compensation` (UniAttn).

    The weights are recomputed, block by block, from the earlier layer's queries, keys and log-sum-exp: exact,
    memory linear in the length, without statistics. Gradients flow into the earlier layer.

    Args:
      shared: what `unified_softmax_attention` returned.
      value: `[*batch, S, K, Hv]`; Hv may differ from that of the earlier layer.
      hidden: `[*batch, T, D]`, the input of this layer after its norm.
      compensation: `[D, N, Hv]`, the linear term that makes up for using another layer's weights; the paper fits
        it by least squares to the difference of the outputs, then trains it. Needs `hidden`, and vice versa.

    Returns:
      `[*batch, T, N, Hv]` in the dtype of the values; for a query that sees no key, the compensation alone.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Xiong et al., "UniAttn: Reducing Inference Costs via Softmax Unification for Post-Training LLMs".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.attention import reuse_softmax_attention, unified_softmax_attention
      >>> x = jnp.linspace(-1, 1, 24).reshape(6, 2, 2)
      >>> _, shared = unified_softmax_attention(x, x, x)
      >>> hidden, compensation = jnp.ones((6, 3)), jnp.ones((3, 2, 2))
      >>> reuse_softmax_attention(shared, x, hidden=hidden, compensation=compensation).shape
      (6, 2, 2)
    """
    if not isinstance(shared, SharedSoftmax):
        raise TypeError(f"shared must be a SharedSoftmax, got {_checks.describe(shared)}")
    query, key, v, _ = prepare(shared.query, shared.key, value, shared.key_where, shared.is_causal)
    given = functools.partial(_given_softmax, logsumexp=shared.logsumexp)
    out, _ = streamed(
        query, key, v, shared.key_where, is_causal=shared.is_causal, scale=shared.scale, normalizer=given
    )
    if (hidden is None) != (compensation is None):
        raise ValueError("hidden and compensation must be given together, got only one of them")
    if hidden is not None and compensation is not None:
        _checks.floating("hidden", hidden)
        _checks.floating("compensation", compensation)
        _checks.shape("hidden", hidden, (*query.shape[:-2], *hidden.shape[-1:]), "[*batch, T, D]")
        expected = (hidden.shape[-1], query.shape[-2], v.shape[-1])
        _checks.shape("compensation", compensation, expected, "[D, N, Hv]")
        out = out + jnp.einsum("...td,dnv->...tnv", hidden, compensation, preferred_element_type=out.dtype)
    return out.astype(value.dtype)


# --- other weights ------------------------------------------------------------------------------------------


def urpe_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    factors: Float[Array, "N offsets"],
    *,
    bias: Float[Array, "N offsets"] | None = None,
    key_where: Bool[Array, "*batch S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = 128,
) -> Float[Array, "*batch T N Hv"]:
    """Attention with universal relative position factors: softmax weights times a learned `c[j - i]` (URPE).

    `o_i = sum_j softmax_j(scale q_i . k_j + b[j - i]) c[j - i] v_j`: rows need not sum to 1 and weights may be
    negative, which makes the attention universal. With c = 1 it is ordinary attention (a good initial value; the
    authors initialize at random). Exact. Time as for softmax attention; memory linear in the length, with
    `block_size * S` scores per head at a time.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K.
      value: `[*batch, S, K, Hv]`.
      factors: `[N, 2 m + 1]`, c at offsets `j - i` from -m to m; other offsets are clipped to the ends (ours).
        For logarithmic buckets, as in the authors' code, give `table[:, bucket_of(offsets)]`.
      bias: `[N, 2 m' + 1]`, b of the same form: an ordinary relative bias of the scores.
      key_where: `[*batch, S]`, True = counts. A masked key is absent, even if it or its value is NaN.
      is_causal: whether query i sees the keys up to i only.
      scale: the factor of the scores, `1 / sqrt(H)` by default.
      block_size: queries per block; the result does not depend on it.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider; 0 for a query that sees no key.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Luo et al., "Your Transformer May Not be as Powerful as You Expect".

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsoft
      >>> q = jnp.array([[0.2, 1.0, -0.5], [0.4, 0.1, 0.3], [1.0, 0.0, 0.7]])[:, None]
      >>> k = jnp.eye(3)[:, None]
      >>> v = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[:, None]
      >>> c = jnp.array([[0.5, 0.8, 1.0, -0.3, 0.2]])
      >>> out = jaxsoft.attention.urpe_attention(q, k, v, c, scale=1.0)
      >>> print(np.asarray(out)[:, 0].round(3))
      [[ 0.295 -0.153]
       [ 0.2    0.177]
       [ 0.588  0.491]]
    """
    q, k, v, where = prepare(query, key, value, key_where, is_causal)
    heads, length = k.shape[-2], k.shape[-3]
    scale = scale_of(scale, q.shape[-1])

    def table(name, x):
        _checks.floating(name, x)
        if x.ndim != 2 or x.shape[0] != q.shape[-2] or x.shape[1] % 2 == 0:
            expected = f"({q.shape[-2]}, 2 m + 1), one row per head, one column per offset from -m to m"
            raise ValueError(f"{name} must have shape {expected}, got shape {tuple(x.shape)}")
        x = jnp.asarray(x, q.dtype).reshape(heads, -1, x.shape[1])
        m = x.shape[-1] // 2
        return lambda offset: x[..., jnp.clip(offset, -m, m) + m]

    factor = table("factors", factors)
    extra = None if bias is None else table("bias", bias)

    def block(q, position):
        offset = jnp.arange(length, dtype=jnp.int32) - position[:, None]
        scores = scale * jnp.einsum("...kgth,...skh->...kgts", q, k)
        scores = scores if extra is None else scores + extra(offset)
        keep = where[..., None, None, None, :]
        weights = softmax_with(scores, where=keep & (offset <= 0) if is_causal else keep)
        return jnp.einsum("...kgts,...skv->...kgtv", weights * factor(offset), v)

    out = _by_query_blocks(block, by_key_head(q, heads), block_size)
    return from_key_head(out).astype(query.dtype)


def top_k_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    *,
    k: int,
    key_where: Bool[Array, "*batch S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "*batch T N Hv"]:
    """Softmax attention of each query to the k keys with the largest scores: `sparse_softmax` as the normalizer.

    The paper says that its hard attention keeps the relevant entries; that these are the k largest scores is
    reconstructed. Streamed: memory linear in the length, time as for softmax attention and a selection. Equal to
    softmax attention where k is at least the number of keys. Of equal scores the earlier key is kept. The
    gradient flows through the kept keys only.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K.
      value: `[*batch, S, K, Hv]`.
      k: the number of keys, a static integer of 1 or more; where a query sees fewer, all are kept.
      key_where: `[*batch, S]`, True = counts. A masked key is absent, even if it or its value is NaN.
      is_causal: whether query i sees the keys up to i only.
      scale: the factor of the scores, `1 / sqrt(H)` by default.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider; 0 for a query that sees no key.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Nagarajan et al., "AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more
      Accurate NLP Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> q, k = jnp.ones((1, 1, 1)), jnp.array([1.0, 2.0, -1.0, 0.5])[:, None, None]
      >>> v = jnp.eye(4)[:, None]
      >>> print(jaxsoft.attention.top_k_attention(q, k, v, k=2).round(6))
      [[[0.268941 0.731059 0.       0.      ]]]
    """
    count = _checks.integer("k", k, at_least=1)
    q, keys, v, _ = prepare(query, key, value, key_where, is_causal)
    scale = scale_of(scale, q.shape[-1])
    sparse = functools.partial(sparse_softmax, k=min(count, key.shape[-3]))
    out, _ = streamed(q, keys, v, key_where, is_causal=is_causal, scale=scale, normalizer=sparse)
    return out.astype(query.dtype)


class NgramAttention(NamedTuple):
    """The result of `ngram_attention`.

    Attributes:
      output: `[*batch, T, V]`, the mean of the values that the position attends to; 0 without a match.
      matched: `[*batch, T]` booleans, whether the position has a match.
    """

    output: Array
    matched: Array


def ngram_attention(
    tokens: Int[Array, "*batch T"],
    value: Float[Array, "*batch T V"],
    *,
    n: int,
    where: Bool[Array, "*batch T"] | None = None,
    block_size: int = 128,
) -> NgramAttention:
    """Attends evenly to what followed earlier occurrences of the last n - 1 tokens: an n-gram model in context.

    Position i attends to the positions t <= i where the n - 1 tokens before t equal the n - 1 tokens up to and
    including i. With one-hot tokens as values, the output is the n-gram estimate of the next token. One head,
    no queries or keys; causal. Only the values get a gradient. Exact; memory linear in the length, with
    `block_size * T` matches at a time.

    Args:
      tokens: `[*batch, T]` integers.
      value: `[*batch, T, V]`.
      n: the order, a static integer of 1 or more (1: all positions so far).
      where: `[*batch, T]`, True = counts. A masked token (padding) never matches, and its value may be
        NaN.
      block_size: positions per block; the result does not depend on it.

    Returns:
      `NgramAttention(output, matched)`; the output in the values' dtype. Without a match: 0 and False (ours).

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Akyurek et al., "In-Context Language Learning: Architectures and Algorithms".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> tokens = jnp.array([1, 2, 3, 1, 2, 4, 1, 2])
      >>> out = jaxsoft.attention.ngram_attention(tokens, jax.nn.one_hot(tokens, 5), n=3)
      >>> print(out.output[-1], out.matched[-1])
      [0.  0.  0.  0.5 0.5] True
    """
    order = _checks.integer("n", n, at_least=1)
    _checks.integers("tokens", tokens)
    _checks.floating("value", value)
    _checks.shape("value", value, (*tokens.shape, *value.shape[-1:]), "[*batch, T, V], one value per token")
    keep = mask_of("where", where, tokens.shape)
    length = tokens.shape[-1]
    values = jnp.where(keep[..., None], value, 0).astype(accumulation_dtype(value.dtype))

    def back(x, steps):  # x at position i - steps, 0 or False before the first
        pad = [(0, 0)] * (x.ndim - 1) + [(min(steps, length), 0)]
        return jnp.pad(x, pad)[..., :length]

    context = [back(tokens, step) for step in range(order - 1)]
    whole = functools.reduce(jnp.logical_and, [back(keep, step) for step in range(order - 1)], keep)
    before = [back(c, 1) for c in context]
    follows = keep if order == 1 else keep & back(whole, 1)

    def block(queries, position):
        context, whole = queries[..., :-1], queries[..., -1] != 0
        match = whole[..., None] & follows[..., None, :] & (jnp.arange(length) <= position[:, None])
        for i, token in enumerate(before):
            match &= context[..., i, None] == token[..., None, :]
        count = jnp.sum(match, axis=-1, keepdims=True, dtype=jnp.int32)
        total = jnp.einsum("...ts,...sv->...tv", match.astype(values.dtype), values)
        return safe_divide(total, count.astype(values.dtype)), count

    queries = jnp.stack([*context, whole.astype(tokens.dtype)], axis=-1)
    out, count = _by_query_blocks(block, queries, block_size)
    return NgramAttention(out.astype(value.dtype), count[..., 0] > 0)


# --- statistics of the weights ------------------------------------------------------------------------------


def long_context_log_mass(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    *,
    key_where: Bool[Array, "*batch S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "*batch T N"]:
    """`log sum_j exp(scale q . k_j)` from the first two moments of the keys: `log S + q . mu + q^T Sigma q / 2`.

    Estimates which heads would gain from far keys, without visiting these for each query: after one pass over the
    keys a query costs `H^2`. Exact for Gaussian keys in the limit of many; an approximation otherwise.
    Reconstructed from the abstract.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K: the keys of the far context.
      key_where: `[*batch, S]`, True = counts. A masked key is absent, even if it is NaN.
      scale: the factor of the scores, `1 / sqrt(H)` by default.

    Returns:
      `[*batch, T, N]`, float32 or wider; -inf without keys.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Donhauser et al., "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> key = jnp.array([[0.3, 0.1], [0.2, -0.4], [-0.1, 0.5], [0.4, 0.2]])[:, None]
      >>> query = jnp.array([[[0.7, 0.3]]])
      >>> print(jaxsoft.attention.long_context_log_mass(query, key, scale=1.0).round(5))
      [[1.56434]]
    """
    query, key, _, where = prepare(query, key, key, key_where)
    heads = key.shape[-2]
    query = by_key_head(query * scale_of(scale, query.shape[-1]), heads)
    count = jnp.sum(where, axis=-1, dtype=jnp.int32).astype(key.dtype)
    each = jnp.maximum(count, 1)[..., None, None]
    mean = jnp.sum(key, axis=-3) / each
    centred = jnp.where(where[..., None, None], key - mean[..., None, :, :], 0)
    covariance = jnp.einsum("...skh,...skj->...khj", centred, centred) / each[..., None]
    linear = jnp.einsum("...kgth,...kh->...kgt", query, mean)
    square = jnp.einsum("...kgth,...khj,...kgtj->...kgt", query, covariance, query)
    mass = log_or_neg_inf(count)[..., None, None, None] + linear + square / 2
    return from_key_head(mass[..., None])[..., 0]


def attention_entropy_regularizer(
    scores: Logits,
    *,
    threshold: float | Float[Array, "#*rows"],
    margin: float = 0.2,
    context: str | int = "columns",
    continuous: bool = False,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """Penalizes attention rows whose entropy is far from a learned share of the largest possible entropy.

    `d^2` where `|d| > margin E`, else 0; `d = H - threshold E`, H the entropy of softmax over the row, `E =
    log(context)`. The whole deviation is squared, as in the author's code: the penalty jumps by `(margin E)^2`
    at the margin, unless `continuous`. The author sums over batch and rows, takes the mean over heads and
    layers and multiplies by 1e-5. The entropy comes from row statistics: exact, also for weights of 0, and
    streamed for `linear_logits` (one head: `linear_logits(query, scale * key.T)`).

    Args:
      scores: `[*rows, columns]`, such as `[batch, heads, queries, keys]`, floating, or `linear_logits`.
      threshold: the learned share: a number, or an array that broadcasts to `[*rows]` (`[heads, 1]` for one
        per head).
      margin: the tolerance as a share of E, 0 or more.
      context: the number whose logarithm is E: `"columns"`, the number of columns, also for short causal rows;
        `"row"`, the number of present entries of each row; or a static integer.
      continuous: whether to square the excess `|d| - margin E` only (ours).
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Penalties `[*rows]`, float32 or wider, never averaged; 0 for a row without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown option.

    Reference:
      Jha and Reagen, "AERO: Softmax-Only LLMs for Efficient Private Inference".

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsoft
      >>> weights = jnp.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.4, 0.3, 0.3, 0], [0.25, 0.25, 0.25, 0.25]])
      >>> penalty = jaxsoft.attention.attention_entropy_regularizer(jnp.log(weights), threshold=0.5)
      >>> print(np.asarray(penalty).round(3))
      [0.48  0.    0.157 0.48 ]
    """
    _checks.number("margin", margin, at_least=0)
    _checks.flag("continuous", continuous)
    columns = scores.shape[check_axis(scores, axis)]
    wanted = (reductions.softmax_moments(), reductions.count())
    moments, count = reduce_rows(scores, wanted, axis=axis, where=where)
    entropy = moments.entropy
    if context == "row":
        size = count
    elif context == "columns":
        size = columns
    elif isinstance(context, str):
        raise ValueError(f"context must be 'columns', 'row' or a static integer, got {context!r}")
    else:
        size = _checks.integer("context", context, at_least=1)
    largest = jnp.log(jnp.maximum(jnp.asarray(size, entropy.dtype), 1))
    d = entropy - per_row("threshold", threshold, entropy.shape, entropy.dtype) * largest
    excess = jnp.abs(d) - margin * largest
    deviation = excess if continuous else d
    return jnp.where((excess > 0) & (count > 0), deviation * deviation, 0)
