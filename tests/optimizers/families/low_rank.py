"""Fira and its limiter."""

import functools

import optax
from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "limit_norm_growth": Case(
        o.limit_norm_growth,
        converges=lambda lr: optax.chain(o.limit_norm_growth(), optax.adam(lr, b2=0.9), optax.scale(2.0)),
        exports=("limit_norm_growth",),
        spike=3.0,
    ),
    "limit_norm_growth_global": Case(functools.partial(o.limit_norm_growth, 1.5, per_leaf=False), spike=3.0),
    # The rank is a shape: `test_low_rank.py` injects the other numbers.
    "scale_by_fira": Case(
        functools.partial(o.scale_by_fira, 1, update_every=2, scale=0.5, scaling="matrix"),
        exports=("scale_by_fira",),
        injectable=False,
    ),
    "fira": Case(
        functools.partial(o.fira, 1e-2, 2, weight_decay=0.1),
        ready=True,
        converges=lambda lr: optax.chain(o.fira(lr, 1, b2=0.99), optax.scale(2.0)),
        exports=("fira",),
        injectable=False,
    ),
}
