"""Attention on a mesh: rings, caches sharded along their length, and what the placement of the arrays decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft._program import costs_of
from jaxsoft.attention import decode_attention, dot_product_attention

B, T, N, K, H = 2, 16, 4, 2, 4


def mesh_of(kind: str, **sizes: int):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(getattr(AxisType, kind),) * len(sizes)
    )


def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    segments = jnp.asarray(np.repeat([[0, 0, 0, 1], [0, 1, 1, 2]], 4, axis=1), jnp.int32)
    return dict(
        query=normal(B, T, N, H),
        key=normal(B, T, K, H),
        value=normal(B, T, K, H),
        bias=normal(1, N, T, T),
        mask=jnp.arange(T)[None, None, None] < 13,
        key_value_seq_lengths=jnp.array([13, 7]),
        query_seq_lengths=jnp.array([14, 16]),
        query_segment_ids=segments,
        key_segment_ids=segments,
        alibi_slopes=jnp.arange(1.0, N + 1),
        sinks=jnp.ones(N),
    )


# The arrays that each case reads in addition to query, key and value, and its options.
CASES = {
    "window": ((), dict(is_causal=True, local_window_size=(5, 0), normalizer=jaxsoft.softpick)),
    "lengths": (("key_value_seq_lengths", "query_seq_lengths"), dict(normalizer=jaxsoft.scalable_softmax)),
    "bias": (("bias", "mask"), dict(is_causal=True)),
    "segments": (("query_segment_ids", "key_segment_ids"), dict(softcap=3.0)),
    "sinks": (("alibi_slopes", "sinks"), dict(is_causal=True, return_residual=True)),
    "several passes": ((), dict(is_causal=True, normalizer=jaxsoft.sparsemax)),
}
ALONG = {"query": "s", "key": "s", "value": "s", "query_segment_ids": "s", "key_segment_ids": "s"}


def total(arrays, **options):
    """One number of an attention's results."""
    out = jax.tree.leaves(dot_product_attention(**arrays, **options, block_sizes=(4, 4)))
    return sum(jnp.sum(a * jnp.sin(jnp.arange(a.size).reshape(a.shape))) for a in out)


