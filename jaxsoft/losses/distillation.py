"""Distillation.

Losses that compare a row of student logits with a teacher's. Both may be `linear_logits`, of different widths: neither
`[*rows, classes]` array is then stored, and the gradient of a frozen teacher is not computed.
`weighted_mean(distillation_loss, student, teacher, temperature=2.0)` computes each chunk of rows once for value and
gradient.

In the formulas `p` is the teacher's softmax, `q` the student's. A logit of -inf is probability 0 in its own row: a
teacher may be stored as its largest logits with -inf elsewhere. Where a formula divides by that 0, as `log(p / q)` does
at a class that only the student lacks, the loss is +inf, with gradient 0. A masked class is left out of both rows. The
loss is 0 where either row has no classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide
from jaxsoft.losses._common import (
    IGNORE_INDEX,
    LabelledRows,
    check_floats,
    check_weights,
    prepare,
    widened,
)
from jaxsoft.losses._divergences import alpha_term, js_term
from jaxsoft.losses._pairs import (
    PairTerm,
    check_second,
    log_softmax_of,
    of_second,
    pair_sum,
    per_mass,
    where_present,
    zero_init,
)
from jaxsoft.rows import Logits, RowReduction, reductions
from jaxsoft.rows import temperature as tempered
from jaxsoft.rows.inner import check_axis, check_range, rows_of

_DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")


def distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    stop_teacher_gradient: bool = True,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """Knowledge distillation: `T^2 D(softmax(teacher / T), softmax(student / T))`.

    The two KL divergences take one pass over both rows, the bounded divergences two. (For dense logits without a mask,
    `optax.losses.kl_divergence` computes the forward KL.)

    Args:
      logits: the student's, `[*rows, classes]`, a floating array or `linear_logits`.
      teacher_logits: the teacher's, of the same shape, an array or `linear_logits` (of any width).
      temperature: T, positive. The factor T^2 keeps the size of the gradient.
      divergence: D, `"forward_kl"`: `KL(p || q)`, which covers all modes of the teacher; `"reverse_kl"`: `KL(q || p)`,
        which seeks single modes; `"jensen_shannon"`: `JSD(p, q)`, the mean KL of both to their mean, at most log 2; or
        `"total_variation"`: `sum |p - q| / 2`.
      stop_teacher_gradient: whether to treat the teacher as a constant.
      axis: the axis of the classes.
      where: mask that broadcasts to the logits, True = counts; `mask[..., None]` leaves out whole rows.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without classes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown option.

    Reference:
      Hinton et al., "Distilling the Knowledge in a Neural Network"; Wijmans et al., "Cut Your Losses in
      Large-Vocabulary Language Models" (never storing logits).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student, teacher = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[3.0, 0.5, 0.2, -2.0, 1.0]])
      >>> print(jaxsoft.losses.distillation_loss(student, teacher, temperature=4.0).round(3))
      [0.238]
      >>> print(jaxsoft.losses.distillation_loss(student, teacher, divergence="jensen_shannon").round(6))
      [0.035815]
    """
    _checks.option("divergence", divergence, _DIVERGENCES)
    rows, teacher = _pair(logits, teacher_logits, temperature, stop_teacher_gradient, axis, where, weights)
    reverse = divergence == "reverse_kl"
    compared = rows.reduce(reductions.relative_entropy(teacher, reverse=not reverse))
    if divergence.endswith("kl"):
        loss = compared.divergence
    else:
        terms = _JENSEN_SHANNON if divergence == "jensen_shannon" else _TOTAL_VARIATION
        loss = rows.reduce(_second_pass(terms, compared, teacher))
    return rows.finish(temperature * temperature * loss)


def low_temperature_distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 5.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """LTD: `-sum_c softmax(t / T)_c log q_c`, cross-entropy to a teacher t with a temperature of its own.

    The student has no temperature, neither in training nor at test, so its gradients are not masked in an adversarial
    setting. *Reconstructed* from the paper's description; the default 5 is in the middle of its sweep.

    Args:
      logits: the student's, `[*rows, classes]`, a floating array or `linear_logits`.
      teacher_logits: the teacher's, of the same shape, an array or `linear_logits`; a constant.
      temperature: T, the teacher's, positive.
      axis: the axis of the classes.
      where: mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without classes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Chen and Lee, "LTD: Low Temperature Distillation for Robust Adversarial Training".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student, teacher = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[3.0, 0.5, 0.2, -2.0, 1.0]])
      >>> print(jaxsoft.losses.low_temperature_distillation_loss(student, teacher).round(6))
      [1.764328]
    """
    rows, teacher = _pair(logits, teacher_logits, 1.0, True, axis, where, weights)
    _checks.number("temperature", temperature, above=0)
    compared = rows.reduce(reductions.relative_entropy(widened(teacher) / temperature, reverse=True))
    return rows.finish(compared.cross_entropy)


def alpha_divergence(
    logits: Logits,
    teacher_logits: Logits,
    *,
    alpha: float,
    clip: float | None = None,
    stop_teacher_gradient: bool = True,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """`(sum_c q_c (p_c / q_c)^alpha - 1) / (alpha (alpha - 1))`, between KL(p || q) at 1 and KL(q || p) at 0.

    A large alpha penalizes a student that misses classes the teacher predicts; a negative alpha, one that predicts
    classes the teacher does not. Takes two passes over both rows; one at alpha 0 and 1.

    Args:
      logits: the student's, `[*rows, classes]`, a floating array or `linear_logits`.
      teacher_logits: the teacher's, of the same shape, an array or `linear_logits`.
      alpha: a static number.
      clip: upper limit of `(p / q)^alpha`; at alpha 0, of `p / q`; at alpha 1 nothing is clipped. The gradient is then
        the paper's, `sum_c w_c grad(-log q_c)` with constant weights `w = q ((p/q)^alpha / alpha +
        1 / (alpha (alpha - 1)))`: the true gradient where nothing is clipped, and of first order only.
      stop_teacher_gradient: whether to treat the teacher as a constant. With `clip` it always is one.
      axis: the axis of the classes.
      where: mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Divergences `[*rows]`, float32 or wider; 0 for a row without classes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "AlphaNet: Improved Training of Supernets with Alpha-Divergence".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student, teacher = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[3.0, 0.5, 0.2, -2.0, 1.0]])
      >>> print(jaxsoft.losses.alpha_divergence(student, teacher, alpha=-1.0).round(6))
      [0.252114]
      >>> print(jaxsoft.losses.alpha_divergence(student, teacher, alpha=-1.0, clip=5.0).round(6))
      [0.247898]
    """
    alpha = _checks.static_number("alpha", alpha)
    clip = None if clip is None else _checks.static_number("clip", clip, above=0)
    _checks.flag("stop_teacher_gradient", stop_teacher_gradient)
    rows, teacher = _pair(
        logits, teacher_logits, 1.0, stop_teacher_gradient or clip is not None, axis, where, weights
    )
    return rows.finish(_alpha_divergence(rows, teacher, alpha, clip))


def adaptive_alpha_divergence_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    clip: float | None = 5.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """AlphaNet: `max(D_alpha_min(p, q), D_alpha_max(p, q))`, the larger of two clipped alpha divergences.

    Each example gets the larger of `alpha_divergence` at `alpha_min` and at `alpha_max`. One penalizes overestimated
    uncertainty, the other underestimated uncertainty.

    Args:
      logits: the student's, `[*rows, classes]`, a floating array or `linear_logits`.
      teacher_logits: the teacher's, of the same shape, an array or `linear_logits`; a constant.
      alpha_min: a static number.
      alpha_max: a static number above `alpha_min`.
      clip: as in `alpha_divergence`; None for the exact divergences.
      axis: the axis of the classes.
      where: mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without classes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "AlphaNet: Improved Training of Supernets with Alpha-Divergence".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student, teacher = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[3.0, 0.5, 0.2, -2.0, 1.0]])
      >>> print(jaxsoft.losses.adaptive_alpha_divergence_loss(student, teacher).round(6))
      [0.247898]
    """
    alpha_min, alpha_max = (
        _checks.static_number("alpha_min", alpha_min),
        _checks.static_number("alpha_max", alpha_max),
    )
    if alpha_max <= alpha_min:
        raise ValueError(f"alpha_max must be above alpha_min={alpha_min}, got {alpha_max}")
    clip = None if clip is None else _checks.static_number("clip", clip, above=0)
    rows, teacher = _pair(logits, teacher_logits, 1.0, True, axis, where, weights)
    low, high = (_alpha_divergence(rows, teacher, a, clip) for a in (alpha_min, alpha_max))
    return rows.finish(jnp.maximum(low, high))


def ensemble_distillation_loss(
    logits: Logits,
    teacher_logits: Sequence[Logits],
    *,
    teacher_weights: Float[Array, " teachers"] | None = None,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """KL of the student to a mean of teachers, `KL(mean_k p_k || q)`: of their probabilities, not their logits.

    Needs no hard labels. Takes two passes over all rows, the first for the log-partition functions.

    Args:
      logits: the student's, `[*rows, classes]`, a floating array or `linear_logits`.
      teacher_logits: a list with each teacher's logits, of the same shape, arrays or `linear_logits`; constants.
      teacher_weights: `[teachers]`, non-negative, normalized to sum to 1; uniform by default.
      axis: the axis of the classes.
      where: mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without classes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Shen and Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks"
      (without its discriminator).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> teachers = [jnp.array([[3.0, 0.5, 0.2, -2.0, 1.0]]), jnp.array([[1.0, 1.5, 0.0, 0.0, 0.5]])]
      >>> print(jaxsoft.losses.ensemble_distillation_loss(student, teachers).round(6))
      [0.011987]
    """
    if not isinstance(teacher_logits, (list, tuple)) or not teacher_logits:
        raise TypeError(
            f"teacher_logits must be a list with the logits of at least one teacher, got "
            f"{_checks.describe(teacher_logits)}"
        )
    k = len(teacher_logits)
    pairs = [
        _pair(logits, t, 1.0, True, axis, where, weights, name=f"teacher_logits[{i}]")
        for i, t in enumerate(teacher_logits)
    ]
    rows, teachers = pairs[0][0], tuple(teacher for _, teacher in pairs)
    dtype = accumulation_dtype(logits.dtype)
    shares = jnp.full((k,), 1 / k, dtype)
    if teacher_weights is not None:
        check_floats("teacher_weights", teacher_weights, (k,), "one number per teacher")
        shares = (teacher_weights / jnp.sum(teacher_weights)).astype(dtype)
    each = reductions.log_partition()
    wanted = [each, *(of_second(each, teacher) for teacher in teachers)]
    partition, *partitions = rows.reduce(wanted)
    log_shares = jnp.broadcast_to(jnp.log(shares), (*partition.shift.shape, k))
    divergence = RowReduction(
        zero_init,
        _to_mixture,
        finalize=_mixture_finalize,
        args=(partition, partitions, log_shares),
        entry_args=teachers,
    )
    return rows.finish(rows.reduce(divergence))


def progressive_self_distillation_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    previous: Float[Array, "*rows classes"],
    *,
    alpha: float | Float[Array, ""],
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """PS-KD: `(1 - alpha) l - alpha sum_c previous_c log p_c`, `previous` the model's own earlier predictions.

    Cross-entropy to the target `(1 - alpha) onehot(label) + alpha previous`; p is the model's softmax, l its negative
    log-likelihood.

    Args:
      logits: `[*rows, classes]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      previous: probabilities from the previous epoch, of the logits' shape; a constant.
      alpha: in [0, 1], may be traced; `0.8 (epoch + 1) / epochs` in the paper, 0 while there is no history.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> logits, labels = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([0])
      >>> previous = jax.nn.softmax(jnp.array([[3.0, 0.5, 0.2, -2.0, 1.0]]))
      >>> print(jaxsoft.losses.progressive_self_distillation_loss(logits, labels, previous, alpha=0.4).round(6))
      [0.713424]
    """
    _checks.number("alpha", alpha, at_least=0, at_most=1)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    check_floats("previous", previous, logits.shape, "the shape of the logits")
    previous = jnp.moveaxis(lax.stop_gradient(previous), rows.axis, -1)
    hard, soft = rows.reduce((rows.label_statistics(), reductions.soft_label_statistics(previous)))
    return rows.finish((1 - alpha) * hard.nll + alpha * soft.nll)


def top_k_distillation_loss(
    logits: Logits,
    teacher_ids: Int[Array, "*rows k"],
    teacher_probabilities: Float[Array, "*rows k"],
    *,
    tail: str = "bucket",
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """KL of the student to the teacher's k largest probabilities, `sum_k p_k log(p_k / q_k)`.

    A stored teacher takes k probabilities per token. The student's q at k classes takes one pass.

    Args:
      logits: the student's, `[*rows, classes]`, a floating array or `linear_logits`.
      teacher_ids: `[*rows, k]` distinct class ids.
      teacher_probabilities: `[*rows, k]`, the teacher's probabilities of these classes; entries of 0 pad shorter
        lists. Constants.
      tail: how to treat the rest of the teacher's mass, `1 - sum_k p_k`: `"bucket"` compares it with the student's
        rest as one more class (a lower bound of the full KL); `"drop"` leaves it out (the minimum is then not at the
        teacher); `"renormalize"` scales the k probabilities to sum to 1.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider; +inf where a class with p > 0 is absent from the student's row.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or an unknown option.

    Reference:
      Hinton et al., "Distilling the Knowledge in a Neural Network".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student, ids = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[0, 1]])
      >>> print(jaxsoft.losses.top_k_distillation_loss(student, ids, jnp.array([[0.7, 0.2]])).round(6))
      [0.066761]
    """
    _checks.option("tail", tail, ("bucket", "drop", "renormalize"))
    axis = check_axis(logits, axis)
    shape = rows_of(logits.shape, axis)
    _checks.integers("teacher_ids", teacher_ids)
    if teacher_ids.shape[:-1] != shape or teacher_ids.ndim != len(shape) + 1:
        raise ValueError(
            f"teacher_ids must have shape {(*shape, 'k')} (k class ids per row), got shape {teacher_ids.shape}"
        )
    check_floats("teacher_probabilities", teacher_probabilities, teacher_ids.shape, "that of teacher_ids")
    check_weights(weights, shape)
    check_range("teacher_ids", teacher_ids, logits.shape[axis], None)
    rows = LabelledRows(logits, axis, where, None, as_ids(teacher_ids), False, weights)
    dtype = accumulation_dtype(logits.dtype)
    p = lax.stop_gradient(teacher_probabilities).astype(dtype)
    if tail == "renormalize":
        p = safe_divide(p, jnp.sum(p, axis=-1, keepdims=True))
    scores, partition = rows.reduce((reductions.take(rows.labels), reductions.log_partition()))
    shift, correction, log_sum = (a[..., None] for a in partition)
    absent = scores == -jnp.inf
    log_q = reductions.LogPartition(shift, correction, log_sum).log_softmax(jnp.where(absent, shift, scores))
    given = p != 0
    kl = jnp.where(given, p * (jnp.log(jnp.where(given, p, 1)) - log_q), 0 * log_q)
    loss = jnp.sum(jnp.where(absent & given, jnp.inf, kl), axis=-1)
    if tail == "bucket":
        kept = jnp.sum(jnp.where(absent | ~given, 0, jnp.exp(log_q)), axis=-1)
        rest_p, rest_q = jnp.maximum(1 - jnp.sum(p, axis=-1), 0), jnp.maximum(1 - kept, _TINY)
        some = rest_p > _ROUNDING
        rest_p = jnp.where(some, rest_p, 1)
        loss = loss + jnp.where(some, rest_p * (jnp.log(rest_p) - jnp.log(rest_q)), 0)
    return rows.finish(jnp.where(partition.log_sum == -jnp.inf, 0, loss))


_TINY, _ROUNDING = 1e-30, 1e-6  # the sum of k rounded probabilities is 1 to within a few units of 1e-7


def binary_distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    beta: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """BCKD: `sum_c |sigmoid(t_c) - sigmoid(s_c)|^beta BCE(s_c, sigmoid(t_c))`, each class a binary problem.

    For detectors and other models trained with sigmoids, which softmax distillation does not match. BCE is the binary
    cross-entropy. The factor before it is differentiated as well. For beta > 0 terms with s = t are 0. A class that is
    -inf for the student alone costs +inf.

    Args:
      logits: the student's s, `[*rows, classes]`, a floating array or `linear_logits`.
      teacher_logits: the teacher's t, of the same shape, an array or `linear_logits`; a constant.
      beta: exponent, 0 or more; 0 is plain binary cross-entropy to the teacher.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without classes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student, teacher = jnp.array([[1.0, 0.5]]), jnp.array([[2.0, -1.0]])
      >>> print(jaxsoft.losses.binary_distillation_loss(student, teacher).round(6))
      [0.361572]
    """
    _checks.number("beta", beta, at_least=0)
    rows, teacher = _pair(logits, teacher_logits, 1.0, True, axis, where, weights)
    shape = rows_of(logits.shape, rows.axis)
    exponent = jnp.broadcast_to(jnp.asarray(beta, accumulation_dtype(logits.dtype)), shape)
    loss, own, others = rows.reduce(
        (
            RowReduction(zero_init, _binary_update, args=(exponent,), entry_args=(teacher,)),
            reductions.count(),
            of_second(reductions.count(), teacher),
        )
    )
    return rows.finish(where_present(loss, (own > 0) & (others > 0)))


def squared_log_prob_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    teacher_log_prob: Float[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """SEL: `(log q_y - log p_y)^2`, for a teacher known only by its log-probability of the sampled label.

    Unlike cross-entropy weighted by that probability, it is unbiased. *Reconstructed* from the paper's setting.

    Args:
      logits: the student's, `[*rows, classes]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      teacher_log_prob: log p_y, `[*rows]`, the teacher's log-probability of the label; a constant.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Zhao and Zhu, "Towards the Fundamental Limits of Knowledge Transfer over Finite Domains".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, labels = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([0])
      >>> print(jaxsoft.losses.squared_log_prob_loss(logits, labels, jnp.log(jnp.array([0.7]))).round(6))
      [0.050961]
    """
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    check_floats("teacher_log_prob", teacher_log_prob, rows_of(logits.shape, rows.axis), "one number per row")
    target = lax.stop_gradient(teacher_log_prob)
    if rows.keep is not None:
        target = jnp.where(rows.keep, target, 0)
    label = rows.reduce(rows.label_statistics())
    return rows.finish(jnp.where(label.present, jnp.square(label.nll + target), 0))


def adapt_soft_labels(
    labels: Int[Array, "*rows"],
    teacher_probabilities: Float[Array, "*rows classes"],
    *,
    discard_below: float,
    trust_above: float,
    label_smoothing: float = 0.1,
) -> tuple[Float[Array, "*rows classes"], Float[Array, "*rows"]]:
    """FerKD: the teacher's soft label where the teacher is confident, the smoothed hard label elsewhere.

    The teacher's largest probability of a crop decides. Below `discard_below` the crop is left out (weight 0); from
    `trust_above` on it keeps the soft label; in between it gets `(1 - a) onehot + a / classes`. *Reconstructed*; the
    thresholds depend on the data and have no defaults.

    Args:
      labels: class ids `[*rows]`.
      teacher_probabilities: `[*rows, classes]`.
      discard_below: in [0, 1].
      trust_above: in [0, 1], at least `discard_below`.
      label_smoothing: a, the smoothing of the hard label, in [0, 1].

    Returns:
      Label distributions `[*rows, classes]` for `cross_entropy`, and its `weights` `[*rows]`, 0 or 1.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Shen, "FerKD: Surgical Label Adaptation for Efficient Distillation".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> p = jnp.array([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
      >>> q, weights = jaxsoft.losses.adapt_soft_labels(jnp.array([0, 1, 1]), p, discard_below=0.55, trust_above=0.8)
      >>> print(q[:, 0].round(2), weights)
      [0.9  0.05 0.05] [1. 1. 0.]
    """
    _checks.number("discard_below", discard_below, at_least=0, at_most=1)
    _checks.number("trust_above", trust_above, at_least=0, at_most=1)
    _checks.number("label_smoothing", label_smoothing, at_least=0, at_most=1)
    if all(map(_checks.is_concrete_number, (discard_below, trust_above))) and trust_above < discard_below:
        raise ValueError(f"trust_above must be at least discard_below={discard_below}, got {trust_above}")
    _checks.floating("teacher_probabilities", teacher_probabilities)
    _checks.integers("labels", labels)
    _checks.shape(
        "labels", labels, teacher_probabilities.shape[:-1], "one id per row of teacher_probabilities"
    )
    p = lax.stop_gradient(teacher_probabilities)
    classes = p.shape[-1]
    hard = (1 - label_smoothing) * jax.nn.one_hot(labels, classes, dtype=p.dtype) + label_smoothing / classes
    largest = jnp.max(p, axis=-1)
    q = jnp.where((largest >= trust_above)[..., None], p, hard)
    return q, (largest >= discard_below).astype(accumulation_dtype(p.dtype))


# --- shared parts ----------------------------------------------------------------------------------------


def _pair(
    logits, teacher_logits, temperature, stop_teacher, axis, where, weights, *, name="teacher_logits"
) -> tuple[LabelledRows, Any]:
    """The student's checked rows, and the teacher's scores in the form of a reduction's `entry_args`."""
    axis = check_axis(logits, axis)
    _checks.number("temperature", temperature, above=0)
    _checks.flag("stop_teacher_gradient", stop_teacher)
    check_weights(weights, rows_of(logits.shape, axis))
    teacher = check_second(name, teacher_logits, logits, axis)
    teacher = lax.stop_gradient(teacher) if stop_teacher else teacher
    if not (_checks.is_concrete_number(temperature) and float(temperature) == 1):
        logits = tempered(widened(logits), temperature, axis=axis)
        teacher = tempered(widened(teacher), temperature)
    return LabelledRows(logits, axis, where, None, None, False, weights), teacher


def _second_pass(terms, compared: reductions.RelativeEntropy, teacher):
    """The sum of the terms of `(log q, log p)`, from `relative_entropy(teacher, reverse=True)`."""
    return pair_sum(terms, teacher, compared.other_partition, compared.partition)


def _jensen_shannon_terms(log_q, log_p):
    return 0.5 * js_term(log_q, log_p, None)


def _total_variation_terms(log_q, log_p):
    return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))


