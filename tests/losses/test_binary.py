"""One binary problem per class: numbers, oracles, limits, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import float64
from helpers import close, fails, kinds, logits_of
from jax.test_util import check_grads

from jaxsoft import losses

A = [2.0, 1.0, 0.1, -1.0, 0.5]
CE, REST, FOCAL, GUMBEL, EACH, QUALITY = (
    losses.cross_entropy,
    losses.one_vs_rest_cross_entropy,
    losses.sigmoid_focal_loss,
    losses.gumbel_optimized_loss,
    losses.one_vs_each_loss,
    losses.quality_focal_loss,
)
RNG = np.random.default_rng(0)
X, T = 3 * RNG.normal(size=(4, 6)), RNG.random((4, 6))
Y = np.array([0, 3, 5, 2])
summed = pytest.mark.parametrize("loss", [REST, FOCAL, GUMBEL], ids=lambda f: f.__name__)


def value_and_gradient(f, x):
    """Values `[rows]`, and the gradient of their sum with unequal weights."""
    w = jnp.linspace(0.5, 1.5, x.shape[0])
    gradient, values = jax.jit(jax.grad(lambda x: (lambda v: (jnp.sum(w * v), v))(f(x)), has_aux=True))(x)
    return values, gradient


@kinds
def test_numbers(kind, x64):
    close(EACH(logits_of([A], kind), jnp.array([0])), 0.702649)
    # With a second class so negative that it adds nothing.
    one = lambda x: logits_of([[x, -40.0]], kind)
    first, neither = jnp.array([0]), jnp.zeros((1, 2))
    close(FOCAL(one(1.2), first, alpha=0.25), 0.003527)
    close(FOCAL(one(-0.7), neither, alpha=0.25), 0.033293)
    close(GUMBEL(one(1.2), first), 0.301194)
    value, gradient = value_and_gradient(
        lambda x: GUMBEL(logits_of(x, kind), neither), jnp.array([[-0.7, -40.0]])
    )
    close(value, 0.143278)
    close(gradient, [[0.5 * 0.310220, 0]])
    close(np.exp(-np.exp(-np.array([1.2, -0.7]))), [0.739934, 0.133487])


@kinds
def test_optax(kind, x64):
    hot = np.eye(6)[Y]
    for targets, given in ((hot, jnp.asarray(Y)), (T, jnp.asarray(T))):
        pairs = [
            (REST, optax.sigmoid_binary_cross_entropy),
            (FOCAL, optax.losses.sigmoid_focal_loss),
            (
                lambda x, y: FOCAL(x, y, alpha=0.3, gamma=1.5),
                lambda x, t: optax.losses.sigmoid_focal_loss(x, t, alpha=0.3, gamma=1.5),
            ),
        ]
        for ours, oracle in pairs:
            a = value_and_gradient(lambda x, f=ours: f(logits_of(x, kind), given), jnp.asarray(X))
            b = value_and_gradient(lambda x, f=oracle: f(x, jnp.asarray(targets)).sum(-1), jnp.asarray(X))
            jax.tree.map(lambda u, v: close(u, v, 1e-12), a, b)


def test_torch():
    torch = pytest.importorskip("torch")
    weights = np.linspace(0.5, 2, 6)
    x = torch.tensor(X, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        x, torch.tensor(T), weight=torch.tensor(weights), reduction="none"
    ).sum(-1)
    (expected * torch.linspace(0.5, 1.5, 4, dtype=torch.float64)).sum().backward()
    with float64():
        values, gradient = value_and_gradient(
            lambda x: REST(x, jnp.asarray(T), class_weights=jnp.asarray(weights)), jnp.asarray(X)
        )
        close(values, expected.detach().numpy(), 1e-12)
        close(gradient, x.grad.numpy(), 1e-12)


def gumbel_reference(x, t):
    u = np.exp(-np.clip(x, -4, 10))
    return np.minimum(t * u - (1 - t) * np.log1p(-np.exp(-u)), 20).sum(-1)


@kinds
def test_gumbel_is_its_definition(kind, x64):
    x = np.concatenate([X, [[-3.9, -4.1, 10.5, 9.5, -50.0, 60.0]]])
    t = np.concatenate([T, [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]])
    values, gradient = value_and_gradient(
        lambda x: GUMBEL(logits_of(x, kind), jnp.asarray(t)), jnp.asarray(x)
    )
    close(values, gumbel_reference(x, t), 1e-10)
    outside = (x < -4) | (x > 10)
    close(np.asarray(gradient)[outside], 0, 0)
    # The closed form of the gradient: t (-u) + (1 - t) u / (e^u - 1), 0 where the term is capped.
    u = np.exp(-np.clip(x, -4, 10))
    live = ~outside & (t * u - (1 - t) * np.log1p(-np.exp(-u)) < 20)
    w = np.linspace(0.5, 1.5, 5)[:, None]
    close(gradient, np.where(live, w * (-t * u + (1 - t) * u / np.expm1(u)), 0), 1e-10)
    wide = GUMBEL(logits_of(x, kind), jnp.asarray(t), low=-5.0, high=5.0, cap=200.0)
    assert jnp.all(wide[:4] >= 0) and wide[4] > 50  # e^4.1


@kinds
def test_one_vs_each_bounds_cross_entropy(kind, x64):
    y = jnp.asarray(Y)
    each = EACH(logits_of(X, kind), y)
    assert jnp.all(each > CE(jnp.asarray(X), y))
    close(EACH(logits_of(X[:, :2], kind), y % 2), CE(jnp.asarray(X[:, :2]), y % 2), 1e-12)
    shifted = X - X[np.arange(4), Y][:, None]
    close(each, (np.log1p(np.exp(shifted)) * (1 - np.eye(6)[Y])).sum(-1), 1e-12)


@kinds
def test_limits(kind, x64):
    y = jnp.asarray(Y)
    close(FOCAL(logits_of(X, kind), y, gamma=0.0), REST(logits_of(X, kind), y), 1e-12)
    close(2 * FOCAL(logits_of(X, kind), y, alpha=0.5), FOCAL(logits_of(X, kind), y), 1e-12)
    hot = jnp.asarray(np.eye(6)[Y])
    for loss in (REST, FOCAL, GUMBEL):
        close(loss(logits_of(X, kind), y), loss(logits_of(X, kind), hot), 1e-12)


@kinds
@summed
def test_absent_classes(loss, kind):
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y)
    mask = jnp.array([True, True, False, True, True, True])
    f = jax.jit(lambda y, mask: loss(logits_of(x, kind), y, where=mask))
    # An id of an absent class costs +inf; targets of absent classes count for nothing, and rows without classes.
    np.testing.assert_array_equal(jnp.isinf(f(y, mask)), Y == 2)
    close(f(jnp.asarray(T, jnp.float32), mask), loss(x[:, mask], jnp.asarray(T, jnp.float32)[:, mask]), 1e-5)
    nans = jnp.asarray(T, jnp.float32).at[:, 2].set(jnp.nan)
    value, g = jax.value_and_grad(lambda t: jnp.sum(f(t, mask)))(nans)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(g)) and not jnp.any(g[:, 2])
    assert not jnp.any(f(y, mask & False)) and not jnp.any(f(jnp.asarray(T, jnp.float32), mask & False))
    g = jax.grad(lambda x: jnp.sum(jnp.where(Y == 2, 0, loss(x, y, where=mask))))(x.at[:, 2].set(jnp.nan))
    assert jnp.all(jnp.isfinite(g))


@summed
def test_traced_options_and_half_precision(loss):
    options = {REST: {}, FOCAL: dict(gamma=1.5, alpha=0.3), GUMBEL: dict(low=-3.0, cap=10.0)}[loss]
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y)
    traced = jax.jit(lambda x, o: loss(x, y, **o))(x, options)
    close(traced, loss(x, y, **options), 1e-5)
    low, t = x.astype(jnp.bfloat16), jnp.asarray(T, jnp.bfloat16)
    result = loss(low, t, **options)
    assert result.dtype == jnp.float32
    close(result, loss(low.astype(jnp.float32), t.astype(jnp.float32), **options), 1e-5)


def test_quality_focal_loss(x64):
    x, t = jnp.asarray(X), jnp.asarray(T)
    c = jax.nn.sigmoid(x)
    bce = -(t * jnp.log(c) + (1 - t) * jnp.log1p(-c))
    close(QUALITY(x, t), (t - c) ** 2 * bce, 1e-12)
    close(QUALITY(x, t, gamma=0.0), optax.sigmoid_binary_cross_entropy(x, t), 1e-12)
    close(QUALITY(x, t, alpha=0.3), (0.3 * t + 0.7 * (1 - t)) * QUALITY(x, t), 1e-12)
    hot = jnp.round(t)
    close(QUALITY(x, hot, alpha=0.3), optax.losses.sigmoid_focal_loss(x, hot, alpha=0.3), 1e-12)
    check_grads(jax.jit(QUALITY), (x, t), 1)
    close(jax.jit(QUALITY)(x, t), QUALITY(x, t), 1e-12)
    close(jax.vmap(QUALITY)(x, t), QUALITY(x, t), 1e-12)
    # Where the estimate is right, and at the ends.
    value, g = jax.value_and_grad(lambda x: jnp.sum(QUALITY(x, jax.lax.stop_gradient(jax.nn.sigmoid(x)))))(x)
    assert value < 1e-12 and jnp.all(jnp.abs(g) < 1e-6)
    ends = jnp.array([1e4, -1e4, 1e4, -1e4]), jnp.array([1.0, 1.0, 0.0, 0.0])
    close(QUALITY(*ends), [0, 1e4, 1e4, 0])
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: jnp.sum(QUALITY(x, ends[1])))(ends[0])))


def test_quality_focal_loss_masks_and_precision():
    x, t = jnp.asarray(X, jnp.float32), jnp.asarray(T, jnp.float32)
    where = jnp.arange(6) < 4
    f = lambda x, t: QUALITY(x, t, where=where, alpha=0.4)
    spoiled = x.at[:, 5].set(jnp.nan), t.at[:, 4].set(jnp.nan)
    close(f(*spoiled), jnp.where(where, QUALITY(x, t, alpha=0.4), 0))
    g = jax.grad(lambda *a: jnp.sum(f(*a)), argnums=(0, 1))(*spoiled)
    assert all(jnp.all(jnp.isfinite(a)) and not jnp.any(a[:, 4:]) for a in g)
    low = QUALITY(x.astype(jnp.bfloat16), t.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    close(low, QUALITY(*(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, t))))


@pytest.mark.parametrize(
    ("args", "options", "kind", "words"),
    [
        ((X, T[:3]), {}, ValueError, ["targets", "(4, 6)", "(3, 6)"]),
        ((X, Y), {}, TypeError, ["targets", "floating", "int64"]),
        ((Y, T), {}, TypeError, ["logits", "floating", "int64"]),
        ((X, T), dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
        ((X, T), dict(alpha=2.0), ValueError, ["alpha", ">= 0 and <= 1", "2.0"]),
        ((X, T), dict(where=X), TypeError, ["where", "boolean", "float64"]),
        ((X, T), dict(where=X[0, :5] > 0), ValueError, ["where", "(4, 6)", "(5,)"]),
    ],
)
def test_bad_quality_focal_loss(args, options, kind, words):
    fails(words, kind, lambda: QUALITY(*args, **options))


@summed
def test_a_bad_mask_of_targets(loss):
    for where, kind, word in ((X[0], TypeError, "boolean"), (X[0, :5] > 0, ValueError, "broadcast")):
        with pytest.raises(kind, match=f"where.*{word}"):
            loss(jnp.asarray(X), jnp.asarray(T), where=where)
