"""Choices among whole candidates: energies of metrics, importance resampling, best of n."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide
from jaxsoft.decoding.sampling import sample

_SCALES = (*(0.5**i for i in range(9)), 0.0)  # tried lengths of a Newton step


def fit_metric_energy(
    metrics: Float[Array, "n K"],
    targets: Float[Array, " K"],
    *,
    log_weights: Float[Array, " n"] | None = None,
    l2: float = 1e-6,
    bound: float = 100.0,
    steps: int = 50,
) -> Float[Array, " K"]:
    """Finds mu such that the metrics' averages under `q(x) = p(x) e^(-mu . f(x)) / Z` are the targets.

    Minimizes the convex `log E_p[e^(-mu . f)] + mu . targets + l2 |mu|^2 / 2` by damped Newton steps. q is the
    distribution nearest to p (in `KL(q | p)`) with these averages.

    Args:
      metrics: `[n, K]`, floating: K metrics f of n candidates.
      targets: `[K]`, the averages to reach, e.g. those of human texts.
      log_weights: `[n]`, log p of the candidates up to a constant. None: they are samples from p.
      l2: keeps mu finite where the targets are out of reach (outside the convex hull of the metrics).
      bound: of each `|mu|`.
      steps: static; 50 are enough for convergence in ordinary cases.

    Returns:
      mu, `[K]`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Ji et al., "Language Model Decoding as Direct Metrics Optimization"; the paper fits mu by gradient descent.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import fit_metric_energy
      >>> f = jnp.array([[1.0, 0.2], [0.5, 0.4], [0.2, 0.9], [0.1, 0.1]])
      >>> mu = fit_metric_energy(f, jnp.array([0.5, 0.45]), log_weights=jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])))
      >>> print(np.asarray(mu).round(2))
      [ 0.72 -0.23]
    """
    _checks.floating("metrics", metrics)
    _checks.floating("targets", targets)
    if metrics.ndim != 2 or metrics.shape[0] == 0:
        raise ValueError(f"metrics must have shape [n, K] with n of 1 or more, got shape {metrics.shape}")
    n, k = metrics.shape
    _checks.shape("targets", targets, (k,), "one target per metric")
    _checks.number("l2", l2, at_least=0)
    _checks.number("bound", bound, above=0)
    steps = _checks.integer("steps", steps, at_least=1)
    metrics, targets = jnp.asarray(metrics), jnp.asarray(targets)
    dtype = accumulation_dtype(metrics.dtype, targets.dtype)
    f, goal = metrics.astype(dtype), targets.astype(dtype)
    base = jnp.zeros(n, dtype) if log_weights is None else _log_weights(log_weights, (n,), dtype)

    def objective(mu):
        return jax.nn.logsumexp(base - f @ mu) + mu @ goal + l2 / 2 * mu @ mu

    def step(_, mu):
        q = jax.nn.softmax(base - f @ mu)
        mean = q @ f
        centred = f - mean
        hessian = (q[:, None] * centred).T @ centred
        damping = l2 + 10 * jnp.finfo(dtype).eps * (jnp.trace(hessian) + 1e-6)
        gradient = goal - mean + l2 * mu
        move = jnp.linalg.solve(hessian + damping * jnp.eye(k, dtype=dtype), gradient)
        tried = jnp.clip(mu - jnp.asarray(_SCALES, dtype)[:, None] * move, -bound, bound)
        return tried[jnp.argmin(jax.vmap(objective)(tried))]

    return jax.lax.fori_loop(0, steps, step, jnp.zeros(k, dtype))


def _log_weights(value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    _checks.floating("log_weights", value)
    _checks.shape("log_weights", value, shape, "one number per candidate")
    return value.astype(dtype)


class Resampled(NamedTuple):
    """The result of `importance_resample`.

    Attributes:
      index: `[*rows]` int32, the chosen candidate.
      weights: `[*rows, n]`, the probability of each candidate.
    """

    index: Array
    weights: Array


def importance_resample(
    metrics: Float[Array, "*rows n K"],
    mu: Float[Array, " K"],
    key: Array,
    *,
    log_weights: Float[Array, "*rows n"] | None = None,
) -> Resampled:
    """Draws one of n candidates with the weights `softmax(log_weights - metrics @ mu)`.

    Args:
      metrics: `[*rows, n, K]`, floating, of the candidates.
      mu: `[K]`, from `fit_metric_energy`.
      key: a PRNG key.
      log_weights: `[*rows, n]`: the log of target over proposal for candidates that are no samples from the model.

    Returns:
      A `Resampled`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Ji et al., "Language Model Decoding as Direct Metrics Optimization".

    Example:
      >>> import numpy as np
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import importance_resample
      >>> f = jnp.array([[1.0, 0.2], [0.5, 0.4], [0.2, 0.9], [0.1, 0.1]])
      >>> print(np.asarray(importance_resample(f, jnp.array([1.0, -0.5]), jax.random.key(0)).weights).round(4))
      [0.1202 0.219  0.3796 0.2812]
    """
    _checks.floating("metrics", metrics)
    _checks.floating("mu", mu)
    if metrics.ndim < 2:
        raise ValueError(f"metrics must have shape [*rows, n, K], got shape {metrics.shape}")
    _checks.shape("mu", mu, metrics.shape[-1:], "one number per metric")
    metrics, mu = jnp.asarray(metrics), jnp.asarray(mu)
    dtype = accumulation_dtype(metrics.dtype, mu.dtype)
    logits = -(metrics.astype(dtype) @ mu.astype(dtype))
    if log_weights is not None:
        logits = logits + _log_weights(log_weights, metrics.shape[:-1], dtype)
    return Resampled(sample(logits, key), jax.nn.softmax(logits, axis=-1))


# --- best of n ----------------------------------------------------------------------------------------------


def best_of_n_policy(
    probs: Float[Array, "*rows outcomes"], rewards: Float[Array, "*rows outcomes"], n: int | Float[Array, ""]
) -> Float[Array, "*rows outcomes"]:
    """The distribution of the best of n samples: `c^n - (c - p)^n`, with c the probability of no larger reward.

    Outcomes of equal rewards share what their union gets in proportion to p.

    Args:
      probs: `[*rows, outcomes]`, floating, distributions.
      rewards: the same shape, floating.
      n: 1 or more, a number; it may be traced.

    Returns:
      `[*rows, outcomes]` probabilities.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Beirami et al., "Theoretical guarantees on the best-of-n alignment policy".

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import best_of_n_policy
      >>> print(np.asarray(best_of_n_policy(jnp.array([0.1, 0.2, 0.3, 0.4]), jnp.arange(4.0), 4)).round(4))
      [1.000e-04 8.000e-03 1.215e-01 8.704e-01]
    """
    _checks.floating("probs", probs)
    _checks.floating("rewards", rewards)
    if probs.ndim == 0:
        raise ValueError("probs must have shape [*rows, outcomes], got a scalar")
    _checks.shape("rewards", rewards, probs.shape, "one reward per outcome")
    _checks.number("n", n, at_least=1)
    probs, rewards = jnp.asarray(probs), jnp.asarray(rewards)
    dtype = accumulation_dtype(probs.dtype)
    p = probs.astype(dtype)

    def of_row(p, rewards):
        order = jnp.argsort(rewards)
        sums = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(p[order])])
        first, last = (jnp.searchsorted(rewards[order], rewards, side=side) for side in ("left", "right"))
        own = sums[last] - sums[first]
        own = jnp.where(last - first == 1, p, own)  # exact without ties
        return sums[last], own

    c, own = jnp.vectorize(of_row, signature="(m),(m)->(m),(m)")(p, rewards)
    share = jnp.minimum(safe_divide(own, c), 1)
    inner = jnp.where(share < 1, jnp.log1p(-jnp.where(share < 1, share, 0)), -jnp.inf)
    return c**n * -jnp.expm1(n * inner) * safe_divide(p, own)


def best_of_n_kl_bound(n: int | Float[Array, ""]) -> Float[Array, ""]:
    """`log n - (n - 1) / n`, an upper bound of `KL(best of n | model)`.

    Args:
      n: 1 or more, a number; it may be traced.

    Returns:
      A scalar, in nats.

    Raises:
      TypeError: an n that is no number.
      ValueError: an n below 1.

    Reference:
      Beirami et al., "Theoretical guarantees on the best-of-n alignment policy".

    Example:
      >>> import numpy as np
      >>> from jaxsoft.decoding import best_of_n_kl_bound
      >>> print(np.asarray(best_of_n_kl_bound(4)).round(4))
      0.6363
    """
    _checks.number("n", n, at_least=1)
    n = jnp.asarray(n, accumulation_dtype(jnp.asarray(n).dtype))
    return jnp.log(n) - (n - 1) / n


def best_of_n_kl_estimate(log_prob: Float[Array, ...], n: int | Float[Array, ""]) -> Float[Array, ...]:
    """An estimate of `KL(best of n | model)` from the probability e of the chosen sample; tighter than the bound.

    `(1 - e)^n (log n + (n - 1) log(1 - e) - (n - 1) / n) + (1 - (1 - e)^n) log((1 - (1 - e)^n) / e)`. It is the bound
    for e = 0, and 0 for e = 1.

    Args:
      log_prob: floating, the log-probability of the best sample under the model: 0 or less.
      n: 1 or more, a number; it may be traced.

    Returns:
      The shape of `log_prob`, float32 or wider, in nats.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: an n below 1.

    Reference:
      Beirami et al., "Theoretical guarantees on the best-of-n alignment policy".

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import best_of_n_kl_estimate
      >>> print(np.asarray(best_of_n_kl_estimate(jnp.log(0.4), 4)).round(4))
      0.5606
    """
    _checks.floating("log_prob", log_prob)
    _checks.number("n", n, at_least=1)
    x = log_prob.astype(accumulation_dtype(log_prob.dtype))
    n = jnp.asarray(n, x.dtype)
    e = jnp.exp(x)
    certain, tiny = e >= 1, e == 0
    log_rest = jnp.log1p(-jnp.where(certain, 0, e))  # log(1 - e)
    hit = -jnp.expm1(n * log_rest)
    ratio = jnp.where(tiny, n, safe_divide(hit, e))
    value = (1 - hit) * (jnp.log(n) + (n - 1) * log_rest - (n - 1) / n) + hit * jnp.log(
        jnp.where(ratio > 0, ratio, 1)
    )
    return jnp.where(certain, 0, value)
