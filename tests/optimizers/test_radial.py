"""AdamP, SGDP and the radial projection: worked numbers, oracle, limits, invariants, memory, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, descend, temporary_bytes, torch_trajectory, trajectory

from jaxsoft import optimizers as o


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (
            o.adamp(0.1, weight_decay=0.1, channel_axis=0),
            [
                [0.879000001779, -2.057999999558],
                [0.823263185285, -2.119566575107],
                [0.772736057159, -2.158625248121],
            ],
        ),
        (
            o.sgdp(0.1, 0.9, weight_decay=0.1, channel_axis=0),
            [[0.89, -2.03], [0.736, -2.272], [0.5939, -2.4253]],
        ),
    ],
    ids=["adamp", "sgdp"],
)
def test_worked_example(tx, expected):
    with jax.enable_x64(True):
        grads = jnp.array([[[1.0, 0.5]], [[-0.25, 4.0]], [[0.1, -0.2]]])
        out = trajectory(tx, jnp.array([[1.0, -2.0]]), grads)
    close(out[:, 0], expected, 1e-11)


def scale_invariant_problem(steps=100, shape=(5, 7)):
    """Gradients: some perpendicular to the start in each row, some only as a whole, some not at all."""
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(shape), rng.standard_normal((steps, *shape))
    return start, grads


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_equals_pytorch_optimizer(name, nesterov):
    start, grads = scale_invariant_problem()
    shared = {"weight_decay": 0.1, "nesterov": nesterov, "delta": 1.0}
    if name == "AdamP":
        make = lambda po, params: po.AdamP(params, lr=0.01, **shared)
        tx = o.adamp(0.01, channel_axis=0, **shared)
    else:
        make = lambda po, params: po.SGDP(params, lr=0.01, momentum=0.9, dampening=0.3, **shared)
        tx = o.sgdp(0.01, 0.9, dampening=0.3, channel_axis=0, **shared)
    theirs = torch_trajectory(make, start, grads)
    with jax.enable_x64(True):
        ours = trajectory(tx, jnp.asarray(start), jnp.asarray(grads))
    # Its Adam adds eps to the uncorrected root.
    close(ours, theirs, 2e-6 if name == "AdamP" else 1e-12)


def test_the_oracle_problem_visits_each_projection():
    start, grads = scale_invariant_problem()
    row = lambda x, y: np.sum(x * y, axis=1)
    cos = lambda g, p: np.abs(row(g, p)) / np.sqrt(row(g, g) * row(p, p))
    flat = lambda x: x.reshape(1, -1)
    by_row = [cos(g, start).max() < 1 / np.sqrt(7) for g in grads]
    as_whole = [cos(flat(g), flat(start)).max() < 1 / np.sqrt(35) for g in grads]
    assert any(by_row)
    assert any(whole and not rows for rows, whole in zip(by_row, as_whole))
    assert not all(rows or whole for rows, whole in zip(by_row, as_whole))


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_projection_it_is_the_plain_optimizer(nesterov):
    start, grads = (jnp.asarray(x, jnp.float32) for x in scale_invariant_problem(20))
    ours = trajectory(o.sgdp(0.01, 0.9, delta=0.0, nesterov=nesterov), start, grads)
    np.testing.assert_allclose(
        ours, trajectory(optax.sgd(0.01, 0.9, nesterov=nesterov), start, grads), rtol=2e-5
    )
    if not nesterov:  # optax corrects the bias of its Nesterov momentum in another way
        ours = trajectory(o.adamp(0.01, delta=0.0, weight_decay=0.1), start, grads)
        plain = trajectory(optax.adamw(0.01, weight_decay=0.1), start, grads)
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channel_axis", [-1, 0, (-1,), (0, 2), (-1, -2)])
def test_projected_update_is_perpendicular_in_each_channel(channel_axis):
    p, g = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    tx = o.project_out_radial(optax.identity(), ready=False, delta=jnp.inf, channel_axis=channel_axis)
    u, _ = tx.update(g, tx.init(p), p)
    axes = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    others = tuple(i for i in range(3) if i not in [a % 3 for a in axes])
    sums = functools.partial(jnp.sum, axis=others, keepdims=True)
    np.testing.assert_allclose(sums(u * p), 0, atol=2e-6)
    np.testing.assert_allclose(u, g - p * sums(g * p) / sums(p * p), rtol=1e-4, atol=1e-5)


def test_weights_of_a_normalized_layer_grow_slower():
    """The paper's point: momentum grows weights whose scale does not matter; the projection stops that."""
    target = jax.random.normal(jax.random.key(1), (16, 4))

    def loss(w):
        unit = lambda x: x / jnp.linalg.norm(x, axis=0)
        return jnp.sum((unit(w) - unit(target)) ** 2)

    def train(tx):
        start = jax.random.normal(jax.random.key(0), (16, 4))
        w, _ = descend(tx, start, lambda w, _: jax.grad(loss)(w), steps=200)
        return jnp.linalg.norm(w) / jnp.linalg.norm(start), loss(w)

    growth, _ = jax.jit(lambda: train(optax.sgd(0.5, 0.9)))()
    slower, final = jax.jit(lambda: train(o.sgdp(0.5, 0.9)))()
    assert 1 < slower < 1 + 0.7 * (growth - 1)
    assert final < 1e-4


