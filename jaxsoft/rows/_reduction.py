"""`RowReduction`: a streaming statistic of a row of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft._numerics import is_present
from jaxsoft._trees import partition

State = Any


class Tile(NamedTuple):
    """A block of columns of the scores, as a reduction sees it.

    Attributes:
      x: the scores, `[*rows, block]`, in the accumulation dtype, with 0 for absent entries.
      scores: the scores with -inf for absent entries.
      keep: `[*rows, block]` booleans; False marks an absent entry (masked, or a score of `-inf`).
      cols: int32, the column index of each entry in the whole row: `[block]`, or any shape that broadcasts to the
        scores.
      columns: the number of columns of the whole row (static).
      col_args: the reduction's `col_args`, each cut to `[block, ...]`.
      entry_args: the reduction's `entry_args`, each cut to `[*rows, block]`.
      where: booleans that broadcast to the scores, False for masked entries; None if no entry is masked. `second_row`
        applies the same mask.
      in_kernel: whether the tile is in the registers of a kernel, where gathers and sorting are unavailable (static).
      finished: whether the state it meets is finished, so that its gauge no longer changes (static).
    """

    x: jax.Array
    scores: jax.Array
    keep: jax.Array
    cols: jax.Array
    columns: int
    col_args: tuple[jax.Array, ...] = ()
    entry_args: tuple[jax.Array, ...] = ()
    where: Any = None
    in_kernel: bool = False
    finished: bool = False

    @classmethod
    def of(
        cls,
        scores: jax.Array,
        cols: jax.Array,
        columns: int,
        col_args=(),
        entry_args=(),
        where=None,
        *flags: bool,
    ) -> Tile:
        """The tile of scores; an entry is absent if `where` masks it or its score is -inf."""
        # Without a mask, the scores are left as they are: XLA's reductions on the CPU do not fuse a select.
        scores = scores if where is None else jnp.where(where, scores, -jnp.inf)
        keep = is_present(scores, None)
        x = jnp.where(keep, scores, 0)
        return cls(x, scores, keep, cols, columns, col_args, entry_args, where, *flags)

    def with_scores(self, scores: jax.Array) -> Tile:
        """The same tile with other scores, in which -inf marks the absent entries."""
        return Tile.of(scores, *self[3:])

    def second_row(self, i: int = 0) -> Tile:
        """The tile of the scores in `entry_args[i]`: the same mask, but its own entries of -inf."""
        return self.with_scores(self.entry_args[i].astype(self.x.dtype))

    def with_values(self, x: jax.Array) -> Tile:
        """The same tile with other scores for the present entries."""
        return self._replace(x=jnp.where(self.keep, x, 0), scores=jnp.where(self.keep, x, -jnp.inf))

    def sum(self, values: jax.Array) -> jax.Array:
        """Sums `values` over the present entries."""
        return jnp.sum(jnp.where(self.keep, values, 0), axis=-1)

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """`sum_j a_j b_j` of two arrays of the tile's shape."""
        if self.in_kernel:
            return jnp.sum(a * b, axis=-1)
        return jnp.einsum("...j,...j->...", a, b)  # on a CPU, half the time of the sum of a product

    def at(self, values: jax.Array, columns: jax.Array) -> jax.Array:
        """The entries of `values` at `columns` (`[*rows]` or `[*rows, k]`), 0 for columns in other tiles."""
        if self.in_kernel:
            return self.at_by_comparison(values, columns)
        size = self.cols.shape[0]
        local = columns - self.cols[0]
        inside = (local >= 0) & (local < size)
        local = jnp.clip(local, 0, size - 1)
        if columns.ndim < values.ndim:
            found = jnp.take_along_axis(values, local[..., None], axis=-1)[..., 0]
        else:
            found = jnp.take_along_axis(values, local, axis=-1)
        return jnp.where(inside, found, 0)

    def at_by_comparison(self, values: jax.Array, columns: jax.Array) -> jax.Array:
        """`at` without a gather, so that its gradient has no scatter."""
        if columns.ndim < values.ndim:
            return jnp.sum(jnp.where(self.cols == columns[..., None], values, 0), axis=-1)
        each = [self.at_by_comparison(values, columns[..., i]) for i in range(columns.shape[-1])]
        return jnp.stack(each, axis=-1)


def _add_states(a: State, b: State, *args) -> State:
    del args
    return jax.tree.map(jnp.add, a, b)


def _zero_state(state: State) -> State:
    return jax.tree.map(jnp.zeros_like, state)


def _identity(state: State, *args) -> Any:
    del args
    return state


