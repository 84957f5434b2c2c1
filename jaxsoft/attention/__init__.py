"""Attention with any normalizer, streamed; and linear-time attentions."""

from jaxsoft.attention._dot_product import AttentionStatistics, dot_product_attention

__all__ = ["AttentionStatistics", "dot_product_attention"]
