"""Where the rows, columns and features of logits lie on a mesh, and passes over such logits.

With Explicit mesh axes, the placement is part of the arrays' types. With Auto axes, JAX hides it while it traces, so
the user names it: `linear_logits(..., hidden_sharding=..., weight_sharding=...)`, or `shardings` for a block of code.
Either way the pass runs in a `shard_map`: each device reads its own rows and columns by the ordinary drivers, and
`jaxsoft.rows._shards` joins the states.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft.kernels.inner import setting
from jaxsoft.rows._logits import LinearLogits, StoredLogits
from jaxsoft.rows._masks import Masks
from jaxsoft.rows._reduction import Arrays
from jaxsoft.rows._shards import Shards, check_sharding, shard_count
from jaxsoft.rows._source import Source

_NOTHING: Mapping[str, Any] = types.MappingProxyType({})
_given: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("shardings", default=_NOTHING)


def shardings(
    *, hidden: Any = None, weight: Any = None, logits: Any = None, query: Any = None, key: Any = None
) -> contextlib.AbstractContextManager[None]:
    """Says where arrays lie on a mesh with Auto axes, for all functions that are called inside the context.

    With Auto mesh axes (`jit` with `NamedSharding`s, as Flax and MaxText train), JAX does not tell a function where its
    arrays lie. Functions of jaxsoft then leave the partition to the compiler, which gathers what a loop reads. Inside
    this context they know better: each device reads its own rows and columns. Explicit mesh axes need nothing: there
    the arrays say where they lie.

    Args:
      hidden: the placement of the `hidden` of `linear_logits`, `[*rows, d]`: a `PartitionSpec`, or a `NamedSharding`.
      weight: the placement of its `weight`, `[d, vocab]`, or `[vocab, d]` with `transpose_weight=True`.
      logits: the placement of stored logits, `[*rows, columns]`.
      query: the placement of the `query` of an attention, `[*batch, T, N, H]`.
      key: the placement of its `key` and `value`, or of a cache of them, `[*batch, S, K, H]`.

    Returns:
      A context manager.

    Raises:
      TypeError: a placement that is neither a `PartitionSpec` nor a `NamedSharding`.

    Example:
      >>> import jax, jaxsoft
      >>> from jax.sharding import PartitionSpec as P
      >>> with jaxsoft.shardings(hidden=P("data"), weight=P(None, "model")):
      ...     pass  # loss = jaxsoft.losses.cross_entropy(jaxsoft.linear_logits(hidden, weight), labels)
    """
    named = {"hidden": hidden, "weight": weight, "logits": logits, "query": query, "key": key}
    new = {name: check_sharding(name, s) for name, s in named.items() if s is not None}
    return setting(_given, {**_given.get(), **new})


class Layout(NamedTuple):
    """Where logits lie on a mesh. Static.

    Attributes:
      mesh: the mesh, abstract or not.
      rows: for each leading axis, the mesh axes over which it is sharded in the pass.
      columns: the mesh axes over which the columns are sharded.
      features: for `hidden @ weight` and further expressions, the axes over which a weight's features are sharded, if
        the rows are as well: each block of the weight is gathered when it is read. (A weight whose features are
        sharded otherwise is gathered before the pass.)
      results: like `rows`, as the results are to be placed.
    """

    mesh: Any
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    features: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]

    def by_row(self, *more: Any) -> P:
        """The spec of an array `[*rows, ...]`."""
        return P(*(axes or None for axes in self.rows), *more)

    def of_source(self, source: Any, i: int) -> Any:
        """The specs of an expression or of stored logits, as a tree like it; `i` counts expressions."""
        columns = self.columns or None
        if isinstance(source, StoredLogits):
            return dataclasses.replace(source, values=self.by_row(columns))
        weight = (self.features[i] or None, columns)
        return dataclasses.replace(
            source,
            hidden=self.by_row(None),
            weight=P(*(reversed(weight) if source.transpose_weight else weight)),
            bias=None if source.bias is None else P(columns),
            **{
                name: None if (a := getattr(source, name)) is None else self.by_row() if a.ndim else P()
                for name in ("scale", "temperature")
            },
        )

    def of_masks(self, masks: Masks) -> Masks:
        """The specs of masks."""
        specs = Masks(self.by_row(), P(self.columns or None), self.by_row(self.columns or None))
        return Masks(*(None if a is None else spec for a, spec in zip(masks, specs)))

    def of_arrays(self, arrays: list[Arrays]) -> list[Arrays]:
        """The specs of the reductions' arrays."""
        number = iter(range(1, len(self.features)))

        def entry(e):
            return (
                self.of_source(e, next(number))
                if isinstance(e, LinearLogits)
                else self.by_row(self.columns or None)
            )

        return [
            Arrays(
                jax.tree.map(lambda _: self.by_row(), a.args),
                tuple(P(self.columns or None) for _ in a.col_args),
                tuple(map(entry, a.entry_args)),
            )
            for a in arrays
        ]

    def localized(self, total: int, source: Source, masks: Masks, arrays: list[Arrays]) -> tuple:
        """One device's part of the operands, inside the `shard_map`, as a pass reads it."""
        expressions = [e for a in arrays for e in a.entry_args if isinstance(e, Source)]
        source, *expressions = self.local(total, source, *expressions)
        expressions = iter(expressions)

        def entry(e):
            return next(expressions) if isinstance(e, Source) else e

        return source, masks, [a._replace(entry_args=tuple(map(entry, a.entry_args))) for a in arrays]

    def local(self, total: int, *sources: Any) -> list:
        """One device's part of expressions with `total` columns."""
        return [
            dataclasses.replace(a, shards=Shards(self.columns, features, total))
            for a, features in zip(sources, self.features)
        ]

    def restore(self, a: jax.Array, *placed: Any) -> jax.Array:
        """A result `[*rows, ...]`, placed as `results` says; `placed` is its spec, if it is not that of a row."""
        here = P(*placed) if placed else self.by_row()
        wanted = P(*(axes or None for axes in self.results))
        return a if here == wanted else moved(self.mesh, a, wanted)

    def padding(self, columns: int) -> int:
        """Columns to append so that every device has equally many."""
        return -columns % shard_count(self.columns, self.mesh)


