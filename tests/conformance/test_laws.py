"""The laws that every public function of rows of scores obeys (`table.py` lists the functions)."""

import contextlib
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import (
    absent_in_one_row,
    compilations,
    contract,
    contract_weights,
    floats,
    matrix_products,
    near,
    rows_and_gradients,
    trees_close,
)
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import jaxsoft
from conformance.entry import IDS, PER_COLUMN, PER_ROW, Entry, make_inputs
from conformance.table import ENTRIES
from jaxsoft import losses

LEADING, V, D = (2, 3), 8, 4
every = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
every_loss = pytest.mark.parametrize("entry", [e for e in ENTRIES if e.loss], ids=lambda e: e.id)


def seed_of(entry: Entry) -> int:
    return zlib.crc32(entry.id.encode())


def scores(entry, leading=LEADING, columns=V, dtype=np.float32, scale=2.0):
    rng = np.random.default_rng(seed_of(entry))
    return jnp.asarray(rng.normal(size=(*leading, columns)) * scale, dtype)


def inputs_of(entry, leading=LEADING, columns=V, dtype=np.float32):
    given = make_inputs(seed_of(entry) + 1, leading, columns, dtype)
    return {k: given[k] for k in entry.inputs}


class _Program:
    """A compiled function of `(logits, inputs, options)`; the laws of an entry run one after the other and share it.

    An entry is not hashable; it lives as long as its program. `over` tells the programs of kernels from those of XLA.
    """

    over = "xla"

    def __init__(self, make):
        self.make, self.key = make, (None, None)

    def __call__(self, entry):
        if self.key[0] is not entry or self.key[1] != self.over:
            self.key, self.compiled = (entry, self.over), jax.jit(self.make(entry))
        return self.compiled


@_Program
def value(entry):
    """The results."""
    return lambda x, given, options: entry.call(x, given, **options)


@_Program
def value_and_gradient(entry):
    """The results, and the gradient of their contraction (None where there is none)."""

    def f(x, given, options):
        result = entry.call(x, given, **options)
        return contract(result).astype(jnp.float32 if x.dtype.itemsize < 4 else x.dtype), result

    def both(x, given, options):
        if not entry.differentiable:
            return entry.call(x, given, **options), None
        gradient, result = jax.grad(f, has_aux=True)(x, given, options)
        return result, gradient

    return both


def shared_value(entry):
    """The results alone, by the program of another law: less time than a program of its own."""
    return lambda x, given: value_and_gradient(entry)(x, given, {})[0]


def head(entry, leading=LEADING, columns=V, dtype=np.float64):
    """The arrays of a linear output layer; its logits are capped before they are divided by a temperature."""
    rng = np.random.default_rng(seed_of(entry) + 7)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    arrays = dict(
        hidden=normal(*leading, D), weight=normal(D, columns), bias=normal(columns), scale=normal(*leading)
    )
    return arrays if "softcap" in entry.id else arrays | {"temperature": jnp.asarray(1.3, dtype)}


def expression(operands, **options):
    return jaxsoft.linear_logits(**operands, **options)


def split(given):
    """The inputs that are one number per column, and the others."""
    columns = {name: a for name, a in given.items() if name in PER_COLUMN}
    return columns, {name: a for name, a in given.items() if name not in columns}


def softcap(entry):
    return None if "softcap" in entry.id else 2.0


def of_head(entry, *, dense, **options):
    """A function of `(point, given, where, weights)`: the contraction of the results, and the results.

    The point is what it is differentiated by: the operands of the layer, and the inputs per column.
    """

    def run(point, given, where=None, weights=None):
        operands, columns = point
        logits = expression(operands, **options)
        masked = {"where": where} if entry.where else {}
        result = entry.call(logits.dense() if dense else logits, {**given, **columns}, **masked)
        return contract(result, weights), result

    return run


@_Program
def dense_head(entry):
    """What `of_head` gives with stored logits, and its gradients."""
    return jax.value_and_grad(of_head(entry, dense=True, softcap=softcap(entry)), has_aux=True)


