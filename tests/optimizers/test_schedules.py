"""Refined schedule, record of gradient norms, momentum cycle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, descend

from jaxsoft import optimizers as o


def values(schedule, steps):
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


@pytest.mark.parametrize(
    ("norms", "power", "expected"),
    [
        ([4, 2, 1, 1, 2], 2, [0.125, 0.45, 1, 0.2, 0]),
        ([4, 2, 1, 1, 2], 1, [0.5, 0.8333333333333, 1, 0.3333333333333, 0]),
        ([5] * 5, 2, [1, 0.75, 0.5, 0.25, 0]),
        ([0, 1, 1], 2, [1, 0.5, 0]),  # a norm of 0 counts as the smallest other
        ([1e200, 1e200, 1e-200, 1e-200], 2, [0, 0, 1, 0]),
    ],
)
def test_refined_worked_examples(x64, norms, power, expected):
    schedule = o.refined_schedule(norms, 2.0, power=power, filter_fraction=0.0)
    close(values(schedule, len(norms)), 2 * np.array(expected), 1e-12)


def test_refined_constant_norm_is_linear_decay():
    schedule = o.refined_schedule(np.full(40, 3.0), 0.1)
    linear = optax.linear_schedule(0.1 * 40 / 39, 0.1 / 39, 39)  # the first value is the peak, the last is 0
    expected = 0.1 * (1 - np.arange(40) / 39)
    np.testing.assert_allclose(values(schedule, 40), expected, atol=1e-7)
    assert np.abs(values(linear, 40) - expected).max() < 0.1 / 38


def test_refined_filter_is_a_running_median(x64):
    """Against scipy: nearest on the left and reflected on the right."""
    ndimage = pytest.importorskip("scipy.ndimage")
    norms = np.random.default_rng(0).gamma(3.0, size=50)
    half, width = 5, 11
    padded = np.concatenate([np.full(2 * width, norms[0]), norms, norms[: -2 * width - 1 : -1]])
    smooth = ndimage.median_filter(padded, size=width)[2 * width : -2 * width]
    assert half == int(0.1 * 50)
    filtered = o.refined_schedule(norms, 1.0)
    plain = o.refined_schedule(smooth, 1.0, filter_fraction=0.0)
    np.testing.assert_allclose(values(filtered, 50), values(plain, 50), rtol=1e-12)
    # one spike leaves no trace
    spiked = np.ones(50)
    spiked[20] = 1e9
    np.testing.assert_allclose(
        values(o.refined_schedule(spiked, 1.0), 50), 1 - np.arange(50) / 49, atol=1e-12
    )


def test_refined_stretches_to_another_length(x64):
    schedule = o.refined_schedule([4, 2, 1, 1, 2], 1.0, filter_fraction=0.0, steps=9)
    np.testing.assert_allclose(values(schedule, 11)[::2], [0.125, 0.45, 1, 0.2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(values(schedule, 9)[1::2], [0.2875, 0.725, 0.6, 0.1], atol=1e-12)


@pytest.mark.parametrize("ord", [1, 2])
def test_record_keeps_the_last_norms(ord):
    tx = o.record_gradient_norm(3, ord)
    gradients = [{"a": jnp.array([3.0, -4.0]) * t, "b": None, "c": jnp.array(-12.0) * t} for t in range(5)]
    state, update = tx.init(gradients[0]), jax.jit(tx.update)
    for g in gradients:
        u, state = update(g, state)
        assert u["c"] == g["c"]
    norm = 19 if ord == 1 else 13
    np.testing.assert_allclose(state.norms_by_count, [3 * norm, 4 * norm, 2 * norm], rtol=1e-6)


def test_record_then_refine_and_train():
    """The whole recipe: a run that records, a schedule from it, a second run that ends lower."""
    goal = jnp.array([1.0, -2.0, 3.0])
    noise = 0.3 * jax.random.normal(jax.random.key(0), (60, 3))

    def train(schedule):
        tx = optax.chain(o.record_gradient_norm(60), optax.sgd(schedule))
        return descend(tx, jnp.zeros(3), lambda p, z: p - goal + z, noise)

    p, state = jax.jit(functools.partial(train, 0.5))()
    schedule = o.refined_schedule(state[0].norms_by_count, 0.5)
    q, _ = jax.jit(functools.partial(train, schedule))()
    assert jnp.sum((q - goal) ** 2) < jnp.sum((p - goal) ** 2)


def test_record_has_a_derivative_at_zero():
    tx = o.record_gradient_norm(2)

    def f(x):
        updates, state = tx.update(x, tx.init(x))
        return jnp.sum(updates) + jnp.sum(state.norms_by_count)

    np.testing.assert_array_equal(jax.grad(f)(jnp.zeros(2)), 1)


def test_onecycle_momentum_mirrors_the_learning_rate():
    """Lowest where optax's linear cycle is highest; both linear in between."""
    momentum = values(o.onecycle_momentum_schedule(200), 220)
    rate = values(optax.linear_onecycle_schedule(200, 1.0), 220)
    assert momentum.argmin() == rate.argmax() == 60
    np.testing.assert_allclose(
        momentum[[0, 30, 60, 115, 170, 190, 219]], [0.95, 0.9, 0.85, 0.9, 0.95, 0.95, 0.95], rtol=1e-6
    )
    np.testing.assert_allclose(np.corrcoef(momentum[:170], rate[:170])[0, 1], -1, atol=1e-3)


def test_onecycle_momentum_drives_an_optimizer():
    tx = optax.inject_hyperparams(optax.sgd)(0.1, momentum=o.onecycle_momentum_schedule(10))
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)
    np.testing.assert_allclose(state.hyperparams["momentum"], 0.85, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.record_gradient_norm(0), ValueError, "steps .* >= 1"),
        (lambda: o.record_gradient_norm(3, 3), ValueError, "ord must be one of 1, 2"),
        (lambda: o.refined_schedule([1.0], 0.1), ValueError, "gradient_norms must be a vector"),
        (lambda: o.refined_schedule([[1.0, 2.0]], 0.1), ValueError, r"got shape \(1, 2\)"),
        (lambda: o.refined_schedule([1.0, np.nan], 0.1), ValueError, "gradient_norms must be finite"),
        (lambda: o.refined_schedule([1.0, -1.0], 0.1), ValueError, "gradient_norms"),
        (lambda: o.refined_schedule([0.0, 0.0], 0.1), ValueError, "not all 0"),
        (
            lambda: o.refined_schedule([0.0] * 9 + [1.0], 0.1, filter_fraction=0.3),
            ValueError,
            "running median",
        ),
        (lambda: o.refined_schedule([1.0, 2.0], -0.1), ValueError, "peak"),
        (lambda: o.refined_schedule([1.0, 2.0], 0.1, power=0.0), ValueError, "power"),
        (lambda: o.refined_schedule([1.0, 2.0], 0.1, filter_fraction=0.6), ValueError, "filter_fraction"),
        (lambda: o.refined_schedule([1.0, 2.0], 0.1, steps=1), ValueError, "steps"),
        (lambda: o.onecycle_momentum_schedule(0), ValueError, "transition_steps"),
        (lambda: o.onecycle_momentum_schedule(10, high=1.5), ValueError, "high"),
        (lambda: o.onecycle_momentum_schedule(10, low=-0.5), ValueError, "low"),
        (lambda: o.onecycle_momentum_schedule(10, pct_start=0.9), ValueError, "pct_final .* > 0.9"),
        (lambda: o.onecycle_momentum_schedule(10, pct_start=0.0), ValueError, "pct_start"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
