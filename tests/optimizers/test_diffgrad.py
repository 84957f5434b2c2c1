"""diffGrad: worked numbers, oracle, limits, low precision, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, torch_trajectory, trajectory

from jaxsoft import optimizers as o


def random_problem(steps=100, size=23):
    rng = np.random.default_rng(0)
    return rng.standard_normal(size), rng.standard_normal((steps, size))


def test_worked_example():
    with jax.enable_x64(True):
        grads = jnp.array([[0.5, 1.0], [-0.25, 4.0], [0.1, -0.2]])
        out = trajectory(o.diffgrad(0.1), jnp.array([1.0, -2.0]), grads)
    expected = [
        [0.937754106248, -2.073105834745],
        [0.91966507207, -2.157349244613],
        [0.901172340606, -2.221571678463],
    ]
    close(out, expected, 1e-11)


@pytest.mark.parametrize("decoupled", [False, True])
def test_equals_pytorch_optimizer(decoupled):
    start, grads = random_problem()
    make = lambda po, params: po.DiffGrad(params, lr=0.01, weight_decay=0.1, weight_decouple=decoupled)
    theirs = torch_trajectory(make, start, grads)
    if decoupled:
        tx = o.diffgrad(0.01, weight_decay=0.1)
    else:
        tx = optax.chain(optax.add_decayed_weights(0.1), o.diffgrad(0.01))
    with jax.enable_x64(True):
        ours = trajectory(tx, jnp.asarray(start), jnp.asarray(grads))
    close(ours, theirs, 1e-12)


def test_is_adam_at_half_the_rate_for_tiny_gradients():
    start, grads = random_problem(20)
    args = jnp.asarray(start, jnp.float32), 1e-6 * jnp.asarray(grads, jnp.float32)
    ours = trajectory(o.diffgrad(0.01, eps=0.0), *args)
    np.testing.assert_allclose(ours, trajectory(optax.adam(0.005, eps=0.0), *args), atol=1e-6)


def test_is_adam_for_huge_changes():
    start, grads = random_problem(20)
    args = jnp.asarray(start, jnp.float32), 1e6 * jnp.asarray(grads, jnp.float32)
    np.testing.assert_allclose(
        trajectory(o.diffgrad(0.01), *args), trajectory(optax.adam(0.01), *args), atol=1e-6
    )


def test_constant_gradient_is_halved_from_the_second_step_on():
    tx, g = o.scale_by_diffgrad(eps=0.0), jnp.array([1e4, -3.0])
    state = tx.init(g)
    for friction in (jax.nn.sigmoid(jnp.abs(g)), 0.5, 0.5):
        u, state = tx.update(g, state)
        np.testing.assert_allclose(u, friction * jnp.sign(g), rtol=1e-5)


def test_low_precision_state_follows():
    start, grads = (jnp.asarray(x, jnp.float32) for x in random_problem())
    tx = o.diffgrad(0.01, mu_dtype=jnp.bfloat16, previous_dtype=jnp.bfloat16)
    np.testing.assert_allclose(
        trajectory(tx, start, grads), trajectory(o.diffgrad(0.01), start, grads), atol=0.01
    )
    mu, nu, previous = tx.init(start)[0][1:]
    assert (mu.dtype, nu.dtype, previous.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def test_a_nan_gradient_is_not_hidden():
    tx = o.scale_by_diffgrad()
    u, _ = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(jnp.ones(2)))
    np.testing.assert_array_equal(np.isnan(u), [True, False])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.diffgrad(-1.0), ValueError, "learning_rate .* >= 0, got -1.0"),
        (lambda: o.diffgrad(0.1, b1=1.0), ValueError, "b1 .* < 1, got 1.0"),
        (lambda: o.diffgrad(0.1, b2=-0.1), ValueError, "b2 .* >= 0"),
        (lambda: o.diffgrad(0.1, eps=-1.0), ValueError, "eps"),
        (lambda: o.diffgrad(0.1, weight_decay=-0.1), ValueError, "weight_decay"),
        (lambda: o.diffgrad(0.1, mu_dtype="letters"), TypeError, "mu_dtype"),
        (lambda: o.diffgrad(0.1, previous_dtype=jnp.int8), TypeError, "previous_dtype"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
