"""The description of an attention that its passes take: static sizes and masks, masks known at run time, and arrays.

Shapes: B batch, K key heads, G query heads per key head, T queries, S keys; blocks of `bq` queries and `bk` keys. A
block of queries has R = G * bq rows per key head; per-row arrays are `[nq, B, K, R]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static part of an attention: sizes, block sizes, masks and options.

    Attributes:
      batch: B.
      heads: K.
      groups: G.
      queries: T.
      keys: S.
      bq: queries per block.
      bk: keys per block.
      causal: whether a query sees no later key.
      window: how many positions a query sees to its left and to its right; None: all on that side.
      offset: the position of the first query, or None if positions are known only at run time.
      key_offset: the position of the first key.
      mask_fn: the user's predicate, or None.
      softcap: as in `linear_logits`, or None.
      precision: of the matrix products.
      implementation: the one that the user asked for, or None.
      given: the block sizes that the user asked for, each a number or None.
      chunks: parts of the queries and of the keys that a block should not cross: 2 for given positions.
    """

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    bq: int
    bk: int
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    offset: int | None = 0
    key_offset: int = 0
    mask_fn: Callable | None = None
    softcap: float | None = None
    precision: Any = None
    implementation: str | None = None
    given: tuple[int | None, int | None] = (None, None)
    chunks: int = 1

    @property
    def nq(self) -> int:
        """The number of query blocks."""
        return -(-self.queries // self.bq)

    @property
    def nk(self) -> int:
        """The number of key blocks."""
        return -(-self.keys // self.bk)

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of per-row arrays, `[nq, B, K, R]`."""
        return (self.nq, self.batch, self.heads, self.groups * self.bq)

    def band(self) -> tuple[int | None, int | None]:
        """The visible keys of a query at position p lie in `[p - left, p + right]`; None means no bound."""
        left, right = self.window
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    def live(self, i, j) -> Any:
        """Whether the static masks leave a visible entry in pairs (i, j) of blocks; True if they rule out no pair."""
        if self.offset is None:
            return True
        (left, right), shift = self.band(), self.offset - self.key_offset
        first_q, first_k = i * self.bq + shift, j * self.bk
        live = True
        if left is not None:
            live &= (first_k + self.bk - 1 >= first_q - left) & (self.keys - 1 >= first_q - left)
        if right is not None:
            live &= (first_k <= first_q + self.bq - 1 + right) & (first_k <= self.queries - 1 + shift + right)
        return live

    def pairs(self) -> np.ndarray:
        """`[pairs, 3]`: query block, key block, and whether static masks or padding may hide an entry of the pair."""
        left, right = self.band() if self.offset is not None else (None, None)
        i, j = np.meshgrid(np.arange(self.nq), np.arange(self.nk), indexing="ij")
        shift = (self.offset or 0) - self.key_offset
        last_q = np.minimum((i + 1) * self.bq, self.queries) - 1 + shift
        last_k = np.minimum((j + 1) * self.bk, self.keys) - 1
        live, hidden = np.broadcast_to(self.live(i, j), i.shape), (j + 1) * self.bk > self.keys
        if left is not None:
            hidden |= j * self.bk < last_q - left
        if right is not None:
            hidden |= last_k > i * self.bq + shift + right
        if self.offset is None and self.band() != (None, None):
            hidden |= True
        return np.stack([i[live], j[live], hidden[live]], axis=1).astype(np.int32)


class Visibility(NamedTuple):
    """The masks known only at run time; an absent mask is None.

    Attributes:
      query_lengths: `[B]`.
      key_lengths: `[B]`.
      query_segments: `[B, nq * bq]`.
      key_segments: `[B, nk * bk]`.
      entries: `[B or 1, K or 1, G or 1, T or 1, S or 1]`, padded to whole blocks.
      offset: position of the first query, `[]` or `[B]`, if `AttentionSpec.offset` is None.
      key_offset: position of the first key, likewise.
      query_positions: `[B or 1, nq * bq]`, in place of `offset` where positions are not consecutive.
      key_positions: `[B or 1, nk * bk]`, in place of `key_offset` likewise. Columns are counted from `key_offset`.
      needed: `[nq, nk]`, False for pairs of blocks that the pass need not read.
    """

    query_lengths: Any = None
    key_lengths: Any = None
    query_segments: Any = None
    key_segments: Any = None
    entries: Any = None
    offset: Any = None
    key_offset: Any = None
    query_positions: Any = None
    key_positions: Any = None
    needed: Any = None


class Inputs(NamedTuple):
    """The arrays that scores and outputs are computed from, in blocks.

    Attributes:
      query: `[nq, B, K, R, H]`.
      key: `[nk, B, K, bk, H]`.
      value: `[nk, B, K, bk, Hv]`.
      scale: `[nq, B, K, R]`, multiplies the products; None if it is already folded into the queries.
      bias: `[B or 1, K or 1, G or 1, T or 1, S or 1]`, padded to whole blocks, or None.
      slopes: `[nq, B, K, R]`, multiplied by the distance from query to key and added to the scores, or None.
    """

    query: Any
    key: Any
    value: Any
    scale: Any = None
    bias: Any = None
    slopes: Any = None
