"""Attention with any normalizer, streamed; and linear-time attentions."""

from jaxsoft.attention._dot_product import AttentionStatistics, dot_product_attention
from jaxsoft.attention._flax import flax_attention_fn
from jaxsoft.attention._partial import (
    PartialAttention,
    decode_attention,
    merge_partial_attention,
    partial_attention,
)
from jaxsoft.attention.hyper import angular_lsh_buckets, hyper_attention, scatterbrain_attention
from jaxsoft.attention.linear import (
    lightning_attention,
    lightning_slopes,
    linear_attention,
    magnitude_aware_linear_attention,
)
from jaxsoft.attention.reuse import (
    NgramAttention,
    SharedSoftmax,
    attention_entropy_regularizer,
    long_context_log_mass,
    ngram_attention,
    reuse_softmax_attention,
    top_k_attention,
    unified_softmax_attention,
    urpe_attention,
)
from jaxsoft.attention.softmax_free import (
    gaussian_kernel_attention,
    newton_pseudo_inverse,
    softmax_free_attention,
)

__all__ = [
    "AttentionStatistics",
    "NgramAttention",
    "PartialAttention",
    "SharedSoftmax",
    "angular_lsh_buckets",
    "attention_entropy_regularizer",
    "decode_attention",
    "dot_product_attention",
    "flax_attention_fn",
    "gaussian_kernel_attention",
    "hyper_attention",
    "lightning_attention",
    "lightning_slopes",
    "linear_attention",
    "long_context_log_mass",
    "magnitude_aware_linear_attention",
    "merge_partial_attention",
    "newton_pseudo_inverse",
    "ngram_attention",
    "partial_attention",
    "reuse_softmax_attention",
    "scatterbrain_attention",
    "softmax_free_attention",
    "top_k_attention",
    "unified_softmax_attention",
    "urpe_attention",
]
