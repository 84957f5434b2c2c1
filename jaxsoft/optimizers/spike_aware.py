"""SPAM and Stable-SPAM.

Versions of Adam that survive spikes of the gradient, and their parts, which go before or around any other optimizer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import (
    Mask,
    Scalar,
    bias_correction,
    moments_like,
    moving_average,
    scalars_like,
)

# The formulas. Trees come in at least float32; `count` is the number of this step, from 1.


def _half_cosine(step: jax.Array, steps: Scalar) -> jax.Array:
    """1 at step 0, falling along the half cosine that reaches 0 at step `steps + 1`."""
    return (1 + jnp.cos(jnp.pi * _common.to_float(step) / (_common.to_float(steps) + 1))) / 2


def _warmup_factor(count: jax.Array, reset_every: Scalar, warmup_steps: Scalar) -> jax.Array:
    """1 before the first reset; 0.01 at a reset (a multiple of `reset_every`), 1 again `warmup_steps` later."""
    step = count % reset_every
    lacking = jnp.where(step < warmup_steps, 0.99 * _half_cosine(step, warmup_steps), 0)
    return jnp.where(count < reset_every, 1.0, 1 - lacking)


def _zero_if(condition: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.where(condition, jnp.zeros_like(x), x), tree)


def _clip_to_second_moment(
    g: Any, nu: Any, threshold: Scalar, b2: Scalar, active: jax.Array
) -> tuple[Any, Any]:
    """SPAM's clipping, and the second moment of the clipped gradients.

        g <- sign(g) sqrt(threshold nu) where g^2 > threshold nu        nu <- b2 nu + (1 - b2) g^2

    Returns:
      The clipped gradients and the new second moment.
    """
    threshold = jnp.asarray(threshold)
    active = active & (threshold > 0) & (threshold < jnp.inf)
    nu = moving_average(
        b2,
        nu,
        jax.tree.map(lambda g, v: jnp.minimum(g * g, jnp.where(active, threshold * v, jnp.inf)), g, nu),
    )
    # Clipping with the old nu would make the compiler copy it to overwrite the state in place. A clipped entry has
    # nu_new = (b2 + (1 - b2) threshold) nu, so the bound threshold nu equals new_threshold nu_new, and an entry exceeds
    # one bound if and only if it exceeds the other.
    new_threshold = 1 / ((1 - b2) + b2 / threshold)

    def clip(g, v):
        bound = jnp.where(active, jnp.sqrt(new_threshold * v), jnp.inf)
        return jnp.clip(g, -bound, bound)

    return jax.tree.map(clip, g, nu), nu


def _mean_peak_bound(g: Any, peak_mean: Any, gamma3: Scalar, count: jax.Array) -> tuple[Any, Any, Any]:
    """AdaClip's bound on the entries of each leaf, and the factor for entries above it.

        peak = max|g|    M <- gamma3 M + (1 - gamma3) peak    bound = M / (1 - gamma3^t)

    Returns:
      The bounds, the factors bound / peak, and M.
    """
    peak = jax.tree.map(lambda g: jnp.max(jnp.abs(g), initial=0), g)
    peak_mean = moving_average(gamma3, peak_mean, peak)
    correction = bias_correction(gamma3, count)
    bound = jax.tree.map(lambda m: m / correction, peak_mean)
    # If the peak does not exceed the bound, no entry does, and the factor is unused.
    factor = jax.tree.map(lambda bound, peak: jnp.where(peak > bound, bound / peak, 1), bound, peak)
    return bound, factor, peak_mean


def _scale_above(g: Any, bound: Any, factor: Any) -> Any:
    """AdaClip: `g <- factor g` where `|g| > bound`."""

    def clip(g, bound, factor):
        # Computes jnp.where(jnp.abs(g) > bound, factor * g, g). On CPU a comparison does not fuse with the sum for the
        # norm of the result, and would need an array of the size of the leaf; signs and maxima fuse. The sign is 1 up
        # to the bound and 0 or -1 above, and the factor is in [0, 1].
        above = jnp.nextafter(jax.lax.stop_gradient(bound), jnp.asarray(jnp.inf, bound.dtype))
        return g * jnp.maximum(factor, jnp.sign(above - jnp.maximum(g, -g)))

    return jax.tree.map(clip, g, bound, factor)


def _mean_norm_factor(
    g: Any,
    norm_mean: Any,
    norm_square: Any,
    gamma1: Scalar,
    gamma2: Scalar,
    eps: Scalar,
    count: jax.Array,
) -> tuple[Any, Any, Any]:
    """AdaGN's factor for each leaf: its length becomes an Adam step of its norm n.

        mu <- gamma1 mu + (1 - gamma1) n    nu <- gamma2 nu + (1 - gamma2) n^2
        factor = mu_hat / (sqrt(nu_hat) + eps) / n    (0 where n = 0)

    Returns:
      The factors, mu and nu.
    """
    norm = jax.tree.map(lambda g: jnp.sqrt(jnp.sum(g * g)), g)
    norm_mean = moving_average(gamma1, norm_mean, norm)
    norm_square = moving_average(gamma2, norm_square, jax.tree.map(jnp.square, norm))
    correction1, correction2 = bias_correction(gamma1, count), bias_correction(gamma2, count)

    def factor(norm, mean, var):
        length = (mean / correction1) / (jnp.sqrt(var / correction2) + eps)
        return jnp.where(norm > 0, length / jnp.where(norm > 0, norm, 1), 0)

    return jax.tree.map(factor, norm, norm_mean, norm_square), norm_mean, norm_square


# The parts.


class SpikeClipBySecondMomentState(NamedTuple):
    """State of `spike_clip_by_second_moment`: steps taken, and the mean square of each entry."""

    count: jax.Array
    nu: optax.Updates


def spike_clip_by_second_moment(
    threshold: Scalar = 5000.0, b2: Scalar = 0.999, clip_start: Scalar = 20
) -> optax.GradientTransformationExtraArgs:
    """SPAM's spike clipping: no entry may exceed its own root mean square by more than a factor.

    With `nu` the second moment of the clipped gradients up to the previous step, without bias correction:

        g <- sign(g) sqrt(threshold nu) where g^2 > threshold nu        nu <- b2 nu + (1 - b2) g^2

    Because `nu` starts at 0, the bound is tight in the first steps: about `sqrt(threshold (1 - b2))` times
    the first gradient. At step 1 it is 0, so `clip_start <= 1` sets the first gradient to 0.

    Args:
      threshold: Bound on `g^2 / nu`; 0 turns clipping off.
      b2: Decay of the second moment, in [0, 1).
      clip_start: First step, counted from 1, at which entries are clipped.

    Returns:
      A gradient transformation. It keeps one float32 array like the parameters.

    Raises:
      ValueError: for a negative threshold or `clip_start`, or a rate out of range.

    References:
      "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = spike_clip_by_second_moment(threshold=4.0, b2=0.0, clip_start=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([1.0, 1.0]), state)
      >>> print(tx.update(jnp.array([0.5, -100.0]), state)[0].round(4))
      [ 0.5 -2. ]
    """
    _checks.number("threshold", threshold, at_least=0)
    _common.check_beta("b2", b2)
    _common.check_steps("clip_start", clip_start, at_least=0)

    def init(params: optax.Params) -> SpikeClipBySecondMomentState:
        return SpikeClipBySecondMomentState(jnp.zeros([], jnp.int32), moments_like(params))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        g = _common.widen(updates)
        g, nu = _clip_to_second_moment(g, state.nu, threshold, b2, count >= clip_start)
        return _common.cast_like(g, updates), SpikeClipBySecondMomentState(count, nu)

    return optax.GradientTransformationExtraArgs(init, update)


class AdaptiveSpikeClipState(NamedTuple):
    """State of `adaptive_spike_clip`: steps taken, and one mean of `max|g|` per leaf."""

    count: jax.Array
    peak_mean: optax.Updates


def adaptive_spike_clip(gamma3: Scalar = 0.999) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM's AdaClip: entries above the running mean of the leaf's largest entry are scaled down.

    For each leaf, at step t:

        peak = max|g|    M <- gamma3 M + (1 - gamma3) peak    M_hat = M / (1 - gamma3^t)
        g <- g M_hat / peak where |g| > M_hat

    The largest entry becomes `M_hat`, and the clipped entries keep their ratios. Under `jit` the leaf may
    be sharded; inside `shard_map` the maximum is that of the local shard.

    Args:
      gamma3: Decay of the mean of the maximum, in [0, 1).

    Returns:
      A gradient transformation. It keeps one scalar per leaf.

    Raises:
      ValueError: for a rate out of range.

    References:
      "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = adaptive_spike_clip(gamma3=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([1.0, 1.0]), state)
      >>> print(tx.update(jnp.array([1.0, -4.0]), state)[0].round(4))
      [ 1. -3.]
    """
    _common.check_beta("gamma3", gamma3)

    def init(params: optax.Params) -> AdaptiveSpikeClipState:
        return AdaptiveSpikeClipState(jnp.zeros([], jnp.int32), scalars_like(params))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        g = _common.widen(updates)
        bound, factor, peak_mean = _mean_peak_bound(g, state.peak_mean, gamma3, count)
        u = _common.cast_like(_scale_above(g, bound, factor), updates)
        return u, AdaptiveSpikeClipState(count, peak_mean)

    return optax.GradientTransformationExtraArgs(init, update)


