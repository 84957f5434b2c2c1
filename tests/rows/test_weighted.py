"""`weighted_sum` and `weighted_mean` beyond the conformance laws: transforms, dtypes, bad input."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import count_pairs, pairs
from helpers import compilations, fails, trees_close
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import losses

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
WEIGHT = jnp.asarray(RNG.normal(size=(4, 9)), jnp.float32)
LABELS = jnp.asarray([0, 3, -100, 8, 2, 2], jnp.int32)
WEIGHTS = jnp.asarray(RNG.random(6), jnp.float32)


def fast(hidden, weight, labels=LABELS, weights=WEIGHTS, **options):
    logits = jaxsoft.linear_logits(hidden, weight)
    return losses.weighted_sum(losses.cross_entropy, logits, labels, weights=weights, **options)


def plain(hidden, weight, labels=LABELS, weights=WEIGHTS, **options):
    return jnp.sum(weights * losses.cross_entropy(jaxsoft.linear_logits(hidden, weight), labels, **options))


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_only_what_is_asked_for_is_differentiated(argnums):
    trees_close(jax.grad(fast, argnums)(HIDDEN, WEIGHT), jax.grad(plain, argnums)(HIDDEN, WEIGHT), 2e-6)


def test_vmap_of_gradients():
    hidden = jnp.stack([HIDDEN, HIDDEN * 0.5])
    f = jax.vmap(jax.grad(fast, (0, 1)), in_axes=(0, None))(hidden, WEIGHT)
    trees_close(f, jax.vmap(jax.grad(plain, (0, 1)), in_axes=(0, None))(hidden, WEIGHT), 2e-6)


def test_the_cotangent_scales_the_gradient():
    trees_close(
        jax.grad(lambda h: jnp.sin(3 * fast(h, WEIGHT)))(HIDDEN),
        jax.grad(lambda h: jnp.sin(3 * plain(h, WEIGHT)))(HIDDEN),
        2e-6,
    )


def test_inside_scan_and_checkpoint():
    def body(f):
        def step(h, _):
            return h - 0.1 * jax.grad(f)(h, WEIGHT), f(h, WEIGHT)

        return jax.lax.scan(step, HIDDEN, length=3)

    trees_close(body(fast), body(plain), 2e-6)
    trees_close(jax.grad(jax.checkpoint(fast))(HIDDEN, WEIGHT), jax.grad(plain)(HIDDEN, WEIGHT), 2e-6)


def test_half_precision_accumulates_in_float32():
    h, w = HIDDEN.astype(jnp.bfloat16), WEIGHT.astype(jnp.bfloat16)
    value, gradient = jax.value_and_grad(fast, (0, 1))(h, w, chunk_size=2)
    exact = jax.value_and_grad(plain, (0, 1))(h.astype(jnp.float32), w.astype(jnp.float32))
    assert value.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in gradient)
    trees_close(value, exact[0], 1e-6)
    trees_close(
        gradient, exact[1], 2**-7
    )  # bf16 in, one rounding of each product's cotangent, one of the result


def test_sharded_rows_sum_the_weight_gradient_once():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(h, w, y, s):
        return jax.lax.psum(fast(h, w, y, s), "data")

    specs = (P("data"), P(), P("data"), P("data"))
    total = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    f = jax.jit(jax.value_and_grad(total, (0, 1, 3)))
    trees_close(
        f(HIDDEN, WEIGHT, LABELS, WEIGHTS),
        jax.value_and_grad(plain, (0, 1, 3))(HIDDEN, WEIGHT, LABELS, WEIGHTS),
        2e-6,
    )


def test_a_loss_that_is_jitted_and_options_that_are_arrays():
    jitted = jax.jit(losses.cross_entropy)
    logits = jaxsoft.linear_logits(HIDDEN, WEIGHT)
    trees_close(losses.weighted_sum(jitted, logits, LABELS, weights=WEIGHTS), plain(HIDDEN, WEIGHT), 2e-6)
    smoothing = jnp.float32(0.2)
    a = jax.grad(lambda s: fast(HIDDEN, WEIGHT, label_smoothing=s))(smoothing)
    trees_close(a, jax.grad(lambda s: plain(HIDDEN, WEIGHT, label_smoothing=s))(smoothing), 2e-6)


def two_passes(logits, labels):
    """One pass reads all rows, the other one those that are not ignored."""
    return jaxsoft.logsumexp(logits) + losses.cross_entropy(logits, labels)


def test_a_loss_with_one_masked_and_one_unmasked_pass():
    labels = LABELS.at[1].set(-100)
    fast_, plain_ = (
        jax.value_and_grad(lambda h, w, f=f: f(jaxsoft.linear_logits(h, w)), (0, 1))(HIDDEN, WEIGHT)
        for f in (
            lambda logits: losses.weighted_sum(two_passes, logits, labels, weights=WEIGHTS),
            lambda logits: jnp.sum(WEIGHTS * two_passes(logits, labels)),
        )
    )
    trees_close(fast_, plain_, 2e-6)


def test_no_rows_and_no_examples_that_count():
    empty = jnp.zeros((0, 4))
    value, gradient = jax.value_and_grad(fast, (0, 1))(empty, WEIGHT, jnp.zeros(0, jnp.int32), jnp.zeros(0))
    assert value == 0 and gradient[0].shape == (0, 4) and jnp.all(gradient[1] == 0)

    def mean(h):
        logits = jaxsoft.linear_logits(h, WEIGHT)
        return losses.weighted_mean(losses.cross_entropy, logits, jnp.full(6, -100))

    value, gradient = jax.value_and_grad(mean)(HIDDEN.at[0].set(jnp.nan))
    assert value == 0 and jnp.all(gradient == 0)


def test_weighted_mean_counts_what_is_not_ignored():
    logits = jaxsoft.linear_logits(HIDDEN, WEIGHT)
    per_example = losses.cross_entropy(logits, LABELS)
    trees_close(losses.weighted_mean(losses.cross_entropy, logits, LABELS), per_example.sum() / 5, 2e-6)
    expected = (WEIGHTS * per_example).sum() / (WEIGHTS.sum() - WEIGHTS[2])
    trees_close(losses.weighted_mean(losses.cross_entropy, logits, LABELS, weights=WEIGHTS), expected, 2e-6)
    other = jnp.where(LABELS == -100, 2, LABELS)
    ignored = losses.weighted_mean(losses.cross_entropy, logits, other, ignore_index=2)
    keep = other != 2
    trees_close(ignored, (losses.cross_entropy(logits, other) * keep).sum() / keep.sum(), 2e-6)


def test_forward_mode():
    def sides(f, *primals):
        tangents = tuple(p[::-1] for p in primals)
        return jax.jvp(lambda h, w, s: f(h, w, LABELS, s), primals, tangents)

    trees_close(sides(fast, HIDDEN, WEIGHT, WEIGHTS), sides(plain, HIDDEN, WEIGHT, WEIGHTS), 2e-6)
    trees_close(jax.jacfwd(fast, 1)(HIDDEN, WEIGHT), jax.jacrev(plain, 1)(HIDDEN, WEIGHT), 2e-6)
    halves = (HIDDEN.astype(jnp.bfloat16), WEIGHT.astype(jnp.bfloat16))
    value, tangent = jax.jvp(fast, halves, halves)
    assert value.dtype == tangent.dtype == jnp.float32


def test_the_gradient_costs_one_loop_over_the_logits():
    """Nothing of the forward pass is moved out of its loops, computed twice or kept for the backward pass."""

    def total(h, w):
        logits = jaxsoft.linear_logits(h, w, block_size=3)
        return losses.weighted_sum(losses.cross_entropy, logits, LABELS, chunk_size=2)

    # Over the columns twice, for the statistics and for the gradient, inside one over the chunks.
    assert str(jax.make_jaxpr(jax.grad(total, (0, 1)))(HIDDEN, WEIGHT)).count("scan[") == 3


def test_second_derivatives():
    """Those of the plain sum, also where the gradient filter would refuse them."""
    point = (HIDDEN, WEIGHT, WEIGHTS)
    direction = jax.tree.map(lambda p: p[::-1], point)

    def total(f):
        return lambda point: f(*point[:2], LABELS, point[2])

    def forward_over_reverse(f):
        return jax.jvp(jax.grad(total(f)), (point,), (direction,))[1]

    def reverse_over_reverse(f):
        along = lambda p: sum(map(jnp.vdot, jax.grad(total(f))(p), direction))
        return jax.grad(along)(point)

    def filtered(hidden, weight, labels, weights):
        logits = jaxsoft.linear_logits(hidden, weight, filter_eps=0.1)
        return losses.weighted_sum(losses.cross_entropy, logits, labels, weights=weights)

    expected = jax.jit(lambda: forward_over_reverse(plain))()
    trees_close(jax.jit(lambda: forward_over_reverse(fast))(), expected, 1e-5)
    trees_close(jax.jit(lambda: reverse_over_reverse(fast))(), expected, 1e-5)
    trees_close(forward_over_reverse(filtered), expected, 1e-5)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(weights=jnp.ones(5)), ValueError, ("weights", "(5,)", "(6,)")),
        (
            dict(weights=jnp.ones(6, jnp.complex64)),
            TypeError,
            ("weights", "complex64", "numbers or booleans"),
        ),
        (dict(label_smothing=0.1), TypeError, ("cross_entropy", "'label_smothing'", "label_smoothing: ")),
        (dict(labels=LABELS[:5]), ValueError, ("(5,)", "(6,)")),
        (dict(chunk_size=0), ValueError, ("chunk_size", ">= 1", "0")),
        (dict(where=jnp.ones((6, 8), bool)), ValueError, ("where", "(6, 8)", "(6, 9)")),
        (dict(where=jnp.ones((6, 9))), TypeError, ("where", "boolean", "float32")),
        (dict(smoothing="none"), ValueError, ("smoothing", "'uniform'", "'none'")),
    ],
)
def test_bad_input(options, error, words):
    fails(words, error, lambda: fast(HIDDEN, WEIGHT, **options))


def test_a_loss_of_the_wrong_shape():
    with pytest.raises(ValueError, match="one value per row"):
        losses.weighted_sum(
            lambda x, y: losses.cross_entropy(x, y).mean(), jaxsoft.linear_logits(HIDDEN, WEIGHT), LABELS
        )


def test_calls_that_cannot_work_say_what_to_do():
    logits = jaxsoft.linear_logits(HIDDEN, WEIGHT)
    values = losses.cross_entropy(logits, LABELS)
    for mean in (losses.weighted_mean, losses.weighted_sum):
        words = [
            "loss must be a function",
            f"{mean.__name__}(cross_entropy, logits, labels, weights=weights)",
        ]
        fails(words, TypeError, lambda f=mean: f(values, WEIGHTS))
        words = ["cross_entropy does not take", "3 by position", "weights=..."]
        fails(words, TypeError, lambda f=mean: f(losses.cross_entropy, logits, LABELS, WEIGHTS))
    fails(["labels must be given"], TypeError, lambda: losses.weighted_mean(losses.cross_entropy, logits))
    # Only an axis other than the last one is passed on.
    plain_loss = lambda x, y: losses.cross_entropy(x, y)
    x = logits.dense()
    trees_close(
        losses.weighted_mean(plain_loss, x, LABELS), losses.weighted_mean(plain_loss, logits, LABELS), 2e-6
    )
    fails(
        ["<lambda>", "['axis'] by keyword"],
        TypeError,
        lambda: losses.weighted_sum(plain_loss, x.T, LABELS, axis=0),
    )


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_weights_that_are_counts_or_booleans(dtype):
    weights = np.asarray([1, 0, 2, 1, 0, 1]).astype(dtype)
    floats = jnp.asarray(weights, jnp.float32)

    def run(hidden, weights):
        logits, ce = jaxsoft.linear_logits(hidden, WEIGHT), losses.cross_entropy
        mean, total = (
            f(ce, logits, LABELS, weights=weights) for f in (losses.weighted_mean, losses.weighted_sum)
        )
        return mean + total + ce(logits, LABELS, weights=weights).sum()

    got, expected = (jax.value_and_grad(run)(HIDDEN, w) for w in (weights, floats))
    trees_close(got, expected, 1e-6)


def test_a_second_call_compiles_nothing():
    gradient = jax.grad(fast, (0, 1))
    with compilations() as compiled:
        gradient(HIDDEN, WEIGHT, chunk_size=4)
        assert compiled
        compiled.clear()
        gradient(HIDDEN, WEIGHT, chunk_size=4)
        assert not compiled


def test_a_loss_that_recomputes_rows_out_of_range_of_a_reference():
    def loss(logits, labels):
        del labels
        return jaxsoft.logsumexp(logits, method="reference", reference=jnp.float32([0, 0, 0, 1e3, 0, 0]))

    def run(sum, hidden):
        return sum(loss, jaxsoft.linear_logits(hidden, WEIGHT), LABELS)

    def plainly(loss, logits, labels):
        return jnp.sum(loss(logits, labels))

    got, expected = (
        jax.value_and_grad(functools.partial(run, sum))(HIDDEN) for sum in (losses.weighted_sum, plainly)
    )
    trees_close(got, expected, 1e-6)


def test_a_loss_may_close_over_traced_numbers():
    def run(hidden, factor):
        def closure(logits, labels):
            return factor * losses.cross_entropy(logits, labels)

        def with_argument(factor, logits, labels):
            return factor * losses.cross_entropy(logits, labels)

        logits = jaxsoft.linear_logits(hidden, WEIGHT)
        partly = functools.partial(with_argument, factor)
        nested = lambda *args: closure(*args)
        return sum(losses.weighted_sum(loss, logits, LABELS) for loss in (closure, partly, nested))

    gradient = jax.grad(run)
    expected = gradient(HIDDEN, 1.5)
    trees_close(jax.jit(gradient)(HIDDEN, 1.5), expected, 1e-6)
    mapped = jax.vmap(gradient, (None, 0))(HIDDEN, jnp.array([1.5, 3.0]))
    trees_close(mapped, jnp.stack([expected, 2 * expected]), 1e-6)


@pytest.mark.parametrize("name", ["sum", "weighted_sum"])
def test_no_tracer_outlives_its_trace(name):
    def loss(hidden):
        logits = jaxsoft.linear_logits(hidden, jnp.ones((4, 7)), block_size=3)
        labels = jnp.zeros(6, jnp.int32)
        if name == "sum":
            return jnp.sum(losses.cross_entropy(logits, labels))
        return losses.weighted_sum(losses.cross_entropy, logits, labels)

    gc.collect()
    gc.freeze()  # JAX collects garbage after each trace, only that of the traces with this
    try:
        with jax.checking_leaks():
            jax.make_jaxpr(jax.jit(jax.grad(loss)))(jnp.ones((6, 4)))
    finally:
        gc.unfreeze()


# --- losses that read their logits several times ---------------------------------------------------------

N, D, V = 7, 4, 9


def _reads(logits, a, function):
    """Reads of the logits with options of all kinds, by functions of jaxsoft or (dense) as plain formulas."""
    if function == "jaxsoft":
        lse, entropy = jaxsoft.logsumexp, jaxsoft.entropy
        nll = lambda labels, **o: losses.cross_entropy(logits, labels, **o)
        tempered, capped = jaxsoft.temperature(logits, a["tau"]), lambda: jaxsoft.softcap(logits, 1.5)
    else:
        at = lambda x, labels: jnp.take_along_axis(x, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        lse = lambda x, where=True: jnp.log(jnp.sum(jnp.where(where, jnp.exp(x), 0), axis=1))

        def entropy(x, where):
            e = jnp.where(where, jnp.exp(x), 0)
            p = e / jnp.where(where.any(-1, keepdims=True), e.sum(1, keepdims=True), 1)
            return -jnp.sum(p * jnp.log(jnp.where(where, p, 1)), axis=1)

        nll = lambda labels, where=True: jnp.where(labels < 0, 0, lse(logits, where) - at(logits, labels))
        tempered, capped = logits / a["tau"][:, None], lambda: 1.5 * jnp.tanh(logits / 1.5)
    return {
        "rows are ignored": lambda: nll(a["labels"]),
        "no row is ignored": lambda: nll(a["all_labels"]),
        "entries are masked": lambda: entropy(logits, where=a["mask"]),
        "rows are masked": lambda: entropy(
            logits, where=jnp.broadcast_to(a["row_mask"][:, None], (*a["tau"].shape, V))
        ),
        "columns are masked": lambda: lse(logits, where=a["column_mask"]),
        "the option where": lambda: nll(a["labels"], where=a["where"]),
        "temperature": lambda: lse(tempered),
        "cap": lambda: lse(capped()),
        "further logits": lambda: lse(logits) * lse(a["further"]),
    }


def _several_reads(logits, labels, all_labels, tau, mask, row_mask, further, *, names, **masks):
    a = dict(labels=labels, all_labels=all_labels, tau=tau, mask=mask, row_mask=row_mask, further=further)
    reads = _reads(logits, a | masks, "jaxsoft")
    return sum((i + 1) * reads[name]() for i, name in enumerate(names))


READS = list(_reads(jnp.ones((N, V)), {"tau": jnp.ones(N)}, "plain"))
OPTIONS = {
    **{name: [True, False] for name in READS},
    "function": ["weighted_sum", "weighted_mean"],
    "bias": [False, True],
    "scale": [False, True],
    "softcap": [None, 2.0],
    "temperature": [False, True],
    "transpose_weight": [False, True],
    "block_size": [None, 4],
    "chunk_size": [3, None],
    "weights": [True, False],
}
# A cap comes before a temperature, and only once.
CASES = pairs(OPTIONS, lambda p: p.get("cap") and (p.get("softcap") is not None or p.get("temperature")))


def test_the_design_of_reads():
    """The number of calls, and of pairs of options that meet in one."""
    assert (len(CASES), count_pairs(CASES)) == (10, 542)


@pytest.mark.table
@pytest.mark.parametrize("i", range(len(CASES)))
def test_losses_that_read_their_logits_several_times(i, x64):
    case, rng = CASES[i], np.random.default_rng(i)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    positive = lambda *shape: jnp.asarray(0.5 + rng.random(shape))
    floats = {"hidden": normal(N, D), "weight": normal(D, V), "tau": positive(N)}
    floats |= {"further hidden": normal(N, D), "further weight": normal(D, V)}
    floats |= {name: a for name, a in dict(bias=normal(V), scale=positive(N)).items() if case[name]}
    floats |= {name: a for name, a in dict(temperature=positive(), weights=normal(N)).items() if case[name]}
    labels = jnp.asarray([0, 3, -100, 8, -100, 2, 2], jnp.int32)
    where = jnp.asarray(rng.random((N, V)) < 0.6) | (jnp.arange(V) == labels[:, None])
    mask = jnp.asarray(rng.random((N, V)) < 0.6).at[3].set(False)
    row_mask, column_mask = jnp.asarray([1, 0, 1, 1, 0, 1, 0], bool), jnp.arange(V) % 3 != 1
    fixed = dict(labels=labels, all_labels=jnp.abs(labels) % V, mask=mask, row_mask=row_mask)
    names = tuple(name for name in READS if case[name])
    source = ("bias", "scale", "temperature")

    def fast(f):
        weight = f["weight"].T if case["transpose_weight"] else f["weight"]
        given = {name: case[name] for name in ("softcap", "transpose_weight", "block_size")}
        logits = jaxsoft.linear_logits(f["hidden"], weight, **{n: f.get(n) for n in source}, **given)
        further = jaxsoft.linear_logits(f["further hidden"], f["further weight"])
        by_row = (labels, fixed["all_labels"], f["tau"], mask, row_mask, further)
        options = dict(names=names, where=where, column_mask=column_mask)
        options |= dict(chunk_size=case["chunk_size"], weights=f.get("weights"))
        return getattr(losses, case["function"])(_several_reads, logits, *by_row, **options)

    def plain(f):
        x = f["hidden"] @ f["weight"] * f.get("scale", jnp.ones(N))[:, None] + f.get("bias", 0)
        x = x if case["softcap"] is None else case["softcap"] * jnp.tanh(x / case["softcap"])
        a = (
            fixed
            | f
            | dict(where=where, column_mask=column_mask, further=f["further hidden"] @ f["further weight"])
        )
        reads = _reads(x / f.get("temperature", 1), a, "plain")
        weights = f.get("weights", jnp.ones(N))
        if case["function"] == "weighted_mean":
            weights = jnp.where(labels < 0, 0, weights)
            weights = weights / jnp.sum(weights)
        return jnp.vdot(weights, sum((i + 1) * reads[name]() for i, name in enumerate(names)))

    got, expected = jax.jit(lambda f: (jax.value_and_grad(fast)(f), jax.value_and_grad(plain)(f)))(floats)
    trees_close(got, expected, 1e-11)
