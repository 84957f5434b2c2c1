"""Conformal prediction: the spec's numbers, guarantees by leaving each example out, plain loops, borders, errors.

Of n + 1 examples, each one in turn is the new one and the others are calibration: the rate of errors over the n + 1 is
what the guarantees bound, exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import close, fails, near, softmax, streamed

import jaxsoft
from jaxsoft import calibration

LAMBDAS = np.array([0, 0.25, 0.5, 0.75, 1])
LOSSES = np.array(
    [[1, 0.8, 0.4, 0.1, 0], [1, 0.6, 0.3, 0.2, 0], [0.9, 0.5, 0.2, 0, 0], [1, 0.7, 0.5, 0.1, 0]]
)
CAL, TEST = np.array([5, 4, 1, 0.5, 3, 2]), np.array([0.2, 1.5, 4.5, 0.1])


def others(values):
    """`[n + 1, n]`: all values but one."""
    n = len(values)
    return np.stack([np.delete(values, i, axis=0) for i in range(n)])


# Scores and sets.


def ahead(p, y, share, penalty, free):
    """The APS score of a row by its definition."""
    order = sorted(range(len(p)), key=lambda j: (-p[j], j))
    rank = order.index(y)
    return sum(p[j] for j in order[:rank]) + share * p[y] + penalty * max(rank + 1 - free, 0)


def test_sets_hold_what_scores_below_the_threshold(x64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4)) * 2
    x[0, 1] = x[0, 3]  # equal
    share = rng.random(5)
    p = softmax(x)
    options = dict(penalty=0.1, free_ranks=1.0)

    @jax.jit
    def scores(x, labels, share):
        logits = streamed(x)
        lac = jax.vmap(lambda y: calibration.nonconformity_score(logits, y), 1, 1)(labels)
        aps = functools.partial(calibration.nonconformity_score, logits, method="aps", share=share, **options)
        return lac, jax.vmap(aps, 1, 1)(labels)

    @jax.jit
    def sets(x, share, threshold):
        aps = dict(method="aps", share=share, **options)
        columns = calibration.prediction_set(x.T, threshold, axis=0, **aps).T
        return calibration.prediction_set(x, threshold), columns

    labels = jnp.broadcast_to(jnp.arange(4), (5, 4))
    lac, aps = scores(x, labels, share)
    near(lac, 1 - p, 1e-12)
    near(aps, [[ahead(p[i], y, share[i], 0.1, 1) for y in range(4)] for i in range(5)], 1e-12)
    for threshold in (0.2, 0.61, 0.9):
        got = sets(x, share, threshold)
        np.testing.assert_array_equal(got[0], np.asarray(lac) <= threshold)
        np.testing.assert_array_equal(got[1], np.asarray(aps) <= threshold)


def test_own_probability_counts_once():
    """Also where the pass that adds up rounds the label's score up."""
    from jaxsoft.calibration.conformal import _ahead

    x = jnp.array([0.0, 1.0, 2.0])
    got = _ahead(x, jnp.arange(3), jnp.nextafter(x[1], -1), 1, 0.0, 0.0, jax.nn.logsumexp(x))
    np.testing.assert_allclose(got, np.where(np.arange(3) == 2, jax.nn.softmax(x), 0), rtol=1e-6)


def test_absent_classes_are_in_no_set():
    x, where = jnp.array([[1.0, jnp.nan, -jnp.inf, 0.0]]), jnp.array([[True, False, True, True]])

    @jax.jit
    def both(x):
        return [
            (
                calibration.prediction_set(x, jnp.inf, where=where, method=method),
                calibration.nonconformity_score(x, jnp.array([1]), where=where, method=method),
            )
            for method in calibration.conformal.METHODS
        ]

    for everything, score in both(x):
        np.testing.assert_array_equal(everything, [[True, False, False, True]])
        near(score, [1.0], 1e-6)


# Quantiles.


