"""Predictions other than the most probable class: Frechet means in a space of labels, and soft suppression of boxes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype


def frechet_mean_predict(
    probs: Float[Array, "*rows observed"], distances: Float[Array, "observed labels"]
) -> Int[Array, "*rows"]:
    """`argmin_y sum_j p_j d(j, y)^2`: the label nearest to the predicted distribution, in place of the argmax.

    The labels may include classes without a probability, which were never observed.

    Args:
      probs: `[*rows, observed]`, floating: probabilities of the observed classes.
      distances: `[observed, labels]`, floating, from each observed class to each label.

    Returns:
      `[*rows]` int32, ties to the smaller label. With the discrete metric (0 on the diagonal, else 1) it is the argmax.

    Raises:
      TypeError: an argument that is not floating.
      ValueError: shapes that do not fit.

    Reference:
      Roberts et al., "Geometry-Aware Adaptation for Pretrained Models".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import frechet_mean_predict
      >>> path = jnp.abs(jnp.arange(4.0)[:, None] - jnp.arange(4.0))
      >>> print(frechet_mean_predict(jnp.array([0.45, 0.0, 0.1, 0.45]), path))
      2
    """
    _checks.floating("probs", probs)
    _checks.floating("distances", distances)
    if probs.ndim == 0:
        raise ValueError("probs must have shape [*rows, observed], got a scalar")
    if distances.ndim != 2 or distances.shape[0] != probs.shape[-1] or distances.shape[1] == 0:
        raise ValueError(
            f"distances must have shape ({probs.shape[-1]}, labels) with a label, got shape {distances.shape}"
        )
    probs, distances = jnp.asarray(probs), jnp.asarray(distances)
    dtype = accumulation_dtype(probs.dtype, distances.dtype)
    cost = jnp.matmul(probs.astype(dtype), distances.astype(dtype) ** 2, precision="highest")
    return jnp.argmin(cost, axis=-1).astype(jnp.int32)


class SoftNMS(NamedTuple):
    """The result of `soft_nms`.

    Attributes:
      order: `[n]` int32, the boxes in the order in which they were taken.
      scores: `[n]`, their scores when they were taken, descending.
      valid: `[n]` booleans, whether the score is at least the threshold.
    """

    order: Array
    scores: Array
    valid: Array


def soft_nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    *,
    method: str = "linear",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    score_threshold: float = 0.001,
    offset: float = 0.0,
    where: Bool[Array, " n"] | None = None,
) -> SoftNMS:
    """Takes the best box, lowers the scores of those that overlap it, and so on.

    Args:
      boxes: `[n, 4]`, floating: left, top, right, bottom.
      scores: `[n]`, floating, non-negative.
      method: `"linear"` multiplies a score by `1 - iou` where the iou exceeds `iou_threshold`, `"gaussian"` by
        `exp(-iou^2 / sigma)`, `"hard"` by 0 where the iou exceeds `iou_threshold` (ordinary suppression).
      sigma: positive.
      iou_threshold: in [0, 1].
      score_threshold: a box that is taken with a smaller score is not valid.
      offset: added to widths and heights; 1 for boxes in whole pixels.
      where: `[n]` booleans, True = counts; False for padding.

    Returns:
      A `SoftNMS` of static shapes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Bodla et al., "Soft-NMS -- Improving Object Detection With One Line of Code".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import soft_nms
      >>> boxes = jnp.array([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]], float)
      >>> kept = soft_nms(boxes, jnp.array([0.9, 0.8, 0.7]))
      >>> print(kept.order, kept.scores.round(4))
      [0 2 1] [0.9    0.7    0.2555]
    """
    _checks.floating("boxes", boxes)
    _checks.floating("scores", scores)
    _checks.option("method", method, ("linear", "gaussian", "hard"))
    _checks.number("sigma", sigma, above=0)
    _checks.number("iou_threshold", iou_threshold, at_least=0, at_most=1)
    _checks.number("score_threshold", score_threshold)
    _checks.number("offset", offset, at_least=0)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape [n, 4], got shape {boxes.shape}")
    n = boxes.shape[0]
    _checks.shape("scores", scores, (n,), "one score per box")
    boxes, scores = jnp.asarray(boxes), jnp.asarray(scores)
    dtype = accumulation_dtype(boxes.dtype, scores.dtype)
    b, s = boxes.astype(dtype), scores.astype(dtype)
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, (n,), "one boolean per box")
        b, s = jnp.where(where[:, None], b, 0), jnp.where(where, s, -jnp.inf)
    left, top, right, bottom = b.T
    area = (right - left + offset) * (bottom - top + offset)

    def take(carry, _):
        s, free = carry
        i = jnp.argmax(jnp.where(free, s, -jnp.inf))
        # After the last real box, masked ones are taken in their order.
        i = jnp.where(jnp.any(free & (s > -jnp.inf)), i, jnp.argmax(free))
        taken, free = s[i], free.at[i].set(False)
        width = jnp.minimum(right, right[i]) - jnp.maximum(left, left[i]) + offset
        height = jnp.minimum(bottom, bottom[i]) - jnp.maximum(top, top[i]) + offset
        inter = jnp.maximum(width, 0) * jnp.maximum(height, 0)
        union = area + area[i] - inter
        iou = jnp.where(union > 0, inter / jnp.where(union > 0, union, 1), 0)
        if method == "gaussian":
            factor = jnp.exp(-iou * iou / sigma)
        else:
            factor = jnp.where(iou > iou_threshold, 1 - iou if method == "linear" else 0, 1)
        s = jnp.where(free & (s > -jnp.inf), s * factor, s)
        return (s, free), (i.astype(jnp.int32), taken)

    _, (order, taken) = jax.lax.scan(take, (s, jnp.ones(n, bool)), length=n)
    return SoftNMS(order, taken, taken >= score_threshold)
