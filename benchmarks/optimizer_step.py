"""Time and memory of one optimizer step, beside optax and beside the speed of the memory.

    python benchmarks/optimizer_step.py [--params N] [--repeats N] [--only NAME ...] [--out FILE]

Every step is jitted. Parameters and state are donated, so that they are overwritten in place; the gradients are
not. The floor of a row is the same memory traffic with trivial arithmetic, measured in the same run, in alternation:
an elementwise step that reads the gradient and overwrites the parameters and every array of the optimizer's state, in
their own dtypes; where the method needs sums over a leaf before it can step (norms, maxima, products), it also has
one plain reduction per sum. The bar is 1.15 times the floor. The parameters are 12 square matrices.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import machine
import optax

from jaxsoft import optimizers

RESULTS = pathlib.Path(__file__).parent / "results" / "optimizer_step.json"
LEAVES = 12
BAR = 1.15
WARMUP = 2


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An optimizer, the sums (see `SUMS`) that it needs before its step, and its share of the parameters.

    `transform` may be a function from the side length of the matrices to the optimizer.
    """

    transform: optax.GradientTransformation | Callable[[int], optax.GradientTransformation]
    sums: tuple[str, ...] = ()
    share: float = 1.0


CONTESTANTS = {
    "optax.sgd": Contestant(optax.sgd(1e-3)),
    "optax.lion": Contestant(optax.lion(1e-3)),
    "lion_k": Contestant(optimizers.lion_k(1e-3)),
    "lion_k, bf16 momentum": Contestant(optimizers.lion_k(1e-3, mu_dtype=jnp.bfloat16)),
    "optax.adamw": Contestant(optax.adamw(1e-3)),
    "spam": Contestant(optimizers.spam(1e-3, weight_decay=1e-4)),
    "stable_spam": Contestant(optimizers.stable_spam(1e-3, weight_decay=1e-4), ("max g", "g g")),
    "adamp": Contestant(optimizers.adamp(1e-3, weight_decay=1e-4), ("p p", "g g", "g p")),
    "sgdp": Contestant(optimizers.sgdp(1e-3, weight_decay=1e-4), ("p p", "g g", "g p")),
    "diffgrad": Contestant(optimizers.diffgrad(1e-3)),
    # Few parameters, as the decomposition in its first step is slow; the floor has neither it nor the projections.
    "fira": Contestant(lambda side: optimizers.fira(1e-3, rank=side // 8), ("g g",), share=0.02),
    "8-bit adamw": Contestant(optimizers.quantize_state(optax.adamw(1e-3))),
    "8-bit adamw, in pieces": Contestant(optimizers.quantize_state(optax.adamw(1e-3), chunk_size=2**18)),
    "8-bit lion, in pieces": Contestant(optimizers.quantize_state(optax.lion(1e-3), chunk_size=2**18)),
    "compress_gradients + sgd": Contestant(
        optax.chain(optimizers.compress_gradients(), optax.sgd(1e-3)), ("max g",)
    ),
    "clip_by_global_norm + adamw": Contestant(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), ("g g",)
    ),
    "perpendicular_gradient + sgd": Contestant(
        optax.chain(optimizers.perpendicular_gradient(), optax.sgd(1e-3)),
        ("p p", "g g", "g p", "g p", "g p"),
    ),
}
SUMS = {
    "max g": lambda g, p: jnp.max(g),
    "g g": lambda g, p: jnp.sum(g * g),
    "p p": lambda g, p: jnp.sum(p * p),
    "g p": lambda g, p: jnp.sum(g * p),
}


def size_in_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_step(tx, grads, params):
    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    return jax.jit(step, donate_argnums=(1, 2)).lower(grads, params, state).compile(), state


def compiled_floor(shapes, sums, grads, params):
    """The memory traffic of an ideal compiler: reads and writes each array of state once, the parameters last."""
    like = params[0].shape
    # Arrays of state that are shaped like a parameter are updated along with one, the others by themselves.
    beside = [s for s in jax.tree.leaves(shapes) if s.shape == like]
    alone = [s for s in jax.tree.leaves(shapes) if s.shape != like]

    def step(grads, params, state):
        beside, alone = state
        new_params, new_beside = [], [None] * len(beside)
        for i, (g, p) in enumerate(zip(grads, params)):
            # Each sum depends on the previous one, and the step on the last, as in the methods themselves.
            scalar = jnp.float32(1)
            for name in sums:
                scalar = jax.lax.optimization_barrier(SUMS[name](g * scalar, p)) * 1e-30
            total = p if sums or beside[i :: len(params)] else p + g
            for j in range(i, len(beside), len(params)):
                s = beside[j]
                new_beside[j] = s + (scalar * g).astype(s.dtype)
                total = total + new_beside[j].astype(total.dtype)
            if not beside[i :: len(params)]:
                total = total + scalar * g
            new_params.append(total)
        return new_params, (new_beside, [s + jnp.ones((), s.dtype) for s in alone])

    state = tuple([jnp.zeros(s.shape, s.dtype) for s in group] for group in (beside, alone))
    return jax.jit(step, donate_argnums=(1, 2)).lower(grads, params, state).compile(), state


def measure(contestant: Contestant, count: int, repeats: int) -> dict[str, float]:
    """Measures one optimizer and its floor in alternation."""
    side = math.sqrt(contestant.share * count / LEAVES)
    multiple = 256 if side > 1000 else 8  # as in real models
    side = max(8, round(side / multiple) * multiple)
    tx = contestant.transform(side) if callable(contestant.transform) else contestant.transform
    grads = [jax.random.normal(jax.random.key(i), (side, side)) for i in range(LEAVES)]
    size = LEAVES * side * side
    params = [jnp.ones((side, side)) for _ in range(LEAVES)]
    shapes = jax.eval_shape(tx.init, params)
    ours = [*compiled_step(tx, grads, params), params]
    params = [jnp.ones((side, side)) for _ in range(LEAVES)]
    floor = [*compiled_floor(shapes, contestant.sums, grads, params), params]
    temporary = ours[0].memory_analysis().temp_size_in_bytes
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + WARMUP):
        for entry, record in zip((ours, floor), times):
            step, state, params = entry
            start = time.perf_counter()
            params, state = jax.block_until_ready(step(grads, params, state))
            if repeat >= WARMUP:
                record.append(time.perf_counter() - start)
            entry[1:] = state, params
    ms, floor_ms = (1e3 * sorted(record)[len(record) // 2] for record in times)
    return {
        "params": size,
        "ms": ms,
        "floor_ms": floor_ms,
        "ratio": ms / floor_ms,
        "ratio_of_minima": min(times[0]) / min(times[1]),
        "state_bytes_per_param": size_in_bytes(shapes) / size,
        "temporary_bytes_per_param": temporary / size,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--params", type=int, default=50_000_000, help="number of float32 parameters")
    parser.add_argument("--repeats", type=int, default=11, help="timed steps per contestant")
    parser.add_argument(
        "--only", nargs="*", choices=CONTESTANTS, help="measure only these rows; keep the others"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="the file to write")
    args = parser.parse_args(argv)
    print(f"{args.params / 1e6:g}M float32 parameters, {jax.devices()[0]}, jax {jax.__version__}, median ms")
    print(f"{'step':<30}{'ms':>9}{'floor':>9}{'ratio':>8}{'state B/param':>15}{'temp B/param':>14}")
    rows = {}
    if args.only:
        rows = {row["step"]: row for row in machine.own(machine.load(args.out)).get("rows", [])}
    for name in args.only or CONTESTANTS:
        rows[name] = {"step": name, "repeats": args.repeats}
        rows[name] |= measure(CONTESTANTS[name], args.params, args.repeats)
        line = "{step:<30}{ms:>9.1f}{floor_ms:>9.1f}{ratio:>8.2f}{state_bytes_per_param:>15.3f}"
        line += "{temporary_bytes_per_param:>14.2f}"
        print(
            line.format(**rows[name]) + ("" if rows[name]["ratio"] <= BAR else "  above the bar"), flush=True
        )
        ordered = [rows[name] for name in CONTESTANTS if name in rows]
        machine.save(args.out, {"bar": BAR, "rows": ordered})


if __name__ == "__main__":
    main()
