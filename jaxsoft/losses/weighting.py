"""Weights, constraints, weak labels.

Which examples and classes count, and how much: from the losses of the examples, from constraints on each loss, from the
proportions of labels in bags, from the certainty of pseudo-labels.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide, weigh
from jaxsoft.losses._common import check_floats, prepare
from jaxsoft.losses.classification import cross_entropy
from jaxsoft.rows import Logits
from jaxsoft.rows.inner import check_axis, rows_of

# How strongly each strategy prefers the scaled loss h in [-delta, delta].
_STRATEGIES = {
    "linupper": lambda h, delta: jnp.minimum(h + delta, delta),
    "mid": lambda h, delta: 1 - (h / delta) ** 2,
    "upper": lambda h, delta: (h + delta) / 2,
    "extremes": lambda h, delta: jnp.abs(h),
}


def loss_based_weights(
    losses: Float[Array, "*batch"],
    *,
    strategy: str = "linupper",
    delta: float = 1.0,
    temperature: float = 1.0,
    where: Bool[Array, ...] | None = None,
    axis_name: Any = None,
) -> Float[Array, "*batch"]:
    """Weights of the examples of a batch from their losses, `softmax(f(h) / temperature)` over the batch.

    h are the losses, scaled linearly so that the smallest of the batch is -delta and the largest delta. The strategies
    are

    * `"linupper"`: `f = min(h + delta, delta)`: low losses count little, all losses above the middle equally;
    * `"mid"`: `1 - h^2 / delta^2`; `"upper"`: `(h + delta) / 2`; `"extremes"`: `|h|`.

    The weights are constants to the gradient: `jnp.sum(weights * losses)` is the loss to minimize. The paper begins
    with a phase of uniform weights, and averages each sequence's loss over its tokens first.

    Args:
      losses: of any shape, one per example; the batch is the whole array.
      strategy: which of the four.
      delta: half the range of h, positive.
      temperature: positive; a large one makes the weights uniform (the strength of the paper's KL regularizer).
      where: booleans that broadcast to the losses, True = counts.
      axis_name: the mesh axes, inside `shard_map` or `pmap`, whose devices hold the other parts of the batch.

    Returns:
      Weights of the losses' shape, float32 or wider, which sum to 1 over the batch; 0 where masked, uniform if all
      losses are equal.

    Raises:
      TypeError: losses that are not a floating array, or another argument of a wrong type.
      ValueError: an unknown strategy, a number out of range, or a mask that does not fit.

    Reference:
      Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.loss_based_weights(jnp.array([0.5, 1.0, 3.0])).round(6))
      [0.191935 0.286333 0.521732]
    """
    _checks.option("strategy", strategy, tuple(_STRATEGIES))
    _checks.number("delta", delta, above=0)
    _checks.number("temperature", temperature, above=0)
    x, keep = _values("losses", lax.stop_gradient(losses), where)
    low = jnp.min(jnp.where(keep, x, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(keep, x, -jnp.inf), initial=-jnp.inf)
    if axis_name is not None:
        low, high = lax.pmin(low, axis_name), lax.pmax(high, axis_name)
    some = high >= low
    low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
    h = delta * ((x - low) - (high - x)) / jnp.maximum(high - low, 1e-6)
    score = _STRATEGIES[strategy](h, delta) / temperature
    top = jnp.max(jnp.where(keep, score, -jnp.inf), initial=-jnp.inf)
    top = top if axis_name is None else lax.pmax(top, axis_name)
    e = jnp.where(keep, jnp.exp(score - jnp.where(some, top, 0)), 0)
    total = jnp.sum(e)
    return safe_divide(e, total if axis_name is None else lax.psum(total, axis_name))


def _values(name: str, values: Any, where: Any) -> tuple[Array, Array]:
    """An array in float32 or wider, 0 where masked, and the mask."""
    _checks.floating(name, values)
    x = jnp.asarray(values, accumulation_dtype(values.dtype))
    if where is None:
        return x, jnp.ones(x.shape, bool)
    _checks.boolean("where", where)
    _checks.broadcastable("where", where, x.shape, f"the shape of {name}")
    keep = jnp.broadcast_to(where, x.shape)
    return jnp.where(keep, x, 0), keep


def feasible_learning_loss(
    losses: Float[Array, "*batch"],
    multipliers: Float[Array, "*batch"],
    *,
    epsilon: float | Float[Array, "*batch"],
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*batch"]:
    """Feasible learning: the terms `lambda_i (l_i - epsilon)` of the Lagrangian of the constraints `l_i <= epsilon`.

    No loss is averaged: every example should be fitted well enough, and no example better than that. The multipliers
    are constants to the gradient; after each step on the sum of the terms, `feasible_dual_update` updates them. They
    are kept for the whole training set; a batch reads and updates those of its examples.

    Args:
      losses: of any shape, one per example.
      multipliers: of the same shape, 0 or more, initially 0.
      epsilon: the bound of the losses, a number or of the losses' shape.
      where: booleans that broadcast to the losses, True = counts.

    Returns:
      The terms, of the losses' shape, float32 or wider; 0 where masked. A multiplier of 0 hides a loss that is not
      finite.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Ramirez et al., "Feasible Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> losses, multipliers = jnp.array([0.3, 0.9, 1.5]), jnp.array([0.0, 0.5, 2.0])
      >>> print(jaxsoft.losses.feasible_learning_loss(losses, multipliers, epsilon=0.8).round(6))
      [-0.    0.05  1.4 ]
    """
    excess, multipliers, keep = _constraints(losses, multipliers, epsilon, where)
    return weigh(jnp.where(keep, excess, 0), lax.stop_gradient(jnp.where(keep, multipliers, 0)))


def feasible_dual_update(
    multipliers: Float[Array, "*batch"],
    losses: Float[Array, "*batch"],
    *,
    epsilon: float | Float[Array, "*batch"],
    learning_rate: float,
    resilience: float | None = None,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*batch"]:
    """One step of dual ascent for `feasible_learning_loss`, `max(lambda + learning_rate (l - epsilon), 0)`.

    Resilient feasible learning relaxes each bound by a slack u at the cost `resilience / 2 |u|^2`. The best slack is
    `lambda / resilience`, and the step that of `l - epsilon - lambda / resilience`: a weight decay of the multipliers,
    which then cannot grow forever on examples that no model fits.

    Args:
      multipliers: of any shape, 0 or more.
      losses: of the same shape; constants to the gradient.
      epsilon: the bound of the losses, a number or of the losses' shape.
      learning_rate: the step of the ascent, 0 or more.
      resilience: the alpha of the slack's cost, positive; None for hard constraints.
      where: booleans that broadcast to the losses; False leaves a multiplier as it is.

    Returns:
      The new multipliers, of the same shape and dtype.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Ramirez et al., "Feasible Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> losses, multipliers = jnp.array([0.3, 0.9, 1.5]), jnp.array([0.0, 0.5, 2.0])
      >>> print(jaxsoft.losses.feasible_dual_update(multipliers, losses, epsilon=0.8, learning_rate=0.1))
      [0.   0.51 2.07]
    """
    _checks.number("learning_rate", learning_rate, at_least=0)
    if resilience is not None:
        _checks.number("resilience", resilience, above=0)
    excess, old, keep = _constraints(lax.stop_gradient(losses), multipliers, epsilon, where)
    if resilience is not None:
        excess = excess - old / resilience
    new = jnp.maximum(old + learning_rate * excess, 0)
    return jnp.where(keep, new.astype(multipliers.dtype), multipliers)


def _constraints(losses, multipliers, epsilon, where) -> tuple[Array, Array, Array]:
    """`l - epsilon` (0 where masked), the multipliers, and the mask."""
    x, keep = _values("losses", losses, where)
    check_floats("multipliers", multipliers, x.shape, "the shape of losses")
    if getattr(epsilon, "ndim", 0) == 0:
        _checks.number("epsilon", epsilon)
    else:
        check_floats("epsilon", epsilon, x.shape, "a number, or the shape of losses")
        epsilon = jnp.where(keep, epsilon, 0)
    return x - jnp.where(keep, epsilon, 0).astype(x.dtype), jnp.asarray(multipliers, x.dtype), keep


def easy_llp_weights(
    proportions: float | Float[Array, ...], *, priors: float | Float[Array, ...], bag_size: float | Array
) -> Float[Array, ...]:
    """EasyLLP: the weight of a class for each example of a bag, `k (alpha - p) + p`.

    alpha is the class's proportion in the bag, p its prior, k the bag size. Over bags of independent examples, the
    losses with these weights have the same mean as the supervised loss. For two classes with losses l1 and l0 the
    weighted loss is `w * l1 + (1 - w) * l0`. Weights may be negative. *Reconstructed* from the standard unbiased
    estimator.

    Args:
      proportions: alpha, of any shape: the proportions in each example's bag.
      priors: p, the proportions in the population, which broadcast with `proportions`.
      bag_size: k, a positive number, or an array that broadcasts with the proportions; for `proportions`
        `[*rows, columns]` and bags of different sizes, `[*rows, 1]`.

    Returns:
      Weights, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: a bag size that is not positive, or shapes that do not fit.

    Reference:
      Busa-Fekete et al., "Easy Learning from Label Proportions".

    Example:
      >>> import jaxsoft
      >>> w = jaxsoft.losses.easy_llp_weights(0.75, priors=0.4, bag_size=4)
      >>> print(w.round(6), (w * 0.3 + (1 - w) * 1.2).round(6))
      1.8 -0.42
    """
    for name, value in (("proportions", proportions), ("priors", priors)):
        if hasattr(value, "dtype"):
            _checks.floating(name, value)
        else:
            _checks.number(name, value)
    if getattr(bag_size, "ndim", 0) == 0:
        _checks.number("bag_size", bag_size, above=0)
    arrays = [jnp.asarray(value) for value in (proportions, priors, bag_size)]
    try:
        jnp.broadcast_shapes(*(a.shape for a in arrays))
    except ValueError as error:
        raise ValueError(
            "proportions, priors and bag_size must broadcast together, got shapes "
            + ", ".join(str(a.shape) for a in arrays)
        ) from error
    dtype = accumulation_dtype(*(a.dtype for a in arrays[:2]))
    alpha, p, k = (a.astype(dtype) for a in arrays)
    return k * (alpha - p) + p


def easy_llp_loss(
    logits: Logits,
    proportions: Float[Array, "*rows columns"],
    *,
    priors: Float[Array, " columns"],
    bag_size: float | Float[Array, "*rows"],
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """EasyLLP of a softmax: cross-entropy with the `easy_llp_weights` as labels, `-sum_c w_c log p_c`.

    The weights are `w_c = k (alpha_c - prior_c) + prior_c`, with the proportions alpha in a bag of k. An unbiased
    estimate of the supervised cross-entropy if only the proportions of the classes in bags of examples are known. A
    value may be negative, and a single value is noisy: the variance grows with the bag size.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      proportions: of the logits' shape: the classes' proportions in the example's bag.
      priors: `[columns]`, the classes' frequencies in the population.
      bag_size: positive, a number or `[*rows]`. With bags of one, this is `cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. The weight of an absent class is dropped; the
        loss is +inf if the weights dropped from a row sum to more than 0.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Busa-Fekete et al., "Easy Learning from Label Proportions".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, priors = jnp.array([[2.0, 1.0, 0.1]]), jnp.array([0.5, 0.3, 0.2])
      >>> proportions = jnp.array([[0.75, 0.25, 0.0]])
      >>> print(jaxsoft.losses.easy_llp_loss(logits, proportions, priors=priors, bag_size=4).round(6))
      [-0.62297]
    """
    axis = check_axis(logits, axis)
    check_floats("proportions", proportions, logits.shape, "the shape of the logits")
    check_floats("priors", priors, (logits.shape[axis],), "one number per class")
    if getattr(bag_size, "ndim", 0) > 0:
        _checks.shape("bag_size", bag_size, rows_of(logits.shape, axis), "a number, or one per example")
        bag_size = jnp.expand_dims(bag_size, -1)
    q = easy_llp_weights(jnp.moveaxis(proportions, axis, -1), priors=priors, bag_size=bag_size)
    rows = prepare(logits, jnp.moveaxis(q, -1, axis), axis=axis, where=where, weights=weights)
    return rows.finish(rows.reduce(rows.label_statistics()).nll)


def shrink_class_space_loss(
    strong_logits: Logits,
    weak_probabilities: Float[Array, "*rows columns"],
    *,
    threshold: float = 0.95,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """ShrinkMatch: `q_j l` over j and the classes left beside it, j the most likely class of a weak view's q.

    Pseudo-labels for uncertain examples, made certain by removing confusing classes. The weak view's classes are ranked
    by probability, and those of rank 1, 2, ... are removed until class j, of rank 0, has at least the share `threshold`
    of the remaining probability; at least one rival stays. The loss is the cross-entropy `l` of the strong view with
    the label j among the remaining classes, times the probability `q_j` of j among all classes. It is 0 if the weak
    view is certain without removals (such examples get a plain cross-entropy with pseudo-labels beside this loss), and
    if no removal suffices. The paper multiplies the mean of the loss by a moving average of the share of certain
    examples, and takes the strong logits from an auxiliary head.

    Args:
      strong_logits: `[*rows, columns]`, a floating array or `linear_logits`.
      weak_probabilities: of the logits' shape; constants to the gradient.
      threshold: in (0, 1].
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Yang et al., "Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> strong, weak = jnp.array([[2.0, 1.0, 0.5, 0.1, -1.0]]), jnp.array([[0.5, 0.3, 0.12, 0.05, 0.03]])
      >>> print(jaxsoft.losses.shrink_class_space_loss(strong, weak, threshold=0.9).round(6))
      [0.024294]
    """
    _checks.number("threshold", threshold, above=0, at_most=1)
    axis = check_axis(strong_logits, axis)
    check_floats("weak_probabilities", weak_probabilities, strong_logits.shape, "the shape of the logits")
    p, present = _values("weak_probabilities", lax.stop_gradient(weak_probabilities), where)
    p, present = jnp.moveaxis(p, axis, -1), jnp.moveaxis(present, axis, -1)
    if not p.shape[-1]:
        return jnp.zeros(p.shape[:-1], p.dtype)

    order = jnp.argsort(jnp.where(present, -p, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    first = ranked[..., :1]
    rest = jnp.flip(jnp.cumsum(jnp.flip(ranked, -1), axis=-1), -1)  # from each rank on
    cut = jnp.arange(p.shape[-1])
    enough = first >= threshold * (first + rest)
    enough = enough & (cut >= 2) & (cut < jnp.sum(present, axis=-1, keepdims=True))
    shrunk = jnp.any(enough, axis=-1) & (first[..., 0] < threshold)
    kept = (rank == 0) | (rank >= jnp.argmax(enough, axis=-1, keepdims=True))
    loss = cross_entropy(
        strong_logits,
        jnp.where(shrunk, order[..., 0], -100).astype(jnp.int32),
        axis=axis,
        where=jnp.moveaxis(kept & present, -1, axis),
        weights=weights,
    )
    return first[..., 0] * loss
