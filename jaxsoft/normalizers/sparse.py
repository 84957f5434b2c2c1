"""Sparse normalizers: the k largest scores, sparsemax and entmax.

Entmax weights are `relu((alpha - 1) x - tau)^(1 / (alpha - 1))` with the threshold tau at which they sum to 1. No row
is sorted: Newton's method finds tau in a few passes, each with two sums over the row.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import expm1_over, log1p_ratio, safe_divide
from jaxsoft._roots import differentiable, search
from jaxsoft.normalizers._exponential import SOFTMAX, is_left
from jaxsoft.normalizers._normalizer import DenseRows, Survey, defined_by, normalize
from jaxsoft.normalizers.rectified import divided_by_sum, positive_power
from jaxsoft.rows import RowReduction, reductions
from jaxsoft.rows.inner import Selection, check_axis, check_dense, compiled

Scores = Float[Array, "*rows columns"]


def _selected(tile, params):
    selection = Selection(**{name: a[..., None] for name, a in params.items()})
    chosen = tile.keep & selection.holds(tile.x, tile.cols)
    return tile.with_scores(jnp.where(chosen, tile.scores, -jnp.inf))


def _sparse_softmax(rows, *, k=10):
    best = rows.detached().reduce(reductions.top_k(k + 1))
    # The bound of a row with fewer than k entries is -inf: all its entries are selected.
    return SOFTMAX.preceded_by(_selected, **Selection.of(best, k)._asdict())._replace(support=is_left)


@defined_by(_sparse_softmax)
def sparse_softmax(
    scores: Scores, *, k: int = 10, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Scores:
    """`softmax(TopK(x, k))`: softmax over the k largest scores of each row, 0 elsewhere; ties go to the earlier score.

    Args:
      scores: `[*rows, columns]`, floating.
      k: how many, a static integer of 1 or more, at most the number of columns (in attention, a query that sees
        fewer keys attends to all of them). The default is ours.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Sun et al., "Sparse-softmax: A Simpler and Faster Alternative Softmax Transformation".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.sparse_softmax(jnp.array([1.0, 2.0, -1.0, 0.5]), k=2).round(6))
      [0.268941 0.731059 0.       0.      ]
    """
    k = _checks.integer("k", k, at_least=1)
    check_dense(scores, "sparse_softmax")
    axis = check_axis(scores, axis)
    columns = scores.shape[axis]
    if k > columns:
        raise ValueError(f"k must be at most the length of a row, which is {columns}, got {k}")
    return normalize(_sparse_softmax, scores, axis, where, "sparse_softmax", k=k)


# Two sums over a row find the threshold. With e = alpha - 1 and S the sum of the weights, Newton's method solves
# S^e = 1 for alpha <= 2. S^e is a norm: convex in the threshold, and linear in it for equal scores. So the threshold
# rises to the root without overshooting, in half the steps of S = 1, which needs fewer for alpha > 2 only.
# The weights are u^(1 / e), and the threshold has one of two forms:
#
#   alpha >= 1.1:  u = e (x - top) - t, from t = -1, where the largest entry alone has weight 1;
#   else:          u = 1 + e z with z = (x - top) - t, from t = 0, and u^(1 / e) = exp(z log(1 + e z) / (e z)), which is
#                  e^z at e = 0. The first form is exact for small u, the second for small e.

_NEAR = 0.1


def _select(condition: Any, a: Any, b: Any) -> Any:
    return (a if condition else b) if isinstance(condition, bool) else jnp.where(condition, a, b)


def is_near_softmax(slope: Array, exponent: float | None) -> Any:
    """Whether the threshold has the second form: a bool if alpha is static, else booleans of the slope's shape."""
    return slope < _NEAR if exponent is None else 1 / exponent < _NEAR


def _is_supported(scores: Array, params, exponent: float | None) -> Array:
    """Whether entries `[*rows, n]` have a weight, by the same operations as in `entmax_powers`; true for NaN."""
    slope, top, t = (params[name][..., None] for name in ("slope", "top", "threshold"))
    shifted = scores - top
    near = is_near_softmax(slope, exponent)
    u = _select(near, 1 + slope * jnp.maximum(shifted - t, -1e3), slope * shifted - t)
    return ~(u <= 0)


