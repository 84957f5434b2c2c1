"""The perpendicular gradient.

The gradient without its component along the parameters themselves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask


def _perpendicular(g: jax.Array, p: jax.Array, rescale: bool) -> jax.Array:
    """One leaf of `perpendicular_gradient`."""
    dtype = _common.wide(g, p)
    # A shorter q, relative to g, is only noise: of the sums here, or of a g in lower precision.
    noise_level = max(float(8 * jnp.finfo(dtype).eps), float(jnp.finfo(jnp.result_type(g)).eps))
    g, p = jnp.asarray(g, dtype), jnp.asarray(p, dtype)

    pp, gg, gp = jnp.sum(p * p), jnp.sum(g * g), jnp.sum(g * p)
    safe_pp = jnp.where(pp > 0, pp, 1)  # p = 0 has no direction: nothing is removed
    along = gp / safe_pp
    q = g - along * p
    qq = jnp.sum(q * q)
    # The sums above are rounded, so a part of p is left in q; a second projection removes it. With r = <q, p> / <p, p>
    # the result is q - r p, of squared length <q, q> - r <q, p>: no third sum is needed. The factors are not added,
    # since r is about the rounding error of `along`; and q is computed from g and p each time, which is much cheaper
    # than storing it.
    q = g - _common.separate(along) * p
    qp = jnp.sum(q * p)
    rest = qp / safe_pp
    qq = qq - rest * qp
    q = (g - _common.separate(_common.separate(along)) * p) - rest * p

    # If g is parallel to p, q is rounding noise, which the rescaling would amplify to a full step.
    signal = qq > noise_level**2 * gg
    ratio = jnp.sqrt(jnp.where(signal, gg / jnp.where(signal, qq, 1), 0)) if rescale else signal
    return q * ratio


def perpendicular_gradient(
    rescale: bool = True, *, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Removes from each leaf of the gradient its component along the parameters (perpendicular gradient).

    For each leaf, taken as one vector, with parameters p:

        q = g - (<g, p> / <p, p>) p        g <- q ||g|| / ||q||

    A step along the parameters scales the logits and so lowers the loss without learning anything, until the softmax
    collapses numerically. Without this component generalization ("grokking") is not blocked. Put it first in a chain:
    `optax.chain(perpendicular_gradient(), optax.adamw(1e-3))`. With plain SGD the norm of each leaf never shrinks and
    grows only at second order: `||p'||^2 = ||p||^2 + lr^2 ||g||^2`.

    A leaf with one element is always parallel to its gradient and gets no update: use `mask`. If the gradient is
    parallel to the parameters up to rounding (`||q||` below about 1e-6 `||g||` in float32, or the resolution of a
    bfloat16 gradient), the result is 0; the projection is done twice for accuracy. Parameters of 0 leave the gradient
    unchanged. Under `jit` a leaf may be sharded; inside `shard_map` the products are those of the local shard.

    Args:
      rescale: Give the result the norm of the gradient, as the authors' code does. False returns the
        projection itself, the formula of the paper's text.
      mask: Leaves to project: a pytree of bools, or a function from the parameters to one. The others pass
        unchanged. None: all.

    Returns:
      A stateless gradient transformation whose `update` needs the parameters. Products are computed in at
      least float32; updates keep the dtype of the gradients.

    Raises:
      TypeError: for a `rescale` that is not a bool.
      ValueError: if `update` is called without the parameters.

    References:
      "Grokking at the Edge of Numerical Stability". The second projection and the threshold below which the
      result is 0 are ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = perpendicular_gradient()
      >>> p, g = jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0])
      >>> print(tx.update(g, tx.init(p), p)[0].round(4))
      [0. 5.]
    """
    _checks.flag("rescale", rescale)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del extra
        _common.check_params("perpendicular_gradient", params)
        u = jax.tree.map(lambda g, p: _perpendicular(g, p, rescale), updates, params)
        return _common.cast_like(u, updates), state

    return _common.masked(optax.GradientTransformationExtraArgs(optax.init_empty_state, update), mask)
