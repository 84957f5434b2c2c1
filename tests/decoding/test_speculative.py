"""Speculative decoding and switching: the exact law of the output, worked numbers, states in a scan, errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from helpers import close, fails, streamed

from jaxsoft import decoding
from jaxsoft.decoding import AcceptanceState, EntropySwitch, RollingEntropy, speculative_accept
from jaxsoft.decoding.speculative import _accepts, _residual, _rolled, _switched

P5, Q5 = np.array([0.5, 0.25, 0.15, 0.07, 0.03]), np.array([0.3, 0.4, 0.2, 0.05, 0.05])
KEY = jax.random.key(0)


def rows_of(rng, *shape):
    p = rng.random(shape) ** 3
    p[..., 0] = np.where(rng.random(shape[:-1]) < 0.3, 0, p[..., 0])  # filtered
    return p / p.sum(-1, keepdims=True)


def test_worked_numbers(x64):
    close(_residual(P5, Q5) / _residual(P5, Q5).sum(), [0.909091, 0, 0, 0.090909, 0], 5e-7)
    close(_residual(P5, P5), P5, 0)
    ratios = np.array([1, 0.625, 0.75, 1, 0.6])
    close(np.minimum(P5, Q5).sum(), 0.78, 1e-12)
    for shift, expected in ((-1e-9, True), (1e-9, False)):
        np.testing.assert_array_equal(_accepts(ratios[1:3] + shift, Q5[1:3], P5[1:3]), [expected] * 2)
    assert np.all(_accepts(np.full(5, 1 - 1e-12), P5, P5))
    assert not np.any(_accepts(np.zeros(2), np.array([0.5, 0.0]), np.zeros(2)))


def accepted_share(p, q):
    """The probability with which the function keeps a token, by bisection over u."""
    low, high = np.zeros_like(q), np.ones_like(q)
    for _ in range(50):
        u = (low + high) / 2
        keeps = _accepts(u, q, p)
        low, high = np.where(keeps, u, low), np.where(keeps, high, u)
    return high


def test_the_law_of_the_output_is_the_targets(x64):
    """All outcomes of two draft tokens, enumerated with the function's own acceptance and residual."""
    rng = np.random.default_rng(0)
    v = 4
    for trial in range(5):
        # The models' distributions after nothing, after one token, after two.
        p0, p1, p2 = rows_of(rng, v), rows_of(rng, v, v), rows_of(rng, v, v, v)
        q0, q1 = rows_of(rng, v), rows_of(rng, v, v)
        if trial == 0:
            q0, q1 = p0, p1
        law = np.zeros((v, v, v))  # of the first three tokens; the target goes on where a round ends early

        def residual(p, q):
            r = np.asarray(_residual(p, q))
            return r / r.sum()

        a0 = accepted_share(p0, q0)
        for x, y in itertools.product(range(v), repeat=2):
            drafted = q0[x] * q1[x, y]
            for first, rest in enumerate(residual(p0, q0)):
                law[first] += drafted * (1 - a0[x]) * rest * p1[first][:, None] * p2[first]
            a1 = accepted_share(p1[x], q1[x])[y]
            for second, rest in enumerate(residual(p1[x], q1[x])):
                law[x, second] += drafted * a0[x] * (1 - a1) * rest * p2[x, second]
            law[x, y] += drafted * a0[x] * a1 * p2[x, y]
        close(law, p0[:, None, None] * p1[..., None] * p2, 1e-12)


def test_samples_follow_the_law():
    """The function as a whole: tokens drawn from q, 200,000 rounds of two."""
    rng = np.random.default_rng(1)
    n, v = 200_000, 4
    p, q = rows_of(rng, 3, v), rows_of(rng, 2, v)

    @jax.jit
    def rounds(key):
        keys = jax.random.split(key)
        with_noise = jax.random.categorical(keys[0], jnp.log(q), shape=(n, 2))
        wide = [jnp.broadcast_to(jnp.log(a), (n, *a.shape)) for a in (q, p)]
        return with_noise, speculative_accept(with_noise, *wide, keys[1])

    drafts, out = jax.tree.map(np.asarray, rounds(KEY))
    tokens, accepted = out
    for i in range(3):  # the distribution of each token, given that the round got so far
        counts = np.bincount(tokens[accepted >= i, i], minlength=v)
        assert counts[p[i] == 0].sum() == 0
        seen = p[i] > 0
        assert scipy.stats.chisquare(counts[seen], p[i][seen] * counts.sum()).pvalue > 1e-3
    close((accepted >= 1).mean(), np.minimum(p[0], q[0]).sum(), 5e-3)
    places = np.arange(3)
    np.testing.assert_array_equal(tokens == -1, places > accepted[:, None])
    same = places[:2] < accepted[:, None]
    np.testing.assert_array_equal(np.where(same, tokens[:, :2], 0), np.where(same, drafts, 0))


def test_equal_models_accept_everything_and_short_drafts_end_early():
    logits = jnp.log(jnp.broadcast_to(jnp.asarray(P5, jnp.float32), (64, 4, 5)))
    tokens = jnp.zeros((64, 3), jnp.int8)

    @jax.jit
    def run(lengths):
        whole = speculative_accept(tokens, logits[:, :3], logits, KEY)
        return whole, speculative_accept(tokens, logits[:, :3], logits, KEY, draft_lengths=lengths)

    whole, some = run(jnp.arange(64) % 4)
    assert np.all(whole.accepted == 3)
    assert np.all(whole.tokens[:, 3] >= 0)
    np.testing.assert_array_equal(some.accepted, np.arange(64) % 4)


