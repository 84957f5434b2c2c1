"""Softmax attention by cuDNN, for the calls that `jax.nn.dot_product_attention` runs there exactly as asked.

Nothing is computed anew here: this module decides which calls cuDNN runs, keeps what it has no rule for away from it
(rows that see no key, NaN in hidden positions, `vmap`), and attaches the derivatives of the attention by XLA, of which
cuDNN computes the transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft._trees import align_varying, is_explicitly_sharded, is_partitioned, partition
from jaxsoft.attention._rows import AttentionRows
from jaxsoft.attention._run import work_of
from jaxsoft.attention._spec import AttentionSpec, Visibility
from jaxsoft.kernels.inner import attach, choose_cudnn, generation, unlogged

_GENERATIONS = ("Ampere", "Ada", "Hopper", "Blackwell")


class Call(NamedTuple):
    """The static part of a call.

    Attributes:
      scale: multiplies `query @ key`.
      causal: whether a query sees no later key.
      left: how many earlier positions a query sees; None: all.
      has_gradient: whether cuDNN computes the gradient, too.
    """

    scale: float
    causal: bool
    left: int | None
    has_gradient: bool


class Options(NamedTuple):
    """Options of `dot_product_attention` that cuDNN or `jax.nn` does not have, or has with another convention."""

    bias: Any
    mask: Any
    alibi_slopes: Any
    sinks: Any
    dropout_rate: float
    return_residual: bool
    return_statistics: bool


def unavailable(device_kind: str) -> str | None:
    """Why cuDNN's attention does not run on a GPU, or None."""
    if generation(device_kind) in _GENERATIONS:
        return None
    here = next((d for d in jax.devices() if d.device_kind == device_kind), None)
    capability = str(getattr(here, "compute_capability", ""))
    if capability.replace(".", "", 1).isdigit() and float(capability) >= 8:
        return None
    return f"it needs an NVIDIA GPU of compute capability 8.0 or later, this is {device_kind!r}"


def call_of(
    spec: AttentionSpec, masks: Visibility, arrays: tuple, is_softmax: bool, scale: Any, options: Options
) -> Call | str:
    """The call that gives the attention of query, key and value (`arrays`) exactly, or why there is none."""
    query, key, value = arrays
    width = query.shape[-1]
    left, right = spec.band()
    if not is_softmax:
        return "it has no normalizer but softmax"
    for name, given in options._asdict().items():
        if given is not None and given is not False and (name != "dropout_rate" or given):
            return _OTHERWISE.get(name, f"it has no {name}")
    for name, given in (("softcap", spec.softcap), ("mask_fn", spec.mask_fn), ("precision", spec.precision)):
        if given is not None:
            return f"it has no {name}"
    if masks.query_segments is not None:
        return "it has no segments"
    if masks.query_positions is not None or masks.key_positions is not None:
        return "it has no positions"
    if spec.offset != 0:
        return "it has no query_offset"
    if scale is not None and not _checks.is_concrete_number(scale):
        return "scale must be a number"
    if query.dtype not in (jnp.bfloat16, jnp.float16) or not query.dtype == key.dtype == value.dtype:
        names = ", ".join(dict.fromkeys(a.dtype.name for a in arrays))
        return f"query, key and value must all be bfloat16 or all float16, not {names}"
    if value.shape[-1] != width:
        return f"the values must be as wide as the keys, {width}, not {value.shape[-1]}"
    if not all(a.size for a in arrays):
        return "there is nothing to read"
    if any(map(is_explicitly_sharded, arrays)):
        return "an operand is sharded over Explicit mesh axes: call the function inside jax.shard_map"
    if spec.implementation is None and any(map(is_partitioned, arrays)):
        return "of arrays on Auto mesh axes, it takes some shardings only: call the function inside jax.shard_map"
    if right not in (None, 0) or (right is None and left is not None):
        return "a window must end at the query: local_window_size=(left, 0)"
    if left is not None and masks.key_lengths is not None:
        return "a window with key_value_seq_lengths may leave a query without keys"
    if left is not None and spec.queries != spec.keys:
        return "a window needs as many queries as keys"
    # A single query is decoded, for which jax has no gradient; its rare gradient is XLA's.
    call = Call(width**-0.5 if scale is None else float(scale), right == 0, left, spec.queries > 1)
    try:  # jax has checks of its own, which depend on the versions of jax and cuDNN
        jax.eval_shape(_forward(call), *arrays, _lengths(spec, masks.key_lengths))
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"jax.nn.dot_product_attention says: {' '.join(str(error).split())[:200]}"
    return call


_MAY_HIDE_ALL = "may hide all keys of a query, which cuDNN does not give 0"
_OTHERWISE = {
    "bias": f"a bias (-inf) {_MAY_HIDE_ALL}",
    "mask": f"a mask {_MAY_HIDE_ALL}",
    "return_residual": "its log-sum-exp has no derivative",
    "return_statistics": "it returns no statistics",
}


