"""Which keys a query sees: the masks of an attention, one pair of blocks at a time, and the number of visible keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._numerics import accumulation_dtype
from jaxsoft._trees import align_varying
from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility


def over_pairs(spec: AttentionSpec, body: Callable, carry: Any, needed: Array | None = None) -> Any:
    """Folds `body(carry, pair)` over the pairs of blocks, those where `needed` (`[nq, nk]`) is True.

    With `needed`, the number of steps is known only at run time: JAX does not transpose this loop.
    """
    pairs = spec.pairs()
    if not len(pairs):  # perhaps without queries or keys, of which no block can be cut
        return carry
    if needed is not None:
        wanted = needed[pairs[:, 0], pairs[:, 1]]
        first = jnp.asarray(pairs)[jnp.argsort(~wanted, stable=True)]
        return lax.fori_loop(0, jnp.sum(wanted), lambda n, carry: body(carry, first[n]), carry)
    return lax.scan(lambda carry, pair: (body(carry, pair), None), carry, jnp.asarray(pairs))[0]


@jax.custom_batching.custom_vmap
def any_of(keep: Array) -> Array:
    """Whether any entry along the first axis is True; under `vmap`, any entry of any element of the mapped axis.

    A pair of blocks is thus treated alike for all elements, and `lax.switch` stays a branch. With an answer per
    element, `vmap` would compute all branches and select, by operations that cannot be transposed.
    """
    return jnp.any(keep, axis=0)


@any_of.def_vmap
def _any_of_all(axis_size: int, in_batched: list, keep: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return any_of(jnp.any(keep, axis=0)), False


def positions(spec: AttentionSpec, masks: Visibility, i, j) -> tuple[Array, Array]:
    """Positions of a block's queries, `[bq, 1]`, and keys, `[1, bk]`; five axes if they vary over the batch."""
    q = jnp.arange(spec.bq, dtype=jnp.int32)[:, None] + i * spec.bq
    k = jnp.arange(spec.bk, dtype=jnp.int32)[None, :] + j * spec.bk
    if spec.offset is not None:
        return q + spec.offset, k + spec.key_offset

    def moved(x, offset, given, first):
        if given is None:
            return x + (offset if offset.ndim == 0 else offset[:, None, None, None, None])
        block = lax.dynamic_slice_in_dim(given, first, x.size, 1)
        return block.reshape(x.shape if len(block) == 1 else (len(block), 1, 1, *x.shape))

    return (
        moved(q, masks.offset, masks.query_positions, i * spec.bq),
        moved(k, masks.key_offset, masks.key_positions, j * spec.bk),
    )


def seen_from(spec: AttentionSpec, q: Array, k: Array) -> list[Array]:
    """The positional masks for queries at positions `q` and keys at `k`: booleans, all of which must hold."""
    left, right = spec.band()
    keeps = []
    if left is not None:
        keeps.append(k >= q - left)
    if right is not None:
        keeps.append(k <= q + right)
    if spec.mask_fn is not None:
        keeps.append(jnp.broadcast_to(spec.mask_fn(q, k), jnp.broadcast_shapes(q.shape, k.shape)))
    return keeps


def hides_keys(masks: Visibility) -> bool:
    """Whether masks hide the same keys from all queries and heads: these may hold NaN."""
    return masks.key_lengths is not None or is_of_keys(masks.entries)


def is_of_keys(entries: Array | None) -> bool:
    return entries is not None and entries.shape[1:4] == (1, 1, 1)


def shown_keys(spec: AttentionSpec, masks: Visibility) -> Array:
    """`[B or 1, nk * bk]`: False for the keys that are hidden from all queries and heads."""
    keeps = []
    if masks.key_lengths is not None:
        first = spec.key_offset if masks.key_offset is None else masks.key_offset.reshape(-1, 1)
        k = jnp.arange(spec.nk * spec.bk, dtype=jnp.int32)[None] + first
        k = k if masks.key_positions is None else masks.key_positions
        keeps.append(k < masks.key_lengths[:, None])
    if is_of_keys(masks.entries):
        keep = masks.entries[:, 0, 0, 0]
        keeps.append(jnp.broadcast_to(keep, (len(keep), spec.nk * spec.bk)))
    return functools.reduce(jnp.logical_and, keeps)


def without_hidden_keys(spec: AttentionSpec, inputs: Inputs, masks: Visibility) -> Inputs:
    """Inputs with zeros for hidden keys and their values: a NaN there would spread through the matrix products."""
    if not hides_keys(masks):
        return inputs
    keep = shown_keys(spec, masks)
    keep = jnp.swapaxes(keep.reshape(keep.shape[0], spec.nk, spec.bk), 0, 1)[:, :, None, :, None]

    def shown(a):
        return None if a is None else jnp.where(keep, a, 0)

    return inputs._replace(key=shown(inputs.key), value=shown(inputs.value))


