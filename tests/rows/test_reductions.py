"""Every row reduction of the library against plain formulas: blocks, merges, derivatives, absent entries."""

import dataclasses
import functools
import inspect
import pickle
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import contract, trees_close, with_gradient

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
        some=jnp.asarray([[2, 9], [5, 5], [0, 3], [4, 1], [10, 0], [1, 2]], jnp.int32),
        many=jnp.asarray([[2, 9], [5, 5], [0, 3], [4, 1], [10, -1], [1, V]], jnp.int32),
        class_weights=jnp.asarray([*rng.random(V - 1), 0.0]),
        entry_weights=jnp.asarray(entries),
        positive_weights=jnp.asarray(0.1 + rng.random(V)),
        positive_entries=jnp.asarray(0.1 + rng.random((N, V))),
        q=jnp.asarray(q),
        bound=jnp.asarray([0.5, 1.0, 0.3, 0.0, 99.5, -9.0]),
        reference=jnp.asarray(rng.normal(size=N) + np.array([0, 0, 0, 0, 100, 0])),
        theta=jnp.asarray(rng.normal(size=N)),
        power=jnp.asarray([0.3, 1.0, 0.7, 2.0, 1.5, 0.5]),
        other=jnp.asarray(rng.normal(size=(N, V)) * 2).at[0, 1].set(-INF),
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


def plain_powers(x, given):
    p, *_ = probabilities(x)
    return jnp.sum(jnp.where(p > 0, jnp.where(p > 0, p, 1) ** given["power"][:, None], 0), axis=-1)


def plain_relative_entropy(x, other):
    """Divergence, cross-entropy and both log-sum-exps; +inf where the other row lacks an entry of the first."""
    (p, xs, some), (ys, keep, other_some) = probabilities(x), split(other)
    both, lost = some & other_some, jnp.any((x > -jnp.inf) & ~keep, axis=-1)
    log_p, log_q = (a - jnp.where(both, plain_lse(b), 0)[:, None] for a, b in ((xs, x), (ys, other)))
    values = jnp.sum(p * (log_p - log_q), axis=-1), -jnp.sum(p * log_q, axis=-1)
    values = (jnp.where(both, jnp.where(lost, jnp.inf, v), 0) for v in values)
    return *values, plain_lse(x), plain_lse(other)


def relative_entropy_view(result):
    return result.divergence, result.cross_entropy, result.partition.value, result.other_partition.value


def plain_softmax_moments(x, given):
    p, xs, _ = probabilities(x)
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
    Case(
        "sum_of_powered_probabilities",
        lambda g: r.sum_of_powered_probabilities(g["power"]),
        plain_powers,
        ("power",),
    ),
    Case(
        "relative_entropy",
        lambda g: r.relative_entropy(g["other"]),
        lambda x, g: plain_relative_entropy(x, g["other"]),
        ("other",),
        relative_entropy_view,
    ),
    Case(
        "relative_entropy[reverse]",
        lambda g: r.relative_entropy(g["other"], reverse=True),
        lambda x, g: plain_relative_entropy(g["other"], x),
        ("other",),
        relative_entropy_view,
    ),
    Case("take", lambda g: r.take(g["ids"]), lambda x, g: plain_take(x, g["ids"]), ("ids",)),
    Case("take[k]", lambda g: r.take(g["some"]), lambda x, g: plain_take(x, g["some"]), ("some",)),
    Case("label_statistics", lambda g: r.label_statistics(g["ids"]), plain_label, ("ids",), label_view),
    Case(
        "soft_label_statistics",
        lambda g: r.soft_label_statistics(g["q"]),
        plain_soft_label,
        ("q",),
        label_view,
    ),
    Case("maximum", lambda g: r.maximum(), lambda x, g: plain_top_k(x, 1)[0][:, 0]),
    Case("argmax", lambda g: r.argmax(), lambda x, g: plain_top_k(x, 1)[1][:, 0]),
    Case(
        "maximum_and_argmax",
        lambda g: r.maximum_and_argmax(),
        lambda x, g: tuple(a[:, 0] for a in plain_top_k(x, 1)),
    ),
    Case("maximum_below", lambda g: r.maximum_below(g["bound"], g["ids"]), plain_below, ("bound", "ids")),
    Case("top_k", lambda g: r.top_k(3), lambda x, g: plain_top_k(x, 3), view=tuple),
    Case(
        "top_k[more than there are]", lambda g: r.top_k(V + 2), lambda x, g: plain_top_k(x, V + 2), view=tuple
    ),
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
        if inspect.isfunction(value)
        and value.__module__ == reductions.__name__
        and value.__annotations__.get("return") == "RowReduction"
        and not name.startswith("_")
    }
    assert public == {case.factory for case in CASES}


