"""AdamP, SGDP and the projection around any transformation."""

import functools

import optax
from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "scale_by_adamp": Case(o.scale_by_adamp, exports=("scale_by_adamp",)),
    "adamp": Case(
        functools.partial(o.adamp, 1e-2, delta=10.0, weight_decay=0.1, nesterov=True),
        ready=True,
        converges=lambda lr: o.adamp(lr, b2=0.99),
        exports=("adamp",),
    ),
    "scale_by_sgdp": Case(functools.partial(o.scale_by_sgdp, nesterov=True), exports=("scale_by_sgdp",)),
    "sgdp": Case(
        functools.partial(o.sgdp, 1e-2, delta=10.0, weight_decay=0.1),
        ready=True,
        exports=("sgdp",),
    ),
    "project_out_radial": Case(
        lambda: optax.chain(
            o.project_out_radial(o.scale_by_lion_k(kappa="sq"), ready=False, delta=0.5, weight_decay=0.1),
            optax.scale_by_learning_rate(1e-2),
        ),
        ready=True,
        exports=("project_out_radial",),
        injectable=False,
    ),
}
