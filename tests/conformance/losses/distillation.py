"""Losses that compare a row with a teacher's row."""

from conformance.entry import loss_entry
from jaxsoft import losses

KD, ALPHA = losses.distillation_loss, losses.alpha_divergence
LTD, ADAPTIVE = losses.low_temperature_distillation_loss, losses.adaptive_alpha_divergence_loss
PSKD, BCKD, SEL = (
    losses.progressive_self_distillation_loss,
    losses.binary_distillation_loss,
    losses.squared_log_prob_loss,
)


def _entry(function, variant="", **options):
    return loss_entry(function, variant, "teacher", **options)


ENTRIES = [
    # A teacher that is no constant has its derivatives tested too.
    _entry(KD, stop_teacher_gradient=False, low=1e-5),
    _entry(KD, "temperature", temperature=2.0, stop_teacher_gradient=False, low=1e-5),
    _entry(KD, "reverse", divergence="reverse_kl", stop_teacher_gradient=False, low=1e-5),
    _entry(KD, "jensen-shannon", divergence="jensen_shannon", stop_teacher_gradient=False, low=1e-5),
    _entry(
        KD, "total-variation", divergence="total_variation", stop_teacher_gradient=False, second_order=False
    ),
    _entry(ALPHA, alpha=-1.0, stop_teacher_gradient=False, low=1e-4, huge=1e-5),
    _entry(ALPHA, "0.5", alpha=0.5, stop_teacher_gradient=False, low=1e-5),
    _entry(BCKD, shift=None, constants=("teacher",), low=1e-5),
    loss_entry(PSKD, arrays={"previous": "soft"}, alpha=0.4, constants=("soft",)),
    loss_entry(SEL, arrays={"teacher_log_prob": "reference"}, low=1e-5),
]

TESTED_IN = {
    "tests/losses/test_distillation.py": (
        "jaxsoft.losses: adapt_soft_labels adaptive_alpha_divergence_loss dynamic_contrastive_distillation_loss "
        "ensemble_distillation_loss graph_on_logits_loss low_temperature_distillation_loss "
        "prototype_relation_distillation_loss top_k_distillation_loss"
    ),
}

BAD_OPTIONS = [
    (KD, dict(temperature=0.0), ValueError, ["temperature", "> 0", "0.0"]),
    (KD, dict(temperature=None), TypeError, ["temperature", "number", "None"]),
    (KD, dict(divergence="kl"), ValueError, ["divergence", "'forward_kl'", "'kl'"]),
    (ALPHA, dict(alpha="1"), TypeError, ["alpha", "number", "'1'"]),
    (ALPHA, dict(clip=0.0), ValueError, ["clip", "> 0", "0.0"]),
    (BCKD, dict(beta=-1.0), ValueError, ["beta", ">= 0", "-1.0"]),
    (PSKD, dict(alpha=1.5), ValueError, ["alpha", ">= 0 and <= 1", "1.5"]),
]
