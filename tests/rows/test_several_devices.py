"""Logits on a mesh: values and gradients as on one device, and what compiled programs move, compute and store."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import float64
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import scaling
from jaxsoft._program import costs_of
from jaxsoft.losses import clip_loss, cross_entropy, distillation_loss, weighted_mean

# For each way to place a model: the axes of hidden and of weight, `[d, vocab]` (tied: `[vocab, d]`).
PLACEMENTS = {
    "vocabulary": (P("data"), P(None, "model")),
    "vocabulary and features": (P("data"), P("data", "model")),
    "tokens over both": (P(("data", "model")), P(None, "model")),
    "fsdp": (P(("data", "model")), P("data")),
    "replicated": (P("data"), P()),
    "hidden over features": (P("data", "model"), P()),
    "vocabulary over the rows' axis": (P("data"), P(None, "data")),
    "tied": (P("data"), P("model")),
    "tied, features": (P("data", "model"), P("model", "data")),
}
KINDS = ("Explicit", "Auto")
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
# Every placement on every mesh: with each kind of axes in both dtypes.
ON_MESHES = [
    (name, KINDS[(i + j) % 2], mesh, ("float32", "float64")[(i + j // 2) % 2])
    for i, name in enumerate(PLACEMENTS)
    for j, mesh in enumerate(MESHES)
]


def mesh_of(kind: str, data: int = 2, model: int = 4):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2)


def put(mesh, a, spec):
    return jax.device_put(a, NamedSharding(mesh, spec))


def operands(n=16, d=8, vocab=48, dtype="float32"):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, vocab, n)
    labels[3] = -100
    return (
        jnp.asarray(rng.normal(size=(n, d)), dtype),
        jnp.asarray(rng.normal(size=(d, vocab)), dtype),
        jnp.asarray(labels, jnp.int32),
    )


def by_rows(hidden, weight, labels, **options):
    logits = jaxsoft.linear_logits(hidden, weight, block_size=8, **options)
    return cross_entropy(logits, labels, label_smoothing=0.1).sum()


def summed(hidden, weight, labels, **options):
    logits = jaxsoft.linear_logits(hidden, weight, **options)
    return weighted_mean(cross_entropy, logits, labels, label_smoothing=0.1, chunk_size=4)


def both(hidden, weight, labels, **options):
    return by_rows(hidden, weight, labels, **options) + summed(hidden, weight, labels, **options)


def close(got, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@functools.cache
def one_device(dtype):
    return jax.jit(jax.value_and_grad(both, (0, 1)))(*operands(dtype=dtype))


@pytest.mark.parametrize(
    "name, kind, mesh, dtype", ON_MESHES, ids=lambda a: "x".join(map(str, a)) if isinstance(a, tuple) else a
)
def test_every_placement_is_one_device(name, kind, mesh, dtype):
    """Per-row loss and weighted mean; the gradients lie where the parameters do."""
    hidden_spec, weight_spec = PLACEMENTS[name]
    tied = name.startswith("tied")
    mesh = mesh_of(kind, *mesh)
    with float64() if dtype == "float64" else contextlib.nullcontext():
        hidden, weight, labels = operands(dtype=dtype)
        weight = weight.T if tied else weight
        said = {} if kind == "Explicit" else dict(hidden_sharding=hidden_spec, weight_sharding=weight_spec)
        f = jax.jit(jax.value_and_grad(functools.partial(both, transpose_weight=tied, **said), (0, 1)))
        placed = put(mesh, hidden, hidden_spec), put(mesh, weight, weight_spec)
        value, gradient = f(*placed, put(mesh, labels, P(hidden_spec[0])))
        assert gradient[1].dtype == dtype
        wanted = one_device(dtype)
        found = gradient[0], gradient[1].T if tied else gradient[1]
        close((value, found), wanted, 1e-5 if dtype == "float32" else 1e-10)
    if kind == "Explicit":
        assert jax.typeof(gradient[1]).sharding.spec == jax.typeof(placed[1]).sharding.spec


@pytest.mark.parametrize("vocab", [45, 3])
def test_columns_that_the_devices_do_not_divide(vocab):
    """Uneven shards, and fewer columns than devices; the labels' range is that of the whole row."""
    hidden, weight, _ = operands(vocab=vocab)
    labels = jnp.arange(16) % (vocab + 1)  # one beyond the last
    mesh = mesh_of("Auto", 1, 8)
    said = dict(hidden_sharding=NamedSharding(mesh, P()), weight_sharding=P(None, "model"))
    bias = jnp.linspace(-1, 1, vocab)

    def run(hidden, weight, bias, **said):
        logits = jaxsoft.linear_logits(hidden, weight, bias=bias, **said)
        where = jnp.arange(vocab) != 1
        loss = cross_entropy(logits, labels, where=where, label_smoothing=0.1)
        total = weighted_mean(
            cross_entropy, logits, jnp.minimum(labels, vocab - 1), where=where, label_smoothing=0.1
        )
        seen = labels != vocab
        return jnp.where(seen & (labels != 1), loss, 0).sum() + jnp.where(total == jnp.inf, 0, total), loss

    f = lambda **said: jax.jit(jax.value_and_grad(functools.partial(run, **said), (0, 1, 2), has_aux=True))
    got, wanted = f(**said)(hidden, weight, bias), f()(hidden, weight, bias)
    assert np.isnan(wanted[0][1]).sum() == (labels == vocab).sum()
    close(got, wanted)


