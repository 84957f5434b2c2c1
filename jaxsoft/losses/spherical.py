"""The spherical family.

Losses that read a row only through the label's logit, the sum of the logits and the sum of their squares.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft.losses._common import IGNORE_INDEX, prepare
from jaxsoft.losses._spherical import z_loss_of
from jaxsoft.rows import Logits, reductions


def spherical_z_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    a: float = 1.0,
    b: float = 0.0,
    eps: float = 1e-12,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """The Z-loss: `softplus(a (b - z)) / a` of the label's standard score `z = (x_y - mean) / (std + eps)`.

    Invariant to shifts and to positive scales of the logits. It is not the log-partition regularizer that is
    also called z-loss: that one is the option `z_loss` of `cross_entropy`. The form with a = 1, b = 0 is that of the
    authors' code; the two constants are *reconstructed* from the paper.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits` (whose mean and variance are computed without the
        logits if there are more rows than features).
      labels: class ids `[*rows]`, as in `cross_entropy`.
      a: how sharply the loss saturates, positive.
      b: the standard score to aim at. The paper tunes (a, b); a small a with a large b favours top-k accuracy.
      eps: added to the standard deviation (population, divisor C).
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider. Where all logits of a row are equal, z = 0 and the gradient is 0.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      de Brebisson and Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
      Spherical Family".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.spherical_z_loss(logits, jnp.array([0])).round(6))
      [0.202546]
    """
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    score, moments = rows.reduce((reductions.take(rows.labels), reductions.moments()))
    loss = z_loss_of(score, moments, a=a, b=b, eps=eps)
    return rows.finish(jnp.where(moments.count > 0, loss, 0))
