"""The modules for Flax: both kinds compute what the functions do, in training and after, with their state."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fails, near

from jaxsoft import losses, norms
from jaxsoft.activations import pade_activation, pade_leaky_relu

linen = pytest.importorskip("jaxsoft.flax.linen")
softnnx = pytest.importorskip("jaxsoft.flax.nnx")
nnx = pytest.importorskip("flax.nnx")

X = np.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), np.float32)
G = np.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), np.float32)
PLAIN = {  # without running statistics: what they compute at the beginning
    norms.layer_norm: norms.layer_norm,
    functools.partial(norms.rms_norm, eps=0.1): functools.partial(norms.rms_norm, eps=0.1),
    norms.crms_norm: norms.crms_norm,
    functools.partial(norms.evonorm_s0, groups=2): functools.partial(
        norms.evonorm_s0, groups=2, slope=jnp.ones(4)
    ),
    pade_activation: lambda x: pade_activation(x, *pade_leaky_relu()),
}


def test_without_running_statistics():
    for function, expected in PLAIN.items():
        module = linen.Layer(function)
        variables = module.init(jax.random.key(0), X)
        assert set(variables) <= {"params"}
        layer = softnnx.Layer(function, 4)
        assert sorted(layer.names) == sorted(variables.get("params", {}))
        near(module.apply(variables, X, train=True), expected(X), 1e-6)
        near(layer(X), expected(X), 1e-6)


@pytest.mark.whole
@pytest.mark.parametrize("norm", [norms.power_norm, norms.unified_norm])
def test_statistics_of_the_backward_pass(norm):
    init = {norms.power_norm: norms.power_norm_init, norms.unified_norm: norms.unified_norm_init}[norm]
    function = functools.partial(norm, warmup=1)
    state, backward = init(4)
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    module, layer = linen.Layer(function), softnnx.Layer(function, 4)
    variables = module.init(jax.random.key(0), X, train=False)

    @jax.jit
    def by_hand(params, backward, state):
        def loss(params, backward):
            y, new = function(X, state, backward, **params, train=True)
            return jnp.sum(y * G), new

        return jax.grad(loss, (0, 1), has_aux=True)(params, backward)

    @jax.jit
    def of_linen(params, backward, stats):
        def loss(params, backward):
            collections = {"params": params, "backward_stats": backward, "batch_stats": stats}
            y, changed = module.apply(collections, X, train=True, mutable=["batch_stats"])
            return jnp.sum(y * G), changed["batch_stats"]

        return jax.grad(loss, (0, 1), has_aux=True)(params, backward)

    wanted = nnx.DiffState(0, nnx.Any(nnx.Param, softnnx.BackwardStat))

    @nnx.jit
    def of_nnx(layer):
        grads = nnx.grad(lambda layer: jnp.sum(layer(X, train=True) * G), argnums=wanted)(layer)
        grads, backward = nnx.split_state(grads, nnx.Param, softnnx.BackwardStat)
        nnx.update(layer, backward)
        return nnx.to_pure_dict(grads)

    linen_backward, linen_state = variables["backward_stats"], variables["batch_stats"]
    for _ in range(3):
        (grads, backward), state = by_hand(params, backward, state)
        (linen_grads, linen_backward), linen_state = of_linen(
            variables["params"], linen_backward, linen_state
        )
        nnx_grads = of_nnx(layer)
        expected = jax.tree.leaves((grads, backward, state))
        ours = jax.tree.leaves((linen_grads, linen_backward, linen_state))
        for a, b in zip(ours, expected, strict=True):
            near(a, b, 1e-6)
        ours = nnx_grads, layer.backward.get_value(), layer.statistics.get_value()
        for a, b in zip(jax.tree.leaves(ours), expected, strict=True):
            near(a, b, 1e-6)
    evaluated, _ = norm(X, state, backward, train=False)
    near(layer(X, train=False), evaluated, 1e-6)
    assert state.count == 3


def test_heads():
    hidden, labels = X[0], jnp.array([1, 2, 3])
    head = linen.LogitsHead(5, use_bias=True)
    params = head.init(jax.random.key(0), hidden)["params"]
    params = {**params, "bias": jnp.arange(5.0)}
    of_nnx = softnnx.LogitsHead(4, 5, use_bias=True, rngs=nnx.Rngs(0))
    of_nnx.kernel.set_value(params["kernel"])
    of_nnx.bias.set_value(params["bias"])
    dense = 3 * jnp.tanh((hidden @ params["kernel"] + params["bias"]) / 3)
    for logits in (head.apply({"params": params}, hidden, softcap=3.0), of_nnx(hidden, softcap=3.0)):
        assert logits.shape == (3, 5)
        near(losses.cross_entropy(logits, labels), losses.cross_entropy(dense, labels), 1e-5)
    assert softnnx.LogitsHead(4, 5, rngs=nnx.Rngs(0))(hidden).bias is None


def test_errors():
    x = jnp.ones((2, 4))
    of_power = linen.Layer(norms.power_norm)
    for words, kind, call in [
        (["function", "power_norm"], ValueError, lambda: softnnx.Layer(jnp.sin, 4)),
        (["function"], ValueError, lambda: linen.Layer(jnp.sin).init(jax.random.key(0), x)),
        (["train"], TypeError, lambda: softnnx.Layer(norms.power_norm, 4)(x)),
        (["train"], TypeError, lambda: of_power.init(jax.random.key(0), x)),
    ]:
        fails(words, kind, call)


def test_flax_is_imported_by_its_modules_only():
    code = (
        "import sys, jaxsoft, jaxsoft.flax, jaxsoft.norms, jaxsoft.activations; assert 'flax' not in sys.modules; "
        "import jaxsoft.flax.linen; assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
