"""Softmax attention by cuDNN: which calls it gets, and that no derivative or convention is lost.

No device is needed: calls are lowered, and where numbers count, a stand-in that has only a `custom_vjp`, as cuDNN's
attention has, computes them on the CPU.
"""

import functools
import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import kernels
from jaxsoft.attention import _cudnn, dot_product_attention, partial_attention
from jaxsoft.kernels import _device, _tables

A100, H200 = "NVIDIA A100-SXM4-80GB", "NVIDIA H200"


@pytest.fixture(autouse=True)
def no_tables_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSOFT_TUNING", str(tmp_path))
    _tables.forget()
    yield
    _tables.forget()


@pytest.fixture
def cudnn(monkeypatch):
    """As if cuDNN were installed."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)


def on(kind, platform="gpu"):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


Q, KV, LENGTHS = array(2, 256, 8, 64), array(2, 256, 2, 64), array(2, dtype=jnp.int32)
IDS = array(2, 256, dtype=jnp.int32)


def explained(kind, *arrays, f=dot_product_attention, **options):
    with on(kind):
        return kernels.explain(functools.partial(f, **options), *arrays)[-1]


def calls(f, *arrays):
    """The names and options of the cuDNN calls in the text of a function lowered for CUDA."""
    # Not with an abstract mesh: jax cannot lower cuDNN's partitioning there.
    with mock.patch.object(_device, "device", lambda: ("gpu", A100)):
        text = jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r'custom_call @(__cudnn\S+?)\(.*?backend_config = "(.*?)", operand', text)
    return [
        (name, json.loads(options.replace(r"\22", '"'))["cudnn_fmha_backend_config"])
        for name, options in found
    ]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, dict(mask_type="NO_MASK", sliding_window_length=0, fmha_scale=0.125)),
        (dict(is_causal=True, scale=0.5), dict(mask_type="CAUSAL", sliding_window_length=0, fmha_scale=0.5)),
        (dict(is_causal=True, local_window_size=30), dict(mask_type="CAUSAL", sliding_window_length=31)),
        (dict(local_window_size=(30, 0)), dict(mask_type="CAUSAL", sliding_window_length=31)),
        (dict(key_value_seq_lengths=LENGTHS), dict(mask_type="PADDING")),
        (dict(key_value_seq_lengths=LENGTHS, is_causal=True), dict(mask_type="PADDING_CAUSAL")),
        (dict(query_seq_lengths=LENGTHS), dict(mask_type="NO_MASK")),  # hidden queries are set to 0
    ],
)
def test_the_calls_that_it_gets(options, expected, cudnn):
    lengths = {name: a for name, a in options.items() if a is LENGTHS}
    static = {name: a for name, a in options.items() if a is not LENGTHS}

    def loss(q, k, v, lengths):
        out = dot_product_attention(q, k, v, implementation="cudnn", **static, **lengths)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    found = calls(jax.grad(loss, (0, 1, 2)), Q, KV, KV, lengths)
    assert [name for name, _ in found] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for _, got in found:
        assert {name: got[name] for name in expected} == expected
        assert got["dropout_rate"] == 0.0


def test_vmap_makes_the_batch_larger(cudnn):
    def loss(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, is_causal=True).astype(jnp.float32))

    mapped = jax.vmap(jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, 0)), (None, 0, 0))
    found = calls(mapped, array(3, *Q.shape), array(5, *KV.shape), array(5, 3, *KV.shape))
    assert len(found) == 2
    assert {got["intermediate_tensor_shape"]["dimensions"][0] for _, got in found} == {"30"}


def test_shards(cudnn):
    """Inside `shard_map` it runs; of arrays that the compiler may partition, only by name."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def local(q, kv):
        return jax.lax.psum(jnp.sum(dot_product_attention(q, kv, kv).astype(jnp.float32)), "data")

    f = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "data"), P()), out_specs=P())
    assert len(calls(jax.grad(f, (0, 1)), Q, KV)) == 2
    q, kv = (jax.device_put(jnp.zeros(a.shape, a.dtype), NamedSharding(mesh, P("data"))) for a in (Q, KV))
    with mock.patch.object(_device, "device", lambda: ("gpu", A100)):
        decision = kernels.explain(dot_product_attention, q, kv, kv)[-1]
        named = kernels.explain(functools.partial(dot_product_attention, implementation="cudnn"), q, kv, kv)
    assert decision.implementation == "xla" and "takes some shardings only" in decision.reasons["cudnn"]
    assert named[-1].implementation == "cudnn"


# --- what it does not get ----------------------------------------------------------------------------------------

