"""A sweep as a Mosaic GPU kernel: one warpgroup fetches tiles, the others compute on 64 rows each, in registers.

Outside of the kernel, `sweep` plans a `Program`; `_Sweep.run` brings the operands into the form that the kernel reads,
calls the kernel, and unpacks its results. In the kernel, a block of threads owns a stretch of the major axis (the one
with the carry) and visits the tiles along the minor axis. Its last warpgroup copies tiles from device memory into rings
of slots in shared memory, ahead of time (`_fetch`). Each of the others waits for a tile, multiplies, evaluates the
body, and frees the slots of the tile (`_compute`). "Own" operands lie along the major axis and are read once per block;
"passing" operands lie along the minor axis and are fetched for each tile.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsoft._trees import align_varying
from jaxsoft.kernels import _tables
from jaxsoft.kernels._device import Kernel
from jaxsoft.kernels._sweep import Operands, Plan, Result, Scores, Tiles, abreast
from jaxsoft.kernels.gpu import _functions, _narrow
from jaxsoft.kernels.gpu._narrow import Item, Space, Unsupported, Value
from jaxsoft.kernels.gpu._plan import WARPGROUP, features
from jaxsoft.kernels.gpu._program import PACKED, Leaf, Packer, Program, entry_dtype, n_leaves


def refusal(kernel: Kernel, body, scores: Scores, operands: Operands, init, plan: Plan) -> str | None:
    """Why this sweep cannot run, or None if it can."""
    try:
        _program(kernel, body, scores, operands, init, plan)
    except Unsupported as reason:
        return str(reason)
    return None


def sweep(kernel: Kernel, body, scores: Scores, operands: Operands, init, plan: Plan) -> Result:
    """Visits the tiles of a matrix of scores: see `jaxsoft.kernels._sweep`."""
    return _Sweep(_program(kernel, body, scores, operands, init, plan)).run()


def _program(kernel: Kernel, body, scores: Scores, operands: Operands, init, plan: Plan) -> Program:
    """The program with the first measured block sizes that fit, else with the backend's own."""
    *measured, own = _tables.sweep_sizes(kernel, scores, plan)
    for sizes in measured:
        try:
            return Program(_with_blocks(kernel, sizes), body, scores, operands, init, plan)
        except Unsupported:
            continue
    return Program(_with_blocks(kernel, own), body, scores, operands, init, plan)


def _with_blocks(kernel: Kernel, sizes: dict[str, int]) -> Kernel:
    return kernel._replace(blocks=tuple(sorted(sizes.items())))


# --- arrays in device memory -----------------------------------------------------------------------------------


def _padded(a, axis: int, size: int, mode: str = "constant"):
    """Pads an array to `size` along an axis, with zeros, or with its last entry if `mode="edge"`."""
    if a.shape[axis] == size:
        return a
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, widths, mode=mode)


