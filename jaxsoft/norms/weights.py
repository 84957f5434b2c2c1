"""Conditioning of weights."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft import _checks
from jaxsoft.norms._common import wide


def weight_condition(
    weight: Float[Array, ...], *, axis: int | tuple[int, ...] = -1, eps: float = 1e-12
) -> Float[Array, ...]:
    """Weight conditioning: the weights of each output, divided by their norm.

    It lowers the condition number of the matrix. Apply it in each forward pass; the gradient flows through the norms.
    Unlike weight norm there is no learned gain.

    Args:
      weight: a kernel, inputs and space of a convolution first, outputs last.
      axis: the axis or axes of the outputs, which are kept apart: 0 for the layout `[outputs, inputs]`.
      eps: lower bound of a norm, positive.

    Returns:
      An array like `weight`, computed in float32 at least. Weights of 0 stay 0.

    Raises:
      TypeError: an array that is not floating.
      ValueError: an axis that the weight does not have, an `eps` that is not positive.

    Reference:
      Saratchandran et al., "Weight Conditioning for Smooth Optimization of Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import weight_condition
      >>> print(weight_condition(jnp.array([[3.0, 4.0], [0.1, 0.0]]), axis=0))
      [[0.6 0.8]
       [1.  0. ]]
    """
    _checks.floating("weight", weight)
    axes = axis if isinstance(axis, tuple) else (axis,)
    kept = {
        _checks.integer("axis", a, at_least=-weight.ndim, at_most=weight.ndim - 1) % weight.ndim for a in axes
    }
    _checks.number("eps", eps, above=0)
    y = wide(weight)
    others = tuple(a for a in range(weight.ndim) if a not in kept)
    squares = jnp.sum(y * y, axis=others, keepdims=True)
    return (y / jnp.sqrt(jnp.maximum(squares, eps * eps))).astype(weight.dtype)
