"""Losses for wrong labels and for adversarial examples: numbers, limits, definitions, gradients, edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, jacobian, streamed

import jaxsoft
from jaxsoft import losses

A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]
ADVERSARIAL = [1.6, 1.2, 0.0, -0.8, 0.6]  # of A
CE, COMP_SUM, GCE = losses.cross_entropy, losses.comp_sum_loss, losses.generalized_cross_entropy
MAE, RCE, SCE = losses.mean_absolute_error_loss, losses.reverse_cross_entropy, losses.symmetric_cross_entropy
NORMALIZED, APL = losses.normalized_loss, losses.active_passive_loss
SMOOTH, TRADES, SCORE = (
    losses.smooth_adversarial_comp_sum_loss,
    losses.trades_loss,
    losses.adversarial_brier_loss,
)
LOG_FLOOR = -np.log(1e-4)


def example(rows=4, columns=6, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(rows, columns)) * 2), jnp.asarray(rng.integers(0, columns, rows))


NUMBERS = [  # loss, options, value on A with label 0, value on B with label 3
    (COMP_SUM, dict(tau=0.0), 0.790365, None),
    (COMP_SUM, dict(tau=0.5), 0.676091, None),
    (COMP_SUM, {}, 0.582420, 1.393958),
    (COMP_SUM, dict(tau=1.5), 0.505282, None),
    (COMP_SUM, dict(tau=2.0), 0.441455, None),
    (GCE, {}, 0.478311, None),
    (MAE, {}, 0.441455, 1 - 0.248092),
    (RCE, {}, 4.065949, None),
    (SCE, {}, 4.124191, None),
    (NORMALIZED, {}, 0.056479, 0.139818),
    (NORMALIZED, dict(loss="generalized"), 0.095272, None),
    (NORMALIZED, dict(loss="focal"), 0.040082, None),
    (NORMALIZED, dict(loss="mae"), 0.441455 / 4, 0.751908 / 4),
    (NORMALIZED, dict(loss="reverse"), 0.441455 / 4, 0.751908 / 4),
    (APL, {}, 0.497934, None),
    (APL, dict(passive="reverse"), 4.122428, None),
]


@pytest.mark.parametrize("kind", [jnp.asarray, streamed])
def test_worked_numbers(kind, x64):
    rows = jnp.array([A, B])
    values = jax.jit(lambda x: [loss(kind(x), jnp.array([0, 3]), **o) for loss, o, *_ in NUMBERS])(rows)
    for value, (_, _, a, b) in zip(values, NUMBERS):
        close(value[0], a)
        if b is not None:
            close(value[1], b)
    x, x2, y = rows[:1], jnp.array([ADVERSARIAL]), jnp.array([0])
    smooth, rest, trades = jax.jit(
        lambda x, x2: (
            SMOOTH(kind(x), kind(x2), y),
            SMOOTH(kind(x), kind(x2), y, nu=0.0),
            TRADES(kind(x), kind(x2), y),
        )
    )(x, x2)
    close(smooth, [1.611983])
    close(smooth - rest, [1.029563])
    close(trades, [0.801120])


def test_limits_and_identities(x64):
    x, y = example()
    values = jax.jit(
        lambda x: [
            jacobian(f, x)
            for f in (
                lambda x: CE(x, y),
                lambda x: COMP_SUM(x, y),
                lambda x: GCE(x, y, q=0.0),
                lambda x: SCE(x, y, alpha=1.0, beta=0.0),
                lambda x: COMP_SUM(x, y, tau=1.7),
                lambda x: GCE(x, y),
                lambda x: COMP_SUM(x, y, tau=2.0),
                lambda x: GCE(x, y, q=1.0),
                lambda x: MAE(x, y),
                lambda x: RCE(x, y) / LOG_FLOOR,
                lambda x: SMOOTH(x, x + 3.0, y, tau=2.0),
                lambda x: NORMALIZED(x, y),
                lambda x: NORMALIZED(x, y, loss="focal", gamma=0.0),
            )
        ]
    )(x)
    groups = [(0, 1, 2, 3), (4, 5), (6, 7, 8, 9, 10), (11, 12)]
    for first, *others in groups:
        for i in others:
            close(values[i][0], values[first][0], 1e-13)
            close(values[i][1], values[first][1], 1e-13)
    u = jnp.sum(jnp.exp(x - jnp.take_along_axis(x, y[:, None], 1)), -1) - 1
    close(COMP_SUM(x, y, tau=0.0) / u, np.ones(4), 1e-12)
    # towards the limits without a loss of precision, in float32
    x = x.astype(jnp.float32)
    np.testing.assert_allclose(GCE(x, y, q=1e-7), CE(x, y), rtol=1e-6)
    np.testing.assert_allclose(COMP_SUM(x, y, tau=1 - 1e-6), CE(x, y), rtol=1e-5)


def test_gradients_in_closed_form(x64):
    """phi'(l) (p - e_y), and for NCE (p - e_y) / D - (l / D^2) (C p - 1)."""
    x, y = example(seed=1)
    onehot, p = jax.nn.one_hot(y, 6), jax.nn.softmax(x)
    p_y = jnp.sum(p * onehot, -1, keepdims=True)
    nll, base = -jnp.log(p_y), p - onehot
    total = 6 * jax.nn.logsumexp(x, -1, keepdims=True) - jnp.sum(x, -1, keepdims=True)
    nce = base / total - nll / total**2 * (6 * p - 1)
    cases = [
        (lambda x: GCE(x, y, q=0.4), p_y**0.4 * base),
        (lambda x: MAE(x, y), p_y * base),
        (lambda x: RCE(x, y, label_floor=1e-2), -np.log(1e-2) * p_y * base),
        (lambda x: COMP_SUM(x, y, tau=0.3), p_y**-0.7 * base),
        (lambda x: COMP_SUM(x, y, tau=3.0), p_y**2 * base),
        (lambda x: SCE(x, y, alpha=0.3, beta=0.2), (0.3 + 0.2 * LOG_FLOOR * p_y) * base),
        (lambda x: NORMALIZED(x, y), nce),
        (lambda x: NORMALIZED(x, y, loss="mae"), p_y * base / 5),
        (lambda x: APL(x, y, alpha=2.0, beta=0.5), 2 * nce + 0.5 * p_y * base),
    ]
    gradients = jax.jit(lambda x: [jacobian(f, x)[1] for f, _ in cases])(x)
    for g, (_, expected) in zip(gradients, cases):
        close(g, expected, 1e-12)


