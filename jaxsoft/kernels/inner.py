"""Internals of the kernels that `jaxsoft.rows`, `jaxsoft.attention` and the tuner use in addition to the public names.

Not for users: these names may change at any time.
"""
# ruff: noqa: F401 (imported here for others)

from jaxsoft.kernels import _tables as tables
from jaxsoft.kernels._choice import choose, choose_cudnn, likely, measured_sizes, unlogged
from jaxsoft.kernels._derivative import attach, differentiated_as
from jaxsoft.kernels._device import (
    BACKENDS,
    BLOCK_SCORES,
    IMPLEMENTATIONS,
    Kernel,
    Work,
    blocks,
    compiled,
    device,
    evenly,
    generation,
    setting,
)
from jaxsoft.kernels._sweep import Block, Operands, Out, Plan, Scores, Tiles
from jaxsoft.kernels._trace import objection, plain
