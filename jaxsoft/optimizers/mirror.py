"""Optimistic mirror descent.

For games and for online learning: each step expects the last gradient to come again. On the simplex use
`mirror="entropy"`; on other convex sets, a projection of `optax.projections`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Scalar


class OptimisticMirrorDescentState(NamedTuple):
    """State of `optimistic_mirror_descent`.

    Attributes:
      count: steps taken.
      offset: the centre of the next step minus the parameters; for the entropy the same of their logarithms (up to a
        constant per row).
      gradient: the last gradient, or None without `adaptive`.
      variation: the sum of squared changes of the gradient of each leaf, or None without `adaptive`.
    """

    count: jax.Array
    offset: Any
    gradient: Any
    variation: Any


def _log_row(x: jax.Array) -> jax.Array:
    """Logarithms of a row of a simplex. Entries <= 0 are absent; a row without positive entries is uniform."""
    if x.ndim == 0:
        return jnp.zeros_like(x)
    present = x > 0
    return jnp.where(
        present,
        jnp.log(jnp.where(present, x, 1)),
        jnp.where(jnp.any(present, axis=-1, keepdims=True), -jnp.inf, 0),
    )


def _softmax(x: jax.Array) -> jax.Array:
    if x.ndim == 0 or x.size == 0:
        return jnp.ones_like(x)
    return jax.nn.softmax(x, axis=-1)


def optimistic_mirror_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mirror: Literal["euclidean", "entropy"] = "euclidean",
    projection: Callable[[Any], Any] | None = None,
    adaptive: bool = False,
    delta: Scalar = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Optimistic mirror descent: each step expects the last gradient to come again.

    With parameters x (the point that is played), a centre z, and the gradient g at x:

        z <- argmin over the set of <g, z'> + D(z', z) / rate
        x <- argmin over the set of <g, x'> + D(x', z) / next rate

    For `mirror="euclidean"` D is half the squared distance: `z <- P(z - rate g)`, `x <- P(z - next rate g)`, with P
    the `projection`. Without one it is `optax.optimistic_gradient_descent`. For `mirror="entropy"` each row along
    the last axis of a leaf is a point of the simplex and D is the Kullback-Leibler divergence:
    `z <- softmax(log z - rate g)`, `x <- softmax(log z - next rate g)`, i.e. multiplicative weights.

    In games, where gradients rotate, the played points converge where those of gradient descent and ascent spiral
    outwards. The regret grows with the change of the gradients, not with their size. With `adaptive` the rate
    follows that change, summed over all leaves and all previous steps:

        rate = learning_rate / sqrt(delta + sum ||g_s - g_{s-1}||^2)        (g_0 = 0)

    with the Euclidean norm, or for the entropy the largest entry of each leaf. *Reconstructed*: the constants of
    the adaptive rate.

    Args:
      learning_rate: A number or a schedule. With `adaptive`, the diameter of the set is a good start.
      mirror: `"euclidean"` or `"entropy"`.
      projection: For `"euclidean"`: a function from a tree like the parameters to the nearest point of a convex set,
        e.g. `optax.projections.projection_non_negative`. Start inside the set. None: the whole space.
      adaptive: Whether the rate falls with the change of the gradients.
      delta: Added under the root of the adaptive rate, positive.

    Returns:
      A ready optimizer whose `update` needs the parameters. It keeps one float32 array like the parameters, and
      with `adaptive` two. For the entropy, entries that are 0 stay 0, negative ones count as 0, and a row without
      a positive entry is taken as uniform.

    Raises:
      TypeError: for an `adaptive` that is not a bool or a `projection` that is not callable.
      ValueError: for a number out of range, an unknown `mirror`, a `projection` with the entropy, or if `update` is
        called without the parameters.

    References:
      "Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial Online Convex Optimization".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = optimistic_mirror_descent(jnp.log(3.0) / 2, mirror="entropy")
      >>> x = jnp.array([0.5, 0.5])
      >>> updates, _ = tx.update(jnp.array([1.0, 0.0]), tx.init(x), x)
      >>> print((x + updates).round(2))  # twice the rate, the first time
      [0.25 0.75]
    """
    _common.check_learning_rate(learning_rate)
    _checks.option("mirror", mirror, ("euclidean", "entropy"))
    if projection is not None and not callable(projection):
        raise TypeError(f"projection must be a function or None, got {_checks.describe(projection)}")
    if projection is not None and mirror == "entropy":
        raise ValueError("projection must be None for mirror='entropy', which stays on the simplex by itself")
    _checks.flag("adaptive", adaptive)
    _checks.number("delta", delta, above=0)

    def rate(count: jax.Array, variation: Any) -> Any:
        base = learning_rate(count) if callable(learning_rate) else learning_rate
        if not adaptive:
            return base
        return base / jnp.sqrt(delta + _common.total(variation))

    def change(old: jax.Array, g: jax.Array) -> jax.Array:
        if mirror == "euclidean":
            return jnp.sum((g - old) ** 2)
        # By index: the derivative of `max` compares again, and finds no entry if XLA rounds it otherwise there.
        distance = _common.whole(jnp.abs(g - old)).reshape(-1)
        return distance[jnp.argmax(distance)] ** 2 if distance.size else jnp.zeros([], distance.dtype)

    def init(params: optax.Params) -> OptimisticMirrorDescentState:
        return OptimisticMirrorDescentState(
            count=jnp.zeros([], jnp.int32),
            offset=_common.moments_like(params),
            gradient=_common.moments_like(params) if adaptive else None,
            variation=_common.scalars_like(params) if adaptive else None,
        )

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del extra
        _common.check_params("optimistic_mirror_descent", params)
        g, x = _common.widen(updates), _common.widen(params)
        count = jnp.asarray(optax.safe_increment(state.count))
        variation = state.variation
        now = rate(state.count, variation)
        if adaptive:
            variation = jax.tree.map(
                lambda v, old, g: v + change(old, g).astype(v.dtype), variation, state.gradient, g
            )
        then = rate(count, variation)

        hint = jax.tree.map(lambda g, o: (then * g).astype(o.dtype), g, state.offset)
        if mirror == "entropy":
            logits = jax.tree.map(lambda x, o, g: _log_row(x) + o - (now + then) * g, x, state.offset, g)
            u, offset = jax.tree.map(lambda y, x: _softmax(y) - x, logits, x), hint
        elif projection is None:
            u, offset = jax.tree.map(lambda o, g: o - (now + then) * g, state.offset, g), hint
        else:
            centre = projection(jax.tree.map(lambda x, o, g: x + o - now * g, x, state.offset, g))
            new = projection(jax.tree.map(lambda z, g: z - then * g, centre, g))
            offset = jax.tree.map(lambda z, y, o: (z - y).astype(o.dtype), centre, new, state.offset)
            u = jax.tree.map(lambda y, x: y - x, new, x)
        gradient = _common.cast_like(g, state.gradient) if adaptive else None
        return _common.cast_like(u, updates), OptimisticMirrorDescentState(count, offset, gradient, variation)

    return optax.GradientTransformationExtraArgs(init, update)
