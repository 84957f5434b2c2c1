"""A sweep of the TPU's kernels by itself: what it brings in and out, in both orders, with NaN beyond the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernels.compare import close

from jaxsoft.kernels import tpu
from jaxsoft.kernels._sweep import Operands, Out, Plan, Scores, Tiles
from jaxsoft.kernels.inner import Kernel
from jaxsoft.kernels.tpu import _sweep

G, N, S, D, K = 2, 6, 11, 5, 3
FULL = 128  # features that may lie beside those of another matrix, as they fill vector registers
TILES = Tiles(4, 4)  # ragged both ways: 6 = 4 + 2, 11 = 4 + 4 + 3
START = 7
SEEN = np.ones((G, 2, 3), bool)  # which tiles have something to do, if they are not all the same
SEEN[0, 1, 0] = SEEN[1, 0] = False


def test_the_interpreter_fills_what_is_beyond_with_nan():
    """Else the tests of ragged sizes would prove nothing."""

    def count(x_ref, out_ref):
        out_ref[...] = jnp.full((1, 1), jnp.sum(jnp.isnan(x_ref[...])), jnp.int32)

    counts = pl.pallas_call(
        count,
        grid=(2, 3),
        in_specs=[pl.BlockSpec((4, 4), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((1, 1), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((2, 3), jnp.int32),
        interpret=True,
    )(jnp.zeros((N, S)))
    np.testing.assert_array_equal(counts, [[0, 0, 4], [8, 8, 10]])


def live(i, j, rows, columns):
    """All tiles but one in the middle."""
    del rows, columns
    return (i != 0) | (j != 1)


def the_case(kind):
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(0.5 + rng.random(shape), jnp.float32)

    if kind == "stored":
        scores = Scores(values=array(G, N, S))
    elif kind == "product":
        scores = Scores(None, array(G, N, D), array(1, D, S))
    elif kind == "transposed product":
        scores = Scores(None, array(G, N, D), array(G, S, D), True)
    else:
        scores = Scores(None, array(1, N, G, FULL), array(1, S, G, FULL), True)
    operands = Operands(
        {"a": array(G, N), "wide": array(1, N, K)}, {"b": array(1, S), "wide": array(G, S, K)}, array(1, N, S)
    )
    if kind == "side by side":  # the features of these are too few: they are brought apart
        operands.cols["wide"] = array(1, S, G, K)
    return scores, operands._replace(
        start=jnp.int32(START), seen=jnp.asarray(SEEN) if kind == "side by side" else None
    )


def terms(x, rows, cols, entries):
    """Of a tile or of everything: something of each operand, which divides by what there is of rows and columns."""
    x = jnp.where(entries > 0.7, x, 0) / rows["a"][..., None] + entries / cols["b"][..., None, :]
    return (
        x,
        jnp.einsum("...ij,...jk->...ik", x, cols["wide"]),
        jnp.einsum("...ij,...ik->...jk", x, rows["wide"]),
    )


def expected(scores, operands, over, plan):
    raw, left = scores.values, scores.left
    if raw is None and left.ndim == 4:
        raw = jnp.einsum("bngd,bsgd->gns", left, scores.right)
        wide = jnp.swapaxes(operands.cols["wide"][0], 0, 1)
        operands = operands._replace(cols={**operands.cols, "wide": wide})
    elif raw is None:
        right = scores.right if not scores.transposed else jnp.swapaxes(scores.right, 1, 2)
        raw = jnp.einsum("gnd,gds->gns", left, jnp.broadcast_to(right, (G, D, S)))
    everything = Operands(*jax.tree.map(lambda a: jnp.broadcast_to(a, (G, *a.shape[1:])), operands[:3]))
    x, *_ = terms(raw, *everything[:3])
    row, col = np.arange(N)[:, None], np.arange(S)
    keep = np.ones((N, S), bool) if plan.live is None else np.asarray(live(row // 4, col // 4, 4, 4))
    keep = keep & (True if operands.seen is None else SEEN[:, row // 4, col // 4])
    x = jnp.where(keep, x, 0)
    seen = jnp.where(keep, col + START, 0) * jnp.ones((G, 1, 1), jnp.int32)
    blocks = [x[:, :4], x[:, 4:]]
    if over == "columns":
        carry = (jnp.sum(x, 2)[None], (x @ everything.cols["wide"])[None])
    else:
        carry = (jnp.sum(x, 1)[None], (jnp.swapaxes(x, 1, 2) @ everything.rows["wide"])[None])
    wide = [jnp.swapaxes(b, 1, 2) @ w for b, w in zip(blocks, np.split(everything.rows["wide"], [4], axis=1))]
    return carry, (x, seen), (jnp.stack([b.sum(1) for b in blocks], 1), jnp.stack(wide, 1))


@pytest.mark.parametrize("over", ["columns", "rows"])
@pytest.mark.parametrize(
    "kind, skips, interpret",
    [
        ("stored", True, True),
        ("product", False, True),
        ("transposed product", False, True),
        ("side by side", False, True),
        (
            "stored",
            False,
            pltpu.InterpretParams(),
        ),  # simulates the TPU's memories; raises where one is overrun
    ],
)
def test_sweep(kind, skips, interpret, over):
    scores, operands = the_case(kind)
    plan = Plan(over, (jnp.float32, jnp.int32), live if skips else None, TILES)

    def init(own, like):
        assert set(own) == ({"a", "wide"} if over == "columns" else {"b", "wide"})
        return like, jnp.broadcast_to(like[:, None], (*like.shape, K))

    def body(block, carry):
        raw, entries = (jnp.where(block.inside, a, 1) for a in (block.raw, block.entries))
        x, *_ = terms(raw, block.rows, block.cols, entries)
        x = jnp.where(block.inside, x, 0)
        along_rows = jnp.sum(x, 1), x @ block.cols["wide"]
        along_cols = jnp.sum(x, 0), x.T @ block.rows["wide"]
        new = jax.tree.map(jnp.add, carry, along_rows if over == "columns" else along_cols)
        return Out(new, (x, block.col), along_cols)

    kernel = Kernel("pallas_tpu", interpret, "")
    assert tpu.refusal(kernel, body, scores, operands, init, plan) is None
    result = tpu.sweep(kernel, body, scores, operands, init, plan)
    carry, entries, cols = expected(scores, operands, over, plan)
    close(result, result._replace(carry=carry, entries=entries, cols=cols))


def test_tables_of_tiles_fit_into_scalar_memory():
    """A bit for each tile, of each matrix if there is room, else of all."""
    rng = np.random.default_rng(0)
    for shape, tables in (((2, 3, 45), 2), ((8, 300, 1280), 1), ((1, 2000, 2000), 0)):
        seen = rng.random(shape) < 0.4
        bits = _sweep._bits(jnp.asarray(seen))
        if not tables:
            assert bits is None
            continue
        tile = np.arange(shape[2])
        got = (np.asarray(bits)[:, :, tile // 32] >> (tile % 32)) & 1
        np.testing.assert_array_equal(got, seen if tables == shape[0] else seen.any(0, keepdims=True))


def test_a_table_of_more_tiles_than_a_word_has_bits():
    """70 tiles along the columns: three words of bits, the sign bits among them."""
    rng = np.random.default_rng(1)
    x, seen = rng.normal(size=(1, 2, 70)), rng.random((1, 2, 70)) < 0.5
    seen[:, :, 31:33] = seen[:, 0, 63:65] = True
    operands = Operands({}, {}, None, jnp.int32(0), jnp.asarray(seen))

    def body(block, carry):
        return Out((carry[0] + jnp.sum(block.raw, 1),), (), ())

    plan = Plan("columns", (), None, Tiles(1, 1))
    kernel = Kernel("pallas_tpu", True, "")
    scores = Scores(values=jnp.asarray(x, jnp.float32))
    result = tpu.sweep(kernel, body, scores, operands, lambda own, like: (like,), plan)
    np.testing.assert_allclose(result.carry[0][0], np.sum(x * seen, -1), rtol=1e-5)
