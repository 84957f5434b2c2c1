"""Lion-K."""

import functools

import jax.numpy as jnp
from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "scale_by_lion_k": Case(
        o.scale_by_lion_k, converges=lambda lr: o.lion_k(lr, weight_decay=0.0), exports=("scale_by_lion_k",)
    ),
    "lion_k_l2": Case(
        functools.partial(o.lion_k, 1e-2, kappa="l2"),
        ready=True,
        exports=("lion_k",),
        # The direction is needed for its norm first. One leaf, as the plain update of optax.lion.
        temporary=1.0,
        spike=3.0,
    ),
    "lion_k_bf16": Case(
        functools.partial(o.lion_k, 1e-2, mu_dtype=jnp.bfloat16),
        ready=True,
        # The unrounded momentum is not stored, so the old one is needed for it: a copy in bfloat16.
        temporary=0.5,
        spike=3.0,
        low_precision=True,
    ),
    "lion_k_huber": Case(
        functools.partial(o.lion_k, 1e-2, kappa=o.kappa_huber(0.1)),
        ready=True,
        converges=lambda lr: o.lion_k(lr, kappa=o.kappa_huber(0.1), weight_decay=0.0),
        exports=("kappa_huber",),
        spike=3.0,
    ),
    "lion_k_entropic": Case(
        functools.partial(o.lion_k, 1e-2, kappa=o.kappa_entropic(10.0)),
        ready=True,
        converges=lambda lr: o.lion_k(lr, kappa=o.kappa_entropic(10.0), weight_decay=0.0),
        exports=("kappa_entropic",),
        spike=3.0,
    ),
}
