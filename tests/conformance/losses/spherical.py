"""The spherical family."""

from conformance.entry import loss_entry
from jaxsoft import losses

ENTRIES = [
    loss_entry(losses.spherical_z_loss, scale_invariant=True, low=2e-5),
    loss_entry(losses.spherical_z_loss, "a,b", a=0.5, b=2.0, scale_invariant=True, low=2e-5, thorough=True),
]

BAD_OPTIONS = [
    (losses.spherical_z_loss, dict(a=0.0), ValueError, ["a must be", "> 0", "0.0"]),
    (losses.spherical_z_loss, dict(b="b"), TypeError, ["b must be", "number", "'b'"]),
    (losses.spherical_z_loss, dict(eps=-1.0), ValueError, ["eps", ">= 0", "-1.0"]),
]
