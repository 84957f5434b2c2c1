"""Samples from logits that are never stored, beside `logsumexp` of the same expression and beside stored logits.

    python benchmarks/decoding.py [--repeats 7]

Prints times (minima of interleaved runs, after an untimed call), the processor's seconds, which suffer less from other
programs, compiled temporary memory, ratios to `logsumexp` of the same run, and the tokens per second of a generation
whose model is an embedding; writes benchmarks/results/decoding.json.
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
from jaxsoft import decoding

ROWS, WIDTH, COLUMNS = 256, 256, 32768
BATCH, TOKENS = 32, 16
KEY = jax.random.key(0)
CHAINS = {
    "sample": decoding.chain(),
    "temperature": decoding.chain(decoding.temperature(0.8)),
    "temperature, min_p": decoding.chain(decoding.temperature(0.8), decoding.min_p(0.05)),
    "temperature, top_k": decoding.chain(decoding.temperature(0.8), decoding.top_k(50)),
}


def logits_of(hidden, weight, stored: bool):
    return hidden @ weight if stored else jaxsoft.linear_logits(hidden, weight)


def contestants() -> dict:
    """Functions of hidden and weight."""

    def logsumexp(stored, h, w):
        return jaxsoft.logsumexp(logits_of(h, w, stored))

    def drawn(name, stored, h, w):
        return decoding.sample(CHAINS[name](logits_of(h, w, stored)), KEY)

    def categorical(h, w):
        return jax.random.categorical(KEY, h @ w)

    each = {"logsumexp": functools.partial(logsumexp, False)}
    each |= {name: functools.partial(drawn, name, False) for name in CHAINS}
    each |= {"logsumexp, stored": functools.partial(logsumexp, True)}
    each |= {f"{name}, stored": functools.partial(drawn, name, True) for name in CHAINS}
    return each | {"jax.random.categorical, stored": categorical}


def generation(stored: bool, embedding, weight):
    """`BATCH` texts of `TOKENS` tokens, the hidden state of a token being its embedding."""

    def step(token, key):
        transform = CHAINS["temperature, min_p"]
        token = decoding.sample(transform(logits_of(embedding[token], weight, stored)), key)
        return token, token

    return jax.lax.scan(step, jnp.arange(BATCH), jax.random.split(KEY, TOKENS))[1]


def measure(programs: dict, args, repeats: int) -> dict[str, dict]:
    compiled = {name: jax.jit(f).lower(*args).compile() for name, f in programs.items()}
    results = {
        name: {
            "seconds": float("inf"),
            "cpu_seconds": float("inf"),
            "temporary_mb": p.memory_analysis().temp_size_in_bytes / 1e6,
        }
        for name, p in compiled.items()
    }
    for repeat in range(repeats + 1):
        for name, program in compiled.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*args))
            took = time.perf_counter() - start[0], time.process_time() - start[1]
            if repeat:
                for unit, seconds in zip(("seconds", "cpu_seconds"), took):
                    results[name][unit] = min(results[name][unit], seconds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs per contestant (%(default)s)")
    repeats = parser.parse_args().repeats
    h, w = jax.random.normal(KEY, (ROWS, WIDTH)), jax.random.normal(KEY, (WIDTH, COLUMNS)) / WIDTH**0.5
    results = measure(contestants(), (h, w), repeats)
    embedding = jax.random.normal(KEY, (COLUMNS, WIDTH))
    texts = {
        "never stored": functools.partial(generation, False),
        "stored": functools.partial(generation, True),
    }
    rates = measure(texts, (embedding, w), repeats)
    table = Table(
        "",
        "ms",
        "of logsumexp",
        "CPU ms",
        "of logsumexp",
        "temporary MB",
        title=f"N={ROWS}, D={WIDTH}, V={COLUMNS}, float32",
    )
    for name, r in results.items():
        base = results["logsumexp"]
        r["of_logsumexp"], r["cpu_of_logsumexp"] = (r[s] / base[s] for s in ("seconds", "cpu_seconds"))
        table.add_row(
            name,
            f"{1e3 * r['seconds']:.1f}",
            f"{r['of_logsumexp']:.2f}",
            f"{1e3 * r['cpu_seconds']:.1f}",
            f"{r['cpu_of_logsumexp']:.2f}",
            f"{r['temporary_mb']:.1f}",
        )
    console = Console(highlight=False)
    console.print(table)
    for name, r in rates.items():
        r["tokens_per_second"] = BATCH * TOKENS / r["seconds"]
        console.print(f"generation, {name}: {r['tokens_per_second']:,.0f} tokens/s")
    path = pathlib.Path(__file__).parent / "results" / "decoding.json"
    machine.save(
        path,
        {
            "command": f"python benchmarks/decoding.py --repeats {repeats}",
            "shape": {"rows": ROWS, "width": WIDTH, "columns": COLUMNS, "dtype": "float32"},
            "results": results,
            "generation": {"batch": BATCH, "tokens": TOKENS, **rates},
        },
    )


if __name__ == "__main__":
    main()
