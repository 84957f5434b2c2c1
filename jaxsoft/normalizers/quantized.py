"""Quantized softmax weights, and the bias that restores their sum."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide


def quantize(probabilities: Array, bits: int) -> Array:
    """`s clip(round(p / s), 0, 2^bits - 1)` with `s = 1 / (2^bits - 1)`; halves go to the even neighbour."""
    levels = 2**bits - 1
    return jnp.clip(jnp.round(probabilities * levels), 0, levels) / levels


def quantized_softmax_bias_correction(
    probabilities: Float[Array, "*shape"],
    bits: int,
    where: Bool[Array, ...] | None = None,
    *,
    axis: int | tuple[int, ...] | None = None,
) -> Float[Array, ...]:
    """The bias of quantized softmax weights over calibration data, `mean(p - Q(p))`.

    Weights below half a step all become 0, so long rows lose most of their sum; adding this constant to the
    quantized weights (for free: in the zero point) restores it on average. *Reconstructed* from the paper's
    abstract, with `Q(p) = round(p (2^bits - 1)) / (2^bits - 1)`.

    Args:
      probabilities: softmax weights of calibration data, any shape.
      bits: the bits of the unsigned quantizer on [0, 1], a static integer from 1 to 16.
      where: booleans that broadcast to the weights, True = counts.
      axis: the axes to average over; all of them by default. The bias keeps the other axes (such as heads).

    Returns:
      The bias, float32 or wider, without gradient; 0 where nothing counts.

    Raises:
      TypeError: weights that are not floating, bits that are not a static integer.
      ValueError: bits out of range, a mask that does not fit.

    Reference:
      Pandey et al., "Softmax Bias Correction for Quantized Generative Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.normalizers import quantized_softmax_bias_correction
      >>> print(quantized_softmax_bias_correction(jaxsoft.softmax(jnp.array([1.0, 2.0, -1.0, 0.5])), 4).round(6))
      0.016667
    """
    _checks.floating("probabilities", probabilities)
    bits = _checks.integer("bits", bits, at_least=1, at_most=16)
    p = lax.stop_gradient(jnp.asarray(probabilities)).astype(accumulation_dtype(probabilities.dtype))
    present = jnp.ones(p.shape, bool)
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, p.shape, "the shape of the probabilities")
        present = jnp.broadcast_to(where, p.shape)
    lost = jnp.sum(jnp.where(present, p - quantize(p, bits), 0), axis=axis)
    return safe_divide(lost, jnp.sum(present, axis=axis).astype(p.dtype))
