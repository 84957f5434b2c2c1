"""Runs a pass over attention scores: chooses the implementation and the block sizes that suit it."""

from __future__ import annotations

import functools
import math

import jax
from jax import lax
from jaxtyping import Array

from jaxsoft._trees import align_varying
from jaxsoft.attention import _sweeps
from jaxsoft.attention._pass import finished_states, tangents
from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility
from jaxsoft.kernels.inner import Kernel, Work, attach, blocks, choose, likely, measured_sizes

# Approximate number of scores per pair of blocks, which bounds the temporary memory.
_PAIR_ENTRIES = {"cpu": 2**22, "other": 2**25}
_WIDEST_BLOCK = {"queries": 512, "keys": 256}


def run(spec: AttentionSpec, functions: tuple, inputs: Inputs, masks: Visibility, args: list) -> list:
    """The states of reductions (`functions`, their arrays in `args`) for all rows; leaves are `[nq, B, K, R, ...]`."""

    def refusal(backend, kernel: Kernel) -> str | None:
        return _sweeps.refusal(backend, kernel, spec, functions, inputs, masks, args)

    work = _work(spec.groups, spec.queries, spec.keys, inputs.query)
    kernel = choose("reductions of the rows of an attention", spec.implementation, work, refusal)
    return _run(spec, functions, kernel, inputs, masks, args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    spec: AttentionSpec,
    functions: tuple,
    kernel: Kernel | None,
    inputs: Inputs,
    masks: Visibility,
    args: list,
) -> list:
    inputs, masks, args = align_varying((inputs, masks, args))
    if kernel is not None:
        return _sweeps.run(kernel, spec, functions, inputs, masks, args)
    states = finished_states(spec, functions, *lax.stop_gradient((inputs, masks, args)))
    return attach(functools.partial(tangents, spec, functions), None, states, masks, (inputs, args))


def _work(groups: int, queries: int, keys: int, query: Array) -> Work:
    """The size of a pass; the last axis of `query` holds the features."""
    return Work("attention", groups * queries, keys, query.shape[-1], query.dtype.itemsize)


def choose_block_sizes(
    given: tuple[int | None, int | None], implementation: str | None, groups: int, query: Array, key: Array
) -> tuple[int, int]:
    """Queries and keys per block, for `query` `[B, T, N, H]` and `key` `[B, S, K, H]`; `given` is the user's choice."""
    (b, t, n, _), s = query.shape, key.shape[1]
    work = _work(groups, t, s, query)
    if likely(implementation, work):
        return _kernel_block_sizes(given, groups, t, s, measured_sizes(implementation, work))
    return _xla_block_sizes(given, b * n, t, s)


def _kernel_block_sizes(given, groups: int, t: int, s: int, tuned: dict[str, int]) -> tuple[int, int]:
    """Tile of a kernel; by default a multiple of 64 rows (queries times heads per key head), and 128 keys or all."""
    user = dict(blocks())
    least = 64 // math.gcd(64, groups)
    bq = user.get("rows") or given[0] or tuned.get("rows") or max(least, 128 // groups // least * least)
    bk = user.get("columns") or given[1] or tuned.get("columns") or 128
    return max(min(bq, -(-t // least) * least), 1), max(min(bk, -(-s // 8) * 8), 1)


def _xla_block_sizes(given, rows: int, t: int, s: int) -> tuple[int, int]:
    entries = _PAIR_ENTRIES["cpu" if jax.default_backend() == "cpu" else "other"]
    shrink = 1
    while shrink < 8 and rows * math.prod(_WIDEST_BLOCK.values()) > entries * shrink**2:
        shrink *= 2
    sizes = []
    for name, size, length in (("queries", given[0], t), ("keys", given[1], s)):
        if size is None:
            blocks = -(-length * shrink // _WIDEST_BLOCK[name])
            even = -(-length // max(blocks, 1))
            size = -(-even // 8) * 8
        sizes.append(max(min(size, length), 1))
    bq, bk = sizes
    if given[1] is None and t < 64:  # few queries: long key blocks
        bk = max(min(s, max(bk, min(4096, entries // max(rows * bq, 1) // 8 * 8))), 1)
    return bq, bk
