"""Trains a small GPT, then writes text with any chain of transforms, as one compiled scan.

The transforms stand in the order in which they are applied, each with its number. The same text is written twice, from
logits that are never stored and from stored ones; one key gives the same tokens.

  python examples/generate.py --quick
  python examples/generate.py --chain repetition_penalty=1.2,temperature=0.8,top_k=50,min_p=0.05 --prompt "The value of"
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_lm
from flax import nnx

from jaxsoft import decoding, losses

LIMIT = 256  # top_p looks for the nucleus among as many tokens
PARTS = {
    "temperature": decoding.temperature,
    "softcap": decoding.softcap,
    "top_k": lambda k: decoding.top_k(int(k)),
    "top_p": lambda p: decoding.top_p(p, limit=LIMIT),
    "top_h": decoding.top_h,
    "min_p": decoding.min_p,
    "epsilon_cutoff": decoding.epsilon_cutoff,
    "eta_cutoff": decoding.eta_cutoff,
    "top_n_sigma": decoding.top_n_sigma,
    "bregman_top_k": decoding.bregman_top_k,
}
PENALTIES = {
    "repetition_penalty": decoding.repetition_penalty,
    "presence_penalty": decoding.presence_penalty,
    "frequency_penalty": decoding.frequency_penalty,
}


def read_chain(text: str) -> list[tuple[str, float]]:
    """The parts of `name=number,name=number`."""
    parts = []
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in PARTS | PENALTIES:
            raise argparse.ArgumentTypeError(f"knows no {name!r}, only {', '.join(PARTS | PENALTIES)}")
        try:
            parts.append((name, float(value)))
            make_chain(parts[-1:], jnp.zeros(1, int))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{part!r}: {error}") from error
    return parts


def make_chain(parts: list[tuple[str, float]], counts) -> decoding.Transform:
    """The transform that the flag describes; penalties read how often each token occurred."""
    return decoding.chain(
        *(PENALTIES[name](counts, x) if name in PENALTIES else PARTS[name](x) for name, x in parts)
    )


def train(args: argparse.Namespace, vocab: int, batches):
    """The graph and the parameters of a trained model."""
    graph, params = nnx.split(train_lm.GPT(args, vocab, True, nnx.Rngs(args.seed)))
    optimizer = train_lm.make_optimizer("adamw", None, args)

    def mean_loss(params, tokens):
        hidden, kernel = nnx.merge(graph, params)(tokens[:, :-1])
        logits = train_lm.make_logits(hidden.reshape(-1, args.width), kernel, args.tied, streamed=True)
        return losses.weighted_mean(losses.cross_entropy, logits, tokens[:, 1:].reshape(-1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        loss, gradient = jax.value_and_grad(mean_loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for i, tokens in enumerate(batches, 1):
        params, state, loss = step(params, state, tokens)
        if i == 1 or i == len(batches):
            print(f"step {i:>4}/{len(batches)}  loss {float(loss):.3f}")
    return graph, params


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def generate(options, graph, stored: bool, params, prompt, key):
    """`[texts, tokens]` that continue the prompt `[n]`."""
    args = argparse.Namespace(**dict(options))
    model, rows = nnx.merge(graph, params), jnp.arange(args.texts)
    recent = prompt[-args.sequence :]
    window = jnp.zeros((args.texts, args.sequence), jnp.int32).at[:, : len(recent)].set(recent)
    counts = jnp.broadcast_to(decoding.token_counts(prompt, args.vocab), (args.texts, args.vocab))

    def step(state, key):
        window, length, counts = state
        hidden, kernel = model(window)
        logits = train_lm.make_logits(hidden[:, length - 1], kernel, args.tied, streamed=not stored)
        token = decoding.sample(make_chain(args.chain, counts)(logits), key)
        full = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        window = jnp.where(length < args.sequence, window.at[:, length].set(token), full)
        return (window, jnp.minimum(length + 1, args.sequence), counts.at[rows, token].add(1)), token

    start = window, jnp.int32(len(recent)), counts
    return jax.lax.scan(step, start, jax.random.split(key, args.tokens))[1].T


def make_parser() -> train_lm.Parser:
    """The flags of this program."""
    parser = train_lm.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    default = "repetition_penalty=1.1,temperature=0.8,top_k=40,min_p=0.02"
    parser.add_argument("--chain", type=read_chain, default=default, help="transforms (%(default)s)")
    parser.add_argument("--prompt", default="The default value of", help="text to continue (%(default)s)")
    for flag, value, help in (
        ("--tokens", 60, "tokens to write"),
        ("--texts", 4, "continuations"),
        ("--steps", 120, "steps of training"),
    ):
        parser.add_argument(flag, type=train_lm.number(int, 1), default=value, help=help + " (%(default)s)")
    parser.add_argument(
        "--seed", type=train_lm.number(int, 0), default=0, help="of weights, batches, samples"
    )
    return parser


def main() -> None:
    """Trains, writes, and measures."""
    given = make_parser().parse_args()
    args = train_lm.parse_arguments(train_lm.make_parser(), ["--quick"] if given.quick else [])
    quick_steps = args.steps if given.quick else given.steps
    args = argparse.Namespace(**{**vars(args), "steps": quick_steps, "seed": given.seed})
    tokenizer, batches, _ = train_lm.load(args)
    vocab = len(tokenizer.tokens)
    graph, params = train(args, vocab, batches)
    prompt = jnp.asarray(tokenizer.encode(given.prompt or "\n"))
    options = dict(texts=given.texts, tokens=given.tokens, chain=tuple(given.chain), vocab=vocab)
    options = (*options.items(), ("sequence", args.sequence), ("tied", args.tied))
    written = {}
    for stored in (False, True):
        run = functools.partial(generate, options, graph, stored, params, prompt)
        jax.block_until_ready(run(jax.random.key(0)))  # compiles
        began = time.perf_counter()
        written[stored] = np.asarray(run(jax.random.key(given.seed)))
        rate = given.texts * given.tokens / (time.perf_counter() - began)
        print(f"{'stored' if stored else 'never stored':12}  {rate:,.0f} tokens/s")
    for text in written[False]:
        print("\n" + given.prompt + tokenizer.decode(text))
    same = np.mean(written[False] == written[True])
    print(f"\nstored and never-stored logits gave the same token at {100 * same:.0f}% of the places")


if __name__ == "__main__":
    main()
