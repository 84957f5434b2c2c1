"""Which implementation runs a pass over rows of scores, and why."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxsoft import _checks

# Name of an implementation: the platform it runs on, and its package.
BACKENDS = {"pallas_tpu": ("tpu", "jaxsoft.kernels.tpu"), "mosaic_gpu": ("gpu", "jaxsoft.kernels.gpu")}
IMPLEMENTATIONS = ("xla", *BACKENDS)


class Kernel(NamedTuple):
    """A chosen kernel backend: hashable, part of the key of compiled programs.

    Attributes:
      name: `"pallas_tpu"` or `"mosaic_gpu"`.
      interpret: whether the kernels are interpreted, on any machine, instead of compiled.
      device_kind: of the device they are for.
      blocks: sizes of blocks that replace the backend's own, as sorted pairs of name and size; empty for none.
    """

    name: str
    interpret: bool
    device_kind: str
    blocks: tuple[tuple[str, int], ...] = ()

    def backend(self) -> Any:
        """The package of the backend, which imports Pallas."""
        return importlib.import_module(BACKENDS[self.name][1])


class Decision(NamedTuple):
    """One pass over rows of scores, and what runs it.

    Attributes:
      what: the pass, in words.
      implementation: `"xla"`, `"pallas_tpu"` or `"mosaic_gpu"`.
      reasons: why each of the other implementations does not.
    """

    what: str
    implementation: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.reasons.items())
        return f"{self.what}: {self.implementation}" + (f" ({others})" if others else "")


class Work(NamedTuple):
    """What there is to do, as far as the best sizes of blocks depend on it.

    Attributes:
      kind: `"dense"` (stored scores), `"linear"` (the product of two matrices) or `"attention"`.
      rows: how many (of attention: queries times the heads that share a key).
      columns: how many (of attention: keys).
      features: of the product; 0 for stored scores.
      itemsize: bytes of a score, or of an entry of the two matrices.
    """

    kind: str
    rows: int
    columns: int
    features: int
    itemsize: int

    def distance(self, other: Work) -> float:
        """How far apart two of one kind are: the sum of the logarithms of the sizes' ratios."""
        pairs = zip(self[1:4], other[1:4])
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


_interpreted = contextvars.ContextVar("interpreted", default=False)
_blocks = contextvars.ContextVar("blocks", default=())
_log: contextvars.ContextVar[list | None] = contextvars.ContextVar("log", default=None)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it, `implementation="pallas_tpu"` and `"mosaic_gpu"` run on any machine, in Pallas' interpreter.

    For tests: the numbers are those of the kernels, the time is not. The functions must be traced within it.

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
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


@contextlib.contextmanager
def block_sizes(**sizes: int) -> Iterator[None]:
    """Within it, kernels use these sizes of blocks instead of their own choice (see `jaxsoft.kernels.tune`).

    Args:
      **sizes: sizes by name, `rows` and `columns` (of attention: queries and keys), and others of a backend.

    Returns:
      A context manager.

    Raises:
      TypeError: a size that is no static integer.
      ValueError: a size below 1.

    Example:
      >>> import jaxsoft
      >>> with jaxsoft.kernels.block_sizes(rows=128, columns=512):
      ...     pass
    """
    for name, size in sizes.items():
        _checks.integer(name, size, at_least=1)
    token = _blocks.set(tuple(sorted(sizes.items())))
    try:
        yield
    finally:
        _blocks.reset(token)


def explain(function: Callable, *args: Any, **kwargs: Any) -> list[Decision]:
    """What runs each pass over rows of scores in `function(*args, **kwargs)`, and why not something else.

    The function is traced, not run; arguments may be `jax.ShapeDtypeStruct`s.

    Args:
      function: any function that calls jaxsoft.
      *args: its arguments.
      **kwargs: its arguments by keyword.

    Returns:
      One `Decision` for each pass, in order.

    Raises:
      Exception: whatever tracing the function raises.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsoft
      >>> for decision in jaxsoft.kernels.explain(jaxsoft.logsumexp, jnp.zeros((4, 8))):
      ...     print(decision.what, "by", decision.implementation)
      reductions of dense rows by xla
    """
    token = _log.set([])
    try:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = {i: a for i, a in enumerate(leaves) if hasattr(a, "shape") and hasattr(a, "dtype")}

        def traced(arrays):
            args, kwargs = treedef.unflatten([arrays.get(i, a) for i, a in enumerate(leaves)])
            return function(*args, **kwargs)

        with jax.disable_jit():  # else a function that was compiled before would not be traced again
            jax.eval_shape(traced, arrays)
        return _log.get() or []
    finally:
        _log.reset(token)


def blocks() -> tuple[tuple[str, int], ...]:
    """The sizes of `block_sizes`, as pairs of name and size."""
    return _blocks.get()


def device() -> tuple[str, str]:
    """Platform (`"cpu"`, `"gpu"`, `"tpu"`) and kind of the device that is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract = getattr(mesh, "abstract_device", None)
    if abstract is not None:
        return abstract.platform, abstract.device_kind
    platform = jax.default_backend()
    return platform, "" if platform == "cpu" else jax.devices()[0].device_kind


def likely(implementation: str | None, work: Work) -> bool:
    """Whether kernels would be tried for a pass: sizes of blocks that are fixed before it is known are then theirs."""
    if implementation is not None:
        return implementation in BACKENDS
    from jaxsoft.kernels import _tuning

    here, kind = device()
    names = [name for name, (platform, _) in BACKENDS.items() if platform == here]
    return any(_tuning.objection(name, kind, work) is None for name in names)


def choose(
    what: str, implementation: str | None, work: Work, case: Callable[[Any, Kernel], str | None]
) -> Kernel | None:
    """The kernel backend for a pass, or None for XLA.

    Args:
      what: the pass, in words.
      implementation: what the user asked for; None for the best there is.
      work: the pass, as it is measured.
      case: `(backend, kernel) -> why the backend cannot run the pass, or None`.

    Returns:
      A `Kernel`, or None.

    Raises:
      ValueError: an implementation that is not known, or asked for and not possible, with the reason.
    """
    _checks.option("implementation", implementation, (None, *IMPLEMENTATIONS))
    reasons: dict[str, str] = {}
    chosen = None
    for name, (platform, _) in BACKENDS.items():
        if implementation not in (None, name):
            reasons[name] = f"implementation={implementation!r} was asked for"
            continue
        reason, kernel = _possible(name, platform, implementation is not None, work, case)
        if reason is None and chosen is None:
            chosen = kernel
        elif reason is not None:
            reasons[name] = reason
    if implementation in BACKENDS and chosen is None:
        raise ValueError(f"implementation={implementation!r} cannot run {what}: {reasons[implementation]}")
    log = _log.get()
    if log is not None:
        decision = Decision(what, "xla" if chosen is None else chosen.name, reasons)
        if decision not in log[-1:]:  # a pass may be traced more than once
            log.append(decision)
    return chosen


def _possible(name, platform, asked: bool, work: Work, case) -> tuple[str | None, Kernel | None]:
    """Why a backend cannot run a pass (None if it can), and the kernel."""
    here, kind = device()
    interpret = _interpreted.get()
    if here != platform and not (asked and interpret):
        return f"it needs a {platform.upper()}, this is a {here.upper()}", None
    kernel = Kernel(name, interpret, kind if here == platform else "", _blocks.get())
    backend = kernel.backend()
    reason = backend.unavailable(kernel) or case(backend, kernel)
    if reason is None and not asked:
        from jaxsoft.kernels import _tuning

        reason = _tuning.objection(name, kernel.device_kind, work)
    return reason, kernel
