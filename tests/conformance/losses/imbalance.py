"""Cross-entropies with margins, for classes of unequal size or spread."""

import numpy as np

from conformance.entry import loss_entry
from jaxsoft import losses

ADJUSTED, NOISY, EMMA = (
    losses.logit_adjusted_cross_entropy,
    losses.noisy_softmax_cross_entropy,
    losses.emma_loss,
)
# A radius so small that no margin is between its bounds, where it is a constant to the gradient.
ENTRIES = [
    loss_entry(ADJUSTED, tau=0.7, arrays=["priors"]),
    loss_entry(ADJUSTED, "counts", arrays={"class_counts": "class_weights"}),
    loss_entry(NOISY, arrays={"norm_product": "temperature"}, key=None),
    loss_entry(EMMA, arrays={"margin_lipschitz": "soft"}, radius=1e-3),
    loss_entry(EMMA, "columns", arrays={"margin_lipschitz": "class_weights"}, radius=1e-3),
]
TESTED_IN = {
    "tests/losses/test_imbalance.py": "jaxsoft.losses: adaptive_margin_cross_entropy class_balanced_weights",
}

C = 6
ONES, X = np.ones(4, np.float32), np.ones((4, C), np.float32)
BAD_OPTIONS = [
    (ADJUSTED, dict(tau=-1.0), ValueError, ["tau", ">= 0", "-1.0"]),
    (ADJUSTED, dict(tau=None), TypeError, ["tau", ">= 0", "None"]),
    (ADJUSTED, dict(priors=None), ValueError, ["priors", "class_counts", "neither"]),
    (ADJUSTED, dict(class_counts=np.ones(C)), ValueError, ["priors", "class_counts", "both"]),
    (ADJUSTED, dict(priors=ONES), ValueError, ["priors", "(6,)", "(4,)"]),
    (ADJUSTED, dict(priors=X), ValueError, ["priors", "(6,)", "(4, 6)"]),
    (ADJUSTED, dict(priors=np.arange(C)), TypeError, ["priors", "floating", "int64"]),
    (ADJUSTED, dict(priors=[0.5] * C), TypeError, ["priors", "floating", "of type list"]),
    (ADJUSTED, dict(priors=None, class_counts=ONES), ValueError, ["class_counts", "(6,)", "(4,)"]),
    (ADJUSTED, dict(priors=None, class_counts=X[0] > 0), TypeError, ["class_counts", "numbers", "bool"]),
    (NOISY, dict(alpha=-1.0), ValueError, ["alpha", ">= 0", "-1.0"]),
    (NOISY, dict(norm_product=X), ValueError, ["norm_product", "(4,)", "(4, 6)"]),
    (NOISY, dict(norm_product=2.0), TypeError, ["norm_product", "floating", "2.0"]),
    (EMMA, dict(radius=-1.0), ValueError, ["radius", ">= 0", "-1.0"]),
    (EMMA, dict(radius="a"), TypeError, ["radius", ">= 0", "'a'"]),
    (EMMA, dict(margin_lipschitz=ONES), ValueError, ["margin_lipschitz", "(6,)", "(4,)"]),
    (EMMA, dict(margin_lipschitz=X[:, :5]), ValueError, ["margin_lipschitz", "(4, 6)", "(4, 5)"]),
    (EMMA, dict(margin_lipschitz=1.0), TypeError, ["margin_lipschitz", "floating", "1.0"]),
]
