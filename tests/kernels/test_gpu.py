"""The Mosaic GPU backend: interpreted on the CPU, and lowered for GPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft.kernels import gpu
from jaxsoft.kernels._sweep import Operands, Out, Plan, Scores
from jaxsoft.kernels.gpu import _narrow
from jaxsoft.kernels.inner import Kernel
from jaxsoft.rows import reduce_rows, reductions

INTERPRETED = Kernel("mosaic_gpu", True, "")
missing = gpu.unavailable(INTERPRETED)
interpreter = pytest.mark.skipif(missing is not None, reason=str(missing))
missing_lowering = gpu.unavailable(Kernel("mosaic_gpu", False, "NVIDIA H200"))
lowering = pytest.mark.skipif(missing_lowering is not None, reason=str(missing_lowering))


def normal(seed: int, shape: tuple, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def agree(got, want, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b[np.isfinite(b)]).max(initial=0))
        )


# --- the evaluator -----------------------------------------------------------------------------------------------

ROWS, COLUMNS = 8, 16


def evaluated(function, row, col, tile):
    """`function(row, col, tile)` by `_narrow`, with every value in the fewest axes."""
    traced = {"r": 7919, "c": COLUMNS}
    space = _narrow.Space(
        {"r": ROWS, "c": COLUMNS}, traced, "rc", lambda x, dims: x, lambda item: item, lambda *sides: None
    )
    shapes = [(traced["r"], *row.shape[1:]), (COLUMNS, *col.shape[1:]), (traced["r"], COLUMNS)]
    args = [jax.ShapeDtypeStruct(s, a.dtype) for s, a in zip(shapes, (row, col, tile))]
    closed, out = _narrow.trace(function, *args)

    def narrow(a, kind):
        if a.ndim == 1:
            return _narrow.single(kind, space.item(kind, a))
        items = np.empty((1, a.shape[1]), object)
        items[0] = [_narrow.Item(kind, a[:, i]) for i in range(a.shape[1])]
        return _narrow.Value((kind, None), items)

    whole = _narrow.single("rc", space.item("rc", tile))
    values = _narrow.evaluate(space, closed, [narrow(row, "r"), narrow(col, "c"), whole])
    results = []
    for value, struct in zip(values, jax.tree.leaves(out)):
        kinds = tuple("r" if n == traced["r"] else "c" if n == COLUMNS else None for n in struct.shape)
        arrays = _narrow.arrays(space, value, kinds, struct.shape)
        wide = [space.sizes[k] for k in kinds if k]
        lead = [n for n, k in zip(struct.shape, kinds) if k is None]
        stacked = jnp.stack(arrays, -1).reshape(*wide, *lead)
        results.append(stacked)
    return results


def some_elementwise(r, c, x):
    y = r[:, :1] * x + c[None, :, 0]
    odd = jnp.floor(y) + jnp.ceil(y) + jnp.sign(y) + jnp.log1p(jnp.abs(y)) + jnp.expm1(y) + jax.nn.sigmoid(y)
    more = (
        jnp.power(y, 3.0)
        + jnp.power(jnp.abs(y) + 0.1, r[:, 1:2])
        + y**-2
        + jnp.tanh(y)
        + jnp.clip(y, -0.5, 0.5)
    )
    return jnp.where(jnp.isfinite(y) & ~(y > 1) | (y == 2), odd, more) + jnp.sinh(y) + jnp.cosh(y)


def some_narrow_axes(r, c, x):
    joined = jnp.concatenate([r, jnp.max(x, axis=1, keepdims=True)], axis=-1)
    ranked = jnp.sum(joined[:, :, None] > joined[:, None, :], axis=-1, dtype=jnp.int32)
    picked = jnp.sum(jnp.where(ranked == jnp.arange(3), joined, 0), axis=-1)
    padded = jax.lax.pad(joined, jnp.float32(7), ((0, 0, 0), (-1, 2, 1)))
    stacked = jnp.stack([r[:, 0], picked], axis=-1).reshape(-1, 2, 1)[..., 0]
    return joined[:, ::2], ranked, picked, padded, stacked, jnp.unstack(joined, axis=1)[1]


def some_reductions(r, c, x):
    keep = x > c[None, :, 0]
    columns = jnp.sum(jnp.where(keep, x, 0), axis=0)
    return (
        jnp.sum(keep, axis=1, dtype=jnp.float32),
        jnp.any(keep, axis=1),
        jnp.min(x, axis=-1),
        columns[:, None] * c,
        jnp.sum(jnp.ones_like(x), axis=1) + jnp.sum(jnp.broadcast_to(r[:, :1], x.shape), axis=1),
        jnp.einsum("rj,rj->r", x, x * r[:, 1:2]),
        jnp.einsum("rj,jk->rk", x, c),
    )


def some_calls(r, c, x):
    y = jax.lax.fori_loop(0, 3, lambda i, y: jax.nn.softplus(y) * (i + 1), x)
    return jax.jit(jax.nn.gelu)(y), jax.grad(lambda x: jnp.sum(jax.nn.silu(x) * r[:, :1]))(x)


@pytest.mark.parametrize("function", [some_elementwise, some_narrow_axes, some_reductions, some_calls])
def test_evaluates_what_jax_numpy_does(function):
    row, col, tile = normal(0, (ROWS, 2)), normal(1, (COLUMNS, 2)), normal(2, (ROWS, COLUMNS))
    agree(evaluated(function, row, col, tile), jax.tree.leaves(function(row, col, tile)), 1e-5)


def test_names_what_it_has_no_rule_for():
    row, col, tile = normal(0, (ROWS, 2)), normal(1, (COLUMNS, 2)), normal(2, (ROWS, COLUMNS))
    for function, reason in (
        (lambda r, c, x: jnp.sort(x, axis=1), "no rule for sort"),
        (lambda r, c, x: x + tile[:1], "close over arrays"),
        (lambda r, c, x: x[:, :3], "cuts or joins"),
        (lambda r, c, x: jnp.sum(x), "whole tile"),
    ):
        with pytest.raises(_narrow.Unsupported, match=reason):
            evaluated(function, row, col, tile)


def test_arrays_have_the_axes_that_they_are_said_to_have():
    """For equal lengths, `broadcast_in_dim` returns an array whose axes are swapped as it is."""
    space = _narrow.Space(
        {"r": 8, "c": 8}, {}, "cr", lambda x, dims: x, lambda item: item, lambda *sides: None
    )
    x = jnp.zeros((8, 8))
    assert space.item("rc", x).dims == "cr"
    with pytest.raises(ValueError, match="'rc' cannot be broadcast to 'cr'"):
        space.spread(_narrow.Item("rc", x), "cr")
    with pytest.raises(ValueError, match=r"'cr' has shape \(8, 8\), not \(8, 4\)"):
        space.item("rc", x[:, :4])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.uint8, jnp.bool_])
def test_registers_hold_numbers_of_four_bytes(dtype):
    """And booleans; arithmetic in integers of one byte, which would overflow, is refused."""
    row, col, tile = normal(0, (ROWS, 2)), normal(1, (COLUMNS, 2)), normal(2, (ROWS, COLUMNS))

    def chosen(r, c, x):
        return jnp.where(x > 0, (x > 1).astype(dtype), (x < -1).astype(dtype)).astype(jnp.float32)

    text = str(jax.make_jaxpr(lambda *args: evaluated(chosen, *args))(row, col, tile))
    assert dtype == jnp.bool_ or jnp.dtype(dtype).name not in text
    agree(evaluated(chosen, row, col, tile), [chosen(row, col, tile)], 0)
    if jnp.issubdtype(dtype, jnp.integer):
        with pytest.raises(_narrow.Unsupported, match=jnp.dtype(dtype).name):
            evaluated(lambda r, c, x: (x > 0).astype(dtype) + (x > 1).astype(dtype), row, col, tile)


def test_what_depends_on_rows_only_is_computed_ahead():
    """And what is computed twice, once; outputs and operations on axes stay where they are."""
    row, tile = jax.ShapeDtypeStruct((7919,), jnp.float32), jax.ShapeDtypeStruct((7919, COLUMNS), jnp.float32)

    def function(r, x):
        shift = jnp.where(jnp.isfinite(r), jnp.exp(r), 0)[:, None]
        again = jnp.where(jnp.isfinite(r), jnp.exp(r), 0)[:, None]
        return jnp.tanh(x - shift) + jnp.sin(x - again), r + 1

    body, _ = _narrow.trace(function, row, tile)
    ahead, rest = _narrow.split(body, body.invars[:1], lambda shape: len(shape) == 1)
    names = [eqn.primitive.name for eqn in rest.eqns]
    assert [v.aval.shape for v in ahead.outvars] == [(7919,)]
    assert {eqn.primitive.name for eqn in ahead.eqns} >= {"is_finite", "exp", "select_n"}
    assert sorted(set(names)) == ["add", "broadcast_in_dim", "sin", "sub", "tanh"]
    assert names.count("sub") == 1


def test_a_comparison_that_holds_needs_no_mask():
    row, col = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (7919, COLUMNS))
    tile = jax.ShapeDtypeStruct((7919, COLUMNS), jnp.float32)

    def function(r, c, x):
        keep = (c[None] <= r[:, None]) & (c[None] > r[:, None] * 2)
        return jnp.where(keep, x, -jnp.inf)

    body, _ = _narrow.trace(function, row, col, tile)
    r, c = body.invars[:2]
    (found,) = _narrow.comparisons(body, {r, c})  # not the other: 2 r is no argument
    assert (found.name, found.left, found.right) == ("le", c, r)
    rest = [eqn.primitive.name for eqn in _narrow.where_true(body, {found.out}).eqns]
    assert "gt" in rest and "select_n" in rest and "le" not in rest and "and" not in rest
    both = {eqn.outvars[0] for eqn in body.eqns if eqn.primitive.name in ("le", "gt")}
    whole = _narrow.where_true(body, both)
    assert not whole.eqns and whole.outvars == [body.invars[2]]


def test_products_are_added_to_what_is_known_when_they_are_computed():
    def function(carry, x, y):
        return carry + jax.lax.dot(x, y), jnp.exp(x)

    wide, half = jax.ShapeDtypeStruct((7919, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    body, _ = _narrow.trace(lambda carry, x, y: function(carry, x, y)[::-1], wide, wide, half)
    assert [eqn.primitive.name for eqn in body.eqns][:2] in (["dot_general", "add"], ["exp", "dot_general"])
    starts = []
    product = _narrow.Product(lambda start: starts.append(start) or (1.0 if start is None else start + 1.0))
    assert (product.added_to(2.0), product.read(), product.read(), product.added_to(3.0)) == (
        3.0,
        1.0,
        1.0,
        4.0,
    )
    assert starts == [2.0, None]  # once it was read, it is not computed again


@pytest.mark.parametrize("name", ["exp", "logistic", "tanh", "div", "exp_difference"])
def test_functions_of_tiles(name):
    """The formulas that the kernels use, with exact instructions."""
    from jaxsoft.kernels.gpu import _functions

    x = jnp.concatenate(
        [jnp.linspace(-100, 80, 4001), jnp.linspace(-0.5, 0.5, 1001), jnp.asarray([-jnp.inf])]
    )
    others = {"div": (1 + x * x,), "exp_difference": (x - 1, jnp.full_like(x, np.exp(np.float32(-1))))}
    args = (x, *others.get(name, ()))
    got = np.asarray(_functions.functions(True)[name](*args), np.float64)
    exact = {
        "exp": np.exp,
        "tanh": np.tanh,
        "div": np.divide,
        "logistic": lambda x: 1 / (1 + np.exp(-x)),
        "exp_difference": lambda x, y, e: np.expm1(x) * np.exp(-1.0),
    }[name]
    with np.errstate(over="ignore", invalid="ignore"):
        want = exact(*(np.asarray(a, np.float64) for a in args))
    grows = name in ("exp", "logistic", "exp_difference")
    tolerance = 2e-7 + 1e-7 * np.abs(np.where(np.isfinite(x), x, 0)) if grows else 5e-7
    if name == "exp_difference":  # a difference that cancels by at most 1 / (1 - e^-0.25) = 4.5
        tolerance = np.where((np.abs(x) < 0.5) & (np.abs(x) >= 0.25), 4.5 * tolerance, tolerance)
    normal_numbers = np.isfinite(want) & (np.abs(want) > 1e-37)
    assert (np.abs(got - want) <= 2 * tolerance * np.abs(want))[normal_numbers].all()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


# --- sweeps ------------------------------------------------------------------------------------------------------


def _scale(x, cols, t, b):
    return jax.nn.softplus(x - t) * b


def _results(logits, ids, beside, implementation):
    theta, bias, soft = beside
    return reduce_rows(
        logits,
        {
            "lse": reductions.logsumexp(),
            "labels": reductions.label_statistics(ids),
            "best": reductions.maximum_and_argmax(),
            "top": reductions.top_k(3),
            "moments": reductions.softmax_moments(),
            "mapped": reductions.mapped_sum(_scale, theta, col_args=(bias,)),
            "soft": reductions.soft_label_statistics(soft),
        },
        implementation=implementation,
    )


def _value_and_grads(make_logits, arrays, beside, implementation):
    ids, *differentiable = beside

    def f(arrays, differentiable):
        out = _results(make_logits(*arrays), ids, differentiable, implementation)
        floats = [a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum(jnp.sum(jnp.sin(0.3 * a + i)) for i, a in enumerate(floats)), out

    return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(arrays, tuple(differentiable))


N, COUNT = 70, 76


def _beside():
    return (
        jax.random.randint(jax.random.key(3), (N,), 0, COUNT),
        normal(4, (N,)),
        normal(5, (COUNT,)),
        jax.nn.softmax(normal(6, (N, COUNT))),
    )


@interpreter
def test_reductions_of_stored_scores():
    x = 2 * normal(0, (N, COUNT))
    want = _value_and_grads(lambda x: x, (x,), _beside(), "xla")
    with jaxsoft.kernels.interpreted():
        got = _value_and_grads(lambda x: x, (x,), _beside(), "mosaic_gpu")
    agree(got, want, 3e-5)


@interpreter
def test_softmax_is_written_by_a_sweep():
    """In half precision, without a mask; where it is differentiated, its rounding would enter the gradient."""
    x = (4 * normal(0, (70, 200))).astype(jnp.bfloat16).at[3].set(-jnp.inf).at[5, 7].set(-jnp.inf)
    softmax = functools.partial(jaxsoft.softmax, implementation="mosaic_gpu")
    gradient = jax.grad(lambda x: jnp.sum(softmax(x).astype(jnp.float32) ** 2))
    with jaxsoft.kernels.interpreted():
        got = softmax(x)
        kernels = [str(jax.make_jaxpr(f)(x)).count("sweep_over") for f in (softmax, gradient)]
    agree(got, jaxsoft.softmax(x, implementation="xla"), 2**-8)
    assert kernels[0] == 2 * kernels[1] > 0


@interpreter
def test_reductions_of_products():
    h = normal(0, (N, 40), jnp.bfloat16)
    w = (normal(1, (40, COUNT)) / 6).astype(jnp.bfloat16)
    want = _value_and_grads(jaxsoft.linear_logits, (h, w), _beside(), "xla")
    with jaxsoft.kernels.interpreted():
        got = _value_and_grads(jaxsoft.linear_logits, (h, w), _beside(), "mosaic_gpu")
    agree(got, want, 1e-2)


@interpreter
def test_rows_of_padding_are_not_divided_by():
    """Per-row numbers of 0 in the padding of a block made NaN of the gradients of column operands."""
    h = normal(0, (13, 64), jnp.bfloat16)
    w = (normal(1, (64, 200)) / 8).astype(jnp.bfloat16)
    labels = jnp.arange(13) * 10

    def loss(h, w, bias, temperature, implementation):
        logits = jaxsoft.linear_logits(
            h, w, bias=bias, temperature=temperature, implementation=implementation
        )
        return jaxsoft.losses.cross_entropy(logits, labels) @ jnp.linspace(0.2, 1.7, 13)

    operands = h, w, normal(2, (200,)), jnp.linspace(0.5, 2, 13)
    want = jax.grad(loss, (0, 1, 2, 3))(*operands, "xla")
    with jaxsoft.kernels.interpreted():
        got = jax.grad(loss, (0, 1, 2, 3))(*operands, "mosaic_gpu")
    agree(got, want, 1e-2)


@interpreter
def test_products_a_few_features_at_a_time():
    h, table = normal(0, (130, 264), jnp.bfloat16), (normal(1, (COUNT, 264)) / 16).astype(jnp.bfloat16)
    with jaxsoft.kernels.interpreted():
        logits = jaxsoft.linear_logits(h, table, transpose_weight=True)
        got = jaxsoft.logsumexp(logits, implementation="mosaic_gpu")
    x = h.astype(jnp.float32) @ table.astype(jnp.float32).T
    agree(got, jax.nn.logsumexp(x, axis=-1), 1e-5)


def _everything(block, carry):
    inside = jnp.ones_like(block.raw, jnp.bool_) if block.inside is None else block.inside
    x = jnp.where(inside, block.raw, 0) + jnp.where(inside, block.entries["bias"], 0)
    weights = (block.row % 3).astype(jnp.float32) + block.col.astype(jnp.float32) * 0.01
    y = jnp.where(inside, x * weights * block.rows["a"][:, None] + block.batch.astype(jnp.float32), 0)
    return Out(
        {
            "sum": carry["sum"] + jnp.sum(y, axis=1),
            "count": carry["count"] + jnp.sum(inside, 1, dtype=jnp.int32)[:, None],
        },
        y * block.cols["b"][None, :, 1],
        (jnp.sum(y, axis=0), jnp.max(jnp.where(inside, y, -1e9), axis=0)[:, None] * block.cols["b"]),
    )


def _begin(rows, like):
    return {"sum": like + rows["a"], "count": jnp.zeros((*like.shape, 1), jnp.int32)}


@interpreter
@pytest.mark.parametrize("skips", ["nothing", "some", "some of each matrix"])
def test_every_kind_of_output(skips):
    table = np.ones((2, 2, 3), bool)  # which tiles have something to do, in each matrix
    if skips != "nothing":
        table &= (np.arange(2)[:, None] + np.arange(3)) % 2 == 0
    live = None if skips == "nothing" else lambda i, j, rows, columns: (i + j) % 2 == 0
    if skips == "some of each matrix":
        table[0, 0, 0] = table[1, 1] = False
    batches, n, columns = 2, 100, 150
    x, a, b = normal(0, (batches, n, columns)), normal(1, (batches, n)), normal(2, (1, columns, 2))
    bias = normal(3, (1, n, columns))
    kernel = INTERPRETED._replace(blocks=(("columns", 64), ("parts", 2)))
    tables = jnp.asarray(table) if skips == "some of each matrix" else None
    operands, plan = (
        Operands({"a": a}, {"b": b}, {"bias": bias}, 5, tables),
        Plan("columns", (jnp.float32,), live),
    )
    assert gpu.refusal(kernel, _everything, Scores(values=x), operands, _begin, plan) is None
    result = gpu.sweep(kernel, _everything, Scores(values=x), operands, _begin, plan)

    row, col = np.arange(n)[:, None], np.arange(columns)[None] + 5
    y = (x + bias) * (row % 3 + col * 0.01) * a[..., None] + np.arange(batches)[:, None, None]
    seen = table[:, row // 64, (col - 5) // 64]
    y = np.where(seen, y, 0)
    agree(result.entries, y * b[..., 1][:, None], 1e-5)
    # Each part starts from the same carry.
    agree(jnp.sum(result.carry["sum"], 0), y.sum(-1) + 2 * a, 1e-4)
    agree(jnp.sum(result.carry["count"], 0)[..., 0], seen.sum(-1), 0)
    assert result.cols[0].shape == (batches, 2, columns)
    agree(jnp.sum(result.cols[0], 1), y.sum(1), 1e-4)
    for block in range(2):
        rows = slice(64 * block, min(64 * block + 64, n))
        most = np.where(seen[:, rows].any(1), y[:, rows].max(1), 0)
        agree(result.cols[1][:, block], most[..., None] * b, 1e-5)


def _attention(q, k, v, implementation, **kwargs):
    def f(q, k, v):
        out = jaxsoft.attention.dot_product_attention(q, k, v, implementation=implementation, **kwargs)
        return jnp.sum(jnp.sin(out.astype(jnp.float32) * 3)), out

    return jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v)


@interpreter
@pytest.mark.parametrize(
    "normalizer, batch, heads, width",
    [(jaxsoft.softpick, 1, 1, 32), (jaxsoft.softmax, 2, 2, 64)],  # 64 are read where they lie, side by side
)
def test_attention(normalizer, batch, heads, width):
    shapes = (batch, 70, 2, width), (batch, 76, heads, width), (batch, 76, heads, 48)
    q, k, v = (normal(i, shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))
    # A query that saw one key only would have gradient 0, of which half precision leaves nothing but rounding.
    how = {"normalizer": normalizer, "is_causal": True, "query_offset": 6, "softcap": 5.0}
    if batch > 1:  # what lengths hide may be NaN
        how["key_value_seq_lengths"] = jnp.asarray([76, 40])
        k, v = (a.at[1, 40:].set(jnp.nan) for a in (k, v))
    want = _attention(q, k, v, "xla", **how)
    with jaxsoft.kernels.interpreted():
        got = _attention(q, k, v, "mosaic_gpu", **how)
    agree(got, want, 1.5e-2)


@lowering
def test_lengths_copy_no_cache():
    """The kernel clears what lengths hide in the tile that they cut: nothing as large as the cache is computed."""
    cache = (64, 1024, 2, 128)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 1, 8, 128), cache, cache)]

    def decode(query, key, value, lengths):
        options = dict(key_value_seq_lengths=lengths, implementation="mosaic_gpu")
        return jaxsoft.attention.dot_product_attention(query, key, value, **options)

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        jaxpr = jax.make_jaxpr(decode)(*args, jax.ShapeDtypeStruct((64,), jnp.int32))
    moved = {"transpose", "reshape", "pad", "jit", "pjit", "custom_jvp_call", "stop_gradient"}
    found = [e.primitive.name for e in _equations(jaxpr.jaxpr) if any(_is_cache(v.aval) for v in e.outvars)]
    assert found and set(found) <= moved


def _is_cache(aval) -> bool:
    return aval.dtype == jnp.bfloat16 and aval.size >= 64 * 1024 * 2 * 128


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name in ("jit", "pjit", "custom_jvp_call"):
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            yield from _equations(getattr(inner, "jaxpr", inner))


@interpreter
@pytest.mark.parametrize(("keys", "blocks"), [(8, (None, None)), (64, (None, None)), (192, (64, 64))])
def test_attention_to_keys_that_do_not_fill_the_tile(keys, blocks):
    """The backend's tile has 128 columns; those beyond the last key have no weight."""
    shapes = (1, 70, 1, 64), (1, keys, 1, 64), (1, keys, 1, 64)
    q, k, v = (normal(i, shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))
    want = _attention(q, k, v, "xla", block_sizes=blocks)
    with jaxsoft.kernels.interpreted():
        got = _attention(q, k, v, "mosaic_gpu", block_sizes=blocks)
    agree(got, want, 1.5e-2)


