"""Retrieval of handwritten digits: a small embedding trained with ranking losses, beside optax's cross-entropy.

The items are the training images, the queries are held-out images, and every item of a query's digit is relevant to
it. In training, a batch pairs each image with another one of its digit. The losses of a single positive use only that
one, and so treat the other images of the digit in the batch, about one in ten, as negatives; the losses of many
positives, of pairs and of lists use the digits.

  python examples/losses/ranking.py --steps 300 --seeds 3
"""

import functools

import jax
import jax.numpy as jnp
import optax
from _digits import Network, arguments, fit, load, print_table

from jaxsoft import losses

BATCH, TEMPERATURE = 64, 0.1
ITEMS, ITEM_DIGITS, QUERIES, QUERY_DIGITS = load()


def of_pairs(loss, scale=1.0, **options):
    """A loss of cosines `[batch, batch]` in which the positive of row i is column i."""

    def call(cosines, relevant):
        return loss(scale * cosines, jnp.arange(len(cosines)), **options).mean()

    return call


def of_digits(loss, scale=1 / TEMPERATURE, **options):
    """A loss of cosines `[batch, batch]` that gets all relevant items, as booleans."""

    def call(cosines, relevant):
        return loss(scale * cosines, relevant, **options).mean()

    return call


def of_lists(loss, scale=1 / TEMPERATURE, **options):
    """A loss of cosines `[batch, batch]` that gets the relevance, 0 or 1."""

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


def embed(model, images):
    """Embeddings of length 1."""
    return losses.l2_normalize(model(images))


def measure(cosines, relevant, count):
    """Means over the queries of three metrics, for `[queries, items]`; `count` items are relevant to each query.

    Recall at 5: whether a relevant item is among the first five. R-precision: of the first R items, R the number of
    relevant ones, the part that is relevant.
    """
    ranked = jnp.take_along_axis(relevant, jnp.argsort(-cosines, axis=-1), axis=-1)
    discount = 1 / jnp.log2(2 + jnp.arange(10))
    first = jnp.arange(ranked.shape[-1]) < count[:, None]
    return {
        "recall@5": ranked[:, :5].any(-1).mean(),
        "NDCG@10": (ranked[:, :10] @ discount / discount.sum()).mean(),
        "R-precision": ((ranked & first).sum(-1) / count).mean(),
    }


def main() -> None:
    """Prints the table."""
    args = arguments(__doc__, steps=300)
    # Computed here: the compiler is slow to add up constants.
    by_digit, count = jnp.argsort(ITEM_DIGITS), jnp.bincount(ITEM_DIGITS, length=10)
    start = jnp.cumsum(count) - count
    relevant, relevant_count = QUERY_DIGITS[:, None] == ITEM_DIGITS, count[QUERY_DIGITS]

    def evaluate(loss, key):
        def batch_loss(model, key):
            first, second = jax.random.split(key)
            query = jax.random.randint(first, (BATCH,), 0, len(ITEMS))
            digit = ITEM_DIGITS[query]
            partner = by_digit[start[digit] + jax.random.randint(second, (BATCH,), 0, count[digit])]
            cosines = embed(model, ITEMS[query]) @ embed(model, ITEMS[partner]).T
            return loss(cosines, digit[:, None] == digit)

        model = fit(key, functools.partial(Network, outputs=16), batch_loss, args.steps)
        return measure(embed(model, QUERIES) @ embed(model, ITEMS).T, relevant, relevant_count)

    print_table(args, LOSSES, evaluate)


if __name__ == "__main__":
    main()
