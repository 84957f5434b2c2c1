"""States and gradients in 8 bits: worked numbers, the map, bounds, oracles, memory, sharding, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import optimizers as o
from jaxsoft.optimizers import _codes


def is_quantized(x):
    return x.dtype == jnp.uint8


def moment(state, read, **options):
    """The values of a moment in 8 bits, which `read` selects from the inner state."""
    scales = jax.tree.structure(state.inner_state).unflatten(jax.tree.leaves(state.scales))
    return o.dequantize_blockwise(o.QuantizedArray(read(state.inner_state), read(scales)), **options)


def trajectory(tx, theta, grads):
    state, update = tx.init(theta), jax.jit(tx.update)
    for g in grads:
        updates, state = update(jnp.asarray(g, theta.dtype), state, theta)
        theta = optax.apply_updates(theta, updates)
        yield theta, state


FIXTURE = [[0.5, 1.0], [-0.25, 4.0], [0.1, -0.2]]


@pytest.mark.parametrize("chunk_size", [None, 256])
def test_worked_example_adam(x64, chunk_size):
    tx = o.quantize_state(optax.adam(0.1), min_size=1, chunk_size=chunk_size)
    expected = [
        ([219, 255], 0.1, [148, 255], 0.001, [0.900000002, -2.099999999]),
        ([170, 255], 0.49, [69, 255], 0.016999, [0.873322629803, -2.188437647754]),
        ([179, 255], 0.421, [69, 255], 0.017022001, [0.841677711712, -2.253623138767]),
    ]
    for (theta, state), row in zip(trajectory(tx, jnp.array([1.0, -2.0]), FIXTURE), expected):
        (_, mu_codes, nu_codes), (_, mu_scales, nu_scales) = state.inner_state[0], state.scales[0]
        np.testing.assert_array_equal(mu_codes, row[0])
        np.testing.assert_allclose(mu_scales, [row[1]], rtol=1e-9)
        np.testing.assert_array_equal(nu_codes, row[2])
        np.testing.assert_allclose(nu_scales, [row[3]], rtol=1e-9)
        np.testing.assert_allclose(theta, row[4], rtol=0, atol=2e-9)


def test_worked_example_lion(x64):
    tx = o.quantize_state(optax.lion(0.1, weight_decay=0.1), min_size=1)
    codes = [[219, 255], [172, 255], [180, 255]]
    plain = trajectory(optax.lion(0.1, weight_decay=0.1), jnp.array([1.0, -2.0]), FIXTURE)
    for (theta, state), expected, (exact, _) in zip(
        trajectory(tx, jnp.array([1.0, -2.0]), FIXTURE), codes, plain
    ):
        np.testing.assert_array_equal(state.inner_state[0].mu, expected)
        np.testing.assert_allclose(theta, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_map(signed):
    values = np.asarray(o.dynamic_code_map(signed))
    assert values.shape == (256,) and np.all(np.diff(values) > 0)
    zero = 127 if signed else 0
    assert values[zero] == 0 and values[255] == 1
    np.testing.assert_allclose(values[zero + 1], 5.5e-7 if signed else 3.25e-7, rtol=1e-6)
    np.testing.assert_allclose(values[0], -0.99296875 if signed else 0, rtol=1e-6)
    gaps = np.diff(values[zero:])
    np.testing.assert_allclose(gaps.max(), 0.9 / (64 if signed else 128), rtol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values(signed, x64):
    """The arithmetic against a search in the map, also next to every boundary."""
    values = _codes.DynamicMap(signed).values()
    middles = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(0)
    y = rng.uniform(-1 if signed else 0, 1, 20_000) * 10.0 ** rng.integers(-9, 1, 20_000)
    y = np.concatenate([y, middles * (1 + 1e-12), middles * (1 - 1e-12), values])
    codes = _codes.DynamicMap(signed).encode(jnp.asarray(y))
    np.testing.assert_array_equal(codes, np.searchsorted(middles, y))


@pytest.mark.parametrize("signed", [True, False])
def test_decoding_is_the_map(signed):
    codes = jnp.arange(256, dtype=jnp.uint8)
    values = _codes.DynamicMap(signed).decode(codes, jnp.float32)
    np.testing.assert_allclose(values, o.dynamic_code_map(signed), rtol=1e-6)
    np.testing.assert_array_equal(_codes.DynamicMap(signed).encode(values), codes)


SHAPES = [(), (700,), (3, 512), (4, 300), (30, 4, 5), (0, 3), (3, 0)]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_bounded_by_the_block(shape, signed):
    x = jax.random.normal(jax.random.key(0), shape) ** 3
    x = x if signed else jnp.abs(x)
    q = o.quantize_blockwise(x, signed=signed)
    assert q.codes.shape == x.shape and q.codes.dtype == jnp.uint8 and q.scales.ndim == x.ndim
    back = o.dequantize_blockwise(q, signed=signed)
    layout = _codes.layout_of(shape, 256)
    bound = np.abs(_codes.spread(q.scales, shape, layout)) * (0.0071 if signed else 0.0036)
    assert np.all(np.abs(back - x) <= bound)
    # What has been rounded once stays.
    again = o.quantize_blockwise(back, signed=signed)
    np.testing.assert_array_equal(o.dequantize_blockwise(again, signed=signed), back)


def test_blocks_follow_the_last_axes():
    shapes = {
        (50, 512): (50, 2),
        (50, 300): (50, 2),
        (30, 64, 3): (23, 1, 1),
        (7, 64, 4): (7, 1, 1),
        (9,): (1,),
    }
    for shape, expected in shapes.items():
        assert jax.eval_shape(o.quantize_blockwise, jnp.zeros(shape)).scales.shape == expected, shape


@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-30, -1e30])
def test_constant_block_is_exact(value):
    x = jnp.full(300, value)
    np.testing.assert_array_equal(o.dequantize_blockwise(o.quantize_blockwise(x)), x)
    extreme = x.at[7].set(2 * value)
    assert o.dequantize_blockwise(o.quantize_blockwise(extreme))[7] == 2 * value


def test_not_finite_and_tiny_blocks():
    x = jnp.ones(768).at[3].set(jnp.nan).at[300].set(-jnp.inf)
    back = o.dequantize_blockwise(o.quantize_blockwise(x))
    assert np.all(np.isnan(back[:256])) and not np.any(np.isfinite(back[256:512]))
    np.testing.assert_array_equal(back[512:], 1.0)
    tiny = o.quantize_blockwise(jnp.full(4, 1e-40))
    np.testing.assert_array_equal(o.dequantize_blockwise(tiny), 0.0)


def test_equals_bitsandbytes():
    functional, torch = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("torch")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed).numpy()
        np.testing.assert_allclose(o.dynamic_code_map(signed), theirs, rtol=0, atol=1e-7)
    x = np.random.default_rng(0).standard_normal((390, 256)).astype(np.float32)
    codes, state = functional.quantize_blockwise(torch.tensor(x), blocksize=256)
    theirs = functional.dequantize_blockwise(codes, state).numpy()
    ours = np.asarray(o.dequantize_blockwise(o.quantize_blockwise(jnp.asarray(x))))
    scale = np.abs(x).max(1, keepdims=True)
    assert np.mean(np.abs(ours - theirs) / scale > 1e-6) < 0.005
    assert np.all(np.abs(ours - theirs) <= scale * 0.0142)
    assert np.abs(ours - x).mean() <= np.abs(theirs - x).mean()


def test_hundred_steps_follow_bitsandbytes_adam():
    bnb, torch = pytest.importorskip("bitsandbytes"), pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.standard_normal(8192).astype(np.float32)
    theta = torch.nn.Parameter(torch.tensor(start))
    optimizer = bnb.optim.Adam8bit([theta], lr=1e-2)
    grads = rng.standard_normal((100, 8192)).astype(np.float32)
    for g in grads:
        theta.grad = torch.tensor(g)
        optimizer.step()
    *_, (params, _) = trajectory(o.quantize_state(optax.adam(1e-2)), jnp.asarray(start), grads)
    moved = np.abs(theta.detach().numpy() - start).mean()
    assert np.abs(params - theta.detach().numpy()).mean() < 0.05 * moved


@pytest.mark.parametrize("chunk_size", [None, 1000])
def test_hundred_steps_stay_close_to_adam(chunk_size):
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.standard_normal(5000), jnp.float32)
    grads = jnp.asarray(rng.standard_normal((100, 5000)) + 0.3 * rng.standard_normal(5000), jnp.float32)

    def run(tx):
        def step(carry, g):
            theta, state = carry
            updates, state = tx.update(g, state, theta)
            return (optax.apply_updates(theta, updates), state), None

        return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), grads)[0][0])()

    exact = run(optax.adam(1e-2))
    close = run(o.quantize_state(optax.adam(1e-2), chunk_size=chunk_size))
    moved = jnp.linalg.norm(exact - start)
    assert 0 < jnp.linalg.norm(close - exact) < 0.02 * moved


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def test_trained_loss_is_that_of_adam():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"in": (64, 128), "out": (128, 64)}
    params = {k: 0.1 * jax.random.normal(key, shapes[k]) for k, key in zip(shapes, keys)}
    x = jax.random.normal(keys[2], (128, 64))
    y = jnp.sin(x @ jax.random.normal(keys[3], (64, 64)) / 4)

    def train(tx):
        def step(carry, _):
            p, state = carry
            loss, g = jax.value_and_grad(lambda p: jnp.mean((network(p, x) - y) ** 2))(p)
            updates, state = tx.update(g, state, p)
            return (optax.apply_updates(p, updates), state), loss

        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), None, 300)[1])()

    plain, ours = train(optax.adam(3e-3)), train(o.quantize_state(optax.adam(3e-3)))
    assert plain[-1] < 0.2 * plain[0]
    assert ours[-1] < 1.05 * plain[-1]


def test_pieces_equal_the_whole():
    """Blocks across rows, ragged rows, small leaves, leaves of the same shape, no parameters."""
    params = {
        "a": jnp.ones((6, 64)),
        "b": jnp.ones((5, 300)),
        "c": jnp.ones(3),
        "d": (jnp.ones((6, 64)), None),
    }
    rng = np.random.default_rng(0)
    grads = [
        jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params) for _ in range(3)
    ]
    inner = lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1))
    results = []
    for chunk_size in (None, 300):
        tx = o.quantize_state(inner(), min_size=100, chunk_size=chunk_size)
        p, state, update = params, tx.init(params), jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state, p)
            p = optax.apply_updates(p, updates)
        results.append((p, state))
    for other in results[1:]:
        chex.assert_trees_all_close(other, results[0], rtol=1e-6, atol=1e-7)


def test_state_is_two_bytes_a_parameter():
    """A tree of 50 million parameters as a transformer has it, never allocated."""
    layer = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768), "norm": (768,)}
    shapes = {"layers": [dict(layer) for _ in range(2)], "table": (50257, 768)}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    size = sum(p.size for p in jax.tree.leaves(params))
    assert 50e6 < size < 60e6
    for tx, limit in ((optax.adamw(1e-3), 2.05), (optax.lion(1e-3), 1.03), (o.spam(1e-3), 2.05)):
        state = jax.eval_shape(o.quantize_state(tx).init, params)
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) <= limit * size


def test_memory_of_a_step_in_pieces():
    """Many leaves: beside the updates (over the donated gradients in training) nothing of their size."""
    params = [jnp.ones((512, 512)) for _ in range(8)]
    tx = o.quantize_state(optax.adam(1e-3), chunk_size=1 << 14)

    def train(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    args = params, jax.eval_shape(tx.init, params)
    compiled = jax.jit(train, donate_argnums=(0, 1)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.15 * sum(p.nbytes for p in params)


def test_which_leaves_are_quantized():
    params = {"w": jnp.ones((16, 16)), "nu": jnp.ones((16, 16)), "small": jnp.ones(8), "scalar": jnp.ones([])}
    tx = o.quantize_state(optax.inject_hyperparams(optax.adam)(1e-3), min_size=64, block_size=64)
    state = tx.init(params)
    adam = state.inner_state.inner_state[0]
    for moments in (adam.mu, adam.nu):
        assert is_quantized(moments["w"]) and is_quantized(moments["nu"])
        assert not is_quantized(moments["small"]) and not is_quantized(moments["scalar"])
    assert optax.tree.get(state, "learning_rate") == pytest.approx(1e-3)
    # The parameter called nu has signs in its first moment.
    grads = jax.tree.map(lambda p: -p, params)
    _, state = tx.update(grads, state, params)
    read = functools.partial(moment, state, block_size=64)
    np.testing.assert_allclose(read(lambda s: s.inner_state[0].mu["nu"]), -0.1, rtol=1e-5)
    for name in ("nu", "w"):
        values = read(lambda s: s.inner_state[0].nu[name], signed=False)
        np.testing.assert_allclose(values, 0.001, rtol=1e-4)


def test_unsigned_names():
    params = jnp.linspace(0.0, 1.0, 300)
    tx = o.quantize_state(optax.trace(0.9), min_size=1, unsigned=("trace",))
    _, state = tx.update(params, tx.init(params), params)
    error = moment(state, lambda s: s.trace, signed=False) - params
    assert jnp.max(jnp.abs(error)) < 0.0036


@pytest.mark.parametrize("chunk_size", [None, 256])
@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_second_moments_never_become_zero(stochastic_rounding, chunk_size):
    """A gradient of 1 beside one of 1e-4: the second moment's ratio of 1e-8 is below the map."""
    params = jnp.zeros(256)
    grads = jnp.full(256, 1e-4).at[0].set(1.0)
    rounding = dict(stochastic_rounding=stochastic_rounding, chunk_size=chunk_size)
    tx = o.quantize_state(optax.scale_by_adam(), min_size=1, **rounding)
    _, state = tx.update(grads, tx.init(params), params)
    assert np.all(state.inner_state.nu > 0)
    updates, _ = tx.update(jnp.zeros(256), state, params)
    assert jnp.max(jnp.abs(updates)) < 2