_HALF_LOG_2 = per_mass(math.log(2) / 2)
_JENSEN_SHANNON = PairTerm(_jensen_shannon_terms, _HALF_LOG_2, _HALF_LOG_2)
_TOTAL_VARIATION = PairTerm(_total_variation_terms, per_mass(0.5), per_mass(0.5))


def _alpha_divergence(rows: LabelledRows, teacher, alpha: float, clip: float | None) -> Array:
    if alpha == 1 or (alpha == 0 and clip is None):
        return rows.reduce(reductions.relative_entropy(teacher, reverse=alpha == 1)).divergence
    compared = rows.reduce(reductions.relative_entropy(teacher, reverse=True))
    if clip is None:
        return rows.reduce(_second_pass(_exact_terms(alpha), compared, teacher))
    value, surrogate = rows.reduce(
        [_second_pass(terms(alpha, clip), compared, teacher) for terms in (_clipped_terms, _surrogate_terms)]
    )
    return jnp.where(value == jnp.inf, jnp.inf, surrogate + lax.stop_gradient(value - surrogate))


def _ratio(log_q, log_p, alpha: float, clip: float):
    """`(p / q)^alpha`, and `p / q` for alpha 0, clipped."""
    power = 1.0 if alpha == 0 else alpha
    return jnp.minimum(jnp.exp(jnp.minimum(power * (log_p - log_q), 80)), clip)


