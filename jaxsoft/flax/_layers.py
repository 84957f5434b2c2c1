"""What a module must know of a function: its parameters, its running statistics and how they begin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft.activations import pade_activation, pade_leaky_relu
from jaxsoft.norms import (
    crms_norm,
    evonorm_b0,
    evonorm_s0,
    layer_norm,
    power_norm,
    power_norm_init,
    rms_norm,
    unified_norm,
    unified_norm_init,
)

Function = Callable[..., Any]


class Layer(NamedTuple):
    """A function `f(x, *statistics, **parameters, **options)`, as a module sees it.

    Attributes:
      parameters: the parameters at the beginning, from the number of features.
      statistics: the running statistics, from the number of features: what the function returns anew, and perhaps a
        second one whose gradient is its new value. Such a function takes `train` and returns a pair.
    """

    parameters: Callable[[int], dict[str, jax.Array]]
    statistics: Callable[[int], tuple[Any, ...]] | None = None


def _constant(**values: float) -> Callable[[int], dict[str, jax.Array]]:
    return lambda features: {name: jnp.full(features, value) for name, value in values.items()}


def _pade(features: int) -> dict[str, jax.Array]:
    del features
    return dict(zip(("numerator", "denominator"), pade_leaky_relu()))


LAYERS: dict[Function, Layer] = {
    layer_norm: Layer(_constant(scale=1, bias=0)),
    rms_norm: Layer(_constant(scale=1)),
    crms_norm: Layer(_constant()),
    power_norm: Layer(_constant(scale=1, bias=0), power_norm_init),
    unified_norm: Layer(_constant(scale=1, bias=0), unified_norm_init),
    evonorm_b0: Layer(_constant(scale=1, bias=0, slope=1), lambda features: (jnp.ones(features),)),
    evonorm_s0: Layer(_constant(scale=1, bias=0, slope=1)),
    pade_activation: Layer(_pade),
}


def layer_of(function: Function) -> Layer:
    """The layer of a function, or of a `functools.partial` of one."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if inner not in LAYERS:
        names = ", ".join(f.__name__ for f in LAYERS)
        raise ValueError(f"function must be one of {names}, or a functools.partial of one, got {function!r}")
    return LAYERS[inner]


def call(
    function: Function, x: jax.Array, statistics: tuple, parameters: dict, train: bool | None, options: dict
) -> tuple[jax.Array, Any]:
    """The output, and the new running statistics; None without."""
    if not statistics:
        return function(x, **parameters, **options), None
    if train is None:
        raise TypeError("train must be True or False: the function has running statistics")
    return function(x, *statistics, **parameters, train=train, **options)
