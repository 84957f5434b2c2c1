"""Arrays and gradients in 8 bits.

`quantize_blockwise` stores an array with one byte per entry and one scale per block of entries, `dequantize_blockwise`
reads it back, and `dynamic_code_map` lists the values that a byte stands for. `quantize_state` keeps the moments of
an optimizer in this format.

In data-parallel training `compress_gradients` sends one byte per entry between the workers, where a mean of gradients
sends four.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsoft import _checks
from jaxsoft.optimizers import _codes, _common
from jaxsoft.optimizers._codes import DynamicMap


class QuantizedArray(NamedTuple):
    """An array in 8 bits.

    Attributes:
      codes: uint8, the shape of the array: positions in the map of values.
      scales: one number per block, at least float32, with as many axes as the array: the entry of the block with
        the largest absolute value, with its sign. An entry is the value of its code times its scale.
    """

    codes: jax.Array
    scales: jax.Array


def dynamic_code_map(signed: bool = True) -> jax.Array:
    """The 256 values of the dynamic map: seven decades below 1, each with twice as many values as the one below.

    Decade `i = 0 ... 6` is cut into `2^i` equal parts between `10^(i-7)` and `10^(i-6)` (unsigned: `2^(i+1)`). Their
    midpoints, 0 and 1 are the values. Large entries are exact to 1 percent, and small ones are not lost.

    Args:
      signed: True for values from -0.993 to 1 (there is no -1; 0 has code 127), False for values from 0 to 1.

    Returns:
      256 float32 values in increasing order.

    Raises:
      TypeError: `signed` is not a bool.

    Reference:
      "8-Bit Approximations for Parallelism in Deep Learning"; "8-bit Optimizers via Block-wise Quantization".

    Example:
      >>> from jaxsoft.optimizers import dynamic_code_map
      >>> values = dynamic_code_map()
      >>> print(values.shape, values[127], values[255])
      (256,) 0.0 1.0
    """
    _checks.flag("signed", signed)
    return jnp.asarray(DynamicMap(signed).values(), jnp.float32)


def quantize_blockwise(x: jax.Array, *, block_size: int = 256, signed: bool = True) -> QuantizedArray:
    """An array in 8 bits: the `codes` of the values of the dynamic map nearest to `x / scale` in each block.

    A block has `block_size` neighbours along the last axis (the last block of a row may be shorter), or over as many
    last axes as one block needs. The scale is the entry with the largest absolute value, with its sign, so this entry,
    a block of zeros and a block of one repeated value come back exactly. Other entries are off by at most 0.0071 of
    the absolute value of the scale (unsigned: 0.0036). An entry that is not finite shows as NaN and spoils its block.
    A block whose largest entry is below the smallest normal number becomes 0.

    Args:
      x: real array of any shape; computed in at least float32.
      block_size: entries per block, a static integer.
      signed: whether `x` has negative entries. False: the map has twice as many positive values, and negative entries
        become 0.

    Returns:
      A `QuantizedArray`.

    Raises:
      TypeError: `x` is not a floating array, `signed` is not a bool, or `block_size` is not an integer.
      ValueError: `block_size` is less than 1.

    Reference:
      "8-bit Optimizers via Block-wise Quantization". Scales with a sign are ours; the paper takes the absolute value,
      with which a negative extreme comes back 0.7 percent too small.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import dequantize_blockwise, quantize_blockwise
      >>> q = quantize_blockwise(jnp.array([0.5, -2.0, 0.0]))
      >>> print(q.codes, q.scales)
      [ 53 255 127] [-2.]
      >>> print(dequantize_blockwise(q).round(1) + 0.0)
      [ 0.5 -2.   0. ]
    """
    _checks.floating("x", x)
    block_size = _checks.integer("block_size", block_size, at_least=1)
    _checks.flag("signed", signed)
    layout = _codes.layout_of(x.shape, block_size)
    return QuantizedArray(*_codes.encode(x.astype(_common.wide(x)), layout, DynamicMap(signed)))


def dequantize_blockwise(q: QuantizedArray, *, block_size: int = 256, signed: bool = True) -> jax.Array:
    """The array that `quantize_blockwise` encoded: `map[codes] scale`.

    The values are computed from the codes, which is faster than a gather from the map, and differ from those of the map
    by a relative error of less than 1e-6.

    Args:
      q: the result of `quantize_blockwise`.
      block_size: as in `quantize_blockwise`.
      signed: as in `quantize_blockwise`.

    Returns:
      An array of the shape of the codes and the dtype of the scales.

    Raises:
      TypeError: the codes are not uint8.
      ValueError: the scales do not fit the shape of the codes and `block_size`.

    Reference:
      "8-bit Optimizers via Block-wise Quantization".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import dequantize_blockwise, quantize_blockwise
      >>> print(dequantize_blockwise(quantize_blockwise(jnp.array([1.0, 2.0, 4.0]))).round(1))
      [1. 2. 4.]
    """
    block_size = _checks.integer("block_size", block_size, at_least=1)
    _checks.flag("signed", signed)
    if getattr(q.codes, "dtype", None) != jnp.uint8:
        raise TypeError(f"q.codes must be an array of dtype uint8, got {_checks.describe(q.codes)}")
    layout = _codes.layout_of(q.codes.shape, block_size)
    meaning = f"blocks of {block_size} of codes of shape {q.codes.shape}"
    _checks.shape("q.scales", q.scales, layout.scales_shape, meaning)
    return _codes.decode(q.codes, q.scales, layout, DynamicMap(signed))


class CompressGradientsState(NamedTuple):
    """State of `compress_gradients`.

    Attributes:
      rounding_count: number of updates, part of the key of stochastic rounding.
      residual: the rounding errors so far, shaped like the parameters; `optax.EmptyState()` without error feedback.
    """

    rounding_count: jax.Array
    residual: Any


def compress_gradients(
    codebook: Literal["dynamic", "linear"] = "dynamic",
    *,
    axis_name: Hashable | None = None,
    error_feedback: bool = False,
    stochastic_rounding: bool = False,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Exchanges gradients between workers in 8 bits: `mean_i(decode(encode(g_i)))`, a quarter of the traffic.

    Inside `shard_map` (or `vmap`) with `axis_name`, every worker encodes its own gradient, with one byte per entry and
    one scale per leaf, gathers those of the others and averages them in at least float32. Put it first in the chain,
    with gradients that are not averaged yet. Without `axis_name` it only rounds, to test the effect of rounding. A
    gradient that is not finite makes its whole leaf NaN on every worker.

    Args:
      codebook: `"dynamic"`, the map of `dynamic_code_map` (seven decades), or `"linear"`, 255 equal steps
        (unbiased within a step of 0.8 percent of the largest entry, small entries become 0).
      axis_name: name (or names) of the workers' mapped axis. None: no exchange.
      error_feedback: adds the rounding error to the next gradient: `e <- g + e - decode(encode(g + e))`, with `e = 0`
        at first. It needs one more array of state, different on each worker.
      stochastic_rounding: rounds at random to one of the two neighbours, so that the mean is exact.
      key: a PRNG key, or an integer in its place, for stochastic rounding. Each worker draws its own numbers.

    Returns:
      A gradient transformation with state `CompressGradientsState`.

    Raises:
      TypeError: for an argument of another type.
      ValueError: for an unknown codebook.

    Reference:
      "8-Bit Approximations for Parallelism in Deep Learning". Error feedback, the linear map and stochastic
      rounding are additions.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import compress_gradients
      >>> tx = compress_gradients(axis_name="workers")
      >>> grads = jnp.array([[1.0, 0.5], [-3.0, 0.0]])
      >>> exchange = lambda g: tx.update(g, tx.init(g))[0]
      >>> print(jax.vmap(exchange, axis_name="workers")(grads).round(2))
      [[-1.    0.25]
       [-1.    0.25]]
    """
    _checks.option("codebook", codebook, ("dynamic", "linear"))
    _checks.flag("error_feedback", error_feedback)
    _checks.flag("stochastic_rounding", stochastic_rounding)
    _common.check_key("key", key)
    code_map = DynamicMap(True) if codebook == "dynamic" else _codes.LinearMap()

    def encode(x: jax.Array, key: jax.Array | None) -> QuantizedArray:
        one_block = _codes.Layout((), x.size, 1, x.size, (1,) * x.ndim)
        return QuantizedArray(*_codes.encode(x, one_block, code_map, key))

    def read(q: QuantizedArray) -> jax.Array:
        return code_map.decode(q.codes, q.scales.dtype) * q.scales

    def exchange(q: QuantizedArray) -> jax.Array:
        if axis_name is None:
            return read(q)
        everyone = lax.all_gather(q, axis_name)
        workers = everyone.scales.shape[0]

        def sent_by(i):
            return read(jax.tree.map(lambda x: x[i], everyone))

        # One worker after the other, so that only one of the gathered gradients exists in float32.
        return lax.fori_loop(1, workers, lambda i, total: total + sent_by(i), sent_by(0)) / workers

    def init(params: optax.Params) -> CompressGradientsState:
        residual = _common.moments_like(params) if error_feedback else optax.EmptyState()
        return CompressGradientsState(jnp.zeros([], jnp.int32), residual)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        g = _common.widen(updates)
        if error_feedback:
            g = jax.tree.map(jnp.add, g, state.residual)
        draws = _common.fold(_common.as_key(key), state.rounding_count) if stochastic_rounding else None
        if axis_name is not None:
            draws = _common.fold(draws, lax.axis_index(axis_name))
        leaves, treedef = jax.tree.flatten(g)
        sent = [encode(x, _common.fold(draws, i)) for i, x in enumerate(leaves)]
        residual = state.residual
        if error_feedback:
            residual = treedef.unflatten([x - read(q) for x, q in zip(leaves, sent)])
        mean = treedef.unflatten([exchange(q) for q in sent])
        count = jnp.asarray(optax.safe_increment(state.rounding_count))
        return _common.cast_like(mean, updates), CompressGradientsState(count, residual)

    return optax.GradientTransformationExtraArgs(init, update)
