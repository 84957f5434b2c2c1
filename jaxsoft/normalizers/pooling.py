"""Pooling with softmax weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import finite_gauge, safe_divide
from jaxsoft.normalizers.masks import present_scores


def soft_pool(
    x: Float[Array, "*shape"],
    window: int | Sequence[int] = 2,
    *,
    axes: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    clamp_min: float | None = None,
    stop_weight_gradient: bool = False,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*pooled"]:
    """SoftPool, `y = sum_i softmax(a)_i a_i`: the mean of each window, weighted by the softmax of its activations.

    Lies between mean and max pooling; each channel has its own weights. Unlike the published code, it subtracts
    each window's maximum, clamps nothing and differentiates through the weights, `dy/da_i = p_i (1 + a_i - y)`;
    options restore its clamp and its gradient. No array of patches is stored: the windows are read as shifted
    slices (one is compiled for each entry of the window), and again in the backward pass.

    Args:
      x: an array of any shape, floating.
      window: the window sizes along `axes`, one for each axis or one for all.
      axes: the axes to pool over: `(1, 2)` for `[batch, height, width, channels]`.
      stride: steps along `axes`; the window sizes by default.
      clamp_min: a lower bound of the result (the published code clamps it and its partial sums at 0).
      stop_weight_gradient: whether to stop the gradient through the weights, as the published code does.
      where: booleans that broadcast to `x`, True = counts. An absent entry is in no window.

    Returns:
      `x` with `(size - window) // stride + 1` entries along each of `axes`, in its dtype: whole windows only,
      without padding. 0 for a window without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range; a window larger than the array.

    Reference:
      Stergiou et al., "Refining activation downsampling with SoftPool".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import soft_pool
      >>> print(soft_pool(jnp.array([1.0, 3.0, 2.0, 2.0, 0.0, -1.0]), 2, axes=0).round(6))
      [ 2.761594  2.       -0.268941]
    """
    _checks.floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must have at least one axis, got a scalar")
    chosen = [_checks.integer("axes", a) for a in _tuple(axes)]
    if any(not -x.ndim <= a < x.ndim for a in chosen) or len({a % x.ndim for a in chosen}) < len(chosen):
        raise ValueError(
            f"axes must be different axes in [{-x.ndim}, {x.ndim}) for x of shape {tuple(x.shape)}, got {axes}"
        )
    chosen = [a % x.ndim for a in chosen]
    sizes = _one_each("window", window, chosen)
    steps = sizes if stride is None else _one_each("stride", stride, chosen)
    if any(w > x.shape[a] for a, w in zip(chosen, sizes)):
        raise ValueError(
            f"window must fit into the axes {tuple(chosen)} of x of shape {tuple(x.shape)}, got {tuple(sizes)}"
        )
    if clamp_min is not None:
        _checks.number("clamp_min", clamp_min)
    _checks.flag("stop_weight_gradient", stop_weight_gradient)
    a, present, _ = present_scores(x, -1, where, "soft_pool")
    y = _pool(a, present, tuple(chosen), sizes, steps, stop_weight_gradient)
    if clamp_min is not None:
        y = jnp.maximum(y, clamp_min)
    return y.astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4, 5))
def _pool(x, present, axes, sizes, steps, stop_weight_gradient):
    """The pooled activations. Checkpointed: the backward pass keeps only `x`, not the windows' weights."""

    def slices(a):
        for offset in itertools.product(*(range(w) for w in sizes)):
            start, stop, step = [0] * a.ndim, list(a.shape), [1] * a.ndim
            for axis, first, w, s in zip(axes, offset, sizes, steps):
                start[axis], step[axis] = first, s
                stop[axis] = first + (a.shape[axis] - w) // s * s + 1
            yield lax.slice(a, start, stop, step)

    scores = jnp.where(present, x, -jnp.inf)
    m = finite_gauge(functools.reduce(jnp.maximum, slices(scores)))
    total = weighted = jnp.zeros_like(m)
    for a, keep in zip(slices(x), slices(present)):
        e = jnp.where(keep, jnp.exp(jnp.where(keep, a - m, 0)), 0)
        e = lax.stop_gradient(e) if stop_weight_gradient else e
        total, weighted = total + e, weighted + e * a
    return safe_divide(weighted, total)


def _tuple(value) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _one_each(name: str, value, axes) -> tuple[int, ...]:
    values = _tuple(value)
    if len(values) not in (1, len(axes)):
        raise ValueError(f"{name} must be one integer, or one for each of the {len(axes)} axes, got {value}")
    return tuple(_checks.integer(name, v, at_least=1) for v in (values * len(axes))[: len(axes)])
