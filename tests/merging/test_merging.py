"""Merging of parameters: worked numbers, independent computations, expectations, limits, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsoft import merging

BASE = np.array([1.0, -2.0, 0.5, 0.0])
TUNED = np.array([1.2, -2.5, 0.5, 0.3])
DELTA = TUNED - BASE


def tree(rng, *shape):
    return {
        "w": jnp.asarray(rng.standard_normal((*shape, 3, 2))),
        "b": (jnp.asarray(rng.standard_normal(shape)), None),
    }


# Fisher.


def test_fisher_merge_worked_example(x64):
    models = [jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])]
    fishers = [jnp.array([0.9, 0.1]), jnp.array([0.3, 0.1])]
    np.testing.assert_allclose(merging.fisher_merge(models, fishers), [1.5, 0.5], atol=1e-12)
    weighted = merging.fisher_merge(models, fishers, [1.0, 3.0])
    np.testing.assert_allclose(weighted, [2.0, (0.2 - 0.3) / 0.4], atol=1e-12)


def test_fisher_merge_is_the_minimum_of_the_quadratic_losses(x64):
    rng = np.random.default_rng(0)
    models, fishers = [tree(rng) for _ in range(3)], [jax.tree.map(jnp.square, tree(rng)) for _ in range(3)]
    merged = merging.fisher_merge(models, fishers, [0.5, 1.0, 2.0])

    def loss(p):
        terms = [
            jax.tree.map(lambda p, m, f, w=w: w * jnp.sum(f * (p - m) ** 2), p, m, f)
            for m, f, w in zip(models, fishers, [0.5, 1.0, 2.0])
        ]
        return sum(jax.tree.leaves(terms))

    chex.assert_trees_all_close(jax.grad(loss)(merged), jax.tree.map(jnp.zeros_like, merged), atol=1e-12)


def test_fisher_merge_edge_cases():
    models = [jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0])]
    none = merging.fisher_merge(models, [jnp.zeros(2)] * 2, [3.0, 1.0])
    np.testing.assert_allclose(none, [1.5, 3.0])
    tiny = merging.fisher_merge(
        models, [jnp.full(2, 3e-37), jnp.full(2, 1e-37)]
    )  # sums and products underflow
    np.testing.assert_allclose(tiny, [1.5, 3.0], rtol=1e-5)
    low = merging.fisher_merge([m.astype(jnp.bfloat16) for m in models], [jnp.ones(2)] * 2)
    assert low.dtype == jnp.bfloat16


def test_diagonal_fisher_of_a_linear_head_worked_example(x64):
    """p (1 - p) h^2 for each entry."""
    h, w = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, -0.2, 0.1], [0.0, 0.0, 0.0]])
    ours = merging.diagonal_fisher(lambda w, h: h @ w, w, h)
    expected = [[0.248517, 0.994067], [0.176650, 0.706600], [0.213650, 0.854602]]
    np.testing.assert_allclose(ours.T, expected, atol=5e-7)


def network(p, x):
    return jnp.tanh(x["a"] @ p["w"]) * p["b"][0] + jnp.array([0.1, -0.2])


def test_diagonal_fisher_is_the_sum_over_labels(x64):
    rng = np.random.default_rng(0)
    p, x = tree(rng), {"a": jnp.asarray(rng.standard_normal((5, 3)))}
    score = jax.jit(jax.grad(lambda p, x, y: jax.nn.log_softmax(network(p, {"a": x}))[y]))
    expected = jax.tree.map(jnp.zeros_like, p)
    for row in x["a"]:
        for y, prob in enumerate(jax.nn.softmax(network(p, {"a": row}))):
            expected = jax.tree.map(lambda e, g, q=prob: e + q * g**2 / 5, expected, score(p, row, y))
    chex.assert_trees_all_close(
        jax.jit(lambda: merging.diagonal_fisher(network, p, x))(), expected, rtol=1e-10
    )

    labels = jnp.array([0, 1, 1, 0, 1])
    empirical = jax.tree.map(jnp.zeros_like, p)
    for row, y in zip(x["a"], labels):
        empirical = jax.tree.map(lambda e, g: e + g**2 / 5, empirical, score(p, row, y))
    chex.assert_trees_all_close(merging.diagonal_fisher(network, p, x, labels=labels), empirical, rtol=1e-10)


def test_diagonal_fisher_with_drawn_labels_has_the_exact_mean():
    rng = np.random.default_rng(0)
    p = jax.tree.map(lambda x: x.astype(jnp.float32), tree(rng))
    one = jnp.asarray(rng.standard_normal((1, 3)), jnp.float32)
    exact = merging.diagonal_fisher(network, p, {"a": one})
    many = merging.diagonal_fisher(network, p, {"a": jnp.tile(one, (4000, 1))}, key=jax.random.key(0))
    chex.assert_trees_all_close(many, exact, rtol=0.1, atol=1e-3)


# Deltas.


@pytest.mark.parametrize(
    ("divisor", "merged"), [(None, [1.4, -2, 0.5, 0.6]), (0.7, [1.285714, -2, 0.5, 0.428571])]
)
def test_dare_worked_example(x64, divisor, merged):
    """With the keep mask 1, 0, 1, 1: a key is searched that draws it."""
    draw = jax.jit(
        lambda seed: merging.dare_delta(jnp.asarray(DELTA), jax.random.key(seed), 0.5, divisor=divisor)
    )
    for seed in range(200):
        out = draw(seed)
        if bool(out[0] != 0) and bool(out[1] == 0) and bool(out[3] != 0):
            np.testing.assert_allclose(BASE + out, merged, atol=5e-7)
            return
    raise AssertionError("no key draws the mask")


def test_dare_and_della_keep_the_expectation_and_the_density():
    delta = {
        "w": jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32),
        "b": jnp.array(0.7),
    }
    keys = jax.random.split(jax.random.key(0), 4000)
    for function, density in (
        (lambda k: merging.dare_delta(delta, k, 0.4), 0.6),
        (lambda k: merging.della_delta(delta, k, 0.6, 0.3), 0.6),
    ):
        out = jax.jit(jax.vmap(function))(keys)
        chex.assert_trees_all_close(jax.tree.map(lambda x: jnp.mean(x, axis=0), out), delta, atol=0.12)
        for x in jax.tree.leaves(out):
            assert float(jnp.mean(x != 0)) == pytest.approx(density, abs=0.02)
    same = merging.dare_delta(delta, jax.random.key(0), 0.0)
    chex.assert_trees_all_equal(same, delta)


def test_leaves_have_masks_of_their_own():
    delta = {"a": jnp.ones(200), "b": jnp.ones(200)}
    for out in (
        merging.dare_delta(delta, jax.random.key(0), 0.5),
        merging.della_delta(delta, jax.random.key(0)),
    ):
        assert float(jnp.mean((out["a"] == 0) == (out["b"] == 0))) < 0.8


def test_della_worked_example(x64):
    """Where an entry is kept it is divided by its probability."""
    keep = np.array([0.533333333333, 0.8, 0.4, 0.666666666667])
    draw = jax.jit(lambda key: merging.della_delta(jnp.asarray(DELTA), key, 0.6, 0.2))
    out = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 3000)))
    kept = out != 0
    np.testing.assert_allclose(out, np.where(kept, DELTA / keep, 0), atol=1e-10)
    np.testing.assert_allclose(kept.mean(axis=0), [keep[0], keep[1], 0, keep[3]], atol=0.04)  # delta[2] is 0
    np.testing.assert_allclose(
        BASE + np.where([1, 0, 1, 1], DELTA / keep, 0), [1.375, -2, 0.5, 0.45], atol=1e-9
    )


def test_bit_delta_worked_example(x64):
    np.testing.assert_allclose(
        BASE + merging.bit_delta(jnp.asarray(DELTA)), [1.25, -2.25, 0.5, 0.25], atol=1e-12
    )
    rows = jnp.array([[1.0, -3.0], [0.5, 0.5]])
    np.testing.assert_allclose(merging.bit_delta(rows, axis=-1), [[2.0, -2.0], [0.5, 0.5]])
    best = [float(jnp.sum((rows - s * jnp.sign(rows)) ** 2)) for s in (1.2, 1.25, 1.3)]
    assert min(best) == best[1] and float(merging.bit_delta(rows)[0, 0]) == 1.25
    assert merging.bit_delta(jnp.zeros((0, 3))).shape == (0, 3)


def test_star_worked_example(x64):
    delta = jnp.array([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    expected = [
        [2.060307, 1.081223, -0.049850],
        [1.081223, 2.010458, 1.131072],
        [-0.049850, 1.131072, 0.929235],
    ]
    np.testing.assert_allclose(merging.star_delta(delta, 0.9), expected, atol=5e-7)
    for share, rank in ((0.4, 1), (0.9, 2), (1.0, 3)):
        s = np.linalg.svd(merging.star_delta(delta, share), compute_uv=False)
        assert np.sum(s > 1e-9) == rank
        np.testing.assert_allclose(s.sum(), 5.0, rtol=1e-12)
    np.testing.assert_allclose(merging.star_delta(delta, 1.0), delta, atol=1e-12)


def test_star_of_trees_and_batches():
    delta = {
        "w": jax.random.normal(jax.random.key(0), (2, 4, 3)),
        "b": jnp.ones(3),
        "none": None,
        "zero": jnp.zeros((2, 2)),
    }
    out = jax.jit(lambda d: merging.star_delta(d, 0.5))(delta)
    np.testing.assert_array_equal(out["b"], delta["b"])
    np.testing.assert_array_equal(out["zero"], delta["zero"])
    for x, y in zip(delta["w"], out["w"]):
        np.testing.assert_allclose(merging.star_delta(x, 0.5), y, atol=1e-5)


# Model Stock.


def test_model_stock_worked_example(x64):
    merged = merging.model_stock_merge(jnp.zeros(3), [jnp.array([1.0, 0.0, 1.0]), jnp.array([1.0, 1.0, 0.0])])
    np.testing.assert_allclose(merged, [2 / 3, 1 / 3, 1 / 3], atol=1e-12)


def test_model_stock_is_the_formula_leaf_by_leaf(x64):
    rng = np.random.default_rng(0)
    base = tree(rng)
    common = tree(rng)
    models = [jax.tree.map(lambda b, c, d: b + c + 0.5 * d, base, common, tree(rng)) for _ in range(4)]
    merged = jax.jit(merging.model_stock_merge)(base, models)
    deltas = np.stack([np.ravel(m["w"] - base["w"]) for m in models])
    unit = deltas / np.linalg.norm(deltas, axis=1, keepdims=True)
    c = np.mean((unit @ unit.T)[np.triu_indices(4, 1)])
    t = 4 * c / (1 + 3 * c)
    np.testing.assert_allclose(np.ravel(merged["w"]), np.ravel(base["w"]) + t * deltas.mean(0), rtol=1e-10)
    assert merged["b"][1] is None


def test_model_stock_finds_the_centre_of_a_sphere():
    """Models around a centre far from the base, in many dimensions: closer to the centre than their mean."""
    rng = np.random.default_rng(0)
    base, centre = np.zeros(3000), rng.standard_normal(3000)
    models = [jnp.asarray(centre + rng.standard_normal(3000), jnp.float32) for _ in range(2)]
    merged = merging.model_stock_merge(jnp.asarray(base, jnp.float32), models)
    distance = lambda x: float(np.linalg.norm(x - centre))
    assert distance(merged) < 0.85 * distance(sum(models) / 2)


def test_model_stock_limits():
    base, x = jnp.array([1.0, 1.0]), jnp.array([3.0, 1.0])
    np.testing.assert_allclose(merging.model_stock_merge(base, [x, x]), x)
    np.testing.assert_allclose(merging.model_stock_merge(base, [x, jnp.array([1.0, 5.0])]), base, atol=1e-6)
    np.testing.assert_allclose(merging.model_stock_merge(base, [x, 2 * base - x]), base)
    np.testing.assert_allclose(merging.model_stock_merge(base, [base, base]), base)


def test_model_kinship_worked_example_and_formula(x64):
    models = [jnp.array([1.0, 2.0, 0.0]), jnp.array([2.0, 1.0, 0.0])]
    for measure, value in {"pearson": 0.5, "cosine": 0.8, "euclidean": 2**0.5}.items():
        np.testing.assert_allclose(
            merging.model_kinship(jnp.zeros(3), models, measure=measure)[0, 1], value, rtol=1e-12
        )
    rng = np.random.default_rng(0)
    base, *models = ({"a": tree(rng, 3, 4), "b": tree(rng, 5)} for _ in range(5))
    flat = np.stack([np.concatenate([np.ravel(x) for x in jax.tree.leaves(m)]) for m in (base, *models)])
    deltas = flat[1:] - flat[0]
    unit = deltas / np.linalg.norm(deltas, axis=1, keepdims=True)
    for measure, expected in {
        "pearson": np.corrcoef(deltas),
        "cosine": unit @ unit.T,
        "euclidean": np.linalg.norm(deltas[:, None] - deltas, axis=-1),
    }.items():
        kinship = merging.model_kinship(base, models, measure=measure)
        np.testing.assert_allclose(kinship, expected, rtol=1e-12, atol=1e-12)
    same = merging.model_kinship(base, [base, models[0]])
    np.testing.assert_allclose(same, [[0, 0], [0, 1]], atol=1e-12)


def test_every_delta_keeps_dtypes_and_applies():
    base = {"w": jnp.ones((2, 2), jnp.bfloat16), "empty": jnp.zeros((0, 2)), "scalar": jnp.array(2.0)}
    delta = jax.tree.map(lambda x: (0.5 * x).astype(x.dtype), base)
    key = jax.random.key(0)
    for out in (
        merging.bit_delta(delta),
        merging.dare_delta(delta, key),
        merging.della_delta(delta, key),
        merging.star_delta(delta),
    ):
        chex.assert_trees_all_equal_shapes_and_dtypes(optax.apply_updates(base, out), base)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: merging.fisher_merge([], []), ValueError, "models must be a list"),
        (lambda: merging.fisher_merge([jnp.ones(2)], [jnp.ones(3)]), ValueError, r"fishers\[0\] must be"),
        (lambda: merging.fisher_merge([jnp.ones(2)] * 2, [jnp.ones(2)]), ValueError, "one entry per model"),
        (
            lambda: merging.fisher_merge([jnp.ones(2)], [jnp.ones(2)], [0.0]),
            ValueError,
            r"weights\[0\] .* > 0",
        ),
        (lambda: merging.model_stock_merge(jnp.ones(2), [jnp.ones(2)]), ValueError, "at least 2 pytrees"),
        (lambda: merging.model_kinship(jnp.ones(2), [jnp.ones(2)]), ValueError, "at least 2 pytrees"),
        (
            lambda: merging.model_kinship(jnp.ones(2), [jnp.ones(2)] * 2, measure="angle"),
            ValueError,
            "measure must be .* 'angle'",
        ),
        (lambda: merging.model_stock_merge(jnp.ones(2), [jnp.ones(2), {}]), ValueError, r"models\[1\]"),
        (lambda: merging.diagonal_fisher(network, {}, {}), ValueError, "inputs must be"),
        (
            lambda: merging.diagonal_fisher(lambda w, x: w * x, 1.0, jnp.ones(2)),
            ValueError,
            r"logits_fn must return .* \[classes\]",
        ),
        (
            lambda: merging.diagonal_fisher(
                network, {}, jnp.ones(2), labels=jnp.ones(2, int), key=jax.random.key(0)
            ),
            ValueError,
            "labels and key",
        ),
        (
            lambda: merging.diagonal_fisher(network, {}, jnp.ones(2), labels=jnp.ones(2)),
            TypeError,
            "labels must be",
        ),
        (lambda: merging.dare_delta(jnp.ones(2), jax.random.key(0), 1.0), ValueError, "drop_rate .* < 1"),
        (lambda: merging.dare_delta(jnp.ones(2), jax.random.key(0), 0.5, divisor=0.0), ValueError, "divisor"),
        (lambda: merging.della_delta(jnp.ones(2), jax.random.key(0), 0.1, 0.2), ValueError, "density - eps"),
        (lambda: merging.della_delta(jnp.ones(2), jax.random.key(0), 0.9, 0.2), ValueError, "density . eps"),
        (lambda: merging.star_delta(jnp.ones((2, 2)), 0.0), ValueError, "share .* > 0"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