# --- tools -----------------------------------------------------------------------------------------------


def given_of(case):
    return {k: v for k, v in make_inputs().items() if k in case.inputs}


# f64 with sums of tens of terms of size up to 100: 1e-12 leaves a factor of about a hundred to rounding.


def test_every_reduction_can_be_pickled():
    """And its functions equal their copies, so that a compiled program is found again."""
    for case in CASES:
        reduction = case.make(make_inputs())
        copy = pickle.loads(pickle.dumps(reduction))
        assert [f for f in reduction if callable(f)] == [f for f in copy if callable(f)], case.id
        assert [hash(f) for f in reduction if callable(f)] == [hash(f) for f in copy if callable(f)], case.id


@functools.cache
def blockwise(case):
    """The compiled program of a case in ragged blocks: its results, and the gradients of their contraction."""

    def f(p):
        return case.view(reduce_rows(p["x"], case.make(p), block_size=3))

    return jax.jit(lambda p: with_gradient(f, p))


@every
def test_blocks_of_any_size_are_the_formula(case, x64):
    point = {"x": make_scores(), **given_of(case)}
    expected = with_gradient(lambda p: case.reference(p["x"], p), point)
    result, gradient = blockwise(case)(point)
    trees_close((result, gradient), expected)
    assert jnp.all(gradient["x"][3] == 0)  # the row of -inf
    trees_close(case.view(reduce_rows(point["x"], case.make(point), block_size=V + 3)), expected[0])


AFFINE = (
    "sum",
    "mean",
    "weighted_sum[columns]",
    "moments",
)  # streamed only where a softcap forbids the closed form


@pytest.mark.engine
@pytest.mark.parametrize(
    ("case", "softcap"),
    [(c, None) for c in CASES] + [(c, 3.0) for c in CASES if c.id in (*AFFINE, "logsumexp", "top_k")],
    ids=lambda a: getattr(a, "id", str(a)),
)
def test_linear_logits_are_the_formula(case, softcap, x64):
    """Streamed, with rows and columns absent. Sums of affine logits take their closed forms."""
    rng = np.random.default_rng(7)
    rows_kept = jnp.arange(N) != 3
    columns_kept = jnp.arange(V) != 6
    keep = columns_kept & rows_kept[:, None]
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
        x = jnp.where(jnp.arange(V) == 8, 0, p["scale"][:, None] * (p["hidden"] @ p["weight"]) + p["bias"])
        x = x if softcap is None else softcap * jnp.tanh(x / softcap)
        if "other" in p:  # a mask takes an entry from both rows, a score of -inf from one
            p = {**p, "other": jnp.where(keep, p["other"], -jnp.inf)}
        return case.reference(jnp.where(keep & (jnp.arange(V) != 8), x, -jnp.inf), p)

    def streamed(p):
        logits = jaxsoft.linear_logits(
            p["hidden"], p["weight"], bias=p["bias"], scale=p["scale"], softcap=softcap
        )
        # A mask of columns and a mask of rows, ragged blocks: without a softcap, affine sums take their closed forms.
        if softcap is None or case.id in AFFINE:
            options = dict(where=columns_kept, row_where=rows_kept, block_size=4)
        else:  # one mask of entries, the smallest blocks
            options = dict(where=keep, block_size=1)
        return case.view(reduce_rows(logits, case.make(p), **options))

    result, gradient = with_gradient(dense, point)
    if case.factory == "take":  # an absent row is not read: its score is that of an absent entry
        result = result.at[3].set(-INF)
    trees_close(jax.jit(lambda p: with_gradient(streamed, p))(point), (result, gradient), 1e-11)


