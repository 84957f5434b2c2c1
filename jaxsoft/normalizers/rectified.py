"""Rectified, polynomial and elementwise normalizers.

They replace the exponential by another function. Most are `f(x_i) / sum_j f(x_j)`, which needs no reference exponent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import exp_difference, safe_divide
from jaxsoft.normalizers._exponential import SOFTMAX, gauged_sum, is_left, rescale
from jaxsoft.normalizers._normalizer import Normalizer, defined_by, normalize
from jaxsoft.rows import RowReduction, Tile, reductions

Scores = Float[Array, "*rows columns"]


def divided_by_sum(numerators: Callable[[Tile, Any], Array]) -> Normalizer:
    """`t_i / (sum_j t_j + eps)` with t the numerators of a tile; the parameter eps is 0 if absent."""

    def init(like, params):
        return like

    def update(state, tile, params):
        return state + jnp.sum(numerators(tile, params), axis=-1)

    def terms(tile, state, params):
        return (numerators(tile, params),)

    def coefficients(state, params):
        mass = state + params["eps"] if "eps" in params else state
        return (safe_divide(jnp.ones_like(mass), mass),)

    return Normalizer(RowReduction(init, update), terms, coefficients)


@functools.cache
def ratio(f: Callable[[Array], Array]) -> Normalizer:
    """`f(x_i) / (sum_j f(x_j) + eps)` for an elementwise f; the parameter eps is 0 if absent."""
    return divided_by_sum(lambda tile, params: jnp.where(tile.keep, f(tile.x), 0))


# Softpick: (m, d = sum |e^x - 1| e^-m) with m >= 0. The derivative at x = 0 is 0.


@jax.custom_jvp
def _excess(x: Array, m: Array) -> tuple[Array, Array]:
    """`|e^x - 1| e^-m` and `relu(e^x - 1) e^-m`, accurate near 0 too; m is a gauge."""
    m = m[..., None]
    excess = exp_difference(x, x - m, jnp.exp(-m))
    return jnp.abs(excess), jnp.maximum(excess, 0)


@_excess.defjvp
def _excess_jvp(primals, tangents):
    x, m = primals
    slope = jnp.exp(x - m[..., None]) * tangents[0]
    return _excess(x, m), (
        jnp.where(x < 0, -slope, jnp.where(x == 0, 0, slope)),
        jnp.where(x > 0, slope, 0),
    )


def _softpick_init(like, params):
    return like, like


def _magnitudes(tile, m, params):
    return _excess(tile.x, m)[0]  # 0 for an absent entry, which has x = 0


def _softpick_terms(tile, state, params):
    return (_excess(tile.x, state[0])[1],)


def _softpick_coefficients(state, params):
    return (safe_divide(jnp.ones_like(state[1]), state[1] + params["eps"]),)


_SOFTPICK = Normalizer(
    gauged_sum(_softpick_init, _magnitudes), _softpick_terms, _softpick_coefficients, rescale
)


def _softpick(rows, *, eps=1e-8):
    return _SOFTPICK._replace(params={"eps": rows.per_row("eps", eps)})


@defined_by(_softpick)
def softpick(
    scores: Scores, *, eps: float = 1e-8, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Scores:
    """Rectified softmax, `relu(exp(x_i) - 1) / (sum_j |exp(x_j) - 1| + eps)`: exact zeros, no sink.

    Negative scores get weight 0 but enlarge the denominator, so that rows may sum to less than 1, down to 0.

    Args:
      scores: `[*rows, columns]`, floating.
      eps: added to the denominator, in units of `exp(max(0, max x))`.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Zuhri et al., "Softpick: No Attention Sink, No Massive Activations with Rectified Softmax".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.softpick(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.183026 0.680543 0.       0.0691  ]
    """
    _checks.number("eps", eps, at_least=0)
    return normalize(_softpick, scores, axis, where, "softpick", eps=eps)


def stable_exponential(x: Array) -> Array:
    """`x + 1` for x >= 0, `1 / (1 - x)` below: stablemax's replacement for the exponential."""
    below = x < 0
    return jnp.where(below, 1 / (1 - jnp.where(below, x, 0)), 1 + jnp.where(below, 0, x))


def _stablemax(rows):
    del rows
    return ratio(stable_exponential)


@defined_by(_stablemax)
def stablemax(scores: Scores, *, axis: int = -1, where: Bool[Array, ...] | None = None) -> Scores:
    """`s(x_i) / sum_j s(x_j)` with `s(x) = x + 1` for x >= 0 and `1 / (1 - x)` below: no overflow or absorption.

    Args:
      scores: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Prieto et al., "Grokking at the Edge of Numerical Stability".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.stablemax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.285714 0.428571 0.071429 0.214286]
    """
    return normalize(_stablemax, scores, axis, where, "stablemax")


