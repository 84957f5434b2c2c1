"""Streamed dot-product attention with any normalizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft.attention._arguments import prepare
from jaxsoft.attention._blocks import to_user
from jaxsoft.attention._cudnn import Options, attention_or_reason
from jaxsoft.attention._mesh import attend_on_mesh, layout_of
from jaxsoft.attention._ring import prepare_ring
from jaxsoft.attention._weights import last_pass, weighting
from jaxsoft.normalizers import softmax
from jaxsoft.normalizers.inner import after, is_exponential, times_scale
from jaxsoft.rows import reductions


class AttentionStatistics(NamedTuple):
    """Statistics of the scores that each query sees, `[*batch, T, N]`, in float32 or wider.

    They describe softmax over the scores as the normalizer first changes them (by a temperature or noise), without
    sinks and dropout.

    Attributes:
      logsumexp: `log sum_j exp(score_j)`; -inf for a query that sees nothing.
      max_score: the largest score; -inf for a query that sees nothing.
      entropy: of softmax over the scores, in nats; 0 for a query that sees nothing.
    """

    logsumexp: Array
    max_score: Array
    entropy: Array


class _Options(TypedDict, total=False):
    """The options of `dot_product_attention` that do not change what it returns."""

    normalizer: Callable | None
    scale: float | Float[Array, " N"] | None
    is_causal: bool
    query_seq_lengths: Int[Array, "*batch"] | None
    key_value_seq_lengths: Int[Array, "*batch"] | None
    local_window_size: int | tuple[int | None, int | None] | None
    query_segment_ids: Int[Array, "*batch T"] | None
    key_segment_ids: Int[Array, "*batch S"] | None
    mask_fn: Callable[[Array, Array], Array] | None
    query_offset: int | Int[Array, ...]
    query_positions: Int[Array, "*batch T"] | None
    key_positions: Int[Array, "*batch S"] | None
    alibi_slopes: Float[Array, " N"] | None
    softcap: float | None
    sinks: Float[Array, " N"] | None
    dropout_rate: float
    dropout_key: Array | None
    broadcast_dropout: bool
    block_sizes: tuple[int | None, int | None]
    precision: Any
    implementation: str | None
    axis_name: str | tuple[str, ...] | None


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    return_residual: Literal[False] = False,
    return_statistics: Literal[False] = False,
    **options: Unpack[_Options],
) -> Float[Array, "*batch T N V"]: ...


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    return_residual: Literal[True],
    return_statistics: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[Float[Array, "*batch T N V"], Float[Array, "*batch T N"]]: ...


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    return_residual: bool = False,
    return_statistics: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Float[Array, "*batch T N V"], AttentionStatistics]: ...


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
    query_positions: Int[Array, "*batch T"] | None = None,
    key_positions: Int[Array, "*batch S"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    broadcast_dropout: bool = False,
    block_sizes: tuple[int | None, int | None] = (None, None),
    precision: Any = None,
    implementation: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    return_residual: bool = False,
    return_statistics: bool = False,
) -> Any:
    """Attention, `normalizer(scale * query @ key) @ value`, whose scores and weights are never stored.

    Replaces `jax.nn.dot_product_attention`, with memory linear in the length instead of quadratic. All options can be
    combined, and every floating argument has a gradient (also in forward mode and of second order). Blocks of scores
    that the masks hide completely are not computed. A query that sees no key gives 0, with gradient 0.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K: N / K query heads share each key head.
      value: `[*batch, S, K, V]`; V may differ from H.
      bias: added to the scores after scale and softcap; broadcasts to `[batch, N, T, S]`. -inf hides an entry.
      mask: booleans that broadcast to `[batch, N, T, S]`, True = visible. Keys may hold NaN if lengths, or a mask
        of size 1 along N and T, hide them from all queries of their batch element.
      normalizer: any normalizer of the library that streams, `jaxsoft.softmax` by default, or a
        `functools.partial` of one with its options: numbers, arrays `[N]` (one number per head), or arrays
        that broadcast to `[batch, N, T]`.
      scale: multiplies `query @ key`: a number, or one number per head; `1 / sqrt(H)` by default.
      is_causal: whether a query sees no key at a later position.
      query_seq_lengths: `[*batch]`, queries beyond this length give 0.
      key_value_seq_lengths: `[*batch]`, keys beyond this length are hidden.
      local_window_size: how many positions a query sees to its left and to its right: one number for both, or a pair,
        in which None means no limit.
      query_segment_ids: `[*batch, T]`, a query sees only keys of its own segment (packed sequences).
      key_segment_ids: `[*batch, S]`.
      mask_fn: `(query_position, key_position) -> visible`, a predicate on broadcasting int32 arrays, evaluated block
        by block. Pass a module-level or cached function: compiled programs are cached under it.
      query_offset: the position of the first query, for causal masks, windows, slopes and predicates: 0, or the
        number of positions before it; an array `[]` or `[*batch]` if known only at run time.
      query_positions: `[T]` or `[*batch, T]`, in place of `query_offset`, the position of each query where they do not
        follow one another: a ring in zig-zag order (`zigzag_positions`). Lengths, too, then count positions.
      key_positions: `[S]` or `[*batch, S]`, the position of each key; 0 to S - 1 by default.
      alibi_slopes: `[N]`, adds `slope * (key position - query position)` to the scores.
      softcap: caps the scaled scores to `(-softcap, softcap)` by `softcap * tanh(scores / softcap)`.
      sinks: `[N]`, logits of learned sinks: each row gets one more entry, without a value. For normalizers of the
        exponential family.
      dropout_rate: the fraction of weights dropped after normalization. Which weights are dropped depends only on
        `dropout_key` and the indices of batch element, head, query and key.
      dropout_key: a PRNG key; required if the rate is above 0.
      broadcast_dropout: whether all batch elements and heads drop the same pairs of query and key, as Flax does by
        default.
      block_sizes: queries and keys per block; None: chosen automatically. They change the result only by rounding.
      precision: of the matrix products, as in `jax.lax.dot_general`; they accumulate in float32 at least.
      implementation: `"xla"`; `"cudnn"`, for softmax on NVIDIA GPUs; or the kernels `"pallas_tpu"` or `"mosaic_gpu"`,
        all with the same derivatives. None picks the best one that can run the case (see
        `jaxsoft.kernels.explain`).
      axis_name: inside `jax.shard_map`, the mesh axes over which queries and keys are sharded along their length, in
        the order of the devices (ring attention). T and S are then those of one device; `query_offset`, lengths and the
        last axis of bias and mask are those of the whole sequence, in the order of the keys. No dropout.
      return_residual: whether to return the log-sum-exp of each query as well, as `jax.nn` does.
      return_statistics: whether to return `AttentionStatistics` as well; replaces the residual.

    Returns:
      `[*batch, T, N, V]` in the dtype of the queries; with `return_residual` a pair of this and the log-sum-exp
      `[*batch, T, N]`; with `return_statistics` a pair of this and `AttentionStatistics`.

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
    _checks.flag("return_residual", return_residual)
    _checks.flag("return_statistics", return_statistics)
    scores: dict[str, Any] = dict(
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        mask_fn=mask_fn,
        query_offset=query_offset,
        query_positions=query_positions,
        key_positions=key_positions,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        block_sizes=block_sizes,
        precision=precision,
        implementation=implementation,
    )
    dropout_rate = _checks.static_number("dropout_rate", dropout_rate, at_least=0, below=1)
    layout = None if axis_name else layout_of(query, key, dropout=dropout_rate != 0)
    if layout is not None:
        weights = dict(
            normalizer=softmax if normalizer is None else normalizer,
            sinks=sinks,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            broadcast_dropout=broadcast_dropout,
        )
        arrays = dict(query=query, key=key, value=value, bias=bias, mask=mask)
        returned = dict(return_residual=return_residual, return_statistics=return_statistics)
        return attend_on_mesh(dot_product_attention, layout, {**arrays, **scores, **weights, **returned})
    preparing = prepare if axis_name is None else functools.partial(prepare_ring, axis_name)
    rows, shape = preparing(query, key, value, bias, mask, **scores)
    last = last_pass(rows, normalizer, sinks, dropout_rate, dropout_key, broadcast_dropout)
    passes = [weighting(rows, last)]
    if return_residual or return_statistics:
        before = (
            (*last.before, times_scale) if is_exponential(last) and "scale" in last.params else last.before
        )
        moments = after(reductions.softmax_moments(variance=False), before)._replace(args=(last.params,))
        maximum = after(reductions.maximum(), before)._replace(args=(last.params,))
        passes += [moments, maximum]
    options = Options(bias, mask, alibi_slopes, sinks, dropout_rate, return_residual, return_statistics)

    def by_xla(query, key, value, query_lengths, key_lengths):
        return dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
            local_window_size=local_window_size,
            implementation="xla",
        )

    if axis_name is None:
        arrays = tuple(a.reshape(rows.spec.batch, *a.shape[-3:]) for a in (query, key, value))
        fused = attention_or_reason(rows, arrays, normalizer in (None, softmax), scale, options, by_xla)
    else:
        fused = "the keys lie on several devices"
    if not isinstance(fused, str):
        return fused.reshape(shape)
    if last.within is not None and len(passes) == 1:
        rows = rows.narrowed(last.within)
    states = rows.run(passes, {"cudnn": fused})
    out = to_user(rows.spec, passes[0].finalize(states[0], last.params), shape).astype(query.dtype)
    if not (return_residual or return_statistics):
        return out
    m = reductions.softmax_moments(variance=False).finalize(states[1])
    statistics = AttentionStatistics(m.logsumexp, reductions.maximum().finalize(states[2]), m.entropy)
    statistics = AttentionStatistics(*(to_user(rows.spec, s, shape) for s in statistics))
    return out, (statistics if return_statistics else statistics.logsumexp)
