"""Alternatives to softmax cross-entropy: a squared error, and cross-entropies of other normalizers.

In the formulas `x` are the logits of a row, `y` its label, and `C` the number of classes that are not masked. But for
`sparse_softmax_cross_entropy` none of these losses is invariant to a shift of the logits, and but for
`stablemax_cross_entropy` none contains an exponential: those of the *spherical family* read a row through
`sum x` and `sum x^2` alone, which `linear_logits` gives without any logits where there are more rows than features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import finite_gauge
from jaxsoft.losses._common import IGNORE_INDEX, Rows, prepare
from jaxsoft.losses._labels import finish, label_score
from jaxsoft.normalizers.inner import stable_exponential, taylor_exponential
from jaxsoft.rows import Logits, reductions


def squared_error_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Squared error between the logits and the one-hot label, `sum_c x_c^2 - 2 x_y + 1`.

    Of the spherical family. Error bound: a few units in the last place, relative to `sum_c x_c^2`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Vincent et al., "Efficient Exact Gradient Update for Training Deep Networks with Very Large Sparse Targets";
      de Brebisson and Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
      Spherical Family".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.squared_error_loss(logits, jnp.array([0])).round(6))
      [3.26]
    """
    rows = _prepare(logits, labels, axis, where, weights, ignore_index)
    score, moments = rows.reduce((label_score(rows.labels), reductions.moments()))
    loss = moments.sum_of_squares - 2 * _or_zero(score) + 1
    return finish(rows, loss, score, moments.count)


def spherical_softmax_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    eps: float = 1e-3,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy of spherical softmax: `-log((x_y^2 + eps) / (sum_c x_c^2 + C eps))`.

    *Reconstructed*. Of the spherical family. The signs of the logits are lost: predict by the largest square.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      eps: added to each square, 0 or more; to be tuned (1e-6 to 1e-2). With 0, a label whose logit is 0 costs +inf.
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
      de Brebisson and Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.spherical_softmax_cross_entropy(logits, jnp.array([0])).round(4))
      [0.4484]
    """
    _checks.number("eps", eps, at_least=0)
    rows = _prepare(logits, labels, axis, where, weights, ignore_index)
    score, moments = rows.reduce((label_score(rows.labels), reductions.moments()))
    own = _or_zero(score) ** 2 + eps
    return _cross_entropy(rows, score, moments.count, own, moments.sum_of_squares + moments.count * eps)


def taylor_softmax_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    order: int = 2,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy of `taylor_softmax`, `-log(t(x_y) / sum_c t(x_c))` with `t(x) = sum_{i <= order} x^i / i!`.

    *Reconstructed*. With order 2, `t(x) = 1 + x + x^2 / 2`, it is of the spherical family; with a higher order the
    logits are read.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`. `t` of the largest must not overflow: in
        float32 and with order 8, logits up to 1e5.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      order: of the polynomial, an even static integer of 2 or more (an odd one is negative somewhere).
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
      de Brebisson and Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.taylor_softmax_cross_entropy(logits, jnp.array([0])).round(6))
      [0.763606]
    """
    order = _checks.integer("order", order, at_least=2)
    if order % 2:
        raise ValueError(f"order must be even (an odd polynomial is negative somewhere), got {order}")
    rows = _prepare(logits, labels, axis, where, weights, ignore_index)
    t = taylor_exponential(order)
    if order > 2:
        return _normalized(rows, t)
    score, moments = rows.reduce((label_score(rows.labels), reductions.moments()))
    # t(x) = ((x + 1)^2 + 1) / 2: a sum without cancellation.
    total = moments.count / 2 * (moments.variance + (moments.mean + 1) ** 2 + 1)
    return _cross_entropy(rows, score, moments.count, t(_or_zero(score)), total)


def stablemax_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy of `stablemax`, `-log(s(x_y) / sum_c s(x_c))` with `s(x) = x + 1` from 0 on, `1 / (1 - x)` below.

    Of large logits nothing is absorbed by rounding, so that the gradient does not vanish when the training set is
    fitted (where softmax in float32 stops). The authors compute it in float64.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Prieto et al., "Grokking at the Edge of Numerical Stability".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[1.0, 2.0, -1.0, 0.5]])
      >>> print(jaxsoft.losses.stablemax_cross_entropy(logits, jnp.array([0])).round(6))
      [1.252763]
    """
    rows = _prepare(logits, labels, axis, where, weights, ignore_index)
    return _normalized(rows, stable_exponential)


def sparse_softmax_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    k: int = 10,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy of `sparse_softmax`: `logsumexp of the k largest x_c, minus x_y`.

    The label need not be among the k largest: its logit is subtracted all the same, and the loss stays at least
    `log(k)` there. Classes outside get no gradient: meant for fine-tuning, not for training from scratch.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      k: how many logits count, a static integer of 1 or more; rows with fewer classes take all of them, which is
        cross-entropy. The default is ours.
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
      Sun et al., "Sparse-softmax: A Simpler and Faster Alternative Softmax Transformation".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[1.0, 2.0, -1.0, 0.5], [1.0, 2.0, -1.0, 0.5]])
      >>> print(jaxsoft.losses.sparse_softmax_cross_entropy(logits, jnp.array([0, 2]), k=2).round(6))
      [1.313262 3.313262]
    """
    k = _checks.integer("k", k, at_least=1)
    rows = _prepare(logits, labels, axis, where, weights, ignore_index)
    score, best, count = rows.reduce((label_score(rows.labels), reductions.top_k(k), reductions.count()))
    top = finite_gauge(best.values[..., 0])
    mass = jnp.sum(jnp.exp(best.values - top[..., None]), axis=-1)
    loss = (top - _or_zero(score)) + jnp.log(jnp.where(mass == 0, 1, mass))
    return finish(rows, loss, score, count)


def _prepare(logits, labels, axis, where, weights, ignore_index) -> Rows:
    return prepare(
        logits, labels, axis=axis, where=where, weights=weights, ignore_index=ignore_index, soft=False
    )


def _or_zero(score: Array) -> Array:
    """The label's score, 0 where the label is absent."""
    return jnp.where(score == -jnp.inf, 0, score)


@functools.cache
def _term(f: Callable[[Array], Array]) -> Callable:
    """An elementwise function as `mapped_sum` calls it."""
    return lambda x, cols: f(x)


def _normalized(rows: Rows, f: Callable[[Array], Array]) -> Array:
    """`-log(f(x_y) / sum_c f(x_c))`, one pass over the logits."""
    score, total, count = rows.reduce(
        (label_score(rows.labels), reductions.mapped_sum(_term(f)), reductions.count())
    )
    return _cross_entropy(rows, score, count, f(_or_zero(score)), total)


def _cross_entropy(rows: Rows, score: Array, count: Array, own: Array, total: Array) -> Array:
    """`log(total / own)` for the label's share `own` of `total`; +inf where it has none."""
    none = own == 0
    ratio = jnp.where(none | (count == 0), 1, total) / jnp.where(none, 1, own)
    return finish(rows, jnp.where(none, jnp.inf, jnp.log(ratio)), score, count)
