"""Rows of a head's weight at class ids, on one device or on shards of the classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, weigh
from jaxsoft._trees import entries_at
from jaxsoft.rows import LinearLogits
from jaxsoft.rows.inner import capped, check_axis_name, check_range


def axes_of(axis_name: Any) -> tuple[str, ...]:
    """The mesh axes over which classes are sharded, checked; none outside `shard_map`."""
    return () if axis_name is None else check_axis_name(axis_name)


def shard_count(axes: tuple[str, ...]) -> int:
    """The number of shards of the classes."""
    return lax.axis_size(axes) if axes else 1


def summed(a: Array, axes: tuple[str, ...]) -> Array:
    """The sum over the shards of the classes."""
    return lax.psum(a, axes) if axes else a


def first_class(classes: int, axes: tuple[str, ...]) -> Any:
    """The id of this shard's first class; each shard has as many."""
    return lax.axis_index(axes).astype(jnp.int32) * classes if axes else 0


def take_classes(weight: Array, ids: Array, axes: tuple[str, ...] = ()) -> Array:
    """The rows of `weight` (`[classes, ...]` of this shard) at the ids; NaN for an id out of range."""
    weight, ids = jnp.asarray(weight), as_ids(jnp.asarray(ids))
    own = ids - first_class(weight.shape[0], axes)
    inside = (own >= 0) & (own < weight.shape[0])
    found = entries_at(weight, jnp.clip(own, 0, max(weight.shape[0] - 1, 0)))
    by_row = (...,) + (None,) * (weight.ndim - 1)
    if axes:
        found = lax.psum(jnp.where(inside[by_row], found, 0), axes)
        inside = (ids >= 0) & (ids < weight.shape[0] * shard_count(axes))
    return jnp.where(inside[by_row], found, jnp.nan)


def check_labels(
    labels: Any, rows: tuple[int, ...], classes: int, ignore_index: int | None, of: str = "hidden"
) -> tuple[Array, Array | None]:
    """Checks one class id per row.

    Returns:
      The ids, 0 where ignored, and the booleans of rows that count; None if all do.
    """
    if not hasattr(labels, "dtype"):
        raise TypeError(f"labels must be an array of class ids, got {_checks.describe(labels)}")
    _checks.integers("labels", labels)
    _checks.shape("labels", labels, rows, f"one class id per row of {of}")
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    check_range("labels", labels, classes, ignore_index)
    labels = as_ids(jnp.asarray(labels))
    if ignore_index is None:
        return labels, None
    keep = labels != ignore_index
    return jnp.where(keep, labels, 0), keep


def finish(values: Array, keep: Array | None, weights: Array | None) -> Array:
    """Gives ignored rows the value 0, and applies the weights."""
    if keep is not None:
        values = jnp.where(keep, values, 0)
    return values if weights is None else weigh(values, weights)


def check_matrix(name: str, value: Any, layout: str) -> None:
    """Checks a floating matrix."""
    _checks.floating(name, value)
    if value.ndim != 2:
        raise ValueError(f"{name} must have shape {layout}, got shape {value.shape}")


def check_hidden(hidden: Any, features: int) -> None:
    """Checks activations `[*rows, d]`."""
    _checks.floating("hidden", hidden)
    if hidden.ndim < 1 or hidden.shape[-1] != features:
        raise ValueError(
            f"hidden must have shape [*rows, {features}] (the features of the head), got shape {hidden.shape}"
        )


# --- logits at class ids: arrays, or expressions -----------------------------------------------------------


def _by_class(logits: LinearLogits) -> Array:
    """The weight as `[classes, d]`."""
    return logits.weight if logits.transpose_weight else logits.weight.T


def restricted(logits: Any, ids: Array) -> Any:
    """The logits of the classes `ids` (`[n]`), of the same kind; NaN for an id out of range."""
    if not isinstance(logits, LinearLogits):
        inside = (ids >= 0) & (ids < logits.shape[-1])
        found = jnp.take(logits, jnp.clip(ids, 0, max(logits.shape[-1] - 1, 0)), axis=-1)
        return jnp.where(inside, found, jnp.nan)
    axes = _axes(logits)
    weight = take_classes(_by_class(logits), ids, axes)
    bias = None if logits.bias is None else take_classes(logits.bias, ids, axes)
    return dataclasses.replace(
        logits,
        weight=weight,
        bias=bias,
        transpose_weight=True,
        shards=None,
        hidden_sharding=None,
        weight_sharding=None,
    )


def scores_at(logits: Any, labels: Array, keep: Array | None) -> Array:
    """The logit of each row's class id, `[*rows]`; NaN for an id out of range, finite for rows that do not count."""
    if not isinstance(logits, LinearLogits):
        dtype = accumulation_dtype(logits.dtype)
        inside = (labels >= 0) & (labels < logits.shape[-1])
        own = jnp.clip(labels, 0, max(logits.shape[-1] - 1, 0))
        found = jnp.take_along_axis(logits, own[..., None], axis=-1)[..., 0]
        found = jnp.where(inside, found.astype(dtype), jnp.nan)
        return found if keep is None else jnp.where(keep, found, 0)
    if keep is not None:
        logits = logits._mask_rows(keep)
    axes, dtype = _axes(logits), accumulation_dtype(logits.dtype)
    weight = take_classes(_by_class(logits), labels, axes)
    hidden, weight = (a.astype(logits.dtype).astype(dtype) for a in (logits.hidden, weight))
    x = jnp.sum(hidden * weight, axis=-1)
    if logits.scale is not None:
        x = x * logits.scale
    if logits.bias is not None:
        x = x + take_classes(logits.bias, labels, axes).astype(dtype)
    if logits.softcap is not None:
        x = capped(x, logits.softcap)
    return x if logits.temperature is None else x / logits.temperature


def _axes(logits: LinearLogits) -> tuple[str, ...]:
    return () if logits.shards is None else logits.shards.columns
