"""Losses over sampled classes.

Estimates and bounds of the softmax cross-entropy from the label's logit and the logits of a few other classes, the
*negatives*, the same for all rows of a batch. They take logits of all classes, an array or `linear_logits`; of an
expression, only the label's and the negatives' columns are computed. Without negatives, all other classes take part,
and the logits are streamed. Training with `linear_logits` then costs `O(n d (1 + negatives))` for n rows, beside the
gradient of the weight, which has all classes.

A negative that is the row's label (an accidental hit) is left out of this row. A negative may repeat, and then counts
as often; one out of range makes the losses NaN. To draw them: `jax.random.randint(key, (n,), 0, classes)`, or
`jax.random.choice(key, classes, (n,), replace=False)`.

In the formulas `x` are the logits of a row, `y` its label, `C` the number of classes, `S` the n negatives, and
`s = sum_{c != y} exp(x_c - x_y)`, so that `log p_y = -log(1 + s)`. Prediction needs all classes: `jaxsoft.top_k(logits,
k)` and `jaxsoft.log_prob`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import as_ids
from jaxsoft.heads._classes import check_labels, finish, restricted, scores_at
from jaxsoft.losses.inner import IGNORE_INDEX, check_weights
from jaxsoft.rows import Logits, StoredLogits, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis


class AugmentAndReduce(NamedTuple):
    """A bound, and what updates its `eta`, each `[*rows]`.

    Attributes:
      bound: the lower bound of the log-likelihood.
      log_total: `log(1 + s)` of these negatives: the best log of eta, and the negative log-likelihood if all classes
        take part.
    """

    bound: Array
    log_total: Array


class _Rows(NamedTuple):
    """The checked arguments of a loss over sampled classes."""

    logits: Any
    score: Array
    labels: Array
    keep: Any
    ids: Array
    ratio: float
    weights: Any

    def log_sum(self, correction: Array) -> Array:
        """`log sum_{c in S, c != y} exp(x_c + correction_c - x_y)`; -inf without negatives."""
        args = (self.score, self.labels)
        reduction = reductions.mapped_logsumexp(_shifted, *args, col_args=(self.ids, correction))
        return reduce_rows(self.logits, reduction, row_where=self.keep)

    def sum(self, function: Any, shift: Array) -> Array:
        """`ratio sum_{c in S, c != y} function(x_y - x_c + shift)`."""
        args = (self.score + shift, self.labels)
        reduction = reductions.mapped_sum(function, *args, col_args=(self.ids,))
        return self.ratio * reduce_rows(self.logits, reduction, row_where=self.keep)

    def finish(self, values: Array) -> Array:
        """Gives ignored rows the value 0 and applies the weights; a NaN score spreads, to the gradient too."""
        values = values * jnp.where(jnp.isnan(self.score), jnp.nan, 1).astype(values.dtype)
        return finish(values, self.keep, self.weights)


def _prepare(logits: Logits, labels: Any, negatives: Any, weights: Any, ignore_index: int | None) -> _Rows:
    if isinstance(logits, StoredLogits):
        raise TypeError("logits must be an array or linear_logits, got stored_logits")
    check_axis(logits, -1)
    rows, classes = logits.shape[:-1], logits.shape[-1]
    check_weights(weights, rows)
    labels, keep = check_labels(labels, rows, classes, ignore_index, "logits")
    if classes < 1:
        raise ValueError(f"logits must have at least one class, got shape {logits.shape}")
    ratio = 1.0
    ids, some = jnp.arange(classes, dtype=jnp.int32), logits
    if negatives is not None:
        _checks.integers("negatives", negatives)
        if negatives.ndim != 1 or negatives.shape[0] < 1:
            raise ValueError(
                f"negatives must have shape [n] with n >= 1 (class ids that all rows share), got {negatives.shape}"
            )
        ids, ratio = as_ids(negatives), (classes - 1) / negatives.shape[0]
        some = restricted(logits, ids)
    return _Rows(some, scores_at(logits, labels, keep), labels, keep, ids, ratio, weights)


def _shifted(x, cols, score, label, ids, correction):
    return jnp.where(ids == label, -jnp.inf, (x - score) + correction.astype(x.dtype))


def sampled_softmax_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    negatives: Int[Array, " n"],
    *,
    log_expected_count: Float[Array, " n"] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Sampled softmax: `log(1 + sum_{c in S} exp(x_c - log(n q_c) - x_y))`, the label always included.

    The correction subtracts the log of how often a class is expected among the negatives, so that the sum estimates the
    one over all classes.

    Args:
      logits: `[*rows, classes]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`. One out of range gives NaN, in value and gradient.
      negatives: class ids `[n]`, n of 1 or more, which all rows share.
      log_expected_count: `[n]`, `log(n q_c)` for each negative, where q is the distribution that they were drawn from.
        None: uniform over the other classes, `log(n / (C - 1))`, the loss of Botev et al.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of rows to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without negatives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Ruiz et al., "Augment and Reduce: Stochastic Inference for Large Categorical Distributions", which compares with
      it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(heads.sampled_softmax_loss(logits, jnp.array([0]), jnp.array([1, 3])).round(6))
      [0.607226]
    """
    rows = _prepare(logits, labels, negatives, weights, ignore_index)
    if log_expected_count is None:
        correction = _uniform(rows)
    else:
        _checks.floating("log_expected_count", log_expected_count)
        _checks.shape("log_expected_count", log_expected_count, rows.ids.shape, "one number per negative")
        correction = -log_expected_count
    return rows.finish(jax.nn.softplus(rows.log_sum(correction)))


