"""Samples: their distribution, one key = one result for all kinds of logits, blocks and shards, log-probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from helpers import close, fails, streamed
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import decoding
from jaxsoft.decoding import chain, min_p, sample, sample_and_log_prob, temperature, top_k

RNG = np.random.default_rng(1)
N, D, V = 16, 8, 48
HIDDEN, WEIGHT = (
    RNG.standard_normal((N, D)).astype(np.float32),
    RNG.standard_normal((D, V)).astype(np.float32),
)
KEY = jax.random.key(3)
TRANSFORM = chain(temperature(0.8), top_k(20), min_p(0.01))


def linear(block_size, hidden=HIDDEN, weight=WEIGHT, **options):
    return jaxsoft.linear_logits(hidden, weight, block_size=block_size, **options)


def chi_square(tokens, p):
    """The probability that samples from p are as far from it."""
    seen = p > 0
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[~seen].sum() == 0
    return scipy.stats.chisquare(counts[seen], p[seen] / p[seen].sum() * len(tokens)).pvalue


def test_a_million_draws_have_the_distribution():
    """Rows of one key, and one row of many keys; with a transform, too."""
    x = np.array([2.0, 1.0, 0.0, -1.0, -3.0, 1.5, -np.inf, 0.3], np.float32)
    p = np.asarray(jax.nn.softmax(x), np.float64)
    kept = np.where(np.isin(np.arange(8), [0, 1, 5]), p, 0)

    @jax.jit
    def draws(keys):
        rows = jnp.broadcast_to(x, (1_000_000, 8))
        few = jax.vmap(lambda key: sample(x, key))(keys)
        return sample(rows, KEY), few, sample(top_k(3)(rows[:100_000]), KEY)

    rows, keys, few = map(np.asarray, draws(jax.random.split(KEY, 100_000)))
    assert chi_square(rows, p) > 1e-3
    assert chi_square(keys, p) > 1e-3
    assert chi_square(few, kept / kept.sum()) > 1e-3
    pairs = rows[0::2] * 8 + rows[1::2]  # rows are independent
    assert chi_square(pairs, np.outer(p, p).ravel()) > 1e-3


def test_the_noise_is_uniform_and_independent():
    """A million numbers: over bins, beside the next column, the next row, another key; by row and by column."""
    n = 1024

    @jax.jit
    def ranks(keys):
        rows = decoding.sampling.as_rows(jnp.zeros((n, n)))
        noise = jax.vmap(lambda key: decoding.sampling._gumbel(rows, key, False, None).args)(keys)
        columns = jnp.arange(n)
        return jnp.exp(-jnp.exp(-decoding.sampling._noise(columns, *(a[..., None] for a in noise))))

    u, other = np.asarray(ranks(jax.random.split(KEY)), np.float64)
    assert scipy.stats.chisquare(np.bincount((u * 256).astype(int).ravel(), minlength=256)).pvalue > 1e-3
    beside = {"column": (u[:, 1:], u[:, :-1]), "row": (u[1:], u[:-1]), "far row": (u[512:], u[:512])}
    for name, (a, b) in (beside | {"key": (u, other)}).items():
        pairs = (a * 16).astype(int) * 16 + (b * 16).astype(int)
        assert scipy.stats.chisquare(np.bincount(pairs.ravel(), minlength=256)).pvalue > 1e-3, name
    for axis in (0, 1):  # sums of 1024 numbers are normal
        scores = (u.mean(axis) - 0.5) * np.sqrt(12 * n)
        assert scipy.stats.kstest(scores, "norm").pvalue > 1e-3


@functools.cache
def everywhere():
    """The samples of one key: stored, in blocks of several sizes, with rows in two axes; and those of a transform."""

    def run(hidden, weight, key):
        x = hidden @ weight
        kinds = {"stored": x, "two axes": x.reshape(4, 4, V)}
        kinds |= {f"blocks of {b}": linear(b, hidden, weight) for b in (5, 16, V)}
        return {
            name: [sample(t(logits), key).reshape(-1) for t in (chain(), TRANSFORM)]
            for name, logits in kinds.items()
        }

    return jax.tree.map(np.asarray, jax.jit(run)(HIDDEN, WEIGHT, KEY))


def test_one_key_gives_one_result_whatever_the_blocks():
    expected = everywhere()["stored"]
    assert len(set(expected[0])) > 4
    for got in everywhere().values():
        np.testing.assert_array_equal(got, expected)


def test_one_key_gives_one_result_whatever_the_shards():
    """Explicit axes; and shards by hand, with an uneven last one, where the caller numbers the rows."""
    expected = everywhere()["stored"]
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        hidden = jax.device_put(HIDDEN, NamedSharding(mesh, P("data")))
        weight = jax.device_put(WEIGHT, NamedSharding(mesh, P(None, "model")))
        got = jax.jit(lambda h, w: [sample(t(linear(8, h, w)), KEY) for t in (chain(), TRANSFORM)])(
            hidden, weight
        )
    np.testing.assert_array_equal(got, expected)

    def local(hidden, weight, stored, numbers):
        kinds = (
            linear(5, hidden, weight, axis_name="model"),
            jaxsoft.stored_logits(stored, axis_name="model"),
        )
        return [sample(TRANSFORM(logits), KEY, row_numbers=numbers) for logits in kinds]

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = P("data"), P(None, "model"), P("data", "model"), P("data")
    by_hand = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))
    for got in jax.jit(by_hand)(HIDDEN, WEIGHT, HIDDEN @ WEIGHT, jnp.arange(N)):
        np.testing.assert_array_equal(got, expected[1])


def test_log_prob_of_what_was_sampled():
    @jax.jit
    def run(hidden, weight):
        rows, x = TRANSFORM(linear(16, hidden, weight)), TRANSFORM(hidden @ weight)
        drawn = sample_and_log_prob(rows, KEY)
        later = decoding.log_prob(rows, drawn.tokens)
        plain = jnp.take_along_axis(jax.nn.log_softmax(x), drawn.tokens[:, None], -1)[:, 0]
        weights = jnp.arange(1.0, N + 1)
        gradients = [
            jax.grad(lambda h, f=f: f(TRANSFORM(linear(16, h, weight))) @ weights)(hidden)
            for f in (
                lambda r: sample_and_log_prob(r, KEY).log_prob,
                lambda r: decoding.log_prob(r, drawn.tokens),
            )
        ]
        return drawn, later, plain, decoding.log_prob(rows, jnp.argmin(x, axis=-1)), gradients

    drawn, later, plain, rejected, gradients = run(HIDDEN, WEIGHT)
    np.testing.assert_array_equal(drawn.tokens, everywhere()["stored"][1])
    close(drawn.log_prob, plain, 1e-5)
    close(later, plain, 1e-5)
    assert np.all(rejected == -np.inf)
    close(*gradients, 1e-4)
    assert isinstance(drawn, decoding.Sample)


def test_greedy_rows_argmax_and_empty_rows():
    x = np.concatenate([HIDDEN @ WEIGHT, np.full((1, V), -np.inf)]).astype(np.float32)
    greedy = np.arange(N + 1) % 2 == 0

    @jax.jit
    def run(x):
        return (
            sample(x, KEY),
            sample(x, KEY, greedy=greedy),
            sample(x, KEY, greedy=True),
            decoding.argmax(x),
            sample_and_log_prob(x, KEY),
            sample(decoding.mask_logits(np.zeros(V, bool))(x), KEY),
        )

    drawn, some, every, best, both, nothing = run(x)
    np.testing.assert_array_equal(best, [*np.argmax(x[:N], axis=-1), -1])
    np.testing.assert_array_equal(every, best)
    np.testing.assert_array_equal(some, np.where(greedy, best, drawn))
    np.testing.assert_array_equal(both.tokens, drawn)
    assert drawn[-1] == -1
    assert both.log_prob[-1] == 0
    assert np.all(nothing == -1)


def test_sampling_without_replacement():
    """The law of the first two tokens, and an entry for every column of a row."""
    p = np.array([0.5, 0.3, 0.2])
    logits = np.log(np.array([*p, 0.0]) + 1e-300).astype(np.float32)
    logits[3] = -np.inf

    @jax.jit
    def run():
        rows = jnp.broadcast_to(jnp.asarray(logits), (100_000, 4))
        return decoding.sample_without_replacement(rows, KEY, 4), sample(rows, KEY)

    drawn, first = run()
    order = np.asarray(drawn.indices)
    np.testing.assert_array_equal(order[:, 0], first)
    assert np.all(np.sort(order, axis=1) == [-1, 0, 1, 2])
    law = np.array([[p[i] * p[j] / (1 - p[i]) if i != j else 0 for j in range(3)] for i in range(3)])
    assert chi_square(order[:, 0] * 3 + order[:, 1], law.ravel()) > 1e-3


def test_rows_do_not_depend_on_each_other():
    x = HIDDEN @ WEIGHT
    few, numbers = jax.jit(
        lambda x: (sample(x[:3], KEY), sample(x[5:7], KEY, row_numbers=jnp.array([5, 6])))
    )(x)
    expected = everywhere()["stored"][0]
    np.testing.assert_array_equal(few, expected[:3])
    np.testing.assert_array_equal(numbers, expected[5:7])
    mapped = jax.vmap(lambda row, number: sample(row, KEY, row_numbers=number))
    np.testing.assert_array_equal(mapped(x, jnp.arange(N)), expected)


def test_a_generation_is_one_scan():
    """A toy model: what the penalty forbids never repeats; another number compiles nothing."""
    traces = []

    @jax.jit
    def generate(penalty, t, key):
        traces.append(1)
        weight = jnp.asarray(WEIGHT)

        def step(state, key):
            token, counts = state
            logits = jaxsoft.linear_logits(weight.T[token], weight, block_size=16)
            transform = chain(decoding.presence_penalty(counts, penalty), temperature(t))
            token = sample(transform(logits), key)
            return (token, counts.at[jnp.arange(2), token].add(1)), token

        start = jnp.array([0, 1]), decoding.token_counts(jnp.array([[0], [1]]), V)
        return jax.lax.scan(step, start, jax.random.split(key, 20))[1].T

    tokens = np.asarray(generate(1e4, 0.7, KEY))
    assert all(len({i, *row}) == 21 for i, row in enumerate(tokens))
    assert generate(0.0, 1.5, KEY).shape == (2, 20)
    assert len(traces) == 1


def test_beam_step_is_exact_over_all_continuations():
    """Against the enumeration of all sequences of three tokens."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((6, 6)).astype(np.float32)  # logits given the last token
    log_p = np.asarray(jax.nn.log_softmax(table))

    @jax.jit
    def search(table):
        scores, last = jnp.where(jnp.arange(36) == 0, 0.0, -jnp.inf), jnp.zeros(36, int)
        history = jnp.zeros((36, 0), int)
        for _ in range(3):
            beams = decoding.beam_step(streamed_rows(table, last), scores)
            history = jnp.concatenate([history[beams.parents], beams.tokens[:, None]], axis=1)
            scores, last = beams.scores, beams.tokens
        return history, scores

    def streamed_rows(table, last):
        return jaxsoft.linear_logits(jax.nn.one_hot(last, 6), table, block_size=4)

    history, scores = search(table)
    every = {
        (a, b, c): log_p[0, a] + log_p[a, b] + log_p[b, c]
        for a in range(6)
        for b in range(6)
        for c in range(6)
    }
    best = sorted(every, key=every.get, reverse=True)[:36]
    close(scores, [every[s] for s in best], 1e-5)
    assert [tuple(map(int, h)) for h in history[:10]] == best[:10]


