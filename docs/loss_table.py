"""The table of losses: what each loss reads of a row of logits, and how many matrix products that takes.

Nothing is listed by hand. A loss is traced, on `linear_logits`, with the arguments of its docstring's example; its
entries of the conformance table add the options that read the row in another way.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from conformance.entry import make_inputs
from conformance.table import ENTRIES

import jaxsoft
from jaxsoft import losses
from jaxsoft.rows import RowReduction, reductions

FEATURES = (
    1009,
    1013,
    1019,
    1021,
)  # of each expression: primes, so that a product's size tells that it is one
OWN = "its own"  # a reduction that the loss defines itself


class Products(NamedTuple):
    """Matrix products of the size of `hidden @ weight`; `each_step` is the number for each step of a search."""

    once: int = 0
    each_step: int = 0

    def __str__(self) -> str:
        steps = "" if self.each_step == 0 else " + s" if self.each_step == 1 else f" + {self.each_step} s"
        return f"{self.once}{steps}"


class Trace(NamedTuple):
    """What a traced call of a loss asks for.

    Attributes:
      passes: the names of the row reductions of each pass.
      value: the matrix products of the value.
      gradient: the matrix products that its gradient adds.
    """

    passes: tuple[tuple[str, ...], ...]
    value: Products
    gradient: Products


# --- the statistics: which reductions the passes ask for ----------------------------------------------------


def replaced(stack: contextlib.ExitStack, function: Callable, new: Callable) -> None:
    """Replaces a function of the library in every module that knows it."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "jaxsoft"]
    for module in modules:
        for name in [name for name, value in vars(module).items() if value is function]:
            stack.enter_context(mock.patch.object(module, name, new))


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, ...]]]:
    """Within it, every call of `reduce_rows` adds the names of its reductions to the list.

    So do, at the end, the reductions that were made and not given to `reduce_rows`.
    """
    names: dict[Any, str] = {}
    passes: list[tuple[str, ...]] = []
    made: list[str] = []
    making: list[str] = []

    def key(reduction: RowReduction) -> RowReduction:
        return reduction._replace(args=(), col_args=(), entry_args=())

    def note(name: str, reduction: RowReduction) -> None:
        # Without `finalize`, for losses that replace it.
        names[key(reduction)] = names[reduction.init, reduction.update] = name

    def name_of(reduction: RowReduction) -> str:
        return names.get(key(reduction)) or names.get((reduction.init, reduction.update), OWN)

    def noting(name: str, factory: Callable) -> Callable:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            making.append(name)
            try:
                reduction = factory(*args, **kwargs)
            finally:
                making.pop()
            if isinstance(reduction, RowReduction):
                note(name, reduction)
                if not making:  # else it is a part of another one
                    made.append(name)
            return reduction

        return make

    reduce_rows = jaxsoft.reduce_rows

    @functools.wraps(reduce_rows)
    def noted(logits: Any, wanted: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves(wanted, is_leaf=lambda r: isinstance(r, RowReduction))
        passes.append(tuple(dict.fromkeys(map(name_of, leaves))))
        return reduce_rows(logits, wanted, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, f in list(vars(reductions).items()):
            if inspect.isfunction(f) and f.__module__ == reductions.__name__ and name[0] != "_":
                if all(p.default is not p.empty for p in inspect.signature(f).parameters.values()):
                    reduction = f()
                    if isinstance(reduction, RowReduction):
                        note(name, reduction)  # a module may hold it as a constant
                replaced(stack, f, noting(name, f))
        replaced(stack, reduce_rows, noted)
        yield passes
    if not passes and made:
        passes.append(tuple(dict.fromkeys(made)))


# --- the cost: matrix products of a traced program ----------------------------------------------------------


def products(jaxpr: Any, sizes: set[int]) -> Products:
    """The matrix products of a program that take as many multiplications as one of `sizes`."""
    once = each_step = 0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            left, right = (v.aval.shape for v in equation.invars)
            (contracted, _), (batch, _) = params["dimension_numbers"]
            shared = math.prod(left[i] for i in (*contracted, *batch))
            matrices = min(len(left), len(right)) > 1
            once += matrices and math.prod((*left, *right)) // shared in sizes
            continue
        leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
        inner = [products(p, sizes) for p in (getattr(p, "jaxpr", p) for p in leaves) if hasattr(p, "eqns")]
        if kind == "cond":
            inner = [max(inner)]
        for part in inner:
            if kind == "while":
                each_step += part.once + part.each_step
            else:
                once += part.once * params.get("length", 1)
                each_step += part.each_step
    return Products(once, each_step)


# --- the calls ----------------------------------------------------------------------------------------------


class _Called(BaseException):
    """Ends an example at the call of its function."""


def example_call(name: str) -> tuple[tuple, dict[str, Any]]:
    """The arguments of the first call in the example of a loss."""

    def called(*args: Any, **kwargs: Any) -> None:
        raise _Called(args, kwargs)

    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(losses, name)) or "")
    with mock.patch.object(losses, name, called):
        try:
            exec("\n".join(example.source for example in examples), {})
        except _Called as call:
            return call.args
    raise ValueError(f"the example of jaxsoft.losses.{name} does not call it")


