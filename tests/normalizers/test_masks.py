"""Gumbel masks, straight-through one-hot vectors, the interpolant and the temperature schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close
from jax.test_util import check_grads

from jaxsoft.normalizers.masks import (
    exponential_temperature_schedule,
    gumbel_sigmoid,
    gumbel_softmax_interpolant,
    straight_through_one_hot,
)

KEY = jax.random.key(3)
X = jnp.array([1.0, 2.0, -1.0, 0.5])
G = jnp.array([0.2, -0.4, 1.1, 0.3])


def test_gumbel_sigmoid_value():
    # the worked number: l = .5, u = .3, tau = .5
    noise = np.log(0.3) - np.log(0.7)
    close(gumbel_sigmoid(jnp.array(0.5 + noise), key=None, temperature=0.5), 0.333012)
    drawn = np.asarray(jax.random.logistic(KEY, (4,), jnp.float32))
    close(gumbel_sigmoid(X, key=KEY, temperature=0.7), 1 / (1 + np.exp(-(np.asarray(X) + drawn) / 0.7)))


def test_gumbel_sigmoid_keeps_as_often_as_its_logits_say():
    masks = gumbel_sigmoid(jnp.full(20000, 0.8), key=KEY, hard=True)
    assert set(np.unique(masks)) == {0.0, 1.0}
    assert abs(masks.mean() - 0.689974) < 0.015  # sigmoid(0.8), five standard errors


def test_gumbel_sigmoid_hard_values_with_the_soft_gradient(x64):
    c, x = jnp.array([1.0, -2.0, 0.5, 3.0]), X.astype(jnp.float64)

    def f(x, t, hard):
        return jnp.vdot(c, gumbel_sigmoid(x, key=KEY, temperature=t, hard=hard))

    soft, hard = (jax.jit(jax.grad(f, (0, 1)), static_argnums=2)(x, 0.5, h) for h in (False, True))
    close(hard[0], soft[0], 1e-15)
    close(hard[1], soft[1], 1e-15)
    check_grads(lambda x, t: f(x, t, False), (x, 0.5), 1)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_sigmoid_absent_entries(hard):
    x, where = jnp.array([jnp.nan, 1.0, -jnp.inf, 2.0]), jnp.array([False, True, True, True])

    def f(x, t):
        return gumbel_sigmoid(x, key=KEY, temperature=t, hard=hard, where=where)

    y = f(x, 1.0)
    close(y[jnp.array([0, 2])], 0)
    close(y[1], gumbel_sigmoid(jnp.array([0.0, 1.0, 0.0, 2.0]), key=KEY, hard=hard)[1])
    dx, dt = jax.grad(lambda x, t: f(x, t).sum(), (0, 1))(x, 1.0)
    close(dx[jnp.array([0, 2])], 0)
    assert jnp.isfinite(dt) and jnp.all(jnp.isfinite(dx)) and dx[1] != 0


def test_gumbel_sigmoid_dtype_shape_and_vmap():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert gumbel_sigmoid(x, key=KEY).dtype == jnp.bfloat16
    assert gumbel_sigmoid(jnp.float32(1), key=KEY).shape == ()
    keys = jax.random.split(KEY, 2)
    mapped = jax.vmap(lambda x, key: gumbel_sigmoid(x, key=key))(jnp.ones((2, 3)), keys)
    close(mapped[1], gumbel_sigmoid(jnp.ones(3), key=keys[1]), 1e-7)


def test_straight_through_one_hot():
    ties = jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, -1.0]])
    close(straight_through_one_hot(ties), [[0, 1, 0], [1, 0, 0]], 0)
    close(straight_through_one_hot(ties.T, axis=0), np.array([[0, 1, 0], [1, 0, 0]]).T, 0)
    _, tangent = jax.jvp(straight_through_one_hot, (X,), (G,))
    close(tangent, jax.jvp(jax.nn.softmax, (X,), (G,))[1])
    c = jnp.array([1.0, -2.0, 0.5, 3.0])
    close(
        jax.jit(jax.grad(lambda x: jnp.vdot(c, straight_through_one_hot(x))))(X),
        jax.grad(lambda x: jnp.vdot(c, jax.nn.softmax(x)))(X),
    )
    assert straight_through_one_hot(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_straight_through_one_hot_absent_entries():
    x = jnp.array([[jnp.nan, 1.0, 2.0], [5.0, 5.0, 5.0], [-jnp.inf, -1.0, -2.0]])
    where = jnp.array([[False, True, True], [False] * 3, [True] * 3])
    close(straight_through_one_hot(x, where=where), [[0, 0, 1], [0, 0, 0], [0, 1, 0]], 0)
    g = jax.grad(lambda x: (straight_through_one_hot(x, where=where) * jnp.array([1.0, 2.0, 5.0])).sum())(x)
    assert jnp.all(jnp.isfinite(g))
    close(g[1], 0)
    close(g[0, 0], 0)
    assert g[0, 1] != 0


def test_interpolant_numbers():
    x, u = gumbel_softmax_interpolant(jnp.array(1), 0.5, G)
    close(x, [0.216703, 0.296559, 0.265125, 0.221613])
    close(u, [-0.086405, 0.280480, -0.105712, -0.088363])
    x, u = gumbel_softmax_interpolant(jnp.array(1), 0.5, G, velocity="exact")
    close(u, [-0.098473, 0.144347, 0.039932, -0.085806])


def test_interpolant_velocities_are_derivatives(x64):
    g = G.astype(jnp.float64)

    def point(t, g):
        return gumbel_softmax_interpolant(jnp.array(2), t, g, beta=1.5, max_temperature=5.0, decay=2.0).point

    options = dict(beta=1.5, max_temperature=5.0, decay=2.0)
    _, slope = jax.jvp(lambda t: point(t, g), (0.3,), (1.0,))
    exact = gumbel_softmax_interpolant(jnp.array(2), 0.3, g, velocity="exact", **options)
    close(exact.velocity, slope, 1e-12)
    check_grads(point, (0.3, g), 1)
    for kind in ("exact", "noise_free"):  # they agree without noise
        u = gumbel_softmax_interpolant(jnp.array(2), 0.3, 0 * g, velocity=kind, **options).velocity
        close(u, jax.jvp(lambda t: point(t, 0 * g), (0.3,), (1.0,))[1], 1e-12)


def test_interpolant_rows_times_dtypes_and_bad_ids():
    ids, times = jnp.array([1, 3, 9]), jnp.array([0.1, 0.9, 0.5])
    noise = jnp.stack([G, 2 * G, G])
    x, u = jax.jit(gumbel_softmax_interpolant)(ids, times, noise)
    for i in range(2):
        alone = gumbel_softmax_interpolant(ids[i], times[i], noise[i])
        close(x[i], alone.point, 1e-7)
        close(u[i], alone.velocity, 1e-6)
    assert jnp.all(jnp.isnan(x[2])) and jnp.all(jnp.isnan(u[2])) and not jnp.any(jnp.isnan(x[:2]))
    assert gumbel_softmax_interpolant(ids, times, noise.astype(jnp.float16)).point.dtype == jnp.float16


def test_schedule():
    tau = exponential_temperature_schedule(1.0, 0.01, 100)
    close([tau(t) for t in (0, 25, 50, 100, 1000)], [1, 10**-0.5, 0.1, 0.01, 0.01])
    up = exponential_temperature_schedule(0.5, 2.0, 4)
    close([jax.jit(up)(t) for t in (0, 2, 4, 5)], [0.5, 1, 2, 2])


def test_bad_input():
    with pytest.raises(TypeError, match="logits must be an array of floating dtype"):
        gumbel_sigmoid(jnp.arange(3), key=KEY)
    with pytest.raises(ValueError, match=r"temperature must be a number > 0, got -1\.0"):
        gumbel_sigmoid(X, key=KEY, temperature=-1.0)
    with pytest.raises(ValueError, match=r"where must broadcast to shape \(4,\)"):
        gumbel_sigmoid(X, key=KEY, where=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="where must be a boolean array"):
        straight_through_one_hot(X, where=jnp.ones(4))
    with pytest.raises(ValueError, match=r"ids must have shape \(\)"):
        gumbel_softmax_interpolant(jnp.array([1]), 0.5, G)
    with pytest.raises(TypeError, match="ids must be an array of integer dtype"):
        gumbel_softmax_interpolant(jnp.array(1.0), 0.5, G)
    with pytest.raises(ValueError, match="velocity must be one of"):
        gumbel_softmax_interpolant(jnp.array(1), 0.5, G, velocity="conditional")
    with pytest.raises(ValueError, match="beta must be a number > 0"):
        gumbel_softmax_interpolant(jnp.array(1), 0.5, G, beta=0)
    with pytest.raises(ValueError, match="steps must be a static integer >= 1"):
        exponential_temperature_schedule(1.0, 0.1, 0)
    with pytest.raises(ValueError, match="final must be a number > 0"):
        exponential_temperature_schedule(1.0, 0.0, 10)


def test_float64_stays_float64():
    with float64():
        assert gumbel_sigmoid(jnp.ones(2, jnp.float64), key=KEY).dtype == jnp.float64
