"""Normalization layers as pure functions, with their statistics as arguments and results."""

from __future__ import annotations

from jaxsoft.norms.batch import (
    BalancedBatchNormState,
    alpha_batch_norm,
    balanced_batch_norm,
    balanced_batch_norm_init,
    evonorm_b0,
    evonorm_s0,
)
from jaxsoft.norms.conversion import (
    fold_into_linear,
    pre_ln_to_pre_rms,
    pre_rms_to_pre_crms,
    zero_mean_linear,
)
from jaxsoft.norms.embedding import stable_embedding, stable_embedding_init
from jaxsoft.norms.layer import compress, crms_norm, decompress, layer_norm, recenter, rms_norm
from jaxsoft.norms.placement import mix_ln_num_post, mix_ln_residual
from jaxsoft.norms.running import (
    PowerNormState,
    UnifiedNormBackward,
    UnifiedNormState,
    power_norm,
    power_norm_init,
    unified_norm,
    unified_norm_init,
)
from jaxsoft.norms.weights import weight_condition

__all__ = [
    "BalancedBatchNormState",
    "PowerNormState",
    "UnifiedNormBackward",
    "UnifiedNormState",
    "alpha_batch_norm",
    "balanced_batch_norm",
    "balanced_batch_norm_init",
    "compress",
    "crms_norm",
    "decompress",
    "evonorm_b0",
    "evonorm_s0",
    "fold_into_linear",
    "layer_norm",
    "mix_ln_num_post",
    "mix_ln_residual",
    "power_norm",
    "power_norm_init",
    "pre_ln_to_pre_rms",
    "pre_rms_to_pre_crms",
    "recenter",
    "rms_norm",
    "stable_embedding",
    "stable_embedding_init",
    "unified_norm",
    "unified_norm_init",
    "weight_condition",
    "zero_mean_linear",
]
