"""Unit-scaled softmax (u-muP).

Softmax whose weights and whose gradient keep unit variance.
"""

from __future__ import annotations

import math

from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import scale_gradient
from jaxsoft.normalizers.exponential import softmax


def unit_scaled_softmax(
    scores: Float[Array, "*rows columns"],
    *,
    multiplier: float = 1.0,
    constraint: str | None = "to_output_scale",
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows columns"]:
    """`s softmax(m x)`, with the constant `s` that gives the weights a variance near 1 for scores of variance 1.

    For a row of `n` entries `ln s = a ln sqrt(n) + (1 - a) ln n` with `a = 1 / (1 + 4 / m^2)`, which interpolates
    between the flat softmax of a small multiplier `m` and the sharp softmax of a large one.

    Args:
      scores: `[*rows, columns]`, floating; `n` is the number of columns, masked or not.
      multiplier: m, a positive number.
      constraint: `"to_output_scale"`: the gradient of the function. None: the gradient with a scale of its own,
        `ln s' = a ln sqrt(n / m) + (1 - a) ln(n / m)`, in place of s.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype, `s` times those of softmax; 0 for absent entries.

    Raises:
      TypeError: scores that are not a floating array, a multiplier that is not a number.
      ValueError: a multiplier that is not positive, an unknown constraint, an axis or a mask that does not fit.

    Reference:
      Blake et al., "u-muP: The Unit-Scaled Maximal Update Parametrization".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import unit_scaled_softmax
      >>> print([f"{weight:.2f}" for weight in unit_scaled_softmax(jnp.array([1.0, 2.0, -1.0, 0.5]))])
      ['0.78', '2.12', '0.11', '0.47']
    """
    _checks.number("multiplier", multiplier, above=0)
    _checks.option("constraint", constraint, ("to_output_scale", None))
    y = softmax(scores * multiplier, axis=axis, where=where)
    n = max(scores.shape[axis], 1)
    share = 1 / (1 + 4 / multiplier**2)

    def scale(n: float) -> float:
        return math.exp((share / 2 + 1 - share) * math.log(n))

    if constraint is None:
        y = scale_gradient(y, scale(n / multiplier) / scale(n))
    return y * scale(n)
