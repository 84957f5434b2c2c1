"""Every row reduction of the library against plain formulas: blocks, merges, derivatives, absent entries."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64

import jaxsoft
from jaxsoft import losses, rows
from jaxsoft.rows import Tile, reduce_rows, reductions

N, V, D = 6, 11, 3
INF = np.inf


@dataclasses.dataclass(frozen=True)
class Case:
    """A reduction, the inputs it takes (keys of `make_inputs`) and the formula it stands for.

    `reference(x, given)` gets dense scores in which -inf marks absent entries; `view` turns a result into
    numbers that do not depend on how the state was reached (a log-partition in parts has many forms).
    """

    id: str
    make: Callable[[dict], rows.RowReduction]
    reference: Callable[[Any, dict], Any]
    inputs: tuple[str, ...] = ()
    view: Callable[[Any], Any] = lambda result: result

    @property
    def factory(self) -> str:
        return self.id.split("[")[0]


def make_inputs(seed=1):
    rng = np.random.default_rng(seed)
    q = rng.random((N, V))
    q[0, 3] = 0
    entries = rng.normal(size=(N, V))
    return dict(
        ids=jnp.asarray([2, 5, 0, 4, 10, 1], jnp.int32),
        many=jnp.asarray([[2, 9], [5, 5], [0, 3], [4, 1], [10, -1], [1, V]], jnp.int32),
        class_weights=jnp.asarray([*rng.random(V - 1), 0.0]),
        entry_weights=jnp.asarray(entries),
        positive_weights=jnp.asarray(0.1 + rng.random(V)),
        positive_entries=jnp.asarray(0.1 + rng.random((N, V))),
        q=jnp.asarray(q),
        bound=jnp.asarray([0.5, 1.0, 0.3, 0.0, 99.5, -9.0]),
        reference=jnp.asarray(rng.normal(size=N) + np.array([0, 0, 0, 0, 100, 0])),
        theta=jnp.asarray(rng.normal(size=N)),
    )


def make_scores(seed=0):
    """Plain; ties; some -inf; a row of -inf; large; and one with -inf at its label."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, V)) * 2
    x[1] = np.round(x[1])
    x[2, [1, 3, 4]] = -INF
    x[3] = -INF
    x[4] += 100
    x[5, [1, 6, 7, 8, 9, 10]] = -INF
    return jnp.asarray(x)


# --- the formulas ----------------------------------------------------------------------------------------


def split(x):
    keep = x > -jnp.inf
    return jnp.where(keep, x, 0), keep, jnp.any(keep, axis=-1)


def plain_lse(x, b=1.0):
    xs, keep, some = split(x)
    shift = jnp.where(some, jnp.max(jax.lax.stop_gradient(x), axis=-1), 0)
    total = jnp.sum(jnp.where(keep, b * jnp.exp(jnp.where(keep, xs - shift[:, None], 0)), 0), axis=-1)
    return jnp.where(some, shift + jnp.log(jnp.where(some, total, 1)), -jnp.inf)


def parts(x, b=1.0):
    lse = plain_lse(x, b)
    return lse, 0.7 - jnp.where(lse == -jnp.inf, 0, lse)


def parts_view(result):
    return result.value, result.log_softmax(0.7)


def excluding(x, given):
    named = jnp.any(jnp.arange(V) == given["many"][..., None], axis=1)
    return parts(jnp.where(named, -jnp.inf, x))


def probabilities(x):
    xs, keep, some = split(x)
    lse = jnp.where(some, plain_lse(x), 0)
    return jnp.where(keep, jnp.exp(jnp.where(keep, xs - lse[:, None], 0)), 0), xs, some


def plain_softmax_moments(x, given):
    p, xs, some = probabilities(x)
    log_p = jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)), 0)
    mean = jnp.sum(p * xs, -1)
    return plain_lse(x), mean, -jnp.sum(p * log_p, -1), jnp.sum(p * (xs - mean[:, None]) ** 2, -1)


