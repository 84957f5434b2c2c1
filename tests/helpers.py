"""What many tests need: comparisons, expected errors, logits of both kinds, dense formulas, steps of an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft

# --- comparisons -----------------------------------------------------------------------------------------


def close(a, b, tolerance=1e-6):
    """Asserts `|a - b| <= tolerance`."""
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance)


def near(a, b, tolerance=1e-9):
    """Asserts `|a - b| <= tolerance * (1 + |b|)`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def trees_close(a, b, tolerance=1e-12):
    """Asserts that the leaves of two trees have equal shapes and are `near`."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        near(x, y, tolerance)


def fails(words, kind, call):
    """Asserts that `call()` raises exactly a `kind`, whose message has all the words."""
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind, error.value
    assert all(word in str(error.value) for word in words), error.value


# --- logits ----------------------------------------------------------------------------------------------


def streamed(scores, block_size=2):
    """Scores as an expression whose hidden states are the identity."""
    scores = jnp.asarray(scores)
    return jaxsoft.linear_logits(jnp.eye(len(scores), dtype=scores.dtype), scores, block_size=block_size)


kinds = pytest.mark.parametrize("kind", ["dense", "streamed"])


def logits_of(scores, kind, block_size=2):
    """Scores as an array or as an expression, by the kind."""
    return jnp.asarray(scores) if kind == "dense" else streamed(scores, block_size)


# --- gradients -------------------------------------------------------------------------------------------


def values_and_gradient(loss, x, labels, g, kind="dense", **options):
    """Values, and the gradient of their sum weighted by g."""

    def f(x):
        values = loss(logits_of(x, kind), jnp.asarray(labels), **options)
        return jnp.vdot(values, jnp.asarray(g)), values

    gradient, values = jax.jit(jax.grad(f, has_aux=True))(jnp.asarray(x))
    return np.asarray(values), np.asarray(gradient)


def jacobian(loss, x):
    """The loss of each row, and its gradient with respect to that row."""
    values, pullback = jax.vjp(loss, x)
    return values, pullback(jnp.ones_like(values))[0]


# --- dense formulas in numpy -----------------------------------------------------------------------------


def softmax(x):
    """Over the last axis; -inf is absent, a row without entries gives 0."""
    top = np.max(x, axis=-1, keepdims=True)
    w = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = w.sum(-1, keepdims=True)
    return w / np.where(total > 0, total, 1)


def sigmoid(x):
    """Entry by entry."""
    return 1 / (1 + np.exp(-np.asarray(x)))


# --- optimizers ------------------------------------------------------------------------------------------


def descend(tx, params, gradient, xs=None, steps=None):
    """Parameters and state after a step on `gradient(params, x)` for each x, or after `steps` steps with x None."""

    def step(carry, x):
        params, state = carry
        updates, state = tx.update(gradient(params, x), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), xs, steps)[0]


def trajectory(tx, params, grads):
    """The parameters after each step, `[steps, *shape]`."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g)[1])(params, grads)


def temporary_bytes(tx, params):
    """What one compiled step stores beside parameters, gradients and state, the first and last donated."""
    grads, state = jnp.ones_like(params), tx.init(params)

    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(grads, params, state).compile()
    return compiled.memory_analysis().temp_size_in_bytes