@functools.cache
def taylor_exponential(order: int) -> Callable[[Array], Array]:
    """The Taylor polynomial of the exponential, of the given order."""

    def t(x):
        total = jnp.ones_like(x)
        for i in range(order, 0, -1):  # Horner's rule
            total = 1 + total * x / i
        return total

    return t


def _taylor_softmax(rows, *, order=2):
    del rows
    return ratio(taylor_exponential(order))


@defined_by(_taylor_softmax)
def taylor_softmax(
    scores: Scores, *, order: int = 2, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Scores:
    """`t(x_i) / sum_j t(x_j)` with t a Taylor polynomial of exp of even order (positive everywhere).

    Not monotone for scores below -1 (order 2).

    Args:
      scores: `[*rows, columns]`, floating.
      order: the order of the polynomial, an even static integer of 2 or more.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      de Brebisson and Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.taylor_softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.25974  0.519481 0.051948 0.168831]
    """
    order = _checks.integer("order", order, at_least=2)
    if order % 2:
        raise ValueError(f"order must be even (an odd polynomial is negative somewhere), got {order}")
    return normalize(_taylor_softmax, scores, axis, where, "taylor_softmax", order=order)


# Elementwise weights: each depends on its own score.


def _unit(state, params):
    return (params["unit"],)


def _sigmoid_terms(tile, state, params):
    return (jnp.where(tile.keep, jax.nn.sigmoid(tile.x + params["bias"][..., None]), 0),)


def _sigmoid_weights(rows, *, bias=None):
    bias = -jnp.log(jnp.maximum(rows.count(), 1)) if bias is None else rows.per_row("bias", bias)
    return Normalizer(None, _sigmoid_terms, _unit, params={"bias": bias, "unit": jnp.ones_like(bias)})


@defined_by(_sigmoid_weights)
def sigmoid_weights(
    scores: Scores,
    *,
    bias: float | Float[Array, "#*rows"] | None = None,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`sigmoid(x_i + bias)`: elementwise, without normalization (sigmoid attention).

    Args:
      scores: `[*rows, columns]`, floating.
      bias: a number, or an array that broadcasts to `[*rows]`. Default: `-log n`, n the number of present entries,
        with which a row sums to about 1 at the start of training.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.sigmoid_weights(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.40461  0.648786 0.084224 0.291875]
    """
    return normalize(_sigmoid_weights, scores, axis, where, "sigmoid_weights", bias=bias)


@functools.cache
def _relu_terms(power: float) -> Callable:
    def terms(tile, state, params):
        return (positive_power(tile.x, power),)

    return terms


def positive_power(x: Array, power: Any) -> Array:
    """`relu(x) ** power`, with the derivative 0 where x <= 0; it passes on NaN."""
    zero = x <= 0
    safe = jnp.where(zero, 1, x)
    return jnp.where(zero, 0, safe if _is(power, 1) else safe * safe if _is(power, 2) else safe**power)


def _is(power: Any, value: float) -> bool:
    return _checks.is_concrete_number(power) and float(power) == value


def _is_positive(tile: Tile, params) -> Array:
    return ~(tile.x <= 0)


def _relu_weights(rows, *, power=1.0):
    power = _checks.static_number("power", power, above=0)
    n = rows.count()
    unit = safe_divide(jnp.ones_like(n), n)
    return Normalizer(None, _relu_terms(power), _unit, params={"unit": unit}, support=_is_positive)


@defined_by(_relu_weights)
def relu_weights(
    scores: Scores, *, power: float = 1.0, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Scores:
    """`relu(x_i)^power / n` with n the number of present entries (ReLU attention).

    Args:
      scores: `[*rows, columns]`, floating.
      power: a static number above 0.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wortsman et al., "Replacing softmax with ReLU in Vision Transformers".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.relu_weights(jnp.array([1.0, 2.0, -1.0, 0.5])))
      [0.25  0.5   0.    0.125]
    """
    return normalize(_relu_weights, scores, axis, where, "relu_weights", power=power)


def _softplus_attention_weights(rows, *, scale, eps=1e-8):
    factor = rows.per_row("scale", scale) * jnp.log(jnp.maximum(rows.count(), 1))
    softplus = ratio(jax.nn.softplus)
    softplus = softplus._replace(params={"eps": jnp.full_like(factor, eps)})
    return softplus.preceded_by(_times_factor, factor=factor)


def _times_factor(tile: Tile, params) -> Tile:
    return tile.with_values(tile.x * params["factor"][..., None])


@defined_by(_softplus_attention_weights)
def softplus_attention_weights(
    scores: Scores,
    *,
    scale: float | Float[Array, "#*rows"],
    eps: float = 1e-8,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """LSSA weights, `a_i / (sum_j a_j + eps)` with `a = softplus(scale log(n) x)`, n the number of present entries.

    Args:
      scores: `[*rows, columns]`, floating: the cosines between queries and keys (both normalized, no other scale).
      scale: `log(d)`, d the width of a head: a number, or an array that broadcasts to `[*rows]`.
      eps: added to the denominator.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Gao et al., "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.softplus_attention_weights(jnp.array([0.9, 0.2, -0.5]), scale=4.16).round(6))
      [0.753889 0.228418 0.017693]
    """
    _checks.number("eps", eps, at_least=0)
    return normalize(
        _softplus_attention_weights, scores, axis, where, "softplus_attention_weights", scale=scale, eps=eps
    )


def _log_excess(tile: Tile, params) -> Tile:
    """`power * log(relu(n a / (sum a + eps) - offset))`, absent where relu is 0: its softmax has the powers."""
    a = jax.nn.softplus(tile.x)
    excess = a * params["per_mass"][..., None] - params["offset"][..., None]
    outside = ~tile.keep | (excess <= 8 * jnp.finfo(a.dtype).eps)  # less is rounding error
    log = jnp.log(jnp.where(outside, 1, excess))
    return tile.with_scores(jnp.where(outside, -jnp.inf, params["power"][..., None] * log))


def _reweighted_attention_weights(rows, *, scale, power=15.0, offset=None, eps=1e-8):
    n = rows.count()
    first = _softplus_attention_weights(rows, scale=scale, eps=eps)
    mass = rows.state(first)
    params = {
        "per_mass": safe_divide(n, mass + eps),
        "offset": jnp.where(n <= 3, 0.0, 1.0) if offset is None else rows.per_row("offset", offset),
        "power": rows.per_row("power", power),
    }
    # eps is not added to the sum of powers, as small ones are far below it; the sum is relative to the largest power.
    weights = SOFTMAX.preceded_by(_log_excess, **params)
    weights = weights._replace(support=is_left)
    return weights.preceded_by(_times_factor, factor=first.params["factor"])


@defined_by(_reweighted_attention_weights)
def reweighted_attention_weights(
    scores: Scores,
    *,
    scale: float | Float[Array, "#*rows"],
    power: float = 15.0,
    offset: float | Float[Array, "#*rows"] | None = None,
    eps: float = 1e-8,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """LSSAR weights: `relu(n A - offset)^power`, normalized, with A the `softplus_attention_weights`.

    Entries below the average get 0. A row whose weights are all equal gets zeros. Computed by logarithms, so that
    no power overflows.

    Args:
      scores: `[*rows, columns]`, floating: the cosines between queries and keys (both normalized, no other scale).
      scale: `log(d)`, d the width of a head: a number, or an array that broadcasts to `[*rows]`.
      power: 15 for long contexts; 3 is best at the training length.
      offset: a number, or an array that broadcasts to `[*rows]`. Default: 1, and 0 in rows of at most three present
        entries (the first three of a causal attention).
      eps: added to the denominator of A.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Gao et al., "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x = jnp.array([0.9, 0.8, -0.5, 0.1])
      >>> print(jaxsoft.reweighted_attention_weights(x, scale=4.16, power=3.0).round(6))
      [0.687876 0.312124 0.       0.      ]
    """
    _checks.number("eps", eps, at_least=0)
    return normalize(
        _reweighted_attention_weights,
        scores,
        axis,
        where,
        "reweighted_attention_weights",
        scale=scale,
        power=power,
        offset=offset,
        eps=eps,
    )


_MPC_STEPS, _MPC_CUTOFF = 5, -14.0


def _limit_exponential(tile: Tile, params) -> Array:
    z = tile.x - params["top"][..., None] - params["shift"][..., None]
    far = ~tile.keep | (z < _MPC_CUTOFF)
    return jnp.where(far, 0, (1 + jnp.where(far, 0, z) / 2**_MPC_STEPS) ** (2**_MPC_STEPS))


_MPC = divided_by_sum(_limit_exponential)


def _mpc_softmax(rows, *, eps=1e-6):
    top = rows.reduce(reductions.maximum())
    top = jnp.where(top == -jnp.inf, 0, top)
    return _MPC._replace(params={"top": top, "shift": jnp.full_like(top, eps)})


@defined_by(_mpc_softmax)
def mpc_softmax(
    scores: Scores, *, eps: float = 1e-6, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Scores:
    """Softmax with the exponential of secure multi-party inference: `(1 + z / 32)^32`, and 0 below z = -14.

    `z = x - max x - eps`. To test how robust a model is to the approximation. The constants are reconstructed.

    Args:
      scores: `[*rows, columns]`, floating.
      eps: subtracted from the scores.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Dong et al., "PUMA: Secure Inference of LLaMA-7B in Five Minutes".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.normalizers.mpc_softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.22348  0.617253 0.026448 0.132819]
    """
    _checks.number("eps", eps, at_least=0)
    return normalize(_mpc_softmax, scores, axis, where, "mpc_softmax", eps=eps)
