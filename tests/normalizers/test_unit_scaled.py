"""Unit-scaled softmax and cross-entropy: constants on value and gradient, and the variances they are for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.losses import cross_entropy, unit_scaled_cross_entropy
from jaxsoft.normalizers import unit_scaled_softmax


def constant(n, multiplier):
    share = 1 / (1 + 4 / multiplier**2)
    return math.exp(share * math.log(math.sqrt(n)) + (1 - share) * math.log(n))


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 4.0])
def test_softmax_is_scaled_and_so_is_its_gradient(x64, multiplier):
    x, g = np.random.default_rng(0).normal(size=(2, 3, 7))
    plain, pull = jax.vjp(lambda x: jaxsoft.softmax(multiplier * x), jnp.asarray(x))
    own = constant(7 / multiplier, multiplier)
    for constraint, backward in (("to_output_scale", constant(7, multiplier)), (None, own)):
        y, pull_scaled = jax.vjp(
            lambda x: unit_scaled_softmax(x, multiplier=multiplier, constraint=constraint), jnp.asarray(x)
        )
        np.testing.assert_allclose(y, constant(7, multiplier) * plain, rtol=1e-13)
        np.testing.assert_allclose(pull_scaled(g)[0], backward * pull(g)[0], rtol=1e-12)


def test_softmax_under_a_mask_and_other_axis(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
    where = jnp.arange(5)[:, None] > 1
    y = unit_scaled_softmax(x, axis=0, where=where)
    np.testing.assert_allclose(y, constant(5, 1.0) * jaxsoft.softmax(x, axis=0, where=where), rtol=1e-13)
    assert (y[:2] == 0).all()


@pytest.mark.parametrize("multiplier", [0.5, 2.0])
def test_softmax_has_a_spread_near_one_for_normal_scores(multiplier):
    y = unit_scaled_softmax(jax.random.normal(jax.random.key(0), (64, 1024)), multiplier=multiplier)
    assert 0.3 < float(jnp.std(y)) < 3


def test_cross_entropy_keeps_its_value_and_scales_its_gradient(x64):
    rng = np.random.default_rng(2)
    hidden, weight = jnp.asarray(rng.normal(size=(4, 6))), jnp.asarray(rng.normal(size=(6, 9)))
    labels = jnp.array([0, 8, -100, 3])

    def ours(hidden, weight, lazy):
        logits = jaxsoft.linear_logits(hidden, weight) if lazy else hidden @ weight
        return jnp.sum(unit_scaled_cross_entropy(logits, labels, multiplier=1.5, label_smoothing=0.1) ** 2)

    def plain(hidden, weight):
        return jnp.sum(cross_entropy(1.5 * (hidden @ weight), labels, label_smoothing=0.1) ** 2)

    expected = jax.value_and_grad(plain, (0, 1))(hidden, weight)
    for lazy in (False, True):
        value, gradients = jax.value_and_grad(ours, (0, 1))(hidden, weight, lazy)
        np.testing.assert_allclose(value, expected[0], rtol=1e-12)
        for g, e in zip(gradients, expected[1]):
            np.testing.assert_allclose(g, e * 9 / math.sqrt(8), rtol=1e-11)


def test_cross_entropy_of_equal_logits_has_a_gradient_of_unit_variance(x64):
    gradient = jax.grad(lambda x: unit_scaled_cross_entropy(x, jnp.array([3])).sum())(jnp.zeros((1, 50)))
    np.testing.assert_allclose(jnp.mean(gradient**2), 1, rtol=1e-12)


def test_one_class_and_one_entry():
    assert unit_scaled_cross_entropy(jnp.ones((1, 1)), jnp.array([0])) == 0
    assert unit_scaled_softmax(jnp.ones(1)) == 1


@pytest.mark.parametrize(
    "function", [unit_scaled_softmax, lambda x, **o: unit_scaled_cross_entropy(x, jnp.array([0]), **o)]
)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(multiplier=0.0), ValueError, "multiplier .* > 0, got 0.0"),
        (dict(multiplier="1"), TypeError, "multiplier"),
    ],
)
def test_bad_multipliers(function, options, error, words):
    with pytest.raises(error, match=words):
        function(jnp.zeros((1, 3)), **options)


def test_bad_constraint_and_scores():
    with pytest.raises(ValueError, match="constraint must be one of 'to_output_scale', None, got 'gmean'"):
        unit_scaled_softmax(jnp.zeros(3), constraint="gmean")
    with pytest.raises(TypeError, match="logits must be an array of floating dtype"):
        unit_scaled_cross_entropy(jnp.zeros((1, 3), int), jnp.array([0]))
