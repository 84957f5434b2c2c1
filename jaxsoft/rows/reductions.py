"""Row reductions: the statistics of a row.

Each factory returns a `RowReduction`; `reduce_rows` runs any mix of them in one pass. A row without entries gives the
value that each description names.

For `linear_logits` without `softcap`, and with a mask that does not vary over rows and columns at once, `sum`, `mean`
and `weighted_sum` of `[columns]` weights are computed without the logits, by one product with the summed columns of
the weight; so is `moments`, if there are at least as many rows as features.

Example:
  >>> import jax.numpy as jnp
  >>> from jaxsoft.rows import reduce_rows, reductions
  >>> x = jnp.array([[1.0, 2.0, -1.0, 0.5]])
  >>> wanted = {"moments": reductions.softmax_moments(), "best": reductions.top_k(2), "mean": reductions.mean()}
  >>> out = reduce_rows(x, wanted)
  >>> print(out["moments"].entropy.round(4), out["best"].indices, out["mean"])
  [1.0144] [[1 0]] [0.625]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft import _checks
from jaxsoft._numerics import as_ids, finite_gauge, log_or_neg_inf, safe_divide
from jaxsoft.rows._gauge import exponentials, keep_gauge, rescale, running_max
from jaxsoft.rows._reduction import RowReduction, Tile

# In the comments x is a row of scores, p its softmax, and sums run over the entries that are present. No reduction
# defines a derivative: it follows from `update` (see `RowReduction`).

# ---------------------------------------------------------------------------------------------------------
# The exponential family: states (m, *sums) as in `_gauge`.

# logsumexp, running maximum: (m, s = sum e^(x-m)); log-sum-exp = m + log s.


def _lse_init(like, *args):
    return jnp.full_like(like, -jnp.inf), like


def _lse_update(state, tile, *args):
    m, s = state
    m_new = running_max(m, tile)
    return m_new, s * rescale(m, m_new) + jnp.sum(exponentials(tile, m_new), axis=-1)


def _lse_merge(a, b, *args):
    m = jnp.maximum(a[0], b[0])
    return m, a[1] * rescale(a[0], m) + b[1] * rescale(b[0], m)


class LogPartition(NamedTuple):
    """A log-sum-exp in parts, each `[*rows]`: `(shift + correction) + log_sum`.

    `((x - shift) - correction) - log_sum` is the log-softmax, accurate to the last place for scores of any size;
    subtracting the rounded sum of the parts is not. Only `log_sum` has a derivative.
    """

    shift: jax.Array
    correction: jax.Array
    log_sum: jax.Array

    @property
    def value(self) -> jax.Array:
        """The log-sum-exp."""
        return self.shift + (self.correction + self.log_sum)

    def along(self, axis: int = -1) -> LogPartition:
        """The parts with an axis of length 1, as scores `[*rows, columns]` need it."""
        return LogPartition(*(jnp.expand_dims(part, axis) for part in self))

    def log_softmax(self, x: jax.Array) -> jax.Array:
        """`x - logsumexp`, for scores `x` that broadcast with the parts; `x` itself for an empty row."""
        return ((x - self.shift) - self.correction) - jnp.where(self.log_sum == -jnp.inf, 0, self.log_sum)


def partition_of(state, *args) -> LogPartition:
    """The `LogPartition` of a state `(m, s = sum e^(x-m))`."""
    m, s = state
    shift = finite_gauge(m)
    return LogPartition(shift, jnp.zeros_like(shift), log_or_neg_inf(s))


def _lse_finalize(state, *args):
    return partition_of(state, *args).value


# logsumexp, mantissa and exponent (the two-pass softmax algorithm): e^x = a 2^e with an integer e, stored as a
# float; the state (E, A) stands for A 2^E. No maximum is needed, and rescaling by powers of two is exact.

_LN2_HI = 0.693359375  # ln 2 in 9 bits: e * _LN2_HI is exact for |e| < 2^15, also in float32
_LN2_LO = -2.121944400546905827679e-4  # ln 2 - _LN2_HI
_LOG2_E = 1.4426950408889634


def _exponent_of(x: jax.Array) -> jax.Array:
    return lax.stop_gradient(jnp.round(x * _LOG2_E))


def _pow2(e: jax.Array) -> jax.Array:
    """`2^e` for an integer-valued `e <= 0` (0 below the smallest normal exponent, and for e = -inf)."""
    return jnp.where(e < -126, 0, jnp.exp2(jnp.where(e < -126, 0, e)))


def _exponent_update(state, tile, *args):
    e_old, a_old = state
    e = jnp.where(tile.keep, _exponent_of(tile.x), -jnp.inf)
    e_new = e_old if tile.finished else jnp.maximum(e_old, jnp.max(e, axis=-1, initial=-jnp.inf))
    e_safe = finite_gauge(e)
    mantissa = jnp.exp((tile.x - e_safe * _LN2_HI) - e_safe * _LN2_LO)
    scaled = jnp.where(tile.keep, mantissa * _pow2(e_safe - finite_gauge(e_new)[..., None]), 0)
    return lax.stop_gradient(e_new), a_old * _pow2_or_zero(e_old, e_new) + jnp.sum(scaled, axis=-1)


def _pow2_or_zero(e_old, e_new):
    return jnp.where(e_old == -jnp.inf, 0, _pow2(finite_gauge(e_old) - finite_gauge(e_new)))


def _exponent_merge(a, b, *args):
    e = jnp.maximum(a[0], b[0])
    return e, a[1] * _pow2_or_zero(a[0], e) + b[1] * _pow2_or_zero(b[0], e)


def _exponent_parts(state, *args):
    e, a = state
    e = finite_gauge(e)
    return LogPartition(e * _LN2_HI, e * _LN2_LO, log_or_neg_inf(a))


def _exponent_finalize(state, *args):
    return _exponent_parts(state, *args).value


# logsumexp at a fixed reference phi (FlashDecoding++): (hi, s = sum e^(x-phi)); parts add up without
# rescaling. `hi` is the running maximum, which only decides whether the result can be trusted.


def _reference_init(like, reference):
    return jnp.full_like(like, -jnp.inf), like


def _reference_update(state, tile, reference):
    hi, s = state
    # Clamps only where the sum is discarded anyway: an infinite term would turn a zero cotangent into NaN.
    terms = jnp.exp(jnp.minimum(tile.scores - lax.stop_gradient(reference)[..., None], 80))
    return running_max(hi, tile), s + jnp.sum(terms, axis=-1)


def _reference_merge(a, b, *args):
    return jnp.maximum(a[0], b[0]), a[1] + b[1]


# The safe range of (row maximum - reference) in float32: a million terms of e^66 add up to e^80, which is
# finite, and a largest term of e^-80 is far from underflow.
_REFERENCE_RANGE = (-80.0, 66.0)


def _reference_parts(state, reference):
    hi, s = state
    lo_ok, hi_ok = _REFERENCE_RANGE
    offset = finite_gauge(hi) - reference
    empty = hi == -jnp.inf
    ok = ((offset > lo_ok) & (offset < hi_ok)) | empty
    shift = jnp.where(empty, 0, lax.stop_gradient(reference))
    return LogPartition(shift, jnp.zeros_like(shift), jnp.where(ok, log_or_neg_inf(s), jnp.nan))


def _reference_finalize(state, reference):
    return _reference_parts(state, reference).value


def logsumexp(*, method: str = "online", reference: jax.Array | None = None) -> RowReduction:
    """`log sum_j e^(x_j)`, -inf for an empty row.

    Args:
      method: how overflow of the sum is avoided.
        `"online"`: a running maximum; the sum is rescaled when it grows (Milakov and Gimelshein, "Online
        normalizer calculation for softmax").
        `"exponent"`: mantissa and integer exponent of every term, no maximum; rescaling is exact (Dukhan and
        Ablavatski, "The Two-Pass Softmax Algorithm").
        `"reference"`: a fixed `reference`, no rescaling (Hong et al., "FlashDecoding++"); rows whose
        maximum is not within (-80, 66) of it give NaN, which `unified_max_softmax` replaces.
      reference: `[*rows]`, for `method="reference"`.

    Returns:
      A reduction to `[*rows]`.
    """
    partition = log_partition(method=method, reference=reference)
    finalize = {"online": _lse_finalize, "exponent": _exponent_finalize, "reference": _reference_finalize}
    return partition._replace(finalize=finalize[method])


def log_partition(*, method: str = "online", reference: jax.Array | None = None) -> RowReduction:
    """`logsumexp` in parts, which avoid its rounding error: see `LogPartition`. Same arguments."""
    _checks.option("method", method, ("online", "exponent", "reference"))
    if (reference is not None) != (method == "reference"):
        raise ValueError(
            f"reference must be given with method='reference' and only then, got method={method!r}"
        )
    if method == "online":
        return RowReduction(_lse_init, _lse_update, _lse_merge, partition_of, keep_gauge)
    if method == "exponent":
        return RowReduction(_lse_init, _exponent_update, _exponent_merge, _exponent_parts, keep_gauge)
    return RowReduction(
        _reference_init, _reference_update, _reference_merge, _reference_parts, keep_gauge, args=(reference,)
    )


# weighted log-sum-exp: log sum_j b_j e^(x_j), b >= 0. The maximum is taken over the entries with b > 0. The
# others only matter for the gradient of their b, e^(x - m), which is capped where it would overflow.


def _weighted_lse_update(state, tile, *args):
    m, s = state
    b = (tile.col_args or tile.entry_args)[0].astype(tile.x.dtype)
    m_new = running_max(m, tile.with_scores(jnp.where(b > 0, tile.scores, -jnp.inf)))
    terms = jnp.exp(jnp.minimum(tile.scores - finite_gauge(m_new)[..., None], 80))
    return m_new, s * rescale(m, m_new) + jnp.sum(b * terms, axis=-1)


def weighted_logsumexp(weights: jax.Array) -> RowReduction:
    """`log sum_j b_j e^(x_j)` for `weights` b >= 0: `[columns]`, or `[*rows, columns]`."""
    return weighted_log_partition(weights)._replace(finalize=_lse_finalize)


def weighted_log_partition(weights: jax.Array) -> RowReduction:
    """`weighted_logsumexp` in parts: see `LogPartition`."""
    reduction = RowReduction(_lse_init, _weighted_lse_update, _lse_merge, partition_of, keep_gauge)
    if weights.ndim == 1:
        return reduction._replace(col_args=(weights,))
    return reduction._replace(entry_args=(weights,))


# log-sum-exp over the columns that are not excluded.


def _excluding_update(state, tile, ids):
    named = functools.reduce(
        jnp.logical_or, (tile.cols == ids[..., j, None] for j in range(ids.shape[-1])), False
    )
    return _lse_update(state, tile.with_scores(jnp.where(named, -jnp.inf, tile.scores)))


def log_partition_excluding(ids: jax.Array) -> RowReduction:
    """`log sum e^(x_j)`, in parts, over the columns not among `ids` (`[*rows, k]`; one out of range has no effect)."""
    return RowReduction(
        _lse_init, _excluding_update, _lse_merge, partition_of, keep_gauge, args=(as_ids(ids),)
    )


# Moments of the scores under their own softmax: (m, S, U, Q) with w = e^(x-m), S = sum w, U = sum w (x-m),
# Q = sum w (x-m)^2. A new gauge m' = m - D turns them into S, U + D S, Q + 2 D U + D^2 S (times e^D).


class SoftmaxMoments(NamedTuple):
    """Statistics of the scores under `p = softmax(scores)`, each `[*rows]`.

    Attributes:
      logsumexp: the log-partition function; -inf for an empty row.
      mean: the expected score `sum p x`; 0 for an empty row.
      entropy: `-sum p log p` in nats; 0 for an empty row.
      variance: `sum p (x - mean)^2`, of the scores under p; 0 for an empty row; None if not asked for.
    """

    logsumexp: jax.Array
    mean: jax.Array
    entropy: jax.Array
    variance: Any


def _moments_init(like, *args):
    return jnp.full_like(like, -jnp.inf), like, like, like


def _entropy_init(like, *args):
    return _moments_init(like)[:3]


def _moments_shift(state, m_new):
    m, s, u, *rest = state
    c = rescale(m, m_new)
    d = jnp.where(m == -jnp.inf, 0, finite_gauge(m) - finite_gauge(m_new))
    return c * s, c * (u + d * s), *(c * (q + 2 * d * u + d * d * s) for q in rest)


def _moments_update(state, tile, *args):
    m_new = running_max(state[0], tile)
    w = exponentials(tile, m_new)
    # Finite where w is 0. A maximum rather than a select, because XLA's CPU reductions fuse it.
    y = jnp.maximum(tile.scores - finite_gauge(m_new)[..., None], -1e3)
    s, *higher = _moments_shift(state, m_new)
    powers = (y, y * y)
    return (
        m_new,
        s + jnp.sum(w, axis=-1),
        *(u + tile.dot(w, p) for u, p in zip(higher, powers)),
    )


def _moments_merge(a, b, *args):
    m = jnp.maximum(a[0], b[0])
    return (m, *map(jnp.add, _moments_shift(a, m), _moments_shift(b, m)))


def _moments_finalize(state, *args):
    m, s, u, *rest = state
    mean = safe_divide(u, s)
    log_s = log_or_neg_inf(s)
    return SoftmaxMoments(
        logsumexp=finite_gauge(m) + log_s,
        mean=mean + jnp.where(s != 0, finite_gauge(m), 0),
        entropy=jnp.where(s != 0, jnp.where(s != 0, log_s, 0) - mean, 0),
        variance=safe_divide(rest[0], s) - mean * mean if rest else None,
    )


def softmax_moments(*, variance: bool = True) -> RowReduction:
    """Log-sum-exp, expected score, entropy and variance under softmax, in one state: see `SoftmaxMoments`."""
    init = _moments_init if variance else _entropy_init
    return RowReduction(init, _moments_update, _moments_merge, _moments_finalize, keep_gauge)


# Sum of squared probabilities: (m, sum w, sum w^2).


def _squares_init(like):
    return jnp.full_like(like, -jnp.inf), like, like


def _squares_update(state, tile):
    m, s, s2 = state
    m_new = running_max(m, tile)
    c, w = rescale(m, m_new), exponentials(tile, m_new)
    return m_new, s * c + jnp.sum(w, axis=-1), s2 * c * c + jnp.sum(w * w, axis=-1)


def _squares_merge(a, b, *args):
    m = jnp.maximum(a[0], b[0])
    ca, cb = rescale(a[0], m), rescale(b[0], m)
    return m, a[1] * ca + b[1] * cb, a[2] * ca * ca + b[2] * cb * cb


def _squares_finalize(state):
    _, s, s2 = state
    return safe_divide(s2, s * s)


def sum_of_squared_probabilities() -> RowReduction:
    """`sum_j p_j^2` under softmax (1 - Gini impurity); 0 for an empty row."""
    return RowReduction(_squares_init, _squares_update, _squares_merge, _squares_finalize, keep_gauge)


# Sum of powers of probabilities: (m, sum w, sum w^q) with w = e^(x-m).


def _powers_init(like, q):
    return jnp.full_like(like, -jnp.inf), like, like


def _powers_update(state, tile, q):
    m, s, powers = state
    m_new = running_max(m, tile)
    c = rescale(m, m_new)
    y = jnp.where(tile.keep, tile.x - jnp.where(tile.keep, m_new[..., None], 0), 0)
    return (
        m_new,
        s * c + jnp.sum(exponentials(tile, m_new), axis=-1),
        powers * c**q + tile.sum(jnp.exp(q[..., None] * y)),
    )


def _powers_merge(a, b, q):
    m = jnp.maximum(a[0], b[0])
    ca, cb = rescale(a[0], m), rescale(b[0], m)
    return m, a[1] * ca + b[1] * cb, a[2] * ca**q + b[2] * cb**q


def _powers_finalize(state, q):
    _, s, powers = state
    return powers / jnp.where(s > 0, s, 1) ** q


def sum_of_powered_probabilities(power: jax.Array) -> RowReduction:
    """`sum_j p_j^power` under softmax for positive powers `[*rows]`; 0 for an empty row."""
    return RowReduction(
        _powers_init, _powers_update, _powers_merge, _powers_finalize, keep_gauge, args=(power,)
    )


# ---------------------------------------------------------------------------------------------------------
# Entries picked by index. The state is (value, status), with status 0 for a row not read, 1 for an id in range and 2
# for an id out of range. The last reads column 0, and `finalize` multiplies it by NaN, so that its gradient is NaN too.


def _take_init(like, ids):
    shape = (*like.shape, *ids.shape[like.ndim :])
    value = jnp.broadcast_to(jnp.expand_dims(like, tuple(range(like.ndim, len(shape)))), shape)
    return value, jnp.zeros_like(value, dtype=jnp.int32)


def _in_range(tile, ids):
    valid = (ids >= 0) & (ids < tile.columns)
    return valid, jnp.where(valid, ids, 0)


def _picked(tile, ids):
    """The scores at `ids`; with one id per row, the gradient has no scatter."""
    return (tile.at_by_comparison if ids.ndim < tile.x.ndim else tile.at)(tile.x, ids)


def _take_update(state, tile, ids):
    valid, ids = _in_range(tile, ids)
    return state[0] + tile.at(tile.scores, ids), jnp.where(valid, jnp.int32(1), jnp.int32(2))


def _take_share(state, tile, ids):
    _, ids = _in_range(tile, ids)
    return [_picked(tile, ids)]


def _take_merge(a, b, *args):
    return a[0] + b[0], jnp.maximum(a[1], b[1])


def _poison(status, dtype):
    return jnp.where(status == 2, jnp.nan, 1).astype(dtype)


def _take_finalize(state, ids):
    value, status = state
    return jnp.where(status == 0, -jnp.inf, value) * _poison(status, value.dtype)


def take(ids: jax.Array) -> RowReduction:
    """The scores at `ids`: `[*rows]` (one per row) or `[*rows, k]`.

    An absent entry gives -inf. An id outside the row gives NaN, in value and in gradient.
    """
    return RowReduction(
        _take_init, _take_update, _take_merge, _take_finalize, share=_take_share, args=(as_ids(ids),)
    )


class LabelStatistics(NamedTuple):
    """The statistics of a labelled row that softmax losses need, each `[*rows]`.

    Attributes:
      nll: `-log softmax(x)[label]`, evaluated as `(m - x[label]) + log sum e^(x-m)`, which is exact for scores
        of any size; `+inf` where the label is absent; 0 for an empty row.
      partition: the log-partition function, in parts.
    """

    nll: jax.Array
    partition: LogPartition

    @property
    def logsumexp(self) -> jax.Array:
        """The log-partition function; -inf for an empty row."""
        return self.partition.value

    @property
    def present(self) -> jax.Array:
        """Whether the row has entries."""
        return self.partition.log_sum != -jnp.inf


def _label_init(like, ids):
    return _lse_init(like), _take_init(like, ids)


def _label_update(state, tile, ids):
    return _lse_update(state[0], tile), _take_update(state[1], tile, ids)


def _label_merge(a, b, *args):
    return _lse_merge(a[0], b[0]), _take_merge(a[1], b[1])


def _label_finalize(state, ids):
    partition = partition_of(state[0])
    value, status = state[1]
    absent = value == -jnp.inf
    nll = -partition.log_softmax(jnp.where(absent, partition.shift, value))
    return LabelStatistics(_nll(nll, absent, partition) * _poison(status, nll.dtype), partition)


def _nll(nll, absent, partition):
    return jnp.where(partition.log_sum == -jnp.inf, 0, jnp.where(absent, jnp.inf, nll))


def _label_share(state, tile, ids):
    m, s = _lse_update(keep_gauge(state[0]), tile)
    return [m, s, *_take_share(state[1], tile, ids)]


def label_statistics(ids: jax.Array) -> RowReduction:
    """The negative log-probability of one label per row, with the log-sum-exp: see `LabelStatistics`.

    A label outside the row gives NaN, in value and in gradient.
    """
    return RowReduction(
        _label_init, _label_update, _label_merge, _label_finalize, share=_label_share, args=(as_ids(ids),)
    )


# The same for a distribution q over the columns: (m, S, U = sum q (x-m), Q = sum q, lost), where `lost` is the
# mass that q puts on absent entries.


def _soft_init(like):
    return jnp.full_like(like, -jnp.inf), like, like, like, like


def _soft_shift(state, m_new):
    m, s, u, q, lost = state
    d = jnp.where(m == -jnp.inf, 0, finite_gauge(m) - finite_gauge(m_new))
    return s * rescale(m, m_new), u + d * q, q, lost


def _soft_update(state, tile):
    q = tile.entry_args[0].astype(tile.x.dtype)
    m_new = running_max(state[0], tile)
    kept = jnp.where(tile.keep, q, 0)
    block = (
        jnp.sum(exponentials(tile, m_new), axis=-1),
        jnp.sum(kept * (tile.x - finite_gauge(m_new)[..., None]), axis=-1),
        jnp.sum(kept, axis=-1),
        jnp.sum(jnp.where(tile.keep, 0, lax.stop_gradient(q)), axis=-1),
    )
    return (m_new, *map(jnp.add, _soft_shift(state, m_new), block))


def _soft_merge(a, b, *args):
    m = jnp.maximum(a[0], b[0])
    return (m, *map(jnp.add, _soft_shift(a, m), _soft_shift(b, m)))


def _soft_finalize(state):
    m, s, u, q, lost = state
    partition = partition_of((m, s))
    nll = q * jnp.where(s == 0, 0, partition.log_sum) - u
    return LabelStatistics(_nll(nll, lost > 0, partition), partition)


def soft_label_statistics(labels: jax.Array) -> RowReduction:
    """`-sum_j q_j log softmax(x)_j` for label distributions q (`[*rows, columns]`), with the log-sum-exp.

    See `LabelStatistics`; `+inf` where q puts mass on an absent entry.
    """
    return RowReduction(
        _soft_init, _soft_update, _soft_merge, _soft_finalize, keep_gauge, entry_args=(labels,)
    )


# Two rows of scores, a and b, with the softmaxes p and q: (m, S, U = sum w (a-m), n, Z = sum e^(b-n),
# V = sum w (b-n), lost) with w = e^(a-m). A new gauge n adds (n_old - n_new) S to V. `lost` counts the entries that
# are absent from b alone; V leaves them out.


class RelativeEntropy(NamedTuple):
    """How the softmax p of one row of scores differs from the softmax q of another, each `[*rows]`.

    Attributes:
      divergence: `KL(p || q) = sum p log(p / q)`; +inf, with gradient 0, where q lacks an entry of p; 0 where either
        row is empty.
      cross_entropy: `-sum p log q`, with the same limits.
      partition: the log-partition function of p's scores, in parts.
      other_partition: the same for q's scores.
    """

    divergence: jax.Array
    cross_entropy: jax.Array
    partition: LogPartition
    other_partition: LogPartition


def _pair_init(like):
    low = jnp.full_like(like, -jnp.inf)
    return low, like, like, low, like, like, jnp.zeros_like(like, dtype=jnp.int32)


def _pair_shift(state, m_new, n_new):
    m, s, u, n, z, v, lost = state
    c = rescale(m, m_new)
    d, e = (
        jnp.where(m == -jnp.inf, 0, finite_gauge(a) - finite_gauge(b)) for a, b in ((m, m_new), (n, n_new))
    )
    return c * s, c * (u + d * s), z * rescale(n, n_new), c * (v + e * s), lost


def _pair_update(state, tile, swapped):
    a, b = (tile.second_row(), tile) if swapped else (tile, tile.second_row())
    m, n = running_max(state[0], a), running_max(state[3], b)
    w = exponentials(a, m)
    ya, yb = (jnp.where(t.keep, t.x - finite_gauge(g)[..., None], 0) for t, g in ((a, m), (b, n)))
    s, u, z, v, lost = _pair_shift(state, m, n)
    return (
        m,
        s + jnp.sum(w, axis=-1),
        u + tile.dot(w, ya),
        n,
        z + jnp.sum(exponentials(b, n), axis=-1),
        v + tile.dot(w, yb),
        lost + jnp.sum(a.keep & ~b.keep, axis=-1, dtype=lost.dtype),
    )


def _update_under_scores(state, tile):
    return _pair_update(state, tile, False)


def _update_under_other(state, tile):
    return _pair_update(state, tile, True)


def _pair_merge(a, b):
    m, n = jnp.maximum(a[0], b[0]), jnp.maximum(a[3], b[3])
    s, u, z, v, lost = map(jnp.add, _pair_shift(a, m, n), _pair_shift(b, m, n))
    return m, s, u, n, z, v, lost


def _pair_neutral(state):
    zeros = [jnp.zeros_like(a) for a in state]
    return state[0], *zeros[1:3], state[3], *zeros[4:]


def _pair_finalize(state):
    m, s, u, n, z, v, lost = state
    p, q = partition_of((m, s)), partition_of((n, z))
    both = (s != 0) & (z != 0)
    log_s, log_z = (jnp.where(both, a.log_sum, 0) for a in (p, q))
    cross = log_z - safe_divide(v, s)
    divergence = cross - (log_s - safe_divide(u, s))

    def limits(a):
        return jnp.where(both, jnp.where(lost > 0, jnp.inf, a), 0)

    return RelativeEntropy(limits(divergence), limits(cross), p, q)


def relative_entropy(other: Any, *, reverse: bool = False) -> RowReduction:
    """`KL(softmax(scores) || softmax(other))`, or `KL(softmax(other) || softmax(scores))` with `reverse`.

    See `RelativeEntropy`. `other` is `[*rows, columns]`, an array or `linear_logits`. An entry of -inf in one row has
    probability 0 there, and the other row keeps it; a masked entry is absent from both.
    """
    update = _update_under_other if reverse else _update_under_scores
    return RowReduction(_pair_init, update, _pair_merge, _pair_finalize, _pair_neutral, entry_args=(other,))


# Selections. The state is (value, column), larger values first, ties to the smaller column. The derivative is that
# of the selected entries.


def _selection_share(state, tile, *args):
    index = state[1]  # -1 (nothing selected) lies in no block
    return [_picked(tile, index)]


def _max_init(like, *args):
    return jnp.full_like(like, -jnp.inf), jnp.full_like(like, -1, dtype=jnp.int32)


def _max_update(state, tile, *args):
    value, index = state
    x = tile.scores
    best = jnp.max(x, axis=-1)
    # The first column that holds the maximum (NaN wins, as in jnp.max). Comparing twice is cheaper than argmax.
    is_best = (x == best[..., None]) | jnp.isnan(x)
    first = jnp.min(jnp.where(is_best, tile.cols, tile.columns), axis=-1)
    better = (best > value) | (jnp.isnan(best) & ~jnp.isnan(value))
    return jnp.where(better, best, value), jnp.where(better, first.astype(jnp.int32), index)


def _max_merge(a, b, *args):
    better = (
        (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]) & (b[1] >= 0)) | (jnp.isnan(b[0]) & ~jnp.isnan(a[0]))
    )
    return jax.tree.map(lambda x, y: jnp.where(better, y, x), a, b)


def _first(state, *args):
    return state[0]


def _second(state, *args):
    return state[1]


_MAX = RowReduction(_max_init, _max_update, _max_merge, _first, share=_selection_share)


def maximum() -> RowReduction:
    """The largest score; its whole gradient goes to the first column that holds it. -inf for an empty row."""
    return _MAX


def argmax() -> RowReduction:
    """The column of the largest score (int32), the first one among equals; -1 for an empty row."""
    return _MAX._replace(finalize=_second)


def maximum_and_argmax() -> RowReduction:
    """The pair of `maximum` and `argmax`."""
    return _MAX._replace(finalize=tuple)


def _below_init(like, *args):
    return _max_init(like)


def _below_update(state, tile, bound, exclude):
    below = (tile.scores < bound[..., None]) & (tile.cols != exclude[..., None])
    return _max_update(state, tile.with_scores(jnp.where(below, tile.scores, -jnp.inf)))


def maximum_below(bound: jax.Array, exclude: jax.Array) -> RowReduction:
    """The largest score strictly below `bound` in a column other than `exclude` (both `[*rows]`), else -inf."""
    return RowReduction(
        _below_init,
        _below_update,
        _max_merge,
        _first,
        share=_selection_share,
        args=(lax.stop_gradient(bound), as_ids(exclude)),
    )


class TopK(NamedTuple):
    """The k largest scores of each row, largest first, and their columns.

    Attributes:
      values: `[*rows, k]`; -inf where the row has fewer than k entries.
      indices: `[*rows, k]` int32; -1 where the row has fewer than k entries.
    """

    values: jax.Array
    indices: jax.Array


def _best_k(values, indices, k):
    """The k best of candidates in column order (`lax.top_k` prefers the earlier of two equals)."""
    best, at = lax.top_k(values, k)
    index = jnp.take_along_axis(indices, at, axis=-1)
    return best, jnp.where(best == -jnp.inf, -1, index)


def _best_k_by_rounds(state, tile, k):
    """The k best of a state and a tile, by k rounds of a maximum; the state's columns are lower than the tile's."""
    none = jnp.iinfo(jnp.int32).max
    kept = [(state[0][..., i], state[1][..., i]) for i in range(k)]
    x, best = tile.scores, []
    for _ in range(k):
        # Compares the first remaining entry of the state with the best remaining entry of the tile.
        value, index = kept[0]
        top = jnp.max(x, axis=-1)
        is_top = (x == top[..., None]) | jnp.isnan(x)  # NaN is the largest, as in lax.top_k
        at = jnp.min(jnp.where(is_top, tile.cols, none), axis=-1)
        stays = (value >= top) | jnp.isnan(value)
        best.append(
            (jnp.where(stays, value, top), jnp.where(stays, index, jnp.where(top == -jnp.inf, -1, at)))
        )
        shifted = [*kept[1:], (jnp.full_like(value, -jnp.inf), jnp.full_like(index, -1))]
        kept = [
            (jnp.where(stays, v2, v1), jnp.where(stays, i2, i1)) for (v1, i1), (v2, i2) in zip(kept, shifted)
        ]
        x = jnp.where(~stays[..., None] & (tile.cols == at[..., None]), -jnp.inf, x)
    return tuple(jnp.stack(part, axis=-1) for part in zip(*best))


def _top_k_merge(a, b, *args):
    values = jnp.concatenate([a[0], b[0]], axis=-1)
    indices = jnp.concatenate([a[1], b[1]], axis=-1)
    _, index, value = lax.sort(
        (-values, jnp.where(indices < 0, jnp.iinfo(jnp.int32).max, indices), values), num_keys=2
    )
    k = a[0].shape[-1]
    value, index = value[..., :k], index[..., :k]
    return value, jnp.where(value == -jnp.inf, -1, index)


@dataclasses.dataclass(frozen=True)
class _TopKInit:
    """`init` for k entries; a class, so that it equals another one for this k, and can be pickled."""

    k: int

    def __call__(self, like):
        value = jnp.broadcast_to(jnp.full_like(like, -jnp.inf)[..., None], (*like.shape, self.k))
        return value, jnp.full_like(value, -1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class _TopKUpdate:
    """`update` for k entries."""

    k: int

    def __call__(self, state, tile):
        k, x = self.k, tile.scores
        if tile.in_kernel:
            return _best_k_by_rounds(state, tile, k)
        cols = jnp.broadcast_to(tile.cols, x.shape)
        if k < x.shape[-1]:
            x, cols = _best_k(x, cols, k)
        return _best_k(jnp.concatenate([state[0], x], axis=-1), jnp.concatenate([state[1], cols], axis=-1), k)


def _top_k_finalize(state):
    return TopK(*state)


def top_k(k: int) -> RowReduction:
    """The k largest scores with their columns, see `TopK`; ties go to the smaller column."""
    k = _checks.integer("k", k, at_least=1)
    return RowReduction(_TopKInit(k), _TopKUpdate(k), _top_k_merge, _top_k_finalize, share=_selection_share)


# ---------------------------------------------------------------------------------------------------------
# Plain sums over the entries.


def _count_init(like, *args):
    return like


def _count_update(state, tile, *args):
    return state + jnp.sum(tile.keep, axis=-1, dtype=state.dtype)


def count() -> RowReduction:
    """The number of present entries, in the accumulation dtype."""
    return RowReduction(_count_init, _count_update)


def _sum_init(like):
    return like, like


def _sum_update(state, tile):
    return state[0] + jnp.sum(tile.x, axis=-1), _count_update(state[1], tile)


def _sum_closed_form(reduction, logits, col_keep, row_keep):
    """`sum_j x_j = hidden . sum_j w_j`: its gradient is an outer product, not a `[rows, columns]` array."""
    weights = reduction.col_args[0] if reduction.col_args else jnp.ones(col_keep.shape)
    weights = jnp.where(col_keep, weights, 0).astype(logits._accumulation_dtype)
    total, n = logits._column_sums(weights, col_keep)
    return jnp.where(row_keep, total, 0), jnp.where(row_keep, n, 0)


def _mean_finalize(state):
    return safe_divide(*state)


_SUM = RowReduction(_sum_init, _sum_update, finalize=_first, closed_form=_sum_closed_form)


def sum() -> RowReduction:
    """The sum of the scores; 0 for an empty row."""
    return _SUM


def mean() -> RowReduction:
    """The mean of the scores; 0 for an empty row."""
    return _SUM._replace(finalize=_mean_finalize)


def _weighted_sum_update(state, tile):
    weights = jnp.where(tile.keep, (tile.col_args or tile.entry_args)[0].astype(tile.x.dtype), 0)
    return state[0] + jnp.sum(weights * tile.x, axis=-1), state[1] + jnp.sum(weights, axis=-1)


def weighted_sum(weights: jax.Array) -> RowReduction:
    """The pair `sum_j q_j x_j`, `sum_j q_j` for weights q: `[columns]`, or `[*rows, columns]`.

    Absent entries count in neither sum.
    """
    if weights.ndim == 1:
        return RowReduction(
            _sum_init, _weighted_sum_update, finalize=tuple, closed_form=_sum_closed_form, col_args=(weights,)
        )
    return RowReduction(_sum_init, _weighted_sum_update, finalize=tuple, entry_args=(weights,))


# Moments of the scores themselves: (n, c, D1 = sum (x - c), D2 = sum (x - c)^2). The centre c is a gauge: the
# mean of the first block that has entries (NaN = not set yet), which prevents cancellation of large numbers.


class Moments(NamedTuple):
    """Statistics of the scores of a row, each `[*rows]`; 0 for an empty row.

    Attributes:
      count: the number of present entries.
      center: a number near the mean, without derivative.
      offset: the mean minus `center`.
      variance: the population variance (divisor `count`).
    """

    count: jax.Array
    center: jax.Array
    offset: jax.Array
    variance: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The mean of the scores."""
        return self.center + self.offset

    @property
    def sum_of_squares(self) -> jax.Array:
        """The sum of the squares of the scores, uncentred."""
        return self.count * (self.variance + self.mean * self.mean)

    def deviation(self, x: jax.Array) -> jax.Array:
        """`x - mean`, exact for scores of any size."""
        return (x - self.center) - self.offset


def _centred_init(like):
    return like, jnp.full_like(like, jnp.nan), like, like


def _centred_update(state, tile):
    n_old, center, d1, d2 = state
    n = jnp.sum(tile.keep, axis=-1, dtype=tile.x.dtype)
    block_mean = safe_divide(jnp.sum(tile.x, axis=-1), n)
    center = lax.stop_gradient(jnp.where(jnp.isnan(center) & (n > 0), block_mean, center))
    y = jnp.where(tile.keep, tile.x - center[..., None], 0)
    return n_old + n, center, d1 + jnp.sum(y, axis=-1), d2 + jnp.sum(y * y, axis=-1)


def _centred_merge(a, b, *args):
    center = jnp.where(jnp.isnan(a[1]), b[1], a[1])

    def about(state):
        n, c, d1, d2 = state
        shift = jnp.where(n > 0, c - center, 0)
        return n, d1 + n * shift, d2 + 2 * shift * d1 + n * shift * shift

    n, d1, d2 = map(jnp.add, about(a), about(b))
    return n, center, d1, d2


def _centred_neutral(state):
    n, center, d1, d2 = state
    return jnp.zeros_like(n), center, jnp.zeros_like(d1), jnp.zeros_like(d2)


def _centred_finalize(state):
    n, center, d1, d2 = state
    offset = safe_divide(d1, n)
    return Moments(
        count=n,
        center=jnp.where(n > 0, lax.stop_gradient(center), 0),
        offset=offset,
        variance=jnp.maximum(safe_divide(d2, n) - offset * offset, 0),
    )


def _centred_closed_form(reduction, logits, col_keep, row_keep):
    """Uses the `[d, d]` covariance of the weights; None with fewer than d rows, where that costs more."""
    del reduction
    if logits.hidden.shape[0] < logits.hidden.shape[1]:
        return None
    n, mean, centred = logits._column_moments(col_keep)
    center = lax.stop_gradient(mean)
    d1 = n * (mean - center)
    return tuple(jnp.where(row_keep, a, 0) for a in (n, center, d1, centred + n * (mean - center) ** 2))


def moments() -> RowReduction:
    """Count, mean, variance and sum of squares of the scores: see `Moments`."""
    return RowReduction(
        _centred_init,
        _centred_update,
        _centred_merge,
        _centred_finalize,
        _centred_neutral,
        closed_form=_centred_closed_form,
    )


def _count_above_init(like, threshold):
    return jnp.zeros_like(like, dtype=jnp.int32)


def _count_above_update(state, tile, threshold):
    return state + jnp.sum(tile.keep & (tile.x > threshold[..., None]), axis=-1, dtype=jnp.int32)


def count_above(threshold: jax.Array) -> RowReduction:
    """The number of scores strictly above `threshold` (`[*rows]`), as int32."""
    return RowReduction(_count_above_init, _count_above_update, args=(lax.stop_gradient(threshold),))


def _rank_init(like, ids, score):
    return jnp.zeros_like(like, dtype=jnp.int32)


def _rank_update(state, tile, ids, score):
    x, cols, ids, score = tile.x, tile.cols, ids[..., None], score[..., None]
    ahead = (x > score) | ((x == score) & (cols < ids))
    return state + jnp.sum(tile.keep & ahead & (cols != ids), axis=-1, dtype=jnp.int32)


def rank(ids: jax.Array, score: jax.Array) -> RowReduction:
    """The rank (int32, 0 = largest) of column `ids` in its row, given its `score`, both `[*rows]`.

    Equal scores are ranked by column. `label_rank` finds the score first.
    """
    return RowReduction(_rank_init, _rank_update, args=(as_ids(ids), lax.stop_gradient(score)))


# ---------------------------------------------------------------------------------------------------------
# Any elementwise function of the scores: its sum, and its log-sum-exp.


def _mapped(tile: Tile, function: Callable, args) -> jax.Array:
    row_args = [a[..., None] for a in args]
    return function(tile.x, tile.cols, *row_args, *tile.col_args, *tile.entry_args)


@dataclasses.dataclass(frozen=True)
class _MappedSumUpdate:
    """`update` of `mapped_sum`."""

    function: Callable

    def __call__(self, state, tile, *args):
        return state + tile.sum(_mapped(tile, self.function, args))


def mapped_sum(function: Callable, *args, col_args: tuple = (), entry_args: tuple = ()) -> RowReduction:
    """`sum_j f(x_j)` for an elementwise `f(x, cols, *args, *col_args, *entry_args)`.

    `f` gets a block `[*rows, block]` of scores and the column index of each; per-row `args` come as
    `[*rows, 1]`. It must be finite with a finite derivative at x = 0, the value of absent entries, and be a
    module-level or cached function: compiled programs are cached by its identity.
    """
    return RowReduction(
        _count_init,
        _MappedSumUpdate(function),
        args=args,
        col_args=tuple(col_args),
        entry_args=tuple(entry_args),
    )


@dataclasses.dataclass(frozen=True)
class _MappedLseUpdate:
    """`update` of `mapped_logsumexp`."""

    function: Callable

    def __call__(self, state, tile, *args):
        mapped = jnp.where(tile.keep, _mapped(tile, self.function, args), -jnp.inf)
        return _lse_update(state, tile.with_scores(mapped))


def mapped_logsumexp(function: Callable, *args, col_args: tuple = (), entry_args: tuple = ()) -> RowReduction:
    """`log sum_j e^(f(x_j))` for an elementwise `f`, as in `mapped_sum`; `f = -inf` drops an entry."""
    return RowReduction(
        _lse_init,
        _MappedLseUpdate(function),
        _lse_merge,
        _lse_finalize,
        keep_gauge,
        args=args,
        col_args=tuple(col_args),
        entry_args=tuple(entry_args),
    )
