"""Losses for out-of-distribution detection and for a temperature.

Terms against unfounded confidence, to be added to the cross-entropy: they shape the free energy
`E = -T logsumexp(x / T)` of inputs inside and outside the distribution. `dro_temperature_loss` trains a
`jaxsoft.normalizers.temperature_network`.

`examples/losses/out_of_distribution.py` trains with them on some of the digits and measures how well the other digits
are detected. There the energy of plain cross-entropy already separates known from unknown digits best; training with
two kinds of outliers does not help to detect two others.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, finite_gauge
from jaxsoft.losses._common import IGNORE_INDEX, LabelledRows, check_weights, poison_of, prepare
from jaxsoft.rows import Logits, RowReduction, reductions
from jaxsoft.rows.inner import check_axis, row_scalar, rows_of


def energy_margin_loss(
    logits: Logits,
    is_out: Bool[Array, "*rows"],
    *,
    m_in: float = -25.0,
    m_out: float = -7.0,
    temperature: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """Squared hinges of the energy: `relu(E - m_in)^2` in, `relu(m_out - E)^2` out of the distribution.

    The energy `E = -T logsumexp(x / T)` is low for inputs that the model knows. The paper adds
    `mean(loss, where=~is_out) + mean(loss, where=is_out)`, times 0.1, to the cross-entropy of the examples inside.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      is_out: `[*rows]` booleans, True for examples out of the distribution.
      m_in: the energy that examples inside should not exceed. The authors' scripts use -23 for CIFAR-10 and -27 for
        CIFAR-100, with m_out = -5.
      m_out: the energy that examples outside should not fall below.
      temperature: T, positive, a number or `[*rows]`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts; a row without classes costs 0.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Liu et al., "Energy-based Out-of-distribution Detection".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> is_out = jnp.array([False, True])
      >>> print(jaxsoft.losses.energy_margin_loss(logits, is_out, m_in=-5.0, m_out=-1.0).round(6))
      [5.844694 1.425535]
    """
    _checks.number("m_in", m_in)
    _checks.number("m_out", m_out)
    rows = _rows(logits, axis, where, weights)
    _checks.boolean("is_out", is_out)
    _checks.shape("is_out", is_out, rows_of(logits.shape, rows.axis), "one boolean per example")
    top, excess = rows.reduce(_tempered_logsumexp(_per_row(temperature, rows)))
    present = excess != -jnp.inf
    energy = -(top + jnp.where(present, excess, 0))
    violation = jax.nn.relu(jnp.where(is_out, m_out - energy, energy - m_in))
    return rows.finish(jnp.where(present, violation * violation, 0))


def outlier_exposure_loss(
    logits: Logits,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """Outlier exposure: `logsumexp(x) - mean(x)`, the cross-entropy of the uniform distribution.

    For examples out of the distribution, added to the cross-entropy of the examples inside, usually with a factor of
    0.5 on its mean.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts; a row without classes costs 0.
      weights: `[*rows]`, multiply the losses: 0 for examples inside.

    Returns:
      Losses `[*rows]`, float32 or wider, at least the logarithm of the number of classes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure"; Liu et al., "Energy-based Out-of-distribution
      Detection".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.outlier_exposure_loss(jnp.array([[0.2, 1.5, -0.3, 0.8, -1.2]])).round(6))
      [1.993958]
    """
    rows = _rows(logits, axis, where, weights)
    partition, mean = rows.reduce((reductions.log_partition(), reductions.mean()))
    return rows.finish(jnp.where(partition.log_sum != -jnp.inf, -partition.log_softmax(mean), 0))


def dro_temperature_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    temperature: float | Float[Array, "*rows"],
    rho: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """The loss of TempNet: `T logsumexp((x - x_y) / T) + T (rho - log C)`, differentiable in the temperature T.

    Its minimum over T is the largest mean of `x_c - x_y` over the class distributions whose KL divergence from the
    uniform one is at most rho (distributionally robust optimization). It is reached at the T where
    `KL(softmax(x / T) || uniform) = rho`. `jaxsoft.normalizers.temperature_network` predicts T. With T = 1 and
    `rho = log C` the loss is the cross-entropy.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      temperature: T, positive, a number or `[*rows]`.
      rho: the largest divergence, 0 or more: 1 for GPT-2, 10 for LLaMA in the paper's code. For rho of log C or more,
        the best temperature is 0.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts; C counts the classes left.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider; they may be negative.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Qiu et al., "To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> logits, labels = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([0])
      >>> loss = lambda t: jaxsoft.losses.dro_temperature_loss(logits, labels, temperature=t)[0]
      >>> print(loss(2.0).round(6), jax.grad(loss)(2.0).round(6))
      0.759291 0.885319
    """
    _checks.number("rho", rho, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    t = _per_row(temperature, rows)
    (top, excess), score, count = rows.reduce(
        (_tempered_logsumexp(t), reductions.take(rows.labels), reductions.count())
    )
    absent = score == -jnp.inf
    robust = jnp.where(absent, jnp.inf, (top - jnp.where(absent, top, score)) + excess)
    loss = robust + t * (rho - jnp.log(jnp.maximum(count, 1)))
    return rows.finish(jnp.where(count > 0, loss, 0) * poison_of(score))


# T logsumexp(x / T) in one pass, with the state (m, s = sum e^((x - m) / T)). The maximum is subtracted before the
# division, so that large logits lose no precision to its rounding.


def _tempered_init(like, t):
    return jnp.full_like(like, -jnp.inf), like


def _tempered_update(state, tile, t):
    m = lax.stop_gradient(jnp.maximum(state[0], jnp.max(tile.scores, axis=-1, initial=-jnp.inf)))
    y = jnp.where(tile.keep, tile.x - finite_gauge(m)[..., None], 0)
    return m, _in_gauge(state, m, t) + tile.sum(jnp.exp(y / t[..., None]))


def _tempered_merge(a, b, t):
    m = jnp.maximum(a[0], b[0])
    return m, _in_gauge(a, m, t) + _in_gauge(b, m, t)


def _in_gauge(state, m, t):
    """The sum of a state, rescaled to a larger maximum."""
    return jnp.where(
        state[0] == -jnp.inf, 0, state[1] * jnp.exp((finite_gauge(state[0]) - finite_gauge(m)) / t)
    )


def _tempered_parts(state, t):
    some = state[1] != 0
    return finite_gauge(state[0]), jnp.where(some, t * jnp.log(jnp.where(some, state[1], 1)), -jnp.inf)


def _tempered_neutral(state):
    return state[0], jnp.zeros_like(state[1])


def _tempered_logsumexp(t: Array) -> RowReduction:
    """`T logsumexp(x / T)` in two parts to add: the maximum, and the rest (-inf for an empty row)."""
    return RowReduction(
        _tempered_init, _tempered_update, _tempered_merge, _tempered_parts, _tempered_neutral, args=(t,)
    )


def _per_row(temperature: Any, rows: LabelledRows) -> Array:
    """A temperature as `[*rows]`, 1 for rows that are ignored."""
    shape = rows_of(rows.logits.shape, rows.axis)
    t = row_scalar("temperature", temperature, shape, rows.logits.dtype, positive=True)
    t = jnp.broadcast_to(t, shape).astype(accumulation_dtype(rows.logits.dtype))
    return t if rows.keep is None else jnp.where(rows.keep, t, 1)


def _rows(logits: Logits, axis: int, where: Any, weights: Any) -> LabelledRows:
    """The checked arguments of a loss without labels."""
    axis = check_axis(logits, axis)
    check_weights(weights, rows_of(logits.shape, axis))
    return LabelledRows(logits, axis, where, None, None, False, weights)
