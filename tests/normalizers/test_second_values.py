"""Options at a second value, one off the default or on another branch, against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import near, sigmoid, softmax

import jaxsoft
from jaxsoft import normalizers

pytestmark = pytest.mark.whole  # the cases are normalizers

RNG = np.random.default_rng(0)
N, C = 3, 4
X = np.array([[2.0, -1.0, 0.5, 0.0], [-3.0, 1.0, 2.5, 2.0], [0.1, 0.2, 0.3, -0.4]])
P = softmax(X)
ENTROPY = -np.sum(P * np.log(P), 1)  # 0.83, 0.96, 1.34
BANK, OTHER = RNG.normal(size=(2, 5, C))
KEEP = RNG.random((5, C)) < 0.7
KEEP[0] = True
HUGE = 3e3 * X


def ratio(a, eps=0.0):
    return a / (a.sum(-1, keepdims=True) + eps)


def tempered(beta, x=X):
    return softmax(np.asarray(beta)[..., None] * x)


def adaptive(coefficients, threshold):
    beta = np.polyval(coefficients, ENTROPY)
    return tempered(np.where((threshold < ENTROPY) & (beta > 1), beta, 1))


def softplus(x):
    return np.logaddexp(0, x)


def reweighted(scale, power, offset, eps):
    a = ratio(softplus(scale * np.log(C) * X), eps)
    return ratio(np.maximum(C * a - offset, 0) ** power)


def inverted(bank, beta, keep=None, s=X):
    scores = np.where(True if keep is None else keep, np.exp(beta * bank), 0)
    return beta * s - np.log(scores.sum(0))


def is_active(bank, k, keep):
    """Whether the best item of a query is among the k best of any item of the bank."""
    hubs = set()
    for row, kept in zip(bank, keep):
        hubs |= set([j for j in np.argsort(-row) if kept[j]][:k])
    return np.array([[np.argmax(s) in hubs] for s in X])


def dual(k, log, floor=0.05):
    out = []
    for bank, beta, keep in ((BANK, 0.7, KEEP), (OTHER, 1.5, np.ones_like(KEEP))):
        factor = inverted(bank, beta, keep)
        factor, raw = (factor, np.log(np.maximum(X, floor))) if log else (np.exp(factor), X)
        out.append(np.where(is_active(bank, k, keep), factor, raw))
    return out[0] + out[1] if log else out[0] * out[1]


def top(k):
    mask = np.zeros(X.shape, bool)
    np.put_along_axis(mask, np.argsort(-X, 1)[:, :k], True, 1)
    return mask


def windows(x, width, stride):
    starts = range(0, x.shape[-1] - width + 1, stride)
    return np.stack([x[..., i : i + width] for i in starts], -2)


def taylor(x, order):
    return sum(x**i / np.prod(np.arange(1, i + 1)) for i in range(order + 1))


F = normalizers
DUAL = dict(query_beta=0.7, gallery_beta=1.5, dynamic=True, query_bank_where=KEEP)
CASES = {
    "softmax_n, n=0": (lambda: F.softmax_n(X, n=0.0), P),
    "sink_softmax, low": (lambda: F.sink_softmax(X, sink=-1e4), P),
    "sink_softmax, high": (lambda: F.sink_softmax(HUGE, sink=1e4), np.exp(HUGE - 1e4)),
    "scalable_softmax, scale=0": (lambda: F.scalable_softmax(X, scale=0.0, bias=0.7), softmax(0.7 * X)),
    "scalable_softmax, both": (
        lambda: F.scalable_softmax(X, scale=-0.2, bias=1.5),
        softmax((1.5 - 0.2 * np.log(C)) * X),
    ),
    "scalable_softmax, negative": (
        lambda: F.scalable_softmax(HUGE, scale=-0.43),
        softmax(-0.43 * np.log(C) * HUGE),
    ),
    "scalable_softmax, rows": (
        lambda: F.scalable_softmax(HUGE, scale=np.array([-0.01, 0.0, 0.01])),
        softmax(np.array([[-0.01], [0.0], [0.01]]) * np.log(C) * HUGE),
    ),
    "adaptive_temperature_softmax, threshold": (
        lambda: F.adaptive_temperature_softmax(X, threshold=0.9),
        adaptive((-0.037, 0.481, -2.3, 4.917, -1.791), 0.9),
    ),
    "adaptive_temperature_softmax, high": (lambda: F.adaptive_temperature_softmax(X, threshold=2.0), P),
    "adaptive_temperature_softmax, coefficients": (
        lambda: F.adaptive_temperature_softmax(X, threshold=-1.0, coefficients=(2.0, -0.9)),
        adaptive((2.0, -0.9), -1.0),
    ),
    "clipped_softmax, zeta=1": (lambda: F.clipped_softmax(X, zeta=1.0, gamma=0.0), P),
    "clipped_softmax, both": (
        lambda: F.clipped_softmax(X, zeta=1.4, gamma=-0.2),
        np.clip(1.6 * P - 0.2, 0, 1),
    ),
    "self_adjust_softmax, plain": (lambda: F.self_adjust_softmax(X, normalized=False), X * P),
    "softpick, eps": (
        lambda: F.softpick(X, eps=0.5),
        np.maximum(np.expm1(X), 0)
        / (np.abs(np.expm1(X)).sum(1) + 0.5 * np.exp(np.maximum(X.max(1), 0)))[:, None],
    ),
    "stablemax": (lambda: F.stablemax(X), ratio(np.where(X < 0, 1 / (1 - np.minimum(X, 0)), X + 1))),
    "taylor_softmax, order": (lambda: F.taylor_softmax(X, order=6), ratio(taylor(X, 6))),
    "sigmoid_weights, bias=0": (lambda: F.sigmoid_weights(X, bias=0.0), sigmoid(X)),
    "sigmoid_weights, bias": (lambda: F.sigmoid_weights(X, bias=0.7), sigmoid(X + 0.7)),
    "relu_weights, power": (lambda: F.relu_weights(X, power=1.5), np.maximum(X, 0) ** 1.5 / C),
    "relu_weights, power=2": (lambda: F.relu_weights(X, power=2), np.maximum(X, 0) ** 2 / C),
    "softplus_attention_weights, eps": (
        lambda: F.softplus_attention_weights(X, scale=-0.4, eps=0.5),
        ratio(softplus(-0.4 * np.log(C) * X), 0.5),
    ),
    "reweighted_attention_weights, eps": (
        lambda: F.reweighted_attention_weights(X, scale=0.8, power=2.0, offset=0.2, eps=0.5),
        reweighted(0.8, 2.0, 0.2, 0.5),
    ),
    "reweighted_attention_weights, defaults": (
        lambda: F.reweighted_attention_weights(X, scale=0.8, eps=0.0),
        reweighted(0.8, 15.0, 1.0, 0.0),
    ),
    "mpc_softmax, eps": (
        lambda: F.mpc_softmax(X, eps=0.5),
        ratio((1 + (X - X.max(1, keepdims=True) - 0.5) / 32) ** 32),
    ),
    "sparse_softmax, k=1": (lambda: F.sparse_softmax(X, k=1), top(1)),
    "sparse_softmax, k": (lambda: F.sparse_softmax(X, k=2), ratio(top(2) * np.exp(X))),
    "sparse_softmax, all": (lambda: F.sparse_softmax(X, k=C), P),
    "quantized_softmax, one bit": (lambda: F.quantized_softmax(X, bits=1, bias=0.2), np.round(P) + 0.2),
    "quantized_softmax, bits": (lambda: F.quantized_softmax(X, bits=3), np.round(P * 7) / 7),
    "masked_logit_softmax, a number": (
        lambda: F.masked_logit_softmax(X, X > 0, masked_logit=0.3),
        softmax(np.where(X > 0, X, 0.3)),
    ),
    "unit_scaled_softmax": (
        lambda: F.unit_scaled_softmax(X, multiplier=0.5),
        softmax(0.5 * X) * C ** (1 - 0.5 / (1 + 4 / 0.5**2)),
    ),
    "sdm_activation": (lambda: F.sdm_activation(X, 3, 0.4), softmax(X * 0.4 * np.log(5))),
    "sdm_activation, neutral": (lambda: F.sdm_activation(X, 0, 1.0), softmax(X * np.log(2))),
    "inverted_softmax": (
        lambda: F.inverted_softmax(X, BANK.T, beta=0.7, bank_axis=1, bank_where=KEEP.T),
        inverted(BANK, 0.7, KEEP),
    ),
    "inverted_softmax, exponentials": (
        lambda: F.inverted_softmax(X, BANK, beta=0.7, log=False),
        np.exp(inverted(BANK, 0.7)),
    ),
    "dual_inverted_softmax, k and log": (
        lambda: F.dual_inverted_softmax(X, BANK, OTHER, k=2, floor=0.05, **DUAL),
        dual(2, log=True),
    ),
    "dual_inverted_softmax, products": (
        lambda: F.dual_inverted_softmax(X, BANK, OTHER, log=False, **DUAL),
        dual(1, log=False),
    ),
    "dual_inverted_softmax, gallery_bank_where and bank_axis": (
        lambda: F.dual_inverted_softmax(
            X, OTHER.T, BANK.T, query_beta=1.5, gallery_beta=0.7, gallery_bank_where=KEEP.T, bank_axis=1
        ),
        inverted(OTHER, 1.5) + inverted(BANK, 0.7, KEEP),
    ),
    "top_k_gate, not renormalized": (lambda: F.top_k_gate(X, 2, renormalize=False), top(2) * P),
    "top_k_gate, k=1": (lambda: F.top_k_gate(X, 1), top(1)),
    "drop_weak_experts, threshold": (
        lambda: F.drop_weak_experts(P, threshold=0.4),
        ratio(np.where(0.4 * P.max(1, keepdims=True) > P, 0, P)),
    ),
    "drop_weak_experts, threshold=0": (lambda: F.drop_weak_experts(P, threshold=0.0), P),
    "drop_weak_experts, threshold=1": (lambda: F.drop_weak_experts(P, threshold=1.0), top(1)),
    "dense_to_sparse_gate, temperature": (
        lambda: F.dense_to_sparse_gate(X, BANK[:C, :3], temperature=0.3),
        softmax(X @ BANK[:C, :3] / 0.3),
    ),
    "soft_pool, stride and clamp_min": (
        lambda: F.soft_pool(X, 2, axes=-1, stride=1, clamp_min=0.3),
        np.maximum(np.sum(softmax(windows(X, 2, 1)) * windows(X, 2, 1), -1), 0.3),
    ),
    "soft_moe_dispatch_combine, scale": (
        lambda: F.soft_moe_dispatch_combine(X, BANK[:C, :2], scale=2.5).combine,
        softmax(
            2.5
            * (X / np.sqrt(np.sum(X * X, 1, keepdims=True) + 1e-6))
            @ (BANK[:C, :2] / np.sqrt(np.sum(BANK[:C, :2] ** 2, 0) + 1e-6))
        ),
    ),
    "gumbel_softmax_interpolant": (
        lambda: (
            F.gumbel_softmax_interpolant(
                jnp.array([1, 0, 3]), 0.4, X, beta=0.5, max_temperature=3.0, decay=0.0
            ).point
        ),
        softmax((np.eye(C)[[1, 0, 3]] + X / 0.5) / 3),
    ),
    "gumbel_sigmoid, no noise": (lambda: F.gumbel_sigmoid(X, key=None, temperature=0.3), sigmoid(X / 0.3)),
    "gumbel_softmax_gate, no noise": (
        lambda: F.gumbel_softmax_gate(X, key=None, temperature=0.3),
        softmax(X / 0.3),
    ),
    "logsumexp, weights": (
        lambda: jaxsoft.logsumexp(X, weights=np.arange(4.0)),
        np.log(np.exp(X) @ np.arange(4)),
    ),
    "softcap": (lambda: jaxsoft.softcap(X, 0.7), 0.7 * np.tanh(X / 0.7)),
}


@pytest.mark.parametrize("name", CASES)
def test_second_values(name, x64):
    call, expected = CASES[name]
    near(call(), expected, 1e-9)


def test_a_stopped_temperature_gives_the_gradient_of_a_fixed_one(x64):
    beta = np.polyval((2.0, -0.9), ENTROPY)[:, None]
    g = jnp.asarray(RNG.normal(size=X.shape))
    options = dict(threshold=0.0, coefficients=(2.0, -0.9), stop_gradient=True)
    f = lambda x: jnp.vdot(g, normalizers.adaptive_temperature_softmax(x, **options))
    p = tempered(np.maximum(beta[:, 0], 1))
    scale = np.maximum(beta, 1)
    near(jax.grad(f)(jnp.asarray(X)), scale * p * (g - np.sum(p * g, 1, keepdims=True)), 1e-9)
