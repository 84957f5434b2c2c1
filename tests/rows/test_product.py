"""The half-precision product, whose derivatives are half-precision products with float32 results."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft.rows._product import product

RNG = np.random.default_rng(0)


def integers(*shape):
    """Small integers: products and sums of them are exact."""
    return jnp.asarray(RNG.integers(-4, 5, shape), jnp.float32)


def half(contract):
    return lambda a, b: product(a, b, contract, jnp.dtype(jnp.bfloat16), None)


def single(contract):
    return lambda a, b: jax.lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())))


def derivatives(f):
    """Value, both gradients, a tangent, and a second derivative."""

    def all_of(a, b, g):
        out, pull = jax.vjp(f, a, b)
        tangents = jax.jvp(lambda a, b: jax.vjp(f, a, b)[1](g), (a, b), (a + 1, b - 1))[1]
        return out, pull(g), jax.jvp(f, (a, b), (a + 1, b - 1))[1], tangents

    return all_of


# The left matrix, the right one, or both are mapped, once or twice; along different axes.
MAPS = [[], [(1, 2, 0)], [(1, None, 0)], [(None, 2, 0)], [(None, 1, 1), (0, None, 0)], [(0, 0, 0), (2, 0, 1)]]


@pytest.mark.parametrize("contract", [(1, 0), (1, 1), (0, 0)], ids=str)
def test_exact_where_nothing_is_rounded(contract):
    def both(point):
        results = []
        for (a, b, g), maps in zip(point, MAPS):
            each = [derivatives(make(contract)) for make in (half, single)]
            for axes in reversed(maps):
                each = [jax.vmap(f, axes) for f in each]
            results.append([f(a, b, g) for f in each])
        return results

    def operands(maps):
        shapes = [[6, 6], [6, 6], [6, 6]]  # square, so that every product exists
        for axes in reversed(maps):
            for shape, axis in zip(shapes, axes):
                if axis is not None:
                    shape.insert(axis, 3)
        return [integers(*shape) for shape in shapes]

    for got, expected in jax.jit(both)([operands(maps) for maps in MAPS]):
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(got))
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_eager_and_in_half_precision():
    a, b = integers(3, 4).astype(jnp.float16), integers(4, 5).astype(jnp.float16)
    out, pull = jax.vjp(lambda a, b: product(a, b, (1, 0), jnp.dtype(jnp.float16), None), a, b)
    np.testing.assert_array_equal(out, (a @ b).astype(jnp.float32))
    assert out.dtype == jnp.float32 and all(d.dtype == jnp.float16 for d in pull(jnp.ones_like(out)))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_multiply_in_half_precision_and_sum_in_float32(platform):
    f = jax.jit(lambda a, b: jax.vjp(half((1, 0)), a, b)[1](jnp.ones((3, 5))))
    text = f.trace(integers(3, 4), integers(4, 5)).lower(lowering_platforms=(platform,)).as_text()
    types = re.findall(r"dot_general.*: \(tensor<\w+x(\w+)>, tensor<\w+x(\w+)>\) -> tensor<\w+x(\w+)>", text)
    assert types == [("bf16", "bf16", "f32")] * 2
