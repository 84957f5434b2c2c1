"""A kernel against XLA: the same values and gradients, to a few units in the last place."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import with_gradient

import jaxsoft


def run(f, point, implementation, **blocks):
    """The results of `f(point, implementation)`, and the gradients of their sum with uneven weights."""
    compiled = jax.jit(lambda p: with_gradient(lambda q: f(q, implementation), p))
    if implementation == "xla":
        return compiled(point)
    with jaxsoft.kernels.interpreted(), jaxsoft.kernels.block_sizes(**blocks):
        return compiled(point)


def same(f, point, ulps=8, **blocks):
    """Compares the interpreted TPU kernels, with the given block sizes, with XLA; returns the kernels' results."""
    got = run(f, point, "pallas_tpu", **blocks)
    close(got, run(f, point, "xla"), ulps)
    return got


def close(got, expected, ulps=8):
    """Asserts equal shapes, dtypes, NaN and infinities, and numbers within `ulps` units of their array's largest."""
    leaves, treedef = jax.tree.flatten_with_path(got)
    assert treedef == jax.tree.structure(expected)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected)):
        name = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        unit = float(jnp.finfo(b.dtype).eps) if jnp.issubdtype(b.dtype, jnp.floating) else 0
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = np.max(np.abs(b), where=np.isfinite(b), initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=ulps * unit * largest, err_msg=name)
