"""`weighted_sum`: a weighted sum of per-row losses, with the gradient taken in the forward pass.

If the cotangent of every row's loss is known while the row's scores are in memory, nothing needs to be computed
twice: 6 N D V operations instead of 8. Rows are processed in chunks: the chunk's `hidden @ weight` is stored, the
loss reads it, JAX returns the cotangents of its row statistics, and one loop over blocks of columns turns these into
the gradient, adding to the gradient of the weight in place.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxsoft import _checks, _trees
from jaxsoft._numerics import weigh
from jaxsoft._trees import add_at, align_varying, as_varying, combine, is_float, partition, replaced
from jaxsoft.kernels.inner import Kernel, Work, compiled, device, differentiated_as, evenly
from jaxsoft.rows._cotangents import block_cotangents
from jaxsoft.rows._layout import Layout, layout_of, on_mesh, padded_source
from jaxsoft.rows._logits import LinearLogits, Logits, StoredLogits, check_axis, rows_of
from jaxsoft.rows._masks import Masks, col_mask, row_mask
from jaxsoft.rows._pass import align, finish, over_blocks
from jaxsoft.rows._reduce import stream
from jaxsoft.rows._reduction import Arrays
from jaxsoft.rows._source import cut

# On a CPU, chunks of 512 rows, with columns in blocks of 1024 (measured, docs/architecture.md). Elsewhere, products of
# 512 rows are small, and every chunk reads and writes the float32 sum of the weight's gradient: 16 of 87 ms on an H200
# at 8192 x 4096 x 131072. Chunks have twice as many rows as features, if their scores take at most 2 GiB in float32.
_CPU_CHUNK_ROWS = 512
_CPU_BLOCK_COLUMNS = 1024
_CHUNK_SCORES = 2**29


def _chunk_rows(logits: LinearLogits) -> int:
    """Rows per chunk, for the flat rows of `logits`."""
    n, features = logits.hidden.shape
    if device()[0] == "cpu":
        return _CPU_CHUNK_ROWS
    most = min(2 * features, _CHUNK_SCORES // max(logits._width, 1))
    return evenly(n, max(most, _CPU_CHUNK_ROWS), 8)


def _block_columns(logits: LinearLogits, rows: int) -> int:
    """Columns per block, for a chunk of `rows` rows."""
    return _CPU_BLOCK_COLUMNS if device()[0] == "cpu" else logits._default_block_size(rows)


class _Call(NamedTuple):
    """The arrays of one pass over a chunk, needed to pull back the cotangents of its states."""

    source: ChunkLogits
    masks: Masks
    arrays: list[Arrays]
    states: list


class _Tape:
    """The record of a loss's passes over the logits of a chunk, made while the loss is traced.

    Attributes:
      probes: zeros shaped like the float leaves of each call's states, or None if only shapes are needed.
      functions: the reductions of each call.
      calls: the arrays of each call.
    """

    def start(self, probes) -> None:
        """Begins a new trace."""
        self.probes = probes
        self.functions: list[tuple] = []
        self.calls: list[_Call] = []

    def stop(self) -> list[_Call]:
        """Ends the trace: returns its calls, and keeps none of its arrays."""
        calls, self.calls, self.probes = self.calls, [], None
        return calls

    def run(
        self,
        chunk: ChunkLogits,
        functions,
        block: int,
        masks: Masks,
        arrays: list[Arrays],
        kernel: Kernel | None,
    ) -> list:
        """The results of a pass over a chunk; records the pass, see `ChunkLogits`."""
        fixed = {name: lax.stop_gradient(getattr(chunk, name)) for name in ("hidden", "weight", "raw")}
        source = dataclasses.replace(chunk, tape=None, **fixed)
        args = [a.args for a in arrays]
        source, masks, arrays = align(source, masks, arrays)
        states = stream(functions, block, source, masks, arrays, kernel)
        floats, others = partition(states)
        if self.probes is not None:
            floats = jax.tree.map(jnp.add, floats, self.probes[len(self.calls)])
        self.functions.append(functions)
        self.calls.append(_Call(source, masks, arrays, states))
        return finish(functions, combine(floats, others), source, args)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ChunkLogits(LinearLogits):
    """A chunk of rows of logits whose matrix product is stored, with a record of the passes that read them.

    Losses treat it like any `LinearLogits`. The matrix product carries no gradient. Instead, each `reduce_rows`
    adds the next of the tape's probes to the float leaves of its states, so that the probes receive the cotangents
    of the states, and records on the tape the arrays needed to pull these back.
    """

    raw: Any = None
    tape: _Tape | None = dataclasses.field(default=None, metadata=dict(static=True))

    kind = "stored"

    def _raw_scores(self) -> Array:
        return self.raw

    def _raw_block(self, start, size: int, col_keep: Array | None) -> Array:
        del col_keep
        return cut(self.raw, start, size, 1)

    def _affine(self) -> None:
        return None

    def _flat(self) -> ChunkLogits:
        return self

    def _default_block_size(self, rows: int) -> int:
        return _CPU_BLOCK_COLUMNS if device()[0] == "cpu" else super()._default_block_size(rows)

    def _accumulates(self) -> Any:
        return dataclasses.replace(super()._accumulates(), raw=False)

    def _work(self) -> Work:
        rows, columns = self.shape
        return Work("dense", rows, columns, 0, self.raw.dtype.itemsize)


def _stored(logits: LinearLogits) -> Any:
    """The scores of a chunk, stored; inside `shard_map`, those of this device's columns."""
    scores = logits._block(0, logits._width, None)
    return scores if logits.shards is None else StoredLogits(scores, logits.shards)


