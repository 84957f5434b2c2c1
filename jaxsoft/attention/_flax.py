"""Adapter for Flax.

Flax is not imported: its modules take the attention as a function.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxsoft.attention._dot_product import dot_product_attention


def flax_attention_fn(**options) -> Callable:
    """`dot_product_attention` as the `attention_fn` of Flax's multi-head attention, in nnx and linen.

    Args:
      **options: those of `dot_product_attention`, such as `normalizer` or `is_causal`.

    Returns:
      A function for `nnx.MultiHeadAttention(attention_fn=...)` or `nn.MultiHeadAttention(attention_fn=...)`. It
      honours the module's mask, bias, dropout (of Flax's distribution, not its random numbers) and precision; softmax
      is always in float32. It cannot sow attention weights, which are never stored.

    Raises:
      TypeError: an argument of a wrong type, when the function is called.
      ValueError: an option that cannot be honoured, when the function is called.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoft
      >>> attend = jaxsoft.attention.flax_attention_fn(normalizer=jaxsoft.softmax_one)
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> attend(x, x, x, mask=None, deterministic=True, dropout_rate=0.1).shape
      (1, 3, 2, 4)
    """

    def attend(
        query,
        key,
        value,
        bias=None,
        mask=None,
        broadcast_dropout=False,
        dropout_rng=None,
        dropout_rate=0.0,
        deterministic=False,
        dtype=None,
        precision=None,
        force_fp32_for_softmax=False,
        module=None,
        is_causal=False,
        **others,
    ):
        if module is not None:
            raise ValueError(
                "sow_weights must be False: attention weights are never stored, so they cannot be sown"
            )
        del force_fp32_for_softmax  # which it always is
        others = {k: v for k, v in others.items() if v is not None}
        if others:
            raise ValueError(f"attention_fn does not support {', '.join(sorted(others))}")
        dropping = dropout_rate > 0 and not deterministic
        if dtype is not None:
            query, key, value = (a.astype(dtype) for a in (query, key, value))
        given = dict(options)
        given["is_causal"] = bool(is_causal or options.get("is_causal", False))
        if precision is not None:
            given["precision"] = precision
        return dot_product_attention(
            query,
            key,
            value,
            bias,
            None if mask is None else mask.astype(bool),
            dropout_rate=dropout_rate if dropping else 0.0,
            dropout_key=dropout_rng if dropping else None,
            broadcast_dropout=broadcast_dropout,
            **given,
        )

    return attend
