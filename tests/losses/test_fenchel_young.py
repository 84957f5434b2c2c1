"""Fenchel-Young losses: worked numbers, other implementations, their defining properties, streaming, edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import example, kinds, logits_of, values_and_gradient
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import losses

A, B, C = [2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2], [0.5, 0.2, 0.1]
SPARSEMAX, ENTMAX15, ENTMAX = losses.sparsemax_loss, losses.entmax15_loss, losses.entmax_loss


@kinds
def test_worked_numbers(kind, x64):
    values, gradient = values_and_gradient(SPARSEMAX, [A, B], [0, 3], [1.0, 1.0], kind)
    np.testing.assert_allclose(values, [0, 0.7225], atol=1e-6)
    np.testing.assert_allclose(gradient, [[0] * 5, [0, 0.85, 0, -0.85, 0]], atol=1e-6)
    values, gradient = values_and_gradient(SPARSEMAX, [C], [0], [1.0], kind)
    np.testing.assert_allclose(values, [0.143333], atol=1e-6)
    np.testing.assert_allclose(gradient, [[0.566667 - 1, 0.266667, 0.166667]], atol=1e-6)
    values, gradient = values_and_gradient(ENTMAX15, [A, B], [0, 3], [1.0, 1.0], kind)
    np.testing.assert_allclose(values, [0.064231, 0.831366], atol=1e-6)
    np.testing.assert_allclose(gradient[0], [0.814649 - 1, 0.162070, 0, 0, 0.023280], atol=1e-6)


@pytest.mark.table
@kinds
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
def test_the_entmax_package(alpha, kind, x64):
    torch, entmax = pytest.importorskip("torch"), pytest.importorskip("entmax")
    x, y, g = example(scale=1.0)
    values, gradient = values_and_gradient(ENTMAX, x, y, g, kind, alpha=alpha)
    t = torch.tensor(x, requires_grad=True)
    exact = {1.5: entmax.entmax15_loss, 2.0: entmax.sparsemax_loss}
    expected = exact.get(alpha, lambda x, y: entmax.entmax_bisect_loss(x, y, alpha))(t, torch.tensor(y))
    (expected * torch.tensor(g)).sum().backward()
    np.testing.assert_allclose(values, expected.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(gradient, t.grad.numpy(), atol=1e-12)


def test_optax(x64):
    x, y, g = example(scale=1.0)
    values, gradient = values_and_gradient(SPARSEMAX, x, y, g)
    expected, pullback = jax.vjp(
        lambda x: optax.losses.multiclass_sparsemax_loss(x, jnp.asarray(y)), jnp.asarray(x)
    )
    np.testing.assert_allclose(values, expected, atol=1e-13)
    np.testing.assert_allclose(gradient, pullback(jnp.asarray(g))[0], atol=1e-13)
    # Its general form leaves out the entropy of the labels.
    q = np.random.default_rng(1).dirichlet(np.ones(5), 6)
    general = optax.losses.make_fenchel_young_loss(jax.nn.logsumexp)
    expected = jax.vmap(general)(jnp.asarray(x), jnp.asarray(q)) + np.sum(q * np.log(q), -1)
    np.testing.assert_allclose(values_and_gradient(ENTMAX, x, q, g, alpha=1.0)[0], expected, atol=1e-13)


def negative_entropy(p, alpha):
    if alpha == 1:
        return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
    return (np.sum(p**alpha, -1) - 1) / (alpha * (alpha - 1))


@kinds
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_label_distributions(alpha, kind, x64):
    """By definition `Omega*(x) + Omega(q) - <q, x>`, with gradient p - q; 0 where q is the prediction itself."""
    x, _, g = example(scale=1.0)
    q = np.random.default_rng(1).dirichlet(np.ones(5), 6)
    q[0] = np.eye(5)[2]
    q[1] = [0.5, 0.5, 0, 0, 0]
    p = np.asarray(jaxsoft.entmax(jnp.asarray(x), alpha=alpha))
    values, gradient = values_and_gradient(ENTMAX, x, q, g, kind, alpha=alpha)
    expected = np.sum((p - q) * x, -1) - negative_entropy(p, alpha) + negative_entropy(q, alpha)
    np.testing.assert_allclose(values, expected, atol=1e-12)
    np.testing.assert_allclose(gradient, g[:, None] * (p - q), atol=1e-12)
    assert np.all(values > 0)
    np.testing.assert_allclose(
        values[0], values_and_gradient(ENTMAX, x, [2] * 6, g, kind, alpha=alpha)[0][0], atol=1e-12
    )
    values, gradient = values_and_gradient(ENTMAX, x, p, g, kind, alpha=alpha)
    np.testing.assert_allclose(values, np.zeros(6), atol=1e-12)
    np.testing.assert_allclose(gradient, np.zeros((6, 5)), atol=1e-12)


@kinds
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_margin(alpha, kind):
    """Zero, with gradient zero, just where the label leads by 1 / (alpha - 1): in float32, at logits of any size."""
    lead = 1 / (alpha - 1)
    for offset in (0.0, 4096.0):
        x = np.array([[lead, 0, -1, 0], [lead - 0.125, 0, -1, 0], [9, 1, 2, 0]], np.float32) + offset
        values, gradient = values_and_gradient(
            ENTMAX, x, [0, 0, 0], np.ones(3, np.float32), kind, alpha=alpha
        )
        assert np.all(values[[0, 2]] == 0) and np.all(gradient[[0, 2]] == 0)
        assert 0 < values[1] < 0.01 and gradient[1, 0] < 0 < gradient[1, 1]


def test_towards_cross_entropy(x64):
    x, y, g = example()
    exact = values_and_gradient(losses.cross_entropy, x, y, g)
    for alpha, tolerance in ((1.0, 1e-14), (1 + 1e-12, 1e-11), (1.002, 0.05), (1.02, 0.5)):
        for a, b in zip(values_and_gradient(ENTMAX, x, y, g, alpha=alpha), exact):
            np.testing.assert_allclose(a, b, atol=tolerance)
    near, far = (values_and_gradient(ENTMAX, x, y, g, alpha=a)[0] - exact[0] for a in (1.002, 1.004))
    np.testing.assert_allclose(2 * near, far, rtol=0.05)  # linear in alpha - 1


@kinds
def test_second_derivatives_and_alpha(kind, x64):
    """The threshold is a constant to the program, yet the Hessian is that of entmax, and alpha has its derivative.

    One kind of logits has class ids for labels, the other distributions.
    """
    x, y, g = (jnp.asarray(a) for a in example(scale=1.0))
    direction = jnp.cos(17 * x)

    @jax.jit
    def along(alpha):
        gradient = jax.grad(lambda x: g @ ENTMAX(logits_of(x, kind), y, alpha=alpha))
        slope = jax.jvp(lambda x: jaxsoft.entmax(x, alpha=alpha), (x,), (direction,))[1]
        return jax.jvp(gradient, (x,), (direction,))[1], slope

    for alpha in (1.4, 2.0):
        curvature, slope = along(alpha)
        np.testing.assert_allclose(curvature, g[:, None] * slope, atol=1e-11)
    q = jnp.asarray(np.random.default_rng(2).dirichlet(np.ones(5), 6))
    labels = y if kind == "dense" else q
    f = lambda a: g @ ENTMAX(logits_of(x, kind), labels, alpha=a)
    both = jax.jit(lambda a: (f(a), jax.grad(f)(a), jax.grad(jax.grad(f))(a), jax.jvp(f, (a,), (1.0,))[1]))
    value, first, second, forward = both(1.4)
    np.testing.assert_allclose(value, g @ ENTMAX(x, labels, alpha=1.4), rtol=1e-12)
    low, high = both(1.4 - 1e-5), both(1.4 + 1e-5)
    np.testing.assert_allclose([first, second], np.subtract(high[:2], low[:2]) / 2e-5, rtol=1e-6)
    np.testing.assert_allclose(forward, first, rtol=1e-12)


def test_the_derivative_with_respect_to_the_labels(x64):
    """`Omega'(q) - x + Omega*(x)`, also at q = 0."""
    x, _, _ = example(scale=1.0)
    q = jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(5), 6)).at[0, 0].set(0)
    gradient = jax.grad(lambda q: ENTMAX(jnp.asarray(x), q, alpha=1.6).sum())(q)
    conjugate = ENTMAX(jnp.asarray(x), jnp.zeros(6, int), alpha=1.6) + x[:, 0]
    np.testing.assert_allclose(gradient, q**0.6 / 0.6 - x + conjugate[:, None], atol=1e-12)


def test_no_logits_are_stored():
    n, d, v = 64, 8, 8192
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, d), (d, v)))
    y = jnp.asarray(rng.integers(0, v, n))

    def f(hidden, weight, dense):
        logits = jaxsoft.linear_logits(hidden, weight, block_size=256)
        return ENTMAX15(logits.dense() if dense else logits, y).sum()

    streamed, dense = (
        jax.jit(jax.value_and_grad(f, (0, 1)), static_argnums=2).lower(hidden, weight, how).compile()
        for how in (False, True)
    )
    assert streamed.memory_analysis().temp_size_in_bytes < n * v * 4 / 2
    for a, b in zip(*(jax.tree.leaves(run(hidden, weight)) for run in (streamed, dense))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_rows_over_two_devices(x64):
    """Each device searches its own thresholds, in as many steps as it needs."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(4, 3)), rng.normal(size=(3, 7))
    hidden[2:] *= 5
    y = jnp.asarray(rng.integers(0, 7, 4))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(hidden, weight, y):
        return ENTMAX(jaxsoft.linear_logits(hidden, weight, block_size=3), y, alpha=1.3)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
    for a, b in zip(
        *(
            jax.tree.leaves(
                jax.jit(jax.value_and_grad(lambda h, w, f=f: f(h, w, y).sum(), (0, 1)))(hidden, weight)
            )
            for f in (sharded, local)
        )
    ):
        np.testing.assert_allclose(a, b, atol=1e-12)


