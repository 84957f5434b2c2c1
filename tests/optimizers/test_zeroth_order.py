"""Zeroth order: identities on quadratics, expectations, equality of MeZO with its parts, memory, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import descend, params_tree

from jaxsoft import optimizers as o

KEY = jax.random.key(7)


def quadratic(p, weight=1.0):
    """Half of theta^T A theta with A = diag(1, 2, 3, ...) over all entries."""
    flat = jnp.concatenate(
        [x.astype(jnp.promote_types(x.dtype, jnp.float32)).ravel() for x in jax.tree.leaves(p)]
    )
    return weight * 0.5 * jnp.sum(jnp.arange(1, flat.size + 1) * flat**2)


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 2)])
def test_direction_is_jax_random_normal(shape):
    params = [jnp.zeros(shape), jnp.zeros(3)]
    first, second = jax.random.split(KEY)
    expected = [jax.random.normal(first, shape), jax.random.normal(second, (3,))]
    drawn = o.random_direction(KEY, params)
    if jax.config.jax_threefry_partitionable:
        chex.assert_trees_all_close(drawn, expected, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_equal(o.random_direction(jax.random.key_data(KEY), params), drawn)


def test_directions_have_their_moments():
    z = o.random_direction(KEY, jnp.zeros((300, 301)))
    np.testing.assert_allclose([z.mean(), z.std(), (z**4).mean()], [0, 1, 3], atol=0.05)
    r = o.random_direction(KEY, jnp.zeros((300, 301)), distribution="rademacher")
    np.testing.assert_array_equal(jnp.abs(r), 1)
    np.testing.assert_allclose(r.mean(), 0, atol=0.02)
    s = o.random_direction(KEY, jnp.zeros((300, 301)), sparsity=0.75)
    np.testing.assert_allclose((s == 0).mean(), 0.75, atol=0.01)
    np.testing.assert_array_equal(jnp.where(s == 0, z, s), z)  # the mask is drawn apart from the direction
    np.testing.assert_allclose(jnp.corrcoef(jnp.abs(z).ravel(), (s == 0).ravel())[0, 1], 0, atol=0.02)
    np.testing.assert_allclose(jnp.corrcoef(z[:-1].ravel(), z[1:].ravel())[0, 1], 0, atol=0.02)
    t = o.random_direction(jax.random.fold_in(KEY, 1), jnp.zeros((300, 301)))
    np.testing.assert_allclose(jnp.corrcoef(z.ravel(), t.ravel())[0, 1], 0, atol=0.02)


def test_other_key_implementations_and_dtypes():
    key = jax.random.key(0, impl="rbg")
    z = o.random_direction(key, {"a": jnp.zeros(4, jnp.bfloat16), "b": None})
    assert z["a"].dtype == jnp.float32 and np.ptp(z["a"]) > 0
    optimizer = o.mezo(0.1)
    params, _, _ = optimizer.step(quadratic, params_tree(), optimizer.init(key))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))


def test_worked_example(x64, eps=0.5):
    """rho = <gradient, z> on a quadratic for any eps, here with the direction (1, -1/2) put in."""
    loss = lambda scale: 0.5 * (scale[0] ** 2 + 4 * scale[1] ** 2)
    theta = jnp.array([1.0, -2.0])
    value, rho = o.zo_projection(loss, eps=eps)(theta, KEY)
    z = o.random_direction(KEY, theta)
    np.testing.assert_allclose(rho, theta[0] * z[0] + 4 * theta[1] * z[1], rtol=1e-7)
    np.testing.assert_allclose(value, loss(theta) + eps**2 * loss(z), rtol=1e-7)
    # the same along a line in coordinates where the only direction is (1, -1/2), times a Rademacher sign
    line = lambda t: loss(theta + t * jnp.array([1.0, -0.5]))
    sign = o.random_direction(KEY, jnp.zeros([]), distribution="rademacher")
    estimate = o.zo_value_and_grad(line, eps=eps, distribution="rademacher")
    np.testing.assert_allclose(estimate(jnp.zeros([]), KEY)[1], 5.0, rtol=1e-7)
    signed = o.zo_value_and_grad(line, eps=eps, distribution="rademacher", sign="scalar")
    np.testing.assert_allclose(signed(jnp.zeros([]), KEY)[1], 1.0, rtol=1e-7)
    optimizer = o.mezo(0.01, eps=eps, distribution="rademacher")
    t, _, _ = optimizer.step(line, jnp.zeros([]), optimizer.init(KEY))
    np.testing.assert_allclose(theta + t * jnp.array([1.0, -0.5]), [0.95, -1.975], rtol=1e-7)
    assert abs(float(sign)) == 1


@pytest.mark.parametrize("differences", ["two_side", "one_side"])
def test_estimate_is_the_projection_times_the_direction(x64, differences):
    params, keys = {"matrix": params_tree(jnp.float64)["matrix"]}, jax.random.split(KEY, 3)
    loss = lambda p: jnp.sum(jnp.sin(p["matrix"])) + quadratic(p) * p["matrix"][0, 1]
    value, grads = jax.jit(o.zo_value_and_grad(loss, samples=3, eps=0.01, differences=differences))(
        params, KEY
    )
    total, values = jax.tree.map(jnp.zeros_like, params), []
    for key in keys:
        z = o.random_direction(key, params)
        at = lambda place, z=z: loss(jax.tree.map(lambda p, z: p + place * z, params, z))
        if differences == "two_side":
            rho, here = (at(0.01) - at(-0.01)) / 0.02, (at(0.01) + at(-0.01)) / 2
        else:
            rho, here = (at(0.01) - at(0.0)) / 0.01, at(0.0)
        total, values = jax.tree.map(lambda t, z, r=rho: t + r * z / 3, total, z), [*values, here]
    chex.assert_trees_all_close(grads, total, rtol=1e-9)
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-12)


def test_expectation_and_variance():
    """The mean estimate is the gradient; E |estimate|^2 = (d + 2) |gradient|^2 for normal directions."""
    params = jnp.array([1.0, -2.0, 0.5])
    loss = lambda p: quadratic([p])
    true = jax.grad(loss)(params)
    for estimate in (o.zo_value_and_grad(loss, eps=0.1), o.forward_gradient(loss)):
        draw = lambda key, e=estimate: e(params, key)[1]
        draws = jax.jit(functools.partial(jax.lax.map, draw))(jax.random.split(KEY, 20_000))
        np.testing.assert_allclose(draws.mean(0), true, atol=0.15)
        np.testing.assert_allclose(jnp.sum(draws**2, 1).mean(), 5 * jnp.sum(true**2), rtol=0.05)


def test_forward_gradient_is_exact(x64):
    params = {"matrix": params_tree(jnp.float64)["matrix"]}
    loss = lambda p: jnp.sum(jnp.exp(p["matrix"])) + quadratic(p)
    true = jax.grad(loss)(params)
    value, estimate = jax.jit(o.forward_gradient(loss, samples=2))(params, KEY)
    zs = [o.random_direction(key, params) for key in jax.random.split(KEY, 2)]
    expected = jax.tree.map(lambda a, b: (dot(true, zs[0]) * a + dot(true, zs[1]) * b) / 2, *zs)
    chex.assert_trees_all_close(estimate, expected, rtol=1e-9)
    np.testing.assert_allclose(value, loss(params), rtol=1e-12)
    _, finite = o.zo_value_and_grad(loss, samples=2, eps=1e-4)(params, KEY)
    chex.assert_trees_all_close(finite, expected, rtol=1e-6, atol=1e-6)


def test_sign_sparsity_and_blocks():
    params = {"matrix": params_tree()["matrix"], "nested": params_tree()["nested"]}
    estimate = lambda **kw: jax.jit(o.zo_value_and_grad(quadratic, eps=0.1, **kw))(params, KEY)[1]
    plain = estimate()
    key, true = jax.random.split(KEY, 1)[0], jax.grad(quadratic)(params)
    z = o.random_direction(key, params)
    scalar = estimate(sign="scalar")
    chex.assert_trees_all_close(
        scalar, jax.tree.map(lambda leaf: jnp.sign(dot(true, z)) * leaf, z), rtol=1e-6
    )
    entries = estimate(sign="elementwise")
    chex.assert_trees_all_equal(entries, jax.tree.map(jnp.sign, plain))
    sparse = estimate(sparsity=0.5)
    masked = o.random_direction(key, params, sparsity=0.5)
    chex.assert_trees_all_close(
        sparse, jax.tree.map(lambda leaf: dot(true, masked) * leaf, masked), rtol=1e-3, atol=1e-3
    )
    # each block has the slope along its own part of the direction
    blocks = estimate(blocks=lambda p: {"matrix": "a", "nested": "b"})
    for name in params:
        rho = dot(true[name], z[name])
        expected = jax.tree.map(lambda leaf, rho=rho: rho * leaf, z[name])
        chex.assert_trees_all_close(blocks[name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "transform"),
    [
        ({}, None),
        ({"in_place": False}, None),
        ({"differences": "one_side", "sparsity": 0.3}, None),
        ({"samples": 3, "distribution": "rademacher"}, None),
        ({"samples": 2, "in_place": False, "sign": "scalar"}, None),
        ({"sign": "elementwise"}, None),
    ],
)
def test_mezo_is_sgd_of_the_estimate(options, transform):
    """Three decayed steps on a schedule; the estimates are those of zo_value_and_grad, never stored."""
    loss = lambda p, batch: quadratic(p, batch) + jnp.sum(jnp.sin(p["matrix"]))
    schedule = optax.linear_schedule(1e-3, 0.0, 5)
    mask = {"matrix": True, "nested": False, "scalar": True, "empty": False}
    optimizer = o.mezo(schedule, eps=0.01, weight_decay=0.1, mask=mask, **options)
    estimate = o.zo_value_and_grad(loss, eps=0.01, **{k: v for k, v in options.items() if k != "in_place"})
    tx = optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(schedule))

    @jax.jit
    def ours(params, state):
        return jax.lax.scan(lambda c, b: (optimizer.step(loss, *c, b)[:2], None), (params, state), batches)[0]

    def gradient(p, t_and_batch):
        t, batch = t_and_batch
        return estimate(p, jax.random.fold_in(KEY, t), batch)[1]

    theirs = jax.jit(lambda p: descend(tx, p, gradient, (jnp.arange(3), batches))[0])
    batches = jnp.array([1.0, 0.5, 2.0])
    params, state = ours(params_tree(), optimizer.init(KEY))
    assert int(state.count) == 3
    chex.assert_trees_all_close(params, theirs(params_tree()), rtol=2e-4, atol=2e-5)


def test_mezo_in_float64_is_exact(x64):
    optimizer = o.mezo(1e-3, eps=1e-3, weight_decay=0.1)
    start = {"matrix": params_tree(jnp.float64)["matrix"]}
    params, _, value = jax.jit(functools.partial(optimizer.step, quadratic))(start, optimizer.init(KEY))
    expected, grads = jax.jit(o.zo_value_and_grad(quadratic, eps=1e-3))(start, jax.random.fold_in(KEY, 0))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    updates = jax.tree.map(lambda p, g: p - 1e-3 * (g + 0.1 * p), start, grads)
    chex.assert_trees_all_close(params, updates, rtol=1e-10)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("rate", [1e-3, 10.0, -1.0])
def test_conservative_takes_the_lowest(in_place, rate):
    """A small step goes forth, a huge one stays; a loss that rises forth and falls back goes back."""
    loss = lambda p: jnp.sum(p**2)
    if rate < 0:  # a bump: uphill of it lies the valley
        rate, loss = 0.5, lambda p: jnp.where(jnp.abs(p - 1) < 0.1, p, jnp.where(p < 0.9, 9.0, -9.0))[0]
    start = jnp.array([1.0, 2.0, -1.0])[: 1 if rate == 0.5 else 3]
    optimizer = o.mezo(rate, eps=0.01, conservative=True, in_place=in_place, distribution="rademacher")
    params, _, value = optimizer.step(loss, start, optimizer.init(KEY))
    _, grads = o.zo_value_and_grad(loss, eps=0.01, distribution="rademacher")(
        start, jax.random.fold_in(KEY, 0)
    )
    places = [start, start - rate * grads, start + rate * grads]
    best = places[int(np.argmin([loss(p) for p in places]))]
    assert int(np.argmin([loss(p) for p in places])) == {1e-3: 1, 10.0: 0, 0.5: 2}[rate]
    np.testing.assert_allclose(params, best, atol=1e-5)
    np.testing.assert_allclose(value, loss(start), rtol=1e-5)


def test_mezo_leaves_out_a_step_that_overflows():
    loss = lambda p: jnp.where(p[0] > 1, jnp.inf, jnp.sum(p))
    for options in ({}, {"samples": 2}, {"conservative": True}):
        optimizer = o.mezo(0.1, eps=1.0, distribution="rademacher", **options)
        params, _, _ = optimizer.step(loss, jnp.array([0.5, 0.25]), optimizer.init(KEY))
        np.testing.assert_allclose(params, [0.5, 0.25], atol=1e-6)


def test_mezo_of_bfloat16_changes_parameters_once():
    """Not in place, a step of 0 changes nothing; the loss of perturbed copies is seen."""
    params = params_tree(jnp.bfloat16)
    optimizer = o.mezo(0.0, in_place=False, eps=0.1)
    same, _, value = optimizer.step(quadratic, params, optimizer.init(KEY))
    chex.assert_trees_all_equal(same, params)
    assert value.dtype == jnp.float32 and value > quadratic(params)


def test_mezo_is_a_pair_of_functions():
    """Written anew around another step, here one that clips the parameters."""
    inner = o.mezo(0.1)

    def step(loss_fn, params, state):
        params, state, value = inner.step(loss_fn, params, state)
        return jnp.clip(params, -1, 1), state, value

    clipped = o.Mezo(inner.init, step)
    params, state, _ = clipped.step(lambda p: -100 * jnp.sum(p), jnp.zeros(2), clipped.init(KEY))
    assert jnp.all(jnp.abs(params) <= 1) and jnp.any(jnp.abs(params) == 1) and int(state.count) == 1


def test_drift_of_moving_in_place():
    """A thousand steps of length 0 move float32 parameters of size 1 by some 1e-6."""
    optimizer, params = o.mezo(0.0), jnp.linspace(0.5, 2.0, 200)

    @jax.jit
    def run(params, state):
        body = lambda c, _: (optimizer.step(lambda p: jnp.sum(p), *c)[:2], None)
        return jax.lax.scan(body, (params, state), None, 1000)[0][0]

    drift = run(params, optimizer.init(KEY)) - params
    assert 0 < np.abs(drift).max() < 2e-5 and abs(np.mean(drift)) < 2e-6


@pytest.mark.parametrize("model", ["parameters", "activations"])
@pytest.mark.parametrize("options", [{}, {"conservative": True}, {"samples": 2}])
def test_mezo_needs_the_memory_of_inference(model, options):
    """Where the parameters dominate, as one stack or as several leaves, and where the activations do."""
    width, batch = (256, 4) if model == "parameters" else (64, 4096)
    params = {
        "stack": jnp.ones((6, width, width)),
        "in": jnp.ones((width, width)),
        "out": jnp.ones((width, 1)),
    }

    def loss(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), jnp.sin(x @ p["in"]), p["stack"])
        return jnp.mean((x @ p["out"]) ** 2)

    x, optimizer = jnp.ones((batch, width)), o.mezo(1e-3, **options)
    state = optimizer.init(KEY)

    def peak(compiled):
        m = compiled.memory_analysis()
        arguments = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return arguments + m.temp_size_in_bytes

    inference = peak(jax.jit(loss).lower(params, x).compile())
    step = jax.jit(functools.partial(optimizer.step, loss), donate_argnums=0)
    assert peak(step.lower(params, state, x).compile()) <= 1.1 * inference


def test_adam_of_estimates_learns():
    """Linear regression by ZO-Adam, from values of the loss alone."""
    x = jax.random.normal(KEY, (64, 4))
    goal = jnp.array([1.0, -1.0, 2.0, 0.0])
    loss = lambda p: jnp.mean((x @ (p - goal)) ** 2)
    estimate, tx = o.zo_value_and_grad(loss, samples=2), optax.adam(optax.cosine_decay_schedule(0.05, 600))

    gradient = lambda params, key: estimate(params, key)[1]
    params, _ = jax.jit(lambda p: descend(tx, p, gradient, jax.random.split(KEY, 600)))(jnp.zeros(4))
    np.testing.assert_allclose(params, goal, atol=0.05)


def test_shared_randomness_update_is_the_mean_step():
    params, keys, rhos = params_tree(), jax.random.split(KEY, 3), jnp.array([1.0, -0.5, 2.0])
    mask = {"matrix": True, "nested": False, "scalar": False, "empty": False}
    new = jax.jit(functools.partial(o.shared_randomness_update, weight_decay=0.2, mask=mask))(
        params, rhos, keys, 0.1
    )
    zs = [o.random_direction(key, params) for key in keys]
    step = jax.tree.map(lambda *z: 0.1 / 3 * sum(r * z for r, z in zip(rhos, z)), *zs)
    expected = jax.tree.map(lambda p, s: p - s, params, step)
    expected["matrix"] = expected["matrix"] - 0.02 * params["matrix"]
    chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)
    # one worker alone is MeZO
    loss = functools.partial(quadratic)
    optimizer = o.mezo(0.01, eps=0.01, in_place=False)
    mezo, _, _ = optimizer.step(loss, params, optimizer.init(KEY))
    key = jax.random.split(jax.random.fold_in(KEY, 0), 1)
    _, rho = o.zo_projection(loss, eps=0.01)(params, key[0])
    chex.assert_trees_all_close(o.shared_randomness_update(params, rho[None], key, 0.01), mezo, rtol=1e-5)


def test_codes_of_one_byte():
    rho = jnp.array([0.0, 1.0, -1.0, 5.0, jnp.nan, -jnp.inf, 0.004, 0.3])
    codes = o.quantize_projection(rho, 1.0)
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, [0, 127, -127, 127, 0, 0, 1, 38])
    keys = jax.random.split(KEY, 8)
    decoded = o.shared_randomness_update(params_tree(), codes, keys, 0.1, limit=1.0)
    floats = o.shared_randomness_update(params_tree(), codes / 127.0, keys, 0.1)
    chex.assert_trees_all_close(decoded, floats, rtol=1e-5, atol=1e-6)


def test_gp_gradient_is_that_of_the_posterior_mean(x64):
    """A tree, and a buffer that is not full, against the derivative of the mean by JAX."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=2)), "b": jnp.asarray(rng.normal())}
    points = {"a": jnp.asarray(rng.normal(size=(5, 2))), "b": jnp.asarray(rng.normal(size=5))}
    values, where = jnp.asarray(rng.normal(size=5)), jnp.array([True, True, False, True, True])
    options = dict(lengthscale=1.3, noise=0.2)

    def posterior(params, points, values):
        def kernel(p, q):
            return jnp.exp(-(jnp.sum((p["a"] - q["a"]) ** 2) + (p["b"] - q["b"]) ** 2) / (2 * 1.3**2))

        to_points = jax.vmap(kernel, (None, 0))
        gram = jax.vmap(to_points, (0, None))(points, points)
        noisy = gram + 0.2**2 * jnp.eye(len(values))
        return to_points(params, points) @ jnp.linalg.solve(noisy, values)

    @jax.jit
    def run(params, points, values):
        kept = jax.tree.map(lambda x: x[where], (points, values))
        holes = jax.tree.map(lambda x: x.at[2].set(jnp.nan), (points, values))
        return (
            o.gp_gradient(params, points, values, **options),
            o.gp_gradient(params, *holes, where=where, **options),
            jax.grad(posterior)(params, points, values),
            jax.grad(posterior)(params, *kept),
        )

    where = np.asarray(where)
    ours, masked, full, partial = run(params, points, values)
    chex.assert_trees_all_close(ours, full, rtol=1e-10)
    chex.assert_trees_all_close(masked, partial, rtol=1e-10)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    low = jax.eval_shape(functools.partial(o.gp_gradient, **options), half, points, values)
    assert low["a"].dtype == low["b"].dtype == jnp.bfloat16


