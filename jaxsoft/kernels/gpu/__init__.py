"""Sweeps on NVIDIA Hopper GPUs, with Pallas' Mosaic GPU backend.

`_sweep` builds the kernel, `_program` plans it, `_narrow` evaluates the body of the sweep on a tile, and `_functions`
has its elementwise functions in few instructions.
"""

from __future__ import annotations

import jax

from jaxsoft.kernels._device import Kernel
from jaxsoft.kernels._sweep import Body, Init, Operands, Plan, Result, Scores

_DEVICES = ("H100", "H200", "H800", "H20")


def unavailable(kernel: Kernel) -> str | None:
    """Why no sweep can run on this device, or None."""
    try:  # some versions of jax have no Mosaic GPU
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        return f"this jax {jax.__version__} has no Mosaic GPU ({error})"
    if kernel.interpret:
        return None if hasattr(mosaic_gpu, "InterpretGPUParams") else "this jax has no Mosaic GPU interpreter"
    if not any(name in kernel.device_kind for name in _DEVICES):
        return f"the kernels are for Hopper GPUs, this is {kernel.device_kind!r}"
    return None


def refusal(
    kernel: Kernel, body: Body, scores: Scores, operands: Operands, init: Init, plan: Plan
) -> str | None:
    """Why this sweep cannot run, or None. Arrays may be `ShapeDtypeStruct`s."""
    # Imports Mosaic GPU, which `unavailable` must have found first.
    from jaxsoft.kernels.gpu import _sweep

    return _sweep.refusal(kernel, body, scores, operands, init, plan)


def sweep(kernel: Kernel, body: Body, scores: Scores, operands: Operands, init: Init, plan: Plan) -> Result:
    """Visits the tiles of a matrix of scores: see `jaxsoft.kernels._sweep`."""
    # Imports Mosaic GPU, which `unavailable` must have found first.
    from jaxsoft.kernels.gpu import _sweep

    return _sweep.sweep(kernel, body, scores, operands, init, plan)
