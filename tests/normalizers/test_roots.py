"""The thresholds of entmax: how many Newton steps they take, and derivatives of every order from one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.normalizers import sparse

ALPHAS = (1.001, 1.05, 1.25, 1.5, 1.7, 2.0)
MOST = dict(zip(ALPHAS, (3, 4, 5, 6, 7, 10)))  # measured: at most 2, 3, 4, 5, 6, 9


def test_number_of_newton_steps(monkeypatch):
    """Rows whose scores are nearly equal, spread, and far apart; a step is a pass over the scores in attention."""
    taken, newton = [], sparse._newton

    def counted(*args):
        jax.debug.callback(lambda: taken.append(1))
        return newton(*args)

    monkeypatch.setattr(sparse, "_newton", counted)
    x = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    for alpha in ALPHAS:
        for std in (0.1, 1, 30):
            taken.clear()
            y = jaxsoft.entmax(jnp.asarray(x * np.float32(std)), alpha=alpha)
            jax.effects_barrier()
            np.testing.assert_allclose(np.sum(y, -1), 1, rtol=1e-5)
            assert 0 < len(taken) <= MOST[alpha], (alpha, std, len(taken))


@pytest.mark.parametrize("alpha", [1.05, 1.5])
def test_third_derivative(alpha, x64):
    """Against finite differences of the second; away from the points where an entry enters the support."""
    x = jnp.array([0.3, 0.1, -0.2, 0.05])
    weights, v = jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.array([0.7, -0.1, 0.4, 1.0])

    def along(t):
        return jnp.sum(weights * jaxsoft.entmax(x + t * v, alpha=alpha) ** 2)

    second = jax.jit(jax.grad(jax.grad(along)))
    third = jax.jit(jax.grad(jax.grad(jax.grad(along))))(0.0)
    numeric = (second(1e-5) - second(-1e-5)) / 2e-5
    assert abs(numeric) > 0.01
    np.testing.assert_allclose(third, numeric, rtol=1e-6)


def test_a_row_of_nan_leaves_the_search_of_the_others_alone():
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    for f in (jaxsoft.entmax15, lambda x: jaxsoft.normalizers.entropy_target_softmax(x, entropy=1.5)):
        alone = f(jnp.asarray(x))
        x_nan = x.copy()
        x_nan[1, 3] = np.nan
        beside = f(jnp.asarray(x_nan))
        assert np.isnan(beside[1]).all()
        np.testing.assert_array_equal(beside[::2], alone[::2])


def test_a_target_out_of_reach_leaves_the_gradients_of_other_rows_alone(x64):
    """The search goes on for the row that has no root, long after the others have theirs."""
    x = np.random.default_rng(1).normal(size=(40, 12))
    w = np.random.default_rng(2).normal(size=12)
    gradient = jax.jit(
        jax.grad(lambda x: jnp.sum(w * jaxsoft.normalizers.entropy_target_softmax(x, entropy=1.0)))
    )
    alone = gradient(jnp.asarray(x))
    tied = x.copy()
    tied[7] = 0.5  # equal scores: the entropy is log(12) at any temperature
    beside = gradient(jnp.asarray(tied))
    others = np.arange(40) != 7
    assert np.min(np.max(np.abs(alone), axis=1)) > 1e-3
    np.testing.assert_allclose(np.asarray(beside)[others], np.asarray(alone)[others], rtol=1e-8, atol=1e-10)
    assert np.all(np.isfinite(beside[7]))
