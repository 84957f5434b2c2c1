"""Optimistic mirror descent."""

import functools

import jax
import jax.numpy as jnp
from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "optimistic_mirror_descent": Case(
        functools.partial(o.optimistic_mirror_descent, 1e-2),
        ready=True,
        exports=("optimistic_mirror_descent",),
        temporary=2.0,  # the state is overwritten with the gradient while its old value is read
    ),
    "optimistic_mirror_descent_adaptive": Case(
        functools.partial(
            o.optimistic_mirror_descent,
            1e-1,
            adaptive=True,
            projection=functools.partial(jax.tree.map, lambda x: jnp.clip(x, -2.0, 3.0)),
        ),
        ready=True,
        temporary=2.0,  # the centre and the point, of which the projection may be any function
        injectable=False,  # the projection is a function, which inject_hyperparams would call
    ),
    "optimistic_mirror_descent_entropy": Case(
        functools.partial(o.optimistic_mirror_descent, 1e-1, mirror="entropy", adaptive=True),
        ready=True,
        temporary=3.0,  # the logits, which are needed for their maximum and sum first
    ),
}
