"""VQ-Logits.

A head whose classes share a codebook: the logit of class v is that of its code, plus a bias of its own, `x_v = h .
codebook[code_v] + b_v`. With K codes for V classes, K far below V, the loss costs `O(n K d)` for n rows and the weight
`K d` numbers, and the normalizer is exact, from the codes alone:

    log sum_v exp(x_v) = log sum_k exp(c_k + log n_k),    n_k = sum_{v with code k} exp(b_v)

where n_k is the number of the code's classes if there are no biases. Everything here is *reconstructed* from the
abstract of the paper. Classes of one code tie unless they have biases.

```python
import jax
import jax.numpy as jnp

from jaxsoft import heads

weight = jax.random.normal(jax.random.key(0), (1000, 16))  # a trained head, [classes, d]
codebook, codes = heads.vq_codebook(weight, 32, jax.random.key(1))
hidden, labels = jax.random.normal(jax.random.key(2), (8, 16)), jnp.arange(8)
loss = heads.vq_cross_entropy(hidden, codebook, codes, labels).mean()
best = heads.vq_top_k(hidden, codebook, codes, 3)
```

`losses.vq_commitment_loss(weight, codebook[codes])` ties a full weight to a codebook that is trained with it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids
from jaxsoft.heads._classes import check_hidden, check_labels, check_matrix, finish, take_classes
from jaxsoft.losses import cross_entropy
from jaxsoft.losses.inner import IGNORE_INDEX, check_weights
from jaxsoft.rows import TopK, linear_logits


def _check(hidden, codebook, codes, bias) -> None:
    check_matrix("codebook", codebook, "[K, d]")
    if 0 in codebook.shape:
        raise ValueError(f"codebook must have at least one code and one feature, got shape {codebook.shape}")
    check_hidden(hidden, codebook.shape[1])
    _check_codes(codes)
    if bias is not None:
        _checks.floating("bias", bias)
        _checks.shape("bias", bias, codes.shape, "one number per class")


def _check_codes(codes) -> None:
    _checks.integers("codes", codes)
    if codes.ndim != 1 or codes.shape[0] < 1:
        raise ValueError(f"codes must have shape [classes], at least one class, got shape {codes.shape}")


def _log_counts(codes: Array, bias: Array | None, count: int, dtype) -> Array:
    """`log n_k` of every code; -inf for one without classes."""
    if bias is None:
        sizes = jax.ops.segment_sum(jnp.ones(codes.shape, jnp.int32), codes, num_segments=count)
        return jnp.where(sizes > 0, jnp.log(jnp.maximum(sizes, 1).astype(dtype)), -jnp.inf)
    bias = bias.astype(dtype)
    top = lax.stop_gradient(jax.ops.segment_max(bias, codes, num_segments=count))
    some = top > -jnp.inf
    top = jnp.where(some, top, 0)
    sums = jax.ops.segment_sum(jnp.exp(bias - top[codes]), codes, num_segments=count)
    return jnp.where(some, top + jnp.log(jnp.where(some, sums, 1)), -jnp.inf)


def vq_logits(
    hidden: Float[Array, "*rows d"],
    codebook: Float[Array, "K d"],
    codes: Int[Array, " classes"],
    *,
    bias: Float[Array, " classes"] | None = None,
) -> Float[Array, "*rows classes"]:
    """The logits of all classes, `x_v = h . codebook[codes_v] + b_v`, stored: `K d` multiplications per row.

    `vq_cross_entropy` and `vq_top_k` do without them.

    Args:
      hidden: activations `[*rows, d]`.
      codebook: one vector per code, `[K, d]`.
      codes: the code of each class, `[classes]` integers in `[0, K)`; one out of range gives NaN.
      bias: `[classes]`, added to the logits; -inf for an absent class.

    Returns:
      Logits `[*rows, classes]`, in the dtype of hidden and codebook.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits"
      (*reconstructed*).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> codebook = jnp.array([[1.0], [-0.5], [2.0]])
      >>> print(heads.vq_logits(jnp.ones(1), codebook, jnp.array([0, 1, 2, 2, 1, 0, 0])))
      [ 1.  -0.5  2.   2.  -0.5  1.   1. ]
    """
    _check(hidden, codebook, codes, bias)
    of_codes = linear_logits(hidden, codebook, transpose_weight=True).dense()
    inside = (codes >= 0) & (codes < codebook.shape[0])
    x = jnp.where(inside, jnp.take(of_codes, codes, axis=-1, mode="clip"), jnp.nan)
    return x if bias is None else (x + bias).astype(x.dtype)


def vq_cross_entropy(
    hidden: Float[Array, "*rows d"],
    codebook: Float[Array, "K d"],
    codes: Int[Array, " classes"],
    labels: Int[Array, "*rows"],
    *,
    bias: Float[Array, " classes"] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy of `vq_logits` from the logits of the codes: `logsumexp(c + log n) - c_code(y) - b_y`.

    Exact, and differentiable in hidden, codebook and bias.

    Args:
      hidden: activations `[*rows, d]`.
      codebook: one vector per code, `[K, d]`.
      codes: the code of each class, `[classes]` integers in `[0, K)`.
      labels: class ids `[*rows]`. One out of range gives NaN, in value and gradient.
      bias: `[classes]`, added to the logits; -inf for an absent class.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of rows to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider; +inf for an absent label.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits"
      (*reconstructed*).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> codebook, codes = jnp.array([[1.0], [-0.5], [0.3]]), jnp.array([0, 0, 1, 2, 2, 2])
      >>> print(heads.vq_cross_entropy(jnp.ones((1, 1)), codebook, codes, jnp.array([3])).round(5))
      [2.01181]
    """
    _check(hidden, codebook, codes, bias)
    rows = hidden.shape[:-1]
    check_weights(weights, rows)
    labels, keep = check_labels(labels, rows, codes.shape[0], ignore_index)
    log_counts = _log_counts(codes, bias, codebook.shape[0], accumulation_dtype(hidden.dtype, codebook.dtype))
    if keep is not None:
        hidden = jnp.where(keep[..., None], hidden, 0)
    inside = (labels >= 0) & (labels < codes.shape[0])
    own = jnp.where(
        inside, jnp.take(codes, labels, mode="clip"), codebook.shape[0]
    )  # NaN, as a label out of range
    logits = linear_logits(hidden, codebook, bias=log_counts, transpose_weight=True)
    # The label's share of its code's mass is exp(b - log n).
    share = take_classes(log_counts, own)
    if bias is not None:
        own_bias = take_classes(bias.astype(share.dtype), labels)
        absent = own_bias == -jnp.inf
        share = jnp.where(absent, jnp.inf, share - jnp.where(absent, 0, own_bias))
    return finish(cross_entropy(logits, own, ignore_index=None) + share, keep, weights)


