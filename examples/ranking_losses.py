"""Retrieval of handwritten digits: a small embedding trained with ranking losses, beside optax's cross-entropy.

The items are the training images, the queries are held-out images, and what is relevant to a query is every item of
its digit. In training, a batch pairs each image with another one of its digit. The losses of a single positive know
of that one alone, and so take the other images of the digit in the batch, about one in ten, for negatives; the losses
of many positives, and of pairs and lists, are told the digits.

  python examples/ranking_losses.py --steps 300 --seeds 3
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from jaxsoft import losses

ITEMS, BATCH, WIDTH, FEATURES = 600, 64, 64, 16
TEMPERATURE = 0.1


def of_pairs(loss, scale=1.0, **options):
    """A loss of cosines `[batch, batch]` in which the positive of row i is column i."""

    def call(cosines, relevant):
        return loss(scale * cosines, jnp.arange(len(cosines)), **options).mean()

    return call


def of_digits(loss, scale=1 / TEMPERATURE, **options):
    """A loss of cosines `[batch, batch]` that is told all that is relevant, as booleans."""

    def call(cosines, relevant):
        return loss(scale * cosines, relevant, **options).mean()

    return call


def of_lists(loss, scale=1 / TEMPERATURE, **options):
    """A loss of cosines `[batch, batch]` that is told the relevance, 0 or 1."""

    def call(cosines, relevant):
        return loss(scale * cosines, relevant.astype(jnp.int32), **options).mean()

    return call


cross_entropy = optax.softmax_cross_entropy_with_integer_labels
cold = dict(temperature=TEMPERATURE)
LOSSES = {
    "optax cross-entropy": of_pairs(cross_entropy, 1 / TEMPERATURE),
    "softmax_loss": of_pairs(losses.softmax_loss, **cold),
    "pairwise_softmax, tanh": of_pairs(losses.pairwise_softmax_loss, 0.5, activation="tanh", **cold),
    "pairwise_softmax, relu": of_pairs(losses.pairwise_softmax_loss, 0.5, activation="relu", **cold),
    "bilateral_softmax": of_pairs(
        losses.bilateral_softmax_loss, positive_temperature=TEMPERATURE, negative_temperature=0.2
    ),
    "softmax_loss_at_k": of_pairs(losses.softmax_loss_at_k, k=5, weight_temperature=1.0, **cold),
    "multi_positive_softmax": of_digits(losses.multi_positive_softmax_loss),
    "decoupled_softmax": of_digits(losses.decoupled_softmax_loss),
    "soft_top_k": of_digits(losses.soft_top_k_loss, k=BATCH // 10),
    "pairwise_logistic": of_lists(losses.pairwise_logistic_loss),
    "list_mle": of_lists(losses.list_mle_loss),
    "approx_ndcg": of_lists(losses.approx_ndcg_loss, 1.0, temperature=0.1),
}
METRICS = ("recall@5", "NDCG@10", "R-precision")


class Embedding(nnx.Module):
    """An image `[..., 64]` to a unit vector `[..., FEATURES]`."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer, self.head = nnx.Linear(64, WIDTH, rngs=rngs), nnx.Linear(WIDTH, FEATURES, rngs=rngs)

    def __call__(self, x):
        """The embedding."""
        x = self.head(jax.nn.relu(self.layer(x)))
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def load() -> tuple:
    """Items and their digits; queries and theirs."""
    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    images, digits = images[order].astype(np.float32) / 16, digits[order].astype(np.int32)
    return (*map(jnp.asarray, (images[:ITEMS], digits[:ITEMS], images[ITEMS:], digits[ITEMS:])),)


def train(seed, loss, steps: int, images, digits):
    """Trains an embedding; returns the function of images."""
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    graph, params = nnx.split(Embedding(nnx.Rngs(init_key)))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    same = digits[:, None] == digits

    def step(state, key):
        first, second = jax.random.split(key)
        query = jax.random.randint(first, (BATCH,), 0, len(digits))
        partner = jax.random.categorical(second, jnp.where(same[query], 0.0, -jnp.inf))

        def batch_loss(params):
            embed = nnx.merge(graph, params)
            return loss(embed(images[query]) @ embed(images[partner]).T, same[query][:, partner])

        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(batch_loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    state = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(step, state, jax.random.split(batch_key, steps))
    return nnx.merge(graph, params)


def measure(cosines, relevant):
    """Means over the queries of three metrics, for `[queries, items]`.

    Recall at 5: whether a relevant item is among the first five. R-precision: of the first R items, R the number of
    relevant ones, the part that is relevant.
    """
    ranked = jnp.take_along_axis(relevant, jnp.argsort(-cosines, axis=-1), axis=-1)
    discount = 1 / jnp.log2(2 + jnp.arange(10))
    count = relevant.sum(-1)
    first = jnp.arange(ranked.shape[-1]) < count[:, None]
    return (
        ranked[:, :5].any(-1).mean(),
        (ranked[:, :10] @ discount / discount.sum()).mean(),
        ((ranked & first).sum(-1) / count).mean(),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="embeddings a row of the table (%(default)s)")
    args = parser.parse_args()
    for flag in ("steps", "seeds"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be 1 or more, got {getattr(args, flag)}")
    return args


def main() -> None:
    args = parse_arguments()
    items, item_digits, queries, query_digits = load()
    relevant = query_digits[:, None] == item_digits

    @functools.partial(jax.jit, static_argnums=(1,))
    def evaluate(seeds, loss):
        def one(seed):
            embed = train(seed, loss, args.steps, items, item_digits)
            return measure(embed(queries) @ embed(items).T, relevant)

        return jax.vmap(one)(seeds)

    print(
        f"{len(queries)} queries, {len(items)} items, {args.steps} steps; mean +- deviation, {args.seeds} seeds"
    )
    print(f"{'loss':24}" + "".join(f"{metric:>18}" for metric in METRICS))
    for name, loss in LOSSES.items():
        values = jax.device_get(evaluate(jnp.arange(args.seeds), loss))
        cells = (f"{v.mean():.4f} +- {v.std():.4f}" for v in values)
        print(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
