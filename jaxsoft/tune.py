"""Measures kernels on this machine's device, and stores the best block sizes and where XLA is faster.

    python -m jaxsoft.tune [--out FILE] [--kinds dense linear attention] [--minutes 20]

Rows of stored scores, linear heads and attention are timed forward and backward, with several block sizes, against
`implementation="xla"` (attention on a GPU also against `"cudnn"`). Block sizes whose results differ from XLA's are left
out. The table is written to `$JAXSOFT_TUNING` or `~/.cache/jaxsoft/tuning`, where jaxsoft finds it from the next
process on: with `implementation=None` it then runs kernels where they were not slower than XLA, with the best sizes.
`--smoke` does all this with tiny shapes and interpreted kernels, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxsoft
from jaxsoft import losses
from jaxsoft.attention import dot_product_attention
from jaxsoft.kernels.inner import BACKENDS, Kernel, Work, device, tables

# Block sizes to try in addition to the backend's own choice: rows and columns (in attention: queries and keys).
CANDIDATES = {
    "pallas_tpu": {
        "dense": ((128, 256, 512), (512, 1024, 2048)),
        "linear": ((128, 256, 512, 1024), (256, 512, 1024)),
        "attention": ((128, 256, 512), (128, 512, 1024)),
    },
    "mosaic_gpu": {
        "dense": ((64, 128), (64, 128, 256)),
        "linear": ((64, 128), (64, 128, 192, 256)),
        "attention": ((64, 128), (64, 128)),
    },
}
# Block sizes enter the table if their time is below this fraction of that of the backend's own choice.
_WORTHWHILE = 0.98
# Largest relative difference from XLA's results, `|a - b| / |b|`: float32 products may be computed in fewer bits.
_TOLERANCE = 2e-2


class Case(NamedTuple):
    """A case to measure.

    Attributes:
      work: its kind and size.
      dtype: the dtype of the arrays.
      batch: the number of matrices (in attention: the batch size).
      heads: in attention, the number of key heads.
      groups: in attention, the number of query heads that share a key head.
      gradient: whether the backward pass is measured.
    """

    work: Work
    dtype: Any
    batch: int = 1
    heads: int = 1
    groups: int = 1
    gradient: bool = True

    def __str__(self) -> str:
        w = self.work
        many = f", {self.batch} x {self.heads}" if w.kind == "attention" else ""
        return f"{w.kind} {w.shape}{many}, {jnp.dtype(self.dtype).name}"


def dense(rows: int, columns: int, dtype: Any) -> Case:
    """Rows of stored scores."""
    return Case(Work("dense", rows, columns, 0, jnp.dtype(dtype).itemsize), dtype)


def linear(rows: int, features: int, columns: int, dtype: Any) -> Case:
    """A linear head."""
    return Case(Work("linear", rows, columns, features, jnp.dtype(dtype).itemsize), dtype)


def attention(batch, queries, keys, heads, groups, width, dtype: Any, gradient: bool = True) -> Case:
    """Attention, causal if there are as many queries as keys."""
    work = Work("attention", queries * groups, keys, width, jnp.dtype(dtype).itemsize)
    return Case(work, dtype, batch, heads, groups, gradient)


CASES = (
    linear(8192, 4096, 131072, jnp.bfloat16),
    attention(4, 8192, 8192, 16, 1, 128, jnp.bfloat16),
    dense(8192, 32768, jnp.bfloat16),
    linear(8192, 2304, 256000, jnp.bfloat16),
    attention(64, 1, 32768, 8, 4, 128, jnp.bfloat16, gradient=False),
    dense(256, 1048576, jnp.bfloat16),
    linear(2048, 1024, 32768, jnp.bfloat16),
    attention(8, 2048, 2048, 8, 4, 128, jnp.bfloat16),
    attention(8, 2048, 2048, 16, 1, 64, jnp.bfloat16),
    dense(8192, 32768, jnp.float32),
    dense(65536, 1024, jnp.bfloat16),
    linear(2048, 1024, 32768, jnp.float32),
    attention(8, 2048, 2048, 16, 1, 64, jnp.float32),
)
SMOKE = (
    dense(24, 300, jnp.float32)._replace(gradient=False),
    linear(24, 16, 300, jnp.bfloat16),
    attention(1, 40, 40, 1, 2, 16, jnp.float32),
)
_SMOKE_CANDIDATES = {"dense": ((8,), (128,)), "linear": ((8,), (128,)), "attention": ((16,), (128,))}


class Times(NamedTuple):
    """Milliseconds of the forward pass, and of forward and backward together (None if not requested)."""

    forward: float
    both: float | None

    @property
    def backward(self) -> float | None:
        """`both` without `forward`; at least 1 % of `both`, because noise may leave nothing."""
        return None if self.both is None else max(self.both - self.forward, 0.01 * self.both)


def arguments(case: Case) -> tuple:
    """The case's random arguments, followed by weights for the result."""
    w, keys = case.work, jax.random.split(jax.random.key(0), 4)

    def normal(key, *shape):
        return jax.random.normal(key, shape, case.dtype)

    if w.kind == "dense":
        return 2 * normal(keys[0], w.rows, w.columns), jax.random.normal(keys[3], (w.rows,))
    if w.kind == "linear":
        hidden, weight = normal(keys[0], w.rows, w.features), normal(keys[1], w.features, w.columns)
        labels = jax.random.randint(keys[2], (w.rows,), 0, w.columns)
        return hidden, weight / w.features**0.5, labels, jax.random.normal(keys[3], (w.rows,))
    query = normal(keys[0], case.batch, w.rows // case.groups, case.heads * case.groups, w.features)
    key, value = (normal(k, case.batch, w.columns, case.heads, w.features) for k in keys[1:3])
    return query, key, value, normal(keys[3], *query.shape)


def function(case: Case, implementation: str) -> tuple[Callable, tuple[int, ...]]:
    """The function to time, which takes all arguments but the last, and the indices of those to differentiate."""
    kind = case.work.kind
    if kind == "dense":
        return lambda x: jaxsoft.logsumexp(x, implementation=implementation), (0,)
    if kind == "linear":

        def head(hidden, weight, labels):
            logits = jaxsoft.linear_logits(hidden, weight, implementation=implementation)
            return losses.cross_entropy(logits, labels)

        return head, (0, 1)
    causal = case.work.rows // case.groups == case.work.columns

    def attend(query, key, value):
        return dot_product_attention(query, key, value, is_causal=causal, implementation=implementation)

    return attend, (0, 1, 2)


def compile_case(case: Case, implementation: str, args: tuple) -> list[tuple[Callable, tuple]]:
    """The compiled forward pass and, if `case.gradient`, forward and backward, each with its arguments."""
    f, wanted = function(case, implementation)

    def weighted(*args):
        return jnp.sum(f(*args[:-1]) * args[-1])

    runs = [(jax.jit(f).lower(*args[:-1]).compile(), args[:-1])]
    if case.gradient:
        runs.append((jax.jit(jax.value_and_grad(weighted, wanted)).lower(*args).compile(), args))
    return runs


def milliseconds(run: Callable, args: tuple, repeats: int) -> float:
    """The median time of several samples; calls are queued without a pause, so that none waits for the host."""

    def sample(calls: int) -> float:
        out = None
        start = time.perf_counter()
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    sample(1)
    calls = max(1, min(20, int(0.02 / max(sample(1), 1e-6))))
    return 1e3 * statistics.median(sample(calls) for _ in range(repeats))


def measure(
    case: Case, implementation: str, args: tuple, repeats: int, like: list | None
) -> tuple[Times, list]:
    """Times and results; raises `ValueError` if the results differ from `like`."""
    runs = compile_case(case, implementation, args)
    results = [run(*given) for run, given in runs]
    if like is not None:
        for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(like)):
            error = float(_distance(a, b))
            if not error <= _TOLERANCE:
                raise ValueError(f"its results differ from XLA's: |a - b| / |b| = {error:.2g}")
    times = [milliseconds(run, given, repeats) for run, given in runs]
    return Times(times[0], times[1] if case.gradient else None), results