@interpreter
def test_tiles_that_no_mask_cuts():
    """Two whole tiles and one on the diagonal: other instructions run on whole tiles."""
    shapes = (1, 64, 1, 64), (1, 192, 1, 64), (1, 192, 1, 64)
    q, k, v = (normal(i, shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))
    how = {"is_causal": True, "query_offset": 128}
    want = _attention(q, k, v, "xla", **how)
    with jaxsoft.kernels.interpreted(), jaxsoft.kernels.block_sizes(rows=64, columns=64):
        got = _attention(q, k, v, "mosaic_gpu", **how)
    agree(got, want, 1.5e-2)


@interpreter
@pytest.mark.parametrize(("queries", "keys"), [(50, 60), (70, 140)])
def test_attention_with_mask_and_bias(queries, keys):
    """The sweep over rows reads both as tiles with the keys first; square tiles hid that they were not transposed.

    One computing warpgroup, and two, which only have threads enough with `NPROC` as in conftest.py.
    """
    shapes = (1, queries, 1, 64), (1, keys, 1, 64), (1, keys, 1, 64)
    heads = (normal(i, shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))
    mask = normal(3, (queries, keys)) > -0.5
    operands = (*heads, normal(4, (1, queries, keys)))

    def f(q, k, v, bias, implementation):
        out = jaxsoft.attention.dot_product_attention(q, k, v, bias, mask, implementation=implementation)
        return jnp.sum(jnp.sin(out.astype(jnp.float32) * 3)), out

    value_and_grad = jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True)
    want = value_and_grad(*operands, "xla")
    with jaxsoft.kernels.interpreted():
        got = value_and_grad(*operands, "mosaic_gpu")
    agree(got, want, 1.5e-2)