def test_tied_weight_and_second_derivatives():
    hidden, weight, labels = operands()
    mesh = mesh_of("Explicit")

    def product(hidden, weight):
        f = lambda h: by_rows(h, weight, labels_there, transpose_weight=True)
        return jax.jvp(jax.grad(f), (hidden,), (hidden,))[1]

    labels_there = labels
    wanted = jax.jit(product)(hidden, weight.T)
    labels_there = put(mesh, labels, P("data"))
    close(jax.jit(product)(put(mesh, hidden, P("data")), put(mesh, weight.T, P("model"))), wanted)


def test_statistics_and_two_rows_on_a_mesh():
    """What returns several numbers per row, reads two heads, or reads rows and columns; leading axes kept."""
    hidden, weight, labels = operands()
    hidden, labels = hidden.reshape(4, 4, -1), jnp.maximum(labels, 0).reshape(4, 4)
    mesh = mesh_of("Explicit")
    square = hidden[0] @ hidden[0].T

    def run(hidden, weight, labels, square):
        logits = jaxsoft.linear_logits(hidden, weight)
        teacher = jaxsoft.linear_logits(-hidden, weight, temperature=2.0)
        return (
            jaxsoft.top_k(logits, 3),
            jaxsoft.label_rank(logits, labels),
            jaxsoft.log_prob(logits, labels),
            logits.argmax(-1),
            distillation_loss(logits, teacher),
            clip_loss(square),
        )

    wanted = jax.jit(run)(hidden, weight, labels, square)
    got = jax.jit(run)(
        put(mesh, hidden, P("data")),
        put(mesh, weight, P(None, "model")),
        put(mesh, labels, P("data")),
        put(mesh, square, P("data", "model")),
    )
    close(got, wanted)


def test_shardings_holds_for_what_is_called_inside():
    hidden, weight, labels = operands()
    mesh = mesh_of("Auto")
    on_mesh = put(mesh, hidden, P("data")), put(mesh, weight, P(None, "model")), put(mesh, labels, P("data"))
    with jax.set_mesh(mesh), jaxsoft.shardings(hidden=P("data"), weight=P(None, "model")):
        program = jax.jit(by_rows).lower(*on_mesh).compile()
    assert set(costs_of(program).moved) == {"all-reduce"}
    np.testing.assert_allclose(program(*on_mesh), by_rows(hidden, weight, labels), rtol=1e-6)


