"""Metric learning.

Functions of embeddings: fixed classifiers and prototypes, losses of a batch and its class means, mixed pairs, and
distances. A distance `d` goes into any loss of logits as `-d`. Functions that compare n vectors with each other do so
block by block: no `[n, n]` array is stored.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide, weigh
from jaxsoft.losses._common import IGNORE_INDEX, check_weights
from jaxsoft.losses.classification import cross_entropy
from jaxsoft.losses.margin import cosine_logits, l2_normalize, mapped_log_partition
from jaxsoft.rows import LinearLogits, Logits, linear_logits, reduce_rows, reductions
from jaxsoft.rows.inner import check_range

# --- fixed classifiers -------------------------------------------------------------------------------------


def simplex_classifier(num_classes: int, *, dtype: Any = jnp.float32) -> Float[Array, "d classes"]:
    """The d-simplex: one unit vector per class in `d = num_classes - 1` dimensions, every two at cosine `-1 / d`.

    A classifier that is not trained: `linear_logits(features, simplex_classifier(1024))`. Classes allocated in advance
    reserve the places of future ones.

    Args:
      num_classes: 2 or more.
      dtype: a floating dtype.

    Returns:
      `[num_classes - 1, num_classes]`, the classes' vectors as columns.

    Raises:
      TypeError: num_classes is not an integer.
      ValueError: num_classes < 2.

    Reference:
      Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved
      Model Replacements".

    Example:
      >>> from jaxsoft.losses import simplex_classifier
      >>> vectors = simplex_classifier(3)
      >>> print((vectors.T @ vectors).round(4))
      [[ 1.  -0.5 -0.5]
       [-0.5  1.  -0.5]
       [-0.5 -0.5  1. ]]
    """
    num_classes = _checks.integer("num_classes", num_classes, at_least=2)
    d = num_classes - 1
    vectors = np.concatenate([np.eye(d), np.full((d, 1), (1 - math.sqrt(num_classes)) / d)], axis=1)
    vectors -= vectors.mean(axis=1, keepdims=True)
    return jnp.asarray(vectors / np.linalg.norm(vectors, axis=0), dtype)


def etf_classifier(
    key: Array, num_classes: int, dim: int, *, dtype: Any = jnp.float32
) -> Float[Array, "dim classes"]:
    """A simplex equiangular tight frame in a random orientation: `sqrt(K / (K - 1)) U (I - 1 1^T / K)`.

    Unit vectors, every two at cosine `-1 / (K - 1)`: the classifier that neural collapse leads to, fixed from the
    start. U has orthonormal columns. The frame is drawn as a random rotation of the d-simplex, which needs only
    `dim >= K - 1`.

    Args:
      key: a PRNG key.
      num_classes: K, 2 or more.
      dim: the number of features, K - 1 or more.
      dtype: a floating dtype.

    Returns:
      `[dim, num_classes]`, the classes' vectors as columns.

    Raises:
      TypeError: a size is not an integer.
      ValueError: num_classes < 2, or dim < num_classes - 1.

    Reference:
      Yang et al., "Inducing Neural Collapse in Imbalanced Learning"; Papyan et al., "Prevalence of neural collapse
      during the terminal phase of deep learning training".

    Example:
      >>> import jax
      >>> from jaxsoft.losses import etf_classifier
      >>> vectors = etf_classifier(jax.random.key(0), 5, 16)
      >>> print((vectors.T @ vectors)[0, 1].round(4))
      -0.25
    """
    simplex = simplex_classifier(num_classes)
    dim = _checks.integer("dim", dim, at_least=num_classes - 1)
    wide = accumulation_dtype(dtype)
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (dim, num_classes - 1), wide))
    product = jnp.matmul(basis, simplex.astype(wide), precision="highest")
    return product.astype(dtype)


def dot_regression_loss(
    features: Float[Array, "*rows d"],
    labels: Int[Array, "*rows"],
    class_vectors: Float[Array, "d classes"],
    *,
    where: Bool[Array, "*rows"] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Dot regression: `(m_y . h / ||h|| - 1)^2 / 2`, which pulls features towards their class vector.

    Reads only the vector of an example's own class: nothing pushes features away from other classes. *Reconstructed*
    from the definition.

    Args:
      features: h, `[*rows, d]`, of any length.
      labels: class ids `[*rows]`. An id out of range gives NaN.
      class_vectors: m, `[d, classes]`, unit vectors that are not trained, such as those of `etf_classifier`.
      where: `[*rows]`, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out; None leaves out none.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 where an example does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Yang et al., "Inducing Neural Collapse in Imbalanced Learning".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import dot_regression_loss
      >>> print(dot_regression_loss(jnp.array([[3.0, 4.0]]), jnp.array([1]), jnp.eye(2)).round(6))
      [0.02]
    """
    _checks.floating("features", features)
    _checks.floating("class_vectors", class_vectors)
    if features.ndim < 1 or class_vectors.ndim != 2 or class_vectors.shape[0] != features.shape[-1]:
        raise ValueError(
            f"features [*rows, d] and class_vectors [d, classes] must share d, got shapes {features.shape} and "
            f"{class_vectors.shape}"
        )
    rows, classes = features.shape[:-1], class_vectors.shape[1]
    _checks.integers("labels", labels)
    _checks.shape("labels", labels, rows, "one id per example")
    labels = as_ids(jnp.asarray(labels))
    keep = jnp.ones(rows, bool)
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, rows, "one boolean per example")
        keep &= where
    if ignore_index is not None:
        keep &= labels != _checks.integer("ignore_index", ignore_index)
    check_weights(weights, rows)
    labels = jnp.where(keep, labels, 0)
    check_range("labels", labels, classes, None)
    dtype = accumulation_dtype(features.dtype, class_vectors.dtype)
    h = l2_normalize(jnp.where(keep[..., None], jnp.asarray(features, dtype), 0))
    own = jnp.asarray(class_vectors, dtype).T[jnp.clip(labels, 0, classes - 1)]
    in_range = (labels >= 0) & (labels < classes)
    cosine = jnp.sum(own * h, axis=-1) * jnp.where(in_range, 1, jnp.nan)
    loss = jnp.where(keep, (cosine - 1) ** 2 / 2, 0)
    return loss if weights is None else weigh(loss, weights)