def test_moments_of_few_rows_are_streamed(x64):
    """The closed form needs at least as many rows as features; with fewer, the scores are read."""
    rng = np.random.default_rng(3)
    hidden, weight = jnp.asarray(rng.normal(size=(2, 5))), jnp.asarray(rng.normal(size=(5, V)))

    def f(point, stream):
        logits = jaxsoft.linear_logits(*point, block_size=4)
        x = reduce_rows(logits, reductions.moments()) if stream else None
        return moments_view(x) if stream else plain_moments(logits.dense(), None)

    got, expected = (
        jax.jit(jax.jacrev(lambda p, s=s: contract(f(p, s))))((hidden, weight)) for s in (True, False)
    )
    trees_close(got, expected, 1e-11)


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


def test_two_masks_of_rows():
    """A mask that varies over rows alone, and `row_where`."""
    first, second = np.array([True, True, False]), np.array([True, False, True])
    got = reduce_rows(
        jnp.ones((3, 4)), reductions.count(), where=first[:, None], row_where=jnp.asarray(second)
    )
    np.testing.assert_array_equal(got, [4, 0, 0])


@every
def test_parts_merge_in_any_order(case, x64):
    """Finished results only: raw states have a gauge. Merging with an empty state changes nothing."""
    sizes = np.random.default_rng(zlib.crc32(case.id.encode())).permutation([1, 4, V - 5])
    cuts = int(sizes[0]), int(sizes[0] + sizes[1])
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

    def merge(one, other):
        return reduction.merge(one, other, *args)

    def finish(state):
        return case.view(reduction.finalize(state, *args))

    expected = case.reference(x, given)
    for state in (
        merge(merge(a, b), c),
        merge(a, merge(b, c)),
        merge(merge(empty, a), merge(merge(b, empty), c)),
    ):
        trees_close(finish(state), expected)
    without = case.reference(x.at[:, cuts[0] : cuts[1]].set(-INF), given)
    trees_close(finish(merge(merge(a, absent), c)), without)
    trees_close(finish(merge(a, merge(absent, c))), without)
    # Three parts, taken in by one state, are one part.
    state = empty
    for start, stop in ((0, cuts[0]), cuts, (cuts[1], V)):
        state = reduction.update(state, tile_of(x, start, stop, reduction), *args)
    trees_close(finish(state), expected)
    trees_close(finish(merge(empty, empty)), finish(empty))


# --- entries picked by index, ties, NaN ------------------------------------------------------------------


