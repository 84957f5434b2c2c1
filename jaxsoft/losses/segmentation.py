"""Overlap losses for segmentation.

The Jaccard index, the Dice score and the Tversky index of soft counts, per class. They are functions of all pixels
together, not of single pixels, take class ids or soft labels, and are usually added to a cross-entropy.
`examples/losses/segmentation.py` trains with each of them, side by side.

For one class, `x` are the probabilities of its pixels and `t` its labels, 0, 1 or anything between. With soft
counts of true positives `tp`, false positives `fp` and false negatives `fn`,

    loss = 1 - (tp + s) / (tp + alpha fp + beta fn + s).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.losses._common import IGNORE_INDEX, LabelledRows, check_floats, prepare
from jaxsoft.normalizers.inner import present_scores
from jaxsoft.rows.inner import softmax_with

_PRESENT = 0.01  # a class is present if some pixel's label for it exceeds this


def tversky_loss(
    logits: Float[Array, "*pixels classes"],
    labels: Int[Array, "*pixels"] | Float[Array, "*pixels classes"],
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    kind: int = 1,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*pixels"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    activation: str | None = "softmax",
    aggregation: str = "batch",
    classes: str | None = None,
    class_weights: Float[Array, " classes"] | None = None,
    smoothing: float = 1e-3,
    norm: int = 1,
    log: bool = False,
    gamma: float = 1.0,
    axis_name: Any = None,
) -> Float[Array, "*images"]:
    """Tversky loss with soft labels: `1 - (tp + s) / (tp + alpha fp + beta fn + s)`, the mean over classes.

    A function of all pixels together, not of single pixels: `aggregation` says which pixels share a value. With
    probabilities `x` and labels `t` of a class, the soft counts are sums over the pixels of

    * `kind=1`: `tp = (|x| + |t| - |x - t|) / 2`, `fp = |x| - tp`, `fn = |t| - tp`, absolute values to the power `norm`;
    * `kind=2`: `tp = x t`, `fp = max(x - t, 0)`, `fn = max(t - x, 0)`, the last two to the power `norm`.

    With either kind the loss is 0 at `x = t` for soft labels, unlike the usual soft Jaccard and Dice losses. For labels
    of 0 and 1 and `norm=1` it equals those (such as `optax.losses.dice_loss`). It is common to add a cross-entropy,
    with a weight of 0.25 to 0.75 on this loss. Errors are a few units in the last place of the accumulation dtype; at
    `x = t` the gradient of `|x - t|` is 0.

    Args:
      logits: `[*pixels, classes]`, a floating array; the first axis that is not `axis` counts the images.
      labels: class ids `[*pixels]`, or the classes' shares of each pixel, floats of the logits' shape. An id out
        of range gives NaN, in value and gradient, and an error under `checkify`.
      alpha: the weight of false positives, 0 or more.
      beta: the weight of false negatives, 0 or more. `alpha = beta = 1` is Jaccard, 1/2 is Dice.
      kind: 1 or 2, see above (JML1 and DML1, or JML2 and DML2, in the papers).
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts; `keep[..., None]` leaves out pixels. A masked
        entry leaves the softmax, the counts and the labels.
      weights: `[*pixels]`, multiply the counts of each pixel.
      ignore_index: class id of pixels to leave out; None: there is no such id.
      activation: from logits to probabilities: `"softmax"`, `"sigmoid"` (classes that overlap), or None if
        `logits` are probabilities.
      aggregation: `"batch"`: counts over all pixels of all images, a scalar. `"image"`: counts per image, one value
        per image. `"class"`: counts per image; the loss of each class is averaged over images, then over classes.
      classes: which classes enter the mean: `"present"`, those with a label above 0.01, or `"all"`. None:
        present ones for class ids, all for soft labels.
      class_weights: `[classes]`, multiply the classes' losses (the mean divides by the number of classes).
      smoothing: `s`, 0 or more. With 0, a class that is neither labelled nor predicted costs 0.
      norm: the power of the absolute values, a positive integer.
      log: whether the loss of a class is `-log(score)` instead of `1 - score`.
      gamma: power of a class's loss, 1 or more; above 1 it emphasizes the classes that are segmented badly.
      axis_name: the mesh axes, inside `shard_map` or `pmap`, whose devices hold the other parts of the batch.

    Returns:
      A scalar, or `[images]` for `aggregation="image"`; float32 or wider; 0, with gradient 0, if nothing counts.

    Raises:
      TypeError: an argument of a wrong type or dtype, or logits that are `linear_logits`.
      ValueError: an argument of a wrong shape, out of range, or an unknown option.

    Reference:
      Salehi et al., "Tversky Loss Function for Image Segmentation Using 3D Fully Convolutional Deep Networks";
      Wang et al., "Jaccard Metric Losses: Optimizing the Jaccard Index with Soft Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 0.0], [0.5, 1.0], [-1.0, 1.0], [0.0, 3.0]])
      >>> print(jaxsoft.losses.tversky_loss(logits, jnp.array([0, 0, 1, 1])).round(6))
      0.233651
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("smoothing", smoothing)):
        _checks.number(name, value, at_least=0)
    _checks.number("gamma", gamma, at_least=1)
    _checks.option("kind", kind, (1, 2))
    _checks.option("activation", activation, ("softmax", "sigmoid", None))
    _checks.option("aggregation", aggregation, ("batch", "image", "class"))
    _checks.option("classes", classes, ("present", "all", None))
    _checks.flag("log", log)
    norm = _checks.integer("norm", norm, at_least=1)
    x, present, axis = present_scores(logits, axis, where, "an overlap loss")
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    if aggregation != "batch" and x.ndim < 2:
        raise ValueError(f"logits must have an axis of images for aggregation={aggregation!r}, got {x.shape}")
    if class_weights is not None:
        check_floats("class_weights", class_weights, (rows.columns,), "one number per class")

    x, present = (jnp.moveaxis(a, axis, -1) for a in (x, present))  # [images, ..., classes]
    if rows.keep is not None:
        present = present & rows.keep[..., None]
    if weights is not None:
        present = present & (weights != 0)[..., None]
    x, t = _probabilities_and_labels(x, present, rows, activation)
    counts = _soft_counts(x, t, kind, norm)
    if weights is not None:
        counts = (jnp.where(present, weights.astype(x.dtype)[..., None] * a, 0) for a in counts)
    only_present = classes == "present" or (classes is None and not rows.soft)
    labelled = present & (t > _PRESENT) if only_present else present

    def total(a, over, devices=axis_name):
        a = jnp.sum(a, axis=over, dtype=x.dtype)
        return a if devices is None else lax.psum(a, devices)

    by_image = aggregation != "batch"
    pixels = tuple(range(by_image, x.ndim - 1))
    tp, fp, fn, labelled = (total(a, pixels, None if by_image else axis_name) for a in (*counts, labelled))
    loss = _loss_of_counts(tp, alpha * fp + beta * fn, smoothing, log, gamma)
    if class_weights is not None:
        loss = loss * class_weights.astype(loss.dtype)
    active = labelled > 0
    loss = jnp.where(active, loss, 0)
    if aggregation == "class":
        loss = safe_divide(total(loss, 0), total(active, 0))
        active = total(active, 0) > 0
    return safe_divide(jnp.sum(loss, axis=-1), jnp.sum(active, axis=-1, dtype=loss.dtype))


