"""Attention in the TPU's kernels, interpreted, against XLA: every normalizer, every option, all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.test_dot_product import NORMALIZERS, B, H, K, N, S, T, W, causal, stored
from kernels.compare import close, run, same

import jaxsoft
from jaxsoft import kernels
from jaxsoft.attention import (
    _sweeps,
    decode_attention,
    dot_product_attention,
    merge_partial_attention,
    partial_attention,
)
from jaxsoft.attention._arguments import prepare
from jaxsoft.attention._visibility import visible

SMALL = dict(rows=4, columns=3)  # queries and keys of a block; ragged at both ends
STREAMED = [name for name in NORMALIZERS if "," not in name]  # with options that make another program or not
# Their statistics take many passes, which take about ten seconds to compile.
SLOW = ("sparsemax", "entmax15", "entmax", "entropy_target_softmax")


def make(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = dict(q=(B, T, N, H), k=(B, S, K, H), v=(B, S, K, W))
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def attend(p, implementation, **options):
    return dot_product_attention(p["q"], p["k"], p["v"], implementation=implementation, **options)


@pytest.mark.table
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in STREAMED])
def test_every_normalizer(name):
    """The same with stored scores. Causal, so that some queries see few keys or one; heads share keys."""
    keep = jnp.asarray(causal())

    def f(p, implementation):
        if implementation == "xla":
            return stored(p["q"], p["k"], p["v"], keep, normalizer=NORMALIZERS[name])
        return attend(p, implementation, normalizer=NORMALIZERS[name], is_causal=True)

    same(f, make(), 64 if name == "entropy_target_softmax" else 16, **SMALL)  # where an iteration stops


@pytest.mark.parametrize("heads", [N, K])
def test_heads_are_read_where_they_lie(heads):
    """The way into blocks and back is no copy of keys and values, nor of queries with a head of keys each."""

    def operands(q, k, v):
        rows, _ = prepare(q, k, v, None, None, block_sizes=(4, 3))
        scores = _sweeps._scores(rows.spec, rows.inputs)
        value = _sweeps._operands(rows.spec, rows.inputs, rows.masks, []).cols["value"]
        left = scores.left if heads == N else None
        return [a.reshape(*a.shape[:2], -1) for a in (left, scores.right, value) if a is not None]

    shapes = (B, 8, N, 128), (B, 9, heads, 128), (B, 9, heads, 64)
    text = (
        jax.jit(operands).lower(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)).compile().as_text()
    )
    assert "transpose" not in text and "fusion(" not in text


def floats(rng):
    return dict(
        bias=jnp.asarray(rng.normal(size=(1, N, T, S)), jnp.float32),
        alibi_slopes=jnp.asarray(rng.random(N), jnp.float32),
        sinks=jnp.asarray(rng.normal(size=N), jnp.float32),
        scale=jnp.asarray(0.3 + rng.random(N), jnp.float32),
    )


def even(q, k):
    return (q + k) % 2 == 0


def masks(rng):
    """Every kind of mask that is known at run time only."""
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (B, max(T, S))), axis=1))
    return dict(
        mask=jnp.asarray(rng.random((B, 1, T, S)) < 0.8),
        query_seq_lengths=jnp.asarray([9, T]),
        key_value_seq_lengths=jnp.asarray([S, 4]),
        query_segment_ids=segments[:, :T],
        key_segment_ids=segments[:, :S],
    )


DROPOUT = dict(dropout_rate=0.3, dropout_key=jax.random.key(1))
OPTIONS = {
    "arrays, dropout": lambda rng: (floats(rng), dict(softcap=2.0, **DROPOUT)),
    "masks": lambda rng: ({}, masks(rng)),
    "static": lambda rng: ({}, dict(local_window_size=(4, 1), mask_fn=even, query_offset=-1)),
    "positions": lambda rng: (
        {},
        dict(
            is_causal=True,
            query_positions=jnp.asarray(rng.permutation(T)),
            key_positions=jnp.asarray([rng.permutation(S) for _ in range(B)]),
            query_seq_lengths=jnp.asarray([9, T]),
            **DROPOUT,
        ),
    ),
    "offsets, bias of keys": lambda rng: (
        dict(bias=jnp.asarray(rng.normal(size=(B, 1, 1, S)), jnp.float32)),
        dict(is_causal=True, query_offset=jnp.asarray([1, -3])),
    ),
}


@pytest.mark.table
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    """With the gradients of bias, slopes, sinks and scale; queries that see nothing; dropout of the same weights."""
    arrays, options = OPTIONS[name](np.random.default_rng(3))
    point = make(3)
    if name == "masks":  # entries beyond the lengths are not read
        point = dict(
            q=point["q"].at[0, 9:].set(jnp.nan),
            k=point["k"].at[1, 4:].set(jnp.nan),
            v=point["v"].at[1, 4:].set(jnp.nan),
        )

    def f(p, implementation):
        return attend(p, implementation, **{k: p[k] for k in arrays}, **options)

    # The gradient of a number of a head is a sum of hundreds of terms of either sign.
    out, gradients = same(f, point | arrays, 64 if "arrays" in name else 16, **SMALL)
    for gradient in (out, *gradients.values()):
        assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient != 0)


def test_statistics():
    def f(p, implementation):
        return attend(p, implementation, is_causal=True, return_statistics=True)

    same(f, make(5), 16, **SMALL)


def test_half_precision():
    """The products read and write bfloat16: the gradient of a score is rounded to it before it is multiplied."""

    def f(p, implementation):
        return attend(p, implementation, is_causal=True)

    p = make(6, jnp.bfloat16)
    (out, gradients), (expected, others) = (run(f, p, name, **SMALL) for name in ("pallas_tpu", "xla"))
    close(out, expected, 1)
    close(gradients, others, 2)


def test_parts_and_caches():
    """`partial_attention` and `decode_attention` take `implementation=`, too."""
    lengths = jnp.asarray([5, 10])

    def f(p, implementation):
        q, k, v = (p[name] for name in ("q", "k", "v"))
        how = dict(implementation=implementation)
        parts = [
            partial_attention(q, k[:, a:b], v[:, a:b], key_offset=a, is_causal=True, **how)
            for a, b in ((0, 6), (6, S))
        ]
        decode = functools.partial(decode_attention, q[:, :2], k[:, :10], v[:, :10], lengths, **how)
        return merge_partial_attention(*parts).output(), decode(), decode(splits=2), decode(unified_max=1.0)

    with kernels.interpreted(), kernels.block_sizes(**SMALL):
        got = jax.jit(lambda p: f(p, "pallas_tpu"))(make(7))
    close(got, jax.jit(lambda p: f(p, "xla"))(make(7)), 16)


def test_chosen_kernels_are_named():
    def f(p):
        return attend(p, "pallas_tpu", normalizer=jaxsoft.clipped_softmax)

    with kernels.interpreted():
        decisions = kernels.explain(f, make())
    assert decisions and {d.implementation for d in decisions} == {"pallas_tpu"}


MASKED_AT_RUN_TIME = {
    "lengths": dict(key_value_seq_lengths=jnp.array([30, 20]), query_seq_lengths=jnp.array([25, 20])),
    "causal lengths": dict(is_causal=True, key_value_seq_lengths=jnp.array([30, 20])),
    "segments": dict(
        query_segment_ids=jnp.tile(jnp.arange(48) // 16, (2, 1)),
        key_segment_ids=jnp.tile(jnp.arange(57) // 16, (2, 1)),
    ),
    "predicate": dict(mask_fn=lambda q, k: q // 16 == k // 16),
    "array": dict(mask=jnp.arange(48)[:, None] // 16 >= jnp.arange(57) // 16),
    "offset": dict(is_causal=True, query_offset=jnp.int32(3)),
    "positions": dict(
        is_causal=True,
        query_positions=jnp.concatenate([jnp.arange(16), jnp.arange(32, 64)]),
        key_positions=jnp.arange(57) // 16 * -16 + jnp.arange(57) % 16 + 48,
    ),
    "offsets": dict(local_window_size=(3, 2), query_offset=jnp.array([3, 9])),
}


@pytest.mark.parametrize("name", MASKED_AT_RUN_TIME)
def test_tiles_hidden_by_runtime_masks_are_skipped(name):
    """The tables of tiles to be visited have those in which a query of the sequence sees a key, and no others."""
    options = dict(MASKED_AT_RUN_TIME[name])
    query, key = jnp.ones((2, 48, 4, 16)), jnp.ones((2, 57, 2, 16))
    rows, _ = prepare(
        query,
        key,
        key,
        None,
        options.pop("mask", None),
        implementation="pallas_tpu",
        block_sizes=(16, 16),
        **options,
    )
    spec = rows.spec
    seen = _sweeps._operands(spec, rows.inputs, rows.masks, []).seen
    assert len(seen) == (2 if name in ("lengths", "causal lengths", "segments", "offsets") else 1)
    for i, j in np.ndindex(spec.nq, spec.nk):
        expected = jnp.any(visible(spec, rows.masks, i, j), axis=(1, 2, 3, 4))
        np.testing.assert_array_equal(seen[:, i, j], expected)
