"""Compares losses for imbalanced classes on digits whose training counts decay by a factor of 50.

The accuracy is the mean over the classes, so that all count alike; beside it stands that of the three rarest ones. The
seeds vary the initial network and the batches.

  python examples/losses/imbalanced.py --steps 1000 --seeds 3
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _digits import CLASSES, Network, arguments, fit, load, print_table

from jaxsoft import losses

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = load()
COUNTS = np.round(100 * 50 ** (-np.arange(CLASSES) / (CLASSES - 1))).astype(np.int32)
KEPT = np.concatenate([np.flatnonzero(c == LABELS)[:n] for c, n in enumerate(COUNTS)])
LOSSES = {
    "cross-entropy (optax)": optax.softmax_cross_entropy_with_integer_labels,
    "logit_adjusted_cross_entropy": functools.partial(
        losses.logit_adjusted_cross_entropy, class_counts=jnp.asarray(COUNTS)
    ),
    "cross_entropy, class_balanced_weights": functools.partial(
        losses.cross_entropy, class_weights=losses.class_balanced_weights(jnp.asarray(COUNTS))
    ),
    "focal_loss": losses.focal_loss,
    "one_vs_rest_cross_entropy": losses.one_vs_rest_cross_entropy,
    "sigmoid_focal_loss": losses.sigmoid_focal_loss,
    "gumbel_optimized_loss": losses.gumbel_optimized_loss,
}


def main() -> None:
    """Prints the table."""
    args = arguments(__doc__, steps=1000)
    print(f"training images a class: {' '.join(map(str, COUNTS))}")
    images, labels = IMAGES[KEPT], LABELS[KEPT]
    of_class = TEST_LABELS[:, None] == jnp.arange(CLASSES)

    def evaluate(loss, key):
        def mean_loss(model, key):
            batch = jax.random.choice(key, len(labels), (32,))
            return loss(model(images[batch]), labels[batch]).mean()

        hit = fit(key, Network, mean_loss, args.steps)(TEST_IMAGES).argmax(-1) == TEST_LABELS
        by_class = (of_class & hit[:, None]).sum(0) / of_class.sum(0)
        return {"all classes": by_class.mean(), "3 rarest classes": by_class[-3:].mean()}

    print_table(args, LOSSES, evaluate)


if __name__ == "__main__":
    main()
