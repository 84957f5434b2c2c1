"""Bodies of sweeps respect `Block.inside` for any tile: here one larger than the scores, with NaN beyond them."""

import jax
import jax.numpy as jnp
import pytest
from helpers import trees_close

import jaxsoft
import jaxsoft.kernels.tpu
from jaxsoft.kernels._sweep import Block, Out, Result, apart


def one_tile(kernel, body, scores, operands, init, plan):
    """A sweep whose only tile per matrix reaches 3 rows and 5 columns beyond the last."""
    g, n, s = scores.shape
    beyond = {"r": (0, 3), "c": (0, 5), "k": (0, 0)}

    def padded(kinds, **how):
        def pad(a):
            a = jnp.pad(apart(a), [(0, 0), *(beyond[k] for k in kinds[: a.ndim - 1])], **how)
            return jnp.broadcast_to(a, (g, *a.shape[1:]))

        return pad

    if scores.values is None:
        left, right = padded("rk")(scores.left), padded("ck" if scores.transposed else "kc")(scores.right)
        raw = jnp.einsum("grk,gck->grc" if scores.transposed else "grk,gkc->grc", left, right)
    else:
        left, right, raw = None, None, padded("rc")(scores.values)
    row, col = (jax.lax.broadcasted_iota(jnp.int32, raw.shape[1:], axis) for axis in (0, 1))
    inside = (row < n) & (col < s)

    def garbage(a):
        return jnp.where(inside, a, jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 1)

    rows = jax.tree.map(padded("rk", mode="edge"), operands.rows)
    cols = jax.tree.map(padded("ck", mode="edge"), operands.cols)
    entries = jax.tree.map(lambda a: garbage(padded("rc")(a)), operands.entries)
    own, axis, size = (rows, 0, n) if plan.over == "columns" else (cols, 1, s)

    def visit(raw, rows, cols, entries, left, right, own, batch):
        block = Block(raw, rows, cols, entries, row, col + operands.start, batch, inside, left, right)
        return Out(*body(block, init(own, jnp.zeros(raw.shape[axis], jnp.float32))))

    out = jax.vmap(visit)(
        garbage(raw.astype(jnp.float32)), rows, cols, entries, left, right, own, jnp.arange(g)
    )
    return Result(
        jax.tree.map(lambda a: a[None, :, :size], out.carry),
        jax.tree.map(lambda a: a[:, :n, :s], out.entries),
        jax.tree.map(lambda a: a[:, None, :s], out.cols),
    )


@pytest.fixture(autouse=True)
def one_tile_only(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(jaxsoft.kernels.tpu, "sweep", one_tile)
    yield
    jax.clear_caches()


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def compare(f, *arrays):
    """`f(*arrays, implementation)` and its gradients, by `one_tile` and by XLA."""
    value_and_grad = jax.value_and_grad(f, tuple(range(len(arrays))))
    with jaxsoft.kernels.interpreted():
        got = value_and_grad(*arrays, "pallas_tpu")
    trees_close(got, value_and_grad(*arrays, "xla"), 1e-4)


def test_rows():
    keep = normal(2, 6, 9) > -1

    def f(h, w, implementation):
        logits = jaxsoft.linear_logits(h, w, softcap=3.0, implementation=implementation)
        return jnp.sum(
            jnp.sin(
                jaxsoft.losses.cross_entropy(logits, jnp.arange(6), where=keep | jnp.eye(6, 9, dtype=bool))
            )
        )

    compare(f, normal(0, 6, 4), normal(1, 4, 9))


def test_attention():
    mask = normal(4, 6, 8) > -1

    def f(q, k, v, bias, implementation):
        out = jaxsoft.attention.dot_product_attention(
            q, k, v, bias, mask, softcap=3.0, implementation=implementation
        )
        return jnp.sum(jnp.sin(out))

    compare(f, normal(0, 1, 6, 2, 4), normal(1, 1, 8, 1, 4), normal(2, 1, 8, 1, 4), normal(3, 2, 6, 8))