@_Program
def streamed_head(entry):
    """What `of_head` gives with logits that are never stored, in two blocks of columns, and its gradients."""
    return jax.value_and_grad(of_head(entry, dense=False, softcap=softcap(entry), block_size=4), has_aux=True)


def row_mask(entry, given, leading=LEADING, columns=V):
    """A mask that differs by row and keeps at least two columns, the labels among them."""
    mask = np.array(np.random.default_rng(seed_of(entry) + 2).random((*leading, columns)) < 0.6)
    mask[..., :2] = True
    for name in IDS:
        if name in given:
            ids = np.maximum(np.asarray(given[name]), 0).reshape(*leading, -1)
            np.put_along_axis(mask, ids, True, axis=-1)
    for name in ("soft", "positive_mask"):
        if name in given:
            mask |= np.asarray(given[name]) > 0
    return jnp.asarray(mask)


@pytest.mark.engine
@every
def test_vmap_and_grad_in_any_order(entry):
    """Row i of the logits with input j: one `vmap` maps the logits and shares the inputs, the other vice versa."""
    x, given = scores(entry), inputs_of(entry, (3,))
    if given:
        x = jnp.broadcast_to(x[:, :1], x.shape)
    given |= {k: jnp.stack([jnp.roll(given[k], j) for j in range(3)]) for k in PER_COLUMN & set(given)}
    columns = []  # of i and j
    for j in range(3):
        whole = {k: v[j] if k in PER_COLUMN else jnp.stack([v, v]) for k, v in given.items()}
        columns.append(jax.tree.map(lambda a, j=j: a[:, j], value_and_gradient(entry)(x, whole, {})))
    expected, gradient = jax.tree.map(lambda *a: jnp.stack(a, 1), *columns)
    weights = contract_weights(expected)

    def over_inputs(x, given, weights):
        result = jax.vmap(entry.call, (None if given else 0, 0))(x, given)
        return contract(result, weights), result

    def over_rows(x, given, weights):
        rows = jax.vmap(jax.vmap(entry.call, (None if given else 0, 0)), (0, None))(x, given)
        return contract(rows, weights)

    x = x[:, 0] if given else x
    if entry.differentiable:
        of_rows = jax.vmap(jax.grad(over_inputs, has_aux=True), (0, None, 0))
        got, result = jax.jit(of_rows)(x, given, weights)
        trees_close(got, gradient.sum(1) if given else gradient, 1e-5)
        jax.eval_shape(jax.grad(over_rows), x, given, weights)
    else:
        _, result = jax.jit(jax.vmap(over_inputs, (0, None, 0)))(x, given, weights)
    trees_close(result, expected, 1e-6)


@every
def test_jit_and_axis_change_nothing(entry):
    x, given = scores(entry), inputs_of(entry)
    expected = entry.call(x, given)
    with compilations() as compiled:
        entry.call(x, given)
    assert not compiled  # not every time
    trees_close(shared_value(entry)(x, given), expected, 1e-6)

    moved = entry.call(jnp.moveaxis(x, -1, 1), given, axis=1)
    if entry.dense_only:
        moved = jnp.moveaxis(moved, 1, -1)
    trees_close(moved, expected, 1e-6)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.differentiable], ids=lambda e: e.id)
def test_derivatives_are_those_of_finite_differences(entry, x64):
    x, given = scores(entry, dtype=np.float64), inputs_of(entry, dtype=np.float64)
    real = {k: v for k, v in given.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    whole = {k: v for k, v in given.items() if k not in real}
    for name in {"reference", *entry.constants} & set(real):  # a gauge's derivative is zero by definition
        whole[name] = real.pop(name)

    def f(point):
        return contract(entry.call(point[0], {**point[1], **whole}), seed=3)

    rng = np.random.default_rng(1)
    point = (x, real)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * (np.asarray(a) != 0)), point)
    step = 1e-5

    def dot(a, b):
        return sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

    @jax.jit
    def at(t):
        """The value and the gradient, and their derivatives along the direction."""
        moved = jax.tree.map(lambda a, d: a + t * d, point, direction)
        if entry.second_order:
            return jax.jvp(jax.value_and_grad(f), (moved,), (direction,))
        value, slope = jax.jvp(f, (moved,), (direction,))
        return (value, jax.grad(f)(moved)), (slope, None)

    ((low, g_low), _), ((high, g_high), _) = at(-step), at(step)
    (_, gradient), (forward, curvature) = at(0.0)
    slope = (high - low) / (2 * step)
    np.testing.assert_allclose(dot(gradient, direction), slope, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(forward, slope, rtol=1e-6, atol=1e-8)
    if entry.second_order:
        numeric = jax.tree.map(lambda h, lo: (h - lo) / (2 * step), g_high, g_low)
        trees_close(curvature, numeric, 1e-5)
        if entry.thorough:
            reverse = jax.jit(jax.grad(lambda p: dot(jax.grad(f)(p), direction)))(point)
            trees_close(reverse, curvature, 1e-9)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.where], ids=lambda e: e.id)
