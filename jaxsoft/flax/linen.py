"""Modules for Flax linen.

A norm of which the gradient is approximated (`power_norm`, `unified_norm`) has statistics of its backward pass in the
collection `backward_stats`. Take the gradient to it as well: it is the collection's new value.

```python
import jax, jax.numpy as jnp
from jaxsoft.flax import linen as softlinen
from jaxsoft.norms import power_norm

model, x = softlinen.Layer(power_norm), jnp.ones((8, 4))
variables = model.init(jax.random.key(0), x, train=False)
params, backward, stats = (variables[name] for name in ("params", "backward_stats", "batch_stats"))

def loss(params, backward):
    collections = {"params": params, "backward_stats": backward, "batch_stats": stats}
    y, changed = model.apply(collections, x, train=True, mutable=["batch_stats"])
    return jnp.sum(y**2), changed["batch_stats"]

(grads, backward), stats = jax.grad(loss, (0, 1), has_aux=True)(params, backward)
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxsoft.flax import _layers
from jaxsoft.rows import LinearLogits, linear_logits


class LogitsHead(nn.Module):
    """The output layer of a model, whose logits are an expression (`linear_logits`).

    For a head that shares the table of the embeddings, call `linear_logits(hidden, table, transpose_weight=True)`.

    Attributes:
      vocabulary: number of logits per row.
      use_bias: whether the logits have a bias.
      kernel_init: initializer of the kernel.
      param_dtype: dtype of the parameters.

    Reference:
      Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import losses
      >>> from jaxsoft.flax.linen import LogitsHead
      >>> hidden, head = jnp.ones((2, 4)), LogitsHead(10)
      >>> variables = head.init(jax.random.key(0), hidden)
      >>> losses.cross_entropy(head.apply(variables, hidden, softcap=30.0), jnp.array([1, 2])).shape
      (2,)
    """

    vocabulary: int
    use_bias: bool = False
    kernel_init: Callable = nn.initializers.lecun_normal()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, **options: Any) -> LinearLogits:
        """The logits of rows.

        Args:
          hidden: `[*rows, d]`.
          **options: those of `linear_logits`, such as `softcap` or `dtype`.

        Returns:
          The logits, as an expression.
        """
        shape = (hidden.shape[-1], self.vocabulary)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if self.use_bias:
            options["bias"] = self.param("bias", nn.initializers.zeros, (self.vocabulary,), self.param_dtype)
        return linear_logits(hidden, kernel, **options)


class Layer(nn.Module):
    """A norm or an activation of the library, with its parameters and running statistics.

    `layer_norm`, `rms_norm`, `crms_norm`, `power_norm`, `unified_norm`, `evonorm_b0`, `evonorm_s0` and
    `pade_activation`. Options are given by `functools.partial`. The running statistics are in the collection
    `batch_stats`, those of a backward pass in `backward_stats`.

    Attributes:
      function: the function, or a `functools.partial` of it.
      param_dtype: dtype of the parameters. Running statistics are in float32.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from jaxsoft.flax.linen import Layer
      >>> from jaxsoft.norms import evonorm_b0
      >>> model, x = Layer(functools.partial(evonorm_b0, decay=0.99)), jnp.ones((2, 3, 4))
      >>> variables = model.init(jax.random.key(0), x, train=False)
      >>> y, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
      >>> print(y.shape, sorted(variables["params"]))
      (2, 3, 4) ['bias', 'scale', 'slope']
    """

    function: Callable
    param_dtype: Any = jnp.float32

    @nn.compact
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
          ValueError: a function that is not among those above, or what the function raises.
        """
        layer, features = _layers.layer_of(self.function), x.shape[-1]
        parameters = {
            name: self.param(name, lambda _, value=value: value.astype(self.param_dtype))
            for name, value in layer.parameters(features).items()
        }
        variables = []
        if layer.statistics is not None:
            for collection, value in zip(("batch_stats", "backward_stats"), layer.statistics(features)):
                variables.append(self.variable(collection, "statistics", lambda value=value: value))
        y, new = _layers.call(self.function, x, tuple(v.value for v in variables), parameters, train, options)
        if train and variables and not self.is_initializing():
            variables[0].value = new
        return y
