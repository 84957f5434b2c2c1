"""Partial FC.

A margin softmax over millions of classes that reads, in each step, the batch's own classes and a random part of the
others. `partial_fc_loss` is the whole loss. A training step that does not touch the other classes at all, neither
their weight nor their momentum, takes its three parts:

```python
import functools

import jax
import jax.numpy as jnp
import optax

from jaxsoft import heads

weight = jax.random.normal(jax.random.key(0), (5000, 16)) / 4  # [classes, d]
optimizer = optax.sgd(0.1, momentum=0.9)
state = optimizer.init(weight)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(weight, state, features, labels, key):
    sample = heads.sample_classes(key, labels, classes=5000, size=500)

    def loss(features, sampled):
        return heads.sampled_margin_loss(features, sampled, sample, transpose_weight=True, scale=16.0).mean()

    value, (of_features, of_sampled) = jax.value_and_grad(loss, (0, 1))(features, weight[sample.ids])
    weight, state = heads.sampled_update(optimizer, of_sampled, state, weight, sample.ids, transpose_weight=True)
    return value, weight, state, of_features


features, labels = jax.random.normal(jax.random.key(1), (64, 16)), jnp.arange(64)
for key in jax.random.split(jax.random.key(2), 3):
    value, weight, state, of_features = step(weight, state, features, labels, key)
```

Prediction uses all classes: `jaxsoft.top_k(losses.cosine_logits(features, weight, transpose_weight=True), k)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsoft import _checks
from jaxsoft.heads._classes import axes_of, check_labels, check_matrix, first_class, shard_count, summed
from jaxsoft.losses import additive_margin_loss, l2_normalize
from jaxsoft.losses.inner import IGNORE_INDEX
from jaxsoft.rows import linear_logits


class ClassSample(NamedTuple):
    """Sampled classes.

    Attributes:
      ids: `[size]` distinct and sorted, int32; inside `shard_map`, of this device's classes, counted from its first.
      labels: `[*rows]`, the labels as places among the sampled classes of all devices; `ignore_index` is kept.
    """

    ids: Array
    labels: Array


def sample_classes(
    key: PRNGKeyArray,
    labels: Int[Array, "*rows"],
    *,
    classes: int,
    size: int,
    ignore_index: int | None = IGNORE_INDEX,
    axis_name: str | tuple[str, ...] | None = None,
) -> ClassSample:
    """Samples classes for a batch: all of its labels, and uniform others without replacement.

    Args:
      key: random key, another one for each step; the same on all devices.
      labels: class ids `[*rows]`; inside `shard_map`, those of all rows, the same on all devices of `axis_name`. A
        label out of range stays out of range, so that its loss is NaN.
      classes: the number of classes (static), those of one device inside `shard_map`.
      size: how many classes to sample (static), on each device: at most `classes`, and no fewer than the labels, or
        than the classes, since each label may be another class.
      ignore_index: class id of rows to leave out, which need no class.
      axis_name: inside `jax.shard_map`, the mesh axes over which the classes are sharded.

    Returns:
      A `ClassSample`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: a size out of range.

    Reference:
      An et al., "Partial FC: Training 10 Million Identities on a Single Machine"; "Killing Two Birds with One Stone:
      Efficient and Robust Training of Face Recognition CNNs by Partial FC".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> sample = heads.sample_classes(jax.random.key(0), jnp.array([7, 2]), classes=9, size=4)
      >>> print(sample.ids[sample.labels], sample.ids.shape)
      [7 2] (4,)
    """
    axes = axes_of(axis_name)
    classes = _checks.integer("classes", classes, at_least=1)
    size = _checks.integer("size", size, at_least=1)
    total = classes * shard_count(axes)
    labels, keep = check_labels(labels, getattr(labels, "shape", ()), total, ignore_index, "the batch")
    if size > classes:
        raise ValueError(f"size must be at most the number of classes, which is {classes}, got {size}")
    if size < min(labels.size, classes):
        raise ValueError(
            f"size must be at least the number of labels, {labels.size}, or of classes, {classes}: each label may be "
            f"another class, got {size}"
        )
    if axes:
        key = jax.random.fold_in(key, lax.axis_index(axes))
    own = labels - first_class(classes, axes)
    here = (own >= 0) & (own < classes)
    positive = here if keep is None else here & keep
    priority = jax.random.bits(key, (classes,), jnp.uint32) >> 1
    priority = priority.at[jnp.where(positive, own, classes).reshape(-1)].set(1 << 31, mode="drop")
    ids = jnp.sort(lax.top_k(priority, size)[1].astype(jnp.int32))
    place = jnp.searchsorted(ids, own).astype(labels.dtype)
    place = summed(jnp.where(here, place + first_class(size, axes), 0), axes)
    place = jnp.where((labels >= 0) & (labels < total), place, size * shard_count(axes))
    if keep is not None and ignore_index is not None:
        place = jnp.where(keep, place, ignore_index)
    return ClassSample(ids, place)


def sampled_margin_loss(
    features: Float[Array, "*rows d"],
    weight: Float[Array, "d size"],
    sample: ClassSample,
    *,
    loss: Callable[..., Array] = additive_margin_loss,
    transpose_weight: bool = False,
    ignore_index: int | None = IGNORE_INDEX,
    axis_name: str | tuple[str, ...] | None = None,
    **options: Any,
) -> Float[Array, "*rows"]:
    """A margin loss of cosines over sampled classes, given their weights; without a correction for the sampling.

    Args:
      features: `[*rows, d]`, of any length; inside `shard_map`, those of all rows.
      weight: the weights of the classes `sample.ids`, `[d, size]`, or `[size, d]` with `transpose_weight=True`.
      sample: from `sample_classes`.
      loss: `(cosines, labels, *, ignore_index, **options) -> values`: one of the margin losses of `jaxsoft.losses`, as
        `additive_margin_loss` (CosFace) or `additive_angular_margin_loss` (ArcFace).
      transpose_weight: whether `weight` is laid out `[size, d]`.
      ignore_index: class id of rows to leave out.
      axis_name: as in `sample_classes`. The loss is over the sampled classes of all devices.
      **options: of the loss: scale, margin.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      An et al., "Partial FC: Training 10 Million Identities on a Single Machine".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> features, weight = jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 0.8], [1.0, 0.0]])
      >>> sample = heads.ClassSample(jnp.array([3, 8]), jnp.array([1]))
      >>> loss = heads.sampled_margin_loss(features, weight, sample, transpose_weight=True, scale=2.0, margin=0.1)
      >>> print(loss.round(4))
      [0.4375]
    """
    _checks.flag("transpose_weight", transpose_weight)
    check_matrix("weight", weight, "[size, d]" if transpose_weight else "[d, size]")
    _checks.floating("features", features)
    count = weight.shape[0 if transpose_weight else 1]
    if sample.ids.shape != (count,):
        raise ValueError(
            f"weight must have the classes of the sample, {sample.ids.shape[0]}, got shape {weight.shape}: "
            "pass the weight at sample.ids"
        )
    cosines = linear_logits(
        l2_normalize(features),
        l2_normalize(weight, axis=-1 if transpose_weight else 0),
        transpose_weight=transpose_weight,
        axis_name=axis_name,
    )
    return loss(cosines, sample.labels, ignore_index=ignore_index, **options)


def partial_fc_loss(
    features: Float[Array, "*rows d"],
    weight: Float[Array, "d classes"],
    labels: Int[Array, "*rows"],
    key: PRNGKeyArray,
    *,
    size: int,
    loss: Callable[..., Array] = additive_margin_loss,
    transpose_weight: bool = False,
    ignore_index: int | None = IGNORE_INDEX,
    axis_name: str | tuple[str, ...] | None = None,
    **options: Any,
) -> Float[Array, "*rows"]:
    """Partial FC: a margin loss over the batch's classes and a random sample of the others.

    The gradient of `weight` is 0 for classes that were not sampled, but it is an array of all classes: to update the
    sampled ones alone, see `sampled_update`. With `size` equal to the number of classes it is the loss itself.

    Args:
      features: `[*rows, d]`, of any length; inside `shard_map`, those of all rows.
      weight: `[d, classes]`, or `[classes, d]` with `transpose_weight=True`, whose rows are read faster.
      labels: class ids `[*rows]`; one out of range gives NaN.
      key: random key, another one for each step.
      size: how many classes to sample, static, see `sample_classes`. The papers take a tenth of all.
      loss: the margin loss, see `sampled_margin_loss`.
      transpose_weight: whether `weight` is laid out `[classes, d]`.
      ignore_index: class id of rows to leave out.
      axis_name: inside `jax.shard_map`, the mesh axes over which the classes are sharded: each device samples `size` of
        its own classes; features, labels and key are the same on all of them.
      **options: of the loss: scale, margin.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      An et al., "Partial FC: Training 10 Million Identities on a Single Machine"; "Killing Two Birds with One Stone:
      Efficient and Robust Training of Face Recognition CNNs by Partial FC".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> features, weight = jnp.ones((1, 1)), jnp.array([[1.0, -1.0, 1.0]])
      >>> options = dict(size=3, scale=1.0, margin=0.0)
      >>> loss = heads.partial_fc_loss(features, weight, jnp.array([2]), jax.random.key(0), **options)
      >>> print(loss.round(4))
      [0.7586]
    """
    _checks.flag("transpose_weight", transpose_weight)
    check_matrix("weight", weight, "[classes, d]" if transpose_weight else "[d, classes]")
    axis = 0 if transpose_weight else 1
    sample = sample_classes(
        key, labels, classes=weight.shape[axis], size=size, ignore_index=ignore_index, axis_name=axis_name
    )
    return sampled_margin_loss(
        features,
        _taken(weight, sample.ids, axis),
        sample,
        loss=loss,
        transpose_weight=transpose_weight,
        ignore_index=ignore_index,
        axis_name=axis_name,
        **options,
    )


def sampled_update(
    optimizer: optax.GradientTransformation,
    gradient: Float[Array, "d size"],
    state: optax.OptState,
    weight: Float[Array, "d classes"],
    ids: Int[Array, " size"],
    *,
    transpose_weight: bool = False,
) -> tuple[Array, optax.OptState]:
    """Updates the sampled classes of a weight and their optimizer state; all others keep theirs.

    Args:
      optimizer: any optax transformation whose state of a class depends on the gradient of that class alone: SGD with
        momentum, Adam. (Clipping by the norm sees the norm of the sampled classes.)
      gradient: of the sampled classes, `[d, size]`, or `[size, d]` with `transpose_weight=True`.
      state: `optimizer.init(weight)`, or of the last step. Its arrays of the weight's shape are updated at `ids`; what
        else it holds, such as the number of steps, belongs to all classes.
      weight: `[d, classes]`, or `[classes, d]` with `transpose_weight=True`.
      ids: distinct class ids, `[size]`.
      transpose_weight: the layout of weight and gradient.

    Returns:
      The new weight and state; donate the old ones to `jit`, so that they are updated in place.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial
      FC".

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxsoft import heads
      >>> optimizer, weight = optax.sgd(0.5, momentum=0.9), jnp.ones((1, 3))
      >>> state = optimizer.init(weight)
      >>> weight, state = heads.sampled_update(optimizer, jnp.ones((1, 2)), state, weight, jnp.array([0, 2]))
      >>> print(weight, state[0].trace)
      [[0.5 1.  0.5]] [[1. 0. 1.]]
    """
    _checks.flag("transpose_weight", transpose_weight)
    check_matrix("weight", weight, "[classes, d]" if transpose_weight else "[d, classes]")
    _checks.integers("ids", ids)
    axis = 0 if transpose_weight else 1
    expected = (*ids.shape, weight.shape[1]) if transpose_weight else (weight.shape[0], *ids.shape)
    _checks.floating("gradient", gradient)
    _checks.shape("gradient", gradient, expected, "the sampled classes")

    def of_classes(leaf: Any) -> bool:
        return getattr(leaf, "shape", None) == weight.shape

    def put(whole: Any, part: Any) -> Any:
        if not of_classes(whole):
            return part
        index = (ids,) if axis == 0 else (slice(None), ids)
        return jnp.asarray(whole).at[index].set(part.astype(whole.dtype), unique_indices=True)

    sampled = _taken(weight, ids, axis)
    part = jax.tree.map(lambda leaf: _taken(leaf, ids, axis) if of_classes(leaf) else leaf, state)
    updates, part = optimizer.update(gradient, part, sampled)
    return put(weight, optax.apply_updates(sampled, updates)), jax.tree.map(put, state, part)


def _taken(weight: Array, ids: Array, axis: int) -> Array:
    return jnp.take(weight, ids, axis=axis, unique_indices=True, mode="clip")
