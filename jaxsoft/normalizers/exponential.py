"""The exponential family of normalizers."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsoft._numerics import accumulation_dtype
from jaxsoft.rows._driver import check_axis
from jaxsoft.rows._softmax import check_dense, softmax_with
from jaxsoft.rows._statistics import log_partition
from jaxsoft.rows.reductions import LogPartition


def softmax(
    scores: Float[Array, "*rows columns"], *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows columns"]:
    """`exp(x_i) / sum_j exp(x_j)` over each row.

    Like `jax.nn.softmax`, but sums half-precision rows in float32, and gives a row without entries weights 0.

    Args:
      scores: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts. A masked entry is absent, whatever it holds.

    Returns:
      Weights of the scores' shape and dtype, exact to a few units in the last place of the accumulation dtype
      before they are rounded to it; 0 for absent entries.

    Raises:
      TypeError: scores that are not a floating array (for `linear_logits`, say `logits.dense()`).
      ValueError: an axis or a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.224208 0.60946  0.030343 0.135989]
    """
    check_dense(scores, "softmax")
    return softmax_with(scores, axis=axis, where=where)


def log_softmax(
    scores: Float[Array, "*rows columns"], *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows columns"]:
    """`x_i - logsumexp(x)` over each row.

    Args:
      scores: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Log-weights of the scores' shape and dtype; -inf, with gradient 0, for absent entries.

    Raises:
      TypeError: scores that are not a floating array (for `linear_logits`, say `logits.dense()`).
      ValueError: an axis or a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.log_softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [-1.495182 -0.495182 -3.495182 -1.995182]
    """
    check_dense(scores, "log_softmax")
    axis = check_axis(scores, axis)
    x = scores.astype(accumulation_dtype(scores.dtype))
    partition = LogPartition(*(jnp.expand_dims(p, axis) for p in log_partition(x, axis=axis, where=where)))
    present = x != -jnp.inf if where is None else where & (x != -jnp.inf)
    return jnp.where(present, partition.log_softmax(jnp.where(present, x, 0)), -jnp.inf).astype(scores.dtype)
