"""`linear_logits`: an expression that behaves like an array, refuses what it cannot do, and stores nothing."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import fails, matrix_products, trees_close

import jaxsoft
from jaxsoft import losses
from jaxsoft.rows import reduce_rows, reductions

N, D, V, BLOCK = 4, 3, 10, 4
cross_entropy = losses.cross_entropy


def operands(leading=(N,), columns=V, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        hidden=jnp.asarray(rng.normal(size=(*leading, D)), dtype),
        weight=jnp.asarray(rng.normal(size=(D, columns)), dtype),
        bias=jnp.asarray(rng.normal(size=columns), dtype),
        scale=jnp.asarray(0.5 + rng.random(leading), dtype),
        temperature=jnp.asarray(0.5 + rng.random(leading), dtype),
    )


def expression(p, **options):
    arrays = {k: p.get(k) for k in ("bias", "scale", "temperature")}
    return jaxsoft.linear_logits(p["hidden"], p["weight"], **{"block_size": BLOCK, **arrays, **options})


def stored(p, softcap=None):
    """The dense logits, by the formula."""
    x = p["hidden"] @ p["weight"]
    x = x if p.get("scale") is None else x * p["scale"][..., None]
    x = x if p.get("bias") is None else x + p["bias"]
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    return x if p.get("temperature") is None else x / p["temperature"][..., None]


def labels_of(leading=(N,), columns=V, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, columns, leading), jnp.int32)


def plain_loss(x, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(x), labels[..., None], -1)[..., 0]


def cotangent(leading=(N,), seed=2):
    return jnp.asarray(np.random.default_rng(seed).normal(size=leading))


# --- what it looks like ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("leading", [(), (N,), (2, 3)], ids=str)
def test_the_face_of_an_array(leading, transpose, x64):
    p = operands(leading)
    given = {**p, "weight": p["weight"].T} if transpose else p
    logits = expression(given, softcap=2.0, transpose_weight=transpose)
    assert logits.shape == (*leading, V) and logits.ndim == len(leading) + 1
    assert logits.size == int(np.prod(leading)) * V and logits.dtype == jnp.float64
    assert logits.vocab_size == V
    trees_close(logits.dense(), stored(p, softcap=2.0))
    assert logits.dense().shape == logits.shape and logits.dense().dtype == logits.dtype


def test_dtypes():
    h, w = jnp.ones((N, D), jnp.bfloat16), jnp.ones((D, V), jnp.float32)
    assert jaxsoft.linear_logits(h, w).dtype == jnp.float32
    assert jaxsoft.linear_logits(h, w.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert jaxsoft.linear_logits(h, w.astype(jnp.bfloat16)).dense().dtype == jnp.bfloat16
    assert jaxsoft.logsumexp(jaxsoft.linear_logits(h, w.astype(jnp.bfloat16))).dtype == jnp.float32
    assert jaxsoft.linear_logits(np.ones((N, D), np.float32), np.ones((D, V), np.float32)).shape == (N, V)


def test_division_and_multiplication_by_numbers_and_rows(x64):
    p = operands()
    bare = {k: p[k] for k in ("hidden", "weight")}
    logits, x, t = expression(bare), stored(bare), p["temperature"]
    trees_close((logits / 2).dense(), x / 2)
    trees_close((logits * 2).dense(), x * 2)
    trees_close((3 * logits / 0.5).dense(), x * 6)
    trees_close((logits / jnp.float64(2)).dense(), x / 2)
    for rows in (t, t[:, None]):
        trees_close((logits / rows).dense(), x / t[:, None])
        trees_close((logits * rows).dense(), x * t[:, None])
    trees_close((logits / t / 2).dense(), x / t[:, None] / 2)
    # On top of a softcap, division comes after it.
    trees_close((expression(bare, softcap=1.0) / 2).dense(), jnp.tanh(x) / 2)
    trees_close(jaxsoft.temperature(logits, t).dense(), x / t[:, None])
    trees_close(jaxsoft.softcap(logits, 1.5).dense(), 1.5 * jnp.tanh(x / 1.5))
    gradient = jax.grad(lambda t: jnp.sum(cotangent() * jaxsoft.logsumexp(logits / t)))(t)
    expected = jax.grad(lambda t: jnp.sum(cotangent() * jax.nn.logsumexp(x / t[:, None], -1)))(t)
    trees_close(gradient, expected)


def test_scale_and_temperature_by_number_get_a_gradient(x64):
    """As arrays: a scalar, or one number per row. A Python number gives the same value."""
    p = operands()
    bare = {k: p[k] for k in ("hidden", "weight")}

    def f(scale, temperature, dense):
        given = dict(
            bare, scale=jnp.broadcast_to(scale, (N,)), temperature=jnp.broadcast_to(temperature, (N,))
        )
        x = stored(given) if dense else expression(dict(bare, scale=scale, temperature=temperature))
        return jnp.sum(cotangent() * (plain_loss if dense else cross_entropy)(x, labels_of()))

    for point in ((jnp.asarray(1.7), jnp.asarray(0.6)), (p["scale"], p["temperature"])):
        got, expected = (
            jax.jit(jax.grad(functools.partial(f, dense=d), (0, 1)))(*point) for d in (False, True)
        )
        trees_close(got, expected)
        assert all(jnp.all(g != 0) for g in got)
    trees_close(f(1.7, 0.6, False), f(jnp.asarray(1.7), jnp.asarray(0.6), True))
    assert f(2, 1, False) == f(2.0, 1.0, False)


@pytest.mark.parametrize(
    "use",
    [jnp.sum, np.asarray, jnp.exp, lambda x: jnp.ones(V) + x, lambda x: jnp.asarray(x), jax.nn.softmax],
    ids=["sum", "asarray", "exp", "add", "jnp.asarray", "softmax"],
)
def test_a_function_that_needs_the_array_names_dense(use):
    logits = expression(operands(dtype=np.float32))
    with pytest.raises(TypeError, match=re.escape("logits.dense()")) as error:
        use(logits)
    assert "(4, 10)" in str(error.value)


def test_methods_of_arrays():
    p = operands(dtype=np.float32)
    logits = expression(p)
    dense = logits.dense()
    np.testing.assert_array_equal(logits.argmax(axis=-1), dense.argmax(axis=-1))
    np.testing.assert_allclose(logits.max(axis=-1), dense.max(axis=-1), rtol=1e-6)
    fails(["axis", "-1", "0"], ValueError, lambda: logits.max(axis=0))
    for name, word in (
        ("sum", "reductions.sum()"),
        ("reshape", "hidden"),
        ("round", "a function of jaxsoft"),
    ):
        fails([name, word, f"logits.dense().{name}"], AttributeError, lambda n=name: getattr(logits, n))
    assert not hasattr(logits, "shard_shape_of_nothing")
    for use in (lambda x: x[0], lambda x: x + 1, lambda x: 2**x, lambda x: x >= 0, abs, len):
        fails(["(4, 10)", "logits.dense()"], TypeError, lambda f=use: f(logits))
    text = repr(dataclasses.replace(logits, softcap=30.0))
    assert text.startswith("LinearLogits(shape=(4, 10), dtype=float32, hidden=(4, 3)"), text
    assert "softcap=30.0" in text and "\n" not in text
    assert "object at" in repr(jax.tree.map(lambda _: None, logits))


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_accuracy(k):
    logits = expression(operands(dtype=np.float32))
    labels = jnp.asarray([*np.argsort(-logits.dense(), axis=-1)[[0, 1, 2], [0, 2, 3]], -100])
    expected = [1, k > 1, 0, 0]
    for x in (logits, logits.dense()):
        got = jaxsoft.top_k_accuracy(x, labels, k=k)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)
        mean = jaxsoft.losses.weighted_mean(jaxsoft.top_k_accuracy, x, labels, k=k)
        np.testing.assert_allclose(mean, sum(expected) / 3, rtol=1e-6)
    ignored = jaxsoft.top_k_accuracy(logits, labels, k=10, ignore_index=int(labels[1]))
    np.testing.assert_array_equal(ignored, (labels >= 0) & (labels != labels[1]))
    absent = jnp.arange(10) == labels[:, None]
    assert not jnp.any(jaxsoft.top_k_accuracy(logits, labels, k=k, where=~absent))
    fails(["k ", "10", "11"], ValueError, lambda: jaxsoft.top_k_accuracy(logits, labels, k=11))
    fails(["k ", "10", "11"], ValueError, lambda: jaxsoft.top_k(logits, 11))


def test_metrics_of_flax():
    nnx = pytest.importorskip("flax.nnx")
    logits = expression(operands(dtype=np.float32))
    labels = jnp.asarray([*np.argmax(logits.dense(), axis=-1)[:2], 0, 0], jnp.int32)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), top_3=nnx.metrics.Average("top_3"))
    metrics.update(logits=logits, labels=labels, top_3=jaxsoft.top_k_accuracy(logits, labels, k=3))
    expected = (
        jaxsoft.top_k_accuracy(logits.dense(), labels).mean(),
        jaxsoft.top_k_accuracy(logits, labels, k=3).mean(),
    )
    np.testing.assert_allclose([metrics.compute()[k] for k in ("accuracy", "top_3")], expected)


# --- a pytree like any other -----------------------------------------------------------------------------


def loss_of(logits, labels=None):
    return jnp.sum(cotangent() * cross_entropy(logits, labels_of() if labels is None else labels))


def plain_loss_of(p, softcap=None):
    return jnp.sum(cotangent() * plain_loss(stored(p, softcap), labels_of()))


def test_argument_of_jit_and_grad_with_respect_to_it(x64):
    p = operands()
    traces = []

    @jax.jit
    def f(logits):
        traces.append(0)
        return loss_of(logits)

    trees_close(f(expression(p)), plain_loss_of(p))
    f(expression({**p, "bias": p["bias"] + 1}))
    assert len(traces) == 1
    f(expression(p, block_size=5))  # another static option
    assert len(traces) == 2

    gradient = jax.jit(jax.grad(loss_of))(expression(p))
    assert isinstance(gradient, jaxsoft.LinearLogits) and gradient.shape == (N, V)
    expected = jax.grad(plain_loss_of)(p)
    trees_close({k: getattr(gradient, k) for k in p}, expected)

    leaves, treedef = jax.tree.flatten(expression(p))
    assert len(leaves) == 5
    trees_close(jax.tree.unflatten(treedef, leaves).dense(), stored(p))
    assert jax.tree.unflatten(treedef, [None] * 5).hidden is None  # what tree functions do is allowed
    assert jax.tree.map(lambda a: a.shape, expression(p)).weight == (D, V)


def test_vmap_over_anything(x64):
    p = operands()
    many = {k: jnp.stack([v, v * 1.5, jnp.roll(v, 1, axis=0)]) for k, v in p.items()}
    for names in (("hidden", "temperature"), ("weight", "bias", "scale")):
        axes = {k: 0 if k in names else None for k in p}
        mixed = {k: many[k] if k in names else p[k] for k in p}
        got, expected = (
            jax.jit(jax.vmap(jax.value_and_grad(f), (axes,)))(mixed)
            for f in (lambda p: loss_of(expression(p)), plain_loss_of)
        )
        trees_close(got, expected)
    # the expression is the argument, and in_axes is an expression of axes
    logits = jax.tree.unflatten(
        jax.tree.structure(expression(p)),
        [many["hidden"], p["weight"], p["bias"], many["scale"], p["temperature"]],
    )
    axes = jax.tree.unflatten(jax.tree.structure(expression(p)), [0, None, None, 0, None])
    got = jax.vmap(loss_of, in_axes=(axes,))(logits)
    plain_axes = {**dict.fromkeys(p), "hidden": 0, "scale": 0}
    expected = jax.vmap(plain_loss_of, (plain_axes,))({**p, "hidden": many["hidden"], "scale": many["scale"]})
    trees_close(got, expected)


def test_scan_over_it_and_through_it(x64):
    p = operands()
    many = {k: jnp.stack([v, v * 1.5, jnp.roll(v, 1, axis=0)]) for k, v in p.items()}
    stacked = jax.tree.unflatten(jax.tree.structure(expression(p)), list(many.values()))

    def f(stacked):
        return jax.lax.scan(lambda total, logits: (total + loss_of(logits), None), 0.0, stacked)[0]

    def plain(many):
        return sum(plain_loss_of({k: v[i] for k, v in many.items()}) for i in range(3))

    value, gradient = jax.jit(jax.value_and_grad(f))(stacked)
    expected, g = jax.value_and_grad(plain)(many)
    trees_close(value, expected)
    trees_close({k: getattr(gradient, k) for k in p}, g)


def test_transforms(x64):
    """checkpoint, linearize, jvp, forward and reverse Jacobians, Hessians, eval_shape."""
    p = operands()
    softcap = 2.0
    f = lambda p: loss_of(expression(p, softcap=softcap))
    plain = lambda p: plain_loss_of(p, softcap)
    gradient = jax.jit(jax.grad(plain))(p)
    trees_close(jax.jit(jax.grad(jax.checkpoint(f)))(p), gradient)
    direction = jax.tree.map(jnp.cos, p)
    value, linear = jax.linearize(jax.jit(f), p)
    trees_close((value, linear(direction)), jax.jit(lambda p, t: jax.jvp(plain, (p,), (t,)))(p, direction))
    shape = jax.eval_shape(lambda p: (expression(p), cross_entropy(expression(p), labels_of())), p)
    assert shape[0].shape == (N, V) and shape[1].shape == (N,) and shape[1].dtype == jnp.float64

    def rows_of(p, kind):
        x = expression(p, softcap=softcap) if kind == "streamed" else stored(p, softcap)
        return (cross_entropy if kind == "streamed" else plain_loss)(x, labels_of())

    expected = jax.jit(jax.jacrev(functools.partial(rows_of, kind="plain")))(p)
    for jacobian in (jax.jacfwd, jax.jacrev):
        trees_close(jax.jit(jacobian(functools.partial(rows_of, kind="streamed")))(p), expected)


def test_hessian(x64):
    p = {k: v for k, v in operands().items() if k in ("hidden", "scale", "weight")}
    f = lambda p: loss_of(expression(p, softcap=2.0))
    expected = jax.jit(jax.hessian(lambda p: plain_loss_of(p, 2.0)))(p)
    trees_close(jax.jit(jax.hessian(f))(p), expected, 1e-11)
    trees_close(jax.jit(jax.jacrev(jax.grad(f)))(p), expected, 1e-11)


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "columns", "block"),
    [(0, V, BLOCK), (N, 1, BLOCK), (N, 3, BLOCK), (N, BLOCK, BLOCK), (N, V, 1), (1, V, None), (0, 1, None)],
)
def test_sizes(n, columns, block, x64):
    p = operands((n,), columns)
    labels = labels_of((n,), columns)

    def f(p, dense):
        x = stored(p) if dense else expression(p, block_size=block)
        loss = (plain_loss if dense else cross_entropy)(x, labels)
        return jnp.sum(cotangent((n,)) * loss), loss

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(f, dense=d), has_aux=True))(p) for d in (False, True)
    )
    trees_close(got, expected)
    logits = expression(p, block_size=block)
    k = min(2, columns)
    assert jaxsoft.top_k(logits, k).values.shape == (n, k)
    value = losses.weighted_sum(cross_entropy, logits, labels, weights=cotangent((n,)))
    trees_close(value, expected[0][0])
    trees_close(
        losses.weighted_mean(cross_entropy, logits, labels), jnp.mean(expected[0][1]) if n else jnp.zeros(())
    )


def test_no_columns():
    """Without columns a row is empty: log-sum-exp -inf, sums 0."""
    h, w = jnp.ones((N, D)), jnp.ones((D, 0))
    logits = jaxsoft.linear_logits(h, w)
    assert logits.shape == (N, 0) and logits.size == 0
    for x in (logits, jnp.ones((N, 0))):
        np.testing.assert_array_equal(jaxsoft.logsumexp(x), np.full(N, -np.inf))
        out = reduce_rows(x, dict(n=reductions.count(), s=reductions.sum(), best=reductions.argmax()))
        np.testing.assert_array_equal(out["n"], np.zeros(N))
        np.testing.assert_array_equal(out["s"], np.zeros(N))
        np.testing.assert_array_equal(out["best"], np.full(N, -1))
    gradient = jax.grad(lambda h: jnp.sum(reduce_rows(jaxsoft.linear_logits(h, w), reductions.sum())))(h)
    np.testing.assert_array_equal(gradient, np.zeros((N, D)))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_bias_of_minus_infinity_takes_its_column_out(softcap, x64):
    """In every gradient, too: the gradient of a temperature was NaN once."""
    given = operands()
    labels = jnp.array([0, 3, 9, 1])
    absent = jnp.arange(V) == 5

    def loss(given, bias, where):
        logits = jaxsoft.linear_logits(**{**given, "bias": bias}, softcap=softcap, block_size=BLOCK)
        return jnp.sum(cross_entropy(logits, labels, where=where))

    got = jax.grad(loss)(given, jnp.where(absent, -jnp.inf, given["bias"]), None)
    want = jax.grad(loss)(given, given["bias"], ~absent)
    for name in ("hidden", "weight", "scale", "temperature"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_all_rows_ignored(softcap):
    p = operands(dtype=np.float32)
    p["hidden"] = p["hidden"].at[0].set(jnp.nan)
    labels = jnp.full(N, -100, jnp.int32)

    def f(p):
        logits = expression(p, softcap=softcap)
        return jnp.sum(cross_entropy(logits, labels, label_smoothing=0.1, z_loss=0.1))

    value, gradient = jax.value_and_grad(f)(p)
    assert value == 0
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_nan_column_under_a_class_mask(softcap, transpose, x64):
    p = operands()
    keep = jnp.arange(V) != 6
    labels = jnp.where(labels_of() == 6, 0, labels_of())

    def f(p):
        given = {**p, "weight": p["weight"].T} if transpose else p
        logits = expression(given, softcap=softcap, transpose_weight=transpose)
        return jnp.sum(cotangent() * cross_entropy(logits, labels, where=keep, label_smoothing=0.1))

    f = jax.jit(jax.value_and_grad(f))
    spoiled = {**p, "weight": p["weight"].at[:, 6].set(jnp.nan), "bias": p["bias"].at[6].set(jnp.nan)}
    value, gradient = f(spoiled)
    expected, clean = f(p)
    trees_close(value, expected)
    trees_close(gradient, clean)
    assert jnp.all(gradient["weight"][:, 6] == 0) and gradient["bias"][6] == 0


# --- precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_mixed_half_and_single(h, w):
    """The product is taken in the wider dtype: exact for these inputs but for float32 rounding."""
    p = operands(dtype=np.float32)
    hidden, weight = p["hidden"].astype(h), p["weight"].astype(w)

    def f(hidden, weight, loss, logits):
        return jnp.sum(
            cotangent().astype(logits(hidden, weight).dtype) * loss(logits(hidden, weight), labels_of())
        )

    streamed = lambda h, w: jaxsoft.linear_logits(h, w, block_size=BLOCK)
    value, gradient = jax.value_and_grad(f, (0, 1))(hidden, weight, cross_entropy, streamed)
    assert value.dtype == jnp.float32
    assert gradient[0].dtype == h and gradient[1].dtype == w
    with float64():
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (hidden, weight)]
        exact, exact_gradient = jax.value_and_grad(f, (0, 1))(*wide, plain_loss, jnp.matmul)
        exact, exact_gradient = float(exact), [np.asarray(a) for a in exact_gradient]
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    for g, e in zip(gradient, exact_gradient):
        # One rounding of the result to its dtype, 2**-8 of bfloat16. Absolute, as the terms are of size 1 to 10
        # and may cancel: a few units of float32.
        rtol = 2.0**-8 if g.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(g, np.float64), e, rtol=rtol, atol=5e-7)


@pytest.mark.parametrize("single", [False, True], ids=["half", "single"])
def test_bfloat16_gradients_over_many_blocks(single):
    """64 blocks: adding them up in bfloat16 would give 7e-3; one rounding of the sum is 1.7e-3.

    The gradient of a float32 weight is not rounded. Of its terms `H^T G`, G is, by 2**-8 of its size at most.
    """
    n, d, columns = 16, 32, 4096
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(n, d)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(d, columns)) / np.sqrt(d) * 3, jnp.bfloat16)
    weight = weight.astype(jnp.float32) if single else weight
    labels = labels_of((n,), columns)

    def f(hidden, weight):
        logits = jaxsoft.linear_logits(hidden, weight, dtype=jnp.bfloat16, block_size=64)
        return jnp.sum(cross_entropy(logits, labels))

    def mean(hidden, weight):
        logits = jaxsoft.linear_logits(hidden, weight, dtype=jnp.bfloat16, block_size=64)
        return losses.weighted_sum(cross_entropy, logits, labels, chunk_size=8)

    results = [jax.jit(jax.grad(g, (0, 1)))(hidden, weight) for g in (f, mean)]
    with float64():
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (hidden, weight)]
        exact = jax.grad(lambda h, w: jnp.sum(plain_loss(h @ w, labels)), (0, 1))(*wide)
        exact = [np.asarray(a) for a in exact]
        scores = np.asarray(wide[0] @ wide[1])
    for got in results:
        assert [g.dtype for g in got] == [hidden.dtype, weight.dtype]
        for g, e in zip(got, exact):
            error = np.linalg.norm(np.asarray(g, np.float64) - e) / np.linalg.norm(e)
            assert error <= 4e-3, error
        if single:
            error = np.abs(np.asarray(got[1], np.float64) - exact[1])
            g = np.exp(scores) / np.exp(scores).sum(1, keepdims=True) - np.eye(columns)[labels]
            assert np.all(error <= 2**-8 * np.abs(np.asarray(wide[0])).T @ np.abs(g) + 1e-6)
            rounded = got[1].astype(jnp.bfloat16).astype(jnp.float32)
            assert jnp.mean(got[1] == rounded) < 0.1


@pytest.mark.parametrize("bias", [False, True])
def test_closed_forms_in_half_precision(bias):
    """The sums without logits are those of the logits, which read the same rounded operands; not of rounded sums."""
    rng = np.random.default_rng(3)
    n, d, columns = 20, 8, 300
    hidden, weight = rng.normal(size=(n, d)), rng.normal(size=(d, columns)) + 0.5
    arrays = dict(hidden=hidden, weight=weight, bias=rng.normal(size=columns) if bias else None)
    arrays = {k: None if a is None else jnp.asarray(a, jnp.float32) for k, a in arrays.items()}

    @jax.jit
    def variance_and_sum(arrays):
        logits = jaxsoft.linear_logits(**arrays, dtype=jnp.bfloat16)
        moments, total = reduce_rows(logits, (reductions.moments(), reductions.sum()))
        return moments.variance, total

    rounded = {k: arrays[k].astype(jnp.bfloat16) for k in ("hidden", "weight")}
    rounded = {k: np.asarray(a, np.float64) for k, a in rounded.items()}
    x = rounded["hidden"] @ rounded["weight"] + (np.asarray(arrays["bias"], np.float64) if bias else 0)
    variance, total = variance_and_sum(arrays)
    np.testing.assert_allclose(variance, x.var(1), rtol=3e-6)
    np.testing.assert_allclose(total, x.sum(1), rtol=1e-5, atol=1e-4)


def _half(*, transpose=False, softcap=None, filter_eps=None, dtype=jnp.bfloat16):
    def logits(p):
        weight = p["weight"].T if transpose else p["weight"]
        arrays = dict(hidden=p["hidden"], weight=weight, bias=p["bias"], scale=p["scale"])
        options = dict(transpose_weight=transpose, softcap=softcap, filter_eps=filter_eps)
        return jaxsoft.linear_logits(**arrays, **options, dtype=dtype, block_size=BLOCK)

    return logits


def _nll(p, logits):
    return jnp.sum(cross_entropy(logits(p), labels_of()))


def _distilled(p):
    return jnp.sum(losses.distillation_loss(_half()(p), _half()({**p, "hidden": p["hidden"] + 1})))


def _contrasted(p):
    pair = jaxsoft.linear_logits(p["hidden"], p["weight"][:, :N], dtype="bfloat16", block_size=3)
    return jnp.sum(losses.clip_loss(pair))


def _cosines(p):
    logits = losses.cosine_logits(p["hidden"], p["weight"], dtype="bfloat16", block_size=BLOCK)
    return jnp.sum(cross_entropy(logits, labels_of()))


def _moments(p):
    """With more rows than features, from the covariance of the weights."""
    assert N > D
    return sum(jnp.sum(m) for m in reduce_rows(_half()(p), reductions.moments())[1:])


@pytest.mark.parametrize(
    ("f", "columns", "reverse_only"),
    [
        (functools.partial(_nll, logits=_half()), BLOCK, False),
        (functools.partial(_nll, logits=_half(transpose=True, softcap=3.0)), BLOCK, False),
        (functools.partial(_nll, logits=_half(filter_eps=0.1)), BLOCK, True),
        (functools.partial(_nll, logits=lambda p: _half()(p).dense()), V, False),
        (_distilled, BLOCK, False),
        (_contrasted, 3, False),
        (_cosines, BLOCK, False),
        (_moments, V, False),
    ],
    ids=["rows", "transposed", "filter", "dense", "two_heads", "two_ways", "cosines", "moments"],
)
def test_every_product_is_in_the_dtype_asked_for(f, columns, reverse_only):
    """Of float32 operands, in either mode and in second derivatives; `test_laws.py` holds it for every loss."""
    p = {k: a for k, a in operands(dtype=np.float32).items() if k != "temperature"}
    both = lambda p: (jax.jvp(jax.grad(f), (p,), (p,)), jax.jvp(f, (p,), (p,)))
    traced = jax.make_jaxpr(jax.grad(f) if reverse_only else both)(p)
    products = list(matrix_products(traced, columns))
    assert len(products) >= 3 and all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in products)
    assert all(a.dtype == jnp.float32 for a in traced.out_avals)


# --- nothing is stored -----------------------------------------------------------------------------------


def largest(jaxpr):
    """The number of entries of the largest array anywhere in a jaxpr, its sub-jaxprs included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    sizes = [0]
    for v in [*jaxpr.invars, *jaxpr.constvars, *(o for e in jaxpr.eqns for o in e.outvars)]:
        sizes.append(int(np.prod(getattr(v.aval, "shape", ()))))
    for equation in jaxpr.eqns:
        for leaf in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")
        ):
            if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"):
                sizes.append(largest(leaf))
    return max(sizes)


