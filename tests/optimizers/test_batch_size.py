"""Norm test, scaling with the batch size, Step Law."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import descend

from jaxsoft import optimizers as o

GRADIENTS = np.array([[1, 0], [0.5, 1], [1.5, -0.5], [1, 0.5]])


def test_norm_test_worked_example(x64):
    result = o.batch_size_norm_test(jnp.asarray(GRADIENTS), 0.5)
    expected = o.NormTest(suggested=7 / 3.1875, passed=True, variance=7 / 3 * 0.25, mean_square=1.0625)
    chex.assert_trees_all_close(jax.tree.map(float, result), jax.tree.map(float, expected), atol=1e-12)
    np.testing.assert_allclose(result.suggested, 2.196078, atol=5e-7)
    assert result.variance / 4 <= 0.265625
    # a stricter test fails, and passes with the batch it suggests
    strict = o.batch_size_norm_test(jnp.asarray(GRADIENTS), 0.2)
    assert not strict.passed and strict.suggested > 4


def test_norm_test_of_a_tree_is_that_of_the_vector():
    tree = {"a": jnp.asarray(GRADIENTS[:, :1], jnp.bfloat16), "b": (jnp.asarray(GRADIENTS[:, 1]), None)}
    whole = o.batch_size_norm_test(jnp.asarray(GRADIENTS))
    result = jax.jit(o.batch_size_norm_test)(tree)
    chex.assert_trees_all_close(result, whole, rtol=1e-6)
    assert result.suggested.dtype == jnp.float32


@pytest.mark.parametrize("size", [1, 16])
def test_norm_test_finds_the_ratio_of_noise_to_signal(size):
    """Gaussian gradients of known mean and deviation, as examples or as means over micro batches."""
    rng = np.random.default_rng(0)
    mean, sigma, d = 0.5, 3.0, 20
    g = mean + sigma * rng.standard_normal((4000, size, d)).mean(1)
    result = o.batch_size_norm_test(jnp.asarray(g, jnp.float32), 0.5, micro_batch_size=size)
    np.testing.assert_allclose(result.variance, d * sigma**2, rtol=0.02)
    np.testing.assert_allclose(result.suggested, sigma**2 / (0.25 * mean**2), rtol=0.15)
    assert result.passed


def test_norm_test_limits():
    same = o.batch_size_norm_test(jnp.ones((3, 2)))
    assert same.passed and same.suggested == 0
    nothing = o.batch_size_norm_test(jnp.zeros((3, 2)))
    assert nothing.passed and nothing.suggested == 0
    noise = o.batch_size_norm_test(jnp.array([[1.0], [-1.0]]))
    assert not noise.passed and noise.suggested == jnp.inf
    bad = o.batch_size_norm_test(jnp.array([[1.0], [jnp.nan]]))
    assert not bad.passed and jnp.isnan(bad.suggested)


def test_accumulation_steps():
    steps = functools.partial(o.accumulation_steps, micro_batch_size=32, max_steps=64)
    assert [steps(b) for b in (0, 1, 32, 33, 64, 65, 1e9, float("inf"))] == [1, 1, 1, 2, 2, 4, 64, 64]
    assert steps(10, current=5) == 5 and steps(float("nan"), current=5) == 5  # never falls
    assert steps(jnp.asarray(170.0), current=5) == 8
    assert o.accumulation_steps(100, 1, max_steps=100) == 100


def test_controller_raises_the_batch_as_the_signal_fades():
    """The recipe of the docs: micro batches, `optax.MultiSteps` made anew when their number changes."""
    rng, goal, seen = np.random.default_rng(0), np.array([3.0, -3.0]), []
    params, steps, inner = jnp.zeros(2), 1, optax.adagrad(0.7)
    inner_state = inner.init(params)
    for _ in range(15):
        examples = np.asarray(params) - goal + 2 * rng.standard_normal((steps, 4, 2))
        tx = optax.MultiSteps(inner, every_k_schedule=steps)
        state = tx.init(params)._replace(inner_opt_state=inner_state)
        update = jax.jit(tx.update)
        for micro in examples:
            updates, state = update(jnp.asarray(micro.mean(0), jnp.float32), state, params)
            params = optax.apply_updates(params, updates)
        inner_state = state.inner_opt_state
        result = o.batch_size_norm_test(jnp.asarray(examples.reshape(-1, 2), jnp.float32), 0.9)
        steps = o.accumulation_steps(float(result.suggested), 4, current=steps, max_steps=4)
        seen.append(steps)
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] == 4
    assert jnp.linalg.norm(params - goal) < 1.5


def test_scale_hyperparams_worked_example():
    new = o.scale_hyperparams(4, learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-8, steps=1000)
    expected = o.ScaledHyperparams(learning_rate=0.002, b1=0.6, b2=0.996, eps=5e-9, steps=250)
    np.testing.assert_allclose(new, expected, rtol=1e-12)
    sgd = o.scale_hyperparams(4, optimizer="sgd", learning_rate=0.1, b1=0.9, steps=100)
    assert sgd == o.ScaledHyperparams(0.4, 0.9, None, None, 25)


def test_scale_hyperparams_there_and_back():
    start = dict(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-8, steps=1000.0)
    there = o.scale_hyperparams(0.25, **start)
    np.testing.assert_allclose(o.scale_hyperparams(4.0, **there._asdict()), list(start.values()), rtol=1e-9)
    traced = jax.jit(lambda k: o.scale_hyperparams(k, **start))(4.0)
    np.testing.assert_allclose(traced, o.scale_hyperparams(4.0, **start), rtol=1e-5)


def test_scaled_adam_follows_the_same_path():
    """Where gradients are noise, the spread after the same number of examples is the same."""

    def spread(kappa):
        h = o.scale_hyperparams(kappa, learning_rate=0.003, b1=0.9, b2=0.99, eps=1e-8, steps=1600)
        tx = optax.adam(h.learning_rate, h.b1, h.b2, h.eps)
        noise = jax.random.normal(jax.random.key(1), (int(h.steps), 500)) / kappa**0.5
        p, _ = descend(tx, jnp.ones(500), lambda p, z: 0.05 * p + z, noise)
        return jnp.stack([p.mean(), p.std()])

    small, large = jax.jit(spread, static_argnums=0)(1), jax.jit(spread, static_argnums=0)(4)
    np.testing.assert_allclose(small, large, rtol=0.15)


@pytest.mark.parametrize(
    ("rounded", "params", "tokens", "rate", "batch"),
    [
        (False, 1e9, 1e11, 1.662379e-03, 1.107467e06),
        (False, 7e9, 1.4e12, 9.346841e-04, 4.996961e06),
        (True, 7e9, 1.4e12, 9.165569e-04, 4.998815e06),
    ],
)
def test_step_law(rounded, params, tokens, rate, batch):
    """The constants are given to seven digits, so that the last digit of the tables is not reproduced."""
    np.testing.assert_allclose(o.step_law_learning_rate(params, tokens, rounded=rounded), rate, rtol=5e-6)
    np.testing.assert_allclose(o.step_law_batch_size(tokens, rounded=rounded), batch, rtol=5e-6)
    traced = jax.jit(o.step_law_learning_rate)(jnp.float32(params), jnp.float32(tokens))
    np.testing.assert_allclose(traced, o.step_law_learning_rate(params, tokens), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.batch_size_norm_test(jnp.ones((3, 2)), 0.0), ValueError, "theta .* > 0"),
        (lambda: o.batch_size_norm_test(jnp.ones((1, 2))), ValueError, "grads must have leaves"),
        (lambda: o.batch_size_norm_test([jnp.ones((3, 2)), jnp.ones((2, 2))]), ValueError, "same first axis"),
        (lambda: o.batch_size_norm_test({}), ValueError, "grads must have leaves"),
        (lambda: o.batch_size_norm_test(jnp.ones(())), ValueError, "grads must have leaves"),
        (
            lambda: o.batch_size_norm_test(jnp.ones((3, 2)), micro_batch_size=0),
            ValueError,
            "micro_batch_size",
        ),
        (lambda: o.accumulation_steps(10, 0), ValueError, "micro_batch_size"),
        (lambda: o.accumulation_steps("many", 1), TypeError, "suggested must be a concrete number"),
        (lambda: o.accumulation_steps(10, 1, current=9, max_steps=8), ValueError, "max_steps .* >= 9"),
        (lambda: o.scale_hyperparams(0.0, learning_rate=0.1), ValueError, "kappa .* > 0"),
        (
            lambda: o.scale_hyperparams(20, learning_rate=0.1, b1=0.9),
            ValueError,
            r"kappa must be at most 1 / \(1 - b1\) = 10",
        ),
        (
            lambda: o.scale_hyperparams(2, learning_rate=0.1, optimizer="lamb"),
            ValueError,
            "optimizer must be one of",
        ),
        (lambda: o.scale_hyperparams(2, learning_rate=-0.1), ValueError, "learning_rate"),
        (lambda: o.scale_hyperparams(2, learning_rate=0.1, b2=1.0), ValueError, "b2"),
        (lambda: o.scale_hyperparams(2, learning_rate=0.1, eps=-1.0), ValueError, "eps"),
        (lambda: o.step_law_learning_rate(0, 1e9), ValueError, "params .* > 0"),
        (lambda: o.step_law_learning_rate(1e9, -1), ValueError, "tokens .* > 0"),
        (lambda: o.step_law_batch_size(0), ValueError, "tokens .* > 0"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
