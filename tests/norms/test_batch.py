"""Norms of batches: worked numbers, formulas in numpy, derivatives, several devices, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close, fails, near
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxsoft.norms import (
    alpha_batch_norm,
    balanced_batch_norm,
    balanced_batch_norm_init,
    evonorm_b0,
    evonorm_s0,
)

X = np.array([[1.0, -2], [0.5, 1], [2, 0.5]])
IMAGE = np.linspace(-1, 2, 16).reshape(2, 2, 2, 2).transpose(0, 2, 3, 1)  # of NCHW


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_worked_numbers(x64):
    y, running = evonorm_b0(IMAGE, jnp.ones(2), train=True)
    samples = y.transpose(0, 3, 1, 2).reshape(2, 8)
    close(samples[0], [-1.203850, -0.963080, -0.722310, -0.481540, -0.240770, 0, 0.240770, 0.481540])
    close(samples[1], [0.722310, 0.781533, 0.817241, 0.842916, 0.862266, 0.877371, 0.889491, 0.899431])
    close(running, [0.969, 0.969])
    close(evonorm_b0(IMAGE, jnp.ones(2), train=True, unbiased=True)[1], [0.978857, 0.978857])
    sample = evonorm_s0(IMAGE, groups=2).transpose(0, 3, 1, 2)[0].reshape(8)
    close(sample, [-1.202622, -1.109070, -0.950709, -0.717818, -0.402600, 0, 0.491737, 1.070858])
    trained = jnp.array([0.0, 1]), jnp.array([1.0, 4])
    y = alpha_batch_norm(X, *trained, source_weight=0.9)
    close(y, [[0.902327, -1.467893], [0.391576, 0.059395], [1.923830, -0.195153]])
    biased = alpha_batch_norm(X, *trained, source_weight=0.9, unbiased=False)
    mu = np.array([0.116667, 0.883333])
    close(biased, (X - mu) / np.sqrt(np.array([0.938889, 3.772222]) + 1e-5), 2e-6)


def test_evonorm_by_formula(x64):
    x, scale, bias, slope = normal(3, 4, 2, 6), normal(6, seed=1), normal(6, seed=2), normal(6, seed=3)
    running = 0.5 + normal(6, seed=4) ** 2
    instance = np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    for train, variance in ((True, x.var((0, 1, 2))), (False, running)):
        y, new = evonorm_b0(x, running, scale, bias, slope, train=train, decay=0.8)
        near(y, scale * x / np.maximum(np.sqrt(variance + 1e-5), slope * x + instance) + bias)
        near(new, 0.8 * running + 0.2 * variance if train else running)
    for groups, used in ((3, 3), (4, 3), (32, 6), (1, 1)):
        grouped = x.reshape(3, 8, used, 6 // used)
        root = np.sqrt(grouped.var((1, 3)) + 1e-5).repeat(6 // used, -1)[:, None, None]
        near(
            evonorm_s0(x, scale, bias, slope, groups=groups),
            scale * x / (1 + np.exp(-slope * x)) / root + bias,
        )

    @jax.jit
    def both(*p):
        return evonorm_b0(p[0], running, *p[1:], train=True)[0], evonorm_s0(*p, groups=3)

    check_grads(both, (x, scale, bias, slope), order=1, modes=("fwd", "rev"))


def test_alpha_batch_norm_by_formula(x64):
    x, mean, variance = normal(4, 3, 5), normal(5, seed=1), normal(5, seed=2) ** 2
    scale, bias, where = normal(5, seed=3), normal(5, seed=4), np.arange(12).reshape(4, 3) % 5 > 0
    for weight in (0.0, 0.3, 1.0):
        for mask in (None, where):
            rows = x.reshape(-1, 5) if mask is None else x[mask]
            mu, v = (
                weight * a + (1 - weight) * b
                for a, b in ((mean, rows.mean(0)), (variance, rows.var(0, ddof=1)))
            )
            given = x if mask is None else np.where(mask[..., None], x, np.nan)
            y = alpha_batch_norm(given, mean, variance, scale, bias, source_weight=weight, where=mask)
            expected = (given - mu) / np.sqrt(v + 1e-5) * scale + bias
            near(np.nan_to_num(y), np.nan_to_num(expected))
    check_grads(
        jax.jit(functools.partial(alpha_batch_norm, source_weight=0.3, where=where)),
        (x, mean, variance, scale, bias),
        order=1,
        modes=("fwd", "rev"),
    )


def test_balanced_batch_norm(x64):
    step = jax.jit(
        lambda x, state, tasks, logits: balanced_batch_norm(x, state, tasks, logits, train=True, balance=0.5)
    )
    state = balanced_batch_norm_init(3, dtype=jnp.float64)
    tasks, logits = np.array([0, 0, 1, 1, 1, 1, 1, 1]), normal(4, seed=1)
    rates = []
    for t in range(4):
        x, old = normal(8, 2, 2, 3, seed=t), state
        zero = np.zeros(4) if t == 0 else logits
        y, state, loss = step(x, state, tasks, zero)
        rates.append(float(state.rate))
        concentration = np.exp(zero[:2]) + np.array([2, 6])
        of_task = concentration / concentration.sum()
        if t == 0:
            close(of_task, [0.3, 0.7])
        weights = (of_task / [2, 6])[tasks]
        mean = np.einsum("n,nhwc->c", weights, x) / 4
        variance = np.einsum("n,nhwc->c", weights, (x - mean) ** 2) / 4
        near(y, (x - mean) / np.sqrt(variance + 1e-5))
        near(state.mean, old.mean + state.rate * (mean - old.mean))
        near(state.variance, old.variance + state.rate * (variance - old.variance))
        near(loss, np.mean((mean - state.mean) ** 2) + np.mean((variance - state.variance) ** 2))
    close(rates, [0.316228, 0.25, 0.208562, 0.180223])
    y, same, loss = balanced_batch_norm(x, state, train=False)
    near(y, (x - state.mean) / np.sqrt(state.variance + 1e-5))
    assert same is state and loss == 0
    # Without tasks it is batch norm; a rate of 1 / t averages all batches.
    state = balanced_batch_norm_init(3, dtype=jnp.float64)
    means = []
    for t in range(3):
        x = normal(8, 3, seed=t)
        y, state, _ = balanced_batch_norm(x, state, train=True, balance=0.0)
        means.append(x.mean(0))
    near(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
    near(state.mean, np.mean(means, 0))

    @jax.jit
    def both(x, logits):
        y, _, loss = balanced_batch_norm(x, state, tasks, logits, train=True)
        return y, loss

    # The running statistics are constants of the loss: at rate 0 finite differences agree.
    frozen = balanced_batch_norm_init(3, dtype=jnp.float64)._replace(count=jnp.array(1), rate=jnp.array(0.0))
    state = frozen
    check_grads(both, (normal(8, 3), logits), order=1, modes=("fwd", "rev"))
    bad = balanced_batch_norm(x, state, tasks + 3, logits, train=True)
    assert np.all(np.isnan(bad[0]))


def test_several_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x, where = jnp.asarray(normal(8, 2, 3), jnp.float32), jnp.arange(16).reshape(8, 2) % 3 > 0
    tasks, logits = jnp.arange(8) % 3, jnp.array([0.5, 1.0, -1.0])
    mean, variance, g = jnp.zeros(3), jnp.ones(3), jnp.asarray(normal(8, 2, 3, seed=1), jnp.float32)

    def total(axis_name, x, mean, variance, logits, g, where, tasks):
        y, running = evonorm_b0(x, variance, train=True, unbiased=True, axis_name=axis_name)
        y = y + alpha_batch_norm(x, mean, variance, source_weight=0.3, where=where, axis_name=axis_name)
        z, state, loss = balanced_batch_norm(
            x, balanced_batch_norm_init(3), tasks, logits, train=True, axis_name=axis_name
        )
        out = jnp.sum((y + z) * g)
        out = out if axis_name is None else jax.lax.psum(out, axis_name)
        return out + loss, (running, state)

    spread, one = P("data"), P()
    specs = (spread, one, one, one, spread, spread, spread)
    sharded = jax.shard_map(
        functools.partial(total, "data"), mesh=mesh, in_specs=specs, out_specs=(one, (one, one))
    )
    both = [
        jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True))(x, mean, variance, logits, g, where, tasks)
        for f in (sharded, functools.partial(total, None))
    ]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        near(a, b, 1e-5)


def test_half_precision():
    x = jnp.asarray(300 * normal(4, 4, 2), jnp.float16)
    one = jnp.ones(2)
    for f in (
        lambda x: evonorm_b0(x, one, train=True)[0],
        evonorm_s0,
        lambda x: alpha_batch_norm(x, 0 * one, one, source_weight=0.5),
        lambda x: balanced_batch_norm(x, balanced_batch_norm_init(2), train=True)[0],
    ):
        low = f(x)
        np.testing.assert_array_equal(low, f(x.astype(jnp.float32)).astype(jnp.float16))
        assert np.all(np.isfinite(low))


def test_errors():
    x, one, state = jnp.ones((2, 3, 4)), jnp.ones(4), balanced_batch_norm_init(4)
    ids = jnp.zeros(2, int)
    for words, kind, call in [
        (["x", "3"], ValueError, lambda: evonorm_b0(x[0], one, train=True)),
        (["running_variance"], ValueError, lambda: evonorm_b0(x, one[:3], train=True)),
        (["slope"], ValueError, lambda: evonorm_b0(x, one, slope=one[:3], train=True)),
        (["decay"], ValueError, lambda: evonorm_b0(x, one, train=True, decay=2)),
        (["train"], TypeError, lambda: evonorm_b0(x, one, train=1)),
        (["unbiased"], TypeError, lambda: evonorm_b0(x, one, train=True, unbiased=1)),
        (["groups"], ValueError, lambda: evonorm_s0(x, groups=0)),
        (["eps"], ValueError, lambda: evonorm_s0(x, eps=0)),
        (["mean"], ValueError, lambda: alpha_batch_norm(x, one[:3], one, source_weight=1)),
        (["variance"], TypeError, lambda: alpha_batch_norm(x, one, jnp.ones(4, int), source_weight=1)),
        (["source_weight"], ValueError, lambda: alpha_batch_norm(x, one, one, source_weight=1.5)),
        (
            ["where"],
            ValueError,
            lambda: alpha_batch_norm(x, one, one, source_weight=1, where=jnp.ones(2, bool)),
        ),
        (["tasks"], TypeError, lambda: balanced_batch_norm(x, state, x[:, 0, 0], one, train=True)),
        (["tasks"], ValueError, lambda: balanced_batch_norm(x, state, jnp.zeros(3, int), one, train=True)),
        (["task_logits"], ValueError, lambda: balanced_batch_norm(x, state, ids, train=True)),
        (["momentum"], ValueError, lambda: balanced_batch_norm(x, state, train=True, momentum=1.0)),
        (["balance"], ValueError, lambda: balanced_batch_norm(x, state, train=True, balance=2)),
        (["state.mean"], ValueError, lambda: balanced_batch_norm(x, balanced_batch_norm_init(3), train=True)),
        (["features"], TypeError, lambda: balanced_batch_norm_init(2.5)),
    ]:
        fails(words, kind, call)
