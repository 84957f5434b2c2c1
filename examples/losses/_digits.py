"""Shared by the examples on handwritten digits: the images, a small network, training by Adam, the table."""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

CLASSES, TRAIN = 10, 1200


def load() -> tuple:
    """Images `[n, 64]` in [0, 1] and labels, 1200 to train on and 597 to test on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images[order] / 16, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


class Network(nnx.Module):
    """An image `[..., inputs]` to logits or an embedding `[..., outputs]`."""

    def __init__(self, rngs: nnx.Rngs, *, inputs: int = 64, width: int = 64, outputs: int = CLASSES):
        self.layer, self.head = nnx.Linear(inputs, width, rngs=rngs), nnx.Linear(width, outputs, rngs=rngs)

    def features(self, x):
        """The inputs of the last layer."""
        return jax.nn.relu(self.layer(x))

    def __call__(self, x):
        """The outputs."""
        return self.head(self.features(x))


def fit(key: jax.Array, make: Callable, loss: Callable, steps: int, learning_rate: float = 3e-3):
    """Trains `make(rngs)` to minimize the scalar `loss(model, key)`, a new key each step; returns the model."""
    init_key, order_key = jax.random.split(key)
    graph, params = nnx.split(make(nnx.Rngs(init_key)))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(state, key):
        params, opt_state = state
        gradient = jax.grad(lambda params: loss(nnx.merge(graph, params), key))(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(order_key, steps)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return nnx.merge(graph, params)


def arguments(description: str, steps: int) -> argparse.Namespace:
    """The flags `--steps` and `--seeds`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=steps, help="steps of training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="networks per row (%(default)s)")
    return parser.parse_args()


def print_table(args: argparse.Namespace, contestants: dict[str, Callable], evaluate: Callable) -> None:
    """Prints a row per contestant: mean and deviation, over the seeds, of the metrics of `evaluate(loss, key)`."""
    print(f"{args.steps} steps; mean +- deviation over {args.seeds} seeds")
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    names: list[str] = []

    def measure(loss, key):
        metrics = evaluate(loss, key)
        names[:] = metrics
        return list(metrics.values())

    for i, (name, loss) in enumerate(contestants.items()):
        metrics = jax.device_get(jax.jit(jax.vmap(functools.partial(measure, loss)))(keys))
        if i == 0:
            print(f"{'loss':44}" + "".join(f"{metric:>20}" for metric in names))
        cells = (f"{f'{m.mean():.4f} +- {m.std():.4f}':>20}" for m in metrics)
        print(f"{name:44}" + "".join(cells), flush=True)
