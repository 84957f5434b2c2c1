"""Decoding: transforms of logits, samples from logits that are never stored, speculative decoding and more.

    transform = chain(temperature(0.8), top_k(50), min_p(0.05))
    tokens = sample(transform(logits), key)

`logits` are an array or `linear_logits`. Shapes are static and all state is explicit, so that a whole generation
is one `lax.scan`; numbers may be traced.
"""

from jaxsoft.decoding._rows import TransformedLogits
from jaxsoft.decoding.beam import Beams, beam_step
from jaxsoft.decoding.combination import (
    FusedLogits,
    dynamic_logit_fusion,
    guidance,
    knn_lm_interpolate,
)
from jaxsoft.decoding.prediction import SoftNMS, frechet_mean_predict, soft_nms
from jaxsoft.decoding.resampling import (
    Resampled,
    best_of_n_kl_bound,
    best_of_n_kl_estimate,
    best_of_n_policy,
    fit_metric_energy,
    importance_resample,
)
from jaxsoft.decoding.sampling import (
    Sample,
    argmax,
    log_prob,
    sample,
    sample_and_log_prob,
    sample_without_replacement,
)
from jaxsoft.decoding.speculative import (
    AcceptanceState,
    EntropySwitch,
    RollingEntropy,
    Speculation,
    acceptance_stop,
    entropy_stop,
    entropy_switch,
    rolling_entropy,
    speculative_accept,
)
from jaxsoft.decoding.transforms import (
    Transform,
    adaptive_temperature,
    allowed_token_ids,
    chain,
    epsilon_cutoff,
    eta_cutoff,
    frequency_penalty,
    logit_bias,
    mask_logits,
    min_p,
    presence_penalty,
    repetition_penalty,
    softcap,
    suppress_tokens,
    temperature,
    token_counts,
    top_h,
    top_k,
    top_n_sigma,
    top_p,
    typical_p,
)
from jaxsoft.decoding.truncation import basis_aware_accept, bregman_top_k

__all__ = [
    "AcceptanceState",
    "Beams",
    "EntropySwitch",
    "FusedLogits",
    "Resampled",
    "RollingEntropy",
    "Sample",
    "SoftNMS",
    "Speculation",
    "Transform",
    "TransformedLogits",
    "acceptance_stop",
    "adaptive_temperature",
    "allowed_token_ids",
    "argmax",
    "basis_aware_accept",
    "beam_step",
    "best_of_n_kl_bound",
    "best_of_n_kl_estimate",
    "best_of_n_policy",
    "bregman_top_k",
    "chain",
    "dynamic_logit_fusion",
    "entropy_stop",
    "entropy_switch",
    "epsilon_cutoff",
    "eta_cutoff",
    "fit_metric_energy",
    "frechet_mean_predict",
    "frequency_penalty",
    "guidance",
    "importance_resample",
    "knn_lm_interpolate",
    "log_prob",
    "logit_bias",
    "mask_logits",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "rolling_entropy",
    "sample",
    "sample_and_log_prob",
    "sample_without_replacement",
    "soft_nms",
    "softcap",
    "speculative_accept",
    "suppress_tokens",
    "temperature",
    "token_counts",
    "top_h",
    "top_k",
    "top_n_sigma",
    "top_p",
    "typical_p",
]
