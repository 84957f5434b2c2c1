"""Optimizer states and gradients in 8 bits: one byte for an entry, one scale for a block of entries."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask

_DECADES = 7  # powers of ten of the dynamic map, from 1e-6 to 1
_PARTS = 8  # of a block, whose extremes are taken together
_SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares", "grad_sum_of_squares")


class QuantizedArray(NamedTuple):
    """An array in 8 bits.

    Attributes:
      codes: uint8, the shape of the array: places in the map of values.
      scales: one number for a block, at least float32, with as many axes as the array. It is the entry of
        the block that is largest in size, with its sign; values of the map times it are the entries.
    """

    codes: jax.Array
    scales: jax.Array


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
      rounding_count: number of updates, from which stochastic rounding draws.
      inner_state: the state of the inner transformation with a `QuantizedArray` for each large moment.
    """

    rounding_count: jax.Array
    inner_state: Any


class CompressGradientsState(NamedTuple):
    """State of `compress_gradients`.

    Attributes:
      rounding_count: number of updates, from which stochastic rounding draws.
      residual: what rounding has withheld so far, shaped like the parameters; `optax.EmptyState()` without
        error feedback.
    """

    rounding_count: jax.Array
    residual: Any


# ----------------------------------------------------------------------------------------------- the maps


def _fractions(signed: bool) -> list[int]:
    """How many values each decade has."""
    return [2 ** (i if signed else i + 1) for i in range(_DECADES)]


def _build_map(signed: bool) -> np.ndarray:
    values = [0.0, 1.0]
    for i, k in enumerate(_fractions(signed)):
        edges = np.linspace(0.1, 1.0, k + 1)
        decade = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - _DECADES + 1)
        values += [*decade, *-decade] if signed else [*decade]
    return np.sort(values)


_MAPS = {signed: _build_map(signed) for signed in (True, False)}


def dynamic_code_map(signed: bool = True) -> jax.Array:
    """The 256 values of the dynamic map: seven decades below 1, each with twice as many values as the one below.

    Decade `i = 0 ... 6` is cut into `2^i` equal parts between `10^(i-7)` and `10^(i-6)` (unsigned:
    `2^(i+1)`), and their midpoints are values; so are 0 and 1. Large entries are held to 1 percent and small ones
    are not lost.

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
    return jnp.asarray(_MAPS[signed], jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of float numbers as an integer, which grows with the size."""
    return lax.bitcast_convert_type(x, jnp.int64 if x.dtype.itemsize == 8 else jnp.int32)


def _encode_dynamic(y: jax.Array, signed: bool) -> jax.Array:
    """The code of the nearest value of the dynamic map. Arithmetic: a binary search is forty times slower.

    Comparisons with selects stand for minima, which would be slower because they care for NaN.
    """
    size = jnp.abs(y) if signed else jnp.where(y > 0, y, 0)
    # Within a decade of k values the place, from k to 2k, is linear in the size, and the lines of all decades make
    # a concave function, of which each is the tangent: the place is the least of them.
    place: Any = None
    for i, k in enumerate(2 ** np.arange(_DECADES) * (1 if signed else 2)):
        low = 10.0 ** (i - _DECADES)
        # Halfway between 0 and the first value comes `k + 0.2`, see below.
        start = (low * (1 + 4.5 / k) / 2, k + 0.2) if i == 0 else (low, k)
        end = (low * (1 + 9 / k), k + 1)
        slope = (end[1] - start[1]) / (end[0] - start[0])
        line = slope * size + (end[1] - slope * end[0])
        place = line if i == 0 else jnp.where(line < place, line, place)
    # The first fifth of the first part of a decade, up to halfway between the values, is nearer to the last value of
    # the decade below. There, and only there, 0.2 less is below a power of two that the place is not below.
    digits = jnp.finfo(y.dtype).nmant
    power = lax.bitcast_convert_type(_bits(place) & -(2**digits), y.dtype)
    place = jnp.where(place - 0.2 < power, place - 0.2, place)
    # Rounded down: the last digit of the sum is the one before the point, and its last byte is the place.
    index = _bits(place + (2.0**digits - 0.5))
    index = jnp.where(y < 0, 127 - index, 127 + index) if signed else index - 1
    top = 1 - 0.225 / 2 ** (_DECADES - 1 if signed else _DECADES)
    return jnp.where(y >= top, 255, index).astype(jnp.uint8)


