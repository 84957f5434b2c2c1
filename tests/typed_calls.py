"""Calls whose types pyright checks, by `make lint`; nothing runs them."""

from typing import assert_type

from jax import Array

from jaxsoft.attention import AttentionStatistics, dot_product_attention, lightning_attention


def of_attention(x: Array, flag: bool) -> None:
    """The result depends on what is asked for."""
    f = dot_product_attention
    assert_type(f(x, x, x), Array)
    assert_type(f(x, x, x, None, x > 0, is_causal=True, softcap=3.0), Array)
    assert_type(f(x, x, x, return_residual=True, scale=1.0), tuple[Array, Array])
    assert_type(f(x, x, x, return_statistics=True), tuple[Array, AttentionStatistics])
    assert_type(f(x, x, x, return_residual=True, return_statistics=True), tuple[Array, AttentionStatistics])
    assert_type(f(x, x, x, return_residual=flag), Array | tuple[Array, Array])
    assert_type(lightning_attention(x, x, x, slopes=x), Array)
    assert_type(lightning_attention(x, x, x, slopes=x, return_state=True), tuple[Array, Array])