def plain_take(x, ids):
    flat = ids if ids.ndim == 2 else ids[:, None]
    valid = (flat >= 0) & (flat < V)
    picked = jnp.take_along_axis(x, jnp.where(valid, flat, 0), axis=1)
    picked = jnp.where(valid, picked, jnp.nan)
    return picked if ids.ndim == 2 else picked[:, 0]


def label_view(result):
    return result.nll, result.logsumexp, result.present.astype(float)


def plain_label(x, given):
    _, _, some = split(x)
    score, lse = plain_take(x, given["ids"]), plain_lse(x)
    finite = score > -jnp.inf
    nll = jnp.where(some & finite, lse - jnp.where(finite, score, 0), jnp.where(some, jnp.inf, 0))
    return nll, lse, some.astype(float)


def plain_soft_label(x, given):
    xs, keep, some = split(x)
    q, lse = given["q"], plain_lse(x)
    log_p = jnp.where(keep, xs - jnp.where(some, lse, 0)[:, None], 0)
    lost = jnp.any(~keep & (q > 0), -1)
    nll = jnp.where(lost, jnp.inf, -jnp.sum(jnp.where(keep, q * log_p, 0), -1))
    return jnp.where(some, nll, 0), lse, some.astype(float)


def order(x):
    """Columns by score, largest first, equals by column; absent entries last."""
    return np.lexsort((np.broadcast_to(np.arange(V), x.shape), -np.asarray(jax.lax.stop_gradient(x))), axis=-1)


def plain_top_k(x, k):
    ranks = jnp.argsort(-jax.lax.stop_gradient(x), axis=-1, stable=True)
    best = jnp.take_along_axis(x, ranks, axis=1)
    best = jnp.pad(best, ((0, 0), (0, max(k - V, 0))), constant_values=-jnp.inf)[:, :k]
    ranks = jnp.pad(ranks, ((0, 0), (0, max(k - V, 0))))[:, :k]
    return best, jnp.where(best == -jnp.inf, -1, ranks)


def plain_below(x, given):
    ok = (x < given["bound"][:, None]) & (jnp.arange(V) != given["ids"][:, None])
    return plain_top_k(jnp.where(ok, x, -jnp.inf), 1)[0][:, 0]


def plain_sums(x, weights):
    xs, keep, _ = split(x)
    weights = jnp.where(keep, weights, 0)
    return jnp.sum(weights * xs, -1), jnp.sum(weights, -1)


def plain_mean(x, given=None):
    total, n = plain_sums(x, 1.0)
    return total / jnp.maximum(n, 1)


def plain_moments(x, given):
    xs, keep, _ = split(x)
    n = jnp.sum(keep, -1)
    mean = plain_mean(x)
    squares = jnp.sum(jnp.where(keep, (xs - mean[:, None]) ** 2, 0), -1)
    return n.astype(float), mean, squares / jnp.maximum(n, 1), jnp.sum(xs * xs, -1), 0.3 - mean


def moments_view(m):
    return m.count, m.mean, m.variance, m.sum_of_squares, m.deviation(0.3)


def plain_rank(x, given):
    score, cols, ids = given["bound"][:, None], jnp.arange(V), given["ids"][:, None]
    ahead = (x > score) | ((x == score) & (cols < ids))
    return jnp.sum((x > -jnp.inf) & ahead & (cols != ids), -1)


def some_function(x, cols, theta, c, e):
    return c * jax.nn.softplus(x - theta) * e + 0.01 * cols * x


def other_function(x, cols, theta, c, e):
    return jnp.where(cols == 2, -jnp.inf, c * x + e - theta)


MAPPED = ("theta", "class_weights", "entry_weights")


def mapped(factory, function):
    return lambda g: factory(
        function, g["theta"], col_args=(g["class_weights"],), entry_args=(g["entry_weights"],)
    )


def apply(function, x, g):
    return function(x, jnp.arange(V), g["theta"][:, None], g["class_weights"], g["entry_weights"])


