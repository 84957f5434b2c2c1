"""Losses on cosines: worked numbers, limits, closed forms of gradients, and what the conformance table leaves out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close, kinds, logits_of

import jaxsoft
from jaxsoft import losses
from jaxsoft.losses import (
    additive_angular_margin_loss,
    additive_margin_loss,
    circle_loss,
    cosine_logits,
    l2_normalize,
    normalized_softmax_loss,
    sphereface2_bias_init,
    sphereface2_loss,
    wrapped_cauchy_logits,
    wrapped_cauchy_loss,
)

COSINES = np.array([[0.7, 0.3, -0.1, 0.2]])
Y = jnp.array([0])
RNG = np.random.default_rng(0)


def both(loss, x, *args, kind="dense", **options):
    """Losses, and the gradient of their sum with non-uniform weights divided out, row by row."""
    x = jnp.asarray(x)
    g = jnp.arange(1.0, len(x) + 1)

    def f(x):
        values, pullback = jax.vjp(lambda x: loss(logits_of(x, kind), *args, **options), x)
        return values, pullback(g)[0] / g[:, None]

    return jax.jit(f)(x)


def check_gradient(f, *args):
    """The gradient against finite differences along a random direction, with a non-uniform cotangent."""
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=jnp.shape(a))), args)

    def contracted(t):
        out = f(*jax.tree.map(lambda a, d: a + t * d, args, direction))
        return jnp.sum(jnp.asarray(np.random.default_rng(3).normal(size=out.shape)) * out)

    value_and_slope = jax.jit(jax.value_and_grad(contracted))
    numeric = (value_and_slope(1e-5)[0] - value_and_slope(-1e-5)[0]) / 2e-5
    np.testing.assert_allclose(value_and_slope(0.0)[1], numeric, rtol=1e-6, atol=1e-8)


# --- worked numbers --------------------------------------------------------------------------------------


@kinds
def test_margins(kind, x64):
    x = logits_of(COSINES, kind)
    close(normalized_softmax_loss(x, Y, scale=8.0), [0.058966])
    close(additive_margin_loss(x, Y, scale=8.0, margin=0.35), [0.692566])
    close(additive_angular_margin_loss(x, Y, scale=8.0), [1.052660])
    close(additive_angular_margin_loss(x, Y), [1.951411])
    close(additive_margin_loss(x, Y, scale=8.0, where=jnp.array([True, False, True, False])), [0.026957])
    # Past pi - m: -0.95 - 0.5 sin(0.5) for the label.
    far = COSINES.copy()
    far[0, 0] = -0.95
    others = np.log(np.exp(8 * far[0, 1:]).sum())
    close(
        additive_angular_margin_loss(logits_of(far, kind), Y, scale=8.0),
        np.logaddexp(0, others + 8 * 1.189713),
        1e-5,
    )
    close(-0.95 - 0.5 * np.sin(0.5), -1.189713)
    easy = additive_angular_margin_loss(logits_of(far, kind), Y, scale=8.0, easy_margin=True)
    close(easy, normalized_softmax_loss(jnp.asarray(far), Y, scale=8.0), 1e-12)


@kinds
def test_wrapped_cauchy(kind, x64):
    g = jnp.full(4, -1.0)
    close(
        wrapped_cauchy_logits(jnp.asarray(COSINES), g, scale=1.0), [[0.212189, 0.162074, 0.131108, 0.153037]]
    )
    scale = math.log(2) + 1
    close(wrapped_cauchy_loss(logits_of(COSINES, kind), Y, g, scale=scale), [1.307000])
    close(wrapped_cauchy_loss(logits_of(COSINES, kind), Y, g), [4.000740e-06], 1e-11)
    x = jnp.array([0.9, 0.1, -0.5])
    for gamma, density in (
        (0.5, [0.341046, 0.103797, 0.068209]),
        (0.731059, [0.339044, 0.053374, 0.032706]),
        (0.268941, [0.250994, 0.144956, 0.110077]),
    ):
        g = jnp.full(3, math.log(gamma / (1 - gamma)))
        close(wrapped_cauchy_logits(x, g, scale=1.0), density)
    p = jaxsoft.softmax(wrapped_cauchy_logits(x, jnp.zeros(3), scale=1.693147))
    close(p, [0.434927, 0.291046, 0.274027])


@kinds
def test_sphereface2(kind, x64):
    close(sphereface2_bias_init(4), 15.252763)
    x = logits_of(COSINES, kind)
    for bias in (None, sphereface2_bias_init(4)):
        close(sphereface2_loss(x, Y, bias=bias), [0.164742])
        close(50 * sphereface2_loss(x, Y, bias=bias), [8.237104])
    _, g = both(sphereface2_loss, COSINES, Y, kind=kind)
    a = np.array([8.382763, 13.222763, -1.457237, 8.532763])
    slope = 40 * 3 * ((COSINES[0] + 1) / 2) ** 2  # of s g(c)
    weight = np.array([-0.7, 0.3, 0.3, 0.3]) / 40
    pull = 1 / (1 + np.exp(-np.array([-1, 1, 1, 1]) * a))
    close(g[0], weight * pull * slope)
    value, g = both(sphereface2_loss, COSINES, Y, kind=kind, straight_through=True)
    close(value, [0.164742])
    close(g[0], weight * pull * 40)


@kinds
def test_circle(kind, x64):
    x = np.array([[0.8, 0.6, 0.4, 0.1, -0.3]])
    for labels in (
        jnp.array([[0, 1]]),
        jnp.array([[1, -100, 0]]),
        jnp.array([[True, True, False, False, False]]),
    ):
        value, g = both(circle_loss, x, labels, kind=kind, scale=8.0)
        close(value, [2.532094])
        close(circle_loss(logits_of(x, kind), labels, scale=80.0, margin=0.4), [0.695031])
        # sigmoid(total) softmax(weights) gamma alpha, the weights alpha constant
        alpha = np.concatenate([1.25 - x[0, :2], np.maximum(x[0, 2:] + 0.25, 0)])
        scores = 8 * alpha * np.concatenate([-(x[0, :2] - 0.75), x[0, 2:] - 0.25])
        p, n = jax.nn.softmax(scores[:2]), jax.nn.softmax(scores[2:])
        close(g[0], jax.nn.sigmoid(np.log(np.expm1(2.532094))) * np.concatenate([-p, n]) * 8 * alpha, 2e-6)
    # Through the weights as well: finite differences (a law of the table), and another gradient.
    through = both(circle_loss, x, labels, kind=kind, scale=8.0, stop_weight_gradient=False)
    close(through[0], value, 1e-12)
    assert np.max(np.abs(through[1] - g)) > 0.1


# --- limits ----------------------------------------------------------------------------------------------


@pytest.fixture
def example(x64):
    rng = np.random.default_rng(1)
    return jnp.asarray(np.tanh(rng.normal(size=(5, 7)))), jnp.asarray(rng.integers(0, 7, 5))


def test_without_a_margin_all_are_cross_entropy(example):
    x, y = example
    expected = both(lambda x: losses.cross_entropy(20 * x, y), x)
    for got in (
        both(normalized_softmax_loss, x, y),
        both(normalized_softmax_loss, x, y, scale=jnp.float64(20)),
        both(additive_margin_loss, x, y, scale=20.0, margin=0.0),
        both(additive_angular_margin_loss, x, y, scale=20.0, margin=0.0),
        both(additive_angular_margin_loss, x, y, scale=20.0, margin=0.0, easy_margin=True),
    ):
        close(got[0], expected[0], 1e-12)
        close(got[1], expected[1], 1e-11)


def test_wrapped_cauchy_is_the_cross_entropy_of_its_logits(example):
    x, y = example
    g = jnp.linspace(-2, 2, 7)

    def streamed(x, g, scale):
        return jnp.cos(wrapped_cauchy_loss(logits_of(x, "streamed"), y, g, scale=scale)).sum()

    def stored(x, g, scale):
        return jnp.cos(losses.cross_entropy(wrapped_cauchy_logits(x, g, scale=scale), y)).sum()

    at = (x, g, jnp.float64(5.0))
    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*at) for f in (streamed, stored))
    jax.tree.map(lambda a, b: close(a, b, 1e-11), got, expected)
    moved = wrapped_cauchy_logits(x.T, g, axis=0)
    close(moved.T, wrapped_cauchy_logits(x, g), 1e-12)
    check_gradient(lambda x, g: wrapped_cauchy_logits(x, g, scale=2.0), x, g)
    assert wrapped_cauchy_logits(x.at[0, 0].set(-jnp.inf), g)[0, 0] == -jnp.inf
    assert wrapped_cauchy_logits(x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)).dtype == jnp.float32
    # A class as concentrated as can be: finite, with a finite gradient at its centre.
    value, slope = jax.value_and_grad(lambda c: wrapped_cauchy_logits(c, jnp.full(1, 50.0), scale=1.0)[0])(
        jnp.ones(1)
    )
    close(value, (1 + (1 - 1e-4)) / (2 * np.pi * 1e-4), 1e-6)
    assert np.isfinite(slope).all()


def test_gradient_of_the_angular_margin(example):
    """sin(theta + m) / sin(theta) times that of the label's score; bounded where the cosine is 1."""
    x, y = example
    cosine = jnp.take_along_axis(x, y[:, None], 1)
    theta = jnp.arccos(cosine)
    _, g = both(additive_angular_margin_loss, x, y, scale=4.0)
    assert np.any(theta < np.pi - 0.5) and np.any(theta > np.pi - 0.5)
    turns = theta < np.pi - 0.5
    target = jnp.where(turns, jnp.cos(theta + 0.5), cosine - 0.5 * np.sin(0.5))
    edited = jnp.where(jax.nn.one_hot(y, 7) > 0, target, x)
    p = jax.nn.softmax(4 * edited)
    p_y = jnp.take_along_axis(p, y[:, None], 1)
    slope = 4 * (p_y - 1) * jnp.where(turns, jnp.sin(theta + 0.5) / jnp.sin(theta), 1)
    close(g, jnp.where(jax.nn.one_hot(y, 7) > 0, slope, 4 * p), 1e-10)
    for c in (1.0, -1.0, 1 - 1e-9, 1.0000001):
        _, g = both(additive_angular_margin_loss, jnp.array([[c, 0.2]]), Y)
        assert np.isfinite(g).all()


