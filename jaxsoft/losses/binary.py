"""Binary losses.

One binary problem per class, or per pair of label and other class, summed over the classes of a row. All stream but
`quality_focal_loss`, which takes one estimated confidence per example.

In the formulas `x` are the logits of a row and t the targets of its classes: 1 for the label and 0 for the others, or
any numbers in [0, 1]. Classes are not normalized against each other, so these losses change when a row is shifted
(except `one_vs_each_loss`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.losses._common import IGNORE_INDEX, check_floats, poison_of, power_of, prepare
from jaxsoft.rows import Logits, reductions
from jaxsoft.rows.inner import rows_of

Labels = Int[Array, "*rows"] | Float[Array, "*rows columns"]


def one_vs_rest_cross_entropy(
    logits: Logits,
    labels: Labels,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    class_weights: Float[Array, " columns"] | None = None,
) -> Float[Array, "*rows"]:
    """Sigmoid cross-entropy summed over the classes, `sum_c t_c softplus(-x_c) + (1 - t_c) softplus(x_c)`.

    For a class id this is `softplus(-x_y) + sum_{c != y} softplus(x_c)`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids, integers `[*rows]`; or targets in [0, 1], floats of the logits' shape, of which any number
        may be positive. An id out of range gives NaN.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. An absent class adds nothing for any
        target; a class id that is absent costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.
      class_weights: `[columns]`, multiply each class's term.

    Returns:
      Losses `[*rows]`, float32 or wider. (Divide by the number of classes for the mean that other libraries give.)

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Rifkin and Klautau, "In Defense of One-Vs-All Classification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.one_vs_rest_cross_entropy(logits, jnp.array([0])).round(6))
      [3.471925]
      >>> print(jaxsoft.losses.one_vs_rest_cross_entropy(logits, jnp.array([[1.0, 1.0, 0.0, 0.0, 0.5]])).round(6))
      [2.221925]
    """
    options = dict(axis=axis, where=where, weights=weights, ignore_index=ignore_index)
    return _sum_over_classes(_cross_entropy, logits, labels, class_weights=class_weights, **options)


def _cross_entropy(x, t):
    return t * jax.nn.softplus(-x) + (1 - t) * jax.nn.softplus(x)


def sigmoid_focal_loss(
    logits: Logits,
    labels: Labels,
    *,
    alpha: float | None = None,
    gamma: float = 2.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    class_weights: Float[Array, " columns"] | None = None,
) -> Float[Array, "*rows"]:
    """Sigmoid focal loss summed over the classes, `sum_c alpha_c (1 - p_c)^gamma b_c`.

    Here b_c is the sigmoid cross-entropy of the class and p_c the probability of the right answer,
    `1 - p_c = t_c sigmoid(-x_c) + (1 - t_c) sigmoid(x_c)`. For a class id, `b_c = softplus(-s_c x_c)` and
    `p_c = sigmoid(s_c x_c)`, with s_c = 1 for the label, else -1.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or targets of the logits' shape, as in `one_vs_rest_cross_entropy`.
      alpha: in [0, 1], `alpha_c = t_c alpha + (1 - t_c) (1 - alpha)`: 0.25 in RetinaNet; None omits the factor, as
        optax does by default.
      gamma: focusing parameter, 0 or more; 0 is the sigmoid cross-entropy.
      axis: the axis of the classes.
      where: class mask, as in `one_vs_rest_cross_entropy`.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.
      class_weights: `[columns]`, multiply each class's term.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Lin et al., "Focal Loss for Dense Object Detection".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[1.2, -0.7]])
      >>> print(jaxsoft.losses.sigmoid_focal_loss(logits, jnp.array([0]), alpha=0.25).round(6))
      [0.03682]
    """
    _checks.number("gamma", gamma, at_least=0)
    if alpha is not None:
        _checks.number("alpha", alpha, at_least=0, at_most=1)
    balance = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    options = dict(axis=axis, where=where, weights=weights, ignore_index=ignore_index)
    return _sum_over_classes(_focal, logits, labels, gamma, *balance, class_weights=class_weights, **options)


def _focal(x, t, gamma, positive, negative):
    miss = t * jax.nn.sigmoid(-x) + (1 - t) * jax.nn.sigmoid(x)
    return (t * positive + (1 - t) * negative) * power_of(miss, gamma) * _cross_entropy(x, t)


def gumbel_optimized_loss(
    logits: Logits,
    labels: Labels,
    *,
    low: float = -4.0,
    high: float = 10.0,
    cap: float = 20.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    class_weights: Float[Array, " columns"] | None = None,
) -> Float[Array, "*rows"]:
    """Gumbel loss: `exp(-x_y) - sum_{c != y} log(1 - exp(-exp(-x_c)))`, clipped.

    The binary cross-entropy of `p_c = exp(-exp(-x_c))`, summed over the classes. The Gumbel distribution function
    replaces the sigmoid: it rises late, which suits rare classes. Logits are clipped to [low, high] and each class's
    term to [0, cap]; outside these ranges the gradient is 0. The paper combines the loss with DropLoss, which leaves
    out negatives of rare classes: use a `where` that varies over rows. It initializes the head's bias at -2.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or targets of the logits' shape, as in `one_vs_rest_cross_entropy`.
      low: the smallest logit, at least -80.
      high: the largest logit, at most 80.
      cap: the largest term, positive.
      axis: the axis of the classes.
      where: class mask, as in `one_vs_rest_cross_entropy`.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.
      class_weights: `[columns]`, multiply each class's term.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Alexandridis et al., "Long-tailed Instance Segmentation using Gumbel Optimized Loss".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.gumbel_optimized_loss(jnp.array([[1.2, -0.7]]), jnp.array([0])).round(6))
      [0.444472]
    """
    _checks.number("low", low, at_least=-80)
    _checks.number("high", high, at_most=80)
    _checks.number("cap", cap, above=0)
    options = dict(axis=axis, where=where, weights=weights, ignore_index=ignore_index)
    return _sum_over_classes(_gumbel, logits, labels, low, high, cap, class_weights=class_weights, **options)


def _gumbel(x, t, low, high, cap):
    """`-t log p - (1 - t) log(1 - p)` for `-log p = exp(-x)`."""
    u = jnp.exp(-jnp.clip(x, low, high))
    return jnp.minimum(t * u - (1 - t) * jnp.log(-jnp.expm1(-u)), cap)


def one_vs_each_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """One-vs-each bound of cross-entropy, `sum_{c != y} softplus(x_c - x_y)`.

    An upper bound of the cross-entropy that is a sum over classes, so sampling classes leaves it unbiased. Reads the
    logits twice: the label's logit is needed first.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on an absent class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Titsias, "One-vs-Each Approximation to Softmax for Scalable Estimation of Probabilities"; Ruiz et al., "Augment
      and Reduce: Stochastic Inference for Large Categorical Distributions".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.one_vs_each_loss(logits, jnp.array([0])).round(6))
      [0.702649]
    """
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    score, count = rows.reduce((reductions.take(rows.labels), reductions.count()))
    absent = score == -jnp.inf
    loss = rows.reduce(reductions.mapped_sum(_against, jnp.where(absent, 0, score), rows.labels))
    return rows.finish(jnp.where(absent & (count > 0), jnp.inf, loss) * poison_of(score))


def _against(x, cols, score, label):
    return jnp.where(cols == label, 0, jax.nn.softplus(x - score))


def quality_focal_loss(
    logits: Float[Array, "*shape"],
    targets: Float[Array, "*shape"],
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*shape"]:
    """Quality focal loss: `|t - c|^gamma BCE(c, t)` of the estimated confidence `c = sigmoid(logits)`.

    BCE is the binary cross-entropy. Trains an estimator of the probability t of the true class, which then detects
    incorrect classifications. *Reconstructed* from the paper's description of a distributional focal loss.

    Args:
      logits: the estimator's outputs before the sigmoid, of any shape.
      targets: the probabilities of the true classes, `exp(jaxsoft.log_prob(...))`: in [0, 1], of the same shape.
      gamma: focusing parameter, 0 or more; 0 is the binary cross-entropy.
      alpha: in [0, 1], a factor `t alpha + (1 - t) (1 - alpha)` that balances high and low targets; None omits
        it.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      Losses of the logits' shape, float32 or wider; 0 where masked.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Li et al., "Identifying Incorrect Classifications with Balanced Uncertainty"; Li et al., "Generalized Focal
      Loss" (the form).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.quality_focal_loss(jnp.array([0.0, 2.0]), jnp.array([0.9, 0.9])).round(6))
      [0.110904 0.000121]
    """
    _checks.number("gamma", gamma, at_least=0)
    if alpha is not None:
        _checks.number("alpha", alpha, at_least=0, at_most=1)
    _checks.floating("logits", logits)
    check_floats("targets", targets, tuple(logits.shape), "the shape of the logits")
    dtype = accumulation_dtype(logits.dtype, targets.dtype)
    x, t = jnp.asarray(logits, dtype), jnp.asarray(targets, dtype)
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, tuple(logits.shape), "the shape of the logits")
        x, t = jnp.where(where, x, 0), jnp.where(where, t, 0)
    error = jnp.abs(t * jax.nn.sigmoid(-x) - (1 - t) * jax.nn.sigmoid(x))
    loss = power_of(error, gamma) * _cross_entropy(x, t)
    if alpha is not None:
        loss = (t * alpha + (1 - t) * (1 - alpha)) * loss
    return loss if where is None else jnp.where(where, loss, 0)


def _sum_over_classes(
    term: Callable,
    logits: Logits,
    labels: Array,
    *parameters: Any,
    class_weights: Array | None,
    **options: Any,
) -> Array:
    """`sum_c w_c term(x_c, t_c, *parameters)`, for class ids or targets; `term` is a module-level function."""
    rows = prepare(logits, labels, **options)
    dtype = accumulation_dtype(logits.dtype)
    if class_weights is None:
        class_weights = jnp.ones(rows.columns, dtype)
    else:
        check_floats("class_weights", class_weights, (rows.columns,), "one number per class")
    args = tuple(
        jnp.broadcast_to(jnp.asarray(p, dtype), rows_of(logits.shape, rows.axis)) for p in parameters
    )
    if rows.soft:
        targets = rows.labels
        if rows.where is not None:
            _checks.boolean("where", rows.where)
            _checks.broadcastable("where", rows.where, logits.shape, "the shape of the logits")
            keep = jnp.broadcast_to(rows.where, logits.shape)
            targets = jnp.where(jnp.moveaxis(keep, rows.axis, -1), targets, 0)
        total = reductions.mapped_sum(
            _of_targets(term), *args, col_args=(class_weights,), entry_args=(targets,)
        )
        return rows.finish(rows.reduce(total))
    total = reductions.mapped_sum(_of_ids(term), *args, rows.labels, col_args=(class_weights,))
    loss, score, count = rows.reduce((total, reductions.take(rows.labels), reductions.count()))
    loss = jnp.where((score == -jnp.inf) & (count > 0), jnp.inf, loss)
    return rows.finish(loss * poison_of(score))


@functools.cache
def _of_ids(term: Callable) -> Callable:
    def function(x, cols, *args):
        *parameters, label, weight = args
        return weight * term(x, (cols == label).astype(x.dtype), *parameters)

    return function


@functools.cache
def _of_targets(term: Callable) -> Callable:
    def function(x, cols, *args):
        *parameters, weight, target = args
        return weight * term(x, target.astype(x.dtype), *parameters)

    return function
