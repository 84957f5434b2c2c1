"""Thresholds of selections, for a pass over the rows that comes after the one that found them.

The later pass computes the scores anew and may round them otherwise (in blocks of another size, in another program), so
that an entry need not pass a threshold that is its own score. These thresholds leave room.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

_ROOM = 16  # units in the last place


def nth(values: Array, at: Any) -> Array:
    """`values[..., at]`, with an index for all rows or one per row."""
    if isinstance(at, int):
        return values[..., at]
    return jnp.take_along_axis(values, at[..., None], axis=-1)[..., 0]


def room(score: Array, largest: Array) -> Array:
    """How far two computations of a score may lie apart, given the largest score of its row."""
    return _ROOM * jnp.finfo(score.dtype).eps * jnp.maximum(jnp.abs(score), jnp.abs(largest))


def just_below(score: Array, follower: Any = None, largest: Any = None) -> Array:
    """A threshold that an entry passes however it is rounded.

    Args:
      score: the smallest score that must pass, `[*rows]`.
      follower: the next smaller or equal score of the row, which must not pass unless it is as good as equal; -inf if
        there is none, None if it is not known.
      largest: the largest score of the row, if it is known: it tells how large errors may be.
    """
    bound = score - room(score, score if largest is None else largest)
    if follower is not None:
        bound = jnp.minimum(bound, score / 2 + follower / 2)
    return jnp.where(jnp.isfinite(score), bound, score)


class Selection(NamedTuple):
    """The k largest entries of each row; of equal ones those in the first columns. Each `[*rows]`.

    Scores that are not equal keep their order, as long as they are rounded by less than half of what they differ by.

    Attributes:
      bound: what the scores of all of them exceed or equal.
      tied: scores up to here are equal to the last of them; -inf if none is.
      last: the column of the last of them.
    """

    bound: Array
    tied: Array
    last: Array

    @classmethod
    def of(cls, best: Any, k: Any) -> Selection:
        """The first k, a number or one per row, of a `TopK` of k + 1 or more."""
        largest, score, follower = best.values[..., 0], nth(best.values, k - 1), nth(best.values, k)
        near = room(score, largest) / 8
        is_tied = jnp.isfinite(score) & (follower == score)
        middle = score / 2 + follower / 2
        middle = jnp.where(middle == follower, score, middle)  # neighbours among floats, or both infinite
        bound = jnp.where(is_tied, score - near, middle)
        # One is left at least.
        bound = jnp.where(jnp.isfinite(largest), jnp.minimum(bound, largest - near), bound)
        return cls(bound, jnp.where(is_tied, score + near, -jnp.inf), nth(best.indices, k - 1))

    def holds(self, x: Array, cols: Array) -> Array:
        """Whether an entry is one of them; NaN is, so that it shows."""
        return ~(x < self.bound) & (~(x <= self.tied) | (cols <= self.last))
