"""Losses over many positives a row: decoupled softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import as_ids, safe_divide
from jaxsoft.losses._common import IGNORE_INDEX, Rows, check_weights
from jaxsoft.rows import reductions
from jaxsoft.rows._driver import check_axis, rows_of
from jaxsoft.rows._logits import Logits
from jaxsoft.rows._statistics import check_range


def decoupled_softmax_loss(
    logits: Logits,
    labels: Int[Array, "*rows k"] | Bool[Array, "*rows columns"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Decoupled softmax: each positive against the negatives alone, `mean_{i in P} softplus(lse_N - x_i)`.

    `lse_N` is the log-sum-exp over the negatives, so that positives do not compete with each other. With one
    positive it is cross-entropy.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: the positives P: distinct class ids, integers `[*rows, k]`, padded with `ignore_index`; or booleans
        of the logits' shape (True = positive). Everything else is negative. An id out of range gives NaN.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A masked class is neither positive nor
        negative; a masked positive given by its id costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: pads the ids of rows with fewer than k positives.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without positives, or without negatives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.decoupled_softmax_loss(logits, jnp.array([[0, 4]])).round(6))
      [0.857026]
    """
    axis = check_axis(logits, axis)
    shape = rows_of(logits.shape, axis)
    columns = logits.shape[axis]
    check_weights(weights, shape)
    if not hasattr(labels, "dtype") or not (
        labels.dtype == jnp.bool_ or jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise TypeError(f"labels must be integer class ids or booleans, got {_checks.describe(labels)}")

    if labels.dtype == jnp.bool_:
        _checks.shape("labels", labels, logits.shape, "booleans of the logits' shape")
        positive = jnp.moveaxis(labels, axis, -1)
        rows = Rows(logits, axis, where, jnp.any(positive, axis=-1), positive, False, weights)
        negatives = rows.reduce(reductions.weighted_log_partition((~positive).astype(jnp.float32)))
        loss, count = rows.reduce(
            (
                reductions.mapped_sum(_against, *_floored(negatives), entry_args=(positive,)),
                reductions.mapped_sum(_counted, entry_args=(positive,)),
            )
        )
        return rows.finish(safe_divide(loss, count))

    if labels.ndim != len(shape) + 1 or labels.shape[:-1] != shape:
        raise ValueError(
            f"labels must have shape {(*shape, 'k')} (k class ids a row), got shape {labels.shape}"
        )
    _checks.integer("ignore_index", ignore_index)
    check_range("labels", labels, columns, ignore_index)
    labels = as_ids(labels)
    given = labels != ignore_index
    rows = Rows(logits, axis, where, jnp.any(given, axis=-1), labels, False, weights)
    negatives, positives = rows.reduce(
        (
            reductions.log_partition_excluding(jnp.where(given, labels, -1)),
            reductions.take(jnp.where(given, labels, 0)),
        )
    )
    shift, log_sum = (a[..., None] for a in _floored(negatives))
    terms = _against(jnp.where(given, positives, shift), None, shift, log_sum, given)
    count = jnp.sum(given, axis=-1).astype(terms.dtype)
    return rows.finish(safe_divide(jnp.sum(terms, axis=-1), count))


def _floored(negatives: reductions.LogPartition) -> tuple[Array, Array]:
    """Shift and log-sum, with a finite stand-in for the log-sum of no negatives."""
    return negatives.shift, jnp.where(negatives.log_sum == -jnp.inf, _NONE, negatives.log_sum)


_NONE = -1e30


def _against(x, cols, shift, log_sum, positive):
    """`softplus(lse_N - x)` of the positives, 0 where there are no negatives."""
    return jnp.where(positive & (log_sum > _NONE), jax.nn.softplus((shift - x) + log_sum), 0)


def _counted(x, cols, positive):
    return jnp.where(positive, jnp.ones_like(x), 0)
