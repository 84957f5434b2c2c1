"""Passes over stored scores and over `hidden @ weight` as sweeps, which every kernel backend runs.

The forward pass is one sweep that carries the reductions' states. The backward pass is another sweep: `jax.vjp` of the
reductions' shares of a tile gives the gradient of the tile's scores, which is written, and the gradients of per-row
operands (summed in the carry) and per-column operands (one sum per block of rows). The scores of a product are swept
one stretch of columns at a time, so that only the gradient of a stretch is stored; two matrix products turn it into the
gradients of hidden and weight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._trees import align_varying, is_float, partition, pull
from jaxsoft.kernels.inner import Block, Kernel, Operands, Out, Plan, Scores, attach, objection, plain
from jaxsoft.rows import _pass
from jaxsoft.rows._cotangents import Parts, operand_cotangents, parts_of
from jaxsoft.rows._logits import LinearLogits
from jaxsoft.rows._masks import Masks, col_mask, unmasked
from jaxsoft.rows._pass import empty_masked_rows, over_blocks
from jaxsoft.rows._reduction import Arrays, Tile, block_sums
from jaxsoft.rows._source import Source, cut, finish

# Scores per stretch of columns; their gradients are stored: 128 MiB in bfloat16.
_STRETCH = 2**26
_NARROWEST_STRETCH = 1024
# Maximum of numbers per row in a state: a kernel processes them one by one (top-k: k rounds of k steps).
_WIDEST_STATE = 32


def refusal(
    backend, kernel: Kernel, functions, source: Source, masks: Masks, arrays: list[Arrays]
) -> str | None:
    """Why a backend cannot run these reductions, or None."""
    n = source.shape[0]
    if n == 0 or source._width == 0:
        return "there is nothing to read"
    if any(isinstance(e, LinearLogits) for a in arrays for e in a.entry_args):
        return "two linear_logits are read in one pass"
    if (wrong := objection((source, arrays), kernel.interpret)) is not None:
        return wrong
    for r, a in zip(functions, arrays):
        like = jax.ShapeDtypeStruct((n,), source._accumulation_dtype)
        for state in jax.tree.leaves(jax.eval_shape(r.init, like, *a.args)):
            if state.shape[:1] != (n,) or state.ndim > 2:
                return f"a state must be one or a few numbers per row, got shape {state.shape}"
            if state.ndim == 2 and state.shape[1] > _WIDEST_STATE:
                return f"a state may have at most {_WIDEST_STATE} numbers per row, got {state.shape[1]}"
    return backend.refusal(kernel, *_forward(functions, source, masks, arrays))


def stream(kernel: Kernel, functions, block: int, source: Source, masks: Masks, arrays: list[Arrays]) -> list:
    """The finished states of the reductions, with their derivatives attached."""
    states = finished_states(kernel, functions, *jax.lax.stop_gradient((source, masks, arrays)))
    rule, pull_back = functools.partial(_pass.tangents, functions, block), None
    # weighted_sum computes the gradient of a chunk's stored product itself.
    stored_product = isinstance(source, LinearLogits) and source._raw_scores() is not None
    backward = _backward(functions, states, partition(states)[0], source, masks, arrays)
    if not stored_product and kernel.backend().refusal(kernel, *backward) is None:
        pull_back = functools.partial(_pull_back, kernel, functions)
    return attach(rule, pull_back, states, masks, (source, arrays))


# --- the operands of a tile ----------------------------------------------------------------------------------


def _scores(source: Any, start=0, size: int | None = None) -> Scores:
    if (raw := source._raw_scores()) is not None:
        return Scores(values=raw[None])
    weight = source._weight_block(start, source._width if size is None else size, None)
    left, right = (a.astype(source.dtype)[None] for a in (source.hidden, weight))
    return Scores(None, left, right, source.transpose_weight, source.precision)


def _operands(
    source: Source, masks: Masks, arrays: list[Arrays], start=0, size: int | None = None
) -> Operands:
    """Operands other than scores, `size` columns from `start`; booleans as ints, row and column floats in float32."""
    n, columns = source.shape[0], source._width if size is None else size

    def by_row(a):
        return plain(jnp.broadcast_to(a, (n, *a.shape[1:])))[None]

    def by_column(a):
        return plain(cut(a, start, columns, 0))[None]

    def by_entry(a):
        a = cut(a, start, columns, 1)  # as large as the scores, so it keeps its narrow dtype
        return (a.astype(jnp.int8) if a.dtype == jnp.bool_ else a)[None]

    rows, cols, entries = (
        jax.tree.map(cut_part, {"keep": keep, **part})
        for cut_part, keep, part in zip((by_row, by_column, by_entry), masks, parts_of(source, arrays))
    )
    return Operands(rows, cols, entries, jnp.asarray(start + source._first(), jnp.int32))


def _tiles(softcap: float | None, columns: int, block: Block, raw, parts: Parts) -> list[Tile]:
    """One tile per reduction; `parts` also hold the masks, as numbers."""

    def clean(a: Any) -> Any:
        return a if block.inside is None else jnp.where(block.inside, a, 0)

    rows, cols, entries = parts
    keeps = Masks(*(None if part["keep"] is None else part["keep"] != 0 for part in (rows, cols, entries)))
    x: Any = clean(raw)
    if keeps.cols is not None:  # a masked column may hold NaN
        x = jnp.where(keeps.cols, x, 0)
    x = finish(x, softcap, cols["bias"], rows["scale"], rows["temperature"])
    where, entry_args = unmasked(keeps, block.inside), jax.tree.map(clean, entries["args"])
    return [Tile.of(x, block.col, columns, c, e, where, True) for c, e in zip(cols["args"], entry_args)]


# --- the forward pass ----------------------------------------------------------------------------------------


def _forward(functions, source: Source, masks: Masks, arrays: list[Arrays]) -> tuple:
    """The sweep that carries the states: `(body, scores, operands, init, plan)`."""
    softcap, columns = source.softcap, source.shape[-1]

    def init(rows, like):
        return [r.init(like, *a) for r, a in zip(functions, rows["args"])]

    def body(block: Block, states) -> Out:
        tiles = _tiles(softcap, columns, block, block.raw, Parts(block.rows, block.cols, block.entries))
        updates = zip(functions, states, tiles, block.rows["args"])
        return Out(carry=[r.update(s, tile, *a) for r, s, tile, a in updates])

    # Masked rows are emptied at the end.
    operands = _operands(source, masks._replace(rows=None), arrays)
    return body, _scores(source), operands, init, Plan()


def finished_states(kernel: Kernel, functions, source: Source, masks: Masks, arrays: list[Arrays]) -> list:
    """The finished states, without derivatives."""
    body, scores, operands, init, plan = _forward(functions, source, masks, arrays)
    result = kernel.backend().sweep(kernel, body, scores, operands, init, plan)
    parts = jax.tree.map(lambda a: list(a[:, 0]), result.carry)
    each = jax.tree.transpose(jax.tree.structure(result.carry), None, parts)

    def join(a, b):
        return [r.merge(x, y, *args.args) for r, x, y, args in zip(functions, a, b, arrays)]

    return empty_masked_rows(functions, functools.reduce(join, each), source, masks, arrays)


# --- one number per score ---------------------------------------------------------------------------------------


def writing_refusal(backend, kernel: Kernel, function, source: Source, args: list) -> str | None:
    """Why a backend cannot run `written`, or None."""
    if 0 in source.shape:
        return "there is nothing to read"
    return objection((source, args), kernel.interpret) or backend.refusal(
        kernel, *_writing(function, source, args)
    )


def written(kernel: Kernel, function, source: Source, args: list) -> Array:
    """`function(x, *args)` for stored scores x and one number per row, `[n, columns]` in the scores' dtype."""
    return kernel.backend().sweep(kernel, *_writing(function, source, args)).entries[0][0]


