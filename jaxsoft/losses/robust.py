"""Wrong labels and adversarial examples.

Losses on which a wrong label has less effect than on cross-entropy, and losses of an example together with its
adversarial neighbour.

`generalized_cross_entropy`, `mean_absolute_error_loss`, `reverse_cross_entropy` and `symmetric_cross_entropy` are
functions of the label's probability alone, all of them sums of members of the family `comp_sum_loss`; `normalized_loss`
and `active_passive_loss` read the other classes, too. `examples/losses/robust.py` compares them on digits of which 40%
have wrong labels.

`smooth_adversarial_comp_sum_loss` and `trades_loss` take the logits of the examples and of their perturbed copies,
either of which may be `linear_logits`. `adversarial_brier_loss`, one of the proper scores, fits the same training step.

In the formulas `x` are the logits of a row, `y` its label, `p = softmax(x)`, `l = logsumexp(x) - x_y` the negative
log-likelihood, and `C` the number of classes that are not masked. A loss that reads a row through `l` alone is one
short definition `phi(l)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, expm1_over, safe_divide
from jaxsoft.losses._common import (
    IGNORE_INDEX,
    LabelledRows,
    miss_of,
    power_of,
    prepare,
    root_of,
    unless_absent,
)
from jaxsoft.losses._pairs import PairTerm, check_second, of_second, pair_sum, per_mass
from jaxsoft.rows import Logits, reductions

# --- functions of the negative log-likelihood ------------------------------------------------------------


def _box_cox(nll: Array, q: Any) -> Array:
    """`(1 - p_y^q) / q`, and its limit `l` at q = 0; `q l` is held in [-80, 80]."""
    return expm1_over(nll, -q)


def _reverse(nll: Array, label_floor: Any) -> Array:
    return -jnp.log(label_floor) * miss_of(nll)


def _loss_of_nll(rows: LabelledRows, phi: Callable[[Array], Array]) -> Array:
    """The loss `phi(nll)` of the rows."""
    return rows.finish(unless_absent(rows.reduce(rows.label_statistics()).nll, phi))


def comp_sum_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    tau: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Comp-sum loss: `((1 + u)^(1 - tau) - 1) / (1 - tau)` of `u = sum_{c != y} e^(x_c - x_y) = e^l - 1`.

    One family from the sum-exponential loss `u` (tau = 0) through cross-entropy `log(1 + u)` (tau = 1) to the mean
    absolute error `1 - p_y` (tau = 2). For 1 < tau < 2 it is `generalized_cross_entropy` with `q = tau - 1`. Its
    gradient is `p_y^(tau - 1)` times that of cross-entropy. *Reconstructed* from the paper's standard definitions.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      tau: selects the member of the family, 0 or more. Below 1 the loss grows like `e^((1 - tau) l)`; this exponent is
        at most 80, beyond which the gradient is 0.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider; in `[0, 1 / (tau - 1)]` for tau > 1.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.comp_sum_loss(logits, jnp.array([0]), tau=1.5).round(6))
      [0.505282]
    """
    _checks.number("tau", tau, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    return _loss_of_nll(rows, lambda nll: _box_cox(nll, tau - 1))


def generalized_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    q: float = 0.7,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Generalized cross-entropy (GCE): `(1 - p_y^q) / q`, between cross-entropy and the mean absolute error.

    The gradient is `p_y^q` times that of cross-entropy: labels that the model finds unlikely count less. It is
    `comp_sum_loss` with `tau = 1 + q`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      q: from 0 (the limit, cross-entropy) to 1 (`1 - p_y`) in the paper; larger values are allowed.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider, in `[0, 1 / q]`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels"; Ma et
      al., "Normalized Loss Functions for Deep Learning with Noisy Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.generalized_cross_entropy(logits, jnp.array([0])).round(6))
      [0.478311]
    """
    _checks.number("q", q, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    return _loss_of_nll(rows, lambda nll: _box_cox(nll, q))


def mean_absolute_error_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Mean absolute error (MAE): `1 - p_y`, half of `sum_c |p_c - [c = y]|`.

    Symmetric: its sum over all labels is `C - 1` for any logits, which makes it tolerant of wrong labels. Training
    starts slowly: the gradient is `p_y` times that of cross-entropy.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider, in [0, 1].

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Ghosh, Kumar and Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks"; Ma et al.,
      "Normalized Loss Functions for Deep Learning with Noisy Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.mean_absolute_error_loss(logits, jnp.array([0])).round(6))
      [0.441455]
    """
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    return _loss_of_nll(rows, miss_of)


def reverse_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    label_floor: float = 1e-4,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Reverse cross-entropy (RCE): `-sum_c p_c log q_c = -log(label_floor) (1 - p_y)`, q the one-hot label.

    A multiple of `mean_absolute_error_loss`, by default 9.210340 times it.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      label_floor: replaces the zeros of q, between 0 and 1.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider, in `[0, -log(label_floor)]`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels"; Ma et al., "Normalized Loss
      Functions for Deep Learning with Noisy Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.reverse_cross_entropy(logits, jnp.array([0])).round(6))
      [4.065949]
    """
    _checks.number("label_floor", label_floor, above=0, below=1)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    return _loss_of_nll(rows, lambda nll: _reverse(nll, label_floor))


def symmetric_cross_entropy(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    label_floor: float = 1e-4,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Symmetric cross-entropy (SCE): `alpha l - beta log(label_floor) (1 - p_y)`.

    `alpha` times cross-entropy plus `beta` times `reverse_cross_entropy`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      alpha: coefficient of the cross-entropy, 0 or more; 0.1 is for CIFAR-10.
      beta: coefficient of the reverse cross-entropy, 0 or more.
      label_floor: as in `reverse_cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.symmetric_cross_entropy(logits, jnp.array([0])).round(6))
      [4.124191]
    """
    _checks.number("alpha", alpha, at_least=0)
    _checks.number("beta", beta, at_least=0)
    _checks.number("label_floor", label_floor, above=0, below=1)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    return _loss_of_nll(rows, lambda nll: alpha * nll + beta * _reverse(nll, label_floor))


