"""Transforms of logits before sampling: temperatures, truncations, penalties and masks, and chains of them.

A transform maps logits to logits, row by row, and gives a rejected token the logit -inf:

    transform = chain(temperature(0.8), top_k(50), min_p(0.05))
    tokens = sample(transform(logits), key)

The order of a chain is the user's: each transform reads what the one before it left. Of an array, a transform returns
an array in float32 at least; of `linear_logits`, it returns an expression of which nothing is stored, and every
threshold of a row costs one pass over the logits.

Transforms are pytrees whose numbers are leaves, and every number may be traced, or an array of one number per row: a
chain may be an argument of a compiled function, and other numbers compile nothing. Names of arguments are those of
transformers and vLLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft.decoding._rows import TransformedLogits, as_rows
from jaxsoft.normalizers.inner import ADAPTIVE_COEFFICIENTS, adaptive_sharpness
from jaxsoft.rows import Logits, RowReduction, reductions
from jaxsoft.rows.inner import capped, just_below, nth


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transform:
    """A transform of logits: `transform(logits)`.

    Attributes:
      define: `(rows, **arguments, **options) -> rows`, a module-level function. `rows.reduce(reductions)` gives
        statistics of the rows (each call is a pass), `rows.then(function, *args)` the rows after an elementwise
        `function(x, cols, *args)`.
      arguments: arrays and numbers, leaves of the pytree.
      options: pairs of a name and a static value.

    Example (a threshold of one's own):
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import Transform
      >>> def above(x, cols, bound):
      ...     return jnp.where(x < bound, -jnp.inf, x)
      >>> def define(rows, bound):
      ...     return rows.then(above, rows.per_row("bound", bound))
      >>> print(Transform(define, {"bound": 0.5})(jnp.array([1.0, 0.0, 0.7])))
      [ 1.  -inf  0.7]
    """

    define: Callable[..., TransformedLogits] = dataclasses.field(metadata=dict(static=True))
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), metadata=dict(static=True))

    def __call__(
        self, logits: Logits | TransformedLogits, *, axis: int = -1, where: Bool[Array, ...] | None = None
    ) -> Any:
        """The transformed logits.

        Args:
          logits: an array, `linear_logits`, `stored_logits` or the result of a transform.
          axis: the axis that holds a row; the last one unless `logits` is an array. Arguments of the transform with one
            number per entry have it last in any case.
          where: booleans that broadcast to the logits, True = present; other entries are -inf from the start.

        Returns:
          Of an array, an array of its shape; else `TransformedLogits`.
        """
        rows = self.define(as_rows(logits, axis=axis, where=where), **self.arguments, **dict(self.options))
        return jnp.moveaxis(rows.dense(), -1, axis) if rows.is_stored else rows


def chain(*transforms: Transform) -> Transform:
    """Transforms one after another; without any, the logits as they are.

    Args:
      *transforms: what this module offers, or a `Transform` of your own; chains nest.

    Returns:
      A `Transform`.

    Raises:
      TypeError: something that is no `Transform`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import chain, temperature, top_k
      >>> print(chain(temperature(0.5), top_k(2))(jnp.array([1.0, 2.0, -1.0, 0.5])))
      [  2.   4. -inf -inf]
    """
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TypeError(f"transforms must be Transforms, got {_checks.describe(transform)}")
    return Transform(_chained, {"transforms": tuple(transforms)})


def _chained(rows: TransformedLogits, *, transforms: tuple[Transform, ...]) -> TransformedLogits:
    for transform in transforms:
        rows = transform.define(rows, **transform.arguments, **dict(transform.options))
    return rows


def _number(name: str, value: Any, **bounds: float) -> Any:
    """A checked Python number, or a floating array (a traced one is not compared)."""
    if _checks.is_concrete_number(value):
        _checks.number(name, value, **bounds)
        return float(value)
    _checks.floating(name, value)
    return value


# --- elementwise --------------------------------------------------------------------------------------------


def temperature(temperature: float | Float[Array, "*rows"]) -> Transform:
    """`logits / temperature`: below 1 sharper, above 1 flatter.

    Args:
      temperature: positive, a number or one per row. 0 is refused: its limit is `argmax`, or `sample(..., greedy=)`
        for some rows of a batch. A traced number is not checked.

    Returns:
      A `Transform`.

    Raises:
      TypeError: a temperature that is neither a number nor a floating array.
      ValueError: a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import temperature
      >>> print(temperature(0.5)(jnp.array([1.0, 2.0])))
      [2. 4.]
    """
    if _checks.is_concrete_number(temperature) and float(temperature) == 0:
        raise ValueError(
            "temperature must be a number > 0, got 0.0: its limit is argmax, or greedy=True in sample"
        )
    return Transform(_tempered, {"temperature": _number("temperature", temperature, above=0)})


def _tempered(rows, *, temperature):
    return rows.then(_divided, rows.per_row("temperature", temperature))


def _divided(x, cols, t):
    return x / t


def softcap(cap: float | Float[Array, "*rows"]) -> Transform:
    """`cap * tanh(logits / cap)`: caps logits smoothly to (-cap, cap).

    Args:
      cap: positive, a number or one per row.

    Returns:
      A `Transform`.

    Raises:
      TypeError: a cap that is neither a number nor a floating array.
      ValueError: a cap that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import softcap
      >>> print(softcap(30.0)(jnp.array([1.0, 100.0])).round(2))
      [ 1.   29.92]
    """
    return Transform(_softcapped, {"cap": _number("cap", cap, above=0)})


def _softcapped(rows, *, cap):
    return rows.then(_capped, rows.per_row("cap", cap))


def _capped(x, cols, cap):
    return capped(x, cap)


def adaptive_temperature(
    *, coefficients: Sequence[float] = ADAPTIVE_COEFFICIENTS, threshold: float | Float[Array, "*rows"] = 0.5
) -> Transform:
    """`beta * logits` with `beta = max(1, P(H))` a polynomial of the row's entropy; one pass.

    That of `jaxsoft.adaptive_temperature_softmax`.

    Args:
      coefficients: the coefficients of P, highest power first.
      threshold: entropy in nats below which rows are left unchanged.

    Returns:
      A `Transform`.

    Raises:
      TypeError: a threshold that is neither a number nor a floating array.

    Reference:
      Velickovic et al., "softmax is not enough (for sharp out-of-distribution)".

    Example:
      >>> import numpy as np
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import adaptive_temperature
      >>> print(np.asarray(jax.nn.softmax(adaptive_temperature()(jnp.array([1.0, 2.0, -1.0, 0.5])))).round(6))
      [0.190735 0.694977 0.014366 0.099922]
    """
    coefficients = tuple(float(c) for c in coefficients)
    arguments = {"threshold": _number("threshold", threshold)}
    return Transform(_adapted, arguments, (("coefficients", coefficients),))


def _adapted(rows, *, threshold, coefficients):
    entropy = rows.reduce(reductions.softmax_moments(variance=False)).entropy
    beta = adaptive_sharpness(entropy, coefficients, rows.per_row("threshold", threshold))
    return rows.then(_times, beta)


def _times(x, cols, factor):
    return x * factor


# --- truncations: a token is kept if its logit is at least a threshold of its row -----------------------------


def _at_least(x, cols, threshold):
    return jnp.where(x < threshold, -jnp.inf, x)  # NaN stays visible


def _keep_above(rows: TransformedLogits, threshold: Array) -> TransformedLogits:
    return rows.then(_at_least, threshold, direct=True)


def _with_least(rows: TransformedLogits, min_tokens_to_keep: int, **wanted: Any) -> tuple[dict, Array, Array]:
    """Statistics in one pass, the largest logit, and a threshold that those that must be kept pass."""
    keep = min(min_tokens_to_keep, rows.columns)
    best = reductions.maximum() if keep <= 1 else reductions.top_k(keep)
    found = rows.detached().reduce({**wanted, "best": best})
    if keep <= 1:
        return found, found["best"], just_below(found["best"])
    values = found["best"].values
    return found, values[..., 0], just_below(values[..., -1], largest=values[..., 0])


def top_k(top_k: int | Int[Array, "*rows"], *, limit: int | None = None) -> Transform:
    """Keeps the k largest logits of each row; tokens tied with the last of them are kept, too.

    Args:
      top_k: 1 or more; a k beyond the vocabulary keeps everything. A Python integer, or, with `limit` or stored
        logits, an integer array: one number or one per row, traced or not (a number below 1 counts as 1).
      limit: a static bound of k, for a k that is traced: the passes keep as many. A larger k counts as `limit`.
        Without it, stored logits are sorted.

    Returns:
      A `Transform`.

    Raises:
      TypeError: a k that is not an integer; when applied, a traced k without `limit` for logits that are not stored.
      ValueError: a k or a limit below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import top_k
      >>> print(top_k(2)(jnp.array([1.0, 2.0, -1.0, 0.5])))
      [  1.   2. -inf -inf]
    """
    if _is_array(top_k):
        _checks.integers("top_k", top_k)
    else:
        top_k = _checks.integer("top_k", top_k, at_least=1)
    if limit is not None:
        limit = _checks.integer("limit", limit, at_least=1)
    return Transform(_top_k, {"top_k": top_k}, (("limit", limit),))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _top_k(rows, *, top_k, limit):
    if limit is None and not _is_array(top_k):
        limit = top_k
    if rows.columns == 0:
        return rows
    if limit is None:
        values = _all_descending(rows.stored("top_k with a traced k", "give limit=, or "))
    else:
        values = rows.detached().reduce(_best(rows, limit)).values
    k = jnp.asarray(top_k)
    _checks.broadcastable("top_k", k, rows.rows, "one number per row of logits")
    return _keep_above(rows, _below_nth(values, k, 1))


def top_p(
    top_p: float | Float[Array, "*rows"], *, min_tokens_to_keep: int = 1, limit: int | None = None
) -> Transform:
    """Keeps the smallest set of most probable tokens whose mass is at least `top_p` (the nucleus).

    Tokens tied with the last one are kept, too. 0 keeps the most probable token, 1 keeps everything.

    Args:
      top_p: in [0, 1], a number or one per row.
      min_tokens_to_keep: the number of most probable tokens that are always kept; static.
      limit: static; looks for the nucleus among as many of the most probable tokens, and keeps all of these if it is
        larger. Their probabilities are those under the whole row. None: rows are sorted, so that they must be stored.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type; when applied without `limit`, logits that are not stored.
      ValueError: an argument out of range.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import top_p
      >>> print(np.asarray(top_p(0.8)(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03])))).round(3))
      [-0.693 -1.386 -1.897   -inf   -inf]
    """
    arguments = {"top_p": _number("top_p", top_p, at_least=0, at_most=1)}
    return Transform(_top_p, arguments, _sorting("min_tokens_to_keep", min_tokens_to_keep, limit))


def _sorting(name: str, keep: int, limit: int | None) -> tuple:
    keep = _checks.integer(name, keep, at_least=1)
    if limit is not None:
        limit = _checks.integer("limit", limit, at_least=keep)
    return ((name, keep), ("limit", limit))


def _best(rows: TransformedLogits, limit: int) -> RowReduction:
    """The largest logits of each row, as many as may be kept, and one more."""
    return reductions.top_k(min(limit, rows.columns) + 1)


def _all_descending(x: Array) -> Array:
    """All logits of each row, and -inf as the one more."""
    values = jnp.sort(jax.lax.stop_gradient(x), axis=-1, descending=True)
    return jnp.pad(values, [(0, 0)] * (x.ndim - 1) + [(0, 1)], constant_values=-jnp.inf)


def _descending(rows: TransformedLogits, limit: int | None, name: str) -> tuple[Array, Array]:
    """The largest logits of each row, descending (all without a limit) and one more, and their log-probabilities."""
    wanted = {"partition": reductions.log_partition()}
    if limit is None:
        values = _all_descending(rows.stored(name, "give limit=, or "))
        found = rows.detached().reduce(wanted)
    else:
        found = rows.detached().reduce({**wanted, "best": _best(rows, limit)})
        values = found["best"].values
    return values, found["partition"].along().log_softmax(values)


def _below_nth(values: Array, count: Array, keep: int, largest: Array | None = None) -> Array:
    """A threshold for the first `count` of descending values, at least `keep` of them; the last is none of them."""
    most = values.shape[-1] - 1
    count = jnp.broadcast_to(jnp.clip(count, min(keep, most), most), values.shape[:-1])
    largest = values[..., 0] if largest is None else largest
    return just_below(nth(values, count - 1), nth(values, count), largest)


def _top_p(rows, *, top_p, min_tokens_to_keep, limit):
    mass = rows.per_row("top_p", top_p)
    if rows.columns == 0:
        return rows
    values, log_p = _descending(rows, limit, "top_p")
    p = jnp.exp(log_p)
    before = jnp.cumsum(p, axis=-1) - p
    threshold = _below_nth(values, jnp.sum(before < mass[..., None], axis=-1), min_tokens_to_keep)
    if limit is None or limit >= rows.columns:
        threshold = jnp.where(mass >= 1, -jnp.inf, threshold)
    return _keep_above(rows, threshold)


def min_p(min_p: float | Float[Array, "*rows"], *, min_tokens_to_keep: int = 1) -> Transform:
    """Keeps tokens whose probability is at least `min_p` times that of the most probable one; one pass.

    Args:
      min_p: in [0, 1], a number or one per row; 0 keeps everything, 1 the most probable token.
      min_tokens_to_keep: the number of most probable tokens that are always kept; static.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: an argument out of range.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import min_p
      >>> print(np.asarray(min_p(0.2)(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03])))).round(3))
      [-0.693 -1.386 -1.897   -inf   -inf]
    """
    arguments = {"min_p": _number("min_p", min_p, at_least=0, at_most=1)}
    return Transform(_min_p, arguments, (_kept(min_tokens_to_keep),))


def _kept(min_tokens_to_keep: int) -> tuple[str, int]:
    return "min_tokens_to_keep", _checks.integer("min_tokens_to_keep", min_tokens_to_keep, at_least=1)


def _min_p(rows, *, min_p, min_tokens_to_keep):
    _, best, least = _with_least(rows, min_tokens_to_keep)
    return _keep_above(rows, jnp.minimum(best + jnp.log(rows.per_row("min_p", min_p)), least))


def epsilon_cutoff(
    epsilon_cutoff: float | Float[Array, "*rows"], *, min_tokens_to_keep: int = 1
) -> Transform:
    """Keeps tokens of probability at least epsilon, and always the most probable one; one pass.

    Args:
      epsilon_cutoff: in [0, 1], a number or one per row; usual are 3e-4 to 9e-4.
      min_tokens_to_keep: the number of most probable tokens that are always kept; static.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: an argument out of range.

    Reference:
      Hewitt et al., "Truncation Sampling as Language Model Desmoothing".

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import epsilon_cutoff
      >>> print(np.asarray(epsilon_cutoff(0.1)(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03])))).round(3))
      [-0.693 -1.386 -1.897   -inf   -inf]
    """
    arguments = {"epsilon_cutoff": _number("epsilon_cutoff", epsilon_cutoff, at_least=0, at_most=1)}
    return Transform(_epsilon, arguments, (_kept(min_tokens_to_keep),))


def _epsilon(rows, *, epsilon_cutoff, min_tokens_to_keep):
    found, _, least = _with_least(rows, min_tokens_to_keep, lse=reductions.logsumexp())
    log_epsilon = jnp.log(rows.per_row("epsilon_cutoff", epsilon_cutoff))
    return _keep_above(rows, jnp.minimum(found["lse"] + log_epsilon, least))


def eta_cutoff(eta_cutoff: float | Float[Array, "*rows"], *, min_tokens_to_keep: int = 1) -> Transform:
    """Keeps tokens of probability at least `min(eta, sqrt(eta) e^-H)`, H the row's entropy; one pass.

    Args:
      eta_cutoff: eta in [0, 1], a number or one per row; usual are 3e-4 to 2e-3.
      min_tokens_to_keep: the number of most probable tokens that are always kept; static.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: an argument out of range.

    Reference:
      Hewitt et al., "Truncation Sampling as Language Model Desmoothing".

    Example:
      >>> import numpy as np
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import eta_cutoff
      >>> kept = eta_cutoff(0.05)(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03])))
      >>> print(np.asarray(jax.nn.softmax(kept)).round(6))
      [0.515464 0.257732 0.154639 0.072165 0.      ]
    """
    arguments = {"eta_cutoff": _number("eta_cutoff", eta_cutoff, at_least=0, at_most=1)}
    return Transform(_eta, arguments, (_kept(min_tokens_to_keep),))


def _eta(rows, *, eta_cutoff, min_tokens_to_keep):
    found, _, least = _with_least(
        rows, min_tokens_to_keep, moments=reductions.softmax_moments(variance=False)
    )
    moments = found["moments"]
    log_eta = jnp.log(rows.per_row("eta_cutoff", eta_cutoff))
    log_p = jnp.minimum(log_eta, log_eta / 2 - moments.entropy)
    return _keep_above(rows, jnp.minimum(moments.logsumexp + log_p, least))


def top_n_sigma(top_n_sigma: float | Float[Array, "*rows"]) -> Transform:
    """Keeps logits within n standard deviations (of the row's logits) of the largest; one pass.

    The standard deviation is that of the present logits themselves, with divisor their number.

    Args:
      top_n_sigma: n, 0 or more, a number or one per row; 1 is usual, 0 keeps the largest.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: a negative number.

    Reference:
      Tang et al., "Top-nsigma: Not All Logits Are You Need".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import top_n_sigma
      >>> print(top_n_sigma(1.0)(jnp.array([3.0, 2.5, -1.0, 0.5])))
      [ 3.   2.5 -inf -inf]
    """
    return Transform(_top_n_sigma, {"top_n_sigma": _number("top_n_sigma", top_n_sigma, at_least=0)})


def _top_n_sigma(rows, *, top_n_sigma):
    found, best, least = _with_least(rows, 1, moments=reductions.moments())
    sigma = jnp.sqrt(found["moments"].variance)
    return _keep_above(rows, jnp.minimum(best - rows.per_row("top_n_sigma", top_n_sigma) * sigma, least))


def typical_p(typical_p: float | Float[Array, "*rows"], *, min_tokens_to_keep: int = 1) -> Transform:
    """Keeps the tokens whose surprise `-log p` is nearest to the entropy, up to a mass of `typical_p`.

    Tokens as far from the entropy as the last one are kept, too. The rows are sorted, so they must be stored.

    Args:
      typical_p: in (0, 1], a number or one per row; 1 keeps everything.
      min_tokens_to_keep: the number of most typical tokens that are always kept; static.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type; when applied, logits that are not stored.
      ValueError: an argument out of range.

    Reference:
      Meister et al., "Locally Typical Sampling".

    Example:
      >>> import numpy as np
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.decoding import typical_p
      >>> kept = typical_p(0.5)(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03])))
      >>> print(np.asarray(jax.nn.softmax(kept)).round(4))
      [0.6667 0.3333 0.     0.     0.    ]
    """
    arguments = {"typical_p": _number("typical_p", typical_p, above=0, at_most=1)}
    return Transform(_typical, arguments, (_kept(min_tokens_to_keep),))


def _typical(rows, *, typical_p, min_tokens_to_keep):
    mass = rows.per_row("typical_p", typical_p)
    x = jax.lax.stop_gradient(rows.stored("typical_p"))
    if rows.columns == 0:
        return rows
    moments = rows.detached().reduce(reductions.softmax_moments(variance=False))
    # -log p - H = (lse - H) - x
    center = moments.logsumexp - moments.entropy
    center = jnp.where(jnp.isfinite(center), center, 0)
    distance = jnp.where(x == -jnp.inf, jnp.inf, jnp.abs(x - center[..., None]))
    lse = jnp.where(moments.logsumexp == -jnp.inf, 0, moments.logsumexp)
    p = jnp.exp(x - lse[..., None])
    distance, p = jax.lax.sort((distance, p), num_keys=1)
    before = jnp.cumsum(p, axis=-1) - p
    nearness = jnp.pad(-distance, [(0, 0)] * (x.ndim - 1) + [(0, 1)], constant_values=-jnp.inf)
    count = jnp.sum(before < mass[..., None], axis=-1)
    least = _below_nth(nearness, count, min_tokens_to_keep, center)
    return rows.then(_near, center, jnp.where(mass >= 1, jnp.inf, -least))


def _near(x, cols, center, radius):
    return jnp.where(jnp.abs(x - center) > radius, -jnp.inf, x)


def top_h(top_h: float | Float[Array, "*rows"], *, limit: int = 100) -> Transform:
    """Keeps the most probable tokens while the sum of their `-p log p` is at most `top_h` times the entropy.

    The most probable token is always kept, and tokens tied with the last one are; one pass.

    Args:
      top_h: in [0, 1], a number or one per row.
      limit: the largest number of tokens to keep, static.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: an argument out of range.

    Reference:
      Potraghloo et al., "Top-H Decoding: Adapting the Creativity and Coherence with Bounded Entropy in Text
      Generation", in the form that transformers has.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import top_h
      >>> print(np.asarray(top_h(0.4)(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03])))).round(3))
      [-0.693   -inf   -inf   -inf   -inf]
    """
    arguments = {"top_h": _number("top_h", top_h, at_least=0, at_most=1)}
    return Transform(_top_h, arguments, (("limit", _checks.integer("limit", limit, at_least=1)),))


def _top_h(rows, *, top_h, limit):
    share = rows.per_row("top_h", top_h)
    if rows.columns == 0:
        return rows
    wanted = (reductions.softmax_moments(variance=False), _best(rows, limit))
    moments, (values, _) = rows.detached().reduce(wanted)
    lse = jnp.where(moments.logsumexp == -jnp.inf, 0, moments.logsumexp)[..., None]
    log_p = jnp.where(values == -jnp.inf, 0, values - lse)
    terms = jnp.where(values == -jnp.inf, jnp.inf, -jnp.exp(log_p) * log_p)
    count = jnp.sum(jnp.cumsum(terms, axis=-1) <= (share * moments.entropy)[..., None], axis=-1)
    return _keep_above(rows, _below_nth(values, count, 1))


# --- what was generated before ------------------------------------------------------------------------------


def token_counts(
    tokens: Int[Array, "*rows length"], columns: int, *, where: Bool[Array, "*rows length"] | None = None
) -> Int[Array, "*rows columns"]:
    """How often each token occurs in each sequence: the state that penalties read.

    In a generation, add each new token: `counts.at[jnp.arange(batch), token].add(1)`.

    Args:
      tokens: `[*rows, length]` integers; ids out of range are not counted.
      columns: the size of the vocabulary, static.
      where: True = counts; False for padding.

    Returns:
      `[*rows, columns]` int32.

    Raises:
      TypeError: tokens that are not integers, a mask that is not boolean.
      ValueError: a mask of a wrong shape, a negative size.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import token_counts
      >>> print(token_counts(jnp.array([[1, 3, 1]]), 5))
      [[0 2 0 1 0]]
    """
    _checks.integers("tokens", tokens)
    columns = _checks.integer("columns", columns, at_least=0)
    if tokens.ndim == 0:
        raise ValueError("tokens must have shape [*rows, length], got a scalar")
    counted = (tokens >= 0) & (tokens < columns)
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, tokens.shape, "the shape of tokens")
        counted &= where
    flat, counted = (a.reshape(-1, tokens.shape[-1]) for a in (jnp.asarray(tokens), counted))
    numbers = jnp.arange(flat.shape[0])[:, None]
    zeros = jnp.zeros((flat.shape[0], columns), jnp.int32)
    ids = jnp.where(counted, flat, columns).astype(jnp.int32)
    return zeros.at[numbers, ids].add(1, mode="drop").reshape(*tokens.shape[:-1], columns)


def _penalty(name: str, function: Callable, counts: Any, value: Any, **bounds: float) -> Transform:
    """The transform of an elementwise `function(x, cols, penalty, counts)`."""
    if not _is_array(counts):
        raise TypeError(f"counts must be an array of integers, got {_checks.describe(counts)}")
    _checks.integers("counts", counts)
    arguments = {"counts": counts, "penalty": _number(name, value, **bounds)}
    return Transform(_penalized, arguments, (("name", name), ("function", function)))


def _penalized(rows, *, counts, penalty, name, function):
    return rows.then(function, rows.per_row(name, penalty), **rows.per_entry("counts", counts))


def repetition_penalty(
    counts: Int[Array, "*rows columns"], repetition_penalty: float | Float[Array, "*rows"]
) -> Transform:
    """Divides positive logits of tokens that occurred by the penalty, and multiplies negative ones by it.

    Args:
      counts: how often each token occurred, from `token_counts`: `[*rows, columns]`, or `[columns]` for all rows.
      repetition_penalty: positive, a number or one per row; above 1 discourages repetition.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: a penalty that is not positive; when applied, counts of a wrong shape.

    Reference:
      Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import repetition_penalty
      >>> print(repetition_penalty(jnp.array([2, 0, 1]), 2.0)(jnp.array([1.0, 2.0, -1.0])))
      [ 0.5  2.  -2. ]
    """
    return _penalty("repetition_penalty", _repeated, counts, repetition_penalty, above=0)


def _repeated(x, cols, penalty, counts):
    return jnp.where(counts > 0, jnp.where(x > 0, x / penalty, x * penalty), x)


def presence_penalty(
    counts: Int[Array, "*rows columns"], presence_penalty: float | Float[Array, "*rows"]
) -> Transform:
    """Subtracts the penalty from the logits of tokens that occurred.

    Args:
      counts: how often each token occurred, from `token_counts`: `[*rows, columns]`, or `[columns]` for all rows.
      presence_penalty: a number or one per row; positive discourages repetition.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: when applied, counts of a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import presence_penalty
      >>> print(presence_penalty(jnp.array([2, 0, 1]), 0.5)(jnp.array([1.0, 2.0, -1.0])))
      [ 0.5  2.  -1.5]
    """
    return _penalty("presence_penalty", _occurred, counts, presence_penalty)


def _occurred(x, cols, penalty, counts):
    return x - penalty * (counts > 0).astype(x.dtype)


def frequency_penalty(
    counts: Int[Array, "*rows columns"], frequency_penalty: float | Float[Array, "*rows"]
) -> Transform:
    """Subtracts the penalty from the logit of a token as often as it occurred.

    Args:
      counts: how often each token occurred, from `token_counts`: `[*rows, columns]`, or `[columns]` for all rows.
      frequency_penalty: a number or one per row; positive discourages repetition.

    Returns:
      A `Transform`.

    Raises:
      TypeError: an argument of a wrong type.
      ValueError: when applied, counts of a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import frequency_penalty
      >>> print(frequency_penalty(jnp.array([2, 0, 1]), 0.5)(jnp.array([1.0, 2.0, -1.0])))
      [ 0.   2.  -1.5]
    """
    return _penalty("frequency_penalty", _often, counts, frequency_penalty)


def _often(x, cols, penalty, counts):
    return x - penalty * counts.astype(x.dtype)


# --- masks --------------------------------------------------------------------------------------------------


def logit_bias(bias: Float[Array, "*rows columns"]) -> Transform:
    """Adds a bias to the logits; -inf forbids a token.

    Args:
      bias: floating, `[columns]` or `[*rows, columns]`.

    Returns:
      A `Transform`.

    Raises:
      TypeError: a bias that is not floating.
      ValueError: when applied, a bias of a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import logit_bias
      >>> print(logit_bias(jnp.array([0.5, 0.0, -jnp.inf]))(jnp.array([1.0, 2.0, -1.0])))
      [ 1.5  2.  -inf]
    """
    _checks.floating("bias", bias)
    return Transform(_biased, {"bias": bias})


def _biased(rows, *, bias):
    return rows.then(_plus, **rows.per_entry("bias", bias))


def _plus(x, cols, bias):
    return x + bias


def mask_logits(where: Bool[Array, "*rows columns"]) -> Transform:
    """Keeps the tokens that a mask allows.

    Args:
      where: booleans, `[columns]` or `[*rows, columns]`, True = allowed. A row without allowed tokens has no entries,
        and `sample` gives -1 for it.

    Returns:
      A `Transform`.

    Raises:
      TypeError: a mask that is not boolean.
      ValueError: when applied, a mask of a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import mask_logits
      >>> print(mask_logits(jnp.array([True, False, True]))(jnp.array([1.0, 2.0, -1.0])))
      [  1. -inf  -1.]
    """
    _checks.boolean("where", where)
    return Transform(_masked, {"where": where})


def _masked(rows, *, where):
    rows.per_entry("where", where)  # its shape
    return rows.masked(where)


def allowed_token_ids(allowed_token_ids: Int[Array, "*rows k"]) -> Transform:
    """Keeps the tokens that are listed.

    Args:
      allowed_token_ids: integers, `[k]` for all rows or `[*rows, k]`, which store a mask `[columns]` or
        `[*rows, columns]`. Ids out of range are ignored, so that lists may be padded with -1.

    Returns:
      A `Transform`.

    Raises:
      TypeError: ids that are not an integer array.
      ValueError: when applied, ids of a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import allowed_token_ids
      >>> print(allowed_token_ids(jnp.array([0, 2]))(jnp.array([1.0, 2.0, -1.0])))
      [  1. -inf  -1.]
    """
    return _listed("allowed_token_ids", allowed_token_ids, True)


def suppress_tokens(suppress_tokens: Int[Array, "*rows k"]) -> Transform:
    """Rejects the tokens that are listed.

    Args:
      suppress_tokens: integers, `[k]` for all rows or `[*rows, k]`, as for `allowed_token_ids`. Ids out of range are
        ignored.

    Returns:
      A `Transform`.

    Raises:
      TypeError: ids that are not an integer array.
      ValueError: when applied, ids of a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.decoding import suppress_tokens
      >>> print(suppress_tokens(jnp.array([0, 2]))(jnp.array([1.0, 2.0, -1.0])))
      [-inf   2. -inf]
    """
    return _listed("suppress_tokens", suppress_tokens, False)


def _listed(name: str, ids: Any, keep: bool) -> Transform:
    _checks.integers(name, ids)
    if ids.ndim == 0:
        raise ValueError(f"{name} must have shape [k] or [*rows, k], got a scalar")
    return Transform(_named, {"ids": ids}, (("name", name), ("keep", keep)))


def _named(rows, *, ids, name, keep):
    if ids.ndim != 1 and ids.shape[:-1] != rows.rows:
        raise ValueError(f"{name} must have shape [k] or {(*rows.rows, 'k')}, got shape {ids.shape}")
    named = token_counts(ids, rows.columns) > 0
    return _masked(rows, where=named if keep else ~named)
