"""Ensembles, pairs of answers and mixtures: the specs' numbers, definitions, impossible classes, errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close, fails, near, softmax

import jaxsoft
from jaxsoft import calibration

KINDS = ("member", "average", "expectation")
P = np.array([[0.9, 0.1], [0.6, 0.4]])
JOINT = np.array([[0.30, 0.08, 0.02], [0.08, 0.30, 0.04], [0.02, 0.04, 0.12]])


def test_nine_measures(x64):
    f = jax.jit(
        lambda x: [
            calibration.predictive_uncertainty(x, prediction=a, truth=b)
            for a, b in itertools.product(KINDS, KINDS)
        ]
    )
    got = f(np.log(P))
    totals = [0.551372, 0.397543, 0.438228, 0.612192, 0.562335, 0.633429, 0.612192, 0.562335, 0.633429]
    close([u.total for u in got], totals, 5e-7)
    close([u.aleatoric for u in got], np.repeat([0.325083, 0.562335, 0.499047], 3), 5e-7)
    near([u.epistemic for u in got], [max(u.total - u.aleatoric, 0) for u in got], 1e-12)
    close([got[7].epistemic, got[5].epistemic, got[8].epistemic], [0.063288, 0.071094, 0.134382], 5e-7)

    x = np.random.default_rng(0).normal(size=(2, 5, 4))
    mi, kl = jax.jit(lambda x: (calibration.mutual_information(x), calibration.expected_pairwise_kl(x)))(x)
    p = softmax(x)
    near(kl, (p[:, :, None] * np.log(p[:, :, None] / p[:, None])).sum(-1).mean((1, 2)), 1e-12)
    entropy = lambda p: -(p * np.log(p)).sum(-1)
    near(mi, entropy(p.mean(1)) - entropy(p).mean(1), 1e-12)


def test_impossible_classes():
    sure = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])
    f = jax.jit(
        lambda x: (
            jax.value_and_grad(calibration.mutual_information)(x),
            calibration.expected_pairwise_kl(x),
            calibration.mutual_information(x[:1]),
        )
    )
    (information, gradient), kl, alone = f(sure)
    near(information, np.log(2), 1e-6)
    assert kl == np.inf and alone == 0 and np.all(np.isfinite(gradient))


def test_t_similarity(x64):
    """Three heads: the mean over ordered pairs."""
    x = np.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2], [1, 1, 0, 0, 0]])
    each, total = jax.jit(
        lambda x: (calibration.t_similarity(x, per_class=True), calibration.t_similarity(x))
    )(x)
    close(total, 0.239614, 5e-7)
    close(each, [0.099961, 0.109944, 0.008863, 0.013201, 0.007646], 5e-7)
    p = softmax(x)
    near(total, np.mean([p[i] @ p[j] for i, j in itertools.permutations(range(3), 2)]), 1e-12)


def test_mixtures(x64):
    g, h = np.array([4.0, 1.0, 0.0]), np.array([0.2, 0.5, 0.1])
    mix = jax.jit(calibration.mix_probabilities)
    close(mix(g, h, weight=0.5), [-0.475227, -1.466736, -1.913393], 5e-7)
    near(mix(g, h, weight=0.0), np.log(softmax(g)), 1e-12)
    near(mix(g, h, weight=1.0), np.log(softmax(h)), 1e-12)
    # Per row, along another axis, with masked and impossible classes; finite gradients
    x = np.array([[4.0, 1.0, np.nan, -np.inf], [300.0, 0.0, -300.0, 2.0]])
    y = np.array([[0.2, -np.inf, np.nan, -np.inf], [0.0, 1.0, 2.0, 3.0]])
    where = np.array([[True, True, False, True], [True] * 4])
    a = np.array([0.25, 0.0])

    def f(x, y, a):
        mixed = calibration.mix_probabilities(x.T, y.T, weight=a, axis=0, where=jnp.asarray(where.T)).T
        return jnp.sum(jnp.where(jnp.isfinite(mixed), mixed, 0) * jnp.arange(1.0, 5)), mixed

    gradients, mixed = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(x, y, a)
    p, q = softmax(np.where(where, x, -np.inf)), softmax(np.where(where, y, -np.inf))
    near(np.exp(mixed), (1 - a[:, None]) * p + a[:, None] * q, 1e-12)
    near(mixed[1], [0, -300, -600, -298], 1e-12)  # no underflow
    assert all(np.all(np.isfinite(d)) for d in gradients)


def test_pairs(x64):
    first = JOINT.sum(1)
    given = JOINT / first[:, None]

    @jax.jit
    def f(first, given):
        again = jnp.diagonal(given)
        return (
            calibration.pair_covariance(first, given),
            calibration.cheat_corrected_variance(first, again),
            calibration.cheat_corrected_confidence(first, again),
        )

    covariance, variance, confidence = f(np.log(first), np.log(given))
    close(variance, [0.14, 0.1236, 0.0876], 1e-12)
    close(confidence, [0.533333, 0.588, 0.27], 5e-7)
    close(np.sqrt(variance / 0.1), [1.183216, 1.111755, 0.935949], 5e-7)
    near(covariance, JOINT - np.outer(first, JOINT.sum(0)), 1e-12)
    near(np.diagonal(covariance), variance, 1e-12)

    # An impossible first answer, whatever follows; a model that is not calibrated
    first = jnp.array([-jnp.inf, 0.0])
    again = jnp.array([jnp.nan, -0.5])
    near(calibration.cheat_corrected_confidence(first, again), [0, np.exp(0.5)], 1e-12)
    near(calibration.cheat_corrected_confidence(first, again, clip=True), [0, 1], 1e-12)
    near(calibration.cheat_corrected_variance(first, again), [0, np.exp(-0.5) - 1], 1e-12)
    rows = jnp.array([[jnp.nan, jnp.nan], [-0.5, np.log(1 - np.exp(-0.5))]])
    near(calibration.pair_covariance(first, rows), np.zeros((2, 2)), 1e-12)


def test_bad_input():
    x = np.ones((4, 3, 5), np.float32)
    for f in (calibration.predictive_uncertainty, calibration.mutual_information, calibration.t_similarity):
        fails(["logits", "floating"], TypeError, lambda f=f: f(x.astype(int)))
        fails(["logits", "members", "(5,)"], ValueError, lambda f=f: f(x[0, 0]))
        fails(["logits", "members", "(4, 0, 5)"], ValueError, lambda f=f: f(x[:, :0]))
    fails(
        ["prediction", "'average'"],
        ValueError,
        lambda: calibration.predictive_uncertainty(x, prediction="mean"),
    )
    fails(["truth", "'average'"], ValueError, lambda: calibration.predictive_uncertainty(x, truth="mean"))
    fails(["logits", "two members"], ValueError, lambda: calibration.t_similarity(x[:, :1]))
    mix = calibration.mix_probabilities
    fails(["weight", ">= 0 and <= 1"], ValueError, lambda: mix(x, x, weight=1.5))
    fails(["robust_logits", "(4, 3, 5)"], ValueError, lambda: mix(x, x[0], weight=0.5))
    fails(["weight", "(4, 3)"], ValueError, lambda: mix(x, x, weight=np.ones(7, np.float32)))
    fails(["logits.dense()"], TypeError, lambda: mix(jaxsoft.linear_logits(x[0], x[0].T), x[0], weight=0.5))
    fails(["second_log_probs", "(4, 3, 5, 5)"], ValueError, lambda: calibration.pair_covariance(x, x))
    for f in (calibration.cheat_corrected_variance, calibration.cheat_corrected_confidence):
        fails(["second_log_prob", "(4, 3, 5)"], ValueError, lambda f=f: f(x, x[0]))
