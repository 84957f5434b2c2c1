"""The matrix product of linear logits, in one dtype forward and backward.

JAX differentiates `lax.dot_general` into products with the cotangent of the result, which has the result's dtype, and
whose results have that dtype, too. If half-precision matrices have a float32 result, these products multiply in
float32; if it is in half precision, they round what they sum. `_product_p` multiplies in half precision with a float32
result, and its derivatives are products of the same kind.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxsoft._numerics import accumulation_dtype
from jaxsoft._trees import align_varying


def product(a: Array, b: Array, contract: tuple[int, int], dtype: Any, precision: Any) -> Array:
    """`a @ b` over one axis of each: multiplied in `dtype`, as are its derivatives; summed in float32 or wider."""
    dimension_numbers = (((contract[0],), (contract[1],)), ((), ()))
    if dtype == accumulation_dtype(dtype):
        return _dot(
            a, b, dimension_numbers=dimension_numbers, dtype=dtype, precision=precision, sharding=None
        )
    a, b = align_varying((a, b))
    return _product_p.bind(
        a, b, dimension_numbers=dimension_numbers, dtype=dtype, precision=precision, sharding=None
    )


def _dot(a: Array, b: Array, *, dimension_numbers, dtype, precision, sharding, multiply_in=None) -> Array:
    """`lax.dot_general` of operands rounded to `dtype`."""
    a, b = (x.astype(dtype).astype(multiply_in or dtype) for x in (a, b))
    wide = accumulation_dtype(dtype)
    return lax.dot_general(
        a, b, dimension_numbers, precision=precision, preferred_element_type=wide, out_sharding=sharding
    )


# --- the primitive -------------------------------------------------------------------------------------------


def _abstract(a, b, **options):
    return jax.make_jaxpr(functools.partial(_dot, **options))(a, b).out_avals[0]


def _batched(operands, axes, *, dimension_numbers, sharding, **options) -> tuple[Array, int]:
    """Under `vmap`: one more batch axis if both operands are mapped, else one more free axis of one of them."""
    contract, batch = dimension_numbers
    mapped = [axis is not None for axis in axes]
    a, b = (x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes))
    contract, batch = (
        tuple(tuple(i + m for i in own) for own, m in zip(pair, mapped)) for pair in (contract, batch)
    )
    out = 0
    if all(mapped):
        batch = tuple((0, *own) for own in batch)
    else:  # the first free axis of its operand, after the batch axes and the other's free axes if those come first
        out = len(batch[0]) + (a.ndim - len(batch[0]) - len(contract[0]) if mapped[1] else 0)
    if sharding is not None:
        spec = list(sharding.spec)
        spec.insert(out, jax.typeof(a if mapped[0] else b).sharding.spec[0])
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return _product_p.bind(a, b, dimension_numbers=(contract, batch), sharding=sharding, **options), out


def _pull(cotangent, x, y, y_axes, x_dims, y_dims, options) -> Array:
    """The cotangent of one operand, x; `y_axes` are the axes of the product's cotangent that are free axes of y."""
    (x_contract, x_batch), (y_contract, y_batch) = x_dims, y_dims
    x_free = [i for i in range(x.aval.ndim) if i not in (*x_contract, *x_batch)]
    y_free = tuple(i for i in range(y.ndim) if i not in (*y_contract, *y_batch))
    dimension_numbers = ((tuple(y_axes), y_free), (tuple(range(len(y_batch))), y_batch))
    order = (*x_batch, *x_free, *(i for _, i in sorted(zip(y_contract, x_contract))))
    to = x.aval.sharding
    sharding = None if to.mesh.empty else NamedSharding(to.mesh, PartitionSpec(*(to.spec[i] for i in order)))
    options = {**options, "dimension_numbers": dimension_numbers, "sharding": sharding}
    out = _product_p.bind(cotangent, y, **options)
    return jnp.transpose(out, [order.index(i) for i in range(len(order))]).astype(x.aval.dtype)


def _pull_left(cotangent, a, b, **options) -> Array:
    a_dims, b_dims = zip(*options["dimension_numbers"])
    axes = range(a.aval.ndim - len(a_dims[0]), cotangent.ndim)
    return _pull(cotangent, a, b, axes, a_dims, b_dims, options)


def _pull_right(cotangent, a, b, **options) -> Array:
    a_dims, b_dims = zip(*options["dimension_numbers"])
    axes = range(len(a_dims[1]), a.ndim - len(a_dims[0]))
    return _pull(cotangent, b, a, axes, b_dims, a_dims, options)


@functools.partial(jax.jit, static_argnames=("dimension_numbers", "dtype", "precision", "sharding"))
def _run(a, b, **options):
    return _product_p.bind(a, b, **options)


_product_p = Primitive("half_precision_product")
_product_p.def_impl(_run)
_product_p.def_abstract_eval(_abstract)
ad.defbilinear(_product_p, _pull_left, _pull_right)
batching.primitive_batchers[_product_p] = _batched
mlir.register_lowering(_product_p, mlir.lower_fun(_dot, multiple_results=False))
# XLA's CPU backend fails on some half-precision products with a float32 result ("Unsupported element type for
# DotThunk"), and multiplies in float32 as fast.
_on_cpu = functools.partial(_dot, multiply_in=jnp.float32)
mlir.register_lowering(_product_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")
