"""Losses of ranking and recommendation."""

import numpy as np

from conformance.entry import SUMS, loss_entry
from jaxsoft import losses

PSL, SL = losses.pairwise_softmax_loss, losses.softmax_loss
BSL, SL_AT_K = losses.bilateral_softmax_loss, losses.softmax_loss_at_k

ENTRIES = [
    loss_entry(PSL, temperature=0.5),
    loss_entry(PSL, "relu", activation="relu", temperature=0.5),
    loss_entry(PSL, "atan", activation="atan", temperature=0.5),
    loss_entry(SL, temperature=0.7, huge=SUMS),
    loss_entry(BSL, positive_temperature=0.7, negative_temperature=0.5),
    # With a quantile that is given: one that is taken from the row has a value, but no derivative (test_ranking.py).
    loss_entry(
        SL_AT_K,
        arrays={"quantile": "reference"},
        temperature=0.5,
        weight_temperature=2.25,
        shift=None,
        huge=SUMS,
    ),
]

X = np.ones((4, 6), np.float32)
BAD_OPTIONS = [
    (PSL, dict(activation="sigmoid"), ValueError, ["activation", "'tanh'", "'exp'", "'sigmoid'"]),
    (PSL, dict(temperature=0.0), ValueError, ["temperature", "> 0", "0.0"]),
    (PSL, dict(temperature="1"), TypeError, ["temperature", "number", "'1'"]),
    (SL, dict(temperature=-1.0), ValueError, ["temperature", "> 0", "-1.0"]),
    (BSL, dict(positive_temperature=0.0), ValueError, ["positive_temperature", "> 0", "0.0"]),
    (BSL, dict(negative_temperature=None), TypeError, ["negative_temperature", "> 0", "None"]),
    (SL_AT_K, dict(k=0), ValueError, ["k must be", ">= 1", "0"]),
    (SL_AT_K, dict(k=2.0), TypeError, ["k must be", "static integer", "2.0"]),
    (SL_AT_K, dict(temperature=0.0), ValueError, ["temperature", "> 0", "0.0"]),
    (SL_AT_K, dict(weight_temperature=0.0), ValueError, ["weight_temperature", "> 0", "0.0"]),
    (SL_AT_K, dict(quantile=X), ValueError, ["quantile", "(4,)", "(4, 6)"]),
    (SL_AT_K, dict(quantile=np.arange(4)), TypeError, ["quantile", "floating", "int64"]),
]

TESTED_IN = {
    "tests/losses/test_ranking.py": "jaxsoft.losses: approx_ndcg_loss list_mle_loss pairwise_logistic_loss"
}
