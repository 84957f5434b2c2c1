"""Bregman top-k, certified acceptance, fusion, energies, best of n, Frechet means, soft-NMS: numbers, laws, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from helpers import close, fails, streamed

from jaxsoft import decoding
from jaxsoft.decoding.truncation import _decide, _kept

P5 = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
KEY = jax.random.key(0)

# --- Bregman top-k ---

# alpha, dual: q for the three largest; where given: the penalty, the costs of k = 1 ... 5, the best k
BREGMAN = {
    (0.5, False): ([0.566622, 0.272896, 0.160481], None),
    (1.0, False): (
        [0.555556, 0.277778, 0.166667],
        (0.1, [0.793147, 0.487682, 0.405361, 0.430459, 0.5], 3),
    ),
    (1.5, False): ([0.544042, 0.281415, 0.174543], (0.1, [0.392696, 0.279112, 0.318888, 0.403705, 0.5], 2)),
    (2.0, False): ([0.533333, 0.283333, 0.183333], (0.01, [0.180400, 0.049775, 0.034567, 0.040562, 0.05], 3)),
    (3.0, False): ([0.517195, 0.282827, 0.199978], None),
    (1.5, True): ([0.543736, 0.281467, 0.174798], (0.01, [0.423819, 0.152472, 0.064642, 0.047168, 0.05], 4)),
    (3.0, True): ([0.518365, 0.283571, 0.198064], None),
}


def test_bregman_worked_numbers(x64):
    for (alpha, dual), (q, costs) in BREGMAN.items():
        x = jnp.log(P5)
        # With no penalty and three entries at most, all three are kept.
        three = decoding.bregman_top_k(0.0, alpha=alpha, dual=dual, k_max=3)(x)
        close(jnp.exp(three), [*q, 0, 0], 5e-7)
        if costs is not None:
            penalty, expected, k = costs
            decision = _decide(P5, jnp.asarray(penalty), alpha, dual)
            close(decision.costs, expected, 5e-7)
            assert decision.k == k
            kept = decoding.bregman_top_k(penalty, alpha=alpha, dual=dual)(x)
            assert np.sum(kept > -np.inf) == k
            close(jnp.sum(jnp.exp(kept)), 1, 1e-9)


def test_general_dual_equals_its_closed_forms(x64):
    for alpha in (1.5, 2.0, 3.0):
        q = _kept(P5, jnp.float64(0.02), alpha, True)
        near = _kept(P5, jnp.float64(0.02), alpha + 1e-9, True)
        close(q, near, 1e-7)


def test_bregman_is_the_minimum_over_all_supports(x64):
    """Against a general solver on every prefix, and against other supports of the same size."""
    rng = np.random.default_rng(0)
    p = np.sort(rng.dirichlet(np.ones(5)))[::-1]
    alpha, penalty = 1.5, 0.02

    def cost(q, support):
        full = np.zeros(5)
        full[list(support)] = q
        phi = lambda x: x**alpha / (alpha * (alpha - 1))
        return (phi(full) - phi(p) - p ** (alpha - 1) / (alpha - 1) * (full - p)).sum() + penalty * len(
            support
        )

    best = np.inf
    for support in [(0,), (0, 1), (1, 2), (0, 1, 2), (0, 1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)]:
        k = len(support)
        found = scipy.optimize.minimize(
            cost,
            np.full(k, 1 / k),
            (support,),
            bounds=[(1e-9, 1)] * k,
            constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
            options={"ftol": 1e-14},
        )
        best = min(best, found.fun)
    q = np.exp(np.asarray(decoding.bregman_top_k(penalty, alpha=alpha)(jnp.log(p))))
    close(cost(q[q > 0], np.flatnonzero(q)), best, 1e-7)


def test_bregman_streams_and_breaks_ties_by_column():
    x = np.log(np.array([[0.3, 0.3, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32))
    transform = decoding.bregman_top_k(0.0, alpha=2.0, k_max=2)
    dense, lazily = jax.jit(lambda x: (transform(x), transform(streamed(x)).dense()))(x)
    np.testing.assert_allclose(dense, lazily, rtol=1e-6)
    close(np.exp(dense), [[0.5, 0.5, 0, 0], [0, 0, 0.45, 0.55]], 1e-6)
    fails(["alpha", "dual"], ValueError, lambda: decoding.bregman_top_k(0.1, alpha=1.0, dual=True))
    fails(["alpha", "> 0"], ValueError, lambda: decoding.bregman_top_k(0.1, alpha=0.0))
    fails(["penalty", ">= 0"], ValueError, lambda: decoding.bregman_top_k(-0.1))


# --- basis-aware acceptance ---

E5 = np.array([[1, 0], [0.8, 0.2], [0, 1], [0.1, 0.9], [0.5, 0.5]])


def linear_program(p, basis, delta, t):
    """The paper's: certified if no r with the same products has `r_t = 0`."""
    bounds = [(0, 0 if i == t else x / max(1 - delta, 1e-10)) for i, x in enumerate(p)]
    equal = np.concatenate([basis, np.ones((len(p), 1))], axis=1).T
    return scipy.optimize.linprog(np.zeros(len(p)), A_eq=equal, b_eq=equal @ p, bounds=bounds).status == 2