# --- losses divided by their sum over all labels ---------------------------------------------------------

_ACTIVE = ("cross_entropy", "focal", "generalized")
_PASSIVE = ("mae", "reverse")


def _phi(loss: str, nll: Array, q: Any, gamma: Any) -> Array:
    """The named loss as a function of `l`, without the constant factors that cancel in a quotient."""
    if loss == "cross_entropy":
        return nll
    if loss == "focal":
        return power_of(miss_of(nll), gamma) * nll
    if loss == "generalized":
        return -jnp.expm1(-q * nll)
    return miss_of(nll)


def _focal_term(x, cols, shift, log_sum, gamma):
    """The focal loss of class c, of `l_c = logsumexp - x_c` (0 where an absent x_c, set to 0, makes it negative)."""
    nll = log_sum - (x - shift)
    return _phi("focal", jnp.where(nll < 0, 0, nll), None, gamma)


def _normalized(rows: LabelledRows, loss: str, q: Any, gamma: Any) -> tuple[Array, Callable[[Array], Array]]:
    """The negative log-likelihood of the labels, and the function that turns it into the normalized loss."""

    def by_row(number):
        return jnp.broadcast_to(jnp.asarray(number, accumulation_dtype(rows.logits.dtype)), rows.labels.shape)

    wanted = {"label": rows.label_statistics(), "count": reductions.count()}
    if loss == "cross_entropy":
        wanted["sum"] = reductions.sum()
    elif loss == "generalized":
        wanted["powers"] = reductions.sum_of_powered_probabilities(by_row(q))
    out = rows.reduce(wanted)
    (nll, partition), count = out["label"], out["count"]
    if loss == "cross_entropy":
        total = count * jnp.where(count > 0, partition.value, 0) - out["sum"]
    elif loss == "generalized":
        total = count - out["powers"]
    elif loss == "focal":
        log_sum = jnp.where(count > 0, partition.log_sum, 0)
        total = rows.reduce(reductions.mapped_sum(_focal_term, partition.shift, log_sum, by_row(gamma)))
    else:
        total = count - 1
    total = jnp.where(count > 1, total, jnp.inf)  # a single class costs 0
    return nll, lambda nll: safe_divide(_phi(loss, nll, q, gamma), total)


