"""Lion-K: equals Lion, worked numbers, the table of functions, constraints, the majority vote, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, steps_of, torch_trajectory, trajectory
from jax.sharding import PartitionSpec as P

from jaxsoft import optimizers as o

THETA = (1.0, -2.0)
GRADS = ((0.5, 1.0), (-0.25, 4.0), (0.1, -0.2))


def worked(tx):
    with jax.enable_x64(True):
        out, state = steps_of(tx, jnp.array(THETA), jnp.array(GRADS))
        return np.asarray(out), np.asarray(optax.tree.get(state, "mu"))


def test_worked_example_of_lion():
    out, mu = worked(o.lion_k(0.1, weight_decay=0.1))
    close(out, [[0.89, -2.08], [0.9811, -2.1592], [0.871289, -2.237608]], 1e-12)
    close(mu, [0.0034255, 0.047401], 1e-12)


@pytest.mark.parametrize(
    ("kappa", "expected"),
    [
        (
            "l2",
            [
                [0.94527864045, -2.0694427191],
                [0.940831794867, -2.148622916096],
                [0.887424568474, -2.216936999049],
            ],
        ),
        (o.kappa_huber(0.05), [[0.89, -2.08], [0.9221, -2.1592], [0.888469, -2.187428]]),
    ],
)
def test_worked_examples(kappa, expected):
    out, _ = worked(o.lion_k(0.1, kappa=kappa, weight_decay=0.1))
    close(out, expected, 2e-11)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5), (0.9, 0.3)])
def test_equals_optax_lion(b1, b2):
    with jax.enable_x64(True):
        grads = jax.random.normal(jax.random.key(0), (100, 31), jnp.float64)
        params = jax.random.normal(jax.random.key(1), (31,), jnp.float64)
        ours, state = steps_of(o.lion_k(0.01, b1, b2, weight_decay=0.1), params, grads)
        theirs, reference = steps_of(optax.lion(0.01, b1, b2, weight_decay=0.1), params, grads)
        close(ours, theirs, 1e-12)  # one sign would make a difference of 0.02
        assert jax.tree.structure(state) == jax.tree.structure(reference)  # a checkpoint of either fits both
        np.testing.assert_allclose(state[0].mu, reference[0].mu, rtol=1e-10)


def test_equals_pytorch_optimizer():
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(17), rng.standard_normal((100, 17))
    make = lambda po, params: po.Lion(params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    theirs = torch_trajectory(make, start, grads)
    with jax.enable_x64(True):
        ours = trajectory(o.lion_k(0.01, weight_decay=0.1), jnp.asarray(start), jnp.asarray(grads))
    np.testing.assert_allclose(ours[-1], theirs[-1], rtol=1e-10)


def test_direction_uses_the_momentum_before_it_is_rounded():
    """In bfloat16 the rounding of the momentum is as large as the gradient's share of the direction."""
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((30, 2000)), jnp.float32)
    tx = o.scale_by_lion_k(mu_dtype=jnp.bfloat16)
    state = tx.init(grads[0])
    for g in grads:
        m = state.mu.astype(jnp.float32)
        c = 0.9 * m + 0.1 * g
        u, state = tx.update(g, state)
        clear = np.abs(c) > 1e-6
        np.testing.assert_array_equal(u[clear], np.sign(c[clear]))
        np.testing.assert_array_equal(
            state.mu.astype(jnp.float32), (0.99 * m + 0.01 * g).astype(jnp.bfloat16).astype(jnp.float32)
        )


KAPPAS = {
    "l1": ("l1", lambda x: jnp.sum(jnp.abs(x))),
    "l2": ("l2", lambda x: jnp.sqrt(jnp.sum(x**2))),
    "sq": ("sq", lambda x: jnp.sum(x**2) / 2),
    "lp1.5": (o.kappa_lp(1.5), lambda x: jnp.sum(jnp.abs(x) ** 1.5) ** (1 / 1.5)),
    "lp5": (o.kappa_lp(5), lambda x: jnp.sum(jnp.abs(x) ** 5) ** (1 / 5)),
    "linf": ("linf", lambda x: jnp.max(jnp.abs(x))),
    "huber": (
        o.kappa_huber(0.3),
        lambda x: jnp.sum(jnp.where(jnp.abs(x) < 0.3, x * x / 0.6, jnp.abs(x) - 0.15)),
    ),
    "soft": (o.kappa_soft(0.3), lambda x: jnp.sum(jax.nn.relu(jnp.abs(x) - 0.3))),
    "group_l2": ("group_l2", lambda x: jnp.sum(jnp.sqrt(jnp.sum(x**2, axis=-1)))),
    "group_l2_columns": (o.kappa_group_l2(0), lambda x: jnp.sum(jnp.sqrt(jnp.sum(x**2, axis=0)))),
    "entropic": (o.kappa_entropic(3.0), lambda x: jnp.sum(jnp.log(jnp.cosh(3 * x))) / 3),
    "nuclear": ("nuclear", lambda x: jnp.sum(jnp.linalg.svd(x, compute_uv=False))),
}
each_kappa = pytest.mark.parametrize("name", KAPPAS)


