"""Kinds of logits: stored arrays, and the never-stored expression `hidden @ weight`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft._trees import as_varying, varying_axes
from jaxsoft.kernels.inner import BLOCK_SCORES, IMPLEMENTATIONS, Work, device, evenly
from jaxsoft.rows._product import product
from jaxsoft.rows._shards import Shards, check_axis_name, check_sharding
from jaxsoft.rows._source import Source, cut

# Default block of logits on a CPU: about `_CPU_BLOCK_SCORES` entries, which bounds the temporary memory for any number
# of rows, and at most `_CPU_WIDEST` columns (measured, docs/architecture.md). Elsewhere, only `BLOCK_SCORES` bounds it.
_CPU_BLOCK_SCORES = 2**21
_CPU_WIDEST = 512
_NARROWEST = 128

# What to write instead of methods of arrays
_ROWS = "jaxsoft.reduce_rows(logits, jaxsoft.rows.reductions.{}())"
_INSTEAD = {
    "sum": _ROWS.format("sum"),
    "mean": _ROWS.format("mean"),
    "var": _ROWS.format("moments"),
    "std": _ROWS.format("moments"),
    "argsort": "jaxsoft.top_k(logits, k)",
    "sort": "jaxsoft.top_k(logits, k)",
    "reshape": "linear_logits of the reshaped hidden",
    "astype": "linear_logits(hidden, weight, dtype=...)",
    "at": "the bias of linear_logits, or where in the function that reads the rows",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearLogits(Source):
    """The logits `softcap(scale * (hidden @ weight) + bias) / temperature`, as an expression.

    Nothing is computed until a function reads the rows, and then block by block. Created by `linear_logits`. It is a
    pytree, so it passes through `jit`, `grad` (also as the argument to differentiate), `vmap` and `scan` like an
    array. Dividing or multiplying it by a positive number changes `temperature`. Its `dtype` is that of the matrix
    products, and of `dense()`.
    """

    hidden: Any
    weight: Any
    bias: Any
    scale: Any
    temperature: Any
    softcap: float | None = dataclasses.field(metadata=dict(static=True))
    transpose_weight: bool = dataclasses.field(metadata=dict(static=True))
    block_size: int | None = dataclasses.field(metadata=dict(static=True))
    filter_eps: float | None = dataclasses.field(metadata=dict(static=True))
    precision: Any = dataclasses.field(metadata=dict(static=True))
    dtype: Any = dataclasses.field(metadata=dict(static=True))
    implementation: str | None = dataclasses.field(metadata=dict(static=True))
    hidden_sharding: Any = dataclasses.field(default=None, metadata=dict(static=True))
    weight_sharding: Any = dataclasses.field(default=None, metadata=dict(static=True))
    shards: Shards | None = dataclasses.field(default=None, metadata=dict(static=True))

    kind = "linear"
    tape = None
    # `(logits, name, axis) -> result` of the reduction of that name; `_statistics` sets it: reductions read expressions
    _reduced: ClassVar[Callable[..., Array]]

    @property
    def vocab_size(self) -> int:
        """The number of columns, those of all shards inside `shard_map`."""
        return self._width if self.shards is None else self.shards.total

    @property
    def _width(self) -> int:
        return self.weight.shape[0 if self.transpose_weight else 1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape the dense logits would have, `[*rows, vocab]`."""
        return (*self.hidden.shape[:-1], self.vocab_size)

    @property
    def ndim(self) -> int:
        """The number of axes of `shape`."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries the dense logits would have."""
        return math.prod(self.shape)

    def dense(self) -> Float[Array, "*rows vocab"]:
        """Computes and stores all logits, in `dtype` (accumulated in at least float32)."""
        if self.shards is not None and self.shards.columns:
            raise TypeError(
                f"dense() cannot store the logits {self.shape}, because each device has the columns of one shard "
                f"(axis_name={self.shards.columns}): gather the weight, or use a function of rows"
            )
        x = self._flat()._block(0, self.vocab_size, None)
        return x.astype(self.dtype).reshape(self.shape)

    def argmax(self, axis: int) -> Int[Array, "*rows"]:
        """The column of the largest logit of each row, the first among equals; -1 for an empty row. `axis` is -1."""
        return self._reduced("argmax", axis)

    def max(self, axis: int) -> Float[Array, "*rows"]:
        """The largest logit of each row; -inf for an empty row. `axis` is -1."""
        return self._reduced("maximum", axis)

    def __repr__(self) -> str:
        if not hasattr(self.hidden, "shape") or not hasattr(self.weight, "shape"):  # a tree of other leaves
            return object.__repr__(self)
        given = {name: getattr(self, name) for name in ("bias", "scale", "temperature")}
        parts = [f"shape={self.shape}", f"dtype={self.dtype.name}", f"hidden={tuple(self.hidden.shape)}"]
        parts += [f"{name}={tuple(a.shape)}" for name, a in given.items() if hasattr(a, "shape")]
        options = ("softcap", "block_size", "filter_eps", "precision", "implementation")
        parts += [f"{name}={getattr(self, name)!r}" for name in options if getattr(self, name) is not None]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _scaled(self, temperature: Any) -> LinearLogits:
        new = temperature if self.temperature is None else self.temperature * temperature
        return dataclasses.replace(self, temperature=new)

    def __truediv__(self, temperature: Any) -> LinearLogits:
        """`logits / temperature`, a positive scalar or one number per row (`[*rows]` or `[*rows, 1]`)."""
        return self._scaled(
            row_scalar("temperature", temperature, self.shape[:-1], self.dtype, positive=True)
        )

    def __mul__(self, scale: Any) -> LinearLogits:
        """`logits * scale`, a positive scalar or one number per row (`[*rows]` or `[*rows, 1]`)."""
        return self._scaled(1 / row_scalar("scale", scale, self.shape[:-1], self.dtype, positive=True))

    __rmul__ = __mul__

    def _refuse(self, *args, **kwargs):
        raise TypeError(
            f"these logits of shape {self.shape} are an expression, not a stored array; functions of jaxsoft "
            "take them as they are, anything else needs the dense array: write logits.dense()"
        )

    __jax_array__ = __array__ = __getitem__ = __iter__ = __matmul__ = __pow__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __rtruediv__ = __rmatmul__ = __rpow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __abs__ = __mod__ = __floordiv__ = __len__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if hasattr(jax.Array, name) and not name.startswith("_"):
            instead = _INSTEAD.get(name, "a function of jaxsoft that reads rows")
            raise AttributeError(
                f"{type(self).__name__} has no {name}, because it is an expression, not a stored array: use "
                f"{instead}, or the dense array, logits.dense().{name}"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # The interface to passes (see Source); after _flat, hidden is [n, d] and per-row arrays are [n].

    def _flat(self) -> LinearLogits:
        n = math.prod(self.hidden.shape[:-1])

        def per_row(a):
            return a if a is None or a.ndim == 0 else a.reshape(n)

        return dataclasses.replace(
            self,
            hidden=self.hidden.reshape(n, self.hidden.shape[-1]),
            scale=per_row(self.scale),
            temperature=per_row(self.temperature),
        )

    def _varies_by_row(self) -> LinearLogits:
        """The expression with booleans for arrays: True if the array has one entry per row."""
        flags = jax.tree.map(lambda a: a.ndim > 0, self)
        return dataclasses.replace(flags, weight=False, bias=None if self.bias is None else False)

    def _mask_rows(self, keep: Array) -> LinearLogits:
        def per_row(a):
            return a if a is None or a.ndim == 0 else jnp.where(keep, a, 1)

        return dataclasses.replace(
            self,
            hidden=jnp.where(keep[..., None], self.hidden, 0),
            scale=per_row(self.scale),
            temperature=per_row(self.temperature),
        )

    @property
    def _accumulation_dtype(self):
        return accumulation_dtype(self.dtype)

    def _like(self) -> Array:
        return jnp.full_like(self.hidden[..., 0], 0, dtype=self._accumulation_dtype)

    def _accumulates(self) -> LinearLogits:
        present = jax.tree.map(lambda _: True, self)
        return dataclasses.replace(present, weight=False, bias=None if self.bias is None else False)

    def _weight_block(self, start, size: int, col_keep: Array | None) -> Array:
        """The columns `start : start + size` of the weight, with 0 in columns outside `col_keep`."""
        axis = 0 if self.transpose_weight else 1
        block = cut(self.weight, start, size, axis)
        if self.shards is not None and self.shards.features:
            block = self.shards.gather_features(as_varying(block, varying_axes(self.hidden)), 1 - axis)
        if col_keep is not None:
            block = jnp.where(jnp.expand_dims(col_keep, 1 - axis), block, 0)
        return block

    def _with_all_features(self) -> LinearLogits:
        """The expression with a weight whose features are all here: gathered once, not block by block."""
        if self.shards is None or not self.shards.features:
            return self
        whole = dataclasses.replace(self, shards=self.shards._replace(features=()))
        return dataclasses.replace(whole, weight=self._weight_block(0, self._width, None))

    def _weight_cotangent(self, d_block: Array) -> Array:
        """The cotangent of a block of the weight as it is stored, from that of a block with all features."""
        if self.shards is None or not self.shards.features:
            return d_block
        d_block = self.shards.scatter_features(d_block, 1 if self.transpose_weight else 0)
        others = varying_axes(d_block) - varying_axes(self.weight)
        return lax.psum(d_block, tuple(sorted(others))) if others else d_block

    def _aligned(self, axes: frozenset[str]) -> LinearLogits:
        aligned = as_varying(self, axes)
        # The gradient of a gathered block is summed when it is scattered, not at the end: it is never whole.
        gathered = self.shards is not None and self.shards.features
        return dataclasses.replace(aligned, weight=self.weight) if gathered else aligned

    def _multiply(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        return product(a, b, contract, self.dtype, self.precision)

    def _product(self, weight_block: Array) -> Array:
        """A block of `hidden @ weight`."""
        return self._multiply(self.hidden, weight_block, (self.hidden.ndim - 1, int(self.transpose_weight)))

    def _pull_product(self, d_raw: Array, weight_block: Array) -> tuple[Array, Array]:
        """The cotangents of `hidden` and of a block of the weight, from the cotangent of their product."""
        d_hidden = self._multiply(d_raw, weight_block, (1, int(not self.transpose_weight)))
        pair = (d_raw, self.hidden) if self.transpose_weight else (self.hidden, d_raw)
        return d_hidden, self._multiply(*pair, (0, 0))

    def _raw_scores(self) -> Array | None:
        return None

    def _raw_block(self, start, size: int, col_keep: Array | None) -> Array:
        return self._product(self._weight_block(start, size, col_keep))

    def _work(self) -> Work:
        rows, features = self.hidden.shape
        return Work("linear", rows, self._width, features, self.dtype.itemsize)

    def _affine(self) -> LinearLogits | None:
        if self.softcap is not None or (self.shards is not None and self.shards.features):
            return None  # capped, or a sum over columns would gather the weight once more
        return self

    def _affine_columns(self, col_weights: Array, col_keep: Array) -> tuple[Array, Array, Array]:
        """`(n, w, b)`: `sum_j k_j`, and the k-weighted sums of the present columns of weight and bias."""
        weight = self.weight.astype(self.dtype)  # the entries that the products read, summed in float32
        weight = jnp.where(jnp.expand_dims(col_keep, 1 if self.transpose_weight else 0), weight, 0)
        axis = 0 if self.transpose_weight else 1
        w = lax.dot_general(
            weight,
            col_weights,
            (((axis,), (0,)), ((), ())),
            precision=self.precision,
            preferred_element_type=self._accumulation_dtype,
        )
        b: Any = (
            0.0
            if self.bias is None
            else jnp.where(col_keep, self.bias, 0).astype(self._accumulation_dtype) @ col_weights
        )
        return jnp.sum(col_weights), w, b

    def _column_sums(self, col_weights: Array, col_keep: Array) -> tuple[Array, Array]:
        """`sum_j k_j x_j` of every row and `sum_j k_j`, without a pass; k (`col_weights`) is 0 for absent columns."""
        n, w, b = self._affine_columns(col_weights, col_keep)
        total = self.hidden.astype(self.dtype).astype(w.dtype) @ w
        if self.scale is not None:
            total = total * self.scale
        total = total + b
        return (total if self.temperature is None else total / self.temperature), n

    def _column_moments(self, col_keep: Array) -> tuple[Array, Array, Array]:
        """Count, mean and `sum_j (x_j - mean)^2` over the present columns of every row."""
        n, w, b = self._affine_columns(col_keep.astype(self._accumulation_dtype), col_keep)
        n_safe = jnp.maximum(n, 1)
        mean_w, mean_b = w / n_safe, b / n_safe

        weight = (self.weight if self.transpose_weight else self.weight.T).astype(self.dtype)
        # In half precision, a product of the differences from the mean would round them; the weights are exact.
        exact = self.dtype != w.dtype
        columns = jnp.where(col_keep[:, None], weight if exact else weight - mean_w, 0)
        gram = self._multiply(columns, columns, (0, 0))
        if exact:
            gram = gram - n * mean_w[:, None] * mean_w
        # [d, d], and not rounded: where hidden lies in a direction of small variance, large entries of it cancel.
        h = self.hidden.astype(self.dtype).astype(w.dtype)
        if self.scale is not None:
            h = h * self.scale[..., None]
        mean = h @ mean_w + mean_b
        centred = jnp.sum((h @ gram) * h, axis=-1)
        if self.bias is not None:
            offset = jnp.where(col_keep, self.bias.astype(w.dtype) - mean_b, 0)
            centred = centred + 2 * (h @ (offset @ columns.astype(w.dtype))) + jnp.sum(offset**2)
        if self.temperature is not None:
            mean, centred = mean / self.temperature, centred / self.temperature**2
        return n, mean, jnp.maximum(centred, 0)

    def _default_block_size(self, rows: int) -> int:
        if device()[0] == "cpu":
            return min(max(_CPU_BLOCK_SCORES // max(rows, 1) // 128 * 128, _NARROWEST), _CPU_WIDEST)
        return evenly(self._width, max(BLOCK_SCORES // max(rows, 1) // 128 * 128, _NARROWEST), 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredLogits(Source):
    """Stored scores, `[n, columns]`."""

    values: Any
    shards: Shards | None = dataclasses.field(default=None, metadata=dict(static=True))

    kind = "dense"
    scale = bias = softcap = temperature = None
    block_size = filter_eps = implementation = tape = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scores, with the columns of all shards."""
        return (*self.values.shape[:-1], self._width if self.shards is None else self.shards.total)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the scores."""
        return self.values.dtype

    def astype(self, dtype: Any) -> StoredLogits:
        """The same logits in another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def __mul__(self, scale: Any) -> StoredLogits:
        """`logits * scale`, a positive scalar or one number per row (`[*rows]` or `[*rows, 1]`)."""
        scale = row_scalar("scale", scale, self.shape[:-1], self.dtype, positive=True)
        return dataclasses.replace(self, values=(self.values * scale[..., None]).astype(self.dtype))

    __rmul__ = __mul__

    def __truediv__(self, temperature: Any) -> StoredLogits:
        """`logits / temperature`, a positive scalar or one number per row (`[*rows]` or `[*rows, 1]`)."""
        return self * (1 / row_scalar("temperature", temperature, self.shape[:-1], self.dtype, positive=True))

    @property
    def _width(self) -> int:
        return self.values.shape[-1]

    @property
    def _accumulation_dtype(self):
        return accumulation_dtype(self.values.dtype)

    def _flat(self) -> StoredLogits:
        n = math.prod(self.values.shape[:-1])
        return dataclasses.replace(self, values=self.values.reshape(n, self._width))

    def _like(self) -> Array:
        if self.values.shape[-1] == 0:
            return jnp.zeros(self.values.shape[:-1], self._accumulation_dtype)
        return jnp.full_like(self.values[..., 0], 0, dtype=self._accumulation_dtype)

    def _accumulates(self) -> StoredLogits:
        return dataclasses.replace(self, values=False)

    def _mask_rows(self, keep: Array) -> StoredLogits:
        del keep  # the mask of the tiles is enough: no matrix product reads the rows
        return self

    def _raw_scores(self) -> Array:
        return self.values

    def _raw_block(self, start, size: int, col_keep: Array | None) -> Array:
        del col_keep
        return cut(self.values, start, size, self.values.ndim - 1).astype(self._accumulation_dtype)

    def _default_block_size(self, rows: int) -> int:
        del rows
        return self._width

    def _work(self) -> Work:
        return Work("dense", self.shape[0], self._width, 0, self.values.dtype.itemsize)

    def _affine(self) -> None:
        return None


def stored_logits(
    values: Float[Array, "*rows columns"], *, axis_name: str | tuple[str, ...] | None = None
) -> StoredLogits:
    """Stored logits as an expression: inside `jax.shard_map`, those of this device's columns.

    Args:
      values: `[*rows, columns]`, floating.
      axis_name: the mesh axes over which the columns are sharded; labels, masks and `shape` then count the columns of
        all devices. None: all columns are here.

    Returns:
      A `StoredLogits`, which functions that read rows take in place of an array. Functions that return an array of the
      logits' shape do not.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: values without an axis, or an `axis_name` that is not an axis of the surrounding `shard_map`.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jaxsoft.stored_logits(jnp.zeros((2, 4)))
      >>> print(jaxsoft.logsumexp(logits).round(4))
      [1.3863 1.3863]
    """
    values = _to_array("values", values)
    if values.ndim == 0:
        raise ValueError("values must have at least one axis, got a scalar")
    if axis_name is None:
        return StoredLogits(values)
    names = check_axis_name(axis_name)
    return StoredLogits(values, Shards(names, (), values.shape[-1] * lax.axis_size(names)))


def row_scalar(name: str, value: Any, rows: tuple[int, ...], dtype, *, positive: bool = False) -> Any:
    """A scalar or one number per row, as an array of a floating dtype (a Python number would get no gradient)."""
    if _checks.is_concrete_number(value):
        _checks.number(name, value, **({"above": 0} if positive else {}))
        return jnp.asarray(value, accumulation_dtype(dtype))
    _checks.floating(name, value)
    if value.shape == (*rows, 1) and value.ndim != len(rows):
        value = value[..., 0]
    if value.shape not in ((), rows):
        raise ValueError(
            f"{name} must be a scalar or have shape {rows} (one number per row of logits), got shape {value.shape}"
        )
    return value


def linear_logits(
    hidden: Float[Array, "*rows d"],
    weight: Float[Array, "d vocab"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    scale: float | Float[Array, ...] | None = None,
    softcap: float | None = None,
    temperature: float | Float[Array, ...] | None = None,
    transpose_weight: bool = False,
    block_size: int | None = None,
    filter_eps: float | None = None,
    precision: Any = None,
    dtype: Any = None,
    implementation: str | None = None,
    hidden_sharding: Any = None,
    weight_sharding: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> LinearLogits:
    """The logits of a linear output layer as an expression; no array `[*rows, vocab]` is stored.

    Stands for `softcap(scale * (hidden @ weight) + bias) / temperature`; this call computes nothing. Every function
    of jaxsoft that reads rows of logits takes it in place of the dense array and gives the same values and
    derivatives (reverse and forward mode, any order). It computes one block of columns at a time and discards it.

    Args:
      hidden: activations, `[*rows, d]`, any number of leading axes.
      weight: output weights `[d, vocab]`, or `[vocab, d]` with `transpose_weight=True` (an embedding table).
      bias: `[vocab]`, added after `scale`; the log of class priors goes here.
      scale: multiplies the matrix product: a scalar, or one number per row (`[*rows]`). Differentiable.
      softcap: caps the logits smoothly to `(-softcap, softcap)` by `softcap * tanh(logits / softcap)`.
      temperature: applied last, divides the logits: a positive scalar or one number per row. Differentiable.
      transpose_weight: whether `weight` is laid out `[vocab, d]`; nothing is copied either way.
      block_size: columns computed at a time. Default: chosen from the number of rows and the device, about
        8 MiB of float32 logits on a CPU, at most 128 MiB on others.
      filter_eps: the backward pass skips blocks of logits in which no gradient exceeds `filter_eps` times the largest
        cotangent in magnitude; None, the default, is exact. Reverse mode only.
      precision: of the matrix products, as in `jax.lax.dot_general`; they accumulate in float32 at least.
      dtype: of the matrix products, forward and backward, as in a Flax layer: hidden, weight and the gradient of the
        logits are rounded to it before they are multiplied. None: the promoted dtype of hidden and weight, which
        is float32 for bfloat16 activations and float32 parameters; write `dtype=jnp.bfloat16` for such a model.
        The sums, everything after the product (bias, softcap, the loss) and the gradients' sums over blocks
        are in float32; the gradients have the dtypes of hidden and weight.
      implementation: `"xla"`, or the kernels `"pallas_tpu"` or `"mosaic_gpu"`, all with the same derivatives. None
        picks the best one that can run the case (see `jaxsoft.kernels.explain`).
      hidden_sharding: on a mesh with Auto axes, where `hidden` lies: a `PartitionSpec` of its axes or a
        `NamedSharding`. Not needed for Explicit axes (see the guide "Several devices").
      weight_sharding: the same of `weight`. Default of both: that of `jaxsoft.shardings`.
      axis_name: inside `jax.shard_map`, the mesh axes over which the columns are sharded. `weight` and `bias` are then
        those of this device's columns; labels, masks and `shape` count the columns of all devices.

    Returns:
      A `LinearLogits`, a pytree with `.shape`, `.dtype` and `.dense()`.

    Raises:
      TypeError: an argument is not a floating array or has the wrong type.
      ValueError: shapes that do not fit, a size or a constant out of range.

    Reference:
      Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (for cross-entropy).

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> hidden, weight = jnp.ones((2, 3, 4)), jnp.ones((4, 10)) / 4
      >>> logits = jaxsoft.linear_logits(hidden, weight, softcap=30.0)
      >>> logits.shape
      (2, 3, 10)
      >>> bool(jnp.allclose(jaxsoft.logsumexp(logits), jax.nn.logsumexp(logits.dense(), axis=-1)))
      True
    """
    hidden, weight = _to_array("hidden", hidden), _to_array("weight", weight)
    if hidden.ndim < 1:
        raise ValueError(f"hidden must have shape [*rows, d], got shape {hidden.shape}")
    _checks.flag("transpose_weight", transpose_weight)
    layout = "[vocab, d]" if transpose_weight else "[d, vocab]"
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape {layout}, got shape {weight.shape}")
    d = weight.shape[1 if transpose_weight else 0]
    if hidden.shape[-1] != d or d == 0:
        hint = (
            f"; pass transpose_weight={not transpose_weight} for the other layout"
            if hidden.shape[-1] == weight.shape[0 if transpose_weight else 1]
            else ""
        )
        raise ValueError(
            f"hidden and weight must share a feature axis of size 1 or more: weight of shape {weight.shape} as "
            f"{layout} has d={d}, hidden of shape {hidden.shape} has {hidden.shape[-1]}{hint}"
        )
    if bias is not None:
        bias = _to_array("bias", bias)
        _checks.shape(
            "bias", bias, (weight.shape[0 if transpose_weight else 1],), "one number per column of logits"
        )
    if softcap is not None:
        softcap = _checks.static_number("softcap", softcap, above=0)
    if block_size is not None:
        block_size = _checks.integer("block_size", block_size, at_least=1)
    if filter_eps is not None:
        filter_eps = _checks.static_number("filter_eps", filter_eps, at_least=0)
    _checks.option("implementation", implementation, (None, *IMPLEMENTATIONS))
    for name, sharding in (("hidden_sharding", hidden_sharding), ("weight_sharding", weight_sharding)):
        if sharding is not None:
            check_sharding(name, sharding)
    shards = None
    if axis_name is not None:
        names = check_axis_name(axis_name)
        columns = weight.shape[0 if transpose_weight else 1] * lax.axis_size(names)
        shards = Shards(names, (), columns)
    rows = tuple(hidden.shape[:-1])
    return LinearLogits(
        hidden=hidden,
        weight=weight,
        bias=bias,
        scale=None if scale is None else row_scalar("scale", scale, rows, hidden.dtype),
        temperature=(
            None
            if temperature is None
            else row_scalar("temperature", temperature, rows, hidden.dtype, positive=True)
        ),
        softcap=softcap,
        transpose_weight=transpose_weight,
        block_size=block_size,
        filter_eps=filter_eps,
        precision=precision,
        dtype=_product_dtype(dtype, hidden, weight),
        implementation=implementation,
        hidden_sharding=hidden_sharding,
        weight_sharding=weight_sharding,
        shards=shards,
    )


def _product_dtype(dtype: Any, hidden: Array, weight: Array) -> Any:
    if (dtype := _checks.floating_dtype("dtype", dtype)) is None:
        return jnp.promote_types(hidden.dtype, weight.dtype)
    _checks.option("dtype", dtype.name, ("bfloat16", "float16", "float32", "float64"))
    return dtype


def _to_array(name: str, value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be an array of floating dtype, got {_checks.describe(value)}")
    _checks.floating(name, value)
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


Logits = LinearLogits | StoredLogits | Float[Array, "..."]
"""The input of every function that reads rows of scores: a dense array, a `LinearLogits`, or a `StoredLogits`."""


def check_axis(logits: Any, axis: int) -> int:
    """Checks `logits` and the axis of its rows; returns the axis counted from the front."""
    _checks.floating("logits", logits)
    axis = _checks.integer("axis", axis)
    if logits.ndim == 0:
        raise ValueError("logits must have at least one axis, got a scalar")
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(
            f"axis must be in [{-logits.ndim}, {logits.ndim}) for logits of shape {logits.shape}, got {axis}"
        )
    if isinstance(logits, LinearLogits | StoredLogits) and axis not in (-1, logits.ndim - 1):
        kind = "linear_logits" if isinstance(logits, LinearLogits) else "stored_logits"
        raise ValueError(f"axis must be -1 for {kind} of shape {logits.shape}, got {axis}")
    return axis % logits.ndim


def rows_of(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of the rows: `shape` without the axis."""
    return tuple(n for i, n in enumerate(shape) if i != axis)
