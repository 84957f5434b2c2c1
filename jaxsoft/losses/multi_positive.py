"""Losses of rows with many positives.

Rows with several right answers, given by padded ids or by booleans: multi-label softmax, decoupled softmax and soft
top-k. The proxy-anchor loss has its positives in the columns: the items of a batch that belong to a class.

In the formulas `x` are the scores of a row, `P` its positives and `N` the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide
from jaxsoft.losses._common import IGNORE_INDEX, LabelledRows, poison_of, prepare_positives
from jaxsoft.normalizers.inner import present_scores
from jaxsoft.rows import Logits, RowReduction, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis, check_range, compiled

Positives = Int[Array, "*rows k"] | Bool[Array, "*rows columns"]


# --- the positives of a row, as ids or as booleans -----------------------------------------------------------


class _Positives(NamedTuple):
    """The checked positives of a loss.

    Attributes:
      rows: the rows; those without positives are ignored. `labels` are ids `[*rows, k]` (0 where padded), or
        booleans `[*rows, columns]`.
      given: `[*rows, k]`, False for padding; None for booleans.
    """

    rows: LabelledRows
    given: Any

    @property
    def taken(self) -> Any:
        """The reduction to the scores of positives given by id; nothing for booleans."""
        return reductions.take(self.rows.labels) if self.given is not None else ()

    def sum(self, scores: Any, term: Any, *args: Array) -> tuple[Array, Array]:
        """The sum of `term(x, cols, *args, positive)` over the positives, and their number.

        An absent positive costs +inf if it is given by its id, and does not count if it is given by a boolean.
        """
        if self.given is None:
            mask = (self.rows.labels,)
            total = reductions.mapped_sum(term, *args, entry_args=mask)
            return self.rows.reduce((total, reductions.mapped_sum(_one, entry_args=mask)))
        absent = self.given & (scores == -jnp.inf)
        x = jnp.where(self.given & ~absent, scores, 0)
        terms = term(x, None, *(a[..., None] for a in args), self.given & ~absent)
        terms = terms * poison_of(jnp.sum(x, axis=-1, keepdims=True))  # one id out of range: NaN for the row
        total = jnp.sum(jnp.where(absent, jnp.inf, terms), axis=-1)
        return total, jnp.sum(self.given, axis=-1).astype(total.dtype)


def _one(x, cols, positive):
    return jnp.where(positive, jnp.ones_like(x), 0)


# --- softmax -------------------------------------------------------------------------------------------------


def multi_positive_softmax_loss(
    logits: Logits,
    labels: Positives,
    *,
    reduction: str = "mean",
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Softmax with many positives, the multi-label InfoNCE: `mean_{i in P} (logsumexp(x) - x_i)`.

    The denominator includes the positives, which therefore compete with each other: the least value for n positives
    is `log n`. `decoupled_softmax_loss` leaves them out of it. With one positive both are cross-entropy.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: the positives P: distinct class ids, integers `[*rows, k]`, padded with `ignore_index`; or booleans
        of the logits' shape (True = positive). An id out of range gives NaN.
      reduction: `"mean"` or `"sum"` over the positives of a row (never over rows).
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A masked positive costs +inf if it is given by
        its id, and does not count if it is given by a boolean.
      weights: `[*rows]`, multiply the losses.
      ignore_index: pads the ids of rows with fewer than k positives.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without positives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or an unknown reduction.

    Reference:
      Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification" (the baseline).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.multi_positive_softmax_loss(logits, jnp.array([[0, 4]])).round(6))
      [1.33242]
    """
    _checks.option("reduction", reduction, ("mean", "sum"))
    positives = _Positives(*prepare_positives(logits, labels, axis, where, weights, ignore_index))
    partition, scores = positives.rows.reduce((reductions.log_partition(), positives.taken))
    present = partition.log_sum != -jnp.inf
    total, count = positives.sum(
        scores, _softmax_term, partition.shift, jnp.where(present, partition.log_sum, 0)
    )
    loss = safe_divide(total, count) if reduction == "mean" else total
    return positives.rows.finish(jnp.where(present, loss, 0))