@interpreter
@pytest.mark.parametrize("stored", [True, False])
def test_masks_of_entries(stored):
    """They are read as bytes; the last tile reaches beyond the last row and column."""
    n = 60
    h, w = normal(0, (n, 64), jnp.bfloat16), (normal(1, (64, COUNT)) / 8).astype(jnp.bfloat16)
    keep = normal(2, (n, COUNT)) > -0.5

    def total(h, w, implementation):
        logits = jaxsoft.linear_logits(h, w)
        logits = logits.dense() if stored else logits
        lse = jaxsoft.logsumexp(logits, where=keep, implementation=implementation)
        return lse @ jnp.linspace(0.2, 1.7, n)

    want = jax.value_and_grad(total, (0, 1))(h, w, "xla")
    with jaxsoft.kernels.interpreted():
        got = jax.value_and_grad(total, (0, 1))(h, w, "mosaic_gpu")
    agree(got, want, 1e-2)


# --- what it refuses ---------------------------------------------------------------------------------------------


def _sums(block, carry):
    return Out(carry + jnp.sum(block.raw, axis=1))


def _sorts(block, carry):
    return Out(carry + jnp.sort(block.raw, axis=1)[:, 0])


def _zeros(rows, like):
    return like


@lowering
@pytest.mark.parametrize(
    ("body", "scores", "reason"),
    [
        (_sums, Scores(values=jax.ShapeDtypeStruct((1, 8, 8), jnp.int32)), "not in int32"),
        (_sorts, Scores(values=jax.ShapeDtypeStruct((1, 8, 8), jnp.float32)), "no rule for sort"),
        (
            _sums,
            Scores(
                left=jax.ShapeDtypeStruct((1, 8, 8), jnp.float32),
                right=jax.ShapeDtypeStruct((1, 8, 8), jnp.float32),
            ),
            "matrix products are in bfloat16 or float16, not in float32",
        ),
    ],
)
def test_refuses(body, scores, reason):
    assert reason in gpu.refusal(INTERPRETED, body, scores, Operands(), _zeros, Plan())


