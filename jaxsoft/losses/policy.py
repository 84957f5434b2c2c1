"""Policy gradients and divergences.

Losses of reinforcement learning on sequences: functions of the log-probabilities of tokens or samples, of rewards and
of advantages. `jaxsoft.log_prob(jaxsoft.linear_logits(hidden, weight), tokens)` gives the log-probabilities without
storing the logits.

The policy gradients (`f_dpg_loss`, `clipped_policy_loss`, `cispo_loss`) are per sample or per token, and
`length_weighted_mean` aggregates over tokens. They exist for their gradient; their values say little. `sampled_kl`,
times a coefficient, is the penalty that keeps a policy near its reference.

Example:
  >>> import jax, jax.numpy as jnp, jaxsoft
  >>> from jaxsoft import losses
  >>> rewards = jnp.array([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])  # [prompts, responses]
  >>> advantages = losses.group_relative_advantage(rewards)
  >>> hidden, weight = jax.random.normal(jax.random.key(0), (2, 3, 7, 16)), jnp.ones((16, 50)) / 16
  >>> tokens, response = jnp.zeros((2, 3, 7), int), jnp.ones((2, 3, 7), bool)
  >>> log_probs = jaxsoft.log_prob(jaxsoft.linear_logits(hidden, weight), tokens)  # [prompts, responses, tokens]
  >>> before = jax.lax.stop_gradient(log_probs)  # of the policy that drew the responses
  >>> token_losses = losses.clipped_policy_loss(log_probs, before, advantages[..., None])
  >>> loss = losses.length_weighted_mean(token_losses, where=response, mode="token").mean()
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide
from jaxsoft.losses._divergences import DIVERGENCES, MAX_EXPONENT
from jaxsoft.losses._log_probs import prepare, spread
from jaxsoft.normalizers.inner import present_scores

_MAX_LOG_RATIO = 20.0  # of one token


def f_divergence(
    log_p: Float[Array, "*rows columns"],
    log_q: Float[Array, "*rows columns"],
    *,
    kind: str = "reverse_kl",
    alpha: float = 0.5,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """The f-divergence of two distributions, `D_f(p || q) = sum_x q f(p / q)`, of a policy p from a target q.

    By `kind`, with t = p / q (the target comes first in a forward divergence, the policy in a reverse one):

    * `"reverse_kl"`: `f = t log t`, `KL(p || q)`.
    * `"forward_kl"`: `f = -log t`, `KL(q || p)`.
    * `"jensen_shannon"`: `f = t log(2t / (1 + t)) + log(2 / (1 + t))`, the sum of the KLs to the mean of p and q
      (twice the usual divergence, 2 log 2 at most).
    * `"alpha"`: `f = ((1 - a) t + a - t^(1 - a)) / (a (1 - a))`, between the reverse (a to 0) and the forward KL (1).
    * `"total_variation"`: `f = |t - 1| / 2`.
    * `"forward_chi_squared"`: `f = (1 - t)^2 / t`, `sum (q - p)^2 / p`.
    * `"reverse_chi_squared"`: `f = (t - 1)^2`, `sum (p - q)^2 / q`.

    `f_dpg_loss` and `f_dpo_loss` use the derivatives f'. Exponents are clamped at 80.

    Args:
      log_p: `[*rows, columns]`, log-probabilities, as of `jaxsoft.log_softmax`; -inf is the probability 0.
      log_q: `[*rows, columns]`.
      kind: which divergence.
      alpha: the parameter of `"alpha"`, between 0 and 1.
      axis: the axis of a row.
      where: booleans that broadcast to the log-probabilities, True = counts.

    Returns:
      `[*rows]`, float32 or wider; +inf where only one distribution gives an outcome the probability 0 and the
      divergence does not allow it; 0 for a row without entries.

    Raises:
      TypeError: log-probabilities that are not a floating array.
      ValueError: an argument of a wrong shape, out of range, or an unknown kind.

    Reference:
      Go et al., "Aligning Language Models with Preferences through f-divergence Minimization".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_p, log_q = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]))
      >>> print(jaxsoft.losses.f_divergence(log_p, log_q).round(6))
      0.274887
      >>> print(jaxsoft.losses.f_divergence(log_p, log_q, kind="total_variation").round(6))
      0.3
    """
    _checks.option("kind", kind, tuple(DIVERGENCES))
    _checks.number("alpha", alpha, above=0, below=1)
    log_p, in_p, _ = present_scores(log_p, axis, where, "f_divergence")
    log_q, in_q, axis = present_scores(log_q, axis, where, "f_divergence")
    _checks.shape("log_q", log_q, log_p.shape, "that of log_p")
    both = in_p & in_q
    divergence = DIVERGENCES[kind]
    terms = divergence.term(jnp.where(both, log_p, 0), jnp.where(both, log_q, 0), alpha)
    terms = jnp.where(both, terms, 0)
    terms += _one_sided(divergence.slope(alpha), log_p, in_p & ~in_q)
    terms += _one_sided(divergence.at_zero(alpha), log_q, in_q & ~in_p)
    return jnp.sum(terms, axis=axis)


def _one_sided(cost: Any, log_prob: Array, alone: Array) -> Array:
    """The cost of outcomes that only one of two distributions can have, in proportion to their probability."""
    if _checks.is_concrete_number(cost) and cost == jnp.inf:
        return jnp.where(alone, jnp.inf, 0)
    return jnp.where(alone, cost * jnp.exp(log_prob), 0)


def f_dpg_reward(
    log_prob: Float[Array, "*samples"],
    log_target: Float[Array, "*samples"],
    *,
    divergence: str = "forward_kl",
    alpha: float = 0.5,
    log_partition: float | Float[Array, ...] = 0.0,
    max_log_ratio: float | None = None,
) -> Float[Array, "*samples"]:
    """The pseudo-reward of f-DPG, `-f'(t)` with `t = pi(x) / p(x)` and the target `p = P / Z`; a constant.

    For the kinds of `f_divergence`, with `x = log t`: `"reverse_kl"` `-(x + 1)`, `"forward_kl"` `e^-x`,
    `"jensen_shannon"` `softplus(-x) - log 2`, `"alpha"` `(e^(-alpha x) - 1) / alpha`, `"total_variation"`
    `-sign(x) / 2`, `"forward_chi_squared"` `e^(-2 x) - 1`, `"reverse_chi_squared"` `2 (1 - e^x)`. Its moving average
    over about the last thousand samples serves as the baseline of `f_dpg_loss`.

    Args:
      log_prob: `[*samples]`, the policy's log-probability of each sample.
      log_target: `[*samples]`, log P(x) of the target, which need not be normalized; -inf where it is 0.
      divergence: which divergence of the policy from the target to minimize.
      alpha: the parameter of `"alpha"`, above 0.
      log_partition: log Z of the target, a number or an array that broadcasts to `[*samples]`.
      max_log_ratio: clips x to [-max_log_ratio, max_log_ratio], above 0. Needed for `"reverse_kl"`, whose reward is
        -inf otherwise where the target is 0.

    Returns:
      `[*samples]`, float32 or wider, without a gradient.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown divergence.

    Reference:
      Go et al., "Aligning Language Models with Preferences through f-divergence Minimization".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_prob, log_target = jnp.array([-2.5, -1.7]), jnp.array([-2.0, -2.0])
      >>> print(jaxsoft.losses.f_dpg_reward(log_prob, log_target).round(6))
      [1.648721 0.740818]
    """
    _checks.option("divergence", divergence, tuple(DIVERGENCES))
    _checks.number("alpha", alpha, above=0)
    log_prob, log_target = prepare(None, log_prob=log_prob, log_target=log_target).arrays
    log_ratio = log_prob - (log_target - spread("log_partition", log_partition, log_prob))
    if max_log_ratio is not None:
        _checks.number("max_log_ratio", max_log_ratio, above=0)
        log_ratio = jnp.clip(log_ratio, -max_log_ratio, max_log_ratio)
    return lax.stop_gradient(-DIVERGENCES[divergence].derivative(log_ratio, alpha))


def f_dpg_loss(
    log_prob: Float[Array, "*samples"],
    log_target: Float[Array, "*samples"],
    proposal_log_prob: Float[Array, "*samples"] | None = None,
    *,
    divergence: str = "forward_kl",
    alpha: float = 0.5,
    log_partition: float | Float[Array, ...] = 0.0,
    baseline: float | Float[Array, ...] = 0.0,
    max_log_ratio: float | None = None,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*samples"] | None = None,
) -> Float[Array, "*samples"]:
    """f-DPG: `-(pi / q)(x) (reward(x) - baseline) log pi(x)` of samples x ~ q.

    The factor before `log pi(x)` is a constant to the gradient; the reward is `f_dpg_reward`, `-f'(pi / p)`. The
    expected gradient of the mean over samples is that of the f-divergence `D_f(pi || p)` of the policy from the
    target `p = P / Z`, such as a language model reweighted by preferences.

    Args:
      log_prob: `[*samples]`, the policy's log-probability of each sample.
      log_target: `[*samples]`, log P(x) of the target, which need not be normalized; -inf where it is 0.
      proposal_log_prob: `[*samples]`, log q(x) of the distribution that was sampled; None: the policy itself.
      divergence: which divergence to minimize, see `f_divergence`.
      alpha: the parameter of `"alpha"`, above 0.
      log_partition: log Z of the target, a number or an array that broadcasts to `[*samples]`; usually an estimate by
        importance sampling.
      baseline: subtracted from the rewards, a number or an array that broadcasts to `[*samples]`: a moving average of
        `f_dpg_reward`. It lowers the variance and leaves the expectation as it is.
      max_log_ratio: as in `f_dpg_reward`; needed for `"reverse_kl"` if the target is 0 somewhere.
      where: booleans that broadcast to `[*samples]`, True = counts.
      weights: `[*samples]`, multiply the losses.

    Returns:
      Losses `[*samples]`, float32 or wider; 0 for a sample that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown divergence.

    Reference:
      Go et al., "Aligning Language Models with Preferences through f-divergence Minimization".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_prob, log_target = jnp.array([-2.5, -1.7]), jnp.array([-2.0, -2.0])
      >>> print(jaxsoft.losses.f_dpg_loss(log_prob, log_target, baseline=1.0).round(2))
      [ 1.62 -0.44]
    """
    proposal = {} if proposal_log_prob is None else {"proposal_log_prob": proposal_log_prob}
    samples = prepare(where, weights, log_prob=log_prob, log_target=log_target, **proposal)
    log_prob, log_target, *proposals = samples.arrays
    options: dict[str, Any] = dict(divergence=divergence, alpha=alpha, log_partition=log_partition)
    reward = f_dpg_reward(log_prob, log_target, max_log_ratio=max_log_ratio, **options)
    factor = reward - spread("baseline", baseline, log_prob)
    for proposal_log_prob in proposals:
        factor = factor * jnp.exp(jnp.minimum(log_prob - proposal_log_prob, MAX_EXPONENT))
    return samples.finish(-lax.stop_gradient(factor) * log_prob)


def sampled_kl(
    log_prob: Float[Array, "*tokens"],
    reference: Float[Array, "*tokens"],
    *,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*tokens"] | None = None,
) -> Float[Array, "*tokens"]:
    """An estimate of `KL(pi || ref)` from sampled tokens: `e^-r + r - 1`, with the log-ratio `r = log pi - log ref`.

    If the policy sampled the tokens, its mean is the divergence. It is 0 or more for each token, and varies less than
    r, whose mean is the same. `e^-r` is bounded at r = -80.

    Args:
      log_prob: `[*tokens]`, the policy's log-probability of each token.
      reference: `[*tokens]`, the reference's, a constant to the gradient.
      where: booleans that broadcast to `[*tokens]`, True = counts.
      weights: `[*tokens]`, multiply the estimates.

    Returns:
      Estimates `[*tokens]`, float32 or wider; 0 for a token that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Schulman, "Approximating KL Divergence" (the third estimator); Shao et al., "DeepSeekMath" (GRPO).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_prob, reference = jnp.array([-1.2, -0.4, -0.9]), jnp.array([-1.0, -0.7, -1.1])
      >>> print(jaxsoft.losses.sampled_kl(log_prob, reference).round(6))
      [0.021403 0.040818 0.018731]
    """
    tokens = prepare(where, weights, log_prob=log_prob, reference=reference)
    log_prob, reference = tokens.arrays
    r = jnp.maximum(log_prob - lax.stop_gradient(reference), -MAX_EXPONENT)
    return tokens.finish(jnp.expm1(-r) + r)


def kl_coefficient_loss(
    log_coefficient: float | Float[Array, ""],
    kl: Float[Array, "*samples"],
    *,
    target: float | Float[Array, ""],
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*samples"] | None = None,
) -> Float[Array, "*samples"]:
    """Adapts the coefficient of a divergence to a target: `log_coefficient (target - kl)`, by gradient descent.

    The loss of the coefficient alone; kl is a constant. Where kl is above the target, descent raises the coefficient
    `exp(log_coefficient)`, and lowers it where kl is below. (Dual ascent on the constraint `kl <= target`, in the
    logarithm of the multiplier.) The authors train it from 0 with `optax.adam(1e-3)`.

    Args:
      log_coefficient: the logarithm of the coefficient, a parameter.
      kl: `[*samples]`, divergences, such as the mean of `sampled_kl` over the tokens of a sequence.
      target: the divergence to reach, 0 or more.
      where: booleans that broadcast to `[*samples]`, True = counts.
      weights: `[*samples]`, multiply the losses.

    Returns:
      Losses `[*samples]`, float32 or wider; 0 where kl does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "Offline Reinforcement Learning for LLM Multi-Step Reasoning" (the authors' code).

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> gradient = jax.grad(jaxsoft.losses.kl_coefficient_loss)(0.0, jnp.array(0.07), target=0.05)
      >>> print(round(gradient, 6))
      -0.02
    """
    _checks.number("log_coefficient", log_coefficient)
    _checks.number("target", target, at_least=0)
    samples = prepare(where, weights, kl=kl)
    (kl,) = samples.arrays
    return samples.finish(log_coefficient * lax.stop_gradient(target - kl))


def length_weighted_mean(
    token_losses: Float[Array, "*batch sequences tokens"],
    *,
    where: Bool[Array, ...] | None = None,
    alpha: float = 1.0,
    mode: str = "delta_l",
    max_length: int | None = None,
) -> Float[Array, "*batch"]:
    """Aggregates token losses over sequences, by default as `sum_i S_i L_i^-alpha / sum_j L_j^-alpha`.

    With `S_i` the sum over the tokens of sequence i, `L_i` their number and B the number of sequences, by `mode`:

    * `"delta_l"`: `sum_i S_i L_i^-alpha / sum_j L_j^-alpha`. If the variance of `S_i` is proportional to the length,
      alpha = 1 has the least variance of all weighted means; alpha below 1 gives long sequences more weight.
    * `"token"`: `sum_i S_i / sum_i L_i` (DAPO).
    * `"sequence"`: `sum_i (S_i / L_i) / B` (GRPO).
    * `"sequence_sum"`: `sum_i S_i / B`.
    * `"constant"`: `sum_i S_i / (B max_length)` (Dr. GRPO).

    A sequence without tokens that count is absent, in B too.

    Args:
      token_losses: `[*batch, sequences, tokens]`, such as those of `clipped_policy_loss`.
      where: booleans that broadcast to the losses, True = counts.
      alpha: the exponent of `"delta_l"`, 0 or more; 1 and 0.75 in the paper.
      mode: which aggregation.
      max_length: the length that `"constant"` divides by; None: the size of the token axis.

    Returns:
      `[*batch]`, float32 or wider: one number for all sequences; 0 if no token counts.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown mode.

    Reference:
      He et al., "Delta L Normalization: Rethink Loss Aggregation in RLVR"; Yu et al., "DAPO"; Liu et al.,
      "Understanding R1-Zero-Like Training" (Dr. GRPO).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> token_losses = jnp.array([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
      >>> where = jnp.array([[True] * 4, [True, False, False, False]])
      >>> for mode in ("delta_l", "token", "sequence", "sequence_sum", "constant"):
      ...     print(jaxsoft.losses.length_weighted_mean(token_losses, where=where, mode=mode))
      2.4
      1.2
      1.5
      3.0
      0.75
    """
    _checks.option("mode", mode, ("delta_l", "token", "sequence", "sequence_sum", "constant"))
    _checks.number("alpha", alpha, at_least=0)
    if getattr(token_losses, "ndim", 2) < 2:
        raise ValueError(
            "token_losses must have axes of sequences and of tokens as the last two, got "
            f"{_checks.describe(token_losses)}"
        )
    tokens = prepare(where, token_losses=token_losses)
    (losses,) = tokens.arrays
    size = losses.shape[-1] if max_length is None else _checks.integer("max_length", max_length, at_least=1)
    counts = jnp.ones(losses.shape, bool) if tokens.where is None else tokens.where
    length = jnp.sum(counts, axis=-1).astype(losses.dtype)
    total = jnp.sum(losses, axis=-1)
    present = length > 0
    if mode == "delta_l":
        scale = jnp.where(present, jnp.maximum(length, 1) ** -alpha, 0)
        return safe_divide(jnp.sum(scale * total, axis=-1), jnp.sum(scale, axis=-1))
    if mode == "token":
        return safe_divide(jnp.sum(total, axis=-1), jnp.sum(length, axis=-1))
    if mode == "sequence":
        total = safe_divide(total, length)
    elif mode == "constant":
        total = total / max(size, 1)
    return safe_divide(jnp.sum(total, axis=-1), jnp.sum(present, axis=-1).astype(total.dtype))


def clipped_policy_loss(
    log_prob: Float[Array, "*tokens"],
    old_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, ...],
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = 3.0,
    max_log_ratio: float = _MAX_LOG_RATIO,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*tokens"] | None = None,
) -> Float[Array, "*tokens"]:
    """PPO's clipped objective: `max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))`, `rho = pi / pi_old`.

    Where A < 0 the loss is at most `-A dual_clip`, so that a token that has become likely cannot dominate.

    Args:
      log_prob: `[*tokens]`, the policy's log-probability of each token.
      old_log_prob: `[*tokens]`, that of the policy that sampled the token, a constant to the gradient.
      advantages: `[*tokens]` or an array that broadcasts to it (`advantages[:, None]` for one number per sequence), a
        constant.
      clip_low: how far the ratio may go below 1, in [0, 1].
      clip_high: how far it may go above 1, 0 or more; None: `clip_low` (0.28 in DAPO).
      dual_clip: the bound for negative advantages, above 1; None: no bound.
      max_log_ratio: `log rho` is clipped to [-max_log_ratio, max_log_ratio], above 0.
      where: booleans that broadcast to `[*tokens]`, True = counts.
      weights: `[*tokens]`, multiply the losses.

    Returns:
      Losses `[*tokens]`, float32 or wider, to be aggregated by `length_weighted_mean`; 0 for a token that does not
      count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Schulman et al., "Proximal Policy Optimization Algorithms"; Ye et al., "Mastering Complex Control in MOBA Games
      with Deep Reinforcement Learning" (the second bound).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_ratio, advantages = jnp.array([0.5, -0.3, 2.0]), jnp.array([1.5, 1.5, -1.0])
      >>> print(jaxsoft.losses.clipped_policy_loss(log_ratio, jnp.zeros(3), advantages).round(4))
      [-1.8    -1.1112  3.    ]
    """
    clip_high = clip_low if clip_high is None else clip_high
    _checks.number("clip_low", clip_low, at_least=0, at_most=1)
    _checks.number("clip_high", clip_high, at_least=0)
    tokens, _, ratio, advantage = _ratios(log_prob, old_log_prob, advantages, max_log_ratio, where, weights)
    loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        _checks.number("dual_clip", dual_clip, above=1)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)
    return tokens.finish(loss)


def cispo_loss(
    log_prob: Float[Array, "*tokens"],
    old_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, ...],
    *,
    cap: float = 5.0,
    floor: float = 0.0,
    max_log_ratio: float = _MAX_LOG_RATIO,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*tokens"] | None = None,
) -> Float[Array, "*tokens"]:
    """CISPO: `-w A log pi`, where the constant w is the ratio `pi / pi_old`, at most `cap`.

    In `clipped_policy_loss` a token whose ratio is clipped has no gradient; here every token has one, with a bounded
    weight. The mean is taken over all tokens of the batch: `length_weighted_mean(..., mode="token")`.

    Args:
      log_prob: `[*tokens]`, the policy's log-probability of each token.
      old_log_prob: `[*tokens]`, that of the policy that sampled the token.
      advantages: `[*tokens]` or an array that broadcasts to it (`advantages[:, None]` for one number per sequence), a
        constant.
      cap: the largest weight w, above 0; 5 is a common choice. It is the weight itself, not its distance from 1.
      floor: the smallest weight w, 0 or more.
      max_log_ratio: the log of the ratio is clipped to [-max_log_ratio, max_log_ratio], above 0.
      where: booleans that broadcast to `[*tokens]`, True = counts.
      weights: `[*tokens]`, multiply the losses.

    Returns:
      Losses `[*tokens]`, float32 or wider; 0 for a token that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Chen et al., "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_prob, log_ratio = jnp.array([-0.2, -1.0, -0.5]), jnp.array([0.5, -0.3, 2.0])
      >>> print(jaxsoft.losses.cispo_loss(log_prob, log_prob - log_ratio, jnp.array(1.5)).round(4))
      [0.4946 1.1112 3.75  ]
    """
    _checks.number("cap", cap, above=0)
    _checks.number("floor", floor, at_least=0)
    tokens, log_prob, ratio, advantage = _ratios(
        log_prob, old_log_prob, advantages, max_log_ratio, where, weights
    )
    weight = lax.stop_gradient(jnp.clip(ratio, floor, cap))
    return tokens.finish(-weight * advantage * log_prob)


def _ratios(log_prob: Any, old_log_prob: Any, advantages: Any, max_log_ratio: Any, where: Any, weights: Any):
    """The checked arguments, the log-probabilities, their ratios to the old ones, and the advantages."""
    _checks.number("max_log_ratio", max_log_ratio, above=0)
    _checks.floating("log_prob", log_prob)
    _checks.floating("advantages", advantages)
    advantages = spread("advantages", advantages, log_prob)
    tokens = prepare(where, weights, log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    log_prob, old_log_prob, advantage = tokens.arrays
    log_ratio = log_prob - lax.stop_gradient(old_log_prob)
    ratio = jnp.exp(jnp.clip(log_ratio, -max_log_ratio, max_log_ratio))
    return tokens, log_prob, ratio, advantage


def fuzzy_reward(
    prediction: Num[Array, "*responses"],
    target: Num[Array, ...],
    *,
    tolerance: float = 0.5,
    bonus: float = 0.5,
) -> Float[Array, "*responses"]:
    """A graded reward of numbers, by their relative error e: `1 + bonus - e` if `e < tolerance`, else 0.

    `e = |prediction - target| / |target|`. An answer that is nearly right is told from one that is wrong, which a
    reward of 0 or 1 does not do; `group_relative_advantage` then ranks the answers to a prompt by their precision.

    Args:
      prediction: `[*responses]`, the numbers that the responses give; NaN for a response without a number.
      target: the right numbers, an array that broadcasts to `[*responses]`: `target[:, None]` for one number per
        prompt. For a target of 0, only 0 is within the tolerance (in the authors' code, nothing is).
      tolerance: the error from which on there is no reward, above 0.
      bonus: what a right answer is worth beyond 1. The reward jumps by `1 + bonus - tolerance` at the tolerance.

    Returns:
      Rewards `[*responses]`, float32 or wider; 0 for NaN.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: a target that does not broadcast, or an option out of range.

    Reference:
      Wang et al., "CrowdVLM-R1: Expanding R1 Ability to Vision Language Model for Crowd Counting using Fuzzy Group
      Relative Policy Reward".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> rewards = jaxsoft.losses.fuzzy_reward(jnp.array([[95, 60, 30, 100]]), jnp.array([[100]]))
      >>> print(rewards)
      [[1.45 1.1  0.   1.5 ]]
      >>> print(jaxsoft.losses.group_relative_advantage(rewards).round(1))
      [[ 0.6  0.1 -1.5  0.7]]
    """
    _checks.numeric("prediction", prediction)
    _checks.numeric("target", target)
    _checks.number("tolerance", tolerance, above=0)
    _checks.number("bonus", bonus)
    _checks.broadcastable("target", target, prediction.shape, "that of prediction")
    dtype = accumulation_dtype(prediction.dtype, target.dtype)
    x, y = jnp.asarray(prediction, dtype), jnp.asarray(target, dtype)
    gap, size = jnp.abs(x - y), jnp.abs(y)
    error = jnp.where(gap == 0, 0, gap / jnp.where(size == 0, jnp.finfo(dtype).tiny, size))
    return jnp.where(error < tolerance, 1 + bonus - error, 0)


def group_relative_advantage(
    rewards: Float[Array, ...],
    *,
    axis: int = -1,
    scale: bool = True,
    unbiased: bool = True,
    epsilon: float = 1e-4,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, ...]:
    """The advantages of GRPO: rewards relative to their group, `(r - mean) / (std + epsilon)`.

    Args:
      rewards: the rewards of the responses to a prompt along `axis`, such as those of `fuzzy_reward`.
      axis: the axis of the group.
      scale: whether to divide by the standard deviation; Dr. GRPO does not.
      unbiased: whether the variance divides by n - 1, as in PyTorch, or by n.
      epsilon: added to the standard deviation, above 0.
      where: booleans that broadcast to the rewards, True = counts.

    Returns:
      Advantages of the rewards' shape, float32 or wider; 0 where `where` is False, and in a group of equal rewards or
      of a single one.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Shao et al., "DeepSeekMath" (GRPO).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> rewards = jnp.array([1.0, 0.0, 0.5, 1.0])
      >>> print(jaxsoft.losses.group_relative_advantage(rewards).round(6))
      [ 0.783186 -1.30531  -0.261062  0.783186]
      >>> print(jaxsoft.losses.group_relative_advantage(rewards, scale=False))
      [ 0.375 -0.625 -0.125  0.375]
    """
    _checks.flag("scale", scale)
    _checks.flag("unbiased", unbiased)
    _checks.number("epsilon", epsilon, above=0)
    group = prepare(where, rewards=rewards)
    (rewards,) = group.arrays
    axis = _checks.integer("axis", axis, at_least=-rewards.ndim, at_most=rewards.ndim - 1)
    counts = jnp.ones(rewards.shape, bool) if group.where is None else group.where
    n = jnp.sum(counts, axis=axis, keepdims=True).astype(rewards.dtype)
    mean = safe_divide(jnp.sum(rewards, axis=axis, keepdims=True), n)
    centered = group.finish(rewards - mean)
    if not scale:
        return centered
    squares = jnp.sum(centered**2, axis=axis, keepdims=True)
    variance = safe_divide(squares, jnp.maximum(n - 1, 0) if unbiased else n)
    spread_out = variance > 0
    deviation = jnp.where(spread_out, jnp.sqrt(jnp.where(spread_out, variance, 1)), 0)
    return centered / (deviation + epsilon)
