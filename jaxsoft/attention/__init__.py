"""Attention with any normalizer, streamed, and attention in linear time.

`dot_product_attention` is softmax attention, or attention with any other normalizer of the library, whose scores and
weights are never stored; the guide "Normalizers and attention" says which normalizer is for what. Parts of it merge
(`partial_attention`), `decode_attention` reads a cache, `flax_attention_fn` is an adapter for Flax.

It takes memory linear in the length (a tile of scores, and one state per query), the forward matrix products once per
pass of the normalizer, and in the backward pass each tile once more. Pairs of blocks that a causal mask or a window
hides are never visited; lengths, segments, predicates and arrays of masks are evaluated block by block, and blocks
that they hide completely are skipped. Under `vmap` a skipped block is computed and discarded: give batches as leading
axes instead.

The other attentions never store an array of the size of the scores, T times S, in the forward or the backward pass:

| function | time | memory | exact? |
| --- | --- | --- | --- |
| `linear_attention`, `magnitude_aware_linear_attention` | linear | linear | its own formula |
| `lightning_attention` | linear | linear; decoding: `H * Hv` numbers per head | its own formula |
| `softmax_free_attention` | linear, times M | linear, times M | if the M landmarks hold all tokens, with ridge 0 |
| `gaussian_kernel_attention` | quadratic | linear | yes |
| `hyper_attention` | linear, times `block_size + sample_size` | likewise | up to `min_seq_len` keys or in one block |
| `scatterbrain_attention` | linear, times `3 window + num_features` | likewise | if the window covers everything |
| `unified_softmax_attention`, `reuse_softmax_attention`, `top_k_attention` | quadratic | linear | yes |
| `urpe_attention`, `ngram_attention` | quadratic | linear, times `block_size` | yes |
| `long_context_log_mass` | linear, times `H^2` | linear | to second order in the scores |

Where they are not exact, the error of `hyper_attention` falls with `1 / sqrt(sample_size)` and that of
`scatterbrain_attention` with `1 / sqrt(num_features)`. Causal `hyper_attention` takes `log T` times as long.

All but `ngram_attention` and `attention_entropy_regularizer` have the layout of `jax.nn.dot_product_attention`: queries
`[*batch, T, N, H]`, keys `[*batch, S, K, H]`, values `[*batch, S, K, Hv]`, N a multiple of K, with any number of batch
axes (`softmax_free_attention` and `lightning_attention` have N heads throughout). A masked key is absent, even if it or
its value is NaN; a query that sees no key gives 0, with gradient 0. Half-precision inputs are computed in float32.
Block sizes do not change a result beyond rounding. For inputs of standard normal size, float32 results are within 2e-5
of float64 (tested), and half-precision results are the rounded float32 results.
"""

from jaxsoft.attention._dot_product import AttentionStatistics, dot_product_attention
from jaxsoft.attention._flax import flax_attention_fn
from jaxsoft.attention._partial import (
    PartialAttention,
    decode_attention,
    merge_partial_attention,
    partial_attention,
)
from jaxsoft.attention._ring import zigzag_positions
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
    "zigzag_positions",
]
