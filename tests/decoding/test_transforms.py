"""Transforms of logits: plain formulas, worked numbers, stored = never stored, traced numbers, limits, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fails, streamed

import jaxsoft
from jaxsoft import decoding
from jaxsoft.decoding import chain

N, V = 4, 37
RNG = np.random.default_rng(0)
X = (3 * RNG.standard_normal((N, V))).astype(np.float32)
X[2, 5] = -np.inf  # an absent entry
X[3, 7] = X[3, 11] = X[3].max() + 0.5  # a tie
COUNTS = RNG.integers(0, 3, (N, V)).astype(np.int32)
OTHER = RNG.standard_normal((N, V)).astype(np.float32)
IDS = np.array([1, 3, 5, 7, -1, 99], np.int32)
P5 = np.array([0.5, 0.25, 0.15, 0.07, 0.03])

# --- the plain formulas, of one row ---


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def entropy(x):
    p = softmax(x)
    return -np.sum(p[p > 0] * np.log(p[p > 0]))


def cut(x, keep):
    return np.where(keep, x, -np.inf)


def plain_top_k(x, k):
    return cut(x, x >= np.sort(x)[::-1][min(k, len(x)) - 1])


def plain_top_p(x, mass, least=1):
    """As in transformers: ascending, the tail of a mass of at most 1 - top_p goes; ties are kept."""
    order = np.argsort(x)
    gone = np.cumsum(softmax(x.astype(np.float64))[order]) <= 1 - mass
    gone[len(x) - least :] = False
    return cut(x, x >= x[order][~gone][0])


def plain_min_p(x, share):
    return cut(x, softmax(x) >= share * softmax(x).max())


def plain_typical(x, mass):
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.abs(-np.log(softmax(x)) - entropy(x))
    order = np.argsort(score, kind="stable")
    last = np.sum(np.cumsum(softmax(x)[order]) < mass)
    return cut(x, score <= score[order][min(last, len(x) - 1)])


def plain_above(x, bound, least=1):
    return cut(x, (softmax(x) >= bound) | (x >= np.sort(x)[-least]))


def plain_eta(x, eta):
    return plain_above(x, min(eta, np.sqrt(eta) * np.exp(-entropy(x))))


def plain_top_n_sigma(x, n):
    return cut(x, x >= x.max() - n * x[x > -np.inf].std())


def plain_top_h(x, share):
    p = np.sort(softmax(x))[::-1]
    terms = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0)
    count = max(np.sum(np.cumsum(terms) <= share * entropy(x)), 1)
    return plain_top_k(x, count)


def plain_adapted(x):
    h = entropy(x)
    return max(1, np.polyval([-0.037, 0.481, -2.3, 4.917, -1.791], h)) * x if h > 0.5 else x


def plain_penalty(x, c, penalty):
    return np.where(c > 0, np.where(x > 0, x / penalty, x * penalty), x)


def allowed(x, listed):
    named = np.isin(np.arange(len(x)), IDS)
    return cut(x, named if listed else ~named)


def plain_guided(x, other):
    return other + 1.5 * (x - other)


def plain_knn(x, distances, values):
    p = np.zeros(len(x))
    np.add.at(p, values, softmax(-distances / 2))
    with np.errstate(divide="ignore"):
        return cut(np.log(0.25 * p + 0.75 * softmax(x)), x > -np.inf)


DISTANCES, VALUES = RNG.random((N, 3)).astype(np.float32), RNG.integers(0, V, (N, 3)).astype(np.int32)
VALUES[2] = [4, 6, 4]

# For each transform: how it is made from numbers, the numbers, the plain formula, and whether it sorts whole rows.
CASES = {
    "temperature": (lambda t: decoding.temperature(t), (0.7,), lambda x, i: x / 0.7),
    "softcap": (lambda c: decoding.softcap(c), (2.0,), lambda x, i: cut(2 * np.tanh(x / 2), x > -np.inf)),
    "adaptive_temperature": (lambda: decoding.adaptive_temperature(), (), lambda x, i: plain_adapted(x)),
    "top_k": (lambda k: decoding.top_k(k, limit=V), (5,), lambda x, i: plain_top_k(x, 5)),
    "top_k=1": (lambda: decoding.top_k(1), (), lambda x, i: plain_top_k(x, 1)),
    "top_k beyond": (lambda: decoding.top_k(99), (), lambda x, i: x),
    "top_k below limit": (lambda k: decoding.top_k(k, limit=3), (9,), lambda x, i: plain_top_k(x, 3)),
    "top_k sorted": (lambda k: decoding.top_k(k), (5,), lambda x, i: plain_top_k(x, 5)),
    "top_p": (lambda p: decoding.top_p(p), (0.8,), lambda x, i: plain_top_p(x, 0.8)),
    "top_p of 0": (lambda p: decoding.top_p(p), (0.0,), lambda x, i: plain_top_k(x, 1)),
    "top_p of 1": (lambda p: decoding.top_p(p), (1.0,), lambda x, i: x),
    "top_p, 6": (
        lambda p: decoding.top_p(p, min_tokens_to_keep=6),
        (0.1,),
        lambda x, i: plain_top_p(x, 0.1, 6),
    ),
    "top_p, limit": (lambda p: decoding.top_p(p, limit=20), (0.8,), lambda x, i: plain_top_p(x, 0.8)),
    "top_p, small limit": (lambda p: decoding.top_p(p, limit=2), (0.999,), lambda x, i: plain_top_k(x, 2)),
    "min_p": (lambda m: decoding.min_p(m), (0.05,), lambda x, i: plain_min_p(x, 0.05)),
    "min_p of 0": (lambda m: decoding.min_p(m), (0.0,), lambda x, i: x),
    "min_p, 4": (
        lambda m: decoding.min_p(m, min_tokens_to_keep=4),
        (1.0,),
        lambda x, i: plain_top_k(x, 4),
    ),
    "typical_p": (lambda m: decoding.typical_p(m), (0.6,), lambda x, i: plain_typical(x, 0.6)),
    "typical_p of 1": (lambda m: decoding.typical_p(m), (1.0,), lambda x, i: x),
    "epsilon_cutoff": (lambda e: decoding.epsilon_cutoff(e), (0.02,), lambda x, i: plain_above(x, 0.02)),
    "epsilon_cutoff, 3": (
        lambda e: decoding.epsilon_cutoff(e, min_tokens_to_keep=3),
        (0.9,),
        lambda x, i: plain_above(x, 0.9, 3),
    ),
    "eta_cutoff": (lambda e: decoding.eta_cutoff(e), (0.01,), lambda x, i: plain_eta(x, 0.01)),
    "top_n_sigma": (lambda n: decoding.top_n_sigma(n), (1.0,), lambda x, i: plain_top_n_sigma(x, 1.0)),
    "top_h": (lambda h: decoding.top_h(h), (0.5,), lambda x, i: plain_top_h(x, 0.5)),
    "repetition_penalty": (
        lambda p: decoding.repetition_penalty(COUNTS, p),
        (1.3,),
        lambda x, i: plain_penalty(x, COUNTS[i], 1.3),
    ),
    "presence_penalty": (
        lambda p: decoding.presence_penalty(COUNTS, p),
        (0.4,),
        lambda x, i: x - 0.4 * (COUNTS[i] > 0),
    ),
    "frequency_penalty": (
        lambda p: decoding.frequency_penalty(COUNTS[0], p),
        (0.4,),
        lambda x, i: x - 0.4 * COUNTS[0],
    ),
    "logit_bias": (lambda: decoding.logit_bias(OTHER), (), lambda x, i: x + OTHER[i]),
    "mask_logits": (lambda: decoding.mask_logits(COUNTS[0] > 0), (), lambda x, i: cut(x, COUNTS[0] > 0)),
    "allowed_token_ids": (lambda: decoding.allowed_token_ids(IDS), (), lambda x, i: allowed(x, True)),
    "suppress_tokens": (
        lambda: decoding.suppress_tokens(np.tile(IDS, (N, 1))),
        (),
        lambda x, i: allowed(x, False),
    ),
    "guidance": (lambda s: decoding.guidance(OTHER, s), (1.5,), lambda x, i: plain_guided(x, OTHER[i])),
    "knn_lm_interpolate": (
        lambda t: decoding.knn_lm_interpolate(DISTANCES, VALUES, temperature=t),
        (2.0,),
        lambda x, i: plain_knn(x, DISTANCES[i], VALUES[i]),
    ),
}
SORTS = ("top_k sorted", "top_p", "top_p of 0", "top_p of 1", "top_p, 6", "typical_p", "typical_p of 1")
CHAIN = ("repetition_penalty", "temperature", "top_k", "min_p", "epsilon_cutoff")


def made(numbers):
    each = {name: CASES[name][0](*numbers[name]) for name in CASES}
    return each | {"chain": chain(each[CHAIN[0]], chain(*(each[n] for n in CHAIN[1:])))}


NUMBERS = {name: tuple(jnp.asarray(a) for a in numbers) for name, (_, numbers, _) in CASES.items()}


@functools.cache
def results():
    """All transforms of stored and of never-stored logits, the numbers traced, in one program."""

    def run(numbers, x):
        transforms, present = made(numbers), np.isfinite(X)
        # A product with an infinite weight would be NaN: the mask of a transform makes the absent entry.
        logits = decoding.mask_logits(present)(streamed(jnp.where(present, x, 0), block_size=8))
        dense = {name: t(x) for name, t in transforms.items()}
        return dense, {name: t(logits).dense() for name, t in transforms.items() if name not in SORTS}

    return jax.tree.map(np.asarray, jax.jit(run)(NUMBERS, X.copy()))


@pytest.mark.whole
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_plain_formula(name):
    plain = np.stack([CASES[name][2](x, i) for i, x in enumerate(X)])
    np.testing.assert_allclose(results()[0][name], plain, rtol=2e-5, atol=2e-5)


@pytest.mark.whole
@pytest.mark.parametrize("name", [*sorted({*CASES} - {*SORTS}), "chain"])
def test_nothing_need_be_stored(name):
    dense, without = results()
    np.testing.assert_allclose(without[name], dense[name], rtol=1e-5, atol=1e-5)


def test_a_chain_keeps_the_order_of_its_transforms():
    x = X
    for name in CHAIN:
        x = np.stack([CASES[name][2](row, i) for i, row in enumerate(x)])
    np.testing.assert_allclose(results()[0]["chain"], x, rtol=2e-5, atol=2e-5)


def test_numbers_are_leaves_and_compile_nothing():
    compiled = []

    @jax.jit
    def run(transform, x):
        compiled.append(1)
        return transform(x)

    for t, m, k in ((0.7, 0.1, 3), (1.5, 0.3, 2)):
        got = run(chain(decoding.temperature(t), decoding.min_p(m), decoding.top_k(k, limit=4)), X[:2])
        plain = np.stack([plain_top_k(plain_min_p(x / t, m), k) for x in X[:2]])
        np.testing.assert_allclose(got, plain, rtol=1e-5)
    assert len(compiled) == 1


def test_numbers_per_row():
    k, t = jnp.array([1, 4, 40, 0]), jnp.array([0.5, 1.0, 2.0, 3.0])
    got = jax.jit(lambda k, t: chain(decoding.top_k(k, limit=40), decoding.temperature(t))(X))(k, t)
    plain = [plain_top_k(x, max(k, 1)) / t for x, k, t in zip(X, np.asarray(k), np.asarray(t))]
    np.testing.assert_allclose(got, plain, rtol=1e-6)


WORKED = {
    "top_k": (decoding.top_k(3), [0.555556, 0.277778, 0.166667, 0, 0]),
    "top_p": (decoding.top_p(0.8), [0.555556, 0.277778, 0.166667, 0, 0]),
    "typical": (decoding.typical_p(0.5), [0.666667, 0.333333, 0, 0, 0]),
    "typical .9": (decoding.typical_p(0.9), [0.555556, 0.277778, 0.166667, 0, 0]),
    "epsilon": (decoding.epsilon_cutoff(0.1), [0.555556, 0.277778, 0.166667, 0, 0]),
    "eta": (decoding.eta_cutoff(0.05), [0.515464, 0.257732, 0.154639, 0.072165, 0]),
    "top_h": (decoding.top_h(0.4), [1, 0, 0, 0, 0]),
}


def test_worked_numbers():
    got = jax.jit(lambda x: {n: jax.nn.softmax(t(x)) for n, (t, _) in WORKED.items()})(np.log(P5))
    for name, (_, expected) in WORKED.items():
        close(got[name], expected, 1e-6)


def test_knn_worked_number():
    """The example of the specification: distances .5, 1, 1.5 to tokens 1, 1, 3."""
    x = np.array([2, 1, 0.1, -1, 0.5], np.float32)
    knn = decoding.knn_lm_interpolate(jnp.array([0.5, 1.0, 1.5]), jnp.array([1, 1, 3]))
    close(jnp.exp(knn(jnp.asarray(x))), [0.418909, 0.357527, 0.062656, 0.067437, 0.093471], 1e-6)


def test_rows_without_entries_and_visible_nan():
    x = np.stack([np.full(6, -np.inf), [0, 1, np.nan, 2, 3, 4]]).astype(np.float32)
    transforms = [decoding.top_k(2), decoding.top_p(0.5), decoding.min_p(0.1), decoding.typical_p(0.5)]
    transforms += [decoding.eta_cutoff(0.1), decoding.top_n_sigma(1.0), decoding.top_h(0.5)]
    for y in jax.jit(lambda x: [t(x) for t in transforms])(x):
        assert np.all(y[0] == -np.inf)
        assert np.isnan(y[1, 2])


def test_dtypes_and_empty_axes():
    half = jnp.asarray(X, jnp.bfloat16)
    assert decoding.temperature(0.5)(half).dtype == jnp.float32
    none = jnp.zeros((2, 0))
    for t in (decoding.top_k(3), decoding.top_p(0.5), decoding.typical_p(0.5), decoding.min_p(0.5)):
        assert jax.eval_shape(t, none).shape == (2, 0)


def test_gradients_flow_through_kept_logits_and_the_temperature():
    """The same stored and streamed, with an absent entry; the threshold is a constant."""

    def loss(t, x, lazily):
        kept = chain(decoding.temperature(t), decoding.top_k(5))(streamed(x, 8) if lazily else x)
        return jnp.sum(decoding.log_prob(kept, jnp.argmax(x, axis=-1)) * jnp.arange(1.0, N + 1))

    def dense(t, x):
        y = x / t
        y = jnp.where(y >= jnp.sort(y, axis=-1)[:, -5:][:, :1], y, -jnp.inf)
        taken = jnp.take_along_axis(y, jnp.argmax(x, axis=-1)[:, None], -1)[:, 0]
        return jnp.sum((taken - jax.nn.logsumexp(y, axis=-1)) * jnp.arange(1.0, N + 1))

    x = np.where(np.isinf(X), -9, X)
    got, lazily, plain = jax.jit(
        lambda t, x: (
            jax.grad(loss, (0, 1))(t, x, False),
            jax.grad(loss, (0, 1))(t, x, True),
            jax.grad(dense, (0, 1))(t, x),
        )
    )(0.7, x)
    for ours in (got, lazily):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, plain)
    assert np.isfinite(jax.grad(loss)(0.7, X, False))


def test_a_mask_and_an_axis_as_an_option():
    """Together with another mask and a map, stored along another axis and never stored."""
    first, second = COUNTS > 0, np.arange(V) < 20
    x = np.where(np.isfinite(X), X, 0)
    transform = chain(decoding.temperature(0.5), decoding.mask_logits(second), decoding.top_k(4))
    plain = np.stack([plain_top_k(row, 4) for row in cut(2 * x, first & second)])

    @jax.jit
    def run(x):
        columns = transform(x.T, axis=0, where=first.T)
        kept = transform(streamed(x, 8), where=first)
        again = decoding.temperature(2.0)(kept, where=second)
        best = decoding.argmax(x.T, axis=0, where=first.T)
        return columns.T, kept.dense(), again.dense() * 2, best, decoding.argmax(kept, where=first)

    *results, best, never = run(x)
    for result in results:
        np.testing.assert_allclose(result, plain, rtol=1e-5)

    def drawn(x, **options):
        key, tokens = jax.random.key(1), np.argmax(first, -1)
        return (
            decoding.sample(x, key, **options),
            decoding.sample_and_log_prob(x, key, **options),
            decoding.sample_without_replacement(x, key, 3, **options),
            decoding.log_prob(x, tokens, **options),
        )

    got, expected = jax.jit(
        lambda x: (drawn(x.T, axis=0, where=first.T), drawn(jnp.where(first, x, -jnp.inf)))
    )(x)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    np.testing.assert_array_equal(best, np.argmax(cut(x, first), -1))
    np.testing.assert_array_equal(never, np.argmax(plain, -1))
    fails(["axis", "-1", "(4, 37)"], ValueError, lambda: decoding.argmax(transform(streamed(x)), axis=0))
    fails(["where", "(4, 37)"], ValueError, lambda: transform(x, where=np.ones((3, V), bool)))


def test_token_counts():
    got = decoding.token_counts(np.array([[1, 1, 4, -1], [0, 9, 2, 2]]), 5, where=np.arange(4) < 3)
    np.testing.assert_array_equal(got, [[0, 2, 0, 0, 1], [1, 0, 1, 0, 0]])


def test_transformed_logits_is_an_expression():
    rows = decoding.top_k(2)(streamed(X))
    assert isinstance(rows, decoding.TransformedLogits)
    assert (rows.shape, rows.dtype) == ((N, V), jnp.float32)
    assert len(jax.tree.leaves(jax.tree.map(lambda a: a, rows))) == 3  # hidden, weight, threshold
    assert isinstance(decoding.Transform(lambda rows: rows)(X), jax.Array)


def test_errors():
    fails(["temperature", "argmax", "0.0"], ValueError, lambda: decoding.temperature(0.0))
    fails(["temperature", "> 0"], ValueError, lambda: decoding.temperature(-1.0))
    fails(["top_k", ">= 1"], ValueError, lambda: decoding.top_k(0))
    fails(["top_k", "integer"], TypeError, lambda: decoding.top_k(2.5))
    fails(["top_p", "<= 1"], ValueError, lambda: decoding.top_p(1.5))
    fails(["limit", ">= 3"], ValueError, lambda: decoding.top_p(0.5, min_tokens_to_keep=3, limit=2))
    fails(["min_tokens_to_keep"], ValueError, lambda: decoding.min_p(0.5, min_tokens_to_keep=0))
    fails(["typical_p", "> 0"], ValueError, lambda: decoding.typical_p(0.0))
    fails(["epsilon_cutoff"], ValueError, lambda: decoding.epsilon_cutoff(2.0))
    fails(["eta_cutoff", "floating"], TypeError, lambda: decoding.eta_cutoff("a"))
    fails(["repetition_penalty"], ValueError, lambda: decoding.repetition_penalty(COUNTS, 0.0))
    fails(["counts", "integers"], TypeError, lambda: decoding.presence_penalty(3, 0.5))
    fails(["where", "boolean"], TypeError, lambda: decoding.mask_logits(COUNTS))
    fails(["allowed_token_ids", "integer"], TypeError, lambda: decoding.allowed_token_ids(OTHER))
    fails(["transforms", "Transform"], TypeError, lambda: chain(jaxsoft.softmax))
    fails(["logits", "floating"], TypeError, lambda: decoding.temperature(2.0)(COUNTS))
    fails(["logits", "axis"], ValueError, lambda: decoding.temperature(2.0)(jnp.float32(1)))
    fails(["temperature", "(4,)"], ValueError, lambda: decoding.temperature(jnp.ones(3))(X))
    fails(["counts", "(4, 37)"], ValueError, lambda: decoding.presence_penalty(COUNTS[:2], 0.5)(X))
    fails(["other", "(4, 37)"], ValueError, lambda: decoding.guidance(OTHER[:2], 0.5)(X))
    for transform in (decoding.top_p(0.5), decoding.typical_p(0.5), decoding.top_k(jnp.int32(3))):
        fails(["logits.dense()", "not stored"], TypeError, lambda t=transform: t(streamed(X)))
