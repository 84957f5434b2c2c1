"""Streamed attention beyond its options (`test_options.py`): derivatives, transforms, dtypes, dropout, bad input."""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import normalizers as norms
from jaxsoft.attention import dot_product_attention
from jaxsoft.attention._dot_product import _Options
from jaxsoft.attention._spec import AttentionSpec

B, T, S, N, K, H, W = 2, 13, 11, 4, 2, 8, 5
partial = functools.partial

NORMALIZERS = {
    "softmax": jaxsoft.softmax,
    "softmax_one": jaxsoft.softmax_one,
    "softmax_n": partial(jaxsoft.softmax_n, n=2.5),
    "sink_softmax": partial(jaxsoft.sink_softmax, sink=0.3),
    "scalable_softmax": jaxsoft.scalable_softmax,
    "scalable_softmax, negative": partial(jaxsoft.scalable_softmax, scale=-0.7, bias=0.2),
    "adaptive_temperature_softmax": jaxsoft.adaptive_temperature_softmax,
    "entropy_target_softmax": partial(norms.entropy_target_softmax, entropy=0.7),
    "self_adjust_softmax": jaxsoft.self_adjust_softmax,
    "self_adjust_softmax, plain": partial(jaxsoft.self_adjust_softmax, normalized=False),
    "clipped_softmax": jaxsoft.clipped_softmax,
    "quantized_softmax": partial(norms.quantized_softmax, bias=0.01),
    "softpick": jaxsoft.softpick,
    "stablemax": jaxsoft.stablemax,
    "taylor_softmax": jaxsoft.taylor_softmax,
    "sigmoid_weights": jaxsoft.sigmoid_weights,
    "relu_weights": partial(jaxsoft.relu_weights, power=2.0),
    "softplus_attention_weights": partial(jaxsoft.softplus_attention_weights, scale=2.0),
    "reweighted_attention_weights": partial(jaxsoft.reweighted_attention_weights, scale=2.0, power=3.0),
    "mpc_softmax": norms.mpc_softmax,
    "sparse_softmax": partial(jaxsoft.sparse_softmax, k=3),
    "sparsemax": jaxsoft.sparsemax,
    "entmax15": jaxsoft.entmax15,
    "entmax": partial(jaxsoft.entmax, alpha=1.3),
}
STREAMS = {name for name in norms.__all__ if hasattr(getattr(norms, name), "define")}


