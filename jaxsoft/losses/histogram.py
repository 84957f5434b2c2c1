"""Regression by classification.

Distributions over the bins of a histogram as targets for a number to regress to, the cross-entropy with them, and the
mean of the predicted histogram. The targets are plain label distributions, for every loss that takes those:
`cross_entropy(logits, two_hot_targets(value, centers))`.

A *support* is given by its increasing `edges` `[bins + 1]` (histograms), or by its increasing `centers` `[bins]`
(point masses); `bin_centers` turns edges into centers. `jnp.linspace(low, high, bins + 1)` makes equal bins.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import erf, erfc
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide
from jaxsoft.losses._common import check_floats, check_weights
from jaxsoft.losses.classification import cross_entropy
from jaxsoft.rows import Logits, RowReduction, reduce_rows
from jaxsoft.rows.inner import check_axis, exponentials, keep_gauge, rescale, rows_of, running_max


def histogram_loss(
    logits: Logits,
    target: Float[Array, "*rows"],
    edges: Float[Array, " bins+1"],
    *,
    sigma: float | None = None,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"]:
    """HL-Gauss, the cross-entropy of a histogram: `-sum_i q_i log softmax(x)_i` with q of `hl_gauss_targets`.

    q_i is the mass of a normal distribution around the target in bin i. *Reconstructed* (from the abstract and general
    knowledge). Predict with `histogram_mean`. For other targets, call `cross_entropy(logits, two_hot_targets(...))`.

    Args:
      logits: `[*rows, bins]`, a floating array or `linear_logits`.
      target: `[*rows]`, the numbers to regress to; constants.
      edges: `[bins + 1]`, increasing, as in `hl_gauss_targets`.
      sigma: as in `hl_gauss_targets`.
      axis: the axis of the bins.
      where: mask that broadcasts to the logits, True = counts. To leave out an example, mask its whole row: it costs
        0 for any target, NaN included. A target with mass in a masked bin costs +inf.
      weights: `[*rows]`, multiply the losses; a weight of 0 hides a target that is not finite.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Imani and White, "Improving Regression Performance with Distributional Losses"; Farebrother et al., "Stop
      Regressing: Training Value Functions via Classification for Scalable Deep RL".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, edges = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.linspace(-1.0, 1.0, 6)
      >>> print(jaxsoft.losses.histogram_loss(logits, jnp.array([0.3]), edges, sigma=0.3).round(4))
      [2.9017]
    """
    axis = check_axis(logits, axis)
    rows, bins = rows_of(logits.shape, axis), logits.shape[axis]
    check_floats("target", target, rows, "one number per example")
    _check_support("edges", edges)
    _checks.shape("edges", edges, (bins + 1,), "one more than there are logits in a row")
    counts = jnp.ones(rows, bool)
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, logits.shape, "the shape of the logits")
        counts = jnp.any(jnp.broadcast_to(where, logits.shape), axis=axis)
    check_weights(weights, rows)
    if weights is not None:
        counts = counts & (weights != 0)
    # Ignored examples need a valid distribution as well: a NaN would reach the gradient of the logits.
    q = hl_gauss_targets(jnp.where(counts, target, edges[0]), edges, sigma=sigma)
    return cross_entropy(logits, jnp.moveaxis(q, -1, axis), axis=axis, where=where, weights=weights)


def histogram_mean(
    logits: Logits,
    centers: Float[Array, " bins"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """The mean of a predicted histogram, `sum_i softmax(x)_i c_i`.

    Args:
      logits: `[*rows, bins]`, a floating array or `linear_logits`.
      centers: `[bins]`, the value c that each bin stands for: `bin_centers(edges)`.
      axis: the axis of the bins.
      where: mask that broadcasts to the logits, True = counts.

    Returns:
      Means `[*rows]`, float32 or wider; 0 for a row without bins.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Farebrother et al., "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, centers = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.linspace(-0.8, 0.8, 5)
      >>> print(jaxsoft.losses.histogram_mean(logits, centers).round(4))
      [-0.4182]
    """
    axis = check_axis(logits, axis)
    _check_support("centers", centers)
    _checks.shape("centers", centers, (logits.shape[axis],), "one number per bin")
    return reduce_rows(logits, _EXPECTATION._replace(col_args=(centers,)), axis=axis, where=where)


def hl_gauss_targets(
    target: Float[Array, "*rows"], edges: Float[Array, " bins+1"], *, sigma: float | None = None
) -> Float[Array, "*rows bins"]:
    """The mass of a normal distribution around the target in each bin, renormalized to the support.

    `q_i = (Phi((e_{i+1} - t) / sigma) - Phi((e_i - t) / sigma)) / (Phi((e_m - t) / sigma) - Phi((e_0 - t) / sigma))`
    with the target t clipped to `[e_0, e_m]`. *Reconstructed*. Accurate in the tails, down to masses that underflow.

    Args:
      target: `[*rows]`; a constant.
      edges: `[bins + 1]`, increasing; they should cover the targets.
      sigma: the standard deviation, positive. Default: 0.75 of the mean bin width; 0.5 to 2 bin widths work.

    Returns:
      Distributions `[*rows, bins]`, float32 or wider, without a gradient.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Imani and White, "Improving Regression Performance with Distributional Losses"; Farebrother et al., "Stop
      Regressing: Training Value Functions via Classification for Scalable Deep RL".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> edges = jnp.linspace(-1.0, 1.0, 6)
      >>> print((100 * jaxsoft.losses.hl_gauss_targets(jnp.array(0.3), edges, sigma=0.3)).round())
      [ 0.  5. 32. 48. 15.]
    """
    _checks.floating("target", target)
    _check_support("edges", edges)
    _checks.shape("edges", edges, (max(edges.size, 2),), "one more than there are bins")
    if sigma is not None:
        _checks.number("sigma", sigma, above=0)
    t, e = _constants(target, edges)
    spread = 0.75 * (e[-1] - e[0]) / (e.size - 1) if sigma is None else lax.stop_gradient(sigma)
    z = (e - jnp.clip(t, e[0], e[-1])[..., None]) / (spread * 2**0.5)
    low, high = z[..., :-1], z[..., 1:]
    # A bin far from the target keeps its digits as a difference of two erfc, a bin near it as one of two erf. By
    # symmetry the lower tail equals the upper one.
    near = jnp.minimum(jnp.abs(low), jnp.abs(high))
    far = jnp.maximum(jnp.abs(low), jnp.abs(high))
    one_sided = (low > 0.5) | (high < -0.5)
    mass = jnp.where(one_sided, erfc(near) - erfc(far), erf(high) - erf(low))
    return mass / jnp.sum(mass, axis=-1, keepdims=True)


def two_hot_targets(
    target: Float[Array, "*rows"], centers: Float[Array, " bins"]
) -> Float[Array, "*rows bins"]:
    """The target's mass split between the two nearest centers, so that the mean of the distribution is the target.

    Args:
      target: `[*rows]`, clipped to the support; a constant.
      centers: `[bins]`, increasing.

    Returns:
      Distributions `[*rows, bins]`, float32 or wider, without a gradient.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Schrittwieser et al., "Mastering Atari, Go, Chess and Shogi by Planning with a Learned Model".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.two_hot_targets(jnp.array([0.3, 9.0]), jnp.linspace(-0.8, 0.8, 5)).round(4))
      [[0.   0.   0.25 0.75 0.  ]
       [0.   0.   0.   0.   1.  ]]
    """
    _checks.floating("target", target)
    _check_support("centers", centers)
    return _split(*_constants(target, centers))


def categorical_projection_targets(
    atoms: Float[Array, "*rows k"], probabilities: Float[Array, "*rows k"], centers: Float[Array, " bins"]
) -> Float[Array, "*rows bins"]:
    """The projection of C51: the mass of each atom is split between the two nearest centers.

    The atoms are those of the next state, moved by the Bellman update: `reward + discount * centers`.

    Args:
      atoms: `[*rows, k]`, clipped to the support; constants.
      probabilities: `[*rows, k]`, the mass of each atom; constants.
      centers: `[bins]`, increasing: the support to project onto.

    Returns:
      Distributions `[*rows, bins]`, float32 or wider, without a gradient.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Bellemare et al., "A Distributional Perspective on Reinforcement Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> centers = jnp.linspace(-1.0, 1.0, 5)
      >>> next_probabilities = jnp.array([0.0, 0.5, 0.0, 0.5, 0.0])
      >>> moved = 0.25 + 0.5 * centers  # reward + discount * centers
      >>> print(jaxsoft.losses.categorical_projection_targets(moved, next_probabilities, centers))
      [0.  0.  0.5 0.5 0. ]
    """
    _checks.floating("atoms", atoms)
    _checks.floating("probabilities", probabilities)
    if atoms.ndim == 0:
        raise ValueError("atoms must have shape [*rows, k], got a scalar")
    _checks.shape("probabilities", probabilities, atoms.shape, "one number per atom")
    _check_support("centers", centers)
    a, c = _constants(atoms, centers)
    p = lax.stop_gradient(probabilities).astype(a.dtype)
    return jnp.einsum("...j,...ji->...i", p, _split(a, c), precision=lax.Precision.HIGHEST)


def bin_centers(edges: Float[Array, " bins+1"]) -> Float[Array, " bins"]:
    """The centers of the bins, `(e_i + e_{i+1}) / 2`.

    Args:
      edges: `[bins + 1]`.

    Returns:
      `[bins]`.

    Raises:
      TypeError: edges are not floating.
      ValueError: edges do not have exactly one axis.

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.bin_centers(jnp.array([-1.0, 0.0, 2.0])))
      [-0.5  1. ]
    """
    _check_support("edges", edges)
    return (edges[:-1] + edges[1:]) / 2


def _check_support(name: str, value: Array) -> None:
    _checks.floating(name, value)
    _checks.shape(name, value, (max(value.size, 1),), "increasing numbers")


def _constants(target: Array, support: Array) -> tuple[Array, Array]:
    """Both arrays as constants, in a common dtype of at least float32."""
    target, support = lax.stop_gradient((jnp.asarray(target), jnp.asarray(support)))
    dtype = accumulation_dtype(target.dtype, support.dtype)
    return target.astype(dtype), support.astype(dtype)


def _split(target: Array, centers: Array) -> Array:
    """`[..., bins]`: each center's hat function (1 at the center, 0 at its neighbours), evaluated at the target."""
    t = jnp.clip(target, centers[0], centers[-1])[..., None]
    before = jnp.concatenate([centers[:1] - 1, centers[:-1]])
    after = jnp.concatenate([centers[1:], centers[-1:] + 1])
    return jnp.clip(jnp.minimum((t - before) / (centers - before), (after - t) / (after - centers)), 0, 1)


# The mean under softmax of one number c per column: (m, sum e^(x-m), sum e^(x-m) c).


def _expectation_init(like):
    return jnp.full_like(like, -jnp.inf), like, like


def _expectation_update(state, tile):
    m, s, u = state
    m_new = running_max(m, tile)
    factor, w = rescale(m, m_new), exponentials(tile, m_new)
    c = tile.col_args[0].astype(w.dtype)
    return m_new, factor * s + jnp.sum(w, axis=-1), factor * u + jnp.sum(w * c, axis=-1)


def _expectation_merge(a, b, *args):
    m = jnp.maximum(a[0], b[0])
    by_a, by_b = rescale(a[0], m), rescale(b[0], m)
    return m, by_a * a[1] + by_b * b[1], by_a * a[2] + by_b * b[2]


def _expectation_finalize(state):
    return safe_divide(state[2], state[1])


_EXPECTATION = RowReduction(
    _expectation_init,
    _expectation_update,
    _expectation_merge,
    _expectation_finalize,
    keep_gauge,
)
