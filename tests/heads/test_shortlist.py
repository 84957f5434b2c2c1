"""Shortlists: exact where the preview is, among the shortlist's classes elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import fails, near

from jaxsoft import heads


def batch(n=7, d=5, classes=30):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    labels[1] = -100
    weight = rng.normal(size=(classes, d)) * [3, 2, 1, 0.3, 0.1]
    return jnp.asarray(rng.normal(size=(n, d))), jnp.asarray(weight), jnp.asarray(labels)


def test_shortlist(x64):
    """Top-k and loss, beside those of the dense logits with a mask of the shortlist, and their gradients."""
    hidden, weight, labels = batch()
    size, classes = 6, 30
    directions = np.linalg.svd(np.asarray(weight), full_matrices=False)[2]

    def dense(hidden, weight, rank):
        logits = hidden @ weight.T
        basis = directions[:rank].T
        preview = hidden @ basis @ (weight @ basis).T
        chosen = jax.nn.one_hot(
            jax.lax.top_k(jax.lax.stop_gradient(preview), size)[1], classes, dtype=bool
        ).any(-2)
        counts = chosen | (jnp.arange(classes) == labels[:, None])
        own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
        loss = jax.nn.logsumexp(jnp.where(counts, logits, -jnp.inf), axis=-1) - own
        return jnp.where(labels >= 0, loss, 0), jax.lax.top_k(jnp.where(chosen, logits, -jnp.inf), 3)

    def ours(hidden, weight, rank):
        head = heads.shortlist_head(weight, rank, transpose_weight=True)
        loss = heads.shortlist_cross_entropy(hidden, head, labels, size=size)
        return loss, heads.shortlist_top_k(hidden, head, 3, size=size)

    @jax.jit
    def run(hidden, weight):
        out = []
        for rank in (2, 5):
            for f in (ours, dense):
                loss, pull, best = jax.vjp(functools.partial(f, rank=rank), hidden, weight, has_aux=True)
                out.append((loss, pull(jnp.linspace(1, 2, len(labels))), *best))
        return out, jax.lax.top_k(hidden @ weight.T, 3)[1]

    results, exact = run(hidden, weight)
    for a, b in (results[:2], results[2:]):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            near(x, y, 1e-9)
    np.testing.assert_array_equal(results[2][3], exact)


def test_borders():
    hidden, weight, labels = (jnp.asarray(a, jnp.float32) for a in batch())
    hidden, labels = hidden.at[1].set(jnp.nan), labels.astype(jnp.int32).at[2].set(30)

    @jax.jit
    def run(hidden):
        head = heads.shortlist_head(weight, 5, transpose_weight=True)
        best = heads.shortlist_top_k(hidden, head, 1, size=1).indices[:, 0]
        values, pull = jax.vjp(lambda h: heads.shortlist_cross_entropy(h, head, labels, size=3), hidden)
        own = jax.value_and_grad(lambda h: heads.shortlist_cross_entropy(h, head, best, size=1)[0])(hidden)
        return values, pull(jnp.ones(7))[0], own

    values, gradient, own = run(hidden)
    np.testing.assert_array_equal(np.isnan(values), np.arange(7) == 2)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), np.arange(7) == 2)
    assert values[1] == 0 and own[0] == 0 and not np.any(own[1])  # the label is the whole shortlist


def test_bad_input():
    hidden, weight, labels = batch()
    head = heads.ShortlistHead(weight, weight[:5, :2], weight[:, :2])
    fails(["rank", "<= 5", "6"], ValueError, lambda: heads.shortlist_head(weight, 6, transpose_weight=True))
    fails(["weight", "[d, classes]"], ValueError, lambda: heads.shortlist_head(weight[0], 1))
    fails(["k must be", "<= 3", "4"], ValueError, lambda: heads.shortlist_top_k(hidden, head, 4, size=3))
    fails(["size", "<= 30", "31"], ValueError, lambda: heads.shortlist_top_k(hidden, head, 4, size=31))
    fails(
        ["labels", "(7,)"],
        ValueError,
        lambda: heads.shortlist_cross_entropy(hidden, head, labels[1:], size=3),
    )
