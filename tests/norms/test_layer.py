"""Layer norm, RMS norm and compressed RMS norm: worked numbers, oracles, gradients, the conversion of whole models."""

import functools
import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fails, near
from jax.test_util import check_grads

from jaxsoft.norms import (
    compress,
    crms_norm,
    decompress,
    fold_into_linear,
    layer_norm,
    pre_ln_to_pre_rms,
    pre_rms_to_pre_crms,
    recenter,
    rms_norm,
    zero_mean_linear,
)

X = np.array([1.0, 2.0, 3.0, 4.0])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@jax.jit
def all_norms(x, scale, bias):
    return layer_norm(x, scale, bias), rms_norm(x, scale, scale_offset=0.5), crms_norm(compress(x), eps=1e-5)


def test_worked_numbers(x64):
    out, pull = jax.vjp(layer_norm, X)
    close(out, [-1.341635, -0.447212, 0.447212, 1.341635])
    close(pull(jnp.array([1.0, 0, 0, 0]))[0], [0.268330, -0.357768, -0.089443, 0.178882])
    close(rms_norm(X), [0.365148, 0.730297, 1.095445, 1.460593])
    close(rms_norm(np.array([2.0, 0, -1, 1])), [1.632993, 0, -0.816496, 0.816496])
    near(crms_norm(compress(X), eps=1e-5), out[:3], 1e-15)


def test_equal_torch_with_gradients(x64):
    torch = pytest.importorskip("torch")
    x, scale, bias, g = 3 + normal(5, 8), normal(8, seed=1), normal(8, seed=2), normal(5, 8, seed=3)
    ours, pull = jax.vjp(lambda *a: all_norms(*a)[:2], x, scale, bias)
    theirs = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
    functional = torch.nn.functional
    expected = functional.layer_norm(theirs[0], (8,), *theirs[1:], 1e-5)
    expected_rms = functional.rms_norm(theirs[0], (8,), 0.5 + theirs[1], 1e-6)
    (expected + 2 * expected_rms).backward(torch.tensor(g))
    near(ours[0], expected.detach(), 1e-12)
    near(ours[1], expected_rms.detach(), 1e-12)
    for a, b in zip(pull((g, 2 * g)), theirs):
        near(a, b.grad, 1e-11)


def test_equal_flax():
    linen = pytest.importorskip("flax.linen")
    x, scale, bias = (a.astype(np.float32) for a in (normal(5, 8), normal(8, seed=1), normal(8, seed=2)))

    @jax.jit
    def flax(x, scale, bias):
        params = {"params": {"scale": scale, "bias": bias}}
        rms = {"params": {"scale": 0.5 + scale}}
        return linen.LayerNorm(epsilon=1e-5).apply(params, x), linen.RMSNorm(epsilon=1e-6).apply(rms, x)

    for ours, expected in zip(all_norms(x, scale, bias), flax(x, scale, bias)):
        near(ours, expected, 2e-6)


def test_derivatives_and_limits(x64):
    x, scale, bias = normal(2, 5), normal(5, seed=1), normal(5, seed=2)
    check_grads(all_norms, (x, scale, bias), order=2, modes=("fwd", "rev"))
    out, gradient = jax.value_and_grad(lambda x: (layer_norm(x) * X).sum())(jnp.full(4, 7.0))
    assert out == 0 and np.all(np.isfinite(gradient))
    assert np.all(layer_norm(jnp.full((2, 1), 3.0), None, jnp.array([4.0])) == 4)


def test_statistics_of_half_precision_are_float32():
    x = jnp.asarray(300 + normal(3, 64), jnp.float16)  # squares overflow in float16
    ours = all_norms(x, None, None)
    assert {a.dtype for a in ours} == {x.dtype}
    for a, b in zip(ours, all_norms(x.astype(jnp.float32), None, None)):
        close(a, b, 2e-3)
    far = jnp.asarray(1e4 + normal(4, 64), jnp.float32)  # where mean(x^2) - mean(x)^2 has no digit left
    wide = np.asarray(far, np.float64)
    close(
        layer_norm(far),
        (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5),
        2e-3,
    )


def test_compressed_rows(x64):
    x = normal(3, 6)
    near(decompress(compress(x)), recenter(x), 1e-15)
    near(crms_norm(compress(x), eps=1e-3), layer_norm(x, eps=1e-3)[:, :-1], 1e-14)


def test_linear_layers(x64):
    x, kernel, bias = normal(4, 3), normal(3, 2, 5, seed=1), normal(2, 5, seed=2)
    scale, shift = normal(3, seed=3), normal(3, seed=4)

    def linear(x, kernel, bias):
        return np.einsum("ni,i...->n...", x, kernel) + (0 if bias is None else bias)

    near(
        linear(x, *fold_into_linear(kernel, bias, scale=scale, shift=shift)),
        linear(scale * x + shift, kernel, bias),
    )
    assert fold_into_linear(kernel)[1] is None
    near(linear(x, *fold_into_linear(kernel, shift=shift)), linear(x + shift, kernel, 0))
    stacked = fold_into_linear(normal(2, 3, 4), normal(2, 4), scale=normal(2, 3), shift=normal(2, 3, seed=1))
    one = fold_into_linear(
        normal(2, 3, 4)[1], normal(2, 4)[1], scale=normal(2, 3)[1], shift=normal(2, 3, seed=1)[1]
    )
    near(stacked[0][1], one[0])
    near(stacked[1][1], one[1])
    flat, of_bias = zero_mean_linear(kernel[:, 0], bias[0])
    near(linear(x, flat, of_bias), recenter(linear(x, kernel[:, 0], bias[0])))