@pytest.mark.parametrize("as_function", [True, False])
def test_mask_keeps_embeddings_in_float32(as_function):
    params = {"embed": {"table": jnp.ones((64, 64))}, "head": jnp.ones((64, 64))}
    mask = {"embed": False, "head": True}
    tx = o.quantize_state(optax.adam(1e-3), mask=(lambda _: mask) if as_function else mask)
    adam = tx.init(params).inner_state[0]
    for moments in (adam.mu, adam.nu):
        assert moments["embed"]["table"].dtype == jnp.float32 and is_quantized(moments["head"])


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda g: value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.trace(0.5).init, update)
    for chunk_size in (None, 256):
        tx, g = o.quantize_state(inner, min_size=1, chunk_size=chunk_size), jnp.ones(300)
        np.testing.assert_allclose(tx.update(g, tx.init(g), g, value=3.0)[0], 3.0)


def test_stochastic_rounding_has_no_bias():
    x = jnp.concatenate([jnp.linspace(-0.98, 0.98, 40), jnp.array([1.0, 3e-7, -3e-7])])
    draws = 2000
    keys = jax.random.split(jax.random.key(0), draws)
    layout, code_map = _codes.layout_of(x.shape, 256), _codes.DynamicMap(True)
    q = jax.jit(jax.vmap(lambda key: _codes.encode(x, layout, code_map, key)))(keys)
    values = jax.vmap(lambda codes, scales: o.dequantize_blockwise(o.QuantizedArray(codes, scales)))(*q)
    spread = np.asarray(values).std(0)
    np.testing.assert_array_less(np.abs(values.mean(0) - x), 5 * spread / np.sqrt(draws) + 1e-6)
    assert spread[1] > 0
    nearest = o.dequantize_blockwise(o.quantize_blockwise(x))
    assert np.all(np.abs(values - x).max(0) >= np.abs(nearest - x) - 1e-7)