def plain_mapped_sum(x, given):
    xs, keep, _ = split(x)
    return jnp.sum(jnp.where(keep, apply(some_function, xs, given), 0), -1)


def plain_mapped_lse(x, given):
    xs, keep, _ = split(x)
    return plain_lse(jnp.where(keep, apply(other_function, xs, given), -jnp.inf))


r = reductions
CASES = [
    Case("logsumexp", lambda g: r.logsumexp(), lambda x, g: plain_lse(x)),
    Case("logsumexp[exponent]", lambda g: r.logsumexp(method="exponent"), lambda x, g: plain_lse(x)),
    Case(
        "logsumexp[reference]",
        lambda g: r.logsumexp(method="reference", reference=jax.lax.stop_gradient(g["reference"])),
        lambda x, g: plain_lse(x),
        ("reference",),
    ),
    Case("log_partition", lambda g: r.log_partition(), lambda x, g: parts(x), view=parts_view),
    Case(
        "log_partition[exponent]",
        lambda g: r.log_partition(method="exponent"),
        lambda x, g: parts(x),
        view=parts_view,
    ),
    Case(
        "log_partition[reference]",
        lambda g: r.log_partition(method="reference", reference=jax.lax.stop_gradient(g["reference"])),
        lambda x, g: parts(x),
        ("reference",),
        parts_view,
    ),
    Case(
        "weighted_logsumexp[columns]",
        lambda g: r.weighted_logsumexp(g["positive_weights"]),
        lambda x, g: plain_lse(x, g["positive_weights"]),
        ("positive_weights",),
    ),
    Case(
        "weighted_logsumexp[entries]",
        lambda g: r.weighted_logsumexp(g["positive_entries"]),
        lambda x, g: plain_lse(x, g["positive_entries"]),
        ("positive_entries",),
    ),
    Case(
        "weighted_log_partition",
        lambda g: r.weighted_log_partition(g["positive_weights"]),
        lambda x, g: parts(x, g["positive_weights"]),
        ("positive_weights",),
        parts_view,
    ),
    Case(
        "log_partition_excluding",
        lambda g: r.log_partition_excluding(g["many"]),
        excluding,
        ("many",),
        parts_view,
    ),
    Case("softmax_moments", lambda g: r.softmax_moments(), plain_softmax_moments, view=tuple),
    Case(
        "sum_of_squared_probabilities",
        lambda g: r.sum_of_squared_probabilities(),
        lambda x, g: jnp.sum(probabilities(x)[0] ** 2, -1),
    ),
    Case("take", lambda g: r.take(g["ids"]), lambda x, g: plain_take(x, g["ids"]), ("ids",)),
    Case("take[k]", lambda g: r.take(g["many"]), lambda x, g: plain_take(x, g["many"]), ("many",)),
    Case("label_statistics", lambda g: r.label_statistics(g["ids"]), plain_label, ("ids",), label_view),
    Case(
        "soft_label_statistics", lambda g: r.soft_label_statistics(g["q"]), plain_soft_label, ("q",), label_view
    ),
    Case("maximum", lambda g: r.maximum(), lambda x, g: plain_top_k(x, 1)[0][:, 0]),
    Case("argmax", lambda g: r.argmax(), lambda x, g: plain_top_k(x, 1)[1][:, 0]),
    Case("maximum_and_argmax", lambda g: r.maximum_and_argmax(), lambda x, g: tuple(a[:, 0] for a in plain_top_k(x, 1))),
    Case("maximum_below", lambda g: r.maximum_below(g["bound"], g["ids"]), plain_below, ("bound", "ids")),
    Case("top_k", lambda g: r.top_k(3), lambda x, g: plain_top_k(x, 3), view=tuple),
    Case("top_k[more than there are]", lambda g: r.top_k(V + 2), lambda x, g: plain_top_k(x, V + 2), view=tuple),
    Case("count", lambda g: r.count(), lambda x, g: plain_sums(x, 1.0)[1]),
    Case("sum", lambda g: r.sum(), lambda x, g: plain_sums(x, 1.0)[0]),
    Case("mean", lambda g: r.mean(), plain_mean),
    Case(
        "weighted_sum[columns]",
        lambda g: r.weighted_sum(g["class_weights"]),
        lambda x, g: plain_sums(x, g["class_weights"]),
        ("class_weights",),
    ),
    Case(
        "weighted_sum[entries]",
        lambda g: r.weighted_sum(g["entry_weights"]),
        lambda x, g: plain_sums(x, g["entry_weights"]),
        ("entry_weights",),
    ),
    Case("moments", lambda g: r.moments(), plain_moments, view=moments_view),
    Case(
        "count_above",
        lambda g: r.count_above(g["bound"]),
        lambda x, g: jnp.sum(x > g["bound"][:, None], -1),
        ("bound",),
    ),
    Case("rank", lambda g: r.rank(g["ids"], g["bound"]), plain_rank, ("ids", "bound")),
    Case("mapped_sum", mapped(r.mapped_sum, some_function), plain_mapped_sum, MAPPED),
    Case("mapped_logsumexp", mapped(r.mapped_logsumexp, other_function), plain_mapped_lse, MAPPED),
]
every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def test_every_public_factory_has_a_row():
    public = {
        name
        for name, value in vars(reductions).items()
        if inspect.isfunction(value) and value.__module__ == reductions.__name__ and not name.startswith("_")
    }
    assert public == {case.factory for case in CASES}