FORMS = {
    "cross_entropy": lambda nll: nll,
    "focal": lambda nll: (1 - jnp.exp(-nll)) ** 0.75 * nll,
    "generalized": lambda nll: (1 - jnp.exp(-0.3 * nll)) / 0.3,
    "mae": lambda nll: 1 - jnp.exp(-nll),
    "reverse": lambda nll: LOG_FLOOR * (1 - jnp.exp(-nll)),
}


@pytest.mark.parametrize("name", FORMS)
def test_normalized_losses_are_quotients(name, x64):
    """By the definition, with classes masked, dense and streamed; over all labels they add up to 1."""
    x, y = example(seed=2)
    where = (jnp.arange(6) != 4) | (jnp.arange(4) == 0)[:, None]
    y = jnp.where(y == 4, 3, y)
    options = dict(loss=name, q=0.3, gamma=0.75)

    def plain(x):
        terms = FORMS[name](-jax.nn.log_softmax(jnp.where(where, x, -1e4)))
        terms = jnp.where(where, terms, 0)
        return jnp.take_along_axis(terms, y[:, None], 1)[:, 0] / jnp.sum(terms, -1)

    def run(x):
        all_labels = jax.vmap(lambda c: NORMALIZED(x, jnp.full(4, c), **options))(jnp.arange(6))
        return (
            jacobian(plain, x),
            jacobian(lambda x: NORMALIZED(x, y, where=where, **options), x),
            jacobian(lambda x: NORMALIZED(streamed(x), y, where=where, **options), x),
            jnp.sum(all_labels, 0),
        )

    expected, dense, lazy, sums = jax.jit(run)(x)
    for got in (dense, lazy):
        close(got[0], expected[0], 1e-12)
        close(got[1], expected[1], 1e-12)
    close(sums, np.ones(4), 1e-12)