def visible(spec: AttentionSpec, masks: Visibility, i, j) -> Array:
    """Which entries of a pair of blocks are visible: five axes that broadcast to `[B, K, G, bq, bk]`."""
    q, k = positions(spec, masks, i, j)
    keeps = seen_from(spec, q, k)
    if spec.nk * spec.bk > spec.keys:
        keeps.append((jnp.arange(spec.bk, dtype=jnp.int32) + j * spec.bk < spec.keys)[None, :])
    if masks.key_lengths is not None:
        keeps.append(k < masks.key_lengths[:, None, None, None, None])
    if masks.query_lengths is not None:
        row = jnp.arange(spec.bq, dtype=jnp.int32)[:, None] + i * spec.bq
        row = row if masks.query_positions is None else q
        keeps.append(row < masks.query_lengths[:, None, None, None, None])
    if masks.query_segments is not None:
        qs = lax.dynamic_slice_in_dim(masks.query_segments, i * spec.bq, spec.bq, 1)
        ks = lax.dynamic_slice_in_dim(masks.key_segments, j * spec.bk, spec.bk, 1)
        keeps.append(qs[:, None, None, :, None] == ks[:, None, None, None, :])
    if masks.entries is not None:
        keeps.append(cut_entries(spec, masks.entries, i, j))
    keep = functools.reduce(jnp.logical_and, keeps, jnp.ones((1, 1), bool))
    return keep.reshape((1,) * (5 - keep.ndim) + keep.shape)


def cut_entries(spec: AttentionSpec, array: Array, i, j) -> Array:
    """Cuts one block from an array with the five axes of the scores, any of which may have size 1."""
    for axis, index, size in ((3, i, spec.bq), (4, j, spec.bk)):
        if array.shape[axis] != 1:
            array = lax.dynamic_slice_in_dim(array, index * size, size, axis)
    return array


def as_rows(spec: AttentionSpec, block: Array) -> Array:
    """Five axes that broadcast to `[B, K, G, bq, bk]`, as `[B, K, R, bk]`."""
    block = jnp.broadcast_to(block, (spec.batch, spec.heads, spec.groups, spec.bq, spec.bk))
    return block.reshape(spec.batch, spec.heads, spec.groups * spec.bq, spec.bk)


@functools.partial(jax.jit, static_argnums=0)  # outside of `jit`, each call would compile the loop anew
def count(spec: AttentionSpec, inputs: Inputs, masks: Visibility) -> Array:
    """The number of visible keys per row, counted without computing scores."""
    dtype = accumulation_dtype(inputs.query.dtype, inputs.key.dtype)
    others = (masks.entries, masks.query_segments, masks.query_positions, masks.key_positions, spec.mask_fn)
    if all(a is None for a in others):
        # Each query sees an interval of keys, whose ends are known.
        q = jax.vmap(lambda i: positions(spec, masks, i, 0)[0])(jnp.arange(spec.nq, dtype=jnp.int32))
        q = q.reshape(spec.nq, *(1,) * (6 - q.ndim), *q.shape[1:])[..., 0]
        zero = spec.key_offset if masks.key_offset is None else masks.key_offset
        zero = jnp.asarray(zero, jnp.int32).reshape(-1, 1, 1, 1)
        left, right = spec.band()
        first = zero if left is None else jnp.maximum(q - left, zero)
        last = zero + spec.keys - 1
        last = last if right is None else jnp.minimum(q + right, last)
        if masks.key_lengths is not None:
            last = jnp.minimum(last, masks.key_lengths[:, None, None, None] - 1)
        n = jnp.maximum(last - first + 1, 0)
        if masks.query_lengths is not None:
            row = jnp.arange(spec.nq * spec.bq, dtype=jnp.int32).reshape(spec.nq, 1, 1, 1, spec.bq)
            n = jnp.where(row < masks.query_lengths[:, None, None, None], n, 0)
        shape = (spec.nq, spec.batch, spec.heads, spec.groups, spec.bq)
        return jnp.broadcast_to(n, shape).reshape(spec.rows).astype(dtype)

    masks, total = align_varying((masks, jnp.zeros(spec.rows, dtype)))

    def body(total, pair):
        i, j, _ = pair
        here = jnp.sum(as_rows(spec, visible(spec, masks, i, j)), axis=-1, dtype=dtype)
        old = lax.dynamic_index_in_dim(total, i, 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + here, i, 0)

    return over_pairs(spec, body, total)
