"""Attention with a Gaussian kernel: worked numbers, dense formulas, the inverse by Newton's iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import near

from jaxsoft.attention.softmax_free import (
    gaussian_kernel_attention,
    newton_pseudo_inverse,
    softmax_free_attention,
)


def one_head(*xs):
    return [jnp.asarray(x, float)[:, None] for x in xs]


def kernel(a, b, scale):
    """Dense, by differences."""
    return np.exp(-scale * ((a[:, None] - b) ** 2).sum(-1) / 2)


# --- Newton's iteration --------------------------------------------------------------------------------------------


def matrices():
    a = np.random.default_rng(0).standard_normal((2, 3, 5, 5))
    return a, a @ np.swapaxes(a, -1, -2) + 0.05 * np.eye(5)


def test_the_iteration_is_the_inverse(x64):
    general, definite = matrices()
    near(newton_pseudo_inverse(general, iterations=40), np.linalg.inv(general), 1e-7)
    near(
        newton_pseudo_inverse(definite, iterations=20, positive_definite=True), np.linalg.inv(definite), 1e-7
    )
    near(
        newton_pseudo_inverse(definite, iterations=40, ridge=0.3),
        np.linalg.inv(definite + 0.3 * np.eye(5)),
        1e-7,
    )
    singular = np.array([[1.0, 2.0], [2.0, 4.0]])
    near(newton_pseudo_inverse(singular), np.linalg.pinv(singular), 1e-7)
    # Norm and largest eigenvalue are equal: where the start of 2 / norm^2 stalls.
    near(newton_pseudo_inverse(np.eye(3)), np.eye(3))
    near(newton_pseudo_inverse(np.zeros((2, 2))), 0)


def test_positive_definite_needs_half_the_iterations(x64):
    matrix = np.diag([1.0, 0.5, 1e-4])
    error = lambda **o: np.abs(newton_pseudo_inverse(matrix, **o) @ matrix - np.eye(3)).max()
    assert error(iterations=18, positive_definite=True) < 1e-9 < 0.9 < error(iterations=18)
    assert error(iterations=32) < 1e-9


def test_the_derivative_is_that_of_the_inverse_to_any_order(x64):
    a, d = matrices()[0][0], np.random.default_rng(1).standard_normal((3, 5, 5))
    f = lambda a: newton_pseudo_inverse(a, iterations=50)
    x = np.linalg.inv(a)
    out, tangent = jax.jvp(f, (a,), (d,))
    near(out, x, 1e-7)
    near(tangent, -x @ d @ x, 1e-6)
    _, second = jax.jvp(lambda a: jax.jvp(f, (a,), (d,))[1], (a,), (d,))
    near(second, 2 * x @ d @ x @ d @ x, 1e-5)
    cotangent = np.cos(np.arange(75.0)).reshape(3, 5, 5)
    t = lambda m: np.swapaxes(m, -1, -2)
    near(jax.vjp(f, a)[1](cotangent)[0], -t(x) @ cotangent @ t(x), 1e-6)


def test_the_inverse_of_a_half_precision_matrix_is_computed_in_single():
    matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]], jnp.bfloat16)
    out = newton_pseudo_inverse(matrix)
    assert out.dtype == jnp.bfloat16
    near(out.astype(jnp.float32), [[0.6, -0.2], [-0.2, 0.4]], 2.0**-8)


# --- SOFT ----------------------------------------------------------------------------------------------------------

Q = [[1, 0], [0, 1], [1, 1], [-1, 0.5]]
VALUES = [[1, 0], [0, 1], [1, 1], [2, -1]]
LANDMARKS = [[0.5, 0.5], [-0.5, 0.25]]


def test_worked_numbers(x64):
    q, v, landmarks = one_head(Q, VALUES, LANDMARKS)
    inner = kernel(np.array(LANDMARKS), np.array(LANDMARKS), 2**-0.5)
    near(inner[0, 1], 0.686842, 1e-6)
    near(newton_pseudo_inverse(inner), [[1.893052, -1.300228], [-1.300228, 1.893052]], 1e-6)
    near(newton_pseudo_inverse(inner, ridge=0.01)[0], [1.841897, -1.252568], 1e-6)
    row = lambda **options: softmax_free_attention(q, v, landmarks=landmarks, **options)[0, 0]
    near(row(ridge=0.0), [1.949902, 1.182537], 1e-6)
    near(row(), [1.938784, 1.159715], 1e-6)
    near(row(ridge=0.0, symmetric=True), [1.155948, 0.701036], 1e-6)
    identity = jnp.eye(4)[:, None]
    near(gaussian_kernel_attention(q, q, identity)[0, 0], [1, 0.493069, 0.702189, 0.222550], 1e-6)
    near(gaussian_kernel_attention(q, q, v)[0, 0], [2.147289, 0.972707], 1e-6)


def dense_soft(q, v, landmarks, scale, ridge, symmetric):
    near_landmarks, inner = kernel(q, landmarks, scale), kernel(landmarks, landmarks, scale)
    inverse = np.linalg.inv(inner + ridge * np.eye(len(inner)))
    if symmetric:
        d = np.diag(inner.sum(-1) ** -0.5)
        inverse = d @ inverse @ d
    return near_landmarks @ inverse @ near_landmarks.T @ v


def arrays(length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, length, 3, 4)), rng.standard_normal((2, length, 3, 2))


@pytest.mark.parametrize("symmetric", [False, True])
def test_soft_is_its_formula_and_its_landmarks_are_means(symmetric, x64):
    q, v = arrays(7)
    out = softmax_free_attention(q, v, num_landmarks=3, symmetric=symmetric, scale=0.7, iterations=30)
    for b, h in np.ndindex(2, 3):
        runs = [[0, 1, 2], [3, 4], [5, 6]]
        means = np.stack([q[b, run, h].mean(0) for run in runs])
        near(out[b, :, h], dense_soft(q[b, :, h], v[b, :, h], means, 0.7, 0.01, symmetric), 1e-8)


def test_runs_of_masked_tokens_have_no_landmark(x64):
    q, v = arrays(6)
    where = np.array([[True, True, False, True, False, False], [False] * 4 + [True] * 2])
    q = np.where(where[..., None, None], q, np.nan)
    out = softmax_free_attention(q, v, num_landmarks=3, where=where, symmetric=True, iterations=30)
    assert not np.any(out[~where])
    for h in range(3):
        means = np.stack([q[0, :2, h].mean(0), q[0, 3, h]])
        keep = where[0]
        near(out[0, keep, h], dense_soft(q[0, keep, h], v[0, keep, h], means, 0.5, 0.01, True), 1e-8)


def test_soft_is_the_gaussian_kernel_where_every_token_is_a_landmark(x64):
    q, v = arrays(5)
    exact = gaussian_kernel_attention(q, q, v)
    for options in (dict(landmarks=q), dict(num_landmarks=5), dict(num_landmarks=99)):
        near(softmax_free_attention(q, v, ridge=0.0, iterations=40, **options), exact, 1e-6)


# --- the kernel itself ---------------------------------------------------------------------------------------------


def test_worked_numbers_of_the_kernel(x64):
    q, k, v = one_head([[1, 0], [0.5, -1]], [[1, 1], [0, 0.5], [-1, 0]], [[1, 0], [0, 1], [1, 1]])
    weights = gaussian_kernel_attention(q, k, jnp.eye(3)[:, None])[:, 0]
    near(weights, [[0.702189, 0.642787, 0.243117], [0.222550, 0.413175, 0.316938]], 1e-6)
    near(gaussian_kernel_attention(q, k, v)[:, 0], [[0.945305, 0.885904], [0.539489, 0.730113]], 1e-6)
    normalized = gaussian_kernel_attention(q, k, v, normalize=True)[:, 0]
    near(normalized, [[0.595246, 0.557842], [0.566295, 0.766392]], 1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_gaussian_kernel_is_its_formula(normalize, causal, x64):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((2, 6, 2, 3))
    v, where = rng.standard_normal((2, 6, 2, 2)), rng.random((2, 6)) > 0.3
    out = gaussian_kernel_attention(
        q, k, v, normalize=normalize, is_causal=causal, key_where=where, scale=0.8
    )
    for b, h in np.ndindex(2, 4):
        w = kernel(q[b, :, h], k[b, :, h // 2], 0.8) * where[b]
        w = np.tril(w) if causal else w
        total = w.sum(-1, keepdims=True)
        w = w / np.where(total > 0, total, 1) if normalize else w
        near(out[b, :, h], w @ v[b, :, h // 2])


def test_far_keys_do_not_overflow():
    q, k, v = jnp.full((1, 1, 2), 300.0), jnp.full((2, 1, 2), -300.0), jnp.ones((2, 1, 1))
    assert gaussian_kernel_attention(q, k, v)[0, 0, 0] == 0
    assert gaussian_kernel_attention(q, k, v, normalize=True)[0, 0, 0] == 1


X = jnp.zeros((3, 2, 4))
BAD = [
    (lambda: newton_pseudo_inverse(jnp.zeros((2, 3))), ValueError, "matrix must have shape"),
    (lambda: newton_pseudo_inverse(jnp.zeros((2, 2), int)), TypeError, "matrix must be an array of floating"),
    (lambda: newton_pseudo_inverse(jnp.eye(2), iterations=0), ValueError, "iterations"),
    (lambda: newton_pseudo_inverse(jnp.eye(2), ridge=-1.0), ValueError, "ridge"),
    (lambda: softmax_free_attention(X, X[:, :1]), ValueError, "value must have shape"),
    (lambda: softmax_free_attention(X, X, landmarks=X[..., :3]), ValueError, "landmarks must have shape"),
    (lambda: softmax_free_attention(X, X, num_landmarks=0), ValueError, "num_landmarks"),
    (lambda: softmax_free_attention(X, X, where=jnp.ones(2, bool)), ValueError, "where must have shape"),
    (lambda: softmax_free_attention(X, X, scale="1"), TypeError, "scale must be a number"),
    (lambda: gaussian_kernel_attention(X, X, X, key_where=jnp.ones((3, 1), bool)), ValueError, "key_where"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[m for *_, m in BAD])
def test_bad_input_says_what_was_expected(call, error, match):
    with pytest.raises(error, match=match):
        call()