class RowReduction(NamedTuple):
    """A streaming statistic of a row of scores, as a tuple of pure functions.

    The scores arrive in blocks of columns. `init` creates the state of an empty row, `update` adds a block to it,
    `merge` joins the states of two parts of a row, `finalize` turns a state into the statistic. The drivers
    run these functions over dense scores, over `hidden @ weight` that is never stored, over shards and inside
    kernels. A reduction need not know which, and needs no derivative: the drivers get it from `update`.

    The derivative rests on one fact. Apart from its reference exponent (a *gauge*, such as a running maximum,
    which cancels in `finalize`), a state is a sum over the columns. So the derivative of a finished state is
    the sum over blocks of the derivative of `update` started from the empty state in the finished gauge:
    `neutral(state)`. Three rules follow for a user's reduction:

    * a gauge goes through `stop_gradient` in `update`, and `neutral` keeps it (`(m, s) -> (m, 0)`);
    * every other float leaf adds up over columns, in units of the gauge;
    * a *selection* (a maximum, a top-k), whose state consists of entries of the row, gives its `share` instead.

    Functions must be module-level or cached (they are compared by identity when a compiled program is looked
    up, so a new lambda compiles again). Arrays that they need go into `args`, `col_args` or `entry_args`, never
    into a closure; floating arrays in all three are differentiable.

    Attributes:
      init: `(like, *args) -> state`; `like` is a `[*rows]` array of zeros in the accumulation dtype.
      update: `(state, tile, *args) -> state`, see `Tile`. Absent entries must add nothing.
      merge: `(a, b, *args) -> state` of two disjoint parts of a row, `a` holding the lower columns; adds by
        default.
      finalize: `(state, *args) -> result`; the state itself by default.
      neutral: `state -> state`, the empty state in the gauge of a finished one; zeros by default.
      share: `(state, tile, *args) -> leaves`, a list of the float leaves of the state (in the order of
        `jax.tree.leaves`) as functions of one tile; only their derivative is used, and it must be the tile's
        share of the finished state's. By default that of `update(neutral(state), tile, *args)`.
      closed_form: `(reduction, logits, col_keep, row_keep) -> state` for logits that are affine in `hidden`, or
        None if streaming is better: computes a sum over columns outside the stream (its gradient then consists of
        low-rank matrix products). Optional, only an optimization.
      support: `(tile, *args) -> [*rows, block]` booleans, True for a NaN; an entry outside adds nothing to the state,
        and nor does its derivative. Attention leaves out blocks without a supported entry. Optional, only an
        optimization.
      args: arrays with the rows' leading axes, `[*rows, ...]`, or trees of them.
      col_args: arrays with one leading axis over the columns, `[columns, ...]`.
      entry_args: arrays of the scores' shape, `[*rows, columns]`, or `linear_logits` of that shape, which are
        never stored either: a second row of scores, read together with the first. `Tile.second_row` gives its tile.

    Example (the sum of softplus(x - theta) over each row, with its gradients for the scores and for theta):

      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.rows import RowReduction, reduce_rows
      >>> def init(like, theta):
      ...     return like
      >>> def update(state, tile, theta):
      ...     return state + tile.sum(jax.nn.softplus(tile.x - theta[..., None]))
      >>> def hinge_mass(theta):
      ...     return RowReduction(init, update, args=(theta,))
      >>> x, theta = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([1.0])
      >>> print(reduce_rows(x, hinge_mass(theta)).round(4))
      [2.3197]
      >>> print(jax.grad(lambda t: reduce_rows(x, hinge_mass(t)).sum())(theta).round(4))
      [-1.5]
    """

    init: Callable[..., State]
    update: Callable[..., State]
    merge: Callable[..., State] = _add_states
    finalize: Callable[..., Any] = _identity
    neutral: Callable[[State], State] = _zero_state
    share: Callable[..., list[jax.Array]] | None = None
    closed_form: Callable[..., State | None] | None = None
    support: Callable[..., jax.Array] | None = None
    args: tuple[Any, ...] = ()
    col_args: tuple[Any, ...] = ()
    entry_args: tuple[Any, ...] = ()


def is_reduction(x: Any) -> bool:
    """Whether `x` is a `RowReduction` (a leaf of a tree of reductions)."""
    return isinstance(x, RowReduction)


class Arrays(NamedTuple):
    """The arrays of one reduction, separate from its functions; `entry_args` may hold expressions."""

    args: tuple
    col_args: tuple
    entry_args: tuple


def arrays_of(reduction: RowReduction, rows: tuple[int, ...], columns: int) -> Arrays:
    """The arrays of a reduction, with their shapes checked."""
    for a in jax.tree.leaves(reduction.args):
        if a.shape[: len(rows)] != rows:
            raise ValueError(
                f"args of a reduction must have leading axes {rows} (the rows), got shape {a.shape}"
            )
    for a in reduction.col_args:
        if a.shape[:1] != (columns,):
            raise ValueError(
                f"col_args of a reduction must have {columns} columns as first axis, got shape {a.shape}"
            )
    for a in reduction.entry_args:
        if a.shape != (*rows, columns):
            raise ValueError(f"entry_args of a reduction must have shape {(*rows, columns)}, got {a.shape}")
    return Arrays(tuple(reduction.args), tuple(reduction.col_args), tuple(reduction.entry_args))


def shares(reduction: RowReduction, state, tile: Tile, *args) -> list[jax.Array]:
    """A tile's share of the float leaves of a finished state, as `RowReduction.share` gives it."""
    tile = tile._replace(finished=True)
    if reduction.share is not None:
        return reduction.share(state, tile, *args)
    return jax.tree.leaves(partition(reduction.update(reduction.neutral(state), tile, *args))[0])


def block_sums(functions, states, tiles: list[Tile], args: list[tuple]) -> list:
    """A block's share of the float leaves of finished states; only its derivative is valid, not its value."""
    return [
        jax.tree.unflatten(jax.tree.structure(partition(state)[0]), shares(r, state, tile, *a))
        for r, state, tile, a in zip(functions, states, tiles, args)
    ]
