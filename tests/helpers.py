"""Helpers of many tests: comparisons, expected errors, logits of both kinds, dense formulas, optimizer steps."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft

# --- comparisons -----------------------------------------------------------------------------------------


def close(a, b, tolerance=1e-6):
    """Asserts `|a - b| <= tolerance`."""
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance)


def near(a, b, tolerance=1e-9):
    """Asserts `|a - b| <= tolerance * (1 + |b|)`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def trees_close(a, b, tolerance=1e-12):
    """Asserts that the leaves of two trees have equal shapes and are `near`."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        near(x, y, tolerance)


def fails(words, kind, call):
    """Asserts that `call()` raises a `kind`, no subclass of it, whose message contains all words."""
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind, error.value
    assert all(word in str(error.value) for word in words), error.value


# --- logits ----------------------------------------------------------------------------------------------


def streamed(scores, block_size=2):
    """Scores as an expression whose hidden states are the identity."""
    scores = jnp.asarray(scores)
    return jaxsoft.linear_logits(jnp.eye(len(scores), dtype=scores.dtype), scores, block_size=block_size)


def kinds(test):
    """Runs a test on stored and on streamed logits; `make test` runs it on one of them."""
    return pytest.mark.table(pytest.mark.parametrize("kind", ["dense", "streamed"])(test))


def logits_of(scores, kind, block_size=2):
    """Scores as an array or as an expression, by the kind."""
    return jnp.asarray(scores) if kind == "dense" else streamed(scores, block_size)


def example(n=6, columns=5, scale=2.0):
    """Random scores `[n, columns]`, labels, and a cotangent of the losses."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, columns)) * scale, rng.integers(0, columns, n), rng.normal(size=n)


# --- gradients -------------------------------------------------------------------------------------------


def values_and_gradient(loss, x, labels, g, kind="dense", **options):
    """Values, and the gradient of their sum weighted by g."""

    def f(x):
        values = loss(logits_of(x, kind), jnp.asarray(labels), **options)
        return jnp.vdot(values, jnp.asarray(g)), values

    gradient, values = jax.jit(jax.grad(f, has_aux=True))(jnp.asarray(x))
    return np.asarray(values), np.asarray(gradient)


def jacobian(loss, x):
    """The loss of each row, and its gradient with respect to that row."""
    values, pullback = jax.vjp(loss, x)
    return values, pullback(jnp.ones_like(values))[0]


def rows_and_gradients(loss, x, other, where):
    """The loss of each row of two arrays, and the gradients with respect to both rows."""
    values, pullback = jax.vjp(lambda x, other: loss(x, other, where), x, other)
    return values, pullback(jnp.ones_like(values))


def absent_in_one_row(run, x, other, first, second):
    """The law of two rows `[2, 3, columns]`: -inf in one is the limit of ever lower scores; a mask takes from both.

    `run(x, other, where)` is `rows_and_gradients` of a loss in float64; `first` and `second` are the columns to take.
    """
    taken_x, taken_other = np.zeros((2, *x.shape), bool)
    taken_x[0, 0, first] = taken_x[0, 2, first] = True
    taken_other[0, 1, first] = taken_other[0, 2, second] = True

    def at(score, where=True):
        rows = (np.where(taken, score, a) for taken, a in ((taken_x, x), (taken_other, other)))
        values, gradients = run(*map(jnp.asarray, rows), jnp.broadcast_to(where, x.shape))
        return np.asarray(values), [np.asarray(g) for g in gradients]

    (low, _), (lower, expected), (values, gradients) = map(at, (-1500.0, -3000.0, -np.inf))
    has_limit = np.isfinite(lower) & np.isclose(low, lower, rtol=1e-12, atol=1e-12)
    assert np.all(has_limit[1])  # unchanged rows
    near(values[has_limit], lower[has_limit])
    assert np.all(values[~has_limit] == np.inf)
    for taken, gradient, limit in zip((taken_x, taken_other), gradients, expected):
        near(gradient[has_limit], limit[has_limit])
        assert not np.any(gradient[~has_limit]) and not np.any(gradient[taken])

    # Masked classes, NaN in both rows
    either = taken_x | taken_other
    taken_x = taken_other = either
    masked, absent = at(np.nan, ~either), at(-np.inf)
    trees_close(masked, absent)
    # A row of -inf is empty.
    taken_x, taken_other = np.zeros((2, *x.shape), bool)
    taken_x[0, 0] = taken_other[1, 1] = True
    values, gradients = at(-np.inf)
    return values[[0, 1], [0, 1]], [g[[0, 1], [0, 1]] for g in gradients]


def is_float(a):
    """Whether an array has a floating dtype."""
    return jnp.issubdtype(a.dtype, jnp.floating)


def floats(result):
    """The float leaves of a result."""
    return [a for a in jax.tree.leaves(result) if is_float(a)]


