"""The spherical head: worked numbers, the dense losses, the maintained form, drift, shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close, equations, fails, near
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import heads, losses

DENSE = {
    "z_loss": losses.spherical_z_loss,
    "squared_error": losses.squared_error_loss,
    "spherical_softmax": losses.spherical_softmax_cross_entropy,
    "taylor_softmax": losses.taylor_softmax_cross_entropy,
}
A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]


def batch(classes, d=6, n=12):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    labels[1], labels[2] = labels[0], -100
    weight = rng.normal(size=(classes, d)) + np.linspace(-1, 1, d)
    return jnp.asarray(rng.normal(size=(n, d))), jnp.asarray(weight), jnp.asarray(labels, jnp.int32)


def test_worked_numbers():
    def of(scores, label, **options):
        head = heads.spherical_head(jnp.asarray([scores]))
        return heads.spherical_loss(jnp.ones((1, 1)), head, jnp.asarray([label]), **options)[0]

    with float64():
        got = jax.jit(
            lambda: [
                of(A, 0),
                of(B, 3),
                of(A, 0, a=0.1, b=28.0),
                of(A, 0, loss="squared_error"),
                of(A, 0, loss="spherical_softmax", eps=0.0),
                of(A, 0, loss="taylor_softmax"),
            ]
        )()
    close(got, [0.202546, 0.420046, 27.188455, 3.26, 0.447886, 0.763606])


def test_recomputed_head_is_the_dense_loss(x64):
    """4096 classes: values, and gradients of hidden and weight, with ignored rows and weights of the examples."""
    hidden, weight, labels = batch(4096)
    g = jnp.linspace(-1, 2, len(labels))

    def both(hidden, weight):
        head = heads.spherical_head(weight, transpose_weight=True)
        logits = hidden @ weight.T
        ours = [heads.spherical_loss(hidden, head, labels, loss=name, weights=g) for name in DENSE]
        dense = [loss(logits, labels, weights=g) for loss in DENSE.values()]
        return jnp.stack(ours), jnp.stack(dense)

    @jax.jit
    def run(hidden, weight):
        values, pull = jax.vjp(both, hidden, weight)
        basis = jnp.eye(len(DENSE))[:, :, None] * jnp.ones(len(labels))
        zero = jnp.zeros_like(basis)
        return values, jax.vmap(pull)((basis, zero)), jax.vmap(pull)((zero, basis))

    (ours, dense), got, expected = run(hidden, weight)
    near(ours, dense)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    assert np.all(np.asarray(ours)[:, 2] == 0) and np.all(np.asarray(got[0])[:, 2] == 0)


@pytest.mark.parametrize("name", ["z_loss", "taylor_softmax"])
def test_maintained_head_is_gradient_descent(name, x64):
    """Forty steps, with repeated and ignored labels; weight, moments, top-k, and a refresh in between."""
    hidden, weight, labels = batch(50)
    rate = 0.5

    def descend(step):
        return lambda carry, key: (step(carry, hidden + jax.random.normal(key, hidden.shape)), None)

    @descend
    def dense(weight, hidden):
        def loss(weight):
            return DENSE[name](hidden @ weight.T, labels).sum()

        return weight - rate * jax.grad(loss)(weight)

    @descend
    def maintained(head, hidden):
        def loss(statistics):
            return heads.spherical_loss(hidden, statistics, labels, loss=name).sum()

        gradient = jax.grad(loss)(heads.spherical_statistics(head, labels))
        return heads.spherical_update(head, labels, gradient, rate)

    @jax.jit
    def run(weight):
        keys = jax.random.split(jax.random.key(0), 40)
        wanted, _ = jax.lax.scan(dense, weight, keys)
        head, _ = jax.lax.scan(maintained, heads.spherical_head(weight, transpose_weight=True), keys[:25])
        head, _ = jax.lax.scan(maintained, heads.spherical_refresh(head), keys[25:])
        again = heads.spherical_refresh(head)
        best = heads.spherical_top_k(hidden, head, 3), jaxsoft.top_k(hidden @ wanted.T, 3)
        return wanted, head, head.weight, again, best

    wanted, head, got, again, (best, dense_best) = run(weight)
    assert np.abs(np.asarray(wanted - weight)).max() > 0.1
    near(got, wanted)
    near(head.mean, again.mean)
    near(head.covariance, again.covariance)
    near(best.values, dense_best.values)
    np.testing.assert_array_equal(best.indices, dense_best.indices)


def test_drift():
    """The moments after 10000 float32 steps, refreshed every 1000, beside those of the weight in float64."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(100, 8)), jnp.float32)

    def step(head, key):
        hidden = jax.random.normal(key, (8, 8))
        labels = jax.random.randint(key, (8,), 0, 100)

        def loss(statistics):
            return heads.spherical_loss(hidden, statistics, labels).mean()

        gradient = jax.grad(loss)(heads.spherical_statistics(head, labels))
        return heads.spherical_update(head, labels, gradient, 0.3), None

    @jax.jit
    def run(weight, key):
        head = heads.spherical_head(weight, transpose_weight=True)

        def thousand(head, key):
            head = heads.spherical_refresh(head)
            return jax.lax.scan(step, head, jax.random.split(key, 1000))

        head, _ = jax.lax.scan(thousand, head, jax.random.split(key, 10))
        return head

    head = run(weight, jax.random.key(0))
    w = np.asarray(head.rows, np.float64) @ np.asarray(head.mixing, np.float64) + np.asarray(head.offset)
    covariance = np.cov(w.T, bias=True)
    assert np.abs(w - np.asarray(weight)).max() > 0.1
    assert np.abs(head.covariance - covariance).max() < 1e-5 * np.abs(covariance).max()
    assert np.abs(head.mean - w.mean(0)).max() < 1e-5 * np.abs(w).max()


