"""Proper scores, the entropy bonus, and scores of how hard an example is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import float64
from helpers import close, jacobian, streamed
from jax.test_util import check_grads

import jaxsoft
from jaxsoft import losses

A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]
BRIER, SCORE, SPHERICAL = losses.brier_loss, losses.adversarial_brier_loss, losses.spherical_score_loss
PENALTY, EL2N = losses.confidence_penalty_loss, losses.el2n_score
GRAND, GRAND_LINEAR = losses.grand_score, losses.grand_score_linear


def example(rows=4, columns=6, seed=0):
    rng = np.random.default_rng(seed)
    x, q = rng.normal(size=(rows, columns)) * 2, rng.dirichlet(np.ones(columns), rows)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, columns, rows)), jnp.asarray(q)


@pytest.mark.parametrize("kind", [jnp.asarray, streamed])
def test_worked_numbers(kind, x64):
    y, h = jnp.array([0, 3]), jnp.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])

    @jax.jit
    def run(x):
        x = kind(x)
        return [
            (BRIER(x, y), [0.260388, 0.917304**2]),
            (SPHERICAL(x, y)[:1], [-0.909101]),
            (PENALTY(x, y), [0.460720, 1.393958 - 0.1283926]),
            (EL2N(x, y), [0.510282, 0.917304]),
            (EL2N(x, y, norm="l1"), [0.882910, 1.503817]),
            (EL2N(x, y, norm="margin"), [-0.353068, 0.251503]),
            (GRAND_LINEAR(x, y, h), [1.530846, 0.0]),
            (GRAND_LINEAR(x, y, h, bias=True), [1.613654, 0.917304]),
        ]

    for value, expected in run(jnp.array([A, B])):
        close(value, expected, 2e-6 if expected[0] == 0.260388 else 1e-6)
    _, g = jax.jit(lambda x: jacobian(lambda x: BRIER(kind(x), y[:1]), x))(jnp.array([A]))
    close(g[0], [-0.290877, 0.158852, 0.044211, 0.011617, 0.076197])


def test_gradients_in_closed_form(x64):
    """The coefficients of p, p^2, p x and e_y."""
    x, y, _ = example(seed=1)
    onehot, p = jax.nn.one_hot(y, 6), jax.nn.softmax(x)
    p_y = jnp.sum(p * onehot, -1, keepdims=True)
    squares, mean = (jnp.sum(a, -1, keepdims=True) for a in (p * p, p * x))
    cases = [
        (lambda x: BRIER(x, y), (2 * p_y - 2 * squares) * p + 2 * p * p - 2 * p_y * onehot),
        (lambda x: SPHERICAL(x, y), p_y / squares**1.5 * p * p - p_y / jnp.sqrt(squares) * onehot),
        (lambda x: PENALTY(x, y, beta=0.3), (1 - 0.3 * mean) * p + 0.3 * p * x - onehot),
        (lambda x: EL2N(x, y, norm="l1"), 2 * p_y * (p - onehot)),
    ]
    results = jax.jit(lambda x: [jacobian(f, x)[1] for f, _ in cases])(x)
    for g, (_, expected) in zip(results, cases):
        close(g, expected, 1e-12)


def test_distributions_as_labels(x64):
    """By the definition, dense and streamed; one-hot distributions are class ids."""
    x, y, q = example(seed=2)
    onehot = jax.nn.one_hot(y, 6)
    smooth = (1 - 6 * 0.1 / 5) * onehot + 0.1 / 5  # the label smoothing of the SCORE code
    second = jnp.flip(x, 0)
    p, p2 = jax.nn.softmax(x), jax.nn.softmax(second)
    entropy = -jnp.sum(p * jnp.log(p), -1)

    def run(kind):
        z = kind(x)
        return [
            (BRIER(z, q), jnp.sum((p - q) ** 2, -1)),
            (BRIER(z, smooth), jnp.sum((p - smooth) ** 2, -1)),
            (BRIER(z, onehot), BRIER(x, y)),
            (BRIER(z, y), 2 * jnp.sum(optax.l2_loss(p, onehot), -1)),
            (
                SCORE(z, kind(second), smooth, beta=3.0),
                jnp.sum((p - smooth) ** 2 + 3 * (p - p2) ** 2, -1),
            ),
            (SCORE(z, second, onehot), SCORE(x, kind(second), y)),
            (PENALTY(z, q, beta=0.5), -jnp.sum(q * jnp.log(p), -1) - 0.5 * entropy),
            (PENALTY(z, q, beta=0.0), losses.cross_entropy(x, q)),
            (EL2N(z, q), jnp.sqrt(jnp.sum((p - q) ** 2, -1))),
            (EL2N(z, onehot), EL2N(x, y)),
            (EL2N(z, q, norm="l1"), jnp.sum(jnp.abs(p - q), -1)),
        ]

    for pairs in jax.jit(lambda: [run(kind) for kind in (jnp.asarray, streamed)])():
        for got, expected in pairs:
            close(got, expected, 1e-13)
    # The gradient reaches the distribution, too.
    check_grads(lambda q: BRIER(x, q), (q,), 1)


def test_the_scores_are_proper(x64):
    """Labels drawn from p itself: the expected gradient is 0."""
    x, *_ = example(seed=3)
    p = jax.nn.softmax(x)

    def expected(loss):
        values = lambda x: jax.vmap(lambda c: loss(x, jnp.full(4, c)))(jnp.arange(6))
        return jax.grad(lambda x: jnp.sum(p.T * values(x)))(x)

    for loss in (BRIER, SPHERICAL):
        close(jax.jit(expected, static_argnums=0)(loss), np.zeros((4, 6)), 1e-14)
    assert jnp.max(jnp.abs(expected(losses.mean_absolute_error_loss))) > 1e-2


def test_no_precision_is_lost_near_zero():
    """Sure and right predictions, in float32."""
    x = jnp.array([[g, 0.0, -1.0, 0.3] for g in (5.0, 10.0, 20.0, 50.0)], jnp.float32)
    y = jnp.zeros(4, int)
    values = jax.jit(lambda x: [jacobian(lambda x: f(x, y), x) for f in (BRIER, EL2N)])(x)
    with float64():
        p = jax.nn.softmax(jnp.asarray(np.asarray(x, np.float64)))
        rest = jnp.sum(p[:, 1:], -1)
        exact = np.asarray(rest**2 + jnp.sum(p[:, 1:] ** 2, -1))
    np.testing.assert_allclose(values[0][0], exact, rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(values[1][0], np.sqrt(exact), rtol=1e-5)
    assert all(jnp.all(jnp.isfinite(g)) for _, g in values)
    sure = jnp.array([[200.0, 0.0]])
    for loss in (EL2N, lambda x, y: EL2N(x, jax.nn.one_hot(y, 2)), SPHERICAL):
        value, g = jacobian(lambda x, loss=loss: loss(x, y[:1]), sure)
        assert value in (0, -1) and not jnp.any(g)


EVERY = {
    "brier": BRIER,
    "score": lambda x, y, **o: SCORE(x, jnp.flip(x, 0), y, **o),
    "spherical": SPHERICAL,
    "penalty": PENALTY,
    "el2n": EL2N,
    "l1": lambda x, y, **o: EL2N(x, y, norm="l1", **o),
    "margin": lambda x, y, **o: EL2N(x, y, norm="margin", **o),
    "grand": lambda x, y, **o: GRAND_LINEAR(x, y, jnp.ones((4, 2)), **o),
}


@pytest.mark.table
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize("name", EVERY)
def test_absent_labels_and_empty_rows(name, soft):
    if soft and name in ("spherical", "margin"):
        return
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)), jnp.float32)
    where = jnp.array([[True, False, True]] * 3 + [[False] * 3])
    y = jnp.array([0, 1, 2, 0])
    labels = jax.nn.one_hot(y, 3) if soft else y
    spoiled = x.at[:, 1].set(jnp.nan)
    value, g = jax.jit(lambda x: jacobian(lambda x: EVERY[name](x, labels, where=where), x))(spoiled)
    cut = jax.jit(lambda x: jacobian(lambda x: EVERY[name](x, jnp.array([0, 0, 1, 0])), x))(x[:, ::2])
    close(value[jnp.array([0, 2])], cut[0][jnp.array([0, 2])])
    assert jnp.isposinf(value[1]) and value[3] == 0
    assert jnp.all(jnp.isfinite(g)) and not jnp.any(g[:, 1])
    if name == "score":  # whose gradient in row 0 comes from row 3, too
        return
    close(g[jnp.array([0, 2])][:, ::2], cut[1][jnp.array([0, 2])])
    assert not jnp.any(g[3])
    if name != "penalty":  # whose entropy has a gradient beside the infinite loss
        assert not jnp.any(g[1])


def test_single_classes():
    x, y = jnp.array([[3.0]]), jnp.array([0])
    for loss in (BRIER, EL2N, PENALTY):
        assert loss(x, y) == 0
    assert SPHERICAL(x, y) == -1 and EL2N(x, y, norm="margin") == -1


# --- scores by gradients ---------------------------------------------------------------------------------


def classifier(params, image, label):
    hidden = jnp.tanh(image @ params["first"])
    return losses.cross_entropy(hidden @ params["last"]["weight"] + params["last"]["bias"], label)


def params_and_batch(dtype=np.float64):
    rng = np.random.default_rng(6)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {"first": normal(4, 3), "last": {"weight": normal(3, 6), "bias": normal(6)}}
    return params, normal(5, 4), jnp.asarray(rng.integers(0, 6, 5))


def test_grand_score_is_the_norm_of_each_gradient(x64):
    params, images, labels = params_and_batch()
    expected, gradient_of = [], jax.jit(jax.grad(classifier))
    for image, label in zip(images, labels):
        gradient = gradient_of(params, image, label)
        expected.append(np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in jax.tree.leaves(gradient))))

    @jax.jit
    def run(params):
        networks = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
        return [
            GRAND(classifier, params, images, labels),
            *(GRAND(classifier, params, images, labels, chunk_size=size) for size in (2, 8)),
            GRAND(lambda p, b: classifier(p, b["x"], b["y"]), params, {"x": images, "y": labels}),
            jax.vmap(lambda p: GRAND(classifier, p, images, labels))(networks)[0],
        ]

    for score in run(params):
        close(score, expected, 1e-13)
    close(GRAND(classifier, params, images, labels), expected, 1e-13)
    check_grads(jax.jit(lambda p: GRAND(classifier, p, images, labels)), (params,), 1, modes=["rev"])
    # nothing to learn
    zero = GRAND(lambda p, x: jnp.sum(0 * p["first"]) + x, params, jnp.arange(3.0))
    np.testing.assert_array_equal(zero, np.zeros(3))
    g = jax.grad(lambda p: jnp.sum(GRAND(lambda p, x: jnp.sum(p**2) * x, p, jnp.ones(2))))(jnp.zeros(3))
    np.testing.assert_array_equal(g, np.zeros(3))


def test_grand_score_of_half_precision():
    params, images, labels = params_and_batch(jnp.bfloat16)
    run = jax.jit(lambda p, x: GRAND(classifier, p, x, labels))
    score = run(params, images)
    assert score.dtype == jnp.float32
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, images))
    np.testing.assert_allclose(score, run(*wide), rtol=0.05)


def test_the_last_layer_alone(x64):
    """`grand_score_linear` is `grand_score` of a linear classifier, with a bias or without."""
    params, hidden, labels = params_and_batch()
    weight, bias = jnp.tile(params["last"]["weight"], (2, 1))[:4], params["last"]["bias"]

    def run(hidden):
        logits = jaxsoft.linear_logits(hidden, weight, bias=bias, block_size=4)
        return GRAND_LINEAR(logits, labels, hidden), GRAND_LINEAR(logits.dense(), labels, hidden, bias=True)

    without, with_bias = jax.jit(run)(hidden)
    loss = lambda p, h, y: losses.cross_entropy(h @ p["weight"] + p["bias"], y)
    both = {"weight": weight, "bias": bias}
    close(GRAND(loss, both, hidden, labels), with_bias, 1e-13)
    close(
        GRAND(lambda w, h, y: loss({"weight": w, "bias": bias}, h, y), weight, hidden, labels), without, 1e-13
    )
    cotangent = jnp.arange(1.0, 6.0)
    check_grads(lambda h: cotangent @ run(h)[1], (hidden,), 1)
    mapped = jax.vmap(lambda h, y: GRAND_LINEAR(h @ weight + bias, y, h))(hidden, labels)
    close(mapped, without, 1e-13)
    x = hidden @ weight + bias
    close(GRAND_LINEAR(x.T, labels, hidden, axis=0), without, 1e-13)
    close(GRAND_LINEAR(x, jax.nn.one_hot(labels, 6), hidden), without, 1e-13)
    weights = jnp.array([0.0, 1, 2, 3, 4])
    close(GRAND_LINEAR(x.at[0].set(jnp.nan), labels, hidden, weights=weights), weights * without, 1e-13)


def test_the_last_layer_of_ignored_examples():
    _, hidden, labels = params_and_batch(np.float32)
    labels, hidden = labels.at[1].set(-100), hidden.at[1].set(jnp.nan).at[2].set(0)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(5, 6)), jnp.float32).at[1].set(jnp.nan)
    f = lambda x, h: GRAND_LINEAR(x, labels, h)
    values, *gradients = jax.jit(lambda *a: (f(*a), *jax.grad(lambda *a: f(*a).sum(), (0, 1))(*a)))(x, hidden)
    assert values[1] == 0 and values[2] == 0 and jnp.all(values[jnp.array([0, 3, 4])] > 0)
    for g in gradients:
        assert jnp.all(jnp.isfinite(g)) and not jnp.any(g[1])
    low = GRAND_LINEAR(x.astype(jnp.bfloat16), labels, hidden.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, values, rtol=0.03)
    bad = jax.grad(lambda x: jnp.sum(jnp.sin(GRAND_LINEAR(x, jnp.full(5, 6), jnp.ones((5, 2))))))(x)
    assert jnp.all(jnp.isnan(bad))


X, Y, H = jnp.ones((4, 6)), jnp.zeros(4, int), jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: EL2N(X, X / 6, norm="margin"), ValueError, "'margin' needs class ids as labels"),
        (
            lambda: GRAND_LINEAR(X, Y, H[:3]),
            ValueError,
            r"features must have shape \(4, 'd'\), got.*\(3, 3\)",
        ),
        (lambda: GRAND_LINEAR(X, Y, H[0]), ValueError, r"features must have shape \(4, 'd'\), got.*\(3,\)"),
        (lambda: GRAND_LINEAR(X, Y, Y[:, None]), TypeError, "features must be an array of floating dtype"),
        (lambda: GRAND_LINEAR(X, Y, H, bias=jnp.ones(6)), TypeError, "bias must be True or False"),
        (lambda: GRAND_LINEAR(X, X[:, 0], H), ValueError, "labels of dtype float32 are distributions"),
        (lambda: GRAND_LINEAR(X, Y, H, axis=2), ValueError, r"axis must be in \[-2, 2\)"),
        (lambda: GRAND(3, H, X), TypeError, "loss must be a function"),
        (lambda: GRAND(jnp.dot, X[0]), ValueError, r"batch must hold arrays .* got sizes \[\]"),
        (lambda: GRAND(classifier, {}, X, Y[:3]), ValueError, r"got sizes \[\(3,\), \(4,\)\]"),
        (lambda: GRAND(classifier, {}, 1.0), ValueError, r"got sizes \[\(\)\]"),
        (lambda: GRAND(jnp.multiply, X[0], X), ValueError, r"loss must return a scalar .* shape \(6,\)"),
        (
            lambda: GRAND(jnp.dot, X[0], X, chunk_size=0),
            ValueError,
            "chunk_size must be a static integer >= 1",
        ),
        (lambda: GRAND(jnp.dot, X[0], X, chunk_size=1.5), TypeError, "chunk_size must be a static integer"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
