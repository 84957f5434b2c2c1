"""Imbalanced classes.

For classes of unequal frequency or spread: cross-entropies with a margin on the logits, and class weights.
`cross_entropy` takes `class_weights` too. Its class mask `where` is the masked softmax of continual learning: only the
classes of the current task compete, and the others get no gradient ("Revisiting Softmax Masking for Stability in
Continual Learning"). For `linear_logits` without a mask, adding `tau * log(priors)` to the `bias` equals
`logit_adjusted_cross_entropy`. `examples/losses/imbalanced.py` trains with several of them on long-tailed digits.

In the formulas `x` are the logits of a row, `y` its label, and `pi` the classes' shares of the training set.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, log_or_neg_inf, safe_divide
from jaxsoft.losses._common import IGNORE_INDEX, check_floats, poison_of, prepare
from jaxsoft.losses.classification import cross_entropy
from jaxsoft.rows import Logits, linear_logits, reductions


def logit_adjusted_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    priors: Float[Array, " columns"] | None = None,
    class_counts: Int[Array, " columns"] | Float[Array, " columns"] | None = None,
    tau: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Cross-entropy of adjusted logits, `logsumexp(x + tau log pi) - (x_y + tau log pi_y)`.

    Trained with it, the logits rank classes as if all were equally frequent: predict with the plain argmax. (After
    training with plain cross-entropy, use the argmax of `x - tau log pi`.) With tau = 1 and counts it is the balanced
    softmax. The adjusted logits are never stored.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      priors: `[columns]`, the classes' frequencies; only their ratios matter. A class with prior 0 is absent.
      class_counts: `[columns]`, the classes' counts instead, integers or floats.
      tau: strength of the adjustment, 0 or more; 0 is cross-entropy.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on an absent class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range; both or neither of priors and class_counts given.

    Reference:
      Menon et al., "Long-Tail Learning via Logit Adjustment"; Ren et al., "Balanced Meta-Softmax for Long-Tailed
      Visual Recognition"; Hasegawa and Sato, "Exploring Weight Balancing on Long-Tailed Recognition Problem".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5], [0.2, 1.5, -0.3, 0.8, -1.2]])
      >>> labels, counts = jnp.array([0, 3]), jnp.array([50, 30, 10, 6, 4])
      >>> print(jaxsoft.losses.logit_adjusted_cross_entropy(logits, labels, class_counts=counts).round(6))
      [0.242527 2.79038 ]
    """
    _checks.number("tau", tau, at_least=0)
    if (priors is None) == (class_counts is None):
        raise ValueError(
            f"exactly one of priors and class_counts must be given, got {'both' if priors is not None else 'neither'}"
        )
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    dtype = accumulation_dtype(logits.dtype)
    frequencies = _frequencies("class_counts", class_counts) if priors is None else priors
    name = "class_counts" if priors is None else "priors"
    check_floats(name, frequencies, (rows.columns,), "one number per class")
    frequencies = frequencies.astype(dtype)

    some = frequencies > 0
    adjustment = tau * jnp.log(jnp.where(some, frequencies, 1))
    adjustment = adjustment - lax.stop_gradient(jnp.max(jnp.where(some, adjustment, -jnp.inf), initial=-1e30))
    adjusted = reductions.weighted_log_partition(jnp.where(some, jnp.exp(adjustment), 0))
    partition, score = rows.reduce((adjusted, reductions.take(rows.labels)))
    absent = (score == -jnp.inf) | ~rows.of_labels(some)
    nll = -partition.log_softmax(jnp.where(absent, partition.shift, score)) - rows.of_labels(adjustment)
    loss = jnp.where(absent, jnp.inf, nll) * poison_of(score)
    return rows.finish(jnp.where(partition.log_sum == -jnp.inf, 0, loss))


def _frequencies(name: str, counts: Any) -> Array:
    """Integer or floating counts as floats."""
    if not hasattr(counts, "dtype") or not (
        jnp.issubdtype(counts.dtype, jnp.integer) or jnp.issubdtype(counts.dtype, jnp.floating)
    ):
        raise TypeError(f"{name} must be an array of numbers, got {_checks.describe(counts)}")
    return jnp.asarray(counts, accumulation_dtype(counts.dtype))


