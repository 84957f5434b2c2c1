"""Trains a small network on handwritten digits with any losses and any optimizer, beside the optax baseline.

Every row of the final table is a mean over three seeds, trained at once by `jax.vmap`. A part of the training
labels is wrong (`--label-noise`), which tells the losses apart; those of the test images are right.

  python examples/train_classifier.py --loss cross_entropy max_suppression_loss focal_loss --label-noise 0.3
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jaxsoft
from jaxsoft import losses, optimizers

CLASSES = 10
METRICS = {"accuracy": "test accuracy", "nll": "NLL", "ece": "ECE"}
OPTIMIZERS = {  # name: (learning rate -> optimizer, its default learning rate)
    "adamw": (optax.adamw, 3e-3),
    "lion_k": (optimizers.lion_k, 3e-4),
    "spam": (optimizers.spam, 3e-3),
    "stable_spam": (optimizers.stable_spam, 3e-3),
}


def takes_class_ids(loss) -> bool:
    """Whether `loss(logits, labels)` gives one value per row for integer labels."""
    logits, labels = jax.ShapeDtypeStruct((8, CLASSES), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    try:
        return jax.eval_shape(loss, logits, labels).shape == labels.shape
    except (AttributeError, TypeError, ValueError):
        return False


LOSSES = {name: getattr(losses, name) for name in losses.__all__ if takes_class_ids(getattr(losses, name))}


class Network(nnx.Module):
    """An image `[..., 64]` to logits `[..., 10]`."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.layer1, self.layer2 = nnx.Linear(64, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.head(jax.nn.relu(self.layer2(jax.nn.relu(self.layer1(x)))))


def load(label_noise: float) -> tuple:
    """Images and labels to train on, a part of these labels wrong; images and labels to test on."""
    random = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = random.permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    (train_images, test_images), (train_labels, test_labels) = (
        np.split(images, [1200]),
        np.split(labels, [1200]),
    )
    wrong = random.random(1200) < label_noise
    train_labels = (train_labels + wrong * random.integers(1, CLASSES, 1200)).astype(np.int32) % CLASSES
    return tuple(map(jnp.asarray, (train_images, train_labels, test_images, test_labels)))


def train(seed, loss, optimizer, images, labels, test_images, args: argparse.Namespace):
    """Trains one network and returns its logits for the test images."""
    init_key, order_key = jax.random.split(jax.random.key(seed))
    graph, params = nnx.split(Network(args.width, nnx.Rngs(init_key)))

    def step(state, batch):
        def mean_loss(params):
            return loss(nnx.merge(graph, params)(images[batch]), labels[batch]).mean()

        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(state, key):
        order = jax.random.permutation(key, len(labels))
        batches = order[: len(labels) // args.batch * args.batch].reshape(-1, args.batch)
        return jax.lax.scan(step, state, batches)

    keys = jax.random.split(order_key, args.epochs)
    (params, _), _ = jax.lax.scan(epoch, (params, optimizer.init(params)), keys)
    return nnx.merge(graph, params)(test_images)


def measure(logits, labels) -> dict:
    """Accuracy, negative log-likelihood, and expected calibration error in 15 bins of equal width."""
    probabilities = jaxsoft.softmax(logits)
    confidence, hit = probabilities.max(-1), logits.argmax(-1) == labels
    bins = jax.nn.one_hot(jnp.minimum((confidence * 15).astype(int), 14), 15)
    return {
        "accuracy": hit.mean(),
        "nll": losses.cross_entropy(logits, labels).mean(),
        "ece": jnp.abs((hit - confidence) @ bins).sum() / len(labels),
    }


def make_optimizer(name: str, rate: float | None, args: argparse.Namespace) -> optax.GradientTransformation:
    make, default_rate = OPTIMIZERS[name]
    steps = args.epochs * (1200 // args.batch)
    return make(optax.cosine_decay_schedule(default_rate if rate is None else rate, steps), weight_decay=0.01)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        """Exits with the message alone, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float):
    """A type for a flag: a number in a range."""
    wanted = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag, kind, default, help, **options):
        help += "" if default is None else " (%(default)s)"
        parser.add_argument(flag, type=kind, default=default, help=help, **options)

    add("--loss", str, ["cross_entropy"], "one or more losses", choices=LOSSES, nargs="+", metavar="LOSS")
    add("--optimizer", str, "stable_spam", "optimizer", choices=OPTIMIZERS)
    add(
        "--learning-rate",
        number(float, 0.0, 10.0),
        None,
        "initial rate; by default the optimizer's in OPTIMIZERS",
    )
    add("--label-noise", number(float, 0.0, 1.0), 0.2, "part of the training labels that is wrong")
    add("--epochs", number(int, 1, 10_000), 20, "passes over the 1200 training images")
    add("--batch", number(int, 1, 1200), 50, "images a step")
    add("--width", number(int, 1, 10_000), 64, "features of the two hidden layers")
    add("--seeds", number(int, 1, 1000), 3, "networks a row of the table")
    add("--out", pathlib.Path, "runs", "folder of train_classifier.json")
    parser.epilog = f"losses: {', '.join(LOSSES)}"
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    train_images, train_labels, test_images, test_labels = load(args.label_noise)
    baseline = optax.softmax_cross_entropy_with_integer_labels
    rows = [("baseline", baseline, make_optimizer("adamw", None, args))]
    ours = make_optimizer(args.optimizer, args.learning_rate, args)
    rows += [(name, LOSSES[name], ours) for name in dict.fromkeys(args.loss)]

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def evaluate(seeds, loss, optimizer):
        def one(seed):
            logits = train(seed, loss, optimizer, train_images, train_labels, test_images, args)
            return measure(logits, test_labels)

        return jax.vmap(one)(seeds)

    print(f"{args.label_noise:.0%} of the training labels wrong; mean +- deviation over {args.seeds} seeds")
    print(f"optimizer: {args.optimizer}; of the baseline, adamw")
    table = Table("loss", *METRICS.values(), box=box.SIMPLE_HEAD)
    results = {}
    for name, loss, optimizer in rows:
        metrics = jax.device_get(evaluate(jnp.arange(args.seeds), loss, optimizer))
        results[name] = {metric: metrics[metric].tolist() for metric in METRICS}
        table.add_row(name, *(f"{metrics[m].mean():.3f} +- {metrics[m].std():.3f}" for m in METRICS))
    Console(highlight=False).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train_classifier.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
