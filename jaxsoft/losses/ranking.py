"""Ranking and recommendation.

The first losses put the positive of a row above its negatives: the softmax loss of recommenders and its pairwise,
bilateral and top-k forms. Score all items, streamed by `linear_logits`, or one positive and the negatives drawn for it;
`where` masks the other positives of the row. The other losses take short lists with graded relevance and need the whole
list: ListMLE, pairwise losses, ApproxNDCG. (ListNet's loss is `optax.losses.ranking_softmax_loss`.)

In the formulas `x` are the scores of a row, `y` its positive, and `d_j = x_j - x_y`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide, weigh
from jaxsoft.losses._common import (
    IGNORE_INDEX,
    LabelledRows,
    check_floats,
    check_weights,
    poison_of,
    prepare,
    score_or_zero,
    widened,
)
from jaxsoft.normalizers.inner import present_scores
from jaxsoft.rows import LinearLogits, Logits, reductions

Scalar = float | Float[Array, ""]


# --- a positive against the negatives of its row ---------------------------------------------------------------


class _Against(NamedTuple):
    """A positive against its negatives, each `[*rows]`.

    Attributes:
      log_sum: the log-sum-exp over the negatives of an increasing function of d.
      score: the positive's score.
    """

    log_sum: Array
    score: Array

    def finite(self) -> Array:
        """`log_sum`; 0 without negatives, +inf where the positive is absent, NaN where its id is out of range."""
        none = self.log_sum == -jnp.inf
        value = jnp.where(self.score == -jnp.inf, jnp.inf, jnp.where(none, 0, self.log_sum))
        return jnp.where(none, 0, value) * poison_of(self.score)


def _scalar(value: Any, rows: LabelledRows) -> Array:
    return jnp.asarray(value, accumulation_dtype(rows.logits.dtype)).reshape(())


def _softmax_against(rows: LabelledRows, temperature: Any, wanted: Any = ()) -> tuple[_Against, Any]:
    """`logsumexp_{j != y} (d_j / temperature)` in one pass; `score` and other results are for `x / temperature`."""
    tempered = dataclasses.replace(rows, logits=widened(rows.logits) / _scalar(temperature, rows))
    others = reductions.log_partition_excluding(rows.labels[..., None])
    negatives, score, results = tempered.reduce((others, reductions.take(rows.labels), wanted))
    return _Against((negatives.shift - score_or_zero(score)) + negatives.log_sum, score), results


def _mapped_against(rows: LabelledRows, log_activation: Callable, temperature: Any) -> _Against:
    """`logsumexp_{j != y} (log act(d_j) / temperature)` in two passes."""
    score = rows.reduce(reductions.take(rows.labels))
    temperature = jnp.broadcast_to(_scalar(temperature, rows), score.shape)
    mapped = reductions.mapped_logsumexp(log_activation, score_or_zero(score), rows.labels, temperature)
    return _Against(rows.reduce(mapped), score)


_SMALLEST = 1e-30  # lower bound of an activation, whose logarithm is then finite


def _log_tanh(x, cols, score, label, temperature):
    return jnp.where(cols == label, -jnp.inf, (math.log(2) - jax.nn.softplus(2 * (score - x))) / temperature)


def _log_relu(x, cols, score, label, temperature):
    return jnp.where(cols == label, -jnp.inf, jnp.log(jnp.maximum(1 + (x - score), _SMALLEST)) / temperature)


def _log_atan(x, cols, score, label, temperature):
    return jnp.where(
        cols == label, -jnp.inf, jnp.log(jnp.maximum(1 + jnp.arctan(x - score), _SMALLEST)) / temperature
    )


_LOG_ACTIVATIONS = {"tanh": _log_tanh, "relu": _log_relu, "atan": _log_atan}


def pairwise_softmax_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    activation: str = "tanh",
    temperature: Scalar = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Pairwise softmax loss (PSL): `log sum_{j != y} act(d_j)^(1 / temperature)`, with `d_j = x_j - x_y`.

    The activations grow more slowly than the exponential of the softmax loss, which bounds the effect of a false
    negative. They are meant for d in [-1, 1]: cosines divided by 2. The loss can be negative.

    The paper's second method puts the mean over a user's positives into the logarithm, too, so that hard positives
    count more: it is the log-mean-exp of the losses of these positives, as in the example.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`: the scores of all items, or of one positive and
        the negatives drawn for it.
      labels: `[*rows]` ids of the positives. An id out of range gives NaN.
      activation: `"tanh"`, `1 + tanh(d)`; `"relu"`, `max(1 + d, 0)`; `"atan"`, `max(1 + arctan(d), 0)`; or
        `"exp"`, `exp(d)`, which is `softmax_loss`. (The second and third are held at 1e-30 or more.)
      temperature: positive; 1 in the paper's code. With cosines, 0.2 is usual.
      axis: the axis of the items.
      where: item mask that broadcasts to the logits, True = counts: masks the other positives of the row, which
        would count as negatives. A masked label costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: label of examples to leave out. None: there is no such label.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without negatives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range, or an unknown activation.

    Reference:
      Yang et al., "PSL: Rethinking and Improving Softmax Loss from Pairwise Perspective for Recommendation".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> scores = jnp.array([[0.6, 0.5, -0.2, 0.1, 0.7]])
      >>> print(jaxsoft.losses.pairwise_softmax_loss(scores, jnp.array([0]), temperature=0.2).round(5))
      [0.81047]
      >>> positives, where = jnp.array([0, 1]), jnp.array([[1, 0, 1, 1, 1], [0, 1, 1, 1, 1]], bool)
      >>> losses = jaxsoft.losses.pairwise_softmax_loss(jnp.tile(scores, (2, 1)), positives, where=where)
      >>> print((jaxsoft.logsumexp(losses) - jnp.log(2)).round(6))  # the second method, one user
      0.738735
    """
    _checks.option("activation", activation, (*_LOG_ACTIVATIONS, "exp"))
    _checks.number("temperature", temperature, above=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    if activation == "exp":
        against, _ = _softmax_against(rows, temperature)
    else:
        against = _mapped_against(rows, _LOG_ACTIVATIONS[activation], temperature)
    return rows.finish(against.finite())


def softmax_loss(
    logits: Logits, labels: Int[Array, "*rows"], *, temperature: Scalar = 1.0, **options
) -> Float[Array, "*rows"]:
    """Softmax loss (SL) of recommenders: `log sum_{j != y} exp(d_j / temperature)`, without the positive.

    With the positive in the sum it would be cross-entropy; without it, the loss keeps falling below 0 as the positive
    rises.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: `[*rows]` ids of the positives.
      temperature: positive.
      **options: axis, where, weights and ignore_index, as in `pairwise_softmax_loss`.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without negatives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wu et al., "On the Effectiveness of Sampled Softmax Loss for Item Recommendation".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> scores = jnp.array([[0.6, 0.5, -0.2, 0.1, 0.7]])
      >>> print(jaxsoft.losses.softmax_loss(scores, jnp.array([0]), temperature=0.2).round(5))
      [0.85682]
    """
    return pairwise_softmax_loss(logits, labels, activation="exp", temperature=temperature, **options)


def bilateral_softmax_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    positive_temperature: Scalar = 1.0,
    negative_temperature: Scalar = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Bilateral softmax loss (BSL): `-x_y / t1 + (t2 / t1) log sum_{j != y} exp(x_j / t2)`.

    It is `t2 / t1` times the softmax loss at temperature t2: the positive's temperature t1 only scales the loss.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: `[*rows]` ids of the positives. An id out of range gives NaN.
      positive_temperature: t1, positive.
      negative_temperature: t2, positive.
      axis: the axis of the items.
      where: item mask that broadcasts to the logits, True = counts. A masked label costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: label of examples to leave out. None: there is no such label.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without negatives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wu et al., "BSL: Understanding and Improving Softmax Loss for Recommendation".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> scores, options = jnp.array([[0.6, 0.5, -0.2, 0.1, 0.7]]), dict(positive_temperature=0.2)
      >>> loss = jaxsoft.losses.bilateral_softmax_loss
      >>> print(loss(scores, jnp.array([0]), negative_temperature=0.1, **options).round(5))
      [0.56461]
    """
    _checks.number("positive_temperature", positive_temperature, above=0)
    _checks.number("negative_temperature", negative_temperature, above=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    against, _ = _softmax_against(rows, negative_temperature)
    return rows.finish(negative_temperature / positive_temperature * against.finite())


def softmax_loss_at_k(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    k: int = 20,
    temperature: Scalar = 1.0,
    weight_temperature: Scalar = 1.0,
    quantile: Float[Array, "*rows"] | None = None,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """SL@K: `sigmoid((x_y - beta) / weight_temperature) log sum_{j != y} exp(d_j / temperature)`.

    `softmax_loss`, weighted for top-K metrics: beta is the K-th largest score of the row, so that the weight is large
    for positives among the first K. The weight has a gradient, beta has none. The paper keeps a beta per user for some
    epochs: pass that one as `quantile`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: `[*rows]` ids of the positives. An id out of range gives NaN.
      k: K, not used if `quantile` is given; a row with fewer items has the weight 1.
      temperature: of the softmax loss, positive; 0.2 in the paper's recipe, for cosines.
      weight_temperature: positive; 2.25 in the paper's recipe.
      quantile: `[*rows]`, beta. None: the K-th largest score of each row, including the positive's.
      axis: the axis of the items.
      where: item mask that broadcasts to the logits, True = counts. A masked label costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: label of examples to leave out. None: there is no such label.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without negatives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Yang et al., "Breaking the Top-K Barrier: Advancing Top-K Ranking Metrics Optimization in Recommender
      Systems".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> scores = jnp.array([[0.6, 0.5, -0.2, 0.1, 0.7]])
      >>> options = dict(k=2, temperature=0.2, weight_temperature=2.25)
      >>> print(jaxsoft.losses.softmax_loss_at_k(scores, jnp.array([0]), **options).round(5))
      [0.42841]
    """
    k = _checks.integer("k", k, at_least=1)
    _checks.number("temperature", temperature, above=0)
    _checks.number("weight_temperature", weight_temperature, above=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    if quantile is not None:
        check_floats("quantile", quantile, rows.labels.shape, "one number per example")
        quantile = quantile if rows.keep is None else jnp.where(rows.keep, quantile, 0)
    scale = _scalar(temperature, rows)
    against, best = _softmax_against(rows, scale, reductions.top_k(k) if quantile is None else ())
    beta = lax.stop_gradient(scale * best.values[..., -1] if quantile is None else quantile)
    few = beta == -jnp.inf
    lead = scale * score_or_zero(against.score) - jnp.where(few, 0, beta)
    weight = jnp.where(few, 1, jax.nn.sigmoid(lead / weight_temperature))
    return rows.finish(weight * against.finite())


# --- lists with graded relevance -------------------------------------------------------------------------------


class _Lists(NamedTuple):
    """Checked lists, the axis moved last, each `[*rows, n]`; scores and relevance are 0 where absent."""

    scores: Array
    relevance: Array
    present: Array
    weights: Array | None

    def finish(self, values: Array) -> Array:
        """Applies the weights of the lists."""
        return values if self.weights is None else weigh(values, self.weights)


def _lists(scores, relevance, *, axis, where, weights, name) -> _Lists:
    if isinstance(scores, LinearLogits):
        raise TypeError(f"{name} needs the whole list, which linear_logits never stores: pass logits.dense()")
    x, present, axis = present_scores(scores, axis, where, name)
    if not hasattr(relevance, "dtype") or not (
        jnp.issubdtype(relevance.dtype, jnp.floating) or jnp.issubdtype(relevance.dtype, jnp.integer)
    ):
        raise TypeError(f"relevance must be an array of numbers, got {_checks.describe(relevance)}")
    _checks.shape("relevance", relevance, scores.shape, "the shape of the scores")
    relevance = jnp.where(present, relevance.astype(x.dtype), 0)
    x, relevance, present = (jnp.moveaxis(a, axis, -1) for a in (x, relevance, present))
    check_weights(weights, x.shape[:-1], "one number per list")
    return _Lists(x, lax.stop_gradient(relevance), present, weights)


_FAR_BELOW = -1e30  # a finite score whose exponential is 0


def list_mle_loss(
    scores: Float[Array, "*rows n"],
    relevance: Num[Array, "*rows n"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """ListMLE: `sum_i (logsumexp_{j >= i} x_j - x_i)`, sorted by relevance.

    Minus the log-likelihood of that order under the Plackett-Luce model, which draws the items one by one, each by the
    softmax over those that are left. Items of equal relevance are taken in the order of their index, and the loss asks
    for that order: use it for grades with few ties. (For relevance 0 or 1, take `multi_positive_softmax_loss` or
    `decoupled_softmax_loss`.)

    Args:
      scores: `[*rows, n]`, a floating array.
      relevance: numbers of the same shape; only their order counts.
      axis: the axis of the items.
      where: booleans that broadcast to the scores, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a list of one item or none.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Xia et al., "Listwise Approach to Learning to Rank: Theory and Algorithm".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> scores, relevance = jnp.array([[0.5, 2.0, -1.0]]), jnp.array([[1, 2, 0]])
      >>> print(jaxsoft.losses.list_mle_loss(scores, relevance).round(6))
      [0.442725]
    """
    lists = _lists(scores, relevance, axis=axis, where=where, weights=weights, name="list_mle_loss")
    order = jnp.lexsort((-lists.relevance, ~lists.present), axis=-1)  # the absent items last
    x, present = (jnp.take_along_axis(a, order, axis=-1) for a in (lists.scores, lists.present))
    top = lax.stop_gradient(
        jnp.max(jnp.where(present, x, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    )
    x = jnp.where(present, x - jnp.where(present, top, 0), _FAR_BELOW)
    left = lax.cumlogsumexp(x, axis=x.ndim - 1, reverse=True)
    return lists.finish(jnp.sum(jnp.where(present, left - x, 0), axis=-1))


def pairwise_logistic_loss(
    scores: Float[Array, "*rows n"],
    relevance: Num[Array, "*rows n"],
    *,
    kind: str = "logistic",
    margin: Scalar = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """RankNet's loss: the mean of `softplus(x_j - x_i)` over the pairs of a list with `relevance_i > relevance_j`.

    Takes memory for `n^2` numbers per list.

    Args:
      scores: `[*rows, n]`, a floating array.
      relevance: numbers of the same shape; only their order counts.
      kind: `"logistic"`, or `"hinge"` for `max(0, margin - (x_i - x_j))`.
      margin: of the hinge, positive.
      axis: the axis of the items.
      where: booleans that broadcast to the scores, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a list without such pairs.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range, or an unknown kind.

    Reference:
      Burges et al., "Learning to Rank using Gradient Descent"; Joachims, "Optimizing Search Engines using
      Clickthrough Data" (the hinge).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> scores, relevance = jnp.array([[0.5, 2.0, -1.0]]), jnp.array([[1, 2, 0]])
      >>> print(jaxsoft.losses.pairwise_logistic_loss(scores, relevance).round(6))
      [0.150471]
    """
    _checks.option("kind", kind, ("logistic", "hinge"))
    _checks.number("margin", margin, above=0)
    lists = _lists(scores, relevance, axis=axis, where=where, weights=weights, name="pairwise_logistic_loss")
    x, relevance, present = lists[:3]
    lead = x[..., :, None] - x[..., None, :]
    pair = relevance[..., :, None] > relevance[..., None, :]
    pair &= present[..., :, None] & present[..., None, :]
    losses = jax.nn.softplus(-lead) if kind == "logistic" else jnp.maximum(margin - lead, 0)
    total = jnp.sum(jnp.where(pair, losses, 0), axis=(-2, -1))
    return lists.finish(safe_divide(total, jnp.sum(pair, axis=(-2, -1)).astype(x.dtype)))


def approx_ndcg_loss(
    scores: Float[Array, "*rows n"],
    relevance: Num[Array, "*rows n"],
    *,
    temperature: Scalar = 0.1,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """ApproxNDCG: 1 - NDCG with smooth ranks, `rank_i = 1 + sum_{j != i} sigmoid((x_j - x_i) / temperature)`.

    NDCG has the gains `2^relevance - 1` and the discounts `1 / log2(1 + rank)`, over the whole list. Takes memory for
    `n^2` numbers per list.

    Args:
      scores: `[*rows, n]`, a floating array.
      relevance: numbers of the same shape, 0 or more (below 100 in float32).
      temperature: positive; the smaller it is, the closer the ranks are to integers.
      axis: the axis of the items.
      where: booleans that broadcast to the scores, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]` in [0, 1), float32 or wider; 0 for a list without relevant items, or of one item.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Qin et al., "A general approximation framework for direct optimization of information retrieval measures".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> scores, relevance = jnp.array([[0.5, 2.0, -1.0]]), jnp.array([[2, 1, 0]])
      >>> print(jaxsoft.losses.approx_ndcg_loss(scores, relevance).round(6))
      [0.203293]
    """
    _checks.number("temperature", temperature, above=0)
    lists = _lists(scores, relevance, axis=axis, where=where, weights=weights, name="approx_ndcg_loss")
    x, relevance, present = lists[:3]
    n = x.shape[-1]
    ahead = jax.nn.sigmoid((x[..., None, :] - x[..., :, None]) / temperature)
    others = present[..., None, :] & ~jnp.eye(n, dtype=bool)
    rank = 1 + jnp.sum(jnp.where(others, ahead, 0), axis=-1)
    gain = jnp.expm1(relevance * math.log(2))  # 0 for absent items
    ideal = jnp.sort(gain, axis=-1, descending=True) / jnp.log2(2 + jnp.arange(n, dtype=x.dtype))
    ideal = jnp.sum(ideal, axis=-1)
    # 1 - NDCG as one quotient, which is 0 without relevant items.
    return lists.finish(safe_divide(ideal - jnp.sum(gain / jnp.log2(1 + rank), axis=-1), ideal))
