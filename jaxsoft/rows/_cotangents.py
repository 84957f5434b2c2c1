"""The derivative of a single block, for callers that need the cotangent of a block of scores.

The gradient filter tests the cotangent's magnitude, `weighted_sum` already has the block of scores stored, and a kernel
has it in registers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._trees import partition, pull
from jaxsoft.rows._logits import LinearLogits
from jaxsoft.rows._masks import Masks, col_mask
from jaxsoft.rows._pass import cut_arrays, tiles
from jaxsoft.rows._reduction import Arrays, block_sums
from jaxsoft.rows._source import Source, finish


class Parts(NamedTuple):
    """The operands of tiles in addition to the raw scores, or their cotangents, grouped by the axes they vary over.

    Attributes:
      rows: `scale`, `temperature`, and as `args` the reductions' `args`, leaves `[n, ...]` or `[]`.
      cols: `bias`, and as `args` the `col_args`, leaves `[columns, ...]`.
      entries: as `args` the `entry_args`, leaves `[n, columns]` or expressions.
    """

    rows: dict[str, Any]
    cols: dict[str, Any]
    entries: dict[str, Any]


def parts_of(source: Source, arrays: list[Arrays]) -> Parts:
    """The parts for whole rows."""
    return Parts(
        {"scale": source.scale, "temperature": source.temperature, "args": [a.args for a in arrays]},
        {"bias": source.bias, "args": [a.col_args for a in arrays]},
        {"args": [a.entry_args for a in arrays]},
    )


def block_cotangents(
    functions, states, cotangents, masks: Masks, source: Source, arrays: list[Arrays], raw: Array, start
) -> tuple[Array, Parts]:
    """Pulls the cotangents of the states' float leaves back through one block of scores.

    Args:
      functions: the reductions.
      states: their finished states.
      cotangents: of the float leaves of `states`.
      masks: the masks.
      source: the flat logits.
      arrays: the reductions' arrays.
      raw: `[n, size]`, the raw scores of the block.
      start: its first column.

    Returns:
      The cotangents of `raw`, and those of the block's parts; `rows` holds this block's share of a sum over blocks.
    """
    size = raw.shape[-1]
    bias = source._bias_block(start, size, col_mask(masks, start, size))
    cut = cut_arrays(arrays, start, size, masks)
    parts = Parts(
        parts_of(source, arrays).rows,
        {"bias": bias, "args": [cols for cols, _ in cut]},
        {"args": [entries for _, entries in cut]},
    )

    def sums(raw, parts: Parts):
        rows, cols, entries = parts
        x = finish(raw, source.softcap, cols["bias"], rows["scale"], rows["temperature"])
        block = tiles(x, start, masks, list(zip(cols["args"], entries["args"])), source)
        return block_sums(functions, states, block, rows["args"])

    return pull(sums, (raw, parts), cotangents)


def operand_cotangents(source: Any, arrays: list[Arrays], parts: Parts, **matrices: Any) -> tuple:
    """The cotangents of source and arrays, each in its own shape and dtype.

    Args:
      source: the flat logits.
      arrays: the reductions' arrays.
      parts: the cotangents of their parts.
      **matrices: the cotangents of the source's other arrays: `hidden` and `weight`, or `values`.

    Returns:
      A source and a list of `Arrays`, with None for arrays that are not floating.
    """
    rows, cols, entries = parts
    if isinstance(source, LinearLogits):
        matrices |= dict(bias=cols["bias"], scale=rows["scale"], temperature=rows["temperature"])
    d_source = dataclasses.replace(source, **matrices)
    d_arrays = [Arrays(*a) for a in zip(rows["args"], cols["args"], entries["args"])]
    wanted, _ = partition((source, arrays))

    def as_operand(a, d):  # a scalar shared by all rows gets the sum over rows
        return (jnp.sum(d) if d.ndim > a.ndim else d).astype(a.dtype)

    return jax.tree.map(as_operand, wanted, (d_source, d_arrays))
