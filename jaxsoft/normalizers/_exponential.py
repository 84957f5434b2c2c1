"""The parts that normalizers of the exponential family share: `e^(x - m)` over its sum, with or without a sink."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._numerics import finite_gauge, safe_divide
from jaxsoft.normalizers._normalizer import Normalizer, Params
from jaxsoft.rows import reductions
from jaxsoft.rows._reduction import Tile

SUM = reductions.logsumexp()  # its state is (m, s = sum e^(x - m))


def rescale(old, new) -> Array:
    """`e^(m_old - m_new)`, what sums in the old gauge are to be multiplied with."""
    return reductions._rescale(old[0], new[0])


def exponentials(tile: Tile, m: Array) -> Array:
    """`e^(x - m)`, 0 for absent entries."""
    return jnp.exp(tile.scores - finite_gauge(m)[..., None])


def _terms(tile: Tile, state, params: Params):
    return (exponentials(tile, state[0]),)


def coefficient(state, params: Params) -> tuple[Array, ...]:
    """`1 / sum e^(x - m)`; with a sink, a logit without an entry, `1 / (sum e^(x - m) + e^(sink - m))`."""
    m, s = state[0], state[1]
    if "sink" not in params:
        return (safe_divide(jnp.ones_like(s), s),)
    sink = params["sink"]
    gauge = finite_gauge(
        jnp.maximum(m, sink)
    )  # that of both: neither e^(m - gauge) nor e^(sink - gauge) overflows
    moved = reductions._rescale(m, gauge)
    return (safe_divide(moved, s * moved + jnp.exp(sink - gauge)),)


SOFTMAX = Normalizer(SUM, _terms, coefficient, rescale)


def with_sink(normalizer: Normalizer, sink: Array) -> Normalizer:
    """Adds the mass `e^sink` to the denominator, once, at the end; to a sink that is there already, too."""
    if "sink" in normalizer.params:
        sink = jnp.logaddexp(normalizer.params["sink"], sink)
    return normalizer._replace(params={**normalizer.params, "sink": sink})


def times_scale(tile: Tile, params: Params) -> Tile:
    """The tile of `scale * x`."""
    return tile.with_values(tile.x * params["scale"][..., None])


def scaled(normalizer: Normalizer, scale: Array) -> Normalizer:
    """The weights of `scale * x`, one factor a row."""
    if "scale" in normalizer.params:
        return normalizer._replace(params={**normalizer.params, "scale": normalizer.params["scale"] * scale})
    return normalizer.preceded_by(times_scale, scale=scale)


def is_exponential(normalizer: Normalizer) -> bool:
    """Whether the denominator can take a sink."""
    return normalizer.coefficients is coefficient
