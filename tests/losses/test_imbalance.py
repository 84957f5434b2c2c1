"""Losses for classes of unequal size or spread: numbers, limits, closed forms, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fails, kinds, logits_of

import jaxsoft
from jaxsoft import losses
from jaxsoft.normalizers import noisy_logits

A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]
AB, LABELS = np.array([A, B]), jnp.array([0, 3])
PRIORS = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
LIPSCHITZ = np.array([[0, 1.2, 0.8, 1.5, 1], [0.9, 1.2, 0.8, 0, 1]])
CE, ADJUSTED, NOISY, EMMA = (
    losses.cross_entropy,
    losses.logit_adjusted_cross_entropy,
    losses.noisy_softmax_cross_entropy,
    losses.emma_loss,
)
AMARX = losses.adaptive_margin_cross_entropy


def rows_and_gradients(loss, scores, *args):
    """Values, and gradients of each value with respect to its row and to further arrays, jitted."""
    w = jnp.linspace(0.5, 1.5, scores.shape[0])
    f = lambda *a: (lambda v: (jnp.sum(w * v), v))(loss(*a))
    gradient, values = jax.jit(jax.grad(f, argnums=tuple(range(1 + len(args))), has_aux=True))(scores, *args)
    return values, gradient


# --- logit adjustment --------------------------------------------------------------------------------------


@kinds
def test_logit_adjusted_numbers(kind, x64):
    logits = logits_of(AB, kind)
    close(ADJUSTED(logits, LABELS, priors=jnp.asarray(PRIORS)), [0.242527, 2.790380])
    close(ADJUSTED(logits, LABELS, class_counts=jnp.array([50, 30, 10, 6, 4])), [0.242527, 2.790380])
    close(ADJUSTED(logits, LABELS, priors=jnp.asarray(PRIORS), tau=0.0), CE(logits, LABELS), 1e-14)
    even = jnp.full(5, 0.2)
    close(ADJUSTED(logits, LABELS, priors=even, tau=2.0), CE(logits, LABELS), 1e-14)


@kinds
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_logit_adjusted_is_cross_entropy_of_adjusted_logits(kind, tau, x64):
    ours = rows_and_gradients(
        lambda x, p: ADJUSTED(logits_of(x, kind), LABELS, priors=p, tau=tau), AB, jnp.asarray(PRIORS)
    )
    plain = rows_and_gradients(lambda x, p: CE(x + tau * jnp.log(p), LABELS), AB, jnp.asarray(PRIORS))
    jax.tree.map(lambda a, b: close(a, b, 1e-12), ours, plain)


def test_logit_adjusted_keeps_the_last_place_of_large_logits():
    x = AB + 1e4 - np.array([[0], [3e4]])
    x = np.asarray(x, np.float32)
    exact = ADJUSTED(
        jnp.asarray(x - x.max(1, keepdims=True)), LABELS, priors=jnp.asarray(PRIORS, jnp.float32)
    )
    close(ADJUSTED(jnp.asarray(x), LABELS, priors=jnp.asarray(PRIORS, jnp.float32)), exact, 1e-6)


@kinds
def test_a_class_of_prior_zero_is_absent(kind):
    x, counts = jnp.asarray(AB, jnp.float32), jnp.array([50, 0, 10, 6, 4])
    f = lambda x, y: ADJUSTED(logits_of(x, kind), y, class_counts=counts)
    masked = ADJUSTED(
        x,
        LABELS,
        class_counts=jnp.array([50, 30, 10, 6, 4]),
        where=jnp.array([True, False, True, True, True]),
    )
    close(f(x, LABELS), masked)
    g = jax.grad(lambda x: jnp.sum(f(x, LABELS)))(x)
    close(g[:, 1], 0, 0)
    value, g = jax.value_and_grad(lambda x: f(x, jnp.array([1, 0]))[0])(x)
    assert value == jnp.inf and jnp.all(jnp.isfinite(g))
    none = jnp.zeros(5)
    value, g = jax.value_and_grad(lambda x: jnp.sum(ADJUSTED(x, LABELS, priors=none)))(x)
    assert value == 0 and not jnp.any(g)


# --- class-balanced weights --------------------------------------------------------------------------------


def test_class_balanced_weights():
    n = np.array([5000, 500, 37, 2])
    for beta in (0.0, 0.9, 0.99, 0.9999):
        w = (1 - beta) / (1 - beta ** n.astype(float))
        expected = w / w.sum() * 4
        np.testing.assert_allclose(losses.class_balanced_weights(n, beta=beta), expected, rtol=2e-6)
        floats = losses.class_balanced_weights(jnp.asarray(n, jnp.float32), beta=beta)
        np.testing.assert_allclose(floats, expected, rtol=2e-6)
    close(losses.class_balanced_weights(n, beta=0.0), np.ones(4))
    limit = losses.class_balanced_weights(n, beta=1 - 1e-9)
    np.testing.assert_allclose(limit, 4 / n / np.sum(1 / n), rtol=1e-5)
    absent = losses.class_balanced_weights(np.array([10, 0, 1000]))
    close(absent[jnp.array([0, 2])], losses.class_balanced_weights(np.array([10, 1000])))
    assert absent[1] == 0
    assert not jnp.any(losses.class_balanced_weights(np.zeros(3, int)))
    traced = jax.jit(lambda b: losses.class_balanced_weights(n, beta=b))(0.9)
    np.testing.assert_allclose(traced, losses.class_balanced_weights(n, beta=0.9), rtol=1e-5)
    close(jax.jit(losses.class_balanced_weights)(n), losses.class_balanced_weights(n))
    both = jnp.stack([jnp.asarray(n), jnp.asarray(n[::-1].copy())])
    close(jax.vmap(losses.class_balanced_weights)(both)[1][::-1], losses.class_balanced_weights(n))


@pytest.mark.parametrize(
    ("args", "options", "kind", "words"),
    [
        ((np.arange(6).reshape(2, 3),), {}, ValueError, ["class_counts", "one axis", "(2, 3)"]),
        (([1, 2],), {}, TypeError, ["class_counts", "array of numbers", "[1, 2]"]),
        ((np.array([True, False]),), {}, TypeError, ["class_counts", "array of numbers", "bool"]),
        ((np.arange(3),), dict(beta=1.0), ValueError, ["beta", ">= 0 and < 1", "1.0"]),
        ((np.arange(3),), dict(beta="a"), TypeError, ["beta", "'a'"]),
    ],
)
def test_bad_class_counts(args, options, kind, words):
    fails(words, kind, lambda: losses.class_balanced_weights(*args, **options))


# --- noisy softmax -----------------------------------------------------------------------------------------


@kinds
def test_noisy_softmax_number(kind, x64):
    key = jax.random.key(3)
    xi = jnp.abs(jax.random.normal(key, (2,), jnp.float64))[0]
    options = dict(norm_product=jnp.array([3.0, 2.0]), key=key)
    close(NOISY(logits_of(AB, kind), LABELS, alpha=0.5 * 0.8 / xi, **options)[0], 0.778906)
    close(NOISY(logits_of(AB, kind), LABELS, alpha=0.0, **options), CE(AB, LABELS), 1e-14)
    close(NOISY(logits_of(AB, kind), LABELS, norm_product=jnp.ones(2), key=None), CE(AB, LABELS), 1e-14)


@kinds
def test_noisy_softmax_is_cross_entropy_of_noisy_logits(kind, x64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 5)) * 2)
    y = jnp.array([0, 1, 2, 3, 4, 0])
    features, heads = jnp.asarray(1 + rng.random(6)), jnp.asarray(1 + rng.random(5))
    key = jax.random.key(1)
    ours = rows_and_gradients(
        lambda x, f, h: NOISY(logits_of(x, kind), y, norm_product=f * h[y], key=key), x, features, heads
    )
    stored = rows_and_gradients(
        lambda x, f, h: CE(noisy_logits(x, y, feature_norms=f, weight_norms=h, key=key), y),
        x,
        features,
        heads,
    )
    jax.tree.map(lambda a, b: close(a, b, 1e-12), ours, stored)


@kinds
def test_noisy_softmax_masks_and_ignored_rows(kind):
    x, y = jnp.asarray(AB, jnp.float32), jnp.array([0, -100])
    mask = jnp.array([True, True, False, True, False])
    f = lambda x, n: NOISY(logits_of(x, kind), y, norm_product=n, key=jax.random.key(2), where=mask)
    spoiled = x.at[:, 2].set(jnp.nan)
    spoiled = spoiled if kind == "streamed" else spoiled.at[1].set(jnp.nan)
    n = jnp.array([3.0, jnp.nan])
    value, g = jax.value_and_grad(lambda x, n: jnp.sum(f(x, n)), argnums=(0, 1))(spoiled, n)
    expected = NOISY(x[:1, mask], y[:1], norm_product=n[:1], key=jax.random.key(2))
    assert jnp.isfinite(value) and all(jnp.all(jnp.isfinite(a)) for a in g)
    xi = jnp.abs(jax.random.normal(jax.random.key(2), (2,)))[0]
    edited = x[:1, mask].at[0, 0].add(-(0.1**0.5) * xi)
    close(value, CE(edited, y[:1])[0])
    assert expected.shape == (1,) and g[1][1] == 0 and not jnp.any(g[0][:, 2]) and not jnp.any(g[0][1])
    absent = NOISY(logits_of(x, kind), jnp.array([2, 0]), norm_product=jnp.ones(2), key=None, where=mask)
    assert absent[0] == jnp.inf and jnp.isfinite(absent[1])
    empty = NOISY(
        logits_of(x, kind), LABELS, norm_product=jnp.ones(2), key=jax.random.key(0), where=mask & False
    )
    assert not jnp.any(empty)


# --- EMMA --------------------------------------------------------------------------------------------------


@kinds
def test_emma_numbers(kind, x64):
    f = lambda x, k: EMMA(logits_of(x, kind), LABELS, margin_lipschitz=k, radius=0.5)
    values, (g, g_k) = rows_and_gradients(f, AB, jnp.asarray(LIPSCHITZ))
    close(values, [0.861509, 1.527424])
    close(g[0] / 0.5, [-0.577476, 0.283226, 0.094278, 0.044534, 0.155438])
    # Closed forms for both rows: softmax(x') - onehot in x, softmax(x') s radius in K.
    d = AB - AB[np.arange(2), LABELS][:, None]
    s = np.clip(-d / np.maximum(LIPSCHITZ * 0.5, 1e-8), 0.01, 1)
    close(s[0], [0.01, 1, 1, 1, 1])
    p = np.asarray(jaxsoft.softmax(jnp.asarray(d + s * 0.5 * LIPSCHITZ)))
    w = np.array([[0.5], [1.5]])
    close(g, w * (p - np.eye(5)[np.asarray(LABELS)]), 1e-12)
    s[np.arange(2), LABELS] = 0  # the label's own entry is not read
    close(g_k, w * p * s * 0.5, 1e-12)


@kinds
def test_emma_between_the_bounds(kind, x64):
    """Rivals that an attack carries beyond the boundary stop there, and keep their full gradient."""
    x, y, k = jnp.array([[1.0, 0.9, 0.7, -2.0]]), jnp.array([0]), jnp.array([5.0, 2.0, 1.0, 0.5])
    f = lambda x, k: EMMA(logits_of(x, kind), y, margin_lipschitz=k, radius=1.0)
    values, (g, g_k) = rows_and_gradients(f, x, k)
    after = np.array([0, 0, 0, -2.5])
    p = np.exp(after) / np.exp(after).sum()
    close(values, np.log(np.exp(after).sum()), 1e-12)
    close(g[0], 0.5 * (p - [1, 0, 0, 0]), 1e-12)
    close(g_k, 0.5 * p * [0, 0.05, 0.3, 1], 1e-12)


@kinds
def test_emma_limits_and_masks(kind):
    x = jnp.asarray(AB, jnp.float32)
    k = jnp.asarray(LIPSCHITZ, jnp.float32)
    close(EMMA(logits_of(x, kind), LABELS, margin_lipschitz=k, radius=0.0), CE(x, LABELS))
    mask = jnp.array([True, True, False, True, True])
    y = jnp.array([0, -100])
    spoiled = k.at[:, 2].set(jnp.nan).at[1].set(jnp.nan)
    f = lambda x, k: EMMA(logits_of(x, kind), y, margin_lipschitz=k, radius=0.5, where=mask)
    value, g = jax.value_and_grad(lambda x, k: jnp.sum(f(x, k)), argnums=(0, 1))(x, spoiled)
    close(value, EMMA(x[:1, mask], y[:1], margin_lipschitz=k[:1, mask], radius=0.5)[0])
    assert all(jnp.all(jnp.isfinite(a)) and not jnp.any(a[:, 2]) and not jnp.any(a[1]) for a in g)
    absent = EMMA(logits_of(x, kind), jnp.array([2, 0]), margin_lipschitz=k, radius=0.5, where=mask)
    assert absent[0] == jnp.inf and jnp.isfinite(absent[1])


# --- AMarX -------------------------------------------------------------------------------------------------


def gaussians(seed=0, classes=4, d=3):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(classes, d, d))
    return dict(
        means=jnp.asarray(rng.normal(size=(classes, d))),
        full=jnp.asarray(roots @ roots.transpose(0, 2, 1) / d),
        weight=jnp.asarray(rng.normal(size=(d, classes))),
        bias=jnp.asarray(rng.normal(size=classes)),
        scale=jnp.asarray(1 + rng.random(classes)),
    )


def reference(means, covariances, weight, bias, scale):
    """The definition, class by class."""
    out = []
    for y in range(means.shape[0]):
        delta = weight.T - weight[:, y]
        cov = covariances[y] if covariances.ndim == 3 else jnp.diag(covariances[y])
        margin = scale[y] / 2 * jnp.einsum("ci,ij,cj->c", delta, cov, delta)
        out.append(jax.nn.logsumexp(delta @ means[y] + bias - bias[y] + margin))
    return jnp.stack(out)


def test_adaptive_margin_number(x64):
    weight = jnp.array([[1.0, 0.0, -0.5], [0.0, 1.0, 0.2]])
    means = jnp.zeros((3, 2)).at[0].set(jnp.array([0.8, 0.1]))
    covariances = jnp.zeros((3, 2, 2)).at[0].set(jnp.array([[0.2, 0.05], [0.05, 0.1]]))
    close(AMARX(means, covariances, weight)[0], 0.656822)
    close(AMARX(means, covariances, weight, variance_scale=0.0)[0], 0.589931)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_adaptive_margin_is_its_definition(kind, x64):
    g = gaussians()
    covariances = g["full"] if kind == "full" else jnp.diagonal(g["full"], axis1=1, axis2=2)
    args = (g["means"], covariances, g["weight"], g["bias"], g["scale"])
    ours = lambda m, c, w, b, s: AMARX(m, c, w, bias=b, variance_scale=s)
    w = jnp.array([0.3, -1.0, 2.0, 0.7])

    def both(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(w * f(*a)), argnums=range(5)))(*args)

    (value, gradient), (expected, expected_gradient) = both(ours), both(reference)
    close(value, expected, 1e-12)
    if kind == "full":  # symmetric: gradients of the two triangles are shared
        sym = lambda a: (a + a.transpose(0, 2, 1)) / 2
        gradient = (gradient[0], sym(gradient[1]), *gradient[2:])
        expected_gradient = (expected_gradient[0], sym(expected_gradient[1]), *expected_gradient[2:])
    jax.tree.map(lambda a, b: close(a, b, 1e-10), gradient, expected_gradient)
    close(jax.jit(ours)(*args), jax.jit(reference)(*args), 1e-12)
    mapped = jax.vmap(lambda m: ours(m, *args[1:]))(jnp.stack([args[0], 2 * args[0]]))
    close(mapped[1], ours(2 * args[0], *args[1:]), 1e-12)


def test_adaptive_margin_bounds_the_expected_cross_entropy():
    """Jensen: at least the mean cross-entropy of samples of the classes."""
    g = jax.tree.map(lambda a: a.astype(jnp.float32), gaussians(1))
    noise = jax.random.multivariate_normal(
        jax.random.key(0), g["means"][:, None], g["full"][:, None], (4, 4000)
    )
    sampled = CE(noise @ g["weight"], jnp.broadcast_to(jnp.arange(4)[:, None], (4, 4000))).mean(1)
    bound = jax.jit(AMARX)(g["means"], g["full"], g["weight"])
    at_means = AMARX(g["means"], g["full"], g["weight"], variance_scale=0.0)
    assert jnp.all(bound > sampled) and jnp.all(bound > at_means)
    close(at_means, CE(g["means"] @ g["weight"], jnp.arange(4)))


def test_adaptive_margin_masks_and_precision():
    g = jax.tree.map(lambda a: a.astype(jnp.float32), gaussians())
    where = jnp.array([True, False, True, True])
    args = [g["means"], g["full"], g["weight"].T, g["bias"], g["scale"]]
    bad = [a.at[1].set(jnp.nan) for a in args]
    f = jax.jit(lambda m, c, w, b, s, k=where: AMARX(m, c, w.T, bias=b, variance_scale=s, where=k))
    value, gradient = jax.value_and_grad(lambda *a: jnp.sum(f(*a)), argnums=range(5))(*bad)
    short = f(*(a[where] for a in args), k=None)
    close(value, jnp.sum(short), 1e-5)
    close(f(*bad)[where], short, 1e-5)
    assert f(*bad)[1] == 0
    assert all(jnp.all(jnp.isfinite(a)) and not jnp.any(a[1]) for a in gradient)
    assert not jnp.any(f(*bad, k=where & False))
    low = [a.astype(jnp.bfloat16) for a in args]
    result = f(*low, k=None)
    assert result.dtype == jnp.float32
    close(result, f(*(a.astype(jnp.float32) for a in low), k=None), 1e-4)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (dict(means=np.ones(3, np.float32)), ValueError, ["means", "(columns, d)", "(3,)"]),
        (dict(means=np.ones((3, 2), int)), TypeError, ["means", "floating", "int64"]),
        (dict(covariances=np.ones((3, 3), np.float32)), ValueError, ["covariances", "(3, 2)", "(3, 3)"]),
        (
            dict(covariances=np.ones((3, 2, 1), np.float32)),
            ValueError,
            ["covariances", "(3, 2, 2)", "(3, 2, 1)"],
        ),
        (dict(weight=np.ones((3, 2), np.float32)), ValueError, ["weight", "(2, 3)", "(3, 2)"]),
        (dict(bias=np.ones(2, np.float32)), ValueError, ["bias", "(3,)", "(2,)"]),
        (dict(variance_scale=-1.0), ValueError, ["variance_scale", ">= 0", "-1.0"]),
        (dict(variance_scale=np.ones(2, np.float32)), ValueError, ["variance_scale", "(3,)", "(2,)"]),
        (dict(where=np.ones(2, bool)), ValueError, ["where", "(3,)", "(2,)"]),
        (dict(where=np.ones(3, np.float32)), TypeError, ["where", "boolean", "float32"]),
    ],
)
def test_bad_gaussians(change, kind, words):
    given = dict(
        means=np.ones((3, 2), np.float32),
        covariances=np.ones((3, 2), np.float32),
        weight=np.ones((2, 3), np.float32),
    )
    given |= change
    fails(
        words, kind, lambda: AMARX(given.pop("means"), given.pop("covariances"), given.pop("weight"), **given)
    )
