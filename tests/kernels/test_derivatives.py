"""Kernels take no derivative away: every transform of JAX, interpreted, against XLA.

Reverse mode runs a kernel's backward pass; forward mode and higher orders consist of ordinary operations, which
`test_lowering.py` sees in the programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import trees_close
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import kernels, losses
from jaxsoft.attention import dot_product_attention
from jaxsoft.kernels import gpu
from jaxsoft.kernels.inner import Kernel

pytestmark = pytest.mark.table
MISSING = gpu.unavailable(Kernel("mosaic_gpu", True, ""))


def stored(p, **how):
    """Stored rows with absent entries, and a statistic of two numbers per row."""
    return jaxsoft.entropy(p["x"], where=jnp.arange(p["x"].shape[1]) != 2, **how)


def head(p, **how):
    """A linear output layer; a state per row depends on an array of labels."""
    logits = jaxsoft.linear_logits(p["hidden"], p["weight"], temperature=p["temperature"], **how)
    return losses.cross_entropy(logits, jnp.arange(len(p["hidden"])), label_smoothing=0.1)


def attention(p, **how):
    return dot_product_attention(p["q"], p["k"], p["v"], is_causal=True, **how).sum((0, 2, 3))


CASES = dict(
    stored=(stored, dict(x=(5, 7))),
    head=(head, dict(hidden=(5, 3), weight=(3, 7), temperature=(5,))),
    attention=(attention, dict(q=(1, 5, 2, 2), k=(1, 5, 1, 2), v=(1, 5, 1, 3))),
    # For the GPU's kernels, which choose larger tiles and whose matrix products are in half precision.
    wide_stored=(stored, dict(x=(40, 76))),
    wide_head=(
        lambda p, **how: head(p, dtype=jnp.bfloat16, **how),
        dict(hidden=(40, 64), weight=(64, 76), temperature=(40,)),
    ),
)


def points(case):
    """A point and a direction."""
    rng = np.random.default_rng(0)
    normal = lambda: {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in CASES[case][1].items()}
    point, direction = normal(), normal()
    if "temperature" in point:
        point["temperature"] = 1 + jnp.abs(point["temperature"])
    return point, direction


def scalar(values):
    return lambda p: jnp.sum(jnp.sin(values(p)) * jnp.arange(1.0, len(values(p)) + 1))


def inner(a, b):
    return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))


def along(f, p, d):
    """`f` as a function of two numbers: of the way into a direction, and of the distance from 0."""
    return lambda t: f(jax.tree.map(lambda a, b: t[1] * a + t[0] * b, p, d))


AT = jnp.array([0.0, 1.0])


def two(p, d):
    return jax.tree.map(lambda a, b: jnp.stack([a, a + 0.1 * b]), p, d)


def curvature(f, p, d):
    """The Hessian times the direction, forward over reverse."""
    return jax.jvp(jax.grad(f), (p,), (d,))[1]


# `(values, p, d) -> result` of a function from trees to one number per row, and the transform with the same result, by
# which XLA computes it.
TRANSFORMS = {
    "grad": ("grad", lambda y, p, d: jax.grad(scalar(y))(p)),
    "vjp": ("grad", lambda y, p, d: jax.vjp(scalar(y), p)[1](1.0)[0]),
    "checkpoint": ("grad", lambda y, p, d: jax.grad(jax.checkpoint(scalar(y)))(p)),
    "scan": (
        "grad",
        lambda y, p, d: jax.grad(
            lambda p: jax.lax.scan(lambda c, _: (c + scalar(y)(p) / 2, None), 0.0, None, length=2)[0]
        )(p),
    ),
    "jacrev": ("jacrev", lambda y, p, d: jax.jacrev(y)(p)),
    "jvp": ("jvp", lambda y, p, d: jax.jvp(y, (p,), (d,))[1]),
    "linearize": ("jvp", lambda y, p, d: jax.linearize(y, p)[1](d)),
    "transpose twice": (
        "jvp",
        lambda y, p, d: jax.vjp(lambda g: jax.vjp(y, p)[1](g)[0], jnp.zeros(len(y(p))))[1](d)[0],
    ),
    "forward over reverse": ("forward over reverse", lambda y, p, d: curvature(scalar(y), p, d)),
    "reverse over forward": (
        "forward over reverse",
        lambda y, p, d: jax.grad(lambda p: jax.jvp(scalar(y), (p,), (d,))[1])(p),
    ),
    "reverse over reverse": (
        "forward over reverse",
        lambda y, p, d: jax.grad(lambda p: inner(jax.grad(scalar(y))(p), d))(p),
    ),
    "hessian": ("hessian", lambda y, p, d: jax.hessian(along(scalar(y), p, d))(AT)),
    "third order": (
        "third order",
        lambda y, p, d: jax.jvp(lambda q: curvature(scalar(y), q, d), (p,), (p,))[1],
    ),
    "vmap of grad": ("vmap of grad", lambda y, p, d: jax.vmap(jax.grad(scalar(y)))(two(p, d))),
    "grad of vmap": (
        "vmap of grad",
        lambda y, p, d: jax.grad(lambda q: jnp.sum(jax.vmap(scalar(y))(q)))(two(p, d)),
    ),
    "vmap of vmap": (
        "vmap of grad",
        lambda y, p, d: jax.tree.map(
            lambda a: a[:, 0],
            jax.vmap(jax.vmap(jax.grad(scalar(y))))(jax.tree.map(lambda a: a[:, None], two(p, d))),
        ),
    ),
}


@functools.cache
def expected(case, of):
    """A result by XLA."""
    transform = TRANSFORMS[of][1]
    return jax.jit(functools.partial(transform, functools.partial(CASES[case][0], implementation="xla")))(
        *points(case)
    )


def check(case, name, implementation, tolerance, **blocks):
    of, transform = TRANSFORMS[name]
    values = functools.partial(CASES[case][0], implementation=implementation)
    with kernels.interpreted(), kernels.block_sizes(**blocks):
        got = jax.jit(functools.partial(transform, values))(*points(case))
    trees_close(got, expected(case, of), tolerance)


# Programs of a head and of attention take seconds to compile.
SOME = ["jvp", "scan", "forward over reverse", "reverse over reverse", "vmap of grad", "grad of vmap"]


@pytest.mark.parametrize(
    ("case", "name"),
    [("stored", name) for name in TRANSFORMS]
    + [(case, name) for name in SOME for case in ("head", "attention")],
)
def test_every_transform(case, name):
    check(case, name, "pallas_tpu", 1e-4, rows=4, columns=3)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("name", ["vmap of grad", "forward over reverse"])
@pytest.mark.parametrize(("case", "tolerance"), [("wide_stored", 1e-4), ("wide_head", 2e-2)])
def test_gpu(case, tolerance, name):
    check(case, name, "mosaic_gpu", tolerance)


@pytest.mark.parametrize("name", ["forward over reverse", "vmap of grad"])
def test_rows_sharded_over_devices(name):
    """The weight is on both. (JAX's interpreter of kernels does not run with `check_vma`.)"""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(1)
    point, direction = (
        dict(
            x=jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
            w=jnp.asarray(rng.normal(size=(3, 7)), jnp.float32),
        )
        for _ in range(2)
    )

    def values(p, implementation):
        return jaxsoft.entropy(jaxsoft.linear_logits(p["x"], p["w"]), implementation=implementation)

    def sharded(p):
        local = functools.partial(values, implementation="pallas_tpu")
        specs = (dict(x=P("data"), w=P()),)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(p)

    transform = TRANSFORMS[name][1]
    with kernels.interpreted(), kernels.block_sizes(rows=4, columns=3):
        got = jax.jit(functools.partial(transform, sharded))(point, direction)
    xla = lambda p: values(p, "xla")
    trees_close(got, jax.jit(functools.partial(transform, xla))(point, direction), 1e-4)