def detached(logits: Logits) -> Any:
    """Logits without derivatives, for passes in a loop, which a chunk's tape cannot record."""
    if isinstance(logits, ChunkLogits):
        logits = _stored(logits)
    return lax.stop_gradient(logits)


def weighted_sum(
    loss: Callable[..., Array],
    logits: Logits,
    *row_args: Array | LinearLogits,
    weights: Float[Array, "*rows"] | None = None,
    axis: int = -1,
    chunk_size: int | None = None,
    **options: Any,
) -> Float[Array, ""]:
    """`sum(weights * loss(logits, *row_args, **options))`, fast: the gradient is taken in the forward pass.

    For `linear_logits` the value and the gradient together cost three matrix products instead of the four of a
    loss that recomputes its logits, and memory for `[chunk_size, vocab]`. Without a gradient, it costs only the
    forward pass. For dense logits it is the plain sum. The gradient is exact for every operand (hidden,
    weight, bias, scale, temperature, weights, and all floating arguments of the loss), in reverse and forward mode.
    Second derivatives are those of `(weights * loss(...)).sum()`, and cost as much.

    Args:
      loss: any loss of jaxsoft, or any function `(logits, *row_args, **options) -> [rows]` that reads the
        logits row by row through functions of jaxsoft. It must be hashable (a module-level function, not a new
        lambda each time) and must not use `jit` inside.
      logits: `[*rows, vocab]`. `filter_eps` of `linear_logits` does not affect the gradient: nothing is recomputed.
      *row_args: arrays with the rows' leading axes: the labels and all other per-row arguments; or further
        `linear_logits` (a teacher's), of which a chunk is also stored.
      weights: `[*rows]`, 1 by default; floats, counts or booleans. A weight of 0 hides a loss that is not finite; to
        keep a NaN in the logits out of the gradient, mask the row or ignore its label.
      axis: the axis that holds a row; passed to `loss` if it is not the last one.
      chunk_size: rows stored at a time. Default: 512 on a CPU; twice the width of `hidden` on others, but at most
        2 GiB of float32 logits.
      **options: passed to `loss`; `where` may vary by row, other arrays must not. Numbers that the loss closes over may
        be traced, but not differentiated: pass those as options.

    Returns:
      A scalar in the accumulation dtype.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or size, or rows that the devices of a mesh do not divide.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> hidden, weight = jnp.eye(3, 4), jnp.arange(20.0).reshape(4, 5) / 10
      >>> labels = jnp.array([0, 3, -100])
      >>> def loss(hidden, weight):
      ...     logits = jaxsoft.linear_logits(hidden, weight)
      ...     return jaxsoft.losses.weighted_sum(jaxsoft.losses.cross_entropy, logits, labels)
      >>> value, (d_hidden, d_weight) = jax.value_and_grad(loss, (0, 1))(hidden, weight)
      >>> print(value.round(4))
      3.3388
    """
    check_loss("weighted_sum", loss)
    axis = check_axis(logits, axis)
    if axis != logits.ndim - 1:
        options["axis"] = axis
    _check_call(loss, (logits, *row_args), options)
    rows = rows_of(logits.shape, axis)
    if weights is not None:
        _checks.numeric("weights", weights)
        _checks.shape("weights", weights, rows, "one number per row of logits")
    if chunk_size is not None:
        chunk_size = _checks.integer("chunk_size", chunk_size, at_least=1)
    if not isinstance(logits, LinearLogits):
        return _sum(loss(logits, *row_args, **options), weights)

    for i, a in enumerate(row_args):
        if a.shape[: len(rows)] != rows:
            raise ValueError(f"row_args[{i}] must have leading axes {rows} (the rows), got shape {a.shape}")
    if weights is not None and not jnp.issubdtype(weights.dtype, jnp.floating):
        weights = weights.astype(logits._accumulation_dtype)
    row_masks = None
    if (where := options.get("where")) is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, logits.shape, "the shape of the logits")
        where = where.reshape((1,) * (logits.ndim - where.ndim) + where.shape)
        if math.prod(where.shape[:-1]) == 1:
            options["where"] = where.reshape(1, where.shape[-1])
        else:
            row_masks = jnp.broadcast_to(where, (*rows, where.shape[-1]))
            del options["where"]
    leaves, treedef = jax.tree.flatten(options)
    arrays = [leaf if hasattr(leaf, "dtype") else None for leaf in leaves]
    constants = tuple(leaf if a is None else None for leaf, a in zip(leaves, arrays))
    # A chunk cannot pass through the loss's own jit, which is not needed here.
    loss = inspect.unwrap(loss, stop=lambda f: not isinstance(f, jax.stages.Wrapped))
    call = _Loss(loss, treedef, constants)
    layout = layout_of(logits, [a for a in row_args if isinstance(a, LinearLogits)])
    # Outside of `jit`, each call would compile its loops anew; compiled, a loss must not hold tracers.
    staged = isinstance(jnp.zeros(()), Tracer)
    run = _placed if staged or _holds_tracers(loss) else _compiled
    return run(call, chunk_size, layout, logits, _ByRow(tuple(row_args), weights, row_masks), arrays)


