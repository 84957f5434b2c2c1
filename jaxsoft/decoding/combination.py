"""Logits of several models or sources as one: fusion, guidance, retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.decoding.transforms import Transform, _number
from jaxsoft.normalizers import softmax
from jaxsoft.rows import LinearLogits, Logits, reductions

# Grid of alpha in the paper: 0, 0.1, ..., 2.
_GRID = tuple(round(0.1 * i, 1) for i in range(21))
_GOLDEN = 0.6180339887498949


class FusedLogits(NamedTuple):
    """The result of `dynamic_logit_fusion`.

    Attributes:
      logits: `[*rows, columns]`.
      alpha: `[experts, *rows]`, the weight of each expert.
      objective: `[*rows]`, the minimum.
    """

    logits: Array
    alpha: Array
    objective: Array


def _kl(log_p: Array, log_q: Array) -> Array:
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)


def dynamic_logit_fusion(
    logits: Float[Array, "*rows columns"],
    tuned_logits: Float[Array, "experts *rows columns"],
    base_logits: Float[Array, "*rows columns"],
    *,
    alphas: Sequence[float] = _GRID,
    refine: int = 0,
) -> FusedLogits:
    """`logits + alpha (tuned - base)`: carries what small models learned over to a large one, per token.

    alpha minimizes, over the experts t, the sum of `(KL(P'|P) - KL(Q_t|Q))^2 + (KL(P|P') - KL(Q|Q_t))^2`, where P, P',
    Q and Q_t are the softmaxes of the large model, the fused one, the small model, and the tuned small ones. With
    several experts one of them is used at a time, the best one, which is the paper's shortcut.

    Args:
      logits: `[*rows, columns]` of the large model, floating.
      tuned_logits: `[experts, *rows, columns]` of the tuned small models.
      base_logits: `[*rows, columns]` of the small model before it was tuned.
      alphas: the candidates, ascending; static. Ties go to the first expert and the smaller alpha.
      refine: static; steps of a golden-section search around the best candidate (each narrows it to 0.618).

    Returns:
      A `FusedLogits`; a constant alpha of 1 is proxy tuning.

    Raises:
      TypeError: an argument that is not floating.
      ValueError: shapes that do not fit, candidates that are not ascending.

    Reference:
      Fan et al., "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import dynamic_logit_fusion
      >>> small, tuned = jnp.array([1.0, 0.5, 0.0, 0.0]), jnp.array([[0.5, 1.5, 0.0, -0.5]])
      >>> fused = dynamic_logit_fusion(jnp.array([2.0, 1.0, 0.0, -1.0]), tuned, small)
      >>> print(fused.alpha, jax.nn.softmax(fused.logits).round(4))
      [1.] [0.3423 0.5643 0.0764 0.017 ]
    """
    for name, a in (("logits", logits), ("tuned_logits", tuned_logits), ("base_logits", base_logits)):
        if isinstance(a, LinearLogits):
            raise TypeError(f"{name} must be stored, got linear_logits: write logits.dense()")
        _checks.floating(name, a)
    if logits.ndim == 0:
        raise ValueError("logits must have shape [*rows, columns], got a scalar")
    _checks.shape("base_logits", base_logits, logits.shape, "that of logits")
    if tuned_logits.ndim == 0 or tuned_logits.shape[0] == 0:
        raise ValueError(f"tuned_logits must have shape [experts, *rows, columns], got {tuned_logits.shape}")
    _checks.shape(
        "tuned_logits", tuned_logits, (tuned_logits.shape[0], *logits.shape), "logits of each expert"
    )
    refine = _checks.integer("refine", refine, at_least=0)
    grid = [_checks.static_number("alphas", a) for a in alphas]
    if not grid or sorted(set(grid)) != grid:
        raise ValueError(f"alphas must be numbers in ascending order, got {tuple(alphas)}")
    logits, tuned_logits, base_logits = map(jnp.asarray, (logits, tuned_logits, base_logits))
    dtype = accumulation_dtype(logits.dtype, tuned_logits.dtype, base_logits.dtype)
    large, tuned, base = (a.astype(dtype) for a in (logits, tuned_logits, base_logits))
    log_p, log_q, log_t = (jax.nn.log_softmax(a, axis=-1) for a in (large, base, tuned))
    change = tuned - base
    forward, backward = _kl(log_t, log_q), _kl(log_q, log_t)  # [experts, *rows]

    def objective(alpha):  # [experts, *rows] -> the same: one expert is used, all count
        log_f = jax.nn.log_softmax(large + alpha[..., None] * change, axis=-1)
        f, b = _kl(log_f, log_p), _kl(log_p, log_f)
        return jnp.sum((f[:, None] - forward) ** 2 + (b[:, None] - backward) ** 2, axis=1)

    shape = forward.shape
    candidates = jnp.asarray(grid, dtype)
    values = jax.lax.map(lambda a: objective(jnp.broadcast_to(a, shape)), candidates)
    best = jnp.argmin(values, axis=0)
    alpha, value = candidates[best], jnp.min(values, axis=0)
    if refine and len(grid) > 1:
        low, high = candidates[jnp.maximum(best - 1, 0)], candidates[jnp.minimum(best + 1, len(grid) - 1)]

        def narrow(_, interval):
            low, high = interval
            a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            left = objective(a) <= objective(b)
            return jnp.where(left, low, a), jnp.where(left, b, high)

        low, high = jax.lax.fori_loop(0, refine, narrow, (low, high))
        middle = (low + high) / 2
        refined = objective(middle)
        alpha, value = jnp.where(refined < value, middle, alpha), jnp.minimum(refined, value)
    chosen = jax.nn.one_hot(jnp.argmin(value, axis=0), shape[0], axis=0, dtype=dtype)
    alpha = alpha * chosen
    return FusedLogits(large + jnp.sum(alpha[..., None] * change, axis=0), alpha, jnp.min(value, axis=0))


def guidance(other: Logits, guidance_scale: float | Float[Array, "*rows"]) -> Transform:
    """`other + guidance_scale (logits - other)`: classifier-free guidance, away from another row of logits.

    1 leaves the logits as they are, 0 takes the other ones; above 1 exaggerates the difference. Nothing is stored if
    neither is: both are read in one pass. (transformers takes log-probabilities, which differ by a constant per row.)

    Args:
      other: `[*rows, columns]`, an array or `linear_logits`: of the same tokens without the condition, or of a weaker
        model. A token that is absent from either is rejected.
      guidance_scale: a number or one per row.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: when applied, logits of another shape.

    Reference:
      Sanchez et al., "Stay on topic with Classifier-Free Guidance".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import guidance
      >>> print(guidance(jnp.array([1.0, 1.0]), 1.5)(jnp.array([1.0, 2.0])))
      [1.  2.5]
    """
    _checks.floating("other", other)
    return Transform(_guided, {"other": other, "scale": _number("guidance_scale", guidance_scale)})


def _guided(rows, *, other, scale):
    _checks.shape("other", other, rows.shape, "the shape of the logits")
    return rows.then(_away, rows.per_row("guidance_scale", scale), entry_args=(other,))


def _away(x, cols, scale, other):
    present = other != -jnp.inf
    other = jnp.where(present, other, 0).astype(x.dtype)
    return jnp.where(present, other + scale * (x - other), -jnp.inf)


def knn_lm_interpolate(
    distances: Float[Array, "*rows k"],
    values: Int[Array, "*rows k"],
    *,
    weight: float | Float[Array, "*rows"] = 0.25,
    temperature: float | Float[Array, "*rows"] = 1.0,
) -> Transform:
    """`log(weight p_knn + (1 - weight) softmax(logits))`, with the tokens that followed the nearest contexts; one pass.

    `p_knn(y)` is the sum of `softmax(-distances / temperature)` over the neighbours with value y.

    Args:
      distances: `[*rows, k]` of the neighbours; `inf` for none.
      values: `[*rows, k]` integers, their tokens. A value out of range counts as no neighbour.
      weight: in [0, 1], a number or one per row. Rows without neighbours keep their softmax.
      temperature: positive, a number or one per row.

    Returns:
      A `Transform`, to log-probabilities. A token that is absent from the logits stays absent.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Khandelwal et al., "Generalization through Memorization: Nearest Neighbor Language Models", studied by Chiang et
      al., "On Retrieval Augmentation and the Limitations of Language Model Training".

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import knn_lm_interpolate
      >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
      >>> mixed = knn_lm_interpolate(jnp.array([1.0, 1.0]), jnp.array([1, 2]), weight=0.5)(logits)
      >>> print(np.asarray(jnp.exp(mixed)).round(3))
      [0.25 0.4  0.35]
    """
    _checks.floating("distances", distances)
    _checks.integers("values", values)
    if distances.ndim == 0:
        raise ValueError("distances must have shape [*rows, k], got a scalar")
    _checks.shape("values", values, distances.shape, "one token per distance")
    arguments = {
        "distances": distances,
        "values": values,
        "weight": _number("weight", weight, at_least=0, at_most=1),
        "temperature": _number("temperature", temperature, above=0),
    }
    return Transform(_interpolated, arguments)


def _interpolated(rows, *, distances, values, weight, temperature):
    if distances.shape[:-1] != rows.rows:
        raise ValueError(f"distances must have shape {(*rows.rows, 'k')}, got shape {distances.shape}")
    weight = rows.per_row("weight", weight)
    t = rows.per_row("temperature", temperature)
    counts = (values >= 0) & (values < rows.columns)
    x = jnp.where(counts, -distances.astype(rows.dtype) / t[..., None], -jnp.inf)
    p = softmax(x)
    weight = jnp.where(jnp.any(p > 0, axis=-1), weight, 0)
    flat = p.reshape(-1, p.shape[-1])
    ids = jnp.where(counts, values, rows.columns).reshape(flat.shape).astype(jnp.int32)
    sums = jnp.zeros((flat.shape[0], rows.columns), rows.dtype)
    sums = sums.at[jnp.arange(flat.shape[0])[:, None], ids].add(flat, mode="drop").reshape(rows.shape)
    partition = rows.reduce(reductions.log_partition())
    shift, log_sum = partition.shift, jnp.where(partition.log_sum == -jnp.inf, 0, partition.log_sum)
    return rows.then(_mixed, shift, log_sum, weight, entry_args=(sums,))


def _mixed(x, cols, shift, log_sum, weight, p: Any):
    tiny = jnp.finfo(x.dtype).tiny
    log_knn = jnp.where(p > 0, jnp.log(jnp.maximum(p, tiny)), -jnp.inf)
    return jnp.logaddexp(jnp.log(weight) + log_knn, jnp.log1p(-weight) + ((x - shift) - log_sum))
