"""XLA's block sizes: a CPU's own, and those of GPUs and TPUs, which a stated memory bounds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jaxsoft
from jaxsoft import losses
from jaxsoft.attention import _run, dot_product_attention
from jaxsoft.kernels import _tables
from jaxsoft.kernels.inner import BLOCK_SCORES, evenly
from jaxsoft.rows import _weighted

KINDS = {"NVIDIA A100-SXM4-80GB": "gpu", "AMD Instinct MI300X": "gpu", "TPU v5 lite": "tpu"}


def on(kind):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=KINDS[kind])
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def loops(f, *args):
    """The numbers of steps of the loops in a function."""
    found = []

    def visit(jaxpr):
        for e in jaxpr.eqns:
            if e.primitive.name == "scan":
                found.append(e.params["length"])
            for sub in jax.tree.leaves(list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    visit(sub)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return found


def of_logits(f, n, d, v):
    """`f(logits)` of `linear_logits` with that many rows, features and columns, which are not stored."""
    found = []
    jax.eval_shape(lambda h, w: found.append(f(jaxsoft.linear_logits(h, w))), struct(n, d), struct(d, v))
    return found[0]


def test_evenly():
    assert [evenly(n, 100, 8) for n in (1, 8, 99, 100, 101, 1000, 1001)] == [8, 8, 104, 104, 56, 104, 96]
    assert evenly(0, 100, 8) == 0


class TestAttention:
    @pytest.mark.parametrize(
        "rows, t, s, expected",
        [
            (1, 8192, 8192, (512, 256)),
            (64, 8192, 8192, (256, 128)),
            (4096, 1000, 1000, (64, 32)),
            (2048, 1, 32768, (1, 2048)),
            (8, 100, 70, (104 - 4, 70)),
        ],
    )
    def test_of_a_cpu(self, rows, t, s, expected):
        assert _run._xla_block_sizes((None, None), rows, t, s) == expected

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "rows, t, s, expected",
        [
            (64, 8192, 8192, (512, 1024)),
            (128, 2048, 2048, (512, 512)),
            (1, 8192, 8192, (1024, 2048)),
            (32, 131072, 131072, (1024, 1024)),
            (2048, 1, 32768, (1, 16384)),
            (16, 300, 260, (300, 260)),
        ],
    )
    def test_of_others(self, kind, rows, t, s, expected):
        with on(kind):
            bq, bk = _run._xla_block_sizes((None, None), rows, t, s)
            given = _run._xla_block_sizes((100, 2000), rows, t, s)
        assert (bq, bk) == expected
        assert rows * bq * bk <= BLOCK_SCORES
        assert given == (min(100, t), min(2000, s))

    def test_steps(self):
        q = struct(4, 8192, 16, 128)
        with on("NVIDIA A100-SXM4-80GB"):
            f = functools.partial(dot_product_attention, is_causal=True)
            assert loops(f, q, q, q) == [72]  # of 16 x 8 pairs, some are hidden; a CPU would have 272
            key = struct(64, 32768, 8, 128)
            assert loops(dot_product_attention, struct(64, 1, 32, 128), key, key) == [2]


class TestHeads:
    def block(self, n, d, v):
        return of_logits(lambda logits: logits._default_block_size(n), n, d, v)

    def test_of_a_cpu(self):
        sizes = [self.block(n, 64, 131072) for n in (1, 2048, 4096, 8192, 10**6)]
        assert sizes == [512, 512, 512, 256, 128]

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_others(self, kind):
        with on(kind):
            assert self.block(8192, 4096, 131072) == 4096
            assert self.block(32, 4096, 131072) == 131072
            assert self.block(8192, 768, 50257) == 3968  # 13 of about equal size
            assert self.block(10**6, 64, 1000) == 128
            for n in (1, 100, 5000, 2**18):
                assert n * self.block(n, 64, 10**6) <= BLOCK_SCORES + 128 * n

    def test_steps(self):
        def loss(h, w):
            return losses.cross_entropy(jaxsoft.linear_logits(h, w), jnp.zeros(8192, int)).sum()

        arrays = struct(8192, 64), struct(64, 131072)
        with on("NVIDIA A100-SXM4-80GB"):
            assert loops(loss, *arrays) == [32]
        assert loops(loss, *arrays) == [512]


class TestWeightedSum:
    def rows(self, n, d, v):
        return of_logits(_weighted._chunk_rows, n, d, v)

    def test_of_a_cpu(self):
        assert self.rows(10**6, 4096, 1000) == 512

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_others(self, kind):
        with on(kind):
            assert self.rows(8192, 4096, 32768) == 8192  # n <= 2 D: all at once
            assert self.rows(8192, 4096, 131072) == 4096  # 2 GiB
            assert self.rows(9000, 2304, 32768) == 4504  # two chunks of about equal size
            assert self.rows(65536, 64, 32768) == 512
            assert self.rows(65536, 4096, 2**25) == 512

    def test_steps(self):
        def loss(h, w):
            return losses.weighted_sum(
                losses.cross_entropy, jaxsoft.linear_logits(h, w), jnp.zeros(8192, int)
            )

        with on("NVIDIA A100-SXM4-80GB"):  # two chunks; in each, blocks are read, and pulled back
            found = loops(jax.grad(loss), struct(8192, 4096), struct(4096, 131072))
        assert found == [2, 16, 16]


def test_a_kernel_that_does_not_run_leaves_no_blocks_behind(monkeypatch, tmp_path):
    """Block sizes are fixed before the implementation is known: XLA cuts them anew."""
    keys = jax.random.split(jax.random.key(0), 8)

    def normal(i, *shape):
        return jax.random.normal(keys[i], shape)

    operands = (normal(0, 2, 150, 4, 8), normal(1, 2, 139, 2, 8), normal(2, 2, 139, 2, 6))
    operands += (normal(3, 1, 4, 150, 139), normal(4, 4))
    others = dict(
        mask=jax.random.bernoulli(keys[5], 0.8, (2, 1, 150, 139)),
        query_segment_ids=jnp.sort(jax.random.randint(keys[6], (2, 150), 0, 3)),
        key_segment_ids=jnp.sort(jax.random.randint(keys[7], (2, 139), 0, 3)),
        query_seq_lengths=jnp.array([150, 77]),
        key_value_seq_lengths=jnp.array([100, 139]),
        scale=jnp.array([0.2, 0.3, 0.4, 0.5]),
        normalizer=jaxsoft.scalable_softmax,  # counts the visible keys
    )

    def run(*operands):
        *arrays, slopes = operands
        return dot_product_attention(*arrays, alibi_slopes=slopes, **others)

    expected = jax.jit(run)(*operands)
    sizes = []
    monkeypatch.setattr(_run, "likely", lambda *a: True)
    kernel_sizes = _run._kernel_block_sizes
    monkeypatch.setattr(_run, "_kernel_block_sizes", lambda *a: sizes.append(kernel_sizes(*a)) or sizes[-1])
    found = jax.jit(lambda *a: run(*a))(*operands)
    assert sizes == [(64, 128)]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_refused_kernel_leaves_no_blocks_behind(monkeypatch, tmp_path):
    q = struct(4, 8192, 16, 128, dtype=jnp.float32)  # no kernel multiplies float32 on a GPU
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    monkeypatch.setenv("JAXSOFT_TUNING", str(tmp_path))
    _tables.forget()
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        (decision,) = jaxsoft.kernels.explain(dot_product_attention, q, q, q)
        assert decision.implementation == "xla" and "float32" in decision.reasons["mosaic_gpu"]
        assert math.prod(loops(dot_product_attention, q, q, q)) == 128
    _tables.forget()


@pytest.mark.parametrize("kind, name", [("NVIDIA H200", "mosaic_gpu"), ("TPU v5 lite", "pallas_tpu")])
@pytest.mark.parametrize("work", ["dense", "linear"])
def test_block_sizes_that_do_not_fit(kind, name, work):
    def f(hidden, weight, implementation=None):
        if work == "dense":
            return jaxsoft.logsumexp(hidden, implementation=implementation)
        return jaxsoft.logsumexp(jaxsoft.linear_logits(hidden, weight, implementation=implementation))

    arrays = struct(8192, 8192), struct(8192, 8192)
    device = AbstractDevice(
        device_kind=kind, num_cores=1, platform="gpu" if kind.startswith("NVIDIA") else "tpu"
    )
    mesh = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))
    with mesh, jaxsoft.kernels.block_sizes(rows=5000, columns=5000):
        (decision,) = jaxsoft.kernels.explain(f, *arrays)
        with pytest.raises(ValueError, match=f"'{name}' cannot run .*5000"):
            jax.eval_shape(functools.partial(f, implementation=name), *arrays)
    assert decision.implementation == "xla"
    assert "5000" in decision.reasons[name]