def prototype_logits(
    features: Float[Array, "*rows d"],
    class_sums: Float[Array, "classes d"],
    class_counts: Array,
    *,
    scale: float | Float[Array, ...] = 1.0,
) -> LinearLogits:
    """The cosines of features and class means, as an expression; -inf for classes without examples.

    A classifier without training: as examples arrive, add their features to `class_sums` and 1 to `class_counts`
    (`jax.ops.segment_sum`).

    Args:
      features: `[*rows, d]`, of any length.
      class_sums: `[classes, d]`, the sum of the features of each class.
      class_counts: `[classes]`, the number of examples of each class, integers or floats.
      scale: multiplies the cosines, positive.

    Returns:
      A `LinearLogits` `[*rows, classes]`; `.dense()` gives the array.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
      All You Need".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> sums, counts = jnp.array([[4.0, 0.0], [0.0, -3.0], [0.0, 0.0]]), jnp.array([2, 3, 0])
      >>> print(jaxsoft.losses.prototype_logits(jnp.array([[0.0, 2.0]]), sums, counts).dense())
      [[  0.  -1. -inf]]
    """
    _checks.floating("class_sums", class_sums)
    if class_sums.ndim != 2:
        raise ValueError(f"class_sums must have shape [classes, d], got shape {class_sums.shape}")
    if not hasattr(class_counts, "shape"):
        raise TypeError(f"class_counts must be an array, got {_checks.describe(class_counts)}")
    _checks.shape("class_counts", class_counts, class_sums.shape[:1], "one number per class")
    some = jnp.asarray(class_counts) > 0
    cosines = cosine_logits(
        features, jnp.where(some[:, None], class_sums, 0), scale=scale, transpose_weight=True
    )
    bias = jnp.where(some, 0, -jnp.inf).astype(cosines.weight.dtype)
    return linear_logits(
        cosines.hidden, cosines.weight, bias=bias, scale=cosines.scale, transpose_weight=True
    )


