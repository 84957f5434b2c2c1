"""Every kernel lowers for TPUs and GPUs, on a machine that has none: forward and backward, in blocks of full size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from attention.test_dot_product import NORMALIZERS
from helpers import is_float
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rows.test_reductions import CASES, make_inputs

import jaxsoft
from jaxsoft import kernels, losses
from jaxsoft.attention import dot_product_attention
from jaxsoft.rows import reduce_rows

pytestmark = pytest.mark.table


class Device(NamedTuple):
    kind: str
    platform: str
    lowered_for: str
    implementation: str
    call: str  # how the text begins that calls a kernel
    cores: int

    def __str__(self):
        return self.kind

    def mesh(self, size=1, **kwargs):
        device = AbstractDevice(device_kind=self.kind, num_cores=self.cores, platform=self.platform)
        return AbstractMesh((size,), ("data",), abstract_device=device, **kwargs)


TPUS = [
    Device(kind, "tpu", "tpu", "pallas_tpu", "@tpu_custom_call", 1) for kind in ("TPU v5 lite", "TPU v6 lite")
]
GPUS = [
    Device(kind, "gpu", "cuda", "mosaic_gpu", "@mosaic_gpu", 132) for kind in ("NVIDIA H100", "NVIDIA H200")
]
all_devices = pytest.mark.parametrize("device", [*TPUS, *GPUS], ids=str)
one_of_each = pytest.mark.parametrize("device", [TPUS[1], GPUS[1]], ids=str)

ROWS, COLUMNS = 300, 1111  # ragged in blocks of 256 x 1024
SIZES = dict(zip(make_inputs()["entry_weights"].shape, (ROWS, COLUMNS)))


def kernels_in(f, *arrays, device):
    """How many kernels `f` and its gradients have, lowered for a device that is not there."""

    def both(*arrays):
        floats = tuple(i for i, a in enumerate(arrays) if is_float(a))

        def total(*arrays):
            out = f(*arrays)
            parts = [jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(out) if is_float(a)]
            return sum(parts, start=jnp.float32(0)), out

        return jax.grad(total, floats, has_aux=True)(*arrays)

    with jax.sharding.use_abstract_mesh(device.mesh()):
        text = jax.jit(both).trace(*arrays).lower(lowering_platforms=(device.lowered_for,)).as_text()
    return text.count(device.call)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def enlarged(a):
    return array(*(SIZES.get(size, size) for size in a.shape), dtype=jnp.float32 if is_float(a) else a.dtype)


@one_of_each
@pytest.mark.parametrize("part", range(4))
def test_every_reduction(part, device):
    """A quarter of them in one pass, of stored scores."""
    cases = CASES[part::4]
    given = {
        f"{case.id}.{k}": enlarged(a) for case in cases for k, a in make_inputs().items() if k in case.inputs
    }

    def f(x, *arrays):
        p = dict(zip(given, arrays))
        wanted = {case.id: case.make({k: p[f"{case.id}.{k}"] for k in case.inputs}) for case in cases}
        out = reduce_rows(x, wanted, implementation=device.implementation)
        return [case.view(out[case.id]) for case in cases]

    assert kernels_in(f, array(ROWS, COLUMNS), *given.values(), device=device) == 2


@all_devices
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_logits(transposed, device):
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
            implementation=device.implementation,
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
    assert kernels_in(f, *arrays, device=device) == 2


SHAPES = dict(query=(2, 300, 8, 64), key=(2, 260, 2, 64), value=(2, 260, 2, 128))


def heads(dtype=jnp.bfloat16):
    return [array(*shape, dtype=dtype) for shape in SHAPES.values()]


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="all of them on the newest jax only: more than a minute"
)
@one_of_each
@pytest.mark.parametrize("name", [name for name in NORMALIZERS if "," not in name])
def test_normalizers(name, device):
    def f(q, k, v):
        return dot_product_attention(
            q, k, v, normalizer=NORMALIZERS[name], is_causal=True, implementation=device.implementation
        )

    assert kernels_in(f, *heads(), device=device) >= 3


@pytest.mark.whole
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="as above")
def test_a_count_of_the_columns_of_tiles_that_no_mask_cuts():
    """There it is one number for all rows: of the columns that are no padding."""

    def f(q, k, v):
        options = dict(normalizer=NORMALIZERS["sparsemax"], is_causal=True, implementation="mosaic_gpu")
        return dot_product_attention(q, k, v, **options)

    device = next(d for d in GPUS if d.implementation == "mosaic_gpu")
    assert kernels_in(f, *heads(), device=device) >= 3


@all_devices
def test_attention_with_options(device):
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
            implementation=device.implementation,
            **dict(zip(dynamic, rest)),
        )

    floats = (array(1, 8, 300, 260, dtype=jnp.bfloat16), array(8), array(8))
    assert kernels_in(f, *heads(), *floats, *dynamic.values(), device=device) == 3


@one_of_each
@pytest.mark.parametrize("width", [128, 256])
def test_masks_and_biases_of_long_rows(width, device):
    """Tiles of the backend's own choice, which differ from the caller's for 256 features."""

    def f(q, k, v, mask, bias):
        return dot_product_attention(q, k, v, bias, mask=mask, implementation=device.implementation)

    head = array(1, 1024, 2, width, dtype=jnp.bfloat16)
    beside = array(1, 2, 1024, 1024, dtype=bool), array(1, 2, 1024, 1024)
    assert kernels_in(f, head, head, head, *beside, device=device) == 3


def ones(tree):
    return jax.tree.map(jnp.ones_like, tree)


def total(tree):
    return sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(tree))


# Transforms of a function of operands, and how many kernels they have: two forward passes, and backward one of the
# head and two of attention. Forward mode and what it is applied to add none.
TRANSFORMS = {
    "grad": (5, lambda f: jax.grad(f)),
    "checkpoint": (5, lambda f: jax.grad(jax.checkpoint(f))),
    "vmap of grad": (5, lambda f: jax.vmap(jax.grad(f), in_axes=({"h": 0, "w": None, "q": None},))),
    "jvp": (2, lambda f: lambda p: jax.jvp(f, (p,), (ones(p),))[1]),
    "forward over reverse": (2, lambda f: lambda p: jax.jvp(jax.grad(f), (p,), (ones(p),))[1]),
    "reverse over forward": (5, lambda f: jax.grad(lambda p: jax.jvp(f, (p,), (ones(p),))[1])),
    "reverse over reverse": (5, lambda f: jax.grad(lambda p: total(jax.grad(f)(p)))),
}


@one_of_each
@pytest.mark.parametrize(("name", "check"), [(name, True) for name in TRANSFORMS] + [("grad", False)])
def test_rows_sharded_over_devices(name, check, device):
    """In every transform, gradients are summed over the devices once; ordinary operations store no scores."""
    count, transform = TRANSFORMS[name]
    mesh = device.mesh(2, axis_types=(AxisType.Auto,))

    def local(p, labels):
        logits = jaxsoft.linear_logits(p["h"], p["w"], block_size=512, implementation=device.implementation)
        out = dot_product_attention(*[p["q"]] * 3, is_causal=True, implementation=device.implementation)
        return jax.lax.psum(losses.cross_entropy(logits, labels).sum() + total(out), "data")

    specs = (dict(h=P("data"), w=P(), q=P("data")), P("data"))
    half = jnp.bfloat16
    operands = dict(
        h=array(600, 64, dtype=half), w=array(64, 3000, dtype=half), q=array(4, 384, 4, 64, dtype=half)
    )
    if name.startswith("vmap"):
        operands["h"] = array(2, 600, 64, dtype=half)

    def transformed(p, labels):
        f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
        return transform(lambda p: f(p, labels))(p)

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(transformed).trace(operands, array(600, dtype=jnp.int32))
        text = traced.lower(lowering_platforms=(device.lowered_for,)).as_text()
    assert text.count(device.call) == count
    assert text.count("all_reduce") == (1 if check else 2)
    if count == 2:  # a kernel's backward pass stores the gradient of a stretch of columns
        assert "300x3000x" not in text and "384x384x" not in text


@one_of_each
def test_columns_and_keys_sharded_over_devices(device):
    """Kernels read a shard of the columns, and one shard of the keys after another in a ring."""
    mesh, half = device.mesh(2, axis_types=(AxisType.Auto,)), jnp.bfloat16

    def local(h, w, q, labels):
        logits = jaxsoft.linear_logits(h, w, axis_name="data", implementation=device.implementation)
        out = dot_product_attention(q, q, q, axis_name="data", implementation=device.implementation)
        return losses.cross_entropy(logits, labels).sum() + jax.lax.psum(total(out), "data")

    specs = (P(), P(None, "data"), P(None, "data"), P())
    f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    operands = array(600, 64, dtype=half), array(64, 3000, dtype=half), array(2, 768, 4, 64, dtype=half)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(f, (0, 1, 2))).trace(*operands, array(600, dtype=jnp.int32))
        text = traced.lower(lowering_platforms=(device.lowered_for,)).as_text()
    # Of the head one forward and one backward; of the ring, whose last step stands outside its loop, two forward and
    # twice two backward.
    assert text.count(device.call) == 8
    assert "600x1500xf32" not in text and "384x384x" not in text


def test_a_ring_that_no_kernel_runs():
    """Blocks that suit the kernel that was likely to run are cut anew, biases and masks of every shard too."""
    device = GPUS[1]
    mesh = device.mesh(2, axis_types=(AxisType.Auto,))
    options = dict(axis_name="data", mask_fn=jax.numpy.greater_equal, softcap=3.0)

    def local(q, bias, mask):
        return dot_product_attention(q, q, q, bias, mask, **options)

    along = P(None, "data")
    f = jax.shard_map(local, mesh=mesh, in_specs=(along, P(), P()), out_specs=along)
    arrays = array(1, 8192, 4, 64), array(1, 1, 1, 8192), array(1, 1, 1, 8192, dtype=jnp.bool_)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(lambda *a: f(*a)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        (decision,) = jaxsoft.kernels.explain(f, *arrays)
    assert text.count(device.call) == 0 and "collective_permute" in text
    assert decision.implementation == "xla" and "float32" in decision.reasons["mosaic_gpu"]


@one_of_each
def test_arrays_on_a_mesh(device):
    """Explicit axes by the types, Auto axes by what the user says: a kernel for each device's rows."""
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = device.mesh(2, axis_types=(kind,))
        x = jax.ShapeDtypeStruct((600, 1024), jnp.float32, sharding=NamedSharding(mesh, P("data")))
        said = {"logits": P("data")} if kind == AxisType.Auto else {}
        with jax.sharding.use_abstract_mesh(mesh), jaxsoft.shardings(**said):
            f = lambda x: jaxsoft.logsumexp(x, implementation=device.implementation)
            text = jax.jit(f).trace(x).lower(lowering_platforms=(device.lowered_for,)).as_text()
        assert text.count(device.call) == 1


