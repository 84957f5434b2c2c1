"""The dtype policy, and guarded operations that the whole library uses."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def accumulation_dtype(*dtypes) -> jnp.dtype:
    """The dtype of statistics: float32 for half-precision inputs, else the widest input dtype."""
    with jax.numpy_dtype_promotion("standard"):  # also where the user forbids it: the promotion is explicit
        return jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)


def finite_gauge(m: jax.Array) -> jax.Array:
    """A reference exponent that is safe to subtract: `m` without gradient, 0 where `m` is not finite."""
    m = jax.lax.stop_gradient(m)
    return jnp.where(jnp.isfinite(m), m, 0)


def is_present(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Which entries of stored scores count: not masked, and not -inf."""
    return x != -jnp.inf if where is None else (x != -jnp.inf) & where


def log_or_neg_inf(s: jax.Array) -> jax.Array:
    """`log(s)`, and -inf with gradient 0 where `s` is 0."""
    positive = s != 0
    return jnp.where(positive, jnp.log(jnp.where(positive, s, 1)), -jnp.inf)


def safe_divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, and 0 with gradient 0 where `b` is 0."""
    nonzero = b != 0
    return jnp.where(nonzero, a / jnp.where(nonzero, b, 1), 0)


# Near 0, where a quotient and its derivatives would cancel: an even series times a simple factor. Three terms are exact
# in float32 and six in float64, for |y| < 0.1 in `log1p_ratio` and |y| < 0.5 in `expm1_over`.


def _even_series(square: jax.Array, coefficients: list[float]) -> jax.Array:
    series: Any = 0.0
    for c in reversed(coefficients[: 3 if square.dtype.itemsize <= 4 else 6]):
        series = series * square + c
    return series


def log1p_ratio(y: jax.Array) -> jax.Array:
    """`log(1 + y) / y` for `|y| < 0.1`, and 1 at 0: exact, in its derivatives too."""
    w = y / (2 + y)  # log(1 + y) = 2 artanh(w)
    return 2 / (2 + y) * _even_series(w * w, [1 / k for k in range(1, 12, 2)])


def expm1_over(x: jax.Array, a: Any) -> jax.Array:
    """`(e^(a x) - 1) / a`, and x at a = 0: exact, in its derivatives too; `a x` is held in [-80, 80]."""
    a = jnp.asarray(a, x.dtype)
    y = a * x
    near = jnp.abs(y) < 0.5
    s = jnp.where(near, y, 0)
    # e^s - 1 = 2 e^(s / 2) sinh(s / 2)
    series = _even_series(s * s / 4, [1 / math.factorial(k) for k in range(1, 12, 2)])
    # Not `expm1`, whose derivative in JAX, `expm1(y) + 1`, cancels for y far below 0
    far = (jnp.exp(jnp.clip(jnp.where(near, 1, y), -80, 80)) - 1) / jnp.where(near, 1, a)
    return jnp.where(near, jnp.where(near, x, 0) * jnp.exp(s / 2) * series, far)


@jax.jit
def exp_difference(x: jax.Array, y: jax.Array, e: jax.Array) -> jax.Array:
    """`e^y - e` for `y = x + log e`, accurate near `x = 0` and without overflow unless e^y does.

    GPU kernels have it in fewer instructions, and know it by its name.
    """
    return jnp.tanh(x / 2) * (jnp.exp(y) + e)


def weigh(values: jax.Array, weights: jax.Array) -> jax.Array:
    """`weights * values`; a weight of 0 hides a non-finite value and its gradient."""
    values = jnp.where((weights != 0) | jnp.isfinite(values), values, 0)
    return weights.astype(values.dtype) * values


def as_ids(ids: Any) -> jax.Array:
    """Ids as signed integers of 32 bits or more: narrower types may not hold the number of columns, or -100.

    Without 64-bit types, an array of NumPy's default integers has 32 bits from here on.
    """
    ids = jnp.asarray(ids)
    return ids.astype(jnp.promote_types(ids.dtype, jnp.int32))


@jax.custom_jvp
def scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `x`, with its derivatives multiplied by `factor`, which gets no gradient itself."""
    del factor
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals, tangents):
    x, factor = primals
    return x, (jax.lax.stop_gradient(factor) * tangents[0]).astype(x.dtype)


def shape_by_moments(leaves: list[jax.Array]) -> jax.Array:
    """The shape of the generalized Gaussian that has the moments of all entries; a constant to the gradient.

    Solves `mean w^2 / (mean |w|)^2 = Gamma(1/s) Gamma(3/s) / Gamma(2/s)^2` for s in [0.1, 10] by bisection.
    """
    leaves = jax.lax.stop_gradient(leaves)
    size = sum(w.size for w in leaves)
    first = jnp.sum(jnp.stack([jnp.sum(jnp.abs(w)) for w in leaves])) / size
    second = jnp.sum(jnp.stack([jnp.sum(w * w) for w in leaves])) / size
    target = jnp.log(jnp.maximum(safe_divide(second, first * first), 1))
    bounds = jnp.full_like(target, 0.1), jnp.full_like(target, 10.0)
    low, high, _ = jax.lax.fori_loop(0, 50, _halve, (*bounds, target))
    return (low + high) / 2


def _halve(_, interval):
    low, high, target = interval
    gammaln = jax.scipy.special.gammaln
    s = (low + high) / 2
    log_ratio = gammaln(1 / s) + gammaln(3 / s) - 2 * gammaln(2 / s)  # falls as s grows
    return jnp.where(log_ratio > target, s, low), jnp.where(log_ratio > target, high, s), target
