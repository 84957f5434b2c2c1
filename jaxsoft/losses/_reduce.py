"""The mean of a loss over the examples that count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide
from jaxsoft.losses._common import IGNORE_INDEX, check_weights
from jaxsoft.rows import Logits, weighted_sum
from jaxsoft.rows.inner import check_axis, check_loss, rows_of


def weighted_mean(
    loss: Callable[..., Array],
    logits: Logits,
    labels: Array | None = None,
    *row_args: Array,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    axis: int = -1,
    chunk_size: int | None = None,
    **options: Any,
) -> Float[Array, ""]:
    """The weighted mean of a loss, `sum_i w_i loss_i / sum_i w_i`, its gradient taken in the forward pass.

    Computed by `weighted_sum`: faster than recomputing the logits for the gradient. Examples whose label is
    `ignore_index` count in neither sum.

    Args:
      loss: any loss of jaxsoft, or a function `(logits, labels, *row_args, **options) -> [rows]` like them.
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: `[*rows]` class ids, or anything else with the rows' leading axes.
      *row_args: further arrays with the rows' leading axes.
      weights: `[*rows]`, 1 by default; floats, counts or booleans.
      ignore_index: class id of examples to leave out; None leaves out none.
      axis: the axis of a row.
      chunk_size: rows stored at a time, as in `weighted_sum`.
      **options: passed to `loss`.

    Returns:
      A scalar, float32 or wider; 0, with gradient 0, if no example counts.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or size.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> from jaxsoft import losses
      >>> logits = jaxsoft.linear_logits(jnp.eye(3, 4), jnp.arange(20.0).reshape(4, 5) / 10)
      >>> labels = jnp.array([0, 3, -100])
      >>> print(losses.weighted_mean(losses.cross_entropy, logits, labels, label_smoothing=0.1).round(4))
      1.6644
    """
    check_loss("weighted_mean", loss)
    if labels is None:
        raise TypeError("labels must be given: weighted_mean(loss, logits, labels, weights=weights)")
    axis = check_axis(logits, axis)
    rows = rows_of(logits.shape, axis)
    if weights is None:
        weights = jnp.ones(rows, accumulation_dtype(logits.dtype))
    check_weights(weights, rows, "one number per row of logits")
    if hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == rows:
        if ignore_index != IGNORE_INDEX:  # which is the losses' own default
            options["ignore_index"] = ignore_index
        if ignore_index is not None:
            weights = jnp.where(as_ids(labels) == ignore_index, 0, weights)
    weights = safe_divide(weights, jnp.sum(weights))
    return weighted_sum(
        loss, logits, labels, *row_args, weights=weights, axis=axis, chunk_size=chunk_size, **options
    )
