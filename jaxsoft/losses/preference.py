"""Preference optimization.

Losses that train a policy on pairs of responses, a chosen and a rejected one. They are functions of log-probabilities,
one number per response (or per token), not of logits; the log-probabilities of the reference are constants to the
gradient. Nothing of the size `[tokens, vocabulary]` is stored if the log-probabilities are those of
`jaxsoft.linear_logits`.

All losses over pairs have one form: `P f(s, t) + (1 - P) f(t, s)`. The scores s and t are those of the chosen and the
rejected response, mostly log-ratios of policy and reference, f is a function such as `softplus(-beta (s - t))`, and P
is the probability that the label is right. `kto_loss` takes responses that are judged one by one, without a partner.

Example:
  >>> import jax, jax.numpy as jnp, jaxsoft
  >>> from jaxsoft import losses
  >>> hidden = jax.random.normal(jax.random.key(0), (4, 2, 7, 16))  # 4 pairs of responses of 7 tokens
  >>> weight = jnp.ones((16, 50)) / 16
  >>> tokens, response = jnp.zeros((4, 2, 7), int), jnp.arange(7) > 2  # the prompt does not count
  >>> log_probs = jaxsoft.log_prob(jaxsoft.linear_logits(hidden, weight), tokens)
  >>> chosen, rejected = jnp.moveaxis(losses.sequence_log_prob(log_probs, where=response), -1, 0)
  >>> reference = jnp.full(4, -15.0)  # the same numbers of the reference model, computed once
  >>> loss = losses.dpo_loss(chosen, rejected, reference, reference, beta=0.1).mean()
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import sigmoid, softplus
from jaxtyping import Array, Bool, Float, PyTree

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide, weigh
from jaxsoft.losses._common import check_floats
from jaxsoft.losses._divergences import DIVERGENCES
from jaxsoft.losses._log_probs import Samples, prepare, spread
from jaxsoft.normalizers import log_softmax
from jaxsoft.normalizers.inner import present_scores

Pairs = Float[Array, "*pairs"]

# The loss of a pair, from the scores s and t of the chosen and the rejected response. A wrong label swaps them.
_KINDS = {
    "sigmoid": lambda s, t, beta: softplus(-beta * (s - t)),
    "hinge": lambda s, t, beta: jnp.maximum(1 - beta * (s - t), 0),
    "ipo": lambda s, t, beta: (s - t - 0.5 / beta) ** 2,
    "sppo_hard": lambda s, t, beta: (s - 0.5 / beta) ** 2 + (t + 0.5 / beta) ** 2,
    "nca": lambda s, t, beta: softplus(-beta * s) + (softplus(beta * s) + softplus(beta * t)) / 2,
    "bco": lambda s, t, beta: softplus(-beta * s) + softplus(beta * t),
    "apo_zero": lambda s, t, beta: sigmoid(-beta * s) + sigmoid(beta * t),
    "apo_down": lambda s, t, beta: sigmoid(beta * s) + sigmoid(-beta * (s - t)),
}


def _of_scores(kind: str, s: Array, t: Array, beta: Any, right: Any = 1, wrong: Any = 0) -> Array:
    """`right f(s, t) + wrong f(t, s)`; a coefficient of 0 drops its term, infinite or not."""
    loss = _KINDS[kind]
    right, wrong = (jnp.asarray(coefficient, s.dtype) for coefficient in (right, wrong))
    return weigh(loss(s, t, beta), right) + weigh(loss(t, s, beta), wrong)


def _pairs(
    where: Any, weights: Any, *log_probs: Any, names: tuple[str, str] = ("chosen", "rejected"), **others: Any
) -> tuple[Samples, Array, Array, tuple[Array, ...]]:
    """The checked arguments, the log-ratios `log pi - log ref` of the two responses, and the other arrays.

    `log_probs` are the log-probabilities of the two responses under the policy, then under the reference, which is a
    constant to the gradient. `names` are the argument names of the first two.
    """
    named = zip((*names, *(f"reference_{name}" for name in names)), log_probs)
    pairs = prepare(where, weights, **dict(named), **others)
    policy_w, policy_l, reference_w, reference_l, *rest = pairs.arrays
    r_w = policy_w - lax.stop_gradient(reference_w)
    r_l = policy_l - lax.stop_gradient(reference_l)
    return pairs, r_w, r_l, tuple(rest)


def _judged(r_w: Array, r_l: Array, beta: Any, gap: Array) -> Array:
    """The loss of soft labels, right with probability `sigmoid(gap)`."""
    gap = lax.stop_gradient(gap)
    return _of_scores("sigmoid", r_w, r_l, beta, sigmoid(gap), sigmoid(-gap))


def _smoothing(label_smoothing: Any) -> tuple[Any, Any]:
    """The probabilities that the label is right and wrong."""
    _checks.number("label_smoothing", label_smoothing, at_least=0, at_most=1)
    return 1 - label_smoothing, label_smoothing


def _check_tokens(name: str, array: Any) -> None:
    if getattr(array, "ndim", 1) == 0:
        raise ValueError(f"{name} must have an axis of tokens, the last one, got {_checks.describe(array)}")


def sequence_log_prob(
    token_log_probs: Float[Array, "*batch tokens"],
    *,
    where: Bool[Array, ...] | None = None,
    reduction: str = "sum",
) -> Float[Array, "*batch"]:
    """The log-probability of each sequence, `sum_t log pi(a_t | s_t)`, or its mean over the tokens.

    The tokens' log-probabilities come from `jaxsoft.log_prob`, which never stores the logits of
    `jaxsoft.linear_logits`, as in the example.

    Args:
      token_log_probs: `[*batch, tokens]`.
      where: booleans that broadcast to the log-probabilities, True = counts: the response, not the prompt or padding.
      reduction: `"sum"`, or `"mean"` over the tokens that count, as in SimPO and IPO.

    Returns:
      `[*batch]`, float32 or wider; 0 for a sequence without tokens.

    Raises:
      TypeError: an argument of a wrong dtype.
      ValueError: a mask that does not fit, an unknown reduction, log-probabilities without axes.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.losses import dpo_loss, sequence_log_prob
      >>> weight = jnp.arange(20.0).reshape(4, 5) / 10
      >>> def log_prob(hidden, tokens):
      ...     logits = jaxsoft.linear_logits(hidden, weight)  # [sequences, tokens, vocabulary], never stored
      ...     return sequence_log_prob(jaxsoft.log_prob(logits, tokens), where=tokens > 0)
      >>> hidden, reference_hidden = jnp.ones((1, 3, 4)), jnp.zeros((1, 3, 4))
      >>> chosen, rejected = jnp.array([[3, 4, 0]]), jnp.array([[1, 2, 0]])
      >>> pair = log_prob(hidden, chosen), log_prob(hidden, rejected)
      >>> reference = log_prob(reference_hidden, chosen), log_prob(reference_hidden, rejected)
      >>> print(dpo_loss(*pair, *reference).round(6))
      [0.616344]
    """
    _checks.option("reduction", reduction, ("sum", "mean"))
    _check_tokens("token_log_probs", token_log_probs)
    tokens = prepare(where, token_log_probs=token_log_probs)
    (values,) = tokens.arrays
    total = jnp.sum(values, axis=-1)
    if reduction == "sum":
        return total
    count = values.shape[-1] if tokens.where is None else jnp.sum(tokens.where, axis=-1)
    return safe_divide(total, jnp.asarray(count, total.dtype))


def dpo_loss(
    chosen: Pairs,
    rejected: Pairs,
    reference_chosen: Pairs,
    reference_rejected: Pairs,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    baseline: float | Float[Array, ...] = 0.0,
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """Direct preference optimization (DPO): `softplus(-beta (r_w - r_l))`, and its variants.

    `r = log pi - log ref` is the log-ratio of policy and reference, for the chosen response (w) and the rejected one
    (l); the reference is a constant to the gradient. With `d = r_w - r_l`, by `kind`:

    * `"sigmoid"`: `softplus(-beta d)`.
    * `"hinge"`: `max(0, 1 - beta d)`.
    * `"ipo"`: `(d - 1 / (2 beta))^2`, for the log-probabilities of `sequence_log_prob(..., reduction="mean")`.
    * `"robust"`: the unbiased estimate of `"sigmoid"` under labels that are wrong with probability `e =
      label_smoothing`: `((1 - e) softplus(-beta d) - e softplus(beta d)) / (1 - 2 e)`. It can be negative.
    * `"sppo_hard"`: `(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2`.
    * `"nca"`: `softplus(-beta r_w) + softplus(beta r_w) / 2 + softplus(beta r_l) / 2`, least at `beta r_w = log 2`: the
      chosen response does not become less likely.
    * `"bco"`: `softplus(-beta r_w) + softplus(beta r_l)`, a classifier of single responses. `baseline` is the mean
      log-ratio of chosen and rejected responses, as a moving average.
    * `"apo_zero"`: `sigmoid(-beta r_w) + sigmoid(beta r_l)`, which raises the chosen and lowers the rejected response.
      With the `baseline` of `kto_loss` it is KTO on pairs.
    * `"apo_down"`: `sigmoid(beta r_w) + sigmoid(-beta d)`, which lowers both, the rejected response more: for chosen
      responses that are worse than what the model writes.

    Args:
      chosen: `[*pairs]`, the policy's log-probability of the chosen response (`sequence_log_prob`).
      rejected: `[*pairs]`, that of the rejected response.
      reference_chosen: `[*pairs]`, the reference's log-probability of the chosen response.
      reference_rejected: `[*pairs]`, that of the rejected response.
      beta: how strongly the policy is held to the reference, above 0.
      kind: which loss.
      label_smoothing: the probability e that a label is wrong, in [0, 1] (`"robust"`: below 1/2). The kinds other than
        `"robust"` become `(1 - e)` times the loss plus e times that of the swapped pair: conservative DPO.
      baseline: subtracted from both log-ratios, a number or an array that broadcasts to `[*pairs]`, a constant. The
        kinds that read only d do not depend on it.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown kind.

    Reference:
      Rafailov et al., "Direct Preference Optimization"; Azar et al., "A General Theoretical Paradigm to Understand
      Learning from Human Preferences" (IPO); Zhao et al., "SLiC-HF" (hinge); Chowdhury et al., "Provably Robust
      DPO"; Wu et al., "Self-Play Preference Optimization"; Chen et al., "Noise Contrastive Alignment of Language Models
      with Explicit Rewards" (NCA); Jung et al., "Binary Classifier Optimization for Large Language Model Alignment"
      (BCO); D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions" (APO).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> r_w, r_l, reference = jnp.array([0.8]), jnp.array([-0.5]), jnp.zeros(1)
      >>> print(jaxsoft.losses.dpo_loss(r_w, r_l, reference, reference).round(6))
      [0.630258]
      >>> print(jaxsoft.losses.dpo_loss(r_w, r_l, reference, reference, kind="ipo").round(4))
      [13.69]
    """
    _checks.number("beta", beta, above=0)
    _checks.option("kind", kind, (*_KINDS, "robust"))
    if kind == "robust":
        _checks.number("label_smoothing", label_smoothing, at_least=0, below=0.5)
        right, wrong = (e / (1 - 2 * label_smoothing) for e in (1 - label_smoothing, -label_smoothing))
        kind = "sigmoid"
    else:
        right, wrong = _smoothing(label_smoothing)
    pairs, r_w, r_l, _ = _pairs(where, weights, chosen, rejected, reference_chosen, reference_rejected)
    baseline = spread("baseline", baseline, r_w)
    return pairs.finish(_of_scores(kind, r_w - baseline, r_l - baseline, beta, right, wrong))


def f_dpo_loss(
    chosen: Pairs,
    rejected: Pairs,
    reference_chosen: Pairs,
    reference_rejected: Pairs,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """DPO under another divergence from the reference: `softplus(-beta (f'(e^r_w) - f'(e^r_l)))`.

    `r = log pi - log ref` is as in `dpo_loss`, and f' is, by `divergence` and up to a constant:

    * `"reverse_kl"`: `f' = r`, which is `dpo_loss`.
    * `"forward_kl"`: `f' = -e^-r`.
    * `"jensen_shannon"`: `f' = log sigmoid(r)`.
    * `"alpha"`: `f' = -e^(-alpha r) / alpha`, between the reverse KL (alpha to 0) and the forward KL (1).

    Exponents are clamped at 80. The last three are bounded above in r: log-ratios far above 0 have little gradient.

    Args:
      chosen: `[*pairs]`, as in `dpo_loss`.
      rejected: `[*pairs]`.
      reference_chosen: `[*pairs]`.
      reference_rejected: `[*pairs]`.
      beta: how strongly the policy is held to the reference, above 0.
      divergence: which divergence.
      alpha: the parameter of `"alpha"`, above 0.
      label_smoothing: the probability that a label is wrong, in [0, 1], as in `dpo_loss`.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown divergence.

    Reference:
      Wang et al., "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
      Constraints".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> r_w, r_l, reference = jnp.array([0.8]), jnp.array([-0.5]), jnp.zeros(1)
      >>> pair = r_w, r_l, reference, reference
      >>> for divergence in ("forward_kl", "jensen_shannon", "alpha"):
      ...     print(jaxsoft.losses.f_dpo_loss(*pair, divergence=divergence).round(6))
      [0.634975]
      [0.663453]
      [0.633659]
    """
    _checks.number("beta", beta, above=0)
    _checks.option("divergence", divergence, ("reverse_kl", "forward_kl", "jensen_shannon", "alpha"))
    _checks.number("alpha", alpha, above=0)
    coefficients = _smoothing(label_smoothing)
    pairs, r_w, r_l, _ = _pairs(where, weights, chosen, rejected, reference_chosen, reference_rejected)
    s, t = (DIVERGENCES[divergence].derivative(r, alpha) for r in (r_w, r_l))
    return pairs.finish(_of_scores("sigmoid", s, t, beta, *coefficients))


def simpo_loss(
    chosen: Pairs,
    rejected: Pairs,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """SimPO: `softplus(-beta (m_w - m_l - gamma / beta))`, without a reference.

    m is the mean log-probability of a response's tokens, of the chosen response (w) and the rejected one (l).

    Args:
      chosen: `[*pairs]`, the mean log-probability of the chosen response's tokens:
        `sequence_log_prob(..., reduction="mean")`.
      rejected: `[*pairs]`, that of the rejected response.
      beta: scale of the margin, above 0; usually 2 to 10.
      gamma_beta_ratio: the target margin `gamma / beta`, 0 or more; usually 0.1 to 0.8.
      kind: `"sigmoid"` as above, or `"hinge"`: `max(0, 1 - beta (m_w - m_l - gamma / beta))`.
      label_smoothing: the probability e that a label is wrong, in [0, 1]: with the margin
        `u = beta (m_w - m_l - gamma / beta)` the loss is `(1 - e) phi(u) + e phi(-u)`.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown kind.

    Reference:
      Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.simpo_loss(jnp.array([-0.9]), jnp.array([-1.4])).round(6))
      [0.474077]
    """
    _checks.number("beta", beta, above=0)
    _checks.number("gamma_beta_ratio", gamma_beta_ratio, at_least=0)
    _checks.option("kind", kind, ("sigmoid", "hinge"))
    coefficients = _smoothing(label_smoothing)
    pairs = prepare(where, weights, chosen=chosen, rejected=rejected)
    mean_w, mean_l = pairs.arrays
    return pairs.finish(_of_scores(kind, mean_w - gamma_beta_ratio, mean_l, beta, *coefficients))


def cpo_loss(
    chosen: Pairs,
    rejected: Pairs,
    chosen_nll: Pairs | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """Contrastive preference optimization (CPO): `softplus(-beta (log pi_w - log pi_l)) + alpha nll_w`.

    DPO without a reference. The likelihood of the chosen response holds the policy near the data instead.

    Args:
      chosen: `[*pairs]`, the policy's log-probability of the chosen response (`sequence_log_prob`).
      rejected: `[*pairs]`, that of the rejected response.
      chosen_nll: `[*pairs]`, the negative log-likelihood of the chosen response; None: `-chosen`. Some implementations
        take the mean over tokens, `-sequence_log_prob(..., reduction="mean")`.
      beta: scale of the margin, above 0.
      alpha: coefficient of the likelihood, 0 or more.
      kind: the first term, `"sigmoid"`, `"hinge"` or `"ipo"`, as in `dpo_loss` with log-probabilities as log-ratios.
      label_smoothing: the probability that a label is wrong, in [0, 1], as in `dpo_loss`.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown kind.

    Reference:
      Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
      Translation".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.cpo_loss(jnp.array([-3.0]), jnp.array([-5.0])).round(6))
      [3.598139]
    """
    _checks.number("beta", beta, above=0)
    _checks.number("alpha", alpha, at_least=0)
    _checks.option("kind", kind, ("sigmoid", "hinge", "ipo"))
    coefficients = _smoothing(label_smoothing)
    pairs, chosen, rejected, nll = _with_likelihood(where, weights, chosen, rejected, chosen_nll)
    return pairs.finish(_of_scores(kind, chosen, rejected, beta, *coefficients) + alpha * nll)


def orpo_loss(
    chosen: Pairs,
    rejected: Pairs,
    chosen_nll: Pairs | None = None,
    *,
    beta: float = 0.1,
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """Odds ratio preference optimization (ORPO): `nll_w + beta softplus(-(o_w - o_l))`, without a reference.

    m is the mean log-probability of a response's tokens, and `o = m - log(1 - e^m)` the log-odds of `e^m`, for the
    chosen response (w) and the rejected one (l). It does fine-tuning and preference optimization at once.

    Args:
      chosen: `[*pairs]`, the mean log-probability of the chosen response's tokens:
        `sequence_log_prob(..., reduction="mean")`.
      rejected: `[*pairs]`, that of the rejected response.
      chosen_nll: `[*pairs]`, the negative log-likelihood of the chosen response, the loss of fine-tuning; None:
        `-chosen`. (Some implementations count the tokens of the prompt in it, too.)
      beta: coefficient of the odds ratio, 0 or more; the paper's lambda.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count. A mean log-probability within rounding of 0
      gets no gradient from the odds.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.orpo_loss(jnp.array([-0.9]), jnp.array([-1.4])).round(6))
      [0.939052]
    """
    _checks.number("beta", beta, at_least=0)
    pairs, chosen, rejected, nll = _with_likelihood(where, weights, chosen, rejected, chosen_nll)
    return pairs.finish(nll + beta * _of_scores("sigmoid", _log_odds(chosen), _log_odds(rejected), 1))


def _with_likelihood(
    where: Any, weights: Any, chosen: Any, rejected: Any, nll: Any
) -> tuple[Samples, Array, Array, Array]:
    """The checked arguments, both log-probabilities, and the negative log-likelihood of the chosen response."""
    others = {} if nll is None else {"chosen_nll": nll}
    pairs = prepare(where, weights, chosen=chosen, rejected=rejected, **others)
    chosen, rejected, *given = pairs.arrays
    return pairs, chosen, rejected, given[0] if given else -chosen


def _log_odds(log_prob: Array) -> Array:
    """`m - log(1 - e^m)`; the odds of a probability within rounding of 1 are those of the largest number below."""
    m = jnp.minimum(log_prob, -jnp.finfo(log_prob.dtype).eps)
    return m - jnp.log(-jnp.expm1(m))


def kto_loss(
    log_prob: Float[Array, "*samples"],
    reference: Float[Array, "*samples"],
    desirable: Bool[Array, "*samples"],
    *,
    baseline: float | Float[Array, ...] = 0.0,
    beta: float = 0.1,
    kind: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*samples"] | None = None,
) -> Float[Array, "*samples"]:
    """Kahneman-Tversky optimization (KTO): `w sigmoid(-u)`, `u = beta (r - z)` if desirable, else `beta (z - r)`.

    Responses are judged one by one: there are no pairs. `r = log pi - log ref` is the log-ratio of policy and
    reference, z the `baseline`, and w the weight of desirable or of undesirable responses. By `kind`:

    * `"kto"`: `sigmoid(-u)`. z is an estimate of `KL(pi || ref)`: `max(0, mean(r'))`, where r' are the log-ratios of
      responses to other prompts, such as those of the batch shifted by one. With z = 0 it is APO-zero without pairs.
    * `"bco"`: `softplus(-u)`, the logistic loss of a classifier. z is a moving average of r over all responses.

    Args:
      log_prob: `[*samples]`, the policy's log-probability of each response (`sequence_log_prob`).
      reference: `[*samples]`, that of the reference, a constant to the gradient.
      desirable: `[*samples]` booleans, True for a response to be made more likely.
      baseline: z, a number or an array that broadcasts to `[*samples]`, a constant to the gradient.
      beta: how strongly the policy is held to the reference, above 0.
      kind: which loss.
      desirable_weight: w of desirable responses, 0 or more.
      undesirable_weight: w of the others, 0 or more. The paper balances them: weight times number of the desirable
        responses should be 1 to 4/3 times weight times number of the others.
      where: booleans that broadcast to `[*samples]`, True = counts.
      weights: `[*samples]`, multiply the losses.

    Returns:
      Losses `[*samples]`, float32 or wider; 0 for a response that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown kind.

    Reference:
      Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization"; Jung et al., "Binary Classifier
      Optimization for Large Language Model Alignment" (BCO).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_ratio, desirable = jnp.array([0.8, -0.5]), jnp.array([True, False])
      >>> others = jnp.array([0.5, -0.1])  # of the same responses to each other's prompts
      >>> baseline = jnp.maximum(jnp.mean(others), 0)
      >>> print(jaxsoft.losses.kto_loss(log_ratio, jnp.zeros(2), desirable, baseline=baseline).round(6))
      [0.485004 0.482507]
    """
    _checks.number("beta", beta, above=0)
    _checks.option("kind", kind, ("kto", "bco"))
    _checks.number("desirable_weight", desirable_weight, at_least=0)
    _checks.number("undesirable_weight", undesirable_weight, at_least=0)
    samples = prepare(where, weights, log_prob=log_prob, reference=reference)
    log_prob, reference = samples.arrays
    _checks.boolean("desirable", desirable)
    _checks.shape("desirable", desirable, log_prob.shape, "that of log_prob")
    r = log_prob - lax.stop_gradient(reference) - spread("baseline", baseline, log_prob)
    u = beta * jnp.where(desirable, r, -r)
    loss = sigmoid(-u) if kind == "kto" else softplus(-u)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return samples.finish(weigh(loss, weight.astype(loss.dtype)))


def xpo_loss(
    chosen: Pairs,
    rejected: Pairs,
    reference_chosen: Pairs,
    reference_rejected: Pairs,
    reference_sample: Pairs,
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
    kind: str = "sigmoid",
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """Exploratory preference optimization (XPO): `dpo_loss + alpha log pi(y~)`.

    Of the two responses to a prompt one is sampled from the policy and one, y~, from the reference; a judge says which
    is chosen. The second term lowers the probability of the reference's response, so that the policy explores.

    Args:
      chosen: `[*pairs]`, as in `dpo_loss`.
      rejected: `[*pairs]`.
      reference_chosen: `[*pairs]`.
      reference_rejected: `[*pairs]`.
      reference_sample: `[*pairs]`, the policy's log-probability of the response that the reference sampled:
        `chosen` where the judge chose that one, else `rejected`.
      beta: how strongly the policy is held to the reference, above 0.
      alpha: coefficient of the exploration term, 0 or more.
      kind: `"sigmoid"` or `"ipo"`, as in `dpo_loss`.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown kind.

    Reference:
      Xie et al., "Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient
      RLHF".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> r_w, r_l, reference = jnp.array([0.8]), jnp.array([-0.5]), jnp.zeros(1)
      >>> print(jaxsoft.losses.xpo_loss(r_w, r_l, reference, reference, jnp.array([-30.0])).round(6))
      [0.629958]
    """
    _checks.number("beta", beta, above=0)
    _checks.number("alpha", alpha, at_least=0)
    _checks.option("kind", kind, ("sigmoid", "ipo"))
    log_probs = chosen, rejected, reference_chosen, reference_rejected
    pairs, r_w, r_l, (sample,) = _pairs(where, weights, *log_probs, reference_sample=reference_sample)
    return pairs.finish(_of_scores(kind, r_w, r_l, beta) + alpha * sample)


def margin_matching_loss(
    chosen: Pairs,
    rejected: Pairs,
    reference_chosen: Pairs,
    reference_rejected: Pairs,
    chosen_score: Pairs,
    rejected_score: Pairs,
    *,
    bt_beta: float,
    beta: float = 0.1,
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """Margin matching preference optimization (MMPO): `p softplus(-u) + (1 - p) softplus(u)`.

    DPO with soft labels from a Bradley-Terry model of the scores: `u = beta (r_w - r_l)` as in `dpo_loss`, and
    `p = sigmoid(bt_beta (score_w - score_l))`, a constant to the gradient. The loss is least at
    `u = bt_beta (score_w - score_l)`, whereas DPO (p = 1) has no minimum. The same loss trains a reward model: pass its
    rewards as `chosen` and `rejected`, references of 0 and `beta=1`.

    Args:
      chosen: `[*pairs]`, as in `dpo_loss`.
      rejected: `[*pairs]`.
      reference_chosen: `[*pairs]`.
      reference_rejected: `[*pairs]`.
      chosen_score: `[*pairs]`, the judge's score of the chosen response.
      rejected_score: `[*pairs]`, that of the rejected response.
      bt_beta: scale of the scores, 0 or more. It depends on the data; the authors use 0.3 to 2.2.
      beta: how strongly the policy is held to the reference, above 0.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Kim and Seo, "Margin Matching Preference Optimization: Enhanced Model Alignment with Granular Feedback".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import margin_matching_loss
      >>> r_w, r_l, reference = jnp.array([0.8]), jnp.array([-0.5]), jnp.zeros(1)
      >>> scores = jnp.array([7.0]), jnp.array([6.0])
      >>> print(margin_matching_loss(r_w, r_l, reference, reference, *scores, bt_beta=1.0).round(6))
      [0.665221]
    """
    _checks.number("bt_beta", bt_beta, at_least=0)
    _checks.number("beta", beta, above=0)
    log_probs = chosen, rejected, reference_chosen, reference_rejected
    pairs, r_w, r_l, (score_w, score_l) = _pairs(
        where, weights, *log_probs, chosen_score=chosen_score, rejected_score=rejected_score
    )
    return pairs.finish(_judged(r_w, r_l, beta, bt_beta * (score_w - score_l)))


def direct_nash_loss(
    first: Pairs,
    second: Pairs,
    reference_first: Pairs,
    reference_second: Pairs,
    first_win_rate: Pairs,
    second_win_rate: Pairs,
    *,
    eta: float = 1.0,
    beta: float = 0.1,
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """Direct Nash optimization (DNO): `s softplus(-u) + (1 - s) softplus(u)`, a regression on win rates.

    Logistic regression of `u = beta (r_1 - r_2)`, the difference of the log-ratios, on the responses' win rates:
    `s = sigmoid(eta (rho_1 - rho_2))`, a constant to the gradient. The win rate `rho_i` is the probability that
    response i is preferred to one sampled from the current iterate of the policy, which is also the reference. The
    practical variant of the paper keeps only pairs with a large judged gap and is `dpo_loss` against the previous
    iterate. *Reconstructed* from the paper's definition of the regression.

    Args:
      first: `[*pairs]`, the policy's log-probability of the first response (neither response is "chosen").
      second: `[*pairs]`, that of the second one.
      reference_first: `[*pairs]`, the current iterate's log-probability of the first response.
      reference_second: `[*pairs]`, that of the second one.
      first_win_rate: `[*pairs]`, the win rate of the first response, in [0, 1].
      second_win_rate: `[*pairs]`, that of the second one.
      eta: scale of the win rates, 0 or more.
      beta: how strongly the policy is held to the reference, above 0.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Rosset et al., "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import direct_nash_loss
      >>> r_1, r_2, reference = jnp.array([0.8]), jnp.array([-0.5]), jnp.zeros(1)
      >>> win_rates = jnp.array([0.7]), jnp.array([0.4])
      >>> print(direct_nash_loss(r_1, r_2, reference, reference, *win_rates).round(4))
      [0.6856]
    """
    _checks.number("eta", eta, at_least=0)
    _checks.number("beta", beta, above=0)
    log_probs = first, second, reference_first, reference_second
    rates = dict(first_win_rate=first_win_rate, second_win_rate=second_win_rate)
    names = "first", "second"
    pairs, r_1, r_2, (rho_1, rho_2) = _pairs(where, weights, *log_probs, names=names, **rates)
    return pairs.finish(_judged(r_1, r_2, beta, eta * (rho_1 - rho_2)))


def sparse_po_loss(
    chosen: Float[Array, "*pairs tokens"],
    rejected: Float[Array, "*pairs tokens2"],
    reference_chosen: Float[Array, "*pairs tokens"],
    reference_rejected: Float[Array, "*pairs tokens2"],
    chosen_kl: Float[Array, "*pairs tokens"],
    rejected_kl: Float[Array, "*pairs tokens2"],
    *,
    chosen_mask: Float[Array, "*pairs tokens"],
    rejected_mask: Float[Array, "*pairs tokens2"],
    chosen_kl_mask: Float[Array, "*pairs tokens"] | None = None,
    rejected_kl_mask: Float[Array, "*pairs tokens2"] | None = None,
    beta: float = 0.1,
    where: Bool[Array, ...] | None = None,
    weights: Pairs | None = None,
) -> Pairs:
    """SparsePO: `softplus(-beta (s_w - s_l))`, with `s = sum_t m_t r_t + n_t KL_t` and soft masks m, n.

    Token-level DPO in which the masks say how much the reward and the divergence of a token count:
    `r_t = log pi(a_t) - log ref(a_t)`, and `KL_t = KL(ref || pi)` over the vocabulary at token t. Log-probabilities,
    divergences and masks have gradients, the reference has none. (The divergence of the chosen response lowers the
    loss; token-level DPO stops its gradient, which `lax.stop_gradient(chosen_kl)` does here.) *Reconstructed* from the
    abstract and from token-level DPO, which has the same loss with masks of 1.

    Args:
      chosen: `[*pairs, tokens]`, the policy's log-probabilities of the chosen response's tokens.
      rejected: `[*pairs, tokens2]`, those of the rejected response's tokens.
      reference_chosen: `[*pairs, tokens]`, the reference's log-probabilities.
      reference_rejected: `[*pairs, tokens2]`.
      chosen_kl: `[*pairs, tokens]`, `KL(ref || pi)` at each token.
      rejected_kl: `[*pairs, tokens2]`.
      chosen_mask: `[*pairs, tokens]`, the mask m, 0 or more; 0 for padding, whose other values are then ignored.
      rejected_mask: `[*pairs, tokens2]`.
      chosen_kl_mask: `[*pairs, tokens]`, the mask n; None: the same as m.
      rejected_kl_mask: `[*pairs, tokens2]`.
      beta: scale of the scores, above 0.
      where: booleans that broadcast to `[*pairs]`, True = counts.
      weights: `[*pairs]`, multiply the losses.

    Returns:
      Losses `[*pairs]`, float32 or wider; 0 for a pair that does not count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Christopoulou et al., "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks"; Zeng et al.,
      "Token-level Direct Preference Optimization".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import sparse_po_loss
      >>> r_w, r_l = jnp.array([0.2, -0.1, 0.2]), jnp.array([-0.2, -0.5])
      >>> kl_w, kl_l = jnp.array([0.02, 0.05, 0.01]), jnp.array([0.03, 0.04])
      >>> masks = dict(chosen_mask=jnp.array([1, 0, 0.5]), rejected_mask=jnp.array([0.3, 1]))
      >>> zeros = jnp.zeros(3), jnp.zeros(2)
      >>> print(sparse_po_loss(r_w, r_l, *zeros, kl_w, kl_l, **masks).round(6))
      0.652221
    """
    _checks.number("beta", beta, above=0)
    score_w = _sparse_score("chosen", chosen, reference_chosen, chosen_kl, chosen_mask, chosen_kl_mask)
    score_l = _sparse_score(
        "rejected", rejected, reference_rejected, rejected_kl, rejected_mask, rejected_kl_mask
    )
    pairs = prepare(where, weights, chosen=score_w, rejected=score_l)
    score_w, score_l = pairs.arrays
    return pairs.finish(_of_scores("sigmoid", score_w, score_l, beta))


def _sparse_score(name: str, log_prob: Any, reference: Any, kl: Any, m: Any, n: Any) -> Array:
    """`sum_t m r + n KL` of one response, with the masks m and n (m where n is None)."""
    _check_tokens(name, log_prob)
    arrays = {name: log_prob, f"reference_{name}": reference, f"{name}_kl": kl, f"{name}_mask": m}
    arrays[f"{name}_kl_mask"] = m if n is None else n
    log_prob, reference, kl, m, n = prepare(None, **arrays).arrays
    return jnp.sum(weigh(log_prob - lax.stop_gradient(reference), m) + weigh(kl, n), axis=-1)


def extrapolate_policy(new: PyTree, old: PyTree, *, alpha: float = 0.3) -> PyTree:
    """Accelerated preference optimization: `new + alpha (new - old)`, of the parameters of two iterates of a policy.

    Each outer iteration trains on preferences with the last policy as the reference, and then goes a step further in
    the same direction, as momentum does. `extrapolate_log_probs` does the same to the policies themselves.
    *Reconstructed* from the abstract.

    Args:
      new: arrays in any pytree, the parameters after the iteration. Leaves that are not floating stay as they are.
      old: those before it, of the same structure and shapes.
      alpha: how far to extrapolate; 0 stays at `new`. May be traced.

    Returns:
      A pytree like `new`, with its dtypes.

    Raises:
      TypeError: alpha that is not a number.
      ValueError: trees of different structure, arrays of different shapes.

    Reference:
      He et al., "Accelerated Preference Optimization for Large Language Model Alignment".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> new, old = {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([0.0, 3.0])}
      >>> print(jaxsoft.losses.extrapolate_policy(new, old)["kernel"].round(6))
      [1.3 1.7]
    """
    _checks.number("alpha", alpha)

    def extrapolate(path, new, old):
        new, old = jnp.asarray(new), jnp.asarray(old)
        _checks.shape(f"old{jax.tree_util.keystr(path)}", old, new.shape, "that of new")
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        start, end = (a.astype(accumulation_dtype(new.dtype)) for a in (old, new))
        return (end + alpha * (end - start)).astype(new.dtype)

    return jax.tree_util.tree_map_with_path(extrapolate, new, old)


def extrapolate_log_probs(
    new_logits: Float[Array, "*rows columns"],
    old_logits: Float[Array, "*rows columns"],
    *,
    alpha: float = 0.3,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows columns"]:
    """The log-probabilities of the policy proportional to `p_new (p_new / p_old)^alpha`, from the logits of both.

    Needs whole rows. To sample from this policy, or to score tokens, without storing logits, extrapolate the heads into
    a single one: `jaxsoft.linear_logits(concatenate([(1 + alpha) * h_new, -alpha * h_old], -1), concatenate([w_new,
    w_old]))`. *Reconstructed*, as `extrapolate_policy` is.

    Args:
      new_logits: `[*rows, columns]`, logits or log-probabilities of the newer policy.
      old_logits: those of the older one.
      alpha: how far to extrapolate; 0 stays at the newer policy.
      axis: the axis of a row.
      where: booleans that broadcast to the logits, True = counts. A logit of -inf in either is an absent entry.

    Returns:
      Log-probabilities of the logits' shape, float32 or wider; -inf for absent entries.

    Raises:
      TypeError: logits that are not floating or are `linear_logits`, or an alpha that is not a number.
      ValueError: an argument of a wrong shape.

    Reference:
      He et al., "Accelerated Preference Optimization for Large Language Model Alignment".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> new, old = jnp.array([1.4, 0.2, 0.0]), jnp.array([1.0, 0.5, 0.0])
      >>> print(jnp.exp(jaxsoft.losses.extrapolate_log_probs(new, old)).round(6))
      [0.683595 0.166895 0.14951 ]
    """
    _checks.number("alpha", alpha)
    new, in_new, axis = present_scores(new_logits, axis, where, "extrapolate_log_probs")
    old, in_old, _ = present_scores(old_logits, axis, where, "extrapolate_log_probs")
    _checks.shape("old_logits", old, new.shape, "that of new_logits")
    present = in_new & in_old
    return log_softmax(jnp.where(present, new + alpha * (new - old), -jnp.inf), axis=axis)


def token_rewards(
    log_prob: Float[Array, "*batch tokens"],
    reference: Float[Array, "*batch tokens"],
    *,
    beta: float = 0.1,
    to_go: bool = False,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*batch tokens"]:
    """The rewards that DPO implies for each token, `beta (log pi(a_t | s_t) - log ref(a_t | s_t))`.

    Their sum is the implicit reward of the sequence; its difference between two responses is the margin of `dpo_loss`.
    With `to_go`, the sums from each token to the last: the reward still to come, for credit assignment.

    Args:
      log_prob: `[*batch, tokens]`, the policy's log-probabilities of the tokens.
      reference: `[*batch, tokens]`, the reference's, a constant to the gradient.
      beta: how strongly the policy is held to the reference, above 0.
      to_go: whether to sum from each token to the last.
      where: booleans that broadcast to the log-probabilities, True = counts; False: reward 0 (with `to_go`, the sum of
        the rewards after it).

    Returns:
      `[*batch, tokens]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Rafailov et al., "From r to Q*: Your Language Model is Secretly a Q-Function".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_prob, reference = jnp.array([-1.2, -0.4, -0.9]), jnp.array([-1.0, -0.7, -1.1])
      >>> print(jaxsoft.losses.token_rewards(log_prob, reference).round(6))
      [-0.02  0.03  0.02]
      >>> print(jaxsoft.losses.token_rewards(log_prob, reference, to_go=True).round(6))
      [0.03 0.05 0.02]
    """
    _checks.number("beta", beta, above=0)
    _checks.flag("to_go", to_go)
    _check_tokens("log_prob", log_prob)
    log_prob, reference = prepare(where, log_prob=log_prob, reference=reference).arrays
    rewards = beta * (log_prob - lax.stop_gradient(reference))
    return _to_go(rewards) if to_go else rewards


def _to_go(x: Array) -> Array:
    """The sums from each entry of the last axis to its end."""
    return lax.cumsum(x, axis=x.ndim - 1, reverse=True)


def oreo_loss(
    log_prob: Float[Array, "*batch tokens"],
    reference: Float[Array, "*batch tokens"],
    values: Float[Array, "*batch tokens"],
    reward: Float[Array, "*batch"],
    *,
    beta: float = 0.01,
    kind: str = "suffix",
    clip: float | None = None,
    kl: Float[Array, "*batch tokens"] | None = None,
    kl_coefficient: float | Float[Array, ""] = 0.01,
    states: Bool[Array, ...] | None = None,
    where: Bool[Array, ...] | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """OREO: the squared residuals of the soft Bellman equation, `mean_t e_t^2`, for the policy and for its value.

    With the log-ratio `r_t = log pi - log ref` of token t, `G_t = sum_{i >= t} r_i`, the value V_t of the state before
    token t and the reward R at the end, by `kind`:

    * `"suffix"`: `e_t = beta G_t + V_t - R`, that is `mean_t (beta sum_{i >= t} (log pi_i - log ref_i) + V_t - R)^2`.
    * `"token"`: the same number, in which only the term r_t has a gradient.
    * `"single_step"`: `e_t = beta r_t + V_t - V_{t+1}`; at the end, `beta r_t + V_t - R`.
    * `"trajectory"`: as `"suffix"`, for the first state only.

    There is no reward before the end. With `kl`, the policy's loss is `mean_t e_t^2 + kl_coefficient mean_t kl_t`,
    which keeps the policy near the reference, as in the authors' runs. kl is the exact divergence,
    `distillation_loss(reference_logits, logits, stop_teacher_gradient=False)` of logits that are never stored, or
    `sampled_kl(log_prob, reference)`. `kl_coefficient_loss` adapts the coefficient to a target.

    Args:
      log_prob: `[*batch, tokens]`, the policy's log-probabilities of the tokens.
      reference: `[*batch, tokens]`, the reference's, a constant to the gradient.
      values: `[*batch, tokens]`, the values of the states in which the tokens were chosen.
      reward: `[*batch]`, the reward of the finished sequence; a constant to the gradient.
      beta: coefficient of the log-ratios, above 0.
      kind: which residual.
      clip: clips `G_t` to [-clip, clip] (`"single_step"`: the sum over its step), above 0.
      kl: `[*batch, tokens]`, the divergence from the reference at each token; its mean is over all tokens that count,
        states or not. None: no such term.
      kl_coefficient: coefficient of the divergence, 0 or more; a constant to the gradient.
      states: booleans that broadcast to `[*batch, tokens]`, True for tokens that begin a step: only these have a
        residual, and a step of `"single_step"` ends where the next one begins. None: every token that counts.
      where: booleans that broadcast to the log-probabilities, True = counts: the tokens that the policy chose.

    Returns:
      `(policy_loss, value_loss)`, each `[*batch]`, float32 or wider. Their values are equal, apart from the term of the
      divergence; the first has the gradient for `log_prob` (and `kl`), the second the one for `values`. 0 for a
      sequence without states, or without tokens.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown kind.

    Reference:
      Wang et al., "Offline Reinforcement Learning for LLM Multi-Step Reasoning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> log_prob, reference = jnp.array([-1.2, -0.4, -0.9]), jnp.array([-1.0, -0.7, -1.1])
      >>> values = jnp.array([0.6, 0.7, 0.9])
      >>> policy_loss, value_loss = jaxsoft.losses.oreo_loss(log_prob, reference, values, jnp.array(1.0), beta=0.1)
      >>> print(policy_loss.round(6), value_loss.round(6))
      0.0686 0.0686
    """
    _checks.number("beta", beta, above=0)
    _checks.option("kind", kind, ("suffix", "token", "single_step", "trajectory"))
    if clip is not None:
        _checks.number("clip", clip, above=0)
    _checks.number("kl_coefficient", kl_coefficient, at_least=0)
    _check_tokens("log_prob", log_prob)
    divergence = {} if kl is None else {"kl": kl}
    tokens = prepare(where, log_prob=log_prob, reference=reference, values=values, **divergence)
    log_prob, reference, values, *divergences = tokens.arrays
    check_floats("reward", reward, log_prob.shape[:-1], "one number per sequence")
    counts = state = jnp.ones(log_prob.shape, bool) if tokens.where is None else tokens.where
    if states is not None:
        _checks.boolean("states", states)
        _checks.broadcastable("states", states, log_prob.shape, "that of log_prob")
        state = state & states
    if kind == "trajectory":
        state = state & (jnp.cumsum(state, axis=-1) == 1)

    values = jnp.where(state, values, 0)
    any_state = jnp.any(state, axis=-1)
    reward = lax.stop_gradient(jnp.where(any_state, jnp.asarray(reward, values.dtype), 0))[..., None]
    ratio = log_prob - lax.stop_gradient(reference)
    gain, target = _to_go(ratio), reward
    if kind == "token":
        gain = ratio + lax.stop_gradient(gain - ratio)
    if kind == "single_step":
        following, last = _next(state)
        gain = gain - jnp.where(last, 0, jnp.take_along_axis(gain, following, axis=-1))
        target = jnp.where(last, reward, jnp.take_along_axis(values, following, axis=-1))
    if clip is not None:
        gain = jnp.clip(gain, -clip, clip)

    def mean(x, counts):
        total = jnp.sum(jnp.where(counts, x, 0), axis=-1)
        return safe_divide(total, jnp.sum(counts, axis=-1).astype(total.dtype))

    error = values - target
    policy_loss = mean((beta * gain + lax.stop_gradient(error)) ** 2, state)
    value_loss = mean((beta * lax.stop_gradient(gain) + error) ** 2, state)
    for kl in divergences:
        policy_loss += lax.stop_gradient(kl_coefficient) * mean(kl, counts)
    return policy_loss, value_loss


def _next(state: Array) -> tuple[Array, Array]:
    """For each position on the last axis, the next one after it that is True (0 if none is), and whether none is."""
    size = state.shape[-1]
    places = jnp.where(state, jnp.arange(size), size)
    following = lax.cummin(places, axis=state.ndim - 1, reverse=True)[..., 1:]
    following = jnp.concatenate([following, jnp.full_like(places[..., :1], size)], axis=-1)
    last = following == size
    return jnp.where(last, 0, following), last
