"""CLIP's symmetric loss and distillation between two heads, with logits never stored, beside the plain dense forms.

    python benchmarks/two_heads.py [--repeats 5]

Prints times (minima of interleaved runs, each contestant after an untimed call), compiled temporary memory, and ratios
to the dense form of the same run; writes benchmarks/results/two_heads.json.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import machine
import optax
from rich.console import Console
from rich.table import Table

import jaxsoft
from jaxsoft import losses

PAIRS, ROWS, WIDTH, CLASSES, SCALE = 8192, 2048, 512, 32768, 14.0
CE = optax.softmax_cross_entropy_with_integer_labels


def clip_dense(x, y):
    s = SCALE * losses.l2_normalize(x) @ losses.l2_normalize(y).T
    own = jnp.arange(len(x))
    return 0.5 * (CE(s, own) + CE(s.T, own)).mean()


def clip_ours(x, y):
    return losses.clip_loss(losses.cosine_logits(x, y, scale=SCALE, transpose_weight=True)).mean()


def clip_two_passes(x, y):
    ways = ((x, y), (y, x))
    logits = (losses.cosine_logits(a, b, scale=SCALE, transpose_weight=True) for a, b in ways)
    return 0.5 * sum(losses.info_nce_loss(s) for s in logits).mean()


def distil_dense(h, w, h2, w2):
    teacher = jax.lax.stop_gradient(jax.nn.log_softmax(h2 @ w2))
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(h @ w), teacher).mean()


def distil_ours(h, w, h2, w2):
    return losses.distillation_loss(jaxsoft.linear_logits(h, w), jaxsoft.linear_logits(h2, w2)).mean()


def distil_in_forward(h, w, h2, w2):
    student, teacher = jaxsoft.linear_logits(h, w), jax.lax.stop_gradient(jaxsoft.linear_logits(h2, w2))
    return losses.weighted_mean(losses.distillation_loss, student, teacher)


CASES = {
    f"CLIP, {PAIRS} x {PAIRS}, D={WIDTH}": {
        "dense (optax)": clip_dense,
        "clip_loss": clip_ours,
        "info_nce_loss, two passes": clip_two_passes,
    },
    f"KL of two heads, N={ROWS}, D={WIDTH}, V={CLASSES}": {
        "dense (optax)": distil_dense,
        "distillation_loss": distil_ours,
        "distillation_loss in weighted_mean": distil_in_forward,
    },
}


def operands(case: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(ROWS, WIDTH), (WIDTH, CLASSES)] * 2 if case.startswith("KL") else [(PAIRS, WIDTH)] * 2
    return [jax.random.normal(key, shape) / shape[0] ** 0.25 for key, shape in zip(keys, shapes)]


def measure(contestants: dict, args: list[jax.Array], repeats: int) -> list[dict]:
    rows, programs = [], []
    for name, f in contestants.items():
        for both in (False, True):
            function = jax.value_and_grad(f, (0, 1)) if both else f
            program = jax.jit(function).lower(*args).compile()
            jax.block_until_ready(program(*args))
            memory = program.memory_analysis().temp_size_in_bytes
            rows.append(dict(name=name, gradient=both, temporary_mb=memory / 1e6, seconds=float("inf")))
            programs.append(program)
    for _ in range(repeats):
        for row, program in zip(rows, programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            row["seconds"] = min(row["seconds"], time.perf_counter() - start)
    for row in rows:
        base = next(r for r in rows if r["gradient"] == row["gradient"])
        row["time_ratio"] = row["seconds"] / base["seconds"]
        row["memory_ratio"] = row["temporary_mb"] / base["temporary_mb"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per contestant (%(default)s)")
    args = parser.parse_args()
    results = {}
    for case, contestants in CASES.items():
        results[case] = rows = measure(contestants, operands(case), args.repeats)
        table = Table("", "gradient", "seconds", "of dense", "temporary MB", "of dense", title=case)
        for r in rows:
            table.add_row(
                r["name"],
                "yes" if r["gradient"] else "no",
                f"{r['seconds']:.3f}",
                f"{r['time_ratio']:.2f}",
                f"{r['temporary_mb']:.1f}",
                f"1/{1 / r['memory_ratio']:.1f}",
            )
        Console(highlight=False).print(table)
    path = pathlib.Path(__file__).parent / "results" / "two_heads.json"
    machine.save(path, {"results": results})


if __name__ == "__main__":
    main()
