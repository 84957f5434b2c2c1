"""Shared parts of the exponential normalizers: `e^(x - m)` over its sum, with or without a sink."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._numerics import finite_gauge, safe_divide
from jaxsoft.normalizers._normalizer import Normalizer, Params
from jaxsoft.rows import RowReduction, Tile
from jaxsoft.rows.inner import keep_gauge, running_max


def exponentials(tile: Tile, m: Array, params: Params) -> Array:
    """`e^(scale (x - m))`, 0 for absent entries. The scale multiplies exact differences rather than scores."""
    m = finite_gauge(m)[..., None]
    if "scale" not in params:
        return jnp.exp(tile.scores - m)
    # -inf times the scale would have the derivative NaN.
    return jnp.exp(jnp.where(tile.keep, (tile.x - m) * params["scale"][..., None], -jnp.inf))


def rescale(old, new, params: Params) -> Array:
    """`e^(scale (m_old - m_new))`, the factor that moves sums from the old gauge to the new."""
    distance = finite_gauge(old[0]) - finite_gauge(new[0])
    return jnp.where(
        old[0] == -jnp.inf, 0, jnp.exp(distance * params["scale"] if "scale" in params else distance)
    )


def _init(like, params):
    return jnp.full_like(like, -jnp.inf), like


def _merge(a, b, params):
    m = jnp.maximum(a[0], b[0])
    return m, a[1] * rescale(a, (m,), params) + b[1] * rescale(b, (m,), params)


def gauged_sum(init: Callable, terms: Callable[[Tile, Array, Params], Array]) -> RowReduction:
    """The state is (m, s): m the largest score, at least that of `init`; s the sum of `terms(tile, m, params)`."""

    def update(state, tile, params):
        m = running_max(state[0], tile)
        return m, state[1] * rescale(state, (m,), params) + jnp.sum(terms(tile, m, params), axis=-1)

    return RowReduction(init, update, _merge, neutral=keep_gauge)


SUM = gauged_sum(_init, exponentials)
"""The state is (m, s = sum e^(scale (x - m))) with m the largest score; the scale is 0 or more, 1 by default."""


def exponent(state, params: Params) -> Array:
    """The reference exponent of a state's sums."""
    m = state[0]
    return jnp.where(m == -jnp.inf, m, finite_gauge(m) * params["scale"]) if "scale" in params else m


def _terms(tile: Tile, state, params: Params):
    return (exponentials(tile, state[0], params),)


def coefficient(state, params: Params) -> tuple[Array, ...]:
    """`1 / sum e^(x - m)`; with a sink, a logit without a value, `1 / (sum e^(x - m) + e^(sink - m))`."""
    s = state[1]
    if "sink" not in params:
        return (safe_divide(jnp.ones_like(s), s),)
    m, sink = exponent(state, params), params["sink"]
    # A common gauge: neither e^(m - gauge) nor e^(sink - gauge) overflows.
    gauge = finite_gauge(jnp.maximum(m, sink))
    # Differentiable in the scale, unlike a gauge: the scale does not multiply the sink.
    moved = jnp.where(m == -jnp.inf, 0, jnp.exp(jnp.where(m == -jnp.inf, 0, m) - gauge))
    return (safe_divide(moved, s * moved + jnp.exp(sink - gauge)),)


SOFTMAX = Normalizer(SUM, _terms, coefficient, rescale)


def with_sink(normalizer: Normalizer, sink: Array) -> Normalizer:
    """Adds the mass `e^sink` to the denominator, once, at the end; it is added to an earlier sink."""
    if "sink" in normalizer.params:
        sink = jnp.logaddexp(normalizer.params["sink"], sink)
    return normalizer._replace(params={**normalizer.params, "sink": sink})


def scaled(normalizer: Normalizer, scale: Array, *, positive: bool = True) -> Normalizer:
    """Softmax of `scale * x`, with or without sink; `positive`: whether all factors, one per row, are known to be."""
    if not positive:
        normalizer = normalizer.preceded_by(_flipped, sign=jnp.where(lax.stop_gradient(scale) < 0, -1, 1))
        scale = jnp.where(scale < 0, -scale, scale)
    return normalizer._replace(params={**normalizer.params, "scale": scale})


def _flipped(tile: Tile, params: Params) -> Tile:
    return tile.with_values(tile.x * params["sign"][..., None])


def times_scale(tile: Tile, params: Params) -> Tile:
    """The tile of `scale * x`."""
    return tile.with_values(tile.x * params["scale"][..., None])


def is_left(tile: Tile, params: Params) -> Array:
    """`Normalizer.support` for functions in `before` that make entries absent."""
    del params
    return tile.keep


def is_exponential(normalizer: Normalizer) -> bool:
    """Whether the denominator can take a sink."""
    return normalizer.coefficients is coefficient
