"""`reduce_rows`: row reductions over logits of any kind, in XLA or in a kernel."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxsoft import _checks
from jaxsoft._trees import is_partitioned
from jaxsoft.kernels.inner import Kernel, attach, choose, compiled
from jaxsoft.rows import _sweeps
from jaxsoft.rows._filter import filtered
from jaxsoft.rows._layout import Layout, layout_of, on_mesh, with_padding
from jaxsoft.rows._logits import LinearLogits, Logits, StoredLogits, check_axis, rows_of
from jaxsoft.rows._masks import Masks, split_mask
from jaxsoft.rows._pass import align, closed_form, entries, finish, finished_states, mask_rows, tangents
from jaxsoft.rows._reduction import Arrays, RowReduction, arrays_of, is_reduction
from jaxsoft.rows._source import Source


def reduce_rows(
    logits: Logits,
    reductions: Any,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    row_where: Bool[Array, "*rows"] | None = None,
    block_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """Runs one or several row reductions over the rows of `logits`, in one pass.

    Args:
      logits: `[*rows, columns]` scores: a floating array of any dtype, or a `LinearLogits`.
      reductions: a `RowReduction`, or any pytree (dict, tuple, ...) of them.
      axis: the axis that holds a row; the last one for a `LinearLogits`.
      where: booleans that broadcast to the shape of the logits, True = counts. A masked entry is absent: it adds
        nothing and gets no gradient, even if it is NaN. (A NaN inside `weight` has no effect only if its column is
        masked for all rows.) An entry of `-inf` is also absent.
      row_where: `[*rows]` booleans, False = the whole row is absent. Combined with a `where` that varies over
        columns, it saves a mask of the logits' shape.
      block_size: columns read at a time. Default: all columns of an array, the expression's own choice for a
        `LinearLogits`. Kernels have their own block sizes.
      implementation: `"xla"`, or the kernels `"pallas_tpu"` or `"mosaic_gpu"`. None: the expression's own, else the
        best one that can run the case (`jaxsoft.kernels.explain` says which, and why). All have the same
        derivatives: of kernels, ordinary operations compute forward mode and higher orders.

    Returns:
      The results in the structure of `reductions`, each of shape `[*rows]` (or `[*rows, k]`), in float32 for
      half-precision logits.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or size; an `implementation` that cannot run the case.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.rows import reduce_rows, reductions
      >>> x = jnp.array([[1.0, 2.0, -1.0, 0.5]])
      >>> out = reduce_rows(x, {"lse": reductions.logsumexp(), "best": reductions.argmax()})
      >>> print(out["lse"].round(4), out["best"])
      [2.4952] [1]
    """
    leaves, treedef = jax.tree.flatten(reductions, is_leaf=is_reduction)
    for leaf in leaves:
        if not is_reduction(leaf):
            raise TypeError(f"reductions must be a tree of RowReduction, got {_checks.describe(leaf)} in it")
    if block_size is not None:
        block_size = _checks.integer("block_size", block_size, at_least=1)
    axis = check_axis(logits, axis)
    rows, columns = rows_of(logits.shape, axis), logits.shape[axis]
    masks = split_mask(where, logits.shape, axis)
    if row_where is not None:
        _checks.boolean("row_where", row_where)
        _checks.shape("row_where", row_where, rows, "one boolean per row of logits")
        masks = masks._replace(rows=row_where if masks.rows is None else masks.rows & row_where)
    arrays = [arrays_of(r, rows, columns) for r in leaves]
    functions = tuple(r._replace(args=(), col_args=(), entry_args=()) for r in leaves)
    source = as_source(logits, axis)
    others = [e for e in entries(arrays) if isinstance(e, LinearLogits)]
    if source.filter_eps is not None and others:
        raise ValueError("filter_eps must be None when two linear_logits are read in one pass")
    call = _Pass(functions, block_size, implementation or source.implementation)
    layout = layout_of(source, others)
    if layout is not None:
        results = _on_mesh(call, layout, source, masks, arrays)
    else:
        results = call(source, *of_shard(source, masks, arrays))
    return jax.tree.unflatten(treedef, results)


def as_source(logits: Logits, axis: int) -> Source:
    """The rows of logits, with their leading axes; the axis of a row is counted from the front."""
    if isinstance(logits, Source):
        return logits
    return StoredLogits(jnp.moveaxis(jnp.asarray(logits), axis, -1))


class _Pass(NamedTuple):
    """A pass over logits of any leading axes, on one device. Static."""

    functions: tuple[RowReduction, ...]
    block_size: int | None
    implementation: str | None

    def __call__(self, source: Source, masks: Masks, arrays: list[Arrays]) -> list:
        """The results, `[*rows, ...]`."""
        rows = source.shape[:-1]
        # The rows are flattened: on a CPU, XLA fuses reductions over arrays of two axes better than of more.
        n = math.prod(rows)

        def flat(a):
            if isinstance(a, LinearLogits):
                return a._flat()
            return None if a is None else a.reshape(n, *a.shape[len(rows) :])

        source = source._flat()
        masks = with_present(source, masks)
        masks = Masks(flat(masks.rows), masks.cols, flat(masks.entries))
        arrays = [
            Arrays(jax.tree.map(flat, a.args), a.col_args, tuple(map(flat, a.entry_args))) for a in arrays
        ]
        sources: list[Source] = [source, *(e for e in entries(arrays) if isinstance(e, LinearLogits))]
        block_size = self.block_size
        if block_size is None:
            products = sum(isinstance(a, LinearLogits) for a in sources)
            block_size = min(a.block_size or a._default_block_size(n * products) for a in sources)
        block = max(min(block_size, source._width), 1)
        kernel = choose_kernel(self.implementation, self.functions, source, masks, arrays)
        run_here = run if source.tape is None else source.tape.run
        results = run_here(source, self.functions, block, masks, arrays, kernel)
        return jax.tree.map(lambda a: a.reshape(*rows, *a.shape[1:]), results)


@functools.partial(compiled, static_argnums=(0, 1))
def _on_mesh(call: _Pass, layout: Layout, source: Source, masks: Masks, arrays: list[Arrays]) -> list:
    """The results of a pass over logits that lie on a mesh."""
    total = source.shape[-1]
    source, masks, arrays = with_padding(layout, source, masks, arrays)
    specs = (layout.of_source(source, 0), layout.of_masks(masks), layout.of_arrays(arrays))

    def here(source, masks, arrays):
        return call(*layout.localized(total, source, masks, arrays))

    results = on_mesh(layout.mesh, here, specs, (source, masks, arrays), layout.by_row())
    return jax.tree.map(layout.restore, results)


def with_present(source: Source, masks: Masks) -> Masks:
    """The masks, without the columns that were appended to give every device equally many."""
    present = None if source.shards is None else source.shards.present(source._width)
    if present is None:
        return masks
    return masks._replace(cols=present if masks.cols is None else masks.cols & present)


def of_shard(source: Source, masks: Masks, arrays: list[Arrays]) -> tuple[Masks, list[Arrays]]:
    """Masks and arrays of this shard's columns, from those of all columns."""
    shards, width = source.shards, source._width

    def cut(a: Any, axis: int) -> Any:
        if isinstance(a, Source):
            axes, others = (() if s is None else s.columns for s in (shards, a.shards))
            if axes != others:
                raise ValueError(
                    "two rows of logits must have their columns on the same axes of the mesh: give both the same "
                    f"axis_name, got {axes} and {others}"
                )
            return a.values if isinstance(a, StoredLogits) else a
        return a if shards is None else shards.cut(a, axis % a.ndim, width)

    masks = Masks(masks.rows, *(None if a is None else cut(a, -1) for a in masks[1:]))
    return masks, [
        Arrays(a.args, tuple(cut(c, 0) for c in a.col_args), tuple(cut(e, -1) for e in a.entry_args))
        for a in arrays
    ]


