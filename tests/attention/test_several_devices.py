"""Attention on a mesh: rings, caches sharded along their length, and what the placement of the arrays decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import normalizers
from jaxsoft._program import costs_of
from jaxsoft.attention import decode_attention, dot_product_attention, zigzag_positions

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
    return summed(dot_product_attention(**arrays, **options, block_sizes=(4, 4)))


def value_and_gradients(function, arrays):
    """With the gradients of all floating arrays."""
    floats = {k: a for k, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    return jax.jit(jax.value_and_grad(lambda floats: function({**arrays, **floats})))(floats)


def close(got, wanted, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def reordered(arrays, order):
    """The arrays with their positions in another order."""
    along = {k: a[:, order] if k in ALONG else a for k, a in arrays.items()}
    if "bias" in along:
        along["bias"] = along["bias"][:, :, order][..., order]
    if "mask" in along:
        along["mask"] = along["mask"][..., order]
    return along


def summed(out, order=slice(None)):
    """One number of an attention's results, whose positions are brought back from an order."""
    out = [a[:, order] for a in jax.tree.leaves(out)]
    return sum(jnp.sum(a * jnp.sin(jnp.arange(a.size).reshape(a.shape))) for a in out)


@pytest.mark.parametrize("order", ["natural", "zigzag"])
@pytest.mark.parametrize("case", CASES)
def test_ring(case, order, x64):
    """Inside shard_map, four devices in a ring, against one."""
    names, options = CASES[case]
    arrays = {k: a for k, a in inputs().items() if k in (*names, "query", "key", "value")}
    mesh = mesh_of("Auto", s=4)
    specs = {
        k: P(None, ALONG[k]) if k in ALONG else P(None, None, "s") if k == "bias" else P() for k in arrays
    }
    positions = zigzag_positions(T, 4) if order == "zigzag" else jnp.arange(T)

    def attend(arrays, positions):
        given = dict(query_positions=positions, key_positions=positions) if order == "zigzag" else {}
        return dot_product_attention(**arrays, **given, **options, axis_name="s", block_sizes=(2, 4))

    ring = jax.shard_map(attend, mesh=mesh, in_specs=(specs, P("s")), out_specs=P(None, "s"))

    def of_ring(arrays):
        return summed(ring(reordered(arrays, positions), positions), jnp.argsort(positions))

    one = functools.partial(total, **options)
    close(value_and_gradients(of_ring, arrays), value_and_gradients(one, arrays))
    if case == "window":  # forward mode over reverse mode
        product = lambda f: jax.jvp(
            jax.grad(lambda q: f({**arrays, "query": q})), (arrays["query"],), (arrays["query"],)
        )[1]
        close(jax.jit(lambda: product(of_ring))(), jax.jit(lambda: product(one))())


def _visits_init(like):
    return like


def _visits_update(state, tile):
    return state + 1


_VISITS = jaxsoft.RowReduction(_visits_init, _visits_update, lambda a, b: a + b, lambda state: state)


def _ones(tile, state, params):
    return (tile.keep.astype(tile.x.dtype),)


def _visits(state, params):
    return (params["visits"],)


@normalizers.defined_by(
    lambda rows: normalizers.Normalizer(
        None, _ones, _visits, params={"visits": rows.detached().reduce(_VISITS)}
    )
)
def visited():
    """A normalizer whose weights are the number of key blocks that were read for the query."""


def test_zigzag_order_keeps_the_devices_equally_busy():
    """Blocks of scores that each device computes: of a causal mask, half of all and the diagonal."""
    devices, length, block = 4, 64, 4
    mesh = mesh_of("Auto", s=devices)
    x, along = jnp.ones((1, length, 1, 1)), P(None, "s")
    attend = lambda x, positions: dot_product_attention(
        x,
        x,
        x,
        normalizer=visited,
        is_causal=True,
        query_positions=positions,
        key_positions=positions,
        axis_name="s",
        block_sizes=(block, block),
    )
    ring = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=(along, P("s")), out_specs=along))

    def blocks_of(positions):
        """Of each device."""
        visits = ring(x, positions).reshape(-1) / (positions + 1)  # of a query at position p, over p + 1 keys
        return visits.reshape(devices, -1).sum(1) / block

    per_shard = length // devices // block
    square = per_shard**2  # blocks of a device's queries and the keys of one device
    diagonal = per_shard * (per_shard + 1) / 2
    natural, zigzag = jnp.arange(length), zigzag_positions(length, devices)
    np.testing.assert_allclose(blocks_of(natural), square * jnp.arange(devices) + diagonal)
    np.testing.assert_allclose(blocks_of(zigzag), square * (devices - 1) / 2 + diagonal)


