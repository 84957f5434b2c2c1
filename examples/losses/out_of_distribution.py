"""Compares losses that help a classifier to detect unknown inputs: digits 8 and 9, which are never trained on.

Trained on the digits 0 to 5. The losses named with "+ outliers" also see images of 6 and 7, as examples outside
the classes. The score is the free energy `-logsumexp(logits)`; AUROC is how often it is higher for an image of
8 or 9 than for one of 0 to 5. The calibration error compares confidence and accuracy on 0 to 5, in ten bins. The seeds
vary the initial network and the batches.

  python examples/losses/out_of_distribution.py --steps 1000 --seeds 3
"""

import functools

import jax
import jax.numpy as jnp
import optax
from _digits import Network, arguments, fit, load, print_table

import jaxsoft
from jaxsoft import losses

KNOWN, OUTLIERS = 6, 8  # the digits below 6 are the classes, 6 and 7 the outliers of training
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = load()


def of_known(loss):
    """A loss that reads the known images alone."""
    return lambda logits, labels, outlier_logits: loss(logits, labels).mean()


def with_outlier_exposure(logits, labels, outlier_logits):
    """The usual factor of 0.5."""
    return (
        losses.cross_entropy(logits, labels).mean()
        + 0.5 * losses.outlier_exposure_loss(outlier_logits).mean()
    )


def with_energy_margin(logits, labels, outlier_logits):
    """The usual factor of 0.1; margins for logits of this size."""
    both = jnp.concatenate([logits, outlier_logits])
    is_out = jnp.arange(len(both)) >= len(logits)
    margin = losses.energy_margin_loss(both, is_out, m_in=-10.0, m_out=-2.0)
    return losses.cross_entropy(logits, labels).mean() + 0.1 * (
        margin.mean(where=is_out) + margin.mean(where=~is_out)
    )


LOSSES = {
    "cross-entropy (optax)": of_known(optax.softmax_cross_entropy_with_integer_labels),
    "cross_entropy, label_smoothing": of_known(functools.partial(losses.cross_entropy, label_smoothing=0.1)),
    "confidence_penalty_loss": of_known(losses.confidence_penalty_loss),
    "focal_loss": of_known(losses.focal_loss),
    "dro_temperature_loss": of_known(functools.partial(losses.dro_temperature_loss, temperature=0.5)),
    "outlier_exposure_loss + outliers": with_outlier_exposure,
    "energy_margin_loss + outliers": with_energy_margin,
}


def calibration_error(logits, labels):
    """The mean gap of confidence and accuracy over ten bins of confidence, each weighed by its share."""
    confidence, hit = jaxsoft.softmax(logits).max(-1), logits.argmax(-1) == labels
    of_bin = jnp.clip(confidence * 10, 0, 9).astype(jnp.int32)[:, None] == jnp.arange(10)
    return jnp.abs((of_bin * (confidence - hit)[:, None]).sum(0)).sum() / len(labels)


def main() -> None:
    """Prints the table."""
    args = arguments(__doc__, steps=1000)
    known, outliers = IMAGES[LABELS < KNOWN], IMAGES[(LABELS >= KNOWN) & (LABELS < OUTLIERS)]
    labels = LABELS[LABELS < KNOWN]
    test, test_labels = TEST_IMAGES[TEST_LABELS < KNOWN], TEST_LABELS[TEST_LABELS < KNOWN]
    unseen = TEST_IMAGES[TEST_LABELS >= OUTLIERS]

    def evaluate(loss, key):
        def batch_loss(model, key):
            of_known, of_outliers = jax.random.split(key)
            batch = jax.random.choice(of_known, len(labels), (32,))
            other = outliers[jax.random.choice(of_outliers, len(outliers), (32,))]
            return loss(model(known[batch]), labels[batch], model(other))

        model = fit(key, functools.partial(Network, outputs=KNOWN), batch_loss, args.steps)
        logits = model(test)
        energy, unseen_energy = (-jaxsoft.logsumexp(x) for x in (logits, model(unseen)))
        higher = unseen_energy[:, None] > energy
        tied = unseen_energy[:, None] == energy
        return {
            "accuracy": (logits.argmax(-1) == test_labels).mean(),
            "AUROC, 8 and 9": (higher + 0.5 * tied).mean(),
            "calibration error": calibration_error(logits, test_labels),
        }

    print_table(args, LOSSES, evaluate)


if __name__ == "__main__":
    main()
