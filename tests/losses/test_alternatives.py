"""Squared error and cross-entropies of other normalizers: worked numbers, closed forms, edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import example, kinds, logits_of, values_and_gradient

import jaxsoft
from jaxsoft import losses

A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]
X = [1.0, 2.0, -1.0, 0.5]
MSE, STABLE = losses.squared_error_loss, losses.stablemax_cross_entropy
SPHERICAL, TAYLOR = losses.spherical_softmax_cross_entropy, losses.taylor_softmax_cross_entropy
SPARSE = losses.sparse_softmax_cross_entropy


@kinds
@pytest.mark.parametrize(
    ("loss", "options", "row", "label", "expected"),
    [
        (MSE, {}, A, 0, 3.26),
        (SPHERICAL, dict(eps=0.0), A, 0, 0.447886),
        (TAYLOR, {}, A, 0, 0.763606),
        (STABLE, {}, X, 0, 1.252763),
        (STABLE, {}, X, 2, 2.639057),
        (SPARSE, dict(k=2), X, 0, 1.313262),
        (SPARSE, dict(k=2), X, 2, 3.313262),
    ],
)
def test_worked_numbers(loss, options, row, label, expected, kind, x64):
    value = loss(logits_of(jnp.array([row]), kind), jnp.array([label]), **options)
    np.testing.assert_allclose(value, [expected], atol=1e-6)


def test_worked_probabilities(x64):
    every = jax.jit(lambda loss: jnp.exp(-loss(jnp.array([A] * 5), jnp.arange(5))), static_argnums=0)
    p = every(lambda x, y: SPHERICAL(x, y, eps=0.0))
    np.testing.assert_allclose(p, [0.638978, 0.159744, 0.001597, 0.159744, 0.039936], atol=1e-6)
    np.testing.assert_allclose(every(TAYLOR), [0.465983, 0.232992, 0.102982, 0.046598, 0.151445], atol=1e-6)


@kinds
def test_gradients_in_closed_form(kind, x64):
    x, y, g = example()
    onehot = np.eye(5)[y]
    own = np.take_along_axis(x, y[:, None], 1)
    squares = np.sum(x**2, -1, keepdims=True)
    t = np.sum(1 + x + x**2 / 2, -1, keepdims=True)
    for loss, options, expected in (
        (MSE, {}, 2 * x - 2 * onehot),
        (SPHERICAL, dict(eps=0.01), 2 * x / (squares + 0.05) - onehot * 2 * own / (own**2 + 0.01)),
        (TAYLOR, {}, (1 + x) / t - onehot * (1 + own) / (1 + own + own**2 / 2)),
    ):
        _, gradient = values_and_gradient(loss, x, y, g, kind, **options)
        np.testing.assert_allclose(gradient, g[:, None] * expected, atol=1e-13)


@kinds
@pytest.mark.parametrize(
    ("loss", "options", "normalizer"),
    [
        (TAYLOR, dict(order=2), jaxsoft.taylor_softmax),
        (TAYLOR, dict(order=6), jaxsoft.taylor_softmax),
        (STABLE, {}, jaxsoft.stablemax),
    ],
)
def test_they_are_the_cross_entropies_of_the_normalizers(loss, options, normalizer, kind, x64):
    x, y, g = example()
    values, gradient = values_and_gradient(loss, x, y, g, kind, **options)

    def expected(x):
        return -jnp.log(normalizer(x, **options)[jnp.arange(len(y)), y])

    expected, pullback = jax.vjp(expected, jnp.asarray(x))
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, pullback(jnp.asarray(g))[0], atol=1e-13)


@kinds
def test_sparse_softmax(kind, x64):
    x, y, g = example()
    values, gradient = values_and_gradient(SPARSE, x, y, g, kind, k=3)
    p = jaxsoft.sparse_softmax(jnp.asarray(x), k=3)
    np.testing.assert_allclose(gradient, g[:, None] * (p - np.eye(5)[y]), atol=1e-14)
    own = x[np.arange(6), y]
    np.testing.assert_allclose(values, np.log(np.sum(np.sort(np.exp(x))[:, 2:], -1)) - own, atol=1e-13)
    outside = (x > own[:, None]).sum(-1) >= 3
    assert outside.any() and (values[outside] > np.log(3)).all()
    # As many as there are, or more: cross-entropy.
    expected = values_and_gradient(losses.cross_entropy, x, y, g)
    for k in (5, 50):
        for a, b in zip(values_and_gradient(SPARSE, x, y, g, kind, k=k), expected):
            np.testing.assert_allclose(a, b, atol=1e-14)


def test_the_spherical_family_without_logits(x64):
    """More rows than features: sums of squares come from the covariance of the weights."""
    rng = np.random.default_rng(1)
    hidden, weight, bias = (jnp.asarray(rng.normal(size=s)) for s in ((8, 3), (3, 11), (11,)))
    y, g = jnp.asarray(rng.integers(0, 11, 8)), jnp.asarray(rng.normal(size=8))
    where = jnp.arange(11) != (y[0] + 1) % 11
    y = jnp.where(where[y], y, y[0])

    def f(operands, loss, dense):
        hidden, weight, bias = operands
        logits = jaxsoft.linear_logits(hidden, weight, bias=bias, block_size=4)
        return g @ loss(logits.dense() if dense else logits, y, where=where)

    both = jax.jit(jax.value_and_grad(f), static_argnums=(1, 2))
    for loss in (MSE, SPHERICAL, TAYLOR):
        for a, b in zip(*(jax.tree.leaves(both((hidden, weight, bias), loss, d)) for d in (False, True))):
            np.testing.assert_allclose(a, b, atol=1e-11)


@kinds
def test_a_label_without_a_share(kind):
    x = np.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]], np.float32)
    values, gradient = values_and_gradient(SPHERICAL, x, [0, 1], np.ones(2, np.float32), kind, eps=0.0)
    assert np.all(values == np.inf) and np.all(np.isfinite(gradient))
    values, gradient = values_and_gradient(SPHERICAL, x, [0, 1], np.ones(2, np.float32), kind, eps=1e-6)
    np.testing.assert_allclose(values, [np.log(5e6 + 3), np.log(3)], rtol=1e-6)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("loss", [MSE, SPHERICAL, TAYLOR, STABLE, SPARSE])
def test_labels_that_are_absent(loss):
    x, y, g = example(n=3)
    where = np.ones((3, 5), bool)
    where[1, y[1]] = False
    values, gradient = values_and_gradient(loss, x.astype(np.float32), y, g.astype(np.float32), where=where)
    assert values[1] == np.inf and np.isfinite(values[[0, 2]]).all() and np.isfinite(gradient).all()


def test_stablemax_is_not_absorbed():
    """Where softmax in float32 has nothing more to learn, a correct and large logit still has a gradient."""
    x, y = jnp.array([[200.0, 0.0, 0.0]]), jnp.array([0])
    assert jnp.all(jax.grad(lambda x: losses.cross_entropy(x, y).sum())(x) == 0)
    gradient = jax.grad(lambda x: STABLE(x, y).sum())(x)
    np.testing.assert_allclose(gradient, [[1 / 203 - 1 / 201, 1 / 203, 1 / 203]], rtol=1e-4)
