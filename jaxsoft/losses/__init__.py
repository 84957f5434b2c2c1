"""Losses: pure functions `(logits, labels, ...) -> per-example values`, for dense and never-stored logits."""

from jaxsoft.losses._reduce import weighted_mean
from jaxsoft.losses.classification import (
    cross_entropy,
    dual_focal_loss,
    focal_loss,
    max_suppression_loss,
    poly1_cross_entropy,
    poly1_focal_loss,
    poly_loss,
)
from jaxsoft.losses.retrieval import decoupled_softmax_loss
from jaxsoft.losses.routing import importance_loss, load_balance_loss, modality_routing_kl, router_z_loss
from jaxsoft.losses.spherical import spherical_z_loss
from jaxsoft.rows._weighted import weighted_sum

__all__ = [
    "cross_entropy",
    "decoupled_softmax_loss",
    "dual_focal_loss",
    "focal_loss",
    "importance_loss",
    "load_balance_loss",
    "max_suppression_loss",
    "modality_routing_kl",
    "poly1_cross_entropy",
    "poly1_focal_loss",
    "poly_loss",
    "router_z_loss",
    "spherical_z_loss",
    "weighted_mean",
    "weighted_sum",
]
