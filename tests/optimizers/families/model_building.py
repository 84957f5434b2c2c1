"""Stochastic model building and the truncated model, which need the loss: here a quadratic with the gradients given."""

import functools

import jax
import jax.numpy as jnp
import optax
from optimizers.case import Case

from jaxsoft import optimizers as o


def on_a_quadratic(factory, curvature, *args, **kwargs):
    """The transformation with the loss `3 + <g, x - params> + curvature / 2 ||x - params||^2` in each step."""
    tx = factory(*args, **kwargs)

    def update(updates, state, params=None, **extra):
        del extra

        def value_fn(x):
            def leaf(x, p, g):
                d, g = jnp.asarray(x - p, jnp.float32), jnp.asarray(g, jnp.float32)
                return jnp.sum(g * d + curvature / 2 * d * d)

            return 3.0 + sum(jax.tree.leaves(jax.tree.map(leaf, x, params, updates)))

        return tx.update(updates, state, params, value=jnp.asarray(3.0), value_fn=value_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


CASES = {
    "stochastic_model_building": Case(
        functools.partial(on_a_quadratic, o.stochastic_model_building, 0.2, 10.0),
        ready=True,
        exports=("stochastic_model_building",),
        temporary=3.0,  # the trial point, the gradient there, and the step that a branch hands over
        injectable=False,  # a wrapper
        compiles_once=False,
    ),
    "stochastic_model_building_plain": Case(
        functools.partial(on_a_quadratic, o.stochastic_model_building, 0.02, 10.0),
        ready=True,
        temporary=3.0,
        injectable=False,
        compiles_once=False,
    ),
    "scale_by_truncated_model": Case(
        functools.partial(on_a_quadratic, o.scale_by_truncated_model, 1.0, 0.5),
        exports=("scale_by_truncated_model",),
        injectable=False,
    ),
}
