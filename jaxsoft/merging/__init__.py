"""Merging of fine-tuned parameters, as pure functions of pytrees.

A delta is the difference of fine-tuned and base parameters; `optax.apply_updates(base, delta)` adds it again.
"""

from __future__ import annotations

from jaxsoft.merging.averages import diagonal_fisher, fisher_merge, model_kinship, model_stock_merge
from jaxsoft.merging.deltas import bit_delta, dare_delta, della_delta, star_delta

__all__ = [
    "bit_delta",
    "dare_delta",
    "della_delta",
    "diagonal_fisher",
    "fisher_merge",
    "model_kinship",
    "model_stock_merge",
    "star_delta",
]
