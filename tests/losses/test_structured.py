"""Transducers and hidden Markov models against all their paths; proportional odds against its definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close, fails
from jax.experimental import checkify
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.losses import (
    hmm_log_likelihood,
    proportional_odds_loss,
    proportional_odds_penalty,
    transducer_lattice_loss,
    transducer_loss,
)

FRAME, NODE, CLASS = np.meshgrid(np.arange(3), np.arange(3), np.arange(3), indexing="ij")
LOGITS = ((7 * FRAME + 3 * NODE + 5 * CLASS) % 11) / 5 - 1
LABELS = np.array([1, 2], np.int32)
RNG = np.random.default_rng(0)
BLANK, LABEL = np.log(RNG.random((3, 4, 4))), np.log(RNG.random((3, 4, 3)))  # examples, frames, nodes
FRAMES, SPOKEN = np.array([4, 3, 2], np.int32), np.array([3, 1, 2], np.int32)
COTANGENT = np.array([0.5, -1.5, 2.0])
TOPOLOGIES = pytest.mark.parametrize("topology", ["rnnt", "monotonic"])


def log_sum(values):
    return np.logaddexp.reduce(values) if len(values) else -np.inf


def alignments(blank, label, topology):
    """The log-probability of each alignment, and the arcs it uses."""
    frames, spoken = label.shape
    for where in itertools.combinations_with_replacement(range(frames), spoken):  # the frame of each label
        arcs = [("label", t, u) for u, t in enumerate(where)]
        for t in range(frames):
            said = sum(w <= t for w in where)
            if topology == "rnnt" or t not in where:
                arcs.append(("blank", t, said))
        if topology == "monotonic" and len(set(where)) < spoken:
            continue
        yield sum((blank if kind == "blank" else label)[t, u] for kind, t, u in arcs), arcs


def enumerated(blank, label, topology, reduction="sum"):
    """The loss, and the occupancies of the blanks and the labels."""
    paths = list(alignments(blank, label, topology))
    scores = np.array([score for score, _ in paths])
    total = log_sum(scores) if reduction == "sum" else max(scores, default=-np.inf)
    used = {"blank": np.zeros(blank.shape), "label": np.zeros(label.shape)}
    for score, arcs in paths:
        for kind, t, u in arcs:
            used[kind][t, u] += np.exp(score - total) if reduction == "sum" else score == total
    return -total, used["blank"], used["label"]


def test_worked_numbers(x64):
    loss = functools.partial(transducer_loss, LOGITS, LABELS)
    close(loss(), 4.185429)
    close(loss(reduction="max"), 5.374017)
    close(loss(topology="monotonic"), 2.363299)
    close(loss(topology="monotonic", reduction="max"), 3.110367)
    log_p = jax.nn.log_softmax(jnp.asarray(LOGITS))
    blank, label = log_p[..., 0], jnp.stack([log_p[:, 0, 1], log_p[:, 1, 2]], axis=1)
    occupancy = -jax.grad(transducer_lattice_loss)(blank, label)
    close(occupancy, [[0.410652, 0.447, 0.142349], [0.304651, 0.376895, 0.318453], [0, 0, 1]])
    close(transducer_loss(log_p, LABELS), 4.185429)  # log-probabilities are logits of themselves
    close(transducer_loss(jnp.roll(log_p, 1, axis=-1), (LABELS + 1) % 3, blank=1), 4.185429)
    b = np.array([[0.5, 0.2, 0.1], [0.3, 0.6, 0.2], [0.1, 0.5, 0.4], [0.2, 0.2, 0.7]])
    q = np.array([0.7, 0.4, 0.9])
    likelihood = functools.partial(hmm_log_likelihood, jnp.log(b), jnp.log(q / (1 - q)))
    close(likelihood(), -3.713090)
    close(likelihood(end="exit"), -3.818451)
    close(likelihood(end="any"), -3.377813)
    thresholds = jnp.array([-1.0, 0.5, 2.0])
    losses = proportional_odds_loss(jnp.full(4, 0.3), jnp.arange(4), thresholds)
    close(jnp.exp(-losses), [0.214165, 0.335669, 0.295701, 0.154465])
    close(losses[1], 1.091630)


@TOPOLOGIES
@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_all_alignments(topology, reduction, x64):
    """Value and gradient of padded examples, with NaN in the padding, against the enumeration."""
    frame, node = np.arange(4)[:, None], np.arange(4)
    inside = (frame < FRAMES[:, None, None]) & (node <= SPOKEN[:, None, None])
    spoken = (inside & (node < SPOKEN[:, None, None]))[..., :3]
    spoiled = np.where(inside, BLANK, np.nan), np.where(spoken, LABEL, np.nan)
    options = dict(topology=topology, reduction=reduction)
    lengths = dict(input_lengths=FRAMES, label_lengths=SPOKEN)
    loss = jax.jit(functools.partial(transducer_lattice_loss, **options, **lengths))
    values = loss(*spoiled)
    gradients = jax.jit(jax.grad(lambda *a: jnp.vdot(COTANGENT, loss(*a)), argnums=(0, 1)))(*spoiled)
    for i in range(3):
        t, u = FRAMES[i], SPOKEN[i]
        expected = enumerated(BLANK[i, :t, : u + 1], LABEL[i, :t, :u], **options)
        close(values[i], expected[0], 1e-12)
        close(gradients[0][i, :t, : u + 1], -COTANGENT[i] * expected[1], 1e-12)
        close(gradients[1][i, :t, :u], -COTANGENT[i] * expected[2], 1e-12)
    assert not np.any(gradients[0][~inside]) and not np.any(gradients[1][~spoken])
    if reduction == "sum":
        close(-gradients[1].sum(1) / COTANGENT[:, None], node[:3] < SPOKEN[:, None], 1e-12)
    # Batches of any shape, and one example after the other.
    by_one = jax.vmap(
        lambda b, l, t, u: transducer_lattice_loss(b, l, input_lengths=t, label_lengths=u, **options)
    )
    close(by_one(*spoiled, FRAMES, SPOKEN), values, 1e-12)


@TOPOLOGIES
def test_logits_streamed_and_dense(topology, x64):
    """Loss and gradients of a joint network that is never stored, in a batch with padding."""
    hidden, kernel = RNG.normal(size=(2, 3, 3, 4)), RNG.normal(size=(4, 7))
    labels = jnp.array([[3, 5], [2, -1]], jnp.int32)  # padding may hold anything
    lengths = dict(input_lengths=jnp.array([3, 2]), label_lengths=jnp.array([2, 1]), blank=6)
    spoiled = jnp.asarray(hidden).at[1, 2].set(jnp.nan).at[1, :, 2].set(jnp.nan)

    def run(hidden, kernel, dense):
        logits = jaxsoft.linear_logits(hidden, kernel, block_size=3)
        losses = transducer_loss(logits.dense() if dense else logits, labels, topology=topology, **lengths)
        return jnp.vdot(COTANGENT[:2], losses), losses

    both = [
        jax.jit(jax.value_and_grad(functools.partial(run, dense=d), argnums=(0, 1), has_aux=True))
        for d in (True, False)
    ]
    (value, losses), gradients = both[0](jnp.asarray(hidden), jnp.asarray(kernel))
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(hidden @ kernel)))
    for i, (t, y) in enumerate([(3, [3, 5]), (2, [2])]):
        label = np.stack([log_p[i, :t, u, c] for u, c in enumerate(y)], axis=1)
        close(losses[i], enumerated(log_p[i, :t, : len(y) + 1, 6], label, topology)[0], 1e-12)
    (streamed, _), g = both[1](spoiled, jnp.asarray(kernel))
    close(streamed, value, 1e-12)
    close(g[0], gradients[0], 1e-12)
    close(g[1], gradients[1], 1e-12)


@TOPOLOGIES
def test_impossible_and_empty_examples(topology):
    run = jax.jit(
        lambda b, l, t, u: jax.value_and_grad(
            lambda b, l: jnp.sum(
                transducer_lattice_loss(b, l, input_lengths=t, label_lengths=u, topology=topology)
            ),
            argnums=(0, 1),
        )(b, l)
    )
    blank, label = jnp.asarray(BLANK[0], jnp.float32), jnp.asarray(LABEL[0], jnp.float32)
    value, (g, h) = run(blank, label, 4, 0)  # no labels: all blanks
    close(value, -BLANK[0, :, 0].sum(), 1e-5)
    assert jnp.all(g[:, 0] == -1) and not jnp.any(g[:, 1:]) and not jnp.any(h)
    value, (g, h) = run(jnp.full_like(blank, jnp.nan), jnp.full_like(label, jnp.nan), 0, 2)
    assert value == 0 and not jnp.any(g) and not jnp.any(h)
    # A probability of 0 closes one way; none left: infinite, with gradient 0.
    closed = label.at[2:, 1].set(-jnp.inf)
    value, (g, h) = run(blank, closed, 4, 3)
    expected = enumerated(np.asarray(blank), np.asarray(closed), topology)
    close(value, expected[0], 1e-5)
    close(h, -expected[2], 1e-5)
    value, (g, h) = run(blank.at[3].set(-jnp.inf), label.at[:, 1].set(-jnp.inf), 4, 3)
    assert value == jnp.inf and not jnp.any(g) and not jnp.any(h)
    if topology == "monotonic":
        value, (g, h) = run(blank, label, 2, 3)  # more labels than frames
        assert value == jnp.inf and not jnp.any(g) and not jnp.any(h)
    value, (g, h) = run(blank, label, 4, 4)  # a length out of range
    assert jnp.isnan(value)
    assert jnp.isnan(run(blank, label, 5, 3)[0])
    none = transducer_lattice_loss(jnp.zeros((2, 0, 1)), jnp.zeros((2, 0, 0)), topology=topology)
    assert none.shape == (2,) and not jnp.any(none)


def test_derivatives_precision_and_weights():
    with float64():
        f = jax.jit(
            lambda b, l: jnp.vdot(
                COTANGENT, transducer_lattice_loss(b, l, input_lengths=FRAMES, label_lengths=SPOKEN)
            )
        )
        check_grads(f, (jnp.asarray(BLANK), jnp.asarray(LABEL)), 1, rtol=1e-6)
        exact = transducer_lattice_loss(jnp.asarray(100 * BLANK), jnp.asarray(100 * LABEL))
    values = jax.jit(transducer_lattice_loss)(
        jnp.asarray(100 * BLANK, jnp.float32), jnp.asarray(100 * LABEL, jnp.float32)
    )
    np.testing.assert_allclose(values, exact, rtol=1e-6)
    low = jnp.asarray(BLANK, jnp.bfloat16), jnp.asarray(LABEL, jnp.bfloat16)
    values = jax.jit(transducer_lattice_loss)(*low)
    assert values.dtype == jnp.float32
    close(values, jax.jit(transducer_lattice_loss)(*(a.astype(jnp.float32) for a in low)), 1e-6)
    weights = jnp.array([0.5, 0.0, 2.0])
    weighted = transducer_lattice_loss(low[0].at[1].set(jnp.nan), low[1], weights=weights)
    close(weighted, weights * values, 1e-6)
    huge = jnp.asarray(LOGITS * 1e4, jnp.float32)
    value, gradient = jax.value_and_grad(transducer_loss)(huge, LABELS)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


def test_labels_out_of_range():
    bad = jnp.array([1, 3], jnp.int32)
    logits = jnp.asarray(LOGITS, jnp.float32)
    assert jnp.isnan(transducer_loss(logits, bad))
    assert jnp.any(jnp.isnan(jax.grad(transducer_loss)(logits, bad)))
    assert jnp.isfinite(transducer_loss(logits, bad, label_lengths=jnp.int32(1)))
    error, _ = checkify.checkify(jax.jit(transducer_loss))(logits, bad)
    assert "labels must lie in [0, 3), got 3" in error.get()
    scores, thresholds = jnp.zeros(2), jnp.array([-1.0, 1.0])
    for label in (3, -1):
        labels = jnp.array([1, label])
        f = lambda s: proportional_odds_loss(s, labels, thresholds)
        np.testing.assert_array_equal(jnp.isnan(f(scores)), [False, True])
        gradient = jax.grad(lambda s: jnp.sum(f(s)))(scores)
        np.testing.assert_array_equal(jnp.isnan(gradient), [False, True])
    error, _ = checkify.checkify(jax.jit(proportional_odds_loss))(scores, jnp.array([0, 3]), thresholds)
    assert "labels must lie in [0, 3), got 3" in error.get()


# --- hidden Markov models --------------------------------------------------------------------------------


def all_paths(log_b, q, end):
    """The log-likelihood by all paths; q is `[frames, states]`."""
    frames, states = log_b.shape
    total = []
    for path in itertools.product(range(states), repeat=frames):
        steps = np.diff(path)
        if path[0] != 0 or not set(steps) <= {0, 1} or (end != "any" and path[-1] != states - 1):
            continue
        score = sum(log_b[t, s] for t, s in enumerate(path))
        score += sum(np.log(q[t, path[t]] if d else 1 - q[t, path[t]]) for t, d in enumerate(steps))
        total.append(score + (np.log(q[-1, -1]) if end == "exit" else 0))
    return log_sum(total)


@pytest.mark.parametrize("end", ["last", "exit", "any"])
def test_all_paths(end, x64):
    log_b, odds = RNG.normal(size=(3, 5, 3)) * 2, RNG.normal(size=(3, 5, 3)) * 2
    frames, states = np.array([5, 4, 2], np.int32), np.array([3, 2, 3], np.int32)
    inside = (np.arange(5)[:, None] < frames[:, None, None]) & (np.arange(3) < states[:, None, None])
    lengths = dict(input_lengths=frames, state_lengths=states)
    likelihood = jax.jit(functools.partial(hmm_log_likelihood, end=end, **lengths))
    values = likelihood(*(np.where(inside, a, np.nan) for a in (log_b, odds)))
    for i, (t, s) in enumerate(zip(frames, states)):
        q = 1 / (1 + np.exp(-odds[i, :t, :s]))
        close(values[i], all_paths(log_b[i, :t, :s], q, end), 1e-12)
    assert end == "any" or values[2] == -np.inf  # three states in two frames

    def total(b, m):
        values = likelihood(jnp.where(inside, b, jnp.nan), jnp.where(inside, m, jnp.nan))
        finite = jnp.isfinite(jax.lax.stop_gradient(values))
        return jnp.sum(jnp.where(finite, COTANGENT * values, 0))

    check_grads(jax.jit(total), (jnp.asarray(log_b), jnp.asarray(odds)), 1, rtol=1e-6)
    g = jax.jit(jax.grad(lambda b: jnp.sum(likelihood(b, odds))))(jnp.asarray(log_b))
    assert jnp.all(jnp.isfinite(g)) and not np.any(np.asarray(g)[~inside])
    if end != "any":
        assert not jnp.any(g[2])
    # One probability for all frames of a state; one example after the other.
    shared = hmm_log_likelihood(log_b, odds[0, 0], end=end, **lengths)
    by_one = jax.vmap(
        lambda b, t, s: hmm_log_likelihood(b, odds[0, 0], end=end, input_lengths=t, state_lengths=s)
    )
    close(
        jnp.where(jnp.isfinite(shared), shared, 0),
        jnp.where(jnp.isfinite(shared), by_one(log_b, frames, states), 0),
        1e-12,
    )


def test_hmm_edges():
    b, q = jnp.zeros((2, 3, 2)), jnp.zeros(2)
    values = hmm_log_likelihood(b.at[1].set(jnp.nan), q, input_lengths=jnp.array([1, 0]))
    assert values[0] == -jnp.inf and values[1] == 0
    assert jnp.all(jnp.isnan(hmm_log_likelihood(b, q, state_lengths=jnp.array([0, 3]))))
    extreme = jnp.array([1e4, -1e4])
    value, gradient = jax.value_and_grad(hmm_log_likelihood, argnums=1)(b[0], extreme)
    close(value, 0)  # moves at once, then stays
    assert jnp.all(jnp.isfinite(gradient))
    assert hmm_log_likelihood(b.astype(jnp.bfloat16), q).dtype == jnp.float32


# --- ordered classes -------------------------------------------------------------------------------------


def test_proportional_odds_is_its_definition(x64):
    thresholds = jnp.array([-1.0, 0.5, 2.0])
    scores = jnp.asarray(RNG.normal(size=(2, 4)) * 2)
    labels = jnp.array([[0, 1, 2, 3], [3, 2, 1, 0]], jnp.int32)
    below = 1 / (1 + np.exp(-(np.asarray(thresholds) - np.asarray(scores)[..., None])))
    p = np.diff(below, axis=-1, prepend=0, append=1)
    expected = -np.log(np.take_along_axis(p, np.asarray(labels)[..., None], -1)[..., 0])
    loss = jax.jit(proportional_odds_loss)
    close(loss(scores, labels, thresholds), expected, 1e-12)
    own = jnp.broadcast_to(scores[..., None], (2, 4, 3))
    close(loss(own, labels, thresholds), expected, 1e-12)
    close(jax.vmap(loss, (0, 0, None))(scores, labels, thresholds), expected, 1e-12)
    w = jnp.asarray(RNG.normal(size=(2, 4)))
    check_grads(
        jax.jit(lambda s, t: jnp.vdot(w, proportional_odds_loss(s, labels, t))),
        (own, thresholds),
        2,
        rtol=1e-5,
    )
    one = proportional_odds_loss(
        scores, jnp.minimum(labels, 1), jnp.zeros(1)
    )  # two classes: logistic regression
    close(one, np.logaddexp(0, np.where(labels == 0, 1, -1) * np.asarray(scores)), 1e-12)


def test_proportional_odds_precision_and_edges():
    thresholds = jnp.array([0.0, 1e-4, 1.0])
    loss = jax.jit(proportional_odds_loss)
    with float64():
        exact = proportional_odds_loss(
            jnp.array([0.3, 60.0, -60.0]), jnp.array([1, 1, 2]), jnp.array([0.0, 1e-4, 1.0])
        )
        exact = np.asarray(exact)
    values = loss(jnp.array([0.3, 60.0, -60.0]), jnp.array([1, 1, 2]), thresholds)
    np.testing.assert_allclose(values, exact, rtol=1e-6)
    run = jax.jit(
        jax.value_and_grad(lambda s, y, t: jnp.sum(proportional_odds_loss(s, y, t)), argnums=(0, 2))
    )
    for score in (1e4, -1e4):
        for label in range(4):
            value, gradients = run(jnp.array([score]), jnp.array([label]), thresholds)
            assert jnp.isfinite(value) and all(jnp.all(jnp.isfinite(g)) for g in gradients)
    for t in ([0.0, 0.0, 1.0], [0.0, -1.0, 1.0]):  # no room for the class 1
        value, gradients = run(jnp.array([0.5]), jnp.array([1]), jnp.array(t))
        assert value == jnp.inf and not any(jnp.any(g) for g in gradients)
    labels = jnp.array([2, -100])
    spoiled = jnp.array([0.3, jnp.nan])
    value, gradients = run(spoiled, labels, thresholds)
    close(value, loss(spoiled[:1], labels[:1], thresholds)[0])
    assert gradients[0][1] == 0 and all(jnp.all(jnp.isfinite(g)) for g in gradients)
    weighted = proportional_odds_loss(spoiled, jnp.array([2, 1]), thresholds, weights=jnp.array([2.0, 0.0]))
    close(weighted, [2 * value, 0])
    assert proportional_odds_loss(spoiled.astype(jnp.float16), labels, thresholds).dtype == jnp.float32


def test_proportional_odds_penalty():
    slopes = jnp.array([[1.0, 2.0], [1.0, 2.5], [0.5, 2.5]])
    value, gradient = jax.value_and_grad(proportional_odds_penalty)(slopes)
    assert value == 1.0
    close(gradient, [[0, -1], [1, 1], [-1, 0]])
    assert proportional_odds_penalty(slopes[:1]) == 0
    assert proportional_odds_penalty(slopes.astype(jnp.bfloat16)).dtype == jnp.float32


# --- bad input -------------------------------------------------------------------------------------------

F, I = np.float32, np.int32
BAD = [
    (
        transducer_loss,
        (np.ones((3, 3), F), LABELS),
        {},
        ValueError,
        ["logits", "frames, labels + 1", "(3, 3)"],
    ),
    (transducer_loss, (np.ones((3, 3, 3), int), LABELS), {}, TypeError, ["logits", "floating", "int64"]),
    (transducer_loss, (np.ones((3, 4, 3), F), LABELS), {}, ValueError, ["labels", "(3,)", "(2,)"]),
    (
        transducer_loss,
        (np.ones((3, 3, 3), F), np.ones(2, F)),
        {},
        TypeError,
        ["labels", "integer", "float32"],
    ),
    (transducer_loss, (np.ones((3, 3, 3), F), LABELS), dict(blank=3), ValueError, ["blank", "<= 2", "3"]),
    (
        transducer_loss,
        (np.ones((3, 3, 3), F), LABELS),
        dict(topology="ctc"),
        ValueError,
        ["topology", "'ctc'"],
    ),
    (
        transducer_lattice_loss,
        (np.ones((4, 3), F), np.ones((4, 3), F)),
        {},
        ValueError,
        ["label_log_probs", "(4, 2)", "(4, 3)"],
    ),
    (transducer_lattice_loss, (np.ones(3, F), np.ones(3, F)), {}, ValueError, ["blank_log_probs", "(3,)"]),
    (
        transducer_lattice_loss,
        (BLANK, LABEL),
        dict(reduction="mean"),
        ValueError,
        ["reduction", "'sum', 'max'"],
    ),
    (
        transducer_lattice_loss,
        (BLANK, LABEL),
        dict(input_lengths=FRAMES[:2]),
        ValueError,
        ["input_lengths", "(3,)"],
    ),
    (
        transducer_lattice_loss,
        (BLANK, LABEL),
        dict(label_lengths=np.ones(3, F)),
        TypeError,
        ["label_lengths"],
    ),
    (
        transducer_lattice_loss,
        (BLANK.astype(F), LABEL.astype(F)),
        dict(weights=np.ones(2, F)),
        ValueError,
        ["weights", "(3,)", "(2,)"],
    ),
    (transducer_lattice_loss, (BLANK, LABEL.astype(int)), {}, TypeError, ["label_log_probs", "floating"]),
    (
        hmm_log_likelihood,
        (np.ones((4, 3), F), np.ones(2, F)),
        {},
        ValueError,
        ["move_logits", "(4, 3)", "(2,)"],
    ),
    (hmm_log_likelihood, (np.ones((0, 3), F), np.ones(3, F)), {}, ValueError, ["log_emissions", "(0, 3)"]),
    (
        hmm_log_likelihood,
        (np.ones((4, 3), F), np.ones(3, F)),
        dict(end="all"),
        ValueError,
        ["end", "'any'", "'all'"],
    ),
    (hmm_log_likelihood, (np.ones((4, 3), I), np.ones(3, F)), {}, TypeError, ["log_emissions", "floating"]),
    (
        proportional_odds_loss,
        (np.ones(4, F), np.ones(3, I), np.ones(2, F)),
        {},
        ValueError,
        ["scores", "(3, 2)"],
    ),
    (
        proportional_odds_loss,
        (np.ones((3, 3), F), np.ones(3, I), np.ones(2, F)),
        {},
        ValueError,
        ["scores", "(3, 2)"],
    ),
    (
        proportional_odds_loss,
        (np.ones(3, F), np.ones(3, F), np.ones(2, F)),
        {},
        TypeError,
        ["labels", "integer"],
    ),
    (
        proportional_odds_loss,
        (np.ones(3, F), np.ones(3, I), np.ones((1, 2), F)),
        {},
        ValueError,
        ["thresholds"],
    ),
    (
        proportional_odds_loss,
        (np.ones(3, F), np.ones(3, I), np.ones(2, F)),
        dict(ignore_index=0.5),
        TypeError,
        ["ignore_index", "0.5"],
    ),
    (proportional_odds_penalty, (np.ones((2, 2), I),), {}, TypeError, ["slopes", "floating"]),
    (proportional_odds_penalty, (np.float32(1),), {}, ValueError, ["slopes", "scalar"]),
]


@pytest.mark.parametrize("function, args, options, kind, words", BAD)
def test_bad_input(function, args, options, kind, words):
    fails(words, kind, lambda: function(*args, **options))