def _uniform(rows: _Rows) -> Array:
    return jnp.full(rows.ids.shape, math.log(rows.ratio) if rows.ratio else -jnp.inf, rows.score.dtype)


def augment_and_reduce_bound(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    negatives: Int[Array, " n"] | None = None,
    eta: Float[Array, "*rows"] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> AugmentAndReduce:
    """Augment and Reduce for softmax: the lower bound `1 - log(eta) - (1 + s) / eta` of `log p_y`.

    It is linear in s, so that negatives drawn uniformly estimate the bound and its gradient without bias, by
    `(C - 1) / n sum_{c in S} exp(x_c - x_y)`. Tight where `eta = 1 + s`. The authors keep one eta per example and set
    it, after each step, to `(1 - rho) eta + rho exp(log_total)`.

    Args:
      logits: `[*rows, classes]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`. One out of range gives NaN, in value and gradient.
      negatives: class ids `[n]`, n of 1 or more, which all rows share; None for all other classes.
      eta: `[*rows]`, positive: the variational parameter of each example. None: the best for these negatives, where the
        bound is `-log(1 + s)`; of a sample, this is no unbiased bound any more.
      weights: `[*rows]`, multiply the bounds.
      ignore_index: class id of rows to leave out; they give 0.

    Returns:
      `AugmentAndReduce(bound, log_total)`, float32 or wider. Maximize the bound.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Ruiz et al., "Augment and Reduce: Stochastic Inference for Large Categorical Distributions".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(heads.augment_and_reduce_bound(logits, jnp.array([0]), eta=jnp.array([2.5])).bound.round(6))
      [-0.632437]
    """
    rows = _prepare(logits, labels, negatives, weights, ignore_index)
    log_total = jax.nn.softplus(rows.log_sum(_uniform(rows)))
    if eta is None:
        bound = -log_total
    else:
        _checks.floating("eta", eta)
        _checks.shape("eta", eta, rows.score.shape, "one number per row")
        log_eta = jnp.log(eta.astype(log_total.dtype))
        bound = 1 - log_eta - jnp.exp(log_total - log_eta)
    return AugmentAndReduce(
        rows.finish(bound), rows._replace(weights=None).finish(jax.lax.stop_gradient(log_total))
    )


def one_vs_each_bound(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    negatives: Int[Array, " n"] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """One-vs-each: the lower bound `sum_{c != y} log sigmoid(x_y - x_c)` of `log p_y`, or its unbiased estimate.

    With negatives, the sum is `(C - 1) / n sum_{c in S}`. `losses.one_vs_each_loss` is its negative over all classes.

    Args:
      logits: `[*rows, classes]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`. One out of range gives NaN, in value and gradient.
      negatives: class ids `[n]`, n of 1 or more, which all rows share; None for all other classes.
      weights: `[*rows]`, multiply the bounds.
      ignore_index: class id of rows to leave out; they give 0.

    Returns:
      Bounds `[*rows]`, float32 or wider. Maximize them.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Titsias, "One-vs-Each Approximation to Softmax for Scalable Estimation of Probabilities"; Ruiz et al., "Augment
      and Reduce: Stochastic Inference for Large Categorical Distributions".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(heads.one_vs_each_bound(logits, jnp.array([0])).round(6))
      [-0.702649]
    """
    rows = _prepare(logits, labels, negatives, weights, ignore_index)
    return rows.finish(rows.sum(_log_sigmoid_gap, jnp.zeros_like(rows.score)))


def _log_sigmoid_gap(x, cols, score, label, ids):
    return jnp.where(ids == label, 0, -jax.nn.softplus(x - score))


def _log_normal_gap(x, cols, score, label, ids):
    return jnp.where(ids == label, 0, jax.scipy.special.log_ndtr(score - x))


def latent_augment_and_reduce_bound(
    logits: Logits,
    labels: Int[Array, "*rows"],
    noise: Float[Array, "*rows"],
    std: Float[Array, "*rows"],
    *,
    kind: str = "logistic",
    negatives: Int[Array, " n"] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Augment and Reduce for logistic and probit models: `log f(e) + sum_{c != y} log F(e + x_y - x_c) + entropy`.

    F is the distribution of the noise of each class, f its density, and e the noise of the label, drawn from a
    variational distribution of the same kind with the standard deviation (of the logistic: scale) `std`, as
    `mean + std * unit noise`, whose parameters get gradients through `noise` and `std`.

    Args:
      logits: `[*rows, classes]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`. One out of range gives NaN, in value and gradient.
      noise: e, `[*rows]`.
      std: `[*rows]`, positive.
      kind: `"logistic"` (multinomial logistic, entropy `log std + 2`) or `"probit"` (entropy
        `log(2 pi e std^2) / 2`).
      negatives: class ids `[n]`, n of 1 or more, which all rows share; None for all other classes.
      weights: `[*rows]`, multiply the bounds.
      ignore_index: class id of rows to leave out; they give 0.

    Returns:
      Bounds of `log p_y` `[*rows]` in expectation over the noise, float32 or wider. Maximize them.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or an unknown kind.

    Reference:
      Ruiz et al., "Augment and Reduce: Stochastic Inference for Large Categorical Distributions".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> logits, one = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.ones(1)
      >>> print(heads.latent_augment_and_reduce_bound(logits, jnp.array([0]), one, one).round(4))
      [0.0959]
    """
    _checks.option("kind", kind, ("logistic", "probit"))
    rows = _prepare(logits, labels, negatives, weights, ignore_index)
    for name, value in (("noise", noise), ("std", std)):
        _checks.floating(name, value)
        _checks.shape(name, value, rows.score.shape, "one number per row")
    e = noise.astype(rows.score.dtype)
    log_std = jnp.log(std.astype(e.dtype))
    if kind == "logistic":
        gap, own, entropy = _log_sigmoid_gap, -jax.nn.softplus(-e) - jax.nn.softplus(e), log_std + 2
    else:
        gap, own = _log_normal_gap, -e * e / 2 - math.log(2 * math.pi) / 2
        entropy = log_std + math.log(2 * math.pi * math.e) / 2
    return rows.finish(own + rows.sum(gap, e) + entropy)
