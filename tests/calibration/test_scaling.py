"""Temperature, vector and matrix scaling: the spec's number, independent optimizers, borders, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from helpers import close, fails, near, softmax
from sklearn.linear_model import LogisticRegression

import jaxsoft
from jaxsoft import calibration

X = np.array([[3, 1, 0], [2, 0, 1], [0, 2.5, 0.5], [1, 0, 2.2], [2, 1.8, 0], [0, 3, 1.0]])
Y = np.array([0, 2, 1, 2, 1, 1], np.int32)


def nll(x, y, weights=None):
    p = np.take_along_axis(softmax(x), y[:, None], 1)[:, 0]
    return np.average(-np.log(p), weights=weights)


def noisy(n=60, classes=3, seed=0):
    """Overconfident logits, some of whose labels are wrong."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(n, classes)) * 2 + 4 * np.eye(classes)[y]
    return x, np.where(rng.random(n) < 0.2, rng.integers(0, classes, n), y)


def test_the_temperature_minimizes_the_likelihood(x64):
    """The spec's example; weights, an ignored example and a masked class; the gradient of the implicit function."""
    y = jnp.asarray(Y)
    fit = jax.jit(calibration.fit_temperature)
    t = fit(jnp.asarray(X), y)
    close(t, 0.718393, 5e-7)
    close(nll(X / np.asarray(t), Y), 0.497850, 5e-7)

    x, labels = noisy(6)
    weights = np.array([0.5, 1.0, 0.0, 2.0, 1.5, 1.0])
    labels[1] = -100
    x[1] = np.nan
    counts = np.array([0, 3, 4, 5])

    def objective(t, x=x):
        return nll(x[counts] / t, labels[counts], weights[counts])

    def f(x, weights):
        logits = jaxsoft.linear_logits(x, jnp.eye(3), block_size=2)
        return calibration.fit_temperature(logits, jnp.asarray(labels), weights=weights)

    t, (gx, gw) = jax.jit(jax.value_and_grad(f, (0, 1)))(jnp.asarray(x), jnp.asarray(weights))
    best = scipy.optimize.minimize_scalar(
        objective, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-10}
    )
    near(t, best.x, 1e-6)
    moved, step = np.random.default_rng(3).normal(size=x.shape), 1e-5
    clean = np.nan_to_num(x)
    ends = [
        float(fit(jnp.asarray(clean + s * moved), jnp.asarray(labels), weights=jnp.asarray(weights)))
        for s in (-step, step)
    ]
    near(np.vdot(np.asarray(gx)[counts], moved[counts]), (ends[1] - ends[0]) / (2 * step), 1e-6)
    assert not np.any(gx[1:3]) and gw[1] == 0 and np.all(np.isfinite(gw))


def test_borders_of_the_temperature():
    """Where there is no best temperature: a bound, or 1. One class is enough."""
    fit = jax.jit(calibration.fit_temperature)
    y = jnp.array([0, 1, 0, 1])
    sure = jnp.array([[9.0, 0.0], [0.0, 9.0], [8.0, 1.0], [-3.0, 2.0]])
    near(fit(sure, y), 1e-3, 1e-4)
    near(fit(-sure, y), 1e3, 1e-4)
    assert fit(jnp.zeros((4, 2)), y) == 1 and fit(sure, jnp.full(4, -100)) == 1
    one_class = fit(jnp.array([[2.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 0.0]]), jnp.zeros(4, jnp.int32))
    assert 1e-3 < one_class < 1e3
    assert jnp.isnan(fit(sure, jnp.array([0, 2, 0, 1])))
    assert jnp.isnan(fit(sure.at[1, 0].set(jnp.nan), y))
    huge = fit(1e4 * jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 3.0], [1.0, 0.0]]), y)  # one wrong
    assert huge > 100
    low = fit(sure.at[0, 0].set(-1).astype(jnp.bfloat16), y)
    assert low.dtype == jnp.float32 and jnp.isfinite(low)