def choose_kernel(
    implementation: str | None, functions, source: Source, masks: Masks, arrays: list[Arrays]
) -> Kernel | None:
    """The kernel backend that runs these reductions, None for XLA; raises if the requested one cannot run them."""

    def refusal(backend, kernel: Kernel) -> str | None:
        return _sweeps.refusal(backend, kernel, functions, source, masks, arrays)

    return choose(
        f"reductions of {source.kind} rows{_where(source)}", implementation, source._work(), refusal
    )


def _where(source: Source) -> str:
    """Where the rows lie, for `explain`."""
    if source.shards is not None and source.shards.columns:
        return f" whose columns are sharded over {', '.join(source.shards.columns)}"
    if source.shards is None and any(map(is_partitioned, jax.tree.leaves(source))):
        return " placed by the compiler, which may gather them block by block (say where they lie: jaxsoft.shardings)"
    return ""


@functools.partial(jax.jit, static_argnums=(1, 2, 5))
def run(
    source: Source,
    functions: tuple[RowReduction, ...],
    block: int,
    masks: Masks,
    arrays: list[Arrays],
    kernel: Kernel | None = None,
) -> list:
    """The results of reductions over a flat source; their arrays are passed separately from their functions."""
    # Of whole rows: equal on all devices that share them
    args = [a.args for a in arrays]
    if source.filter_eps is not None and isinstance(source, LinearLogits):
        source = source._with_all_features()
    source, masks, arrays = align(source, masks, arrays)
    source, arrays = mask_rows(source, masks, arrays)
    results: dict[int, Any] = {}
    for i, r in enumerate(functions):
        state = closed_form(r, source, masks, arrays[i])
        if state is not None:
            results[i] = finish((r,), [state], source, [args[i]])[0]
    streamed = [i for i in range(len(functions)) if i not in results]
    if streamed:
        some, some_arrays = tuple(functions[i] for i in streamed), [arrays[i] for i in streamed]
        some_args = [args[i] for i in streamed]
        if source.filter_eps is None:
            states = stream(some, block, source, masks, some_arrays, kernel)
            finals = finish(some, states, source, some_args)
        else:
            finals: Any = filtered(some, block, kernel, source, masks, some_arrays, some_args)
        results |= dict(zip(streamed, finals))
    return [results[i] for i in range(len(functions))]


def stream(
    functions, block: int, source: Source, masks: Masks, arrays: list[Arrays], kernel: Kernel | None
) -> list:
    """The finished states of the reductions, with their derivatives attached."""
    if kernel is not None:
        return _sweeps.stream(kernel, functions, block, source, masks, arrays)
    states = finished_states(functions, block, *lax.stop_gradient((source, masks, arrays)))
    return attach(functools.partial(tangents, functions, block), None, states, masks, (source, arrays))
