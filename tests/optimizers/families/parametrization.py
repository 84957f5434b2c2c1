"""Multipliers for each leaf."""

import functools

import jax
import jax.numpy as jnp
from optimizers.case import Case

from jaxsoft import optimizers as o


def by_axes(params):
    return jax.tree.map(lambda p: "matrix" if jnp.ndim(p) > 1 else "rest", params)


def by_spectrum(params):
    return o.temp_balance_multipliers(params, min_eigenvalues=1)


CASES = {
    "scale_by_multipliers": Case(
        functools.partial(o.scale_by_multipliers, {"matrix": 0.25, "rest": 2.0}, labels=by_axes),
        exports=("scale_by_multipliers",),
    ),
    "scale_by_multipliers_refreshed": Case(
        functools.partial(o.scale_by_multipliers, multipliers=by_spectrum, update_every=2),
    ),
}
