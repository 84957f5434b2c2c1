"""The worked numbers of the formulas, their limits and the closed forms of their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, jacobian, kinds, logits_of

import jaxsoft
from jaxsoft import losses, rows

A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]
X = [1.0, 2.0, -1.0, 0.5]


def value_and_gradient(loss, scores, labels, kind, **options):
    """Losses of rows, and the gradient of each one's loss with respect to its row."""

    f = lambda scores: loss(logits_of(scores, kind), jnp.asarray(labels), **options)
    return jax.jit(lambda scores: jacobian(f, scores))(jnp.asarray(scores))


CE = losses.cross_entropy
NUMBERS = [  # loss, options, value on A with label 0, value on B with label 3
    (CE, {}, 0.582420, 1.393958),
    (CE, dict(label_smoothing=0.1), 0.730420, 1.453958),
    (CE, dict(z_loss=1e-4), 0.582420 + 0.000667, 1.393958 + 0.000481),
    (losses.spherical_z_loss, {}, 0.202546, 0.420046),
    (losses.spherical_z_loss, dict(a=0.1, b=28.0), 27.188455, None),
    (losses.poly1_cross_entropy, dict(epsilon=2.0), 1.465329, 2.897775),
    (losses.poly_loss, {}, 1.465329, 2.897775),
    (losses.poly1_cross_entropy, dict(epsilon=-1.0), 0.140965, None),
    (losses.poly_loss, dict(epsilon=(0.5, -0.2, 0.1)), 0.772774, None),
    (losses.poly1_focal_loss, dict(gamma=2.0, epsilon=-1.0), 0.027472, None),
    (losses.focal_loss, dict(gamma=2.0), 0.113503, 0.788097),
    (losses.dual_focal_loss, dict(gamma=5.0), 0.065998, 0.769965),
    (losses.max_suppression_loss, dict(suppression=0.1), 0.730420, 1.523958),
    (losses.logit_penalty_loss, {}, 0.582420 + 0.006260, 1.393958 + 0.004460),
]


@kinds
@pytest.mark.parametrize(("loss", "options", "a", "b"), NUMBERS, ids=lambda v: getattr(v, "__name__", None))
def test_values(loss, options, a, b, kind, x64):
    value = loss(logits_of([A, B], kind), jnp.array([0, 3]), **options)
    close(value[0], a)
    if b is not None:
        close(value[1], b)


P_A = np.array([0.558545, 0.205477, 0.083541, 0.027808, 0.124628])
GRADIENTS = [  # loss, options, row, label, gradient
    (CE, {}, A, 0, [-0.441455, 0.205477, 0.083541, 0.027808, 0.124628]),
    (CE, dict(z_loss=1e-4), A, 0, 1.000516 * P_A - [1, 0, 0, 0, 0]),
    (losses.spherical_z_loss, {}, A, 0, [-0.065458, 0.063799, 0.013574, -0.047811, 0.035896]),
    (losses.poly_loss, dict(epsilon=2.0), A, 0, [-0.934600, 0.435014, 0.176864, 0.058873, 0.263849]),
    (
        losses.max_suppression_loss,
        dict(suppression=0.1),
        B,
        3,
        [0.116156, 0.579595, 0.062582, -0.771908, 0.013576],
    ),
]


@kinds
@pytest.mark.parametrize(
    ("loss", "options", "row", "label", "expected"), GRADIENTS, ids=lambda v: getattr(v, "__name__", None)
)
def test_gradients(loss, options, row, label, expected, kind, x64):
    close(value_and_gradient(loss, [row], [label], kind, **options)[1][0], expected)


@kinds
def test_statistics_of_the_examples(kind, x64):
    logits = logits_of([A, B], kind)
    close(jaxsoft.logsumexp(logits), [2.582420, 2.193958])
    close(jaxsoft.entropy(logits), [1.216992, 1.283926])
    close(jnp.exp(jaxsoft.log_prob(logits, jnp.array([0, 3]))), [0.558545, 0.248092])
    close(jnp.exp(jaxsoft.log_prob(logits, jnp.array([1, 0]))), [0.205477, 0.136156])


