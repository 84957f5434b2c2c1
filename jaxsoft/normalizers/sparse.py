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
from jaxsoft._numerics import safe_divide
from jaxsoft.normalizers._exponential import SOFTMAX
from jaxsoft.normalizers._normalizer import defined_by, normalize
from jaxsoft.normalizers.rectified import divided_by_sum, positive_power
from jaxsoft.rows import RowReduction, reductions
from jaxsoft.rows.inner import check_axis, check_dense

Scores = Float[Array, "*rows columns"]


def _selected(tile, params):
    bound, last = params["bound"][..., None], params["last"][..., None]
    chosen = (tile.x > bound) | ((tile.x == bound) & (tile.cols <= last))
    return tile.with_scores(jnp.where(tile.keep & chosen, tile.scores, -jnp.inf))


def _sparse_softmax(rows, *, k=10):
    best = rows.detached().reduce(reductions.top_k(k))
    # The bound of a row with fewer than k entries is -inf: all its entries are selected.
    return SOFTMAX.preceded_by(_selected, bound=best.values[..., -1], last=best.indices[..., -1])


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


# Threshold sums. With u = relu((alpha - 1) (x - top) - tau) and r = 1 / (alpha - 1), these are the two sums of powers
# that Newton's method needs to solve sum u^r = 1. It starts at tau = -1, where the largest entry alone gives 1, and
# rises to the root without overshooting, since the sum is convex and decreasing in tau (alpha <= 2).


def excess(tile, params) -> Array:
    """`(alpha - 1) (x - top) - tau`, below 0 for absent entries."""
    shifted = params["slope"][..., None] * (tile.x - params["top"][..., None])
    return jnp.where(tile.keep, shifted - params["tau"][..., None], -1)


@functools.cache
def _entmax_functions(exponent: float | None):
    """The two sums and the normalizer; with `exponent=None` it is read from the parameters."""

    def power(params):
        return params["exponent"][..., None] if exponent is None else exponent

    def init(like, params):
        return like, like

    def update(state, tile, params):
        u, r = excess(tile, params), power(params)
        lower = (u > 0).astype(u.dtype) if exponent == 1 else positive_power(u, r - 1)
        # u^r as u^(r - 1) u: one power instead of two.
        return state[0] + jnp.sum(lower * jnp.maximum(u, 0), axis=-1), state[1] + jnp.sum(lower, axis=-1)

    def powers(tile, params):
        return positive_power(excess(tile, params), power(params))

    return RowReduction(init, update), divided_by_sum(powers)


_MOST_STEPS = 64


def define_entmax(rows, *, alpha: Any = 1.5):
    """The definition of `entmax`; the threshold `tau` is in the `params`."""
    if _checks.is_concrete_number(alpha) and abs(float(alpha) - 1) < 1e-3:
        return SOFTMAX
    slope = rows.per_row("alpha", alpha) - 1
    exponent = 1 / (float(alpha) - 1) if _checks.is_concrete_number(alpha) else None
    if exponent is not None and abs(exponent - round(exponent)) < 1e-12:
        exponent = float(round(exponent))
    sums, normalizer = _entmax_functions(exponent)
    fixed = rows.detached()
    top, n = fixed.reduce((reductions.maximum(), reductions.count()))
    top = jnp.where(jnp.isfinite(top), top, 0)

    def newton(source, tau, slope):
        params = {"slope": slope, "top": top, "tau": tau, "exponent": 1 / slope}
        total, lower = source.reduce(sums._replace(args=(params,)))
        return tau + safe_divide((total - 1) * slope, lower), total

    still = lax.stop_gradient(slope)
    # After a step this small, the error is of the order of its square; two more steps follow.
    eps = float(jnp.finfo(rows.dtype).eps)
    tolerance = jnp.where(still > 1, 2 * eps, 0.1 * eps**0.5)

    # Where a Newton step would leave the interval that holds the root (alpha > 2), the interval is halved.
    def search(carry):
        step, lo, hi, tau, _ = carry
        proposal, total = newton(fixed, tau, still)
        lo, hi = jnp.where(total >= 1, tau, lo), jnp.where(total >= 1, hi, tau)
        new = jnp.where((proposal >= lo) & (proposal <= hi), proposal, (lo + hi) / 2)
        return step + 1, lo, hi, new, jnp.max(jnp.abs(new - tau) / tolerance, initial=0)

    def unfinished(carry):
        return (carry[0] < _MOST_STEPS) & (carry[-1] > 1)

    lo = -jnp.ones_like(top)
    hi = -(safe_divide(jnp.ones_like(n), n) ** still)
    far = jnp.max(jnp.full_like(top, jnp.inf), initial=0)  # varies over the rows' mesh axes
    _, _, _, tau, _ = lax.while_loop(unfinished, search, (jnp.int32(0), lo, hi, lo, far))
    # Two differentiated steps give tau its derivatives, to third order.
    tau = lax.stop_gradient(tau)
    for _ in range(2):
        tau, _ = newton(rows, tau, slope)
    params = {"slope": slope, "top": top, "tau": tau, "exponent": 1 / slope}
    return normalizer._replace(params=params)


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
      alpha: a number of 1 or more, or an array that broadcasts to `[*rows]`, of numbers above 1 (by at least 1e-3 in
        float32); differentiable. 1 is softmax, 2 is sparsemax.
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
