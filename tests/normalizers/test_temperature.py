"""The temperature network, noisy logits, and the bias of quantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close, sigmoid
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.normalizers.quantized import quantized_softmax_bias_correction
from jaxsoft.normalizers.temperature import noisy_logits, temperature_network

KEY = jax.random.key(11)
X = np.random.default_rng(0).normal(size=(4, 5))
forms = pytest.mark.parametrize("form", ["llm", "clip"])


def network_by_hand(form, p, x):
    """The two published networks, line by line."""
    p = jax.tree.map(np.asarray, p)
    if form == "llm":
        h = sigmoid(x / np.linalg.norm(x, axis=-1, keepdims=True) @ p.weight + p.bias)
        u = h @ p.prototypes + p.prototype_bias
        value, low, high = u, 0.5, 5.0
    else:
        h = sigmoid(x @ p.weight + p.bias)
        u = h @ (p.prototypes / np.linalg.norm(p.prototypes, axis=0))
        value, low, high = sigmoid(u), 0.005, 0.05
    w = np.exp(u / np.exp(p.log_scale))
    w /= w.sum(-1, keepdims=True)
    a = ((w - 1 / w.shape[-1]) * value) @ p.output_weight + p.output_bias
    return (high - low) * sigmoid(a) + low


def perturbed(params):
    """The initial output layer and scale are constants; other numbers test more."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda a: a + 0.3 * jnp.asarray(rng.normal(size=a.shape), a.dtype), params)


@forms
def test_network(form, x64):
    network = temperature_network(form, hidden=6)
    params = network.init(KEY, 5, jnp.float64)
    x = jnp.asarray(X)
    close(jax.jit(network.apply)(params, x), network_by_hand(form, params, X), 1e-13)
    params = perturbed(params)
    tau = network.apply(params, x)
    close(tau, network_by_hand(form, params, X), 1e-13)
    assert tau.shape == (4,) and float(np.ptp(tau)) > 0
    close(jax.vmap(lambda x: network.apply(params, x))(x), tau, 1e-13)
    check_grads(jax.jit(network.apply), (params, x), 1, rtol=1e-4, eps=1e-6)


def test_initial_parameters():
    llm = temperature_network(hidden=64).init(KEY, 10)
    clip = temperature_network("clip", hidden=64).init(KEY, 10)
    assert float(llm.log_scale) == 0 and abs(float(clip.log_scale) - np.log(0.01)) < 1e-6
    assert clip.prototype_bias is None and llm.prototype_bias.shape == (64,)
    for p in (llm, clip):
        assert np.all(p.output_weight == 1) and p.output_bias == 0
        assert 0.9 * 10**-0.5 < np.abs(p.weight).max() <= 10**-0.5
    assert np.abs(llm.prototypes).max() <= 1 / 8 < 0.9 < np.std(clip.prototypes) < 1.1


@forms
def test_network_range_dropout_and_dtypes(form):
    network = temperature_network(form, hidden=8, min_temperature=0.1, max_temperature=0.4)
    params = perturbed(network.init(KEY, 5))
    x = jnp.asarray(X, jnp.float32)
    tau = network.apply(params._replace(output_bias=jnp.array(100.0)), x)
    close(tau, 0.4)
    close(network.apply(params._replace(output_bias=jnp.array(-100.0)), x), 0.1)
    a, b = (network.apply(params, x, key=k) for k in jax.random.split(KEY))
    assert np.all((a >= 0.1) & (a <= 0.4)) and np.any(a != b) and np.any(a != network.apply(params, x))
    still = temperature_network(form, hidden=8, min_temperature=0.1, max_temperature=0.4, dropout=0.0)
    close(still.apply(params, x, key=KEY), network.apply(params, x), 1e-7)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, x))
    y = network.apply(*low)
    assert y.dtype == jnp.float32
    close(y, network.apply(*jax.tree.map(lambda p: p.astype(jnp.float32), low)), 1e-6)


