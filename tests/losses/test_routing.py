"""Regularizers of routers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close, softmax
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.losses.routing import (
    importance_loss,
    load_balance_loss,
    modality_routing_kl,
    router_z_loss,
)
from jaxsoft.normalizers.gating import top_k_gate

H = np.array([[2, 0, -1], [1.5, 0.5, 0], [0.2, 0.1, 0.9], [1, 0.8, -0.5]])
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(8, 5))
IMAGE = np.arange(8) % 3 == 0
LOSSES = {
    "switch": load_balance_loss,
    "switch2": lambda p, **o: load_balance_loss(p, k=2, **o),
    "kl": lambda p, **o: load_balance_loss(p, kind="kl", **o),
    "cv2": importance_loss,
    "band_high": lambda p, m=IMAGE, **o: modality_routing_kl(p, jnp.asarray(m), low=0.0, high=1e-3, **o),
    "band_low": lambda p, m=IMAGE, **o: modality_routing_kl(p, jnp.asarray(m), low=5.0, high=9.0, **o),
}
every = pytest.mark.parametrize("name", LOSSES)


def test_worked_numbers(x64):
    p = jnp.asarray(softmax(H))
    close(p.mean(0), [0.554317, 0.244325, 0.201357])
    close(load_balance_loss(p), 1.398232)
    close(load_balance_loss(p, k=2), 1.181851)
    close(importance_loss(p), 0.222522)
    close(load_balance_loss(p, kind="cv2"), 0.222522)
    close(load_balance_loss(p, kind="kl"), 0.104528)
    close(router_z_loss(jnp.asarray(H)).mean(), 3.488954)
    image = jnp.array([False, False, True, True])
    close(modality_routing_kl(p, image, low=0.0, high=0.1), 0.302661 - 0.1)
    close(modality_routing_kl(p, ~image, low=0.5, high=0.6), 0.5 - 0.302661)
    assert modality_routing_kl(p, image, low=0.2, high=0.4) == 0
    g = jax.grad(load_balance_loss)(p)
    close(g, np.broadcast_to(3 * np.array([0.75, 0, 0.25]) / 4, (4, 3)), 1e-15)  # E f / N


def test_balance_and_imbalance():
    even = jnp.eye(4)
    close(load_balance_loss(even), 1)
    for kind in ("cv2", "kl"):
        close(load_balance_loss(even, kind=kind), 0)
    one = jnp.zeros((4, 4)).at[:, 1].set(1.0)
    close(load_balance_loss(one), 4)
    close(load_balance_loss(one, kind="cv2"), 3)
    close(load_balance_loss(one, kind="kl"), np.log(4))
    g = jax.grad(lambda p: load_balance_loss(p, kind="kl"))(one)
    assert jnp.all(jnp.isfinite(g))
    gates = top_k_gate(jnp.asarray(SCORES, jnp.float32), 2)
    sums = np.asarray(gates).sum(0)
    close(importance_loss(gates), sums.var() / sums.mean() ** 2)


@every
def test_gradients(name, x64):
    check_grads(lambda x: LOSSES[name](jaxsoft.softmax(x)), (jnp.asarray(SCORES),), 1)


@every
def test_jit_axes_and_dtypes(name):
    p = jnp.asarray(softmax(SCORES), jnp.float32)
    expected = LOSSES[name](p)
    assert expected.shape == () and expected != 0
    close(jax.jit(LOSSES[name])(p), expected)
    close(LOSSES[name](p.T, axis=0), expected)
    shaped = dict(m=IMAGE.reshape(2, 4)) if "band" in name else {}
    close(LOSSES[name](p.reshape(2, 4, 5), **shaped), expected)
    mapped = jax.vmap(LOSSES[name])(jnp.stack([p, p[:, ::-1]]))
    close(mapped, expected, 1e-5)
    low = LOSSES[name](p.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    close(low, LOSSES[name](p.astype(jnp.bfloat16).astype(jnp.float32)))
    with float64():
        assert LOSSES[name](jnp.asarray(softmax(SCORES))).dtype == jnp.float64


@every
def test_absent_tokens_and_experts(name):
    p = jnp.asarray(softmax(SCORES), jnp.float32)
    tokens = np.array([True, True, False, True, True, True, False, True])
    experts = np.array([True, True, True, False, True])
    where = jnp.asarray(tokens[:, None] & experts)
    rest = {"m": IMAGE[tokens]} if "band" in name else {}
    run = jax.value_and_grad(LOSSES[name])
    value, g = run(jnp.where(where, p, jnp.nan), where=where)
    expected, h = jax.value_and_grad(lambda p: LOSSES[name](p, **rest))(p[tokens][:, experts])
    close(value, expected)
    close(np.asarray(g)[tokens][:, experts], h)
    assert not np.any(np.asarray(g)[~np.asarray(where)]) and np.any(g != 0)
    value, g = run(jnp.full_like(p, jnp.nan), where=jnp.zeros((8, 1), bool))
    assert value == 0 and not np.any(g)


def test_a_modality_without_tokens():
    p = jnp.asarray(softmax(SCORES), jnp.float32)
    for m in (jnp.zeros(8, bool), jnp.ones(8, bool)):
        value, g = jax.value_and_grad(lambda p: modality_routing_kl(p, m, low=1.0, high=2.0))(p)
        assert value == 0 and not jnp.any(g)
    apart = jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    image = jnp.array([False, True])
    assert jnp.isposinf(modality_routing_kl(apart, image, low=0.0, high=0.1))
    assert modality_routing_kl(apart[:, ::2], image, low=0.0, high=0.0) > 0
    same = jnp.array([[0.3, 0.7, 0.0], [0.3, 0.7, 0.0]])
    value, g = jax.value_and_grad(lambda p: modality_routing_kl(p, image, low=0.1, high=0.2))(same)
    close(value, 0.1)
    assert jnp.all(jnp.isfinite(g))


@every
def test_over_devices(name):
    p = jnp.asarray(softmax(SCORES), jnp.float32)
    where = jnp.asarray(RNG.random((8, 5)) < 0.8).at[0].set(False)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

    def local(p, where, image):
        given = {"m": image} if "band" in name else {}
        return LOSSES[name](p, where=where, axis_name="data", **given)

    run = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())
    value, g = jax.jit(jax.value_and_grad(run))(p, where, jnp.asarray(IMAGE))
    expected, h = jax.value_and_grad(lambda p: LOSSES[name](p, where=where))(p)
    close(value, expected)
    close(g, h)


def test_router_z_loss(x64):
    rng = np.random.default_rng(2)
    hidden, weight = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(3, 5)))
    dense = router_z_loss(hidden @ weight)
    close(dense, np.log(np.exp(np.asarray(hidden @ weight)).sum(-1)) ** 2, 1e-13)
    lazy = lambda h, w: router_z_loss(jaxsoft.linear_logits(h, w, block_size=2))
    close(jax.jit(lazy)(hidden, weight), dense, 1e-13)
    check_grads(lazy, (hidden, weight), 1)
    x = jnp.array([[jnp.nan, 1.0, 2.0], [3.0, 1.0, 2.0]])
    where = jnp.array([[False, True, True], [False] * 3])
    value, g = jax.value_and_grad(lambda x: router_z_loss(x, where=where).sum())(x)
    close(value, np.log(np.exp(1) + np.exp(2)) ** 2)
    close(g[:, 0], 0, 0)
    close(g[1], 0, 0)
    assert g[0, 1] > 0


PROBABILITIES = jnp.ones((4, 2)) / 2
BAD = [
    (lambda: load_balance_loss(PROBABILITIES, kind="even"), ValueError, "kind must be one of"),
    (lambda: load_balance_loss(PROBABILITIES, k=0), ValueError, "k must be a static integer >= 1"),
    (lambda: load_balance_loss(jnp.ones((4, 2), int)), TypeError, "floating"),
    (lambda: importance_loss(PROBABILITIES, where=jnp.ones(4, bool)), ValueError, "where must broadcast"),
    (lambda: importance_loss(PROBABILITIES, axis=2), ValueError, "axis must be in"),
    (
        lambda: modality_routing_kl(PROBABILITIES, jnp.ones(3, bool), low=0.0, high=1.0),
        ValueError,
        r"modality must have shape \(4,\)",
    ),
    (
        lambda: modality_routing_kl(PROBABILITIES, jnp.ones(4), low=0.0, high=1.0),
        TypeError,
        "modality must be a boolean",
    ),
    (
        lambda: modality_routing_kl(PROBABILITIES, jnp.ones(4, bool), low=0.5, high=0.1),
        ValueError,
        "high must be a number >= 0.5",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