def _writing(function, source: Source, args: list) -> tuple:
    """The sweep that writes: `(body, scores, operands, init, plan)`."""

    def init(rows, like):
        del rows, like
        return ()

    def body(block: Block, carry) -> Out:
        return Out(carry, (function(block.raw, *(a[:, None] for a in block.rows)),))

    scores = _scores(source)
    return body, scores, Operands([plain(a)[None] for a in args]), init, Plan(entry_dtypes=(scores.dtype,))


# --- the backward pass ---------------------------------------------------------------------------------------


def _backward(functions, states, cotangents, source: Source, masks, arrays, start=0, size=None) -> tuple:
    """The sweep that pulls back cotangents of the states' float leaves: `(body, scores, operands, init, plan)`."""
    softcap, columns = source.softcap, source.shape[-1]
    operands = _operands(source, masks, arrays, start, size)
    operands.rows.update(jax.tree.map(lambda a: a[None], {"states": states, "cotangents": cotangents}))

    def init(rows, like):
        del like
        return jax.tree.map(jnp.zeros_like, partition(_differentiable(rows))[0])

    def body(block: Block, carry) -> Out:
        given = Parts(block.rows, block.cols, block.entries)

        def sums(raw, parts: Parts):
            parts = Parts(*({**whole, **part} for whole, part in zip(given, parts)))
            tiles = _tiles(softcap, columns, block, raw, parts)
            return block_sums(functions, parts.rows["states"], tiles, parts.rows["args"])

        operands = (block.raw, Parts(*map(_differentiable, given)))
        d_raw, d = pull(sums, operands, block.rows["cotangents"])
        return Out(jax.tree.map(jnp.add, carry, d.rows), (d_raw, d.entries), d.cols)

    dtypes = [_scores(source).dtype, *(e.dtype for e in _pass.entries(arrays) if is_float(e))]
    return body, _scores(source, start, size), operands, init, Plan(entry_dtypes=tuple(dtypes))


