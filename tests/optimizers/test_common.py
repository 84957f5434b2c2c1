"""The laws that every optimizer and transform of `jaxsoft.optimizers` obeys, in one table."""

import dataclasses
import functools
import importlib
import pathlib
import pkgutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers.families
import pytest
from helpers import compilations, descend, is_float, params_tree, temporary_bytes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import optimizers as o

CASES, RANKS = {}, {}  # by the case's name; the ranks are those of `tests/design.py`
for _family in pkgutil.iter_modules(optimizers.families.__path__):
    _cases = importlib.import_module(f"optimizers.families.{_family.name}").CASES
    CASES |= _cases
    RANKS |= dict.fromkeys(list(_cases)[:1], "leading")


def over(keep=lambda case: True):
    """Runs a test for each case that `keep` selects."""
    return pytest.mark.parametrize("name", [name for name, case in CASES.items() if keep(case)])


every = over()


@functools.lru_cache(maxsize=1)
def made(name):
    """An optimizer and its compiled `update`, which the laws of a case share: they run one after the other."""
    tx = CASES[name].make()
    return tx, jax.jit(tx.update)


def gradients(step, params):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def run(tx, params, steps, state=None, start=0, update=None):
    """`steps` steps on random gradients; returns the parameters and the state."""
    update = update or jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    for step in range(start, start + steps):
        updates, state = update(gradients(step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def dtypes(tree):
    return jax.tree.map(lambda x: jnp.asarray(x).dtype, tree)


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("objective", ["quadratic", "rosenbrock"])
@over(lambda case: case.converges is not None)
def test_converges(name, objective):
    steps = 4000
    tx = CASES[name].converges(optax.cosine_decay_schedule(1e-2, steps))
    if objective == "quadratic":
        start, goal = jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0])
        loss = lambda x: jnp.sum((x - goal) ** 2)
    else:
        start, goal = jnp.array([0.0, 0.0]), jnp.array([1.0, 1.0])
        loss = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    gradient = jax.grad(lambda x, _: loss(x))
    x, _ = jax.jit(lambda x: descend(tx, x, gradient, steps=steps))(start)
    np.testing.assert_allclose(x, goal, atol=0.05)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_structure_and_dtypes_with_float32_state(name, dtype):
    (tx, update), params = made(name), params_tree(dtype)
    state = tx.init(params)
    grads = gradients(0, params)
    updates, new_state = update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    low = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert bool(low) == CASES[name].low_precision