def test_take_out_of_range_is_nan_in_value_and_gradient(x64):
    x, ids = make_scores(), jnp.asarray([2, -1, V, 4, 10, 1], jnp.int32)
    for make in (r.take, r.label_statistics):
        f = lambda x, make=make: jax.tree.leaves(reduce_rows(x, make(ids), block_size=4))[0]
        value = f(x)
        gradient = jax.grad(lambda x, f=f: contract(jnp.where(jnp.isnan(f(x)), f(x), 0)))(x)
        bad = np.array([False, True, True, False, False, False])
        np.testing.assert_array_equal(jnp.isnan(value), bad)
        gradient = jax.jacrev(f)(x)
        assert jnp.all(jnp.any(jnp.isnan(gradient[bad]), axis=(1, 2)))
        assert jnp.all(jnp.isfinite(gradient[:, ~bad]))  # the other rows know nothing of it


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_ties_go_to_the_smaller_column(block, x64):
    x = jnp.asarray([[1.0, 3, 2, 3, 3, 1, 2, 0], [0.0, 0, 0, 0, 0, 0, 0, 0]])
    wanted = dict(best=r.argmax(), both=r.maximum_and_argmax(), top=r.top_k(5), below=r.top_k(8))
    out = reduce_rows(x, wanted, block_size=block)
    np.testing.assert_array_equal(out["best"], [1, 0])
    np.testing.assert_array_equal(out["both"][1], [1, 0])
    np.testing.assert_array_equal(out["top"].indices, [[1, 3, 4, 2, 6], [0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(out["top"].values, [[3, 3, 3, 2, 2], [0] * 5])
    np.testing.assert_array_equal(out["below"].indices, [[1, 3, 4, 2, 6, 0, 5, 7], range(8)])
    # The whole gradient of the maximum goes to the first column that holds it.
    gradient = jax.grad(lambda x: contract(reduce_rows(x, r.maximum(), block_size=block)))(x)
    assert np.count_nonzero(gradient) == 2 and gradient[0, 1] != 0 and gradient[1, 0] != 0
    # Ranks: the columns that come first in the order above. Streamed, too.
    ranks = np.argsort(out["below"].indices, axis=-1)
    logits = jaxsoft.linear_logits(jnp.eye(2), x, block_size=block)
    for column in range(8):
        labels = jnp.full(2, column, jnp.int32)
        np.testing.assert_array_equal(jaxsoft.label_rank(logits, labels), ranks[:, column])


def test_top_k_with_more_than_there_are(x64):
    x = jnp.asarray([[1.0, -INF, 2.0], [-INF, -INF, -INF]])
    for block in (1, 2, 5):
        best = reduce_rows(x, r.top_k(5), block_size=block)
        np.testing.assert_array_equal(best.values, [[2, 1, -INF, -INF, -INF], [-INF] * 5])
        np.testing.assert_array_equal(best.indices, [[2, 0, -1, -1, -1], [-1] * 5])
    gradient = jax.grad(lambda x: contract(reduce_rows(x, r.top_k(5))))(x)
    assert gradient[0, 0] != 0 and gradient[0, 2] != 0
    np.testing.assert_array_equal(gradient.at[0, jnp.array([0, 2])].set(0), np.zeros((2, 3)))


def test_top_k_merges_parts_given_in_any_order(x64):
    """Values first, then columns: even parts merged out of order keep ties in the order of columns."""
    x = jnp.asarray([[1.0, 3, 2, 3, 3, 1, 2, 0]])
    reduction = r.top_k(4)
    states = [
        reduction.update(reduction.init(jnp.zeros(1)), tile_at(x, a, b)) for a, b in ((0, 2), (2, 5), (5, 8))
    ]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        a, b, c = (states[i] for i in order)
        best = reduction.finalize(reduction.merge(reduction.merge(a, b), c))
        np.testing.assert_array_equal(best.indices, [[1, 3, 4, 2]])


def tile_at(x, start, stop):
    cols = jnp.arange(start, stop, dtype=jnp.int32)
    x = x[:, start:stop]
    keep = x > -jnp.inf
    return Tile(jnp.where(keep, x, 0), x, keep, cols, V)


@every
def test_a_nan_stays_in_its_row(case, x64):
    x, given = make_scores(), given_of(case)
    other = np.arange(N) != 0
    (spoiled, g_spoiled), (clean, g_clean) = (
        blockwise(case)({"x": scores, **given}) for scores in (x.at[0, 4].set(jnp.nan), x)
    )
    for a, b in zip(jax.tree.leaves(spoiled), jax.tree.leaves(clean)):
        np.testing.assert_array_equal(a[other], b[other])
    np.testing.assert_array_equal(g_spoiled["x"][other], g_clean["x"][other])


def test_a_first_block_without_entries_does_not_set_the_centre():
    """Large scores in float32 keep the digits of their variance, although the first block of a row is absent."""
    x = 1e4 + jnp.asarray(np.random.default_rng(4).normal(size=(3, 9)), jnp.float32)
    x = x.at[1, :3].set(-INF).at[2, 3:6].set(-INF)
    exact = np.where(x > -INF, np.asarray(x, np.float64), np.nan)
    variance = reduce_rows(x, r.moments(), block_size=3).variance
    np.testing.assert_allclose(variance, np.nanvar(exact, axis=1), rtol=1e-4)


def test_nan_wins_a_maximum(x64):
    x = jnp.asarray([[1.0, jnp.nan, 5.0, jnp.nan], [1.0, 2.0, 5.0, 3.0]])
    for block in (1, 2, 4):
        value, index = reduce_rows(x, r.maximum_and_argmax(), block_size=block)
        np.testing.assert_array_equal(value, [jnp.nan, 5.0])
        np.testing.assert_array_equal(index, [1, 2])


# --- the methods of logsumexp ----------------------------------------------------------------------------


def state_of(reduction, values, *args):
    x = jnp.asarray([values], float)
    return reduction.update(reduction.init(jnp.zeros(1), *args), tile_at(x, 0, x.shape[1]), *args)


def test_exponent_states(x64):
    """Mantissas and exponents as published; any sum is a mantissa times a power of two, exactly."""
    reduction = r.logsumexp(method="exponent")
    for x, a, e in ((1000.0, 0.809465, 1443), (1001.0, 1.100177, 1444), (998.0, 0.876394, 1440)):
        exponent, mantissa = state_of(reduction, [x])
        assert exponent[0] == e
        np.testing.assert_allclose(mantissa, [a], atol=5e-7)
    for values, a, e, lse in (
        ([1000.0, 1001.0, 998.0], 1.559684, 1444, 1001.349012),
        ([1.0, 2.0, -1.0, 0.5], 1.515492, 3, 2.495182),
    ):
        state = state_of(reduction, values)
        assert state[0][0] == e
        np.testing.assert_allclose(state[1], [a], atol=5e-7)
        np.testing.assert_allclose(reduction.finalize(state), [lse], atol=5e-7)
    np.testing.assert_array_equal(
        [s[0][0] for s in (state_of(reduction, [v]) for v in (1.0, 2, -1, 0.5))], [1, 3, -1, 1]
    )
    # Rescaling is exact: parts that meet at another exponent add up to the sum in one go, to the last bit.
    one, two, far = (state_of(reduction, v) for v in ([0.3, 0.4], [0.35], [400.0]))
    both = reduction.merge(one, two)
    assert reduction.merge(both, far)[1] == reduction.merge(one, reduction.merge(two, far))[1]
    assert reduction.merge(state_of(reduction, [-INF]), one)[1] == one[1]


def test_online_states(x64):
    reduction = r.logsumexp()
    a, b = state_of(reduction, [1.0, 2.0]), state_of(reduction, [-1.0, 0.5])
    np.testing.assert_allclose([a[0][0], a[1][0]], [2, 1.367879], atol=5e-7)
    np.testing.assert_allclose([b[0][0], b[1][0]], [0.5, 1.223130], atol=5e-7)
    m, s = reduction.merge(a, b)
    np.testing.assert_allclose([m[0], s[0]], [2, 1.640797], atol=5e-7)


def test_reference_state(x64):
    """At the fixed reference 1 the sum is 4.460148, and parts add without rescaling."""
    phi = jnp.ones(1)
    reduction = r.logsumexp(method="reference", reference=phi)
    a, b = state_of(reduction, [1.0, 2.0], phi), state_of(reduction, [-1.0, 0.5], phi)
    hi, s = reduction.merge(a, b)
    assert hi[0] == 2 and s[0] == a[1][0] + b[1][0]
    np.testing.assert_allclose(s, [4.460148], atol=5e-7)


OFFSETS = np.array([-1e4, -200, -81, -79, 0, 65, 67, 95, 1e4])  # of a row's maximum from the reference
SUITS = (OFFSETS > -80) & (OFFSETS < 66)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_reference_outside_its_range(streamed):
    """NaN from the reduction; computed anew, with the right finite gradient, by the functions."""
    base = np.asarray([0.0, -1.0, -2.5], np.float32)
    scores = np.concatenate([OFFSETS[:, None] + base, np.full((1, 3), -INF)]).astype(np.float32)
    reference = jnp.zeros(10, jnp.float32)
    if streamed:
        x, keep = jnp.asarray(np.where(np.isfinite(scores), scores, 0)), jnp.arange(10) < 9

        def lift(x):
            return jaxsoft.linear_logits(x, jnp.eye(3), block_size=2)
    else:
        x, keep = jnp.asarray(scores), None

        def lift(x):
            return x

    where = None if keep is None else keep[:, None]
    raw = reduce_rows(lift(x), r.logsumexp(method="reference", reference=reference), row_where=keep)
    np.testing.assert_array_equal(jnp.isnan(raw), [*~SUITS, False])
    assert raw[9] == -INF

    def f(x):
        return jaxsoft.logsumexp(lift(x), method="reference", reference=reference, where=where)

    exact = np.log(np.sum(np.exp(base.astype(float)))) + OFFSETS.astype(np.float32)
    # f32: half a unit in the last place of the result, and of the sum's logarithm
    np.testing.assert_allclose(f(x)[:9], exact, rtol=2e-7, atol=2e-7)
    assert f(x)[9] == -INF
    gradient = jax.grad(lambda x: jnp.sum(jnp.where(jnp.isfinite(f(x)), f(x), 0) * jnp.arange(10)))(x)
    p = np.exp(base) / np.sum(np.exp(base))
    # A row's scores are rounded by up to 2**-11 (at 1e4), and the softmax with them: relative 1e-3 there only.
    large = np.abs(OFFSETS) > 1e3
    expected = np.arange(9)[:, None] * p
    np.testing.assert_allclose(gradient[:9][~large], expected[~large], rtol=2e-5)
    np.testing.assert_allclose(gradient[:9][large], expected[large], rtol=1e-3)
    assert jnp.all(gradient[9] == 0)
    if not streamed:
        softmax = lambda x: rows.unified_max_softmax(x, reference)
        np.testing.assert_allclose(softmax(x), jaxsoft.softmax(x), rtol=2e-5, atol=1e-7)
        weights = jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)), jnp.float32)
        got, expected = (
            jax.grad(lambda x, s=s: jnp.sum(weights * s(x)))(x) for s in (softmax, jaxsoft.softmax)
        )
        assert jnp.all(jnp.isfinite(got))
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_options_of_logsumexp():
    with pytest.raises(
        ValueError, match="method must be one of 'online', 'exponent', 'reference', got 'fast'"
    ):
        r.logsumexp(method="fast")
    with pytest.raises(ValueError, match="reference must be given with method='reference'"):
        r.logsumexp(method="reference")
    with pytest.raises(ValueError, match="reference must be given with method='reference'"):
        r.log_partition(reference=jnp.ones(3))