def test_quantile(x64):
    scores = jnp.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.25, 0.15, 0.6, 0.35])
    q = calibration.conformal_quantile
    assert q(scores, 0.2) == 0.5 and q(scores, 0.1) == 0.6 and q(scores, 0.09) == np.inf
    assert q(scores[:0], 0.5) == np.inf and q(scores, 0.999) == 0.1
    # The exact rank, also where (n + 1) (1 - alpha) is a whole number that rounding may miss
    n = 999
    ranks = jnp.arange(1.0, n + 1, dtype=jnp.float32)
    alphas = np.arange(1, 100) / 100
    got = jax.jit(jax.vmap(functools.partial(q, ranks)))(jnp.asarray(alphas, jnp.float32))
    np.testing.assert_array_equal(got, [10 * k for k in range(99, 0, -1)])
    # Weights: the definition
    w = np.array([0.2, 1.0, 0.5, 0.9, 0.1, 1.0, 0.3, 0.8, 0.6])
    s = np.asarray(scores)
    wanted = min(x for x in s if w[s <= x].sum() >= 0.7 * (w.sum() + 1))
    assert q(scores, 0.3, weights=jnp.asarray(w)) == wanted


@pytest.mark.parametrize("alpha", [0.1, 0.35])
def test_coverage_over_all_ways_to_leave_one_out(alpha, x64):
    scores = np.random.default_rng(0).normal(size=24)
    q = jax.jit(jax.vmap(lambda s: calibration.conformal_quantile(s, alpha)))(others(scores))
    covered = np.mean(scores <= q)
    k = int(np.ceil(24 * (1 - alpha)))
    assert covered == k / 24  # at least 1 - alpha, and less than 1 / (n + 1) above


# Risk control.


def test_risk_control_worked_numbers(x64):
    control = jax.jit(calibration.conformal_risk_control)
    result = control(LOSSES, LAMBDAS, 0.5)
    close(result.bounds, [0.98, 0.72, 0.48, 0.28, 0.20], 1e-12)
    assert result.threshold == 0.5 and result.index == 2 and result.feasible
    assert control(LOSSES, LAMBDAS, 0.3).threshold == 0.75
    assert control(LOSSES, LAMBDAS, 0.99).threshold == 0  # the least conservative, if all will do
    assert control(LOSSES, LAMBDAS, 0.2).threshold == 1  # equality
    weighted = control(LOSSES, LAMBDAS, 0.5, weights=2 * 0.8 ** np.arange(3, -1, -1))
    close(weighted.bounds, [0.979757, 0.732186, 0.520445, 0.323684, 0.253036], 5e-7)
    assert weighted.threshold == 0.75


def test_infeasible_risks():
    control = calibration.conformal_risk_control
    few = control(jnp.asarray(LOSSES), jnp.asarray(LAMBDAS), 0.1)
    assert few.threshold == 1 and few.index == 4 and not few.feasible
    none = control(jnp.zeros((0, 2)), jnp.array([0.0, 1.0]), 0.5)
    assert none.threshold == 1 and not none.feasible
    close(none.bounds, [1, 1], 0)
    assert not control(jnp.zeros((2, 2)), jnp.array([0.0, 1.0]), 0.5, weights=jnp.zeros(2)).feasible


def test_the_risk_over_all_ways_to_leave_one_out(x64):
    rng = np.random.default_rng(1)
    losses = -np.sort(-rng.random((20, 9)) * np.linspace(1, 0, 9), axis=1)
    losses[:, -1] = 0
    control = jax.vmap(
        lambda table, alpha: calibration.conformal_risk_control(table, np.arange(9), alpha), (0, None)
    )
    control = jax.jit(control)
    for alpha in (0.1, 0.2, 0.4):
        index = control(others(losses), alpha).index
        assert np.mean(losses[np.arange(20), index]) <= alpha


# P-values and selection.


