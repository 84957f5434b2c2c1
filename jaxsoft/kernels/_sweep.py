"""The interface of a kernel backend: one function, `sweep`, that visits the tiles of a matrix of scores.

Everything the kernels do is a sweep. Forward passes carry the states of row reductions along the columns. Backward
passes carry the gradients of per-row operands, write those of the scores, and return the gradients of per-column
operands as sums over each block of rows. The computation in a tile is the caller's `body`, which consists of the
engine's own functions; a backend loads and stores blocks, and contains no formula.

    sweep(kernel, body, scores, operands, init, plan) -> Result

Shapes: a batch of G matrices of n rows and S columns, visited in tiles of `br` rows and `bc` columns. If rows or
columns have features, `[G, n, D]`, those of C matrices may lie side by side, as heads do: `[G / C, n, C, D]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft._numerics import accumulation_dtype


def abreast(a: Any) -> int:
    """The number of matrices whose features lie side by side in an operand."""
    return a.shape[2] if len(a.shape) == 4 else 1


def of_one(a: Any) -> tuple[int, ...]:
    """The shape of one row's (or column's) part of an operand `[G, n, ...]`: `()` or `(k,)`."""
    return a.shape[3:] if len(a.shape) == 4 else a.shape[2:]


def apart(a: jax.Array) -> jax.Array:
    """`[G / C, n, C, k]` as `[G, n, k]`, a copy; other arrays as they are."""
    return jnp.swapaxes(a, 1, 2).reshape(-1, a.shape[1], a.shape[3]) if len(a.shape) == 4 else a


class Scores(NamedTuple):
    """The scores before any elementwise operation: stored values, or the product of two matrices.

    Attributes:
      values: `[G, n, S]`; None for a product.
      left: `[G, n, D]`, or side by side.
      right: `[G, D, S]`, or if `transposed` `[G, S, D]`, possibly side by side. G may be 1, shared by all.
      transposed: whether `right` has the columns first.
      precision: of the product.
    """

    values: Any = None
    left: Any = None
    right: Any = None
    transposed: bool = False
    precision: Any = None

    @property
    def wide(self) -> Any:
        """The dtype in which a tile is computed: float32 (of float64, which tests interpret, float64)."""
        return accumulation_dtype(self.dtype)

    @property
    def dtype(self) -> Any:
        """The dtype of the values, or of the two matrices."""
        return (self.left if self.values is None else self.values).dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """G, n and S."""
        if self.values is not None:
            return self.values.shape
        columns = self.right.shape[1 if self.transposed else 2]
        return (self.left.shape[0] * abreast(self.left), self.left.shape[1], columns)


class Operands(NamedTuple):
    """Arrays that a tile reads in addition to its scores; pytrees, or None.

    Attributes:
      rows: leaves `[G, n]` or `[G, n, k]`, the latter possibly side by side; here and below, G may be 1, shared by all.
      cols: leaves `[G, S]` or `[G, S, k]`, the latter possibly side by side.
      entries: leaves `[G, n, S]`; masks are int8.
      start: int32 scalar: the index, in the whole row, of column 0 of these scores.
      seen: `[M, nI, nJ]` booleans, one per tile of `Plan.tiles`; False if the tile has nothing to do in any of `G / M`
        consecutive matrices.
    """

    rows: Any = None
    cols: Any = None
    entries: Any = None
    start: Any = 0
    seen: Any = None


class Block(NamedTuple):
    """A tile, as `body` gets it.

    Attributes:
      raw: `[br, bc]` scores, in float32; arbitrary beyond the last row or column.
      rows: leaves `[br]` or `[br, k]` of the operands; rows beyond the last repeat its values (`body` may divide by
        them, and the gradient must be a number there although it is not used).
      cols: leaves `[bc]` or `[bc, k]`; columns beyond the last repeat its values.
      entries: leaves `[br, bc]`; arbitrary beyond the last row or column.
      row: `[br, bc]` int32, the row of each entry (also beyond the last).
      col: `[br, bc]` int32, the column of each entry in the whole row, `start` added.
      batch: int32 scalar, the index of the matrix.
      inside: `[br, bc]` booleans, False beyond the last row or column; None if no tile reaches beyond. Bodies must
        respect it even if `Plan.tiles` divides the scores: a backend may choose other tiles.
      left: the block of `Scores.left`, `[br, D]`, 0 beyond the last row; None for stored scores.
      right: the block of `Scores.right`, `[D, bc]` or `[bc, D]`, 0 beyond the last column.
    """

    raw: Any
    rows: Any
    cols: Any
    entries: Any
    row: Any
    col: Any
    batch: Any
    inside: Any
    left: Any = None
    right: Any = None


class Result(NamedTuple):
    """What a sweep returns.

    Attributes:
      carry: the final carry of each row for each part of its columns, leaves `[parts, G, n, ...]`.
        With `over="rows"`: `[1, G, S, ...]`.
      entries: the entry outputs, leaves `[G, n, S]`.
      cols: the column outputs, leaves `[G, nI, S, ...]`, nI the number of blocks of rows.
    """

    carry: Any
    entries: Any
    cols: Any


class Out(NamedTuple):
    """What `body` returns.

    Attributes:
      carry: the new carry, leaves `[br, ...]` (with `over="rows"`: `[bc, ...]`).
      entries: leaves `[br, bc]`.
      cols: leaves `[bc, ...]`, sums over the rows of the tile.
    """

    carry: Any = ()
    entries: Any = ()
    cols: Any = ()


Body = Callable[[Block, Any], Out]
"""`(block, carry) -> Out`, traced by the backend on values of a tile."""

Init = Callable[[Any, jax.Array], Any]
"""`(rows, like) -> the carry before the first tile`; `like` is `[br]` zeros in float32.

With `over="rows"` it gets the columns, and `like` is `[bc]`.
"""


class Tiles(NamedTuple):
    """How a sweep cuts the scores.

    Attributes:
      rows: rows of a tile.
      columns: columns of a tile.
      parts: the number of parts into which the columns are divided, each with its own carry.
    """

    rows: int
    columns: int
    parts: int = 1


class Plan(NamedTuple):
    """The static properties of a sweep, in addition to `body` and the shapes.

    Attributes:
      over: `"columns"` if the carry belongs to rows and moves along the columns, else `"rows"`.
      entry_dtypes: dtypes of the entry outputs.
      live: `(i, j, rows, columns) -> whether tile (i, j) of that size has anything to do`, for int32
        scalars i and j; None: all do. (`Operands.seen` tells what is known only at run time.)
        A tile with nothing to do is not computed and, if possible, not fetched: it changes no carry; its entry
        and column outputs are 0.
      tiles: tile sizes that suit the caller, whose `live` and `Operands.seen` refer to them. The TPU backend uses them;
        the GPU backend chooses its own.
    """

    over: str = "columns"
    entry_dtypes: tuple = ()
    live: Callable | None = None
    tiles: Tiles | None = None
