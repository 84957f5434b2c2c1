"""Similarity-distance-magnitude (SDM) activations.

Softmax whose base and exponent tell how close an input is to the training data.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide
from jaxsoft.normalizers.exponential import log_softmax, softmax
from jaxsoft.normalizers.masks import present_scores
from jaxsoft.rows.inner import row_scalar, rows_of


def sdm_activation(
    logits: Float[Array, "*rows columns"],
    similarity: float | Float[Array, "*rows"] | Int[Array, "*rows"],
    distance: float | Float[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows columns"]:
    """`(2 + q)^(d x_i) / sum_j (2 + q)^(d x_j)`, softmax with base 2 + q and temperature 1 / d.

    q counts similar training examples (`similarity_count`; 0 marks an input as out of distribution), d is a
    quantile of the distance to them (`distance_quantile`; 0 gives uniform weights). q = e - 2, d = 1 is softmax.

    Args:
      logits: `[*rows, columns]`, floating.
      similarity: q, 0 or more, a scalar or `[*rows]`; no gradient.
      distance: d in [0, 1], a scalar or `[*rows]`; no gradient.
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      Weights of the logits' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype (for `linear_logits`, pass `logits.dense()`).
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Schmaltz, "Similarity-Distance-Magnitude Universal Verification".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import sdm_activation
      >>> print(sdm_activation(jnp.array([1.0, 2.0, -1.0, 0.5]), 10.0, 0.5).round(6))
      [0.196668 0.681277 0.016389 0.105667]
    """
    x, present, _, axis = _scaled(logits, similarity, distance, axis, where, "sdm_activation")
    return softmax(x, axis=axis, where=present).astype(logits.dtype)


def sdm_log_softmax(
    logits: Float[Array, "*rows columns"],
    similarity: float | Float[Array, "*rows"] | Int[Array, "*rows"],
    distance: float | Float[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows columns"]:
    """The logarithm of `sdm_activation` in its own base 2 + q: `d x_i - log_(2+q) sum_j (2 + q)^(d x_j)`.

    The training loss is minus its entry at the label. Exact, while the published code adds an epsilon inside.

    Args:
      logits: `[*rows, columns]`, floating.
      similarity: q, 0 or more, a scalar or `[*rows]`; no gradient.
      distance: d in [0, 1], a scalar or `[*rows]`; no gradient.
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      Log-weights of the logits' shape and dtype; -inf, with gradient 0, for absent entries.

    Raises:
      TypeError: an argument of a wrong type or dtype (for `linear_logits`, pass `logits.dense()`).
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Schmaltz, "Similarity-Distance-Magnitude Universal Verification".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import sdm_log_softmax
      >>> print(sdm_log_softmax(jnp.array([2.0, 1.0, 0.5]), 10.0, 0.8).round(6))
      [-0.069217 -0.869217 -1.269218]
    """
    x, present, log_base, axis = _scaled(logits, similarity, distance, axis, where, "sdm_log_softmax")
    return (log_softmax(x, axis=axis, where=present) / log_base).astype(logits.dtype)


def _scaled(logits, similarity, distance, axis, where, name) -> tuple[Array, Array, Array, int]:
    """`d log(2 + q) x`, its mask, `log(2 + q)` that broadcasts with it, and the axis."""
    for argument, value, most in (("similarity", similarity, None), ("distance", distance, 1)):
        if _checks.is_concrete_number(value):
            _checks.number(argument, value, at_least=0, at_most=most)
    x, present, axis = present_scores(logits, axis, where, name)
    rows = rows_of(x.shape, axis)
    if hasattr(similarity, "dtype") and jnp.issubdtype(similarity.dtype, jnp.integer):
        similarity = similarity.astype(x.dtype)

    def by_row(argument, value):
        value = lax.stop_gradient(row_scalar(argument, value, rows, x.dtype)).astype(x.dtype)
        return jnp.expand_dims(value, axis) if value.ndim else value

    log_base = jnp.log(2 + by_row("similarity", similarity))
    return x * (by_row("distance", distance) * log_base), present, log_base, axis


def _present(where: Any, shape: tuple[int, ...], of: str) -> Array:
    """The entries that count, as an array of this shape, which is that of the argument `of`."""
    if where is None:
        return jnp.ones(shape, bool)
    _checks.boolean("where", where)
    _checks.broadcastable("where", where, shape, f"the shape of {of}")
    return jnp.broadcast_to(where, shape)


def similarity_count(
    neighbour_labels: Int[Array, "*rows neighbours"],
    neighbour_predictions: Int[Array, "*rows neighbours"],
    predictions: Int[Array, "*rows"],
    *,
    where: Bool[Array, ...] | None = None,
) -> Int[Array, "*rows"]:
    """The similarity q: the number of consecutive nearest training neighbours that agree with the prediction.

    Counts from the nearest on and stops at the first whose true or predicted class differs.

    Args:
      neighbour_labels: `[*rows, neighbours]` integers, the true classes, nearest first.
      neighbour_predictions: `[*rows, neighbours]` integers, the classes the model predicts for them.
      predictions: `[*rows]` integers, the predicted classes of the inputs.
      where: booleans that broadcast to `[*rows, neighbours]`, True = counts. An absent neighbour (such as a
        training example's match with itself) is skipped.

    Returns:
      `[*rows]` int32.

    Raises:
      TypeError: an argument of a wrong dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Schmaltz, "Similarity-Distance-Magnitude Universal Verification".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import similarity_count
      >>> print(similarity_count(jnp.array([1, 1, 1, 1]), jnp.array([1, 1, 0, 1]), jnp.array(1)))
      2
    """
    for name, value in (
        ("neighbour_labels", neighbour_labels),
        ("neighbour_predictions", neighbour_predictions),
        ("predictions", predictions),
    ):
        _checks.integers(name, value)
    if neighbour_labels.ndim == 0:
        raise ValueError("neighbour_labels must have shape [*rows, neighbours], got a scalar")
    shape = neighbour_labels.shape
    _checks.shape("neighbour_predictions", neighbour_predictions, shape, "the shape of neighbour_labels")
    _checks.shape("predictions", predictions, shape[:-1], "one class per row of neighbours")
    expected = jnp.asarray(predictions)[..., None]
    agrees = (neighbour_labels == expected) & (neighbour_predictions == expected)
    present = _present(where, shape, "neighbour_labels")
    run = jnp.cumprod((agrees | ~present).astype(jnp.int32), axis=-1)
    return jnp.sum(run * present, axis=-1).astype(jnp.int32)


def distance_quantile(
    distances: Float[Array, "*rows"],
    calibration: Float[Array, "classes examples"],
    *,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """The distance quantile d, `min_c (1 - #{calibration_c < distance} / n_c)`.

    The share of a class's calibration distances that are not smaller, minimized over the classes c. One number for
    all classes, so that it changes no argmax.

    Args:
      distances: `[*rows]` floats, each input's distance to its nearest training example.
      calibration: `[classes, examples]` floats, the same distances for a calibration set, by class.
      where: booleans that broadcast to `calibration`, True = counts: for classes of different sizes.

    Returns:
      `[*rows]` in [0, 1], float32 or wider, without gradient; 0 if a class has no example.

    Raises:
      TypeError: an argument of a wrong dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Schmaltz, "Similarity-Distance-Magnitude Universal Verification".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import distance_quantile
      >>> print(distance_quantile(jnp.array([0.05, 0.2, 0.3, 0.9]), jnp.array([[0.1, 0.2, 0.4, 0.8]])))
      [1.   0.75 0.5  0.  ]
    """
    _checks.floating("distances", distances)
    _checks.floating("calibration", calibration)
    if calibration.ndim != 2:
        raise ValueError(
            f"calibration must have shape [classes, examples], got shape {tuple(calibration.shape)}"
        )
    dtype = accumulation_dtype(distances.dtype, calibration.dtype)
    known = lax.stop_gradient(jnp.asarray(calibration)).astype(dtype)
    present = _present(where, known.shape, "calibration")
    d = lax.stop_gradient(jnp.asarray(distances)).astype(dtype)
    known = jnp.sort(jnp.where(present, known, jnp.inf), axis=-1)
    smaller: Any = jax.vmap(jnp.searchsorted, (0, None))(known, d.reshape(-1))  # [classes, rows]
    n = jnp.sum(present, axis=-1, keepdims=True).astype(dtype)
    quantile = jnp.min(safe_divide(n - smaller, jnp.broadcast_to(n, smaller.shape)), axis=0, initial=1)
    return jnp.where(jnp.isnan(d), d, quantile.reshape(d.shape))
