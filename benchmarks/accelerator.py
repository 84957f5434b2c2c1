"""Kernels on an accelerator: checked on fresh random data first, then timed beside peers on the same machine.

    python benchmarks/accelerator.py [--seconds 500] [--only checks rows ...] [--smoke] [--out FILE]

First, every kernel is compared with XLA in float32 (products in full precision, logits and scores stored) on random
rows: ragged shapes, masks with NaN under them, all normalizers, gradients with random cotangents. A case that fails is
reported, and the others still run. Then the kernels are timed (medians of several samples after a warm-up) and compared
with what the machine can do, measured in the same run (a large copy, a large product in bfloat16), and with XLA, cuDNN
and, where they are installed, tokamax, cut-cross-entropy and liger-kernel. "jaxsoft, default" is what
`implementation=None` chooses, "jaxsoft, xla" the loops by XLA; programs that are equal are timed once. Every part runs
in its own process, so that a kernel that crashes or hangs affects no other part. When time runs out (`--seconds`), the
last parts are dropped, and the report names them: all of it ends within nine minutes. Prints tables at the end, writes
JSON, and a plot where matplotlib is installed. `--smoke` runs everything with tiny shapes and interpreted kernels, on
any machine; without an accelerator that is what runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from device_run import Run, compile_all, first_line, kernels_in, works
from kernel_checks import CHECKS, NORMALIZERS, TIMED_NORMALIZERS, run_checks
from rich.table import Table

import jaxsoft
from jaxsoft import losses
from jaxsoft.attention import decode_attention, dot_product_attention
from jaxsoft.kernels.inner import BACKENDS, device
from jaxsoft.rows import softmax_top_k
from jaxsoft.tune import milliseconds

RESULTS = pathlib.Path(__file__).parent / "results" / "accelerator.json"
MIB = 2**20


def with_gradient(f: Callable, wanted: tuple[int, ...]) -> Callable:
    """`(weights, *args) -> (sum(weights * f), gradients)`."""

    def weighted(weights, *args):
        return jnp.sum(f(*args).astype(jnp.float32) * weights.astype(jnp.float32))

    return jax.value_and_grad(weighted, tuple(i + 1 for i in wanted))


# --- how fast is it? ---------------------------------------------------------------------------------------------


class Contestant(NamedTuple):
    """Something to time.

    Attributes:
      name: shown in the table; ours begin with "jaxsoft".
      function: what to time; `time_all` jits it.
      args: its arguments.
    """

    name: str
    function: Callable
    args: tuple


def ours(run: Run) -> tuple[tuple[str, str | None], ...]:
    """The names that our implementations have in the table, and the implementations; by default, None chooses."""
    every = (("jaxsoft", run.implementation), ("jaxsoft, default", None), ("jaxsoft, xla", "xla"))
    return every[:1] if run.smoke else every


def time_all(run: Run, case: str, contestants: list[Contestant]) -> dict[str, dict]:
    """Times the contestants of a case; returns their rows of the table by name.

    Contestants with the same program (such as a default and what it chooses) are timed once.
    """
    run.begin(case)
    compiled = compile_all({c.name: (c.function, c.args) for c in contestants}, run.save)
    found: dict[str, dict[str, Any]] = {
        c.name: {"case": case, "contestant": c.name, "ms": None} for c in contestants
    }
    run.rows += found.values()
    timed: dict[int, str] = {}
    for c in contestants[::-1]:  # peers first: one of our kernels might crash the device
        row, program = found[c.name], compiled[c.name]
        if id(program) in timed:
            same = timed[id(program)]
            row |= {k: v for k, v in found[same].items() if k != "contestant"} | {"same_as": same}
            run.say(f"{case}: {c.name}: the same program as {same}")
            continue
        timed[id(program)] = c.name
        try:
            if isinstance(program, Exception):
                raise program
            row["temporary"] = program.memory_analysis().temp_size_in_bytes
            row["kernels"] = kernels_in(program)
            run.begin(f"{case}: {c.name}")
            row["ms"] = milliseconds(program, c.args, run.sizes.repeats)
        except Exception as error:
            row["note"] = first_line(error)
        run.say(f"{case}: {c.name}: " + (f"{row['ms']:.3f} ms" if row["ms"] else row["note"]))
    run.finish()
    return found


def judge(
    row: dict | None, measure: str, value: float | None, bar: float | None = None, at_most: bool = False
) -> None:
    """Adds a measure, and the bar it is held to, to a row that has none; `extra` adds further ones."""
    if row is None or value is None:
        return
    if "measure" in row:
        raise ValueError(f"{row['case']}: {row['contestant']} has a measure already: use `extra`")
    row |= {"measure": measure, "value": value}
    if bar is not None:
        row |= {"bar": bar, "at_most": at_most, "reached": value <= bar if at_most else value >= bar}


def extra(
    run: Run, row: dict, measure: str, value: float, bar: float | None = None, at_most: bool = False
) -> None:
    """Adds another measure of the same time, in a row of its own."""
    copy = {k: row[k] for k in ("case", "contestant", "same_as", "ms", "temporary", "kernels") if k in row}
    run.rows.insert(run.rows.index(row) + 1, copy)
    judge(copy, measure, value, bar, at_most)


def share(run: Run, row: dict, amount: float, ceiling: str) -> float | None:
    """The fraction of a ceiling that was reached, given the number of bytes or operations."""
    if row["ms"] is None or ceiling not in run.ceilings:
        return None
    return amount / (row["ms"] * 1e-3) / run.ceilings[ceiling]


def speed(row: dict, other: dict | None) -> float | None:
    """How many times as fast as another row."""
    if row["ms"] is None or other is None or other["ms"] is None:
        return None
    return other["ms"] / row["ms"]


def measure_ceilings(run: Run) -> None:
    """What the machine can do: bytes per second of a copy (reads and writes), operations per second of a product."""
    x = run.normal(run.sizes.copy // 2)
    rows = time_all(
        run,
        "device-to-device copy",
        [Contestant("copy", jnp.copy, (x,)), Contestant("x + 1", lambda x: x + 1, (x,))],
    )
    moved = 2 * x.nbytes
    for row in rows.values():
        if row["ms"]:
            judge(row, "TB/s", moved / row["ms"] / 1e9)
    run.ceilings["copy"] = max(moved / r["ms"] * 1e3 for r in rows.values() if r["ms"])
    n = run.sizes.product
    a, b = run.normal(n, n), run.normal(n, n)
    (row,) = time_all(run, f"product of {n} x {n}, bf16", [Contestant("XLA", jnp.matmul, (a, b))]).values()
    run.ceilings["product"] = 2 * n**3 / row["ms"] * 1e3
    judge(row, "TFLOP/s", run.ceilings["product"] / 1e12)


def time_rows(run: Run) -> None:
    """Softmax, log-sum-exp and top-k of stored rows."""
    for n, columns in run.sizes.rows:
        x, where = run.normal(n, columns, scale=2), f"{n} x {columns}"
        lines = [
            Contestant(name, functools.partial(jaxsoft.softmax, implementation=i), (x,))
            for name, i in ours(run)
        ]
        rows = time_all(run, f"softmax {where}", [*lines, Contestant("jax.nn", jax.nn.softmax, (x,))])
        for name, row in rows.items():
            judge(
                row,
                "of copy (2 transfers)",
                share(run, row, 2 * x.nbytes, "copy"),
                0.6 if name == "jaxsoft" else None,
            )
        lines = [
            Contestant(name, functools.partial(jaxsoft.logsumexp, implementation=i), (x,))
            for name, i in ours(run)
        ]
        base = Contestant("jax.nn", functools.partial(jax.nn.logsumexp, axis=-1), (x,))
        rows = time_all(run, f"logsumexp {where}", [*lines, base])
        for name, row in rows.items():
            judge(
                row,
                "of copy (1 transfer)",
                share(run, row, x.nbytes, "copy"),
                0.85 if name == "jaxsoft" else None,
            )
        weights = run.normal(n, dtype=jnp.float32)
        lines = [
            Contestant(
                name,
                with_gradient(functools.partial(jaxsoft.logsumexp, implementation=i), (0,)),
                (weights, x),
            )
            for name, i in ours(run)
        ]
        base = Contestant(
            "jax.nn", with_gradient(functools.partial(jax.nn.logsumexp, axis=-1), (0,)), (weights, x)
        )
        for row in time_all(run, f"logsumexp and gradient {where}", [*lines, base]).values():
            judge(row, "of copy (3 transfers)", share(run, row, 3 * x.nbytes, "copy"))
        lines = [
            Contestant(name, lambda x, i=i: softmax_top_k(x, 5, implementation=i), (x,))
            for name, i in ours(run)
        ]
        base = Contestant("jax.nn.softmax, lax.top_k", lambda x: jax.lax.top_k(jax.nn.softmax(x), 5), (x,))
        rows = time_all(run, f"softmax + top-k(5) {where}", [*lines, base])
        for name, row in rows.items():
            bar = 5.0 if name == "jaxsoft" else None
            judge(row, "times as fast", speed(row, rows[base.name]), bar)


def dense_head(hidden, weight, labels):
    logits = jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def time_head(run: Run, n: int, d: int, v: int) -> None:
    """Cross-entropy of a linear head."""
    hidden, weight = run.normal(n, d), run.normal(d, v, scale=d**-0.5)
    labels, weights = run.integers(n, high=v), run.uniform(n)
    case, flops = f"head {n} x {d} x {v}", 2.0 * n * d * v

    def cross_entropy(implementation, hidden, weight, labels):
        return losses.cross_entropy(
            jaxsoft.linear_logits(hidden, weight, implementation=implementation), labels
        )

    args = (hidden, weight, labels)
    each = {name: functools.partial(cross_entropy, i) for name, i in ours(run)} | {"dense XLA": dense_head}
    rows = time_all(run, f"{case}, forward", [Contestant(name, f, args) for name, f in each.items()])
    for name, row in rows.items():
        judge(
            row,
            "of product rate (2NDV)",
            share(run, row, flops, "product"),
            0.85 if name == "jaxsoft" else None,
        )

    def summed(implementation, weights, hidden, weight, labels):
        logits = jaxsoft.linear_logits(hidden, weight, implementation=implementation)
        return losses.weighted_sum(losses.cross_entropy, logits, labels, weights=weights)

    lines = [Contestant(name, with_gradient(f, (0, 1)), (weights, *args)) for name, f in each.items()]
    lines += [
        Contestant(
            f"{name}, weighted_sum",
            jax.value_and_grad(functools.partial(summed, i), (1, 2)),
            (weights, *args),
        )
        for name, i in ours(run)
    ]
    with tokamax(run) as module:
        if module is not None:

            def theirs(hidden, weight, labels):
                return module.linear_softmax_cross_entropy_loss(hidden, labels, weight, reduction="sum")

            lines.append(Contestant("tokamax", jax.value_and_grad(theirs, (0, 1)), args))
    rows = time_all(run, f"{case}, forward + backward", lines)
    base = rows["dense XLA"]
    for name, row in rows.items():
        if "weighted_sum" in name:
            bar = 0.78 if name == "jaxsoft, weighted_sum" else None
            judge(row, "of product rate (6NDV)", share(run, row, 3 * flops, "product"), bar)
        else:
            judge(row, "dense XLA's speed", speed(row, base))
        if name == "jaxsoft" and (used := share(run, row, 4 * flops, "product")) is not None:
            extra(run, row, "of product rate (8NDV)", used, 0.84)
        if name in ("jaxsoft", "jaxsoft, weighted_sum") and row.get("temporary") is not None:
            most = 256 if name == "jaxsoft" else 600
            extra(run, row, "MiB beyond gradients", row["temporary"] / MIB, most, at_most=True)


@contextlib.contextmanager
def tokamax(run: Run) -> Iterator[Any]:
    """The module, or None with the reason in the report."""
    try:
        yield importlib.import_module("tokamax")
    except Exception as error:
        if not any(d.startswith("peer tokamax") for d in run.dropped):
            run.dropped.append(f"peer tokamax: {first_line(error)}")
        yield None


def time_attention(run: Run) -> None:
    """Causal attention, with cuDNN beside it, and with other normalizers beside softmax."""
    batch, heads, width, length = run.sizes.attention

    def arrays(length):
        return tuple(run.normal(batch, length, heads, width) for _ in range(3)), run.normal(
            batch, length, heads, width
        )

    args, weights = arrays(length)
    flops = 2.0 * batch * heads * width * length**2  # half of the pairs
    attend = functools.partial(dot_product_attention, is_causal=True)
    each = {name: functools.partial(attend, implementation=i) for name, i in ours(run)}
    each["cuDNN"] = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    with tokamax(run) as module:
        if module is not None:
            each["tokamax"] = functools.partial(module.dot_product_attention, is_causal=True)
    case = f"attention {batch} x {heads} heads of {width}, T={length}, causal"
    softmax = {}
    for part, bar, products in (("forward", 0.9, 1), ("forward + backward", 0.8, 3.5)):
        backward = part != "forward"
        lines = [
            Contestant(
                name, with_gradient(f, (0, 1, 2)) if backward else f, (weights, *args) if backward else args
            )
            for name, f in each.items()
        ]
        rows = time_all(run, f"{case}, {part}", lines)
        softmax[part] = rows["jaxsoft"]
        for name, row in rows.items():
            judge(row, "cuDNN's speed", speed(row, rows["cuDNN"]), bar if name == "jaxsoft" else None)
            used = share(run, row, products * flops, "product")
            if used is not None:
                extra(run, row, "of product rate", used)
    longer = softmax["forward + backward"]
    half, half_weights = arrays(length // 2)
    line = Contestant("jaxsoft", with_gradient(each["jaxsoft"], (0, 1, 2)), (half_weights, *half))
    (row,) = time_all(run, f"attention, T={length // 2}, forward + backward", [line]).values()
    if row.get("temporary") and longer.get("temporary"):
        judge(row, f"memory of T={length} to this", longer["temporary"] / row["temporary"], 2.2, at_most=True)
    for part in softmax:
        backward, lines = part != "forward", []
        for name in TIMED_NORMALIZERS[: 2 if run.smoke else None]:
            if name == "sinks":
                f = functools.partial(each["jaxsoft"], sinks=jnp.zeros(heads))
            else:
                f = functools.partial(each["jaxsoft"], normalizer=NORMALIZERS[name])
            given = (weights, *args) if backward else args
            lines.append(
                Contestant(f"jaxsoft, {name}", with_gradient(f, (0, 1, 2)) if backward else f, given)
            )
        for name, row in time_all(run, f"{case}, {part}", lines).items():
            bar = {"jaxsoft, softpick": 1.5, "jaxsoft, self_adjust_softmax": 2.0}.get(name, 1.2)
            judge(row, "softmax's time", speed(softmax[part], row), bar, at_most=True)


def time_decode(run: Run) -> None:
    """One new token for each sequence of a batch."""
    batch, heads, of_keys, width, length = run.sizes.decode
    query = run.normal(batch, 1, heads, width)
    keys, values = run.normal(batch, length, of_keys, width), run.normal(batch, length, of_keys, width)
    lengths = jnp.full(batch, length, jnp.int32)
    case = f"decode {batch} x {heads}/{of_keys} heads of {width}, {length} keys"
    lines = []
    for name, i in ours(run):
        lines.append(
            Contestant(
                name, functools.partial(dot_product_attention, implementation=i), (query, keys, values)
            )
        )
        f = functools.partial(decode_attention, implementation=i)
        lines.append(Contestant(f"{name}, with lengths", f, (query, keys, values, lengths)))
    f = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    lines.append(Contestant("cuDNN", f, (query, keys, values)))
    rows = time_all(run, case, lines)
    for name, row in rows.items():
        bar = 0.8 if name.startswith("jaxsoft") and "xla" not in name else None
        judge(row, "of copy", share(run, row, keys.nbytes + values.nbytes, "copy"), bar)
    if (times := speed(rows["jaxsoft"], rows["jaxsoft, with lengths"])) is not None:
        extra(run, rows["jaxsoft, with lengths"], "time without lengths", times, 1.1, at_most=True)


# --- peers in PyTorch, in their own process -----------------------------------------------------------------------


def time_torch_peers(run: Run) -> None:
    """Times the peers and puts their rows beside ours."""
    if run.smoke:
        run.dropped.append("peers in PyTorch: not with --smoke")
        return
    script = pathlib.Path(__file__).with_name("torch_peers.py")
    seconds = run.left()
    try:
        command = [sys.executable, str(script), json.dumps(run.sizes.heads), str(0.7 * seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except Exception as error:
        run.dropped.append(f"peers in PyTorch: {first_line(error)}")
        return
    run.dropped += found["missing"]
    for row in found["rows"]:
        same = [r for r in run.rows if r["case"] == row["case"]]
        base = next((r for r in same if r["contestant"] == "dense XLA"), None)
        judge(row, "dense XLA's speed", speed(row, base))
        run.rows.insert(run.rows.index(same[-1]) + 1 if same else len(run.rows), row)


# --- part by part ------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a run.

    Attributes:
      group: as `--only` names it.
      function: gets the run, and the number of the first check to run (other parts ignore it).
      seconds: time limit on an accelerator; most parts take far less.
    """

    group: str
    function: Callable[[Run, int], None]
    seconds: float