class AdaptiveGradientNormState(NamedTuple):
    """State of `adaptive_gradient_norm`: steps taken, and two moments of the norm per leaf."""

    count: jax.Array
    norm_mean: optax.Updates
    norm_square: optax.Updates


def adaptive_gradient_norm(
    gamma1: Scalar = 0.7, gamma2: Scalar = 0.9, eps: Scalar = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM's AdaGN: each leaf keeps its direction, and its length becomes an Adam step of its norm.

    For each leaf, at step t, with `n = ||g||`:

        mu <- gamma1 mu + (1 - gamma1) n         mu_hat = mu / (1 - gamma1^t)
        nu <- gamma2 nu + (1 - gamma2) n^2       nu_hat = nu / (1 - gamma2^t)
        g <- (g / n) mu_hat / (sqrt(nu_hat) + eps)        (0 where n = 0)

    The result has a norm around 1 for any scale of the gradient, so a leaf with nothing but tiny noise is amplified,
    too. Under `jit` the leaf may be sharded; inside `shard_map` the norm is that of the
    local shard.

    Args:
      gamma1: Decay of the mean norm, in [0, 1).
      gamma2: Decay of the mean squared norm, in [0, 1).
      eps: Added to the root, at least 0; norms below it are damped.

    Returns:
      A gradient transformation. It keeps two scalars per leaf.

    Raises:
      ValueError: for a rate out of range or a negative `eps`.

    References:
      "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = adaptive_gradient_norm()
      >>> print(tx.update(1000 * jnp.ones(4), tx.init(jnp.zeros(4)))[0].round(4))
      [0.5 0.5 0.5 0.5]
    """
    _common.check_beta("gamma1", gamma1)
    _common.check_beta("gamma2", gamma2)
    _checks.number("eps", eps, at_least=0)

    def init(params: optax.Params) -> AdaptiveGradientNormState:
        return AdaptiveGradientNormState(jnp.zeros([], jnp.int32), scalars_like(params), scalars_like(params))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        g = _common.widen(updates)
        factor, mean, var = _mean_norm_factor(
            g, state.norm_mean, state.norm_square, gamma1, gamma2, eps, count
        )
        u = _common.cast_like(optax.tree.mul(g, factor), updates)
        return u, AdaptiveGradientNormState(count, mean, var)

    return optax.GradientTransformationExtraArgs(init, update)


class MomentumResetState(NamedTuple):
    """State of `momentum_reset`: steps taken, and the state of the inner transformation."""

    count: jax.Array
    inner_state: optax.OptState


def momentum_reset(
    inner: optax.GradientTransformation,
    reset_every: Scalar = 500,
    warmup_steps: Scalar = 0,
    *,
    reset_counts: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Resets the moments of any transformation at regular steps, and warms up its updates again.

    At each step t (from 1) that is a multiple of `reset_every`, before the inner update, every floating array that the
    inner state holds for the parameters (those that `optax.tree_map_params` visits) becomes 0. The updates are
    multiplied by 1 before the first reset, and j steps after a reset by

        1 - 0.99 (1 + cos(pi j / (warmup_steps + 1))) / 2  for j < warmup_steps,  1 afterwards.

    Args:
      inner: The transformation to reset; its moments must start at 0.
      reset_every: Steps between resets, at least 1.
      warmup_steps: Length of the warm-up after a reset, at least 0.
      reset_counts: Also set the scalar integers of the inner state to 0, such as the `count` of Adam's bias correction
        (Stable-SPAM does, SPAM does not). Schedules inside start again, too.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: for `reset_every` below 1 or a negative `warmup_steps`.

    References:
      "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training"; as a wrapper of any transformation
      it is ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = momentum_reset(optax.trace(0.9), reset_every=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(4):
      ...     u, state = tx.update(jnp.ones(1), state)
      ...     print(u.round(4))
      [1.]
      [1.9]
      [1.]
      [1.9]
    """
    _common.check_steps("reset_every", reset_every, at_least=1)
    _common.check_steps("warmup_steps", warmup_steps, at_least=0)
    _checks.flag("reset_counts", reset_counts)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> MomentumResetState:
        return MomentumResetState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        count = jnp.asarray(optax.safe_increment(state.count))
        reset = count % reset_every == 0

        def forget(x):
            return _zero_if(reset, x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

        def recount(x):
            scalar_integer = jnp.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.signedinteger)
            return _zero_if(reset, x) if reset_counts and scalar_integer else x

        inner_state = optax.tree_map_params(inner, forget, state.inner_state, transform_non_params=recount)
        u, inner_state = inner.update(updates, inner_state, params, **extra)
        factor = _warmup_factor(count, reset_every, warmup_steps)
        u = jax.tree.map(lambda u: (factor * u).astype(jnp.result_type(u)), u)
        return u, MomentumResetState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


# SPAM.


class ScaleBySpamState(NamedTuple):
    """State of `scale_by_spam`: steps taken and both moments."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_spam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    *,
    threshold: Scalar = 5000.0,
    reset_every: Scalar = 500,
    warmup_steps: Scalar = 150,
    clip_start: Scalar = 20,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of SPAM: Adam with spike clipping and momentum reset.

    At step t (from 1), for each entry:

        m, v <- 0                                          when t is a multiple of reset_every
        g <- sign(g) sqrt(threshold v) where g^2 > threshold v    if t mod reset_every >= clip_start
        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        direction = s (sqrt(1 - b2^t) / (1 - b1^t)) m / (sqrt(v) + eps)

    with s the warm-up factor of `momentum_reset`. As in the authors' code the bias correction counts the steps since
    the start, not since the reset: right after a reset `m / sqrt(v)` is about 3 times too large
    (`(1 - b1) / sqrt(1 - b2)`), which the warm-up hides. The clipping is that of `spike_clip_by_second_moment`, with
    Adam's own `v`. Sparse momentum (`density < 1`) is left out: with static shapes it saves no memory.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root, at least 0.
      threshold: Bound on `g^2 / v`; 0 turns clipping off.
      reset_every: Steps between resets of the moments, at least 1.
      warmup_steps: Length of the warm-up after a reset, at least 0.
      clip_start: Step, counted from the start and from each reset, at which clipping begins (the authors'
        `grad_accu_steps`). With 1 or less the first gradient becomes 0, since v is 0.
      mu_dtype: Dtype of the first moment, which is rounded to it before use. None: that of the parameters, but at
        least float32, as for the second moment.

    Returns:
      A gradient transformation. Updates keep the dtype of the gradients.

    Raises:
      ValueError: for a rate out of range, a negative threshold, or a number of steps that is too small.

    References:
      "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_spam(eps=0.0)
      >>> print(tx.update(jnp.array([3.0, -4.0]), tx.init(jnp.zeros(2)))[0].round(4))
      [ 1. -1.]
    """
    _common.check_beta("b1", b1)
    _common.check_beta("b2", b2)
    _checks.number("eps", eps, at_least=0)
    _checks.number("threshold", threshold, at_least=0)
    _common.check_steps("reset_every", reset_every, at_least=1)
    _common.check_steps("warmup_steps", warmup_steps, at_least=0)
    _common.check_steps("clip_start", clip_start, at_least=0)
    mu_dtype = _checks.floating_dtype("mu_dtype", mu_dtype)

    def init(params: optax.Params) -> ScaleBySpamState:
        return ScaleBySpamState(
            jnp.zeros([], jnp.int32), moments_like(params, mu_dtype), moments_like(params)
        )

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        since_reset = count % reset_every
        mu, nu = _zero_if(since_reset == 0, (state.mu, state.nu))
        g = _common.widen(updates)
        g, nu = _clip_to_second_moment(g, nu, threshold, b2, since_reset >= clip_start)
        mu = _common.cast_like(moving_average(b1, mu, g), state.mu)  # rounded to mu_dtype here: no copy
        scale = _warmup_factor(count, reset_every, warmup_steps)
        scale *= jnp.sqrt(bias_correction(b2, count)) / bias_correction(b1, count)

        def direction(m, v):
            return safe_divide(scale * m, jnp.sqrt(v) + eps)

        u = jax.tree.map(direction, _common.cast_like(mu, nu), nu)
        return _common.cast_like(u, updates), ScaleBySpamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def spam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    *,
    threshold: Scalar = 5000.0,
    reset_every: Scalar = 500,
    warmup_steps: Scalar = 150,
    clip_start: Scalar = 20,
    mu_dtype: Any = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """SPAM, ready to use: `params <- params - learning_rate (direction + weight_decay params)`.

    See `scale_by_spam` for the direction. The authors' code decays after the step, which differs by
    `learning_rate^2 weight_decay direction`; here the decay is that of `optax.adamw`.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root, at least 0.
      threshold: Bound on `g^2 / v`; 0 turns clipping off.
      reset_every: Steps between resets of the moments, at least 1.
      warmup_steps: Length of the warm-up after a reset, at least 0.
      clip_start: Step, counted from the start and from each reset, at which clipping begins.
      mu_dtype: Dtype of the first moment.
      weight_decay: Decoupled weight decay.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters.

    Raises:
      ValueError: as `scale_by_spam`, and for a negative learning rate or weight decay.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = spam(0.1, eps=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, 1.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(4))
      [ 0.9 -2.1]
    """
    direction = scale_by_spam(
        b1,
        b2,
        eps,
        threshold=threshold,
        reset_every=reset_every,
        warmup_steps=warmup_steps,
        clip_start=clip_start,
        mu_dtype=mu_dtype,
    )
    return _common.descend(direction, learning_rate, weight_decay, mask)


# Stable-SPAM.


class ScaleByStableSpamState(NamedTuple):
    """State of `scale_by_stable_spam`: steps taken, three scalars per leaf, and both moments."""

    count: jax.Array
    peak_mean: optax.Updates
    norm_mean: optax.Updates
    norm_square: optax.Updates
    mu: optax.Updates
    nu: optax.Updates


def scale_by_stable_spam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    gamma1: Scalar | None = 0.7,
    gamma2: Scalar = 0.9,
    gamma3: Scalar = 0.999,
    reset_every: Scalar = 1000,
    total_steps: Scalar | None = None,
    eta_min: Scalar = 0.5,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of Stable-SPAM: AdaClip, then AdaGN, then Adam whose moments and count are reset.

    For each leaf the gradient passes through `adaptive_spike_clip(gamma3)` and
    `adaptive_gradient_norm(s gamma1, gamma2, eps)`, and then, at step t (from 1) and with q the steps since
    the last reset (1 at a reset):

        m, v <- 0                                          when t is a multiple of reset_every
        m <- s b1 m + (1 - s b1) g        v <- b2 v + (1 - b2) g^2
        direction = m / (1 - (s b1)^q) / (sqrt(v / (1 - b2^q)) + eps)

    where s is 1 or, with `total_steps`, falls from 1 to `eta_min` along a half cosine that ends one step later.
    Without `total_steps` it is `optax.chain(adaptive_spike_clip(gamma3), adaptive_gradient_norm(gamma1, gamma2, eps),
    momentum_reset(optax.scale_by_adam(b1, b2, eps), reset_every, reset_counts=True))`.

    The trajectory does not depend on the scale of the gradients, up to `eps`. A leaf with nothing but tiny noise takes
    steps of full size, too. Under `jit` a leaf may be sharded; inside `shard_map` its maximum
    and norm are those of the local shard.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the roots, at least 0.
      gamma1: Decay of the mean norm, in [0, 1). None: `b1`.
      gamma2: Decay of the mean squared norm, in [0, 1).
      gamma3: Decay of the mean of the largest entry, in [0, 1).
      reset_every: Steps between resets of the moments, at least 1.
      total_steps: Length of training over which `b1` and `gamma1` fall. None: they are constant.
      eta_min: Final factor of `b1` and `gamma1`, in [0, 1].
      mu_dtype: Dtype of the first moment, which is rounded to it before use. None: that of the parameters, but at
        least float32, as for all other state.

    Returns:
      A gradient transformation. Updates keep the dtype of the gradients.

    Raises:
      ValueError: for a rate out of range, or a number of steps that is too small.

    References:
      "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam". The reset is the paper's: moments
      are zeroed before the update, and AdaClip and AdaGN count on. (The authors' code resets the count of
      all corrections after them and steps once with the old moments.)

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_stable_spam(eps=0.0)
      >>> print(tx.update(jnp.array([3e-9, -4e-9]), tx.init(jnp.zeros(2)))[0].round(4))
      [ 1. -1.]
    """
    rate1: Any = b1 if gamma1 is None else gamma1
    for name, rate in (("b1", b1), ("b2", b2), ("gamma1", rate1), ("gamma2", gamma2), ("gamma3", gamma3)):
        _common.check_beta(name, rate)
    _checks.number("eps", eps, at_least=0)
    _common.check_steps("reset_every", reset_every, at_least=1)
    if total_steps is not None:
        _common.check_steps("total_steps", total_steps, at_least=1)
    _checks.number("eta_min", eta_min, at_least=0, at_most=1)
    mu_dtype = _checks.floating_dtype("mu_dtype", mu_dtype)

    def init(params: optax.Params) -> ScaleByStableSpamState:
        return ScaleByStableSpamState(
            count=jnp.zeros([], jnp.int32),
            peak_mean=scalars_like(params),
            norm_mean=scalars_like(params),
            norm_square=scalars_like(params),
            mu=moments_like(params, mu_dtype),
            nu=moments_like(params),
        )

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        since_reset = jnp.where(count < reset_every, count, count % reset_every + 1)
        s: Any = 1.0
        if total_steps is not None:  # the last step still has the cosine's factor
            s = eta_min + (1 - jnp.asarray(eta_min)) * jnp.where(
                count <= total_steps, _half_cosine(count, total_steps), 0
            )
        b1_now, gamma1_now = s * b1, s * rate1

        g = _common.widen(updates)
        bound, factor, peak_mean = _mean_peak_bound(g, state.peak_mean, gamma3, count)
        # The norm and each moment need the clipped gradient. Computing it from g each time is much cheaper than storing
        # it.
        clip1 = g, bound, factor
        clip2 = _common.separate(clip1)
        clip3 = _common.separate(clip2)
        length, norm_mean, norm_square = _mean_norm_factor(
            _scale_above(*clip1), state.norm_mean, state.norm_square, gamma1_now, gamma2, eps, count
        )
        g1 = optax.tree.mul(_scale_above(*clip2), length)
        g2 = optax.tree.mul(_scale_above(*clip3), length)

        mu, nu = _zero_if(count % reset_every == 0, (state.mu, state.nu))
        mu = _common.cast_like(moving_average(b1_now, mu, g1), state.mu)  # rounded to mu_dtype here: no copy
        nu = moving_average(b2, nu, jax.tree.map(jnp.square, g2))
        # Scalar inverses: dividing every entry would take as long as reading it.
        correction1, correction2 = (1 / bias_correction(b, since_reset) for b in (b1_now, b2))

        def direction(m, v):
            return safe_divide(correction1 * m, jnp.sqrt(correction2 * v) + eps)

        u = _common.cast_like(jax.tree.map(direction, _common.cast_like(mu, nu), nu), updates)
        return u, ScaleByStableSpamState(count, peak_mean, norm_mean, norm_square, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def stable_spam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    gamma1: Scalar | None = 0.7,
    gamma2: Scalar = 0.9,
    gamma3: Scalar = 0.999,
    reset_every: Scalar = 1000,
    total_steps: Scalar | None = None,
    eta_min: Scalar = 0.5,
    mu_dtype: Any = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM, ready to use: `params <- params - learning_rate (direction + weight_decay params)`.

    See `scale_by_stable_spam` for the direction.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the roots, at least 0.
      gamma1: Decay of the mean norm, in [0, 1). None: `b1`.
      gamma2: Decay of the mean squared norm, in [0, 1).
      gamma3: Decay of the mean of the largest entry, in [0, 1).
      reset_every: Steps between resets of the moments, at least 1.
      total_steps: Length of training over which `b1` and `gamma1` fall. None: they are constant.
      eta_min: Final factor of `b1` and `gamma1`, in [0, 1].
      mu_dtype: Dtype of the first moment.
      weight_decay: Decoupled weight decay.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters.

    Raises:
      ValueError: as `scale_by_stable_spam`, and for a negative learning rate or weight decay.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = stable_spam(0.1, eps=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, 1.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(4))
      [ 0.9 -2.1]
    """
    direction = scale_by_stable_spam(
        b1,
        b2,
        eps,
        gamma1=gamma1,
        gamma2=gamma2,
        gamma3=gamma3,
        reset_every=reset_every,
        total_steps=total_steps,
        eta_min=eta_min,
        mu_dtype=mu_dtype,
    )
    return _common.descend(direction, learning_rate, weight_decay, mask)
