"""Clipping and spikes.

The thresholds follow the gradients, so there is nothing to tune by hand. Put these parts before any optimizer:
`optax.chain(clip_by_quantile(0.1), optax.adamw(1e-3))`.

| | acts on | threshold |
| --- | --- | --- |
| `clip_by_quantile` | entries | a quantile of the entries of this gradient |
| `clip_by_percentile` | the global norm | a percentile of the last norms |
| `limit_norm_growth` | the norm of each leaf, or of all | a factor times the last norm |
| `skip_spikes` | the whole step | mean and standard deviation of the norms |
| `spike_statistics` | nothing: it counts | the same |

The parts of SPAM and Stable-SPAM serve the same purpose: `spike_clip_by_second_moment`, `adaptive_spike_clip` and
`adaptive_gradient_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Scalar

_SAMPLE = 65536  # sample size of quantiles


def _global_norm(tree: Any) -> jax.Array:
    """The norm of all leaves together, in at least float32."""
    return jnp.sqrt(_common.total(jax.tree.map(lambda x: jnp.sum(x * x), _common.widen(tree))))


# By entry.


def _sample(x: jax.Array, stride: int) -> jax.Array:
    """About every `stride`-th entry of a leaf, spread evenly over all rows and columns."""
    if stride > 1:
        while math.gcd(stride, x.size) > 1:  # otherwise all entries might come from the same columns
            stride += 1
    return jnp.ravel(_common.whole(x))[::stride]


def clip_by_quantile(
    fraction: Scalar = 0.1, *, per_leaf: bool = True, exact: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Clips the largest entries: `g <- clip(g, -c, c)`, with c such that a fraction of |g| exceeds it.

    In gradients with heavy tails a few entries cause most of the curvature along the step. A relative bound on the
    gradient, or on the update of any optimizer after its direction, removes them at any scale. 0 clips nothing; 1
    gives every entry the size of the smallest, a sign descent.

    The quantile of a leaf with more than 65536 entries is that of an evenly spread sample of about this size, with
    an error of `sqrt(fraction (1 - fraction) / 65536)`, at most 0.2%, in the fraction.

    Args:
      fraction: Fraction of the entries that is clipped, in [0, 1].
      per_leaf: One bound per leaf. False: one for all leaves.
      exact: Sort all entries instead of a sample.

    Returns:
      A stateless gradient transformation. Updates keep their dtype.

    Raises:
      TypeError: for a `per_leaf` or `exact` that is not a bool.
      ValueError: for a fraction out of range.

    References:
      "Toward Understanding Why Adam Converges Faster Than SGD for Transformers", coordinate-wise clipping.
      *Reconstructed* from the text; the sample is ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = clip_by_quantile(0.5)
      >>> g = jnp.array([1.0, -2.0, 3.0, -4.0, 500.0])
      >>> print(tx.update(g, tx.init(g))[0])
      [ 1. -2.  3. -3.  3.]
    """
    _checks.number("fraction", fraction, at_least=0, at_most=1)
    _checks.flag("per_leaf", per_leaf)
    _checks.flag("exact", exact)

    def bound(leaves: list[jax.Array]) -> jax.Array:
        size = sum(x.size for x in leaves)
        stride = 1 if exact else -(-size // _SAMPLE)
        entries = jnp.concatenate([jnp.abs(_sample(x, stride)) for x in leaves])
        return jnp.quantile(entries, 1 - jnp.asarray(fraction, entries.dtype))

    def clip(x: jax.Array, bound: jax.Array) -> jax.Array:
        return jnp.clip(x, -bound.astype(x.dtype), bound.astype(x.dtype))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        g = _common.widen(updates)
        if per_leaf:
            clipped = jax.tree.map(lambda x: clip(x, bound([x])) if x.size else x, g)
        else:
            leaves = [x for x in jax.tree.leaves(g) if x.size]
            common = bound(leaves) if leaves else jnp.zeros([])
            clipped = jax.tree.map(lambda x: clip(x, common), g)
        return _common.cast_like(clipped, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


# By norm.


class ClipByPercentileState(NamedTuple):
    """State of `clip_by_percentile`: the number of norms seen, and a ring of the last ones."""

    count: jax.Array
    norms: jax.Array


def clip_by_percentile(percentile: Scalar = 10.0, window: int = 100) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm of the gradient to a percentile of its own recent history.

        n = ||g|| of all leaves        c = percentile of the last `window` n, this one included
        g <- g min(1, c / n)

    The threshold needs no tuning: 100 clips nothing, 10 clips most steps and makes their length nearly constant, 50
    clips half of them. Norms enter the history unclipped; non-finite ones do not enter it.

    Args:
      percentile: In [0, 100]; interpolated between two norms.
      window: Length of the history, at least 1; static.

    Returns:
      A gradient transformation. It keeps `window` scalars. With `optax.inject_hyperparams` list `window` in
      `static_args`.

    Raises:
      TypeError: for a window that is not static.
      ValueError: for a number out of range.

    References:
      "8-bit Optimizers via Block-wise Quantization", whose library once had it. *Reconstructed*.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = clip_by_percentile(50.0, window=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (1.0, 3.0, 100.0):
      ...     u, state = tx.update(jnp.array([g]), state)
      ...     print(u.round(4))
      [1.]
      [2.]
      [3.]
    """
    _checks.number("percentile", percentile, at_least=0, at_most=100)
    window = _checks.integer("window", window, at_least=1)

    def init(params: optax.Params) -> ClipByPercentileState:
        # The initial values of the ring do not matter.
        dtype = _common.wide(*jax.tree.leaves(params))
        return ClipByPercentileState(jnp.zeros([], jnp.int32), jnp.ones(window, dtype))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        norm = _global_norm(updates)
        finite = jnp.isfinite(norm)
        place = jnp.arange(window, dtype=jnp.int32) == state.count % window
        norms = jnp.where(place & finite, norm.astype(state.norms.dtype), state.norms)
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        known = jnp.minimum(count, window)

        history = jnp.sort(jnp.where(jnp.arange(window, dtype=jnp.int32) < known, norms, jnp.inf))
        position = jnp.asarray(percentile) / 100 * _common.to_float(jnp.maximum(known - 1, 0))
        low = jnp.floor(position).astype(jnp.int32)
        below, above = history[low], history[jnp.minimum(low + 1, jnp.maximum(known - 1, 0))]
        bound = below + (position - jnp.floor(position)) * (above - below)
        bound = bound.astype(norm.dtype)
        factor = jnp.where(norm > bound, bound / jnp.where(norm > 0, norm, 1), 1)
        u = jax.tree.map(lambda g: jnp.asarray(g, _common.wide(g)) * factor, updates)
        return _common.cast_like(u, updates), ClipByPercentileState(count, norms)

    return optax.GradientTransformationExtraArgs(init, update)


# Whole steps.


class SpikeStatisticsState(NamedTuple):
    """Statistics of the global norm, to be logged.

    `count` is the number of steps and `spike_count` the number of spikes among them. `consecutive_count` is the number
    of spikes since the last step without one, so it is positive right after a spike. `last_spike_count` is the `count`
    of the last spike, 0 before the first. `mean` and `variance` are the running moments of the norm (1 before the
    first step).
    """

    count: jax.Array
    spike_count: jax.Array
    consecutive_count: jax.Array
    last_spike_count: jax.Array
    mean: jax.Array
    variance: jax.Array


def _init_statistics(params: optax.Params) -> SpikeStatisticsState:
    counts = (jnp.zeros([], jnp.int32) for _ in range(4))  # separate buffers: each is donated once
    dtype = _common.wide(*jax.tree.leaves(params))
    return SpikeStatisticsState(*counts, mean=jnp.ones([], dtype), variance=jnp.ones([], dtype))


def _check_spikes(z: Scalar, decay: Scalar, min_ratio: Scalar, warmup_steps: Scalar) -> None:
    _checks.number("z", z, at_least=0)
    _common.check_beta("decay", decay)
    _checks.number("min_ratio", min_ratio, at_least=1)
    _common.check_steps("warmup_steps", warmup_steps, at_least=1)


def _judge(
    updates: Any,
    state: SpikeStatisticsState,
    z: Scalar,
    decay: Scalar,
    min_ratio: Scalar,
    warmup_steps: Scalar,
) -> tuple[jax.Array, SpikeStatisticsState]:
    """Whether the norm of these updates is a spike, and the new statistics."""
    norm = _global_norm(updates).astype(state.mean.dtype)
    finite = jnp.isfinite(norm)
    seen = state.count  # steps before this one
    bound = jnp.maximum(state.mean + z * jnp.sqrt(state.variance), min_ratio * state.mean)
    high = (norm > bound) & (seen >= warmup_steps) & (state.mean > 0)
    spike = high | ~finite

    # Moments with weights decay^age that add up to 1: the first step replaces the initial values.
    count = jnp.asarray(optax.safe_increment(seen))
    weight = (1 - decay) / _common.bias_correction(decay, count)
    entry = jnp.where(high, bound, norm)  # a spike hardly counts, but a lasting change is learned
    change = entry - state.mean
    mean = state.mean + weight * change
    variance = (1 - weight) * (state.variance + weight * change * change)
    dtype = state.mean.dtype
    return spike, SpikeStatisticsState(
        count=count,
        spike_count=state.spike_count + spike.astype(jnp.int32),
        consecutive_count=jnp.where(spike, state.consecutive_count + 1, 0),
        last_spike_count=jnp.where(spike, count, state.last_spike_count),
        mean=jnp.where(finite, mean, state.mean).astype(dtype),
        variance=jnp.where(finite, variance, state.variance).astype(dtype),
    )


def spike_statistics(
    z: Scalar = 6.0, decay: Scalar = 0.99, *, min_ratio: Scalar = 2.0, warmup_steps: Scalar = 10
) -> optax.GradientTransformationExtraArgs:
    """Counts spikes of the gradient norm and passes the gradients on as they are.

    A spike is a global norm that is not finite or that, after `warmup_steps`, exceeds both `mean + z std` and
    `min_ratio mean` of the norms up to the previous step. A spike enters the moments with this bound as its norm: one
    spike hardly changes them, but a lasting growth of the gradients soon stops to count as spikes. Non-finite norms
    do not enter.

    A trainer reads the state: `optax.tree.get(opt_state, "spike_count")`, `"consecutive_count"`,
    `"last_spike_count"`, `"mean"`; see `SpikeStatisticsState`. `skip_spikes` applies the same rule.

    Args:
      z: Number of standard deviations above the mean, at least 0.
      decay: Weight of a step's norm in the moments, relative to that of the next step, in [0, 1).
      min_ratio: Smallest ratio of a spike to the mean, at least 1, for norms that hardly vary.
      warmup_steps: Steps at the start without spikes (other than non-finite norms), at least 1.

    Returns:
      A gradient transformation. It keeps six scalars.

    Raises:
      ValueError: for a number out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = spike_statistics(warmup_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (1.0, 1.1, 50.0, 1.0):
      ...     _, state = tx.update(jnp.array([g]), state)
      >>> print(state.spike_count, state.consecutive_count, state.last_spike_count)
      1 0 3
    """
    _check_spikes(z, decay, min_ratio, warmup_steps)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        return updates, _judge(updates, state, z, decay, min_ratio, warmup_steps)[1]

    return optax.GradientTransformationExtraArgs(_init_statistics, update)


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`: the statistics of the norm, and the state of the inner transformation."""

    statistics: SpikeStatisticsState
    inner_state: optax.OptState


def skip_spikes(
    inner: optax.GradientTransformation,
    z: Scalar = 6.0,
    decay: Scalar = 0.99,
    *,
    min_ratio: Scalar = 2.0,
    warmup_steps: Scalar = 10,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradient norm spikes: updates of 0, and an unchanged inner state.

    `spike_statistics` defines a spike. No spike and no NaN reaches the moments of an optimizer. A lasting growth of
    the norm passes after a few steps, since the statistics adapt: with the defaults the distance from the mean to the
    bound grows by about a sixth with each spike in a row.

    Args:
      inner: Any transformation or optimizer.
      z: Number of standard deviations above the mean, at least 0.
      decay: Weight of a step's norm in the moments, relative to that of the next step, in [0, 1).
      min_ratio: Smallest ratio of a spike to the mean, at least 1.
      warmup_steps: Steps at the start without spikes (other than non-finite norms), at least 1.

    Returns:
      A gradient transformation. It keeps six scalars beside the state of `inner`.

    Raises:
      ValueError: for a number out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = skip_spikes(optax.sgd(1.0), warmup_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (1.0, 1.5, 50.0, 1.0):
      ...     u, state = tx.update(jnp.array([g]), state)
      ...     print(u.round(4))
      [-1.]
      [-1.5]
      [0.]
      [-1.]
    """
    _check_spikes(z, decay, min_ratio, warmup_steps)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipSpikesState:
        return SkipSpikesState(_init_statistics(params), inner.init(params))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        spike, statistics = _judge(updates, state.statistics, z, decay, min_ratio, warmup_steps)
        harmless = jax.tree.map(lambda g: jnp.where(spike, jnp.zeros_like(g), g), updates)
        u, new = inner.update(harmless, state.inner_state, params, **extra)
        u = jax.tree.map(lambda u: jnp.where(spike, jnp.zeros_like(u), u), u)
        new = jax.tree.map(lambda old, new: jnp.where(spike, old, new), state.inner_state, new)
        return u, SkipSpikesState(statistics, new)

    return optax.GradientTransformationExtraArgs(init, update)


# Around optimizers.


def cautious(
    inner: optax.GradientTransformation,
    *,
    ready: bool,
    eps: Scalar = 1e-3,
    normalization: Literal["mean", "count"] = "mean",
) -> optax.GradientTransformationExtraArgs:
    """Drops the entries of any update that would raise the loss to first order, and scales the others up.

    With u the direction that `inner` computes from the gradient g, for each leaf of n entries:

        mask = [u g > 0]        u <- u mask / max(mean(mask), eps)

    Unlike momentum, the result never points uphill: `<u, g> >= 0`. A ready optimizer returns steps, which have the
    opposite sign: there the mask is `[u g < 0]`. Both take the same steps, except that the mask and the scale of a
    ready optimizer act on its weight decay, too:

        optax.chain(cautious(optax.scale_by_adam(), ready=False), optax.scale_by_learning_rate(1e-3))
        cautious(optax.adam(1e-3), ready=True)

    Under `jit` a leaf may be sharded; inside `shard_map` the mean is that of the local shard.

    Args:
      inner: A direction or a ready optimizer.
      ready: Whether `inner` is ready, that is, its updates are multiplied by minus a learning rate. With the wrong
        value every entry that lowers the loss is dropped.
      eps: Smallest mean to divide by, positive.
      normalization: "mean" as above; "count" multiplies by `n / (sum(mask) + 1)`, as in the authors' Lion.

    Returns:
      A gradient transformation with the state of `inner`. Updates keep the dtype of the gradients.

    Raises:
      TypeError: for a `ready` that is not a bool.
      ValueError: for an `eps` that is not positive, or an unknown normalization.

    References:
      "Cautious Optimizers: Improving Training with One Line of Code".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = cautious(optax.trace(0.9), ready=False)
      >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)))
      >>> print(tx.update(jnp.array([1.0, -0.5]), state)[0].round(4))
      [3.8 0. ]
    """
    _checks.flag("ready", ready)
    _checks.number("eps", eps, above=0)
    _checks.option("normalization", normalization, ("mean", "count"))
    inner = optax.with_extra_args_support(inner)

    def leaf(u, g):
        u, g = jnp.asarray(u, _common.wide(u)), jnp.asarray(g, _common.wide(g))
        g = -g if ready else g
        # The number of entries with u g > 0, from signs, since the product may underflow; and without comparisons
        # or constants, which a sum on a CPU would read from arrays of the size of the leaf.
        sign = jnp.sign(u) * jnp.sign(g)
        total = jnp.sum(sign + sign * sign) / 2
        by_mean = 1 / jnp.maximum(total / max(u.size, 1), eps)
        u = u * (by_mean if normalization == "mean" else u.size / (total + 1))
        return jnp.where((u > 0) & (g <= 0) | (u < 0) & (g >= 0), 0, u)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        directions, state = inner.update(updates, state, params, **extra)
        return _common.cast_like(jax.tree.map(leaf, directions, updates), updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def directional_sharpness(
    loss_fn: Callable[[Any], jax.Array], params: optax.Params, direction: optax.Updates
) -> jax.Array:
    """The curvature of a loss along a direction, `v^T H v / ||v||^2`, without forming the Hessian H.

    The second-order term of the change of the loss along v, for v of length 1: how sharp the loss is in the direction
    of an optimizer. Adam's directions were found to be far less sharp than those of SGD, and clipping by entry brings
    those of SGD near them. It costs about two gradients.

    Args:
      loss_fn: A function from the parameters to a scalar that can be differentiated twice, once in forward mode.
      params: The point, a pytree of floating arrays.
      direction: v, a pytree like `params`, of any length. A direction of 0 gives 0.

    Returns:
      A scalar, float32 or wider.

    Raises:
      TypeError: for a `loss_fn` that is not callable.

    References:
      "Toward Understanding Why Adam Converges Faster Than SGD for Transformers".

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = lambda x: 0.5 * (x[0] ** 2 + x[0] * x[1] + 4 * x[1] ** 2)
      >>> print(directional_sharpness(loss, jnp.zeros(2), jnp.array([1.0, 1.0])))
      3.0
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of params, got {_checks.describe(loss_fn)}")
    params = jax.tree.map(jnp.asarray, params)
    v = jax.tree.map(lambda p, v: jnp.asarray(v, p.dtype), params, direction)
    _, hv = jax.jvp(jax.grad(loss_fn), (params,), (v,))
    v, hv = _common.widen(v), _common.widen(hv)
    square = jnp.asarray(optax.tree.vdot(v, v))
    return safe_divide(jnp.asarray(optax.tree.vdot(v, hv)), square)