def _softmax_term(x, cols, shift, log_sum, positive):
    return jnp.where(positive, (shift - x) + log_sum, 0)


def decoupled_softmax_loss(
    logits: Logits,
    labels: Positives,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Decoupled softmax: each positive against the negatives alone, `mean_{i in P} softplus(lse_N - x_i)`.

    `lse_N` is the log-sum-exp over the negatives, so that positives do not compete with each other. With one
    positive it is cross-entropy.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: the positives P: distinct class ids, integers `[*rows, k]`, padded with `ignore_index`; or booleans
        of the logits' shape (True = positive). Everything else is negative. An id out of range gives NaN.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A masked class is neither positive nor
        negative; a masked positive given by its id costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: pads the ids of rows with fewer than k positives.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without positives, or without negatives.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.decoupled_softmax_loss(logits, jnp.array([[0, 4]])).round(6))
      [0.857026]
    """
    positives = _Positives(*prepare_positives(logits, labels, axis, where, weights, ignore_index))
    rows = positives.rows
    if positives.given is None:
        others = reductions.weighted_log_partition((~rows.labels).astype(jnp.float32))
    else:
        others = reductions.log_partition_excluding(jnp.where(positives.given, rows.labels, -1))
    negatives, scores = rows.reduce((others, positives.taken))
    some = negatives.log_sum != -jnp.inf
    total, count = positives.sum(
        scores, _decoupled_term, negatives.shift, jnp.where(some, negatives.log_sum, 0)
    )
    return rows.finish(jnp.where(some | jnp.isnan(total), safe_divide(total, count), 0))


def _decoupled_term(x, cols, shift, log_sum, positive):
    return jnp.where(positive, jax.nn.softplus((shift - x) + log_sum), 0)


# --- soft top-k ----------------------------------------------------------------------------------------------
#
# The threshold tau (the paper's t is -tau - top) solves sum_c sigmoid(u_c) = k, with u_c = alpha ((x_c - top) - tau).
# `top` is the largest score; subtracting it first keeps the result exact for scores of any size.


class _Crossing(NamedTuple):
    """Sums over a row, each `[*rows]`: `excess = sum_c sigmoid(u_c) - k` is `(above - k) + rest`.

    Attributes:
      above: the number of positive u.
      rest: the sum of `sigmoid(u) - 1` over the positive u and of `sigmoid(u)` over the others, each term exact.
      slope: the sum of `sigmoid(u) (1 - sigmoid(u))`.
    """

    above: Array
    rest: Array
    slope: Array


def _crossing_init(like, top, tau, alpha):
    return _Crossing(like, like, like)


def _crossing_update(state, tile, top, tau, alpha):
    u = alpha[..., None] * ((tile.x - top[..., None]) - tau[..., None])
    above = u > 0
    small = jax.nn.sigmoid(jnp.where(above, -u, u))
    return _Crossing(
        state.above + tile.sum(above.astype(u.dtype)),
        state.rest + tile.sum(jnp.where(above, -small, small)),
        state.slope + tile.sum(small * (1 - small)),
    )


def _crossing(top, tau, alpha) -> RowReduction:
    return RowReduction(_crossing_init, _crossing_update, args=(top, tau, alpha))


def _times(x, cols, alpha):
    return alpha * x


_MOST_STEPS = 100


@compiled
def _search(rows: LabelledRows, k: Array, alpha: Array) -> tuple[Array, Array, Array]:
    """`top`, the threshold relative to it, and whether there is one (0 < k < entries); no derivatives."""
    top, n, lse = rows.reduce(
        (reductions.maximum(), reductions.count(), reductions.mapped_logsumexp(_times, alpha))
    )
    solvable, empty = (k > 0) & (k < n), n == 0
    top = jnp.where(empty, 0, top)
    n = jnp.where(empty, 1, n)
    k = jnp.where(solvable, k + jnp.zeros_like(n), n / 2)  # a sum: on a mesh, k lies where the rows do
    # Bounds of tau: with mass = sum_c e^(alpha (x_c - top)), the sum of the sigmoids is at most mass e^(-alpha tau) and
    # n sigmoid(-alpha tau), and at least mass sigmoid(-alpha tau).
    log_k, log_mass = jnp.log(k), jnp.where(empty, 0, lse - alpha * top)
    mass = jnp.exp(log_mass)
    hi = jnp.minimum(jnp.log(n - k), log_mass)
    lo = jnp.where(
        mass > 2 * k, jnp.log(jnp.maximum(mass - k, k)), -jnp.inf
    )  # only where rounding does no harm
    eps = float(jnp.finfo(top.dtype).eps)
    margin = 16 * eps * (1 + jnp.abs(log_k) + jnp.abs(log_mass))  # covers the rounding errors of the bounds
    lo, hi = (lo - log_k - margin) / alpha, (hi - log_k + margin) / alpha
    start = hi

    def tolerance(tau):  # a Newton step leaves an error of the order of its square
        return 0.5 * eps**0.5 / alpha + 4 * eps * jnp.abs(tau)

    # Newton's method. Where its step leaves the interval, or is more than half of the last step, the interval is halved
    # instead, or, while it has no lower end, the distance from the start is tripled.
    def body(carry):
        step, lo, hi, tau, last = carry
        at = rows.reduce(_crossing(top, tau, alpha))
        excess = (at.above - k) + at.rest
        lo, hi = jnp.where(excess >= 0, tau, lo), jnp.where(excess <= 0, tau, hi)
        lowest = jnp.where(lo == -jnp.inf, tau - 2 * (start - tau) - 4 / alpha, lo)
        move = jnp.where(excess == 0, 0, excess / (alpha * at.slope))
        good = (tau + move >= lowest) & (tau + move <= hi) & (jnp.abs(move) <= last / 2)
        other = jnp.where(lo == -jnp.inf, lowest, lo + (hi - lo) / 2)
        new = jnp.where(good | (jnp.abs(move) <= tolerance(tau)), tau + move, other)
        return step + 1, lo, hi, new, jnp.abs(new - tau)

    def unfinished(carry):
        step, _, _, tau, last = carry
        return (step < _MOST_STEPS) & jnp.any(last > tolerance(tau))  # a row of NaN counts as finished

    carry = (jnp.int32(0), lo, hi, start, jnp.full_like(start, jnp.inf))
    _, _, _, tau, _ = lax.while_loop(unfinished, body, carry)
    return top, tau, solvable


class _Threshold(NamedTuple):
    """The threshold of soft top-k with its derivatives, each `[*rows]`; see `_search`."""

    top: Array
    tau: Array
    alpha: Array
    k: Array
    solvable: Array


def _threshold(rows: LabelledRows, k: Any, alpha: Any, wanted: Any = ()) -> tuple[_Threshold, Any]:
    """The threshold with its derivatives, and the results of the reductions `wanted`, computed in the same pass."""
    k, alpha = (rows.per_row(name, value) for name, value in (("k", k), ("alpha", alpha)))
    top, tau, solvable = lax.stop_gradient(_search(rows.detached(), *lax.stop_gradient((k, alpha))))
    tiny = 1e10 * float(jnp.finfo(rows.dtype).tiny)

    # Two Newton steps of length 0 give tau its first and second derivatives. (Not `_roots.differentiable`: the tape of
    # `weighted_sum` records the passes that a loss makes, not those of a derivative rule.)
    def attach(tau, at):
        excess = at.rest - k
        slope = jnp.where(at.slope > tiny, alpha * at.slope, jnp.inf)
        return tau + (excess - lax.stop_gradient(excess)) / slope

    at, results = rows.reduce((_crossing(top, tau, alpha), wanted))
    tau = attach(tau, at)
    tau = attach(tau, rows.reduce(_crossing(top, tau, alpha)))
    return _Threshold(top, tau, alpha, k, solvable), results


def _check_top_k(k: Any, alpha: Any, columns: int) -> None:
    if _checks.is_concrete_number(k):
        _checks.number("k", k, above=0)
        if float(k) >= columns:
            raise ValueError(f"k must be less than the length of a row, which is {columns}, got {k}")
    _checks.number("alpha", alpha, above=0)


def soft_top_k(
    scores: Float[Array, "*rows columns"],
    k: float | Float[Array, "#*rows"],
    *,
    alpha: float | Float[Array, ""] = 2.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows columns"]:
    """Soft top-k: `s_i = sigmoid(alpha (x_i + t))`, with t such that the row sums to k.

    For large `alpha` this is the hard choice of the k largest. Newton's method finds the threshold; its first and
    second derivatives for the scores, k and alpha are those of the equation that it solves. Where the gap between the
    k-th score and the next exceeds about 120 / alpha (float32), the sigmoids are 1 and 0, any threshold in the gap is
    right, and it is treated as a constant.

    Args:
      scores: `[*rows, columns]`, floating.
      k: the sum of a row: a number above 0 and below the number of columns, or a floating array that broadcasts to
        `[*rows]`. It need not be an integer.
      alpha: the steepness, positive.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Numbers in (0, 1) of the scores' shape and dtype; 0 for absent entries. A row with k entries or fewer gives 1 for
      all of them, a row whose k is 0 or less gives 0, both without a gradient.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x = jnp.array([2.0, 1.0, 0.1, -1.0, 0.5])
      >>> print(", ".join(f"{s:.4f}" for s in jaxsoft.losses.soft_top_k(x, 2)))
      0.9064, 0.5671, 0.1780, 0.0234, 0.3252
    """
    x, present, axis = present_scores(scores, axis, where, "soft_top_k")
    _check_top_k(k, alpha, x.shape[axis])
    rows = LabelledRows(x, axis, present, None, None, False, None)
    at, _ = _threshold(rows, k, alpha)
    top, tau, steepness, number, solvable = (jnp.expand_dims(a, axis) for a in at)
    soft = jax.nn.sigmoid(steepness * ((x - top) - tau))
    s = jnp.where(solvable | jnp.isnan(x), soft, jnp.where(number > 0, 1, 0))
    return jnp.where(present, s, 0).astype(scores.dtype)


def soft_top_k_loss(
    logits: Logits,
    labels: Positives,
    *,
    k: float | Float[Array, "#*rows"] = 5,
    alpha: float | Float[Array, ""] = 2.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Soft top-k loss: `-mean_{i in P} log s_i` with `s = soft_top_k(x, k, alpha)`.

    That is `mean_{i in P} softplus(-alpha (x_i + t))` with `sum_c sigmoid(alpha (x_c + t)) = k`. It asks that the
    positives be among the first k, not how they rank there. The search for the threshold reads the logits about ten
    more times: for `linear_logits` that is the price of not storing them. (In a row with more than k positives the
    paper samples k of them; here all count, and cannot all have s = 1.)

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: the positives P: distinct class ids, integers `[*rows, k]`, padded with `ignore_index`; or booleans
        of the logits' shape (True = positive). An id out of range gives NaN.
      k: how many entries count as first: a number above 0 and below the number of classes, or a floating array that
        broadcasts to `[*rows]`.
      alpha: the steepness, positive; 2 in the paper.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A masked positive costs +inf if it is given by
        its id, and does not count if it is given by a boolean.
      weights: `[*rows]`, multiply the losses.
      ignore_index: pads the ids of rows with fewer positives than others.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without positives, or with k classes or fewer.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.soft_top_k_loss(logits, jnp.array([[0, 4]]), k=2).round(6))
      [0.610863]
    """
    positives = _Positives(*prepare_positives(logits, labels, axis, where, weights, ignore_index))
    _check_top_k(k, alpha, positives.rows.columns)
    at, scores = _threshold(positives.rows, k, alpha, positives.taken)
    total, count = positives.sum(scores, _soft_top_k_term, at.top, at.tau, at.alpha)
    hopeless = jnp.where((at.k <= 0) & (count > 0), jnp.inf, 0)
    known = at.solvable | jnp.isnan(total)
    return positives.rows.finish(jnp.where(known, safe_divide(total, count), hopeless))


