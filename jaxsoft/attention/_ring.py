"""Attention whose keys lie on several devices, inside `shard_map`.

Two kinds of rows run the passes of every normalizer over keys that are sharded along their length. `RingRows`: the
queries are sharded as well, and the keys travel once around the devices, each of which computes the states of its own
queries. `JoinedRows`: all devices have the same queries (decoding), and the states of their parts of the keys are
joined. Either way states are merged by `RowReduction.merge`, so every normalizer can be had, those of several passes
too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxsoft import _checks
from jaxsoft._trees import align_varying, partition
from jaxsoft.attention import _sweeps
from jaxsoft.attention._arguments import entries_of, prepare
from jaxsoft.attention._blocks import recut, recut_rows
from jaxsoft.attention._pass import empty_states, finished_states
from jaxsoft.attention._rows import AttentionRows
from jaxsoft.attention._run import choose_kernel, for_xla
from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility
from jaxsoft.attention._visibility import without_hidden_keys
from jaxsoft.kernels.inner import Kernel, attach
from jaxsoft.normalizers.inner import Survey, plain_survey
from jaxsoft.rows import RowReduction, reductions
from jaxsoft.rows.inner import check_axis_name, joined


class _SeveralDevices(AttentionRows):
    """What rows over keys of several devices share."""

    def count(self) -> Array:
        """The number of visible keys per query, on all devices."""
        return self.reduce(reductions.count()).astype(self.dtype)

    def survey(self) -> Survey:
        """What one pass tells about the rows: nothing about single blocks, which are read in every pass."""
        return plain_survey(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedRows(_SeveralDevices):
    """Rows of scores of queries that all devices have, and of keys that are sharded over `axes`."""

    axes: tuple[str, ...] = dataclasses.field(default=(), metadata=dict(static=True))

    def run(self, wanted: list[RowReduction], refused: dict[str, str] | None = None) -> list:
        """The states of row reductions over the keys of all devices."""
        states = super().run(wanted, refused)
        functions = [r._replace(args=()) for r in wanted]
        return joined(functions, states, self.axes, [r.args for r in wanted])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingRows(_SeveralDevices):
    """Rows of scores of queries and keys that are sharded along their length, over the same `axes`.

    Every device has equally many queries and equally many keys, in the order of the devices. `inputs.bias` and
    `masks.entries` have a leading axis over the shards of the keys if they vary along the keys (`by_shard`).
    """

    axes: tuple[str, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    by_shard: tuple[bool, bool] = dataclasses.field(default=(False, False), metadata=dict(static=True))

    def run(self, wanted: list[RowReduction], refused: dict[str, str] | None = None) -> list:
        """The states of row reductions over the keys of all devices."""
        functions, args = tuple(r._replace(args=()) for r in wanted), [r.args for r in wanted]
        ring = _Ring(self.spec, self.axes, self.by_shard)
        here = ring.at(ring.index(), self.inputs, self.masks)
        kernel = choose_kernel(self.spec, functions, *here, args, refused)
        cut = self.spec if kernel is not None else for_xla(self.spec)
        if cut == self.spec:
            return _run(ring, functions, kernel, self.inputs, self.masks, args)
        # The blocks are those of a kernel, which was likely to run but does not.
        inputs, masks, args = self._recut(cut, args)
        states = _run(dataclasses.replace(ring, spec=cut), functions, None, inputs, masks, args)
        return jax.tree.map(functools.partial(recut_rows, cut, self.spec), states)

    def _recut(self, cut: AttentionSpec, args: list) -> tuple[Inputs, Visibility, list]:
        def one(bias, entries):
            inputs, masks = self.inputs._replace(bias=bias), self.masks._replace(entries=entries)
            return recut(self.spec, cut, inputs, masks, args)

        def each(name, array, by_shard):
            def of_shard(a):
                inputs, masks, _ = one(**{"bias": None, "entries": None, name: a})
                return inputs.bias if name == "bias" else masks.entries

            return jax.vmap(of_shard)(array) if by_shard and array is not None else of_shard(array)

        inputs, masks, args = one(None, None)
        bias = each("bias", self.inputs.bias, self.by_shard[0])
        entries = each("entries", self.masks.entries, self.by_shard[1])
        return inputs._replace(bias=bias), masks._replace(entries=entries), args

    def row_number(self) -> Array:
        """Random numbers of rows are those of one device only."""
        raise ValueError(
            "dropout_rate must be 0 with axis_name: rows are numbered by batch element, head and query, and a device "
            "knows its own only"
        )

    query_number = row_number


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The static part of a ring. Hashable."""

    spec: AttentionSpec
    axes: tuple[str, ...]
    by_shard: tuple[bool, bool]

    def index(self) -> Array:
        """This device's place in the ring."""
        return lax.axis_index(self.axes).astype(jnp.int32)

    def at(self, source: Array, inputs: Inputs, masks: Visibility) -> tuple[Inputs, Visibility]:
        """Inputs and masks for the keys of the device `source`."""

        def part(a: Any, by_shard: bool) -> Any:
            return lax.dynamic_index_in_dim(a, source, 0, keepdims=False) if by_shard and a is not None else a

        bias, entries = (part(a, by) for a, by in zip((inputs.bias, masks.entries), self.by_shard))
        moved = (source - self.index()) * self.spec.keys
        return inputs._replace(bias=bias), masks._replace(
            entries=entries, key_offset=masks.key_offset + moved
        )

    def send(self, tree: Any) -> Any:
        """Sends arrays to the next device, and receives those of the previous one."""
        count = lax.axis_size(self.axes)
        return lax.ppermute(tree, self.axes, [(i, (i + 1) % count) for i in range(count)])

    def around(self, step: Callable, total: Any, keys: Any) -> Any:
        """Folds `step(total, source, keys) -> total` over the shards of the keys, this device's own first.

        Keys are sent on before the step reads them: the transfer and the step need not wait for each other.
        """
        count, index = lax.axis_size(self.axes), self.index()

        def body(carry, k):
            total, keys = carry
            sent = self.send(keys)
            return (step(total, (index - k) % count, keys), sent), None

        (total, keys), _ = lax.scan(body, (total, keys), jnp.arange(count - 1, dtype=jnp.int32))
        return step(total, (index - (count - 1)) % count, keys)


