"""Proper scores, the entropy bonus, and scores of how hard an example is."""

from conformance.entry import SUMS, loss_entry
from conformance.losses.robust import ADVERSARIAL, with_labels_second
from jaxsoft import losses

BRIER, SPHERICAL = losses.brier_loss, losses.spherical_score_loss
SCORE = with_labels_second(losses.adversarial_brier_loss)
PENALTY, EL2N = losses.confidence_penalty_loss, losses.el2n_score

ENTRIES = [
    loss_entry(BRIER, thorough=True),
    loss_entry(BRIER, "soft", "soft"),
    loss_entry(SCORE, arrays=ADVERSARIAL),
    loss_entry(SCORE, "soft", "soft", arrays=ADVERSARIAL),
    loss_entry(SPHERICAL),
    loss_entry(PENALTY, low=2e-5),
    loss_entry(PENALTY, "soft", "soft", low=2e-5, huge=SUMS),
    loss_entry(EL2N),
    loss_entry(EL2N, "soft", "soft"),
    loss_entry(EL2N, "l1", norm="l1"),
    loss_entry(EL2N, "l1-soft", "soft", norm="l1", second_order=False),
    loss_entry(EL2N, "margin", norm="margin", second_order=False),
]

SOFT = [BRIER, SCORE, PENALTY, EL2N]

# A function of features beside the logits, and one of parameters.
TESTED_IN = {"tests/losses/test_scoring.py": "jaxsoft.losses: grand_score grand_score_linear"}

BAD_OPTIONS = [
    (SCORE, dict(beta=-1.0), ValueError, ["beta", ">= 0", "-1.0"]),
    (PENALTY, dict(beta="0.1"), TypeError, ["beta", "number", "'0.1'"]),
    (PENALTY, dict(beta=float("nan")), ValueError, ["beta", "number", "nan"]),
    (EL2N, dict(norm="l3"), ValueError, ["norm", "'l2', 'l1', 'margin'", "'l3'"]),
]
