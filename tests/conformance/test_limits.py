"""Options at which a formula is 0 / 0 but has a limit: values and derivatives are exact there and near it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import near

import jaxsoft
from jaxsoft import losses

pytestmark = pytest.mark.whole  # the cases are functions

V = 6


def make_inputs(dtype):
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(V), 2)
    q[0, 1] = 0
    arrays = dict(x=2 * rng.normal(size=(2, V)), other=2 * rng.normal(size=(2, V)), q=q)
    return {k: jnp.asarray(a, dtype) for k, a in arrays.items()} | {"labels": jnp.asarray([0, 4], jnp.int32)}


def attention(alpha, x, other, q, labels):
    q, k, v = (a[None, :, None, :] for a in (x, other, other))
    entmax = functools.partial(jaxsoft.entmax, alpha=alpha)
    return jaxsoft.attention.dot_product_attention(q, k, v, normalizer=entmax)


def f_divergence(alpha, x, other, q, labels):
    return losses.f_divergence(*(jax.nn.log_softmax(a) for a in (x, other)), kind="alpha", alpha=alpha)


# By name: the function of the option and the inputs; the limit; the direction in which the option has values; whether
# the limit itself is one of them.
CASES = {
    "entmax": (lambda a, x, **_: jaxsoft.entmax(x, alpha=a), 1.0, 1, True),
    "entmax in attention": (attention, 1.0, 1, True),
    "entmax_loss": (lambda a, x, labels, **_: losses.entmax_loss(x, labels, alpha=a), 1.0, 1, True),
    "entmax_loss, soft": (lambda a, x, q, **_: losses.entmax_loss(x, q, alpha=a), 1.0, 1, True),
    "generalized_cross_entropy": (
        lambda a, x, labels, **_: losses.generalized_cross_entropy(x, labels, q=a),
        *(0.0, 1, True),
    ),
    "comp_sum_loss": (lambda a, x, labels, **_: losses.comp_sum_loss(x, labels, tau=a), 1.0, -1, True),
    "f_divergence, 0": (f_divergence, 0.0, 1, False),
    "f_divergence, 1": (f_divergence, 1.0, -1, False),
    "f_dpo_loss": (
        lambda a, x, other, q, labels: losses.f_dpo_loss(x, other, q, q, divergence="alpha", alpha=a),
        *(0.0, 1, False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_at_a_limit(name):
    function, limit, direction, includes = CASES[name]

    def run(offsets, dtype):
        @jax.jit
        def each(offsets, given):
            f = lambda a: function(limit + direction * a, **given)
            return jax.lax.map(lambda a: jax.jvp(f, (a,), (jnp.ones_like(a),)), offsets)

        return [np.asarray(a, np.float64) for a in each(jnp.asarray(offsets, dtype), make_inputs(dtype))]

    first = 0.0 if includes else 1e-7
    with float64():
        # Four steps of the size at which finite differences are exact to 1e-8, then points near the limit
        step, close_by = 2e-3, np.array([first, 1e-6, 1e-4, 1e-2])
        values, slopes = run([*(first + step * np.arange(5)), *close_by], np.float64)
    near(slopes[0], np.tensordot([-25, 48, -36, 16, -3], values[:5], 1) / (12 * step), 1e-7)
    near(slopes[2], np.tensordot([1, -8, 0, 8, -1], values[:5], 1) / (12 * step), 1e-8)
    for a, slope in zip(close_by[:3], slopes[5:]):
        near(slope, slopes[0] + (slopes[1] - slopes[0]) / step * (a - first), 1e-5)
    values32, slopes32 = run(close_by, np.float32)
    near(values32, values[5:], 2e-6)
    near(slopes32, slopes[5:], 2e-5)


def entmax(x, alpha):
    """A row by its definition, with the threshold by bisection."""
    e = alpha - 1

    def weights(t):
        y = np.maximum(e * (x - x.max() - t), -1)
        with np.errstate(divide="ignore"):
            return np.exp(np.log1p(y) / e)

    low, high = 0.0, min(1 / e, np.log(len(x)))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(middle).sum() >= 1 else (low, middle)
    return weights(low)


def test_entmax_near_softmax(x64):
    alpha = np.array([1.0001, 1.01, 1.0999, 1.1001])
    x = 2 * np.random.default_rng(1).normal(size=(4, V))
    got = jaxsoft.entmax(jnp.asarray(x), alpha=jnp.asarray(alpha))
    near(got, [entmax(*row) for row in zip(x, alpha)], 1e-11)
    near(jaxsoft.entmax(jnp.asarray(x[0]), alpha=1.0001), got[0], 1e-14)
    # At 1 the derivative is p (sum p log(p)^2 - log(p)^2) / 2.
    p = jax.nn.softmax(x)
    squares = jnp.log(p) ** 2
    _, slope = jax.jvp(lambda a: jaxsoft.entmax(jnp.asarray(x), alpha=a), (1.0,), (1.0,))
    near(slope, p * (jnp.sum(p * squares, -1, keepdims=True) - squares) / 2, 1e-13)


@pytest.mark.parametrize("alpha", [1e-4, -0.05, 1 - 1e-4, 1.05])
def test_alpha_divergence_near_its_limits(alpha):
    def run(dtype):
        given = make_inputs(dtype)
        f = jax.jit(lambda x: losses.alpha_divergence(x, given["other"], alpha=alpha))
        value, pullback = jax.vjp(f, given["x"])
        return value, pullback(jnp.ones_like(value))[0]

    with float64():
        expected = run(np.float64)
        x, other = (jax.nn.log_softmax(make_inputs(np.float64)[name]) for name in ("x", "other"))
        sums = jnp.sum(jnp.exp(alpha * other + (1 - alpha) * x), -1)
        near(expected[0], (sums - 1) / (alpha * (alpha - 1)), 1e-11)
    for a, b in zip(run(np.float32), expected):
        near(a, b, 2e-6)
