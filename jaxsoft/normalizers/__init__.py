"""Normalizers: maps from a row of scores to a row of weights.

They return an array of the scores' shape, so they take dense scores; `linear_logits` raises a `TypeError` that names
`logits.dense()`. Statistics of rows (`log_prob`, `top_k`, `entropy`, the losses) need no dense scores.

Attention streams a normalizer: pass the function to `jaxsoft.attention.dot_product_attention`, and neither scores nor
weights are stored. The guide "Normalizers and attention" says which normalizer to take and how to write one. Most of
the normalizers are also exported by `jaxsoft`; other evaluation orders of softmax are in `jaxsoft.rows`.
"""

from jaxsoft.normalizers._normalizer import Normalizer, defined_by
from jaxsoft.normalizers.exponential import (
    adaptive_temperature_softmax,
    clipped_softmax,
    entropy_target_softmax,
    log_softmax,
    masked_logit_softmax,
    quantized_softmax,
    scalable_softmax,
    self_adjust_softmax,
    sink_softmax,
    softmax,
    softmax_n,
    softmax_one,
)
from jaxsoft.normalizers.gating import (
    SoftMoE,
    dense_to_sparse_gate,
    drop_weak_experts,
    feature_selection_gate,
    gumbel_softmax_gate,
    merge_experts,
    route_gradients,
    soft_moe_dispatch_combine,
    top_k_gate,
    wina_mask,
)
from jaxsoft.normalizers.masks import (
    Interpolant,
    exponential_temperature_schedule,
    gumbel_sigmoid,
    gumbel_softmax_interpolant,
    straight_through_one_hot,
)
from jaxsoft.normalizers.pooling import soft_pool
from jaxsoft.normalizers.quantized import quantized_softmax_bias_correction
from jaxsoft.normalizers.rectified import (
    mpc_softmax,
    relu_weights,
    reweighted_attention_weights,
    sigmoid_weights,
    softpick,
    softplus_attention_weights,
    stablemax,
    taylor_softmax,
)
from jaxsoft.normalizers.retrieval import dual_inverted_softmax, dynamic_inverted_softmax, inverted_softmax
from jaxsoft.normalizers.similarity import (
    distance_quantile,
    sdm_activation,
    sdm_log_softmax,
    similarity_count,
)
from jaxsoft.normalizers.sparse import entmax, entmax15, sparse_softmax, sparsemax
from jaxsoft.normalizers.stochastic import gumbel_softmax
from jaxsoft.normalizers.temperature import (
    TemperatureNetwork,
    TemperatureParameters,
    noisy_logits,
    temperature_network,
)
from jaxsoft.normalizers.unit_scaled import unit_scaled_softmax

__all__ = [
    "Interpolant",
    "Normalizer",
    "SoftMoE",
    "TemperatureNetwork",
    "TemperatureParameters",
    "adaptive_temperature_softmax",
    "clipped_softmax",
    "defined_by",
    "dense_to_sparse_gate",
    "distance_quantile",
    "drop_weak_experts",
    "dual_inverted_softmax",
    "dynamic_inverted_softmax",
    "entmax",
    "entmax15",
    "entropy_target_softmax",
    "exponential_temperature_schedule",
    "feature_selection_gate",
    "gumbel_sigmoid",
    "gumbel_softmax",
    "gumbel_softmax_gate",
    "gumbel_softmax_interpolant",
    "inverted_softmax",
    "log_softmax",
    "masked_logit_softmax",
    "merge_experts",
    "mpc_softmax",
    "noisy_logits",
    "quantized_softmax",
    "quantized_softmax_bias_correction",
    "relu_weights",
    "reweighted_attention_weights",
    "route_gradients",
    "scalable_softmax",
    "sdm_activation",
    "sdm_log_softmax",
    "self_adjust_softmax",
    "sigmoid_weights",
    "similarity_count",
    "sink_softmax",
    "soft_moe_dispatch_combine",
    "soft_pool",
    "softmax",
    "softmax_n",
    "softmax_one",
    "softpick",
    "softplus_attention_weights",
    "sparse_softmax",
    "sparsemax",
    "stablemax",
    "straight_through_one_hot",
    "taylor_softmax",
    "temperature_network",
    "top_k_gate",
    "unit_scaled_softmax",
    "wina_mask",
]