PLACEMENTS = {
    "ring": (P("d", "m"), P("d", "m")),
    "heads": (P("d", None, "m"), P("d", None, "m")),
    "more heads than the key has": (P(None, None, ("d", "m")), P()),
    "queries only": (P(None, "m", "d"), P(None, None, "d")),
    "keys gathered": (P("d", None, "m"), P("d", "m")),
}


# Sizes of the mesh; whether positions are in zig-zag order.
ON_MESHES = [
    *((name, (2, 2), False) for name in PLACEMENTS),
    *(("ring", sizes, zigzag) for sizes in ((2, 1), (2, 4), (1, 8)) for zigzag in (False, True)),
    *(("queries only", sizes, True) for sizes in ((2, 2), (2, 4), (1, 8))),
    ("keys gathered", (2, 2), True),
]


@pytest.mark.parametrize("index", range(len(ON_MESHES)))
def test_the_placement_decides(index, x64):
    """Explicit axes by the types, Auto axes by `shardings`, in turn; options of a normalizer that vary by head."""
    name, sizes, zigzag = ON_MESHES[index]
    of_query, of_key = PLACEMENTS[name]
    kind, case = ("Explicit", "Auto")[index % 2], ("lengths", "sinks", "bias")[index % 3]
    on_mesh_is_one_device(kind, sizes, of_query, of_key, case, zigzag)


def on_mesh_is_one_device(kind, sizes, of_query, of_key, case, zigzag, tolerance=1e-10):
    names, options = CASES[case]
    if options.get("normalizer") is jaxsoft.scalable_softmax:
        scale = jnp.linspace(0.5, 1, N)
        options = {**options, "normalizer": functools.partial(jaxsoft.scalable_softmax, scale=scale)}
    arrays = {k: a for k, a in inputs().items() if k in (*names, "query", "key", "value")}
    mesh = mesh_of(kind, d=sizes[0], m=sizes[1])
    one = functools.partial(total, **options)
    wanted = value_and_gradients(one, arrays)
    if zigzag:  # the results are added with the weights of their positions, the gradients are reordered
        order = zigzag_positions(T, sizes[1])
        back = jnp.argsort(order)
        wanted = wanted[0], reordered(wanted[1], order)
        arrays = reordered(arrays, order)

        def one(arrays):
            given = dict(query_positions=order, key_positions=order)
            out = dot_product_attention(**arrays, **options, **given, block_sizes=(4, 4))
            return summed(jax.tree.map(replicated, out), back)

    placed = {
        k: jax.device_put(
            a, NamedSharding(mesh, {"query": of_query, "key": of_key, "value": of_key}.get(k, P()))
        )
        for k, a in arrays.items()
    }
    said = dict(query=of_query, key=of_key) if kind == "Auto" else {}
    replicated = lambda a: jax.reshard(a, NamedSharding(mesh, P())) if kind == "Explicit" else a
    with jax.set_mesh(mesh), jaxsoft.shardings(**said):
        close(value_and_gradients(one, placed), wanted, tolerance)


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
    """Keys and values travel to the other devices, twice; their gradients to all, and home. Nothing else moves."""
    devices, length = 8, 2**15  # the blocks of scores are of a constant size
    found = ring_costs(devices, length)
    part = 2 * length / devices * 4 * 64 * 4  # of keys and values, bytes
    assert set(found.moved) == {"collective-permute"}
    assert found.bytes_moved == (2 * (devices - 1) + devices) * part
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
    with pytest.raises(ValueError, match=r"query_positions must have shape \(4,\)"):
        ring(query_positions=jnp.arange(T))
    with pytest.raises(ValueError, match="length must be a multiple of 2 \\* devices, 8, got 12"):
        zigzag_positions(12, 4)
    with pytest.raises(TypeError, match="devices must be a static integer"):
        zigzag_positions(8, 2.0)
    auto = mesh_of("Auto", s=8)
    short, along = [a[:, :12] for a in (query, key, value)], P(None, "s")
    said = jaxsoft.shardings(query=along, key=along)
    with jax.set_mesh(auto), said, pytest.raises(ValueError, match="must have a length that its 8 devices"):
        dot_product_attention(*short)