@kinds
def test_class_weights_with_the_mean_of_torch(kind, x64):
    w, labels = jnp.array([1.0, 2.0, 1.0, 0.5, 1.0]), jnp.array([0, 3])
    for smoothing, mean in ((0.0, 0.852932), (0.1, 1.035240)):
        values = CE(logits_of([A, B], kind), labels, class_weights=w, label_smoothing=smoothing)
        close(jnp.sum(values) / jnp.sum(w[labels]), mean)


@kinds
def test_mixed_labels(kind, x64):
    """Mixup of two classes: a distribution, or two losses."""
    q = jnp.array([[0.3, 0.0, 0.7, 0.0, 0.0]])
    close(CE(logits_of([A], kind), q), [1.912420])
    two = 0.3 * CE(logits_of([A], kind), jnp.array([0])) + 0.7 * CE(logits_of([A], kind), jnp.array([2]))
    close(two, [1.912420])


@kinds
def test_the_z_regularizer(kind, x64):
    """The difference that `z_loss` makes: lam lse^2, and its gradient 2 lam lse p."""
    for row, label, cost in ((A, 0, 0.000667), (B, 3, 0.000481)):
        with_z, g = value_and_gradient(CE, [row], [label], kind, z_loss=1e-4)
        without, g0 = value_and_gradient(CE, [row], [label], kind)
        close(with_z - without, [cost])
        lse = jaxsoft.logsumexp(jnp.array(row))
        close(g - g0, [2e-4 * lse * jax.nn.softmax(jnp.array(row))], 1e-14)
    lse = jaxsoft.logsumexp(jnp.array(A))
    close(1 + 2e-4 * lse, 1.000516)


@kinds
def test_decoupled_softmax(kind, x64):
    positives, mask = jnp.array([[0, 4]]), jnp.array([[True, False, False, False, True]])
    close(jaxsoft.logsumexp(jnp.array(A)[1:4]), 1.433019)
    for labels in (positives, mask, jnp.array([[4, -100, 0]])):
        value, g = value_and_gradient(losses.decoupled_softmax_loss, [A], labels, kind)
        close(value, [0.857026])
        # -r_i / |P| for the positives, mean(r) softmax_N for the negatives
        r = jax.nn.sigmoid(1.433019 - jnp.array(A))[jnp.array([0, 4])]
        p_n = jax.nn.softmax(jnp.array(A)[1:4])
        close(g[0], [-r[0] / 2, *(jnp.mean(r) * p_n), -r[1] / 2])
    competing = -jnp.mean(jaxsoft.log_prob(logits_of([A, A], kind), jnp.array([0, 4])))
    close(competing, 1.332420)  # of positives that compete, for the contrast


# --- normalizers -----------------------------------------------------------------------------------------

SOFTMAX = [0.224208, 0.609460, 0.030343, 0.135989]


@pytest.mark.parametrize(
    "softmax",
    [
        jaxsoft.softmax,
        rows.online_softmax,
        rows.two_pass_softmax,
        lambda x, **kw: rows.unified_max_softmax(x, 1.0, **kw),
    ],
    ids=["softmax", "online", "two_pass", "unified_max"],
)
def test_softmax_in_every_order(softmax, x64):
    x, values = jnp.array(X), jnp.array([[1.0, 0], [0, 1], [1, 1], [2, -1]])
    close(softmax(x), SOFTMAX)
    close(softmax(x) @ values, [0.526529, 0.503814])
    kept = jnp.array([True, True, False, True])
    close(softmax(x, where=kept), [0.231224, 0.628532, 0, 0.140244])
    assert softmax(x, where=kept)[2] == 0
    close(softmax(jnp.array([1000.0, 1001.0, 998.0])), [0.259496, 0.705385, 0.035119])
    # its derivative, p (g - p.g), by the formula
    g, p = jnp.array([0.3, -1.0, 2.0, 0.7]), softmax(x)
    close(jax.vjp(softmax, x)[1](g)[0], p * (g - p @ g), 1e-14)
    close(jax.jvp(softmax, (x,), (g,))[1], p * (g - p @ g), 1e-14)


