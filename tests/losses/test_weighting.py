"""Weights of examples and classes: numbers, limits, estimators without bias, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fails, kinds, logits_of
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import losses

WEIGHTS, LAGRANGIAN, DUAL = (
    losses.loss_based_weights,
    losses.feasible_learning_loss,
    losses.feasible_dual_update,
)
LLP, SHRINK, CE = losses.easy_llp_loss, losses.shrink_class_space_loss, losses.cross_entropy
STRATEGIES = ["linupper", "mid", "upper", "extremes"]


# --- weights from losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("linupper", [0.176491, 0.343757, 0.479752]),
        ("mid", [0.225610, 0.548780, 0.225610]),
        ("upper", [0.195546, 0.272906, 0.531548]),
        ("extremes", [0.397865, 0.204271, 0.397865]),
    ],
)
def test_loss_based_weights_numbers(strategy, expected, x64):
    values = jnp.array([1.0, 2.0, 4.0])
    w = WEIGHTS(values, strategy=strategy)
    close(w, expected)
    if strategy == "linupper":
        close(jnp.sum(w * values), 2.783013)
    close(jax.jit(lambda v: WEIGHTS(v, strategy=strategy))(values), w, 1e-12)
    close(jax.vmap(lambda v: WEIGHTS(v, strategy=strategy))(jnp.stack([values, -values]))[0], w, 1e-12)
    close(WEIGHTS(3 * values - 7, strategy=strategy), w, 1e-12)  # only the range counts
    # Another delta and temperature, from the definition.
    h = 2 * np.array([-1, -1 / 3, 1])
    f = {
        "linupper": np.minimum(h + 2, 2),
        "mid": 1 - h * h / 4,
        "upper": 0.5 * h + 1,
        "extremes": np.abs(h),
    }
    e = np.exp(f[strategy] / 0.5)
    close(WEIGHTS(values, strategy=strategy, delta=2.0, temperature=0.5), e / e.sum(), 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_based_weights_edges(strategy):
    f = lambda v, **o: WEIGHTS(v, strategy=strategy, **o)
    close(f(jnp.full((2, 3), 0.7)), np.full((2, 3), 1 / 6))  # uniform, to rounding
    assert f(jnp.array([3.0])) == 1
    assert not jnp.any(f(jnp.array([jnp.nan, 1.0]), where=jnp.array([False, False])))
    values, where = jnp.array([1.0, jnp.nan, 2.0, 4.0]), jnp.array([True, False, True, True])
    close(f(values, where=where)[where], f(values[where]))
    assert f(values, where=where)[1] == 0
    total = lambda v: jnp.sum(f(v, where=where) * jnp.where(where, v, 0))
    close(jax.grad(total)(values), f(values, where=where))  # constants
    low = f(values[where].astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    close(low, f(values[where]))
    close(f(values[where], temperature=1e6), np.full(3, 1 / 3), 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_based_weights_of_a_sharded_batch(strategy):
    values = jnp.asarray(np.random.default_rng(0).random(8), jnp.float32)
    where = jnp.arange(8) != 5
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.shard_map(
        lambda v, k: WEIGHTS(v, strategy=strategy, where=k, axis_name="data"),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    close(jax.jit(f)(values, where), WEIGHTS(values, strategy=strategy, where=where))


def test_bad_loss_based_weights():
    values = jnp.ones(3)
    fails(
        ["strategy", "'linupper', 'mid', 'upper', 'extremes'", "'low'"],
        ValueError,
        lambda: WEIGHTS(values, strategy="low"),
    )
    fails(["delta", "> 0", "0.0"], ValueError, lambda: WEIGHTS(values, delta=0.0))
    fails(["temperature", "> 0", "-1.0"], ValueError, lambda: WEIGHTS(values, temperature=-1.0))
    fails(["losses", "floating", "int32"], TypeError, lambda: WEIGHTS(jnp.arange(3)))
    fails(["losses", "floating", "of type list"], TypeError, lambda: WEIGHTS([1.0]))
    fails(["where", "boolean", "float32"], TypeError, lambda: WEIGHTS(values, where=values))
    fails(["where", "(3,)", "(4,)"], ValueError, lambda: WEIGHTS(values, where=jnp.ones(4, bool)))


# --- feasible learning -------------------------------------------------------------------------------------

L, MULTIPLIERS = np.array([0.3, 0.9, 1.5]), np.array([0.0, 0.5, 2.0])


def test_feasible_learning_numbers(x64):
    l, m = jnp.asarray(L), jnp.asarray(MULTIPLIERS)
    close(jnp.sum(LAGRANGIAN(l, m, epsilon=0.8)), 1.45)
    options = dict(epsilon=0.8, learning_rate=0.1)
    close(DUAL(m, l, **options), [0, 0.51, 2.07])
    close(DUAL(m, l, resilience=2.0, **options), [0, 0.485, 1.97])
    close(DUAL(m, l, resilience=1e12, **options), DUAL(m, l, **options))
    bounds = jnp.array([0.1, 0.8, 2.0])
    close(LAGRANGIAN(l, m, epsilon=bounds), MULTIPLIERS * (L - np.asarray(bounds)), 1e-12)
    close(DUAL(m, l, epsilon=bounds, learning_rate=0.1), [0.02, 0.51, 1.95])
    # Multipliers are weights: constants. Losses are constants of the dual step.
    g = jax.grad(lambda l, m: jnp.sum(LAGRANGIAN(l, m, epsilon=0.8)), argnums=(0, 1))(l, m)
    close(g[0], MULTIPLIERS, 1e-12)
    assert not jnp.any(g[1])
    assert not jnp.any(jax.grad(lambda l: jnp.sum(DUAL(m, l, **options)))(l))
    for f, a, b in (
        (lambda l, m: LAGRANGIAN(l, m, epsilon=0.8), l, m),
        (lambda m, l: DUAL(m, l, **options), m, l),
    ):
        close(jax.jit(f)(a, b), f(a, b), 1e-12)
        close(jax.vmap(f)(a[None], b[None])[0], f(a, b), 1e-12)


def test_feasible_learning_ends_where_all_is_feasible(x64):
    """Nothing moves that was feasible from the start; the multipliers of the others vanish again."""

    def step(state, _):
        x, m = state
        loss = lambda x: (x - jnp.array([3.0, 0.5])) ** 2
        x = x - 0.05 * jax.grad(lambda x: jnp.sum(LAGRANGIAN(loss(x), m, epsilon=1.0)))(x)
        return (x, DUAL(m, loss(x), epsilon=1.0, learning_rate=0.05)), None

    (x, m), _ = jax.jit(lambda s: jax.lax.scan(step, s, None, 3000))((jnp.zeros(2), jnp.zeros(2)))
    assert 2 <= x[0] <= 4 and x[1] == 0 and not jnp.any(m)


def test_feasible_learning_masks_and_precision():
    l, m = jnp.array([0.3, jnp.nan, 1.5, jnp.inf]), jnp.array([0.2, 0.5, 2.0, 0.0])
    where = jnp.array([True, False, True, True])
    f = lambda l: LAGRANGIAN(l, m, epsilon=0.8, where=where)
    close(f(l), [-0.1, 0, 1.4, 0])
    close(jax.grad(lambda l: jnp.sum(f(l)))(l), [0.2, 0, 2, 0])
    finite = jnp.where(jnp.isinf(l), 1.0, l)
    updated = DUAL(m, finite, epsilon=0.8, learning_rate=0.1, where=where)
    close(updated, [0.15, 0.5, 2.07, 0.02])
    half = m.astype(jnp.bfloat16)
    assert DUAL(half, finite, epsilon=0.8, learning_rate=0.1).dtype == jnp.bfloat16
    assert LAGRANGIAN(finite.astype(jnp.bfloat16), half, epsilon=0.8).dtype == jnp.float32


def test_bad_feasible_learning():
    l, m = jnp.asarray(L, jnp.float32), jnp.asarray(MULTIPLIERS, jnp.float32)
    step = dict(epsilon=0.8, learning_rate=0.1)
    fails(["multipliers", "(3,)", "(2,)"], ValueError, lambda: LAGRANGIAN(l, m[:2], epsilon=0.8))
    fails(["multipliers", "floating", "int32"], TypeError, lambda: LAGRANGIAN(l, jnp.arange(3), epsilon=0.8))
    fails(["losses", "floating", "int32"], TypeError, lambda: LAGRANGIAN(jnp.arange(3), m, epsilon=0.8))
    fails(["epsilon", "number", "'a'"], TypeError, lambda: LAGRANGIAN(l, m, epsilon="a"))
    fails(["epsilon", "(3,)", "(2,)"], ValueError, lambda: LAGRANGIAN(l, m, epsilon=l[:2]))
    fails(["where", "(3,)", "(2,)"], ValueError, lambda: LAGRANGIAN(l, m, epsilon=0.8, where=l[:2] > 0))
    fails(["learning_rate", ">= 0", "-1.0"], ValueError, lambda: DUAL(m, l, epsilon=0.8, learning_rate=-1.0))
    fails(["resilience", "> 0", "0.0"], ValueError, lambda: DUAL(m, l, resilience=0.0, **step))


# --- label proportions -------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(4, 3)), RNG.dirichlet(np.ones(3), 4)
PRIORS = np.array([0.5, 0.3, 0.2])


def test_easy_llp_numbers(x64):
    w = losses.easy_llp_weights(0.75, priors=0.4, bag_size=4)
    close(w * 0.3 + (1 - w) * 1.2, -0.42)
    close(losses.easy_llp_weights(0.25, priors=0.6, bag_size=4), 1 - w, 1e-12)  # the other class
    close(losses.easy_llp_weights(jnp.asarray(T), priors=jnp.asarray(PRIORS), bag_size=1), T, 1e-12)
    sizes = jnp.array([1.0, 2.0, 3.0, 8.0])
    w = losses.easy_llp_weights(jnp.asarray(T), priors=jnp.asarray(PRIORS), bag_size=sizes[:, None])
    close(w, np.asarray(sizes)[:, None] * (T - PRIORS) + PRIORS, 1e-12)
    close(w.sum(-1), 1, 1e-12)


@kinds
def test_easy_llp_is_weighted_cross_entropy(kind, x64):
    options = dict(priors=jnp.asarray(PRIORS))
    sizes = jnp.array([1.0, 2.0, 3.0, 8.0])
    w = losses.easy_llp_weights(jnp.asarray(T), bag_size=sizes[:, None], **options)
    cotangent = jnp.array([1.0, -0.5, 2.0, 0.3])
    f = lambda x: LLP(logits_of(x, kind), jnp.asarray(T), bag_size=sizes, weights=cotangent, **options)
    expected = lambda x: -cotangent * jnp.sum(w * jax.nn.log_softmax(x), -1)
    close(f(X), expected(X), 1e-12)
    close(*(jax.jit(jax.grad(lambda x, g=g: jnp.sum(g(x))))(jnp.asarray(X)) for g in (f, expected)), 1e-12)
    close(
        LLP(logits_of(X, kind), jnp.asarray(T), bag_size=1, **options),
        CE(jnp.asarray(X), jnp.asarray(T)),
        1e-12,
    )
    moved = LLP(jnp.asarray(X.T), jnp.asarray(T.T), bag_size=sizes, axis=0, **options)
    close(moved * cotangent, expected(X), 1e-12)
    summed = losses.weighted_sum(
        lambda l, t, k, axis=-1: LLP(l, t, bag_size=k, axis=axis, **options),
        logits_of(X, kind),
        jnp.asarray(T),
        sizes,
        weights=cotangent,
        chunk_size=2,
    )
    close(summed, expected(X).sum(), 1e-12)


def test_easy_llp_has_no_bias(x64):
    """The mean over all bags of two independent examples, weighted by their probability, is the supervised loss."""
    k, x = 2, X[:2]
    conditional = np.array(
        [[0.7, 0.2, 0.1], [0.3, 0.4, 0.3]]
    )  # of each example's label; the prior is their mean
    prior = conditional.mean(0)
    mean = 0.0
    # An example, its label, and another example of the bag, drawn from both.
    for i in range(2):
        for a in range(3):
            for b in range(3):
                alpha = (np.eye(3)[a] + np.eye(3)[b]) / k
                value = LLP(
                    jnp.asarray(x[i : i + 1]), jnp.asarray(alpha[None]), priors=jnp.asarray(prior), bag_size=k
                )
                mean += 0.5 * conditional[i, a] * prior[b] * value[0]
    close(mean, CE(jnp.asarray(x), jnp.asarray(conditional)).mean(), 1e-12)


def test_bad_easy_llp():
    x, t, p = (jnp.asarray(a, jnp.float32) for a in (X, T, PRIORS))
    for logits in (x, jaxsoft.linear_logits(x, jnp.eye(3))):
        f = lambda t=t, logits=logits, **o: LLP(logits, t, **{"priors": p, "bag_size": 2, **o})
        fails(["proportions", "(4, 3)", "(3,)"], ValueError, lambda: f(t[0]))
        fails(["proportions", "floating", "int32"], TypeError, lambda: f(jnp.ones((4, 3), int)))
        fails(["priors", "(3,)", "(4, 3)"], ValueError, lambda: f(priors=t))
        fails(["priors", "floating", "of type list"], TypeError, lambda: f(priors=[0.5, 0.3, 0.2]))
        fails(["bag_size", "> 0", "0"], ValueError, lambda: f(bag_size=0))
        fails(["bag_size", "(4,)", "(3,)"], ValueError, lambda: f(bag_size=p))
        fails(["weights", "(4,)", "(3,)"], ValueError, lambda: f(weights=p))
        fails(["where", "boolean", "float32"], TypeError, lambda: f(where=x))
    weights = losses.easy_llp_weights
    fails(["bag_size", "> 0", "-1"], ValueError, lambda: weights(t, priors=p, bag_size=-1))
    fails(["proportions", "number", "None"], TypeError, lambda: weights(None, priors=p, bag_size=2))
    fails(["broadcast", "(4, 3)", "(4,)"], ValueError, lambda: weights(t, priors=t[:, 0], bag_size=2))


# --- shrinking the class space -----------------------------------------------------------------------------


def shrink_reference(strong, weak, threshold):
    """Removes classes one after another, as the definition says."""
    order = np.argsort(-weak, kind="stable")
    p, z = weak[order], strong[order]
    if p[0] >= threshold:
        return 0.0
    for c in range(2, len(p)):
        if p[0] >= threshold * (p[0] + p[c:].sum()):
            kept = np.concatenate([z[:1], z[c:]])
            return p[0] * (np.log(np.exp(kept).sum()) - z[0])
    return 0.0


@kinds
def test_shrink_class_space(kind, x64):
    strong, weak = [[2.0, 1.0, 0.5, 0.1, -1.0]], jnp.array([[0.5, 0.3, 0.12, 0.05, 0.03]])
    close(SHRINK(logits_of(strong, kind), weak, threshold=0.9), 0.024294)
    rng = np.random.default_rng(1)
    x, p = 2 * rng.normal(size=(12, 6)), rng.dirichlet(np.full(6, 0.5), 12)
    for threshold in (0.6, 0.95, 0.999):
        values = jax.jit(lambda x, p: SHRINK(logits_of(x, kind), p, threshold=threshold))(x, p)
        close(values, [shrink_reference(a, b, threshold) for a, b in zip(x, p)], 1e-12)
    assert 0 < np.count_nonzero(SHRINK(logits_of(x, kind), jnp.asarray(p))) < 12
    f = jax.jit(lambda x, p: jnp.sum(jnp.arange(12) * SHRINK(logits_of(x, kind), p)))
    g_x, g_p = jax.grad(f, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(p))
    step = 1e-6 * rng.normal(size=x.shape)
    close((f(x + step, p) - f(x - step, p)) / 2e-6, jnp.vdot(g_x, step / 1e-6), 1e-6)
    assert not jnp.any(g_p)
    moved = SHRINK(jnp.asarray(x.T), jnp.asarray(p.T), axis=0)
    close(moved, SHRINK(jnp.asarray(x), jnp.asarray(p)), 1e-12)
    w = jnp.arange(12.0)
    close(SHRINK(logits_of(x, kind), jnp.asarray(p), weights=w), w * moved, 1e-12)


def test_shrink_class_space_edges():
    x, p = jnp.array([[2.0, 1.0, 0.5, 0.1, -1.0]]), jnp.array([[0.5, 0.3, 0.12, 0.05, 0.03]])
    assert SHRINK(x, jnp.array([[0.96, 0.01, 0.01, 0.01, 0.01]])) == 0  # certain
    assert SHRINK(x, p, threshold=0.99) == 0  # no class space is small enough
    assert SHRINK(x[:, :2], jnp.array([[0.6, 0.4]])) == 0  # a rival stays
    where = jnp.array([True, True, True, True, False])
    spoiled = x.at[0, 4].set(jnp.nan), p.at[0, 4].set(jnp.nan)
    f = jax.jit(lambda x, p: SHRINK(x, p, threshold=0.9, where=where))
    close(f(*spoiled), SHRINK(x[:, :4], p[:, :4], threshold=0.9))
    assert f(*spoiled) > 0
    g = jax.grad(lambda x: f(x, spoiled[1])[0])(spoiled[0])
    assert jnp.all(jnp.isfinite(g)) and g[0, 4] == 0 and jnp.any(g != 0)
    assert SHRINK(x, p, where=where & False) == 0
    assert SHRINK(x.astype(jnp.bfloat16), p.astype(jnp.bfloat16), threshold=0.9).dtype == jnp.float32


def test_bad_shrink_class_space():
    x, p = jnp.ones((4, 3)), jnp.asarray(T, jnp.float32)
    for logits in (x, jaxsoft.linear_logits(x, jnp.eye(3))):
        fails(["threshold", "> 0 and <= 1", "0.0"], ValueError, lambda l=logits: SHRINK(l, p, threshold=0.0))
        fails(["weak_probabilities", "(4, 3)", "(3,)"], ValueError, lambda l=logits: SHRINK(l, p[0]))
        fails(
            ["weak_probabilities", "floating", "int32"],
            TypeError,
            lambda l=logits: SHRINK(l, jnp.ones((4, 3), int)),
        )
        fails(["weights", "(4,)", "(3,)"], ValueError, lambda l=logits: SHRINK(l, p, weights=jnp.ones(3)))
        fails(["where", "boolean", "float32"], TypeError, lambda l=logits: SHRINK(l, p, where=p))
        fails(["axis", "[-2, 2)"], ValueError, lambda l=logits: SHRINK(l, p, axis=2))