def _up(n: int, unit: int) -> int:
    """`n` rounded up to a multiple of `unit`."""
    return -(-n // unit) * unit


def _aligned(a):
    """Pads the last axis to a multiple of 16 bytes, as asynchronous copies require."""
    return _padded(a, a.ndim - 1, _up(a.shape[-1], 16 // a.dtype.itemsize))


def _tiled(a):
    """Pads matrices to whole tiles of 8 lines of 128 bytes, as tensor cores read them; joins those side by side."""
    a = a.reshape(*a.shape[:2], -1)
    return _padded(
        _padded(a, a.ndim - 1, _up(a.shape[-1], 128 // a.dtype.itemsize)), a.ndim - 2, _up(a.shape[-2], 8)
    )


def _packed(program: Program, packer: Packer, leaves: list, length: int) -> dict[str, Any]:
    """Packs narrow leaves `[batches, n, ...]` into one `[batches, count, length]` per dtype; wide leaves stay apart."""
    parts: dict[str, list] = {"f": [], "i": []}
    wide = []
    batches = max(
        (a.shape[0] for leaf, a in zip(packer.leaves, leaves) if leaf.pack in ("f", "i")), default=1
    )
    for leaf, a in zip(packer.leaves, leaves, strict=True):
        if not leaf.pack:
            continue
        if leaf.pack == "w":
            dtype = program.stored(leaf)
            wide.append(None if dtype is None else _tiled(a.astype(dtype)))
            continue
        a = a.reshape(*a.shape[:2], -1).swapaxes(1, 2)
        a = a.astype(jnp.float32 if leaf.pack == "f" else jnp.int32)
        a = jnp.broadcast_to(a, (batches, *a.shape[1:]))
        # Padded with the last entry, not with zeros: the body may divide by it.
        parts[leaf.pack].append(_padded(a, 2, length, "edge"))
    out: dict[str, Any] = {name: jnp.concatenate(each, axis=1) for name, each in parts.items() if each}
    if wide:
        out["w"] = wide
    return out


class _Memory(NamedTuple):
    """What the kernel reads from device memory: arrays, and in the kernel references to them.

    Attributes:
      scores: the values `[G, n, S]`, or the sides of the product along the major and along the minor axis.
      own: packed operands along the major axis.
      passing: packed operands along the minor axis.
      entries: entry operands, with the major axis first, `[G, n, S]` or `[G, S, n]`.
      start: `Operands.start`, `[1]`.
      order: `[M, blocks, tiles]`, the tiles of each block, those with anything to do first, and of these the whole
        ones; one table for each `G / M` matrices. None if all tiles have something to do.
      whole: `[M, blocks]`, how many tiles of a block no mask cuts; None if that is not known.
      live: `[M, blocks]`, how many tiles of a block have anything to do.
      first: `[M, blocks]`, the blocks in the order in which they are started: most live tiles first.
    """

    scores: list
    own: dict
    passing: dict
    entries: list
    start: Any
    order: Any
    whole: Any
    live: Any
    first: Any


class _Results(NamedTuple):
    """What the kernel writes to device memory: shapes, in the kernel references, afterwards arrays.

    Attributes:
      carry: packed numbers, `[parts, G, count, n]`.
      wide: carried features, `[parts, G, n, H]`.
      entries: entry outputs, `[G, n, S]`.
      cols: packed numbers, `[G, blocks of rows, count, S]`.
    """

    carry: dict
    wide: list
    entries: list
    cols: dict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory that one warpgroup fills, again and again in turn, and the computing ones read.

    Attributes:
      full: one barrier per slot: its copies have arrived.
      free: one barrier per slot: all computing warpgroups have read it.
      stages: the number of slots.
    """

    full: Any
    free: Any
    stages: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, stages: int, copies: int, readers: int) -> Self:
        """The barriers to allocate, given the copies that fill a slot and the warpgroups that read it."""
        full, free = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (copies, readers))
        return cls(full, free, stages)

    def slot(self, n):
        """The slot of the n-th filling."""
        return lax.rem(n, jnp.int32(self.stages))

    def claim(self, n) -> tuple:
        """The slot of the n-th filling, once it is free, and the barrier for its copies."""
        slot = self.slot(n)

        @pl.when(n >= self.stages)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        return slot, self.full.at[slot]

    def wait(self, n):
        """The slot of the n-th filling, once it is full."""
        slot = self.slot(n)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, n) -> None:
        """Lets the slot of the n-th filling be filled again."""
        plgpu.barrier_arrive(self.free.at[self.slot(n)])

    def drain(self, n) -> None:
        """Waits until all slots are free, after n fillings.

        No block ends before its barriers have been observed: the interpreter of jax 0.11 insists on it.
        """

        def wait(i, _):
            self.claim(i)

        lax.fori_loop(n, n + self.stages, wait, None)


class _Shared(NamedTuple):
    """Shared memory of a block of threads.

    Attributes:
      tiles: the `Ring` of tiles; None if a tile needs nothing but the steps of its product.
      scores: in the ring of tiles, the stored scores; empty for a product.
      passing: in the ring of tiles, packed passing operands by dtype, and the wide ones (`"w"`).
      entries: in the ring of tiles, the entry operands.
      steps: the `Ring` of product steps; None without a product.
      sides: in the ring of steps, the side along the minor axis, and unless `resident` the one along the major axis.
      own: wide own operands.
      resident: the whole of the product's side along the major axis; None if it does not fit.
      once: barrier of `own` and `resident`, which are fetched once.
      carry: packed carry, on its way to device memory.
      out: entry outputs, on their way to device memory.
      cols: packed column outputs, on their way to device memory.
      flags: which rows of an operand do not count as 0, on their way to another layout; None if all count.
      staged: left sides of products that are in registers, for the interpreter.
    """

    tiles: Any
    scores: list
    passing: dict
    entries: list
    steps: Any
    sides: list
    own: list
    resident: Any
    once: Any
    carry: dict
    out: list
    cols: dict
    flags: Any
    staged: dict


def _tile_in(shape: tuple[int, ...], dtype, whole: tuple[int, ...] | None = None):
    """Shared memory for tiles: swizzled for tensor cores, without bank conflicts, where that is possible.

    An asynchronous copy swizzles only if `whole`, the array in device memory, divides into tiles of 8 lines of 128
    bytes (or of a shorter swizzle). Otherwise the tile is stored line by line.
    """
    item = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if shape[-1] * item % s == 0)
    if whole is not None and (whole[-2] % 8 or whole[-1] % (swizzle // item)):
        return plgpu.SMEM(shape, dtype)
    transforms = plgpu.TilingTransform((8, swizzle // item)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _load(ref, layout):
    """Loads an array in any layout, even one that cannot be loaded as vectors."""
    # Older versions of jax have an index argument.
    everything = [()] if "idx" in inspect.signature(plgpu.load).parameters else []
    return plgpu.load(ref, *everything, layout=layout, optimized=False)


def _store(ref, x) -> None:
    """Stores an array in the dtype of the reference."""
    x = _narrow.cast(x, ref.dtype)
    store = getattr(plgpu, "store", None)
    if store is None:  # an older jax, whose assignments take any layout
        ref[...] = x
    else:
        store(ref, x, optimized=False)


def _accumulator(width: int):
    return plgpu.ACC((WARPGROUP, width), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def _accumulating(start):
    return plgpu.ACC.init(start)  # pyright: ignore[reportPrivateImportUsage]


def _interpreter():
    return getattr(plgpu, "InterpretGPUParams")  # noqa: B009  (older versions have none)


def _transposed(ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


class _Sweep:
    """Runs a program: `run` is what happens around the kernel, `_kernel` is the kernel."""

    def __init__(self, program: Program):
        self.p, self.s = program, program.sizes
        self.product = program.scores.values is None
        # Whether the features of the product's sides come last in memory.
        self.major_first, self.minor_first = (first for _, first in self._sides())
        self.major_length = self.s.blocks * self.s.major
        self.minor_length = self.s.tiles * self.s.minor

    # --- outside of the kernel ---------------------------------------------------------------------------------

    def run(self) -> Result:
        """Calls the kernel on the operands."""
        p, s = self.p, self.s
        memory = self._memory()
        out = self._results()

        def body(*refs):
            self._kernel(jax.tree.structure(memory), jax.tree.structure(out), refs)

        # The name that profilers show.
        body.__name__ = f"sweep_over_{p.plan.over}_{s.groups}x{WARPGROUP}x{s.minor}"
        kernel = plgpu.kernel(
            body,
            out_type=tuple(jax.tree.leaves(out)),
            grid=(p.g, -(-s.blocks // s.together), s.parts, s.together),
            grid_names=("batch", "group", "part", "block"),
            num_threads=s.groups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=_interpreter()() if p.kernel.interpret else None,
        )
        written = jax.tree.unflatten(jax.tree.structure(out), kernel(*jax.tree.leaves(memory)))
        # Inside shard_map, results of a kernel are not yet marked as varying over the mesh axes of its operands.
        written = align_varying((memory, written))[1]
        return self._unpacked(written)

    def _memory(self) -> _Memory:
        """The operands as the kernel reads them; entry operands that vary along one axis only are packed."""
        p = self.p
        rows, cols = jax.tree.leaves(p.operands.rows), jax.tree.leaves(p.operands.cols)
        entries = []
        for a, (where, _) in zip(jax.tree.leaves(p.operands.entries), p.by_entry):
            if where == "r":
                rows.append(jnp.broadcast_to(a[:, :, 0], (a.shape[0], p.n)))
            elif where == "c":
                cols.append(jnp.broadcast_to(a[:, 0, :], (a.shape[0], p.columns)))
            else:
                # A tile has the major axis first: registers cannot transpose it.
                a = a.astype(entry_dtype(a.dtype))
                entries.append(_aligned(a if p.major == "r" else jnp.swapaxes(a, 1, 2)))
        rows += p.ahead_of(rows)
        own, passing = (rows, cols) if p.major == "r" else (cols, rows)
        product = self.product
        scores = [_tiled(side) for side, _ in self._sides()] if product else [_aligned(p.scores.values)]
        own_packed = _packed(p, p.own, own, self.major_length)
        passing_packed = _packed(p, p.passing, passing, self.minor_length)
        all_live = p.plan.live is None and p.operands.seen is None
        order = (None,) * 4 if all_live else self._order(rows, cols)
        start = jnp.asarray(p.operands.start, jnp.int32).reshape(1)
        return _Memory(scores, own_packed, passing_packed, entries, start, *order)

    def _order(self, rows: list, cols: list) -> tuple:
        """`_Memory.order`, `whole`, `live` and `first`, from `Plan.live` and `Operands.seen`.

        The tiles of these may differ in size. Constants if all that they depend on is static.
        """
        p, s = self.p, self.s

        tiles = p.plan.tiles or Tiles(
            s.major if p.major == "r" else s.minor, s.minor if p.major == "r" else s.major
        )
        coarse = (tiles.rows, tiles.columns) if p.major == "r" else (tiles.columns, tiles.rows)
        lengths = (p.lengths[p.major], p.lengths[p.minor_letter])

        def overlapping(i, size: int, axis: int) -> list:
            """The caller's tiles that overlap our i-th one; some may be repeated."""
            last = (np.minimum((i + 1) * size, lengths[axis]) - 1) // coarse[axis]
            return [
                np.minimum(i * size // coarse[axis] + k, last) for k in range((size - 1) // coarse[axis] + 2)
            ]

        def is_live_there(seen, i, j):
            static = True if p.plan.live is None else p.plan.live(i, j, tiles.rows, tiles.columns)
            return static if seen is None else static & seen[i, j]

        def is_live(seen, i, j):
            pairs = [(a, b) for a in overlapping(i, s.major, 0) for b in overlapping(j, s.minor, 1)]
            pairs = pairs if p.major == "r" else [(b, a) for a, b in pairs]
            found = functools.reduce(operator.or_, (is_live_there(seen, a, b) for a, b in pairs))
            return found | np.zeros((s.blocks, s.tiles), bool)

        i, j = np.arange(s.blocks, dtype=np.int32)[:, None], np.arange(s.tiles, dtype=np.int32)
        seen = p.operands.seen
        live = is_live(None, i, j)[None] if seen is None else jax.vmap(lambda each: is_live(each, i, j))(seen)
        whole = self._whole(rows, cols, live)
        xp: Any = np if isinstance(live, np.ndarray) and isinstance(whole, np.ndarray | None) else jnp
        kinds = ~live if whole is None else xp.where(live, xp.where(whole, 0, 1), 2)
        count = live.sum(axis=2).astype(np.int32)
        order = xp.argsort(kinds, axis=2, stable=True).astype(np.int32)
        if whole is not None:
            whole = (whole & live).sum(axis=2).astype(np.int32)
        return order, whole, count, xp.argsort(-count, axis=1, stable=True).astype(np.int32)

    def _whole(self, rows: list, cols: list, live) -> Any:
        """`[M, blocks, tiles]`: whether all comparisons of `Program.compared` hold for all entries of a tile."""
        p, s = self.p, self.s
        sizes = {p.major: (s.blocks, s.major), p.minor_letter: (s.tiles, s.minor)}

        def extreme(letter: str, i: int, name: str):
            """The smallest or largest number in each block, `[1 or M, blocks, 1]` or `[1 or M, 1, tiles]`."""
            a = {"r": rows, "c": cols}[letter][i]
            blocks, size = sizes[letter]
            a = a.reshape(a.shape[0], -1)
            xp: Any = np if isinstance(a, np.ndarray) else jnp
            a = xp.pad(a, ((0, 0), (0, blocks * size - a.shape[1])), mode="edge")
            # Matrices that share a table are taken together.
            each = 1 if a.shape[0] == 1 else a.shape[0] // live.shape[0]
            a = getattr(xp, name)(a.reshape(-1, each, blocks, size), axis=(1, 3))
            return a[:, :, None] if letter == p.major else a[:, None]

        found = []
        for name, left, right in p.compared:
            if right is None:  # flags, none of which may be 0
                found.append(extreme(*left, "min") != 0)
                continue
            low = name in ("le", "lt")  # the largest on the left must be below the smallest on the right
            a, b = extreme(*left, "max" if low else "min"), extreme(*right, "min" if low else "max")
            found.append(getattr(operator, name)(a, b))
        return functools.reduce(operator.and_, found) if found else None

    def _results(self) -> _Results:
        """Shapes and dtypes of what the kernel writes."""
        p, s = self.p, self.s
        struct = jax.ShapeDtypeStruct
        carry = p.carry.packed(lambda n, dtype: struct((s.parts, p.g, n, self.major_length), dtype))
        wide = [
            struct((s.parts, p.g, self.major_length, features(leaf.shape[1])), leaf.dtype)
            for leaf in p.carry.leaves
            if leaf.pack == "w"
        ]
        entries = []
        for dtype in map(jnp.dtype, p.plan.entry_dtypes):
            entries.append(struct((p.g, p.n, _up(p.columns, 16 // dtype.itemsize)), dtype))
        blocks = s.blocks * s.groups
        cols = p.out_cols.packed(lambda n, dtype: struct((p.g, blocks, n, self.minor_length), dtype))
        return _Results(carry, wide, entries, cols)

    def _unpacked(self, out: _Results) -> Result:
        """The results in the structure of the body's outputs, without padding."""
        p = self.p
        major = p.lengths[p.major]

        def numbers(leaf, packed, length):
            """`[*, *, count, padded]` -> `[*, *, length, ...]`."""
            a = packed[leaf.pack][:, :, leaf.at : leaf.at + leaf.count, :length]
            return jnp.moveaxis(a, 2, 3).reshape(*a.shape[:2], length, *leaf.shape[1:]).astype(leaf.dtype)

        carry = [
            out.wide[leaf.at][:, :, :major, : leaf.shape[1]]
            if leaf.pack == "w"
            else numbers(leaf, out.carry, major)
            for leaf in p.carry.leaves
        ]
        entries = [a[:, :, : p.columns] for a in out.entries]
        cols = [numbers(leaf, out.cols, p.columns) for leaf in p.out_cols.leaves]
        return Result(
            jax.tree.unflatten(p.carry_tree, carry),
            jax.tree.unflatten(p.entries_tree, entries),
            jax.tree.unflatten(p.cols_tree, cols),
        )

    # --- the kernel ----------------------------------------------------------------------------------------------

    def _kernel(self, memory_tree, out_tree, refs) -> None:
        """The kernel: allocates shared memory and runs a block of threads."""
        n = memory_tree.num_leaves
        memory, out = jax.tree.unflatten(memory_tree, refs[:n]), jax.tree.unflatten(out_tree, refs[n:])
        pl.run_scoped(
            functools.partial(self._shared, memory, out),
            self._allocations(memory, out),
            collective_axes="warpgroup",
        )

    def _allocations(self, memory: _Memory, out: _Results) -> _Shared:
        """Shapes of shared memory and its barriers, each with the number of copies or warpgroups it waits for."""
        p, s = self.p, self.s
        item = p.scores.dtype
        stages = s.tile_stages if self.product else s.stages

        def wide(packer: Packer, shape: tuple[int, ...]) -> list:
            """Shared memory for wide operands, None for those that the body does not read."""
            stored = [(leaf, p.stored(leaf)) for leaf in packer.wide]
            return [
                None if d is None else _tile_in((*shape, features(leaf.shape[1])), d) for leaf, d in stored
            ]

        own_wide, passing_wide = wide(p.own, (s.major,)), wide(p.passing, (stages, s.minor))
        copies = (
            (0 if self.product else 1)
            + len(p.passing.packed(lambda *_: None))
            + n_leaves(passing_wide)
            + len(p.entries.leaves)
        )
        step, block = [], None
        if self.product:
            # [..., minor, depth] or [..., depth, minor]: the order of axes that it has in device memory.
            shape = (s.minor, s.depth) if self.minor_first else (s.depth, s.minor)
            step = [_tile_in((s.stages, *shape), item)]
            major = (s.major, s.depth) if self.major_first else (s.depth, s.major)
            block = _tile_in(major if s.resident else (s.stages, *major), item)
            if not s.resident:
                step.append(block)
        once = n_leaves(own_wide) + (self.product and s.resident)
        return _Shared(
            tiles=Ring.of(stages, copies, s.groups) if copies else None,
            scores=[]
            if self.product
            else [_tile_in((stages, s.major, s.minor), item, memory.scores[0].shape)],
            passing={
                **p.passing.packed(lambda n, dtype: plgpu.SMEM((stages, n, s.minor), dtype)),
                "w": passing_wide,
            },
            entries=[_tile_in((stages, s.major, s.minor), ref.dtype, ref.shape) for ref in memory.entries],
            steps=Ring.of(s.stages, len(step), s.groups) if self.product else None,
            sides=step,
            own=own_wide,
            resident=block if s.resident else None,
            once=plgpu.Barrier(num_arrivals=once) if once else None,
            carry=p.carry.packed(lambda n, dtype: plgpu.SMEM((s.groups, n, WARPGROUP), dtype)),
            out=[_tile_in((s.groups, WARPGROUP, s.minor), ref.dtype, ref.shape) for ref in out.entries],
            cols=p.out_cols.packed(lambda n, dtype: plgpu.SMEM((s.groups, n, s.minor), dtype)),
            flags=plgpu.SMEM((s.groups, s.minor), jnp.int32) if p.clears else None,
            staged={
                f"{kind}{dtype}": _tile_in((s.groups, WARPGROUP, p.tile_sizes[kind]), dtype)
                for kind, dtype in sorted(p.products_from_registers, key=str)
                if p.kernel.interpret
            },
        )

    def _sides(self) -> list:
        """The product's sides along the major and the minor axis, each with whether that axis precedes the features."""
        p = self.p
        sides = [(p.scores.left, True), (p.scores.right, p.scores.transposed)]
        return sides if p.major == "r" else sides[::-1]

    def _shared(self, memory: _Memory, out: _Results, shared: _Shared) -> None:
        """Divides the work: which block of the sweep this is, and what each of its warpgroups does."""
        s = self.s
        place = lax.axis_index("group") * s.together + lax.axis_index("block")
        me = lax.axis_index("warpgroup")

        @pl.when(place < s.blocks)
        def _():
            block = place if memory.first is None else memory.first[self._table(memory), place]
            at = _Place(lax.axis_index("batch"), lax.axis_index("part"), block)

            @pl.when(me == s.groups)
            def _():
                if s.groups > 1:  # leaves registers to the warpgroups that compute
                    plgpu.set_max_registers(24, action="decrease")
                self._fetch(memory, shared, at)

            @pl.when(me < s.groups)
            def _():
                if s.groups > 1:
                    plgpu.set_max_registers(240, action="increase")
                self._compute(memory, out, shared, at, me)

    def _range(self, memory: _Memory, at) -> tuple:
        """Where a block's part of the minor axis begins, how many tiles it has, and `t -> index of its t-th tile`."""
        s = self.s
        count = s.tiles if memory.order is None else memory.live[self._table(memory), at.block]
        first = at.part * count // s.parts
        last = (at.part + 1) * count // s.parts
        if memory.order is None:
            return first, last - first, lambda t: first + t
        table = self._table(memory)
        return (
            first,
            last - first,
            lambda t: memory.order[table, at.block, jnp.minimum(first + t, s.tiles - 1)],
        )

    def _table(self, memory: _Memory):
        """The index of this matrix's table of tiles."""
        each = self.p.g // memory.order.shape[0]
        return lax.div(lax.axis_index("batch"), jnp.int32(each))

    # --- the warpgroup that fetches ---------------------------------------------------------------------------------

    def _fetch(self, memory: _Memory, shared: _Shared, at) -> None:
        """The fetching warpgroup: brings the block's own operands once, then what each tile needs."""
        s = self.s
        _, count, tile_of = self._range(memory, at)
        major = pl.ds(at.block * s.major, s.major)
        self._fetch_own(memory, shared, at, major)

        def tile(t, _):
            minor = pl.ds(tile_of(t) * s.minor, s.minor)
            if shared.tiles is not None:
                self._fetch_tile(memory, shared, at, t, major, minor)
            if self.product:
                self._fetch_steps(memory, shared, at, t, major, minor)

        lax.fori_loop(0, count, tile, None)
        if shared.tiles is not None:
            shared.tiles.drain(count)
        if shared.steps is not None:
            shared.steps.drain(count * s.steps)

    def _fetch_own(self, memory: _Memory, shared: _Shared, at, major) -> None:
        """Copies what stays in shared memory for all tiles of the block."""
        for leaf, ref, source in zip(self.p.own.wide, shared.own, memory.own.get("w", [])):
            if ref is not None:
                lines = _lines(source, at, major, 0, ref.shape[1], leaf.abreast)
                plgpu.copy_gmem_to_smem(lines, ref, shared.once)
        if shared.resident is not None:
            plgpu.copy_gmem_to_smem(self._step(memory, 0, at, major, 0), shared.resident, shared.once)

    def _fetch_tile(self, memory: _Memory, shared: _Shared, at, t, major, minor) -> None:
        """Copies the stored scores, the passing operands and the entries of the t-th tile into a free slot."""
        p, copy = self.p, plgpu.copy_gmem_to_smem
        slot, full = shared.tiles.claim(t)
        if not self.product:
            source = memory.scores[0]
            copy(source.at[_batch(source, at), major, minor], shared.scores[0].at[slot], full)
        for name in ("f", "i"):
            if name in shared.passing:
                source = memory.passing[name]
                copy(source.at[_batch(source, at), :, minor], shared.passing[name].at[slot], full)
        for leaf, ref, source in zip(p.passing.wide, shared.passing["w"], memory.passing.get("w", [])):
            if ref is not None:
                copy(_lines(source, at, minor, 0, ref.shape[2], leaf.abreast), ref.at[slot], full)
        for ref, source in zip(shared.entries, memory.entries):
            copy(source.at[_batch(source, at), major, minor], ref.at[slot], full)

    def _fetch_steps(self, memory: _Memory, shared: _Shared, at, t, major, minor) -> None:
        """Copies the sides of the t-th tile's product, one step of features after another, into free slots."""
        s, copy = self.s, plgpu.copy_gmem_to_smem

        def step(k, _):
            slot, full = shared.steps.claim(t * s.steps + k)
            copy(self._step(memory, 1, at, minor, k * s.depth), shared.sides[0].at[slot], full)
            if not s.resident:
                copy(self._step(memory, 0, at, major, k * s.depth), shared.sides[1].at[slot], full)

        lax.fori_loop(0, s.steps, step, None)

    def _step(self, memory: _Memory, side: int, at, along, first):
        """One step of features, from `first` on, of the product's side along the major (0) or the minor axis (1)."""
        ref, (operand, along_first) = memory.scores[side], self._sides()[side]
        if along_first:
            return _lines(ref, at, along, first, self.s.depth, abreast(operand))
        return ref.at[_batch(ref, at), pl.ds(first, self.s.depth), along]

    # --- the warpgroups that compute ---------------------------------------------------------------------------------

    def _layout(self, x, dims: str):
        """Casts an array to the register layout of the axes `dims`."""
        if len(dims) == 2:
            return plgpu.layout_cast(x, plgpu.Layout.WGMMA)
        if len(dims) == 1:
            return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1 if dims == self.p.major else 0))
        return x

    def _compute(self, memory: _Memory, out: _Results, shared: _Shared, at, me) -> None:
        """A computing warpgroup: reads its own operands, visits its tiles one after another, writes the carry."""
        p, s = self.p, self.s
        space = p.space(
            self._layout,
            self._load_item,
            functools.partial(self._multiply, shared, me),
            functions=_functions.functions(p.kernel.interpret),
        )
        mine = pl.ds(me * WARPGROUP, WARPGROUP)
        begin = at.block * s.major + me * WARPGROUP
        if shared.once is not None:
            plgpu.barrier_wait(shared.once)
        own = [self._own(space, leaf, memory, shared, at, mine, begin) for leaf in p.own.leaves]
        first, count, tile_of = self._range(memory, at)
        start = memory.start[0]

        def tile(body, t, state):
            j, carry = state
            following = tile_of(t + 1)  # asked for one tile ahead: it may come from device memory
            slot = None if shared.tiles is None else shared.tiles.wait(t)
            raw, sides = self._scores(space, shared, me, mine, t, slot)
            passing = [self._passing(space, leaf, shared, slot) for leaf in p.passing.leaves]
            rows, cols = (own, passing) if p.major == "r" else (passing, own)
            row, col = (begin, j * s.minor) if p.major == "r" else (j * s.minor, begin)
            carry = [leaf.value(space, x) for leaf, x in zip(p.carry.leaves, carry)]
            entries = [self._entry(space, leaf, shared, slot, mine) for leaf in p.entries.leaves]
            carry, entries, cols = p.visit(
                body, space, raw, rows, cols, entries, row, col, start, at.batch, sides, carry
            )
            if p.uses_sides:
                shared.steps.release(self._last_step(t))
            if shared.tiles is not None:
                shared.tiles.release(t)
            self._write(out, shared, at, me, j, entries, cols)
            return following, carry

        initial = [
            [self._layout(x, p.tile("".join(k for k in leaf.kinds if k))) for x in numbers]
            for leaf, numbers in zip(p.carry.leaves, p.start(space, own))
        ]
        state, whole = (tile_of(jnp.int32(0)), initial), jnp.int32(0)
        if memory.whole is not None:  # first those that no mask cuts
            whole = jnp.clip(memory.whole[self._table(memory), at.block] - first, 0, count)
            state = lax.fori_loop(0, whole, functools.partial(tile, p.whole), state)
        _, carry = lax.fori_loop(whole, count, functools.partial(tile, p.body), state)
        if memory.order is not None and (shared.out or shared.cols):
            self._write_dead(memory, out, shared, at, me)
        self._write_carry(out, shared, at, me, carry)
        plgpu.wait_smem_to_gmem(0)

    def _scores(self, space: Space, shared: _Shared, me, mine, t, slot) -> tuple:
        """The scores of the t-th tile, in float32, and the two sides of their product if the body reads them."""
        p = self.p
        if not self.product:
            raw = _load(shared.scores[0].at[slot, mine], plgpu.Layout.WGMMA)
            return _narrow.single("rc", space.item("rc", _narrow.convert(raw, raw.dtype))), []
        raw = _narrow.single("rc", space.item("rc", self._product(shared, me, t)))
        if not p.uses_sides:
            shared.steps.release(self._last_step(t))
            return raw, p.sides(space, None, None)
        major, minor = (
            self._mine(shared.resident, me),
            shared.sides[0].at[shared.steps.slot(self._last_step(t))],
        )
        return raw, p.sides(space, *((major, minor) if p.major == "r" else (minor, major)))

    def _own(
        self, space: Space, leaf: Leaf, memory: _Memory, shared: _Shared, at, mine, begin
    ) -> Value | None:
        """An operand along the major axis: features in shared memory, numbers straight from device memory."""
        if not leaf.pack:
            return None
        if leaf.pack == "w":
            item = space.item("".join(leaf.kinds), _at(shared.own[leaf.at], mine), "own")
            return leaf.value(space, [item])
        source, stretch = memory.own[leaf.pack], pl.ds(begin, WARPGROUP)
        refs = [source.at[_batch(source, at), leaf.at + i, stretch] for i in range(leaf.count)]
        return leaf.value(space, [_load(ref, plgpu.Layout.WGMMA.reduce(1)) for ref in refs])

    def _passing(self, space: Space, leaf: Leaf, shared: _Shared, slot) -> Any:
        """An operand along the minor axis, of one tile: features stay in shared memory, numbers are loaded."""
        if not leaf.pack:
            return None
        if leaf.pack == "w":
            item = space.item("".join(leaf.kinds), _at(shared.passing["w"][leaf.at], slot), "passing")
            return leaf.value(space, [item])

        def number(i):
            ref = shared.passing[leaf.pack].at[slot, leaf.at + i]
            layout = plgpu.Layout.WGMMA.reduce(0)
            return _narrow.Number(lambda: _narrow.convert(_load(ref, layout), leaf.dtype))

        return leaf.value(space, [Item(self.p.minor_letter, number(i)) for i in range(leaf.count)])

    def _entry(self, space: Space, leaf: Leaf, shared: _Shared, slot, mine) -> Value:
        """An entry operand of one tile."""
        return leaf.value(space, [_load(shared.entries[leaf.at].at[slot, mine], plgpu.Layout.WGMMA)])

    def _product(self, shared: _Shared, me, t):
        """Multiplies a tile of scores, one step of features at a time."""
        s = self.s

        def multiply(acc, left, slot):
            right = shared.sides[0].at[slot]
            plgpu.wgmma(acc, self._mine(left, me), _transposed(right) if self.minor_first else right)

        def run(acc):
            def step(k, _):
                n = t * s.steps + k
                slot = shared.steps.wait(n)
                multiply(acc, shared.sides[1].at[slot], slot)
                plgpu.wgmma_wait(1)  # until the previous step has been read

                @pl.when(k > 0)
                def _():
                    shared.steps.release(n - 1)

            if s.steps == 1:
                multiply(acc, shared.resident, shared.steps.wait(t))
            else:
                lax.fori_loop(0, s.steps, step, None)
            return acc[...]

        return pl.run_scoped(run, _accumulator(s.minor))

    def _last_step(self, t):
        """The last step of the t-th tile's product."""
        return (t + 1) * self.s.steps - 1

    def _mine(self, ref, me):
        """A warpgroup's 64 entries of the product's side along the major axis."""
        mine = pl.ds(me * WARPGROUP, WARPGROUP)
        return ref.at[mine] if self.major_first else _transposed(ref.at[:, mine])

    def _load_item(self, item: Item):
        """Loads a wide operand into registers, which have a layout only for those along the major axis."""
        if item.dims[0] != self.p.major:
            raise Unsupported("features along the minor axis can be used in matrix products only")
        return _narrow.convert(_load(item.x, plgpu.Layout.WGMMA), item.x.dtype)

    def _multiply(self, shared: _Shared, me, left: Item, right: Item, kind: str, letters: str) -> Item:
        """A product in the body: its right side is in shared memory, its left side there or in registers."""
        dims, a, b = self.p.product_sides(left, right, kind, letters)
        accumulator = _accumulator(self.p.tile_sizes[dims[1]])
        b_ref = b.x if b.dims[0] == kind else _transposed(b.x)

        def compute(start):
            a_side = a.x
            if b.keep is not None:
                self._clear(shared, me, b)
            if not a.memory or a.x.dtype != b_ref.dtype:
                a_side = _narrow.cast(a.array(self._load_item), b_ref.dtype)
                if self.p.kernel.interpret:  # the interpreter multiplies from shared memory only
                    stage = shared.staged[f"{kind}{jnp.dtype(b_ref.dtype)}"].at[me]
                    _store(stage, a_side)
                    plgpu.commit_smem()
                    a_side = stage

            def run(acc):
                plgpu.wgmma(acc, a_side, b_ref)
                return acc[...]

            if start is None:
                return pl.run_scoped(run, accumulator)
            if self.p.kernel.interpret:  # the interpreter has no accumulators that start from something
                return start + pl.run_scoped(run, accumulator)
            return pl.run_state(lambda acc: plgpu.wgmma(acc, a_side, b_ref))(_accumulating(start))

        return Item(dims, _narrow.Product(compute))

    def _clear(self, shared: _Shared, me, item: Item) -> None:
        """Writes zeros to the rows of an operand in shared memory that count as 0: they may hold NaN.

        All computing warpgroups write the same.
        """
        flags = shared.flags.at[me]
        _store(flags, _narrow.cast(item.keep.array(self._load_item), jnp.int32))
        plgpu.commit_smem()
        for i in range(0, self.s.minor, WARPGROUP):
            part = item.x.at[pl.ds(i, WARPGROUP)]
            keep = _load(flags.at[pl.ds(i, WARPGROUP)], plgpu.Layout.WGMMA.reduce(1)) != 0
            x = _narrow.convert(_load(part, plgpu.Layout.WGMMA), part.dtype)
            keep = plgpu.layout_cast(lax.broadcast_in_dim(keep, x.shape, (0,)), plgpu.Layout.WGMMA)
            _store(part, lax.select(keep, x, lax.full_like(x, 0)))
        plgpu.commit_smem()

    # --- what is written ---------------------------------------------------------------------------------------------

    def _write(self, out: _Results, shared: _Shared, at, me, j, entries: list, cols: list) -> None:
        """Writes the entry and column outputs of tile j."""
        p, s = self.p, self.s
        if not (shared.out or shared.cols):
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # shared memory still holds the previous tile's
        for ref, x in zip(shared.out, entries):
            _store(ref.at[me], x)
        for leaf, numbers in zip(p.out_cols.leaves, cols):
            for i, x in enumerate(numbers):
                _store(shared.cols[leaf.pack].at[me, leaf.at + i], x)
        plgpu.commit_smem()
        rows = pl.ds(at.block * s.major + me * WARPGROUP, WARPGROUP)
        minor = pl.ds(j * s.minor, s.minor)
        for ref, target in zip(shared.out, out.entries):
            plgpu.copy_smem_to_gmem(ref.at[me], target.at[at.batch, rows, minor])
        for name, ref in shared.cols.items():
            plgpu.copy_smem_to_gmem(
                ref.at[me], out.cols[name].at[at.batch, at.block * s.groups + me, :, minor]
            )

    def _write_dead(self, memory: _Memory, out: _Results, shared: _Shared, at, me) -> None:
        """Writes zeros for the tiles with nothing to do."""
        p, s = self.p, self.s
        table = self._table(memory)
        live = memory.live[table, at.block]
        dead = s.tiles - live
        first, last = live + at.part * dead // s.parts, live + (at.part + 1) * dead // s.parts

        def zeros(dims: str, dtype):
            return self._layout(jnp.zeros((WARPGROUP, s.minor)[2 - len(dims) :], dtype), dims)

        def tile(t, _):
            entries = [zeros(p.tile("rc"), d) for d in p.plan.entry_dtypes]
            cols = [[zeros(p.minor_letter, PACKED[leaf.pack])] * leaf.count for leaf in p.out_cols.leaves]
            self._write(out, shared, at, me, memory.order[table, at.block, t], entries, cols)

        lax.fori_loop(first, last, tile, None)

    def _write_carry(self, out: _Results, shared: _Shared, at, me, carry: list) -> None:
        """Writes the carry after the last tile."""
        p, s = self.p, self.s
        mine = pl.ds(at.block * s.major + me * WARPGROUP, WARPGROUP)
        for leaf, numbers in zip(p.carry.leaves, carry):
            for i, x in enumerate(numbers):
                if leaf.pack == "w":  # directly: it happens once per block, and shared memory is scarce
                    _store(out.wide[leaf.at].at[at.part, at.batch, mine], x)
                else:
                    _store(shared.carry[leaf.pack].at[me, leaf.at + i], x)
        plgpu.commit_smem()
        for name, ref in shared.carry.items():
            plgpu.copy_smem_to_gmem(ref.at[me], out.carry[name].at[at.part, at.batch, :, mine])


class _Place(NamedTuple):
    """The matrix, the part of the minor axis, and the block of the major axis that a block of threads works on."""

    batch: Any
    part: Any
    block: Any


def _at(ref, index):
    return None if ref is None else ref.at[index]


def _batch(ref, at: _Place):
    """The index of the matrix in an array that holds one per matrix, or one for all."""
    return 0 if ref.shape[0] == 1 else at.batch


def _lines(ref, at: _Place, along, first, size: int, side: int):
    """`size` features from `first` on, of one of `side` matrices that lie side by side."""
    if side == 1:
        return ref.at[_batch(ref, at), along, pl.ds(first, size)]
    first = lax.rem(at.batch, jnp.int32(side)) * (ref.shape[2] // side) + first
    return ref.at[lax.div(at.batch, jnp.int32(side)), along, pl.ds(first, size)]
