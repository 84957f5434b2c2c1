"""One pass over attention scores, `query @ key`, which are never stored: computes the states of row reductions.

A single loop visits the scores, one pair of a query block and a key block after another. Pairs that the static options
(causal, window) hide completely are left out of the loop. Masks known at run time (lengths, segments, a predicate, an
array) are evaluated per pair: a pair without a visible entry is skipped, one without a hidden entry is computed
without a mask. The derivative rule is that of `jaxsoft.rows`: one more loop over the pairs, checkpointed and linear in
the tangents, which JAX transposes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._numerics import accumulation_dtype
from jaxsoft._trees import partition, replaced
from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility
from jaxsoft.attention._visibility import any_of, as_rows, cut_entries, over_pairs, positions, visible
from jaxsoft.rows import Tile
from jaxsoft.rows.inner import block_sums, capped


def _raw(spec: AttentionSpec, block: Inputs) -> Array:
    """The products of the queries and keys of a pair of blocks, `[B, K, R, bk]`."""
    dtype = accumulation_dtype(block.query.dtype, block.key.dtype)
    return _product("bkrh,bksh->bkrs", block.query, block.key, spec.precision, dtype)


def _scores(spec: AttentionSpec, x: Array, block: Inputs, masks: Visibility, i, j) -> Array:
    """The scores of a pair of blocks, of its products x."""
    bias = distance = None
    if block.bias is not None:
        bias = as_rows(spec, block.bias)
    if block.slopes is not None:
        q, k = positions(spec, masks, i, j)
        distance = k - q
        distance = as_rows(spec, distance.reshape((1,) * (5 - distance.ndim) + distance.shape))
    return finish(spec, x, block.scale, bias, block.slopes, distance)


def finish(spec: AttentionSpec, x: Array, scale, bias, slopes, distance) -> Array:
    """Turns products of queries and keys into scores: scale, softcap, bias, and slopes times the distance to the key.

    Scale and slopes are `[..., R]`; bias and distance broadcast to the scores. Absent ones are None.
    """
    if scale is not None:
        x = x * scale[..., None]
    if spec.softcap is not None:
        x = capped(x, spec.softcap)
    if bias is not None:
        x = x + bias.astype(x.dtype)
    if slopes is not None:
        x = x + slopes[..., None] * distance.astype(x.dtype)
    return x


def _product(formula: str, a: Array, b: Array, precision, dtype) -> Array:
    common = jnp.promote_types(a.dtype, b.dtype)
    return jnp.einsum(
        formula, a.astype(common), b.astype(common), precision=precision, preferred_element_type=dtype
    )


def _cut(inputs: Inputs, spec: AttentionSpec, i, j) -> Inputs:
    """The inputs of one pair of blocks."""

    def at(a, index):
        return None if a is None else lax.dynamic_index_in_dim(a, index, 0, keepdims=False)

    return Inputs(
        at(inputs.query, i),
        at(inputs.key, j),
        at(inputs.value, j),
        at(inputs.scale, i),
        None if inputs.bias is None else cut_entries(spec, inputs.bias, i, j),
        at(inputs.slopes, i),
    )


def _tile(spec: AttentionSpec, x: Array, block: Inputs, masks: Visibility, keep: Array | None, i, j) -> Tile:
    scores = _scores(spec, x, block, masks, i, j)
    if keep is not None:
        scores = jnp.where(as_rows(spec, keep), scores, -jnp.inf)
    cols = jnp.arange(spec.bk, dtype=jnp.int32) + (j * spec.bk + spec.key_offset)
    if masks.key_offset is not None:
        offset = masks.key_offset
        cols = cols + (offset if offset.ndim == 0 else offset[:, None, None, None])
    values = () if block.value is None else (block.value,)
    columns = spec.keys + spec.key_offset if masks.key_offset is None else jnp.iinfo(jnp.int32).max
    return Tile.of(scores, cols, columns, values)


def _at(tree: Any, i) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree)


def _by_visibility(
    spec: AttentionSpec, masks: Visibility, pair: Array, skip: Callable, work: Callable, *operands
) -> Any:
    """`skip(*operands)` if a pair has no visible or needed entry, else `work(keep, *operands)`.

    `keep` is None if no entry is hidden.
    """
    i, j, hidden = pair
    if masks.needed is not None:
        rest = masks._replace(needed=None)
        needed = functools.partial(_by_visibility, spec, rest, pair, skip, work)
        return lax.cond(masks.needed[i, j], needed, skip, *operands)
    if spec.mask_fn is None and all(m is None for m in masks):
        if not spec.pairs()[:, 2].any():
            return work(None, *operands)

        def masked(*operands):
            return work(visible(spec, masks, i, j), *operands)

        if spec.pairs()[:, 2].all():
            return masked(*operands)
        return lax.cond(hidden == 1, masked, functools.partial(work, None), *operands)
    keep = visible(spec, masks, i, j)
    some, none_hidden = any_of(keep.reshape(-1)), ~any_of(~keep.reshape(-1))
    kind = jnp.where(none_hidden, 1, jnp.where(some, 2, 0))
    branches = [skip, functools.partial(work, None), functools.partial(work, keep)]
    return lax.switch(kind, branches, *operands)


# --- all pairs -----------------------------------------------------------------------------------------------


def empty_states(spec: AttentionSpec, functions: tuple, inputs: Inputs, args: list) -> list:
    """The initial states, of rows that have not seen a key yet."""
    dtype = accumulation_dtype(inputs.query.dtype, inputs.key.dtype)
    like = jnp.zeros_like(inputs.query[..., 0], dtype=dtype)
    return [r.init(like, *a) for r, a in zip(functions, args)]


def finished_states(
    spec: AttentionSpec, functions: tuple, inputs: Inputs, masks: Visibility, args: list
) -> tuple[list, Array | None]:
    """The states after all pairs of blocks, without derivatives; and the pairs that they depend on, `[nq, nk]` or None.

    Pairs are left out that `masks.needed` excludes, or in which no entry is supported (`RowReduction.support`).
    """
    masks, needed = masks._replace(needed=None), masks.needed
    empty = empty_states(spec, functions, inputs, args)
    must = _must_be_read(inputs)
    if needed is None and all(r.support is not None for r in functions):
        return _supported_states(spec, functions, inputs, masks, args, empty, must)
    if needed is not None:
        needed = needed | must

    def body(states, pair):
        i, j, _ = pair
        block, block_args = _cut(inputs, spec, i, j), _at(args, i)

        def work(keep, states):
            tile = _tile(spec, _raw(spec, block), block, masks, keep, i, j)
            return [r.update(s, tile, *a) for r, s, a in zip(functions, states, block_args)]

        def skip(states):
            return states

        new = _by_visibility(spec, masks, pair, skip, work, _at(states, i))
        return _with_block(states, new, i)

    return over_pairs(spec, body, empty, needed), needed


def _must_be_read(inputs: Inputs) -> Array:
    """`[nk]`, True for key blocks with a value that is not finite, which shows even if its weight is 0."""
    if inputs.value is None:
        return jnp.zeros(inputs.key.shape[0], bool)
    finite = jnp.all(jnp.isfinite(inputs.value), axis=(2, 3, 4))
    return any_of(~finite.T)


def _with_block(states: Any, block: Any, i) -> Any:
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, i, 0), states, block)


def _supported_states(spec: AttentionSpec, functions, inputs, masks, args, empty, must) -> tuple[list, Array]:
    """`finished_states` of reductions with a support: a pair's scores decide whether it is left out."""

    def body(carry, pair):
        states, read = carry
        i, j, _ = pair
        block, block_args = _cut(inputs, spec, i, j), _at(args, i)

        def work(keep, states):
            x = _raw(spec, block)

            def some(rows):
                tile = _tile(spec, x, block, masks, keep, i, j)
                each = [r.support(tile, *a)[..., rows, :] for r, a in zip(functions, block_args)]
                return any_of(functools.reduce(jnp.logical_or, each).reshape(-1))

            def update(states):
                tile = _tile(spec, x, block, masks, keep, i, j)
                return [r.update(s, tile, *a) for r, s, a in zip(functions, states, block_args)]

            # In most pairs that count, a few rows show it.
            known = some(slice(8)) | must[j]
            counts = lax.cond(known, lambda: True, lambda: some(slice(None)))
            return lax.cond(counts, update, lambda states: states, states), counts

        def skip(states):
            return states, jnp.zeros_like(must[j])

        new, counts = _by_visibility(spec, masks, pair, skip, work, _at(states, i))
        return _with_block(states, new, i), read.at[i, j].set(counts)

    read = jnp.broadcast_to(jnp.zeros_like(must), (spec.nq, spec.nk))
    return over_pairs(spec, body, (empty, read))


