"""Multi-class hinge losses."""

from conformance.entry import loss_entry
from jaxsoft import losses

OVR, WW, CS = losses.one_vs_rest_hinge_loss, losses.weston_watkins_loss, losses.crammer_singer_loss

ENTRIES = [
    loss_entry(OVR, shift=None),
    loss_entry(OVR, "L1", power=1, penalty=0.5, shift=None),
    loss_entry(WW, margin=0.7),
    loss_entry(WW, "squared", power=2),
    loss_entry(CS),
    loss_entry(losses.perceptron_loss),
]

BAD_OPTIONS = [
    (OVR, dict(power=3), ValueError, ["power", "1, 2", "3"]),
    (OVR, dict(penalty=-1.0), ValueError, ["penalty", ">= 0", "-1.0"]),
    (OVR, dict(penalty=None), TypeError, ["penalty", "number", "None"]),
    (WW, dict(margin=-0.5), ValueError, ["margin", ">= 0", "-0.5"]),
    (WW, dict(power=1.5), ValueError, ["power", "1, 2", "1.5"]),
    (CS, dict(margin="1"), TypeError, ["margin", "number", "'1'"]),
    (CS, dict(margin=float("nan")), ValueError, ["margin", ">= 0", "nan"]),
]