def _lengths(spec: AttentionSpec, key_lengths: Array | None) -> Array | None:
    """Key lengths for cuDNN: at least 1, because it has no rule for a query without keys."""
    return None if key_lengths is None else jnp.clip(key_lengths, 1, spec.keys)


def attention_or_reason(
    rows: AttentionRows,
    arrays: tuple,
    is_softmax: bool,
    scale: Any,
    options: Options,
    by_xla: Callable,
) -> Array | str:
    """The attention `[B, T, N, H]` if cuDNN runs it, else why not; raises if it was requested and cannot.

    Args:
      rows: the attention.
      arrays: query, key and value, with one batch axis.
      is_softmax: whether the normalizer is softmax, without options.
      scale: as the user gave it.
      options: as the user gave them.
      by_xla: `(*arrays, query_lengths, key_lengths) -> the attention by XLA`, which has the derivatives.
    """
    spec, masks = rows.spec, rows.masks
    calls = []

    def refusal(kind: str) -> str | None:
        reason = unavailable(kind)
        if reason is None:
            calls.append(call_of(spec, masks, arrays, is_softmax, scale, options))
            reason = calls[0] if isinstance(calls[0], str) else None
        return reason

    reason = choose_cudnn("an attention", spec.implementation, work_of(spec, arrays[0]), refusal)
    return _attend(calls[0], spec, masks, arrays, by_xla) if reason is None else reason


def _attend(call: Call, spec: AttentionSpec, masks: Visibility, arrays: tuple, by_xla: Callable) -> Array:
    query, key, value = arrays
    shown = None
    if masks.key_lengths is not None:
        keep = jnp.arange(spec.keys) < masks.key_lengths[:, None]
        key, value = (jnp.where(keep[..., None, None], a, 0) for a in (key, value))
        shown = jnp.broadcast_to(masks.key_lengths[:, None] > 0, (spec.batch, spec.queries))
    if masks.query_lengths is not None:
        keep = jnp.arange(spec.queries) < masks.query_lengths[:, None]
        query = jnp.where(keep[..., None, None], query, 0)
        shown = keep if shown is None else shown & keep
    operands, lengths = align_varying(((query, key, value), (masks.query_lengths, masks.key_lengths)))
    states = list(_forward(call)(*lax.stop_gradient(operands), _lengths(spec, lengths[1])))

    def rule(states, lengths, operands, tangents):
        d = tuple(jnp.zeros_like(a) if d is None else d for a, d in zip(operands, tangents))
        with unlogged():
            d_out = jax.jvp(lambda *operands: by_xla(*operands, *lengths), operands, d)[1]
        return [d_out, jax.tree.map(jnp.zeros_like, partition(states[1])[0])]

    def pull_back(states, lengths, operands, cotangents):
        return _backward(call)(states[1], operands, _lengths(spec, lengths[1]), cotangents[0])

    out = attach(rule, pull_back if call.has_gradient else None, states, lengths, operands)[0]
    return out if shown is None else jnp.where(shown[..., None, None], out, 0)


# --- jax.nn.dot_product_attention, for vmap --------------------------------------------------------------------------


def _with_pull_back(call: Call, lengths: Array | None, query, key, value) -> tuple[Array, Any]:
    """The attention, and the function that pulls back its cotangent, a pytree (empty without a gradient)."""

    def attention(query, key, value):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=call.scale,
            is_causal=call.causal,
            key_value_seq_lengths=lengths,
            local_window_size=None if call.left is None else (call.left, 0),
            implementation="cudnn",
        )

    if not call.has_gradient:
        return attention(query, key, value), ()
    return jax.vjp(attention, query, key, value)


def _merged(function: Callable) -> Callable:
    """`function` of arrays whose first axis is the batch (or empty), in which `vmap` enlarges the batch."""
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def of_mapped(size: int, mapped: list, *args):
        def merge(a, is_mapped):
            a = a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(size * a.shape[1], *a.shape[2:])

        out = run(*jax.tree.map(merge, args, tuple(mapped)))
        out = jax.tree.map(lambda a: a.reshape(size, a.shape[0] // size, *a.shape[1:]), out)
        return out, jax.tree.map(lambda a: True, out)

    return run


@functools.cache
def _forward(call: Call) -> Callable:
    """`(query, key, value, lengths) -> the attention, and the leaves of its pull-back`."""

    def forward(query, key, value, lengths):
        out, pull_back = _with_pull_back(call, lengths, query, key, value)
        return out, jax.tree.leaves(pull_back)

    return _merged(forward)


@functools.cache
def _backward(call: Call) -> Callable:
    """`(leaves of the pull-back, (query, key, value), lengths, cotangent) -> the cotangents of the three`."""

    def backward(kept, operands, lengths, cotangent):
        structures = []

        def find(*operands):
            structures.append(jax.tree.structure(_with_pull_back(call, lengths, *operands)[1]))

        jax.eval_shape(find, *operands)
        return jax.tree.unflatten(structures[0], kept)(cotangent)

    return _merged(backward)
