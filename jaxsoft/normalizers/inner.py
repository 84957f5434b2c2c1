"""What the attentions and losses of the library use of the normalizers, beside their public names.

Not for users: these names may change at any time.
"""

from jaxsoft.normalizers._exponential import exponent, is_exponential, times_scale, with_sink
from jaxsoft.normalizers._normalizer import after, changed, per_row
from jaxsoft.normalizers.masks import present_scores, top_k_mask
from jaxsoft.normalizers.rectified import positive_power, stable_exponential, taylor_exponential
from jaxsoft.normalizers.sparse import define_entmax, excess
from jaxsoft.normalizers.stochastic import key_words, random_bits

__all__ = [
    "after",
    "changed",
    "define_entmax",
    "excess",
    "exponent",
    "is_exponential",
    "key_words",
    "per_row",
    "positive_power",
    "present_scores",
    "random_bits",
    "stable_exponential",
    "taylor_exponential",
    "times_scale",
    "top_k_mask",
    "with_sink",
]