def direction(kappa, c):
    """The gradient of kappa at `c`, through the transform: with b1 = 0 the interpolation is the gradient."""
    tx = o.scale_by_lion_k(b1=0.0, kappa=kappa)
    return tx.update(c, tx.init(c))[0]


@each_kappa
def test_kappa_is_the_gradient_of_its_function(name):
    kappa, function = KAPPAS[name]
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(3), (4, 3), jnp.float64)
        np.testing.assert_allclose(direction(kappa, x), jax.grad(function)(x), rtol=1e-9, atol=1e-10)


@each_kappa
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 3)])
def test_kappa_is_a_monotone_map_that_keeps_shapes(name, shape):
    kappa, _ = KAPPAS[name]
    x, y = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    u, v = direction(kappa, x), direction(kappa, y)
    assert u.shape == shape and bool(jnp.all(jnp.isfinite(u)))
    assert float(jnp.sum((u - v) * (x - y))) >= -1e-5  # gradients of convex functions are monotone
    np.testing.assert_array_equal(direction(kappa, jnp.zeros(shape)), jnp.zeros(shape))
    np.testing.assert_allclose(direction(kappa, -x), -u, rtol=1e-5, atol=1e-6)


def test_ties_and_extremes():
    np.testing.assert_allclose(direction("linf", jnp.array([2.0, -2.0, 1.0])), [0.5, -0.5, 0.0])
    for scale in (1e-12, 1e12):
        x = scale * jnp.array([3.0, -4.0, 0.0])
        np.testing.assert_allclose(direction("l2", x), [0.6, -0.8, 0.0], rtol=1e-6)
        np.testing.assert_allclose(direction(o.kappa_lp(2.0), x), [0.6, -0.8, 0.0], rtol=1e-6)
        assert jnp.all(jnp.isfinite(direction(o.kappa_lp(60.0), x)))


def test_nuclear():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    low_rank = x[:, :1] @ x[:1]
    for matrix, rank in ((x, 4), (x.T, 4), (low_rank, 1)):
        u = direction("nuclear", matrix)
        s = np.linalg.svd(u, compute_uv=False)
        np.testing.assert_allclose(s, np.arange(len(s)) < rank, atol=1e-5)
        fast = direction(o.kappa_nuclear(steps=5), matrix)
        assert float(jnp.vdot(fast, u) / jnp.linalg.norm(fast) / jnp.linalg.norm(u)) > 0.95
    batch = jnp.stack([x, 2 * x - 1])
    np.testing.assert_allclose(direction("nuclear", batch)[1], direction("nuclear", batch[1]), atol=1e-5)


def test_accepts_any_callable():
    np.testing.assert_allclose(direction(lambda c: 2 * c, jnp.array([1.0, -3.0])), [2.0, -6.0])


@pytest.mark.parametrize(
    ("kappa", "norm"),
    [
        ("l1", lambda x: jnp.max(jnp.abs(x))),
        ("l2", jnp.linalg.norm),
        ("linf", lambda x: jnp.sum(jnp.abs(x))),
        (o.kappa_lp(3.0), lambda x: jnp.sum(jnp.abs(x) ** 1.5) ** (1 / 1.5)),
    ],
)
def test_constraint_set_is_reached_exponentially_and_never_left(kappa, norm):
    """The distance of `wd params` to the dual ball shrinks by `1 - lr wd` per step for any gradients."""
    lr, wd, steps = 0.1, 0.5, 120
    tx = o.lion_k(lr, kappa=kappa, weight_decay=wd)
    params = 20 * jax.random.normal(jax.random.key(0), (8,))
    grads = jax.random.normal(jax.random.key(1), (steps, 8)) * 10.0 ** jnp.linspace(-4, 4, steps)[:, None]
    out = trajectory(tx, params, grads)
    size = np.array([float(norm(wd * p)) for p in (params, *out)])
    bound = 1 + (1 - lr * wd) ** np.arange(steps + 1) * max(size[0] - 1, 0)
    assert np.all(size <= bound * (1 + 1e-5))
    inside = np.flatnonzero(size <= 1)
    if len(inside):
        assert np.all(size[inside[0] :] <= 1 + 1e-5)


