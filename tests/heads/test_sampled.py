"""Losses over sampled classes: worked numbers, the exact losses, unbiased estimates, expressions, shards."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
from conftest import float64
from helpers import close, fails, near, with_gradient
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import heads, losses

A = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])


def test_worked_numbers():
    zero = jnp.array([0])

    @jax.jit
    def run():
        bound = heads.augment_and_reduce_bound
        return [
            heads.sampled_softmax_loss(A, zero, jnp.array([1, 3])),
            heads.sampled_softmax_loss(
                A, zero, jnp.array([1, 3]), log_expected_count=jnp.log(jnp.array([0.5, 0.5]))
            ),
            bound(A, zero).bound,
            bound(A, zero, eta=jnp.array([2.5])).bound,
            -bound(A, zero).log_total,
            heads.one_vs_each_bound(A, zero),
        ]

    close(jnp.concatenate(run()), [0.607226, 0.607226, -0.582420, -0.632437, -0.582420, -0.702649])


def bounds(logits, inputs, negatives):
    """A softmax bound and a one-vs-each bound over the same classes."""
    given = dict(negatives=negatives, weights=inputs["weights"])
    return dict(
        reduced=heads.augment_and_reduce_bound(logits, inputs["labels"], eta=inputs["eta"], **given),
        each=heads.one_vs_each_bound(logits, inputs["labels"], **given),
    )


def all_bounds(logits, inputs, negatives):
    """All bounds over the same classes."""
    given = dict(negatives=negatives, weights=inputs["weights"])
    labels = inputs["labels"]
    latent = functools.partial(heads.latent_augment_and_reduce_bound, logits, labels, **given)
    return bounds(logits, inputs, negatives) | dict(
        best=heads.augment_and_reduce_bound(logits, labels, **given),
        logistic=latent(inputs["noise"], inputs["std"]),
        probit=latent(inputs["noise"], inputs["std"], kind="probit"),
    )


def point(n=5, classes=7, d=4):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    labels[1] = -100
    return dict(
        hidden=jnp.asarray(rng.normal(size=(n, d))),
        weight=jnp.asarray(rng.normal(size=(d, classes))),
        bias=jnp.asarray(rng.normal(size=classes)),
        scale=jnp.asarray(rng.uniform(0.5, 2, n)),
        temperature=jnp.asarray(rng.uniform(0.5, 2, n)),
        eta=jnp.asarray(rng.uniform(1, 9, n)),
        noise=jnp.asarray(rng.normal(size=n)),
        std=jnp.asarray(rng.uniform(0.5, 2, n)),
        weights=jnp.asarray(rng.uniform(0.5, 2, n)),
        labels=jnp.asarray(labels),
    )


def test_expressions_are_arrays(x64):
    """An expression with every option, over negatives (one of them twice, one a label) and over all classes."""
    inputs = {k: v for k, v in point().items() if k not in ("noise", "std")}
    negatives = jnp.array([2, 5, 2, int(inputs["labels"][0])])

    def of(x, dense):
        names = ("bias", "scale", "temperature")
        logits = jaxsoft.linear_logits(
            x["hidden"], x["weight"], softcap=3.0, block_size=3, **{k: x[k] for k in names}
        )
        logits = logits.dense() if dense else logits
        sampled = heads.sampled_softmax_loss(logits, x["labels"], negatives, weights=x["weights"])
        return sampled, bounds(logits, x, negatives), bounds(logits, x, None)["each"]

    @jax.jit
    def run(inputs):
        return [with_gradient(functools.partial(of, dense=dense), inputs) for dense in (True, False)]

    dense, linear = run(inputs)
    for a, b in zip(jax.tree.leaves(linear), jax.tree.leaves(dense), strict=True):
        near(a, b, 1e-10)
    assert all(a[1] == 0 for a in jax.tree.leaves(dense[0]))


def test_all_classes_are_the_exact_losses_and_single_negatives_average_to_them(x64):
    inputs = {**point(), "weights": None}
    labels = inputs["labels"] = jnp.maximum(inputs["labels"], 0)
    n, classes = 5, 7

    @jax.jit
    def run(inputs):
        logits = inputs["hidden"] @ inputs["weight"]
        singles = jax.vmap(lambda c: all_bounds(logits, inputs, c[None]))(jnp.arange(classes))
        return (
            logits,
            all_bounds(logits, inputs, None),
            singles,
            losses.cross_entropy(logits, labels),
            losses.one_vs_each_loss(logits, labels),
            heads.sampled_softmax_loss(
                logits, labels, jnp.arange(classes), log_expected_count=jnp.zeros(classes)
            ),
        )

    x, exact, singles, nll, ove, sampled = run(inputs)
    near(exact["best"].bound, -nll, 1e-12)
    near(exact["best"].log_total, nll, 1e-12)
    near(sampled, nll, 1e-12)
    near(exact["each"], -ove, 1e-12)
    other = np.asarray(labels)[None] != np.arange(classes)[:, None]
    mean = lambda values: np.where(other, values, 0).sum(0) / (classes - 1)
    near(mean(singles["reduced"].bound), exact["reduced"].bound, 1e-12)
    for name in ("each", "logistic", "probit"):
        near(mean(singles[name]), exact[name], 1e-12)
    # The formulas of the two other kinds
    e, std = np.asarray(inputs["noise"]), np.asarray(inputs["std"])
    gap = np.asarray(x)[np.arange(n), labels][:, None] - np.asarray(x) + e[:, None]
    apart = np.asarray(labels)[:, None] != np.arange(classes)
    log_sigmoid = scipy.special.log_expit
    logistic = (log_sigmoid(gap) * apart).sum(1) + log_sigmoid(e) + log_sigmoid(-e) + np.log(std) + 2
    probit = (scipy.special.log_ndtr(gap) * apart).sum(1) + scipy.stats.norm.logpdf(e)
    near(exact["logistic"], logistic, 1e-12)
    near(exact["probit"], probit + 0.5 * np.log(2 * math.pi * math.e * std**2), 1e-12)


def test_sharded_classes():
    inputs = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a, point(classes=8))
    negatives = jnp.array([7, 2, 0, 5, 2])
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def run(hidden, weight, bias, axis_name=None):
        def of(hidden, weight, bias):
            logits = jaxsoft.linear_logits(hidden, weight, bias=bias, axis_name=axis_name)
            reduced = heads.augment_and_reduce_bound(
                logits, inputs["labels"], eta=inputs["eta"], negatives=negatives
            )
            values = reduced.bound + heads.one_vs_each_bound(logits, inputs["labels"])
            return values + heads.sampled_softmax_loss(logits, inputs["labels"], negatives)

        values, pull = jax.vjp(of, hidden, weight, bias)
        return values, pull(jnp.linspace(1, 2, 5))

    specs = P(), P(None, "model"), P("model")
    f = jax.shard_map(
        functools.partial(run, axis_name="model"), mesh=mesh, in_specs=specs, out_specs=(P(), specs)
    )
    operands = inputs["hidden"], inputs["weight"], inputs["bias"]
    for a, b in zip(
        jax.tree.leaves(jax.jit(f)(*operands)), jax.tree.leaves(jax.jit(run)(*operands)), strict=True
    ):
        near(a, b, 1e-5)


def test_borders():
    """Labels and negatives out of range, ignored rows of NaN, accidental hits, huge logits, -inf."""
    weight = jnp.concatenate([1e4 * jnp.eye(3), jnp.zeros((3, 1))], axis=1)
    hidden = jnp.array([[1.0, 0.5, 0.0], [jnp.nan, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    labels = jnp.array([1, -100, 4, 0])

    @jax.jit
    def run(hidden, weight):
        def of(hidden):
            logits = jaxsoft.linear_logits(hidden, weight)
            sampled = functools.partial(heads.sampled_softmax_loss, logits, labels)
            each = heads.one_vs_each_bound(logits, labels)
            return (sampled(jnp.array([0, 2])), each), sampled(jnp.array([0, 9]))

        values, pull, outside = jax.vjp(of, hidden, has_aux=True)
        gradient = pull((jnp.ones(4), jnp.ones(4)))[0]
        absent = jnp.array([[0.0, -jnp.inf, 1.0]])
        return (*values, outside), gradient, heads.sampled_softmax_loss(absent, labels[3:], jnp.array([1]))

    (fine, each, outside), gradient, absent = run(hidden, weight)
    near(fine[0], 5000 + np.log(1.5), 1e-6)
    assert fine[1] == each[1] == 0 and not np.any(gradient[1]) and np.isfinite(gradient[0]).all()
    assert np.isnan(fine[2]) and np.isnan(each[2]) and np.isnan(gradient[2]).all()
    close(fine[3], np.log(1 + 1.5))  # class 0 is the label, so that class 2 alone counts
    np.testing.assert_array_equal(np.isnan(outside), [True, False, True, True])
    assert absent == 0


def test_bad_input():
    labels, ids = jnp.array([0]), jnp.array([1, 3])
    sampled = functools.partial(heads.sampled_softmax_loss, A)
    fails(["negatives", "integer"], TypeError, lambda: sampled(labels, A[0]))
    fails(["negatives", "[n]", "(1, 2)"], ValueError, lambda: sampled(labels, ids[None]))
    fails(["negatives", "n >= 1"], ValueError, lambda: sampled(labels, ids[:0]))
    fails(
        ["log_expected_count", "(2,)", "(5,)"],
        ValueError,
        lambda: sampled(labels, ids, log_expected_count=A[0]),
    )
    fails(["labels", "(1,)", "(2,)"], ValueError, lambda: sampled(ids, ids))
    fails(["labels", "integer"], TypeError, lambda: sampled(A[:, 0], ids))
    fails(["eta", "(1,)"], ValueError, lambda: heads.augment_and_reduce_bound(A, labels, eta=jnp.ones(2)))
    latent = functools.partial(heads.latent_augment_and_reduce_bound, A, labels)
    fails(["kind", "'gumbel'"], ValueError, lambda: latent(jnp.ones(1), jnp.ones(1), kind="gumbel"))
    fails(["std", "(1,)"], ValueError, lambda: latent(jnp.ones(1), jnp.ones(2)))
    fails(
        ["logits", "stored_logits"],
        TypeError,
        lambda: heads.one_vs_each_bound(jaxsoft.rows.StoredLogits(A), labels),
    )
    with float64():
        assert heads.one_vs_each_bound(A.astype(jnp.float64), labels).dtype == jnp.float64
