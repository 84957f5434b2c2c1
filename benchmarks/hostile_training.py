"""Trains the small GPT of examples/train_lm.py with six optimizers, in a stable setting and in three hostile ones.

    python benchmarks/hostile_training.py [--seeds 3] [--settings stable spikes ...] [any option of train_lm.py]

* stable: the learning rate that `examples/train_lm.py` found good for each optimizer, float32;
* spikes: in 2 % of the steps, chosen at random, the gradient is multiplied by 1000;
* rate x 10: ten times that learning rate;
* bfloat16: parameters, and with them gradients and updates, in bfloat16.

For each seed, all optimizers get the same initial weights, batches and spikes. Prints the validation loss after
training (mean and standard deviation over the seeds; a loss that is not finite counts as that of an untrained model),
and writes benchmarks/results/hostile_training.json and hostile_training.png (training curves, mean over the seeds).
"""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import machine
import train_lm

from jaxsoft import losses, optimizers

SIZES = "--steps 200 --batch 8 --sequence 64 --width 64 --layers 2 --heads 4 --vocab 1024 --source-mb 0.5"


def adamw_8bit(rate, **options):
    """AdamW with moments of one byte per element; by default, matrices of a model this small would stay in float32."""
    return optimizers.quantize_state(optax.adamw(rate, **options), min_size=1024)


OPTIMIZERS = {  # name: (learning rate -> optimizer, peak learning rate)
    "optax.adamw": (optax.adamw, 3e-3),
    "optax.lion": (optax.lion, 1e-3),
    "spam": (functools.partial(optimizers.spam, reset_every=100, warmup_steps=20), 3e-3),
    "stable_spam": (functools.partial(optimizers.stable_spam, reset_every=100), 3e-3),
    "8-bit adamw": (adamw_8bit, 3e-3),
    "adamp": (optimizers.adamp, 3e-3),
}


class Setting(NamedTuple):
    """What makes training hostile: factors of gradient spikes and of the learning rate, dtype of the parameters."""

    spike: float = 1.0
    rate: float = 1.0
    dtype: Any = jnp.float32


SETTINGS = {
    "stable": Setting(),
    "spikes": Setting(spike=1000.0),
    "rate x 10": Setting(rate=10.0),
    "bfloat16": Setting(dtype=jnp.bfloat16),
}


def make_training(args: argparse.Namespace, name: str, vocab: int):
    """The compiled `(initial parameters, batches, spikes, rate, validation) -> (curve, validation loss)`."""
    make, peak = OPTIMIZERS[name]
    graph, _ = nnx.split(train_lm.GPT(args, vocab, True, nnx.Rngs(0)))

    def mean_loss(params, tokens):
        hidden, kernel = nnx.merge(graph, params)(tokens[:, :-1])
        logits = train_lm.make_logits(hidden.reshape(-1, args.width), kernel, True)
        return jnp.mean(losses.cross_entropy(logits, tokens[:, 1:].reshape(-1)))

    def optimizer_of(rate):
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, args.steps // 10 + 1, args.steps + 1)
        return make(
            lambda count: rate * schedule(count),
            weight_decay=args.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        )

    @jax.jit
    def train(params, batches, spikes, rate, validation):
        optimizer = optimizer_of(rate)

        def step(carry, now):
            params, state = carry
            tokens, spike = now
            loss, gradient = jax.value_and_grad(mean_loss)(params, tokens)
            gradient = jax.tree.map(lambda g: g * spike.astype(g.dtype), gradient)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), curve = jax.lax.scan(step, (params, optimizer.init(params)), (batches, spikes))
        return curve, jnp.mean(jax.lax.map(lambda tokens: mean_loss(params, tokens), validation))

    return train


def inputs_of(args: argparse.Namespace, seed: int, setting: Setting, data):
    """The arguments of `train` for a setting and a seed, the same for all optimizers."""
    tokenizer, batches, validation = data
    _, params = nnx.split(train_lm.GPT(args, len(tokenizer.tokens), True, nnx.Rngs(seed)))
    params = jax.tree.map(lambda p: p.astype(setting.dtype), params)
    hit = np.random.default_rng(seed).random(args.steps) < 0.02
    spikes = jnp.asarray(np.where(hit, setting.spike, 1.0), jnp.float32)
    return params, batches, spikes, jnp.float32(setting.rate), validation


def main() -> None:
    parser = train_lm.make_parser()
    parser.add_argument("--seeds", type=int, default=3, help="runs per optimizer and setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    args = train_lm.parse_arguments(parser, [*SIZES.split(), "--sample-tokens", "1", *sys.argv[1:]])
    data = []
    for seed in range(args.seeds):
        args.seed = seed
        data.append(train_lm.load(args))
    vocab = len(data[0][0].tokens)
    rows, curves = [], {}
    for name in OPTIMIZERS:
        train = make_training(args, name, vocab)
        for kind in args.settings:
            began, ends, steps = time.perf_counter(), [], []
            for seed in range(args.seeds):
                curve, end = train(*inputs_of(args, seed, SETTINGS[kind], data[seed]))
                steps.append(np.asarray(curve, np.float64))
                ends.append(float(end) if np.isfinite(end) else math.log(vocab))
            curves[name, kind] = np.mean(steps, axis=0)
            seconds = time.perf_counter() - began
            rows.append({"optimizer": name, "setting": kind, "validation": ends})
            print(
                f"{name:12} {kind:10} {statistics.mean(ends):.3f} +- {spread(ends):.3f}  ({seconds:.0f} s)",
                flush=True,
            )
    show(args, rows)
    write(args, rows, curves)


def spread(ends: list[float]) -> float:
    """The standard deviation over the seeds."""
    return statistics.stdev(ends) if len(ends) > 1 else 0.0


def show(args: argparse.Namespace, rows: list[dict]) -> None:
    """Prints the table; bold: means at most one of their standard deviations above the best mean of the setting."""
    table = Table(title=f"validation loss after {args.steps} steps, {args.seeds} seeds")
    table.add_column("optimizer")
    found = {(row["optimizer"], row["setting"]): row["validation"] for row in rows}
    for kind in args.settings:
        table.add_column(kind, justify="right")
    best = {kind: min(statistics.mean(found[name, kind]) for name in OPTIMIZERS) for kind in args.settings}
    for name in OPTIMIZERS:
        cells = []
        for kind in args.settings:
            ends = found[name, kind]
            text = f"{statistics.mean(ends):.3f} +- {spread(ends):.3f}"
            near = statistics.mean(ends) - spread(ends) <= best[kind]
            cells.append(f"[bold]{text}[/bold]" if near else text)
        table.add_row(name, *cells)
    Console(width=110).print(table)


def write(args: argparse.Namespace, rows: list[dict], curves: dict) -> None:
    """Writes the results and the plot."""
    import matplotlib  # here, because it is optional and slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "hostile_training.json"
    machine.save(path, {"sizes": SIZES, "options": sys.argv[1:], "rows": rows})
    figure, axes = plt.subplots(1, len(args.settings), figsize=(4.2 * len(args.settings), 3.6), squeeze=False)
    for axis, kind in zip(axes[0], args.settings):
        for name in OPTIMIZERS:
            curve = curves[name, kind]
            width = min(10, len(curve))
            axis.plot(np.convolve(curve, np.ones(width) / width, "valid"), label=name, linewidth=1)
        axis.set(title=kind, xlabel="step", ylim=(None, math.log(args.vocab) + 1))
    axes[0][0].set_ylabel("training loss, mean of ten steps")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.results / "hostile_training.png", dpi=120)
    print(f"written to {path} and hostile_training.png")


if __name__ == "__main__":
    main()
