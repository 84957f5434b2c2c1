"""Stochastic model building and the truncated model: worked numbers, oracles, properties, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close

from jaxsoft import optimizers as o


def quadratic(x):
    return 0.5 * (x[0] ** 2 + 10 * x[1] ** 2)


def trajectory(tx, loss, x, steps):
    def step(carry, _):
        x, state = carry
        value, grad = jax.value_and_grad(loss)(x)
        updates, state = tx.update(grad, state, x, value=value, value_fn=loss)
        return (x + updates, state), x + updates

    (_, state), out = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), None, steps))(x)
    return out, state


def published_step(g, h, rate, zeta):
    """The step of the model, with the inner products of the paper."""
    s, y = -rate * g, h - g
    ss, ys, yy, yg, gg, sg = s @ s, y @ s, y @ y, y @ g, g @ g, s @ g
    sigma = 0.5 * (np.sqrt(ss) * (np.sqrt(yy) + np.sqrt(gg) / zeta) - ys)
    det = (ys + 2 * sigma) ** 2 - ss * yy
    c_g = -ss / (2 * sigma)
    c_s = c_g / det * (-(ys + 2 * sigma) * yg + yy * sg)
    c_y = c_g / det * (-(ys + 2 * sigma) * sg + ss * yg)
    return c_s * s + c_g * g + c_y * y


# Stochastic model building.


def test_smb_worked_example(x64):
    out, state = trajectory(o.stochastic_model_building(0.5), quadratic, jnp.array([1.0, -2.0]), 3)
    expected = [
        [0.75227268076, -1.096282472916],
        [0.565914016964, -0.603112834537],
        [0.425721291644, -0.334033862759],
    ]
    close(out, expected, 1e-11)
    assert int(state.count) == int(state.model_count) == 3


@pytest.mark.parametrize("zeta", [0.99, 0.3])
def test_smb_step_is_the_published_one(x64, zeta):
    """Random gradients at both points, in two leaves: the six inner products cancel to the short form."""
    tx = o.stochastic_model_building(0.7, zeta=zeta)
    update = jax.jit(lambda g, h: tx.update(g, tx.init(g), g, value=0.0, value_fn=lambda x: fails(x, h))[0])
    # A loss with gradient h everywhere and a value that fails the test.
    fails = lambda x, h: 1e9 + sum(jax.tree.leaves(jax.tree.map(jnp.vdot, x, h)))
    rng = np.random.default_rng(0)
    for _ in range(100):
        g, h = ({"a": rng.standard_normal(4), "b": 3 * rng.standard_normal(2)} for _ in range(2))
        ours = update(g, h)
        for leaf in g:
            np.testing.assert_allclose(ours[leaf], published_step(g[leaf], h[leaf], 0.7, zeta), rtol=1e-9)
            assert ours[leaf] @ g[leaf] < 0


def test_smb_takes_the_plain_step_where_it_is_good_enough():
    out, state = trajectory(o.stochastic_model_building(0.05), quadratic, jnp.array([1.0, -2.0]), 4)
    sgd, _ = trajectory(optax.with_extra_args_support(optax.sgd(0.05)), quadratic, jnp.array([1.0, -2.0]), 4)
    np.testing.assert_allclose(out, sgd, rtol=1e-6)
    assert int(state.model_count) == 0 and int(state.count) == 4


def test_smb_computes_a_missing_value_and_follows_a_schedule():
    x, schedule = jnp.array([1.0, -2.0]), optax.linear_schedule(0.5, 0.1, 2)
    tx = o.stochastic_model_building(schedule)
    state = tx.init(x)
    for step in range(3):
        fixed = o.stochastic_model_building(float(schedule(step)))
        g = jax.grad(quadratic)(x)
        expected, _ = fixed.update(g, fixed.init(x), x, value=quadratic(x), value_fn=quadratic)
        updates, state = tx.update(g, state, x, value_fn=quadratic)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)
        x = x + updates


def test_smb_finds_the_minimum_with_learning_rates_that_diverge_for_sgd():
    for rate in (0.25, 1.0, 3.0):
        out, _ = trajectory(o.stochastic_model_building(rate), quadratic, jnp.array([1.0, -2.0]), 200)
        np.testing.assert_allclose(out[-1], [0.0, 0.0], atol=1e-3)


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_smb_does_not_depend_on_the_scale_of_the_loss(scale):
    """Fourth powers of gradients this small or large do not fit in float32; the short form has none."""
    x = jnp.array([1.0, -2.0])
    plain, _ = trajectory(o.stochastic_model_building(0.5), quadratic, x, 3)
    scaled, _ = trajectory(o.stochastic_model_building(0.5 / scale), lambda x: scale * quadratic(x), x, 3)
    np.testing.assert_allclose(scaled, plain, rtol=1e-4)


def test_smb_leaf_without_gradient_stays():
    x = {"used": jnp.array([3.0]), "unused": jnp.array([1.0, 2.0])}
    loss = lambda x: 10 * jnp.sum(x["used"] ** 2)
    tx = o.stochastic_model_building(1.0)
    updates, _ = tx.update(jax.grad(loss)(x), tx.init(x), x, value_fn=loss)
    np.testing.assert_array_equal(updates["unused"], [0.0, 0.0])
    assert -3.0 < float(updates["used"][0]) < 0


# The truncated model.


@pytest.mark.parametrize("lower_bound", [0.0, 0.3])
def test_truncated_model_is_polyak_for_a_constant_rate(lower_bound):
    rng = np.random.default_rng(0)
    ours = optax.chain(o.scale_by_truncated_model(0.4, lower_bound), optax.scale_by_learning_rate(0.4))
    theirs = optax.polyak_sgd(0.4, f_min=lower_bound, variant="sps+")
    g = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    state, other = ours.init(g), theirs.init(g)
    update, other_update = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(100):
        g = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), g)
        value = 4 * rng.random()
        u, state = update(g, state, value=value)
        v, other = other_update(g, other, value=value)
        chex.assert_trees_all_close(u, v, rtol=1e-5)


def test_truncated_model_minimizes_the_truncated_model(x64):
    """The step is the minimum of max(f + <g, d>, bound) + ||d||^2 / (2 rate)."""
    rng = np.random.default_rng(0)
    for value in (0.5, 5.0, 50.0):
        g, rate, bound = jnp.asarray(rng.standard_normal(3)), 0.7, 0.2
        tx = o.scale_by_truncated_model(rate, bound)
        d = -rate * tx.update(g, tx.init(g), value=value)[0]
        model = lambda d, g=g, value=value: max(float(value + g @ d), bound) + float(d @ d) / (2 * rate)
        best = model(d)
        for _ in range(200):
            assert model(d + 0.01 * jnp.asarray(rng.standard_normal(3))) >= best - 1e-12


def test_truncated_model_follows_a_schedule():
    schedule = optax.linear_schedule(2.0, 0.5, 3)
    tx, g = o.scale_by_truncated_model(schedule), jnp.array([1.0, 2.0])
    state = tx.init(g)
    for step in range(4):
        u, state = tx.update(g, state, value=5.0)
        np.testing.assert_allclose(u, min(1, 5 / (5 * float(schedule(step)))) * g, rtol=1e-6)


def test_truncated_model_at_and_below_the_bound():
    tx, g = o.scale_by_truncated_model(1.0, 2.0), jnp.array([1.0, 2.0])
    for value in (2.0, 1.0):
        np.testing.assert_array_equal(tx.update(g, tx.init(g), value=value)[0], [0.0, 0.0])
    assert bool(jnp.all(jnp.isnan(tx.update(g, tx.init(g), value=jnp.nan)[0])))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: o.stochastic_model_building(-1.0), "learning_rate"),
        (lambda: o.stochastic_model_building(zeta=1.0), "zeta .* < 1"),
        (lambda: o.stochastic_model_building(sufficient_decrease=0.0), "sufficient_decrease .* > 0"),
        (lambda: o.stochastic_model_building().update(jnp.ones(1), None, None), "params"),
        (lambda: o.stochastic_model_building().update(jnp.ones(1), None, jnp.ones(1)), "value_fn"),
        (lambda: o.scale_by_truncated_model(0.0), "learning_rate .* > 0"),
        (lambda: o.scale_by_truncated_model(1.0).update(jnp.ones(1), None), "value"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