def vq_top_k(
    hidden: Float[Array, "*rows d"],
    codebook: Float[Array, "K d"],
    codes: Int[Array, " classes"],
    k: int,
    *,
    bias: Float[Array, " classes"] | None = None,
) -> TopK:
    """The k largest of `vq_logits` and their classes, without the logits; `k=1` is the prediction.

    The k best classes lie in the k codes whose best classes are best. Ties go to the smaller class.

    Args:
      hidden: activations `[*rows, d]`.
      codebook: one vector per code, `[K, d]`.
      codes: the code of each class, `[classes]` integers in `[0, K)`.
      k: how many, a static integer from 1 to the number of classes.
      bias: `[classes]`, added to the logits.

    Returns:
      `TopK(values, indices)`, each `[*rows, k]`, largest first. Where fewer than k classes are present: -inf and -1.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits"
      (*reconstructed*).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> codebook = jnp.array([[1.0], [-0.5], [2.0]])
      >>> print(heads.vq_top_k(jnp.ones(1), codebook, jnp.array([0, 1, 2, 2, 1, 0, 0]), 3).indices)
      [2 3 0]
    """
    _check(hidden, codebook, codes, bias)
    k = _checks.integer("k", k, at_least=1, at_most=codes.shape[0])
    count, classes = codebook.shape[0], codes.shape[0]
    dtype = accumulation_dtype(hidden.dtype, codebook.dtype)
    offsets = jnp.zeros(classes, dtype) if bias is None else jnp.asarray(bias, dtype)
    codes = as_ids(jnp.asarray(codes))
    # The classes sorted by code, and within a code by their biases, largest first.
    order = jnp.lexsort((-offsets, codes)).astype(jnp.int32)
    first = jnp.searchsorted(codes[order], jnp.arange(count, dtype=codes.dtype)).astype(jnp.int32)
    last = jnp.searchsorted(codes[order], jnp.arange(count, dtype=codes.dtype), side="right").astype(
        jnp.int32
    )
    best = jnp.where(first < last, offsets[order[jnp.clip(first, 0, classes - 1)]], -jnp.inf)
    of_codes = linear_logits(hidden, codebook, transpose_weight=True).dense().astype(dtype)
    few = min(k, count)
    # Equally good codes are told apart by their first class, so that ties go to the smaller class.
    chosen = _largest(
        of_codes + best, jnp.broadcast_to(order[jnp.clip(first, 0, classes - 1)], of_codes.shape), few
    )
    places = first[chosen][..., None] + jnp.arange(k, dtype=jnp.int32)
    present = places < last[chosen][..., None]
    ids = order[jnp.clip(places, 0, classes - 1)]
    scores = jnp.take_along_axis(of_codes, chosen, axis=-1)[..., None] + offsets[ids]
    scores = jnp.where(present, scores, -jnp.inf)
    flat = (*hidden.shape[:-1], few * k)
    scores, ids = scores.reshape(flat), ids.reshape(flat)
    top = _largest(scores, ids, k)
    scores, ids = (jnp.take_along_axis(a, top, axis=-1) for a in (scores, ids))
    return TopK(scores, jnp.where(scores == -jnp.inf, -1, ids))