def test_p_values(x64):
    p = calibration.conformal_p_values(jnp.asarray(CAL), jnp.asarray(TEST))
    close(p, [0.142857, 0.428571, 0.857143, 0.142857], 5e-7)
    # Super-uniform with ties too; with a key, uniform between the two counts
    scores = np.random.default_rng(2).integers(0, 5, 20).astype(float)
    each = jax.jit(jax.vmap(calibration.conformal_p_values))(others(scores), scores)
    for u in np.arange(1, 21) / 20:
        assert np.mean(np.asarray(each) <= u + 1e-12) <= u + 1e-12
    keys = jax.random.split(jax.random.key(0), 2000)
    cal, x = jnp.array([1.0, 2.0, 2.0, 3.0]), jnp.array([2.0, 0.0])
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: calibration.conformal_p_values(cal, x, key=key)))(keys))
    assert np.all((drawn > [0.2, 0.0]) & (drawn <= [0.8, 0.2]))
    close(drawn.mean(0), [0.5, 0.1], 0.02)
    assert np.all(calibration.conformal_p_values(cal[:0], x) == 1)
    assert np.isnan(calibration.conformal_p_values(cal, jnp.array([jnp.nan]))[0])


def test_benjamini_hochberg(x64):
    bh = jax.jit(calibration.benjamini_hochberg)
    p = calibration.conformal_p_values(jnp.asarray(CAL), jnp.asarray(TEST))
    np.testing.assert_array_equal(bh(p, 0.3), [1, 0, 0, 1])
    np.testing.assert_array_equal(bh(p, 0.6), [1, 1, 0, 1])
    rng = np.random.default_rng(3)
    for _ in range(20):
        p = np.round(rng.random(12) ** 3, 2)
        np.testing.assert_array_equal(bh(p, 0.25), scipy.stats.false_discovery_control(p) <= 0.25)
    assert not np.any(bh(np.ones(4), 0.5)) and bh(np.zeros(0), 0.5).shape == (0,)
    np.testing.assert_array_equal(bh(np.array([0.01, np.nan]), 0.5), [True, False])


def bh(p, q):
    order, m = np.argsort(p, kind="stable"), len(p)
    k = max([i + 1 for i in range(m) if p[order[i]] <= q * (i + 1) / m * (1 + 1e-12)], default=0)
    chosen = np.zeros(m, bool)
    chosen[order[:k]] = True
    return chosen


def plain_selection(cal, test, q):
    """OptCS by its definition, with loops."""
    models, m, n = len(cal), test.shape[1], cal.shape[1]
    e, rejections, chosen = np.zeros(m), np.zeros(m, int), np.zeros(m, int)
    for j in range(m):
        counts = []
        for k in range(models):
            aux = [(np.sum(cal[k] <= test[k, i]) + (test[k, j] <= test[k, i])) / (n + 1) for i in range(m)]
            aux[j] = 0
            counts.append(bh(np.array(aux), q).sum())
        chosen[j], rejections[j] = np.argmax(counts), max(counts)
        p = (1 + np.sum(cal[chosen[j]] <= test[chosen[j], j])) / (n + 1)
        bar = q * rejections[j] / m
        e[j] = (p <= bar) / bar
    return bh(np.where(e > 0, 1 / np.maximum(e, 1e-12), np.inf), q), e, rejections, chosen


def test_selection(x64):
    result = calibration.conformal_select(jnp.asarray(CAL), jnp.asarray(TEST), 0.6)
    # With one model, what the Benjamini-Hochberg procedure rejects. By hand: with the third test left out, the other
    # auxiliary p-values are 0, 2/7 and 0, so that all four are rejected.
    np.testing.assert_array_equal(result.selected, [1, 1, 0, 1])
    np.testing.assert_array_equal(result.rejections, [3, 3, 4, 3])
    close(result.e_values, [1 / 0.45, 1 / 0.45, 0, 1 / 0.45], 1e-12)

    rng = np.random.default_rng(4)
    select = jax.jit(calibration.conformal_select)
    for shift in (0.5, 1.5, 3.0):
        cal, test = rng.normal(size=(3, 15)), rng.normal(size=(3, 8))
        test[:, :5] -= shift
        result, expected = select(cal, test, 0.4), plain_selection(cal, test, 0.4)
        for got, wanted in zip((result.selected, result.e_values, result.rejections, result.model), expected):
            near(got, wanted, 1e-12)


