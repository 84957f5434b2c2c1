"""Parts of an attention merge to the whole; decoding from a cache; the Flax adapter."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft.attention import (
    PartialAttention,
    decode_attention,
    dot_product_attention,
    flax_attention_fn,
    merge_partial_attention,
    partial_attention,
)

B, T, S, N, K, H, W = 2, 5, 12, 4, 2, 8, 3
CUTS = (0, 5, 6, 6 + 4, S)
COUNT = jnp.minimum(jnp.arange(T) + 1 + (S - T), S).astype(float)  # causal queries at the end of the keys

ONE_PASS = {
    "softmax": jaxsoft.softmax,
    "softmax_n": partial(jaxsoft.softmax_n, n=2.0),
    "sink_softmax": partial(jaxsoft.sink_softmax, sink=jnp.linspace(-1, 1, N)),
    "scalable_softmax": partial(jaxsoft.scalable_softmax, scale=0.8),
    "self_adjust_softmax": jaxsoft.self_adjust_softmax,
    "softpick": jaxsoft.softpick,
    "stablemax": jaxsoft.stablemax,
    "taylor_softmax": jaxsoft.taylor_softmax,
    "sigmoid_weights": jaxsoft.sigmoid_weights,
    "relu_weights": jaxsoft.relu_weights,
    "softplus_attention_weights": partial(jaxsoft.softplus_attention_weights, scale=1.5),
}
TWO_PASS = [
    jaxsoft.adaptive_temperature_softmax,
    jaxsoft.clipped_softmax,
    jaxsoft.entmax15,
    partial(jaxsoft.sparse_softmax, k=2),
    partial(jaxsoft.reweighted_attention_weights, scale=1.5),
]


def make(seed=0, dtype=np.float64, t=T):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, t, N, H), (B, S, K, H), (B, S, K, W))
    )


def parts_of(q, k, v, **options):
    for lo, hi in itertools.pairwise(CUTS):
        yield partial_attention(q, k[:, lo:hi], v[:, lo:hi], key_offset=lo, **options)


@pytest.mark.table
@pytest.mark.parametrize("name", ONE_PASS)
def test_parts_merge_in_any_order(name, x64):
    """Values and gradients, with positions of the whole and a part that no query may see."""
    options = dict(normalizer=ONE_PASS[name], is_causal=True, query_offset=S - T, local_window_size=(8, None))
    count = jnp.minimum(COUNT, 9)

    def whole(q, k, v):
        return dot_product_attention(q, k, v, **options)

    def merged(order, q, k, v):
        parts = list(parts_of(q, k, v, **options, key_count=count))
        return merge_partial_attention(*(parts[i] for i in order)).output()

    point = make()
    expected, pull = jax.vjp(whole, *point)
    ct = jnp.asarray(np.random.default_rng(1).normal(size=expected.shape))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        out, pull_parts = jax.vjp(partial(merged, order), *point)
        for a, b in zip(jax.tree.leaves((out, pull_parts(ct))), jax.tree.leaves((expected, pull(ct)))):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    parts = list(parts_of(*point, **options, key_count=count))
    nested = merge_partial_attention(
        parts[0], merge_partial_attention(merge_partial_attention(*parts[1:3]), parts[3])
    )
    np.testing.assert_allclose(nested.output(), expected, rtol=1e-11, atol=1e-11)


def test_logsumexp_of_parts(x64):
    q, k, v = make()
    for normalizer in (jaxsoft.softmax, partial(jaxsoft.scalable_softmax, scale=0.8)):
        parts = list(parts_of(q, k, v, normalizer=normalizer, key_count=jnp.full((1,), float(S))))
        _, expected = dot_product_attention(q, k, v, normalizer=normalizer, return_residual=True)
        np.testing.assert_allclose(merge_partial_attention(*parts).logsumexp(), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="exponential"):
        partial_attention(q, k, v, normalizer=jaxsoft.softpick).logsumexp()


def test_a_part_without_visible_keys_changes_nothing(x64):
    q, k, v = make()
    nothing = partial_attention(q, k, v, mask=jnp.zeros((1, 1, 1, S), bool))
    assert jnp.all(nothing.output() == 0) and jnp.all(nothing.logsumexp() == -jnp.inf)
    np.testing.assert_array_equal(
        merge_partial_attention(nothing, partial_attention(q, k, v)).output(), dot_product_attention(q, k, v)
    )


def test_keys_sharded_over_devices():
    """Each device holds half of the keys; the states are gathered and merged."""
    q, k, v = make(dtype=np.float32)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    options = dict(is_causal=True, query_offset=S - T)

    def attend(q, k, v):
        start = jax.lax.axis_index("x") * (S // 2)
        part = partial_attention(q, k, v, key_offset=start, **options)
        gathered = jax.lax.all_gather(part, "x")
        return merge_partial_attention(*(jax.tree.map(lambda a: a[i], gathered) for i in range(2))).output()[
            None
        ]

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(P(), P(None, "x"), P(None, "x")), out_specs=P("x"))
    expected = dot_product_attention(q, k, v, **options)
    for out in sharded(q, k, v):
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("normalizer", TWO_PASS, ids=lambda f: getattr(f, "func", f).__name__)
def test_normalizers_of_two_passes_are_refused(normalizer):
    with pytest.raises(ValueError, match=r"one pass only.*dot_product_attention"):
        partial_attention(*make(dtype=np.float32), normalizer=normalizer, key_count=jnp.ones(1))


def test_bad_parts():
    q, k, v = make(dtype=np.float32)
    with pytest.raises(ValueError, match="key_count"):
        partial_attention(q, k, v, normalizer=jaxsoft.scalable_softmax)
    with pytest.raises(ValueError, match="at least one"):
        merge_partial_attention()
    with pytest.raises(TypeError, match="PartialAttention"):
        merge_partial_attention(q)
    part = partial_attention(q, k, v)
    assert isinstance(part, PartialAttention)
    with pytest.raises(ValueError, match="same queries"):
        merge_partial_attention(part, partial_attention(q, k, v, normalizer=jaxsoft.softpick))
    with pytest.raises(ValueError, match="same queries"):
        merge_partial_attention(part, partial_attention(q[:, :3], k, v))


LENGTHS = jnp.asarray([7, 12])


def decoded(q, k, v, **options):
    """Each sequence by itself, cut to its length."""
    rows = []
    for b, n in enumerate(np.asarray(LENGTHS)):
        rows.append(
            dot_product_attention(
                q[b], k[b, :n], v[b, :n], is_causal=True, query_offset=int(n) - q.shape[1], **options
            )
        )
    return jnp.stack(rows)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["softmax", "scalable_softmax", "softpick", "sink_softmax"])
def test_decode(name, splits, x64):
    q, k, v = make(t=2)
    expected = decoded(q, k, v, normalizer=ONE_PASS[name])
    k, v = k.at[0, 7:].set(jnp.nan), v.at[0, 7:].set(jnp.nan)  # behind the length
    got = jax.jit(partial(decode_attention, normalizer=ONE_PASS[name], splits=splits))(q, k, v, LENGTHS)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_decode_with_options(x64):
    q, k, v = make(t=1)
    options = dict(
        softcap=1.0, local_window_size=(4, None), alibi_slopes=jnp.linspace(0, 1, N), sinks=jnp.ones(N)
    )
    for splits in (1, 2):
        got = decode_attention(q, k, v, LENGTHS, splits=splits, **options)
        np.testing.assert_allclose(got, decoded(q, k, v, **options), rtol=1e-12, atol=1e-12)
    got = decode_attention(q, k, v, LENGTHS, normalizer=jaxsoft.entmax15)
    np.testing.assert_allclose(got, decoded(q, k, v, normalizer=jaxsoft.entmax15), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("phi", [0.0, 60.0, 300.0, -300.0])
def test_unified_max_falls_back_to_the_exact_computation(phi):
    q, k, v = make(dtype=np.float32, t=1)
    expected = decode_attention(q, k, v, LENGTHS)
    got = jax.jit(partial(decode_attention, unified_max=phi))(q, k, v, LENGTHS)
    np.testing.assert_allclose(got, expected, rtol=2e-5)  # half a unit in the last place of phi
    gradient = jax.grad(lambda q: decode_attention(q, k, v, LENGTHS, unified_max=phi).sum())(q)
    np.testing.assert_allclose(
        gradient, jax.grad(lambda q: decode_attention(q, k, v, LENGTHS).sum())(q), atol=2e-5
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(splits=5), "splits must divide"),
        (dict(is_causal=True), "is_causal"),
        (dict(unified_max=0.0, normalizer=jaxsoft.softpick), "unified_max"),
        (dict(splits=2, normalizer=jaxsoft.entmax15), "one pass only"),
        (dict(splits=2, bias=jnp.ones((1, 1, 1, S))), "splits must be 1 with"),
    ],
)
def test_bad_decode(options, words):
    with pytest.raises(ValueError, match=words):
        decode_attention(*make(dtype=np.float32, t=1), LENGTHS, **options)
    with pytest.raises(ValueError, match="lengths must have shape"):
        decode_attention(*make(dtype=np.float32, t=1), jnp.zeros(3, int))


def test_flax_modules():
    """The adapter in both of Flax's multi-head attentions, beside Flax's own attention."""
    nnx = pytest.importorskip("flax.nnx")
    nn = pytest.importorskip("flax.linen")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
    mask = nnx.make_causal_mask(jnp.ones((2, 6)))
    outputs = []
    for options in (
        {},
        {"attention_fn": flax_attention_fn()},
        {"attention_fn": flax_attention_fn(normalizer=jaxsoft.softpick)},
    ):
        module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0), **options)
        linen = nn.MultiHeadDotProductAttention(num_heads=2, **options)
        variables = linen.init(jax.random.key(0), x)
        outputs.append((module(x, mask=mask), linen.apply(variables, x, mask=mask)))
    for a, b, c in zip(*outputs):
        np.testing.assert_allclose(a, b, atol=2e-6)
        assert not jnp.allclose(a, c, atol=1e-3)
    # Equal batch elements: `broadcast_dropout`, Flax's default, drops the same weights in each.
    same = jnp.broadcast_to(x[:1], x.shape)
    for shared in ({}, {"broadcast_dropout": False}):
        options = dict(dropout_rate=0.5, attention_fn=flax_attention_fn(), **shared)
        dropping = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0), **options)
        linen = nn.MultiHeadDotProductAttention(num_heads=2, force_fp32_for_softmax=True, **options)
        outputs = [dropping(same, deterministic=False) for _ in range(2)]
        outputs += [
            linen.apply(variables, same, deterministic=False, rngs={"dropout": jax.random.key(i)})
            for i in range(2)
        ]
        assert not jnp.allclose(*outputs[:2]) and not jnp.allclose(*outputs[2:])
        for out in outputs:
            assert jnp.allclose(out[0], out[1]) == shared.get("broadcast_dropout", True)
    with pytest.raises(ValueError, match="sown"):
        module(x, sow_weights=True)
