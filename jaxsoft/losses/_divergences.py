"""The f-divergences `D_f(p || q) = sum_x q f(p / q)` of the preference and policy losses.

In the formulas `t = p / q` and `x = log t`. In the names, p is the policy and q the target or the reference: a
forward divergence puts the target first, a reverse divergence the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.nn import softplus
from jaxtyping import Array

from jaxsoft._numerics import expm1_over

_LOG_2 = math.log(2)
MAX_EXPONENT = 80.0  # e^80 is finite in float32, and so are the products it enters


class Divergence(NamedTuple):
    """An f-divergence.

    Attributes:
      derivative: `(x, alpha) -> f'(t)`.
      term: `(log p, log q, alpha) -> q f(t)`, for positive p and q.
      at_zero: `alpha -> f(0)`, the cost per unit of q where p is 0.
      slope: `alpha -> lim f(t) / t` as t goes to infinity, the cost per unit of p where q is 0.
    """

    derivative: Callable[[Array, Any], Array]
    term: Callable[[Array, Array, Any], Array]
    at_zero: Callable[[Any], Any]
    slope: Callable[[Any], Any]


def _clamp(exponent: Array) -> Array:
    return jnp.minimum(exponent, MAX_EXPONENT)


def js_term(a: Array, b: Array, alpha: Any) -> Array:
    """`e^a log(e^a / m) + e^b log(e^b / m)` with the mean m of `e^a` and `e^b`."""
    x = a - b
    return jnp.exp(a) * (_LOG_2 - softplus(-x)) + jnp.exp(b) * (_LOG_2 - softplus(x))


def alpha_term(a: Array, b: Array, alpha: Any, most: float = MAX_EXPONENT) -> Array:
    """`((1 - alpha) e^a + alpha e^b - e^g) / (alpha (1 - alpha))`, `g = (1 - alpha) a + alpha b` held below `most`."""
    # Written about the nearer one of the two limits, so that nothing cancels there.
    x, near_1 = a - b, jnp.asarray(alpha) > 0.5
    e = jnp.where(near_1, 1 - alpha, alpha)
    first, second, x = jnp.where(near_1, b, a), jnp.where(near_1, a, b), jnp.where(near_1, -x, x)
    close = jnp.abs(e * x) < 0.5
    change = jnp.exp(first) * expm1_over(jnp.where(close, x, 0), -e)
    far = (jnp.exp(jnp.minimum(first - e * x, most)) - jnp.exp(first)) / jnp.where(close, 1, -e)
    return (jnp.where(close, change, far) - (jnp.exp(first) - jnp.exp(second))) / (1 - e)


def _alpha_derivative(x: Array, alpha: Any) -> Array:
    return expm1_over(x, -alpha)


DIVERGENCES = {
    "reverse_kl": Divergence(  # f = t log t
        derivative=lambda x, alpha: x + 1,
        term=lambda a, b, alpha: jnp.exp(a) * (a - b),
        at_zero=lambda alpha: 0,
        slope=lambda alpha: math.inf,
    ),
    "forward_kl": Divergence(  # f = -log t
        derivative=lambda x, alpha: -jnp.exp(_clamp(-x)),
        term=lambda a, b, alpha: jnp.exp(b) * (b - a),
        at_zero=lambda alpha: math.inf,
        slope=lambda alpha: 0,
    ),
    "jensen_shannon": Divergence(  # f = t log(2t / (1 + t)) + log(2 / (1 + t))
        derivative=lambda x, alpha: _LOG_2 - softplus(-x),
        term=js_term,
        at_zero=lambda alpha: _LOG_2,
        slope=lambda alpha: _LOG_2,
    ),
    "alpha": Divergence(  # f = ((1 - a) t + a - t^(1 - a)) / (a (1 - a))
        derivative=_alpha_derivative,
        term=alpha_term,
        at_zero=lambda alpha: 1 / (1 - alpha),
        slope=lambda alpha: 1 / alpha,
    ),
    "total_variation": Divergence(  # f = |t - 1| / 2
        derivative=lambda x, alpha: jnp.sign(x) / 2,
        term=lambda a, b, alpha: jnp.abs(jnp.exp(a) - jnp.exp(b)) / 2,
        at_zero=lambda alpha: 0.5,
        slope=lambda alpha: 0.5,
    ),
    "forward_chi_squared": Divergence(  # f = (1 - t)^2 / t
        derivative=lambda x, alpha: -jnp.expm1(_clamp(-2 * x)),
        term=lambda a, b, alpha: (jnp.exp(b) - jnp.exp(a)) * jnp.expm1(_clamp(b - a)),
        at_zero=lambda alpha: math.inf,
        slope=lambda alpha: 1,
    ),
    "reverse_chi_squared": Divergence(  # f = (t - 1)^2
        derivative=lambda x, alpha: 2 * jnp.expm1(_clamp(x)),
        term=lambda a, b, alpha: (jnp.exp(a) - jnp.exp(b)) * jnp.expm1(_clamp(a - b)),
        at_zero=lambda alpha: 1,
        slope=lambda alpha: math.inf,
    ),
}