def _placed(call: _Loss, chunk_size: int | None, layout: Layout | None, logits, by_row: _ByRow, arrays: list):
    """The weighted sum over rows that lie on one device, or on a mesh."""
    if layout is None:
        return _here(call, chunk_size, logits, by_row, arrays)
    total, by = logits.vocab_size, layout.padding(logits.vocab_size)
    number = iter(range(1, len(layout.features)))

    def prepared(a):
        return padded_source(a, by) if isinstance(a, LinearLogits) else a

    def spec(a):
        return layout.of_source(a, next(number)) if isinstance(a, LinearLogits) else layout.by_row()

    logits, by_row = prepared(logits), by_row._replace(args=tuple(map(prepared, by_row.args)))
    specs = _ByRow(
        tuple(map(spec, by_row.args)), *(None if a is None else layout.by_row() for a in by_row[1:])
    )

    def part(logits, by_row, arrays):
        logits, *others = layout.local(
            total, logits, *(a for a in by_row.args if isinstance(a, LinearLogits))
        )
        others = iter(others)
        args = tuple(next(others) if isinstance(a, LinearLogits) else a for a in by_row.args)
        value = _here(call, chunk_size, logits, by_row._replace(args=args), arrays)
        return lax.psum(value, tuple(sorted(_trees.varying_axes(value))))

    specs = (layout.of_source(logits, 0), specs, jax.tree.map(lambda _: P(), arrays))
    return on_mesh(layout.mesh, part, specs, (logits, by_row, arrays), P())