@jax.jit
def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sqrt(jnp.sum((a - b) ** 2) / jnp.maximum(jnp.sum(b**2), 1e-30))


def tune_case(
    case: Case, implementation: str, candidates, repeats: int, deadline: float, say: Callable[[str], None]
) -> list[tables.Row]:
    """The lines of a table for one case; empty if no kernel runs it."""
    args = arguments(case)
    xla, expected = measure(case, "xla", args, repeats, None)
    say(f"{case}\n  {'xla':<24}{_words(xla)}")
    cudnn = _cudnn(case, args, repeats, expected, say)
    found: list[tuple[dict[str, int], Times]] = []
    pairs = [{"rows": r, "columns": c} for r, c in itertools.product(*candidates[case.work.kind])]
    for sizes in ({}, *pairs):
        name = " x ".join(map(str, sizes.values())) or "its own choice"
        if found and time.monotonic() > deadline:
            say("  (no time for more sizes)")
            break
        try:
            with jaxsoft.kernels.block_sizes(**sizes):
                times, _ = measure(case, implementation, args, repeats, expected)
        except (
            Exception
        ) as error:  # compilers and devices raise all kinds of errors; the other sizes must still be tried
            say(f"  {name:<24}failed: {_first_line(error)}")
            continue
        say(f"  {name:<24}{_words(times)}")
        found.append((sizes, times))
    if not found:
        return []
    if case.work.kind == "attention" or not case.gradient:  # the same block sizes serve both passes
        directions = {"both": lambda t: t.forward if t.both is None else t.both}
    else:
        directions = {"forward": lambda t: t.forward, "backward": lambda t: t.backward}
    rows = []
    for direction, ms in directions.items():
        own = next((ms(t) for s, t in found if not s), float("inf"))
        best, times = min(found, key=lambda pair: ms(pair[1]))
        best, took = (best, ms(times)) if ms(times) < _WORTHWHILE * own else ({}, own)
        cudnn_ms = None if cudnn is None else ms(cudnn)
        rows.append(tables.Row(case.work, direction, best, took, ms(xla), cudnn_ms))
    return rows


