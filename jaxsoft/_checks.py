"""Trace-time checks of arguments: each error names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def describe(value: Any) -> str:
    """Describes `value` in a few words, for error messages."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{value!r} of type {type(value).__name__}"


def is_concrete_number(value: Any) -> bool:
    """Whether `value` is a number that can be compared now (not a tracer, not an array with axes)."""
    if isinstance(value, bool):
        return False
    if isinstance(value, numbers.Real):
        return True
    return (
        isinstance(value, (np.ndarray, jax.Array))
        and not isinstance(value, jax.core.Tracer)
        and value.ndim == 0
    )


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Checks a hyper-parameter that may be a Python number or a scalar array (a traced one is not compared)."""
    bounds = " and ".join(
        f"{word} {bound}"
        for word, bound in ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
        if bound is not None
    )
    expected = f"a number {bounds}".rstrip()
    if not is_concrete_number(value):
        if hasattr(value, "shape") and hasattr(value, "dtype") and np.prod(value.shape) == 1:
            return
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    v = float(value)
    ok = (
        not np.isnan(v)
        and (above is None or v > above)
        and (at_least is None or v >= at_least)
        and (below is None or v < below)
        and (at_most is None or v <= at_most)
    )
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {v}")


def static_number(name: str, value: Any, **bounds: float) -> float:
    """Checks a number that shapes the program, so that it must be known while it is traced; returns it as a `float`."""
    number(name, value, **bounds)
    if not is_concrete_number(value):
        raise TypeError(
            f"{name} must be a static number, got {describe(value)}: pass a Python number; under jit, "
            f"fix it by functools.partial or static_argnames={name!r}"
        )
    return float(value)


def integer(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """Checks a static integer (a size, a count) and returns it as an `int`."""
    bounds = " and ".join(
        f"{word} {bound}" for word, bound in ((">=", at_least), ("<=", at_most)) if bound is not None
    )
    expected = f"a static integer {bounds}".rstrip()
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    try:
        v = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be {expected}, got {describe(value)}") from error
    if (at_least is not None and v < at_least) or (at_most is not None and v > at_most):
        raise ValueError(f"{name} must be {expected}, got {v}")
    return v


def option(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Checks that `value` is one of the named choices."""
    if isinstance(value, jax.core.Tracer):  # which cannot be compared
        raise TypeError(
            f"{name} must be static, one of {', '.join(map(repr, choices))}, got {describe(value)}"
        )
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    """Checks a static switch, Python's True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def floating(name: str, value: Any) -> None:
    """Checks that `value` is an array of real floating dtype."""
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be an array of floating dtype, got {describe(value)}")


def floating_dtype(name: str, value: Any) -> jnp.dtype | None:
    """Checks that `value` is a floating dtype, in any form that numpy takes, and returns the dtype; None for None."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a floating dtype or None, got {describe(value)}") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating dtype or None, got {dtype}")
    return jnp.dtype(jax.dtypes.canonicalize_dtype(dtype))


def numeric(name: str, value: Any) -> None:
    """Checks that `value` is an array of real numbers or booleans (weights may be counts, or masks)."""
    if not hasattr(value, "dtype") or not any(
        jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
    ):
        raise TypeError(f"{name} must be an array of real numbers or booleans, got {describe(value)}")


def integers(name: str, value: Any) -> None:
    """Checks that `value` is an array of integer dtype (booleans are not ids)."""
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integer dtype, got {describe(value)}")


def shape(name: str, value: Any, expected: tuple[int, ...], meaning: str) -> None:
    """Checks the exact shape of `value`; `meaning` says in words what the shape stands for."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have shape {tuple(expected)} ({meaning}), got shape {tuple(value.shape)}"
        )


def broadcastable(name: str, value: Any, expected: tuple[int, ...], meaning: str) -> None:
    """Checks that `value` broadcasts to `expected` without enlarging it."""
    try:
        ok = np.broadcast_shapes(tuple(value.shape), tuple(expected)) == tuple(expected)
    except ValueError:
        ok = False
    if not ok:
        raise ValueError(
            f"{name} must broadcast to shape {tuple(expected)} ({meaning}), got shape {tuple(value.shape)}"
        )


def boolean(name: str, value: Any) -> None:
    """Checks that `value` is an array of boolean dtype."""
    if not hasattr(value, "dtype") or value.dtype != jnp.bool_:
        raise TypeError(f"{name} must be a boolean array (True = counts), got {describe(value)}")
