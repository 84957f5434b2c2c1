"""Binary weights and activations with surrogate derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype

Scalar = float | jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sign(x: jax.Array, slope: jax.Array, zero: int) -> jax.Array:
    """The sign of x, with `slope` for its derivative."""
    del slope
    return jnp.where(x == 0, jnp.asarray(zero, x.dtype), jnp.sign(x))


@_sign.defjvp
def _sign_jvp(zero, primals, tangents):
    x, slope = primals
    return _sign(x, slope, zero), slope * tangents[0]


def periodic_binarize(
    weight: Float[Array, "*shape"], *, frequency: Scalar = 20.0, hard: bool = True, zero: int = 0
) -> Float[Array, "*shape"]:
    """Binary weights from a wave: `sign(sin(frequency w))`, or the wave itself while the network is prepared.

    First train with `hard=False`, then with `hard=True`, whose derivative is that of the wave,
    `frequency cos(frequency w)`: the sign is straight-through.

    Args:
      weight: real weights.
      frequency: how fast the wave oscillates; 20 is that of the paper's scripts.
      hard: whether to take the sign.
      zero: the sign of 0: 0, or 1 so that all weights are binary.

    Returns:
      An array like `weight`, computed in float32 at least.

    Raises:
      TypeError: weights that are not floating, a `hard` that is not static.
      ValueError: a `zero` that is neither 0 nor 1.

    Reference:
      "BiPer: Binary Neural Networks using a Periodic Function".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.activations import periodic_binarize
      >>> weight = jnp.array([-0.3, 0.02, 0.2])
      >>> print(periodic_binarize(weight), periodic_binarize(weight, hard=False).round(1))
      [ 1.  1. -1.] [ 0.3  0.4 -0.8]
    """
    _checks.floating("weight", weight)
    _checks.number("frequency", frequency)
    _checks.flag("hard", hard)
    _checks.option("zero", zero, (0, 1))
    wave = jnp.sin(frequency * jnp.asarray(weight).astype(accumulation_dtype(weight.dtype)))
    if hard:
        wave = _sign(wave, jnp.ones_like(wave), zero)
    return wave.astype(weight.dtype)


def approximate_sign(x: Float[Array, "*shape"], *, zero: int = 0) -> Float[Array, "*shape"]:
    """Binary activations: `sign(x)`, with the derivative `max(0, 2 - 2 |x|)`.

    BiPer divides x by its standard deviation before, in training: `x / sqrt(var(x, ddof=1) + 1e-5)` per example.

    Args:
      x: any shape.
      zero: the sign of 0: 0, or 1 so that all activations are binary.

    Returns:
      An array like x.

    Raises:
      TypeError: an array that is not floating.
      ValueError: a `zero` that is neither 0 nor 1.

    Reference:
      "BiPer: Binary Neural Networks using a Periodic Function"; Liu et al., "Bi-Real Net".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.activations import approximate_sign
      >>> print(approximate_sign(jnp.array([-0.3, 2.0])), jax.grad(approximate_sign)(-0.3))
      [-1.  1.] 1.4
    """
    x = jnp.asarray(x) if isinstance(x, float) else x
    _checks.floating("x", x)
    _checks.option("zero", zero, (0, 1))
    x = jnp.asarray(x)
    slope = jax.lax.stop_gradient(jnp.maximum(0, 2 - 2 * jnp.abs(x)))
    return _sign(x, slope, zero)
