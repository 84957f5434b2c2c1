"""Estimates of softmax attention: exact parts, convergence of the estimated parts, and the hashing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import near, softmax

from jaxsoft.attention.hyper import (
    _orthogonal_directions,
    angular_lsh_buckets,
    hyper_attention,
    scatterbrain_attention,
)

RANDOM_KEY = jax.random.key(0)
SIZES = dict(block_size=4, min_seq_len=3, bits=4)
estimate = jax.jit(hyper_attention, static_argnames=("is_causal", "sample_size", *SIZES))


def arrays(queries, keys, batch=(2,), heads=4, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*batch, queries, heads, 4))
    return q, rng.standard_normal((*batch, keys, 2, 4)), rng.standard_normal((*batch, keys, 2, 3))


def dense(q, k, v, where=None, causal=False, weights=np.exp, scale=0.5):
    """Attention of unnormalized weights of the scores, by a loop over batch and heads."""
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        w = weights(scale * q[b, :, h] @ k[b, :, h // 2].T)
        w = w if where is None else w * where[b]
        w = np.tril(w) if causal else w
        total = w.sum(-1, keepdims=True)
        out[b, :, h] = w / np.where(total > 0, total, 1) @ v[b, :, h // 2]
    return out


MASK = np.random.default_rng(5).random((2, 13)) > 0.3

# --- hashing -------------------------------------------------------------------------------------------------------


def test_neighbouring_buckets_differ_in_one_sign():
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=5)))
    buckets = np.asarray(angular_lsh_buckets(jnp.asarray(signs), jnp.eye(5)))
    assert sorted(buckets) == list(range(32))
    in_order = signs[np.argsort(buckets)]
    assert np.all((in_order[1:] != in_order[:-1]).sum(-1) == 1)


def test_buckets_depend_on_the_angle_only_and_near_vectors_share_them():
    x = jax.random.normal(RANDOM_KEY, (500, 8))
    directions = jax.random.normal(jax.random.key(1), (8, 7))
    buckets = angular_lsh_buckets(x, directions)
    assert np.all(buckets == angular_lsh_buckets(3 * x, directions))
    same = lambda noise: np.mean(buckets == angular_lsh_buckets(x + noise * x[::-1], directions))
    assert same(0.01) > 0.9 > same(0.3) > same(10.0)


# --- HyperAttention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_short_attention_is_exact(causal, x64):
    q, k, v = arrays(13, 13)
    out = estimate(q, k, v, random_key=RANDOM_KEY, key_where=MASK, is_causal=causal, min_seq_len=13)
    near(out, dense(q, k, v, MASK, causal))


@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (4, 13), (11, 5)])
def test_one_block_that_holds_all_keys_is_exact(queries, keys, x64):
    q, k, v = arrays(queries, keys)
    where = MASK[:, :keys]
    options = dict(random_key=RANDOM_KEY, key_where=where, block_size=13, sample_size=5, min_seq_len=1)
    near(estimate(q, k, v, **options), dense(q, k, v, where))


hyper_cases = pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(13, 13, False), (6, 13, False), (13, 13, True)]
)


def error_of(out, exact):
    return np.sqrt(np.mean((np.asarray(out) - exact) ** 2))


@hyper_cases
def test_the_estimate_converges_with_the_sample(queries, keys, causal, x64):
    q, k, v = arrays(queries, keys)
    exact = dense(q, k, v, MASK, causal)
    options = dict(random_key=RANDOM_KEY, key_where=MASK, is_causal=causal, **SIZES)
    few, many = (error_of(estimate(q, k, v, sample_size=m, **options), exact) for m in (8, 32768))
    assert few > 0.05  # otherwise nothing is estimated here
    assert many < 0.01 < few / 5


def test_the_mean_over_keys_is_the_exact_numerator_and_denominator(x64):
    """Unbiased: sampled keys of the query's own block have weight 0, so none is counted twice."""
    q, k, _ = arrays(1, 12, heads=2, batch=(1,))
    # Attention of one query with value 1 at a single key and 0 elsewhere: its share of the mass.
    v = np.eye(12)[None, :, None].repeat(2, 2)
    out = jax.vmap(
        lambda key: estimate(q, k, v, random_key=key, sample_size=64, block_size=4, min_seq_len=1, bits=2)
    )(jax.random.split(RANDOM_KEY, 4000))
    exact = np.stack([softmax(0.5 * q[0, :, h] @ k[0, :, h].T) for h in range(2)], 1)
    # The ratio of unbiased sums is biased by O(1 / sample_size) of the small spread.
    np.testing.assert_allclose(np.mean(out, axis=(0, 1)), exact, atol=4e-3)


@hyper_cases
def test_masked_keys_do_not_exist_and_the_key_decides(queries, keys, causal, x64):
    q, k, v = arrays(queries, keys)
    options = dict(key_where=MASK, is_causal=causal, sample_size=3, **SIZES)
    out = estimate(q, k, v, random_key=RANDOM_KEY, **options)
    hide = ~MASK[..., None, None]
    near(
        estimate(q, np.where(hide, np.nan, k), np.where(hide, np.nan, v), random_key=RANDOM_KEY, **options),
        out,
    )
    assert not np.allclose(out, estimate(q, k, v, **{**options, "random_key": jax.random.key(1)}))
    # The output is a mean of the values that are visible.
    constant = estimate(q, k, np.where(hide, 7.0, np.ones_like(v)), random_key=RANDOM_KEY, **options)
    seen = MASK.any(-1)[:, None] if not causal else np.cumsum(MASK, -1) > 0
    near(constant, np.broadcast_to(seen[..., None, None], constant.shape))


