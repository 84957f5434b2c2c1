"""One pass over the rows of a source: the states of row reductions, and the one derivative rule.

The scores are read in blocks of columns and discarded. The value comes from a loop over the blocks that carries the
reductions' states. The derivative (see `RowReduction`) is one more loop, linear in the tangents,

    d(state) = sum over blocks of  jvp(update from neutral(state))( d(block of scores) ),

which `jaxsoft.kernels` attaches to the states. Its body is checkpointed: JAX transposes the loop by itself, recomputing
a block instead of keeping it, which gives reverse mode. Since the rule consists of ordinary JAX operations, forward
mode, second order, `vmap` and `checkpoint` also work on logits that are never stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._trees import as_varying, partition, replaced, varying_axes
from jaxsoft.rows._logits import LinearLogits
from jaxsoft.rows._masks import Masks, col_mask, row_mask, unmasked
from jaxsoft.rows._reduction import Arrays, RowReduction, Tile, block_sums
from jaxsoft.rows._shards import joined
from jaxsoft.rows._source import Source, cut


def align(source: Source, masks: Masks, arrays: list[Arrays]) -> tuple:
    """Inside `shard_map`, lets all arrays vary over the same mesh axes.

    Otherwise the loop of a derivative would contain one all-reduce per block; this leaves one per operand.
    """
    axes = varying_axes((source, masks, arrays))
    if not axes:
        return source, masks, arrays

    def aligned(a):
        return a._aligned(axes) if isinstance(a, Source) else as_varying(a, axes)

    return jax.tree.map(aligned, (source, masks, arrays), is_leaf=lambda a: isinstance(a, Source))


def mask_rows(source: Source, masks: Masks, arrays: list[Arrays]):
    """Zeroes the operands of masked rows: a NaN there would spread through the matrix product."""
    keep = row_mask(masks)
    if keep is None:
        return source, arrays

    def cleaned(entry):
        return entry._mask_rows(keep) if isinstance(entry, LinearLogits) else entry

    return source._mask_rows(keep), [a._replace(entry_args=tuple(map(cleaned, a.entry_args))) for a in arrays]


def closed_form(reduction: RowReduction, source: Source, masks: Masks, arrays: Arrays):
    """The state of a reduction from its closed form, or None if it needs a pass."""
    affine = source._affine()
    if reduction.closed_form is None or masks.entries is not None or affine is None:
        return None
    col_keep = jnp.ones(source._width, bool) if masks.cols is None else masks.cols
    if source.bias is not None:
        col_keep = col_keep & (source.bias != -jnp.inf)  # a logit of -inf is absent
    row_keep = jnp.ones(source.shape[:-1], bool) if masks.rows is None else masks.rows
    return reduction.closed_form(
        reduction._replace(args=arrays.args, col_args=arrays.col_args), affine, col_keep, row_keep
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


def cut_arrays(arrays: list[Arrays], start, size: int, masks: Masks) -> list[tuple[tuple, tuple]]:
    """The block of each reduction's `col_args` and `entry_args`."""
    return [
        (
            tuple(cut(c, start, size, 0) for c in a.col_args),
            tuple(entry_block(e, start, size, masks) for e in a.entry_args),
        )
        for a in arrays
    ]


def entry_block(entry, start, size: int, masks: Masks) -> Array:
    """A block of one of the `entry_args`: cut from an array, computed for an expression."""
    if isinstance(entry, LinearLogits):
        return entry._block(start, size, col_mask(masks, start, size))
    return cut(entry, start, size, entry.ndim - 1)


def tiles(x: Array, start, masks: Masks, cut_arrays: list[tuple[tuple, tuple]], source: Source) -> list[Tile]:
    """The block `x` of the scores of `source`, as one tile per reduction.

    Absent entries are cleaned here, once for all reductions.
    """
    size = x.shape[-1]
    cut_masks = Masks(
        masks.rows,
        None if masks.cols is None else cut(masks.cols, start, size, 0),
        None if masks.entries is None else cut(masks.entries, start, size, x.ndim - 1),
    )
    where = unmasked(cut_masks)
    cols = jnp.arange(size, dtype=jnp.int32) + (start + source._first())
    return [Tile.of(x, cols, source.shape[-1], *c, where) for c in cut_arrays]


