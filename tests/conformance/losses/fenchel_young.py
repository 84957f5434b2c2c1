"""Fenchel-Young losses of sparsemax and entmax."""

from conformance.entry import loss_entry
from jaxsoft import losses

ENTMAX, ENTMAX15, SPARSEMAX = losses.entmax_loss, losses.entmax15_loss, losses.sparsemax_loss

ENTRIES = [
    loss_entry(SPARSEMAX),
    loss_entry(SPARSEMAX, "soft", "soft"),
    loss_entry(ENTMAX15),
    loss_entry(ENTMAX, alpha=1.25),
    loss_entry(ENTMAX, "soft", "soft", alpha=1.7),
]

SOFT = [ENTMAX, ENTMAX15, SPARSEMAX]

BAD_OPTIONS = [
    (ENTMAX, dict(alpha=0.5), ValueError, ["alpha", ">= 1", "0.5"]),
    (ENTMAX, dict(alpha=None), TypeError, ["alpha", "number", "None"]),
    (ENTMAX, dict(alpha=float("nan")), ValueError, ["alpha", ">= 1", "nan"]),
]