def trace(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Trace | None:
    """Traces a call of a loss in which all logits are expressions; None if it takes none."""
    bound = inspect.signature(function, follow_wrapped=False).bind(*args, **kwargs)
    logits = {k: v for k, v in bound.arguments.items() if "Logits" in str(function.__annotations__.get(k))}
    leaves, tree = jax.tree.flatten(logits, is_leaf=lambda a: hasattr(a, "shape"))
    heads: dict[int, tuple] = {}  # hidden and weight, by the logits' place
    for i, a in enumerate(leaves):
        if getattr(a, "ndim", 0) and jnp.issubdtype(a.dtype, jnp.floating):
            shapes = (*a.shape[:-1], FEATURES[len(heads)]), (FEATURES[len(heads)], a.shape[-1])
            heads[i] = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    if not heads:
        return None

    def value(heads):
        given = [jaxsoft.linear_logits(*heads[i]) if i in heads else a for i, a in enumerate(leaves)]
        bound.arguments.update(jax.tree.unflatten(tree, given))
        out = function(*bound.args, **bound.kwargs)
        return sum(jnp.sum(a) for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.floating))

    sizes = {hidden.size * weight.shape[1] for hidden, weight in heads.values()}
    with recorded() as passes:
        try:
            of_value = products(jax.make_jaxpr(value)(heads).jaxpr, sizes)
        except (TypeError, ValueError) as error:
            if re.search(r"dense\(\)|for linear_logits", str(error)):  # it needs whole rows, or other axes
                return None
            raise
    both = products(jax.make_jaxpr(jax.value_and_grad(value))(heads).jaxpr, sizes)
    return Trace(
        tuple(passes), of_value, Products(both.once - of_value.once, both.each_step - of_value.each_step)
    )


def rows(names: Iterable[str] = losses.__all__) -> Iterator[tuple[str, str, Trace | None]]:
    """The rows of the table, unsorted: name, options and trace of each loss, and of its entries that differ."""
    inputs = make_inputs(0, (3,), 6)
    for name in names:
        plain = trace(getattr(losses, name), *example_call(name))
        yield name, "", plain
        entries = [e for e in ENTRIES if e.export == f"jaxsoft.losses.{name}" and e.function is not None]
        # Options of the plain entry, too, are there for the tests' sake.
        common = next(({**e.options, **e.arrays} for e in entries if not e.variant), {})
        variants: dict[Trace | None, list[str]] = {}
        for entry in entries:
            if entry.variant:
                parameters = inspect.signature(entry.function).parameters.values()
                required = {p.name for p in parameters if p.default is p.empty}
                options = {k: v for k, v in entry.options.items() if k in required or common.get(k) != v}
                arrays = {option: inputs[source] for option, source in entry.arrays.items()}
                logits_and_labels = jnp.ones((3, 6)), inputs[entry.inputs[0]]
                traced = trace(entry.function, logits_and_labels, {**options, **arrays})
                if traced not in (plain, None):
                    own = [option for option in entry.arrays if option not in common]
                    variants.setdefault(traced, []).append(described(entry, options, own))
        for traced, which in variants.items():
            yield name, " or ".join(which), traced


def described(entry: Any, options: dict[str, Any], arrays: list[str]) -> str:
    """What distinguishes an entry: the kind of labels, and its options."""
    kinds = {"soft": "label distributions", "positive_mask": "a mask of positives"}
    labels = [kinds[kind] for kind in entry.inputs[:1] if kind in kinds]
    known = inspect.signature(entry.function).parameters
    given = [f"`{name}={value!r}`" for name, value in options.items() if name in known]
    given += [f"`{name}`" for name in arrays if name in known]
    return ", ".join(labels + given) or f'"{entry.variant}"'
