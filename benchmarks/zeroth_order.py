"""Peak memory and time of a MeZO step, beside inference and beside training by backpropagation.

    python benchmarks/zeroth_order.py [--width N] [--layers N] [--vocab N] [--repeats N] [--out FILE]

Two settings of a causal language model: one short sequence, where the parameters dominate memory, and many
long ones at a quarter of the width, where the activations do; each with its layers stacked (`lax.scan`) and as
separate leaves. Peak memory is that of the compiled program (`memory_analysis`): arguments, outputs that do
not overwrite an argument, and temporary arrays. Parameters and states are donated. Times are medians of
interleaved steps.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import machine
import optax

from jaxsoft import optimizers

RESULTS = pathlib.Path(__file__).parent / "results" / "zeroth_order.json"
HEAD = 32


def language_model(width, layers, vocab, stacked):
    def weight(*shape):
        return jax.random.normal(jax.random.key(1), shape) / shape[-2] ** 0.5

    def block(*lead):
        return {
            "qkv": weight(*lead, width, 3 * width),
            "out": weight(*lead, width, width),
            "up": weight(*lead, width, 4 * width),
            "down": weight(*lead, 4 * width, width),
        }

    return {
        "embed": weight(vocab, width),
        "layers": block(layers) if stacked else [block() for _ in range(layers)],
    }


def loss_fn(params, tokens):
    def layer(x, w):
        heads = (*x.shape[:2], -1, HEAD)
        qkv = jnp.split(jax.nn.standardize(x) @ w["qkv"], 3, -1)
        mixed = jax.nn.dot_product_attention(*(y.reshape(heads) for y in qkv), is_causal=True)
        x = x + mixed.reshape(x.shape) @ w["out"]
        return x + jax.nn.gelu(jax.nn.standardize(x) @ w["up"]) @ w["down"], None

    x = params["embed"][tokens[:, :-1]]
    if isinstance(params["layers"], list):
        for w in params["layers"]:
            x, _ = layer(x, w)
    else:
        x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = jax.nn.standardize(x) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def peak_bytes(compiled):
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def backpropagation(params, key, tokens):
    return jax.value_and_grad(loss_fn)(params, tokens)


def contestants(params):
    """The steps `(params, state, tokens) -> (params, state)` with their initial states, by name."""

    def inference(params, state, tokens):
        return params, loss_fn(params, tokens)  # returns the donated parameters, which then count once

    def train(gradients, tx, params, state, tokens):
        key, inner = state
        grads = gradients(params, key, tokens)[1]
        updates, inner = tx.update(grads, inner, params)
        return optax.apply_updates(params, updates), (jax.random.fold_in(key, 1), inner)

    def trained(gradients, tx):
        return functools.partial(train, gradients, tx), (jax.random.key(0), tx.init(params))

    def mezo(optimizer):
        def step(params, state, tokens):
            return optimizer.step(loss_fn, params, state, tokens)[:2]

        return step, optimizer.init(jax.random.key(0))

    return {
        "inference": (inference, None),
        "mezo": mezo(optimizers.mezo(1e-6)),
        "mezo(in_place=False)": mezo(optimizers.mezo(1e-6, in_place=False)),
        "zo_value_and_grad + optax.sgd": trained(optimizers.zo_value_and_grad(loss_fn), optax.sgd(1e-6)),
        "backpropagation + optax.sgd": trained(backpropagation, optax.sgd(1e-6)),
        "backpropagation + optax.adam": trained(backpropagation, optax.adam(1e-6)),
    }


def measure(setting, make_params, tokens, repeats):
    rows, running = [], {}
    params = make_params()
    for name, (step, state) in contestants(params).items():
        start = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
        rows.append(
            {
                "setting": setting,
                "step": name,
                "compile_s": time.perf_counter() - start,
                "peak_mb": peak_bytes(compiled) / 1e6,
                "parameters_mb": sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6,
            }
        )
        running[name] = [compiled, make_params(), state, []]
    for repeat in range(repeats + 1):
        for entry in running.values():
            compiled, params, state, times = entry
            start = time.perf_counter()
            params, new_state = jax.block_until_ready(compiled(params, state, tokens))
            if repeat:
                times.append(1e3 * (time.perf_counter() - start))
            entry[1:3] = params, None if state is None else new_state
    for row in rows:
        times = sorted(running[row["step"]][3])
        row["ms"] = times[len(times) // 2]
        row["peak_ratio"], row["time_ratio"] = (row[k] / rows[0][k] for k in ("peak_mb", "ms"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="width of the model in the first setting")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per contestant")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()

    rows = []
    print(f"{jax.devices()[0]}, jax {jax.__version__}; ratios to inference")
    print(f"{'step':<32}{'peak MB':>10}{'ratio':>8}{'ms':>10}{'ratio':>8}{'compile s':>11}")
    for name, width, shape in (
        ("parameters dominate", args.width, (1, 17)),
        ("activations dominate", args.width // 4, (16, 257)),
    ):
        tokens = jax.random.randint(jax.random.key(2), shape, 0, args.vocab)
        for stacked in (True, False):
            setting = f"{name}, {'stacked layers' if stacked else 'separate leaves'}"
            make = functools.partial(language_model, width, args.layers, args.vocab, stacked)
            print(setting)
            for row in measure(setting, make, tokens, args.repeats):
                line = "  {step:<30}{peak_mb:>10.1f}{peak_ratio:>8.3f}{ms:>10.1f}{time_ratio:>8.2f}{compile_s:>11.1f}"
                print(line.format(**row), flush=True)
                rows.append(row)

    sizes = {name: value for name, value in vars(args).items() if name != "out"}
    machine.save(args.out, {**sizes, "rows": rows})


if __name__ == "__main__":
    main()