def tangents(spec: AttentionSpec, functions: tuple, states, masks: Visibility, operands, given) -> list:
    """The tangents of the finished states' float leaves, linear in those of the operands.

    Args:
      spec: the attention.
      functions: the reductions.
      states: their finished states.
      masks: the masks.
      operands: the inputs and the reductions' arrays.
      given: a tree like `operands` with their tangents; None for a leaf without one.
    """
    leaves, treedef = jax.tree.flatten(operands)
    dleaves = treedef.flatten_up_to(given)
    active = [k for k, d in enumerate(dleaves) if d is not None]
    zeros = jax.tree.map(jnp.zeros_like, partition(states)[0])
    # Gradients accumulate over the pairs, in float32 or wider.
    dactive = [dleaves[k].astype(jnp.promote_types(leaves[k].dtype, jnp.float32)) for k in active]

    def cut(tree, i, j):
        inputs, args = tree
        return _cut(inputs, spec, i, j), _at(args, i)

    def pair_tangent(dactive, pair):
        i, j, _ = pair
        block_leaves, block_treedef = jax.tree.flatten(cut(operands, i, j))
        all_tangents = treedef.unflatten(replaced([None] * len(leaves), active, dactive))
        block_tangents = jax.tree.leaves(cut(all_tangents, i, j))
        primals = [block_leaves[k] for k in active]
        state = _at(states, i)

        def sums(keep, active_leaves):
            block, block_args = block_treedef.unflatten(replaced(block_leaves, active, active_leaves))
            tile = _tile(spec, _raw(spec, block), block, masks, keep, i, j)
            return block_sums(functions, state, [tile] * len(functions), block_args)

        def work(keep, block_tangents):
            cast = [d.astype(p.dtype) for d, p in zip(block_tangents, primals)]
            return jax.jvp(functools.partial(sums, keep), (primals,), (cast,))[1]

        def skip(block_tangents):
            return _at(zeros, 0)

        return _by_visibility(spec, masks, pair, skip, work, block_tangents)

    def body(total, pair):
        part = jax.checkpoint(pair_tangent, prevent_cse=False)(dactive, pair)
        i = pair[0]

        def add(t, p):
            old = lax.dynamic_index_in_dim(t, i, 0, keepdims=False)
            return lax.dynamic_update_index_in_dim(t, old + p, i, 0)

        return jax.tree.map(add, total, part)

    return over_pairs(spec, body, zeros)
