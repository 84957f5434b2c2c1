"""Rules that read the parameters, and AdaGrad-Norm: worked numbers, the losses they come from, limits, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close

import jaxsoft
from jaxsoft import optimizers as o


def once(tx, g, params, **state):
    return tx.update(g, tx.init(params)._replace(**state) if state else tx.init(params), params)[0]


def weights():
    a, b = jax.random.normal(jax.random.key(0), (2, 4, 3))
    return {"kernel": a, "deep": b.reshape(2, 2, 3), "bias": b[0], "none": None, "empty": jnp.zeros((0, 3))}


# Regularizers.


@pytest.mark.parametrize("axis", [None, 0])
def test_norm_loss_gradient_is_that_of_the_loss(axis):
    p = weights()
    tx = o.add_norm_loss_gradient(0.3, axis=axis, target=0.7)
    kernels = {"kernel": p["kernel"], "deep": p["deep"]}
    loss = lambda p: 0.3 * jaxsoft.losses.norm_loss(p, axis=-1 if axis is None else axis, target=0.7)
    added, expected = jax.jit(
        lambda: (once(tx, jax.tree.map(jnp.ones_like, p), p), jax.grad(loss)(kernels))
    )()
    chex.assert_trees_all_close({k: added[k] - 1 for k in kernels}, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(added["bias"], jnp.ones(3))


def test_norm_loss_descent_reaches_the_sphere():
    tx, w = o.add_norm_loss_gradient(0.5), weights()["kernel"]

    def step(w, _):
        u, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
        return w - 0.1 * u, None

    end, _ = jax.jit(lambda w: jax.lax.scan(step, w, None, 200))(w)
    np.testing.assert_allclose(jnp.linalg.norm(end, axis=0), 1.0, atol=1e-5)
    np.testing.assert_allclose(end, w / jnp.linalg.norm(w, axis=0), atol=1e-5)
    np.testing.assert_array_equal(once(tx, jnp.zeros((4, 3)), jnp.zeros((4, 3))), 0)


@pytest.mark.parametrize("shape", [0.5, None])
def test_rate_gradient_is_that_of_the_rate(shape):
    p = {"a": weights()["kernel"], "b": weights()["bias"].at[0].set(0)}
    tx = o.add_rate_gradient(0.3, shape=shape, eps=1e-3)
    rate = lambda p: 0.3 * jaxsoft.losses.generalized_gaussian_rate(p, shape=shape, epsilon=1e-3)
    added, expected = jax.jit(lambda: (once(tx, jax.tree.map(jnp.zeros_like, p), p), jax.grad(rate)(p)))()
    chex.assert_trees_all_close(added, expected, rtol=1e-5)
    if shape is not None:
        by_hand = jax.tree.map(lambda w: 0.3 * shape * jnp.sign(w) * (jnp.abs(w) + 1e-3) ** (shape - 1), p)
        chex.assert_trees_all_close(added, by_hand, rtol=1e-5)


def test_rate_of_shape_two_is_weight_decay():
    w = weights()["kernel"]
    ours = once(o.add_rate_gradient(0.05, shape=2.0), w, w)
    np.testing.assert_allclose(ours, once(optax.add_decayed_weights(0.1), w, w), rtol=1e-6)


def test_rate_gradient_of_no_leaves():
    assert once(o.add_rate_gradient(0.1, mask={"a": False}), {"a": 1.0}, {"a": 2.0}) == {"a": 1.0}


def test_decayed_deltas():
    start, p = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([2.0, -2.0])}
    tx = o.add_decayed_deltas(0.1)
    g, state = {"a": jnp.ones(2)}, tx.init(start)
    chex.assert_trees_all_close(tx.update(g, state, p)[0], {"a": jnp.array([1.1, 1.0])})
    zero = optax.tree.set(state, reference=jax.tree.map(jnp.zeros_like, start))
    chex.assert_trees_all_close(
        tx.update(g, zero, p)[0], once(optax.add_decayed_weights(0.1), g, p), rtol=1e-6
    )
    assert (
        o.add_decayed_deltas(0.1, reference_dtype=jnp.bfloat16).init(p).reference["a"].dtype == jnp.bfloat16
    )


def test_decayed_deltas_hold_the_parameters_near_their_start():
    """The minimum of (x - 1)^2 / 2 + decay (x - start)^2 / 2, with plain SGD."""
    tx = optax.chain(o.add_decayed_deltas(3.0), optax.sgd(0.1))
    start = jnp.array([5.0])

    def step(carry, _):
        x, state = carry
        u, state = tx.update(x - 1, state, x)
        return (x + u, state), None

    (x, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), None, 100))(start)
    np.testing.assert_allclose(x, [(1 + 3 * 5) / 4], rtol=1e-5)


@pytest.mark.parametrize(
    "factory",
    [o.add_norm_loss_gradient, o.add_rate_gradient, o.add_decayed_deltas, o.scale_by_inverse_param_norm],
)
@pytest.mark.parametrize("as_function", [False, True])
def test_mask(factory, as_function):
    p = {"a": jnp.array([[2.0, 3.0]]), "b": jnp.array([[2.0, 3.0]])}
    mask = {"a": True, "b": False}
    tx = factory(0.5, mask=(lambda p: mask) if as_function else mask)
    g = jax.tree.map(jnp.ones_like, p)
    u, _ = tx.update(g, tx.init(p), jax.tree.map(lambda x: 2 * x, p))
    np.testing.assert_array_equal(u["b"], g["b"])
    assert np.all(np.asarray(u["a"] != g["a"]))


# Adapters and subspaces.


def test_inverse_param_norm_worked_example():
    with jax.enable_x64(True):
        b, g = jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.array([[1.0, 2.0], [1.0, 2.0]])
        u = once(o.scale_by_inverse_param_norm(2.0, axis=0), g, b)
        close(u, [[2, 4], [0.436436, 0.872872]], 5e-7)
        np.testing.assert_allclose(u[1], g[1] / np.sqrt(5.25), rtol=1e-12)
        np.testing.assert_array_equal(once(o.scale_by_inverse_param_norm(2.0), g.T, b.T), u.T)


def test_inverse_param_norm_can_be_differentiated_at_zero():
    """Where adapters start."""
    tx = o.scale_by_inverse_param_norm(2.0)
    slope = jax.grad(lambda p: jnp.sum(once(tx, jnp.ones((2, 3)), p)))(jnp.zeros((2, 3)))
    assert np.all(np.isfinite(slope))


def test_project_out_subspace_worked_example():
    with jax.enable_x64(True):
        g = jnp.array([[1.0], [2.0], [3.0]])
        u = once(o.project_out_subspace(1), g, g, bases=jnp.array([[0.6], [0.8], [0.0]]))
        close(u[:, 0], [-0.32, 0.24, 3], 1e-12)


def test_projected_steps_do_not_change_old_outputs():
    old = jax.random.normal(jax.random.key(1), (2, 12))  # two inputs of the earlier task
    bases = {"dense": jnp.linalg.qr(old.T)[0], "conv": jnp.linalg.qr(old.T)[0], "bias": jnp.zeros(0)}
    p = {"dense": jnp.zeros((12, 5)), "conv": jnp.zeros((2, 2, 3, 5)), "bias": jnp.zeros(5)}
    tx = optax.chain(o.project_out_subspace(2), optax.sgd(1.0))
    state = optax.tree.set(tx.init(p), bases=bases)
    g = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), p)
    u, _ = jax.jit(tx.update)(g, state, p)
    np.testing.assert_allclose(old @ u["dense"], 0, atol=1e-5)
    np.testing.assert_allclose(old @ u["conv"].reshape(12, 5), 0, atol=1e-5)
    np.testing.assert_array_equal(u["bias"], -g["bias"])
    assert np.linalg.norm(u["dense"]) > 0.5 * np.linalg.norm(g["dense"])
    again, _ = jax.jit(tx.update)(jax.tree.map(jnp.negative, u), state, p)
    chex.assert_trees_all_close(again, u, atol=1e-5)


def test_unset_bases_project_nothing():
    g = weights()
    chex.assert_trees_all_equal(once(o.project_out_subspace(3), g, g), g)


# AdaGrad-Norm.


def test_adagrad_norm_worked_example():
    with jax.enable_x64(True):
        tx, params = o.scale_by_adagrad_norm(0.01), jnp.array([1.0, -2.0])
        state, out = tx.init(params), []
        for g in ([0.5, 1.0], [-0.25, 4.0], [0.1, -0.2]):
            u, state = tx.update(jnp.array(g), state)
            params = params - 0.1 * u
            out.append(params)
    expected = [[0.955280, -2.089439], [0.961289, -2.185574], [0.958889, -2.180774]]
    close(jnp.stack(out), expected, 5e-7)


def test_adagrad_norm_of_one_number_is_adagrad():
    grads = jnp.array([1.0, -2.0, 0.5, 3.0])
    ours, theirs = o.scale_by_adagrad_norm(0.0), optax.scale_by_rss(0.0, eps=0.0)
    a, b = ours.init(jnp.zeros([])), theirs.init(jnp.zeros([]))
    for g in grads:
        u, a = ours.update(g, a)
        v, b = theirs.update(g, b)
        np.testing.assert_allclose(u, v, rtol=1e-6)


def test_adagrad_norm_of_zeros_and_nan():
    tx = o.scale_by_adagrad_norm(0.0)
    np.testing.assert_array_equal(once(tx, jnp.zeros(3), jnp.zeros(3)), 0)
    assert np.isnan(once(tx, jnp.array([jnp.nan]), jnp.zeros(1))[0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.add_norm_loss_gradient(-1.0), ValueError, "coefficient .* >= 0, got -1.0"),
        (lambda: o.add_norm_loss_gradient(target=-1.0), ValueError, "target"),
        (lambda: o.add_norm_loss_gradient(axis=0.5), TypeError, "axis .* integer"),
        (
            lambda: once(o.add_norm_loss_gradient(axis=2), jnp.ones((2, 2)), jnp.ones((2, 2))),
            ValueError,
            "axis",
        ),
        (lambda: o.add_rate_gradient(-1.0), ValueError, "coefficient"),
        (lambda: o.add_rate_gradient(0.1, shape=0.0), ValueError, "shape .* > 0, got 0.0"),
        (lambda: o.add_rate_gradient(0.1, eps=0.0), ValueError, "eps .* > 0, got 0.0"),
        (lambda: o.add_decayed_deltas(-1.0), ValueError, "weight_decay .* >= 0, got -1.0"),
        (lambda: o.add_decayed_deltas(1.0, reference_dtype=int), TypeError, "reference_dtype"),
        (lambda: o.scale_by_inverse_param_norm(0.0), ValueError, "eta .* > 0, got 0.0"),
        (lambda: o.scale_by_inverse_param_norm(1.0, axis="rows"), TypeError, "axis .* integer"),
        (
            lambda: once(o.scale_by_inverse_param_norm(1.0, axis=1), jnp.ones(2), jnp.ones(2)),
            ValueError,
            r"axis .* \[-1, 1\) .* shape \(2,\), got 1",
        ),
        (lambda: o.project_out_subspace(0), ValueError, "rank .* >= 1, got 0"),
        (lambda: o.project_out_subspace(1.5), TypeError, "rank .* static integer"),
        (
            lambda: once(
                o.project_out_subspace(2), jnp.ones((3, 4)), jnp.ones((3, 4)), bases=jnp.ones((4, 2))
            ),
            ValueError,
            r"bases must have shape \(3, 2\) .* got shape \(4, 2\)",
        ),
        (lambda: o.scale_by_adagrad_norm(-1.0), ValueError, "initial .* >= 0, got -1.0"),
        (lambda: o.add_norm_loss_gradient().update(1.0, optax.EmptyState()), ValueError, "needs params"),
        (lambda: o.add_rate_gradient(0.1).update(1.0, optax.EmptyState()), ValueError, "needs params"),
        (lambda: o.add_decayed_deltas(0.1).update(1.0, None), ValueError, "needs params"),
        (lambda: o.scale_by_inverse_param_norm(1.0).update(1.0, None), ValueError, "needs params"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