@kinds
def test_logsumexp_numbers(kind, x64):
    close(jaxsoft.log_softmax(jnp.array(X)), [-1.495182, -0.495182, -3.495182, -1.995182])
    if kind == "dense":  # an absent entry of an identity times the scores would be 0 times -inf
        two = jnp.array([X, [1000.0, 1001.0, 998.0, -np.inf]])
        reference = jnp.array([1.0, 1000.0])
        for options in ({}, dict(method="exponent"), dict(method="reference", reference=reference)):
            close(jaxsoft.logsumexp(two, **options), [2.495182, 1001.349012])
    for options in ({}, dict(method="exponent"), dict(method="reference", reference=1.0)):
        close(jaxsoft.logsumexp(logits_of([X], kind), **options), [2.495182])
    gradient = jax.grad(lambda x: jnp.sum(jaxsoft.logsumexp(logits_of(x, kind))))(jnp.array([X]))
    close(gradient, [SOFTMAX])
    # weighted: log sum b e^x
    b = jnp.array([1.0, 0.5, 0.0, 2.0])
    close(
        jaxsoft.logsumexp(logits_of([X], kind), weights=b), [np.log(np.sum(np.asarray(b) * np.exp(X)))], 1e-14
    )


@kinds
def test_softmax_with_its_largest(kind, x64):
    best = rows.softmax_top_k(logits_of([X], kind), 2)
    close(best.values, [[0.609460, 0.224208]])
    np.testing.assert_array_equal(best.indices, [[1, 0]])
    best = rows.softmax_top_k(logits_of([X], kind), 2, renormalize=True)
    close(best.values, [np.array([0.609460, 0.224208]) / (0.609460 + 0.224208)], 2e-6)


def test_temperature_and_softcap(x64):
    x = jnp.array(X)
    for tau, expected in (
        (0.5, [0.113957, 0.842034, 0.002087, 0.041922]),
        (2.0, [0.263477, 0.434400, 0.096928, 0.205196]),
    ):
        close(jaxsoft.softmax(jaxsoft.temperature(x, tau)), expected)
    close(jaxsoft.softcap(x, 2.0), [0.924234, 1.523188, -0.924234, 0.489837])
    for cap, expected in (
        (2.0, [0.275836, 0.502080, 0.043438, 0.178646]),
        (30.0, [0.224547, 0.608803, 0.030412, 0.136238]),
        (50.0, [0.224330, 0.609223, 0.030368, 0.136079]),
    ):
        close(jaxsoft.softmax(jaxsoft.softcap(x, cap)), expected)
        logits = jaxsoft.softcap(logits_of([X], "streamed"), cap)
        ids = jnp.arange(4)
        close(jnp.exp(jax.vmap(lambda i: jaxsoft.log_prob(logits, i[None]))(ids))[:, 0], expected)
    # d/dtau: -(1/tau^2) sum dz x
    g, tau = jnp.array([0.3, -1.0, 2.0, 0.7]), 0.8
    gradient = jax.grad(lambda t: g @ jaxsoft.softmax(jaxsoft.temperature(x, t)))(tau)
    p = jax.nn.softmax(x / tau)
    close(gradient, -jnp.sum(p * (g - p @ g) * x) / tau**2, 1e-14)
    close(jax.grad(lambda x: jnp.sum(jaxsoft.softcap(x, 2.0)))(x), 1 - jnp.tanh(x / 2) ** 2, 1e-14)


# --- limits (dense; that streamed is dense is a law of its own) -----------------------------------------


