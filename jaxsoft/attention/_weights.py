"""The last pass of an attention: a normalizer's statistics and its weighted values, as one reduction."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._numerics import accumulation_dtype
from jaxsoft.attention import _driver
from jaxsoft.attention._driver import Masks, Operands, Plan
from jaxsoft.normalizers._normalizer import Normalizer, after, changed, per_row
from jaxsoft.normalizers.stochastic import random_bits
from jaxsoft.rows._driver import shares
from jaxsoft.rows._reduction import RowReduction, is_reduction


class WeightedState(NamedTuple):
    """The state of a normalizer's statistics, and `sum_j terms(x_j)[a] v_j` for each of its terms."""

    statistics: Any
    values: tuple


@functools.cache
def weighted_values(normalizer: Normalizer, width: int) -> RowReduction:
    """The reduction of a normalizer (without its arrays) over tiles whose `col_args` are the values."""
    statistics = normalizer.statistics

    def init(like, params):
        state = () if statistics is None else statistics.init(like, params)
        return WeightedState(
            state, (jnp.broadcast_to(like[..., None], (*like.shape, width)),) * normalizer.size
        )

    def add(state, tile, params):
        terms = normalizer.terms(tile, state, params)
        (values,) = tile.col_args
        dtype = accumulation_dtype(values.dtype)
        return tuple(
            jnp.einsum(
                "...rs,...sv->...rv",
                t.astype(values.dtype),
                values,
                preferred_element_type=dtype,
            )
            for t in terms
        )

    def update(state, tile, params):
        tile = changed(normalizer.before, tile, params)
        new = () if statistics is None else statistics.update(state.statistics, tile, params)
        old_values = _moved(normalizer, state, new, params)
        return WeightedState(new, tuple(map(jnp.add, old_values, add(new, tile, params))))

    def merge(a, b, params):
        if statistics is None:
            return WeightedState((), tuple(map(jnp.add, a.values, b.values)))
        new = statistics.merge(a.statistics, b.statistics, params)
        return WeightedState(
            new, tuple(map(jnp.add, _moved(normalizer, a, new, params), _moved(normalizer, b, new, params)))
        )

    def finalize(state, params):
        coefficients = normalizer.coefficients(state.statistics, params)
        return functools.reduce(jnp.add, (c[..., None] * v for c, v in zip(coefficients, state.values)))

    def share(state, tile, params):
        tile = changed(normalizer.before, tile, params)
        own = [] if statistics is None else shares(statistics, state.statistics, tile, params)
        return [*own, *add(state.statistics, tile, params)]

    return RowReduction(init, update, merge, finalize, share=share)


def _moved(normalizer: Normalizer, state: WeightedState, new: Any, params: Any) -> tuple:
    if normalizer.rescale is None:
        return state.values
    factor = normalizer.rescale(state.statistics, new, params)[..., None]
    return tuple(factor * v for v in state.values)


@functools.cache
def _dropped(terms, rate: float):
    def after_dropout(tile, state, params):
        words = (params["drop0"][..., None], params["drop1"][..., None])
        bits = random_bits(words, params["drop_row"][..., None], tile.cols)
        keep = bits >= jnp.uint32(round(rate * 2**32))
        return tuple(jnp.where(keep, t / (1 - rate), 0) for t in terms(tile, state, params))

    return after_dropout


def with_dropout(normalizer: Normalizer, rate: float, words, rows: Array) -> Normalizer:
    """Drops weights at random, after normalization, and scales up the others. `rows` are the rows' numbers."""
    params = {
        "drop0": jnp.broadcast_to(words[0], rows.shape),
        "drop1": jnp.broadcast_to(words[1], rows.shape),
        "drop_row": rows,
    }
    return normalizer._replace(terms=_dropped(normalizer.terms, rate), params={**normalizer.params, **params})


class AttentionRows:
    """The rows of scores of an attention, as the definitions of normalizers see them (`DenseRows` for stored ones).

    Attributes:
      shape: of the rows, in blocks of queries: `[nq, B, K, R]`.
      dtype: of statistics and parameters.
    """

    def __init__(self, plan: Plan, operands: Operands, masks: Masks):
        self.plan, self.operands, self.masks = plan, operands, masks
        self.shape = plan.rows
        self.dtype = accumulation_dtype(operands.query.dtype, operands.key.dtype)

    def run(self, wanted: list[RowReduction]) -> list:
        """The states of reductions, one pass."""
        functions = tuple(r._replace(args=()) for r in wanted)
        return _driver.run(self.plan, functions, self.operands, self.masks, [r.args for r in wanted])

    def _without_values(self) -> AttentionRows:
        return AttentionRows(self.plan, self.operands._replace(value=None), self.masks)

    def reduce(self, wanted: Any) -> Any:
        """Runs row reductions over the scores, one pass."""
        leaves, treedef = jax.tree.flatten(wanted, is_leaf=is_reduction)
        states = self._without_values().run(leaves)
        return jax.tree.unflatten(treedef, [r.finalize(s, *r.args) for r, s in zip(leaves, states)])

    def state(self, normalizer: Normalizer) -> Any:
        """The state of a normalizer's statistics, one pass."""
        if normalizer.statistics is None:
            return ()
        statistics = after(normalizer.statistics, normalizer.before)
        return self.reduce(statistics._replace(args=(normalizer.params,)))

    def count(self) -> Array:
        """The number of visible keys of each query."""
        return _driver.count(self.plan, self.operands, self.masks)

    def detached(self) -> AttentionRows:
        """The same rows without their gradient."""
        return AttentionRows(self.plan, jax.lax.stop_gradient(self.operands), self.masks)

    def row_number(self) -> Array:
        """A number for each row that depends on batch, head and position only (uint32)."""
        p = self.plan
        heads = p.heads * p.groups
        numbers = jnp.arange(p.batch * heads * p.queries, dtype=jnp.uint32)
        return to_blocks(p, numbers.reshape(p.batch, heads, p.queries))

    def per_row(self, name: str, value: Any) -> Array:
        """A number, one a head, or an array that broadcasts to `[B, N, T]`, as rows in blocks."""
        p = self.plan
        if getattr(value, "ndim", 0) == 1:
            value = value[:, None]
        return to_blocks(p, per_row(name, value, (p.batch, p.heads * p.groups, p.queries), self.dtype))


def to_blocks(plan: Plan, rows: Array) -> Array:
    """`[B, N, T, ...]` as `[nq, B, K, R, ...]`, padded to whole blocks with the last row (0 may be no good value)."""
    rest = rows.shape[3:]
    # Cut in the order in which queries come: a kernel that puts the blocks back in this order copies nothing.
    rows = jnp.swapaxes(rows, 1, 2)
    pad = plan.nq * plan.bq - plan.queries
    if pad:
        rows = jnp.pad(rows, ((0, 0), (0, pad), (0, 0), *((0, 0) for _ in rest)), mode="edge")
    rows = rows.reshape(plan.batch, plan.nq, plan.bq, plan.heads, plan.groups, *rest)
    return jnp.moveaxis(rows, (1, 2), (0, 4)).reshape(*plan.rows, *rest)


def from_blocks(plan: Plan, blocks: Array) -> Array:
    """`[nq, B, K, R, ...]` as `[B, N, T, ...]`."""
    rest = blocks.shape[4:]
    blocks = blocks.reshape(plan.nq, plan.batch, plan.heads, plan.groups, plan.bq, *rest)
    rows = jnp.moveaxis(blocks, 0, 3).reshape(plan.batch, plan.heads * plan.groups, -1, *rest)
    return rows[:, :, : plan.queries]
