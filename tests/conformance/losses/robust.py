"""Losses for wrong labels and for adversarial examples."""

import functools

from conformance.entry import SUMS, loss_entry
from jaxsoft import losses


def with_labels_second(loss):
    """A loss `(logits, adversarial_logits, labels)` with the adversarial logits as an option."""

    @functools.wraps(loss)
    def call(logits, labels, *, adversarial_logits, **options):
        return loss(logits, adversarial_logits, labels, **options)

    return call


@functools.wraps(losses.normalized_loss)
def NORMALIZED(logits, labels, *, kind=None, **options):
    """The loss with its option `loss`, which is the name of a field of entries, under another name."""
    return losses.normalized_loss(logits, labels, **({} if kind is None else {"loss": kind}), **options)


ADVERSARIAL = {"adversarial_logits": "teacher"}
COMP_SUM, GCE, SCE = losses.comp_sum_loss, losses.generalized_cross_entropy, losses.symmetric_cross_entropy
MAE, RCE = losses.mean_absolute_error_loss, losses.reverse_cross_entropy
APL = losses.active_passive_loss
SMOOTH = with_labels_second(losses.smooth_adversarial_comp_sum_loss)
TRADES = with_labels_second(losses.trades_loss)

ENTRIES = [
    loss_entry(COMP_SUM, tau=1.5),
    loss_entry(COMP_SUM, "exponential", tau=0.25),
    loss_entry(GCE),
    loss_entry(MAE),
    loss_entry(RCE),
    loss_entry(SCE),
    loss_entry(NORMALIZED, huge=SUMS),
    loss_entry(NORMALIZED, "focal", kind="focal"),
    loss_entry(NORMALIZED, "generalized", thorough=True, kind="generalized"),
    loss_entry(NORMALIZED, "mae", kind="mae"),
    loss_entry(APL, huge=SUMS),
    loss_entry(APL, "focal", active="focal", passive="reverse", alpha=10.0, beta=0.1),
    loss_entry(SMOOTH, thorough=True, arrays=ADVERSARIAL, tau=1.5, nu=2.0, huge=SUMS),
    loss_entry(TRADES, arrays=ADVERSARIAL, huge=SUMS),
    loss_entry(TRADES, "soft", "soft", arrays=ADVERSARIAL, huge=SUMS),
]

SOFT = [TRADES]

BAD_OPTIONS = [
    (COMP_SUM, dict(tau=-0.5), ValueError, ["tau", ">= 0", "-0.5"]),
    (COMP_SUM, dict(tau=None), TypeError, ["tau", ">= 0", "None"]),
    (GCE, dict(q=-0.1), ValueError, ["q", ">= 0", "-0.1"]),
    (GCE, dict(q="0.7"), TypeError, ["q", ">= 0", "'0.7'"]),
    (RCE, dict(label_floor=0.0), ValueError, ["label_floor", "> 0 and < 1", "0.0"]),
    (RCE, dict(label_floor=1.0), ValueError, ["label_floor", "> 0 and < 1", "1.0"]),
    (SCE, dict(alpha=-1.0), ValueError, ["alpha", ">= 0", "-1.0"]),
    (SCE, dict(beta=-1.0), ValueError, ["beta", ">= 0", "-1.0"]),
    (SCE, dict(label_floor="x"), TypeError, ["label_floor", "> 0 and < 1", "'x'"]),
    (NORMALIZED, dict(loss="ce"), ValueError, ["loss", "'cross_entropy', 'focal', 'generalized'", "'ce'"]),
    (NORMALIZED, dict(q=0.0), ValueError, ["q", "> 0", "0.0"]),
    (NORMALIZED, dict(gamma=-0.5), ValueError, ["gamma", ">= 0", "-0.5"]),
    (APL, dict(active="mae"), ValueError, ["active", "'cross_entropy', 'focal', 'generalized'", "'mae'"]),
    (APL, dict(passive="focal"), ValueError, ["passive", "'mae', 'reverse'", "'focal'"]),
    (APL, dict(alpha=-1.0), ValueError, ["alpha", ">= 0", "-1.0"]),
    (APL, dict(beta=None), TypeError, ["beta", ">= 0", "None"]),
    (APL, dict(q=-1.0), ValueError, ["q", "> 0", "-1.0"]),
    (APL, dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
    (APL, dict(label_floor=2.0), ValueError, ["label_floor", "> 0 and < 1", "2.0"]),
    (SMOOTH, dict(tau=-1.0), ValueError, ["tau", ">= 0", "-1.0"]),
    (SMOOTH, dict(nu=-1.0), ValueError, ["nu", ">= 0", "-1.0"]),
    (TRADES, dict(beta=-1.0), ValueError, ["beta", ">= 0", "-1.0"]),
]