def parts() -> dict[str, Part]:
    """All parts, in order; when time runs out, the last are dropped."""

    def of_head(which: int) -> Callable:
        return lambda run, _: (
            time_head(run, *run.sizes.heads[which]) if which < len(run.sizes.heads) else None
        )

    all_parts = {"ceilings": Part("ceilings", lambda run, _: measure_ceilings(run), 60)}
    for group in CHECKS:
        check = functools.partial(run_checks, group=group)
        all_parts[f"checks-{group}"] = Part("checks", lambda run, first, f=check: f(run, first=first), 110)
    return all_parts | {
        "rows": Part("rows", lambda run, _: time_rows(run), 90),
        "head-1": Part("head", of_head(0), 90),
        "attention": Part("attention", lambda run, _: time_attention(run), 120),
        "decode": Part("decode", lambda run, _: time_decode(run), 60),
        "head-2": Part("head", of_head(1), 60),
        "torch": Part("torch", lambda run, _: time_torch_peers(run), 100),
    }


GROUPS = tuple(dict.fromkeys(part.group for part in parts().values()))


def perform(run: Run, name: str, first: int = 0) -> None:
    """Runs one part in this process."""
    run.say(name)
    with jaxsoft.kernels.interpreted() if run.smoke else contextlib.nullcontext():
        try:
            parts()[name].function(run, first)
        except Exception as error:  # the other parts can still run
            run.dropped.append(f"the rest of {name}: {first_line(error)}")
    run.finish()
    if not works():
        sys.exit(17)