def _probabilities_and_labels(x: Array, present: Array, rows: LabelledRows, activation: str | None):
    """The probabilities and the labels of each pixel, `[*pixels, classes]`, 0 where absent."""
    x = jnp.where(present, x, 0)
    if activation is not None:
        x = softmax_with(x, where=present) if activation == "softmax" else jax.nn.sigmoid(x)
    if rows.soft:
        t = rows.labels.astype(x.dtype)
    else:
        t = jax.nn.one_hot(rows.labels, rows.columns, dtype=x.dtype)
        in_range = (rows.labels >= 0) & (rows.labels < rows.columns)
        x = x * jnp.where(in_range, 1, jnp.nan)[..., None]  # an id out of range: NaN in value and gradient
    return jnp.where(present, x, 0), jnp.where(present, t, 0)


def _soft_counts(x: Array, t: Array, kind: int, norm: int) -> tuple[Array, Array, Array]:
    """True positives, false positives and false negatives of each pixel."""
    if kind == 2:
        fp, fn = (jnp.where(a > 0, a, 0) ** norm for a in (x - t, t - x))
        return x * t, fp, fn
    distance = (x - t) * jnp.sign(x - t)  # |x - t|, with gradient 0 at 0
    x_size, t_size = x**norm, t**norm
    tp = (x_size + t_size - distance**norm) / 2
    return tp, x_size - tp, t_size - tp


