"""Distils a network that has seen 1200 handwritten digits into a small one that sees 100 of them.

The baseline trains the small network on the labels of the 100 images; the others on the large one's logits for them.

  python examples/losses/distillation.py --steps 400 --seeds 3
"""

import functools

import jax
import optax
from _digits import Network, arguments, fit, load, print_table

import jaxsoft
from jaxsoft import losses

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = load()
FEW = 100


def of_labels(student, teacher_logits):
    """The baseline."""
    del teacher_logits
    return optax.softmax_cross_entropy_with_integer_labels(student, LABELS[:FEW])


def of_ensemble(student, teacher_logits):
    """The teacher, and one that knows only the label."""
    known = 5.0 * jax.nn.one_hot(LABELS[:FEW], 10)
    return losses.ensemble_distillation_loss(student, [teacher_logits, known])


def of_top_3(student, teacher_logits):
    """The three largest probabilities of the teacher are all that was stored."""
    best = jaxsoft.rows.softmax_top_k(teacher_logits, 3)
    return losses.top_k_distillation_loss(student, best[1], best[0])


KD = losses.distillation_loss
LOSSES = {
    "labels alone (optax cross-entropy)": of_labels,
    "distillation_loss, T=1": KD,
    "distillation_loss, T=4": functools.partial(KD, temperature=4.0),
    "distillation_loss, reverse_kl": functools.partial(KD, divergence="reverse_kl"),
    "distillation_loss, jensen_shannon": functools.partial(KD, divergence="jensen_shannon"),
    "low_temperature_distillation_loss": losses.low_temperature_distillation_loss,
    "adaptive_alpha_divergence_loss": losses.adaptive_alpha_divergence_loss,
    "top_k_distillation_loss, k=3": of_top_3,
    "binary_distillation_loss": losses.binary_distillation_loss,
    "ensemble_distillation_loss, with the labels": of_ensemble,
}


def main() -> None:
    """Prints the table."""
    args = arguments(__doc__, steps=400)

    def teach(model, key):
        batch = jax.random.choice(key, len(LABELS), (100,), replace=False)
        return losses.cross_entropy(model(IMAGES[batch]), LABELS[batch]).mean()

    teacher = jax.jit(lambda key: fit(key, functools.partial(Network, width=256), teach, args.steps))
    teacher = teacher(jax.random.key(1000))
    hits = (teacher(TEST_IMAGES).argmax(-1) == TEST_LABELS).mean()
    print(f"test accuracy of the teacher, which saw {len(LABELS)} labels: {hits:.4f}")
    teacher_logits = teacher(IMAGES[:FEW])

    def evaluate(loss, key):
        def mean_loss(model, key):
            del key
            return loss(model(IMAGES[:FEW]), teacher_logits).mean()

        student = fit(key, functools.partial(Network, width=16), mean_loss, args.steps, 1e-2)
        logits = student(TEST_IMAGES)
        return {
            "test accuracy": (logits.argmax(-1) == TEST_LABELS).mean(),
            "KL from teacher": losses.distillation_loss(logits, teacher(TEST_IMAGES)).mean(),
        }

    print_table(args, LOSSES, evaluate)


if __name__ == "__main__":
    main()
