"""The matrix product of linear logits, in one dtype forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jaxsoft._numerics import accumulation_dtype


def product(a: Array, b: Array, contract: tuple[int, int], dtype: Any, precision: Any) -> Array:
    """`a @ b` over one axis of each: multiplied in `dtype`, with all its derivatives; summed in float32 or wider."""
    a, b = a.astype(dtype), b.astype(dtype)
    wide = accumulation_dtype(dtype)
    return (_dot if dtype == wide else _half)(a, b, contract, precision, wide)


def _dot(a: Array, b: Array, contract: tuple[int, int], precision: Any, dtype: Any) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


# JAX transposes a product into one of the result's cotangent, whose dtype is that of the result. For a float32 result
# of half-precision matrices, it would multiply in float32. So the tangents have half-precision results: their
# transposes round the cotangent, and XLA sums in float32 within them.
_half = jax.custom_jvp(_dot, nondiff_argnums=(2, 3, 4))


def _half_jvp(contract, precision, wide, primals, tangents):
    (a, b), (da, db) = primals, tangents
    out = _half(a, b, contract, precision, wide)
    terms = [
        _dot(*pair, contract, precision, a.dtype).astype(wide)
        for pair in ((da, b), (a, db))
        if not any(isinstance(factor, SymbolicZero) for factor in pair)
    ]
    return out, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(out)


_half.defjvp(_half_jvp, symbolic_zeros=True)