def value_and_gradients(function, arrays):
    """With the gradients of all floating arrays."""
    floats = {k: a for k, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    return jax.jit(jax.value_and_grad(lambda floats: function({**arrays, **floats})))(floats)


def close(got, wanted, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_ring(case, x64):
    """Inside shard_map, four devices in a ring, against one."""
    names, options = CASES[case]
    arrays = {k: a for k, a in inputs().items() if k in (*names, "query", "key", "value")}
    mesh = mesh_of("Auto", s=4)
    specs = {
        k: P(None, ALONG[k]) if k in ALONG else P(None, None, "s") if k == "bias" else P() for k in arrays
    }
    attend = lambda arrays: dot_product_attention(**arrays, **options, axis_name="s", block_sizes=(2, 4))
    ring = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=P(None, "s"))

    def of_ring(arrays):
        out = jax.tree.leaves(ring(arrays))
        return sum(jnp.sum(a * jnp.sin(jnp.arange(a.size).reshape(a.shape))) for a in out)

    one = functools.partial(total, **options)
    close(value_and_gradients(of_ring, arrays), value_and_gradients(one, arrays))
    if case == "window":  # forward mode over reverse mode
        product = lambda f: jax.jvp(
            jax.grad(lambda q: f({**arrays, "query": q})), (arrays["query"],), (arrays["query"],)
        )[1]
        close(jax.jit(lambda: product(of_ring))(), jax.jit(lambda: product(one))())


PLACEMENTS = {
    "ring": (P("d", "m"), P("d", "m")),
    "heads": (P("d", None, "m"), P("d", None, "m")),
    "more heads than the key has": (P(None, None, ("d", "m")), P()),
    "queries only": (P(None, "m", "d"), P(None, None, "d")),
    "keys gathered": (P("d", None, "m"), P("d", "m")),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_placement_decides(name, x64):
    """Explicit axes by the types, Auto axes by `shardings`, in turn; options of a normalizer that vary by head."""
    of_query, of_key = PLACEMENTS[name]
    index = list(PLACEMENTS).index(name)
    kind, (names, options) = ("Explicit", "Auto")[index % 2], CASES[("lengths", "sinks", "bias")[index % 3]]
    if options.get("normalizer") is jaxsoft.scalable_softmax:
        scale = jnp.linspace(0.5, 1, N)
        options = {**options, "normalizer": functools.partial(jaxsoft.scalable_softmax, scale=scale)}
    arrays = {k: a for k, a in inputs().items() if k in (*names, "query", "key", "value")}
    mesh = mesh_of(kind, d=2, m=2)
    placed = {
        k: jax.device_put(
            a, NamedSharding(mesh, {"query": of_query, "key": of_key, "value": of_key}.get(k, P()))
        )
        for k, a in arrays.items()
    }
    said = dict(query=of_query, key=of_key) if kind == "Auto" else {}
    one = functools.partial(total, **options)
    wanted = value_and_gradients(one, arrays)
    with jax.set_mesh(mesh), jaxsoft.shardings(**said):
        close(value_and_gradients(one, placed), wanted)


def test_dropout_on_a_mesh_drops_what_one_device_drops():
    """Rows keep their numbers: the compiler places them."""
    query, key, value = (inputs()[name] for name in ("query", "key", "value"))
    attend = lambda *a: dot_product_attention(*a, dropout_rate=0.5, dropout_key=jax.random.key(3))
    mesh, along = mesh_of("Auto", d=2, m=2), P("d", "m")
    placed = [jax.device_put(a, NamedSharding(mesh, along)) for a in (query, key, value)]
    with jax.set_mesh(mesh), jaxsoft.shardings(query=along, key=along):
        close(jax.jit(attend)(*placed), attend(query, key, value), 1e-5)


@pytest.mark.parametrize("normalizer", [None, jaxsoft.scalable_softmax, jaxsoft.entmax15])
def test_decoding_from_a_sharded_cache(normalizer, x64):
    """Inside shard_map, and by the types."""
    given, lengths = inputs(), jnp.array([13, 7])
    query, key, value = given["query"][:, :1], given["key"], given["value"]
    attend = functools.partial(decode_attention, normalizer=normalizer)
    wanted = attend(query, key, value, lengths)
    mesh = mesh_of("Explicit", s=4)
    cache = [jax.device_put(a, NamedSharding(mesh, P(None, "s"))) for a in (key, value)]
    rest = [jax.device_put(a, NamedSharding(mesh, P())) for a in (query, lengths)]
    close(jax.jit(attend)(rest[0], *cache, rest[1]), wanted)
    inside = jax.shard_map(
        functools.partial(attend, axis_name="s"),
        mesh=mesh,
        in_specs=(P(), P(None, "s"), P(None, "s"), P()),
        out_specs=P(),
    )
    close(jax.jit(inside)(rest[0], *cache, rest[1]), wanted)


@functools.cache
def ring_costs(devices: int, length: int):
    """Of value and gradients of causal softmax attention, batch 1, 4 heads of 64."""
    mesh = mesh_of("Explicit", s=devices)
    a = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "s")))
    f = lambda q, k, v: dot_product_attention(q, k, v, is_causal=True).sum()
    return costs_of(jax.jit(jax.grad(f, (0, 1, 2))).lower(a, a, a).compile())


def test_cost_of_a_ring():
    """Keys and values travel to the other devices, twice; their gradients to all, and home."""
    devices, length = 8, 2**15  # the blocks of scores are of a constant size
    found = ring_costs(devices, length)
    part = 2 * length / devices * 4 * 64 * 4  # of keys and values, bytes
    assert set(found.moved) == {"collective-permute"}
    assert found.bytes_moved <= 1.1 * (2 * (devices - 1) + devices) * part
    assert found.temporary <= 0.6 * ring_costs(devices // 2, length).temporary


def test_wrong_rings():
    given = inputs()
    query, key, value = given["query"], given["key"], given["value"]
    with pytest.raises(ValueError, match="axis_name must name axes of the mesh"):
        dot_product_attention(query, key, value, axis_name="s")
    mesh = mesh_of("Explicit", s=4)

    def ring(**options):
        attend = functools.partial(dot_product_attention, axis_name="s", **options)
        f = jax.shard_map(attend, mesh=mesh, in_specs=(P(None, "s"),) * 3, out_specs=P(None, "s"))
        return f(*(jax.device_put(a, NamedSharding(mesh, P(None, "s"))) for a in (query, key, value)))

    with pytest.raises(ValueError, match="dropout_rate must be 0 with axis_name"):
        ring(dropout_rate=0.5, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match="must have the keys of all 4 devices, 16"):
        ring(bias=jnp.zeros((1, 1, 4, 4)))
    auto = mesh_of("Auto", s=8)
    short, along = [a[:, :12] for a in (query, key, value)], P(None, "s")
    said = jaxsoft.shardings(query=along, key=along)
    with jax.set_mesh(auto), said, pytest.raises(ValueError, match="must have a length that its 8 devices"):
        dot_product_attention(*short)
