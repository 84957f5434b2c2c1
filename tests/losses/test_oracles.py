"""The same numbers as torch, optax and scipy, in values and gradients, with non-uniform cotangents."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from helpers import logits_of

import jaxsoft
from jaxsoft import losses, rows

pytestmark = pytest.mark.usefixtures("x64")
N, C, BLOCK = 6, 9, 4
IGNORED = np.array([False, True, False, False, True, False])
dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])
kinds = pytest.mark.parametrize(
    ("kind", "dtype"),
    [("dense", np.float64), ("streamed", np.float64), ("streamed", np.float32)],
    ids=["dense-f64", "streamed-f64", "streamed-f32"],
)
few = pytest.mark.parametrize(
    ("kind", "dtype"), [("streamed", np.float64), ("dense", np.float32)], ids=["streamed-f64", "dense-f32"]
)
both = pytest.mark.parametrize(
    ("kind", "dtype"), [("dense", np.float64), ("streamed", np.float32)], ids=["dense-f64", "streamed-f32"]
)


def tolerance(dtype):
    """A few units in the last place, of sums of ten terms of size up to 10."""
    return dict(rtol=1e-12, atol=1e-12) if dtype == np.float64 else dict(rtol=3e-6, atol=3e-6)


def example(dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(N, C)) * 3).astype(dtype)
    labels = rng.integers(0, C, N)
    q = rng.random((N, C)).astype(dtype)
    weights = (0.2 + rng.random(C)).astype(dtype)
    g = rng.normal(size=N).astype(dtype)
    return x, labels, q / q.sum(-1, keepdims=True), weights, g


def run(loss, x, g, kind="dense", **options):
    """Values, and the gradient of their sum weighted by g; streamed through an identity."""
    x = jnp.asarray(x)

    def f(x):
        values = loss(logits_of(x, kind, BLOCK), **options)
        return jnp.vdot(values, g) if np.ndim(g) else values * g, values

    gradient, values = jax.jit(jax.grad(f, has_aux=True))(x)
    assert gradient.dtype == x.dtype and values.dtype == x.dtype
    return np.asarray(values), np.asarray(gradient)


# --- torch -----------------------------------------------------------------------------------------------

OPTIONS = [
    dict(),
    dict(ignore_index=-100),
    dict(weight=True),
    dict(label_smoothing=0.1),
    dict(weight=True, label_smoothing=0.3),
    dict(weight=True, label_smoothing=0.3, ignore_index=-100),
    dict(ignore_index=2),
]


def torch_cross_entropy(x, labels, g, weights, options, reduction):
    torch = pytest.importorskip("torch")
    t = torch.tensor(x, requires_grad=True)
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = torch.tensor(weights)
    values = torch.nn.functional.cross_entropy(t, torch.tensor(labels), reduction=reduction, **options)
    (values * torch.tensor(g)).sum().backward()
    return values.detach().numpy(), t.grad.numpy()


def ours(options, weights):
    options = dict(options)
    if options.pop("weight", False):
        options["class_weights"] = jnp.asarray(weights)
    return options


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy_is_that_of_torch(options, dtype, kind):
    x, labels, _, weights, g = example(dtype)
    if options.get("ignore_index") == -100:
        labels = np.where(IGNORED, -100, labels)
    elif "ignore_index" in options:
        labels = np.where(IGNORED, options["ignore_index"], labels)
    expected = torch_cross_entropy(x, labels, g, weights, options, "none")
    got = run(losses.cross_entropy, x, g, kind, labels=jnp.asarray(labels), **ours(options, weights))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, **tolerance(dtype))


@few
@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_the_mean_of_torch(options, dtype, kind):
    """`weighted_mean` divides by the examples that count; torch's mean by the sum of their class weights."""
    x, labels, _, weights, _ = example(dtype)
    ignore = options.get("ignore_index", -100)
    labels = np.where(IGNORED, ignore, labels)
    expected = torch_cross_entropy(x, labels, dtype(1.7), weights, options, "mean")
    # The mean of w_y l with each row's weight w_y is sum / sum w_y times the mean of w_y: undo it by dividing.
    row_weights = weights[np.maximum(labels, 0)] if options.get("weight") else np.ones(N, dtype)
    counted = np.where(labels == ignore, 0, row_weights)
    factor = (counted > 0).sum() / counted.sum()

    def mean(logits):
        return factor.astype(dtype) * losses.weighted_mean(
            losses.cross_entropy, logits, jnp.asarray(labels), **ours(options, weights)
        )

    got = run(mean, x, dtype(1.7), kind)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, **tolerance(dtype))
    if options == dict(weight=True):  # without smoothing, weights of rows say the same
        got = losses.weighted_mean(
            losses.cross_entropy, jnp.asarray(x), jnp.asarray(labels), weights=jnp.asarray(row_weights)
        )
        np.testing.assert_allclose(got, expected[0], **tolerance(dtype))