def test_later_keys_are_not_seen(x64):
    q, k, v = arrays(13, 13)
    options = dict(random_key=RANDOM_KEY, is_causal=True, sample_size=3, **SIZES)
    gradient = jax.jit(jax.grad(lambda k, v: jnp.sum(estimate(q, k, v, **options)[:, 6]), argnums=(0, 1)))
    for g in gradient(k, v):
        assert not np.any(g[:, 7:]) and np.any(g[:, :7])


# --- Scatterbrain --------------------------------------------------------------------------------------------------

scatter = jax.jit(scatterbrain_attention, static_argnames=("is_causal", "window", "num_features"))
causality = pytest.mark.parametrize("causal", [False, True])


@causality
@pytest.mark.parametrize("window", [12, 13, 64])
def test_a_window_over_everything_is_exact(window, causal, x64):
    q, k, v = arrays(13, 13)
    options = dict(random_key=RANDOM_KEY, key_where=MASK, window=window, is_causal=causal)
    near(scatter(q, k, v, **options), dense(q, k, v, MASK, causal))


@causality
@pytest.mark.parametrize("window", [1, 3, 6])
def test_the_weights_are_exact_inside_and_random_features_outside(window, causal, x64):
    q, k, v = arrays(13, 13)
    features = 6
    directions = np.asarray(_orthogonal_directions(RANDOM_KEY, features // 2, 4, q.dtype))

    def phi(x):  # tau = 1 / 2
        u = np.sqrt(0.5) * x @ directions.T
        return np.exp(np.concatenate([u, -u], -1) - 0.25 * (x**2).sum(-1, keepdims=True)) / np.sqrt(features)

    inside = np.abs(np.arange(13)[:, None] - np.arange(13)) <= window
    exact = np.zeros((2, 13, 4, 3))
    for b, h in np.ndindex(2, 4):
        w = np.where(
            inside, np.exp(0.5 * q[b, :, h] @ k[b, :, h // 2].T), phi(q[b, :, h]) @ phi(k[b, :, h // 2]).T
        )
        w = np.tril(w) * MASK[b] if causal else w * MASK[b]
        total = w.sum(-1, keepdims=True)
        exact[b, :, h] = w / np.where(total > 0, total, 1) @ v[b, :, h // 2]
    out = scatter(
        q, k, v, random_key=RANDOM_KEY, key_where=MASK, window=window, num_features=features, is_causal=causal
    )
    near(out, exact)


@causality
def test_the_estimate_converges_with_the_features(causal, x64):
    q, k, v = arrays(13, 13)
    q, k = q / 2, k / 2  # the features of large vectors have heavy tails
    options = dict(random_key=RANDOM_KEY, key_where=MASK, window=1, is_causal=causal)
    few, many = (
        error_of(scatter(q, k, v, num_features=r, **options), dense(q, k, v, MASK, causal))
        for r in (8, 32768)
    )
    assert few > 0.03 and many < 0.01 < few / 3


def test_the_features_are_an_unbiased_estimate_of_the_exponential(x64):
    x, y = np.array([0.5, -0.3, 0.2, 0.1]), np.array([-0.4, 0.2, 0.6, 0.3])
    rows = jax.vmap(lambda key: _orthogonal_directions(key, 6, 4, x.dtype))(
        jax.random.split(RANDOM_KEY, 20000)
    )
    groups = rows[:, :4] @ np.swapaxes(rows[:, :4], -1, -2)
    near(groups * (1 - np.eye(4)), np.zeros_like(groups))
    near(np.mean(rows**2), 1, 2e-2)
    estimates = np.cosh(rows @ (x + y)) * np.exp(-(x @ x + y @ y) / 2)
    near(np.mean(estimates), np.exp(x @ y), 1e-2)


def test_large_scores_do_not_overflow():
    q, k, v = (jnp.asarray(a, jnp.float32) for a in arrays(13, 13))
    out = scatter(30 * q, 30 * k, v, random_key=RANDOM_KEY, window=2)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(v).max() + 1e-5


X = jnp.zeros((3, 2, 4))
BAD = [
    (lambda: angular_lsh_buckets(X, jnp.zeros((3, 2))), ValueError, "directions must have shape"),
    (
        lambda: angular_lsh_buckets(X.astype(int), jnp.zeros((4, 2))),
        TypeError,
        "x must be an array of floating",
    ),
    (lambda: hyper_attention(X, X, X, random_key=RANDOM_KEY, block_size=0), ValueError, "block_size"),
    (lambda: hyper_attention(X, X, X, random_key=RANDOM_KEY, sample_size=0), ValueError, "sample_size"),
    (lambda: hyper_attention(X, X, X, random_key=RANDOM_KEY, min_seq_len=2.0), TypeError, "min_seq_len"),
    (lambda: hyper_attention(X, X, X, random_key=RANDOM_KEY, bits=30), ValueError, "bits"),
    (
        lambda: hyper_attention(X[:2], X, X, random_key=RANDOM_KEY, is_causal=True),
        ValueError,
        "key must have the query's length",
    ),
    (lambda: scatterbrain_attention(X[:2], X, X, random_key=RANDOM_KEY), ValueError, "as many positions"),
    (lambda: scatterbrain_attention(X, X, X, random_key=RANDOM_KEY, window=0), ValueError, "window"),
    (
        lambda: scatterbrain_attention(X, X, X, random_key=RANDOM_KEY, num_features=3),
        ValueError,
        "num_features must be even",
    ),
    (lambda: scatterbrain_attention(X, X, X, random_key=RANDOM_KEY, scale=-1.0), ValueError, "scale"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[m for *_, m in BAD])
def test_bad_input_says_what_was_expected(call, error, match):
    with pytest.raises(error, match=match):
        call()
