"""Exponential normalizers: softmax and its variants.

In the formulas `x` are the scores of a row and `p = softmax(x)`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, is_present, safe_divide
from jaxsoft._roots import differentiable, search
from jaxsoft.normalizers._exponential import (
    SOFTMAX,
    SUM,
    coefficient,
    exponentials,
    rescale,
    scaled,
    times_scale,
    with_sink,
)
from jaxsoft.normalizers._normalizer import Normalizer, after, defined_by, normalize, together
from jaxsoft.normalizers.quantized import quantize
from jaxsoft.rows import reductions
from jaxsoft.rows.inner import check_axis, check_dense, compiled, log_partition, softmax_with
from jaxsoft.rows.reductions import LogPartition

Scores = Float[Array, "*rows columns"]

# Each public function stands below its definition, which attention uses too.


def _softmax(rows):
    del rows
    return SOFTMAX


@defined_by(_softmax)
def softmax(
    scores: Float[Array, "*rows columns"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows columns"]:
    """`exp(x_i) / sum_j exp(x_j)` over each row.

    Like `jax.nn.softmax`, but sums half-precision rows in float32, and the weights of a row without entries are 0.

    Args:
      scores: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts. A masked entry is absent, even if it is NaN.
      implementation: what runs it: `"xla"`, `"pallas_tpu"`, `"mosaic_gpu"` or None, see `reduce_rows`.

    Returns:
      Weights of the scores' shape and dtype, exact to a few units in the last place of the accumulation dtype
      before they are rounded to it; 0 for absent entries.

    Raises:
      TypeError: scores that are not a floating array (for `linear_logits`, pass `logits.dense()`).
      ValueError: an axis or a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.224208 0.60946  0.030343 0.135989]
    """
    check_dense(scores, "softmax")
    return softmax_with(scores, axis=axis, where=where, implementation=implementation)


def log_softmax(
    scores: Float[Array, "*rows columns"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows columns"]:
    """`x_i - logsumexp(x)` over each row.

    Args:
      scores: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.
      implementation: what runs it: `"xla"`, `"pallas_tpu"`, `"mosaic_gpu"` or None, see `reduce_rows`.

    Returns:
      Log-weights of the scores' shape and dtype; -inf, with gradient 0, for absent entries.

    Raises:
      TypeError: scores that are not a floating array (for `linear_logits`, pass `logits.dense()`).
      ValueError: an axis or a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.log_softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [-1.495182 -0.495182 -3.495182 -1.995182]
    """
    check_dense(scores, "log_softmax")
    axis = check_axis(scores, axis)
    partition = log_partition(scores, axis=axis, where=where, implementation=implementation).along(axis)
    x = scores.astype(accumulation_dtype(scores.dtype))
    present = is_present(x, where)
    return jnp.where(present, partition.log_softmax(jnp.where(present, x, 0)), -jnp.inf).astype(scores.dtype)


def _softmax_n(rows, *, n=1.0):
    if _checks.is_concrete_number(n):
        _checks.number("n", n, at_least=0)
    return with_sink(SOFTMAX, jnp.log(rows.per_row("n", n)))


@defined_by(_softmax_n)
def softmax_n(
    scores: Scores,
    *,
    n: float | Float[Array, "#*rows"] = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`exp(x_i) / (n + sum_j exp(x_j))`: softmax that may attend to nothing.

    The rows sum to less than 1, and to 0 in the limit of low scores; it is not shift invariant. Exact for scores of
    any size (the reference exponent is `max(log n, max x)`).

    Args:
      scores: `[*rows, columns]`, floating.
      n: the mass of attending to nothing, 0 or more: a number, or an array that broadcasts to `[*rows]`.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Hu et al., "Outlier-Efficient Hopfield Layers for Large Transformer-Based Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.softmax_n(jnp.array([1.0, 2.0, -1.0, 0.5]), n=2.0).round(6))
      [0.192459 0.523158 0.026047 0.116732]
    """
    return normalize(_softmax_n, scores, axis, where, "softmax_n", n=n)


def _softmax_one(rows):
    return _softmax_n(rows, n=1.0)


