"""Multipliers by shape and by spectrum: tables, a coordinate check, Hill's estimator, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import descend

from jaxsoft import optimizers as o


@pytest.mark.parametrize(
    ("kind", "kwargs", "expected"),
    [
        ("input", {}, o.MupMultipliers(1.0, 1.0, 1.0, 1.0, 1.0)),
        ("hidden", {}, o.MupMultipliers(0.25, 4.0, 0.5, 1.0, 1.0)),
        ("expert", {}, o.MupMultipliers(0.25, 4.0, 0.5, 1.0, 1.0)),
        ("output", {}, o.MupMultipliers(1.0, 1.0, 1.0, 0.25, 1.0)),
        ("router", {}, o.MupMultipliers(1.0, 1.0, 1.0, 0.25, 1.0)),
        ("attention", {}, o.MupMultipliers(forward=16 / 1024)),
        (
            "norm",
            {"fan_out": 96, "base_fan_out": 32, "optimizer": "sgd"},
            o.MupMultipliers(3.0, 1 / 3, 1.0, 1.0, 1.0),
        ),
        (
            "hidden",
            {"fan_out": 96, "base_fan_out": 32, "optimizer": "sgd"},
            o.MupMultipliers(0.75, 4 / 3, 0.5),
        ),
        ("output", {"optimizer": "sgd"}, o.MupMultipliers(4.0, 0.25, 1.0, 0.25)),
        ("hidden", {"depth": 16, "base_depth": 4}, o.MupMultipliers(0.125, 8.0, 0.5, 1.0, 0.5)),
        (
            "hidden",
            {"depth": 16, "base_depth": 4, "optimizer": "sgd", "fan_out": 4, "base_fan_out": 1},
            o.MupMultipliers(1.0, 1.0, 0.5, 1.0, 0.5),
        ),
        ("bias", {"depth": 16, "base_depth": 4}, o.MupMultipliers(0.5, 2.0, 1.0, 1.0, 0.5)),
    ],
)
def test_mup_table(kind, kwargs, expected):
    ours = o.mup_multipliers(kind, 1024, 256, **kwargs)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert all(type(x) is float for x in ours)


def test_mup_changes_nothing_at_the_base():
    for kind in ("input", "bias", "norm", "hidden", "output", "router", "expert"):
        for optimizer in ("adam", "sgd"):
            ours = o.mup_multipliers(
                kind, 64, 64, fan_out=8, base_fan_out=8, depth=3, base_depth=3, optimizer=optimizer
            )
            assert ours == o.MupMultipliers()


def test_u_mup_table():
    assert o.u_mup_multipliers("weight", 1024) == o.MupMultipliers(1 / 32, 32.0, 1.0, 1 / 32, 1.0)
    assert o.u_mup_multipliers("embedding", 1024).learning_rate == 1 / 32
    assert o.u_mup_multipliers("output", 1024) == o.MupMultipliers(forward=1 / 1024)
    assert o.u_mup_multipliers("norm", 1024) == o.MupMultipliers()
    assert o.u_mup_multipliers("norm", 7, branches=24).learning_rate == pytest.approx(0.204124, abs=5e-7)
    assert o.u_mup_multipliers("weight", 1024, branches=24).learning_rate == pytest.approx(
        0.03125 * 0.204124, rel=1e-5
    )


def change_of_activations(width, rule):
    """Mean absolute change of the last hidden layer and of the output over 5 steps of Adam."""
    base, inputs = 16, 8
    kinds = {"w1": "input", "w2": "hidden", "w3": "output"}
    shapes = {"w1": (inputs, width), "w2": (width, width), "w3": (width, 4)}
    bases = {"w1": inputs, "w2": base, "w3": base}
    if rule == "mup":
        m = {k: o.mup_multipliers(kinds[k], shapes[k][0], bases[k]) for k in kinds}
        std = {k: m[k].init_std * bases[k] ** -0.5 for k in kinds}
    elif rule == "u_mup":
        names = {"w1": "weight", "w2": "weight", "w3": "output"}
        m = {k: o.u_mup_multipliers(names[k], shapes[k][0]) for k in kinds}
        std = dict.fromkeys(kinds, 1.0)
    else:
        m = dict.fromkeys(kinds, o.MupMultipliers())
        std = {k: shapes[k][0] ** -0.5 for k in kinds}
    keys = dict(zip(kinds, jax.random.split(jax.random.key(0), 3)))
    params = {k: std[k] * jax.random.normal(keys[k], shapes[k]) for k in kinds}
    x, y = jax.random.normal(jax.random.key(1), (32, inputs)), jax.random.normal(jax.random.key(2), (32, 4))

    def forward(p):
        h = jnp.tanh(m["w1"].forward * x @ p["w1"])
        h = jnp.tanh(m["w2"].forward * h @ p["w2"])
        return h, m["w3"].forward * h @ p["w3"]

    rates = {k: m[k].learning_rate for k in kinds}
    rate = 0.5 if rule == "u_mup" else 0.02
    tx = optax.chain(optax.scale_by_adam(), o.scale_by_multipliers(rates), optax.scale(-rate))

    gradient = jax.grad(lambda p, _: jnp.mean((forward(p)[1] - y) ** 2))

    @jax.jit
    def measure(p):
        new, _ = descend(tx, p, gradient, steps=5)
        return [jnp.mean(jnp.abs(a - b)) for a, b in zip(forward(p), forward(new))]

    return np.array(measure(params))


def test_coordinate_check():
    """The change of activations does not depend on the width with muP and u-muP; without, it grows."""
    for rule, steady in (("mup", True), ("u_mup", True), ("standard", False)):
        changes = np.stack([change_of_activations(width, rule) for width in (32, 128, 512)])
        growth = changes.max(axis=0) / changes.min(axis=0)
        assert np.all(growth < 2) == steady, (rule, changes)


# Multipliers for each leaf.


def test_multipliers_from_trees_labels_and_functions():
    g = {"a": jnp.ones(2), "b": (jnp.ones(()), None, jnp.ones((2, 2)))}
    apply = lambda tx: tx.update(g, tx.init(g), g)[0]
    expected = {"a": 2.0 * g["a"], "b": (3.0 * g["b"][0], None, 3.0 * g["b"][2])}
    for tx in (
        o.scale_by_multipliers({"a": 2.0, "b": 3.0}),
        o.scale_by_multipliers({"a": 2.0, "b": (3.0, None, 3.0)}),
        o.scale_by_multipliers({"x": 2.0, "y": jnp.array(3.0)}, {"a": "x", "b": "y"}),
        o.scale_by_multipliers({"x": 2.0, "y": 3.0}, lambda params: {"a": "x", "b": ("y", None, "y")}),
        o.scale_by_multipliers(lambda params: {"a": 2.0, "b": 3.0}),
        o.scale_by_multipliers(lambda params: {"a": 2.0, "b": 3.0}, update_every=3),
    ):
        chex.assert_trees_all_close(apply(tx), expected)
    chex.assert_trees_all_close(apply(o.scale_by_multipliers(0.5)), jax.tree.map(lambda x: 0.5 * x, g))


def test_multipliers_are_refreshed_every_so_many_steps():
    tx = o.scale_by_multipliers(lambda params: params, update_every=3)
    state, update = tx.init(jnp.array(0.0)), jax.jit(tx.update)
    out = []
    for t in range(7):
        u, state = update(jnp.array(1.0), state, jnp.asarray(float(t)))
        out.append(float(u))
    assert out == [0, 0, 0, 3, 3, 3, 6]


def test_decay_after_the_multipliers_is_not_multiplied():
    p = {"w": jnp.array([2.0]), "b": jnp.array([2.0])}
    tx = optax.chain(o.scale_by_multipliers({"w": 0.25, "b": 1.0}), optax.add_decayed_weights(0.1))
    u, _ = tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)
    np.testing.assert_allclose([u["w"][0], u["b"][0]], [0.45, 1.2], rtol=1e-6)


# Spectra.


def with_eigenvalues(values):
    rng = np.random.default_rng(0)
    n = len(values)
    u, v = np.linalg.qr(rng.standard_normal((n + 2, n)))[0], np.linalg.qr(rng.standard_normal((n, n)))[0]
    return jnp.asarray(u * np.sqrt(values) @ v)


def test_hill_worked_example(x64):
    values = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 6.4])
    expected = 1 + 3 / np.log(0.8 * 1.6 * 6.4 / 0.8**3)
    assert expected == pytest.approx(2.082021, abs=5e-7)
    for scale in (1.0, 37.0):
        np.testing.assert_allclose(o.hill_alpha(with_eigenvalues(scale * values)), expected, rtol=1e-12)
    with_noise = with_eigenvalues(np.concatenate([np.full(5, 1e-9), values]))
    np.testing.assert_allclose(o.hill_alpha(with_noise), expected, rtol=1e-8)


def test_hill_of_a_batch_and_of_tiles_is_pooled(x64):
    w = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    values = np.sort(np.linalg.svd(w, compute_uv=False).ravel() ** 2)
    tail = values[len(values) // 2 :]
    np.testing.assert_allclose(o.hill_alpha(w), 1 + len(tail) / np.sum(np.log(tail / tail[0])), rtol=1e-12)
    big = jax.random.normal(jax.random.key(1), (7, 8))
    tiles = jnp.stack([big[3 * i : 3 * i + 3, 4 * j : 4 * j + 4] for i in range(2) for j in range(2)])
    np.testing.assert_allclose(o.hill_alpha(big, tile=(3, 4)), o.hill_alpha(tiles), rtol=1e-12)


def test_hill_edge_cases():
    for w in (jnp.eye(4), jnp.zeros((4, 4)), jnp.ones((4, 1))):
        assert bool(jnp.isinf(o.hill_alpha(w)))


def with_alpha(alpha):
    return with_eigenvalues([0.5, 0.7, 1.0, np.exp(2 / (alpha - 1))])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("linear", [0.5, 0.833333333333, 1.5]),
        ("step", [0.5, 1.0, 1.5]),
        ("sqrt", np.sqrt([2, 3, 5]) / np.mean(np.sqrt([2, 3, 5]))),
        ("log2", np.log2([2, 3, 5]) / np.mean(np.log2([2, 3, 5]))),
    ],
)
def test_temp_balance_worked_example(x64, mode, expected):
    params = {"a": with_alpha(2.0), "b": with_alpha(5.0), "c": (with_alpha(3.0), None), "bias": jnp.ones(4)}
    out = jax.jit(lambda p: o.temp_balance_multipliers(p, mode=mode, min_eigenvalues=4))(params)
    np.testing.assert_allclose([out["a"], out["c"][0], out["b"]], expected, rtol=1e-10)
    assert float(out["bias"]) == 1


def test_temp_balance_mask_and_ties():
    params = {"first": with_alpha(9.0), "a": with_alpha(2.0), "b": with_alpha(3.0)}
    mask = {"first": False, "a": True, "b": True}
    for m in (mask, lambda params: mask):
        out = o.temp_balance_multipliers(params, mask=m, min_eigenvalues=4)
        np.testing.assert_allclose([out["first"], out["a"], out["b"]], [1.0, 0.5, 1.5])
    for none in (
        o.temp_balance_multipliers(params),
        o.temp_balance_multipliers([params["a"]] * 2, min_eigenvalues=1),
    ):
        assert all(float(x) == 1 for x in jax.tree.leaves(none))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: o.mup_multipliers("convolution", 1, 1), ValueError, "kind must be one of"),
        (lambda: o.mup_multipliers("hidden", 0, 1), ValueError, "fan_in .* >= 1, got 0"),
        (lambda: o.mup_multipliers("hidden", 1, 0.5), TypeError, "base_fan_in"),
        (lambda: o.mup_multipliers("hidden", 1, 1, optimizer="sgd"), ValueError, "fan_out must be given"),
        (lambda: o.mup_multipliers("hidden", 1, 1, optimizer="lamb"), ValueError, "optimizer"),
        (lambda: o.mup_multipliers("hidden", 1, 1, depth=4), TypeError, "base_depth"),
        (lambda: o.u_mup_multipliers("hidden", 1), ValueError, "kind"),
        (lambda: o.u_mup_multipliers("weight", 1, branches=0), ValueError, "branches"),
        (lambda: o.scale_by_multipliers(1.0, update_every=2), ValueError, "update_every needs"),
        (lambda: o.scale_by_multipliers(1.0, "x"), ValueError, "multipliers must be a dict"),
        (lambda: o.scale_by_multipliers({"x": 1.0}, "y").update(jnp.ones(1), None), ValueError, "label 'y'"),
        (lambda: o.scale_by_multipliers(lambda p: 1.0).update(jnp.ones(1), None), ValueError, "params"),
        (lambda: o.hill_alpha(jnp.ones(3)), ValueError, "at least 2 axes"),
        (lambda: o.hill_alpha(jnp.ones((3, 3)), tile=(4, 1)), ValueError, "tile must fit"),
        (lambda: o.temp_balance_multipliers({}, mode="cubic"), ValueError, "mode"),
        (lambda: o.temp_balance_multipliers({}, low=-1.0), ValueError, "low"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
