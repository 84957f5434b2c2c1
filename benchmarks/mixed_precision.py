"""Errors of the gradients of a mixed-precision head: bfloat16 hidden states, float32 weight, cross-entropy.

    python benchmarks/mixed_precision.py [--tokens 256] [--dim 128] [--vocab 4096] [--spread 1 4]

Compares with float64, in the Frobenius norm relative to the exact gradient: the dense head as Flax computes it with
`dtype=bfloat16` (the weight is cast, bfloat16 logits, softmax in float32), and jaxsoft without logits. The exact
gradient is taken at the given weight, and at the weight rounded to bfloat16, which leaves the error of the arithmetic
alone. `spread` is the standard deviation of the logits: about 1 in a new model, larger in a trained one. XLA may skip
the roundings between operations that it fuses; it is told not to, since a matrix product on an accelerator stores its
result. Prints a table and writes benchmarks/results/mixed_precision.json.
"""

from __future__ import annotations

import argparse
import pathlib

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxsoft
from jaxsoft import losses

HALF = jnp.bfloat16


def exact(hidden, weight, labels):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, labels).mean()


def dense(hidden, weight, labels):
    logits = hidden @ weight.astype(HALF)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def streamed(hidden, weight, labels, dtype=HALF):
    return losses.cross_entropy(jaxsoft.linear_logits(hidden, weight, dtype=dtype), labels).mean()


def streamed_in_float32(hidden, weight, labels):
    return streamed(hidden, weight, labels, None)


def forward_gradient(hidden, weight, labels):
    logits = jaxsoft.linear_logits(hidden, weight, dtype=HALF)
    return losses.weighted_mean(losses.cross_entropy, logits, labels)


CONTESTANTS = {
    "dense, dtype=bfloat16": dense,
    "cross_entropy, dtype=bfloat16": streamed,
    "weighted_mean, dtype=bfloat16": forward_gradient,
    "cross_entropy, products in float32": streamed_in_float32,
}


def gradients(f, *arrays, **options) -> list[np.ndarray]:
    compiled = jax.jit(jax.grad(f, (0, 1))).lower(*arrays).compile(compiler_options=options)
    return [np.asarray(g, np.float64) for g in compiled(*arrays)]


def exact_gradients(hidden, weight, labels) -> list[np.ndarray]:
    wide = [np.asarray(a, np.float64) for a in (hidden, weight)]
    with jax.enable_x64(True):
        return gradients(exact, *map(jnp.asarray, wide), labels)


def measure(tokens: int, dim: int, vocab: int, spread: float) -> list[dict]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, dim), HALF)
    weight = spread * jax.random.normal(keys[1], (dim, vocab)) / dim**0.5
    labels = jax.random.randint(keys[2], (tokens,), 0, vocab)
    references = {
        "given": exact_gradients(hidden, weight, labels),
        "rounded": exact_gradients(hidden, weight.astype(HALF), labels),
    }
    rows = []
    for name, f in CONTESTANTS.items():
        got = gradients(f, hidden, weight, labels, xla_allow_excess_precision=False)
        row = dict(name=name)
        for reference, expected in references.items():
            for operand, g, e in zip(("hidden", "weight"), got, expected):
                row[f"{operand}_error_{reference}"] = float(np.linalg.norm(g - e) / np.linalg.norm(e))
        rows.append(row)
    for row in rows:
        row |= {key.replace("error", "ratio"): row[key] / rows[0][key] for key in row if "error" in key}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--spread", type=float, nargs="+", default=[1, 4])
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results" / "mixed_precision.json",
    )
    args = parser.parse_args()
    console = Console(width=150)
    runs = []
    for spread in args.spread:
        rows = measure(args.tokens, args.dim, args.vocab, spread)
        sizes = f"N={args.tokens} D={args.dim} V={args.vocab}, logits of standard deviation {spread:g}"
        table = Table(title=f"relative errors of gradients (ratio to dense), {sizes}")
        keys = [key for key in rows[0] if "error" in key]
        for title in ("", *(key.replace("_", " ") for key in keys)):
            table.add_column(title, justify="right" if title else "left")
        for row in rows:
            cells = [f"{row[key]:.1e} ({row[key.replace('error', 'ratio')]:.2f})" for key in keys]
            table.add_row(row["name"], *cells)
        console.print(table)
        run = dict(tokens=args.tokens, dim=args.dim, vocab=args.vocab, spread=spread, rows=rows)
        runs.append(run)
    machine.save(args.out, {"runs": runs})


if __name__ == "__main__":
    main()
