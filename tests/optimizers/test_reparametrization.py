"""Straight-through thresholds, stable recurrent weights and SoftHebb: worked numbers, gradients, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsoft import optimizers as o

W = [0.5, -0.2, 0.05, 1.0]


def test_soft_threshold_worked_example(x64):
    w = jnp.array(W)
    np.testing.assert_allclose(o.soft_threshold_ste(w, 0.25), [0.25, 0, 0, 0.75], atol=1e-12)
    rescaled = o.soft_threshold_ste(w, 0.25, rescale_axis=0)
    np.testing.assert_allclose(rescaled, [0.291186, 0, 0, 0.873558], atol=1e-5)  # there without the 1e-6
    share = (1.5 / 4 + 1e-6) / (1.75 / 4 + 1e-6)
    np.testing.assert_allclose(rescaled, np.array([0.25, 0, 0, 0.75]) * 1.01 / (share + 0.01), rtol=1e-12)


@pytest.mark.parametrize("rescale_axis", [None, 0, (0, 1)])
def test_soft_threshold_passes_gradients_straight_through(rescale_axis):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    cotangent = jnp.arange(12.0).reshape(3, 4)
    f = lambda w: o.soft_threshold_ste(w, 0.5, rescale_axis=rescale_axis)
    out, pull = jax.vjp(f, w)
    np.testing.assert_array_equal(pull(cotangent)[0], cotangent)
    np.testing.assert_array_equal(jax.jvp(f, (w,), (cotangent,))[1], cotangent)
    assert 0 < float(jnp.mean(out == 0)) < 1
    np.testing.assert_array_equal(jax.grad(lambda t: jnp.sum(o.soft_threshold_ste(w, t)))(0.5), 0.0)


def test_soft_threshold_rescales_each_output_and_takes_a_threshold_for_each():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)), jnp.float32)
    thresholds = jnp.array([[0.1, 1.0]])
    whole = o.soft_threshold_ste(w, thresholds, rescale_axis=0)
    for j in range(2):
        column = o.soft_threshold_ste(w[:, j], thresholds[0, j], rescale_axis=0)
        np.testing.assert_allclose(whole[:, j], column, rtol=1e-6)
    np.testing.assert_allclose(o.soft_threshold_ste(w, 0.0, rescale_axis=0), w, rtol=1e-6)
    assert o.soft_threshold_ste(w.astype(jnp.bfloat16), 0.1).dtype == jnp.bfloat16


def test_pruned_entries_come_back():
    """A straight-through gradient revives an entry that a plain soft threshold has lost."""
    goal = jnp.array([1.0, -2.0, 0.0])
    w, tx = jnp.array([0.01, -0.01, 0.5]), optax.sgd(0.1)
    loss = lambda w: jnp.sum((o.soft_threshold_ste(w, 0.1) - goal) ** 2)
    state = tx.init(w)
    step = jax.jit(lambda w, state: tx.update(jax.grad(loss)(w), state))
    for _ in range(100):
        updates, state = step(w, state)
        w = w + updates
    np.testing.assert_allclose(o.soft_threshold_ste(w, 0.1), goal, atol=1e-3)


def test_stable_recurrent_weight_worked_example(x64):
    w = jnp.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(o.stable_recurrent_weight(w, "exp"), [-0.367879, -1, -7.389056], atol=5e-7)
    np.testing.assert_allclose(
        o.stable_recurrent_weight(w, "softplus"), [-0.313262, -0.693147, -2.126928], atol=5e-7
    )
    np.testing.assert_allclose(o.stable_recurrent_weight(w), [-0.666667, -2, -0.222222], atol=5e-7)


@pytest.mark.parametrize("kind", ["exp", "softplus", "inverse"])
def test_stable_recurrent_weight_is_negative_with_finite_gradients(kind):
    w = jnp.array([-30.0, -1.0, 0.0, 1.0, 30.0])
    assert bool(jnp.all(o.stable_recurrent_weight(w, kind) < 0))
    assert bool(jnp.all(jnp.isfinite(jax.grad(lambda w: jnp.sum(o.stable_recurrent_weight(w, kind)))(w))))
    assert o.stable_recurrent_weight(w.astype(jnp.bfloat16), kind).dtype == jnp.bfloat16


def test_softhebb_worked_example(x64):
    w, x = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), jnp.array([0.6, 0.8])
    change = o.softhebb_update(w, x, learning_rate=0.1, temperature=0.5)
    np.testing.assert_allclose(change, [[0, -0.016959], [0, 0], [-0.018974, 0]], atol=5e-7)


def test_softhebb_averages_over_inputs(x64):
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.standard_normal((3, 4))), jnp.asarray(rng.standard_normal((2, 5, 4)))
    each = [o.softhebb_update(w, row, temperature=0.3) for row in x.reshape(10, 4)]
    np.testing.assert_allclose(o.softhebb_update(w, x, temperature=0.3), np.mean(each, axis=0), rtol=1e-9)


def test_softhebb_finds_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    x = centres[rng.integers(0, 3, 600)] + 0.1 * rng.standard_normal((600, 3))
    x = jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32).reshape(60, 10, 3)
    w = jnp.asarray(centres[[0, 1, 2]] * 0.3 + 0.4, jnp.float32)

    @jax.jit
    def train(w):
        step = lambda w, x: (w + o.softhebb_update(w, x, learning_rate=0.3, temperature=0.1), None)
        return jax.lax.scan(step, w, x)[0]

    w = train(w)
    np.testing.assert_allclose(jnp.linalg.norm(w, axis=-1), np.ones(3), atol=0.1)
    assert bool(jnp.all(jnp.sum(w * centres, axis=-1) > 0.97))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.soft_threshold_ste(jnp.ones(2), -0.1), ValueError, "threshold .* >= 0"),
        (lambda: o.soft_threshold_ste(jnp.ones(2), jnp.ones(3)), ValueError, "threshold must broadcast"),
        (lambda: o.soft_threshold_ste(jnp.ones(2, int), 0.1), TypeError, "weight must be"),
        (lambda: o.stable_recurrent_weight(jnp.ones(2), "tanh"), ValueError, "kind"),
        (lambda: o.stable_recurrent_weight(jnp.ones(2), b=0.0), ValueError, "b .* > 0"),
        (lambda: o.softhebb_update(jnp.ones(2), jnp.ones(2)), ValueError, "weight must have shape"),
        (lambda: o.softhebb_update(jnp.ones((3, 2)), jnp.ones(3)), ValueError, "inputs must have shape"),
        (
            lambda: o.softhebb_update(jnp.ones((3, 2)), jnp.ones(2), temperature=0.0),
            ValueError,
            "temperature",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
