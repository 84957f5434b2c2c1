"""Conformal prediction: sets of classes with a guaranteed coverage, risk control, and selection with few false ones.

The guarantees hold for any model, if the examples of calibration and test are exchangeable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide
from jaxsoft.calibration.scores import probability
from jaxsoft.normalizers import softmax
from jaxsoft.normalizers.inner import per_row, present_scores
from jaxsoft.rows import Logits, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis, check_ids, rows_of
from jaxsoft.rows.reductions import LogPartition

METHODS = ("lac", "aps")


def _check_level(name: str, value: Any) -> None:
    _checks.number(name, value, above=0, below=1)


def _check_method(method: Any, penalty: Any, free_ranks: Any, share: Any) -> None:
    _checks.option("method", method, METHODS)
    _checks.number("penalty", penalty, at_least=0)
    _checks.number("free_ranks", free_ranks, at_least=0)
    if _checks.is_concrete_number(share):
        _checks.number("share", share, at_least=0, at_most=1)


def nonconformity_score(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    method: str = "lac",
    penalty: float = 0.0,
    free_ranks: float = 0.0,
    share: float | Float[Array, "*rows"] = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """How little a label conforms to a prediction: `1 - p_y` (LAC), or the mass of the classes ahead of it (APS).

    `"aps"` is `sum of p_j over classes ahead + share * p_y + penalty * max(rank + 1 - free_ranks, 0)`, with the label's
    rank 0, 1, ...; classes are ranked by probability, equal ones by column. With a penalty it is RAPS.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: `[*rows]` class ids. One out of range gives NaN (an error under `checkify`).
      method: `"lac"` gives the smallest sets, `"aps"` sets that adapt to the difficulty of the input.
      penalty: of `"aps"`, 0 or more: makes large sets smaller.
      free_ranks: of `"aps"`: the number of ranks without penalty.
      share: of `"aps"`: the share of the label's own probability that counts, in [0, 1], a number or `[*rows]`. Uniform
        random numbers give exact coverage, 1 gives more.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]`, float32 or wider; 0 for a row without entries. An absent label has score 1 and ranks behind all others.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    References:
      Sadinle et al., "Least Ambiguous Set-Valued Classifiers with Bounded Error Levels"; Romano et al.,
      "Classification with Valid and Adaptive Coverage"; Angelopoulos et al., "Uncertainty Sets for Image Classifiers
      using Conformal Prediction".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import nonconformity_score
      >>> logits, label = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.array(1)
      >>> print(nonconformity_score(logits, label).round(4))
      0.7
      >>> print(nonconformity_score(logits, label, method="aps", share=0.5).round(4))
      0.65
    """
    _check_method(method, penalty, free_ranks, share)
    axis = check_axis(logits, axis)
    check_ids("labels", labels, logits, axis)
    ids, rows = as_ids(labels), rows_of(logits.shape, axis)
    if method == "lac":
        label = reduce_rows(logits, reductions.label_statistics(ids), axis=axis, where=where)
        return -jnp.expm1(-label.nll)
    wanted = (reductions.label_statistics(ids), reductions.take(ids))
    label, score = reduce_rows(logits, wanted, axis=axis, where=where)
    known = lax.stop_gradient(score)
    wanted = (reductions.mapped_sum(_ahead, known, ids, *label.partition), reductions.rank(ids, known))
    ahead, rank = reduce_rows(logits, wanted, axis=axis, where=where)
    share = per_row("share", share, rows, ahead.dtype)
    over = jnp.maximum(rank.astype(ahead.dtype) + 1 - free_ranks, 0)
    value = ahead + share * jnp.exp(-label.nll) + penalty * over
    return jnp.where(label.partition.log_sum == -jnp.inf, 0, value)


def _ahead(x, cols, score, ids, shift, correction, log_sum):
    """The probability of a class that is ahead of the label, else 0."""
    is_ahead = (x > score) | ((x == score) & (cols < ids))
    return jnp.where(is_ahead & (cols != ids), probability(x, LogPartition(shift, correction, log_sum)), 0)


def prediction_set(
    logits: Float[Array, "*rows columns"],
    threshold: float | Float[Array, ""],
    *,
    method: str = "lac",
    penalty: float = 0.0,
    free_ranks: float = 0.0,
    share: float | Float[Array, "*rows"] = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Bool[Array, "*rows columns"]:
    """The classes whose `nonconformity_score` is at most the threshold.

    With the `conformal_quantile` of the scores of n calibration examples as the threshold, the set holds the label
    with probability 1 - alpha at least (and at most 1 - alpha + 1 / (n + 1), if no scores are equal).

    Args:
      logits: `[*rows, columns]`, floating.
      threshold: a number, the `conformal_quantile`; +inf gives all classes.
      method: as for the scores of calibration.
      penalty: as for the scores of calibration.
      free_ranks: as for the scores of calibration.
      share: as for the scores of calibration; random numbers of its own for each row.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      Booleans of the logits' shape, False for absent classes. A set may be empty, where the model is unsure in a way
      that calibration did not see; a set of the best class is then a larger one.

    Raises:
      TypeError: logits that are not a floating array (for `linear_logits`, pass `logits.dense()`).
      ValueError: an argument of a wrong shape or out of range.

    References:
      See `nonconformity_score`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import prediction_set
      >>> print(prediction_set(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.75))
      [ True  True False]
    """
    _check_method(method, penalty, free_ranks, share)
    _checks.number("threshold", threshold)
    x, present, axis = present_scores(logits, axis, where, "prediction_set")
    x, present = (jnp.moveaxis(a, axis, -1) for a in (x, present))
    p = softmax(x, where=present)
    if method == "lac":
        score = 1 - p
    else:
        order = jnp.argsort(jnp.where(present, -x, jnp.inf), axis=-1)
        rank = jnp.argsort(order, axis=-1)
        best = jnp.take_along_axis(p, order, axis=-1)
        ahead = jnp.take_along_axis(jnp.cumsum(best, axis=-1) - best, rank, axis=-1)
        own = per_row("share", share, x.shape[:-1], p.dtype)[..., None] * p
        score = ahead + own + penalty * jnp.maximum(rank.astype(p.dtype) + 1 - free_ranks, 0)
    return jnp.moveaxis(present & (score <= threshold), -1, axis)


def _slack(dtype: Any) -> Any:
    """Rounding of a level in floating point, relative."""
    return 4 * jnp.finfo(dtype).eps


def conformal_quantile(
    scores: Float[Array, " examples"], alpha: float, *, weights: Float[Array, " examples"] | None = None
) -> Float[Array, ""]:
    """The smallest q with `sum of weights of scores above q, plus 1`, at most `alpha (sum of weights + 1)`.

    Without weights the k-th smallest of n scores, `k = ceil((n + 1) (1 - alpha))`: a new score is at most q with
    probability 1 - alpha at least.

    Args:
      scores: `[examples]` floats, the `nonconformity_score` of each calibration example.
      alpha: the rate of errors to allow, in (0, 1).
      weights: `[examples]` in [0, 1]: smaller for examples that resemble the new one less, which itself has weight 1.
        The guarantee then degrades with the distance of their distributions.

    Returns:
      A scalar, float32 or wider; +inf where there are too few examples for the level (n + 1 < 1 / alpha), or none.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or an alpha outside (0, 1).

    References:
      Vovk et al., "Algorithmic Learning in a Random World"; Barber et al., "Conformal prediction beyond
      exchangeability".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import conformal_quantile
      >>> print(conformal_quantile(jnp.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.25, 0.15, 0.6, 0.35]), 0.2))
      0.5
    """
    _check_level("alpha", alpha)
    scores, weights = _checked_examples("scores", scores, weights, 1)
    order = jnp.argsort(scores)
    total = jnp.sum(weights)
    above = total - jnp.cumsum(weights[order])
    allowed = jnp.asarray(alpha, scores.dtype) * (total + 1) * (1 + _slack(scores.dtype))
    return jnp.min(jnp.where(above + 1 <= allowed, scores[order], jnp.inf), initial=jnp.inf)


def _checked_examples(name: str, values: Any, weights: Any, ndim: int) -> tuple[Array, Array]:
    _checks.floating(name, values)
    if values.ndim != ndim:
        shape = "[examples]" if ndim == 1 else "[examples, thresholds]"
        raise ValueError(f"{name} must have shape {shape}, got shape {tuple(values.shape)}")
    values = jnp.asarray(values, accumulation_dtype(values.dtype))
    if weights is None:
        return values, jnp.ones(values.shape[0], values.dtype)
    _checks.numeric("weights", weights)
    _checks.shape("weights", weights, values.shape[:1], "one number per example")
    return values, jnp.asarray(weights, values.dtype)


class RiskControl(NamedTuple):
    """What `conformal_risk_control` returns.

    Attributes:
      threshold: the smallest threshold that satisfies the bound; the last one where none does.
      index: its position, int32.
      feasible: whether it satisfies the bound.
      bounds: `[thresholds]`, the bound on the risk of each threshold.
    """

    threshold: Array
    index: Array
    feasible: Array
    bounds: Array


def conformal_risk_control(
    losses: Float[Array, "examples thresholds"],
    thresholds: Float[Array, " thresholds"],
    alpha: float,
    *,
    bound: float = 1.0,
    weights: Float[Array, " examples"] | None = None,
) -> RiskControl:
    """The smallest threshold whose expected loss on a new example is at most alpha.

    That is the first with `(sum_i w_i L_i(threshold) + bound) / (sum_i w_i + 1) <= alpha`. With the loss 1 - coverage
    it is conformal prediction; others are the false negative rate of a set of labels, or 1 - F1.

    Args:
      losses: `[examples, thresholds]` in [0, bound], not increasing along the thresholds.
      thresholds: `[thresholds]`, from the largest loss to the smallest (the most conservative last).
      alpha: the risk to allow, in (0, bound).
      bound: the largest loss that is possible, positive.
      weights: `[examples]`, 0 or more, divided by the largest: smaller for examples that resemble the new one less
        (non-exchangeable data). The guarantee degrades with the distance of their distributions.

    Returns:
      A `RiskControl`. Where no threshold satisfies the bound (as without examples), it is the last, with
      `feasible=False`: nothing is guaranteed then.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, no thresholds, or an alpha outside (0, bound).

    References:
      Angelopoulos et al., "Conformal Risk Control"; Farinhas et al., "Non-Exchangeable Conformal Risk Control".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import conformal_risk_control
      >>> losses = jnp.array([[1, 0.8, 0.4, 0.1, 0], [1, 0.6, 0.3, 0.2, 0], [1, 0.5, 0.2, 0, 0]])
      >>> control = conformal_risk_control(losses, jnp.linspace(0.0, 1.0, 5), 0.5)
      >>> print(control.threshold, control.feasible, f"{control.bounds[2]:.2f}")
      0.5 True 0.48
    """
    _checks.number("bound", bound, above=0)
    below = float(bound) if _checks.is_concrete_number(bound) else None
    _checks.number("alpha", alpha, above=0, below=below)
    losses, weights = _checked_examples("losses", losses, weights, 2)
    _checks.numeric("thresholds", thresholds)
    _checks.shape("thresholds", thresholds, losses.shape[1:], "one per column of the losses")
    if losses.shape[1] == 0:
        raise ValueError("thresholds must have one entry at least, got shape (0,)")
    largest = jnp.max(weights, initial=0)
    weights = safe_divide(weights, jnp.broadcast_to(largest, weights.shape))
    total = jnp.einsum("i,ij->j", weights, losses, precision="highest")
    bounds = (total + bound) / (jnp.sum(weights) + 1)
    satisfied = bounds <= alpha * (1 + _slack(bounds.dtype))
    feasible = jnp.any(satisfied)
    index = jnp.where(feasible, jnp.argmax(satisfied), losses.shape[1] - 1).astype(jnp.int32)
    return RiskControl(jnp.asarray(thresholds)[index], index, feasible, bounds)


def conformal_p_values(
    calibration: Float[Array, " examples"], scores: Float[Array, "*tests"], *, key: Array | None = None
) -> Float[Array, "*tests"]:
    """`(1 + #{calibration <= score}) / (n + 1)`: small where a score is lower than those of calibration.

    For a test example like those of calibration, P(p <= u) is at most u. With `key`, ties are broken at random:
    `(#{<} + U (#{=} + 1)) / (n + 1)`, which is uniform. The published code counts `<` alone: the same without ties,
    and too small with them.

    Args:
      calibration: `[examples]` floats, scores of examples for which the hypothesis holds: of known inputs, with a
        score that is higher for known ones, or see `conformal_select`.
      scores: `[*tests]` floats.
      key: None, or a PRNG key.

    Returns:
      `[*tests]` in (0, 1], float32 or wider; 1 without calibration examples.

    Raises:
      TypeError: an argument of a wrong dtype.
      ValueError: a calibration that does not have one axis.

    Reference:
      Jin and Candès, "Selection by Prediction with Conformal p-values"; Bai and Jin, "Optimized Conformal Selection:
      Powerful Selective Inference After Conformity Score Optimization".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import conformal_p_values
      >>> calibration, scores = jnp.array([5.0, 4.0, 1.0, 0.5, 3.0, 2.0]), jnp.array([0.2, 1.5, 4.5, 0.1])
      >>> print((7 * conformal_p_values(calibration, scores)).round(4))
      [1. 3. 6. 1.]
    """
    _checks.floating("calibration", calibration)
    _checks.floating("scores", scores)
    if calibration.ndim != 1:
        raise ValueError(f"calibration must have shape [examples], got shape {tuple(calibration.shape)}")
    dtype = accumulation_dtype(calibration.dtype, scores.dtype)
    ordered, x = jnp.sort(jnp.asarray(calibration, dtype)), jnp.asarray(scores, dtype)
    at_most = _count(ordered, x, "right")
    if key is None:
        p = (at_most + 1) / (ordered.shape[0] + 1)
    else:
        u = 1 - jax.random.uniform(key, x.shape, dtype)  # in (0, 1]
        less = _count(ordered, x, "left")
        p = (less + u * (at_most - less + 1)) / (ordered.shape[0] + 1)
    return jnp.where(jnp.isnan(x), jnp.nan, p)


def _count(ordered: Array, x: Array, side: str) -> Array:
    """How many of the ordered numbers are less (left), or at most (right), each x."""
    return jnp.searchsorted(ordered, x.reshape(-1), side=side).reshape(x.shape).astype(x.dtype)


def benjamini_hochberg(p_values: Float[Array, " tests"], level: float) -> Bool[Array, " tests"]:
    """The hypotheses that the Benjamini-Hochberg procedure rejects: false ones are at most a share `level`, expected.

    Rejects the k smallest p-values, for the largest k with `p_(k) <= level k / m`.

    Args:
      p_values: `[tests]` floats.
      level: the false discovery rate to allow, in (0, 1).

    Returns:
      `[tests]` booleans. A NaN is not rejected, and counts in m.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: p-values that do not have one axis, or a level outside (0, 1).

    Reference:
      Benjamini and Hochberg, "Controlling the False Discovery Rate".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import benjamini_hochberg
      >>> print(benjamini_hochberg(jnp.array([1 / 7, 3 / 7, 6 / 7, 1 / 7]), 0.3))
      [ True False False  True]
    """
    _check_level("level", level)
    _checks.floating("p_values", p_values)
    if p_values.ndim != 1:
        raise ValueError(f"p_values must have shape [tests], got shape {tuple(p_values.shape)}")
    return _rejected(jnp.asarray(p_values, accumulation_dtype(p_values.dtype)), level)


def _rejected(p: Array, level: Any) -> Array:
    m = p.shape[0]
    ordered = jnp.sort(p)
    allowed = level * jnp.arange(1, m + 1, dtype=p.dtype) / max(m, 1) * (1 + _slack(p.dtype))
    largest = jnp.max(jnp.where(ordered <= allowed, ordered, -jnp.inf), initial=-jnp.inf)
    return p <= largest


class Selection(NamedTuple):
    """What `conformal_select` returns, each `[tests]`.

    Attributes:
      selected: booleans.
      e_values: evidence against the hypothesis.
      p_values: conformal p-values by the model of each test.
      model: int32, the model that was chosen for each test.
      rejections: int32, how many tests are rejected with that test's auxiliary p-values.
    """

    selected: Array
    e_values: Array
    p_values: Array
    model: Array
    rejections: Array


def conformal_select(
    calibration: Float[Array, "*models examples"],
    scores: Float[Array, "*models tests"],
    level: float,
    *,
    prune: str | None = None,
    key: Array | None = None,
) -> Selection:
    """Selects tests whose outcome exceeds a bar: wrong ones are at most a share `level`, expected.

    The hypothesis of a test is that its outcome y does not exceed c. With a prediction mu, the scores are `M * (y > c)
    - mu` in calibration, with a large M, and `-mu` for tests. Several models may be given; for each test, the one that
    rejects most with auxiliary p-values is taken, which keeps the guarantee (OptCS). Then each test has an e-value `m /
    (level R)`, if its p-value is at most `level R / m` with R rejections, and the Benjamini-Hochberg procedure runs on
    their reciprocals.

    Args:
      calibration: `[examples]` or `[models, examples]` floats.
      scores: `[tests]` or `[models, tests]` floats, low where the outcome is predicted to exceed the bar.
      level: the false discovery rate to allow, in (0, 1).
      prune: None; `"homogeneous"` divides the e-values by one uniform random number, `"independent"` by one each: more
        tests are selected at the same level.
      key: a PRNG key for `prune`.

    Returns:
      A `Selection`. Nothing is selected where there are too few examples for the level. Of models with equally
      many rejections the first is taken (the published code draws one).

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: shapes that do not fit, a level outside (0, 1), or one of `prune` and `key` without the other.

    Reference:
      Bai and Jin, "Optimized Conformal Selection: Powerful Selective Inference After Conformity Score Optimization".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import conformal_select
      >>> calibration, scores = jnp.array([5.0, 4.0, 1.0, 0.5, 3.0, 2.0]), jnp.array([0.2, 1.5, 4.5, 0.1])
      >>> selection = conformal_select(calibration, scores, 0.6)
      >>> print(selection.selected, selection.e_values.round(4))
      [ True  True False  True] [2.2222 2.2222 0.     2.2222]
    """
    _check_level("level", level)
    _checks.option("prune", prune, (None, "homogeneous", "independent"))
    if (prune is None) != (key is None):
        raise ValueError("prune and key must be given together, or neither")
    _checks.floating("calibration", calibration)
    _checks.floating("scores", scores)
    if calibration.ndim not in (1, 2) or calibration.ndim != scores.ndim:
        raise ValueError(
            "calibration and scores must have shapes [examples] and [tests], or [models, examples] and "
            f"[models, tests], got {tuple(calibration.shape)} and {tuple(scores.shape)}"
        )
    dtype = accumulation_dtype(calibration.dtype, scores.dtype)
    known, x = (jnp.atleast_2d(jnp.asarray(a, dtype)) for a in (calibration, scores))
    if known.shape[0] != x.shape[0] or known.shape[0] == 0:
        raise ValueError(
            f"calibration and scores must be of the same models, got {known.shape[0]} and {x.shape[0]}"
        )
    n, m = known.shape[1], x.shape[1]
    q = jnp.asarray(level, dtype)
    counts = jax.vmap(lambda known, x: _count(jnp.sort(known), x, "right"))(known, x)

    def of_test(j):
        at_j = jnp.take(x, j, axis=1)[:, None]
        auxiliary = jnp.where(jnp.arange(m) == j, 0, (counts + (at_j <= x)) / (n + 1))
        rejections = jnp.sum(jax.vmap(_rejected, (0, None))(auxiliary, q), axis=1, dtype=jnp.int32)
        model = jnp.argmax(rejections).astype(jnp.int32)
        return model, rejections[model], (jnp.take(counts, j, axis=1)[model] + 1) / (n + 1)

    model, rejections, p = lax.map(of_test, jnp.arange(m))
    bar = q * rejections / max(m, 1)
    e = jnp.where(p <= bar * (1 + _slack(dtype)), 1 / bar, 0)
    if key is not None:
        shape = () if prune == "homogeneous" else e.shape
        e = e / (1 - jax.random.uniform(key, shape, dtype))
    selected = _rejected(jnp.where(e > 0, 1 / jnp.where(e > 0, e, 1), jnp.inf), q)
    return Selection(selected, e, p, model, rejections)
