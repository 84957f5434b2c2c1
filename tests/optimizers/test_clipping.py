"""Clipping, spikes, the cautious mask, and sharpness: worked by hand, oracle, limits, invariances, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, temporary_bytes, torch_trajectory, trajectory

from jaxsoft import optimizers as o


def once(tx, g, params=None):
    return tx.update(g, tx.init(g if params is None else params), params)[0]


def outputs(tx, grads):
    """The updates of each step, for gradients that do not depend on the parameters."""
    step = lambda state, g: tx.update(g, state)[::-1]
    return jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads))(
        jnp.asarray(grads, jnp.float32)
    )


# By entry.


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("exact", [False, True])
def test_the_fraction_is_clipped_and_signs_are_kept(fraction, exact):
    g = jax.random.normal(jax.random.key(0), (7, 143)) ** 3
    u = once(o.clip_by_quantile(fraction, exact=exact), g)
    expected = np.quantile(np.abs(g), 1 - fraction)
    np.testing.assert_allclose(u, np.clip(g, -expected, expected), rtol=1e-6)
    assert abs(np.sum(np.asarray(u != g)) - fraction * 1001) <= 1
    np.testing.assert_array_equal(np.sign(u), np.sign(g))


def test_everything_clipped_is_a_sign_descent():
    g = jnp.array([3.0, -1.0, 0.5, -7.0])
    np.testing.assert_allclose(once(o.clip_by_quantile(1.0), g), 0.5 * jnp.sign(g))


def test_a_quantile_of_all_leaves():
    g = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0], [-10.0]]), "c": jnp.zeros((0, 2))}
    u = once(o.clip_by_quantile(0.5, per_leaf=False), g)
    chex.assert_trees_all_close(u, {"a": g["a"], "b": jnp.array([[2.5], [-2.5]]), "c": g["c"]})


@pytest.mark.parametrize("shape", [(1 << 18,), (512, 512), (3, 65536)])
def test_a_sample_of_a_large_leaf_sees_all_rows_and_columns(shape):
    """With entries that grow along each axis in turn: a sample of single columns would be far off."""
    noise = jax.random.uniform(jax.random.key(0), shape)
    for axis in range(len(shape)):
        ramp = jnp.linspace(0, 1, shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        g = ramp + 0.01 * noise
        clipped = jnp.mean(once(o.clip_by_quantile(0.1), g) != g)
        assert abs(clipped - 0.1) < (0.005 if shape[axis] > 3 else 0.02)


def test_an_infinite_entry_is_clipped_and_nan_is_not_hidden():
    g = jnp.arange(1.0, 21).at[7].set(-jnp.inf)
    u = once(o.clip_by_quantile(0.2), g)
    assert np.all(np.isfinite(u)) and u[7] == u.min() < -10
    assert np.isnan(once(o.clip_by_quantile(0.2), g.at[0].set(jnp.nan))[0])


# By norm.


def numpy_percentile_clipping(grads, percentile, window):
    history, out = [], []
    for g in grads:
        n = np.linalg.norm(g)
        history = [*history, n][-window:]
        out.append(g * min(1, np.percentile(history, percentile) / n))
    return np.stack(out)


@pytest.mark.parametrize(("percentile", "window"), [(10.0, 7), (50.0, 1), (90.0, 30), (0.0, 5), (100.0, 5)])
def test_percentile_of_the_history(percentile, window):
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((40, 3)) * np.exp(rng.standard_normal((40, 1)))
    _, u = outputs(o.clip_by_percentile(percentile, window), grads)
    np.testing.assert_allclose(u, numpy_percentile_clipping(grads, percentile, window), rtol=1e-5)
    if percentile == 100:
        np.testing.assert_allclose(u, grads, rtol=1e-6)


def test_percentile_clips_the_norm_of_all_leaves_and_ignores_what_is_not_finite():
    tx = o.clip_by_percentile(0.0, 4)
    g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = tx.update(g, tx.init(g))
    u, nan_state = tx.update({"a": jnp.array([jnp.nan]), "b": jnp.array([1.0])}, state)
    assert np.isnan(u["a"][0])
    chex.assert_trees_all_equal(nan_state, state)
    u, _ = tx.update({"a": jnp.array([30.0]), "b": jnp.array([40.0])}, nan_state)
    chex.assert_trees_all_close(u, g, rtol=1e-6)


def test_percentile_under_inject_hyperparams():
    tx = optax.inject_hyperparams(o.clip_by_percentile, static_args=("window",))(50.0, window=3)
    grads = [[1.0], [3.0], [100.0], [2.0]]
    np.testing.assert_allclose(
        outputs(tx, grads)[1], outputs(o.clip_by_percentile(50.0, 3), grads)[1], rtol=1e-6
    )


# Whole steps.


def test_moments_are_weighted_means():
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((30, 4))
    state, u = outputs(o.spike_statistics(decay=0.8), grads)
    np.testing.assert_array_equal(u, np.asarray(grads, np.float32))
    norms, weights = np.linalg.norm(grads, axis=1), 0.8 ** np.arange(29, -1, -1)
    mean = np.average(norms, weights=weights)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.variance, np.average((norms - mean) ** 2, weights=weights), rtol=1e-4)
    assert (int(state.count), int(state.spike_count), int(state.last_spike_count)) == (30, 0, 0)


def test_counts():
    tx = o.spike_statistics(warmup_steps=3)
    state, log = tx.init(jnp.zeros(1)), []
    for g in (1.0, 100.0, 1.0, 1e4, np.nan, 1.0, np.inf, 1.5):
        _, state = tx.update(jnp.array([g]), state)
        log.append((int(state.spike_count), int(state.consecutive_count), int(state.last_spike_count)))
    assert log == [(0, 0, 0), (0, 0, 0), (0, 0, 0), (1, 1, 4), (2, 2, 5), (2, 0, 5), (3, 1, 7), (3, 0, 7)]
    assert np.isfinite(state.mean) and np.isfinite(state.variance)


def test_statistics_are_found_in_a_chain():
    tx = optax.chain(o.spike_statistics(), optax.adam(0.1))
    _, state = tx.update(jnp.array([np.nan]), tx.init(jnp.zeros(1)))
    assert int(optax.tree.get(state, "spike_count")) == 1


def test_a_skipped_step_never_happened():
    """Parameters and inner state are those of a run without the spiked batches."""
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((40, 3))
    spiked = grads.copy()
    spiked[[20, 31, 32]] *= np.array([[1e6], [np.nan], [np.inf]])
    state, u = outputs(o.skip_spikes(optax.adam(0.1)), spiked)
    np.testing.assert_array_equal(u[jnp.array([20, 31, 32])], 0)
    kept = np.delete(np.arange(40), [20, 31, 32])
    inner_state, inner_u = outputs(optax.adam(0.1), grads[kept])
    np.testing.assert_allclose(u[kept], inner_u, rtol=1e-5)
    chex.assert_trees_all_close(state.inner_state, inner_state, rtol=1e-5)
    assert int(state.statistics.spike_count) == 3 and int(state.statistics.consecutive_count) == 0


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_lasting_growth_is_let_through(noise):
    rng = np.random.default_rng(0)
    size = np.where(np.arange(300) < 100, 1.0, 1e3)
    norms = size * (1 + noise * rng.standard_normal(300))
    state, u = outputs(o.skip_spikes(optax.identity()), norms[:, None])
    skipped = np.flatnonzero(np.asarray(u[:, 0]) == 0)
    assert skipped.min() == 100 and 1 < len(skipped) < 100
    np.testing.assert_array_equal(skipped, np.arange(100, 100 + len(skipped)))
    assert int(state.statistics.consecutive_count) == 0


def test_first_gradients_after_zeros_are_no_spikes():
    _, u = outputs(o.skip_spikes(optax.identity()), np.r_[np.zeros(20), 1, 1][:, None])
    np.testing.assert_array_equal(u[20:], 1)


def test_skip_spikes_passes_extra_arguments_on():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda u, s, p=None, *, value, **extra: (value * u, s)
    )
    for tx in (o.skip_spikes(inner), o.cautious(inner, ready=False)):
        np.testing.assert_allclose(tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=3.0)[0], 3.0)


# Cautious.


@pytest.mark.parametrize("normalization", ["mean", "count"])
def test_cautious_by_hand(normalization):
    u = jnp.array([1.0, -2.0, 3.0, 0.0, 5.0])
    g = jnp.array([1e-30, -1e-30, -1.0, 1.0, 0.0])  # the products underflow in float32
    tx = o.cautious(optax.stateless(lambda updates, params: u), ready=False, normalization=normalization)
    scale = 5 / 2 if normalization == "mean" else 5 / 3
    np.testing.assert_allclose(once(tx, g), scale * np.array([1.0, -2.0, 0, 0, 0]), rtol=1e-6)


def test_cautious_limits():
    g = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(once(o.cautious(optax.identity(), ready=False), g), g)  # all agree
    np.testing.assert_array_equal(once(o.cautious(optax.scale(-1.0), ready=False), g), 0)  # none does
    few = jnp.ones(5000).at[1:].set(-1.0)
    tx = o.cautious(optax.stateless(lambda u, p: jnp.ones(5000)), ready=False)
    np.testing.assert_allclose(once(tx, few)[:2], [1000.0, 0.0])  # eps
    assert np.isnan(once(o.cautious(optax.identity(), ready=False), g.at[0].set(jnp.nan))[0])


def test_cautious_adam_never_points_uphill_and_keeps_the_inner_state():
    grads = np.random.default_rng(0).standard_normal((50, 6))
    state, u = outputs(o.cautious(optax.scale_by_adam(), ready=False), grads)
    inner_state, v = outputs(optax.scale_by_adam(), grads)
    chex.assert_trees_all_close(state, inner_state, rtol=1e-6)
    mask = np.asarray(v) * grads > 0
    assert 0.2 < mask.mean() < 0.9
    expected = v * mask / np.maximum(mask.mean(1, keepdims=True), 1e-3)
    np.testing.assert_allclose(u, expected, rtol=1e-5)


@pytest.mark.parametrize("decay", [False, True])
def test_cautious_equals_pytorch_optimizer(decay):
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(13), rng.standard_normal((100, 13))
    weight_decay = 0.1 if decay else 0.0
    make = lambda po, params: po.Lion(params, lr=0.01, cautious=True, weight_decay=weight_decay)
    theirs = torch_trajectory(make, start, grads)
    tx = optax.chain(
        o.cautious(o.scale_by_lion_k(), ready=False, normalization="count"),
        optax.add_decayed_weights(weight_decay),
        optax.scale(-0.01),
    )
    with jax.enable_x64(True):
        ours = trajectory(tx, jnp.asarray(start), jnp.asarray(grads))
    close(ours, theirs, 1e-12)


def test_cautious_stores_nothing():
    tx = optax.chain(o.cautious(optax.trace(0.9), ready=False), optax.sgd(1e-2))
    params = jnp.ones(1_000_000)
    assert temporary_bytes(tx, params) <= 0.01 * params.nbytes


# Sharpness.


@pytest.mark.parametrize(
    ("v", "expected"), [([0.6, 0.8], 3.4), ([6.0, 8.0], 3.4), ([1.0, 1.0], 3.0), ([0.0, 0.0], 0.0)]
)
def test_sharpness_of_a_quadratic(v, expected):
    hessian = jnp.array([[1.0, 0.5], [0.5, 4.0]])
    loss = lambda p: 0.5 * p["x"] @ hessian @ p["x"] + jnp.sum(p["x"])
    out = o.directional_sharpness(loss, {"x": jnp.array([3.0, -1.0])}, {"x": jnp.array(v)})
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_sharpness_is_that_of_the_hessian():
    loss = lambda p: jnp.sum(p["a"] ** 2 * jnp.sin(p["b"]))
    a, b = jax.random.normal(jax.random.key(0), (2, 3))
    p, v = {"a": a, "b": b}, {"a": b, "b": a}

    @jax.jit
    def both(p, v):
        h = jax.hessian(loss)(p)
        square = jnp.vdot(b, b) + jnp.vdot(a, a)
        return o.directional_sharpness(loss, p, v), sum(v[i] @ h[i][j] @ v[j] for i in v for j in v) / square

    ours, expected = both(p, v)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
    out = o.directional_sharpness(loss, low, v)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=0.1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.clip_by_quantile(1.5), ValueError, "fraction .* <= 1, got 1.5"),
        (lambda: o.clip_by_quantile(0.1, per_leaf=1), TypeError, "per_leaf must be True or False"),
        (lambda: o.clip_by_quantile(0.1, exact=None), TypeError, "exact must be True or False"),
        (lambda: o.clip_by_percentile(101.0), ValueError, "percentile .* <= 100, got 101.0"),
        (lambda: o.clip_by_percentile(5.0, 0), ValueError, "window .* >= 1, got 0"),
        (lambda: o.clip_by_percentile(5.0, 2.5), TypeError, "window .* static integer"),
        (lambda: o.spike_statistics(-1.0), ValueError, "z .* >= 0, got -1.0"),
        (lambda: o.spike_statistics(decay=1.0), ValueError, "decay .* < 1, got 1.0"),
        (lambda: o.spike_statistics(min_ratio=0.5), ValueError, "min_ratio .* >= 1, got 0.5"),
        (lambda: o.spike_statistics(warmup_steps=0), ValueError, "warmup_steps .* >= 1, got 0"),
        (lambda: o.skip_spikes(optax.identity(), z=-1.0), ValueError, "z .* >= 0"),
        (lambda: o.cautious(optax.identity()), TypeError, "missing .* 'ready'"),
        (lambda: o.cautious(optax.identity(), ready=0), TypeError, "ready must be True or False"),
        (lambda: o.cautious(optax.identity(), ready=False, eps=0.0), ValueError, "eps .* > 0, got 0.0"),
        (
            lambda: o.cautious(optax.identity(), ready=False, normalization="sum"),
            ValueError,
            "normalization .* got 'sum'",
        ),
        (
            lambda: o.directional_sharpness(1.0, jnp.ones(2), jnp.ones(2)),
            TypeError,
            "loss_fn must be a function",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
