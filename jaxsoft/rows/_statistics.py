"""Statistics of rows, temperature and softcap.

Every function takes a dense array or `linear_logits`, and streams the latter.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids
from jaxsoft.kernels.inner import compiled
from jaxsoft.rows import reductions
from jaxsoft.rows._logits import LinearLogits, Logits, StoredLogits, check_axis, row_scalar, rows_of
from jaxsoft.rows._reduce import reduce_rows
from jaxsoft.rows._source import capped
from jaxsoft.rows.reductions import LogPartition, TopK


def logsumexp(
    logits: Logits,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, ...] | None = None,
    method: str = "online",
    reference: float | Float[Array, "*rows"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows"]:
    """`log sum_j w_j exp(logits_j)` over each row.

    Accumulates in float32 at least; exact to a few units in the last place of that dtype (relative to the
    largest of 1 and the result). Logits of +1e4 or -1e4 are no less accurate.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.
      weights: non-negative, `[columns]` or the logits' shape; an entry of weight 0 adds nothing.
      method: `"online"` (running maximum), `"exponent"` (mantissa and integer exponent, no maximum) or
        `"reference"` (a fixed reference, no rescaling; rows out of its range are recomputed by `"online"`).
      reference: for `method="reference"`: a scalar or `[*rows]`, near the rows' largest logits.
      implementation: what runs it: `"xla"`, `"pallas_tpu"`, `"mosaic_gpu"` or None, see `reduce_rows`.

    Returns:
      `[*rows]`, float32 or wider; -inf for a row without entries, with gradient 0.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or an unknown method.

    Reference:
      Milakov and Gimelshein, "Online normalizer calculation for softmax".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.logsumexp(jnp.array([[1.0, 2.0, -1.0, 0.5]])).round(4))
      [2.4952]
    """
    axis = check_axis(logits, axis)
    if weights is not None:
        if method != "online":
            raise ValueError(f"weights need method='online', got method={method!r}")
        _checks.floating("weights", weights)
        if weights.ndim == 1:
            _checks.shape("weights", weights, (logits.shape[axis],), "one number per column")
        else:
            _checks.shape(
                "weights", weights, logits.shape, "the shape of the logits, or one axis: the columns"
            )
            weights = jnp.moveaxis(weights, axis, -1)
        weighted = reductions.weighted_logsumexp(weights)
        return reduce_rows(logits, weighted, axis=axis, where=where, implementation=implementation)
    how = {"method": method, "reference": reference, "implementation": implementation}
    return log_partition(logits, axis=axis, where=where, **how).value


def log_partition(
    logits: Logits, *, axis: int, where, method: str = "online", reference=None, implementation=None
) -> LogPartition:
    """`logsumexp` in parts. Rows out of the range of a fixed reference are recomputed with a running maximum."""
    reduce = functools.partial(reduce_rows, logits, axis=axis, where=where, implementation=implementation)
    if method != "reference":
        if reference is not None:
            raise ValueError(f"reference needs method='reference', got method={method!r}")
        return reduce(reductions.log_partition(method=method))
    if reference is None:
        raise ValueError("reference must be a number or an array with method='reference', got None")
    rows, dtype = rows_of(logits.shape, axis), accumulation_dtype(logits.dtype)
    reference = jnp.broadcast_to(jnp.asarray(row_scalar("reference", reference, rows, dtype), dtype), rows)
    fixed = reductions.log_partition(method="reference", reference=reference)
    fast = reduce(fixed)
    recorded = isinstance(logits, LinearLogits) and logits.tape is not None
    if recorded:  # by a tape, which cannot record a pass in a branch
        return _where_nan(fast, reduce(reductions.log_partition()))
    return _recomputed(fast, logits, where, axis, implementation)


def _where_nan(fast: LogPartition, online: LogPartition) -> LogPartition:
    bad = jnp.isnan(fast.log_sum)
    return LogPartition(*(jnp.where(bad, o, f) for o, f in zip(online, fast)))


@functools.partial(compiled, static_argnums=(3, 4))
def _recomputed(fast: LogPartition, logits: Logits, where, axis: int, implementation) -> LogPartition:
    """`fast`, with the rows whose `log_sum` is NaN computed with a running maximum."""

    def again():
        online = reductions.log_partition()
        return _where_nan(
            fast, reduce_rows(logits, online, axis=axis, where=where, implementation=implementation)
        )

    return lax.cond(jnp.any(jnp.isnan(fast.log_sum)), again, lambda: fast)


def temperature(logits: Logits, temperature: float | Float[Array, ...], *, axis: int = -1) -> Logits:
    """`logits / temperature`, for a dense array or `linear_logits` (which stays an expression).

    Args:
      logits: `[*rows, columns]`.
      temperature: a positive scalar or one number per row (`[*rows]`); differentiable.
      axis: the axis that holds a row.

    Returns:
      Logits of the same kind, shape and dtype.

    Raises:
      TypeError: a temperature that is neither a number nor a floating array.
      ValueError: a temperature that is 0 or negative (take `argmax` for the limit 0), or of a wrong shape.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.temperature(jnp.array([1.0, 2.0]), 0.5))
      [2. 4.]
    """
    axis = check_axis(logits, axis)
    t = row_scalar("temperature", temperature, rows_of(logits.shape, axis), logits.dtype, positive=True)
    if isinstance(logits, LinearLogits | StoredLogits):
        return logits / t
    t = t if t.ndim == 0 else jnp.expand_dims(t, axis)
    dtype = accumulation_dtype(logits.dtype, t.dtype)
    return (logits.astype(dtype) / t.astype(dtype)).astype(logits.dtype)


def softcap(logits: Logits, cap: float) -> Logits:
    """`cap * tanh(logits / cap)`: caps logits smoothly to (-cap, cap), as in Gemma 2 (30 for its head).

    Args:
      logits: `[*rows, columns]`, an array or `linear_logits` (which stays an expression).
      cap: a positive number.

    Returns:
      Logits of the same kind, shape and dtype. An entry of -inf (absent) stays -inf.

    Raises:
      TypeError: a cap that is not a number.
      ValueError: a cap that is not positive, or a second one for `linear_logits`.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.softcap(jnp.array([1.0, 100.0]), 30.0).round(2))
      [ 1.   29.92]
    """
    check_axis(logits, -1)
    if isinstance(logits, LinearLogits):
        cap = _checks.static_number("cap", cap, above=0)
        if logits.softcap is not None or logits.temperature is not None:
            raise ValueError(
                "softcap must be applied to linear_logits first and only once: these have "
                f"softcap={logits.softcap} and {'a' if logits.temperature is not None else 'no'} temperature"
            )
        return dataclasses.replace(logits, softcap=cap)
    _checks.number("cap", cap, above=0)
    if isinstance(logits, StoredLogits):
        return dataclasses.replace(logits, values=softcap(logits.values, cap))
    return capped(logits.astype(accumulation_dtype(logits.dtype)), cap).astype(logits.dtype)


def top_k(
    logits: Logits,
    k: int,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    implementation: str | None = None,
) -> TopK:
    """The k largest logits of each row and their columns; ties go to the smaller column.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits` (one pass, nothing stored).
      k: how many, a static integer of 1 or more, at most the number of columns.
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.
      implementation: what runs it: `"xla"`, `"pallas_tpu"`, `"mosaic_gpu"` or None, see `reduce_rows`.

    Returns:
      `TopK(values, indices)`, each `[*rows, k]`, largest first; values are differentiable. Where a row has
      fewer than k entries: -inf and -1.

    Raises:
      TypeError: a k that is not a static integer, logits that are not floating.
      ValueError: a k out of range, an axis or a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> best = jaxsoft.top_k(jnp.array([[1.0, 2.0, -1.0, 0.5]]), 2)
      >>> print(best.values, best.indices)
      [[2. 1.]] [[1 0]]
    """
    k = check_k(k, logits, axis)
    return reduce_rows(logits, reductions.top_k(k), axis=axis, where=where, implementation=implementation)


def check_k(k: int, logits: Logits, axis: int) -> int:
    """Checks how many entries of each row are asked for."""
    k, columns = _checks.integer("k", k, at_least=1), logits.shape[check_axis(logits, axis)]
    if k > columns:
        raise ValueError(f"k must be at most the number of columns, which is {columns}, got {k}")
    return k


def top_k_accuracy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    k: int = 1,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    ignore_index: int | None = -100,
) -> Float[Array, "*rows"]:
    """1 where the label is among the k largest logits of its row, else 0; ties go to the smaller column.

    The mean over the examples that count is `losses.weighted_mean(top_k_accuracy, logits, labels, k=5)`. As a metric
    of flax: `nnx.metrics.Average().update(values=top_k_accuracy(logits, labels), mask=labels != -100)`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits` (one pass, nothing stored).
      labels: `[*rows]` integers.
      k: how many, a static integer of 1 or more, at most the number of columns.
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.
      ignore_index: class id of examples to leave out; they give 0.

    Returns:
      `[*rows]`, 0 or 1, float32 or wider; 0 for a label that is absent or out of range.

    Raises:
      TypeError: labels that are not integers, logits that are not floating.
      ValueError: shapes that do not fit, a k out of range.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, labels = jnp.array([[1.0, 2.0, -1.0, 0.5], [3.0, 0.0, 1.0, 2.0]]), jnp.array([0, 2])
      >>> print(jaxsoft.top_k_accuracy(logits, labels), jaxsoft.top_k_accuracy(logits, labels, k=2))
      [0. 0.] [1. 0.]
    """
    axis = check_axis(logits, axis)
    check_ids("labels", labels, logits, axis, ignore_index=ignore_index)
    k = check_k(k, logits, axis)
    best = reduce_rows(lax.stop_gradient(logits), reductions.top_k(k), axis=axis, where=where).indices
    labels = as_ids(labels)
    counts = labels >= 0 if ignore_index is None else (labels >= 0) & (labels != ignore_index)
    found = counts & jnp.any(best == labels[..., None], axis=-1)
    return found.astype(accumulation_dtype(logits.dtype))


def _reduced(logits: LinearLogits, name: str, axis: int) -> Array:
    return reduce_rows(logits, getattr(reductions, name)(), axis=axis)


LinearLogits._reduced = _reduced


def log_prob(
    logits: Logits,
    ids: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows"]:
    """`log softmax(logits)[ids]`, one id per row: the log-probability of tokens, without storing the logits.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      ids: `[*rows]` integers. An id out of range gives NaN, in value and gradient (an error under `checkify`).
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts; an absent id gives -inf.
      implementation: what runs it: `"xla"`, `"pallas_tpu"`, `"mosaic_gpu"` or None, see `reduce_rows`.

    Returns:
      `[*rows]`, float32 or wider; 0 for a row without entries.

    Raises:
      TypeError: ids that are not integers, logits that are not floating.
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.log_prob(jnp.array([[1.0, 2.0, -1.0, 0.5]]), jnp.array([1])).round(6))
      [-0.495182]
    """
    axis = check_axis(logits, axis)
    check_ids("ids", ids, logits, axis)
    labels = reductions.label_statistics(ids)
    return -reduce_rows(logits, labels, axis=axis, where=where, implementation=implementation).nll


def entropy(
    logits: Logits,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows"]:
    """The entropy of `softmax(logits)` in nats, `logsumexp(x) - sum_j p_j x_j`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits` (one pass, nothing stored).
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.
      implementation: what runs it: `"xla"`, `"pallas_tpu"`, `"mosaic_gpu"` or None, see `reduce_rows`.

    Returns:
      `[*rows]`, float32 or wider; 0 for a row without entries.

    Raises:
      TypeError: logits that are not floating.
      ValueError: an axis or a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.entropy(jnp.array([[1.0, 2.0, -1.0, 0.5]])).round(6))
      [1.014403]
    """
    moments = reductions.softmax_moments(variance=False)
    return reduce_rows(logits, moments, axis=axis, where=where, implementation=implementation).entropy


def label_rank(
    logits: Logits, labels: Int[Array, "*rows"], *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Int[Array, "*rows"]:
    """The label's rank in its row: the number of entries ahead of it, 0 where it is the largest (two passes).

    Ties are ranked by column. `top_k_accuracy` says whether the rank is below k, in one pass.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: `[*rows]` integers in range.
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]` int32. An absent label ranks behind all entries; so does one out of range.

    Raises:
      TypeError: labels that are not integers, logits that are not floating.
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.label_rank(jnp.array([[1.0, 2.0, -1.0, 0.5]]), jnp.array([3])))
      [2]
    """
    axis = check_axis(logits, axis)
    check_ids("labels", labels, logits, axis)
    logits = lax.stop_gradient(logits)
    score = reduce_rows(logits, reductions.take(labels), axis=axis, where=where)
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    return reduce_rows(logits, reductions.rank(labels, score), axis=axis, where=where)


def check_ids(name: str, ids, logits: Logits, axis: int, *, ignore_index: int | None = None) -> None:
    """Checks one integer id per row: dtype, shape, and under `checkify` the range."""
    rows = rows_of(logits.shape, axis)
    if hasattr(ids, "dtype") and jnp.issubdtype(ids.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be class ids of integer dtype and shape {rows}, got {_checks.describe(ids)}"
        )
    _checks.integers(name, ids)
    _checks.shape(name, ids, rows, "one id per row: the logits' shape without the axis")
    check_range(name, ids, logits.shape[axis], ignore_index)


def check_range(name: str, ids: Array, columns: int, ignore_index: int | None) -> None:
    """Under `checkify`, raises an error where an id is out of range; does nothing otherwise."""
    ids = as_ids(ids)
    bad = (ids < 0) | (ids >= columns)
    if ignore_index is not None:
        bad &= ids != ignore_index
    checkify.debug_check(
        ~jnp.any(bad),
        f"{name} must lie in [0, {columns}), got {{value}}",
        value=jnp.max(jnp.where(bad, ids, jnp.iinfo(ids.dtype).min), initial=jnp.iinfo(ids.dtype).min),
    )
