"""Normalizers of your own.

The weights are functions of a score and of statistics of its row, in a form that streams (`Normalizer`). `defined_by`
attaches this form to a public function, which attention then accepts as its normalizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, is_present
from jaxsoft.rows import RowReduction, Tile, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis, check_dense, rows_of, shares

Params = dict[str, Any]


class Normalizer(NamedTuple):
    """The last pass over a row of scores: weights `y_j = sum_a coefficients(state)[a] * terms(x_j)[a]`.

    Everything about the row that is not in `state` (a temperature, a threshold, the log-sum-exp of an earlier pass)
    is in `params`, one number per row. The plain function evaluates the formula; attention carries the sums
    `sum_j terms(x_j)[a] v_j` beside the state and multiplies by the coefficients at the end, so that neither
    scores nor weights are ever stored. No derivative is needed: see `RowReduction`.

    Attributes:
      statistics: the reduction of this pass, its functions called as `f(..., params)`; its state may start with a
        gauge. None if there are no statistics.
      terms: `(tile, state, params) -> tuple of [*rows, block]`, 0 for absent entries; reads nothing of the state but
        its gauge.
      coefficients: `(state, params) -> tuple of [*rows]`, one for each term.
      rescale: `(old state, new state, params) -> [*rows]`, the factor of old terms when the gauge moves; None without
        a gauge.
      before: `(tile, params) -> tile`, applied in turn to the scores (a temperature, a perturbation, a selection).
      params: a dict of arrays `[*rows]`; differentiable where floating.
      size: the number of terms.
      support: `(tile, params) -> [*rows, block]` booleans after `before`, True for a NaN: an entry outside has no term
        and adds nothing to the statistics (nor do its derivatives). Attention then leaves out blocks of keys in which
        no query has a supported entry. None: every entry is.
      within: `[*rows, blocks]` booleans for the blocks of a `Survey`, False where no entry of a row's block has a term
        or adds to the statistics (nor do their derivatives): such blocks need not be read. None: all may.
    """

    statistics: RowReduction | None
    terms: Callable[[Tile, Any, Params], tuple[Array, ...]]
    coefficients: Callable[[Any, Params], tuple[Array, ...]]
    rescale: Callable[[Any, Any, Params], Array] | None = None
    before: tuple[Callable[[Tile, Params], Tile], ...] = ()
    params: Any = {}  # noqa: RUF012 (never changed in place)
    size: int = 1
    support: Callable[[Tile, Params], Array] | None = None
    within: Any = None

    def preceded_by(self, function: Callable[[Tile, Params], Tile], **params) -> Normalizer:
        """The same weights for changed scores: `function` is applied before everything else."""
        return self._replace(before=(function, *self.before), params={**self.params, **params})

    def functions(self) -> Normalizer:
        """The normalizer without its arrays: the hashable part, on which a compiled program depends."""
        return self._replace(params=(), within=None)


class Survey(NamedTuple):
    """What one pass tells about rows, before a search for a threshold reads them again and again.

    Attributes:
      count: `[*rows]`, the number of present entries, or more: entries of -inf may be counted.
      largest: `[*rows, k]`, entries of each row, its largest among them; -inf where there are fewer.
      others: `[*rows]`, no other entry of the row is larger.
      blocks: `[*rows, blocks]`, the largest entry of each block of columns, -inf for one without; None where the rows
        are not read in blocks. `rows.narrowed` takes booleans of this shape.
    """

    count: Array
    largest: Array
    others: Array
    blocks: Any = None


def plain_survey(rows: Any) -> Survey:
    """The survey of rows that are not read in blocks: only the largest entry."""
    top, count = rows.reduce((reductions.maximum(), reductions.count()))
    return Survey(count, top[..., None], top)


# A definition is a function `define(rows, **options) -> Normalizer`. It may first ask for statistics of the rows
# (`rows.reduce`, each call a pass); it returns the last pass. `rows` is one of
#   DenseRows, below: stored scores;
#   the rows of an attention: query @ key, never stored.


def defined_by(define: Callable[..., Normalizer]) -> Callable:
    """Attaches a definition to a public function, so that attention can stream the normalizer.

    Args:
      define: `(rows, **options) -> Normalizer`, with the options of the function. `rows.reduce(reductions)` runs row
        reductions over the scores (each call a pass), `rows.count()` counts the entries, `rows.per_row(name, value)`
        broadcasts an option to the shape of the rows, `rows.detached()` gives the same rows without gradient.

    Returns:
      A decorator, which returns the function itself.

    Raises:
      TypeError: `define` is not callable.

    Example:
      >>> # Weights that fall off linearly below the largest score.
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.attention import dot_product_attention
      >>> from jaxsoft.normalizers import Normalizer, defined_by
      >>> from jaxsoft.rows import reductions
      >>> def terms(tile, state, params):
      ...     return (jnp.where(tile.keep, jax.nn.relu(1 + tile.x - params["top"][..., None]), 0),)
      >>> def coefficients(state, params):
      ...     return (jnp.ones_like(params["top"]),)
      >>> def define(rows):
      ...     return Normalizer(None, terms, coefficients, params={"top": rows.reduce(reductions.maximum())})
      >>> @defined_by(define)
      ... def tent(scores, *, axis=-1, where=None):
      ...     return jax.nn.relu(1 + scores - jnp.max(scores, axis, where=where, initial=-jnp.inf, keepdims=True))
      >>> x = jnp.linspace(-1, 1, 24).reshape(1, 6, 2, 2)
      >>> dot_product_attention(x, x, x, normalizer=tent).shape
      (1, 6, 2, 2)
    """
    if not callable(define):
        raise TypeError(f"define must be a function, got {_checks.describe(define)}")

    def mark(function: Callable) -> Callable:
        function.define = define
        return function

    return mark


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseRows:
    """Stored scores, in the form that definitions read: a pytree.

    Attributes:
      scores: the scores.
      where: booleans that broadcast to the scores, or None.
      axis: the axis that holds a row, counted from the front.
    """

    scores: Array
    where: Any
    axis: int = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """`[*rows]`."""
        return rows_of(self.scores.shape, self.axis)

    @property
    def dtype(self) -> Any:
        """The dtype of statistics and parameters."""
        return accumulation_dtype(self.scores.dtype)

    def reduce(self, wanted: Any) -> Any:
        """Runs row reductions in one pass."""
        return reduce_rows(self.scores, wanted, axis=self.axis, where=self.where)

    def state(self, normalizer: Normalizer) -> Any:
        """The state of a normalizer's statistics, in one pass."""
        if normalizer.statistics is None:
            return ()
        statistics = after(normalizer.statistics, normalizer.before)
        return self.reduce(statistics._replace(args=(normalizer.params,)))

    def count(self) -> Array:
        """The number of present entries of each row."""
        return self.reduce(reductions.count())

    def survey(self) -> Survey:
        """What one pass tells about the rows."""
        return plain_survey(self)

    def detached(self) -> DenseRows:
        """The same rows without gradient."""
        return dataclasses.replace(self, scores=lax.stop_gradient(self.scores))

    def row_number(self) -> Array:
        """A number for each row, `[*rows]` uint32."""
        n = functools.reduce(lambda a, b: a * b, self.shape, 1)
        return jnp.arange(n, dtype=jnp.uint32).reshape(self.shape)

    def per_row(self, name: str, value: Any) -> Array:
        """A number, or an array that broadcasts to `[*rows]`, as `[*rows]`."""
        return per_row(name, value, self.shape, self.dtype)

    def weights(self, normalizer: Normalizer) -> Array:
        """The weights, in the shape and dtype of the scores."""
        state = self.state(normalizer)
        x = jnp.moveaxis(self.scores, self.axis, -1).astype(self.dtype)
        where = self.where
        if where is not None:
            where = jnp.moveaxis(jnp.broadcast_to(where, self.scores.shape), self.axis, -1)
        cols = jnp.arange(x.shape[-1], dtype=jnp.int32)
        tile = Tile.of(jnp.where(is_present(x, where), x, -jnp.inf), cols, x.shape[-1])
        tile = changed(normalizer.before, tile, normalizer.params)
        terms = normalizer.terms(tile, state, normalizer.params)
        coefficients = normalizer.coefficients(state, normalizer.params)
        y = functools.reduce(jnp.add, (c[..., None] * t for c, t in zip(coefficients, terms)))
        y = jnp.where(tile.keep, y, 0).astype(self.scores.dtype)
        return jnp.moveaxis(y, -1, self.axis)