def normalized_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    loss: str = "cross_entropy",
    q: float = 0.7,
    gamma: float = 0.5,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """A loss divided by its sum over all labels, `L(y) / sum_c L(c)`: in [0, 1], and symmetric.

    With `l_c = logsumexp(x) - x_c` the losses are

    * `"cross_entropy"` (NCE): `l_y / (C logsumexp(x) - sum_c x_c)`, in one pass;
    * `"focal"` (NFL): `(1 - p_y)^gamma l_y / sum_c (1 - p_c)^gamma l_c`, in two passes;
    * `"generalized"` (NGCE): `(1 - p_y^q) / (C - sum_c p_c^q)`, in one pass;
    * `"mae"` and `"reverse"` (NMAE, NRCE): `(1 - p_y) / (C - 1)`, the same for both.

    These are the definitions. The authors' code differs in three places: its NFL treats the factors `(1 - p_c)^gamma`
    as constants, its NMAE is half of the definition, and its NRCE multiplies by `C - 1` where the definition divides.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      loss: which loss to normalize, one of the names above.
      q: of `"generalized"`, positive; the paper uses 0.7 on CIFAR-100, 0.1 on MNIST and CIFAR-10. As q goes to 0 the
        limit is NCE, but the quotient loses precision to the difference `C - sum_c p_c^q`.
      gamma: of `"focal"`, 0 or more.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row with a single class.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown loss.

    Reference:
      Ma et al., "Normalized Loss Functions for Deep Learning with Noisy Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> for name in ("cross_entropy", "focal", "generalized", "mae"):
      ...     print(jaxsoft.losses.normalized_loss(logits, jnp.array([0]), loss=name).round(6))
      [0.056479]
      [0.040082]
      [0.095272]
      [0.110364]
    """
    _checks.option("loss", loss, _ACTIVE + _PASSIVE)
    _checks.number("q", q, above=0)
    _checks.number("gamma", gamma, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    return rows.finish(unless_absent(*_normalized(rows, loss, q, gamma)))


def active_passive_loss(
    logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    active: str = "cross_entropy",
    passive: str = "mae",
    alpha: float = 1.0,
    beta: float = 1.0,
    q: float = 0.7,
    gamma: float = 0.5,
    label_floor: float = 1e-4,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Active-passive loss (APL): `alpha normalized_loss(active) + beta passive`.

    The active term raises `p_y`, the passive one lowers the other classes' probabilities. Both tolerate wrong labels,
    and together they learn faster than either alone. By default the loss is `alpha l / (C logsumexp(x) - sum_c x_c) +
    beta (1 - p_y)`.

    Args:
      logits: `[*rows, columns]`, a floating array or `linear_logits`.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      active: the loss to normalize: `"cross_entropy"`, `"focal"` or `"generalized"`.
      passive: `"mae"` (`mean_absolute_error_loss`) or `"reverse"` (`reverse_cross_entropy`), not normalized.
      alpha: coefficient of the active term, 0 or more. The paper's (alpha, beta) are (1, 10) on MNIST, (1, 1) on
        CIFAR-10, and on CIFAR-100 (10, 1) with `"mae"`, (10, 0.1) with `"reverse"`.
      beta: coefficient of the passive term, 0 or more.
      q: of `"generalized"`, as in `normalized_loss`.
      gamma: of `"focal"`, as in `normalized_loss`.
      label_floor: of `"reverse"`, as in `reverse_cross_entropy`.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown loss.

    Reference:
      Ma et al., "Normalized Loss Functions for Deep Learning with Noisy Labels".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]])
      >>> print(jaxsoft.losses.active_passive_loss(logits, jnp.array([0])).round(6))
      [0.497934]
      >>> print(jaxsoft.losses.active_passive_loss(logits, jnp.array([0]), passive="reverse").round(6))
      [4.122428]
    """
    _checks.option("active", active, _ACTIVE)
    _checks.option("passive", passive, _PASSIVE)
    _checks.number("alpha", alpha, at_least=0)
    _checks.number("beta", beta, at_least=0)
    _checks.number("q", q, above=0)
    _checks.number("gamma", gamma, at_least=0)
    _checks.number("label_floor", label_floor, above=0, below=1)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    nll, normalized = _normalized(rows, active, q, gamma)

    def phi(nll):
        other = miss_of(nll) if passive == "mae" else _reverse(nll, label_floor)
        return alpha * normalized(nll) + beta * other

    return rows.finish(unless_absent(nll, phi))


# --- an example and its adversarial neighbour --------------------------------------------------------------


def _squared_margin_change(log_p, log_q, change):
    """`(d'_c - d_c)^2` for the margins `d_c = x_y - x_c = log p_y - log p_c`."""
    return jnp.square((log_q - log_p) + change)


_SQUARED_MARGIN_CHANGE = PairTerm(_squared_margin_change, per_mass(math.inf), per_mass(math.inf))


def smooth_adversarial_comp_sum_loss(
    logits: Logits,
    adversarial_logits: Logits,
    labels: Int[Array, "*rows"],
    *,
    tau: float = 1.0,
    nu: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Smooth adversarial comp-sum loss: `comp_sum_loss(x, y) + nu ||d' - d||_2`, with margins `d_c = x_y - x_c`.

    The norm runs over the classes other than y; d' are the margins of the adversarial logits, which the caller
    finds (by projected gradient ascent on the norm, say). Both arguments have gradients, and either may be
    `linear_logits`. Where the two rows differ only by a shift, the norm and its gradient are 0. *Reconstructed* from
    the paper's standard definitions.

    Args:
      logits: `[*rows, columns]` of the examples, a floating array or `linear_logits`.
      adversarial_logits: logits of the perturbed examples, of the same shape. A class of -inf
        in one row alone has an infinite margin there, and costs +inf.
      labels: class ids `[*rows]`, as in `cross_entropy`.
      tau: as in `comp_sum_loss`.
      nu: coefficient of the norm, 0 or more; the paper tunes it between 1 and 10.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, adversarial = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[1.6, 1.2, 0.0, -0.8, 0.6]])
      >>> loss = jaxsoft.losses.smooth_adversarial_comp_sum_loss
      >>> print(loss(logits, adversarial, jnp.array([0])).round(4))
      [1.612]
    """
    _checks.number("tau", tau, at_least=0)
    _checks.number("nu", nu, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index, soft=False)
    second = check_second("adversarial_logits", adversarial_logits, logits, rows.axis)
    label = rows.label_statistics()
    (nll, partition), (other_nll, other) = rows.reduce((label, of_second(label, second)))
    absent = (nll == jnp.inf) | (other_nll == jnp.inf)
    change = jnp.where(absent, 0, other_nll - nll)
    square = rows.reduce(pair_sum(_SQUARED_MARGIN_CHANGE, second, partition, other, change))
    lacking = absent | (square == jnp.inf)
    loss = _box_cox(jnp.where(absent, 0, nll), tau - 1) + nu * root_of(jnp.where(lacking, 0, square))
    return rows.finish(jnp.where(lacking, jnp.inf, loss))