def example(columns=7, n=5, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, columns)) * 2), jnp.asarray(rng.integers(0, columns, n))


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (CE, dict(label_smoothing=0.0)),
        (CE, dict(label_smoothing=0.0, smoothing="others", z_loss=0.0)),
        (losses.poly_loss, dict(epsilon=0.0)),
        (losses.poly_loss, dict(epsilon=(0.0, 0.0))),
        (losses.focal_loss, dict(gamma=0.0)),
        (losses.poly1_focal_loss, dict(gamma=0.0, epsilon=0.0)),
        (losses.dual_focal_loss, dict(gamma=0.0)),
        (losses.max_suppression_loss, dict(suppression=0.0)),
        (losses.logit_penalty_loss, dict(penalty=0.0)),
        (lambda x, y: losses.decoupled_softmax_loss(x, y[:, None]), {}),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_limits_are_cross_entropy(loss, options, x64):
    x, y = example()
    expected = value_and_gradient(CE, x, y, "dense")
    got = value_and_gradient(loss, x, y, "dense", **options)
    close(got[0], expected[0], 1e-13)
    close(got[1], expected[1], 1e-13)


def smoothed(x, q):
    return -jnp.sum(q * jax.nn.log_softmax(x), -1)


@kinds
@pytest.mark.parametrize("smoothing", ["uniform", "others"])
@pytest.mark.parametrize("a", [0.1, 1.0])
def test_smoothing_is_its_definition(smoothing, a, kind, x64):
    x, y = example()
    onehot = jax.nn.one_hot(y, 7)
    q = (1 - a) * onehot + (a / 7 if smoothing == "uniform" else a / 6 * (1 - onehot))
    expected = jax.vjp(lambda x: smoothed(x, q), x)
    value, g = value_and_gradient(CE, x, y, kind, label_smoothing=a, smoothing=smoothing)
    close(value, expected[0], 1e-13)
    close(g, expected[1](jnp.ones(5))[0], 1e-13)
    # the classes that are masked get no mass
    where = jnp.arange(7) != (y[:, None] + 2) % 7
    q = (1 - a) * onehot + (a / 6 if smoothing == "uniform" else a / 5 * (1 - onehot))
    q = jnp.where(where, q, 0)
    masked = jnp.where(where, x, -1e30)
    value = CE(logits_of(x, kind), y, label_smoothing=a, smoothing=smoothing, where=where)
    close(value, smoothed(masked, q), 1e-13)


@pytest.mark.parametrize("loss", [CE, losses.poly_loss])
@pytest.mark.parametrize("soft", [False, True])
def test_smoothing_is_that_of_the_labels(loss, soft, x64):
    """Of class ids and of distributions, with all classes and with some."""
    x, y = example()
    some = jnp.arange(7) != (y[:, None] + 2) % 7
    for where in (jnp.ones_like(some), some):
        q = jnp.where(where, jax.nn.softmax(x[::-1]), 0) if soft else jax.nn.one_hot(y, 7)
        q = q / jnp.sum(q, axis=-1, keepdims=True)
        smooth = 0.7 * q + 0.3 * where / jnp.sum(where, axis=-1, keepdims=True)
        got = loss(x, q if soft else y, label_smoothing=0.3, where=where)
        close(got, loss(x, smooth, where=where), 1e-13)


@kinds
def test_the_gradient_of_the_spherical_loss(kind, x64):
    """Orthogonal to the logits (scale invariance), summing to 0 (shift invariance), and not zero."""
    x, y = example()
    for options in ({}, dict(a=0.5, b=3.0)):
        _, g = value_and_gradient(losses.spherical_z_loss, x, y, kind, **options)
        close(jnp.sum(g, -1), np.zeros(5), 1e-14)
        close(jnp.sum(g * x, -1), np.zeros(5), 1e-11)  # eps = 1e-12 beside the standard deviation
        assert jnp.all(jnp.max(jnp.abs(g), -1) > 1e-3)


