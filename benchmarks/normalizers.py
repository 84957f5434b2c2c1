"""Normalizers with exact zeros beside `jnp.sort`, `jax.nn.softmax` and torch's entmax: forward, and with gradient.

    python benchmarks/normalizers.py [--rows 256] [--columns 65536] [--repeats 9]

Prints a table of times (medians and minima of interleaved runs, ratios to `jnp.sort` of the same run) and writes
benchmarks/results/normalizers.json. The entmax package is measured if it and torch are installed, with torch's default
number of threads.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import machine
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxsoft

BASE = "jnp.sort"
CONTESTANTS = {
    BASE: lambda x: jnp.sort(x, axis=-1),
    "jax.nn.softmax": jax.nn.softmax,
    "sparsemax": jaxsoft.sparsemax,
    "entmax15": jaxsoft.entmax15,
    "entmax, alpha 1.25": lambda x: jaxsoft.entmax(x, alpha=1.25),
    "sparse_softmax, k 10": lambda x: jaxsoft.sparse_softmax(x, k=10),
}


def with_gradient(f: Callable) -> Callable:
    def both(x, g):
        y, pullback = jax.vjp(f, x)
        return y, pullback(g)[0]

    return both


def of_jax(x: np.ndarray, g: np.ndarray) -> dict[tuple[str, bool], Callable]:
    """Calls of the contestants by (name, whether with gradient); each waits for its result."""
    x, g = jnp.asarray(x), jnp.asarray(g)
    calls = {}
    for name, f in CONTESTANTS.items():
        forward = jax.jit(f).lower(x).compile()
        backward = jax.jit(with_gradient(f)).lower(x, g).compile()
        calls[name, False] = lambda run=forward: jax.block_until_ready(run(x))
        calls[name, True] = lambda run=backward: jax.block_until_ready(run(x, g))
    return calls


def of_torch(x: np.ndarray, g: np.ndarray) -> dict[tuple[str, bool], Callable]:
    """Calls of the functions of entmax, which sort all scores or the k largest (or bisect)."""
    try:  # optional packages
        import entmax
        import torch
    except ImportError:
        return {}
    x, g = torch.tensor(x), torch.tensor(g)

    def backward(f):
        leaf = x.detach().requires_grad_()
        f(leaf).backward(g)

    def forward(f):
        with torch.no_grad():
            f(x)

    functions = {
        "torch entmax: sparsemax": lambda x: entmax.sparsemax(x, dim=-1),
        "torch entmax: sparsemax, k 100": lambda x: entmax.sparsemax(x, dim=-1, k=100),
        "torch entmax: entmax15": lambda x: entmax.entmax15(x, dim=-1),
        "torch entmax: entmax15, k 100": lambda x: entmax.entmax15(x, dim=-1, k=100),
        "torch entmax: bisection, alpha 1.25": lambda x: entmax.entmax_bisect(x, 1.25, dim=-1),
    }
    calls = {}
    for name, f in functions.items():
        calls[name, False] = lambda f=f: forward(f)
        calls[name, True] = lambda f=f: backward(f)
    return calls


def measure(rows: int, columns: int, repeats: int, spread: float, only: str) -> list[dict]:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((rows, columns)) * spread).astype(np.float32)
    g = rng.standard_normal((rows, columns)).astype(np.float32)
    calls = {**of_jax(x, g), **of_torch(x, g)}
    calls = {key: call for key, call in calls.items() if only in key[0] or key[0] == BASE}
    times = {key: [] for key in calls}
    for repeat in range(repeats + 1):  # interleaved, so that a busy moment affects all alike
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                times[key].append(time.perf_counter() - start)
    results = []
    for (name, gradient), measured in times.items():
        base = times[BASE, gradient]
        median = statistics.median(measured)
        results.append(
            dict(
                name=name,
                gradient=gradient,
                seconds_median=median,
                seconds_min=min(measured),
                sort_ratio=median / statistics.median(base),
                sort_ratio_min=min(measured) / min(base),
            )
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of the scores")
    parser.add_argument("--only", default="", help="measure only names that contain this (and jnp.sort)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results" / "normalizers.json",
    )
    args = parser.parse_args()
    console = Console()
    measured = measure(args.rows, args.columns, args.repeats, args.spread, args.only)
    table = Table(title=f"[{args.rows}, {args.columns}] float32, ratios to jnp.sort")
    for title in ("", "forward s", "min", "ratio", "with gradient s", "min", "ratio"):
        table.add_column(title, justify="right" if title else "left")
    cells = {}
    for row in measured:
        cells.setdefault(row["name"], []).extend(
            (f"{row['seconds_median']:.3f}", f"{row['seconds_min']:.3f}", f"{row['sort_ratio_min']:.2f}")
        )
    for name, values in cells.items():
        table.add_row(name, *values)
    console.print(table)
    sizes = {"rows": args.rows, "columns": args.columns, "spread": args.spread}
    machine.save(args.out, {**sizes, "results": measured})


if __name__ == "__main__":
    main()
