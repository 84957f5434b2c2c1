"""The divergence of two rows of logits; the others are functions of samples, or of numbers."""

import jax.numpy as jnp

from conformance.entry import SUMS, Entry
from jaxsoft import losses


def _cauchy_schwarz(logits, inputs, *, where=None, axis=-1):
    other = inputs["teacher"]
    other = other if axis == -1 else jnp.moveaxis(other, -1, axis)
    return losses.cauchy_schwarz_divergence(logits, other, where=where, axis=axis)


ENTRIES = [
    Entry(
        "jaxsoft.losses.cauchy_schwarz_divergence",
        _cauchy_schwarz,
        "",
        ("teacher",),
        shift=0.0,
        low=2e-5,
        huge=2 * SUMS,  # of the sum of the two logits, which counts twice
    ),
]
TESTED_IN = {
    "tests/losses/test_divergences.py": (
        "jaxsoft.losses: distance_covariance gumbel_regression_loss kernel_cauchy_schwarz_divergence "
        "marginal_consistency_loss optimal_mmd_weights residual_ebm_loss target_surrogate_loss weighted_mmd"
    ),
}
