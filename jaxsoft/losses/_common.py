"""Arguments that the classification losses share: labels, masks and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, weigh
from jaxsoft._trees import entries_at
from jaxsoft.normalizers.inner import Survey, per_row, plain_survey
from jaxsoft.rows import LinearLogits, Logits, reduce_rows, reductions
from jaxsoft.rows.inner import check_axis, check_ids, check_range, detached, rows_of

IGNORE_INDEX = -100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """The checked arguments of a loss: a pytree. Every loss has two steps: `reduce`, then `finish`.

    A threshold search reads them as it reads `DenseRows`.

    Attributes:
      logits: `[*rows, columns]`.
      axis: the axis that holds a row, counted from the front.
      where: the class mask, or None.
      keep: `[*rows]`, False where the label is `ignore_index`; None where every row counts.
      labels: class ids `[*rows]`, 0 where ignored; or distributions `[*rows, columns]`, the axis moved last.
      soft: whether the labels are distributions.
      weights: `[*rows]` or None.
    """

    logits: Any
    axis: int = dataclasses.field(metadata=dict(static=True))
    where: Any
    keep: Any
    labels: Any
    soft: bool = dataclasses.field(metadata=dict(static=True))
    weights: Any

    @property
    def dtype(self) -> Any:
        """The dtype of statistics."""
        return accumulation_dtype(self.logits.dtype)

    @property
    def columns(self) -> int:
        """The number of classes."""
        return self.logits.shape[self.axis]

    def reduce(self, wanted: Any) -> Any:
        """Runs row reductions over the rows that are not ignored."""
        return reduce_rows(self.logits, wanted, axis=self.axis, where=self.where, row_where=self.keep)

    def survey(self) -> Survey:
        """What one pass tells about the rows."""
        return plain_survey(self)

    def detached(self) -> LabelledRows:
        """The same logits without derivatives, for a search that reads them in a loop; nothing else."""
        return LabelledRows(detached(self.logits), self.axis, self.where, self.keep, None, False, None)

    def per_row(self, name: str, value: Any) -> Array:
        """A number, or an array that broadcasts to `[*rows]`, as `[*rows]`."""
        return per_row(name, value, rows_of(self.logits.shape, self.axis), self.dtype)

    def label_statistics(self) -> Any:
        """The reduction to the negative log-likelihood of the labels and the log-sum-exp."""
        kind = reductions.soft_label_statistics if self.soft else reductions.label_statistics
        return kind(self.labels)

    def of_labels(self, per_class: Array) -> Array:
        """The entry of `[columns]` that belongs to each row's class id, `[*rows]`; 0 without classes."""
        if not self.columns:
            return jnp.zeros(self.labels.shape, per_class.dtype)
        return entries_at(per_class, jnp.clip(self.labels, 0, self.columns - 1))

    def finish(self, values: Array) -> Array:
        """Gives ignored rows the loss 0 and applies the weights of the examples."""
        if self.keep is not None:
            values = jnp.where(self.keep, values, 0)
        return values if self.weights is None else weigh(values, self.weights)


def prepare(
    logits: Logits,
    labels: Array,
    axis: int,
    where: Bool[Array, ...] | None,
    weights: Float[Array, "*rows"] | None,
    ignore_index: int | None = IGNORE_INDEX,
    *,
    soft: bool = True,
) -> LabelledRows:
    """Checks the arguments that every classification loss takes.

    Args:
      logits: as given by the user.
      labels: as given by the user.
      axis: as given by the user.
      where: as given by the user.
      weights: as given by the user.
      ignore_index: class id of examples to leave out; None leaves out none.
      soft: whether the loss takes label distributions.

    Returns:
      The arguments in the form the loss works with.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.
    """
    axis = check_axis(logits, axis)
    rows = rows_of(logits.shape, axis)
    check_weights(weights, rows)
    if not hasattr(labels, "dtype"):
        raise TypeError(f"labels must be an array, got {_checks.describe(labels)}")
    if jnp.issubdtype(labels.dtype, jnp.floating):
        if not soft:
            raise TypeError(
                f"labels must be class ids of integer dtype for this loss, got {_checks.describe(labels)}"
            )
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels of dtype {labels.dtype} are distributions and must have the logits' shape "
                f"{logits.shape}, got shape {labels.shape}; class ids must be integers of shape {rows}"
            )
        return LabelledRows(logits, axis, where, None, jnp.moveaxis(labels, axis, -1), True, weights)
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    check_ids("labels", labels, logits, axis, ignore_index=ignore_index)
    labels = as_ids(labels)
    if ignore_index is None:
        return LabelledRows(logits, axis, where, None, labels, False, weights)
    keep = labels != ignore_index
    return LabelledRows(logits, axis, where, keep, jnp.where(keep, labels, 0), False, weights)


