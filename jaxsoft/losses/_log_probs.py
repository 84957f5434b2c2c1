"""Arguments that the losses over log-probabilities share: checks, masks and weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, weigh
from jaxsoft.losses._common import check_weights


class Samples(NamedTuple):
    """The checked arguments of a loss.

    Attributes:
      arrays: the arrays given to `prepare`, in that order, float32 or wider, 0 where `where` is False.
      where: booleans of the arrays' shape, or None.
      weights: of the arrays' shape, or None.
    """

    arrays: tuple[Array, ...]
    where: Any
    weights: Any

    def finish(self, values: Array) -> Array:
        """Sets masked losses to 0 and applies the weights."""
        if self.where is not None:
            values = jnp.where(self.where, values, 0)
        return values if self.weights is None else weigh(values, self.weights)


def prepare(where: Any, weights: Any = None, **arrays: Any) -> Samples:
    """Checks that the named arrays are floating and have the shape of the first, and masks them."""
    first, *_ = arrays
    for name, array in arrays.items():
        _checks.floating(name, array)
        _checks.shape(name, array, arrays[first].shape, f"that of {first}")
    shape = arrays[first].shape
    dtype = accumulation_dtype(*(array.dtype for array in arrays.values()))
    values = tuple(jnp.asarray(array, dtype) for array in arrays.values())
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, shape, f"that of {first}")
        where = jnp.broadcast_to(where, shape)
        values = tuple(jnp.where(where, array, 0) for array in values)
    check_weights(weights, shape, f"that of {first}")
    weights = None if weights is None else jnp.asarray(weights)
    return Samples(values, where, weights)


def spread(name: str, value: Any, like: Any) -> Any:
    """Broadcasts a number or a floating array to the shape of `like`, as a constant to the gradient."""
    if not hasattr(value, "dtype"):
        _checks.number(name, value)
        return jnp.full(like.shape, value, accumulation_dtype(like.dtype))
    _checks.floating(name, value)
    _checks.broadcastable(name, value, like.shape, "the shape of the log-probabilities")
    return lax.stop_gradient(jnp.broadcast_to(jnp.asarray(value), like.shape))
