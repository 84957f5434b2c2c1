"""Softmax in the evaluation orders of the literature.

All of them give the same numbers. They return an array of the scores' shape, so they take dense scores;
`softmax_top_k` takes `linear_logits` as well.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, is_present
from jaxsoft.kernels.inner import Kernel, choose, compiled, unlogged
from jaxsoft.rows import _sweeps, reductions
from jaxsoft.rows._logits import LinearLogits, Logits, check_axis
from jaxsoft.rows._reduce import as_source, reduce_rows
from jaxsoft.rows._statistics import check_k, log_partition
from jaxsoft.rows.reductions import LogPartition, TopK


def check_dense(logits: Logits, name: str) -> None:
    """Raises a `TypeError` for `linear_logits`: results of the logits' shape need dense logits."""
    if isinstance(logits, LinearLogits):
        raise TypeError(
            f"{name} returns an array of the logits' shape {logits.shape}, which linear_logits never stores: "
            "pass logits.dense(), or use a function of rows (log_prob, logsumexp, top_k, a loss)"
        )


def softmax_with(
    logits: Array,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    method: str = "online",
    reference: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*rows columns"]:
    """Softmax by way of `logsumexp` with the same options."""
    axis = check_axis(logits, axis)
    y = _softmax(axis, method, implementation, True, logits, where, lax.stop_gradient(reference))
    return y.astype(logits.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _softmax(axis, method, implementation, may_round, logits, where, reference):
    """The weights in at least float32; if they may be rounded to the dtype of the logits, a kernel may write them."""
    how = {"method": method, "reference": reference, "implementation": implementation}
    partition = log_partition(logits, axis=axis, where=where, **how)
    dtype = accumulation_dtype(logits.dtype)
    if may_round and where is None and logits.dtype != dtype:
        kernel = _writer(axis, implementation, logits, partition)
        if kernel is not None:
            return _written(kernel, axis, logits, partition).astype(dtype)
    y = _weights(logits.astype(dtype), *(jnp.expand_dims(p, axis) for p in partition))
    return y if where is None else jnp.where(where, y, 0)


def _weights(x: Array, *partition: Array) -> Array:
    return jnp.exp(LogPartition(*partition).log_softmax(x))  # 0 where x is -inf


def _writer(axis: int, implementation: str | None, logits: Array, partition: LogPartition) -> Kernel | None:
    """The kernel that writes the weights, or None: the one that has run `log_partition`, if it can."""
    source = as_source(logits, axis)
    with unlogged():
        kernel = choose("softmax", implementation, source._work(), lambda backend, kernel: None)
    args = [p.reshape(-1) for p in partition]
    if kernel is None or _sweeps.writing_refusal(kernel.backend(), kernel, _weights, source, args):
        return None
    return kernel


@functools.partial(compiled, static_argnums=(0, 1))
def _written(kernel: Kernel, axis: int, logits: Array, partition: LogPartition) -> Array:
    """The weights, in the dtype of the logits."""
    y = _sweeps.written(kernel, _weights, as_source(logits, axis), [p.reshape(-1) for p in partition])
    moved = jnp.moveaxis(logits, axis, -1).shape
    return jnp.moveaxis(y.reshape(moved), -1, axis)


@_softmax.defjvp
def _softmax_jvp(axis, method, implementation, may_round, primals, tangents):
    del may_round
    logits, where, reference = primals
    y = _softmax(axis, method, implementation, False, logits, where, reference)
    t = jnp.where(is_present(logits, where), tangents[0].astype(y.dtype), 0)
    return y, y * (t - jnp.sum(y * t, axis=axis, keepdims=True))


def online_softmax(
    scores: Float[Array, "*rows columns"], *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows columns"]:
    """`exp(x_i) / sum_j exp(x_j)`, the sum in one pass: with a running maximum, rescaled when that grows.

    Args:
      scores: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: scores that are not a floating array.
      ValueError: an axis or a mask that does not fit.

    Reference:
      Milakov and Gimelshein, "Online normalizer calculation for softmax".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.rows import online_softmax
      >>> print(online_softmax(jnp.array([1.0, 2.0, -1.0, 0.5])).round(6))
      [0.224208 0.60946  0.030343 0.135989]
    """
    check_dense(scores, "online_softmax")
    return softmax_with(scores, axis=axis, where=where)


def two_pass_softmax(
    scores: Float[Array, "*rows columns"], *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows columns"]:
    """`exp(x_i) / sum_j exp(x_j)` without a maximum: exponentials are summed as mantissa and integer exponent.

    Args:
      scores: `[*rows, columns]`, floating.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: scores that are not a floating array.
      ValueError: an axis or a mask that does not fit.

    Reference:
      Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.rows import two_pass_softmax
      >>> print(two_pass_softmax(jnp.array([1000.0, 1001.0, 998.0])).round(4))
      [0.2595 0.7054 0.0351]
    """
    check_dense(scores, "two_pass_softmax")
    return softmax_with(scores, axis=axis, where=where, method="exponent")


def unified_max_softmax(
    scores: Float[Array, "*rows columns"],
    reference: float | Float[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows columns"]:
    """`exp(x_i - phi) / sum_j exp(x_j - phi)` with a fixed reference phi: parts of a row add up without rescaling.

    Rows whose largest score is not within (-80, 66) of the reference (our choice, safe in float32 for a million
    columns; the paper calibrates its own per model) are recomputed with a running maximum.

    Args:
      scores: `[*rows, columns]`, floating.
      reference: a scalar or `[*rows]`, known ahead of time, near the rows' largest scores.
      axis: the axis that holds a row.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument that is not floating.
      ValueError: an axis, a mask or a reference that does not fit.

    Reference:
      Hong et al., "FlashDecoding++: Faster Large Language Model Inference on GPUs".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.rows import unified_max_softmax
      >>> print(unified_max_softmax(jnp.array([1.0, 2.0, -1.0, 0.5]), 1.0).round(6))
      [0.224208 0.60946  0.030343 0.135989]
    """
    check_dense(scores, "unified_max_softmax")
    return softmax_with(scores, axis=axis, where=where, method="reference", reference=reference)


def softmax_top_k(
    logits: Logits,
    k: int,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    renormalize: bool = False,
    implementation: str | None = None,
) -> TopK:
    """The k largest softmax probabilities of each row and their columns, in one pass.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits` (nothing stored).
      k: how many, a static integer of 1 or more, at most the number of columns.
      axis: the axis that holds a row.
      where: booleans that broadcast to the logits, True = counts.
      renormalize: whether the k probabilities are divided by their sum. Their gradient then reaches only the k
        logits, otherwise all of them.
      implementation: what runs it: `"xla"`, `"pallas_tpu"`, `"mosaic_gpu"` or None, see `reduce_rows`.

    Returns:
      `TopK(values, indices)`, each `[*rows, k]`, largest first, values in the dtype of the logits; 0 and -1
      where a row has fewer than k entries.

    Raises:
      TypeError: a k that is not a static integer, logits that are not floating.
      ValueError: a k out of range, an axis or a mask that does not fit.

    Reference:
      Milakov and Gimelshein, "Online normalizer calculation for softmax".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.rows import softmax_top_k
      >>> best = softmax_top_k(jnp.array([[1.0, 2.0, -1.0, 0.5]]), 2)
      >>> print(best.values.round(6), best.indices)
      [[0.60946  0.224208]] [[1 0]]
    """
    _checks.flag("renormalize", renormalize)
    both = (reductions.top_k(check_k(k, logits, axis)), reductions.log_partition())
    best, partition = reduce_rows(logits, both, axis=axis, where=where, implementation=implementation)
    if renormalize:
        partition = reduce_rows(best.values, reductions.log_partition())
    present = best.values != -jnp.inf
    log_p = partition.along().log_softmax(jnp.where(present, best.values, 0))
    return TopK(jnp.where(present, jnp.exp(log_p), 0).astype(logits.dtype), best.indices)
