"""Losses over many positives per row."""

import dataclasses

import numpy as np

from conformance.entry import Entry, loss_entry
from jaxsoft import losses

SOFTMAX, TOP_K = losses.multi_positive_softmax_loss, losses.soft_top_k_loss


def _with_k_below_columns(entry):
    """The entry with its k, or for short rows one that is below their length."""

    def call(logits, inputs, *, axis=-1, **options):
        k = min(3, logits.shape[axis] - 0.5)
        return entry.call(logits, inputs, axis=axis, k=k, **options)

    return dataclasses.replace(entry, call=call, options=dict(k=3))


def _soft_top_k(logits, inputs, *, where=None, axis=-1):
    k = min(3, logits.shape[axis] - 0.5)
    return losses.soft_top_k(logits, k, alpha=1.5, where=where, axis=axis)


ENTRIES = [
    loss_entry(SOFTMAX, labels="positives", thorough=True),
    loss_entry(SOFTMAX, "sum", labels="positives", reduction="sum"),
    loss_entry(SOFTMAX, "mask", labels="positive_mask"),
    loss_entry(losses.decoupled_softmax_loss, labels="positives", thorough=True),
    loss_entry(losses.decoupled_softmax_loss, "mask", labels="positive_mask"),
    _with_k_below_columns(loss_entry(TOP_K, labels="positives", least_columns=1, thorough=True)),
    _with_k_below_columns(loss_entry(TOP_K, "mask", labels="positive_mask", least_columns=1)),
    loss_entry(TOP_K, "k<1", labels="positives", k=0.6, alpha=0.7, least_columns=1),
    Entry("jaxsoft.losses.soft_top_k", _soft_top_k, dense_only=True, shift=0.0, low=1e-2, least_columns=1),
]

ONES = np.ones(4, np.float32)
BAD_OPTIONS = [
    (SOFTMAX, dict(reduction="none"), ValueError, ["reduction", "'mean', 'sum'", "'none'"]),
    (TOP_K, dict(k=0), ValueError, ["k must be", "> 0", "0.0"]),
    (TOP_K, dict(k=6), ValueError, ["k must be less", "6", "got 6"]),
    (TOP_K, dict(k="2"), TypeError, ["k must be", "'2'"]),
    (TOP_K, dict(k=np.ones(3, np.float32)), ValueError, ["k must", "(4,)", "(3,)"]),
    (TOP_K, dict(alpha=0.0), ValueError, ["alpha", "> 0", "0.0"]),
    (TOP_K, dict(alpha=ONES), TypeError, ["alpha", "number", "(4,)"]),
]

TESTED_IN = {"tests/losses/test_multi_positive.py": "jaxsoft.losses: proxy_anchor_loss"}