@functools.cache
def _exact_terms(alpha: float) -> PairTerm:
    """The terms of the f-divergence, which are small near the limits alpha 0 and 1."""

    def terms(log_q, log_p):
        return alpha_term(log_q, log_p, alpha, most=math.inf)

    first_only = per_mass(1 / alpha if alpha > 0 else math.inf)
    return PairTerm(terms, first_only, per_mass(1 / (1 - alpha) if alpha < 1 else math.inf))


@functools.cache
def _clipped_terms(alpha: float, clip: float) -> PairTerm:
    def terms(log_q, log_p):
        r = _ratio(log_q, log_p, alpha, clip)
        return jnp.exp(log_q) * (-jnp.log(r) if alpha == 0 else (r - 1) / (alpha * (alpha - 1)))

    limit = math.inf if alpha == 0 else (_ratio_limit(alpha, clip) - 1) / (alpha * (alpha - 1))
    return PairTerm(terms, per_mass(limit), per_mass(0))


@functools.cache
def _surrogate_terms(alpha: float, clip: float) -> PairTerm:
    """The terms with the paper's gradient: `-w log q` with constant weights."""

    def terms(log_q, log_p):
        r = _ratio(log_q, log_p, alpha, clip)
        weight = jnp.log(r) - 1 if alpha == 0 else r / alpha + 1 / (alpha * (alpha - 1))
        return -lax.stop_gradient(jnp.exp(log_q) * weight) * log_q

    # The gradient of `-weight q` is that of `-w log q`.
    weight = -math.inf if alpha == 0 else _ratio_limit(alpha, clip) / alpha + 1 / (alpha * (alpha - 1))
    return PairTerm(terms, per_mass(-weight), per_mass(0))