def test_masked_is_absent_whatever_it_holds(entry, x64):
    x, given = scores(entry, dtype=np.float64), inputs_of(entry, dtype=np.float64)
    mask = row_mask(entry, given)
    program = value_and_gradient(entry)
    # Absent is -inf in every row of logits.
    lacking = {k: jnp.where(mask, v, -jnp.inf) if k == "teacher" else v for k, v in given.items()}
    absent, expected = program(jnp.where(mask, x, -jnp.inf), lacking, {})
    for junk in (jnp.nan, jnp.inf, 1e30):
        result, gradient = program(jnp.where(mask, x, junk), given, {"where": mask})
        trees_close(result, absent, 1e-12)
        if entry.differentiable:
            assert jnp.all(jnp.where(mask, 0, gradient) == 0)
            trees_close(gradient, expected, 1e-12)

    # Columns masked for all rows are as good as cut away; labels lie in the first half.
    cut = 4
    short = {k: v if k in PER_ROW else v[..., :cut] for k, v in given.items()}
    removed = value(entry)(x[..., :cut], short, {})
    if entry.dense_only:
        removed = jnp.pad(removed, [(0, 0)] * 2 + [(0, V - cut)], constant_values=entry.empty)
    columns = jnp.broadcast_to(jnp.arange(V) < cut, x.shape)
    trees_close(program(x.at[..., cut:].set(jnp.nan), given, {"where": columns})[0], removed, 1e-12)


@every
def test_a_row_without_entries(entry, x64):
    x, given = scores(entry, dtype=np.float64), inputs_of(entry, dtype=np.float64)
    keep = jnp.ones(LEADING, bool).at[0, 1].set(False)
    program = value_and_gradient(entry)
    full, _ = program(x, given, {})
    cases = [(x.at[0, 1].set(-jnp.inf), {})]
    if entry.where:
        where = jnp.broadcast_to(keep[..., None], x.shape)
        cases.append((x.at[0, 1].set(jnp.nan), {"where": where}))
        jax.eval_shape(value(entry), x, given, {"where": keep[..., None]})
    for spoiled, options in cases:
        result, gradient = program(spoiled, given, options)
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(full)):
            if jnp.issubdtype(a.dtype, jnp.floating):
                expected = 0.0 if entry.export.endswith("softmax_top_k") else entry.empty
                np.testing.assert_array_equal(a[0, 1], np.broadcast_to(expected, a[0, 1].shape))
            near(a[keep], b[keep])
        if entry.differentiable:
            assert jnp.all(gradient[0, 1] == 0) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.differentiable], ids=lambda e: e.id)
