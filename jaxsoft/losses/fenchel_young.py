"""Fenchel-Young losses.

The convex losses whose predictions are `sparsemax` and `entmax`. Their gradient is `entmax(x) - q`, with exact zeros,
and they are exactly 0 where the label leads by a margin. All take class ids or label distributions, a dense array or
`linear_logits`. For other convex functions there is `optax.losses.make_fenchel_young_loss`.

The Fenchel-Young loss of a convex function `Omega` on the simplex is `Omega*(x) + Omega(q) - <q, x>` for the logits x
and a distribution q, with `Omega*(x) = max_p <p, x> - Omega(p)`. Its gradient is `p(x) - q`, where `p(x)` is that
maximizer: softmax for the negative Shannon entropy (the loss is then cross-entropy minus the entropy of q), and
alpha-entmax for the negative Tsallis entropy `Omega(p) = (sum_c p_c^alpha - 1) / (alpha (alpha - 1))`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, expm1_over, safe_divide
from jaxsoft.losses._common import IGNORE_INDEX, LabelledRows, prepare
from jaxsoft.losses._labels import label_score
from jaxsoft.losses.classification import Labels
from jaxsoft.normalizers.inner import define_entmax, entmax_powers, is_near_softmax, static_exponent
from jaxsoft.rows import Logits, RowReduction, reductions


def entmax_loss(
    logits: Logits,
    labels: Labels,
    *,
    alpha: float = 1.5,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Fenchel-Young loss of `entmax`: `Omega*(x) - x_y`, or `Omega*(x) + Omega(q) - <q, x>` for distributions.

    With `p = entmax(x)` the loss is `<p - e_y, x> - (sum_c p_c^alpha - 1) / (alpha (alpha - 1))`, or, for a
    distribution q, `<p - q, x> - (sum_c p_c^alpha - sum_c q_c^alpha) / (alpha (alpha - 1))`. The gradient is `p - q`,
    with exact zeros. For class ids the loss is 0 where `x_y - x_c >= 1 / (alpha - 1)` for all other classes.

    It is computed from `Omega*(x) = t + (sum_c u_c^(alpha / (alpha - 1)) + 1 / (alpha - 1)) / alpha` with
    `u_c = relu((alpha - 1) (x_c - t))`, where the threshold t makes the `u_c^(1 / (alpha - 1))` sum to 1.

    `linear_logits` are never stored: Newton's method finds the threshold in passes over the logits, whose number
    depends on the data. Since `Omega*` is stationary in t, these passes need no gradient, and the gradient costs as
    much as that of cross-entropy. First and second derivatives are correct.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, or distributions of the logits' shape, as in `cross_entropy`.
      alpha: a number of 1 or more. 2 is `sparsemax_loss`, 1 is cross-entropy (minus the entropy of q). It may be
        traced, and is differentiable, also at 1.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Blondel et al., "Learning with Fenchel-Young Losses"; Peters et al., "Sparse Sequence-to-Sequence Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> print(jaxsoft.losses.entmax_loss(logits, jnp.array([0, 3]), alpha=1.5).round(6))
      [0.064231 0.831366]
    """
    _checks.number("alpha", alpha, at_least=1)
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    if _checks.is_concrete_number(alpha) and float(alpha) == 1:
        label = rows.reduce(rows.label_statistics())
        entropy = jnp.where(label.present, -_of_labels(rows, 1.0), 0) if rows.soft else 0
        return rows.finish(label.nll - entropy)

    # Only the three sums of the last pass are differentiated.
    params = lax.stop_gradient(define_entmax(rows.detached(), alpha=alpha).params)
    top, t = params["top"], params["threshold"]
    a = jnp.asarray(alpha, t.dtype).reshape(())
    params["slope"] = jnp.broadcast_to(a - 1, t.shape)
    exponent = static_exponent(alpha)
    conjugate = _conjugate(exponent)._replace(args=(params,))
    wanted = {"conjugate": conjugate, "count": reductions.count()}
    if rows.soft:
        q = rows.labels
        wanted["score"] = reductions.mapped_sum(_weighted_score, top, entry_args=(q,))
        wanted["support"] = reductions.weighted_sum((q > 0).astype(t.dtype))
    else:
        wanted["score"] = label_score(rows.labels)
    out = rows.reduce(wanted)

    powers, mass, curvature = out["conjugate"]
    # The threshold of the logits themselves, relative to the largest one, plus 1 / (alpha - 1), which does not cancel
    near = is_near_softmax(a - 1, exponent)
    value = jnp.where(near, t, (t + 1) / jnp.where(near, 1, a - 1)) + (powers - 1) / a
    # In the threshold, `value` is a parabola near its minimum: corrects for the error of t, from the second derivative.
    value = value - safe_divide((mass - 1) ** 2, 2 * curvature)
    if rows.soft:
        total = jnp.sum(q, axis=-1)
        loss = total * value - out["score"] + _of_labels(rows, a)
        absent = out["support"][1] < jnp.sum(q > 0, axis=-1, dtype=value.dtype)
    else:
        absent = out["score"] == -jnp.inf
        loss = value + (top - jnp.where(absent, 0, out["score"]))
    return rows.finish(jnp.where(out["count"] > 0, jnp.where(absent, jnp.inf, loss), 0))


