"""Roots of decreasing functions, one per row: a safeguarded search, and their derivatives as implicit functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._trees import anywhere, tangent_of


def search(
    improve: Callable[[Array, Array], tuple[Array, Array]],
    lo: Array,
    hi: Array,
    start: Array,
    tolerance: Any,
    most_steps: int,
    finished: Array | None = None,
) -> tuple[Array, Array]:
    """The roots between two bounds, and the last steps as proposed, which are long where there is no root.

    Where a step leaves the interval that holds the root, the interval is halved. A finished row does not move while the
    search goes on for others.

    Args:
      improve: `(t, unfinished) -> (proposal, value)`, where the value is that of the function at t: above 0 on the left
        of its root. A row with the value NaN is finished. What it returns for finished rows is not used.
      lo: a bound on the left of each root.
      hi: a bound on the right.
      start: where the search begins.
      tolerance: a step as small as this is the last one.
      most_steps: the number of steps after which the search ends in any case.
      finished: rows whose root is `start`; none by default.

    Inside `shard_map`, all devices make as many steps: `improve` may read rows that lie on several of them.
    """

    def step(carry):
        count, lo, hi, t, last, unfinished, _ = carry
        proposal, value = improve(t, unfinished)
        lo, hi = jnp.where(value >= 0, t, lo), jnp.where(value >= 0, hi, t)
        new = jnp.where((proposal >= lo) & (proposal <= hi), proposal, (lo + hi) / 2)
        moved = (jnp.abs(new - t) > tolerance) & ~jnp.isnan(value)
        t, last = jnp.where(unfinished, new, t), jnp.where(unfinished, proposal - t, last)
        unfinished = unfinished & moved
        return count + 1, lo, hi, t, last, unfinished, anywhere(unfinished)

    def goes_on(carry):
        return (carry[0] < most_steps) & carry[-1]

    unfinished = ~jnp.isnan(lo) if finished is None else ~finished
    first = (jnp.int32(0), lo, hi, start, start, unfinished, anywhere(unfinished))
    return lax.while_loop(goes_on, step, first)[3:5]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def differentiable(newton: Callable, root: Array, *operands: Any) -> Array:
    """`root`, found without derivatives, as a function of `operands`.

    `newton(*operands, root)` is a Newton step from the root. It stays there, and to first order it does not depend on
    where it began; so its derivatives for the operands are those of the root. They are exact to every order, as they
    are taken at a root that is itself differentiable.
    """
    del newton, operands
    return root


def _differentiable_jvp(newton, primals, tangents):
    root = differentiable(newton, *primals)
    return root, tangent_of(lambda *operands: newton(*operands, root), primals[1:], tangents[1:])


differentiable.defjvp(_differentiable_jvp, symbolic_zeros=True)