def test_the_absolute_errors_of_all_labels_are_constant(x64):
    x, _ = example(seed=3)
    values = jax.vmap(lambda c: MAE(x, jnp.full(4, c)))(jnp.arange(6))
    close(jnp.sum(values, 0), np.full(4, 5.0), 1e-12)


def test_traced_hyper_parameters_and_their_derivatives(x64):
    x, y = example(seed=4)
    weights = jnp.arange(1.0, 5.0)
    cases = [
        (lambda t: weights @ COMP_SUM(x, y, tau=t), [0.4, 1.0, 1.6]),
        (lambda q: weights @ GCE(x, y, q=q), [1e-3, 0.7]),
        (lambda q: weights @ NORMALIZED(x, y, loss="generalized", q=q), [0.4]),
        (lambda g: weights @ NORMALIZED(x, y, loss="focal", gamma=g), [0.5]),
        (lambda f: weights @ APL(x, y, passive="reverse", label_floor=f), [1e-2]),
        (lambda b: weights @ SCE(x, y, alpha=b, beta=2 * b), [0.3]),
        (lambda n: weights @ SMOOTH(x, jnp.sin(x), y, nu=n), [0.3]),
    ]
    step = 1e-5
    for f, points in cases:
        at = jnp.array(points)
        values, slopes = jax.jit(jax.vmap(jax.value_and_grad(f)))(
            jnp.stack([at - step, at, at + step]).ravel()
        )
        values, slopes = values.reshape(3, -1), slopes.reshape(3, -1)
        np.testing.assert_allclose(slopes[1], (values[2] - values[0]) / (2 * step), rtol=1e-5)


def test_large_losses_stay_finite():
    x = jnp.array([[0.0, 300.0], [0.0, 3000.0], [0.0, 1e4]])
    y = jnp.zeros(3, int)
    every = [COMP_SUM, lambda x, y: COMP_SUM(x, y, tau=0.0), GCE, MAE, RCE, SCE, NORMALIZED, APL]
    every.append(lambda x, y: NORMALIZED(x, y, loss="focal"))
    run = jax.jit(lambda x: [jacobian(lambda x, loss=loss: loss(x, y), x) for loss in every])
    wrong = run(x)
    for i, expected in ((2, 1 / 0.7), (3, 1), (4, LOG_FLOOR), (6, 1), (7, 2), (8, 1)):
        close(wrong[i][0], np.full(3, expected), 1e-5)
    close(jnp.log(wrong[1][0]), np.full(3, 80.0), 1e-4)
    close(wrong[5][0], np.array([30.0, 300, 1000]) + LOG_FLOOR, 1e-3)
    for i in (1, 2, 3, 4):  # bounded, or held at a bound
        assert not jnp.any(wrong[i][1])
    right = run(-x)
    for value, _ in right:
        close(value, np.zeros(3))
    assert all(jnp.all(jnp.isfinite(g)) for _, g in wrong + right)


def test_gradients_of_unlikely_labels_do_not_cancel():
    """The gradient of `(1 - p^q) / q` is `p^q` times that of the negative log-likelihood, however small."""
    x, q = jnp.array([[0.0, 5.0], [0.0, 20.0], [0.0, 40.0]]), 0.7
    _, gradient = jacobian(lambda x: GCE(x, jnp.zeros(3, int), q=q), x)
    p = jax.nn.softmax(x)
    np.testing.assert_allclose(gradient[:, 0], -(p[:, 0] ** q) * p[:, 1], rtol=1e-5)


