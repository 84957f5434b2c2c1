"""Blocks of keys without weight: the same values and derivatives of every order, and fewer blocks that are read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.attention import _pass, dot_product_attention
from jaxsoft.attention._arguments import prepare
from jaxsoft.attention._rows import AttentionRows
from jaxsoft.attention._survey import LARGEST, MOST_BLOCKS
from jaxsoft.attention._weights import last_pass
from jaxsoft.normalizers import sparse
from jaxsoft.rows import Tile

CLUSTERS, SIZE, HEADS, WIDTH = 4, 8, 2, 6
SHIFT = -4.0  # added to the scores, so that those between clusters are negative
NORMALIZERS = {
    "sparsemax": jaxsoft.sparsemax,
    "relu_weights": functools.partial(jaxsoft.relu_weights, power=2.0),
    "sparse_softmax": functools.partial(jaxsoft.sparse_softmax, k=3),
}


def _inputs(clusters: int = CLUSTERS) -> tuple:
    """Queries that are close to the keys of their own cluster, and two heads of queries per head of keys."""
    rng = np.random.default_rng(0)
    centre = 6 * np.repeat(np.eye(WIDTH)[:clusters], SIZE, axis=0)[None, :, None]
    q, k, v, w = (rng.standard_normal((1, clusters * SIZE, h, WIDTH)) for h in (HEADS, 1, 1, HEADS))
    return tuple(map(jnp.asarray, (0.3 * q + centre, 0.3 * k + centre, v, w)))


def _attention(normalizer, q, k, v, **options):
    return dot_product_attention(
        q, k, v, jnp.full((1, 1, 1, 1), SHIFT), normalizer=normalizer, block_sizes=(SIZE, SIZE), **options
    )


def _plain(normalizer, q, k, v):
    scores = jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / np.sqrt(WIDTH) + SHIFT
    return jnp.einsum("bhts,bsd->bthd", normalizer(scores), v[:, :, 0])


def _derivatives(attention, w):
    """Value, gradient, and the gradient's derivative along a direction (forward mode over reverse mode)."""

    def loss(q, k, v):
        return jnp.sum(w * attention(q, k, v))

    def all_of_them(*x):
        along = tuple(jnp.cos(7 * a) for a in x)
        return loss(*x), jax.jvp(jax.grad(loss, (0, 1, 2)), x, along)

    return all_of_them


@pytest.mark.parametrize("name", NORMALIZERS)
def test_equals_the_plain_formula(name, x64):
    q, k, v, w = _inputs()
    f = NORMALIZERS[name]
    streamed = _derivatives(functools.partial(_attention, f), w)
    plain = _derivatives(functools.partial(_plain, f), w)
    stacked = [jnp.stack([a, 0.9 * a]) for a in (q, k, v)]
    got, expected = (jax.jit(jax.vmap(g))(*stacked) for g in (streamed, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, expected)
    assert np.max(np.abs(expected[1][1][0])) > 1e-3


@pytest.mark.parametrize("name", ["sparsemax", "relu_weights"])
def test_reads_only_the_blocks_that_count(name, monkeypatch):
    """Counts the products of a block of queries and a block of keys."""
    made, raw = [], _pass._raw

    def counted(*args):
        jax.debug.callback(lambda: made.append(1))
        return raw(*args)

    monkeypatch.setattr(_pass, "_raw", counted)
    q, k, v, w = _inputs(5)  # a length of its own: nothing compiled without the count is used

    def loss(normalizer, q, k, v):
        return jnp.sum(w * _attention(normalizer, q, k, v))

    def count(f):
        made.clear()
        jax.block_until_ready(f(NORMALIZERS[name], q, k, v))
        jax.effects_barrier()
        return len(made)

    # sparsemax: the survey; the last pass; at most two passes of the search. relu: one pass over the scores.
    # The derivative of a pass makes the products twice, for the tangents and for their transpose; sparsemax has that of
    # a step of the search as well.
    forward, backward = (25 + 3 * 5, 5 * 5) if name == "sparsemax" else (25, 2 * 5)
    assert 25 <= count(loss) <= forward
    assert count(jax.grad(loss, (1, 2, 3))) <= forward + backward


def test_a_value_that_is_not_finite_shows(x64):
    """As 0 times NaN is NaN: whether its block has weight must make no difference."""
    q, k, v, _ = _inputs()
    v = v.at[0, 3, 0, 2].set(jnp.nan).at[0, -1, 0, 4].set(jnp.inf)
    for name in ("sparsemax", "relu_weights"):
        got, expected = (f(NORMALIZERS[name], q, k, v) for f in (_attention, _plain))
        np.testing.assert_allclose(got, expected, atol=1e-9)
        assert np.isnan(got[..., 2]).all() and not np.isnan(got[..., :2]).any()


def test_other_masks_and_dropout(x64):
    """Lengths, a window and dropout; the plain formula is a single pair of blocks."""
    q, k, v, _ = _inputs()
    options = dict(
        normalizer=jaxsoft.entmax15,
        key_value_seq_lengths=jnp.array([21]),
        local_window_size=(9, 4),
        dropout_rate=0.3,
        dropout_key=jax.random.key(0),
    )
    blocks, whole = (dot_product_attention(q, k, v, block_sizes=(n, n), **options) for n in (4, 32))
    np.testing.assert_allclose(blocks, whole, atol=1e-12)


def test_more_blocks_than_a_survey_keeps(x64):
    """Groups of blocks, the last one ragged: 31 blocks of one key, two in a group."""
    q, k, v, w = (a[:, :31] for a in _inputs())
    assert MOST_BLOCKS < 31

    def loss(size, *x):
        out = dot_product_attention(*x, normalizer=jaxsoft.sparsemax, is_causal=True, block_sizes=size)
        return jnp.sum(w * out)

    blocks, whole = (
        jax.jit(jax.value_and_grad(functools.partial(loss, size), (0, 1, 2)))(q, k, v)
        for size in ((SIZE, 1), (32, 32))
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), blocks, whole)


