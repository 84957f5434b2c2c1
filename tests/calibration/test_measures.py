"""Calibration errors and reliability: the spec's numbers, scikit-learn, plain loops, the plot, errors."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fails, near
from sklearn.calibration import calibration_curve

from jaxsoft import calibration

CONFIDENCE = np.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5])
CORRECT = np.array([1, 1, 1, 0, 1, 1, 0, 1, 0, 0], bool)


def test_worked_numbers(x64):
    @jax.jit
    def errors(c, ok):
        f = calibration.calibration_error
        return (
            f(c, ok, bins=5),
            f(c, ok),
            f(c, ok, bins=5, binning="interpolated"),
            f(c, ok, bins=5, binning="equal_mass"),
        )

    close(errors(CONFIDENCE, CORRECT), [0.185, 0.245, 0.135, 0.265], 1e-12)
    edges = calibration.reliability(
        jnp.asarray(CONFIDENCE), jnp.asarray(CORRECT), bins=5, binning="interpolated"
    ).edges
    close(edges, [0.5, 0.6, 0.7, 0.8, 0.9, 0.95], 1e-12)


def plain(confidence, correct, weights, groups):
    """Shares, confidences and accuracies of groups of examples."""
    rows = []
    for group in groups:
        w = weights[group]
        if w.sum() > 0:
            rows.append(
                [w.sum(), np.average(confidence[group], weights=w), np.average(correct[group], weights=w)]
            )
    share, confidence, accuracy = np.array(rows).T
    return share / weights.sum(), np.abs(confidence - accuracy)


def test_norms_and_weights(x64):
    rng = np.random.default_rng(0)
    c, ok, w = rng.random(40), rng.random(40) < 0.5, rng.integers(0, 3, 40).astype(float)
    c[w == 0] = np.nan
    order = [i for i in np.argsort(c) if w[i] > 0]
    before = np.cumsum(w[order]) - w[order]
    bins = {
        "equal_width": [np.flatnonzero((c > i / 4) & (c <= (i + 1) / 4)) for i in range(4)],
        "equal_mass": [
            np.array([j for j, b in zip(order, before) if int(b * 4 / w.sum()) == i], int) for i in range(4)
        ],
    }

    @jax.jit
    def errors(c, ok, w):
        return {
            (binning, norm): calibration.calibration_error(
                c, ok, bins=4, binning=binning, norm=norm, weights=w
            )
            for binning in bins
            for norm in ("l1", "l2", "max")
        }

    got = errors(c, ok, w)
    for binning, groups in bins.items():
        share, gap = plain(c, ok, w, groups)
        near(got[binning, "l1"], np.sum(share * gap), 1e-12)
        near(got[binning, "l2"], np.sqrt(np.sum(share * gap**2)), 1e-12)
        near(got[binning, "max"], np.max(gap), 1e-12)


def test_reliability_is_that_of_scikit_learn(x64):
    rng = np.random.default_rng(1)
    c = np.concatenate([rng.random(50), [0.0, 0.2, 1.0]])
    ok = rng.random(53) < c
    accuracy, confidence = calibration_curve(ok, c, n_bins=5)
    diagram = calibration.reliability(jnp.asarray(c), jnp.asarray(ok), bins=5)
    near(diagram.accuracy, accuracy, 1e-12)
    near(diagram.confidence, confidence, 1e-12)
    near(diagram.share.sum(), 1)
    by_mass = calibration.reliability(jnp.asarray(c), jnp.asarray(ok), bins=5, binning="equal_mass")
    sizes = np.round(np.asarray(by_mass.share) * 53)
    assert set(sizes) == {10, 11}
    top = np.sort(c)[np.cumsum(sizes).astype(int) - 1]
    near(by_mass.edges, [0, *top], 0)


def test_classwise(x64):
    rng = np.random.default_rng(2)
    p, y = rng.dirichlet(np.ones(3), 30), rng.integers(0, 3, 30)
    each = jax.jit(lambda p, y: [calibration.calibration_error(p[:, k], y == k, bins=6) for k in range(3)])(
        p, y
    )
    f = jax.jit(lambda y, w: calibration.classwise_calibration_error(p, y, bins=6, weights=w))
    every = np.ones(30)
    near(f(y, every), np.mean(each), 1e-12)
    wrong = np.where(np.arange(30) == 4, 3, y)
    assert np.isnan(f(wrong, every)) and np.isfinite(f(wrong, (wrong < 3) * every))


def test_borders():
    """No examples, or none that counts; one class; a gradient that is finite for perfect calibration."""
    none, one = jnp.zeros(0), jnp.array([0.5])

    @jax.jit
    def errors(one):
        f = calibration.calibration_error
        square = lambda c: f(c, jnp.array([0.5]), norm="l2")
        return (
            [f(none, none, binning=binning) for binning in calibration.measures.BINNINGS],
            f(one, jnp.array([True]), weights=jnp.zeros(1)),
            calibration.classwise_calibration_error(jnp.ones((2, 1)), jnp.zeros(2, jnp.int32)),
            jax.value_and_grad(square)(one),
        )

    assert not np.any(np.concatenate([np.ravel(a) for a in jax.tree.leaves(errors(one))]))
    low = jax.eval_shape(calibration.calibration_error, jnp.ones(3, jnp.bfloat16), jnp.ones(3))
    assert low.dtype == jnp.float32


def test_plot(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    diagram = calibration.reliability(jnp.asarray(CONFIDENCE), jnp.asarray(CORRECT), bins=5)
    ax = figure.Figure().add_subplot()
    assert calibration.reliability_plot(diagram, ax=ax, title="t") is ax
    heights = [bar.get_height() for bar in ax.patches]
    some = np.asarray(diagram.share) > 0
    close(heights, [*np.asarray(diagram.accuracy)[some], *np.asarray(diagram.share)[some]], 1e-6)
    assert ax.get_title() == "t" and ax.get_xlabel() == "confidence"

    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    fails(["matplotlib", "pip install"], ImportError, lambda: calibration.reliability_plot(diagram))


def test_bad_input():
    c, ok = CONFIDENCE.astype(np.float32), CORRECT
    for f in (calibration.calibration_error, calibration.reliability):
        fails(["bins", ">= 1"], ValueError, lambda f=f: f(c, ok, bins=0))
        fails(["binning", "'equal_mass'"], ValueError, lambda f=f: f(c, ok, binning="x"))
        fails(["confidence", "floating"], TypeError, lambda f=f: f(ok, ok))
        fails(["confidence", "[examples]"], ValueError, lambda f=f: f(c[None], ok))
        fails(["correct", "(10,)"], ValueError, lambda f=f: f(c, ok[:3]))
        fails(["weights", "(10,)"], ValueError, lambda f=f: f(c, ok, weights=c[:3]))
        fails(["weights", "None"], ValueError, lambda f=f: f(c, ok, weights=c, binning="interpolated"))
    fails(["norm", "'l1'"], ValueError, lambda: calibration.calibration_error(c, ok, norm="l3"))
    p, f = np.ones((4, 2)) / 2, calibration.classwise_calibration_error
    fails(["probabilities", "[examples, classes]"], ValueError, lambda: f(c, np.zeros(10, int)))
    fails(["labels", "integer"], TypeError, lambda: f(p, np.zeros(4)))
    fails(["labels", "(4,)"], ValueError, lambda: f(p, np.zeros(3, int)))
