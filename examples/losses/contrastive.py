"""Learns which left half of a handwritten digit belongs to which right half, by contrastive losses.

Two small networks embed the halves of the training images; in the end each left half of the test images looks for its
own right half among all of them. The similarities of a batch are an expression: ours never store them.

  python examples/losses/contrastive.py --steps 400 --seeds 3
"""

import jax
import jax.numpy as jnp
import optax
from _digits import Network, arguments, fit, load, print_table
from flax import nnx

from jaxsoft import losses

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = load()
BATCH, SCALE = 200, 10.0  # images per step; 1 / temperature


class Towers(nnx.Module):
    """Two networks, of the left and of the right halves."""

    def __init__(self, rngs: nnx.Rngs):
        self.left, self.right = (Network(rngs, inputs=32, width=128, outputs=32) for _ in range(2))

    def __call__(self, images):
        """The embeddings of both halves, of length 1."""
        pictures = images.reshape(-1, 8, 8)
        halves = (pictures[:, :, :4], pictures[:, :, 4:])
        towers = (self.left, self.right)
        return [losses.l2_normalize(t(h.reshape(-1, 32))) for t, h in zip(towers, halves)]


def similarities(x, y):
    """Cosines over the temperature, never stored."""
    return losses.cosine_logits(x, y, scale=SCALE, transpose_weight=True)


def of_optax(x, y, labels):
    """The baseline: all similarities in memory, both directions."""
    s, own = SCALE * x @ y.T, jnp.arange(len(x))
    plain = optax.softmax_cross_entropy_with_integer_labels
    return 0.5 * (plain(s, own) + plain(s.T, own))


def of_views(x, y, labels):
    """Both halves as views of one example, as in SimCLR."""
    z = jnp.concatenate([x, y])
    return losses.supervised_contrastive_loss(similarities(z, z), jnp.tile(jnp.arange(len(x)), 2))


def of_classes(x, y, labels):
    """Both halves of all images of a digit as positives."""
    z = jnp.concatenate([x, y])
    return losses.supervised_contrastive_loss(similarities(z, z), jnp.tile(labels, 2))


LOSSES = {
    "cross-entropy both ways (optax)": of_optax,
    "clip_loss": lambda x, y, labels: losses.clip_loss(similarities(x, y)),
    "info_nce_loss, one way": lambda x, y, labels: losses.info_nce_loss(similarities(x, y)),
    "siglip_loss, bias=-5": lambda x, y, labels: losses.siglip_loss(similarities(x, y), bias=-5.0),
    "supervised_contrastive_loss, pairs": of_views,
    "supervised_contrastive_loss, classes": of_classes,
}


def main() -> None:
    """Prints the table."""
    args = arguments(__doc__, steps=400)

    def evaluate(loss, key):
        def mean_loss(model, key):
            batch = jax.random.choice(key, len(LABELS), (BATCH,), replace=False)
            x, y = model(IMAGES[batch])
            return loss(x, y, LABELS[batch]).mean()

        x, y = fit(key, Towers, mean_loss, args.steps)(TEST_IMAGES)
        s = x @ y.T
        rank = jnp.sum(s > jnp.diagonal(s)[:, None], axis=1)
        same = TEST_LABELS[s.argmax(1)] == TEST_LABELS
        return {"recall@1": (rank < 1).mean(), "recall@5": (rank < 5).mean(), "same digit@1": same.mean()}

    print_table(args, LOSSES, evaluate)


if __name__ == "__main__":
    main()