def test_majority_vote():
    tx = o.scale_by_lion_k(axis_name="workers")
    grads = jnp.array([[1.0, -1, 2, 0, 1], [1, -1, -2, 0, jnp.nan], [-1, -1, 2, 0, -1], [1, 5, -2, 0, -1]])
    state = jax.vmap(tx.init)(grads)
    u, state = jax.vmap(tx.update, axis_name="workers")(grads, state)
    np.testing.assert_array_equal(u, jnp.broadcast_to(jnp.array([1.0, -1, 0, 0, -1]), (4, 5)))  # NaN abstains
    np.testing.assert_allclose(state.mu[:, 0], 0.01 * grads[:, 0], rtol=1e-6)  # of each worker's own gradient


@pytest.mark.parametrize("workers", [1, 2, 128, 255, 256])
def test_many_workers_do_not_overflow_the_vote(workers):
    """All agree, but in the last column half of them are against one more, or all cancel."""
    half = np.where(np.arange(workers) < workers / 2, -1.0, 1.0)
    grads = jnp.stack([jnp.ones(workers), -jnp.ones(workers), jnp.asarray(half, jnp.float32)], axis=1)
    tx = o.scale_by_lion_k(axis_name="workers")
    u, _ = jax.vmap(tx.update, axis_name="workers")(grads, jax.vmap(tx.init)(grads))
    np.testing.assert_array_equal(u, np.broadcast_to([1, -1, np.sign(half.sum())], u.shape))


def test_mean_of_directions():
    grads = jnp.array([[3.0, 4.0], [0.0, -5.0]])
    tx = o.scale_by_lion_k(kappa="l2", axis_name="workers", vote="mean")
    u, _ = jax.vmap(tx.update, axis_name="workers")(grads, jax.vmap(tx.init)(grads))
    np.testing.assert_allclose(u[0], [0.3, -0.1], rtol=1e-6)


def test_one_worker_is_lion():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    grads = jax.random.normal(jax.random.key(0), (5, 7))
    params = jnp.ones(7)
    tx = o.lion_k(0.1, axis_name="x")
    # The momentum is a worker's own: it varies over the mesh, unlike the parameters.
    state = jax.tree.map(lambda x: x[None], tx.init(params))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P("x"), P()), out_specs=(P(), P("x")))
    def step(g, state, params):
        g, state = jax.tree.map(lambda x: x[0], (g, state))
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), jax.tree.map(lambda x: x[None], state)

    expected = trajectory(optax.lion(0.1), params, grads)
    for g, e in zip(grads, expected):
        params, state = step(g[None], state, params)
        np.testing.assert_allclose(params, e, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.lion_k(-0.1), ValueError, "learning_rate .* >= 0, got -0.1"),
        (lambda: o.lion_k("fast"), TypeError, "learning_rate .* number"),
        (lambda: o.lion_k(0.1, weight_decay=-1.0), ValueError, "weight_decay"),
        (lambda: o.lion_k(0.1, b1=1.0), ValueError, "b1 .* < 1, got 1.0"),
        (lambda: o.scale_by_lion_k(b2=0.0), ValueError, "b2 .* > 0"),
        (lambda: o.scale_by_lion_k(b2=float("nan")), ValueError, "b2"),
        (lambda: o.scale_by_lion_k(kappa="l3"), ValueError, "kappa .*'l1'.*kappa_lp.*got 'l3'"),
        (lambda: o.scale_by_lion_k(kappa="huber"), ValueError, "kappa_huber"),
        (lambda: o.scale_by_lion_k(vote="all"), ValueError, "vote"),
        (lambda: o.scale_by_lion_k(kappa="l2", axis_name="x"), ValueError, "kappa must be 'l1'.*'l2'"),
        (lambda: o.scale_by_lion_k(mu_dtype=jnp.int32), TypeError, "mu_dtype .* int32"),
        (lambda: o.kappa_lp(1.0), ValueError, "p .* > 1"),
        (lambda: o.kappa_huber(0.0), ValueError, "e .* > 0"),
        (lambda: o.kappa_soft(-1.0), ValueError, "e .* >= 0"),
        (lambda: o.kappa_entropic(0.0), ValueError, "a .* > 0"),
        (lambda: o.kappa_nuclear(0), ValueError, "steps .* >= 1"),
        (lambda: direction(jnp.sum, jnp.ones(3)), ValueError, "kappa must keep the shape"),
        (lambda: direction("l1", jnp.ones(3, jnp.complex64)), TypeError, "real"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
