"""Merging of fine-tuned models.

Pure functions of pytrees of parameters. A delta is the difference of fine-tuned and base parameters;
`optax.apply_updates(base, delta)` adds it again. The functions of deltas reduce the interference between them;
afterwards average the deltas and add them to the base:

```python
import jax
import jax.numpy as jnp

import jaxsoft.merging

base = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
models = [
    jax.tree.map(lambda b, c=c: b + c * jnp.cos(jnp.arange(b.size)).reshape(b.shape), base)
    for c in (0.1, -0.2)
]

deltas = [jax.tree.map(jnp.subtract, model, base) for model in models]
deltas = [jaxsoft.merging.star_delta(delta) for delta in deltas]
merged = jax.tree.map(lambda b, *d: b + sum(d) / len(d), base, *deltas)
```
"""

from __future__ import annotations

from jaxsoft.merging.averages import diagonal_fisher, fisher_merge, model_kinship, model_stock_merge
from jaxsoft.merging.deltas import bit_delta, dare_delta, della_delta, star_delta

__all__ = [
    "bit_delta",
    "dare_delta",
    "della_delta",
    "diagonal_fisher",
    "fisher_merge",
    "model_kinship",
    "model_stock_merge",
    "star_delta",
]
