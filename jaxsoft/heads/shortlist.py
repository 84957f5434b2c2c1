"""A shortlist.

Exact logits of a few classes per row, chosen by a cheap preview: the logits of the weight projected on its leading
directions, of `rank` features instead of d. The preview is streamed over the classes, the logits of the shortlist are
those of the full weight. With `rank` equal to d the shortlist holds the largest logits themselves. The method is that
of SVD-softmax (Shim et al.), *reconstructed*.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.heads._classes import check_hidden, check_labels, check_matrix, finish, take_classes
from jaxsoft.losses.inner import IGNORE_INDEX, check_weights
from jaxsoft.rows import TopK, linear_logits, logsumexp, top_k


class ShortlistHead(NamedTuple):
    """A weight with its preview.

    Attributes:
      weight: `[classes, d]`.
      basis: `[d, rank]`, the leading directions of the weight's rows, orthonormal.
      preview: `[classes, rank]`, the weight projected on them; without derivatives.
    """

    weight: Array
    basis: Array
    preview: Array


def shortlist_head(
    weight: Float[Array, "d classes"], rank: int, *, transpose_weight: bool = False
) -> ShortlistHead:
    """The head of a weight, with a preview of `rank` features.

    The preview costs `classes d^2` multiplications, and again when the weight has changed.

    Args:
      weight: `[d, classes]`, or `[classes, d]` with `transpose_weight=True`.
      rank: features of the preview, static, from 1 to d.
      transpose_weight: whether `weight` is laid out `[classes, d]`, which saves a copy.

    Returns:
      A `ShortlistHead`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Shim et al., "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks" (*reconstructed*).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> head = heads.shortlist_head(jnp.array([[3.0, 0.0, -3.0], [0.0, 1.0, 0.0]]), 1)
      >>> print(jnp.abs(head.preview.T))
      [[3. 0. 3.]]
    """
    _checks.flag("transpose_weight", transpose_weight)
    check_matrix("weight", weight, "[classes, d]" if transpose_weight else "[d, classes]")
    rows = jnp.asarray(weight if transpose_weight else weight.T)
    rank = _checks.integer("rank", rank, at_least=1, at_most=rows.shape[1])
    wide = lax.stop_gradient(rows).astype(accumulation_dtype(rows.dtype))
    basis = jnp.linalg.eigh(wide.T @ wide)[1][:, ::-1][:, :rank]
    return ShortlistHead(rows, basis, (wide @ basis).astype(rows.dtype))


def _exact(hidden: Array, head: ShortlistHead, size: int) -> tuple[Array, Array]:
    """Class ids of the shortlist and their logits, `[*rows, size]`."""
    check_hidden(hidden, head.weight.shape[1])
    size = _checks.integer("size", size, at_least=1, at_most=head.weight.shape[0])
    dtype = accumulation_dtype(hidden.dtype, head.weight.dtype)
    projected = lax.stop_gradient(hidden).astype(dtype) @ head.basis.astype(dtype)
    ids = top_k(
        linear_logits(projected, lax.stop_gradient(head.preview), transpose_weight=True), size
    ).indices
    rows = take_classes(head.weight, ids)  # NaN where a row of NaN has no shortlist
    return ids, jnp.einsum("...d,...kd->...k", hidden.astype(dtype), rows.astype(dtype))


def shortlist_top_k(hidden: Float[Array, "*rows d"], head: ShortlistHead, k: int, *, size: int) -> TopK:
    """The k largest logits among the shortlist's, and their classes; `k=1` is the prediction.

    Args:
      hidden: activations `[*rows, d]`.
      head: from `shortlist_head`.
      k: how many, a static integer from 1 to `size`.
      size: of the shortlist, a static integer from k to the number of classes. Its weights are gathered,
        `[*rows, size, d]`.

    Returns:
      `TopK(values, indices)`, each `[*rows, k]`, largest first. They are the exact ones if the shortlist holds them.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Shim et al., "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks" (*reconstructed*).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> head = heads.shortlist_head(jnp.array([[3.0, 0.0, -3.0], [0.0, 1.0, 0.0]]), 1)
      >>> print(heads.shortlist_top_k(jnp.array([1.0, 2.0]), head, 2, size=2).indices)
      [0 1]
    """
    size = _checks.integer("size", size, at_least=1)
    k = _checks.integer("k", k, at_least=1, at_most=size)
    ids, scores = _exact(hidden, head, size)
    values, places = lax.top_k(scores, k)
    return TopK(values, jnp.take_along_axis(ids, places, axis=-1))


def shortlist_cross_entropy(
    hidden: Float[Array, "*rows d"],
    head: ShortlistHead,
    labels: Int[Array, "*rows"],
    *,
    size: int,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy over the label and the shortlist, `log(1 + sum_{c in S, c != y} exp(x_c - x_y))`.

    A lower bound of the cross-entropy over all classes, close to it where the shortlist holds most of the probability.
    The gradient reads and changes the label's and the shortlist's weights.

    Args:
      hidden: activations `[*rows, d]`.
      head: from `shortlist_head`.
      labels: class ids `[*rows]`. One out of range gives NaN, in value and gradient.
      size: of the shortlist, a static integer from 1 to the number of classes.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of rows to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Shim et al., "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks" (the shortlist; the
      loss is ours).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> head = heads.shortlist_head(jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), 1)
      >>> print(heads.shortlist_cross_entropy(jnp.ones((1, 1)), head, jnp.array([0]), size=5).round(3))
      [0.582]
    """
    check_hidden(hidden, head.weight.shape[1])
    rows = hidden.shape[:-1]
    check_weights(weights, rows)
    labels, keep = check_labels(labels, rows, head.weight.shape[0], ignore_index)
    if keep is not None:
        hidden = jnp.where(keep[..., None], hidden, 0)
    ids, scores = _exact(hidden, head, size)
    own = jnp.sum(
        hidden.astype(scores.dtype) * take_classes(head.weight, labels).astype(scores.dtype), axis=-1
    )
    others = logsumexp(scores - own[..., None], where=ids != labels[..., None])
    values = jax.nn.softplus(others) * jnp.where(jnp.isnan(own), jnp.nan, 1).astype(others.dtype)
    return finish(values, keep, weights)
