"""A small Pre-LN GPT (Flax) and the same model converted to Pre-RMSNorm and Pre-CRMSNorm: outputs and times.

    python benchmarks/norms.py [--repeats 12]

Prints the largest difference of the logits and times (minima of interleaved runs, each contestant after an untimed
call; CPU time as well, which other processes disturb less); writes benchmarks/results/norms.json.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import machine
from flax import linen as nn

from jaxsoft.norms import crms_norm, pre_ln_to_pre_rms, pre_rms_to_pre_crms

EPS = 1e-5
RESULTS = pathlib.Path(__file__).parent / "results" / "norms.json"
ROLES = dict(
    writes=[r"(token|place)/embedding", r"block_\d+/(attention/out|down)/(kernel|bias)"],
    reads={
        r"(block_\d+)/norm_1": [r"\1/attention/query", r"\1/attention/key", r"\1/attention/value"],
        r"(block_\d+)/norm_2": [r"\1/up"],
        "norm": ["head"],
    },
)


class CRMSNorm(nn.Module):
    """`crms_norm` as a module."""

    @nn.compact
    def __call__(self, x):
        """Applies the module."""
        return crms_norm(x, eps=EPS)


NORMS = {
    "Pre-LN": functools.partial(nn.LayerNorm, epsilon=EPS),
    "Pre-RMSNorm": functools.partial(nn.RMSNorm, epsilon=EPS),
    "Pre-CRMSNorm": CRMSNorm,
}


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm."""

    kind: str
    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        """Applies the module."""
        norm = NORMS[self.kind]
        attention = nn.MultiHeadDotProductAttention(
            self.heads, qkv_features=self.width, out_features=x.shape[-1], name="attention"
        )
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + attention(norm(name="norm_1")(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * self.width, name="up")(norm(name="norm_2")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class GPT(nn.Module):
    """Embeddings, blocks, a norm and a head; the compressed stream has one feature less."""

    kind: str
    width: int
    heads: int
    layers: int
    length: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens):
        """Applies the module."""
        stream = self.width - (self.kind == "Pre-CRMSNorm")
        x = nn.Embed(self.vocabulary, stream, name="token")(tokens)
        x = x + nn.Embed(self.length, stream, name="place")(jnp.arange(tokens.shape[1]))
        for i in range(self.layers):
            x = Block(self.kind, self.width, self.heads, name=f"block_{i}")(x)
        return nn.Dense(self.vocabulary, name="head")(NORMS[self.kind](name="norm")(x))


def contestants(width: int, heads: int, layers: int, length: int, vocabulary: int) -> dict:
    """The three models, each with its parameters; those of Pre-LN are random, biases and scales of norms included."""
    models = {kind: GPT(kind, width, heads, layers, length, vocabulary) for kind in NORMS}
    shapes = jax.eval_shape(models["Pre-LN"].init, jax.random.key(0), jnp.zeros((1, length), int))["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def draw(leaf, key):  # vectors (biases, scales) of either sign; kernels keep the variance
        spread = 0.5 if leaf.ndim == 1 else 1.0 if leaf.shape[0] in (vocabulary, length) else width**-0.5
        return spread * jax.random.normal(key, leaf.shape)

    params = treedef.unflatten([draw(leaf, key) for leaf, key in zip(leaves, keys)])
    rms = pre_ln_to_pre_rms(params, **ROLES)
    trees = dict(zip(NORMS, (params, rms, pre_rms_to_pre_crms(rms, **ROLES))))
    return {kind: (models[kind], trees[kind]) for kind in NORMS}


def forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def step(model, params, tokens):
    def loss(params):
        logits = jax.nn.log_softmax(forward(model, params, tokens))
        return -jnp.take_along_axis(logits, tokens[..., None], -1).mean()

    return jax.value_and_grad(loss)(params)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=12, help="timed runs per contestant (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    models = contestants(args.width, args.width // 64 or 1, args.layers, args.length, 1024)
    tokens = jax.random.randint(jax.random.key(1), (args.batch, args.length), 0, 1024)
    rows, programs, expected = [], [], None
    for what, function in (("forward", forward), ("forward + backward", step)):
        for kind, (model, params) in models.items():
            program = jax.jit(functools.partial(function, model))
            out = jax.block_until_ready(program(params, tokens))
            row = dict(model=kind, what=what, seconds=float("inf"), cpu_seconds=float("inf"))
            if what == "forward":
                expected = out if expected is None else expected
                row["difference"] = float(jnp.max(jnp.abs(out - expected)))
                row["largest_logit"] = float(jnp.max(jnp.abs(expected)))
            rows.append(row)
            programs.append((program, params))
    pairs = list(zip(rows, programs))
    for i in range(args.repeats):  # in alternating order, since a run is affected by the one before
        for row, (program, params) in pairs if i % 2 else reversed(pairs):
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(params, tokens))
            row["seconds"] = min(row["seconds"], time.perf_counter() - start)
            row["cpu_seconds"] = min(row["cpu_seconds"], time.process_time() - cpu_start)
    for row in rows:
        base = next(r for r in rows if r["what"] == row["what"])
        row["of_pre_ln"] = row["seconds"] / base["seconds"]
        row["cpu_of_pre_ln"] = row["cpu_seconds"] / base["cpu_seconds"]
        difference = f", logits differ by {row['difference']:.1e}" if "difference" in row else ""
        ratios = f"{row['of_pre_ln']:.3f} of Pre-LN, CPU time {row['cpu_of_pre_ln']:.3f}"
        print(f"{row['model']:13} {row['what']:19} {row['seconds']:.3f} s, {ratios}{difference}")
    sizes = {name: getattr(args, name) for name in ("width", "layers", "length", "batch")}
    machine.save(args.out, {**sizes, "rows": rows})


if __name__ == "__main__":
    main()
