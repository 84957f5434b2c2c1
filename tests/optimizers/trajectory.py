"""A run of a transformation over given gradients."""

import jax
import optax


def trajectory(tx, params, grads):
    """The parameters after each step, `[steps, *shape]`."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g)[1])(params, grads)
