"""Regression by classification: the bins of a histogram have an order, so that their loss has laws of its own."""

from conformance.entry import Entry
from jaxsoft import losses


def _mean(logits, inputs, *, where=None, axis=-1):
    return losses.histogram_mean(logits, inputs["class_weights"], where=where, axis=axis)


ENTRIES = [Entry("jaxsoft.losses.histogram_mean", _mean, "", ("class_weights",), shift=0.0, least_columns=1)]

TESTED_IN = {
    "tests/losses/test_histogram.py": (
        "jaxsoft.losses: bin_centers categorical_projection_targets hl_gauss_targets histogram_loss two_hot_targets"
    ),
}
