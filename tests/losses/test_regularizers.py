"""Objectives on weights, embeddings, codes and activations: worked numbers, oracles, masks, derivatives, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import float64
from helpers import close, fails
from jax.test_util import check_grads

import jaxsoft
from jaxsoft import losses
from jaxsoft.losses import (
    domain_adversarial_loss,
    domain_adversarial_schedule,
    effective_entropy_loss,
    forward_forward_loss,
    generalized_gaussian_rate,
    generalized_gaussian_shape,
    gradient_reversal,
    infomax_code_loss,
    matrix_nuclear_norm,
    norm_loss,
    vq_commitment_loss,
)

RNG = np.random.default_rng(0)
E = RNG.normal(size=(2, 7, 3))  # two batches of seven vectors
KEEP = np.array([[True, False, True, True, True, False, True], [True] * 6 + [False]])
COTANGENT = np.array([0.7, -1.3])


def test_worked_numbers(x64):
    weight = jnp.array([[3.0, 4.0], [0.6, 0.8], [0.3, 0.4]])
    close(norm_loss(weight, axis=0), 16.25)
    w = jnp.array([0.5, -0.1, 0.0, 2.0])
    value, gradient = jax.value_and_grad(generalized_gaussian_rate)(w, shape=0.5)
    close(value, 2.437648)
    close(gradient, 0.5 * (np.abs(w) + 1e-8) ** -0.5 * np.sign(w), 1e-12)  # 0 at 0
    x = jnp.array([0.05, 0.2, 0.35, 0.7, 0.9])[:, None]
    close(effective_entropy_loss(x, spacing=1), -0.178384)
    hidden = jnp.array([[3.0, 0, 1], [4, 0, 2], [0, 1, 2]])
    close(matrix_nuclear_norm(hidden), 0.933288)
    close(vq_commitment_loss(jnp.array([0.5, -1]), jnp.array([0.3, -0.6])), 0.1 + 0.025)
    close(vq_commitment_loss(jnp.array([0.5, -1]), jnp.array([0.3, -0.6]), beta=0.0), 0.1)
    close(forward_forward_loss(jnp.array([1, 2, 0.5]), jnp.array([0.2, 0.1, 0.6])), 0.738762)
    strengths = domain_adversarial_schedule(jnp.array([0, 0.25, 0.5, 0.75, 1]))
    close(strengths, [0, 0.848284, 0.986614, 0.998894, 0.999909])


# --- weights ---------------------------------------------------------------------------------------------


def test_norm_loss(x64):
    kernel, conv = RNG.normal(size=(4, 3)), RNG.normal(size=(2, 2, 3, 5))
    params = {"a": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(3)}, "b": jnp.asarray(conv)}
    norms = [np.linalg.norm(k.reshape(-1, k.shape[-1]), axis=0) for k in (kernel, conv)]
    loss = jax.jit(norm_loss)
    close(loss(params), sum(((1 - n) ** 2).sum() for n in norms), 1e-12)
    close(norm_loss(params, target=2.0), sum(((2 - n) ** 2).sum() for n in norms), 1e-12)
    gradient = jax.jit(jax.grad(norm_loss))(params)
    close(gradient["a"]["kernel"], -2 * (1 - norms[0]) * kernel / norms[0], 1e-12)
    assert not jnp.any(gradient["a"]["bias"])
    check_grads(loss, (params,), 2, rtol=1e-5)
    stacked = jnp.stack([kernel, 2 * kernel])
    close(jax.vmap(norm_loss)(stacked), [norm_loss(k) for k in stacked], 1e-12)
    value, gradient = jax.value_and_grad(norm_loss)(jnp.zeros((3, 4)))
    assert value == 4 and not jnp.any(gradient)
    assert norm_loss(jnp.ones((2, 2), jnp.bfloat16)).dtype == jnp.float32


def test_generalized_gaussian(x64):
    from scipy.special import gamma

    shape = jax.jit(generalized_gaussian_shape)
    for s in (0.5, 1.0, 2.0, 4.0):
        # Weights of mean absolute value 1 and the distribution's mean square: three at 1 - d, one at 1 + 3 d.
        d = np.sqrt((gamma(1 / s) * gamma(3 / s) / gamma(2 / s) ** 2 - 1) / 3)
        weights = jnp.array([1 - d, 1 - d, 1 - d, 1 + 3 * d])
        close(shape({"a": weights, "b": -weights}), s, 1e-6)
    normal = jax.random.normal(jax.random.key(0), (100_000,))
    close(shape(normal), 2, 0.05)
    close(shape(jnp.sign(normal)), 10)
    close(generalized_gaussian_shape(jnp.zeros(3)), 10)
    close(generalized_gaussian_shape(jnp.zeros(3000).at[0].set(1.0)), 0.1, 0.02)
    w = jnp.asarray(RNG.normal(size=(3, 2)))
    s = float(generalized_gaussian_shape(w))
    value, gradient = jax.jit(jax.value_and_grad(generalized_gaussian_rate))(w)
    close(value, (np.abs(w) ** s).sum(), 1e-6)
    close(gradient, jax.grad(functools.partial(generalized_gaussian_rate, shape=s))(w), 1e-12)
    f = functools.partial(generalized_gaussian_rate, epsilon=1e-3)
    check_grads(jax.jit(lambda w, s: f({"a": w, "b": 2 * w}, shape=s)), (w, jnp.float64(0.7)), 2, rtol=1e-4)
    close(generalized_gaussian_rate(w, shape=2.0), (np.asarray(w) ** 2).sum(), 1e-6)
    assert generalized_gaussian_rate(w.astype(jnp.bfloat16)).dtype == jnp.float32


# --- embeddings and codes --------------------------------------------------------------------------------


def entropy_oracle(x, m, decorrelation=1.0):
    n = len(x)
    m = m or round(np.sqrt(n))
    total = 0.0
    for column in np.sort(x, axis=0).T:
        total += np.mean([np.log((n + 1) / m * max(column[i + m] - column[i], 1e-7)) for i in range(n - m)])
    covariance = np.atleast_2d(np.cov(x.T))
    return decorrelation * (np.sum(covariance**2) - np.sum(np.diag(covariance) ** 2)) - total


EMBEDDINGS = {
    "entropy": (effective_entropy_loss, lambda x: entropy_oracle(x, None)),
    "entropy2": (
        functools.partial(effective_entropy_loss, spacing=2, decorrelation=0.3),
        lambda x: entropy_oracle(x, 2, 0.3),
    ),
    "nuclear": (
        matrix_nuclear_norm,
        lambda x: np.linalg.norm(x / np.linalg.norm(x, axis=1, keepdims=True), axis=0).sum() / len(x),
    ),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_functions_of_embeddings(name, x64):
    loss, oracle = EMBEDDINGS[name]
    run = jax.jit(loss)
    values = run(E)
    close(values, [oracle(x) for x in E], 1e-12)
    close(jax.vmap(loss)(E), values, 1e-12)
    check_grads(jax.jit(lambda x: jnp.vdot(COTANGENT, loss(x))), (jnp.asarray(E),), 1, rtol=1e-6)
    # A mask, with NaN under it.
    f = jax.jit(jax.value_and_grad(lambda x: jnp.vdot(COTANGENT, loss(x, where=KEEP))))
    value, gradient = f(np.where(KEEP[..., None], E, np.nan))
    close(value, sum(c * oracle(x[k]) for c, x, k in zip(COTANGENT, E, KEEP)), 1e-12)
    _, expected = jax.value_and_grad(lambda x: COTANGENT[0] * loss(x))(jnp.asarray(E[0][KEEP[0]]))
    close(np.asarray(gradient)[0][KEEP[0]], expected, 1e-12)
    assert not np.any(np.asarray(gradient)[~KEEP])
    few = jax.jit(jax.value_and_grad(lambda x, keep: jnp.sum(loss(x, where=keep))))
    for some in ([], [2], [2, 4]):  # few vectors or none
        keep = np.isin(np.arange(7), some) & np.ones((2, 1), bool)
        value, gradient = few(np.where(keep[..., None], E, np.nan), keep)
        assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
        assert len(some) > (0 if name == "nuclear" else 1) or (value == 0 and not jnp.any(gradient))
    equal = jnp.ones((7, 3))
    at = jax.jit(jax.value_and_grad(loss))
    for value, gradient in (at(equal), at(0 * equal)):
        assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
    low = jnp.asarray(E, jnp.bfloat16)
    assert run(low).dtype == jnp.float32
    close(run(low), run(low.astype(jnp.float64)), 1e-5)


def test_matrix_nuclear_norm_takes_as_many_columns_as_there_are_rows(x64):
    x = RNG.normal(size=(2, 5))
    norms = np.linalg.norm(x / np.linalg.norm(x, axis=1, keepdims=True), axis=0)
    close(matrix_nuclear_norm(x), np.sort(norms)[-2:].sum() / 2, 1e-12)
    padded = np.concatenate([x, np.full((3, 5), np.nan)])
    close(matrix_nuclear_norm(padded, where=np.arange(5) < 2), np.sort(norms)[-2:].sum() / 2, 1e-12)


CODES, LABELS = RNG.normal(size=(8, 3, 4)) * 2, np.array([3, 5, 3, 5, 9, 9, 3, -100], np.int32)


def information_oracle(logits, labels, redundancy):
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = lambda p: -np.sum(p * np.log(p))
    groups = p.shape[1]
    total = 0.0
    for g in range(groups):
        within = sum((labels == y).mean() * entropy(p[labels == y, g].mean(0)) for y in np.unique(labels))
        total -= (entropy(p[:, g].mean(0)) - within) / groups
    for g in range(groups):
        for h in set(range(groups)) - {g}:
            joint = np.einsum("nk,nl->kl", p[:, g], p[:, h]) / len(p)
            shared = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
            total += redundancy * shared / (groups * (groups - 1))
    return total


def test_infomax_codes(x64):
    keep = LABELS >= 0
    for redundancy in (1.0, 0.0, 0.4):
        loss = jax.jit(functools.partial(infomax_code_loss, redundancy=redundancy))
        expected = information_oracle(CODES[keep], LABELS[keep], redundancy)
        close(loss(CODES, LABELS), expected, 1e-12)
    run = jax.jit(lambda x, y, **o: jax.value_and_grad(lambda x: infomax_code_loss(x, y, **o))(x))
    value, gradient = run(CODES, LABELS)
    check_grads(jax.jit(lambda x: infomax_code_loss(x, LABELS)), (jnp.asarray(CODES),), 1, rtol=1e-6)
    # An ignored example and a masked one, with NaN inside; masked codes; nothing at all.
    spoiled = jnp.asarray(CODES).at[7].set(jnp.nan)
    for labels, options in ((LABELS, {}), (np.maximum(LABELS, 0), dict(where=keep[:, None, None]))):
        other, g = run(spoiled, labels, **options)
        close(other, value, 1e-12)
        close(g, gradient, 1e-12)
    codes = np.arange(4) < 3
    part, g = run(spoiled.at[..., 3].set(jnp.nan), LABELS, where=codes)
    close(part, information_oracle(CODES[keep][..., :3], LABELS[keep], 1.0), 1e-12)
    assert jnp.all(jnp.isfinite(g)) and not jnp.any(g[..., 3])
    nothing, g = run(jnp.full_like(spoiled, jnp.nan), np.full_like(LABELS, -100))
    assert nothing == 0 and not jnp.any(g)
    # One class tells nothing; codes that are the labels tell all, and so do extreme logits.
    one = jax.jit(functools.partial(infomax_code_loss, redundancy=0.0))(CODES, np.zeros(8, np.int32))
    close(one, 0, 1e-12)
    perfect = jnp.where(jax.nn.one_hot(jnp.arange(8) % 4, 4) > 0, 1e4, -1e4)[:, None]
    best, g = run(perfect, np.arange(8) % 4)
    close(best, -np.log(4), 1e-12)
    assert jnp.all(jnp.isfinite(g))
    assert jax.eval_shape(infomax_code_loss, jnp.asarray(CODES, jnp.bfloat16), LABELS).dtype == jnp.float32
    with pytest.raises(TypeError, match=r"logits\.dense\(\)"):
        infomax_code_loss(jaxsoft.linear_logits(jnp.ones((8, 3, 2)), jnp.ones((2, 4))), LABELS)


# --- layers ----------------------------------------------------------------------------------------------


def test_vq_commitment(x64):
    z, c = RNG.normal(size=(2, 2, 3, 4))
    w = jnp.asarray(RNG.normal(size=(2, 3)))
    loss = jax.jit(vq_commitment_loss)
    close(loss(z, c), 1.25 * ((z - c) ** 2).mean(-1), 1e-12)
    gradients = jax.jit(
        jax.grad(lambda z, c: jnp.vdot(w, vq_commitment_loss(z, c, beta=0.5)), argnums=(0, 1))
    )(z, c)
    difference = 2 * (z - c) / 4 * np.asarray(w)[..., None]
    close(gradients[0], 0.5 * difference, 1e-12)
    close(gradients[1], -difference, 1e-12)
    keep = np.array([[True, False, True], [False, True, True]])
    spoiled = np.where(keep[..., None], z, np.nan)
    f = jax.jit(jax.value_and_grad(lambda z: jnp.vdot(w, vq_commitment_loss(z, spoiled + 1, where=keep))))
    value, g = f(spoiled)
    close(value, 1.25 * np.asarray(w)[keep].sum(), 1e-12)
    assert jnp.all(jnp.isfinite(g)) and not np.any(np.asarray(g)[~keep])
    close(jax.vmap(vq_commitment_loss)(z, c), loss(z, c), 1e-12)
    assert vq_commitment_loss(jnp.asarray(z, jnp.bfloat16), jnp.asarray(c, jnp.bfloat16)).dtype == jnp.float32


def test_forward_forward(x64):
    p, n = RNG.normal(size=(2, 3, 5))
    w = jnp.asarray(RNG.normal(size=3))
    goodness = lambda h: (h**2).mean(-1)
    expected = np.log1p(np.exp(0.7 - goodness(p))) + np.log1p(np.exp(goodness(n) - 0.7))
    loss = jax.jit(functools.partial(forward_forward_loss, threshold=0.7))
    close(loss(p, n), expected, 1e-12)
    close(forward_forward_loss(p.T, n.T, axis=0, threshold=0.7), expected, 1e-12)
    close(jax.vmap(functools.partial(forward_forward_loss, threshold=0.7))(p, n), expected, 1e-12)
    check_grads(jax.jit(lambda *a: jnp.vdot(w, loss(*a))), (jnp.asarray(p), jnp.asarray(n)), 2, rtol=1e-5)
    where = np.array([[True] * 4 + [False], [True] * 5, [False] * 5])
    run = jax.jit(jax.value_and_grad(lambda p, n: jnp.sum(loss(p, n, where=where)), argnums=(0, 1)))
    value, gradients = run(np.where(where, p, np.nan), np.where(where, n, np.inf))
    close(value, loss(p[:1, :4], n[:1, :4])[0] + expected[1], 1e-12)
    for g in gradients:
        assert jnp.all(jnp.isfinite(g)) and not np.any(np.asarray(g)[~where])
    assert loss(jnp.asarray(p, jnp.bfloat16), jnp.asarray(n, jnp.bfloat16)).dtype == jnp.float32
    value, g = jax.value_and_grad(lambda p: jnp.sum(loss(p, jnp.zeros(2))))(jnp.array([1e4, 1e4]))
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(g))


# --- domain adaptation -----------------------------------------------------------------------------------


def test_gradient_reversal():
    x = {"a": jnp.array([1.0, jnp.inf, -2.0]), "b": jnp.ones((2, 2), jnp.bfloat16)}
    same = jax.jit(gradient_reversal)(x)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(x)):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    y, back = jax.vjp(functools.partial(gradient_reversal, strength=0.3), x)
    (pulled,) = back(jax.tree.map(jnp.ones_like, y))
    close(pulled["a"], [-0.3] * 3)
    assert pulled["b"].dtype == jnp.bfloat16
    a = jnp.array([1.0, 2.0])
    value, tangent = jax.jvp(lambda a: gradient_reversal(a, 0.5) ** 2, (a,), (a,))
    close(value, a**2)
    close(tangent, -0.5 * 2 * a * a)

    def loss(a, strength):
        return jnp.sum(gradient_reversal(a, strength) ** 3)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(a, jnp.float32(2.0))
    close(gradients[0], -2 * 3 * a**2)
    assert gradients[1] == 0
    theirs = jax.grad(lambda a: jnp.sum(optax.scale_gradient(a, -2.0) ** 3))(a)
    close(gradients[0], theirs)
    mapped = jax.vmap(jax.grad(loss), (None, 0))(a, jnp.array([0.0, 1.0]))
    close(mapped, jnp.array([[0.0], [-1.0]]) * 3 * a**2)


def test_domain_adversarial_loss_is_a_reversed_cross_entropy():
    features, kernel = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((5, 3), (3, 2)))
    domains = jnp.array([0, 1, 1, 0, -100])
    spoiled = features.at[4].set(jnp.nan)
    w = jnp.asarray(RNG.normal(size=5), jnp.float32)

    def adversarial(features, kernel, stream):
        head = (
            (lambda h: jaxsoft.linear_logits(h, kernel)) if stream else (lambda h: h @ jnp.nan_to_num(kernel))
        )
        options = dict(discriminator=head, strength=0.4, weights=w)
        return jnp.sum(domain_adversarial_loss(features, domains, **options))

    def plain(features, kernel):
        return jnp.sum(losses.cross_entropy(features @ kernel, domains, weights=w))

    value, expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(features, kernel)
    for stream in (False, True):
        run = jax.jit(jax.value_and_grad(functools.partial(adversarial, stream=stream), argnums=(0, 1)))
        result, gradients = run(spoiled if stream else features, kernel)
        close(result, value)
        close(gradients[0], -0.4 * expected[0])
        close(gradients[1], expected[1])


def test_schedule():
    assert domain_adversarial_schedule(0) == 0
    close(domain_adversarial_schedule(0.5, rate=2.0), 2 / (1 + np.exp(-1)) - 1)
    with float64():
        assert domain_adversarial_schedule(jnp.float64(0.5)).dtype == jnp.float64


# --- bad input -------------------------------------------------------------------------------------------

F = np.ones((4, 3), np.float32)
BAD = [
    (norm_loss, (F,), dict(axis=2), ValueError, ["axis", "[-2, 2)", "(4, 3)", "2"]),
    (norm_loss, (F,), dict(axis=0.5), TypeError, ["axis", "integer", "0.5"]),
    (norm_loss, (F,), dict(target=-1.0), ValueError, ["target", ">= 0", "-1.0"]),
    (norm_loss, (F[0],), {}, ValueError, ["params", "two axes"]),
    (norm_loss, ({},), {}, ValueError, ["params", "at least one array", "{}"]),
    (norm_loss, ({"w": F.astype(int)},), {}, TypeError, ["params['w']", "floating", "int64"]),
    (generalized_gaussian_rate, (F,), dict(shape=0.0), ValueError, ["shape", "> 0", "0.0"]),
    (generalized_gaussian_rate, (F,), dict(shape="1"), TypeError, ["shape", "number", "'1'"]),
    (generalized_gaussian_rate, (F,), dict(epsilon=0.0), ValueError, ["epsilon", "> 0"]),
    (generalized_gaussian_shape, (3.0,), {}, TypeError, ["params", "floating", "3.0"]),
    (effective_entropy_loss, (F[0],), {}, ValueError, ["embeddings", "[*batch, n, features]", "(3,)"]),
    (effective_entropy_loss, (F,), dict(spacing=0), ValueError, ["spacing", ">= 1", "0"]),
    (effective_entropy_loss, (F,), dict(spacing=1.5), TypeError, ["spacing", "integer", "1.5"]),
    (effective_entropy_loss, (F,), dict(decorrelation=-1), ValueError, ["decorrelation", ">= 0"]),
    (effective_entropy_loss, (F,), dict(min_gap=0), ValueError, ["min_gap", "> 0"]),
    (effective_entropy_loss, (F,), dict(where=F > 0), ValueError, ["where", "(4,)", "(4, 3)"]),
    (effective_entropy_loss, (F,), dict(where=F[:, 0]), TypeError, ["where", "boolean", "float32"]),
    (infomax_code_loss, (F, np.zeros(4, int)), {}, ValueError, ["logits", "[n, groups, codes]", "(4, 3)"]),
    (infomax_code_loss, (F[None], np.zeros(4, int)), {}, ValueError, ["labels", "(1,)", "(4,)"]),
    (infomax_code_loss, (F[None], np.zeros(1)), {}, TypeError, ["labels", "integer", "float64"]),
    (infomax_code_loss, (F[None], np.zeros(1, int)), dict(redundancy=-1), ValueError, ["redundancy", ">= 0"]),
    (matrix_nuclear_norm, (F.astype(int),), {}, TypeError, ["hidden", "floating", "int64"]),
    (vq_commitment_loss, (F, F[:2]), {}, ValueError, ["codes", "(4, 3)", "(2, 3)"]),
    (vq_commitment_loss, (F, F), dict(beta=-1.0), ValueError, ["beta", ">= 0", "-1.0"]),
    (vq_commitment_loss, (F, F), dict(where=F > 0), ValueError, ["where", "(4,)", "(4, 3)"]),
    (vq_commitment_loss, (F[0, 0], F[0, 0]), {}, ValueError, ["inputs", "scalar"]),
    (forward_forward_loss, (F, F[:2]), {}, ValueError, ["negative", "(4, 3)", "(2, 3)"]),
    (forward_forward_loss, (F, F), dict(threshold=None), TypeError, ["threshold", "number", "None"]),
    (forward_forward_loss, (F, F), dict(axis=3), ValueError, ["axis", "[-2, 2)", "3"]),
    (gradient_reversal, (F,), dict(strength="1"), TypeError, ["strength", "number", "'1'"]),
    (gradient_reversal, ({"h": F.astype(int)},), {}, TypeError, ["x['h']", "floating", "int64"]),
    (domain_adversarial_schedule, (0.5,), dict(rate=None), TypeError, ["rate", "number", "None"]),
    (domain_adversarial_loss, (F, np.zeros(4, int)), dict(discriminator=F), TypeError, ["discriminator", "function"]),
]  # fmt: skip


@pytest.mark.parametrize("function, args, options, kind, words", BAD)
def test_bad_input(function, args, options, kind, words):
    fails(words, kind, lambda: function(*args, **options))
