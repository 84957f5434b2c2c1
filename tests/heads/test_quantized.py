"""VQ-Logits: worked numbers, the dense loss, top-k with ties, k-means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close, fails, near, with_gradient

from jaxsoft import heads, losses


def test_worked_numbers():
    hidden = jnp.ones((1, 1))
    loss = heads.vq_cross_entropy(
        hidden, jnp.array([[1.0], [-0.5], [0.3]]), jnp.array([0, 0, 1, 2, 2, 2]), jnp.array([3])
    )
    close(loss, [2.011809])
    codebook, codes = jnp.array([[1.0], [-0.5], [2.0]]), jnp.array([0, 1, 2, 2, 1, 0, 0])
    logits = heads.vq_logits(hidden, codebook, codes)
    close(logits, [[1, -0.5, 2, 2, -0.5, 1, 1]])
    nll = heads.vq_cross_entropy(hidden[:, None], codebook, codes, jnp.array([[0]]))
    close(nll + 1, [[3.184120]])
    close(np.exp(-nll), [[0.112577]])


def point(n=6, d=3, codes=5, classes=9):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    labels[1], labels[2] = -100, 8
    bias = rng.normal(size=classes)
    return dict(
        hidden=jnp.asarray(rng.normal(size=(n, d))),
        codebook=jnp.asarray(rng.normal(size=(codes, d))),
        bias=jnp.asarray(bias),
        labels=jnp.asarray(labels),
        codes=jnp.asarray([0, 3, 1, 3, 3, 0, 2, 1, 3]),  # no class has code 4
    )


def test_loss_is_the_dense_one(x64):
    """Values and gradients of hidden, codebook and biases, with a code without classes and an absent class."""

    def of(x, dense, absent=False):
        bias = x["bias"].at[8].set(-jnp.inf) if absent else x["bias"]
        args = (x["hidden"], x["codebook"], x["codes"])
        if dense:
            return [
                losses.cross_entropy(heads.vq_logits(*args, bias=b), x["labels"], ignore_index=-100)
                for b in (None, bias)
            ]
        return [heads.vq_cross_entropy(*args, x["labels"], bias=b) for b in (None, bias)]

    @jax.jit
    def run(x):
        return [
            with_gradient(functools.partial(of, dense=dense, absent=absent), x)
            for absent in (False, True)
            for dense in (False, True)
        ]

    ours, dense, absent, absent_dense = run(point())
    for a, b in ((ours, dense), (absent, absent_dense)):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            near(x, y, 1e-12)
    assert absent[0][1][2] == np.inf and ours[0][0][1] == 0


def test_top_k_is_that_of_the_logits():
    """With ties within a code and between codes, with biases, absent classes, and k above the number of codes."""
    x = point()
    codebook = jnp.round(x["codebook"]).at[1].set(jnp.round(x["codebook"])[0])  # two codes that tie
    hidden = jnp.round(2 * x["hidden"])
    biases = (None, jnp.round(x["bias"]), jnp.round(x["bias"]).at[2].set(-jnp.inf))

    @jax.jit
    def run(hidden, codebook):
        args = hidden, codebook, x["codes"]
        return [
            (heads.vq_top_k(*args, k, bias=bias), jax.lax.top_k(heads.vq_logits(*args, bias=bias), k))
            for bias in biases
            for k in (1, 3, 9)
        ]

    for i, (got, (values, indices)) in enumerate(run(hidden, codebook)):
        near(got.values, values, 1e-6)
        np.testing.assert_array_equal(got.indices, np.where(np.isneginf(values), -1, indices), err_msg=str(i))


def test_labels_and_codes_out_of_range():
    x = point()
    args = x["hidden"].astype(jnp.float32), x["codebook"].astype(jnp.float32)
    labels = jnp.array([0, 9, -100, -1, 1, 2])

    @jax.jit
    def run(hidden):
        loss = lambda hidden: heads.vq_cross_entropy(hidden, args[1], x["codes"], labels)
        values, pull = jax.vjp(loss, hidden)
        return values, pull(jnp.ones(6))[0]

    values, gradient = run(args[0].at[2].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(values), [False, True, False, True, False, False])
    assert np.isnan(gradient[1]).all() and not np.any(gradient[2])
    assert np.isnan(heads.vq_logits(*args, x["codes"].at[3].set(5))[:, 3]).all()


def test_codebook():
    """Clusters are found, a code that lost its classes is placed anew, and every class has its nearest code."""
    rng = np.random.default_rng(0)
    centers = np.array([[0, 0], [10, 0], [0, 10], [10, 10], [20, 20]])
    weight = jnp.asarray(np.repeat(centers, 8, 0) + rng.normal(size=(40, 2)) / 10, jnp.float32)
    run = jax.jit(lambda key: heads.vq_codebook(weight, 5, key, steps=15))
    for seed in range(4):
        codebook, codes = map(np.asarray, run(jax.random.key(seed)))
        distance = ((np.asarray(weight)[:, None] - codebook) ** 2).sum(-1)
        np.testing.assert_array_equal(codes, distance.argmin(1))
        assert len(np.unique(codes)) == 5


def test_bad_input():
    x = point()
    args, labels = (x["hidden"], x["codebook"], x["codes"]), x["labels"]
    loss = heads.vq_cross_entropy
    fails(["codebook", "[K, d]"], ValueError, lambda: loss(args[0], args[1][0], args[2], labels))
    fails(["hidden", "[*rows, 3]"], ValueError, lambda: loss(args[0][:, :2], *args[1:], labels))
    fails(["codes", "integer"], TypeError, lambda: loss(*args[:2], x["bias"], labels))
    fails(["codes", "[classes]"], ValueError, lambda: loss(*args[:2], args[2][None], labels))
    fails(["bias", "(9,)", "(3,)"], ValueError, lambda: loss(*args, labels, bias=jnp.ones(3)))
    fails(["labels", "(6,)"], ValueError, lambda: loss(*args, labels[1:]))
    fails(["k must be", "<= 9", "10"], ValueError, lambda: heads.vq_top_k(*args, 10))
    fails(["size", "<= 5", "6"], ValueError, lambda: heads.vq_codebook(args[1], 6, jax.random.key(0)))
