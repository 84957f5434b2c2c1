"""Alignments and ordered classes.

Losses of a sequence whose alignment is hidden, summed over all alignments (transducers and hidden Markov models), and
of classes that have an order (proportional odds). The logits of a transducer's joint network,
`[batch, frames, labels + 1, vocabulary]`, may be `linear_logits`: they are then never stored.

A transducer and a left-to-right Markov model are the same recursion over a lattice of steps and states,

    a(t, s) = a(t-1, s) + stay(t-1, s)  (+)  a(t-1, s-1) + move(t-1, s-1),

in log space, where (+) adds probabilities or keeps the better path. The derivatives of its result are the
occupancies: the share of all paths that use an arc. JAX finds them by differentiating the loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, finite_gauge, log_or_neg_inf, weigh
from jaxsoft.losses._common import IGNORE_INDEX, check_weights
from jaxsoft.rows import Logits, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis, check_range

# --- the lattice -----------------------------------------------------------------------------------------


def _log_add(a: Array, b: Array) -> Array:
    """`log(e^a + e^b)`, and -inf with gradient 0 where both are -inf."""
    m = finite_gauge(jnp.maximum(a, b))
    return m + log_or_neg_inf(jnp.exp(a - m) + jnp.exp(b - m))


_PLUS = {"sum": _log_add, "max": jnp.maximum}


def _last_row(start: Array, stay: Array, move: Array, plus) -> Array:
    """`a(steps, .)`, `[*batch, states]`, from `a(0, .)` and arcs `[*batch, steps, states]`."""

    def step(a, arcs):
        stay, move = arcs
        arrived = jnp.full_like(a, -jnp.inf).at[..., 1:].set((a + move)[..., :-1])
        return plus(a + stay, arrived), None

    return lax.scan(step, start, tuple(jnp.moveaxis(arc, -2, 0) for arc in (stay, move)))[0]


def _start(like: Array) -> Array:
    """The first state with probability 1, in the shape of `like`."""
    return jnp.full_like(like, -jnp.inf).at[..., 0].set(0)


def _lengths(name: str, lengths, batch: tuple[int, ...], most: int) -> tuple[Array, Array]:
    """Checked lengths `[*batch]` (None: `most` for every example), and whether they lie in [0, most]."""
    if lengths is None:
        return jnp.full(batch, most, jnp.int32), jnp.ones(batch, bool)
    _checks.integers(name, lengths)
    _checks.shape(name, lengths, batch, "one length per example")
    lengths = as_ids(lengths)
    return lengths, (lengths >= 0) & (lengths <= most)


def _at(a: Array, index: Array) -> Array:
    return jnp.take_along_axis(a, index[..., None], axis=-1)[..., 0]


# --- transducers -----------------------------------------------------------------------------------------


def transducer_loss(
    logits: Logits,
    labels: Int[Array, "*batch labels"],
    *,
    blank: int = 0,
    input_lengths: Int[Array, "*batch"] | None = None,
    label_lengths: Int[Array, "*batch"] | None = None,
    reduction: str = "sum",
    topology: str = "rnnt",
    weights: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Transducer loss: `-log sum over alignments of prod p`, the probability of the labels given the frames.

    At frame t, after u labels, the joint network scores the next label and a blank, which moves on to the next frame.
    Only the log-probabilities of the blank and of one label per node are read, so that for `linear_logits` the array
    `[*batch, frames, labels + 1, vocabulary]` is never stored.

    Args:
      logits: `[*batch, frames, labels + 1, vocabulary]`, a floating array or `linear_logits`. Log-probabilities from
        one softmax may be passed, too: normalizing them changes nothing. (For others see `transducer_lattice_loss`.)
      labels: `[*batch, labels]` class ids. One out of range gives NaN, and an error under `checkify`.
      blank: the class id of the blank.
      input_lengths: `[*batch]`, the number of frames of each example; later frames have no effect. An example without
        frames costs 0.
      label_lengths: `[*batch]`, the number of labels of each example.
      reduction: over the alignments: `"sum"`, or `"max"` for the best one.
      topology: `"rnnt"`: any number of labels per frame, a blank ends the frame; or `"monotonic"`: a label ends it,
        too, so at most one label per frame. (CTC, in which labels may repeat, is `optax.ctc_loss`.)
      weights: `[*batch]`, multiply the losses.

    Returns:
      Losses `[*batch]`, float32 or wider; +inf, with gradient 0, if there is no alignment (for `"monotonic"`, if there
      are more labels than frames).

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown option.

    Reference:
      Graves, "Sequence Transduction with Recurrent Neural Networks"; Moritz et al., "A New Training Pipeline for
      an Improved Neural Transducer".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> t, u, v = jnp.meshgrid(jnp.arange(3), jnp.arange(3), jnp.arange(3), indexing="ij")
      >>> logits = ((7 * t + 3 * u + 5 * v) % 11) / 5 - 1
      >>> print(jaxsoft.losses.transducer_loss(logits, jnp.array([1, 2])).round(5))
      4.18543
      >>> streamed = jaxsoft.linear_logits(logits, jnp.eye(3))  # logits = hidden @ kernel, here with an identity
      >>> print(jaxsoft.losses.transducer_loss(streamed, jnp.array([1, 2])).round(5))
      4.18543
    """
    check_axis(logits, -1)
    _checks.integers("labels", labels)
    if logits.ndim < 3:
        raise ValueError(
            f"logits must have shape [*batch, frames, labels + 1, vocabulary], got shape {logits.shape}"
        )
    *batch, frames, nodes, columns = logits.shape
    _checks.shape("labels", labels, (*batch, nodes - 1), "of logits [*batch, frames, labels + 1, vocabulary]")
    blank = _checks.integer("blank", blank, at_least=0, at_most=columns - 1)
    frame, state = _nodes(frames, nodes)
    input_length, _ = _lengths("input_lengths", input_lengths, tuple(batch), frames)
    label_length, _ = _lengths("label_lengths", label_lengths, tuple(batch), nodes - 1)
    inside = (frame < input_length[..., None, None]) & (state <= label_length[..., None, None])
    spoken = jnp.arange(nodes - 1) < label_length[..., None]
    ids = jnp.where(spoken, as_ids(labels), blank)
    check_range("labels", ids, columns, None)
    ids = jnp.concatenate([ids, jnp.full((*batch, 1), blank, ids.dtype)], axis=-1)
    ids = jnp.broadcast_to(ids[..., None, :], inside.shape)
    wanted = reductions.label_statistics(ids), reductions.take(jnp.full_like(ids, blank))
    label, blank_score = reduce_rows(logits, wanted, row_where=inside)
    no_row = ~label.present
    return transducer_lattice_loss(
        jnp.where(no_row, -jnp.inf, label.partition.log_softmax(blank_score)),
        jnp.where(no_row, -jnp.inf, -label.nll)[..., :-1],
        input_lengths=input_lengths,
        label_lengths=label_lengths,
        reduction=reduction,
        topology=topology,
        weights=weights,
    )


