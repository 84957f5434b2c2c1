"""Arrays as 8-bit codes: maps between codes and numbers from -1 to 1, and the scales of blocks of entries."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_DECADES = 7  # powers of ten of the dynamic map, from 1e-6 to 1
PARTS = 8  # of a block, whose extremes are taken entry by entry before they are reduced

# Maps.


def _bits(x: jax.Array) -> jax.Array:
    """The bits of float numbers as integers, which grow with the absolute value."""
    return lax.bitcast_convert_type(x, jnp.int64 if x.dtype.itemsize == 8 else jnp.int32)


class DynamicMap(NamedTuple):
    """The map of `dynamic_code_map`, with or without negative values."""

    signed: bool

    def _fractions(self) -> list[int]:
        """The number of values in each decade."""
        return [2 ** (i if self.signed else i + 1) for i in range(_DECADES)]

    def values(self) -> np.ndarray:
        """The 256 values in increasing order."""
        values = [0.0, 1.0]
        for i, k in enumerate(self._fractions()):
            edges = np.linspace(0.1, 1.0, k + 1)
            decade = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - _DECADES + 1)
            values += [*decade, *-decade] if self.signed else [*decade]
        return np.sort(values)

    def encode(self, y: jax.Array) -> jax.Array:
        """The code of the nearest value, by arithmetic: a binary search is forty times slower.

        Compare-and-select replaces `minimum`, whose NaN handling is slower.
        """
        size = jnp.abs(y) if self.signed else jnp.where(y > 0, y, 0)
        # The place is the position in the map, counted from 0 outwards. In a decade of k values it grows linearly
        # from k to 2k. The lines of all decades are tangents of a concave function, so the place is their minimum.
        place: Any = None
        for i, k in enumerate(self._fractions()):
            low = 10.0 ** (i - _DECADES)
            # The first line starts halfway between 0 and the first value, at `k + 0.2`: see below.
            start = (low * (1 + 4.5 / k) / 2, k + 0.2) if i == 0 else (low, k)
            end = (low * (1 + 9 / k), k + 1)
            slope = (end[1] - start[1]) / (end[0] - start[0])
            line = slope * size + (end[1] - slope * end[0])
            place = line if i == 0 else jnp.where(line < place, line, place)
        # The first fifth of a decade's first part, up to halfway between the values, is nearer to the last value of
        # the decade below. Only there does subtracting 0.2 cross a power of two.
        digits = jnp.finfo(y.dtype).nmant
        power = lax.bitcast_convert_type(_bits(place) & -(2**digits), y.dtype)
        place = jnp.where(place - 0.2 < power, place - 0.2, place)
        # Rounds down: the last binary digit of the sum stands for 1, so its last byte is the place.
        index = _bits(place + (2.0**digits - 0.5))
        index = jnp.where(y < 0, 127 - index, 127 + index) if self.signed else index - 1
        top = 1 - 0.225 / 2 ** (_DECADES - 1 if self.signed else _DECADES)
        return jnp.where(y >= top, 255, index).astype(jnp.uint8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        """The values, by arithmetic, which fuses with the operation that uses them; on a CPU a table does not.

        The lines of all decades are tangents of a convex function, so the value is their maximum.
        """
        place = codes.astype(jnp.int32).astype(dtype) - (127 if self.signed else 0)
        index = jnp.abs(place)
        value = jnp.zeros_like(index)
        for i, k in enumerate(self._fractions()):
            low, first = 10.0 ** (i - _DECADES), (k if self.signed else k - 1)
            line = 9 * low / k * index + low * (1 + 9 * (0.5 - first) / k)
            value = jnp.where(line > value, line, value)
        value = jnp.where(value < 1, value, 1)
        return jnp.where(place < 0, -value, value)


class LinearMap:
    """255 equal steps from -1 to 1."""

    signed = True

    def encode(self, y: jax.Array) -> jax.Array:
        """The code of the nearest value."""
        return (127 + jnp.round(127 * y).astype(jnp.int32)).astype(jnp.uint8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        """The values."""
        return (codes.astype(jnp.int32).astype(dtype) - 127) / 127


CodeMap: TypeAlias = DynamicMap | LinearMap


def _round_stochastically(y: jax.Array, code_map: CodeMap, key: jax.Array) -> jax.Array:
    """The code of one of the two neighbours of `y`, the nearer more often, so that the mean value is `y`."""
    nearest = code_map.encode(y)
    above = (code_map.decode(nearest, y.dtype) > y).astype(jnp.int32)
    below = jnp.clip(nearest.astype(jnp.int32) - above, 0, 254)
    low, high = (code_map.decode((below + i).astype(jnp.uint8), y.dtype) for i in (0, 1))
    upwards = jax.random.uniform(key, y.shape, y.dtype) * (high - low) < y - low
    return jnp.where(upwards, below + 1, below).astype(jnp.uint8)


# Blocks.


class Layout(NamedTuple):
    """How an array is cut: rows of `length` entries (its last axes), each into `blocks` of `width` entries."""

    lead: tuple[int, ...]
    length: int
    blocks: int
    width: int
    scales_shape: tuple[int, ...]


def layout_of(shape: tuple[int, ...], block_size: int) -> Layout:
    """Blocks along the last axis, or over as many last axes as one block needs.

    The scales have as many axes as the array, and the leading axes are the array's own: a sharding of these axes
    holds for the scales, too.
    """
    axis, length = len(shape), 1
    while axis > 0 and length < block_size:
        axis -= 1
        length *= shape[axis]
    blocks = -(-length // block_size)
    lead = shape[:axis]
    merged = (blocks,) + (1,) * (len(shape) - axis - 1) if shape else ()
    return Layout(lead, length, blocks, block_size if blocks > 1 else length, lead + merged)


def _whole_rows(x: jax.Array, layout: Layout) -> jax.Array:
    """The array with all of a row on one device, where Explicit mesh axes shard rows otherwise than between blocks."""
    here = jax.typeof(x).sharding
    lead = len(layout.lead)
    axes = [axis for axis in here.spec[lead:] if axis is not None]
    if not axes:
        return x
    even = layout.blocks * layout.width == layout.length
    names = axes[0] if isinstance(axes[0], tuple) else (axes[0],)
    devices = math.prod(here.mesh.shape[name] for name in names)
    if x.ndim == lead + 1 and even and (layout.blocks == 1 or layout.blocks % devices == 0):
        return x
    return jax.reshard(x, NamedSharding(here.mesh, P(*here.spec[:lead])))


def _in_blocks(x: jax.Array, layout: Layout) -> jax.Array:
    rows = _whole_rows(x, layout).reshape((*layout.lead, layout.length))
    missing = layout.blocks * layout.width - layout.length
    if missing:
        rows = jnp.pad(rows, [(0, 0)] * len(layout.lead) + [(0, missing)])
    return rows.reshape((*layout.lead, layout.blocks, layout.width))


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    """The one with the larger absolute value, or NaN if either is NaN: its bits are those of a larger number."""
    return jnp.where(_bits(jnp.abs(y)) > _bits(jnp.abs(x)), y, x)


def spread(per_block: jax.Array, shape: tuple[int, ...], layout: Layout) -> jax.Array:
    """Repeats one number per block for each entry of the block."""
    blocks = per_block.reshape((*layout.lead, layout.blocks, 1))
    rows = jnp.broadcast_to(blocks, (*layout.lead, layout.blocks, layout.width))
    rows = rows.reshape((*layout.lead, layout.blocks * layout.width))
    return rows[..., : layout.length].reshape(shape)


def _extremes(x: jax.Array, layout: Layout, signed: bool) -> jax.Array:
    """The entry of each block with the largest absolute value, with its sign; 0 if it is not a normal number."""
    # A single block is reduced in its own shape, which the compiler splits among cores.
    one = not layout.lead and layout.blocks == 1
    blocks, axis = (x, None) if one else (_in_blocks(x, layout), -1)
    if not one and layout.width % (8 * PARTS) == 0 and jax.typeof(blocks).sharding.spec[-1] is None:
        # Elementwise operations reduce a block to an eighth. The computation of x fuses with them; on a CPU it does
        # not fuse with a reduction, and x would be stored.
        parts = jnp.split(blocks if signed else jnp.where(blocks < 0, 0, blocks), PARTS, axis=-1)
        blocks = functools.reduce(_larger, parts)
    extreme = jnp.max(blocks, axis=axis, initial=0)
    if signed:
        low = jnp.min(blocks, axis=axis, initial=0)
        extreme = jnp.where(extreme < -low, low, extreme)
    tiny = jnp.abs(extreme) < jnp.finfo(x.dtype).tiny
    return jnp.where(tiny, 0, extreme).reshape(layout.scales_shape)


def encode(
    x: jax.Array, layout: Layout, code_map: CodeMap, key: Any = None, positive=False, again: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The codes and the scales of an array.

    Args:
      x: the array, in at least float32.
      layout: its blocks.
      code_map: the map between codes and numbers from -1 to 1.
      key: for stochastic rounding. None: the nearest codes.
      positive: whether a positive entry stays positive, even if 0 is nearer.
      again: a second computation of `x`, from which the scales are taken.

    Returns:
      The codes, uint8, and the scales.
    """
    scales = _extremes(x if again is None else again, layout, code_map.signed)
    y = x * spread(jnp.where(scales == 0, 0, 1 / scales), x.shape, layout)
    codes = code_map.encode(y) if key is None else _round_stochastically(y, code_map, key)
    if positive:
        codes = jnp.where(y > 0, jnp.maximum(codes, 1), codes)
    return codes, scales


def decode(codes: jax.Array, scales: jax.Array, layout: Layout, code_map: CodeMap) -> jax.Array:
    """The array of these codes and scales."""
    return code_map.decode(codes, scales.dtype) * spread(scales, codes.shape, layout)