@defined_by(_softmax_one)
def softmax_one(scores: Scores, *, axis: int = -1, where: Bool[Array, ...] | None = None) -> Scores:
    """`exp(x_i) / (1 + sum_j exp(x_j))`: softmax-1, `softmax_n` with n = 1, a sink of logit 0.

    Args:
      scores: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Hu et al., "Outlier-Efficient Hopfield Layers for Large Transformer-Based Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.softmax_one(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.207124 0.563021 0.028031 0.125627]
    """
    return normalize(_softmax_one, scores, axis, where, "softmax_one")


def _sink_softmax(rows, *, sink):
    return with_sink(SOFTMAX, rows.per_row("sink", sink))


@defined_by(_sink_softmax)
def sink_softmax(
    scores: Scores,
    *,
    sink: float | Float[Array, "#*rows"],
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`exp(x_i) / (exp(sink) + sum_j exp(x_j))`: softmax with a learned sink, a logit without a value.

    Args:
      scores: `[*rows, columns]`, floating.
      sink: the logit of the sink: a number, or an array that broadcasts to `[*rows]` (one number per
        head, in attention); differentiable. It is not scaled or capped with the scores.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      The attention sinks of the gpt-oss models.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.sink_softmax(jnp.array([1.0, 2.0, -1.0, 0.5]), sink=0.7).round(6))
      [0.192272 0.522649 0.026021 0.116619]
    """
    return normalize(_sink_softmax, scores, axis, where, "sink_softmax", sink=sink)


def masked_logit_softmax(
    scores: Scores,
    mask: Bool[Array, ...],
    *,
    masked_logit: float = -jnp.inf,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`softmax(where(mask, x, masked_logit))`: scores outside `mask` become a constant, without gradient.

    For continual learning: a finite constant keeps some mass on the classes of other tasks, and so some gradient on
    the scores inside; `-inf` is softmax over the scores inside. Neither for inference nor for distillation terms.

    Args:
      scores: `[*rows, columns]`, floating.
      mask: booleans that broadcast to the scores, True = the score is used unchanged.
      masked_logit: the constant for the other scores. The default is ours; the paper tunes it.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Kim et al., "Revisiting Softmax Masking for Stability in Continual Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> mask = jnp.array([True, True, False, False])
      >>> x = jnp.array([1.0, 2.0, -1.0, 0.5])
      >>> print(jaxsoft.normalizers.masked_logit_softmax(x, mask, masked_logit=-1.5).round(6))
      [0.257569 0.700146 0.021143 0.021143]
    """
    check_dense(scores, "masked_logit_softmax")
    _checks.floating("scores", scores)
    _checks.boolean("mask", mask)
    _checks.broadcastable("mask", mask, scores.shape, "the shape of the scores")
    # Not a `where`: entries replaced by a finite constant count.
    return softmax(jnp.where(mask, scores, masked_logit), axis=axis, where=where)


def _scalable_softmax(rows, *, scale=0.43, bias=0.0):
    log_n = jnp.log(jnp.maximum(rows.count(), 1))
    return scaled(SOFTMAX, rows.per_row("scale", scale) * log_n + rows.per_row("bias", bias), positive=False)


