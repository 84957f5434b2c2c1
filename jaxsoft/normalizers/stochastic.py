"""Stochastic normalizers: weights of randomly perturbed scores.

The noise of an entry depends on the key, its row and its column only: it is the same for every block size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft.normalizers._exponential import SOFTMAX, exponentials, scaled
from jaxsoft.normalizers._normalizer import Normalizer, defined_by, normalize
from jaxsoft.rows import Tile, reductions

Scores = Float[Array, "*rows columns"]


def random_bits(key_words: tuple[Array, Array], rows: Array, cols: Array) -> Array:
    """32 random bits for each pair of a row number and a column (broadcast against each other), by Threefry."""
    from jax.extend.random import threefry2x32_p  # jax.extend imports Pallas

    arrays = jnp.broadcast_arrays(*key_words, rows, cols.astype(jnp.uint32))
    return threefry2x32_p.bind(*arrays)[0]


def mixed_bits(row_words: tuple[Array, Array], col_words: tuple[Array, Array]) -> Array:
    """32 random bits per entry, from two words per row and two per column (which Threefry made).

    A dozen integer operations per entry, where Threefry takes over a hundred: two rounds of a multiplication between
    shifts, with the constants of the `lowbias32` hash. Between the rounds the second words enter, so that equal first
    words do not make equal entries.
    """
    x = row_words[0] + col_words[0]
    x = ((x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) ^ col_words[1]) + row_words[1]
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def two_words(key_words: tuple[Array, Array], numbers: Array) -> tuple[Array, Array]:
    """Two words of 32 random bits for each number, by Threefry."""
    from jax.extend.random import threefry2x32_p

    # Zeros made of the numbers: the rule of this primitive for `vmap` needs both mapped, or none.
    numbers = numbers.astype(jnp.uint32)
    return tuple(threefry2x32_p.bind(*jnp.broadcast_arrays(*key_words, numbers, numbers & 0)))


def key_words(key: Array) -> tuple[Array, Array]:
    """Two 32-bit words drawn from a PRNG key of any implementation."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    return words[0], words[1]


def uniform(bits: Array, dtype) -> Array:
    """Numbers strictly between 0 and 1, from 32 random bits."""
    return ((bits >> 9).astype(dtype) + 0.5) * 2.0**-23


def _with_gumbel_noise(tile: Tile, params) -> Tile:
    words = (params["key0"][..., None], params["key1"][..., None])
    u = uniform(random_bits(words, params["row"][..., None], tile.cols), tile.x.dtype)
    return tile.with_values(tile.x - jnp.log(-jnp.log(u)))


def _straight_through_terms(tile, state, params):
    p = exponentials(tile, params["gauge"], params) * params["unit"][..., None]
    chosen = (tile.cols == params["index"][..., None]).astype(p.dtype)
    return (p + lax.stop_gradient(chosen - p),)


def _ones(state, params):
    return (jnp.ones_like(params["unit"]),)


def _gumbel_softmax(rows, *, key, temperature=1.0, hard=False):
    _checks.flag("hard", hard)
    key0, key1 = (jnp.broadcast_to(word, rows.shape) for word in key_words(key))
    row = rows.row_number()
    sharpness = 1 / rows.per_row("temperature", temperature)
    soft = scaled(SOFTMAX, sharpness).preceded_by(_with_gumbel_noise, key0=key0, key1=key1, row=row)
    if not hard:
        return soft
    state = rows.state(soft)
    index = rows.state(soft._replace(statistics=reductions.argmax()))[1]
    (unit,) = soft.coefficients(state, soft.params)
    params = {**soft.params, "gauge": state[0], "unit": unit, "index": index}
    return Normalizer(None, _straight_through_terms, _ones, before=soft.before, params=params)


@defined_by(_gumbel_softmax)
def gumbel_softmax(
    scores: Scores,
    key: Array,
    *,
    temperature: float | Float[Array, "#*rows"] = 1.0,
    hard: bool = False,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Scores:
    """`softmax((x + g) / temperature)` with Gumbel noise g: a differentiable sample from `softmax(x)`.

    The noise is not that of `jax.random.gumbel` on the same key: it is drawn entry by entry, so that attention may
    stream it.

    Args:
      scores: `[*rows, columns]`, floating: unnormalized log-probabilities.
      key: a PRNG key.
      temperature: positive: a number, or an array that broadcasts to `[*rows]`. Towards 0 the sample becomes one-hot.
      hard: whether the weights are one-hot, with the gradient of the soft ones (straight-through).
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Jang et al., "Categorical Reparameterization with Gumbel-Softmax".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> x = jnp.zeros((2, 5))
      >>> sample = jaxsoft.gumbel_softmax(x, jax.random.key(0), hard=True)
      >>> print(sample.sum(-1))
      [1. 1.]
    """
    if _checks.is_concrete_number(temperature):
        _checks.number("temperature", temperature, above=0)
    return normalize(
        _gumbel_softmax, scores, axis, where, "gumbel_softmax", key=key, temperature=temperature, hard=hard
    )