def on_mesh(mesh: Any, function: Callable, specs: tuple, operands: tuple, results: Any) -> Any:
    """`function(*operands)` on every device's part of the operands; `specs` and `results` are trees of specs.

    Inside, `shardings` says nothing any more.
    """
    manual = {name for name, kind in _axis_types(mesh) if kind != AxisType.Manual}
    operands = jax.tree.map(functools.partial(moved, mesh), operands, specs)

    def here(*operands):
        with setting(_given, _NOTHING):
            return function(*operands)

    return jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=results, axis_names=manual)(*operands)


def _axis_types(mesh) -> list[tuple[str, Any]]:
    return list(zip(mesh.axis_names, mesh.axis_types))


def moved(mesh, a, spec: P):
    """The array, placed as a spec says along the Explicit axes of a mesh; along Auto axes JAX does that by itself."""
    explicit = {name for name, kind in _axis_types(mesh) if kind == AxisType.Explicit}
    if not explicit:
        return a
    wanted = [tuple(name for name in _names(entry) if name in explicit) for entry in spec]
    wanted += [()] * (a.ndim - len(wanted))
    here = jax.typeof(a).sharding
    if not here.mesh.empty and [tuple(_names(entry)) for entry in here.spec] == wanted:
        return a
    return jax.reshard(a, NamedSharding(mesh, P(*(axes or None for axes in wanted))))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    if entry is None or entry is P.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


# --- finding the layout --------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """The placement of one array: its mesh and, for each of its axes, the names of mesh axes."""

    mesh: Any
    axes: tuple[tuple[str, ...], ...]


def placed(name: str, a: Any, given: Any = None, near: tuple = ()) -> Placed | None:
    """Where an array lies, by its type, or by what the user says; None if it lies on no mesh, or nothing is known.

    Args:
      name: its name, as an argument of `shardings`.
      a: the array.
      given: what the user says of it; None for what `shardings` says.
      near: other arrays and shardings, which may know the mesh of a `PartitionSpec`.
    """
    given = _given.get().get(name) if given is None else given
    here = jax.typeof(a).sharding
    typed = tuple(_names(entry) for entry in here.spec)
    if any(typed):
        return Placed(here.mesh, typed)
    if given is None:
        return None
    spec = given.spec if isinstance(given, NamedSharding) else given
    if len(spec) > a.ndim:
        raise ValueError(
            f"{name}_sharding must have at most {a.ndim} entries for shape {a.shape}, got {spec}"
        )
    axes = tuple(_names(entry) for entry in spec) + ((),) * (a.ndim - len(spec))
    meshes = [*map(_mesh_of, (given, a, *near)), jax.sharding.get_abstract_mesh()]
    mesh = next((m for m in meshes if m is not None and not m.empty), None)
    if mesh is None:
        raise ValueError(
            f"{name}_sharding={spec} needs a mesh: give a NamedSharding, or call inside jax.set_mesh(mesh)"
        )
    for axis in (axis for entry in axes for axis in entry):
        if axis not in mesh.shape:
            raise ValueError(
                f"{name}_sharding={spec} names the axis {axis!r}, but the mesh has {mesh.axis_names}"
            )
        if (kind := dict(_axis_types(mesh))[axis]) != AxisType.Auto:
            where = "the array's type says where it lies" if kind == AxisType.Explicit else "use axis_name"
            raise ValueError(
                f"{name}_sharding={spec} names the axis {axis!r}, which is not Auto but {kind.name}: {where}"
            )
    return Placed(mesh, axes)