def _largest(scores: Array, ids: Array, k: int) -> Array:
    """The places of the k largest scores; of equal ones, those of smaller ids."""
    return jnp.lexsort((ids, -scores), axis=-1)[..., :k]


def vq_codebook(
    weight: Float[Array, "classes d"],
    size: int,
    key: PRNGKeyArray,
    *,
    steps: int = 10,
) -> tuple[Float[Array, "K d"], Int[Array, " classes"]]:
    """A codebook of a trained head by k-means (Lloyd), and the code of each class.

    Starts from random classes. A code that loses all its classes moves to one of those that fit worst.

    Args:
      weight: `[classes, d]`.
      size: K, the number of codes, a static integer from 1 to the number of classes.
      key: random key.
      steps: of k-means, static, 0 or more.

    Returns:
      The codebook `[K, d]` in the weight's dtype, and the codes `[classes]`, the nearest ones.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits" (k-means is
      *reconstructed*).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import heads
      >>> codebook, codes = heads.vq_codebook(jnp.array([[0.0], [5.0], [0.2], [5.2]]), 2, jax.random.key(0))
      >>> print(codebook[codes].T)
      [[0.1 5.1 0.1 5.1]]
    """
    check_matrix("weight", weight, "[classes, d]")
    classes = weight.shape[0]
    size = _checks.integer("size", size, at_least=1, at_most=classes)
    steps = _checks.integer("steps", steps, at_least=0)
    w = jnp.asarray(weight, accumulation_dtype(weight.dtype))
    square = jnp.sum(w * w, axis=-1)

    def nearest(codebook):
        # |w - e|^2 = |w|^2 - 2 (w . e - |e|^2 / 2), streamed over the codes
        half = -0.5 * jnp.sum(codebook * codebook, axis=-1)
        logits = linear_logits(w, codebook, bias=half, transpose_weight=True)
        codes = logits.argmax(axis=-1)
        return codes, square - 2 * (jnp.sum(w * codebook[codes], axis=-1) + half[codes])

    def step(codebook, _):
        codes, error = nearest(codebook)
        counts = jax.ops.segment_sum(jnp.ones(classes, w.dtype), codes, num_segments=size)
        means = jax.ops.segment_sum(w, codes, num_segments=size) / jnp.maximum(counts, 1)[:, None]
        dead = counts == 0
        worst = lax.top_k(error, size)[1]
        return jnp.where(dead[:, None], w[worst[jnp.cumsum(dead) - 1]], means), None

    start = w[jax.random.choice(key, classes, (size,), replace=False)]
    codebook, _ = lax.scan(step, start, length=steps)
    codebook = codebook.astype(weight.dtype)
    return codebook, nearest(codebook.astype(w.dtype))[0]
