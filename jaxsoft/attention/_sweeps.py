"""Passes over attention scores as sweeps, which every kernel backend can run.

There is one matrix of scores per batch element and key head; query heads that share keys are rows of one block. The
forward pass is one sweep over the keys, which carries the states (for a normalizer: its statistics and the weighted
sums of the values). The backward pass is two sweeps. The one over the keys carries the gradients of the queries and of
the other per-row arrays, and writes the gradient of a bias; the one over the queries carries the gradients of keys and
values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._trees import partition, pull
from jaxsoft.attention import _pass
from jaxsoft.attention._pass import finish
from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility
from jaxsoft.attention._visibility import hides_keys, is_of_keys, seen_from, shown_keys, without_hidden_keys
from jaxsoft.kernels.inner import (
    Block,
    Kernel,
    Operands,
    Out,
    Plan,
    Scores,
    Tiles,
    attach,
    objection,
    plain,
)
from jaxsoft.rows import Tile
from jaxsoft.rows.inner import block_sums


def refusal(
    backend, kernel: Kernel, spec: AttentionSpec, functions, inputs: Inputs, masks: Visibility, args
) -> str | None:
    """Why a backend cannot run these reductions; None if it can."""
    if not (spec.batch and spec.queries and spec.keys):
        return "there is nothing to read"
    wrong = objection((inputs, args), kernel.interpret)
    return wrong or backend.refusal(kernel, *_forward(spec, functions, inputs, masks, args))


def run(kernel: Kernel, spec: AttentionSpec, functions, inputs: Inputs, masks: Visibility, args) -> list:
    """The states of reductions for all rows, with derivatives attached; leaves are `[nq, B, K, R, ...]`."""
    states = finished_states(kernel, spec, functions, *lax.stop_gradient((inputs, masks, args)))
    rule, pull = functools.partial(tangents, spec, functions), None
    if runs_backward(kernel, spec, functions, states, inputs, masks, args):
        pull = functools.partial(pull_back, kernel, spec, functions)
    return attach(rule, pull, states, masks, (inputs, args))


def tangents(spec: AttentionSpec, functions, states, masks: Visibility, operands, given) -> list:
    """The rule of the XLA pass, for keys that kernels clear in their tiles."""
    operands, given = ((without_hidden_keys(spec, i, masks), args) for i, args in (operands, given))
    return _pass.tangents(spec, functions, states, masks, operands, given)


def runs_backward(kernel: Kernel, spec: AttentionSpec, functions, states, inputs, masks, args) -> bool:
    """Whether the kernel can run the backward pass as well."""
    case = _backward(spec, functions, states, partition(states)[0], inputs, masks, args)
    return all(kernel.backend().refusal(kernel, *sweep) is None for sweep in case)


# --- between blocks and matrices -------------------------------------------------------------------------------


def _by_matrix(spec: AttentionSpec, rows: Array) -> Array:
    """`[nq, B, K, R, ...]` (or keys, `[nk, B, K, bk, ...]`) as `[B * K, nq * R, ...]`."""
    moved = jnp.moveaxis(rows, 0, 2)
    return moved.reshape(spec.batch * spec.heads, -1, *rows.shape[4:])


def _side_by_side(spec: AttentionSpec, rows: Array) -> Array:
    """`[nq or nk, B, K, ..., H]` as `[B, rows, K, H]`: the layout of the user, which the compiler does not copy."""
    moved = jnp.moveaxis(rows, (0, 2), (1, -2))
    return moved.reshape(spec.batch, -1, spec.heads, rows.shape[-1])


def _by_block(spec: AttentionSpec, rows: Array, blocks: int) -> Array:
    """The inverse of `_by_matrix`."""
    shape = (spec.batch, spec.heads, blocks, rows.shape[1] // blocks, *rows.shape[2:])
    return jnp.moveaxis(rows.reshape(shape), 2, 0)


def _five_axes(spec: AttentionSpec, array: Array) -> Array:
    """`[B or 1, K or 1, G or 1, T or 1, S or 1]` as `[B * K or 1, nq * R, nk * bk]`, broadcast where needed."""
    if array.shape[:2] != (1, 1):
        array = jnp.broadcast_to(array, (spec.batch, spec.heads, *array.shape[2:]))
    array = jnp.broadcast_to(array, (*array.shape[:2], spec.groups, spec.nq * spec.bq, spec.nk * spec.bk))
    array = array.reshape(-1, spec.groups, spec.nq, spec.bq, spec.nk * spec.bk)
    return jnp.moveaxis(array, 1, 2).reshape(array.shape[0], -1, spec.nk * spec.bk)


def _gather_five_axes(spec: AttentionSpec, d: Array, like: Array) -> Array:
    """The transpose of `_five_axes`: sums over the axes that were broadcast."""
    return jax.linear_transpose(
        functools.partial(_five_axes, spec), jax.ShapeDtypeStruct(like.shape, d.dtype)
    )(d)[0]


def _positions(spec: AttentionSpec, masks: Visibility) -> tuple[Array, Array]:
    """The positions of queries and of keys, `[B * K or 1, nq * R]` and `[B * K or 1, nk * bk]`."""
    if spec.offset is not None:
        return _query_index(spec) + spec.offset, _columns(spec, masks)
    q, k = masks.query_positions, masks.key_positions
    q = _moved(spec, _query_index(spec), masks.offset) if q is None else _by_head(spec, _each_group(spec, q))
    k = _columns(spec, masks) if k is None else _by_head(spec, k)
    return q, k


def _columns(spec: AttentionSpec, masks: Visibility) -> Array:
    """The columns of the keys in whole rows of scores, `[B * K or 1, nk * bk]`."""
    k = jnp.arange(spec.nk * spec.bk, dtype=jnp.int32)[None]
    return k + spec.key_offset if spec.offset is not None else _moved(spec, k, masks.key_offset)


def _moved(spec: AttentionSpec, x: Array, offset: Array) -> Array:
    return x + (offset if offset.ndim == 0 else jnp.repeat(offset, spec.heads)[:, None])


def _by_head(spec: AttentionSpec, per_batch: Array) -> Array:
    """`[B or 1, ...]` as `[B * K or 1, ...]`."""
    return per_batch if len(per_batch) == 1 else _each_head(spec, per_batch)


def _each_group(spec: AttentionSpec, queries: Array) -> Array:
    """`[B or 1, nq * bq]` as one number per row, `[B or 1, nq * R]`."""
    blocks = queries.reshape(len(queries), spec.nq, 1, spec.bq)
    return jnp.broadcast_to(blocks, (len(queries), spec.nq, spec.groups, spec.bq)).reshape(len(queries), -1)


def _query_index(spec: AttentionSpec) -> Array:
    """The index of the query that each row belongs to, `[1, nq * R]`."""
    within = jnp.tile(jnp.arange(spec.bq, dtype=jnp.int32), spec.groups)
    return (jnp.arange(spec.nq, dtype=jnp.int32)[:, None] * spec.bq + within).reshape(1, -1)


def _each_head(spec: AttentionSpec, per_batch: Array) -> Array:
    return jnp.repeat(per_batch, spec.heads, axis=0)


# --- inputs of a tile ------------------------------------------------------------------------------------------


def _scores(spec: AttentionSpec, inputs: Inputs) -> Scores:
    common = jnp.promote_types(inputs.query.dtype, inputs.key.dtype)
    query = inputs.query.reshape(*spec.rows[:3], spec.groups, spec.bq, -1)
    query, key = (_side_by_side(spec, a.astype(common)) for a in (query, inputs.key))
    return Scores(None, query, key, True, spec.precision)


def _operands(spec: AttentionSpec, inputs: Inputs, masks: Visibility, args) -> Operands:
    """The arrays that a tile needs besides its scores: booleans as int32 or int8, per-row floats as float32."""
    q, k = _positions(spec, masks)
    beyond = spec.nk * spec.bk > spec.keys
    seen_by_column = [jnp.arange(spec.nk * spec.bk)[None] < spec.keys] if beyond else []
    if hides_keys(masks):
        shown = shown_keys(spec, masks)
        seen_by_column.append(_by_head(spec, shown))
    positioned = spec.band() != (None, None) or spec.mask_fn is not None or inputs.slopes is not None
    dynamic = spec.offset is None

    def rows(a):
        return None if a is None else plain(_by_matrix(spec, a))

    by_row = {
        "position": q if positioned else None,
        "keep": None,
        "segment": None,
        "scale": rows(inputs.scale),
        "slopes": rows(inputs.slopes),
        "args": [jax.tree.map(rows, a) for a in args],
    }
    by_column = {
        "position": k if positioned or dynamic else None,
        "column": None if masks.key_positions is None else _columns(spec, masks),
        "keep": None,
        "segment": None,
        "value": None if inputs.value is None else _side_by_side(spec, inputs.value),
    }
    if seen_by_column:
        by_column["keep"] = functools.reduce(jnp.logical_and, seen_by_column).astype(jnp.int32)
    if masks.query_lengths is not None:
        row = _query_index(spec) if masks.query_positions is None else q
        seen = row < _each_head(spec, masks.query_lengths)[:, None]
        by_row["keep"] = seen.astype(jnp.int32)
    if masks.query_segments is not None:
        by_row["segment"] = _each_head(spec, _each_group(spec, masks.query_segments))
        by_column["segment"] = _each_head(spec, masks.key_segments)
    entries = None if is_of_keys(masks.entries) else masks.entries
    by_entry = {
        "keep": None if entries is None else _five_axes(spec, entries.astype(jnp.int8)),
        "bias": None if inputs.bias is None else _five_axes(spec, inputs.bias),
    }
    return Operands(by_row, by_column, by_entry, seen=_seen(spec, by_row, by_column, masks))


def _tile(
    spec: AttentionSpec, masks: Visibility, block: Block, raw: Array, rows: dict, cols: dict, entries: dict
) -> Tile:
    """The `Tile` that the reductions take: scores of visible entries, -inf for hidden ones, and values."""
    q: Any = None if rows["position"] is None else rows["position"][:, None]
    k: Any = None if cols["position"] is None else cols["position"][None, :]
    distance = None if rows["slopes"] is None else k - q
    bias = entries["bias"]
    if block.inside is not None:  # the backend's tile may be larger than the caller's blocks
        raw = jnp.where(block.inside, raw, 0)
        bias = None if bias is None else jnp.where(block.inside, bias, 0)
    if hides_keys(masks):  # they may hold NaN
        raw = jnp.where(cols["keep"][None, :] != 0, raw, 0)
    x = finish(spec, raw, rows["scale"], bias, rows["slopes"], distance)
    keeps = seen_from(spec, q, k)
    if rows["keep"] is not None:
        keeps.append(rows["keep"][:, None] != 0)
    if cols["keep"] is not None:
        keeps.append(cols["keep"][None, :] != 0)
    if rows["segment"] is not None:
        keeps.append(rows["segment"][:, None] == cols["segment"][None, :])
    if entries["keep"] is not None:
        keeps.append(entries["keep"] != 0)
    if block.inside is not None:
        keeps.append(block.inside)
    keep = functools.reduce(jnp.logical_and, keeps) if keeps else jnp.ones(x.shape, bool)
    scores = jnp.where(keep, x, -jnp.inf)
    column = k if cols["column"] is None else cols["column"][None, :]
    at = block.col + spec.key_offset if column is None else jnp.broadcast_to(column, x.shape)
    columns = spec.keys + spec.key_offset if spec.offset is not None else jnp.iinfo(jnp.int32).max
    values = () if cols["value"] is None else (cols["value"],)
    tile = Tile.of(scores, at, columns, values, (), None, True)
    # Only a bias makes a score -inf. Without one, where nothing is masked, there is nothing to test or select.
    return tile if bias is not None else tile._replace(keep=keep, x=jnp.where(keep, x, 0))


def _shown(masks: Visibility, cols: dict, keys: Any) -> Any:
    """Keys or values of a tile, `[bc, H]`, with zeros where they are hidden: a NaN there would spread in a product."""
    return keys if keys is None or not hides_keys(masks) else jnp.where(cols["keep"][:, None] != 0, keys, 0)


def _live(spec: AttentionSpec) -> Callable | None:
    """Predicate: whether the static masks leave a visible entry in a pair of blocks; None if they rule out no pair."""
    if spec.offset is None or spec.band() == (None, None):
        return None
    return lambda i, j, rows, columns: spec.live(i, j)


def _seen(spec: AttentionSpec, rows: dict, cols: dict, masks: Visibility) -> Array | None:
    """`[B or 1, nq, nk]`: False for pairs of blocks that masks known at run time hide in all heads; None without such.

    For positions and segments, only the smallest and largest value per block are compared. This is exact if they are
    sorted, and never False for a pair with a visible entry.
    """
    nothing = jnp.iinfo(jnp.int32).max

    def ends(a: Array, keep: Any, blocks: int) -> tuple[Array, Array]:
        """Smallest and largest kept value per block, `[B * K or 1, blocks, 1]`; smallest > largest if none is kept."""
        keep = jnp.ones(a.shape, bool) if keep is None else jnp.broadcast_to(keep != 0, a.shape)
        a, keep = (x.reshape(x.shape[0], blocks, -1) for x in (a, keep))
        return (
            jnp.min(jnp.where(keep, a, nothing), axis=-1)[:, :, None],
            jnp.max(jnp.where(keep, a, -nothing), axis=-1)[:, :, None],
        )

    def meet(name: str, left: int | None, right: int | None) -> Array:
        """Whether some key of a key block can lie in `[query - left, query + right]` for a query of a query block."""
        (q_low, q_high), (k_low, k_high) = (
            ends(jnp.broadcast_to(part[name], _common(part[name], part["keep"])), part["keep"], blocks)
            for part, blocks in ((rows, spec.nq), (cols, spec.nk))
        )
        k_low, k_high = jnp.swapaxes(k_low, 1, 2), jnp.swapaxes(k_high, 1, 2)
        some = (q_low <= q_high) & (k_low <= k_high)
        if left is not None:
            some &= k_high >= q_low - left
        if right is not None:
            some &= k_low <= q_high + right
        return some

    found = []
    if spec.offset is None or rows["keep"] is not None or masks.key_lengths is not None:
        given = [{**part, "position": at} for part, at in zip((rows, cols), _positions(spec, masks))]
        rows, cols = given
        found.append(meet("position", *spec.band()))
    if rows["segment"] is not None:
        found.append(meet("segment", 0, 0))
    if masks.entries is not None:
        kept = _five_axes(spec, masks.entries)
        found.append(
            jnp.any(kept.reshape(-1, spec.nq, kept.shape[1] // spec.nq, spec.nk, spec.bk), axis=(2, 4))
        )
    if spec.mask_fn is not None and spec.offset is not None:
        q, k = _positions(spec, masks)
        kept = jnp.broadcast_to(spec.mask_fn(q[0][:, None], k[0][None, :]), (q.shape[1], k.shape[1]))
        found.append(jnp.any(kept.reshape(1, spec.nq, -1, spec.nk, spec.bk), axis=(2, 4)))
    if not found:
        return None
    seen = functools.reduce(jnp.logical_and, found)
    return jnp.any(seen.reshape(-1, spec.heads, spec.nq, spec.nk), axis=1) if len(seen) > 1 else seen


def _common(a: Array, keep: Any) -> Any:
    return a.shape if keep is None else jnp.broadcast_shapes(a.shape, keep.shape)


def _tiles(spec: AttentionSpec) -> Tiles:
    return Tiles(spec.groups * spec.bq, spec.bk)


# --- the forward pass --------------------------------------------------------------------------------------------


def _forward(spec: AttentionSpec, functions, inputs: Inputs, masks: Visibility, args) -> tuple:
    """The arguments of the sweep that carries the states."""

    def init(rows, like):
        return [r.init(like, *a) for r, a in zip(functions, rows["args"])]

    def body(block: Block, states) -> Out:
        cols = {**block.cols, "value": _shown(masks, block.cols, block.cols["value"])}
        tile = _tile(spec, masks, block, block.raw, block.rows, cols, block.entries)
        return Out(carry=[r.update(s, tile, *a) for r, s, a in zip(functions, states, block.rows["args"])])

    sweep = Plan(live=_live(spec), tiles=_tiles(spec))
    return body, _scores(spec, inputs), _operands(spec, inputs, masks, args), init, sweep


def finished_states(kernel: Kernel, spec: AttentionSpec, functions, inputs, masks, args) -> list:
    """The finished states, without derivatives."""
    result = kernel.backend().sweep(kernel, *_forward(spec, functions, inputs, masks, args))
    rows = jax.tree.map(lambda a: [_by_block(spec, part, spec.nq) for part in a], result.carry)
    each = jax.tree.transpose(jax.tree.structure(result.carry), None, rows)

    def join(a, b):
        return [r.merge(x, y, *p) for r, x, y, p in zip(functions, a, b, args)]

    return functools.reduce(join, each)


# --- the backward pass -------------------------------------------------------------------------------------------


def _backward(spec: AttentionSpec, functions, states, cotangents, inputs, masks, args) -> tuple:
    """The arguments of two sweeps: for gradients of per-row arrays and bias, and for those of keys and values."""
    scores, beside = _scores(spec, inputs), _operands(spec, inputs, masks, args)
    by_matrix = functools.partial(_by_matrix, spec)
    beside.rows.update(jax.tree.map(by_matrix, {"states": states, "cotangents": cotangents}))
    dtype = scores.dtype

    def pulled(block: Block, *names: str, shown: Callable = lambda cols, keys: keys) -> tuple[Array, dict]:
        """The cotangents of the raw scores and of the named inputs; values are read through `shown`."""

        def sums(raw, given):
            rows, cols, entries = (
                {**part, **{n: given[n] for n in given if n in part}}
                for part in (block.rows, block.cols, block.entries)
            )
            cols["value"] = shown(cols, cols["value"])
            tile = _tile(spec, masks, block, raw, rows, cols, entries)
            return block_sums(functions, rows["states"], [tile] * len(functions), rows["args"])

        everything = {**block.rows, **block.cols, **block.entries}
        given = {name: everything[name] for name in names}
        return pull(sums, (block.raw, given), block.rows["cotangents"])

    of_rows = ("scale", "slopes", "args")

    def init_rows(rows, like):
        floats = partition({name: rows[name] for name in of_rows})[0]
        width = scores.left.shape[-1]
        return jnp.broadcast_to(like[:, None], (*like.shape, width)), jax.tree.map(jnp.zeros_like, floats)

    def along_keys(block: Block, carry) -> Out:
        shown = functools.partial(_shown, masks)
        d_raw, d = pulled(block, *of_rows, "bias", shown=shown)
        right = shown(block.cols, block.right)
        d_query = _product(d_raw.astype(dtype), right, ((1,), (0,)), spec)
        d_rows = {name: d[name] for name in of_rows}
        return Out((carry[0] + d_query, jax.tree.map(jnp.add, carry[1], d_rows)), d["bias"])

    def init_columns(cols, like):
        widths = (scores.left.shape[-1], None if cols["value"] is None else cols["value"].shape[-1])
        return tuple(None if w is None else jnp.broadcast_to(like[:, None], (*like.shape, w)) for w in widths)

    def along_queries(block: Block, carry) -> Out:
        d_raw, d = pulled(block, "value")  # NaN of hidden values stays in their own columns, which are masked
        d_key = _product(d_raw.astype(dtype), block.left, ((0,), (0,)), spec)
        d_value = None if carry[1] is None else carry[1] + d["value"].astype(jnp.float32)
        return Out((carry[0] + d_key, d_value))

    live, tiles = _live(spec), _tiles(spec)
    dtypes = () if inputs.bias is None else (inputs.bias.dtype,)
    return (
        (along_keys, scores, beside, init_rows, Plan(entry_dtypes=dtypes, live=live, tiles=tiles)),
        (along_queries, scores, beside, init_columns, Plan(over="rows", live=live, tiles=tiles)),
    )


def _product(a: Array, b: Array, axes: tuple, spec: AttentionSpec) -> Array:
    return lax.dot_general(
        a, b, (axes, ((), ())), precision=spec.precision, preferred_element_type=jnp.float32
    )


def pull_back(kernel, spec, functions, states, masks, operands, cotangents) -> tuple:
    """The cotangents of inputs and args, given those of the states' float leaves."""
    inputs, args = operands
    case = _backward(spec, functions, states, cotangents, inputs, masks, args)
    by_query, by_key = (kernel.backend().sweep(kernel, *sweep) for sweep in case)
    d_query, d_rows = jax.tree.map(lambda a: _by_block(spec, jnp.sum(a, axis=0), spec.nq), by_query.carry)
    d_key, d_value = jax.tree.map(lambda a: _by_block(spec, a[0], spec.nk), by_key.carry)
    d_bias = None if inputs.bias is None else _gather_five_axes(spec, by_query.entries, inputs.bias)
    d_inputs = Inputs(d_query, d_key, d_value, d_rows["scale"], d_bias, d_rows["slopes"])
    wanted = partition((inputs, args))[0]
    return jax.tree.map(lambda a, d: d.astype(a.dtype), wanted, (d_inputs, d_rows["args"]))
