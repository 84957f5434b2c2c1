"""Trains a small network on handwritten digits with wrong labels, once with each of several robust losses.

The labels of the training images are wrong with probability 0.4, each replaced by one of the other nine digits;
those of the test images are right. The plain optax cross-entropy is the baseline. Every loss gets the same network,
optimizer, rate, steps and batches; the table shows the accuracy on the test images, and on the training images with
the right and with the wrong labels (how much of the noise was learned by heart).

  python examples/robust_losses.py --noise 0.4 --steps 1000
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

CLASSES, WIDTH, BATCH, RATE, TRAINED_ON = 10, 128, 64, 3e-3, 1200
LOSSES = {  # name: loss, with the papers' constants for CIFAR-10
    "optax cross-entropy": optax.softmax_cross_entropy_with_integer_labels,
    "comp-sum, tau = 1.3": functools.partial(losses.comp_sum_loss, tau=1.3),
    "GCE": losses.generalized_cross_entropy,
    "MAE": losses.mean_absolute_error_loss,
    "SCE": losses.symmetric_cross_entropy,
    "NCE + MAE": losses.active_passive_loss,
    "NCE + RCE": functools.partial(losses.active_passive_loss, passive="reverse"),
    "Brier": losses.brier_loss,
}


class Network(nnx.Module):
    """An image `[..., 64]` to logits `[..., 10]`."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer1, self.layer2 = nnx.Linear(64, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.head(jax.nn.relu(self.layer2(jax.nn.relu(self.layer1(x)))))


def load(noise: float) -> tuple:
    """Images, right and given labels to train on; images and labels to test on."""
    random = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = random.permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    given = labels[:TRAINED_ON] + (random.random(TRAINED_ON) < noise) * random.integers(
        1, CLASSES, TRAINED_ON
    )
    arrays = (
        images[:TRAINED_ON],
        labels[:TRAINED_ON],
        given % CLASSES,
        images[TRAINED_ON:],
        labels[TRAINED_ON:],
    )
    return tuple(map(jnp.asarray, arrays))


@functools.partial(jax.jit, static_argnums=(1, 2))
def train(seed, loss, steps: int, data) -> dict:
    """Trains one network and measures it."""
    images, right, given, test_images, test_labels = data
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    graph, params = nnx.split(Network(nnx.Rngs(init_key)))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def step(state, key):
        batch = jax.random.randint(key, (BATCH,), 0, TRAINED_ON)

        def mean_loss(params):
            return loss(nnx.merge(graph, params)(images[batch]), given[batch]).mean()

        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(batch_key, steps))
    network = nnx.merge(graph, params)
    guess, wrong = network(images).argmax(-1), given != right
    return {
        "test": (network(test_images).argmax(-1) == test_labels).mean(),
        "train, right": jnp.mean(guess == given, where=~wrong),
        "train, wrong": jnp.mean(guess == given, where=wrong),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--noise", type=float, default=0.4, help="part of the labels that is wrong (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps of 64 images (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="networks a row of the table (%(default)s)")
    args = parser.parse_args()
    if not (0 < args.noise < 1 and args.steps > 0 and args.seeds > 0):
        parser.error("--noise must be between 0 and 1, --steps and --seeds 1 or more")
    return args


def main() -> None:
    args = parse_arguments()
    data = load(args.noise)
    print(
        f"{args.noise:.0%} wrong labels, {args.steps} steps; accuracy, mean +- deviation over {args.seeds} seeds"
    )
    print(f"{'loss':<22}{'test':>16}{'train, right':>16}{'train, wrong':>16}")
    for name, loss in LOSSES.items():
        measures = jax.vmap(lambda seed, loss=loss: train(seed, loss, args.steps, data))(
            jnp.arange(args.seeds)
        )
        cells = (f"{m.mean():.3f} +- {m.std():.3f}" for m in measures.values())
        print(f"{name:<22}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
