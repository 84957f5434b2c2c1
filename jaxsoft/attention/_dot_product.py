"""Dot-product attention with any normalizer, streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from jaxsoft.attention._arguments import prepare
from jaxsoft.attention._rows import to_user
from jaxsoft.attention._weights import last_pass, weighting
from jaxsoft.normalizers.inner import after, is_exponential, times_scale
from jaxsoft.rows import reductions


class AttentionStatistics(NamedTuple):
    """Statistics of the scores that each query sees, `[*batch, T, N]`, in float32 or wider.

    They are those of softmax over the scores, after what the normalizer does to them first (a temperature, noise),
    without sinks and dropout.

    Attributes:
      logsumexp: `log sum_j exp(score_j)`; -inf for a query that sees nothing.
      max_score: the largest score; -inf for a query that sees nothing.
      entropy: of softmax over the scores, in nats; 0 for a query that sees nothing.
    """

    logsumexp: Array
    max_score: Array
    entropy: Array


def dot_product_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K V"],
    bias: Float[Array, "#*batch #N #T #S"] | None = None,
    mask: Bool[Array, "#*batch #N #T #S"] | None = None,
    *,
    normalizer: Callable | None = None,
    scale: float | Float[Array, " N"] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "*batch"] | None = None,
    key_value_seq_lengths: Int[Array, "*batch"] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_segment_ids: Int[Array, "*batch T"] | None = None,
    key_segment_ids: Int[Array, "*batch S"] | None = None,
    mask_fn: Callable[[Array, Array], Array] | None = None,
    query_offset: int | Int[Array, ...] = 0,
    alibi_slopes: Float[Array, " N"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    block_sizes: tuple[int | None, int | None] = (None, None),
    precision: Any = None,
    implementation: str | None = None,
    return_residual: bool = False,
    return_statistics: bool = False,
) -> Any:
    """Attention, `normalizer(scale * query @ key) @ value`, whose scores and weights are never stored.

    Takes the place of `jax.nn.dot_product_attention`, with memory that grows with the length instead of its square.
    Every option goes with every other, and every floating argument has a gradient (forward mode and second order,
    too). Blocks of scores that the masks hide as a whole are not computed. A query that sees no key gives 0, with
    gradient 0.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K: each head of the keys serves N / K heads of queries.
      value: `[*batch, S, K, V]`; V need not be H.
      bias: added to the scores after scale and softcap; broadcasts to `[batch, N, T, S]`. An entry of -inf hides.
      mask: booleans that broadcast to `[batch, N, T, S]`, True = visible. Keys hidden from all queries of a batch
        element by lengths or by a mask without axes N and T may hold NaN.
      normalizer: any normalizer of the library that streams, `jaxsoft.softmax` by default, or a
        `functools.partial` of one with its options: numbers, arrays `[N]` (one number a head), or arrays that
        broadcast to `[batch, N, T]`.
      scale: of the scores: a number or one a head; `1 / sqrt(H)` by default.
      is_causal: whether a query sees no key at a later position.
      query_seq_lengths: `[*batch]`, queries from there on give 0.
      key_value_seq_lengths: `[*batch]`, keys from there on are hidden.
      local_window_size: how many positions to its left and right a query sees: one number for both, or a pair, in
        which None is no bound.
      query_segment_ids: `[*batch, T]`, a query sees keys of its own segment (packed sequences).
      key_segment_ids: `[*batch, S]`.
      mask_fn: `(query_position, key_position) -> visible`, a predicate on broadcasting int32 arrays, evaluated block
        by block. A module-level or cached function (it is part of the key of the compiled program).
      query_offset: the position of the first query, for causal masks, windows, slopes and predicates: 0, or the
        length of what came before; an array `[]` or `[*batch]` if known at run time only.
      alibi_slopes: `[N]`, adds `slope * (key position - query position)` to the scores.
      softcap: caps the scaled scores to `(-softcap, softcap)` by `softcap * tanh(scores / softcap)`.
      sinks: `[N]`, logits of learned sinks: an entry without a value in every row. For normalizers of the
        exponential family.
      dropout_rate: the fraction of weights dropped, after normalization; which ones depends on the key and on
        batch, head, query and key positions only.
      dropout_key: a PRNG key, for a rate above 0.
      block_sizes: queries and keys in a block; None chooses. The result does not depend on it.
      precision: of the matrix products, as in `jax.lax.dot_general`; they accumulate in float32 at least.
      implementation: `"xla"`, or the kernels `"pallas_tpu"` or `"mosaic_gpu"` (reverse mode and first order only);
        None picks the best that can run the case (see `jaxsoft.kernels.explain`).
      return_residual: whether to return the log-sum-exp of each query, too, as `jax.nn` does.
      return_statistics: whether to return `AttentionStatistics`, too.

    Returns:
      `[*batch, T, N, V]` in the dtype of the queries; with `return_residual` the pair of it and the log-sum-exp
      `[*batch, T, N]`; with `return_statistics` the pair of it and `AttentionStatistics`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or one that the normalizer cannot take.

    Reference:
      Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness"; Milakov and
      Gimelshein, "Online normalizer calculation for softmax".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.attention import dot_product_attention
      >>> x = jnp.linspace(-1, 1, 24).reshape(1, 6, 2, 2)
      >>> out = dot_product_attention(x, x, x, normalizer=jaxsoft.softpick, is_causal=True)
      >>> out.shape
      (1, 6, 2, 2)
    """
    rows, shape = prepare(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        mask_fn=mask_fn,
        query_offset=query_offset,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        block_sizes=block_sizes,
        precision=precision,
        implementation=implementation,
    )
    last = last_pass(rows, normalizer, sinks, dropout_rate, dropout_key)
    passes = [weighting(rows, last)]
    if return_residual or return_statistics:
        before = (
            (*last.before, times_scale) if is_exponential(last) and "scale" in last.params else last.before
        )
        moments = after(reductions.softmax_moments(variance=False), before)._replace(args=(last.params,))
        maximum = after(reductions.maximum(), before)._replace(args=(last.params,))
        passes += [moments, maximum]
    states = rows.run(passes)
    out = to_user(rows.spec, passes[0].finalize(states[0], last.params), shape).astype(query.dtype)
    if not (return_residual or return_statistics):
        return out
    m = reductions.softmax_moments(variance=False).finalize(states[1])
    statistics = AttentionStatistics(m.logsumexp, reductions.maximum().finalize(states[2]), m.entropy)
    statistics = AttentionStatistics(*(to_user(rows.spec, s, shape) for s in statistics))
    return out, (statistics if return_statistics else statistics.logsumexp)
