"""`sweep` as a Pallas kernel for TPUs, with a grid over matrices, blocks of rows and blocks of columns.

The carry lives in its output block, which stays in vector memory while the innermost axis of the grid advances: it is
initialized at the first tile along that axis and updated at each tile. An operand with one number per row is a column
`[rows, 1]` in memory and `[rows]` in `body`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsoft._trees import align_varying
from jaxsoft.kernels import _tables
from jaxsoft.kernels._device import Kernel
from jaxsoft.kernels._sweep import Block, Operands, Out, Plan, Result, Scores, Tiles, abreast, apart
from jaxsoft.kernels._trace import examples, is_ragged, unsupported

# Bytes of vector memory for the blocks of a tile, double buffering included.
_VMEM = 48 * 2**20

# Scalar memory for the tables of tiles (`Operands.seen`), in int32 numbers.
_SCALARS = 2**16

# Lanes of a vector register: how many numbers it holds along the last axis of an array.
_LANES = 128

# Primitives that a reduction might use but Mosaic does not lower for TPUs.
_UNSUPPORTED = {
    "gather", "scatter", "scatter-add", "sort", "top_k", "argmax", "argmin", "dynamic_update_slice", "cumsum",
    "cumlogsumexp", "cummax", "cumprod", "lgamma", "digamma", "erf_inv", "igamma", "igammac", "reduce_prod", "while",
}  # fmt: skip


def unavailable(kernel: Kernel) -> str | None:
    """Why the kernels cannot run on a device, or None if they can."""
    kind = kernel.device_kind
    if kind and not any(name in kind for name in ("v5", "v6", "v7", "TPU7")):
        return f"the kernels are for TPU v5e and later, this is {kind!r}"
    return None


def refusal(kernel: Kernel, body: Callable, scores: Scores, operands: Operands, init: Callable, plan: Plan):
    """Why a sweep cannot run, or None if it can."""
    tiles = tiles_of(kernel, scores, plan)
    tile, name = tiles.rows * tiles.columns * 4 * 4, f"{tiles.rows} x {tiles.columns}"
    if tile > _VMEM:
        return f"a tile of {name} does not fit into vector memory"
    if scores.values is None:
        depth = scores.left.shape[-1] * scores.left.dtype.itemsize * 2
        if tile + (tiles.rows + tiles.columns) * depth > _VMEM:
            return f"rows of {scores.left.shape[-1]} features leave no room for a tile of {name} in vector memory"
    return unsupported(body, init, scores, operands, plan, tiles, _UNSUPPORTED)


def tiles_of(kernel: Kernel, scores: Scores, plan: Plan) -> Tiles:
    """The tile sizes: the caller's (which follow the user's), else the user's, measured ones, or defaults that fit."""
    if plan.tiles is not None:
        return plan.tiles
    _, n, columns = scores.shape
    depth = 0 if scores.values is not None else scores.left.shape[-1] * scores.left.dtype.itemsize * 2
    rows, width = 256, 512 if depth else 1024
    while (rows + width) * depth > _VMEM // 2 and (rows > 128 or width > 128):
        rows, width = (rows // 2, width) if rows >= width else (rows, width // 2)
    for sizes in _tables.sweep_sizes(kernel, scores, plan):
        r, w = sizes.get("rows", rows), sizes.get("columns", width)
        if kernel.blocks or (r + w) * depth + r * w * 16 <= _VMEM:
            rows, width = r, w
            break
    return Tiles(n if n <= rows else rows, columns if columns <= width else width)


class _Layout:
    """How the arrays of a sweep are cut into blocks.

    An operand with one number per row is stored as `[G, n, 1]`, one with a number per column as `[G, 1, S]`: the last
    two axes of every block are then whole, or multiples of a vector register's.
    """

    def __init__(self, scores: Scores, plan: Plan, tiles: Tiles):
        self.batch, self.n, self.columns = scores.shape
        self.br, self.bc, _ = tiles
        self.over_rows, self.plan = plan.over == "rows", plan
        blocks = (pl.cdiv(self.n, self.br), pl.cdiv(self.columns, self.bc))
        self.ni = blocks[0]
        self.grid = (self.batch, *(reversed(blocks) if self.over_rows else blocks))

    def tile(self, g, first, second) -> tuple:
        """`(g, i, j)` of a step of the grid: its matrix, block of rows and block of columns."""
        return (g, second, first) if self.over_rows else (g, first, second)

    def live(self, g, i, j, seen) -> Any:
        """Whether a tile has anything to do; `seen` is a reference to the table of `_bits`, or None."""
        static = True if self.plan.live is None else self.plan.live(i, j, self.br, self.bc)
        if seen is None:
            return static
        table = g // (self.batch // seen.shape[0])
        return static & ((seen[table, i, j // 32] >> (j % 32)) & 1 == 1)

    def output(self, shape: tuple[int, ...], index: Callable) -> pl.BlockSpec:
        """Output blocks of a shape, at `index(g, i, j)` for tile (g, i, j)."""
        return pl.BlockSpec(shape, lambda g, first, second, *_: index(*self.tile(g, first, second)))

    def input(self, a: jax.Array, shape: tuple[int, ...], index: Callable, side: int = 1) -> pl.BlockSpec:
        """Input blocks `[1, *shape]` at `(g, *index(i, j))`, of an array that holds G matrices, or one for all.

        If `side` matrices lie side by side, each has one block of the last axis.

        Tiles with nothing to do read block 0 of the inner axis instead of their own: a run of them fetches it once.
        """

        def at(g, first, second, start, seen=None):
            g, i, j = self.tile(g, first, second)
            if (live := self.live(g, i, j, seen)) is not True:
                i, j = (jnp.where(live, i, 0), j) if self.over_rows else (i, jnp.where(live, j, 0))
            *between, last = index(i, j)
            return (g // side if a.shape[0] > 1 else 0, *between, g % side if side > 1 else last)

        return pl.BlockSpec((1, *shape), at)

    def features(self, a: jax.Array, size: int, at: Callable) -> tuple[jax.Array, pl.BlockSpec]:
        """Features of rows or columns, and their blocks of `size` at `at(i, j)`.

        Matrices stay side by side if their features fill whole registers.
        """
        if a.shape[-1] % _LANES:
            a = apart(a)
        side, width = abreast(a), a.shape[-1]
        a = a.reshape(*a.shape[:2], side * width)
        return a, self.input(a, (size, width), lambda i, j: (at(i, j), 0), side)

    def scores(self, scores: Scores) -> tuple[list, list]:
        """The stored scores, or the two sides of the product, and their blocks."""
        if scores.values is not None:
            return [scores.values], [self.input(scores.values, (self.br, self.bc), lambda i, j: (i, j))]
        left, left_spec = self.features(scores.left, self.br, lambda i, j: i)
        if scores.transposed:
            right, right_spec = self.features(scores.right, self.bc, lambda i, j: j)
        else:
            right = scores.right
            right_spec = self.input(right, (right.shape[1], self.bc), lambda i, j: (0, j))
        return [left, right], [left_spec, right_spec]

    def rows(self, a: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """A row operand and its blocks."""
        a = _whole(a if a.ndim > 2 else a[..., None], 1, self.br)
        return self.features(a, self.br, lambda i, j: i)

    def cols(self, a: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """A column operand and its blocks."""
        if a.ndim == 2:
            a = _whole(a[:, None, :], 2, self.bc)
            return a, self.input(a, (1, self.bc), lambda i, j: (0, j))
        return self.features(_whole(a, 1, self.bc), self.bc, lambda i, j: j)

    def entries(self, a: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """An entry operand and its blocks."""
        return a, self.input(a, (self.br, self.bc), lambda i, j: (i, j))

    def carry(self, a: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], pl.BlockSpec]:
        """The shape of a carried array, per row (with `over="rows"`: per column), and its blocks."""
        width = math.prod(a.shape[1:])
        if self.over_rows:
            return (self.batch, self.columns, width), self.output(
                (1, self.bc, width), lambda g, i, j: (g, j, 0)
            )
        return (self.batch, self.n, width), self.output((1, self.br, width), lambda g, i, j: (g, i, 0))

    def entry_output(self) -> tuple[tuple[int, ...], pl.BlockSpec]:
        """The shape of an entry output, and its blocks."""
        return (self.batch, self.n, self.columns), self.output(
            (1, self.br, self.bc), lambda g, i, j: (g, i, j)
        )

    def col_output(self, a: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], pl.BlockSpec]:
        """The shape of a column output, one number (or k) per column and block of rows, and its blocks."""
        if len(a.shape) == 1:
            shape = (self.batch, self.ni, 1, self.columns)
            return shape, self.output((1, 1, 1, self.bc), lambda g, i, j: (g, i, 0, j))
        shape = (self.batch, self.ni, self.columns, a.shape[1])
        return shape, self.output((1, 1, self.bc, a.shape[1]), lambda g, i, j: (g, i, j, 0))


def _whole(a: jax.Array, axis: int, size: int) -> jax.Array:
    """A row or column operand padded to whole blocks with its last entry (not with zeros: `body` may divide by it)."""
    beyond = -a.shape[axis] % size
    widths = [(0, beyond if k == axis else 0) for k in range(a.ndim)]
    return jnp.pad(a, widths, mode="edge") if beyond else a


def _bits(seen: jax.Array) -> jax.Array | None:
    """`Operands.seen` as bits of int32 `[M, nI, ceil(nJ / 32)]`.

    If that does not fit into scalar memory: one table for all matrices, or None if that does not fit either.
    """
    for table in (seen, jnp.any(seen, axis=0, keepdims=True)):
        m, blocks, tiles = table.shape
        words = -(-tiles // 32)
        if m * blocks * words <= _SCALARS:
            bits = jnp.pad(table, ((0, 0), (0, 0), (0, 32 * words - tiles))).reshape(m, blocks, words, 32)
            bits = bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
            return lax.bitcast_convert_type(jnp.sum(bits, axis=-1, dtype=jnp.uint32), jnp.int32)
    return None


def _pairs(function: Callable, tree: Any) -> tuple[Any, Any]:
    """Maps a function that returns a pair over a tree; returns the tree of the first and that of the second results."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = [function(leaf) for leaf in leaves]
    return treedef.unflatten([p[0] for p in pairs]), treedef.unflatten([p[1] for p in pairs])


def sweep(
    kernel: Kernel, body: Callable, scores: Scores, operands: Operands, init: Callable, plan: Plan
) -> Result:
    """Visits the tiles of `scores`, see `jaxsoft.kernels._sweep`."""
    tiles = tiles_of(kernel, scores, plan)
    layout = _Layout(scores, plan, tiles)
    scalars, inputs, in_specs = _inputs(layout, scores, operands)
    arrays = align_varying((*scalars, *inputs))
    block, carry = examples(init, scores, operands, plan, tiles)
    visit = _Visit(layout, scores, body, init, is_ragged(scores, tiles), block, carry)
    out = jax.eval_shape(body, block, carry)
    out_shape, out_specs = _outputs(layout, carry, out, jax.typeof(arrays[0]).manual_axis_type)

    def visit_tile(start_ref, *refs):
        seen_ref, *refs = refs if len(scalars) == 2 else (None, *refs)
        visit(start_ref, seen_ref, _Refs(*refs))

    results = pl.pallas_call(
        visit_tile,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=layout.grid, in_specs=in_specs, out_specs=out_specs
        ),
        out_shape=out_shape,
        interpret=kernel.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=2 * _VMEM
        ),
    )(*arrays)
    carried = jax.tree.map(lambda a, like: a.reshape(1, *a.shape[:2], *like.shape[1:]), results[0], carry)
    sums = jax.tree.map(lambda a, like: a[:, :, 0] if len(like.shape) == 1 else a, results[2], out.cols)
    return Result(carried, results[1], sums)


def _inputs(layout: _Layout, scores: Scores, operands: Operands) -> tuple[list, list, list]:
    """The scalars that are prefetched, then the other inputs of the kernel (as in `_Refs`) and their blocks."""
    matrices, matrix_specs = layout.scores(scores)
    rows, row_specs = _pairs(layout.rows, operands.rows)
    cols, col_specs = _pairs(layout.cols, operands.cols)
    entries, entry_specs = _pairs(layout.entries, operands.entries)
    start = jnp.reshape(jnp.asarray(operands.start, jnp.int32), (1,))
    seen = None if operands.seen is None else _bits(operands.seen)
    scalars = [start] if seen is None else [start, seen]
    return scalars, [matrices, rows, cols, entries], [matrix_specs, row_specs, col_specs, entry_specs]


def _outputs(layout: _Layout, carry: Any, out: Out, varying: Any) -> tuple[tuple, tuple]:
    """The shapes and blocks of the carry, of the entry outputs and of the column outputs.

    Inside shard_map, results vary over the same mesh axes as the operands: `varying`.
    """
    shapes, specs = zip(
        _pairs(layout.carry, carry),
        _pairs(lambda a: layout.entry_output(), out.entries),
        _pairs(layout.col_output, out.cols),
    )
    entry_dtypes = jax.tree.unflatten(jax.tree.structure(out.entries), layout.plan.entry_dtypes)

    def struct(a: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, getattr(a, "dtype", a), manual_axis_type=varying)

    return jax.tree.map(struct, (carry, entry_dtypes, out.cols), shapes), specs


class _Refs(NamedTuple):
    """References to the blocks of a tile; pytrees like the arrays.

    Attributes:
      matrices: of the stored scores, or of the two sides of the product.
      rows: of the row operands.
      cols: of the column operands.
      entries: of the entry operands.
      carry: of the carry, which is read and written.
      entry_out: of the entry outputs.
      col_out: of the column outputs.
    """

    matrices: list
    rows: Any
    cols: Any
    entries: Any
    carry: Any
    entry_out: Any
    col_out: Any


class _Visit(NamedTuple):
    """The kernel: what one step of the grid does. `example` and `carry` are the shapes that `body` gets."""

    layout: _Layout
    scores: Scores
    body: Callable
    init: Callable
    ragged: bool
    example: Block
    carry: Any

    def __call__(self, start_ref, seen_ref, refs: _Refs) -> None:
        first, second = pl.program_id(1), pl.program_id(2)
        g, i, j = self.layout.tile(pl.program_id(0), first, second)
        block = self._block(start_ref, refs, g, i, j)

        @pl.when(second == 0)
        def _():
            self._begin(refs, block)

        def work():
            self._work(refs, block)

        live = self.layout.live(g, i, j, seen_ref)
        if live is True:
            work()
            return
        pl.when(live)(work)

        @pl.when(jnp.logical_not(live))
        def _():
            outs = (refs.entry_out, refs.col_out)
            _store(outs, jax.tree.map(lambda ref: jnp.zeros(ref.shape, ref.dtype), outs))

    def _block(self, start_ref, refs: _Refs, g, i, j) -> Block:
        """The tile as `body` gets it, without its scores."""
        layout, example = self.layout, self.example
        block = Block(
            None,
            jax.tree.map(_value, refs.rows, example.rows),
            jax.tree.map(_value, refs.cols, example.cols),
            jax.tree.map(_value, refs.entries, example.entries),
            lax.broadcasted_iota(jnp.int32, example.raw.shape, 0) + i * layout.br,
            lax.broadcasted_iota(jnp.int32, example.raw.shape, 1) + j * layout.bc,
            g,
            None,
        )
        if self.ragged:
            block = block._replace(inside=(block.row < layout.n) & (block.col < layout.columns))
        return block._replace(col=block.col + start_ref[0])

    def _begin(self, refs: _Refs, block: Block) -> None:
        """Stores the carry before the first tile."""
        layout = self.layout
        like = jnp.zeros(layout.bc if layout.over_rows else layout.br, self.scores.wide)
        _store(refs.carry, self.init(block.cols if layout.over_rows else block.rows, like))

    def _work(self, refs: _Refs, block: Block) -> None:
        """Adds the scores to the block, calls `body`, and stores what it returns."""
        matrices = [ref[0] for ref in refs.matrices]
        if self.scores.values is not None:
            block = block._replace(raw=matrices[0].astype(self.scores.wide))
        else:
            left, right = matrices
            block = block._replace(raw=_product(self.scores, left, right), left=left, right=right)
        new: Out = self.body(block, jax.tree.map(_value, refs.carry, self.carry))
        _store((refs.carry, refs.entry_out, refs.col_out), (new.carry, new.entries, new.cols))


def _value(ref: Any, like: Any) -> jax.Array:
    """The block of one matrix, in the shape that `body` gets."""
    return ref[0].reshape(like.shape)


def _store(refs: Any, values: Any) -> None:
    jax.tree.map(lambda ref, x: ref.__setitem__(..., x.astype(ref.dtype).reshape(ref.shape)), refs, values)


def _product(scores: Scores, left: jax.Array, right: jax.Array) -> jax.Array:
    """The scores of a tile, in float32."""
    contract = (((1,), (1 if scores.transposed else 0,)), ((), ()))
    return lax.dot_general(
        left, right, contract, precision=scores.precision, preferred_element_type=scores.wide
    )
