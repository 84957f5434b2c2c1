"""Temperatures and noise in training.

Applied to the logits before a softmax: a temperature from a network, noise at the label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids
from jaxsoft.normalizers.masks import present_scores
from jaxsoft.rows.inner import check_axis, check_dense, check_ids, rows_of, softmax_with


class TemperatureParameters(NamedTuple):
    """The parameters of a `temperature_network`.

    Attributes:
      weight: `[features, hidden]`.
      bias: `[hidden]`.
      prototypes: `[hidden, hidden]`, the columns are the prototypes.
      prototype_bias: `[hidden]`; None in the form `"clip"`.
      log_scale: scalar, the logarithm of the temperature of the softmax over prototypes.
      output_weight: `[hidden]`.
      output_bias: scalar.
    """

    weight: Array
    bias: Array
    prototypes: Array
    prototype_bias: Array | None
    log_scale: Array
    output_weight: Array
    output_bias: Array


class TemperatureNetwork(NamedTuple):
    """A network that predicts temperatures, as two pure functions.

    Attributes:
      init: `(key, features, dtype=jnp.float32) -> TemperatureParameters`.
      apply: `(params, inputs, *, where=None, key=None) -> temperatures`, `[*rows, features] -> [*rows]`; give a
        key in training, where units are dropped.
    """

    init: Callable[..., TemperatureParameters]
    apply: Callable[..., Array]


_RANGES = {"llm": (0.5, 5.0), "clip": (0.005, 0.05)}


def temperature_network(
    form: str = "llm",
    *,
    hidden: int = 256,
    min_temperature: float | None = None,
    max_temperature: float | None = None,
    dropout: float = 0.5,
) -> TemperatureNetwork:
    """TempNet: a small network that predicts each row's softmax temperature.

    With `u = sigmoid(x / |x| @ weight + bias) @ prototypes + prototype_bias` and `w = softmax(u / e^log_scale)`,
    the temperature is `min + (max - min) sigmoid(output_weight . ((w - 1 / hidden) u) + output_bias)`. That is the
    form `"llm"`, which reads a row of logits; `"clip"` reads features without normalizing them, has prototypes of unit
    norm without bias and `sigmoid(u)` in place of the last u.

    Args:
      form: `"llm"` or `"clip"`.
      hidden: the hidden width, and the number of prototypes.
      min_temperature: the least temperature, positive: 0.5 for `"llm"`, 0.005 for `"clip"` by default.
      max_temperature: the largest temperature: 5 for `"llm"`, 0.05 for `"clip"`.
      dropout: the share of hidden units dropped in training, in [0, 1).

    Returns:
      `TemperatureNetwork(init, apply)`. The initial weights are uniform within `1 / sqrt(inputs)` (our choice),
      the prototypes of `"clip"` standard normal; the initial output weight is 1, its bias 0, the initial scale 1
      for `"llm"` and 0.01 for `"clip"`. `apply` returns float32 or wider, strictly between the two temperatures
      up to rounding; an absent entry (masked, -inf) adds nothing; a row without entries has the temperature
      of a row of zeros.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown form.

    Reference:
      Qiu et al., "To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO".

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.normalizers import temperature_network
      >>> network = temperature_network("llm", hidden=8)
      >>> params = network.init(jax.random.key(0), features=4)
      >>> logits = jnp.array([[1.0, 2.0, -1.0, 0.5]])
      >>> tau = network.apply(params, logits)
      >>> print(tau.shape, bool((tau > 0.5).all() & (tau < 5.0).all()))
      (1,) True
      >>> weights = jaxsoft.softmax(jaxsoft.temperature(logits, tau))
    """
    _checks.option("form", form, ("llm", "clip"))
    hidden = _checks.integer("hidden", hidden, at_least=1)
    low, high = _RANGES[form]
    low = low if min_temperature is None else min_temperature
    high = high if max_temperature is None else max_temperature
    low = _checks.static_number("min_temperature", low, above=0)
    high = _checks.static_number("max_temperature", high, at_least=low)
    _checks.number("dropout", dropout, at_least=0, below=1)
    clip = form == "clip"

    def init(key, features, dtype=jnp.float32):
        features = _checks.integer("features", features, at_least=1)
        keys = jax.random.split(key, 4)

        def uniform(key, shape, inputs):
            bound = 1 / math.sqrt(inputs)
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        prototypes = (hidden, hidden)
        return TemperatureParameters(
            weight=uniform(keys[0], (features, hidden), features),
            bias=uniform(keys[1], (hidden,), features),
            prototypes=jax.random.normal(keys[2], prototypes, dtype)
            if clip
            else uniform(keys[2], prototypes, hidden),
            prototype_bias=None if clip else uniform(keys[3], (hidden,), hidden),
            log_scale=jnp.asarray(math.log(0.01) if clip else 0.0, dtype),
            output_weight=jnp.ones(hidden, dtype),
            output_bias=jnp.zeros((), dtype),
        )

    def apply(params, inputs, *, where=None, key=None):
        x, _, _ = present_scores(inputs, -1, where, "temperature_network")
        p = jax.tree.map(lambda a: jnp.asarray(a).astype(accumulation_dtype(a.dtype, x.dtype)), params)
        features = p.weight.shape[0]
        if x.shape[-1] != features:
            raise ValueError(
                f"inputs must have shape [*rows, {features}] (features of params.weight), got shape {x.shape}"
            )
        h = x if clip else _normalized(x, -1)
        h = jax.nn.sigmoid(h @ p.weight + p.bias)
        if key is not None:
            h = jnp.where(jax.random.bernoulli(key, 1 - dropout, h.shape), h / (1 - dropout), 0)
        u = h @ (_normalized(p.prototypes, 0) if clip else p.prototypes)
        u = u if p.prototype_bias is None else u + p.prototype_bias
        w = softmax_with(u * jnp.exp(-p.log_scale))
        value = jax.nn.sigmoid(u) if clip else u
        a = jnp.sum(p.output_weight * (w - 1 / w.shape[-1]) * value, axis=-1) + p.output_bias
        return low + (high - low) * jax.nn.sigmoid(a)

    return TemperatureNetwork(init, apply)


def _normalized(x: Array, axis: int) -> Array:
    """`x / |x|`; 0, with gradient 0, where x is 0."""
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    return x * jnp.where(squares > 0, lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)


def noisy_logits(
    logits: Float[Array, "*rows columns"],
    labels: Int[Array, "*rows"],
    *,
    feature_norms: Float[Array, "*rows"],
    weight_norms: Float[Array, " columns"],
    key: Array | None,
    alpha: float | Float[Array, ""] = 0.1**0.5,
    axis: int = -1,
    ignore_index: int | None = -100,
    stop_noise_gradient: bool = False,
) -> Float[Array, "*rows columns"]:
    """Noisy Softmax: lowers each label's logit at random, `z_y - alpha (|W_y| |x| - z_y) |xi|`, xi normal.

    Postpones the saturation of softmax in training; since `z_y = |W_y| |x| cos(theta)`, the noise vanishes as the
    feature turns towards its class. For heads without bias, before a cross-entropy. The form and the default alpha
    are *reconstructed*.

    Args:
      logits: `[*rows, columns]`, floating.
      labels: `[*rows]` class ids. An id out of range gives NaN (an error under `checkify`).
      feature_norms: `[*rows]`, the L2 norms of the features x.
      weight_norms: `[columns]`, the L2 norms of the classes' weights W.
      key: a PRNG key; None for no noise, as in evaluation.
      alpha: the strength of the noise, 0 or more.
      axis: the axis of the classes.
      ignore_index: class id of rows to leave unchanged, or None.
      stop_noise_gradient: whether to stop the gradient through the whole change; otherwise it reaches the logits and
        the norms, and only xi is a constant.

    Returns:
      Logits of the same shape and dtype.

    Raises:
      TypeError: an argument of a wrong type or dtype (for `linear_logits`, pass `logits.dense()`).
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Chen et al., "Noisy Softmax: Improving the Generalization Ability of DCNN via Postponing the Early Softmax
      Saturation".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.normalizers import noisy_logits
      >>> x, weight = jnp.array([[1.0, 1.0]]), jnp.array([[3.0, 1.0], [4.0, -1.0]])
      >>> norms = dict(feature_norms=jnp.linalg.norm(x, axis=1), weight_norms=jnp.linalg.norm(weight, axis=0))
      >>> print(noisy_logits(x @ weight, jnp.array([0]), **norms, key=jax.random.key(0))[0, 0] < 7)
      True
    """
    check_dense(logits, "noisy_logits")
    axis = check_axis(logits, axis)
    rows, columns = rows_of(logits.shape, axis), logits.shape[axis]
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    check_ids("labels", labels, logits, axis, ignore_index=ignore_index)
    _checks.floating("feature_norms", feature_norms)
    _checks.shape("feature_norms", feature_norms, rows, "one number per row of logits")
    _checks.floating("weight_norms", weight_norms)
    _checks.shape("weight_norms", weight_norms, (columns,), "one number per class")
    _checks.number("alpha", alpha, at_least=0)
    _checks.flag("stop_noise_gradient", stop_noise_gradient)
    labels = as_ids(labels)
    keep: Bool[Array, ...] = jnp.ones(rows, bool) if ignore_index is None else labels != ignore_index
    valid = (labels >= 0) & (labels < columns)
    x = jnp.moveaxis(jnp.asarray(logits).astype(accumulation_dtype(logits.dtype)), axis, -1)
    at = jnp.clip(labels, 0, columns - 1)
    if key is not None and columns:
        label_logit = jnp.take_along_axis(x, at[..., None], axis=-1)[..., 0]
        xi = jnp.abs(jax.random.normal(key, rows, x.dtype))
        change = alpha * xi * (jnp.asarray(weight_norms)[at] * feature_norms - label_logit).astype(x.dtype)
        if stop_noise_gradient:
            change = lax.stop_gradient(change)
        is_label = (jnp.arange(columns) == at[..., None]) & keep[..., None]
        x = jnp.where(is_label, x - change[..., None], x)
    x = x * jnp.where(valid | ~keep, 1, jnp.nan)[..., None].astype(x.dtype)  # NaN in the gradient, too
    return jnp.moveaxis(x, -1, axis).astype(logits.dtype)
