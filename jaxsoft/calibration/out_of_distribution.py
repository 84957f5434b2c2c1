"""Scores of features and inputs for out-of-distribution detection, and classifiers by distance.

All scores are higher for inputs that the model knows; other libraries use the opposite sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide
from jaxsoft.calibration.scores import max_softmax_probability, top_log_probability
from jaxsoft.normalizers import softmax
from jaxsoft.rows import Logits, temperature
from jaxsoft.rows.inner import check_range


def perturb_inputs(
    score_fn: Callable[[Array], Array],
    inputs: Float[Array, ...],
    *,
    eps: float = 0.0014,
    std: float | Float[Array, ...] = 1.0,
    zero_as_positive: bool = False,
) -> Float[Array, ...]:
    """`inputs + eps * sign(d score / d inputs) / std`: a small step that makes the inputs look better known.

    It raises the score of known inputs more than that of unknown ones.

    Args:
      score_fn: a function from the inputs to one score per input, higher = better known.
      inputs: floats of any shape.
      eps: the size of the step.
      std: the standard deviations by which inputs were normalized, so that the step has one size in the raw inputs; a
        positive number or an array that broadcasts to the inputs.
      zero_as_positive: whether entries with gradient 0 move down, as in the published code of ODIN, or not at all.

    Returns:
      Inputs of the same shape and dtype.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: a `std` of a wrong shape or out of range.

    Reference:
      Liang et al., "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import perturb_inputs
      >>> print(perturb_inputs(lambda x: -(x**2).sum(-1), jnp.array([[0.5, -0.5]]), eps=0.1))
      [[ 0.4 -0.4]]
    """
    _checks.floating("inputs", inputs)
    _checks.number("eps", eps)
    _checks.flag("zero_as_positive", zero_as_positive)
    if _checks.is_concrete_number(std):
        _checks.number("std", std, above=0)
    else:
        _checks.floating("std", std)
        _checks.broadcastable("std", std, inputs.shape, "the shape of the inputs")
    dtype = accumulation_dtype(inputs.dtype)
    x = jnp.asarray(inputs, dtype)
    gradient = jax.grad(lambda x: jnp.sum(score_fn(x).astype(dtype)))(x)
    # By the gradient of the loss, which is minus the score
    direction = jnp.where(gradient > 0, 1, -1) if zero_as_positive else jnp.sign(gradient)
    return (x + eps * direction / jnp.asarray(std, dtype)).astype(inputs.dtype)


def odin_score(
    apply_fn: Callable[[Array], Logits],
    inputs: Float[Array, ...],
    *,
    temperature: float = 1000.0,
    eps: float = 0.0014,
    std: float | Float[Array, ...] = 1.0,
    zero_as_positive: bool = False,
) -> Float[Array, "*rows"]:
    """ODIN: `max_j softmax(x' / T)_j` at inputs that `perturb_inputs` has moved towards the predicted class.

    Computed in float32 at least: at the temperature 1000, gradients are a thousand times smaller.

    Args:
      apply_fn: a function from inputs to logits `[*rows, classes]`, an array or `linear_logits`.
      inputs: floats of any shape.
      temperature: T, positive; 1000 in the paper.
      eps: the size of the step, 0.0014 in the paper for its networks.
      std: see `perturb_inputs`.
      zero_as_positive: see `perturb_inputs`.

    Returns:
      `[*rows]`, float32 or wider, higher for inputs that the model knows.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument out of range.

    Reference:
      Liang et al., "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import odin_score
      >>> weight = jnp.array([[1.0, 0.5, -1.0], [-1.0, 2.0, 0.3]])
      >>> print(odin_score(lambda x: x @ weight, jnp.array([0.6, 0.2]), temperature=2.0, eps=0.05).round(6))
      0.433812
    """
    _checks.number("temperature", temperature, above=0)

    def tempered(x):
        logits = apply_fn(x)
        t = jnp.asarray(temperature, accumulation_dtype(logits.dtype))
        return _temperature(logits, t)

    moved = perturb_inputs(
        lambda x: top_log_probability(tempered(x), -1, None),
        inputs,
        eps=eps,
        std=std,
        zero_as_positive=zero_as_positive,
    )
    return max_softmax_probability(tempered(moved))


_temperature = temperature  # under the name of the option


class ClassGaussians(NamedTuple):
    """Gaussians of the classes with one covariance, fitted by `fit_class_gaussians`.

    Attributes:
      mean: `[classes, d]`.
      cholesky: `[d, d]`, the lower Cholesky factor of the covariance.
      count: `[classes]`, the number of examples (or their weight); classes without any score -inf.
    """

    mean: Array
    cholesky: Array
    count: Array


def _checked_examples(name: str, values: Any, labels: Any, classes: Any, where: Any) -> tuple:
    """Checks examples with labels; returns the values, one-hot labels `[n, classes]`, 0 for absent examples."""
    _checks.floating(name, values)
    _checks.integers("labels", labels)
    if values.ndim != 2:
        raise ValueError(f"{name} must have shape [examples, d], got shape {tuple(values.shape)}")
    _checks.shape("labels", labels, values.shape[:1], "one class id per example")
    classes = _checks.integer("classes", classes, at_least=1)
    present = jnp.ones(values.shape[:1], bool)
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, values.shape[:1], "one boolean per example")
        present = where
    labels = as_ids(labels)
    check_range("labels", jnp.where(present, labels, 0), classes, None)
    x = jnp.asarray(values, accumulation_dtype(values.dtype))
    one_hot = (labels[:, None] == jnp.arange(classes, dtype=labels.dtype)) & present[:, None]
    poison = jnp.where(present & ((labels < 0) | (labels >= classes)), jnp.nan, 0)
    x = jnp.where(present[:, None], x, 0) + poison[:, None].astype(x.dtype)
    return x, one_hot.astype(x.dtype)


def fit_class_gaussians(
    features: Float[Array, "examples d"],
    labels: Int[Array, " examples"],
    *,
    classes: int,
    ridge: float = 1e-6,
    where: Bool[Array, " examples"] | None = None,
) -> ClassGaussians:
    """The means of the classes and their common covariance, `1/n sum (x - mean_y) (x - mean_y)^T`.

    Args:
      features: `[examples, d]` floats; of images with positions, their mean over the positions.
      labels: `[examples]` class ids. A class without examples gets no Gaussian, and one class is enough.
      classes: the number of classes, a static integer.
      ridge: added to the diagonal, in units of the mean variance. Raise it where d is larger than the number of
        examples: the covariance then has no inverse.
      where: `[examples]` booleans, True = counts.

    Returns:
      A `ClassGaussians` in float32 or wider, for `mahalanobis_score`; NaN for a label out of range. The Cholesky factor
      is NaN where the covariance has no inverse, and without examples.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import fit_class_gaussians
      >>> features = jnp.array([[0.0, 0], [1, 0], [0, 1], [4, 4], [5, 4], [4, 6]])
      >>> print(fit_class_gaussians(features, jnp.array([0, 0, 0, 1, 1, 1]), classes=2).mean.round(4))
      [[0.3333 0.3333]
       [4.3333 4.6667]]
    """
    _checks.number("ridge", ridge, at_least=0)
    x, one_hot = _checked_examples("features", features, labels, classes, where)
    count = jnp.sum(one_hot, axis=0)
    center = safe_divide(jnp.sum(jnp.sum(one_hot, 1)[:, None] * x, 0), jnp.sum(count))
    centred = x - center  # so that the sums of a class are exact for features far from 0
    mean = safe_divide(_product(one_hot.T, centred), jnp.broadcast_to(count[:, None], (classes, x.shape[1])))
    apart = jnp.sum(one_hot, 1)[:, None] * centred - _product(one_hot, mean)
    covariance = safe_divide(_product(apart.T, apart), jnp.broadcast_to(jnp.sum(count), (x.shape[1],) * 2))
    variance = jnp.trace(covariance) / max(x.shape[1], 1)
    cholesky = jnp.linalg.cholesky(covariance + ridge * variance * jnp.eye(x.shape[1], dtype=x.dtype))
    return ClassGaussians(mean + center, cholesky, count)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def mahalanobis_score(
    features: Float[Array, "*rows d"], gaussians: ClassGaussians, *, per_class: bool = False
) -> Float[Array, ...]:
    """`max_c -1/2 (x - mean_c)^T covariance^-1 (x - mean_c)`: minus half the squared distance of the nearest class.

    The published code has the factor 1/2, the paper leaves it out. Its perturbation of the inputs is
    `perturb_inputs(lambda x: mahalanobis_score(features_of(x), gaussians), inputs)`.

    Args:
      features: `[*rows, d]` floats.
      gaussians: the result of `fit_class_gaussians`.
      per_class: whether to return the scores of all classes.

    Returns:
      `[*rows]`, or `[*rows, classes]`, float32 or wider, at most 0; -inf for a class without examples.

    Raises:
      TypeError: features that are not floating.
      ValueError: features of another size than the means.

    Reference:
      Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import fit_class_gaussians, mahalanobis_score
      >>> features = jnp.array([[0.0, 0], [1, 0], [0, 1], [4, 4], [5, 4], [4, 6]])
      >>> gaussians = fit_class_gaussians(features, jnp.array([0, 0, 0, 1, 1, 1]), classes=2)
      >>> print(mahalanobis_score(jnp.array([1.0, 1.0]), gaussians, per_class=True).round())
      [ -3. -69.]
    """
    _checks.floating("features", features)
    _checks.flag("per_class", per_class)
    d = gaussians.mean.shape[-1]
    if features.ndim == 0 or features.shape[-1] != d:
        raise ValueError(f"features must have shape [*rows, {d}], got shape {tuple(features.shape)}")
    dtype = accumulation_dtype(features.dtype, gaussians.mean.dtype)
    mean, cholesky = gaussians.mean.astype(dtype), gaussians.cholesky.astype(dtype)
    center = jnp.mean(mean, axis=0)

    def whitened(x):
        flat = (x - center).reshape(-1, d)
        return lax.linalg.triangular_solve(cholesky, flat.T, left_side=True, lower=True).T

    x, classes = whitened(jnp.asarray(features, dtype)), whitened(mean)
    # One class at a time: differences before squares, which are exact near a mean
    squares = lax.map(lambda m: jnp.sum((x - m) ** 2, axis=-1), classes)
    score = jnp.where(gaussians.count > 0, -squares.T / 2, -jnp.inf)
    score = score.reshape(*features.shape[:-1], mean.shape[0])
    return score if per_class else jnp.max(score, axis=-1)


class SoftmaxCentroids(NamedTuple):
    """Mean predictions of the classes, fitted by `fit_softmax_centroids`.

    Attributes:
      centroid: `[classes, classes]`, the mean probabilities of the correctly predicted examples of each class.
      threshold: `[classes]`: the smallest distance of a wrong prediction of the class; +inf without any.
    """

    centroid: Array
    threshold: Array


class CentroidDistance(NamedTuple):
    """What `softmax_centroid_distance` returns: a prediction is accepted where `distance < threshold`.

    Attributes:
      distance: `[*rows]`.
      threshold: `[*rows]`, that of the predicted class.
    """

    distance: Array
    threshold: Array


def _distances(p: Array, centroids: Array, predicted: Array) -> Array:
    return jnp.sqrt(jnp.sum((p - centroids[predicted]) ** 2, axis=-1))


def fit_softmax_centroids(
    probabilities: Float[Array, "examples classes"],
    labels: Int[Array, " examples"],
    *,
    where: Bool[Array, " examples"] | None = None,
) -> SoftmaxCentroids:
    """The mean prediction of each class, over its correctly predicted examples, and the nearest wrong prediction.

    Args:
      probabilities: `[examples, classes]` floats.
      labels: `[examples]` class ids.
      where: `[examples]` booleans, True = counts.

    Returns:
      A `SoftmaxCentroids` in float32 or wider. A class without correct predictions accepts nothing (threshold 0); NaN
      for a label out of range.

    Raises:
      TypeError: an argument of a wrong dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      "When to Accept Automated Predictions and When to Defer to Human Judgment?".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import fit_softmax_centroids
      >>> p = jnp.array([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
      >>> print(fit_softmax_centroids(p, jnp.array([0, 0, 1, 1])).threshold.round(4))
      [0.2828    inf]
    """
    classes = probabilities.shape[-1] if getattr(probabilities, "ndim", 0) == 2 else 1
    p, one_hot = _checked_examples("probabilities", probabilities, labels, classes, where)
    predicted = jnp.argmax(p, axis=-1)
    says = jax.nn.one_hot(predicted, classes, dtype=p.dtype) * jnp.sum(one_hot, 1)[:, None]
    right = one_hot * says
    count = jnp.sum(right, axis=0)
    centroid = safe_divide(_product(right.T, p), jnp.broadcast_to(count[:, None], (classes, classes)))
    wrong = says * (1 - one_hot) > 0
    distance = jnp.where(wrong, _distances(p, centroid, predicted)[:, None], jnp.inf)
    return SoftmaxCentroids(centroid, jnp.where(count > 0, jnp.min(distance, axis=0, initial=jnp.inf), 0))


def softmax_centroid_distance(
    probabilities: Float[Array, "*rows classes"], centroids: SoftmaxCentroids
) -> CentroidDistance:
    """The distance of a prediction from the mean prediction of its class: small where the model can be trusted.

    The Euclidean distance is our reading of the paper.

    Args:
      probabilities: `[*rows, classes]` floats.
      centroids: the result of `fit_softmax_centroids`.

    Returns:
      A `CentroidDistance`: distances and thresholds `[*rows]`, float32 or wider. Accept where `distance < threshold`.

    Raises:
      TypeError: probabilities that are not floating.
      ValueError: probabilities of another number of classes.

    Reference:
      "When to Accept Automated Predictions and When to Defer to Human Judgment?".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import SoftmaxCentroids, softmax_centroid_distance
      >>> centroids = SoftmaxCentroids(jnp.array([[0.9, 0.05, 0.05]] * 3), jnp.full(3, 0.3))
      >>> print(softmax_centroid_distance(jnp.array([0.7, 0.2, 0.1]), centroids).distance.round(6))
      0.254951
    """
    _checks.floating("probabilities", probabilities)
    classes = centroids.centroid.shape[0]
    if probabilities.ndim == 0 or probabilities.shape[-1] != classes:
        raise ValueError(
            f"probabilities must have shape [*rows, {classes}], got shape {tuple(probabilities.shape)}"
        )
    p = jnp.asarray(probabilities, accumulation_dtype(probabilities.dtype))
    predicted = jnp.argmax(p, axis=-1)
    return CentroidDistance(_distances(p, centroids.centroid, predicted), centroids.threshold[predicted])


class KnnMemory(NamedTuple):
    """A memory of labelled features of a fixed size, in which the oldest is replaced first.

    Attributes:
      features: `[size, d]`, of length 1.
      labels: `[size]` int32; -1 where nothing is stored.
      position: a scalar int32, where the next feature goes.
    """

    features: Array
    labels: Array
    position: Array


def knn_memory_init(size: int, dimension: int, *, dtype: Any = jnp.float32) -> KnnMemory:
    """An empty `KnnMemory`.

    Args:
      size: the number of features that it holds, a static integer; the paper takes 1000 to 3500.
      dimension: the length of a feature.
      dtype: the dtype of the features.

    Returns:
      A `KnnMemory`, to be filled by `knn_memory_update(memory, features, labels, classes=...)`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: an argument out of range.

    Example:
      >>> from jaxsoft.calibration import knn_memory_init
      >>> print(knn_memory_init(2, 3).labels)
      [-1 -1]
    """
    size = _checks.integer("size", size, at_least=1)
    dimension = _checks.integer("dimension", dimension, at_least=1)
    dtype = _checks.floating_dtype("dtype", dtype)
    return KnnMemory(jnp.zeros((size, dimension), dtype), jnp.full(size, -1, jnp.int32), jnp.int32(0))


def _unit(x: Array) -> Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return safe_divide(x, jnp.broadcast_to(norm, x.shape))


def _checked_features(features: Any, memory: KnnMemory) -> Array:
    _checks.floating("features", features)
    d = memory.features.shape[-1]
    if features.ndim == 0 or features.shape[-1] != d:
        raise ValueError(f"features must have shape [*rows, {d}], got shape {tuple(features.shape)}")
    return jnp.asarray(features, accumulation_dtype(features.dtype, memory.features.dtype))


def knn_memory_logits(
    memory: KnnMemory,
    features: Float[Array, "*rows d"],
    *,
    classes: int,
    k: int = 100,
    temperature: float = 0.1,
) -> Float[Array, "*rows classes"]:
    """Class scores by the labels of the k most similar features: `sum of softmax(cosine / T)` over each class.

    The scores are probabilities, which the paper uses as logits, in the loss and for its confidence.

    Args:
      memory: a `KnnMemory`.
      features: `[*rows, d]` floats of any length.
      classes: the number of classes, a static integer.
      k: how many neighbours, a static integer; fewer where fewer are stored. Ties go to the smaller position.
      temperature: T, positive.

    Returns:
      `[*rows, classes]` in (0, 1], float32 or wider: 1e-5 is added to each score, and 1 is the largest, as in the
      published code. All are 1e-5 for an empty memory.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Zhang et al., "AdaNPC: Exploring Non-Parametric Classifier for Test-Time Adaptation".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import KnnMemory, knn_memory_logits
      >>> stored = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
      >>> memory = KnnMemory(stored, jnp.array([0, 0, 1, 1], jnp.int32), jnp.int32(0))
      >>> print(knn_memory_logits(memory, jnp.array([0.6, 0.8]), classes=2, k=3).round(5))
      [0.83576 0.16426]
    """
    classes = _checks.integer("classes", classes, at_least=1)
    k = min(_checks.integer("k", k, at_least=1), memory.labels.shape[0])
    _checks.number("temperature", temperature, above=0)
    x = _unit(_checked_features(features, memory))
    similarity = _product(x, memory.features.astype(x.dtype).T)
    best, index = lax.top_k(jnp.where(memory.labels >= 0, similarity, -jnp.inf), k)
    weights = softmax(best / jnp.asarray(temperature, x.dtype))
    is_of_class = memory.labels[index][..., None] == jnp.arange(classes, dtype=jnp.int32)
    return jnp.minimum(jnp.sum(weights[..., None] * is_of_class, axis=-2) + 1e-5, 1)


def knn_memory_update(
    memory: KnnMemory,
    features: Float[Array, "rows d"],
    labels: Int[Array, " rows"] | None = None,
    *,
    classes: int,
    k: int = 100,
    temperature: float = 0.1,
    beta: float = 0.1,
) -> KnnMemory:
    """Adds features to the memory: with their labels, or with predicted ones where the prediction is confident.

    The confidence is `max softmax(scores)` of the scores of `knn_memory_logits`, between 1 / C and e / (e + C - 1).
    The published memory grows; here the oldest features are replaced, so that shapes stay fixed.

    Args:
      memory: a `KnnMemory`.
      features: `[rows, d]` floats, no more rows than the memory holds.
      labels: `[rows]` class ids, all of which are stored; None predicts them.
      classes: the number of classes, a static integer.
      k: see `knn_memory_logits`.
      temperature: see `knn_memory_logits`.
      beta: the smallest confidence to store a predicted label; above 1 stores none.

    Returns:
      The new `KnnMemory`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Zhang et al., "AdaNPC: Exploring Non-Parametric Classifier for Test-Time Adaptation".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import knn_memory_init, knn_memory_update
      >>> memory = knn_memory_init(3, 2)
      >>> memory = knn_memory_update(memory, jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1]), classes=2)
      >>> print(memory.labels, memory.position)
      [ 0  1 -1] 2
    """
    _checks.number("beta", beta)
    x = _checked_features(features, memory)
    size = memory.labels.shape[0]
    if x.ndim != 2 or x.shape[0] > size:
        raise ValueError(
            f"features must have shape [rows, d] with at most {size} rows, the size of the memory, "
            f"got shape {tuple(features.shape)}"
        )
    scores = knn_memory_logits(memory, features, classes=classes, k=k, temperature=temperature)
    if labels is None:
        keep = max_softmax_probability(scores) >= beta
        new = jnp.argmax(scores, axis=-1)
    else:
        _checks.integers("labels", labels)
        _checks.shape("labels", labels, x.shape[:1], "one class id per row of features")
        check_range("labels", labels, scores.shape[-1], None)
        keep, new = jnp.ones(x.shape[0], bool), labels
    place = memory.position + jnp.cumsum(keep, dtype=jnp.int32) - 1
    place = jnp.where(keep, place % size, size)  # dropped
    return KnnMemory(
        memory.features.at[place].set(_unit(x).astype(memory.features.dtype), mode="drop"),
        memory.labels.at[place].set(new.astype(jnp.int32), mode="drop"),
        (memory.position + jnp.sum(keep, dtype=jnp.int32)) % size,
    )


def naive_bayes_logits(
    features: Float[Array, "*rows d"],
    mean: Float[Array, "classes d"],
    variance: Float[Array, " d"],
    prior: Float[Array, " classes"],
) -> Float[Array, "*rows classes"]:
    """`log prior_c - 1/2 sum_i (x_i - mean_ci)^2 / variance_i`: Gaussian naive Bayes with one variance per feature.

    Up to a shift it is the linear head `weight = mean / variance`, `bias = log prior - 1/2 sum mean^2 / variance`: a
    generative classifier of the same form as a trained one, which needs fewer examples.

    Args:
      features: `[*rows, d]` floats.
      mean: `[classes, d]` floats.
      variance: `[d]` positive floats.
      prior: `[classes]` floats, 0 or more; a class of prior 0 gets -inf.

    Returns:
      Logits `[*rows, classes]`, float32 or wider.

    Raises:
      TypeError: an argument that is not floating.
      ValueError: an argument of a wrong shape.

    Reference:
      Zheng et al., "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import naive_bayes_logits
      >>> mean, variance, prior = jnp.array([[0.0, 0.0], [1.0, 2.0]]), jnp.array([0.5, 1.0]), jnp.array([0.4, 0.6])
      >>> print(naive_bayes_logits(jnp.array([0.5, 1.5]), mean, variance, prior).round(6))
      [-2.291291 -0.885826]
    """
    for name, value in (("features", features), ("mean", mean), ("variance", variance), ("prior", prior)):
        _checks.floating(name, value)
    if mean.ndim != 2:
        raise ValueError(f"mean must have shape [classes, d], got shape {tuple(mean.shape)}")
    classes, d = mean.shape
    if features.ndim == 0 or features.shape[-1] != d:
        raise ValueError(f"features must have shape [*rows, {d}], got shape {tuple(features.shape)}")
    _checks.shape("variance", variance, (d,), "one number per feature")
    _checks.shape("prior", prior, (classes,), "one number per class")
    dtype = accumulation_dtype(features.dtype, mean.dtype, variance.dtype, prior.dtype)
    x, mean, variance, prior = (jnp.asarray(a, dtype) for a in (features, mean, variance, prior))
    squares = lax.map(lambda m: jnp.sum((x - m) ** 2 / variance, axis=-1), mean)
    return jnp.log(prior) - jnp.moveaxis(squares, 0, -1) / 2
