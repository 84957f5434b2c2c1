"""Scores of rows: the paper's numbers, independent formulas, clipping, errors. Their laws are in tests/conformance."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import close, fails, near, softmax, streamed

from jaxsoft import calibration

X = np.array([[2.0, 1.0, 0.0], [0.5, 0.4, 0.3]])
P = np.array([[0.5, 0.3, 0.2], [0.4, 0.39, 0.21], [0.8, 0.1, 0.1]])


def test_worked_numbers(x64):
    @jax.jit
    def scores(x, p):
        return (
            calibration.max_softmax_probability(x),
            calibration.max_logit(x),
            calibration.energy_score(x),
            calibration.energy_score(x, temperature=2.0),
            calibration.least_confidence(p),
            calibration.margin_score(p),
            calibration.label_non_uniformity(jnp.log(jnp.array([0.7, 0.2, 0.1]))),
        )

    got = scores(jnp.asarray(X), jnp.log(P))
    close(got[0], [0.665241, 0.367165], 5e-7)
    close(got[1], [2.0, 0.5], 0)
    close(got[2], [2.407606, 1.501943], 5e-7)
    close(got[3], [3.360539, 2.598891], 5e-7)
    close(got[4], [0.5, 0.6, 0.2], 1e-12)
    close(got[5], [0.2, 0.01, 0.7], 1e-12)
    close(got[6], 0.366667, 5e-7)


def test_streamed_scores_are_the_dense_formulas(x64):
    x = np.random.default_rng(0).normal(size=(5, 7)) * 3
    t = np.linspace(0.5, 2, 5)

    @jax.jit
    def scores(x):
        logits = streamed(x, 3)
        return (
            calibration.margin_score(logits),
            calibration.label_non_uniformity(logits),
            calibration.energy_score(logits, temperature=jnp.asarray(t)),
        )

    p = softmax(x)
    margin, non_uniformity, energy = scores(x)
    best = np.sort(p, axis=-1)
    near(margin, best[:, -1] - best[:, -2], 1e-12)
    near(non_uniformity, np.abs(p - 1 / 7).sum(-1) / 2, 1e-12)
    near(energy, t * np.log(np.exp(x / t[:, None]).sum(-1)), 1e-12)


def test_a_margin_of_close_calls_is_exact():
    x = jnp.array([1.0, 1.0 + 2**-20, -3.0])
    p = softmax(np.asarray(x, np.float64))
    near(calibration.margin_score(x) / (p[1] - p[0]), 1, 1e-6)
    assert calibration.margin_score(jnp.array([[3.0]])) == 1
    assert calibration.margin_score(jnp.zeros((1, 0))) == 0


def test_clip_uncertainty(x64):
    c = np.array([0.1, 0.5, 0.6, 0.3, 0.05, 0.8, 0.4, 0.9, 0.7, 0.2])
    clipped = calibration.clip_uncertainty(jnp.asarray(c))
    close(clipped, np.where(c == 0.05, 1, c), 0)
    for clip in (1.0, 0.7):
        threshold = np.percentile(c, (1 - clip) * 100)
        close(
            calibration.clip_uncertainty(jnp.asarray(c), clip=clip, worst=2.0),
            np.where(c < threshold, 2, c),
            0,
        )
    assert calibration.clip_uncertainty(jnp.zeros(0)).shape == (0,)


def test_bad_input():
    x = np.ones((4, 6), np.float32)
    for score in (
        calibration.max_softmax_probability,
        calibration.max_logit,
        calibration.energy_score,
        calibration.least_confidence,
        calibration.margin_score,
        calibration.label_non_uniformity,
    ):
        fails(["logits", "int64", "floating"], TypeError, lambda score=score: score(np.ones((4, 6), int)))
        fails(["axis", "[-2, 2)", "got 2"], ValueError, lambda score=score: score(x, axis=2))
        fails(["where", "boolean"], TypeError, lambda score=score: score(x, where=x))
    fails(["temperature", "> 0"], ValueError, lambda: calibration.energy_score(x, temperature=0.0))
    fails(["temperature", "(4,)"], ValueError, lambda: calibration.energy_score(x, temperature=np.ones(6)))
    fails(["clip", "> 0 and <= 1"], ValueError, lambda: calibration.clip_uncertainty(x[0], clip=0.0))
    fails(["confidence", "(4, 6)"], ValueError, lambda: calibration.clip_uncertainty(x))
    fails(["confidence", "floating"], TypeError, lambda: calibration.clip_uncertainty(np.arange(3)))
