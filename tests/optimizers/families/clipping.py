"""Clipping, skipped spikes, and the cautious mask."""

import functools

import optax
from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    # A sample of 65536 entries is sorted: two copies of it.
    "clip_by_quantile": Case(o.clip_by_quantile, exports=("clip_by_quantile",), temporary=0.15),
    "clip_by_quantile_global": Case(
        functools.partial(o.clip_by_quantile, 0.3, per_leaf=False), temporary=0.15
    ),
    # The window is a shape: `test_clipping.py` injects the percentile.
    "clip_by_percentile": Case(
        functools.partial(o.clip_by_percentile, 50.0, 8),
        converges=lambda lr: optax.chain(
            o.clip_by_percentile(50.0), optax.adam(lr, b2=0.9), optax.scale(2.0)
        ),
        exports=("clip_by_percentile",),
        injectable=False,
        spike=3.0,
    ),
    "spike_statistics": Case(o.spike_statistics, exports=("spike_statistics",)),
    "skip_spikes": Case(
        lambda: o.skip_spikes(o.scale_by_lion_k(kappa="sq"), warmup_steps=3),
        converges=lambda lr: optax.chain(o.skip_spikes(optax.adam(lr, b2=0.9)), optax.scale(2.0)),
        exports=("skip_spikes",),
        temporary=1.0,  # the old state is needed after the new one: a copy
        injectable=False,
        spike=3.0,
    ),
    "cautious": Case(
        lambda: o.cautious(o.scale_by_lion_k(kappa="sq"), ready=False),
        converges=lambda lr: optax.chain(
            o.cautious(optax.scale_by_adam(b2=0.9), ready=False),
            optax.scale_by_learning_rate(lr),
            optax.scale(2.0),
        ),
        exports=("cautious",),
        temporary=1.0,  # the inner direction, whose momentum is overwritten; `test_clipping.py` has one without
        injectable=False,
    ),
    "cautious_count": Case(
        lambda: o.cautious(o.scale_by_lion_k(kappa="sq"), ready=False, normalization="count"),
        temporary=1.0,
        injectable=False,
    ),
}
