"""The last pass of an attention: a normalizer's statistics and its weighted sums of values, as one reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.attention._rows import AttentionRows
from jaxsoft.normalizers import Normalizer, softmax
from jaxsoft.normalizers.inner import changed, is_exponential, key_words, random_bits, with_sink
from jaxsoft.rows import RowReduction
from jaxsoft.rows.inner import shares


class WeightedState(NamedTuple):
    """The state of a normalizer's statistics, and `sum_j terms(x_j)[a] v_j` for each of its terms."""

    statistics: Any
    values: tuple


def _product(weights: Array, values: Array) -> Array:
    # Unlike `einsum`, this does not convert the values to the dtype of tangents.
    last, columns = weights.ndim - 1, values.ndim - 2
    batch = tuple(range(columns))
    dimensions = (((last,), (columns,)), (batch, batch))
    return lax.dot_general(
        weights, values, dimensions, preferred_element_type=accumulation_dtype(values.dtype)
    )


@jax.custom_jvp
def _times_values(weights: Array, values: Array) -> Array:
    """`weights @ values`, with the weights rounded to the dtype of the values."""
    return _product(weights.astype(values.dtype), values)


@_times_values.defjvp
def _times_values_jvp(primals, tangents):
    """The cotangent of the weights is not rounded: that of a score is a small difference of such numbers.

    Kernels for TPUs have no rule for symbolic zeros.
    """
    (weights, values), (d_weights, d_values) = primals, tangents
    return _times_values(weights, values), _product(d_weights, values) + _times_values(weights, d_values)


@functools.cache
def weighted_values(normalizer: Normalizer, width: int) -> RowReduction:
    """The reduction of a normalizer (given without its arrays) to the output; `Tile.col_args` holds the values."""
    statistics = normalizer.statistics

    def init(like, params):
        state = () if statistics is None else statistics.init(like, params)
        return WeightedState(
            state, (jnp.broadcast_to(like[..., None], (*like.shape, width)),) * normalizer.size
        )

    def add(state, tile, params):
        terms = normalizer.terms(tile, state, params)
        (values,) = tile.col_args
        return tuple(_times_values(t, values) for t in terms)

    def update(state, tile, params):
        tile = changed(normalizer.before, tile, params)
        new = () if statistics is None else statistics.update(state.statistics, tile, params)
        old_values = _moved(normalizer, state, new, params)
        return WeightedState(new, tuple(map(jnp.add, old_values, add(new, tile, params))))

    def merge(a, b, params):
        if statistics is None:
            return WeightedState((), tuple(map(jnp.add, a.values, b.values)))
        new = statistics.merge(a.statistics, b.statistics, params)
        return WeightedState(
            new, tuple(map(jnp.add, _moved(normalizer, a, new, params), _moved(normalizer, b, new, params)))
        )

    def finalize(state, params):
        coefficients = normalizer.coefficients(state.statistics, params)
        return functools.reduce(jnp.add, (c[..., None] * v for c, v in zip(coefficients, state.values)))

    def share(state, tile, params):
        tile = changed(normalizer.before, tile, params)
        own = [] if statistics is None else shares(statistics, state.statistics, tile, params)
        return [*own, *add(state.statistics, tile, params)]

    reduction = RowReduction(init, update, merge, finalize, share=share)
    known = normalizer.support
    if known is None:
        return reduction

    def support(tile, params):
        return known(changed(normalizer.before, tile, params), params)

    return reduction._replace(support=support)


def _moved(normalizer: Normalizer, state: WeightedState, new: Any, params: Any) -> tuple:
    if normalizer.rescale is None:
        return state.values
    factor = normalizer.rescale(state.statistics, new, params)[..., None]
    return tuple(factor * v for v in state.values)


@functools.cache
def _dropped(terms, rate: float):
    def after_dropout(tile, state, params):
        words = (params["drop0"][..., None], params["drop1"][..., None])
        bits = random_bits(words, params["drop_row"][..., None], tile.cols)
        keep = bits >= jnp.uint32(round(rate * 2**32))
        return tuple(jnp.where(keep, t / (1 - rate), 0) for t in terms(tile, state, params))

    return after_dropout


def with_dropout(normalizer: Normalizer, rate: float, words, rows: Array) -> Normalizer:
    """Drops weights at random, after normalization, and scales up the others; rows of one number drop the same."""
    params = {
        "drop0": jnp.broadcast_to(words[0], rows.shape),
        "drop1": jnp.broadcast_to(words[1], rows.shape),
        "drop_row": rows,
    }
    return normalizer._replace(terms=_dropped(normalizer.terms, rate), params={**normalizer.params, **params})


def define(normalizer: Callable | None, rows: AttentionRows) -> Normalizer:
    """The last pass of a normalizer given as a public function, a `partial` of one, or a `Normalizer`."""
    normalizer = softmax if normalizer is None else normalizer
    if isinstance(normalizer, Normalizer):
        return normalizer
    options: dict[str, Any] = {}
    function = normalizer
    while isinstance(function, functools.partial):
        if function.args:
            raise ValueError(f"normalizer must get its options by keyword, got positional {function.args!r}")
        options = {**function.keywords, **options}
        function = function.func
    definition = getattr(function, "define", None)
    if definition is None:
        raise TypeError(
            "normalizer must be a normalizer of jaxsoft that streams (jaxsoft.softmax, jaxsoft.softpick, ...), a "
            f"functools.partial of one, or a Normalizer, got {_checks.describe(normalizer)}; for any other function, "
            "write the attention out with stored scores"
        )
    for name in ("axis", "where"):
        if name in options:
            raise ValueError(f"normalizer must not be given {name}: attention sets its own axis and masks")
    return definition(rows, **options)


def last_pass(
    rows, normalizer, sinks=None, dropout_rate=0.0, dropout_key=None, broadcast_dropout=False
) -> Normalizer:
    """The last pass of a normalizer, with sinks and dropout; runs the earlier passes."""
    last = define(normalizer, rows)
    if sinks is not None:
        if not is_exponential(last):
            raise ValueError(
                "sinks need a one-pass normalizer of the exponential family (softmax, softmax_n, "
                f"scalable_softmax, sink_softmax, ...), got {_checks.describe(normalizer)}"
            )
        last = with_sink(last, rows.per_row("sinks", sinks))
    _checks.flag("broadcast_dropout", broadcast_dropout)
    if dropout_rate:
        if dropout_key is None:
            raise ValueError(f"dropout_key must be a PRNG key for dropout_rate={dropout_rate}, got None")
        numbers = rows.query_number() if broadcast_dropout else rows.row_number()
        last = with_dropout(last, dropout_rate, key_words(dropout_key), numbers)
    return last


def weighting(rows: AttentionRows, normalizer: Normalizer) -> RowReduction:
    """The reduction of the last pass."""
    width = rows.inputs.value.shape[-1]
    return weighted_values(normalizer.functions(), width)._replace(args=(normalizer.params,))
