"""Combinations of several gradients: worked numbers, oracles, optimality, invariances, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import optimizers as o

PAIR = np.array([[1.0, 0.0], [-0.5, 1.0]])
ROWS = np.array([[1.0, 2.0], [3.0, 0.0], [-1.0, 1.0], [2.0, 2.0]])


def as_tree(rows):
    """The same vectors as a tree: a matrix, a scalar, an empty leaf and no leaf."""
    n = len(rows)
    return {
        "matrix": jnp.asarray(rows[:, :4]).reshape(n, 2, 2),
        "scalar": jnp.asarray(rows[:, 4]),
        "empty": jnp.zeros((n, 0), rows.dtype),
        "none": None,
    }


def flat(tree):
    return np.concatenate([np.ravel(tree["matrix"]), np.ravel(tree["scalar"])])


# MGDA.


def test_min_norm_worked_example(x64):
    gradient, weights = o.min_norm_gradient(jnp.asarray(PAIR))
    np.testing.assert_allclose(weights, [0.538461538462, 0.461538461538], atol=1e-12)
    np.testing.assert_allclose(gradient, [0.307692307692, 0.461538461538], atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 20])
def test_min_norm_is_optimal(x64, n):
    """Every inner product is at least the squared norm, with equality where the weight is positive."""
    solve = jax.jit(o.min_norm_gradient)
    for seed in range(10):
        rows = np.random.default_rng(seed).standard_normal((n, 5)) + 0.8
        gradient, weights = solve(as_tree(rows))
        d, weights = flat(gradient), np.asarray(weights)
        assert gradient["none"] is None and gradient["empty"].shape == (0,)
        assert np.all(weights >= 0) and abs(weights.sum() - 1) < 1e-12
        np.testing.assert_allclose(d, weights @ rows, atol=1e-12)
        gap = rows @ d - d @ d
        assert np.all(gap > -1e-8)
        assert np.all(np.abs(gap[weights > 1e-6]) < 1e-6)


def test_min_norm_of_three_contains_that_of_two(x64):
    """A third gradient that is longer in the same direction changes nothing."""
    pair, _ = o.min_norm_gradient(jnp.asarray(PAIR))
    three, weights = o.min_norm_gradient(jnp.concatenate([PAIR, 5 * pair[None]]))
    np.testing.assert_allclose(three, pair, atol=1e-10)
    np.testing.assert_allclose(weights[2], 0, atol=1e-10)


def test_min_norm_edge_cases():
    for n in (1, 2, 3):
        same = jnp.broadcast_to(jnp.array([1.0, -2.0]), (n, 2))
        gradient, weights = o.min_norm_gradient(same)
        np.testing.assert_allclose(gradient, [1.0, -2.0], rtol=1e-6)
        np.testing.assert_allclose(weights, np.full(n, 1 / n), rtol=1e-6)
        np.testing.assert_array_equal(o.min_norm_gradient(0 * same)[0], [0.0, 0.0])
    opposite, _ = o.min_norm_gradient(jnp.array([[1.0, 0.0], [-3.0, 0.0]]))  # Pareto stationary
    np.testing.assert_allclose(opposite, [0.0, 0.0], atol=1e-6)
    _, weights = o.min_norm_gradient(jnp.array([[1.0, 0.0], [3.0, 1.0]]))  # one dominates
    np.testing.assert_array_equal(weights, [1.0, 0.0])
    low, _ = o.min_norm_gradient(jnp.asarray(PAIR, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("n", [2, 3])
def test_min_norm_scales_and_maps(n):
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((4, n, 5)), jnp.float32)
    solve = jax.jit(jax.vmap(o.min_norm_gradient))
    gradient, weights = solve(rows)
    scaled, same = solve(1e6 * rows)
    np.testing.assert_allclose(same, weights, atol=1e-5)
    np.testing.assert_allclose(scaled, 1e6 * gradient, rtol=1e-4, atol=1)
    for x, g in zip(rows, gradient):
        np.testing.assert_allclose(o.min_norm_gradient(x)[0], g, atol=1e-5)


def test_weights_are_constants_under_differentiation(x64):
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)))
    for function in (
        o.min_norm_gradient,
        lambda g: o.project_conflicting_gradients(g, jax.random.key(0)),
        lambda g: o.preference_gradient(g, g[0]),
    ):
        derivative = jax.grad(lambda g, f=function: jnp.sum(f(g)[0]))(rows)
        np.testing.assert_allclose(
            derivative, np.broadcast_to(function(rows)[1][:, None], (3, 4)), atol=1e-12
        )


# ParetoDA.


def test_preference_worked_example(x64):
    gradient, weights = o.preference_gradient(jnp.asarray(PAIR), jnp.array([1.0, 0.2]))
    np.testing.assert_allclose(weights, [5 / 7, 2 / 7], atol=1e-12)
    np.testing.assert_allclose(gradient, [4 / 7, 2 / 7], atol=1e-12)
    assert abs(PAIR[1] @ gradient) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_preference_equals_a_linear_program_solver(x64, n):
    linprog = pytest.importorskip("scipy.optimize").linprog
    solve = jax.jit(o.preference_gradient)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        rows, preference = rng.standard_normal((n, 5)), rng.standard_normal((1, 5))
        gradient, weights = solve(as_tree(rows), jax.tree.map(lambda x: x[0], as_tree(preference)))
        expected = linprog(
            -rows @ preference[0], A_ub=-rows @ rows.T, b_ub=np.zeros(n), A_eq=np.ones((1, n)), b_eq=[1]
        )
        np.testing.assert_allclose(flat(gradient) @ preference[0], -expected.fun, atol=1e-8)
        np.testing.assert_allclose(flat(gradient), np.asarray(weights) @ rows, atol=1e-12)
        assert np.min(rows @ flat(gradient)) > -1e-9 and np.all(np.asarray(weights) >= 0)


def test_preference_without_conflict_is_the_best_gradient():
    rows = jnp.array([[1.0, 0.1], [0.5, 1.0], [0.2, 0.3]])
    gradient, weights = o.preference_gradient(rows, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(gradient, rows[1], rtol=1e-5)
    np.testing.assert_allclose(weights, [0, 1, 0], atol=1e-6)


def test_preference_of_zero_and_equal_gradients_is_finite():
    for rows in (jnp.zeros((3, 2)), jnp.ones((3, 2)), jnp.array([[1.0, 0.0], [-1.0, 0.0]])):
        gradient, weights = o.preference_gradient(rows, jnp.array([1.0, 1.0]))
        assert bool(jnp.all(jnp.isfinite(gradient))) and float(jnp.sum(weights)) == pytest.approx(1)
        assert float(jnp.min(rows @ gradient)) > -1e-5


# Orthogonal and conflicting gradients.


def test_combine_orthogonal_worked_example(x64):
    main, auxiliary = jnp.array([1.0, 2.0, 0.0]), jnp.array([-1.0, 1.0, 3.0])
    np.testing.assert_allclose(
        o.combine_orthogonal_gradients(main, auxiliary, 0.5), [0.4, 2.3, 1.5], atol=1e-12
    )
    projected = o.combine_orthogonal_gradients(main, auxiliary) - main
    np.testing.assert_allclose(projected, [-1.2, 0.6, 3], atol=1e-12)


def test_combine_orthogonal_keeps_the_main_product(x64):
    main, auxiliary = (
        jax.tree.map(lambda x, i=i: x[i], as_tree(np.random.default_rng(0).standard_normal((2, 5))))
        for i in (0, 1)
    )
    out = jax.jit(o.combine_orthogonal_gradients)(main, auxiliary, 0.7)
    assert flat(out) @ flat(main) == pytest.approx(flat(main) @ flat(main))
    zero = jax.tree.map(jnp.zeros_like, main)
    chex.assert_trees_all_close(
        o.combine_orthogonal_gradients(zero, auxiliary, 2.0), jax.tree.map(lambda x: 2 * x, auxiliary)
    )


def test_project_conflicting_equals_pytorch_optimizer(x64):
    torch = pytest.importorskip("torch")
    po = pytest.importorskip("pytorch_optimizer")
    for seed in range(5):
        rows = np.random.default_rng(seed).standard_normal((2, 4))
        theta = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = po.PCGrad(torch.optim.SGD([theta], lr=1.0))
        optimizer.pc_backward([theta @ torch.tensor(row) for row in rows])
        gradient, _ = o.project_conflicting_gradients(jnp.asarray(rows), jax.random.key(0))
        np.testing.assert_allclose(gradient, theta.grad.numpy(), atol=1e-12)


def test_project_conflicting_is_the_loop_of_the_paper(x64):
    project = jax.jit(o.project_conflicting_gradients, static_argnames="reduction")
    for seed in range(5):
        rows, key = np.random.default_rng(seed).standard_normal((4, 5)), jax.random.key(seed)
        total = np.zeros(5)
        for i, k in enumerate(jax.random.split(key, 4)):
            p = rows[i].copy()
            for j in jax.random.permutation(k, 4):
                if j != i and p @ rows[j] < 0:
                    p -= p @ rows[j] / (rows[j] @ rows[j]) * rows[j]
            total += p
        for reduction, expected in (("sum", total), ("mean", total / 4)):
            gradient, weights = project(as_tree(rows), key, reduction=reduction)
            np.testing.assert_allclose(flat(gradient), expected, atol=1e-12)
            np.testing.assert_allclose(np.asarray(weights) @ rows, expected, atol=1e-12)


def test_project_conflicting_without_conflict_is_the_mean():
    rows = jnp.array([[1.0, 0.1], [0.5, 1.0], [0.0, 0.0]])
    gradient, weights = o.project_conflicting_gradients(rows, jax.random.key(0))
    np.testing.assert_allclose(gradient, jnp.mean(rows, axis=0), rtol=1e-6)
    np.testing.assert_allclose(weights, np.full(3, 1 / 3), rtol=1e-6)


# Modulation and coherence.


def test_modulation_worked_example(x64):
    scores, running = jnp.array([0.5, 1.0]), jnp.array([0.6, 0.9])
    coefficients = o.gradient_modulation_coefficients(scores, running)
    np.testing.assert_allclose(coefficients, [0.741661, 1.143722], atol=5e-7)
    np.testing.assert_allclose(o.gradient_modulation_coefficients(scores, running, 0.0), [1.0, 1.0])
    np.testing.assert_array_equal(o.gradient_modulation_coefficients(scores, scores, 3.0), [1.0, 1.0])


def test_modulation_of_three_takes_the_mean_of_the_others(x64):
    s, t = np.array([[0.5, 1.0, 2.0], [1.0, 0.2, 0.1]]), np.array([[0.6, 0.9, 1.0], [0.3, 0.3, 0.3]])
    others = lambda s: np.stack([np.delete(s, i, axis=-1).mean(-1) for i in range(3)], axis=-1)
    expected = np.exp(0.5 * (np.exp(others(t) - t) - np.exp(others(s) - s)))
    np.testing.assert_allclose(
        o.gradient_modulation_coefficients(jnp.asarray(s), jnp.asarray(t), 0.5), expected
    )


def test_coherence_worked_example(x64):
    np.testing.assert_allclose(o.gradient_coherence(jnp.asarray(ROWS)), 0.520833333333, atol=1e-12)
    assert float(o.gradient_coherence(jnp.eye(5))) == pytest.approx(1 / 5)
    assert float(o.gradient_coherence(jnp.ones((5, 2)))) == pytest.approx(1)
    assert float(o.gradient_coherence(jnp.zeros((5, 2)))) == 0
    rows = np.random.default_rng(0).standard_normal((6, 5))
    assert float(o.gradient_coherence(as_tree(rows))) == pytest.approx(
        float(o.gradient_coherence(jnp.asarray(rows)))
    )


def test_winsorized_worked_example(x64):
    np.testing.assert_allclose(o.winsorized_mean_gradient(jnp.asarray(ROWS)), [1.5, 1.5], atol=1e-12)
    np.testing.assert_allclose(o.winsorized_mean_gradient(jnp.asarray(ROWS), 0), ROWS.mean(0), atol=1e-12)
    np.testing.assert_allclose(o.winsorized_mean_gradient(jnp.asarray(ROWS[:3])), np.median(ROWS[:3], 0))


def test_winsorized_mean_equals_scipy(x64):
    winsorize = pytest.importorskip("scipy.stats.mstats").winsorize
    rows = np.random.default_rng(0).standard_normal((10, 5))
    ours = o.winsorized_mean_gradient(as_tree(rows), 2)
    np.testing.assert_allclose(
        flat(ours), np.mean(winsorize(rows, limits=(0.2, 0.2), axis=0), axis=0), rtol=1e-12
    )


def test_one_wild_gradient_moves_the_winsorized_mean_little():
    rows = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    wild = rows.copy()
    wild[3] = 1e20
    moved = o.winsorized_mean_gradient(jnp.asarray(wild)) - o.winsorized_mean_gradient(jnp.asarray(rows))
    assert float(jnp.max(jnp.abs(moved))) < np.ptp(rows)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.min_norm_gradient({"a": jnp.ones((2, 3)), "b": jnp.ones(3)}), ValueError, "leading axis"),
        (lambda: o.min_norm_gradient(jnp.ones(())), ValueError, "leading axis"),
        (lambda: o.min_norm_gradient(jnp.ones((0, 3))), ValueError, "leading axis"),
        (lambda: o.min_norm_gradient(jnp.ones((2, 3)), max_steps=0), ValueError, "max_steps"),
        (
            lambda: o.preference_gradient(jnp.ones((9, 3)), jnp.ones(3)),
            ValueError,
            "at most 8 objectives, got 9",
        ),
        (lambda: o.preference_gradient(jnp.ones((2, 3)), jnp.ones(4)), ValueError, "preference must be"),
        (
            lambda: o.preference_gradient(jnp.ones((2, 3)), {"a": jnp.ones(3)}),
            ValueError,
            "preference must be",
        ),
        (lambda: o.combine_orthogonal_gradients(jnp.ones(2), jnp.ones(3)), ValueError, "auxiliary must be"),
        (lambda: o.combine_orthogonal_gradients(jnp.ones(2), jnp.ones(2), "x"), TypeError, "eta"),
        (
            lambda: o.project_conflicting_gradients(jnp.ones((2, 3)), jax.random.key(0), reduction="max"),
            ValueError,
            "reduction",
        ),
        (
            lambda: o.gradient_modulation_coefficients(jnp.ones(1), jnp.ones(1)),
            ValueError,
            "at least 2 modalities",
        ),
        (lambda: o.gradient_modulation_coefficients(jnp.ones(2), jnp.ones(3)), ValueError, "running_scores"),
        (lambda: o.gradient_modulation_coefficients(jnp.ones(2), jnp.ones(2), -1.0), ValueError, "alpha"),
        (lambda: o.gradient_coherence(jnp.ones(())), ValueError, "leading axis"),
        (lambda: o.winsorized_mean_gradient(jnp.ones((4, 2)), 2), ValueError, "trim .* <= 1, got 2"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