@pytest.fixture(scope="module")
def gpt():
    folder = str(pathlib.Path(__file__).parents[2] / "benchmarks")
    pytest.importorskip("flax")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("norms")
    finally:
        sys.path.remove(folder)


def test_a_converted_gpt_computes_the_same(gpt):
    models = gpt.contestants(width=16, heads=2, layers=2, length=6, vocabulary=11)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
    logits = {
        kind: jax.jit(functools.partial(gpt.forward, model))(params, tokens)
        for kind, (model, params) in models.items()
    }
    assert jnp.std(logits["Pre-LN"]) > 0.5
    close(logits["Pre-RMSNorm"], logits["Pre-LN"], 1e-5)
    close(logits["Pre-CRMSNorm"], logits["Pre-LN"], 1e-5)
    of_crms = models["Pre-CRMSNorm"][1]
    assert of_crms["token"]["embedding"].shape == (11, 15) and "norm" not in of_crms
    # The trees are those that the models make themselves.
    for kind, (model, params) in models.items():
        made = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda a: a.shape, made), kind


def test_results_of_the_benchmark(gpt):
    for record in json.loads(gpt.RESULTS.read_text()):
        assert [row["model"] for row in record["rows"]] == 2 * list(gpt.NORMS)
        assert all(row["difference"] < 1e-5 * row["largest_logit"] for row in record["rows"][:3])


def test_stacked_layers_and_missing_biases(x64):
    """Layers on a leading axis, a layer without bias, one layer that reads the stream and writes into it."""
    params = {
        "embed": normal(5, 3),
        "layers": {
            "norm": {"scale": normal(2, 3, seed=1), "bias": normal(2, 3, seed=2)},
            "linear": {"kernel": normal(2, 3, 3, seed=3)},
        },
    }
    roles = dict(writes=["embed", "layers/linear/(kernel|bias)"], reads={"layers/norm": ["layers/linear"]})

    def run(params, norm):
        x = params["embed"]
        for i in range(2):
            layer = jax.tree.map(lambda a: a[i], params["layers"])
            y = norm(x, layer) @ layer["linear"]["kernel"]
            x = x + y + layer["linear"].get("bias", 0)
        return x

    expected = run(params, lambda x, p: layer_norm(x, **p["norm"]))
    rms = pre_ln_to_pre_rms(params, **roles)
    near(run(rms, lambda x, p: rms_norm(x, p["norm"]["scale"], eps=1e-5)), recenter(expected))
    crms = pre_rms_to_pre_crms(rms, **roles)
    near(run(crms, lambda x, p: crms_norm(x, eps=1e-5)), compress(expected))
    traced = jax.eval_shape(lambda p: pre_rms_to_pre_crms(pre_ln_to_pre_rms(p, **roles), **roles), params)
    assert jax.tree.map(jnp.shape, crms) == jax.tree.map(lambda a: a.shape, traced)


def test_errors():
    ids, x = jnp.arange(3), jnp.ones((2, 3))
    norm, head = {"scale": jnp.ones(3), "bias": jnp.ones(3)}, {"kernel": jnp.ones((3, 2))}
    params = {"embed": jnp.ones((4, 3)), "norm": norm, "head": head}
    both = functools.partial(pre_ln_to_pre_rms, params)
    bare = {**params, "norm": {"scale": jnp.ones(3)}}
    for words, kind, call in [
        (["x", "floating"], TypeError, lambda: layer_norm(ids)),
        (["x", "axes"], ValueError, lambda: rms_norm(jnp.ones(()))),
        (["scale", "(3,)", "(2,)"], ValueError, lambda: layer_norm(x, jnp.ones(2))),
        (["bias"], ValueError, lambda: layer_norm(x, None, jnp.ones(2))),
        (["scale"], TypeError, lambda: rms_norm(x, ids)),
        (["eps"], ValueError, lambda: crms_norm(x, eps=0.0)),
        (["scale_offset"], TypeError, lambda: rms_norm(x, scale_offset="1")),
        (["feature"], ValueError, lambda: compress(jnp.ones((2, 0)))),
        (["scale"], ValueError, lambda: fold_into_linear(x, scale=jnp.ones(3))),
        (["bias"], ValueError, lambda: fold_into_linear(x, jnp.ones(2), scale=jnp.ones(2))),
        (["bias"], ValueError, lambda: zero_mean_linear(x, jnp.ones(2))),
        (["writes", "no", "embed"], ValueError, lambda: both(writes=["no"], reads={"norm": ["head"]})),
        (["writes", "string"], TypeError, lambda: both(writes="embed", reads={"norm": ["head"]})),
        (["reads", "head"], ValueError, lambda: both(writes=["embed"], reads={"head": ["head"]})),
        (["reads", "tail"], ValueError, lambda: both(writes=["embed"], reads={"norm": ["tail"]})),
        (
            ["norm", "bias"],
            ValueError,
            lambda: pre_rms_to_pre_crms(params, writes=[], reads={"norm": ["head"]}),
        ),
        (["embed", "mean"], ValueError, lambda: pre_rms_to_pre_crms(bare, writes=["embed"], reads={})),
    ]:
        fails(words, kind, call)
