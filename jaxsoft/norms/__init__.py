"""Normalization layers as pure functions."""

from __future__ import annotations

from jaxsoft.norms.conversion import (
    fold_into_linear,
    pre_ln_to_pre_rms,
    pre_rms_to_pre_crms,
    zero_mean_linear,
)
from jaxsoft.norms.embedding import stable_embedding, stable_embedding_init
from jaxsoft.norms.layer import compress, crms_norm, decompress, layer_norm, recenter, rms_norm

__all__ = [
    "compress",
    "crms_norm",
    "decompress",
    "fold_into_linear",
    "layer_norm",
    "pre_ln_to_pre_rms",
    "pre_rms_to_pre_crms",
    "recenter",
    "rms_norm",
    "stable_embedding",
    "stable_embedding_init",
    "zero_mean_linear",
]
