"""diffGrad.

Adam with smaller steps, down to half, where the gradient stops changing. The change is measured on an absolute scale,
so the scale of the loss matters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask, Scalar, bias_correction, moments_like, moving_average


class ScaleByDiffgradState(NamedTuple):
    """State of `scale_by_diffgrad`: steps taken, both moments, and the previous gradient."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    previous: optax.Updates


def scale_by_diffgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: Any = None,
    previous_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of diffGrad: Adam times `sigmoid(|change of the gradient|)`, for each entry.

    At step t (from 1), with `g_0 = 0`:

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        xi = sigmoid(|g_{t-1} - g_t|)
        direction = sqrt(1 - b2^t) / (1 - b1^t) m xi / (sqrt(v) + eps)

    The friction xi lies between 1/2, for a constant gradient, and 1. It depends on the scale of the gradient: if all
    changes are far below 1 it is 1/2 everywhere, and the method is Adam with half the learning rate. Scale the loss
    so that gradients are around 1.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment without bias correction, at least 0.
      mu_dtype: Dtype of the first moment. None: that of the parameters, but at least float32.
      previous_dtype: Dtype of the stored gradient, used only to compute its change; `jnp.bfloat16` saves a sixth of
        the state. None: that of the parameters, but at least float32.

    Returns:
      A gradient transformation. It keeps three arrays like the parameters. Updates keep the dtype of the
      gradients.

    Raises:
      ValueError: for a rate out of range or a negative `eps`.

    References:
      "diffGrad: An Optimization Method for Convolutional Neural Networks". This follows the paper and
      the second version of the authors' code; in the first version the change of the gradient is always 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_diffgrad()
      >>> print(tx.update(jnp.array([0.0, -20.0]), tx.init(jnp.zeros(2)))[0].round(4))
      [ 0. -1.]
    """
    _common.check_beta("b1", b1)
    _common.check_beta("b2", b2)
    _checks.number("eps", eps, at_least=0)
    mu_dtype = _checks.floating_dtype("mu_dtype", mu_dtype)
    previous_dtype = _checks.floating_dtype("previous_dtype", previous_dtype)

    def init(params: optax.Params) -> ScaleByDiffgradState:
        return ScaleByDiffgradState(
            count=jnp.zeros([], jnp.int32),
            mu=moments_like(params, mu_dtype),
            nu=moments_like(params),
            previous=moments_like(params, previous_dtype),
        )

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        g = _common.widen(updates)
        mu = _common.cast_like(moving_average(b1, state.mu, g), state.mu)
        nu = moving_average(b2, state.nu, jax.tree.map(jnp.square, g))
        step = jnp.sqrt(bias_correction(b2, count)) / bias_correction(b1, count)

        def direction(g, previous, m, v):
            friction = jax.nn.sigmoid(jnp.abs(previous.astype(g.dtype) - g))
            return safe_divide(step * m * friction, jnp.sqrt(v) + eps)

        u = jax.tree.map(direction, g, state.previous, _common.cast_like(mu, nu), nu)
        previous = _common.cast_like(g, state.previous)
        return _common.cast_like(u, updates), ScaleByDiffgradState(count, mu, nu, previous)

    return optax.GradientTransformationExtraArgs(init, update)


def diffgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: Any = None,
    previous_dtype: Any = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """diffGrad, ready to use: `params <- params - learning_rate (direction + weight_decay params)`.

    See `scale_by_diffgrad` for the direction. The authors' code adds the decay to the gradient:
    `optax.chain(optax.add_decayed_weights(weight_decay), diffgrad(learning_rate))`; here it is that of
    `optax.adamw`.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, at least 0.
      mu_dtype: Dtype of the first moment.
      previous_dtype: Dtype of the stored gradient.
      weight_decay: Decoupled weight decay.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters.

    Raises:
      ValueError: as `scale_by_diffgrad`, and for a negative learning rate or weight decay.

    References:
      "diffGrad: An Optimization Method for Convolutional Neural Networks".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = diffgrad(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, 1.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(2))
      [ 0.94 -2.07]
    """
    direction = scale_by_diffgrad(b1, b2, eps, mu_dtype=mu_dtype, previous_dtype=previous_dtype)
    return _common.descend(direction, learning_rate, weight_decay, mask)
