"""Heads for huge vocabularies: a training step beside the streamed log-softmax, and Partial FC beside the full head.

    python benchmarks/heads.py [--vocab 793471] [--dim 512] [--tokens 8192] [--softmax-tokens 128 512]
                               [--classes 1000000] [--features 256] [--batch 512]

*Spherical*: value and gradients of hidden and weight and a step of gradient descent, with the Z-loss recomputed and
maintained, and with `cross_entropy` of `linear_logits`, which runs on two smaller numbers of tokens: its time is the
line through the two.
*Partial FC*: value, gradients and a step of momentum, on 10 percent of the classes and on all. *Identities*: both heads
train an embedding of simulated identities; accuracy on new samples. Prints a table and writes
benchmarks/results/heads.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import time
from typing import NamedTuple

import jax
import machine
import optax

import jaxsoft
from jaxsoft import heads, losses


class Seconds(NamedTuple):
    """Time of a call: by the clock, and of all threads of this process, which other processes disturb less."""

    wall: float
    cpu: float


def seconds(run, state, repeats: int) -> Seconds:
    """The median time of `state = run(*state)`; the first of several calls is not timed. Donates the state."""
    compiled = run.lower(*state).compile()
    times = []
    for _ in range(repeats + (repeats > 1)):
        start = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(compiled(*state))
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return Seconds(*map(statistics.median, zip(*times[repeats > 1 :])))


def ratio(a: Seconds, b: Seconds) -> Seconds:
    """Of both times."""
    return Seconds(a.wall / b.wall, a.cpu / b.cpu)


def spherical(vocab: int, dim: int, tokens: int, softmax_tokens: list[int], repeats: int) -> dict:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, dim))
    labels = jax.random.randint(keys[2], (tokens,), 0, vocab)

    def weight():
        return jax.random.normal(keys[1], (vocab, dim)) / dim**0.5

    @functools.partial(jax.jit, donate_argnums=0)
    def maintained(head, _):
        def loss(of, hidden):
            return heads.spherical_loss(hidden, of, labels).mean()

        of = heads.spherical_statistics(head, labels)
        gradient, of_hidden = jax.grad(loss, (0, 1))(of, hidden)
        return heads.spherical_update(head, labels, gradient, 0.1), of_hidden

    def dense_step(loss, hidden):
        @functools.partial(jax.jit, donate_argnums=0)
        def step(weight, _):
            of_hidden, of_weight = jax.grad(loss, (0, 1))(hidden, weight)
            return weight - 0.1 * of_weight, of_hidden

        return step

    def z_loss(hidden, weight):
        head = heads.spherical_head(weight, transpose_weight=True)
        return heads.spherical_loss(hidden, head, labels).mean()

    def softmax(hidden, weight):
        logits = jaxsoft.linear_logits(hidden, weight, transpose_weight=True)
        return losses.cross_entropy(logits, labels[: len(hidden)]).mean()

    head = jax.jit(functools.partial(heads.spherical_head, transpose_weight=True), donate_argnums=0)(weight())
    out = dict(vocab=vocab, dim=dim, tokens=tokens, softmax_tokens=softmax_tokens)
    out["maintained"] = seconds(maintained, (head, hidden), repeats)
    del head
    out["recomputed"] = seconds(dense_step(z_loss, hidden), (weight(), hidden), max(1, repeats // 2))
    measured = []
    for n in softmax_tokens:
        few = hidden[:n]
        measured.append(seconds(dense_step(softmax, few), (weight(), few), 1))
    out["softmax_measured"] = [m._asdict() for m in measured]
    first, second = measured
    extra = (tokens - softmax_tokens[1]) / (softmax_tokens[1] - softmax_tokens[0])
    out["softmax"] = Seconds(*(b + (b - a) * extra for a, b in zip(first, second)))
    for name in ("maintained", "recomputed"):
        out[f"{name}_times_faster"] = ratio(out["softmax"], out[name])
    return {k: v._asdict() if isinstance(v, Seconds) else v for k, v in out.items()}


def face_step(optimizer, classes: int, size: int | None, scale: float):
    """A step of Partial FC, or of the full head: (weight, state, features, labels, key) to the gradient of features."""

    def step(weight, state, features, labels, key):
        if size is None:

            def loss(features, weight):
                cosines = losses.cosine_logits(features, weight, transpose_weight=True)
                return losses.additive_margin_loss(cosines, labels, scale=scale).mean()

            of_features, gradient = jax.grad(loss, (0, 1))(features, weight)
            updates, state = optimizer.update(gradient, state, weight)
            return optax.apply_updates(weight, updates), state, of_features
        sample = heads.sample_classes(key, labels, classes=classes, size=size)

        def loss(features, sampled):
            options = dict(transpose_weight=True, scale=scale)
            return heads.sampled_margin_loss(features, sampled, sample, **options).mean()

        of_features, gradient = jax.grad(loss, (0, 1))(features, weight[sample.ids])
        update = heads.sampled_update(optimizer, gradient, state, weight, sample.ids, transpose_weight=True)
        return *update, of_features

    return step


def partial_fc(classes: int, features: int, batch: int, repeats: int) -> dict:
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, features))
    labels = jax.random.randint(keys[2], (batch,), 0, classes)
    optimizer = optax.sgd(0.1, momentum=0.9)
    out = dict(classes=classes, features=features, batch=batch)
    for name, size in (("sampled", classes // 10), ("full", None)):
        step = face_step(optimizer, classes, size, 64.0)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def run(weight, state, _, step=step):
            return step(weight, state, x, labels, keys[3])

        weight = jax.random.normal(keys[1], (classes, features))
        out[name] = seconds(run, (weight, optimizer.init(weight), x), repeats if size else 1)
    out["ratio"] = ratio(out["sampled"], out["full"])
    return {k: v._asdict() if isinstance(v, Seconds) else v for k, v in out.items()}


def identities(classes: int = 4000, inputs: int = 64, features: int = 32, steps: int = 1500) -> dict:
    """Accuracy on new samples of an embedding and its head, trained on noisy samples of simulated identities."""
    keys = jax.random.split(jax.random.key(0), 5)
    prototypes = jax.random.normal(keys[0], (classes, inputs))
    batch, noise = 256, 0.8

    def draw(key):
        first, second = jax.random.split(key)
        labels = jax.random.randint(first, (batch,), 0, classes)
        return prototypes[labels] + noise * jax.random.normal(second, (batch, inputs)), labels

    def embed(network, x):
        return jax.nn.relu(x @ network[0]) @ network[1]

    def accuracy(size):
        head_optimizer, optimizer = optax.sgd(1.0, momentum=0.9), optax.adam(1e-3)
        head_step = face_step(head_optimizer, classes, size, 16.0)
        shapes = ((inputs, 128), (128, features))
        network = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys[1:3], shapes)]
        weight = jax.random.normal(keys[3], (classes, features)) / 10

        def step(carry, key):
            network, state, weight, head_state = carry
            of_batch, of_sample = jax.random.split(key)
            x, labels = draw(of_batch)
            embedded, pull = jax.vjp(lambda network: embed(network, x), network)
            weight, head_state, cotangent = head_step(weight, head_state, embedded, labels, of_sample)
            updates, state = optimizer.update(pull(cotangent)[0], state)
            return (optax.apply_updates(network, updates), state, weight, head_state), None

        @jax.jit
        def train(network, weight):
            carry = network, optimizer.init(network), weight, head_optimizer.init(weight)
            (network, _, weight, _), _ = jax.lax.scan(step, carry, jax.random.split(keys[4], steps))

            def score(key):
                x, labels = draw(key)
                cosines = losses.cosine_logits(embed(network, x), weight, transpose_weight=True)
                return jaxsoft.top_k_accuracy(cosines, labels).mean()

            return jax.lax.map(score, jax.random.split(jax.random.key(1), 20)).mean()

        return float(train(network, weight))

    return dict(classes=classes, steps=steps, full=accuracy(None), sampled=accuracy(classes // 10))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=793471)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--softmax-tokens", type=int, nargs=2, default=[128, 512])
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--only", nargs="+", choices=("identities", "partial_fc", "spherical"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "heads.json"
    )
    args = parser.parse_args()
    record = {k: v for k, v in machine.own(machine.load(args.out)).items() if k != "machine"}
    runs = {
        "identities": identities,
        "partial_fc": lambda: partial_fc(args.classes, args.features, args.batch, args.repeats),
        "spherical": lambda: spherical(args.vocab, args.dim, args.tokens, args.softmax_tokens, args.repeats),
    }
    for name in args.only or runs:
        record[name] = runs[name]()
        print(name, json.dumps(record[name], indent=1), flush=True)
    machine.save(args.out, record)


if __name__ == "__main__":
    main()
