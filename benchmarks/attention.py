"""Streamed attention beside jax.nn.dot_product_attention: forward, forward and backward, and memory, in one run.

    python benchmarks/attention.py [--heads 4] [--dim 64] [--repeats 5]

Prints tables of time (minima of interleaved runs, ratios to jax.nn of the same run) and compiled temporary memory,
and writes benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import machine
from rich.console import Console
from rich.table import Table

import jaxsoft
from jaxsoft.attention import dot_product_attention

NORMALIZERS = {
    "softmax": jaxsoft.softmax,
    "softmax_one": jaxsoft.softmax_one,
    "sink_softmax": functools.partial(jaxsoft.sink_softmax, sink=0.3),
    "scalable_softmax": jaxsoft.scalable_softmax,
    "softpick": jaxsoft.softpick,
    "stablemax": jaxsoft.stablemax,
    "taylor_softmax": jaxsoft.taylor_softmax,
    "sigmoid_weights": jaxsoft.sigmoid_weights,
    "relu_weights": jaxsoft.relu_weights,
    "softplus_attention_weights": functools.partial(jaxsoft.softplus_attention_weights, scale=4.16),
    "self_adjust_softmax": jaxsoft.self_adjust_softmax,
    "adaptive_temperature_softmax": jaxsoft.adaptive_temperature_softmax,
    "clipped_softmax": jaxsoft.clipped_softmax,
    "reweighted_attention_weights": functools.partial(jaxsoft.reweighted_attention_weights, scale=4.16),
    "sparsemax": jaxsoft.sparsemax,
    "entmax15": jaxsoft.entmax15,
}


def contestants(names: list[str], causal: bool) -> dict:
    """`jax.nn` first, then our attention with each of the normalizers."""
    functions = {"jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=causal)}
    for name in names:
        functions[name] = functools.partial(
            dot_product_attention, normalizer=NORMALIZERS[name], is_causal=causal
        )
    return functions


CLUSTER = 512


def inputs(length: int, heads: int, dim: int, clustered: bool) -> list:
    """Normal queries, keys, values and weights; clustered: each query scores high with `CLUSTER` keys around it only.

    The clusters are as long as a block of queries on a CPU: with ten of them, nine tenths of the pairs of blocks hold
    no weight of `sparsemax` or `entmax15`.
    """
    *keys, last = jax.random.split(jax.random.key(0), 5)
    query, key, value, weights = (jax.random.normal(k, (1, length, heads, dim)) for k in keys)
    if clustered:
        directions = jax.random.normal(last, (-(-length // CLUSTER), heads, dim))
        directions /= jnp.linalg.norm(directions, axis=-1, keepdims=True)
        centres = 2 * dim**0.5 * jnp.repeat(directions, CLUSTER, axis=0)[:length]
        query, key = query + centres, key + centres
    return [query, key, value, weights]


def measure(length: int, heads: int, dim: int, kind: str, names: list[str], repeats: int) -> list[dict]:
    """Measures time and temporary memory of all contestants at one length."""
    causal = kind == "causal"
    arrays = inputs(length, heads, dim, kind == "clustered")
    compiled = {}
    for name, f in contestants(names, causal).items():

        def loss(q, k, v, weights, f=f):
            return jnp.sum(f(q, k, v) * weights)

        forward = jax.jit(lambda q, k, v, weights, f=f: f(q, k, v)).lower(*arrays).compile()
        both = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arrays).compile()
        compiled[name] = {"forward": forward, "both": both}
    times = {(name, kind): [] for name in compiled for kind in ("forward", "both")}
    for _ in range(repeats):  # interleaved, so that a busy moment affects all alike
        for name, kind in times:
            # An untimed call first: it pays for memory that the previous contestant gave back to the system.
            jax.block_until_ready(compiled[name][kind](*arrays))
            start = time.perf_counter()
            jax.block_until_ready(compiled[name][kind](*arrays))
            times[name, kind].append(time.perf_counter() - start)
    rows = []
    for name, runs in compiled.items():
        row = {"name": name}
        for kind in runs:
            memory, base = (r[kind].memory_analysis().temp_size_in_bytes for r in (runs, compiled["jax.nn"]))
            row[kind] = {
                "seconds_min": min(times[name, kind]),
                "time_ratio": min(times[name, kind]) / min(times["jax.nn", kind]),
                "to_softmax": min(times[name, kind]) / min(times["softmax", kind]),
                "temp_bytes": memory,
                "memory_ratio": memory / base,
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "attention.json"
    )
    args = parser.parse_args()
    console = Console(width=120)
    runs = []
    some = ["softmax", "softpick"]
    sparse = ["softmax", "sparsemax", "entmax15"]
    cases = (
        (4096, "full", list(NORMALIZERS)),
        (4096, "causal", some),
        (8192, "causal", some),
        (2048, "causal", sparse),
        (10 * CLUSTER, "clustered", sparse),
    )
    for length, kind, names in cases:
        rows = measure(length, args.heads, args.dim, kind, names, args.repeats)
        table = Table(title=f"{kind}, T={length}, {args.heads} heads of {args.dim}, float32")
        parts = ("forward ms", "ratio", "to softmax", "fwd + bwd ms", "ratio", "to softmax")
        for title in ("", *parts, "MB", "memory"):
            table.add_column(title, justify="right" if title else "left")
        for row in rows:
            cells = []
            for part in ("forward", "both"):
                r = row[part]
                cells += [f"{1e3 * r['seconds_min']:.0f}", f"{r['time_ratio']:.2f}", f"{r['to_softmax']:.2f}"]
            memory = row["both"]
            table.add_row(
                row["name"],
                *cells,
                f"{memory['temp_bytes'] / 1e6:.0f}",
                f"1/{1 / memory['memory_ratio']:.0f}",
            )
        console.print(table)
        runs.append(
            dict(length=length, kind=kind, causal=kind == "causal", heads=args.heads, dim=args.dim, rows=rows)
        )
    machine.save(args.out, {"runs": runs})


if __name__ == "__main__":
    main()
