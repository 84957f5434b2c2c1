"""The same weights and gradients as torch, entmax and optax, with non-uniform cotangents."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft
from jaxsoft import normalizers

pytestmark = pytest.mark.usefixtures("x64")
TIGHT = dict(rtol=1e-12, atol=1e-13)
SHAPES = [(1,), (5, 3), (2, 3, 16), (2, 2, 500)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def example(shape, spread=2.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * spread, rng.normal(size=shape)


def ours(f, g, *operands):
    """Weights, and the gradients of their sum weighted by g, of every operand."""
    y, pullback = jax.vjp(f, *map(jnp.asarray, operands))
    return [np.asarray(a) for a in (y, *pullback(jnp.asarray(g)))]


def of_torch(f, g, *operands):
    torch = pytest.importorskip("torch")
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in operands]
    y = f(torch, *tensors)
    (y * torch.tensor(g)).sum().backward()
    return [y.detach().numpy(), *(t.grad.numpy() for t in tensors)]


def check(got, expected, tolerance=TIGHT):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, **tolerance)


# --- torch -----------------------------------------------------------------------------------------------


def with_column(torch, x, column):
    """Softmax over the scores and one more, which is then dropped."""
    return torch.softmax(torch.cat([x, column[..., None]], -1), -1)[..., :-1]


@shapes
def test_sinks_are_a_column_of_torch(shape):
    x, g = example(shape)
    sink = np.random.default_rng(1).normal(size=shape[:-1]) * 2
    got = ours(lambda x, s: jaxsoft.sink_softmax(x, sink=s), g, x, sink)
    check(got, of_torch(with_column, g, x, sink))
    n = np.exp(sink)
    got = ours(lambda x, n: jaxsoft.softmax_n(x, n=n), g, x, n)
    check(got, of_torch(lambda torch, x, n: with_column(torch, x, torch.log(n)), g, x, n))
    zero = lambda torch, x: with_column(torch, x, torch.zeros(shape[:-1], dtype=torch.float64))
    check(ours(jaxsoft.softmax_one, g, x), of_torch(zero, g, x))


@shapes
def test_scaled_scores_of_torch(shape):
    x, g = example(shape)
    rng = np.random.default_rng(1)
    scale, bias = rng.normal(size=shape[:-1]), rng.normal(size=shape[:-1])
    got = ours(lambda x, s, b: jaxsoft.scalable_softmax(x, scale=s, bias=b), g, x, scale, bias)
    n = np.log(shape[-1])
    expected = of_torch(
        lambda torch, x, s, b: torch.softmax((s * n + b)[..., None] * x, -1), g, x, scale, bias
    )
    check(got, expected)


@shapes
def test_replaced_scores_of_torch(shape):
    x, g = example(shape)
    mask = np.random.default_rng(1).random(shape) < 0.6

    def expected(torch, x):
        return torch.softmax(torch.where(torch.tensor(mask), x, torch.tensor(-1.5, dtype=torch.float64)), -1)

    f = lambda x: normalizers.masked_logit_softmax(x, mask, masked_logit=-1.5)
    check(ours(f, g, x), of_torch(expected, g, x))


@shapes
def test_largest_scores_of_torch(shape):
    x, g = example(shape)
    k = min(3, shape[-1])

    def expected(torch, x):
        best = torch.topk(x, k, dim=-1)
        return torch.zeros_like(x).scatter(-1, best.indices, torch.softmax(best.values, -1))

    check(ours(lambda x: jaxsoft.sparse_softmax(x, k=k), g, x), of_torch(expected, g, x))


@shapes
def test_each_score_by_itself_of_torch(shape):
    x, g = example(shape)
    n = shape[-1]
    check(
        ours(jaxsoft.sigmoid_weights, g, x),
        of_torch(lambda torch, x: torch.sigmoid(x - np.log(n)), g, x),
    )
    check(
        ours(lambda x: jaxsoft.relu_weights(x, power=2.0), g, x),
        of_torch(lambda torch, x: torch.relu(x) ** 2 / n, g, x),
    )


FORMULAS = [  # normalizer, the formula with torch's operations and derivatives
    (
        jaxsoft.softpick,
        lambda torch, x: torch.relu(torch.expm1(x)) / (torch.expm1(x).abs().sum(-1, keepdim=True)),
    ),
    (
        jaxsoft.stablemax,
        lambda torch, x: torch.nn.functional.normalize(
            torch.where(x < 0, 1 / (1 - x.clamp(max=0)), 1 + x), p=1, dim=-1
        ),
    ),
    (jaxsoft.taylor_softmax, lambda torch, x: torch.nn.functional.normalize(1 + x + x**2 / 2, p=1, dim=-1)),
    (
        jaxsoft.clipped_softmax,
        lambda torch, x: torch.clip(1.2 * torch.softmax(x, -1) - 0.1, 0, 1),
    ),
    (
        jaxsoft.self_adjust_softmax,
        lambda torch, x: (
            (x - x.amin(-1, keepdim=True).clamp(max=0))
            / (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0))
            * torch.softmax(x, -1)
        ),
    ),
    (
        lambda x: jaxsoft.softplus_attention_weights(x, scale=1.3, eps=0.0),
        lambda torch, x: torch.nn.functional.normalize(
            torch.nn.functional.softplus(1.3 * np.log(x.shape[-1]) * x), p=1, dim=-1
        ),
    ),
]


@pytest.mark.parametrize(
    ("normalizer", "formula"),
    FORMULAS,
    ids=["softpick", "stablemax", "taylor", "clipped", "self_adjust", "softplus_attention"],
)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_formulas_with_the_derivatives_of_torch(normalizer, formula, shape):
    x, g = example(shape)
    loose = dict(rtol=3e-8, atol=3e-8)  # softpick adds eps, torch's softplus is linear from 20 on
    check(ours(normalizer, g, x), of_torch(formula, g, x), loose)


# --- entmax ----------------------------------------------------------------------------------------------


@pytest.mark.table
@shapes
@pytest.mark.parametrize("spread", [0.3, 30.0])
@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_exact_entmax(name, spread, shape):
    entmax = pytest.importorskip("entmax")
    x, g = example(shape, spread)
    expected = of_torch(lambda torch, x: getattr(entmax, name)(x, dim=-1), g, x)
    check(ours(getattr(jaxsoft, name), g, x), expected, dict(rtol=1e-10, atol=1e-11))


@pytest.mark.table
@shapes
@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.75, 2.5])
def test_entmax_by_bisection(alpha, shape):
    """Weights, and the gradients of scores and alpha (one for all rows, or one per row)."""
    entmax = pytest.importorskip("entmax")
    x, g = example(shape)
    bisect = lambda torch, x, a: entmax.entmax_bisect(x, a, dim=-1, n_iter=100)
    tolerance = dict(rtol=1e-8, atol=1e-9)
    expected = of_torch(bisect, g, x, np.full((*shape[:-1], 1), alpha))
    got = ours(lambda x, a: jaxsoft.entmax(x, alpha=a[..., 0]), g, x, np.full((*shape[:-1], 1), alpha))
    check(got, expected, tolerance)
    check(ours(lambda x: jaxsoft.entmax(x, alpha=alpha), g, x), expected[:2], tolerance)
    one_for_all = ours(lambda x, a: jaxsoft.entmax(x, alpha=a), g, x, np.float64(alpha))
    np.testing.assert_allclose(one_for_all[2], expected[2].sum(), **tolerance)


def test_entmax_with_an_alpha_of_each_row():
    entmax = pytest.importorskip("entmax")
    x, g = example((6, 9))
    alpha = np.array([1.1, 1.3, 1.5, 1.7, 1.9, 2.2])[:, None]
    expected = of_torch(lambda torch, x, a: entmax.entmax_bisect(x, a, dim=-1, n_iter=100), g, x, alpha)
    got = ours(lambda x, a: jaxsoft.entmax(x, alpha=a[:, 0]), g, x, alpha)
    check(got, expected, dict(rtol=1e-8, atol=1e-9))


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_entmax_of_a_masked_row(name):
    """Masked here, cut out there."""
    entmax = pytest.importorskip("entmax")
    x, g = example((5, 8))
    keep = np.array([True, False, True, True, False, True, True, True])
    expected = of_torch(lambda torch, x: getattr(entmax, name)(x, dim=-1), g[:, keep], x[:, keep])
    holes = np.where(keep, x, np.nan)
    got = ours(lambda x: getattr(jaxsoft, name)(x, where=jnp.asarray(keep)), g, holes)
    check([a[:, keep] for a in got], expected, dict(rtol=1e-10, atol=1e-11))
    assert not np.any([a[:, ~keep] for a in got])


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_entmax_in_float32(name):
    entmax = pytest.importorskip("entmax")
    x, g = example((4, 3000))
    expected = of_torch(lambda torch, x: getattr(entmax, name)(x, dim=-1), g, x.astype(np.float32))
    f = lambda x: getattr(jaxsoft, name)(x.astype(jnp.float32)).astype(jnp.float64)
    check(ours(f, g, x.astype(np.float32).astype(np.float64)), expected, dict(rtol=1e-5, atol=3e-6))


# --- optax -----------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("spread", [0.3, 30.0])
def test_sparsemax_is_the_projection_of_optax(spread, shape):
    x, g = example(shape, spread)
    flat = x.reshape(-1, shape[-1])
    expected = ours(jax.vmap(optax.projections.projection_simplex), g.reshape(flat.shape), flat)
    check(ours(jaxsoft.sparsemax, g, x), [a.reshape(shape) for a in expected], dict(rtol=1e-11, atol=1e-12))
