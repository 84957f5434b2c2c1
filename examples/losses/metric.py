"""Learns embeddings of handwritten digits with losses on cosines, and searches with them, beside plain softmax.

A small network is trained on the digits 0 to 6. Then each image of a set looks for its nearest neighbour, by cosine
of the embeddings, among the other images of that set. Recall@1 is how often the neighbour shows the same digit: once
for test images of the digits seen, once for test images of 7, 8 and 9, which no network has seen. Mean average
precision (MAP@R) asks for all images of the digit, not only the nearest.

  python examples/losses/metric.py --steps 400 --seeds 3
"""

import jax
import jax.numpy as jnp
import optax
from _digits import Network, arguments, fit, load, print_table
from flax import nnx

from jaxsoft import losses

SEEN = 7
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = load()


def plain_softmax(net, x, labels):
    """The baseline: logits are plain products, nothing is normalized."""
    return optax.softmax_cross_entropy_with_integer_labels(net(x) @ net.classes, labels)


def on_cosines(loss, **options):
    """A loss of cosines, with its options."""

    def f(net, x, labels):
        return loss(losses.cosine_logits(net(x), net.classes), labels, **options)

    return f


def sphereface2(net, x, labels):
    """SphereFace2 with its bias trained from the initial value that balances the pulls."""
    cosines = losses.cosine_logits(net(x), net.classes)
    bias = net.bias + losses.sphereface2_bias_init(SEEN, scale=SCALE)
    return 50 * losses.sphereface2_loss(cosines, labels, scale=SCALE, bias=bias)


def circle(net, x, labels):
    """Circle loss of class labels: one positive per example."""
    cosines = losses.cosine_logits(net(x), net.classes)
    return losses.circle_loss(cosines, labels[:, None], scale=80.0, margin=0.4)


def circle_pairs(net, x, labels):
    """Circle loss of the pairs within the batch: no class weights at all."""
    z = net(x)
    positive = labels[:, None] == labels
    cosines = losses.cosine_logits(z, z, transpose_weight=True)
    others = ~jnp.eye(len(labels), dtype=bool)
    return losses.circle_loss(cosines, positive, where=others, scale=80.0, margin=0.4)


def wrapped_cauchy(net, x, labels):
    """Wrapped Cauchy with concentration and scale trained."""
    cosines = losses.cosine_logits(net(x), net.classes)
    scale = jax.nn.softplus(net.scale) + 1
    return losses.wrapped_cauchy_loss(cosines, labels, net.concentration, scale=scale)


SCALE = 16.0  # of the cosines: seven classes need less than the thousands of a face recognizer
LOSSES = {
    "softmax cross-entropy (optax)": plain_softmax,
    "normalized softmax": on_cosines(losses.normalized_softmax_loss, scale=SCALE),
    "CosFace": on_cosines(losses.additive_margin_loss, scale=SCALE),
    "ArcFace": on_cosines(losses.additive_angular_margin_loss, scale=SCALE),
    "SphereFace2": sphereface2,
    "circle loss, classes": circle,
    "circle loss, pairs": circle_pairs,
    "wrapped Cauchy": wrapped_cauchy,
}


class Embedding(Network):
    """An image `[..., 64]` to an embedding `[..., 16]`, and the parameters of the losses."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs, outputs=16)
        self.classes = nnx.Param(jax.random.normal(rngs.params(), (16, SEEN)) / 4)
        self.concentration = nnx.Param(jnp.zeros(SEEN))
        self.scale, self.bias = nnx.Param(jnp.array(4.0)), nnx.Param(jnp.array(0.0))


def retrieve(z, labels):
    """Recall@1 and MAP@R of each vector among the others."""
    z = losses.l2_normalize(z)
    cosines = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, z @ z.T)
    hit = labels[jnp.argsort(-cosines, axis=1)] == labels[:, None]
    relevant = jnp.sum(labels[:, None] == labels, axis=1, keepdims=True) - 1
    rank = jnp.arange(1, len(z) + 1)
    precision = jnp.cumsum(hit, axis=1) / rank
    average = jnp.sum(jnp.where((rank <= relevant) & hit, precision, 0), axis=1) / relevant[:, 0]
    return hit[:, 0].mean(), average.mean()


def main() -> None:
    """Prints the table."""
    args = arguments(__doc__, steps=400)
    train = LABELS < SEEN
    images, labels = IMAGES[train], LABELS[train]
    tests = {
        name: (TEST_IMAGES[chosen], TEST_LABELS[chosen])
        for name, chosen in (("0-6", TEST_LABELS < SEEN), ("7-9", TEST_LABELS >= SEEN))
    }

    def evaluate(loss, key):
        def mean_loss(net, key):
            batch = jax.random.choice(key, len(labels), (70,), replace=False)
            return loss(net, images[batch], labels[batch]).mean()

        net = fit(key, Embedding, mean_loss, args.steps) if loss else Embedding(nnx.Rngs(key))
        metrics = {name: retrieve(net(x), y) for name, (x, y) in tests.items()}
        return {
            f"{metric}, {name}": m[i]
            for name, m in metrics.items()
            for i, metric in enumerate(("R@1", "MAP@R"))
        }

    print_table(args, {"no training at all": None, **LOSSES}, evaluate)


if __name__ == "__main__":
    main()