def _kl(log_p, log_q):
    return jnp.exp(log_p) * (log_p - log_q)


_KL = PairTerm(_kl, per_mass(math.inf), per_mass(0))


def trades_loss(
    logits: Logits,
    adversarial_logits: Logits,
    labels: Int[Array, "*rows"] | Float[Array, "*rows columns"],
    *,
    beta: float = 6.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """TRADES: `cross_entropy(x, y) + beta KL(p || p')`, with p' the softmax of the adversarial logits.

    Both arguments have gradients, and either may be `linear_logits`. `adversarial_brier_loss` is its counterpart in
    squared errors. *Reconstructed*: the standard form.

    Args:
      logits: `[*rows, columns]` of the examples, a floating array or `linear_logits`.
      adversarial_logits: logits of the perturbed examples, of the same shape. A class of -inf
        here alone costs +inf.
      labels: class ids `[*rows]` or distributions of the logits' shape, as in `cross_entropy`.
      beta: coefficient of the divergence, 0 or more.
      axis: the axis of the classes.
      where: class mask that broadcasts to the logits, True = counts. A label on a masked class costs +inf.
      weights: `[*rows]`, multiply the losses.
      ignore_index: class id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits, adversarial = jnp.array([[2.0, 1.0, 0.1, -1.0, 0.5]]), jnp.array([[1.6, 1.2, 0.0, -0.8, 0.6]])
      >>> print(jaxsoft.losses.trades_loss(logits, adversarial, jnp.array([0])).round(6))
      [0.80112]
    """
    _checks.number("beta", beta, at_least=0)
    rows = prepare(logits, labels, axis, where, weights, ignore_index)
    second = check_second("adversarial_logits", adversarial_logits, logits, rows.axis)
    (nll, partition), other = rows.reduce(
        (rows.label_statistics(), of_second(reductions.log_partition(), second))
    )
    divergence = rows.reduce(pair_sum(_KL, second, partition, other))
    return rows.finish(unless_absent(divergence, lambda divergence: nll + beta * divergence))