@forms
def test_network_absent_entries(form):
    network = temperature_network(form, hidden=6)
    params = perturbed(network.init(KEY, 5))
    x = jnp.asarray(X, jnp.float32)
    where = jnp.ones((4, 5), bool).at[0, 2].set(False).at[1].set(False)
    dirty = jnp.where(where, x, jnp.nan).at[2, 3].set(-jnp.inf)

    def f(params, x, where):
        tau = network.apply(params, x, where=where)
        return jnp.vdot(tau, jnp.arange(1.0, 5.0)), tau

    (_, tau), (dp, dx) = jax.value_and_grad(f, (0, 1), has_aux=True)(params, dirty, where)
    zeros = jnp.where(where, x, 0).at[2, 3].set(0)
    close(tau, network.apply(params, zeros), 1e-7)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves((tau, dp, dx)))
    assert not np.any(dx[1]) and dx[0, 2] == 0 and dx[2, 3] == 0 and np.any(dx[3] != 0)


def test_noisy_logits_number(x64):
    # W = [3, 4], x = [1, 1], |xi| = .8: 7 becomes 6.982021; a key draws another xi, so it is divided out
    xi = float(jax.random.normal(KEY, (1,), jnp.float64)[0])
    z = noisy_logits(
        jnp.array([[7.0, 1.0]]),
        jnp.array([0]),
        feature_norms=jnp.array([2**0.5]),
        weight_norms=jnp.array([5.0, 9.0]),
        key=KEY,
        alpha=0.1**0.5,
    )
    close((7 - z[0, 0]) / abs(xi) * 0.8, 7 - 6.982021)
    close(z[0, 1], 1, 0)


def noisy(x, f, w, alpha=0.3, labels=(1, 0, -100, 4), **options):
    return noisy_logits(
        x, jnp.array(labels), feature_norms=f, weight_norms=w, key=KEY, alpha=alpha, **options
    )


def test_noisy_logits(x64):
    rng = np.random.default_rng(1)
    x, f, w = jnp.asarray(X), jnp.asarray(np.exp(rng.normal(size=4))), jnp.asarray(np.exp(rng.normal(size=5)))
    xi = np.abs(jax.random.normal(KEY, (4,), jnp.float64))
    expected = X.copy()
    for i, y in ((0, 1), (1, 0), (3, 4)):
        expected[i, y] -= 0.3 * xi[i] * (w[y] * f[i] - X[i, y])
    close(jax.jit(noisy)(x, f, w), expected, 1e-14)
    close(noisy(x.T, f, w, axis=0).T, expected, 1e-14)
    check_grads(noisy, (x, f, w, 0.3), 1)
    g = jax.grad(lambda *a: (noisy(*a, stop_noise_gradient=True) * x).sum(), (0, 1, 2))(x, f, w)
    close(g[0], x, 1e-15)
    close(jnp.concatenate(g[1:]), 0, 0)
    still = noisy_logits(x, jnp.array([1, 0, -100, 4]), feature_norms=f, weight_norms=w, key=None)
    close(still, x, 0)


def test_noisy_logits_bad_ids_absent_labels_and_dtypes():
    x, f, w = (
        jnp.asarray(X, jnp.float32).at[1, 0].set(-jnp.inf).at[0, 3].set(jnp.nan),
        jnp.ones(4),
        jnp.ones(5),
    )
    z = noisy(x, f, w)
    assert jnp.isneginf(z[1, 0]) and jnp.isnan(z[0, 3]) and jnp.isfinite(z).sum() == 18
    z, g = jax.value_and_grad(lambda x: noisy(x, f, w, labels=(1, 5, -100, 4))[1:].sum(axis=1)[0])(x)
    assert jnp.isnan(z) and jnp.all(jnp.isnan(g[1])) and jnp.all(g[2:] == 0)
    assert noisy(x.astype(jnp.bfloat16), f, w).dtype == jnp.bfloat16
    loss = jaxsoft.losses.cross_entropy(
        noisy(jnp.asarray(X, jnp.float32), f * 9, w), jnp.array([1, 0, -100, 4])
    )
    plain = jaxsoft.losses.cross_entropy(jnp.asarray(X, jnp.float32), jnp.array([1, 0, -100, 4]))
    assert loss[2] == 0 and jnp.all(loss[jnp.array([0, 1, 3])] > plain[jnp.array([0, 1, 3])])


