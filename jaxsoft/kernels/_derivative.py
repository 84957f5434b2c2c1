"""The derivative of states that a pass computed without one: a linear rule, which a kernel may transpose.

JAX cannot differentiate a kernel. The derivative of its results is the `rule` that a pass over the same scores by XLA
has, too: it is linear in the tangents and consists of ordinary operations, so that JAX can evaluate it (forward mode),
differentiate it (higher orders) and batch it. Only its transpose, which reverse mode needs, is computed by a kernel,
whose own derivative is that of the rule's transpose.

JAX's `linear_call` is a linear function with a given transpose, too, but has neither batching nor higher orders.
`_linear_p` is such a primitive with both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxsoft._trees import combine, partition


def attach(rule: Callable, pull_back: Callable | None, states: Any, masks: Any, operands: Any) -> Any:
    """`states`, computed without derivatives, as differentiable functions of `operands`.

    Args:
      rule: `(states, masks, operands, tangents) -> the tangents of the states' float leaves`. It is linear in
        `tangents`, a tree like `operands` with None for leaves without a tangent.
      pull_back: `(states, masks, operands, cotangents) -> the cotangents of operands`: the transpose of `rule`, by a
        kernel; None for leaves without one. None: JAX transposes `rule`.
      states: a tree of arrays.
      masks: arrays without derivatives that `states` depend on.
      operands: the other arrays that `states` depend on.

    Returns:
      A tree like `states`.
    """
    floats, others = partition(states)
    return combine(_attach(rule, pull_back, floats, others, masks, operands), others)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attach(rule, pull_back, floats, others, masks, operands):
    del rule, pull_back, others, masks, operands
    return floats


@functools.partial(_attach.defjvp, symbolic_zeros=True)
def _attach_jvp(rule, pull_back, primals, tangents):
    # The primal output must be attached again: with plain states, second derivatives would be wrong.
    out = _attach(rule, pull_back, *primals)
    given = jax.tree.leaves(tangents[-1])
    active = [i for i, d in enumerate(given) if not isinstance(d, SymbolicZero)]
    if not active:
        return out, jax.tree.map(jnp.zeros_like, out)
    residuals, treedef = jax.tree.flatten(primals)
    operands_def, floats_def = jax.tree.structure(primals[-1]), jax.tree.structure(out)

    def arguments(residuals: list) -> tuple:
        floats, others, masks, operands = treedef.unflatten(residuals)
        return combine(lax.stop_gradient(floats), others), masks, operands

    def push(residuals: list, tangents: list) -> list:
        leaves: list = [None] * len(given)
        for i, d in zip(active, tangents):
            leaves[i] = d
        return jax.tree.leaves(rule(*arguments(residuals), operands_def.unflatten(leaves)))

    def pull(residuals: list, cotangents: list) -> list:
        assert pull_back is not None
        d = pull_back(*arguments(residuals), floats_def.unflatten(cotangents))
        leaves = operands_def.flatten_up_to(d)
        return [leaves[i] for i in active]

    some = [given[i] for i in active]
    d = (
        push(residuals, some)
        if pull_back is None
        else _linear(push, pull, floats_def.num_leaves, residuals, some)
    )
    return out, floats_def.unflatten(d)


# --- a function with another's derivative --------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def differentiated_as(ordinary: Callable, function: Callable, *args: Any) -> Any:
    """`function(*args)`, with the derivatives of `ordinary(*args)`, which has the same value."""
    del ordinary
    return function(*args)


@functools.partial(differentiated_as.defjvp, symbolic_zeros=True)
def _differentiated_as_jvp(ordinary, function, primals, tangents):
    return differentiated_as(ordinary, function, *primals), _tangent(ordinary, primals, tangents)


def _tangent(function: Callable, primals: Any, tangents: Any) -> Any:
    """The tangent of `function(*primals)`, to which symbolic zeros do not contribute operations."""
    leaves, treedef = jax.tree.flatten(primals)
    given = treedef.flatten_up_to(tangents)
    active = [i for i, d in enumerate(given) if not isinstance(d, ad.Zero | SymbolicZero)]

    def of_active(*some):
        all_leaves = list(leaves)
        for i, leaf in zip(active, some):
            all_leaves[i] = leaf
        return function(*treedef.unflatten(all_leaves))

    return jax.jvp(of_active, [leaves[i] for i in active], [given[i] for i in active])[1]


# --- the primitive -------------------------------------------------------------------------------------------


def _linear(
    push: Callable, pull: Callable, results: int, residuals: list[Array], tangents: list[Array]
) -> list:
    """`push(residuals, tangents)`, linear in the tangents, of ordinary operations; transposed, `pull`.

    The results have the types of the first residuals, of which they are the tangents.
    """
    options = dict(push=push, pull=pull, results=results, fixed=len(residuals))
    return _linear_p.bind(*residuals, *tangents, **options)


def _evaluate(*operands, push, pull, results, fixed) -> list:
    del pull, results
    return push(list(operands[:fixed]), list(operands[fixed:]))


def _types(*operands, push, pull, results, fixed) -> list:
    del push, pull, fixed
    return list(operands[:results])


def _jvp(operands, tangents, *, fixed, **options) -> tuple[list, list]:
    run = functools.partial(_linear_p.bind, fixed=fixed, **options)
    if all(isinstance(d, ad.Zero) for d in tangents[:fixed]):
        d = run(*operands[:fixed], *map(ad.instantiate_zeros, tangents[fixed:]))
    else:
        d = _tangent(functools.partial(_evaluate, fixed=fixed, **options), operands, tangents)
    return run(*operands), d


def _transpose(cotangents, *operands, push, pull, results, fixed) -> list:
    del results
    residuals, given = list(operands[:fixed]), operands[fixed:]
    like = [d.aval if ad.is_undefined_primal(d) else jax.typeof(d) for d in given]

    def ordinary(residuals, cotangents):
        return jax.linear_transpose(functools.partial(push, residuals), like)(cotangents)[0]

    d = differentiated_as(ordinary, pull, residuals, [*map(ad.instantiate_zeros, cotangents)])
    return [None] * fixed + [c if ad.is_undefined_primal(x) else None for x, c in zip(given, d)]


def _batched(operands, axes, *, push, pull, results, fixed) -> tuple[list, list]:
    size = next(a.shape[axis] for a, axis in zip(operands, axes) if axis is not None)
    mapped: list = [None if axis is None else 0 for axis in axes]
    operands = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(operands, axes)]
    for i in (*range(results), *range(fixed, len(operands))):
        if mapped[i] is None:
            operands[i], mapped[i] = jnp.broadcast_to(operands[i], (size, *operands[i].shape)), 0
    push, pull = (jax.vmap(f, (mapped[:fixed], 0), axis_size=size) for f in (push, pull))
    out = _linear(push, pull, results, operands[:fixed], operands[fixed:])
    return out, [0] * len(out)


_linear_p = Primitive("jaxsoft_linear")
_linear_p.multiple_results = True
_linear_p.def_impl(_evaluate)
_linear_p.def_abstract_eval(_types)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batched
mlir.register_lowering(_linear_p, mlir.lower_fun(_evaluate, multiple_results=True))
