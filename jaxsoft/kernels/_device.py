"""Kernel backends, their device, and contexts that change how they run."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxsoft import _checks

# For each kernel implementation, the platform it runs on and its package.
BACKENDS = {"pallas_tpu": ("tpu", "jaxsoft.kernels.tpu"), "mosaic_gpu": ("gpu", "jaxsoft.kernels.gpu")}
IMPLEMENTATIONS = ("xla", "cudnn", *BACKENDS)


# The largest block of scores that XLA computes at a time on a GPU or TPU, as far as block sizes can keep to it: 128 MiB
# in float32. The steps of its loops are then few, and their products large. A CPU has block sizes of its own.
BLOCK_SCORES = 2**25


class Kernel(NamedTuple):
    """A chosen kernel backend: hashable, part of the key of compiled programs.

    Attributes:
      name: `"pallas_tpu"` or `"mosaic_gpu"`.
      interpret: whether the kernels are interpreted, on any machine, instead of compiled.
      device_kind: the kind of device they are for.
      blocks: block sizes that replace the backend's own, as sorted pairs of name and size; may be empty.
    """

    name: str
    interpret: bool
    device_kind: str
    blocks: tuple[tuple[str, int], ...] = ()

    def backend(self) -> Any:
        """The package of the backend, which imports Pallas."""
        return importlib.import_module(BACKENDS[self.name][1])


class Work(NamedTuple):
    """The size of a pass, on which the best block sizes depend.

    Attributes:
      kind: `"dense"` (stored scores), `"linear"` (the product of two matrices) or `"attention"`.
      rows: number of rows (in attention: queries times the heads that share a key).
      columns: number of columns (in attention: keys).
      features: the inner dimension of the product; 0 for stored scores.
      itemsize: bytes per score, or per entry of the two matrices.
    """

    kind: str
    rows: int
    columns: int
    features: int
    itemsize: int

    def distance(self, other: Work) -> tuple[float, float]:
        """How far two works of the same kind are apart: first by itemsize, then by the log ratios of their sizes.

        Rows count twice: their number decides whether they fill the device, columns only how long each of them takes.
        """
        itemsize, rows, columns, features = (
            abs(math.log2(max(a, 1) / max(b, 1)))
            for a, b in ((getattr(self, name), getattr(other, name)) for name in _SIZES)
        )
        return itemsize, 2 * rows + columns + features

    @property
    def shape(self) -> str:
        """The sizes in words."""
        return f"{self.rows} x {self.columns}" + (f", {self.features} features" if self.features else "")

    def __str__(self) -> str:
        return f"{self.shape} in {8 * self.itemsize} bits"


_SIZES = ("itemsize", "rows", "columns", "features")


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
    """Gives a context variable a value inside the context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


_interpreted = contextvars.ContextVar("interpreted", default=False)
_blocks = contextvars.ContextVar("blocks", default=())


def interpreted() -> contextlib.AbstractContextManager[None]:
    """Lets `implementation="pallas_tpu"` and `"mosaic_gpu"` run on any machine, in Pallas' interpreter.

    For tests: it gives the kernels' numbers, not their speed. Functions must be traced inside the context.

    Returns:
      A context manager.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsoft
      >>> with jaxsoft.kernels.interpreted():
      ...     lse = jaxsoft.logsumexp(jnp.zeros((2, 8)), implementation="pallas_tpu")
      >>> print(lse.round(4))
      [2.0794 2.0794]
    """
    return setting(_interpreted, True)


def block_sizes(**sizes: int) -> contextlib.AbstractContextManager[None]:
    """Makes kernels use these block sizes instead of their own choice.

    Args:
      **sizes: sizes by name: `rows` and `columns` (in attention: queries and keys), and others known to the backend.

    Returns:
      A context manager.

    Raises:
      TypeError: a size is not a static integer.
      ValueError: a size is below 1.

    Example:
      >>> import jaxsoft
      >>> with jaxsoft.kernels.block_sizes(rows=128, columns=512):
      ...     pass
    """
    for name, size in sizes.items():
        _checks.integer(name, size, at_least=1)
    return setting(_blocks, tuple(sorted(sizes.items())))


def is_interpreted() -> bool:
    """Whether `interpreted` is on."""
    return _interpreted.get()


def blocks() -> tuple[tuple[str, int], ...]:
    """The sizes given to `block_sizes`, as sorted pairs of name and size."""
    return _blocks.get()


def compiled(function: Callable, static_argnums: tuple[int, ...] = ()) -> Callable:
    """`jax.jit` of a module-level function that chooses kernels: one program per state of the contexts above.

    Outside of `jit`, JAX would compile a loop or a branch with a closure anew in each call.
    """

    def in_context(context, *args):
        del context
        return function(*args)

    in_context.__name__ = function.__name__  # the name of the program
    run = jax.jit(in_context, static_argnums=(0, *(i + 1 for i in static_argnums)))

    @functools.wraps(function)
    def call(*args):
        return run((is_interpreted(), blocks()), *args)

    return call


def evenly(length: int, most: float, multiple: int) -> int:
    """The size of equal blocks of at most `most`, as few as possible, rounded up to a multiple."""
    blocks = max(math.ceil(length / most), 1)
    return -(-math.ceil(length / blocks) // multiple) * multiple


# Kinds of devices as jax names them, by generation. One generation shares a table, and what its compilers can do.
_GENERATIONS = {
    "Ampere": r"\b(A100|A30|A800)\b",
    "Ada": r"\b(L4|L20|L40S?|RTX \d000 Ada|RTX 40\d0)\b",
    "Hopper": r"\bG?H(100|200|800|20)\b",
    "Blackwell": r"\bG?B[123]00\b",
    "TPU v5e": r"\bTPU v5( ?lite|e)\b",
    "TPU v6e": r"\bTPU v6( ?lite|e)\b",
}


def generation(kind: str) -> str:
    """The generation of a kind of device; of an unknown kind, the kind itself."""
    return next((name for name, kinds in _GENERATIONS.items() if re.search(kinds, kind)), kind)


def device() -> tuple[str, str]:
    """Platform (`"cpu"`, `"gpu"`, `"tpu"`) and kind of the device that a function is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract = getattr(mesh, "abstract_device", None)
    if abstract is not None:
        return abstract.platform, abstract.device_kind
    platform = jax.default_backend()
    return platform, "" if platform == "cpu" else jax.devices()[0].device_kind