def test_maintained_step_has_no_work_over_classes():
    """Of arrays with an axis of the classes there are only `rows`, and its copy after the scatter."""
    classes, d, n = 1_000_003, 5, 7  # the square of their number is no int32
    weight = jax.ShapeDtypeStruct((classes, d), jnp.float32)
    head = jax.eval_shape(functools.partial(heads.spherical_head, transpose_weight=True), weight)

    def step(head, hidden, labels):
        def loss(statistics, hidden):
            return heads.spherical_loss(hidden, statistics, labels).mean()

        of_head, of_hidden = jax.grad(loss, (0, 1))(heads.spherical_statistics(head, labels), hidden)
        return heads.spherical_update(head, labels, of_head, 0.1), of_hidden

    jaxpr = jax.make_jaxpr(step)(head, jnp.ones((n, d)), jnp.zeros(n, jnp.int32))
    wide = [e.primitive.name for e in equations(jaxpr) for v in e.outvars if classes in v.aval.shape]
    assert wide == ["scatter-add"]


def test_sharded_classes():
    """Loss and gradients of the recomputed form, a maintained step and top-k, with the classes on four devices."""
    hidden, weight, labels = batch(48)
    hidden, weight = hidden.astype(jnp.float32), weight.astype(jnp.float32)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def run(hidden, weight, axis_name=None):
        options = dict(axis_name=axis_name)

        def recomputed(hidden, weight):
            head = heads.spherical_head(weight, transpose_weight=True, **options)
            return heads.spherical_loss(hidden, head, labels, **options).sum()

        value, gradients = jax.value_and_grad(recomputed, (0, 1))(hidden, weight)
        head = heads.spherical_head(weight, transpose_weight=True, **options)
        statistics = heads.spherical_statistics(head, labels, **options)
        gradient = jax.grad(lambda s: heads.spherical_loss(hidden, s, labels).sum())(statistics)
        head = heads.spherical_update(head, labels, gradient, 0.5, **options)
        head = head._replace(mixing=heads.spherical_refresh(head, **options).covariance)  # some other matrix
        return value, gradients, head.rows, head, heads.spherical_top_k(hidden, head, 3, **options)

    whole = heads.SphericalHead(P("model"), P(), P(), P(), P())
    specs = P(), (P(), P("model")), P("model"), whole, P()
    sharded = jax.shard_map(
        functools.partial(run, axis_name="model"), mesh=mesh, in_specs=(P(), P("model")), out_specs=specs
    )
    for a, b in zip(
        jax.tree.leaves(jax.jit(sharded)(hidden, weight)),
        jax.tree.leaves(jax.jit(run)(hidden, weight)),
        strict=True,
    ):
        near(a, b, 1e-5)


