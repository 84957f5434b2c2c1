"""Partial attention and its merge, and decoding with a cache.

Attention over a part of the keys gives a state; the states of all parts merge to the attention over all keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import log_or_neg_inf
from jaxsoft.attention._arguments import prepare
from jaxsoft.attention._blocks import from_blocks, to_blocks, to_user
from jaxsoft.attention._mesh import attend_on_mesh, layout_of
from jaxsoft.attention._ring import prepare_joined
from jaxsoft.attention._rows import AttentionRows
from jaxsoft.attention._spec import AttentionSpec
from jaxsoft.attention._weights import last_pass, weighted_values, weighting
from jaxsoft.kernels.inner import compiled
from jaxsoft.normalizers import Normalizer, softmax
from jaxsoft.normalizers.inner import exponent, is_exponential, per_row
from jaxsoft.rows import reductions
from jaxsoft.rows.inner import keep_gauge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartialAttention:
    """The state of an attention that has seen some of the keys: a pytree, made by `partial_attention`.

    States of the same queries over disjoint keys merge in any order (`merge_partial_attention`); `output()` gives the
    attention over all keys seen. It adds sinks and other constants of the denominator, once.
    """

    state: Any
    params: Any
    normalizer: Normalizer = dataclasses.field(metadata=dict(static=True))
    spec: AttentionSpec = dataclasses.field(metadata=dict(static=True))
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    dtype: Any = dataclasses.field(metadata=dict(static=True))

    @property
    def _reduction(self):
        return weighted_values(self.normalizer, self.state.values[0].shape[-1])

    def output(self) -> Array:
        """The attention of the queries to the keys seen, `[*batch, T, N, V]`."""
        values = self._reduction.finalize(self.state, self.params)
        return to_user(self.spec, values, self.shape).astype(self.dtype)

    def logsumexp(self) -> Array:
        """The log-sum-exp of the scores seen, `[*batch, T, N]`; for normalizers of the exponential family."""
        if not is_exponential(self.normalizer):
            raise ValueError("logsumexp needs a normalizer of the exponential family")
        m, s = exponent(self.state.statistics, self.params), self.state.statistics[1]
        return to_user(self.spec, jnp.where(s > 0, m, 0) + log_or_neg_inf(s), self.shape)


@dataclasses.dataclass(frozen=True)
class _OnePass(AttentionRows):
    """Rows with only a part of their keys: refuses normalizers that need whole rows before the last pass."""

    key_count: Any

    def reduce(self, wanted: Any) -> Any:
        raise ValueError(
            "normalizer must need one pass only: this one first needs statistics of the whole row, which a part of the "
            "keys does not have; call dot_product_attention on all keys (in decode_attention, use splits=1)"
        )

    def detached(self) -> _OnePass:
        return self  # whose `reduce` raises

    def count(self) -> Array:
        if self.key_count is None:
            raise ValueError(
                "key_count must be given for this normalizer, which depends on the number of keys that each query "
                "sees in all parts together; got None"
            )
        p = self.spec
        shape = (p.batch, p.heads * p.groups, p.queries)
        return to_blocks(p, per_row("key_count", self.key_count, shape, self.dtype))


def partial_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K V"],
    bias: Float[Array, "#*batch #N #T #S"] | None = None,
    mask: Any = None,
    *,
    normalizer: Callable | None = None,
    key_offset: int | Int[Array, ...] = 0,
    key_count: Float[Array, ...] | None = None,
    sinks: Float[Array, " N"] | None = None,
    **options,
) -> PartialAttention:
    """Attention over a part of the keys, to be merged with other parts, as in sharded and ring attention.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, the keys of this part.
      value: `[*batch, S, K, V]`.
      bias: of this part's scores, as in `dot_product_attention`.
      mask: of this part's scores, likewise.
      normalizer: as in `dot_product_attention`; it must need a single pass only.
      key_offset: the position of the part's first key (an array `[]` or `[*batch]` if known only at run time); its
        index in the row, if `key_positions` are among the options.
      key_count: how many keys each query sees in all parts, a floating array that broadcasts to `[batch, N, T]`:
        for normalizers that depend on it (`scalable_softmax`, `sigmoid_weights`, `relu_weights`).
      sinks: as in `dot_product_attention`; the same for all parts.
      **options: those of `dot_product_attention` for masks (positions and lengths refer to the whole sequence) and
        for the computation of scores; no dropout, no statistics.

    Returns:
      A `PartialAttention`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or a normalizer whose parts do not merge.

    Reference:
      Li et al., "LightSeq: Sequence Level Parallelism for Distributed Training of Long Context Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.attention import dot_product_attention, merge_partial_attention, partial_attention
      >>> x = jnp.linspace(-1, 1, 24).reshape(1, 6, 2, 2)
      >>> parts = [partial_attention(x, x[:, :4], x[:, :4]), partial_attention(x, x[:, 4:], x[:, 4:], key_offset=4)]
      >>> out = merge_partial_attention(*parts).output()
      >>> bool(jnp.allclose(out, dot_product_attention(x, x, x), atol=1e-6))
      True
    """
    rows, shape = prepare(query, key, value, bias, mask, key_offset=key_offset, **options)
    rows = _OnePass(rows.spec, rows.inputs, rows.masks, key_count)
    last = last_pass(rows, normalizer, sinks)
    state = rows.run([weighting(rows, last)])[0]
    return PartialAttention(state, last.params, last.functions(), rows.spec, shape, query.dtype)


def merge_partial_attention(*parts: PartialAttention) -> PartialAttention:
    """The attention over the keys of all parts, by merging their states.

    Args:
      *parts: results of `partial_attention` of the same queries, with the same options, over disjoint keys.

    Returns:
      A `PartialAttention` over all their keys; `.output()` gives the attention.

    Raises:
      TypeError: an argument that is not a `PartialAttention`.
      ValueError: no parts, or parts of different queries or normalizers.

    Reference:
      Li et al., "LightSeq: Sequence Level Parallelism for Distributed Training of Long Context Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.attention import merge_partial_attention, partial_attention
      >>> x = jnp.ones((1, 4, 1, 2))
      >>> part = partial_attention(x, x, x)
      >>> print(merge_partial_attention(part, part).output()[0, 0, 0])
      [1. 1.]
    """
    if not parts:
        raise ValueError("parts must hold at least one PartialAttention, got none")
    for part in parts:
        if not isinstance(part, PartialAttention):
            raise TypeError(f"parts must be PartialAttention objects, got {_checks.describe(part)}")
        same = (part.normalizer, part.shape, part.spec.rows) == (
            parts[0].normalizer,
            parts[0].shape,
            parts[0].spec.rows,
        )
        if not same:
            raise ValueError(
                "parts must have the same queries, query blocks and normalizer, got queries of shape "
                f"{part.shape} and {parts[0].shape}, rows in blocks {part.spec.rows} and {parts[0].spec.rows}"
            )
    merge = parts[0]._reduction.merge
    states = [part.state for part in parts]
    while len(states) > 1:  # a tree: fewer roundings per part than in a chain
        pairs = [merge(a, b, parts[0].params) for a, b in zip(states[::2], states[1::2])]
        states = pairs + states[2 * len(pairs) :]
    return dataclasses.replace(parts[0], state=states[0])


_SET_BY_DECODING = ("is_causal", "query_offset", "key_value_seq_lengths", "query_positions", "key_positions")


def decode_attention(
    query: Float[Array, "*batch T N H"],
    key_cache: Float[Array, "*batch S K H"],
    value_cache: Float[Array, "*batch S K V"],
    lengths: Int[Array, "*batch"],
    *,
    normalizer: Callable | None = None,
    splits: int = 1,
    unified_max: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    **options,
) -> Float[Array, "*batch T N V"]:
    """Attention of the newest tokens to a cache of keys and values, each sequence with its own length.

    The T queries are the last T of the `lengths` tokens in the cache, which includes their own keys and values. Each
    query sees itself and the tokens before it. Blocks of the cache beyond all lengths are skipped.

    Args:
      query: `[*batch, T, N, H]`, T small.
      key_cache: `[*batch, S, K, H]`; entries beyond the length of a sequence may hold anything.
      value_cache: `[*batch, S, K, V]`.
      lengths: `[*batch]`, the number of tokens in the cache, including the new ones.
      normalizer: as in `dot_product_attention`.
      splits: the number of parts of the cache that are read in parallel and merged at the end; a divisor of S. For
        devices that one sequence does not keep busy; needs a normalizer of one pass.
      unified_max: a fixed reference exponent near the largest scores, instead of a running maximum (FlashDecoding++;
        softmax only). If the scores of any row leave its safe range, all rows are recomputed with a running maximum.
      axis_name: inside `jax.shard_map`, the mesh axes over which the cache is sharded along its length; every device
        has the queries, and S is the part of one device. No bias and no mask.
      **options: of `dot_product_attention`: bias, softcap, scale, windows, slopes, sinks, ...

    Returns:
      `[*batch, T, N, V]`, in the dtype of the query.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or options that exclude each other.

    Reference:
      Hong et al., "FlashDecoding++: Faster Large Language Model Inference on GPUs".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.attention import decode_attention
      >>> cache = jnp.linspace(-1, 1, 32).reshape(2, 8, 1, 2)
      >>> out = decode_attention(jnp.ones((2, 1, 1, 2)), cache, cache, jnp.array([3, 8]), splits=2)
      >>> out.shape
      (2, 1, 1, 2)
    """
    for name in _SET_BY_DECODING:
        if name in options:
            raise ValueError(f"{name} must not be given: decode_attention sets it from lengths")
    _checks.floating("query", query)
    _checks.integers("lengths", lengths)
    _checks.shape("lengths", lengths, query.shape[:-3], "one length per sequence")
    splits = _checks.integer("splits", splits, at_least=1)
    size = key_cache.shape[-3]
    if size % splits:
        raise ValueError(f"splits must divide the {size} positions of key_cache, got {splits}")
    options |= dict(is_causal=True, key_value_seq_lengths=lengths, query_offset=lengths - query.shape[-3])

    if unified_max is not None:
        _checks.number("unified_max", unified_max)
        if normalizer not in (None, softmax) or splits > 1 or options.get("sinks") is not None:
            raise ValueError(
                "unified_max needs plain softmax: leave normalizer, sinks and splits at their defaults"
            )
    layout = None if axis_name else layout_of(query, key_cache, decoding=True)
    if layout is not None:
        given = {k: v for k, v in options.items() if k not in _SET_BY_DECODING}
        arrays = dict(query=query, key_cache=key_cache, value_cache=value_cache, lengths=lengths)
        how = dict(normalizer=normalizer or softmax, splits=splits, unified_max=unified_max)
        return attend_on_mesh(decode_attention, layout, {**arrays, **how, **given})
    if splits > 1 and axis_name is not None:
        raise ValueError(f"splits must be 1 with axis_name, whose devices read the parts, got {splits}")
    if splits > 1:
        return _split(query, key_cache, value_cache, splits, normalizer, options).output()
    if axis_name is None:
        rows, shape = prepare(query, key_cache, value_cache, **_positional(options))
    else:
        for name in ("bias", "mask"):
            if options.get(name) is not None:
                raise ValueError(f"{name} must be None with axis_name, got {_checks.describe(options[name])}")
        rest = {k: v for k, v in options.items() if k not in ("bias", "mask", "sinks")}
        rows, shape = prepare_joined(axis_name, query, key_cache, value_cache, **rest)
    if unified_max is None:
        out, _ = _attend(rows, last_pass(rows, normalizer, options.get("sinks")))
    else:
        out = _unified(rows, rows.per_row("unified_max", unified_max))
    return to_user(rows.spec, out, shape).astype(query.dtype)


def _attend(rows: AttentionRows, last: Normalizer) -> tuple[Array, Any]:
    """The output of the last pass, and the state of its statistics."""
    reduction = weighting(rows, last)
    (state,) = rows.run([reduction])
    return reduction.finalize(state, last.params), state.statistics


@compiled
def _unified(rows: AttentionRows, reference: Array) -> Array:
    """The output of softmax with a fixed reference, or with a running maximum if a row is out of its range."""
    params = {"reference": reference}
    out, statistics = _attend(rows, _UNIFIED._replace(params=params))
    safe = jnp.all(_in_range(statistics, params))
    return lax.cond(safe, lambda: out, lambda: _attend(rows, last_pass(rows, None))[0])


def _positional(options: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in options.items() if k != "sinks"}
    return {"bias": None, "mask": None, **rest}


def _split(query, key, value, splits: int, normalizer, options) -> PartialAttention:
    """All parts of the cache at once, along a new leading batch axis, then merged in a tree."""
    rows, _ = prepare(query, key, value, **_positional(options))
    count = from_blocks(rows.spec, rows.count())
    options = {**options, "key_count": jnp.tile(count, (splits, 1, 1))}
    if any(
        options.get(name) is not None for name in ("bias", "mask", "query_segment_ids", "key_segment_ids")
    ):
        raise ValueError("splits must be 1 with bias, mask or segment ids")
    part = key.shape[-3] // splits
    axis = key.ndim - 3

    def parts(a):
        return jnp.moveaxis(a.reshape(*a.shape[:axis], splits, part, *a.shape[axis + 1 :]), axis, 0)

    def each(a):
        return jnp.broadcast_to(a, (splits, *a.shape))

    batch = query.shape[:-3]
    start = jnp.arange(splits, dtype=jnp.int32) * part
    options["key_offset"] = jnp.broadcast_to(start.reshape(-1, *(1,) * len(batch)), (splits, *batch))
    for name in ("key_value_seq_lengths", "query_offset"):
        options[name] = each(options[name])
    whole = partial_attention(each(query), parts(key), parts(value), normalizer=normalizer, **options)
    spec = dataclasses.replace(whole.spec, batch=whole.spec.batch // splits)

    def of_split(tree, k):
        return jax.tree.map(lambda a: a.reshape(a.shape[0], splits, spec.batch, *a.shape[2:])[:, k], tree)

    return merge_partial_attention(
        *(
            dataclasses.replace(
                whole,
                state=of_split(whole.state, k),
                params=of_split(whole.params, k),
                spec=spec,
                shape=whole.shape[1:],
            )
            for k in range(splits)
        )
    )


# Softmax with a fixed reference exponent: sums need no rescaling; NaN marks rows outside its safe range.


def _partition(params):
    return reductions.log_partition(method="reference", reference=params["reference"])


def _reference_init(like, params):
    return _partition(params).init(like, params["reference"])


def _reference_update(state, tile, params):
    return _partition(params).update(state, tile, params["reference"])


def _reference_merge(a, b, params):
    return _partition(params).merge(a, b, params["reference"])


def _reference_terms(tile, state, params):
    return (jnp.exp(jnp.minimum(tile.scores - params["reference"][..., None], 80)),)


def _in_range(state, params):
    parts = _partition(params).finalize(lax.stop_gradient(state), params["reference"])
    return ~jnp.isnan(parts.log_sum)


def _reference_coefficient(state, params):
    top, s = state
    good = _in_range(state, params) & (s > 0)
    # 1 / s as unit / (unit * s), whose derivative does not overflow: unit is about 1 / s and has no gradient.
    unit = jnp.exp(jnp.where(good, params["reference"] - lax.stop_gradient(jnp.where(good, top, 0)), 0))
    return (jnp.where(good, unit / jnp.where(good, unit * s, 1), 0),)


_UNIFIED = Normalizer(
    reductions.RowReduction(_reference_init, _reference_update, _reference_merge, neutral=keep_gauge),
    _reference_terms,
    _reference_coefficient,
)