# --- losses of a batch of embeddings -----------------------------------------------------------------------


def _batch(name: str, vectors: Any, labels: Any, where: Any) -> tuple[Array, Array, Array]:
    """Vectors `[n, d]` in the accumulation dtype, 0 where masked; labels `[n]`; and the mask `[n]`."""
    _checks.floating(name, vectors)
    if vectors.ndim != 2:
        raise ValueError(f"{name} must have shape [n, d], got shape {vectors.shape}")
    n = vectors.shape[:1]
    _checks.integers("labels", labels)
    _checks.shape("labels", labels, n, "one id per vector")
    keep = jnp.ones(n, bool)
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, n, "one boolean per vector")
        keep = jnp.asarray(where)
    wide = jnp.asarray(vectors, accumulation_dtype(vectors.dtype))
    return jnp.where(keep[:, None], wide, 0), as_ids(jnp.asarray(labels)), keep


def _class_means(vectors: Array, labels: Array, keep: Array, num_classes: int) -> tuple[Array, Array, Array]:
    """Means `[classes, d]`, counts `[classes]`, and the factor 1, or NaN if a label that counts is out of range."""
    labels = jnp.where(keep, labels, 0)
    check_range("labels", labels, num_classes, None)
    ids = jnp.clip(labels, 0, num_classes - 1)
    poison = jnp.where(jnp.any(labels != ids), jnp.nan, 1).astype(vectors.dtype)
    sums = jax.ops.segment_sum(vectors, ids, num_classes)
    counts = jax.ops.segment_sum(keep.astype(vectors.dtype), ids, num_classes)
    return safe_divide(sums, counts[:, None]), counts, poison


