"""Calibration by scaling the logits: temperature, vector and matrix scaling.

Each fit minimizes the negative log-likelihood of a held-out calibration set, in one compiled loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide, weigh
from jaxsoft._roots import differentiable, search
from jaxsoft.normalizers.inner import present_scores
from jaxsoft.rows import LinearLogits, Logits, log_prob, reduce_rows, reductions, temperature
from jaxsoft.rows.inner import check_axis, check_ids, compiled, detached, rows_of

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3


def fit_temperature(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = -100,
) -> Float[Array, ""]:
    """The temperature T with the smallest cross-entropy of `x / T`, in [0.001, 1000].

    Apply it with `jaxsoft.temperature(logits, T)`. The cross-entropy is convex in 1 / T; its minimum is found by
    safeguarded Newton steps, each a pass over the logits, and is differentiable in logits and weights as an implicit
    function.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`, whose logits are never stored.
      labels: `[*rows]` class ids. All labels may be of one class: one number is fitted, and it stays defined.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts. An example whose label is absent is left out.
      weights: `[*rows]`, 0 or more.
      ignore_index: class id of examples to leave out.

    Returns:
      A scalar, float32 or wider. Where the best temperature is 0 (every example is predicted right) or infinite, the
      nearest bound; 1 where no example counts or all logits are equal; NaN for a label out of range.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Guo et al., "On Calibration of Modern Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import fit_temperature
      >>> logits = jnp.array([[3.0, 1, 0], [2, 0, 1], [0, 2.5, 0.5], [1, 0, 2.2], [2, 1.8, 0], [0, 3, 1]])
      >>> print(fit_temperature(logits, jnp.array([0, 2, 1, 2, 1, 1])).round(4))
      0.7184
    """
    axis, labels, keep, weights = _prepare(logits, labels, axis, weights, ignore_index)
    log_scale = _searched(detached(logits), labels, where, keep, lax.stop_gradient(weights), axis)
    step = functools.partial(_newton_step, axis=axis)
    return jnp.exp(-differentiable(step, log_scale, logits, labels, where, keep, weights))


def _newton(logits, labels, where, keep, weights, log_scale, axis):
    """A Newton step in `log s`, of the scale `s = 1 / T`, and the derivative of the cross-entropy there."""
    if not isinstance(logits, LinearLogits):
        logits = logits.astype(weights.dtype)
    scaled = temperature(logits, jnp.exp(-log_scale), axis=axis)
    wanted = (reductions.softmax_moments(), reductions.label_statistics(labels))
    moments, label = reduce_rows(scaled, wanted, axis=axis, where=where, row_where=keep)
    weights = jnp.where((label.nll == jnp.inf) | ~label.present, 0, weights)
    counts = weights != 0
    # The mean score minus that of the label, without the rounding of either
    first = jnp.sum(weigh(label.nll - moments.entropy, weights))
    second = jnp.sum(weigh(moments.variance, weights))
    step = jnp.where(second == 0, -jnp.sign(first) * jnp.inf, -safe_divide(first, second))
    # If all labels have the largest score, more is better at any scale; Newton's steps would be short.
    all_right = jnp.all(~counts | (label.nll <= label.partition.log_sum))
    all_equal = jnp.all(~counts | ((moments.variance == 0) & (moments.entropy > 0)))
    step = jnp.where(all_equal, 0, jnp.where(all_right, jnp.inf, step))
    return log_scale + step, jnp.where(all_right, -1, first)


def _bounds(dtype) -> Array:
    return jnp.log(jnp.asarray([1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE], dtype))


def _newton_step(logits, labels, where, keep, weights, log_scale, *, axis):
    proposal, _ = _newton(logits, labels, where, keep, weights, log_scale, axis)
    return jnp.clip(proposal, *_bounds(proposal.dtype))  # no gradient at a bound


@functools.partial(compiled, static_argnums=(5,))
def _searched(logits, labels, where, keep, weights, axis):
    def improve(log_scale, unfinished):
        del unfinished
        proposal, slope = _newton(logits, labels, where, keep, weights, log_scale, axis)
        return proposal, -slope

    low, high = _bounds(weights.dtype)
    # Newton's steps square the error: the one after a step of this size is below the last place.
    tolerance = jnp.finfo(weights.dtype).eps ** (2 / 3)
    root, last = search(improve, low, high, jnp.zeros_like(low), tolerance, 60)
    return jnp.where(jnp.isnan(last), jnp.nan, root)


def _prepare(logits, labels, axis, weights, ignore_index) -> tuple[int, Array, Array, Array]:
    """Checks the arguments; returns axis, labels (0 if ignored), which examples are not ignored, and weights (0 if)."""
    axis = check_axis(logits, axis)
    rows, dtype = rows_of(logits.shape, axis), accumulation_dtype(logits.dtype)
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    check_ids("labels", labels, logits, axis, ignore_index=ignore_index)
    labels = as_ids(labels)
    if weights is None:
        weights = jnp.ones(rows, dtype)
    _checks.numeric("weights", weights)
    _checks.shape("weights", weights, rows, "one number per example")
    keep = jnp.ones(rows, bool) if ignore_index is None else labels != ignore_index
    return axis, jnp.where(keep, labels, 0), keep, jnp.where(keep, jnp.asarray(weights, dtype), 0)


class Scaling(NamedTuple):
    """What vector and matrix scaling fit: `x * weight + bias`, or `x @ weight + bias`.

    Attributes:
      weight: `[classes]` or `[classes, classes]`.
      bias: `[classes]`.
    """

    weight: Array
    bias: Array


def apply_scaling(
    logits: Float[Array, "*rows columns"],
    scaling: Scaling,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows columns"]:
    """The calibrated logits, `x * weight + bias` or `x @ weight + bias`.

    For a linear head, change the head instead: `linear_logits(hidden, w * weight, bias=b * weight + bias)`.

    Args:
      logits: `[*rows, columns]`, floating.
      scaling: the result of `fit_vector_scaling` or `fit_matrix_scaling`.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts. Absent classes do not enter the product.

    Returns:
      Logits of the same shape and dtype; -inf for absent classes.

    Raises:
      TypeError: logits that are not a floating array (for `linear_logits`, pass `logits.dense()`).
      ValueError: a scaling for another number of classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import Scaling, apply_scaling
      >>> print(apply_scaling(jnp.array([1.0, 2.0]), Scaling(jnp.array([0.5, 1.0]), jnp.array([0.0, -1.0]))))
      [0.5 1. ]
    """
    x, present, axis = present_scores(logits, axis, where, "apply_scaling")
    classes = x.shape[axis]
    _checks.shape("scaling.bias", scaling.bias, (classes,), "one number per class")
    shape = (classes,) * scaling.weight.ndim if scaling.weight.ndim in (1, 2) else (classes,)
    _checks.shape("scaling.weight", scaling.weight, shape, "[classes] or [classes, classes]")
    scaled = jnp.moveaxis(_scaled(scaling, jnp.moveaxis(x, axis, -1)), -1, axis)
    return jnp.where(present, scaled, -jnp.inf).astype(logits.dtype)


def _scaled(scaling: Scaling, x: Array) -> Array:
    weight, bias = (a.astype(x.dtype) for a in scaling)
    times = x * weight if weight.ndim == 1 else jnp.matmul(x, weight, precision="highest")
    return times + bias


def fit_vector_scaling(
    logits: Float[Array, "*rows columns"],
    labels: Int[Array, "*rows"],
    *,
    l2: float = 1e-3,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = -100,
    max_steps: int = 200,
    tolerance: float = 1e-5,
) -> Scaling:
    """A factor and a bias per class with the smallest cross-entropy of `x * weight + bias`, by L-BFGS.

    The objective is the mean cross-entropy plus `l2 / 2` times the squared distance of weight and bias from those that
    change nothing. Without it (`l2=0`), a class that no example has, or examples that are all predicted right, have
    no minimum: the bias or the weight then grows until the steps end. So a calibration set of one class needs `l2 > 0`.

    Args:
      logits: `[*rows, columns]`, floating.
      labels: `[*rows]` class ids.
      l2: the strength of the penalty, 0 or more.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts. An example whose label is absent is left out.
      weights: `[*rows]`, 0 or more.
      ignore_index: class id of examples to leave out.
      max_steps: the largest number of L-BFGS steps, a static integer.
      tolerance: the steps end where the norm of the gradient is below this.

    Returns:
      A `Scaling` with `[columns]` weights, float32 or wider, for `apply_scaling`; without gradient. Weight 1 and bias
      0 where no example counts; NaN for a label out of range.

    Raises:
      TypeError: an argument of a wrong type or dtype (for `linear_logits`, pass `logits.dense()`).
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Guo et al., "On Calibration of Modern Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import apply_scaling, fit_vector_scaling
      >>> logits, labels = jnp.array([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]]), jnp.array([0, 1, 1, 0])
      >>> scaling = fit_vector_scaling(logits, labels)
      >>> print(apply_scaling(logits[:1], scaling)[0, 0] < logits[0, 0])  # less confident: one of three was wrong
      True
    """
    return _fit(jnp.ones, logits, labels, l2, axis, where, weights, ignore_index, max_steps, tolerance)


def fit_matrix_scaling(
    logits: Float[Array, "*rows columns"],
    labels: Int[Array, "*rows"],
    *,
    l2: float = 1e-3,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = -100,
    max_steps: int = 200,
    tolerance: float = 1e-5,
) -> Scaling:
    """A matrix and a bias with the smallest cross-entropy of `x @ weight + bias`, by L-BFGS.

    It has as many numbers as classes squared, and fits noise where the calibration set is small: raise `l2`, or take
    `fit_vector_scaling`, which has the objective and the same arguments.

    Args:
      logits: `[*rows, columns]`, floating.
      labels: `[*rows]` class ids.
      l2: the strength of the penalty on the distance from the identity matrix and the bias 0, 0 or more.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts. An example whose label is absent is left out.
      weights: `[*rows]`, 0 or more.
      ignore_index: class id of examples to leave out.
      max_steps: the largest number of L-BFGS steps, a static integer.
      tolerance: the steps end where the norm of the gradient is below this.

    Returns:
      A `Scaling` with `[columns, columns]` weights, float32 or wider, for `apply_scaling`; without gradient. The
      identity where no example counts; NaN for a label out of range.

    Raises:
      TypeError: an argument of a wrong type or dtype (for `linear_logits`, pass `logits.dense()`).
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Guo et al., "On Calibration of Modern Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import fit_matrix_scaling
      >>> logits, labels = jnp.array([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]]), jnp.array([0, 1, 1, 0])
      >>> print(fit_matrix_scaling(logits, labels).weight.shape)
      (2, 2)
    """
    return _fit(jnp.eye, logits, labels, l2, axis, where, weights, ignore_index, max_steps, tolerance)


def _fit(
    start: Callable, logits, labels, l2, axis, where, weights, ignore_index, max_steps, tolerance
) -> Scaling:
    _checks.number("l2", l2, at_least=0)
    _checks.number("tolerance", tolerance, at_least=0)
    max_steps = _checks.integer("max_steps", max_steps, at_least=1)
    x, present, axis = present_scores(logits, axis, where, "a fit of a weight per class")
    axis, labels, _, weights = _prepare(x, labels, axis, weights, ignore_index)
    x, present = (jnp.moveaxis(a, axis, -1) for a in (x, present))
    present = present & (weights != 0)[..., None]
    x = jnp.where(present, x, 0)
    l2, tolerance = (jnp.asarray(a, x.dtype) for a in (l2, tolerance))
    neutral = Scaling(start(x.shape[-1], dtype=x.dtype), jnp.zeros(x.shape[-1], x.dtype))
    return _minimized(neutral, *lax.stop_gradient((x, present, labels, weights, l2, tolerance)), max_steps)


@functools.partial(compiled, static_argnums=(7,))
def _minimized(neutral, x, present, labels, weights, l2, tolerance, max_steps) -> Scaling:
    total = jnp.sum(weights)

    def objective(scaling: Scaling) -> Array:
        nll = -log_prob(_scaled(scaling, x), labels, where=present)
        mean = safe_divide(jnp.sum(weigh(nll, jnp.where(nll == jnp.inf, 0, weights))), total)
        return mean + l2 / 2 * optax.tree.norm(jax.tree.map(jnp.subtract, scaling, neutral), squared=True)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        count, scaling, state, _ = carry
        value, gradient = value_and_grad(scaling, state=state)
        updates, state = optimizer.update(
            gradient, state, scaling, value=value, grad=gradient, value_fn=objective
        )
        return count + 1, optax.apply_updates(scaling, updates), state, optax.tree.norm(gradient)

    def goes_on(carry):
        return (carry[0] < max_steps) & (carry[-1] > tolerance)

    first = (jnp.int32(0), neutral, optimizer.init(neutral), jnp.asarray(jnp.inf, x.dtype))
    fitted: Any = lax.while_loop(goes_on, step, first)[1]
    return fitted
