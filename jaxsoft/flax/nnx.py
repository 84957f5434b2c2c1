"""Modules for Flax nnx.

A norm of which the gradient is approximated (`power_norm`, `unified_norm`) has statistics of its backward pass in a
`BackwardStat`. Take the gradient to it as well: it is the variable's new value.

```python
import jax.numpy as jnp
from flax import nnx
from jaxsoft.flax import nnx as softnnx
from jaxsoft.norms import power_norm

model, x = softnnx.Layer(power_norm, 4), jnp.ones((8, 4))
wanted = nnx.DiffState(0, nnx.Any(nnx.Param, softnnx.BackwardStat))
grads = nnx.grad(lambda model: jnp.sum(model(x, train=True) ** 2), argnums=wanted)(model)
grads, backward = nnx.split_state(grads, nnx.Param, softnnx.BackwardStat)
nnx.update(model, backward)
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsoft.flax import _layers
from jaxsoft.rows import LinearLogits, linear_logits


class BackwardStat(nnx.Variable):
    """Statistics of a backward pass, whose gradient is their new value."""


class LogitsHead(nnx.Module):
    """The output layer of a model, whose logits are an expression (`linear_logits`).

    For a head that shares the table of the embeddings, call `linear_logits(hidden, table, transpose_weight=True)`.

    Args:
      features: length of a hidden state.
      vocabulary: number of logits per row.
      use_bias: whether the logits have a bias.
      kernel_init: initializer of the kernel.
      param_dtype: dtype of the parameters.
      rngs: random numbers for the kernel.

    Reference:
      Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxsoft import losses
      >>> from jaxsoft.flax.nnx import LogitsHead
      >>> head = LogitsHead(4, 10, rngs=nnx.Rngs(0))
      >>> losses.cross_entropy(head(jnp.ones((2, 4)), softcap=30.0), jnp.array([1, 2])).shape
      (2,)
    """

    def __init__(
        self,
        features: int,
        vocabulary: int,
        *,
        use_bias: bool = False,
        kernel_init: Callable = nnx.initializers.lecun_normal(),  # noqa: B008
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (features, vocabulary), param_dtype))
        self.bias = nnx.Param(jnp.zeros(vocabulary, param_dtype)) if use_bias else None

    def __call__(self, hidden: jax.Array, **options: Any) -> LinearLogits:
        """The logits of rows.

        Args:
          hidden: `[*rows, d]`.
          **options: those of `linear_logits`, such as `softcap` or `dtype`.

        Returns:
          The logits, as an expression.
        """
        if self.bias is not None:
            options["bias"] = self.bias[...]
        return linear_logits(hidden, self.kernel[...], **options)


class Layer(nnx.Module):
    """A norm or an activation of the library, with its parameters and running statistics.

    `layer_norm`, `rms_norm`, `crms_norm`, `power_norm`, `unified_norm`, `evonorm_b0`, `evonorm_s0` and
    `pade_activation`. Options are given by `functools.partial`. The parameters are each a `nnx.Param`, the running
    statistics a `nnx.BatchStat`, those of a backward pass a `BackwardStat`.

    Args:
      function: the function, or a `functools.partial` of it.
      features: size of the last axis of its input.
      param_dtype: dtype of the parameters. Running statistics are in float32.

    Raises:
      ValueError: a function that is not among those above.

    Example:
      >>> import functools, jax.numpy as jnp
      >>> from jaxsoft.flax.nnx import Layer
      >>> from jaxsoft.norms import evonorm_b0
      >>> model = Layer(functools.partial(evonorm_b0, decay=0.99), 4)
      >>> print(model(jnp.ones((2, 3, 4)), train=True).shape, model.slope.shape)
      (2, 3, 4) (4,)
    """

    def __init__(self, function: Callable, features: int, *, param_dtype: Any = jnp.float32):
        layer = _layers.layer_of(function)
        self.function = function
        self.names = tuple(layer.parameters(features))
        for name, value in layer.parameters(features).items():
            setattr(self, name, nnx.Param(value.astype(param_dtype)))
        first, *rest = layer.statistics(features) if layer.statistics else (None,)
        self.statistics = None if first is None else nnx.BatchStat(first)
        self.backward = BackwardStat(rest[0]) if rest else None

    def __call__(self, x: jax.Array, *, train: bool | None = None, **options: Any) -> jax.Array:
        """The function of x.

        Args:
          x: features last.
          train: whether to use and update batch statistics; a function without running statistics ignores it.
          **options: further arguments of the function, such as `where`.

        Returns:
          An array like x.

        Raises:
          TypeError: no `train` for a function with running statistics.
        """
        statistics = tuple(v.get_value() for v in (self.statistics, self.backward) if v is not None)
        parameters = {name: getattr(self, name).get_value() for name in self.names}
        y, new = _layers.call(self.function, x, statistics, parameters, train, options)
        if train and self.statistics is not None:
            self.statistics.set_value(new)
        return y