def test_initial_bias_balances_the_pulls(x64):
    for classes in (2, 3, 4, 100, 10**6):
        for w in (0.3, 0.7, 0.99):
            b = sphereface2_bias_init(classes, scale=30.0, margin=0.3, positive_weight=w)
            g = 2 * 0.5**3 - 1
            positive = w * jax.nn.sigmoid(-(30 * (g - 0.3) + b))
            negative = (1 - w) * (classes - 1) * jax.nn.sigmoid(30 * (g + 0.3) + b)
            np.testing.assert_allclose(positive, negative, rtol=1e-9)
    with float64():
        exact = [float(sphereface2_bias_init(n)) for n in (2, 10, 10**6)]
    close([sphereface2_bias_init(n) for n in (2, 10, 10**6)], exact, 1e-5)


def test_the_bias_of_sphereface2_is_trained(example):
    x, y = example
    f = lambda b, s, m: sphereface2_loss(logits_of(x, "streamed"), y, bias=b, scale=s, margin=m)
    check_gradient(f, *map(jnp.float64, (0.3, 5.0, 0.2)))


# --- cosines ---------------------------------------------------------------------------------------------


def test_cosine_logits(x64):
    h, w = jnp.asarray(RNG.normal(size=(2, 3, 4))), jnp.asarray(RNG.normal(size=(4, 6)))
    expected = (h / np.linalg.norm(h, axis=-1, keepdims=True)) @ (w / np.linalg.norm(w, axis=0))
    close(cosine_logits(h, w).dense(), expected, 1e-14)
    close(cosine_logits(h, w.T, transpose_weight=True, scale=3.0, block_size=4).dense(), 3 * expected, 1e-14)
    y = jnp.asarray(RNG.integers(0, 6, (2, 3)))
    f = lambda h, w, dense: jnp.sin(
        additive_angular_margin_loss(
            cosine_logits(h, w).dense() if dense else cosine_logits(h, w, block_size=4), y
        )
    ).sum()
    for dense in (False, True):
        check_gradient(lambda h, w, d=dense: f(h, w, d), h, w)
    # Features of any length; a gradient along the sphere.
    close(cosine_logits(7 * h, w / 3).dense(), expected, 1e-14)
    g = jax.jit(jax.grad(lambda h: f(h, w, False)))(h)
    close(jnp.sum(g * h, -1), np.zeros((2, 3)), 1e-12)


