"""Evaluates the traced body of a sweep on a tile, with the kinds of arrays that Mosaic GPU has.

In registers, Mosaic GPU has tiles, vectors of one number per row or per column, and scalars. The body of a sweep is
ordinary `jax.numpy` code with arrays such as `[br, 1]` or `[br, k]`. So it is traced to a jaxpr, and the jaxpr is
evaluated on `Value`s. Each axis of a value is either wide (the rows `"r"` or columns `"c"` of the tile, or the features
`"h"` of wide operands) or narrow: then its entries are separate arrays. Each array, an `Item`, has only the wide axes
over which it varies: one number per row stays one number per row, however it is broadcast, until it is combined with
the columns. Inserting, moving and broadcasting axes is then mere bookkeeping and costs nothing.

Registers hold float32, int32, uint32 and booleans only, whatever the traced dtype is (`held`): Mosaic GPU has few
operations on narrower numbers. Half precision exists in memory and in matrix products.

`trace` gives the equations of the jaxpr, with calls inlined (`_INLINED`). `evaluate` goes through them: it applies
elementwise operations item by item (`_ELEMENTWISE`, `_map`), and has a rule for each operation on axes, reduction and
product (`_RULES`). Any other primitive is `Unsupported`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend import core

# Dtypes of matrix products.
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


class Unsupported(Exception):
    """The body does something for which this evaluator or Mosaic GPU has no rule; the message says what."""


class Product:
    """A product of two matrices that is not yet computed: it may accumulate onto what it is added to.

    Args:
      compute: `start -> start + product`, and `None -> product`.
    """

    def __init__(self, compute: Callable):
        self._compute, self._x = compute, None

    def read(self) -> Any:
        """The product, computed once."""
        if self._x is None:
            self._x = self._compute(None)
        return self._x

    def added_to(self, start: Any) -> Any:
        """`start` plus the product."""
        return self._compute(start) if self._x is None else start + self._x


class Number(NamedTuple):
    """An array in shared memory that is loaded wherever it is read: registers are scarcer than loads."""

    read: Callable


class Item(NamedTuple):
    """An array over the wide axes `dims` (a string of their letters, in the space's order), in registers.

    `Space.item` makes those of arrays that come from outside, and sees to the order of the axes.

    Instead of an array, `x` may be a `Product` or a `Number`. If `memory` is not empty (it may be a name), the array is
    in shared memory instead, and `x` is what the space's `load` and `product` take. Then `keep` may be an item of
    booleans over the first axis: where it is False, the array counts as 0.
    """

    dims: str
    x: Any
    memory: str = ""
    keep: Any = None

    def array(self, load: Callable) -> Any:
        """The array in registers."""
        return (
            load(self) if self.memory else self.x.read() if isinstance(self.x, Product | Number) else self.x
        )


class Value(NamedTuple):
    """A value of the traced function.

    Attributes:
      kinds: the kind of each axis: `"r"`, `"c"`, a letter of features (`"h"`), or None for a narrow or broadcast axis.
      items: array of `Item`s with as many axes, of length 1 where they are wide or broadcast.
    """

    kinds: tuple
    items: np.ndarray


class Space:
    """The wide axes of a tile: their sizes and order, and how arrays over them are laid out, loaded and multiplied.

    Args:
      sizes: the size of each letter.
      traced: the size of each letter when the function was traced.
      order: the letters in their order within arrays: `"rch"`, or `"crh"` where tiles are transposed.
      layout: `(array, dims) -> array` in the register layout of these axes.
      load: `item in shared memory -> array` in registers.
      product: `(left, right, kind, out) -> item` with axes `out`: the product of two items over axis `kind`.
      functions: for some elementwise primitives of one operand, what takes their place on whole tiles.

    Attributes:
      crosses_warps: whether there was a reduction over the first axis of an array, that is, across warps.
    """

    def __init__(
        self,
        sizes: dict,
        traced: dict,
        order: str,
        layout: Callable,
        load: Callable,
        product: Callable,
        functions: Mapping[str, Callable] = types.MappingProxyType({}),
    ):
        self.sizes, self.traced, self.order = sizes, traced, order
        self.layout, self.load, self.product, self.functions = layout, load, product, functions
        self.crosses_warps = False

    def actual(self, size: int) -> int:
        """The length in a tile of an axis that was traced with length `size`."""
        return next((self.sizes[k] for k in "rc" if self.traced[k] == size), size)

    def shape(self, dims: str) -> tuple[int, ...]:
        return tuple(self.sizes[d] for d in dims)

    def union(self, *dims: str) -> str:
        return "".join(d for d in self.order if any(d in each for each in dims))

    def item(self, letters: str, x: Any, memory: str = "") -> Item:
        """An item over these axes, listed in any order; those of `x` come in the space's order."""
        dims = self.union(letters)
        if not memory and np.shape(x) != self.shape(dims):
            raise ValueError(
                f"an array over the axes {dims!r} has shape {self.shape(dims)}, not {np.shape(x)}"
            )
        return Item(dims, x, memory)

    def spread(self, item: Item, dims: str) -> Any:
        """The array of an item, broadcast to the axes `dims`."""
        x = item.array(self.load)
        if item.dims == dims:
            return x
        at = tuple(dims.index(d) for d in item.dims)
        if list(at) != sorted(
            at
        ):  # `broadcast_in_dim` would not transpose, and for equal shapes not even complain
            raise ValueError(f"an array over the axes {item.dims!r} cannot be broadcast to {dims!r}")
        return self.layout(lax.broadcast_in_dim(x, self.shape(dims), at), dims)

    def iota(self, letter: str, start: Any = 0, dtype: Any = jnp.int32) -> Value:
        """`start`, `start + 1`, ... along a wide axis."""
        x = self.layout(lax.iota(held(dtype), self.sizes[letter]), letter)
        start = lax.broadcast(jnp.asarray(start, x.dtype), x.shape)
        return single(letter, self.item(letter, x + start))


def single(kinds: str, item: Item) -> Value:
    """The value of one item, whose axes come in the order `kinds`."""
    items = np.empty((1,) * len(kinds), object)
    items[(0,) * len(kinds)] = item
    return Value(tuple(kinds), items)


def single_like(value: Value, item: Item) -> Value:
    """The value of one item, with the axes of another value of one item."""
    items = np.empty(value.items.shape, object)
    items[(0,) * items.ndim] = item
    return Value(value.kinds, items)


def scalar(x: Any) -> Value:
    return single("", Item("", x))


def constant(x: Any) -> Value:
    """The value of a constant, in the dtype of registers."""
    x = np.asarray(x)
    return scalar(x.astype(held(x.dtype)))


def arrays(space: Space, value: Value, kinds: tuple, shape: tuple[int, ...]) -> list:
    """The arrays of an output, broadcast to axes `kinds`: one for each entry of its narrow axes."""
    for have, want in zip(value.kinds, kinds):
        if have is not None and have != want:
            raise Unsupported("an output varies over another axis of the tile than it should")
    dims = space.union("".join(k for k in kinds if k))
    extents = tuple(1 if k else n for k, n in zip(kinds, shape))
    if any(1 != have != want for have, want in zip(value.items.shape, extents)):
        raise Unsupported("it combines an axis of a tile with an axis of separate numbers")
    return [space.spread(item, dims) for item in np.broadcast_to(value.items, extents).ravel()]


class Name:
    """A variable of a `Body`."""

    def __init__(self, aval: Any):
        self.aval = aval


class Called(NamedTuple):
    """A function that has a rule of its own, in place of a primitive."""

    name: str


class Equation(NamedTuple):
    """An equation of a `Body`, with what rules read of a jaxpr's equation."""

    primitive: Any
    params: dict
    invars: list
    outvars: list


class Body(NamedTuple):
    """A traced function: a jaxpr whose calls are inlined, without equations that no output depends on.

    Attributes:
      invars: the variables that are its arguments.
      eqns: the equations.
      outvars: variables or literals.
    """

    invars: list
    eqns: list[Equation]
    outvars: list


def trace(function: Callable, *args: Any) -> tuple[Body, Any]:
    """The body of a function of `ShapeDtypeStruct`s, and the shapes and dtypes of what it returns."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    return flat(closed), out


def flat(closed: Any) -> Body:
    """The body that a closed jaxpr stands for."""
    invars = [Name(v.aval) for v in closed.jaxpr.invars]
    eqns: list[Equation] = []
    body = Body(invars, eqns, _inline(closed, invars, eqns))
    return _added_early(_needed(_once(body)))


def _once(body: Body) -> Body:
    """The body without equations that compute what an earlier one did, or that compute nothing."""
    same: dict[Name, Any] = {}
    found: dict[Any, Equation] = {}
    eqns = []

    def first(v):
        return same.get(v, v) if isinstance(v, Name) else v

    for eqn in body.eqns:
        eqn = eqn._replace(invars=[first(v) for v in eqn.invars])
        if _is_identity(eqn):
            same[eqn.outvars[0]] = eqn.invars[0]
            continue
        inputs = [
            v if isinstance(v, Name) else (v.aval.dtype, np.asarray(v.val).tobytes()) for v in eqn.invars
        ]
        key = (eqn.primitive, *sorted((name, str(x)) for name, x in eqn.params.items()), *inputs)
        earlier = found.setdefault(key, eqn)
        if earlier is eqn:
            eqns.append(eqn)
        else:
            same.update(zip(eqn.outvars, earlier.outvars))
    return Body(body.invars, eqns, [first(v) for v in body.outvars])


def _added_early(body: Body) -> Body:
    """The body with each sum of a product and something known earlier right after the product.

    Then the operands of the product are no longer needed.
    """
    read: dict[Any, list] = {}
    for eqn in [*body.eqns, Equation(None, {}, body.outvars, [])]:
        for v in _names(eqn.invars):
            read.setdefault(v, []).append(eqn)
    known, done, eqns = set(body.invars), set(), []
    for eqn in body.eqns:
        if id(eqn) in done:
            continue
        eqns.append(eqn)
        known.update(eqn.outvars)
        chain, v = [], eqn.outvars[0]
        while eqn.primitive.name == "dot_general" and len(read[v]) == 1 and read[v][0].primitive is not None:
            following = read[v][0]
            chain.append(following)
            if following.primitive.name not in ("transpose", "convert_element_type"):
                others = [u for u in _names(following.invars) if u is not v]
                if following.primitive.name in ("add", "add_any") and known.issuperset(others):
                    eqns += chain
                    done.update(map(id, chain))
                    known.update(u for each in chain for u in each.outvars)
                break
            v = following.outvars[0]
    return body._replace(eqns=eqns)


_IDENTITIES = (
    *("stop_gradient", "copy", "copy_p", "optimization_barrier", "reshard", "sharding_constraint"),
    *("reshape", "convert_element_type"),
)


def _is_identity(eqn: Equation) -> bool:
    """Whether an equation's output is its input."""
    name, old, new = eqn.primitive.name, eqn.invars[:1], eqn.outvars[0].aval
    same = (
        len(eqn.outvars) == 1
        and bool(old)
        and (old[0].aval.shape, old[0].aval.dtype) == (new.shape, new.dtype)
    )
    return same and name in _IDENTITIES


def _needed(body: Body) -> Body:
    """The body without equations that no output depends on."""
    live, needed = set(_names(body.outvars)), []
    for eqn in reversed(body.eqns):
        if live.intersection(eqn.outvars):
            needed.append(eqn)
            live.update(_names(eqn.invars))
    return body._replace(eqns=needed[::-1])


def _names(variables: list) -> list[Name]:
    """The variables that are not literals."""
    return [v for v in variables if isinstance(v, Name)]


def is_read(body: Body, var: Name) -> bool:
    """Whether an output depends on an argument."""
    return any(var in each for each in (body.outvars, *(eqn.invars for eqn in body.eqns)))


def split(body: Body, given: list[Name], may_be_kept: Callable) -> tuple[Body, Body]:
    """Divides a body into what depends on some of its arguments only, and the rest.

    Args:
      body: the body.
      given: these arguments.
      may_be_kept: `shape -> whether` a value of that shape may be computed ahead.

    Returns:
      A body whose arguments are `given`, and one that takes the outputs of the first after its own arguments.
    """
    known, early, late = set(given), [], []
    constant: set[Name] = set()
    for eqn in body.eqns:
        names = set(_names(eqn.invars)) - constant
        if not names:  # on either side, where it is needed
            constant.update(eqn.outvars)
            early.append(eqn)
            late.append(eqn)
        elif known.issuperset(names) and all(may_be_kept(v.aval.shape) for v in eqn.outvars):
            known.update(eqn.outvars)
            early.append(eqn)
        else:
            late.append(eqn)
    # Outputs are computed in the rest: a loop's carry must not be an operand itself.
    outputs = [v for v in _names(body.outvars) if v in known and v not in given]
    stays = {id(eqn) for eqn in (*late, *_needed(Body(given, early, outputs)).eqns)}
    needed = {v for eqn in late for v in _names(eqn.invars)}
    for eqn in reversed(early):  # what is free stays: what it is computed from is kept instead
        if eqn.primitive.name in _FREE and needed.intersection(eqn.outvars):
            stays.add(id(eqn))
            needed.update(_names(eqn.invars))
    rest = [eqn for eqn in body.eqns if id(eqn) in stays]
    kept = [v for eqn in early if id(eqn) not in stays for v in eqn.outvars if v in needed]
    after = Body([*body.invars, *kept], rest, body.outvars)
    return _needed(Body(given, early, kept)), _needed(after)


class Comparison(NamedTuple):
    """Where a body compares a number per row with one per column, or a number per column with 0.

    Attributes:
      name: `"le"`, `"lt"`, `"ge"` or `"gt"`; `"ne"` for a comparison with 0.
      left: the argument of the body that is the left operand.
      right: the argument that is the right operand; None for 0.
      out: the variable that holds the result for a tile.
    """

    name: str
    left: Name
    right: Name | None
    out: Name


def comparisons(body: Body, arguments: set[Name]) -> list[Comparison]:
    """The comparisons of two different integer arguments by order, and of one with 0."""
    source: dict[Name, Name] = {v: v for v in arguments if jnp.issubdtype(v.aval.dtype, jnp.integer)}
    found = []
    for eqn in body.eqns:
        names = _names(eqn.invars)
        if len(names) == 1 and eqn.primitive.name in _FREE and names[0] in source:
            source[eqn.outvars[0]] = source[names[0]]
        elif eqn.primitive.name in ("le", "lt", "ge", "gt") and len(names) == 2 and set(names) <= set(source):
            left, right = (source[v] for v in names)
            if left is not right:
                found.append(Comparison(eqn.primitive.name, left, right, eqn.outvars[0]))
        elif (
            eqn.primitive.name == "ne" and len(names) == 1 and names[0] in source and _is_zero(eqn.invars[1])
        ):
            found.append(Comparison("ne", source[names[0]], None, eqn.outvars[0]))
    return found


def _is_zero(v: Any) -> bool:
    return isinstance(v, core.Literal) and v.val == 0


def where_true(body: Body, true: set[Name]) -> Body:
    """The body where some variables are known to be true."""
    true, same, eqns = set(true), {}, []
    for eqn in body.eqns:
        eqn = eqn._replace(invars=[same.get(v, v) if isinstance(v, Name) else v for v in eqn.invars])
        name, given = eqn.primitive.name, [isinstance(v, Name) and v in true for v in eqn.invars]
        if name in _FREE and all(given):
            true.update(eqn.outvars)
        elif name == "and" and any(given):
            same[eqn.outvars[0]] = eqn.invars[given.index(True) ^ 1]
            if all(given):
                true.update(eqn.outvars)
        elif name == "select_n" and given[0] and eqn.invars[2].aval.shape == eqn.outvars[0].aval.shape:
            same[eqn.outvars[0]] = eqn.invars[2]
            continue
        eqns.append(eqn)
    outvars = [same.get(v, v) if isinstance(v, Name) else v for v in body.outvars]
    return _needed(Body(body.invars, eqns, outvars))


# Operations on axes, which cost nothing.
_FREE = ("broadcast_in_dim", "reshape", "squeeze")


def _inline(jaxpr: Any, args: list, eqns: list[Equation]) -> list:
    """Appends the equations of a jaxpr (closed or not) on given arguments; returns its outputs."""
    consts = getattr(jaxpr, "consts", ())
    for const in consts:
        if isinstance(const, Tracer) or np.ndim(const) > 0:
            raise Unsupported("its functions close over arrays")
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        invars = [v if isinstance(v, core.Literal) else known[v] for v in eqn.invars]
        called = eqn.params.get("name") if eqn.primitive.name in _INLINED else None
        if called in _NAMED:
            outvars = [Name(v.aval) for v in eqn.outvars]
            eqns.append(Equation(Called(called), {}, invars, outvars))
        elif eqn.primitive.name in _INLINED:
            outvars = _inline(eqn.params[_INLINED[eqn.primitive.name]], invars, eqns)
        else:
            outvars = [Name(v.aval) for v in eqn.outvars]
            eqns.append(Equation(eqn.primitive, eqn.params, invars, outvars))
        known.update(zip(eqn.outvars, outvars, strict=True))
    return [v if isinstance(v, core.Literal) else known[v] for v in jaxpr.outvars]


def evaluate(space: Space, body: Body, args: list[Value]) -> list[Value]:
    """The outputs of a body for the given values."""
    known = dict(zip(body.invars, args, strict=True))

    def read(var) -> Value:
        return known[var] if isinstance(var, Name) else _constant(var)

    for eqn in body.eqns:
        name = eqn.primitive.name
        values = [read(v) for v in eqn.invars]
        if name in _RULES:
            outs = _RULES[name](space, eqn, *values)
        elif name in _ELEMENTWISE:
            _check_integers(eqn)
            outs = _elementwise(space, eqn.primitive, eqn.params, *values)
        else:
            raise Unsupported(f"Mosaic GPU has no rule for {name}")
        known.update(zip(eqn.outvars, outs if isinstance(outs, list) else [outs]))
    return [read(v) for v in body.outvars]


def _constant(var) -> Value:
    """The value of a literal or of a constant of a jaxpr."""
    x = (
        np.asarray(var.val, getattr(var.aval, "dtype", None))
        if isinstance(var, core.Literal)
        else np.asarray(var)
    )
    if x.ndim > 0:
        raise Unsupported("its functions close over arrays")
    return constant(x)


# --- elementwise -------------------------------------------------------------------------------------------


def _join(values) -> tuple:
    """The kinds of the axes of a result that combines values elementwise."""
    kinds = []
    for each in zip(*(v.kinds for v in values)):
        found = {k for k in each if k is not None}
        if len(found) > 1:
            raise Unsupported("it combines different axes of a tile")
        kinds.append(found.pop() if found else None)
    return tuple(kinds)


def _map(space: Space, function: Callable, *values: Value) -> Value:
    """Applies a function of arrays of one shape item by item to values that broadcast."""
    ndim = max(len(v.kinds) for v in values)
    values = tuple(
        v if len(v.kinds) == ndim else Value((None,) * ndim, v.items.reshape((1,) * ndim)) for v in values
    )
    kinds = _join(values)
    shape = np.broadcast_shapes(*(v.items.shape for v in values))
    if any(k is not None and n != 1 for k, n in zip(kinds, shape)):
        raise Unsupported("it combines an axis of a tile with an axis of separate numbers")
    spread = [np.broadcast_to(v.items, shape) for v in values]
    out = np.empty(shape, object)
    for at in np.ndindex(shape):
        items: list[Any] = [s[at] for s in spread]
        dims = space.union(*(i.dims for i in items))
        out[at] = Item(dims, function(*(space.spread(i, dims) for i in items)))
    return Value(kinds, out)


def _elementwise(space: Space, primitive, params: dict, *values: Value) -> Value:
    rule = _ELEMENTWISE[primitive.name] or primitive.bind
    of_tiles = space.functions.get(primitive.name)

    def function(*x):
        if of_tiles is not None and x[0].ndim == 2 and x[0].dtype == jnp.float32:
            return of_tiles(*x)
        return rule(*x, **params)

    return _map(space, function, *values)


def _add(space: Space, eqn, a: Value, b: Value) -> Value:
    """Adds a product by accumulating it, if the other operand has the same axes."""
    _check_integers(eqn)
    for start, term in ((a, b), (b, a)):
        product = _product_of(term)
        if product is not None and start.kinds == term.kinds and start.items.size == 1:
            item = start.items.ravel()[0]
            if item.dims == product.dims and not isinstance(item.x, Product):
                return single_like(term, Item(item.dims, product.x.added_to(space.spread(item, item.dims))))
    return _map(space, lax.add, a, b)


def _convert(space: Space, eqn, value: Value) -> Value:
    _check_integers(eqn)
    dtype = eqn.params["new_dtype"]
    if _product_of(value) is not None and held(dtype) == jnp.float32:  # as it is, in registers
        return value
    return _map(space, functools.partial(convert, new_dtype=dtype), value)


def _div(space: Space, eqn, a: Value, b: Value) -> Value:
    """Divides; a tile by one number per row or per column: multiplies by its reciprocal."""
    _check_integers(eqn)
    of_tile, by_tile = (any(len(item.dims) == 2 for item in value.items.ravel()) for value in (a, b))
    is_float = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    if "div" in space.functions and is_float and of_tile and not by_tile:
        return _map(space, lax.mul, a, _map(space, lambda y: lax.full_like(y, 1) / y, b))
    return _elementwise(space, eqn.primitive, eqn.params, a, b)


def _select_n(space: Space, eqn, which: Value, *cases: Value) -> Value:
    """Selects; of an operand that cannot be loaded, only notes which of its rows count as 0."""
    item = cases[-1].items.ravel()[0]
    if len(cases) == 2 and cases[1].items.size == which.items.size == 1 and item.memory:
        keep, other = which.items.ravel()[0], cases[0].items.ravel()[0]
        is_zero = not other.dims and isinstance(other.x, np.ndarray | np.generic) and other.x == 0
        if is_zero and item.keep is None and keep.dims == item.dims[0] != space.order[0]:
            return single_like(cases[1], item._replace(keep=keep))
    return _elementwise(space, eqn.primitive, eqn.params, which, *cases)


def _product_of(value: Value) -> Item | None:
    """The item of a value that is a product and not yet computed."""
    item = value.items.ravel()[0] if value.items.size == 1 else None
    return item if item is not None and isinstance(item.x, Product) else None


def _without_options(function: Callable) -> Callable:
    """A rule that ignores options such as `accuracy`."""
    return lambda *args, **options: function(*args)


def _fill(x, value):
    return lax.full_like(x, value)


def held(dtype: Any) -> np.dtype:
    """The dtype in which registers hold numbers of a dtype of at most 4 bytes: float32, int32, uint32 or booleans."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize >= 4 or dtype == jnp.bool_:
        return dtype
    return jnp.dtype(jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32)


def convert(x, new_dtype, **options):
    """The rule of `convert_element_type`: `x` in the dtype in which registers hold `new_dtype`."""
    del options
    return cast(x, held(new_dtype))


def cast(x, dtype: Any) -> Any:
    """`x` in a dtype, which may be that of memory or of a matrix product."""
    if x.dtype == dtype:
        return x
    if isinstance(x, np.ndarray | np.generic):  # constants stay constants
        return np.asarray(x, dtype)
    if x.dtype == jnp.bool_:
        return lax.select(x, _fill32(x, 1, dtype), _fill32(x, 0, dtype))
    if dtype == jnp.bool_:
        return x != _fill(x, 0)
    return lax.convert_element_type(x, dtype)


def _check_integers(eqn) -> None:
    """Refuses integers of one or two bytes whose arithmetic might overflow: registers have four bytes."""
    dtype = eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.integer) or held(dtype) == dtype or eqn.primitive.name in _EXACT:
        return
    if eqn.primitive.name != "convert_element_type" or not np.can_cast(eqn.invars[0].aval.dtype, dtype):
        raise Unsupported(f"it computes {eqn.primitive.name} in {dtype}")


# Elementwise operations on integers that give one of their operands or a bitwise combination.
_EXACT = ("select_n", "max", "min", "clamp", "and", "or", "xor")


def _fill32(x, value, dtype):
    return lax.full(x.shape, value, dtype)


def _select(which, *cases):
    if len(cases) != 2 or which.dtype != jnp.bool_:
        raise Unsupported("Mosaic GPU has no rule for select_n of more than two cases")
    if cases[0].dtype == jnp.bool_:
        return (which & cases[1]) | (~which & cases[0])
    return lax.select_n(which, *cases)


def _not(x):
    return lax.bitwise_xor(x, _fill(x, True)) if x.dtype == jnp.bool_ else lax.bitwise_not(x)


def _equal(x, y):
    return _not(lax.bitwise_xor(x, y)) if x.dtype == jnp.bool_ else lax.eq(x, y)


def _not_equal(x, y):
    return lax.bitwise_xor(x, y) if x.dtype == jnp.bool_ else lax.ne(x, y)


def _clamp(low, x, high):
    return lax.min(lax.max(x, low), high)


def _is_finite(x):
    return lax.eq(x - x, _fill(x, 0))


def _integer_pow(x, *, y: int) -> Any:
    if y < 0:
        return _fill(x, 1) / _integer_pow(x, y=-y)
    if y == 0:
        return _fill(x, 1)
    half = _integer_pow(x, y=y // 2) if y > 1 else None
    square = None if half is None else half * half
    return x if y == 1 else square * x if y % 2 else square


def _floor(x):
    nearest = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return lax.select(nearest > x, nearest - _fill(x, 1), nearest)


def _ceil(x):
    return -_floor(-x)


def _log1p(x):
    u = _fill(x, 1) + x
    # The factor x / (u - 1) corrects the rounding of u = 1 + x.
    exact = lax.log(u) * (x / lax.select(u == _fill(x, 1), _fill(x, 1), u - _fill(x, 1)))
    exact = lax.select(u == _fill(x, 1), x, exact)
    return lax.select(u == _fill(x, jnp.inf), u, exact)


def _expm1(x):
    u = lax.exp(x)
    log_u = lax.log(u)
    exact = (u - _fill(x, 1)) * (x / lax.select(log_u == _fill(x, 0), _fill(x, 1), log_u))
    exact = lax.select(u == _fill(x, 1), x, exact)
    return lax.select((u == _fill(x, jnp.inf)) | (u == _fill(x, 0)), u - _fill(x, 1), exact)


def _power(x, y, **params):
    del params
    if not jnp.issubdtype(y.dtype, jnp.floating):
        y = lax.convert_element_type(y, jnp.float32)
    zero, one = _fill(x, 0), _fill(x, 1)
    size = lax.exp(y * lax.log(lax.select(x == zero, one, lax.abs(x))))
    size = lax.select(x == zero, lax.select(y > zero, zero, one / zero), size)
    half = y * _fill(y, 0.5)
    odd = (_floor(half) != half) & (_floor(y) == y)
    signed = lax.select((x < zero) & odd, -size, size)
    signed = lax.select((x < zero) & (_floor(y) != y), _fill(x, jnp.nan), signed)
    return lax.select((y == zero) | (x == one), one, signed)


def _logistic(x):
    return _fill(x, 1) / (_fill(x, 1) + lax.exp(-x))


def _sign(x):
    one, zero = _fill(x, 1), _fill(x, 0)
    return lax.select(
        x > zero, one, lax.select(x < zero, -one, x - x if jnp.issubdtype(x.dtype, jnp.floating) else zero)
    )


def _sinh(x):
    return (_expm1(x) - _expm1(-x)) * _fill(x, 0.5)


def _cosh(x):
    return (lax.exp(x) + lax.exp(-x)) * _fill(x, 0.5)


def _exp_difference(x, y, e):
    return lax.tanh(x * _fill(x, 0.5)) * (lax.exp(y) + e)


def _reduce_precision(x, *, exponent_bits, mantissa_bits):
    kinds = {(8, 7): jnp.bfloat16, (5, 10): jnp.float16, (8, 23): jnp.float32}
    if (exponent_bits, mantissa_bits) not in kinds:
        raise Unsupported("Mosaic GPU has no rule for reduce_precision to these sizes")
    dtype = kinds[exponent_bits, mantissa_bits]
    return lax.convert_element_type(lax.convert_element_type(x, dtype), x.dtype)


# The rule for each primitive; None: the primitive itself.
_ELEMENTWISE: dict[str, Callable | None] = {
    **dict.fromkeys(("sub", "mul", "div", "neg", "abs", "max", "min", "and", "or", "xor", "rem", "atan2")),
    **dict.fromkeys(("gt", "ge", "lt", "le", "shift_left", "shift_right_logical", "shift_right_arithmetic")),
    "and": None,
    "square": lambda x: x * x,
    "one_minus_square": lambda x: (_fill(x, 1) + x) * (_fill(x, 1) - x),
    "not": _not,
    "eq": _equal,
    "ne": _not_equal,
    "select_n": _select,
    "clamp": _clamp,
    "is_finite": _is_finite,
    "integer_pow": _integer_pow,
    "sign": _sign,
    "reduce_precision": _reduce_precision,
    "exp_difference": _exp_difference,
    "pow": _power,
    "round": lambda x, *, rounding_method: lax.round(x, rounding_method),
    "floor": _floor,
    "ceil": _ceil,
    "log1p": _without_options(_log1p),
    "expm1": _without_options(_expm1),
    "logistic": _without_options(_logistic),
    "sinh": _sinh,
    "cosh": _cosh,
    **{
        name: _without_options(getattr(lax, name))
        for name in ("exp", "exp2", "log", "tanh", "sqrt", "rsqrt", "erf", "sin", "cos")
    },
}


# --- structure -----------------------------------------------------------------------------------------------


def _broadcast_in_dim(space: Space, eqn, value: Value, *dynamic) -> Value:
    ndim, at = len(eqn.params["shape"]), eqn.params["broadcast_dimensions"]
    kinds, extents = [None] * ndim, [1] * ndim
    for d, kind, n in zip(at, value.kinds, value.items.shape):
        kinds[d], extents[d] = kind, n
    return Value(tuple(kinds), value.items.reshape(extents))


def _reshape(space: Space, eqn, value: Value, *dynamic) -> Value:
    """Inserts or removes axes of length 1, or reshapes narrow axes at the end."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    at = [d for d, n in enumerate(old) if n != 1]
    if [old[d] for d in at] == [n for n in new if n != 1]:
        taken = iter(at)
        source = [None if n == 1 else next(taken) for n in new]
        kinds = tuple(None if d is None else value.kinds[d] for d in source)
        return Value(kinds, value.items.reshape([1 if d is None else value.items.shape[d] for d in source]))
    lead = 0
    while lead < min(len(old), len(new)) and old[lead] == new[lead]:
        lead += 1
    if any(k is not None for k in value.kinds[lead:]):
        raise Unsupported("it reshapes a tile's rows or columns")
    items = np.broadcast_to(value.items, (*value.items.shape[:lead], *old[lead:]))
    kinds = (*value.kinds[:lead], *[None] * (len(new) - lead))
    return Value(kinds, items.reshape(*items.shape[:lead], *new[lead:]))


def _squeeze(space: Space, eqn, value: Value) -> Value:
    gone = {d % len(value.kinds) for d in eqn.params["dimensions"]}
    kept = [d for d in range(len(value.kinds)) if d not in gone]
    return Value(
        tuple(value.kinds[d] for d in kept), value.items.reshape([value.items.shape[d] for d in kept])
    )


def _transpose(space: Space, eqn, value: Value) -> Value:
    order = eqn.params["permutation"]
    return Value(tuple(value.kinds[d] for d in order), value.items.transpose(order))


def _narrow_axis(value: Value, d: int, size: int) -> np.ndarray:
    """The items with the narrow axis d repeated to its full length if it is broadcast."""
    if value.kinds[d] is not None:
        raise Unsupported("it cuts or joins a tile's rows or columns")
    if value.items.shape[d] == size:
        return value.items
    if size > LONGEST:
        raise Unsupported(f"it cuts or joins an axis of {size} entries, more than {LONGEST}")
    return np.repeat(value.items, size, axis=d)


def _slice(space: Space, eqn, value: Value) -> Value:
    starts, limits, shape = eqn.params["start_indices"], eqn.params["limit_indices"], eqn.invars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * len(shape)
    items = value.items
    for d, cut in enumerate(zip(starts, limits, strides)):
        if cut == (0, shape[d], 1) or (value.kinds[d] is None and items.shape[d] == 1):
            continue
        items = _narrow_axis(Value(value.kinds, items), d, shape[d])
        items = items[(slice(None),) * d + (slice(*cut),)]
    return Value(value.kinds, items)


def _split(space: Space, eqn, value: Value) -> list:
    d = eqn.params["axis"]
    items = _narrow_axis(value, d, eqn.invars[0].aval.shape[d])
    bounds = np.cumsum(eqn.params["sizes"])[:-1]
    return [Value(value.kinds, part) for part in np.split(items, bounds, axis=d)]


def _rev(space: Space, eqn, value: Value) -> Value:
    for d in eqn.params["dimensions"]:
        _narrow_axis(value, d, eqn.invars[0].aval.shape[d])
    return Value(value.kinds, np.flip(value.items, eqn.params["dimensions"]))


def _concatenate(space: Space, eqn, *values: Value) -> Value:
    d = eqn.params["dimension"]
    kinds = _join(values)
    if kinds[d] is not None:
        raise Unsupported("it joins a tile's rows or columns")
    parts = [_narrow_axis(v, d, var.aval.shape[d]) for v, var in zip(values, eqn.invars)]
    shape = np.broadcast_shapes(*(p.shape[:d] + p.shape[d + 1 :] for p in parts))
    parts = [np.broadcast_to(p, (*shape[:d], p.shape[d], *shape[d:])) for p in parts]
    return Value(kinds, np.concatenate(parts, axis=d))


def _stack(space: Space, eqn, *values: Value) -> Value:
    d = eqn.params["axis"] % (len(values[0].kinds) + 1)
    kinds = _join(values)
    parts = np.broadcast_arrays(*(v.items for v in values))
    return Value((*kinds[:d], None, *kinds[d:]), np.stack(parts, axis=d))


def _unstack(space: Space, eqn, value: Value) -> list:
    d = eqn.params["axis"]
    items = _narrow_axis(value, d, eqn.invars[0].aval.shape[d])
    return [Value(value.kinds[:d] + value.kinds[d + 1 :], part) for part in np.moveaxis(items, d, 0)]


def _pad(space: Space, eqn, value: Value, fill: Value) -> Value:
    items = value.items
    for d, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        if (low, high, inner) != (0, 0, 0):
            items = _narrow_axis(Value(value.kinds, items), d, eqn.invars[0].aval.shape[d])
            n = items.shape[d]
            at = low + np.arange(n) * (inner + 1)
            kept = (at >= 0) & (at < (size := eqn.outvars[0].aval.shape[d]))
            wider = np.empty((*items.shape[:d], size, *items.shape[d + 1 :]), object)
            wider[...] = fill.items.reshape((1,) * items.ndim)
            wider[(slice(None),) * d + (at[kept],)] = items[(slice(None),) * d + (kept,)]
            items = wider
    return Value(value.kinds, items)


def _iota(space: Space, eqn) -> Value:
    shape, d, dtype = (eqn.params[name] for name in ("shape", "dimension", "dtype"))
    if shape[d] > LONGEST:
        letters = [letter for letter, n in space.traced.items() if n == shape[d]]
        if len(letters) != 1:
            raise Unsupported("it has an iota along an axis that is not one of the tile's")
        value = space.iota(letters[0], 0, dtype)
        kinds = tuple(letters[0] if i == d else None for i in range(len(shape)))
        return Value(kinds, value.items.reshape((1,) * len(shape)))
    items = np.empty([shape[i] if i == d else 1 for i in range(len(shape))], object)
    for i, at in enumerate(np.ndindex(items.shape)):
        items[at] = Item("", np.asarray(i, held(dtype)))
    return Value((None,) * len(shape), items)


# The longest narrow axis: every entry is an array, so that the size of the program grows with it.
LONGEST = 64


# For each reduction: how it combines two arrays, and what it gives for n equal ones.
_COMBINE = {
    "reduce_sum": (lax.add, lambda x, n: x * _fill(x, n)),
    "reduce_prod": (lax.mul, lambda x, n: _integer_pow(x, y=n)),
    "reduce_max": (lax.max, lambda x, n: x),
    "reduce_min": (lax.min, lambda x, n: x),
    "reduce_or": (lax.bitwise_or, lambda x, n: x),
    "reduce_and": (lax.bitwise_and, lambda x, n: x),
}


def _reduce(space: Space, eqn, value: Value) -> Value:
    shape = eqn.invars[0].aval.shape
    return _reduced(space, eqn.primitive.name, value, sorted(eqn.params["axes"], reverse=True), shape)


def _reduced(space: Space, name: str, value: Value, axes: list[int], shape: tuple[int, ...]) -> Value:
    """Reduces over axes, given in descending order."""
    combine, repeat = _COMBINE[name]
    for d in axes:
        kind, items = value.kinds[d], value.items
        if kind is None and items.shape[d] > 1:
            parts = [items.take(i, axis=d) for i in range(items.shape[d])]
            kinds = value.kinds[:d] + value.kinds[d + 1 :]
            value = functools.reduce(
                lambda a, b: _map(space, combine, a, b), [Value(kinds, p) for p in parts]
            )
        else:
            n = space.sizes[kind] if kind is not None else space.actual(shape[d])
            kinds = value.kinds[:d] + value.kinds[d + 1 :]
            others = shape[:d] + shape[d + 1 :]
            out = np.empty(items.shape[:d] + items.shape[d + 1 :], object)
            for at in np.ndindex(out.shape):
                item = items[(*at[:d], 0, *at[d:])]
                if kind in ("r", "c") and item.dims == kind:
                    # A count of columns is one number for all rows: every row computes it.
                    item, kinds = _along_the_other(space, item, kinds, others)
                out[at] = _reduced_item(space, name, item, kind, functools.partial(repeat, n=n))
            value, shape = Value(kinds, out), others
    return value


def _along_the_other(space: Space, item: Item, kinds: tuple, shape: tuple[int, ...]) -> tuple[Item, tuple]:
    """An item over one axis of a tile, repeated along the other one, if an axis of the value stands for that."""
    (letter,) = set("rc") - set(item.dims)
    for d, (kind, size) in enumerate(zip(kinds, shape)):
        if kind in (None, letter) and size == space.traced[letter]:
            dims = space.union(item.dims, letter)
            return Item(dims, space.spread(item, dims)), (*kinds[:d], letter, *kinds[d + 1 :])
    return item, kinds


def _reduced_item(space: Space, name: str, item: Item, kind: str | None, repeat: Callable) -> Item:
    """Reduces one item over the axis `kind`, along which it may be constant (`repeat`)."""
    item = Item(item.dims, space.spread(item, item.dims))
    if kind is None or kind not in item.dims:
        return Item(item.dims, repeat(jnp.asarray(item.x)))
    if kind not in "rc" and space.sizes[kind] != space.traced[kind]:
        raise Unsupported(f"it sums over {space.traced[kind]} features, which is no multiple of 64")
    axis = item.dims.index(kind)
    space.crosses_warps |= axis == 0
    dims = item.dims.replace(kind, "")
    if not dims:
        raise Unsupported("it reduces a whole tile to one number")
    x = item.x
    if name in ("reduce_or", "reduce_and"):
        x = convert(x, new_dtype=jnp.int32)
        x = (jnp.max if name == "reduce_or" else jnp.min)(x, axis=axis)
        return Item(dims, x != _fill(x, 0))
    function = {"sum": jnp.sum, "prod": None, "max": jnp.max, "min": jnp.min}[name.removeprefix("reduce_")]
    if function is None:
        raise Unsupported("Mosaic GPU has no rule for reduce_prod over a tile")
    return Item(dims, lax.convert_element_type(function(x, axis=axis), x.dtype))


def _dot_general(space: Space, eqn, a: Value, b: Value) -> Value:
    """`space.product` if one wide axis is contracted and the result is a tile, else a sum of elementwise products."""
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    shape_a, shape_b = (v.aval.shape for v in eqn.invars)
    free_a = [d for d in range(len(a.kinds)) if d not in (*contract_a, *batch_a)]
    free_b = [d for d in range(len(b.kinds)) if d not in (*contract_b, *batch_b)]
    letters = "".join(k for k in (*(a.kinds[d] for d in free_a), *(b.kinds[d] for d in free_b)) if k)
    if len(contract_a) == 1 and not batch_a and len(free_a) == len(free_b) == 1 and len(set(letters)) == 2:
        kind = a.kinds[contract_a[0]] or b.kinds[contract_b[0]]
        if kind is not None and a.items.size == b.items.size == 1:
            dtypes = [v.aval.dtype for v in eqn.invars]
            if not any(dtype in HALF for dtype in dtypes):
                raise Unsupported(f"matrix products are in bfloat16 or float16, not in {dtypes[1]}")
            left, right = (v.items.ravel()[0] for v in (a, b))
            return single(letters, space.product(left, right, kind, letters))
    # Axes in the order: batch, free of a, free of b, contracted.
    n_batch, n_a, n_b = len(batch_a), len(free_a), len(free_b)

    def aligned(value: Value, order: list[int], before: int, after: int, shape) -> tuple[Value, tuple]:
        gap = n_batch + before
        kinds = [value.kinds[d] for d in order]
        items = value.items.transpose(order)
        sizes = [shape[d] for d in order]
        kinds[gap:gap], sizes[gap:gap] = [None] * after, [1] * after
        return Value(
            tuple(kinds), items.reshape([*items.shape[:gap], *[1] * after, *items.shape[gap:]])
        ), tuple(sizes)

    left, left_shape = aligned(a, [*batch_a, *free_a, *contract_a], n_a, n_b, shape_a)
    right, right_shape = aligned(b, [*batch_b, *free_b, *contract_b], 0, n_a, shape_b)
    shape = np.broadcast_shapes(left_shape, right_shape)

    def multiply(x, y):
        return cast(x, jnp.float32) * cast(y, jnp.float32)

    product = _map(space, multiply, left, right)
    last = list(range(n_batch + n_a + n_b, len(shape)))[::-1]
    total = _reduced(space, "reduce_sum", product, last, shape)
    return _map(space, functools.partial(convert, new_dtype=eqn.outvars[0].aval.dtype), total)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(space: Space, eqn, *values: Value) -> list:
    """Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), 20 rounds."""

    def rotate(x, by: int):
        return (x << np.uint32(by)) | lax.shift_right_logical(x, _fill(x, 32 - by))

    def word(k0, k1, x0, x1, which: int):
        keys = (k0, k1, k0 ^ k1 ^ _fill(k0, np.uint32(0x1BD11BDA)))
        x0, x1 = x0 + keys[0], x1 + keys[1]
        for i in range(5):
            for by in _ROTATIONS[i % 2]:
                x0 = x0 + x1
                x1 = rotate(x1, by) ^ x0
            x0 = x0 + keys[(i + 1) % 3]
            x1 = x1 + keys[(i + 2) % 3] + _fill(x1, np.uint32(i + 1))
        return (x0, x1)[which]

    return [_map(space, functools.partial(word, which=which), *values) for which in range(2)]


def _scan(space: Space, eqn, *values: Value) -> list:
    """Unrolls a short loop without scanned inputs and outputs."""
    length, jaxpr = eqn.params["length"], eqn.params["jaxpr"]
    n_carry = len(eqn.outvars)
    n_consts = len(values) - n_carry
    if not isinstance(length, int) or length > LONGEST or len(jaxpr.in_avals) != len(values) or n_consts < 0:
        raise Unsupported("it has a long loop, or one that does more than update a carry")
    if [a.shape for a in jaxpr.in_avals[n_consts:]] != [a.shape for a in jaxpr.out_avals]:
        raise Unsupported("it has a loop whose carry changes its shape")
    consts, carry = list(values[:n_consts]), list(values[n_consts:])
    body = flat(jaxpr)
    for _ in range(length):
        carry = evaluate(space, body, [*consts, *carry])
    return carry


def _argument(space: Space, eqn, *values: Value) -> list:
    return list(values)


_RULES: dict[str, Callable] = {
    "add": _add,
    "add_any": _add,
    "div": _div,
    "select_n": _select_n,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "slice": _slice,
    "split": _split,
    "rev": _rev,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "pad": _pad,
    "iota": _iota,
    "dot_general": _dot_general,
    "scan": _scan,
    "threefry2x32": _threefry,
    **dict.fromkeys(
        ("copy", "copy_p", "optimization_barrier", "stop_gradient", "reshard", "sharding_constraint"),
        _argument,
    ),
    **dict.fromkeys(_COMBINE, _reduce),
}

# Functions whose calls are elementwise operations.
_NAMED = ("exp_difference",)

# Calls that are evaluated in place, with the name of the parameter that has their jaxpr.
_INLINED = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
