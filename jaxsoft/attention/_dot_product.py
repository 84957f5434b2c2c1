"""Dot-product attention with any normalizer, streamed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.attention._driver import Masks, Operands, Plan, attention_work
from jaxsoft.attention._weights import AttentionRows, from_blocks, to_blocks, weighted_values, with_dropout
from jaxsoft.kernels import _choice
from jaxsoft.normalizers import softmax
from jaxsoft.normalizers._exponential import is_exponential, times_scale, with_sink
from jaxsoft.normalizers._normalizer import Normalizer, after
from jaxsoft.normalizers.stochastic import key_words
from jaxsoft.rows import reductions
from jaxsoft.rows._reduction import RowReduction

# A pair of blocks holds about so many scores at most, which bounds the temporary memory.
_PAIR_ENTRIES = {"cpu": 2**22, "other": 2**25}
_WIDEST_BLOCK = {"queries": 512, "keys": 256}


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
    out = to_user(rows.plan, passes[0].finalize(states[0], last.params), shape).astype(query.dtype)
    if not (return_residual or return_statistics):
        return out
    m = reductions.softmax_moments(variance=False).finalize(states[1])
    statistics = AttentionStatistics(m.logsumexp, reductions.maximum().finalize(states[2]), m.entropy)
    statistics = AttentionStatistics(*(to_user(rows.plan, s, shape) for s in statistics))
    return out, (statistics if return_statistics else statistics.logsumexp)


def weighting(rows: AttentionRows, normalizer: Normalizer) -> RowReduction:
    """The reduction of the last pass."""
    width = rows.operands.value.shape[-1]
    return weighted_values(normalizer.functions(), width)._replace(args=(normalizer.params,))


def define(normalizer: Callable | None, rows: AttentionRows) -> Normalizer:
    """The last pass of a normalizer given as a public function, a `partial` of one, or a `Normalizer`."""
    normalizer = softmax if normalizer is None else normalizer
    if isinstance(normalizer, Normalizer):
        return normalizer
    options: dict[str, Any] = {}
    function = normalizer
    while isinstance(function, functools.partial):
        if function.args:
            raise ValueError(f"normalizer takes its options by keyword, got positional {function.args!r}")
        options = {**function.keywords, **options}
        function = function.func
    definition = getattr(function, "define", None)
    if definition is None:
        raise TypeError(
            "normalizer must be a normalizer of jaxsoft that streams (jaxsoft.softmax, jaxsoft.softpick, ...), a "
            f"functools.partial of one, or a Normalizer, got {_checks.describe(normalizer)}; for any other function "
            "of stored scores, write the attention out"
        )
    for name in ("axis", "where"):
        if name in options:
            raise ValueError(f"normalizer must not be given {name}: attention has its own masks")
    return definition(rows, **options)


def last_pass(rows, normalizer, sinks=None, dropout_rate=0.0, dropout_key=None) -> Normalizer:
    """The last pass of a normalizer, with sinks and dropout; earlier passes are run."""
    last = define(normalizer, rows)
    if sinks is not None:
        if not is_exponential(last):
            raise ValueError(
                "sinks need a normalizer of the exponential family in one pass (softmax, softmax_n, "
                f"scalable_softmax, sink_softmax, ...), got {_checks.describe(normalizer)}"
            )
        last = with_sink(last, rows.per_row("sinks", sinks))
    _checks.number("dropout_rate", dropout_rate, at_least=0, below=1)
    if dropout_rate:
        if dropout_key is None:
            raise ValueError(f"dropout_key must be a PRNG key for dropout_rate={dropout_rate}, got None")
        last = with_dropout(last, float(dropout_rate), key_words(dropout_key), rows.row_number())
    return last


def to_user(plan: Plan, blocks: Array, shape: tuple[int, ...]) -> Array:
    """Rows in blocks as `[*batch, T, N, ...]`; `shape` is that of the query."""
    rows = jnp.swapaxes(from_blocks(plan, blocks), 1, 2)
    return rows.reshape(*shape[:-1], *rows.shape[3:])


# --- the arguments -----------------------------------------------------------------------------------------------


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
    alibi_slopes=None,
    softcap=None,
    block_sizes=(None, None),
    precision=None,
    implementation=None,
) -> tuple[AttentionRows, tuple[int, ...]]:
    """Checks the arguments, and brings them into the form of the driver."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        _checks.floating(name, array)
        if array.ndim < 3 or array.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} must have shape [*batch, length, heads, width], batch as the query's {query.shape[:-3]}, "
                f"got shape {array.shape}"
            )
    shape, batch = query.shape, query.shape[:-3]
    query, key, value = (a.reshape(math.prod(batch), *a.shape[-3:]) for a in (query, key, value))
    b, t, n, h = query.shape
    _, s, k, _ = key.shape
    _checks.shape("key", key, (b, s, k, h), "batch, keys, heads, width as the query's")
    _checks.shape("value", value, (b, s, k, value.shape[-1]), "batch, keys and heads as the key's")
    if k == 0 or n % k:
        raise ValueError(
            f"query must have a multiple of the key's {k} heads, got {n} in shape {tuple(query.shape)}"
        )
    if s == 0:
        raise ValueError(f"key must have at least one position, got shape {tuple(key.shape)}")
    _checks.option("implementation", implementation, (None, *_choice.IMPLEMENTATIONS))
    if softcap is not None:
        _checks.number("softcap", softcap, above=0)
    if mask_fn is not None and not callable(mask_fn):
        raise TypeError(f"mask_fn must be a function of two positions, got {_checks.describe(mask_fn)}")
    _checks.flag("is_causal", is_causal)
    if not isinstance(block_sizes, tuple) or len(block_sizes) != 2:
        raise TypeError(f"block_sizes must be a pair (queries, keys), got {_checks.describe(block_sizes)}")
    for name, size in zip(("queries", "keys"), block_sizes):
        if size is not None:
            _checks.integer(f"block_sizes ({name})", size, at_least=1)
    work = attention_work(n // k, t, s, query)
    if _choice.likely(implementation, work):
        bq, bk = _kernel_block_sizes(block_sizes, n // k, t, s, _tuned(implementation, work))
    else:
        bq, bk = _block_sizes(block_sizes, b * n, t, s)
    static = _is_static(query_offset) and _is_static(key_offset)
    plan = Plan(
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
        None if softcap is None else float(softcap),
        precision,
        implementation,
    )
    masks = Masks(
        query_lengths=_lengths("query_seq_lengths", query_seq_lengths, batch),
        key_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        entries=None if mask is None else _entries("mask", mask, plan, batch),
        offset=None if static else _offset("query_offset", query_offset, batch),
        key_offset=None if static else _offset("key_offset", key_offset, batch),
    )
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("query_segment_ids and key_segment_ids must be given together")
    if query_segment_ids is not None:
        ids = [("query_segment_ids", query_segment_ids, t, plan.nq * bq)]
        ids += [("key_segment_ids", key_segment_ids, s, plan.nk * bk)]
        segments = [_segments(name, array, batch, length, padded) for name, array, length, padded in ids]
        masks = masks._replace(query_segments=segments[0], key_segments=segments[1])

    query, key, value = _hide(query, key, value, masks, plan.key_offset)
    dtype = accumulation_dtype(query.dtype, key.dtype)
    rows = AttentionRows(plan, Operands(_query_blocks(plan, query), *_key_blocks(plan, key, value)), masks)
    operands = rows.operands
    scale = 1 / math.sqrt(h) if scale is None else scale
    if _checks.is_concrete_number(scale):
        _checks.number("scale", scale)
    else:
        _per_head("scale", scale, n)
    if query.dtype == dtype:  # nothing is lost when the queries carry the scale
        operands = operands._replace(query=operands.query * rows.per_row("scale", scale)[..., None])
    else:
        operands = operands._replace(scale=rows.per_row("scale", scale))
    if bias is not None:
        operands = operands._replace(bias=_entries("bias", bias, plan, batch))
    if alibi_slopes is not None:
        _per_head("alibi_slopes", alibi_slopes, n)
        operands = operands._replace(slopes=rows.per_row("alibi_slopes", alibi_slopes))
    rows.operands = operands
    return rows, shape


def _tuned(implementation: str | None, work: _choice.Work) -> dict[str, int]:
    """The sizes of blocks that were measured to be the best for kernels."""
    from jaxsoft.kernels import _tuning

    here, kind = _choice.device()
    names = [name for name, (platform, _) in _choice.BACKENDS.items() if platform == here]
    if not names or implementation not in (None, *names):
        return {}
    return _tuning.sizes((), kind, names[0], work, "both")[0]


def _kernel_block_sizes(given, groups: int, t: int, s: int, tuned: dict[str, int]) -> tuple[int, int]:
    """Queries and keys of a tile in a kernel: a whole number of 64 rows (queries times heads), 128 keys or all."""
    user = dict(_choice.blocks())
    least = 64 // math.gcd(64, groups)
    bq = user.get("rows") or given[0] or tuned.get("rows") or max(least, 128 // groups // least * least)
    bk = user.get("columns") or given[1] or tuned.get("columns") or 128
    return max(min(bq, -(-t // least) * least), 1), max(min(bk, -(-s // 8) * 8), 1)


def _block_sizes(given, rows: int, t: int, s: int) -> tuple[int, int]:
    entries = _PAIR_ENTRIES["cpu" if jax.default_backend() == "cpu" else "other"]
    shrink = 1
    while shrink < 8 and rows * math.prod(_WIDEST_BLOCK.values()) > entries * shrink**2:
        shrink *= 2
    sizes = []
    for name, size, length in (("queries", given[0], t), ("keys", given[1], s)):
        if size is None:
            blocks = -(-length * shrink // _WIDEST_BLOCK[name])
            even = -(-length // max(blocks, 1))
            size = -(-even // 8) * 8
        sizes.append(min(size, max(length, 1)))
    bq, bk = sizes
    if given[1] is None and t < 64:  # few queries: long blocks of keys
        bk = min(s, max(bk, min(4096, entries // max(rows * bq, 1) // 8 * 8)))
    return bq, bk


def _is_static(offset: Any) -> bool:
    return _checks.is_concrete_number(offset) and not isinstance(offset, jax.Array)


def _offset(name: str, offset: Any, batch: tuple[int, ...]) -> Array:
    if _is_static(offset):
        offset = jnp.asarray(_checks.integer(name, offset), jnp.int32)
    _checks.integers(name, offset)
    if offset.shape not in ((), batch):
        raise ValueError(f"{name} must have shape () or {batch} (batch), got shape {offset.shape}")
    return jnp.asarray(offset, jnp.int32).reshape(-1 if offset.shape else ())


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
    _checks.shape(name, lengths, batch, "one length a batch element")
    return jnp.asarray(lengths, jnp.int32).reshape(-1)


def _segments(name: str, ids: Any, batch: tuple[int, ...], length: int, padded: int) -> Array:
    _checks.integers(name, ids)
    _checks.shape(name, ids, (*batch, length), "batch and length")
    return jnp.pad(jnp.asarray(ids).reshape(-1, length), ((0, 0), (0, padded - length)))


def _per_head(name: str, value: Any, heads: int) -> None:
    _checks.floating(name, value)
    if value.shape not in ((), (heads,)):
        raise ValueError(f"{name} must be a number or have shape ({heads},), one a head, got {value.shape}")


def _entries(name: str, array: Any, plan: Plan, batch: tuple[int, ...]) -> Array:
    """A mask or bias with the five axes of the scores, padded to whole blocks."""
    heads = plan.heads * plan.groups
    full = (*batch, heads, plan.queries, plan.keys)
    if name == "mask":
        _checks.boolean(name, array)
    else:
        _checks.floating(name, array)
    _checks.broadcastable(name, array, full, "batch, heads, queries, keys")
    array = jnp.asarray(array).reshape((1,) * (len(full) - array.ndim) + array.shape)
    lead, (n, t, s) = array.shape[:-3], array.shape[-3:]
    if math.prod(lead) != 1:
        array = jnp.broadcast_to(array, (*batch, n, t, s))
    split = (1, 1) if n == 1 else (plan.heads, plan.groups)
    array = array.reshape(-1, *split, t, s)
    pads = [
        (0, 0 if size == 1 else blocks * width - size)
        for size, blocks, width in ((t, plan.nq, plan.bq), (s, plan.nk, plan.bk))
    ]
    return jnp.pad(array, ((0, 0), (0, 0), (0, 0), *pads)) if any(p[1] for p in pads) else array


def _hide(query, key, value, masks: Masks, key_offset: int):
    """Puts 0 into queries and keys that nobody reads, lest a NaN in them meets a matrix product."""
    keys = []
    if masks.key_lengths is not None:
        first = key_offset if masks.key_offset is None else masks.key_offset.reshape(-1, 1)
        keys.append(jnp.arange(key.shape[1], dtype=jnp.int32) + first < masks.key_lengths[:, None])
    entries = masks.entries
    if entries is not None and entries.shape[1:4] == (1, 1, 1):
        keys.append(jnp.broadcast_to(entries[:, 0, 0, 0, : key.shape[1]], key.shape[:2]))
    for keep in keys:
        keep = keep[..., None, None]
        key, value = jnp.where(keep, key, 0), jnp.where(keep, value, 0)
    if masks.query_lengths is not None:
        keep = jnp.arange(query.shape[1], dtype=jnp.int32) < masks.query_lengths[:, None]
        query = jnp.where(keep[..., None, None], query, 0)
    return query, key, value


def _query_blocks(plan: Plan, query: Array) -> Array:
    return to_blocks(plan, jnp.swapaxes(query, 1, 2))


def _key_blocks(plan: Plan, key: Array, value: Array) -> tuple[Array, Array]:
    def blocks(a):
        a = jnp.pad(a, ((0, 0), (0, plan.nk * plan.bk - plan.keys), (0, 0), (0, 0)))
        a = a.reshape(plan.batch, plan.nk, plan.bk, plan.heads, a.shape[-1])
        return jnp.transpose(a, (1, 0, 3, 2, 4))

    return blocks(key), blocks(value)
