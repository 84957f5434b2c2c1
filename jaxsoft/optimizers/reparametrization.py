"""Reparametrizations.

Pure functions from the trained parameters to the weights that are used; call them in the loss. `softhebb_update` is a
local learning rule, which needs no loss.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Scalar


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _soft_threshold(w: jax.Array, threshold: jax.Array, axis: Any) -> jax.Array:
    size = jnp.abs(w)
    kept = size > threshold
    out = jnp.where(kept, jnp.sign(w) * (size - threshold), 0)
    if axis is None:
        return out
    mean = jnp.mean(size, axis=axis, keepdims=True)
    share = (jnp.mean(jnp.where(kept, size, 0), axis=axis, keepdims=True) + 1e-6) / (mean + 1e-6)
    return out * (1.01 / (share + 0.01))


@_soft_threshold.defjvp
def _soft_threshold_jvp(axis, primals, tangents):
    return _soft_threshold(*primals, axis), tangents[0]


def soft_threshold_ste(
    weight: jax.Array, threshold: Scalar, *, rescale_axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """ST-3: soft-thresholded weights with the gradient of the dense ones (straight-through).

        sign(w) relu(|w| - threshold) scale        with derivative 1 in w for every entry, pruned or not

    Use the result in the forward pass and train `weight`: pruned entries can come back. Raise the sparsity over the
    run, e.g. as `1 - (1 - step / steps)^3`, with `threshold = jnp.quantile(jnp.abs(weight), sparsity)`, or with the
    quantile of all layers together.

    Args:
      weight: The dense weights.
      threshold: At least 0; a number or an array that broadcasts to the weights. It gets no gradient.
      rescale_axis: The axes of one output's weights (0 for a kernel [inputs, outputs]), which are multiplied by
        `scale = 1.01 / (rho + 0.01)`, with rho the kept share of the sum of absolute weights (1e-6 is added to both
        means). None: scale 1.

    Returns:
      The sparse weights, in the dtype of `weight`.

    Raises:
      TypeError: for a weight that is not floating.
      ValueError: for a negative threshold, or one that does not broadcast.

    References:
      "Are Straight-Through gradients and Soft-Thresholding all you need for Sparse Training?".

    Examples:
      >>> import jax.numpy as jnp
      >>> print(soft_threshold_ste(jnp.array([0.5, -0.2, 0.05, 1.0]), 0.25))
      [0.25 0.   0.   0.75]
    """
    _checks.floating("weight", weight)
    if hasattr(threshold, "shape"):
        _checks.broadcastable("threshold", threshold, weight.shape, "that of weight")
    if not hasattr(threshold, "ndim") or jnp.ndim(threshold) == 0:
        _checks.number("threshold", threshold, at_least=0)
    wide = weight.astype(_common.wide(weight))
    return _soft_threshold(wide, jnp.asarray(threshold, wide.dtype), rescale_axis).astype(weight.dtype)


def stable_recurrent_weight(
    weight: jax.Array,
    kind: Literal["exp", "softplus", "inverse"] = "inverse",
    *,
    a: Scalar = 1.0,
    b: Scalar = 0.5,
) -> jax.Array:
    """A recurrent eigenvalue with negative real part from an unconstrained number.

    | kind | value |
    |---|---|
    | `"exp"` | `-exp(w)` |
    | `"softplus"` | `-log(1 + exp(w))` |
    | `"inverse"` | `-1 / (a w^2 + b)` |

    If an eigenvalue is trained directly, training becomes unstable before it comes close to 0, the edge of stability,
    so models forget exponentially fast. These maps approach 0 slowly and allow long memories.
    *Reconstructed*: the constants of `"inverse"`.

    Args:
      weight: Unconstrained, of any shape.
      kind: See above.
      a: For `"inverse"`, positive.
      b: For `"inverse"`, positive: the value is at least `-1 / b`.

    Returns:
      Negative values like `weight`.

    Raises:
      TypeError: for a weight that is not floating.
      ValueError: for an unknown `kind`, or numbers that are not positive.

    References:
      "StableSSM: Alleviating the Curse of Memory in State-space Models through Stable Reparameterization"; "Inverse
      Approximation Theory for Nonlinear Recurrent Neural Networks".

    Examples:
      >>> import jax.numpy as jnp
      >>> print(stable_recurrent_weight(jnp.array([0.0, 1.0]), a=1.5))
      [-2.  -0.5]
    """
    _checks.floating("weight", weight)
    _checks.option("kind", kind, ("exp", "softplus", "inverse"))
    _checks.number("a", a, above=0)
    _checks.number("b", b, above=0)
    if kind == "exp":
        return -jnp.exp(weight)
    if kind == "softplus":
        return -jax.nn.softplus(weight)
    return (-1 / (a * weight**2 + b)).astype(weight.dtype)


def softhebb_update(
    weight: jax.Array, inputs: jax.Array, *, learning_rate: Scalar = 0.01, temperature: Scalar = 1.0
) -> jax.Array:
    """SoftHebb: the change of a layer's weights by competition among its units, without labels or feedback.

    For each input x, with `u = weight x` and `y = softmax(u / temperature)`:

        change of row k = learning_rate s_k y_k (x - u_k row_k)        s = 1 for the winner, -1 for the others

    averaged over the inputs. The winner (the largest u) moves towards the input, the others away from it; for
    inputs of norm 1 the rows tend to norm 1. *Reconstructed*: the form of the update.

    Args:
      weight: [units, features].
      inputs: [..., features], of norm 1.
      learning_rate: At least 0.
      temperature: Divides the activations in the softmax, positive.

    Returns:
      The change to add to `weight`, in its dtype.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for shapes that do not match, or numbers out of range.

    References:
      "Hebbian Deep Learning Without Feedback".

    Examples:
      >>> import jax.numpy as jnp
      >>> weight, x = jnp.array([[0.5, 0.0], [0.0, 0.5]]), jnp.array([1.0, 0.0])
      >>> print(softhebb_update(weight, x, learning_rate=1.0, temperature=100.0).round(1) + 0.0)
      [[ 0.4  0. ]
       [-0.5  0. ]]
    """
    _checks.floating("weight", weight)
    _checks.floating("inputs", inputs)
    _checks.number("learning_rate", learning_rate, at_least=0)
    _checks.number("temperature", temperature, above=0)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape [units, features], got shape {weight.shape}")
    if inputs.ndim < 1 or inputs.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"inputs must have shape [..., {weight.shape[1]}] (features), got shape {inputs.shape}"
        )
    dtype = _common.wide(weight, inputs)
    w, x = weight.astype(dtype), inputs.astype(dtype).reshape(-1, inputs.shape[-1])
    u = jnp.matmul(x, w.T, precision="highest")
    winner = jax.nn.one_hot(jnp.argmax(u, axis=-1), w.shape[0], dtype=dtype)
    signed = (2 * winner - 1) * jax.nn.softmax(u / temperature, axis=-1)
    towards = jnp.matmul(signed.T, x, precision="highest")
    decay = jnp.sum(signed * u, axis=0)[:, None] * w
    return (learning_rate * (towards - decay) / max(x.shape[0], 1)).astype(weight.dtype)