class TestNothingIsStored:
    """No variable of the whole program is as large as the logits; of the dense one, some are."""

    n, d, columns, block = 64, 8, 1000, 128
    size = n * columns

    def point(self):
        rng = np.random.default_rng(0)
        return (
            jnp.asarray(rng.normal(size=(self.n, self.d)), jnp.float32),
            jnp.asarray(rng.normal(size=(self.d, self.columns)), jnp.float32),
        )

    def loss(self, dense):
        labels = labels_of((self.n,), self.columns)

        def f(point):
            logits = jaxsoft.linear_logits(*point, block_size=self.block)
            logits = logits.dense() if dense else logits
            values = cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-3)
            return jnp.sum(cotangent((self.n,)).astype(jnp.float32) * values)

        return f

    def programs(self, dense):
        f, point = self.loss(dense), self.point()
        many = jax.tree.map(lambda a: jnp.stack([a] * 3), point)
        programs = {
            "value": (f, point),
            "gradient": (jax.value_and_grad(f), point),
            "jvp": (lambda p, t: jax.jvp(f, (p,), (t,)), point, point),
            "hessian": (lambda p, t: jax.jvp(jax.grad(f), (p,), (t,)), point, point),
            "hessian, reverse": (
                lambda p, t: jax.grad(lambda p: sum(map(jnp.vdot, jax.grad(f)(p), t)))(p),
                point,
                point,
            ),
            "checkpoint": (jax.grad(jax.checkpoint(f)), point),
            "vmap": (jax.vmap(jax.grad(f)), many),
        }
        return {
            name: functools.partial(lambda g, *args: jax.make_jaxpr(g)(*args), *call)
            for name, call in programs.items()
        }

    @pytest.mark.parametrize(
        "name", ["value", "gradient", "jvp", "hessian", "hessian, reverse", "checkpoint", "vmap"]
    )
    def test_program(self, name):
        # Three gradients at once: still less than the logits of one.
        assert largest(self.programs(dense=False)[name]()) < self.size
        assert largest(self.programs(dense=True)[name]()) >= self.size * (3 if name == "vmap" else 1)

    def test_weighted_sum(self):
        labels = labels_of((self.n,), self.columns)
        chunk = 16

        def f(point, dense):
            logits = jaxsoft.linear_logits(*point, block_size=self.block)
            logits = logits.dense() if dense else logits
            return losses.weighted_sum(cross_entropy, logits, labels, label_smoothing=0.1, chunk_size=chunk)

        sizes = [
            largest(jax.make_jaxpr(jax.value_and_grad(functools.partial(f, dense=dense)))(self.point()))
            for dense in (False, True)
        ]
        assert sizes[0] == chunk * self.columns and sizes[1] >= self.size