def isolated(run: Run, name: str, patience: float) -> None:
    """Runs one part in its own process; after a check that crashes or hangs, goes on with the next check."""
    first, part = 0, parts()[name]
    limit = run.left() - 15
    end = time.monotonic() + min(part.seconds, limit)
    while True:
        run.finish()
        command = [sys.executable, __file__, "--part", name, str(first), "--out", str(run.out)]
        command += ["--implementation", run.implementation, "--seed", str(run.seed)]
        command += ["--seconds", str(max(end - time.monotonic(), 1)), *["--smoke"] * run.smoke]
        reason = watched(command, run.out, end + 20, patience)
        run.load()
        if reason is None:
            return
        if run.doing is None:
            run.dropped.append(f"the rest of {name}: {reason}")
            return
        doing, number = run.doing
        run.say(f"{doing}: {reason}")
        if part.group != "checks" or time.monotonic() > end:
            run.dropped.append(f"the rest of {name}: {reason} in {doing}")
            return
        if not any(c["name"] == doing for c in run.checks):
            run.checks.append(
                {"name": doing, "status": "failed", "reason": reason, "kernels": None, "errors": []}
            )
        first = number + 1


def watched(command: list[str], record: pathlib.Path, end: float, patience: float) -> str | None:
    """Runs a command until it exits, time is up, or the record stops changing; returns what went wrong, or None."""
    environment = {
        name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"
    }
    process = subprocess.Popen(command, env=environment)
    started = time.time()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(0.2)
                return None if code == 0 else f"the process ended with {code}"
            if time.monotonic() > end:
                return "no time was left"
            if time.time() - max(started, record.stat().st_mtime) > patience:
                return f"nothing happened for {patience:.0f} s"
    finally:
        process.kill()
        process.wait()