def test_decay_is_weaker_where_projected_and_obeys_the_mask():
    p = {"a": jnp.array([[1.0], [0.0]]), "b": jnp.array([[1.0], [0.0]]), "c": jnp.ones(2)}
    g = {"a": jnp.array([[0.0], [1.0]]), "b": jnp.array([[1.0], [0.0]]), "c": jnp.ones(2)}
    tx = o.project_out_radial(optax.identity(), ready=False, weight_decay=0.5, wd_ratio=0.2)
    decay = jax.tree.map(jnp.subtract, tx.update(g, tx.init(p), p)[0], g)
    expected = {"a": jnp.array([[0.1], [0.0]]), "b": jnp.array([[0.5], [0.0]]), "c": jnp.full(2, 0.5)}
    chex.assert_trees_all_close(decay, expected, atol=1e-6)
    for mask in ({"a": True, "b": False, "c": True}, lambda p: {"a": True, "b": False, "c": True}):
        tx = o.project_out_radial(optax.identity(), ready=False, weight_decay=0.5, wd_ratio=0.2, mask=mask)
        decay = jax.tree.map(jnp.subtract, tx.update(g, tx.init(p), p)[0], g)
        chex.assert_trees_all_close(decay, expected | {"b": jnp.zeros((2, 1))}, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zero_weights_and_zero_gradients(eps):
    tx = o.project_out_radial(optax.identity(), ready=False, eps=eps)
    for p, g in ((jnp.zeros((3, 2)), jnp.ones((3, 2))), (jnp.ones((3, 2)), jnp.zeros((3, 2)))):
        np.testing.assert_array_equal(tx.update(g, tx.init(p), p)[0], g)


def test_a_nan_gradient_is_not_hidden():
    p = jnp.ones((2, 2))
    for tx in (o.adamp(0.1), o.sgdp(0.1)):
        assert np.isnan(tx.update(p.at[0, 0].set(jnp.nan), tx.init(p), p)[0][0, 0])


def test_extra_arguments_reach_the_inner_transformation():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda u, s, p=None, *, value, **extra: (value * u, s)
    )
    tx = o.project_out_radial(inner, ready=False)
    np.testing.assert_allclose(tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), value=3.0)[0], 3.0)


def test_first_moment_in_bfloat16():
    tx, p = o.scale_by_adamp(mu_dtype=jnp.bfloat16), jnp.ones((2, 3))
    _, state = tx.update(p, tx.init(p), p)
    assert (state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("tx", "limit"), [(o.sgdp(0.1, weight_decay=0.1), 0.01), (o.adamp(0.1, weight_decay=0.1), 1.01)]
)
def test_temporary_memory_of_a_matrix(tx, limit):
    """No product is stored; the direction of Adam is, since its projection needs it twice."""
    params = jnp.ones((1000, 1000))
    assert temporary_bytes(tx, params) <= limit * params.nbytes


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.adamp(-1.0), ValueError, "learning_rate .* >= 0, got -1.0"),
        (lambda: o.adamp(0.1, b1=1.0), ValueError, "b1 .* < 1, got 1.0"),
        (lambda: o.adamp(0.1, b2=-0.1), ValueError, "b2 .* >= 0"),
        (lambda: o.adamp(0.1, eps=-1.0), ValueError, "eps"),
        (lambda: o.adamp(0.1, delta=-1.0), ValueError, "delta .* >= 0, got -1.0"),
        (lambda: o.adamp(0.1, wd_ratio=-1.0), ValueError, "wd_ratio"),
        (lambda: o.adamp(0.1, weight_decay=-1.0), ValueError, "weight_decay"),
        (lambda: o.adamp(0.1, nesterov=1.0), TypeError, "nesterov must be True or False, got 1.0"),
        (lambda: o.adamp(0.1, channel_axis=0.5), TypeError, "channel_axis .* integer"),
        (lambda: o.adamp(0.1, mu_dtype="letters"), TypeError, "mu_dtype"),
        (lambda: o.sgdp(0.1, 1.0), ValueError, "momentum .* < 1, got 1.0"),
        (lambda: o.sgdp(0.1, dampening=2.0), ValueError, "dampening"),
        (lambda: o.sgdp(0.1, weight_decay=-1.0), ValueError, "weight_decay .* got -1.0"),
        (
            lambda: o.scale_by_adamp().update(jnp.ones((2, 2)), o.scale_by_adamp().init(jnp.ones((2, 2)))),
            ValueError,
            "params",
        ),
        (lambda: o.project_out_radial(optax.sgd(0.1)), TypeError, "missing .* 'ready'"),
        (
            lambda: o.project_out_radial(optax.sgd(0.1), ready=True, weight_decay=0.1),
            ValueError,
            "weight_decay must be 0 for ready=True, got 0.1",
        ),
        (
            lambda: o.project_out_radial(optax.identity(), ready=False, channel_axis=2).update(
                jnp.ones((2, 2)), optax.EmptyState(), jnp.ones((2, 2))
            ),
            ValueError,
            r"channel_axis .* \[-2, 2\) .* shape \(2, 2\), got \(2,\)",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
