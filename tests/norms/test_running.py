"""PowerNorm and unified norm: worked numbers, both passes against their formulas in numpy, several devices, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fails, near
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxsoft.norms import (
    PowerNormState,
    UnifiedNormBackward,
    UnifiedNormState,
    fold_into_linear,
    power_norm,
    power_norm_init,
    unified_norm,
    unified_norm_init,
)

X = np.array([[1.0, -2], [0.5, 1], [2, 0.5]])
G = np.array([[1.0, 0], [0, 1], [1, 1]])


@functools.cache
def program(norm, **options):
    """`(y, state), (gradients of x, backward, scale and bias)` of a step whose output has the cotangent g."""

    @jax.jit
    def step(x, state, backward, scale, bias, g, where):
        def forward(x, backward, scale, bias):
            return norm(x, state, backward, scale, bias, train=True, where=where, **options)

        y, pull, state = jax.vjp(forward, x, backward, scale, bias, has_aux=True)
        return (y, state), pull(g)

    return step


# The formulas of the papers' codes, a step at a time. Both return what `program` does.


def power(x, state, m, scale, bias, g, where, warmup, groups, a_f=0.9, a_b=0.9, eps=1e-5):
    count, phi = state.count + 1, np.array(state.mean_square)

    def of_groups(x):
        return np.repeat(x.reshape(*x.shape[:-1], groups, -1).mean(-1), x.shape[-1] // groups, -1)

    root = 1 / np.sqrt(of_groups(x**2) + eps)
    x = x * root
    v = (x[where] ** 2).mean(0)
    z = x / np.sqrt((v if count <= warmup else phi) + eps)
    if count < warmup:
        phi = phi * (count - 1) / count + v / count
    phi = a_f * phi + (1 - a_f) * v
    h = scale * g
    a = h - (1 - a_b) * m * z
    flat = tuple(range(x.ndim - 1))
    new = m + (a * z).mean(flat)
    dx = a / np.sqrt(v + eps)
    dx = root * (dx - x * of_groups(dx * x))
    return (z * scale + bias, (count, phi)), (dx, new, (g * z).sum(flat), g.sum(flat))


def unified(x, state, backward, scale, bias, g, where, warmup, filter_outliers, momentum=0.9, eps=1e-5):
    count, rv, buf = state.count + 1, np.array(state.mean_square), np.array(state.window)
    w_f, skips = len(buf), int(state.skips)
    x2 = (x[where] ** 2).mean(0)
    spread = np.sqrt(buf).var(ddof=1)
    buf[count % w_f] = x2
    skip = w_f <= 1
    with np.errstate(divide="ignore"):
        gm = np.exp(np.log(buf).mean(0))
    if count >= warmup and filter_outliers and np.any(buf.mean(0) - gm > spread * w_f):
        buf[count % w_f], skip, skips = rv, True, skips + 1
        with np.errstate(divide="ignore"):
            gm = np.exp(np.log(buf).mean(0))
    var = x2 if count <= w_f or count < warmup or skip else gm
    r = np.sqrt(var + eps) / np.sqrt(rv + eps)
    r = np.ones_like(r) if count <= max(1000, warmup) or skip else np.clip(r, 0.2, 5)
    z = x / np.sqrt(var + eps)
    rv = momentum * rv + (1 - momentum) * var
    flat = tuple(range(x.ndim - 1))
    h, m, buf_g = scale * g * r, np.array(backward.mean), np.array(backward.window)
    w_b, gz = len(buf_g), (h * z).mean(flat)
    buf_g[count % w_b] = m if skip else gz
    used = gz if count <= w_b or count < warmup or skip else buf_g.mean(0)
    m = momentum * m + (1 - momentum) * used
    dx = (h - (used if skip else m) * z) / np.sqrt(var + eps)
    new = UnifiedNormState(count, skips, rv, buf)
    return (z * scale + bias, new), (dx, UnifiedNormBackward(m, buf_g), (g * r * z).sum(flat), g.sum(flat))


def same(ours, expected, tolerance=1e-11):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        near(a, b, tolerance)


def test_worked_numbers_of_power_norm(x64):
    state = PowerNormState(jnp.array(10000, jnp.int32), jnp.array([0.5, 2]))
    ones, zeros, where = jnp.ones(2), jnp.zeros(2), jnp.ones(3, bool)
    step = program(power_norm, groups=None)
    (y, state), (dx, new, dscale, dbias) = step(X, state, jnp.array([0.2, -0.1]), ones, zeros, G, where)
    close(y, [[1.414199, -1.414210], [0.707100, 0.707105], [2.828399, 0.353553]])
    close(state.mean_square, [0.625, 1.975])
    close(dx, [[0.734546, -0.010690], [-0.010690, 0.761272], [0.713166, 0.758599]])
    close(new, [1.544201, 0.262302])
    near(dscale, (G * y).sum(0))
    near(dbias, G.sum(0))
    one = PowerNormState(jnp.array(0), jnp.ones(4))
    for groups, expected in [
        (1, [0.365148, 0.730296, 1.095444, 1.460593]),
        (2, [0.632454, 1.264909, 0.848528, 1.131370]),
    ]:
        y, same_state = power_norm(jnp.array([[1.0, 2, 3, 4]]), one, jnp.zeros(4), train=False, groups=groups)
        close(y * np.sqrt(1 + 1e-5), [expected])
        assert same_state is one


def test_worked_numbers_of_unified_norm(x64):
    window = jnp.array([[1, 2], [1.2, 1.8], [0.9, 2.2], [0.3, 0.3]])
    count = jnp.array(4002, jnp.int32)
    state = UnifiedNormState(count, jnp.array(0), jnp.array([1.0, 2]), window)
    backward = UnifiedNormBackward(jnp.array([0.2, -0.1]), jnp.zeros((4, 2)))
    step = program(unified_norm)
    (y, state), (dx, new, *_) = step(X, state, backward, jnp.ones(2), jnp.zeros(2), G, jnp.ones(3, bool))
    close(y, [[0.923507, -1.439821], [0.461754, 0.719910], [1.847015, 0.359955]])
    close(state.mean_square, [1.017251, 1.992948])
    close(state.window[3], [1.75, 1.75])
    close(new.window[3], [0.999995, 0.353553])
    close(new.mean, [0.205000, -0.081161])
    close(dx, [[0.825158, -0.084127], [-0.087419, 0.749169], [0.650320, 0.728137]])


def batches(steps, shape=(4, 3, 6)):
    """Inputs, cotangents and masks of some steps; the seventh input is an outlier."""
    rng = np.random.default_rng(0)
    for t in range(steps):
        x = rng.normal(size=shape) * rng.uniform(0.5, 2, shape[-1]) * (30 if t == 6 else 1)
        yield x, rng.normal(size=shape), rng.uniform(size=shape[:-1]) < 0.7


def test_power_norm_over_steps(x64):
    scale, bias = np.linspace(-1, 2, 6), np.linspace(0, 1, 6)
    options = dict(warmup=3, groups=2)
    state, backward = power_norm_init(6, dtype=jnp.float64)
    for x, g, where in batches(6):
        ours = program(power_norm, **options)(x, state, backward, scale, bias, g, where)
        same(ours, power(x, state, np.array(backward), scale, bias, g, where, **options))
        (_, state), (_, backward, *_) = ours
    assert state.count == 6


@pytest.mark.parametrize("filter_outliers", [False, True])
def test_unified_norm_over_steps(x64, filter_outliers):
    scale, bias = np.linspace(-1, 2, 6), np.linspace(0, 1, 6)
    options = dict(warmup=4, filter_outliers=filter_outliers)
    state, backward = unified_norm_init(6, window=3, backward_window=2, dtype=jnp.float64)
    for t, (x, g, where) in enumerate(batches(9)):
        if t == 4:  # past the first 1000 batches, from which on gradients are scaled
            state = state._replace(count=state.count + 1200)
        ours = program(unified_norm, **options)(x, state, backward, scale, bias, g, where)
        same(ours, unified(x, state, backward, scale, bias, g, where, **options))
        (_, state), (_, backward, *_) = ours
    assert (state.skips > 0) == filter_outliers
    # After training it is a part of the next layer.
    kernel = np.arange(12.0).reshape(6, 2)
    y, _ = unified_norm(x, state, backward, scale, bias, train=False)
    factor = scale / np.sqrt(state.mean_square + 1e-5)
    kernel_new, bias_new = fold_into_linear(kernel, scale=factor, shift=bias)
    near(x @ kernel_new + bias_new, y @ kernel)


@pytest.mark.parametrize("norm", [power_norm, unified_norm])
def test_several_devices(norm):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    scale, bias = jnp.linspace(-1, 2, 6), jnp.linspace(0, 1, 6)
    state, backward = (power_norm_init if norm is power_norm else unified_norm_init)(6)
    backward = jax.tree.map(lambda b: b + 0.3, backward)
    x, g, where = next(batches(1))
    x, g = jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)

    def total(axis_name, x, backward, scale, bias, state, g, where):
        y, state = norm(
            x, state, backward, scale, bias, train=True, where=where, warmup=0, axis_name=axis_name
        )
        loss = jnp.sum(y * g)
        return loss if axis_name is None else jax.lax.psum(loss, axis_name), state

    spread, one = P("data"), P()
    specs = (spread, one, one, one, one, spread, spread)
    sharded = jax.shard_map(functools.partial(total, "data"), mesh=mesh, in_specs=specs, out_specs=(one, one))
    arguments = x, backward, scale, bias, state, g, where
    both = [
        jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True))(*arguments)
        for f in (sharded, functools.partial(total, None))
    ]
    same(*both, tolerance=1e-5)


def test_precision_and_placeholders():
    state, backward = power_norm_init(4)
    x = jnp.asarray(300 * np.random.default_rng(0).normal(size=(8, 4)), jnp.float16)
    y, new = power_norm(x, state, backward, train=True, groups=None)
    high, _ = power_norm(x.astype(jnp.float32), state, backward, train=True, groups=None)
    np.testing.assert_array_equal(y, high.astype(jnp.float16))
    assert new.mean_square.dtype == jnp.float32 and np.all(np.isfinite(y))
    # Positions that do not count may hold anything.
    where = jnp.arange(8) < 5
    masked, state_masked = power_norm(
        jnp.where(where[:, None], high, jnp.nan), state, backward, train=True, where=where
    )
    _, state_short = power_norm(high[:5], state, backward, train=True)
    close(state_masked.mean_square, state_short.mean_square, 1e-6)
    assert np.all(np.isfinite(masked[:5]))


def test_errors():
    x = jnp.ones((2, 4))
    state, backward = power_norm_init(4)
    of_un = unified_norm_init(4)
    call = functools.partial(power_norm, x, state, backward)
    for words, kind, f in [
        (["x", "axes"], ValueError, lambda: power_norm(x[0], state, backward, train=True)),
        (
            ["x", "floating"],
            TypeError,
            lambda: power_norm(jnp.ones((2, 4), int), state, backward, train=True),
        ),
        (["groups", "4", "3"], ValueError, lambda: call(train=True, groups=3)),
        (["train"], TypeError, lambda: call(train=jnp.array(True))),
        (["where"], TypeError, lambda: call(train=True, where=jnp.ones(2))),
        (["where"], ValueError, lambda: call(train=True, where=jnp.ones((2, 4), bool))),
        (["decay"], ValueError, lambda: call(train=True, decay=1.5)),
        (["backward_decay"], ValueError, lambda: call(train=True, backward_decay=-1)),
        (["warmup"], ValueError, lambda: call(train=True, warmup=-1)),
        (["eps"], ValueError, lambda: call(train=True, eps=0)),
        (["scale"], ValueError, lambda: call(jnp.ones(3), train=True)),
        (["backward"], ValueError, lambda: power_norm(x, state, jnp.ones(3), train=True)),
        (
            ["state.mean_square"],
            ValueError,
            lambda: power_norm(x, power_norm_init(3)[0], backward, train=True),
        ),
        (["features"], ValueError, lambda: power_norm_init(0)),
        (["dtype"], TypeError, lambda: power_norm_init(2, dtype=int)),
        (["window"], ValueError, lambda: unified_norm_init(2, window=0)),
        (["state.mean_square"], ValueError, lambda: unified_norm(x, *unified_norm_init(3), train=True)),
        (["filter_outliers"], TypeError, lambda: unified_norm(x, *of_un, train=True, filter_outliers=1)),
    ]:
        fails(words, kind, f)
