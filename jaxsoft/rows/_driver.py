"""`reduce_rows`: runs row reductions over logits of any kind, and attaches the one derivative rule.

The scores are read in blocks of columns and forgotten. The value is a loop over the blocks that carries the
reductions' states. The derivative (see `RowReduction`) is one more loop, linear in the tangents,

    d(state) = sum over blocks of  jvp(update from neutral(state))( d(block of scores) ),

attached with `custom_jvp`. Its body is checkpointed: JAX transposes the loop by itself, recomputing a block
instead of keeping it, which gives reverse mode; and since the rule is made of ordinary JAX operations, forward
mode, second order, `vmap` and `checkpoint` work on logits that are never stored, too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool

from jaxsoft import _checks
from jaxsoft.kernels import _choice
from jaxsoft.kernels._choice import Kernel
from jaxsoft.rows._logits import DenseLogits, LinearLogits, Logits, cut
from jaxsoft.rows._reduction import RowReduction, Tile, is_reduction


class Arrays(NamedTuple):
    """The array arguments of one reduction (see `RowReduction`); among the `entry_args` may be expressions."""

    args: tuple
    col_args: tuple
    entry_args: tuple


class Masks(NamedTuple):
    """Which entries are present, `[*rows]`, `[columns]` and `[*rows, columns]`; None where all are."""

    rows: Any = None
    cols: Any = None
    entries: Any = None


def reduce_rows(
    logits: Logits,
    reductions: Any,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    row_where: Bool[Array, "*rows"] | None = None,
    block_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """Runs one or several row reductions over the rows of `logits`, in one pass.

    Args:
      logits: `[*rows, columns]` scores: a floating array of any dtype, or a `LinearLogits`.
      reductions: a `RowReduction`, or any pytree (dict, tuple, ...) of them.
      axis: the axis that holds a row; the last one for a `LinearLogits`.
      where: booleans that broadcast to the shape of the logits, True = counts. A masked entry is absent: it
        adds nothing, and gets no gradient, whatever it holds. (A NaN inside `weight` is kept away only if
        its column is masked for all rows.) An entry of `-inf` is absent, too.
      row_where: `[*rows]` booleans, False = the whole row is absent; beside a `where` that varies over columns
        this needs no array of the logits' shape.
      block_size: columns read at a time. Default: all of them for an array, the expression's own choice else.
        Kernels have their own.
      implementation: `"xla"`, or the kernels `"pallas_tpu"` or `"mosaic_gpu"`. None: the expression's own, else the
        best that can run the case (`jaxsoft.kernels.explain` says which, and why). With kernels there is no
        forward-mode derivative and no second one.

    Returns:
      The results in the structure of `reductions`, each of shape `[*rows]` (or `[*rows, k]`), in float32 for
      half-precision logits.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or size; an `implementation` that cannot run the case.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.rows import reduce_rows, reductions
      >>> x = jnp.array([[1.0, 2.0, -1.0, 0.5]])
      >>> out = reduce_rows(x, {"lse": reductions.logsumexp(), "best": reductions.argmax()})
      >>> print(out["lse"].round(4), out["best"])
      [2.4952] [1]
    """
    leaves, treedef = jax.tree.flatten(reductions, is_leaf=is_reduction)
    for leaf in leaves:
        if not is_reduction(leaf):
            raise TypeError(f"reductions must be a tree of RowReduction, got {_checks.describe(leaf)} in it")
    if block_size is not None:
        block_size = _checks.integer("block_size", block_size, at_least=1)
    axis = check_axis(logits, axis)
    rows, columns = rows_of(logits.shape, axis), logits.shape[axis]
    masks = _split_mask(where, logits.shape, axis)
    if row_where is not None:
        _checks.boolean("row_where", row_where)
        _checks.shape("row_where", row_where, rows, "one boolean a row of logits")
        masks = masks._replace(rows=row_where if masks.rows is None else masks.rows & row_where)
    arrays = [_arrays_of(r, rows, columns) for r in leaves]
    functions = tuple(r._replace(args=(), col_args=(), entry_args=()) for r in leaves)
    # The rows are flattened: on a CPU, XLA fuses reductions of two axes better than of more.
    n = math.prod(rows)

    def flat(a):
        if isinstance(a, LinearLogits):
            return a._flat()
        return None if a is None else a.reshape(n, *a.shape[len(rows) :])

    expressions = [a for a in (logits, *_entries(arrays)) if isinstance(a, LinearLogits)]
    if isinstance(logits, LinearLogits):
        source = logits._flat()
        if source.filter_eps is not None and len(expressions) > 1:
            raise ValueError(
                "filter_eps of linear_logits must be None where two expressions are read at a time"
            )
    else:
        source = DenseLogits(flat(jnp.moveaxis(jnp.asarray(logits), axis, -1)))
    if block_size is None:
        sizes = [e.block_size or e._default_block_size(n * len(expressions)) for e in expressions]
        block_size = min(sizes, default=columns)
    block = max(min(block_size, columns), 1)
    masks = Masks(flat(masks.rows), masks.cols, flat(masks.entries))
    arrays = [Arrays(jax.tree.map(flat, a.args), a.col_args, tuple(map(flat, a.entry_args))) for a in arrays]
    run_alone = getattr(source, "_run", None)
    if run_alone is not None:
        results = run_alone(functions, block, masks, arrays)
    else:
        if implementation is None and isinstance(logits, LinearLogits):
            implementation = logits.implementation
        kernel = choose_kernel(implementation, functions, source, masks, arrays)
        results = run(source, functions, block, masks, arrays, kernel)
    results = jax.tree.map(lambda a: a.reshape(*rows, *a.shape[1:]), results)
    return jax.tree.unflatten(treedef, results)


def choose_kernel(implementation, functions, source, masks: Masks, arrays: list[Arrays]) -> Kernel | None:
    """The kernel backend that runs these reductions, None for XLA; raises if what was asked for cannot."""
    stored = getattr(source, "raw", None) if isinstance(source, LinearLogits) else source.values
    kind = "linear" if stored is None else "stored" if isinstance(source, LinearLogits) else "dense"
    features, dtype = (source.hidden.shape[-1], source.dtype) if stored is None else (0, stored.dtype)
    n, columns = source.shape
    work = _choice.Work("dense" if features == 0 else "linear", n, columns, features, dtype.itemsize)

    def refusal(backend, kernel: Kernel) -> str | None:
        from jaxsoft.kernels import _rows

        return _rows.refusal(backend, kernel, functions, source, masks, arrays)

    return _choice.choose(f"reductions of {kind} rows", implementation, work, refusal)


# --- the arguments ---------------------------------------------------------------------------------------


def check_axis(logits: Any, axis: int) -> int:
    """Checks `logits` and the axis of its rows; returns the axis counted from the front."""
    _checks.floating("logits", logits)
    axis = _checks.integer("axis", axis)
    if logits.ndim == 0:
        raise ValueError("logits must have at least one axis, got a scalar")
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(
            f"axis must be in [{-logits.ndim}, {logits.ndim}) for logits of shape {logits.shape}, got {axis}"
        )
    if isinstance(logits, LinearLogits) and axis not in (-1, logits.ndim - 1):
        raise ValueError(f"axis must be -1 for linear_logits of shape {logits.shape}, got {axis}")
    return axis % logits.ndim


def rows_of(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of the rows: `shape` without the axis."""
    return tuple(n for i, n in enumerate(shape) if i != axis)


