"""Divergences.

Distances and dependence of samples, the divergence of two rows of logits, and losses of values, energies and
log-probabilities, element by element.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, finite_gauge, safe_divide
from jaxsoft.losses._common import check_floats
from jaxsoft.losses._pairs import check_second, of_second
from jaxsoft.losses.regularizers import _mask, _sqrt, _vectors
from jaxsoft.rows import Logits, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis, check_dense
from jaxsoft.rows.reductions import partition_of

# --- two samples -----------------------------------------------------------------------------------------


def _samples(x: Any, y: Any, where_x: Any, where_y: Any) -> tuple[Array, Array, Array, Array]:
    """`[*batch, n, features]` and `[*batch, m, features]`, 0 for absent samples, each with its mask."""
    (x, keep_x), (y, keep_y) = _vectors("x", x, where_x, "where_x"), _vectors("y", y, where_y, "where_y")
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"y must have shape {(*x.shape[:-2], 'm', x.shape[-1])} as x has, got shape {y.shape}"
        )
    return x, keep_x, y, keep_y


def _squared_distances(x: Array, y: Array) -> Array:
    """`[*batch, n, m]`, computed from differences, so exactly 0 for points that coincide."""
    return jnp.sum((x[..., :, None, :] - y[..., None, :, :]) ** 2, axis=-1)


def _log_kernel(x: Array, y: Array, bandwidth: Any) -> Array:
    """`-|x - y|^2 / (2 bandwidth^2)`, the logarithm of the Gaussian kernel, `[*batch, n, m]`."""
    return -_squared_distances(x, y) / (2 * bandwidth * bandwidth)


def distance_covariance(
    x: Float[Array, "*batch n features"],
    y: Float[Array, "*batch n others"],
    *,
    correlation: bool = False,
    where: Bool[Array, "*batch n"] | None = None,
) -> Float[Array, "*batch"]:
    """Squared distance covariance, `mean A B` of double-centred distance matrices: 0 for independent x and y.

    As a penalty it makes predictions independent of protected attributes, of any type and number: concatenate the
    encoded attributes (for their joint distribution), or add up one penalty per attribute.

    Args:
      x: `[*batch, n, features]`, one vector per example.
      y: `[*batch, n, others]`, of the same examples.
      correlation: whether to divide by the geometric mean of the squared distance variances: then in [0, 1], and 0
        where x or y is constant.
      where: `[*batch, n]` booleans, True = counts.

    Returns:
      `[*batch]`, float32 or wider; the gradient between coincident points is 0.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, or an unknown option.

    Reference:
      Lindholm et al., "Machine Learning with Multitype Protected Attributes: Intersectional Fairness through
      Regularisation"; Szekely et al., "Measuring and Testing Dependence by Correlation of Distances".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import distance_covariance
      >>> x, y = jnp.array([[0.0], [1.0], [2.0], [4.0]]), jnp.array([[1.0], [0.5], [2.0], [3.0]])
      >>> print(distance_covariance(x, y).round(4), distance_covariance(x, y, correlation=True).round(4))
      0.8516 0.9106
    """
    _checks.flag("correlation", correlation)
    (x, keep), (y, _) = _vectors("x", x, where), _vectors("y", y, None)
    _checks.shape("y", y, (*x.shape[:-1], y.shape[-1]), "the shape of x except the features")
    y = jnp.where(keep[..., None], y, 0)
    pair = keep[..., :, None] & keep[..., None, :]
    count = jnp.sum(keep, axis=-1).astype(x.dtype)

    def centred(x):
        d = jnp.where(pair, _sqrt(_squared_distances(x, x)), 0)
        by_row = safe_divide(jnp.sum(d, axis=-1), count[..., None])
        overall = safe_divide(jnp.sum(by_row, axis=-1), count)[..., None, None]
        return jnp.where(pair, d - by_row[..., :, None] - by_row[..., None, :] + overall, 0)

    def mean(products):
        return safe_divide(jnp.sum(products, axis=(-2, -1)), count * count)

    a, b = centred(x), centred(y)
    covariance = mean(a * b)
    return safe_divide(covariance, _sqrt(mean(a * a)) * _sqrt(mean(b * b))) if correlation else covariance


def kernel_cauchy_schwarz_divergence(
    x: Float[Array, "*batch n features"],
    y: Float[Array, "*batch m features"],
    *,
    bandwidth: float | Float[Array, ""] = 1.0,
    where_x: Bool[Array, "*batch n"] | None = None,
    where_y: Bool[Array, "*batch m"] | None = None,
) -> Float[Array, "*batch"]:
    """Cauchy-Schwarz divergence of two samples: `-2 log mean K_xy + log mean K_xx + log mean K_yy`.

    The divergence of their kernel density estimates, with the Gaussian kernel
    `K = exp(-|x - y|^2 / (2 bandwidth^2))`. The means are computed in log space: samples far from each other do not
    underflow.

    Args:
      x: `[*batch, n, features]`.
      y: `[*batch, m, features]`.
      bandwidth: the width of the kernel, positive; may be traced.
      where_x: `[*batch, n]` booleans, True = counts.
      where_y: `[*batch, m]` booleans, True = counts.

    Returns:
      `[*batch]`, float32 or wider; 0 where a sample is empty.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Yu et al., "Cauchy-Schwarz Divergence Information Bottleneck for Regression".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import kernel_cauchy_schwarz_divergence
      >>> x, y = jnp.array([[0.0], [1.0], [2.0], [4.0]]), jnp.array([[1.0], [0.5], [2.0], [3.0]])
      >>> print(kernel_cauchy_schwarz_divergence(x, y, bandwidth=0.5).round(6))
      0.544551
    """
    _checks.number("bandwidth", bandwidth, above=0)
    x, keep_x, y, keep_y = _samples(x, y, where_x, where_y)

    def log_mean(x, keep_x, y, keep_y):
        k = jnp.where(keep_x[..., :, None] & keep_y[..., None, :], _log_kernel(x, y, bandwidth), -jnp.inf)
        m = finite_gauge(jnp.max(k, axis=(-2, -1), initial=-jnp.inf))
        count = jnp.sum(keep_x, axis=-1) * jnp.sum(keep_y, axis=-1)
        mean = safe_divide(jnp.sum(jnp.exp(k - m[..., None, None]), axis=(-2, -1)), count.astype(k.dtype))
        return m, jnp.log(jnp.where(mean > 0, mean, 1))

    both = log_mean(x, keep_x, y, keep_y), log_mean(x, keep_x, x, keep_x), log_mean(y, keep_y, y, keep_y)
    (m_xy, k_xy), (m_xx, k_xx), (m_yy, k_yy) = both
    some = jnp.any(keep_x, axis=-1) & jnp.any(keep_y, axis=-1)
    return jnp.where(some, (m_xx + m_yy - 2 * m_xy) + (k_xx + k_yy - 2 * k_xy), 0)


def weighted_mmd(
    x: Float[Array, "*batch n features"],
    y: Float[Array, "*batch m features"],
    *,
    bandwidth: float | Float[Array, ""] = 1.0,
    weights_x: Float[Array, "*batch n"] | None = None,
    weights_y: Float[Array, "*batch m"] | None = None,
    where_x: Bool[Array, "*batch n"] | None = None,
    where_y: Bool[Array, "*batch m"] | None = None,
) -> Float[Array, "*batch"]:
    """Squared maximum mean discrepancy of weighted samples: `w K_xx w - 2 w K_xy v + v K_yy v`.

    The kernel is Gaussian, `exp(-|x - y|^2 / (2 bandwidth^2))`. For few samples of a simulator, weights from
    `optimal_mmd_weights` give a more accurate estimate than the usual `w = 1 / n`.

    Args:
      x: `[*batch, n, features]`.
      y: `[*batch, m, features]`.
      bandwidth: the width of the kernel, positive; may be traced.
      weights_x: `[*batch, n]`, w, of any sign and sum. None: 1 over the number of samples that count.
      weights_y: `[*batch, m]`, v.
      where_x: `[*batch, n]` booleans, True = counts.
      where_y: `[*batch, m]` booleans, True = counts.

    Returns:
      `[*batch]`, float32 or wider, 0 or more up to rounding; 0 where a sample is empty.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Bharti et al., "Optimally-Weighted Estimators of the Maximum Mean Discrepancy for Likelihood-Free Inference".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import weighted_mmd
      >>> x, y = jnp.array([[0.0], [1.0], [2.0], [4.0]]), jnp.array([[1.0], [0.5], [2.0], [3.0]])
      >>> print(weighted_mmd(x, y, bandwidth=0.5).round(5))
      0.15727
      >>> print(weighted_mmd(x, y, bandwidth=0.5, weights_x=jnp.array([0.4, 0.3, 0.2, 0.1])).round(5))
      0.16514
    """
    _checks.number("bandwidth", bandwidth, above=0)
    x, keep_x, y, keep_y = _samples(x, y, where_x, where_y)

    def weights_of(name, weights, keep):
        if weights is None:
            weights = safe_divide(keep.astype(x.dtype), jnp.sum(keep, axis=-1, keepdims=True).astype(x.dtype))
        check_floats(name, weights, keep.shape, "one number per sample")
        return jnp.where(keep, weights.astype(x.dtype), 0)

    w, v = weights_of("weights_x", weights_x, keep_x), weights_of("weights_y", weights_y, keep_y)

    def quadratic(x, w, y, v):
        return jnp.einsum("...n,...nm,...m->...", w, jnp.exp(_log_kernel(x, y, bandwidth)), v)

    some = jnp.any(keep_x, axis=-1) & jnp.any(keep_y, axis=-1)
    distance = quadratic(x, w, x, w) - 2 * quadratic(x, w, y, v) + quadratic(y, v, y, v)
    return jnp.where(some, distance, 0)


def optimal_mmd_weights(
    x: Float[Array, "*batch n features"],
    kernel_mean: Float[Array, "*batch n"],
    *,
    bandwidth: float | Float[Array, ""] = 1.0,
    ridge: float = 1e-6,
    where: Bool[Array, "*batch n"] | None = None,
) -> Float[Array, "*batch n"]:
    """The weights that bring a sample closest to a distribution: `(K_xx + ridge I)^-1 kernel_mean`.

    They minimize `weighted_mmd` between the weighted sample and the distribution without constraints: some may be
    negative, and they need not sum to 1.

    Args:
      x: `[*batch, n, features]`; in the paper, the uniform or Gaussian points that a simulator starts from.
      kernel_mean: `[*batch, n]`, the distribution's kernel mean at the points,
        `E_y exp(-|x_i - y|^2 / (2 bandwidth^2))`: in closed form, or the mean over a large sample.
      bandwidth: the width of the kernel, positive; may be traced.
      ridge: added to the diagonal, 0 or more; points close to each other need it.
      where: `[*batch, n]` booleans, True = counts. Masked points get weight 0.

    Returns:
      `[*batch, n]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Bharti et al., "Optimally-Weighted Estimators of the Maximum Mean Discrepancy for Likelihood-Free Inference".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import optimal_mmd_weights
      >>> print(optimal_mmd_weights(jnp.array([[0.0], [9.0]]), jnp.array([0.25, 0.5])).round(3))
      [0.25 0.5 ]
    """
    _checks.number("bandwidth", bandwidth, above=0)
    _checks.number("ridge", ridge, at_least=0)
    x, keep = _vectors("x", x, where)
    check_floats("kernel_mean", kernel_mean, keep.shape, "one number per vector of x")
    identity = jnp.eye(x.shape[-2], dtype=x.dtype)
    pair = keep[..., :, None] & keep[..., None, :]
    kernel = jnp.where(pair, jnp.exp(_log_kernel(x, x, bandwidth)) + ridge * identity, identity)
    mean = jnp.where(keep, kernel_mean.astype(x.dtype), 0)
    factor = jax.scipy.linalg.cho_factor(kernel)
    return jax.scipy.linalg.cho_solve(factor, mean[..., None])[..., 0]


# --- two rows of logits ----------------------------------------------------------------------------------


def _twice(x, cols, *other):
    return 2 * x


def _both(x, cols, other):
    return x + other.astype(x.dtype)


def cauchy_schwarz_divergence(
    logits: Logits, other: Logits, *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*rows"]:
    """Cauchy-Schwarz divergence of `p = softmax(logits)` and `q = softmax(other)`: `-log((p q)^2 / (p p q q))`.

    The partition functions cancel: it is `lse(2 x) + lse(2 z) - 2 lse(x + z)` for logits x and z. Symmetric, and 0 for
    equal distributions; +inf, with gradient 0, for rows without a common entry, and finite otherwise. Its rounding
    error is of the size of that of `x + z`. (For two samples there is `kernel_cauchy_schwarz_divergence`.)

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      other: the same shape, an array or `linear_logits`.
      axis: the axis of the columns.
      where: booleans that broadcast to the logits, True = counts, for both rows. An entry of -inf has probability 0
        in its own row.

    Returns:
      `[*rows]`, float32 or wider; 0 where either row has no entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Yu et al., "Cauchy-Schwarz Divergence Information Bottleneck for Regression".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x, z = jnp.array([2.0, 1.0, 0.1, -1.0, 0.5]), jnp.array([0.2, 1.5, -0.3, 0.8, -1.2])
      >>> print(jaxsoft.losses.cauchy_schwarz_divergence(x, z).round(5))
      1.19224
    """
    axis = check_axis(logits, axis)
    other = check_second("other", other, logits, axis)
    own = reductions.mapped_logsumexp(_twice)
    wanted = [own, of_second(own, other), reductions.mapped_logsumexp(_both, entry_args=(other,))]
    parts = reduce_rows(logits, [w._replace(finalize=partition_of) for w in wanted], axis=axis, where=where)
    xx, zz, xz = parts
    present = (xx.log_sum != -jnp.inf) & (zz.log_sum != -jnp.inf)
    common = xz.log_sum != -jnp.inf
    log_xx, log_zz, log_xz = (jnp.where(common, part.log_sum, 0) for part in parts)
    divergence = ((xx.shift - xz.shift) + (zz.shift - xz.shift)) + ((log_xx - log_xz) + (log_zz - log_xz))
    return jnp.where(common, divergence, jnp.where(present, jnp.inf, 0))


# --- regression, energies and consistency ----------------------------------------------------------------


def _same_shape(where: Any, **arrays: Any) -> tuple[list[Array], Any]:
    """Floating arrays of one shape, in their common accumulation dtype, 0 where masked; and the mask."""
    first, shape = next((name, jnp.shape(a)) for name, a in arrays.items())
    for name, a in arrays.items():
        check_floats(name, a, shape, f"the shape of {first}")
    dtype = accumulation_dtype(*(a.dtype for a in arrays.values()))
    values = [jnp.asarray(a, dtype) for a in arrays.values()]
    if where is None:
        return values, None
    where = _mask("where", where, shape)
    return [jnp.where(where, a, 0) for a in values], where


def _counted(loss: Array, where: Any) -> Array:
    return loss if where is None else jnp.where(where, loss, 0)


def gumbel_regression_loss(
    values: Float[Array, "*shape"],
    targets: Float[Array, "*shape"],
    *,
    beta: float | Float[Array, ""] = 1.0,
    z_max: float | None = 7.0,
    where: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Gumbel (linex) regression: `e^z - z - 1` with `z = (targets - values) / beta`.

    The value that minimizes its mean is `beta log mean e^(targets / beta)`, a soft maximum of the targets: it gives
    reinforcement learning the values of the best actions without a maximum over actions. Above `z_max` the exponential
    continues along its tangent, `e^z_max (z - z_max + 1) - z - 1`, so that one large target cannot make the gradient
    explode; this part is *reconstructed*.

    Args:
      values: the learned values, any shape.
      targets: the same shape; usually under `stop_gradient`.
      beta: the temperature, positive: small for a maximum, large for a mean; may be traced.
      z_max: where the exponential turns linear; None: nowhere.
      where: the same shape, booleans, True = counts.

    Returns:
      Losses of that shape, float32 or wider; 0 where masked.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Sikchi et al., "Dual RL: Unification and New Methods for Reinforcement and Imitation Learning".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import gumbel_regression_loss
      >>> print(gumbel_regression_loss(jnp.zeros(3), jnp.array([0.5, -1.0, 2.0]), z_max=1.0).round(6))
      [0.148721 0.367879 2.436564]
    """
    _checks.number("beta", beta, above=0)
    if z_max is not None:
        _checks.number("z_max", z_max)
    (values, targets), where = _same_shape(where, values=values, targets=targets)
    z = (targets - values) / beta
    if z_max is None:
        return _counted(_linex(z), where)
    beyond = z > z_max
    inner = jnp.where(beyond, z_max, z)
    return _counted(_linex(inner) + jnp.where(beyond, (jnp.exp(z_max) - 1) * (z - z_max), 0), where)


def _linex(z: Array) -> Array:
    """`e^z - z - 1`, without cancellation near 0."""
    small = jnp.abs(z) < 0.1
    s, large = jnp.where(small, z, 0), jnp.where(small, 0, z)
    series = 1 + s / 3 * (1 + s / 4 * (1 + s / 5 * (1 + s / 6 * (1 + s / 7 * (1 + s / 8)))))
    return jnp.where(small, s * s / 2 * series, jnp.expm1(large) - large)


def residual_ebm_loss(
    real: Float[Array, "*shape"],
    sampled: Float[Array, "*shape"],
    *,
    where: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Noise-contrastive loss of a residual energy: `softplus(E(real)) + softplus(-E(sampled))`.

    The energy learns how the data differ from a model's samples: the data have the density of the model times `e^-E`.
    To sample from that density, draw several samples from the model and keep one, with the probabilities
    `jaxsoft.softmax(-energies)`.

    Args:
      real: energies of data, any shape.
      sampled: energies of the model's samples, the same shape.
      where: the same shape, booleans, True = counts.

    Returns:
      Losses of that shape, float32 or wider; 0 where masked.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Xu et al., "Energy-Based Diffusion Language Models for Text Generation"; Deng et al., "Residual Energy-Based
      Models for Text Generation".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import residual_ebm_loss
      >>> print(residual_ebm_loss(jnp.array([-1.0, 0.3]), jnp.array([0.8, -0.2])).mean().round(6))
      1.168428
    """
    (real, sampled), where = _same_shape(where, real=real, sampled=sampled)
    return _counted(jax.nn.softplus(real) + jax.nn.softplus(-sampled), where)


def marginal_consistency_loss(
    log_marginal: Float[Array, "*shape"],
    log_conditional: Float[Array, "*shape"],
    log_joint: Float[Array, "*shape"],
    *,
    where: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Marginalization self-consistency: `(log p(x_S) + log p(x_d | x_S) - log p(x_(S, d)))^2`.

    For a model that gives the marginal of any subset of variables in one evaluation: besides the likelihood, it is
    trained to agree with its own conditionals.

    Args:
      log_marginal: `log p(x_S)` of a random subset S; any shape.
      log_conditional: `log p(x_d | x_S)` of one more variable d; the same shape.
      log_joint: `log p(x_(S, d))`, the marginal of both; the same shape.
      where: the same shape, booleans, True = counts.

    Returns:
      Losses of that shape, float32 or wider; 0 where masked, and where both sides are -inf.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Liu et al., "Generative Marginalization Models".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import marginal_consistency_loss
      >>> print(marginal_consistency_loss(jnp.array(-2.3), jnp.array(-0.7), jnp.array(-2.8)).round(6))
      0.04
    """
    arrays = dict(log_marginal=log_marginal, log_conditional=log_conditional, log_joint=log_joint)
    (marginal, conditional, joint), where = _same_shape(where, **arrays)
    chained = marginal + conditional
    equal = chained == joint
    gap = jnp.where(equal, 0, chained) - jnp.where(equal, 0, joint)
    return _counted(gap * gap, where)


def target_surrogate_loss(
    outputs: Float[Array, "*rows outputs"],
    anchors: Float[Array, "*rows outputs"],
    gradients: Float[Array, "*rows outputs"],
    *,
    step_size: float | Float[Array, ""],
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """Target-based surrogate of an expensive loss: `<d, z - z_t> + |z - z_t|^2 / (2 step_size)`.

    `d` is the gradient of the loss with respect to the model's outputs `z_t`, computed once. Any optimizer then
    minimizes the surrogate over the parameters in several cheap steps, which run only the model. One step of gradient
    descent equals a step on the loss itself; more steps approach a step of `step_size` in the space of outputs. If the
    loss is L-smooth in the outputs and `step_size <= 1 / L`, the surrogate is an upper bound of the change of the loss.

    Args:
      outputs: z, `[*rows, outputs]`, from the parameters in training.
      anchors: z_t, the same shape, from the parameters at the start. A constant.
      gradients: d, the same shape. A constant.
      step_size: positive; may be traced (constant, or decreasing as one over the square root of the step).
      axis: the axis of the outputs.
      where: booleans that broadcast to the outputs, True = counts.

    Returns:
      Values `[*rows]`, float32 or wider: 0 at the anchors, negative where the loss should fall.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Lavington et al., "Target-based Surrogates for Stochastic Optimization".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import target_surrogate_loss
      >>> z_t, d = jnp.array([1.0, 2.0]), jnp.array([0.5, -1.0])
      >>> print(target_surrogate_loss(z_t - 0.1 * d, z_t, d, step_size=0.1).round(6))  # its minimum
      -0.0625
    """
    _checks.number("step_size", step_size, above=0)
    check_dense(outputs, "target_surrogate_loss")
    axis = check_axis(outputs, axis)
    (z, anchor, d), _ = _same_shape(None, outputs=outputs, anchors=anchors, gradients=gradients)
    anchor, d = lax.stop_gradient((anchor, d))
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, z.shape, "the shape of the outputs")
        z, anchor, d = (jnp.where(where, a, 0) for a in (z, anchor, d))
    step = z - anchor
    return jnp.sum(d * step + step * step / (2 * step_size), axis=axis)
