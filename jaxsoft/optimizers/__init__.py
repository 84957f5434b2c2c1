"""Optimizers as optax gradient transformations.

`scale_by_*` and the parts give a direction (no learning rate, no sign) and go into `optax.chain`; `lion_k`,
`spam` and `stable_spam` are ready optimizers with decoupled weight decay.
"""

from __future__ import annotations

from jaxsoft.optimizers.lion import (
    kappa_entropic,
    kappa_group_l2,
    kappa_huber,
    kappa_lp,
    kappa_nuclear,
    kappa_soft,
    lion_k,
    scale_by_lion_k,
)
from jaxsoft.optimizers.perpendicular import perpendicular_gradient
from jaxsoft.optimizers.spike_aware import (
    AdaptiveGradientNormState,
    AdaptiveSpikeClipState,
    MomentumResetState,
    ScaleBySpamState,
    ScaleByStableSpamState,
    SpikeClipBySecondMomentState,
    adaptive_gradient_norm,
    adaptive_spike_clip,
    momentum_reset,
    scale_by_spam,
    scale_by_stable_spam,
    spam,
    spike_clip_by_second_moment,
    stable_spam,
)

__all__ = [
    "AdaptiveGradientNormState",
    "AdaptiveSpikeClipState",
    "MomentumResetState",
    "ScaleBySpamState",
    "ScaleByStableSpamState",
    "SpikeClipBySecondMomentState",
    "adaptive_gradient_norm",
    "adaptive_spike_clip",
    "kappa_entropic",
    "kappa_group_l2",
    "kappa_huber",
    "kappa_lp",
    "kappa_nuclear",
    "kappa_soft",
    "lion_k",
    "momentum_reset",
    "perpendicular_gradient",
    "scale_by_lion_k",
    "scale_by_spam",
    "scale_by_stable_spam",
    "spam",
    "spike_clip_by_second_moment",
    "stable_spam",
]