def test_normalize():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e-8, 4e-8], [3e15, 4e15]])
    close(l2_normalize(x), [[0.6, 0.8], [0, 0], [0.03, 0.04], [0.6, 0.8]])
    g = jax.grad(lambda x: jnp.sum(jnp.arange(8.0).reshape(4, 2) * l2_normalize(x)))(x)
    assert np.all(g[1] == 0) and np.isfinite(g).all()
    close(l2_normalize(x.T, axis=0), l2_normalize(x).T, 0)
    half = jnp.array([300.0, 400.0], jnp.float16)  # whose squares overflow in half precision
    assert l2_normalize(half).dtype == jnp.float16
    close(l2_normalize(half), [0.6, 0.8], 1e-3)
    with float64():
        check_gradient(l2_normalize, jnp.asarray(RNG.normal(size=(3, 4))))
    # A feature vector of zeros is at cosine 0 with every class, and moves nothing.
    loss = lambda h: normalized_softmax_loss(cosine_logits(h, jnp.eye(2, 3)), jnp.array([1])).sum()
    value, g = jax.value_and_grad(loss)(jnp.zeros((1, 2)))
    close(value, np.log(3))
    close(g, np.zeros((1, 2)), 0)


# --- masks and edges that the table does not reach --------------------------------------------------------