@kinds
@pytest.mark.parametrize(("soft", "alpha"), [(False, 2.0), (True, 2.0), (True, 1.0)])
def test_absent_labels_and_scores_that_are_not_numbers(soft, alpha, kind):
    x, y, g = example(n=4, scale=1.0)
    x, g = x.astype(np.float32), np.ones(4, np.float32)
    where = np.ones((4, 5), bool)
    where[1, y[1]] = False  # the label
    where[2, np.arange(5) != y[2]] = False  # all others
    where[3] = False
    labels = np.eye(5, dtype=np.float32)[y] if soft else y
    if soft:
        labels[3] = 0.2
    values, gradient = values_and_gradient(ENTMAX, x, labels, g, kind, where=where, alpha=alpha)
    assert values[1] == np.inf and values[2] == 0 and values[3] == 0
    assert np.isfinite(values[0]) and np.isfinite(gradient).all() and np.all(gradient[3] == 0)
    if kind == "dense":  # a NaN that counts is not hidden, and stays in its row
        x[0, (y[0] + 1) % 5] = np.nan
        values, gradient = values_and_gradient(ENTMAX, x, labels, g, alpha=alpha)
        assert np.isnan(values[0]) and np.isfinite(values[1:]).all() and np.isfinite(gradient[1:]).all()