# --- tools -----------------------------------------------------------------------------------------------


def given_of(case):
    return {k: v for k, v in make_inputs().items() if k in case.inputs}


def is_float(a):
    return jnp.issubdtype(a.dtype, jnp.floating)


def contract(result):
    """A sum of the finite float results with random, non-uniform weights."""
    total = 0.0
    for i, a in enumerate(leaf for leaf in jax.tree.leaves(result) if is_float(leaf)):
        w = jnp.asarray(np.random.default_rng(i).normal(size=a.shape))
        finite = jnp.isfinite(jax.lax.stop_gradient(a))
        total = total + jnp.sum(jnp.where(finite, w * jnp.where(finite, a, 0), 0))
    return jnp.asarray(total)


def with_gradient(f, point):
    """The results of `f(point)` and the gradients of their contraction to all float leaves of the point."""
    floats = {k: v for k, v in point.items() if is_float(v)}
    others = {k: v for k, v in point.items() if not is_float(v)}

    def scalar(floats):
        result = f({**floats, **others})
        return contract(result), result

    gradient, result = jax.jit(jax.grad(scalar, has_aux=True))(floats)
    return result, gradient


def assert_close(a, b, tolerance=1e-12):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves_a) == len(leaves_b)
    for u, v in zip(leaves_a, leaves_b):
        assert u.shape == v.shape
        np.testing.assert_allclose(np.asarray(u, float), np.asarray(v, float), rtol=tolerance, atol=tolerance)


# f64 with sums of tens of terms of size up to 100: 1e-12 leaves a factor of about a hundred to rounding.


@every
def test_blocks_of_any_size_are_the_formula(case, x64):
    point = {"x": make_scores(), **given_of(case)}
    expected, gradient = with_gradient(lambda p: case.reference(p["x"], p), point)
    for block in (1, 4, V + 3):
        f = lambda p, b=block: case.view(reduce_rows(p["x"], case.make(p), block_size=b))  # noqa: E731
        result, g = with_gradient(f, point)
        assert_close(result, expected)
        # An id out of range has gradient NaN by contract, where the formula's is 0: see test_take_out_of_range.
        assert_close(g, gradient)
        assert jnp.all(g["x"][3] == 0)  # the row of -inf


