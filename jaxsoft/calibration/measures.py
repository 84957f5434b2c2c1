"""Calibration errors and reliability diagrams, of confidences and whether each prediction was right.

Confidences are numbers per example: `max_softmax_probability` and `jaxsoft.top_k_accuracy` give them for logits that
are stored, never stored or sharded. The Brier score is `jaxsoft.losses.brier_loss`, the negative log-likelihood
`jaxsoft.losses.cross_entropy`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide
from jaxsoft.rows.inner import check_range

BINNINGS = ("equal_width", "equal_mass", "interpolated")
NORMS = ("l1", "l2", "max")


class Reliability(NamedTuple):
    """The examples in bins of confidence.

    Attributes:
      confidence: `[bins]`, the mean confidence; 0 for an empty bin.
      accuracy: `[bins]`, the share of right predictions; 0 for an empty bin.
      share: `[bins]`, the share of the examples, by weight.
      edges: `[bins + 1]`, the bounds of the bins. A bin holds its upper bound, not the lower.
    """

    confidence: Array
    accuracy: Array
    share: Array
    edges: Array


def reliability(
    confidence: Float[Array, " examples"],
    correct: Bool[Array, " examples"] | Float[Array, " examples"],
    *,
    bins: int = 15,
    binning: str = "equal_width",
    weights: Float[Array, " examples"] | None = None,
) -> Reliability:
    """The mean confidence and the accuracy in bins of confidence: a reliability diagram.

    Args:
      confidence: `[examples]` floats in [0, 1].
      correct: `[examples]`, whether each prediction was right (or how much so, in [0, 1]).
      bins: the number of bins, a static integer.
      binning: `"equal_width"`: (0, 1/bins], (1/bins, 2/bins], ..., the first with 0; `"equal_mass"`: bins of nearly
        equal numbers of examples, in the order of confidence; `"interpolated"`: edges at interpolated quantiles,
        as in the code of the focal calibration paper, which loses the least confident example.
      weights: `[examples]`, 0 or more; an example of weight 0 does not count. Not for `"interpolated"`.

    Returns:
      A `Reliability`, float32 or wider. All shares are 0 without examples.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Guo et al., "On Calibration of Modern Neural Networks"; Mukhoti et al., "Calibrating Deep Neural Networks using
      Focal Loss".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import reliability
      >>> diagram = reliability(jnp.array([0.9, 0.8, 0.6]), jnp.array([True, False, True]), bins=2)
      >>> print(diagram.accuracy.round(4), diagram.share)
      [0.     0.6667] [0. 1.]
    """
    x, right, w = _checked(confidence, correct, bins, binning, weights)
    return _binned(x, right, w, bins, binning)


def calibration_error(
    confidence: Float[Array, " examples"],
    correct: Bool[Array, " examples"] | Float[Array, " examples"],
    *,
    bins: int = 15,
    binning: str = "equal_width",
    norm: str = "l1",
    weights: Float[Array, " examples"] | None = None,
) -> Float[Array, ""]:
    """The expected calibration error: the mean gap of confidence and accuracy over bins of confidence.

    With `binning="equal_mass"` the adaptive one, with `norm="max"` the maximum one. The bins bias it upwards.

    Args:
      confidence: `[examples]` floats in [0, 1].
      correct: `[examples]`, whether each prediction was right.
      bins: the number of bins, a static integer.
      binning: see `reliability`.
      norm: `"l1"`: `sum share |gap|`; `"l2"`: `sqrt(sum share gap^2)`; `"max"`: the largest gap of a bin with examples.
      weights: `[examples]`, 0 or more.

    Returns:
      A scalar in [0, 1], float32 or wider; 0 without examples. Its gradient takes the bins as fixed.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Guo et al., "On Calibration of Modern Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import calibration_error
      >>> confidence = jnp.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5])
      >>> correct = jnp.array([1, 1, 1, 0, 1, 1, 0, 1, 0, 0], bool)
      >>> print(calibration_error(confidence, correct, bins=5).round(4))
      0.185
    """
    _checks.option("norm", norm, NORMS)
    x, right, w = _checked(confidence, correct, bins, binning, weights)
    return _error(_binned(x, right, w, bins, binning), norm)


def classwise_calibration_error(
    probabilities: Float[Array, "examples classes"],
    labels: Int[Array, " examples"],
    *,
    bins: int = 15,
    binning: str = "equal_width",
    norm: str = "l1",
    weights: Float[Array, " examples"] | None = None,
) -> Float[Array, ""]:
    """The class-wise calibration error: the mean over the classes c of the error of `p_c` as a forecast of `y = c`.

    Args:
      probabilities: `[examples, classes]` floats in [0, 1].
      labels: `[examples]` class ids.
      bins: the number of bins, a static integer.
      binning: see `reliability`.
      norm: see `calibration_error`.
      weights: `[examples]`, 0 or more.

    Returns:
      A scalar in [0, 1], float32 or wider; 0 without examples, NaN for a label out of range. A class without labels
      counts as any other: its probabilities should be 0.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range, or no class.

    Reference:
      Kull et al., "Beyond temperature scaling: Obtaining well-calibrated multi-class probabilities with Dirichlet
      calibration".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import classwise_calibration_error
      >>> p = jnp.array([[0.8, 0.2], [0.6, 0.4]])
      >>> print(f"{classwise_calibration_error(p, jnp.array([0, 1]), bins=2):.4f}")
      0.2000
    """
    _checks.option("norm", norm, NORMS)
    _checks.floating("probabilities", probabilities)
    if probabilities.ndim != 2 or probabilities.shape[1] == 0:
        raise ValueError(
            f"probabilities must have shape [examples, classes], got shape {tuple(probabilities.shape)}"
        )
    n, classes = probabilities.shape
    _checks.integers("labels", labels)
    _checks.shape("labels", labels, (n,), "one class id per example")
    check_range("labels", labels, classes, None)
    labels = as_ids(labels)
    is_label = labels[:, None] == jnp.arange(classes, dtype=labels.dtype)
    x, _, w = _checked(probabilities[:, 0], is_label[:, 0], bins, binning, weights)
    in_range = (labels >= 0) & (labels < classes) | (w == 0)
    right = jnp.where(in_range[:, None], is_label.astype(x.dtype), jnp.nan)

    def of_class(p, right):
        return _error(_binned(p, right, w, bins, binning), norm)

    p = jnp.where((w != 0)[:, None], jnp.asarray(probabilities, x.dtype), 0)
    return jnp.mean(lax.map(lambda a: of_class(*a), (p.T, right.T)))


def _checked(confidence, correct, bins, binning, weights) -> tuple[Array, Array, Array]:
    _checks.integer("bins", bins, at_least=1)
    _checks.option("binning", binning, BINNINGS)
    _checks.floating("confidence", confidence)
    if confidence.ndim != 1:
        raise ValueError(f"confidence must have shape [examples], got shape {tuple(confidence.shape)}")
    _checks.numeric("correct", correct)
    _checks.shape("correct", correct, confidence.shape, "one per example")
    dtype = accumulation_dtype(confidence.dtype)
    if weights is None:
        weights = jnp.ones(confidence.shape, dtype)
    elif binning == "interpolated":
        raise ValueError(
            "weights must be None with binning='interpolated', which defines bins of equal examples"
        )
    _checks.numeric("weights", weights)
    _checks.shape("weights", weights, confidence.shape, "one number per example")
    w = jnp.asarray(weights, dtype)
    counts = w != 0
    x, right = (jnp.where(counts, jnp.asarray(a, dtype), 0) for a in (confidence, correct))
    return x, right, w


def _binned(x: Array, right: Array, w: Array, bins: int, binning: str) -> Reliability:
    n, total, fixed = x.shape[0], jnp.sum(w), lax.stop_gradient(x)
    if binning == "equal_mass":
        order = jnp.argsort(jnp.where(w != 0, fixed, jnp.inf))
        before = jnp.cumsum(w[order]) - w[order]
        place = jnp.floor(safe_divide(before * bins, jnp.broadcast_to(total, (n,)))).astype(jnp.int32)
        bin_of = jnp.zeros(n, jnp.int32).at[order].set(jnp.clip(place, 0, bins - 1))
        counts = w != 0
        tops = jax.ops.segment_max(jnp.where(counts, fixed, -jnp.inf), bin_of, bins)
        lowest = jnp.min(jnp.where(counts, fixed, jnp.inf), initial=1)
        edges = lax.cummax(jnp.concatenate([lowest[None], tops]))
    else:
        edges = jnp.arange(bins + 1, dtype=x.dtype) / bins
        if binning == "interpolated" and n:
            edges = jnp.interp(edges * n, jnp.arange(n, dtype=x.dtype), jnp.sort(fixed))
        least = 0 if binning == "equal_width" else -1
        bin_of = jnp.clip(jnp.searchsorted(edges, fixed).astype(jnp.int32) - 1, least, bins - 1)
    in_bin = (bin_of == jnp.arange(bins, dtype=jnp.int32)[:, None]) * w  # [bins, examples]
    mass = jnp.sum(in_bin, axis=1)
    confidence, accuracy = (safe_divide(jnp.sum(in_bin * a, axis=1), mass) for a in (x, right))
    return Reliability(confidence, accuracy, safe_divide(mass, jnp.broadcast_to(total, mass.shape)), edges)


def _error(diagram: Reliability, norm: str) -> Array:
    gap = jnp.abs(diagram.accuracy - diagram.confidence)
    if norm == "max":
        return jnp.max(jnp.where(diagram.share > 0, gap, 0))
    if norm == "l1":
        return jnp.sum(diagram.share * gap)
    square = jnp.sum(diagram.share * gap * gap)
    return jnp.where(square != 0, jnp.sqrt(jnp.where(square != 0, square, 1)), 0)


def reliability_plot(diagram: Reliability, *, ax: Any = None, title: str | None = None) -> Any:
    """Draws a reliability diagram with matplotlib: a bar per bin, the diagonal, and the share of the examples.

    Args:
      diagram: the result of `reliability`, not traced.
      ax: the axes to draw on; new ones by default.
      title: written above.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.calibration import reliability, reliability_plot
      >>> diagram = reliability(jnp.array([0.9, 0.6]), jnp.array([True, False]), bins=5)
      >>> print(reliability_plot(diagram, title="before").get_title())
      before
    """
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("reliability_plot needs matplotlib: pip install matplotlib") from error
        ax = plt.figure(figsize=(4, 4)).add_subplot()
    confidence, accuracy, share, edges = jax.device_get(tuple(diagram))
    some = share > 0
    left, width = edges[:-1][some], (edges[1:] - edges[:-1])[some]
    ax.bar(left, accuracy[some], width, align="edge", edgecolor="black", label="accuracy")
    ax.bar(left, share[some], width / 3, align="edge", color="gray", label="share of examples")
    ax.plot([0, 1], [0, 1], "k--", linewidth=1)
    ax.plot(confidence[some], accuracy[some], "o", color="darkred", label="mean confidence")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    if title is not None:
        ax.set_title(title)
    ax.legend(loc="upper left")
    return ax