def read_block(source: Source, start, size: int, masks: Masks, arrays: list[Arrays]) -> list[Tile]:
    """Computes the scores of a block of columns, as tiles."""
    x = source._block(start, size, col_mask(masks, start, size))
    return tiles(x, start, masks, cut_arrays(arrays, start, size, masks), source)


def finished_states(functions, block: int, source: Source, masks: Masks, arrays: list[Arrays]) -> list:
    """The finished states, without derivatives."""
    # Masked rows are emptied at the end, which is cheaper than masking every tile.
    cut_masks = masks._replace(rows=None)

    def body(states, start, size, looped):
        block = read_block(source, start, size, cut_masks, arrays)
        return [r.update(s, tile, *a.args) for r, s, tile, a in zip(functions, states, block, arrays)]

    states = over_blocks(source._width, block, body, empty_states(functions, source, arrays))
    return empty_masked_rows(functions, states, source, masks, arrays)


def empty_states(functions, source: Source, arrays: list[Arrays]) -> list:
    """The states of empty rows."""
    return [r.init(source._like(), *a.args) for r, a in zip(functions, arrays)]


def empty_masked_rows(functions, states, source: Source, masks: Masks, arrays: list[Arrays]) -> list:
    """The states, with those of masked rows replaced by empty ones."""
    keep = masks.rows
    if keep is None:
        return states

    def select(state, empty):
        return jnp.where(jnp.expand_dims(keep, tuple(range(keep.ndim, state.ndim))), state, empty)

    return jax.tree.map(select, states, empty_states(functions, source, arrays))


def finish(functions, states: list, source: Source, args: list[tuple]) -> list:
    """The results, from the finished states of this device's columns and the reductions' `args`."""
    axes = () if source.shards is None else source.shards.columns
    return [r.finalize(s, *a) for r, s, a in zip(functions, joined(functions, states, axes, args), args)]


# --- the derivative --------------------------------------------------------------------------------------


def tangents(functions, block: int, states, masks: Masks, operands, given) -> list:
    """The tangents of the finished states' float leaves, linear in those of the operands.

    Args:
      functions: the reductions.
      block: columns read at a time.
      states: their finished states.
      masks: the masks.
      operands: the source and the reductions' arrays.
      given: a tree like `operands` with their tangents; None for a leaf without one.
    """
    source, arrays = operands
    leaves, treedef = jax.tree.flatten(operands)
    dleaves = treedef.flatten_up_to(given)
    active = [i for i, d in enumerate(dleaves) if d is not None]
    # Gradients of these leaves add up over the blocks, in at least float32, for any dtype of the leaves.
    adds_up = jax.tree.leaves((source._accumulates(), [Arrays(*_flags(a)) for a in arrays]))
    dactive = [
        dleaves[i].astype(jnp.promote_types(leaves[i].dtype, jnp.float32)) if adds_up[i] else dleaves[i]
        for i in active
    ]

    def block_tangent(dactive, start, size):
        def sums(active_leaves):
            source, arrays = treedef.unflatten(replaced(leaves, active, active_leaves))
            block = read_block(source, start, size, masks, arrays)
            return block_sums(functions, states, block, [a.args for a in arrays])

        primals = [leaves[i].astype(d.dtype) for i, d in zip(active, dactive)]
        return jax.jvp(sums, (primals,), (list(dactive),))[1]

    def body(total, start, size, looped):
        # Without the barrier of prevent_cse, XLA would keep the forward pass's block for the backward pass.
        # Inside a loop it cannot, and for dense scores only exponentials are recomputed.
        prevent_cse = not looped and any(isinstance(a, LinearLogits) for a in (source, *entries(arrays)))
        # `static_argnums` of `checkpoint` would keep the tracers of this trace alive, in JAX's cache.
        of_block = jax.checkpoint(functools.partial(block_tangent, size=size), prevent_cse=prevent_cse)
        part = of_block(dactive, start)
        return jax.tree.map(jnp.add, total, part)

    zeros = jax.tree.map(jnp.zeros_like, partition(states)[0])
    return over_blocks(source._width, block, body, zeros)


def _flags(arrays: Arrays):
    yield jax.tree.map(lambda _: True, arrays.args)
    yield jax.tree.map(lambda _: False, arrays.col_args)
    yield tuple(e._accumulates() if isinstance(e, LinearLogits) else False for e in arrays.entry_args)


def entries(arrays: list[Arrays]) -> list:
    """The `entry_args` of all reductions."""
    return [e for a in arrays for e in a.entry_args]