@pytest.mark.parametrize(
    "stochastic",
    [
        lambda key: o.quantize_state(optax.trace(0.0), min_size=1, stochastic_rounding=True, key=key),
        lambda key: o.compress_gradients(stochastic_rounding=True, error_feedback=True, key=key),
    ],
)
def test_an_integer_stands_for_its_key(stochastic):
    g = jax.random.normal(jax.random.key(0), (300,))
    results = [tx.update(g, tx.init(g)) for tx in map(stochastic, (7, jax.random.key(7), 8))]
    chex.assert_trees_all_equal(results[0], results[1])
    assert any(jnp.any(a != b) for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[2])))


def test_workers_round_the_same_gradient_differently():
    """Otherwise their rounding errors would not average out."""
    tx = o.compress_gradients("linear", axis_name="i", stochastic_rounding=True)
    gradient = jnp.full(1000, 0.3).at[0].set(1)
    mean = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="i")(jnp.stack([gradient] * 16))[0, 1:]
    # A worker's code is one step of 1 / 127 up or down: its standard deviation is at most half of that.
    assert np.std(mean) < 1.5 * 0.5 / 127 / np.sqrt(16)
    assert abs(np.mean(mean) - 0.3) < 2e-4


def test_stochastic_rounding_differs_from_step_to_step():
    tx = o.quantize_state(optax.trace(0.0), min_size=1, stochastic_rounding=True)
    g = jax.random.normal(jax.random.key(0), (300,))
    _, first = tx.update(g, tx.init(g))
    _, second = tx.update(g, first)
    _, again = tx.update(g, tx.init(g))
    assert np.any(first.inner_state.trace != second.inner_state.trace)
    chex.assert_trees_all_equal(first, again)