def _cudnn(case: Case, args: tuple, repeats: int, expected: list, say: Callable[[str], None]) -> Times | None:
    """The times of cuDNN's attention; None if it does not run the case."""
    if case.work.kind != "attention" or device()[0] != "gpu":
        return None
    try:
        times, _ = measure(case, "cudnn", args, repeats, expected)
    except Exception as error:  # jax, cuDNN and the device raise all kinds of errors
        say(f"  {'cudnn':<24}failed: {_first_line(error)}")
        return None
    say(f"  {'cudnn':<24}{_words(times)}")
    return times


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _words(times: Times) -> str:
    both = "" if times.both is None else f"   forward and backward {times.both:10.3f} ms"
    return f"forward {times.forward:10.3f} ms{both}"


def tune(
    implementation: str,
    device_kind: str,
    cases: tuple[Case, ...],
    candidates,
    *,
    out: pathlib.Path | None,
    kept: tuple[tables.Row, ...] = (),
    repeats: int = 5,
    minutes: float = 20.0,
    say: Callable[[str], None] = print,
) -> tables.Table:
    """Measures cases, and writes the table after each one.

    Args:
      implementation: the kernels to measure.
      device_kind: the kind of device.
      cases: the cases to measure.
      candidates: for each kind of work, the numbers of rows and of columns to try.
      out: the path of the table; None to write none.
      kept: lines of an earlier table to keep.
      repeats: samples per time.
      minutes: time limit; after it no further sizes are tried, and cases not yet begun are left out.
      say: called with a line of text for each measurement.

    Returns:
      The table.
    """
    start, limit = time.monotonic(), 60 * minutes
    table = tables.Table(device_kind, implementation, jax.__version__, kept)
    with tables.ignored():
        for i, case in enumerate(cases):
            left = start + limit - time.monotonic()
            if left <= 0:
                say(f"no time for: {'; '.join(map(str, cases[i:]))}")
                break
            deadline = time.monotonic() + left / (len(cases) - i)
            try:
                rows = tune_case(case, implementation, candidates, repeats, deadline, say)
            except Exception as error:  # XLA itself may run out of memory
                say(f"{case}\n  XLA failed: {_first_line(error)}")
                continue
            table = table._replace(rows=(*table.rows, *rows))
            if out is not None:
                table.write(out)
    return table


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=tables.COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, help="path of the table")
    parser.add_argument("--kinds", nargs="+", choices=tables.KINDS, default=list(tables.KINDS))
    parser.add_argument("--minutes", type=float, default=20.0, help="about how long it may take")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each time")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, interpreted kernels, any machine")
    args = parser.parse_args(argv)
    platform, device_kind = device()
    names = [name for name, (needed, _) in BACKENDS.items() if needed == platform]
    if args.smoke:
        implementation, device_kind, out = "pallas_tpu", "interpreted", args.out
        cases, candidates, context = SMOKE, _SMOKE_CANDIDATES, jaxsoft.kernels.interpreted()
    elif not names:
        sys.exit(f"Kernels exist for TPUs and GPUs, this is a {platform.upper()}; --smoke runs anywhere.")
    else:
        implementation, out = names[0], args.out or tables.user_path(device_kind)
        cases, candidates, context = CASES, CANDIDATES[implementation], contextlib.nullcontext()
        kernel = Kernel(implementation, False, device_kind)
        reason = kernel.backend().unavailable(kernel)
        if reason is not None:
            sys.exit(f"{implementation} cannot run here: {reason}")
    kept = _kept(out, args.kinds, device_kind)
    print(f"{implementation} on {device_kind}, jax {jax.__version__}", flush=True)
    with context:
        table = tune(
            implementation,
            device_kind,
            tuple(case for case in cases if case.work.kind in args.kinds),
            candidates,
            out=out,
            kept=kept,
            repeats=1 if args.smoke else args.repeats,
            minutes=args.minutes,
            say=lambda line: print(line, flush=True),
        )
    _summary(table)
    print(f"written to {out}" if out is not None else "not written: pass --out to keep it")