def _decode_dynamic(codes: jax.Array, signed: bool, dtype: Any) -> jax.Array:
    """The values of the dynamic map. Arithmetic, which fuses with what uses them; a table would not on a CPU.

    The lines of the decades make a convex function, and each value is the largest of theirs.
    """
    place = codes.astype(jnp.int32).astype(dtype) - (127 if signed else 0)
    index = jnp.abs(place)
    value = jnp.zeros_like(index)
    for i, k in enumerate(_fractions(signed)):
        low, first = 10.0 ** (i - _DECADES), (k if signed else k - 1)
        line = 9 * low / k * index + low * (1 + 9 * (0.5 - first) / k)
        value = jnp.where(line > value, line, value)
    value = jnp.where(value < 1, value, 1)
    return jnp.where(place < 0, -value, value)


def _encode_linear(y: jax.Array) -> jax.Array:
    return (127 + jnp.round(127 * y).astype(jnp.int32)).astype(jnp.uint8)


def _decode_linear(codes: jax.Array, dtype: Any) -> jax.Array:
    return (codes.astype(jnp.int32).astype(dtype) - 127) / 127


# ------------------------------------------------------------------------------------------------- blocks


class _Layout(NamedTuple):
    """How an array is cut: `rows` of `length` entries (its last axes), each in `blocks` of `width` entries."""

    lead: tuple[int, ...]
    length: int
    blocks: int
    width: int
    scales_shape: tuple[int, ...]


