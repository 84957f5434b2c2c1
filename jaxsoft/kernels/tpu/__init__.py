"""The TPU backend: Pallas kernels for Mosaic, see `jaxsoft.kernels._sweep`."""

from jaxsoft.kernels.tpu._sweep import refusal, sweep, unavailable

__all__ = ["refusal", "sweep", "unavailable"]
