"""Scaling laws.

The loss to expect for a given size of model and data, by plain arithmetic on numbers or arrays. Every constant is an
argument, since the constants of one data set and tokenizer do not hold for another. The defaults are constants quoted
in the literature, for orientation.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from jaxsoft import _checks
from jaxsoft.optimizers._common import Scalar


def _positive(**values: Any) -> None:
    """Checks numbers. Arrays pass: the laws are elementwise."""
    for name, value in values.items():
        if getattr(value, "ndim", 0) == 0:
            _checks.number(name, value, above=0)


def power_law_loss(
    params: Any,
    tokens: Any,
    *,
    params_scale: Scalar = 8.8e13,
    tokens_scale: Scalar = 5.4e13,
    params_exponent: Scalar = 0.076,
    tokens_exponent: Scalar = 0.095,
) -> Any:
    """Loss of a language model, `((Nc / N)^(aN / aD) + Dc / D)^aD`.

    Args:
      params: N, number of parameters without embeddings; numbers or arrays, as all arguments.
      tokens: D, number of training tokens. Infinity gives the law of N alone, `(Nc / N)^aN`.
      params_scale: Nc.
      tokens_scale: Dc.
      params_exponent: aN.
      tokens_exponent: aD.

    Returns:
      The loss in nats per token, broadcast over the arguments. The defaults are the constants commonly quoted
      for the paper's data and tokenizer; fit your own.

    Raises:
      ValueError: for a number that is not positive.

    References:
      "Scaling Laws for Neural Language Models"; "Unraveling the Mystery of Scaling Laws: Part I".

    Example:
      >>> from jaxsoft.optimizers import power_law_loss
      >>> print(round(power_law_loss(1e9, 2e10), 6))
      2.435431
    """
    _positive(
        params=params,
        tokens=tokens,
        params_scale=params_scale,
        tokens_scale=tokens_scale,
        params_exponent=params_exponent,
        tokens_exponent=tokens_exponent,
    )
    return (
        (params_scale / params) ** (params_exponent / tokens_exponent) + tokens_scale / tokens
    ) ** tokens_exponent


class CriticalBatchSize(NamedTuple):
    """Result of `critical_batch_size`; None for what was not given.

    Attributes:
      batch_size: The critical batch size in tokens.
      least_steps: The steps needed with a batch of any size, `steps / (1 + critical / batch)`.
      least_tokens: The tokens needed with the smallest batch, `tokens / (1 + batch / critical)`.
    """

    batch_size: Any
    least_steps: Any
    least_tokens: Any


def critical_batch_size(
    loss: Any,
    *,
    scale: Scalar = 2e8,
    exponent: Scalar = 0.21,
    batch_size: Any = None,
    steps: Any = None,
    tokens: Any = None,
) -> CriticalBatchSize:
    """The batch size where time and compute balance, `B* / loss^(1 / aB)` tokens.

    Below it, twice the batch nearly halves the number of steps; above it, twice the batch nearly doubles the number
    of tokens needed.

    Args:
      loss: The loss reached, positive; numbers or arrays, as all arguments.
      scale: B*, in tokens.
      exponent: aB.
      batch_size: The batch size of a run, in tokens; needed for `steps` and `tokens`.
      steps: The number of steps of that run, to compute the fewest possible.
      tokens: The number of tokens of that run, to compute the fewest possible.

    Returns:
      A `CriticalBatchSize`. The default constants are those commonly quoted for the paper's data.

    Raises:
      ValueError: for a number that is not positive, or steps or tokens without a batch size.

    References:
      "Scaling Laws for Neural Language Models"; "Unraveling the Mystery of Scaling Laws: Part I".

    Example:
      >>> from jaxsoft.optimizers import critical_batch_size
      >>> print(f"{critical_batch_size(3.0).batch_size:.6e}")
      1.069114e+06
    """
    _positive(loss=loss, scale=scale, exponent=exponent)
    optional = {"batch_size": batch_size, "steps": steps, "tokens": tokens}
    given = {name: value for name, value in optional.items() if value is not None}
    _positive(**given)
    if batch_size is None and given:
        raise ValueError(f"batch_size must be given with {' and '.join(given)}, got None")
    critical = scale / loss ** (1 / exponent)
    return CriticalBatchSize(
        critical,
        None if steps is None else steps / (1 + critical / batch_size),
        None if tokens is None else tokens / (1 + batch_size / critical),
    )


class ChinchillaLaw(NamedTuple):
    """Constants of `chinchilla_loss`, `E + A / N^a + B / D^b`.

    Attributes:
      irreducible: E, the loss of infinitely many parameters and tokens.
      params_factor: A.
      tokens_factor: B.
      params_exponent: a.
      tokens_exponent: b.
    """

    irreducible: Any
    params_factor: Any
    tokens_factor: Any
    params_exponent: Any
    tokens_exponent: Any


Law: TypeAlias = ChinchillaLaw | Literal["replication", "original"]

_LAWS = {
    "original": ChinchillaLaw(1.69, 406.4, 410.7, 0.34, 0.28),
    "replication": ChinchillaLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
}


def _chosen(law: Any) -> ChinchillaLaw:
    if not isinstance(law, ChinchillaLaw):
        _checks.option("law", law, tuple(_LAWS))
        return _LAWS[law]
    _positive(**{f"law.{name}": value for name, value in law._asdict().items() if name != "irreducible"})
    return law


def chinchilla_loss(params: Any, tokens: Any, *, law: Law = "replication") -> Any:
    """Loss of a language model, `E + A / N^a + B / D^b`.

    Args:
      params: N, number of parameters; numbers or arrays. Infinity drops its term.
      tokens: D, number of training tokens.
      law: The constants: "replication" (fitted anew to the runs of the original paper, the default),
        "original", or your own `ChinchillaLaw`. To fit one, minimize a Huber loss (delta 1e-3) of the
        difference of logarithms.

    Returns:
      The loss in nats per token, broadcast over the arguments.

    Raises:
      ValueError: for a number that is not positive, or an unknown law.

    References:
      "Chinchilla Scaling: A replication attempt".

    Example:
      >>> from jaxsoft.optimizers import chinchilla_loss
      >>> print(round(chinchilla_loss(1e9, 2e10), 6), round(chinchilla_loss(1e9, 2e10, law="original"), 6))
      2.53005 2.580048
    """
    e, a, b, alpha, beta = _chosen(law)
    _positive(params=params, tokens=tokens)
    return e + a / params**alpha + b / tokens**beta


def chinchilla_optimal(compute: Any, *, law: Law = "replication") -> tuple[Any, Any]:
    """Parameters and tokens of the lowest `chinchilla_loss` for a budget of `6 N D` operations.

    `N = G (C / 6)^(b / (a + b))` with `G = (a A / (b B))^(1 / (a + b))`, and `D = C / (6 N)`.

    Args:
      compute: C, floating-point operations; a number or an array.
      law: As in `chinchilla_loss`.

    Returns:
      `(params, tokens)`.

    Raises:
      ValueError: for a number that is not positive, or an unknown law.

    References:
      "Chinchilla Scaling: A replication attempt".

    Example:
      >>> from jaxsoft.optimizers import chinchilla_optimal
      >>> params, tokens = chinchilla_optimal(1.2e20)
      >>> print(f"{params:.6e} {tokens:.6e}")
      9.370898e+08 2.134267e+10
    """
    _, a, b, alpha, beta = _chosen(law)
    _positive(compute=compute)
    factor = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    params = factor * (compute / 6) ** (beta / (alpha + beta))
    return params, compute / (6 * params)


def rectified_scaling_law(
    tokens: Any, *, learned: Scalar, factor: Scalar, exponent: Scalar, irreducible: Scalar = 0.0
) -> Any:
    """Loss after fine-tuning, `B / (D_l + D^b) + E`: flat for little data, then a power law.

    Args:
      tokens: D, number of fine-tuning tokens; a number or an array, positive.
      learned: D_l, the worth of pre-training on the task, at least 0. With 0 it is a power law.
      factor: B.
      exponent: b.
      irreducible: E, the loss of infinitely much data.

    Returns:
      The loss.

    Raises:
      ValueError: for a number out of range.

    References:
      "Selecting Large Language Model to Fine-tune via Rectified Scaling Law".

    Example:
      >>> from jaxsoft.optimizers import rectified_scaling_law
      >>> print(round(rectified_scaling_law(1e6, learned=1e4, factor=50.0, exponent=0.6, irreducible=0.8), 6))
      0.803576
    """
    _positive(tokens=tokens, factor=factor, exponent=exponent)
    _checks.number("learned", learned, at_least=0)
    _checks.number("irreducible", irreducible)
    return factor / (learned + tokens**exponent) + irreducible


def precision_scaling_law(
    params: Any,
    tokens: Any,
    *,
    bits: tuple[Any, ...] = (),
    sensitivity: tuple[Any, ...] = (),
    law: Law = "original",
) -> Any:
    """Loss of a language model trained in low precision: `chinchilla_loss` of `N prod_i (1 - exp(-P_i / g_i))`.

    Args:
      params: N, number of parameters; numbers or arrays.
      tokens: D, number of training tokens.
      bits: P_i, the bits of weights, activations or cache: one positive number per low precision.
      sensitivity: g_i, one number per entry of `bits`; about 2.67 bits for weights.
      law: As in `chinchilla_loss`; here by default the original constants.

    Returns:
      The loss in nats per token, broadcast over the arguments.

    Raises:
      ValueError: for a number that is not positive, or different numbers of bits and sensitivities.

    References:
      "Scaling Laws for Precision".

    Example:
      >>> from jaxsoft.optimizers import precision_scaling_law
      >>> print(round(precision_scaling_law(1e9, 2e10, bits=(4.0,), sensitivity=(2.67,)), 6))
      2.611846
    """
    if len(bits) != len(sensitivity):
        raise ValueError(
            f"sensitivity must have one number per entry of bits, got {len(sensitivity)} for {len(bits)}"
        )
    for i, (p, g) in enumerate(zip(bits, sensitivity)):
        _positive(**{f"bits[{i}]": p, f"sensitivity[{i}]": g})
        ratio = p / g
        params = params * (-math.expm1(-ratio) if isinstance(ratio, float) else -jnp.expm1(-ratio))
    return chinchilla_loss(params, tokens, law=law)
