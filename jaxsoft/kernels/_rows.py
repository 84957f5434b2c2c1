"""Row reductions over dense rows and over `hidden @ weight`, as sweeps: what every kernel backend shares.

The forward pass is one sweep that carries the reductions' states. The backward pass sweeps once more: `jax.vjp` of the
reductions' shares of a tile gives the gradient of its scores, which is written, and with it the sums for all that
varies over rows (carried) or columns (left for each block of rows). A product's scores are swept a stretch of columns
at a time, so that only the gradient of a stretch is ever stored; two matrix products turn it into those of hidden and
weight.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft.kernels._choice import Kernel
from jaxsoft.kernels._sweep import Block, Operands, Out, Plan, Scores
from jaxsoft.kernels._trace import objection, plain
from jaxsoft.rows import _driver
from jaxsoft.rows._driver import Arrays, Masks
from jaxsoft.rows._logits import LinearLogits, cut
from jaxsoft.rows._reduction import Tile

# A stretch of columns has so many scores at most, whose gradients are stored: 128 MiB in bfloat16.
_STRETCH = 2**26
_NARROWEST_STRETCH = 1024
# Numbers a row of a state, on which a kernel works one by one (for the k best: k rounds of k steps).
_WIDEST_STATE = 32


def refusal(backend, kernel: Kernel, functions, source, masks: Masks, arrays: list[Arrays]) -> str | None:
    """Why a backend cannot run these reductions, or None."""
    n, columns = source.shape
    if n == 0 or columns == 0:
        return "there is nothing to read"
    if any(isinstance(e, LinearLogits) for a in arrays for e in a.entry_args):
        return "two expressions are read at a time"
    if (wrong := objection((source, arrays))) is not None:
        return wrong
    for r, a in zip(functions, arrays):
        like = jax.ShapeDtypeStruct((n,), jnp.float32)
        for state in jax.tree.leaves(jax.eval_shape(r.init, like, *a.args)):
            if state.shape[:1] != (n,) or state.ndim > 2:
                return f"a state of shape {state.shape} is not one number or a few a row"
            if state.ndim == 2 and state.shape[1] > _WIDEST_STATE:
                return (
                    f"a state has at most {_WIDEST_STATE} numbers a row, and {state.shape[1]} were asked for"
                )
    return backend.refusal(kernel, *_forward(functions, source, masks, arrays))


def stream(kernel: Kernel, functions, block: int, source, masks: Masks, arrays: list[Arrays]) -> list:
    """The finished states of the reductions, with their derivatives attached."""
    states = finished_states(kernel, functions, *jax.lax.stop_gradient((source, masks, arrays)))
    floats, others = _driver.partition(states)
    backward = functools.partial(_backward, functions, states, floats, source, masks, arrays)
    # What reads a stored product takes its gradient by itself.
    stored = isinstance(source, LinearLogits) and _stored(source) is not None
    if stored or kernel.backend().refusal(kernel, *backward()) is not None:
        return _driver.attach(functions, block, states, source, masks, arrays)
    return _driver.combine(_attach(kernel, functions, floats, others, source, masks, arrays), others)


# --- what a tile reads ---------------------------------------------------------------------------------------


def _scores(source, start=0, size: int | None = None) -> Scores:
    stored = _stored(source)
    if stored is not None:
        return Scores(values=stored[None])
    size = source.shape[-1] if size is None else size
    weight = cut(source.weight, start, size, 0 if source.transpose_weight else 1)
    left, right = (a.astype(source.dtype)[None] for a in (source.hidden, weight))
    return Scores(None, left, right, source.transpose_weight, source.precision)


def _stored(source) -> Array | None:
    """The scores, or the product that they are made of, if it is stored; None for a product that is not."""
    return getattr(source, "raw" if isinstance(source, LinearLogits) else "values", None)


def _operands(source, masks: Masks, arrays: list[Arrays], start=0, size: int | None = None) -> Operands:
    """The arrays beside the scores, for `size` columns from `start` on; no booleans, and floats of sums in float32."""
    n, columns = source.shape
    size = columns if size is None else size
    linear = isinstance(source, LinearLogits)

    def by_row(a):
        return None if a is None else plain(jnp.broadcast_to(a, (n, *a.shape[1:])))[None]

    def by_column(a):
        return None if a is None else plain(cut(a, start, size, 0))[None]

    def by_entry(a):
        if a is None:
            return None
        a = cut(a, start, size, 1)  # as large as the scores: in as few bytes as it came
        return (a.astype(jnp.int8) if a.dtype == jnp.bool_ else a)[None]

    rows = {
        "keep": by_row(masks.rows),
        "scale": by_row(source.scale) if linear else None,
        "temperature": by_row(source.temperature) if linear else None,
        "args": [jax.tree.map(by_row, a.args) for a in arrays],
    }
    cols = {
        "keep": by_column(masks.cols),
        "bias": by_column(source.bias) if linear else None,
        "args": [tuple(map(by_column, a.col_args)) for a in arrays],
    }
    entries = {
        "keep": by_entry(masks.entries),
        "args": [tuple(map(by_entry, a.entry_args)) for a in arrays],
    }
    return Operands(rows, cols, entries, jnp.asarray(start, jnp.int32))


def _tiles(template, columns: int, block: Block, raw, rows: dict, cols: dict, entries: dict) -> list[Tile]:
    """A tile as each reduction sees it. `template` is the expression without its arrays, or None for stored scores."""

    def clean(a: Any) -> Any:
        return a if a is None or block.inside is None else jnp.where(block.inside, a, 0)

    entries = jax.tree.map(clean, entries)
    keeps = Masks(*(None if part["keep"] is None else part["keep"] != 0 for part in (rows, cols, entries)))
    x: Any = clean(raw)
    if keeps.cols is not None:  # a column nobody reads may hold NaN
        x = jnp.where(keeps.cols, x, 0)
    if template is not None:
        changed = dataclasses.replace(template, scale=rows["scale"], temperature=rows["temperature"])
        x = changed._finish(x, cols["bias"])
    x = _driver.masked(x, keeps)
    if block.inside is not None:
        x = jnp.where(block.inside, x, -jnp.inf)
    return [Tile.of(x, block.col, columns, c, e, True) for c, e in zip(cols["args"], entries["args"])]


def _template(source) -> LinearLogits | None:
    if not isinstance(source, LinearLogits):
        return None
    nothing = jax.tree.map(lambda _: None, source)
    return dataclasses.replace(nothing, softcap=source.softcap)


# --- the forward pass ----------------------------------------------------------------------------------------


def _forward(functions, source, masks: Masks, arrays: list[Arrays]) -> tuple:
    """The sweep that carries the states: `(body, scores, operands, init, plan)`."""
    template, columns = _template(source), source.shape[-1]

    def init(rows, like):
        return [r.init(like, *a) for r, a in zip(functions, rows["args"])]

    def body(block: Block, states) -> Out:
        tiles = _tiles(template, columns, block, block.raw, block.rows, block.cols, block.entries)
        updates = zip(functions, states, tiles, block.rows["args"])
        return Out(carry=[r.update(s, tile, *a) for r, s, tile, a in updates])

    # A row nobody reads is emptied at the end.
    operands = _operands(source, masks._replace(rows=None), arrays)
    return body, _scores(source), operands, init, Plan()


def finished_states(kernel: Kernel, functions, source, masks: Masks, arrays: list[Arrays]) -> list:
    """The finished states; nothing here is differentiated."""
    body, scores, operands, init, plan = _forward(functions, source, masks, arrays)
    result = kernel.backend().sweep(kernel, body, scores, operands, init, plan)
    parts = jax.tree.map(lambda a: list(a[:, 0]), result.carry)
    each = jax.tree.transpose(jax.tree.structure(result.carry), None, parts)

    def join(a, b):
        return [r.merge(x, y, *args.args) for r, x, y, args in zip(functions, a, b, arrays)]

    states = functools.reduce(join, each)
    if masks.rows is None:
        return states
    empty = [r.init(source._like(), *a.args) for r, a in zip(functions, arrays)]
    keep = masks.rows

    def select(state, empty):
        return jnp.where(jnp.expand_dims(keep, tuple(range(1, state.ndim))), state, empty)

    return jax.tree.map(select, states, empty)


# --- the backward pass ---------------------------------------------------------------------------------------


class _Cotangents(NamedTuple):
    """Of what a stretch of columns is made of; None where something is no float.

    Attributes:
      raw: of the scores before anything elementwise, `[n, size]`.
      rows: `scale`, `temperature` and `args`, leaves `[n, ...]`.
      cols: `bias` and `args`, leaves `[size, ...]`.
      entries: of the `entry_args`, leaves `[n, size]`.
    """

    raw: Any
    rows: dict
    cols: dict
    entries: list


def _backward(functions, states, cotangents, source, masks, arrays, start=0, size=None) -> tuple:
    """The sweep that pulls cotangents of the states' float leaves back: `(body, scores, operands, init, plan)`."""
    template, columns = _template(source), source.shape[-1]
    operands = _operands(source, masks, arrays, start, size)
    operands.rows.update(jax.tree.map(lambda a: a[None], {"states": states, "cotangents": cotangents}))

    def init(rows, like):
        del like
        return jax.tree.map(jnp.zeros_like, _driver.differentiable(_made_of(rows))[0])

    def body(block: Block, carry) -> Out:
        def sums(raw, rows, cols, entries):
            rows, cols, entries = {**block.rows, **rows}, {**block.cols, **cols}, {**block.entries, **entries}
            tiles = _tiles(template, columns, block, raw, rows, cols, entries)
            args = [Arrays(a, (), ()) for a in rows["args"]]
            return _driver.block_sums(functions, rows["states"], tiles, args)

        operands = (block.raw, *map(_made_of, (block.rows, block.cols, block.entries)))
        d = _Cotangents(*_driver.pull(sums, operands, block.rows["cotangents"]))
        return Out(jax.tree.map(jnp.add, carry, d.rows), (d.raw, d.entries), d.cols)

    dtypes = [_scores(source).dtype, *(e.dtype for a in arrays for e in a.entry_args if _driver.is_float(e))]
    return body, _scores(source, start, size), operands, init, Plan(entry_dtypes=tuple(dtypes))