def test_quantized_softmax_bias_correction():
    with float64():
        p = jaxsoft.softmax(jnp.array([1.0, 2.0, -1.0, 0.5]))
        close(quantized_softmax_bias_correction(p, 4), 0.016667)
        row = jaxsoft.softmax(jnp.array([4.0] + [0.0] * 63))
        close(row[:2], [0.464277, 0.008504])
        beta = quantized_softmax_bias_correction(row, 4)
        close(beta, 0.008333)
        q = jnp.round(row * 15) / 15
        close((q + beta).sum(), 1, 1e-12)  # the sum is restored
        z = np.linspace(0, 6, 64)
        rows = jaxsoft.softmax(jnp.asarray([z, z[::-1] / 2, np.sin(z)]))
        close(quantized_softmax_bias_correction(rows, 8), 1.633987e-4, 1e-9)
        per_row = quantized_softmax_bias_correction(rows, 8, axis=-1)
        close((1 - np.array([0.984314, 1.003922, 0.980392])) / 64, per_row, 1e-7)
        close(jax.jit(quantized_softmax_bias_correction, static_argnums=1)(rows, 8), per_row.mean(), 1e-15)


def test_quantized_softmax_bias_correction_absent_entries_and_dtypes():
    p = jaxsoft.softmax(jnp.asarray(X, jnp.float32))
    where = jnp.ones(p.shape, bool).at[0, 1].set(False).at[2].set(False)
    dirty = jnp.where(where, p, jnp.nan)
    kept = np.asarray(p)[np.asarray(where)]
    close(quantized_softmax_bias_correction(dirty, 3, where), (kept - np.round(kept * 7) / 7).mean(), 1e-7)
    assert quantized_softmax_bias_correction(dirty, 3, where, axis=-1)[2] == 0
    assert quantized_softmax_bias_correction(p.astype(jnp.bfloat16), 8).dtype == jnp.float32
    close(jax.grad(lambda p: quantized_softmax_bias_correction(p, 3))(p), 0, 0)  # a constant


LAZY = jaxsoft.linear_logits(np.ones((2, 3), np.float32), np.ones((3, 4), np.float32))
NETWORK = temperature_network(hidden=4)
ONES = jnp.ones(5)
BAD = [
    (lambda: temperature_network("vlm"), ValueError, "form must be one of 'llm', 'clip'"),
    (lambda: temperature_network(hidden=0), ValueError, "hidden must be a static integer >= 1"),
    (lambda: temperature_network(min_temperature=0.0), ValueError, "min_temperature must be a number > 0"),
    (lambda: temperature_network(max_temperature=0.1), ValueError, "max_temperature must be a number >= 0.5"),
    (lambda: temperature_network(dropout=1.0), ValueError, "dropout must be a number >= 0 and < 1"),
    (
        lambda: NETWORK.apply(NETWORK.init(KEY, 3), ONES),
        ValueError,
        r"inputs must have shape \[\*rows, 3\]",
    ),
    (lambda: NETWORK.apply(NETWORK.init(KEY, 4), LAZY), TypeError, r"dense\(\)"),
    (lambda: noisy(jnp.ones((4, 5)), jnp.ones(3), ONES), ValueError, r"feature_norms must have shape \(4,\)"),
    (
        lambda: noisy(jnp.ones((4, 5)), jnp.ones(4), jnp.ones(4)),
        ValueError,
        r"weight_norms must have shape \(5,\)",
    ),
    (
        lambda: noisy(jnp.ones((4, 5)), jnp.ones(4), ONES, alpha=-1.0),
        ValueError,
        "alpha must be a number >= 0",
    ),
    (
        lambda: noisy(jnp.ones((4, 5)), jnp.ones(4), ONES, labels=(0.5,) * 4),
        TypeError,
        "labels must be class ids",
    ),
    (lambda: noisy(LAZY, jnp.ones(4), ONES), TypeError, r"dense\(\)"),
    (
        lambda: quantized_softmax_bias_correction(ONES, 0),
        ValueError,
        "bits must be a static integer >= 1 and <= 16",
    ),
    (
        lambda: quantized_softmax_bias_correction(jnp.ones(3, int), 8),
        TypeError,
        "probabilities must be an array of floating",
    ),
    (
        lambda: quantized_softmax_bias_correction(ONES, 8, jnp.ones(3, bool)),
        ValueError,
        "where must broadcast",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