@pytest.mark.parametrize("codebook", ["dynamic", "linear"])
@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_exchange_is_the_mean_of_the_rounded(codebook, stochastic_rounding):
    grads = jax.random.normal(jax.random.key(0), (4, 40))
    tx = o.compress_gradients(codebook, axis_name="i", stochastic_rounding=stochastic_rounding)
    mean = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="i")(grads)
    np.testing.assert_array_equal(mean, jnp.broadcast_to(mean[0], mean.shape))
    bound = (2 if stochastic_rounding else 1) * (0.0071 if codebook == "dynamic" else 0.5 / 127 + 1e-6)
    largest = jnp.mean(jnp.max(jnp.abs(grads), axis=1))
    assert jnp.max(jnp.abs(mean[0] - grads.mean(0))) <= bound * largest


@pytest.mark.parametrize("codebook", ["dynamic", "linear"])
def test_compression_without_bias(codebook):
    g = jax.random.normal(jax.random.key(1), (30,))
    tx = o.compress_gradients(codebook, stochastic_rounding=True)
    draws = 2000
    counts = jnp.arange(draws, dtype=jnp.int32)
    read = jax.jit(jax.vmap(lambda i: tx.update(g, o.CompressGradientsState(i, optax.EmptyState()))[0]))(
        counts
    )
    spread = np.asarray(read).std(0)
    np.testing.assert_array_less(np.abs(read.mean(0) - g), 5 * spread / np.sqrt(draws) + 1e-6)


