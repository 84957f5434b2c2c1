"""Which implementation runs, what the reasons are, and what is refused before anything runs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import kernels, losses
from jaxsoft.attention import dot_product_attention
from jaxsoft.rows import RowReduction, reduce_rows, reductions

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 20)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(20, 9)), jnp.float32)
HEADS = jnp.zeros((1, 4, 2, 8))


def lse(x, **options):
    return jaxsoft.logsumexp(x, **options)


def linear(x, **options):
    return jaxsoft.logsumexp(jaxsoft.linear_logits(x, W, **options))


def attention(x, **options):
    del x
    return dot_product_attention(HEADS, HEADS, HEADS, **options)


PASSES = dict(dense=(lse, "dense"), linear=(linear, "linear"), attention=(attention, "attention"))


@pytest.mark.parametrize("name", PASSES)
def test_a_cpu_runs_xla_and_says_why(name):
    f, word = PASSES[name]
    for within in (False, True):  # the interpreter is for those who ask for it
        if within:
            with kernels.interpreted():
                decisions = kernels.explain(f, X)
        else:
            decisions = kernels.explain(f, X)
        assert all(isinstance(d, kernels.Decision) for d in decisions)
        assert {d.implementation for d in decisions} == {"xla"}
        for d in decisions:
            assert word in d.what and {*d.reasons} - {"cudnn"} == {"pallas_tpu", "mosaic_gpu"}
            assert "TPU" in d.reasons["pallas_tpu"] and "GPU" in d.reasons["mosaic_gpu"]
            assert all("CPU" in reason and name in str(d) for name, reason in d.reasons.items())


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("implementation", ["pallas_tpu", "mosaic_gpu"])
def test_asked_for_without_the_device(name, implementation):
    f, word = PASSES[name]
    with pytest.raises(ValueError, match=f"{implementation}.*cannot run.*{word}.*needs a .PU, this is a CPU"):
        f(X, implementation=implementation)


@pytest.mark.parametrize("f", [lse, linear, attention])
def test_an_unknown_name(f):
    with pytest.raises(ValueError, match=r"implementation must be .*pallas_tpu.*got 'cuda'"):
        f(X, implementation="cuda")


def test_explain_of_what_was_asked_for():
    decisions = kernels.explain(lse, X, implementation="xla")
    assert [d.implementation for d in decisions] == ["xla"]
    assert all("was requested" in reason for reason in decisions[0].reasons.values())
    with kernels.interpreted():
        (decision,) = kernels.explain(lse, X, implementation="pallas_tpu")
    assert decision.implementation == "pallas_tpu" and set(decision.reasons) == {"mosaic_gpu"}
    (decision,) = kernels.explain(lse, jax.ShapeDtypeStruct((4, 8), jnp.bfloat16))
    assert decision.implementation == "xla"


def test_explain_sees_what_was_traced_before_and_traces_loops_once():
    f = jax.jit(lse)
    f(X)
    for _ in range(2):
        assert len(kernels.explain(f, X)) == 1
    traced = []

    def body(carry, row):
        traced.append(row)
        return carry + lse(row), None

    decisions = kernels.explain(lambda x: jax.lax.scan(body, 0.0, x)[0], X)
    assert len(decisions) == 1 and len(traced) < len(X)


def test_a_tpu_that_is_too_old():
    device = AbstractDevice(device_kind="TPU v3", num_cores=2, platform="tpu")
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)),
        pytest.raises(ValueError, match="v5e and later, this is 'TPU v3'"),
    ):
        jax.eval_shape(lambda x: lse(x, implementation="pallas_tpu"), X)


# --- what a kernel cannot run --------------------------------------------------------------------------------


def refused(words, f, *args, **kwargs):
    """It is refused where it is asked for, and only there."""
    with kernels.interpreted():
        with pytest.raises(ValueError, match=f"cannot run.*{words}"):
            f(*args, implementation="pallas_tpu", **kwargs)
        f(*args, implementation="xla", **kwargs)


def test_float64(x64):
    for f in (lse, linear, attention):
        assert jnp.zeros(1).dtype == jnp.float64
        heads = jnp.zeros((1, 4, 2, 8), jnp.float64)
        wide = jnp.asarray(X, jnp.float64)
        if f is attention:
            refused("float64 was given", lambda **how: dot_product_attention(heads, heads, heads, **how))
        else:
            refused("float64 was given", f, wide)


def sorting_update(state, tile):
    return state + jnp.sort(tile.x, axis=-1)[..., 0]


def wide_init(like):
    return jnp.zeros((*like.shape, 2, 3))


def drifting_update(state, tile):
    return (state + tile.sum(tile.x)).astype(jnp.bfloat16)


def starts_at_zero(like):
    return like


def keeps(state, tile):
    return state


@pytest.mark.parametrize(
    "reduction, words",
    [
        (RowReduction(starts_at_zero, sorting_update), "has no sort"),
        (RowReduction(wide_init, keeps), r"shape \(6, 2, 3\)"),
        (reductions.top_k(33), "at most 32 numbers per row, got 33"),
    ],
)
def test_reductions_that_do_not_fit(reduction, words):
    refused(words, reduce_rows, X, reduction)


def test_a_state_that_changes_its_dtype():
    with kernels.interpreted(), pytest.raises(ValueError, match="changes its dtype or shape"):
        reduce_rows(X, RowReduction(starts_at_zero, drifting_update), implementation="pallas_tpu")


def test_two_expressions():
    def divergence(implementation):
        first = jaxsoft.linear_logits(X, W, implementation=implementation)
        second = reductions.relative_entropy(jaxsoft.linear_logits(2 * X, W))
        return reduce_rows(first, second).divergence

    refused("two linear_logits are read in one pass", divergence)


def test_explicitly_sharded_operands():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        refused("Pallas' interpreter does not run inside jax.shard_map", lse, x)


def test_operands_that_the_compiler_partitions():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    words = "every device would compute all rows of arrays on Auto mesh axes: call .* jax.shard_map"
    for f in (lse, linear, jax.jit(lse, static_argnames="implementation")):
        refused(words, f, x)
    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with kernels.interpreted():
        lse(jax.device_put(X, NamedSharding(one, P("data"))), implementation="pallas_tpu")


def test_nothing_to_read():
    refused("nothing to read", lse, jnp.zeros((0, 4)))
    refused("nothing to read", lse, jnp.zeros((4, 0)))


def test_too_many_features():
    hidden, weight = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 2**16), (2**16, 512)))

    def f(hidden, weight):
        return jaxsoft.logsumexp(jaxsoft.linear_logits(hidden, weight, implementation="pallas_tpu"))

    with kernels.interpreted(), pytest.raises(ValueError, match="65536 features leave no room for a tile"):
        jax.eval_shape(f, hidden, weight)


# --- imports, arguments --------------------------------------------------------------------------------------


def test_pallas_is_imported_by_the_kernels_only():
    """Importing jaxsoft, runs on XLA and `explain` do not import Pallas, and work without it."""
    program = """