def nbc_softmax_loss(
    embeddings: Float[Array, "n d"],
    labels: Int[Array, " n"],
    num_classes: int,
    *,
    scale: float = 0.2,
    diag: str = "repo",
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """Pushes the class means of a batch apart: `mean_k log(sum_l exp(scale cos(mu_k, mu_l))) / num_classes`.

    k and l run over the classes present in the batch. Use it with a softmax loss: `(1 - r) * loss + r * this`.

    Args:
      embeddings: `[n, d]`, of any length.
      labels: class ids `[n]`.
      num_classes: the number of all classes, including those absent from the batch.
      scale: multiplies the cosines, positive.
      diag: how a mean's cosine with itself counts: `"repo"`, as 0, so that it adds 1 to the sum (the authors' code);
        `"exclude"`, not at all.
      where: `[n]`, True = counts.

    Returns:
      A scalar, float32 or wider; 0 if fewer than two classes are present. NaN if a label is out of range.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Kulatilleke et al., "NBC-Softmax : Darkweb Author fingerprinting and migration tracking".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import nbc_softmax_loss
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
      >>> print(nbc_softmax_loss(embeddings, jnp.array([0, 1, 3]), 5).round(6))
      0.23262
    """
    num_classes = _checks.integer("num_classes", num_classes, at_least=1)
    _checks.number("scale", scale, above=0)
    _checks.option("diag", diag, ("repo", "exclude"))
    means, counts, poison = _class_means(*_batch("embeddings", embeddings, labels, where), num_classes)
    present = counts > 0
    cosines = cosine_logits(means, means, scale=scale, transpose_weight=True)
    own = jnp.arange(num_classes)[:, None]
    others = reduce_rows(
        cosines, reductions.log_partition_excluding(own), where=present, row_where=present
    ).value
    some = others > -jnp.inf
    push = jnp.where(some, others, 0)
    if diag == "repo":
        push = jax.nn.softplus(push)
    total = jnp.sum(jnp.where(some, push, 0))
    return poison * safe_divide(total, jnp.sum(present).astype(total.dtype)) / num_classes


def neural_collapse_regularizer(
    features: Float[Array, "n d"],
    labels: Int[Array, " n"],
    num_classes: int,
    *,
    where: Bool[Array, " n"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Neural collapse: `mean |h - mu_y|^2` and `mean_{k != l} (cos(mu_k - mu, mu_l - mu) + 1 / (K - 1))^2`.

    How far features are from neural collapse, within the classes and between their means mu_k. Here mu is the mean of
    the class means, and K the number of classes present. Weights of 0.01 to 0.1 are usual. *Reconstructed* from the
    paper's description.

    Args:
      features: `[n, d]`.
      labels: class ids `[n]`.
      num_classes: the number of all classes.
      where: `[n]`, True = counts.

    Returns:
      Two scalars, float32 or wider: within, between. 0 if no example counts; between is 0 for fewer than two classes.
      NaN if a label is out of range.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Liu et al., "Inducing Neural Collapse in Deep Long-tailed Learning".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import neural_collapse_regularizer
      >>> features = jnp.array([[1.0, 0.2], [0.8, 0.0], [0.0, 1.0], [0.2, 1.2], [-1.0, 0.0], [-1.0, -0.4]])
      >>> within, between = neural_collapse_regularizer(features, jnp.array([0, 0, 1, 1, 2, 2]), 3)
      >>> print(within.round(6), between.round(6))
      0.026667 0.067954
    """
    num_classes = _checks.integer("num_classes", num_classes, at_least=1)
    h, ids, keep = _batch("features", features, labels, where)
    means, counts, poison = _class_means(h, ids, keep, num_classes)
    own = means[jnp.clip(jnp.where(keep, ids, 0), 0, num_classes - 1)]
    square = jnp.sum(jnp.where(keep[:, None], h - own, 0) ** 2)
    within = safe_divide(square, jnp.sum(keep).astype(h.dtype))

    present = counts > 0
    k = jnp.sum(present).astype(h.dtype)
    centred = jnp.where(present[:, None], means - safe_divide(jnp.sum(means, axis=0), k), 0)
    cosines = cosine_logits(centred, centred, transpose_weight=True)
    target = jnp.broadcast_to(safe_divide(jnp.ones_like(k), k - 1), present.shape)
    squares = reductions.mapped_sum(_off_simplex, jnp.arange(num_classes), target)
    total = jnp.sum(reduce_rows(cosines, squares, where=present, row_where=present))
    return poison * within, poison * safe_divide(total, k * (k - 1))


def _off_simplex(x, cols, own, target):
    return jnp.where(cols == own, 0, (x + target) ** 2)


def stationary_representation_loss(
    logits: Logits,
    labels: Int[Array, " n"],
    features: Float[Array, "n d"],
    old_features: Float[Array, "n d"],
    *,
    mixture: float = 0.1,
    scale: float = 10.0,
    mode: str = "clean",
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Keeps features comparable with those of an older model: `mixture CE + (1 - mixture) HOC`.

    CE is the cross-entropy of the logits of a fixed `simplex_classifier`. HOC, higher-order compatibility, contrasts
    old and new features of the same image, `u_i` and `v_i` of length 1, with images of other classes:
    `-log(e_ii / (e_ii + sum_{y_j != y_i} e_ij))` with `e_ij = exp(scale u_i v_j)`, which is
    `softplus(lse_{y_j != y_i}(scale u_i v_j) - scale u_i v_i)`.

    Args:
      logits: `[n, classes]`, a floating array or `linear_logits(features, simplex_classifier(classes))`.
      labels: class ids `[n]`.
      features: `[n, d]`, of the model in training.
      old_features: `[n, d]`, of the older model (usually constants).
      mixture: lambda, in [0, 1]: the weight of the cross-entropy.
      scale: multiplies the cosines, positive.
      mode: `"clean"`, as above; `"repo"`, as in the authors' code: images of the same class, including the image
        itself, each add 1 to the sum, and the denominator leaves out `e_ii`.
      where: `[n]`, True = counts; a masked example is no negative of others either.

    Returns:
      Losses `[n]`, float32 or wider; 0 for a masked example.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved
      Model Replacements".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import stationary_representation_loss
      >>> new, old = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.9, 0.1], [0.2, 0.8]])
      >>> print(stationary_representation_loss(4 * new, jnp.array([0, 1]), new, old, mixture=0.5).round(5))
      [0.00915 0.00942]
    """
    _checks.number("mixture", mixture, at_least=0, at_most=1)
    _checks.number("scale", scale, above=0)
    _checks.option("mode", mode, ("clean", "repo"))
    new, ids, keep = _batch("features", features, labels, where)
    old, _, _ = _batch("old_features", old_features, labels, where)
    _checks.shape("old_features", old_features, features.shape, "the shape of features")
    ce = cross_entropy(logits, ids, where=keep[:, None], ignore_index=None)
    cosines = cosine_logits(old, new, scale=scale, transpose_weight=True)
    partition = mapped_log_partition(
        _other_classes if mode == "clean" else _same_as_zero, ids, col_args=(ids,)
    )
    wanted = partition, reductions.take(jnp.arange(len(ids)))
    others, own = reduce_rows(cosines, wanted, where=keep, row_where=keep)
    some = others.log_sum > -jnp.inf
    gap = (others.shift - jnp.where(keep, own, 0)) + jnp.where(some, others.log_sum, 0)
    if mode == "clean":
        gap = jnp.where(some, jax.nn.softplus(gap), 0)
    return jnp.where(keep, mixture * ce + (1 - mixture) * gap, 0)


def _other_classes(x, cols, own, others):
    return jnp.where(others == own, -jnp.inf, x)


def _same_as_zero(x, cols, own, others):
    return jnp.where(others == own, 0, x)


# --- pairs and distances -----------------------------------------------------------------------------------


def metric_mixup_loss(
    distances: Float[Array, "*pairs"],
    mixture: Float[Array, "*pairs"],
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    where: Bool[Array, "*pairs"] | None = None,
) -> Float[Array, "*pairs"]:
    """Contrastive loss of mixed pairs (Metrix): `a [d - positive_margin]_+ + (1 - a) [negative_margin - d]_+`.

    d is the distance from an anchor to a mixture `a f(positive) + (1 - a) f(negative)` of embeddings (or of features,
    or of inputs), with `a` drawn from Beta(2, 2). The loss is added, with a weight of 0.3 or 0.4, to that of the
    unmixed pairs. With `a` 1 or 0 it is the contrastive loss.

    Args:
      distances: d, of any shape.
      mixture: a, in [0, 1], broadcasts to the distances.
      positive_margin: the distance below which positives cost nothing.
      negative_margin: the distance above which negatives cost nothing.
      where: broadcasts to the distances, True = counts.

    Returns:
      Losses of the distances' shape, float32 or wider; 0 for a masked pair.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Venkataramanan et al., "It Takes Two to Tango: Mixup for Deep Metric Learning".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import metric_mixup_loss
      >>> print(metric_mixup_loss(jnp.array([0.7, 0.3]), jnp.array([0.6, 0.6])).round(6))
      [0.42 0.26]
    """
    _checks.number("positive_margin", positive_margin)
    _checks.number("negative_margin", negative_margin)
    for name, value in (("distances", distances), ("mixture", mixture)):
        _checks.floating(name, value)
        _checks.broadcastable(name, value, distances.shape, "the shape of the distances")
    d = jnp.asarray(distances, accumulation_dtype(distances.dtype))
    a = jnp.broadcast_to(jnp.asarray(mixture, d.dtype), d.shape)
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, distances.shape, "the shape of the distances")
        d, a = jnp.where(where, d, 0), jnp.where(where, a, 0)
    loss = a * jax.nn.relu(d - positive_margin) + (1 - a) * jax.nn.relu(negative_margin - d)
    return loss if where is None else jnp.where(where, loss, 0)


def interval_quasimetric(
    x: Float[Array, "*batch k l"],
    y: Float[Array, "*batch k l"],
    *,
    reduction: str = "maxmean",
    raw_alpha: float | Float[Array, ""] = -1.0,
) -> Float[Array, "*batch"]:
    """Interval quasimetric embedding: distances that obey the triangle inequality but need not be symmetric.

    Component k is the length of the union over l of the intervals `[x_kl, y_kl]` with `x_kl < y_kl`. The distance
    from x to itself is 0, and `d(c x, c y) = c d(x, y)` for c > 0.

    Args:
      x: `[*batch, k, l]`, the start of the path; l of 8 or more numbers per component is usual.
      y: `[*batch, k, l]`, the end of the path; broadcasts with x.
      reduction: over the components: `"maxmean"`, `alpha max + (1 - alpha) mean`; `"sum"`, `"max"` or `"mean"`.
      raw_alpha: `alpha = sigmoid(raw_alpha)`, trained, starting at -1.

    Returns:
      Distances `[*batch]`, float32 or wider. Intervals whose ends are equal get no gradient.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: shapes that do not match, an unknown reduction.

    Reference:
      Wang and Isola, "Improved Representation of Asymmetrical Distances with Interval Quasimetric Embeddings".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import interval_quasimetric
      >>> x, y = jnp.array([[0.0, 1.0, 3.0]]), jnp.array([[2.0, 1.5, 2.5]])
      >>> print(interval_quasimetric(x, y), interval_quasimetric(y, x))
      2.0 0.5
    """
    _checks.option("reduction", reduction, ("maxmean", "sum", "max", "mean"))
    _checks.number("raw_alpha", raw_alpha)
    for name, value in (("x", x), ("y", y)):
        _checks.floating(name, value)
        if value.ndim < 2:
            raise ValueError(f"{name} must have shape [*batch, k, l], got shape {value.shape}")
    if x.shape[-2:] != y.shape[-2:] or 0 in x.shape[-2:]:
        raise ValueError(
            f"x and y must share the axes [k, l], of size 1 or more, got shapes {x.shape} and {y.shape}"
        )
    dtype = accumulation_dtype(x.dtype, y.dtype)
    try:
        start, end = jnp.broadcast_arrays(jnp.asarray(x, dtype), jnp.asarray(y, dtype))
    except ValueError as error:
        raise ValueError(f"x and y must broadcast, got shapes {x.shape} and {y.shape}") from error
    end = jnp.where(start < end, end, start)  # an interval that runs backwards has no length
    # Counts the open intervals along the sorted ends; the union consists of the gaps with at least one open interval.
    opens = jnp.concatenate([jnp.ones_like(start), -jnp.ones_like(end)], axis=-1)
    ends = jnp.concatenate([start, end], axis=-1)
    order = jnp.argsort(lax.stop_gradient(ends), axis=-1)
    ends, opens = (jnp.take_along_axis(a, order, axis=-1) for a in (ends, opens))
    is_open = jnp.cumsum(opens, axis=-1)[..., :-1] > 0
    components = jnp.sum(jnp.where(is_open, ends[..., 1:] - ends[..., :-1], 0), axis=-1)
    if reduction == "sum":
        return jnp.sum(components, axis=-1)
    longest, mean = jnp.max(components, axis=-1), jnp.mean(components, axis=-1)
    if reduction != "maxmean":
        return longest if reduction == "max" else mean
    alpha = jax.nn.sigmoid(jnp.asarray(raw_alpha, dtype).reshape(()))
    return alpha * longest + (1 - alpha) * mean


def lorentz_from_euclidean(
    v: Float[Array, "*batch d"], *, max_norm: float = 40.0
) -> Float[Array, "*batch d+1"]:
    """The hyperboloid point of a Euclidean vector: `(cosh r, sinh(r) v / r)` with `r = ||v||`.

    The exponential map at the origin: far from it, the gradients of this parametrization vanish less than those of
    points on the hyperboloid itself. Near 0 it uses a series, so that the gradient at 0 is exact.

    Args:
      v: `[*batch, d]`.
      max_norm: the largest r, positive; beyond it only the direction counts. 40 suits float32.

    Returns:
      `[*batch, d + 1]`, float32 or wider, the time-like coordinate first.

    Raises:
      TypeError: v is not a floating array, or max_norm is not a number.
      ValueError: v is a scalar, or max_norm is not positive.

    Reference:
      Mishne et al., "The Numerical Stability of Hyperbolic Representation Learning".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import lorentz_from_euclidean
      >>> print(lorentz_from_euclidean(jnp.array([0.3, 0.4])).round(6))
      [1.127626 0.312657 0.416876]
    """
    _checks.floating("v", v)
    _checks.number("max_norm", max_norm, above=0)
    if v.ndim < 1:
        raise ValueError(f"v must have shape [*batch, d], got shape {v.shape}")
    v = jnp.asarray(v, accumulation_dtype(v.dtype))
    square = jnp.sum(v * v, axis=-1, keepdims=True)
    near = square < 0.01
    length = jnp.sqrt(jnp.where(near, 1, square))
    r = jnp.minimum(length, max_norm)
    s = jnp.where(near, square, 0)
    time = jnp.where(near, 1 + s / 2 * (1 + s / 12 * (1 + s / 30 * (1 + s / 56))), jnp.cosh(r))
    ratio = jnp.where(near, 1 + s / 6 * (1 + s / 20 * (1 + s / 42 * (1 + s / 72))), jnp.sinh(r) / length)
    return jnp.concatenate([time, ratio * v], axis=-1)


def lorentz_distance(a: Float[Array, "*batch d+1"], b: Float[Array, "*batch d+1"]) -> Float[Array, "*batch"]:
    """The distance of two points of the hyperboloid: `arccosh(-<a, b>)` with `<a, b> = a_1 b_1 + ... - a_0 b_0`.

    `-<a, b> - 1` is computed from the product or, for points near each other, as `<a - b, a - b> / 2`, whichever
    cancels less, and is clamped at 0. On the hyperboloid the two are equal.

    Args:
      a: `[*batch, d + 1]`, such as `lorentz_from_euclidean` makes.
      b: `[*batch, d + 1]`, broadcasts with a.

    Returns:
      Distances `[*batch]`, float32 or wider; 0, with gradient 0, for equal points.

    Raises:
      TypeError: an argument is not a floating array.
      ValueError: shapes that do not match.

    Reference:
      Mishne et al., "The Numerical Stability of Hyperbolic Representation Learning".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import lorentz_distance, lorentz_from_euclidean
      >>> origin, point = (lorentz_from_euclidean(jnp.array(v)) for v in ([0.0, 0.0], [1.2, 1.6]))
      >>> print(lorentz_distance(origin, point).round(4))
      2.0
    """
    for name, value in (("a", a), ("b", b)):
        _checks.floating(name, value)
        if value.ndim < 1 or value.shape[-1] < 2:
            raise ValueError(f"{name} must have shape [*batch, d + 1], got shape {value.shape}")
    dtype = accumulation_dtype(a.dtype, b.dtype)
    try:
        a, b = jnp.broadcast_arrays(jnp.asarray(a, dtype), jnp.asarray(b, dtype))
    except ValueError as error:
        raise ValueError(f"a and b must broadcast, got shapes {a.shape} and {b.shape}") from error
    time = a[..., 0] * b[..., 0]
    apart = (a - b) ** 2
    near = jnp.sum(apart, axis=-1) < time
    by_difference = (jnp.sum(apart[..., 1:], axis=-1) - apart[..., 0]) / 2
    by_product = time - jnp.sum(a[..., 1:] * b[..., 1:], axis=-1) - 1
    u = jnp.where(near, by_difference, by_product)
    positive = u > 0
    u = jnp.where(positive, u, 1)
    return jnp.where(positive, jnp.log1p(u + jnp.sqrt(u) * jnp.sqrt(u + 2)), 0)