def entmax_powers(tile, params, exponent: float | None) -> tuple[Array, Array, Array]:
    """`u`, its power p (the weight), and `p / u`; 0 outside the support.

    `exponent` is `1 / (alpha - 1)` if alpha is static. The parameters are `slope`, `top` and `threshold`.
    """
    slope, top, t = (params[name][..., None] for name in ("slope", "top", "threshold"))
    shifted = jnp.where(tile.keep, tile.x - top, 0)
    near = is_near_softmax(slope, exponent)
    if exponent is not None and not near:
        u = jnp.where(tile.keep, slope * shifted - t, -1)
        lower = (u > 0).astype(u.dtype) if exponent == 1 else positive_power(u, exponent - 1)
        return positive_power(u, 1), positive_power(u, exponent), lower
    z = jnp.maximum(shifted - t, -1e3)  # below, the weight is 0
    u = _select(near, 1 + slope * z, slope * shifted - t)
    outside = ~tile.keep | (u <= 0)
    u = jnp.where(outside, 1, u)
    # For a slope below 1e-4, y is always small.
    y = slope * z
    small = near & (jnp.abs(y) < 0.1)
    direct = jnp.log(u) / jnp.where(slope < 1e-4, 1, slope)
    log_p = jnp.where(small, jnp.where(small, z, 0) * log1p_ratio(jnp.where(small, y, 0)), direct)
    p = jnp.where(outside, 0, jnp.exp(log_p))
    return jnp.where(outside, 0, u), p, p / u


@functools.cache
def _entmax_functions(exponent: float | None):
    """The two sums and the normalizer; with `exponent=None` it is read from the parameters."""

    def init(like, params):
        return like, like

    def update(state, tile, params):
        u, _, lower = entmax_powers(tile, params, exponent)
        # u^r as u^(r - 1) u: one power instead of two.
        return state[0] + jnp.sum(lower * u, axis=-1), state[1] + jnp.sum(lower, axis=-1)

    def powers(tile, params):
        return entmax_powers(tile, params, exponent)[1]

    return RowReduction(init, update), divided_by_sum(powers)


_MOST_STEPS = 64


def static_exponent(alpha: Any) -> float | None:
    """`1 / (alpha - 1)` for a static alpha above 1, an integer if it is one up to rounding; else None."""
    if not _checks.is_concrete_number(alpha):
        return None
    exponent = 1 / (float(alpha) - 1)
    return float(round(exponent)) if abs(exponent - round(exponent)) < 1e-12 else exponent


def define_entmax(rows, *, alpha: Any = 1.5):
    """The definition of `entmax`; the threshold is in the `params`, in the form that `is_near_softmax` says."""
    if _checks.is_concrete_number(alpha) and float(alpha) == 1:
        return SOFTMAX
    exponent = static_exponent(alpha)
    params = {"slope": rows.per_row("alpha", alpha) - 1}
    fixed = rows.detached()
    seen = fixed.survey()
    top = jnp.max(seen.largest, axis=-1)
    params["top"] = jnp.where(jnp.isinf(top), 0, top)
    root = lax.stop_gradient(_threshold(fixed, lax.stop_gradient(params), seen, exponent))
    within = None
    if seen.blocks is not None:
        within = _is_supported(seen.blocks, {**params, "threshold": root}, exponent)
        rows = rows.narrowed(within)
    params["threshold"] = differentiable(_newton_step(exponent), root, rows, params)
    return _entmax_functions(exponent)[1]._replace(params=params, within=within)


def _newton(rows, params, threshold: Array, exponent: float | None) -> tuple[Array, Array]:
    """The threshold after a Newton step, and the sum of the weights before it, minus 1."""
    params = {**params, "threshold": threshold}
    total, lower = rows.reduce(_entmax_functions(exponent)[0]._replace(args=(params,)))
    slope = params["slope"]
    scale = _select(is_near_softmax(slope, exponent), 1, slope)
    # (S^e - 1) / (e S^(e - 1)), divided by the derivative of S
    of_norm = total * expm1_over(jnp.log(jnp.where(total > 0, total, 1)), -slope)
    convex = slope <= 1 if exponent is None else exponent >= 1
    change = _select(convex, of_norm, total - 1)
    return threshold + safe_divide(change, lower) * scale, total - 1


