"""Distillation: worked numbers, limits, both rows never stored, top-k teachers, relations, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import absent_in_one_row, close, fails, rows_and_gradients

import jaxsoft
from jaxsoft import losses

A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]
T1, T2 = [3.0, 0.5, 0.2, -2.0, 1.0], [1.0, 1.5, 0.0, 0.0, 0.5]
S, T = jnp.array([A]), jnp.array([T1])
LABEL = jnp.array([0])


def of(loss, **options):
    return lambda s, t: loss(s, t, **options)[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (of(losses.distillation_loss, temperature=4.0), 0.238041),
        (of(losses.distillation_loss), 0.130124),
        (of(losses.distillation_loss, divergence="reverse_kl"), 0.169648),
        (of(losses.distillation_loss, divergence="jensen_shannon"), 0.035815),
        (of(losses.distillation_loss, divergence="total_variation"), 0.219684),
        (of(losses.low_temperature_distillation_loss, temperature=5.0), 1.764328),
        (of(losses.alpha_divergence, alpha=-1.0), 0.252114),
        (of(losses.alpha_divergence, alpha=-1.0, clip=5.0), 0.247898),
        (of(losses.alpha_divergence, alpha=2.0), 0.110491),
        (of(losses.alpha_divergence, alpha=0.5), 0.146438),
        (of(losses.alpha_divergence, alpha=1.0), 0.130124),
        (of(losses.alpha_divergence, alpha=0.0), 0.169648),
        (of(losses.adaptive_alpha_divergence_loss), 0.247898),
        (of(losses.adaptive_alpha_divergence_loss, clip=None), 0.252114),
        (
            lambda s, t: losses.progressive_self_distillation_loss(s, LABEL, jax.nn.softmax(t), alpha=0.4)[0],
            0.713424,
        ),
        (lambda s, t: losses.squared_log_prob_loss(s, LABEL, jnp.log(jnp.array([0.7])))[0], 0.050961),
        (lambda s, t: losses.ensemble_distillation_loss(s, [t, jnp.array([T2])])[0], 0.011987),
        (
            lambda s, t: losses.binary_distillation_loss(jnp.array([[1.0, 0.5]]), jnp.array([[2.0, -1.0]]))[
                0
            ],
            0.361572,
        ),
    ],
)
def test_worked_numbers(value, expected, x64):
    close(value(jnp.array([A]), jnp.array([T1])), expected)


def test_worked_numbers_of_relations(x64):
    student = jnp.array([A, B])
    teacher = jnp.array([[1.5, 0.4, 0.9, -0.5, 0.2], [0.1, 2.0, 0.3, 0.5, -1.0]])
    for power, expected in ((1.0, 0.110800), (2.0, 0.023766)):
        close(losses.graph_on_logits_loss(student, teacher, k=3, power=power), expected)
    new, old = jnp.array([[1.0, 0], [0.6, 0.8], [0, 1]]), jnp.array([[0.8, 0.6], [0.6, 0.8], [0, 1]])
    now, before = jnp.array([[1.0, 0], [0.28, 0.96]]), jnp.array([[0.96, 0.28], [0.6, 0.8]])
    relation = losses.prototype_relation_distillation_loss
    close(relation(now, new, before, old, temperature=0.5), [0.041037, 0.210644])
    some = relation(now, new, before, old, temperature=0.5, where=jnp.array([False, True]))
    close(some, [0, 0.210644])


def pairs(seed=0, n=4, d=3, columns=7):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return dict(h=normal(n, d), w=normal(d, columns), h2=normal(n, d + 1), w2=normal(d + 1, columns))


def log_softmax(x, mask):
    return jax.nn.log_softmax(jnp.where(mask, x, -1e30))


def plain(name, s, t, mask):
    q, p = log_softmax(s, mask), log_softmax(t, mask)
    eq, ep = jnp.exp(q), jnp.exp(p)
    kl = lambda a, b: jnp.sum(jnp.where(mask, jnp.exp(a) * (a - b), 0), axis=-1)
    m = jnp.logaddexp(p, q) - jnp.log(2.0)
    r = jnp.sum(jnp.where(mask, jnp.exp(-0.7 * p + 1.7 * q), 0), axis=-1)
    sigmoid = jax.nn.sigmoid
    bce = jax.nn.softplus(s) - sigmoid(t) * s
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: 0.5 * (kl(p, m) + kl(q, m)),
        "total_variation": lambda: 0.5 * jnp.sum(jnp.where(mask, jnp.abs(ep - eq), 0), axis=-1),
        "alpha": lambda: (r - 1) / (-0.7 * -1.7),
        "cross_entropy": lambda: kl(p, q) - jnp.sum(jnp.where(mask, ep * p, 0), axis=-1),
        "binary": lambda: jnp.sum(jnp.where(mask, jnp.abs(sigmoid(t) - sigmoid(s)) ** 1.5 * bce, 0), axis=-1),
    }[name]()


OURS = {
    name: lambda s, t, name=name, **o: losses.distillation_loss(
        s, t, divergence=name, stop_teacher_gradient=False, **o
    )
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
} | {
    "alpha": lambda s, t, **o: losses.alpha_divergence(s, t, alpha=-0.7, stop_teacher_gradient=False, **o),
    "cross_entropy": lambda s, t, **o: losses.low_temperature_distillation_loss(s, t, temperature=1.0, **o),
    "binary": lambda s, t, **o: losses.binary_distillation_loss(s, t, beta=1.5, **o),
}
LOW = 600.0  # far below any other score, and the exponential is not 0 in float64
CONSTANT_TEACHER = ("cross_entropy", "binary")
W = np.random.default_rng(1).normal(size=4)


@pytest.mark.table
@pytest.mark.parametrize("name", OURS)
def test_two_expressions_are_two_arrays(name, x64):
    """Values and gradients of all operands, in ragged blocks, masked, and with the gradient in the forward pass.

    The row that may lack a class, by the formula, lacks one.
    """
    operands = pairs()
    lacking = jnp.zeros(7).at[4].set(-jnp.inf)
    biases = [lacking, None] if name in ("reverse_kl", "alpha") else [None, lacking]
    mask = jnp.asarray(np.random.default_rng(2).random((4, 7)) < 0.7).at[:, 0].set(True)

    def dense(o):
        t = o["h2"] @ o["w2"]
        t = jax.lax.stop_gradient(t) if name in CONSTANT_TEACHER else t
        s, t = (x if b is None else jnp.where(b == 0, x, -LOW) for x, b in zip((o["h"] @ o["w"], t), biases))
        return jnp.vdot(W, plain(name, s, t, mask))

    def logits(o, block):
        names = (("h", "w"), ("h2", "w2"))
        options = dict(block_size=block)
        return (jaxsoft.linear_logits(o[a], o[b], bias=c, **options) for (a, b), c in zip(names, biases))

    def streamed(o, block):
        return jnp.vdot(W, OURS[name](*logits(o, block), where=mask))

    def mixed(o):
        student, teacher = logits(o, 3)
        return jnp.vdot(W, OURS[name](student.dense(), teacher, where=mask))

    def summed(o):
        return losses.weighted_sum(
            OURS[name], *logits(o, 3), weights=jnp.asarray(W), where=mask, chunk_size=3
        )

    functions = [dense, lambda o: streamed(o, 1), lambda o: streamed(o, 3), mixed, summed]
    expected, *results = jax.jit(lambda o: [jax.value_and_grad(f)(o) for f in functions])(operands)
    for result in results:
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected)):
            close(a, b, 1e-10)


def test_the_mean_with_two_heads_and_bfloat16():
    operands = pairs(n=6)
    logits = jaxsoft.linear_logits(operands["h"], operands["w"])
    teacher = jaxsoft.linear_logits(operands["h2"], operands["w2"], bias=jnp.arange(7.0))
    rows = losses.distillation_loss(logits, teacher)
    close(losses.weighted_mean(losses.distillation_loss, logits, teacher, chunk_size=4), rows.mean())
    low = losses.distillation_loss(logits.dense().astype(jnp.bfloat16), teacher)
    assert low.dtype == jnp.float32
    close(low, rows, 2e-2)


def alpha(value, clip=None):
    return lambda s, t, **o: losses.alpha_divergence(s, t, alpha=value, clip=clip, **o)


# Those that the conformance table does not have.
FURTHER = {
    "cross-entropy": OURS["cross_entropy"],
    "ensemble": lambda s, t, **o: losses.ensemble_distillation_loss(s, [t, 0.5 * t], **o),
    "alpha 1.5": alpha(1.5),
    "alpha -1, clipped": alpha(-1.0, 5.0),
    "alpha 0, clipped": alpha(0.0, 5.0),
    "alpha 0.5, clipped": alpha(0.5, 5.0),
}


@pytest.mark.parametrize("name", FURTHER)
def test_an_absent_class_in_one_of_two_rows(name, x64):
    x, t = 2 * np.random.default_rng(3).normal(size=(2, 2, 3, 7))

    def call(x, t, where):
        return FURTHER[name](x, t, where=where)

    empty, gradients = absent_in_one_row(jax.jit(functools.partial(rows_and_gradients, call)), x, t, 5, 6)
    assert not np.any(empty) and not np.any(gradients)


def test_a_teacher_stored_as_its_largest_logits():
    teacher = jnp.array([[-jnp.inf, 0.0, 0.0]])
    close(losses.distillation_loss(jnp.array([[3.0, 0.5, 0.0]]), teacher), 2.181, 5e-4)


def test_limits(x64):
    s, t = jnp.array([A, B]), jnp.array([T1, T2])
    kl, alpha = losses.distillation_loss, losses.alpha_divergence
    close(alpha(s, t, alpha=1 + 1e-6), kl(s, t), 1e-6)
    close(alpha(s, t, alpha=1e-6), kl(s, t, divergence="reverse_kl"), 1e-6)
    # Clipping that never binds changes neither value nor gradient.
    for a in (-1.0, 0.0, 0.5, 2.0):
        f = [jax.vjp(lambda s, c=c: alpha(s, t, alpha=a, clip=c), s) for c in (None, 1e6)]
        close(f[0][0], f[1][0], 1e-12)
        w = jnp.array([0.3, -2.0])
        close(f[0][1](w)[0], f[1][1](w)[0], 1e-10)
    own = jax.nn.softmax(s)
    ids = jnp.broadcast_to(jnp.arange(5), (2, 5))
    for tail in ("bucket", "drop", "renormalize"):
        close(losses.top_k_distillation_loss(s, ids, own, tail=tail), 0, 1e-12)
        close(losses.top_k_distillation_loss(s, ids, jax.nn.softmax(t), tail=tail), kl(s, t), 1e-12)
    close(losses.ensemble_distillation_loss(s, [t, t]), kl(s, t), 1e-12)
    weighted = losses.ensemble_distillation_loss(s, [t, s], teacher_weights=jnp.array([2.0, 0.0]))
    close(weighted, kl(s, t), 1e-12)
    close(losses.binary_distillation_loss(s, s), 0, 1e-12)
    hard = losses.cross_entropy(s, jnp.array([0, 3]))
    close(losses.progressive_self_distillation_loss(s, jnp.array([0, 3]), own, alpha=0.0), hard, 1e-12)


def test_the_gradient_of_a_clipped_divergence(x64):
    """`sum_c w_c grad(-log q_c)` with `w = q (r / alpha + 1 / (alpha (alpha - 1)))`, r clipped at 1.2."""
    s, t, a = jnp.array([A]), jnp.array([T1]), -1.0
    gradient = jax.grad(lambda s: losses.alpha_divergence(s, t, alpha=a, clip=1.2).sum())(s)
    q, p = jax.nn.softmax(s), jax.nn.softmax(t)
    w = q * (jnp.minimum((p / q) ** a, 1.2) / a + 1 / (a * (a - 1)))
    close(gradient, q * w.sum() - w, 1e-12)


def test_top_k_teachers(x64):
    rng = np.random.default_rng(3)
    s, t = (jnp.asarray(rng.normal(size=(3, 6))) for _ in range(2))
    p, ids = jax.lax.top_k(jax.nn.softmax(t), 3)
    q = jnp.take_along_axis(jax.nn.softmax(s), ids, axis=-1)
    top = jnp.sum(p * jnp.log(p / q), axis=-1)
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    share = p / p.sum(-1, keepdims=True)
    expected = {
        "bucket": top + rest_p * jnp.log(rest_p / rest_q),
        "drop": top,
        "renormalize": jnp.sum(share * jnp.log(share / q), axis=-1),
    }
    for tail, value in expected.items():
        close(losses.top_k_distillation_loss(s, ids, p, tail=tail), value, 1e-12)
    assert jnp.all(expected["bucket"] <= losses.distillation_loss(s, t) + 1e-12)
    padded = p.at[:, 2].set(0)  # a list that is padded with ids of probability 0 is a shorter list
    for tail in expected:
        loss = functools.partial(losses.top_k_distillation_loss, s, tail=tail)
        close(loss(ids, padded), loss(ids[:, :2], p[:, :2]), 1e-12)
    # Streamed, with its gradient; a padded list; an absent class.
    operands = pairs(columns=6, n=3)
    p2 = p.at[0, 2].set(0)
    f = lambda o, dense: losses.top_k_distillation_loss(
        (lambda e: e.dense() if dense else e)(jaxsoft.linear_logits(o["h"], o["w"], block_size=4)), ids, p2
    )
    both = jax.jit(lambda o: [jax.vjp(lambda o: f(o, dense), o)[1](jnp.arange(3.0)) for dense in (0, 1)])
    for a, b in zip(*map(jax.tree.leaves, both(operands))):
        close(a, b, 1e-12)
    assert losses.top_k_distillation_loss(s.at[1, ids[1, 0]].set(-jnp.inf), ids, p)[1] == jnp.inf
    empty = losses.top_k_distillation_loss(jnp.full_like(s, -jnp.inf), ids, p)
    assert jnp.all(empty == 0)


def test_adapted_labels():
    p = jnp.array([[0.9, 0.1, 0], [0.6, 0.2, 0.2], [0.4, 0.3, 0.3]])
    q, weights = jax.jit(
        lambda p: losses.adapt_soft_labels(
            jnp.array([1, 1, 2]), p, discard_below=0.5, trust_above=0.8, label_smoothing=0.3
        )
    )(p)
    close(q, [[0.9, 0.1, 0], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    close(weights, [1, 1, 0])


def test_hardest_negatives_are_the_teachers():
    rng = np.random.default_rng(4)
    s, t = (rng.normal(size=(5, 5)) for _ in range(2))
    ours = losses.dynamic_contrastive_distillation_loss(jnp.asarray(s), jnp.asarray(t), k=2, margin=0.3)
    for i in range(5):
        order = [j for j in np.argsort(-t[i]) if j != i][:2]
        x, y = s[i][[i, *order]], t[i][[i, *order]]
        q, p = x - np.log(np.exp(x).sum()), y - np.log(np.exp(y).sum())
        hinge = np.maximum(0.3 + x[1:] - x[0], 0).sum()
        close(ours[i], (1 - np.exp(p[0])) * (-q[0] + hinge + np.sum(np.exp(p) * (p - q))), 1e-5)


def test_gradients_of_relations_are_finite_differences(x64):
    rng = np.random.default_rng(5)
    x, t = (jnp.asarray(rng.normal(size=(4, 4))) for _ in range(2))
    before, old = (jnp.asarray(rng.normal(size=(4, 4))) for _ in range(2))
    w, d = jnp.asarray(rng.normal(size=4)), jnp.asarray(rng.normal(size=(4, 4)))
    for f in (
        lambda x: jnp.vdot(w, losses.dynamic_contrastive_distillation_loss(x, t, k=2)),
        lambda x: losses.graph_on_logits_loss(x, t, k=2),
        lambda x: jnp.vdot(w, losses.prototype_relation_distillation_loss(x, t + x, before, old)),
        lambda x: jnp.vdot(w, losses.ensemble_distillation_loss(x, [t, before])),
    ):
        slope, (low, high) = jax.jit(
            lambda x, f=f: (jnp.vdot(jax.grad(f)(x), d), (f(x - 1e-5 * d), f(x + 1e-5 * d)))
        )(x)
        np.testing.assert_allclose(slope, (high - low) / 2e-5, rtol=1e-6)


def test_the_bar_on_memory():
    """Two heads, N=2048, D=512, V=32768: at most a twentieth of the dense temporary memory, with the gradient."""
    n, d, v = 2048, 512, 32768
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (d, v), (n, d), (d, v))]

    def ours(h, w, h2, w2):
        teacher = jaxsoft.linear_logits(h2, w2)
        return losses.distillation_loss(jaxsoft.linear_logits(h, w), teacher).mean()

    def dense(h, w, h2, w2):
        q, p = jax.nn.log_softmax(h @ w), jax.lax.stop_gradient(jax.nn.log_softmax(h2 @ w2))
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean()

    temporary = [
        jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        for f in (ours, dense)
    ]
    assert temporary[0] <= temporary[1] / 20, temporary


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: losses.distillation_loss(X, X[:1]), ValueError, ["teacher_logits", "(2, 3)", "(1, 3)"]),
        (lambda: losses.distillation_loss(X, [1.0]), TypeError, ["teacher_logits", "floating", "list"]),
        (
            lambda: losses.distillation_loss(
                jaxsoft.linear_logits(X, X.T, filter_eps=1e-4), jaxsoft.linear_logits(X, X.T)
            ),
            ValueError,
            ["filter_eps", "None"],
        ),
        (
            lambda: losses.adaptive_alpha_divergence_loss(X, X, alpha_min=1.0, alpha_max=0.0),
            ValueError,
            ["alpha_max", "1.0", "0.0"],
        ),
        (lambda: losses.ensemble_distillation_loss(X, []), TypeError, ["teacher_logits", "list"]),
        (
            lambda: losses.ensemble_distillation_loss(X, [X, X[:1]]),
            ValueError,
            ["teacher_logits[1]", "(2, 3)", "(1, 3)"],
        ),
        (
            lambda: losses.ensemble_distillation_loss(X, [X], teacher_weights=jnp.ones(2)),
            ValueError,
            ["teacher_weights", "(1,)", "(2,)"],
        ),
        (
            lambda: losses.top_k_distillation_loss(X, jnp.ones((2,), int), jnp.ones((2,))),
            ValueError,
            ["teacher_ids", "(2, 'k')", "(2,)"],
        ),
        (
            lambda: losses.top_k_distillation_loss(X, jnp.ones((2, 1), int), jnp.ones((2, 2))),
            ValueError,
            ["teacher_probabilities", "(2, 1)", "(2, 2)"],
        ),
        (
            lambda: losses.top_k_distillation_loss(X, jnp.ones((2, 1), int), jnp.ones((2, 1)), tail="x"),
            ValueError,
            ["tail", "'bucket'", "'x'"],
        ),
        (lambda: losses.graph_on_logits_loss(X, X, k=0), ValueError, ["k", ">= 1", "0"]),
        (lambda: losses.graph_on_logits_loss(X[0], X), ValueError, ["logits", "positions", "(3,)"]),
        (
            lambda: losses.prototype_relation_distillation_loss(X, X, X[:1], X),
            ValueError,
            ["old_prototypes", "(2, 3)", "(1, 3)"],
        ),
        (
            lambda: losses.dynamic_contrastive_distillation_loss(X[:, :2], X[:, :2], k=2),
            ValueError,
            ["k", "<= 1", "2"],
        ),
        (
            lambda: losses.dynamic_contrastive_distillation_loss(jaxsoft.linear_logits(X, X.T), X[:, :2]),
            TypeError,
            ["logits.dense()"],
        ),
        (
            lambda: losses.adapt_soft_labels(jnp.zeros(2, int), X, discard_below=0.5, trust_above=0.4),
            ValueError,
            ["trust_above", "0.5", "0.4"],
        ),
    ],
)
def test_bad_input(call, kind, words):
    fails(words, kind, call)
