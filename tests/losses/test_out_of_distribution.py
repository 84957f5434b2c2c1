"""Energies and temperatures: numbers, closed forms of gradients, limits, masks."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close, fails, kinds, logits_of, softmax

import jaxsoft
from jaxsoft import losses

A, B = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]
AB, LABELS, IS_OUT = np.array([A, B]), jnp.array([0, 3]), jnp.array([False, True])
ENERGY, EXPOSURE, DRO, CE = (
    losses.energy_margin_loss,
    losses.outlier_exposure_loss,
    losses.dro_temperature_loss,
    losses.cross_entropy,
)


def gradient(f, *args):
    """Of the sum with weights 0.5 and 1.5, jitted."""
    total = lambda *a: jnp.vdot(jnp.array([0.5, 1.5]), f(*a))
    return jax.jit(jax.grad(total, argnums=tuple(range(len(args)))))(*args)


W = np.array([[0.5], [1.5]])


@kinds
def test_energy_margin_loss(kind, x64):
    f = lambda x: ENERGY(logits_of(x, kind), IS_OUT, m_in=-5.0, m_out=-1.0)
    close(f(AB), [5.844695, 1.425535])
    lse = np.log(np.exp(AB).sum(-1, keepdims=True))
    slope = np.where(np.asarray(IS_OUT)[:, None], 2 * (-1.0 + lse), -2 * (-lse + 5.0))
    close(gradient(f, jnp.asarray(AB))[0], W * slope * softmax(AB), 1e-12)
    # Beyond the margins, nothing; the defaults of the paper.
    assert not jnp.any(ENERGY(logits_of(AB, kind), IS_OUT, m_in=0.0, m_out=-9.0))
    g = gradient(lambda x: ENERGY(logits_of(x, kind), IS_OUT, m_in=0.0, m_out=-9.0), jnp.asarray(AB))[0]
    assert not jnp.any(g)
    close(ENERGY(logits_of(AB, kind), IS_OUT), [(25 - lse[0, 0]) ** 2, 0], 1e-10)
    # A temperature for each row.
    t = jnp.array([0.5, 3.0])
    f = lambda x, t: ENERGY(logits_of(x, kind), IS_OUT, m_in=-5.0, m_out=-1.0, temperature=t)
    energy = -np.asarray(t) * np.log(np.exp(AB / np.asarray(t)[:, None]).sum(-1))
    close(f(AB, t), [max(energy[0] + 5, 0) ** 2, max(-1 - energy[1], 0) ** 2], 1e-10)
    step = jnp.array([1e-6, -2e-6])
    slope = jnp.vdot(gradient(f, jnp.asarray(AB), t)[1], step)
    close(slope / 1e-6, jnp.vdot(W[:, 0], f(AB, t + step) - f(AB, t - step)) / 2e-6, 1e-6)


@kinds
def test_outlier_exposure_loss(kind, x64):
    f = lambda x: EXPOSURE(logits_of(x, kind))
    close(f(AB)[1], 1.993958)
    close(f(AB), CE(jnp.asarray(AB), jnp.full((2, 5), 0.2)), 1e-12)
    close(gradient(f, jnp.asarray(AB))[0], W * (softmax(AB) - 0.2), 1e-12)
    close(EXPOSURE(logits_of(np.zeros((2, 5)), kind)), np.log(5), 1e-12)
    weights = jnp.array([0.0, 2.0])
    close(EXPOSURE(logits_of(AB, kind), weights=weights), weights * f(AB), 1e-12)
    moved = EXPOSURE(jnp.asarray(AB.T), axis=0)
    close(moved, f(AB), 1e-12)


@kinds
def test_dro_temperature_loss(kind, x64):
    f = lambda x, t: DRO(logits_of(x, kind), LABELS, temperature=t)
    for t, expected in ((0.5, -0.209420), (1.0, -0.027018), (2.0, 0.759291), (0.494454, -0.209451)):
        close(f(AB, t)[0], expected)
    t = jnp.array([0.7, 1.9])
    g_x, g_t = gradient(f, jnp.asarray(AB), t)
    p = softmax(AB / np.asarray(t)[:, None])
    close(g_x, W * (p - np.eye(5)[[0, 3]]), 1e-12)
    kl = (p * np.log(5 * p)).sum(-1)
    close(g_t, W[:, 0] * (1.0 - kl), 1e-12)
    # At the best temperature the divergence from the uniform distribution is rho.
    best = gradient(lambda t: f(AB, jnp.array([t, 1.0])), jnp.float64(0.494454))[0]
    close(best, 0, 1e-5)
    # Its limit, with T = 1 and rho = log C; C counts what is not masked.
    close(DRO(logits_of(AB, kind), LABELS, temperature=1.0, rho=float(np.log(5))), CE(AB, LABELS), 1e-12)
    where = jnp.array([True, True, False, True, True])
    masked = DRO(logits_of(AB, kind), LABELS, temperature=t, where=where)
    kept = np.asarray(where)
    close(masked, DRO(jnp.asarray(AB[:, kept]), jnp.array([0, 2]), temperature=t), 1e-12)


@kinds
def test_absent_classes_and_rows(kind):
    x = jnp.asarray(AB, jnp.float32)
    where = jnp.array([True, True, False, True, True])
    spoiled = x.at[:, 2].set(jnp.nan)
    t = jnp.array([0.7, 1.9])
    calls = {
        "energy": lambda x, t, w: ENERGY(x, IS_OUT, m_in=-5.0, m_out=-1.0, temperature=t, where=w),
        "exposure": lambda x, t, w: EXPOSURE(x, where=w),
        "dro": lambda x, t, w: DRO(x, LABELS, temperature=t, where=w),
    }
    for name, f in calls.items():
        run = lambda x, t, w: (lambda v: (jnp.sum(v), v))(f(logits_of(x, kind), t, w))
        g, values = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(spoiled, t, where)
        close(values, f(x, t, where), 1e-5)
        assert all(jnp.all(jnp.isfinite(a)) for a in g) and not jnp.any(g[0][:, 2]), name
        g, values = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(spoiled, t, where & False)
        assert not jnp.any(values) and not any(jnp.any(a) for a in g), name
    # Ignored rows, with any logits and temperatures.
    bad_x = x.at[1].set(jnp.nan) if kind == "dense" else x
    run = lambda x, t: jnp.sum(DRO(logits_of(x, kind), jnp.array([0, -100]), temperature=t))
    value, g = jax.value_and_grad(run, argnums=(0, 1))(bad_x, jnp.array([0.7, jnp.nan]))
    close(value, DRO(x[:1], LABELS[:1], temperature=0.7)[0])
    assert all(jnp.all(jnp.isfinite(a)) and not jnp.any(a[1]) for a in g)
    absent = DRO(logits_of(x, kind), jnp.array([2, 0]), temperature=1.0, where=where)
    assert absent[0] == jnp.inf and jnp.isfinite(absent[1])


@kinds
def test_weights_and_chunks(kind, x64):
    weights, t = jnp.array([0.0, 2.0]), jnp.array([0.5, 3.0])
    f = lambda x, o, t, **k: ENERGY(x, o, m_in=-5.0, m_out=-1.0, temperature=t, **k)
    plain = f(logits_of(AB, kind), IS_OUT, t)
    close(f(logits_of(AB, kind), IS_OUT, t, weights=weights), weights * plain, 1e-12)
    total = losses.weighted_sum(f, logits_of(AB, kind), IS_OUT, t, weights=weights + 1, chunk_size=1)
    close(total, jnp.vdot(weights + 1, plain), 1e-12)


def test_bad_input():
    x = jnp.asarray(AB, jnp.float32)
    for logits in (x, jaxsoft.linear_logits(x, jnp.eye(5))):
        f = lambda o=IS_OUT, logits=logits, **k: ENERGY(logits, o, **k)
        fails(["is_out", "(2,)", "(1,)"], ValueError, lambda: f(IS_OUT[:1]))
        fails(["is_out", "boolean", "int32"], TypeError, lambda: f(LABELS))
        fails(["m_in", "number", "'a'"], TypeError, lambda: f(m_in="a"))
        fails(["m_out", "number", "None"], TypeError, lambda: f(m_out=None))
        fails(["temperature", "> 0", "0.0"], ValueError, lambda: f(temperature=0.0))
        fails(["temperature", "(2,)", "(3,)"], ValueError, lambda: f(temperature=jnp.ones(3)))
        for loss in (f, lambda logits=logits, **k: EXPOSURE(logits, **k)):
            fails(["weights", "(2,)", "(5,)"], ValueError, lambda: loss(weights=jnp.ones(5)))
            fails(["weights", "real numbers", "complex64"], TypeError, lambda: loss(weights=1j * LABELS))
            fails(["where", "boolean", "float32"], TypeError, lambda: loss(where=jnp.ones(5)))
            fails(["where", "(2, 5)", "(4,)"], ValueError, lambda: loss(where=jnp.ones(4, bool)))
            fails(["axis", "[-2, 2)", "2"], ValueError, lambda: loss(axis=2))
    fails(["logits", "floating", "int32"], TypeError, lambda: EXPOSURE(LABELS[None]))
