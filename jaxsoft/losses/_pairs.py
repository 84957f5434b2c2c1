"""Reductions over two rows of logits at once: of student and teacher, or of an example and its adversarial version.

The second row is an entry argument of the reduction, so that either row may be an expression. An entry absent from
the first row is absent from the second as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft.losses._common import check_floats
from jaxsoft.rows import LinearLogits, Logits, RowReduction, Tile
from jaxsoft.rows.inner import check_axis
from jaxsoft.rows.reductions import LogPartition


def check_second(name: str, second: Any, logits: Logits, axis: int) -> Logits:
    """Checks a second row of logits, and moves its axis last."""
    check_floats(name, second, logits.shape, "the shape of logits")
    check_axis(second, axis)
    return second if isinstance(second, LinearLogits) else jnp.moveaxis(jnp.asarray(second), axis, -1)


def _second_tile(tile: Tile) -> Tile:
    second = tile.entry_args[0].astype(tile.x.dtype)
    return tile.with_scores(jnp.where(tile.keep, second, -jnp.inf))


@functools.cache
def _on_second(function: Callable | None) -> Callable | None:
    if function is None:
        return None

    def run(state, tile, *args):
        return function(state, _second_tile(tile), *args)

    return run


def of_second(reduction: RowReduction, second: Logits) -> RowReduction:
    """`reduction`, applied to the second row of logits."""
    return reduction._replace(
        update=_on_second(reduction.update), share=_on_second(reduction.share), entry_args=(second,)
    )


def log_softmax_of(tile: Tile, partition: LogPartition) -> Array:
    """The log-probabilities of a tile; finite for absent entries."""
    parts = LogPartition(*(part[..., None] for part in partition))
    return parts.log_softmax(jnp.where(tile.keep, tile.x, parts.shift))


def zero_init(like, *args):
    """The state of an empty sum."""
    return like


@functools.cache
def _pair_update(term: Callable, lacking: float) -> Callable:
    def update(state, tile, first, second, *args):
        other = _second_tile(tile)
        values = term(
            log_softmax_of(tile, first), log_softmax_of(other, second), *(a[..., None] for a in args)
        )
        return state + tile.sum(jnp.where(tile.keep & ~other.keep, lacking, values))

    return update


def pair_sum(
    term: Callable,
    second: Logits,
    first_partition: LogPartition,
    second_partition: LogPartition,
    *args: Array,
    lacking: float = float("inf"),
) -> RowReduction:
    """`sum_c term(log p_c, log p'_c, *args)` over two rows of logits.

    A class absent from the second row alone adds `lacking`. `term` is a module-level or cached function.
    """
    return RowReduction(
        zero_init,
        _pair_update(term, lacking),
        args=(first_partition, second_partition, *args),
        entry_args=(second,),
    )
