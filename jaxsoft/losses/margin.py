"""Margin losses.

Losses on the cosines of features and a head's weight: normalized softmax with margins, wrapped Cauchy, SphereFace2 and
circle loss. All take cosines `[*rows, classes]`, as an array or as the expression that `cosine_logits` makes. They
read an expression block by block: neither cosines nor margins are ever stored as `[*rows, classes]`.

In the formulas `c` are the cosines of a row, `y` its label, `s` the scale, `m` the margin, and `lse_N` a log-sum-exp
over the classes that are not the label.

All but SphereFace2 share one mechanism: scores `f` of the other classes against an edited score `t` of the label,
`softplus(lse_N f(c) - t(c_y))`, the cross-entropy of these scores. The label is left out of the sum, not subtracted
from it, so that nothing cancels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, finite_gauge, log_or_neg_inf
from jaxsoft.losses._common import (
    IGNORE_INDEX,
    LabelledRows,
    check_floats,
    poison_of,
    prepare,
    prepare_positives,
)
from jaxsoft.rows import LinearLogits, Logits, linear_logits, reductions
from jaxsoft.rows.inner import check_axis, check_dense, rows_of
from jaxsoft.rows.reductions import LogPartition


def l2_normalize(x: Float[Array, "*shape"], *, axis: int = -1) -> Float[Array, "*shape"]:
    """`x / ||x||`, evaluated as `x / sqrt(max(||x||^2, 1e-12))` in float32 at least.

    A zero vector stays zero and gets no gradient.

    Args:
      x: a floating array of vectors.
      axis: the axis of a vector.

    Returns:
      Vectors of length 1, of x's shape and dtype.

    Raises:
      TypeError: x is not a floating array.
      ValueError: x has no such axis.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.l2_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      [[0.6 0.8]
       [0.  0. ]]
    """
    _checks.floating("x", x)
    axis = _checks.integer("axis", axis)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be in [{-x.ndim}, {x.ndim}) for x of shape {x.shape}, got {axis}")
    wide = jnp.asarray(x, accumulation_dtype(x.dtype))
    square = jnp.sum(wide * wide, axis=axis, keepdims=True)
    some = square > 0
    length = jnp.sqrt(jnp.maximum(jnp.where(some, square, 1), 1e-12))
    return jnp.where(some, wide / length, 0).astype(x.dtype)


def cosine_logits(
    features: Float[Array, "*rows d"],
    weight: Float[Array, "d classes"],
    *,
    scale: float | Float[Array, ...] = 1.0,
    transpose_weight: bool = False,
    block_size: int | None = None,
    filter_eps: float | None = None,
    precision: Any = None,
    dtype: Any = None,
) -> LinearLogits:
    """The cosines of features and a head's weight times `scale`, as an expression that is never stored.

    Normalizing stores one copy of the weight, through which the gradient flows. `.dense()` gives the array. The margin
    losses have a `scale` of their own and take plain cosines, `scale=1`.

    Args:
      features: `[*rows, d]`, of any length.
      weight: one vector per class, `[d, classes]`, or `[classes, d]` with `transpose_weight=True`.
      scale: multiplies the cosines: a scalar, or one number per row. Differentiable.
      transpose_weight: whether `weight` is laid out `[classes, d]`.
      block_size: as in `linear_logits`.
      filter_eps: as in `linear_logits`.
      precision: as in `linear_logits`.
      dtype: as in `linear_logits`. Features and weight are normalized in float32, and rounded for the product.

    Returns:
      A `LinearLogits`. A zero vector has cosine 0 with every vector.

    Raises:
      TypeError: an argument is not a floating array or has the wrong type.
      ValueError: shapes that do not match, a size or a constant out of range.

    Reference:
      Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning" (normalized softmax).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> features, weights = jnp.array([[3.0, 0.0]]), jnp.array([[2.0, 0.0, -0.5], [0.0, 0.5, 0.0]])
      >>> print(jaxsoft.losses.cosine_logits(features, weights).dense())
      [[ 1.  0. -1.]]
    """
    for name, value in (("features", features), ("weight", weight)):
        _checks.floating(name, value)
        if value.ndim < (2 if name == "weight" else 1):
            raise ValueError(f"{name} must have an axis of features, got shape {value.shape}")
    _checks.flag("transpose_weight", transpose_weight)
    unscaled = _checks.is_concrete_number(scale) and float(scale) == 1
    return linear_logits(
        l2_normalize(features),
        l2_normalize(weight, axis=-1 if transpose_weight else 0),
        scale=None if unscaled else scale,
        transpose_weight=transpose_weight,
        block_size=block_size,
        filter_eps=filter_eps,
        precision=precision,
        dtype=dtype,
    )


# --- the mechanism -----------------------------------------------------------------------------------------


def _by_row(rows: LabelledRows, *numbers: Any) -> list[Array]:
    """Hyper-parameters as arguments of a reduction, each `[*rows]`."""
    dtype = accumulation_dtype(rows.logits.dtype)
    shape = rows_of(rows.logits.shape, rows.axis)
    return [jnp.broadcast_to(jnp.asarray(v, dtype).reshape(()), shape) for v in numbers]


@functools.cache
def _others(function: Callable, k: int = 1) -> Callable:
    """The scores `function(x, *args)` of the columns that are not among the ids, the first k arguments."""

    def scores(x, cols, *args):
        named = functools.reduce(jnp.logical_or, (cols == i for i in args[:k]), False)
        return jnp.where(named, -jnp.inf, function(x, *args[k:]))

    return scores


@functools.cache
def _chosen(function: Callable, wanted: bool) -> Callable:
    """The scores `function(x, *args)` of the entries whose last argument, a boolean, is `wanted`."""

    def scores(x, cols, *args):
        *args, positive = args
        return jnp.where(positive == wanted, function(x, *args), -jnp.inf)

    return scores


def mapped_log_partition(function: Callable, *args, **arrays) -> reductions.RowReduction:
    """`mapped_logsumexp` that returns its parts."""
    return reductions.mapped_logsumexp(function, *args, **arrays)._replace(
        finalize=reductions.log_partition().finalize
    )


def _compete(negatives: LogPartition, positives: LogPartition, absent: Array) -> Array:
    """`softplus(lse_N + lse_P)`; 0 without negatives or without positives, +inf where a positive is absent."""
    negative, positive = negatives.log_sum != -jnp.inf, positives.log_sum != -jnp.inf
    both = negative & positive
    shift = negatives.shift + positives.shift
    log_sum = jnp.where(both, negatives.log_sum, 0) + jnp.where(both, positives.log_sum, 0)
    loss = jnp.where(both | jnp.isnan(shift), jax.nn.softplus(shift + log_sum), 0)
    loss = jnp.where(absent & negative, jnp.inf, loss)
    return loss * poison_of(positives.log_sum)  # also without negatives


def _against_target(
    rows: LabelledRows, function: Callable, target: Callable, *args: Array, col_args=()
) -> Array:
    """`softplus(lse_N f(c) - (score - drop))`: scores `f(c, *args, *col_args)`, and `target(c_y) = (score, drop)`.

    The drop is added to the differences of scores, which are small, rather than to the score.
    """
    others = mapped_log_partition(_others(function), rows.labels, *args, col_args=col_args)
    negatives, cosine = rows.reduce((others, reductions.take(rows.labels)))
    absent = cosine == -jnp.inf
    score, drop = target(jnp.where(absent, 0, cosine))
    positive = LogPartition(-score, jnp.zeros_like(score), jnp.asarray(drop, score.dtype))
    return rows.finish(_compete(negatives, positive, absent))


def _scaled(x, scale):
    return scale * x


_EDGE = 2.0**-23  # 1 - _EDGE is a float32


# --- cross-entropy with a margin ---------------------------------------------------------------------------


def normalized_softmax_loss(
    cosines: Logits,
    labels: Int[Array, "*rows"],
    *,
    scale: float = 20.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Normalized softmax: cross-entropy of scaled cosines, `lse(s c) - s c_y`.

    Args:
      cosines: `[*rows, classes]`, a floating array or an expression such as `cosine_logits` makes.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      scale: s, positive: the inverse temperature. 20 is the usual temperature of 0.05.
      axis: the axis of the classes.
      where: class mask that broadcasts to the cosines, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning"; Pereira et al., "Hyperspherical
      embedding for novel class classification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> cosines = jnp.array([[0.7, 0.3, -0.1, 0.2]])
      >>> print(jaxsoft.losses.normalized_softmax_loss(cosines, jnp.array([0]), scale=8.0).round(6))
      [0.058966]
    """
    options: dict[str, Any] = dict(axis=axis, where=where, weights=weights, ignore_index=ignore_index)
    return additive_margin_loss(cosines, labels, scale=scale, margin=0.0, **options)


