"""Inverted softmaxes against hubs in retrieval."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.normalizers.retrieval import (
    dual_inverted_softmax,
    dynamic_inverted_softmax,
    inverted_softmax,
)

S = np.array([[0.9, 0.4, 0.3], [0.8, 0.5, 0.2]])
BQ = np.array([[0.85, 0.3, 0.1], [0.7, 0.35, 0.3]])
BG = np.array([[1, 0.45, 0.2], [0.45, 1, 0.3]])
S2 = np.array([[0.9, 0.8], [0.7, 0.75], [0.2, 0.6]])
B2 = np.array([[0.5, 0.9], [0.3, 0.7]])
G2 = np.array([[1, 0.6], [0.5, 1]])

RNG = np.random.default_rng(0)
SIMILARITIES, BANK, OTHER = RNG.normal(size=(4, 5)), RNG.normal(size=(7, 5)), RNG.normal(size=(6, 5))
FORMS = {
    "plain": lambda s, b, g, **o: inverted_softmax(s, b, beta=2.0, **o),
    "dynamic": lambda s, b, g, **o: dynamic_inverted_softmax(s, b, beta=2.0, **o),
    "dual": lambda s, b, g, **o: dual_inverted_softmax(s, b, g, **o),
    "dual_dynamic": lambda s, b, g, **o: dual_inverted_softmax(s, b, g, dynamic=True, **o),
}
every_form = pytest.mark.parametrize("form", FORMS)
both_logs = pytest.mark.parametrize("log", [True, False])


def test_worked_numbers(x64):
    numbers = [[2.589365, 1.987223, 0.982014], [0.350432, 14.683704, 0.132901]]
    s, bq, bg = (jnp.asarray(a) for a in (S, BQ, BG))
    close(inverted_softmax(s, bq, log=False), numbers, 2e-6)
    close(inverted_softmax(s, bq), np.log(numbers), 1e-5)
    dual = [[0.330642, 0.071991, 0.301642], [0.232941, 0.102186, 0.212510]]
    close(dual_inverted_softmax(s, bq, bg, log=False), dual)
    other = jnp.array([[0.2, 0.9, 0.3]])
    close(dynamic_inverted_softmax(jnp.concatenate([s, other]), bq, log=False)[2], other[0], 1e-15)
    close(dynamic_inverted_softmax(s, bq, log=False), numbers, 2e-6)


def test_worked_numbers_in_logarithms(x64):
    s, b, g = (jnp.asarray(a) for a in (S2, B2, G2))
    expected = [[7.981850, -2.018150], [3.981850, -3.018150], [-6.018150, -6.018150]]
    y = inverted_softmax(s, b)
    close(y, expected)
    dynamic = dynamic_inverted_softmax(s, b)
    close(dynamic[0], s[0], 1e-15)
    close(dynamic[1:], y[1:], 1e-15)
    close(
        dual_inverted_softmax(s, b, g),
        [[-0.944566, -1.557692], [-1.645069, -1.732817], [-3.396325, -2.258194]],
    )
    both = dual_inverted_softmax(s, b, g, dynamic=True)  # only item 1 is active in B, both items in G
    gallery = 3 * s - np.log(np.exp(3 * np.asarray(g)).sum(0))
    close(both[0], jnp.log(s[0]) + gallery[0], 1e-12)
    close(both[1:], dual_inverted_softmax(s, b, g)[1:], 1e-12)
    close(jnp.exp(both), dual_inverted_softmax(s, b, g, dynamic=True, log=False), 1e-12)
    flipped = dual_inverted_softmax(-s, b, g, dynamic=True, floor=1e-3)
    assert jnp.all(jnp.isfinite(flipped))


def test_dynamic_k(x64):
    s, b = jnp.asarray(SIMILARITIES), jnp.asarray(BANK)
    for k in (1, 2, 5):
        hubs = set(np.argsort(-BANK, axis=1, kind="stable")[:, :k].ravel().tolist())
        expected = np.where(
            np.isin(SIMILARITIES.argmax(1), list(hubs))[:, None], inverted_softmax(s, b), SIMILARITIES
        )
        close(dynamic_inverted_softmax(s, b, k=k), expected, 1e-12)
    active = dynamic_inverted_softmax(s, b[:1])
    top = BANK[0].argmax()
    rows = SIMILARITIES.argmax(1) == top
    close(active, np.where(rows[:, None], inverted_softmax(s, b[:1]), SIMILARITIES), 1e-12)


@every_form
@both_logs
def test_gradients(form, log, x64):
    f = lambda s, b, g: FORMS[form](s, b, g, log=log)
    args = tuple(jnp.asarray(a) for a in (np.exp(SIMILARITIES), BANK, OTHER))
    check_grads(jax.jit(f), args, 1)


def test_gradient_of_beta(x64):
    s, b = jnp.asarray(SIMILARITIES), jnp.asarray(BANK).at[1, 2].set(jnp.nan).at[3, 1].set(-jnp.inf)
    where = ~jnp.isnan(b)
    check_grads(lambda beta: inverted_softmax(s, b, beta=beta, bank_where=where), (1.3,), 1)
    check_grads(
        lambda q, g: dual_inverted_softmax(
            s, jnp.asarray(BANK), jnp.asarray(OTHER), query_beta=q, gallery_beta=g
        ),
        (0.7, 2.0),
        1,
    )


@every_form
def test_streamed_bank(form, x64):
    rng = np.random.default_rng(1)
    gallery, items, others = (jnp.asarray(rng.normal(size=(n, 3))) for n in (5, 7, 6))
    s = jnp.exp(jnp.asarray(SIMILARITIES))
    where = jnp.asarray(rng.random(7) < 0.7)
    options = dict(bank_where=where) if "dual" not in form else dict(query_bank_where=where)

    def streamed(gallery, items, others):
        bank = [
            jaxsoft.linear_logits(gallery, x, transpose_weight=True, block_size=2) for x in (items, others)
        ]
        return FORMS[form](s, *bank, bank_axis=1, **options)

    def dense(gallery, items, others, bank_axis=1):
        bank = [gallery @ x.T for x in (items, others)]
        return FORMS[form](s, *bank, bank_axis=1, **options)

    args = gallery, items, others
    close(jax.jit(streamed)(*args), dense(*args), 1e-12)
    turned = [x @ gallery.T for x in (items, others)]
    name = next(iter(options))
    close(FORMS[form](s, *turned, **{name: where[:, None]}), dense(*args), 1e-12)
    c = jnp.asarray(rng.normal(size=s.shape))
    a, b = (jax.grad(lambda *a: jnp.vdot(c, f(*a)), (0, 1, 2))(*args) for f in (streamed, dense))
    for u, v in zip(a, b):
        close(u, v, 1e-12)


def test_streamed_bank_with_bias_and_softcap(x64):
    rng = np.random.default_rng(2)
    gallery, items, bias = (jnp.asarray(rng.normal(size=n)) for n in ((5, 3), (3, 7), 7))
    s = jnp.asarray(SIMILARITIES)
    bank = jaxsoft.softcap(jaxsoft.linear_logits(gallery, items, bias=bias, block_size=3), 2.0)
    dense = 2 * jnp.tanh((gallery @ items + bias) / 2)
    close(dynamic_inverted_softmax(s, bank, bank_axis=1), dynamic_inverted_softmax(s, dense.T), 1e-12)
    with pytest.raises(ValueError, match="the bank's temperature must be a scalar"):
        dynamic_inverted_softmax(s, jaxsoft.temperature(bank, jnp.arange(1.0, 6.0)), bank_axis=1)


@every_form
@both_logs
def test_absent_entries(form, log):
    s, b, g = (jnp.asarray(a, jnp.float32) for a in (np.exp(SIMILARITIES), BANK, OTHER))
    where = jnp.ones(s.shape, bool).at[0, 3].set(False).at[2].set(False)
    bank_where = jnp.ones(b.shape, bool).at[4].set(False)
    names = ("query_bank_where",) if "dual" in form else ("bank_where",)

    def f(s, b, where, **o):
        y = FORMS[form](s, b, g, where=where, log=log, **o)
        finite = jnp.isfinite(jax.lax.stop_gradient(y))
        return jnp.where(finite, y * jnp.arange(1.0, 6.0), 0).sum(), y

    run = jax.value_and_grad(f, (0, 1), has_aux=True)
    dirty = jnp.where(where, s, jnp.nan), b.at[4].set(jnp.nan)
    (_, y), (ds, db) = run(*dirty, where, **dict.fromkeys(names, bank_where))
    (_, other), (hs, hb) = run(s, jnp.delete(b, 4, axis=0), where)
    close(y, other)
    close(ds, hs)
    close(jnp.delete(db, 4, axis=0), hb)
    close(db[4], 0, 0)
    absent = -jnp.inf if log else 0.0
    assert y[0, 3] == absent and jnp.all(y[2] == absent)
    close(ds[2], 0, 0)
    assert not jnp.any(jnp.isnan(y))


def test_an_empty_bank():
    empty = jnp.zeros(BANK.shape, bool)
    s, b = jnp.asarray(SIMILARITIES), jnp.asarray(BANK)
    assert jnp.all(jnp.isneginf(inverted_softmax(s, b, bank_where=empty)))
    g = jax.grad(lambda s, b: inverted_softmax(s, b, bank_where=empty, log=False).sum(), (0, 1))(s, b)
    close(jnp.concatenate(g), 0, 0)
    close(dynamic_inverted_softmax(s, b, bank_where=empty), s, 0)  # nothing is active
    one = empty.at[:, 2].set(True)  # only item 2 has a bank
    y = inverted_softmax(s, b, bank_where=one)
    assert jnp.all(jnp.isneginf(y[:, 0])) and jnp.all(jnp.isfinite(y[:, 2]))


@every_form
def test_jit_vmap_and_dtypes(form):
    s, b, g = (jnp.asarray(a, jnp.float32) for a in (np.exp(SIMILARITIES), BANK, OTHER))
    f = FORMS[form]
    close(jax.jit(f)(s, b, g), f(s, b, g))
    close(jax.vmap(lambda s: f(s, b, g))(s), f(s, b, g))
    close(f(s.reshape(2, 2, 5), b, g).reshape(4, 5), f(s, b, g))
    low = f(*(a.astype(jnp.bfloat16) for a in (s, b, g)))
    high = f(*(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (s, b, g)))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), high, rtol=4e-3)
    with float64():
        assert f(*(jnp.asarray(a) for a in (SIMILARITIES, BANK, OTHER))).dtype == jnp.float64


def test_large_similarities_do_not_overflow():
    s, b = jnp.asarray(1e4 * S, jnp.float32), jnp.asarray(1e4 * BQ, jnp.float32)
    y = inverted_softmax(s, b, beta=1.0)
    close(y, s - np.maximum.reduce(np.asarray(b)), 1e-2)


BAD = [
    (
        lambda: inverted_softmax(S, BQ[:, :2]),
        ValueError,
        r"bank must have shape \(bank, 3\) with bank_axis=0",
    ),
    (lambda: inverted_softmax(S, BQ, bank_axis=1), ValueError, r"bank must have shape \(3, bank\)"),
    (lambda: inverted_softmax(S, BQ, bank_axis=2), ValueError, "bank_axis must be one of"),
    (lambda: inverted_softmax(S, BQ, beta=0.0), ValueError, "beta must be a number > 0"),
    (
        lambda: inverted_softmax(S, jnp.ones((2, 3), int)),
        TypeError,
        "bank must be an array of floating dtype",
    ),
    (
        lambda: inverted_softmax(S, jaxsoft.linear_logits(jnp.ones((2, 4)), jnp.ones((4, 3)))),
        ValueError,
        "pass bank_axis=1",
    ),
    (
        lambda: inverted_softmax(jaxsoft.linear_logits(jnp.ones((2, 4)), jnp.ones((4, 3))), BQ),
        TypeError,
        r"dense\(\)",
    ),
    (lambda: inverted_softmax(S, BQ, where=jnp.ones(2, bool)), ValueError, "where must broadcast"),
    (lambda: inverted_softmax(S, BQ, bank_where=jnp.ones(2, bool)), ValueError, "bank_where must broadcast"),
    (lambda: dynamic_inverted_softmax(S, BQ, k=0), ValueError, "k must be a static integer >= 1"),
    (lambda: dual_inverted_softmax(S, BQ, BG[:, :2]), ValueError, "gallery_bank must have shape"),
    (
        lambda: dual_inverted_softmax(S, BQ, BG, query_beta=-1.0),
        ValueError,
        "query_beta must be a number > 0",
    ),
    (lambda: dual_inverted_softmax(S, BQ, BG, floor=0.0), ValueError, "floor must be a number > 0"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
