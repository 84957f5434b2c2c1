"""AdamP and SGDP.

For weights that a normalization follows, such as convolutions before a batch norm: their scale does not matter, yet
momentum makes it grow, which shrinks the effective learning rate. These optimizers find such weights by their gradient
and remove the growth. Kernels are `[..., inputs, outputs]` unless `channel_axis` says otherwise. On a matrix a step of
SGDP stores nothing beside its inputs and outputs, and a step of AdamP one array of the size of the leaf.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask, Scalar, bias_correction, moving_average

Axes = int | tuple[int, ...]
"""One axis or several."""


def _channel_axes(channel_axis: Any) -> tuple[int, ...]:
    axes = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    return tuple(_checks.integer("channel_axis", axis) for axis in axes)


def _others(shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a leaf that one channel spans."""
    ndim = len(shape)
    if not all(-ndim <= axis < ndim for axis in channel_axes):
        raise ValueError(
            f"channel_axis must be in [{-ndim}, {ndim}) for a leaf of shape {shape}, got {channel_axes}"
        )
    channel_axes = tuple(axis % ndim for axis in channel_axes)
    return tuple(axis for axis in range(ndim) if axis not in channel_axes)


def _radial_part(
    u: jax.Array,
    g: jax.Array,
    p: jax.Array,
    delta: Scalar,
    eps: Scalar,
    channel_axes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """The part of u along p, if the gradient shows that the scale of p does not matter.

    Returns:
      The factor r (one per channel) of the projection `u - r p`, 0 without projection; and whether there is one, a
      boolean.
    """
    others = _others(g.shape, channel_axes)

    def factor(sums, length):
        """For groups of `length` weights: the factor, and whether the gradient is tangential in all of them."""
        gg, pp, gp, up = sums
        norm = jnp.sqrt(pp)
        small = delta / math.sqrt(max(length, 1)) * jnp.maximum(jnp.sqrt(gg) * norm, eps)
        return safe_divide(up, jnp.square(norm + eps)), jnp.all(jnp.abs(gp) < small)

    sums = tuple(jnp.sum(x, axis=others, keepdims=True) for x in (g * g, p * p, g * p, u * p))
    by_channel, in_channels = factor(sums, math.prod(g.shape[i] for i in others))
    # Separate: otherwise the compiler computes the second sums from the products, too, and stores these.
    of_layer, in_layer = factor(tuple(map(jnp.sum, _common.separate(sums))), g.size)
    return jnp.where(in_channels, by_channel, jnp.where(in_layer, of_layer, 0)), in_channels | in_layer


def project_out_radial(
    inner: optax.GradientTransformation,
    *,
    ready: bool,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    eps: Scalar = 1e-8,
    channel_axis: Axes = (-1,),
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Removes from any update its part along the weights, if the weights are found to be scale-invariant.

    The scale of weights before a normalization does not matter, so their gradient is perpendicular to them. Momentum
    is not: it makes them grow, which shrinks the effective learning rate. For each leaf of two axes or more, with
    weights p, raw gradient g and update u of `inner`:

        |cos(g, p)| < delta / sqrt(n) in every group of n weights    u <- u - (<p, u> / (|p| + eps)^2) p

    The groups are the channels or, if the gradient fails the test there, the whole leaf; if it fails here, too, u stays
    unchanged. Then `u <- u + weight_decay s p`, with s = `wd_ratio` for projected u and 1 otherwise, because weight
    decay only shrinks such weights. For this reason decay is an argument here. Leaves with fewer than two axes get u
    and full decay.

    `scale_by_adamp` and `scale_by_sgdp` wrap Adam and momentum in it. Around others:

        optax.chain(project_out_radial(optax.scale_by_lion(), ready=False, weight_decay=0.1),
                    optax.scale_by_learning_rate(1e-4))
        project_out_radial(optax.lion(1e-4), ready=True)  # projects its weight decay, too, and takes none here

    Under `jit` a leaf may be sharded; inside `shard_map` the products are those of the local shard.

    Args:
      inner: The transformation from raw gradients to updates: a direction or a ready optimizer.
      ready: Whether `inner` is ready, that is, its updates are multiplied by minus a learning rate. `weight_decay` must
        then be 0: added to such a step it would let the weights grow.
      delta: Bound on the cosine, at least 0. 0 never projects.
      wd_ratio: Factor on the decay of projected leaves, at least 0.
      eps: Lower bound of the product of norms in the cosine, also added to the norm of the weights; at least 0.
      channel_axis: Axis of the output channels, or several: (-1,), the default, for kernels of flax; 0 for
        weights as in torch.
      weight_decay: Decay added to the update, at least 0.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one. None: all.

    Returns:
      A gradient transformation with the state of `inner`, whose `update` needs the parameters. Products are
      computed in at least float32; updates keep the dtype of the gradients.

    Raises:
      TypeError: for a `ready` that is not a bool.
      ValueError: for a number out of range, weight decay with `ready=True`, an axis that a leaf of two axes or more
        does not have, or if `update` is called without the parameters.

    References:
      "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights". As a wrapper of
      any transformation, and with several channel axes, it is ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = project_out_radial(optax.trace(0.9), ready=False)
      >>> params = jnp.array([[1.0], [0.0]])
      >>> state = tx.init(params)._replace(trace=jnp.array([[5.0], [0.0]]))
      >>> print(tx.update(jnp.array([[0.0], [2.0]]), state, params)[0].round(4))
      [[0.]
       [2.]]
    """
    _checks.flag("ready", ready)
    _checks.number("delta", delta, at_least=0)
    _checks.number("wd_ratio", wd_ratio, at_least=0)
    _checks.number("eps", eps, at_least=0)
    _checks.number("weight_decay", weight_decay, at_least=0)
    if ready and not (_checks.is_concrete_number(weight_decay) and weight_decay == 0):
        raise ValueError(
            f"weight_decay must be 0 for ready=True, got {_checks.describe(weight_decay)}: wrap the direction with "
            "ready=False, and put optax.scale_by_learning_rate after it"
        )
    channel_axes = _channel_axes(channel_axis)
    inner = optax.with_extra_args_support(inner)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        _common.check_params("project_out_radial", params)
        directions, state = inner.update(updates, state, params, **extra)

        def leaf(u, g, p, decays):
            decay = weight_decay if decays else 0.0
            dtype = _common.wide(u, g, p)
            u, g, p = (jnp.asarray(x, dtype) for x in (u, g, p))
            if p.ndim < 2:
                return u + decay * p
            radial, projected = _radial_part(u, g, p, delta, eps, channel_axes)
            return u + (decay * jnp.where(projected, wd_ratio, 1) - radial) * p

        u = jax.tree.map(leaf, directions, updates, params, _common.broadcast_mask(mask, params))
        return _common.cast_like(u, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _adam(b1: Scalar, b2: Scalar, eps: Scalar, nesterov: bool, mu_dtype: Any) -> optax.GradientTransformation:
    """Adam's direction, in at least float32, with AdamP's Nesterov variant."""
    _checks.flag("nesterov", nesterov)
    _common.check_beta("b1", b1)
    _common.check_beta("b2", b2)
    _checks.number("eps", eps, at_least=0)
    mu_dtype = _checks.floating_dtype("mu_dtype", mu_dtype)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        moments = _common.moments_like
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), moments(params, mu_dtype), moments(params))

    def update(updates: optax.Updates, state: Any, params: Any = None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        g = _common.widen(updates)
        mu = _common.cast_like(moving_average(b1, state.mu, g), state.mu)
        # In this order of products: the square alone is also summed for the projection, and would be stored.
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, g)
        # Scalar inverses: dividing every entry would take as long as reading it.
        c1, c2 = 1 / bias_correction(b1, count), 1 / bias_correction(b2, count)

        def direction(g, m, v):
            m = b1 * m + (1 - b1) * g if nesterov else m
            return safe_divide(c1 * m, jnp.sqrt(c2 * v) + eps)

        return jax.tree.map(direction, g, _common.cast_like(mu, nu), nu), optax.ScaleByAdamState(
            count, mu, nu
        )

    return optax.GradientTransformation(init, update)


def _momentum(momentum: Scalar, dampening: Scalar, nesterov: bool) -> optax.GradientTransformation:
    """Momentum as in torch, in at least float32."""
    _checks.flag("nesterov", nesterov)
    _checks.number("momentum", momentum, at_least=0, below=1)
    _checks.number("dampening", dampening, at_least=0, at_most=1)

    def update(updates: optax.Updates, state: Any, params: Any = None):
        del params
        g = _common.widen(updates)
        trace = jax.tree.map(lambda m, g: momentum * m + (1 - dampening) * g, state.trace, g)
        u = jax.tree.map(lambda m, g: g + momentum * m, trace, g) if nesterov else trace
        return u, optax.TraceState(trace)

    return optax.GradientTransformation(lambda params: optax.TraceState(_common.moments_like(params)), update)


def scale_by_adamp(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    delta: Scalar = 0.1,
    nesterov: bool = False,
    channel_axis: Axes = (-1,),
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of AdamP: Adam, projected off the weights where these are scale-invariant.

    For each leaf, at step t (from 1):

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)        direction = project_out_radial(u)

    For the projection see `project_out_radial`; for its decay use `adamp`. With `delta=0`
    it is Adam.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root, and to norms of weights; at least 0.
      delta: Bound on the cosine between gradient and weights, at least 0.
      nesterov: Replace m in the direction by `b1 m + (1 - b1) g`, with the new m.
      channel_axis: Axis of the output channels, or several: (-1,), the default, for kernels of flax.
      mu_dtype: Dtype of the first moment. None: that of the parameters, but at least float32.

    Returns:
      A gradient transformation whose `update` needs the parameters; its state is `optax.ScaleByAdamState`.
      Updates keep the dtype of the gradients.

    Raises:
      ValueError: for a number out of range.

    References:
      "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_adamp()
      >>> params, g = jnp.array([[1.0], [-2.0]]), jnp.array([[1.0], [0.5]])
      >>> print(tx.update(g, tx.init(params), params)[0].round(1))
      [[1.2]
       [0.6]]
    """
    adam = _adam(b1, b2, eps, nesterov, mu_dtype)
    return project_out_radial(adam, ready=False, delta=delta, eps=eps, channel_axis=channel_axis)


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    nesterov: bool = False,
    channel_axis: Axes = (-1,),
    mu_dtype: Any = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamP, ready to use: `params <- params - learning_rate (direction + s weight_decay params)`.

    See `scale_by_adamp` for the direction. s is `wd_ratio` for leaves that are projected and 1 for others.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root, and to norms of weights; at least 0.
      delta: Bound on the cosine between gradient and weights, at least 0.
      wd_ratio: Factor on the decay of projected leaves, at least 0.
      nesterov: Replace m in the direction by `b1 m + (1 - b1) g`, with the new m.
      channel_axis: Axis of the output channels, or several: (-1,), the default, for kernels of flax.
      mu_dtype: Dtype of the first moment.
      weight_decay: Decoupled weight decay.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters.

    Raises:
      ValueError: as `scale_by_adamp`, and for a negative learning rate or weight decay.

    References:
      "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = adamp(0.1)
      >>> params, g = jnp.array([[1.0], [-2.0]]), jnp.array([[1.0], [0.5]])
      >>> updates, _ = tx.update(g, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(4))
      [[ 0.88]
       [-2.06]]
    """
    direction = project_out_radial(
        _adam(b1, b2, eps, nesterov, mu_dtype),
        ready=False,
        delta=delta,
        wd_ratio=wd_ratio,
        eps=eps,
        channel_axis=channel_axis,
        weight_decay=weight_decay,
        mask=mask,
    )
    return _common.with_learning_rate(learning_rate, direction)


def scale_by_sgdp(
    momentum: Scalar = 0.9,
    *,
    dampening: Scalar = 0.0,
    nesterov: bool = False,
    eps: Scalar = 1e-8,
    delta: Scalar = 0.1,
    channel_axis: Axes = (-1,),
) -> optax.GradientTransformationExtraArgs:
    """The direction of SGDP: momentum, projected off the weights where these are scale-invariant.

    For each leaf:

        m <- momentum m + (1 - dampening) g        u = m        direction = project_out_radial(u)

    For the projection see `project_out_radial`; for its decay use `sgdp`. With `delta=0`
    it is SGD with momentum.

    Args:
      momentum: Factor on the old momentum, in [0, 1).
      dampening: Subtracted from the weight of the gradient in the momentum, in [0, 1].
      nesterov: Use `g + momentum m`, with the new m, as u.
      eps: Lower bound of the product of norms in the cosine, also added to the norm of the weights; at least 0.
      delta: Bound on the cosine between gradient and weights, at least 0.
      channel_axis: Axis of the output channels, or several: (-1,), the default, for kernels of flax.

    Returns:
      A gradient transformation whose `update` needs the parameters; its state is `optax.TraceState`, at
      least float32. Updates keep the dtype of the gradients.

    Raises:
      ValueError: for a number out of range.

    References:
      "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights". The authors' code
      has a default momentum of 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_sgdp()
      >>> params, g = jnp.array([[1.0], [-2.0]]), jnp.array([[1.0], [0.5]])
      >>> print(tx.update(g, tx.init(params), params)[0].round(4))
      [[1. ]
       [0.5]]
    """
    sgd = _momentum(momentum, dampening, nesterov)
    return project_out_radial(sgd, ready=False, delta=delta, eps=eps, channel_axis=channel_axis)


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.9,
    *,
    dampening: Scalar = 0.0,
    nesterov: bool = False,
    eps: Scalar = 1e-8,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    channel_axis: Axes = (-1,),
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """SGDP, ready to use: `params <- params - lr (direction + s weight_decay / (1 - momentum) params)`.

    See `scale_by_sgdp` for the direction. s is `wd_ratio` for leaves that are projected and 1 for others.
    The division is the authors': decay does not accumulate in the momentum, but is as strong as if it did.

    Args:
      learning_rate: A number or a schedule.
      momentum: Factor on the old momentum, in [0, 1).
      dampening: Subtracted from the weight of the gradient in the momentum, in [0, 1].
      nesterov: Use `g + momentum m`, with the new m, as the update.
      eps: Lower bound of the product of norms in the cosine, also added to the norm of the weights; at least 0.
      delta: Bound on the cosine between gradient and weights, at least 0.
      wd_ratio: Factor on the decay of projected leaves, at least 0.
      channel_axis: Axis of the output channels, or several: (-1,), the default, for kernels of flax.
      weight_decay: Weight decay, before the division.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters.

    Raises:
      ValueError: as `scale_by_sgdp`, and for a negative learning rate or weight decay.

    References:
      "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = sgdp(0.1)
      >>> params, g = jnp.array([[1.0], [-2.0]]), jnp.array([[1.0], [0.5]])
      >>> updates, _ = tx.update(g, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(4))
      [[ 0.9 ]
       [-2.05]]
    """
    _checks.number("weight_decay", weight_decay, at_least=0)
    _checks.number("momentum", momentum, at_least=0, below=1)
    direction = project_out_radial(
        _momentum(momentum, dampening, nesterov),
        ready=False,
        delta=delta,
        wd_ratio=wd_ratio,
        eps=eps,
        channel_axis=channel_axis,
        weight_decay=weight_decay / (1 - momentum),
        mask=mask,
    )
    return _common.with_learning_rate(learning_rate, direction)
