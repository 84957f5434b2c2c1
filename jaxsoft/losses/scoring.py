"""Proper scores and example scores.

Proper scores other than the logarithmic one (cross-entropy), the entropy bonus, and scores of how hard an example is.

A score is proper if the expected loss is least where the prediction is the distribution of the labels. The example
scores rank training data; they take the same arguments as losses and have gradients, but are not meant to be minimized.

In the formulas `x` are the logits of a row, `y` its label, `p = softmax(x)`, and q the label as a distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, finite_gauge, log_or_neg_inf
from jaxsoft.losses._common import IGNORE_INDEX, LabelledRows, prepare, root_of, unless_absent
from jaxsoft.losses._pairs import PairTerm, check_second, log_softmax_of, of_second, pair_sum, zero_init
from jaxsoft.losses.classification import Labels
from jaxsoft.rows import Logits, RowReduction, reductions
from jaxsoft.rows.reductions import LogPartition

# The error for a class id y is a function of `1 - p_y = sigmoid(lse_O - x_y)` and of S, the sum of squares of the
# softmax over the other classes O: `||p - e_y||^2 = (1 - p_y)^2 (1 + S)`. Nothing cancels, and the root is smooth.

_SQUARES = reductions.sum_of_squared_probabilities()


class _Others(NamedTuple):
    """Statistics of the columns other than the label: log-sum-exp, in two parts, and sum of squares of the softmax."""

    shift: Array
    log_sum: Array
    squares: Array


def _others_init(like, ids):
    return _SQUARES.init(like)


def _others_update(state, tile, ids):
    return _SQUARES.update(
        state, tile.with_scores(jnp.where(tile.cols == ids[..., None], -jnp.inf, tile.scores))
    )


def _others_merge(a, b, ids):
    return _SQUARES.merge(a, b)


def _others_finalize(state, ids):
    m, s, _ = state
    return _Others(finite_gauge(m), log_or_neg_inf(s), _SQUARES.finalize(state))


def _others(ids: Array) -> RowReduction:
    """See `_Others`; `ids` are `[*rows]`."""
    return RowReduction(
        _others_init, _others_update, _others_merge, _others_finalize, _SQUARES.neutral, args=(ids,)
    )


@functools.cache
def _distance_update(term: Callable) -> Callable:
    def update(state, tile, partition):
        q = jnp.where(tile.keep, tile.entry_args[0].astype(tile.x.dtype), 0)
        return state + tile.sum(term(jnp.exp(log_softmax_of(tile, partition)) - q))

    return update


def _distance(term: Callable, partition: LogPartition, distributions: Array) -> RowReduction:
    """`sum_c term(p_c - q_c)` for distributions q `[*rows, columns]`."""
    return RowReduction(zero_init, _distance_update(term), args=(partition,), entry_args=(distributions,))


def _error(rows: LabelledRows, norm: str, **more: RowReduction) -> tuple[Array, dict[str, Any]]:
    """The norm `"l1"`, `"l2"` or `"squared l2"` of p - q, and the results of the first pass, with those of `more`."""
    if rows.soft:
        out = rows.reduce({"label": rows.label_statistics(), **more})
        nll, partition = out["label"]
        total = rows.reduce(_distance(jnp.abs if norm == "l1" else jnp.square, partition, rows.labels))
        value = root_of(total) if norm == "l2" else total
        return unless_absent(nll, lambda nll: value), out
    out = rows.reduce({"score": reductions.take(rows.labels), "others": _others(rows.labels), **more})
    score, (shift, log_sum, squares) = out["score"], out["others"]
    absent = score == -jnp.inf
    miss = jax.nn.sigmoid((shift - jnp.where(absent, 0, score)) + log_sum)
    if norm == "l1":
        value = 2 * miss
    else:
        value = miss * jnp.sqrt(1 + squares) if norm == "l2" else jnp.square(miss) * (1 + squares)
    return jnp.where(absent, jnp.where(log_sum > -jnp.inf, jnp.inf, 0), value), out


def brier_loss(
    logits: Logits,
    labels: Labels,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Brier score: `sum_c (p_c - q_c)^2`, the squared error of the probabilities.

    A proper score. For class ids it is `sum_c p_c^2 - 2 p_y + 1`, computed in one pass and without cancellation: its
    relative error is small near 0, too. Label distributions take two passes.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or distributions of the logits' shape, as in `cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider, in [0, 2] for class ids.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Brier, "Verification of Forecasts Expressed in Terms of Probability"; Pang et al., "Robustness and Accuracy
      Could Be Reconcilable by (Proper) Definition".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.brier_loss(logits, jnp.array([0])).round(6))
      [0.260388]
      >>> print(jaxsoft.losses.brier_loss(logits, jnp.full((1, 5), 0.2)).round(6))
      [0.177478]
    """
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    return rows.finish(_error(rows, "squared l2")[0])


