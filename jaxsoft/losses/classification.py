"""Classification.

Softmax cross-entropy and losses that are functions of it: polynomial and focal losses, and max suppression.

In the formulas `x` are the logits of a row, `y` its label, `p = softmax(x)`, `l = logsumexp(x) - x_y` the negative
log-likelihood, and `C` the number of classes that are not masked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.losses._common import (
    IGNORE_INDEX,
    LabelledRows,
    check_floats,
    is_zero,
    miss_of,
    power_of,
    prepare,
)
from jaxsoft.rows import Logits, reductions

Labels = Int[Array, "*rows"] | Float[Array, "*rows columns"]


def cross_entropy(
    logits: Logits,
    labels: Labels,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    class_weights: Float[Array, " columns"] | None = None,
    label_smoothing: float = 0.0,
    smoothing: str = "uniform",
    z_loss: float = 0.0,
) -> Float[Array, "*rows"]:
    """Softmax cross-entropy, `l = logsumexp(x) - x_y`, or `-sum_c q_c log p_c` for label distributions q.

    With `label_smoothing` a, l becomes `(1 - a) l + a mean_c(logsumexp(x) - x_c)`; with `z_loss` k,
    `k logsumexp(x)^2` is added.

    For `linear_logits` the logits are never stored. Error bound: a few units in the last place of the
    accumulation dtype, relative to the larger of 1 and the loss; with smoothing, relative to the largest logit.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids, integers `[*rows]`; or distributions, floats of the logits' shape (not checked to sum to
        1). An id out of range gives NaN, in value and gradient, and an error under `checkify`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf; a row
        without classes costs 0.
      weights: `[*rows]`, multiply the losses; a weight of 0 hides a loss that is not finite.
      ignore_index: class id of examples to leave out: loss 0, gradient 0. None leaves out none.
      class_weights: `[columns]`, multiply each class's term `-q_c log p_c`. (The mean of PyTorch divides by the
        sum of `class_weights[labels]`.)
      label_smoothing: the mass a, in [0, 1], that moves from the label to other classes.
      smoothing: which classes get it: `"uniform"`, all classes including the label, as in PyTorch and optax (the
        label keeps `1 - a + a / C`); or `"others"`, only the others (the label keeps `1 - a`; integer labels only).
      z_loss: coefficient of the log-partition regularizer `z_loss * logsumexp(x)**2` (1e-4 in PaLM). Unrelated to
        `spherical_z_loss`, a loss by itself.

    Returns:
      Losses `[*rows]`, float32 or wider, never averaged; `weighted_mean` takes the mean over the examples that
      are not ignored.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown option.

    Reference:
      Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (never storing the logits); Chowdhery
      et al., "PaLM" (z_loss); Szegedy et al., "Rethinking the Inception Architecture" (smoothing).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.cross_entropy(logits, jnp.array([0, 3])).round(6))
      [0.58242  1.393958]
      >>> print(jaxsoft.losses.cross_entropy(logits, jnp.array([0, -100]), label_smoothing=0.1).round(6))
      [0.73042 0.     ]
    """
    _checks.number("label_smoothing", label_smoothing, at_least=0, at_most=1)
    _checks.option("smoothing", smoothing, ("uniform", "others"))
    _checks.number("z_loss", z_loss, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    if smoothing == "others" and rows.soft and not is_zero(label_smoothing):
        raise ValueError(
            "smoothing='others' needs class ids as labels, got distributions; smooth the distributions themselves, or "
            "use smoothing='uniform'"
        )
    _check_class_weights(class_weights, rows)
    if class_weights is not None and rows.soft:
        rows = dataclasses.replace(rows, labels=rows.labels * class_weights)

    smooth = not is_zero(label_smoothing)
    wanted = {"label": rows.label_statistics()}
    if smooth:
        wanted["count"] = reductions.count()
        wanted["all"] = reductions.sum() if class_weights is None else reductions.weighted_sum(class_weights)
    out = rows.reduce(wanted)

    label = out["label"]
    lse = jnp.where(label.present, label.logsumexp, 0)
    loss = label.nll
    if class_weights is not None and not rows.soft:
        loss = rows.of_labels(class_weights) * loss
    if smooth:
        a, count = label_smoothing, out["count"]
        total, mass = (out["all"], count) if class_weights is None else out["all"]
        all_classes = mass * lse - total  # sum_c w_c (lse - x_c)
        if smoothing == "uniform":
            loss = (1 - a) * loss + a * safe_divide(all_classes, count)
        else:
            others = safe_divide(all_classes - jnp.where(count > 1, loss, 0), count - 1)
            loss = jnp.where(count > 1, (1 - a) * loss + a * others, loss)
    if not is_zero(z_loss):
        loss = loss + z_loss * lse * lse
    return rows.finish(loss)


def _check_class_weights(class_weights: Any, rows: LabelledRows) -> None:
    if class_weights is not None:
        check_floats("class_weights", class_weights, (rows.columns,), "one number per class")


def poly_loss(
    logits: Logits,
    labels: Labels,
    *,
    epsilon: float | Sequence[float] = 2.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    label_smoothing: float = 0.0,
) -> Float[Array, "*rows"]:
    """PolyLoss: `l + sum_j epsilon_j (1 - p_t)^j`, cross-entropy with its first polynomial terms changed.

    `p_t` is `p_y`, or `sum_c q_c p_c` for distributions q. Cross-entropy is `sum_{j>=1} (1 - p_t)^j / j`;
    `epsilon_j >= -1/j` keeps every coefficient non-negative.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or distributions of the logits' shape, as in `cross_entropy`.
      epsilon: one number (Poly-1) or a sequence `epsilon_1 ... epsilon_N` (Poly-N). The default 2.0 is the
        paper's for ImageNet and optax's; -1.0 suits instance segmentation and detection.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.
      label_smoothing: uniform smoothing of the labels, in [0, 1].

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.poly_loss(logits, jnp.array([0])).round(6))
      [1.465329]
    """
    coefficients = list(epsilon) if isinstance(epsilon, Sequence) else [epsilon]
    for j, e in enumerate(coefficients):
        _checks.number(f"epsilon[{j}]" if isinstance(epsilon, Sequence) else "epsilon", e)
    _checks.number("label_smoothing", label_smoothing, at_least=0, at_most=1)
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    smooth = not is_zero(label_smoothing)
    wanted = {"label": rows.label_statistics()}
    if rows.soft:
        wanted["overlap"] = reductions.weighted_log_partition(rows.labels)
    if smooth:
        wanted["count"] = reductions.count()
        wanted["mean"] = reductions.mean()
    out = rows.reduce(wanted)

    label = out["label"]
    loss, present = label.nll, label.present
    if rows.soft:
        log_overlap = label.partition.log_softmax(out["overlap"].shift) + out["overlap"].log_sum
        miss = 1 - jnp.where(present, jnp.exp(jnp.where(present, log_overlap, 0)), 1)
    else:
        miss = miss_of(loss)
    if smooth:
        a, count = label_smoothing, out["count"]
        lse = jnp.where(present, label.logsumexp, 0)
        loss = (1 - a) * loss + a * (lse - out["mean"])
        miss = (1 - a) * miss + a * (1 - safe_divide(jnp.ones_like(count), count))
    power = jnp.ones_like(miss)
    poly = jnp.zeros_like(miss)
    for e in coefficients:
        power = power * miss
        poly = poly + e * power
    return rows.finish(jnp.where(present, loss + poly, 0))


def poly1_cross_entropy(
    logits: Logits, labels: Labels, *, epsilon: float = 2.0, **options
) -> Float[Array, "*rows"]:
    """Poly-1: `l + epsilon (1 - p_t)`, the form of `poly_loss` with one parameter.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or distributions of the logits' shape.
      epsilon: the change of the first polynomial coefficient.
      **options: as in `poly_loss`.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.poly1_cross_entropy(logits, jnp.array([0]), epsilon=-1.0).round(6))
      [0.140965]
    """
    _checks.number("epsilon", epsilon)
    return poly_loss(logits, labels, epsilon=epsilon, **options)


def focal_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    gamma: float = 2.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    class_weights: Float[Array, " columns"] | None = None,
    stop_weight_gradient: bool = False,
) -> Float[Array, "*rows"]:
    """Softmax focal loss: `(1 - p_y)^gamma l`, which emphasizes examples not yet learned.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      gamma: focusing parameter, 0 or more; 2 for detection, 3 for calibration, 0 is cross-entropy.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.
      class_weights: `[columns]`, the balancing factor alpha of each class.
      stop_weight_gradient: whether to treat `(1 - p_y)^gamma` as a constant, as some implementations do.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Lin et al., "Focal Loss for Dense Object Detection".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.focal_loss(logits, jnp.array([0])).round(6))
      [0.113503]
    """
    _checks.number("gamma", gamma, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    _check_class_weights(class_weights, rows)
    _checks.flag("stop_weight_gradient", stop_weight_gradient)
    loss = rows.reduce(rows.label_statistics()).nll
    focus = power_of(miss_of(loss), gamma)
    loss = (lax.stop_gradient(focus) if stop_weight_gradient else focus) * loss
    if class_weights is not None:
        loss = rows.of_labels(class_weights) * loss
    return rows.finish(loss)


def poly1_focal_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    gamma: float = 2.0,
    epsilon: float = -1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Poly-1 of the softmax focal loss: `(1 - p_y)^gamma l + epsilon (1 - p_y)^(gamma + 1)`.

    *Reconstructed* from the paper's definition and widely used ports.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      gamma: focusing parameter, 0 or more.
      epsilon: the change of the first polynomial coefficient; -1 for detection.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.poly1_focal_loss(logits, jnp.array([0])).round(6))
      [0.027472]
    """
    _checks.number("gamma", gamma, at_least=0)
    _checks.number("epsilon", epsilon)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    loss = rows.reduce(rows.label_statistics()).nll
    miss = miss_of(loss)
    focus = power_of(miss, gamma)
    return rows.finish(focus * loss + epsilon * focus * miss)


