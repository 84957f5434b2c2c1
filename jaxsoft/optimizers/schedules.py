"""Schedules.

Functions from the step to a hyper-parameter, like optax's schedules. Refinement takes two runs. The first, with any
schedule, records its gradient norms; the second uses the schedule made from them:

```python
import jax
import jax.numpy as jnp
import optax

import jaxsoft

steps, params = 20, {"w": jnp.ones(3)}
tx = optax.chain(jaxsoft.optimizers.record_gradient_norm(steps, ord=1), optax.adam(1e-3))
state = tx.init(params)
for _ in range(steps):
    updates, state = tx.update(jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params), state, params)
    params = optax.apply_updates(params, updates)

schedule = jaxsoft.optimizers.refined_schedule(state[0].norms_by_count, 1e-3, power=1)
tx = optax.adam(schedule)
```

The schedule of domain-adversarial training is `jaxsoft.losses.domain_adversarial_schedule`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Scalar


class RecordGradientNormState(NamedTuple):
    """State of `record_gradient_norm`: steps taken, and the norms of the steps, 0 for steps to come."""

    count: jax.Array
    norms_by_count: jax.Array


def record_gradient_norm(steps: int, ord: int = 2) -> optax.GradientTransformationExtraArgs:
    """Passes gradients on and records their norm, for `refined_schedule`.

    Put it first in a chain, before clipping. The norm is that of all leaves as one vector, computed in at least
    float32. After `steps` steps the oldest norms are overwritten. Under `jit` leaves may be sharded;
    inside `shard_map` the norm is that of the local shards.

    Args:
      steps: Number of norms to keep: the length of the run, at least 1.
      ord: 2 (for SGD) or 1 (for Adam and other methods that normalize each entry).

    Returns:
      A gradient transformation; `state.norms_by_count[t % steps]` is the norm of step t, from 0.

    Raises:
      ValueError: for `steps` less than 1, or another `ord`.

    References:
      "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import record_gradient_norm
      >>> tx = record_gradient_norm(3)
      >>> params = jnp.zeros(2)
      >>> _, state = tx.update(jnp.array([3.0, -4.0]), tx.init(params), params)
      >>> print(state.norms_by_count)
      [5. 0. 0.]
    """
    steps = _checks.integer("steps", steps, at_least=1)
    _checks.option("ord", ord, (1, 2))

    def init(params: optax.Params) -> RecordGradientNormState:
        dtype = _common.wide(*jax.tree.leaves(params))
        return RecordGradientNormState(jnp.zeros([], jnp.int32), jnp.zeros(steps, dtype))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        wide = jax.lax.stop_gradient(_common.widen(updates))  # a root has no derivative at 0
        size = jnp.abs if ord == 1 else jnp.square
        total = _common.total(jax.tree.map(lambda g: jnp.sum(size(g)), wide))
        norm = total if ord == 1 else jnp.sqrt(total)
        norms = jnp.asarray(state.norms_by_count)  # a restored state may hold arrays of numpy
        norms = norms.at[state.count % steps].set(norm.astype(norms.dtype))
        return updates, RecordGradientNormState(jnp.asarray(optax.safe_increment(state.count)), norms)

    return optax.GradientTransformationExtraArgs(init, update)


def _median_filter(x: np.ndarray, half: int) -> np.ndarray:
    """Median over windows of `2 half + 1`, the left end repeated and the right end reflected."""
    width = 2 * half + 1
    left = np.full(half, x[0])
    right = np.pad(x, (0, half), mode="symmetric")[x.size :]
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([left, x, right]), width)
    return np.median(windows, axis=-1)


def refined_schedule(
    gradient_norms: Any,
    peak: Scalar,
    *,
    power: float = 2.0,
    filter_fraction: float = 0.1,
    steps: int | None = None,
) -> optax.Schedule:
    """The learning-rate schedule for the next run that would have been best for a finished one.

    With the gradient norms `G_t` of T steps, smoothed by a running median, and weights `w_t = G_t^-power`:

        lr_t = peak c w_t sum_{p > t} w_p / sum_p w_p

    with c such that the largest value is `peak`. For constant norms it is linear decay to 0; gradients that start
    large add a warm-up. The last value is 0.

    Args:
      gradient_norms: `[T]`, the norms of the steps of a run, concrete numbers, e.g. from
        `record_gradient_norm`. Norms of 0 are replaced by the smallest other one.
      peak: The largest learning rate.
      power: 2 with l2 norms (SGD), 1 with l1 norms (Adam and other methods that normalize each entry).
      filter_fraction: Half the width of the running median (`2 floor(filter_fraction T) + 1` steps) as a fraction
        of T, in [0, 0.5]. At the left end the first norm is repeated, at the right end the norms are
        reflected.
      steps: Length of the next run, at least 2; the schedule is stretched to it linearly. None: T.

    Returns:
      A schedule: step (from 0) to learning rate, constant after the last step.

    Raises:
      ValueError: if the norms are not a vector of at least two finite numbers >= 0, not all 0, or for a number out of
        range.

    References:
      "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement".

    Example:
      >>> from jaxsoft.optimizers import refined_schedule
      >>> schedule = refined_schedule([5.0] * 5, peak=0.1)
      >>> print([f"{schedule(t):.3f}" for t in range(5)])
      ['0.100', '0.075', '0.050', '0.025', '0.000']
    """
    norms = np.asarray(gradient_norms, np.float64)
    if norms.ndim != 1 or norms.size < 2:
        raise ValueError(f"gradient_norms must be a vector of at least 2 norms, got shape {norms.shape}")
    if not np.all(np.isfinite(norms)) or np.any(norms < 0) or not np.any(norms > 0):
        raise ValueError("gradient_norms must be finite numbers >= 0, not all 0")
    _checks.number("peak", peak, at_least=0)
    _checks.number("power", power, above=0)
    _checks.number("filter_fraction", filter_fraction, at_least=0, at_most=0.5)
    steps = norms.size if steps is None else _checks.integer("steps", steps, at_least=2)

    smooth = _median_filter(norms, int(filter_fraction * norms.size))
    if not np.any(smooth > 0):
        raise ValueError(
            "gradient_norms must not be 0 in most windows of the running median; lower filter_fraction"
        )
    smallest = np.min(smooth[smooth > 0])
    weights = (smallest / np.maximum(smooth, smallest)) ** power  # in (0, 1]: nothing overflows
    rest = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    shape = weights * rest
    values = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, norms.size), shape / np.max(shape))

    def schedule(count: Any) -> jax.Array:
        return peak * jnp.asarray(values)[jnp.clip(count, 0, steps - 1)]

    return schedule


def onecycle_momentum_schedule(
    transition_steps: Scalar,
    high: Scalar = 0.95,
    low: Scalar = 0.85,
    *,
    pct_start: Scalar = 0.3,
    pct_final: Scalar = 0.85,
) -> optax.Schedule:
    """The momentum of 1cycle: it falls while the learning rate rises, and rises while it falls.

    Piecewise linear: `high` to `low` over the first `pct_start` of the steps, back to `high` until
    `pct_final`, then `high`. The fractions are those of `optax.linear_onecycle_schedule`, for use beside it
    (with `optax.cosine_onecycle_schedule`, which has no final phase, set `pct_final=1`):

        tx = optax.inject_hyperparams(optax.sgd)(
            learning_rate=optax.linear_onecycle_schedule(1000, 1.0),
            momentum=onecycle_momentum_schedule(1000),
        )

    Args:
      transition_steps: Length of the cycle in steps, positive.
      high: Momentum at the ends, in [0, 1].
      low: Momentum at the largest learning rate, in [0, 1].
      pct_start: Fraction of the steps at which `low` is reached, in (0, 1).
      pct_final: Fraction of the steps at which `high` is reached again, above `pct_start` and at most 1.

    Returns:
      A schedule: step (from 0) to momentum, constant after the last step.

    Raises:
      ValueError: for a number out of range.

    References:
      "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates".

    Example:
      >>> from jaxsoft.optimizers import onecycle_momentum_schedule
      >>> schedule = onecycle_momentum_schedule(100)
      >>> print([f"{schedule(t):.2f}" for t in (0, 15, 30, 85, 100)])
      ['0.95', '0.90', '0.85', '0.95', '0.95']
    """
    _checks.number("transition_steps", transition_steps, above=0)
    _checks.number("high", high, at_least=0, at_most=1)
    _checks.number("low", low, at_least=0, at_most=1)
    _checks.number("pct_start", pct_start, above=0, below=1)
    _checks.number("pct_final", pct_final, above=0, at_most=1)
    if _checks.is_concrete_number(pct_start) and _checks.is_concrete_number(pct_final):
        _checks.number("pct_final", pct_final, above=float(pct_start))

    def schedule(count: Any) -> jax.Array:
        progress = jnp.asarray(count) / transition_steps
        down = progress / pct_start
        up = (pct_final - progress) / (pct_final - pct_start)
        return high + (low - high) * jnp.clip(jnp.minimum(down, up), 0, 1)

    return schedule