# --- the report --------------------------------------------------------------------------------------------------


def report(run: Run) -> None:
    """Prints the tables, the times last."""
    checks = Table(title=f"|ours - float32 reference| / |reference|, {run.implementation}")
    for title in ("check", "status", "value", "worst gradient", "kernels"):
        checks.add_column(title)
    order = {"failed": 2, "refused": 1, "passed": 0}
    for c in sorted(run.checks, key=lambda c: order[c["status"]]):
        first, *rest = c.get("errors") or [None]
        errors = ["" if e is None else f"{e:.1e}" for e in (first, max(rest, default=None))]
        reason = f"{c['status']}: {c['reason']}" if c["reason"] else c["status"]
        checks.add_row(c["name"], reason, *errors, "" if c.get("kernels") is None else str(c["kernels"]))
    if run.checks:
        run.console.print(checks)
    for line in run.dropped:
        run.console.print(f"left out: {line}", markup=False, highlight=False)
    times = Table(
        title="medians" + (" of tiny, interpreted runs: they say nothing about speed" if run.smoke else "")
    )
    for title in ("case", "contestant", "ms", "measure", "bar", "", "MiB", "kernels"):
        times.add_column(title, justify="right" if title in ("ms", "bar", "MiB", "kernels") else "left")
    before = None
    for row in run.rows:
        measured = "" if row.get("value") is None else f"{row['value']:.3g} {row['measure']}"
        bar = "" if "bar" not in row else f"{'<=' if row['at_most'] else '>='} {row['bar']:g}"
        verdict = "" if "bar" not in row or run.smoke else "reached" if row["reached"] else "MISSED"
        memory, kernels = row.get("temporary", row.get("peak_growth")), row.get("kernels")
        times.add_row(
            row["case"] if row["case"] != before else "",
            row["contestant"] + (f" = {row['same_as']}" if "same_as" in row else ""),
            "" if row["ms"] is None else f"{row['ms']:.3f}",
            measured or row.get("note", ""),
            bar,
            verdict,
            "" if memory is None else f"{memory / MIB:.0f}",
            "" if kernels is None else str(kernels),
        )
        before = row["case"]
    run.console.print(times)
    held = [row for row in run.rows if "bar" in row]
    counts = {s: sum(c["status"] == s for c in run.checks) for s in order}
    run.console.print(
        f"checks: {counts['passed']} passed, {counts['refused']} refused, {counts['failed']} failed; "
        f"bars: {sum(row['reached'] for row in held)} of {len(held)} reached; {time.monotonic() - run.start:.0f} s"
    )