def _layout(shape: tuple[int, ...], block_size: int) -> _Layout:
    """Blocks run along the last axis, or over as many last axes as it takes to hold one block.

    The scales then have as many axes as the array, and the axes before are the array's own: what shards the
    array on them shards its scales too.
    """
    axis, length = len(shape), 1
    while axis > 0 and length < block_size:
        axis -= 1
        length *= shape[axis]
    blocks = -(-length // block_size)
    lead = shape[:axis]
    merged = (blocks,) + (1,) * (len(shape) - axis - 1) if shape else ()
    return _Layout(lead, length, blocks, block_size if blocks > 1 else length, lead + merged)


def _in_blocks(x: jax.Array, layout: _Layout) -> jax.Array:
    rows = x.reshape((*layout.lead, layout.length))
    missing = layout.blocks * layout.width - layout.length
    if missing:
        rows = jnp.pad(rows, [(0, 0)] * len(layout.lead) + [(0, missing)])
    return rows.reshape((*layout.lead, layout.blocks, layout.width))


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    """The larger in size; NaN, whose bits are those of a larger number, if there is one."""
    return jnp.where(_bits(jnp.abs(y)) > _bits(jnp.abs(x)), y, x)


def _spread(per_block: jax.Array, shape: tuple[int, ...], layout: _Layout) -> jax.Array:
    """One number for a block to one for an entry."""
    blocks = per_block.reshape((*layout.lead, layout.blocks, 1))
    rows = jnp.broadcast_to(blocks, (*layout.lead, layout.blocks, layout.width))
    rows = rows.reshape((*layout.lead, layout.blocks * layout.width))
    return rows[..., : layout.length].reshape(shape)


def _extremes(x: jax.Array, layout: _Layout, signed: bool = True) -> jax.Array:
    """The entry of each block that is largest in size, with its sign; 0 if it is not a normal number."""
    # A leaf that is one block is reduced as it is, which the compiler shares among cores.
    one = not layout.lead and layout.blocks == 1
    blocks, axis = (x, None) if one else (_in_blocks(x, layout), -1)
    if not one and layout.width % (8 * _PARTS) == 0:
        # To an eighth by arithmetic, with which the computation of x fuses; with a reduction on a CPU it does not,
        # and x would be stored.
        parts = jnp.split(blocks if signed else jnp.where(blocks < 0, 0, blocks), _PARTS, axis=-1)
        blocks = functools.reduce(_larger, parts)
    extreme = jnp.max(blocks, axis=axis, initial=0)
    if signed:
        low = jnp.min(blocks, axis=axis, initial=0)
        extreme = jnp.where(extreme < -low, low, extreme)
    tiny = jnp.abs(extreme) < jnp.finfo(x.dtype).tiny
    return jnp.where(tiny, 0, extreme).reshape(layout.scales_shape)


def _divide_by_scale(x: jax.Array, scales: jax.Array, layout: _Layout) -> jax.Array:
    return x * _spread(jnp.where(scales == 0, 0, 1 / scales), x.shape, layout)


def _round_stochastically(
    y: jax.Array, nearest: jax.Array, decode: Callable[[jax.Array], jax.Array], key: jax.Array
) -> jax.Array:
    """One of the two neighbours of `y`, the nearer with the higher chance, so that the mean is `y`."""
    below = jnp.clip(nearest.astype(jnp.int32) - (decode(nearest) > y), 0, 254)
    low, high = (decode((below + i).astype(jnp.uint8)) for i in (0, 1))
    return (below + (jax.random.uniform(key, y.shape, y.dtype) * (high - low) < y - low)).astype(jnp.uint8)


def _quantize(
    x: jax.Array,
    block_size: int,
    signed: bool,
    key: jax.Array | None = None,
    positive: bool = False,
    again: jax.Array | None = None,
) -> QuantizedArray:
    """`positive`: a positive entry never becomes 0. `again`: the array computed again, for its extremes."""
    layout = _layout(x.shape, block_size)
    scales = _extremes(x if again is None else again, layout, signed)
    y = _divide_by_scale(x, scales, layout)
    codes = _encode_dynamic(y, signed)
    if key is not None:
        codes = _round_stochastically(y, codes, lambda c: _decode_dynamic(c, signed, y.dtype), key)
    if positive:
        codes = jnp.where(y > 0, jnp.maximum(codes, 1), codes)
    return QuantizedArray(codes, scales)


def _dequantize(q: QuantizedArray, block_size: int, signed: bool) -> jax.Array:
    layout = _layout(q.codes.shape, block_size)
    return _decode_dynamic(q.codes, signed, q.scales.dtype) * _spread(q.scales, q.codes.shape, layout)


def quantize_blockwise(x: jax.Array, *, block_size: int = 256, signed: bool = True) -> QuantizedArray:
    """An array in 8 bits: `codes` of the nearest value of the dynamic map, of `x / scale` in each block.

    A block is `block_size` neighbours along the last axis (the last block of a row may be shorter), or over as
    many last axes as it takes to have so many. The scale is the entry largest in size with its sign, so that
    this entry, a block of zeros and a block of one repeated value come back exactly. Another entry is off by at
    most 0.0071 of the size of the scale (unsigned: 0.0036). An entry that is not finite spoils its block and
    shows there as NaN. A block whose largest entry is below the smallest normal number is taken as 0.

    Args:
      x: real array of any shape; computed in at least float32.
      block_size: entries of a block, a static integer.
      signed: whether `x` has negative entries; False has twice as many values for the positive ones and takes
        negative ones as 0.

    Returns:
      A `QuantizedArray`.

    Raises:
      TypeError: `x` is not a floating array, `signed` is not a bool, or `block_size` is no integer.
      ValueError: `block_size` is less than 1.

    Reference:
      "8-bit Optimizers via Block-wise Quantization". Scales with a sign are ours; the paper takes the size, for
      which a block whose extreme is negative comes back 0.7 percent too small there.

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
    return _quantize(x.astype(_common.wide(x)), block_size, signed)


def dequantize_blockwise(q: QuantizedArray, *, block_size: int = 256, signed: bool = True) -> jax.Array:
    """The array that `quantize_blockwise` has put in 8 bits: `map[codes] scale`.

    The map's entries are computed from the codes, which no gather slows down, and differ from the map's by less than
    1e-6 of themselves.

    Args:
      q: what `quantize_blockwise` returned.
      block_size: as given there.
      signed: as given there.

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
    expected = _layout(q.codes.shape, block_size).scales_shape
    _checks.shape("q.scales", q.scales, expected, f"blocks of {block_size} of codes of shape {q.codes.shape}")
    return _dequantize(q, block_size, signed)


# ------------------------------------------------------------------------------------------------- states


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _paths(tree: Any) -> dict[tuple, Any]:
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _split(path: tuple, x: Any, params: dict[tuple, Any]) -> tuple[tuple, tuple | None]:
    """The path of a leaf of the state as the way to a copy of the parameters and the way in there, or None."""
    shape = jnp.shape(x.codes if _is_quantized(x) else x)
    for i in range(len(path) + 1):
        way = path[i:]
        # Where the parameters are one array, the way in there is empty and says nothing.
        if way in params and (way or shape == jnp.shape(params[way])):
            return path[:i], way
    return path, None


def _field(path: tuple) -> str | None:
    """The innermost name on a path."""
    names = (getattr(key, "name", getattr(key, "key", None)) for key in reversed(path))
    return next((name for name in names if isinstance(name, str)), None)


def _is_entrywise(jaxpr: Any) -> bool:
    """Whether no equation mixes entries of an array: each array keeps its shape and is not summed or sorted."""
    for equation in jaxpr.eqns:
        inputs = {v.aval.shape for v in equation.invars if math.prod(v.aval.shape) > 1}
        outputs = {v.aval.shape for v in equation.outvars}
        name = equation.primitive.name
        if inputs and (outputs != inputs or name in ("sort", "rev", "transpose") or name.startswith("cum")):
            return False
        for sub in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns") and not _is_entrywise(sub):
                return False
    return True


def quantize_state(
    inner: optax.GradientTransformation,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    unsigned: Iterable[str] = _SECOND_MOMENTS,
    mask: Mask = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    chunk_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of any optimizer in 8 bits: 1.016 bytes instead of 4 for an entry.

    Each step turns the moments into float32, updates them with `inner`, takes the step from these, and rounds
    them back. A leaf of the inner state is a moment if it has the place and the shape of a parameter in a copy
    of the parameters' tree; everything else (counts, scalars, factors, hyper-parameters) stays as it is. See
    `quantize_blockwise` for the format. `inner` computes in at least float32, also for parameters in bfloat16.

        optax.chain(quantize_state(optax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))
        quantize_state(optax.adamw(1e-3))                                 # the same, around the whole
        quantize_state(optax.adamw(1e-3), mask=lambda params: ...)        # embeddings stay in 32 bits

    Second moments (see `unsigned`) use the map without signs, and a positive entry is never rounded to 0: the
    step divides by its root. Not for optimizers that subtract two moments under a root (centered RMSProp).

    If `inner` treats each entry alone (Adam, Lion, RMSProp; nothing with a norm) and `block_size` is a multiple
    of 64, the moments are computed from 8 bits wherever they are used and never stored in float32. Else they
    exist in float32 within the step, on a CPU those of many leaves at once. With `chunk_size` a leaf is done in
    pieces of about so many entries, which needs no such memory for any `block_size`, but is only for such an
    inner transformation (others are refused) and, as the pieces are cut across shards, for parameters that are
    not sharded (or inside `shard_map`). The updates are written over the gradients if these are computed in the
    same jitted function; else they are stored, 4 bytes a parameter.

    Sharding: codes are sharded as the parameter is, and scales have as many axes, so that one
    `PartitionSpec` serves both unless it shards the last axis into pieces that are not whole blocks:

        optax.tree_map_params(tx, lambda q, s: jax.tree.map(lambda x: jax.device_put(x, s), q), state,
                              shardings, is_leaf=lambda x: isinstance(x, QuantizedArray))

    Args:
      inner: any gradient transformation; extra arguments of `update` reach it.
      block_size: entries that share a scale, a static integer.
      min_size: moments with fewer entries stay in float32.
      unsigned: names of the fields of the inner state that hold second moments, numbers that are never
        negative. All other moments are held with signs, which is right, if less precise, for any.
      mask: which parameters have their moments in 8 bits: a pytree of bools (or a prefix of one), or a function
        from the parameters to it. None: all.
      stochastic_rounding: rounds at random to one of the two neighbours, so that the mean is exact. Slower.
      seed: of the random numbers.
      chunk_size: entries of a piece, say 262144; None does whole leaves.

    Returns:
      A gradient transformation with state `QuantizedState`. Call `init` under `jax.jit`, so that the float32
      zeros of one leaf at a time exist instead of all.

    Raises:
      TypeError: for an argument of another type.
      ValueError: for a size that is not positive, or `chunk_size` with an inner transformation that is
        not entry by entry (in the first update).

    Reference:
      "8-bit Optimizers via Block-wise Quantization".

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jaxsoft.optimizers import quantize_state
      >>> tx, params = quantize_state(optax.adam(0.1)), jnp.ones(8192)
      >>> state = tx.init(params)
      >>> print(sum(x.nbytes for x in jax.tree.leaves(state)) / 8192)
      2.0322265625
      >>> updates, state = tx.update(0.5 * params, state, params)
      >>> print(round(float(updates[0]), 4))
      -0.1
    """
    block_size = _checks.integer("block_size", block_size, at_least=1)
    min_size = _checks.integer("min_size", min_size, at_least=0)
    if isinstance(unsigned, str) or not all(isinstance(name, str) for name in unsigned):
        raise TypeError(f"unsigned must be several names of fields, got {_checks.describe(unsigned)}")
    names = frozenset(unsigned)
    _checks.flag("stochastic_rounding", stochastic_rounding)
    seed = _checks.integer("seed", seed)
    if chunk_size is not None:
        chunk_size = _checks.integer("chunk_size", chunk_size, at_least=1)
    inner = optax.with_extra_args_support(inner)

    def signed(prefix: tuple) -> bool:
        return _field(prefix) not in names

    def encode(
        x: jax.Array, prefix: tuple, key: jax.Array | None, again: jax.Array | None = None
    ) -> QuantizedArray:
        x = x.astype(_common.wide(x))
        again = None if again is None else again.astype(x.dtype)
        return _quantize(x, block_size, signed(prefix), key, not signed(prefix), again)

    def decode(x: Any, prefix: tuple) -> Any:
        return _dequantize(x, block_size, signed(prefix)) if _is_quantized(x) else x

    def draw(count: jax.Array, *index: Any) -> jax.Array | None:
        if not stochastic_rounding:
            return None
        return functools.reduce(jax.random.fold_in, (count, *index), jax.random.key(seed))

    def init(params: optax.Params) -> QuantizedState:
        params = _common.widen(params)
        state = inner.init(params)
        places = _paths(params)
        if mask is not None and places:
            wanted = mask(params) if callable(mask) else mask
            wanted = jax.tree.map(lambda keep, part: jax.tree.map(lambda _: keep, part), wanted, params)
            places = {path: places[path] for path, keep in _paths(wanted).items() if keep}

        def store(path, x):
            prefix, place = _split(path, x, places)
            moment = (
                place is not None
                and jnp.issubdtype(jnp.result_type(x), jnp.floating)
                and jnp.ndim(x) > 0
                and jnp.shape(x) == places[place].shape
                and max(min_size, 1) <= jnp.size(x)
            )
            # The barrier keeps the compiler from reducing constant zeros itself, which takes it minutes.
            return encode(lax.optimization_barrier(x), prefix, None) if moment else x

        return QuantizedState(jnp.zeros([], jnp.int32), jax.tree_util.tree_map_with_path(store, state))

    def map_state(f, state, places, *rest):
        """`f(leaf, way to the copy of the parameters, way in there, ...)` over the leaves of the inner state."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x, *others: f(x, *_split(path, x, places), *others),
            state,
            *rest,
            is_leaf=_is_quantized,
        )

    def update_whole(g, old, params, places, count, extra):
        def read(old):
            return map_state(lambda x, prefix, _: decode(x, prefix), old, places)

        def step(wide):
            return inner.update(g, wide, params, **extra)

        u, new = step(read(old))
        extremes_of = new
        if block_size % (8 * _PARTS) == 0 and _is_entrywise(
            jax.make_jaxpr(step)(jax.eval_shape(read, old)).jaxpr
        ):
            # The moments are computed for the update, for the scales and for the codes, each time from 8 bits. That
            # costs less than to store them in float32, which the compiler would do if it knew them to be equal.
            def separate(old):
                # The scales are enough.
                return map_state(
                    lambda x, *_: x._replace(scales=_common.separate(x.scales)) if _is_quantized(x) else x,
                    old,
                    places,
                )

            extremes_of = step(read(separate(old)))[1]
            new = step(read(separate(separate(old))))[1]
        numbers = iter(range(len(jax.tree.leaves(old))))

        def store(x, prefix, _, value, again):
            if not _is_quantized(x):
                return value
            return encode(value, prefix, draw(count, next(numbers)), again)

        return u, map_state(store, old, places, new, extremes_of)

    def update_leaf(place, number, g, old, params, places, count_of_updates, extra):
        """One leaf, in pieces. Returns its update and `{path: leaf}` of its part of the new state."""

        def only(tree):
            return jax.tree_util.tree_map_with_path(
                lambda path, x: x if path == place else optax.MaskedNode(), tree
            )

        def alone(x, _, way):
            return x if way in (None, place) else optax.MaskedNode()

        g, old, params = only(g), map_state(alone, old, places), None if params is None else only(params)
        (leaf,), one = jax.tree.leaves(g), jax.tree.structure(g)
        items, treedef = jax.tree_util.tree_flatten_with_path(old, is_leaf=_is_quantized)
        ways = [_split(path, x, places) for path, x in items]
        prefixes = [prefix for prefix, _ in ways]
        mine = [i for i, (_, way) in enumerate(ways) if way == place]
        layout = _layout(leaf.shape, block_size)
        # Units that are cut nowhere, with so many entries and scales: a block of the flat array, or a row if rows
        # do not hold whole blocks.
        ragged = layout.length < layout.blocks * layout.width and leaf.size > layout.length
        unit = (layout.length, layout.blocks) if ragged else (layout.width, 1)
        units = max(min(chunk_size, leaf.size) // unit[0], 1)

        def flat(x):
            if not _is_quantized(x) and jnp.shape(x) != leaf.shape:
                raise ValueError(
                    f"chunk_size needs an inner transformation whose states have the shape {leaf.shape} of "
                    f"their parameter, got one of shape {jnp.shape(x)}"
                )
            return jax.tree.map(lambda x: x.reshape(-1), x)

        def step(g, p, values):
            state = treedef.unflatten([values.get(i, x) for i, (_, x) in enumerate(items)])
            u, new = inner.update(
                one.unflatten([g]), state, None if p is None else one.unflatten([p]), **extra
            )
            new = jax.tree.leaves(new)
            return jax.tree.leaves(u)[0].astype(g.dtype), {i: new[i] for i in mine}

        def shaped(x):
            return x.reshape((-1, layout.length) if ragged else -1)

        def read(moments):
            def one(i, x):
                if not _is_quantized(x):
                    return x
                codes = shaped(x.codes)
                scales = x.scales.reshape(_layout(codes.shape, block_size).scales_shape)
                return decode(QuantizedArray(codes, scales), prefixes[i]).reshape(-1)

            return {i: one(i, x) for i, x in moments.items()}

        def write(values, like, key):
            def one(i, x):
                if not _is_quantized(like[i]):
                    return x.astype(like[i].dtype)
                key_i = None if key is None else jax.random.fold_in(key, i)
                return flat(encode(shaped(x), prefixes[i], key_i))

            return {i: one(i, x) for i, x in values.items()}

        full, rest = divmod(leaf.size, units * unit[0])

        def width(x):
            return unit[0 if x.size == leaf.size else 1]

        def cut(tree, start, count):
            """So many units from `start` on, or with None what is left after the full pieces."""

            def size(x):
                return (x.size - full * units * width(x)) if count is None else count * width(x)

            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start * width(x), size(x)), tree)

        def paste(tree, part, start):
            return jax.tree.map(
                lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start * width(x), axis=0), tree, part
            )

        def piece(whole, start, count):
            """The new values of these units."""
            g, moments = cut(whole, start, count)
            u, new = step(g, p if p is None else cut(p, start, count), read(moments))
            return u, write(new, moments, draw(count_of_updates, number, start))

        def sweep(whole, start_of, count, turns):
            """So many pieces. Each is pasted a turn later, so that reading comes after writing.

            Else the compiler, which cannot order the readers of a piece before its writer, copies the whole
            arrays; and on a CPU it computes what it writes in place on a single core.
            """

            def turn(i, state):
                whole, last = state
                whole = paste(whole, last, start_of(jnp.maximum(i - 1, 0)))
                part = lax.cond(i < turns, lambda: piece(whole, start_of(i), count), lambda: last)
                return whole, part

            return lax.fori_loop(0, turns + 1, turn, (whole, cut(whole, start_of(0), count)))[0]

        p = None if params is None else jax.tree.leaves(params)[0].reshape(-1)
        # The update is written over the gradient.
        whole = (leaf.reshape(-1), {i: flat(items[i][1]) for i in mine})
        if not _is_entrywise(jax.make_jaxpr(step)(whole[0], p, jax.eval_shape(read, whole[1])).jaxpr):
            raise ValueError(
                "chunk_size needs an inner transformation that treats each entry alone, got one that mixes the "
                "entries of a leaf (a norm, say): leave chunk_size out"
            )
        whole = sweep(whole, lambda i: i * units, units, full)
        if rest:
            whole = sweep(whole, lambda i: full * units, None, 1)
        u, new = whole
        # Both nodes of a quantized leaf, or the one array, get their shape back.
        new = {
            items[i][0]: jax.tree.map(lambda x, like: x.reshape(like.shape), x, items[i][1])
            for i, x in new.items()
        }
        return u.reshape(leaf.shape), new

    def update_in_pieces(g, old, params, places, count, extra):
        items = jax.tree_util.tree_leaves_with_path(old, is_leaf=_is_quantized)
        large = {_split(path, x, places)[1] for path, x in items if _is_quantized(x)}
        updates, moments = {}, {}
        for number, place in enumerate(place for place in places if place in large):
            updates[place], new = update_leaf(place, number, g, old, params, places, count, extra)
            moments |= new

        def rest(tree):
            return jax.tree_util.tree_map_with_path(
                lambda path, x: optax.MaskedNode() if path in large else x, tree
            )

        small = map_state(lambda x, _, way: optax.MaskedNode() if way in large else x, old, places)
        u, new = inner.update(rest(g), small, None if params is None else rest(params), **extra)
        updates |= _paths(u)
        moments |= _paths(new)
        return (
            jax.tree_util.tree_map_with_path(lambda path, _: updates[path], g),
            jax.tree_util.tree_map_with_path(lambda path, _: moments[path], old, is_leaf=_is_quantized),
        )

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        g = _common.widen(updates)
        wide_params = None if params is None else _common.widen(params)
        run = update_whole if chunk_size is None else update_in_pieces
        u, new = run(g, state.inner_state, wide_params, _paths(g), state.rounding_count, extra)
        count = jnp.asarray(optax.safe_increment(state.rounding_count))
        return _common.cast_like(u, updates), QuantizedState(count, new)

    return optax.GradientTransformationExtraArgs(init, update)