def test_basis_aware_worked_example(x64):
    p = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    expected = {0.12: [1, 1, 1, 1, 0], 0.22: [1, 1, 1, 1, 0], 0.30: [1, 1, 1, 0, 0], 0.35: [1, 0, 1, 0, 0]}
    accept = jax.jit(decoding.basis_aware_accept)
    for delta, accepted in expected.items():
        np.testing.assert_array_equal(accept(p, E5, delta), accepted)


def test_basis_aware_acceptance_is_certified_by_the_linear_program(x64):
    """Never more than the program, and nearly as much."""
    rng = np.random.default_rng(0)
    v, d = 12, 3
    basis = rng.standard_normal((v, d))
    p = np.asarray(jax.nn.softmax(2 * rng.standard_normal((6, v)) @ np.eye(v)))
    delta = np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])
    ours = np.asarray(jax.jit(decoding.basis_aware_accept)(p, basis, delta))
    exact = np.array(
        [
            [x[t] >= delta[i] or t == x.argmax() or linear_program(x, basis, delta[i], t) for t in range(v)]
            for i, x in enumerate(p)
        ]
    )
    assert not np.any(ours & ~exact)
    assert ours.sum() >= 0.9 * exact.sum()
    assert exact.sum() > (p >= delta[:, None]).sum()  # the program accepts more than the threshold
    fails(["embedding", "(12, d)"], ValueError, lambda: decoding.basis_aware_accept(p, basis[:3], 0.1))
    fails(["delta", "< 1"], ValueError, lambda: decoding.basis_aware_accept(p, basis, 1.0))


# --- fusion ---


def test_dynamic_logit_fusion_worked_example(x64):
    large, small = jnp.array([2.0, 1, 0, -1]), jnp.array([1, 0.5, 0, 0])
    tuned = jnp.array([0.5, 1.5, 0, -0.5])

    @jax.jit
    def run(large, tuned, small):
        three = jnp.stack([small, tuned, small])
        return [
            decoding.dynamic_logit_fusion(large, tuned[None], small),
            decoding.dynamic_logit_fusion(large, tuned[None], small, refine=40),
            decoding.dynamic_logit_fusion(large[None], three[:, None], small[None]),
        ]

    grid, fine, several = run(large, tuned, small)
    close(grid.alpha, [1.0], 1e-12)
    close(grid.objective, 2.24208e-4, 5e-10)
    close(jax.nn.softmax(grid.logits), [0.342274, 0.564314, 0.076372, 0.017041], 5e-7)
    close(fine.alpha, [0.980269], 2e-6)
    close(fine.objective, 3.62132e-5, 5e-11)
    assert several.alpha.shape == (3, 1)
    assert np.sum(several.alpha > 0) == 1
    assert isinstance(grid, decoding.FusedLogits)
    fails(["base_logits"], ValueError, lambda: decoding.dynamic_logit_fusion(large, tuned[None], small[:2]))
    fails(["tuned_logits"], ValueError, lambda: decoding.dynamic_logit_fusion(large, tuned, small))
    fails(
        ["alphas"],
        ValueError,
        lambda: decoding.dynamic_logit_fusion(large, tuned[None], small, alphas=(1, 0)),
    )


# --- energies of metrics, best of n ---

METRICS = np.array([[1, 0.2], [0.5, 0.4], [0.2, 0.9], [0.1, 0.1]])


