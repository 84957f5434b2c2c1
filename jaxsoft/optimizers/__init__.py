"""Optimizers as optax gradient transformations.

`scale_by_*` and the parts give a direction (no learning rate, no sign) and go into `optax.chain`; `lion_k`,
`spam` and `stable_spam` are ready optimizers with decoupled weight decay.
"""

from __future__ import annotations

from jaxsoft.optimizers.diffgrad import (
    ScaleByDiffgradState,
    diffgrad,
    scale_by_diffgrad,
)
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
from jaxsoft.optimizers.low_rank import (
    LimitNormGrowthState,
    ScaleByFiraState,
    fira,
    limit_norm_growth,
    scale_by_fira,
)
from jaxsoft.optimizers.model_building import (
    StochasticModelBuildingState,
    scale_by_truncated_model,
    stochastic_model_building,
)
from jaxsoft.optimizers.perpendicular import (
    perpendicular_gradient,
)
from jaxsoft.optimizers.radial import (
    adamp,
    project_out_radial,
    scale_by_adamp,
    scale_by_sgdp,
    sgdp,
)
from jaxsoft.optimizers.second_order import (
    ScaleByMfacState,
    ScaleByShampooState,
    gradient_regularized_newton_step,
    scale_by_mfac,
    scale_by_shampoo,
    shampoo,
)
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
from jaxsoft.optimizers.zeroth_order import (
    Mezo,
    MezoState,
    forward_gradient,
    mezo,
    quantize_projection,
    random_direction,
    shared_randomness_update,
    zo_projection,
    zo_value_and_grad,
)

__all__ = [
    "AdaptiveGradientNormState",
    "AdaptiveSpikeClipState",
    "LimitNormGrowthState",
    "Mezo",
    "MezoState",
    "MomentumResetState",
    "ScaleByDiffgradState",
    "ScaleByFiraState",
    "ScaleByMfacState",
    "ScaleByShampooState",
    "ScaleBySpamState",
    "ScaleByStableSpamState",
    "SpikeClipBySecondMomentState",
    "StochasticModelBuildingState",
    "adamp",
    "adaptive_gradient_norm",
    "adaptive_spike_clip",
    "diffgrad",
    "fira",
    "forward_gradient",
    "gradient_regularized_newton_step",
    "kappa_entropic",
    "kappa_group_l2",
    "kappa_huber",
    "kappa_lp",
    "kappa_nuclear",
    "kappa_soft",
    "limit_norm_growth",
    "lion_k",
    "mezo",
    "momentum_reset",
    "perpendicular_gradient",
    "project_out_radial",
    "quantize_projection",
    "random_direction",
    "scale_by_adamp",
    "scale_by_diffgrad",
    "scale_by_fira",
    "scale_by_lion_k",
    "scale_by_mfac",
    "scale_by_sgdp",
    "scale_by_shampoo",
    "scale_by_spam",
    "scale_by_stable_spam",
    "scale_by_truncated_model",
    "sgdp",
    "shampoo",
    "shared_randomness_update",
    "spam",
    "spike_clip_by_second_moment",
    "stable_spam",
    "stochastic_model_building",
    "zo_projection",
    "zo_value_and_grad",
]
