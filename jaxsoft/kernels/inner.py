"""What `jaxsoft.rows`, `jaxsoft.attention` and the tuner use of the kernels, beside the public names.

Not for users: these names may change at any time.
"""

from jaxsoft.kernels import _tables as tables
from jaxsoft.kernels._choice import choose, likely, measured_sizes
from jaxsoft.kernels._device import BACKENDS, IMPLEMENTATIONS, Kernel, Work, blocks, device
from jaxsoft.kernels._sweep import NO_SECOND_DERIVATIVES, Block, Operands, Out, Plan, Scores, Tiles
from jaxsoft.kernels._trace import objection, plain

__all__ = [
    "BACKENDS",
    "IMPLEMENTATIONS",
    "NO_SECOND_DERIVATIVES",
    "Block",
    "Kernel",
    "Operands",
    "Out",
    "Plan",
    "Scores",
    "Tiles",
    "Work",
    "blocks",
    "choose",
    "device",
    "likely",
    "measured_sizes",
    "objection",
    "plain",
    "tables",
]