def _here(call: _Loss, chunk_size: int | None, logits: LinearLogits, by_row: _ByRow, arrays: list) -> Array:
    """The weighted sum over the rows of this device."""
    n, leading = math.prod(logits.shape[:-1]), logits.ndim - 1

    def flat(a):
        return a._flat() if isinstance(a, LinearLogits) else a.reshape(n, *a.shape[leading:])

    by_row = jax.tree.map(flat, by_row, is_leaf=lambda a: isinstance(a, LinearLogits))
    logits = logits._flat()._with_all_features()
    chunk = min(chunk_size or _chunk_rows(logits), max(n, 1))
    # Every array varies over the axes that a row's loss varies over; what the columns' pass reads, also over theirs.
    columns = () if logits.shards is None else logits.shards.columns
    rows = _trees.varying_axes((dataclasses.replace(logits, weight=None, bias=None), by_row, arrays))
    rows |= _trees.varying_axes((logits.weight, logits.bias)) - frozenset(columns)
    by_row, arrays = as_varying((by_row, arrays), rows)
    logits = as_varying(logits, rows | frozenset(columns))
    return _weighted(call, chunk, tuple(sorted(rows)), logits, by_row, arrays)


def _holds_tracers(*held: Any) -> bool:
    """Whether functions close over tracers, or have them among the arguments of a `functools.partial`."""
    seen, todo = [], jax.tree.leaves(held)
    while todo:
        x = todo.pop()
        if isinstance(x, Tracer):
            return True
        if callable(x) and not any(x is other for other in seen):
            seen.append(x)
            cells = getattr(x, "__closure__", None) or ()
            parts = (x.func, x.args, x.keywords) if isinstance(x, functools.partial) else ()
            todo += jax.tree.leaves(([cell.cell_contents for cell in cells], parts))
    return False


def check_loss(name: str, loss: Any) -> None:
    """Checks that a loss is a function; `name` is the function that it was given to."""
    if not callable(loss):
        raise TypeError(
            f"loss must be a function such as jaxsoft.losses.cross_entropy, got {_checks.describe(loss)}: write "
            f"{name}(cross_entropy, logits, labels, weights=weights); losses that are computed already are averaged "
            "by (weights * losses).sum() / weights.sum()"
        )


def _check_call(loss: Callable, args: tuple, options: dict[str, Any]) -> None:
    """Checks that a loss takes these arguments, where its signature is known."""
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        name = getattr(loss, "__name__", repr(loss))
        raise TypeError(
            f"{name} does not take the arguments it would get, {len(args)} by position (logits, then row_args) and "
            f"{sorted(options) or 'none'} by keyword: {error}. It takes {signature}. Weights go by keyword: weights=..."
        ) from None


def _sum(values: Array, weights: Array | None) -> Array:
    return jnp.sum(values if weights is None else weigh(values, weights))


class _ByRow(NamedTuple):
    """The operands that are cut into chunks of rows, `[n, ...]` each; of further expressions, their per-row arrays."""

    args: tuple
    weights: Any
    where: Any

    def is_cut(self) -> _ByRow:
        """Booleans for the leaves: True if the leaf is cut."""
        flags = jax.tree.map(lambda _: True, self)
        return flags._replace(
            args=tuple(
                a._varies_by_row() if isinstance(a, LinearLogits) else flag
                for a, flag in zip(self.args, flags.args)
            )
        )