def test_vector_scaling_is_the_minimum(x64):
    x, y = noisy()
    weights = np.random.default_rng(1).random(60)
    y[5] = -100
    keep = y >= 0
    l2 = 0.1
    fitted = calibration.fit_vector_scaling(
        jnp.asarray(x), jnp.asarray(y), l2=l2, weights=jnp.asarray(weights), tolerance=1e-9
    )

    def objective(v):
        w, b = v[:3], v[3:]
        penalty = l2 / 2 * (np.sum((w - 1) ** 2) + np.sum(b**2))
        return nll((x * w + b)[keep], y[keep], weights[keep]) + penalty

    best = scipy.optimize.minimize(objective, np.array([1, 1, 1, 0, 0, 0.0]), tol=1e-12)
    near(np.concatenate(fitted), best.x, 1e-5)
    scaled = calibration.apply_scaling(jnp.asarray(x.T), fitted, axis=0)
    near(scaled, (x * fitted.weight + fitted.bias).T, 1e-12)


def test_matrix_scaling_is_logistic_regression(x64):
    x, y = noisy(200)
    fit = jax.jit(lambda x, y, l2: calibration.fit_matrix_scaling(x, y, l2=l2, tolerance=1e-8))
    fitted = fit(jnp.asarray(x), jnp.asarray(y), 0.0)
    p = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(x, y).predict_proba(x)
    near(jax.nn.softmax(calibration.apply_scaling(jnp.asarray(x), fitted)), p, 1e-5)

    # One class alone: finite with the penalty. No example: the identity. A label out of range: NaN.
    one = fit(jnp.asarray(x), jnp.zeros(200, jnp.int32), 0.1)
    assert all(np.all(np.isfinite(a)) and np.max(np.abs(a)) < 10 for a in one) and one.bias[0] > one.bias[1]
    none = fit(jnp.asarray(x), jnp.full(200, -100), 0.0)
    near(none.weight, np.eye(3), 0)
    assert np.all(np.isnan(fit(jnp.asarray(x), jnp.asarray(y).at[0].set(3), 0.0).bias))


def test_absent_classes():
    x = jnp.array([[1.0, -jnp.inf, 2.0], [0.5, 3.0, jnp.nan]])
    where = jnp.array([[True, True, True], [True, True, False]])
    matrix = calibration.Scaling(jnp.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), jnp.array([0.0, 1.0, -1.0]))
    scaled = calibration.apply_scaling(x, matrix, where=where)
    close(scaled, [[15.0, -np.inf, 20.0], [12.5, 17.0, -np.inf]], 1e-6)


def test_bad_input():
    x, y = X.astype(np.float32), Y
    for fit in (calibration.fit_temperature, calibration.fit_vector_scaling, calibration.fit_matrix_scaling):
        fails(["logits", "floating"], TypeError, lambda fit=fit: fit(X.astype(int), y))
        fails(["labels", "integer"], TypeError, lambda fit=fit: fit(x, y.astype(np.float32)))
        fails(["labels", "(6,)", "(5,)"], ValueError, lambda fit=fit: fit(x, y[:5]))
        fails(["weights", "(6,)"], ValueError, lambda fit=fit: fit(x, y, weights=np.ones(3)))
        fails(["ignore_index", "integer"], TypeError, lambda fit=fit: fit(x, y, ignore_index=0.5))
    for fit in (calibration.fit_vector_scaling, calibration.fit_matrix_scaling):
        fails(["l2", ">= 0"], ValueError, lambda fit=fit: fit(x, y, l2=-1.0))
        fails(["max_steps", ">= 1"], ValueError, lambda fit=fit: fit(x, y, max_steps=0))
        fails(["logits.dense()"], TypeError, lambda fit=fit: fit(jaxsoft.linear_logits(x, x.T), y))
    fails(
        ["scaling.bias", "(3,)"],
        ValueError,
        lambda: calibration.apply_scaling(x, calibration.Scaling(np.ones(2), np.ones(2))),
    )
    fails(
        ["scaling.weight", "(3, 3)"],
        ValueError,
        lambda: calibration.apply_scaling(x, calibration.Scaling(np.ones((3, 2)), np.ones(3))),
    )