def test_nan_shows_in_its_row_alone(entry, x64):
    """At the label, at another class, at the only class present, or in a teacher's row: no guard takes it for 0."""
    x, given = scores(entry, dtype=np.float64), inputs_of(entry, dtype=np.float64)
    label = 0
    for name, at in (
        ("soft", jnp.argmax),
        ("positive_mask", jnp.argmax),
        ("positives", jnp.max),
        ("labels", jnp.max),
    ):
        label = int(at(given[name][1, 1])) if name in given else label
    if "soft" in given:  # one class can be the only one with a probability
        given["soft"] = given["soft"].at[1, 1].set(jnp.arange(V) == label)
    program, others = value_and_gradient(entry), np.ones(LEADING, bool)
    others[1, 1] = False
    cases = [(x.at[1, 1, c].set(jnp.nan), given, {}) for c in (label, (label + 4) % V)]
    if "teacher" in given:
        teacher = given["teacher"].at[1, 1, label].set(jnp.nan)
        cases.append((x, {**given, "teacher": teacher}, {}))
    if entry.where:
        alone = {"where": jnp.ones(x.shape, bool).at[1, 1].set(jnp.arange(V) == label)}
        cases += [(spoiled, known, alone) for spoiled, known, _ in (cases[0], *cases[2:])]
    plain = {}
    for spoiled, known, options in cases:
        if len(options) not in plain:
            plain[len(options)] = floats(program(x, given, options)[0])
        result, gradient = program(spoiled, known, options)
        for a, b in zip(floats(result), plain[len(options)]):
            assert np.any(np.isnan(a[1, 1])), (label, spoiled[1, 1])
            near(a[others], b[others], 1e-12)
        assert np.all(np.isfinite(gradient[others]))


def exact(x, given, program):
    """The float results of a program for the same numbers in float64."""
    with float64():
        given = {
            k: jnp.asarray(np.asarray(a, np.float64)) if a.dtype == np.float32 else a
            for k, a in given.items()
        }
        return [np.asarray(a) for a in floats(program(jnp.asarray(np.asarray(x, np.float64)), given))]


@pytest.mark.parametrize(
    ("entry", "dtype"),
    [(e, jnp.bfloat16) for e in ENTRIES] + [(e, jnp.float16) for e in ENTRIES if e.thorough or e.dense_only],
    ids=lambda v: v.id if isinstance(v, Entry) else v.__name__,
)
def test_half_precision_is_accumulated_in_float32(entry, dtype):
    """Under strict promotion, where no operation changes a dtype by itself; float16 with 64-bit types switched on."""
    columns = 300
    with float64() if dtype == jnp.float16 else contextlib.nullcontext():
        x = scores(entry, columns=columns).astype(dtype)
        given = inputs_of(entry, columns=columns)
        with jax.numpy_dtype_promotion("strict"):
            result, gradient = value_and_gradient(entry)(x, given, {})
    keeps_dtype = entry.dense_only or entry.export.endswith("softmax_top_k")
    for a, b in zip(floats(result), exact(x, given, entry.call)):
        assert a.dtype == (dtype if keeps_dtype else jnp.float32)
        error = np.abs(np.asarray(a, np.float64) - b) / np.maximum(1, np.abs(b))
        assert error.max() <= entry.low, error.max()
    if entry.differentiable:
        assert gradient.dtype == dtype and jnp.all(jnp.isfinite(gradient))


@every
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_huge_logits(entry, offset):
    x = scores(entry) + jnp.float32(offset)
    given = inputs_of(entry)
    result, gradient = value_and_gradient(entry)(x, given, {})
    for a, b in zip(floats(result), exact(x, given, shared_value(entry))):
        assert np.all(np.abs(np.asarray(a, np.float64) - b) <= entry.huge * np.maximum(1, np.abs(b)))
    if entry.differentiable:
        assert jnp.all(jnp.isfinite(gradient))


@every
def test_rows_of_size_one(entry):
    x, given = scores(entry, columns=1), inputs_of(entry, columns=1)
    result, gradient = value_and_gradient(entry)(x, given, {})
    for a in floats(result):
        assert not jnp.any(jnp.isnan(a))
    if entry.differentiable:
        assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.engine
@every
def test_empty_axes(entry):
    x, given = scores(entry), inputs_of(entry)
    no_rows = {k: v if k in PER_COLUMN else v[:, :0] for k, v in given.items()}
    result, gradient = jax.eval_shape(value_and_gradient(entry), x[:, :0], no_rows, {})
    assert all(a.shape[:2] == (2, 0) for a in jax.tree.leaves((result, gradient)))
    if entry.least_columns == 0:
        no_columns = {k: v if k in PER_ROW else v[..., :0] for k, v in given.items()}
        for a in floats(value(entry)(x[..., :0], no_columns, {})):
            np.testing.assert_array_equal(a, np.broadcast_to(entry.empty, a.shape))