@dataclasses.dataclass(frozen=True)
class _Loss:
    """A loss with its options; options that are arrays are passed at the call."""

    loss: Callable
    treedef: Any
    constants: tuple

    def __call__(self, logits: LinearLogits, by_row: _ByRow, arrays: list) -> Array:
        leaves = [c if a is None else a for c, a in zip(self.constants, arrays)]
        options = jax.tree.unflatten(self.treedef, leaves)
        if by_row.where is not None:
            options["where"] = by_row.where
        args = by_row.args
        if isinstance(logits, ChunkLogits):
            args = [_stored(a) if isinstance(a, LinearLogits) else a for a in args]
        values = self.loss(logits, *args, **options)
        _checks.shape("loss(logits, ...)", values, logits.shape[:-1], "one value per row of logits")
        return _sum(values, by_row.weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _weighted(
    call: _Loss, chunk: int, axes: tuple[str, ...], logits: LinearLogits, by_row: _ByRow, arrays: list
):
    del chunk, axes
    return call(logits, by_row, arrays)


def _value_and_gradient(call: _Loss, chunk: int, axes: tuple[str, ...], perturbed, logits, by_row, arrays):
    """The weighted sum, and its gradient (None where `perturbed` is False), in one loop over chunks of rows.

    `axes` are the mesh axes that a row's loss varies over.
    """
    n = logits.shape[0]
    block = min(logits.block_size or _block_columns(logits, chunk), max(logits._width, 1))
    wide = logits._accumulation_dtype

    # Everything but hidden and weight is differentiated by JAX, through the loss of a chunk.
    def others_of(logits, by_row, arrays):
        return [logits.bias, logits.scale, logits.temperature, by_row, arrays]

    others, others_tree = jax.tree.flatten(others_of(logits, by_row, arrays))
    wanted = jax.tree.leaves(others_of(*perturbed))
    active = [i for i, (a, w) in enumerate(zip(others, wanted)) if w and is_float(a)]
    cuts = logits._varies_by_row(), by_row.is_cut(), jax.tree.map(lambda _: False, arrays)
    per_row = jax.tree.leaves(others_of(*cuts))
    need_product = perturbed[0].hidden or perturbed[0].weight

    def chunk_body(carry, row, size, looped):
        total, d_hidden, d_weight, d_others = carry
        mine = [cut(a, row, size, 0) if f else a for a, f in zip(others, per_row)]
        hidden = cut(logits.hidden, row, size, 0)
        raw = dataclasses.replace(logits, hidden=hidden)._product(logits.weight)
        tape = _Tape()

        def value(probes, active_leaves):
            leaves = replaced(mine, active, active_leaves)
            bias, scale, temperature, by_row, arrays = jax.tree.unflatten(others_tree, leaves)
            fields = {f.name: getattr(logits, f.name) for f in dataclasses.fields(LinearLogits)}
            fields.update(hidden=hidden, bias=bias, scale=scale, temperature=temperature)
            tape.start(probes)
            result = call(ChunkLogits(**fields, raw=raw, tape=tape), by_row, arrays)
            return result, tape.stop()

        active_leaves = [mine[i] for i in active]
        _, calls = jax.eval_shape(functools.partial(value, None), active_leaves)
        probes = [jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), partition(c.states)[0]) for c in calls]
        probes = align_varying((probes, hidden))[0]
        part, pullback, calls = jax.vjp(value, probes, active_leaves, has_aux=True)
        d_probes, d_active = pullback(jnp.ones_like(part))
        d_others = [
            add_at(t, d, {0: row} if per_row[i] else {}) for t, d, i in zip(d_others, d_active, active)
        ]
        if need_product:
            d_hidden, d_weight = _product_gradient(
                logits, block, hidden, raw, tape.functions, calls, d_probes, row, d_hidden, d_weight
            )
        return total + as_varying(part, axes), d_hidden, d_weight, d_others

    zero = as_varying(jnp.zeros((), wide), axes)
    zeros = functools.partial(jnp.zeros_like, dtype=wide)
    start = (zero, zeros(logits.hidden), zeros(logits.weight), [zeros(others[i]) for i in active])
    total, d_hidden, d_weight, d_others = over_blocks(n, chunk, chunk_body, start)

    cotangents: list = [None] * len(others)
    for i, d in zip(active, d_others):
        cotangents[i] = d.astype(others[i].dtype)
    bias, scale, temperature, d_by_row, d_arrays = jax.tree.unflatten(others_tree, cotangents)
    d_logits = dataclasses.replace(
        logits,
        hidden=d_hidden.astype(logits.hidden.dtype) if need_product else None,
        weight=d_weight.astype(logits.weight.dtype) if need_product else None,
        bias=bias,
        scale=scale,
        temperature=temperature,
    )
    return total, (d_logits, d_by_row, d_arrays)


