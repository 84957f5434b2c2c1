"""Activations and neurons: worked numbers, oracles, derivatives, precision, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fails, near
from jax.test_util import check_grads

from jaxsoft.activations import (
    approximate_sign,
    maxout,
    mish,
    mpc_gelu,
    pade_activation,
    pade_leaky_relu,
    pade_neuron,
    pade_neuron_init,
    periodic_binarize,
    relu_classifier,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_slope(f, x):
    x = jnp.asarray(x)
    return jax.jvp(f, (x,), (jnp.ones_like(x),))


def test_mish(x64):
    assert mish is jax.nn.mish
    values, slopes = with_slope(mish, [-5.0, -1, 0, 1, 5])
    close(values, [-0.033576, -0.303401, 0, 0.865098, 4.999552])
    close(slopes, [-0.026747, 0.059217, 0.6, 1.049036, 1.000800])


def test_mpc_gelu(x64):
    x = np.array([-5, -3, -2, -1.95, -1, 0, 1, 2, 3, 4, -1e200, 1e200])
    gelu = jax.jit(mpc_gelu)
    values, slopes = with_slope(gelu, x)
    expected = [
        0,
        -0.003369,
        -0.044903,
        -0.041920,
        -0.167026,
        0.008526,
        0.832974,
        1.962464,
        3.015864,
        4,
        0,
        1e200,
    ]
    close(values[:-1], expected[:-1])
    assert values[-1] == 1e200
    eps = 1e-6
    inside = [0, 1, 2, 4, 5, 6, 7, 9]
    differences = (gelu(x[inside] + eps) - gelu(x[inside] - eps)) / (2 * eps)
    close(slopes[jnp.array(inside)], differences, 1e-8)
    assert np.all(np.isfinite(slopes)) and slopes[-1] == 1 and slopes[-2] == 0
    dense = np.linspace(-6, 6, 100001)
    errors = np.abs(gelu(dense) - jax.nn.gelu(dense, approximate=False))
    assert 0.0198 < errors.max() < 0.02
    assert np.isnan(mpc_gelu(jnp.array(np.nan)))


def test_maxout(x64):
    kernel = jnp.array([[1.0, 0, -1, 2], [0, 1, 0.5, 0.5]])  # two outputs of two pieces
    pieces = jnp.array([1.0, -1.0]) @ kernel + jnp.array([0, 0.1, 0.2, -0.1])
    close(pieces, [1, -0.9, -1.3, 1.4])
    close(maxout(pieces, 2), [1, 1.4])
    close(maxout(pieces.reshape(2, 2).T, 2, axis=0), [[1, 1.4]])
    ties = jax.grad(lambda x: maxout(x, 3).sum())(jnp.array([1.0, 2, 2, 0, 0, 0]))
    np.testing.assert_array_equal(ties, [0, 1, 0, 1, 0, 0])
    y = normal(2, 6, 3)
    near(maxout(y, 2, axis=1), y.reshape(2, 3, 2, 3).max(2))
    assert np.isnan(maxout(jnp.array([1.0, np.nan, 0]), 3)[0])


def test_relu_classifier():
    x = normal(50, 4)
    x[:5] = -np.abs(x[:5])
    np.testing.assert_array_equal(relu_classifier(x), np.argmax(np.maximum(x, 0), 1))
    np.testing.assert_array_equal(relu_classifier(x.T, axis=0)[:5], 0)


def test_pade_activation(x64):
    x = np.array([-2.0, -1, 0, 1, 2])
    defaults = pade_leaky_relu(jnp.float64)
    for form in ("A", "B"):
        close(
            pade_activation(x, *defaults, form=form),
            [-0.018846, -0.009189, 0.033558, 1.000811, 2.001154],
            1e-6,
        )
    a, b, y = normal(4), 0.2 * normal(3, seed=1), normal(5, seed=2)
    top, powers = sum(a[j] * y**j for j in range(4)), [y ** (k + 1) for k in range(3)]
    terms = [b[k] * powers[k] for k in range(3)]
    expected = {
        "A": 1 + sum(np.abs(t) for t in terms),
        "B": 1 + np.abs(sum(terms)),
        "C": 0.1 + np.abs(b[0] + b[1] * y + b[2] * y**2),
        "nonsafe": 1 + sum(terms),
    }
    for form, below in expected.items():
        near(pade_activation(y, a, b, form=form), top / below)
    every = jax.jit(lambda *p: [pade_activation(*p, form=form) for form in expected])
    y, b = np.array([-1.3, -0.4, 0.3, 0.9, 1.7]), np.array([0.3, 0.2, 0.1])  # far from poles and kinks
    check_grads(every, (y, a, b), order=1, modes=("fwd", "rev"))
    slope = jax.grad(lambda x: pade_activation(x, a, b))(jnp.array(0.0))
    near(slope, a[1])  # where |x| has a kink


def test_pade_neuron(x64):
    x, start = np.array([1.0, -2.0]), np.array([0.5])
    above = np.array([[0.3, -0.2], [0.1, 0.4]])[..., None]
    below = np.array([[0.2, 0.1], [-0.3, 0.2]])[..., None]
    for form, degree, expected in [("A", 2, 1.933333), ("S", 2, 1.707692), ("A", 1, 1.2), ("S", 1, 0.85)]:
        close(pade_neuron(x, above[:degree], below[:degree], start, form=form), [expected])
    close(pade_neuron(x, above, below[:0], start), [0.5 + 0.7 + 1.7])
    q = [1, 1, 1 + 0.5]  # Q_0, Q_1, Q_2
    close(pade_neuron(x, above[:0], below, start, form="S"), [q[2] * 0.5 / (q[2] ** 2 + q[1] ** 2)])
    both = jax.jit(lambda *p: [pade_neuron(*p, form=form) for form in "AS"])
    parameters = normal(2, 3, 4), 0.3 * normal(2, 3, 4, seed=1), normal(4, seed=2)
    check_grads(both, (normal(5, 3, seed=3), *parameters), order=1, modes=("fwd", "rev"))
    # It begins as a linear neuron.
    begin = pade_neuron_init(jax.random.key(0), 100, 50, degrees=(3, 2))
    y = normal(2, 100)
    near(pade_neuron(y, *begin), y @ begin[0][0] + begin[2])
    assert not np.any(begin[0][1:]) and not np.any(begin[1])
    assert abs(jnp.std(begin[0][0]) - 0.1) < 0.005 and 0.09 < jnp.max(jnp.abs(begin[2])) <= 0.1


def test_binary(x64):
    weight = np.array([-0.3, 0.02, 0.1, 0.4])
    wave = functools.partial(periodic_binarize, hard=False)
    values, slopes = with_slope(wave, weight)
    close(values, [0.279415, 0.389418, 0.909297, 0.989358])
    close(slopes, [19.203406, 18.421220, -8.322937, -2.910001])
    signs, hard_slopes = with_slope(periodic_binarize, weight)
    np.testing.assert_array_equal(signs, 1)
    near(hard_slopes, slopes)
    signs, slopes = with_slope(approximate_sign, weight)
    np.testing.assert_array_equal(signs, [-1, 1, 1, 1])
    close(slopes, [1.4, 1.96, 1.8, 1.2])
    near(jax.vmap(jax.grad(approximate_sign))(jnp.asarray(weight)), slopes)
    zero = jnp.zeros(1)
    for f in (periodic_binarize, approximate_sign):
        assert f(zero)[0] == 0 and f(zero, zero=1)[0] == 1 and jnp.isnan(f(zero + jnp.nan)[0])
    assert with_slope(approximate_sign, [3.0])[1][0] == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    x = jnp.asarray(2 * normal(64), dtype)
    parameters = (normal(2, 64, 3), normal(1, 64, 3), normal(3))
    for f in (
        mpc_gelu,
        lambda x: pade_activation(x, *pade_leaky_relu()),
        lambda x: pade_neuron(x, *(jnp.asarray(p, jnp.float32) for p in parameters)),
        lambda x: periodic_binarize(x, hard=False),
    ):
        low, high = f(x), f(x.astype(jnp.float32))
        assert low.dtype == dtype
        np.testing.assert_array_equal(low, high.astype(dtype))
    assert {f(x).dtype for f in (approximate_sign, lambda x: maxout(x, 2))} == {x.dtype}


def test_errors():
    ids, x, c = jnp.arange(3), jnp.ones((2, 4)), jnp.ones(3)
    kernel = jnp.ones((1, 4, 3))
    key = jax.random.key(0)
    for words, kind, call in [
        (["x", "floating"], TypeError, lambda: mpc_gelu(ids)),
        (["pieces", "divide", "4"], ValueError, lambda: maxout(x, 3)),
        (["pieces"], TypeError, lambda: maxout(x, 2.0)),
        (["axis"], ValueError, lambda: maxout(x, 2, axis=2)),
        (["logits"], TypeError, lambda: relu_classifier(ids)),
        (["axis"], ValueError, lambda: relu_classifier(x, axis=2)),
        (["form", "'D'"], ValueError, lambda: pade_activation(x, c, c, form="D")),
        (["numerator"], ValueError, lambda: pade_activation(x, x, c)),
        (["denominator"], TypeError, lambda: pade_activation(x, c, ids)),
        (["form"], ValueError, lambda: pade_neuron(x, kernel, kernel, c, form="B")),
        (["denominator", "(1, 4, 3)"], ValueError, lambda: pade_neuron(x, kernel, kernel[:, :2], c)),
        (["bias"], ValueError, lambda: pade_neuron(x, kernel, kernel, x)),
        (["degrees"], ValueError, lambda: pade_neuron_init(key, 2, 2, degrees=(0, 0))),
        (["inputs"], ValueError, lambda: pade_neuron_init(key, 0, 2)),
        (["dtype"], TypeError, lambda: pade_leaky_relu(jnp.int32)),
        (["weight"], TypeError, lambda: periodic_binarize(ids)),
        (["hard"], TypeError, lambda: periodic_binarize(x, hard=jnp.array(True))),
        (["frequency"], TypeError, lambda: periodic_binarize(x, frequency="fast")),
        (["zero"], ValueError, lambda: approximate_sign(x, zero=2)),
    ]:
        fails(words, kind, call)