def test_few_selections_are_false(x64):
    """The expected share of false selections, over 400 draws of a problem with known outcomes."""
    level, m, n = 0.3, 12, 60

    @jax.jit
    @jax.vmap
    def draw(key):
        key, prune, noise, other = jax.random.split(key, 4)
        truth = jax.random.normal(key, (n + m,))
        mu = truth + jnp.stack(
            [jax.random.normal(noise, truth.shape), 3 * jax.random.normal(other, truth.shape)]
        )
        scores = 1000 * (truth[:n] > 0.5) - mu[:, :n], -mu[:, n:]
        shares = []
        for options in ({}, {"prune": "homogeneous", "key": prune}, {"prune": "independent", "key": prune}):
            selected = calibration.conformal_select(*scores, level, **options).selected
            wrong = jnp.sum(selected & (truth[n:] <= 0.5))
            shares += [wrong / jnp.maximum(selected.sum(), 1), selected.sum()]
        return jnp.stack(shares)

    drawn = np.asarray(draw(jax.random.split(jax.random.key(1), 400)))
    rates, error = drawn.mean(0), drawn.std(0) / 20
    assert np.all(rates[::2] <= level + 3 * error[::2]), (rates, error)
    assert 1 < rates[1] <= rates[3] and rates[1] <= rates[5]  # pruning selects more


def test_bad_input():
    x, y = np.ones((4, 3), np.float32), np.zeros(4, np.int32)
    score, sets = calibration.nonconformity_score, calibration.prediction_set
    for f in (lambda **o: score(x, y, **o), lambda **o: sets(x, 0.5, **o)):
        fails(["method", "'aps'"], ValueError, lambda f=f: f(method="raps"))
        fails(["penalty", ">= 0"], ValueError, lambda f=f: f(penalty=-1.0))
        fails(["free_ranks", ">= 0"], ValueError, lambda f=f: f(free_ranks=-1.0))
        fails(["share", "<= 1"], ValueError, lambda f=f: f(share=1.5))
        fails(["axis", "[-2, 2)"], ValueError, lambda f=f: f(axis=2))
    fails(["labels", "integer"], TypeError, lambda: score(x, x[:, 0]))
    fails(["threshold", "number"], TypeError, lambda: sets(x, None))
    fails(["logits.dense()"], TypeError, lambda: sets(jaxsoft.linear_logits(x, x.T), 0.5))

    scores = x[:, 0]
    quantile, control = calibration.conformal_quantile, calibration.conformal_risk_control
    select, p_values = calibration.conformal_select, calibration.conformal_p_values
    for level in (0.0, 1.0, -0.5):
        fails(["alpha", "> 0 and < 1"], ValueError, lambda level=level: quantile(scores, level))
        fails(["alpha", "> 0 and < 1"], ValueError, lambda level=level: control(x, np.arange(3), level))
        fails(["level"], ValueError, lambda level=level: calibration.benjamini_hochberg(scores, level))
        fails(["level"], ValueError, lambda level=level: select(scores, scores, level))
    fails(["scores", "[examples]"], ValueError, lambda: quantile(x, 0.1))
    fails(["weights", "(4,)"], ValueError, lambda: quantile(scores, 0.1, weights=np.ones(3)))
    fails(["losses", "[examples, thresholds]"], ValueError, lambda: control(scores, np.arange(3), 0.1))
    fails(["thresholds", "(3,)"], ValueError, lambda: control(x, np.arange(4), 0.1))
    fails(["thresholds", "one entry"], ValueError, lambda: control(x[:, :0], np.arange(0), 0.1))
    fails(["bound", "> 0"], ValueError, lambda: control(x, np.arange(3), 0.1, bound=0.0))
    fails(["calibration", "[examples]"], ValueError, lambda: p_values(x, scores))
    fails(["scores", "floating"], TypeError, lambda: p_values(scores, y))
    fails(["p_values", "[tests]"], ValueError, lambda: calibration.benjamini_hochberg(x, 0.1))
    fails(["prune", "key"], ValueError, lambda: select(scores, scores, 0.1, prune="homogeneous"))
    fails(["prune", "'independent'"], ValueError, lambda: select(scores, scores, 0.1, prune="all"))
    fails(["calibration", "models"], ValueError, lambda: select(x, scores, 0.1))
    fails(["calibration", "same models", "4", "3"], ValueError, lambda: select(x, x[:3], 0.1))