def plot(run: Run, path: pathlib.Path) -> bool:
    """Plots each measure as a multiple of its bar (the line at 1; longer is better); False without matplotlib."""
    try:  # optional
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    held = [row for row in run.rows if "bar" in row and row["value"] > 0][::-1]
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.28 * len(held)))
    scores = [row["bar"] / row["value"] if row["at_most"] else row["value"] / row["bar"] for row in held]
    colours = ["tab:green" if row["reached"] else "tab:red" for row in held]
    axes.barh(range(len(held)), [min(s, 2.5) for s in scores], color=colours)
    axes.set_yticks(
        range(len(held)), [f"{r['case']}: {r['contestant']}, {r['measure']}" for r in held], fontsize=7
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("measured, as a multiple of its bar (cut off at 2.5)")
    axes.set_title(f"{run.implementation}, {jax.devices()[0].device_kind}, jax {jax.__version__}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=500, help="time limit; parts that are left are dropped"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="run only these parts")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, interpreted kernels, any machine")
    parser.add_argument("--implementation", choices=list(BACKENDS), help="which kernels to run")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="seed of the data; a new one by default"
    )
    parser.add_argument("--out", type=pathlib.Path, help="the file to write")
    parser.add_argument(
        "--patience",
        type=float,
        default=75,
        help="seconds without progress after which a part counts as hung",
    )
    parser.add_argument("--together", action="store_true", help="all in one process (as with --smoke)")
    parser.add_argument(
        "--apart", action="store_true", help="each part in its own process, even with --smoke"
    )
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.part:
        os.environ.setdefault(
            "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
        )  # the parts' processes need the memory
    here, kind = device()
    native = [name for name, (needed, _) in BACKENDS.items() if needed == here]
    smoke = args.smoke or not native
    implementation = args.implementation or (native or ["pallas_tpu"])[0]
    out = args.out or (RESULTS if not smoke else RESULTS.parents[2] / "runs" / "accelerator-smoke.json")
    run = Run(implementation, smoke, args.seconds, args.seed, out)
    if args.part:
        run.load()
        perform(run, args.part[0], int(args.part[1]))
        return
    if not native and not args.smoke:
        run.say("There is no accelerator here: tiny shapes and interpreted kernels instead.")
    run.say(f"{implementation} on {kind or here}, jax {jax.__version__}, seed {args.seed}")
    for name, part in parts().items():
        if part.group != "ceilings" and part.group not in args.only:
            continue
        if not smoke and run.left() < 45:
            run.dropped.append(f"{name}: no time was left")
        elif args.together or (smoke and not args.apart):
            perform(run, name)
        else:
            isolated(run, name, args.patience)
    run.finish()
    drawn = plot(run, out.with_suffix(".png"))
    run.say(f"written to {out}" + (f" and {out.with_suffix('.png').name}" if drawn else ""))
    report(run)


if __name__ == "__main__":
    main()
