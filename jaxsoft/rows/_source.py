"""`Source`: the interface through which a pass reads the rows of any kind of logits."""

from __future__ import annotations

import abc
from typing import Any, Self

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._trees import as_varying
from jaxsoft.kernels.inner import Work
from jaxsoft.rows._shards import Shards


class Source(abc.ABC):
    """Rows of scores of one kind: `LinearLogits`, `StoredLogits`, or a chunk of `weighted_sum`.

    Every kind is a frozen dataclass and a pytree whose array leaves are the operands of the scores. A score is

        finish(raw, softcap, bias, scale, temperature)

    where the raw score is either stored or an entry of `hidden @ weight`. The methods start with an underscore because
    `LinearLogits` is public; they are the interface between the modules of `jaxsoft.rows`. Passes read sources whose
    rows are flattened to one axis (`_flat`): n rows, per-row arrays of shape `[n]`.

    Attributes:
      kind: the name of the kind in the output of `jaxsoft.kernels.explain`.
      scale: multiplies the raw scores, `[n]` or `[]`; None for 1.
      bias: `[columns]`; None for 0.
      softcap: caps the scores, static; None for no cap.
      temperature: applied last, divides the scores, `[n]` or `[]`; None for 1.
      block_size: columns per block, if the user chose it.
      filter_eps: threshold of the gradient filter (see `linear_logits`); None for exact gradients.
      implementation: the one that the user requested, see `reduce_rows`.
      tape: in a chunk of `weighted_sum`, the object that runs its passes and records them; None elsewhere.
      shards: inside `shard_map`, how the columns lie on the mesh; None if all columns are here.
    """

    kind: str
    scale: Any
    bias: Any
    softcap: float | None
    temperature: Any
    block_size: int | None
    filter_eps: float | None
    implementation: str | None
    tape: Any
    shards: Shards | None

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`[*rows, columns]`, the columns of all shards."""

    @property
    @abc.abstractmethod
    def _width(self) -> int:
        """The number of columns of this shard."""

    def _aligned(self, axes: frozenset[str]) -> Self:
        """Inside `shard_map`, the source with arrays that vary over these mesh axes: see `align`."""
        return as_varying(self, axes)

    def _first(self) -> Any:
        """The index, in the whole row, of this shard's first column."""
        return 0 if self.shards is None else self.shards.first(self._width)

    @property
    @abc.abstractmethod
    def _accumulation_dtype(self) -> Any:
        """The dtype of the scores in a pass, and of statistics."""

    @abc.abstractmethod
    def _flat(self) -> Self:
        """The same logits with all leading axes flattened to one."""

    @abc.abstractmethod
    def _like(self) -> Array:
        """`[n]` zeros in the accumulation dtype, with the sharding and the varying axes of per-row results."""

    @abc.abstractmethod
    def _accumulates(self) -> Self:
        """The source with booleans for arrays: True if the array's gradient adds up over column blocks, in float32.

        The gradients of the other arrays are cut into blocks, and each block is written once.
        """

    @abc.abstractmethod
    def _mask_rows(self, keep: Array) -> Self:
        """Zeroes the operands of masked rows: a NaN there would spread through the matrix product."""

    @abc.abstractmethod
    def _raw_scores(self) -> Array | None:
        """The raw scores `[n, columns]` if they are stored, else None."""

    @abc.abstractmethod
    def _raw_block(self, start: Any, size: int, col_keep: Array | None) -> Array:
        """The raw scores of columns `start : start + size`; any finite values in columns outside `col_keep`."""

    @abc.abstractmethod
    def _default_block_size(self, rows: int) -> int:
        """Columns per block for a pass over this number of rows."""

    @abc.abstractmethod
    def _work(self) -> Work:
        """The size of a pass, used to choose a kernel and to look up its block sizes."""

    @abc.abstractmethod
    def _affine(self) -> Any:
        """The logits as a `LinearLogits` affine in `hidden`, with closed forms for sums over columns; or None."""

    def _bias_block(self, start: Any, size: int, col_keep: Array | None) -> Array | None:
        """The biases of a block of columns, with 0 for masked columns."""
        if self.bias is None:
            return None
        block = cut(self.bias, start, size, 0).astype(self._accumulation_dtype)
        return block if col_keep is None else jnp.where(col_keep, block, 0)

    def _block(self, start: Any, size: int, col_keep: Array | None) -> Array:
        """The scores of a block of columns."""
        raw, bias = self._raw_block(start, size, col_keep), self._bias_block(start, size, col_keep)
        return finish(raw, self.softcap, bias, self.scale, self.temperature)


def finish(raw: Array, softcap: float | None, bias: Any, scale: Any, temperature: Any) -> Array:
    """Applies scale, bias, softcap and temperature to raw scores, elementwise."""
    x = raw
    if scale is not None:
        x = x * scale[..., None].astype(x.dtype)
    if bias is not None:
        x = x + bias
    if softcap is not None:
        x = capped(x, softcap)
    if temperature is not None:
        temperature = temperature[..., None].astype(x.dtype)
        if bias is None:
            return x / temperature
        # A column with bias -inf is absent: its score must not enter the gradient of the temperature.
        absent = x == -jnp.inf
        x = jnp.where(absent, -jnp.inf, jnp.where(absent, 0, x) / temperature)
    return x


def capped(x: Array, cap: Any) -> Array:
    """`cap * tanh(x / cap)`; an absent entry (-inf) stays absent."""
    absent = x == -jnp.inf
    return jnp.where(absent, -jnp.inf, cap * jnp.tanh(jnp.where(absent, 0, x) / cap))


def cut(a: Array, start: Any, size: int, axis: int) -> Array:
    """`a[start : start + size]` along `axis`; `a` itself if that is the whole axis."""
    if a.shape[axis] == size:
        return a
    return lax.dynamic_slice_in_dim(a, start, size, axis)
