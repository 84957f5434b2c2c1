"""Normalizers: maps from a row of scores to a row of weights."""

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
from jaxsoft.normalizers.sparse import entmax, entmax15, sparse_softmax, sparsemax
from jaxsoft.normalizers.stochastic import gumbel_softmax

__all__ = [
    "Normalizer",
    "adaptive_temperature_softmax",
    "clipped_softmax",
    "defined_by",
    "entmax",
    "entmax15",
    "entropy_target_softmax",
    "gumbel_softmax",
    "log_softmax",
    "masked_logit_softmax",
    "mpc_softmax",
    "quantized_softmax",
    "relu_weights",
    "reweighted_attention_weights",
    "scalable_softmax",
    "self_adjust_softmax",
    "sigmoid_weights",
    "sink_softmax",
    "softmax",
    "softmax_n",
    "softmax_one",
    "softpick",
    "softplus_attention_weights",
    "sparse_softmax",
    "sparsemax",
    "stablemax",
    "taylor_softmax",
]