def make(seed=0, dtype=np.float64, batch=(B,)):
    rng = np.random.default_rng(seed)
    shapes = ((*batch, T, N, H), (*batch, S, K, H), (*batch, S, K, W))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def stored(q, k, v, keep=None, *, normalizer=jaxsoft.softmax):
    """The definition: scores, weights, values; keep broadcasts to [B, N, T, S]."""
    k, v = (jnp.repeat(a, N // K, axis=-2) for a in (k, v))
    y = normalizer(H**-0.5 * jnp.einsum("...tnh,...snh->...nts", q, k), where=keep)
    return jnp.einsum("...nts,...snv->...tnv", y, v)


def compare(f, g, arguments, tolerance=1e-11, seed=9):
    """Values and gradients, with a random cotangent."""
    shape = jax.eval_shape(f, *arguments)
    ct = jnp.asarray(np.random.default_rng(seed).normal(size=shape.shape), shape.dtype)

    @jax.jit
    def both(arguments, ct):
        results = []
        for h in (f, g):
            out, pull = jax.vjp(h, *arguments)
            results.append((out, pull(ct)))
        return results

    for x, y in zip(*map(jax.tree.leaves, both(arguments, ct))):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def value_and_pullback(f, *arguments):
    """The value, and the gradient of the sum of it."""
    out, pull = jax.vjp(f, *arguments)
    return out, pull(jnp.ones_like(out))


def causal(t=T, s=S, offset=0):
    return np.arange(s)[None] <= np.arange(t)[:, None] + offset


def test_every_normalizer_that_streams_is_tested():
    tested = {getattr(f, "func", f).__name__ for f in NORMALIZERS.values()}
    assert tested | {"gumbel_softmax"} == STREAMS


@pytest.mark.parametrize("blocks", [(1, 1), (13, 11), (100, 2), (5, 100), (None, None)])
def test_blocks_change_nothing(blocks, x64):
    expected = dot_product_attention(*make(), is_causal=True)
    got = dot_product_attention(*make(), is_causal=True, block_sizes=blocks)
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


def test_batch_axes_jit_vmap_and_half_precision():
    q, k, v = make(dtype=np.float32, batch=(2, 3))
    expected = dot_product_attention(q, k, v, is_causal=True)
    f = partial(dot_product_attention, is_causal=True)
    np.testing.assert_allclose(jax.jit(f)(q, k, v), expected, atol=2e-6)
    np.testing.assert_allclose(jax.vmap(f)(q, k, v), expected, atol=2e-6)
    np.testing.assert_allclose(f(q[0, 0], k[0, 0], v[0, 0]), expected[0, 0], atol=2e-6)
    masks = dict(mask=jnp.asarray(np.random.default_rng(0).random((2, 1, 1, T, S)) < 0.7))
    masked = dot_product_attention(q, k, v, **masks)
    np.testing.assert_allclose(
        masked[1, 2], dot_product_attention(q[1, 2], k[1, 2], v[1, 2], mask=masks["mask"][1, 0]), atol=2e-6
    )
    for dtype, tolerance in ((jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)):
        half = [a.astype(dtype) for a in (q, k, v)]
        exact = stored(*(np.asarray(a, np.float64) for a in half), jnp.asarray(causal()))
        out = f(*half)
        assert out.dtype == dtype
        np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=tolerance)


@pytest.mark.table
@pytest.mark.parametrize(
    "name", ["softmax", "softpick", "self_adjust_softmax", "entmax15", "clipped_softmax"]
)
def test_forward_mode_and_second_order(name, x64):
    f = partial(dot_product_attention, normalizer=NORMALIZERS[name], is_causal=True, block_sizes=(4, 3))
    g = partial(stored, normalizer=NORMALIZERS[name])
    keep = jnp.asarray(causal())
    point, direction = make(0), make(5)

    def derivatives(h):
        def loss(*a):
            return jnp.sum(jnp.sin(h(*a)))

        return jax.jvp(loss, point, direction), jax.jvp(jax.grad(loss), point, direction)

    streamed, dense = jax.jit(lambda: (derivatives(f), derivatives(lambda *a: g(*a, keep))))()
    for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(dense)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.table
@pytest.mark.parametrize("name", NORMALIZERS)
def test_scores_of_any_size(name):
    """Scores far from 0, by a bias: values as in float64, gradients finite."""
    arguments = make(dtype=np.float32)

    def f(q, k, v, shift):
        bias = jnp.full((1, 1, 1, 1), shift, q.dtype)
        return dot_product_attention(q, k, v, bias, normalizer=NORMALIZERS[name], block_sizes=(8, 4))

    single = jax.jit(functools.partial(value_and_pullback, f))
    shifts = (-200.0, 1e4)
    outs = []
    for shift in shifts:
        out, gradient = single(*arguments, jnp.float32(shift))
        assert all(jnp.all(jnp.isfinite(d)) for d in (out, *gradient))
        outs.append(out)
    with float64():
        double = jax.jit(f)
        for out, shift in zip(outs, shifts):
            exact = double(*(jnp.asarray(np.asarray(a), jnp.float64) for a in arguments), jnp.float64(shift))
            # The scores themselves are rounded to half a unit in the last place of 1e4, 5e-4.
            np.testing.assert_allclose(out, exact, rtol=6e-3, atol=6e-3 * max(1, float(jnp.abs(exact).max())))


def _tent_terms(tile, state, params):
    below = tile.x - params["top"][..., None]
    return (jnp.where(tile.keep, jax.nn.relu(params["width"][..., None] + below), 0),)


def _tent_coefficients(state, params):
    return (1 / params["width"],)


def _tent(rows, *, width=1.0):
    params = {"top": rows.reduce(jaxsoft.rows.reductions.maximum()), "width": rows.per_row("width", width)}
    return norms.Normalizer(None, _tent_terms, _tent_coefficients, params=params)


@norms.defined_by(_tent)
def tent(scores, *, width=1.0, axis=-1, where=None):
    """A user's normalizer: weights that fall off linearly below the largest score."""
    top = jnp.max(scores, axis, where=where, initial=-jnp.inf, keepdims=True)
    kept = True if where is None else where
    return jnp.where(kept, jax.nn.relu(1 + (scores - top) / width), 0)


def test_a_normalizer_of_the_user(x64):
    keep = jnp.asarray(causal())
    normalizer = partial(tent, width=2.0)
    compare(
        lambda *a: stored(*a, keep, normalizer=normalizer),
        lambda *a: dot_product_attention(*a, normalizer=normalizer, is_causal=True, block_sizes=(4, 3)),
        make(),
    )
    with pytest.raises(TypeError, match="define must be a function"):
        norms.defined_by(3)


def test_drop_in_for_jax_nn():
    q, k, v = make(dtype=np.float32)
    rng = np.random.default_rng(2)
    bias = jnp.asarray(rng.normal(size=(B, N, T, S)), jnp.float32)
    mask = jnp.asarray(rng.random((B, 1, T, S)) < 0.8)
    calls = [
        dict(),
        dict(is_causal=True, scale=0.3),
        dict(bias=bias, mask=mask),
        dict(key_value_seq_lengths=jnp.asarray([5, 11]), query_seq_lengths=jnp.asarray([13, 2])),
        dict(local_window_size=(3, 2)),
        dict(local_window_size=4, is_causal=True),
    ]
    for options in calls:
        got = dot_product_attention(q, k, v, **options)
        expected = jax.nn.dot_product_attention(q, k, jnp.pad(v, ((0, 0),) * 3 + ((0, H - W),)), **options)
        # There a query that sees nothing gets the mean of the values; here 0.
        sees = jnp.any(got != 0, axis=-1, keepdims=True)
        np.testing.assert_allclose(got, jnp.where(sees, expected[..., :W], 0), atol=2e-6)
    _, lse = dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    _, other = jax.nn.dot_product_attention(
        q, k, jnp.pad(v, ((0, 0),) * 3 + ((0, H - W),)), is_causal=True, return_residual=True
    )
    np.testing.assert_allclose(lse, other, atol=2e-6)


def test_overloads_take_every_option():
    parameters = inspect.signature(dot_product_attention).parameters.values()
    options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    for overload in typing.get_overloads(dot_product_attention):
        typed = {p.name for p in inspect.signature(overload).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert options == typed | _Options.__annotations__.keys()


def test_dropout():
    q, k, v = make(dtype=np.float32)
    key = jax.random.key(3)
    f = partial(dot_product_attention, dropout_rate=0.4, dropout_key=key)
    out = f(q, k, v)
    for blocks in ((4, 3), (13, 11), (2, 5)):  # which weights are dropped does not depend on the blocks
        np.testing.assert_allclose(f(q, k, v, block_sizes=blocks), out, atol=3e-6)
    # The dropped weights themselves, read off values that are the identity.
    eye = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, K, S))
    y, kept = dot_product_attention(q, k, eye), f(q, k, eye)
    ratio = kept / y
    assert jnp.all(jnp.isclose(ratio, 0) | jnp.isclose(ratio, 1 / 0.6, rtol=1e-4))
    dropped = jnp.mean(jnp.isclose(ratio, 0))
    assert abs(dropped - 0.4) < 4 * np.sqrt(0.24 / ratio.size)
    assert not jnp.allclose(out, f(q, k, v, dropout_key=jax.random.key(4)))
    # Shared by batch elements and heads, and independent of blocks.
    shared = partial(f, jnp.zeros_like(q), k, eye, broadcast_dropout=True)
    dropped = shared() == 0
    assert jnp.all(dropped == dropped[:1, :, :1]) and dropped[0, :, 0].any() and not dropped.all()
    assert jnp.any(jnp.isclose(ratio, 0) != jnp.isclose(ratio, 0)[:1, :, :1])
    assert abs(jnp.mean(dropped[0, :, 0]) - 0.4) < 4 * np.sqrt(0.24 / (T * S))
    np.testing.assert_array_equal(shared(block_sizes=(4, 3)) == 0, dropped)


