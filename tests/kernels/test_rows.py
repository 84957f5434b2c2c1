"""Row reductions in the TPU's kernels, interpreted, against XLA: values, gradients, ragged sizes, masks, NaN beyond."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations, matrix_products
from jax.sharding import PartitionSpec as P
from kernels.compare import close, run, same
from rows.test_reductions import CASES, given_of, make_scores, some_function

import jaxsoft
from jaxsoft import losses
from jaxsoft.attention import dot_product_attention
from jaxsoft.rows import RowReduction, _sweeps, reduce_rows, reductions

INF, NAN = np.inf, np.nan
BLOCKS = dict(rows=8, columns=128)


# --- every reduction -----------------------------------------------------------------------------------------


@functools.cache
def every_reduction():
    """All of them in one pass over 6 x 11 scores in tiles of 4 x 4: results by implementation and case."""

    def f(p, implementation):
        wanted = {case.id: case.make({k: p[f"{case.id}.{k}"] for k in case.inputs}) for case in CASES}
        out = reduce_rows(p["x"], wanted, implementation=implementation)
        return {case.id: case.view(out[case.id]) for case in CASES}

    point = {f"{case.id}.{k}": v for case in CASES for k, v in given_of(case).items()} | {"x": make_scores()}
    return [run(f, point, name, rows=4, columns=4) for name in ("pallas_tpu", "xla")]


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_reduction(case):
    """Scores with ties, absent entries and a row without any; the gradients of every input array."""
    (got, got_gradient), (expected, gradient) = every_reduction()
    close(got[case.id], expected[case.id])
    names = [f"{case.id}.{name}" for name in case.inputs if f"{case.id}.{name}" in gradient]
    close([got_gradient[name] for name in names], [gradient[name] for name in names])


def test_equal_scores_of_several_tiles():
    """The first columns are the best, and the gradient is theirs."""

    def f(p, implementation):
        return reduce_rows(p["x"], reductions.top_k(3), implementation=implementation)

    x = jnp.asarray(np.random.default_rng(2).integers(0, 2, (6, 11)), jnp.float32).at[0].set(0)
    got, _ = same(f, {"x": x}, 0, rows=4, columns=4)
    np.testing.assert_array_equal(got.indices, jax.lax.top_k(x, 3)[1])


def test_every_reduction_with_one_gradient():
    (_, got), (_, expected) = every_reduction()
    close(got["x"], expected["x"], 16)  # the sum of some fifty shares
    assert jnp.all(got["x"][3] == 0)  # the row without entries


# --- sizes, dtypes and masks ---------------------------------------------------------------------------------


def chosen(p, columns, *names):
    """Reductions of every kind: sums, selections, integer states, states of several numbers; arrays of every kind."""
    ids = (jnp.arange(p["theta"].shape[0], dtype=jnp.int32) * 7) % columns
    wanted = {
        "label": reductions.label_statistics(ids),
        "take": reductions.take(jnp.stack([ids, columns - 1 - ids], axis=-1)),
        "moments": reductions.softmax_moments(),
        "best": reductions.top_k(2),
        "mapped": reductions.mapped_sum(
            some_function, p["theta"], col_args=(p["by_column"],), entry_args=(p["by_entry"],)
        ),
        # A row that lacks entries of its own; those absent from it alone cost nothing in this direction.
        "second": reductions.relative_entropy(
            jnp.where(p["by_entry"] < 0.3, -INF, 3 * p["by_entry"]), reverse=True
        ),
    }
    return {name: wanted[name] for name in names or wanted}


def arrays_for(rng, n, columns):
    return dict(
        theta=jnp.asarray(rng.normal(size=n), jnp.float32),
        by_column=jnp.asarray(0.1 + rng.random(columns), jnp.float32),
        by_entry=jnp.asarray(rng.random((n, columns)), jnp.float32),
    )


def masks_for(kind, rng, n, columns):
    """Options of `reduce_rows`, and the entries that they leave."""
    rows, cols = jnp.arange(n) % 4 != 2, jnp.asarray(rng.random(columns) < 0.8)
    if kind == "rows":
        return dict(where=rows[:, None]), rows[:, None]
    if kind == "rows and columns":
        return dict(where=cols, row_where=rows), rows[:, None] & cols
    if kind == "entries":
        keep = rows[:, None] & jnp.asarray(rng.random((n, columns)) < 0.7)
        return dict(where=keep), keep
    return {}, jnp.ones((1, 1), bool)


def assert_clean(gradients):
    for name, gradient in gradients.items():
        assert jnp.all(jnp.isfinite(gradient)), name


# Both compute in float32: bfloat16 gradients are one rounding of numbers that agree to a few units of float32, so
# that they are the same or neighbours.


@pytest.mark.parametrize(
    ("n", "columns", "mask", "dtype", "names"),
    [
        (13, 300, None, jnp.float32, ("label", "take", "moments", "best", "mapped")),
        (1, 1, "rows", jnp.float32, ("label", "best")),
        (8, 128, "entries", jnp.bfloat16, ("label", "mapped")),
        (9, 129, "entries", jnp.float32, ("second",)),
        (9, 129, "rows and columns", jnp.float16, ("moments", "mapped")),
    ],
)
def test_dense_rows(n, columns, mask, dtype, names):
    """Ragged or not, with NaN under the masks, absent entries, and a row without any."""
    rng = np.random.default_rng(n)
    options, keep = masks_for(mask, rng, n, columns)
    x = jnp.asarray(rng.normal(size=(n, columns)) * 3, dtype)
    if columns > 1:
        x = x.at[:, 3].set(-INF).at[n - 1].set(-INF)
    given = dict(x=jnp.where(keep, x, NAN), **arrays_for(rng, n, columns))

    def f(p, implementation):
        return reduce_rows(p["x"], chosen(p, columns, *names), **options, implementation=implementation)

    (_, gradients) = same(f, given, **BLOCKS)
    assert_clean(gradients)
    assert jnp.all(jnp.where(keep, 0, gradients["x"]) == 0)


@pytest.mark.parametrize(
    "transposed, mask, dtype",
    [
        (False, None, jnp.float32),
        (True, "rows and columns", jnp.float32),
        (False, "entries", jnp.bfloat16),
    ],
)
def test_linear_logits(transposed, mask, dtype):
    """Both layouts of the weight; bias, softcap; scale and temperature, one number or one per row; masked NaN."""
    n, columns, d = 9, 130, 5
    rng = np.random.default_rng(3)
    options, keep = masks_for(mask, rng, n, columns)
    rows, cols = jnp.any(keep, axis=1), jnp.any(keep, axis=0)
    point = arrays_for(rng, n, columns) | dict(
        hidden=jnp.where(rows[:, None], jnp.asarray(rng.normal(size=(n, d)), dtype), NAN),
        weight=jnp.where(cols, jnp.asarray(rng.normal(size=(d, columns)), dtype), NAN),
        bias=jnp.asarray(rng.normal(size=columns), jnp.float32),
        scale=jnp.asarray(0.5 + rng.random(n) if transposed else 0.7, jnp.float32),
    )
    if mask == "entries":
        point["bias"] = point["bias"].at[5].set(-INF)
    else:
        point["temperature"] = jnp.asarray(1.3 if transposed else 0.5 + rng.random(n), jnp.float32)
    if transposed:
        point["weight"] = point["weight"].T

    def f(p, implementation):
        arrays = {k: p.get(k) for k in ("hidden", "weight", "bias", "scale", "temperature")}
        logits = jaxsoft.linear_logits(
            **arrays, softcap=4.0, transpose_weight=transposed, implementation=implementation
        )
        return reduce_rows(logits, chosen(p, columns, "label", "moments", "mapped"), **options)

    (got, gradient), (expected, other) = (run(f, point, name, **BLOCKS) for name in ("pallas_tpu", "xla"))
    close(got, expected)
    products = {name: (gradient.pop(name), other.pop(name)) for name in ("hidden", "weight")}
    close(gradient, other, 64)  # sums of a thousand terms of either sign, where it is one number for all rows
    # In bfloat16 the kernel stores the gradient of the scores in it: half a unit more of every term of the products.
    for a, b in products.values():
        close(a, b, 16 if dtype == jnp.float32 else 2)
    assert_clean(gradient | {name: a for name, (a, _) in products.items()})


def test_products_are_in_the_dtype_asked_for():
    """Those of the kernels and those of XLA on the stored gradients of the scores, for float32 operands."""

    def f(hidden, weight):
        logits = jaxsoft.linear_logits(hidden, weight, dtype=jnp.bfloat16, implementation="pallas_tpu")
        return jnp.sum(losses.cross_entropy(logits, jnp.zeros(8, jnp.int32)))

    with jaxsoft.kernels.interpreted(), jaxsoft.kernels.block_sizes(**BLOCKS):
        traced = jax.make_jaxpr(jax.grad(f, (0, 1)))(jnp.ones((8, 16)), jnp.ones((16, 128)))
    products = list(matrix_products(traced, 128))
    assert len(products) == 4 and all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in products)
    assert all(a.dtype == jnp.float32 for a in traced.out_avals)


def test_products_of_half_precision_add_up_in_float32():
    """Seen in the program: an interpreter on a CPU adds up in float32 in any case."""

    def f(hidden, weight, query):
        logits = jaxsoft.linear_logits(hidden, weight, implementation="pallas_tpu")
        out = dot_product_attention(query, query, query, implementation="pallas_tpu")
        return jnp.sum(losses.cross_entropy(logits, jnp.zeros(8, jnp.int32))) + jnp.sum(
            out.astype(jnp.float32)
        )

    half = [jnp.ones(shape, jnp.bfloat16) for shape in ((8, 16), (16, 128), (1, 8, 2, 16))]
    with jaxsoft.kernels.interpreted(), jaxsoft.kernels.block_sizes(**BLOCKS):
        traced = jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(*half)
    products = [e for e in equations(traced) if e.primitive.name == "dot_general"]
    assert sum(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars) >= 18  # of at least 9
    assert {e.outvars[0].aval.dtype for e in products} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("transposed", [False, True])
def test_stretches_of_columns(transposed, monkeypatch):
    """The gradients of a product, a stretch of columns at a time: two whole ones and a rest of 4."""
    n, columns, d = 5, 68, 3
    rng = np.random.default_rng(4)
    widths = []
    one_stretch = _sweeps._cotangents

    def watched(kernel, functions, states, cotangents, source, masks, arrays, start, size):
        widths.append(size)
        return one_stretch(kernel, functions, states, cotangents, source, masks, arrays, start, size)

    monkeypatch.setattr(_sweeps, "_STRETCH", 1)
    monkeypatch.setattr(_sweeps, "_NARROWEST_STRETCH", 32)
    monkeypatch.setattr(_sweeps, "_cotangents", watched)
    weight = rng.normal(size=(columns, d) if transposed else (d, columns))
    point = arrays_for(rng, n, columns) | dict(
        hidden=jnp.asarray(rng.normal(size=(n, d)), jnp.float32),
        weight=jnp.asarray(weight, jnp.float32),
        bias=jnp.asarray(rng.normal(size=columns), jnp.float32),
        scale=jnp.asarray(0.5 + rng.random(n), jnp.float32),
    )
    cols = jnp.asarray(rng.random(columns) < 0.8)

    def f(p, implementation):
        arrays = {k: p[k] for k in ("hidden", "weight", "bias", "scale")}
        logits = jaxsoft.linear_logits(**arrays, transpose_weight=transposed, implementation=implementation)
        return reduce_rows(logits, chosen(p, columns, "mapped"), where=cols)

    same(f, point, 32, rows=4, columns=16)
    assert set(widths) == {32, 4}


# --- what is not in the library ------------------------------------------------------------------------------


def hinge_init(like, theta):
    return like


def hinge_update(state, tile, theta):
    return state + tile.sum(jax.nn.softplus(tile.x - theta[..., None]))


def ratio_update(state, tile, theta):
    """A function with neither derivative nor value where its argument is 0."""
    (by_column,), (by_entry,) = tile.col_args, tile.entry_args
    return state + tile.sum(jnp.log(by_column) * tile.x / theta[..., None] + 0 * by_entry)


def test_a_reduction_of_the_user():
    """Also one that divides by what belongs to rows, and takes the logarithm of what belongs to columns."""
    rng = np.random.default_rng(5)
    point = arrays_for(rng, 9, 130) | dict(x=jnp.asarray(rng.normal(size=(9, 130)), jnp.float32))

    def f(p, implementation):
        wanted = (
            RowReduction(hinge_init, hinge_update, args=(p["theta"],)),
            RowReduction(
                hinge_init,
                ratio_update,
                args=(p["theta"],),
                col_args=(p["by_column"],),
                entry_args=(p["by_entry"],),
            ),
        )
        return reduce_rows(p["x"], wanted, implementation=implementation)

    _, gradients = same(f, point, 16, **BLOCKS)
    assert_clean(gradients)


def gathered_share(state, tile, theta):
    order = jnp.argsort(tile.x, axis=-1)
    return [jnp.sum(jax.nn.softplus(jnp.take_along_axis(tile.x, order, -1) - theta[..., None]), axis=-1)]


def test_a_derivative_that_no_kernel_has_is_taken_by_xla():
    rng = np.random.default_rng(6)
    point = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("theta", 9), ("x", (9, 130)))}

    def f(p, implementation):
        hinge = RowReduction(hinge_init, hinge_update, share=gathered_share, args=(p["theta"],))
        return reduce_rows(p["x"], hinge, implementation=implementation)

    same(f, point, **BLOCKS)


# --- losses, and functions of dense rows ---------------------------------------------------------------------


def loss_of(name, logits, p):
    if name == "cross_entropy":
        return losses.cross_entropy(
            logits, p["labels"], label_smoothing=0.1, z_loss=1e-2, weights=p["weights"]
        )
    if name == "focal_loss":
        return losses.focal_loss(logits, p["labels"])
    return losses.info_nce_loss(logits / p["temperature"])


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss", "info_nce_loss"])
def test_losses(name):
    """The same loss by changing one word of its logits; of `info_nce_loss`, the columns are the other tower."""
    n, d = 9, 6
    rng = np.random.default_rng(7)
    columns = n if name == "info_nce_loss" else 130
    labels = rng.integers(0, columns, n)
    labels[2] = -100
    point = dict(
        hidden=jnp.asarray(rng.normal(size=(n, d)), jnp.float32),
        weight=jnp.asarray(rng.normal(size=(columns, d)), jnp.float32),
        labels=jnp.asarray(labels, jnp.int32),
    )
    if name == "cross_entropy":
        point["weights"] = jnp.asarray(rng.random(n), jnp.float32)
    if name == "info_nce_loss":
        point["temperature"] = jnp.float32(0.3)

    def f(p, implementation):
        logits = jaxsoft.linear_logits(
            p["hidden"], p["weight"], transpose_weight=True, implementation=implementation
        )
        return loss_of(name, logits, p)

    same(f, point, 16, **BLOCKS)


def test_a_label_out_of_range():
    """NaN in value and gradient, of its own row only."""
    rng = np.random.default_rng(8)
    x, labels = jnp.asarray(rng.normal(size=(4, 9)), jnp.float32), jnp.asarray([3, 9, 0, -1], jnp.int32)

    def f(x, implementation):
        out = reduce_rows(x, reductions.label_statistics(labels), implementation=implementation)
        return out.nll

    with jaxsoft.kernels.interpreted(), jaxsoft.kernels.block_sizes(rows=4, columns=4):
        value, pull = jax.vjp(lambda x: f(x, "pallas_tpu"), x)
        (gradient,) = pull(jnp.arange(1.0, 5.0))
    expected, pull = jax.vjp(lambda x: f(x, "xla"), x)
    close((value, gradient), (expected, *pull(jnp.arange(1.0, 5.0))))
    bad = jnp.asarray([False, True, False, True])
    assert jnp.all(jnp.isnan(value) == bad) and jnp.all(jnp.any(jnp.isnan(gradient), axis=1) == bad)


def test_functions_of_dense_rows():
    """Every public function with `implementation=`, along the last axis and along another."""
    rng = np.random.default_rng(9)
    point = dict(x=jnp.asarray(rng.normal(size=(9, 130)) * 2, jnp.float32))
    keep = jnp.asarray(rng.random((9, 130)) < 0.8)
    labels = jnp.asarray(rng.integers(0, 130, 9), jnp.int32)

    def f(p, implementation):
        how = dict(implementation=implementation)
        return dict(
            softmax=jaxsoft.softmax(p["x"], where=keep, **how),
            log_softmax=jaxsoft.log_softmax(p["x"], axis=0, **how),
            logsumexp=jaxsoft.logsumexp(p["x"], **how),
            top_k=jaxsoft.top_k(p["x"], 3, **how),
            softmax_top_k=jaxsoft.rows.softmax_top_k(p["x"], 3, **how),
            log_prob=jaxsoft.log_prob(p["x"], labels, **how),
            entropy=jaxsoft.entropy(p["x"], where=keep, **how),
        )

    same(f, point, 32, **BLOCKS)


def test_batches():
    """Under `vmap`, and with several leading axes."""
    rng = np.random.default_rng(10)
    x = jnp.asarray(rng.normal(size=(3, 5, 20)), jnp.float32)

    def f(x):
        return reduce_rows(x, reductions.softmax_moments(), implementation="pallas_tpu").entropy

    with jaxsoft.kernels.interpreted(), jaxsoft.kernels.block_sizes(rows=4, columns=16):
        whole, pull = jax.vjp(f, x)
        each, pull_each = jax.vjp(jax.vmap(f), x)
    cotangent = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    close((each, pull_each(cotangent)), (whole, pull(cotangent)))


def test_rows_sharded_over_devices():
    """The weight's gradient is summed once. (JAX's interpreter of kernels does not run with `check_vma`.)"""
    rng = np.random.default_rng(11)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    h, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 5), (5, 20)))
    labels = jnp.arange(8, dtype=jnp.int32)

    def total(h, w, labels, implementation):
        logits = jaxsoft.linear_logits(h, w, implementation=implementation)
        return losses.cross_entropy(logits, labels).sum()

    def local(*arrays):
        return jax.lax.psum(total(*arrays, "pallas_tpu"), "data")

    specs = (P("data"), P(), P("data"))
    f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    with jaxsoft.kernels.interpreted(), jaxsoft.kernels.block_sizes(rows=4, columns=16):
        got = jax.jit(jax.value_and_grad(f, (0, 1)))(h, w, labels)
    close(got, jax.value_and_grad(total, (0, 1))(h, w, labels, "xla"))


def test_the_gradient_filter_follows_a_kernel():
    """Forward in the kernel, backward in XLA, which skips what does not matter."""
    labels = jnp.arange(13)

    def loss(hidden, weight, implementation, filter_eps):
        logits = jaxsoft.linear_logits(hidden, weight, implementation=implementation, filter_eps=filter_eps)
        return jaxsoft.losses.cross_entropy(logits, labels) @ jnp.linspace(0.2, 1.7, 13)

    operands = jax.random.normal(jax.random.key(0), (13, 24)), jax.random.normal(jax.random.key(1), (24, 300))
    want = jax.value_and_grad(loss, (0, 1))(*operands, "xla", None)
    with jaxsoft.kernels.interpreted():
        exact = jax.value_and_grad(loss, (0, 1))(*operands, "pallas_tpu", 0.0)
        nothing = jax.grad(loss, (0, 1))(*operands, "pallas_tpu", 10.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), exact, want)
    assert all((g == 0).all() for g in nothing)