@every
def test_keeps_dtypes_with_64_bits_and_strict_promotion(name, x64):
    tx = CASES[name].make()
    with jax.numpy_dtype_promotion("strict" if CASES[name].strict else "standard"):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
            params, wide = params_tree(dtype), jnp.float64 if dtype == jnp.float64 else jnp.float32
            state = jax.eval_shape(tx.init, params)
            updates, new_state = jax.eval_shape(tx.update, params, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
            floats = {x.dtype for x in jax.tree.leaves(state) if is_float(x) and x.shape}
            assert floats <= {jnp.dtype(wide), jnp.dtype(jnp.bfloat16 if CASES[name].low_precision else wide)}


@every
def test_half_precision_parameters_follow_float32(name):
    """Float16 numbers whose squares underflow or overflow there: every moment and norm is in float32."""

    def scaled(tree):
        return tree | {"matrix": tree["matrix"] * 5e-4, "nested": (tree["nested"][0] * 1e3, None)}

    (tx, update), params = made(name), scaled(params_tree(jnp.float16))
    wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    low_state, high_state = tx.init(params), tx.init(wide(params))
    for step in range(2):  # the second is larger: some only act then
        grads = jax.tree.map(lambda g, step=step: g * (1 + 4 * step), scaled(gradients(step, params)))
        low, low_state = update(grads, low_state, params)
        high, high_state = update(wide(grads), high_state, wide(params))
        if CASES[name].rescales_noise:
            low["scalar"] = high["scalar"] = None
        for a, b in zip(jax.tree.leaves(wide(low)), jax.tree.leaves(high), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.max(np.abs(b), initial=0) + 6e-8)


@every
def test_jit_and_the_optimizer_of_flax_are_eager(name):
    """One compiled step of `nnx.Optimizer`, whose states have one leaf per parameter, against `apply_updates`."""
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, tree):
            self.tree = nnx.data(jax.tree.map(nnx.Param, tree))

    @nnx.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads)

    tx, params = CASES[name].make(), params_tree()
    restored = jax.tree.map(np.asarray, tx.init(params))  # as from a checkpoint
    eager = run(tx, params, 3, state=restored, update=tx.update)
    if CASES[name].compiles_once:
        with compilations() as compiled:
            tx.update(gradients(0, params), restored, params)
        assert not compiled
    model = Model(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for i in range(3):
        step(model, optimizer, Model(gradients(i, params)))
    ours = nnx.as_pure((nnx.state(model, nnx.Param), optimizer.opt_state))
    chex.assert_trees_all_close(jax.tree.leaves(ours), jax.tree.leaves(eager), rtol=1e-5, atol=1e-6)


@every
def test_accepts_python_scalars_as_leaves(name):
    tx, params = CASES[name].make(), {"a": 1.0, "b": jnp.ones(2)}
    updates, _ = tx.update({"a": 0.5, "b": jnp.array([0.25, -0.5])}, tx.init(params), params)
    assert all_finite(updates)


@every
def test_the_gradient_of_an_integer_is_named(name):
    tx, params = CASES[name].make(), {"w": jnp.ones((2, 2)), "n": jnp.ones([], jnp.int32)}
    grads = {"w": params["w"], "n": np.zeros([], jax.dtypes.float0)}
    with pytest.raises(TypeError, match="updates must be floating, got a leaf of dtype float0"):
        jax.eval_shape(lambda params: tx.update(grads, tx.init(params), params), params)


@every
def test_complex_parameters_are_refused_and_the_way_out_is_named(name):
    tx, params = CASES[name].make(), {"w": jnp.ones((2, 2), jnp.complex64)}
    step = lambda tx: lambda params: tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match=r"complex64: wrap .* in optax\.contrib\.split_real_and_imaginary"):
        jax.eval_shape(step(tx), params)
    updates, _ = jax.eval_shape(step(optax.contrib.split_real_and_imaginary(tx)), params)
    assert updates["w"].dtype == jnp.complex64


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A tree that can be called, as the modules of Equinox."""

    tree: dict

    def __call__(self, x):
        raise AssertionError("a mask was taken for a function")


def flax_tree(name, tree):
    flax = pytest.importorskip("flax")
    return flax.core.freeze(tree) if name == "FrozenDict" else importlib.import_module("flax.nnx").State(tree)


@pytest.mark.parametrize("kind", ["Module", "FrozenDict", "State"])
def test_masks_and_multipliers_are_trees_of_any_class(kind):
    tree = Module if kind == "Module" else functools.partial(flax_tree, kind)
    params, mask = tree({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}), tree({"a": True, "b": False})
    decays = o.project_out_radial(optax.identity(), ready=False, delta=0.0, weight_decay=1.0, mask=mask)
    for tx, expected in (
        (decays, [2, 1]),
        (optax.chain(o.scale_by_lion_k(), o.add_decayed_deltas(1.0, mask=mask)), [1, 1]),
        (o.perpendicular_gradient(mask=mask), [0, 1]),
        (o.lion_k(1.0, weight_decay=1.0, mask=mask), [-2, -1]),
        (o.scale_by_multipliers(tree({"a": 2.0, "b": 3.0})), [2, 3]),
        (o.scale_by_multipliers({1: 2.0, 2: 3.0}, tree({"a": 1, "b": 2})), [2, 3]),
    ):
        updates, _ = tx.update(params, tx.init(params), params)
        assert [float(u[0, 0]) for u in jax.tree.leaves(updates)] == expected, expected
    state = o.quantize_state(optax.trace(0.9), min_size=1, mask=mask).init(params).inner_state
    assert [x.dtype for x in jax.tree.leaves(state)] == [jnp.uint8, jnp.float32]
    balance = functools.partial(o.temp_balance_multipliers, mask=mask, min_eigenvalues=1)
    rates = jax.eval_shape(balance, params)
    assert jax.tree.structure(rates) == jax.tree.structure(params)


@pytest.mark.engine
@every
def test_ignores_extra_arguments(name):
    (tx, update), params = made(name), params_tree()
    grads = gradients(0, params)
    plain, _ = update(grads, tx.init(params), params)
    update = jax.jit(optax.with_extra_args_support(tx).update)
    extra, _ = update(grads, tx.init(params), params, value=1.0, anything=None)
    chex.assert_trees_all_equal(plain, extra)


@every
def test_masked_leaves_are_untouched(name):
    params = params_tree()
    mask = {"matrix": True, "nested": False, "scalar": False, "empty": True}
    lonely, update = made(name)
    tx = optax.masked(lonely, mask)
    grads = gradients(0, params)
    masked = jax.jit(tx.update)
    updates, state = masked(grads, tx.init(params), params)
    updates, _ = masked(grads, state, params)
    chex.assert_trees_all_equal(updates["nested"], grads["nested"])
    chex.assert_trees_all_equal(updates["scalar"], grads["scalar"])
    alone = {"matrix": params["matrix"]}
    _, state = update({"matrix": grads["matrix"]}, lonely.init(alone), alone)
    expected, _ = update({"matrix": grads["matrix"]}, state, alone)
    chex.assert_trees_all_close(updates["matrix"], expected["matrix"], rtol=1e-5)


@pytest.mark.engine
@over(lambda case: case.injectable)
def test_inject_hyperparams(name):
    factory = CASES[name].make
    function, args, kwargs = (
        (factory.func, factory.args, factory.keywords)
        if isinstance(factory, functools.partial)
        else (factory, (), {})
    )
    plain, update = made(name)
    static = [k for k, v in kwargs.items() if callable(v)]
    tx = optax.inject_hyperparams(function, static_args=static)(*args, **kwargs)
    chex.assert_trees_all_close(
        run(tx, params_tree(), 5)[0], run(plain, params_tree(), 5, update=update)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.engine
@every
def test_partition(name):
    params = params_tree()
    labels = {"matrix": "ours", "nested": "sgd", "scalar": "sgd", "empty": "ours"}
    lonely, update = made(name)
    tx = optax.partition({"ours": lonely, "sgd": optax.sgd(0.5)}, labels)
    grads = gradients(0, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    chex.assert_trees_all_close(updates["nested"][0], -0.5 * grads["nested"][0])
    alone = {"matrix": params["matrix"]}
    expected, _ = update({"matrix": grads["matrix"]}, lonely.init(alone), alone)
    chex.assert_trees_all_close(updates["matrix"], expected["matrix"], rtol=1e-5)


@pytest.mark.engine
@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_apply_if_finite(name, dtype):
    tx = optax.apply_if_finite(made(name)[0], 3)
    update = jax.jit(tx.update)
    params, state = run(tx, params_tree(dtype), 2, update=update)
    grads = jax.tree.map(lambda g: g * jnp.asarray(jnp.nan, g.dtype), gradients(9, params))
    updates, skipped = update(grads, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)
    assert all_finite(run(tx, params, 2, state=skipped, update=update))


@every
def test_nan_is_not_hidden(name):
    """A NaN in the gradient shows in the updates, or leaves the state unchanged."""
    (tx, update), params = made(name), params_tree()
    state = tx.init(params)
    grads = gradients(0, params)
    grads["matrix"] = grads["matrix"].at[0, 1].set(jnp.nan)
    updates, state = update(grads, state, params)
    if not jnp.any(jnp.isnan(updates["matrix"])):
        assert all_finite((updates, state))


WRAPPERS = {
    "cautious": lambda inner, ready: o.cautious(inner, ready=ready),
    "momentum_reset": lambda inner, ready: o.momentum_reset(inner, 2, 1),
    "project_out_radial": lambda inner, ready: o.project_out_radial(inner, ready=ready, delta=10.0),
    "quantize_state": lambda inner, ready: o.quantize_state(inner, block_size=4, min_size=6),
    "skip_spikes": lambda inner, ready: o.skip_spikes(inner, 0.0, min_ratio=1.0, warmup_steps=1),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_takes_the_same_steps_around_a_direction_and_a_ready_optimizer(name):
    wrap, params = WRAPPERS[name], params_tree()
    direction, rate = optax.trace(0.9), optax.scale_by_learning_rate(0.1)
    ready, _ = run(wrap(optax.chain(direction, rate), ready=True), params, 4)
    expected, _ = run(optax.chain(wrap(direction, ready=False), rate), params, 4)
    chex.assert_trees_all_close(ready, expected, rtol=1e-5, atol=1e-6)
    plain, _ = run(optax.chain(direction, rate), params, 4)
    assert np.max(np.abs(plain["matrix"] - ready["matrix"])) > 1e-3  # the wrapper does something


@pytest.mark.engine
@every
def test_multi_steps(name):
    (inner, update), params = made(name), params_tree()
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    first, second = gradients(0, params), gradients(1, params)
    every_second = jax.jit(tx.update)
    updates, state = every_second(first, tx.init(params), params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, _ = every_second(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = update(mean, inner.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.engine
@every
def test_state_survives_serialization_bit_for_bit(name):
    serialization = pytest.importorskip("flax.serialization")
    (tx, update), start = made(name), params_tree()
    params, state = run(tx, start, 3, update=update)
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(start), data)
    restored = jax.tree.map(jnp.asarray, restored)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(
        run(tx, params, 3, state=restored, start=3, update=update),
        run(tx, params, 3, state=state, start=3, update=update),
    )


def test_every_state_survives_a_checkpoint_of_orbax_bit_for_bit(tmp_path):
    """States with random numbers, all in one checkpoint, which is much quicker; orbax saves no array of size 0."""
    ocp = pytest.importorskip("orbax.checkpoint")
    params, rng = params_tree(), np.random.default_rng(0)
    del params["empty"]

    def fill(x):
        data = rng.integers(0, 256, x.size * x.dtype.itemsize, np.uint8)
        return jnp.asarray(data.view(x.dtype).reshape(x.shape))

    def bits(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()

    states = {name: jax.eval_shape(case.make().init, params) for name, case in CASES.items()}
    states = jax.tree.map(fill, states) | {"mezo": o.mezo(0.1).init(jax.random.key(7))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", states)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, states)
    for old, new in zip(jax.tree.leaves(states), jax.tree.leaves(restored), strict=True):
        assert isinstance(new, jax.Array) and bits(old) == bits(new)


@pytest.mark.engine
@every
def test_init_under_eval_shape(name):
    tx, params = CASES[name].make(), params_tree()
    shapes = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tx.init(params))


@pytest.mark.engine
@every
def test_tree_map_params(name):
    tx, params = CASES[name].make(), params_tree()
    state = optax.tree_map_params(tx, jnp.ones_like, tx.init(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert np.all(np.asarray(leaf) == (0 if "count" in jax.tree_util.keystr(path) else 1)), path


@pytest.mark.engine
@every
def test_scan_and_donation(name):
    (tx, update), params = made(name), params_tree()
    grads = [gradients(step, params) for step in range(6)]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, stacked)[0], donate_argnums=0)
    scanned = scan((jax.tree.map(jnp.copy, params), tx.init(params)))
    chex.assert_trees_all_close(scanned, run(tx, params, 6, update=update), rtol=1e-4, atol=1e-5)


@pytest.mark.engine
@every
def test_vmap_is_a_loop(name):
    tx, single = made(name)
    members = [gradients(100 + i, params_tree()) for i in range(3)]
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    params, state = stack(*members), jax.vmap(tx.init)(stack(*members))
    update = jax.jit(jax.vmap(tx.update))
    for step in range(3):
        grads = stack(*[gradients(10 * step + i, m) for i, m in enumerate(members)])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for i, member in enumerate(members):
        s = tx.init(member)
        for step in range(3):
            updates, s = single(gradients(10 * step + i, member), s, member)
            member = optax.apply_updates(member, updates)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], params), member, rtol=1e-4, atol=1e-5)


@every
def test_zero_gradients_stay_finite(name):
    (tx, update), params = made(name), params_tree()
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(5):
        updates, state = update(zeros, state, params)
        assert all_finite((updates, state))
        if not CASES[name].ready:
            chex.assert_trees_all_equal(updates, zeros)


@every
def test_gradient_through_a_step(name):
    """Learned optimization and hyper-gradients differentiate through `update`."""
    tx, params = CASES[name].make(), {"w": jnp.array([1.0, -2.0, 0.5])}

    def objective(scale):
        p, state = params, tx.init(params)
        for step in range(2):
            updates, state = tx.update({"w": scale * gradients(step, p)["w"]}, state, p)
            p = optax.apply_updates(p, updates)
        return jnp.sum(p["w"] ** 2)

    assert np.isfinite(jax.jit(jax.grad(objective))(1.5))


@over(lambda case: case.ready)
def test_needs_params(name):
    tx, params = CASES[name].make(), params_tree()
    with pytest.raises(ValueError, match="params"):
        tx.update(gradients(0, params), tx.init(params))


@every
def test_temporary_memory(name):
    """A donated step stores next to nothing beyond parameters, gradients and state."""
    tx = CASES[name].make() if CASES[name].ready else optax.chain(CASES[name].make(), optax.sgd(1e-2))
    params = jnp.ones(1_000_000)
    assert temporary_bytes(tx, params) <= (CASES[name].temporary + 0.01) * params.nbytes


@over(lambda case: case.spike is not None)
def test_spike_is_bounded(name):
    """One gradient a million times too large moves the parameters by no more than a few usual steps."""
    tx = CASES[name].make() if CASES[name].ready else optax.chain(CASES[name].make(), optax.sgd(1e-2))
    params = {"w": jnp.linspace(-1.0, 1.0, 50)}
    update = jax.jit(tx.update)
    trajectories = []
    for spike in (1.0, 1e6):
        p, state = params, tx.init(params)
        for step in range(40):
            grads = gradients(step, p)
            if step == 30:
                grads = jax.tree.map(lambda g, s=spike: g * s, grads)
            updates, state = update(grads, state, p)
            p = optax.apply_updates(p, updates)
        trajectories.append(p["w"])
    usual = np.linalg.norm(trajectories[0] - params["w"])
    deviation = np.linalg.norm(trajectories[1] - trajectories[0])
    assert deviation < CASES[name].spike * usual


def test_sharded_parameters_keep_their_sharding_and_values():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x"))
    p = jnp.linspace(-1.0, 2.0, 32)
    g = jnp.sin(7 * p)
    for tx in (
        o.lion_k(0.1, kappa="l2"),
        o.spam(0.1),
        o.stable_spam(0.1),
        optax.chain(o.perpendicular_gradient(), optax.sgd(0.1)),
    ):
        ps, gs = jax.device_put((p, g), sharding)
        state = jax.jit(tx.init)(ps)
        state = jax.tree.map(lambda x: jax.device_put(x, sharding) if x.ndim else x, state)
        u, state = jax.jit(tx.update)(gs, state, ps)
        for x in jax.tree.leaves((u, state, tx.init(ps))):
            assert x.ndim == 0 or x.sharding.is_equivalent_to(sharding, 1), x.sharding
        np.testing.assert_allclose(u, tx.update(g, tx.init(p), p)[0], rtol=1e-5, atol=1e-6)

    # Distributed Lion: each of four workers has its own gradient and momentum.
    tx = o.lion_k(0.1, axis_name="x", weight_decay=0.0)
    grads = jnp.array([[1.0, -1, 2, 0], [1, -1, -2, 0], [-1, -1, 2, 0], [1, 5, -2, 0]])
    state = jax.vmap(tx.init)(jnp.zeros((4, 4)))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P("x"), P()), out_specs=(P(), P("x")))
    def step(g, state, params):
        g, state = jax.tree.map(lambda x: x[0], (g, state))
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), jax.tree.map(lambda x: x[None], state)

    params, state = step(grads, state, jnp.zeros(4))
    np.testing.assert_allclose(params, [-0.1, 0.1, 0.0, 0.0])
    np.testing.assert_allclose(state[0].mu, 0.01 * grads, rtol=1e-6)


# The placement of one leaf per kind; 256 columns are a whole number of blocks of 8-bit codes on each device.
LEAVES = {
    "rows": ((4, 6), P("data", None)),
    "columns": ((6, 4), P(None, "model")),
    "both": ((4, 6), P("data", "model")),
    "wide": ((4, 256), P(None, "model")),
    "vector": ((8,), P("model")),
}
# Mechanisms of 8-bit codes and of decompositions that no case has.
PLACED = {name: case.make for name, case in CASES.items()} | {
    "quantize_state_blocks_on_devices": lambda: o.quantize_state(optax.trace(0.9), block_size=2, min_size=1),
    "quantize_state_ragged_blocks": lambda: o.quantize_state(optax.trace(0.9), block_size=5, min_size=1),
    "quantize_state_wide_blocks": lambda: o.quantize_state(optax.trace(0.9), block_size=64, min_size=1),
    "lion_k_nuclear": lambda: o.lion_k(0.1, kappa="nuclear"),
    "lion_k_newton_schulz": lambda: o.lion_k(0.1, kappa=o.kappa_nuclear(steps=2)),
}


@pytest.mark.parametrize("name", PLACED)
def test_states_and_updates_lie_where_the_parameters_do_on_explicit_meshes(name):
    """Explicit placements are part of the types: nothing needs to be compiled, and no device is needed."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = {
        leaf: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for leaf, (shape, spec) in LEAVES.items()
    }
    tx = PLACED[name]()

    def step(gradients, params):
        state = tx.init(params)
        return *tx.update(gradients, state, params), state

    with jax.sharding.use_abstract_mesh(mesh):
        updates, new_state, state = jax.eval_shape(step, params, params)
    for path, x in jax.tree_util.tree_leaves_with_path((updates, new_state, state)):
        for leaf, (shape, spec) in LEAVES.items():
            if f"'{leaf}'" in jax.tree_util.keystr(path) and x.shape == shape:
                assert x.sharding.spec == spec, jax.tree_util.keystr(path)
    specs = [[x.sharding.spec if x.ndim else P() for x in jax.tree.leaves(s)] for s in (state, new_state)]
    assert specs[0] == specs[1]  # so that a loop can carry it