import sys
import jax, jax.numpy as jnp
sys.modules["jax.experimental.pallas"] = None  # whoever imports it gets an ImportError
import jaxsoft
from jaxsoft import kernels, losses, attention
x = jnp.ones((3, 8))
jax.grad(lambda h: losses.cross_entropy(jaxsoft.linear_logits(h, x.T), jnp.zeros(3, int)).sum())(x)
attention.dot_product_attention(*[jnp.ones((1, 4, 1, 8))] * 3)
decisions = kernels.explain(jaxsoft.logsumexp, x)
assert [d.implementation for d in decisions] == ["xla"], decisions
assert not any(name.startswith("jaxsoft.kernels.tpu") for name in sys.modules)
del sys.modules["jax.experimental.pallas"]
with kernels.interpreted():
    jaxsoft.logsumexp(x, implementation="pallas_tpu")
assert "jax.experimental.pallas.tpu" in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "sizes, error, words",
    [
        (dict(rows=0), ValueError, ("rows", ">= 1", "0")),
        (dict(columns=1.5), TypeError, ("columns", "integer", "1.5")),
        (dict(rows=True), TypeError, ("rows",)),
    ],
)
def test_bad_sizes_of_blocks(sizes, error, words):
    with pytest.raises(error) as caught, kernels.block_sizes(**sizes):
        pass
    assert all(word in str(caught.value) for word in words), caught.value


def test_sizes_and_interpreter_end_with_their_block():
    with kernels.interpreted(), kernels.block_sizes(rows=4, columns=8):
        inside = lse(X, implementation="pallas_tpu")
    np.testing.assert_allclose(inside, lse(X), rtol=1e-6)
    with pytest.raises(ValueError, match="needs a TPU"):
        lse(X, implementation="pallas_tpu")


def test_programs_compiled_inside_a_context_end_with_it():
    logits = jaxsoft.linear_logits(X, W, implementation="pallas_tpu")

    def total():  # called by new functions, since `eval_shape` remembers a function that it traced
        return losses.weighted_sum(losses.cross_entropy, logits, jnp.zeros(6, jnp.int32))

    with kernels.interpreted():
        jax.eval_shape(lambda: total())
    with pytest.raises(ValueError, match="needs a TPU"):
        jax.eval_shape(lambda: total())


def test_losses_take_the_implementation_of_their_logits():
    def f(h, implementation):
        logits = jaxsoft.linear_logits(h, W, implementation=implementation)
        return losses.cross_entropy(logits / 0.5, jnp.zeros(6, jnp.int32))

    with kernels.interpreted():
        decisions = kernels.explain(lambda h: f(h, "pallas_tpu"), X)
    assert decisions and {d.implementation for d in decisions} == {"pallas_tpu"}