OPTIONS = [
    (dict(normalizer=jaxsoft.softmax_one), "no normalizer but softmax"),
    (dict(normalizer=jaxsoft.sigmoid_weights), "no normalizer but softmax"),
    (dict(bias=array(1, 8, 256, 256)), "a bias .* may hide all keys"),
    (dict(mask=array(1, 1, 256, 256, dtype=bool)), "a mask may hide all keys"),
    (dict(alibi_slopes=array(8, dtype=jnp.float32)), "no alibi_slopes"),
    (dict(sinks=array(8, dtype=jnp.float32)), "no sinks"),
    (dict(dropout_rate=0.1, dropout_key=array(2, dtype=jnp.uint32)), "no dropout_rate"),
    (dict(softcap=5.0), "no softcap"),
    (dict(mask_fn=lambda i, j: i != j), "no mask_fn"),
    (dict(precision="highest"), "no precision"),
    (
        dict(query_segment_ids=IDS, key_segment_ids=IDS),
        "no segments",
    ),
    (dict(query_offset=1, is_causal=True), "no query_offset"),
    (dict(query_offset=array(dtype=jnp.int32), is_causal=True), "no query_offset"),
    (dict(scale=array(8, dtype=jnp.float32)), "scale must be a number"),
    (dict(local_window_size=30), "must end at the query"),
    (dict(local_window_size=(30, 0), key_value_seq_lengths=LENGTHS), "may leave a query without keys"),
    (dict(return_residual=True), "log-sum-exp has no derivative"),
    (dict(return_statistics=True), "returns no statistics"),
]
OPERANDS = [
    ((array(2, 256, 8, 64, dtype=jnp.float32),) * 3, "bfloat16 or all float16, not float32"),
    ((Q, KV, array(2, 256, 2, 64, dtype=jnp.float16)), "not bfloat16, float16"),
    ((Q, KV, array(2, 256, 2, 32)), "as wide as the keys, 64, not 32"),
    ((array(2, 256, 8, 60), *(array(2, 256, 2, 60),) * 2), "head dim must be <= 128 and a multiple of 8"),
    ((array(2, 256, 8, 136), *(array(2, 256, 2, 136),) * 2), "head dim must be <= 128"),
    ((array(2, 255, 8, 64), KV, KV), "Unsupported sequence length"),
    ((array(2, 0, 8, 64), KV, KV), "nothing to read"),
]


def refused(words, *arrays, **options):
    structs = {name: a for name, a in options.items() if isinstance(a, jax.ShapeDtypeStruct)}
    static = {name: a for name, a in options.items() if name not in structs}

    def f(arrays, structs, implementation=None):
        return dot_product_attention(*arrays, implementation=implementation, **static, **structs)

    with on(A100):
        decision = kernels.explain(f, arrays, structs)[-1]
        with pytest.raises(ValueError, match=f"implementation='cudnn' cannot run .*{words}"):
            jax.eval_shape(functools.partial(f, implementation="cudnn"), arrays, structs)
    assert decision.implementation == "xla"
    assert re.search(words, decision.reasons["cudnn"])


@pytest.mark.parametrize("options, words", OPTIONS, ids=[words for _, words in OPTIONS])
def test_options_that_it_does_not_have(options, words, cudnn):
    refused(words, Q, KV, KV, **options)


@pytest.mark.parametrize("arrays, words", OPERANDS, ids=[words for _, words in OPERANDS])
def test_operands_that_it_does_not_take(arrays, words, cudnn):
    refused(words, *arrays)


def test_a_window_beyond_the_keys(cudnn):
    refused(
        "as many queries as keys", array(2, 300, 8, 64), KV, KV, is_causal=True, local_window_size=(43, 0)
    )


def test_without_cudnn():
    decision = explained(A100, Q, KV, KV)
    assert decision.implementation == "xla" and "cuDNN is not detected" in decision.reasons["cudnn"]


@pytest.mark.parametrize("kind", ["AMD Instinct MI300X", "Tesla V100-SXM2-16GB", "NVIDIA of the future"])
def test_devices_that_it_is_not_for(kind, cudnn):
    decision = explained(kind, Q, KV, KV)
    assert (
        decision.implementation == "xla"
        and "NVIDIA GPU of compute capability 8.0" in decision.reasons["cudnn"]
    )


def test_what_only_attention_has():
    for f in (lambda x, **o: jaxsoft.logsumexp(x, **o), lambda x, **o: partial_attention(x, x, x, **o)):
        with pytest.raises(ValueError, match=r"'cudnn' cannot run .*dot_product_attention with softmax"):
            jax.eval_shape(functools.partial(f, implementation="cudnn"), Q)
    with pytest.raises(ValueError, match="'cudnn' cannot run an attention: it needs a GPU, this is a CPU"):
        dot_product_attention(*[jnp.zeros((1, 4, 2, 8), jnp.bfloat16)] * 3, implementation="cudnn")


# --- where it is chosen ---------------------------------------------------------------------------------------------


