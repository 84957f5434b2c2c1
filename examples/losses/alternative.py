"""Trains a small network on handwritten digits with alternatives to softmax cross-entropy, optax's beside them.

All losses share the optimizer and its learning rate, which suits the first one.

  python examples/losses/alternative.py --steps 600 --seeds 3
"""

import functools

import jax
import jax.numpy as jnp
import optax
from _digits import Network, arguments, fit, load, print_table

from jaxsoft import losses

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = load()
LOSSES = {
    "softmax cross-entropy (optax)": optax.softmax_cross_entropy_with_integer_labels,
    "crammer_singer_loss": losses.crammer_singer_loss,
    "weston_watkins_loss": losses.weston_watkins_loss,
    "one_vs_rest_hinge_loss": losses.one_vs_rest_hinge_loss,
    "perceptron_loss": losses.perceptron_loss,
    "sparsemax_loss": losses.sparsemax_loss,
    "entmax15_loss": losses.entmax15_loss,
    "squared_error_loss": losses.squared_error_loss,
    "taylor_softmax_cross_entropy": losses.taylor_softmax_cross_entropy,
    "spherical_softmax_cross_entropy": losses.spherical_softmax_cross_entropy,
    "stablemax_cross_entropy": losses.stablemax_cross_entropy,
    "sparse_softmax_cross_entropy, k=3": functools.partial(losses.sparse_softmax_cross_entropy, k=3),
}
# Where the prediction is not the largest logit: the scores to take the largest of.
SCORES = {losses.spherical_softmax_cross_entropy: jnp.square}


def main() -> None:
    """Prints the table."""
    args = arguments(__doc__, steps=600)

    def evaluate(loss, key):
        def mean_loss(model, key):
            batch = jax.random.choice(key, len(LABELS), (50,), replace=False)
            return loss(model(IMAGES[batch]), LABELS[batch]).mean()

        model = fit(key, Network, mean_loss, args.steps)
        score = SCORES.get(loss, lambda x: x)
        gradient = jax.grad(lambda x: loss(x, LABELS).sum())(model(IMAGES))
        return {
            "test accuracy": (score(model(TEST_IMAGES)).argmax(-1) == TEST_LABELS).mean(),
            "no gradient left": jnp.all(gradient == 0, axis=-1).mean(),  # the part of the training images
        }

    print_table(args, LOSSES, evaluate)


if __name__ == "__main__":
    main()