CALLS = {
    "normalized": (normalized_softmax_loss, {}, False),
    "cosface": (additive_margin_loss, {}, False),
    "arcface": (additive_angular_margin_loss, {}, False),
    "cauchy": (wrapped_cauchy_loss, dict(class_concentration=jnp.zeros(4)), False),
    "sphereface2": (sphereface2_loss, {}, False),
    "sphereface2 straight": (sphereface2_loss, dict(straight_through=True), False),
    "circle": (circle_loss, {}, True),
}


@pytest.mark.parametrize("name", CALLS)
@kinds
def test_edges_with_default_options(name, kind):
    loss, options, many = CALLS[name]
    x = jnp.asarray(np.tanh(RNG.normal(size=(5, 4))), jnp.float32)
    x = x.at[1].set(jnp.nan).at[2].set(jnp.array([1.0, -1.0, 1.0, 0.0]))
    labels = jnp.array([0, -100, 0, 1, 2])
    where = jnp.ones((5, 4), bool).at[3, 1].set(False).at[4].set(False)
    if kind == "streamed":
        x = x.at[1].set(0)  # a NaN among logits of an identity is one in the weight, which all rows meet

    def f(x):
        return loss(logits_of(x, kind), labels[:, None] if many else labels, where=where, **options)

    values, pullback = jax.vjp(f, x)
    assert np.all(np.isfinite(values[jnp.array([0, 2])])) and np.all(values[jnp.array([0, 2])] >= 0)
    np.testing.assert_array_equal(values[jnp.array([1, 3, 4])], [0, np.inf, 0])
    (g,) = pullback(jnp.array([1.0, 2.0, 3.0, 0.0, 5.0]))
    assert np.isfinite(g).all() and np.all(g[jnp.array([1, 4])] == 0)
    assert np.all(np.any(g[jnp.array([0, 2])] != 0, axis=1))


def test_circle_needs_positives_and_negatives():
    x = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
    for labels in (
        jnp.ones((2, 3), bool),
        jnp.zeros((2, 3), bool),
        jnp.array([[0, 1, 2]] * 2),
        jnp.full((2, 1), -100),
    ):
        value, g = both(circle_loss, x, labels)
        close(value, [0, 0], 0)
        close(g, np.zeros((2, 3)), 0)
    spoiled = x.at[0].set(jnp.nan)
    where = jnp.array([[False], [True]])
    value, g = both(circle_loss, spoiled, jnp.array([[True, False, False]] * 2), where=where)
    assert value[0] == 0 and value[1] > 0 and np.all(g[0] == 0) and np.isfinite(g).all()


