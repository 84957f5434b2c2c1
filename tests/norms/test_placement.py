"""Mix-LN and weight conditioning: worked numbers, wiring, derivatives, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close, fails, near
from jax.test_util import check_grads

from jaxsoft.norms import mix_ln_num_post, mix_ln_residual, rms_norm, weight_condition


def test_mix_ln():
    assert [mix_ln_num_post(n) for n in (0, 3, 4, 12, 24, 32)] == [0, 0, 1, 3, 6, 8]
    assert mix_ln_num_post(100, alpha=0.29) == 29  # 28.999999999999996 in floating point
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    branch = jnp.sin
    post, pre = rms_norm(x + branch(x)), x + branch(rms_norm(x))
    for layer, expected in enumerate((post, post, pre)):
        near(mix_ln_residual(x, branch, rms_norm, layer=layer, num_post=2), expected, 1e-6)

    def stack(x, layer):
        return mix_ln_residual(x, branch, rms_norm, layer=layer, num_post=2), None

    unrolled = functools.reduce(lambda x, layer: stack(x, layer)[0], range(4), x)
    near(jax.lax.scan(stack, x, jnp.arange(4))[0], unrolled, 1e-6)


def test_weight_condition(x64):
    w = np.array([[3.0, 4.0], [0.1, 0.0]])
    out = weight_condition(w, axis=0)
    close(out, [[0.6, 0.8], [1, 0]])
    close([np.linalg.cond(w), np.linalg.cond(out)], [62.509002, 2.0])
    near(weight_condition(w.T), out.T)
    kernel, g = (
        np.random.default_rng(0).normal(size=(2, 3, 4, 5)),
        np.random.default_rng(1).normal(size=(2, 3, 4, 5)),
    )
    near(weight_condition(kernel), kernel / np.sqrt((kernel**2).sum((0, 1, 2))))
    near(weight_condition(kernel, axis=(-1, 2)), kernel / np.sqrt((kernel**2).sum((0, 1), keepdims=True)))
    norms = np.sqrt((kernel**2).sum((0, 1, 2)))
    unit = kernel / norms
    near(jax.vjp(weight_condition, kernel)[1](g)[0], (g - (g * unit).sum((0, 1, 2)) * unit) / norms)
    check_grads(jax.jit(weight_condition), (kernel,), order=1, modes=("fwd", "rev"))
    zero = jnp.zeros((2, 2)).at[0, 0].set(2)
    np.testing.assert_array_equal(weight_condition(zero), [[1, 0], [0, 0]])
    low = weight_condition(jnp.full((3, 1), 300, jnp.float16))
    assert low.dtype == jnp.float16
    close(low, np.full((3, 1), 3**-0.5), 1e-3)


def test_errors():
    x = jnp.ones(2)
    call = functools.partial(mix_ln_residual, x, jnp.sin, rms_norm)
    for words, kind, f in [
        (["layer"], TypeError, lambda: call(layer=1.5, num_post=1)),
        (["num_post"], ValueError, lambda: call(layer=1, num_post=-1)),
        (["layer"], TypeError, lambda: jax.jit(lambda i: call(layer=i, num_post=1))(1.5)),
        (["x"], TypeError, lambda: mix_ln_residual(jnp.arange(2), jnp.sin, rms_norm, layer=0, num_post=0)),
        (["alpha"], ValueError, lambda: mix_ln_num_post(3, alpha=2)),
        (["layers"], ValueError, lambda: mix_ln_num_post(-1)),
        (["weight"], TypeError, lambda: weight_condition(jnp.arange(2))),
        (["axis"], ValueError, lambda: weight_condition(x, axis=1)),
        (["eps"], ValueError, lambda: weight_condition(x, eps=0)),
    ]:
        fails(words, kind, f)