def test_gumbel_softmax():
    q, k, v = make(dtype=np.float32)
    f = partial(jaxsoft.gumbel_softmax, key=jax.random.key(0), temperature=0.7)
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // K, axis=2)) * H**-0.5
    for hard in (False, True):
        weights = f(scores, hard=hard)  # rows are numbered alike
        expected = jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(v, N // K, axis=2))
        for blocks in ((4, 3), (None, None)):
            got = dot_product_attention(q, k, v, normalizer=partial(f, hard=hard), block_sizes=blocks)
            np.testing.assert_allclose(got, expected, atol=3e-6)


def test_sharded_batch_and_heads():
    q, k, v = make(dtype=np.float32)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    f = partial(dot_product_attention, is_causal=True)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(f(q, k, v)))

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    for spec in (P("x"), P(None, None, "x")):
        sharded = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
        got = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(sharded(*a))), (0, 1, 2)))(q, k, v)
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, atol=3e-6)


def test_hidden_blocks_are_not_computed():
    """The static masks leave pairs of blocks off the list; the others are looked at when they are run."""
    assert len(AttentionSpec(1, 1, 1, 64, 64, 8, 8, causal=True).pairs()) == 36
    assert len(AttentionSpec(1, 1, 1, 64, 64, 8, 8, causal=True, window=(7, None)).pairs()) == 15
    assert len(AttentionSpec(1, 1, 1, 64, 64, 8, 8, window=(0, 0)).pairs()) == 8
    counted = []

    def terms(tile, state, params):
        jax.debug.callback(lambda *_: counted.append(1), tile.x[0, 0, 0, 0])
        return (tile.x,)

    def coefficients(state, params):
        return (jnp.ones((8, 1, 1, 8)),)

    q = jnp.ones((1, 64, 1, 4))
    out = dot_product_attention(
        q, q, q, normalizer=norms.Normalizer(None, terms, coefficients), mask_fn=_earlier, block_sizes=(8, 8)
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert len(counted) == 36


def temporary_memory(f, length, heads=4, dim=64):
    arrays = [jax.ShapeDtypeStruct((1, length, heads, dim), jnp.float32)] * 3
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1, 2)))
    return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory():
    """Temporary memory of the gradient: a small part of what stored scores take, and linear in the length."""
    for is_causal, length, part in ((False, 4096, 20), (True, 8192, 60)):
        ours = temporary_memory(partial(dot_product_attention, is_causal=is_causal), length)
        assert ours * part <= temporary_memory(
            partial(jax.nn.dot_product_attention, is_causal=is_causal), length
        )
    for name in ("softmax", "softpick", "entmax15"):
        f = partial(dot_product_attention, normalizer=NORMALIZERS[name])
        assert temporary_memory(f, 16384) <= 4.2 * temporary_memory(f, 4096)


