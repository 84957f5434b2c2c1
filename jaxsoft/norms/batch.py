"""Batch norms and norms with an activation.

EvoNorm, batch norm whose statistics are calibrated at test time, and batch norm that is balanced between the tasks of
continual learning. Features are last, as in NHWC; running statistics are arguments and results.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.norms._common import (
    AxisName,
    affine,
    batch_moments,
    bessel,
    check_where,
    features_of,
    over_devices,
    positive,
    wide,
)

Scalar = float | jax.Array


def evonorm_b0(
    x: Float[Array, "batch *space features"],
    running_variance: Float[Array, " features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    slope: Float[Array, " features"] | None = None,
    *,
    train: bool,
    decay: Scalar = 0.9,
    unbiased: bool = False,
    eps: Scalar = 1e-5,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "batch *space features"], Float[Array, " features"]]:
    """EvoNorm-B0: `scale x / max(sqrt(var_batch + eps), slope x + sqrt(var_instance + eps)) + bias`.

    Norm and activation in one. The variance of the batch is over all axes but the last, that of an instance over its
    space, per feature; neither is centred in the output. The gradient flows through both.

    Args:
      x: batch first, features last, at least one axis of space between.
      running_variance: in place of the variance of the batch where `train=False`. It starts with ones.
      scale: one number per feature. None: 1.
      bias: one number per feature. None: 0.
      slope: one number per feature, learned. None: 1.
      train: whether to use and update batch statistics.
      decay: weight of the old running variance.
      unbiased: whether the running variance is that of `n - 1`, as in timm. The official code stores the biased one.
      eps: added to the variances, positive. Official: 1e-5, timm: 1e-3.
      axis_name: mesh axes of a `shard_map` (or the axis of a `vmap`) over which the batch is spread.

    Returns:
      An array like x, and the new running variance; the old one with `train=False`.

    Raises:
      TypeError: arrays or options of a wrong type.
      ValueError: shapes that do not fit, numbers out of range.

    Reference:
      Liu et al., "Evolving Normalization-Activation Layers".

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jaxsoft.norms import evonorm_b0
      >>> x = jnp.array([[[-1.0], [1.0]], [[0.0], [4.0]]])
      >>> y, running = evonorm_b0(x, jnp.ones(1), train=True)
      >>> print(np.asarray(y[..., 0]).round(3), running)
      [[-0.535  0.5  ]
       [ 0.     0.667]] [1.25]
    """
    features = features_of(x, at_least_axes=3, scale=scale, bias=bias, slope=slope)
    _check_running(features, running_variance=running_variance)
    for name, value in (("train", train), ("unbiased", unbiased)):
        _checks.flag(name, value)
    _checks.number("decay", decay, at_least=0, at_most=1)
    positive("eps", eps)
    y, new = wide(x), running_variance
    if train:
        _, variance = batch_moments(y, None, axis_name)
        stored = variance * bessel(y, None, axis_name) if unbiased else variance
        new = lax.stop_gradient(decay * new + (1 - decay) * stored).astype(new.dtype)
    else:
        variance = running_variance.astype(y.dtype)
    instance = jnp.var(y, axis=tuple(range(1, y.ndim - 1)), keepdims=True)
    below = jnp.maximum(jnp.sqrt(variance + eps), affine(y, slope, None) + jnp.sqrt(instance + eps))
    return affine(y / below, scale, bias).astype(x.dtype), new


def evonorm_s0(
    x: Float[Array, "batch *space features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    slope: Float[Array, " features"] | None = None,
    *,
    groups: int = 32,
    eps: Scalar = 1e-5,
) -> Float[Array, "batch *space features"]:
    """EvoNorm-S0: `scale x sigmoid(slope x) / sqrt(var_group + eps) + bias`.

    Norm and activation in one, without statistics of the batch: the variance is that of a group of features of one
    instance, over its space.

    Args:
      x: batch first, features last, at least one axis of space between.
      scale: one number per feature. None: 1.
      bias: one number per feature. None: 0.
      slope: one number per feature, learned. None: 1.
      groups: number of groups of consecutive features; if it does not divide them, the next smaller number that does,
        as in the official code.
      eps: added to the variance, positive.

    Returns:
      An array like x.

    Raises:
      TypeError: arrays or options of a wrong type.
      ValueError: shapes that do not fit, numbers out of range.

    Reference:
      Liu et al., "Evolving Normalization-Activation Layers".

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jaxsoft.norms import evonorm_s0
      >>> print(np.asarray(evonorm_s0(jnp.array([[[-1.0], [1.0]]])))[0, :, 0].round(3))
      [-0.269  0.731]
    """
    features = features_of(x, at_least_axes=3, scale=scale, bias=bias, slope=slope)
    groups = _checks.integer("groups", groups, at_least=1)
    positive("eps", eps)
    groups = next(g for g in range(min(groups, features), 0, -1) if features % g == 0) if features else 1
    y = wide(x)
    grouped = y.reshape(*y.shape[:-1], groups, features // groups)
    variance = jnp.var(grouped, axis=(*range(1, y.ndim - 1), y.ndim), keepdims=True)
    unit = (grouped * lax.rsqrt(variance + eps)).reshape(y.shape)
    return affine(unit * jax.nn.sigmoid(affine(y, slope, None)), scale, bias).astype(x.dtype)


def alpha_batch_norm(
    x: Float[Array, "*batch features"],
    mean: Float[Array, " features"],
    variance: Float[Array, " features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    source_weight: Scalar,
    unbiased: bool = True,
    where: Bool[Array, "*batch"] | None = None,
    eps: Scalar = 1e-5,
    axis_name: AxisName = None,
) -> Float[Array, "*batch features"]:
    """Batch norm at test time, whose statistics are mixed: `source_weight * trained + (1 - source_weight) * batch`.

        scale (x - mu) / sqrt(v + eps) + bias,    mu and v: mixed means and variances

    A weight of 1 is batch norm as usual, a weight of 0 that of the batch. There is no state.

    Args:
      x: features last; the statistics are over all other axes.
      mean: means of training.
      variance: variances of training.
      scale: one number per feature. None: 1.
      bias: one number per feature. None: 0.
      source_weight: in [0, 1], the paper's alpha (0.9 for segmentation, our reading). In some code alpha is the weight
        of the batch, `1 - source_weight`.
      unbiased: whether the variance of the batch is that of `n - 1`, as in the code that is mostly used.
      where: positions that count in the statistics, `x.shape[:-1]`. None: all.
      eps: added to the variance, positive.
      axis_name: mesh axes of a `shard_map` (or the axis of a `vmap`) over which the batch is spread.

    Returns:
      An array like x.

    Raises:
      TypeError: arrays or options of a wrong type.
      ValueError: shapes that do not fit, numbers out of range.

    Reference:
      You et al., "Test-time Batch Statistics Calibration for Covariate Shift".

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jaxsoft.norms import alpha_batch_norm
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y = alpha_batch_norm(x, jnp.zeros(1), jnp.ones(1), source_weight=0.5)
      >>> print(np.asarray(y[:, 0]).round(3))
      [0.    1.633]
    """
    features = features_of(x, at_least_axes=2, scale=scale, bias=bias)
    _check_running(features, mean=mean, variance=variance)
    _checks.number("source_weight", source_weight, at_least=0, at_most=1)
    _checks.flag("unbiased", unbiased)
    check_where(where, x)
    positive("eps", eps)
    y = wide(x)
    batch_mean, batch_variance = batch_moments(y, where, axis_name)
    if unbiased:
        batch_variance = batch_variance * bessel(y, where, axis_name)
    mu = source_weight * mean.astype(y.dtype) + (1 - source_weight) * batch_mean
    v = source_weight * variance.astype(y.dtype) + (1 - source_weight) * batch_variance
    return affine((y - mu) * lax.rsqrt(v + eps), scale, bias).astype(x.dtype)


class BalancedBatchNormState(NamedTuple):
    """The running statistics of a balanced batch norm.

    Attributes:
      count: number of batches.
      rate: weight of the last batch in the running statistics.
      mean: running means, one number per feature.
      variance: running variances.
    """

    count: Int[Array, ""]
    rate: Float[Array, ""]
    mean: Float[Array, " features"]
    variance: Float[Array, " features"]


def balanced_batch_norm_init(features: int, *, dtype: Any = jnp.float32) -> BalancedBatchNormState:
    """The state of a balanced batch norm: means of 0, variances of 1.

    Args:
      features: number of features.
      dtype: floating dtype of the statistics.

    Returns:
      The state.

    Raises:
      TypeError: `features` that are not a static integer, a dtype that is not floating.
      ValueError: `features` below 1.

    Reference:
      "Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and Adaptation".

    Example:
      >>> from jaxsoft.norms import balanced_batch_norm_init
      >>> print(balanced_batch_norm_init(2).variance)
      [1. 1.]
    """
    features = _checks.integer("features", features, at_least=1)
    dtype = _checks.floating_dtype("dtype", dtype)
    return BalancedBatchNormState(
        jnp.zeros((), jnp.int32), jnp.ones((), dtype), jnp.zeros(features, dtype), jnp.ones(features, dtype)
    )


def balanced_batch_norm(
    x: Float[Array, "batch *space features"],
    state: BalancedBatchNormState,
    tasks: Int[Array, " batch"] | None = None,
    task_logits: Float[Array, " tasks"] | None = None,
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    train: bool,
    momentum: Scalar = 0.1,
    balance: Scalar = 1.0,
    eps: Scalar = 1e-5,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "batch *space features"], BalancedBatchNormState, Float[Array, ""]]:
    """Batch norm whose statistics are balanced between tasks, and between old and new batches (AdaB2N).

    In a batch with examples of several tasks, task t has the weight `exp(task_logits[t]) + n_t` (n_t of its examples),
    divided by the sum over the tasks in the batch; its examples share it. Mean and variance are weighted so. The
    running statistics move by the rate eta, from that of batch norm (`balance=1`) to the average of all batches (0):

        eta_1 = momentum^balance,    eta_t = eta_(t-1) / (eta_(t-1) + (1 - momentum)^balance)

    Args:
      x: batch first, features last.
      state: the running statistics.
      tasks: the task of each example, ids from 0. None: one task. Read in training only.
      task_logits: one number per task, learned; `len(task_logits)` is the number of tasks. Needed with `tasks`.
      scale: one number per feature. None: 1.
      bias: one number per feature. None: 0.
      train: whether to use and update batch statistics.
      momentum: in (0, 1), weight of a new batch in the running statistics of batch norm.
      balance: in [0, 1], the paper's kappa.
      eps: added to the variance, positive.
      axis_name: mesh axes of a `shard_map` (or the axis of a `vmap`) over which the batch is spread.

    Returns:
      An array like x, the new state (the state itself with `train=False`), and the regularizer for the loss: the mean
      squared difference of means and that of variances, between the batch and the running statistics after the update
      (0 with `train=False`).

    Raises:
      TypeError: arrays or options of a wrong type.
      ValueError: shapes that do not fit, numbers out of range, `tasks` without `task_logits`.

    Reference:
      "Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and Adaptation", and its code.
      Tasks that are not in the batch have no weight in ours; in the code weights would not sum to 1 then. An id out of
      range gives NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import balanced_batch_norm, balanced_batch_norm_init
      >>> x, tasks = jnp.array([[1.0], [5.0], [5.0], [5.0]]), jnp.array([0, 1, 1, 1])
      >>> state = balanced_batch_norm_init(1)
      >>> y, state, loss = balanced_batch_norm(x, state, tasks, jnp.zeros(2), train=True)
      >>> print(state.mean.round(3))  # 0.1 (1 * 2/6 + 5 * 4/6)
      [0.367]
    """
    features = features_of(x, at_least_axes=2, scale=scale, bias=bias)
    _check_running(features, **{"state.mean": state.mean, "state.variance": state.variance})
    _checks.flag("train", train)
    _checks.number("momentum", momentum, above=0, below=1)
    _checks.number("balance", balance, at_least=0, at_most=1)
    positive("eps", eps)
    y = wide(x)
    if tasks is not None:
        _checks.integers("tasks", tasks)
        _checks.shape("tasks", tasks, tuple(x.shape[:1]), "the batch of x")
        if task_logits is None or task_logits.ndim != 1:
            raise ValueError("task_logits must be a vector, one number per task, where tasks are given")
        _checks.floating("task_logits", task_logits)
    if not train:
        mean, variance = (a.astype(y.dtype) for a in (state.mean, state.variance))
        new, loss = state, jnp.zeros((), y.dtype)
    else:
        if tasks is None:
            mean, variance = batch_moments(y, None, axis_name)
        else:
            weights = _example_weights(tasks, wide(task_logits).astype(y.dtype), axis_name)
            weights = weights / math.prod(y.shape[1:-1])
            weights = weights.reshape(-1, *(1,) * (y.ndim - 1))
            axes = tuple(range(y.ndim - 1))
            mean = over_devices(jnp.sum(weights * y, axis=axes), axis_name)
            variance = over_devices(jnp.sum(weights * jnp.square(y - mean), axis=axes), axis_name)
        new = _moved(state, mean, variance, momentum, balance)
        differences = (mean - new.mean.astype(y.dtype), variance - new.variance.astype(y.dtype))
        loss = sum(jnp.mean(jnp.square(d)) for d in differences)
    out = affine((y - mean) * lax.rsqrt(variance + eps), scale, bias).astype(x.dtype)
    return out, new, jnp.asarray(loss)


def _example_weights(tasks: Array, logits: Array, axis_name: AxisName) -> Array:
    """The weight of each example, of sum 1."""
    here = tasks[:, None] == jnp.arange(len(logits))
    counts = over_devices(jnp.sum(here, axis=0).astype(logits.dtype), axis_name)
    concentration = jnp.where(counts > 0, jnp.exp(logits) + counts, 0)
    of_task = safe_divide(concentration / jnp.sum(concentration), counts)
    in_range = (tasks >= 0) & (tasks < len(logits))
    return jnp.where(in_range, of_task[jnp.where(in_range, tasks, 0)], jnp.nan)


def _moved(
    state: BalancedBatchNormState, mean: Array, variance: Array, momentum: Scalar, balance: Scalar
) -> BalancedBatchNormState:
    """The running statistics after a batch; constants to the gradient."""
    dtype = mean.dtype
    rate, momentum = state.rate.astype(dtype), jnp.asarray(momentum, dtype)
    rate = jnp.where(state.count == 0, momentum**balance, rate / (rate + (1 - momentum) ** balance))

    def move(old, new):
        return (old + rate * (new - old)).astype(old.dtype)

    new = BalancedBatchNormState(
        state.count + 1, rate.astype(state.rate.dtype), move(state.mean, mean), move(state.variance, variance)
    )
    return lax.stop_gradient(new)


def _check_running(features: int, **statistics: Any) -> None:
    for name, value in statistics.items():
        _checks.floating(name, value)
        _checks.shape(name, value, (features,), "the last axis of x")