def _soft_top_k_term(x, cols, top, tau, alpha, positive):
    return jnp.where(positive, jax.nn.softplus(-alpha * ((x - top) - tau)), 0)


# --- proxy anchors -------------------------------------------------------------------------------------------


def proxy_anchor_loss(
    similarities: Logits,
    labels: Int[Array, " items"],
    *,
    margin: float | Float[Array, ""] = 0.1,
    alpha: float | Float[Array, ""] = 32.0,
    axis: int = 0,
    where: Bool[Array, ...] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, ""]:
    """Proxy-anchor loss: `softplus(lse_P(alpha (margin - s))) + softplus(lse_N(alpha (margin + s)))`, over a batch.

    In the formula s are the similarities of a class's proxy and the items of the batch, `lse_P` is the log-sum-exp over
    the items of the class and `lse_N` over the others. The first term is averaged over the proxies that have positives
    in the batch, the second over all proxies. A proxy pulls its hardest items and pushes the hardest others.

    Args:
      similarities: `[items, classes]`, cosines; or with `axis=1` `[classes, items]`, which may be
        `linear_logits(proxies, items, transpose_weight=True)`: streamed, never stored.
      labels: `[items]`, the class of each item. An id out of range gives NaN.
      margin: the distance from 0 that similarities should have.
      alpha: the inverse temperature, positive.
      axis: the axis of the items, 0 or 1.
      where: booleans that broadcast to the similarities, True = counts. A proxy without items is left out.
      ignore_index: class id of items to leave out; None: there is no such id.

    Returns:
      A scalar, float32 or wider; 0 where nothing counts.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Kim et al., "Proxy Anchor Loss for Deep Metric Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> s = jnp.array([[0.9, 0.1], [0.7, 0.3], [-0.2, 0.6]])
      >>> print(jaxsoft.losses.proxy_anchor_loss(s, jnp.array([0, 0, 1]), alpha=4.0).round(6))
      1.432494
    """
    axis = check_axis(similarities, axis)
    if similarities.ndim != 2:
        raise ValueError(
            f"similarities must have two axes, items and classes, got shape {similarities.shape}"
        )
    _checks.number("margin", margin)
    _checks.number("alpha", alpha, above=0)
    items, classes = similarities.shape[axis], similarities.shape[1 - axis]
    _checks.integers("labels", labels)
    _checks.shape("labels", labels, (items,), "one class id per item")
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    check_range("labels", labels, classes, ignore_index)
    labels = as_ids(labels)
    keep = jnp.ones(items, bool) if ignore_index is None else labels != ignore_index
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, similarities.shape, "the shape of the similarities")
    counts = jnp.expand_dims(keep, 1 - axis)
    where = counts if where is None else counts & where

    dtype = accumulation_dtype(similarities.dtype)
    proxies = jnp.arange(classes, dtype=labels.dtype)
    numbers = (jnp.broadcast_to(jnp.asarray(a, dtype), classes) for a in (margin, alpha))
    args = (proxies, *numbers)
    sums = [reductions.mapped_logsumexp(f, *args, col_args=(labels,)) for f in (_pull, _push)]
    pull, push, n = reduce_rows(similarities, (*sums, reductions.count()), axis=axis, where=where)

    def mean(lse, counted):
        values = jnp.where(counted, jax.nn.softplus(lse), 0)
        return safe_divide(jnp.sum(values), jnp.sum(counted).astype(dtype))

    out_of_range = jnp.any(keep & ((labels < 0) | (labels >= classes)))
    loss = mean(pull, pull != -jnp.inf) + mean(push, n > 0)
    return loss * jnp.where(out_of_range, jnp.nan, 1).astype(dtype)


def _pull(x, cols, proxy, margin, alpha, labels):
    return jnp.where(labels == proxy, -alpha * (x - margin), -jnp.inf)


def _push(x, cols, proxy, margin, alpha, labels):
    return jnp.where(labels == proxy, -jnp.inf, alpha * (x + margin))
