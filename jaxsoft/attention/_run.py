"""Runs a pass over attention scores: chooses the implementation and the block sizes that suit it."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from jax import lax
from jaxtyping import Array

from jaxsoft._trees import align_varying
from jaxsoft.attention import _sweeps
from jaxsoft.attention._blocks import recut, recut_rows
from jaxsoft.attention._pass import finished_states, tangents
from jaxsoft.attention._spec import AttentionSpec, Inputs, Visibility
from jaxsoft.attention._visibility import without_hidden_keys
from jaxsoft.kernels.inner import (
    BLOCK_SCORES,
    Kernel,
    Work,
    attach,
    blocks,
    choose,
    device,
    evenly,
    likely,
    measured_sizes,
    unlogged,
)

# On a CPU: the approximate number of scores per pair of blocks, which bounds the temporary memory; the widest blocks.
_CPU_PAIR_SCORES = 2**22
_CPU_WIDEST = {"queries": 512, "keys": 256}
# Elsewhere: blocks are as large as `BLOCK_SCORES` allows. Wider ones compute more of what a causal mask hides.
_WIDEST = {"queries": 1024, "keys": 2048}
_NARROWEST = {"queries": 64, "keys": 128}


def run(
    spec: AttentionSpec, functions: tuple, inputs: Inputs, masks: Visibility, args: list, refused: dict | None
) -> list:
    """The states of reductions (`functions`, their arrays in `args`) for all rows; leaves are `[nq, B, K, R, ...]`.

    `refused` says why other implementations do not run the pass.
    """
    kernel = choose_kernel(spec, functions, inputs, masks, args, refused)
    cut = spec if kernel is not None else for_xla(spec)
    if kernel is not None or cut != spec:
        masks = masks._replace(needed=None)  # which kernels do not read, and which does not fit other blocks
    if cut == spec:
        return _run(spec, functions, kernel, inputs, masks, args)
    # The blocks are those of a kernel, which was likely to run but does not.
    states = _run(cut, functions, None, *recut(spec, cut, inputs, masks, args))
    return jax.tree.map(functools.partial(recut_rows, cut, spec), states)


def choose_kernel(
    spec: AttentionSpec, functions: tuple, inputs: Inputs, masks: Visibility, args: list, refused: dict | None
) -> Kernel | None:
    """The kernel backend that runs these reductions, None for XLA."""

    def refusal(backend, kernel: Kernel) -> str | None:
        return _sweeps.refusal(backend, kernel, spec, functions, inputs, masks, args)

    what, work = "reductions of the rows of an attention", work_of(spec, inputs.query)
    return choose(what, spec.implementation, work, refusal, refused)


def kernel_of(spec: AttentionSpec, functions: tuple, inputs: Inputs, masks: Visibility) -> Kernel | None:
    """The kernel that would run reductions without arrays; None for XLA."""
    with unlogged():
        return choose_kernel(spec, functions, inputs, masks, [()] * len(functions), None)


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
    inputs = without_hidden_keys(spec, inputs, masks)
    states, needed = finished_states(spec, functions, *lax.stop_gradient((inputs, masks, args)))
    masks = masks._replace(needed=needed)
    return attach(functools.partial(tangents, spec, functions), None, states, masks, (inputs, args))


def for_xla(spec: AttentionSpec) -> AttentionSpec:
    """The same attention in XLA's blocks: `spec` has a kernel's if one was likely to run."""
    rows = spec.batch * spec.heads * spec.groups
    bq, bk = _xla_block_sizes(spec.given, rows, *_of_chunk(spec.chunks, spec.queries, spec.keys))
    return dataclasses.replace(spec, bq=bq, bk=bk)


def _of_chunk(chunks: int, t: int, s: int) -> tuple[int, int]:
    """Queries and keys of a chunk: a block that crosses two chunks is seen by the queries of either."""
    return -(-t // chunks), -(-s // chunks)


def work_of(spec: AttentionSpec, query: Array) -> Work:
    """The size of a pass."""
    return _work(spec.groups, spec.queries, spec.keys, query)


def _work(groups: int, queries: int, keys: int, query: Array) -> Work:
    """The size of a pass; the last axis of `query` holds the features."""
    return Work("attention", groups * queries, keys, query.shape[-1], query.dtype.itemsize)


def choose_block_sizes(
    given: tuple[int | None, int | None],
    implementation: str | None,
    groups: int,
    query: Array,
    key: Array,
    chunks: int = 1,
) -> tuple[int, int]:
    """Queries and keys per block, for `query` `[B, T, N, H]` and `key` `[B, S, K, H]`; `given` is the user's choice."""
    (b, t, n, _), s = query.shape, key.shape[1]
    work = _work(groups, t, s, query)
    t, s = _of_chunk(chunks, t, s)
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
    """Queries and keys per block for XLA; `rows` is the number of query heads in the batch."""
    sizes = _cpu_block_sizes if device()[0] == "cpu" else _accelerator_block_sizes
    bq, bk = sizes(given, max(rows, 1), t, s)
    return max(min(bq, t), 1), max(min(bk, s), 1)


def _cpu_block_sizes(given, rows: int, t: int, s: int) -> tuple[int, int]:
    shrink = 1
    while shrink < 8 and rows * math.prod(_CPU_WIDEST.values()) > _CPU_PAIR_SCORES * shrink**2:
        shrink *= 2
    bq = given[0] or evenly(t, _CPU_WIDEST["queries"] / shrink, 8)
    bk = given[1] or evenly(s, _CPU_WIDEST["keys"] / shrink, 8)
    if given[1] is None and t < 64:  # few queries: long key blocks
        bk = max(bk, min(4096, _CPU_PAIR_SCORES // (rows * max(min(bq, t), 1)) // 8 * 8))
    return bq, bk


def _accelerator_block_sizes(given, rows: int, t: int, s: int) -> tuple[int, int]:
    """Blocks of about twice as many keys as queries, which together have at most `BLOCK_SCORES` scores, if possible."""
    scores = BLOCK_SCORES // rows
    wide = 1 << math.isqrt(2 * scores).bit_length() - 1
    bk = given[1] or max(_NARROWEST["keys"], min(wide, _WIDEST["keys"]))
    bq = given[0] or max(_NARROWEST["queries"], min(scores // min(bk, max(s, 1)), _WIDEST["queries"]))
    bq = given[0] or evenly(t, bq, 8)
    if given[1] is None and bq >= t:  # few queries: long key blocks
        bk = max(bk, scores // max(t, 1))
    return bq, given[1] or evenly(s, bk, 128)
