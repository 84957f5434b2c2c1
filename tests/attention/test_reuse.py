"""Attentions that reuse, select or change softmax weights, and statistics of the weights, against dense formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import near, softmax

import jaxsoft
from jaxsoft.attention import reuse


def arrays(queries=5, keys=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 2)
    return [rng.standard_normal(s) for s in shapes]


MASK = np.array([[True, True, False, True, True, False], [True, False, True, True, True, True]])


def scores_of(q, k, b, h, causal, scale):
    x = scale * q[b, :, h] @ k[b, :, h // 2].T
    x = np.where(MASK[b], x, -np.inf)
    return np.where(np.tril(np.ones(x.shape, bool)), x, -np.inf) if causal else x


causality = pytest.mark.parametrize("causal", [False, True])

# --- UniAttn -------------------------------------------------------------------------------------------------------


@causality
def test_leader_and_follower_share_the_weights(causal, x64):
    q, k, v = arrays()
    rng = np.random.default_rng(9)
    other, hidden, compensation = (rng.standard_normal(s) for s in [(2, 6, 2, 5), (2, 5, 7), (7, 4, 5)])
    options = dict(key_where=MASK, is_causal=causal, scale=0.8)
    out, shared = reuse.unified_softmax_attention(q, k, v, **options)
    again = reuse.reuse_softmax_attention(shared, other)
    with_term = reuse.reuse_softmax_attention(shared, other, hidden=hidden, compensation=compensation)
    for b, h in np.ndindex(2, 4):
        x = scores_of(q, k, b, h, causal, 0.8)
        weights = softmax(x)
        near(out[b, :, h], weights @ v[b, :, h // 2])
        near(shared.logsumexp[b, :, h], np.log(np.exp(x).sum(-1)))
        near(again[b, :, h], weights @ other[b, :, h // 2])
        near(with_term[b, :, h], weights @ other[b, :, h // 2] + hidden[b] @ compensation[:, h])
    near(reuse.reuse_softmax_attention(shared, v), out)


def test_what_is_shared_is_small_and_passes_through_transformations(x64):
    q, k, v = arrays()
    lead = functools.partial(reuse.unified_softmax_attention, is_causal=True)
    shared = jax.jit(lead)(q, k, v)[1]
    assert shared.is_causal is True
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(shared)]
    assert sum(sizes) == q.size + k.size + q[..., 0].size + 1
    follow = jax.jit(reuse.reuse_softmax_attention)
    near(follow(shared, v), reuse.reuse_softmax_attention(lead(q, k, v)[1], v))
    half = lead(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)))[1]
    assert half.query.dtype == jnp.bfloat16 and half.logsumexp.dtype == jnp.float32


def test_the_gradient_of_the_follower_reaches_the_leader(x64):
    q, k, v = arrays()

    def f(q, k):
        _, shared = reuse.unified_softmax_attention(q, k, v, key_where=MASK)
        out = reuse.reuse_softmax_attention(shared, v)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    def direct(q, k):
        x = jnp.einsum("btkgh,bskh->btkgs", q.reshape(2, 5, 2, 2, 3), k) / np.sqrt(3)
        p = jax.nn.softmax(jnp.where(MASK[:, None, None, None], x, -jnp.inf), axis=-1)
        out = jnp.einsum("btkgs,bskv->btkgv", p, v)
        return jnp.sum(out.reshape(-1) * jnp.cos(jnp.arange(out.size)))

    for a, b in zip(*(jax.jit(jax.grad(g, argnums=(0, 1)))(q, k) for g in (f, direct))):
        assert np.abs(b).max() > 0.1
        near(a, b)


# --- URPE ----------------------------------------------------------------------------------------------------------

SCORES = np.array([[0.2, 1, -0.5], [0.4, 0.1, 0.3], [1, 0, 0.7]])
FACTORS = np.array([[0.5, 0.8, 1, -0.3, 0.2]])


def urpe_of_scores(scores, factors, values, **options):
    eye = jnp.eye(3)[:, None]
    return reuse.urpe_attention(scores[:, None], eye, values[:, None], factors, scale=1.0, **options)[:, 0]


def test_worked_numbers_of_urpe(x64):
    values = jnp.array([[1.0, 0], [0, 1], [1, 1]])
    weights = [
        [0.268664, -0.179377, 0.026683],
        [0.302383, 0.280013, -0.102603],
        [0.237113, 0.139567, 0.351316],
    ]
    near(urpe_of_scores(SCORES, FACTORS, jnp.eye(3)), weights, 1e-6)
    out = [[0.295347, -0.152694], [0.199780, 0.177410], [0.588429, 0.490882]]
    near(urpe_of_scores(SCORES, FACTORS, values), out, 1e-6)
    causal = [[1, 0], [0.459554, 0.425557], [0.588429, 0.490882]]
    near(urpe_of_scores(SCORES, FACTORS, values, is_causal=True), causal, 1e-6)
    pullback = jax.vjp(lambda x, c: urpe_of_scores(x, c, values), SCORES, FACTORS)[1]
    dx, dc = pullback(jnp.array([[1, -1], [0.5, 0.2], [0, 1]]))
    near(dx[0], [0.148292, -0.088516, -0.059775], 1e-6)
    near(dc[0], [0, 0.363447, 0.675982, -0.358516, 0], 1e-6)


@causality
def test_urpe_is_its_formula_for_every_block_size(causal, x64):
    q, k, v = arrays()
    rng = np.random.default_rng(2)
    factors, bias = rng.standard_normal((4, 5)), rng.standard_normal((4, 3))
    exact = np.zeros((2, 5, 4, 2))
    for b, i, h in np.ndindex(exact.shape[:-1]):
        offset = np.arange(6) - i
        x = scores_of(q, k, b, h, causal, 0.6)[i] + bias[h, np.clip(offset, -1, 1) + 1]
        exact[b, i, h] = (softmax(x) * factors[h, np.clip(offset, -2, 2) + 2]) @ v[b, :, h // 2]
    options = dict(bias=bias, key_where=MASK, is_causal=causal, scale=0.6)
    for size in (1, 2, 128):
        near(reuse.urpe_attention(q, k, v, factors, block_size=size, **options), exact)


def test_urpe_with_factors_of_one_is_softmax_attention_and_its_tables_have_gradients(x64):
    q, k, v = arrays()
    near(
        reuse.urpe_attention(q, k, k, np.ones((4, 1))), jax.nn.dot_product_attention(q, k, k), 1e-5
    )  # float32
    d = np.random.default_rng(4).standard_normal((4, 3))
    f = jax.jit(lambda t: jnp.sum(jnp.sin(reuse.urpe_attention(q, k, v, 1 + t, bias=2 * t, key_where=MASK))))
    near(np.vdot(jax.grad(f)(d), d), (f((1 + 1e-6) * d) - f((1 - 1e-6) * d)) / 2e-6, 1e-6)


# --- the k largest -------------------------------------------------------------------------------------------------


def test_worked_numbers_of_top_k(x64):
    q, k, v = jnp.ones((1, 1, 1)), jnp.array([1, 2, -1, 0.5])[:, None, None], jnp.eye(4)[:, None]
    weights = lambda count: reuse.top_k_attention(q, k, v, k=count)[0, 0]
    near(weights(2), [0.268941, 0.731059, 0, 0], 1e-6)
    near(weights(3), [0.231224, 0.628532, 0, 0.140244], 1e-6)
    tied = reuse.top_k_attention(q, jnp.ones((4, 1, 1)), v, k=2)[0, 0]
    near(tied, [0.5, 0.5, 0, 0])


@causality
@pytest.mark.parametrize("count", [1, 3, 6, 99])
def test_top_k_keeps_the_largest(count, causal, x64):
    q, k, v = arrays()
    out = reuse.top_k_attention(q, k, v, k=count, key_where=MASK, is_causal=causal)
    for b, h in np.ndindex(2, 4):
        x = scores_of(q, k, b, h, causal, 1 / np.sqrt(3))
        bound = np.sort(x, -1)[:, -min(count, 6), None]
        near(out[b, :, h], softmax(np.where(x >= bound, x, -np.inf)) @ v[b, :, h // 2])
    if count >= 6 and not causal:
        full = jax.nn.dot_product_attention(q, k, k, mask=MASK[:, None, None])
        near(reuse.top_k_attention(q, k, k, k=count, key_where=MASK), full, 1e-5)  # which is in float32


# --- n-grams -------------------------------------------------------------------------------------------------------


def test_worked_numbers_of_ngrams():
    tokens = jnp.array([1, 2, 3, 1, 2, 4, 1, 2])
    out = reuse.ngram_attention(tokens, jax.nn.one_hot(tokens, 5), n=3)
    near(out.output[-1], [0, 0, 0, 0.5, 0.5])
    assert out.matched.tolist() == [False] * 4 + [True, False, False, True]


@pytest.mark.parametrize("n", [1, 2, 3, 12])
@pytest.mark.parametrize("size", [3, 128])
def test_ngrams_are_counted(n, size, x64):
    rng = np.random.default_rng(0)
    tokens, where = rng.integers(0, 2, (3, 10)), rng.random((3, 10)) > 0.15
    values = np.where(where[..., None], rng.standard_normal((3, 10, 2)), np.nan)
    out = reuse.ngram_attention(jnp.asarray(tokens), values, n=n, where=where, block_size=size)
    assert out.matched.any() == (n < 12) and not out.matched.all()
    for b, i in np.ndindex(3, 10):
        found = []
        for t in range(n - 1, i + 1):
            here, there = slice(i - n + 2, i + 1), slice(t - n + 1, t)
            present = where[b, here].all() and where[b, there].all() and where[b, t] and where[b, i]
            if present and (tokens[b, here] == tokens[b, there]).all():
                found.append(values[b, t])
        assert out.matched[b, i] == bool(found)
        near(out.output[b, i], np.mean(found, axis=0) if found else [0, 0])


# --- statistics ----------------------------------------------------------------------------------------------------


def test_log_mass_from_two_moments(x64):
    key = jnp.array([[0.3, 0.1], [0.2, -0.4], [-0.1, 0.5], [0.4, 0.2]])[:, None]
    query = jnp.array([[[0.7, 0.3]]])
    near(reuse.long_context_log_mass(query, key, scale=1.0), [[1.564344]], 1e-6)
    q, k, _ = arrays()
    out = reuse.long_context_log_mass(q, k, key_where=MASK)
    for b, i, h in np.ndindex(2, 5, 4):
        keys = k[b, MASK[b], h // 2]
        direction = q[b, i, h] / np.sqrt(3)
        square = direction @ np.cov(keys.T, bias=True) @ direction
        near(out[b, i, h], np.log(len(keys)) + direction @ keys.mean(0) + square / 2)
    # Exact for one key; otherwise the error is of third order in the scores.
    product = np.einsum("btkgh,bskh->btkg", q.reshape(2, 5, 2, 2, 3), k[:, :1]).reshape(2, 5, 4)
    near(reuse.long_context_log_mass(q, k[:, :1], scale=1.0), product)
    error = lambda size: np.abs(
        reuse.long_context_log_mass(size * q, k)
        - reuse.unified_softmax_attention(size * q, k, k)[1].logsumexp
    ).max()
    assert 7 < error(0.02) / error(0.01) < 9


WEIGHTS = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.4, 0.3, 0.3, 0], [0.25, 0.25, 0.25, 0.25]])


def penalty(scores, **options):
    return reuse.attention_entropy_regularizer(scores, **{"threshold": 0.5, **options})


def test_worked_numbers_of_the_entropy_regularizer(x64):
    with np.errstate(divide="ignore"):
        scores = jnp.asarray(np.log(WEIGHTS))
    near(penalty(scores), [0.480453, 0, 0.156620, 0.480453], 1e-6)
    h, margin = np.array([0, 0.693147, 1.088900, 1.386294]), 0.2 * np.log(4)
    excess = np.maximum(np.abs(h - 0.5 * np.log(4)) - margin, 0)
    near(penalty(scores, continuous=True), excess**2, 1e-5)
    dh = np.array([-0.069044, 0.034522, 0.034522, 0])
    near(jax.grad(lambda x: penalty(x)[2])(scores)[2], 2 * (1.088900 - 0.693147) * dh, 1e-5)
    slope = jax.grad(lambda t: penalty(scores, threshold=t).sum())(0.5)
    near(slope, -2 * np.log(4) * (-0.693147 + 0.395753 + 0.693147), 1e-5)


def test_the_context_of_the_entropy_regularizer(x64):
    rng = np.random.default_rng(0)
    scores, where = jnp.asarray(rng.standard_normal((2, 3, 4, 5))), np.tril(np.ones((4, 5), bool))
    where[0] = False
    threshold = np.array([[0.2], [0.5], [0.9]])
    for context, size in (("columns", 5), ("row", np.maximum(where.sum(-1), 1)), (17, 17)):
        p = softmax(np.where(where, scores, -np.inf))
        h = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
        d = h - threshold * np.log(size)
        exact = np.where((np.abs(d) > 0.1 * np.log(size)) & where.any(-1), d**2, 0)
        near(penalty(scores, threshold=threshold, margin=0.1, context=context, where=where), exact)
    q, k = rng.standard_normal((4, 3)), rng.standard_normal((5, 3))
    near(penalty(jaxsoft.linear_logits(q, k.T, block_size=2)), penalty(jnp.asarray(q @ k.T)))


X = jnp.zeros((3, 2, 4))
SHARED = reuse.SharedSoftmax(X, X, jnp.zeros((3, 2)), None, 0.5, False)
BAD = [
    (lambda: reuse.unified_softmax_attention(X, X, X[..., :1, :]), ValueError, "value must have shape"),
    (lambda: reuse.reuse_softmax_attention(X, X), TypeError, "shared must be a SharedSoftmax"),
    (lambda: reuse.reuse_softmax_attention(SHARED, X[:2]), ValueError, "value must have shape"),
    (lambda: reuse.reuse_softmax_attention(SHARED, X, hidden=X[:, 0]), ValueError, "given together"),
    (
        lambda: reuse.reuse_softmax_attention(SHARED, X, hidden=X[:, 0], compensation=X),
        ValueError,
        "compensation must have shape",
    ),
    (lambda: reuse.urpe_attention(X, X, X, jnp.ones((2, 4))), ValueError, "factors must have shape"),
    (
        lambda: reuse.urpe_attention(X, X, X, jnp.ones((2, 3)), bias=jnp.ones(3)),
        ValueError,
        "bias must have shape",
    ),
    (lambda: reuse.urpe_attention(X, X, X, jnp.ones((2, 3)), block_size=0), ValueError, "block_size"),
    (lambda: reuse.top_k_attention(X, X, X, k=0), ValueError, "k must be a static integer >= 1"),
    (
        lambda: reuse.ngram_attention(X[..., 0, 0], X[:, 0], n=2),
        TypeError,
        "tokens must be an array of integer",
    ),
    (lambda: reuse.ngram_attention(jnp.arange(4), X[:, 0], n=2), ValueError, "value must have shape"),
    (lambda: reuse.ngram_attention(jnp.arange(3), X[:, 0], n=0), ValueError, "n must be a static integer"),
    (lambda: reuse.long_context_log_mass(X, X[..., :3]), ValueError, "key must have shape"),
    (lambda: penalty(X, margin=-1.0), ValueError, "margin"),
    (lambda: penalty(X, context="keys"), ValueError, "context must be 'columns', 'row' or a static integer"),
    (lambda: penalty(X, threshold=jnp.ones(5)), ValueError, "threshold must broadcast"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[m for *_, m in BAD])
def test_bad_input_says_what_was_expected(call, error, match):
    with pytest.raises(error, match=match):
        call()