def prepare_positives(
    logits: Logits, labels: Array, axis: int, where: Any, weights: Any, ignore_index: int
) -> tuple[LabelledRows, Array | None]:
    """`prepare` for a loss with several positives per row, given as padded ids `[*rows, k]` or as booleans.

    Returns:
      The rows, with those without positives ignored; their `labels` are ids, 0 where padded, or booleans
      `[*rows, columns]`. Second, the mask of ids that are not padding, `[*rows, k]`; None for booleans.
    """
    axis = check_axis(logits, axis)
    shape = rows_of(logits.shape, axis)
    check_weights(weights, shape)
    _checks.integer("ignore_index", ignore_index)
    if not hasattr(labels, "dtype") or not (
        labels.dtype == jnp.bool_ or jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise TypeError(f"labels must be integer class ids or booleans, got {_checks.describe(labels)}")
    if labels.dtype == jnp.bool_:
        _checks.shape("labels", labels, logits.shape, "booleans of the logits' shape")
        labels = jnp.moveaxis(labels, axis, -1)
        return LabelledRows(logits, axis, where, jnp.any(labels, axis=-1), labels, False, weights), None
    if labels.ndim != len(shape) + 1 or labels.shape[:-1] != shape:
        raise ValueError(
            f"labels must have shape {(*shape, 'k')} (k class ids per row), got shape {labels.shape}"
        )
    check_range("labels", labels, logits.shape[axis], ignore_index)
    labels = as_ids(labels)
    given = labels != ignore_index
    keep = jnp.any(given, axis=-1)
    return LabelledRows(logits, axis, where, keep, jnp.where(given, labels, 0), False, weights), given


def check_floats(name: str, value: Any, shape: tuple[int, ...], meaning: str) -> None:
    """Checks that `value` is a floating array of this exact shape; `meaning` says in words what it stands for."""
    _checks.floating(name, value)
    _checks.shape(name, value, shape, meaning)


def check_weights(weights: Any, rows: tuple[int, ...], meaning: str = "one number per example") -> None:
    """Checks the weights of the examples."""
    if weights is not None:
        _checks.numeric("weights", weights)
        _checks.shape("weights", weights, rows, meaning)


def widened(logits: Logits) -> Logits:
    """The logits in the dtype of sums, so that a temperature divides them without rounding."""
    return logits if isinstance(logits, LinearLogits) else logits.astype(accumulation_dtype(logits.dtype))


def is_zero(value: Any) -> bool:
    """Whether a hyper-parameter is known to be 0 (a traced one is not)."""
    return _checks.is_concrete_number(value) and float(value) == 0


def miss_of(nll: Array) -> Array:
    """`1 - p_y`, exact for probabilities near 1."""
    return -jnp.expm1(-nll)


def power_of(base: Array, exponent: Any) -> Array:
    """`base ** exponent` for a base of 0 or more, with a finite gradient at 0 (0^0 = 1)."""
    return jnp.maximum(base, 1e-12) ** exponent


def root_of(square: Array) -> Array:
    """The square root, with gradient 0 at 0."""
    positive = square != 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def unless_absent(nll: Array, phi: Callable[[Array], Array]) -> Array:
    """`phi(nll)`, or +inf with gradient 0 where the label's class is absent."""
    absent = nll == jnp.inf
    return jnp.where(absent, jnp.inf, phi(jnp.where(absent, 0, nll)))


def score_or_zero(score: Array) -> Array:
    """The label's score, 0 where the label is absent."""
    return jnp.where(score == -jnp.inf, 0, score)


def poison_of(score: Array) -> Array:
    """1, or NaN where the score is NaN, as that of a label out of range: a factor that spreads it to every gradient."""
    return jnp.where(jnp.isnan(score), jnp.nan, 1).astype(score.dtype)
