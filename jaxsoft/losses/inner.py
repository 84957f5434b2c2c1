"""Internals of the losses that the library's heads use in addition to the public names.

Not for users: these names may change at any time.
"""
# ruff: noqa: F401 (imported here for others)

from jaxsoft.losses._common import IGNORE_INDEX, check_weights
from jaxsoft.losses._spherical import SPHERICAL