def test_the_table_chooses_where_kernels_run(cudnn):
    heads = array(4, 8192, 16, 128)
    decision = explained(H200, heads, heads, heads, is_causal=True)
    assert decision.implementation == "cudnn"
    assert "at 8192 x 8192, 128 features in 16 bits (7.59 ms, mosaic_gpu took 18.5 ms" in decision.because
    assert decision.reasons["mosaic_gpu"] == "cudnn runs it"
    keys = array(64, 32768, 8, 128)
    decode = explained(H200, array(64, 1, 32, 128), keys, keys)
    assert decode.implementation == "mosaic_gpu"
    assert "mosaic_gpu was faster" in decode.reasons["cudnn"]
    named = explained(H200, heads, heads, heads, implementation="mosaic_gpu")
    assert named.implementation == "mosaic_gpu" and "was requested" in named.reasons["cudnn"]


@pytest.mark.parametrize("kind", [A100, "NVIDIA L4", "NVIDIA B200", "NVIDIA GB200"])
def test_without_kernels_it_runs_what_it_can(kind, cudnn):
    for arrays in ((Q, KV, KV), (array(2, 1, 8, 64), KV, KV)):
        decision = explained(kind, *arrays)
        assert decision.implementation == "cudnn" and kind in decision.because


# --- numbers: a stand-in with a `custom_vjp` ---------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(_device, "device", lambda: ("gpu", A100))
    by_xla = jax.nn.dot_product_attention
    used = []

    def attention(q, k, v, *, implementation, key_value_seq_lengths, **options):
        assert implementation == "cudnn"

        def plain(q, k, v):
            wide = (a.astype(jnp.float32) for a in (q, k, v))
            return by_xla(*wide, key_value_seq_lengths=key_value_seq_lengths, **options).astype(q.dtype)

        f = jax.custom_vjp(plain)

        def backward(kept, ct):
            used.append("backward")
            return jax.vjp(plain, *kept)[1](ct)

        f.defvjp(lambda *a: (used.append("forward"), (plain(*a), a))[1], backward)
        return f(q, k, v)

    monkeypatch.setattr(_cudnn.jax.nn, "dot_product_attention", attention)
    return used


def operands(seed, *lead):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (2, 6, 2, 8), (2, 8, 1, 8), (2, 8, 1, 8)
    return tuple(jax.random.normal(k, (*lead, *s), jnp.float16) for k, s in zip(keys, shapes))


def transforms(attention):
    """Derivatives of every mode and of second order, and `vmap`, of `attention(q, k, v, lengths)`."""
    x, d, xs = operands(0), operands(1), operands(2, 3)
    lengths = jnp.array([5, 0])

    def loss(*x, lengths=lengths):
        return jnp.sum(jnp.sin(attention(*x, lengths).astype(jnp.float32)))

    def gradient(*x):
        return jax.grad(loss, (0, 1, 2))(*x)

    return dict(
        value=attention(*x, lengths),
        gradient=gradient(*x),
        jvp=jax.jvp(loss, x, d)[1],
        forward_over_reverse=jax.jvp(gradient, x, d)[1],
        vmap_of_gradient=jax.vmap(gradient, (0, None, 0))(xs[0], x[1], xs[2]),
    )


def test_every_derivative(stand_in):
    def attention(q, k, v, lengths):
        return dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")

    def stored(q, k, v, lengths):
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        keep = jnp.arange(k.shape[1]) < lengths[:, None, None, None]
        weights = jaxsoft.softmax(8**-0.5 * jnp.einsum("btnh,bsgh->bnts", q, k), where=keep)
        return jnp.einsum("bnts,bsgh->btnh", weights, v)

    run = jax.jit(transforms, static_argnums=0)
    got, expected = run(attention), run(stored)
    assert {"forward", "backward"} <= set(stand_in)
    assert not jnp.any(got["value"][1])  # no keys
    assert all(not jnp.any(g[1]) for g in got["gradient"])
    for name, g in got.items():
        for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(expected[name])):
            scale = float(jnp.max(jnp.abs(b.astype(jnp.float32)))) + 1e-3
            np.testing.assert_allclose(
                a.astype(jnp.float32), b.astype(jnp.float32), atol=1e-2 * scale, err_msg=name
            )


def test_nan_in_hidden_positions(stand_in):
    q, k, v = operands(3)
    q, k, v = q.at[0, 4:].set(jnp.nan), k.at[0, 5:].set(jnp.nan), v.at[0, 5:].set(jnp.nan)
    options = dict(query_seq_lengths=jnp.array([4, 6]), key_value_seq_lengths=jnp.array([5, 8]))

    @functools.partial(jax.jit, static_argnums=3)
    def run(q, k, v, implementation):
        f = functools.partial(dot_product_attention, implementation=implementation, **options)
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(jnp.ones_like(out))

    for a, b in zip(*(jax.tree.leaves(run(q, k, v, name)) for name in ("cudnn", "xla"))):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=1e-2)