# --- the gradient filter ---------------------------------------------------------------------------------


def peaked(n=6, columns=200, seed=3):
    """Logits whose softmax is concentrated in few blocks."""
    rng = np.random.default_rng(seed)
    hidden, weight = rng.normal(size=(n, 8)) * 2, rng.normal(size=(8, columns)) * 2
    weight[:, 40:160] *= 0.01
    bias = np.where((np.arange(columns) >= 40) & (np.arange(columns) < 160), -12.0, 0.0)
    return {k: jnp.asarray(v) for k, v in dict(hidden=hidden, weight=weight, bias=bias).items()}


class TestTheGradientFilter:
    def f(self, p, filter_eps):
        logits = expression(p, filter_eps=filter_eps, block_size=20)
        labels = jnp.asarray([3, 15, 170, 190, 7, 30])
        return jnp.sum(cotangent((6,)) * cross_entropy(logits, labels, z_loss=0.01))

    def test_zero_is_exact(self, x64):
        p = peaked()
        exact = jax.jit(jax.value_and_grad(lambda p: self.f(p, None)))(p)
        trees_close(jax.jit(jax.value_and_grad(lambda p: self.f(p, 0.0)))(p), exact)

    @pytest.mark.parametrize("eps", [1e-3, 1e-2])
    def test_the_error_is_bounded(self, eps, x64):
        """A skipped block's entries are below eps times the largest cotangent, so the product is, too."""
        p = peaked()
        exact = jax.jit(jax.grad(lambda p: self.f(p, None)))(p)
        got = jax.jit(jax.grad(lambda p: self.f(p, eps)))(p)
        # The cotangents that reach the rows' results: those of the loss, times 1 + 2 z_loss lse for the second.
        lse = jax.nn.logsumexp(stored(p), -1)
        threshold = eps * float(jnp.max(jnp.abs(cotangent((6,))) * (1 + 0.02 * jnp.abs(lse))))
        d_hidden = jnp.abs(got["hidden"] - exact["hidden"])
        assert jnp.all(d_hidden <= threshold * jnp.sum(jnp.abs(p["weight"]), axis=1))
        d_weight = jnp.abs(got["weight"] - exact["weight"])
        assert jnp.all(d_weight <= threshold * jnp.sum(jnp.abs(p["hidden"]), axis=0)[:, None])
        trees_close(got["bias"], exact["bias"])  # needs no matrix product and is never skipped
        # It does skip: whole blocks of the weight get no gradient, though theirs is not zero.
        skipped = jnp.all(got["weight"].reshape(8, 10, 20) == 0, axis=(0, 2))
        assert jnp.sum(skipped) == 6 and jnp.all(jnp.any(exact["weight"] != 0, axis=0))
        assert jnp.any(d_hidden > 0)

    def test_a_block_with_nan_is_not_skipped(self, x64):
        p = peaked()
        p["weight"] = p["weight"].at[0, 100].set(jnp.nan)
        assert jnp.all(jnp.isnan(jax.grad(lambda p: self.f(p, 1e-2))(p)["hidden"][:, 0]))

    def test_forward_mode_says_no(self, x64):
        p = peaked()
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda p: self.f(p, 1e-3), (p,), (p,))


