"""Hinge losses.

Losses that ask for a margin between the label's score and the others', and are 0 once it is reached. All take a dense
array or `linear_logits`. Two-class hinges, and the weight penalty of an SVM, are in optax (`optax.losses.hinge_loss`,
`optax.add_decayed_weights`).

In the formulas `x` are the logits of a row, `y` its label and `relu(u) = max(0, u)`. The gradient at a kink is 0.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft.losses._common import IGNORE_INDEX, LabelledRows, prepare, score_or_zero
from jaxsoft.losses._labels import finish, label_score
from jaxsoft.rows import Logits, RowReduction, reductions


def one_vs_rest_hinge_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    power: int = 2,
    penalty: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """One-vs-rest SVM: `penalty * (relu(1 - x_y)^power + sum_{c != y} relu(1 + x_c)^power)`.

    One binary hinge per class, with target +1 for the label and -1 for the others. With power 2 it is the L2-SVM that
    replaces a softmax. *Reconstructed* (from the abstracts and general knowledge). The other part of an SVM,
    `|W|^2 / 2`, is a function of the weights: use the optimizer's weight decay.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      power: 2 (L2-SVM, differentiable) or 1 (L1-SVM), static.
      penalty: multiplies the loss, 0 or more; 1 in the CNN-SVM paper, 0.5 in the GRU-SVM paper.
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
      Tang, "Deep Learning using Linear Support Vector Machines"; Agarap, "An Architecture Combining Convolutional
      Neural Network (CNN) and Support Vector Machine (SVM) for Image Classification", "A Neural Network Architecture
      Combining Gated Recurrent Unit (GRU) and Support Vector Machine (SVM) for Intrusion Detection in Network Traffic
      Data".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.one_vs_rest_hinge_loss(logits, jnp.array([0, 3])).round(6))
      [7.46 8.22]
    """
    _checks.option("power", power, (1, 2))
    _checks.number("penalty", penalty, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    others = _sum_over_others(rows, jnp.zeros(rows.labels.shape), 1.0, power)
    score, others, count = rows.reduce((label_score(rows.labels), others, reductions.count()))
    own = _relu_power(1 - score_or_zero(score), power)
    return finish(rows, penalty * (own + others), score, count)


def weston_watkins_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    margin: float = 1.0,
    power: int = 1,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Weston-Watkins SVM: `sum_{c != y} relu(margin + x_c - x_y)^power`.

    Every class within the margin of the label counts. (PyTorch's `multi_margin_loss` divides by the number of
    classes.)

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`. Read twice: the label's score is needed first.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      margin: the lead that the label should have, 0 or more.
      power: 1 or 2 (differentiable), static.
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
      Weston and Watkins, "Support Vector Machines for Multi-Class Pattern Recognition".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.weston_watkins_loss(logits, jnp.array([0, 3])).round(6))
      [0.  2.1]
    """
    _checks.number("margin", margin, at_least=0)
    _checks.option("power", power, (1, 2))
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    score, count = rows.reduce((label_score(rows.labels), reductions.count()))
    loss = rows.reduce(_sum_over_others(rows, score_or_zero(score), margin, power))
    return finish(rows, loss, score, count)


def crammer_singer_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    margin: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Crammer-Singer SVM: `relu(margin + max_{c != y} x_c - x_y)`.

    Only the strongest rival counts; of equal rivals the first gets the gradient.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      margin: the lead that the label should have, 0 or more.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 where the label is the only class.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Crammer and Singer, "On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.crammer_singer_loss(logits, jnp.array([0, 3])).round(6))
      [0.  1.7]
    """
    _checks.number("margin", margin, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    rival = _MAXIMUM._replace(update=_rival_update, args=(rows.labels,))
    score, best, count = rows.reduce((label_score(rows.labels), rival, reductions.count()))
    alone = best == -jnp.inf
    lead = score_or_zero(score) - jnp.where(alone, 0, best)
    loss = jnp.where(alone, 0, _relu_power(margin - lead, 1))
    return finish(rows, loss, score, count)


def perceptron_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Multi-class perceptron: `max_c x_c - x_y`, the `crammer_singer_loss` with margin 0.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider; 0, with gradient 0, where no class scores higher than the label.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Collins, "Discriminative Training Methods for Hidden Markov Models: Theory and Experiments with Perceptron
      Algorithms".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.perceptron_loss(logits, jnp.array([0, 3])).round(6))
      [0.  0.7]
    """
    return crammer_singer_loss(
        logits, labels, margin=0.0, axis=axis, where=where, weights=weights, ignore_index=ignore_index
    )


def _relu_power(u: Array, power: int) -> Array:
    """`relu(u) ** power`; unlike `maximum` it passes on NaN in value and gradient."""
    u = jnp.where(u <= 0, 0, u)
    return u if power == 1 else u * u


def _hinge(x, cols, score, margin, label):
    """`relu(margin + x - score)` for the classes other than the label."""
    # Subtract the scores first: their difference is exact where they are large.
    return jnp.where(cols == label, 0, _relu_power((x - score.astype(x.dtype)) + margin.astype(x.dtype), 1))


def _squared_hinge(x, cols, score, margin, label):
    """The square of `_hinge`."""
    return _hinge(x, cols, score, margin, label) ** 2


def _sum_over_others(rows: LabelledRows, score: Array, margin: Any, power: int) -> RowReduction:
    """`sum_{c != y} relu(margin + x_c - score)^power`."""
    margin = jnp.broadcast_to(jnp.asarray(margin, jnp.result_type(float)), score.shape)
    return reductions.mapped_sum({1: _hinge, 2: _squared_hinge}[power], score, margin, rows.labels)


_MAXIMUM = reductions.maximum()


def _rival_update(state, tile, labels):
    others = tile.with_scores(jnp.where(tile.cols == labels[..., None], -jnp.inf, tile.scores))
    return _MAXIMUM.update(state, others)