# --- labels of any kind ----------------------------------------------------------------------------------


@pytest.mark.table
@kinds
@pytest.mark.parametrize(
    ("dtype", "columns"), [(np.uint8, 256), (np.uint8, 300), (np.int8, 300), (np.uint32, 300)]
)
def test_labels_of_any_integer_dtype(dtype, columns, kind, x64):
    """As many classes as there are bytes, and more: no id, no count and no -100 wraps around."""
    rng = np.random.default_rng(0)
    ids = np.array([3, 100, 156, 255] if dtype != np.int8 else [3, 100, 27, 127])
    logits, weights = logits_of(rng.normal(size=(4, columns)), kind), jnp.asarray(rng.random(columns))
    for f in (
        lambda x, y: CE(x, y, class_weights=weights),
        losses.dual_focal_loss,
        lambda x, y: losses.decoupled_softmax_loss(x, y[:, None]),
        lambda x, y: losses.weighted_mean(CE, x, y),
        jaxsoft.log_prob,
        jaxsoft.label_rank,
    ):
        expected = f(logits, jnp.asarray(ids, jnp.int32))
        assert jnp.all(jnp.isfinite(expected))
        close(f(logits, jnp.asarray(ids, dtype)), expected, 1e-12)


def poly_of(x, q):
    return smoothed(x, q) + 2 * (1 - jnp.sum(q * jax.nn.softmax(x), -1))


def weighted_of(x, w):
    terms = -w * jax.nn.log_softmax(x)
    label = jnp.take_along_axis(terms, jnp.arange(5)[:, None], 1)[:, 0]
    return 0.9 * label + 0.1 / 7 * jnp.sum(terms, -1)


@kinds
@pytest.mark.parametrize(
    ("loss", "plain", "argument"),
    [
        (CE, smoothed, "labels"),
        (losses.poly_loss, poly_of, "labels"),
        (lambda x, w: CE(x, jnp.arange(5), class_weights=w, label_smoothing=0.1), weighted_of, "weights"),
    ],
    ids=["cross_entropy", "poly_loss", "class_weights"],
)
def test_gradients_to_labels_and_weights_that_are_zero(loss, plain, argument, kind, x64):
    """A zero in a distribution or among class weights has a derivative as any other number."""
    x, y = example()
    q = jax.nn.one_hot(y, 7) * 0.75 + jax.nn.one_hot((y + 1) % 7, 7) * 0.25
    at = q if argument == "labels" else jnp.arange(7.0) % 3
    g = jnp.asarray(np.random.default_rng(1).normal(size=5))
    got = jax.jit(jax.value_and_grad(lambda v: g @ loss(logits_of(x, kind), v)))(at)
    expected = jax.value_and_grad(lambda v: g @ plain(x, v))(at)
    close(got[0], expected[0], 1e-12)
    close(got[1], expected[1], 1e-12)


# --- gradients in closed form ----------------------------------------------------------------------------


def phi(function):
    """Of a loss that is a function of the negative log-likelihood: phi' (p - e_y)."""

    def gradient(s):
        slope = jax.vmap(jax.grad(function))(s["l"])[:, None]
        return slope * (s["p"] - s["onehot"])

    return gradient


def spherical(a, b):
    def gradient(s):
        x, n = s["x"], 7
        mu, sd = jnp.mean(x, -1, keepdims=True), jnp.std(x, -1, keepdims=True)
        z = (s["score"] - mu) / sd
        big = -jax.nn.sigmoid(a * (b - z))
        return (
            (-big / (n * sd) + big * z * mu / (n * sd**2))
            - big * z / (n * sd**2) * x
            + big / sd * s["onehot"]
        )

    return gradient


