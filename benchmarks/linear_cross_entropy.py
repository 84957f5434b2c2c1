"""Cross-entropy of a linear head: logits that are never stored beside dense optax, value and gradient, in one run.

    python benchmarks/linear_cross_entropy.py [--tokens 2048] [--dim 512] [--vocab 32768] [--repeats 9]

Prints a table of compiled temporary memory and time (medians of interleaved runs, ratios to dense optax of the
same run) and writes benchmarks/results/linear_cross_entropy.json.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import jax
import machine
import optax
from rich.console import Console
from rich.table import Table

import jaxsoft
from jaxsoft import losses


def dense_optax(hidden, weight, labels):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, labels).mean()


def recomputing(hidden, weight, labels):
    return losses.cross_entropy(jaxsoft.linear_logits(hidden, weight), labels).mean()


def forward_gradient(hidden, weight, labels):
    return losses.weighted_mean(losses.cross_entropy, jaxsoft.linear_logits(hidden, weight), labels)


def recomputing_smooth(hidden, weight, labels):
    logits = jaxsoft.linear_logits(hidden, weight)
    return losses.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-4).mean()


def recomputing_focal(hidden, weight, labels):
    return losses.focal_loss(jaxsoft.linear_logits(hidden, weight), labels).mean()


def forward_gradient_max_suppression(hidden, weight, labels):
    return losses.weighted_mean(losses.max_suppression_loss, jaxsoft.linear_logits(hidden, weight), labels)


def dense_max_suppression(hidden, weight, labels):
    logits = hidden @ weight
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (nll + 0.1 * (logits.max(-1) - logits.mean(-1))).mean()


CONTESTANTS = {
    "dense optax": dense_optax,
    "cross_entropy, streamed": recomputing,
    "cross_entropy, weighted_mean": forward_gradient,
    "smoothing + z_loss, streamed": recomputing_smooth,
    "focal_loss, streamed": recomputing_focal,
    "dense MaxSup": dense_max_suppression,
    "MaxSup, weighted_mean": forward_gradient_max_suppression,
}


def measure(tokens: int, dim: int, vocab: int, repeats: int) -> list[dict]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, dim))
    weight = jax.random.normal(keys[1], (dim, vocab)) / dim**0.5
    labels = jax.random.randint(keys[2], (tokens,), 0, vocab)
    compiled = {
        name: jax.jit(jax.value_and_grad(f, (0, 1))).lower(hidden, weight, labels).compile()
        for name, f in CONTESTANTS.items()
    }
    times = {name: [] for name in compiled}
    for _ in range(repeats):  # interleaved, so that a busy moment affects all alike
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(hidden, weight, labels))
            times[name].append(time.perf_counter() - start)
    base_time = statistics.median(times["dense optax"])
    base_memory = compiled["dense optax"].memory_analysis().temp_size_in_bytes
    rows = []
    for name, run in compiled.items():
        memory = run.memory_analysis().temp_size_in_bytes
        median = statistics.median(times[name])
        rows.append(
            dict(
                name=name,
                seconds_median=median,
                seconds_min=min(times[name]),
                time_ratio=median / base_time,
                time_ratio_min=min(times[name]) / min(times["dense optax"]),
                temp_bytes=memory,
                memory_ratio=memory / base_memory,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results" / "linear_cross_entropy.json",
    )
    args = parser.parse_args()
    console = Console()
    runs = []
    for tokens in args.tokens:
        rows = measure(
            tokens, args.dim, args.vocab, args.repeats if tokens <= 4096 else max(3, args.repeats // 2)
        )
        table = Table(title=f"value and gradient, N={tokens} D={args.dim} V={args.vocab} float32")
        for title in ("", "median s", "time ratio", "temporary MB", "memory ratio"):
            table.add_column(title, justify="right" if title else "left")
        for row in rows:
            table.add_row(
                row["name"],
                f"{row['seconds_median']:.3f}",
                f"{row['time_ratio']:.2f}",
                f"{row['temp_bytes'] / 1e6:.1f}",
                f"1/{1 / row['memory_ratio']:.1f}",
            )
        console.print(table)
        runs.append(dict(tokens=tokens, dim=args.dim, vocab=args.vocab, rows=rows))
    machine.save(args.out, {"runs": runs})


if __name__ == "__main__":
    main()
