"""Contrastive losses.

Each example against the others of its batch. Row i of the logits holds the similarities of example i to all
candidates, divided by the temperature. `cosine_logits(images, texts, transpose_weight=True, scale=1 / temperature)`
makes them from embeddings as an expression: no `[pairs, pairs]` array is then ever stored.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, log_or_neg_inf, safe_divide, weigh
from jaxsoft.losses._common import IGNORE_INDEX, check_weights, prepare
from jaxsoft.rows import Logits, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis, reduce_two_ways


def info_nce_loss(
    logits: Logits,
    labels: Int[Array, "*rows"] | None = None,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """InfoNCE: `logsumexp_j(x_ij) - x_ii`, cross-entropy of each row against its own candidate.

    One direction of `clip_loss`. With candidates gathered from all devices, `labels` are the positions of this
    device's pairs among them.

    Args:
      logits: `[*rows, candidates]`, similarities divided by the temperature, a floating array or `linear_logits`.
      labels: `[*rows]`, the column of each row's positive. By default row i of a matrix has its positive in column i.
      axis: the axis of the candidates.
      where: mask that broadcasts to the logits, True = counts. It can leave out, say, candidates known to be further
        positives.
      weights: `[*rows]`, multiply the losses.
      ignore_index: label of rows to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape; no labels for logits that are not a matrix.

    Reference:
      van den Oord et al., "Representation Learning with Contrastive Predictive Coding"; Sohn, "Improved Deep Metric
      Learning with Multi-class N-pair Loss Objective".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[9.0, 1.0, 3.0], [2.0, 8.0, 4.0], [0.0, 5.0, 6.0]])
      >>> print(jaxsoft.losses.info_nce_loss(logits).mean().round(6))
      0.112821
    """
    axis = check_axis(logits, axis)
    if labels is None:
        rows, candidates = logits.shape if logits.ndim == 2 else (1, 0)
        if axis != 1 or rows > candidates:
            raise ValueError(
                "labels must be given unless axis=-1 and logits are a matrix with at least one column per row, got "
                f"shape {logits.shape} and axis {axis}"
            )
        labels = jnp.arange(rows, dtype=jnp.int32)
    prepared = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    return prepared.finish(prepared.reduce(prepared.label_statistics()).nll)


def clip_loss(
    logits: Logits,
    *,
    where: Bool[Array, " pairs"] | None = None,
    weights: Float[Array, " pairs"] | None = None,
) -> Float[Array, " pairs"]:
    """CLIP: the mean of InfoNCE over rows and over columns, `(lse_j(x_ij) + lse_j(x_ji)) / 2 - x_ii`.

    One pass over the similarities gives both directions: an expression is computed once and never stored. For pairs
    spread over devices, gather one side and use `info_nce_loss` for each direction.

    Args:
      logits: `[pairs, pairs]`, similarities divided by the temperature, a floating array or `linear_logits`.
      where: `[pairs]`, False = the pair is absent, in its row and its column.
      weights: `[pairs]`, multiply the losses.

    Returns:
      Losses `[pairs]`, float32 or wider; 0 for an absent pair. Exact for similarities of any size.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: logits that are not square, a mask or weights of a wrong shape.

    Reference:
      Radford et al., "Learning Transferable Visual Models From Natural Language Supervision".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[9.0, 1.0, 3.0], [2.0, 8.0, 4.0], [0.0, 5.0, 6.0]])
      >>> print(jaxsoft.losses.clip_loss(logits).mean().round(6))
      0.093133
    """
    check_axis(logits, -1)
    n, keep = _pairs(logits, where, weights)
    own = jnp.arange(n, dtype=jnp.int32)
    (label, own_score), columns = reduce_two_ways(
        logits, (reductions.label_statistics(own), reductions.take(own)), row_where=keep, column_where=keep
    )
    some = own_score > -jnp.inf
    from_columns = -columns.log_softmax(jnp.where(some, own_score, columns.shift))
    # A pair whose own similarity is absent costs +inf; a masked pair costs 0.
    loss = 0.5 * (label.nll + jnp.where(some, from_columns, jnp.where(label.present, jnp.inf, 0)))
    return _finish(jnp.where(jnp.isnan(own_score), jnp.nan, loss), keep, weights)


def siglip_loss(
    logits: Logits,
    *,
    bias: float | Float[Array, ""] = 0.0,
    where: Bool[Array, " pairs"] | None = None,
    weights: Float[Array, " pairs"] | None = None,
) -> Float[Array, " pairs"]:
    """SigLIP: `sum_j softplus(-t_ij (x_ij + bias))`, every pair a binary problem with t_ii = 1 and else t_ij = -1.

    Rows are independent of each other, so the loss streams and shards without communication.

    Args:
      logits: `[pairs, pairs]`, similarities times the scale (learned, 10 at the start), a floating array or
        `linear_logits`.
      bias: added to every similarity; learned, -10 at the start.
      where: `[pairs]`, False = the pair is absent, in its row and its column.
      weights: `[pairs]`, multiply the losses.

    Returns:
      Losses `[pairs]`, one per row, float32 or wider. Their mean is the paper's loss.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: logits that are not square, a mask or weights of a wrong shape.

    Reference:
      Zhai et al., "Sigmoid Loss for Language Image Pre-Training".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[9.0, 1.0, 3.0], [2.0, 8.0, 4.0], [0.0, 5.0, 6.0]])
      >>> print(jaxsoft.losses.siglip_loss(logits, bias=-10.0).mean().round(6))
      2.489649
    """
    check_axis(logits, -1)
    _checks.number("bias", bias)
    n, keep = _pairs(logits, where, weights)
    dtype = accumulation_dtype(logits.dtype)
    bias = jnp.broadcast_to(jnp.asarray(bias, dtype), (n,))
    own = jnp.arange(n, dtype=jnp.int32)
    loss = reduce_rows(logits, reductions.mapped_sum(_binary, own, bias), where=keep, row_where=keep)
    return _finish(loss, keep, weights)


def supervised_contrastive_loss(
    logits: Logits,
    labels: Int[Array, " examples"],
    *,
    where: Bool[Array, " examples"] | None = None,
    weights: Float[Array, " examples"] | None = None,
) -> Float[Array, " examples"]:
    """SupCon: `mean_{p in P_i} (logsumexp_{j != i}(x_ij) - x_ip)`, P_i the other examples of the same class.

    Args:
      logits: `[examples, examples]`, similarities of a batch to itself, divided by the temperature (0.1), a floating
        array or `linear_logits`.
      labels: `[examples]`, any integers; equal ones mean the same class.
      where: `[examples]`, False = the example is absent, in its row and its column.
      weights: `[examples]`, multiply the losses.

    Returns:
      Losses `[examples]`, float32 or wider; 0 for an example without a second one of its class (which the paper
      leaves out of the mean).

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: logits that are not square, labels, a mask or weights of a wrong shape.

    Reference:
      Khosla et al., "Supervised Contrastive Learning" (the form with the sum outside the logarithm).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[9.0, 1.0, 3.0], [2.0, 8.0, 4.0], [0.0, 5.0, 6.0]])
      >>> print(jaxsoft.losses.supervised_contrastive_loss(logits, jnp.array([0, 1, 0])).round(4))
      [0.1269 0.     5.0067]
    """
    check_axis(logits, -1)
    n, keep = _pairs(logits, where, weights)
    _checks.integers("labels", labels)
    _checks.shape("labels", labels, (n,), "one class per example")
    labels = as_ids(labels)
    own = jnp.arange(n, dtype=jnp.int32)
    others = reductions.log_partition_excluding(own[:, None])
    partition = reduce_rows(logits, others, where=keep, row_where=keep)
    shift = jnp.where(partition.log_sum == -jnp.inf, 0, partition.log_sum)
    behind = reductions.mapped_sum(_behind, own, labels, partition.shift, shift, col_args=(labels,))
    same = reductions.mapped_sum(_same, own, labels, col_args=(labels,))
    total, count = reduce_rows(logits, (behind, same), where=keep, row_where=keep)
    return _finish(safe_divide(total, count), keep, weights)


def multi_similarity_loss(
    logits: Logits,
    labels: Int[Array, " examples"] | Float[Array, "*rows candidates"],
    *,
    alpha: float | Float[Array, ""] = 2.0,
    beta: float | Float[Array, ""] = 50.0,
    base: float | Float[Array, ""] = 0.5,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """Multi-similarity: `softplus(lse_P(alpha (base - x))) / alpha + softplus(lse_N(beta (x - base))) / beta`.

    Pulls the positives P of a row above `base`, the least similar most, and pushes the negatives N below it, the most
    similar most. `labels` say which is which, or by how much each candidate is a positive: for mixed examples (Metrix)
    each exponential counts by its label y in the first sum, and by `1 - y` in the second.

    Args:
      logits: `[examples, examples]` or, with labels of their shape, `[*rows, candidates]`: cosines, a floating array or
        an expression such as `cosine_logits(embeddings, embeddings, transpose_weight=True)`.
      labels: `[examples]`, any integers: equal ones mean the same class, and an example is no candidate of its own. Or
        floats of the logits' shape, in [0, 1], such as the mixture `a` of candidates `a f(positive) + (1 - a)
        f(negative)`; `metric_mixup_loss` is the contrastive loss of these.
      alpha: inverse temperature of the positives, positive.
      beta: that of the negatives, positive.
      base: the similarity that divides them.
      where: `[examples]` with integer labels, False = the example is absent, in its row and its column; else a mask
        that broadcasts to the logits.
      weights: `[*rows]`, multiply the losses.

    Returns:
      Losses `[*rows]`, float32 or wider. Positives or negatives that a row does not have cost nothing.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning"; Venkataramanan et al.,
      "It Takes Two to Tango: Mixup for Deep Metric Learning" (labels in [0, 1]).

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> cosines = jnp.array([[1.0, 0.6, 0.8], [0.6, 1.0, 0.2], [0.8, 0.2, 1.0]])
      >>> print(jaxsoft.losses.multi_similarity_loss(cosines, jnp.array([0, 0, 1])).round(6))
      [0.59907  0.299069 0.3     ]
      >>> mixture = jnp.array([[0.0, 0.7, 0.2]])  # of the candidates with the anchor's class
      >>> print(jaxsoft.losses.multi_similarity_loss(cosines[:1], mixture, beta=10.0).round(4))
      [0.7716]
    """
    check_axis(logits, -1)
    for name, value in (("alpha", alpha), ("beta", beta)):
        _checks.number(name, value, above=0)
    _checks.number("base", base)
    if not hasattr(labels, "dtype"):
        raise TypeError(f"labels must be an array, got {_checks.describe(labels)}")
    mixed = jnp.issubdtype(labels.dtype, jnp.floating)
    rows = logits.shape[:-1]
    dtype = accumulation_dtype(logits.dtype)
    base, alpha, beta = (jnp.broadcast_to(jnp.asarray(a, dtype), rows) for a in (base, alpha, beta))
    if mixed:
        _checks.shape("labels", labels, logits.shape, "that of logits")
        check_weights(weights, rows)
        masks: dict[str, Any] = dict(where=where)
        keep = None
        pull = reductions.mapped_logsumexp(_pull_mixed, base, alpha, entry_args=(labels,))
        push = reductions.mapped_logsumexp(_push_mixed, base, beta, entry_args=(labels,))
    else:
        n, keep = _pairs(logits, where, weights)
        _checks.integers("labels", labels)
        _checks.shape("labels", labels, (n,), "one class per example")
        ids, own = as_ids(labels), jnp.arange(n, dtype=jnp.int32)
        masks = dict(where=keep, row_where=keep)
        pull = reductions.mapped_logsumexp(_pull, base, alpha, own, ids, col_args=(ids,))
        push = reductions.mapped_logsumexp(_push, base, beta, ids, col_args=(ids,))
    pull, push = reduce_rows(logits, (pull, push), **masks)
    return _finish(jax.nn.softplus(pull) / alpha + jax.nn.softplus(push) / beta, keep, weights)


def _pull(x, cols, base, alpha, own, label, labels):
    return jnp.where((labels == label) & (cols != own), alpha * (base - x), -jnp.inf)


def _push(x, cols, base, beta, label, labels):
    return jnp.where(labels == label, -jnp.inf, beta * (x - base))


def _pull_mixed(x, cols, base, alpha, positive):
    return alpha * (base - x) + log_or_neg_inf(positive.astype(x.dtype))


def _push_mixed(x, cols, base, beta, positive):
    return beta * (x - base) + log_or_neg_inf(1 - positive.astype(x.dtype))


def _binary(x, cols, own, bias):
    """The logistic loss of a pair, whose own column is the positive one."""
    return jax.nn.softplus(jnp.where(cols == own, -(x + bias), x + bias))


def _same(x, cols, own, label, labels):
    return jnp.where((labels == label) & (cols != own), jnp.ones_like(x), 0)


def _behind(x, cols, own, label, shift, log_sum, labels):
    """`logsumexp - x` of a positive."""
    return jnp.where((labels == label) & (cols != own), (shift - x) + log_sum, 0)


def _pairs(logits: Any, where: Any, weights: Any) -> tuple[int, Any]:
    """Checks square logits, and the mask and weights of their pairs; returns the number of pairs and the mask."""
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits must be square, [pairs, pairs], got shape {logits.shape}")
    n = logits.shape[0]
    check_weights(weights, (n,), "one number per pair")
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, (n,), "one boolean per pair")
    return n, where


def _finish(loss: Array, keep: Any, weights: Any) -> Array:
    loss = loss if keep is None else jnp.where(keep, loss, 0)
    return loss if weights is None else weigh(loss, weights)