@every
def test_invariances(entry, x64):
    x, given = scores(entry, dtype=np.float64), inputs_of(entry, dtype=np.float64)
    f = shared_value(entry)
    base = floats(f(x, given))
    if entry.shift is not None:
        shift = jnp.asarray(np.random.default_rng(5).normal(size=LEADING))
        for a, b in zip(floats(f(x + shift[..., None], given)), base):
            grown = entry.shift * shift
            grown = grown if grown.ndim == a.ndim else grown[..., None]
            np.testing.assert_allclose(a, b + grown, rtol=1e-9, atol=1e-9)
    if entry.scale_invariant:
        for a, b in zip(floats(f(x * 3.7, given)), base):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    if not entry.permutes:
        return
    order = np.random.default_rng(6).permutation(V)
    rank = np.argsort(order)
    moved = {}
    for name, array in given.items():
        if name in IDS:
            moved[name] = jnp.where(array < 0, array, jnp.asarray(rank, jnp.int32)[array])
        elif name in PER_ROW:
            moved[name] = array
        else:
            moved[name] = array[..., order]
    for a, b in zip(floats(f(x[..., order], moved)), base):
        np.testing.assert_allclose(a, b[..., order] if entry.dense_only else b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.jumps], ids=lambda e: e.id)
def test_equal_scores(entry, x64):
    """Equal scores are the limit of scores whose earlier column is larger; gradients lie between both sides."""
    columns, step = np.arange(V), 1e-8
    x = np.random.default_rng(seed_of(entry)).integers(-1, 2, (*LEADING, V)) / 2 + 0.1  # some jump at 0
    x[..., :3] = x[..., 3:6]  # pairs of equals; below, no row is constant
    x[..., 6] = np.where(x[..., 0] == 0.1, 0.6, 0.1)
    given = inputs_of(entry, dtype=np.float64)
    both = lambda moved: value_and_gradient(entry)(jnp.asarray(moved), given, {})
    result, gradient = both(x)
    limit, of_limit = both(x - step * columns)
    trees_close(result, limit, 1e-5)
    if not entry.differentiable:
        return
    if entry.least_columns:  # a selection
        trees_close(gradient, of_limit, 1e-5)
        return
    for shift in range(3):
        one = columns == (np.arange(6).reshape(*LEADING, 1) + shift) % V
        sides = np.stack([both(x + sign * step * one)[1] for sign in (-1, 1)])
        low, high = sides.min(0) - 1e-5, sides.max(0) + 1e-5
        inside = (gradient >= low) & (gradient <= high)
        assert np.all(inside | ~one), (gradient[one], low[one], high[one])


@pytest.mark.engine
@every
def test_streamed_is_dense(entry, x64):
    operands = head(entry)
    columns, given = split(inputs_of(entry, dtype=np.float64))
    if entry.dense_only:
        with pytest.raises(TypeError, match=r"logits\.dense\(\)"):
            entry.call(expression(operands), given)
        return
    point, mask = (operands, columns), row_mask(entry, given)
    expected = dense_head(entry)(point, given, mask)
    trees_close(streamed_head(entry)(point, given, mask), expected, 1e-10)
    if not entry.thorough:
        return

    def both(where, point=point, **options):
        run = of_head(entry, **options)
        return jax.jit(jax.value_and_grad(run, has_aux=True))(point, given, where)

    # Ragged blocks; without a mask, or with one of columns alone, sums over affine logits take closed forms.
    trees_close(both(mask, dense=False, softcap=softcap(entry), block_size=3), expected, 1e-10)
    affine = jax.jit(jax.value_and_grad(of_head(entry, dense=True), has_aux=True))
    some, everything = jnp.arange(V) < 5, jnp.ones(V, bool)
    expected = affine(point, given, some)
    trees_close(both(some, dense=False, block_size=V), expected, 1e-10)
    trees_close(both(None, dense=False, block_size=64), affine(point, given, everything), 1e-10)

    # The other layout of the weight; the gradient filter, which with threshold 0 goes another way to the same.
    transposed = {**operands, "weight": operands["weight"].T}
    options = dict(dense=False, block_size=1, transpose_weight=True)
    if entry.differentiable:
        options["filter_eps"] = 0.0
    result, (gradient, of_columns) = both(some, (transposed, columns), **options)
    gradient["weight"] = gradient["weight"].T
    trees_close((result, (gradient, of_columns)), expected, 1e-10)

    if entry.differentiable:
        direction = jax.tree.map(jnp.cos, point)
        run = lambda point: of_head(entry, dense=False, block_size=3)(point, given, some)[0]
        _, slope = jax.jit(lambda p, d: jax.jvp(run, (p,), (d,)))(point, direction)
        by_leaf = jax.tree.map(jnp.vdot, expected[1], direction)
        near(slope, sum(jax.tree.leaves(by_leaf)), 1e-10)


