"""What the norms share: checks of their arguments, the affine map, means over the batch."""

from __future__ import annotations

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


def over_batch(x: jax.Array, where: Any, axis_name: AxisName) -> jax.Array:
    """The mean over all axes but the last, of the positions where `where` holds, on all devices of `axis_name`."""
    axes = tuple(range(x.ndim - 1))
    if where is None:
        mean = jnp.mean(x, axis=axes)
        return mean if axis_name is None else lax.pmean(mean, axis_name)
    counts = where[..., None]
    total, count = jnp.sum(jnp.where(counts, x, 0), axis=axes), jnp.sum(where, dtype=x.dtype)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def check_where(where: Any, x: Any) -> None:
    """Checks the mask of positions: boolean, of the shape of x without the features."""
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, tuple(x.shape[:-1]), "x without its features")


def positive(name: str, value: ArrayLike) -> None:
    """Checks a number above 0."""
    _checks.number(name, value, above=0)