def contract_weights(result, seed=0):
    """The weights of `contract`."""
    return [
        jnp.asarray(np.random.default_rng(seed + i).normal(size=a.shape))
        for i, a in enumerate(floats(result))
    ]


def contract(result, weights=None, seed=0):
    """A sum of the float results that are not infinite with random, non-uniform weights."""
    total = 0.0
    for a, w in zip(floats(result), contract_weights(result, seed) if weights is None else weights):
        a = a.astype(jnp.float32) if a.dtype.itemsize < 4 else a
        w = w.astype(a.dtype)
        counts = ~jnp.isinf(jax.lax.stop_gradient(a))
        total = total + jnp.sum(jnp.where(counts, w * jnp.where(counts, a, 0), 0))
    return jnp.asarray(total)


def with_gradient(f, point):
    """The results of `f(point)` and the gradients of their contraction to all float leaves of the point."""
    inputs = {k: v for k, v in point.items() if is_float(v)}
    others = {k: v for k, v in point.items() if not is_float(v)}

    def scalar(inputs):
        result = f({**inputs, **others})
        return contract(result), result

    gradient, result = jax.grad(scalar, has_aux=True)(inputs)
    return result, gradient


# --- programs --------------------------------------------------------------------------------------------


def equations(jaxpr):
    """All equations of a jaxpr, those of its sub-jaxprs included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        for sub in filter(_is_jaxpr, leaves):
            yield from equations(sub)


def matrix_products(jaxpr, columns):
    """The dtypes that are multiplied in each product of two matrices, one of which has an axis of the columns.

    Not among them: vectors times matrices and outer products (the sums over columns of affine logits), sums of products
    along the columns (`Tile.dot`), and the `[d, d]` covariance of the weight times hidden. All of these are in float32.
    """
    for equation in equations(jaxpr):
        if equation.primitive.name not in ("dot_general", "half_precision_product"):
            continue
        a, b = (v.aval for v in equation.invars)
        contract, batch = equation.params["dimension_numbers"]
        free = [x.ndim - len(c) - len(k) for x, c, k in zip((a, b), contract, batch)]
        if 0 not in (*free, len(contract[0])) and columns in (*a.shape, *b.shape):
            yield {jnp.dtype(equation.params.get("dtype", x.dtype)) for x in (a, b)}


def _is_jaxpr(a):
    return hasattr(a, "eqns") or hasattr(a, "jaxpr")


# --- dense formulas in numpy -----------------------------------------------------------------------------


def softmax(x):
    """Softmax over the last axis; -inf is absent, a row without entries gives 0."""
    top = np.max(x, axis=-1, keepdims=True)
    w = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = w.sum(-1, keepdims=True)
    return w / np.where(total > 0, total, 1)


def sigmoid(x):
    """Sigmoid of each entry."""
    return 1 / (1 + np.exp(-np.asarray(x)))


# --- optimizers ------------------------------------------------------------------------------------------


def params_tree(dtype=jnp.float32):
    """A tree with a matrix, a vector, a scalar, an empty leaf and no leaf."""
    return {
        "matrix": jnp.asarray([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]], dtype),
        "nested": (jnp.asarray([0.5, -1.5], dtype), None),
        "scalar": jnp.asarray(2.0, dtype),
        "empty": jnp.zeros((0, 3), dtype),
    }


def descend(tx, params, gradient, xs=None, steps=None):
    """Parameters and state after a step on `gradient(params, x)` for each x, or `steps` times with x = None."""

    def step(carry, x):
        params, state = carry
        updates, state = tx.update(gradient(params, x), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), xs, steps)[0]


def steps_of(tx, params, grads, decay_after=0.0):
    """The parameters after each step, `[steps, *shape]`, and the last state; each step decays by `decay_after`."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates) * (1 - decay_after)
        return (params, state), params

    (_, state), out = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(params, grads)
    return out, state


def trajectory(tx, params, grads, decay_after=0.0):
    """The parameters after each step, as `steps_of`."""
    return steps_of(tx, params, grads, decay_after)[0]


def torch_trajectory(make, start, grads):
    """The parameters after each step of `make(pytorch_optimizer, [params])`, in float64."""
    torch, po = pytest.importorskip("torch"), pytest.importorskip("pytorch_optimizer")
    theta = torch.nn.Parameter(torch.tensor(start))
    optimizer, out = make(po, [theta]), []
    for g in grads:
        theta.grad = torch.tensor(g)
        optimizer.step()
        out.append(theta.detach().numpy().copy())
    return np.stack(out)


def temporary_bytes(tx, params):
    """Temporary memory of one compiled step; parameters and state are donated."""
    grads, state = jnp.ones_like(params), tx.init(params)

    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(grads, params, state).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@contextlib.contextmanager
def compilations():
    """A list that grows by one item per program that is compiled inside."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
