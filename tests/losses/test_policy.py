"""Losses of reinforcement learning on sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from jax.test_util import check_grads

import jaxsoft
from jaxsoft import losses

RNG = np.random.default_rng(0)
# t = p / q -> f(t), f'(t)
F = {
    "reverse_kl": (lambda t: t * np.log(t), lambda t: np.log(t) + 1),
    "forward_kl": (lambda t: -np.log(t), lambda t: -1 / t),
    "jensen_shannon": (
        lambda t: t * np.log(2 * t / (1 + t)) + np.log(2 / (1 + t)),
        lambda t: np.log(2 * t / (1 + t)),
    ),
    "alpha": (lambda t: (0.7 * t + 0.3 - t**0.7) / 0.21, lambda t: (1 - t**-0.3) / 0.3),
    "total_variation": (lambda t: abs(t - 1) / 2, lambda t: np.sign(t - 1) / 2),
    "forward_chi_squared": (lambda t: (1 - t) ** 2 / t, lambda t: 1 - t**-2),
    "reverse_chi_squared": (lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1)),
}
kinds = pytest.mark.parametrize("kind", F)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@kinds
def test_f_divergence(kind, x64):
    f, _ = F[kind]
    a, b = log_softmax(RNG.normal(size=(2, 3, 5)))
    p, q = np.exp(a), np.exp(b)
    function = functools.partial(losses.f_divergence, kind=kind, alpha=0.3)
    run = jax.jit(function)
    close(run(a, b), (q * f(p / q)).sum(-1), 1e-12)
    close(function(a[0].T, b[0].T, axis=0), run(a, b)[0], 1e-12)
    close(run(a, a), 0, 1e-14)
    cotangent = jnp.asarray(RNG.normal(size=3))
    check_grads(jax.jit(lambda a, b: jnp.vdot(cotangent, function(a, b))), (a, b), 1)
    # Masks: absent entries hold anything.
    where = jnp.asarray(RNG.random((3, 5)) < 0.6).at[1].set(False)
    masked = jax.jit(jax.value_and_grad(lambda a, b: jnp.sum(function(a, b, where=where)), (0, 1)))
    value, gradients = masked(*(jnp.where(where, c, jnp.nan) for c in (a, b)))
    close(value, np.where(where, q * f(p / q), 0).sum(), 1e-12)
    for g in gradients:
        assert np.all(np.isfinite(g)) and not np.any(np.asarray(g)[~np.asarray(where)])
    # An outcome that one of the two excludes costs the limit of f; one that both exclude nothing.
    p, q = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.6, 0.4, 0.0])
    with np.errstate(divide="ignore"):
        got, gradients = jax.jit(jax.value_and_grad(function, (0, 1)))(jnp.log(p), jnp.log(q))
    assert not np.any(np.isnan(gradients))
    if kind in ("jensen_shannon", "alpha", "total_variation"):
        tiny = 1e-200
        close(got, q[1] * f(p[1] / q[1]) + q[2] * f(tiny) + tiny * f(p[0] / tiny))
        assert np.all(np.isfinite(gradients))
    else:
        assert np.isposinf(got)
    nan = function(jnp.array([jnp.nan, -1.0]), jnp.array([-1.0, -1.0]))
    assert np.isnan(nan)
    low = function(*(jnp.asarray(c, jnp.bfloat16) for c in (a, b)))
    assert low.dtype == jnp.float32


def test_one_sided_limits(x64):
    """Where q is 0, the slope of f at infinity; where p is 0, f(0): by kind."""
    half = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    other = jnp.log(jnp.array([0.5, 0.0, 0.5]))
    only_p = half, jnp.log(jnp.array([1.0, 0.0, 0.0]))
    only_q = only_p[::-1]
    expected = {
        "reverse_kl": (np.inf, np.log(2)),
        "forward_kl": (np.log(2), np.inf),
        "reverse_chi_squared": (np.inf, 1.0),
        "forward_chi_squared": (1.0, np.inf),
    }
    for kind, values in expected.items():
        got = [losses.f_divergence(*pair, kind=kind) for pair in (only_p, only_q)]
        np.testing.assert_allclose(got, values, atol=1e-14)
    close(losses.f_divergence(half, other, kind="jensen_shannon"), np.log(2), 1e-14)
    close(losses.f_divergence(half, other, kind="total_variation"), 0.5, 1e-14)


def test_f_dpg_worked_numbers(x64):
    x = jnp.array([-0.5, 0.3])
    expected = {
        "forward_kl": [-1.648721, -0.740818],
        "reverse_kl": [0.5, 1.3],
        "jensen_shannon": [-0.280930, 0.138792],
        "total_variation": [-0.5, 0.5],
        "forward_chi_squared": 1 - np.exp([1.0, -0.6]),
        "reverse_chi_squared": 2 * np.exp([-0.5, 0.3]) - 2,
    }
    for kind, derivative in expected.items():
        close(losses.f_dpg_reward(x - 2, jnp.full(2, -2.0), divergence=kind), -np.array(derivative))


@kinds
def test_f_dpg_gradient_is_that_of_the_divergence(kind, x64):
    """With every outcome as a sample, weighted by the proposal: exactly the gradient of D_f(pi || p)."""
    logits, target, proposal = (jnp.asarray(RNG.normal(size=7)) for _ in range(3))
    proposal = jaxsoft.log_softmax(proposal)
    log_z = jaxsoft.logsumexp(target)

    @jax.jit
    def estimate(logits, baseline):
        loss = losses.f_dpg_loss(
            jaxsoft.log_softmax(logits),
            target,
            proposal,
            divergence=kind,
            alpha=0.3,
            log_partition=log_z,
            baseline=baseline,
            weights=jnp.exp(proposal),
        )
        return jnp.sum(loss)

    exact = jax.jit(
        jax.grad(lambda z: losses.f_divergence(jaxsoft.log_softmax(z), target - log_z, kind=kind, alpha=0.3))
    )
    for baseline in (0.0, 1.7):  # of no influence on the expectation
        close(jax.grad(estimate)(logits, baseline), exact(logits), 1e-12)
    reward = losses.f_dpg_reward(
        logits, target, divergence=kind, alpha=0.3, log_partition=log_z * jnp.ones(7)
    )
    close(reward, -F[kind][1](np.exp(logits - target + log_z)), 1e-9)
    on_policy = losses.f_dpg_loss(logits, target, divergence=kind, alpha=0.3, log_partition=log_z)
    close(on_policy, -reward * logits, 1e-9)


@kinds
def test_f_dpg_masks_and_excluded_samples(kind):
    where = jnp.array([True, False, True])
    given = jnp.array([-1.0, -2.0, -0.5]), jnp.array([-2.0, -1.0, -3.0]), jnp.array([-1.5, -0.5, -2.0])
    options = dict(divergence=kind, baseline=jnp.array([0.1, jnp.nan, 0.2]))
    run = jax.jit(
        jax.value_and_grad(lambda *a: jnp.sum(losses.f_dpg_loss(*a, where=where, **options)), (0, 1, 2))
    )
    clean, _ = run(*given)
    value, gradients = run(*(jnp.where(where, a, jnp.nan) for a in given))
    close(value, clean)
    assert np.all(np.isfinite(gradients[0])) and gradients[0][1] == 0 and np.all(gradients[0][::2] != 0)
    assert not np.any(gradients[1]) and not np.any(gradients[2])
    # The target excludes the sample.
    excluded = losses.f_dpg_reward(jnp.array(-1.0), jnp.array(-jnp.inf), divergence=kind)
    limit = dict(
        forward_kl=0, jensen_shannon=-np.log(2), alpha=-2, total_variation=-0.5, forward_chi_squared=-1
    )
    if kind in limit:
        close(excluded, limit[kind])
    elif kind == "reverse_kl":
        assert excluded == -np.inf
        clipped = losses.f_dpg_reward(
            jnp.array(-1.0), jnp.array(-jnp.inf), divergence=kind, max_log_ratio=5.0
        )
        close(clipped, -6)
    else:
        assert np.isfinite(excluded) and excluded < -1e30
    assert np.isfinite(losses.f_dpg_reward(jnp.array(-1e4), jnp.array(-1.0), divergence=kind))


# Aggregation.

LOSSES = RNG.normal(size=(2, 3, 6))
WHERE = np.arange(6) < np.array([[6, 1, 3], [0, 2, 4]])[..., None]
COUNT, SUM = WHERE.sum(-1), np.where(WHERE, LOSSES, 0).sum(-1)


def scaled(alpha):
    x = np.where(COUNT > 0, np.maximum(COUNT, 1.0) ** -alpha, 0)
    return (x * SUM).sum(-1) / x.sum(-1)


AGGREGATES = {
    ("delta_l", 1.0): scaled(1.0),
    ("delta_l", 0.75): scaled(0.75),
    ("delta_l", 0.0): SUM.sum(-1) / [3, 2],
    ("token", 1.0): SUM.sum(-1) / COUNT.sum(-1),
    ("sequence", 1.0): (SUM / np.maximum(COUNT, 1)).sum(-1) / [3, 2],
    ("sequence_sum", 1.0): SUM.sum(-1) / [3, 2],
    ("constant", 1.0): SUM.sum(-1) / [30, 20],
}


@pytest.mark.parametrize(("mode", "alpha"), AGGREGATES)
def test_length_weighted_mean(mode, alpha):
    function = functools.partial(losses.length_weighted_mean, mode=mode, alpha=alpha, max_length=10)
    expected = AGGREGATES[mode, alpha]
    x = jnp.asarray(np.where(WHERE, LOSSES, np.nan), jnp.float32)
    where = jnp.asarray(WHERE)

    @jax.jit
    def run(x, where):
        total = lambda x: jnp.sum(jnp.array([1.0, -2.0]) * function(x, where=where))
        return (
            function(x, where=where),
            jax.grad(total)(x),
            jax.vmap(lambda x, w: function(x, where=w))(x, where),
        )

    value, gradient, mapped = run(x, where)
    close(value, expected)
    close(mapped, expected)
    close(jnp.sum(jnp.where(where, gradient * LOSSES, 0), (1, 2)), expected * [1, -2], 1e-5)  # it is linear
    assert not np.any(np.asarray(gradient)[~WHERE])
    value, gradient, _ = run(jnp.full_like(x, jnp.nan), jnp.zeros_like(where))
    assert not np.any(value) and not np.any(gradient)
    assert function(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32


def test_length_weighted_mean_worked_numbers(x64):
    where = jnp.arange(40) < jnp.array([[10], [20], [40]])
    weights = [[0.513306, 0.305213, 0.181481], [0.571429, 0.285714, 0.142857]]
    for alpha, expected in zip((0.75, 1.0), weights):
        function = functools.partial(losses.length_weighted_mean, where=where, alpha=alpha)
        gradient = jax.jit(jax.grad(function))(jnp.ones((3, 40)))
        close(gradient[:, 0], expected)
    close(losses.length_weighted_mean(jnp.ones((3, 40)), where=where, mode="constant"), 70 / 120, 1e-12)
    equal = jnp.asarray(RNG.normal(size=(3, 5)))
    for mode in ("token", "sequence", "constant"):  # with equal lengths these are the mean
        close(losses.length_weighted_mean(equal, mode=mode), equal.mean(), 1e-14)


# Policy gradients.

LOG_PROB, OLD = -RNG.exponential(size=(2, 4, 5)), -RNG.exponential(size=(2, 4, 5))
ADVANTAGES = RNG.normal(size=(2, 4, 1))
TOKENS = RNG.random((2, 4, 5)) < 0.7


def ppo(low, high, dual):
    def loss(new, old, a):
        ratio = np.exp(new - old)
        values = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high))
        return np.where(a < 0, np.minimum(values, -a * dual), values)

    return loss


def cispo(new, old, a):
    return -np.minimum(np.exp(new - old), 1.5) * a * new


CASES = {
    "ppo": (losses.clipped_policy_loss, ppo(0.2, 0.2, 3)),
    "asymmetric": (
        functools.partial(losses.clipped_policy_loss, clip_low=0.3, clip_high=0.1, dual_clip=1.5),
        ppo(0.3, 0.1, 1.5),
    ),
    "no bound": (functools.partial(losses.clipped_policy_loss, dual_clip=None), ppo(0.2, 0.2, np.inf)),
    "cispo": (functools.partial(losses.cispo_loss, cap=1.5), cispo),
}
every = pytest.mark.parametrize("name", CASES)


@every
def test_policy_gradients(name, x64):
    loss, formula = CASES[name]
    given = [jnp.asarray(a) for a in (LOG_PROB, OLD, ADVANTAGES)]
    expected = formula(LOG_PROB, OLD, ADVANTAGES)
    close(jax.jit(loss)(*given), expected, 1e-12)
    close(jax.vmap(loss)(*given), expected, 1e-12)
    close(jax.jit(loss)(*given[:2], given[2] * jnp.ones(5)), expected, 1e-12)
    cotangent = jnp.asarray(RNG.normal(size=LOG_PROB.shape))
    total = jax.jit(lambda *a: jnp.vdot(cotangent, loss(*a)))
    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(*given)
    assert np.any(gradients[0]) and not np.any(gradients[1]) and not np.any(gradients[2])
    if name == "cispo":
        ratio = np.minimum(np.exp(LOG_PROB - OLD), 1.5)
        close(gradients[0], -cotangent * ratio * ADVANTAGES, 1e-12)
    else:
        check_grads(lambda x: total(x, *given[1:]), (given[0],), 1)


@every
def test_policy_masks_and_precision(name):
    loss, formula = CASES[name]
    given = [jnp.asarray(a, jnp.float32) for a in (LOG_PROB, OLD, ADVANTAGES + 0 * OLD)]
    where, weights = jnp.asarray(TOKENS), jnp.asarray(RNG.random(TOKENS.shape), jnp.float32)

    @jax.jit
    def run(*given):
        total = lambda *a: jnp.sum(jnp.sin(loss(*a, where=where, weights=weights)))
        return loss(*given, where=where, weights=weights), jax.grad(total, (0, 1, 2))(*given)

    expected = np.where(TOKENS, weights * formula(LOG_PROB, OLD, ADVANTAGES), 0)
    for hole in (jnp.nan, jnp.inf, -jnp.inf):
        values, gradients = run(*(jnp.where(where, a, hole) for a in given))
        close(values, expected, 1e-5)
        for g in gradients:
            assert np.all(np.isfinite(g)) and not np.any(np.asarray(g)[~TOKENS])
    low = [a.astype(jnp.bfloat16) for a in given]
    values = loss(*low)
    assert values.dtype == jnp.float32
    close(values, formula(*(np.asarray(a, np.float64) for a in low)), 1e-4)
    far = jnp.array([1e4, -1e4])
    for advantage in (1.0, -1.0):
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(loss(x, -x, jnp.array(advantage))))(far)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_clipped_policy_regions(x64):
    """The gradient is 0 where the ratio has moved as far as it may in the direction that the advantage wants."""
    grad = jax.jit(jax.grad(lambda x, a: jnp.sum(losses.clipped_policy_loss(x, jnp.zeros(5), a))))
    x = jnp.log(jnp.array([0.5, 0.9, 1.1, 2.0, 4.0]))
    close(grad(x, jnp.array(1.0)), [-0.5, -0.9, -1.1, 0, 0], 1e-12)
    close(grad(x, jnp.array(-1.0)), [0, 0.9, 1.1, 2.0, 0], 1e-12)
    on_policy = losses.clipped_policy_loss
    gradient = jax.grad(lambda x: on_policy(x, x, jnp.array(2.0)))(jnp.array(-0.7))
    close(gradient, -2, 1e-12)  # at the start, that of the plain policy gradient


def test_cispo_worked_numbers(x64):
    log_prob, log_ratio = jnp.array([-0.2, -1.0, -0.5]), jnp.array([0.5, -0.3, 2.0])
    old, advantage = log_prob - log_ratio, jnp.array(1.5)
    loss = losses.cispo_loss(log_prob, old, advantage)
    close(loss, [0.494616, 1.111227, 3.75])
    close(loss.mean(), 1.785281)
    close(losses.length_weighted_mean(loss[None], mode="token"), 1.785281)
    gradient = jax.grad(lambda x: losses.cispo_loss(x, old, advantage).mean())(log_prob)
    close(gradient, [-0.824361, -0.370409, -2.5])
    close(losses.cispo_loss(log_prob, old, advantage, cap=1.5).mean(), 0.895409)
    floored = losses.cispo_loss(log_prob, old, advantage, floor=1.0)
    close(floored, [0.494616, 1.5, 3.75])


def test_group_relative_advantage(x64):
    function = losses.group_relative_advantage
    r = jnp.array([1, 0, 0.5, 1])
    close(function(r), [0.783186, -1.305310, -0.261062, 0.783186])
    close(function(r, unbiased=False), [0.904316, -1.507193, -0.301439, 0.904316])
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3, 4, 2))
    where = rng.random((3, 4, 2)) < 0.7
    where[0, :, 0] = False
    where[1, :, 1] = [True, False, False, False]
    holes = jnp.asarray(np.where(where, x, np.nan))
    for scale, ddof in ((True, 1), (True, 0), (False, 0)):
        run = functools.partial(function, axis=1, scale=scale, unbiased=ddof == 1, where=jnp.asarray(where))
        got = jax.jit(run)(holes)
        for i, j in np.ndindex(3, 2):
            group = x[i, where[i, :, j], j]
            expected = group - group.mean() if len(group) else group
            if scale and len(group) > 1:
                expected = expected / (group.std(ddof=ddof) + 1e-4)
            close(got[i, where[i, :, j], j], expected, 1e-12)
        assert not np.any(np.asarray(got)[~where])
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(x)))))(holes)
        assert np.all(np.isfinite(gradient)) and not np.any(np.asarray(gradient)[~where])
        of_groups = functools.partial(function, axis=1, scale=scale, unbiased=ddof == 1)
        check_grads(jax.jit(of_groups), (x,), 1)
    close(jax.vmap(function)(jnp.asarray(x)), function(jnp.asarray(x)), 1e-14)
    value, gradient = jax.value_and_grad(lambda r: jnp.sum(function(r) ** 2))(jnp.ones(5))
    assert value == 0 and not np.any(gradient)  # equal rewards
    assert function(jnp.ones(1)) == 0
    assert function(jnp.ones(3, jnp.float16)).dtype == jnp.float32


def test_sampled_kl(x64):
    """Its mean over the policy is the divergence, which is that of logits that are never stored."""
    rng = np.random.default_rng(7)
    h, v, g, w = (jnp.asarray(rng.normal(size=s)) for s in ((2, 3), (3, 6), (2, 4), (4, 6)))
    logits, others = jaxsoft.linear_logits(h, v, block_size=4), jaxsoft.linear_logits(g, w, block_size=4)
    log_p, log_q = (jaxsoft.log_softmax(a) for a in (h @ v, g @ w))
    exact = losses.distillation_loss(others, logits, stop_teacher_gradient=False)
    estimates = losses.sampled_kl(log_p, log_q)
    close(jnp.sum(jnp.exp(log_p) * estimates, axis=-1), exact, 1e-12)
    close(exact, losses.f_divergence(log_p, log_q), 1e-12)
    r = np.asarray(log_p - log_q)
    close(estimates, np.exp(-r) + r - 1, 1e-12)
    where = jnp.asarray(rng.random((2, 6)) < 0.6)
    holes = [jnp.where(where, a, jnp.nan) for a in (log_p, log_q)]
    weights = jnp.asarray(rng.random((2, 6)))
    run = jax.jit(
        jax.value_and_grad(lambda *a: jnp.sum(losses.sampled_kl(*a, where=where, weights=weights)), (0, 1))
    )
    value, gradients = run(*holes)
    close(value, np.sum(np.where(where, weights * estimates, 0)), 1e-12)
    close(gradients[0], np.where(where, weights * (1 - np.exp(-r)), 0), 1e-12)
    assert not np.any(gradients[1])
    # Small log-ratios keep their digits, and large ones stay finite.
    small = losses.sampled_kl(jnp.float32([1e-3, -1e4]), jnp.zeros(2, jnp.float32))
    assert abs(small[0] - 5e-7) < 2e-9 and np.isfinite(small[1])


def test_kl_coefficient():
    kl, where = jnp.array([0.08, 0.02, jnp.nan]), jnp.array([True, True, False])

    def loss(log_coefficient, kl):
        values = losses.kl_coefficient_loss(log_coefficient, kl, target=0.06, where=where)
        return jnp.mean(values, where=where)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(0.5, kl)
    close(value, 0.5 * 0.01)
    close(gradients[0], 0.01)  # too small a divergence: descent lowers the coefficient
    assert not np.any(gradients[1])


def test_fuzzy_reward():
    counts, target = jnp.array([[90, 151, 150, 50], [3, 0, 5, 1]]), jnp.array([[100], [0]])
    close(losses.fuzzy_reward(counts, target), [[1.4, 0, 0, 0], [0, 1.5, 0, 0]])
    rewards = jax.jit(functools.partial(losses.fuzzy_reward, tolerance=0.6, bonus=0.2))
    found = rewards(jnp.array([-9.0, jnp.nan, jnp.inf, 15.0]), jnp.array(-10.0))
    close(found, [1.1, 0, 0, 0])
    assert losses.fuzzy_reward(counts, target.astype(jnp.bfloat16)).dtype == jnp.float32


X, ONES = jnp.zeros((3, 4)), jnp.ones((3, 4))
PPO, MEAN = losses.clipped_policy_loss, losses.length_weighted_mean
BAD = [
    (lambda: losses.f_divergence(X, X, kind="hellinger"), ValueError, "kind must be one of 'reverse_kl'"),
    (
        lambda: losses.f_divergence(X, X, kind="alpha", alpha=1.0),
        ValueError,
        "alpha must be a number > 0 and < 1",
    ),
    (lambda: losses.f_divergence(X, X[:2]), ValueError, r"log_q must have shape \(3, 4\)"),
    (lambda: losses.f_divergence(X, X, axis=2), ValueError, "axis must be in"),
    (lambda: losses.f_divergence(X.astype(int), X), TypeError, "floating"),
    (
        lambda: losses.f_divergence(jaxsoft.linear_logits(jnp.ones((3, 2)), jnp.ones((2, 4))), X),
        TypeError,
        r"logits\.dense\(\)",
    ),
    (lambda: losses.f_dpg_reward(X, X, divergence="kl"), ValueError, "divergence must be one of"),
    (lambda: losses.f_dpg_reward(X, X, alpha=0.0), ValueError, "alpha must be a number > 0"),
    (lambda: losses.f_dpg_reward(X, X, max_log_ratio=0.0), ValueError, "max_log_ratio must be a number > 0"),
    (lambda: losses.f_dpg_reward(X, X, log_partition="1"), TypeError, "log_partition must be a number"),
    (
        lambda: losses.f_dpg_reward(X, X, log_partition=jnp.ones(3)),
        ValueError,
        "log_partition must broadcast",
    ),
    (lambda: losses.f_dpg_loss(X, X[0]), ValueError, r"log_target must have shape \(3, 4\)"),
    (lambda: losses.f_dpg_loss(X, X, X[0]), ValueError, r"proposal_log_prob must have shape \(3, 4\)"),
    (
        lambda: losses.f_dpg_loss(X, X, baseline=jnp.ones(4, int)),
        TypeError,
        "baseline must be an array of floating",
    ),
    (lambda: losses.f_dpg_loss(X, X, where=X), TypeError, "where must be a boolean"),
    (lambda: MEAN(X[0]), ValueError, "token_losses must have axes of sequences and of tokens"),
    (lambda: MEAN(X, mode="mean"), ValueError, "mode must be one of 'delta_l'"),
    (lambda: MEAN(X, alpha=-1.0), ValueError, "alpha must be a number >= 0"),
    (lambda: MEAN(X, max_length=0), ValueError, "max_length must be a static integer >= 1"),
    (lambda: MEAN(X, where=jnp.ones(3, bool)), ValueError, r"where must broadcast to shape \(3, 4\)"),
    (lambda: MEAN(X.astype(int)), TypeError, "token_losses must be an array of floating"),
    (lambda: PPO(X, X, jnp.ones(3)), ValueError, r"advantages must broadcast to shape \(3, 4\)"),
    (lambda: PPO(X, X, 1.0), TypeError, "advantages must be an array of floating"),
    (lambda: PPO(X, X[0], ONES), ValueError, r"old_log_prob must have shape \(3, 4\)"),
    (lambda: PPO(X, X, ONES, clip_low=1.5), ValueError, "clip_low must be a number >= 0 and <= 1"),
    (lambda: PPO(X, X, ONES, clip_high=-0.1), ValueError, "clip_high must be a number >= 0"),
    (lambda: PPO(X, X, ONES, dual_clip=1.0), ValueError, "dual_clip must be a number > 1"),
    (lambda: PPO(X, X, ONES, max_log_ratio=0.0), ValueError, "max_log_ratio must be a number > 0"),
    (lambda: losses.cispo_loss(X, X, ONES, cap=0.0), ValueError, "cap must be a number > 0"),
    (lambda: losses.cispo_loss(X, X, ONES, floor=-1.0), ValueError, "floor must be a number >= 0"),
    (lambda: losses.sampled_kl(X, X[0]), ValueError, r"reference must have shape \(3, 4\)"),
    (lambda: losses.kl_coefficient_loss("x", X, target=0.1), TypeError, "log_coefficient must be a number"),
    (lambda: losses.kl_coefficient_loss(0.0, X, target=-1.0), ValueError, "target must be a number >= 0"),
    (lambda: losses.fuzzy_reward(X, jnp.ones(3)), ValueError, r"target must broadcast to shape \(3, 4\)"),
    (lambda: losses.fuzzy_reward([1.0], X), TypeError, "prediction must be an array of real numbers"),
    (lambda: losses.fuzzy_reward(X, X, tolerance=0.0), ValueError, "tolerance must be a number > 0"),
    (lambda: losses.fuzzy_reward(X, X, bonus=None), TypeError, "bonus must be a number"),
    (lambda: losses.group_relative_advantage(X, axis=2), ValueError, "axis must be a static integer"),
    (lambda: losses.group_relative_advantage(X, epsilon=0.0), ValueError, "epsilon must be a number > 0"),
    (lambda: losses.group_relative_advantage(X, scale=2), TypeError, "scale must be True or False"),
    (
        lambda: losses.group_relative_advantage(X.astype(int)),
        TypeError,
        "rewards must be an array of floating",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