# Every loss, as a function of logits and labels; those of two rows of logits take the second from the first.
EVERY = {
    "comp_sum": lambda x, y, **o: COMP_SUM(x, y, tau=1.5, **o),
    "exponential": lambda x, y, **o: COMP_SUM(x, y, tau=0.5, **o),
    "gce": GCE,
    "mae": MAE,
    "rce": RCE,
    "sce": SCE,
    **{f"normalized-{name}": lambda x, y, name=name, **o: NORMALIZED(x, y, loss=name, **o) for name in FORMS},
    "apl": APL,
    "smooth": lambda x, y, **o: SMOOTH(x, jnp.flip(x, 0), y, **o),
    "trades": lambda x, y, **o: TRADES(x, jnp.flip(x, 0), y, **o),
}


@pytest.mark.parametrize("name", EVERY)
def test_absent_labels_single_classes_and_empty_rows(name):
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)), jnp.float32)
    y = jnp.array([0, 1, 2, 0])
    where = jnp.array([[True, True, True], [True, False, True], [False, False, True], [False] * 3])
    if name in ("smooth", "trades"):  # two rows of logits that mirror each other
        where = jnp.broadcast_to(where[1:2], (4, 3)).at[3].set(False)
        y = jnp.array([0, 1, 2, 0])
    spoiled = jnp.where(where | jnp.flip(where, 0), x, jnp.nan)

    @jax.jit
    def run(x):
        return jacobian(lambda x: EVERY[name](x, y, where=where), x)

    value, g = run(spoiled)
    assert jnp.all(jnp.isfinite(value[jnp.array([0, 2, 3])])) and value[3] == 0
    assert jnp.isposinf(value[1])
    if name not in ("smooth", "trades"):
        assert value[2] == 0
        assert not jnp.any(g[1:]), g
    assert jnp.all(jnp.isfinite(g))


@pytest.mark.parametrize("loss", [SMOOTH, TRADES, SCORE])
def test_two_rows_of_logits(loss, x64):
    """By the definition, with gradients for both; both expressions, or the second one."""
    (x, y), (x2, _) = example(seed=6), example(seed=7)
    where = jnp.arange(6) != (y[:, None] + 2) % 6
    cotangent = jnp.array([1.0, -2.0, 0.5, 3.0])

    def plain(x, x2):
        log_p, log_q = (jax.nn.log_softmax(jnp.where(where, a, -1e4)) for a in (x, x2))
        p, q, onehot = jnp.exp(log_p), jnp.exp(log_q), jax.nn.one_hot(y, 6)
        nll = -jnp.sum(onehot * log_p, -1)
        if loss is TRADES:
            return nll + 2 * jnp.sum(jnp.where(where, p * (log_p - log_q), 0), -1)
        if loss is SCORE:
            return jnp.sum((p - onehot) ** 2, -1) + 2 * jnp.sum((p - q) ** 2, -1)
        margins = [jnp.sum(onehot * a, -1, keepdims=True) - a for a in (x, x2)]
        squares = jnp.where(where, (margins[0] - margins[1]) ** 2, 0)
        return nll + 2 * jnp.sqrt(jnp.sum(squares, -1))

    options = {"nu" if loss is SMOOTH else "beta": 2.0}

    def run(x, x2):
        def of(first, second):
            f = lambda x, x2: loss(first(x), second(x2), y, where=where, **options)
            values, pullback = jax.vjp(f, x, x2)
            return values, *pullback(cotangent)

        values, pullback = jax.vjp(plain, x, x2)
        kinds = [(streamed, streamed), (jnp.asarray, streamed)]  # the others by the laws of all losses
        return (values, *pullback(cotangent)), [of(*kind) for kind in kinds]

    expected, results = jax.jit(run)(x, x2)
    for got in results:
        for a, b in zip(got, expected):
            close(a, b, 1e-11)
    # NaN among masked classes of either row, and in ignored examples
    spoiled = (
        jnp.where(where, x, jnp.nan).at[1].set(jnp.nan),
        jnp.where(where, x2, jnp.nan).at[1].set(jnp.nan),
    )
    labels = y.at[1].set(-100)
    f = lambda x, x2: loss(x, x2, labels, where=where, **options)
    values, pullback = jax.jit(lambda *a: jax.vjp(f, *a))(*spoiled)
    gradients = pullback(cotangent)
    close(values, expected[0].at[1].set(0), 1e-11)
    for g, h in zip(gradients, expected[1:]):
        close(g, h.at[1].set(0), 1e-11)
    # another axis; leading axes
    values = loss(x.T[:, None], x2.T[:, None], y[None], axis=0, where=where.T[:, None], **options)
    close(values, expected[0][None], 1e-11)