def _squared_change(log_p, log_q):
    return jnp.square(jnp.exp(log_q) - jnp.exp(log_p))


def _square(log_p):
    return jnp.exp(2 * log_p)


_SQUARED_CHANGE = PairTerm(_squared_change, _square, _square)


def adversarial_brier_loss(
    logits: Logits,
    adversarial_logits: Logits,
    labels: Labels,
    *,
    beta: float = 4.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """SCORE: `brier_loss(x, q) + beta sum_c (p'_c - p_c)^2`, with p' the softmax of the adversarial logits.

    `trades_loss` with squared errors, whose root obeys the triangle inequality; the KL divergence does not. Both
    arguments have gradients, and either may be `linear_logits`. For the label smoothing of the authors' code (0 in
    their runs), pass smoothed label distributions.

    Args:
      logits: `[*rows, columns]` of the examples, a floating array or `linear_logits`.
      adversarial_logits: logits of the perturbed examples, of the same shape. A class of -inf has probability 0
        there.
      labels: class ids `[*rows]` or distributions of the logits' shape, as in `cross_entropy`.
      beta: coefficient of the second term, 0 or more: 4 in the authors' runs (1 by default in their code).
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Pang et al., "Robustness and Accuracy Could Be Reconcilable by (Proper) Definition".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, adversarial = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[1.6, 1.2, 0.0, -0.8, 0.6]])
      >>> print(jaxsoft.losses.adversarial_brier_loss(logits, adversarial, jnp.array([0])).round(6))
      [0.359392]
    """
    _checks.number("beta", beta, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    second = check_second("adversarial_logits", adversarial_logits, logits, rows.axis)
    partition = reductions.log_partition()
    error, out = _error(rows, "squared l2", first=partition, second=of_second(partition, second))
    change = rows.reduce(pair_sum(_SQUARED_CHANGE, second, out["first"], out["second"]))
    return rows.finish(error + beta * change)


def spherical_score_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Spherical score: `-p_y / sqrt(sum_c p_c^2)`, a proper score between -1 (certain and right) and 0.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider, in [-1, 0]; the loss of a perfect prediction is -1, not 0.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.spherical_score_loss(logits, jnp.array([0])).round(6))
      [-0.909101]
    """
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    label, squares = rows.reduce((rows.label_statistics(), reductions.sum_of_squared_probabilities()))
    norm = jnp.sqrt(jnp.where(label.present, squares, 1))
    loss = unless_absent(label.nll, lambda nll: -jnp.exp(-nll) / norm)
    return rows.finish(jnp.where(label.present, loss, 0))


def confidence_penalty_loss(
    logits: Logits,
    labels: Labels,
    *,
    beta: float = 0.1,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy with a confidence penalty: `l - beta H(p)`, H the entropy of the prediction in nats.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or distributions of the logits' shape, as in `cross_entropy`.
      beta: coefficient of the entropy; 0.1 to 1 are usual for classifiers. A negative one asks for confidence.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider; below 0 where the label is likely and `beta H` larger than l.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output Distributions".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.confidence_penalty_loss(logits, jnp.array([0])).round(6))
      [0.46072]
    """
    _checks.number("beta", beta)
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    label, moments = rows.reduce((rows.label_statistics(), reductions.softmax_moments(variance=False)))
    return rows.finish(label.nll - beta * moments.entropy)


# --- how hard an example is ------------------------------------------------------------------------------


def el2n_score(
    logits: Logits,
    labels: Labels,
    *,
    norm: str = "l2",
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """EL2N: `||p - q||_2`, the norm of the error of the prediction, that is, the root of `brier_loss`.

    Large for examples that are hard, or labelled wrongly. The paper takes the mean over several networks early in
    training and keeps the examples with the largest scores.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or distributions of the logits' shape, as in `cross_entropy`.
      norm: `"l2"`, in `[0, sqrt 2]`; `"l1"`, the sum of absolute errors, in [0, 2]; or `"margin"`,
        `max_{c != y} p_c - p_y` in [-1, 1] (class ids only).
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class scores +inf.
      weights: `[*rows]`, multiply the scores.
      ignore_index: class id of examples to leave out.

    Returns:
      Scores `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, an unknown norm, or `"margin"` with label distributions.

    Reference:
      Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.el2n_score(logits, jnp.array([0, 3])).round(6))
      [0.510282 0.917304]
      >>> print(jaxsoft.losses.el2n_score(logits, jnp.array([0, 3]), norm="margin").round(6))
      [-0.353068  0.251503]
    """
    _checks.option("norm", norm, ("l2", "l1", "margin"))
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    if norm == "margin" and rows.soft:
        raise ValueError("norm='margin' needs class ids as labels, got distributions")
    if norm != "margin":
        return rows.finish(_error(rows, norm)[0])
    bound = jnp.full(rows.labels.shape, jnp.inf, accumulation_dtype(rows.logits.dtype))
    label, top = rows.reduce((rows.label_statistics(), reductions.maximum_below(bound, rows.labels)))
    some = top > -jnp.inf
    log_p = label.partition.log_softmax(jnp.where(some, top, label.partition.shift))
    rival = jnp.where(some, jnp.exp(log_p), 0)
    score = unless_absent(label.nll, lambda nll: rival - jnp.exp(-nll))
    return rows.finish(jnp.where(label.present, score, 0))


def grand_score_linear(
    logits: Logits,
    labels: Labels,
    features: Float[Array, "*rows d"],
    *,
    bias: bool = False,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """GraNd of the last layer alone: `el2n_score * ||h||_2`, h its input features, computed without a gradient.

    The gradient of cross-entropy for the weight of a linear layer is the outer product of h and `p - q`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or distributions of the logits' shape, as in `cross_entropy`.
      features: `[*rows, d]`, the inputs that the last layer multiplies with its weight.
      bias: whether the layer has a bias, whose gradient then counts: `sqrt(1 + ||h||^2)` in place of `||h||`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class scores +inf.
      weights: `[*rows]`, multiply the scores.
      ignore_index: class id of examples to leave out.

    Returns:
      Scores `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, h = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[1.0, 2.0, 2.0]])
      >>> print(jaxsoft.losses.grand_score_linear(logits, jnp.array([0]), h).round(6))
      [1.530846]
    """
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    shape = tuple(n for i, n in enumerate(logits.shape) if i != rows.axis)
    _checks.floating("features", features)
    if features.ndim != len(shape) + 1 or features.shape[:-1] != shape:
        raise ValueError(f"features must have shape {(*shape, 'd')}, got shape {tuple(features.shape)}")
    _checks.flag("bias", bias)
    if rows.keep is not None:
        features = jnp.where(rows.keep[..., None], features, 0)
    h = features.astype(accumulation_dtype(features.dtype))
    return rows.finish(_error(rows, "l2")[0] * root_of(jnp.sum(jnp.square(h), axis=-1) + bias))


def grand_score(
    loss: Callable[..., Float[Array, ""]],
    params: PyTree,
    *batch: PyTree,
    chunk_size: int | None = None,
) -> Float[Array, " examples"]:
    """GraNd: `||grad_params loss(params, example)||_2` for each example of a batch, over all parameters.

    Args:
      loss: `(params, *example) -> scalar`, the loss of a single example.
      params: a tree of floating arrays.
      *batch: arrays, or trees of them, with the examples along their first axis; `loss` gets them without it.
      chunk_size: how many examples to differentiate at a time; None: all, which needs memory for one gradient of all
        parameters per example.

    Returns:
      Scores `[examples]`, float32 or wider.

    Raises:
      TypeError: a loss that is not callable, or a chunk size that is not a static integer.
      ValueError: a batch without arrays or of unequal sizes, a loss that is not scalar, or a chunk size below 1.

    Reference:
      Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> def loss(weight, h, label):
      ...     return jaxsoft.losses.cross_entropy(h @ weight, label)
      >>> h, labels = jnp.eye(2, 3), jnp.array([0, 3])
      >>> weight = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2], [0.0] * 5])
      >>> print(jaxsoft.losses.grand_score(loss, weight, h, labels).round(6))
      [0.510282 0.917304]
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function (params, *example) -> scalar, got {_checks.describe(loss)}")
    sizes = {jnp.shape(a)[:1] for a in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"batch must hold arrays with the same first axis, got sizes {sorted(sizes)}")
    if chunk_size is not None:
        chunk_size = _checks.integer("chunk_size", chunk_size, at_least=1)
    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), batch)
    value = jax.eval_shape(loss, params, *example)
    if getattr(value, "shape", None) != ():
        raise ValueError(f"loss must return a scalar for one example, got {_checks.describe(value)}")

    def score(example):
        gradient = jax.tree.leaves(jax.grad(loss)(params, *example))
        squares = [jnp.sum(jnp.square(g.astype(accumulation_dtype(g.dtype)))) for g in gradient]
        return root_of(sum(squares, jnp.zeros(())))

    batch = jax.tree.map(jnp.asarray, batch)
    return jax.vmap(score)(batch) if chunk_size is None else lax.map(score, batch, batch_size=chunk_size)