def transducer_lattice_loss(
    blank_log_probs: Float[Array, "*batch frames nodes"],
    label_log_probs: Float[Array, "*batch frames labels"],
    *,
    input_lengths: Int[Array, "*batch"] | None = None,
    label_lengths: Int[Array, "*batch"] | None = None,
    reduction: str = "sum",
    topology: str = "rnnt",
    weights: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Transducer loss of the log-probabilities at each node: `-log sum over alignments of their product`.

    `transducer_loss` of the log-probabilities that it reads, which may come from elsewhere: if the blank has its own
    probability, say. `jaxsoft.log_prob` gathers them from logits that are never stored, as in the example. The gradient
    for a log-probability is minus the share of the alignments that use it, its occupancy.

    Args:
      blank_log_probs: `[*batch, frames, labels + 1]`, of the blank at frame t after u labels.
      label_log_probs: `[*batch, frames, labels]`, of the next label there.
      input_lengths: `[*batch]`, the number of frames of each example; later frames have no effect, even NaN.
      label_lengths: `[*batch]`, the number of labels of each example. A length out of range gives NaN.
      reduction: `"sum"` or `"max"`, as in `transducer_loss`.
      topology: `"rnnt"` or `"monotonic"`, as in `transducer_loss`.
      weights: `[*batch]`, multiply the losses.

    Returns:
      Losses `[*batch]`, float32 or wider; +inf, with gradient 0, if there is no alignment.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or an unknown option.

    Reference:
      Graves, "Sequence Transduction with Recurrent Neural Networks"; Moritz et al., "A New Training Pipeline for
      an Improved Neural Transducer".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> hidden = jnp.sin(jnp.arange(36.0)).reshape(3, 3, 4)  # frames, labels + 1, features
      >>> logits = jaxsoft.linear_logits(hidden, jnp.cos(jnp.arange(20.0)).reshape(4, 5))
      >>> blank = jaxsoft.log_prob(logits, jnp.zeros((3, 3), int))
      >>> label = jaxsoft.log_prob(logits, jnp.broadcast_to(jnp.array([2, 4, 0]), (3, 3)))
      >>> print(jaxsoft.losses.transducer_lattice_loss(blank, label[:, :-1]).round(5))
      4.4133
    """
    _checks.option("reduction", reduction, tuple(_PLUS))
    _checks.option("topology", topology, ("rnnt", "monotonic"))
    _checks.floating("blank_log_probs", blank_log_probs)
    _checks.floating("label_log_probs", label_log_probs)
    if blank_log_probs.ndim < 2 or blank_log_probs.shape[-1] < 1:
        raise ValueError(
            f"blank_log_probs must have shape [*batch, frames, labels + 1], got shape {blank_log_probs.shape}"
        )
    *batch, frames, nodes = blank_log_probs.shape
    meaning = "of blank_log_probs [*batch, frames, labels + 1]"
    _checks.shape("label_log_probs", label_log_probs, (*batch, frames, nodes - 1), meaning)
    batch = tuple(batch)
    input_length, input_ok = _lengths("input_lengths", input_lengths, batch, frames)
    label_length, label_ok = _lengths("label_lengths", label_lengths, batch, nodes - 1)
    dtype = accumulation_dtype(blank_log_probs.dtype, label_log_probs.dtype)
    check_weights(weights, batch)

    # After its last frame an alignment waits, with blanks of probability 1 and no labels. The lattice has one more
    # frame and one more label, where every alignment can wait.
    frame, state = _nodes(frames, nodes)
    heard, left = frame < input_length[..., None, None], label_length[..., None, None] - state
    blank = jnp.where(heard, jnp.where(left >= 0, blank_log_probs.astype(dtype), -jnp.inf), 0)
    label = jnp.where(heard & (left[..., :-1] > 0), label_log_probs.astype(dtype), -jnp.inf)
    label = _padded(label, -1, -jnp.inf)
    if topology == "rnnt":
        # The steps are the diagonals d = t + u: a label moves on to the next one, as a blank does.
        blank, label = _padded(blank, -2, 0.0), _padded(label, -2, -jnp.inf)
        t = jnp.arange(frames + nodes - 1)[:, None] - state
        t = jnp.where((t >= 0) & (t < frames), t, frames)
        blank, label = blank[..., t, state], label[..., t, state]
    last = _last_row(_start(jnp.zeros((*batch, nodes), dtype)), blank, label, _PLUS[reduction])
    loss = jnp.where(input_length > 0, -_at(last, jnp.clip(label_length, 0, nodes - 1)), 0)
    loss = loss * jnp.where(input_ok & label_ok, 1, jnp.nan)
    return loss if weights is None else weigh(loss, weights)


def _nodes(frames: int, nodes: int) -> tuple[Array, Array]:
    """The frame of each node, `[frames, 1]`, and the number of labels before it, `[nodes]`."""
    return jnp.arange(frames)[:, None], jnp.arange(nodes)


def _padded(a: Array, axis: int, value: float) -> Array:
    """`a` with one more entry at the end of an axis."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, 1)
    return jnp.pad(a, widths, constant_values=value)


# --- hidden Markov models --------------------------------------------------------------------------------


def hmm_log_likelihood(
    log_emissions: Float[Array, "*batch frames states"],
    move_logits: Float[Array, ...],
    *,
    end: str = "last",
    input_lengths: Int[Array, "*batch"] | None = None,
    state_lengths: Int[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Log-likelihood of a left-to-right hidden Markov model without skips, `log sum over paths of prod b q`.

    A path starts in state 0. At each frame it stays, or moves on to the next state with the probability
    `q = sigmoid(move_logits)`. Its negative, with emissions and moves from a network, trains a neural HMM.

    Args:
      log_emissions: `[*batch, frames, states]`, the log-densities of the frames in the states.
      move_logits: broadcasts to `log_emissions`: `[states]`, or `[*batch, frames, states]` if the probability of
        moving on from a state depends on the frame it is left in.
      end: where a path may end: `"last"`, in the last state; `"exit"`, by moving out of it; `"any"`, anywhere.
      input_lengths: `[*batch]`, the number of frames of each example; later frames have no effect. An example without
        frames gives 0.
      state_lengths: `[*batch]`, the number of states of each example, 1 or more. A length out of range gives NaN.

    Returns:
      `[*batch]`, float32 or wider: a log-likelihood, to be maximized; -inf, with gradient 0, if no path ends as `end`
      requires.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or an unknown option.

    Reference:
      Mehta et al., "Neural HMMs are all you need (for high-quality attention-free TTS)".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> b = jnp.array([[0.5, 0.2, 0.1], [0.3, 0.6, 0.2], [0.1, 0.5, 0.4], [0.2, 0.2, 0.7]])
      >>> q = jnp.array([0.7, 0.4, 0.9])
      >>> print(jaxsoft.losses.hmm_log_likelihood(jnp.log(b), jax.scipy.special.logit(q)).round(5))
      -3.71309
    """
    _checks.option("end", end, ("last", "exit", "any"))
    _checks.floating("log_emissions", log_emissions)
    _checks.floating("move_logits", move_logits)
    if log_emissions.ndim < 2 or 0 in log_emissions.shape[-2:]:
        raise ValueError(
            f"log_emissions must have shape [*batch, frames, states], got shape {log_emissions.shape}"
        )
    shape = log_emissions.shape
    _checks.broadcastable("move_logits", move_logits, shape, "the shape of log_emissions")
    *batch, frames, states = shape
    batch = tuple(batch)
    input_length, input_ok = _lengths("input_lengths", input_lengths, batch, frames)
    state_length, state_ok = _lengths("state_lengths", state_lengths, batch, states)
    frame, state = _nodes(frames, states)
    heard = frame < input_length[..., None, None]
    inside = heard & (state < state_length[..., None, None])
    dtype = accumulation_dtype(log_emissions.dtype, move_logits.dtype)
    emission = jnp.where(inside, log_emissions.astype(dtype), -jnp.inf)
    odds = jnp.where(inside, jnp.broadcast_to(move_logits.astype(dtype), shape), 0)
    moving, staying = jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)

    next_heard = heard[..., 1:, :]
    stay = jnp.where(next_heard, staying[..., :-1, :] + emission[..., 1:, :], 0)
    into_next = _padded(emission[..., 1:, 1:], -1, -jnp.inf)
    move = jnp.where(next_heard, moving[..., :-1, :] + into_next, -jnp.inf)
    start = _start(emission[..., 0, :]) + jnp.where(state == 0, emission[..., 0, :], 0)
    ends = _last_row(start, stay, move, _log_add)
    last = jnp.clip(state_length - 1, 0)
    if end == "any":
        m = finite_gauge(jnp.max(ends, axis=-1))
        result = m + log_or_neg_inf(jnp.sum(jnp.exp(ends - m[..., None]), axis=-1))
    else:
        result = _at(ends, last)
        if end == "exit":
            at_end = jnp.clip(input_length - 1, 0)[..., None, None]
            leaving = jnp.take_along_axis(moving, at_end, axis=-2)[..., 0, :]
            result = result + _at(leaving, last)
    result = jnp.where(input_length > 0, result, 0)
    return result * jnp.where(input_ok & state_ok & (state_length > 0), 1, jnp.nan)


# --- ordered classes -------------------------------------------------------------------------------------


def proportional_odds_loss(
    scores: Float[Array, ...],
    labels: Int[Array, "*rows"],
    thresholds: Float[Array, " thresholds"],
    *,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Negative log-likelihood of ordered classes, `-log P(y = k)` with `P(y <= k) = sigmoid(threshold_k - score)`.

    That is `-log(sigmoid(threshold_k - score) - sigmoid(threshold_{k-1} - score))`. The difference is taken in log
    space: exact for scores far from the thresholds, and for thresholds close to each other. For increasing thresholds
    from free parameters r, use `jnp.cumsum(jnp.append(r[:1], jax.nn.softplus(r[1:])))`.

    Args:
      scores: `[*rows]`, one score per example, as in proportional odds; or `[*rows, thresholds]`, one per threshold, if
        each threshold has its own slopes (`proportional_odds_penalty` keeps these close to each other).
      labels: `[*rows]` class ids from 0 to the number of thresholds. An id out of range gives NaN, in value and
        gradient, and an error under `checkify`.
      thresholds: `[classes - 1]`, increasing.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out; None: there is no such id.

    Returns:
      Losses `[*rows]`, float32 or wider; +inf, with gradient 0, if the label lies between two thresholds that are equal
      or out of order.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Faletto and Bien, "Predicting Rare Events by Shrinking Towards Proportional Odds"; McCullagh, "Regression
      Models for Ordinal Data".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> scores, thresholds = jnp.full(4, 0.3), jnp.array([-1.0, 0.5, 2.0])
      >>> print(jaxsoft.losses.proportional_odds_loss(scores, jnp.arange(4), thresholds).round(2))
      [1.54 1.09 1.22 1.87]
    """
    _checks.floating("scores", scores)
    _checks.floating("thresholds", thresholds)
    _checks.integers("labels", labels)
    if thresholds.ndim != 1 or len(thresholds) == 0:
        raise ValueError(f"thresholds must have shape [classes - 1], got shape {thresholds.shape}")
    count = len(thresholds)
    if scores.ndim != labels.ndim or scores.shape != labels.shape:
        meaning = "the labels' shape, or that with a last axis of the thresholds"
        _checks.shape("scores", scores, (*labels.shape, count), meaning)
    else:
        scores = scores[..., None]
    check_weights(weights, labels.shape)
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    check_range("labels", labels, count + 1, ignore_index)
    ids = as_ids(labels)
    keep = jnp.ones(ids.shape, bool) if ignore_index is None else ids != ignore_index
    in_range = ((ids >= 0) & (ids <= count)) | ~keep
    dtype = accumulation_dtype(scores.dtype, thresholds.dtype)
    scores = jnp.where(keep[..., None], scores.astype(dtype), 0)
    poison = jnp.where(in_range, 1, jnp.nan)
    thresholds = thresholds.astype(dtype)
    cuts = (thresholds - scores) * poison[..., None]
    # The gap below each cut, free of the rounding of the cuts (the scores add 0 to it if all thresholds share them).
    gaps = _step(thresholds) - _step(jnp.broadcast_to(scores, cuts.shape))

    # log(sigmoid(a) - sigmoid(b)) = log sigmoid(a) + log sigmoid(-b) + log(1 - e^(b - a))
    a, b = (_at(cuts, jnp.clip(k, 0, count - 1)) for k in (ids, ids - 1))
    has_upper, has_lower = ids < count, ids > 0
    log_p = jnp.where(has_upper, jax.nn.log_sigmoid(a), 0) + jnp.where(has_lower, jax.nn.log_sigmoid(-b), 0)
    gap = jnp.where(has_upper & has_lower, _at(gaps, jnp.clip(ids, 0, count - 1)), jnp.inf)
    loss = jnp.where(gap <= 0, jnp.inf, -(jnp.where(gap <= 0, 0, log_p) + _log_one_minus_exp(gap)))
    loss = jnp.where(keep, loss * poison, 0)
    return loss if weights is None else weigh(loss, weights)


def _step(a: Array) -> Array:
    """`a_k - a_(k-1)` along the last axis; 0 at its start."""
    return jnp.diff(a, axis=-1, prepend=a[..., :1])


def _log_one_minus_exp(gap: Array) -> Array:
    """`log(1 - e^-gap)` for a positive finite gap; 0 for any other."""
    some = (gap > 0) & (gap < jnp.inf)
    gap = jnp.where(some, gap, 1)
    small = gap < 0.5
    near, far = jnp.where(small, gap, 0.5), jnp.where(small, 0.5, gap)
    return jnp.where(some, jnp.where(small, jnp.log(-jnp.expm1(-near)), jnp.log1p(-jnp.exp(-far))), 0)


def proportional_odds_penalty(slopes: Float[Array, " thresholds *features"]) -> Float[Array, ""]:
    """`sum_k |slopes_{k+1} - slopes_k|_1`: pulls the slopes of neighbouring thresholds together.

    It is 0 if all thresholds share their slopes, which is proportional odds; like any fused lasso it can make most
    neighbouring slopes exactly equal.

    Args:
      slopes: `[thresholds, *features]`, the coefficients of the features for each threshold.

    Returns:
      A scalar, float32 or wider, to be multiplied with a coefficient. Its gradient is 0 at equal slopes.

    Raises:
      TypeError: slopes that are not a floating array.
      ValueError: a scalar.

    Reference:
      Faletto and Bien, "Predicting Rare Events by Shrinking Towards Proportional Odds".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.proportional_odds_penalty(jnp.array([[1.0, 2.0], [1.0, 2.5], [0.5, 2.5]])))
      1.0
    """
    _checks.floating("slopes", slopes)
    if slopes.ndim == 0:
        raise ValueError("slopes must have shape [thresholds, *features], got a scalar")
    step = jnp.diff(slopes.astype(accumulation_dtype(slopes.dtype)), axis=0)
    return jnp.sum(step * jnp.sign(step))  # |step|, with gradient 0 at 0