def test_passes_of_the_search(monkeypatch):
    """Of random scores, the largest entries of a row nearly always give its threshold."""
    taken, newton = [], sparse._newton

    def counted(rows, *args):
        if isinstance(rows, AttentionRows):
            jax.debug.callback(lambda: taken.append(1))
        return newton(rows, *args)

    monkeypatch.setattr(sparse, "_newton", counted)
    x = jax.random.normal(jax.random.key(0), (1, 520, 1, 16))
    for f, most in ((jaxsoft.sparsemax, 2), (jaxsoft.entmax15, 3)):
        taken.clear()
        jax.block_until_ready(dot_product_attention(x[:, ::-1], x, x, normalizer=f))
        jax.effects_barrier()
        assert len(taken) <= most, (f, len(taken))


def test_survey():
    """Some entries, the largest among them; no other entry is larger than `others`; any widths of blocks."""
    x = np.random.default_rng(0).normal(size=(3, 700)).astype(np.float32)
    x[1, :] = -np.inf

    def state(columns):
        tile = Tile.of(jnp.asarray(x[:, columns]), jnp.arange(700)[columns], 700)
        return LARGEST.update(LARGEST.init(jnp.zeros(3)), tile)

    parts = [state(slice(a, b)) for a, b in ((0, 7), (7, 320), (320, 700))]
    kept, others = map(np.asarray, LARGEST.finalize(functools.reduce(LARGEST.merge, parts)))
    for row, values, bound in zip(x, kept, others):
        values = values[values > -np.inf]
        left = sorted(set(row[row > -np.inf]) - set(values))
        assert set(values) <= set(row)
        assert not left or left[-1] <= bound
        assert np.max(values, initial=-np.inf) == np.max(row)


def test_statistics_are_those_of_all_keys(x64):
    q, k, v, _ = _inputs()
    out, seen = _attention(jaxsoft.sparsemax, q, k, v, return_statistics=True)
    scores = jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / np.sqrt(WIDTH) + SHIFT
    np.testing.assert_allclose(seen.logsumexp, jnp.swapaxes(jax.nn.logsumexp(scores, -1), 1, 2), rtol=1e-12)
    np.testing.assert_allclose(out, _attention(jaxsoft.sparsemax, q, k, v), rtol=1e-12)


def test_a_normalizer_says_which_blocks_it_needs():
    q, k, v, _ = _inputs()
    rows, _ = prepare(q, k, v, None, None, block_sizes=(SIZE, SIZE))
    needed = rows.narrowed(last_pass(rows, jaxsoft.sparsemax).within).masks.needed
    np.testing.assert_array_equal(needed, np.eye(CLUSTERS, dtype=bool))