def _keys_of(inputs: Inputs, masks: Visibility) -> tuple:
    """What travels with the keys."""
    return inputs.key, inputs.value, masks.key_segments, masks.key_positions


def _with_keys(inputs: Inputs, masks: Visibility, keys: tuple) -> tuple[Inputs, Visibility]:
    key, value, segments, positions = keys
    return inputs._replace(key=key, value=value), masks._replace(
        key_segments=segments, key_positions=positions
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(ring: _Ring, functions: tuple, kernel: Kernel | None, inputs: Inputs, masks: Visibility, args: list):
    inputs, masks, args, _ = align_varying((inputs, masks, args, ring.index()))
    states = _states(ring, functions, kernel, *lax.stop_gradient((inputs, masks, args)))
    rule = functools.partial(_tangents, ring, functions)
    if kernel is not None:
        here = ring.at(ring.index(), inputs, masks)
        kernel = kernel if _sweeps.runs_backward(kernel, ring.spec, functions, states, *here, args) else None
    pull_back = functools.partial(_pull_back, ring, functions, kernel)
    return attach(rule, pull_back, states, masks, (inputs, args))


def _states(ring: _Ring, functions: tuple, kernel: Kernel | None, inputs, masks, args) -> list:
    """The states over the keys of all devices, without derivatives."""

    def step(total, source, keys):
        here = ring.at(source, *_with_keys(inputs, masks, keys))
        if kernel is None:
            inputs_here = without_hidden_keys(ring.spec, *here)
            new, _ = finished_states(ring.spec, functions, inputs_here, here[1], args)
        else:
            new = _sweeps.finished_states(kernel, ring.spec, functions, *here, args)
        return [r.merge(s, n, *a) for r, s, n, a in zip(functions, total, new, args)]

    empty = align_varying((empty_states(ring.spec, functions, inputs, args), inputs.query))[0]
    return ring.around(step, empty, _keys_of(inputs, masks))


def _tangents(ring: _Ring, functions: tuple, states, masks: Visibility, operands, given) -> list:
    """The tangents of the finished states' float leaves, linear in those of the operands: the keys travel again."""
    (inputs, args), (d_inputs, d_args) = operands, given

    def step(total, source, moving):
        keys, d_keys = moving
        here, masks_here = ring.at(source, *_with_keys(inputs, masks, keys))
        d_here, _ = ring.at(source, d_inputs._replace(key=d_keys[0], value=d_keys[1]), masks)
        new = _sweeps.tangents(ring.spec, functions, states, masks_here, (here, args), (d_here, d_args))
        return jax.tree.map(jnp.add, total, new)

    zeros = jax.tree.map(jnp.zeros_like, partition(states)[0])
    return ring.around(step, zeros, (_keys_of(inputs, masks), (d_inputs.key, d_inputs.value)))


def _pull_back(ring: _Ring, functions: tuple, kernel: Kernel | None, states, masks, operands, cotangents):
    """The transpose of `_tangents`: the keys travel with their cotangents, which thereby come home."""
    inputs, args = operands
    spec, count, index = ring.spec, lax.axis_size(ring.axes), ring.index()

    def of_shard(here: Inputs, masks_here: Visibility) -> tuple[Inputs, list]:
        case = states, masks_here, (here, args), cotangents
        if kernel is not None:
            return _sweeps.pull_back(kernel, spec, functions, *case)
        return _transposed(spec, functions, *case)

    def wide(a):
        return jnp.zeros_like(a, dtype=jnp.promote_types(a.dtype, jnp.float32))

    def add(total, keys, k):
        d_inputs, d_args, d_keys = total
        source = (index - k) % count
        d, d_args_here = of_shard(*ring.at(source, *_with_keys(inputs, masks, keys)))
        d_keys = ring.send(jax.tree.map(lambda t, a: t + a, d_keys, (d.key, d.value)))
        bias = d_inputs.bias
        if bias is not None:
            bias = bias.at[source].add(d.bias) if ring.by_shard[0] else bias + d.bias
        rest = d_inputs._replace(bias=None), d_args
        rest, d_args = jax.tree.map(
            lambda t, a: t + a, rest, (d._replace(key=None, value=None, bias=None), d_args_here)
        )
        return rest._replace(bias=bias), d_args, d_keys

    def body(carry, k):
        total, keys = carry
        sent = ring.send(keys)
        return (add(total, keys, k), sent), None

    wanted = partition((inputs, args))[0]
    total, d_keys = jax.tree.map(wide, (wanted, (wanted[0].key, wanted[0].value)))
    total = total[0]._replace(key=None, value=None), total[1], d_keys
    start = align_varying((total, _keys_of(inputs, masks), index))[:2]
    (total, keys), _ = lax.scan(body, start, jnp.arange(count - 1, dtype=jnp.int32))
    d_inputs, d_args, d_keys = add(total, keys, count - 1)  # after which no device needs the keys
    found = d_inputs._replace(key=d_keys[0], value=d_keys[1]), d_args
    return jax.tree.map(lambda a, d: d.astype(a.dtype), wanted, found)


def _transposed(spec: AttentionSpec, functions: tuple, states, masks, operands, cotangents) -> Any:
    """The transpose of `tangents` on one device, by JAX."""
    floats, _ = partition(operands)
    leaves, treedef = jax.tree.flatten(floats, is_leaf=lambda a: a is None)

    def push(given: list) -> list:
        tangent = iter(given)
        return _sweeps.tangents(
            spec,
            functions,
            states,
            masks,
            operands,
            treedef.unflatten([None if a is None else next(tangent) for a in leaves]),
        )

    like = [jax.typeof(a) for a in leaves if a is not None]
    found = iter(jax.linear_transpose(push, like)(cotangents)[0])
    return treedef.unflatten([None if a is None else next(found) for a in leaves])


# --- from the user's arguments -------------------------------------------------------------------------------


def zigzag_positions(length: int, devices: int) -> Int[Array, " length"]:
    """The positions of a sequence in zig-zag order, in which a causal ring keeps its devices equally busy.

    The sequence is cut into `2 * devices` chunks, of which device i holds chunks i and `2 * devices - 1 - i`: an early
    one, whose queries see few keys, and a late one. In every step of the ring, each device then computes half of its
    scores, where in the natural order one device computes all of them and the others wait.

    The result is also the index that puts arrays into this order, `x[:, positions]`; `jnp.argsort(positions)` is its
    inverse. Reorder tokens, labels and their positions once, where batches are made: attention is the only layer of a
    transformer that looks from one token to another. It takes the result as `query_positions` and `key_positions`.

    Args:
      length: the number of positions, a multiple of `2 * devices`.
      devices: the number of devices along which the sequence is sharded.

    Returns:
      `[length]`, int32.

    Raises:
      TypeError: an argument that is not an integer.
      ValueError: a length that `2 * devices` does not divide.

    Reference:
      Llama Team, "The Llama 3 Herd of Models", section 3.3.2.

    Example:
      >>> from jaxsoft.attention import zigzag_positions
      >>> print(zigzag_positions(8, 2))
      [0 1 6 7 2 3 4 5]
    """
    length = _checks.integer("length", length, at_least=0)
    devices = _checks.integer("devices", devices, at_least=1)
    if length % (2 * devices):
        raise ValueError(f"length must be a multiple of 2 * devices, {2 * devices}, got {length}")
    early, late = jnp.split(jnp.arange(length, dtype=jnp.int32).reshape(2 * devices, -1), 2)
    return jnp.stack([early, late[::-1]], axis=1).reshape(-1)


def prepare_ring(
    axis_name: Any, query, key, value, bias, mask, **options
) -> tuple[RingRows, tuple[int, ...]]:
    """`prepare` for queries and keys that are sharded along their length over mesh axes of `shard_map`."""
    axes = check_axis_name(axis_name)
    index, count = lax.axis_index(axes).astype(jnp.int32), lax.axis_size(axes)
    for name, array in (("query", query), ("key", key)):
        if getattr(array, "ndim", 0) < 3:
            raise ValueError(
                f"{name} must have shape [*batch, length, heads, width], got {_checks.describe(array)}"
            )
    queries, keys = query.shape[-3], key.shape[-3]
    if options.get("query_positions") is None:
        if options.get("query_seq_lengths") is not None:
            _checks.integers("query_seq_lengths", options["query_seq_lengths"])
            options["query_seq_lengths"] = options["query_seq_lengths"] - index * queries
        options["query_offset"] = options.get("query_offset", 0) + index * queries
    rows, shape = prepare(query, key, value, None, None, key_offset=index * keys, **options)
    by_shard, converted = [], []
    arrays: list[tuple[str, Any]] = [("bias", bias), ("mask", mask)]
    for name, array in arrays:
        length = array.shape[-1] if getattr(array, "ndim", 0) else 1
        along_keys = length != 1
        if along_keys and length != keys * count:
            raise ValueError(
                f"{name} must have the keys of all {count} devices, {keys * count}, along its last axis, or 1, got "
                f"shape {array.shape}"
            )
        cut: list[Any] = jnp.split(array, count, axis=-1) if along_keys else [array]
        parts: list[Any] = [None if a is None else entries_of(name, a, rows.spec, shape[:-3]) for a in cut]
        converted.append(jnp.stack(parts) if along_keys else parts[0])
        by_shard.append(along_keys)
    inputs, masks = rows.inputs._replace(bias=converted[0]), rows.masks._replace(entries=converted[1])
    return RingRows(rows.spec, inputs, masks, axes, tuple(by_shard)), shape


def prepare_joined(axis_name: Any, query, key, value, **options) -> tuple[JoinedRows, tuple[int, ...]]:
    """`prepare` for keys that are sharded along their length, and queries that every device has."""
    axes = check_axis_name(axis_name)
    first = lax.axis_index(axes).astype(jnp.int32) * key.shape[-3]
    rows, shape = prepare(query, key, value, None, None, key_offset=first, **options)
    return JoinedRows(rows.spec, rows.inputs, rows.masks, axes), shape