@pytest.mark.engine
@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.dense_only], ids=lambda e: e.id)
def test_products_are_in_the_dtype_asked_for(entry):
    """No product of hidden, weight and the scores' gradient is in float32, by row or weighted, forward or backward."""
    operands, given = head(entry, dtype=np.float32), inputs_of(entry)
    _, by_row = split(given)

    def by_rows(operands):
        return contract(entry.call(expression(operands, dtype=jnp.bfloat16), given))

    def weighted(operands):
        def loss(logits, *by_row_of_chunk, axis=-1):
            return entry.call(logits, {**given, **dict(zip(by_row, by_row_of_chunk))}, axis=axis)

        logits = expression(operands, dtype=jnp.bfloat16)
        return losses.weighted_sum(loss, logits, *by_row.values())

    for f in (by_rows, weighted) if entry.loss and entry.thorough else (by_rows,):
        traced = jax.make_jaxpr(jax.grad(f) if entry.differentiable else f)(operands)
        products = list(matrix_products(traced, V))
        assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in products)
        assert len(products) >= (3 if entry.differentiable else 1), len(products)
        if entry.differentiable:
            assert all(a.dtype == jnp.float32 for a in traced.out_avals)


# Rows over two devices, columns over two.
ON_MESH = {
    "hidden": P("data"),
    "weight": P(None, "model"),
    "bias": P("model"),
    "scale": P("data"),
    "temperature": P(),
    "x": P("data", "model"),
}


def devices(kind: str, **sizes: int):
    kinds = (getattr(jax.sharding.AxisType, kind),) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def on_mesh(mesh, tree, specs):
    return {k: jax.device_put(v, jax.sharding.NamedSharding(mesh, specs[k])) for k, v in tree.items()}


def contracted(entry, logits, given):
    """One number of all results, with a gradient that differs between them; with the sum of a loss's rows."""
    result = jax.tree.leaves(entry.call(logits, given))
    total = contract([jnp.sin(a.astype(jnp.float64)) for a in result])
    if not (entry.loss and isinstance(logits, jaxsoft.LinearLogits)):
        return total
    columns, by_row = split(given)

    def loss(logits, *rows, axis=-1, **columns):
        return entry.call(logits, {**dict(zip(by_row, rows)), **columns}, axis=axis)

    return total + losses.weighted_sum(loss, logits, *by_row.values(), chunk_size=1, **columns)


@pytest.mark.mesh
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@every
def test_on_a_mesh_as_on_one_device(entry, kind, x64):
    """Logits whose rows and columns lie on several devices: the types say so, or the user; streamed or stored.

    Of a loss, also `weighted_sum`.
    """
    leading = (4,)
    operands, given = head(entry, leading), inputs_of(entry, leading, dtype=np.float64)
    stored = entry.dense_only or seed_of(entry) % 2
    if stored:
        operands = {"x": expression(operands).dense()}
    f = lambda o, g: contracted(entry, o["x"] if stored else expression(o, block_size=4), g)
    given_specs = {k: P("model") if k in PER_COLUMN else P("data") for k in given}
    said = dict(hidden=P("data"), weight=P(None, "model"), logits=P("data", "model"))
    mesh = devices(kind, data=2, model=2)
    with jax.set_mesh(mesh), jaxsoft.shardings(**(said if kind == "Auto" else {})):
        placed = on_mesh(mesh, operands, ON_MESH), on_mesh(mesh, given, given_specs)
        got = jax.jit(jax.value_and_grad(f) if entry.differentiable else f)(*placed)
    single = (jax.value_and_grad(f) if entry.differentiable else f)(operands, given)
    trees_close(jax.device_get(got), jax.device_get(single), 1e-9)


