"""Reductions over two rows of logits at once: of student and teacher, or of an example and its adversarial version.

The second row is an entry argument of the reduction, so that either row may be an expression. A masked class is absent
from both rows. A logit of -inf in one row is probability 0 in that row; the other row keeps the class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


@functools.cache
def _on_second(function: Callable | None) -> Callable | None:
    if function is None:
        return None

    def run(state, tile, *args):
        return function(state, tile.second_row(), *args)

    return run


def of_second(reduction: RowReduction, second: Logits) -> RowReduction:
    """`reduction`, applied to the second row of logits."""
    return reduction._replace(
        update=_on_second(reduction.update), share=_on_second(reduction.share), entry_args=(second,)
    )


def log_softmax_of(tile: Tile, partition: LogPartition) -> Array:
    """The log-probabilities of a tile; finite for absent entries."""
    parts = partition.along()
    return parts.log_softmax(jnp.where(tile.keep, tile.x, parts.shift))


def zero_init(like, *args):
    """The state of an empty sum."""
    return like


class PairTerm(NamedTuple):
    """A term of a sum over the classes of two rows, by the log-probabilities of a class in both.

    The functions are module-level or cached.

    Attributes:
      both: `(log_p, log_q, *args) -> term` of a class that both rows have.
      first_only: `log_p -> term` of a class of the first row that the second lacks, its limit as q goes to 0.
      second_only: `log_q -> term` of a class of the second row that the first lacks, its limit as p goes to 0.
    """

    both: Callable
    first_only: Callable
    second_only: Callable


@functools.cache
def per_mass(cost: float) -> Callable:
    """The term `cost * p`, by log p: of a class that one row lacks, where it is proportional to the other's mass."""

    def term(log_p):
        return jnp.full_like(log_p, cost) if cost in (0, math.inf) else cost * jnp.exp(log_p)

    return term


@functools.cache
def _pair_update(term: PairTerm) -> Callable:
    def update(state, tile, first, second, *args):
        other = tile.second_row()
        both = tile.keep & other.keep
        log_p, log_q = log_softmax_of(tile, first), log_softmax_of(other, second)
        # 0 where a row lacks the class: finite values, so that no gradient is NaN
        values = term.both(*(jnp.where(both, a, 0) for a in (log_p, log_q)), *(a[..., None] for a in args))
        alone = jnp.where(
            tile.keep, term.first_only(log_p), jnp.where(other.keep, term.second_only(log_q), 0)
        )
        return state + jnp.sum(jnp.where(both, values, alone), axis=-1)

    return update


def where_present(total: Array, present: Array) -> Array:
    """A sum over classes, 0 where there are none; +inf has gradient 0."""
    return jnp.where(present, jnp.where(total == jnp.inf, jnp.inf, total), 0)


def _pair_finalize(total, first, second, *args):
    return where_present(total, (first.log_sum != -jnp.inf) & (second.log_sum != -jnp.inf))


def pair_sum(
    term: PairTerm,
    second: Logits,
    first_partition: LogPartition,
    second_partition: LogPartition,
    *args: Array,
) -> RowReduction:
    """The sum of a term over the classes of two rows of logits; 0 where either row has no classes."""
    return RowReduction(
        zero_init,
        _pair_update(term),
        finalize=_pair_finalize,
        args=(first_partition, second_partition, *args),
        entry_args=(second,),
    )
