"""Elementwise functions of tiles, by the approximate instructions of a GPU's special function unit.

The full functions cost several times as many instructions: `exp` 8 instead of 2, a division 9 instead of 2. Each is as
exact as float32 results need to be:

* `exp(x)` has a relative error of `2e-7 + 1e-7 |x|`, so that sums of `exp(x - max)` are as exact as before, and single
  tiny weights are exact to about 5e-6.
* `x / y` has one of 3e-7. Divisors below `1.2e-38` in size count as 0, those above `8.5e37` as infinite.
* `logistic` and `tanh` have one of 5e-7, near 0 too.
* `exp_difference(x, y, e)`, `e^y - e` for `y = x + log e`, has one of `9e-7 + 5e-7 |y|`, and of 4e-7 for `|x| < 1/4`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

_LOG2E = 1 / math.log(2)
# (e^x - 1) / x by powers of x, exact to 9e-8 for |x| < _NEAR.
_NEAR = 0.25
_EXPM1 = (1.0, 0.4999983, 0.16666642, 0.041775295, 0.0083488478)
# tanh(x) = x + x^3 (these, times 1, x^2, x^4, x^6), exact to 5e-8 below 0.3.
_TANH = (-1 / 3, 2 / 15, -17 / 315, 62 / 2835)


def functions(interpret: bool) -> dict[str, Callable]:
    """For some primitives, functions of tiles that take their place; the interpreter has no such instructions."""
    exp2 = lax.exp2 if interpret else _exp2
    reciprocal = (lambda x: lax.full_like(x, 1) / x) if interpret else _reciprocal

    def polynomial(x, coefficients):
        sums = lax.full_like(x, coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            sums = sums * x + lax.full_like(x, coefficient)
        return sums

    def exp(x):
        return exp2(x * lax.full_like(x, _LOG2E))

    def logistic(x):
        return reciprocal(lax.full_like(x, 1) + exp(-x))

    def tanh(x):
        one = lax.full_like(x, 1)
        e = exp2(lax.min(x * lax.full_like(x, -2 * _LOG2E), lax.full_like(x, 100)))  # exp(-2 x), finite
        square = x * x
        small = lax.abs(x) < lax.full_like(x, 0.3)
        return lax.select(small, x + x * square * polynomial(square, _TANH), (one - e) * reciprocal(one + e))

    def div(x, y):
        return x * reciprocal(y)

    def exp_difference(x, y, e):
        near = lax.abs(x) < lax.full_like(x, _NEAR)
        return lax.select(near, (x * e) * polynomial(x, _EXPM1), exp(y) - e)

    found = (exp, logistic, tanh, div, exp_difference)
    return {"exp2": exp2, **{function.__name__: function for function in found}}


def _exp2(x):
    return _inlined(lambda registers: registers.exp2(approx=True), x)


def _reciprocal(x):
    def function(registers):
        return registers._pointwise(registers._lift_fast_instr("rcp.approx.ftz.f32"))

    return _inlined(function, x)


def _inlined(function: Callable, x: Any) -> Any:
    """Applies a function of Mosaic GPU's registers to a tile."""
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=result)(
        lambda _, registers: function(registers)
    )(x)
