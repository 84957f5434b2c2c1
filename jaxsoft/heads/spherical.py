"""The spherical head.

The losses of the spherical family read a row of logits `x = W h` only through the label's logit, the mean and the
variance of the row. Mean and variance over the classes are `m . h` and `h' K h`, where m is the mean of the rows of W,
and K their covariance. So neither the loss nor its gradients need a logit: a step costs `O(n d^2)` for n rows and d
features, whatever the number of classes.

There are two ways to have m and K:

* *recomputed*: `spherical_loss(hidden, spherical_head(weight), labels)` computes them from the weight, a product of
  `classes d^2` operations, and JAX differentiates it. The gradient of the weight is dense, for any optimizer.
* *maintained*: the weight is kept as `rows @ mixing + offset`. A step of gradient descent changes all rows of the
  weight by one matrix and one vector, and the rows of the batch's labels by themselves. So it touches only `mixing`,
  `offset` and these rows, updates m and K exactly, and does not depend on the number of classes. Only plain gradient
  descent has this form. Rounding adds up slowly; `spherical_refresh` recomputes everything.

```python
import jax
import jax.numpy as jnp

from jaxsoft import heads

head = heads.spherical_head(jax.random.normal(jax.random.key(0), (1000, 16)), transpose_weight=True)
hidden, labels = jax.random.normal(jax.random.key(1), (32, 16)), jnp.arange(32)


def loss(statistics, hidden):
    return heads.spherical_loss(hidden, statistics, labels).mean()


@jax.jit
def step(head, hidden):
    statistics = heads.spherical_statistics(head, labels)
    value, (of_head, of_hidden) = jax.value_and_grad(loss, (0, 1))(statistics, hidden)
    return value, heads.spherical_update(head, labels, of_head, learning_rate=10.0), of_hidden


for _ in range(20):
    value, head, of_hidden = step(head, hidden)  # of_hidden goes on to the network
head = heads.spherical_refresh(head)  # every thousand steps or so
best = heads.spherical_top_k(hidden, head, 5)
```
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.heads._classes import (
    axes_of,
    check_hidden,
    check_labels,
    check_matrix,
    finish,
    first_class,
    shard_count,
    summed,
    take_classes,
)
from jaxsoft.losses.inner import IGNORE_INDEX, SPHERICAL, check_weights
from jaxsoft.rows import TopK, linear_logits, top_k
from jaxsoft.rows.reductions import Moments

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class SphericalHead(NamedTuple):
    """A head's weight `rows @ mixing + offset`, with the moments of its rows.

    Attributes:
      rows: `[classes, d]`; inside `shard_map`, those of this device's classes.
      mixing: `[d, d]`.
      offset: `[d]`.
      mean: `[d]`, the mean over the rows of the weight.
      covariance: `[d, d]`, their population covariance.
    """

    rows: Array
    mixing: Array
    offset: Array
    mean: Array
    covariance: Array

    @property
    def weight(self) -> Array:
        """The weight, `[classes, d]`: a product of `classes d^2` operations."""
        product = _einsum("cd,de->ce", self.rows.astype(self.mixing.dtype), self.mixing)
        return (product + self.offset).astype(self.rows.dtype)


class SphericalStatistics(NamedTuple):
    """What the loss of a batch reads of a head. Its gradient is that of the head, without an axis of the classes.

    Attributes:
      label_weight: `[*rows, d]`, the weight of each row's label.
      mean: `[d]`, the mean over all rows of the weight.
      covariance: `[d, d]`, their population covariance.
      count: the number of classes, which gets no gradient.
    """

    label_weight: Array
    mean: Array
    covariance: Array
    count: Array


def spherical_head(
    weight: Float[Array, "d classes"],
    *,
    transpose_weight: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> SphericalHead:
    """The head of a weight, with the mean and the covariance of its rows; differentiable.

    Args:
      weight: `[d, classes]`, or `[classes, d]` with `transpose_weight=True`, at least one class. For biases, append
        them to the weight as one more feature, and 1 to the hidden states.
      transpose_weight: whether `weight` is laid out `[classes, d]`, the layout that the maintained form updates in
        place.
      axis_name: inside `jax.shard_map`, the mesh axes over which the classes are sharded, equally many on each device.

    Returns:
      A `SphericalHead`, whose `rows` are the weight; its moments are float32 or wider.

    Raises:
      TypeError: a weight that is not a floating array.
      ValueError: a weight of a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> head = heads.spherical_head(jnp.array([[1.0, 3.0], [0.0, 4.0]]))
      >>> print(head.mean, head.covariance.tolist())
      [2. 2.] [[1.0, 2.0], [2.0, 4.0]]
    """
    _checks.flag("transpose_weight", transpose_weight)
    check_matrix("weight", weight, "[classes, d]" if transpose_weight else "[d, classes]")
    axes = axes_of(axis_name)
    rows = jnp.asarray(weight if transpose_weight else weight.T)
    if 0 in rows.shape:
        raise ValueError(f"weight must have at least one class and one feature, got shape {weight.shape}")
    wide = rows.astype(accumulation_dtype(rows.dtype))
    count = rows.shape[0] * shard_count(axes)
    mean = summed(jnp.sum(wide, axis=0), axes) / count
    centred = wide - mean
    covariance = summed(_einsum("cd,ce->de", centred, centred), axes) / count
    return SphericalHead(
        rows, jnp.eye(rows.shape[1], dtype=wide.dtype), jnp.zeros_like(mean), mean, covariance
    )


def spherical_statistics(
    head: SphericalHead,
    labels: Int[Array, "*rows"],
    *,
    ignore_index: int | None = IGNORE_INDEX,
    axis_name: str | tuple[str, ...] | None = None,
) -> SphericalStatistics:
    """What the loss of a batch reads of a head: the argument to differentiate in the maintained form.

    Args:
      head: from `spherical_head`, `spherical_update` or `spherical_refresh`.
      labels: class ids `[*rows]`. A label out of range has a weight of NaN.
      ignore_index: class id of rows to leave out.
      axis_name: as in `spherical_head`. The labels are then the same on all of these devices, and count all classes.

    Returns:
      A `SphericalStatistics`.

    Raises:
      TypeError: labels that are not integers.
      ValueError: an unknown mesh axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> head = heads.spherical_head(jnp.array([[1.0, 3.0], [0.0, 4.0]]))
      >>> print(heads.spherical_statistics(head, jnp.array([1])).label_weight)
      [[3. 4.]]
    """
    axes = axes_of(axis_name)
    count = head.rows.shape[0] * shard_count(axes)
    labels, _ = check_labels(labels, getattr(labels, "shape", ()), count, ignore_index)
    own = take_classes(head.rows, labels, axes).astype(head.mixing.dtype)
    own = _einsum("...d,de->...e", own, head.mixing) + head.offset
    return SphericalStatistics(own, head.mean, head.covariance, jnp.asarray(count, head.mean.dtype))


def spherical_loss(
    hidden: Float[Array, "*rows d"],
    head: SphericalHead | SphericalStatistics,
    labels: Int[Array, "*rows"],
    *,
    loss: str | Callable[..., Array] = "z_loss",
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    axis_name: str | tuple[str, ...] | None = None,
    **options: Any,
) -> Float[Array, "*rows"]:
    """A loss of the spherical family over all classes, without logits.

    Equals the loss of that name over `linear_logits(hidden, weight)`: `spherical_z_loss`, `squared_error_loss`,
    `spherical_softmax_cross_entropy`, `taylor_softmax_cross_entropy` (order 2). The last two are *reconstructed*.

    Args:
      hidden: activations `[*rows, d]`.
      head: a head, or the statistics of one for these labels. The gradient of a head is dense; that of statistics is
        what `spherical_update` takes.
      labels: class ids `[*rows]`. One out of range gives NaN, in value and gradient.
      loss: `"z_loss"`, `"squared_error"`, `"spherical_softmax"` or `"taylor_softmax"`; or a function
        `(score, moments, **options) -> values` of the label's logits `[*rows]` and `reductions.Moments`.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of rows to leave out: their loss and gradients are 0.
      axis_name: as in `spherical_head`.
      **options: of the loss: `a`, `b` and `eps` of the Z-loss, `eps` of spherical softmax.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      de Brebisson and Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
      Spherical Family"; Vincent et al., "Efficient Exact Gradient Update for Training Deep Networks with Very Large
      Sparse Targets".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> weight, labels = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([0])
      >>> print(heads.spherical_loss(jnp.ones((1, 1)), heads.spherical_head(weight), labels).round(6))
      [0.202546]
    """
    if not isinstance(head, SphericalHead | SphericalStatistics):
        raise TypeError(
            f"head must be a SphericalHead or SphericalStatistics, got {_checks.describe(head)}: "
            "write spherical_head(weight)"
        )
    check_hidden(hidden, head.mean.shape[0])
    rows = hidden.shape[:-1]
    if callable(loss):
        formula = loss
    else:
        _checks.option("loss", loss, tuple(SPHERICAL))
        formula = SPHERICAL[loss]
    check_weights(weights, rows)
    if isinstance(head, SphericalHead):
        classes = head.rows.shape[0] * shard_count(axes_of(axis_name))
        _, keep = check_labels(labels, rows, classes, ignore_index)
        head = spherical_statistics(head, labels, ignore_index=ignore_index, axis_name=axis_name)
    else:
        _, keep = check_labels(labels, rows, jnp.iinfo(jnp.int32).max, ignore_index)
        _checks.shape("head.label_weight", head.label_weight, hidden.shape, "the weight of each row's label")
    h = hidden.astype(accumulation_dtype(hidden.dtype, head.mean.dtype))
    if keep is not None:
        h = jnp.where(keep[..., None], h, 0)
    mean = _einsum("...d,d->...", h, head.mean)
    variance = jnp.sum(_einsum("...d,de->...e", h, head.covariance) * h, axis=-1)
    moments = Moments(
        count=jnp.broadcast_to(lax.stop_gradient(head.count), rows),
        center=lax.stop_gradient(mean),
        offset=mean - lax.stop_gradient(mean),
        variance=jnp.maximum(variance, 0),
    )
    values = formula(jnp.sum(h * head.label_weight, axis=-1), moments, **options)
    return finish(values, keep, weights)


def spherical_update(
    head: SphericalHead,
    labels: Int[Array, "*rows"],
    gradient: SphericalStatistics,
    learning_rate: float | Float[Array, ""],
    *,
    ignore_index: int | None = IGNORE_INDEX,
    axis_name: str | tuple[str, ...] | None = None,
) -> SphericalHead:
    """One step of gradient descent on the weight, `W - learning_rate dW`, in a time independent of the classes.

    Reads and writes the rows of the labels, and matrices `[d, d]`. Donate the head to `jit` (`donate_argnums`), or
    carry it through a `scan`, so that `rows` is updated in place. The moments follow exactly, up to rounding, and
    `mixing` shrinks where the weight does: call `spherical_refresh` now and then. In float32, with a refresh every 1000
    steps, the moments of 10000 steps stay within 1e-5 of recomputed ones.

    Args:
      head: the head.
      labels: those of the statistics, `[*rows]`. One out of range makes the head NaN.
      gradient: the gradient of a loss with respect to `spherical_statistics(head, labels)`.
      learning_rate: a number.
      ignore_index: class id of rows to leave out.
      axis_name: as in `spherical_head`; labels and gradient are then the same on all of these devices.

    Returns:
      The head after the step.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Vincent et al., "Efficient Exact Gradient Update for Training Deep Networks with Very Large Sparse Targets";
      de Brebisson and Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
      Spherical Family". The update of centred moments, without the inverse of `mixing`, is ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> head, labels = heads.spherical_head(jnp.array([[2.0, 1.0, 0.0]])), jnp.array([0])
      >>> def loss(statistics):
      ...     return heads.spherical_loss(jnp.ones((1, 1)), statistics, labels, loss="squared_error").sum()
      >>> gradient = jax.grad(loss)(heads.spherical_statistics(head, labels))
      >>> print(heads.spherical_update(head, labels, gradient, 0.25).weight.round(4).T)
      [[1.5 0.5 0. ]]
    """
    _checks.number("learning_rate", learning_rate)
    axes = axes_of(axis_name)
    classes = head.rows.shape[0]
    count = classes * shard_count(axes)
    labels, keep = check_labels(labels, gradient.label_weight.shape[:-1], count, ignore_index, "the gradient")
    dtype, d = head.mixing.dtype, head.mixing.shape[0]
    # The gradient of the weight is (W - 1 m') A + 1 dm' / count + sum_i e_label(i) s_i'; all times the learning rate:
    of_all = learning_rate / count * (gradient.covariance + gradient.covariance.T)
    of_labels = (learning_rate * gradient.label_weight).reshape(-1, d).astype(dtype)
    if keep is not None:
        of_labels = jnp.where(keep.reshape(-1, 1), of_labels, 0)
    shift = learning_rate / count * gradient.mean - _einsum("de,d->e", of_all, head.mean)
    labels = labels.reshape(-1)

    mixing = head.mixing - _einsum("de,ef->df", head.mixing, of_all)
    offset = head.offset - _einsum("de,d->e", of_all, head.offset) - shift
    changes = jnp.linalg.solve(mixing.T, of_labels.T).T
    own = labels - first_class(classes, axes)
    own = jnp.where((own >= 0) & (own < classes), own, classes)  # rows of other shards are dropped
    rows = jnp.asarray(head.rows).at[own].add(-changes.astype(head.rows.dtype), mode="drop")

    # The new centred weight is (W - 1 m') (I - A) - S + 1 t' / count, where S has the rows s_i, and t is their sum.
    weight = take_classes(head.rows, labels, axes).astype(dtype)
    weight = _einsum("nd,de->ne", weight, head.mixing) + head.offset
    total = jnp.sum(of_labels, axis=0)
    _, place = jnp.unique(labels, size=labels.size, return_inverse=True, fill_value=-1)
    by_class = jax.ops.segment_sum(of_labels, place.reshape(-1), num_segments=labels.size)
    cross = _einsum("nd,ne->de", weight - head.mean, of_labels)
    half = (
        _einsum("de,ef->df", of_all, head.covariance) + (cross - _einsum("de,ef->df", of_all, cross)) / count
    )
    squares = _einsum("de,ef,fg->dg", of_all, head.covariance, of_all)
    squares += _einsum("nd,ne->de", by_class, by_class) / count - jnp.outer(total / count, total / count)
    mean = head.mean - (learning_rate * gradient.mean + total) / count
    return SphericalHead(rows, mixing, offset, mean, head.covariance + (squares - half - half.T))


def spherical_refresh(
    head: SphericalHead, *, axis_name: str | tuple[str, ...] | None = None
) -> SphericalHead:
    """The same head with `rows` equal to its weight and with recomputed moments: `2 classes d^2` multiplications.

    Args:
      head: the head, after steps of `spherical_update`.
      axis_name: as in `spherical_head`.

    Returns:
      A head with the same weight, up to rounding.

    Raises:
      ValueError: an unknown mesh axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> head = heads.spherical_head(jnp.eye(2))._replace(offset=jnp.ones(2))
      >>> print(heads.spherical_refresh(head).mean)
      [1.5 1.5]
    """
    return spherical_head(head.weight, transpose_weight=True, axis_name=axis_name)


def spherical_top_k(
    hidden: Float[Array, "*rows d"],
    head: SphericalHead,
    k: int,
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> TopK:
    """The k largest logits of each row and their classes, streamed over the classes; `k=1` is the prediction.

    For spherical softmax, which reads squares, take the largest logits in magnitude of
    `linear_logits(hidden, head.weight, transpose_weight=True)` instead.

    Args:
      hidden: activations `[*rows, d]`.
      head: the head.
      k: how many, a static integer from 1 to the number of classes.
      axis_name: as in `spherical_head`.

    Returns:
      `TopK(values, indices)`, each `[*rows, k]`, largest first.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> head = heads.spherical_head(jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]))
      >>> print(heads.spherical_top_k(jnp.ones((1, 1)), head, 2).indices)
      [[0 1]]
    """
    check_hidden(hidden, head.mean.shape[0])
    h = hidden.astype(accumulation_dtype(hidden.dtype, head.mean.dtype))
    mixed = _einsum("...e,de->...d", h, head.mixing)
    logits = linear_logits(mixed, head.rows, transpose_weight=True, axis_name=axis_name)
    best = top_k(logits, k)
    return TopK(best.values + _einsum("...d,d->...", h, head.offset)[..., None], best.indices)
