"""Mish, maxout, the GELU of secure inference, and ReLU as a classifier."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype

mish = jax.nn.mish
"""`jax.nn.mish`: `x tanh(softplus(x))`, of "Mish: A Self Regularized Non-Monotonic Activation Function"."""

# Of PUMA's code: the coefficients of x^0, x^1, ... in [-4, -1.95), and of x^0, x^1, x^2, x^4, x^6 in [-1.95, 3].
_LOW = (-0.5054031199708174, -0.42226581151983866, -0.11807612951181953, -0.011034134030615728)
_MIDDLE = (0.008526321541038084, 0.5, 0.3603292692789629, -0.037688200365904236, 0.0018067462606141187)


def mpc_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The GELU of secure multi-party inference: 0 below -4, a cubic below -1.95, a polynomial of degree 6 to 3, then x.

    To test how robust a model is to the approximation, whose error is at most 0.02. It has small jumps at the three
    ends, the largest -0.0159 at 3; the derivative is that of the piece in force.

    Args:
      x: any shape.

    Returns:
      An array like x, computed in float32 at least.

    Raises:
      TypeError: an array that is not floating.

    Reference:
      Dong et al., "PUMA: Secure Inference of LLaMA-7B in Five Minutes".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.activations import mpc_gelu
      >>> print(mpc_gelu(jnp.array([-5.0, -1.0, 0.0, 1.0, 4.0])).round(4))
      [ 0.     -0.167   0.0085  0.833   4.    ]
    """
    _checks.floating("x", x)
    y = jnp.asarray(x).astype(accumulation_dtype(x.dtype))
    in_low, in_middle = (y >= -4) & (y < -1.95), (y >= -1.95) & (y <= 3)
    z = jnp.where(in_low, y, 0)  # so that no power of another piece overflows
    low = ((_LOW[3] * z + _LOW[2]) * z + _LOW[1]) * z + _LOW[0]
    z = jnp.where(in_middle, y, 0)
    square = z * z
    middle = (((_MIDDLE[4] * square + _MIDDLE[3]) * square + _MIDDLE[2]) * z + _MIDDLE[1]) * z + _MIDDLE[0]
    return jnp.where(y < -4, 0, jnp.where(in_low, low, jnp.where(in_middle, middle, y))).astype(x.dtype)


def maxout(x: Float[Array, ...], pieces: int, *, axis: int = -1) -> Float[Array, ...]:
    """The largest of each group of `pieces` consecutive entries along an axis.

    A maxout layer is `maxout(x @ kernel + bias, pieces)`, with `pieces` columns of the kernel per output.

    Args:
      x: activations of a linear layer.
      pieces: size of a group; it divides the axis.
      axis: the axis of the groups.

    Returns:
      An array like x with one entry per group. Of equal entries the first one gets the gradient.

    Raises:
      TypeError: an array that is not floating, `pieces` that are not a static integer.
      ValueError: an axis that x does not have, `pieces` that do not divide it.

    Reference:
      Goodfellow et al., "Maxout Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.activations import maxout
      >>> print(maxout(jnp.array([1.0, -0.9, -1.3, 1.4]), 2))
      [1.  1.4]
    """
    _checks.floating("x", x)
    pieces = _checks.integer("pieces", pieces, at_least=1)
    axis = _checks.integer("axis", axis, at_least=-x.ndim, at_most=x.ndim - 1) % x.ndim
    size = x.shape[axis]
    if size % pieces:
        raise ValueError(f"pieces must divide axis {axis} of x, of size {size}, got {pieces}")
    groups = jnp.reshape(x, (*x.shape[:axis], size // pieces, pieces, *x.shape[axis + 1 :]))
    first = jnp.expand_dims(jnp.argmax(groups, axis=axis + 1), axis + 1)
    return jnp.squeeze(jnp.take_along_axis(groups, first, axis=axis + 1), axis + 1)


def relu_classifier(logits: Float[Array, ...], *, axis: int = -1) -> Int[Array, ...]:
    """The class that ReLU predicts in place of softmax: `argmax(max(0, logits))`.

    It differs from the largest logit only in rows without a positive one, whose class is 0.

    Args:
      logits: class scores.
      axis: the axis of the classes.

    Returns:
      One class per row.

    Raises:
      TypeError: logits that are not floating.
      ValueError: an axis that the logits do not have.

    Reference:
      Agarap, "Deep Learning using Rectified Linear Units (ReLU)". The paper trains with a cross-entropy; which one, its
      abstract does not say.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.activations import relu_classifier
      >>> print(relu_classifier(jnp.array([[0.5, 2.0, -1.0], [-3.0, -1.0, -2.0]])))
      [1 0]
    """
    _checks.floating("logits", logits)
    axis = _checks.integer("axis", axis, at_least=-logits.ndim, at_most=logits.ndim - 1)
    return jnp.argmax(jax.nn.relu(logits), axis=axis)
