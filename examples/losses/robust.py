"""Trains a small network on handwritten digits with wrong labels, once with each of several robust losses.

The labels of the training images are wrong with probability 0.4, each replaced by one of the other nine digits; those
of the test images are right. The table shows the accuracy on the test images, and the agreement with the labels given
to the training images, where they are right and where they are wrong: how much of the noise was memorized.

  python examples/losses/robust.py --steps 1000 --seeds 3
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _digits import CLASSES, Network, arguments, fit, load, print_table

from jaxsoft import losses

NOISE = 0.4
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = load()
LOSSES = {  # with the papers' constants for CIFAR-10
    "cross-entropy (optax)": optax.softmax_cross_entropy_with_integer_labels,
    "comp_sum_loss, tau=1.3": functools.partial(losses.comp_sum_loss, tau=1.3),
    "generalized_cross_entropy": losses.generalized_cross_entropy,
    "mean_absolute_error_loss": losses.mean_absolute_error_loss,
    "symmetric_cross_entropy": losses.symmetric_cross_entropy,
    "active_passive_loss, NCE + MAE": losses.active_passive_loss,
    "active_passive_loss, NCE + RCE": functools.partial(losses.active_passive_loss, passive="reverse"),
    "brier_loss": losses.brier_loss,
}


def spoil(labels):
    """The labels, a part of them wrong."""
    random = np.random.default_rng(1)
    wrong = random.random(len(labels)) < NOISE
    return (labels + jnp.asarray(wrong * random.integers(1, CLASSES, len(labels)), jnp.int32)) % CLASSES


def main() -> None:
    """Prints the table."""
    args = arguments(__doc__, steps=1000)
    given = spoil(LABELS)
    wrong = given != LABELS

    def evaluate(loss, key):
        def mean_loss(model, key):
            batch = jax.random.choice(key, len(given), (64,), replace=False)
            return loss(model(IMAGES[batch]), given[batch]).mean()

        model = fit(key, functools.partial(Network, width=256), mean_loss, args.steps)
        guess = model(IMAGES).argmax(-1)
        return {
            "test accuracy": (model(TEST_IMAGES).argmax(-1) == TEST_LABELS).mean(),
            "agreement, right": jnp.mean(guess == given, where=~wrong),
            "agreement, wrong": jnp.mean(guess == given, where=wrong),
        }

    print_table(args, LOSSES, evaluate)


if __name__ == "__main__":
    main()
