"""Tunes a small character model on preferences with several losses, beside continued training on the chosen text.

The text is the manual that comes with Python. First a character model, the reference, learns a little of it. Then each
loss tunes a copy of the reference on pairs of continuations of a prompt from the manual. Chosen is the true one;
rejected starts like it and goes on with a sample of the reference, which the reference mostly finds more likely. The
judge is wrong in a part of the training pairs (`--label-noise`). The table holds means over the seeds, for text outside
the training set, where the judge is right:

  policy     how often the policy gives the true continuation the larger probability
  reward     how often the implicit reward, log pi - log ref, is larger for the true continuation
  nats       cross-entropy of the true continuation, in nats per character: lower is better

  python examples/losses/preference.py --label-noise 0.3
"""

import argparse
import functools
import pydoc_data.topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxsoft
from jaxsoft import losses

CONTEXT, RESPONSE, EMBED, WIDTH = 12, 32, 16, 96
TRAIN, TEST, BATCH = 2048, 512, 32
METRICS = ("policy", "reward", "nats")
TUNING_RATE, PRETRAINING_RATE, TEMPERATURE = 1e-3, 3e-3, 0.7


# Text.


class Pairs(NamedTuple):
    """Prompts with two continuations each, and the judge's scores.

    Attributes:
      chosen: `[pairs, CONTEXT + RESPONSE]` ids of characters, the prompt before the continuation.
      rejected: as `chosen`.
      score_gap: `[pairs]`, the judge's score of the chosen continuation minus that of the rejected one.
    """

    chosen: jax.Array
    rejected: jax.Array
    score_gap: jax.Array


