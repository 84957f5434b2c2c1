"""ODIN, Gaussians, centroids, the memory of neighbours, naive Bayes: the specs' numbers, scikit-learn, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close, fails, near
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier

import jaxsoft
from jaxsoft import calibration

W = np.array([[1, 0.5, -1], [-1, 2, 0.3]])
FEATURES = np.array([[0, 0], [1, 0], [0, 1], [4, 4], [5, 4], [4, 6.0]])
LABELS = np.array([0, 0, 0, 1, 1, 1], np.int32)


def test_odin(x64):
    x = jnp.array([[0.6, 0.2]])
    odin = lambda x, t, eps, **o: calibration.odin_score(lambda x: x @ W, x, temperature=t, eps=eps, **o)
    scores = jax.jit(
        lambda x: (odin(x, 1000.0, 0.0014), odin(x, 1000.0, 0.0), odin(x, 2.0, 0.05), odin(x, 2.0, 0.0))
    )
    close(jnp.concatenate(scores(x)), [0.333505, 0.333504, 0.433812, 0.416901], 5e-7)

    @jax.jit
    def moved(x):
        best = lambda x: jnp.log(calibration.max_softmax_probability(x @ W))
        first = lambda x: x[..., 0]
        streamed = lambda x: jaxsoft.linear_logits(x, jnp.asarray(W))
        move = calibration.perturb_inputs
        return (
            move(best, x, eps=0.05),
            move(best, x, eps=0.05, std=jnp.array([0.5, 2.0])),
            move(first, x, eps=0.1),  # a gradient of 0
            move(first, x, eps=0.1, zero_as_positive=True),
            calibration.odin_score(streamed, x, temperature=2.0, eps=0.05),
        )

    expected = [[[0.65, 0.25]], [[0.7, 0.225]], [[0.7, 0.2]], [[0.7, 0.1]], [0.433812]]
    for got, wanted in zip(moved(x), expected):
        close(got, wanted, 5e-7)


def test_gaussians(x64):
    fit = jax.jit(
        lambda x, y, where=None: calibration.fit_class_gaussians(x, y, classes=2, ridge=0.0, where=where)
    )
    fitted = fit(FEATURES, LABELS)
    close(fitted.mean, [[0.333333, 0.333333], [4.333333, 4.666667]], 5e-7)
    close(fitted.cholesky @ fitted.cholesky.T, [[0.222222, -0.166667], [-0.166667, 0.555556]], 5e-7)
    score = jax.jit(lambda x, g: calibration.mahalanobis_score(x, g, per_class=True))
    close(score(np.ones(2), fitted), [-2.580645, -69.161290], 1e-6)
    close(calibration.mahalanobis_score(jnp.ones((3, 2)), fitted), [-2.580645] * 3, 1e-6)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 3)) + 100, rng.integers(0, 2, 40)
    x = np.concatenate([x, np.full((2, 3), np.nan)])  # absent
    fitted = fit(x, np.append(y, [0, 5]), np.arange(42) < 40)
    lda = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True).fit(x[:40], y)
    near(fitted.mean, lda.means_, 1e-12)
    near(fitted.cholesky @ fitted.cholesky.T, lda.covariance_, 1e-10)
    apart = x[:40, None] - lda.means_
    expected = -0.5 * np.einsum("nci,ij,ncj->nc", apart, np.linalg.inv(lda.covariance_), apart)
    near(score(x[:40], fitted), expected, 1e-9)


def test_gaussians_of_few_examples():
    """One class alone, more features than examples with a ridge, no examples, a label out of range; far from 0."""

    @functools.partial(jax.jit, static_argnames="ridge")
    def scores(x, y, where, ridge=1e-6):
        fitted = calibration.fit_class_gaussians(x, y, classes=3, ridge=ridge, where=where)
        return calibration.mahalanobis_score(x, fitted, per_class=True)

    x, every = jnp.asarray(FEATURES, jnp.float32), np.ones(6, bool)
    one = scores(x, np.zeros(6, np.int32), every)
    assert np.all(np.isfinite(one[:, 0])) and np.all(one[:, 1:] == -np.inf)
    assert np.all(scores(x, LABELS, ~every) == -np.inf)
    assert np.all(np.isnan(scores(x, LABELS + 2, every)[:, 2]))
    near(scores(x + 64, LABELS, every), scores(x, LABELS, every), 1e-4)
    wide = jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)), jnp.float32)
    assert np.all(np.isfinite(scores(wide, LABELS, every, ridge=1e-2)[:, :2]))


def test_centroids(x64):
    p = np.array(
        [[0.9, 0.05, 0.05], [0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.1, 0.3], [0, 0, 1]]
    )
    y = np.array([0, 0, 2, 1, 0, 7])
    where = np.arange(6) < 5
    fitted = jax.jit(lambda p, y, where: calibration.fit_softmax_centroids(p, y, where=where))(p, y, where)
    first = p[[0, 1, 4]].mean(0)
    near(fitted.centroid, [first, p[3], [0, 0, 0]], 1e-12)
    near(fitted.threshold[0], np.linalg.norm(p[2] - first), 1e-12)
    assert fitted.threshold[1] == np.inf and fitted.threshold[2] == 0
    result = calibration.softmax_centroid_distance(jnp.asarray(p[3:]), fitted)
    near(result.distance, [0, np.linalg.norm(p[4] - first), 1], 1e-12)
    np.testing.assert_array_equal(result.distance < result.threshold, [True, True, False])
    worked = calibration.SoftmaxCentroids(jnp.array([[0.9, 0.05, 0.05]] * 3), jnp.ones(3))
    close(calibration.softmax_centroid_distance(jnp.array([0.7, 0.2, 0.1]), worked).distance, 0.254951, 5e-7)


def test_memory(x64):
    stored = jnp.array([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    memory = calibration.KnnMemory(stored, jnp.array([0, 0, 1, 1], jnp.int32), jnp.int32(0))
    scores = calibration.knn_memory_logits(memory, jnp.array([1.2, 1.6]), classes=2, k=3)
    close(scores, [0.835762, 0.164258], 5e-7)
    close(calibration.max_softmax_probability(scores), 0.661840, 5e-7)

    rng = np.random.default_rng(0)
    x, y, new = rng.normal(size=(20, 4)), rng.integers(0, 3, 20), rng.normal(size=(6, 4))
    empty = calibration.knn_memory_init(32, 4, dtype=jnp.float64)
    fill = jax.jit(lambda memory, x, y: calibration.knn_memory_update(memory, x, y, classes=3))
    memory = fill(empty, x, y)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    neighbours = KNeighborsClassifier(5, weights=lambda d: np.exp((1 - d * d / 2) / 0.1)).fit(unit(x), y)
    logits = jax.jit(
        lambda memory, x: [calibration.knn_memory_logits(memory, x, classes=3, k=k) for k in (5, 32)]
    )
    got, more = logits(memory, new)
    near(got, np.minimum(neighbours.predict_proba(unit(new)) + 1e-5, 1), 1e-9)

    # Fewer stored than asked for, none stored
    near(more.sum(-1), 1 + 3e-5, 1e-9)
    near(logits(empty, new)[0], 1e-5, 1e-12)


def test_the_memory_is_a_ring(x64):
    update = jax.jit(
        lambda memory, x, beta: calibration.knn_memory_update(memory, x, classes=2, k=2, beta=beta)
    )
    memory = calibration.knn_memory_init(3, 2, dtype=jnp.float64)
    start = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    memory = memory._replace(
        features=memory.features.at[:2].set(start),
        labels=jnp.array([0, 1, -1], jnp.int32),
        position=jnp.int32(2),
    )
    x = jnp.array([[3.0, 0.1], [1.0, 1.0], [0.1, 2.0]])
    same = update(memory, x, 1.1)  # never
    assert all(np.array_equal(a, b) for a, b in zip(same, memory))
    later = update(memory, x, 0.7)  # not the one between the classes
    np.testing.assert_array_equal(later.labels, [1, 1, 0])
    assert later.position == 1
    near(
        later.features, np.stack([x[2] / jnp.linalg.norm(x[2]), [0, 1], x[0] / jnp.linalg.norm(x[0])]), 1e-12
    )


def test_naive_bayes(x64):
    mean, variance, prior = jnp.array([[0.0, 0.0], [1.0, 2.0]]), jnp.array([0.5, 1.0]), jnp.array([0.4, 0.6])
    logits = calibration.naive_bayes_logits(jnp.array([0.5, 1.5]), mean, variance, prior)
    close(logits, [-2.291291, -0.885826], 5e-7)
    close(jax.nn.softmax(logits), [0.196950, 0.803050], 5e-7)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    linear = x @ (mean / variance).T + jnp.log(prior) - (mean**2 / variance).sum(-1) / 2
    ours = calibration.naive_bayes_logits(x, mean, variance, prior)
    near(jax.nn.softmax(ours), jax.nn.softmax(linear), 1e-12)


def test_bad_input():
    x, y = FEATURES.astype(np.float32), LABELS
    fit = calibration.fit_class_gaussians
    fails(["features", "floating"], TypeError, lambda: fit(y, y, classes=2))
    fails(["features", "[examples, d]"], ValueError, lambda: fit(x[0], y, classes=2))
    fails(["labels", "(6,)"], ValueError, lambda: fit(x, y[:2], classes=2))
    fails(["classes", ">= 1"], ValueError, lambda: fit(x, y, classes=0))
    fails(["ridge", ">= 0"], ValueError, lambda: fit(x, y, classes=2, ridge=-1.0))
    fails(["where", "(6,)"], ValueError, lambda: fit(x, y, classes=2, where=np.ones(2, bool)))
    gaussians = calibration.ClassGaussians(np.ones((2, 2)), np.eye(2), np.ones(2))
    fails(
        ["features", "[*rows, 2]"], ValueError, lambda: calibration.mahalanobis_score(np.ones(3), gaussians)
    )
    fails(["labels", "integer"], TypeError, lambda: calibration.fit_softmax_centroids(x, x[:, 0]))
    centroids = calibration.SoftmaxCentroids(np.eye(2), np.ones(2))
    fails(
        ["probabilities", "[*rows, 2]"],
        ValueError,
        lambda: calibration.softmax_centroid_distance(np.ones(3), centroids),
    )
    memory = calibration.knn_memory_init(3, 2)
    fails(["size", ">= 1"], ValueError, lambda: calibration.knn_memory_init(0, 2))
    logits, update = calibration.knn_memory_logits, calibration.knn_memory_update
    fails(["k", ">= 1"], ValueError, lambda: logits(memory, x, classes=2, k=0))
    fails(["temperature", "> 0"], ValueError, lambda: logits(memory, x, classes=2, temperature=0.0))
    fails(["features", "[*rows, 2]"], ValueError, lambda: logits(memory, np.ones(3), classes=2))
    fails(["features", "at most 3 rows"], ValueError, lambda: update(memory, x, classes=2))
    fails(["labels", "(2,)"], ValueError, lambda: update(memory, x[:2], y[:1], classes=2))
    perturb = calibration.perturb_inputs
    fails(["inputs", "floating"], TypeError, lambda: perturb(jnp.sum, y))
    fails(["std", "> 0"], ValueError, lambda: perturb(jnp.sum, x, std=0.0))
    fails(["std", "broadcast"], ValueError, lambda: perturb(jnp.sum, x, std=np.ones(3)))
    fails(["zero_as_positive", "True or False"], TypeError, lambda: perturb(jnp.sum, x, zero_as_positive=1))
    fails(["temperature", "> 0"], ValueError, lambda: calibration.odin_score(jnp.sum, x, temperature=0.0))
    bayes = calibration.naive_bayes_logits
    fails(["mean", "[classes, d]"], ValueError, lambda: bayes(x, x[0], x[0], x[0]))
    fails(["variance", "(2,)"], ValueError, lambda: bayes(x, x, x[:, 0], x[:, 0]))
    fails(["prior", "(6,)"], ValueError, lambda: bayes(x, x, x[0], x[0]))