def dual(gamma):
    def gradient(s):
        p, y, p_k = s["p"], s["onehot"], s["p_y"]
        below = jnp.where(p < p_k, p, 0)
        j = jax.nn.one_hot(jnp.argmax(below, -1), 7) * jnp.any(p < p_k, -1, keepdims=True)
        p_j = jnp.sum(j * p, -1, keepdims=True)
        base = 1 - p_k + p_j
        rise = gamma * base ** (gamma - 1) * s["l"][:, None]
        return (base**gamma - rise * (p_j - p_k)) * p + (-(base**gamma) - rise * p_k) * y + rise * p_j * j

    return gradient


def top(s):
    return jax.nn.one_hot(jnp.argmax(s["x"], -1), 7)


CLOSED = [
    ("cross-entropy", CE, {}, lambda s: s["p"] - s["onehot"]),
    ("smoothing", CE, dict(label_smoothing=0.2), lambda s: s["p"] - 0.2 / 7 - 0.8 * s["onehot"]),
    ("z_loss", CE, dict(z_loss=0.3), lambda s: (1 + 0.6 * s["lse"]) * s["p"] - s["onehot"]),
    ("poly-1", losses.poly_loss, dict(epsilon=1.5), lambda s: (1 + 1.5 * s["p_y"]) * (s["p"] - s["onehot"])),
    (
        "poly-3",
        losses.poly_loss,
        dict(epsilon=(0.5, -0.2, 0.1)),
        lambda s: (
            (1 + s["p_y"] * (0.5 - 0.4 * (1 - s["p_y"]) + 0.3 * (1 - s["p_y"]) ** 2)) * (s["p"] - s["onehot"])
        ),
    ),
    (
        "focal",
        losses.focal_loss,
        dict(gamma=2.5),
        lambda s: (
            ((1 - s["p_y"]) ** 2.5 + 2.5 * s["l"][:, None] * s["p_y"] * (1 - s["p_y"]) ** 1.5)
            * (s["p"] - s["onehot"])
        ),
    ),
    (
        "focal, weight constant",
        losses.focal_loss,
        dict(gamma=2.5, stop_weight_gradient=True),
        lambda s: (1 - s["p_y"]) ** 2.5 * (s["p"] - s["onehot"]),
    ),
    (
        "poly-focal",
        losses.poly1_focal_loss,
        dict(gamma=2.0, epsilon=-0.7),
        phi(lambda n: (1 - jnp.exp(-n)) ** 2 * n - 0.7 * (1 - jnp.exp(-n)) ** 3),
    ),
    ("dual focal", losses.dual_focal_loss, dict(gamma=3.0), dual(3.0)),
    (
        "max suppression",
        losses.max_suppression_loss,
        dict(suppression=0.3),
        lambda s: s["p"] - 0.3 / 7 - s["onehot"] + 0.3 * top(s),
    ),
    ("spherical", losses.spherical_z_loss, {}, spherical(1.0, 0.0)),
    ("spherical, a and b", losses.spherical_z_loss, dict(a=0.4, b=2.0), spherical(0.4, 2.0)),
]


@pytest.mark.parametrize(("loss", "options", "formula"), [c[1:] for c in CLOSED], ids=[c[0] for c in CLOSED])
def test_gradients_in_closed_form(loss, options, formula, x64):
    """The gradient of a row is a p + b + d x + h e_y + k e_j, with coefficients by formula; 7 classes."""
    x, y = example(n=8, seed=4)
    onehot = jax.nn.one_hot(y, 7)
    p = jax.nn.softmax(x)
    p_y = jnp.sum(p * onehot, -1, keepdims=True)
    s = dict(
        x=x,
        p=p,
        onehot=onehot,
        p_y=p_y,
        l=-jnp.log(p_y[:, 0]),
        lse=jax.nn.logsumexp(x, -1, keepdims=True),
        score=jnp.sum(x * onehot, -1, keepdims=True),
    )
    _, g = value_and_gradient(loss, x, y, "dense", **options)
    close(g, formula(s), 1e-10)
    if "z_loss" not in options:  # every other one does not change with a shift
        close(jnp.sum(g, -1), np.zeros(8), 1e-13)
