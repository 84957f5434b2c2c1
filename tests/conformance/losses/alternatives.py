"""Squared error, and cross-entropies of other normalizers than softmax."""

from conformance.entry import loss_entry
from jaxsoft import losses

SPHERICAL, TAYLOR = losses.spherical_softmax_cross_entropy, losses.taylor_softmax_cross_entropy
SPARSE = losses.sparse_softmax_cross_entropy

ENTRIES = [
    loss_entry(losses.squared_error_loss, shift=None),
    loss_entry(SPHERICAL, shift=None),
    loss_entry(SPHERICAL, "eps=0", eps=0.0, shift=None, scale_invariant=True),
    loss_entry(TAYLOR, shift=None),
    loss_entry(TAYLOR, "order 4", order=4, shift=None),
    loss_entry(losses.stablemax_cross_entropy, shift=None),
    loss_entry(SPARSE, k=3),
]

BAD_OPTIONS = [
    (SPHERICAL, dict(eps=-1e-3), ValueError, ["eps", ">= 0", "-0.001"]),
    (SPHERICAL, dict(eps="x"), TypeError, ["eps", "number", "'x'"]),
    (TAYLOR, dict(order=3), ValueError, ["order", "even", "3"]),
    (TAYLOR, dict(order=0), ValueError, ["order", ">= 2", "0"]),
    (TAYLOR, dict(order=2.0), TypeError, ["order", "integer", "2.0"]),
    (SPARSE, dict(k=0), ValueError, ["k must be", ">= 1", "0"]),
    (SPARSE, dict(k=2.5), TypeError, ["k must be", "integer", "2.5"]),
]
