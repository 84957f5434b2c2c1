"""Divergences against loops and closed forms; masks, derivatives, extremes and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close, fails
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.losses import (
    cauchy_schwarz_divergence,
    distance_covariance,
    gumbel_regression_loss,
    kernel_cauchy_schwarz_divergence,
    marginal_consistency_loss,
    optimal_mmd_weights,
    residual_ebm_loss,
    target_surrogate_loss,
    weighted_mmd,
)

A = np.array([2.0, 1.0, 0.1, -1.0, 0.5])
B = np.array([0.2, 1.5, -0.3, 0.8, -1.2])
X, Y = np.array([[0.0], [1.0], [2.0], [4.0]]), np.array([[1.0], [0.5], [2.0], [3.0]])
RNG = np.random.default_rng(0)
P, Q = RNG.normal(size=(2, 6, 3)), RNG.normal(size=(2, 5, 3))  # two pairs of samples
KEEP_P, KEEP_Q = RNG.random((2, 6)) < 0.6, RNG.random((2, 5)) < 0.6
W, V = RNG.normal(size=(2, 6)), RNG.normal(size=(2, 5))
COTANGENT = np.array([0.7, -1.3])


def test_worked_numbers(x64):
    close(distance_covariance(X, Y), 0.8515625, 1e-12)
    close(distance_covariance(X, Y, correlation=True), 0.910581)
    close(cauchy_schwarz_divergence(A, B), 1.192237)
    close(kernel_cauchy_schwarz_divergence(X, Y, bandwidth=0.5), 0.544551)
    close(weighted_mmd(X, Y, bandwidth=0.5), 0.157267)
    close(weighted_mmd(X, Y, bandwidth=0.5, weights_x=jnp.array([0.4, 0.3, 0.2, 0.1])), 0.165137)
    z = np.array([0.5, -1.0, 2.0])
    close(gumbel_regression_loss(jnp.zeros(3), z), [0.148721, 0.367879, 4.389056])
    close(gumbel_regression_loss(jnp.zeros(3), z, z_max=None), [0.148721, 0.367879, 4.389056])
    close(gumbel_regression_loss(jnp.zeros(3), z, z_max=1.0)[2], 2.436564)
    close(residual_ebm_loss(jnp.array([-1, 0.3]), jnp.array([0.8, -0.2])).mean(), 1.168428)
    close(marginal_consistency_loss(jnp.array(-2.3), jnp.array(-0.7), jnp.array(-2.8)), 0.04)


# --- two samples -----------------------------------------------------------------------------------------


def kernel(x, y, s):
    return np.array([[np.exp(-np.sum((a - b) ** 2) / (2 * s * s)) for b in y] for a in x])


def covariance_oracle(x, y):
    """As a mean over pairs, less means over three and four examples."""
    a, b = (np.array([[np.linalg.norm(u - v) for v in z] for u in z]) for z in (x, y))
    return (a * b).mean() + a.mean() * b.mean() - 2 * np.mean(a.mean(1) * b.mean(1))


def correlation_oracle(x, y):
    return covariance_oracle(x, y) / np.sqrt(covariance_oracle(x, x) * covariance_oracle(y, y))


def divergence_oracle(x, y):
    xx, xy, yy = (kernel(*pair, 0.7).mean() for pair in ((x, x), (x, y), (y, y)))
    return np.log(xx * yy / xy**2)


def mmd_oracle(x, y, w=None, v=None):
    w = np.full(len(x), 1 / len(x)) if w is None else w
    v = np.full(len(y), 1 / len(y)) if v is None else v
    return w @ kernel(x, x, 0.7) @ w - 2 * w @ kernel(x, y, 0.7) @ v + v @ kernel(y, y, 0.7) @ v


OF_PAIRS = {  # of the same examples
    "covariance": (distance_covariance, covariance_oracle),
    "correlation": (functools.partial(distance_covariance, correlation=True), correlation_oracle),
}
OF_SAMPLES = {
    "divergence": (functools.partial(kernel_cauchy_schwarz_divergence, bandwidth=0.7), divergence_oracle),
    "mmd": (functools.partial(weighted_mmd, bandwidth=0.7), mmd_oracle),
}


def both_masked(loss, x, y, keep_x, keep_y, pairs):
    """Value and gradients with masks, NaN under them."""
    options = dict(where=keep_x) if pairs else dict(where_x=keep_x, where_y=keep_y)
    run = jax.jit(jax.value_and_grad(lambda x, y: jnp.vdot(COTANGENT, loss(x, y, **options)), argnums=(0, 1)))
    return run(np.where(keep_x[..., None], x, np.nan), np.where(keep_y[..., None], y, np.nan))


@pytest.mark.table
@pytest.mark.parametrize("name", [*OF_PAIRS, *OF_SAMPLES])
def test_functions_of_two_samples(name, x64):
    pairs = name in OF_PAIRS
    loss, oracle = (OF_PAIRS | OF_SAMPLES)[name]
    y = RNG.normal(size=(2, 6, 2)) + P[..., :2] if pairs else Q
    keep_y = KEEP_P if pairs else KEEP_Q
    run = jax.jit(loss)
    values = run(P, y)
    close(values, [oracle(*pair) for pair in zip(P, y)], 1e-12)
    close(jax.jit(jax.vmap(loss))(P, y), values, 1e-12)
    close(run(y, P), values, 1e-12)  # symmetric
    check_grads(
        jax.jit(lambda x, y: jnp.vdot(COTANGENT, loss(x, y))), (jnp.asarray(P), jnp.asarray(y)), 1, rtol=1e-6
    )
    value, gradients = both_masked(loss, P, y, KEEP_P, keep_y, pairs)
    kept = [(a[k], b[m]) for a, b, k, m in zip(P, y, KEEP_P, keep_y)]
    close(value, sum(c * oracle(*pair) for c, pair in zip(COTANGENT, kept)), 1e-12)
    expected = jax.grad(lambda x, y: COTANGENT[0] * loss(x, y), argnums=(0, 1))(*map(jnp.asarray, kept[0]))
    for g, h, keep in zip(gradients, expected, (KEEP_P, keep_y)):
        close(np.asarray(g)[0][keep[0]], h, 1e-12)
        assert not np.any(np.asarray(g)[~keep])
    nothing = np.zeros_like(KEEP_P), np.zeros_like(keep_y) if pairs else keep_y
    value, gradients = both_masked(loss, P, y, *nothing, pairs)
    assert value == 0 and not any(jnp.any(g) for g in gradients)
    # Points that coincide, and constants.
    at = jax.jit(jax.value_and_grad(lambda x, y: jnp.sum(loss(x, y))))
    value, g = at(jnp.asarray(P), jnp.asarray(P) if pairs else jnp.asarray(P[:, :5]))
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(g))
    value, g = at(jnp.ones_like(P), jnp.ones_like(y))
    close(value, 0, 1e-12)
    assert jnp.all(jnp.isfinite(g))
    low = jnp.asarray(P, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16)
    assert run(*low).dtype == jnp.float32
    close(run(*low), run(*(a.astype(jnp.float64) for a in low)), 2e-6)


def test_independent_and_dependent_samples(x64):
    x, y = RNG.normal(size=(2, 200, 1))
    independent, same, squared = (distance_covariance(x, z, correlation=True) for z in (y, 3 * x + 1, x**2))
    assert independent < 0.05 < 0.2 < squared
    close(same, 1, 1e-12)


def test_samples_far_from_each_other():
    x, y = jnp.zeros((3, 2)), jnp.full((2, 2), 1000.0)
    value, g = jax.value_and_grad(kernel_cauchy_schwarz_divergence)(x, y)
    np.testing.assert_allclose(value, 2e6, rtol=1e-6)
    assert jnp.all(jnp.isfinite(g)) and jnp.any(g != 0)


def test_weights_of_mmd(x64):
    values = jax.jit(functools.partial(weighted_mmd, bandwidth=0.7))(P, Q, weights_x=W, weights_y=V)
    close(values, [mmd_oracle(*a) for a in zip(P, Q, W, V)], 1e-12)
    f = lambda w, v, s: jnp.vdot(COTANGENT, weighted_mmd(P, Q, bandwidth=s, weights_x=w, weights_y=v))
    check_grads(jax.jit(f), (jnp.asarray(W), jnp.asarray(V), jnp.float64(0.7)), 1, rtol=1e-6)
    # Optimal weights: no other weights are closer, and the whole sample finds itself.
    mean = jnp.stack([kernel(p, q, 0.7).mean(1) for p, q in zip(P, Q)])
    solve = jax.jit(functools.partial(optimal_mmd_weights, bandwidth=0.7, ridge=0.0))
    best = solve(P, mean)
    slope = jax.grad(lambda w: jnp.sum(weighted_mmd(P, Q, bandwidth=0.7, weights_x=w)))(best)
    close(slope, 0, 1e-10)
    close(solve(P, jnp.stack([kernel(p, p, 0.7) @ w for p, w in zip(P, W)])), W, 1e-8)
    # Masked points have weight 0, with any content; a ridge for points that coincide.
    spoiled = np.where(KEEP_P[..., None], P, np.nan), np.where(KEEP_P, mean, np.nan)
    run = jax.jit(lambda x, m: solve(x, m, where=KEEP_P))
    weights = run(*spoiled)
    for w, p, m, k in zip(weights, P, np.asarray(mean), KEEP_P):
        close(w[k], np.linalg.solve(kernel(p[k], p[k], 0.7), m[k]), 1e-10)
        assert not np.any(np.asarray(w)[~k])
    g = jax.jit(jax.grad(lambda x, m: jnp.sum(run(x, m) ** 2), argnums=(0, 1)))(*spoiled)
    assert all(jnp.all(jnp.isfinite(a)) and not np.any(np.asarray(a)[~KEEP_P]) for a in g)
    twice = optimal_mmd_weights(jnp.zeros((2, 1)), jnp.ones(2), ridge=1e-3)
    close(twice, 1 / 2.001, 1e-9)


# --- two rows of logits ----------------------------------------------------------------------------------


def test_cauchy_schwarz_of_probabilities(x64):
    x, z = RNG.normal(size=(2, 4, 6)) * 2
    p, q = (np.asarray(jaxsoft.softmax(jnp.asarray(a))) for a in (x, z))
    expected = -np.log((p * q).sum(-1) ** 2 / ((p * p).sum(-1) * (q * q).sum(-1)))
    loss = jax.jit(cauchy_schwarz_divergence)
    close(loss(x, z), expected, 1e-12)
    close(loss(z, x), expected, 1e-12)
    close(loss(x, x + 3), 0, 1e-12)
    far = jnp.array([[200.0, 0.0, 0.0]]), jnp.array([[0.0, 200.0, 0.0]])
    close(loss(*far), 400 - 2 * np.log(2), 1e-9)
    # Two expressions, neither of them stored.
    h, k, u, v = (
        RNG.normal(size=(4, 3)),
        RNG.normal(size=(3, 6)),
        RNG.normal(size=(4, 2)),
        RNG.normal(size=(2, 6)),
    )
    w = jnp.asarray(RNG.normal(size=4))

    def run(h, k, u, v, dense):
        a, b = jaxsoft.linear_logits(h, k, block_size=4), jaxsoft.linear_logits(u, v, block_size=4)
        a, b = (a.dense(), b.dense()) if dense else (a, b)
        return jnp.vdot(w, cauchy_schwarz_divergence(a, b, where=np.arange(6) < 5))

    both = [
        jax.jit(jax.value_and_grad(functools.partial(run, dense=d), argnums=(0, 1, 2, 3)))(h, k, u, v)
        for d in (True, False)
    ]
    jax.tree.map(lambda a, b: close(a, b, 1e-12), *both)


# --- regression, energies, consistency -------------------------------------------------------------------

VALUES, TARGETS, THIRD = RNG.normal(size=(3, 2, 4)) * 3
ELEMENTWISE = {
    "gumbel": (functools.partial(gumbel_regression_loss, beta=0.9), 2),
    "gumbel-plain": (functools.partial(gumbel_regression_loss, z_max=None), 2),
    "ebm": (residual_ebm_loss, 2),
    "marginal": (marginal_consistency_loss, 3),
}


@pytest.mark.table
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_losses(name, x64):
    loss, count = ELEMENTWISE[name]
    args = [jnp.asarray(a) for a in (VALUES, TARGETS, THIRD)[:count]]
    w = jnp.asarray(RNG.normal(size=(2, 4)))
    values = jax.jit(loss)(*args)
    assert values.shape == (2, 4)
    close(jax.jit(jax.vmap(loss))(*args), values, 1e-12)
    check_grads(jax.jit(lambda *a: jnp.vdot(w, loss(*a))), args, 2, rtol=1e-4)
    keep = np.array([[True, False, True, True], [False] * 4])
    for junk in (jnp.nan, jnp.inf, -jnp.inf):
        spoiled = [jnp.where(keep, a, junk) for a in args]
        run = jax.jit(
            jax.value_and_grad(lambda *a: jnp.vdot(w, loss(*a, where=keep)), argnums=tuple(range(count)))
        )
        value, gradients = run(*spoiled)
        close(value, jnp.sum(jnp.where(keep, w * values, 0)), 1e-12)
        assert all(jnp.all(jnp.isfinite(g)) and not np.any(np.asarray(g)[~keep]) for g in gradients)
    low = [a.astype(jnp.bfloat16) for a in args]
    assert loss(*low).dtype == jnp.float32
    np.testing.assert_allclose(loss(*low), loss(*(a.astype(jnp.float64) for a in low)), rtol=1e-5, atol=1e-6)


def test_gumbel_regression_is_a_soft_maximum(x64):
    targets, beta = jnp.asarray(TARGETS[0]), 0.7
    best = beta * jnp.log(jnp.mean(jnp.exp(targets / beta)))
    mean = lambda v: jnp.mean(gumbel_regression_loss(jnp.full(4, v), targets, beta=beta, z_max=None))
    close(jax.grad(mean)(best), 0, 1e-12)
    below, above = (mean(best + d) for d in (-0.1, 0.1))
    assert mean(best) < min(below, above)
    # Continuous, with its derivative, where the exponential ends; exact near 0; finite far away.
    f = jax.jit(jax.vmap(jax.value_and_grad(lambda z: gumbel_regression_loss(jnp.zeros(()), z, z_max=2.0))))
    values, slopes = f(jnp.array([2 - 1e-9, 2 + 1e-9, 100.0]))
    close(values[0], values[1], 1e-7)
    close(slopes, np.full(3, np.exp(2) - 1), 1e-7)
    close(values[2], np.exp(2) * 99 - 101, 1e-9)


def test_gumbel_regression_near_zero_and_far_away():
    z = np.array([1e-6, -1e-4, 3e-3, 0.0999, -0.0999, 0.1001, -0.5, 1.0])
    exact = np.array([float(sum(v**k / np.prod(np.arange(1.0, k + 1)) for k in range(2, 25))) for v in z])
    run = jax.jit(jax.vmap(jax.value_and_grad(lambda z: gumbel_regression_loss(jnp.zeros(()), z))))
    values, slopes = run(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(values, exact, rtol=2e-5)
    np.testing.assert_allclose(slopes, np.expm1(z), rtol=2e-5)
    values, slopes = run(jnp.array([1e4, -1e4]))
    assert jnp.all(jnp.isfinite(values)) and jnp.all(jnp.isfinite(slopes))


def test_marginal_consistency_of_impossible_values():
    minus = -jnp.inf
    marginal, conditional, joint = jnp.array([minus, -1.0]), jnp.array([-1.0, -2.0]), jnp.array([minus, -3.0])
    run = jax.value_and_grad(lambda *a: jnp.sum(marginal_consistency_loss(*a)), argnums=(0, 1, 2))
    value, gradients = run(marginal, conditional, joint)
    assert value == 0 and not any(jnp.any(g) for g in gradients)
    assert marginal_consistency_loss(marginal, conditional, jnp.full(2, -3.0))[0] == jnp.inf


def test_target_surrogate(x64):
    loss = lambda z: jnp.sum(jnp.logaddexp(0, z)) + 0.5 * jnp.sum(z * z)  # 1.25-smooth
    kernel, x = jnp.asarray(RNG.normal(size=(3, 4))), jnp.asarray(RNG.normal(size=(5, 3)))
    model = lambda k: x @ k
    anchor = model(kernel)
    d = jax.grad(loss)(anchor)
    step = 1 / 1.25
    surrogate = lambda k: jnp.sum(target_surrogate_loss(model(k), anchor, d, step_size=step))
    values = jax.jit(functools.partial(target_surrogate_loss, step_size=step))(anchor - step * d, anchor, d)
    close(values, -step / 2 * np.sum(np.asarray(d) ** 2, axis=-1), 1e-12)
    # At the anchor it is 0, with the gradient of the loss itself; elsewhere it bounds the loss's change.
    close(surrogate(kernel), 0)
    close(jax.grad(surrogate)(kernel), jax.grad(lambda k: loss(model(k)))(kernel), 1e-12)
    update = jax.jit(jax.grad(surrogate))
    trained = kernel
    for _ in range(20):
        trained = trained - 0.02 * update(trained)
    for other in (trained, kernel + jnp.asarray(RNG.normal(size=(3, 4)))):
        assert loss(model(other)) - loss(anchor) <= surrogate(other) + 1e-12
    assert surrogate(trained) < surrogate(kernel - 0.02 * update(kernel)) < 0
    # Anchors and gradients are constants; masks; axes.
    run = jax.jit(
        lambda z, a, d, **o: jax.value_and_grad(
            lambda *p: jnp.sum(target_surrogate_loss(*p, step_size=0.3, **o)), argnums=(0, 1, 2)
        )(z, a, d)
    )
    z = anchor + 1
    _, (g, *others) = run(z, anchor, d)
    close(g, d + 1 / 0.3, 1e-12)
    assert not any(jnp.any(o) for o in others)
    keep = np.arange(4) < 3
    value, (g, *_) = run(*(jnp.where(keep, a, jnp.nan) for a in (z, anchor, d)), where=keep)
    close(value, run(z[:, :3], anchor[:, :3], d[:, :3])[0], 1e-12)
    assert jnp.all(jnp.isfinite(g)) and not jnp.any(g[:, 3])
    by_column = target_surrogate_loss(z.T, anchor.T, d.T, step_size=0.3, axis=0)
    close(by_column, target_surrogate_loss(z, anchor, d, step_size=0.3), 1e-12)


# --- bad input -------------------------------------------------------------------------------------------

F = np.ones((4, 3), np.float32)
EXPRESSION = jaxsoft.linear_logits(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))
BAD = [
    (distance_covariance, (F, F[:2]), {}, ValueError, ["y", "(4, 3)", "(2, 3)"]),
    (distance_covariance, (F[0], F[0]), {}, ValueError, ["x", "[*batch, n, features]", "(3,)"]),
    (distance_covariance, (F, F), dict(correlation="yes"), TypeError, ["correlation", "True or False", "'yes'"]),
    (distance_covariance, (F, F), dict(where=F > 0), ValueError, ["where", "(4,)", "(4, 3)"]),
    (weighted_mmd, (F, F[:, :2]), {}, ValueError, ["y", "(4, 2)", "('m', 3)"]),
    (weighted_mmd, (F, F), dict(bandwidth=0.0), ValueError, ["bandwidth", "> 0", "0.0"]),
    (weighted_mmd, (F, F), dict(weights_y=F[:3, 0]), ValueError, ["weights_y", "(4,)", "(3,)"]),
    (weighted_mmd, (F, F), dict(weights_x=np.ones(4, int)), TypeError, ["weights_x", "floating", "int64"]),
    (weighted_mmd, (F, F), dict(where_y=F[:, 0]), TypeError, ["where_y", "boolean", "float32"]),
    (kernel_cauchy_schwarz_divergence, (F, F.astype(int)), {}, TypeError, ["y", "floating", "int64"]),
    (kernel_cauchy_schwarz_divergence, (F, F), dict(bandwidth=None), TypeError, ["bandwidth", "number", "None"]),
    (optimal_mmd_weights, (F, F), {}, ValueError, ["kernel_mean", "(4,)", "(4, 3)"]),
    (optimal_mmd_weights, (F, F[:, 0]), dict(ridge=-1.0), ValueError, ["ridge", ">= 0", "-1.0"]),
    (cauchy_schwarz_divergence, (F, F[:2]), {}, ValueError, ["other", "(4, 3)", "(2, 3)"]),
    (cauchy_schwarz_divergence, (F, F > 0), {}, TypeError, ["other", "floating", "bool"]),
    (cauchy_schwarz_divergence, (F, F), dict(axis=2), ValueError, ["axis", "[-2, 2)", "2"]),
    (cauchy_schwarz_divergence, (F, F), dict(where=F[:, 0] > 0), ValueError, ["where", "(4, 3)", "(4,)"]),
    (gumbel_regression_loss, (F, F[0]), {}, ValueError, ["targets", "(4, 3)", "(3,)"]),
    (gumbel_regression_loss, (F, F), dict(beta=0), ValueError, ["beta", "> 0", "0"]),
    (gumbel_regression_loss, (F, F), dict(z_max="7"), TypeError, ["z_max", "number", "'7'"]),
    (residual_ebm_loss, (F, 1.0), {}, TypeError, ["sampled", "floating", "1.0"]),
    (residual_ebm_loss, (F, F), dict(where=F[0] > 0), ValueError, ["where", "(4, 3)", "(3,)"]),
    (marginal_consistency_loss, (F, F, F[0]), {}, ValueError, ["log_joint", "(4, 3)", "(3,)"]),
    (target_surrogate_loss, (F, F, F), dict(step_size=0.0), ValueError, ["step_size", "> 0", "0.0"]),
    (target_surrogate_loss, (F, F, F[0]), dict(step_size=1.0), ValueError, ["gradients", "(4, 3)", "(3,)"]),
    (target_surrogate_loss, (F, F, F), dict(step_size=1.0, axis=2), ValueError, ["axis", "[-2, 2)", "2"]),
    (target_surrogate_loss, (EXPRESSION, F, F), dict(step_size=1.0), TypeError, ["logits.dense()"]),
]  # fmt: skip


@pytest.mark.parametrize("function, args, options, kind, words", BAD)
def test_bad_input(function, args, options, kind, words):
    fails(words, kind, lambda: function(*args, **options))


def test_wide_results():
    with float64():
        assert weighted_mmd(jnp.asarray(P), jnp.asarray(Q)).dtype == jnp.float64