@defined_by(_scalable_softmax)
def scalable_softmax(
    scores: Scores,
    *,
    scale: float | Float[Array, "#*rows"] = 0.43,
    bias: float | Float[Array, "#*rows"] = 0.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """Scalable-Softmax, `softmax((scale log n + bias) x)` with n the number of present entries of the row.

    Keeps attention from fading as the context grows.

    Args:
      scores: `[*rows, columns]`, floating.
      scale: the factor of `log n`, learnable, one for each head and layer: a number, or an array that broadcasts to
        `[*rows]`. The default is the slope that the authors fitted.
      bias: the constant of the variant with bias, of the same kind.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Nakanishi, "Scalable-Softmax Is Superior for Attention".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.scalable_softmax(jnp.array([1.0, 2.0, -1.0, 0.5]), scale=1.0).round(6))
      [0.179775 0.719101 0.011236 0.089888]
    """
    return normalize(_scalable_softmax, scores, axis, where, "scalable_softmax", scale=scale, bias=bias)


# Fitted by the authors, highest power first.
ADAPTIVE_COEFFICIENTS = (-0.037, 0.481, -2.3, 4.917, -1.791)


def _adaptive_temperature_softmax(
    rows, *, coefficients=ADAPTIVE_COEFFICIENTS, threshold=0.5, stop_gradient=False
):
    _checks.flag("stop_gradient", stop_gradient)
    source = rows.detached() if stop_gradient else rows
    entropy = source.reduce(reductions.softmax_moments(variance=False)).entropy
    return scaled(SOFTMAX, adaptive_sharpness(entropy, coefficients, threshold))


def adaptive_sharpness(entropy: Array, coefficients: Sequence[float], threshold: Any) -> Array:
    """`beta = max(1, P(H))`, and 1 for entropies H of at most `threshold`."""
    beta = jnp.zeros_like(entropy)
    for c in jnp.asarray(coefficients, entropy.dtype):
        beta = beta * entropy + c
    return jnp.where((entropy > threshold) & (beta > 1), beta, 1)


@defined_by(_adaptive_temperature_softmax)
def adaptive_temperature_softmax(
    scores: Scores,
    *,
    coefficients: Sequence[float] = ADAPTIVE_COEFFICIENTS,
    threshold: float = 0.5,
    stop_gradient: bool = False,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`softmax(beta x)` with `beta = max(1, P(H))` a polynomial of the row's own entropy: sharper where it is flat.

    Meant for inference. With the authors' coefficients beta exceeds 1 for entropies from 0.849 to 5.945 nats only
    (5.945 is uniform over 381 entries: flatter rows are left unchanged).

    Args:
      scores: `[*rows, columns]`, floating.
      coefficients: the coefficients of P, highest power first; the defaults were fitted to one small model.
      threshold: entropy in nats below which rows are left unchanged.
      stop_gradient: whether to stop the gradient through beta.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Velickovic et al., "softmax is not enough (for sharp out-of-distribution)".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.adaptive_temperature_softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.190735 0.694977 0.014366 0.099922]
    """
    _checks.number("threshold", threshold)
    return normalize(
        _adaptive_temperature_softmax,
        scores,
        axis,
        where,
        "adaptive_temperature_softmax",
        coefficients=tuple(coefficients),
        threshold=threshold,
        stop_gradient=stop_gradient,
    )


def _centred_moments(scale, top):
    """The moments of `scale * (x - top)`, which are accurate for large scores."""
    reduction = after(_MOMENTS, (_minus_top, times_scale))
    return reduction._replace(finalize=_MOMENTS.finalize, args=({"scale": scale, "top": top},))


def _minus_top(tile, params):
    return tile.with_values(tile.x - params["top"][..., None])


_MOMENTS = reductions.softmax_moments()


# Entropy decreases in log(beta), with slope -variance(beta x). The range of beta, relative to the spread of the row, is
# ours: at its lower end a row is uniform to seven digits, at its upper end one-hot unless two scores are equal.
_LOG_BETA_RANGE = (-9.0, 18.0)
_NEWTON_STEPS = 60


def _entropy_target_softmax(rows, *, entropy):
    target = rows.per_row("entropy", entropy)
    fixed = rows.detached()
    top, low = fixed.reduce((reductions.maximum(), _MINIMUM))
    present = jnp.isfinite(top)
    top, low = jnp.where(present, top, 0), jnp.where(present, low, 0)
    spread = top - low
    log_spread = jnp.log(jnp.where(spread > 0, spread, 1))
    lo, hi = (bound - log_spread for bound in _LOG_BETA_RANGE)

    root, step = lax.stop_gradient(_log_beta(fixed, *lax.stop_gradient((lo, hi, top, target))))
    log_beta = differentiable(_newton_step, root, rows, top, target)
    reached = jnp.abs(step) < 0.1  # elsewhere the target cannot be met
    return scaled(SOFTMAX, jnp.exp(jnp.where(reached, log_beta, root)))


def _newton(rows, top, target, log_beta) -> tuple[Array, Array]:
    """`log_beta` after a Newton step, and the excess of the entropy before it."""
    moments = rows.reduce(_centred_moments(jnp.exp(log_beta), top))
    excess = moments.entropy - target
    flat = moments.variance == 0  # the step is as long as it can be
    step = jnp.where(flat, jnp.copysign(jnp.inf, excess), safe_divide(excess, moments.variance))
    return log_beta + step, excess


def _newton_step(rows, top, target, log_beta) -> Array:
    return _newton(rows, top, target, log_beta)[0]


@compiled
def _log_beta(rows, lo, hi, top, target) -> tuple[Array, Array]:
    """The log of the beta between two bounds that gives a row this entropy, and the last step of the search."""
    tolerance = 8 * float(jnp.finfo(rows.dtype).eps)

    def improve(log_beta, unfinished):
        return _newton(rows, top, target, log_beta)

    return search(improve, lo, hi, (2 * lo + hi) / 3, tolerance, _NEWTON_STEPS)


def _negated(tile, params):
    return tile.with_values(-tile.x)


_MAXIMUM = reductions.maximum_and_argmax()
_NEGATED_MINIMUM = after(_MAXIMUM, (_negated,))


def _minimum_of(state, params):
    return -state[0]


_MINIMUM = _NEGATED_MINIMUM._replace(finalize=_minimum_of, args=({},))


@defined_by(_entropy_target_softmax)
def entropy_target_softmax(
    scores: Scores,
    *,
    entropy: float | Float[Array, "#*rows"],
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`softmax(x / tau)` with the temperature tau at which its entropy is `entropy`.

    A robust (DRO) softmax loss of radius `log(columns) - entropy` chooses this temperature by itself. The gradient
    includes that of the temperature.

    Args:
      scores: `[*rows, columns]`, floating.
      entropy: the target in nats, strictly between 0 and `log(columns)`: a number, or an array that broadcasts to
        `[*rows]`. Where no temperature reaches it (ties at the top, or too few entries), the closest one is used.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Qiu et al., "To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO" (the
      parameter-free form is derived from its loss, not in the paper).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x = jnp.array([1.0, 2.0, -1.0, 0.5])
      >>> print(jaxsoft.normalizers.entropy_target_softmax(x, entropy=0.8).round(5))
      [0.17682 0.72537 0.01051 0.0873 ]
    """
    if _checks.is_concrete_number(entropy):
        _checks.number("entropy", entropy, above=0)
    return normalize(_entropy_target_softmax, scores, axis, where, "entropy_target_softmax", entropy=entropy)


def _weighted_scores(tile, state, params):
    w = exponentials(tile, state[0], params)
    return (tile.x * w,)


def _adjust_terms(tile, state, params):
    w = exponentials(tile, state[0][0], params)
    return tile.x * w, w


def _adjust_rescale(old, new, params):
    return rescale(old[0], new[0], params)


def _adjust_coefficients(state, params):
    (_, s), (top, _), (negated_low, _) = state
    present = s > 0
    a = jnp.minimum(jnp.where(present, -negated_low, 0), 0)
    b = jnp.maximum(jnp.where(present, top, 0), 0)
    c = safe_divide(jnp.ones_like(s), (b - a) * s)
    return c, -a * c


_SELF_ADJUST = Normalizer(SUM, _weighted_scores, coefficient, rescale)
_NORMALIZED_SELF_ADJUST = Normalizer(
    together(SUM, _MAXIMUM, _NEGATED_MINIMUM), _adjust_terms, _adjust_coefficients, _adjust_rescale, size=2
)


def _self_adjust_softmax(rows, *, normalized=True):
    del rows
    _checks.flag("normalized", normalized)
    return _NORMALIZED_SELF_ADJUST if normalized else _SELF_ADJUST


@defined_by(_self_adjust_softmax)
def self_adjust_softmax(
    scores: Scores, *, normalized: bool = True, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Scores:
    """Self-Adjust Softmax, `w_i p_i` with `w` the scores rescaled to [0, 1]: gradients that do not vanish.

    `w = (x - a) / (b - a)` with `a = min(0, min x)`, `b = max(0, max x)`; not normalized, `w = x`.

    Args:
      scores: `[*rows, columns]`, floating.
      normalized: whether the scores are rescaled to [0, 1] (weights in [0, 1], rows that sum to at most 1) or used
        unchanged (weights of any sign and size).
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries. A row of zeros gives zeros.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Zheng et al., "Self-Adjust Softmax".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.self_adjust_softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.149472 0.60946  0.       0.067994]
    """
    return normalize(_self_adjust_softmax, scores, axis, where, "self_adjust_softmax", normalized=normalized)


# Functions of the probabilities: one pass for the log-sum-exp, one for the weights.


def _partition_params(rows) -> dict[str, Any]:
    return rows.reduce(reductions.log_partition())._asdict()


def probabilities(tile, params):
    """Softmax probabilities, from the log-sum-exp in parts."""
    partition = LogPartition(*(params[name][..., None] for name in LogPartition._fields))
    return jnp.exp(partition.log_softmax(tile.scores))


def _clipped_terms(tile, state, params):
    zeta, gamma = params["zeta"][..., None], params["gamma"][..., None]
    stretched = (zeta - gamma) * probabilities(tile, params) + gamma
    return (jnp.where(tile.keep, jnp.clip(stretched, 0, 1), 0),)


def one(state, params):
    """The coefficient of terms that already are weights."""
    return (jnp.ones_like(params["log_sum"]),)


def _clipped_softmax(rows, *, zeta=1.1, gamma=-0.1):
    params = _partition_params(rows)
    params |= {"zeta": rows.per_row("zeta", zeta), "gamma": rows.per_row("gamma", gamma)}
    return Normalizer(None, _clipped_terms, one, params=params)


@defined_by(_clipped_softmax)
def clipped_softmax(
    scores: Scores,
    *,
    zeta: float | Float[Array, "#*rows"] = 1.1,
    gamma: float | Float[Array, "#*rows"] = -0.1,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`clip((zeta - gamma) softmax(x) + gamma, 0, 1)`: softmax that reaches exact zeros and ones.

    Args:
      scores: `[*rows, columns]`, floating.
      zeta: the upper end of the stretched range, 1 or more: a number, or an array that broadcasts to `[*rows]`.
      gamma: its lower end, 0 or less, of the same kind. Attention uses zeta = 1 and gamma = -alpha / length.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Hu et al., "Outlier-Efficient Hopfield Layers for Large Transformer-Based Models" (its code).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.clipped_softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.169049 0.631352 0.       0.063187]
    """
    return normalize(_clipped_softmax, scores, axis, where, "clipped_softmax", zeta=zeta, gamma=gamma)


@functools.cache
def _quantized_terms(bits: int):
    def terms(tile, state, params):
        p = probabilities(tile, params)
        weights = p + lax.stop_gradient(quantize(p, bits) - p) + params["bias"][..., None]
        return (jnp.where(tile.keep, weights, 0),)

    return terms


def _quantized_softmax(rows, *, bits=8, bias=0.0):
    params = {**_partition_params(rows), "bias": rows.per_row("bias", bias)}
    return Normalizer(None, _quantized_terms(bits), one, params=params)


@defined_by(_quantized_softmax)
def quantized_softmax(
    scores: Scores,
    *,
    bits: int = 8,
    bias: float | Float[Array, "#*rows"] = 0.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`round(s p_i) / s + bias` with `s = 2^bits - 1`: softmax, quantized, and a bias that makes up for the rounding.

    Entries below half a step round to 0, so that long rows lose most of their mass; the bias, the mean of
    `softmax - rounded` over calibration data (`quantized_softmax_bias_correction`), restores it. The gradient passes
    straight through the rounding. Reconstructed from the abstract: the scale is ours.

    Args:
      scores: `[*rows, columns]`, floating.
      bits: the bits of the unsigned quantizer, a static integer from 1 to 16.
      bias: a number, or an array that broadcasts to `[*rows]` (one number per head, in attention).
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Pandey et al., "Softmax Bias Correction for Quantized Generative Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x = jnp.array([1.0, 2.0, -1.0, 0.5])
      >>> print(jaxsoft.normalizers.quantized_softmax(x, bits=4, bias=0.016667).round(6))
      [0.216667 0.616667 0.016667 0.15    ]
    """
    bits = _checks.integer("bits", bits, at_least=1, at_most=16)
    return normalize(_quantized_softmax, scores, axis, where, "quantized_softmax", bits=bits, bias=bias)