def _product_gradient(logits, block, hidden, raw, functions, calls, d_probes, row, d_hidden, d_weight):
    """Adds a chunk's share to the gradients of hidden and weight, one block of columns at a time."""
    all_masks = [c.masks for c in calls]
    # A row or a column that no call reads may hold NaN, which must not enter a matrix product.
    row_keep = _any([row_mask(m) for m in all_masks])
    part = dataclasses.replace(
        logits, hidden=hidden if row_keep is None else jnp.where(row_keep[:, None], hidden, 0)
    )

    def block_body(carry, start, size, looped):
        d_hidden, d_weight = carry
        col_keep = _any([col_mask(m, start, size) for m in all_masks])
        raw_block = cut(raw, start, size, 1)
        d_raw = sum(
            block_cotangents(f, c.states, d, c.masks, c.source, c.arrays, raw_block, start)[0]
            for f, c, d in zip(functions, calls, d_probes)
        )
        h, w = part._pull_product(d_raw, logits._weight_block(start, size, col_keep))
        d_weight = add_at(d_weight, w, {0 if logits.transpose_weight else 1: start})
        return d_hidden + h, d_weight

    zeros = jnp.zeros_like(hidden, dtype=d_hidden.dtype)
    h, d_weight = over_blocks(logits._width, block, block_body, (zeros, d_weight))
    return add_at(d_hidden, h, {0: row}), d_weight


def _any(keeps: list[Array | None]) -> Array | None:
    present = [k for k in keeps if k is not None]
    if not keeps or len(present) < len(keeps):
        return None
    return functools.reduce(jnp.logical_or, present)


@functools.partial(_weighted.defjvp, symbolic_zeros=True)
def _weighted_jvp(call, chunk, axes, primals, tangents):
    """The tangent is that of the linear map `tangents -> sum(gradient * tangent)`, whose transpose is the gradient.

    The derivatives of the gradient are those of the plain sum's gradient, which recomputes its logits.
    """
    treedef = jax.tree.structure(primals)
    given = treedef.flatten_up_to(tangents)
    active = [i for i, t in enumerate(given) if not isinstance(t, SymbolicZero)]
    perturbed = treedef.unflatten([i in active for i in range(len(given))])

    def in_chunks(*primals):
        total, gradient = _value_and_gradient(call, chunk, axes, perturbed, *primals)
        gradient = treedef.flatten_up_to(gradient)
        return total, [gradient[i] for i in active]

    def ordinary(*primals):
        leaves = jax.tree.leaves(primals)

        def total(some):
            logits, by_row, arrays = treedef.unflatten(replaced(leaves, active, some))
            return call(dataclasses.replace(logits, filter_eps=None), by_row, arrays)

        return jax.value_and_grad(total)([leaves[i] for i in active])

    # A call that is not differentiated stays whole: JAX would move parts out of its loops, and keep them in memory.
    total, gradient = differentiated_as(ordinary, in_chunks, *primals)

    def along(gradient, tangent):
        value = jnp.sum(gradient.astype(total.dtype) * tangent.astype(total.dtype))
        # of one device's columns
        more = _trees.varying_axes(value) - _trees.varying_axes(total)
        return as_varying(lax.psum(value, tuple(sorted(more))) if more else value, _trees.varying_axes(total))

    return total, functools.reduce(jnp.add, [along(g, given[i]) for i, g in zip(active, gradient)])


_compiled = compiled(_placed, static_argnums=(0, 1, 2))