@one_of_each
def test_a_frozen_operand_costs_nothing(device):
    """Neither its sweep over the scores of an attention, nor its product of the gradient of a head."""

    def lowered(f, *arrays):
        with jax.sharding.use_abstract_mesh(device.mesh()):
            return (
                jax.jit(jax.grad(f)).trace(*arrays).lower(lowering_platforms=(device.lowered_for,)).as_text()
            )

    def attended(q, k, v):
        return total(dot_product_attention(q, k, v, implementation=device.implementation))

    def of_head(hidden, weight):
        logits = jaxsoft.linear_logits(hidden, weight, implementation=device.implementation)
        return total(jaxsoft.logsumexp(logits))

    # Before 0.12, JAX leaves a TPU's call whose results nobody reads to XLA.
    left = device.platform == "tpu" and jax.__version_info__ < (0, 12)
    assert lowered(attended, *heads()).count(device.call) == 2 + left
    half = jnp.bfloat16
    text = lowered(of_head, array(512, 256, dtype=half), array(256, 3000, dtype=half))
    assert text.count("stablehlo.dot_general") == 1


@one_of_each
def test_sizes_of_the_user(device):
    def f(x):
        return jaxsoft.logsumexp(x, implementation=device.implementation)

    with kernels.block_sizes(rows=64, columns=256):
        assert kernels_in(f, array(ROWS, COLUMNS), device=device) == 2