def _split_mask(where: Any, shape: tuple[int, ...], axis: int) -> Masks:
    """Sorts a mask by what it varies over: rows, columns or both, each of them handled best on its own."""
    if where is None:
        return Masks()
    where = jnp.asarray(where) if isinstance(where, bool) else where
    _checks.boolean("where", where)
    _checks.broadcastable("where", where, shape, "the shape of the logits")
    where = jnp.moveaxis(where.reshape((1,) * (len(shape) - where.ndim) + where.shape), axis, -1)
    rows = rows_of(shape, axis)
    if where.shape[-1] == 1 and shape[axis] != 1:
        return Masks(rows=jnp.broadcast_to(where[..., 0], rows))
    if math.prod(where.shape[:-1]) == 1:
        return Masks(cols=where.reshape(-1))
    return Masks(entries=jnp.broadcast_to(where, (*rows, shape[axis])))


def _arrays_of(reduction: RowReduction, rows: tuple[int, ...], columns: int) -> Arrays:
    for a in jax.tree.leaves(reduction.args):
        if a.shape[: len(rows)] != rows:
            raise ValueError(
                f"args of a reduction must have leading axes {rows} (the rows), got shape {a.shape}"
            )
    for a in reduction.col_args:
        if a.shape[:1] != (columns,):
            raise ValueError(
                f"col_args of a reduction must have {columns} columns first, got shape {a.shape}"
            )
    for a in reduction.entry_args:
        if a.shape != (*rows, columns):
            raise ValueError(f"entry_args of a reduction must have shape {(*rows, columns)}, got {a.shape}")
    return Arrays(tuple(reduction.args), tuple(reduction.col_args), tuple(reduction.entry_args))


