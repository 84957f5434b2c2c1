"""Speculative decoding: which draft tokens stay, and when to stop drafting; switching between models by entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids
from jaxsoft.decoding._rows import TransformedLogits, as_rows
from jaxsoft.decoding.sampling import argmax, sample
from jaxsoft.normalizers import softmax
from jaxsoft.rows import Logits, reductions


class Speculation(NamedTuple):
    """The tokens of one round of speculative decoding.

    Attributes:
      tokens: `[*rows, drafts + 1]` int32: the accepted draft tokens, one more token, then -1.
      accepted: `[*rows]` int32, the number of accepted draft tokens; `accepted + 1` tokens are new.
    """

    tokens: Array
    accepted: Array


def _accepts(u: Array, q: Array, p: Array) -> Array:
    """Whether a draft token with draft probability q and target probability p stays, for u uniform on [0, 1)."""
    return u * q < p  # with probability min(1, p / q)


def _residual(p: Array, q: Array) -> Array:
    """The unnormalized distribution of the token that replaces a rejected one; p where `p = q`."""
    rest = jnp.maximum(p - q, 0)
    return jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p)


def speculative_accept(
    draft_tokens: Int[Array, "*rows drafts"],
    draft_logits: Float[Array, "*rows drafts columns"],
    target_logits: Float[Array, "*rows drafts+1 columns"],
    key: Array,
    *,
    draft_lengths: Int[Array, "*rows"] | None = None,
    greedy: bool = False,
) -> Speculation:
    """Keeps a prefix of the draft tokens, and adds a token, so that all are distributed as the target's samples.

    Draft token x stays with probability `min(1, p(x) / q(x))`, with p and q the softmax of the target's and the draft's
    logits. The first that is rejected is replaced by a sample from `max(p - q, 0)`, normalized; after the last draft
    token follows a sample from the target. The distribution of the result is that of the target, exactly, if the draft
    tokens are samples from q: give logits after the transforms that the draft was sampled with.

    Args:
      draft_tokens: `[*rows, drafts]` integers.
      draft_logits: `[*rows, drafts, columns]`, floating, from which each draft token was sampled.
      target_logits: `[*rows, drafts + 1, columns]`: the target's at the same positions, and after the last.
      key: a PRNG key.
      draft_lengths: `[*rows]`, how many of the draft tokens there are in each row; all by default.
      greedy: static; a draft token stays while it is the target's argmax, which also gives the additional token.

    Returns:
      A `Speculation`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: shapes that do not fit.

    Reference:
      Leviathan et al., "Fast Inference from Transformers via Speculative Decoding"; used by Huang et al., "SpecDec++:
      Boosting Speculative Decoding via Adaptive Candidate Lengths".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import speculative_accept
      >>> target = jnp.array([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [9.0, 0.0, 0.0]])
      >>> out = speculative_accept(jnp.array([1, 0]), target[:2], target, jax.random.key(0), greedy=True)
      >>> print(out.tokens, out.accepted)
      [ 1  2 -1] 1
    """
    _checks.integers("draft_tokens", draft_tokens)
    _checks.floating("draft_logits", draft_logits)
    _checks.floating("target_logits", target_logits)
    _checks.flag("greedy", greedy)
    if draft_tokens.ndim == 0 or target_logits.ndim == 0:
        raise ValueError(
            "draft_tokens must have shape [*rows, drafts], target_logits [*rows, drafts + 1, columns]"
        )
    *rows, drafts = draft_tokens.shape
    columns = target_logits.shape[-1]
    _checks.shape("draft_logits", draft_logits, (*rows, drafts, columns), "a row of logits per draft token")
    _checks.shape(
        "target_logits",
        target_logits,
        (*rows, drafts + 1, columns),
        "one row more than there are draft tokens",
    )
    lengths = jnp.full(rows, drafts) if draft_lengths is None else jnp.asarray(draft_lengths)
    _checks.integers("draft_lengths", lengths)
    _checks.shape("draft_lengths", lengths, tuple(rows), "one length per row")
    tokens = as_ids(jnp.asarray(draft_tokens))
    draft_logits, target_logits = jnp.asarray(draft_logits), jnp.asarray(target_logits)
    uniform_key, sample_key = jax.random.split(key)

    def at(p, ids):
        return jnp.take_along_axis(p, ids[..., None], axis=-1)[..., 0]

    if greedy:
        best = argmax(target_logits)
        keeps = tokens == best[..., :drafts]
    else:
        p, q = (softmax(a.astype(accumulation_dtype(a.dtype))) for a in (target_logits, draft_logits))
        u = jax.random.uniform(uniform_key, tokens.shape, p.dtype)
        keeps = _accepts(u, at(q, tokens), at(p[..., :drafts, :], tokens))
    keeps &= jnp.arange(drafts) < lengths[..., None]
    accepted = jnp.sum(jnp.cumprod(keeps.astype(jnp.int32), axis=-1), axis=-1)
    if greedy:
        last = at(best, accepted)
    else:
        # Beyond the draft there is nothing to subtract.
        q = jnp.pad(q, [*[(0, 0)] * len(rows), (0, 1), (0, 0)])
        p, q = (jnp.take_along_axis(a, accepted[..., None, None], axis=-2)[..., 0, :] for a in (p, q))
        q = jnp.where((accepted < lengths)[..., None], q, 0)
        last = sample(jnp.log(_residual(p, q)), sample_key)
    places = jnp.arange(drafts + 1)
    padded = jnp.pad(tokens, [*[(0, 0)] * len(rows), (0, 1)])
    out = jnp.where(places < accepted[..., None], padded, -1)
    out = jnp.where(places == accepted[..., None], last[..., None], out)
    return Speculation(out.astype(jnp.int32), accepted.astype(jnp.int32))


# --- when to stop drafting ----------------------------------------------------------------------------------


class AcceptanceState(NamedTuple):
    """The state of `acceptance_stop` in a round.

    Attributes:
      survival: `[*rows]`, the predicted probability that all draft tokens so far are accepted.
      length: `[*rows]` int32, the number of draft tokens so far.
    """

    survival: Array
    length: Array

    @classmethod
    def start(cls, rows: tuple[int, ...] = ()) -> AcceptanceState:
        """The state before the first draft token."""
        return cls(jnp.ones(rows), jnp.zeros(rows, jnp.int32))


def acceptance_stop(
    head_logits: Float[Array, "*rows 2"],
    state: AcceptanceState,
    *,
    threshold: float = 0.7,
    min_length: int = 1,
    max_length: int = 20,
    trust_first: bool = True,
) -> tuple[Bool[Array, "*rows"], AcceptanceState]:
    """Stops drafting where a trained head predicts a rejection: `1 - prod_i a_i > threshold`.

    `a_i` is the predicted probability that draft token i is accepted. Call it after each draft token.

    Args:
      head_logits: `[*rows, 2]`, the head's logits at the current draft token: rejected, accepted.
      state: of this round, at first `AcceptanceState.start(rows)`.
      threshold: of the predicted probability that some draft token is rejected, in (0, 1). The default is our reading
        of the paper.
      min_length: never stops with fewer draft tokens.
      max_length: always stops with as many.
      trust_first: whether `a_1 = 1`, as in the authors' code.

    Returns:
      Whether to stop, `[*rows]`, and the new state.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Huang et al., "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths".

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import AcceptanceState, acceptance_stop
      >>> state = AcceptanceState.start()
      >>> for a in [0.5, 0.9, 0.8, 0.95]:
      ...     stop, state = acceptance_stop(jnp.log(jnp.array([1 - a, a])), state, threshold=0.3)
      >>> print(stop, np.asarray(1 - state.survival).round(3))
      True 0.316
    """
    _checks.floating("head_logits", head_logits)
    if head_logits.ndim == 0 or head_logits.shape[-1] != 2:
        raise ValueError(f"head_logits must have shape [*rows, 2], got shape {head_logits.shape}")
    _checks.number("threshold", threshold, above=0, below=1)
    _checks.number("min_length", min_length, at_least=1)
    _checks.number("max_length", max_length, at_least=1)
    _checks.flag("trust_first", trust_first)
    x = head_logits.astype(accumulation_dtype(head_logits.dtype))
    accepted = jax.nn.sigmoid(x[..., 1] - x[..., 0])
    if trust_first:
        accepted = jnp.where(state.length == 0, 1, accepted)
    survival, length = state.survival * accepted, state.length + 1
    stop = (1 - survival > threshold) & (length >= min_length) | (length >= max_length)
    return stop, AcceptanceState(survival.astype(state.survival.dtype), length)


def _entropy(logits: Logits | TransformedLogits) -> Array:
    return as_rows(logits).reduce(reductions.softmax_moments(variance=False)).entropy


def entropy_stop(
    draft_logits: Logits | TransformedLogits,
    length: int | Int[Array, "*rows"],
    *,
    coefficient: float = 0.15,
    threshold: float = 0.3,
    max_length: int = 40,
) -> Bool[Array, "*rows"]:
    """Stops drafting after a token whose distribution has the entropy H with `sqrt(coefficient * H) > threshold`.

    The root bounds the probability of a rejection. Call it after each draft token: so at least one is drafted.

    Args:
      draft_logits: `[*rows, columns]`, any kind of logits: those of the current draft token; one pass.
      length: the number of draft tokens so far, with the current one.
      coefficient: positive.
      threshold: positive.
      max_length: always stops with as many draft tokens.

    Returns:
      Whether to stop, `[*rows]`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument out of range.

    Reference:
      Zhang et al., "Draft Model Knows When to Stop: A Self-Verification Length Policy for Speculative Decoding"; the
      defaults are those of the authors' code.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import entropy_stop
      >>> print(entropy_stop(jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.07, 0.03], [0.9, 0.1, 0, 0, 0]])), 3))
      [ True False]
    """
    _checks.number("coefficient", coefficient, above=0)
    _checks.number("threshold", threshold, above=0)
    _checks.number("max_length", max_length, at_least=1)
    bound = jnp.sqrt(coefficient * jnp.maximum(_entropy(draft_logits), 0))
    return (bound > threshold) | (jnp.asarray(length) >= max_length)


# --- switching between models -------------------------------------------------------------------------------


class RollingEntropy(NamedTuple):
    """The entropies of the last rows of logits.

    Attributes:
      values: `[window, *rows]`, a ring buffer.
      count: int32, how many entropies came so far.
    """

    values: Array
    count: Array

    @classmethod
    def start(cls, window: int = 5, rows: tuple[int, ...] = ()) -> RollingEntropy:
        """The state before the first row of logits; the window is a static length."""
        window = _checks.integer("window", window, at_least=1)
        return cls(jnp.zeros((window, *rows)), jnp.zeros((), jnp.int32))


def rolling_entropy(
    logits: Logits | TransformedLogits, state: RollingEntropy
) -> tuple[Float[Array, "*rows"], RollingEntropy]:
    """The mean entropy of the softmax over the last steps, in nats; one pass.

    Args:
      logits: `[*rows, columns]`, any kind of logits: those of the current step.
      state: at first `RollingEntropy.start(window, rows)`.

    Returns:
      The mean of the last entropies, at most `window` of them, `[*rows]`, and the new state.

    Raises:
      TypeError: logits that are not floating.
      ValueError: a state for other rows.

    Reference:
      Simonds, "Entropy Adaptive Decoding: Dynamic Model Switching for Efficient Inference".

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import RollingEntropy, rolling_entropy
      >>> mean, state = rolling_entropy(jnp.array([1.0, 2.0, -1.0, 0.5]), RollingEntropy.start(3))
      >>> print(np.asarray(mean).round(4))
      1.0144
    """
    entropy = _entropy(logits)
    _checks.shape("state.values", state.values[0], entropy.shape, "one number per row of logits")
    return _rolled(entropy, state)


def _rolled(entropy: Array, state: RollingEntropy) -> tuple[Array, RollingEntropy]:
    window = state.values.shape[0]
    values = state.values.at[state.count % window].set(entropy.astype(state.values.dtype))
    count = state.count + 1
    return jnp.sum(values, axis=0) / jnp.minimum(count, window), RollingEntropy(values, count)


class EntropySwitch(NamedTuple):
    """The state of `entropy_switch`.

    Attributes:
      entropy: the last entropies, a `RollingEntropy`.
      large: `[*rows]` booleans, whether the large model is in use.
      steps: `[*rows]` int32, the number of steps since the last switch.
    """

    entropy: RollingEntropy
    large: Array
    steps: Array

    @classmethod
    def start(cls, window: int = 5, rows: tuple[int, ...] = ()) -> EntropySwitch:
        """The state before the first step, with the small model in use."""
        return cls(RollingEntropy.start(window, rows), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32))


def entropy_switch(
    logits: Logits | TransformedLogits,
    state: EntropySwitch,
    *,
    threshold: float | Float[Array, "*rows"],
    min_steps: int | Int[Array, ""] = 1,
) -> tuple[Bool[Array, "*rows"], EntropySwitch]:
    """Which model the next step uses: the large one where the mean entropy of the last steps exceeds a threshold.

    Args:
      logits: `[*rows, columns]`, any kind of logits: those of the current step; one pass.
      state: at first `EntropySwitch.start(window, rows)`.
      threshold: in nats; no default of the paper is known.
      min_steps: the least number of steps between two switches, and before the first.

    Returns:
      Whether the large model is used, `[*rows]`, and the new state.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Simonds, "Entropy Adaptive Decoding: Dynamic Model Switching for Efficient Inference". The mechanism is the
      paper's, the window and `min_steps` are our reading.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import EntropySwitch, entropy_switch
      >>> large, state = entropy_switch(jnp.zeros(4), EntropySwitch.start(), threshold=1.0)
      >>> print(large)
      True
    """
    rows = as_rows(logits)
    limit = rows.per_row("threshold", threshold)
    _checks.number("min_steps", min_steps, at_least=1)
    mean, entropy = rolling_entropy(rows, state.entropy)
    return _switched(mean > limit, state._replace(entropy=entropy), min_steps)


def _switched(wants_large: Array, state: EntropySwitch, min_steps: Any) -> tuple[Array, EntropySwitch]:
    steps = state.steps + 1
    switches = (wants_large != state.large) & (steps >= min_steps)
    large = jnp.where(switches, wants_large, state.large)
    return large, state._replace(large=large, steps=jnp.where(switches, 0, steps))
