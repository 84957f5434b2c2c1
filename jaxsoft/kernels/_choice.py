"""The choice of the implementation that runs a pass over rows of scores."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxsoft import _checks
from jaxsoft.kernels import _device, _tables
from jaxsoft.kernels._device import BACKENDS, IMPLEMENTATIONS, Kernel, Work


class Decision(NamedTuple):
    """One pass over rows of scores, and the implementation that runs it.

    Attributes:
      what: the pass, in words.
      implementation: `"xla"`, `"cudnn"`, `"pallas_tpu"` or `"mosaic_gpu"`.
      reasons: for each other implementation that was considered, why it does not run the pass.
      because: why this one runs it: the request, or the measurement that decided; empty for XLA where no other can.
    """

    what: str
    implementation: str
    reasons: dict[str, str]
    because: str = ""

    def __str__(self) -> str:
        because = f", {self.because}" if self.because else ""
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.reasons.items())
        return f"{self.what}: {self.implementation}{because}" + (f" ({others})" if others else "")


_explaining = jax.make_user_context(None)
_log: contextvars.ContextVar[list | None] = contextvars.ContextVar("log", default=None)


def explain(function: Callable, *args: Any, **kwargs: Any) -> list[Decision]:
    """Says which implementation runs each pass over rows of scores in `function(*args, **kwargs)`, and why.

    The function is traced, not run; arguments may be `jax.ShapeDtypeStruct`s.

    Args:
      function: any function that calls jaxsoft.
      *args: its arguments.
      **kwargs: its arguments by keyword.

    Returns:
      One `Decision` per pass, in order.

    Raises:
      Exception: any exception from tracing the function.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsoft
      >>> for decision in jaxsoft.kernels.explain(jaxsoft.logsumexp, jnp.zeros((4, 8))):
      ...     print(decision.what, "by", decision.implementation)
      reductions of dense rows by xla
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: a for i, a in enumerate(leaves) if hasattr(a, "shape") and hasattr(a, "dtype")}

    def traced(arrays):
        args, kwargs = treedef.unflatten([arrays.get(i, a) for i, a in enumerate(leaves)])
        return function(*args, **kwargs)

    decisions: list[Decision] = []
    # The object is a key of caches: a function traced earlier is traced again.
    with _device.setting(_log, decisions), _explaining(object()):
        jax.eval_shape(traced, arrays)
    return decisions


def likely(implementation: str | None, work: Work) -> bool:
    """Whether a kernel will probably run, so that block sizes fixed in advance should suit it."""
    if implementation is not None:
        return implementation in BACKENDS
    names, kind = _backends_here()
    return any(_tables.verdict(name, kind, work).faster for name in names)


def measured_sizes(implementation: str | None, work: Work) -> dict[str, int]:
    """The block sizes, by name, that this device's table gives for both directions; empty if there are none."""
    names, kind = _backends_here()
    if not names or implementation not in (None, *names):
        return {}
    return _tables.sizes((), kind, names[0], work, "both")[0]


def _backends_here() -> tuple[list[str], str]:
    """The names of the backends for this platform, and the device kind."""
    here, kind = _device.device()
    return [name for name, (platform, _) in BACKENDS.items() if platform == here], kind


def unlogged() -> contextlib.AbstractContextManager[None]:
    """Keeps what is traced inside the context out of `explain`: the derivative of a pass is not a pass of its own."""
    return _device.setting(_log, None)


def choose(
    what: str,
    implementation: str | None,
    work: Work,
    case: Callable[[Any, Kernel], str | None],
    refused: dict[str, str] | None = None,
) -> Kernel | None:
    """The kernel backend for a pass, or None for XLA.

    Args:
      what: the pass, in words.
      implementation: the one that the user requested; None for the best available.
      work: the size of the pass.
      case: `(backend, kernel) -> reason` why the backend cannot run the pass, or None if it can.
      refused: the reasons why other implementations do not run it.

    Returns:
      A `Kernel`, or None.

    Raises:
      ValueError: the implementation is unknown, or cannot run the pass; the message says why.
    """
    _checks.option("implementation", implementation, (None, *IMPLEMENTATIONS))
    if implementation == "cudnn":
        raise ValueError(
            f"implementation='cudnn' cannot run {what}: it runs dot_product_attention with softmax"
        )
    reasons = dict(refused or {})
    chosen, because = None, "as requested" if implementation == "xla" else ""
    for name in BACKENDS:
        if implementation not in (None, name):
            reasons[name] = f"implementation={implementation!r} was requested"
            continue
        kernel, reason = _candidate(name, implementation is not None, work, case)
        if kernel is None:
            reasons[name] = reason
        elif chosen is None:
            chosen, because = kernel, reason
    if implementation in BACKENDS and chosen is None:
        raise ValueError(f"implementation={implementation!r} cannot run {what}: {reasons[implementation]}")
    _note(Decision(what, "xla" if chosen is None else chosen.name, reasons, because))
    return chosen


def choose_cudnn(
    what: str, implementation: str | None, work: Work, case: Callable[[str], str | None]
) -> str | None:
    """Why cuDNN does not run a whole attention; None if it does.

    Args:
      what: the attention, in words.
      implementation: the one that the user requested; None for the best available.
      work: its size.
      case: `device kind -> reason` why cuDNN cannot run it, or None if it can.

    Raises:
      ValueError: cuDNN was requested, and cannot run it.
    """
    here, kind = _device.device()
    if implementation not in (None, "cudnn"):
        return f"implementation={implementation!r} was requested"
    reason = case(kind) if here == "gpu" else _needs("gpu", here)
    because = "as requested"
    if reason is None and implementation is None:
        verdict = _tables.cudnn_verdict(kind, work)
        reason, because = (None, verdict.reason) if verdict.faster else (verdict.reason, "")
    if reason is not None:
        if implementation == "cudnn":
            raise ValueError(f"implementation='cudnn' cannot run {what}: {reason}")
        return reason
    why = "cudnn runs it" if implementation is None else "implementation='cudnn' was requested"
    others = {
        name: why if platform == here else _needs(platform, here) for name, (platform, _) in BACKENDS.items()
    }
    _note(Decision(what, "cudnn", others, because))
    return None


def _needs(platform: str, here: str) -> str:
    return f"it needs a {platform.upper()}, this is a {here.upper()}"


def _note(decision: Decision) -> None:
    log = _log.get()
    if log is not None and decision not in log[-1:]:  # a pass may be traced more than once
        log.append(decision)


def _candidate(name: str, asked: bool, work: Work, case) -> tuple[Kernel | None, str]:
    """The `Kernel` of a backend for a pass and why to take it, or None and why not."""
    here, kind = _device.device()
    platform, interpret = BACKENDS[name][0], _device.is_interpreted()
    if here != platform and not (asked and interpret):
        return None, _needs(platform, here)
    kernel = Kernel(name, interpret, kind if here == platform else "", _device.blocks())
    backend = kernel.backend()
    reason = backend.unavailable(kernel) or case(backend, kernel)
    if reason is not None:
        return None, reason
    if asked:
        return kernel, "as requested"
    verdict = _tables.verdict(name, kernel.device_kind, work)
    return kernel if verdict.faster else None, verdict.reason
