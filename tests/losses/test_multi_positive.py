"""Losses of many positives: worked numbers, limits, the threshold of soft top-k, and the laws of proxy anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, kinds, logits_of
from jax.test_util import check_grads

import jaxsoft
from jaxsoft import losses

A = [[2.0, 1.0, 0.1, -1.0, 0.5]]
P = jnp.array([[0, 4]])
MASK = jnp.array([[True, False, False, False, True]])

SOFTMAX, TOP_K = losses.multi_positive_softmax_loss, losses.soft_top_k_loss
labels_kinds = pytest.mark.parametrize("labels", [P, MASK], ids=["ids", "booleans"])


def random_rows(n=4, columns=7, dtype=np.float64, seed=0):
    """Scores, and the same positives as ids and as booleans; the last row has none."""
    rng = np.random.default_rng(seed)
    ids = np.array([[0, 3, -100], [1, -100, -100], [2, 5, 6], [-100, -100, -100]])[:n]
    mask = np.zeros((n, columns), bool)
    for row, positives in zip(mask, ids):
        row[positives[positives >= 0]] = True
    return jnp.asarray(2 * rng.normal(size=(n, columns)), dtype), jnp.asarray(ids), jnp.asarray(mask)


@kinds
@labels_kinds
def test_worked_numbers(labels, kind, x64):
    def f(loss, **options):
        g = jax.jit(jax.value_and_grad(lambda x: loss(logits_of(x, kind), labels, **options)[0]))
        return g(jnp.array(A))

    close(f(SOFTMAX)[0], 1.332420)
    close(f(SOFTMAX, reduction="sum")[0], 2 * 1.332420, 2e-6)
    p = jax.nn.softmax(jnp.array(A[0]))
    close(f(SOFTMAX)[1], [p - jnp.array([0.5, 0, 0, 0, 0.5])], 1e-12)
    value, gradient = f(TOP_K, k=2)
    close(value, 0.610863)
    close(gradient, [[-0.002929, 0.262396, 0.156370, 0.024454, -0.440292]])


def test_worked_numbers_of_soft_top_k(x64):
    close(losses.soft_top_k(jnp.array(A), 2), [[0.906353, 0.567068, 0.177979, 0.023428, 0.325172]])


def test_one_positive_is_cross_entropy(x64):
    x, _, _ = random_rows()
    y = jnp.array([0, 6, 2, 3])
    for loss in (SOFTMAX, losses.decoupled_softmax_loss):
        close(loss(x, y[:, None]), losses.cross_entropy(x, y), 1e-12)
        close(loss(x, y[:, None] == jnp.arange(7)), losses.cross_entropy(x, y), 1e-12)


@pytest.mark.parametrize("loss", [SOFTMAX, lambda x, y, **o: TOP_K(x, y, k=3, **o)], ids=["softmax", "top-k"])
def test_ids_are_booleans(loss, x64):
    x, ids, mask = random_rows()
    cotangent = jnp.array([1.0, -2.0, 0.5, 3.0])

    def both(labels, **options):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(cotangent * loss(x, labels, **options))))(x)

    for options in ({}, dict(where=jnp.arange(7) != 4)):
        for a, b in zip(both(ids, **options), both(mask, **options)):
            close(a, b, 1e-12)
    values = loss(x, ids)
    assert values[3] == 0 and jnp.all(values[:3] > 0)
    # A masked positive costs +inf where it is named; as a boolean it does not count.
    where = jnp.arange(7) != 3
    assert loss(x, ids, where=where)[0] == jnp.inf
    close(loss(x, mask, where=where)[0], loss(x, jnp.array([[0]] * 4), where=where)[0], 1e-12)
    gradient = jax.grad(lambda x: loss(x, ids, where=where)[0])(x)
    assert jnp.all(jnp.isfinite(gradient))


# --- the threshold -------------------------------------------------------------------------------------------


def bisected(x, k, alpha):
    """Soft top-k by bisection in numpy, float64."""
    x = np.asarray(x, np.float64)
    lo, hi = x.min(-1) - 800 / alpha, x.max(-1) + 800 / alpha
    sigmoid = lambda tau: 1 / (1 + np.exp(np.clip(-alpha * (x - tau[..., None]), -700, 700)))
    for _ in range(200):
        tau = (lo + hi) / 2
        big = sigmoid(tau).sum(-1) > k
        lo, hi = np.where(big, tau, lo), np.where(big, hi, tau)
    return sigmoid(tau)


@pytest.mark.parametrize(("columns", "k"), [(2, 1), (7, 3), (7, 6.5), (1000, 5), (1000, 999), (20000, 1)])
def test_the_threshold_solves_its_equation(columns, k):
    x = np.random.default_rng(columns).normal(size=(4, columns)).astype(np.float32)
    x[3] = 0.25  # all equal
    f = jax.jit(losses.soft_top_k, static_argnames="k")
    for scale in (1e-3, 1.0, 30.0, 1e3):
        for alpha in (0.1, 2.0, 50.0):
            s = f(jnp.asarray(scale * x), k=k, alpha=alpha)
            # The scores' own rounding, in the exponent of the sigmoid, is beyond help.
            tolerance = 3e-6 + 0.05 * alpha * scale * np.finfo(np.float32).eps
            close(s, bisected(np.float32(scale) * x, k, alpha), tolerance)
            assert np.all(np.abs(np.sum(np.float64(s), axis=-1) - k) < 1e-6 * columns + tolerance)


def test_the_threshold_of_rows_with_masks_made_of_numbers():
    x = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    x[0, 12:] = -1e9
    x[1, 12:] = np.finfo(np.float32).min
    x[2, 12:] = -np.inf
    s = losses.soft_top_k(jnp.asarray(x), 3)
    for row, values in zip(x, s):
        close(values[:12], bisected(row[:12], 3, 2.0), 1e-6)
        np.testing.assert_array_equal(values[12:], 0)
    # A threshold among the numbers of the mask, which float32 cannot tell apart: all of them, or none.
    assert losses.soft_top_k(jnp.asarray(x[:1]), 14).sum() in (12, 16, 20)


def test_hard_top_k_is_the_limit():
    x = jnp.asarray(np.random.default_rng(1).permutation(30).reshape(3, 10), jnp.float32)
    hard = x >= jax.lax.top_k(x, 4)[0][:, -1:]
    close(losses.soft_top_k(x, 4, alpha=100.0), hard)


def test_one_number_per_row_and_rows_without_a_threshold():
    x, ids, _ = random_rows(dtype=np.float32)
    k = jnp.array([2.0, 7.0, 9.5, 0.0])
    s = losses.soft_top_k(x, k)
    close(s.sum(-1), [2, 7, 7, 0], 1e-5)
    np.testing.assert_array_equal(s[1:3], 1)
    ids = ids.at[3, 0].set(1)
    f = jax.jit(lambda x, k: TOP_K(x, ids, k=k))
    close(f(x, k), [f(x, jnp.full(4, 2.0))[0], 0, 0, np.inf])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(f(x, k)[:3])))(x)
    assert jnp.all(jnp.isfinite(gradient)) and jnp.all(gradient[1:] == 0) and jnp.any(gradient[0] != 0)
    # A mask may leave k entries.
    np.testing.assert_array_equal(
        losses.soft_top_k(x, 2, where=jnp.arange(7) < 2), jnp.broadcast_to(jnp.arange(7) < 2, x.shape)
    )


def test_derivatives_for_k_and_alpha(x64):
    """The conformance suite tests those for the scores. The sum of a row is always k."""
    x, ids, _ = random_rows()
    weights = jnp.asarray(np.random.default_rng(2).normal(size=x.shape))
    k, alpha, step = jnp.array([2.0, 3.5, 1.0, 5.0]), jnp.float64(1.3), 1e-5

    def soft(k, alpha):
        return jnp.sum(weights * losses.soft_top_k(x, k, alpha=alpha))

    def loss(k, alpha):
        return jnp.sum(weights[:, 0] * TOP_K(logits_of(x, "streamed"), ids, k=k, alpha=alpha))

    for f in (soft, loss):
        f = jax.jit(jax.value_and_grad(f, (0, 1)))
        gradients = f(k, alpha)[1]
        direction = jnp.array([1.0, -0.5, 2.0, 0.3])
        slope = (f(k + step * direction, alpha)[0] - f(k - step * direction, alpha)[0]) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(gradients[0], direction), slope, rtol=1e-6)
        slope = (f(k, alpha + step)[0] - f(k, alpha - step)[0]) / (2 * step)
        np.testing.assert_allclose(gradients[1], slope, rtol=1e-6)

    jacobian = jax.jit(jax.jacrev(lambda x, k: losses.soft_top_k(x, k, alpha=alpha).sum(-1), (0, 1)))(x, k)
    close(jacobian[0], np.zeros((4, 4, 7)), 1e-12)
    close(jacobian[1], np.eye(4), 1e-12)


def test_gradients_stay_finite_where_scores_are_far_apart():
    f = jax.jit(jax.value_and_grad(lambda x, p: TOP_K(x, p, k=2)[0]))
    for gap in (10.0, 30.0, 100.0, 1e3, 1e4):
        x = jnp.array([[gap, gap + 0.5, 0.0, -1.0]])
        for p in ([[0]], [[2]]):
            value, gradient = f(x, jnp.array(p))
            assert jnp.isfinite(value) and jnp.all(jnp.abs(gradient) <= 2)
        if gap < 60:  # a positive far below: it and what holds its place share the threshold's derivative
            close(gradient, [[1, 0, -1, 0]], 0.5)
            close(gradient.sum(), 0, 1e-5)
        else:
            close(gradient, [[0, 0, -2, 0]], 1e-5)


def test_a_row_of_nan_leaves_the_others_alone():
    x, ids, _ = random_rows(dtype=np.float32)
    expected = TOP_K(x, ids, k=3)
    result = TOP_K(x.at[1].set(jnp.nan), ids, k=3)
    assert jnp.isnan(result[1])
    close(result[jnp.array([0, 2])], expected[jnp.array([0, 2])])


def test_checks_of_soft_top_k():
    x = np.ones((4, 6), np.float32)
    for k, words in (
        (0, "k must be a number > 0"),
        (6, "k must be less than the length of a row, which is 6"),
    ):
        with pytest.raises(ValueError, match=words):
            losses.soft_top_k(x, k)
    with pytest.raises(ValueError, match=r"k must broadcast to shape \(4,\)"):
        losses.soft_top_k(x, np.ones(6, np.float32))
    with pytest.raises(TypeError, match="floating"):
        losses.soft_top_k(np.ones((4, 6), int), 2)


# --- proxy anchors -------------------------------------------------------------------------------------------


def batch(dtype=np.float64):
    """Similarities of 6 items and 5 proxies, one of which has no item; labels, the last one ignored."""
    rng = np.random.default_rng(4)
    items, proxies = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    items, proxies = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (items, proxies))
    labels = np.array([0, 1, 1, 3, 4, 0])
    return jnp.asarray(items, dtype), jnp.asarray(proxies, dtype), jnp.asarray(labels)


def naive_proxy_anchor(s, labels, margin, alpha):
    own = labels[:, None] == np.arange(s.shape[1])
    sums = [
        np.where(m, np.exp(a * (s + b)), 0).sum(0)
        for m, a, b in ((own, -alpha, -margin), (~own, alpha, margin))
    ]
    pull, push = np.log1p(sums[0]), np.log1p(sums[1])
    return pull[own.any(0)].mean() + push.mean()


@pytest.mark.parametrize(("margin", "alpha"), [(0.1, 32.0), (0.3, 2.0)])
def test_proxy_anchor_follows_its_definition(margin, alpha, x64):
    items, proxies, labels = batch()
    s = items @ proxies.T
    options = dict(margin=margin, alpha=alpha)
    expected = naive_proxy_anchor(np.asarray(s), np.asarray(labels), margin, alpha)
    f = losses.proxy_anchor_loss
    close(f(s, labels, **options), expected, 1e-12)
    close(jax.jit(lambda s: f(s, labels, **options))(s), expected, 1e-12)
    close(f(s.T, labels, axis=1, **options), expected, 1e-12)
    close(jax.vmap(lambda s: f(s, labels, **options))(jnp.stack([s, s]))[1], expected, 1e-12)
    numbers = (s, jnp.float64(margin), jnp.float64(alpha))
    check_grads(
        jax.jit(lambda s, m, a: 3.0 * f(s, labels, margin=m, alpha=a)), numbers, 1, modes="rev", rtol=1e-4
    )

    # Never stored: the proxies are the rows.
    def streamed(items, proxies):
        logits = jaxsoft.linear_logits(proxies, items, transpose_weight=True, block_size=4)
        return f(logits, labels, axis=1, **options)

    def dense(items, proxies):
        return f(items @ proxies.T, labels, **options)

    for a, b in zip(*(jax.jit(jax.value_and_grad(g, (0, 1)))(items, proxies) for g in (streamed, dense))):
        jax.tree.map(lambda u, v: close(u, v, 1e-10), a, b)


def test_proxy_anchor_against_pytorch_metric_learning(x64):
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    torch = pytest.importorskip("torch")
    items, proxies, labels = batch()
    oracle = pml.ProxyAnchorLoss(num_classes=5, embedding_size=3, margin=0.1, alpha=32).double()
    oracle.proxies.data = torch.tensor(np.asarray(proxies))
    t = torch.tensor(np.asarray(items), requires_grad=True)
    value = oracle(t, torch.tensor(np.asarray(labels)))
    (gradient,) = torch.autograd.grad(value, t)

    def f(items):
        unit = items / jnp.linalg.norm(items, axis=-1, keepdims=True)
        return losses.proxy_anchor_loss(unit @ proxies.T, labels)

    ours = jax.jit(jax.value_and_grad(f))(items)
    close(ours[0], value.detach(), 1e-9)
    close(ours[1], gradient, 1e-9)


def test_proxy_anchor_masks_and_ignored_items(x64):
    items, proxies, labels = batch()
    s = items @ proxies.T
    f = jax.jit(jax.value_and_grad(losses.proxy_anchor_loss))
    value, gradient = f(s[:5], labels[:5])
    for junk in (jnp.nan, jnp.inf):
        ignored = f(s.at[5].set(junk), labels.at[5].set(-100))
        masked = f(s.at[5].set(junk), labels, where=jnp.arange(6)[:, None] < 5)
        for result in (ignored, masked):
            close(result[0], value, 1e-12)
            close(result[1][:5], gradient, 1e-12)
            assert jnp.all(result[1][5] == 0)
    without = f(s.at[:, 2].set(jnp.nan), labels, where=jnp.arange(5) != 2)  # the proxy without items
    close(without[0], losses.proxy_anchor_loss(s[:, [0, 1, 3, 4]], jnp.array([0, 1, 1, 2, 3, 0])), 1e-12)
    for options in (dict(where=jnp.zeros((6, 5), bool)), {}):
        y = labels if options else jnp.full(6, -100)
        value, gradient = f(jnp.full_like(s, jnp.nan), y, **options)
        assert value == 0 and jnp.all(gradient == 0)
    value, gradient = f(s, labels.at[2].set(5))
    assert jnp.isnan(value) and jnp.all(jnp.isnan(gradient))


def test_proxy_anchor_precision():
    items, proxies, labels = batch(np.float32)
    s = items @ proxies.T
    low = s.astype(jnp.bfloat16)
    f = jax.jit(jax.value_and_grad(losses.proxy_anchor_loss))
    value, gradient = f(low, labels)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    close(value, f(low.astype(jnp.float32), labels)[0])
    value, gradient = f(1e4 * s, labels)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


def test_proxy_anchor_bad_input():
    s, y = np.ones((6, 5), np.float32), np.zeros(6, np.int32)
    cases = [
        (TypeError, "floating", (s.astype(int), y), {}),
        (ValueError, "two axes", (s[None], y), {}),
        (ValueError, r"labels must have shape \(6,\)", (s, y[:5]), {}),
        (TypeError, "labels must be an array of integer", (s, s[:, 0]), {}),
        (ValueError, "alpha must be a number > 0", (s, y), dict(alpha=0.0)),
        (TypeError, "margin must be a number", (s, y), dict(margin="a")),
        (TypeError, "where must be a boolean", (s, y), dict(where=s)),
        (ValueError, "where must broadcast", (s, y), dict(where=np.ones(6, bool))),
        (ValueError, "axis", (s, y), dict(axis=2)),
        (TypeError, "ignore_index", (s, y), dict(ignore_index=0.5)),
    ]
    for kind, words, args, options in cases:
        with pytest.raises(kind, match=words):
            losses.proxy_anchor_loss(*args, **options)