# ---------------------------------------------------------------------------------------------- gradients


def compress_gradients(
    codebook: Literal["dynamic", "linear"] = "dynamic",
    *,
    axis_name: Hashable | None = None,
    error_feedback: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Exchanges gradients between workers in 8 bits: `mean_i(decode(encode(g_i)))`, a quarter of the traffic.

    Inside `shard_map` (or `vmap`) with `axis_name`, every worker encodes its own gradient, a byte an entry and
    one scale a leaf, gathers those of the others and averages them in at least float32. Put it first in the
    chain, with gradients that are not averaged yet. Without `axis_name` it only rounds, to try what the
    rounding does. A gradient that is not finite makes its whole leaf NaN on every worker.

    Args:
      codebook: `"dynamic"`, the map of `dynamic_code_map` (seven decades), or `"linear"`, 255 equal steps
        (unbiased within a step of 0.8 percent of the largest entry, small entries become 0).
      axis_name: name (or names) of the mapped axis of the workers. None: no exchange.
      error_feedback: adds what rounding withheld to the next gradient: `e <- g + e - decode(encode(g + e))`,
        with `e = 0` at first; an array more of state, different on each worker.
      stochastic_rounding: rounds at random to one of the two neighbours, so that the mean is exact.
      seed: of the random numbers; workers draw differently.

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
    seed = _checks.integer("seed", seed)
    dynamic = codebook == "dynamic"

    def decode(codes: jax.Array, dtype: Any) -> jax.Array:
        return _decode_dynamic(codes, True, dtype) if dynamic else _decode_linear(codes, dtype)

    def encode(x: jax.Array, key: jax.Array | None) -> QuantizedArray:
        layout = _Layout((), x.size, 1, x.size, (1,) * x.ndim)  # one block
        scale = _extremes(x, layout)
        y = _divide_by_scale(x, scale, layout)
        codes = _encode_dynamic(y, True) if dynamic else _encode_linear(y)
        if key is not None:
            codes = _round_stochastically(y, codes, lambda c: decode(c, y.dtype), key)
        return QuantizedArray(codes, scale)

    def read(q: QuantizedArray) -> jax.Array:
        return decode(q.codes, q.scales.dtype) * q.scales

    def exchange(q: QuantizedArray) -> jax.Array:
        if axis_name is None:
            return read(q)
        everyone = lax.all_gather(q, axis_name)
        workers = everyone.scales.shape[0]
        # One worker after the other, so that the gradients of all of them never exist in float32.
        total = lax.fori_loop(
            1,
            workers,
            lambda i, total: total + read(jax.tree.map(lambda x: x[i], everyone)),
            read(jax.tree.map(lambda x: x[0], everyone)),
        )
        return total / workers

    def init(params: optax.Params) -> CompressGradientsState:
        residual = _common.moments_like(params) if error_feedback else optax.EmptyState()
        return CompressGradientsState(jnp.zeros([], jnp.int32), residual)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        g = _common.widen(updates)
        if error_feedback:
            g = jax.tree.map(jnp.add, g, state.residual)
        leaves, treedef = jax.tree.flatten(g)
        keys: list[Any] = [None] * len(leaves)
        if stochastic_rounding:
            key = jax.random.fold_in(jax.random.key(seed), state.rounding_count)
            if axis_name is not None:
                key = jax.random.fold_in(key, lax.axis_index(axis_name))
            keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        sent = [encode(x, key) for x, key in zip(leaves, keys)]
        residual = state.residual
        if error_feedback:
            residual = treedef.unflatten([x - read(q) for x, q in zip(leaves, sent)])
        mean = treedef.unflatten([exchange(q) for q in sent])
        count = jnp.asarray(optax.safe_increment(state.rounding_count))
        return _common.cast_like(mean, updates), CompressGradientsState(count, residual)

    return optax.GradientTransformationExtraArgs(init, update)
