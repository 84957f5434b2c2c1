"""Rows of scores whose columns lie on several devices: the shards inside `shard_map`, and their states' join.

Every device runs an ordinary pass over its own rows and columns. The states of the reductions are then joined across
the devices of a row by `RowReduction.merge`: one number per row and state moves, or k of them, never a score and never
the weight. The derivative needs nothing more: a gauge carries no derivative, so ordinary differentiation of the join
gives every shard its cotangents, and each operand gets one sum over devices, at the end of its gradient.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxsoft import _checks


class Shards(NamedTuple):
    """How one device's columns of logits belong to whole rows, inside `shard_map`. Static.

    Attributes:
      columns: the mesh axes over which the columns are sharded, the slowest first.
      features: the mesh axes over which the features of the weight are sharded, which rows are sharded over as well:
        a block of the weight is gathered when it is read.
      total: the number of columns of a whole row; shards may hold a few more, which are masked.
    """

    columns: tuple[str, ...]
    features: tuple[str, ...]
    total: int

    def first(self, width: int) -> Array | int:
        """The index, in the whole row, of the first of this shard's `width` columns."""
        return lax.axis_index(self.columns).astype(jnp.int32) * width if self.columns else 0

    def cut(self, a: Any, axis: int, width: int) -> Any:
        """The part of an array that belongs to this shard's columns; `axis` has those of all shards."""
        if a is None or not self.columns:
            return a
        missing = width * lax.axis_size(self.columns) - a.shape[axis]
        a = jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)]) if missing else a
        return lax.dynamic_slice_in_dim(a, self.first(width), width, axis)

    def present(self, width: int) -> Array | None:
        """Which of this shard's columns are columns of the row; None if all are."""
        if not self.columns or width * lax.axis_size(self.columns) == self.total:
            return None
        return jnp.arange(width, dtype=jnp.int32) + self.first(width) < self.total

    def gather_features(self, weight_block: Array, axis: int) -> Array:
        """A block of the weight with all its features, which lie along `axis`."""
        if not self.features:
            return weight_block
        return lax.all_gather(weight_block, self.features, axis=axis, tiled=True)

    def scatter_features(self, d_weight: Array, axis: int) -> Array:
        """The transpose of `gather_features`: sums over devices, and keeps this one's features."""
        if not self.features:
            return d_weight
        return lax.psum_scatter(d_weight, self.features, scatter_dimension=axis, tiled=True)


def joined(functions, states: list, axes: tuple[str, ...], args: list[tuple]) -> list:
    """The states of whole rows, from those of each device's columns.

    Args:
      functions: the reductions.
      states: their states of this device's columns.
      axes: the mesh axes over which the columns are sharded.
      args: the reductions' `args`, for `merge`.
    """
    if not axes:
        return states
    parts = gathered(states, axes)
    return [
        functools.reduce(lambda a, b, r=r, args=args: r.merge(a, b, *args), each)
        for r, args, *each in zip(functions, args, *parts)
    ]


def gathered(tree: Any, axes: tuple[str, ...]) -> list:
    """The trees of all devices along mesh axes, in order, the same on each of them.

    The sum of arrays that are 0 but for one device's slot: unlike the result of an `all_gather`, JAX knows that of a
    `psum` to be equal on all devices. Leaves of one dtype move together.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        return [tree] * lax.axis_size(axes)
    count, index = lax.axis_size(axes), lax.axis_index(axes)
    whole: list = [None] * len(leaves)
    numbers = [leaf.astype(jnp.int32) if leaf.dtype == jnp.bool_ else leaf for leaf in leaves]
    for dtype in dict.fromkeys(a.dtype for a in numbers):
        same = [i for i, a in enumerate(numbers) if a.dtype == dtype]
        flat = jnp.concatenate([numbers[i].reshape(-1) for i in same])
        slots = jnp.zeros((count, flat.size), dtype).at[index].set(flat)
        everything = lax.psum(slots, axes)
        ends = [sum(numbers[j].size for j in same[: n + 1]) for n in range(len(same))]
        for i, part in zip(same, jnp.split(everything, ends[:-1], axis=1)):
            whole[i] = part.reshape(count, *leaves[i].shape).astype(leaves[i].dtype)
    return [treedef.unflatten([a[i] for a in whole]) for i in range(count)]


def check_axis_name(axis_name: Any) -> tuple[str, ...]:
    """Checks the mesh axes that a user names inside `shard_map`; returns them as a tuple."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"axis_name must be the name of a mesh axis or a tuple of names, got {axis_name!r}"
            )
        try:
            varying = jax.typeof(lax.axis_index(name)).manual_axis_type.varying
        except NameError:
            raise ValueError(
                f"axis_name must name axes of the mesh of the surrounding jax.shard_map, got {name!r}, which "
                "is not one: outside of shard_map write hidden_sharding and weight_sharding instead"
            ) from None
        if name not in varying:
            raise ValueError(
                f"axis_name={axis_name!r} needs jax.shard_map(..., check_vma=True), its default: without it JAX "
                "gives wrong gradients"
            )
    return names


def check_sharding(name: str, sharding: Any) -> Any:
    """Checks a placement given by a user."""
    if not isinstance(sharding, P | NamedSharding):
        raise TypeError(
            f"{name} must be a jax.sharding.PartitionSpec or NamedSharding, got {_checks.describe(sharding)}"
        )
    return sharding


def shard_count(axes: tuple[str, ...], mesh: Any) -> int:
    """The number of devices along some axes of a mesh."""
    return math.prod(mesh.shape[name] for name in axes)
