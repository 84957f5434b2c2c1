"""Trains a small network on handwritten digits with alternatives to softmax cross-entropy, optax's beside them.

Every row of the final table is a mean over some seeds, trained at once by `jax.vmap`; all losses share the optimizer
and its learning rate, which suits the first one.

  python examples/alternative_losses.py --steps 600 --seeds 3
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

CLASSES, TRAIN, BATCH = 10, 1200, 50
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
SCORES = {
    "spherical_softmax_cross_entropy": jnp.square
}  # what a prediction is the largest of, if not the logits


class Network(nnx.Module):
    """An image `[..., 64]` to logits `[..., 10]`."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer, self.head = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.head(jax.nn.relu(self.layer(x)))


def load() -> tuple:
    """Images and labels to train on, and to test on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images[order] / 16, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def accuracy(seeds, loss, score, steps, images, labels, test_images, test_labels):
    """Trains one network a seed; its accuracy, and the part of the training images whose gradient has become 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def one(seed):
        init_key, order_key = jax.random.split(jax.random.key(seed))
        graph, params = nnx.split(Network(nnx.Rngs(init_key)))

        def step(state, key):
            batch = jax.random.randint(key, (BATCH,), 0, TRAIN)

            def mean_loss(params):
                return loss(nnx.merge(graph, params)(images[batch]), labels[batch]).mean()

            params, opt_state = state
            updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        keys = jax.random.split(order_key, steps)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        network = nnx.merge(graph, params)
        hits = jnp.argmax(score(network(test_images)), axis=-1) == test_labels
        gradient = jax.grad(lambda x: loss(x, labels).sum())(network(images))
        return hits.mean(), jnp.all(gradient == 0, axis=-1).mean()

    return jax.vmap(one)(seeds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="steps of 50 images (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="networks a row (%(default)s)")
    args = parser.parse_args()
    data = load()
    print(f"{args.steps} steps; mean +- deviation over {args.seeds} seeds")
    print(f"{'loss':34} {'test accuracy':>16} {'examples without gradient':>26}")
    for name, loss in LOSSES.items():
        score = SCORES.get(name, lambda x: x)
        hits, fitted = jax.device_get(accuracy(jnp.arange(args.seeds), loss, score, args.steps, *data))
        print(f"{name:34} {hits.mean():7.4f} +- {hits.std():.4f} {fitted.mean():26.1%}", flush=True)


if __name__ == "__main__":
    main()
