"""Losses over many positives a row: decoupled softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft._numerics import safe_divide
from jaxsoft.losses._common import IGNORE_INDEX, prepare_positives
from jaxsoft.rows import reductions
from jaxsoft.rows._logits import Logits


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
    rows, given = prepare_positives(
        logits, labels, axis=axis, where=where, weights=weights, ignore_index=ignore_index
    )
    if given is None:
        negatives = rows.reduce(reductions.weighted_log_partition((~rows.labels).astype(jnp.float32)))
        loss, count = rows.reduce(
            (
                reductions.mapped_sum(_against, *_floored(negatives), entry_args=(rows.labels,)),
                reductions.mapped_sum(_counted, entry_args=(rows.labels,)),
            )
        )
        return rows.finish(safe_divide(loss, count))
    negatives, positives = rows.reduce(
        (
            reductions.log_partition_excluding(jnp.where(given, rows.labels, -1)),
            reductions.take(rows.labels),
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
