"""Segments digits on a noisy canvas with overlap losses, beside the cross-entropy of each pixel.

Two digits of scikit-learn lie on a canvas of 20 x 20 pixels under noise; every pixel is to be told whether it belongs
to a digit. Three annotators labelled the training images, some of them a pixel off: soft labels are the mean of their
votes, hard labels the majority. The test images have the true labels.

  python examples/losses/segmentation.py --steps 150 --seeds 3
"""

import argparse
import functools

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from jaxsoft import losses

SIZE, CLASSES, TRAIN, TEST, BATCH = 20, 2, 256, 256, 16


def canvases(random, digits, count):
    """Noisy canvases `[count, SIZE, SIZE, 1]` with two digits each, and the class of every pixel: 1 for digits."""
    canvas = np.zeros((count, SIZE, SIZE), np.float32)
    for image in canvas:
        for digit in digits[random.integers(len(digits), size=2)]:
            top, left = random.integers(0, SIZE - 8 + 1, 2)
            box = image[top : top + 8, left : left + 8]
            np.maximum(box, digit, out=box)
    noisy = canvas + random.normal(0, 0.4, canvas.shape)
    return noisy[..., None].astype(np.float32), (canvas > 0.3).astype(np.int32)


def annotate(random, classes, annotators=3):
    """The mean of the annotators' votes: each draws the digits shifted by a pixel up, down, left, right, or not."""
    votes = np.zeros((*classes.shape, CLASSES), np.float32)
    for _ in range(annotators):
        shifts = random.choice([-1, 0, 1], (len(classes), 2), p=[0.2, 0.6, 0.2])
        drawn = np.stack([np.roll(c, shift, (0, 1)) for c, shift in zip(classes, shifts)])
        votes += np.eye(CLASSES, dtype=np.float32)[drawn]
    return votes / annotators


def load():
    """Training canvases and soft labels, test canvases and true classes; no digit is in both."""
    random = np.random.default_rng(0)
    digits = random.permutation(load_digits().images.astype(np.float32) / 16)
    train_x, train_classes = canvases(random, digits[:1200], TRAIN)
    test_x, test_classes = canvases(random, digits[1200:], TEST)
    return train_x, annotate(random, train_classes), test_x, test_classes


class Network(nnx.Module):
    """Canvases `[..., SIZE, SIZE, 1]` to logits of each pixel."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.layer1 = nnx.Conv(1, width, (5, 5), rngs=rngs)
        self.layer2 = nnx.Conv(width, width, (5, 5), rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.head(jax.nn.relu(self.layer2(jax.nn.relu(self.layer1(x)))))


def hard(votes):
    """The class most annotators voted for."""
    return votes.argmax(-1)


def cross_entropy(logits, votes):
    return optax.softmax_cross_entropy(logits, votes).mean()


def hard_cross_entropy(logits, votes):
    return optax.softmax_cross_entropy_with_integer_labels(logits, hard(votes)).mean()


def with_cross_entropy(loss, weight=0.5):
    """Half of an overlap loss and half of a cross-entropy, the usual way to train with it."""
    return lambda logits, votes: weight * loss(logits, votes) + (1 - weight) * cross_entropy(logits, votes)


LOSSES = {
    "optax cross-entropy, hard": hard_cross_entropy,
    "optax cross-entropy, soft": cross_entropy,
    "Jaccard, hard": lambda logits, votes: losses.jaccard_metric_loss(logits, hard(votes)),
    "Jaccard, soft": losses.jaccard_metric_loss,
    "Dice, soft": losses.dice_semimetric_loss,
    "Tversky .3 .7, soft": losses.tversky_loss,
    "Jaccard + CE, soft": with_cross_entropy(losses.jaccard_metric_loss),
    "Dice + CE, soft": with_cross_entropy(losses.dice_semimetric_loss),
}


def trainer(loss, x, votes, args):
    """A function from a seed to a trained network."""
    optimizer = optax.adam(optax.cosine_decay_schedule(args.learning_rate, args.steps))

    @functools.partial(jax.jit, static_argnums=0)
    def step(graph, state, x, votes):
        params, opt_state = state
        gradient = jax.grad(lambda params: loss(nnx.merge(graph, params)(x), votes))(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def train(seed):
        graph, params = nnx.split(Network(args.width, nnx.Rngs(seed)))
        random = np.random.default_rng(seed)
        state = params, optimizer.init(params)
        for _ in range(args.steps):
            batch = random.choice(len(x), BATCH, replace=False)
            state = step(graph, state, x[batch], votes[batch])
        return nnx.merge(graph, state[0])

    return train


def measure(predicted, classes):
    """Means over the classes of intersection over union and Dice score, and the share of pixels that are right."""
    p, t = (np.eye(CLASSES)[a.reshape(-1)] for a in (predicted, classes))
    both, sizes = (p * t).sum(0), p.sum(0) + t.sum(0)
    return (both / (sizes - both)).mean(), (2 * both / sizes).mean(), (predicted == classes).mean()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="steps of each network (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="networks per row of the table (%(default)s)")
    parser.add_argument("--width", type=int, default=8, help="channels (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="initial rate (%(default)s)")
    args = parser.parse_args()
    train_x, votes, test_x, test_classes = load()

    print(f"{args.steps} steps; mean and standard deviation over {args.seeds} seeds, on {TEST} test images\n")
    print(f"{'loss':28} {'mean IoU':>15} {'mean Dice':>15} {'pixel accuracy':>15}")
    for name, loss in LOSSES.items():
        train = trainer(loss, train_x, votes, args)
        predictions = (train(seed)(test_x).argmax(-1) for seed in range(args.seeds))
        scores = [measure(np.asarray(predicted), test_classes) for predicted in predictions]
        cells = (f"{m:.3f} +- {s:.3f}" for m, s in zip(np.mean(scores, axis=0), np.std(scores, axis=0)))
        print(f"{name:28} " + " ".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