@functools.cache
def _newton_step(exponent: float | None):
    return lambda rows, params, threshold: _newton(rows, params, threshold, exponent)[0]


@functools.partial(compiled, static_argnums=(3,))
def _threshold(rows, params, seen: Survey, exponent: float | None) -> Array:
    """The threshold of rows, without derivatives."""
    slope, top, n = params["slope"], params["top"], seen.count
    near = is_near_softmax(slope, exponent)
    # After a step this small, the error is of the order of its square. (For alpha > 2 the steps may be shorter.)
    eps = float(jnp.finfo(top.dtype).eps)
    tolerance = jnp.where(slope > 1, 2 * eps, 0.1 * eps**0.5)
    # The root for a single entry, and for n equal ones
    log_n = jnp.log(jnp.maximum(n, 1))
    lo = _select(near, jnp.zeros_like(top), -jnp.ones_like(top))
    hi = _select(near, expm1_over(log_n, -slope), -(safe_divide(jnp.ones_like(n), n) ** slope))

    def above(scores, t):
        return _is_supported(scores, {**params, "threshold": t}, exponent)

    def found(rows, start, finished=None, blocks=None):
        def improve(t, unfinished):
            read = rows if blocks is None else rows.narrowed(above(blocks, t) & unfinished[..., None])
            return _newton(read, params, t, exponent)

        return search(improve, lo, hi, start, tolerance, _MOST_STEPS, finished)[0]

    if seen.blocks is None:
        return found(rows, lo)
    # The threshold of some entries is at most that of the row, and equals it if no other entry is above.
    start = lo
    for some in (seen.blocks, seen.largest):
        start = found(DenseRows(some, None, some.ndim - 1), start)
    return found(rows, start, ~above(seen.others[..., None], start)[..., 0], seen.blocks)


@defined_by(define_entmax)
def entmax(
    scores: Scores,
    *,
    alpha: float | Float[Array, "#*rows"] = 1.5,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """alpha-entmax, `relu((alpha - 1) x_i - tau)^(1 / (alpha - 1))`: between softmax and sparsemax, with exact zeros.

    Args:
      scores: `[*rows, columns]`, floating.
      alpha: a number of 1 or more, or an array of them that broadcasts to `[*rows]`; differentiable, also at 1. 1 is
        softmax, 2 is sparsemax.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Peters et al., "Sparse Sequence-to-Sequence Models"; Correia et al., "Adaptively Sparse Transformers" (the
      gradient for alpha).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.entmax(jnp.array([1.0, 2.0, -1.0, 0.5]), alpha=1.25).round(6))
      [0.199831 0.71204  0.000808 0.08732 ]
    """
    if _checks.is_concrete_number(alpha):
        _checks.number("alpha", alpha, at_least=1)
    return normalize(define_entmax, scores, axis, where, "entmax", alpha=alpha)


def _entmax15(rows):
    return define_entmax(rows, alpha=1.5)


@defined_by(_entmax15)
def entmax15(scores: Scores, *, axis: int = -1, where: Bool[Array, ...] | None = None) -> Scores:
    """1.5-entmax, `relu(x_i / 2 - tau)^2`.

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
      Peters et al., "Sparse Sequence-to-Sequence Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.entmax15(jnp.array([1.0, 2.0, -1.0, 0.5])).round(4))
      [0.1621 0.8146 0.     0.0233]
    """
    return normalize(_entmax15, scores, axis, where, "entmax15")


def _sparsemax(rows):
    return define_entmax(rows, alpha=2.0)


@defined_by(_sparsemax)
def sparsemax(scores: Scores, *, axis: int = -1, where: Bool[Array, ...] | None = None) -> Scores:
    """The projection of the scores onto the probability simplex, `relu(x_i - tau)`.

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
      Martins and Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.sparsemax(jnp.array([1.0, 1.2, 0.5, -0.3])).round(6))
      [0.4 0.6 0.  0. ]
    """
    return normalize(_sparsemax, scores, axis, where, "sparsemax")
