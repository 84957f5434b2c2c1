"""Hinge losses: worked numbers, other implementations, kinks, NaN and absent labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import example, kinds, logits_of, values_and_gradient
from jax.test_util import check_grads

from jaxsoft import losses

A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]
OVR, WW, CS = losses.one_vs_rest_hinge_loss, losses.weston_watkins_loss, losses.crammer_singer_loss
PERCEPTRON = losses.perceptron_loss


@kinds
@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        (OVR, {}, [7.46, 8.22]),
        (OVR, dict(penalty=0.5), [3.73, 4.11]),
        (OVR, dict(power=1), [4.6, None]),
        (CS, {}, [0.0, 1.7]),
        (WW, {}, [0.0, 2.1]),
        (PERCEPTRON, {}, [0.0, 0.7]),
    ],
)
def test_worked_numbers(loss, options, expected, kind, x64):
    value = loss(logits_of(jnp.array([A, B]), kind), jnp.array([0, 3]), **options)
    for v, e in zip(value, expected):
        assert e is None or abs(v - e) < 1e-6


@kinds
def test_the_gradient_of_the_svm(kind, x64):
    _, gradient = values_and_gradient(OVR, [A, B], [0, 3], [1.0, -0.5], kind)
    np.testing.assert_allclose(gradient[0], [0, 4, 2.2, 0, 3], atol=1e-14)
    t = np.where(np.arange(5) == 3, 1, -1)
    np.testing.assert_allclose(gradient[1], -0.5 * -2 * t * np.maximum(0, 1 - t * np.array(B)), atol=1e-14)


@kinds
def test_optax(kind, x64):
    x, y, g = example()
    for ours, theirs in (
        (CS, optax.losses.multiclass_hinge_loss),
        (PERCEPTRON, optax.losses.multiclass_perceptron_loss),
    ):
        values, gradient = values_and_gradient(ours, x, y, g, kind)
        expected, pullback = jax.vjp(lambda x, f=theirs: f(x, jnp.asarray(y)), jnp.asarray(x))
        np.testing.assert_allclose(values, expected, atol=1e-14)
        np.testing.assert_allclose(gradient, pullback(jnp.asarray(g))[0], atol=1e-14)


@kinds
@pytest.mark.parametrize(("power", "margin"), [(1, 1.0), (2, 0.3)])
def test_torch(power, margin, kind, x64):
    torch = pytest.importorskip("torch")
    x, y, g = example()
    values, gradient = values_and_gradient(WW, x, y, g, kind, power=power, margin=margin)
    t = torch.tensor(x, requires_grad=True)
    expected = 5 * torch.nn.functional.multi_margin_loss(
        t, torch.tensor(y), p=power, margin=margin, reduction="none"
    )
    (expected * torch.tensor(g)).sum().backward()
    np.testing.assert_allclose(values, expected.detach().numpy(), atol=1e-13)
    np.testing.assert_allclose(gradient, t.grad.numpy(), atol=1e-13)


@kinds
def test_kinks_have_the_gradient_zero_and_ties_go_to_the_first(kind):
    x, y, g = np.array([[1.0, 0.0, -1.0, 0.0]], np.float32), [0], np.ones(1, np.float32)
    for loss, options in ((CS, {}), (WW, {}), (WW, dict(power=2)), (OVR, dict(where=x != 0))):
        values, gradient = values_and_gradient(loss, x, y, g, kind, **options)
        assert values == 0 and np.all(gradient == 0), loss
    tied = np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    _, gradient = values_and_gradient(CS, tied, y, g, kind)
    np.testing.assert_array_equal(gradient, [[-1, 1, 0, 0]])


@kinds
@pytest.mark.parametrize("loss", [OVR, WW, CS, PERCEPTRON])
def test_labels_that_are_absent_and_scores_that_are_not_numbers(loss, kind):
    x, y, g = example(n=4)
    x, g = x.astype(np.float32), np.ones(4, np.float32)
    where = np.ones((4, 5), bool)
    where[1, y[1]] = False  # the label
    where[2, np.arange(5) != y[2]] = False  # all others
    values, gradient = values_and_gradient(loss, x, y, g, kind, where=where)
    assert values[1] == np.inf and np.isfinite(values[[0, 2, 3]]).all() and np.isfinite(gradient).all()
    assert loss is OVR or values[2] == 0
    if kind == "dense":  # a NaN that counts is not hidden by a maximum, and stays in its row
        x[0, (y[0] + 1) % 5] = np.nan
        values, gradient = values_and_gradient(loss, x, y, g)
        assert np.isnan(values[0]) and np.isfinite(values[1:]).all() and np.isfinite(gradient[1:]).all()


def test_the_margin_may_be_traced(x64):
    x, y, g = example()
    x, y, g = jnp.asarray(x), jnp.asarray(y), jnp.asarray(g)
    for loss in (WW, CS):
        f = jax.jit(lambda m, loss=loss: g @ loss(x, y, margin=m))
        np.testing.assert_allclose(f(0.7), g @ loss(x, y, margin=0.7), rtol=1e-14)
        check_grads(f, (0.7,), order=1, rtol=1e-6)
    f = jax.jit(lambda c: g @ OVR(x, y, penalty=c))
    np.testing.assert_allclose(jax.grad(f)(0.3), g @ OVR(x, y), rtol=1e-14)
