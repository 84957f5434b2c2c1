"""A step of beam search."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft.decoding._rows import TransformedLogits, as_rows
from jaxsoft.rows import Logits, reductions


class Beams(NamedTuple):
    """The beams after a step, the best first, each `[*rows, beams]`.

    Attributes:
      tokens: int32, the token that each beam appends.
      parents: int32, the beam that it continues: gather the state of the search along the beams by it.
      scores: the sum of the log-probabilities so far; -inf for a beam that does not exist.
      finished: whether the beam has ended.
    """

    tokens: Array
    parents: Array
    scores: Array
    finished: Array


def beam_step(
    logits: Logits | TransformedLogits,
    scores: Float[Array, "*rows beams"],
    *,
    finished: Bool[Array, "*rows beams"] | None = None,
    end_token: int | None = None,
    pad_token: int = 0,
) -> Beams:
    """The best continuations of a set of beams; one pass, nothing of the logits' size is stored.

    Args:
      logits: `[*rows, beams, columns]`: an array, `linear_logits`, or what a transform made of either.
      scores: `[*rows, beams]`, floating, the sums so far. To start, 0 for the first beam and -inf for the others,
        or all of them would be equal.
      finished: `[*rows, beams]`, beams that have ended: they stay, with their score.
      end_token: the token that ends a beam; a number that may be traced, or None.
      pad_token: what a beam that has ended appends; a number that may be traced.

    Returns:
      `Beams`. Ties go to the earlier beam, then to the more probable token, then to the smaller one.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import beam_step
      >>> log_p = jnp.log(jnp.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]))
      >>> out = beam_step(log_p, jnp.log(jnp.array([0.5, 0.4])))
      >>> print(out.parents, out.tokens, np.asarray(jnp.exp(out.scores)).round(2))
      [0 1] [0 1] [0.3  0.28]
    """
    rows = as_rows(logits)
    _checks.floating("scores", scores)
    if not rows.rows:
        raise ValueError(f"logits must have shape [*rows, beams, columns], got shape {rows.shape}")
    _checks.shape("scores", scores, rows.rows, "one number per beam")
    beams = rows.rows[-1]
    k = min(beams, rows.columns)
    found = rows.reduce({"best": reductions.top_k(k), "partition": reductions.log_partition()})
    steps, tokens = found["partition"].along().log_softmax(found["best"].values), found["best"].indices
    if finished is None:
        finished = jnp.zeros(rows.rows, bool)
    _checks.boolean("finished", finished)
    _checks.shape("finished", finished, rows.rows, "one boolean per beam")
    stays = jnp.arange(k) == 0
    steps = jnp.where(finished[..., None], jnp.where(stays, 0, -jnp.inf), steps)
    tokens = jnp.where(finished[..., None], pad_token, tokens)
    ended = finished[..., None] & jnp.ones(k, bool)
    if end_token is not None:
        ended |= tokens == end_token
    parents = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32)[:, None], steps.shape)
    totals = scores[..., None].astype(steps.dtype) + steps

    def flat(a):
        return a.reshape(*a.shape[:-2], beams * k)

    best, at = jax.lax.top_k(flat(totals), beams)
    tokens, parents, ended = (jnp.take_along_axis(flat(a), at, axis=-1) for a in (tokens, parents, ended))
    return Beams(tokens.astype(jnp.int32), parents, best, ended)
