"""Losses and fixed classifiers for embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close

import jaxsoft
from jaxsoft import losses
from jaxsoft.losses import (
    dot_regression_loss,
    etf_classifier,
    interval_quasimetric,
    l2_normalize,
    lorentz_distance,
    lorentz_from_euclidean,
    metric_mixup_loss,
    nbc_softmax_loss,
    neural_collapse_regularizer,
    prototype_logits,
    simplex_classifier,
    stationary_representation_loss,
)

RNG = np.random.default_rng(0)


# --- worked numbers --------------------------------------------------------------------------------------


def test_fixed_classifiers(x64):
    for k in (2, 5):
        gram = np.full((k, k), -1 / (k - 1)) + np.eye(k) * k / (k - 1)
        simplex = simplex_classifier(k, dtype=jnp.float64)
        assert simplex.shape == (k - 1, k)
        close(simplex.T @ simplex, gram, 1e-12)
        for dim in (k - 1, 9):
            etf = etf_classifier(jax.random.key(k), k, dim, dtype=jnp.float64)
            assert etf.shape == (dim, k)
            close(etf.T @ etf, gram, 1e-6)
    assert simplex_classifier(3, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert etf_classifier(jax.random.key(0), 3, 4, dtype=jnp.float16).dtype == jnp.float16
    one, two = (etf_classifier(jax.random.key(s), 4, 6) for s in (0, 1))
    assert np.max(np.abs(one - two)) > 0.1
    # Two ways to make the simplex: rotations of each other.
    m = np.sqrt(4 / 3) * (np.eye(4) - 1 / 4)
    close(m[0], [0.866025, -0.288675, -0.288675, -0.288675])
    h = jnp.array([[0.8, 0.1, -0.2, -0.7]])
    close(dot_regression_loss(h, jnp.array([0]), jnp.asarray(m)), [0.011192])
    close(dot_regression_loss(10 * h, jnp.array([0]), jnp.asarray(m)), [0.011192])


def test_nbc_softmax(x64):
    centres, y = jnp.array([[1, 0], [0.6, 0.8], [0, 1.0]]), jnp.array([0, 1, 3])
    close(nbc_softmax_loss(centres, y, 5), 0.232620)
    # The mean of a class's vectors counts at any length; absent classes do not.
    h = jnp.concatenate([centres * 3 + 0.25, centres * 3 - 0.25])
    close(nbc_softmax_loss(h, jnp.tile(y, 2), 5), 0.232620)
    close(nbc_softmax_loss(h, jnp.tile(y, 2), 10), 0.232620 / 2)
    s = np.exp(0.2 * np.array([0.6, 0.0, 0.8]))
    close(
        nbc_softmax_loss(centres, y, 5, diag="exclude"),
        np.log([s[0] + s[1], s[0] + s[2], s[1] + s[2]]).mean() / 5,
    )
    for diag in ("repo", "exclude"):
        value, g = jax.value_and_grad(lambda h, d=diag: nbc_softmax_loss(h, jnp.zeros(3, int), 5, diag=d))(
            centres
        )
        assert value == 0 and np.all(g == 0)


def test_neural_collapse(x64):
    h = jnp.array([[1, 0.2], [0.8, 0], [0, 1], [0.2, 1.2], [-1, 0], [-1, -0.4]])
    y = jnp.array([0, 0, 1, 1, 2, 2])
    close(neural_collapse_regularizer(h, y, 3), [0.026667, 0.067954])
    close(neural_collapse_regularizer(h, 2 * y, 6), [0.026667, 0.067954])
    collapsed = simplex_classifier(4, dtype=jnp.float64).T
    close(
        neural_collapse_regularizer(jnp.tile(3 * collapsed + 1, (2, 1)), jnp.tile(jnp.arange(4), 2), 4),
        [0, 0],
        1e-12,
    )
    within, between = neural_collapse_regularizer(h, jnp.zeros(6, int), 3)
    close(within, np.asarray(h).var(0).sum(), 1e-12)
    assert between == 0


def test_stationary_representation(x64):
    new = jnp.array([[1, 0], [0, 1], [0.8, 0.6]])
    old = jnp.array([[0.9, 0.435890], [0.1, 0.994987], [0.6, 0.8]])
    y = jnp.array([0, 1, 0])
    logits = jnp.asarray(RNG.normal(size=(3, 4)))
    for mode, value in (("repo", -3.130286), ("clean", 0.078124)):
        hoc = stationary_representation_loss(logits, y, new, old, mixture=0.0, mode=mode)
        close(hoc.mean(), value, 3e-6)  # the features are given to six digits
        ce = losses.cross_entropy(logits, y)
        close(stationary_representation_loss(logits, y, new, old, mode=mode), 0.1 * ce + 0.9 * hoc, 1e-12)
        close(stationary_representation_loss(logits, y, new, old, mixture=1.0, mode=mode), ce, 1e-12)
    # Logits as an expression of the features.
    h, w = jnp.asarray(RNG.normal(size=(3, 3))), simplex_classifier(4, dtype=jnp.float64)
    f = functools.partial(stationary_representation_loss, labels=y, features=h, old_features=h)
    close(f(jaxsoft.linear_logits(h, w)), f(h @ w), 1e-12)
    # No image of another class: nothing to be told from.
    alone = stationary_representation_loss(logits, jnp.zeros(3, int), new, old, mixture=0.0)
    close(alone, np.zeros(3), 0)


def test_mixup(x64):
    close(metric_mixup_loss(jnp.array(0.7), jnp.array(0.6)), 0.42)
    d = jnp.array([0.1, 0.4, 0.7])
    close(metric_mixup_loss(d, jnp.array(1.0), positive_margin=0.3), [0, 0.1, 0.4])
    close(metric_mixup_loss(d, jnp.array(0.0)), [0.4, 0.1, 0])
    g = jax.grad(lambda d: metric_mixup_loss(d, jnp.full(3, 0.25)).sum())(d)
    close(g, [0.25 - 0.75, 0.25 - 0.75, 0.25])


def test_prototypes(x64):
    x = jnp.array([[0.6, 0.8], [1, 0]])
    means, counts = jnp.array([[2, 0], [1, 1], [0, 0.5], [9, 9]]), jnp.array([3, 2, 1, 0])
    logits = prototype_logits(x, means * counts[:, None], counts)
    close(logits.dense()[0], [0.6, 0.989949, 0.8, -np.inf])
    # An empty class is absent to every loss, also if its sum is NaN.
    sums = (means * counts[:, None]).at[3].set(jnp.nan)
    f = lambda x, s: losses.cross_entropy(prototype_logits(x, s, counts, scale=4.0), jnp.array([0, 2])).sum()
    value, g = jax.value_and_grad(f, (0, 1))(x, sums)
    dense = 4 * np.array([[0.6, 1.4 / np.sqrt(2), 0.8], [1, np.sqrt(0.5), 0]])
    close(value, (np.log(np.exp(dense).sum(1)) - [dense[0, 0], dense[1, 2]]).sum())
    assert np.isfinite(g[0]).all() and np.isfinite(g[1]).all() and np.all(g[1][3] == 0)
    close(f(x, sums / 7), value, 1e-12)  # sums or means, all the same
    assert prototype_logits(x, sums, counts.astype(float), scale=2.0).shape == (2, 4)


# --- interval quasimetric ----------------------------------------------------------------------------------


def test_intervals(x64):
    x, y = jnp.array([[0, 1, 3], [-1, 0, 2.0]]), jnp.array([[2, 1.5, 2.5], [0.5, 1, 2.2]])
    close(interval_quasimetric(x, y), 2.126894)
    close(interval_quasimetric(y, x), 0.317235)
    close([interval_quasimetric(x, y, reduction=r) for r in ("sum", "max", "mean")], [4.2, 2.2, 2.1])
    close(jax.nn.sigmoid(-1.0), 0.268941)
    g = jax.grad(lambda x, y: interval_quasimetric(x, y, reduction="sum"), (0, 1))(x, y)
    close(g[0], [[-1, 0, 0], [-1, 0, -1]], 0)  # the ends that nothing covers
    close(g[1], [[1, 0, 0], [0, 1, 1]], 0)
    close(interval_quasimetric(x, y, raw_alpha=jnp.array(30.0)), 2.2)


def test_intervals_are_a_quasimetric(x64):
    x, y, z = jnp.asarray(RNG.normal(size=(3, 20, 4, 6)))
    x = x.at[:5, :, :3].set(y[:5, :, :3])  # ends that meet
    d = jax.jit(interval_quasimetric)
    assert jnp.all(d(x, z) <= d(x, y) + d(y, z) + 1e-12)
    assert jnp.all(d(x, y) > 0) and jnp.any(jnp.abs(d(x, y) - d(y, x)) > 0.1)
    close(d(x, x), np.zeros(20), 0)
    close(d(3 * x, 3 * y), 3 * d(x, y), 1e-12)
    assert d(x[:, None], z).shape == (20, 20)
    close(d(x[:, None], z)[3, 7], d(x[3], z[7]), 1e-12)
    grid = np.linspace(-5, 5, 20001)  # the union, by brute force
    inside = (np.asarray(x)[..., None] <= grid) & (grid < np.asarray(y)[..., None])
    length = np.any(inside, axis=-2).sum(-1) * (grid[1] - grid[0])
    close(interval_quasimetric(x, y, reduction="sum"), length.sum(-1), 2e-2)
    g = jax.grad(lambda x: interval_quasimetric(x, x + 0).sum())(x)
    assert np.all(g == 0)


# --- hyperbolic space --------------------------------------------------------------------------------------


def test_hyperboloid(x64):
    close(lorentz_from_euclidean(jnp.array([0.3, 0.4])), [1.127626, 0.312657, 0.416876])
    v = jnp.asarray(RNG.normal(size=(6, 3)))
    v = (
        v.at[0]
        .set(0)
        .at[1]
        .mul(1e-9)
        .at[2]
        .mul(0.099 / jnp.linalg.norm(v[2]))
        .at[3]
        .mul(0.101 / jnp.linalg.norm(v[3]))
    )
    p = lorentz_from_euclidean(v)
    close(jnp.sum(p[:, 1:] ** 2, 1) - p[:, 0] ** 2, -np.ones(6), 1e-11)
    r = np.linalg.norm(v, axis=1)
    origin = lorentz_from_euclidean(jnp.zeros(3))
    close(lorentz_distance(origin, p), r, 1e-12)
    close(p[1:, 0], np.cosh(r[1:]), 1e-14)
    close(p[1:, 1:], np.sinh(r[1:, None]) * v[1:] / r[1:, None], 1e-14)
    g = jax.jacobian(lorentz_from_euclidean)(jnp.zeros(3))
    close(g, np.concatenate([np.zeros((1, 3)), np.eye(3)]), 0)
    # Points that are equal, and beyond the cap.
    d, g = jax.value_and_grad(lorentz_distance)(p[4], p[4])
    assert d == 0 and np.all(g == 0)
    far = lorentz_from_euclidean(jnp.array([[60.0, 80.0], [6.0, 8.0]]), max_norm=10.0)
    close(far[0], far[1], 1e-9)
    # By the angle: cosh d = cosh r cosh s - sinh r sinh s cos(angle).
    a, b = v[4], v[5]
    ra, rb = np.linalg.norm(a), np.linalg.norm(b)
    cosh = np.cosh(ra) * np.cosh(rb) - np.sinh(ra) * np.sinh(rb) * (a @ b) / (ra * rb)
    close(lorentz_distance(p[4], p[5]), np.arccosh(cosh), 1e-12)


def test_hyperbolic_distances_in_float32():
    """Near points far out, far points, and a distance to the origin: each by the form that does not cancel."""
    near, out = np.array([[8.0, 0.0], [8.0, 0.001]]), np.array([[35.0, 0.0], [-35.0, 0.1]])
    for a, b in (near, out, (np.zeros(2), near[0])):
        with float64():
            exact = float(lorentz_distance(*(lorentz_from_euclidean(jnp.asarray(v)) for v in (a, b))))
        value = lorentz_distance(*(lorentz_from_euclidean(jnp.asarray(v, jnp.float32)) for v in (a, b)))
        np.testing.assert_allclose(value, exact, rtol=3e-3)
    g = jax.grad(lambda v: lorentz_distance(lorentz_from_euclidean(v), lorentz_from_euclidean(-v)))(
        jnp.array([30.0, 50.0])
    )
    assert np.isfinite(g).all()


# --- laws ------------------------------------------------------------------------------------------------

N, D, K = 6, 3, 4
Y = jnp.array([0, 1, 2, 1, 0, 3])
POINTS = RNG.normal(size=(2, N, D))
VECTORS = RNG.normal(size=(D, K))
LOGITS = RNG.normal(size=(N, K))
LAWS = {
    "nbc": (lambda h, **o: nbc_softmax_loss(h, Y, K, **o), POINTS[:1]),
    "nbc exclude": (lambda h, **o: nbc_softmax_loss(h, Y, K, diag="exclude", scale=2.0, **o), POINTS[:1]),
    "collapse": (lambda h, **o: jnp.stack(neural_collapse_regularizer(h, Y, K, **o)), POINTS[:1]),
    "stationary": (
        lambda *a, **o: stationary_representation_loss(LOGITS.astype(a[0].dtype), Y, *a, **o),
        POINTS,
    ),
    "stationary repo": (
        lambda *a, **o: stationary_representation_loss(LOGITS.astype(a[0].dtype), Y, *a, mode="repo", **o),
        POINTS,
    ),
    "dot": (
        lambda h, **o: dot_regression_loss(h, Y, jnp.asarray(l2_normalize(VECTORS, axis=0), h.dtype), **o),
        POINTS[:1],
    ),
    "mixup": (
        lambda d, **o: metric_mixup_loss(d, jnp.linspace(0.1, 0.9, N, dtype=d.dtype), **o),
        np.abs(POINTS[:1, :, 0]),
    ),
    "intervals": (lambda x, y: interval_quasimetric(x.reshape(3, 2, D), y.reshape(3, 2, D)), POINTS),
    "lorentz": (lambda a, b: lorentz_distance(*map(lorentz_from_euclidean, (a, b))), POINTS),
}
every = pytest.mark.parametrize("name", LAWS)
MASKED = [name for name in LAWS if name not in ("intervals", "lorentz")]


@pytest.mark.table
@every
def test_jit_vmap_and_gradients(name, x64):
    f, args = LAWS[name]
    args = tuple(map(jnp.asarray, args))
    out = f(*args)
    close(jax.jit(f)(*args), out, 1e-12)
    stacked = tuple(jnp.stack([a, 2 * a + 0.1]) for a in args)
    close(jax.jit(jax.vmap(f))(*stacked)[1], f(*(a[1] for a in stacked)), 1e-12)
    g = jnp.asarray(RNG.normal(size=out.shape))
    direction = tuple(jnp.asarray(RNG.normal(size=a.shape)) for a in args)
    along = jax.jit(lambda t: jnp.sum(g * f(*(a + t * d for a, d in zip(args, direction)))))
    slope = (along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(along))(0.0), slope, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(jax.jvp(along, (0.0,), (1.0,))[1], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.table
@every
def test_half_precision(name):
    f, args = LAWS[name]
    half = tuple(jnp.asarray(a, jnp.bfloat16) for a in args)
    value, pullback = jax.vjp(f, *half)
    with float64():
        exact = np.asarray(f(*(jnp.asarray(np.asarray(a, np.float64)) for a in half)))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(value, np.float64), exact, rtol=1e-2, atol=2e-2)
    assert all(g.dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(g)) for g in pullback(jnp.ones_like(value)))


@pytest.mark.table
@pytest.mark.parametrize("name", MASKED)
def test_what_does_not_count_is_absent(name, x64):
    f, args = LAWS[name]
    args = tuple(map(jnp.asarray, args))
    where = jnp.array([True, True, True, True, True, False])
    f_where = jax.jit(lambda *a: f(*a, where=where))
    value = f_where(*args)
    for junk in (jnp.nan, jnp.inf):
        spoiled = tuple(a.at[5].set(junk) for a in args)
        close(f_where(*spoiled), value, 0)
        gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(f_where(*a))), tuple(range(len(args))))(*spoiled)
        assert all(jnp.all(g[5] == 0) and jnp.all(jnp.isfinite(g)) for g in gradients)
    spoiled = tuple(jnp.full_like(a, jnp.nan) for a in args)
    nothing = jax.value_and_grad(lambda *a: jnp.sum(f(*a, where=jnp.zeros(N, bool))), tuple(range(len(args))))
    value, gradients = nothing(*spoiled)
    assert value == 0 and all(jnp.all(g == 0) for g in gradients)


def test_a_mask_is_a_smaller_batch(x64):
    where, h, old = jnp.arange(N) < 4, jnp.asarray(POINTS[0]), jnp.asarray(POINTS[1])
    for diag in ("repo", "exclude"):
        small = nbc_softmax_loss(h[:4], Y[:4], K, diag=diag)
        close(nbc_softmax_loss(h, Y, K, diag=diag, where=where), small, 1e-12)
    small = neural_collapse_regularizer(h[:4], Y[:4], K)
    close(neural_collapse_regularizer(h, Y, K, where=where), small, 1e-12)
    for mode in ("clean", "repo"):
        f = functools.partial(stationary_representation_loss, mode=mode)
        small = f(jnp.asarray(LOGITS[:4]), Y[:4], h[:4], old[:4])
        close(f(jnp.asarray(LOGITS), Y, h, old, where=where)[:4], small, 1e-12)


def test_labels():
    h, m = jnp.asarray(POINTS[0], jnp.float32), simplex_classifier(D + 1)
    bad = Y.at[2].set(K)
    for f in (
        lambda h, y, **o: nbc_softmax_loss(h, y, K, **o),
        lambda h, y, **o: neural_collapse_regularizer(h, y, K, **o)[0],
        lambda h, y, **o: neural_collapse_regularizer(h, y, K, **o)[1],
    ):
        value, g = jax.value_and_grad(f)(h, bad)
        assert jnp.isnan(value) and jnp.all(jnp.isnan(g))
        assert jnp.isfinite(f(h, bad, where=jnp.arange(N) != 2))
    labels = jnp.array([0, -100, K, -1, 2, 3])
    f = lambda h: dot_regression_loss(h, labels, m, weights=jnp.arange(6.0))
    value, pullback = jax.vjp(f, h.at[1].set(jnp.nan))
    np.testing.assert_array_equal(jnp.isnan(value), [False, False, True, True, False, False])
    (g,) = pullback(jnp.ones(6))
    np.testing.assert_array_equal(jnp.isnan(g).all(1), [False, False, True, True, False, False])
    assert value[1] == 0 and np.all(g[1] == 0)
    plain = dot_regression_loss(h, jnp.clip(labels, 0, K - 1), m)
    np.testing.assert_allclose(value[4:], np.array([4, 5]) * plain[4:], rtol=1e-6)
    ignored = dot_regression_loss(h, Y, m, ignore_index=0)
    assert ignored[0] == 0 and ignored[1] > 0 and dot_regression_loss(h, Y, m, ignore_index=None)[0] > 0
    # Its gradient is tangential: (m_y . h - 1) m_y without its part along h.
    g = jax.grad(lambda h: dot_regression_loss(h, Y, m).sum())(h)
    unit = l2_normalize(h)
    pull = (jnp.sum(m.T[Y] * unit, 1, keepdims=True) - 1) * m.T[Y]
    tangent = pull - jnp.sum(pull * unit, 1, keepdims=True) * unit
    close(g, tangent / jnp.linalg.norm(h, axis=1, keepdims=True), 1e-5)


H, OLD = np.ones((N, D), np.float32), np.ones((N, D), np.float32)
L, IDS = np.ones((N, K), np.float32), np.zeros(N, np.int32)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: simplex_classifier(1), ValueError, "num_classes .* >= 2"),
        (lambda: simplex_classifier(2.5), TypeError, "num_classes .* integer"),
        (lambda: etf_classifier(jax.random.key(0), 5, 3), ValueError, "dim .* >= 4"),
        (lambda: nbc_softmax_loss(H, IDS, K, scale=0), ValueError, "scale .* > 0"),
        (lambda: nbc_softmax_loss(H, IDS, K, diag="zero"), ValueError, "diag .* 'zero'"),
        (lambda: nbc_softmax_loss(H[0], IDS, K), ValueError, r"embeddings .* \[n, d\]"),
        (lambda: nbc_softmax_loss(H, IDS[:2], K), ValueError, "labels .* got shape"),
        (lambda: nbc_softmax_loss(H, IDS > 0, K), TypeError, "labels .* integer"),
        (lambda: nbc_softmax_loss(H, IDS, K, where=IDS), TypeError, "where .* boolean"),
        (lambda: neural_collapse_regularizer(H, IDS, 0), ValueError, "num_classes .* >= 1"),
        (lambda: neural_collapse_regularizer(IDS, IDS, K), TypeError, "features .* floating"),
        (lambda: stationary_representation_loss(L, IDS, H, OLD, mixture=2), ValueError, "mixture .* <= 1"),
        (lambda: stationary_representation_loss(L, IDS, H, OLD, scale=-1), ValueError, "scale .* > 0"),
        (lambda: stationary_representation_loss(L, IDS, H, OLD, mode="x"), ValueError, "mode .* 'x'"),
        (lambda: stationary_representation_loss(L, IDS, H, OLD[:, :2]), ValueError, "old_features"),
        (lambda: stationary_representation_loss(L[:2], IDS, H, OLD), ValueError, "labels|where"),
        (lambda: dot_regression_loss(H, IDS, np.ones((2, K), np.float32)), ValueError, "share d"),
        (lambda: dot_regression_loss(H, L, np.ones((D, K), np.float32)), TypeError, "labels .* integer"),
        (lambda: dot_regression_loss(H, IDS, np.ones((D, K), np.float32), weights=L), ValueError, "weights"),
        (lambda: dot_regression_loss(H, IDS, np.ones((D, K), np.float32), where=L > 0), ValueError, "where"),
        (lambda: prototype_logits(H, H[0], IDS), ValueError, "class_sums"),
        (lambda: prototype_logits(H, H, IDS[:2]), ValueError, "class_counts .* got shape"),
        (lambda: prototype_logits(H, H, 3), TypeError, "class_counts .* array"),
        (lambda: metric_mixup_loss(H, IDS), TypeError, "mixture .* floating"),
        (lambda: metric_mixup_loss(H, L), ValueError, "mixture .* broadcast"),
        (lambda: metric_mixup_loss(H, H, where=H), TypeError, "where .* boolean"),
        (lambda: interval_quasimetric(H, OLD, reduction="min"), ValueError, "reduction .* 'min'"),
        (lambda: interval_quasimetric(H[0], OLD), ValueError, r"x .* \[\*batch, k, l\]"),
        (lambda: interval_quasimetric(H, L), ValueError, "share the axes"),
        (lambda: interval_quasimetric(np.ones((2, N, D)), np.ones((3, N, D))), ValueError, "broadcast"),
        (lambda: lorentz_from_euclidean(IDS), TypeError, "v .* floating"),
        (lambda: lorentz_from_euclidean(H, max_norm=0), ValueError, "max_norm .* > 0"),
        (lambda: lorentz_distance(H, L), ValueError, "broadcast"),
        (lambda: lorentz_distance(H[:, :1], H), ValueError, r"a .* d \+ 1"),
    ],
)
def test_bad_arguments(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