def _entries(arrays: list[Arrays]):
    return [e for a in arrays for e in a.entry_args]


# --- one pass --------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2, 5))
def run(
    source,
    functions: tuple[RowReduction, ...],
    block: int,
    masks: Masks,
    arrays: list[Arrays],
    kernel: Kernel | None = None,
) -> list:
    """Runs reductions (their arrays apart) over one source; returns the list of results."""
    source, masks, arrays = align_varying((source, masks, arrays))
    source, arrays = mask_rows(source, masks, arrays)
    results: dict[int, Any] = {}
    for i, r in enumerate(functions):
        state = closed_form(r, source, masks, arrays[i])
        if state is not None:
            results[i] = r.finalize(state, *arrays[i].args)
    streamed = [i for i in range(len(functions)) if i not in results]
    if streamed:
        some = tuple(functions[i] for i in streamed)
        some_arrays = [arrays[i] for i in streamed]
        if source.filter_eps is None:
            states = stream(some, block, source, masks, some_arrays, kernel)
            finals = finalize(some, states, some_arrays)
        else:
            finals: Any = _filtered(some, block, kernel, source, masks, some_arrays)
        results |= dict(zip(streamed, finals))
    return [results[i] for i in range(len(functions))]


def stream(
    functions, block: int, source, masks: Masks, arrays: list[Arrays], kernel: Kernel | None = None
) -> list:
    """The finished states of the reductions, with their derivatives attached."""
    if kernel is not None:
        from jaxsoft.kernels import _rows

        return _rows.stream(kernel, functions, block, source, masks, arrays)
    states = _states(functions, block, *lax.stop_gradient((source, masks, arrays)))
    return attach(functions, block, states, source, masks, arrays)


def attach(functions, block: int, states, source, masks: Masks, arrays: list[Arrays]) -> list:
    """Finished states, computed without derivatives, with those of their reductions attached."""
    floats, others = partition(states)
    return combine(_attach(functions, block, floats, others, source, masks, arrays), others)


def finalize(functions, states, arrays: list[Arrays]) -> list:
    """The results of finished states."""
    return [r.finalize(s, *a.args) for r, s, a in zip(functions, states, arrays)]


def mask_rows(source, masks: Masks, arrays: list[Arrays]):
    """Zeroes what the rows nobody reads are made of, lest a NaN there meets a matrix product."""
    keep = row_mask(masks)
    if keep is None:
        return source, arrays

    def cleaned(entry):
        return entry._mask_rows(keep) if isinstance(entry, LinearLogits) else entry

    return source._mask_rows(keep), [a._replace(entry_args=tuple(map(cleaned, a.entry_args))) for a in arrays]


def row_mask(masks: Masks) -> Array | None:
    """Which rows anybody reads; None where all may be."""
    if masks.entries is None:
        return masks.rows
    keep = jnp.any(masks.entries, axis=-1)
    return keep if masks.rows is None else keep & masks.rows


def col_mask(masks: Masks, start, size: int) -> Array | None:
    """Which columns of a block anybody reads; None where all may be."""
    if masks.cols is not None:
        return cut(masks.cols, start, size, 0)
    if masks.entries is not None:
        block = cut(masks.entries, start, size, masks.entries.ndim - 1)
        return jnp.any(block, axis=tuple(range(block.ndim - 1)))
    return None


