"""Truncations with a theory: Bregman top-k with its optimal k, and acceptance certified by the output embedding."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.decoding.transforms import Transform, _number
from jaxsoft.rows import reductions
from jaxsoft.rows.inner import Selection

_STEPS = 60  # bisections: more than float64 needs


# phi_a(x) = x^a / (a (a - 1)), and x log x for a = 1. Kept probabilities q and dropped ones 0 stand against p.


def _phi(x: Array, a: float) -> Array:
    if a == 1:
        return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1)), 0)
    return x**a / (a * (a - 1))


def _slope(x: Array, a: float) -> Array:
    safe = jnp.where(x > 0, x, 1)
    slope = jnp.log(safe) + 1 if a == 1 else safe ** (a - 1) / (a - 1)
    return jnp.where(x > 0, slope, 0)


def _distance(x: Array, y: Array, a: float) -> Array:
    """`phi(x) - phi(y) - phi'(y) (x - y)`, per entry."""
    return _phi(x, a) - _phi(y, a) - _slope(y, a) * (x - y)


def _dropped(p: Array, a: float, dual: bool) -> Array:
    """The distance of a dropped entry: `D(p, 0)` in the dual, `D(0, p)` in the primal."""
    return p**a / (a * (a - 1)) if dual else p**a / a


def _kept(p: Array, nu: Array, a: float, dual: bool) -> Array:
    """The probability of a kept entry, with the multiplier nu (the mass of the kept entries for a = 1)."""
    if not dual:
        return p / nu if a == 1 else (p ** (a - 1) + nu) ** (1 / (a - 1))
    if a == 2:
        return p + nu
    if a == 1.5:
        return ((nu + jnp.sqrt(nu * nu + 4 * p)) / 2) ** 2
    if a == 3:
        return (p + jnp.sqrt(p * p + 4 * nu)) / 2

    def halve(_, interval):  # q^(a-2) (q - p) = nu; the left side increases in q
        low, high = interval
        q = (low + high) / 2
        over = q ** (a - 2) * (q - p) > nu
        return jnp.where(over, low, q), jnp.where(over, q, high)

    start = jnp.broadcast_to(p, jnp.broadcast_shapes(p.shape, nu.shape))
    low, high = jax.lax.fori_loop(0, _STEPS, halve, (start, jnp.ones_like(start)))
    return (low + high) / 2


class _Decision(NamedTuple):
    """k*, `[*rows]`; the multiplier nu for it; the costs of k = 1, 2, ..., `[*rows, k_max]`, up to a constant."""

    k: Array
    nu: Array
    costs: Array


def _decide(p: Array, penalty: Array, a: float, dual: bool) -> _Decision:
    """The optimal k for descending probabilities `[*rows, k_max]`."""
    k_max = p.shape[-1]
    kept = jnp.tril(jnp.ones((k_max, k_max), bool))  # [k, i]
    p_i, first = p[..., None, :], p[..., :1]
    if a == 1 and not dual:
        nu = jnp.cumsum(p, axis=-1)
    else:
        bound = 1 - (first if dual else jnp.where(first > 0, first, 1) ** (a - 1))
        zero, bound = jnp.zeros_like(p), jnp.broadcast_to(bound, p.shape)
        # The mass of the kept entries is at most 1 at `low`, at least 1 at `high`.

        def halve(_, interval):
            low, high = interval
            nu = (low + high) / 2
            mass = jnp.sum(jnp.where(kept, _kept(p_i, nu[..., None], a, dual), 0), axis=-1)
            return jnp.where(mass > 1, low, nu), jnp.where(mass > 1, nu, high)

        low, high = jax.lax.fori_loop(0, _STEPS, halve, (zero, bound))
        nu = (low + high) / 2
    q = _kept(p_i, nu[..., None], a, dual)
    distance = _distance(p_i, q, a) if dual else _distance(q, p_i, a)
    dropped = _dropped(p_i, a, dual)
    k = jnp.arange(1, k_max + 1)
    costs = jnp.sum(jnp.where(kept, distance, dropped), axis=-1) + penalty[..., None] * k
    costs = jnp.where((p > 0) | (k == 1), costs, jnp.inf)  # there are as many entries
    best = jnp.argmin(costs, axis=-1)
    return _Decision(best + 1, jnp.take_along_axis(nu, best[..., None], axis=-1)[..., 0], costs)


def bregman_top_k(
    penalty: float | Float[Array, "*rows"], *, alpha: float = 1.5, dual: bool = False, k_max: int = 64
) -> Transform:
    """Keeps the k most probable tokens with the k that minimizes `D(q, p) + penalty * k`, and q for p; one pass.

    D is the Bregman divergence of `phi(x) = x^alpha / (alpha (alpha - 1))` (`x log x` for 1), and q its minimizer among
    distributions on k tokens: `q = (p^(alpha-1) + nu)^(1/(alpha-1))` with nu such that q sums to 1; renormalization for
    alpha = 1, an equal share of the missing mass for 2. All k up to `k_max` are evaluated.

    Args:
      penalty: the cost of a token, 0 or more, a number or one per row.
      alpha: positive, static.
      dual: static; minimizes `D(p, q)` instead, which needs alpha > 1: `q^(alpha-2) (q - p) = nu`.
      k_max: the largest k, static.

    Returns:
      A `Transform`, to log-probabilities: those of q, and -inf. Of equal k the smaller is taken.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: an argument out of range.

    Reference:
      Noarov et al., "Foundations of Top-k Decoding For Language Models". The setting is the paper's, the solutions in
      closed form and by bisection are derived here.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import bregman_top_k
      >>> logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03]))
      >>> print(np.asarray(jnp.exp(bregman_top_k(0.01, alpha=2.0)(logits))).round(4))
      [0.5333 0.2833 0.1833 0.     0.    ]
    """
    alpha = _checks.static_number("alpha", alpha, above=0)
    _checks.flag("dual", dual)
    if dual and alpha <= 1:
        raise ValueError(f"alpha must be > 1 with dual=True, where D(p, 0) is finite, got {alpha}")
    options = (("alpha", alpha), ("dual", dual), ("k_max", _checks.integer("k_max", k_max, at_least=1)))
    return Transform(_bregman, {"penalty": _number("penalty", penalty, at_least=0)}, options)


def _bregman(rows, *, penalty, alpha, dual, k_max):
    penalty = rows.per_row("penalty", penalty)
    if rows.columns == 0:
        return rows
    k_max = min(k_max, rows.columns)
    found = rows.detached().reduce({"best": reductions.top_k(k_max + 1), "lse": reductions.logsumexp()})
    best, lse = found["best"], jnp.where(jnp.isneginf(found["lse"]), 0, found["lse"])
    decision = _decide(jnp.exp(best.values[..., :k_max] - lse[..., None]), penalty, alpha, dual)
    return rows.then(_bregman_map(alpha, dual), lse, decision.nu, *Selection.of(best, decision.k))


@functools.cache
def _bregman_map(alpha: float, dual: bool):
    def weights(x, cols, lse, nu, *selection):
        q = _kept(jnp.exp(x - lse), nu, alpha, dual)
        return jnp.where(Selection(*selection).holds(x, cols), jnp.log(q), -jnp.inf)

    return weights


def basis_aware_accept(
    probs: Float[Array, "*rows columns"],
    embedding: Float[Array, "columns d"],
    delta: float | Float[Array, "*rows"],
    *,
    candidates: int = 32,
    iterations: int = 40,
) -> Bool[Array, "*rows columns"]:
    """Which tokens certainly have a positive true probability, given that the model's errors are bounded.

    The true probabilities r have the same product with the output embedding E as the model's, `E' r = E' p`, and are at
    most `p / (1 - delta)` each. Token t is certified if no such distribution has `r_t = 0`. Tokens of probability
    `delta` or more are certified at once; of the others, the `candidates` most probable ones are examined.

    The paper solves a linear program per token. Here a certificate of its infeasibility is sought, by weighted least
    squares (our own method): a combination g of the columns of E and a constant, with `g_t = 1`, such that
    `sum_{i != t} p_i max(delta / (1 - delta) g_i, -g_i) < p_t`. What is accepted is certified; a token is rejected when
    none is found.

    Args:
      probs: `[*rows, columns]`, floating, distributions.
      embedding: `[columns, d]`: the output embedding, or its scores on the leading singular vectors (about 20).
      delta: in [0, 1), a number or one per row.
      candidates: static, how many tokens below delta are examined in each row.
      iterations: static, of the search.

    Returns:
      `[*rows, columns]` booleans, for `mask_logits`. The most probable token is always accepted.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Finlayson et al., "Closing the Curious Case of Neural Text Degeneration".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import basis_aware_accept
      >>> E = jnp.array([[1.0, 0.0], [0.8, 0.2], [0.0, 1.0], [0.1, 0.9], [0.5, 0.5]])
      >>> print(basis_aware_accept(jnp.array([0.4, 0.25, 0.2, 0.1, 0.05]), E, 0.35))
      [ True False  True False False]
    """
    _checks.floating("probs", probs)
    _checks.floating("embedding", embedding)
    delta = _number("delta", delta, at_least=0, below=1)
    iterations = _checks.integer("iterations", iterations, at_least=1)
    candidates = _checks.integer("candidates", candidates, at_least=1)
    if probs.ndim == 0:
        raise ValueError("probs must have shape [*rows, columns], got a scalar")
    *shape, columns = probs.shape
    if embedding.ndim != 2 or embedding.shape[0] != columns:
        raise ValueError(f"embedding must have shape ({columns}, d), got shape {embedding.shape}")
    probs, embedding = jnp.asarray(probs), jnp.asarray(embedding)
    dtype = accumulation_dtype(probs.dtype, embedding.dtype)
    p = probs.astype(dtype).reshape(-1, columns)
    _checks.broadcastable("delta", jnp.asarray(delta), tuple(shape), "one number per row of probs")
    delta = jnp.broadcast_to(jnp.asarray(delta, dtype), tuple(shape)).reshape(-1)
    basis = jnp.concatenate([embedding.astype(dtype), jnp.ones((columns, 1), dtype)], axis=1)

    def of_row(p, delta):
        large = (p >= delta) | (jnp.arange(columns) == jnp.argmax(p))
        small, ids = jax.lax.top_k(jnp.where(large, -1, p), min(candidates, columns))
        certified = jax.lax.map(lambda t: _certified(p, basis, delta, t, iterations), ids)
        return large.at[ids].max(certified & (small > 0))

    return jax.lax.map(lambda args: of_row(*args), (p, delta)).reshape(probs.shape)


def _certified(p: Array, basis: Array, delta: Array, t: Array, iterations: int) -> Array:
    """Whether a certificate of token t is found by least squares with weights `slope / |g|`."""
    slope = delta / jnp.maximum(1 - delta, 1e-10)
    others = jnp.where(jnp.arange(p.shape[0]) == t, 0, p)
    eps = jnp.finfo(p.dtype).eps

    def loss(g):
        return jnp.sum(others * jnp.maximum(slope * g, -g))

    def step(i, carry):
        g, least = carry
        # |g| is smoothed less and less.
        smooth = jnp.maximum(jnp.max(jnp.abs(g)) * 0.5**i, 1e-4)
        weights = others * jnp.where(g > 0, slope, 1) / jnp.maximum(jnp.abs(g), smooth)
        gram = basis.T @ (weights[:, None] * basis)
        ridge = jnp.trace(gram) * (10 * eps) + jnp.finfo(p.dtype).tiny
        y = jnp.linalg.solve(gram + ridge * jnp.eye(gram.shape[0], dtype=p.dtype), basis[t])
        g = basis @ y
        g = g / g[t]
        return g, jnp.minimum(least, jnp.where(jnp.isfinite(loss(g)), loss(g), jnp.inf))

    start = jnp.ones_like(p)
    _, least = jax.lax.fori_loop(0, iterations, step, (start, loss(start)))
    return least < p[t] * (1 - 100 * eps)
