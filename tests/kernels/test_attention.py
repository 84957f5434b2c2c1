"""Attention in the TPU's kernels, interpreted, against XLA: every normalizer, every option, all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.test_dot_product import NORMALIZERS
from kernels.compare import close, run, same

import jaxsoft
from jaxsoft import kernels
from jaxsoft.attention import decode_attention, dot_product_attention, merge_partial_attention, partial_attention

B, T, S, N, K, H, W = 2, 13, 11, 4, 2, 8, 5
SMALL = dict(rows=4, columns=3)  # queries and keys of a block; ragged at both ends
# Their statistics take a dozen passes, which take as many seconds to compile.
SLOW = ("sparsemax", "entmax15", "entmax", "entropy_target_softmax")


def make(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = dict(q=(B, T, N, H), k=(B, S, K, H), v=(B, S, K, W))
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def attend(p, implementation, **options):
    return dot_product_attention(p["q"], p["k"], p["v"], implementation=implementation, **options)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NORMALIZERS]
)
def test_every_normalizer(name):
    """Causal, so that some queries see few keys or one, with heads that share keys."""

    def f(p, implementation):
        return attend(p, implementation, normalizer=NORMALIZERS[name], is_causal=True)

    same(f, make(), 16, **SMALL)


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


OPTIONS = {
    "arrays": lambda rng: (floats(rng), dict(softcap=2.0)),
    "masks": lambda rng: ({}, masks(rng)),
    "window": lambda rng: ({}, dict(local_window_size=(2, 1), query_offset=-1)),
    "predicate": lambda rng: ({}, dict(mask_fn=even, is_causal=True, query_offset=3)),
    "bias of keys": lambda rng: (
        dict(bias=jnp.asarray(rng.normal(size=(B, 1, 1, S)), jnp.float32)),
        dict(is_causal=True),
    ),
    "offsets": lambda rng: ({}, dict(is_causal=True, query_offset=jnp.asarray([1, -3]))),
    "dropout": lambda rng: ({}, dict(dropout_rate=0.3, dropout_key=jax.random.key(1))),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    """With the gradients of bias, slopes, sinks and scale; queries that see nothing; dropout of the same weights."""
    arrays, options = OPTIONS[name](np.random.default_rng(3))

    def f(p, implementation):
        return attend(p, implementation, **{k: p[k] for k in arrays}, **options)

    out, gradients = same(f, make(3) | arrays, 16, **SMALL)
    for gradient in (out, *gradients.values()):
        assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient != 0)


def test_nan_that_nobody_reads():
    """Beyond the lengths; the queries that see nothing get 0."""
    p = make(4)
    p = dict(
        q=p["q"].at[1, 6:].set(jnp.nan), k=p["k"].at[0, 4:].set(jnp.nan), v=p["v"].at[0, 4:].set(jnp.nan)
    )
    lengths = dict(query_seq_lengths=jnp.asarray([13, 6]), key_value_seq_lengths=jnp.asarray([4, 11]))

    def f(p, implementation):
        return attend(p, implementation, normalizer=jaxsoft.softpick, **lengths)

    out, gradients = same(f, p, 16, **SMALL)
    assert jnp.all(jnp.isfinite(out)) and jnp.all(out[1, 6:] == 0)
    assert all(jnp.all(jnp.isfinite(g)) for g in gradients.values())
    assert jnp.all(gradients["k"][0, 4:] == 0) and jnp.all(gradients["q"][1, 6:] == 0)


def test_statistics():
    def f(p, implementation):
        _, statistics = attend(p, implementation, is_causal=True, return_statistics=True)
        _, residual = attend(p, implementation, is_causal=True, return_residual=True)
        return statistics, residual

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

    same(f, make(7), 16, **SMALL)


def test_chosen_kernels_are_named():
    def f(p):
        return attend(p, "pallas_tpu", normalizer=jaxsoft.clipped_softmax)

    with kernels.interpreted():
        decisions = kernels.explain(f, make())
    assert decisions and {d.implementation for d in decisions} == {"pallas_tpu"}
