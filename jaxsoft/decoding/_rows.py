"""Rows of logits after elementwise maps: what transforms read and return."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.rows import LinearLogits, Logits, RowReduction, StoredLogits, Tile, reduce_rows
from jaxsoft.rows.inner import check_axis, is_reduction, moved, shares, split_mask, unmasked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Map:
    """`function(x, cols, *args, *col_args, *entry_args)`, elementwise, of the present entries of a row.

    Attributes:
      function: module-level or cached, since programs are cached by its identity.
      args: `[*rows]` arrays, which the function gets as `[*rows, 1]`.
      col_args: `[columns]` arrays.
      entry_args: `[*rows, columns]` arrays, or `linear_logits` of that shape.
      direct: whether the function may read the -inf of absent entries, and leaves it: saves two selects per entry.
    """

    function: Callable[..., Array] = dataclasses.field(metadata=dict(static=True))
    args: tuple = ()
    col_args: tuple = ()
    entry_args: tuple = ()
    direct: bool = dataclasses.field(default=False, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransformedLogits:
    """Rows of logits, of which nothing need be stored, after elementwise maps.

    Transforms read and return it. `sample`, `argmax` and `log_prob` take it like an array or `linear_logits`.

    Attributes:
      logits: an array with rows along its last axis, `linear_logits` or `stored_logits`.
      maps: what is done to each present entry, in this order.
      where: which entries are present, before the maps and so after them; None for all. An array has -inf instead.
    """

    logits: Any
    maps: tuple[Map, ...] = ()
    where: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`[*rows, columns]`, the shape that the dense logits would have."""
        return tuple(self.logits.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the dense logits: float32 at least."""
        return accumulation_dtype(self.logits.dtype)

    @property
    def rows(self) -> tuple[int, ...]:
        """The leading axes."""
        return self.shape[:-1]

    @property
    def columns(self) -> int:
        """The number of columns of a row, those of all shards."""
        return self.shape[-1]

    @property
    def is_stored(self) -> bool:
        """Whether the logits are an array with all columns."""
        return not isinstance(self.logits, LinearLogits | StoredLogits)

    def then(
        self,
        function: Callable[..., Array],
        *args: Array,
        col_args: tuple = (),
        entry_args: tuple = (),
        direct: bool = False,
    ) -> TransformedLogits:
        """The rows after one more map, see `Map`. Stored logits are mapped at once."""
        step = Map(function, args, tuple(col_args), tuple(entry_args), direct)
        if self.is_stored:
            return dataclasses.replace(self, logits=_dense(self.logits.astype(self.dtype), step))
        return dataclasses.replace(self, maps=(*self.maps, step))

    def masked(self, keep: Any) -> TransformedLogits:
        """The rows without the entries where `keep`, which broadcasts to their shape, is False; None keeps all."""
        if keep is None:
            return self
        if self.is_stored:
            keep = _with(self.logits, jnp.broadcast_to(keep, self.shape))
            return dataclasses.replace(self, logits=jnp.where(keep, self.logits, -jnp.inf))
        return dataclasses.replace(self, where=keep if self.where is None else self.where & keep)

    def reduce(self, reductions: Any) -> Any:
        """The results of row reductions over the mapped rows, in one pass."""
        if self.maps:
            reductions = jax.tree.map(functools.partial(after, self.maps), reductions, is_leaf=is_reduction)
        return reduce_rows(self.logits, reductions, where=self.where)

    def detached(self) -> TransformedLogits:
        """The same rows without derivatives."""
        return lax.stop_gradient(self)

    def stored(self, transform: str, instead: str = "") -> Float[Array, "*rows columns"]:
        """The stored scores, for a transform that sorts whole rows: of a row on several devices, gathered."""
        if not self.is_stored:
            raise TypeError(
                f"{transform} sorts whole rows, but these logits of shape {self.shape} are not stored: "
                f"{instead}write logits.dense()"
            )
        x = self.logits.astype(self.dtype)
        sharding = jax.typeof(x).sharding
        return moved(sharding.mesh, x, P(*sharding.spec[:-1])) if any(sharding.spec[-1:]) else x

    def per_row(self, name: str, value: Any) -> Float[Array, "*rows"]:
        """A number, or an array that broadcasts to `[*rows]`, as `[*rows]`."""
        if _checks.is_concrete_number(value):
            value = jnp.asarray(value, self.dtype)
        _checks.floating(name, value)
        _checks.broadcastable(name, value, self.rows, "one number per row of logits")
        return jnp.broadcast_to(value, self.rows).astype(self.dtype)

    def per_entry(self, name: str, value: Any) -> dict[str, tuple]:
        """`col_args` or `entry_args` of a map, for an array `[columns]` or `[*rows, columns]`."""
        if value.shape == (self.columns,):
            return {"col_args": (value,)}
        _checks.shape(name, value, self.shape, "the shape of the logits, or one axis: the columns")
        return {"entry_args": (value,)}

    def dense(self) -> Float[Array, "*rows columns"]:
        """Computes and stores all transformed logits, -inf for rejected entries."""
        if self.is_stored:
            return self.logits
        if isinstance(self.logits, LinearLogits):
            x = self.logits.dense()
        else:
            if self.logits.shards is not None:
                raise TypeError(
                    "dense() cannot store logits whose columns lie on several devices: use a function of rows"
                )
            x = self.logits.values
        stored = TransformedLogits(x.astype(self.dtype)).masked(self.where)
        return functools.reduce(_dense, self.maps, stored.logits)


def as_rows(logits: Logits | TransformedLogits, *, axis: int = -1, where: Any = None) -> TransformedLogits:
    """Any kind of logits as rows, checked: those along an axis, without what a mask takes out."""
    if not isinstance(logits, TransformedLogits):
        axis = check_axis(logits, axis)
        rows = logits if hasattr(logits, "shards") else jnp.moveaxis(jnp.asarray(logits), axis, -1)
        return TransformedLogits(rows).masked(unmasked(split_mask(where, logits.shape, axis)))
    if axis not in (-1, len(logits.rows)):
        raise ValueError(f"axis must be -1 for transformed logits of shape {logits.shape}, got {axis}")
    return logits.masked(unmasked(split_mask(where, logits.shape, len(logits.rows))))


def _dense(x: Array, step: Map) -> Array:
    cols = jnp.arange(x.shape[-1], dtype=jnp.int32)
    entry_args = [_with(x, e.dense() if isinstance(e, LinearLogits) else e) for e in step.entry_args]
    return _mapped(x, cols, step.function, step.direct, step.args, step.col_args, entry_args)


def _with(x: Array, entries: Array) -> Array:
    """Entries where the types of JAX want them: on the devices of the scores."""
    sharding = jax.typeof(x).sharding
    return moved(sharding.mesh, entries, sharding.spec) if any(sharding.spec) else entries


def _mapped(scores: Array, cols: Array, function, direct: bool, args, col_args, entry_args) -> Array:
    """A map of scores; absent entries remain absent, and take no part in its derivatives."""
    args = (*(a[..., None] for a in args), *col_args, *entry_args)
    if direct:
        return function(scores, cols, *args)
    keep = scores != -jnp.inf
    y = function(jnp.where(keep, scores, 0), cols, *args)
    return jnp.where(keep, y.astype(scores.dtype), -jnp.inf)


def after(maps: tuple[Map, ...], reduction: RowReduction) -> RowReduction:
    """A reduction of the mapped scores."""
    functions = tuple((m.function, m.direct) for m in maps)
    counts = tuple((len(m.col_args), len(m.entry_args)) for m in maps)
    plain = reduction._replace(args=(), col_args=(), entry_args=())
    return _after_functions(plain, functions, counts)._replace(
        args=(tuple(m.args for m in maps), *reduction.args),
        col_args=(*(a for m in maps for a in m.col_args), *reduction.col_args),
        entry_args=(*(a for m in maps for a in m.entry_args), *reduction.entry_args),
    )


@functools.cache
def _after_functions(reduction: RowReduction, functions: tuple, counts: tuple) -> RowReduction:
    def mapped(tile: Tile, args) -> Tile:
        scores, col_args, entry_args = tile.scores, tile.col_args, tile.entry_args
        for (function, direct), own, (c, e) in zip(functions, args, counts):
            scores = _mapped(scores, tile.cols, function, direct, own, col_args[:c], entry_args[:e])
            col_args, entry_args = col_args[c:], entry_args[e:]
        return tile._replace(col_args=col_args, entry_args=entry_args).with_scores(scores)

    def init(like, maps, *args):
        return reduction.init(like, *args)

    def update(state, tile, maps, *args):
        return reduction.update(state, mapped(tile, maps), *args)

    def merge(a, b, maps, *args):
        return reduction.merge(a, b, *args)

    def finalize(state, maps, *args):
        return reduction.finalize(state, *args)

    def share(state, tile, maps, *args):
        return shares(reduction, state, mapped(tile, maps), *args)

    return RowReduction(init, update, merge, finalize, reduction.neutral, share)
