"""SPAM, Stable-SPAM and their parts."""

import functools

import optax
from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "scale_by_spam": Case(
        functools.partial(o.scale_by_spam, reset_every=4, warmup_steps=2, clip_start=2),
        exports=("scale_by_spam",),
    ),
    "spam": Case(
        functools.partial(o.spam, 1e-2, reset_every=4, warmup_steps=2, clip_start=2, weight_decay=0.1),
        ready=True,
        converges=lambda lr: o.spam(lr, warmup_steps=50),
        exports=("spam",),
        spike=3.0,
    ),
    "scale_by_stable_spam": Case(
        functools.partial(o.scale_by_stable_spam, reset_every=4, total_steps=50),
        exports=("scale_by_stable_spam",),
    ),
    "stable_spam": Case(
        functools.partial(o.stable_spam, 1e-2, reset_every=4, weight_decay=0.1),
        ready=True,
        converges=lambda lr: o.stable_spam(lr, reset_every=500, total_steps=4000),
        exports=("stable_spam",),
        spike=3.0,
    ),
    "spike_clip_by_second_moment": Case(
        functools.partial(o.spike_clip_by_second_moment, clip_start=2),
        exports=("spike_clip_by_second_moment",),
        spike=3.0,
    ),
    # AdaClip lets a thousandth of a spike through by design, on its own.
    "adaptive_spike_clip": Case(o.adaptive_spike_clip, exports=("adaptive_spike_clip",), spike=1e6 * 0.04),
    "adaptive_gradient_norm": Case(o.adaptive_gradient_norm, exports=("adaptive_gradient_norm",), spike=3.0),
    "momentum_reset": Case(
        lambda: o.momentum_reset(o.scale_by_lion_k(kappa="sq"), 4, 2),
        converges=lambda lr: optax.chain(o.momentum_reset(optax.adam(lr), 500, 50)),
        exports=("momentum_reset",),
        injectable=False,
    ),
}
