"""Ranking losses: worked numbers, limits, oracles, and the laws of those that need the whole list."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fails, kinds, logits_of

import jaxsoft
from jaxsoft import losses

SCORES = [[0.6, 0.5, -0.2, 0.1, 0.7]]
POSITIVE = np.array([0])


# --- a positive against the negatives of its row ---------------------------------------------------------------

PSL, SL = losses.pairwise_softmax_loss, losses.softmax_loss
BSL, SL_AT_K = losses.bilateral_softmax_loss, losses.softmax_loss_at_k
RECIPE = dict(temperature=0.2, weight_temperature=2.25)


@kinds
@pytest.mark.parametrize(
    ("loss", "options", "value"),
    [
        (SL, dict(temperature=0.2), 0.856818),
        (PSL, dict(activation="exp", temperature=0.2), 0.856818),
        (PSL, dict(activation="tanh", temperature=0.2), 0.810470),
        (PSL, dict(activation="relu", temperature=0.2), 0.803153),
        (PSL, dict(activation="atan", temperature=0.2), 0.809903),
        (BSL, dict(positive_temperature=0.2, negative_temperature=0.1), 0.564609),
        (SL_AT_K, dict(k=2, **RECIPE), 0.428409),
        (SL_AT_K, dict(quantile=np.array([0.6]), **RECIPE), 0.428409),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_worked_numbers(loss, options, value, kind, x64):
    close(loss(logits_of(SCORES, kind), POSITIVE, **options), [value])


def random_rows(dtype=np.float64):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(5, 7)), dtype), jnp.asarray(rng.integers(0, 7, 5))


def test_the_softmax_loss_is_the_limit_of_the_others(x64):
    x, y = random_rows()
    expected = SL(x, y, temperature=0.3)
    close(BSL(x, y, positive_temperature=0.3, negative_temperature=0.3), expected, 1e-12)
    close(SL_AT_K(x, y, temperature=0.3, quantile=jnp.full(5, -1e9)), expected, 1e-12)
    # All activations are 1 + d + O(d^2): for scores near each other, the losses agree to first order.
    for activation in ("tanh", "relu", "atan"):
        near = PSL(1e-4 * x, y, activation=activation) - SL(1e-4 * x, y)
        close(near, np.zeros(5), 1e-7)
    # With the positive in the sum, the softmax loss is cross-entropy.
    with_positive = jnp.logaddexp(SL(x, y), 0)
    close(with_positive, losses.cross_entropy(x, y), 1e-12)


def test_the_second_method_is_the_log_mean_exp_over_the_positives_of_a_user(x64):
    x, positives = np.asarray(random_rows()[0][0]), np.array([1, 4, 5])
    negatives = np.delete(np.arange(7), positives)
    d = x[negatives] - x[positives][:, None]
    expected = np.log(np.mean((1 + np.tanh(d)) ** (1 / 0.5)))
    where = np.isin(np.arange(7), negatives) | (np.arange(7) == positives[:, None])
    each = PSL(jnp.tile(x, (3, 1)), positives, temperature=0.5, where=jnp.asarray(where))
    close(jaxsoft.logsumexp(each) - np.log(3 * 4), expected, 1e-12)


def numpy_gradient(x, y, activation, temperature):
    """The gradient in closed form: softmax weights of the activations times their logarithmic derivative."""
    d = np.delete(x, y) - x[y]
    value, slope = {
        "tanh": (1 + np.tanh(d), 1 / np.cosh(d) ** 2),
        "relu": (np.maximum(1 + d, 0), (d > -1) * 1.0),
        "atan": (np.maximum(1 + np.arctan(d), 0), (d > -np.tan(1)) / (1 + d * d)),
        "exp": (np.exp(d), np.exp(d)),
    }[activation]
    power = value ** (1 / temperature)
    share = power / power.sum() * np.divide(slope, value, out=np.zeros_like(d), where=value > 0) / temperature
    return np.insert(share, y, -share.sum())


@kinds
@pytest.mark.parametrize("activation", ["tanh", "relu", "atan", "exp"])
def test_gradient_coefficients(activation, kind, x64):
    x, y = random_rows()
    weights = jnp.arange(1.0, 6.0)

    def f(x):
        loss = PSL(logits_of(x, kind), y, activation=activation, temperature=0.5)
        return jnp.sum(weights * loss)

    expected = [
        w * numpy_gradient(np.asarray(row), int(label), activation, 0.5)
        for w, row, label in zip(weights, x, y)
    ]
    close(jax.jit(jax.grad(f))(x), expected, 1e-12)


@pytest.mark.parametrize("activation", ["tanh", "relu", "atan"])
def test_far_ahead_of_all_negatives(activation):
    """Activations that are 0, or underflow: finite losses, gradients that are finite and never wrong in sign."""
    x, y = jnp.array([[50.0, 0.0, -3.0], [2.0, 0.5, -300.0]]), jnp.array([0, 0])
    f = jax.value_and_grad(lambda x: PSL(x, y, activation=activation, temperature=0.2).sum())
    value, gradient = f(x)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
    assert jnp.all(gradient[:, 0] <= 0) and jnp.all(gradient[:, 1:] >= 0)
    if activation != "tanh":  # nothing is left to gain
        np.testing.assert_array_equal(gradient[0], 0)
        close(PSL(x, y, activation=activation)[0], np.log(1e-30) + np.log(2), 1e-5)


@kinds
def test_the_weight_of_softmax_loss_at_k_has_a_gradient_and_its_quantile_has_none(kind, x64):
    x, y = random_rows()
    y = jnp.minimum(y, 5)
    options, where = dict(temperature=0.5, weight_temperature=0.7), jnp.arange(7) < 6
    x = x.at[:, 6].set(1e3)  # absent
    beta = jax.lax.top_k(x[:, :6], 3)[0][:, -1]

    def by_hand(x):
        score = x[jnp.arange(5), y]
        return jax.nn.sigmoid((score - beta) / 0.7) * SL(x[:, :6], y, temperature=0.5)

    def contract(f):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.arange(1.0, 6.0) * f(x))))

    expected = contract(by_hand)(x)
    for quantile in (dict(k=3), dict(quantile=beta)):
        f = lambda x, q=quantile: SL_AT_K(logits_of(x, kind), y, where=where, **q, **options)
        for a, b in zip(contract(f)(x), expected):
            close(a, b, 1e-12)
    given = lambda beta: jnp.sum(SL_AT_K(x, y, quantile=beta, **options))
    np.testing.assert_array_equal(jax.jit(jax.grad(given))(beta), 0)


def test_softmax_loss_at_k_of_rows_with_fewer_than_k_items():
    x, y = random_rows(np.float32)
    close(SL_AT_K(x, y, k=8), SL(x, y))
    where = jnp.arange(7) < 6
    y = jnp.minimum(y, 5)
    f = lambda t: SL_AT_K(x, y, k=7, weight_temperature=t, where=where).sum()
    value, gradient = jax.value_and_grad(f)(1.0)
    close(value, SL(x, y, where=where).sum(), 1e-5)
    assert gradient == 0


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (PSL, ["temperature"]),
        (SL, ["temperature"]),
        (BSL, ["positive_temperature", "negative_temperature"]),
        (SL_AT_K, ["temperature", "weight_temperature"]),
    ],
    ids=["psl", "sl", "bsl", "sl_at_k"],
)
def test_temperatures_have_gradients(loss, names, x64):
    x, y = random_rows()
    weights, k = jnp.arange(1.0, 6.0), dict(k=3) if loss is SL_AT_K else {}

    def f(at):
        return jnp.sum(weights * loss(logits_of(x, "streamed"), y, **k, **dict(zip(names, at))))

    f = jax.jit(jax.value_and_grad(f))
    at, step = jnp.array([0.7, 0.4])[: len(names)], 1e-5
    for i, gradient in enumerate(f(at)[1]):
        slope = (f(at.at[i].add(step))[0] - f(at.at[i].add(-step))[0]) / (2 * step)
        np.testing.assert_allclose(gradient, slope, rtol=1e-6)


@pytest.mark.parametrize("loss", [PSL, SL, BSL, SL_AT_K])
def test_an_ignored_example_with_a_quantile_of_nan(loss):
    x, y = random_rows(np.float32)
    x, y = x.at[1].set(jnp.nan), y.at[1].set(-100)
    options = dict(quantile=jnp.zeros(5).at[1].set(jnp.nan)) if loss is SL_AT_K else {}
    value, gradient = jax.value_and_grad(lambda x: loss(x, y, **options).sum())(x)
    assert jnp.isfinite(value) and jnp.all(gradient[1] == 0) and jnp.all(jnp.isfinite(gradient))


def test_a_masked_label_and_no_negatives():
    x, y = random_rows(np.float32)
    for loss in (PSL, SL, BSL, SL_AT_K):
        np.testing.assert_array_equal(loss(x, y, where=jnp.arange(7) != y[:, None]), jnp.inf)
        np.testing.assert_array_equal(loss(x, y, where=jnp.arange(7) == y[:, None]), 0)


# --- lists with graded relevance -------------------------------------------------------------------------------

LISTS = {
    "list_mle": losses.list_mle_loss,
    "logistic": losses.pairwise_logistic_loss,
    "hinge": functools.partial(losses.pairwise_logistic_loss, kind="hinge", margin=0.7),
    "ndcg": losses.approx_ndcg_loss,
    "ndcg-soft": functools.partial(losses.approx_ndcg_loss, temperature=1.0),
}
every = pytest.mark.parametrize("name", LISTS)
X = np.array([[0.5, 2.0, -1.0, 0.3, 0.0], [1.0, -0.5, 0.25, 0.1, -2.0], [0.2, 0.4, 0.1, 1.5, 0.7]])
RELEVANCE = np.array([[1, 2, 0, 2, 0], [0, 3, 1, 1, 4], [2, 0, 1, 0, 0]])
WHERE = np.array([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], bool)


def naive(name, x, relevance):
    """The definitions, written with loops."""
    n = len(x)
    if name == "list_mle":
        order = sorted(range(n), key=lambda i: (-relevance[i], i))
        return sum(np.log(sum(np.exp(x[j]) for j in order[at:])) - x[i] for at, i in enumerate(order))
    if name in ("logistic", "hinge"):
        leads = [x[i] - x[j] for i, j in itertools.permutations(range(n), 2) if relevance[i] > relevance[j]]
        per_pair = [np.log1p(np.exp(-d)) if name == "logistic" else max(0, 0.7 - d) for d in leads]
        return np.mean(per_pair) if leads else 0.0
    temperature = 0.1 if name == "ndcg" else 1.0
    ranks = [
        1 + sum(1 / (1 + np.exp((x[i] - x[j]) / temperature)) for j in range(n) if j != i) for i in range(n)
    ]
    gains = 2.0**relevance - 1
    ideal = sum(g / np.log2(2 + i) for i, g in enumerate(sorted(gains, reverse=True)))
    return 1 - sum(g / np.log2(1 + r) for g, r in zip(gains, ranks)) / ideal if ideal else 0.0


@every
def test_lists_follow_their_definitions(name, x64):
    f = LISTS[name]
    close(f(X, RELEVANCE), [naive(name, x, r) for x, r in zip(X, RELEVANCE)], 1e-12)
    expected = [naive(name, x[w], r[w]) for x, r, w in zip(X, RELEVANCE, WHERE)]
    close(f(X, RELEVANCE, where=WHERE), expected, 1e-12)
    close(
        f(X, RELEVANCE.astype(float), where=WHERE, weights=np.array([1.0, 0.5, 0.0])),
        expected * np.array([1, 0.5, 0]),
        1e-12,
    )


@every
def test_lists_jit_vmap_axis_and_order(name, x64):
    f = LISTS[name]
    expected = f(X, RELEVANCE)
    close(jax.jit(f)(X, RELEVANCE), expected, 1e-12)
    close(jax.vmap(f)(X, RELEVANCE), expected, 1e-12)
    close(f(X.T, RELEVANCE.T, axis=0), expected, 1e-12)
    close(f(X[:, None], RELEVANCE[:, None]), expected[:, None], 1e-12)
    close(f(X + 7.0, RELEVANCE), expected, 1e-12)
    distinct = np.argsort(RELEVANCE, axis=-1, kind="stable")  # no ties, whose order would matter
    order = np.array([3, 0, 4, 1, 2])
    close(f(X[:, order], distinct[:, order]), f(X, distinct), 1e-12)


@every
def test_lists_have_the_right_derivatives(name, x64):
    """First and second, against finite differences."""
    weights, step = jnp.array([1.0, -2.0, 0.5]), 1e-5
    direction = jnp.asarray(np.random.default_rng(1).normal(size=X.shape))

    def f(x, where):
        return jnp.sum(weights * LISTS[name](x, RELEVANCE, where=where))

    g = jax.jit(jax.value_and_grad(f))
    for where in (np.ones_like(WHERE), WHERE):
        (low, g_low), (high, g_high), (_, gradient) = (g(X + t * direction, where) for t in (-step, step, 0))
        np.testing.assert_allclose(jnp.vdot(gradient, direction), (high - low) / (2 * step), rtol=1e-7)
    curvature = jax.jit(lambda x: jax.jvp(jax.grad(lambda x: f(x, WHERE)), (x,), (direction,))[1])(X)
    close(curvature, (g_high - g_low) / (2 * step), 1e-7)


@every
def test_masked_items_are_absent(name, x64):
    f = LISTS[name]

    def total(x, relevance):
        return jnp.sum(jnp.array([1.0, -2.0, 0.5]) * f(x, relevance, where=WHERE))

    g = jax.jit(jax.value_and_grad(total))
    value, gradient = g(X, RELEVANCE.astype(float))
    for junk in (np.nan, np.inf, 1e30):
        spoiled = g(np.where(WHERE, X, junk), np.where(WHERE, RELEVANCE, junk))
        close(spoiled[0], value, 1e-12)
        close(spoiled[1], gradient, 1e-12)
        assert np.all(np.asarray(spoiled[1])[~WHERE] == 0)


@every
def test_lists_in_which_nothing_can_be_learned(name):
    f = LISTS[name]

    def check(x, relevance, **options):
        total = jax.jit(jax.value_and_grad(lambda x: jnp.sum(f(x, relevance, **options))))
        value, gradient = total(jnp.asarray(x))
        assert value == 0 and jnp.all(gradient == 0)

    check(np.full((1, 2), np.nan, np.float32), RELEVANCE[:1, :2], where=np.zeros((1, 2), bool))
    check(np.full((1, 2), -np.inf, np.float32), RELEVANCE[:1, :2])
    check(np.ones((2, 1), np.float32), np.array([[2], [0]]))
    assert f(jnp.zeros((2, 0)), np.zeros((2, 0))).shape == (2,)
    if name != "list_mle":  # which ranks equals by their index
        check(np.float32(X), np.zeros_like(RELEVANCE))


@every
def test_lists_of_half_precision_and_of_huge_scores(name):
    f = jax.jit(LISTS[name])
    low = jnp.asarray(X, jnp.bfloat16)
    assert f(low, RELEVANCE).dtype == jnp.float32
    close(f(low, RELEVANCE), f(low.astype(jnp.float32), RELEVANCE))
    gradient = jax.grad(lambda x: f(x, RELEVANCE).sum())(low)
    assert gradient.dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(gradient))
    for offset in (1e4, -1e4):
        x = jnp.float32(X) + jnp.float32(offset)
        close(f(x, RELEVANCE), f(x - offset, RELEVANCE), 3e-6)
    spread = 1e4 * jnp.float32(X)
    assert jnp.all(jnp.isfinite(f(spread, RELEVANCE)))
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: f(x, RELEVANCE).sum())(spread)))


def test_limits_of_the_lists(x64):
    """One relevant item: ListMLE begins with its cross-entropy. Hard ranks: ApproxNDCG is 1 - NDCG."""
    first = np.argmax(RELEVANCE.max(-1, keepdims=True) == RELEVANCE, axis=-1)
    x = X[0]
    rest = np.delete(x, first[0])
    whole = losses.list_mle_loss(x, RELEVANCE[0])
    without = losses.list_mle_loss(rest, np.delete(RELEVANCE[0], first[0]))
    close(whole - without, losses.cross_entropy(x, jnp.asarray(first[0])), 1e-12)
    metrics = pytest.importorskip("sklearn.metrics")
    exact = [1 - metrics.ndcg_score([2.0**r - 1], [x]) for x, r in zip(X, RELEVANCE)]
    close(losses.approx_ndcg_loss(X, RELEVANCE, temperature=1e-4), exact, 1e-12)
    perfect = losses.approx_ndcg_loss(RELEVANCE * 1.0, RELEVANCE * 1.0, temperature=1e-3)
    close(perfect[1:2], [0], 0.1)  # ties of relevance stay half-ordered


def test_against_torch(x64):
    torch = pytest.importorskip("torch")
    x, y = random_rows()
    t = torch.tensor(np.asarray(x))
    score = t[torch.arange(5), torch.tensor(np.asarray(y))]
    others = t.masked_fill(torch.nn.functional.one_hot(torch.tensor(np.asarray(y)), 7).bool(), -torch.inf)
    d = others - score[:, None]
    close(SL(x, y, temperature=0.3), torch.logsumexp(d / 0.3, -1), 1e-12)
    tanh = (1 + torch.tanh(d)) ** (1 / 0.3)
    close(PSL(x, y, temperature=0.3), torch.log(tanh.nansum(-1)), 1e-12)


@every
def test_bad_input_of_the_lists(name):
    f = LISTS[name]
    x, r = np.float32(X), RELEVANCE

    def refuses(kind, words, *args, **options):
        fails(words, kind, lambda: f(*args, **options))

    streamed = jaxsoft.linear_logits(np.ones((3, 2), np.float32), np.ones((2, 5), np.float32))
    refuses(TypeError, ["whole list", "logits.dense()"], streamed, r)
    refuses(TypeError, ["int64", "floating"], r, r)
    refuses(ValueError, ["relevance", "(3, 5)", "(5,)"], x, r[0])
    refuses(TypeError, ["relevance", "numbers", "bool"], x, WHERE)
    refuses(TypeError, ["relevance", "list"], x, r.tolist())
    refuses(ValueError, ["where", "(3, 5)", "(3,)"], x, r, where=WHERE[:, 0])
    refuses(TypeError, ["where", "boolean"], x, r, where=x)
    refuses(ValueError, ["weights", "(3,)", "(5,)"], x, r, weights=x[0])
    refuses(TypeError, ["weights", "real numbers"], x, r, weights=1j * r[:, 0])
    refuses(ValueError, ["axis", "[-2, 2)"], x, r, axis=2)


def test_bad_options_of_the_lists():
    x, r = np.float32(X), RELEVANCE
    with pytest.raises(ValueError, match=r"kind must be one of 'logistic', 'hinge', got 'log'"):
        losses.pairwise_logistic_loss(x, r, kind="log")
    with pytest.raises(ValueError, match=r"margin must be a number > 0, got 0\.0"):
        losses.pairwise_logistic_loss(x, r, kind="hinge", margin=0.0)
    with pytest.raises(ValueError, match=r"temperature must be a number > 0, got -1\.0"):
        losses.approx_ndcg_loss(x, r, temperature=-1.0)
