"""Partial FC: worked numbers, what is sampled, equality with the masked loss, updates of sampled classes, shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import close, fails, near, trees_close
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxsoft import heads, losses

COSINES = np.array([0.7, 0.3, -0.1, 0.2])
FEATURE, WEIGHT = jnp.array([[2.0, 0.0]]), jnp.asarray(np.stack([COSINES, np.sqrt(1 - COSINES**2)]))


def batch(classes=40, d=6, n=8):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    labels[1], labels[2] = labels[0], -100
    return (
        jnp.asarray(rng.normal(size=(n, d)), jnp.float32),
        jnp.asarray(rng.normal(size=(classes, d)), jnp.float32),
        jnp.asarray(labels, jnp.int32),
    )


def test_worked_numbers():
    """Two of the four classes; all of them, with both margins."""
    sample = heads.ClassSample(jnp.array([0, 2]), jnp.array([0]))

    @jax.jit
    def run():
        whole = functools.partial(
            heads.partial_fc_loss, FEATURE, WEIGHT, jnp.array([0]), jax.random.key(0), size=4
        )
        return jnp.concatenate(
            [
                heads.sampled_margin_loss(FEATURE, WEIGHT[:, ::2], sample, scale=8.0, margin=0.35),
                whole(scale=8.0, margin=0.35),
                whole(scale=8.0, loss=losses.additive_angular_margin_loss),
            ]
        )

    close(run(), [0.026957, 0.692566, 1.052660])


def test_what_is_sampled():
    """The labels always, the others uniformly and without replacement; places of labels; ignored and bad labels."""
    labels = jnp.array([[7, 2], [7, -100], [10, -1]])
    keys = jax.random.split(jax.random.key(0), 4000)
    sample = jax.jit(jax.vmap(lambda key: heads.sample_classes(key, labels, classes=10, size=6)))(keys)
    ids, places = np.asarray(sample.ids), np.asarray(sample.labels)
    assert np.all(np.diff(ids, axis=1) > 0) and ids.min() >= 0 and ids.max() < 10
    valid = np.array([[True, True], [True, False], [False, False]])
    found = np.take_along_axis(ids, places[:, valid], axis=1)
    np.testing.assert_array_equal(found, np.broadcast_to(np.asarray(labels)[valid], found.shape))
    assert np.all(places[:, 1, 1] == -100) and np.all(places[:, 2] == 6)  # 6 is out of range
    frequency = (ids[:, :, None] == np.arange(10)).sum((0, 1)) / len(keys)
    others = np.delete(frequency, [2, 7])
    assert frequency[2] == frequency[7] == 1
    assert np.abs(others - 0.5).max() < 4.5 * 0.5 / np.sqrt(len(keys))


def test_loss_is_that_of_the_sampled_classes():
    """Value and gradients equal the margin loss whose mask keeps the sampled classes."""
    features, weight, labels = batch()
    key, g = jax.random.key(1), jnp.linspace(-1, 2, len(labels))

    def pair(features, weight, size):
        sample = heads.sample_classes(key, labels, classes=40, size=size)
        where = jnp.zeros(40, bool).at[sample.ids].set(True)
        cosines = losses.cosine_logits(features, weight, transpose_weight=True).dense()
        ours = heads.partial_fc_loss(features, weight, labels, key, size=size, transpose_weight=True)
        return ours, losses.additive_margin_loss(cosines, labels, where=where), where

    def run(features, weight, size):
        (ours, dense), pull, where = jax.vjp(
            lambda f, w: (lambda a, b, c: ((a, b), c))(*pair(f, w, size)), features, weight, has_aux=True
        )
        return ours, dense, pull((g, 0 * g)), pull((0 * g, g)), where

    ours, dense, got, wanted, where = jax.jit(run, static_argnums=2)(features, weight, 12)
    near(ours, dense, 1e-5)
    for a, b in zip(got, wanted):
        near(a, b, 2e-5)
    assert where.sum() == 12 and not np.any(np.asarray(got[1])[~where])
    assert ours[2] == 0 and not np.any(got[0][2])


def test_update_touches_the_sampled_classes_alone():
    """Weight and moments of sampled classes as under the optimizer, the others as they were."""
    _, weight, _ = batch()
    ids, rest = jnp.array([1, 4, 9]), np.setdiff1d(np.arange(40), [1, 4, 9])

    def check(optimizer, transpose):
        turn = (lambda a: a) if transpose else (lambda a: a.T)
        w = turn(weight)
        state = jax.tree.map(lambda a: a + 0.5 if a.shape == w.shape else a, optimizer.init(w))
        gradient = turn(jnp.linspace(-1, 1, 18).reshape(3, 6))
        axis = 0 if transpose else 1
        whole = jnp.zeros_like(w).at[(ids,) if transpose else (slice(None), ids)].set(gradient)
        new = heads.sampled_update(optimizer, gradient, state, w, ids, transpose_weight=transpose)
        updates, dense_state = optimizer.update(whole, state, w)
        dense = optax.apply_updates(w, updates), dense_state
        return [
            jax.tree.map(lambda a: jnp.take(a, chosen, axis=axis) if a.shape == w.shape else a, tree)
            for tree, chosen in ((new, ids), (dense, ids), (new, rest), ((w, state), rest))
        ]

    @jax.jit
    def run():
        return [
            check(optimizer, transpose)
            for optimizer in (optax.sgd(0.1, momentum=0.9), optax.adam(0.1))
            for transpose in (True, False)
        ]

    for got, wanted, others, before in run():
        trees_close(got, wanted, 1e-6)
        shaped = [(a, b) for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(before)) if a.ndim == 2]
        assert len(shaped) >= 2
        for a, b in shaped:
            np.testing.assert_array_equal(a, b)


def test_sharded_classes():
    """Each of four devices samples its own classes; loss and gradients are those of all sampled classes."""
    features, weight, labels = batch()
    key = jax.random.key(2)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def run(features, weight):
        options = dict(transpose_weight=True, axis_name="model")

        def loss(features, weight):
            return heads.partial_fc_loss(features, weight, labels, key, size=8, **options)

        values, pull = jax.vjp(loss, features, weight)
        sample = heads.sample_classes(key, labels, classes=10, size=8, axis_name="model")
        return values, pull(jnp.ones_like(values)), sample.ids + 10 * jax.lax.axis_index("model")

    specs = P(), (P(), P("model")), P("model")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("model")), out_specs=specs)
    values, gradients, ids = jax.jit(sharded)(features, weight)
    assert len(np.unique(ids)) == 32 and set(np.asarray(labels)) - {-100} <= set(np.asarray(ids))

    @jax.jit
    def dense(features, weight):
        where = jnp.zeros(40, bool).at[ids].set(True)

        def loss(features, weight):
            cosines = losses.cosine_logits(features, weight, transpose_weight=True)
            return losses.additive_margin_loss(cosines, labels, where=where)

        values, pull = jax.vjp(loss, features, weight)
        return values, pull(jnp.ones_like(values))

    wanted, wanted_gradients = dense(features, weight)
    near(values, wanted, 1e-5)
    for a, b in zip(gradients, wanted_gradients):
        near(a, b, 2e-5)


def test_bad_input():
    features, weight, labels = batch()
    key = jax.random.key(0)
    sample = lambda **options: heads.sample_classes(key, labels, **{**dict(classes=40, size=10), **options})
    loss = functools.partial(heads.partial_fc_loss, features, weight, key=key, transpose_weight=True)
    fails(["size", "at most", "40", "41"], ValueError, lambda: sample(size=41))
    fails(["size", "labels, 8", "7"], ValueError, lambda: sample(size=7))
    fails(["size", "static integer"], TypeError, lambda: sample(size=10.0))
    fails(["classes"], ValueError, lambda: sample(classes=0))
    fails(["labels", "integer"], TypeError, lambda: loss(labels=features[:, 0], size=10))
    fails(["labels"], TypeError, lambda: loss(labels=3, size=10))
    fails(
        ["weight", "classes"],
        ValueError,
        lambda: heads.partial_fc_loss(features, weight[0], labels, key, size=10),
    )
    few = heads.ClassSample(jnp.arange(3), labels)
    margin = functools.partial(heads.sampled_margin_loss, features, weight, transpose_weight=True)
    fails(["weight", "3", "(40, 6)"], ValueError, lambda: margin(few))
    state = optax.sgd(0.1).init(weight)
    fails(
        ["gradient", "(3, 6)"],
        ValueError,
        lambda: heads.sampled_update(
            optax.sgd(0.1), weight, state, weight, jnp.arange(3), transpose_weight=True
        ),
    )
