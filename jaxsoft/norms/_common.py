"""What the norms share: checks of their arguments, the affine map, means over the batch."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype

AxisName = str | tuple[str, ...] | None


def wide(x: Any) -> jax.Array:
    """An array in the dtype of its statistics, float32 at least."""
    return jnp.asarray(x).astype(accumulation_dtype(x.dtype))


def features_of(x: Any, *, at_least_axes: int = 1, **parameters: Any) -> int:
    """Checks the input and its parameters, one entry per feature or None; returns the number of features."""
    _checks.floating("x", x)
    if x.ndim < at_least_axes:
        raise ValueError(f"x must have at least {at_least_axes} axes, got shape {tuple(x.shape)}")
    for name, value in parameters.items():
        if value is not None:
            _checks.floating(name, value)
            _checks.shape(name, value, (x.shape[-1],), "the last axis of x")
    return x.shape[-1]


def affine(y: jax.Array, scale: Any, bias: Any) -> jax.Array:
    """`scale y + bias`, in the dtype of y; None is 1 and 0."""
    if scale is not None:
        y = y * scale.astype(y.dtype)
    return y if bias is None else y + bias.astype(y.dtype)


def present(x: jax.Array, where: Any) -> jax.Array:
    """The input with 0 at the positions that do not count."""
    return x if where is None else jnp.where(where[..., None], x, 0)


def over_batch(x: jax.Array, where: Any, axis_name: AxisName) -> jax.Array:
    """The mean over all axes but the last, of `present` values, on all devices of `axis_name`."""
    axes = tuple(range(x.ndim - 1))
    if where is None:
        mean = jnp.mean(x, axis=axes)
        return mean if axis_name is None else lax.pmean(mean, axis_name)
    return over_devices(jnp.sum(x, axis=axes), axis_name) / jnp.maximum(count_of(x, where, axis_name), 1)


def count_of(x: jax.Array, where: Any, axis_name: AxisName) -> jax.Array:
    """The number of positions of the mean `over_batch`."""
    here = math.prod(x.shape[:-1]) if where is None else jnp.sum(where, dtype=x.dtype)
    return over_devices(jnp.asarray(here, x.dtype), axis_name)


def over_devices(x: Any, axis_name: AxisName) -> Any:
    """The sum over all devices of `axis_name`."""
    return x if axis_name is None else lax.psum(x, axis_name)


def batch_moments(x: jax.Array, where: Any, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance `over_batch`."""
    mean = over_batch(present(x, where), where, axis_name)
    return mean, over_batch(jnp.square(present(x - mean, where)), where, axis_name)


def bessel(x: jax.Array, where: Any, axis_name: AxisName) -> jax.Array:
    """The factor of the unbiased variance, `n / (n - 1)`."""
    n = count_of(x, where, axis_name)
    return n / jnp.maximum(n - 1, 1)


def check_where(where: Any, x: Any) -> None:
    """Checks the mask of positions: boolean, of the shape of x without the features."""
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, tuple(x.shape[:-1]), "x without its features")


def positive(name: str, value: ArrayLike) -> None:
    """Checks a number above 0."""
    _checks.number(name, value, above=0)