def test_labels_out_of_range_and_ignored_rows():
    """NaN in value and gradient; an ignored row of NaN touches nothing. The same under vmap."""
    weight = jnp.asarray([A, B]).T
    hidden = jnp.asarray([[1.0, 2.0], [np.nan, 0.0], [1.0, 2.0]])
    labels = jnp.asarray([3, -100, 5])

    def loss(hidden, labels):
        return heads.spherical_loss(hidden, heads.spherical_head(weight, transpose_weight=True), labels)

    @jax.jit
    def run(hidden):
        values, pull = jax.vjp(lambda h: loss(h, labels), hidden)
        return values, pull(jnp.ones(3))[0], jax.vmap(loss)(hidden[:, None], labels[:, None])[:, 0]

    values, gradient, mapped = run(hidden)
    np.testing.assert_array_equal(np.isnan(values), [False, False, True])
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), [False, False, True])
    assert values[1] == 0 and not np.any(gradient[1]) and np.isfinite(gradient[0]).all()
    close(mapped, values)


def test_bad_input():
    hidden, weight, labels = batch(10)
    head = jax.eval_shape(functools.partial(heads.spherical_head, transpose_weight=True), weight)
    loss = lambda *args, **options: jax.eval_shape(
        lambda hidden, head: heads.spherical_loss(hidden, head, *args, **options), hidden, head
    )
    fails(["weight", "[d, classes]", "(3,)"], ValueError, lambda: heads.spherical_head(jnp.ones(3)))
    fails(["weight", "at least one"], ValueError, lambda: heads.spherical_head(jnp.ones((3, 0))))
    fails(["weight", "floating"], TypeError, lambda: heads.spherical_head(jnp.ones((3, 2), int)))
    fails(["head", "spherical_head(weight)"], TypeError, lambda: heads.spherical_loss(hidden, weight, labels))
    fails(["labels", "integer"], TypeError, lambda: loss(hidden[:, 0]))
    fails(["labels", "(12,)", "(11,)"], ValueError, lambda: loss(labels[1:]))
    fails(["labels"], TypeError, lambda: loss(3))
    fails(["loss", "'hinge'"], ValueError, lambda: loss(labels, loss="hinge"))
    fails(["a must be", "> 0"], ValueError, lambda: loss(labels, a=-1.0))
    fails(["weights", "(12,)"], ValueError, lambda: loss(labels, weights=jnp.ones(3)))
    fails(["axis_name", "'model'"], ValueError, lambda: heads.spherical_head(weight, axis_name="model"))
    fails(["hidden", "[*rows, 6]"], ValueError, lambda: heads.spherical_top_k(hidden[:, :3], head, 2))
    statistics = jax.eval_shape(heads.spherical_statistics, head, labels)
    fails(
        ["learning_rate"],
        TypeError,
        lambda: jax.eval_shape(lambda h, s: heads.spherical_update(h, labels, s, "1"), head, statistics),
    )
    fails(
        ["labels", "(12,)", "(3,)"],
        ValueError,
        lambda: jax.eval_shape(lambda h, s: heads.spherical_update(h, labels[:3], s, 1.0), head, statistics),
    )
