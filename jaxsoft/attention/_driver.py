"""The driver of row reductions over the scores of an attention, `query @ key`, which are never stored.

The scores are visited in blocks of queries and keys, one pair of blocks after another in a single loop. Which pairs
can hold anything is known from the static options (causal, window): the others are not on the list. Masks known at
run time (lengths, segments, a predicate, an array) are looked at block by block: a pair without a visible entry is
skipped, one without a hidden entry is computed without a mask. The derivative is that of `rows._driver`: one more
loop over the pairs, linear in the tangents, checkpointed, which JAX transposes.

Shapes: B batch, K heads of the keys, G queries' heads for each of them, T queries, S keys; blocks of `bq` queries
and `bk` keys. A block of queries has R = G * bq rows for each key head; rows are `[nq, B, K, R]` arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jaxsoft._numerics import accumulation_dtype
from jaxsoft.kernels import _choice
from jaxsoft.kernels._choice import Kernel
from jaxsoft.rows._driver import align_varying, combine, partition, shares
from jaxsoft.rows._logits import capped
from jaxsoft.rows._reduction import Tile


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about an attention: sizes, blocks and masks.

    Attributes:
      batch: B.
      heads: K.
      groups: G.
      queries: T.
      keys: S.
      bq: queries in a block.
      bk: keys in a block.
      causal: whether a query sees no later key.
      window: how many positions to the left and right of a query it sees; None for all, on either side.
      offset: the position of the first query, or None if positions are known at run time only.
      key_offset: the position of the first key.
      mask_fn: the user's predicate, or None.
      softcap: as in `linear_logits`, or None.
      precision: of the matrix products.
      implementation: what the user asked for.
    """

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    bq: int
    bk: int
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    offset: int | None = 0
    key_offset: int = 0
    mask_fn: Callable | None = None
    softcap: float | None = None
    precision: Any = None
    implementation: str | None = None

    @property
    def nq(self) -> int:
        """The number of blocks of queries."""
        return -(-self.queries // self.bq)

    @property
    def nk(self) -> int:
        """The number of blocks of keys."""
        return -(-self.keys // self.bk)

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of the rows."""
        return (self.nq, self.batch, self.heads, self.groups * self.bq)

    def band(self) -> tuple[int | None, int | None]:
        """The visible keys of a query at position p lie in `[p - left, p + right]`; None is no bound."""
        left, right = self.window
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    def live(self, i, j) -> Any:
        """Whether the static masks leave something of the pairs (i, j) of blocks; True where there are none."""
        if self.offset is None:
            return True
        (left, right), shift = self.band(), self.offset - self.key_offset
        first_q, first_k = i * self.bq + shift, j * self.bk
        live = True
        if left is not None:
            live &= (first_k + self.bk - 1 >= first_q - left) & (self.keys - 1 >= first_q - left)
        if right is not None:
            live &= (first_k <= first_q + self.bq - 1 + right) & (first_k <= self.queries - 1 + shift + right)
        return live

    def pairs(self) -> np.ndarray:
        """`[pairs, 3]`: block of queries, block of keys, whether the static masks hide something in the pair."""
        left, right = self.band() if self.offset is not None else (None, None)
        i, j = np.meshgrid(np.arange(self.nq), np.arange(self.nk), indexing="ij")
        shift = (self.offset or 0) - self.key_offset
        last_q = np.minimum((i + 1) * self.bq, self.queries) - 1 + shift
        last_k = np.minimum((j + 1) * self.bk, self.keys) - 1
        live, hidden = np.broadcast_to(self.live(i, j), i.shape), (j + 1) * self.bk > self.keys
        if left is not None:
            hidden |= j * self.bk < last_q - left
        if right is not None:
            hidden |= last_k > i * self.bq + shift + right
        if self.offset is None and self.band() != (None, None):
            hidden |= True
        return np.stack([i[live], j[live], hidden[live]], axis=1).astype(np.int32)


class Masks(NamedTuple):
    """What is known at run time of which entries are visible; None where there is no such mask.

    Attributes:
      query_lengths: `[B]`.
      key_lengths: `[B]`.
      query_segments: `[B, nq * bq]`.
      key_segments: `[B, nk * bk]`.
      entries: `[B or 1, K or 1, G or 1, T or 1, S or 1]`, padded to whole blocks.
      offset: position of the first query, `[]` or `[B]`, where the plan has none.
      key_offset: position of the first key, likewise.
    """

    query_lengths: Any = None
    key_lengths: Any = None
    query_segments: Any = None
    key_segments: Any = None
    entries: Any = None
    offset: Any = None
    key_offset: Any = None


class Operands(NamedTuple):
    """What the scores and values are made of.

    Attributes:
      query: `[nq, B, K, R, H]`.
      key: `[nk, B, K, bk, H]`.
      value: `[nk, B, K, bk, Hv]`.
      scale: multiplies the products: `[nq, B, K, R]`, or None where the queries hold it already.
      bias: `[B or 1, K or 1, G or 1, T or 1, S or 1]`, padded to whole blocks, or None.
      slopes: `[nq, B, K, R]`, times the distance from the query to a key, or None.
    """

    query: Any
    key: Any
    value: Any
    scale: Any = None
    bias: Any = None
    slopes: Any = None


# --- one pair of blocks --------------------------------------------------------------------------------------


def _positions(plan: Plan, masks: Masks, i, j) -> tuple[Array, Array]:
    """The positions of the queries of a block and of the keys, `[bq, 1]` and `[1, bk]`; five axes if one a batch."""
    q = jnp.arange(plan.bq, dtype=jnp.int32)[:, None] + i * plan.bq
    k = jnp.arange(plan.bk, dtype=jnp.int32)[None, :] + j * plan.bk
    if plan.offset is not None:
        return q + plan.offset, k + plan.key_offset

    def moved(x, offset):
        return x + (offset if offset.ndim == 0 else offset[:, None, None, None, None])

    return moved(q, masks.offset), moved(k, masks.key_offset)


def seen_from(plan: Plan, q: Array, k: Array) -> list[Array]:
    """What the masks by position say of queries at positions `q` and keys at `k`: booleans, all of which must hold."""
    left, right = plan.band()
    keeps = []
    if left is not None:
        keeps.append(k >= q - left)
    if right is not None:
        keeps.append(k <= q + right)
    if plan.mask_fn is not None:
        keeps.append(jnp.broadcast_to(plan.mask_fn(q, k), jnp.broadcast_shapes(q.shape, k.shape)))
    return keeps


def visible(plan: Plan, masks: Masks, i, j) -> Array:
    """Which entries of a pair of blocks are visible: five axes that broadcast to `[B, K, G, bq, bk]`."""
    q, k = _positions(plan, masks, i, j)
    keeps = seen_from(plan, q, k)
    if plan.nk * plan.bk > plan.keys:
        keeps.append((jnp.arange(plan.bk, dtype=jnp.int32) + j * plan.bk < plan.keys)[None, :])
    if masks.key_lengths is not None:
        keeps.append(k < masks.key_lengths[:, None, None, None, None])
    if masks.query_lengths is not None:
        row = jnp.arange(plan.bq, dtype=jnp.int32) + i * plan.bq
        keeps.append(row[:, None] < masks.query_lengths[:, None, None, None, None])
    if masks.query_segments is not None:
        qs = lax.dynamic_slice_in_dim(masks.query_segments, i * plan.bq, plan.bq, 1)
        ks = lax.dynamic_slice_in_dim(masks.key_segments, j * plan.bk, plan.bk, 1)
        keeps.append(qs[:, None, None, :, None] == ks[:, None, None, None, :])
    if masks.entries is not None:
        keeps.append(_entries(plan, masks.entries, i, j))
    keep = functools.reduce(jnp.logical_and, keeps, jnp.ones((1, 1), bool))
    return keep.reshape((1,) * (5 - keep.ndim) + keep.shape)


def _entries(plan: Plan, array: Array, i, j) -> Array:
    """The block of an array with the five axes of the scores, of which any may have size 1."""
    for axis, index, size in ((3, i, plan.bq), (4, j, plan.bk)):
        if array.shape[axis] != 1:
            array = lax.dynamic_slice_in_dim(array, index * size, size, axis)
    return array


def as_rows(plan: Plan, block: Array) -> Array:
    """Five axes that broadcast to `[B, K, G, bq, bk]`, as `[B, K, R, bk]`."""
    block = jnp.broadcast_to(block, (plan.batch, plan.heads, plan.groups, plan.bq, plan.bk))
    return block.reshape(plan.batch, plan.heads, -1, plan.bk)


def _scores(plan: Plan, block: Operands, masks: Masks, i, j) -> Array:
    """The scores of a pair of blocks, `[B, K, R, bk]`."""
    dtype = accumulation_dtype(block.query.dtype, block.key.dtype)
    x = _product("bkrh,bksh->bkrs", block.query, block.key, plan.precision, dtype)
    bias = distance = None
    if block.bias is not None:
        bias = as_rows(plan, block.bias)
    if block.slopes is not None:
        q, k = _positions(plan, masks, i, j)
        distance = k - q
        distance = as_rows(plan, distance.reshape((1,) * (5 - distance.ndim) + distance.shape))
    return finished(plan, x, block.scale, bias, block.slopes, distance)


def finished(plan: Plan, x: Array, scale, bias, slopes, distance) -> Array:
    """What follows the product of queries and keys: scale, cap, bias, and slopes times the distance to the key.

    Scale and slopes are `[..., R]`, bias and distance broadcast to the scores; None where there is none.
    """
    if scale is not None:
        x = x * scale[..., None]
    if plan.softcap is not None:
        x = capped(x, plan.softcap)
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


def _cut(operands: Operands, plan: Plan, i, j) -> Operands:
    """The blocks that one pair needs."""

    def at(a, index):
        return None if a is None else lax.dynamic_index_in_dim(a, index, 0, keepdims=False)

    return Operands(
        at(operands.query, i),
        at(operands.key, j),
        at(operands.value, j),
        at(operands.scale, i),
        None if operands.bias is None else _entries(plan, operands.bias, i, j),
        at(operands.slopes, i),
    )


def _tile(plan: Plan, block: Operands, masks: Masks, keep: Array | None, i, j) -> Tile:
    scores = _scores(plan, block, masks, i, j)
    if keep is not None:
        scores = jnp.where(as_rows(plan, keep), scores, -jnp.inf)
    cols = jnp.arange(plan.bk, dtype=jnp.int32) + (j * plan.bk + plan.key_offset)
    if masks.key_offset is not None:
        offset = masks.key_offset
        cols = cols + (offset if offset.ndim == 0 else offset[:, None, None, None])
    values = () if block.value is None else (block.value,)
    columns = plan.keys + plan.key_offset if masks.key_offset is None else jnp.iinfo(jnp.int32).max
    return Tile.of(scores, cols, columns, values)


def _at(tree: Any, i) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree)


def _by_visibility(plan: Plan, masks: Masks, pair: Array, skip: Callable, work: Callable, *operands) -> Any:
    """`skip(*operands)` where a pair has nothing visible, else `work(keep or None, *operands)`."""
    i, j, hidden = pair
    if plan.mask_fn is None and all(m is None for m in masks):
        if not plan.pairs()[:, 2].any():
            return work(None, *operands)

        def masked(*operands):
            return work(visible(plan, masks, i, j), *operands)

        if plan.pairs()[:, 2].all():
            return masked(*operands)
        return lax.cond(hidden == 1, masked, functools.partial(work, None), *operands)
    keep = visible(plan, masks, i, j)
    kind = jnp.where(jnp.all(keep), 1, jnp.where(jnp.any(keep), 2, 0))
    branches = [skip, functools.partial(work, None), functools.partial(work, keep)]
    return lax.switch(kind, branches, *operands)


def count(plan: Plan, operands: Operands, masks: Masks) -> Array:
    """The number of visible keys of every row, without its scores."""
    dtype = accumulation_dtype(operands.query.dtype, operands.key.dtype)
    if masks.entries is None and masks.query_segments is None and plan.mask_fn is None:
        # An interval of keys: its ends are known.
        q = jax.vmap(lambda i: _positions(plan, masks, i, 0)[0])(jnp.arange(plan.nq, dtype=jnp.int32))
        q = q.reshape(plan.nq, *(1,) * (6 - q.ndim), *q.shape[1:])[..., 0]
        zero = plan.key_offset if masks.key_offset is None else masks.key_offset
        zero = jnp.asarray(zero, jnp.int32).reshape(-1, 1, 1, 1)
        left, right = plan.band()
        first = zero if left is None else jnp.maximum(q - left, zero)
        last = zero + plan.keys - 1
        last = last if right is None else jnp.minimum(q + right, last)
        if masks.key_lengths is not None:
            last = jnp.minimum(last, masks.key_lengths[:, None, None, None] - 1)
        n = jnp.maximum(last - first + 1, 0)
        if masks.query_lengths is not None:
            row = jnp.arange(plan.nq * plan.bq, dtype=jnp.int32).reshape(plan.nq, 1, 1, 1, plan.bq)
            n = jnp.where(row < masks.query_lengths[:, None, None, None], n, 0)
        shape = (plan.nq, plan.batch, plan.heads, plan.groups, plan.bq)
        return jnp.broadcast_to(n, shape).reshape(plan.rows).astype(dtype)

    def body(total, pair):
        i, j, _ = pair
        here = jnp.sum(as_rows(plan, visible(plan, masks, i, j)), axis=-1, dtype=dtype)
        old = lax.dynamic_index_in_dim(total, i, 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + here, i, 0), None

    return lax.scan(body, jnp.zeros(plan.rows, dtype), jnp.asarray(plan.pairs()))[0]


# --- all pairs -----------------------------------------------------------------------------------------------


def run(plan: Plan, functions: tuple, operands: Operands, masks: Masks, args: list) -> list:
    """The states of reductions (their arrays apart, `args`) of all rows, leaves `[nq, B, K, R, ...]`."""
    case = functools.partial(_kernel_refusal, plan, functions, operands, masks, args)
    work = attention_work(plan.groups, plan.queries, plan.keys, operands.query)
    kernel = _choice.choose("reductions of the rows of an attention", plan.implementation, work, case)
    return _run(plan, functions, kernel, operands, masks, args)


def attention_work(groups: int, queries: int, keys: int, query: Array) -> _choice.Work:
    """An attention as it is measured: `query` has the features last."""
    return _choice.Work("attention", groups * queries, keys, query.shape[-1], query.dtype.itemsize)


def _kernel_refusal(plan, functions, operands, masks, args, backend, kernel: Kernel) -> str | None:
    """Why a kernel backend cannot run these reductions, or None."""
    from jaxsoft.kernels import _attention

    return _attention.refusal(backend, kernel, plan, functions, operands, masks, args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    plan: Plan, functions: tuple, kernel: Kernel | None, operands: Operands, masks: Masks, args: list
) -> list:
    operands, masks, args = align_varying((operands, masks, args))
    if kernel is not None:
        from jaxsoft.kernels import _attention

        return _attention.run(kernel, plan, functions, operands, masks, args)
    states = _states(plan, functions, *lax.stop_gradient((operands, masks, args)))
    floats, others = partition(states)
    return combine(attach(plan, functions, floats, others, operands, masks, args), others)


def empty_states(plan: Plan, functions: tuple, operands: Operands, args: list) -> list:
    """The states of rows that have seen nothing."""
    dtype = accumulation_dtype(operands.query.dtype, operands.key.dtype)
    like = jnp.zeros_like(operands.query[..., 0], dtype=dtype)
    return [r.init(like, *a) for r, a in zip(functions, args)]


def _states(plan, functions, operands, masks, args):
    def body(states, pair):
        i, j, _ = pair
        block, block_args = _cut(operands, plan, i, j), _at(args, i)

        def work(keep, states):
            tile = _tile(plan, block, masks, keep, i, j)
            return [r.update(s, tile, *a) for r, s, a in zip(functions, states, block_args)]

        def skip(states):
            return states

        new = _by_visibility(plan, masks, pair, skip, work, _at(states, i))
        return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, i, 0), states, new), None

    return lax.scan(body, empty_states(plan, functions, operands, args), jnp.asarray(plan.pairs()))[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def attach(plan, functions, floats, others, operands, masks, args):
    """The float leaves of finished states, as functions of what they were computed from."""
    del plan, functions, others, operands, masks, args
    return floats


def _attach_jvp(plan, functions, primals, tangents):
    floats, others, operands, masks, args = primals
    out = attach(plan, functions, floats, others, operands, masks, args)
    states = combine(lax.stop_gradient(floats), others)
    leaves, treedef = jax.tree.flatten((operands, args))
    dleaves = jax.tree.leaves((tangents[2], tangents[4]))
    active = [k for k, d in enumerate(dleaves) if not isinstance(d, SymbolicZero)]
    zeros = jax.tree.map(jnp.zeros_like, floats)
    if not active:
        return out, zeros
    # Gradients add up over the pairs: in float32 at least.
    dactive = [dleaves[k].astype(jnp.promote_types(leaves[k].dtype, jnp.float32)) for k in active]

    def cut(tree, i, j):
        operands, args = tree
        return _cut(operands, plan, i, j), _at(args, i)

    def pair_tangent(dactive, pair):
        i, j, _ = pair
        block_leaves, block_treedef = jax.tree.flatten(cut((operands, args), i, j))
        given = [None] * len(leaves)
        for k, d in zip(active, dactive):
            given[k] = d
        tangent_tree = jax.tree.unflatten(treedef, given)
        block_tangents = jax.tree.leaves(cut(tangent_tree, i, j))
        primals = [block_leaves[k] for k in active]
        state = _at(states, i)

        def sums(keep, active_leaves):
            all_leaves = list(block_leaves)
            for k, leaf in zip(active, active_leaves):
                all_leaves[k] = leaf
            block, block_args = jax.tree.unflatten(block_treedef, all_leaves)
            tile = _tile(plan, block, masks, keep, i, j)
            return [
                jax.tree.unflatten(jax.tree.structure(partition(s)[0]), shares(r, s, tile, *a))
                for r, s, a in zip(functions, state, block_args)
            ]

        def work(keep, block_tangents):
            cast = [d.astype(p.dtype) for d, p in zip(block_tangents, primals)]
            return jax.jvp(functools.partial(sums, keep), (primals,), (cast,))[1]

        def skip(block_tangents):
            return _at(zeros, 0)

        return _by_visibility(plan, masks, pair, skip, work, block_tangents)

    def body(total, pair):
        part = jax.checkpoint(pair_tangent, prevent_cse=False)(dactive, pair)
        i = pair[0]

        def add(t, p):
            old = lax.dynamic_index_in_dim(t, i, 0, keepdims=False)
            return lax.dynamic_update_index_in_dim(t, old + p, i, 0)

        return jax.tree.map(add, total, part), None

    return out, lax.scan(body, zeros, jnp.asarray(plan.pairs()))[0]


attach.defjvp(_attach_jvp, symbolic_zeros=True)
