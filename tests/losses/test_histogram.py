"""Targets of histograms, their loss and their mean: worked numbers, properties, tails, masks, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import fails, kinds, logits_of

from jaxsoft import losses

A = [2.0, 1.0, 0.1, -1.0, 0.5]
EDGES, CENTERS = np.linspace(-1, 1, 6), np.linspace(-0.8, 0.8, 5)
HL, TWO_HOT, C51 = losses.hl_gauss_targets, losses.two_hot_targets, losses.categorical_projection_targets
LOSS, MEAN = losses.histogram_loss, losses.histogram_mean


@kinds
def test_worked_numbers(kind, x64):
    logits, target = logits_of(jnp.array([A]), kind), jnp.array([0.3])
    q = HL(target, EDGES, sigma=0.3)
    np.testing.assert_allclose(q, [[0.001356, 0.046901, 0.324842, 0.476585, 0.150316]], atol=1e-6)
    np.testing.assert_allclose(q @ CENTERS, [0.291042], atol=1e-6)
    np.testing.assert_allclose(LOSS(logits, target, EDGES, sigma=0.3), [2.901749], atol=1e-6)
    np.testing.assert_allclose(HL(target, EDGES), q, atol=1e-14)  # sigma is 0.75 widths by default
    np.testing.assert_allclose(MEAN(logits, jnp.asarray(CENTERS)), [-0.418201], atol=1e-6)
    np.testing.assert_allclose(losses.bin_centers(EDGES), CENTERS, atol=1e-15)
    two_hot = TWO_HOT(target, CENTERS)
    np.testing.assert_allclose(two_hot, [[0, 0, 0.25, 0.75, 0]], atol=1e-12)
    np.testing.assert_allclose(losses.cross_entropy(logits, two_hot), [3.307420], atol=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 50.0])
def test_the_masses_keep_their_digits_in_the_tails(sigma):
    """In float32, each mass to a relative 1e-5, down to 1e-30, against the normal distribution in float64."""
    edges = np.linspace(-1, 1, 21)
    target = np.array([-1.0, -0.93, 0.0, 0.1, 0.31, 1.0])
    z = (edges - target[:, None]) / sigma
    low, high = z[:, :-1], z[:, 1:]
    exact = np.where(low > 0, scipy.stats.norm.sf(low) - scipy.stats.norm.sf(high), 0)
    exact = np.where(high < 0, scipy.stats.norm.cdf(high) - scipy.stats.norm.cdf(low), exact)
    middle = (low <= 0) & (high >= 0)
    exact = np.where(
        middle, scipy.special.erf(high / 2**0.5) / 2 - scipy.special.erf(low / 2**0.5) / 2, exact
    )
    exact /= exact.sum(-1, keepdims=True)
    # The edges, as float32 has them, are not quite these: an error of 6e-8 / sigma in z, times z in the mass.
    got = np.asarray(HL(jnp.asarray(target, jnp.float32), jnp.asarray(edges, jnp.float32), sigma=sigma))
    assert got.dtype == np.float32
    big = exact > 1e-30
    tolerance = 1e-5 + 3e-7 / sigma * np.maximum(1, np.minimum(np.abs(low), np.abs(high)))
    assert np.all((np.abs(got - exact) <= tolerance * exact)[big])
    assert np.all(got[~big] <= 2e-30)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


def test_targets_outside_the_support_are_clipped():
    far = jnp.array([-1e30, -1.0, 1.0, np.inf])
    q = HL(far, EDGES)
    assert jnp.all(jnp.isfinite(q))
    np.testing.assert_array_equal(q[0], q[1])
    np.testing.assert_array_equal(q[2], q[3])
    np.testing.assert_allclose(q[0], q[2][::-1], atol=1e-7)
    np.testing.assert_array_equal(TWO_HOT(far, CENTERS), np.eye(5)[[0, 0, 4, 4]])


def test_two_hot_has_the_mean_of_the_target(x64):
    centers = np.sort(np.random.default_rng(0).normal(size=9))  # not equally spaced
    target = np.random.default_rng(1).uniform(centers[0], centers[-1], (3, 4))
    q = np.asarray(jax.jit(TWO_HOT)(target, centers))
    np.testing.assert_allclose(q.sum(-1), 1, atol=1e-14)
    np.testing.assert_allclose(q @ centers, target, atol=1e-14)
    assert np.all((q > 0).sum(-1) <= 2) and np.all(q >= 0)
    np.testing.assert_allclose(TWO_HOT(jnp.asarray(centers), centers), np.eye(9), atol=1e-15)
    np.testing.assert_array_equal(TWO_HOT(jnp.array([3.0]), jnp.array([0.5])), [[1]])


def test_the_projection_is_that_of_the_paper(x64):
    """Against the loop of Bellemare et al.; it is also the mixture of the atoms' two-hot targets."""
    rng = np.random.default_rng(0)
    centers = np.linspace(-2, 3, 11)
    reward, discount = rng.normal(size=(4, 1)) * 2, 0.9
    p = rng.dirichlet(np.ones(11), 4)
    atoms = reward + discount * centers
    expected = np.zeros((4, 11))
    for i in range(4):
        for j in range(11):
            b = (np.clip(atoms[i, j], -2, 3) + 2) / 0.5
            low, high = int(np.floor(b)), int(np.ceil(b))
            expected[i, low] += p[i, j] * (high - b if high > low else 1)
            expected[i, high] += p[i, j] * (b - low)
    np.testing.assert_allclose(C51(atoms, p, centers), expected, atol=1e-13)
    mixture = np.einsum("ij,ijk->ik", p, TWO_HOT(jnp.asarray(atoms), centers))
    np.testing.assert_allclose(jax.jit(C51)(atoms, p, centers), mixture, atol=1e-14)


