"""Compares losses for imbalanced classes on digits whose training counts decay by a factor of 50.

The test images are balanced, so that accuracy counts all classes alike. Beside it stands the accuracy on the three
rarest classes. Each row is a mean over seeds, which vary the initial network, the order of the batches and which
images are left in the training set.

  python examples/imbalanced_losses.py
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

CLASSES, LARGEST, FACTOR, BATCH = 10, 100, 50, 32
COUNTS = np.round(LARGEST * FACTOR ** (-np.arange(CLASSES) / (CLASSES - 1))).astype(np.int32)

LOSSES = {
    "optax cross entropy": optax.softmax_cross_entropy_with_integer_labels,
    "logit_adjusted_cross_entropy": functools.partial(
        losses.logit_adjusted_cross_entropy, class_counts=jnp.asarray(COUNTS)
    ),
    "cross_entropy, class-balanced": functools.partial(
        losses.cross_entropy, class_weights=losses.class_balanced_weights(COUNTS)
    ),
    "focal_loss": losses.focal_loss,
    "one_vs_rest_cross_entropy": losses.one_vs_rest_cross_entropy,
    "sigmoid_focal_loss": losses.sigmoid_focal_loss,
    "gumbel_optimized_loss": losses.gumbel_optimized_loss,
}


class Network(nnx.Module):
    """An image `[..., 64]` to logits `[..., 10]`."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer, self.head = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.head(jax.nn.relu(self.layer(x)))


def load(seed: int) -> tuple:
    """A long-tailed training set, and 60 other images of each class to test on."""
    random = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = [random.permutation(np.flatnonzero(labels == c)) for c in range(CLASSES)]
    train = np.concatenate([o[60 : 60 + n] for o, n in zip(order, COUNTS)])
    test = np.concatenate([o[:60] for o in order])
    images, labels = images.astype(np.float32) / 16, labels.astype(np.int32)
    return images[train], labels[train], images[test], labels[test]


def accuracies(loss, seed, images, labels, test_images, test_labels, *, steps: int):
    """Trains one network; the test accuracy of all classes, and of the three rarest."""
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    graph, params = nnx.split(Network(nnx.Rngs(init_key)))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def step(state, key):
        params, opt_state = state
        batch = jax.random.randint(key, (BATCH,), 0, len(labels))

        def mean_loss(params):
            return loss(nnx.merge(graph, params)(images[batch]), labels[batch]).mean()

        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    state = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(step, state, jax.random.split(batch_key, steps))
    hit = nnx.merge(graph, params)(test_images).argmax(-1) == test_labels
    return hit.mean(), hit.mean(where=test_labels >= CLASSES - 3)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500, help="steps of training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="networks a row of the table (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    data = [jnp.stack(arrays) for arrays in zip(*map(load, range(args.seeds)))]
    print(f"training images a class: {' '.join(map(str, COUNTS))}; {args.steps} steps of {BATCH}")
    print(f"balanced test accuracy, mean +- deviation over {args.seeds} seeds\n")
    print(f"{'loss':<30}  {'all classes':>15}  {'3 rarest':>15}")
    for name, loss in LOSSES.items():
        run = jax.jit(jax.vmap(functools.partial(accuracies, loss, steps=args.steps)))
        cells = [f"{np.mean(a):.3f} +- {np.std(a):.3f}" for a in run(jnp.arange(args.seeds), *data)]
        print(f"{name:<30}  {cells[0]:>15}  {cells[1]:>15}")


if __name__ == "__main__":
    main()
