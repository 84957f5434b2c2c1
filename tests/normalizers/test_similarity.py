"""Similarity-distance-magnitude activations and their two statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.normalizers.similarity import (
    distance_quantile,
    sdm_activation,
    sdm_log_softmax,
    similarity_count,
)

X = [1.0, 2.0, -1.0, 0.5]
RNG = np.random.default_rng(0)
ROWS, Q, D = RNG.normal(size=(4, 5)), np.array([0.0, 1.0, 10.0, 3.0]), np.array([1.0, 0.3, 0.7, 0.0])
both = pytest.mark.parametrize("function", [sdm_activation, sdm_log_softmax])


def test_worked_numbers(x64):
    x = jnp.array(X)
    close(sdm_activation(x, 0.0, 1.0), [0.252710, 0.505420, 0.063177, 0.178693])
    close(sdm_activation(x, 10, 1), [0.075213, 0.902553, 0.000522, 0.021712])
    close(sdm_log_softmax(x, 10, 1), [-1.041260, -0.041260, -3.041260, -1.541260])
    close(sdm_activation(x, 10.0, 0.5), [0.196668, 0.681277, 0.016389, 0.105667])
    z = jnp.array([2.0, 1.0, 0.5])
    close(sdm_activation(z, 10, 0.8), [0.841980, 0.115334, 0.042686])
    close(sdm_log_softmax(z, 10, 0.8), [-0.069217, -0.869217, -1.269217])
    close(sdm_activation(z, np.e - 2, 1.0), jax.nn.softmax(z), 1e-15)
    close(sdm_activation(z, 5.0, 0.0), 1 / 3, 1e-15)


@both
def test_by_row_jit_vmap_axis_and_gradients(function, x64):
    x, q, d = jnp.asarray(ROWS), jnp.asarray(Q), jnp.asarray(D)
    y = jax.jit(function)(x, q, d)
    for i in range(4):
        close(y[i], function(x[i], float(Q[i]), float(D[i])), 1e-14)
    close(jax.vmap(function)(x, q, d), y, 1e-14)
    close(function(x.T, q, d, axis=0).T, y, 1e-14)
    close(function(x, q.astype(jnp.int32), d), y, 1e-14)
    if function is sdm_log_softmax:
        close((2 + Q[:, None]) ** np.asarray(y), sdm_activation(x, q, d), 1e-14)
    check_grads(lambda x: function(x, q, d), (x,), 1)
    c = jnp.asarray(RNG.normal(size=x.shape))
    for g in jax.grad(lambda q, d: jnp.vdot(c, function(x, q, d)), (0, 1))(q, d):  # constants
        close(g, 0, 0)


@both
def test_absent_entries(function):
    x, q, d = (jnp.asarray(a, jnp.float32) for a in (ROWS, Q, D))
    where = jnp.ones(x.shape, bool).at[0, 1].set(False).at[2].set(False).at[3, 2].set(False)
    dirty = jnp.where(where, x, jnp.nan).at[1, 4].set(-jnp.inf).at[3, 0].set(-jnp.inf)
    absent = ~where | jnp.isneginf(dirty)

    def f(x, where):
        y = function(x, q, d, where=where)
        finite = jnp.isfinite(jax.lax.stop_gradient(y))
        return jnp.where(finite, y * jnp.arange(5.0), 0).sum(), y

    (_, y), g = jax.value_and_grad(f, has_aux=True)(dirty, where)
    (_, other), h = jax.value_and_grad(f, has_aux=True)(x, ~absent)
    close(y, other)
    close(g, h)
    nothing = 0.0 if function is sdm_activation else -jnp.inf
    assert jnp.all(y[absent] == nothing) and jnp.all(g[absent] == 0) and jnp.any(g != 0)
    kept = function(jnp.delete(x[0], 1), Q[0], D[0])
    close(jnp.delete(y[0], 1), kept)


@both
def test_dtypes(function):
    low = function(jnp.asarray(ROWS, jnp.bfloat16), jnp.asarray(Q), jnp.asarray(D))
    high = function(jnp.asarray(ROWS, jnp.bfloat16).astype(jnp.float32), jnp.asarray(Q), jnp.asarray(D))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), high, rtol=4e-3, atol=4e-3)


def test_similarity_count():
    labels = jnp.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 1, 1, 1, 1], [2, 2, 2, 2, 2]])
    predicted = jnp.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [2, 2, 2, 2, 2]])
    ours = jnp.array([1, 1, 1, 2])
    q = jax.jit(similarity_count)(labels, predicted, ours)
    assert q.tolist() == [2, 1, 0, 5] and q.dtype == jnp.int32
    where = jnp.array([[True, True, False, True, True], [False] * 5, [False] + [True] * 4, [True] * 5])
    assert similarity_count(labels, predicted, ours, where=where).tolist() == [4, 0, 4, 5]
    assert jax.vmap(similarity_count)(labels, predicted, ours).tolist() == [2, 1, 0, 5]


def test_distance_quantile():
    known = jnp.array([[0.1, 0.2, 0.4, 0.8]])
    d = jnp.array([0.05, 0.2, 0.3, 0.9])
    close(distance_quantile(d, known), [1, 0.75, 0.5, 0], 0)
    two = jnp.array([[0.8, 0.1, 0.4, 0.2], [0.5, jnp.nan, 0.35, jnp.nan]])
    where = jnp.array([[True] * 4, [True, False, True, False]])
    close(jax.jit(distance_quantile)(d, two, where=where), [1, 0.75, 0.5, 0], 0)
    close(distance_quantile(jnp.array([[0.4], [0.36]]), two, where=where), [[0.5], [0.5]], 0)
    close(distance_quantile(d, two, where=where.at[1].set(False)), 0, 0)  # a class without examples
    assert jnp.isnan(distance_quantile(jnp.array(jnp.nan), known))
    g = jax.grad(lambda d: distance_quantile(d, known).sum())(d)
    close(g, 0, 0)
    with float64():
        assert distance_quantile(jnp.ones(2, jnp.float64), jnp.ones((1, 2))).dtype == jnp.float64


LAZY = jaxsoft.linear_logits(np.ones((2, 3), np.float32), np.ones((3, 4), np.float32))
BAD = [
    (lambda: sdm_activation(jnp.array(X), -1.0, 1.0), ValueError, "similarity must be a number >= 0"),
    (lambda: sdm_activation(jnp.array(X), 1.0, 1.5), ValueError, "distance must be a number >= 0 and <= 1"),
    (lambda: sdm_log_softmax(jnp.array(X), jnp.ones(2), 1.0), ValueError, "similarity must be a scalar or"),
    (lambda: sdm_log_softmax(jnp.array(X), 1.0, "near"), TypeError, "distance must be"),
    (lambda: sdm_activation(LAZY, 1.0, 1.0), TypeError, r"dense\(\)"),
    (
        lambda: similarity_count(jnp.ones((2, 3)), jnp.ones((2, 3), int), jnp.ones(2, int)),
        TypeError,
        "integer",
    ),
    (
        lambda: similarity_count(jnp.ones((2, 3), int), jnp.ones((2, 3), int), jnp.ones(3, int)),
        ValueError,
        r"predictions must have shape \(2,\)",
    ),
    (lambda: distance_quantile(jnp.ones(2), jnp.ones(3)), ValueError, "calibration must have shape"),
    (
        lambda: distance_quantile(jnp.ones(2), jnp.ones((2, 3)), where=jnp.ones(2, bool)),
        ValueError,
        "where must broadcast",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
