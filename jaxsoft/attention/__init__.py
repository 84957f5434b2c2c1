"""Attention with any normalizer, streamed; and linear-time attentions."""

from jaxsoft.attention._dot_product import AttentionStatistics, dot_product_attention
from jaxsoft.attention._partial import (
    PartialAttention,
    decode_attention,
    flax_attention_fn,
    merge_partial_attention,
    partial_attention,
)

__all__ = [
    "AttentionStatistics",
    "PartialAttention",
    "decode_attention",
    "dot_product_attention",
    "flax_attention_fn",
    "merge_partial_attention",
    "partial_attention",
]