def with_more_scores(logits, labels, scores):
    return cross_entropy(logits, labels) + jaxsoft.logsumexp(scores)


def test_shardings_ends_where_each_device_has_its_part():
    """Stored scores that a loss of `weighted_sum` reads are a device's own rows, whatever is said of logits."""
    hidden, weight, labels = operands()
    mesh, scores = mesh_of("Auto"), hidden[:, :4]
    total = lambda *a: jaxsoft.losses.weighted_sum(with_more_scores, jaxsoft.linear_logits(*a[:2]), *a[2:])
    arrays, rows = (hidden, weight, labels, scores), P("data")
    on_mesh = [put(mesh, a, spec) for a, spec in zip(arrays, (rows, P(None, "model"), rows, rows))]
    said = dict(hidden=rows, weight=P(None, "model"), logits=P("data", "model"))
    with jax.set_mesh(mesh), jaxsoft.shardings(**said):
        got = jax.jit(jax.value_and_grad(total, (0, 1, 3)))(*on_mesh)
    close(got, jax.value_and_grad(total, (0, 1, 3))(*arrays))


def test_stored_logits():
    """The same as the array, in what an expression can do."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)), jnp.float32)
    logits = jaxsoft.stored_logits(x)
    temperatures = jnp.array([0.5, 1, 2])
    for got, wanted in (
        (logits / 2, x / 2),
        (logits * 3.0, x * 3),
        (logits / temperatures, x / temperatures[:, None]),
        (jaxsoft.temperature(logits, temperatures), jaxsoft.temperature(x, temperatures)),
        (jaxsoft.softcap(logits, 2.0), jaxsoft.softcap(x, 2.0)),
        (logits.astype(jnp.bfloat16), x.astype(jnp.bfloat16)),
    ):
        assert (got.shape, got.dtype, got.ndim) == ((3, 5), wanted.dtype, 2)
        close(jaxsoft.logsumexp(got), jaxsoft.logsumexp(wanted), 1e-6)
    with pytest.raises(ValueError, match="at least one axis"):
        jaxsoft.stored_logits(jnp.float32(1))
    with pytest.raises(TypeError, match="values must be"):
        jaxsoft.stored_logits([1.0])


def test_stored_logits_of_a_shard():
    """`axis_name` for scores that each device has computed for its own columns."""
    hidden, weight, labels = operands()
    mesh = mesh_of("Explicit")

    def local(hidden, weight, labels):
        logits = jaxsoft.stored_logits(hidden @ weight, axis_name="model")
        assert isinstance(logits, jaxsoft.rows.StoredLogits) and logits.shape == (8, 48)
        return cross_entropy(logits, labels), jaxsoft.top_k(logits, 2).indices

    f = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P(None, "model"), P("data")), out_specs=P("data")
    )
    got = jax.jit(f)(
        put(mesh, hidden, P("data")), put(mesh, weight, P(None, "model")), put(mesh, labels, P("data"))
    )
    dense = hidden @ weight
    close(got, (cross_entropy(dense, labels), jaxsoft.top_k(dense, 2).indices))


# --- what it costs -------------------------------------------------------------------------------------------

N, D, V = 1024, 256, 16384


def dense(hidden, weight, labels, **said):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, labels).mean()


def streamed(hidden, weight, labels, **said):
    return cross_entropy(jaxsoft.linear_logits(hidden, weight, **said), labels).mean()


def in_forward_pass(hidden, weight, labels, **said):
    return weighted_mean(cross_entropy, jaxsoft.linear_logits(hidden, weight, **said), labels)


@functools.cache
def costs(function, name, vocab=V):
    """Of value and gradients on 2 x 4 devices with Auto axes."""
    hidden_spec, weight_spec = PLACEMENTS[name]
    mesh = mesh_of("Auto")
    of = lambda shape, spec, dtype=jnp.float32: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    args = of((N, D), hidden_spec), of((D, vocab), weight_spec), of((N,), P(hidden_spec[0]), jnp.int32)
    said = dict(hidden_sharding=hidden_spec, weight_sharding=weight_spec)
    results = NamedSharding(mesh, P()), (args[0].sharding, args[1].sharding)
    f = jax.value_and_grad(functools.partial(function, **said), (0, 1))
    return costs_of(jax.jit(f, out_shardings=results).lower(*args).compile())


IDEAL = 6 * N * D * V / 8


def test_cost_of_a_sharded_vocabulary():
    plain, rows, total = (costs(f, "vocabulary") for f in (dense, streamed, in_forward_pass))
    assert rows.bytes_moved <= 1.1 * plain.bytes_moved
    assert rows.flops <= 1.4 * IDEAL
    assert rows.temporary <= 6e6
    assert total.bytes_moved <= 1.1 * plain.bytes_moved
    assert total.flops <= 1.05 * IDEAL
    assert total.temporary <= 30e6
    for c in (rows, total):
        assert set(c.moved) == {"all-reduce"}  # neither weight nor logits are gathered


def test_collectives_do_not_grow_with_the_blocks():
    """Twice the columns: twice the blocks, and as many collectives."""
    for f in (streamed, in_forward_pass):
        assert costs(f, "vocabulary").collectives == costs(f, "vocabulary", 2 * V).collectives


def test_cost_of_a_weight_sharded_over_features():
    """FSDP. A per-row loss reads the weight twice, so it gathers it twice; never whole.

    It receives as much as dense logits do, whose gradient is added up whole before it is cut.
    """
    plain, rows, total = (costs(f, "fsdp") for f in (dense, streamed, in_forward_pass))
    assert rows.temporary <= plain.temporary / 20
    assert total.received < rows.received <= 1.001 * plain.received
    assert rows.bytes_moved <= 1.25 * plain.bytes_moved
    assert total.bytes_moved <= plain.bytes_moved
    assert total.flops <= 1.05 * IDEAL


def test_cost_of_a_replicated_weight():
    """The axis "model" is not used: a quarter of the devices' work is one's share."""
    assert costs(in_forward_pass, "replicated").flops <= 1.05 * 4 * IDEAL


@pytest.mark.parametrize(
    "loss, placement",
    [
        (streamed, "vocabulary"),
        (in_forward_pass, "vocabulary"),
        (streamed, "fsdp"),
        (in_forward_pass, "fsdp"),
        (in_forward_pass, "replicated"),
    ],
)
def test_predictions_are_what_programs_do(loss, placement):
    """`python -m jaxsoft.scaling`: bytes and operations exactly, temporary memory to a third."""
    name = "cross_entropy" if loss is streamed else "weighted_mean"
    wanted, found = scaling.predict(scaling.Step(N, D, V, 2, 4), placement, name), costs(loss, placement)
    assert found.bytes_moved == pytest.approx(wanted.bytes_moved, rel=0.01)
    assert found.received == pytest.approx(wanted.received, rel=0.01)
    assert found.flops == pytest.approx(wanted.flops, rel=0.01)
    assert found.temporary == pytest.approx(wanted.temporary, rel=0.35)


def test_scaling_command(capsys):
    assert (
        scaling.main(["--devices", "4096", "--model", "8", "--tokens", "4194304", "--vocab", "131072"]) == 0
    )
    assert "512 x 8 devices" in capsys.readouterr().out
    with pytest.raises(ValueError, match="placement must be one of"):
        scaling.predict(scaling.Step(8, 8, 8, 1, 1), "rows")
    with pytest.raises(ValueError, match="at least 1"):
        scaling.predict(scaling.Step(8, 8, 8, 0, 1), "fsdp")


def test_top_k_moves_k_numbers_per_row_and_shard():
    mesh = mesh_of("Auto")
    of = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    def run(hidden, weight):
        return jaxsoft.top_k(
            jaxsoft.linear_logits(
                hidden, weight, hidden_sharding=P("data"), weight_sharding=P(None, "model")
            ),
            8,
        )

    program = jax.jit(run).lower(of((N, D), P("data")), of((D, V), P(None, "model"))).compile()
    shards, numbers_and_columns = 4, 2
    assert costs_of(program).bytes_moved <= shards * (N / 2) * 8 * numbers_and_columns * 4


def test_bytes_of_a_known_program():
    """The reader itself: a product, in a loop of five steps with one all-reduce each."""
    mesh = mesh_of("Auto", 1, 8)

    def local(x):
        step = lambda carry, _: (jax.lax.psum(carry @ carry, "model") / 8, None)
        return jax.lax.scan(step, x, length=5)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P()))
    f = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = costs_of(jax.jit(f).lower(x).compile())
    assert found.collectives == {"all-reduce": 5}
    assert found.moved == {"all-reduce": 5 * 64 * 64 * 4}
    assert found.received == 2 * 7 / 8 * found.bytes_moved
    assert found.flops == 5 * 2 * 64**3


# --- what goes wrong -----------------------------------------------------------------------------------------


def test_wrong_placements():
    hidden, weight, _ = operands()
    logits = functools.partial(jaxsoft.linear_logits, hidden, weight)
    auto, explicit = mesh_of("Auto"), mesh_of("Explicit")
    with pytest.raises(ValueError, match="needs a mesh"):
        jaxsoft.logsumexp(logits(weight_sharding=P(None, "model")))
    with pytest.raises(ValueError, match="names the axis 'vocab', but the mesh has"), jax.set_mesh(auto):
        jaxsoft.logsumexp(logits(weight_sharding=P(None, "vocab")))
    with pytest.raises(TypeError, match=r"hidden_sharding must be a jax\.sharding"):
        logits(hidden_sharding="data")
    with pytest.raises(ValueError, match="at most 2 entries"):
        jaxsoft.logsumexp(logits(weight_sharding=NamedSharding(auto, P(None, None, "model"))))
    with pytest.raises(ValueError, match="must divide their number: got 6"):
        jaxsoft.logsumexp(
            jaxsoft.linear_logits(hidden[:6], weight, hidden_sharding=NamedSharding(auto, P("model")))
        )
    with pytest.raises(ValueError, match="which is not Auto but Explicit"), jax.set_mesh(explicit):
        jaxsoft.logsumexp(logits(weight_sharding=P(None, "model")))
    with pytest.raises(ValueError, match="axis_name must name axes of the mesh of the surrounding"):
        logits(axis_name="model")

    def inside(hidden, weight, check_vma=True, **other):
        def local(hidden, weight):
            mine = jaxsoft.linear_logits(hidden, weight, axis_name="model")
            if other:
                return distillation_loss(mine, jaxsoft.linear_logits(hidden, jnp.tile(weight, 2), **other))
            return mine.dense()

        specs = dict(in_specs=(P("data"), P(None, "model")), out_specs=P("data"))
        return jax.shard_map(local, mesh=auto, check_vma=check_vma, **specs)(hidden, weight)

    with pytest.raises(TypeError, match=r"dense\(\) cannot store"):
        inside(hidden, weight)
    with pytest.raises(ValueError, match="check_vma=True"):
        inside(hidden, weight, check_vma=False)
    with pytest.raises(ValueError, match="on the same axes of the mesh"):
        inside(hidden, weight, axis_name="data")


def test_explain_says_where_rows_lie():
    mesh = mesh_of("Auto")
    hidden, weight, _ = operands()
    hidden, weight = put(mesh, hidden, P("data")), put(mesh, weight, P(None, "model"))

    def run(**said):
        with jax.set_mesh(mesh):
            f = lambda h, w: jaxsoft.logsumexp(jaxsoft.linear_logits(h, w, **said))
            (decision,) = jaxsoft.kernels.explain(f, hidden, weight)
        return decision.what

    assert "placed by the compiler" in run()
    assert "columns are sharded over model" in run(
        hidden_sharding=P("data"), weight_sharding=P(None, "model")
    )
