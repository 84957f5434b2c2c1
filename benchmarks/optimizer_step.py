"""Time and temporary memory of one optimizer step, side by side with optax and with the memory's own speed.

    python benchmarks/optimizer_step.py [--params N] [--repeats N]

Every step is jitted with parameters and state donated, so that they are overwritten in place. The floor of a
row is the same data flow with trivial arithmetic, measured in the same run: an elementwise step that reads
the gradient and overwrites the parameters and as many arrays of state as the optimizer has, plus, where the
method needs sums over a leaf before it can step (norms, maxima, products), one plain sum for each array that
those sums read. Contestants and floors take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import optax

from jaxsoft import optimizers

RESULTS = pathlib.Path(__file__).parent / "results" / "optimizer_step.json"

# name -> (transform, arrays of state, sums over the leaf that come before the step, and what they read)
CONTESTANTS = {
    "optax.sgd": (optax.sgd(1e-3), 0, ()),
    "optax.lion": (optax.lion(1e-3), 1, ()),
    "lion_k": (optimizers.lion_k(1e-3), 1, ()),
    "lion_k, bf16 momentum": (optimizers.lion_k(1e-3, mu_dtype=jnp.bfloat16), 1, ()),
    "optax.adamw": (optax.adamw(1e-3), 2, ()),
    "spam": (optimizers.spam(1e-3, weight_decay=1e-4), 2, ()),
    "stable_spam": (optimizers.stable_spam(1e-3, weight_decay=1e-4), 2, ("max g", "g g")),
    "clip_by_global_norm + adamw": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        2,
        ("g g",),
    ),
    "perpendicular_gradient + sgd": (
        optax.chain(optimizers.perpendicular_gradient(), optax.sgd(1e-3)),
        0,
        ("p p", "g g", "g p", "g p", "g p"),
    ),
}
SUMS = {
    "max g": lambda g, p: jnp.max(g),
    "g g": lambda g, p: jnp.sum(g * g),
    "p p": lambda g, p: jnp.sum(p * p),
    "g p": lambda g, p: jnp.sum(g * p),
}


def compiled_step(tx, grads, params):
    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    return jax.jit(step, donate_argnums=(1, 2)).lower(grads, params, state).compile(), state


def compiled_floor(arrays, sums, grads, params):
    """The traffic of an ideal compiler: each array of state read and written once, the parameters last."""

    def step(grads, params, state):
        # Each sum depends on the one before and the step on the last, as in the methods themselves.
        scalar = jnp.float32(1)
        for name in sums:
            scalar = jax.lax.optimization_barrier(SUMS[name](grads * scalar, params)) * 1e-30
        state = [s + scalar * grads for s in state]
        return functools.reduce(jnp.add, state, params) if state else params + scalar * grads, state

    state = [jnp.zeros_like(params) for _ in range(arrays)]
    return jax.jit(step, donate_argnums=(1, 2)).lower(grads, params, state).compile(), state


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--params", type=int, default=50_000_000, help="number of float32 parameters")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each contestant")
    args = parser.parse_args()

    grads = jax.random.normal(jax.random.key(0), (args.params,))
    times, temporary = {}, {}
    # One contestant and its floor at a time, so that memory holds the state of two only.
    for name, (tx, arrays, sums) in CONTESTANTS.items():
        pair = {}
        params = jnp.ones((args.params,))
        pair[name] = [*compiled_step(tx, grads, params), params]
        params = jnp.ones((args.params,))
        pair[name, "floor"] = [*compiled_floor(arrays, sums, grads, params), params]
        temporary[name] = pair[name][0].memory_analysis().temp_size_in_bytes
        for repeat in range(args.repeats + 2):
            for key, entry in pair.items():
                step, state, params = entry
                start = time.perf_counter()
                params, state = jax.block_until_ready(step(grads, params, state))
                elapsed = time.perf_counter() - start
                entry[1:] = state, params
                if repeat >= 2:
                    times.setdefault(key, []).append(elapsed)
        del pair, params, state, step, entry

    rows = []
    for name in CONTESTANTS:
        ms, floor = (1e3 * sorted(times[key])[len(times[key]) // 2] for key in (name, (name, "floor")))
        rows.append({"step": name, "ms": ms, "floor_ms": floor, "temporary_mb": temporary[name] / 1e6})
    print(f"{args.params / 1e6:g}M float32 parameters, {jax.devices()[0]}, jax {jax.__version__}, median ms")
    print(f"{'step':<30}{'ms':>9}{'floor':>9}{'ratio':>8}{'temp MB':>10}")
    for row in rows:
        row["ratio"] = row["ms"] / row["floor_ms"]
        print("{step:<30}{ms:>9.1f}{floor_ms:>9.1f}{ratio:>8.2f}{temporary_mb:>10.1f}".format(**row))

    RESULTS.parent.mkdir(exist_ok=True)
    context = {
        "params": args.params,
        "repeats": args.repeats,
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }
    RESULTS.write_text(json.dumps(context | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