def _ratio_limit(alpha: float, clip: float) -> float:
    """The clipped `(p / q)^alpha` as p goes to 0, for alpha other than 0."""
    return 0.0 if alpha > 0 else clip


def _to_mixture(total, tile, partition, partitions, log_shares):
    """Adds `p log(p / q)` for the mixture p of k teachers."""
    log_each = []
    for i, part in enumerate(partitions):
        teacher = tile.second_row(i)
        log_p = log_softmax_of(teacher, part) + log_shares[..., i, None]
        log_each.append(jnp.where(teacher.keep, log_p, -jnp.inf))
    log_p = functools.reduce(jnp.logaddexp, log_each)
    some = log_p != -jnp.inf
    terms = jnp.exp(log_p) * (jnp.where(some, log_p, 0) - log_softmax_of(tile, partition))
    return total + jnp.sum(jnp.where(some, jnp.where(tile.keep, terms, jnp.inf), 0), axis=-1)


def _mixture_finalize(total, partition, *args):
    return where_present(total, partition.log_sum != -jnp.inf)


def _binary_update(total, tile, beta):
    teacher, beta = tile.second_row(), beta[..., None]
    p, q = (jnp.where(row.keep, jax.nn.sigmoid(row.x), 0) for row in (teacher, tile))
    distance = jnp.abs(p - q)
    apart = distance > 0
    factor = jnp.where(beta == 0, 1, jnp.where(apart, jnp.where(apart, distance, 1) ** beta, 0))
    terms = jnp.where(
        tile.keep, factor * (jax.nn.softplus(tile.x) - p * tile.x), jnp.where(p > 0, jnp.inf, 0)
    )
    return total + jnp.sum(terms, axis=-1)
