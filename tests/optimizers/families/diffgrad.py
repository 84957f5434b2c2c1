"""diffGrad."""

import functools

import jax.numpy as jnp
import optax
from optimizers.case import Case

from jaxsoft import optimizers as o

# The kept gradient is read for the update and overwritten with the new one: a copy of a leaf.
CASES = {
    "scale_by_diffgrad": Case(
        o.scale_by_diffgrad,
        converges=lambda lr: optax.chain(o.diffgrad(lr, b2=0.99), optax.scale(2.0)),
        exports=("scale_by_diffgrad",),
        temporary=1.0,
    ),
    "diffgrad": Case(
        functools.partial(o.diffgrad, 1e-2, weight_decay=0.1),
        ready=True,
        exports=("diffgrad",),
        temporary=1.0,
    ),
    "diffgrad_bf16": Case(
        functools.partial(o.diffgrad, 1e-2, mu_dtype=jnp.bfloat16, previous_dtype=jnp.bfloat16),
        ready=True,
        temporary=1.0,
        low_precision=True,
    ),
}