def ok(p):
    return jnp.sum(p)


def gp(**given):
    arrays = dict(params=jnp.ones(2), points=jnp.ones((3, 2)), values=jnp.ones(3))
    return o.gp_gradient(**arrays | dict(lengthscale=1.0, noise=0.1) | given)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.mezo(-1.0), ValueError, "learning_rate .* >= 0"),
        (lambda: o.mezo(0.1, eps=0.0), ValueError, "eps .* > 0"),
        (lambda: o.mezo(0.1, samples=0), ValueError, "samples .* >= 1"),
        (lambda: o.mezo(0.1, samples=2, conservative=True), ValueError, "samples must be 1"),
        (lambda: o.mezo(0.1, samples=2, sign="elementwise"), ValueError, "samples must be 1"),
        (lambda: o.mezo(0.1, conservative=True, sign="elementwise"), ValueError, "sign must be"),
        (lambda: o.mezo(0.1, weight_decay=-1.0), ValueError, "weight_decay"),
        (lambda: o.mezo(0.1, sparsity=1.0), ValueError, "sparsity .* < 1"),
        (lambda: o.mezo(0.1, sign="both"), ValueError, "sign must be one of"),
        (lambda: o.zo_value_and_grad(ok, differences="three"), ValueError, "differences must be one of"),
        (lambda: o.zo_value_and_grad(ok, distribution="cauchy"), ValueError, "distribution must be one of"),
        (lambda: o.zo_projection(ok, eps=-1.0), ValueError, "eps"),
        (lambda: o.forward_gradient(ok, samples=1.5), TypeError, "samples .* integer"),
        (
            lambda: o.zo_value_and_grad(lambda p: p)(jnp.ones(2), KEY),
            ValueError,
            "loss_fn must return a real scalar",
        ),
        (
            lambda: o.forward_gradient(lambda p: 1)(jnp.ones(2), KEY),
            ValueError,
            "loss_fn must return a real scalar",
        ),
        (lambda: o.random_direction(KEY, jnp.ones(2, complex)), TypeError, "real"),
        (lambda: o.zo_value_and_grad(ok, blocks=[1, 2])(jnp.ones(2), KEY), ValueError, "blocks must be"),
        (lambda: gp(noise=0.0), ValueError, "noise .* > 0"),
        (lambda: gp(lengthscale=-1.0), ValueError, "lengthscale .* > 0"),
        (lambda: gp(points=jnp.ones((3, 3))), ValueError, r"points must have shape \(3, 2\)"),
        (lambda: gp(points=[jnp.ones((3, 2))]), ValueError, "points must have the structure of params"),
        (lambda: gp(values=jnp.ones((3, 1))), ValueError, r"values must have shape \[n\]"),
        (lambda: gp(where=jnp.ones(2, bool)), ValueError, r"where must have shape \(3,\)"),
        (lambda: gp(params=jnp.ones(2, complex)), TypeError, "real"),
        (lambda: o.quantize_projection(jnp.ones(2), 0.0), ValueError, "limit .* > 0"),
        (lambda: o.quantize_projection(jnp.ones(2, int), 1.0), TypeError, "rho"),
        (
            lambda: o.shared_randomness_update(jnp.ones(2), jnp.ones(3), jax.random.split(KEY, 2), 0.1),
            ValueError,
            r"rhos must have shape \(2,\)",
        ),
        (
            lambda: o.shared_randomness_update(
                jnp.ones(2), jnp.ones(2, jnp.int8), jax.random.split(KEY), 0.1
            ),
            ValueError,
            "limit must be a number",
        ),
        (
            lambda: o.shared_randomness_update(
                jnp.ones(2), jnp.ones(2), jax.random.split(KEY), 0.1, limit=1.0
            ),
            ValueError,
            "limit must be None",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
