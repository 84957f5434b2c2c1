"""Stable embedding.

Layer norm right after the lookup, and a table with evenly drawn entries, so that optimizers with 8-bit states can train
it. The states of the table itself stay in 32 bits:

```python
import jax, jax.numpy as jnp, optax
from jaxsoft.norms import stable_embedding, stable_embedding_init
from jaxsoft.optimizers import quantize_state

params = {
    "embed": {
        "table": stable_embedding_init(jax.random.key(0), 256, 64),
        "scale": jnp.ones(64),
        "bias": jnp.zeros(64),
    },
    "kernel": jnp.ones((64, 64)),
}
x = stable_embedding(
    params["embed"]["table"], jnp.array([[1, 2, 3]]), params["embed"]["scale"], params["embed"]["bias"]
)
tx = quantize_state(optax.adamw(1e-3), mask={"embed": False, "kernel": True})
```
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft.norms.layer import layer_norm


def stable_embedding_init(
    key: Array,
    vocabulary: int,
    features: int,
    *,
    padding_id: int | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "vocabulary features"]:
    """The table of a stable embedding: uniform in `+-sqrt(6 / (vocabulary + features))` (Xavier).

    Args:
      key: a PRNG key.
      vocabulary: number of rows.
      features: length of a row.
      padding_id: a row of zeros. None: no such row.
      dtype: floating dtype of the table.

    Returns:
      The table.

    Raises:
      TypeError: a size that is not a static integer, a dtype that is not floating.
      ValueError: a size below 1, a `padding_id` that is not a row.

    Reference:
      "8-bit Optimizers via Block-wise Quantization".

    Example:
      >>> import jax
      >>> from jaxsoft.norms import stable_embedding_init
      >>> print(stable_embedding_init(jax.random.key(0), 3, 2, padding_id=0)[0])
      [0. 0.]
    """
    vocabulary = _checks.integer("vocabulary", vocabulary, at_least=1)
    features = _checks.integer("features", features, at_least=1)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {_checks.describe(dtype)}")
    bound = math.sqrt(6 / (vocabulary + features))
    table = jax.random.uniform(key, (vocabulary, features), dtype, -bound, bound)
    if padding_id is not None:
        padding_id = _checks.integer("padding_id", padding_id, at_least=0, at_most=vocabulary - 1)
        table = table.at[padding_id].set(0)
    return table


def stable_embedding(
    table: Float[Array, "vocabulary features"],
    ids: Int[Array, "*shape"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    padding_id: int | None = None,
    eps: float | Array = 1e-5,
) -> Float[Array, "*shape features"]:
    """Lookup and layer norm in one: `scale (x - mean(x)) / sqrt(var(x) + eps) + bias` of `x = table[ids]`.

    The norm limits the effect of a rare token's row on the layers above, and evens out the gradients of the rows. It
    comes before position embeddings are added, and there is no factor with the root of the features. Keep the
    optimizer states of the table in 32 bits (the `mask` of `jaxsoft.optimizers.quantize_state`).

    Args:
      table: one row per token.
      ids: indices of rows, any shape. An id out of range gives NaN.
      scale: scale of the layer norm. None: 1.
      bias: bias of the layer norm. None: 0.
      padding_id: a row without gradient. Its output is that of any other row: `bias` for a row of zeros, not 0.
      eps: added to the variance, positive.

    Returns:
      The rows, computed in at least float32 and returned in the dtype of the table.

    Raises:
      TypeError: a table that is not floating, ids that are not integers.
      ValueError: shapes that do not fit, a `padding_id` that is not a row, an `eps` that is not positive.

    Reference:
      "8-bit Optimizers via Block-wise Quantization".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import stable_embedding
      >>> table = jnp.array([[0.0, 0.0], [1.0, 3.0], [0.5, -2.0]])
      >>> print(stable_embedding(table, jnp.array([1, 2, 0])).round(2))
      [[-1.  1.]
       [ 1. -1.]
       [ 0.  0.]]
    """
    _checks.floating("table", table)
    if table.ndim != 2:
        raise ValueError(f"table must have shape (vocabulary, features), got shape {tuple(table.shape)}")
    _checks.integers("ids", ids)
    vocabulary, features = table.shape
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            _checks.floating(name, value)
            _checks.shape(name, value, (features,), "the features of the table")
    _checks.number("eps", eps, above=0)
    in_range = (ids >= 0) & (ids < vocabulary)
    x = table.at[jnp.where(in_range, ids, 0)].get(mode="promise_in_bounds")
    x = jnp.where(in_range[..., None], x, jnp.nan)
    if padding_id is not None:
        padding_id = _checks.integer("padding_id", padding_id, at_least=0, at_most=vocabulary - 1)
        x = jnp.where((ids == padding_id)[..., None], lax.stop_gradient(x), x)
    return layer_norm(x, scale, bias, eps=eps)