def _kept(out: pathlib.Path | None, kinds: list[str], device_kind: str) -> tuple[tables.Row, ...]:
    """The lines of an existing table for the kinds that are not measured now."""
    if out is None or not out.exists():
        return ()
    try:
        table = tables.read(out)
    except (tables.BrokenTable, OSError) as error:
        sys.exit(f"{error}: remove it, or pass another --out.")
    if table.device_kind != device_kind:
        sys.exit(
            f"{out} is the table of a {table.device_kind!r}, this is a {device_kind!r}: pass another --out."
        )
    return tuple(row for row in table.rows if row.work.kind not in kinds)


def _summary(table: tables.Table) -> None:
    """Prints, for each work, which implementation `None` now selects (cuDNN: for calls that it can run)."""
    for work in dict.fromkeys(row.work for row in table.rows):
        rows = table.nearest(work)
        times = {table.implementation: sum(r.ms for r in rows), "xla": sum(r.xla_ms for r in rows)}
        cudnn = [r.cudnn_ms for r in rows if r.cudnn_ms is not None]
        if len(cudnn) == len(rows):
            times["cudnn"] = sum(cudnn)
        each = "   ".join(f"{name} {ms:10.3f} ms" for name, ms in times.items())
        print(f"{f'{work.kind} {work}':<48}{each}   -> {min(times, key=lambda name: times[name])}")


if __name__ == "__main__":
    main()
