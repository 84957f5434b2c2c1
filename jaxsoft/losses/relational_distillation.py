"""Distillation of relations.

What a student learns from its teacher here are relations: between classes, between the two sides of pairs, and between
prototypes and examples.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.losses.distillation import distillation_loss
from jaxsoft.losses.margin import cosine_logits
from jaxsoft.rows import Logits, reduce_rows, reductions
from jaxsoft.rows.inner import check_dense


def graph_on_logits_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    k: int = 10,
    power: float = 2.0,
) -> Float[Array, ""]:
    """Graph-on-logits distillation (GLD): `mean_i |sort(f_s) - sort(f_t)|_i^power` of student and teacher.

    The distance between two models' graphs, which connect classes that are large together. With `x~` the logits of a
    position, all but the k largest set to 0, the graph is `mean_t x~_t x~_t^T` and `f` the mean of its rows:
    `mean_t x~_t (sum_j x~_tj) / classes`, so the graph itself is never formed. Sorting makes vocabularies of different
    order and size comparable. *Reconstructed* from the paper's abstract.

    Args:
      logits: the student's, `[positions, classes]`, a floating array or `linear_logits`.
      teacher_logits: the teacher's, `[positions', classes']`, an array or `linear_logits`; a constant.
      k: how many logits of a position count.
      power: the exponent, 1 or more.

    Returns:
      A scalar, float32 or wider. The smaller of the two vocabularies is padded with zeros.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "InfiGFusion: Graph-on-Logits Distillation via Efficient Gromov-Wasserstein for Model Fusion".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> teacher = jnp.array([[1.5, 0.4, 0.9, -0.5, 0.2], [0.1, 2.0, 0.3, 0.5, -1.0]])
      >>> print(jaxsoft.losses.graph_on_logits_loss(student, teacher, k=3).round(6))
      0.023766
    """
    k = _checks.integer("k", k, at_least=1)
    _checks.number("power", power, at_least=1)
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        _checks.floating(name, x)
        if x.ndim != 2:
            raise ValueError(f"{name} must have shape [positions, classes], got shape {x.shape}")
    own, other = _graph_feature(logits, k), _graph_feature(lax.stop_gradient(teacher_logits), k)
    size = max(own.shape[0], other.shape[0])
    own, other = (jnp.sort(jnp.pad(f, (0, size - f.shape[0]))) for f in (own, other))
    return jnp.mean(jnp.abs(own - other) ** power)


def prototype_relation_distillation_loss(
    prototypes: Float[Array, "classes d"],
    features: Float[Array, "examples d"],
    old_prototypes: Float[Array, "classes d"],
    old_features: Float[Array, "examples d"],
    *,
    temperature: float = 0.1,
    where: Bool[Array, " classes"] | None = None,
) -> Float[Array, " classes"]:
    """PRD: `KL(r_k(old) || r_k(new))` of the relation of each old prototype to the examples of a batch.

    The relation is `r_k = softmax_i(cos(P_k, F_i) / temperature)` over the examples i. It preserves how old classes
    relate to new data, without storing old data. *Reconstructed* from standard parts.

    Args:
      prototypes: `[classes, d]`, of the current model.
      features: `[examples, d]`, of the batch under the current model.
      old_prototypes: `[classes, d]`, before the task; constants.
      old_features: `[examples, d]`, of the same batch under the old model; constants.
      temperature: positive; the default is ours.
      where: `[classes]`, True = an old class.

    Returns:
      Losses `[classes]`, 0 where `where` is False; the paper takes the mean over the old classes.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Asadi et al., "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> new, old = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), jnp.array([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
      >>> prototypes, before = jnp.array([[1.0, 0.0], [0.28, 0.96]]), jnp.array([[0.96, 0.28], [0.6, 0.8]])
      >>> loss = jaxsoft.losses.prototype_relation_distillation_loss
      >>> print(loss(prototypes, new, before, old, temperature=0.5).round(6))
      [0.041037 0.210644]
    """
    _checks.number("temperature", temperature, above=0)
    given = dict(
        prototypes=prototypes, features=features, old_prototypes=old_prototypes, old_features=old_features
    )
    for name, a in given.items():
        _checks.floating(name, a)
        like = features if name.endswith("features") else prototypes
        if a.ndim != 2 or a.shape != like.shape or a.shape[1] != features.shape[-1]:
            raise ValueError(
                f"{name} must have shape {like.shape} and as many columns as features, got shape {a.shape}"
            )
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, (prototypes.shape[0],), "one boolean per class")
    new, old = (
        cosine_logits(p, f, transpose_weight=True, scale=1 / temperature)
        for p, f in ((prototypes, features), lax.stop_gradient((old_prototypes, old_features)))
    )
    return distillation_loss(new, old, where=None if where is None else where[:, None])


def dynamic_contrastive_distillation_loss(
    logits: Float[Array, "pairs pairs"],
    teacher_logits: Float[Array, "pairs pairs"],
    *,
    k: int = 4,
    margin: float = 0.2,
    margin_weight: float = 1.0,
    distillation_weight: float = 1.0,
) -> Float[Array, " pairs"]:
    """DCD: `w_i (InfoNCE + margin_weight hinge + distillation_weight KL)` over the teacher's k hardest negatives.

    That is `w_i (lse_S(x_i) - x_ii + margin_weight sum_S relu(margin + x_ij - x_ii) + distillation_weight
    KL(p_S || q_S))`, where S are the positive and the k negatives that the teacher finds hardest, and the constant
    `w_i = 1 - p_ii` is the difficulty of the pair for the teacher. *Reconstructed* from the paper's abstract: the terms
    are the paper's, the weighting is ours.

    Args:
      logits: the student's similarities `[pairs, pairs]`, divided by the temperature; the diagonal holds the positives.
      teacher_logits: the teacher's; constants.
      k: negatives per pair, less than the number of pairs.
      margin: of the hinge, 0 or more.
      margin_weight: factor of the hinge.
      distillation_weight: factor of the KL.

    Returns:
      Losses `[pairs]`, float32 or wider, one per row; transpose both arguments for the other direction.

    Raises:
      TypeError: an argument of a wrong type or dtype, or logits that are `linear_logits`.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Rao et al., "Dynamic Contrastive Distillation for Image-Text Retrieval".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> student = jnp.array([[9.0, 1.0, 3.0], [2.0, 8.0, 4.0], [0.0, 5.0, 6.0]])
      >>> teacher = jnp.array([[5.0, 1.0, 2.0], [0.0, 6.0, 4.0], [1.0, 3.0, 4.0]])
      >>> loss = jaxsoft.losses.dynamic_contrastive_distillation_loss(student, teacher, k=1)
      >>> print(", ".join(f"{value:.4f}" for value in loss))
      0.0047, 0.0176, 0.0842
    """
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        check_dense(x, "dynamic_contrastive_distillation_loss")
        _checks.floating(name, x)
        if x.ndim != 2 or x.shape[0] != x.shape[1] or x.shape != logits.shape:
            raise ValueError(f"{name} must be square, of the same shape as logits, got shape {x.shape}")
    n = logits.shape[0]
    k = _checks.integer("k", k, at_least=1, at_most=n - 1)
    _checks.number("margin", margin, at_least=0)
    _checks.number("margin_weight", margin_weight, at_least=0)
    _checks.number("distillation_weight", distillation_weight, at_least=0)
    dtype = accumulation_dtype(logits.dtype)
    x, t = logits.astype(dtype), lax.stop_gradient(teacher_logits).astype(dtype)
    own = jnp.eye(n, dtype=bool)
    _, hardest = lax.top_k(jnp.where(own, -jnp.inf, t), k)
    chosen = jnp.concatenate([jnp.arange(n, dtype=hardest.dtype)[:, None], hardest], axis=1)
    x, t = (jnp.take_along_axis(a, chosen, axis=1) for a in (x, t))
    log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(x)
    hinge = jnp.sum(jax.nn.relu(margin + x[:, 1:] - x[:, :1]), axis=1)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
    return -jnp.expm1(log_p[:, 0]) * (-log_q[:, 0] + margin_weight * hinge + distillation_weight * kl)


def _graph_feature(logits, k: int) -> Array:
    positions, classes = logits.shape
    best = reduce_rows(logits, reductions.top_k(k))
    values = jnp.where(best.indices < 0, 0, best.values)
    shares = values * jnp.sum(values, axis=-1, keepdims=True) / (positions * classes)
    feature = jnp.zeros(classes, values.dtype)
    return feature.at[jnp.maximum(best.indices, 0)].add(shares)