def _made_of(operands: dict) -> dict:
    """What has a gradient, of the operands of one kind."""
    return {name: a for name, a in operands.items() if name in ("scale", "temperature", "bias", "args")}


def _cotangents(kernel: Kernel, *case) -> _Cotangents:
    """What `_backward` finds for a stretch of columns."""
    result = kernel.backend().sweep(kernel, *_backward(*case))
    raw, entries = jax.tree.map(lambda a: a[0], result.entries)
    rows = jax.tree.map(lambda a: jnp.sum(a, axis=(0, 1)), result.carry)
    cols = jax.tree.map(lambda a: jnp.sum(a, axis=(0, 1)), result.cols)
    return _Cotangents(raw, rows, cols, entries["args"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attach(kernel, functions, floats, others, source, masks, arrays):
    """The float leaves of finished states, as functions of what they were computed from."""
    del kernel, functions, others, source, masks, arrays
    return floats


def _attach_forward(kernel, functions, *operands):
    floats, *_ = operands
    return floats, operands


def _attach_backward(kernel, functions, residuals, cotangents):
    (floats, others, source, masks, arrays), cotangents = first_order_only((residuals, cotangents))
    case = (functions, _driver.combine(floats, others), cotangents, source, masks, arrays)
    if isinstance(source, LinearLogits):
        d_source, d_arrays = _linear_cotangents(kernel, *case)
    else:
        d = _cotangents(kernel, *case)
        d_source = dataclasses.replace(source, values=d.raw)
        d_arrays = [Arrays(*a) for a in zip(d.rows["args"], d.cols["args"], d.entries)]
    wanted = _driver.differentiable((source, arrays))[0]
    d_source, d_arrays = jax.tree.map(lambda a, d: _of_shape(d, a), wanted, (d_source, d_arrays))
    return None, None, d_source, None, d_arrays


@jax.custom_jvp
def first_order_only(x):
    """The identity, which refuses to be differentiated: JAX knows no derivative of a kernel."""
    return x


@first_order_only.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "kernels have no second derivatives: use implementation='xla', which has those of every order and mode"
    )


def _of_shape(d: Array, a: Array) -> Array:
    """A gradient in the shape and dtype of what it belongs to: one number for all rows gets their sum."""
    return (jnp.sum(d) if d.ndim > a.ndim else d).astype(a.dtype)


def _linear_cotangents(kernel, functions, states, cotangents, source, masks, arrays):
    """A stretch of columns at a time: the gradient of its scores is stored, and goes through two matrix products."""
    n, columns = source.shape

    def pulled(start, size: int) -> tuple:
        """The sums over columns, and what is cut into stretches along the first and along the second axis."""
        d = _cotangents(kernel, functions, states, cotangents, source, masks, arrays, start, size)
        weight = source._weight_block(start, size, _driver.col_mask(masks, start, size))
        d_hidden, d_weight = source._pull_raw(d.raw, weight)
        d_weight = d_weight.astype(source.weight.dtype)
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
        shapes = jax.eval_shape(lambda: pulled(0, size))  # whose size must be static
        whole = [
            jax.tree.map(functools.partial(_longer, axis=axis, size=columns), shapes[1 + axis])
            for axis in (0, 1)
        ]
        total = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0], *whole))
        total = _driver.align_varying((total, source.hidden))[0]
        total = _driver.over_blocks(columns, size, stretch, total)
    (d_hidden, d_rows), (d_cols, d_by_row), (d_entries, d_by_column) = total
    d_source = dataclasses.replace(
        source,
        hidden=d_hidden,
        weight=d_by_row if source.transpose_weight else d_by_column,
        bias=d_cols["bias"],
        scale=d_rows["scale"],
        temperature=d_rows["temperature"],
    )
    return d_source, [Arrays(*a) for a in zip(d_rows["args"], d_cols["args"], d_entries)]


def _longer(a: jax.ShapeDtypeStruct, axis: int, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*a.shape[:axis], size, *a.shape[axis + 1 :]), a.dtype)


_attach.defvjp(_attach_forward, _attach_backward)