def _mesh_of(a: Any) -> Any:
    """The mesh of an array or a `NamedSharding`; None of anything else."""
    sharding = a if isinstance(a, NamedSharding) else jax.typeof(a).sharding if hasattr(a, "dtype") else None
    return None if sharding is None else sharding.mesh


def layout_of(source: Any, others: list[LinearLogits]) -> Layout | None:
    """Where logits lie; None if they are on one device, or nothing is known, or inside `shard_map` already.

    Args:
      source: logits with their leading axes.
      others: further expressions that the pass reads, of the same shape.
    """
    if source.shards is not None:
        return None
    if isinstance(source, StoredLogits):
        stored = placed("logits", source.values)
        if stored is None:
            return None
        return _layout(
            stored.mesh, stored.axes[:-1], stored.axes[-1], [(), *map(_features, others)], source.shape
        )
    hidden = placed("hidden", source.hidden, source.hidden_sharding, (source.weight_sharding, source.weight))
    weight = _placed_weight(source)
    known = hidden or weight
    if known is None:
        return None
    rows = hidden.axes[:-1] if hidden else ((),) * (source.hidden.ndim - 1)
    columns, features = _columns_and_features(source, weight)
    return _layout(known.mesh, rows, columns, [features, *map(_features, others)], source.shape)


def _columns_and_features(e: LinearLogits, weight: Placed | None) -> tuple:
    """The mesh axes of the columns and of the features of an expression's weight."""
    if weight is None:
        return (), ()
    return weight.axes if e.transpose_weight else weight.axes[::-1]


def _features(e: LinearLogits) -> tuple[str, ...]:
    return _columns_and_features(e, _placed_weight(e))[1]


def _placed_weight(e: LinearLogits) -> Placed | None:
    return placed("weight", e.weight, e.weight_sharding, (e.hidden_sharding, e.hidden))


def _layout(mesh, rows, columns, features, shape) -> Layout:
    inside = tuple(tuple(name for name in axes if name not in columns) for axes in rows)
    over = {name for axes in inside for name in axes}
    for size, axes in zip(shape, inside):
        if size % shard_count(axes, mesh):
            raise ValueError(
                f"rows of shape {shape[:-1]} are sharded over {axes}, {shard_count(axes, mesh)} devices, "
                f"which must divide their number: got {size}"
            )
    gathered = tuple(axes if axes and set(axes) <= over else () for axes in features)
    return Layout(mesh, inside, columns, gathered, rows)


def padded(a: Any, axis: int, by: int) -> Any:
    """An array with zeros appended along an axis."""
    if a is None or by == 0:
        return a
    return jnp.pad(a, [(0, by if i == axis % a.ndim else 0) for i in range(a.ndim)])


def with_padding(layout: Layout, source: Source, masks: Masks, arrays: list[Arrays]) -> tuple:
    """The operands with columns appended, so that every device has equally many."""
    by = layout.padding(source.shape[-1])
    if by == 0:
        return source, masks, arrays

    def entry(e):
        return padded_source(e, by) if isinstance(e, LinearLogits) else padded(e, -1, by)

    return (
        padded_source(source, by),
        Masks(masks.rows, padded(masks.cols, -1, by), padded(masks.entries, -1, by)),
        [
            Arrays(a.args, tuple(padded(c, 0, by) for c in a.col_args), tuple(map(entry, a.entry_args)))
            for a in arrays
        ],
    )


def padded_source(source: Any, by: int) -> Any:
    """Logits with columns appended."""
    if isinstance(source, StoredLogits):
        return dataclasses.replace(source, values=padded(source.values, -1, by))
    return dataclasses.replace(
        source,
        weight=padded(source.weight, 0 if source.transpose_weight else 1, by),
        bias=padded(source.bias, 0, by),
    )
