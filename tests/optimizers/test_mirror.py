"""Optimistic mirror descent: worked numbers, oracles, games, regret, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import descend, trajectory

from jaxsoft import optimizers as o

simplex = optax.projections.projection_simplex


def test_entropy_worked_example(x64):
    tx, x = o.optimistic_mirror_descent(0.5, mirror="entropy"), jnp.array([0.5, 0.5])
    state = tx.init(x)
    expected = [([0.268941, 0.731059], [0.377541, 0.622459]), ([0.574443, 0.425557], [0.475021, 0.524979])]
    for g, (point, centre) in zip([[1.0, 0.0], [0.2, 1.0]], expected):
        updates, state = tx.update(jnp.array(g), state, x)
        x = x + updates
        np.testing.assert_allclose(x, point, atol=5e-7)
        np.testing.assert_allclose(jax.nn.softmax(jnp.log(x) + state.offset), centre, atol=5e-7)


def test_without_projection_it_is_optimistic_gradient_descent(x64):
    grads = jax.random.normal(jax.random.key(0), (100, 5))
    ours = trajectory(o.optimistic_mirror_descent(0.1), jnp.zeros(5), grads)
    # Its first step has no gradient before: the hint of optax is then 0, ours is the first gradient.
    theirs = trajectory(optax.optimistic_gradient_descent(0.1), jnp.zeros(5) - 0.1 * grads[0], grads)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("mirror", ["euclidean", "entropy"])
def test_two_sequences_as_in_the_paper(x64, mirror, adaptive):
    """Against the definition, which keeps the centre itself."""
    grads = np.random.default_rng(0).standard_normal((100, 4))
    project = jax.jit(simplex)

    def step(z, g, rate):
        if mirror == "euclidean":
            return np.asarray(project(z - rate * g))
        y = z * np.exp(-rate * g)
        return y / y.sum()

    x = z = np.full(4, 0.25)
    total, last, expected = 0.0, np.zeros(4), []
    for g in grads:
        rate = 0.3 / np.sqrt(2.0 + total) if adaptive else 0.3
        total += (
            np.sum((g - last) ** 2) if mirror == "euclidean" else np.max(np.abs(g - last)) ** 2
        ) * adaptive
        following = 0.3 / np.sqrt(2.0 + total) if adaptive else 0.3
        z = step(z, g, rate)
        x = step(z, g, following)
        last = g
        expected.append(x)
    tx = o.optimistic_mirror_descent(
        0.3,
        mirror=mirror,
        adaptive=adaptive,
        delta=2.0,
        projection=simplex if mirror == "euclidean" else None,
    )
    ours = trajectory(tx, jnp.asarray(np.full(4, 0.25)), jnp.asarray(grads))
    np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-10)


def test_schedule_is_used_one_step_ahead_for_the_hint(x64):
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    grads = jnp.ones((3, 1))
    ours = trajectory(o.optimistic_mirror_descent(schedule), jnp.zeros(1), grads)
    np.testing.assert_allclose(ours[:, 0], [-1.75, -2.25, -2.5], atol=1e-12)


def test_bilinear_game_converges_where_gradient_descent_diverges():
    """min over a, max over b of a b: the point (0, 0)."""
    field = lambda p, _: {"a": p["b"], "b": -p["a"]}

    def play(tx, steps=800):
        p = {"a": jnp.array(1.0), "b": jnp.array(1.0)}
        p, _ = jax.jit(lambda p: descend(tx, p, field, steps=steps))(p)
        return float(jnp.hypot(p["a"], p["b"]))

    assert play(o.optimistic_mirror_descent(0.2)) < 1e-3
    assert play(optax.sgd(0.2)) > 1e3


def test_rock_paper_scissors_is_played_uniformly():
    payoff = jnp.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
    tx = o.optimistic_mirror_descent(0.3, mirror="entropy")
    p = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jnp.stack([payoff @ p[1], -payoff.T @ p[0]]), state, p)
        return (p + updates, state), None

    p = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 1500)[0][0])(p)
    np.testing.assert_allclose(p, np.full((2, 3), 1 / 3), atol=1e-3)


def test_regret_with_gradients_that_do_not_change_is_constant():
    """The regret bound depends on the change of the gradients: it stops growing when they stop."""
    grads = jnp.tile(jnp.array([0.3, -0.1, 0.5]), (400, 1))
    x = jnp.full(3, 1 / 3)
    points = trajectory(o.optimistic_mirror_descent(1.0, mirror="entropy", adaptive=True), x, grads)
    losses = np.concatenate([[x @ grads[0]], np.sum(points[:-1] * grads[1:], axis=-1)])
    regret = np.cumsum(losses) - np.arange(1, 401) * -0.1
    assert regret[-1] < 1.5 and regret[-1] - regret[200] < 1e-3


def test_entropy_stays_on_the_simplex_and_keeps_zeros():
    grads = 100 * jax.random.normal(jax.random.key(0), (20, 2, 4))
    x = jnp.array([[0.5, 0.0, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    points = trajectory(o.optimistic_mirror_descent(1.0, mirror="entropy"), x, grads)
    np.testing.assert_allclose(jnp.sum(points, axis=-1), np.ones((20, 2)), rtol=1e-5)
    assert bool(jnp.all(points >= -1e-7)) and bool(jnp.all(jnp.abs(points[:, 0, 1]) < 1e-7))
    np.testing.assert_allclose(points[:, 1], np.broadcast_to(x[1], (20, 4)), atol=1e-6)


def test_entropy_of_a_row_without_positive_entries_is_uniform():
    tx, x = o.optimistic_mirror_descent(0.0, mirror="entropy"), jnp.array([[0.0, 0.0], [-1.0, 2.0]])
    updates, _ = tx.update(jnp.ones((2, 2)), tx.init(x), x)
    np.testing.assert_allclose(x + updates, [[0.5, 0.5], [0.0, 1.0]])


def test_projection_of_a_tree():
    box = functools.partial(jax.tree.map, lambda x: jnp.clip(x, -1.0, 1.0))
    tx, x = o.optimistic_mirror_descent(10.0, projection=box), {"a": jnp.zeros(2), "b": (jnp.zeros(()), None)}
    updates, state = tx.update({"a": jnp.array([1.0, -1.0]), "b": (jnp.array(0.01), None)}, tx.init(x), x)
    np.testing.assert_allclose(updates["a"], [-1.0, 1.0])
    np.testing.assert_allclose(updates["b"][0], -0.2, rtol=1e-6)
    np.testing.assert_allclose(state.offset["a"], [0.0, 0.0])
    np.testing.assert_allclose(state.offset["b"][0], 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.optimistic_mirror_descent(-1.0), ValueError, "learning_rate"),
        (lambda: o.optimistic_mirror_descent(1.0, mirror="hyperbolic"), ValueError, "mirror must be one of"),
        (
            lambda: o.optimistic_mirror_descent(1.0, mirror="entropy", projection=simplex),
            ValueError,
            "projection",
        ),
        (lambda: o.optimistic_mirror_descent(1.0, projection=3), TypeError, "projection must be a function"),
        (lambda: o.optimistic_mirror_descent(1.0, adaptive=1), TypeError, "adaptive must be True or False"),
        (lambda: o.optimistic_mirror_descent(1.0, delta=0.0), ValueError, "delta .* > 0"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
