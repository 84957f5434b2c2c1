"""The update of `quantize_state` in pieces: float32 moments exist for one piece of one leaf at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsoft.optimizers import _codes, _common
from jaxsoft.optimizers._moments import Format, Run, is_entrywise, is_quantized, paths


def update_in_pieces(
    format: Format, run: Run, g: Any, old: Any, params: Any, key: jax.Array | None, chunk_size: int
) -> tuple[Any, Any]:
    """The updates and the new inner state: parameters with 8-bit moments in pieces, the others together."""
    places = paths(g)
    large = {format.locate(path, x, places)[1] for path, x in paths(old).items() if is_quantized(x)}

    def part(keep: Callable[[Any], bool]) -> tuple[Any, Any, Any]:
        """Gradients, state and parameters, with all parameters masked except for those to keep."""

        def alone(x, _, place):
            return x if place is None or keep(place) else optax.MaskedNode()

        return format.map(alone, g, places), format.map(alone, old, places), format.map(alone, params, places)

    results = []
    for number, place in enumerate(place for place in places if place in large):
        one = part(lambda other, place=place: other == place)
        results.append(_update_leaf(format, run, *one, _common.fold(key, number), chunk_size))
    results.append(run(*part(lambda place: place not in large)))
    updates = {path: x for u, _ in results for path, x in paths(u).items()}
    leaves = {path: x for _, new in results for path, x in paths(new).items()}
    return (
        jax.tree_util.tree_map_with_path(lambda path, _: updates[path], g),
        jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], old, is_leaf=is_quantized),
    )


def _update_leaf(
    format: Format, run: Run, g: Any, old: Any, params: Any, key: jax.Array | None, chunk_size: int
) -> tuple[Any, Any]:
    """The update of the only leaf of `g`, and the state with its new moments."""
    ((place, leaf),) = paths(g).items()
    cut = _Cut.of(leaf, format.block_size, chunk_size)
    items, treedef = jax.tree_util.tree_flatten_with_path(old, is_leaf=is_quantized)
    located = [format.locate(path, x, {place: leaf}) for path, x in items]
    signed = {i: signed for i, (signed, owner) in enumerate(located) if owner == place}
    old_leaves = [x for _, x in items]
    moments = {i: old_leaves[i] for i in signed}

    def merge(moments):
        """The state with moments `{index of the leaf: array}`."""
        return treedef.unflatten([moments.get(i, x) for i, x in enumerate(old_leaves)])

    def step(g, p, moments):
        u, new = run(g, merge(moments), p)
        new = jax.tree.leaves(new)
        return _common.cast_like(u, g), {i: new[i] for i in moments}

    def read(moments):
        return {i: format.decode(cut.in_rows(x), signed[i]).reshape(-1) for i, x in moments.items()}

    def write(values, like, key):
        def one(i, x):
            if not is_quantized(like[i]):
                return x.astype(like[i].dtype)
            return _flat(format.encode(cut.in_rows(x), signed[i], _common.fold(key, i)))

        return {i: one(i, x) for i, x in values.items()}

    def piece(whole, start, first):
        """The update and the new moments of the piece at unit `start`."""
        g, moments = cut.take(whole, start, first)
        u, new = step(g, cut.take(flat_params, start, first), read(moments))
        return u, write(new, moments, _common.fold(key, start))

    for x in moments.values():
        if not is_quantized(x) and jnp.shape(x) != leaf.shape:
            raise ValueError(
                f"chunk_size needs an inner transformation whose states have the shape {leaf.shape} of "
                f"their parameter, got one of shape {jnp.shape(x)}"
            )
    flat_params, whole = _flat(params), _flat((g, moments))
    if not is_entrywise(jax.make_jaxpr(step)(whole[0], flat_params, jax.eval_shape(read, whole[1])).jaxpr):
        raise ValueError(
            "chunk_size needs an inner transformation that treats each entry alone, got one that mixes the "
            "entries of a leaf (a norm, say): leave chunk_size out"
        )
    full, rest = divmod(leaf.size, cut.units * cut.entries)
    whole = _sweep(cut, piece, whole, 0, full)  # the update is written over the gradient
    if rest:
        whole = _sweep(cut, piece, whole, full * cut.units, 1)
    u, new = jax.tree.map(lambda x, like: x.reshape(like.shape), whole, (g, moments))
    u, new = _common.placed_like((u, new), (g, moments))
    return u, merge(new)


def _flat(tree: Any) -> Any:
    return jax.tree.map(lambda x: _common.whole(x).reshape(-1), tree)


class _Cut(NamedTuple):
    """How a flat leaf is cut into pieces of `units` units.

    A unit is a block of the flat leaf, or a row if rows do not hold whole blocks. It has `entries` entries and
    `scales` scales.
    """

    size: int
    ragged: bool
    entries: int
    scales: int
    units: int

    @classmethod
    def of(cls, leaf: jax.Array, block_size: int, chunk_size: int) -> _Cut:
        """Pieces of about `chunk_size` entries."""
        layout = _codes.layout_of(leaf.shape, block_size)
        ragged = layout.length < layout.blocks * layout.width and leaf.size > layout.length
        entries, scales = (layout.length, layout.blocks) if ragged else (layout.width, 1)
        return cls(leaf.size, ragged, entries, scales, max(min(chunk_size, leaf.size) // entries, 1))

    def _width(self, x: jax.Array) -> int:
        return self.entries if x.size == self.size else self.scales

    def take(self, tree: Any, start: Any, first: int) -> Any:
        """The piece at unit `start`, as long as the one at unit `first`: the last piece may be shorter."""

        def one(x):
            length = min(self.units * self._width(x), x.size - first * self._width(x))
            return lax.dynamic_slice_in_dim(x, start * self._width(x), length)

        return jax.tree.map(one, tree)

    def put(self, tree: Any, piece: Any, start: Any) -> Any:
        """The arrays with the piece written at unit `start`."""
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start * self._width(x), axis=0), tree, piece
        )

    def in_rows(self, x: Any) -> Any:
        """A piece in a shape with the same blocks as the leaf; of a moment in 8 bits the codes."""
        if is_quantized(x):
            return x._replace(codes=self.in_rows(x.codes))
        return x.reshape((-1, self.entries) if self.ragged else -1)


def _sweep(cut: _Cut, piece: Callable[..., Any], whole: Any, first: int, count: int) -> Any:
    """Replaces `count` pieces from unit `first` on, and writes each one turn after it was computed.

    This orders the reads of a piece before its write. Otherwise the compiler copies the whole arrays; and on a CPU it
    computes on a single core what it writes in place.
    """

    def start(i):
        return first if count == 1 else first + i * cut.units  # a constant saves operations

    def turn(i, state):
        whole, last = state
        whole = cut.put(whole, last, start(jnp.maximum(i - 1, 0)))
        return whole, lax.cond(i < count, lambda: piece(whole, start(i), first), lambda: last)

    return lax.fori_loop(0, count + 1, turn, (whole, cut.take(whole, first, first)))[0]