def _loss_of_counts(tp: Array, miss: Array, smoothing: float, log: bool, gamma: float) -> Array:
    """`(1 - score)^gamma`, or `(-log score)^gamma`, with the score `(tp + smoothing) / (tp + miss + smoothing)`."""
    if log:
        loss = jnp.log1p(safe_divide(miss, tp + smoothing))
        loss = jnp.where((tp + smoothing == 0) & (miss > 0), jnp.inf, loss)  # a score of 0
    else:
        loss = safe_divide(miss, tp + miss + smoothing)
    if _checks.is_concrete_number(gamma) and float(gamma) == 1:
        return loss
    positive = loss > 0
    return jnp.where(positive, jnp.where(positive, loss, 1) ** gamma, jnp.minimum(loss, 0))


def jaccard_metric_loss(
    logits: Float[Array, "*pixels classes"],
    labels: Int[Array, "*pixels"] | Float[Array, "*pixels classes"],
    **options: Any,
) -> Float[Array, "*images"]:
    """Jaccard metric loss: `2 |x - t| / (|x| + |t| + |x - t|)` of each class, 0 at `x = t` for soft labels, too.

    `tversky_loss` with `alpha = beta = 1`: the loss of the Jaccard index (intersection over union). `kind=2` is
    `1 - x t / (x t + |x - t|)`. The loss is the mean over the classes.

    Args:
      logits: `[*pixels, classes]`, a floating array.
      labels: class ids `[*pixels]`, or the classes' shares of each pixel, floats of the logits' shape.
      **options: as in `tversky_loss`, without alpha and beta.

    Returns:
      A scalar, or `[images]` for `aggregation="image"`: not losses of single pixels.

    Raises:
      TypeError: an argument of a wrong type or dtype, or logits that are `linear_logits`.
      ValueError: an argument of a wrong shape, out of range, or an unknown option.

    Reference:
      Wang et al., "Jaccard Metric Losses: Optimizing the Jaccard Index with Soft Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x, t = jnp.array([[0.8], [0.3], [0.6]]), jnp.array([[0.9], [0.1], [0.5]])
      >>> print(jaxsoft.losses.jaccard_metric_loss(x, t, activation=None).round(6))
      0.222099
      >>> print(jaxsoft.losses.jaccard_metric_loss(t, t, activation=None))
      0.0
    """
    return tversky_loss(logits, labels, alpha=1.0, beta=1.0, **options)


def dice_semimetric_loss(
    logits: Float[Array, "*pixels classes"],
    labels: Int[Array, "*pixels"] | Float[Array, "*pixels classes"],
    **options: Any,
) -> Float[Array, "*images"]:
    """Dice semimetric loss: `|x - t| / (|x| + |t|)` of each class, 0 at `x = t` for soft labels, too.

    `tversky_loss` with `alpha = beta = 1/2`: the loss of the Dice score (F1). `kind=2` is
    `1 - 2 x t / (2 x t + |x - t|)`. The loss is the mean over the classes.

    Args:
      logits: `[*pixels, classes]`, a floating array.
      labels: class ids `[*pixels]`, or the classes' shares of each pixel, floats of the logits' shape.
      **options: as in `tversky_loss`, without alpha and beta.

    Returns:
      A scalar, or `[images]` for `aggregation="image"`: not losses of single pixels.

    Raises:
      TypeError: an argument of a wrong type or dtype, or logits that are `linear_logits`.
      ValueError: an argument of a wrong shape, out of range, or an unknown option.

    Reference:
      Wang et al., "Dice Semimetric Losses: Optimizing the Dice Score with Soft Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x, t = jnp.array([[0.8], [0.3], [0.6]]), jnp.array([[0.9], [0.1], [0.5]])
      >>> print(jaxsoft.losses.dice_semimetric_loss(x, t, activation=None, smoothing=0.0).round(6))
      0.125
    """
    return tversky_loss(logits, labels, alpha=0.5, beta=0.5, **options)
