"""Optimizer states in 8 bits.

`quantize_state` keeps the moments of any optax optimizer in 8 bits, one byte per entry and one scale per 256: Adam
stores 2.03 bytes per parameter instead of 8, Lion 1.02 instead of 4.

```python
import jax, jax.numpy as jnp, optax
from jaxsoft.optimizers import quantize_state

params = {"embed": {"table": jnp.ones((64, 128))}, "layer": {"kernel": jnp.ones((128, 128))}}


def not_embeddings(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "embed" not in jax.tree_util.keystr(path), params)


tx = quantize_state(optax.adamw(1e-3), mask=not_embeddings)
state = jax.jit(tx.init)(params)
print(state.inner_state[0].mu["layer"]["kernel"].dtype, state.inner_state[0].mu["embed"]["table"].dtype)
```

The paper keeps the states of embeddings in 32 bits, as above, and normalizes right after the lookup, as
`jaxsoft.norms.stable_embedding` does.

With `chunk_size=2**18`, for optimizers that treat each entry alone (Adam, Lion, RMSProp), no step holds the moments of
a whole leaf in float32. Leave it out for sharded parameters. `benchmarks/optimizer_step.py` measures the time of a
step; on a CPU an 8-bit step saves memory, not time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsoft import _checks
from jaxsoft.optimizers import _codes, _common
from jaxsoft.optimizers._common import Mask
from jaxsoft.optimizers._moments import (
    Format,
    Run,
    is_entrywise,
    is_quantized,
    join,
    paths,
    split,
    without_names,
)
from jaxsoft.optimizers._pieces import update_in_pieces

_SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares", "grad_sum_of_squares")


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
      rounding_count: number of updates, part of the key of stochastic rounding.
      inner_state: the state of the inner transformation, with the codes in the place of each large moment: one array
        per parameter, as flax's `nnx.Optimizer` expects.
      scales: the scales of each moment, or a scalar 1 for a leaf that is not in 8 bits, in the order of `inner_state`,
        with lists in place of its nodes. A moment is `dequantize_blockwise(QuantizedArray(codes, scales))`.
    """

    rounding_count: jax.Array
    inner_state: Any
    scales: Any


