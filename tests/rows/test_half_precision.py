"""Gradients in bfloat16 that add up over hundreds of chunks or blocks: their sums are in float32.

All terms of a sum are alike: in bfloat16 it would stop growing at its 256th term.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft import attention, losses
from jaxsoft.rows import reduce_rows, reductions

MANY, FEW = 1024, 3
RNG = np.random.default_rng(0)


def alike(*shape):
    return 1 + 0.1 * RNG.random(shape)


def logits_of(p, **options):
    fields = {name: p[name] for name in ("bias", "scale", "temperature")}
    return jaxsoft.linear_logits(p["hidden"], p["weight"], **fields, **options)


def head(rows, columns):
    numbers = dict(scale=np.array(0.7), temperature=np.array(1.5))
    return dict(hidden=alike(rows, 2), weight=alike(2, columns), bias=alike(columns), **numbers)


def chunks(p):
    """The gradient of the forward pass, a row at a time."""
    options = dict(class_weights=p["class_weights"], z_loss=0.5, label_smoothing=0.1)
    labels = jnp.zeros(MANY, jnp.int32)
    return losses.weighted_sum(losses.cross_entropy, logits_of(p), labels, chunk_size=1, **options)


def blocks(p):
    """A column at a time; a number per row of a reduction, too."""
    wanted = dict(a=reductions.logsumexp(), b=reductions.mapped_sum(_shifted, p["shift"]))
    out = reduce_rows(logits_of(p, block_size=1), wanted)
    return jnp.sum(out["a"]) + jnp.sum(out["b"])


def _shifted(x, cols, shift):
    return 0.1 * (x + shift) ** 2


def attend(p, **options):
    """A query and a key at a time."""
    out = attention.dot_product_attention(p["q"], p["k"], p["v"], block_sizes=(1, 1), **options)
    return jnp.sum(out.astype(jnp.float32))


def linear(p, **options):
    out = attention.linear_attention(p["q"], p["k"], p["v"], block_size=1, **options)
    return jnp.sum(out.astype(jnp.float32))


def qkv(queries, keys, sign=1):
    """With `sign` -1 the keys and values alternate, so that no difference of values from their mean cancels."""
    signs = sign ** np.arange(keys)[:, None, None]
    return dict(q=alike(1, queries, 1, 2), k=signs * alike(1, keys, 1, 2), v=signs * alike(1, keys, 1, 2))


SUMS = functools.partial(attend, normalizer=jaxsoft.sigmoid_weights)
CASES = {
    "chunks": (chunks, head(MANY, FEW) | dict(class_weights=alike(FEW))),
    "blocks": (blocks, head(FEW, MANY) | dict(shift=alike(FEW))),
    "attention of many queries": (attend, qkv(MANY, FEW + 1, -1)),
    "attention to many keys": (attend, qkv(FEW, MANY, -1)),
    "sums over many keys": (SUMS, qkv(FEW, MANY)),
    "linear attention": (functools.partial(linear, is_causal=True), qkv(MANY, MANY)),
}


@pytest.mark.whole  # the cases are loops
@pytest.mark.parametrize("name", CASES)
def test_gradients_add_up_in_float32(name):
    f, arrays = CASES[name]
    low = {k: jnp.asarray(a, jnp.bfloat16) for k, a in arrays.items()}
    high = {k: a.astype(jnp.float32) for k, a in low.items()}
    program = jax.jit(jax.grad(f))
    got, expected = program(low), program(high)
    for k, a in expected.items():
        assert got[k].dtype == jnp.bfloat16
        scale = np.max(np.abs(a))
        np.testing.assert_allclose(got[k].astype(jnp.float32) / scale, a / scale, atol=2**-6, err_msg=k)