def _earlier(q, k):
    return k <= q


Q = jnp.ones((2, 4, 4, 8))
KV = jnp.ones((2, 6, 2, 8))
BAD = [
    (dict(query=Q.astype(int)), TypeError, "query"),
    (dict(query=Q[..., :3, :]), ValueError, "multiple of the key's 2 heads"),
    (dict(key=KV[..., :4]), ValueError, "key must have shape"),
    (dict(value=KV[:, :3]), ValueError, "value must have shape"),
    (dict(key=KV[:1], value=KV[:1]), ValueError, "batch"),
    (dict(mask=jnp.ones((2, 3, 4, 6), bool)), ValueError, "mask must broadcast"),
    (dict(mask=jnp.ones((4, 6))), TypeError, "mask must be a boolean"),
    (dict(bias=jnp.ones((5, 6))), ValueError, "bias must broadcast"),
    (dict(bias=jnp.ones((4, 6), int)), TypeError, "bias"),
    (dict(local_window_size=-1), ValueError, "local_window_size must be .* >= 0"),
    (dict(local_window_size=(1, 2, 3)), ValueError, "pair"),
    (dict(local_window_size=1.5), TypeError, "local_window_size"),
    (dict(scale=jnp.ones(3)), ValueError, "scale"),
    (dict(alibi_slopes=jnp.ones(3)), ValueError, "alibi_slopes"),
    (dict(sinks=jnp.ones(3)), ValueError, "sinks must broadcast"),
    (dict(sinks=jnp.ones(4), normalizer=jaxsoft.softpick), ValueError, "sinks need .* exponential"),
    (dict(softcap=0.0), ValueError, "softcap"),
    (dict(dropout_rate=0.5), ValueError, "dropout_key"),
    (dict(dropout_rate=1.0), ValueError, "dropout_rate"),
    (dict(key_value_seq_lengths=jnp.ones(3, int)), ValueError, "key_value_seq_lengths"),
    (dict(query_seq_lengths=jnp.ones(2)), TypeError, "query_seq_lengths"),
    (dict(query_segment_ids=jnp.ones((2, 4), int)), ValueError, "together"),
    (dict(block_sizes=(0, None)), ValueError, "block_sizes"),
    (dict(block_sizes=8), TypeError, "block_sizes"),
    (dict(implementation="triton"), ValueError, "implementation must be one of"),
    (dict(normalizer=jax.nn.softmax), TypeError, "normalizer must be a normalizer of jaxsoft"),
    (dict(normalizer=partial(jaxsoft.softmax, axis=0)), ValueError, "axis"),
    (dict(normalizer=partial(jaxsoft.softmax_n, n=jnp.ones(3))), ValueError, "n must broadcast"),
    (dict(is_causal=1), TypeError, "is_causal"),
    (dict(query_offset=0.5), TypeError, "query_offset"),
    (dict(mask_fn=3), TypeError, "mask_fn"),
    (dict(query_positions=jnp.ones(4)), TypeError, "query_positions"),
    (
        dict(key_positions=jnp.ones((2, 4), int)),
        ValueError,
        r"key_positions must have shape \(6,\) or \(2, 6\)",
    ),
    (dict(query_positions=jnp.ones(4, int), query_offset=1), ValueError, "query_offset must be 0"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_input(i):
    given, kind, words = BAD[i]
    arrays = dict(query=Q, key=KV, value=KV) | given
    with pytest.raises(kind, match=words):
        jax.eval_shape(lambda: dot_product_attention(**arrays))


def test_half_precision_gradients_of_equal_query_key_and_value():
    """Weights near 1: the gradient of a score is a small difference, which must not be taken of rounded numbers."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(2, 64, 4, 32)), jnp.bfloat16) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(2, 4, 64, 64)), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(f, x, bias, g):
        return jax.grad(lambda bias: jnp.vdot(f(x, x, x, bias), g))(bias)

    arrays = (x, bias, g)
    own, peer = (gradient(f, *arrays) for f in (dot_product_attention, jax.nn.dot_product_attention))
    with float64():
        arrays = [jnp.asarray(np.asarray(a, np.float64)) for a in arrays]
        exact = np.asarray(gradient(dot_product_attention, *arrays))
    error = lambda a: np.sqrt(np.mean((np.asarray(a, np.float64) - exact) ** 2))
    assert error(own) <= error(peer)
