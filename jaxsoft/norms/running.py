"""PowerNorm and unified norm.

Batch norms without centring for transformers, whose gradient is an approximation that uses running statistics of the
backward pass. A pure function cannot store what its backward pass computes. So these statistics are an argument,
`backward`, and their *gradient is their new value*:

```python
import jax, jax.numpy as jnp
from jaxsoft.norms import power_norm, power_norm_init

def loss(params, backward, state, x):
    y, state = power_norm(x, state, backward, params["scale"], params["bias"], train=True)
    return jnp.sum(jnp.sin(y)), state

params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
state, backward = power_norm_init(4)
for x in jax.random.normal(jax.random.key(0), (3, 16, 4)):
    (grads, backward), state = jax.grad(loss, (0, 1), has_aux=True)(params, backward, state, x)
```

Give each call its own `backward`, and take its gradient once per step: two uses of one would add up, and so would
examples under `vmap`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import scale_gradient
from jaxsoft.norms._common import (
    AxisName,
    affine,
    check_where,
    features_of,
    over_batch,
    positive,
    present,
    wide,
)

Scalar = float | jax.Array


def _scale(rule: Callable, x: Array, factor: Array, backward: Any, context: Any) -> Array:
    """`x * factor`, with the gradient of `rule(cotangent, output, backward, context)`.

    The rule returns the gradient of x and the new value of `backward`, which stands for its gradient.
    """
    del rule, backward, context
    return x * factor


_scaled = jax.custom_vjp(_scale, nondiff_argnums=(0,))


def _scaled_forward(rule, x, factor, backward, context):
    del rule
    out = x * factor
    return out, (out, backward, context)


def _scaled_backward(rule, kept, cotangent):
    gradient, backward = rule(cotangent, *kept)
    return gradient, None, backward, None


_scaled.defvjp(_scaled_forward, _scaled_backward)


# --- PowerNorm ----------------------------------------------------------------------------------------------


class PowerNormState(NamedTuple):
    """The running statistics of a PowerNorm.

    Attributes:
      count: number of batches.
      mean_square: running mean of the squares, one number per feature.
    """

    count: Int[Array, ""]
    mean_square: Float[Array, " features"]


def power_norm_init(
    features: int, *, dtype: Any = jnp.float32
) -> tuple[PowerNormState, Float[Array, " features"]]:
    """The state of a PowerNorm, and its running statistic of the backward pass.

    Args:
      features: number of features.
      dtype: floating dtype of the statistics.

    Returns:
      The state (mean squares of 1) and `backward` (zeros).

    Raises:
      TypeError: `features` that are not a static integer, a dtype that is not floating.
      ValueError: `features` below 1.

    Reference:
      Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers".

    Example:
      >>> from jaxsoft.norms import power_norm_init
      >>> state, backward = power_norm_init(2)
      >>> print(state.mean_square, backward)
      [1. 1.] [0. 0.]
    """
    features = _checks.integer("features", features, at_least=1)
    dtype = _checks.floating_dtype("dtype", dtype)
    return PowerNormState(jnp.zeros((), jnp.int32), jnp.ones(features, dtype)), jnp.zeros(features, dtype)


def power_norm(
    x: Float[Array, "*batch features"],
    state: PowerNormState,
    backward: Float[Array, " features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    train: bool,
    where: Bool[Array, "*batch"] | None = None,
    groups: int | None = 1,
    warmup: int | Array = 10000,
    decay: Scalar = 0.9,
    backward_decay: Scalar = 0.9,
    eps: Scalar = 1e-5,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "*batch features"], PowerNormState]:
    """PowerNorm: `scale x / sqrt(v + eps) + bias`, with v the mean square of each feature over the batch.

    Before, each row is divided by the root mean square of each of its `groups` of features. After the first `warmup`
    batches, and with `train=False`, v is the running mean square. The gradient is not that of the formula: with z the
    normalized x, h its cotangent and m the running statistic `backward`,

        a = h - (1 - backward_decay) m z,    dx = a / sqrt(v + eps)  (v of this batch),    m <- m + mean(a z)

    and the new m is the gradient to `backward`. The running statistics have no gradient. The derivative is first-order
    and reverse mode only.

    Args:
      x: features last; the statistics are over all other axes.
      state: the running statistics.
      backward: the running statistic m of the backward pass. Its gradient is its new value.
      scale: one number per feature. None: 1.
      bias: one number per feature. None: 0.
      train: whether to use and update batch statistics.
      where: positions that count in the forward statistics, `x.shape[:-1]` (not padding). None: all.
      groups: number of groups of consecutive features, which divides them. None: x is not divided.
      warmup: number of batches that are normalized by their own statistics.
      decay: weight of the old running mean square.
      backward_decay: 1 minus the weight of m.
      eps: added to the mean squares, positive.
      axis_name: mesh axes of a `shard_map` (or the axis of a `vmap`) over which the batch is spread.

    Returns:
      An array like x, and the new state; the state itself with `train=False`.

    Raises:
      TypeError: arrays or options of a wrong type.
      ValueError: shapes that do not fit, `groups` that do not divide the features, numbers out of range.

    Reference:
      Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", and the authors' code, which updates m
      in its backward pass; to return it as a gradient is our choice.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import power_norm, power_norm_init
      >>> y, state = power_norm(jnp.array([[3.0, 3.0], [3.0, -3.0]]), *power_norm_init(2), train=True)
      >>> print(y.round(), state.count)
      [[ 1.  1.]
       [ 1. -1.]] 1
    """
    features = _check(x, state, scale, bias, train, where, eps)
    _checks.floating("backward", backward)
    _checks.shape("backward", backward, (features,), "the last axis of x")
    for name, value in (("decay", decay), ("backward_decay", backward_decay)):
        _checks.number(name, value, at_least=0, at_most=1)
    _checks.number("warmup", warmup, at_least=0)
    y = wide(x)
    if groups is not None:
        groups = _checks.integer("groups", groups, at_least=1)
        if features % groups:
            raise ValueError(f"groups must divide the features of x, {features}, got {groups}")
        grouped = y.reshape(*y.shape[:-1], groups, features // groups)
        root = lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + eps)
        y = (grouped * root).reshape(y.shape)
    if not train:
        out = y * lax.rsqrt(state.mean_square.astype(y.dtype) + eps)
        return affine(out, scale, bias).astype(x.dtype), state
    count, running = state.count + 1, state.mean_square.astype(y.dtype)
    batch = over_batch(jnp.square(present(lax.stop_gradient(y), where)), where, axis_name)
    used = jnp.where(count <= warmup, batch, running)
    step = count.astype(y.dtype)
    running = jnp.where(count < warmup, (running * (step - 1) + batch) / step, running)
    running = decay * running + (1 - decay) * batch
    rule = functools.partial(_power_rule, axis_name)
    context = lax.rsqrt(batch + eps), jnp.asarray(backward_decay, y.dtype)
    out = _scaled(rule, y, lax.rsqrt(used + eps), backward.astype(y.dtype), context)
    new_state = PowerNormState(count, running.astype(state.mean_square.dtype))
    return affine(out, scale, bias).astype(x.dtype), lax.stop_gradient(new_state)


def _power_rule(axis_name, h, z, mean, context):
    root, decay = context
    approximate = h - (1 - decay) * mean * z
    return approximate * root, mean + over_batch(approximate * z, None, axis_name)


# --- unified norm -------------------------------------------------------------------------------------------


class UnifiedNormState(NamedTuple):
    """The running statistics of a unified norm.

    Attributes:
      count: number of batches.
      skips: number of batches that were outliers.
      mean_square: running mean of the squares, one number per feature.
      window: mean squares of the last batches, `[batches, features]`.
    """

    count: Int[Array, ""]
    skips: Int[Array, ""]
    mean_square: Float[Array, " features"]
    window: Float[Array, "batches features"]


class UnifiedNormBackward(NamedTuple):
    """The running statistics of a unified norm's backward pass. Their gradient is their new value.

    Attributes:
      mean: running mean of the product of gradient and output, one number per feature.
      window: these products of the last batches, `[batches, features]`.
    """

    mean: Float[Array, " features"]
    window: Float[Array, "batches features"]


def unified_norm_init(
    features: int, *, window: int = 4, backward_window: int = 4, dtype: Any = jnp.float32
) -> tuple[UnifiedNormState, UnifiedNormBackward]:
    """The state of a unified norm, and its running statistics of the backward pass.

    Args:
      features: number of features.
      window: number of batches whose mean squares are averaged. 1: no average.
      backward_window: the same in the backward pass.
      dtype: floating dtype of the statistics.

    Returns:
      The state and `backward`.

    Raises:
      TypeError: sizes that are not static integers, a dtype that is not floating.
      ValueError: sizes below 1.

    Reference:
      "Unified Normalization for Accelerating and Stabilizing Transformers".

    Example:
      >>> from jaxsoft.norms import unified_norm_init
      >>> state, backward = unified_norm_init(2)
      >>> print(state.mean_square, backward.window.shape)
      [1. 1.] (4, 2)
    """
    features = _checks.integer("features", features, at_least=1)
    window = _checks.integer("window", window, at_least=1)
    backward_window = _checks.integer("backward_window", backward_window, at_least=1)
    dtype = _checks.floating_dtype("dtype", dtype)
    zero = jnp.zeros((), jnp.int32)
    state = UnifiedNormState(zero, zero, jnp.ones(features, dtype), jnp.zeros((window, features), dtype))
    return state, UnifiedNormBackward(
        jnp.zeros(features, dtype), jnp.zeros((backward_window, features), dtype)
    )


def unified_norm(
    x: Float[Array, "*batch features"],
    state: UnifiedNormState,
    backward: UnifiedNormBackward,
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    train: bool,
    where: Bool[Array, "*batch"] | None = None,
    warmup: int | Array = 4000,
    decay: Scalar = 0.9,
    filter_outliers: bool = False,
    eps: Scalar = 1e-5,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "*batch features"], UnifiedNormState]:
    """Unified norm: `scale x / sqrt(v + eps) + bias`, with v the geometric mean of the last batches' mean squares.

    Before `warmup`, in a batch that is an outlier, and with a window of one batch, v is the mean square of this batch.
    With `train=False` it is the running mean square, and the norm can be folded into the next layer
    (`fold_into_linear`). The gradient is not that of the formula: with z the normalized x, g the cotangent of the
    output, r the ratio of this v's root to that of the running mean square (in [1/5, 5]; 1 in the first
    max(1000, warmup) batches), and m a running mean of mean(h z) over batches (`backward`),

        h = scale r g,    dx = (h - m z) / sqrt(v + eps),    dscale = sum(r g z),    dbias = sum(g)

    A batch is an outlier if in some feature the arithmetic mean of the window exceeds the geometric mean by more than
    the window's length times the variance of the roots in the window before. It is kept out of the windows. The
    derivative is first-order and reverse mode only.

    Args:
      x: features last; the statistics are over all other axes.
      state: the running statistics.
      backward: the running statistics of the backward pass. Their gradient is their new value.
      scale: one number per feature. None: 1.
      bias: one number per feature. None: 0.
      train: whether to use and update batch statistics.
      where: positions that count in the forward statistics, `x.shape[:-1]` (not padding). None: all.
      warmup: number of batches that are normalized by their own statistics.
      decay: weight of the old running statistics.
      filter_outliers: whether to look for outliers; the authors advise it for vision.
      eps: added to the mean squares, positive.
      axis_name: mesh axes of a `shard_map` (or the axis of a `vmap`) over which the batch is spread.

    Returns:
      An array like x, and the new state; the state itself with `train=False`.

    Raises:
      TypeError: arrays or options of a wrong type.
      ValueError: shapes that do not fit, numbers out of range.

    Reference:
      "Unified Normalization for Accelerating and Stabilizing Transformers", and the authors' code, which updates its
      buffers in its backward pass; to return them as a gradient is our choice.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import unified_norm, unified_norm_init
      >>> y, state = unified_norm(jnp.array([[3.0, 3.0], [3.0, -3.0]]), *unified_norm_init(2), train=True)
      >>> print(y.round(), state.count)
      [[ 1.  1.]
       [ 1. -1.]] 1
    """
    features = _check(x, state, scale, bias, train, where, eps)
    for name, window in (("state.window", state.window), ("backward.window", backward.window)):
        _checks.shape(name, window, (window.shape[0], features), "batches, features")
    _checks.number("decay", decay, at_least=0, at_most=1)
    _checks.number("warmup", warmup, at_least=0)
    _checks.flag("filter_outliers", filter_outliers)
    y, stored = wide(x), state.mean_square.dtype
    running, before = state.mean_square.astype(y.dtype), state.window.astype(y.dtype)
    if not train:
        return affine(y * lax.rsqrt(running + eps), scale, bias).astype(x.dtype), state
    size = len(before)
    count = state.count + 1
    batch = over_batch(jnp.square(present(lax.stop_gradient(y), where)), where, axis_name)
    window = before.at[count % size].set(batch)
    skip, outlier = jnp.asarray(size == 1), jnp.asarray(False)
    if filter_outliers and before.size > 1:
        spread = jnp.var(jnp.sqrt(before), ddof=1)
        gap = jnp.mean(window, axis=0) - _geometric_mean(window)
        outlier = (count >= warmup) & jnp.any(gap > spread * size)
        window = jnp.where(outlier, before.at[count % size].set(running), window)
        skip = skip | outlier
    alone = (count <= size) | (count < warmup) | skip
    used = jnp.where(alone, batch, _geometric_mean(window))
    ratio = jnp.clip(jnp.sqrt(used + eps) * lax.rsqrt(running + eps), 1 / 5, 5)
    ratio = jnp.where((count <= jnp.maximum(1000, warmup)) | skip, 1, ratio)
    running = decay * running + (1 - decay) * used
    root = lax.rsqrt(used + eps)
    rule = functools.partial(_unified_rule, axis_name)
    context = root, count, skip, jnp.asarray(warmup), jnp.asarray(decay, y.dtype)
    out = _scaled(rule, y, root, jax.tree.map(lambda b: b.astype(y.dtype), backward), context)
    out = affine(scale_gradient(affine(out, scale, None), ratio), None, bias)
    new = UnifiedNormState(
        count, state.skips + outlier.astype(state.skips.dtype), running.astype(stored), window.astype(stored)
    )
    return out.astype(x.dtype), lax.stop_gradient(new)


def _geometric_mean(window: Array) -> Array:
    return jnp.exp(jnp.mean(jnp.log(window), axis=0))


def _unified_rule(axis_name, h, z, backward, context):
    root, count, skip, warmup, decay = context
    size = len(backward.window)
    batch = over_batch(h * z, None, axis_name)
    window = backward.window.at[count % size].set(jnp.where(skip, backward.mean, batch))
    alone = (count <= size) | (count < warmup) | skip
    used = jnp.where(alone, batch, jnp.mean(window, axis=0))
    mean = decay * backward.mean + (1 - decay) * used
    gradient = (h - jnp.where(skip, used, mean) * z) * root
    return gradient, UnifiedNormBackward(mean, window)


def _check(x, state, scale, bias, train, where, eps) -> int:
    """Checks what both norms have; returns the number of features."""
    features = features_of(x, at_least_axes=2, scale=scale, bias=bias)
    _checks.shape("state.mean_square", state.mean_square, (features,), "the last axis of x")
    _checks.flag("train", train)
    check_where(where, x)
    positive("eps", eps)
    return features