def additive_margin_loss(
    cosines: Logits,
    labels: Int[Array, "*rows"],
    *,
    scale: float = 64.0,
    margin: float = 0.35,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """CosFace: `softplus(lse_N(s c) - s (c_y - m))`, cross-entropy with a margin on the label's cosine.

    Args:
      cosines: `[*rows, classes]`, a floating array or an expression such as `cosine_logits` makes.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      scale: s, positive.
      margin: m, subtracted from the label's cosine, 0 or more; 0 is `normalized_softmax_loss`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the cosines, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition"; Zeinali et al., "BUT System
      Description to VoxCeleb Speaker Recognition Challenge 2019" (both margins, for speakers).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> cosines = jnp.array([[0.7, 0.3, -0.1, 0.2]])
      >>> print(jaxsoft.losses.additive_margin_loss(cosines, jnp.array([0]), scale=8.0).round(6))
      [0.692566]
    """
    _checks.number("scale", scale, above=0)
    _checks.number("margin", margin, at_least=0)
    rows = prepare(cosines, labels, axis, where, weights, ignore_index, soft=False)
    s, m = _by_row(rows, scale, margin)
    return _against_target(rows, _scaled, lambda c: (s * c, s * m), s)


def additive_angular_margin_loss(
    cosines: Logits,
    labels: Int[Array, "*rows"],
    *,
    scale: float = 64.0,
    margin: float = 0.5,
    easy_margin: bool = False,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """ArcFace: `softplus(lse_N(s c) - s cos(arccos(c_y) + m))`, cross-entropy with a margin on the label's angle.

    Where the label's angle exceeds `pi - m` that cosine would rise again: its score is then `c_y - m sin(m)`, as in
    insightface. The gradient grows like `1 / sin(arccos(c_y))` towards a cosine of 1; clipping the cosine to
    `[-1 + 2^-23, 1 - 2^-23]` under the square root bounds it.

    Args:
      cosines: `[*rows, classes]`, a floating array or an expression such as `cosine_logits` makes.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      scale: s, positive.
      margin: m, added to the label's angle, in radians, from 0 to pi; 0 is `normalized_softmax_loss`.
      easy_margin: whether the margin applies only where the label's cosine is positive.
      axis: the axis of the classes.
      where: class mask that broadcasts to the cosines, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition"; Zeinali et al., "BUT System
      Description to VoxCeleb Speaker Recognition Challenge 2019" (both margins, for speakers).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> cosines = jnp.array([[0.7, 0.3, -0.1, 0.2]])
      >>> print(jaxsoft.losses.additive_angular_margin_loss(cosines, jnp.array([0]), scale=8.0).round(6))
      [1.05266]
    """
    _checks.number("scale", scale, above=0)
    _checks.number("margin", margin, at_least=0, at_most=math.pi)
    _checks.flag("easy_margin", easy_margin)
    rows = prepare(cosines, labels, axis, where, weights, ignore_index, soft=False)
    s, m = _by_row(rows, scale, margin)

    def target(c):
        inside = jnp.clip(c, -1 + _EDGE, 1 - _EDGE)
        turned = 2 * c * jnp.sin(m / 2) ** 2 + jnp.sqrt((1 - inside) * (1 + inside)) * jnp.sin(m)
        bound, beyond = (0, 0) if easy_margin else (-jnp.cos(m), m * jnp.sin(m))
        return s * c, s * jnp.where(c > bound, turned, beyond)

    return _against_target(rows, _scaled, target, s)


# --- wrapped Cauchy ----------------------------------------------------------------------------------------


def _wrapped_cauchy(x, scale, concentration):
    """The scaled density, with `1 - gamma` from a sigmoid of its own and a denominator that does not cancel."""
    spread = jnp.maximum(jax.nn.sigmoid(-concentration.astype(x.dtype)), 1e-4)
    gamma = 1 - spread
    square = spread * spread + 2 * gamma * (1 - jnp.clip(x, -1, 1))  # 1 + gamma^2 - 2 gamma c
    return scale * spread * (1 + gamma) / (2 * jnp.pi * square)


def _check_concentration(concentration: Any, columns: int) -> None:
    check_floats("class_concentration", concentration, (columns,), "one number per class")


def wrapped_cauchy_loss(
    cosines: Logits,
    labels: Int[Array, "*rows"],
    class_concentration: Float[Array, " classes"],
    *,
    scale: float = 250.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Wrapped Cauchy angular softmax: `lse(s f) - s f_y`, with f_i the wrapped Cauchy density of class i.

    `f_i = (1 - gamma_i^2) / (2 pi (1 + gamma_i^2 - 2 gamma_i c_i))` with `gamma = sigmoid(g)`: the cross-entropy of
    `wrapped_cauchy_logits`, without storing them.

    Args:
      cosines: `[*rows, classes]`, a floating array or an expression such as `cosine_logits` makes.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      class_concentration: g, `[classes]`, trained; it starts at -1 (ImageNet-LT), 0 (CIFAR-LT) or 1 (iNaturalist).
      scale: s, positive: 250 if fixed; if trained, `softplus(r) + 1` with r starting at 0.
      axis: the axis of the classes.
      where: class mask that broadcasts to the cosines, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Han, "Wrapped Cauchy Distributed Angular Softmax for Long-Tailed Visual Recognition".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> cosines, g = jnp.array([[0.7, 0.3, -0.1, 0.2]]), jnp.full(4, -1.0)
      >>> print(jaxsoft.losses.wrapped_cauchy_loss(cosines, jnp.array([0]), g, scale=1.693147).round(6))
      [1.307]
    """
    _checks.number("scale", scale, above=0)
    rows = prepare(cosines, labels, axis, where, weights, ignore_index, soft=False)
    _check_concentration(class_concentration, rows.columns)
    class_concentration = jnp.asarray(class_concentration)
    (s,) = _by_row(rows, scale)
    own = rows.of_labels(class_concentration)
    return _against_target(
        rows, _wrapped_cauchy, lambda c: (_wrapped_cauchy(c, s, own), 0), s, col_args=(class_concentration,)
    )


def wrapped_cauchy_logits(
    cosines: Float[Array, "*rows classes"],
    class_concentration: Float[Array, " classes"],
    *,
    scale: float = 250.0,
    axis: int = -1,
) -> Float[Array, "*rows classes"]:
    """Wrapped Cauchy densities of angles, `s (1 - gamma^2) / (2 pi (1 + gamma^2 - 2 gamma c))`, as logits.

    `gamma = sigmoid(g)` per class, at most 1 - 1e-4. The logit is the density itself, not its logarithm. Cosines are
    clipped to [-1, 1].

    Args:
      cosines: `[*rows, classes]`, a floating array.
      class_concentration: g, `[classes]`.
      scale: s, positive.
      axis: the axis of the classes.

    Returns:
      Logits of the cosines' shape, float32 or wider; -inf where a cosine is -inf.

    Raises:
      TypeError: an argument of a wrong type or dtype; an expression (use `wrapped_cauchy_loss`).
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Han, "Wrapped Cauchy Distributed Angular Softmax for Long-Tailed Visual Recognition".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> cosines, g = jnp.array([0.9, 0.1, -0.5]), jnp.zeros(3)
      >>> print(jaxsoft.losses.wrapped_cauchy_logits(cosines, g, scale=1.0).round(6))
      [0.341046 0.103797 0.068209]
    """
    check_dense(cosines, "wrapped_cauchy_logits")
    axis = check_axis(cosines, axis)
    _checks.number("scale", scale, above=0)
    _check_concentration(class_concentration, cosines.shape[axis])
    x = jnp.asarray(cosines, accumulation_dtype(cosines.dtype))
    g = jnp.expand_dims(jnp.asarray(class_concentration), tuple(range(1, x.ndim - axis)))
    absent = x == -jnp.inf
    return jnp.where(absent, -jnp.inf, _wrapped_cauchy(jnp.where(absent, 0, x), scale, g)).astype(x.dtype)


# --- SphereFace2 -------------------------------------------------------------------------------------------


@functools.cache
def _sphereface2(straight_through: bool) -> tuple[Callable, Callable]:
    def logit(x, scale, margin, power, bias):
        similarity = 2 * jnp.maximum((1 + x) / 2, 1e-12) ** power - 1
        if straight_through:
            similarity = x + lax.stop_gradient(similarity - x)
        return scale * (similarity + margin) + bias

    def negative(x, cols, label, *args):
        return jnp.where(cols == label, 0, jax.nn.softplus(logit(x, *args)))

    return logit, negative


def sphereface2_loss(
    cosines: Logits,
    labels: Int[Array, "*rows"],
    *,
    bias: float | Float[Array, ""] | None = None,
    scale: float = 40.0,
    margin: float = 0.4,
    power: float = 3.0,
    positive_weight: float = 0.7,
    straight_through: bool = False,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """SphereFace2: one binary classification per class, `(w sp(-a_y) + (1 - w) sum_{i != y} sp(a_i)) / s`.

    `sp` is softplus, `w` the positive weight, and the logits are `a_y = s (g(c_y) - margin) + bias`,
    `a_i = s (g(c_i) + margin) + bias` with `g(c) = 2 ((c + 1) / 2)^power - 1`. (The authors' code multiplies by 50.)

    Args:
      cosines: `[*rows, classes]`, a floating array or an expression such as `cosine_logits` makes.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      bias: one number for all classes, trained; None: that of `sphereface2_bias_init`, not trained.
      scale: s, positive; 30 for some data.
      margin: m, 0 or more.
      power: exponent of the similarity map g, positive.
      positive_weight: w, in [0, 1].
      straight_through: whether the gradient treats g as the identity, as in the authors' code.
      axis: the axis of the classes.
      where: class mask that broadcasts to the cosines, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wen et al., "SphereFace2: Binary Classification is All You Need for Deep Face Recognition".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> cosines = jnp.array([[0.7, 0.3, -0.1, 0.2]])
      >>> print(jaxsoft.losses.sphereface2_loss(cosines, jnp.array([0])).round(6))
      [0.164742]
    """
    _check_sphereface2(scale, margin, power, positive_weight)
    _checks.flag("straight_through", straight_through)
    if bias is not None:
        _checks.number("bias", bias)
    rows = prepare(cosines, labels, axis, where, weights, ignore_index, soft=False)
    if bias is None:
        options = dict(scale=scale, margin=margin, power=power, positive_weight=positive_weight)
        bias = _bias_init(max(rows.columns, 2), **options)
    s, m, t, b = _by_row(rows, scale, margin, power, bias)
    logit, negative = _sphereface2(straight_through)
    others = reductions.mapped_sum(negative, rows.labels, s, m, t, b)
    negatives, cosine, count = rows.reduce((others, reductions.take(rows.labels), reductions.count()))
    absent = cosine == -jnp.inf
    positive = jax.nn.softplus(-logit(jnp.where(absent, 0, cosine), s, -m, t, b))
    loss = (positive_weight * positive + (1 - positive_weight) * negatives) / s
    loss = jnp.where(absent, jnp.inf, loss * poison_of(cosine))
    return rows.finish(jnp.where(count > 0, loss, 0))


def sphereface2_bias_init(
    num_classes: int,
    *,
    scale: float = 40.0,
    margin: float = 0.4,
    power: float = 3.0,
    positive_weight: float = 0.7,
) -> Float[Array, ""]:
    """The bias at which positives and negatives of `sphereface2_loss` pull equally when all cosines are 0.

    Solves `w sigmoid(-a_y) = (1 - w) (num_classes - 1) sigmoid(a_i)`.

    Args:
      num_classes: the number of classes, 2 or more.
      scale: s, positive.
      margin: m, 0 or more.
      power: exponent of the similarity map, positive.
      positive_weight: w, in (0, 1).

    Returns:
      A scalar.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: an argument out of range.

    Reference:
      Wen et al., "SphereFace2: Binary Classification is All You Need for Deep Face Recognition".

    Example:
      >>> import jaxsoft
      >>> print(jaxsoft.losses.sphereface2_bias_init(4).round(4))
      15.2528
    """
    num_classes = _checks.integer("num_classes", num_classes, at_least=2)
    _check_sphereface2(scale, margin, power, positive_weight)
    return _bias_init(num_classes, scale=scale, margin=margin, power=power, positive_weight=positive_weight)


def _bias_init(num_classes: int, *, scale, margin, power, positive_weight) -> Array:
    scale, margin, power, w = (jnp.asarray(v, float) for v in (scale, margin, power, positive_weight))
    log_z = jnp.log(w) - jnp.log1p(-w) - math.log(num_classes - 1)
    z = jnp.exp(log_z)
    root = jnp.sqrt((1 - z) ** 2 + 4 * z * jnp.exp(-2 * scale * margin))
    similarity = 2 * 0.5**power - 1
    # Two forms of the same root of a quadratic; each cancels where the other does not.
    few = jnp.log(jnp.maximum(root + z - 1, 1e-30) / 2) - scale * (similarity - margin)
    many = math.log(2) + log_z - jnp.log(jnp.maximum(root + 1 - z, 1e-30)) - scale * (similarity + margin)
    return jnp.where(z > 1, few, many)


def _check_sphereface2(scale, margin, power, positive_weight) -> None:
    _checks.number("scale", scale, above=0)
    _checks.number("margin", margin, at_least=0)
    _checks.number("power", power, above=0)
    _checks.number("positive_weight", positive_weight, at_least=0, at_most=1)


# --- circle loss -------------------------------------------------------------------------------------------


@functools.cache
def _circle(stop_weight_gradient: bool) -> tuple[Callable, Callable]:
    def weight(a):
        a = jnp.maximum(a, 0)
        return lax.stop_gradient(a) if stop_weight_gradient else a

    def positive(x, scale, margin):
        return -scale * weight(1 + margin - x) * (x - (1 - margin))

    def negative(x, scale, margin):
        return scale * weight(x + margin) * (x - margin)

    return positive, negative


def circle_loss(
    cosines: Logits,
    labels: Int[Array, "*rows k"] | Bool[Array, "*rows columns"],
    *,
    scale: float = 256.0,
    margin: float = 0.25,
    stop_weight_gradient: bool = True,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Circle loss: `softplus(lse_N s [c + m]_+ (c - m) + lse_P s [1 + m - c]_+ (1 - m - c))`.

    N are the negatives, P the positives. Each similarity is weighted by its distance from its optimum; the weights
    `[.]_+` are constants to the gradient. For class labels, pass ids `labels[:, None]` and the cosines of examples and
    classes. For pairs, pass each example's positives as booleans, the cosines among examples, and a mask `where` that
    leaves out the example itself.

    Args:
      cosines: `[*rows, columns]`, a floating array or an expression such as `cosine_logits` makes.
      labels: the positives P: distinct ids, integers `[*rows, k]`, padded with `ignore_index`; or booleans of the
        cosines' shape (True = positive). All other columns are negatives. An id out of range gives NaN.
      scale: s, positive: 256 for faces, 128 for persons, 80 for other retrieval (with a margin of 0.4).
      margin: m, 0 or more.
      stop_weight_gradient: whether to treat the weights as constants, as the paper does.
      axis: the axis of the classes.
      where: mask that broadcasts to the cosines, True = counts. A masked column is neither positive nor negative; a
        masked positive given by its id costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: pads the ids of rows with fewer than k positives.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without positives, or without negatives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> cosines, positives = jnp.array([[0.8, 0.6, 0.4, 0.1, -0.3]]), jnp.array([[0, 1]])
      >>> print(jaxsoft.losses.circle_loss(cosines, positives, scale=8.0).round(6))
      [2.532094]
    """
    _checks.number("scale", scale, above=0)
    _checks.number("margin", margin, at_least=0)
    _checks.flag("stop_weight_gradient", stop_weight_gradient)
    rows, given = prepare_positives(cosines, labels, axis, where, weights, ignore_index)
    s, m = _by_row(rows, scale, margin)
    positive, negative = _circle(stop_weight_gradient)
    if given is None:
        others = mapped_log_partition(_chosen(negative, False), s, m, entry_args=(rows.labels,))
        own = mapped_log_partition(_chosen(positive, True), s, m, entry_args=(rows.labels,))
        negatives, positives = rows.reduce((others, own))
        return rows.finish(_compete(negatives, positives, jnp.zeros(s.shape, bool)))
    ids = jnp.moveaxis(jnp.where(given, rows.labels, -1), -1, 0)
    others = mapped_log_partition(_others(negative, len(ids)), *ids, s, m)
    negatives, taken = rows.reduce((others, reductions.take(jnp.where(given, rows.labels, 0))))
    absent = given & (taken == -jnp.inf)
    scores = positive(jnp.where(absent, 0, taken), s[..., None], m[..., None])
    positives = _log_partition(jnp.where(given & ~absent, scores, -jnp.inf))
    return rows.finish(_compete(negatives, positives, jnp.any(absent, axis=-1)))


def _log_partition(x: Array) -> LogPartition:
    """The log-sum-exp, in parts, of the positives' few scores; -inf marks an absent one."""
    shift = finite_gauge(jnp.max(x, axis=-1, initial=-jnp.inf))
    total = jnp.sum(jnp.exp(x - shift[..., None]), axis=-1)
    return LogPartition(shift, jnp.zeros_like(shift), log_or_neg_inf(total))