@pytest.mark.parametrize("loss", [SMOOTH, TRADES, SCORE])
def test_equal_rows_and_lacking_classes(loss):
    x, y = example(seed=8)
    x, option = x.astype(jnp.float32), "nu" if loss is SMOOTH else "beta"

    @jax.jit
    def run(x, x2, coefficient, where):
        values, pullback = jax.vjp(lambda *a: loss(*a, y, where=where, **{option: coefficient}), x, x2)
        return values, *pullback(jnp.ones(4))

    every = jnp.ones((4, 6), bool)
    # The perturbation did nothing: the value and gradient of the first term alone, no gradient for the second.
    first = run(x, x, 0.0, every)
    for a, b in zip(run(x, x, 5.0, every), first):
        close(a, b)
    assert jnp.all(first[0] > 0) and jnp.any(first[1] != 0) and not jnp.any(first[2])
    # A class, or the label, that the second row lacks, which costs the Brier score no more than its mass; a class that
    # both lack, or that is masked
    other = jnp.flip(x, 1)
    column = (jnp.arange(6) == (y[0] + 1) % 6) & (jnp.arange(4) == 0)[:, None]
    lacking = jnp.where(column, -jnp.inf, other)
    for coefficient in (0.0, 5.0):
        values, *gradients = run(x, lacking.at[1, y[1]].set(-jnp.inf), coefficient, every)
        costs = loss is not SCORE
        np.testing.assert_array_equal(jnp.isposinf(values), [costs, costs, False, False])
        assert all(jnp.all(jnp.isfinite(g)) and (not costs or not jnp.any(g[:2])) for g in gradients)
    absent = run(jnp.where(column, -jnp.inf, x), lacking, 5.0, every)
    for a, b in zip(absent, run(x, other, 5.0, ~column)):
        assert jnp.all(jnp.isfinite(a))
        close(a, b)


@pytest.mark.parametrize("loss", [SMOOTH, TRADES, SCORE])
def test_adversarial_logits_that_do_not_fit(loss):
    x, y = jnp.ones((4, 6)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"adversarial_logits must have shape \(4, 6\).*\(4, 5\)"):
        loss(x, x[:, :5], y)
    with pytest.raises(TypeError, match=r"adversarial_logits must be an array of floating dtype.*int32"):
        loss(x, x.astype(jnp.int32), y)
    with pytest.raises(ValueError, match="axis must be -1 for linear_logits"):
        loss(x.T, jaxsoft.linear_logits(jnp.ones((6, 2)), jnp.ones((2, 4))), y, axis=0)


def test_trades_of_torch(x64):
    torch = pytest.importorskip("torch")
    (x, y), (x2, _) = example(seed=10), example(seed=11)
    t, t2 = (torch.tensor(np.asarray(a), requires_grad=True) for a in (x, x2))
    f = torch.nn.functional
    divergence = f.kl_div(f.log_softmax(t2, -1), f.softmax(t, -1), reduction="none").sum(-1)
    loss = f.cross_entropy(t, torch.tensor(np.asarray(y)), reduction="none") + 6 * divergence
    weights = np.array([1.0, -2.0, 0.5, 3.0])
    (loss * torch.tensor(weights)).sum().backward()
    ours = jax.jit(jax.value_and_grad(lambda x, x2: weights @ TRADES(x, x2, y), argnums=(0, 1)))(x, x2)
    close(ours[0], weights @ loss.detach().numpy(), 1e-11)
    close(ours[1][0], t.grad.numpy(), 1e-11)
    close(ours[1][1], t2.grad.numpy(), 1e-11)