def test_error_feedback_loses_nothing():
    """What was sent so far and the residual add up to the gradients."""
    tx = o.compress_gradients("linear", error_feedback=True)
    state, sent, total = tx.init(jnp.zeros(20)), 0.0, 0.0
    for step in range(20):
        g = jax.random.normal(jax.random.key(step), (20,)) * jnp.logspace(-4, 0, 20)
        out, state = tx.update(g, state)
        sent, total = sent + out, total + g
    np.testing.assert_allclose(sent + state.residual, total, rtol=1e-4, atol=1e-5)
    assert jnp.max(jnp.abs(state.residual)) < 0.03


def test_shards_keep_their_blocks():
    """Rows sharded: no exchange of data, for the state or in the step; and the exchange of gradients."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = o.quantize_state(optax.adam(0.1), min_size=1)
    params = {"w": jnp.ones((8, 512)), "b": jnp.ones((8, 100))}
    shardings = {"w": NamedSharding(mesh, P("x", None)), "b": NamedSharding(mesh, P())}
    put = lambda x, s: jax.device_put(x, s) if x.ndim else x
    state = optax.tree_map_params(tx, put, tx.init(params), shardings)
    for tree in (state.inner_state, state.scales):
        assert tree[0][1]["w"].sharding.spec == P("x", None), tree
    placed = jax.tree.map(jax.device_put, params, shardings)
    grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
    step = jax.jit(tx.update).lower(jax.tree.map(jax.device_put, grads, shardings), state, placed).compile()
    assert "all-" not in step.as_text() and "collective-permute" not in step.as_text()
    u, state = step(jax.tree.map(jax.device_put, grads, shardings), state, placed)
    expected, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), u, expected)

    tx = o.compress_gradients(axis_name="x")
    g = jnp.array(np.random.default_rng(0).standard_normal((4, 64)), jnp.float32)
    spec = dict(mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    exchange = jax.jit(jax.shard_map(lambda g: tx.update(g, tx.init(g))[0], **spec))
    text = exchange.lower(g).compile().as_text()
    assert "u8[4,1,64]" in text or "u8[4,64]" in text, text
    np.testing.assert_allclose(exchange(g), jnp.tile(g.mean(0), (4, 1)), atol=0.03)


@pytest.mark.parametrize(
    "inner", [optax.clip_by_block_rms(1.0), o.scale_by_stable_spam(), optax.scale_by_novograd()]
)
def test_pieces_refuse_what_mixes_entries(inner):
    tx = o.quantize_state(optax.chain(optax.trace(0.9), inner), min_size=1, chunk_size=64)
    params = jnp.ones((16, 16))
    with pytest.raises(ValueError, match="chunk_size"):
        tx.update(params, tx.init(params), params)


def test_bad_arguments():
    adam = optax.adam(1e-3)
    for kwargs, error in [
        ({"block_size": 0}, ValueError),
        ({"block_size": 2.5}, TypeError),
        ({"min_size": -1}, ValueError),
        ({"chunk_size": 0}, ValueError),
        ({"unsigned": "nu"}, TypeError),
        ({"stochastic_rounding": 1}, TypeError),
        ({"key": 0.5}, TypeError),
    ]:
        with pytest.raises(error, match=next(iter(kwargs))):
            o.quantize_state(adam, **kwargs)
    with pytest.raises(ValueError, match="codebook"):
        o.compress_gradients("fp8")
    with pytest.raises(TypeError, match="error_feedback"):
        o.compress_gradients(error_feedback="yes")
    with pytest.raises(TypeError, match="x must"):
        o.quantize_blockwise(jnp.arange(3))
    with pytest.raises(TypeError, match="signed"):
        o.quantize_blockwise(jnp.ones(3), signed=2)
    q = o.quantize_blockwise(jnp.ones(512))
    with pytest.raises(ValueError, match="scales"):
        o.dequantize_blockwise(q, block_size=128)
    with pytest.raises(TypeError, match="codes"):
        o.dequantize_blockwise(o.QuantizedArray(jnp.ones(512), q.scales))


@pytest.mark.parametrize("shape", [(), (7, 3)])
def test_a_block_of_one_entry_comes_back_exactly(shape):
    """And blocks that are as long as all entries but one, or longer than all."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    one = o.quantize_blockwise(x, block_size=1)
    assert one.scales.size == x.size
    np.testing.assert_allclose(o.dequantize_blockwise(one, block_size=1), x, rtol=1e-6)
    for block in (max(x.size - 1, 1), x.size + 1):
        back = o.dequantize_blockwise(o.quantize_blockwise(x, block_size=block), block_size=block)
        np.testing.assert_allclose(back, x, atol=0.0071 * np.max(np.abs(x)))
