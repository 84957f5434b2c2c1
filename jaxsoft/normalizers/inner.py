"""What the attentions and losses of the library use of the normalizers, beside their public names.

Not for users: these names may change at any time.
"""
# ruff: noqa: F401 (imported here for others)

from jaxsoft.normalizers._exponential import exponent, is_exponential, times_scale, with_sink
from jaxsoft.normalizers._normalizer import Survey, after, changed, per_row, plain_survey
from jaxsoft.normalizers.exponential import ADAPTIVE_COEFFICIENTS, adaptive_sharpness
from jaxsoft.normalizers.masks import present_scores, top_k_mask
from jaxsoft.normalizers.rectified import stable_exponential, taylor_exponential
from jaxsoft.normalizers.sparse import define_entmax, entmax_powers, is_near_softmax, static_exponent
from jaxsoft.normalizers.stochastic import key_words, mixed_bits, random_bits, two_words