def dual_focal_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    gamma: float = 5.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Dual focal loss: `(1 - p_y + p_j)^gamma l`, with `p_j` the largest probability strictly below `p_y`.

    Reads the logits twice: first for the label's logit, then for the largest one below it.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      gamma: focusing parameter, 0 or more. The paper tunes it on validation data; 5 is our default.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Tao et al., "Dual Focal Loss for Calibration".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.dual_focal_loss(logits, jnp.array([0])).round(6))
      [0.065998]
    """
    _checks.number("gamma", gamma, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    (loss, partition), score = rows.reduce((rows.label_statistics(), reductions.take(rows.labels)))
    below = rows.reduce(reductions.maximum_below(score, rows.labels))
    any_below = below > -jnp.inf
    log_p = partition.log_softmax(jnp.where(any_below, below, partition.shift))
    runner_up = jnp.where(any_below, jnp.exp(log_p), 0)
    return rows.finish(power_of(miss_of(loss) + runner_up, gamma) * loss)


def max_suppression_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    suppression: float = 0.1,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """MaxSup: `l + suppression (max_c x_c - mean_c x_c)`, label smoothing of the top class in place of the label.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      suppression: the coefficient, 0 or more; may be traced (the paper raises it from 0.1 to 0.2 over training).
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider. The gradient of the maximum goes to the first class that attains it.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Zhou et al., "MaxSup: Overcoming Representation Collapse in Label Smoothing".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.max_suppression_loss(logits, jnp.array([3])).round(6))
      [1.523958]
    """
    _checks.number("suppression", suppression, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    label, top, mean = rows.reduce((rows.label_statistics(), reductions.maximum(), reductions.mean()))
    excess = jnp.where(label.present, top, 0) - mean  # 0 for an empty row
    return rows.finish(label.nll + suppression * excess)


def logit_penalty_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    penalty: float = 2e-3,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Logit penalty: `l + penalty / 2 sum_c x_c^2`, cross-entropy that keeps the logits small.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      penalty: the coefficient, 0 or more.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider. It depends on the sum of the logits, which cross-entropy leaves free.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Kornblith et al., "Why Do Better Loss Functions Lead to Less Transferable Features?".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.logit_penalty_loss(logits, jnp.array([3])).round(6))
      [1.398418]
    """
    _checks.number("penalty", penalty, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    label, squares = rows.reduce((rows.label_statistics(), reductions.mapped_sum(_square)))
    return rows.finish(label.nll + penalty / 2 * squares)


def _square(x, cols):
    return x * x