@lowering
def test_needs_a_hopper_gpu():
    assert "Hopper" in str(gpu.unavailable(Kernel("mosaic_gpu", False, "NVIDIA A100")))


# --- lowering ----------------------------------------------------------------------------------------------------


def _lowered(kind: str, function, *shapes) -> str:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@lowering
def test_rows_lower():
    n, columns, depth = 1000, 50257, 4096
    half = jnp.bfloat16

    def loss(h, w, x, ids):
        logits = jaxsoft.linear_logits(h, w)
        out = [
            reduce_rows(source, reductions.label_statistics(ids), implementation="mosaic_gpu").nll
            for source in (logits, x)
        ]
        return sum(map(jnp.sum, out))

    text = _lowered(
        "NVIDIA H200",
        jax.grad(loss, argnums=(0, 1, 2)),
        ((n, depth), half),
        ((depth, columns), half),
        ((n, columns), jnp.float32),
        ((n,), jnp.int32),
    )
    assert text.count("mosaic_gpu") >= 4


@lowering
def test_attention_lowers():
    head = ((2, 1024, 4, 128), jnp.bfloat16)
    attention = functools.partial(_attention, implementation="mosaic_gpu", is_causal=True)
    assert _lowered("NVIDIA H100", attention, head, head, head).count("mosaic_gpu") >= 3
