"""Relaxations of discrete choices.

Gumbel masks, straight-through one-hot vectors, a path to a vertex of the simplex, and a schedule of their temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, is_present
from jaxsoft.rows.inner import check_axis, check_dense, check_range, row_scalar, softmax_with


def present_scores(scores: Any, axis: int, where: Any, name: str) -> tuple[Array, Array, int]:
    """Checks dense scores; returns them in the accumulation dtype (0 if absent), the mask of present ones, the axis."""
    check_dense(scores, name)
    axis = check_axis(scores, axis)
    x = jnp.asarray(scores)
    x = x.astype(accumulation_dtype(x.dtype))
    if where is not None:
        where = jnp.asarray(where) if isinstance(where, bool) else where
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, scores.shape, "the shape of the scores")
    present = is_present(x, where)
    return jnp.where(present, x, 0), present, axis


def top_k_mask(x: Array, present: Array, k: int, axis: int) -> Array:
    """True at the k largest present entries of each row; ties go to the smaller index, as in `top_k`."""
    x = jnp.moveaxis(jnp.where(present, lax.stop_gradient(x), -jnp.inf), axis, -1)
    _, best = lax.top_k(x, min(k, x.shape[-1]))
    chosen = jnp.put_along_axis(jnp.zeros(x.shape, bool), best, True, axis=-1, inplace=False)
    return jnp.moveaxis(chosen, -1, axis) & present


def straight_through(hard: Array, soft: Array) -> Array:
    """`hard` in value, `soft` in every derivative (the difference added is exactly 0)."""
    return hard.astype(soft.dtype) + (soft - lax.stop_gradient(soft))


def gumbel_sigmoid(
    logits: Float[Array, "*shape"],
    *,
    key: Array | None,
    temperature: float | Float[Array, ""] = 1.0,
    hard: bool = False,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*shape"]:
    """Random keep-or-drop masks with a gradient: `sigmoid((logits + log u - log(1 - u)) / temperature)`.

    The two-class Gumbel-softmax of each entry alone. Multiplied by the weights of a network it searches for a
    subnetwork, which at the end keeps the entries with `logits > 0`. *Reconstructed*: the paper's use of it in
    every step with `hard=True`, and the temperature 1.

    Args:
      logits: any shape, floating: the log-odds of keeping each entry.
      key: a PRNG key; None for no noise, as in evaluation.
      temperature: a positive scalar; differentiable.
      hard: whether the values are 1 where the relaxed mask is above 1/2 and 0 elsewhere, with the gradient of
        the relaxed mask (straight-through).
      where: booleans that broadcast to the logits, True = counts. A masked entry is dropped: 0, no gradient.

    Returns:
      Masks of the logits' shape and dtype, in [0, 1].

    Raises:
      TypeError: logits that are not a floating array, a temperature that is not a number.
      ValueError: a temperature that is not positive, a mask that does not fit.

    Reference:
      Dupont et al., "Extracting Effective Subnetworks with Gumbel-Softmax".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.normalizers import gumbel_sigmoid
      >>> logits = jnp.array([2.0, -2.0, 0.5])
      >>> print(gumbel_sigmoid(logits, key=None).round(2), gumbel_sigmoid(logits, key=None, hard=True))
      [0.88 0.12 0.62] [1. 0. 1.]
    """
    check_dense(logits, "gumbel_sigmoid")
    _checks.flag("hard", hard)
    _checks.floating("logits", logits)
    x, present, _ = present_scores(jnp.atleast_1d(logits), -1, where, "gumbel_sigmoid")
    temperature = row_scalar("temperature", temperature, (), x.dtype, positive=True)
    if key is not None:
        x = x + jax.random.logistic(key, x.shape, x.dtype)
    soft = jax.nn.sigmoid(x / temperature)
    y = straight_through(x > 0, soft) if hard else soft
    return jnp.where(present, y, 0).astype(logits.dtype).reshape(logits.shape)


def straight_through_one_hot(
    logits: Float[Array, "*rows columns"], *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows columns"]:
    """One-hot vectors of the rows' largest entries, with the gradient of `softmax(logits)`.

    To guide a sampler of discrete sequences, a classifier is evaluated at the one-hot vector and differentiated
    through it.

    Args:
      logits: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows, columns]` in the dtype of the logits: 1 at the first largest entry, 0 elsewhere and in a row
      without entries.

    Raises:
      TypeError: logits that are not a floating array (for `linear_logits`, pass `logits.dense()`).
      ValueError: an axis or a mask that does not fit.

    Reference:
      Tang et al., "Gumbel-Softmax Flow Matching with Straight-Through Guidance for Controllable Biological
      Sequence Generation".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.normalizers import straight_through_one_hot
      >>> x = jnp.array([1.0, 2.0, -1.0, 0.5])
      >>> print(straight_through_one_hot(x), jax.grad(lambda x: straight_through_one_hot(x)[1])(x).round(6))
      [0. 1. 0. 0.] [-0.136646  0.238019 -0.018493 -0.08288 ]
    """
    x, present, axis = present_scores(logits, axis, where, "straight_through_one_hot")
    soft = softmax_with(x, axis=axis, where=present)
    return straight_through(top_k_mask(x, present, 1, axis), soft).astype(logits.dtype)


class Interpolant(NamedTuple):
    """A point of the simplex on its way to a vertex, and its velocity.

    Attributes:
      point: `[*rows, columns]`, sums to 1.
      velocity: `[*rows, columns]`, sums to 0.
    """

    point: Array
    velocity: Array


def gumbel_softmax_interpolant(
    ids: Int[Array, "*rows"],
    time: float | Float[Array, "*rows"],
    noise: Float[Array, "*rows columns"],
    *,
    beta: float = 2.0,
    max_temperature: float = 10.0,
    decay: float = 3.0,
    velocity: str = "noise_free",
) -> Interpolant:
    """The path `x_t = softmax((one_hot(ids) + noise / beta) / tau(t))`, `tau(t) = max_temperature e^(-decay t)`.

    Near the centre of the simplex at t = 0, near the vertex `ids` at t = 1: the path that a flow over discrete
    sequences is trained on. The constants are *reconstructed*.

    Args:
      ids: `[*rows]` integers, the vertices. An id out of range gives NaN (an error under `checkify`).
      time: in [0, 1], a scalar or `[*rows]`.
      noise: `[*rows, columns]` floats, `jax.random.gumbel(key, (*rows, columns))`; zeros for a path without noise.
      beta: the divisor of the noise, positive.
      max_temperature: tau(0), positive.
      decay: the rate at which tau falls, 0 or more.
      velocity: `"noise_free"`, `(decay / tau) x_k (e_k - x)`, the regression target; or `"exact"`, the
        derivative of `point` with respect to time for this noise. They agree where the noise is 0.

    Returns:
      `Interpolant(point, velocity)`, in the dtype of the noise.

    Raises:
      TypeError: ids that are not integers, noise that is not floating.
      ValueError: shapes that do not fit, a constant out of range, an unknown velocity.

    Reference:
      Tang et al., "Gumbel-Softmax Flow Matching with Straight-Through Guidance for Controllable Biological
      Sequence Generation".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import gumbel_softmax_interpolant
      >>> x, u = gumbel_softmax_interpolant(jnp.array(1), 0.5, jnp.array([0.2, -0.4, 1.1, 0.3]))
      >>> print(x.round(6), u.round(6))
      [0.216703 0.296559 0.265125 0.221614] [-0.086405  0.28048  -0.105712 -0.088363]
    """
    _checks.number("beta", beta, above=0)
    _checks.number("max_temperature", max_temperature, above=0)
    _checks.number("decay", decay, at_least=0)
    _checks.option("velocity", velocity, ("noise_free", "exact"))
    _checks.floating("noise", noise)
    _checks.integers("ids", ids)
    if noise.ndim == 0:
        raise ValueError("noise must have shape [*rows, columns], got a scalar")
    columns = noise.shape[-1]
    _checks.shape("ids", ids, noise.shape[:-1], "one id per row of the noise")
    check_range("ids", ids, columns, None)
    ids = as_ids(ids)
    g = jnp.asarray(noise).astype(accumulation_dtype(noise.dtype))
    time = jnp.asarray(row_scalar("time", time, noise.shape[:-1], g.dtype))[..., None]
    # Multiplied in at the end, since the maximum inside softmax may lose a NaN (XLA on CPUs).
    valid = jnp.where((ids >= 0) & (ids < columns), 1, jnp.nan)[..., None].astype(g.dtype)
    vertex = jax.nn.one_hot(ids, columns, dtype=g.dtype)
    rate = decay / max_temperature * jnp.exp(decay * time)  # decay / tau
    a = vertex + g / beta
    x = softmax_with(a * jnp.exp(decay * time) / max_temperature)
    if velocity == "exact":
        u = rate * x * (a - jnp.sum(x * a, axis=-1, keepdims=True))
    else:
        u = rate * jnp.sum(x * vertex, axis=-1, keepdims=True) * (vertex - x)
    return Interpolant((x * valid).astype(noise.dtype), (u * valid).astype(noise.dtype))


def exponential_temperature_schedule(initial: float, final: float, steps: int) -> Callable[[Any], Any]:
    """The schedule `initial (final / initial)^(step / steps)`, and then `final`.

    `optax.exponential_decay`, given by its two ends. This is not the paper's entropy-adaptive schedule.

    Args:
      initial: the temperature at step 0, positive.
      final: the temperature at `steps`, positive.
      steps: the number of steps from one to the other, 1 or more.

    Returns:
      A function of the step, as optax schedules are.

    Raises:
      TypeError: an argument that is not a number.
      ValueError: an argument out of range.

    Reference:
      "Small Temperature is All You Need for Differentiable Architecture Search".

    Example:
      >>> from jaxsoft.normalizers import exponential_temperature_schedule
      >>> temperature = exponential_temperature_schedule(1.0, 0.01, 100)
      >>> print(*(f"{temperature(step):.3f}" for step in (0, 50, 100, 200)))
      1.000 0.100 0.010 0.010
    """
    _checks.number("initial", initial, above=0)
    _checks.number("final", final, above=0)
    steps = _checks.integer("steps", steps, at_least=1)
    return optax.exponential_decay(initial, steps, final / initial, end_value=final)
