"""Uncertainty of ensembles, of pairs of answers, and mixtures of two classifiers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, log_or_neg_inf
from jaxsoft.normalizers import log_softmax
from jaxsoft.normalizers.inner import per_row, present_scores
from jaxsoft.rows.inner import rows_of


class PredictiveUncertainty(NamedTuple):
    """The uncertainty of a prediction in nats, each `[*rows]`: `total = aleatoric + epistemic`.

    Attributes:
      total: the expected cross-entropy of the predictions and the true model.
      aleatoric: the entropy that remains if the model is known.
      epistemic: the expected KL divergence of the predictions from the true model.
    """

    total: Array
    aleatoric: Array
    epistemic: Array


def _members(logits: Any) -> Array:
    """Checked log-probabilities `[*rows, members, classes]`."""
    _checks.floating("logits", logits)
    if logits.ndim < 2 or logits.shape[-2] == 0:
        raise ValueError(
            f"logits must have shape [*rows, members, classes] with a member at least, got shape {tuple(logits.shape)}"
        )
    x = jnp.asarray(logits, accumulation_dtype(logits.dtype))
    return jax.nn.log_softmax(x, axis=-1)


def _expectation(p: Array, values: Array) -> Array:
    """`sum_j p_j values_j`, in which 0 times anything is 0."""
    return jnp.sum(jnp.where(p == 0, 0, p * jnp.where(p == 0, 0, values)), axis=-1)


def predictive_uncertainty(
    logits: Float[Array, "*rows members classes"],
    *,
    prediction: str = "expectation",
    truth: str = "expectation",
) -> PredictiveUncertainty:
    """Total, aleatoric and epistemic uncertainty of an ensemble or a posterior, in nine variants.

    The total is the cross-entropy of the predicting model, relative to an approximation of the true one:

    | `prediction`, `truth` | predicting model | true model |
    | --- | --- | --- |
    | `"member"` | the first member | the last member |
    | `"average"` | the mean of the probabilities | the mean of the probabilities |
    | `"expectation"` | a random member | a random member |

    Known ones are `mutual_information` (expectation, average), `expected_pairwise_kl` (expectation, expectation), which
    is the default, and the reverse mutual information (average, expectation).

    Args:
      logits: `[*rows, members, classes]`: logits or log-probabilities; -inf is probability 0.
      prediction: the predicting model.
      truth: the approximation of the true model.

    Returns:
      A `PredictiveUncertainty` with `[*rows]` each, float32 or wider. Total and epistemic are infinite where a class
      that is predicted is impossible for the true model.

    Raises:
      TypeError: logits that are not floating.
      ValueError: logits without members, or an unknown variant.

    Reference:
      Schweighofer et al., "On Information-Theoretic Measures of Predictive Uncertainty".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import predictive_uncertainty
      >>> u = predictive_uncertainty(jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]])))
      >>> print(u.total.round(5), u.aleatoric.round(5), u.epistemic.round(5))
      0.63343 0.49905 0.13438
    """
    kinds = ("member", "average", "expectation")
    _checks.option("prediction", prediction, kinds)
    _checks.option("truth", truth, kinds)
    log_p = _members(logits)
    average = jax.nn.logsumexp(log_p, axis=-2, keepdims=True) - jnp.log(log_p.shape[-2]).astype(log_p.dtype)
    predicting = {"member": log_p[..., :1, :], "average": average, "expectation": log_p}[prediction]
    true = {"member": log_p[..., -1, :], "average": average[..., 0, :], "expectation": jnp.mean(log_p, -2)}[
        truth
    ]
    p, true = jnp.exp(predicting), true[..., None, :]
    aleatoric = -_expectation(p, predicting)
    epistemic = _expectation(p, jnp.where(p == 0, 0, predicting) - true)
    aleatoric, epistemic = jnp.mean(aleatoric, axis=-1), jnp.maximum(jnp.mean(epistemic, axis=-1), 0)
    return PredictiveUncertainty(aleatoric + epistemic, aleatoric, epistemic)


def mutual_information(logits: Float[Array, "*rows members classes"]) -> Float[Array, "*rows"]:
    """`H(mean_m p_m) - mean_m H(p_m)`: the information that the label has about the member (BALD, Jensen-Shannon).

    Of attention maps it selects noise for a video diffusion model: members are noises or masks, classes are keys, and
    the logits are logarithms of attention weights.

    Args:
      logits: `[*rows, members, classes]`: logits or log-probabilities; -inf is probability 0.

    Returns:
      `[*rows]`, 0 to the logarithm of the number of members, float32 or wider.

    Raises:
      TypeError: logits that are not floating.
      ValueError: logits without members.

    References:
      Schweighofer et al., "On Information-Theoretic Measures of Predictive Uncertainty"; "Model Already Knows the Best
      Noise: Bayesian Active Noise Selection via Attention in Video Diffusion Model".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import mutual_information
      >>> print(mutual_information(jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]]))).round(6))
      0.063288
    """
    return predictive_uncertainty(logits, prediction="expectation", truth="average").epistemic


def expected_pairwise_kl(logits: Float[Array, "*rows members classes"]) -> Float[Array, "*rows"]:
    """`mean_(m, k) KL(p_m || p_k)` over all pairs of members, equal ones included.

    The mutual information plus the reverse mutual information.

    Args:
      logits: `[*rows, members, classes]`: logits or log-probabilities; -inf is probability 0.

    Returns:
      `[*rows]`, 0 or more, float32 or wider; infinite where a class is possible for one member and not for another.

    Raises:
      TypeError: logits that are not floating.
      ValueError: logits without members.

    Reference:
      Schweighofer et al., "On Information-Theoretic Measures of Predictive Uncertainty".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import expected_pairwise_kl
      >>> print(expected_pairwise_kl(jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]]))).round(6))
      0.134382
    """
    return predictive_uncertainty(logits, prediction="expectation", truth="expectation").epistemic


def t_similarity(
    logits: Float[Array, "*rows members classes"], *, per_class: bool = False
) -> Float[Array, ...]:
    """`mean over m != k of sum_c p_mc p_kc`: how much the heads of an ensemble agree on an example.

    A confidence for pseudo-labels. Adding `gamma * mean(t_similarity)` of unlabelled examples to the loss of the
    labelled ones makes the heads diverse.

    Args:
      logits: `[*rows, members, classes]`: logits or log-probabilities of two members or more.
      per_class: whether to leave the sum over the classes out.

    Returns:
      `[*rows]` in [0, 1], or `[*rows, classes]`, float32 or wider.

    Raises:
      TypeError: logits that are not floating.
      ValueError: logits with fewer than two members.

    Reference:
      Odonnat et al., "Leveraging Ensemble Diversity for Robust Self-Training in the Presence of Sample Selection
      Bias".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import t_similarity
      >>> print(t_similarity(jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]]))).round(6))  # 0.54 + 0.04
      0.58
    """
    _checks.flag("per_class", per_class)
    p = jnp.exp(_members(logits))
    members = p.shape[-2]
    if members < 2:
        raise ValueError(f"logits must have two members or more, got shape {tuple(logits.shape)}")
    pairs = jnp.sum(p, axis=-2) ** 2 - jnp.sum(p * p, axis=-2)
    similarity = pairs / (members * (members - 1))
    return similarity if per_class else jnp.sum(similarity, axis=-1)


def mix_probabilities(
    logits: Float[Array, "*rows columns"],
    robust_logits: Float[Array, "*rows columns"],
    *,
    weight: float | Float[Array, "*rows"],
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows columns"]:
    """`log((1 - a) softmax(x) + a softmax(h))`: a mixture of an accurate and a robust classifier.

    Scale the logits before to sharpen either. In the paper, `a` is the sigmoid of a small network's output.

    Args:
      logits: `[*rows, columns]`, floating, of the accurate classifier.
      robust_logits: the same shape, of the robust one; -inf in one of them is probability 0 in that one only.
      weight: a in [0, 1], a number or `[*rows]`. Its gradient at exactly 0 or 1 is that of the other part alone.
      axis: the axis of the classes.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      Log-probabilities of the logits' shape and dtype; -inf for absent classes.

    Raises:
      TypeError: an argument of a wrong dtype (for `linear_logits`, pass `logits.dense()`).
      ValueError: an argument of a wrong shape, or a weight outside [0, 1].

    Reference:
      Bai et al., "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import mix_probabilities
      >>> mixed = mix_probabilities(jnp.array([4.0, 1.0, 0.0]), jnp.array([0.2, 0.5, 0.1]), weight=0.5)
      >>> print((1000 * jnp.exp(mixed)).round())
      [622. 231. 148.]
    """
    if _checks.is_concrete_number(weight):
        _checks.number("weight", weight, at_least=0, at_most=1)
    x, x_present, axis = present_scores(logits, axis, where, "mix_probabilities")
    _checks.floating("robust_logits", robust_logits)
    _checks.shape("robust_logits", robust_logits, logits.shape, "the shape of the logits")
    h, h_present, _ = present_scores(robust_logits, axis, where, "mix_probabilities")
    dtype = jnp.promote_types(x.dtype, h.dtype)
    a = jnp.expand_dims(per_row("weight", weight, rows_of(x.shape, axis), dtype), axis).astype(dtype)
    first = log_softmax(x.astype(dtype), axis=axis, where=x_present) + log_or_neg_inf(1 - a)
    second = log_softmax(h.astype(dtype), axis=axis, where=h_present) + log_or_neg_inf(a)
    # logaddexp, whose derivative is NaN where both are -inf
    either = (first != -jnp.inf) | (second != -jnp.inf)
    mixed = jnp.logaddexp(jnp.where(either, first, 0), jnp.where(either, second, 0))
    return jnp.where(either, mixed, -jnp.inf).astype(logits.dtype)


def pair_covariance(
    first_log_probs: Float[Array, "*rows classes"], second_log_probs: Float[Array, "*rows classes classes"]
) -> Float[Array, "*rows classes classes"]:
    """`p(y_i, y_j) - p_1(y_i) p_2(y_j)`: the covariance of two answers that a model predicts one after the other.

    If the model is calibrated for pairs of independent answers, it is the covariance of the true probabilities, given
    what the model knows: its epistemic uncertainty.

    Args:
      first_log_probs: `[*rows, classes]`: log-probabilities of the first answer.
      second_log_probs: `[*rows, classes, classes]`: those of the second answer (last axis) given the first.

    Returns:
      `[*rows, classes, classes]`, float32 or wider. The rows sum to 0.

    Raises:
      TypeError: an argument that is not floating.
      ValueError: an argument of a wrong shape.

    Reference:
      Johnson et al., "Experts Don't Cheat: Learning What You Don't Know By Predicting Pairs".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import pair_covariance
      >>> joint = jnp.array([[0.3, 0.08, 0.02], [0.08, 0.3, 0.04], [0.02, 0.04, 0.12]])
      >>> first = joint.sum(1)
      >>> print(pair_covariance(jnp.log(first), jnp.log(joint / first[:, None]))[0].round(4))
      [ 0.14  -0.088 -0.052]
    """
    _checks.floating("first_log_probs", first_log_probs)
    _checks.floating("second_log_probs", second_log_probs)
    if first_log_probs.ndim == 0:
        raise ValueError("first_log_probs must have shape [*rows, classes], got a scalar")
    shape = (*first_log_probs.shape, first_log_probs.shape[-1])
    _checks.shape("second_log_probs", second_log_probs, shape, "[*rows, first answer, second answer]")
    dtype = accumulation_dtype(first_log_probs.dtype, second_log_probs.dtype)
    first = jnp.asarray(first_log_probs, dtype)
    given = jnp.exp(jnp.asarray(second_log_probs, dtype))
    p = jnp.exp(first)[..., None]
    # An answer that is impossible comes first with probability 0, whatever would follow.
    given = jnp.where(p == 0, 0, given)
    marginal = jnp.sum(p * given, axis=-2, keepdims=True)
    return p * (given - marginal)


def _pair(log_prob: Any, second_log_prob: Any) -> tuple[Array, Array]:
    _checks.floating("log_prob", log_prob)
    _checks.floating("second_log_prob", second_log_prob)
    _checks.shape("second_log_prob", second_log_prob, log_prob.shape, "the shape of log_prob")
    dtype = accumulation_dtype(log_prob.dtype, second_log_prob.dtype)
    return jnp.asarray(log_prob, dtype), jnp.asarray(second_log_prob, dtype)


def cheat_corrected_variance(
    log_prob: Float[Array, "*shape"], second_log_prob: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`V = p_1(y) (p_2(y | y) - p_1(y))`: the variance of the true probability of y, given what the model knows.

    A model that is sure of the probability does not change its mind when it sees an answer (it need not cheat).
    If it is calibrated for pairs, the true probability lies within `sqrt(V / beta)` of `p_1(y)`, except with
    probability beta.

    Args:
      log_prob: `[*shape]`: `log p_1(y)`.
      second_log_prob: the same shape: `log p_2(y | y)`, of the same answer after it was shown.

    Returns:
      `[*shape]`, float32 or wider; negative where the model is not calibrated: take `max(V, 0)` in the bound.

    Raises:
      TypeError: an argument that is not floating.
      ValueError: shapes that differ.

    Reference:
      Johnson et al., "Experts Don't Cheat: Learning What You Don't Know By Predicting Pairs".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import cheat_corrected_variance
      >>> print(cheat_corrected_variance(jnp.log(jnp.array([0.4])), jnp.log(jnp.array([0.75]))).round(6))
      [0.14]
    """
    first, second = (jnp.exp(a) for a in _pair(log_prob, second_log_prob))
    return jnp.where(first == 0, 0, first * (jnp.where(first == 0, 0, second) - first))