@pytest.mark.mesh
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.thorough and not e.dense_only], ids=lambda e: e.id)
def test_shards_of_columns_are_a_single_device(entry, x64):
    """Inside shard_map: labels and other inputs count the columns of all devices; gradients are summed once."""
    leading = (4,)
    operands, given = head(entry, leading), inputs_of(entry, leading, dtype=np.float64)
    given_specs = {k: P() if k in PER_COLUMN else P("data") for k in given}
    mesh = devices("Explicit", data=2, model=2)

    def local(operands, given, **options):
        result = jax.tree.leaves(entry.call(expression(operands, block_size=4, **options), given))
        return [jnp.sin(a.astype(jnp.float64)) for a in result]

    specs = {k: ON_MESH[k] for k in operands}
    sharded = jax.shard_map(
        lambda o, g: local(o, g, axis_name="model"),
        mesh=mesh,
        in_specs=(specs, given_specs),
        out_specs=P("data"),
    )
    f = jax.jit(lambda o, g: contract(sharded(o, g)))
    with jax.set_mesh(mesh):
        placed = on_mesh(mesh, operands, ON_MESH), on_mesh(mesh, given, given_specs)
        got = jax.jit(jax.value_and_grad(f))(*placed) if entry.differentiable else f(*placed)
    single = lambda o: contract(local(o, given))
    wanted = jax.value_and_grad(single)(operands) if entry.differentiable else single(operands)
    trees_close(jax.device_get(got), jax.device_get(wanted), 1e-10)


@pytest.mark.engine
@every_loss
def test_weighted_sum_is_the_sum_of_weighted_losses(entry, x64):
    """The gradient taken in the forward pass, for every loss, against the plain one; dense logits as well."""
    columns, given = split(inputs_of(entry, dtype=np.float64))
    point, mask = (head(entry), columns), row_mask(entry, given)
    weights = jnp.asarray(np.random.default_rng(8).normal(size=LEADING)).at[0, 0].set(0)

    def loss(logits, *by_row, where=None, axis=-1, **columns):
        return entry.call(logits, {**dict(zip(given, by_row)), **columns}, where=where, axis=axis)

    def run(point, weights, where, *, dense=False, **options):
        operands, columns = point
        logits = expression(operands, softcap=softcap(entry))
        return losses.weighted_sum(
            loss,
            logits.dense() if dense else logits,
            *given.values(),
            weights=weights,
            where=where,
            **columns,
            **options,
        )

    def check(where, *programs):
        whole = mask | True if where is None else where
        (total, by_row), gradient = dense_head(entry)(point, given, whole, [weights])
        for program in programs:
            trees_close(program(point, weights, where), (total, (gradient, by_row)), 1e-10)

    chunks = functools.partial(run, chunk_size=4 if entry.thorough else 3)  # ragged or even
    with_gradients = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))
    program = with_gradients(chunks)
    check(mask, program)
    if entry.thorough:
        check(mask.at[0, 1].set(False) & (jnp.arange(V) < 5), program)
        check(None, with_gradients(functools.partial(run, dense=True)), with_gradients(run))
        near(
            jax.jit(chunks)(point, weights, mask), program(point, weights, mask)[0], 1e-10
        )  # the value alone


