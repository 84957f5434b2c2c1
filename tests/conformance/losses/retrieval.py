"""Losses over many positives a row."""

from conformance.entry import loss_entry
from jaxsoft import losses

ENTRIES = [
    loss_entry(losses.decoupled_softmax_loss, labels="positives", thorough=True),
    loss_entry(losses.decoupled_softmax_loss, "mask", labels="positive_mask"),
]
