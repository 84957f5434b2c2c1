"""Mix-LN: norms after the branches of the first layers, before those of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft import _checks


def mix_ln_num_post(layers: int, *, alpha: float = 0.25) -> int:
    """The number of layers of a Mix-LN model that have Post-LN: `floor(alpha * layers)`.

    Args:
      layers: number of layers.
      alpha: in [0, 1].

    Returns:
      A number of layers, for `mix_ln_residual`.

    Raises:
      TypeError: arguments that are not static.
      ValueError: numbers out of range.

    Reference:
      Li et al., "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN". Their 12 layers have 3
      with Post-LN; how to round other products is our choice.

    Example:
      >>> from jaxsoft.norms import mix_ln_num_post
      >>> print(mix_ln_num_post(12))
      3
    """
    layers = _checks.integer("layers", layers, at_least=0)
    alpha = _checks.static_number("alpha", alpha, at_least=0, at_most=1)
    return int(alpha * layers + 1e-9)


def mix_ln_residual(
    x: Float[Array, ...],
    branch: Callable[[Array], Array],
    norm: Callable[[Array], Array],
    *,
    layer: int | Array,
    num_post: int | Array,
) -> Float[Array, ...]:
    """A residual branch with Mix-LN: `norm(x + branch(x))` in the first layers, `x + branch(norm(x))` in the others.

    Args:
      x: the residual stream.
      branch: attention or MLP.
      norm: the norm of this branch, in the paper an RMS norm. The norm after the last layer stays.
      layer: index of the layer, from 0. In a `scan` over layers it may be traced; the norm is then computed twice.
      num_post: number of layers with Post-LN, see `mix_ln_num_post`.

    Returns:
      The new residual stream.

    Raises:
      TypeError: an array that is not floating, indices that are not integers.
      ValueError: indices below 0.

    Reference:
      Li et al., "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import layer_norm, mix_ln_residual
      >>> x, double = jnp.array([1.0, 3.0]), lambda x: 2 * x
      >>> for layer in (0, 1):
      ...     print(mix_ln_residual(x, double, layer_norm, layer=layer, num_post=1).round(3))
      [-1.  1.]
      [-1.  5.]
    """
    _checks.floating("x", x)
    given: Any = {"layer": layer, "num_post": num_post}
    if not any(isinstance(value, jax.core.Tracer) for value in given.values()):
        layer, num_post = (_checks.integer(name, value, at_least=0) for name, value in given.items())
        return norm(x + branch(x)) if layer < num_post else x + branch(norm(x))
    for name, value in given.items():
        if hasattr(value, "dtype"):
            _checks.integers(name, value)
            _checks.shape(name, value, (), "one index")
    post = jnp.asarray(layer) < num_post
    x = x + branch(jnp.where(post, x, norm(x)))
    return jnp.where(post, norm(x), x)
