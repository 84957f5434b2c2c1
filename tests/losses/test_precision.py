"""Half-precision logits of long rows: the error is that of their rounding, not of the sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxsoft
from jaxsoft import losses

VOCABULARY = 128256


def long_rows(dtype, n=8, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, VOCABULARY)) * 3, dtype)
    return x, jnp.asarray(rng.integers(0, VOCABULARY, n), jnp.int32)


def exact_cross_entropy(x, labels):
    """In float64, of the same rounded numbers."""
    x = np.asarray(x, np.float64)
    return scipy.special.logsumexp(x, axis=-1) - x[np.arange(len(x)), np.asarray(labels)]


def test_bfloat16_rows_of_a_large_vocabulary():
    """Within 1e-3 nats, the goal; and in fact within 1e-5 of a loss of 16, 5 units of float32."""
    x, labels = long_rows(jnp.bfloat16)
    exact = exact_cross_entropy(x, labels)
    loss = jax.jit(losses.cross_entropy)(x, labels)
    assert loss.dtype == jnp.float32
    assert np.abs(np.asarray(loss, np.float64) - exact).max() <= 1e-5 < 1e-3
    # A sum in bfloat16 does not: what is tested for.
    naive = jnp.log(jnp.cumsum(jnp.exp(x[:1, :4096] - 4), axis=-1, dtype=jnp.bfloat16)[:, -1])
    assert abs(float(naive[0]) - np.log(np.sum(np.exp(np.asarray(x[0, :4096], np.float64) - 4)))) > 1e-3


def test_bfloat16_hidden_of_a_large_vocabulary():
    """The product of bfloat16 operands is accumulated in float32, and no logit is rounded to bfloat16."""
    rng = np.random.default_rng(1)
    d, n = 16, 8
    hidden = jnp.asarray(rng.normal(size=(n, d)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(d, VOCABULARY)) * 0.75, jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, VOCABULARY, n), jnp.int32)
    x = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)
    exact = exact_cross_entropy(x, labels)

    @jax.jit
    def f(hidden, weight):
        logits = jaxsoft.linear_logits(hidden, weight, block_size=8192)
        return losses.cross_entropy(logits, labels), losses.weighted_mean(
            losses.cross_entropy, logits, labels
        )

    loss, mean = f(hidden, weight)
    assert np.abs(np.asarray(loss, np.float64) - exact).max() <= 2e-5 < 1e-3
    assert abs(float(mean) - exact.mean()) <= 2e-5 < 1e-3
    stored = exact_cross_entropy(jnp.asarray(x, jnp.bfloat16), labels)
    assert np.abs(stored - exact).max() > 1e-3  # which is what storing them in bfloat16 would cost


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float16, 11), (jnp.bfloat16, 8), (jnp.float32, 24)])
def test_a_softmax_of_70000_equal_logits_sums_to_one(dtype, bits):
    """70000 exceeds the largest float16: a sum in that dtype overflows.

    The terms, 1/70000 = 1.43e-5, are below the smallest normal float16 (6.1e-5), where numbers are spaced
    2**-24 apart; each is rounded by at most half of that, and the sum by 70000 times as much, 2.1e-3. In the
    wide formats every term is rounded by a relative 2**-bits at most, and so is the sum.
    """
    n = 70000
    for value in (0.0, 3.0, -100.0):
        y = jax.jit(jaxsoft.softmax)(jnp.full((1, n), value, dtype))
        assert y.dtype == dtype
        total = np.sum(np.asarray(y, np.float64))
        rounding = n * 2.0**-25 if dtype == jnp.float16 else 2.0**-bits
        assert abs(total - 1) <= rounding + 1e-6  # of the float32 statistics
        assert len(np.unique(np.asarray(y, np.float64))) == 1
    lse = jaxsoft.logsumexp(jnp.zeros((1, n), dtype))
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, np.log(n), rtol=2e-7)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.bfloat16, 8), (jnp.float16, 11)])
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_the_softmax_of_a_long_row(function, dtype, bits):
    """Every entry is the exact one, rounded once: relative 2**-bits, and 1e-6 of the statistics."""
    x, _ = long_rows(dtype, n=4)
    y = np.asarray(jax.jit(getattr(jaxsoft, function))(x), np.float64)
    exact = getattr(scipy.special, function)(np.asarray(x, np.float64), axis=-1)
    tiny = 2.0**-25 if dtype == jnp.float16 else 0.0  # half the spacing of subnormal numbers
    assert np.all(np.abs(y - exact) <= 2.0**-bits * np.abs(exact) * (1 + 1e-3) + tiny)


def test_the_gradient_of_a_long_row():
    """Of bfloat16 logits: exact, rounded once to bfloat16, though most entries are near 1e-7."""
    x, labels = long_rows(jnp.bfloat16, n=4)
    g = np.array([0.3, -1.0, 2.0, 0.7])
    gradient = jax.jit(
        jax.grad(lambda x: jnp.vdot(jnp.asarray(g, jnp.float32), losses.cross_entropy(x, labels)))
    )(x)
    assert gradient.dtype == jnp.bfloat16
    exact = scipy.special.softmax(np.asarray(x, np.float64), axis=-1)
    exact[np.arange(4), np.asarray(labels)] -= 1
    exact *= g[:, None]
    error = np.abs(np.asarray(gradient, np.float64) - exact)
    assert np.all(error <= 2.0**-8 * np.abs(exact) * (1 + 1e-3))


@pytest.mark.parametrize("gap", [10.0, 17.0, 30.0, 60.0])
def test_losses_of_learned_examples(gap):
    """A label far ahead: losses down to e^-60 of focal weights and misses keep their relative accuracy."""
    x = jnp.asarray([[gap, 0.0]], jnp.float32)
    labels = jnp.array([0])
    exact = np.log1p(np.exp(-gap))
    loss = losses.cross_entropy(x, labels)
    # log(1 + e^-gap) of a float32 sum of 1 and e^-gap: absolute accuracy, half a unit of 1
    np.testing.assert_allclose(loss, [exact], rtol=0, atol=6e-8)
    assert loss[0] >= 0
    gradient = jax.grad(lambda x: jnp.sum(losses.focal_loss(x, labels)))(x)
    assert jnp.all(jnp.isfinite(gradient))
    gradient = jax.grad(lambda x: jnp.sum(losses.focal_loss(x, labels, gamma=0.5)))(x)
    assert jnp.all(jnp.isfinite(gradient))