def quantize_state(
    inner: optax.GradientTransformation,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    unsigned: Iterable[str] = _SECOND_MOMENTS,
    mask: Mask = None,
    stochastic_rounding: bool = False,
    key: jax.Array | int = 0,
    chunk_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of any optimizer in 8 bits: 1.016 bytes instead of 4 per entry.

    Each step converts the moments to float32, updates them with `inner`, which also gives the step, and rounds them
    back. A leaf of the inner state is a moment if it has the place and the shape of a parameter in a copy of the
    parameters' tree. Everything else (counts, scalars, factors, hyper-parameters) stays unchanged. See
    `quantize_blockwise` for the format. `inner` computes in at least float32, also for parameters in bfloat16.

        optax.chain(quantize_state(optax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))
        quantize_state(optax.adamw(1e-3))                                 # the same, around the whole optimizer
        quantize_state(optax.adamw(1e-3), mask=lambda params: ...)        # embeddings stay in 32 bits

    Second moments (see `unsigned`) use the map without signs, and a positive entry is never rounded to 0, since the
    step divides by its root. Not for optimizers that subtract two moments under a root (centered RMSProp).

    If `inner` treats each entry alone (Adam, Lion, RMSProp; nothing with a norm) and `block_size` is a multiple of 64,
    the moments are computed from 8 bits at each use and never stored in float32. Otherwise they exist in float32
    within the step, on a CPU for many leaves at once. With `chunk_size` each leaf is updated in pieces of about this
    number of entries, which needs no such memory for any `block_size`. This requires an `inner` that treats each entry
    alone (others raise an error) and, because the pieces cut across shards, parameters that are not sharded (or a
    call inside `shard_map`). The updates overwrite the gradients if these are computed in the same jitted function;
    otherwise they are stored, 4 bytes per parameter.

    Sharding: with Explicit mesh axes, codes are placed as the parameter, and scales too, except along the axes that
    make up a row of blocks if the devices' parts of a row are not whole blocks: there scales are on every device, and
    the moment as well within the step (with `chunk_size`, always). With Auto axes, place the state:

    Codes are sharded like the parameter. Scales have as many axes, so the same `PartitionSpec` fits unless it
    splits the last axis within a block:

        optax.tree_map_params(tx, lambda x, s: jax.device_put(x, s) if x.ndim else x, state, shardings)

    Args:
      inner: any gradient transformation; extra arguments of `update` reach it.
      block_size: entries per scale, a static integer.
      min_size: moments with fewer entries stay in float32.
      unsigned: names of the inner state's fields that hold second moments, which are never negative. All other moments
        use the map with signs, which is correct for all moments but less precise for these.
      mask: parameters with moments in 8 bits: a pytree of bools (or a prefix of one), or a function from the
        parameters to one. None: all.
      stochastic_rounding: rounds at random to one of the two neighbours, so that the mean is exact. Slower.
      key: a PRNG key, or an integer in its place, for stochastic rounding.
      chunk_size: entries per piece, e.g. 262144. None: whole leaves.

    Returns:
      A gradient transformation with state `QuantizedState`. Call `init` under `jax.jit`, so that float32 zeros exist
      for one leaf at a time instead of for all.

    Raises:
      TypeError: for an argument of another type.
      ValueError: for a size that is not positive, or (in the first update) `chunk_size` with an inner transformation
        that does not treat each entry alone.

    Reference:
      "8-bit Optimizers via Block-wise Quantization".

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jaxsoft.optimizers import quantize_state
      >>> tx, params = quantize_state(optax.adam(0.1)), jnp.ones(8192)
      >>> state = tx.init(params)
      >>> print(sum(x.nbytes for x in jax.tree.leaves(state)) / 8192)
      2.03271484375
      >>> updates, state = tx.update(0.5 * params, state, params)
      >>> print(round(float(updates[0]), 4))
      -0.1
    """
    block_size = _checks.integer("block_size", block_size, at_least=1)
    min_size = _checks.integer("min_size", min_size, at_least=0)
    if isinstance(unsigned, str) or not all(isinstance(name, str) for name in unsigned):
        raise TypeError(f"unsigned must be a collection of field names, got {_checks.describe(unsigned)}")
    format = Format(block_size, frozenset(unsigned))
    _checks.flag("stochastic_rounding", stochastic_rounding)
    _common.check_key("key", key)
    if chunk_size is not None:
        chunk_size = _checks.integer("chunk_size", chunk_size, at_least=1)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> QuantizedState:
        params = _common.widen(params)
        places = paths(params)
        if mask is not None and places:
            keep = paths(_common.broadcast_mask(mask, params))
            places = {path: x for path, x in places.items() if keep[path]}

        def store(x, signed, place):
            moment = (
                place is not None
                and jnp.issubdtype(jnp.result_type(x), jnp.floating)
                and jnp.ndim(x) > 0
                and jnp.shape(x) == places[place].shape
                and max(min_size, 1) <= jnp.size(x)
            )
            # Without the barrier the compiler folds the constant zeros, which takes minutes.
            return format.encode(lax.optimization_barrier(x), signed) if moment else x

        codes, scales = split(format.map(store, inner.init(params), places))
        scales = without_names(jax.tree.structure(codes).unflatten(scales), params)
        return QuantizedState(jnp.zeros([], jnp.int32), codes, scales)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        def run(g, inner_state, params):
            return inner.update(g, inner_state, params, **extra)

        scales, treedef = jax.tree.flatten(state.scales)
        args = _common.widen(updates), join(state.inner_state, scales), _common.widen(params)
        draws = _common.fold(_common.as_key(key), state.rounding_count) if stochastic_rounding else None
        if chunk_size is None:
            u, new = _update_whole(format, run, *args, draws)
        else:
            u, new = update_in_pieces(format, run, *args, draws, chunk_size)
        count = jnp.asarray(optax.safe_increment(state.rounding_count))
        codes, scales = split(new)
        return _common.cast_like(u, updates), QuantizedState(count, codes, treedef.unflatten(scales))

    return optax.GradientTransformationExtraArgs(init, update)


def _update_whole(format: Format, run: Run, g: Any, old: Any, params: Any, key: Any) -> tuple[Any, Any]:
    """The updates and the new inner state, all leaves at once."""
    places = paths(g)

    def step(wide):
        return run(g, wide, params)

    def read(old):
        return format.map(format.decode, old, places)

    u, new = step(read(old))
    again = new
    if format.block_size % (8 * _codes.PARTS) == 0 and is_entrywise(
        jax.make_jaxpr(step)(jax.eval_shape(read, old)).jaxpr
    ):
        # Computes the moments from 8 bits three times: for the update, the scales and the codes. This costs less than
        # storing them in float32, which the compiler would do if it knew that they are equal.
        other = _separate_scales(old)
        again = step(read(other))[1]
        new = step(read(_separate_scales(other)))[1]
    numbers = itertools.count()

    def store(x, signed, _, value, again):
        if not is_quantized(x):
            return value
        return format.encode(value, signed, _common.fold(key, next(numbers)), again)

    return u, format.map(store, old, places, new, again)


def _separate_scales(state: Any) -> Any:
    """The state with the scales of its moments passed through `_common.separate`."""
    return jax.tree.map(
        lambda x: x._replace(scales=_common.separate(x.scales)) if is_quantized(x) else x,
        state,
        is_leaf=is_quantized,
    )
