"""The gradient filter: a backward pass that skips blocks of logits whose gradient is negligible.

It inspects the cotangent of each block before it decides, so the derivative is a `custom_vjp`: first order and
reverse mode only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._trees import add_at, partition, pull
from jaxsoft.kernels.inner import Kernel
from jaxsoft.rows import _sweeps
from jaxsoft.rows._cotangents import Parts, block_cotangents, operand_cotangents, parts_of
from jaxsoft.rows._masks import col_mask
from jaxsoft.rows._pass import finish, finished_states, over_blocks
from jaxsoft.rows._reduction import Arrays
from jaxsoft.rows._source import cut


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def filtered(functions, block: int, kernel: Kernel | None, source, masks, arrays, args) -> Any:
    """The results, with a backward pass that skips blocks whose gradient is negligible; `args` as in `finish`."""
    return _forward(functions, block, kernel, source, masks, arrays, args)[0]


def _forward(functions, block, kernel, source, masks, arrays, args):
    if kernel is None:
        states = finished_states(functions, block, source, masks, arrays)
    else:
        states = _sweeps.finished_states(kernel, functions, source, masks, arrays)
    return finish(functions, states, source, args), (states, source, masks, arrays, args)


# Rows per filtered group: within a block of columns, the gradient of a few tokens is often negligible, that of a whole
# batch seldom.
_FILTER_ROWS = 256


def _backward(functions, block, kernel, residuals, cotangents):
    del kernel  # the backward pass always runs in XLA
    states, source, masks, arrays, args = residuals

    def final(states, args):
        return finish(functions, states, source, args)

    d_floats, d_args = pull(final, (states, args), cotangents)
    sizes = [
        jnp.max(jnp.abs(c), initial=0) for c in jax.tree.leaves(cotangents) if c.dtype != jax.dtypes.float0
    ]
    threshold = source.filter_eps * functools.reduce(jnp.maximum, sizes)

    def zeros(a):
        return jnp.zeros(a.shape, jnp.promote_types(a.dtype, source._accumulation_dtype))

    def block_body(total, start, size, looped):
        weight = source._weight_block(start, size, col_mask(masks, start, size))

        def group_body(total, row, group, looped):
            def rows(tree):
                return jax.tree.map(lambda a: cut(a, row, group, 0) if a.ndim else a, tree)

            by_row = {name: rows(getattr(source, name)) for name in ("hidden", "scale", "temperature")}
            part = dataclasses.replace(source, **by_row)
            part_masks = masks._replace(rows=rows(masks.rows), entries=rows(masks.entries))
            part_arrays = [Arrays(rows(a.args), a.col_args, rows(a.entry_args)) for a in arrays]
            raw = part._product(weight)
            d_raw, d = block_cotangents(
                functions, rows(states), rows(d_floats), part_masks, part, part_arrays, raw, start
            )
            matters = (
                jnp.max(jnp.abs(d_raw), initial=0) > threshold
            )  # False for NaN, which must not be skipped
            d_hidden, d_weight = lax.cond(
                matters | jnp.any(jnp.isnan(d_raw)),
                part._pull_product,
                lambda g, w: jax.tree.map(jnp.zeros_like, jax.eval_shape(part._pull_product, g, w)),
                d_raw,
                weight,
            )

            hidden, whole_weight, parts = total
            return (
                add_at(hidden, d_hidden, {0: row}),
                add_at(whole_weight, d_weight, {0 if source.transpose_weight else 1: start}),
                Parts(
                    _add(parts.rows, d.rows, {0: row}),
                    _add(parts.cols, d.cols, {0: start}),
                    _add(parts.entries, d.entries, {0: row, 1: start}),
                ),
            )

        return over_blocks(source.shape[0], min(_FILTER_ROWS, max(source.shape[0], 1)), group_body, total)

    total = jax.tree.map(zeros, partition((source.hidden, source.weight, parts_of(source, arrays)))[0])
    d_hidden, d_weight, d = over_blocks(source._width, block, block_body, total)
    d_source, d_arrays = operand_cotangents(source, arrays, d, hidden=d_hidden, weight=d_weight)
    return d_source, None, d_arrays, d_args


def _add(total, part, starts):
    return jax.tree.map(lambda t, p: add_at(t, p, starts) if t.ndim else t + p, total, part)


filtered.defvjp(_forward, _backward)
