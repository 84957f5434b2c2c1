"""Attention over arrays that lie on a mesh: each device attends with its own batch elements, heads and queries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxsoft.rows.inner import compiled, on_mesh, placed, shard_count

Axes = tuple[str, ...]


class Layout(NamedTuple):
    """The mesh axes over which the arrays of an attention are sharded. Static.

    Attributes:
      mesh: the mesh.
      batch: the axes of each leading axis.
      heads: those of the heads of queries and keys.
      queries: those of the queries' positions.
      keys: those of the keys' positions: those of the queries (a ring), or in decoding any.
      repeat: copies of each key head, where there are fewer key heads than devices along `heads`.
    """

    mesh: Any
    batch: tuple[Axes, ...]
    heads: Axes
    queries: Axes
    keys: Axes
    repeat: int

    def spec(self, name: str, a: Any) -> P:
        """The spec of an argument."""
        kinds = _ARGUMENTS.get(name, ("heads",) if getattr(a, "ndim", 0) == 1 else _SCORES[:-1])
        axes = {"heads": self.heads, "queries": self.queries, "keys": self.keys, None: ()}
        sizes: list[Axes] = []
        for kind in kinds:
            sizes += self.batch if kind == "batch" else [axes[kind]]
        # Arguments that broadcast may lack leading axes, and have axes of size 1.
        sizes = sizes[len(sizes) - a.ndim :] if a.ndim < len(sizes) else sizes
        if name in ("bias", "mask"):
            sizes[-1] = ()
        return P(*(None if n == 1 else (entry or None) for n, entry in zip(a.shape, sizes)))


_SCORES = ("batch", "heads", "queries", "keys")
# What the axes of each argument are; those of a normalizer's options are one number per head, or per row of scores.
_ARGUMENTS: dict[str, tuple[str | None, ...]] = {
    "query": ("batch", "queries", "heads", None),
    "key": ("batch", "keys", "heads", None),
    "value": ("batch", "keys", "heads", None),
    "key_cache": ("batch", "keys", "heads", None),
    "value_cache": ("batch", "keys", "heads", None),
    "bias": _SCORES,
    "mask": _SCORES,
    "scale": ("heads",),
    "alibi_slopes": ("heads",),
    "sinks": ("heads",),
    "query_seq_lengths": ("batch",),
    "key_value_seq_lengths": ("batch",),
    "query_offset": ("batch",),
    "lengths": ("batch",),
    "query_segment_ids": ("batch", "queries"),
    "key_segment_ids": ("batch", "keys"),
    "query_positions": ("batch", "queries"),
    "key_positions": ("batch", "keys"),
    "dropout_key": (),
}


def layout_of(query: Any, key: Any, *, decoding: bool = False, dropout: bool = False) -> Layout | None:
    """Where the arrays of an attention lie; None on one device, inside `shard_map`, or if nothing is known.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`.
      decoding: whether all devices along the keys' positions are to have the queries.
      dropout: whether weights are dropped: random numbers depend on the index of a row among all, which no device
        knows, so the compiler must place the rows.
    """
    if dropout or not all(hasattr(a, "ndim") and a.ndim >= 3 for a in (query, key)):
        return None
    of_query, of_key = placed("query", query, near=(key,)), placed("key", key, near=(query,))
    known = of_query or of_key
    if known is None:
        return None
    *batch, queries, heads, _ = known.axes
    keys = () if of_key is None else of_key.axes[-3]
    if of_query is None:
        queries = ()
    taken = {name for entry in (*batch, heads) for name in entry}
    keys = tuple(name for name in keys if name not in taken)
    if decoding:
        queries = tuple(name for name in queries if name not in keys)
    elif keys != queries:
        keys = ()  # gathered
    devices = shard_count(heads, known.mesh)
    for name, size, axes in (("query", query.shape[-3], queries), ("key", key.shape[-3], keys)):
        if size % shard_count(axes, known.mesh):
            devices = shard_count(axes, known.mesh)
            raise ValueError(
                f"{name} must have a length that its {devices} devices along {axes} divide, got {size}"
            )
    key_heads = key.shape[-2]
    repeat = 1 if key_heads % devices == 0 else query.shape[-2] // key_heads
    return Layout(known.mesh, tuple(batch), heads, queries, keys, repeat)


def attend_on_mesh(function: Callable, layout: Layout, arguments: dict[str, Any]) -> Any:
    """`function(**arguments)` on a mesh; its results are `[*batch, T, N, ...]`."""
    normalizer, options = arguments.pop("normalizer"), {}
    while isinstance(normalizer, functools.partial) and not normalizer.args:
        normalizer, options = normalizer.func, {**normalizer.keywords, **options}
    groups = [{}, {}]
    static: list[tuple] = []
    for given, group in zip((arguments, options), groups):
        group |= {k: a for k, a in given.items() if hasattr(a, "shape") and hasattr(a, "dtype")}
        static.append(tuple((k, a) for k, a in given.items() if k not in group))
    return _run(function, layout, normalizer, static[0], static[1], *groups)


@functools.partial(compiled, static_argnums=(0, 1, 2, 3, 4))
def _run(function, layout: Layout, normalizer, static, static_options, arrays: dict, options: dict):
    names = [name for name in ("key", "value", "key_cache", "value_cache") if name in arrays]
    if layout.repeat > 1:
        arrays = {**arrays, **{name: jnp.repeat(arrays[name], layout.repeat, axis=-2) for name in names}}
    specs = [
        {k: layout.spec(k if group is arrays else "", a) for k, a in group.items()}
        for group in (arrays, options)
    ]
    arguments = dict(static)
    decoding = "key_cache" in arrays
    if layout.keys and (decoding or layout.queries):
        arguments["axis_name"] = layout.keys

    def here(arrays, options):
        arrays = dict(arrays)
        if layout.queries and not layout.keys and "query_positions" not in arrays:
            # All keys are here: only the positions of the queries move.
            first = lax.axis_index(layout.queries).astype(jnp.int32) * arrays["query"].shape[-3]
            given = {**arguments, **arrays}
            arrays["query_offset"] = given.get("query_offset", 0) + first
            if given.get("query_seq_lengths") is not None:
                arrays["query_seq_lengths"] = given["query_seq_lengths"] - first
        whole = normalizer
        if static_options or options:
            whole = functools.partial(normalizer, **dict(static_options), **options)
        rest = {k: a for k, a in arguments.items() if k not in arrays}
        return function(**rest, **arrays, normalizer=whole)

    results = P(*(b or None for b in layout.batch), layout.queries or None, layout.heads or None)
    return on_mesh(layout.mesh, here, tuple(specs), (arrays, options), results)
