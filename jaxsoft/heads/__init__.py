"""Output layers for huge vocabularies.

Heads whose loss is exact without reading all classes (the spherical head, VQ-Logits), or reads a sample of them
(Partial FC, sampled softmax and bounds). The guide "Huge vocabularies" says which one suits which task, and what it
costs. A head that reads all classes, without storing their logits, is `linear_logits` with any loss.
"""

from __future__ import annotations

from jaxsoft.heads.partial import (
    ClassSample,
    partial_fc_loss,
    sample_classes,
    sampled_margin_loss,
    sampled_update,
)
from jaxsoft.heads.quantized import (
    vq_codebook,
    vq_cross_entropy,
    vq_logits,
    vq_top_k,
)
from jaxsoft.heads.sampled import (
    AugmentAndReduce,
    augment_and_reduce_bound,
    latent_augment_and_reduce_bound,
    one_vs_each_bound,
    sampled_softmax_loss,
)
from jaxsoft.heads.shortlist import (
    ShortlistHead,
    shortlist_cross_entropy,
    shortlist_head,
    shortlist_top_k,
)
from jaxsoft.heads.spherical import (
    SphericalHead,
    SphericalStatistics,
    spherical_head,
    spherical_loss,
    spherical_refresh,
    spherical_statistics,
    spherical_top_k,
    spherical_update,
)

__all__ = [
    "AugmentAndReduce",
    "ClassSample",
    "ShortlistHead",
    "SphericalHead",
    "SphericalStatistics",
    "augment_and_reduce_bound",
    "latent_augment_and_reduce_bound",
    "one_vs_each_bound",
    "partial_fc_loss",
    "sample_classes",
    "sampled_margin_loss",
    "sampled_softmax_loss",
    "sampled_update",
    "shortlist_cross_entropy",
    "shortlist_head",
    "shortlist_top_k",
    "spherical_head",
    "spherical_loss",
    "spherical_refresh",
    "spherical_statistics",
    "spherical_top_k",
    "spherical_update",
    "vq_codebook",
    "vq_cross_entropy",
    "vq_logits",
    "vq_top_k",
]
