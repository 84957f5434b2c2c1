"""Options at a second value, one off the default or on another branch, against plain formulas."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import descend, near

from jaxsoft import optimizers as o

pytestmark = pytest.mark.whole  # the cases are optimizers

RNG = np.random.default_rng(0)
STEPS, SHAPE, B1, B2, EPS = 9, (3, 4), 0.7, 0.8, 0.3
START = RNG.normal(size=SHAPE)
GRADS = RNG.normal(size=(STEPS, *SHAPE))
GRADS[5, 1, 2] *= 100


def ema(decay, xs):
    """The moving averages from 0, without correction."""
    out, m = [], 0.0
    for x in xs:
        m = decay * m + (1 - decay) * x
        out.append(m)
    return np.stack(out)


def corrections(decay):
    return (1 - decay ** np.arange(1, STEPS + 1))[:, None, None]


# --- directions, at fixed parameters ---------------------------------------------------------------------


def diffgrad():
    friction = 1 / (1 + np.exp(-np.abs(np.diff(GRADS, axis=0, prepend=0))))
    step = np.sqrt(corrections(B2)) / corrections(B1)
    return step * ema(B1, GRADS) * friction / (np.sqrt(ema(B2, GRADS**2)) + EPS)


def without_radial(us, delta, eps):
    """Off the weights in each row (channel axis 0), or as a whole; returns which way each step went, too."""
    out, ways = [], set()
    for u, g in zip(us, GRADS):
        way = None
        for name, x, y, v in (("rows", g, START, u), ("all", *(a.reshape(1, -1) for a in (g, START, u)))):
            dot = lambda a, b: np.sum(a * b, 1, keepdims=True)
            norms = np.sqrt(dot(x, x) * dot(y, y))
            if np.all(np.abs(dot(x, y)) < delta / np.sqrt(x.shape[1]) * np.maximum(norms, eps)):
                u = (v - dot(y, v) / (np.sqrt(dot(y, y)) + eps) ** 2 * y).reshape(u.shape)
                way = name
                break
        out.append(u)
        ways.add(way)
    assert ways == {"rows", "all", None}
    return np.stack(out)


def adamp():
    m = B1 * ema(B1, GRADS) + (1 - B1) * GRADS
    u = m / corrections(B1) / (np.sqrt(ema(B2, GRADS**2) / corrections(B2)) + EPS)
    return without_radial(u, 1.2, EPS)


def sgdp():
    us, m = [], 0.0
    for g in GRADS:
        m = B1 * m + 0.6 * g
        us.append(g + B1 * m)
    return without_radial(np.stack(us), 1.2, EPS)


def spam(threshold, reset_every, warmup_steps, clip_start):
    m = v = np.zeros(SHAPE)
    out = []
    for t, g in enumerate(GRADS, start=1):
        j = t % reset_every
        if j == 0:
            m = v = np.zeros(SHAPE)
        if j >= clip_start:
            g = np.where(g * g > threshold * v, np.sign(g) * np.sqrt(threshold * v), g)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        cold = t >= reset_every and j < warmup_steps
        s = 1 - 0.99 * (1 + np.cos(np.pi * j / (warmup_steps + 1))) / 2 if cold else 1
        out.append(s * np.sqrt(1 - B2**t) / (1 - B1**t) * m / (np.sqrt(v) + EPS))
    return np.stack(out)


def spike_clip(gamma3):
    bounds = ema(gamma3, np.max(np.abs(GRADS), (1, 2), keepdims=True)) / corrections(gamma3)
    peaks = np.max(np.abs(GRADS), (1, 2), keepdims=True)
    return np.where(np.abs(GRADS) > bounds, GRADS * bounds / peaks, GRADS)


def gradient_norm(grads, gamma1, gamma2, eps):
    """`gamma1` is one number per step."""
    out, mean, square, start = [], 0.0, 0.0, 0.0
    for t, (g, b) in enumerate(zip(grads, gamma1), start=1):
        n = np.linalg.norm(g)
        mean, square = b * mean + (1 - b) * n, gamma2 * square + (1 - gamma2) * n * n
        start = 1 - b**t
        out.append(g / n * mean / start / (np.sqrt(square / (1 - gamma2**t)) + eps))
    return np.stack(out)


def stable_spam(reset_every, total_steps, eta_min):
    t = np.arange(1, STEPS + 1)
    s = np.ones(STEPS)
    if total_steps:
        cosine = np.where(t <= total_steps, (1 + np.cos(np.pi * t / (total_steps + 1))) / 2, 0)
        s = eta_min + (1 - eta_min) * cosine
    grads = gradient_norm(spike_clip(0.5), s * 0.6, 0.4, EPS)
    m = v = np.zeros(SHAPE)
    out = []
    for t, (g, b) in enumerate(zip(grads, s * B1), start=1):
        if t % reset_every == 0:
            m = v = np.zeros(SHAPE)
        q = t if t < reset_every else t % reset_every + 1
        m, v = b * m + (1 - b) * g, B2 * v + (1 - B2) * g * g
        out.append(m / (1 - b**q) / (np.sqrt(v / (1 - B2**q)) + EPS))
    return np.stack(out)


def lion():
    before = np.concatenate([np.zeros((1, *SHAPE)), ema(B2, GRADS)[:-1]])
    c = B1 * before + (1 - B1) * GRADS
    return np.clip(c / 0.4, -1, 1)


def cautious(eps):
    momentum = ema(B1, GRADS)
    mask = momentum * GRADS > 0
    return momentum * mask / np.maximum(mask.mean((1, 2), keepdims=True), eps)


SPAM = dict(threshold=3.0, reset_every=4, warmup_steps=2, clip_start=1)
STABLE = dict(gamma1=0.6, gamma2=0.4, gamma3=0.5, reset_every=4)
RADIAL = dict(delta=1.2, channel_axis=0, eps=EPS, nesterov=True)
OFTEN = dict(reset_every=2, warmup_steps=0, clip_start=0, threshold=0.0)
DIRECTIONS = {
    "lion_k": (o.scale_by_lion_k(B1, B2, o.kappa_huber(0.4)), lion),
    "diffgrad": (o.scale_by_diffgrad(B1, B2, EPS), diffgrad),
    "adamp": (o.scale_by_adamp(B1, B2, **RADIAL), adamp),
    "sgdp": (o.scale_by_sgdp(B1, dampening=0.4, **RADIAL), sgdp),
    "spam": (o.scale_by_spam(B1, B2, EPS, **SPAM), lambda: spam(**SPAM)),
    "spam, unclipped": (
        o.scale_by_spam(B1, B2, EPS, **OFTEN),
        lambda: spam(**OFTEN | {"clip_start": 99}),
    ),
    "spike_clip_by_second_moment": (
        optax.chain(o.spike_clip_by_second_moment(3.0, B2, 2), optax.ema(B1, debias=False)),
        lambda: ema(B1, clipped(3.0, B2, 2)),
    ),
    "adaptive_spike_clip": (o.adaptive_spike_clip(0.5), lambda: spike_clip(0.5)),
    "adaptive_gradient_norm": (
        o.adaptive_gradient_norm(0.6, 0.4, EPS),
        lambda: gradient_norm(GRADS, np.full(STEPS, 0.6), 0.4, EPS),
    ),
    "stable_spam": (o.scale_by_stable_spam(B1, B2, EPS, **STABLE), lambda: stable_spam(4, None, 0)),
    "stable_spam, total_steps": (
        o.scale_by_stable_spam(B1, B2, EPS, **STABLE, total_steps=7, eta_min=0.2),
        lambda: stable_spam(4, 7, 0.2),
    ),
    "cautious": (
        o.cautious(optax.ema(B1, debias=False), ready=False, eps=0.9),
        lambda: cautious(0.9),
    ),
}


def clipped(threshold, b2, clip_start):
    v, out = np.zeros(SHAPE), []
    for t, g in enumerate(GRADS, start=1):
        if t >= clip_start:
            g = np.where(g * g > threshold * v, np.sign(g) * np.sqrt(threshold * v), g)
        v = b2 * v + (1 - b2) * g * g
        out.append(g)
    return np.stack(out)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_second_values_of_a_direction(name, x64):
    tx, expected = DIRECTIONS[name]

    def step(state, g):
        u, state = tx.update(g, state, START)
        return state, u

    near(jax.jit(lambda g: jax.lax.scan(step, tx.init(START), g)[1])(GRADS), expected(), 1e-9)


READY = {
    "lion_k": dict(b1=B1, b2=B2, kappa="l2"),
    "diffgrad": dict(b1=B1, b2=B2, eps=EPS),
    "adamp": dict(b1=B1, b2=B2, wd_ratio=0.5, **RADIAL),
    "sgdp": dict(momentum=B1, dampening=0.4, wd_ratio=0.5, **RADIAL),
    "spam": dict(b1=B1, b2=B2, eps=EPS, **SPAM),
    "stable_spam": dict(b1=B1, b2=B2, eps=EPS, total_steps=7, eta_min=0.2, **STABLE),
    "fira": dict(
        rank=2, b1=B1, b2=B2, eps=EPS, update_every=2, scale=0.5, gamma=1.2, scaling="matrix",
        projection="reverse_std", bias_correction=False,
    ),
    "soap": dict(b1=B1, b2=B2, eps=EPS, precondition_every=2, max_dim=3),
    "shampoo": dict(
        b1=B1, b2=B2, eps=0.1, exponent=0.3, trace_normalize=False, precondition_every=2, grafting="none", max_dim=3
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READY)
def test_a_ready_optimizer_is_its_direction_with_all_options(name, x64):
    """Rates, decay and mask: `p - lr (u + decay p)`, the decay of the leaves that the mask names."""
    options, mask = READY[name], {"w": True, "v": False}
    params = {"w": jnp.asarray(START), "v": jnp.asarray(START[::-1])}
    grads = {"w": jnp.asarray(GRADS), "v": jnp.asarray(GRADS[:, ::-1])}
    ready = getattr(o, name)(0.1, weight_decay=0.4, mask=mask, **options)
    kept = {k: v for k, v in options.items() if k != "wd_ratio"}
    direction = getattr(o, f"scale_by_{name}")(**kept)
    if "wd_ratio" in options:  # the decay of projected leaves is weaker
        decay = 0.4 / (1 - B1) if name == "sgdp" else 0.4
        inner = getattr(o, f"scale_by_{name}")(**kept | {"delta": 0.0})
        radial = dict(delta=1.2, channel_axis=0, eps=EPS)
        direction = o.project_out_radial(
            inner, ready=False, wd_ratio=0.5, weight_decay=decay, mask=mask, **radial
        )
        decays = optax.identity()
    else:
        decays = optax.add_decayed_weights(0.4, mask)

    def run(tx):
        return jax.jit(lambda p, g: descend(tx, p, lambda p, g: g, g)[0])(params, grads)

    expected = run(optax.chain(direction, decays, optax.scale(-0.1)))
    chex.assert_trees_all_close(run(ready), expected, rtol=1e-9)


# --- random directions -----------------------------------------------------------------------------------

KEY = jax.random.key(3)
HESSIAN = np.diag(np.arange(1.0, 13))
SPARSE = dict(distribution="rademacher", sparsity=0.4)


def quadratic(p):
    return jnp.ravel(p) @ HESSIAN @ jnp.ravel(p) / 2


def gradient_at(p):
    return (HESSIAN @ p.ravel()).reshape(SHAPE)


def test_second_values_of_random_directions(x64):
    start = jnp.asarray(START)
    z = np.asarray(o.random_direction(KEY, start, **SPARSE))
    assert set(np.unique(z)) == {-1.0, 0.0, 1.0}
    slope = np.vdot(gradient_at(START), z)
    bend = np.vdot(z, gradient_at(z))

    value, rho = o.zo_projection(quadratic, eps=0.1, **SPARSE)(start, KEY)
    near([value, rho], [quadratic(START) + 0.01 * bend / 2, slope])
    value, rho = o.zo_projection(quadratic, eps=0.1, differences="one_side", **SPARSE)(start, KEY)
    near([value, rho], [quadratic(START), slope + 0.1 * bend / 2])

    keys = jax.random.split(KEY, 3)
    zs = [np.asarray(o.random_direction(k, start, **SPARSE)) for k in keys]
    rhos = np.array([0.5, -1.0, 2.0])
    moved = o.shared_randomness_update(start, rhos, keys, 0.3, weight_decay=0.2, **SPARSE)
    near(moved, START * (1 - 0.06) - 0.1 * sum(r * z for r, z in zip(rhos, zs)))

    draws = [np.asarray(o.random_direction(k, start, distribution="rademacher")) for k in keys]
    value, grads = o.forward_gradient(quadratic, samples=3, distribution="rademacher")(start, KEY)
    near(grads, np.mean([np.vdot(gradient_at(START), z) * z for z in draws], 0))
    value, grads = o.zo_value_and_grad(quadratic, eps=0.1, samples=3, sign="scalar", **SPARSE)(start, KEY)
    near(grads, np.mean([np.sign(np.vdot(gradient_at(START), z)) * z for z in zs], 0))

    key = jax.random.split(jax.random.fold_in(KEY, 0), 1)[0]
    z = np.asarray(o.random_direction(key, start, **SPARSE))
    mezo = o.mezo(0.01, eps=0.1, differences="one_side", weight_decay=0.3, mask=False, **SPARSE)
    stepped, _, value = mezo.step(quadratic, start, mezo.init(KEY))
    rho = np.vdot(gradient_at(START), z) + 0.05 * np.vdot(z, gradient_at(z))
    near(stepped, START - 0.01 * rho * z)
    near(value, quadratic(START))


# --- functions -------------------------------------------------------------------------------------------


def one_conjugate_step(radius):
    """A single iteration: the gradient times `<g, g> / <g, (B + |g| / radius) g>`."""
    g = gradient_at(START)
    length = np.vdot(g, g) / (np.vdot(g, gradient_at(g)) + np.linalg.norm(g) / radius * np.vdot(g, g))
    return START - length * g


def hill(values):
    i = len(values) // 2
    return 1 + (len(values) - i) / np.sum(np.log(values[i:] / values[i]))


SPECTRA = [np.array([0.1, 0.2, 0.4, 1.0, 3.0]), np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 1.2, 1.3, 2, 9])]
MATRICES = [np.diag(np.sqrt(values)) for values in SPECTRA]
ALPHAS = np.array([hill(values) for values in SPECTRA])
LINEAR = 0.25 + (3 - 0.25) * (ALPHAS - ALPHAS.min()) / np.ptp(ALPHAS)
BALANCE = functools.partial(o.temp_balance_multipliers, MATRICES, low=0.25, high=3.0, min_eigenvalues=5)
PROGRESS = np.linspace(0, 1, 11)
CASES = {
    "gradient_regularized_newton_step, cg_steps": (
        lambda: o.gradient_regularized_newton_step(quadratic, jnp.asarray(START), 2.0, cg_steps=1)[0],
        one_conjugate_step(2.0),
    ),
    "hill_alpha, floor": (lambda: o.hill_alpha(MATRICES[0], floor=0.3), hill(SPECTRA[0][2:])),
    "hill_alpha, floor=0": (
        lambda: o.hill_alpha(np.diag([0.0, 1, 2, 3]), floor=0.0),
        hill(np.array([1.0, 4, 9])),
    ),
    "temp_balance_multipliers, linear": (lambda: BALANCE(mode="linear"), LINEAR),
    "temp_balance_multipliers, step": (
        lambda: BALANCE(mode="step"),
        np.array([0.25, 1.625, 3])[np.argsort(np.argsort(ALPHAS))],
    ),
    "temp_balance_multipliers, sqrt": (lambda: BALANCE(mode="sqrt"), ALPHAS**0.5 / np.mean(ALPHAS**0.5)),
    "temp_balance_multipliers, log2": (
        lambda: BALANCE(mode="log2"),
        np.log2(ALPHAS) / np.mean(np.log2(ALPHAS)),
    ),
    "stable_recurrent_weight": (
        lambda: o.stable_recurrent_weight(jnp.asarray(START), a=0.3, b=2.0),
        -1 / (0.3 * START**2 + 2),
    ),
    "onecycle_momentum_schedule": (
        lambda: o.onecycle_momentum_schedule(10, 0.9, 0.3, pct_start=0.2, pct_final=0.6)(10 * PROGRESS),
        np.interp(PROGRESS, [0, 0.2, 0.6], [0.9, 0.3, 0.9]),
    ),
    "power_law_loss": (
        lambda: o.power_law_loss(
            2e3, 3e4, params_scale=1e4, tokens_scale=5e5, params_exponent=0.3, tokens_exponent=0.7
        ),
        (5 ** (3 / 7) + 50 / 3) ** 0.7,
    ),
    "critical_batch_size": (
        lambda: o.critical_batch_size(2.0, scale=1e3, exponent=0.5, batch_size=500.0, steps=30.0, tokens=9e3),
        [250.0, 20.0, 3000.0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_second_values_of_a_function(name, x64):
    call, expected = CASES[name]
    near(call(), expected)