def normalize(define: Callable, scores: Array, axis: int, where: Any, name: str, **options) -> Array:
    """The weights that a definition gives to stored scores."""
    check_dense(scores, name)
    rows = DenseRows(scores, where, check_axis(scores, axis))
    return rows.weights(define(rows, **options))


def per_row(name: str, value: Any, rows: tuple[int, ...], dtype: Any) -> Array:
    """A number, or an array that broadcasts to `rows`, as an array of shape `rows`."""
    if _checks.is_concrete_number(value):
        value = jnp.asarray(value, dtype)
    _checks.floating(name, value)
    _checks.broadcastable(name, value, rows, "one number per row of scores")
    return jnp.broadcast_to(value, rows).astype(dtype)


def changed(before: tuple[Callable, ...], tile: Tile, params: Params) -> Tile:
    """The tile after the functions of `Normalizer.before`."""
    for function in before:
        tile = function(tile, params)
    return tile


# The reductions that run a normalizer's statistics. They are cached: compiled programs are cached by the identity of a
# reduction's functions.


@functools.cache
def after(statistics: RowReduction, before: tuple[Callable, ...]) -> RowReduction:
    """The statistics of the scores after `before`; the result is the state."""

    def update(state, tile, params):
        return statistics.update(state, changed(before, tile, params), params)

    def share(state, tile, params):
        return shares(statistics, state, changed(before, tile, params), params)

    return statistics._replace(update=update, share=share, finalize=_state)


@functools.cache
def together(*reductions: RowReduction) -> RowReduction:
    """Several reductions (without arrays of their own) as one, whose state is the tuple of theirs."""

    def init(like, *args):
        return tuple(r.init(like, *args) for r in reductions)

    def update(state, tile, *args):
        return tuple(r.update(s, tile, *args) for r, s in zip(reductions, state))

    def merge(a, b, *args):
        return tuple(r.merge(x, y, *args) for r, x, y in zip(reductions, a, b))

    def neutral(state):
        return tuple(r.neutral(s) for r, s in zip(reductions, state))

    def share(state, tile, *args):
        return [leaf for r, s in zip(reductions, state) for leaf in shares(r, s, tile, *args)]

    return RowReduction(init, update, merge, _state, neutral, share)


def _state(state, *args):
    return state