def test_what_gathers_on_explicit_meshes_gives_the_numbers_of_one_device():
    """Transformations that read a leaf as a whole (the others are entrywise, or sums, which JAX itself splits)."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"both": P("data", "model"), "columns": P(None, "model")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    draw = np.random.default_rng(0).standard_normal
    params, *grads = (
        {"both": jnp.float32(draw((4, 6))), "columns": jnp.float32(draw((6, 4)))} for _ in range(3)
    )
    on_mesh = jax.device_put((params, *grads), (shardings,) * 3)

    for tx in (
        o.clip_by_quantile(0.2),
        o.clip_by_quantile(0.2, per_leaf=False),
        o.fira(0.1, 2, update_every=2),
        o.scale_by_shampoo(precondition_every=2),
        o.scale_by_soap(precondition_every=1),
        o.scale_by_mfac(window=2, damping=0.1),
        o.optimistic_mirror_descent(0.1, mirror="entropy", adaptive=True),
        o.lion_k(0.1, kappa="nuclear"),
        o.quantize_state(optax.trace(0.9), block_size=2, min_size=1),
        o.quantize_state(optax.trace(0.9), block_size=5, min_size=1, chunk_size=10),
    ):

        @jax.jit
        def steps(params, *grads):
            state = tx.init(params)
            for g in grads:
                updates, state = tx.update(g, state, params)
                params = optax.apply_updates(params, updates)
            return params, updates, state

        alone, placed = steps(params, *grads), steps(*on_mesh)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(placed), strict=True):
            # Relative to the leaf, or to the parameters: updates may be differences of numbers of order 1.
            atol = 1e-6 * max(1, np.max(np.abs(a)))
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=atol)
        for name in specs:
            assert placed[0][name].sharding == placed[1][name].sharding == shardings[name]
    updates, _ = o.fira(0.1, 2).update(on_mesh[1], o.fira(0.1, 2).init(on_mesh[0]), on_mesh[0])
    assert updates["both"].sharding == shardings["both"]  # without jit, too


def test_every_export_is_documented_and_under_test():
    """In the laws above, or in a file of its own that calls it by name."""
    own = "".join(
        path.read_text(encoding="utf-8") for path in pathlib.Path(__file__).parent.glob("test_*.py")
    )
    tested = {name for case in CASES.values() for name in case.exports}
    for name in o.__all__:
        assert getattr(o, name).__doc__
        assert name in tested or name.endswith("State") or f"{name}(" in own, name