def test_half_precision_scales_in_float32():
    """A scale of 64 in bfloat16 would round the logits to quarters."""
    x = jnp.asarray(np.tanh(RNG.normal(size=(4, 6))), jnp.bfloat16)
    y = jnp.arange(4)
    with float64():
        exact = np.asarray(additive_margin_loss(jnp.asarray(np.asarray(x, np.float64)), y))
    value = additive_margin_loss(x, y)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=3e-6, atol=3e-6)


# --- independent implementations ---------------------------------------------------------------------------


def test_pytorch_metric_learning(x64):
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    n, d, classes = 12, 5, 6
    h, w, y = RNG.normal(size=(n, d)), RNG.normal(size=(d, classes)), RNG.integers(0, classes, n)

    def theirs(peer):
        if hasattr(peer, "W"):
            peer.W = torch.nn.Parameter(torch.tensor(w))
        points = torch.tensor(h, requires_grad=True)
        value = peer(points, torch.tensor(y))
        value.backward()
        return value.item(), points.grad.numpy()

    def check(loss, peer):
        value, g = jax.jit(jax.value_and_grad(lambda h: loss(h).mean()))(jnp.asarray(h))
        expected = theirs(peer)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)  # their margin and clips are float32's
        np.testing.assert_allclose(g, expected[1], rtol=1e-5, atol=1e-7)

    labels = jnp.asarray(y)
    cosines = lambda h: cosine_logits(h, jnp.asarray(w), block_size=4)
    check(lambda h: normalized_softmax_loss(cosines(h), labels), peers.NormalizedSoftmaxLoss(classes, d))
    check(lambda h: additive_margin_loss(cosines(h), labels), peers.CosFaceLoss(classes, d))
    angle = math.radians(28.6)
    check(
        lambda h: additive_angular_margin_loss(cosines(h), labels, margin=angle),
        peers.ArcFaceLoss(classes, d),
    )
    same, others = jnp.asarray(y[:, None] == y), ~jnp.eye(n, dtype=bool)
    check(
        lambda h: circle_loss(
            cosine_logits(h, h, transpose_weight=True), same, where=others, scale=80.0, margin=0.4
        ),
        peers.CircleLoss(reducer=reducers.MeanReducer()),
    )


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: l2_normalize(np.ones(3, int)), TypeError, "x .* floating"),
        (lambda: l2_normalize(np.ones(3, np.float32), axis=1), ValueError, "axis .* got 1"),
        (lambda: cosine_logits(np.ones((2, 3)), np.ones((4, 5))), ValueError, "share a feature axis"),
        (lambda: cosine_logits(np.ones((2, 3)), np.ones((5, 3))), ValueError, "transpose_weight=True"),
        (lambda: cosine_logits(np.ones((2, 3)), np.ones(3)), ValueError, "weight"),
        (lambda: cosine_logits([1.0], np.ones((1, 3))), TypeError, "features .* floating"),
        (lambda: cosine_logits(np.ones((2, 3)), np.ones((3, 4)), scale="a"), TypeError, "scale"),
        (lambda: sphereface2_bias_init(1), ValueError, "num_classes .* >= 2"),
        (lambda: sphereface2_bias_init(3.0), TypeError, "num_classes .* integer"),
        (lambda: sphereface2_bias_init(3, margin=-1), ValueError, "margin .* >= 0"),
        (
            lambda: wrapped_cauchy_logits(np.ones((2, 3)), np.ones(2)),
            ValueError,
            "class_concentration .* got shape",
        ),
        (lambda: wrapped_cauchy_logits(np.ones((2, 3)), np.ones(3), scale=0), ValueError, "scale .* > 0"),
        (
            lambda: wrapped_cauchy_logits(cosine_logits(np.ones((2, 3)), np.ones((3, 4))), np.ones(4)),
            TypeError,
            r"logits\.dense\(\)",
        ),
        (
            lambda: wrapped_cauchy_loss(np.ones((2, 3)), jnp.zeros(2, int), np.ones(2)),
            ValueError,
            "class_concentration",
        ),
    ],
)
def test_bad_arguments(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
