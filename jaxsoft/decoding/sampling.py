"""Samples from rows of logits, stored or never stored, and what belongs to them.

The largest of `logit + Gumbel noise` is a sample from the softmax, and a maximum is a row reduction: so a sample needs
one pass, and no row of logits or probabilities. The noise of an entry depends on the key, the number of its row and its
column only. One key gives one result, whatever the blocks, the shards or the other rows are, except where two perturbed
logits agree to the last places, since sums of products round differently in blocks of other sizes.

All functions take an array, `linear_logits`, or what a transform made of either.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft.decoding._rows import Map, TransformedLogits, after, as_rows
from jaxsoft.normalizers.inner import key_words, mixed_bits, two_words
from jaxsoft.rows import Logits, TopK, reductions
from jaxsoft.rows.inner import check_ids

_COLUMNS = 0x6A617873  # the key of the columns' words


class Sample(NamedTuple):
    """Sampled tokens and their log-probabilities.

    Attributes:
      tokens: `[*rows]` int32; -1 for a row without entries.
      log_prob: `[*rows]`, float32 or wider, under the distribution that was sampled; 0 for a row without entries.
    """

    tokens: Array
    log_prob: Array


def sample(
    logits: Logits | TransformedLogits,
    key: Array,
    *,
    greedy: bool | Bool[Array, "*rows"] = False,
    row_numbers: Int[Array, "*rows"] | None = None,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Int[Array, "*rows"]:
    """One sample per row from `softmax(logits)`, in one pass.

    The random numbers are not those of `jax.random.categorical` on the same key.

    Args:
      logits: `[*rows, columns]`: a floating array, `linear_logits`, or the result of a transform.
      key: a PRNG key.
      greedy: True where the largest logit is taken instead (temperature 0): a boolean, or one per row.
      row_numbers: `[*rows]` integers from which a row's noise is drawn. Default: 0, 1, 2, ... over the flattened rows.
        Inside `shard_map`, give rows on different devices different numbers. Rows of equal numbers get equal noise.
      axis: the axis that holds a row; the last one unless `logits` is an array.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]` int32; -1 for a row without entries (everything filtered, or masked).

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Maddison et al., "A* Sampling" (the Gumbel-max trick).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import chain, sample, temperature, top_k
      >>> logits = jnp.array([[1.0, 2.0, -1.0, 0.5], [9.0, 0.0, 0.0, 0.0]])
      >>> print(sample(chain(temperature(0.7), top_k(1))(logits), jax.random.key(0)))
      [1 0]
    """
    rows = as_rows(logits, axis=axis, where=where)
    noise = _gumbel(rows, key, greedy, row_numbers)
    return rows.reduce(after((noise,), reductions.argmax()))


def sample_and_log_prob(
    logits: Logits | TransformedLogits,
    key: Array,
    *,
    greedy: bool | Bool[Array, "*rows"] = False,
    row_numbers: Int[Array, "*rows"] | None = None,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Sample:
    """The tokens of `sample` with their log-probabilities under `softmax(logits)`, in the same pass.

    Args:
      logits: `[*rows, columns]`: a floating array, `linear_logits`, or the result of a transform.
      key: a PRNG key.
      greedy: as in `sample`; the log-probability is that under the softmax.
      row_numbers: as in `sample`.
      axis: the axis that holds a row; the last one unless `logits` is an array.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      A `Sample`; the log-probability is differentiable.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Example:
      >>> import numpy as np
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import sample_and_log_prob
      >>> drawn = sample_and_log_prob(jnp.array([[1.0, 2.0, -1.0, 0.5]]), jax.random.key(0), greedy=True)
      >>> print(drawn.tokens, np.asarray(drawn.log_prob).round(4))
      [1] [-0.4952]
    """
    rows = as_rows(logits, axis=axis, where=where)
    noise = _gumbel(rows, key, greedy, row_numbers)
    best = after((noise,), reductions.maximum_and_argmax())
    found = rows.reduce({"best": best, "partition": reductions.log_partition()})
    value, tokens = found["best"]
    empty = tokens < 0
    score = jnp.where(empty, 0, value) - _noise(tokens, *noise.args)
    log_prob = found["partition"].log_softmax(score)
    return Sample(tokens, jnp.where(empty, 0, log_prob))


def sample_without_replacement(
    logits: Logits | TransformedLogits,
    key: Array,
    k: int,
    *,
    row_numbers: Int[Array, "*rows"] | None = None,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> TopK:
    """Samples k different tokens per row from `softmax(logits)`, one after another without replacement; one pass.

    The first of them is that of `sample` on the same key.

    Args:
      logits: `[*rows, columns]`: a floating array, `linear_logits`, or the result of a transform.
      key: a PRNG key.
      k: how many, static, at most the number of columns.
      row_numbers: as in `sample`.
      axis: the axis that holds a row; the last one unless `logits` is an array.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      A `TopK`: the tokens (`indices`) in the order in which they were drawn, and their perturbed logits (`values`),
      each `[*rows, k]`; -1 and -inf where a row has fewer than k entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: a k out of range, an argument of a wrong shape.

    Reference:
      Kool et al., "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling Sequences Without
      Replacement".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import sample_without_replacement
      >>> drawn = sample_without_replacement(jnp.array([[1.0, -jnp.inf, 2.0]]), jax.random.key(0), 3)
      >>> print(sorted(drawn.indices[0].tolist()))
      [-1, 0, 2]
    """
    rows = as_rows(logits, axis=axis, where=where)
    k = _checks.integer("k", k, at_least=1)
    if k > rows.columns:
        raise ValueError(f"k must be at most the number of columns, which is {rows.columns}, got {k}")
    noise = _gumbel(rows, key, False, row_numbers)
    return rows.reduce(after((noise,), reductions.top_k(k)))


def argmax(
    logits: Logits | TransformedLogits, *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Int[Array, "*rows"]:
    """The column of the largest logit of each row: greedy decoding; one pass.

    Args:
      logits: `[*rows, columns]`: a floating array, `linear_logits`, or the result of a transform.
      axis: the axis that holds a row; the last one unless `logits` is an array.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]` int32, the first among equals; -1 for a row without entries.

    Raises:
      TypeError: logits that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import argmax
      >>> print(argmax(jnp.array([[1.0, 2.0, -1.0, 0.5]])))
      [1]
    """
    return as_rows(logits, axis=axis, where=where).reduce(reductions.argmax())


def log_prob(
    logits: Logits | TransformedLogits,
    tokens: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """`log softmax(logits)[tokens]`: the log-probability of tokens under the transformed distribution.

    Args:
      logits: `[*rows, columns]`: a floating array, `linear_logits`, or the result of a transform.
      tokens: `[*rows]` integers. An id out of range gives NaN (an error under `checkify`).
      axis: the axis that holds a row; the last one unless `logits` is an array.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*rows]`, float32 or wider; -inf for a rejected token, 0 for a row without entries. Differentiable; the
      thresholds of truncations are constants to the gradient.

    Raises:
      TypeError: tokens that are not integers, logits that are not floating.
      ValueError: shapes that do not fit.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import log_prob, top_k
      >>> print(np.asarray(log_prob(top_k(2)(jnp.array([[1.0, 2.0, -1.0, 0.5]])), jnp.array([1]))).round(4))
      [-0.3133]
    """
    rows = as_rows(logits, axis=axis, where=where)
    check_ids("tokens", tokens, rows.logits, len(rows.rows))
    return -rows.reduce(reductions.label_statistics(tokens)).nll


def _gumbel(rows: TransformedLogits, key: Array, greedy: Any, row_numbers: Any) -> Map:
    """The map that adds Gumbel noise to the rows that are not greedy."""
    shape = rows.rows
    if isinstance(greedy, bool):
        greedy = jnp.full((), greedy)
    _checks.boolean("greedy", greedy)
    _checks.broadcastable("greedy", greedy, shape, "one boolean per row of logits")
    if row_numbers is None:
        row_numbers = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    _checks.integers("row_numbers", row_numbers)
    _checks.shape("row_numbers", row_numbers, shape, "one number per row of logits")
    words = [jnp.broadcast_to(word, shape) for word in key_words(key)]
    row_words = two_words((words[0], words[1]), row_numbers)
    temperature = jnp.broadcast_to(jnp.where(greedy, 0, 1).astype(rows.dtype), shape)
    return Map(_with_noise, (*row_words, temperature), direct=True)


def _noise(cols: Array, row0: Array, row1: Array, temperature: Array) -> Array:
    col_words = two_words((jnp.uint32(_COLUMNS), jnp.uint32(_COLUMNS + 1)), cols)
    bits = mixed_bits((row0, row1), col_words)
    u = ((bits >> 9).astype(jnp.int32).astype(temperature.dtype) + 0.5) * 2.0**-23  # strictly between 0 and 1
    return -jnp.log(-jnp.log(u)) * temperature


def _with_noise(x: Array, cols: Array, *noise: Array) -> Array:
    return x + _noise(cols, *noise)
