"""What is static about a sweep on a GPU: its operands, its traced functions, its block sizes.

A `Program` is made in this order, for each width of a tile until one fits: `_describe_operands` gives each operand its
place, `_trace` traces the body and the initial carry to jaxprs, `_try` evaluates these on shapes alone (which finds
what is not supported, and which operands are read how), and `_cut` chooses block sizes that fit into shared memory. The
kernel then evaluates the jaxprs on real tiles with `start` and `visit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoft._trees import align_varying
from jaxsoft.kernels import _trace
from jaxsoft.kernels._device import Kernel
from jaxsoft.kernels._sweep import Operands, Out, Plan, Scores, Tiles, abreast, apart, of_one
from jaxsoft.kernels.gpu import _narrow
from jaxsoft.kernels.gpu._narrow import HALF, Body, Item, Space, Unsupported, Value
from jaxsoft.kernels.gpu._plan import (
    LONGEST_FEATURES,
    WARPGROUP,
    Needs,
    Sizes,
    TooLarge,
    cut,
    features,
    widths,
)

# Number of rows while a body is traced: recognizable, as no other axis has this length.
_TRACED_ROWS = 7919
# The fewest numbers per row or column that may be features (a wide axis); fewer are separate arrays.
_FEWEST_FEATURES = 16
# Names of the axes of features, one for each length, in the order in which they are met.
_LETTERS = "hijklm"
# The most numbers per row that are computed outside of the kernel.
_MOST_AHEAD = 24
# The dtypes of packed numbers.
PACKED = {"f": jnp.float32, "i": jnp.int32}


def _none(*args: Any) -> Any:
    raise AssertionError("per-row numbers are neither loaded nor multiplied")


class Leaf(NamedTuple):
    """An operand, or a carried or returned array, of a sweep.

    Attributes:
      kinds: the kinds of its axes after the batch, as in `Value.kinds`.
      shape: the lengths of these axes, in a tile as it is traced.
      dtype: the dtype that the body sees.
      pack: `"f"` or `"i"` if it is among the packed float32 or int32 numbers, `"w"` (wide) if it is its own array, `""`
        if nothing reads it.
      at: its index among the packed numbers (the first of `count`), or among the wide arrays.
      abreast: how many matrices' features lie side by side in the wide array.
    """

    kinds: tuple
    shape: tuple[int, ...]
    dtype: Any
    pack: str
    at: int
    abreast: int = 1

    @property
    def count(self) -> int:
        """How many arrays over wide axes it consists of."""
        return math.prod(n for n, kind in zip(self.shape, self.kinds) if kind is None)

    def value(self, space: Space, arrays: list) -> Value:
        """The value that consists of these arrays."""
        letters = "".join(k for k in self.kinds if k)
        items = np.empty(tuple(1 if k else n for k, n in zip(self.kinds, self.shape)), object)
        for at, x in zip(np.ndindex(items.shape), arrays, strict=True):
            items[at] = x if isinstance(x, Item) else space.item(letters, _narrow.convert(x, self.dtype))
        return Value(self.kinds, items)

    def numbers(self, space: Space, value: Value) -> list:
        """The arrays that a value consists of, in float32 or int32."""
        dtype = PACKED.get(self.pack, jnp.float32)
        return [_narrow.cast(x, dtype) for x in _narrow.arrays(space, value, self.kinds, self.shape)]


class Packer:
    """A list of leaves, each with its place among the packed numbers or the wide arrays."""

    def __init__(self):
        self.counts = {"f": 0, "i": 0, "w": 0}
        self.leaves: list[Leaf] = []

    def add(self, kinds: tuple, shape: tuple[int, ...], dtype: Any, abreast: int = 1) -> None:
        dtype = jnp.dtype(dtype)
        if dtype.itemsize > 4 or dtype.kind == "c":
            raise Unsupported(f"kernels compute in float32, and {dtype} was given")
        several = sum(k is not None for k in kinds) > 1
        pack = "w" if several else "f" if jnp.issubdtype(dtype, jnp.floating) else "i"
        leaf = Leaf(kinds, shape, dtype, pack, self.counts[pack], abreast)
        if not several and leaf.count > _narrow.LONGEST:
            raise Unsupported(
                f"an array has {leaf.count} numbers per row or column, more than {_narrow.LONGEST}"
            )
        self.counts[pack] += 1 if several else leaf.count
        self.leaves.append(leaf)

    def reduced(self, is_read: Callable[[int], bool]) -> Packer:
        """These leaves, of which narrow ones that are not read have no place."""
        out = Packer()
        for i, leaf in enumerate(self.leaves):
            if leaf.pack == "w" or is_read(i):
                out.add(leaf.kinds, leaf.shape, leaf.dtype, leaf.abreast)
            else:
                out.leaves.append(leaf._replace(pack="", at=0))
        return out

    def packed(self, make: Callable) -> dict[str, Any]:
        """`make(count, dtype)` for the numbers of each dtype, by its name."""
        return {k: make(self.counts[k], dtype) for k, dtype in PACKED.items() if self.counts[k]}

    @property
    def numbers(self) -> int:
        """How many packed numbers there are."""
        return self.counts["f"] + self.counts["i"]

    @property
    def wide(self) -> list[Leaf]:
        """The leaves that are arrays of their own."""
        return [leaf for leaf in self.leaves if leaf.pack == "w"]


class Program:
    """A sweep that is traced and cut into blocks; raises `Unsupported` if that is not possible.

    The major axis of a tile is the one with the carry: rows, or columns with `over="rows"`. A block of threads owns a
    stretch of it and visits the tiles along the minor axis.
    """

    def __init__(self, kernel: Kernel, body, scores: Scores, operands: Operands, init, plan: Plan):
        self.kernel, self.plan = kernel, plan
        self.scores, self.operands = jax.tree.map(_as_copied, (scores, operands))
        self.g, self.n, self.columns = scores.shape
        self.major, self.minor_letter = ("r", "c") if plan.over == "columns" else ("c", "r")
        self.lengths = {"r": self.n, "c": self.columns}
        self._check_scores()
        reasons = []
        skips = plan.live is not None or operands.seen is not None
        length, is_product = self.lengths[self.minor_letter], scores.values is None
        for minor in widths(plan.over, dict(kernel.blocks).get(plan.over), length, is_product, skips):
            try:
                return self._build(body, init, minor)
            except TooLarge as reason:
                reasons.append(reason)
        raise Unsupported(str(reasons[-1]))

    def _build(self, body, init, minor: int) -> None:
        self.minor, scores = minor, self.scores
        # The letter of each number of features, of the product and of wide operands.
        self.letters: dict[int, str] = {}
        depth = 0 if scores.values is not None else scores.left.shape[-1]
        self.resident = 0 < depth <= LONGEST_FEATURES
        if depth:
            self._letter(depth)
        self._describe_operands()
        self.traced = {
            "r": _TRACED_ROWS,
            "c": self._traced_columns(),
            **{v: k for k, v in self.letters.items()},
        }
        self.order = self.major + self.minor_letter + "".join(self.letters.values())
        self._trace(body, init)
        self._compute_ahead()
        self._compare()
        self.products_from_registers: set[tuple] = set()
        self.reads: dict[str, set[str]] = {}
        # Whether products read operands of which some rows count as 0.
        self.uses_sides = self.clears = False
        # Registers of a thread that hold results of products: the scores and carried features among them.
        self.accumulators = self.minor // 2 + sum(features(leaf.shape[1]) // 2 for leaf in self.carry.wide)
        self.crosses_warps = self._try()
        self.sizes = self._cut()

    # --- what is read ----------------------------------------------------------------------------------------

    def _check_scores(self) -> None:
        dtype, plan = jnp.dtype(self.scores.dtype), self.plan
        if 0 in (self.g, self.n, self.columns):
            raise Unsupported("there is nothing to read")
        if self.scores.values is not None:
            if plan.over != "columns":
                raise Unsupported("stored scores can be swept along columns only, not over rows")
            if dtype not in (*HALF, jnp.dtype(jnp.float32)):
                raise Unsupported(f"stored scores must be in bfloat16, float16 or float32, not in {dtype}")
            return
        if self.scores.right.dtype != dtype:
            raise Unsupported(
                f"the two matrices of a product must have one dtype, not {dtype} and {self.scores.right.dtype}"
            )
        if dtype not in HALF:
            raise Unsupported(f"matrix products are in bfloat16 or float16, not in {dtype}")

    def _traced_columns(self) -> int:
        """Number of columns while a body is traced: those of a tile, or along the major axis a recognizable number."""
        return self.minor if self.minor_letter == "c" else 7907

    def _letter(self, size: int) -> str:
        if size not in self.letters:
            if len(self.letters) == len(_LETTERS):
                raise Unsupported("operands have too many different numbers of features")
            self.letters[size] = _LETTERS[len(self.letters)]
        return self.letters[size]

    def _describe_operands(self) -> None:
        """Gives each operand its place: packed numbers, features, or entries."""
        self.rows, self.cols, self.entries = Packer(), Packer(), Packer()
        # For each entry operand: `"e"`, or `"r"` or `"c"` if it is packed there as it varies along one axis; its index.
        self.by_entry: list[tuple[str, int]] = []
        for a in jax.tree.leaves((self.operands.rows, self.operands.cols)):
            if len(a.shape) > 2 and a.shape[-1] >= _FEWEST_FEATURES and jnp.dtype(a.dtype) in HALF:
                self._letter(a.shape[-1])
        for packer, letter, tree in (
            (self.rows, "r", self.operands.rows),
            (self.cols, "c", self.operands.cols),
        ):
            for a in jax.tree.leaves(tree):
                if len(of_one(a)) > 1 or a.shape[1] != self.lengths[letter]:
                    raise Unsupported(
                        f"an operand of shape {a.shape} is not one number or vector per row or column"
                    )
                k = a.shape[-1] if len(a.shape) > 2 else 0
                if k >= _FEWEST_FEATURES and k in self.letters and jnp.issubdtype(a.dtype, jnp.floating):
                    if k > LONGEST_FEATURES:
                        raise Unsupported(
                            f"operands have at most {LONGEST_FEATURES} features per row or column, not {k}"
                        )
                    packer.add((letter, self._letter(k)), (_TRACED_ROWS, k), a.dtype, abreast(a))
                else:
                    packer.add((letter, *[None] * len(of_one(a))), (_TRACED_ROWS, *of_one(a)), a.dtype)
        for a in jax.tree.leaves(self.operands.entries):
            kinds = tuple(k for k, size in zip("rc", a.shape[1:]) if size > 1)
            if kinds == ("r", "c"):
                self.by_entry.append(("e", len(self.entries.leaves)))
                self.entries.add(("r", "c"), (0, 0), a.dtype)
            else:
                packer = self.rows if kinds == ("r",) or not kinds else self.cols
                self.by_entry.append(("r" if packer is self.rows else "c", len(packer.leaves)))
                packer.add(("r",) if packer is self.rows else ("c",), (0,), a.dtype)

    @property
    def own(self) -> Packer:
        """Operands along the major axis."""
        return self.rows if self.major == "r" else self.cols

    @property
    def passing(self) -> Packer:
        """Operands along the minor axis."""
        return self.cols if self.major == "r" else self.rows

    # --- what is computed --------------------------------------------------------------------------------------

    def _trace(self, body, init) -> None:
        """Traces the initial carry and the body to jaxprs, and describes what they return."""
        self.ragged = self._ragged()
        tiles = Tiles(self.traced["r"], self.traced["c"])
        block, carry = _trace.examples(init, self.scores, self.operands, self.plan, tiles)
        own, like = (
            (block.rows if self.major == "r" else block.cols),
            jax.ShapeDtypeStruct((self.traced[self.major],), jnp.float32),
        )
        self.init, _ = _narrow.trace(init, own, like)
        inside = jax.ShapeDtypeStruct((tiles.rows, tiles.columns), jnp.bool_)
        block = block._replace(inside=inside if any(self.ragged.values()) else None)
        self.body, out = _narrow.trace(lambda *args: Out(*body(*args)), block, carry)
        if jax.tree.structure(out.carry) != jax.tree.structure(carry):
            raise Unsupported("the state of a reduction changes its structure from tile to tile")
        self.carry_tree, self.entries_tree, self.cols_tree = (
            jax.tree.structure(a) for a in (carry, out.entries, out.cols)
        )
        self.carry, self.out_cols = Packer(), Packer()
        for a in jax.tree.leaves(carry):
            self._add_output(self.carry, self.major, a)
        for a in jax.tree.leaves(out.cols):
            self._add_output(self.out_cols, "c", a)
        if self.out_cols.counts["w"]:
            raise Unsupported("column outputs cannot be features")
        self.n_entries = len(jax.tree.leaves(out.entries))
        if self.n_entries != len(self.plan.entry_dtypes):
            raise Unsupported("the body does not write one entry output for each of `entry_dtypes`")
        if self.plan.over == "rows" and (self.n_entries or self.out_cols.leaves):
            raise Unsupported("a sweep over rows cannot write entries or columns")
        for dtype in self.plan.entry_dtypes:
            if jnp.dtype(dtype) not in (*HALF, jnp.dtype(jnp.float32)):
                raise Unsupported(f"entry outputs must be in bfloat16, float16 or float32, not in {dtype}")

    def _compute_ahead(self) -> None:
        """Takes out of the body what depends on per-row numbers only: it is computed once, outside of the kernel."""
        count = {"r": n_leaves(self.operands.rows), "c": n_leaves(self.operands.cols)}
        args = {
            "r": self.body.invars[1:][: count["r"]],
            "c": self.body.invars[1 + count["r"] :][: count["c"]],
        }
        self.given = [i for i, leaf in enumerate(self.rows.leaves[: count["r"]]) if leaf.pack != "w"]

        def may_be_kept(shape: tuple[int, ...]) -> bool:
            return shape[:1] == (_TRACED_ROWS,) and math.prod(shape[1:]) < _FEWEST_FEATURES

        ahead, body = _narrow.split(self.body, [args["r"][i] for i in self.given], may_be_kept)
        if sum(math.prod(v.aval.shape[1:]) for v in ahead.outvars) > _MOST_AHEAD:
            ahead, body = ahead._replace(eqns=[], outvars=[]), self.body
        self.ahead, self.body = ahead, body

        def reduced(packer: Packer, letter: str) -> Packer:
            def is_read(i: int) -> bool:
                begins = letter == self.major and _narrow.is_read(self.init, self.init.invars[i])
                return begins or _narrow.is_read(body, args[letter][i])

            return packer.reduced(lambda i: i >= count[letter] or is_read(i))

        self.rows, self.cols = reduced(self.rows, "r"), reduced(self.cols, "c")
        for v in ahead.outvars:
            self.rows.add(("r", *[None] * (len(v.aval.shape) - 1)), v.aval.shape, v.aval.dtype)

    def _compare(self) -> None:
        """Finds the masks by per-row and per-column numbers: on most tiles, they hide nothing."""
        # Place of each argument among the leaves of rows and of columns.
        place: dict[Any, tuple[str, int]] = {}
        count = n_leaves(self.operands.rows)
        for i, v in enumerate(self.body.invars[1:][: count + n_leaves(self.operands.cols)]):
            place[v] = ("r", i) if i < count else ("c", i - count)
        first = len(self.rows.leaves) - len(self.ahead.outvars)
        for i, v in enumerate(self.body.invars[len(self.body.invars) - len(self.ahead.outvars) :]):
            place[v] = ("r", first + i)
        one = {
            v
            for v, (letter, i) in place.items()
            if {"r": self.rows, "c": self.cols}[letter].leaves[i].count == 1
        }
        found = [
            c
            for c in _narrow.comparisons(self.body, one)
            if (place[c.left][0] == "c" if c.right is None else place[c.left][0] != place[c.right][0])
        ]
        skips = self.plan.live is not None or self.operands.seen is not None
        several = self.lengths[self.minor_letter] > self.minor
        # The name of each comparison, and the leaves that it compares.
        self.compared = (
            [(c.name, place[c.left], place.get(c.right)) for c in found] if skips and several else []
        )
        # The body on a tile on which all of them hold.
        self.whole = _narrow.where_true(self.body, {c.out for c in found}) if self.compared else None

    def ahead_of(self, rows: list) -> list:
        """The per-row operands that are computed ahead, from the leaves of `Operands.rows`; `[G or 1, n, ...]`."""
        if not self.ahead.outvars:
            return []
        given = [rows[i] for i in self.given]
        of_each = {
            v for v, a in zip(self.ahead.invars, given) if a.shape[0] > 1
        }  # those that differ between matrices
        for eqn in self.ahead.eqns:
            if any(v in of_each for v in eqn.invars if isinstance(v, _narrow.Name)):
                of_each.update(eqn.outvars)

        def layout(x, dims):
            """Inside shard_map, constants vary over the mesh axes of the operands."""
            del dims
            return align_varying((given, x))[1]

        space = Space({"r": self.n}, self.traced, "r", layout, _none, _none)

        def of_matrix(*arrays):
            values = []
            for a in arrays:
                kinds = ("r", *[None] * (a.ndim - 1))
                items = np.empty((1, *a.shape[1:]), object)
                for at in np.ndindex(items.shape):
                    x = a[(slice(None), *at[1:])]
                    items[at] = space.item("r", _narrow.convert(x, x.dtype))
                values.append(Value(kinds, items))
            out = []
            for v, value in zip(self.ahead.outvars, _narrow.evaluate(space, self.ahead, values)):
                kinds = ("r", *[None] * (len(v.aval.shape) - 1))
                numbers = _narrow.arrays(space, value, kinds, v.aval.shape)
                out.append(jnp.stack(numbers, axis=-1).reshape(self.n, *v.aval.shape[1:]))
            return out

        in_axes = [0 if v in of_each else None for v in self.ahead.invars]
        out_axes = [0 if v in of_each else None for v in self.ahead.outvars]
        given = [a if axis == 0 else a[0] for a, axis in zip(given, in_axes)]
        if not any(axis == 0 for axis in in_axes):
            return [a[None] for a in of_matrix(*given)]
        out = jax.vmap(of_matrix, in_axes, out_axes)(*given)
        return [a if axis == 0 else a[None] for a, axis in zip(out, out_axes)]

    def _add_output(self, packer: Packer, letter: str, a) -> None:
        features = len(a.shape) == 2 and a.shape[1] >= _FEWEST_FEATURES and a.shape[1] in self.letters
        features = features and jnp.issubdtype(a.dtype, jnp.floating)
        if len(a.shape) > 2:
            raise Unsupported(
                f"a carried array has shape {a.shape[1:]} per row: it must be one number or one vector"
            )
        packer.add(
            (letter, self.letters[a.shape[1]]) if features else (letter, *[None] * (len(a.shape) - 1)),
            a.shape,
            a.dtype,
        )

    def _ragged(self) -> dict[str, bool]:
        # Block sizes are chosen after tracing; along the major axis they are 64 or 128, so 128 decides.
        return {
            self.major: self.lengths[self.major] % (2 * WARPGROUP) != 0,
            self.minor_letter: self.lengths[self.minor_letter] % self.minor != 0,
        }

    @property
    def tile_sizes(self) -> dict[str, int]:
        """The length of each axis in the tile of a warpgroup."""
        wide = {letter: features(size) for size, letter in self.letters.items()}
        return {**wide, self.major: WARPGROUP, self.minor_letter: self.minor}

    def space(self, layout: Callable, load: Callable, product: Callable, **functions: Any) -> Space:
        """The space of this sweep's tiles, see `Space` for the functions."""
        return Space(self.tile_sizes, self.traced, self.order, layout, load, product, **functions)

    def tile(self, letters: str) -> str:
        """The letters in the order that axes have in arrays."""
        return "".join(k for k in self.order if k in letters)

    def _try(self) -> bool:
        """Evaluates the jaxprs on shapes, and notes what they read; returns whether they reduce across warps."""

        def load(item):
            self.use(item, "load")
            if item.dims[0] != self.major:
                raise Unsupported("features along the minor axis can be used in matrix products only")
            return jnp.zeros(space.shape(item.dims), _narrow.held(item.x.dtype))

        def product(left, right, kind, letters):
            dims = self._product_of_shapes(left, right, kind, letters)

            def compute(start):
                return jnp.zeros(space.shape(dims), jnp.float32) if start is None else start + 0

            return Item(dims, _narrow.Product(compute))

        space = self.space(lambda x, dims: x, load, product)

        def run():
            def operands(packer: Packer) -> list[Value]:
                out = []
                for leaf in packer.leaves:
                    if not leaf.pack:
                        out.append(None)
                        continue
                    dims = self.tile("".join(k for k in leaf.kinds if k))
                    if leaf.pack == "w" and packer is not self.entries:
                        name = f"{leaf.kinds[0]}{leaf.at}"
                        item = space.item(dims, jax.ShapeDtypeStruct((), leaf.dtype), name)
                        out.append(leaf.value(space, [item]))
                    else:
                        zeros = [jnp.zeros(space.shape(dims), leaf.dtype)] * leaf.count
                        out.append(leaf.value(space, zeros))
                return out

            tile = self.tile("rc")
            carry = self.start(space, operands(self.own))
            values = [leaf.value(space, a) for leaf, a in zip(self.carry.leaves, carry)]
            raw = _narrow.single("rc", space.item(tile, jnp.zeros(space.shape(tile), jnp.float32)))
            zero = jnp.int32(0)
            side = jax.ShapeDtypeStruct((), self.scores.dtype)
            sides = self.sides(space, side, side)
            rows, cols, entries = (operands(packer) for packer in (self.rows, self.cols, self.entries))
            out = self.visit(
                self.body, space, raw, rows, cols, entries, zero, zero, zero, zero, sides, values
            )
            return jax.tree.leaves(out)

        jax.eval_shape(run)
        return space.crosses_warps

    def sides(self, space: Space, left: Any, right: Any) -> list[Value]:
        """`Block.left` and `Block.right` as values in shared memory; none for stored scores."""
        if self.scores.values is not None:
            return []
        letter = self.letters[self.scores.left.shape[-1]]
        columns = "c" + letter if self.scores.transposed else letter + "c"
        return [
            _narrow.single("r" + letter, space.item("r" + letter, left, "left")),
            _narrow.single(columns, space.item(columns, right, "right")),
        ]

    def use(self, item: Item, how: str) -> None:
        """Notes how the body reads an operand in shared memory: by a `"load"` into registers or in a `"product"`."""
        if item.memory in ("left", "right"):
            if not self.resident:
                raise Unsupported(
                    f"the body reads a side of a product of more than {LONGEST_FEATURES} features"
                )
            if not self.scores.transposed:
                raise Unsupported(
                    "the body reads a side of a product, whose right side must then be `[S, D]` (transposed)"
                )
            self.uses_sides = True
        elif item.memory:
            self.reads.setdefault(item.memory, set()).add(how)

    def stored(self, leaf: Leaf) -> Any:
        """The dtype of a wide operand in memory: that of products if only they read it, None if nothing does."""
        how = self.reads.get(f"{leaf.kinds[0]}{leaf.at}")
        return None if how is None else self.half(leaf.dtype) if how == {"product"} else leaf.dtype

    def half(self, dtype: Any) -> Any:
        """The dtype that numbers of a dtype have in matrix products."""
        return dtype if jnp.dtype(dtype) in HALF else jnp.dtype(self.scores.dtype)

    def product_sides(self, left: Item, right: Item, kind: str, letters: str) -> tuple[str, Item, Item]:
        """The axes of a product in the order of its tile, its side along the major axis, and its other side."""
        dims = self.tile(letters)
        a, b = (left, right) if dims[0] in left.dims else (right, left)
        if dims[0] != self.major or dims[0] not in a.dims or dims[1] not in b.dims or not b.memory:
            raise Unsupported("it multiplies tiles in a way that Mosaic GPU has no rule for")
        return dims, a, b

    def _product_of_shapes(self, left: Item, right: Item, kind: str, letters: str) -> str:
        """The axes of a product on shapes; notes what it reads."""
        dims, a, b = self.product_sides(left, right, kind, letters)
        if set(dims) == set("rc"):
            self.accumulators += self.minor // 2
        self.use(a, "product")
        self.use(b, "product")
        self.clears |= b.keep is not None
        if not a.memory and set(a.dims) != {dims[0], kind}:
            raise Unsupported("it multiplies tiles in a way that Mosaic GPU has no rule for")
        if not a.memory or jnp.dtype(a.x.dtype) not in HALF:
            self.products_from_registers.add((kind, self.half(b.x.dtype)))
        return dims

    def start(self, space: Space, own: list) -> list[list]:
        """The carry before the first tile, as the arrays of each leaf."""
        operands = own[: n_leaves(self.operands.rows if self.major == "r" else self.operands.cols)]
        like = Value((self.major,), _narrow.scalar(np.float32(0)).items.reshape(1))
        out = _narrow.evaluate(space, self.init, [*operands, like])
        return [leaf.numbers(space, value) for leaf, value in zip(self.carry.leaves, out)]

    def visit(
        self, body: Body, space: Space, raw, rows, cols, entries, row, col, start, batch, sides, carry
    ) -> tuple:
        """Evaluates a body on a tile: the arrays of each carried leaf, of each entry output, of each column output.

        Args:
          body: `self.body` or `self.whole`.
          space: the space of the arrays.
          raw: the scores.
          rows: values of `self.rows`.
          cols: values of `self.cols`.
          entries: values of `self.entries`.
          row: the first row of the tile.
          col: the first column of the tile.
          start: `Operands.start`.
          batch: the index of the matrix.
          sides: see `sides`.
          carry: values of `self.carry`.
        """
        by = {"r": rows, "c": cols, "e": entries}
        entry_values = [self._as_entries(by[where][i]) for where, i in self.by_entry]
        row_index, col_index = space.iota("r", row), space.iota("c", col)
        inside = []
        if any(self.ragged.values()):
            parts = [
                self._as_entries(_narrow._map(space, lambda x, n=n: x < jax.lax.full_like(x, n), index))
                for index, n in ((row_index, self.n), (col_index, self.columns))
                if self.ragged["r" if index is row_index else "c"]
            ]
            inside = [parts[0] if len(parts) == 1 else _narrow._map(space, jax.lax.bitwise_and, *parts)]
        col_index = _narrow._map(
            space, jax.lax.add, col_index, Value(("c",), _narrow.scalar(start).items.reshape(1))
        )
        args = [
            raw,
            *rows[: n_leaves(self.operands.rows)],
            *cols[: n_leaves(self.operands.cols)],
            *entry_values,
            self._as_entries(row_index),
            self._as_entries(col_index),
            _narrow.scalar(batch),
            *inside,
            *sides,
            *carry,
            *rows[len(rows) - len(self.ahead.outvars) :],
        ]
        out = _narrow.evaluate(space, body, args)
        n_carry = len(self.carry.leaves)
        new = [leaf.numbers(space, v) for leaf, v in zip(self.carry.leaves, out[:n_carry])]
        written = out[n_carry : n_carry + self.n_entries]
        tile = [_narrow.arrays(space, v, ("r", "c"), (0, 0))[0] for v in written]
        left = [
            leaf.numbers(space, v) for leaf, v in zip(self.out_cols.leaves, out[n_carry + self.n_entries :])
        ]
        return new, tile, left

    @staticmethod
    def _as_entries(value: Value) -> Value:
        """One number per row or per column, with the axes of a tile."""
        if value.kinds == ("r", "c"):
            return value
        return Value(("r", None) if value.kinds == ("r",) else (None, "c"), value.items.reshape(1, 1))

    # --- how it is cut -----------------------------------------------------------------------------------------

    def _cut(self) -> Sizes:
        """How the sweep is cut."""
        product = self.scores.values is None
        needs = Needs(
            self.g,
            self.lengths[self.major],
            self.lengths[self.minor_letter],
            self.minor,
            self.plan.over,
            self.scores.left.shape[-1] if product else 0,
            jnp.dtype(self.scores.dtype).itemsize,
            # A second warpgroup would use the same shared memory for sums across warps.
            self.crosses_warps or bool(self.out_cols.leaves),
            self.accumulators,
            self._bytes,
        )
        return cut(needs, dict(self.kernel.blocks), processors(self.kernel))

    def _bytes(self, groups: int, depth: int) -> tuple[int, int, int]:
        """Bytes of shared memory: fixed, per slot of the ring of tiles, and per slot of the ring of steps."""
        major, minor = groups * WARPGROUP, self.minor
        item = jnp.dtype(self.scores.dtype).itemsize
        fixed = 128 * 4 * 4 if self.crosses_warps else 0
        fixed += 4 * major * self.carry.numbers
        fixed += sum(major * features(leaf.shape[1]) * size for leaf, size in self._wide(self.own))
        fixed += sum(major * minor * jnp.dtype(d).itemsize for d in self.plan.entry_dtypes)
        fixed += 4 * groups * minor * self.out_cols.numbers
        fixed += 4 * groups * minor * self.clears
        if self.kernel.interpret:
            fixed += sum(2 * major * self.tile_sizes[k] for k, _ in self.products_from_registers)
        tile = 4 * minor * self.passing.numbers
        tile += sum(minor * features(leaf.shape[1]) * size for leaf, size in self._wide(self.passing))
        tile += sum(major * minor * entry_dtype(leaf.dtype).itemsize for leaf in self.entries.leaves)
        step = 0
        if self.scores.values is not None:
            tile += major * minor * item
        else:
            step = minor * depth * item
            if self.resident:
                fixed += major * depth * item
            else:
                step += major * depth * item
        return fixed, tile, step

    def _wide(self, packer: Packer) -> list[tuple[Leaf, int]]:
        """The wide operands that are read, each with the bytes per number in memory."""
        stored = [(leaf, self.stored(leaf)) for leaf in packer.wide]
        return [(leaf, jnp.dtype(dtype).itemsize) for leaf, dtype in stored if dtype is not None]


def n_leaves(tree: Any) -> int:
    """The number of leaves."""
    return len(jax.tree.leaves(tree))


def _as_copied(a: Any) -> Any:
    """Moves features side by side apart, unless those of a matrix fill whole lines of shared memory in a half dtype."""
    if len(getattr(a, "shape", ())) == 4 and (a.shape[3] != features(a.shape[3]) or a.dtype not in HALF):
        return apart(a)
    return a


def processors(kernel: Kernel) -> int:
    """Multiprocessors of the device."""
    if kernel.interpret:
        return 1
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None and getattr(abstract, "num_cores", None):
        return abstract.num_cores
    try:
        return jax.devices("gpu")[0].core_count
    except (RuntimeError, AttributeError):
        return 132


def entry_dtype(dtype: Any) -> np.dtype:
    """The dtype in which an entry operand is stored: bfloat16 for bytes, which cannot be loaded as they are."""
    dtype = jnp.dtype(dtype)
    if dtype in (*HALF, jnp.dtype(jnp.float32), jnp.dtype(jnp.int32), jnp.dtype(jnp.uint32)):
        return dtype
    return jnp.dtype(jnp.bfloat16) if dtype.itemsize == 1 else jnp.dtype(jnp.int32)