def test_metric_energy_worked_example(x64):
    p = np.array([0.4, 0.3, 0.2, 0.1])
    fit = jax.jit(decoding.fit_metric_energy)
    mu = fit(METRICS, jnp.array([0.5, 0.45]), log_weights=jnp.log(p), l2=0.0)
    close(mu, [0.719932, -0.228780], 5e-7)
    q = p * np.exp(-METRICS @ np.asarray(mu))
    close(q / q.sum(), [0.275008, 0.309463, 0.287075, 0.128453], 5e-7)
    far = fit(METRICS, jnp.array([5.0, 0.45]), log_weights=jnp.log(p), bound=30.0)  # out of reach
    assert np.all(np.abs(far) <= 30)
    out = jax.jit(decoding.importance_resample)(
        jnp.broadcast_to(METRICS, (20_000, 4, 2)), jnp.array([1, -0.5]), KEY
    )
    close(out.weights[0], [0.120193, 0.219006, 0.379592, 0.281209], 5e-7)
    close(np.bincount(out.index) / 20_000, out.weights[0], 0.012)
    assert isinstance(out, decoding.Resampled)
    fails(["targets", "(2,)"], ValueError, lambda: decoding.fit_metric_energy(METRICS, jnp.ones(3)))
    fails(["metrics", "[n, K]"], ValueError, lambda: decoding.fit_metric_energy(METRICS[0], jnp.ones(2)))
    fails(["mu", "(2,)"], ValueError, lambda: decoding.importance_resample(METRICS, jnp.ones(3), KEY))
    fails(
        ["log_weights", "(4,)"],
        ValueError,
        lambda: decoding.importance_resample(METRICS, jnp.ones(2), KEY, log_weights=jnp.ones(3)),
    )


def test_best_of_n(x64):
    p, rewards = np.array([0.4, 0.1, 0.3, 0.2]), np.array([4.0, 1, 3, 2])
    policy, bound, estimate = jax.jit(
        lambda n: (
            decoding.best_of_n_policy(p, rewards, n),
            decoding.best_of_n_kl_bound(n),
            decoding.best_of_n_kl_estimate(jnp.log(jnp.array([0.4, 1e-300, 0.0, 1.0])), n),
        )
    )(4.0)
    close(policy, [0.8704, 0.0001, 0.1215, 0.008], 1e-12)
    close(np.sum(policy * np.log(policy / p)), 0.540464, 5e-7)
    close(bound, 0.636294, 5e-7)
    close(estimate, [0.560581, 0.636294, 0.636294, 0], 5e-7)
    # One sample is the model; win rate n / (n + 1); ties share.
    close(decoding.best_of_n_policy(p, rewards, 1), p, 1e-12)
    tied = decoding.best_of_n_policy(p, jnp.array([1.0, 0, 1, 0]), 2)
    close(tied, [0.91 * 4 / 7, 0.09 / 3, 0.91 * 3 / 7, 0.09 * 2 / 3], 1e-12)
    many = np.full(1000, 1e-3)
    best = np.asarray(decoding.best_of_n_policy(many, np.arange(1000.0), 3))
    close(np.sum(best * (np.arange(1000) + 0.5)) / 1000, 3 / 4, 1e-3)
    fails(["n", ">= 1"], ValueError, lambda: decoding.best_of_n_policy(p, rewards, 0))
    fails(["rewards", "(4,)"], ValueError, lambda: decoding.best_of_n_policy(p, rewards[:2], 2))
    fails(["n", ">= 1"], ValueError, lambda: decoding.best_of_n_kl_bound(0.5))
    fails(["log_prob"], TypeError, lambda: decoding.best_of_n_kl_estimate(1, 2))


# --- predictions ---


def test_frechet_mean():
    path = np.abs(np.arange(4.0)[:, None] - np.arange(4))
    p = np.array([[0.45, 0, 0.1, 0.45], [0.7, 0.1, 0.1, 0.1]])
    close(p[0] @ path**2, [4.45, 2.35, 2.25, 4.15], 1e-12)
    np.testing.assert_array_equal(decoding.frechet_mean_predict(jnp.asarray(p), path), [2, 1])
    np.testing.assert_array_equal(
        decoding.frechet_mean_predict(jnp.asarray(p), 1 - np.eye(4)), p.argmax(axis=-1)
    )
    # A label between two observed classes
    assert decoding.frechet_mean_predict(jnp.array([0.5, 0.5]), np.array([[0.0, 1, 2], [2.0, 1, 0]])) == 1
    fails(["distances", "(4, labels)"], ValueError, lambda: decoding.frechet_mean_predict(p, path[:2]))
    fails(["probs", "floating"], TypeError, lambda: decoding.frechet_mean_predict(jnp.arange(4), path))


