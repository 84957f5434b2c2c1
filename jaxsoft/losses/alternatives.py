"""Alternatives to softmax cross-entropy.

A squared error on the logits, and cross-entropies of normalizers other than softmax. All take a dense array or
`linear_logits`.

The *spherical family* (`squared_error_loss`, `spherical_softmax_cross_entropy`, `taylor_softmax_cross_entropy` of
order 2, and `spherical_z_loss`) depends on a row only through the label's logit, `sum x` and `sum x^2`. Where there
are more rows than features, `linear_logits` computes these sums without computing any logits.

In the formulas `x` are the logits of a row, `y` its label, and `C` the number of classes that are not masked. Of these
losses only `sparse_softmax_cross_entropy` is invariant to a shift of the logits, and only it contains an exponential.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import finite_gauge
from jaxsoft.losses._common import IGNORE_INDEX, LabelledRows, prepare, score_or_zero
from jaxsoft.losses._labels import finish, label_score
from jaxsoft.losses._spherical import log_ratio, spherical_softmax_of, squared_error_of, taylor_softmax_of
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

    A member of the spherical family. Error bound: a few units in the last place, relative to `sum_c x_c^2`.

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
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    score, moments = rows.reduce((label_score(rows.labels), reductions.moments()))
    return finish(rows, squared_error_of(score, moments), score, moments.count)


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

    *Reconstructed*. A member of the spherical family. The signs of the logits are lost: predict the class of the
    largest square.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      eps: added to each square, 0 or more; tune it (1e-6 to 1e-2). With 0, a label whose logit is 0 costs +inf.
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
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    score, moments = rows.reduce((label_score(rows.labels), reductions.moments()))
    return finish(rows, spherical_softmax_of(score, moments, eps=eps), score, moments.count)


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
    """Cross-entropy of Taylor softmax, `-log(t(x_y) / sum_c t(x_c))` with `t(x) = sum_{i <= order} x^i / i!`.

    The normalizer is `taylor_softmax`. *Reconstructed*. With order 2, `t(x) = 1 + x + x^2 / 2`, the loss belongs to
    the spherical family; higher orders need the logits themselves.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`. `t` of the largest logit must not overflow:
        in float32 with order 8, logits up to 1e5 are safe.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      order: order of the polynomial, an even static integer of 2 or more (an odd one is negative somewhere).
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
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    if order > 2:
        return _normalized(rows, taylor_exponential(order))
    score, moments = rows.reduce((label_score(rows.labels), reductions.moments()))
    return finish(rows, taylor_softmax_of(score, moments), score, moments.count)


def stablemax_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy of `stablemax`, `-log(s(x_y) / sum_c s(x_c))` with `s` linear above 0, hyperbolic below.

    `s(x) = x + 1` from 0 on, `1 / (1 - x)` below. With large logits rounding absorbs no term of the sum, so the
    gradient does not vanish once the training set is fitted, where float32 softmax stops learning. The authors compute
    it in float64.

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
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
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

    The label need not be among the k largest: its logit is subtracted all the same, and the loss is then at least
    `log(k)`. Other classes outside the k largest get no gradient: meant for fine-tuning, not for training from scratch.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      k: how many logits count, a static integer of 1 or more; a row with fewer classes uses all of them, which is
        plain cross-entropy. The default is ours.
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
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    score, best, count = rows.reduce((label_score(rows.labels), reductions.top_k(k), reductions.count()))
    top = finite_gauge(best.values[..., 0])
    mass = jnp.sum(jnp.exp(best.values - top[..., None]), axis=-1)
    loss = (top - score_or_zero(score)) + jnp.log(jnp.where(mass == 0, 1, mass))
    return finish(rows, loss, score, count)


@functools.cache
def _term(f: Callable[[Array], Array]) -> Callable:
    """An elementwise function in the form that `mapped_sum` calls."""
    return lambda x, cols: f(x)


def _normalized(rows: LabelledRows, f: Callable[[Array], Array]) -> Array:
    """`-log(f(x_y) / sum_c f(x_c))`, in one pass over the logits."""
    score, total, count = rows.reduce(
        (label_score(rows.labels), reductions.mapped_sum(_term(f)), reductions.count())
    )
    return finish(rows, log_ratio(total, f(score_or_zero(score)), count), score, count)
