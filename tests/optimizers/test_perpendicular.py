"""The perpendicular gradient: worked numbers, oracle, invariants, the parallel case, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, descend, torch_trajectory, trajectory

from jaxsoft import optimizers as o


def project(g, p, **kwargs):
    tx = o.perpendicular_gradient(**kwargs)
    return tx.update(g, tx.init(p), p)[0]


def test_worked_example():
    with jax.enable_x64(True):
        theta, tx = jnp.array([1.0, -2.0]), o.perpendicular_gradient()
        expected = [
            ([1.0, 0.5], [0.9, -2.05]),
            ([3.669722617552, 1.611097734535], [0.533027738245, -2.211109773454]),
            ([0.217379617447, 0.052403262479], [0.5112897765, -2.216350099701]),
        ]
        for g, (direction, position) in zip(([0.5, 1.0], [-0.25, 4.0], [0.1, -0.2]), expected):
            u, _ = tx.update(jnp.array(g), tx.init(theta), theta)
            theta = theta - 0.1 * u
            close(u, direction, 1e-11)
            close(theta, position, 1e-10)


def test_equals_pytorch_optimizer():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(23), rng.standard_normal((100, 23))
    theirs = torch_trajectory(lambda po, p: po.OrthoGrad(torch.optim.SGD(p, lr=0.05)), start, grads)
    with jax.enable_x64(True):
        tx = optax.chain(o.perpendicular_gradient(), optax.sgd(0.05))
        ours = trajectory(tx, jnp.asarray(start), jnp.asarray(grads))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("closeness", [0.0, 1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(2,), (1000,), (30, 40)])
def test_perpendicular_with_the_norm_of_the_gradient(shape, closeness):
    """Also for a gradient that is nearly parallel to the parameters."""
    p = jax.random.normal(jax.random.key(0), shape)
    g = jax.random.normal(jax.random.key(1), shape) + closeness * p
    u = project(g, p)
    norm = jnp.linalg.norm
    np.testing.assert_allclose(norm(u), norm(g), rtol=1e-4)
    u64, p64 = np.asarray(u, np.float64), np.asarray(p, np.float64)
    assert abs(np.sum(u64 * p64)) < 2e-7 * np.linalg.norm(u64) * np.linalg.norm(p64)
    plain = project(g, p, rescale=False)
    np.testing.assert_allclose(
        plain + jnp.vdot(g, p) / jnp.vdot(p, p) * p, g, rtol=1e-4, atol=1e-5 * (1 + closeness)
    )
    assert float(norm(plain)) <= float(norm(g)) * (1 + 1e-6)


@pytest.mark.parametrize("factor", [1e-3, -1.0, 7.0, 1e4])
def test_scale_of_the_parameters_does_not_matter(factor):
    p, g = jax.random.normal(jax.random.key(0), (2, 100))
    np.testing.assert_allclose(project(g, factor * p), project(g, p), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 1000, 1_000_000])
@pytest.mark.parametrize("factor", [1 / 3, -0.7, 1e-5, 1e5])
def test_parallel_gradient_gives_zero_not_noise(size, factor):
    p = jax.random.normal(jax.random.key(0), (size,))
    np.testing.assert_array_equal(project(factor * p, p), np.zeros(size))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parallel_gradient_in_low_precision(dtype):
    p = jax.random.normal(jax.random.key(0), (1000,), dtype)
    u = project(p / 3, p)
    assert u.dtype == dtype
    np.testing.assert_array_equal(u, np.zeros(1000))


def test_parallel_gradient_in_float64():
    with jax.enable_x64(True):
        p = jax.random.normal(jax.random.key(0), (1000,), jnp.float64)
        np.testing.assert_array_equal(project(p / 3, p), np.zeros(1000))
        nearly = p / 3 + 1e-9 * jax.random.normal(jax.random.key(1), (1000,), jnp.float64)
        assert abs(float(jnp.vdot(project(nearly, p), p))) < 1e-5  # a signal of 3e-9 is used in float64


def test_zero_parameters_leave_the_gradient():
    g = jnp.array([1.0, -2.0, 3.0])
    np.testing.assert_allclose(project(g, jnp.zeros(3)), g, rtol=1e-6)


def test_norm_of_the_parameters_grows_at_second_order_only():
    params, lr = jax.random.normal(jax.random.key(0), (50,)), 0.1
    for step in range(20):
        g = jax.random.normal(jax.random.key(step + 1), (50,))
        new = params - lr * project(g, params)
        expected = jnp.sum(params**2) + lr**2 * jnp.sum(g**2)
        np.testing.assert_allclose(jnp.sum(new**2), expected, rtol=1e-5)
        params = new


def test_converges_on_a_scale_invariant_loss():
    """Where the loss depends on the direction of the parameters only, nothing is lost."""
    target = jnp.array([1.0, 2.0, -2.0]) / 3

    def loss(p):
        return 1 - jnp.vdot(p, target) / jnp.linalg.norm(p)

    tx = optax.chain(o.perpendicular_gradient(), optax.sgd(0.3))
    start = jnp.array([1.0, -1.0, 0.5])
    params, _ = descend(tx, start, lambda p, _: jax.grad(loss)(p), steps=200)
    assert float(loss(params)) < 1e-3


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda p: {"w": True, "b": False}])
def test_mask(mask):
    params = {"w": jnp.array([1.0, 0.0]), "b": jnp.array([1.0])}
    u = project({"w": jnp.array([3.0, 4.0]), "b": jnp.array([2.0])}, params, mask=mask)
    np.testing.assert_allclose(u["w"], [0.0, 5.0])
    np.testing.assert_allclose(u["b"], [2.0])


def test_errors():
    tx = o.perpendicular_gradient()
    with pytest.raises(ValueError, match=r"needs params: call update\(updates, state, params\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(TypeError, match="rescale must be True or False, got 1"):
        o.perpendicular_gradient(rescale=1)
    with pytest.raises(TypeError, match="real"):
        project(jnp.ones(2, jnp.complex64), jnp.ones(2, jnp.complex64))