@every
@pytest.mark.parametrize("options", [dict(block_size=4), dict(block_size=1, softcap=3.0)], ids=str)
def test_linear_logits_are_the_formula(case, options, x64):
    """Streamed, with a row and columns absent; sums of affine logits take their closed forms."""
    rng = np.random.default_rng(7)
    rows_kept = jnp.ones((N, 1), bool).at[3].set(False)
    columns_kept = jnp.arange(V) != 6
    point = dict(
        hidden=jnp.asarray(rng.normal(size=(N, D))),
        weight=jnp.asarray(rng.normal(size=(D, V))),
        bias=jnp.asarray(rng.normal(size=V)).at[8].set(-INF),
        scale=jnp.asarray(0.5 + rng.random(N)),
        **given_of(case),
    )
    if "reference" in point:
        point["reference"] = point["reference"].at[4].add(-100)

    def dense(p):
        x = p["scale"][:, None] * (p["hidden"] @ p["weight"]) + p["bias"]
        if "softcap" in options:
            x = jnp.where(x == -jnp.inf, x, 3 * jnp.tanh(jnp.where(x == -jnp.inf, 0, x) / 3))
        return x

    def streamed(p, mask):
        logits = jaxsoft.linear_logits(p["hidden"], p["weight"], bias=p["bias"], scale=p["scale"], **options)
        return case.view(
            reduce_rows(logits, case.make(p), where=mask[0], row_where=None if mask[1] is None else mask[1][:, 0])
        )

    mask = jnp.broadcast_to(columns_kept, (N, V)) & rows_kept
    expected = with_gradient(lambda p: case.reference(jnp.where(mask, dense(p), -jnp.inf), p), point)
    for masks in ((columns_kept, rows_kept), (mask, None)):
        if case.id in ("take", "take[k]"):  # an absent row is not read: its ids are not looked at
            expected[0].at[3].set(-INF)
        assert_close(with_gradient(lambda p, m=masks: streamed(p, m), point), expected, 1e-11)


# --- merging ---------------------------------------------------------------------------------------------


def tile_of(x, start, stop, reduction):
    scores = x[:, start:stop]
    keep = scores > -jnp.inf
    return Tile(
        jnp.where(keep, scores, 0),
        scores,
        keep,
        jnp.arange(start, stop, dtype=jnp.int32),
        V,
        tuple(c[start:stop] for c in reduction.col_args),
        tuple(e[:, start:stop] for e in reduction.entry_args),
    )


@every
@pytest.mark.parametrize("cuts", [(4, 5), (1, 8)], ids=str)
def test_parts_merge_in_any_order(case, cuts, x64):
    """Finished results only: raw states have a gauge. Merging with an empty state changes nothing."""
    x, given = make_scores(), given_of(case)
    x = x.at[0, cuts[0] : cuts[1]].set(-INF)  # a part without entries, in one row
    reduction = case.make(given)
    args = reduction.args
    like = jnp.zeros(N)
    empty = reduction.init(like, *args)

    def of(scores, start, stop):
        return reduction.update(empty, tile_of(scores, start, stop, reduction), *args)

    a, b, c = of(x, 0, cuts[0]), of(x, *cuts), of(x, cuts[1], V)
    absent = of(jnp.full_like(x, -INF), *cuts)  # a part without entries, in all rows
    merge, finish = reduction.merge, lambda s: case.view(reduction.finalize(s, *args))
    # `absent` has seen the columns of b, so it stands for a part of another row: with take, its ids are known.
    expected = case.reference(x, given)
    for state in (
        merge(merge(a, b), c),
        merge(a, merge(b, c)),
        merge(merge(empty, a), merge(merge(b, empty), c)),
    ):
        assert_close(finish(state), expected)
    without = case.reference(x.at[:, cuts[0] : cuts[1]].set(-INF), given)
    if not case.id.startswith("take"):  # a masked score of a take is -inf, not the empty state's 0: see below
        assert_close(finish(merge(merge(a, absent), c)), without)
        assert_close(finish(merge(a, merge(absent, c))), without)
    # Three parts, taken in by one state, are one part.
    state = empty
    for start, stop in ((0, cuts[0]), cuts, (cuts[1], V)):
        state = reduction.update(state, tile_of(x, start, stop, reduction), *args)
    assert_close(finish(state), expected)
    assert_close(finish(merge(empty, empty)), finish(empty))