def cheat_corrected_confidence(
    log_prob: Float[Array, "*shape"], second_log_prob: Float[Array, "*shape"], *, clip: bool = False
) -> Float[Array, "*shape"]:
    """`C = p_1(y) / p_2(y | y)`: 1 where the model knows the probability of y, less where it would learn from it.

    If the model is calibrated for pairs, answers that are accepted where `1 - C < beta` have true probability 0 at
    a rate of at most `1 - mean C`, that is less than beta.

    Args:
      log_prob: `[*shape]`: `log p_1(y)`.
      second_log_prob: the same shape: `log p_2(y | y)`, of the same answer after it was shown.
      clip: whether to clip it to 1, which a model that is not calibrated may exceed.

    Returns:
      `[*shape]`, 0 or more, float32 or wider; 0 where `p_1(y)` is 0.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: shapes that differ.

    Reference:
      Johnson et al., "Experts Don't Cheat: Learning What You Don't Know By Predicting Pairs".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import cheat_corrected_confidence
      >>> print(cheat_corrected_confidence(jnp.log(jnp.array([0.4])), jnp.log(jnp.array([0.75]))).round(6))
      [0.533333]
    """
    _checks.flag("clip", clip)
    first, second = _pair(log_prob, second_log_prob)
    impossible = first == -jnp.inf
    log_c = jnp.where(impossible, 0, first - jnp.where(impossible, 0, second))
    log_c = jnp.minimum(log_c, 0) if clip else log_c
    return jnp.where(impossible, 0, jnp.exp(log_c))
