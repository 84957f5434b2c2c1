"""Every kernel lowers for TPUs, on a machine that has none: forward and backward, in blocks of their full size."""

import jax
import jax.numpy as jnp
import pytest
from attention.test_dot_product import NORMALIZERS
from helpers import is_float
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from rows.test_reductions import CASES, make_inputs

import jaxsoft
from jaxsoft import kernels, losses
from jaxsoft.attention import dot_product_attention
from jaxsoft.rows import reduce_rows

KINDS = ("TPU v5 lite", "TPU v6 lite")
ROWS, COLUMNS = 300, 1111  # ragged in blocks of 256 x 1024
SIZES = dict(zip(make_inputs()["entry_weights"].shape, (ROWS, COLUMNS)))


def lowered(f, *arrays, kind=KINDS[1]):
    """The text of `f` and its gradients, lowered for a device that is not there."""

    def both(*arrays):
        floats = tuple(i for i, a in enumerate(arrays) if is_float(a))

        def total(*arrays):
            out = f(*arrays)
            parts = [jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(out) if is_float(a)]
            return sum(parts, start=jnp.float32(0)), out

        return jax.grad(total, floats, has_aux=True)(*arrays)

    mesh = AbstractMesh(
        (1,), ("x",), abstract_device=AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(both).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def enlarged(a):
    return array(*(SIZES.get(size, size) for size in a.shape), dtype=jnp.float32 if is_float(a) else a.dtype)


def test_every_reduction():
    """All in one pass, of stored scores."""
    given = {
        f"{case.id}.{k}": enlarged(a) for case in CASES for k, a in make_inputs().items() if k in case.inputs
    }

    def f(x, *arrays):
        p = dict(zip(given, arrays))
        wanted = {case.id: case.make({k: p[f"{case.id}.{k}"] for k in case.inputs}) for case in CASES}
        out = reduce_rows(x, wanted, implementation="pallas_tpu")
        return [case.view(out[case.id]) for case in CASES]

    assert lowered(f, array(ROWS, COLUMNS), *given.values()).count("tpu_custom_call") == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_logits(transposed, kind):
    """A loss whose scores are a product of bfloat16, with all that may belong to it, and masks of every kind."""

    def f(hidden, weight, bias, scale, labels, rows, columns):
        logits = jaxsoft.linear_logits(
            hidden,
            weight,
            bias=bias,
            scale=scale,
            temperature=0.7,
            softcap=20.0,
            transpose_weight=transposed,
            implementation="pallas_tpu",
        )
        where = columns if transposed else rows[:, None] & columns
        return losses.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-3, where=where)

    shape = (3000, 256) if transposed else (256, 3000)
    arrays = (
        array(512, 256, dtype=jnp.bfloat16),
        array(*shape, dtype=jnp.bfloat16),
        array(3000),
        array(512),
        array(512, dtype=jnp.int32),
        array(512, dtype=bool),
        array(3000, dtype=bool),
    )
    assert lowered(f, *arrays, kind=kind).count("tpu_custom_call") == 2


SHAPES = dict(query=(2, 300, 8, 64), key=(2, 260, 2, 64), value=(2, 260, 2, 128))


def heads(dtype=jnp.bfloat16):
    return [array(*shape, dtype=dtype) for shape in SHAPES.values()]


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="all of them on the newest jax only: half a minute"
)
@pytest.mark.parametrize("name", [name for name in NORMALIZERS if "," not in name])
def test_normalizers(name):
    def f(q, k, v):
        return dot_product_attention(
            q, k, v, normalizer=NORMALIZERS[name], is_causal=True, implementation="pallas_tpu"
        )

    assert lowered(f, *heads()).count("tpu_custom_call") >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_attention_with_options(kind):
    """Everything that a tile of scores may read."""
    dynamic = dict(
        query_seq_lengths=array(2, dtype=jnp.int32),
        key_value_seq_lengths=array(2, dtype=jnp.int32),
        query_segment_ids=array(2, 300, dtype=jnp.int32),
        key_segment_ids=array(2, 260, dtype=jnp.int32),
        mask=array(2, 1, 300, 260, dtype=bool),
        query_offset=array(2, dtype=jnp.int32),
    )

    def f(q, k, v, bias, slopes, sinks, *rest):
        return dot_product_attention(
            q,
            k,
            v,
            bias,
            alibi_slopes=slopes,
            sinks=sinks,
            softcap=10.0,
            local_window_size=(100, 20),
            mask_fn=lambda i, j: (i + j) % 3 != 0,
            dropout_rate=0.1,
            dropout_key=jax.random.key(0),
            implementation="pallas_tpu",
            **dict(zip(dynamic, rest)),
        )

    floats = (array(1, 8, 300, 260, dtype=jnp.bfloat16), array(8), array(8))
    assert lowered(f, *heads(), *floats, *dynamic.values(), kind=kind).count("tpu_custom_call") == 3


@pytest.mark.parametrize("check", [True, False])
def test_rows_sharded_over_devices(check):
    device = AbstractDevice(device_kind=KINDS[1], num_cores=1, platform="tpu")
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)

    def local(h, w, labels, q):
        logits = jaxsoft.linear_logits(h, w, implementation="pallas_tpu")
        out = dot_product_attention(q, q, q, is_causal=True, implementation="pallas_tpu")
        return jax.lax.psum(losses.cross_entropy(logits, labels).sum() + out.sum(), "data")

    specs = (P("data"), P(), P("data"), P("data"))
    arrays = (array(600, 64), array(64, 3000), array(600, dtype=jnp.int32), array(4, 256, 4, 64))
    with jax.sharding.use_abstract_mesh(mesh):
        f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
        text = jax.jit(jax.grad(f, (0, 1, 3))).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 5


def test_sizes_of_the_user():
    def f(x):
        return jaxsoft.logsumexp(x, implementation="pallas_tpu")

    with kernels.block_sizes(rows=64, columns=256):
        text = lowered(f, array(ROWS, COLUMNS))
    assert text.count("tpu_custom_call") == 2
