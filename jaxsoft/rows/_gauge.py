"""The gauge (reference exponent) of the exponential family.

A state `(m, *sums)` holds sums of `e^(x - m) f(x)`. The gauge m may be any value that avoids overflow; moving it
multiplies every sum by `e^(m_old - m_new)`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._numerics import finite_gauge
from jaxsoft.rows._reduction import Tile


def running_max(m: jax.Array, tile: Tile) -> jax.Array:
    """The larger of the gauge m and the tile's largest score."""
    if tile.finished:
        return lax.stop_gradient(m)
    tile_max = jnp.max(tile.scores, axis=-1, initial=-jnp.inf)
    return lax.stop_gradient(jnp.maximum(m, tile_max))


def rescale(m_old: jax.Array, m_new: jax.Array) -> jax.Array:
    """`e^(m_old - m_new)`; 0 where the old state is empty."""
    return jnp.where(m_old == -jnp.inf, 0, jnp.exp(finite_gauge(m_old) - finite_gauge(m_new)))


def exponentials(tile: Tile, m: jax.Array) -> jax.Array:
    """`e^(x - m)`; 0 for absent entries."""
    return jnp.exp(tile.scores - finite_gauge(m)[..., None])


def keep_gauge(state):
    """The empty state in the gauge of a finished one: `(m, s, ...) -> (m, 0, ...)`."""
    return (state[0], *jax.tree.map(jnp.zeros_like, state[1:]))
