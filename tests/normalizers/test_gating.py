"""Gates of mixtures of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.normalizers.gating import (
    dense_to_sparse_gate,
    drop_weak_experts,
    feature_selection_gate,
    gumbel_softmax_gate,
    merge_experts,
    route_gradients,
    soft_moe_dispatch_combine,
    top_k_gate,
    wina_mask,
)

KEY = jax.random.key(7)
H = jnp.array([1.2, -0.3, 0.8, 0.1])
ROWS = np.random.default_rng(0).normal(size=(5, 6))
C = np.random.default_rng(1).normal(size=(5, 6))

SCORE_GATES = {  # functions of a row of scores
    "top_k": lambda h, **o: top_k_gate(h, 2, **o),
    "top_k_of_all": lambda h, **o: top_k_gate(h, 2, renormalize=False, **o),
    "top_k_noise": lambda h, **o: top_k_gate(h, 2, noise_std=3.0, key=KEY, **o),
    "gumbel": lambda h, **o: gumbel_softmax_gate(h, key=KEY, temperature=0.5, **o),
    "gumbel_mean": lambda h, **o: gumbel_softmax_gate(h, key=KEY, num_samples=3, **o),
    "gumbel_evaluation": lambda h, **o: gumbel_softmax_gate(h, key=None, temperature=2.0, **o),
    "drop_weak": lambda h, **o: drop_weak_experts(h, threshold=0.5, **o),
}
every_gate = pytest.mark.parametrize("name", SCORE_GATES)


def scores_for(name, dtype=jnp.float32):
    x = jnp.asarray(ROWS, dtype)
    return jnp.exp(x) if name == "drop_weak" else x


def test_worked_numbers():
    close(top_k_gate(H, 2), [0.598688, 0, 0.401312, 0])
    close(gumbel_softmax_gate(H, key=None, temperature=0.5), [0.621149, 0.030925, 0.279100, 0.068825])
    g = jnp.array([0.2, -0.4, 1.1, 0.3])
    close(
        gumbel_softmax_gate(H + g, key=None, temperature=0.5),
        [0.258491, 0.003876, 0.702650, 0.034983],
    )
    close(dense_to_sparse_gate(H, jnp.eye(4), temperature=0.25), [0.821927, 0.002037, 0.165944, 0.010091])
    close(drop_weak_experts(jnp.array([0.8, 0.2]), threshold=0.3), [1, 0])
    close(
        feature_selection_gate(jnp.array([1.0, 2.0, 3.0]), jnp.array([-1.0, 0.0, 2.0])),
        [0.268941, 1, 2.642391],
    )


@pytest.mark.parametrize("k", [1, 2, 6, 9])
def test_top_k_gate_is_torch_topk_and_softmax(k):
    torch = pytest.importorskip("torch")
    x = torch.tensor(ROWS, dtype=torch.float64, requires_grad=True)
    values, indices = torch.topk(x, min(k, 6), dim=-1)
    kept = torch.full_like(x, -torch.inf).scatter(-1, indices, values)
    sums = []
    for expected, renormalize in (
        (torch.softmax(kept, -1), True),
        (torch.softmax(x, -1) * (kept > -torch.inf), False),
    ):
        (gradient,) = torch.autograd.grad((expected * torch.tensor(C)).sum(), x, retain_graph=True)
        with float64():
            h = jnp.asarray(ROWS)

            def f(h):
                y = top_k_gate(h, k, renormalize=renormalize)
                return jnp.vdot(C, y), y

            (_, y), g = jax.jit(jax.value_and_grad(f, has_aux=True))(h)
            close(y, expected.detach().numpy(), 1e-14)
            close(g, gradient.numpy(), 1e-14)
            sums.append(y / y.sum(-1, keepdims=True))
    close(sums[0], sums[1], 1e-14)  # renormalized, both orders are one


def test_top_k_gate_ties_go_to_the_smaller_index():
    close(top_k_gate(jnp.array([1.0, 2.0, 2.0, 2.0]), 2), [0, 0.5, 0.5, 0])
    close(top_k_gate(jnp.zeros(4), 1), [1, 0, 0, 0])


def test_top_k_gate_noise():
    normal = np.asarray(jax.random.normal(KEY, H.shape, jnp.float32))
    raw = jnp.array([0.5, -1.0, 2.0, 0.0])
    by_hand = np.asarray(H) + normal * np.log1p(np.exp(np.asarray(raw)))
    close(top_k_gate(H, 2, noise_logits=raw, key=KEY), top_k_gate(jnp.asarray(by_hand), 2))
    by_hand = np.asarray(H) + normal * 2.0 / 4
    close(top_k_gate(H, 3, noise_std=2.0, key=KEY), top_k_gate(jnp.asarray(by_hand), 3))
    keep = jnp.array([True, True, False, True])  # the noise is shared among the experts that are present
    by_hand = np.asarray(H) + normal * 2.0 / 3
    masked = top_k_gate(H, 2, noise_std=2.0, key=KEY, where=keep)
    close(masked, top_k_gate(jnp.asarray(by_hand), 2, where=keep))
    with float64():
        h, raw64 = H.astype(jnp.float64), raw.astype(jnp.float64)
        check_grads(lambda h, r: top_k_gate(h, 3, noise_logits=r, key=KEY), (h, raw64), 1)
    g = jax.grad(lambda r: (top_k_gate(H, 3, noise_logits=r, key=KEY, where=~jnp.isnan(r)) * raw).sum())(
        jnp.array([jnp.nan, -1.0, 2.0, 0.0])
    )
    assert jnp.all(jnp.isfinite(g)) and jnp.any(g != 0)


@every_gate
def test_gradients(name, x64):
    check_grads(jax.jit(SCORE_GATES[name]), (scores_for(name, jnp.float64),), 1)


@every_gate
def test_jit_axis_and_vmap(name):
    gate, x = SCORE_GATES[name], scores_for(name)
    expected = gate(x)
    close(jax.jit(gate)(x), expected, 1e-6)
    if ("gumbel" in name and "evaluation" not in name) or "noise" in name:
        return  # noise is drawn for a shape
    close(gate(x.T, axis=0).T, expected, 1e-6)
    close(jax.vmap(gate)(x), expected, 1e-6)


@every_gate
def test_absent_entries(name):
    gate, x = SCORE_GATES[name], scores_for(name)
    where = jnp.asarray(np.random.default_rng(4).random(x.shape) < 0.6).at[1].set(False).at[0].set(True)
    hidden = jnp.where(where, x, jnp.nan).at[2, 0].set(-jnp.inf)

    def f(x, w):
        y = gate(x, where=w)
        return jnp.vdot(jnp.asarray(C, y.dtype), y), y

    (_, y), g = jax.value_and_grad(f, has_aux=True)(hidden, where)
    absent = ~where | jnp.isneginf(hidden)
    (_, other), h = jax.value_and_grad(f, has_aux=True)(jnp.where(absent, 0.3, x), ~absent)
    close(y, other, 1e-7)
    close(g, h, 1e-6)
    assert not jnp.any(jnp.where(absent, y, 0)) and not jnp.any(jnp.where(absent, g, 0))
    present_rows = jnp.array([0, 2, 3, 4])
    close(y[1], 0)
    if name != "top_k_of_all":
        close(y[present_rows].sum(-1), 1, 1e-6)


@every_gate
def test_dtypes_and_size_one(name):
    gate, x = SCORE_GATES[name], scores_for(name)
    for dtype in (jnp.bfloat16, jnp.float16):
        low = gate(x.astype(dtype))
        assert low.dtype == dtype
        close(low, gate(x.astype(dtype).astype(jnp.float32)), 4e-3)
    close(gate(jnp.full((3, 1), 2.0)), 1)
    with float64():
        assert gate(scores_for(name, jnp.float64)).dtype == jnp.float64


def test_gumbel_gate_draws():
    x = scores_for("gumbel")
    noise = jax.random.gumbel(KEY, x.shape, x.dtype)
    close(gumbel_softmax_gate(x, key=KEY, temperature=0.5), jax.nn.softmax((x + noise) / 0.5), 1e-6)
    t = jnp.linspace(0.5, 2.0, 5)
    close(gumbel_softmax_gate(x, key=None, temperature=t), jax.nn.softmax(x / t[:, None]))
    draws = [gumbel_softmax_gate(x, key=k) for k in jax.random.split(KEY, 4)]
    close(gumbel_softmax_gate(x, key=KEY, num_samples=4), sum(draws) / 4)
    with float64():
        check_grads(
            lambda x, t: gumbel_softmax_gate(x, key=KEY, temperature=t),
            (scores_for("gumbel", jnp.float64), 0.7),
            1,
        )


def test_dense_to_sparse_gate_forms(x64):
    rng = np.random.default_rng(2)
    x, w, b, t = (jnp.asarray(rng.normal(size=s)) for s in ((3, 4), (4, 5), (5,), (3,)))
    t = jnp.exp(t)

    def gate(x, w, b, t):
        return dense_to_sparse_gate(
            x, w, b, temperature=t, activation=jax.nn.sigmoid, input_transform=jnp.tanh
        )

    expected = jax.nn.softmax((jax.nn.sigmoid(jnp.tanh(x) @ w) + b) / t[:, None])
    close(jax.jit(gate)(x, w, b, t), expected, 1e-14)
    close(jax.vmap(gate, (0, None, None, 0))(x, w, b, t), expected, 1e-14)
    check_grads(gate, (x, w, b, t), 1)


def test_dense_to_sparse_gate_absent_experts():
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4), (4, 5)))
    where = jnp.ones((3, 5), bool).at[:, 2].set(False).at[1].set(False)

    def f(x, w):
        y = dense_to_sparse_gate(x, w, where=where)
        return (y * jnp.arange(5)).sum(), y

    (_, y), g = jax.value_and_grad(f, (0, 1), has_aux=True)(x.at[1].set(jnp.nan), w.at[:, 2].set(jnp.nan))
    (_, expected), h = jax.value_and_grad(f, (0, 1), has_aux=True)(x, w)
    close(y, expected, 0)
    close(y[1], 0, 0)
    close(y[0, jnp.array([0, 1, 3, 4])], jax.nn.softmax(x[0] @ w[:, jnp.array([0, 1, 3, 4])]))
    for a, b in zip(g, h):
        close(a, b, 0)
    assert dense_to_sparse_gate(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).dtype == jnp.bfloat16


TOKENS = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])


def test_soft_moe_numbers():
    dispatch, combine = soft_moe_dispatch_combine(TOKENS, jnp.eye(2))
    close(dispatch.T, [[0.473041, 0.174022, 0.352937], [0.174022, 0.473041, 0.352937]])
    close(combine, [[0.731058, 0.268942], [0.268942, 0.731058], [0.5, 0.5]])
    inputs = dispatch.T @ TOKENS
    close(inputs, [[0.825978, 0.700981], [0.526959, 1.299019]])
    close(combine @ inputs, [[0.745559, 0.861818], [0.607378, 1.138182], [0.676468, 1]])


def test_soft_moe_shapes_gradients_and_noise(x64):
    rng = np.random.default_rng(3)
    x, phi = jnp.asarray(rng.normal(size=(2, 5, 3))), jnp.asarray(rng.normal(size=(3, 4, 2)))
    dispatch, combine = jax.jit(soft_moe_dispatch_combine)(x, phi, scale=1.7)
    assert dispatch.shape == combine.shape == (2, 5, 4, 2)
    close(dispatch.sum(1), 1, 1e-14)
    close(combine.sum((2, 3)), 1, 1e-14)
    flat = soft_moe_dispatch_combine(x[1], phi.reshape(3, 8), scale=1.7)
    close(dispatch[1].reshape(5, 8), flat.dispatch, 1e-14)
    close(combine[1].reshape(5, 8), flat.combine, 1e-14)
    close(jax.vmap(lambda x: soft_moe_dispatch_combine(x, phi, scale=1.7).combine)(x), combine, 1e-14)
    check_grads(lambda x, p, s: soft_moe_dispatch_combine(x, p, scale=s), (x, phi, 1.7), 1)
    unit = lambda a, axis: a / np.sqrt((np.asarray(a) ** 2).sum(axis, keepdims=True) + 1e-6)
    logits = unit(x[0], -1) @ unit(phi.reshape(3, 8), 0)
    logits = logits + 0.3 * jax.random.normal(KEY, logits.shape, logits.dtype)
    noisy = soft_moe_dispatch_combine(x[0], phi.reshape(3, 8), noise_std=0.3, key=KEY)
    close(noisy.combine, jax.nn.softmax(logits, -1), 1e-14)
    close(noisy.dispatch, jax.nn.softmax(logits, -2), 1e-14)


def test_soft_moe_absent_tokens():
    x, where = TOKENS.at[1].set(jnp.nan), jnp.array([True, False, True])

    def f(x, where):
        out = soft_moe_dispatch_combine(x, jnp.eye(2), where=where)
        c = jnp.arange(6.0).reshape(3, 2)
        return (out.dispatch * c + out.combine * c**2).sum(), out

    (_, out), g = jax.value_and_grad(f, has_aux=True)(x, where)
    kept = soft_moe_dispatch_combine(TOKENS[::2], jnp.eye(2))
    for a, b in zip(out, kept):
        close(a[::2], b, 1e-7)
        close(a[1], 0, 0)
    assert jnp.all(jnp.isfinite(g)) and jnp.any(g[0] != 0) and not jnp.any(g[1])
    (_, out), g = jax.value_and_grad(f, has_aux=True)(x, jnp.zeros(3, bool))
    for a in (*out, g):
        close(a, 0, 0)


def test_merge_experts():
    p = jax.nn.softmax(jnp.array([0.5, 1.0, 0.0]))
    experts = {
        "w": jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "b": jnp.array([1.0, 0.0, -1.0], jnp.bfloat16),
    }
    merged = merge_experts(experts, p)
    close(merged["w"], [2.758256, 3.758256])
    assert merged["b"].dtype == jnp.bfloat16
    close(merged["b"], 0.307196 - 0.186324, 1e-3)
    rows = jnp.stack([p, p[::-1]])[:, None]
    both = merge_experts(experts, rows)
    assert both["w"].shape == (2, 1, 2) and both["b"].shape == (2, 1)
    close(both["w"][1, 0], merge_experts(experts, p[::-1])["w"])
    with float64():
        w, p64 = experts["w"].astype(jnp.float64), p.astype(jnp.float64)
        check_grads(lambda w, p: merge_experts([w], p), (w, p64), 1)


def test_wina_mask():
    weight = jnp.array([[1, 0.1, 3, 0], [2, 0.2, -1, 0.5], [0, 0.1, 2, 0.5]])
    norms = jnp.linalg.norm(weight, axis=0)
    x = jnp.array([0.5, -2.0, 0.1, 1.0])
    close(jnp.abs(x) * norms, [1.118034, 0.489898, 0.374166, 0.707107])
    assert wina_mask(x, norms, 2).tolist() == [True, False, False, True]
    assert wina_mask(x[:, None], norms, 1, axis=0)[:, 0].tolist() == [True, False, False, False]
    assert wina_mask(jnp.ones(4), jnp.ones(4), 2).tolist() == [True, True, False, False]
    where = jnp.array([False, True, True, True])
    assert wina_mask(x.at[0].set(jnp.nan), norms, 2, where=where).tolist() == [False, True, False, True]
    assert wina_mask(x, norms, 9, where=where).tolist() == where.tolist()
    assert (
        jax.jit(lambda x: wina_mask(x, norms, 2))(jnp.stack([x, -x])).tolist()
        == [[True, False, False, True]] * 2
    )


def test_drop_weak_experts_propagates_nan_and_keeps_empty_rows():
    y = drop_weak_experts(jnp.array([[0.0, 0.0], [jnp.nan, 1.0]]), threshold=0.5)
    close(y[0], 0)
    assert jnp.all(jnp.isnan(y[1]))
    close(drop_weak_experts(jnp.array([0.5, 0.25, 0.25]), threshold=0.5), [0.5, 0.25, 0.25])  # not below


def test_feature_selection_gate_and_routing(x64):
    rng = np.random.default_rng(5)
    x, w = jnp.asarray(rng.normal(size=(2, 3, 4))), jnp.asarray(rng.normal(size=3))
    close(feature_selection_gate(x, w, axis=1), x * jax.nn.sigmoid(w)[:, None], 1e-15)
    check_grads(lambda x, w: feature_selection_gate(x, w, axis=-2), (x, w), 1)
    assert (
        feature_selection_gate(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), axis=1).dtype == jnp.bfloat16
    )

    params = {"gate": w, "net": [x, 2 * x]}

    def f(p, mask):
        p = route_gradients(p, mask)
        return sum(jnp.sum(a**2) for a in jax.tree.leaves(p))

    g = jax.grad(f)(params, {"gate": True, "net": False})
    close(g["gate"], 2 * w, 1e-14)
    close(g["net"][1], 0, 0)
    g = jax.grad(f)(params, {"gate": False, "net": [False, True]})
    close(g["net"][1], 4 * x, 1e-14)
    close(g["net"][0], 0, 0)
    close(g["gate"], 0, 0)


BAD = [
    (lambda: top_k_gate(H, 0), ValueError, "k must be a static integer >= 1"),
    (lambda: top_k_gate(H, 2, noise_std=1.0), ValueError, "noise without a key"),
    (lambda: top_k_gate(H, 2, key=KEY), ValueError, "a key without noise"),
    (lambda: top_k_gate(H, 2, noise_std=1.0, noise_logits=H, key=KEY), ValueError, "got both"),
    (
        lambda: top_k_gate(H, 2, noise_logits=jnp.ones(3), key=KEY),
        ValueError,
        r"noise_logits must broadcast to shape \(4,\)",
    ),
    (lambda: top_k_gate(H, 2, axis=1), ValueError, "axis must be in"),
    (lambda: top_k_gate(jaxsoft.linear_logits(jnp.ones((2, 3)), jnp.ones((3, 4))), 2), TypeError, "dense()"),
    (lambda: top_k_gate(jnp.arange(4), 2), TypeError, "floating"),
    (lambda: gumbel_softmax_gate(H, key=None, num_samples=2), ValueError, "num_samples=2 needs a key"),
    (
        lambda: gumbel_softmax_gate(H, key=KEY, temperature=0.0),
        ValueError,
        "temperature must be a number > 0",
    ),
    (lambda: dense_to_sparse_gate(H, jnp.ones((3, 2))), ValueError, r"weight must have shape \(4, 2\)"),
    (lambda: dense_to_sparse_gate(H, jnp.ones(4)), ValueError, "weight must have two axes"),
    (
        lambda: dense_to_sparse_gate(H, jnp.eye(4), activation="tanh"),
        TypeError,
        "activation must be a function",
    ),
    (lambda: dense_to_sparse_gate(H, jnp.eye(4), jnp.ones(3)), ValueError, r"bias must have shape \(4,\)"),
    (lambda: soft_moe_dispatch_combine(H, jnp.eye(4)), ValueError, "tokens must have 2 axes or more"),
    (lambda: soft_moe_dispatch_combine(TOKENS, jnp.eye(3)), ValueError, r"slots must have shape \(2, 3\)"),
    (
        lambda: soft_moe_dispatch_combine(TOKENS, jnp.eye(2), key=KEY),
        ValueError,
        "key must be given if and only if noise_std > 0",
    ),
    (
        lambda: soft_moe_dispatch_combine(TOKENS, jnp.eye(2), where=jnp.ones(2, bool)),
        ValueError,
        r"where must have shape \(3,\)",
    ),
    (
        lambda: merge_experts({"a": jnp.ones((2, 3))}, jnp.ones(3)),
        ValueError,
        r"experts\['a'\] must have shape \(3, 3\)",
    ),
    (lambda: drop_weak_experts(H, threshold=1.5), ValueError, "threshold must be a number >= 0 and <= 1"),
    (lambda: wina_mask(H, jnp.ones(3), 2), ValueError, r"input_norms must have shape \(4,\)"),
    (lambda: feature_selection_gate(H, jnp.ones(3)), ValueError, r"gate_logits must have shape \(4,\)"),
    (lambda: route_gradients({"a": H}, {"a": 1}), TypeError, "mask must hold booleans"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
