"""One binary problem per class, or one against each other class."""

import numpy as np

from conformance.entry import loss_entry
from jaxsoft import losses

REST, FOCAL, GUMBEL, EACH = (
    losses.one_vs_rest_cross_entropy,
    losses.sigmoid_focal_loss,
    losses.gumbel_optimized_loss,
    losses.one_vs_each_loss,
)


def _entry(function, *args, **options):
    return loss_entry(function, *args, **{"shift": None, **options})


ENTRIES = [
    _entry(REST),
    _entry(REST, "weighted", arrays=["class_weights"]),
    _entry(REST, "soft", "soft"),
    _entry(FOCAL, alpha=0.25),
    _entry(FOCAL, "soft", "soft", gamma=1.5, arrays=["class_weights"]),
    _entry(GUMBEL, high=4.0, cap=12.0),
    _entry(GUMBEL, "soft", "soft", arrays=["class_weights"]),
    _entry(EACH, shift=0.0),
]
SOFT = [REST, FOCAL, GUMBEL]
TESTED_IN = {"tests/losses/test_binary.py": "jaxsoft.losses: quality_focal_loss"}

C = 6
ONES, X = np.ones(4, np.float32), np.ones((4, C), np.float32)
BAD_OPTIONS = [
    (REST, dict(class_weights=ONES), ValueError, ["class_weights", "(6,)", "(4,)"]),
    (REST, dict(class_weights=X), ValueError, ["class_weights", "(6,)", "(4, 6)"]),
    (REST, dict(class_weights=np.arange(C)), TypeError, ["class_weights", "floating", "int64"]),
    (FOCAL, dict(alpha=1.5), ValueError, ["alpha", ">= 0 and <= 1", "1.5"]),
    (FOCAL, dict(alpha="a"), TypeError, ["alpha", ">= 0 and <= 1", "'a'"]),
    (FOCAL, dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
    (GUMBEL, dict(low=-100.0), ValueError, ["low", ">= -80", "-100.0"]),
    (GUMBEL, dict(high=100.0), ValueError, ["high", "<= 80", "100.0"]),
    (GUMBEL, dict(cap=0.0), ValueError, ["cap", "> 0", "0.0"]),
    (GUMBEL, dict(low=None), TypeError, ["low", "number", "None"]),
]