def closed_form(reduction: RowReduction, source, masks: Masks, arrays: Arrays):
    """The state of a reduction that needs no stream, or None."""
    if reduction.closed_form is None or masks.entries is not None or not source._is_affine():
        return None
    columns = source.shape[-1]
    col_keep = jnp.ones(columns, bool) if masks.cols is None else masks.cols
    if source.bias is not None:
        col_keep = col_keep & (source.bias != -jnp.inf)  # a logit of -inf is absent
    row_keep = jnp.ones(source.shape[:-1], bool) if masks.rows is None else masks.rows
    return reduction.closed_form(
        reduction._replace(args=arrays.args, col_args=arrays.col_args), source, col_keep, row_keep
    )


def over_blocks(columns: int, block: int, body: Callable, carry: Any) -> Any:
    """Folds `body(carry, start, size, looped)` over blocks of columns; the last one may be smaller."""
    full, rest = divmod(columns, block)
    if full == 1:
        carry = body(carry, 0, block, False)
    elif full > 1:
        starts = jnp.arange(full, dtype=jnp.int32) * block
        carry, _ = lax.scan(lambda c, start: (body(c, start, block, True), None), carry, starts)
    if rest:
        carry = body(carry, full * block, rest, False)
    return carry


def tiles(x: Array, start, masks: Masks, arrays: list[Arrays], columns: int) -> list[Tile]:
    """The block `x` of scores as each reduction sees it. Absent entries are cleaned here, once for all."""
    size = x.shape[-1]
    cut_masks = Masks(
        masks.rows,
        None if masks.cols is None else cut(masks.cols, start, size, 0),
        None if masks.entries is None else cut(masks.entries, start, size, x.ndim - 1),
    )
    scores = masked(x, cut_masks)
    cols = jnp.arange(size, dtype=jnp.int32) + start
    return [
        Tile.of(
            scores,
            cols,
            columns,
            tuple(cut(c, start, size, 0) for c in a.col_args),
            tuple(entry_block(e, start, size, masks) for e in a.entry_args),
        )
        for a in arrays
    ]


def masked(x: Array, masks: Masks) -> Array:
    """The scores with -inf for the entries that a mask hides."""
    keeps = []
    if masks.rows is not None:
        keeps.append(masks.rows[..., None])
    if masks.cols is not None:
        keeps.append(masks.cols)
    if masks.entries is not None:
        keeps.append(masks.entries)
    # Without a mask, the scores are read as they are: XLA's reductions on the CPU do not fuse a select.
    return jnp.where(functools.reduce(jnp.logical_and, keeps), x, -jnp.inf) if keeps else x


def entry_block(entry, start, size: int, masks: Masks) -> Array:
    """A block of columns of one of the `entry_args`: cut from an array, computed for an expression."""
    if isinstance(entry, LinearLogits):
        return entry._block(start, size, col_mask(masks, start, size))
    return cut(entry, start, size, entry.ndim - 1)


def _states(functions, block, source, masks, arrays):
    """The finished states; nothing here is differentiated."""
    columns = source.shape[-1]
    like = source._like()
    # A row nobody reads is emptied at the end, which is cheaper than in every tile.
    cut_masks = masks._replace(rows=None)

    def body(states, start, size, looped):
        x = source._block(start, size, col_mask(masks, start, size))
        return [
            r.update(s, tile, *a.args)
            for r, s, tile, a in zip(functions, states, tiles(x, start, cut_masks, arrays, columns), arrays)
        ]

    empty = [r.init(like, *a.args) for r, a in zip(functions, arrays)]
    states = over_blocks(columns, block, body, empty)
    if masks.rows is None:
        return states

    def select(state, empty):
        return jnp.where(jnp.expand_dims(masks.rows, tuple(range(masks.rows.ndim, state.ndim))), state, empty)

    return jax.tree.map(select, states, empty)


# --- the derivative --------------------------------------------------------------------------------------


