"""Shampoo, M-FAC and the regularized Newton step: worked numbers, oracles, limits, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, torch_trajectory, trajectory

from jaxsoft import optimizers as o
from jaxsoft.optimizers import second_order

G = np.array([[0.6, -0.3, 0.2], [0.8, 0.4, -0.1]])


def inverse_power(a, exponent, ridge=0.0):
    values, vectors = np.linalg.eigh(a)
    return vectors @ np.diag((values + ridge) ** -exponent) @ vectors.T


def directions(tx, grads):
    """The directions of a sequence of gradients, stacked."""

    def step(state, g):
        u, state = tx.update(g, state)
        return state, u

    return jax.jit(lambda grads: jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)[1])(
        grads
    )


# Shampoo.


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (
            0.25,
            [
                [0.653109140422, -0.660332192553, 0.370684457047],
                [0.751372155706, 0.626019294609, -0.208657577143],
            ],
        ),
        (
            0.5,
            [
                [0.867391032589, -1.536170747038, 0.794431491621],
                [0.762008181470, 1.207860513792, -0.474226883252],
            ],
        ),
    ],
)
def test_shampoo_worked_example(x64, exponent, expected):
    eps = 1e-6 / np.linalg.norm(G, 2) ** 2  # the worked numbers have a ridge of 1e-6, ours is relative
    tx = o.scale_by_shampoo(eps=eps, exponent=exponent)
    u = tx.update(jnp.asarray(G), tx.init(G))[0]
    if exponent == 0.5:
        # There the trace is that of L with the ridge on its diagonal or without: a difference of 1e-6.
        np.testing.assert_allclose(u, expected, rtol=2e-6)
    else:
        close(u, expected, 1e-10)


def test_shampoo_equals_pytorch_optimizer(x64):
    grads = np.random.default_rng(0).standard_normal((100, 4, 3))
    make = lambda po, params: po.Shampoo(params, lr=1.0, matrix_eps=1e-12)
    theirs = -np.diff(torch_trajectory(make, np.zeros((4, 3)), grads), axis=0, prepend=0.0)
    ours = directions(o.scale_by_shampoo(eps=1e-13, precondition_every=1), jnp.asarray(grads))
    # The first three statistics are singular (a sum of fewer matrices than they have rows).
    np.testing.assert_allclose(ours[3:], theirs[3:], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("b2", [None, 0.9])
def test_shampoo_with_half_exponent_is_the_formula(x64, b2):
    grads = np.random.default_rng(1).standard_normal((12, 3, 2))
    tx = o.scale_by_shampoo(b2, 1e-12, exponent=0.5, precondition_every=1)
    ours = directions(tx, jnp.asarray(grads))
    weight = np.ones(12) if b2 is None else b2 ** np.arange(12)[::-1] * (1 - b2) / (1 - b2**12)
    left = np.einsum("t,tab,tcb->ac", weight, grads, grads)
    right = np.einsum("t,tab,tac->bc", weight, grads, grads)
    expected = np.sqrt(np.trace(left)) * inverse_power(left, 0.5) @ grads[-1] @ inverse_power(right, 0.5)
    np.testing.assert_allclose(ours[-1], expected, rtol=1e-8)


def test_half_exponent_is_adagrad_for_a_kronecker_product(x64):
    """Where the sum of outer products is a Kronecker product, the trace-normalized direction is full Adagrad's."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((3, 3)), rng.standard_normal((2, 2))
    basis = np.eye(6).reshape(6, 3, 2)
    grads = np.einsum("ab,tbc,cd->tad", a, basis, b)
    ours = directions(o.scale_by_shampoo(eps=1e-14, exponent=0.5, precondition_every=1), jnp.asarray(grads))[
        -1
    ]
    flat = grads.reshape(6, 6)
    expected = inverse_power(flat.T @ flat, 0.5) @ flat[-1]
    np.testing.assert_allclose(ours.ravel(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kwargs", [{}, {"exponent": 0.5}, {"b2": 0.9, "exponent": 0.3}, {"max_dim": 2}])
def test_shampoo_does_not_depend_on_the_scale_of_the_gradients(x64, kwargs):
    grads = {
        "matrix": jax.random.normal(jax.random.key(0), (5, 3, 2)),
        "vector": jax.random.normal(jax.random.key(1), (5, 3)),
    }
    tx = o.scale_by_shampoo(precondition_every=2, **kwargs)
    scaled = directions(tx, jax.tree.map(lambda g: 1e-5 * g, grads))
    chex.assert_trees_all_close(scaled, directions(tx, grads), rtol=1e-9)


def test_without_trace_the_half_exponent_scales_inversely(x64):
    tx = o.scale_by_shampoo(exponent=0.5, trace_normalize=False)
    u = lambda g: tx.update(g, tx.init(g))[0]
    np.testing.assert_allclose(u(jnp.asarray(10 * G)), u(jnp.asarray(G)) / 10, rtol=1e-9)
    np.testing.assert_allclose(
        u(jnp.asarray(G)) * np.linalg.norm(G),
        o.scale_by_shampoo(exponent=0.5).update(jnp.asarray(G), tx.init(G))[0],
        rtol=1e-9,
    )


def test_shampoo_keeps_its_roots_between_refreshes():
    grads = jax.random.normal(jax.random.key(0), (7, 3, 2))
    tx, fresh = o.scale_by_shampoo(precondition_every=3), o.scale_by_shampoo(precondition_every=1)
    state, fresh_state = tx.init(grads[0]), fresh.init(grads[0])
    step, fresh_step = jax.jit(tx.update), jax.jit(fresh.update)
    for t, g in enumerate(grads):
        old = state.left_root
        _, state = step(g, state)
        _, fresh_state = fresh_step(g, fresh_state)
        np.testing.assert_allclose(state.left, fresh_state.left, rtol=1e-6)
        if t < 3 or t == 5:
            np.testing.assert_allclose(state.left_root, fresh_state.left_root, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(state.left_root, old)


def test_shampoo_of_a_vector_is_adagrad(x64):
    grads = jax.random.normal(jax.random.key(0), (6, 5))
    adagrad = optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)
    np.testing.assert_allclose(
        directions(o.scale_by_shampoo(), grads), directions(adagrad, grads), rtol=1e-12
    )
    rms = optax.scale_by_rms(0.9, eps=0.0, bias_correction=True)
    np.testing.assert_allclose(directions(o.scale_by_shampoo(0.9), grads), directions(rms, grads), rtol=1e-12)
    np.testing.assert_allclose(
        directions(o.scale_by_shampoo(0.9, max_dim=1), grads.reshape(6, 5, 1).repeat(2, -1))[..., 0],
        directions(rms, grads),
        rtol=1e-12,
    )


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
def test_shampoo_of_a_long_side(x64, shape):
    """Only the short side is whitened: the first direction is the orthogonal factor."""
    g = jax.random.normal(jax.random.key(0), shape)
    tx = o.scale_by_shampoo(eps=1e-13, max_dim=3, exponent=0.5)
    state = tx.init(g)
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    np.testing.assert_allclose(tx.update(g, state)[0], u @ vt, atol=1e-9)
    assert sorted(x.shape for x in (state.left, state.right)) == [(), (2, 2)]


def test_shampoo_of_a_batch_is_each_matrix():
    g = jax.random.normal(jax.random.key(0), (3, 4, 2))
    tx = o.scale_by_shampoo(grafting="diagonal", eps=1e-3)
    whole, _ = tx.update(g, tx.init(g))
    for x, u in zip(g, whole):
        np.testing.assert_allclose(tx.update(x, tx.init(x))[0], u, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grafting", ["sgd", "diagonal"])
def test_grafting_gives_the_other_norm_and_our_direction(x64, grafting):
    grads = jax.random.normal(jax.random.key(0), (4, 3, 2))
    plain = directions(o.scale_by_shampoo(0.9), grads)
    ours = directions(o.scale_by_shampoo(0.9, grafting=grafting), grads)
    rms = optax.scale_by_rms(0.9, eps=0.0, bias_correction=True)
    other = grads if grafting == "sgd" else directions(rms, grads)
    norm = lambda x: jnp.linalg.norm(x, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(ours, plain / norm(plain) * norm(other), rtol=1e-9)


def test_shampoo_momentum_is_optax_ema():
    grads = jax.random.normal(jax.random.key(0), (6, 3, 2))
    chain = optax.chain(o.scale_by_shampoo(), optax.ema(0.8))
    ours = directions(o.scale_by_shampoo(b1=0.8), grads)
    np.testing.assert_allclose(ours, directions(chain, grads), rtol=2e-5)


def test_shampoo_solves_badly_scaled_least_squares_sooner_than_adagrad():
    rng = np.random.default_rng(0)
    scale = lambda n: jnp.asarray(
        np.linalg.qr(rng.standard_normal((n, n)))[0] * np.logspace(0, -1.5, n), jnp.float32
    )
    a, b, goal = scale(6), scale(5), jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    loss = lambda w: jnp.sum((a @ (w - goal) @ b) ** 2)

    def train(direction):
        tx = optax.chain(direction, optax.scale_by_learning_rate(optax.linear_schedule(0.3, 0, 300)))

        def step(carry, _):
            w, state = carry
            u, state = tx.update(jax.grad(loss)(w), state, w)
            return (w + u, state), None

        w = jnp.zeros_like(goal)
        return loss(jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), None, 300)[0][0])(w))

    ours = train(o.scale_by_shampoo(precondition_every=5, grafting="diagonal"))
    assert ours < 0.1 * train(optax.scale_by_rss(initial_accumulator_value=0.0))


@pytest.mark.parametrize("values", [(3.0, 1.0, 0.2), (2.0, 2.0, 2.0), (1.0, 1.0 + 1e-9, 3.0)])
def test_inverse_power_has_the_derivative_of_finite_differences(x64, values):
    """Also at equal eigenvalues, where that of the eigenvectors is infinite."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    a = jnp.asarray(q @ np.diag(values) @ q.T)
    da = np.random.default_rng(1).standard_normal((3, 3))
    direction = (jnp.asarray(da + da.T), 0.3, 0.02)
    if values[0] == values[1]:  # the largest eigenvalue, of which the ridge is a multiple, has a kink there
        direction = (jnp.diag(jnp.ones(3)), 0.3, 0.02)
    f = lambda h: second_order._inverse_power(
        a + h * direction[0], 0.4 + h * direction[1], 0.1 + h * direction[2]
    )
    h = 1e-6
    numeric = (f(h) - f(-h)) / (2 * h)
    np.testing.assert_allclose(jax.jvp(f, (0.0,), (1.0,))[1], numeric, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jacrev(f)(0.0), numeric, rtol=1e-5, atol=1e-7)


def test_hyper_gradient_through_shampoo_is_finite_differences(x64):
    grads = jax.random.normal(jax.random.key(0), (3, 3, 2))
    weights = jax.random.normal(jax.random.key(1), (3, 2))
    tx = o.scale_by_shampoo(exponent=0.5, eps=0.1, precondition_every=2)

    @jax.jit
    def objective(scale):
        return jnp.sum(directions(tx, grads * jnp.array([1.0, scale, 1.0])[:, None, None])[-1] * weights)

    numeric = (objective(1.5 + 1e-5) - objective(1.5 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(objective)(1.5), numeric, rtol=1e-6)


@pytest.mark.parametrize(("factory", "static"), [(o.shampoo, "max_dim"), (o.scale_by_mfac, "window")])
def test_second_order_with_injected_hyperparameters(factory, static):
    args = (0.1,) if factory is o.shampoo else ()
    injected = optax.inject_hyperparams(factory, static_args=(static,))(*args)
    plain = factory(*args)
    p = g = jax.random.normal(jax.random.key(0), (3, 2))
    ours = jax.jit(injected.update)(g, injected.init(p), p)[0]
    np.testing.assert_allclose(ours, plain.update(g, plain.init(p), p)[0], rtol=1e-4)


# SOAP.


@pytest.mark.parametrize(("shape", "max_dim"), [((4, 4), 10), ((7, 3), 5)])
def test_soap_equals_pytorch_optimizer(x64, shape, max_dim):
    """The second leaf has a side that is too long for a matrix.

    The first gradient has as many singular values as each matrix has rows: others leave a part of a basis to chance.
    """
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(shape), rng.standard_normal((16, *shape))
    make = lambda po, params: po.SOAP(
        params, lr=0.1, betas=(0.8, 0.9), eps=0.01, weight_decay=0.0, precondition_frequency=3,
        max_precondition_dim=max_dim,
    )  # fmt: skip
    theirs = torch_trajectory(make, start, grads)
    tx = o.soap(0.1, 0.8, 0.9, 0.01, precondition_every=3, max_dim=max_dim)
    ours = trajectory(tx, jnp.asarray(start), jnp.asarray(grads))
    assert np.all(ours[0] == start)  # the first step only sets the basis
    # Its QR decomposition is in float32.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(ours[:4], theirs[:4], atol=1e-9)


def test_soap_of_a_vector_is_adam_one_step_later_and_of_a_batch_each_matrix(x64):
    grads = jnp.asarray(np.random.default_rng(1).standard_normal((7, 2, 3, 4)))
    tx = o.scale_by_soap(eps=0.0, precondition_every=2)

    @jax.jit
    def run(grads):
        params = {"batch": grads, "one": grads[:, 1], "vector": grads[:, 0, 0]}

        def step(state, g):
            u, state = tx.update(g, state)
            return state, u

        return jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], params)), params)[1]

    u = run(grads)
    close(u["batch"][:, 1], u["one"], 1e-10)
    adam = directions(optax.scale_by_adam(0.95, 0.95, eps=0.0), grads[1:, 0, 0])
    close(u["vector"], np.concatenate([np.zeros((1, 4)), adam]), 1e-10)


def test_soap_is_adam_in_a_basis_that_diagonalizes_the_gradients(x64):
    """Gradients `U diag(d) V^T` with fixed U and V: Adam on d, whatever the bases of the parameters."""
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(2))
    d = np.array([4.0, 2.0, 1.0, 0.5]) * (1 + 0.1 * rng.standard_normal((9, 4)))
    grads = np.einsum("ij,tj,kj->tik", u, d, v)
    ours = directions(o.scale_by_soap(precondition_every=2), jnp.asarray(grads))
    adam = directions(optax.scale_by_adam(0.95, 0.95, eps=0.0), jnp.asarray(d[1:]))
    close(ours[1:], np.einsum("ij,tj,kj->tik", u, adam, v), 1e-6)


# M-FAC.


def test_mfac_worked_example(x64):
    """F^-1 x is a third gradient's direction, less its own part: the solve with the window of the example."""
    window, x, m, damping = np.array([[0.5, 1.0], [-0.25, 4.0]]), np.array([1.0, 1.0]), 2, 0.1
    fisher = damping * np.eye(2) + window.T @ window / m
    np.testing.assert_allclose(np.linalg.solve(fisher, x), [4.133099824869, 0.236427320490], atol=1e-11)
    ours = directions(o.scale_by_mfac(m, damping), jnp.asarray(window))[-1]
    np.testing.assert_allclose(ours, np.linalg.solve(fisher, window[-1]), rtol=1e-11)


def test_mfac_is_the_inverse_of_the_damped_fisher_matrix(x64):
    grads = np.random.default_rng(0).standard_normal((100, 7))
    m, damping = 5, 0.05
    tree = {"a": jnp.asarray(grads[:, :6].reshape(100, 2, 3)), "b": (jnp.asarray(grads[:, 6]), None)}
    ours = directions(o.scale_by_mfac(m, damping), tree)
    ours = np.concatenate([ours["a"].reshape(100, 6), ours["b"][0][:, None]], axis=1)
    for t in range(100):
        window = grads[max(0, t - m + 1) : t + 1]
        fisher = damping * np.eye(7) + window.T @ window / m
        np.testing.assert_allclose(ours[t], np.linalg.solve(fisher, grads[t]), rtol=1e-9, atol=1e-10)


def test_mfac_is_the_rank_one_recursion_of_the_paper(x64):
    grads = np.random.default_rng(1).standard_normal((4, 6))
    inverse = np.eye(6) / 0.1
    for g in grads:
        h = inverse @ g
        inverse -= np.outer(h, h) / (4 + g @ h)
    ours = directions(o.scale_by_mfac(4, 0.1), jnp.asarray(grads))[-1]
    np.testing.assert_allclose(ours, inverse @ grads[-1], rtol=1e-10)


def test_mfac_with_large_damping_is_the_gradient():
    g = jax.random.normal(jax.random.key(0), (5, 3))
    np.testing.assert_allclose(directions(o.scale_by_mfac(3, 1e6), g), g / 1e6, rtol=1e-4)


def test_mfac_in_float32_is_accurate_for_small_damping():
    """The usual formula subtracts two numbers 1e7 times larger than the result."""
    grads = np.random.default_rng(0).standard_normal((8, 50))
    ours = directions(o.scale_by_mfac(4, 1e-5), jnp.asarray(grads, jnp.float32))[-1]
    window = grads[-4:]
    exact = np.linalg.solve(1e-5 * np.eye(50) + window.T @ window / 4, grads[-1])
    close(ours, exact, 1e-4 * np.abs(exact).max())


def test_mfac_stays_finite_without_effective_damping():
    """Equal large gradients: the products are singular up to rounding far above the damping."""
    grads = jnp.full((6, 40), 1e4)
    ours = directions(o.scale_by_mfac(4, 1e-12), grads)
    assert bool(jnp.all(jnp.isfinite(ours)))
    np.testing.assert_allclose(ours[-1], 2.5e-6, rtol=0.1)


# Newton.


def test_newton_solves_a_quadratic_in_one_step():
    hessian = jnp.array([[4.0, 1.0], [1.0, 2.0]])
    goal = {"a": jnp.array([1.0, -2.0]), "none": None}
    loss = lambda p: 0.5 * (p["a"] - goal["a"]) @ hessian @ (p["a"] - goal["a"]) + 3.0
    start = {"a": jnp.array([5.0, 5.0]), "none": None}
    params, radius, value = jax.jit(lambda p: o.gradient_regularized_newton_step(loss, p, jnp.inf))(start)
    chex.assert_trees_all_close(params, goal, atol=1e-5)
    assert float(value) == pytest.approx(3.0) and np.isinf(radius)


def test_newton_step_is_the_damped_solve(x64):
    hessian, g, radius = np.array([[4.0, 1.0], [1.0, 2.0]]), np.array([3.0, -1.0]), 0.7
    loss = lambda x: 0.5 * x @ jnp.asarray(hessian) @ x + x @ jnp.asarray(g)
    new, next_radius, value = o.gradient_regularized_newton_step(loss, jnp.zeros(2), radius, cg_tol=1e-14)
    step = np.linalg.solve(hessian + np.linalg.norm(g) / radius * np.eye(2), g)
    np.testing.assert_allclose(new, -step, rtol=1e-12)
    assert next_radius == 1.4 and float(value) == pytest.approx(float(loss(-step)))
    assert np.linalg.norm(step) <= radius


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_newton_fits_softmax_regression(x64, curvature):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((30, 3))), rng.integers(0, 4, 30)
    logits = lambda w: x @ w
    loss = lambda w: (
        jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(w), y)) + 0.01 * jnp.sum(w * w)
    )

    def product(w, v):
        p = jax.nn.softmax(logits(w))
        u = x @ v
        return x.T @ (p * (u - jnp.sum(p * u, axis=-1, keepdims=True))) / 30 + 0.02 * v

    step = jax.jit(
        lambda w, r: o.gradient_regularized_newton_step(
            loss, w, r, curvature=None if curvature == "hessian" else product, cg_tol=1e-12
        )
    )
    w, radius, previous = jnp.zeros((3, 4)), 1.0, np.inf
    for _ in range(12):
        w, radius, value = step(w, radius)
        assert value <= previous + 1e-12  # the loss is computed in two places, fused differently
        previous = value
    assert float(jnp.linalg.norm(jax.grad(loss)(w))) < 1e-9


