"""Cross-entropy and the losses that are functions of it."""

import numpy as np

from conformance.entry import SUMS, loss_entry
from jaxsoft import losses

CE, FOCAL, DUAL = losses.cross_entropy, losses.focal_loss, losses.dual_focal_loss

ENTRIES = [
    loss_entry(CE, thorough=True),
    loss_entry(CE, "soft", "soft", label_smoothing=0.1, z_loss=0.01, shift=None, huge=SUMS, thorough=True),
    loss_entry(CE, "smooth", label_smoothing=0.1, z_loss=0.01, shift=None, huge=SUMS),
    loss_entry(CE, "others", label_smoothing=0.1, smoothing="others", huge=SUMS),
    loss_entry(CE, "weighted", label_smoothing=0.1, arrays=["class_weights"], huge=SUMS),
    loss_entry(
        CE,
        "weighted-others",
        label_smoothing=0.1,
        smoothing="others",
        arrays=["class_weights"],
        huge=SUMS,
        thorough=True,
    ),
    loss_entry(losses.poly_loss, epsilon=(0.5, -0.2, 0.1), thorough=True),
    loss_entry(losses.poly_loss, "soft", "soft", label_smoothing=0.1, low=2e-5, huge=SUMS),
    loss_entry(losses.poly1_cross_entropy, epsilon=-1.0),
    loss_entry(FOCAL, gamma=2.0),
    loss_entry(FOCAL, "weighted", gamma=1.5, arrays=["class_weights"]),
    loss_entry(losses.poly1_focal_loss),
    loss_entry(DUAL, second_order=False, jumps=True),
    loss_entry(losses.max_suppression_loss, huge=SUMS, second_order=False, thorough=True),
    loss_entry(losses.logit_penalty_loss, penalty=0.1, shift=None),
]

# Losses that take label distributions, too.
SOFT = [CE, losses.poly_loss, losses.poly1_cross_entropy]

C = 6
ONES, X = np.ones(4, np.float32), np.ones((4, C), np.float32)
BAD_OPTIONS = [
    (CE, dict(label_smoothing=-0.1), ValueError, ["label_smoothing", ">= 0 and <= 1", "-0.1"]),
    (CE, dict(label_smoothing=1.5), ValueError, ["label_smoothing", ">= 0 and <= 1", "1.5"]),
    (CE, dict(label_smoothing=float("nan")), ValueError, ["label_smoothing", ">= 0 and <= 1", "nan"]),
    (CE, dict(label_smoothing="0.1"), TypeError, ["label_smoothing", "number", "'0.1'"]),
    (CE, dict(label_smoothing=True), TypeError, ["label_smoothing", "number", "True"]),
    (CE, dict(label_smoothing=ONES), TypeError, ["label_smoothing", "number", "(4,)"]),
    (CE, dict(label_smoothing=None), TypeError, ["label_smoothing", "number", "None"]),
    (CE, dict(smoothing="other"), ValueError, ["smoothing", "'uniform', 'others'", "'other'"]),
    (CE, dict(smoothing=None), ValueError, ["smoothing", "'uniform', 'others'", "None"]),
    (CE, dict(z_loss=-1e-4), ValueError, ["z_loss", ">= 0", "-0.0001"]),
    (CE, dict(z_loss="1e-4"), TypeError, ["z_loss", ">= 0", "'1e-4'"]),
    (CE, dict(class_weights=ONES), ValueError, ["class_weights", "(6,)", "(4,)"]),
    (CE, dict(class_weights=X), ValueError, ["class_weights", "(6,)", "(4, 6)"]),
    (CE, dict(class_weights=np.arange(C)), TypeError, ["class_weights", "floating", "int64"]),
    (CE, dict(class_weights=[1.0] * C), TypeError, ["class_weights", "floating", "of type list"]),
    (FOCAL, dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
    (FOCAL, dict(gamma=None), TypeError, ["gamma", ">= 0", "None"]),
    (FOCAL, dict(class_weights=ONES), ValueError, ["class_weights", "(6,)", "(4,)"]),
    (FOCAL, dict(class_weights=np.arange(C)), TypeError, ["class_weights", "floating", "int64"]),
    (DUAL, dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
    (losses.poly1_focal_loss, dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
    (losses.poly1_focal_loss, dict(epsilon="x"), TypeError, ["epsilon", "number", "'x'"]),
    (losses.poly1_cross_entropy, dict(epsilon=(1.0, 2.0)), TypeError, ["epsilon", "number", "(1.0, 2.0)"]),
    (losses.poly_loss, dict(epsilon=(1.0, "b")), TypeError, ["epsilon[1]", "number", "'b'"]),
    (losses.poly_loss, dict(epsilon=None), TypeError, ["epsilon", "number", "None"]),
    (losses.poly_loss, dict(label_smoothing=2), ValueError, ["label_smoothing", ">= 0 and <= 1", "2"]),
    (losses.max_suppression_loss, dict(suppression=-0.1), ValueError, ["suppression", ">= 0", "-0.1"]),
    (losses.logit_penalty_loss, dict(penalty=-0.1), ValueError, ["penalty", ">= 0", "-0.1"]),
]