# --- a user's reduction ----------------------------------------------------------------------------------

_LSE = reductions.logsumexp()


def margin_update(state, tile, labels, margin):
    margins = jnp.where(tile.cols == labels[..., None], margin[..., None], 0)
    return _LSE.update(state, tile.with_scores(tile.scores - margins), labels, margin)


def margin_logsumexp(labels, margin):
    return _LSE._replace(update=margin_update, args=(labels, margin))


def margin_loss(logits, labels, margin, axis=-1):
    """Cross-entropy in which the label's logit must lead by a margin."""
    lse, score = reduce_rows(logits, (margin_logsumexp(labels, margin), reductions.take(labels)), axis=axis)
    return lse - score + margin


def plain_margin_loss(x, labels, margin):
    x = x - margin[..., None] * (jnp.arange(x.shape[-1]) == labels[..., None])
    return jax.nn.logsumexp(x, axis=-1) - jnp.take_along_axis(x, labels[..., None], -1)[..., 0]


class TestAReductionOfAUser:
    """Ten lines, no derivative: every driver and every transform has it."""

    def operands(self, leading=(4,)):
        rng = np.random.default_rng(11)
        return dict(
            hidden=jnp.asarray(rng.normal(size=(*leading, D))),
            weight=jnp.asarray(rng.normal(size=(D, V))),
            margin=jnp.asarray(rng.random(leading)),
        )

    labels = jnp.asarray([2, 0, 10, 5], jnp.int32)
    weights = jnp.asarray([0.3, -1.0, 2.0, 0.7])

    def losses_of(self, kind):
        def dense(p, labels):
            return margin_loss(p["hidden"] @ p["weight"], labels, p["margin"])

        def streamed(p, labels):
            return margin_loss(
                jaxsoft.linear_logits(p["hidden"], p["weight"], block_size=4), labels, p["margin"]
            )

        def plain(p, labels):
            return plain_margin_loss(p["hidden"] @ p["weight"], labels, p["margin"])

        return dict(dense=dense, streamed=streamed, plain=plain)[kind]

    def total(self, kind):
        return lambda p: jnp.sum(jnp.asarray(self.weights) * self.losses_of(kind)(p, self.labels))

    @pytest.mark.parametrize("kind", ["dense", "streamed"])
    def test_value_and_derivatives(self, kind, x64):
        p = self.operands()
        direction = jax.tree.map(jnp.cos, p)

        def everything(f):
            value, tangent = jax.jvp(f, (p,), (direction,))
            _, curvature = jax.jvp(jax.grad(f), (p,), (direction,))
            both = jax.grad(lambda p: jax.jvp(f, (p,), (direction,))[1])(p)
            return value, tangent, jax.grad(f)(p), curvature, both

        got, expected = (jax.jit(lambda k=k: everything(self.total(k)))() for k in (kind, "plain"))
        trees_close(got, expected, 1e-11)
        assert jnp.all(got[2]["margin"] != 0)

    def test_vmap(self, x64):
        p = self.operands((3, 4))
        labels = jnp.stack([self.labels, self.labels[::-1], self.labels])
        axes = {"hidden": 0, "weight": None, "margin": 0}
        for f in (
            self.losses_of("streamed"),
            lambda p, y: jax.grad(lambda p: jnp.sum(self.losses_of("streamed")(p, y) ** 2))(p),
        ):
            got = jax.jit(jax.vmap(f, (axes, 0)))(p, labels)
            for i in range(3):
                one = f(
                    {"hidden": p["hidden"][i], "weight": p["weight"], "margin": p["margin"][i]}, labels[i]
                )
                trees_close(jax.tree.map(lambda a, i=i: a[i], got), one, 1e-12)

    def test_leading_axes(self, x64):
        p = self.operands((3, 4))
        labels = jnp.stack([self.labels, self.labels[::-1], self.labels])
        got = self.losses_of("streamed")(p, labels)
        trees_close(got, plain_margin_loss(p["hidden"] @ p["weight"], labels, p["margin"]))

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_weighted_sum(self, chunk, x64):
        p = self.operands()

        def f(p):
            logits = jaxsoft.linear_logits(p["hidden"], p["weight"], block_size=4)
            return losses.weighted_sum(
                margin_loss,
                logits,
                self.labels,
                p["margin"],
                weights=jnp.asarray(self.weights),
                chunk_size=chunk,
            )

        got, expected = (jax.jit(jax.value_and_grad(g))(p) for g in (f, self.total("plain")))
        trees_close(got, expected, 1e-11)


def test_float64_of_the_tests_is_on():
    with float64():
        assert make_scores().dtype == jnp.float64
