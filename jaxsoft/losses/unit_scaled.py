"""Unit-scaled cross-entropy (u-muP)."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Array, Float

from jaxsoft import _checks
from jaxsoft._numerics import scale_gradient
from jaxsoft.losses.classification import Labels, cross_entropy
from jaxsoft.rows import Logits


def unit_scaled_cross_entropy(
    logits: Logits, labels: Labels, *, multiplier: float = 1.0, axis: int = -1, **options: Any
) -> Float[Array, "*rows"]:
    """Cross-entropy of `m x` with its gradient multiplied by `V / sqrt(V - 1)`, for a variance near 1.

    At the start of training the gradient for a logit is `1 / V`, or `1 / V - 1` for the label: its variance over the V
    classes is `(V - 1) / V^2`, which the factor cancels. In the backward pass u-muP sums the losses and does not
    average them: with `mean()`, multiply the gradient, or the loss, by the number of rows.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: as for `cross_entropy`.
      multiplier: m, a positive number.
      axis: the axis of the classes.
      **options: of `cross_entropy`.

    Returns:
      `[*rows]` losses, those of `cross_entropy(m x, labels)`, in the accumulation dtype.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Blake et al., "u-muP: The Unit-Scaled Maximal Update Parametrization".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.losses import unit_scaled_cross_entropy
      >>> loss = lambda x: unit_scaled_cross_entropy(x, jnp.array([1])).sum()
      >>> value, gradient = jax.value_and_grad(loss)(jnp.zeros((1, 5)))
      >>> print(f"{value:.4f}", gradient)
      1.6094 [[ 0.5 -2.   0.5  0.5  0.5]]
    """
    _checks.number("multiplier", multiplier, above=0)
    _checks.floating("logits", logits)
    loss = cross_entropy(logits * multiplier, labels, axis=axis, **options)
    classes = logits.shape[axis]
    return scale_gradient(loss, classes / math.sqrt(max(classes - 1, 1)))
