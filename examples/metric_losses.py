"""Learns embeddings of handwritten digits with losses on cosines, and searches with them, beside plain softmax.

A small network is trained on the digits 0 to 6. Then each image of a set looks for its nearest neighbour, by cosine
of the embeddings, among the other images of that set. Recall@1 is how often the neighbour shows the same digit: once
for test images of the digits seen, once for all images of 7, 8 and 9, which no network has seen. Mean average
precision (MAP@R) asks for all images of the digit, not only the nearest.

  python examples/metric_losses.py --steps 1000 --seeds 5
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

SEEN = 7
BATCH = 70


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
    """Circle loss of class labels: one positive an example."""
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


class Network(nnx.Module):
    """An image `[..., 64]` to an embedding `[..., 16]`, and the parameters of the losses."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer1, self.layer2 = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)
        self.classes = nnx.Param(jax.random.normal(rngs.params(), (16, SEEN)) / 4)
        self.concentration = nnx.Param(jnp.zeros(SEEN))
        self.scale, self.bias = nnx.Param(jnp.array(4.0)), nnx.Param(jnp.array(0.0))

    def __call__(self, x):
        """The embedding."""
        return self.layer2(jax.nn.relu(self.layer1(x)))


def load():
    """Images to train on, test images of the same digits, and images of the other digits, each with labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    seen = labels < SEEN
    x, y = images[seen], labels[seen]
    return (x[:800], y[:800]), (x[800:], y[800:]), (images[~seen], labels[~seen])


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


@jax.jit
@jax.vmap
def initialize(seed):
    """The parameters of one network a seed."""
    return nnx.state(Network(nnx.Rngs(jax.random.key(seed))))


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0, None, None))
def train(graph, loss, params, batches, images, labels):
    """Trains one network a seed on batches of images, given by their indices; returns the parameters."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, len(batches)))

    def step(state, batch):
        def mean_loss(params):
            return loss(nnx.merge(graph, params), images[batch], labels[batch]).mean()

        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, None))
def measure(graph, params, tests):
    """Recall@1 and MAP@R for each set of test images."""
    net = nnx.merge(graph, params)
    return jnp.stack([m for images, labels in tests for m in retrieve(net(images), labels)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="batches of 70 images (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="networks a row of the table (%(default)s)")
    args = parser.parse_args()
    (images, labels), *tests = load()
    random = np.random.default_rng(1)
    batches = np.stack([random.permutation(len(labels))[:BATCH] for _ in range(args.seeds * args.steps)])
    batches = batches.reshape(args.seeds, args.steps, BATCH)
    start, graph = initialize(jnp.arange(args.seeds)), nnx.graphdef(Network(nnx.Rngs(0)))
    print(f"mean +- deviation over {args.seeds} seeds, in %, after {args.steps} steps on the digits 0 to 6")
    print(f"{'':30}{'digits 0-6, new images':^34}{'digits 7-9, never seen':^34}")
    print(f"{'loss':30}" + f"{'recall@1':>16}{'MAP@R':>16}  " * 2)

    def report(name, params):
        values = 100 * np.asarray(measure(graph, params, tests))
        cells = [f"{m:8.2f} +- {d:4.2f}" for m, d in zip(values.mean(0), values.std(0))]
        print(f"{name:30}" + "".join(f"{c:>16}" + "  " * (i % 2) for i, c in enumerate(cells)), flush=True)

    report("no training at all", start)
    for name, loss in LOSSES.items():
        report(name, train(graph, loss, start, batches, images, labels))


if __name__ == "__main__":
    main()