def test_greedy():
    best = np.array([[1, 2, 0, 3], [1, 2, 3, 3]])
    target = jax.nn.one_hot(best, 5)
    out = speculative_accept(jnp.array([[1, 2, 4], [1, 2, 3]]), target[:, :3], target, KEY, greedy=True)
    np.testing.assert_array_equal(out.tokens, [[1, 2, 0, -1], [1, 2, 3, 3]])
    np.testing.assert_array_equal(out.accepted, [2, 3])
    assert isinstance(out, decoding.Speculation)


def test_acceptance_stop_in_a_scan():
    a = np.array([0.5, 0.9, 0.8, 0.95], np.float32)  # the first is taken to be 1
    heads = jnp.log(jnp.stack([1 - a, a], axis=-1))

    @jax.jit
    def run(**options):
        def step(state, head):
            stop, state = decoding.acceptance_stop(head, state, **options)
            return state, (stop, 1 - state.survival)

        return jax.lax.scan(step, AcceptanceState.start(), heads)[1]

    stops, risk = run(threshold=0.3)
    close(risk, [0, 0.1, 0.28, 0.316], 1e-6)
    np.testing.assert_array_equal(stops, [False, False, False, True])
    np.testing.assert_array_equal(run(threshold=0.2, max_length=2)[0], [False, True, True, True])
    np.testing.assert_array_equal(run(threshold=0.05, min_length=4)[0], [False, False, False, True])


def test_entropy_stop():
    x = np.log(np.array([P5, [0.98, 0.01, 0.005, 0.003, 0.002]], np.float32))
    close(np.sqrt(0.15 * -(P5 * np.log(P5)).sum()), 0.436302, 5e-7)
    np.testing.assert_array_equal(decoding.entropy_stop(streamed(x), 1), [True, False])
    np.testing.assert_array_equal(decoding.entropy_stop(x, jnp.array([1, 40])), [True, True])
    np.testing.assert_array_equal(decoding.entropy_stop(x, 1, threshold=0.4364), [False, False])


def test_switching_worked_example():
    """Three entropies in the window; large at steps 4 to 6."""
    h = np.array([0.2, 0.4, 1.5, 1.8, 1.2, 0.3, 0.1], np.float32)

    @jax.jit
    def run(h, min_steps):
        def step(state, h):
            mean, entropy = _rolled(h, state.entropy)
            large, state = _switched(mean > 1, state._replace(entropy=entropy), min_steps)
            return state, (mean, large)

        return jax.lax.scan(step, EntropySwitch.start(3), h)[1]

    mean, large = run(h, 1)
    close(mean, [0.2, 0.3, 0.7, 1.233333, 1.5, 1.1, 0.533333], 1e-6)
    np.testing.assert_array_equal(large, [0, 0, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(run(h, 5)[1], [0, 0, 0, 0, 1, 1, 1])


def test_switching_by_logits():
    x = np.stack([np.zeros(4), [9.0, 0, 0, 0]]).astype(np.float32)  # log 4, and nearly 0
    large, state = decoding.entropy_switch(streamed(x), EntropySwitch.start(2, (2,)), threshold=1.0)
    np.testing.assert_array_equal(large, [True, False])
    mean, _ = decoding.rolling_entropy(x, RollingEntropy.start(2, (2,)))
    close(mean, state.entropy.values[0], 1e-6)
    close(mean[0], np.log(4), 1e-6)


def test_errors():
    x = jnp.zeros((2, 3, 5))
    ids = jnp.zeros((2, 2), int)
    fails(["draft_logits", "(2, 2, 5)"], ValueError, lambda: speculative_accept(ids, x, x, KEY))
    fails(
        ["target_logits", "(2, 3, 5)"], ValueError, lambda: speculative_accept(ids, x[:, :2], x[:, :2], KEY)
    )
    fails(["draft_tokens", "integer"], TypeError, lambda: speculative_accept(x[..., 0], x, x, KEY))
    fails(
        ["draft_lengths", "(2,)"],
        ValueError,
        lambda: speculative_accept(ids, x[:, :2], x, KEY, draft_lengths=jnp.array([1])),
    )
    state = AcceptanceState.start()
    fails(["head_logits", "2"], ValueError, lambda: decoding.acceptance_stop(jnp.zeros(3), state))
    fails(
        ["threshold", "< 1"], ValueError, lambda: decoding.acceptance_stop(jnp.zeros(2), state, threshold=1.0)
    )
    fails(["coefficient", "> 0"], ValueError, lambda: decoding.entropy_stop(x[0], 1, coefficient=0))
    fails(["window", ">= 1"], ValueError, lambda: RollingEntropy.start(0))
    fails(["state", "(3,)"], ValueError, lambda: decoding.rolling_entropy(x[0], RollingEntropy.start(2)))
    fails(
        ["threshold", "()"],
        ValueError,
        lambda: decoding.entropy_switch(x[0, 0], EntropySwitch.start(), threshold=jnp.ones(2)),
    )