def test_beams_that_have_ended_stay():
    x = np.log(np.array([[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]], np.float32))
    scores = np.array([[-0.1, -1.0, -np.inf]], np.float32)
    out = decoding.beam_step(
        x, scores, finished=np.array([[True, False, False]]), end_token=1, pad_token=jnp.int32(2)
    )
    assert isinstance(out, decoding.Beams)
    np.testing.assert_array_equal(out.tokens, [[2, 1, 0]])
    np.testing.assert_array_equal(out.parents, [[0, 1, 1]])
    np.testing.assert_array_equal(out.finished, [[True, True, False]])
    close(out.scores, [[-0.1, -1 + np.log(0.7), -1 + np.log(0.2)]], 1e-6)


def test_errors():
    x = jnp.asarray(HIDDEN @ WEIGHT)
    fails(["greedy", "boolean"], TypeError, lambda: sample(x, KEY, greedy=jnp.ones(N)))
    fails(["greedy", "(16,)"], ValueError, lambda: sample(x, KEY, greedy=jnp.ones(3, bool)))
    fails(["row_numbers", "(16,)"], ValueError, lambda: sample(x, KEY, row_numbers=jnp.arange(3)))
    fails(["row_numbers", "integer"], TypeError, lambda: sample(x, KEY, row_numbers=jnp.ones(N)))
    fails(["logits", "floating"], TypeError, lambda: sample(jnp.ones((2, 3), int), KEY))
    fails(["k", "48", "49"], ValueError, lambda: decoding.sample_without_replacement(x, KEY, 49))
    fails(["k", ">= 1"], ValueError, lambda: decoding.sample_without_replacement(x, KEY, 0))
    fails(["tokens", "(16,)"], ValueError, lambda: decoding.log_prob(x, jnp.arange(3)))
    fails(["tokens", "integer"], TypeError, lambda: decoding.log_prob(x, jnp.ones(N)))
    fails(["scores", "(16,)"], ValueError, lambda: decoding.beam_step(x, jnp.ones(3)))
    fails(["beams"], ValueError, lambda: decoding.beam_step(x[0], jnp.ones(())))
    fails(
        ["finished", "boolean"], TypeError, lambda: decoding.beam_step(x, jnp.ones(N), finished=jnp.ones(N))
    )
    assert streamed(x).shape == (N, V)