def _differentiable(part: dict) -> dict:
    """The operands of a part that may have a gradient."""
    return {name: a for name, a in part.items() if name in ("scale", "temperature", "bias", "args")}


def _cotangents(kernel: Kernel, *case) -> tuple[Array, Parts]:
    """Runs the sweep of `_backward` for a stretch of columns: the cotangents of its raw scores and of their parts."""
    result = kernel.backend().sweep(kernel, *_backward(*case))
    raw, entries = jax.tree.map(lambda a: a[0], result.entries)
    rows, cols = jax.tree.map(lambda a: jnp.sum(a, axis=(0, 1)), (result.carry, result.cols))
    return raw, Parts(rows, cols, entries)


def _pull_back(kernel, functions, states, masks, operands, cotangents) -> tuple:
    """The cotangents of source and arrays, from the cotangents of the states' float leaves."""
    source, arrays = operands
    case = (functions, states, cotangents, source, masks, arrays)
    if isinstance(source, LinearLogits):
        d_hidden, d_weight, d = _product_cotangents(kernel, *case)
        return operand_cotangents(source, arrays, d, hidden=d_hidden, weight=d_weight)
    d_raw, d = _cotangents(kernel, *case)
    return operand_cotangents(source, arrays, d, values=d_raw)


def _product_cotangents(
    kernel, functions, states, cotangents, source: LinearLogits, masks, arrays
) -> tuple[Array, Array, Parts]:
    """The cotangents of hidden, weight and parts.

    Processes one stretch of columns at a time: stores the gradient of its scores, then computes two matrix products.
    """
    n, columns = source.shape[0], source._width

    def pulled(start, size: int) -> tuple:
        """Cotangents summed over columns, those cut into stretches along axis 0, and those cut along axis 1."""
        d_raw, d = _cotangents(kernel, functions, states, cotangents, source, masks, arrays, start, size)
        weight = source._weight_block(start, size, col_mask(masks, start, size))
        d_hidden, d_weight = source._pull_product(d_raw, weight)
        d_weight = source._weight_cotangent(d_weight).astype(source.weight.dtype)
        along = (d_weight, None) if source.transpose_weight else (None, d_weight)
        return (d_hidden, d.rows), (d.cols, along[0]), (d.entries, along[1])

    def stretch(total, start, size, looped):
        del looped
        new = pulled(start, size)
        put = [
            jax.tree.map(
                functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=axis), t, d
            )
            for axis, t, d in zip((0, 1), total[1:], new[1:])
        ]
        return jax.tree.map(jnp.add, total[0], new[0]), *put

    size = min(columns, max(_NARROWEST_STRETCH, _STRETCH // n // 128 * 128))
    if size == columns:
        total = pulled(0, columns)
    else:
        shapes = jax.eval_shape(lambda: pulled(0, size))  # a lambda: `size` must be static
        whole = [
            jax.tree.map(functools.partial(_longer, axis=axis, size=columns), shapes[1 + axis])
            for axis in (0, 1)
        ]
        total = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0], *whole))
        total = align_varying((total, source.hidden))[0]
        total = over_blocks(columns, size, stretch, total)
    (d_hidden, d_rows), (d_cols, d_by_row), (d_entries, d_by_column) = total
    d_weight = d_by_row if source.transpose_weight else d_by_column
    return d_hidden, d_weight, Parts(d_rows, d_cols, d_entries)


def _longer(a: jax.ShapeDtypeStruct, axis: int, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*a.shape[:axis], size, *a.shape[axis + 1 :]), a.dtype)