def test_targets_are_constants_in_at_least_float32():
    t = jnp.array([0.3, -0.5], jnp.bfloat16)
    for f in (lambda t: HL(t, EDGES.astype(np.float32)), lambda t: TWO_HOT(t, CENTERS.astype(np.float32))):
        assert f(t).dtype == jnp.float32
        assert jnp.all(jax.grad(lambda t, f=f: jnp.sum(f(t) ** 2))(t) == 0)
        np.testing.assert_allclose(jax.vmap(f)(t), f(t), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(f)(t), f(t), rtol=1e-5, atol=1e-7)
    p, e = jnp.array([[0.5, 0.5]]), jnp.asarray(CENTERS, jnp.float32)
    gradients = jax.grad(lambda *a: jnp.sum(C51(*a) ** 2), (0, 1, 2))(jnp.array([[0.1, 0.2]]), p, e)
    assert all(jnp.all(g == 0) for g in gradients)
    assert jnp.all(jax.grad(lambda e: jnp.sum(HL(jnp.array([0.3]), e) ** 2))(jnp.asarray(EDGES)) == 0)


def example(n=6):
    rng = np.random.default_rng(0)
    x, t, g = rng.normal(size=(n, 5)) * 2, rng.uniform(-1.2, 1.2, n), rng.normal(size=n)
    return jnp.asarray(x), jnp.asarray(t), jnp.asarray(g)


@kinds
def test_the_loss(kind, x64):
    """Cross-entropy with the targets, its gradient p - q; along any axis, jitted, by `weighted_sum`."""
    x, t, g = example()
    q = HL(t, EDGES)
    f = jax.jit(lambda x: LOSS(logits_of(x, kind), t, EDGES))
    values, pullback = jax.vjp(f, x)
    np.testing.assert_allclose(values, -jnp.sum(q * jax.nn.log_softmax(x), -1), atol=1e-13)
    np.testing.assert_allclose(pullback(g)[0], g[:, None] * (jax.nn.softmax(x) - q), atol=1e-13)
    total = losses.weighted_sum(LOSS, logits_of(x, kind), t, edges=EDGES, weights=g)
    np.testing.assert_allclose(total, g @ values, rtol=1e-12)
    np.testing.assert_allclose(LOSS(x.T, t, EDGES, axis=0, weights=g), g * values, atol=1e-13)
    np.testing.assert_allclose(jax.vmap(lambda x, t: LOSS(x, t, EDGES))(x, t), values, atol=1e-13)
    means, pullback = jax.vjp(jax.jit(lambda x: MEAN(logits_of(x, kind), jnp.asarray(CENTERS))), x)
    p = jax.nn.softmax(x)
    np.testing.assert_allclose(means, p @ CENTERS, atol=1e-14)
    np.testing.assert_allclose(pullback(g)[0], g[:, None] * p * (CENTERS - means[:, None]), atol=1e-14)