# --- bad input -------------------------------------------------------------------------------------------

_H, _W = np.ones((N, D), np.float32), np.ones((D, V), np.float32)
_X = np.ones((N, V), np.float32)


def bad(function, *args, **options):
    return lambda: function(*args, **options)


linear = jaxsoft.linear_logits
_logits = functools.partial(linear, _H, _W)
_int = np.arange(N)

# the call, its error, and words of the message: the argument, what came, what was expected
BAD_INPUT = [
    (bad(linear, [1.0], _W), TypeError, ["hidden", "[1.0] of type list", "array of floating dtype"]),
    (bad(linear, _H, 3.0), TypeError, ["weight", "3.0 of type float", "array of floating dtype"]),
    (bad(linear, _H.astype(int), _W), TypeError, ["hidden", "(4, 3)", "int64", "floating"]),
    (bad(linear, _H, _W.astype(int)), TypeError, ["weight", "int64", "floating"]),
    (bad(linear, np.float32(1), _W), ValueError, ["hidden", "[*rows, d]", "()"]),
    (bad(linear, _H, _W[0]), ValueError, ["weight", "[d, vocab]", "(10,)"]),
    (bad(linear, _H, _W[0], transpose_weight=True), ValueError, ["weight", "[vocab, d]", "(10,)"]),
    (bad(linear, _H, _W.T), ValueError, ["hidden", "weight", "(10, 3)", "d=10", "transpose_weight=True"]),
    (bad(linear, _H, _W, transpose_weight=True), ValueError, ["(3, 10)", "d=10", "transpose_weight=False"]),
    (bad(linear, _H[:, :2], _W), ValueError, ["hidden", "weight", "d=3", "has 2"]),
    (bad(linear, _H[:, :0], _W[:0]), ValueError, ["feature axis of size 1 or more", "d=0"]),
    (
        bad(linear, _H, _W, transpose_weight=1),
        TypeError,
        ["transpose_weight", "True or False", "1 of type int"],
    ),
    (bad(_logits, bias=np.ones(3, np.float32)), ValueError, ["bias", "(10,)", "(3,)"]),
    (bad(_logits, bias=1.0), TypeError, ["bias", "1.0", "array of floating dtype"]),
    (bad(_logits, bias=np.arange(V)), TypeError, ["bias", "int64", "floating"]),
    (bad(_logits, scale=np.ones(3, np.float32)), ValueError, ["scale", "(4,)", "(3,)"]),
    (bad(_logits, scale=_int), TypeError, ["scale", "int64", "floating"]),
    (bad(_logits, scale="2"), TypeError, ["scale", "'2'", "floating"]),
    (bad(_logits, scale=True), TypeError, ["scale", "True", "floating"]),
    (bad(_logits, temperature=0.0), ValueError, ["temperature", "> 0", "0.0"]),
    (bad(_logits, temperature=-1), ValueError, ["temperature", "> 0", "-1"]),
    (bad(_logits, temperature=np.ones((N, V), np.float32)), ValueError, ["temperature", "(4,)", "(4, 10)"]),
    (bad(_logits, softcap=0), ValueError, ["softcap", "> 0", "0"]),
    (bad(_logits, softcap="30"), TypeError, ["softcap", "> 0", "'30'"]),
    (bad(_logits, block_size=0), ValueError, ["block_size", ">= 1", "0"]),
    (bad(_logits, block_size=2.0), TypeError, ["block_size", "integer", "2.0"]),
    (bad(_logits, block_size=True), TypeError, ["block_size", "integer", "True"]),
    (bad(_logits, filter_eps=-1e-3), ValueError, ["filter_eps", ">= 0", "-0.001"]),
    (bad(_logits, filter_eps="no"), TypeError, ["filter_eps", ">= 0", "'no'"]),
    (bad(_logits, dtype="bf16"), TypeError, ["dtype", "floating dtype or None", "'bf16'"]),
    (bad(_logits, dtype=16), TypeError, ["dtype", "floating dtype or None", "16"]),
    (bad(_logits, dtype=jnp.int8), TypeError, ["dtype", "floating dtype or None", "int8"]),
    (bad(_logits, dtype=jnp.float8_e4m3fn), ValueError, ["dtype", "'bfloat16'", "'float8_e4m3fn'"]),
    (lambda: _logits() / 0, ValueError, ["temperature", "> 0", "0.0"]),
    (lambda: _logits() / None, TypeError, ["temperature", "None"]),
    (lambda: _logits() * None, TypeError, ["scale", "None"]),
    (lambda: _logits() * -1.0, ValueError, ["scale", "> 0", "-1.0"]),
    (lambda: _logits() / np.ones(3, np.float32), ValueError, ["temperature", "(4,)", "(3,)"]),
    (bad(jaxsoft.temperature, _X, 0.0), ValueError, ["temperature", "> 0", "0.0"]),
    (bad(jaxsoft.temperature, _X, np.ones(3, np.float32)), ValueError, ["temperature", "(4,)", "(3,)"]),
    (bad(jaxsoft.temperature, _X, _int), TypeError, ["temperature", "int64", "floating"]),
    (bad(jaxsoft.temperature, _X, None), TypeError, ["temperature", "None"]),
    (bad(jaxsoft.temperature, _int, 1.0), TypeError, ["logits", "int64", "floating"]),
    (bad(jaxsoft.softcap, _X, 0.0), ValueError, ["cap", "> 0", "0.0"]),
    (bad(jaxsoft.softcap, _X, np.ones(2)), TypeError, ["cap", "> 0", "(2,)"]),
    (lambda: jaxsoft.softcap(_logits(softcap=2.0), 1.0), ValueError, ["softcap", "once", "softcap=2.0"]),
    (lambda: jaxsoft.softcap(_logits() / 2, 1.0), ValueError, ["softcap", "first", "a temperature"]),
    (bad(jaxsoft.top_k, _X, 0), ValueError, ["k ", ">= 1", "0"]),
    (bad(jaxsoft.top_k, _X, 2.0), TypeError, ["k ", "integer", "2.0"]),
    (bad(jaxsoft.top_k, _int, 2), TypeError, ["logits", "int64", "floating"]),
    (bad(jaxsoft.log_prob, _X, _int.astype(np.float32)), TypeError, ["ids", "integer", "float32"]),
    (bad(jaxsoft.log_prob, _X, _int > 0), TypeError, ["ids", "integer", "bool"]),
    (bad(jaxsoft.log_prob, _X, np.zeros(3, int)), ValueError, ["ids", "(4,)", "(3,)"]),
    (bad(jaxsoft.log_prob, _X, 2), TypeError, ["ids", "integer", "2 of type int"]),
    (bad(jaxsoft.log_prob, _X, _int, axis=2), ValueError, ["axis", "[-2, 2)", "(4, 10)", "2"]),
    (bad(jaxsoft.log_prob, _X, _int, axis=1.0), TypeError, ["axis", "integer", "1.0"]),
    (lambda: jaxsoft.logsumexp(_logits(), axis=0), ValueError, ["axis", "-1", "(4, 10)", "0"]),
    (bad(jaxsoft.logsumexp, np.float32(1)), ValueError, ["logits", "at least one axis", "scalar"]),
    (bad(jaxsoft.logsumexp, _X, method="fast"), ValueError, ["method", "'exponent'", "'fast'"]),
    (bad(jaxsoft.logsumexp, _X, method="reference"), ValueError, ["reference", "number or an array", "None"]),
    (bad(jaxsoft.logsumexp, _X, reference=1.0), ValueError, ["reference", "method='reference'", "'online'"]),
    (bad(jaxsoft.logsumexp, _X, weights=_X[:, :3]), ValueError, ["weights", "(4, 10)", "(4, 3)"]),
    (bad(jaxsoft.logsumexp, _X, weights=_X[0, :3]), ValueError, ["weights", "10", "(3,)"]),
    (bad(jaxsoft.logsumexp, _X, weights=_X[0] > 0), TypeError, ["weights", "floating", "bool"]),
    (bad(reduce_rows, _X, jnp.sum), TypeError, ["reductions", "RowReduction", "function"]),
    (bad(reduce_rows, _X, {"a": reductions.sum(), "b": 3}), TypeError, ["reductions", "RowReduction", "3"]),
    (bad(reduce_rows, _X, reductions.sum(), block_size=0), ValueError, ["block_size", ">= 1", "0"]),
    (bad(reduce_rows, _X, reductions.sum(), block_size=1.5), TypeError, ["block_size", "integer", "1.5"]),
    (bad(reduce_rows, _X, reductions.sum(), axis=-3), ValueError, ["axis", "[-2, 2)", "-3"]),
    (bad(reduce_rows, [[1.0]], reductions.sum()), TypeError, ["logits", "floating", "list"]),
    (bad(reduce_rows, _X, reductions.sum(), where=_X), TypeError, ["where", "boolean", "float32"]),
    (
        bad(reduce_rows, _X, reductions.sum(), where=_X[:, :3] > 0),
        ValueError,
        ["where", "(4, 10)", "(4, 3)", "broadcast"],
    ),
    (
        bad(reduce_rows, _X, reductions.sum(), where=np.ones((2, N, V), bool)),
        ValueError,
        ["where", "(4, 10)", "(2, 4, 10)"],
    ),
    (bad(reduce_rows, _X, reductions.sum(), row_where=_int), TypeError, ["row_where", "boolean", "int64"]),
    (
        bad(reduce_rows, _X, reductions.sum(), row_where=np.ones(3, bool)),
        ValueError,
        ["row_where", "(4,)", "(3,)"],
    ),
    (bad(reduce_rows, _X, reductions.take(jnp.zeros(3, int))), ValueError, ["args", "(4,)", "(3,)"]),
    (
        bad(reduce_rows, _X, reductions.weighted_sum(jnp.ones(3))),
        ValueError,
        ["col_args", "10 columns", "(3,)"],
    ),
    (
        bad(reduce_rows, _X, reductions.weighted_sum(jnp.ones((N, 3)))),
        ValueError,
        ["entry_args", "(4, 10)", "(4, 3)"],
    ),
]


@pytest.mark.parametrize("i", range(len(BAD_INPUT)))
def test_bad_input(i):
    call, kind, words = BAD_INPUT[i]
    fails(words, kind, call)


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_a_result_of_the_logits_shape_is_refused(function):
    with pytest.raises(TypeError, match=rf"{function} returns .*\(4, 10\).*logits\.dense\(\)"):
        getattr(jaxsoft, function)(_logits())
