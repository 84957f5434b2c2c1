"""SoftPool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from jax.test_util import check_grads

from jaxsoft.normalizers.pooling import soft_pool

X = np.random.default_rng(0).normal(size=(2, 5, 6, 3))
SHAPES = [((2, 2), None), ((3, 2), (1, 2)), ((5, 6), None), ((1, 3), (2, 2))]


def by_hand(x, window, stride, where=None):
    """Every window by itself, axes 1 and 2."""
    where = np.ones(x.shape, bool) if where is None else where
    n = [(size - w) // s + 1 for size, w, s in zip(x.shape[1:3], window, stride)]
    y = np.zeros((x.shape[0], *n, x.shape[3]))
    for b, i, j, c in np.ndindex(y.shape):
        at = (
            b,
            slice(i * stride[0], i * stride[0] + window[0]),
            slice(j * stride[1], j * stride[1] + window[1]),
            c,
        )
        a = x[at][where[at]]
        p = np.exp(a)
        y[b, i, j, c] = (p * a).sum() / p.sum() if a.size else 0
    return y


def test_worked_numbers(x64):
    close(soft_pool(jnp.array([1.0, 2.0, -1.0, 0.5]), 4, axes=0), [1.480779])
    close(soft_pool(jnp.array([1.0, 3.0, 2.0, 2.0, 0.0, -1.0]), axes=0), [2.761594, 2, -0.268941])
    square = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    y, g = jax.value_and_grad(lambda x: soft_pool(x, axes=(0, 1))[0, 0])(square)
    close(y, 2.492653)
    close(g, [[-0.042932, 0.120182], [0.970602, -0.047852]])
    g = jax.grad(lambda x: soft_pool(x, axes=(0, 1), stop_weight_gradient=True)[0, 0])(square)
    close(g, [[0.087144, 0.236883], [0.643914, 0.032059]])


@pytest.mark.parametrize(("window", "stride"), SHAPES)
def test_values_and_gradients(window, stride, x64):
    x = jnp.asarray(X)

    def f(x):
        return soft_pool(x, window, axes=(1, 2), stride=stride)

    close(jax.jit(f)(x), by_hand(X, window, stride or window), 1e-14)
    check_grads(f, (x,), 1)


def test_axes_vmap_and_second_order(x64):
    x = jnp.asarray(X)
    expected = soft_pool(x, (3, 2), axes=(1, 2))
    close(soft_pool(x, (2, 3), axes=(-2, -3)), expected, 1e-15)
    close(jax.vmap(lambda x: soft_pool(x, (3, 2), axes=(0, 1)))(x), expected, 1e-15)
    close(jnp.moveaxis(soft_pool(jnp.moveaxis(x, -1, 1), (3, 2), axes=(2, 3)), 1, -1), expected, 1e-15)
    three = soft_pool(x, 2, axes=(1, 2, 3))
    close(
        three[1, 0, 1, 0], by_hand(x[1:, :2, 2:4, :2].reshape(1, 8, 1, 1), (8, 1), (1, 1))[0, 0, 0, 0], 1e-14
    )
    check_grads(lambda x: soft_pool(x, 2, axes=0, stride=1), (x[0, :, 0, 0],), 2)


def test_absent_entries():
    rng = np.random.default_rng(1)
    where = rng.random(X.shape) < 0.6
    where[1, :4, :4] = False  # windows without entries
    x = np.where(where, X, np.nan)
    x[0, 0, 0, 0], where[0, 0, 0, 0] = -np.inf, True

    def f(x, where):
        y = soft_pool(x, 2, axes=(1, 2), where=where)
        return (y * jnp.arange(y.size).reshape(y.shape)).sum(), y

    (_, y), g = jax.value_and_grad(f, has_aux=True)(jnp.asarray(x, jnp.float32), jnp.asarray(where))
    present = where & (x != -np.inf)
    close(y, by_hand(np.where(present, X, 0), (2, 2), (2, 2), present))
    close(y[1, :2, :2], 0, 0)
    assert np.all(np.isfinite(g)) and not np.any(np.asarray(g)[~present]) and np.any(np.asarray(g) != 0)
    (_, other), h = jax.value_and_grad(f, has_aux=True)(jnp.asarray(X, jnp.float32), jnp.asarray(present))
    close(y, other, 0)
    close(g, h, 0)


def test_large_activations_dtypes_and_clamp():
    big = jnp.array([1e4, 1e4 - 1, -1e4, -1e4 - 1])
    y, g = jax.value_and_grad(lambda x: soft_pool(x, 2, axes=0)[0])(big)
    p = 1 / (1 + np.exp(-1))
    close(y, 1e4 - (1 - p), 1e-3)
    close(g, [p * (1 + (1 - p)), (1 - p) * (1 - p), 0, 0], 1e-3)
    low = soft_pool(jnp.asarray(X, jnp.bfloat16), 2, axes=(1, 2))
    assert low.dtype == jnp.bfloat16
    high = soft_pool(jnp.asarray(X, jnp.bfloat16).astype(jnp.float32), 2, axes=(1, 2))
    np.testing.assert_allclose(np.asarray(low, np.float32), high, rtol=4e-3, atol=1e-6)
    x = jnp.array([1.0, 3.0, 2.0, 2.0, 0.0, -1.0])
    close(soft_pool(x, axes=0, clamp_min=0.0), [2.761594, 2, 0])


def test_the_backward_pass_keeps_no_windows():
    x = jnp.zeros((64, 64))
    for window in (2, 4):
        _, pullback = jax.vjp(lambda x, w=window: soft_pool(x, w, axes=(0, 1), stride=1), x)
        kept = sum(a.size for a in jax.tree.leaves(pullback) if jnp.issubdtype(a.dtype, jnp.floating))
        assert kept <= 2 * x.size, (window, kept)


def test_bad_input():
    x = jnp.zeros((4, 5))
    for call, message in (
        (lambda: soft_pool(x, 6, axes=1), r"window must fit into the axes \(1,\)"),
        (lambda: soft_pool(x, axes=2), r"axes must be different axes in \[-2, 2\)"),
        (lambda: soft_pool(x, axes=(1, -1)), "axes must be different"),
        (
            lambda: soft_pool(x, (2, 2, 2), axes=(0, 1)),
            "window must be one integer, or one for each of the 2",
        ),
        (lambda: soft_pool(x, 0, axes=0), "window must be a static integer >= 1"),
        (lambda: soft_pool(x, 2, axes=0, stride=0), "stride must be a static integer >= 1"),
        (lambda: soft_pool(x, 2, axes=0, where=jnp.ones(4, bool)), "where must broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="x must be an array of floating dtype"):
        soft_pool(jnp.ones((4, 4), int), axes=0)
    with pytest.raises(TypeError, match="axes"):
        soft_pool(x)  # the axes are named, never guessed
    assert soft_pool(x, 4, axes=0).shape == (1, 5)