def test_newton_never_increases_a_loss_that_is_not_convex():
    loss = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    step = jax.jit(lambda x, r: o.gradient_regularized_newton_step(loss, x, r))
    x, radius = jnp.array([-1.2, 1.0]), jnp.asarray(1.0)
    values = [float(loss(x))]
    for _ in range(60):
        x, radius, value = step(x, radius)
        values.append(float(value))
    assert np.all(np.diff(values) <= 1e-6)
    np.testing.assert_allclose(x, [1.0, 1.0], atol=1e-2)


def test_newton_stays_where_no_trial_helps():
    loss = lambda x: jnp.where(x[0] == 1.0, x[0] * 0.0 + x[0], jnp.inf)  # every step leads out of the domain
    x, radius, value = o.gradient_regularized_newton_step(loss, jnp.array([1.0]), 1.0, max_trials=3)
    assert float(x[0]) == 1.0 and float(value) == 1.0 and float(radius) == 0.125


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.scale_by_shampoo(1.0), ValueError, "b2 .* < 1, got 1.0"),
        (lambda: o.scale_by_shampoo(eps=0.0), ValueError, "eps .* > 0"),
        (lambda: o.scale_by_shampoo(b1=-0.1), ValueError, "b1"),
        (lambda: o.scale_by_shampoo(exponent=0.0), ValueError, "exponent"),
        (lambda: o.scale_by_shampoo(trace_normalize=1), TypeError, "trace_normalize must be True or False"),
        (lambda: o.scale_by_shampoo(precondition_every=0), ValueError, "precondition_every"),
        (lambda: o.scale_by_shampoo(grafting="lion"), ValueError, "grafting must be one of 'none'"),
        (lambda: o.scale_by_shampoo(max_dim=jnp.asarray(2.5)), TypeError, "max_dim .* static integer"),
        (lambda: o.shampoo(-1.0), ValueError, "learning_rate"),
        (lambda: o.scale_by_soap(1.0), ValueError, "b1 .* < 1, got 1.0"),
        (lambda: o.scale_by_soap(b2=-1.0), ValueError, "b2 .* >= 0"),
        (lambda: o.scale_by_soap(eps=-1.0), ValueError, "eps .* >= 0"),
        (lambda: o.scale_by_soap(precondition_every=0), ValueError, "precondition_every"),
        (lambda: o.scale_by_soap(max_dim=0), ValueError, "max_dim .* >= 1, got 0"),
        (lambda: o.soap(-1.0), ValueError, "learning_rate"),
        (lambda: o.scale_by_mfac(0), ValueError, "window .* >= 1, got 0"),
        (lambda: o.scale_by_mfac(damping=0.0), ValueError, "damping"),
        (lambda: o.gradient_regularized_newton_step(1.0, jnp.ones(1), 1.0), TypeError, "loss_fn"),
        (lambda: o.gradient_regularized_newton_step(jnp.sum, jnp.ones(1), 0.0), ValueError, "radius"),
        (
            lambda: o.gradient_regularized_newton_step(jnp.sum, jnp.ones(1), 1.0, curvature=3),
            TypeError,
            "curvature",
        ),
        (
            lambda: o.gradient_regularized_newton_step(jnp.sum, jnp.ones(1), 1.0, sufficient_decrease=0.9),
            ValueError,
            "sufficient_decrease",
        ),
        (
            lambda: o.gradient_regularized_newton_step(jnp.sum, jnp.ones(1), 1.0, max_trials=0),
            ValueError,
            "max_trials",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
