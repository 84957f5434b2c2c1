"""Fira and its limiter: worked numbers, oracle, a loop in numpy, limits, invariances, errors."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, torch_trajectory, trajectory

from jaxsoft import optimizers as o


def random_problem(steps=60, shape=(7, 5)):
    """Gradients around a drifting matrix of low rank."""
    rng = np.random.default_rng(0)
    low = rng.standard_normal((steps, shape[0], 2)).cumsum(0) @ rng.standard_normal((2, shape[1]))
    return rng.standard_normal(shape), 0.3 * low + rng.standard_normal((steps, *shape))


def numpy_fira(
    w, grads, lr, rank, every, scale=1.0, gamma=1.01, right=True, matrix=False, align=True, rmsprop=False
):
    """The published loops for one matrix, written with the projector on one side by transposing the other."""
    b1, b2, eps, p, last, out = 0.9, 0.999, 1e-6, None, None, []
    if rmsprop:
        b1, b2 = 0.0, 0.9
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        g = g.T if right else g
        if (t - 1) % every == 0:
            new = np.linalg.svd(g, full_matrices=False)[0][:, :rank]
            if p is not None and align:
                new = new * np.where((p * new).sum(0) < 0, -1, 1)
            p = new
        r = p.T @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        psi = m / (np.sqrt(v) + eps)
        axis = None if matrix else 0
        phi = np.linalg.norm(psi, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        s = (g - scale * p @ r) * phi
        n = np.linalg.norm(s)
        if last is not None:
            limiter = max(n / (last + 1e-8), gamma) / gamma
            s, n = s / limiter, n / limiter
        last = n
        u = scale * p @ psi + s
        step = 1 if rmsprop else np.sqrt(1 - b2**t) / (1 - b1**t)
        w = w - lr * step * (u.T if right else u)
        out.append(w)
    return np.stack(out)


GRADS = [
    [[0.6, -0.3, 0.2], [0.8, 0.4, -0.1]],
    [[1.0, 0.0, -0.5], [0.2, 0.5, 0.3]],
    [[-3.0, 2.0, 4.0], [5.0, -1.0, 1.0]],
]


def test_fira_worked_example():
    with jax.enable_x64(True):
        start, tx = jnp.array([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]]), o.fira(0.1, 1)
        out = trajectory(tx, start, jnp.array(GRADS))
        states, state = [], tx.init(start)
        for g in GRADS:
            _, state = tx.update(jnp.array(g), state, start)
            states.append(state[0])
    expected = [
        [
            [0.939818811111, -1.830527004628, -0.378656740809],
            [-0.080241585316, 0.774035997365, -0.560671678459],
        ],
        [
            [0.801215821164, -1.830527005828, 0.154851695955],
            [-0.107962184327, 0.662088389331, -0.918298226250],
        ],
        [
            [0.844362442811, -2.348984169756, 0.089543264452],
            [-0.241716549733, 0.879943772847, -0.952641472564],
        ],
    ]
    close(out, expected, 1e-11)
    np.testing.assert_allclose(
        jnp.abs(states[0].projector[:, 0]), [0.535818515764, 0.844333179595], atol=1e-11
    )
    residuals = [float(s.residual_norm) for s in states]
    close(residuals, [32.01437691961, 27.7465007363, 28.023965753763], 1e-10)


@pytest.mark.parametrize("shape", [(7, 5), (4, 6)])
def test_fira_equals_pytorch_optimizer(shape):
    start, grads = random_problem(shape=shape)
    group = {"rank": 3, "update_proj_gap": 1000, "scale": 1.0, "projection_type": "std"}
    theirs = torch_trajectory(lambda po, p: po.Fira([{"params": p, **group}], lr=0.01), start, grads)
    with jax.enable_x64(True):
        ours = trajectory(o.fira(0.01, 3), jnp.asarray(start), jnp.asarray(grads))
    close(ours, theirs, 3e-6)  # its decomposition is in float32


@pytest.mark.parametrize(
    ("shape", "settings", "reference"),
    [
        ((7, 5), {}, {}),
        ((5, 7), {"scale": 0.25}, {"right": False, "scale": 0.25}),
        ((7, 5), {"projection": "reverse_std", "gamma": 1.5}, {"right": False, "gamma": 1.5}),
        ((5, 7), {"projection": "reverse_std", "scaling": "matrix"}, {"matrix": True}),
        ((6, 6), {"align_signs": False}, {"align": False}),
        ((7, 5), {"b1": 0.0, "b2": 0.9, "bias_correction": False}, {"rmsprop": True}),
    ],
)
def test_fira_equals_the_published_loop(shape, settings, reference):
    start, grads = random_problem(shape=shape)
    with jax.enable_x64(True):
        tx = o.fira(0.01, 3, update_every=17, **settings)
        ours = trajectory(tx, jnp.asarray(start), jnp.asarray(grads))
    if not settings.get("align_signs", True):  # the first sign of a decomposition is arbitrary
        ours, grads = ours[:17], grads[:17]
    close(ours, numpy_fira(start, grads, 0.01, 3, 17, **reference), 1e-9)


def test_projectors_turned_round_change_nothing():
    """With aligned signs the trajectory does not depend on the signs that a decomposition returns."""
    start, grads = (jnp.asarray(x, jnp.float32) for x in random_problem(12))
    tx = o.fira(0.01, 3, update_every=4)
    flip = jnp.array([-1.0, 1.0, -1.0])
    params, state, turned, update = start, tx.init(start), None, jax.jit(tx.update)
    for t, g in enumerate(grads):
        if t == 2:
            s = state[0]
            turned = (s._replace(projector=s.projector * flip, mu=s.mu * flip), *state[1:])
            other = params
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        if turned is not None:
            updates, turned = update(g, turned, other)
            other = optax.apply_updates(other, updates)
    np.testing.assert_allclose(other, params, atol=1e-5)
    np.testing.assert_allclose(turned[0].projector, state[0].projector * flip, atol=1e-5)


def test_fira_of_full_rank_is_adam_in_another_basis():
    """No residual is left then; for vectors and stacks it is Adam itself."""
    start, grads = (jnp.asarray(x, jnp.float32) for x in random_problem(10, (4, 4)))
    basis = np.linalg.svd(np.asarray(grads[0]))[2].T  # right singular vectors
    # eps is on the uncorrected root: none here
    ours = trajectory(o.fira(0.01, 4, eps=0.0), start, grads)
    adam = trajectory(optax.adam(0.01, eps=0.0), start @ basis, grads @ basis)
    np.testing.assert_allclose(ours, adam @ basis.T, atol=2e-4)
    for shape in ((8, 2), (2, 2, 4)):
        flat = start.reshape(shape) if len(shape) > 2 else start.reshape(-1)
        g = grads.reshape(10, *flat.shape)
        ours = trajectory(o.fira(0.01, 1, eps=0.0), flat, g)
        np.testing.assert_allclose(ours, trajectory(optax.adam(0.01, eps=0.0), flat, g), atol=1e-6)


def test_shapes_of_the_state():
    params = {"tall": jnp.zeros((8, 4)), "wide": jnp.zeros((4, 8)), "vector": jnp.zeros(3)}
    for projection, projector, moment in (("std", (4, 2), (8, 2)), ("reverse_std", (8, 2), (2, 4))):
        state = o.scale_by_fira(2, projection=projection).init(params)
        assert state.projector["tall"].shape == state.projector["wide"].shape == projector
        assert state.mu["tall"].shape == state.nu["tall"].shape == moment
        assert state.mu["wide"].shape == moment[::-1]
        assert state.mu["vector"].shape == (3,)
    shapes = {x.shape for x in jax.tree.leaves(optax.contrib.galore(0.1, rank=2).init(params))}
    assert {(8, 2), (2, 4)} <= shapes  # the other side, as `projection` says


def test_inject_hyperparams():
    start, grads = (jnp.asarray(x, jnp.float32) for x in random_problem(10))
    injected = optax.inject_hyperparams(o.fira, static_args=("rank",))(0.01, rank=3, update_every=4)
    np.testing.assert_allclose(
        trajectory(injected, start, grads),
        trajectory(o.fira(0.01, 3, update_every=4), start, grads),
        atol=1e-4,
    )


def test_the_projector_changes_only_when_due():
    start, grads = (jnp.asarray(x, jnp.float32) for x in random_problem(7))
    tx, projectors = o.scale_by_fira(2, update_every=3), []
    state, update = tx.init(start), jax.jit(tx.update)
    for g in grads:
        _, state = update(g, state)
        projectors.append(state.projector)
    changed = [bool(jnp.any(a != b)) for a, b in itertools.pairwise(projectors)]
    assert changed == [False, False, True, False, False, True]


def test_residual_grows_by_gamma_at_most():
    start, grads = (jnp.asarray(x, jnp.float32) for x in random_problem(20))
    tx, norms = o.scale_by_fira(2, gamma=1.05), []
    state, update = tx.init(start), jax.jit(tx.update)
    for t, g in enumerate(grads):
        _, state = update(g * (1e4 if t == 10 else 1), state)
        norms.append(float(state.residual_norm))
    growth = np.array(norms[1:]) / np.array(norms[:-1])
    assert np.all(growth < 1.05 * (1 + 1e-5)) and np.any(growth > 1.049) and np.any(growth < 1)


# The limiter.


def test_limiter_by_hand():
    tx = o.limit_norm_growth(1.5)
    state, out = tx.init(jnp.zeros(1)), []
    for g in (2.0, 10.0, 4.0, 0.0, 7.0, 8.0):
        u, state = tx.update(jnp.array([g]), state)
        out.append(float(u[0]))
    np.testing.assert_allclose(out, [2, 3, 4, 0, 7, 8], rtol=1e-6)


def test_limiter_of_all_leaves_together():
    tx = o.limit_norm_growth(2.0, per_leaf=False)
    small, large = (
        {"a": jnp.array([3.0]), "b": jnp.array([4.0])},
        {"a": jnp.array([30.0]), "b": jnp.array([4.0])},
    )
    _, state = tx.update(small, tx.init(small))
    u, state = tx.update(large, state)
    factor = 10 / np.sqrt(916)
    chex.assert_trees_all_close(u, jax.tree.map(lambda x: factor * x, large), rtol=1e-6)
    chex.assert_trees_all_close(state.norm, {"a": jnp.array(10.0), "b": jnp.array(10.0)}, rtol=1e-6)


def test_limiter_turned_off_and_nan():
    tx = o.limit_norm_growth(jnp.inf)
    _, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    u, state = tx.update(jnp.array([1e9]), state)
    np.testing.assert_array_equal(u, [1e9])
    tx = o.limit_norm_growth()
    u, _ = tx.update(jnp.array([jnp.nan]), state)
    assert np.isnan(u[0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.fira(-1.0, 1), ValueError, "learning_rate .* >= 0, got -1.0"),
        (lambda: o.fira(0.1, 0), ValueError, "rank .* >= 1, got 0"),
        (lambda: o.fira(0.1, 1.5), TypeError, "rank .* static integer"),
        (lambda: o.fira(0.1, jnp.ones(2)), TypeError, "rank .* static integer"),
        (
            lambda: o.fira(0.1, 3).init({"w": jnp.ones((4, 2))}),
            ValueError,
            r"rank .* shorter side .* got 3 and a matrix of shape \(4, 2\)",
        ),
        (lambda: o.fira(0.1, 1, b1=1.0), ValueError, "b1 .* < 1"),
        (lambda: o.fira(0.1, 1, b2=-1.0), ValueError, "b2 .* >= 0"),
        (lambda: o.fira(0.1, 1, eps=-1.0), ValueError, "eps"),
        (lambda: o.fira(0.1, 1, update_every=0), ValueError, "update_every .* >= 1, got 0"),
        (lambda: o.fira(0.1, 1, scale=-1.0), ValueError, "scale"),
        (lambda: o.fira(0.1, 1, gamma=0.9), ValueError, "gamma .* >= 1, got 0.9"),
        (lambda: o.fira(0.1, 1, projection="both"), ValueError, "projection .* 'reverse_std', got 'both'"),
        (lambda: o.fira(0.1, 1, scaling="row"), ValueError, "scaling .* got 'row'"),
        (lambda: o.fira(0.1, 1, align_signs=1), TypeError, "align_signs"),
        (lambda: o.fira(0.1, 1, bias_correction=1), TypeError, "bias_correction must be True or False"),
        (lambda: o.fira(0.1, 1, weight_decay=-1.0), ValueError, "weight_decay"),
        (lambda: o.limit_norm_growth(0.5), ValueError, "gamma .* >= 1, got 0.5"),
        (lambda: o.limit_norm_growth(per_leaf=1), TypeError, "per_leaf must be True or False"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