@kinds
def test_masked_rows_bins_and_targets(kind):
    x, t, _ = (a.astype(jnp.float32) for a in example())
    where = np.ones((6, 5), bool)
    where[1] = False
    where[2, 4] = False  # a masked bin with mass
    spoiled = t.at[jnp.array([1, 3])].set(jnp.nan)
    weights = jnp.array([1.0, 1, 1, 0, 2, 1])

    def f(x):
        return LOSS(logits_of(x, kind), spoiled, EDGES, where=where, weights=weights)

    values = f(x)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.where(jnp.isfinite(f(x)), f(x), 0))))(x)
    assert values[1] == 0 and values[3] == 0 and values[2] == np.inf
    assert np.all(gradient[np.array([1, 3])] == 0) and np.isfinite(gradient).all()
    expected = LOSS(x, t, EDGES) * weights
    np.testing.assert_allclose(values[np.array([0, 4, 5])], expected[np.array([0, 4, 5])], rtol=1e-6)
    assert jnp.all(jnp.isnan(LOSS(x, spoiled, EDGES)) == jnp.isnan(spoiled))
    low = LOSS(x.astype(jnp.bfloat16), t, EDGES)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, LOSS(x, t, EDGES), rtol=0.05)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda x, t: LOSS(x, t[:3], EDGES), ValueError, ["target", "(6,)", "(3,)"]),
        (lambda x, t: LOSS(x, t > 0, EDGES), TypeError, ["target", "floating", "bool"]),
        (lambda x, t: LOSS(x, t, CENTERS), ValueError, ["edges", "(6,)", "(5,)"]),
        (lambda x, t: LOSS(x, t, EDGES, sigma=0.0), ValueError, ["sigma", "> 0", "0.0"]),
        (lambda x, t: LOSS(x, t, EDGES, weights=x), ValueError, ["weights", "(6,)", "(6, 5)"]),
        (lambda x, t: LOSS(x, t, EDGES, where=x), TypeError, ["where", "boolean"]),
        (lambda x, t: LOSS(x, t, EDGES, axis=2), ValueError, ["axis", "[-2, 2)", "2"]),
        (lambda x, t: HL(1.0, EDGES), TypeError, ["target", "floating", "1.0"]),
        (lambda x, t: HL(t, EDGES[:1]), ValueError, ["edges", "(1,)"]),
        (lambda x, t: HL(t, [0.0, 1.0]), TypeError, ["edges", "floating", "list"]),
        (lambda x, t: HL(t, EDGES, sigma="x"), TypeError, ["sigma", "number", "'x'"]),
        (lambda x, t: TWO_HOT(t, x), ValueError, ["centers", "(6, 5)"]),
        (lambda x, t: TWO_HOT(t > 0, CENTERS), TypeError, ["target", "floating", "bool"]),
        (lambda x, t: C51(x, x[:, :4], CENTERS), ValueError, ["probabilities", "(6, 5)", "(6, 4)"]),
        (lambda x, t: C51(t[0], t[0], CENTERS), ValueError, ["atoms", "[*rows, k]"]),
        (lambda x, t: MEAN(x, EDGES), ValueError, ["centers", "(5,)", "(6,)"]),
        (lambda x, t: losses.bin_centers(x), ValueError, ["edges", "(6, 5)"]),
    ],
)
def test_bad_input(call, kind, words):
    x, t, _ = example()
    fails(words, kind, lambda: call(x, t))
