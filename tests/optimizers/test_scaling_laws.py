"""Scaling laws: worked numbers, limits, the optimum against a search."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import optimizers as o


def test_worked_numbers():
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-7)
    close(o.power_law_loss(1e9, 2e10), 2.435431)
    run = o.critical_batch_size(3.0, batch_size=5e5, steps=1e5, tokens=5e10)
    expected = o.CriticalBatchSize(batch_size=1.069114e6, least_steps=3.186512e4, least_tokens=3.406744e10)
    close(run, expected)
    close(o.chinchilla_loss(1e9, 2e10), 2.530050)
    close(o.chinchilla_loss(1e9, 2e10, law="original"), 2.580048)
    close(o.chinchilla_optimal(1.2e20), (9.370898e8, 2.134267e10))
    close(o.chinchilla_optimal(1.2e20, law="original"), (7.002015e8, 2.856321e10))
    close(o.rectified_scaling_law(1e6, learned=1e4, factor=50, exponent=0.6, irreducible=0.8), 0.803576)
    close(o.precision_scaling_law(1e9, 2e10, bits=(4,), sensitivity=(2.67,)), 2.611846)
    close(o.precision_scaling_law(1e9, 2e10, bits=(16,), sensitivity=(2.67,)), 2.580349)


def test_optimum_is_the_lowest_loss_of_the_budget():
    law = o.ChinchillaLaw(1.5, 300.0, 900.0, 0.3, 0.4)
    params, tokens = o.chinchilla_optimal(1e21, law=law)
    np.testing.assert_allclose(6 * params * tokens, 1e21, rtol=1e-12)
    grid = params * np.logspace(-1, 1, 2001)
    losses = o.chinchilla_loss(grid, 1e21 / (6 * grid), law=law)
    assert np.argmin(losses) == 1000
    np.testing.assert_allclose(losses[1000], o.chinchilla_loss(params, tokens, law=law), rtol=1e-12)


def test_limits():
    np.testing.assert_allclose(o.power_law_loss(1e9, np.inf), (8.8e13 / 1e9) ** 0.076, rtol=1e-12)
    np.testing.assert_allclose(o.chinchilla_loss(np.inf, np.inf), 1.8172)
    np.testing.assert_allclose(o.rectified_scaling_law(1e6, learned=0, factor=2, exponent=0.5), 2e-3)
    full = o.chinchilla_loss(1e9, 2e10, law="original")
    assert o.precision_scaling_law(1e9, 2e10) == full
    high = o.precision_scaling_law(1e9, 2e10, bits=(1e3, np.inf), sensitivity=(2.0, 3.0))
    np.testing.assert_allclose(high, full, rtol=1e-12)
    two = o.precision_scaling_law(1e9, 2e10, bits=(4.0, 4.0), sensitivity=(2.67, 2.67))
    factor = (1 - np.exp(-4 / 2.67)) ** 2
    np.testing.assert_allclose(two, o.chinchilla_loss(1e9 * factor, 2e10, law="original"), rtol=1e-12)
    run = o.critical_batch_size(3.0, batch_size=1e30, steps=10.0)
    np.testing.assert_allclose(run.least_steps, 10.0)
    assert run.least_tokens is None


def test_arrays_broadcast():
    params, tokens = jnp.array([[1e8], [1e9]]), jnp.array([1e9, 1e10, 1e11])
    for law in (o.power_law_loss, o.chinchilla_loss, o.precision_scaling_law):
        losses = law(params, tokens)
        assert losses.shape == (2, 3)
        assert np.all(np.diff(losses, axis=0) < 0) and np.all(np.diff(losses, axis=1) < 0)
        np.testing.assert_allclose(losses[1, 2], law(1e9, 1e11), rtol=1e-5)
    bits = o.precision_scaling_law(1e9, 2e10, bits=(jnp.array([2.0, 4.0, 8.0]),), sensitivity=(2.67,))
    assert np.all(np.diff(bits) < 0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.power_law_loss(0, 1e9), ValueError, "params .* > 0"),
        (lambda: o.power_law_loss(1e9, 1e9, tokens_exponent=0.0), ValueError, "tokens_exponent"),
        (lambda: o.critical_batch_size(-1.0), ValueError, "loss .* > 0"),
        (lambda: o.critical_batch_size(3.0, steps=10.0), ValueError, "batch_size must be given with steps"),
        (lambda: o.chinchilla_loss(1e9, "many"), TypeError, "tokens"),
        (lambda: o.chinchilla_loss(1e9, 1e9, law="mine"), ValueError, "law must be one of"),
        (
            lambda: o.chinchilla_loss(1e9, 1e9, law=o.ChinchillaLaw(1, -1, 1, 1, 1)),
            ValueError,
            "law.params_factor",
        ),
        (lambda: o.chinchilla_optimal(0.0), ValueError, "compute"),
        (lambda: o.rectified_scaling_law(1e6, learned=-1, factor=1, exponent=1), ValueError, "learned"),
        (
            lambda: o.precision_scaling_law(1e9, 1e9, bits=(4,)),
            ValueError,
            "sensitivity must have one number",
        ),
        (lambda: o.precision_scaling_law(1e9, 1e9, bits=(0,), sensitivity=(1,)), ValueError, r"bits\[0\]"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
