"""SPAM and Stable-SPAM: worked numbers, oracles, laws between the parts, invariances, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, torch_trajectory, trajectory

from jaxsoft import optimizers as o

THETA = (1.0, -2.0)
GRADS = ((0.5, 1.0), (-0.25, 4.0), (0.1, -0.2), (0.3, 0.3), (-0.2, 0.1), (1.0, -1.0))


def worked(tx, steps=6, **kwargs):
    with jax.enable_x64(True):
        return np.asarray(trajectory(tx, jnp.array(THETA), jnp.array(GRADS[:steps]), **kwargs))


def random_problem(steps=100, size=23, spikes=True):
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((steps, size))
    if spikes:
        grads[rng.random(grads.shape) < 0.01] *= 1e3
    return rng.standard_normal(size), grads


# SPAM.


def test_spam_worked_example_without_reset():
    out = worked(o.spam(0.1, threshold=50.0, clip_start=2), steps=3, decay_after=0.01)
    expected = [
        [0.891006260914, -2.078996869444],
        [0.833447338762, -2.139023616184],
        [0.776079158632, -2.166819678944],
    ]
    close(out, expected, 1e-11)


def test_spam_worked_example_with_resets():
    tx = o.spam(0.1, threshold=50.0, clip_start=1, reset_every=3, warmup_steps=2)
    out = worked(tx, decay_after=0.01)
    expected = [
        [0.99, -1.98],
        [0.9801, -1.9602],
        [0.969666774464, -1.939965674516],
        [0.943722962169, -1.910783988677],
        [0.894028167006, -1.872130045168],
        [0.884571005037, -1.852891864417],
    ]
    close(out, expected, 1e-11)


def test_spam_decays_like_adamw():
    """The ready optimizer decays the old parameters, not the new ones."""
    out = worked(o.spam(0.1, weight_decay=0.1), steps=1)
    plain = worked(o.spam(0.1), steps=1)
    np.testing.assert_allclose(out, plain - 0.01 * np.array(THETA), rtol=1e-12)


@pytest.mark.parametrize("threshold", [5000, 30, 0])
def test_spam_equals_pytorch_optimizer(threshold):
    start, grads = random_problem()
    make = lambda po, params: po.SPAM(
        params, lr=0.01, threshold=threshold, grad_accu_steps=7, update_proj_gap=1000, weight_decay=0.0
    )
    theirs = torch_trajectory(make, start, grads)
    with jax.enable_x64(True):
        tx = o.spam(0.01, threshold=threshold, clip_start=7, reset_every=1000)
        ours = trajectory(tx, jnp.asarray(start), jnp.asarray(grads))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)


def numpy_spam(theta, grads, lr, b1, b2, eps, threshold, reset_every, warmup_steps, clip_start):
    """The published loop, with its counters, step by step."""
    m, v, cycle, out = np.zeros_like(theta), np.zeros_like(theta), warmup_steps + 1, []
    for t, g in enumerate(grads, start=1):
        drop = 0.99 * (1 + np.cos(np.pi * cycle / (warmup_steps + 1))) / 2 if cycle < warmup_steps else 0.0
        if t % reset_every == 0:
            m, v = np.zeros_like(theta), np.zeros_like(theta)
        if threshold != 0 and t >= clip_start and t % reset_every >= clip_start:
            g = np.where(g * g > threshold * v, np.sign(g) * np.sqrt(threshold * v), g)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = np.sqrt(1 - b2**t) / (1 - b1**t)
        theta = theta - lr * (1 - drop) * step * m / (np.sqrt(v) + eps)
        cycle += 1
        if (t + 1) % reset_every == 0:
            cycle = 0
        out.append(theta)
    return np.stack(out)


@pytest.mark.parametrize(("reset_every", "warmup_steps", "clip_start"), [(17, 5, 3), (9, 20, 2), (1, 0, 0)])
def test_spam_follows_the_published_loop(reset_every, warmup_steps, clip_start):
    start, grads = random_problem()
    kwargs = dict(reset_every=reset_every, warmup_steps=warmup_steps, clip_start=clip_start, threshold=30.0)
    expected = numpy_spam(start, grads, 0.01, 0.9, 0.999, 1e-6, **kwargs)
    with jax.enable_x64(True):
        ours = trajectory(o.spam(0.01, **kwargs), jnp.asarray(start), jnp.asarray(grads))
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_spam_in_float32_is_accurate_from_the_first_step():
    start, grads = random_problem()
    with jax.enable_x64(True):
        exact = np.asarray(trajectory(o.spam(0.01), jnp.asarray(start), jnp.asarray(grads)))
    ours = trajectory(o.spam(0.01), jnp.asarray(start, jnp.float32), jnp.asarray(grads, jnp.float32))
    np.testing.assert_allclose(ours, exact, atol=2e-6)


# The parts.


def test_spike_clip_is_the_clipping_of_spam():
    """Without resets, SPAM is its clipping followed by an unclipped SPAM."""
    start, grads = random_problem()
    with jax.enable_x64(True):
        clip = o.spike_clip_by_second_moment(30.0, clip_start=4)
        composed = optax.chain(clip, o.spam(0.01, threshold=0.0, reset_every=1000))
        whole = o.spam(0.01, threshold=30.0, clip_start=4, reset_every=1000)
        args = jnp.asarray(start), jnp.asarray(grads)
        np.testing.assert_allclose(trajectory(composed, *args), trajectory(whole, *args), rtol=1e-9)


def test_spike_clip_bounds_and_keeps_signs():
    rng = np.random.default_rng(0)
    tx = o.spike_clip_by_second_moment(threshold=25.0, b2=0.9, clip_start=2)
    state = tx.init(jnp.zeros(50))
    for step in range(20):
        g = jnp.asarray(rng.standard_normal(50) * np.where(rng.random(50) < 0.2, 1e9, 1.0), jnp.float32)
        nu = state.nu
        u, state = tx.update(g, state)
        if step >= 1:
            expected = np.where(g * g > 25 * nu, np.sign(g) * np.sqrt(25 * nu), g)
            np.testing.assert_allclose(u, expected, rtol=1e-5)
            np.testing.assert_allclose(state.nu, 0.9 * nu + 0.1 * expected**2, rtol=1e-5)
        else:
            np.testing.assert_array_equal(u, g)


@pytest.mark.parametrize("threshold", [0.0, np.inf])
def test_spike_clip_turned_off(threshold):
    tx = o.spike_clip_by_second_moment(threshold, clip_start=0)
    g = jnp.array([1.0, -1e30, 0.0])
    u, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(u, g)


def test_adaptive_spike_clip_keeps_ratios_of_the_clipped():
    tx = o.adaptive_spike_clip(0.5)
    _, state = tx.update(jnp.array([1.0, 0.0, 0.0]), tx.init(jnp.zeros(3)))
    u, state = tx.update(jnp.array([0.5, 6.0, -7.0]), state)
    # M = 0.5 * 0.5 + 0.5 * 7 = 3.75, corrected by 0.75: the bound is 5.
    np.testing.assert_allclose(u, [0.5, 6 * 5 / 7, -5.0], rtol=1e-6)
    np.testing.assert_allclose(state.peak_mean, 3.75)


def test_adaptive_spike_clip_leaves_an_entry_at_the_bound():
    tx = o.adaptive_spike_clip(0.0)
    u, _ = tx.update(jnp.array([-3.0, 2.0]), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(u, [-3.0, 2.0])
    tx = o.adaptive_spike_clip(0.5)
    _, state = tx.update(jnp.array([1.0, 0.0]), tx.init(jnp.zeros(2)))  # M = 1/2
    u, _ = tx.update(jnp.array([5.5, 4.0]), state)  # M = 3, bound 4
    np.testing.assert_allclose(u, [4.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (4, 5)])
def test_statistics_of_any_shape(shape):
    for tx in (o.adaptive_spike_clip(), o.adaptive_gradient_norm(), o.scale_by_stable_spam()):
        g = jnp.ones(shape)
        u, state = tx.update(g, tx.init(g))
        assert u.shape == shape
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((u, state)))


def test_reset_is_a_fresh_start():
    """With `reset_counts` and no warm-up, Adam after a reset is a new Adam."""
    inner = optax.scale_by_adam()
    tx = o.momentum_reset(inner, reset_every=5, reset_counts=True)
    grads = jax.random.normal(jax.random.key(0), (9, 3))
    state, fresh = tx.init(grads[0]), inner.init(grads[0])
    for t, g in enumerate(grads, start=1):
        u, state = tx.update(g, state)
        if t == 5:
            fresh = inner.init(g)
        v, fresh = inner.update(g, fresh)
        chex.assert_trees_all_close((u, state.inner_state), (v, fresh), rtol=1e-6)


def test_reset_touches_moments_only():
    """Learning rates, counts and keys of the inner state stay."""
    inner = optax.chain(
        optax.masked(optax.scale_by_adam(), {"a": True, "b": False}),
        optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
        optax.add_noise(0.0, 0.5, 7),
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = o.momentum_reset(inner, reset_every=3, warmup_steps=0)
    state = tx.init(params)
    for _ in range(3):
        before = state.inner_state
        _, state = tx.update(params, state, params)
    adam, sgd, noise = state.inner_state
    np.testing.assert_allclose(adam.inner_state.mu["a"], 0.1)  # one gradient since the reset
    assert int(adam.inner_state.count) == 3
    np.testing.assert_allclose(sgd.hyperparams["learning_rate"], 0.1)
    np.testing.assert_allclose(sgd.inner_state[0].trace["b"], 1.0)
    assert int(noise.count) == 3 and np.any(jax.random.key_data(noise.rng_key))
    chex.assert_trees_all_equal_structs(before, state.inner_state)


def test_reset_warms_up():
    tx = o.momentum_reset(optax.identity(), reset_every=4, warmup_steps=2)
    state, factors = tx.init(jnp.ones(1)), []
    for _ in range(9):
        u, state = tx.update(jnp.ones(1), state)
        factors.append(float(u[0]))
    np.testing.assert_allclose(factors, [1, 1, 1, 0.01, 0.2575, 1, 1, 0.01, 0.2575], rtol=1e-6)


def test_reset_passes_extra_arguments_on():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda u, s, p=None, *, value, **extra: (value * u, s)
    )
    tx = o.momentum_reset(inner)
    np.testing.assert_allclose(tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=3.0)[0], 3.0)


# Stable-SPAM.


def test_stable_spam_worked_example():
    out = worked(o.stable_spam(0.1, weight_decay=0.1), steps=3)
    expected = [
        [0.890000002236, -2.079999998882],
        [0.831482828763, -2.159331626632],
        [0.754788840804, -2.178731441204],
    ]
    close(out, expected, 1e-11)


def test_stable_spam_worked_parts():
    """The bound, the clipped norm and the normalized gradient of each step."""
    with jax.enable_x64(True):
        clip, norm = o.adaptive_spike_clip(), o.adaptive_gradient_norm()
        params = jnp.array(THETA)
        clip_state, norm_state = clip.init(params), norm.init(params)
        expected = [
            (1.0, [0.4472135915, 0.894427183]),
            (2.50075038, [-0.097449847, 0.974790966]),
            (1.73306616, [0.327518451, -0.655036902]),
        ]
        for t, (g, (bound, normalized)) in enumerate(zip(GRADS, expected), start=1):
            clipped, clip_state = clip.update(jnp.array(g), clip_state)
            out, norm_state = norm.update(clipped, norm_state)
            np.testing.assert_allclose(clip_state.peak_mean / (1 - 0.999**t), bound, atol=5e-9)
            np.testing.assert_allclose(out, normalized, atol=5e-9)


def test_stable_spam_worked_example_with_resets():
    out = worked(o.stable_spam(0.1, weight_decay=0.1, reset_every=3))
    expected = [
        [0.723168003528, -2.037738311893],
        [0.616394520212, -2.004763062569],
        [0.593622260265, -1.993902432591],
        [0.487686039598, -1.87396341020],
    ]
    close(out[2:], expected, 1e-10)


def test_stable_spam_worked_example_with_total_steps():
    out = worked(o.stable_spam(0.1, weight_decay=0.1, total_steps=10), steps=3)
    expected = [
        [0.890000002236, -2.079999998882],
        [0.845605256207, -2.150681706127],
        [0.78283176878, -2.149329553602],
    ]
    close(out, expected, 1e-11)


def test_stable_spam_the_last_step_still_has_the_factor_of_the_cosine():
    out = worked(o.stable_spam(0.1, weight_decay=0.1, total_steps=3), steps=3)
    close(out[2], [0.81740719, -2.12113625], 1e-8)


@pytest.mark.parametrize("gap", [1000, 13])
def test_stable_spam_equals_pytorch_optimizer(gap):
    start, grads = random_problem()
    make = lambda po, params: po.StableSPAM(params, lr=0.01, weight_decay=0.1, update_proj_gap=gap)
    theirs = torch_trajectory(make, start, grads)
    with jax.enable_x64(True):
        tx = o.stable_spam(0.01, weight_decay=0.1, reset_every=gap)
        ours = trajectory(tx, jnp.asarray(start), jnp.asarray(grads))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("every", [1000, 7])
def test_stable_spam_is_the_chain_of_its_parts(every):
    start, grads = random_problem()
    chain = optax.chain(
        o.adaptive_spike_clip(),
        o.adaptive_gradient_norm(),
        o.momentum_reset(optax.scale_by_adam(), every, reset_counts=True),
        optax.scale(-0.01),
    )
    whole = optax.chain(o.scale_by_stable_spam(reset_every=every), optax.scale(-0.01))
    with jax.enable_x64(True):
        args = jnp.asarray(start), jnp.asarray(grads)
        np.testing.assert_allclose(trajectory(whole, *args), trajectory(chain, *args), rtol=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(o.stable_spam, 0.01, eps=1e-30, reset_every=30),
        functools.partial(o.stable_spam, 0.01, eps=1e-30, total_steps=60),
        lambda: optax.chain(o.adaptive_gradient_norm(eps=1e-30), optax.sgd(0.01)),
    ],
)
def test_trajectory_does_not_depend_on_the_scale_of_the_gradients(factory, scale):
    start, grads = random_problem(steps=60)
    params, grads = jnp.asarray(start, jnp.float32), jnp.asarray(grads, jnp.float32)
    np.testing.assert_allclose(
        trajectory(factory(), params, scale * grads), trajectory(factory(), params, grads), atol=2e-5
    )


def test_normalized_gradients_have_a_norm_around_one():
    tx = o.adaptive_gradient_norm()
    state = tx.init(jnp.zeros(100))
    for step in range(50):
        g = 1e3 * jax.random.normal(jax.random.key(step), (100,))
        u, state = tx.update(g, state)
        assert 0.8 < float(jnp.linalg.norm(u)) < 1.2
        np.testing.assert_allclose(u / jnp.linalg.norm(u), g / jnp.linalg.norm(g), atol=1e-6)


def test_gamma1_none_is_b1():
    start, grads = random_problem(steps=10)
    args = jnp.asarray(start, jnp.float32), jnp.asarray(grads, jnp.float32)
    np.testing.assert_array_equal(
        trajectory(o.stable_spam(0.1, gamma1=None), *args), trajectory(o.stable_spam(0.1, gamma1=0.9), *args)
    )


@pytest.mark.parametrize("factory", [o.spam, o.stable_spam])
def test_first_moment_in_bfloat16(factory):
    start, grads = random_problem(spikes=False)
    args = jnp.asarray(start, jnp.float32), jnp.asarray(grads, jnp.float32)
    low = trajectory(factory(0.01, mu_dtype=jnp.bfloat16), *args)
    np.testing.assert_allclose(low, trajectory(factory(0.01), *args), atol=0.01)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.spam(-1.0), ValueError, "learning_rate .* >= 0, got -1.0"),
        (lambda: o.spam(0.1, b1=1.0), ValueError, "b1 .* < 1, got 1.0"),
        (lambda: o.spam(0.1, b2=-0.1), ValueError, "b2 .* >= 0"),
        (lambda: o.spam(0.1, eps=-1.0), ValueError, "eps"),
        (lambda: o.spam(0.1, threshold=-5.0), ValueError, "threshold .* >= 0, got -5.0"),
        (lambda: o.spam(0.1, reset_every=0), ValueError, "reset_every .* >= 1, got 0"),
        (lambda: o.spam(0.1, reset_every=2.5), TypeError, "reset_every .* integer"),
        (lambda: o.spam(0.1, reset_every=jnp.array(2.5)), TypeError, "reset_every .* integer"),
        (lambda: o.spam(0.1, warmup_steps=-1), ValueError, "warmup_steps"),
        (lambda: o.spam(0.1, clip_start=-1), ValueError, "clip_start"),
        (lambda: o.spam(0.1, weight_decay=-0.1), ValueError, "weight_decay"),
        (lambda: o.spam(0.1, mu_dtype="letters"), TypeError, "mu_dtype"),
        (lambda: o.stable_spam(-1.0), ValueError, "learning_rate"),
        (lambda: o.stable_spam(0.1, gamma1=-1.0), ValueError, "gamma1 .* >= 0"),
        (lambda: o.stable_spam(0.1, gamma2=1.5), ValueError, "gamma2"),
        (lambda: o.stable_spam(0.1, gamma3=1.0), ValueError, "gamma3"),
        (lambda: o.stable_spam(0.1, total_steps=0), ValueError, "total_steps"),
        (lambda: o.stable_spam(0.1, eta_min=2.0), ValueError, "eta_min .* <= 1"),
        (lambda: o.stable_spam(0.1, reset_every=0), ValueError, "reset_every"),
        (lambda: o.spike_clip_by_second_moment(-1.0), ValueError, "threshold"),
        (lambda: o.adaptive_spike_clip(1.0), ValueError, "gamma3"),
        (lambda: o.adaptive_gradient_norm(gamma2=1.0), ValueError, "gamma2"),
        (lambda: o.adaptive_gradient_norm(eps=-1.0), ValueError, "eps"),
        (lambda: o.momentum_reset(optax.identity(), reset_every=0), ValueError, "reset_every .* >= 1, got 0"),
        (lambda: o.momentum_reset(optax.identity(), warmup_steps=-1), ValueError, "warmup_steps"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