@pytest.mark.engine
@every_loss
def test_ignored_and_unweighted_examples(entry, x64):
    x, given = scores(entry, dtype=np.float64), inputs_of(entry, dtype=np.float64)
    name = entry.inputs[0]
    plain = shared_value(entry)(x, given)
    weights = jnp.asarray(np.random.default_rng(9).random(LEADING)).at[1, 0].set(0)
    spoiled = x.at[1, 0].set(jnp.nan)
    near(value(entry)(spoiled, given, {"weights": weights}), weights * plain)
    if name not in IDS:
        return
    # An ignored example: loss 0 and gradient 0, also where it holds NaN, dense and streamed.
    ignoring = {**given, name: given[name].at[1, 0].set(-100)}
    result, gradient = value_and_gradient(entry)(spoiled, ignoring, {})
    near(result, plain.at[1, 0].set(0))
    assert jnp.all(gradient[1, 0] == 0) and jnp.all(jnp.isfinite(gradient))
    operands, (columns, by_row) = head(entry), split(ignoring)
    operands["hidden"] = operands["hidden"].at[1, 0].set(jnp.nan)
    _, gradient = streamed_head(entry)((operands, columns), by_row, jnp.ones(x.shape, bool))
    assert all(jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(gradient))
    # All examples ignored.
    none = {**given, name: jnp.full_like(given[name], -100)}
    assert jnp.all(shared_value(entry)(spoiled, none) == 0)
    # The mean over the examples that count.
    if name == "labels" and entry.thorough:

        @jax.jit
        def mean(labels):
            loss = lambda l, y, axis=-1: entry.call(l, {**given, name: y}, axis=axis)
            return losses.weighted_mean(loss, x, labels)

        near(mean(ignoring[name]), (jnp.sum(plain) - plain[1, 0]) / 5)
        assert mean(none[name]) == 0


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "teacher" in e.inputs], ids=lambda e: e.id)
def test_an_absent_class_in_one_of_two_rows(entry, x64):
    """-inf in one row is probability 0 in that row alone; a masked class is absent from both."""
    x, given = scores(entry, dtype=np.float64), inputs_of(entry, dtype=np.float64)
    teacher = given.pop("teacher")

    def call(x, teacher, where):
        return entry.call(x, {**given, "teacher": teacher}, where=where)

    run = jax.jit(functools.partial(rows_and_gradients, call))
    empty, gradients = absent_in_one_row(run, x, teacher, 5, 6)
    if entry.inputs[0] == "teacher":
        assert not np.any(empty) and not np.any(gradients)


@pytest.mark.engine
@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.inputs[:1] in (("labels",), ("positives",))], ids=lambda e: e.id
)
def test_labels_out_of_range(entry, x64):
    x, given = scores(entry, dtype=np.float64), inputs_of(entry, dtype=np.float64)
    name = entry.inputs[0]
    bad = V if seed_of(entry) % 2 else -1
    wrong = {**given, name: given[name].at[(1, 2) if name == "labels" else (1, 2, 0)].set(bad)}
    error, _ = checkify.checkify(jax.jit(lambda *given: entry.call(*given)))(x, wrong)
    assert error.get() is not None and str(bad) in error.get() and f"[0, {V})" in error.get()
    if not entry.differentiable:  # a rank behind all, or not among the best
        result = shared_value(entry)(x, wrong)
        assert result[1, 2] == (V if entry.export == "jaxsoft.label_rank" else 0)
        return
    is_bad = np.zeros(LEADING, bool)
    is_bad[1, 2] = True
    columns, by_row = split(wrong)
    (_, streamed), (gradients, _) = streamed_head(entry)(
        (head(entry), columns), by_row, jnp.ones(x.shape, bool)
    )
    for loss, gradient in (value_and_gradient(entry)(x, wrong, {}), (streamed, gradients["hidden"])):
        np.testing.assert_array_equal(jnp.isnan(loss), is_bad)
        assert jnp.all(jnp.isnan(gradient[1, 2])) and jnp.all(jnp.isfinite(gradient[~is_bad]))


@pytest.mark.parametrize("entry", [e for e in ENTRIES if set(IDS) & set(e.inputs)], ids=lambda e: e.id)
def test_ids_of_numpy(entry):
    """NumPy's default integers have 64 bits, which JAX does not have by default; outside of `jit` they remain."""
    x, given = scores(entry), inputs_of(entry)
    wide = {k: np.asarray(v, np.int64) if k in IDS else v for k, v in given.items()}
    shapes = [
        jax.eval_shape(lambda x, inputs=inputs: entry.call(x, inputs), x)  # constants are not traced
        for inputs in (wide, given)
    ]
    trees = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in shapes]
    assert trees[0] == trees[1]
