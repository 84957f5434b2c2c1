"""Normalizers: maps from a row of scores to a row of weights."""

from jaxsoft.normalizers.exponential import log_softmax, softmax

__all__ = ["log_softmax", "softmax"]
