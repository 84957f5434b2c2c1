"""What an entry of the conformance table is, and the inputs of its small example.

`call(logits, inputs, where=None, axis=-1)` runs the function; `inputs` is what `make_inputs` makes. Options that
change the formula are entries of their own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxsoft


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public function with a variant of its options.

    Attributes:
      export: the public name, e.g. `jaxsoft.losses.cross_entropy`.
      call: `(logits, inputs, *, where=None, axis=-1) -> array or tuple`.
      variant: what distinguishes it from the other entries of the same export.
      inputs: names of the inputs it reads besides the logits (keys of `make_inputs`).
      dense_only: whether it returns something of the logits' shape, so that it refuses expressions.
      shift: by how much its float results grow when 1 is added to every logit (None: not a law).
      scale_invariant: whether logits times a positive number give the same.
      permutes: whether columns in another order give the same (noise is drawn by column).
      jumps: whether it jumps where scores are equal, or where too many are the largest.
      where: whether it takes a mask.
      least_columns: the shortest row that its options allow.
      empty: its float results for a row without entries (None: not a law).
      differentiable: whether there is a gradient to test.
      second_order: whether its second derivatives are tested.
      low: tolerance, relative to max(1, |result|), of half-precision logits against float64 on the same numbers.
      huge: tolerance, relative to max(1, |result|), at logits of +-1e4: the losses that add up logits are exact
        to a unit in the last place of the logits only.
      loss: whether it takes labels, weights and ignore_index as losses do.
      thorough: whether the laws of the engine (block sizes, layouts, shards, the gradient in the forward pass) run in
        all their variants, or in one: enough for a function of reductions that other entries try.
      rank: what the covering design (`tests/design.py`) takes it for; the table sets it.
      constants: inputs that are constants to the gradient.
      function: the function itself, its options, and which of its options are inputs (by the inputs' names), of a loss.
      options: see `function`.
      arrays: see `function`.
    """

    export: str
    call: Callable[..., Any]
    variant: str = ""
    inputs: tuple[str, ...] = ()
    dense_only: bool = False
    shift: float | None = None
    scale_invariant: bool = False
    permutes: bool = True
    jumps: bool = False
    where: bool = True
    least_columns: int = 0
    empty: float | None = 0.0
    differentiable: bool = True
    second_order: bool = True
    low: float = 3e-6
    huge: float = 3e-6
    loss: bool = False
    thorough: bool = False
    rank: str = "export"
    constants: tuple[str, ...] = ()
    function: Any = None
    options: Any = None
    arrays: Any = None

    @property
    def id(self) -> str:
        return self.export.removeprefix("jaxsoft.") + (f"[{self.variant}]" if self.variant else "")


# What the inputs vary over, and which of them are class ids.
PER_ROW = {"labels", "positives", "reference", "temperature", "alpha"}
PER_COLUMN = {"class_weights", "priors"}
PER_ENTRY = {"soft", "positive_mask", "teacher"}
IDS = {"labels", "positives"}


SUMS = 5e-4  # half a unit in the last place of 1e4: losses that add up logits


def make_inputs(seed: int, leading: tuple[int, ...], columns: int, dtype=np.float32) -> dict[str, Any]:
    """Labels and other inputs; every label and every positive lies in the first half of the columns."""
    rng = np.random.default_rng(seed)
    half = max(1, (columns + 1) // 2)
    q = rng.random((*leading, columns)) * (np.arange(columns) < half)
    ids = np.stack(
        [rng.permutation(np.arange(max(half, 3)))[:3] % half for _ in range(int(np.prod(leading)))]
    ).reshape(*leading, 3)
    ids[..., 2] = -100
    ids[..., 1] = np.where(ids[..., 1] == ids[..., 0], -100, ids[..., 1])
    mask = np.zeros((*leading, columns), bool)
    np.put_along_axis(mask, ids[..., :1], True, axis=-1)
    return dict(
        labels=jnp.asarray(ids[..., 0], jnp.int32),
        soft=jnp.asarray(q / q.sum(-1, keepdims=True), dtype),
        positives=jnp.asarray(ids, jnp.int32),
        positive_mask=jnp.asarray(mask),
        class_weights=jnp.asarray(0.5 + rng.random(columns), dtype),
        priors=jnp.asarray(rng.dirichlet(np.full(columns, 3.0)), dtype),
        teacher=jnp.asarray(2 * rng.normal(size=(*leading, columns)), dtype),
        reference=jnp.asarray(rng.normal(size=leading), dtype),
        temperature=jnp.asarray(0.5 + rng.random(leading), dtype),
        alpha=jnp.asarray(1.2 + rng.random(leading), dtype),
    )


def loss_entry(function, variant="", labels="labels", arrays=(), **options):
    """An entry of a loss with shift-invariant statistics, unless said otherwise.

    Args:
      function: the loss.
      variant: what distinguishes the entry.
      labels: the input that goes second.
      arrays: options that come from the inputs: names, or a mapping from option to input.
      **options: of the entry (fields of `Entry`), or else of the loss.
    """
    clash = (
        set(inspect.signature(function).parameters)
        & set(Entry.__dataclass_fields__)
        & set(options) - {"where"}
    )
    if clash:
        raise ValueError(f"{function.__name__} and Entry both have {clash}: wrap the loss under another name")
    entry_options = {k: options.pop(k) for k in list(options) if k in Entry.__dataclass_fields__}
    sources = dict(arrays) if isinstance(arrays, dict) else {name: name for name in arrays}

    def call(logits, inputs, *, where=None, axis=-1, **more):
        def given(name):
            moved = name in PER_ENTRY and axis != -1
            return jnp.moveaxis(inputs[name], -1, axis) if moved else inputs[name]

        extra = {option: given(source) for option, source in sources.items()}
        return function(logits, given(labels), where=where, axis=axis, **options, **extra, **more)

    return Entry(
        f"jaxsoft.losses.{function.__name__}",
        call,
        variant,
        (labels, *sources.values()),
        **{"shift": 0.0, "loss": True, **entry_options},
        function=function,
        options=options,
        arrays=sources,
    )


def statistic_entry(function, module="jaxsoft", variant="", inputs=(), **options):
    """An entry of a statistic; `inputs` go after the logits."""
    entry_options = {k: options.pop(k) for k in list(options) if k in Entry.__dataclass_fields__}

    def call(logits, given, *, where=None, axis=-1):
        mask = {} if not entry_options.get("where", True) else {"where": where}
        fixed = {**options, "k": min(options["k"], logits.shape[axis])} if "k" in options else options
        return function(logits, *(given[k] for k in inputs), axis=axis, **mask, **fixed)

    return Entry(f"{module}.{function.__name__}", call, variant, tuple(inputs), **entry_options)


def normalizer_entry(function, variant="", per_row=(), **options):
    """An entry of a normalizer; `per_row` are options that come from the inputs, one number per row."""
    entry_options = {k: options.pop(k) for k in list(options) if k in Entry.__dataclass_fields__}
    module = "jaxsoft" if function.__name__ in jaxsoft.__all__ else "jaxsoft.normalizers"

    def call(logits, given, *, where=None, axis=-1):
        arrays = {name: given[source] for name, source in dict(per_row).items()}
        fixed = {**options, "k": min(options["k"], logits.shape[axis])} if "k" in options else options
        return function(logits, where=where, axis=axis, **arrays, **fixed)

    return Entry(
        f"{module}.{function.__name__}",
        call,
        variant,
        tuple(dict(per_row).values()),
        dense_only=True,
        **{"low": 1e-2, **entry_options},
    )
