"""Weights of examples and classes."""

import jax.numpy as jnp

from conformance.entry import Entry, loss_entry
from jaxsoft import losses


def _shrink(logits, inputs, *, where=None, axis=-1):
    weak = jnp.moveaxis(inputs["soft"], -1, axis)
    return losses.shrink_class_space_loss(logits, weak, threshold=0.6, where=where, axis=axis)


# Their labels are distributions alone: tests/losses/test_weighting.py has the laws of weights and bad arguments,
# and the gradients.
ENTRIES = [
    loss_entry(
        losses.easy_llp_loss,
        labels="soft",
        arrays=["priors"],
        bag_size=4,
        low=2e-5,
        loss=False,
    ),
    # The probabilities, which the other laws take from the inputs, are no arguments to differentiate.
    Entry(
        "jaxsoft.losses.shrink_class_space_loss",
        _shrink,
        "",
        ("soft",),
        shift=0.0,
        differentiable=False,
    ),
]
TESTED_IN = {
    "tests/losses/test_weighting.py": (
        "jaxsoft.losses: easy_llp_weights feasible_dual_update feasible_learning_loss loss_based_weights"
    ),
}
