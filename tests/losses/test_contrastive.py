"""Contrastive losses: worked numbers, both directions in one pass, absent pairs, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, fails

import jaxsoft
from jaxsoft import losses

S = np.array([[9.0, 1.0, 3.0], [2.0, 8.0, 4.0], [0.0, 5.0, 6.0]])
N, M, D = 6, 6, 4
KEEP = jnp.array([True, True, False, True, True, False])
CLASSES = jnp.array([0, 1, 0, 2, 1, 0])


def towers(seed=0, n=N, d=D):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(n, d))) for _ in range(2))


def expression(x, y, block_size=4):
    return jaxsoft.linear_logits(x, y, transpose_weight=True, scale=2.0, block_size=block_size)


def test_worked_numbers():
    close(losses.info_nce_loss(jnp.asarray(S)).mean(), 0.112821)
    close(losses.clip_loss(jnp.asarray(S)).mean(), 0.093133)
    close(losses.siglip_loss(jnp.asarray(S), bias=-10.0).mean(), 2.489649)


def plain_clip(s, keep):
    s = jnp.where(keep[:, None] & keep[None, :], s, -1e30)
    own = jnp.diagonal(s)
    loss = 0.5 * (jax.nn.logsumexp(s, axis=1) + jax.nn.logsumexp(s, axis=0)) - own
    return jnp.where(keep, loss, 0)


def plain_siglip(s, keep):
    t = 2 * jnp.eye(s.shape[0]) - 1
    return jnp.where(keep, jnp.sum(jnp.where(keep, jax.nn.softplus(-t * (s - 1.5)), 0), axis=1), 0)


def plain_supcon(s, keep):
    n = s.shape[0]
    others = ~jnp.eye(n, dtype=bool) & keep & keep[:, None]
    positive = others & (CLASSES[:, None] == CLASSES[None, :])
    lse = jax.nn.logsumexp(jnp.where(others, s, -1e30), axis=1, keepdims=True)
    count = jnp.sum(positive, axis=1)
    return jnp.sum(jnp.where(positive, lse - s, 0), axis=1) / jnp.maximum(count, 1)


def plain_ms(s, keep, base=0.2, alpha=2.0, beta=5.0):
    same, both = CLASSES[:, None] == CLASSES, keep[:, None] & keep
    pull = jnp.where(same & both & ~jnp.eye(s.shape[0], dtype=bool), jnp.exp(alpha * (base - s)), 0)
    push = jnp.where(~same & both, jnp.exp(beta * (s - base)), 0)
    return jnp.log1p(jnp.sum(pull, axis=1)) / alpha + jnp.log1p(jnp.sum(push, axis=1)) / beta


CASES = {
    "clip": (losses.clip_loss, plain_clip),
    "siglip": (lambda s, **o: losses.siglip_loss(s, bias=-1.5, **o), plain_siglip),
    "supcon": (lambda s, **o: losses.supervised_contrastive_loss(s, CLASSES, **o), plain_supcon),
    "multi-similarity": (
        lambda s, **o: losses.multi_similarity_loss(s, CLASSES, base=0.2, beta=5.0, **o),
        plain_ms,
    ),
}
cases = pytest.mark.parametrize("name", CASES)


@pytest.mark.table
@cases
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_derivatives(name, masked, x64):
    """Dense and never stored, in ragged blocks: values, uneven cotangents, forward mode, second order."""
    ours, plain = CASES[name]
    x, y = towers()
    keep = KEEP if masked else jnp.ones(N, bool)
    options = {"where": keep} if masked else {}
    w = jnp.asarray(np.random.default_rng(1).normal(size=N))
    if masked:
        x, y = x.at[2].set(jnp.nan), y.at[5].set(jnp.nan)
    clean = tuple(jnp.where(keep[:, None], a, 0) for a in (x, y))

    def contracted(f):
        return lambda pair: jnp.vdot(w, f(pair))

    functions = (
        contracted(lambda p: plain(2 * clean_rows(p, keep)[0] @ clean_rows(p, keep)[1].T, keep)),
        contracted(lambda p: ours(expression(*p), **options)),
        contracted(lambda p: ours(expression(*p).dense(), **options)),
    )

    @jax.jit
    def everything(pair):
        direction = jax.tree.map(lambda a: jnp.where(jnp.isnan(a), 0, jnp.cos(a)), pair)
        out = []
        for f in functions:
            value, gradient = jax.value_and_grad(f)(pair)
            _, curvature = jax.jvp(jax.grad(f), (pair,), (direction,))
            out.append((value, gradient, jax.jvp(f, (pair,), (direction,))[1], curvature))
        return out

    expected, streamed, dense = everything(clean)
    # (A NaN in a row of a stored product's operand reaches the product's gradient with any loss.)
    for result in (streamed, dense, everything((x, y))[1]):
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected)):
            close(a, b, 1e-10)


def clean_rows(pair, keep):
    return tuple(jnp.where(keep[:, None], a, 0) for a in pair)


@cases
def test_weights_jit_vmap_and_huge_similarities(name, x64):
    ours, plain = CASES[name]
    s = jnp.asarray(np.random.default_rng(2).normal(size=(2, N, N)))
    weights = jnp.arange(N) - 1.0
    every = jnp.ones(N, bool)
    expected = jax.jit(jax.vmap(lambda s: weights * plain(s, every)))(s)
    close(jax.jit(jax.vmap(lambda s: ours(s, weights=weights)))(s), expected, 1e-12)
    if name in ("clip", "supcon"):  # a shift changes nothing, also at 1e4 in float32
        close(
            ours(s[0].astype(jnp.float32) + 1e4), ours((s[0].astype(jnp.float32) + 1e4).astype(float)), 2e-6
        )
    low = ours(s[0].astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    close(low, ours(s[0].astype(jnp.bfloat16).astype(float)), 1e-5)


@cases
def test_nothing_but_absent_pairs(name):
    ours, _ = CASES[name]
    f = lambda s: ours(s, where=jnp.zeros(N, bool))
    value, pullback = jax.vjp(f, jnp.full((N, N), jnp.nan))
    assert jnp.all(value == 0) and jnp.all(pullback(jnp.ones(N))[0] == 0)


@cases
def test_a_pair_without_similarities_is_a_masked_pair(name, x64):
    """A row of -inf only has loss 0 and gradient 0."""
    ours, _ = CASES[name]
    keep = jnp.arange(N) != 2
    s = jnp.asarray(np.random.default_rng(6).normal(size=(N, N)))
    both = [
        jax.vjp(lambda s, w=w: ours(s, where=w), a)
        for a, w in ((s, keep), (jnp.where(keep[:, None] & keep, s, -jnp.inf), None))
    ]
    (expected, pull), (value, pull_absent) = both
    close(value, expected, 1e-12)
    close(pull_absent(jnp.arange(1.0, N + 1))[0], pull(jnp.arange(1.0, N + 1))[0], 1e-12)


def test_an_absent_similarity():
    s = jnp.asarray(S).at[1, 1].set(-jnp.inf)
    value, gradient = jax.value_and_grad(lambda s: losses.clip_loss(s)[0])(s)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
    assert losses.clip_loss(s)[1] == jnp.inf


def test_the_directions_of_clip_are_info_nce_and_optax():
    s = jnp.asarray(S, jnp.float32)
    both = 0.5 * (losses.info_nce_loss(s) + losses.info_nce_loss(s.T))
    close(losses.clip_loss(s), both)
    plain = optax.softmax_cross_entropy_with_integer_labels
    own = jnp.arange(3)
    close(both, 0.5 * (plain(s, own) + plain(s.T, own)))


def test_supervised_contrastive_loss_is_that_of_pytorch_metric_learning():
    torch = pytest.importorskip("torch")
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    x = np.random.default_rng(3).normal(size=(N, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    theirs = pml.SupConLoss(temperature=0.1)(torch.tensor(x), torch.tensor(np.asarray(CLASSES)))
    ours = losses.supervised_contrastive_loss(jnp.asarray(x @ x.T / 0.1), CLASSES)
    has_positive = np.array([np.sum(c == CLASSES) > 1 for c in CLASSES])
    close(ours[has_positive].mean(), theirs.item(), 1e-5)
    assert np.all(np.asarray(ours)[~has_positive] == 0)


def test_multi_similarity_is_that_of_pytorch_metric_learning(x64):
    torch = pytest.importorskip("torch")
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    x = np.random.default_rng(3).normal(size=(N, D))
    theirs = pml.MultiSimilarityLoss(2, 50, 0.5)(torch.tensor(x), torch.tensor(np.asarray(CLASSES)))
    x = jnp.asarray(x)
    cosines = losses.cosine_logits(x, x, transpose_weight=True, block_size=4)
    close(losses.multi_similarity_loss(cosines, CLASSES).mean(), theirs.item(), 1e-10)


def test_multi_similarity_of_mixed_examples(x64):
    """Labels in [0, 1], of candidates that are mixed (Metrix): weights within the sums."""
    x, y = towers()
    anchors, mask = x[:4], np.random.default_rng(4).random((4, N)) < 0.8
    labels = np.random.default_rng(5).random((4, N)) * (np.arange(N) > 0)  # the first is a negative
    s = np.asarray(2 * anchors @ y.T)
    pull = np.sum(np.where(mask, labels * np.exp(2 * (0.2 - s)), 0), axis=1)
    push = np.sum(np.where(mask, (1 - labels) * np.exp(5 * (s - 0.2)), 0), axis=1)
    options = dict(base=0.2, beta=5.0, where=jnp.asarray(mask), weights=jnp.arange(4.0))

    def total(pair, labels, lazy):
        logits = expression(*pair) if lazy else 2 * pair[0] @ pair[1].T
        return jnp.sum(jnp.sin(losses.multi_similarity_loss(logits, labels, **options)))

    both = jax.jit(lambda *a: [jax.value_and_grad(total, (0, 1))(*a, lazy) for lazy in (True, False)])
    lazy, dense = both((anchors, y), jnp.asarray(labels))
    close(lazy[0], np.sum(np.sin(np.arange(4) * (np.log1p(pull) / 2 + np.log1p(push) / 5))), 1e-12)
    for a, b in zip(jax.tree.leaves(lazy), jax.tree.leaves(dense)):
        close(a, b, 1e-10)
    # Labels 0 and 1 are classes.
    s = jnp.asarray(np.random.default_rng(6).normal(size=(N, N)))
    same, others = (CLASSES[:, None] == CLASSES).astype(float), ~jnp.eye(N, dtype=bool)
    classes = losses.multi_similarity_loss(s, CLASSES, beta=5.0)
    close(losses.multi_similarity_loss(s, same, beta=5.0, where=others), classes, 1e-12)


def test_the_bar_on_memory():
    """Both ways over 8192 x 8192 pairs, value and gradient: at most a tenth of the dense temporary memory."""
    n, d = 8192, 512
    pair = [jax.ShapeDtypeStruct((n, d), jnp.float32)] * 2
    own = jnp.arange(n)

    def ours(x, y):
        return losses.clip_loss(losses.cosine_logits(x, y, transpose_weight=True)).mean()

    def dense(x, y):
        s, plain = (
            losses.l2_normalize(x) @ losses.l2_normalize(y).T,
            optax.softmax_cross_entropy_with_integer_labels,
        )
        return 0.5 * (plain(s, own) + plain(s.T, own)).mean()

    temporary = [
        jax.jit(jax.value_and_grad(f, (0, 1))).lower(*pair).compile().memory_analysis().temp_size_in_bytes
        for f in (ours, dense)
    ]
    assert temporary[0] <= temporary[1] / 10, temporary


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: losses.clip_loss(jnp.ones((2, 3))), ValueError, ["logits", "square", "(2, 3)"]),
        (lambda: losses.siglip_loss(jnp.ones((2, 2, 2))), ValueError, ["logits", "square", "(2, 2, 2)"]),
        (lambda: losses.siglip_loss(jnp.ones((2, 2)), bias="b"), TypeError, ["bias", "number", "'b'"]),
        (lambda: losses.clip_loss(jnp.ones((2, 2), int)), TypeError, ["logits", "floating", "int"]),
        (lambda: losses.clip_loss(jnp.ones((2, 2)), where=jnp.ones(2)), TypeError, ["where", "boolean"]),
        (
            lambda: losses.clip_loss(jnp.ones((2, 2)), weights=jnp.ones(3)),
            ValueError,
            ["weights", "(2,)", "(3,)"],
        ),
        (lambda: losses.info_nce_loss(jnp.ones((3, 2))), ValueError, ["labels", "(3, 2)"]),
        (
            lambda: losses.multi_similarity_loss(jnp.ones((2, 2)), jnp.ones((2, 3))),
            ValueError,
            ["labels", "(2, 2)", "(2, 3)"],
        ),
        (
            lambda: losses.multi_similarity_loss(jnp.ones((2, 3)), jnp.ones(2, int)),
            ValueError,
            ["logits", "square", "(2, 3)"],
        ),
        (
            lambda: losses.multi_similarity_loss(jnp.ones((2, 2)), [0, 1]),
            TypeError,
            ["labels", "array", "list"],
        ),
        (
            lambda: losses.multi_similarity_loss(jnp.ones((2, 2)), jnp.ones(2, int), beta=0.0),
            ValueError,
            ["beta", "> 0", "0.0"],
        ),
        (
            lambda: losses.supervised_contrastive_loss(jnp.ones((2, 2)), jnp.ones(2)),
            TypeError,
            ["labels", "integer", "float32"],
        ),
        (
            lambda: losses.supervised_contrastive_loss(jnp.ones((2, 2)), jnp.ones(3, int)),
            ValueError,
            ["labels", "(2,)", "(3,)"],
        ),
    ],
)
def test_bad_input(call, kind, words):
    fails(words, kind, call)