def load():
    """The ids of the text to train on and of the text to test on, the last tenth of each document; the characters."""
    documents = [" ".join(document.split()) for document in pydoc_data.topics.topics.values()]
    cuts = [len(document) * 9 // 10 for document in documents]
    train = " ".join(document[:cut] for document, cut in zip(documents, cuts))
    test = " ".join(document[cut:] for document, cut in zip(documents, cuts))
    ids = {c: i for i, c in enumerate(sorted(set(train + test)))}
    return *(jnp.asarray([ids[c] for c in text], jnp.int32) for text in (train, test)), len(ids)


def pieces(key, text, count: int):
    """`[count, CONTEXT + RESPONSE]` stretches of the text, from random places."""
    starts = jax.random.randint(key, (count, 1), 0, len(text) - CONTEXT - RESPONSE)
    return text[starts + jnp.arange(CONTEXT + RESPONSE)]


# Model.


class Network(nnx.Module):
    """From ids `[..., CONTEXT + RESPONSE]` to hidden states of the response and the head's kernel."""

    def __init__(self, characters: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(characters, EMBED, rngs=rngs)
        self.mix = nnx.Linear(CONTEXT * EMBED, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, characters, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        """Each hidden state sees the CONTEXT characters before the one that it predicts."""
        window = jnp.arange(RESPONSE)[:, None] + jnp.arange(CONTEXT)
        x = self.embed(tokens[..., window])
        hidden = jax.nn.gelu(self.mix(x.reshape(*x.shape[:-2], -1)))
        return hidden, self.head.kernel[...]


def make_pairs(key, reference: Network, text, count: int, noise: float) -> Pairs:
    """Pairs from random places of the text; the sooner a rejected continuation leaves the true one, the worse."""
    place_key, start_key, sample_key, noise_key = jax.random.split(key, 4)
    true = pieces(place_key, text, count)
    kept = 8 * jax.random.randint(start_key, (count,), 0, 4)  # of the characters of the continuation

    def write(tokens, position_and_key):
        position, key = position_and_key
        hidden, kernel = reference(tokens)
        logits = jaxsoft.linear_logits(hidden[:, position], kernel)
        top = jaxsoft.top_k(jaxsoft.temperature(logits, TEMPERATURE), 20)
        choice = jax.random.categorical(key, top.values)
        sampled = jnp.take_along_axis(top.indices, choice[:, None], axis=1)[:, 0]
        place = CONTEXT + position
        return tokens.at[:, place].set(jnp.where(position < kept, tokens[:, place], sampled)), None

    keys = jax.random.split(sample_key, RESPONSE)
    false, _ = jax.lax.scan(write, true, (jnp.arange(RESPONSE), keys))
    wrong = jax.random.bernoulli(noise_key, noise, (count, 1))
    return Pairs(jnp.where(wrong, false, true), jnp.where(wrong, true, false), (RESPONSE - kept) / 8)


def log_prob(network: Network, tokens):
    """The log-probability of each response; the logits `[..., RESPONSE, characters]` are never stored."""
    hidden, kernel = network(tokens)
    logits = jaxsoft.linear_logits(hidden, kernel)
    return losses.sequence_log_prob(jaxsoft.log_prob(logits, tokens[..., CONTEXT:]))


# Losses: functions of the log-probabilities of pairs (chosen, rejected, and both under the reference) and the gap.


def per_character(values):
    return [v / RESPONSE for v in values]


def losses_of_pairs(noise: float):
    """The losses by name, with the options that the example uses."""
    dpo = functools.partial(losses.dpo_loss, beta=0.1)
    return {
        "dpo": lambda pair, gap: dpo(*pair),
        "ipo": lambda pair, gap: losses.dpo_loss(*per_character(pair), kind="ipo", beta=1.0),
        "robust dpo": lambda pair, gap: dpo(*pair, kind="robust", label_smoothing=min(noise, 0.45)),
        "f-dpo, jensen-shannon": lambda pair, gap: losses.f_dpo_loss(
            *pair, beta=0.1, divergence="jensen_shannon"
        ),
        "simpo": lambda pair, gap: losses.simpo_loss(*per_character(pair[:2])),
        "mmpo": lambda pair, gap: losses.margin_matching_loss(
            *pair, gap, jnp.zeros_like(gap), bt_beta=0.5, beta=0.1
        ),
    }


# Training.


def pretrain(seed, text, characters: int, steps: int):
    """The parameters of a reference, trained to predict the text."""
    init_key, key = jax.random.split(jax.random.key(seed))
    graph, params = nnx.split(Network(characters, nnx.Rngs(init_key)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(PRETRAINING_RATE, steps))

    def step(state, key):
        tokens = pieces(key, text, 2 * BATCH)

        def mean_loss(params):
            return -log_prob(nnx.merge(graph, params), tokens).mean() / RESPONSE

        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
    return params


def tune(seed, reference, pairs: Pairs, characters: int, steps: int, loss):
    """The parameters after tuning; without a loss, by likelihood of the chosen responses alone."""
    graph, _ = nnx.split(Network(characters, nnx.Rngs(0)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(TUNING_RATE, steps), weight_decay=0.0)

    def policy(params, tokens):
        return log_prob(nnx.merge(graph, params), tokens)

    reference_chosen, reference_rejected = (policy(reference, tokens) for tokens in pairs[:2])

    def mean_loss(params, batch):
        chosen, rejected = pairs.chosen[batch], pairs.rejected[batch]
        if loss is None:
            hidden, kernel = nnx.merge(graph, params)(chosen)
            return optax.softmax_cross_entropy_with_integer_labels(
                hidden @ kernel, chosen[:, CONTEXT:]
            ).mean()
        both = policy(params, chosen), policy(params, rejected)
        return loss(
            (*both, reference_chosen[batch], reference_rejected[batch]), pairs.score_gap[batch]
        ).mean()

    def step(state, key):
        params, opt_state = state
        batch = jax.random.randint(key, (BATCH,), 0, len(pairs.chosen))
        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params, batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), steps)
    (params, _), _ = jax.lax.scan(step, (reference, optimizer.init(reference)), keys)
    return params


def measure(params, reference, pairs: Pairs, characters: int) -> dict:
    """What the table shows."""
    graph, _ = nnx.split(Network(characters, nnx.Rngs(0)))
    chosen, rejected = (log_prob(nnx.merge(graph, params), tokens) for tokens in pairs[:2])
    first, second = (log_prob(nnx.merge(graph, reference), tokens) for tokens in pairs[:2])
    return {
        "policy": (chosen > rejected).mean(),
        "reward": (chosen - first > rejected - second).mean(),
        "nats": -chosen.mean() / RESPONSE,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120, help="steps of tuning (%(default)s)")
    parser.add_argument("--pretraining-steps", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="models per row of the table (%(default)s)")
    parser.add_argument(
        "--label-noise", type=float, default=0.2, help="part of the wrong labels (%(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    text, test_text, characters = load()
    graph, _ = nnx.split(Network(characters, nnx.Rngs(0)))

    @jax.jit
    @jax.vmap
    def prepare(seed):
        """A reference with pairs to train on and to test on."""
        params = pretrain(seed, text, characters, args.pretraining_steps)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2))
        reference = nnx.merge(graph, params)
        train = make_pairs(keys[0], reference, text, TRAIN, args.label_noise)
        return params, train, make_pairs(keys[1], reference, test_text, TEST, 0.0)

    seeds = jnp.arange(args.seeds)
    pretrained, train, test = prepare(seeds)

    @jax.jit
    def evaluate(params):
        return jax.vmap(lambda *a: measure(*a, characters))(params, pretrained, test)

    rows = {"reference": None, "likelihood of the chosen": None, **losses_of_pairs(args.label_noise)}
    print(f"{args.label_noise:.0%} of the labels wrong; mean +- deviation over {args.seeds} seeds\n")
    print(f"{'':26}" + "".join(f"{name:>18}" for name in METRICS))
    for name, loss in rows.items():
        params = pretrained
        if name != "reference":
            run = jax.vmap(functools.partial(tune, characters=characters, steps=args.steps, loss=loss))
            params = jax.jit(run)(seeds, pretrained, train)
        metrics = jax.device_get(evaluate(params))
        cells = [f"{metrics[m].mean():.3f} +- {metrics[m].std():.3f}" for m in METRICS]
        if name == "reference":
            cells[METRICS.index("reward")] = "-"  # its implicit rewards are 0
        print(f"{name:26}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
