"""Confidence scores of rows of logits.

Each reads a few statistics of a row, so it takes an array or `linear_logits`. The entropy is `jaxsoft.entropy`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide
from jaxsoft.rows import LinearLogits, Logits, logsumexp, reduce_rows, reductions
from jaxsoft.rows import temperature as tempered
from jaxsoft.rows.inner import check_axis, row_scalar, rows_of
from jaxsoft.rows.reductions import LogPartition


def top_log_probability(logits: Logits, axis: int, where: Any) -> Array:
    """The largest log-probability of each row; -inf for a row without entries."""
    axis = check_axis(logits, axis)
    wanted = (reductions.maximum(), reductions.log_partition())
    top, partition = reduce_rows(logits, wanted, axis=axis, where=where)
    empty = top == -jnp.inf
    return jnp.where(empty, -jnp.inf, partition.log_softmax(jnp.where(empty, partition.shift, top)))


def max_softmax_probability(
    logits: Logits, *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows"]:
    """`max_j softmax(x)_j`, the confidence of the predicted class.

    The baseline of out-of-distribution detection: higher for inputs that the model knows.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]` in [0, 1], float32 or wider; 0 for a row without entries.

    Raises:
      TypeError: logits that are not floating.
      ValueError: an axis or a mask that does not fit.

    Reference:
      Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
      Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import max_softmax_probability
      >>> print(max_softmax_probability(jnp.array([[2.0, 1.0, 0.0], [0.5, 0.4, 0.3]])).round(6))
      [0.665241 0.367165]
    """
    return jnp.exp(top_log_probability(logits, axis, where))


def max_logit(
    logits: Logits, *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows"]:
    """`max_j x_j`: like the maximum probability, without the other classes.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]`, float32 or wider; -inf for a row without entries.

    Raises:
      TypeError: logits that are not floating.
      ValueError: an axis or a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import max_logit
      >>> print(max_logit(jnp.array([[2.0, 1.0, 0.0], [0.5, 0.4, 0.3]])))
      [2.  0.5]
    """
    return reduce_rows(logits, reductions.maximum(), axis=check_axis(logits, axis), where=where)


def energy_score(
    logits: Logits,
    *,
    temperature: float | Float[Array, "*rows"] = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """`T logsumexp(x / T)`, minus the free energy: higher for inputs that the model knows.

    `jaxsoft.losses.energy_margin_loss` trains it.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      temperature: T, positive, a number or `[*rows]`; 1 in the paper.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]`, float32 or wider; -inf for a row without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or a temperature that is not positive.

    Reference:
      Liu et al., "Energy-based Out-of-distribution Detection".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import energy_score
      >>> print(energy_score(jnp.array([[2.0, 1.0, 0.0], [0.5, 0.4, 0.3]])).round(6))
      [2.407606 1.501943]
    """
    axis = check_axis(logits, axis)
    t = row_scalar("temperature", temperature, rows_of(logits.shape, axis), logits.dtype, positive=True)
    dtype = accumulation_dtype(logits.dtype)
    wide = logits if isinstance(logits, LinearLogits) else logits.astype(dtype)
    log_sum = logsumexp(tempered(wide, t, axis=axis), axis=axis, where=where)
    empty = log_sum == -jnp.inf
    return jnp.where(empty, -jnp.inf, t.astype(log_sum.dtype) * jnp.where(empty, 0, log_sum))


def least_confidence(
    logits: Logits, *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows"]:
    """`1 - max_j softmax(x)_j`: an uncertainty, by which active learning asks for labels.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]` in [0, 1], float32 or wider; 1 for a row without entries.

    Raises:
      TypeError: logits that are not floating.
      ValueError: an axis or a mask that does not fit.

    Reference:
      Gonsior et al., "To Softmax, or not to Softmax: that is the question when applying Active Learning for
      Transformer Models".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import least_confidence
      >>> p = jnp.array([[0.5, 0.3, 0.2], [0.4, 0.39, 0.21], [0.8, 0.1, 0.1]])
      >>> print(least_confidence(jnp.log(p)).round(6))
      [0.5 0.6 0.2]
    """
    return -jnp.expm1(top_log_probability(logits, axis, where))


def margin_score(
    logits: Logits, *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows"]:
    """`p_(1) - p_(2)`, the largest minus the second largest probability: low for inputs to be labelled.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]` in [0, 1], float32 or wider; 0 for a row without entries. The only class of a row has margin 1.

    Raises:
      TypeError: logits that are not floating.
      ValueError: an axis or a mask that does not fit.

    Reference:
      Gonsior et al., "To Softmax, or not to Softmax: that is the question when applying Active Learning for
      Transformer Models".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import margin_score
      >>> p = jnp.array([[0.5, 0.3, 0.2], [0.4, 0.39, 0.21], [0.8, 0.1, 0.1]])
      >>> print((100 * margin_score(jnp.log(p))).round())
      [20.  1. 70.]
    """
    axis = check_axis(logits, axis)
    wanted = (reductions.top_k(2), reductions.log_partition())
    best, partition = reduce_rows(logits, wanted, axis=axis, where=where)
    first, second = best.values[..., 0], best.values[..., 1]
    empty, alone = first == -jnp.inf, second == -jnp.inf
    first = jnp.where(empty, partition.shift, first)
    # p_1 (1 - e^(x_2 - x_1)), exact for close calls
    gap = jnp.where(alone, 1, -jnp.expm1(jnp.where(alone, first, second) - first))
    return jnp.where(empty, 0, jnp.exp(partition.log_softmax(first)) * gap)


def label_non_uniformity(
    logits: Logits, *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows"]:
    """`1/2 sum_j |softmax(x)_j - 1/C|`: the Wasserstein distance of the prediction from the uniform one.

    Low for nodes near the border of classes. The distance under the discrete metric, which is the total variation, is
    our reading of the paper.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits` (two passes).
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts; C counts the classes left.

    Returns:
      `[*rows]` in [0, 1), float32 or wider; 0 for a row without entries.

    Raises:
      TypeError: logits that are not floating.
      ValueError: an axis or a mask that does not fit.

    Reference:
      Ji et al., "Leveraging Label Non-Uniformity for Node Classification in Graph Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import label_non_uniformity
      >>> print(label_non_uniformity(jnp.log(jnp.array([0.7, 0.2, 0.1]))).round(6))
      0.366667
    """
    axis = check_axis(logits, axis)
    wanted = (reductions.log_partition(), reductions.count())
    partition, count = reduce_rows(logits, wanted, axis=axis, where=where)
    distance = reductions.mapped_sum(_from_uniform, *partition, safe_divide(jnp.ones_like(count), count))
    return reduce_rows(logits, distance, axis=axis, where=where) / 2


def probability(x: Array, partition: LogPartition) -> Array:
    """`e^x / Z`, bounded also for a score x that is absent."""
    return jnp.exp(jnp.minimum(partition.log_softmax(x), 1))


def _from_uniform(x, cols, shift, correction, log_sum, share):
    del cols
    return jnp.abs(probability(x, LogPartition(shift, correction, log_sum)) - share)


def clip_uncertainty(
    confidence: Float[Array, " examples"], *, clip: float = 0.95, worst: float = 1.0
) -> Float[Array, " examples"]:
    """Uncertainty clipping: the most uncertain examples get the confidence `worst`, so that none is queried.

    They are often outliers, whose labels teach little. Examples below the `1 - clip` percentile of the confidences
    (linearly interpolated) are replaced. The published code clips some strategies on the wrong side; here low always
    means uncertain.

    Args:
      confidence: `[examples]`, higher = more certain: `margin_score`, `max_softmax_probability`, or minus the entropy.
      clip: the share of the examples to keep, in (0, 1]; 0.95, 0.9 and 0.7 in the paper, 1 changes nothing.
      worst: the confidence of the examples that are clipped.

    Returns:
      `[examples]`, in the dtype of the confidences; an empty array for no examples.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: a clip outside (0, 1], or confidences that do not have one axis.

    Reference:
      Gonsior et al., "To Softmax, or not to Softmax: that is the question when applying Active Learning for
      Transformer Models".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import clip_uncertainty
      >>> print(clip_uncertainty(jnp.array([0.1, 0.5, 0.6, 0.05]), clip=0.95))
      [0.1 0.5 0.6 1. ]
    """
    _checks.floating("confidence", confidence)
    _checks.number("clip", clip, above=0, at_most=1)
    _checks.number("worst", worst)
    if confidence.ndim != 1:
        raise ValueError(f"confidence must have shape [examples], got shape {tuple(confidence.shape)}")
    if confidence.shape[0] == 0:
        return jnp.asarray(confidence)
    wide = jnp.asarray(confidence, accumulation_dtype(confidence.dtype))
    threshold = jnp.quantile(wide, 1 - jnp.asarray(clip, wide.dtype))
    return jnp.where(wide < threshold, jnp.asarray(worst, wide.dtype), wide).astype(confidence.dtype)