def block_sums(functions, states, block_tiles: list[Tile], arrays: list[Arrays]) -> list:
    """A block's share of the float leaves of finished states: not its value, but its derivative, is right."""
    return [
        jax.tree.unflatten(jax.tree.structure(partition(state)[0]), shares(r, state, tile, *a.args))
        for r, state, tile, a in zip(functions, states, block_tiles, arrays)
    ]


def shares(reduction: RowReduction, state, tile: Tile, *args) -> list[Array]:
    """A tile's share of the float leaves of a finished state, as `RowReduction.share` gives it."""
    tile = tile._replace(finished=True)
    if reduction.share is not None:
        return reduction.share(state, tile, *args)
    return jax.tree.leaves(partition(reduction.update(reduction.neutral(state), tile, *args))[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attach(functions, block, floats, others, source, masks, arrays):
    """The float leaves of finished states, as functions of what they were computed from."""
    del functions, block, others, source, masks, arrays
    return floats


def _attach_jvp(functions, block, primals, tangents):
    floats, others, source, masks, arrays = primals
    # The primal output must be attached again: with plain states, second derivatives would be wrong.
    out = _attach(functions, block, floats, others, source, masks, arrays)
    states = combine(lax.stop_gradient(floats), others)
    columns = source.shape[-1]

    leaves, treedef = jax.tree.flatten((source, arrays))
    dleaves = jax.tree.leaves((tangents[2], tangents[4]))
    active = [i for i, d in enumerate(dleaves) if not isinstance(d, SymbolicZero)]
    # Gradients of these leaves add up over the blocks: in float32 at least, however they are stored.
    adds_up = jax.tree.leaves((source._accumulates(), [Arrays(*_flags(a)) for a in arrays]))
    dactive = [
        dleaves[i].astype(jnp.promote_types(leaves[i].dtype, jnp.float32)) if adds_up[i] else dleaves[i]
        for i in active
    ]

    def block_tangent(dactive, start, size):
        def sums(active_leaves):
            all_leaves = list(leaves)
            for i, leaf in zip(active, active_leaves):
                all_leaves[i] = leaf
            source, arrays = jax.tree.unflatten(treedef, all_leaves)
            x = source._block(start, size, col_mask(masks, start, size))
            return block_sums(functions, states, tiles(x, start, masks, arrays, columns), arrays)

        primals = [leaves[i] for i in active]
        return jax.jvp(sums, (primals,), ([d.astype(p.dtype) for d, p in zip(dactive, primals)],))[1]

    def body(total, start, size, looped):
        # Without the barrier of prevent_cse, XLA would keep the block of the forward pass for the backward one.
        # Inside a loop it cannot; of dense scores nothing is recomputed but exponentials.
        prevent_cse = not looped and any(isinstance(a, LinearLogits) for a in (source, *_entries(arrays)))
        part = jax.checkpoint(block_tangent, static_argnums=(2,), prevent_cse=prevent_cse)(
            dactive, start, size
        )
        return jax.tree.map(jnp.add, total, part)

    zeros = jax.tree.map(jnp.zeros_like, floats)
    return out, over_blocks(columns, block, body, zeros) if active else zeros


_attach.defjvp(_attach_jvp, symbolic_zeros=True)


def _flags(arrays: Arrays):
    yield jax.tree.map(lambda _: True, arrays.args)
    yield jax.tree.map(lambda _: False, arrays.col_args)
    yield tuple(e._accumulates() if isinstance(e, LinearLogits) else False for e in arrays.entry_args)


# --- the derivative by hand, block by block -----------------------------------------------------------------
#
# Two callers want to hold the cotangent of a block of scores in their hands: the gradient filter here, which
# looks at its size, and `weighted_sum`, which has the block stored already.


def affine_cotangents(functions, states, cotangents, masks, source: LinearLogits, arrays, raw, start):
    """Pulls cotangents of the states' float leaves back through one block of scores.

    Args:
      functions: the reductions.
      states: their finished states.
      cotangents: of the float leaves of `states`.
      masks: the masks.
      source: the logits, flat.
      arrays: the reductions' arrays.
      raw: `[n, size]`, this block of `hidden @ weight`.
      start: its first column.

    Returns:
      The cotangents of `raw`; of scale and temperature; of the reductions' per-row arguments (these three
      are this block's share of a sum); and of the block's columns of the bias, the `col_args` and the
      `entry_args`.
    """
    size, columns = raw.shape[-1], source.shape[-1]
    bias = source._bias_block(start, size, col_mask(masks, start, size))
    blocks = [
        (
            tuple(cut(c, start, size, 0) for c in a.col_args),
            tuple(entry_block(e, start, size, masks) for e in a.entry_args),
        )
        for a in arrays
    ]

    def sums(raw, scale, temperature, args, bias, blocks):
        x = dataclasses.replace(source, scale=scale, temperature=temperature)._finish(raw, bias)
        cut_tiles = tiles(x, start, masks, [Arrays(a, (), ()) for a in args], columns)
        cut_tiles = [t._replace(col_args=c, entry_args=e) for t, (c, e) in zip(cut_tiles, blocks)]
        return block_sums(functions, states, cut_tiles, [Arrays(a, (), ()) for a in args])

    args = [a.args for a in arrays]
    return pull(sums, (raw, source.scale, source.temperature, args, bias, blocks), cotangents)


def pull(function: Callable, operands: tuple, cotangents: Any) -> Any:
    """The cotangents of the float leaves of `operands`, from those of `function(*operands)`; None for the others."""
    floats, rebuild = differentiable(operands)
    _, pullback = jax.vjp(lambda floats: function(*rebuild(floats)), floats)
    return pullback(cotangents)[0]


def differentiable(tree: Any) -> tuple[Any, Callable]:
    """The float leaves of a tree (None elsewhere), and the function that puts the others back."""
    floats, others = partition(tree)
    return floats, lambda f: combine(f, others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _filtered(functions, block, kernel, source, masks, arrays):
    """The results, with a backward pass that skips blocks whose gradient is negligible."""
    return _filtered_forward(functions, block, kernel, source, masks, arrays)[0]


def _filtered_forward(functions, block, kernel, source, masks, arrays):
    if kernel is None:
        states = _states(functions, block, source, masks, arrays)
    else:
        from jaxsoft.kernels import _rows

        states = _rows.finished_states(kernel, functions, source, masks, arrays)
    return finalize(functions, states, arrays), (states, source, masks, arrays)


# Rows of a block are filtered in groups: a group of few tokens often has no entry that matters in a block of
# columns, a whole batch seldom.
_FILTER_ROWS = 256


def _filtered_backward(functions, block, kernel, residuals, cotangents):
    del kernel  # whether a block matters is XLA's to ask, whatever ran forward
    states, source, masks, arrays = residuals
    floats, put_back = differentiable(states)
    args, put_args = differentiable([a.args for a in arrays])

    def final(floats, args):
        return [r.finalize(s, *a) for r, s, a in zip(functions, put_back(floats), put_args(args))]

    _, pullback = jax.vjp(final, floats, args)
    d_floats, d_args = pullback(cotangents)
    sizes = [
        jnp.max(jnp.abs(c), initial=0) for c in jax.tree.leaves(cotangents) if c.dtype != jax.dtypes.float0
    ]
    threshold = source.filter_eps * functools.reduce(jnp.maximum, sizes)

    n, columns = source.shape
    wide = source._accumulation_dtype
    total = jax.tree.map(
        lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, wide)), differentiable((source, arrays))[0]
    )

    def block_body(total, start, size, looped):
        weight = source._weight_block(start, size, col_mask(masks, start, size))

        def group_body(total, row, group, looped):
            rows = functools.partial(jax.tree.map, lambda a: cut(a, row, group, 0) if a.ndim else a)
            part = dataclasses.replace(
                source,
                hidden=rows(source.hidden),
                scale=rows(source.scale),
                temperature=rows(source.temperature),
            )
            part_masks = masks._replace(rows=rows(masks.rows), entries=rows(masks.entries))
            part_arrays = [Arrays(rows(a.args), a.col_args, rows(a.entry_args)) for a in arrays]
            raw = part._raw(weight)
            d_raw, d_scale, d_temperature, d_row, d_bias, d_blocks = affine_cotangents(
                functions, rows(states), rows(d_floats), part_masks, part, part_arrays, raw, start
            )
            matters = (
                jnp.max(jnp.abs(d_raw), initial=0) > threshold
            )  # False for NaN, which must not be skipped
            d_hidden, d_weight = lax.cond(
                matters | jnp.any(jnp.isnan(d_raw)),
                part._pull_raw,
                lambda g, w: jax.tree.map(jnp.zeros_like, jax.eval_shape(part._pull_raw, g, w)),
                d_raw,
                weight,
            )
            d_source, d_arrays = total
            d_source = dataclasses.replace(
                d_source,
                hidden=add_at(d_source.hidden, d_hidden, {0: row}),
                weight=add_at(d_source.weight, d_weight, {0 if source.transpose_weight else 1: start}),
                bias=None if d_bias is None else add_at(d_source.bias, d_bias, {0: start}),
                scale=_add_row_scalar(d_source.scale, d_scale, row),
                temperature=_add_row_scalar(d_source.temperature, d_temperature, row),
            )
            d_arrays = [
                Arrays(
                    jax.tree.map(lambda t, d: add_at(t, d, {0: row}), t.args, args),
                    jax.tree.map(lambda t, d: add_at(t, d, {0: start}), t.col_args, cols),
                    jax.tree.map(lambda t, d: add_at(t, d, {0: row, 1: start}), t.entry_args, entries),
                )
                for t, args, (cols, entries) in zip(d_arrays, d_row, d_blocks)
            ]
            return d_source, d_arrays

        return over_blocks(n, min(_FILTER_ROWS, max(n, 1)), group_body, total)

    d_source, d_arrays = over_blocks(columns, block, block_body, total)
    d_arrays = [
        a._replace(args=jax.tree.map(lambda t, d: t + d.astype(t.dtype), a.args, d))
        for a, d in zip(d_arrays, d_args)
    ]
    floats, _ = differentiable((source, arrays))
    d_source, d_arrays = jax.tree.map(lambda d, a: d.astype(a.dtype), (d_source, d_arrays), floats)
    return d_source, None, d_arrays


def add_at(total: Array, part: Array, starts: dict[int, Any]) -> Array:
    """Adds `part` into `total` in place, at the given start along some of the axes."""
    index = [starts.get(axis, 0) for axis in range(total.ndim)]
    index = [jnp.asarray(i, jnp.int32) for i in index]
    old = lax.dynamic_slice(total, index, part.shape)
    return lax.dynamic_update_slice(total, old + part.astype(total.dtype), index)


def _add_row_scalar(total, part, row):
    if total is None:
        return None
    return total + part if total.ndim == 0 else add_at(total, part, {0: row})


_filtered.defvjp(_filtered_forward, _filtered_backward)


# --- small tools -----------------------------------------------------------------------------------------


def is_explicitly_sharded(a: Any) -> bool:
    """Whether an axis of an array is sharded over an Explicit mesh axis."""
    sharding = getattr(jax.typeof(a), "sharding", None)
    return sharding is not None and any(axis is not None for axis in sharding.spec)


def is_float(a: Any) -> bool:
    """Whether `a` is a floating array."""
    return jnp.issubdtype(a.dtype, jnp.floating)


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into its float leaves and the others, each with None in place of the rest."""
    return (
        jax.tree.map(lambda a: a if is_float(a) else None, tree),
        jax.tree.map(lambda a: None if is_float(a) else a, tree),
    )


def combine(floats: Any, others: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(lambda f, o: o if f is None else f, floats, others, is_leaf=lambda x: x is None)


def align_varying(tree: Any) -> Any:
    """Inside shard_map, lets all arrays vary over the same mesh axes.

    Otherwise the derivative's loop would hold one all-reduce per block, where this leaves one per operand.
    """
    axes = [_varying_axes(leaf) for leaf in jax.tree.leaves(tree)]
    union = frozenset().union(*axes) if axes else frozenset()
    if not union:
        return tree

    def cast(leaf):
        missing = tuple(sorted(union - _varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _varying_axes(a: Any) -> frozenset:
    manual = getattr(jax.typeof(a), "manual_axis_type", None)
    return frozenset() if manual is None else frozenset(manual.varying)
