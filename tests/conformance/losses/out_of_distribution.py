"""Energies and temperatures."""

import jax.numpy as jnp
import numpy as np

from conformance.entry import SUMS, Entry, loss_entry
from conformance.entry import statistic_entry as _statistic
from jaxsoft import losses

DRO = losses.dro_temperature_loss


def _energy(logits, inputs, *, where=None, axis=-1):
    is_out = inputs["reference"] > 0
    options = dict(m_in=-2.0, m_out=-6.0, temperature=inputs["temperature"], where=where, axis=axis)
    return losses.energy_margin_loss(logits, is_out, **options)


# Without labels: tests/losses/test_out_of_distribution.py has the laws of weights and bad arguments.
ENTRIES = [
    Entry(
        "jaxsoft.losses.energy_margin_loss",
        _energy,
        "",
        ("reference", "temperature"),
        second_order=False,
        low=3e-5,
    ),
    _statistic(losses.outlier_exposure_loss, "jaxsoft.losses", shift=0.0, huge=SUMS),
    loss_entry(DRO, arrays=["temperature"], rho=0.8),
]

BAD_OPTIONS = [
    (DRO, dict(rho=-1.0), ValueError, ["rho", ">= 0", "-1.0"]),
    (DRO, dict(rho=None), TypeError, ["rho", ">= 0", "None"]),
    (DRO, dict(temperature=0.0), ValueError, ["temperature", "> 0", "0.0"]),
    (DRO, dict(temperature=np.ones(6, np.float32)), ValueError, ["temperature", "(4,)", "(6,)"]),
    (DRO, dict(temperature=jnp.arange(4)), TypeError, ["temperature", "floating", "int32"]),
]
