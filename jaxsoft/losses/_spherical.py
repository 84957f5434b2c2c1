"""The formulas of the spherical family: functions of the label's score and of the moments of the row.

The losses read both from logits; a spherical head has them without logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.losses._common import score_or_zero
from jaxsoft.normalizers.inner import taylor_exponential
from jaxsoft.rows.reductions import Moments


def z_loss_of(score: Array, moments: Moments, *, a: Any = 1.0, b: Any = 0.0, eps: Any = 1e-12) -> Array:
    """`softplus(a (b - z)) / a` of the label's standard score z."""
    _checks.number("a", a, above=0)
    _checks.number("b", b)
    _checks.number("eps", eps, at_least=0)
    spread = ~(moments.variance <= 0)
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, moments.variance, 1)), 0)
    absent = score == -jnp.inf
    z = safe_divide(moments.deviation(jnp.where(absent, moments.mean, score)), std + eps)
    # Equal logits give z = 0, but a label out of range must stay NaN.
    z = jnp.where(spread | jnp.isnan(score), z, 0)
    return jnp.where(absent, jnp.inf, jax.nn.softplus(a * (b - z)) / a)


def squared_error_of(score: Array, moments: Moments) -> Array:
    """`sum x^2 - 2 x_y + 1`."""
    return moments.sum_of_squares - 2 * score_or_zero(score) + 1


def spherical_softmax_of(score: Array, moments: Moments, *, eps: Any = 1e-3) -> Array:
    """`-log((x_y^2 + eps) / (sum x^2 + C eps))`."""
    _checks.number("eps", eps, at_least=0)
    own = score_or_zero(score) ** 2 + eps
    return log_ratio(moments.sum_of_squares + moments.count * eps, own, moments.count)


def taylor_softmax_of(score: Array, moments: Moments) -> Array:
    """`-log(t(x_y) / sum t(x))` for `t(x) = 1 + x + x^2 / 2`."""
    # t(x) = ((x + 1)^2 + 1) / 2, whose sum does not cancel.
    total = moments.count / 2 * (moments.variance + (moments.mean + 1) ** 2 + 1)
    return log_ratio(total, taylor_exponential(2)(score_or_zero(score)), moments.count)


def log_ratio(total: Array, own: Array, count: Array) -> Array:
    """`log(total / own)` for the label's share `own` of `total`; +inf where that share is 0."""
    none = own == 0
    ratio = jnp.where(none | (count == 0), 1, total) / jnp.where(none, 1, own)
    return jnp.where(none, jnp.inf, jnp.log(ratio))


SPHERICAL: dict[str, Callable[..., Array]] = {
    "z_loss": z_loss_of,
    "squared_error": squared_error_of,
    "spherical_softmax": spherical_softmax_of,
    "taylor_softmax": taylor_softmax_of,
}
