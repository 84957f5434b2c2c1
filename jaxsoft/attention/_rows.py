"""The rows of attention scores, in blocks, in the form that definitions of normalizers use."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._numerics import accumulation_dtype
from jaxsoft.attention._blocks import recut, recut_rows, to_blocks
from jaxsoft.attention._run import for_xla, kernel_of, run
from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility
from jaxsoft.attention._survey import LARGEST, MOST_BLOCKS, block_maxima
from jaxsoft.attention._visibility import any_of, count
from jaxsoft.normalizers import Normalizer
from jaxsoft.normalizers.inner import Survey, after, per_row, plain_survey
from jaxsoft.rows import RowReduction, reductions
from jaxsoft.rows.inner import is_reduction


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionRows:
    """The rows of attention scores, in the form that definitions of normalizers use (for stored scores: `DenseRows`).

    A pytree, whose arrays are the inputs and the masks.
    """

    spec: AttentionSpec = dataclasses.field(metadata=dict(static=True))
    inputs: Inputs
    masks: Visibility

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of per-row arrays, in query blocks: `[nq, B, K, R]`."""
        return self.spec.rows

    @property
    def dtype(self) -> Any:
        """The dtype of statistics and parameters."""
        return accumulation_dtype(self.inputs.query.dtype, self.inputs.key.dtype)

    def run(self, wanted: list[RowReduction], refused: dict[str, str] | None = None) -> list:
        """The states of row reductions, in one pass; `refused` says why other implementations do not run it."""
        functions = tuple(r._replace(args=()) for r in wanted)
        return run(self.spec, functions, self.inputs, self.masks, [r.args for r in wanted], refused)

    def _without_values(self) -> Self:
        return dataclasses.replace(self, inputs=self.inputs._replace(value=None))

    def reduce(self, wanted: Any) -> Any:
        """The results of row reductions over the scores, in one pass."""
        leaves, treedef = jax.tree.flatten(wanted, is_leaf=is_reduction)
        states = self._without_values().run(leaves)
        return jax.tree.unflatten(treedef, [r.finalize(s, *r.args) for r, s in zip(leaves, states)])

    def survey(self) -> Survey:
        """What one pass tells about the rows; about blocks only where XLA runs it, in blocks of its own."""
        spec, plain = self.spec, (reductions.maximum(), reductions.count())
        if kernel_of(spec, plain, self._without_values().inputs, self.masks) or for_xla(spec) != spec:
            return plain_survey(self)
        per = self._blocks_per_group()
        in_blocks = block_maxima(-(-spec.nk // per), per * spec.bk, spec.key_offset)
        (largest, others), blocks = self.reduce((LARGEST, in_blocks))
        return Survey(self.count(), largest, others, blocks)

    def _blocks_per_group(self) -> int:
        """Key blocks whose largest entries a survey keeps as one."""
        return max(-(-self.spec.nk // MOST_BLOCKS), 1)

    def narrowed(self, within: Array) -> Self:
        """The same rows, of which only the blocks have to be read where `within` is True (see `Survey.blocks`)."""
        rows = jnp.moveaxis(within, (0, -1), (-2, -1))
        needed = any_of(rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:]))
        needed = jnp.repeat(needed, self._blocks_per_group(), axis=1)[:, : self.spec.nk]
        return dataclasses.replace(self, masks=self.masks._replace(needed=needed))

    def state(self, normalizer: Normalizer) -> Any:
        """The state of a normalizer's statistics, in one pass."""
        if normalizer.statistics is None:
            return ()
        statistics = after(normalizer.statistics, normalizer.before)
        return self.reduce(statistics._replace(args=(normalizer.params,)))

    def count(self) -> Array:
        """The number of visible keys per query."""
        cut = for_xla(self.spec)
        if cut == self.spec:
            return count(self.spec, self.inputs, self.masks)
        inputs, masks, _ = recut(self.spec, cut, self.inputs, self.masks, [])
        return recut_rows(cut, self.spec, count(cut, inputs, masks))

    def detached(self) -> Self:
        """The same rows without gradient, to be reduced."""
        rows = self._without_values()
        return dataclasses.replace(rows, inputs=jax.lax.stop_gradient(rows.inputs))

    def row_number(self) -> Array:
        """One uint32 number per row, which depends only on batch element, head and query index."""
        p = self.spec
        heads = p.heads * p.groups
        numbers = jnp.arange(p.batch * heads * p.queries, dtype=jnp.uint32)
        return to_blocks(p, numbers.reshape(p.batch, heads, p.queries))

    def query_number(self) -> Array:
        """One uint32 number per row, its query index: the same for all batch elements and heads."""
        p = self.spec
        numbers = jnp.arange(p.queries, dtype=jnp.uint32)
        return to_blocks(p, jnp.broadcast_to(numbers, (p.batch, p.heads * p.groups, p.queries)))

    def per_row(self, name: str, value: Any) -> Array:
        """A number, one number per head, or an array that broadcasts to `[B, N, T]`, as a per-row array in blocks."""
        p = self.spec
        if getattr(value, "ndim", 0) == 1:
            value = value[:, None]
        return to_blocks(p, per_row(name, value, (p.batch, p.heads * p.groups, p.queries), self.dtype))