@few
@pytest.mark.parametrize("options", [dict(), dict(weight=True), dict(label_smoothing=0.2)], ids=str)
def test_distributions_are_those_of_torch(options, dtype, kind):
    x, _, q, weights, g = example(dtype)
    expected = torch_cross_entropy(x, q, g, weights, options, "none")
    got = run(losses.cross_entropy, x, g, kind, labels=jnp.asarray(q), **ours(options, weights))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, **tolerance(dtype))


@dtypes
def test_another_axis_is_that_of_torch(dtype):
    """Classes in the middle, as in segmentation."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    x, labels = rng.normal(size=(2, C, 4)).astype(dtype), rng.integers(0, C, (2, 4))
    g = rng.normal(size=(2, 4)).astype(dtype)
    t = torch.tensor(x, requires_grad=True)
    values = torch.nn.functional.cross_entropy(t, torch.tensor(labels), reduction="none", label_smoothing=0.1)
    (values * torch.tensor(g)).sum().backward()
    ours, pullback = jax.vjp(
        lambda x: losses.cross_entropy(x, jnp.asarray(labels), axis=1, label_smoothing=0.1), jnp.asarray(x)
    )
    np.testing.assert_allclose(ours, values.detach().numpy(), **tolerance(dtype))
    np.testing.assert_allclose(pullback(jnp.asarray(g))[0], t.grad.numpy(), **tolerance(dtype))


@dtypes
@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp"])
def test_normalizers_are_those_of_torch(function, dtype):
    torch = pytest.importorskip("torch")
    x, _, _, _, g = example(dtype)
    t = torch.tensor(x, requires_grad=True)
    values = getattr(torch, function)(t, dim=-1)
    g = g if values.ndim == 1 else np.random.default_rng(1).normal(size=(N, C)).astype(dtype)
    (values * torch.tensor(g)).sum().backward()
    ours, pullback = jax.vjp(getattr(jaxsoft, function), jnp.asarray(x))
    np.testing.assert_allclose(ours, values.detach().numpy(), **tolerance(dtype))
    np.testing.assert_allclose(pullback(jnp.asarray(g))[0], t.grad.numpy(), **tolerance(dtype))


# --- optax -----------------------------------------------------------------------------------------------


@kinds
def test_cross_entropy_is_that_of_optax(dtype, kind):
    x, labels, q, _, g = example(dtype)
    y = jnp.asarray(labels)
    where = np.random.default_rng(5).random((N, C)) < 0.6
    where[np.arange(N), labels] = True
    with_ids = optax.softmax_cross_entropy_with_integer_labels
    for theirs, options in (
        (lambda x: optax.softmax_cross_entropy(x, jnp.asarray(q)), dict(labels=jnp.asarray(q))),
        (lambda x: with_ids(x, y), dict(labels=y)),
        (lambda x: with_ids(x, y, where=jnp.asarray(where)), dict(labels=y, where=jnp.asarray(where))),
    ):
        expected = run(theirs, x, g)
        got = run(losses.cross_entropy, x, g, kind, **options)
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, **tolerance(dtype))


@dtypes
def test_another_axis_is_that_of_optax(dtype):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3, C, 2)).astype(dtype)
    labels = rng.integers(0, C, (3, 2))
    where = rng.random((3, C, 2)) < 0.6
    np.put_along_axis(where, labels[:, None], True, axis=1)
    g = rng.normal(size=(3, 2)).astype(dtype)
    options = dict(axis=1, where=jnp.asarray(where))
    expected, got = (
        run(lambda x, f=f: f(x, jnp.asarray(labels), **options), x, g)
        for f in (optax.softmax_cross_entropy_with_integer_labels, losses.cross_entropy)
    )
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, **tolerance(dtype))


@few
@pytest.mark.parametrize("epsilon", [2.0, -0.5])
def test_poly_loss_is_that_of_optax(epsilon, dtype, kind):
    x, labels, q, _, g = example(dtype)
    onehot = jax.nn.one_hot(labels, C, dtype=dtype)
    for given, target in ((jnp.asarray(labels), onehot), (jnp.asarray(q), jnp.asarray(q))):
        expected = run(
            lambda x, target=target: optax.losses.poly_loss_cross_entropy(x, target, epsilon=epsilon), x, g
        )
        got = run(losses.poly1_cross_entropy, x, g, kind, labels=given, epsilon=epsilon)
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, **tolerance(dtype))


# --- scipy -----------------------------------------------------------------------------------------------


@dtypes
def test_normalizers_are_those_of_scipy(dtype):
    x, *_ = example(dtype)
    x = np.concatenate([x, 1000 + x, -1000 + x])
    exact = x.astype(np.float64)
    close = tolerance(dtype)
    if dtype == np.float32:
        close = dict(rtol=3e-6, atol=3e-6)
    for function in (
        jaxsoft.softmax,
        rows.online_softmax,
        rows.two_pass_softmax,
        lambda x, axis: rows.unified_max_softmax(x, 0.0, axis=axis),
    ):
        for axis in (0, 1):
            got = function(jnp.asarray(x), axis=axis)
            assert got.dtype == dtype
            np.testing.assert_allclose(got, scipy.special.softmax(exact, axis=axis), **close)
    np.testing.assert_allclose(
        jaxsoft.log_softmax(jnp.asarray(x)), scipy.special.log_softmax(exact, axis=-1), **close
    )


@kinds
@pytest.mark.parametrize("weighted", [None, "columns", "entries"])
def test_logsumexp_is_that_of_scipy(weighted, dtype, kind):
    x, _, q, weights, g = example(dtype)
    b = dict(columns=weights, entries=q).get(weighted)
    if b is not None:
        b[..., 2] = 0
    expected = scipy.special.logsumexp(x.astype(np.float64), axis=-1, b=b)
    got, gradient = run(jaxsoft.logsumexp, x, g, kind, weights=None if b is None else jnp.asarray(b))
    np.testing.assert_allclose(got, expected, **tolerance(dtype))
    p = (1 if b is None else b) * np.exp(x - expected[:, None])
    np.testing.assert_allclose(gradient, g[:, None] * p, **tolerance(dtype))
    for method in ("exponent", "reference"):
        if weighted is None and kind == "dense":
            options = dict(method=method) | (dict(reference=1.0) if method == "reference" else {})
            got, gradient = run(jaxsoft.logsumexp, x, g, kind, **options)
            np.testing.assert_allclose(got, expected, **tolerance(dtype))
            np.testing.assert_allclose(gradient, g[:, None] * p, **tolerance(dtype))


@kinds
def test_entropy_is_that_of_scipy(dtype, kind):
    x, *_, g = example(dtype)
    p = scipy.special.softmax(x.astype(np.float64), axis=-1)
    expected = np.sum(scipy.special.entr(p), axis=-1)
    got, gradient = run(jaxsoft.entropy, x, g, kind)
    np.testing.assert_allclose(got, expected, **tolerance(dtype))
    # dH/dx = -p (log p + H)
    np.testing.assert_allclose(
        gradient, -g[:, None] * p * (np.log(p) + expected[:, None]), **tolerance(dtype)
    )