def class_balanced_weights(
    class_counts: Int[Array, " columns"] | Float[Array, " columns"], *, beta: float = 0.9999
) -> Float[Array, " columns"]:
    """Class-balanced weights, `(1 - beta) / (1 - beta^n_c)`, scaled to sum to the number of classes.

    `(1 - beta^n) / (1 - beta)` is the effective number of n overlapping examples. Pass the weights to `cross_entropy`
    or `focal_loss` as `class_weights`.

    Args:
      class_counts: `[columns]`, the number n_c of training examples of each class, integers or floats.
      beta: in [0, 1): 0 gives all classes the same weight; towards 1 the weights approach the inverse counts.

    Returns:
      `[columns]`, float32 or wider. A class without examples has weight 0 and does not count in the scaling.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or a beta out of range.

    Reference:
      Cui et al., "Class-Balanced Loss Based on Effective Number of Samples"; Hasegawa and Sato, "Exploring Weight
      Balancing on Long-Tailed Recognition Problem".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.class_balanced_weights(jnp.array([1000, 100, 10, 0]), beta=0.99).round(6))
      [0.230147 0.363011 2.406842 0.      ]
    """
    _checks.number("beta", beta, at_least=0, below=1)
    n = _frequencies("class_counts", class_counts)
    if n.ndim != 1:
        raise ValueError(f"class_counts must have one axis, got shape {n.shape}")
    some = n > 0
    # In Python floats where possible: rounding a beta near 1 to float32 would lose the digits of 1 - beta.
    log_beta = _log(float(beta)) if _checks.is_concrete_number(beta) else log_or_neg_inf(jnp.asarray(beta))
    effective = -jnp.expm1(jnp.where(some, n, 1) * log_beta)
    inverse = jnp.where(some, 1 / effective, 0)
    return inverse * safe_divide(jnp.sum(some).astype(n.dtype), jnp.sum(inverse))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def noisy_softmax_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    norm_product: Float[Array, "*rows"],
    key: Array | None,
    alpha: float = 0.1**0.5,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Noisy softmax: cross-entropy with the label's logit lowered to `x_y - alpha |xi| (|w_y| |h| - x_y)`.

    This is `softplus(lse_N - x_y + alpha |xi| (|w_y| |h| - x_y))` with one standard normal xi per row, and N the other
    classes. Since `x_y = |w_y| |h| cos(theta)`, the noise vanishes as the feature turns towards its class; until then
    it postpones the saturation of softmax. For heads without bias. The gradient flows through the logit and the norms.
    *Reconstructed*: the form and the default of alpha. `jaxsoft.normalizers.noisy_logits` does the same to stored
    logits.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      norm_product: `[*rows]`, `|w_y| |h|`: the L2 norm of the label's weight vector times that of the features.
      key: a PRNG key, a new one each step; None for no noise, as in evaluation. (Not for `weighted_sum`, which reads
        rows in chunks: every chunk would draw the same numbers.)
      alpha: the amount of noise, 0 or more; usual values of `alpha^2` are 0.05, 0.1, 0.5 and 1.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on an absent class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Chen et al., "Noisy Softmax: Improving the Generalization Ability of DCNN via Postponing the Early Softmax
      Saturation".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> logits, labels, norms = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([0]), jnp.array([3.0])
      >>> noisy = jaxsoft.losses.noisy_softmax_cross_entropy
      >>> print(noisy(logits, labels, norm_product=norms, key=None).round(6))
      [0.58242]
      >>> print(noisy(logits, labels, norm_product=norms, key=jax.random.key(0)) > 0.58242)
      [ True]
    """
    _checks.number("alpha", alpha, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    check_floats("norm_product", norm_product, rows.labels.shape, "one number per example")
    others, score = rows.reduce(
        (reductions.log_partition_excluding(rows.labels[..., None]), reductions.take(rows.labels))
    )
    absent, rivals = score == -jnp.inf, others.log_sum != -jnp.inf
    poison = poison_of(score)
    score = jnp.where(absent, others.shift, score)
    if key is not None:
        xi = jnp.abs(jax.random.normal(key, score.shape, score.dtype))
        norms = norm_product if rows.keep is None else jnp.where(rows.keep, norm_product, 0)
        score = score - alpha * xi * (norms.astype(score.dtype) - score)
    loss = jnp.where(absent, jnp.inf, jax.nn.softplus(-others.log_softmax(score)))
    return rows.finish(jnp.where(rivals, loss, 0) * poison)


def adaptive_margin_cross_entropy(
    means: Float[Array, "columns d"],
    covariances: Float[Array, "columns d"] | Float[Array, "columns d d"],
    weight: Float[Array, "d columns"],
    *,
    bias: Float[Array, " columns"] | None = None,
    variance_scale: float | Float[Array, " columns"] = 1.0,
    where: Bool[Array, " columns"] | None = None,
) -> Float[Array, " columns"]:
    """AMarX: `log sum_c exp(m_c + v_c)`, a bound of a class's expected cross-entropy for Gaussian features.

    For a class y with features `N(mean_y, g cov_y)`: `m_c = (w_c - w_y) . mean_y + b_c - b_y`, and the adaptive margin
    `v_c = g/2 (w_c - w_y)^T cov_y (w_c - w_y)`, which comes from Jensen's inequality. It trains the head on classes of
    which only mean and covariance are kept. *Reconstructed* from the paper's description.

    Since the margin is linear in the products of two weights, this is a cross-entropy of `linear_logits`: no
    `[columns, columns]` array is stored, and for diagonal covariances nothing larger than the inputs.

    Args:
      means: `[columns, d]`, the mean features of each class.
      covariances: `[columns, d]`, the diagonals, or `[columns, d, d]`, symmetric.
      weight: `[d, columns]`, the head's weight.
      bias: `[columns]`, the head's bias.
      variance_scale: g, 0 or more, a number or `[columns]`: above 1 it widens a class, as for old classes; 0 is the
        cross-entropy at the means.
      where: `[columns]`, True = counts. A masked class is no rival of the others, and its loss is 0.

    Returns:
      One loss per class, `[columns]`, float32 or wider. Their mean gives all classes the same weight.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Yao and Chang, "Adaptive Margin Global Classifier for Exemplar-Free Class-Incremental Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> weight = jnp.array([[1.0, 0.0, -0.5], [0.0, 1.0, 0.2]])
      >>> means, variances = jnp.array([[0.8, 0.1], [0.0, 0.9], [-0.7, 0.0]]), jnp.full((3, 2), 0.1)
      >>> print(jaxsoft.losses.adaptive_margin_cross_entropy(means, variances, weight).round(6))
      [0.638357 0.672042 0.75572 ]
    """
    for name, array in (("means", means), ("covariances", covariances), ("weight", weight)):
        _checks.floating(name, array)
    if means.ndim != 2:
        raise ValueError(f"means must have shape (columns, d), got shape {means.shape}")
    columns, d = means.shape
    full = covariances.ndim == 3
    _checks.shape("covariances", covariances, (columns, d, d) if full else (columns, d), "one class per row")
    _checks.shape("weight", weight, (d, columns), "the features and the classes of means")
    if bias is not None:
        check_floats("bias", bias, (columns,), "one number per class")
    if getattr(variance_scale, "ndim", 0) == 0:
        _checks.number("variance_scale", variance_scale, at_least=0)
    else:
        check_floats("variance_scale", variance_scale, (columns,), "a number, or one per class")
    labels = jnp.arange(columns, dtype=jnp.int32)
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, (columns,), "one boolean per class")
        labels = jnp.where(where, labels, IGNORE_INDEX)
    dtype = accumulation_dtype(means.dtype, covariances.dtype, weight.dtype)

    def clean(array):
        array = jnp.asarray(array, dtype)
        if where is None or array.ndim == 0:
            return array
        return jnp.where(where.reshape(columns, *(1,) * (array.ndim - 1)), array, 0)

    mean, covariance, rows = clean(means), clean(covariances), clean(weight.T)
    scale = jnp.broadcast_to(clean(variance_scale), (columns,))
    covariance = scale.reshape(columns, *(1,) * (covariance.ndim - 1)) * covariance
    if full:
        spread, products = jnp.einsum("cij,cj->ci", covariance, rows), rows[:, :, None] * rows[:, None, :]
    else:
        spread, products = covariance * rows, rows * rows
    # x_c - x_y = m_c + v_c for x_c = (mean_y - g cov_y w_y) . w_c + (g/2 cov_y) . (w_c w_c^T) + b_c.
    hidden = jnp.concatenate([mean - spread, covariance.reshape(columns, -1) / 2], axis=1)
    head = jnp.concatenate([rows, products.reshape(columns, -1)], axis=1)
    logits = linear_logits(hidden, head, bias=None if bias is None else clean(bias), transpose_weight=True)
    return cross_entropy(logits, labels, where=where)


def emma_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    margin_lipschitz: Float[Array, "*rows columns"] | Float[Array, " columns"],
    radius: float,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """EMMA: cross-entropy with a margin that adapts to each rival, `log sum_c exp(d_c + s_c radius K_c)`.

    Here `d_c = x_c - x_y`, K_c is the Lipschitz constant of d_c, and `s_c = clip(-d_c / (radius K_c), 0.01, 1)` is a
    constant to the gradient: each rival is raised by what an attack within the radius can do, but not beyond the
    decision boundary, so that easy rivals do not dominate. With s_c = 1 everywhere it is the cross-entropy of the
    certified margins. Reads the logits twice: the label's logit is needed first.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      margin_lipschitz: K, 0 or more: of the logits' shape, or `[columns]`, the same for all rows. For a head with
        weight w on a backbone with Lipschitz constant L, `K_c = L |w_c - w_y|`. The label's own entry is not read.
      radius: the radius to certify, 0 or more, often raised over the first half of training; 0 is cross-entropy.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on an absent class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Hu et al., "Unlocking Deterministic Robustness Certification on ImageNet".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, lipschitz = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[0.0, 1.2, 0.8, 1.5, 1.0]])
      >>> print(jaxsoft.losses.emma_loss(logits, jnp.array([0]), margin_lipschitz=lipschitz, radius=0.5).round(6))
      [0.861509]
    """
    _checks.number("radius", radius, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    score = rows.reduce(reductions.take(rows.labels))
    _checks.floating("margin_lipschitz", margin_lipschitz)
    if margin_lipschitz.ndim == 1 and len(logits.shape) > 1:
        _checks.shape("margin_lipschitz", margin_lipschitz, (rows.columns,), "one number per class")
        arrays: dict[str, Any] = {"col_args": (margin_lipschitz,)}
    else:
        _checks.shape(
            "margin_lipschitz", margin_lipschitz, logits.shape, "the logits', or one number per class"
        )
        if where is not None:
            margin_lipschitz = jnp.where(where, margin_lipschitz, 0)
        margin_lipschitz = jnp.moveaxis(margin_lipschitz, rows.axis, -1)
        if rows.keep is not None:
            margin_lipschitz = jnp.where(rows.keep[..., None], margin_lipschitz, 0)
        arrays = {"entry_args": (margin_lipschitz,)}
    absent = score == -jnp.inf
    base = jnp.where(absent, 0, score)
    reach = jnp.broadcast_to(jnp.asarray(radius, base.dtype), base.shape)
    lse = rows.reduce(reductions.mapped_logsumexp(_with_margin, base, rows.labels, reach, **arrays))
    loss = jnp.where(lse == -jnp.inf, 0, jnp.where(absent, jnp.inf, lse))
    return rows.finish(loss * poison_of(score))


def _with_margin(x, cols, score, label, radius, lipschitz):
    """`d + s radius K` for the label's rivals, 0 for the label."""
    d = x - score
    margin = (lipschitz * radius).astype(d.dtype)
    s = lax.stop_gradient(jnp.clip(-d / jnp.maximum(margin, 1e-8), 0.01, 1))
    return jnp.where(cols == label, 0, d + s * margin)
