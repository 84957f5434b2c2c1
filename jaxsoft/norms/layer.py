"""Layer norm, RMS norm and compressed RMS norm.

All of them work on the last axis, compute in float32 at least, and return the dtype of their input. A row with mean
zero is known from all entries but the last; `crms_norm` is the RMS norm of such compressed rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsoft import _checks
from jaxsoft.norms._common import affine, features_of, positive, wide

Scalar = float | jax.Array


def _unit(x: jax.Array, eps: Scalar) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def layer_norm(
    x: Float[Array, "*shape features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    eps: Scalar = 1e-5,
) -> Float[Array, "*shape features"]:
    """Layer norm: `scale (x - mean(x)) / sqrt(var(x) + eps) + bias`, with the biased variance of each row.

    The variance is that of the centred row, not `mean(x^2) - mean(x)^2`, which cancels where the mean is large.

    Args:
      x: rows along the last axis.
      scale: one number per feature. None: 1.
      bias: one number per feature. None: 0.
      eps: added to the variance, positive. Models of the BERT family use 1e-12.

    Returns:
      An array like x. A constant row gives `bias`.

    Raises:
      TypeError: arrays that are not floating.
      ValueError: shapes that do not fit, an `eps` that is not positive.

    Reference:
      Ba et al., "Layer Normalization".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import layer_norm
      >>> print(layer_norm(jnp.array([1.0, 2.0, 3.0, 4.0])).round(4))
      [-1.3416 -0.4472  0.4472  1.3416]
    """
    features_of(x, scale=scale, bias=bias)
    positive("eps", eps)
    return affine(_unit(recenter(wide(x)), eps), scale, bias).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*shape features"],
    scale: Float[Array, " features"] | None = None,
    *,
    eps: Scalar = 1e-6,
    scale_offset: Scalar = 0.0,
) -> Float[Array, "*shape features"]:
    """RMS norm: `(scale_offset + scale) x / sqrt(mean(x^2) + eps)`.

    Args:
      x: rows along the last axis.
      scale: one number per feature. None: 1, without the offset.
      eps: added to the mean square, positive. LLaMA: 1e-6, PyTorch: the epsilon of the dtype.
      scale_offset: 1 for Gemma, whose parameters are `scale - 1`.

    Returns:
      An array like x. The product with the scale is taken in float32; LLaMA rounds to the dtype of x before.

    Raises:
      TypeError: arrays that are not floating.
      ValueError: shapes that do not fit, an `eps` that is not positive.

    Reference:
      Zhang and Sennrich, "Root Mean Square Layer Normalization"; "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent
      and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import rms_norm
      >>> print(rms_norm(jnp.array([2.0, 0.0, -1.0, 1.0])).round(4))
      [ 1.633   0.     -0.8165  0.8165]
    """
    features_of(x, scale=scale)
    positive("eps", eps)
    _checks.number("scale_offset", scale_offset)
    x_wide = wide(x)
    if scale is not None:
        scale = scale_offset + scale.astype(x_wide.dtype)
    return affine(_unit(x_wide, eps), scale, None).astype(x.dtype)


def crms_norm(
    x: Float[Array, "*shape compressed"], *, eps: Scalar = 1e-6
) -> Float[Array, "*shape compressed"]:
    """RMS norm of a row with mean zero that lacks its last entry: `x / sqrt((sum(x^2) + sum(x)^2) / d + eps)`.

    The missing entry is `-sum(x)`, and d counts it: one more than x has features. There is no scale: a scaled row no
    longer has mean zero, so the scale belongs to the linear layer that reads the row (`fold_into_linear`).

    Args:
      x: compressed rows along the last axis, see `compress`.
      eps: added to the mean square, positive. That of the layer norm, where it takes the place of one.

    Returns:
      An array like x: all entries but the last of `layer_norm(decompress(x))`.

    Raises:
      TypeError: an array that is not floating.
      ValueError: an `eps` that is not positive, an x without axes.

    Reference:
      "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import compress, crms_norm
      >>> print(crms_norm(compress(jnp.array([1.0, 2.0, 3.0, 4.0])), eps=1e-5).round(4))
      [-1.3416 -0.4472  0.4472]
    """
    features = features_of(x)
    positive("eps", eps)
    y = wide(x)
    last = jnp.sum(y, axis=-1, keepdims=True)
    squares = jnp.sum(y * y, axis=-1, keepdims=True) + last * last
    return (y * lax.rsqrt(squares / (features + 1) + eps)).astype(x.dtype)


def recenter(x: Float[Array, "*shape features"]) -> Float[Array, "*shape features"]:
    """Rows with mean zero: `x - mean(x)`.

    Args:
      x: rows along the last axis.

    Returns:
      An array like x; the mean is taken in float32 at least.

    Raises:
      TypeError: an array that is not floating.
      ValueError: an x without axes.

    Reference:
      "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import recenter
      >>> print(recenter(jnp.array([1.0, 2.0, 6.0])))
      [-2. -1.  3.]
    """
    features_of(x)
    y = wide(x)
    return (y - jnp.mean(y, axis=-1, keepdims=True)).astype(x.dtype)


def compress(x: Float[Array, "*shape features"]) -> Float[Array, "*shape compressed"]:
    """Rows with mean zero, without their last entry: `(x - mean(x))[..., :-1]`.

    Args:
      x: rows along the last axis, which has at least one entry.

    Returns:
      One feature less than x. `decompress` gives `recenter(x)` back.

    Raises:
      TypeError: an array that is not floating.
      ValueError: an x without axes or features.

    Reference:
      "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import compress, decompress
      >>> compressed = compress(jnp.array([1.0, 2.0, 6.0]))
      >>> print(compressed, decompress(compressed))
      [-2. -1.] [-2. -1.  3.]
    """
    if not features_of(x):
        raise ValueError(f"x must have at least one feature, got shape {tuple(x.shape)}")
    return recenter(x)[..., :-1]


def decompress(x: Float[Array, "*shape compressed"]) -> Float[Array, "*shape features"]:
    """The rows of which `compress` dropped the last entry: x and `-sum(x)`.

    Args:
      x: compressed rows along the last axis.

    Returns:
      One feature more than x.

    Raises:
      TypeError: an array that is not floating.
      ValueError: an x without axes.

    Reference:
      "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import decompress
      >>> print(decompress(jnp.array([-2.0, -1.0])))
      [-2. -1.  3.]
    """
    features_of(x)
    last = -jnp.sum(wide(x), axis=-1, keepdims=True)
    return jnp.concatenate([x, last.astype(x.dtype)], axis=-1)
