"""Sparse and coarse deltas.

The deltas of fine-tuned models are made sparse, coarse or low in rank before they are averaged.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsoft import _checks

Scalar = float | jax.Array


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.result_type(x, jnp.float32))


def _with_keys(function: Any, delta: Any, key: jax.Array) -> Any:
    """`function(leaf, key)` for each leaf, in its dtype; each leaf has its own key."""
    leaves, treedef = jax.tree.flatten(delta)
    keys = jax.random.split(key, max(len(leaves), 1))
    out = [function(_wide(x), k).astype(jnp.result_type(x)) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(treedef, out)


def dare_delta(delta: Any, key: jax.Array, drop_rate: Scalar = 0.9, *, divisor: Scalar | None = None) -> Any:
    """DARE: drops most entries of a delta at random and scales up the others.

        delta_j <- delta_j / divisor  with probability 1 - drop_rate,  else 0

    With the divisor `1 - drop_rate` each entry keeps its expectation. If nearly all entries are dropped, a larger
    divisor (DAREx-q) trades some of the expectation for less variance; choose it by the output on a few examples.

    Args:
      delta: A pytree, fine-tuned minus base parameters.
      key: A PRNG key.
      drop_rate: In [0, 1).
      divisor: Positive. None: `1 - drop_rate`.

    Returns:
      A pytree like `delta`.

    Raises:
      ValueError: for numbers out of range.

    References:
      "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models".

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> out = dare_delta(jnp.ones(1000), jax.random.key(0), 0.5)
      >>> print(jnp.unique(out), bool(abs(out.mean() - 1) < 0.1))
      [0. 2.] True
    """
    _checks.number("drop_rate", drop_rate, at_least=0, below=1)
    if divisor is not None:
        _checks.number("divisor", divisor, above=0)
    scale = 1 - drop_rate if divisor is None else divisor

    def leaf(x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, 1 - drop_rate, x.shape), x / scale, 0)

    return _with_keys(leaf, delta, key)


def bit_delta(delta: Any, *, axis: int | tuple[int, ...] | None = None) -> Any:
    """One bit per entry of a delta: its sign, times the mean absolute value.

        sign(delta) mean |delta|

    This is the multiple of the signs nearest to the delta, in least squares (for a delta without zeros). The sign of 0
    is 0.

    Args:
      delta: A pytree, fine-tuned minus base parameters.
      axis: Axes of the mean, which every leaf must have. None: all, one scale per leaf.

    Returns:
      A pytree like `delta`.

    Raises:
      ValueError: for an axis that a leaf does not have.

    References:
      "A Unified View of Delta Parameter Editing in Post-Trained Large-Scale Models"; "BitDelta".

    Examples:
      >>> import jax.numpy as jnp
      >>> print(bit_delta(jnp.array([0.5, -1.5, 0.0, 2.0])))
      [ 1. -1.  0.  1.]
    """

    def leaf(x: Any) -> jax.Array:
        wide = _wide(x)
        size = jnp.mean(jnp.abs(wide), axis=axis, keepdims=True) if wide.size else wide
        return (jnp.sign(wide) * size).reshape(wide.shape).astype(jnp.result_type(x))

    return jax.tree.map(leaf, delta)


def della_delta(delta: Any, key: jax.Array, density: Scalar = 0.6, eps: Scalar = 0.1) -> Any:
    """DELLA: drops entries of a delta at random, small ones more often, and scales up the others.

    Along the last axis, with ranks 0 to n - 1 of the absolute values:

        keep_j = density - eps + 2 eps rank_j / (n - 1)
        delta_j <- delta_j / keep_j  with probability keep_j,  else 0

    Each entry keeps its expectation, and on average a fraction `density` of them is kept. A row with one entry keeps it
    with probability `density`; of equal entries the later has the higher rank.

    Args:
      delta: A pytree, fine-tuned minus base parameters.
      key: A PRNG key.
      density: Fraction of the entries to keep.
      eps: Half the spread of the probabilities, at least 0, with `density - eps > 0` and `density + eps <= 1`.

    Returns:
      A pytree like `delta`.

    Raises:
      ValueError: for numbers out of range.

    References:
      "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling".

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> out = della_delta(jnp.array([1.0, -3.0]), jax.random.key(0), density=0.75, eps=0.25)
      >>> print(bool(out[0] in (0.0, 2.0)), out[1])  # kept with probabilities 0.5 and 1
      True -3.0
    """
    _checks.number("density", density, above=0, at_most=1)
    _checks.number("eps", eps, at_least=0)
    if _checks.is_concrete_number(density) and _checks.is_concrete_number(eps):
        _checks.number("density - eps", float(density) - float(eps), above=0)
        _checks.number("density + eps", float(density) + float(eps), at_most=1 + 1e-6)

    def leaf(x: jax.Array, key: jax.Array) -> jax.Array:
        n = x.shape[-1] if x.ndim else 1
        order = jnp.argsort(jnp.argsort(jnp.abs(x), axis=-1), axis=-1) if n > 1 else jnp.full(x.shape, 0.5)
        rank = order / max(n - 1, 1)
        keep = (density - eps + 2 * eps * rank).astype(x.dtype)
        return jnp.where(jax.random.bernoulli(key, keep), x / keep, 0)

    return _with_keys(leaf, delta, key)


def star_delta(delta: Any, share: Scalar = 0.4) -> Any:
    """STAR: the leading singular directions of each matrix of a delta, rescaled to its nuclear norm.

    With singular values s_1 >= s_2 >= ..., the smallest r with `s_1 + ... + s_r >= share sum(s)` are kept, and
    multiplied by `sum(s) / (s_1 + ... + s_r)`. The truncated deltas of several models interfere less in an average.

    Args:
      delta: A pytree, fine-tuned minus base parameters. Leaves with fewer than two axes pass unchanged; of the
        others the last two axes are the matrix.
      share: Kept share of the sum of the singular values, in (0, 1]; 1 changes nothing.

    Returns:
      A pytree like `delta`.

    Raises:
      ValueError: for a share out of range.

    References:
      "STAR: Spectral Truncation and Rescale for Model Merging".

    Examples:
      >>> import jax.numpy as jnp
      >>> print(star_delta(jnp.diag(jnp.array([3.0, 1.0]))).round(4) + 0.0)
      [[4. 0.]
       [0. 0.]]
    """
    _checks.number("share", share, above=0, at_most=1)

    def leaf(x: Any) -> jax.Array:
        wide = _wide(x)
        if wide.ndim < 2 or wide.size == 0:
            return x
        u, s, vt = jnp.linalg.svd(wide, full_matrices=False)
        total = jnp.sum(s, axis=-1, keepdims=True)
        before = jnp.cumsum(s, axis=-1) - s
        kept = jnp.where(before < share * total, s, 0)
        some = jnp.sum(kept, axis=-1, keepdims=True)
        scaled = kept * (total / jnp.where(some > 0, some, 1))
        return jnp.matmul(u * scaled[..., None, :], vt, precision="highest").astype(jnp.result_type(x))

    return jax.tree.map(leaf, delta)