def entmax15_loss(logits: Logits, labels: Labels, **options) -> Float[Array, "*rows"]:
    """Fenchel-Young loss of `entmax15`, `t + (2 sum_c p_c^1.5 + 4) / 3 - x_y`: `entmax_loss` with alpha = 1.5.

    Here `p_c = relu((x_c - t) / 2)^2`, with t such that the p_c sum to 1.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or distributions of the logits' shape.
      **options: as in `entmax_loss`, except alpha.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 where the label leads by 2.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Peters et al., "Sparse Sequence-to-Sequence Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.entmax15_loss(logits, jnp.array([0])).round(6))
      [0.064231]
    """
    return entmax_loss(logits, labels, alpha=1.5, **options)


def sparsemax_loss(logits: Logits, labels: Labels, **options) -> Float[Array, "*rows"]:
    """Sparsemax loss, `sum_{c: x_c > t} (x_c^2 - t^2) / 2 - x_y + 1 / 2`: `entmax_loss` with alpha = 2.

    Here t is such that `sum_c relu(x_c - t) = 1`. A smooth multi-class Huber loss with the gradient
    `sparsemax(x) - q`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]` or distributions of the logits' shape.
      **options: as in `entmax_loss`, except alpha.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 where the label leads by 1.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Martins and Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[0.5, 0.2, 0.1], [0.5, 0.2, 0.1]])
      >>> print(jaxsoft.losses.sparsemax_loss(logits, jnp.array([0, -100])).round(6))
      [0.143333 0.      ]
    """
    return entmax_loss(logits, labels, alpha=2.0, **options)


@functools.cache
def _conjugate(exponent: float | None) -> RowReduction:
    """`sum u^(r + 1)` and, up to factors, its derivatives in t: `sum u^r` and, as a constant, `sum u^(r - 1)`."""

    def init(like, params):
        return like, like, like

    def update(state, tile, params):
        u, p, lower = entmax_powers(tile, params, exponent)
        sums = (p * u, p, lax.stop_gradient(lower))
        return tuple(s + jnp.sum(part, axis=-1) for s, part in zip(state, sums))

    return RowReduction(init, update)


def _weighted_score(x, cols, top, q):
    return q.astype(x.dtype) * (x - top.astype(x.dtype))


def _of_labels(rows: LabelledRows, alpha: Any) -> Array:
    """`Omega(q)` of the label distributions; near alpha = 1 as `sum_c q_c (q_c^(alpha - 1) - 1)`, which needs no 1."""
    q = rows.labels.astype(accumulation_dtype(rows.labels.dtype))
    safe = jnp.where(q > 0, q, 1)
    slope = jnp.asarray(alpha, q.dtype) - 1
    near = is_near_softmax(slope, None)
    gap = jnp.where(near, 1, slope)
    far = (jnp.sum(jnp.where(q > 0, safe ** (gap + 1), 0), axis=-1) - 1) / gap
    log_q = jnp.log(safe)
    limit = jnp.sum(q * expm1_over(log_q, jnp.where(near, slope, 0)), axis=-1)
    return jnp.where(near, limit, far) / alpha