def plain_soft_nms(boxes, scores, method, sigma=0.5, bound=0.3, offset=0):
    scores, left, out = scores.copy(), list(range(len(scores))), []

    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0]) + offset
        h = min(a[3], b[3]) - max(a[1], b[1]) + offset
        inter = max(w, 0) * max(h, 0)
        areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
        return inter / (sum(areas) - inter)

    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        out.append((best, scores[best]))
        for i in left:
            o = iou(boxes[best], boxes[i])
            if method == "gaussian":
                scores[i] *= np.exp(-o * o / sigma)
            elif o > bound:
                scores[i] *= 1 - o if method == "linear" else 0
    return [a[0] for a in out], [a[1] for a in out]


BOXES = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]], np.float32)


@pytest.mark.whole
@pytest.mark.parametrize("method", ["linear", "gaussian", "hard"])
def test_soft_nms(method):
    rng = np.random.default_rng(0)
    corner = 20 * rng.random((12, 2))
    boxes = np.concatenate([corner, corner + 4 + 8 * rng.random((12, 2))], axis=1).astype(np.float32)
    scores = rng.random(12).astype(np.float32)
    padded = np.concatenate([boxes, np.full((2, 4), np.nan, np.float32)])
    run = jax.jit(lambda b, s, keep: decoding.soft_nms(b, s, method=method, offset=1.0, where=keep))
    got = run(padded, np.append(scores, [5, 5]).astype(np.float32), np.arange(14) < 12)
    order, taken = plain_soft_nms(boxes.astype(float), scores.astype(float), method, offset=1)
    np.testing.assert_allclose(got.scores[:12], taken, rtol=1e-5, atol=1e-7)
    alive = np.array(taken) > 0
    np.testing.assert_array_equal(np.asarray(got.order)[:12][alive], np.array(order)[alive])
    np.testing.assert_array_equal(got.valid[:12], np.array(taken) >= 0.001)
    assert not np.any(got.valid[12:])


def test_soft_nms_worked_numbers():
    s = jnp.array([0.9, 0.8, 0.7])
    got = decoding.soft_nms(BOXES, s)
    close(got.scores, [0.9, 0.7, 0.255462 * 1.0], 2e-6)
    np.testing.assert_array_equal(got.order, [0, 2, 1])
    close(decoding.soft_nms(BOXES, s, method="gaussian").scores[2], 0.316709, 2e-6)
    assert isinstance(got, decoding.SoftNMS)
    fails(["boxes", "[n, 4]"], ValueError, lambda: decoding.soft_nms(BOXES[:, :3], s))
    fails(["method"], ValueError, lambda: decoding.soft_nms(BOXES, s, method="soft"))
    fails(["scores", "(3,)"], ValueError, lambda: decoding.soft_nms(BOXES, s[:2]))
    fails(["sigma", "> 0"], ValueError, lambda: decoding.soft_nms(BOXES, s, sigma=0.0))


def test_knn_and_guidance_errors():
    d, v = jnp.ones((2, 3)), jnp.zeros((2, 3), int)
    fails(["values", "(2, 3)"], ValueError, lambda: decoding.knn_lm_interpolate(d, v[:1]))
    fails(["values", "integer"], TypeError, lambda: decoding.knn_lm_interpolate(d, d))
    fails(["weight", "<= 1"], ValueError, lambda: decoding.knn_lm_interpolate(d, v, weight=2.0))
    fails(["distances", "(4, 'k')"], ValueError, lambda: decoding.knn_lm_interpolate(d, v)(jnp.ones((4, 5))))
    none = decoding.knn_lm_interpolate(jnp.full((1, 2), jnp.inf), jnp.zeros((1, 2), int))(jnp.zeros((1, 4)))
    close(none, np.log(np.full((1, 4), 0.25)), 1e-6)
    fails(["other", "floating"], TypeError, lambda: decoding.guidance(jnp.arange(3), 1.5))
