"""Shampoo, SOAP and M-FAC."""

import functools

from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "scale_by_shampoo": Case(
        functools.partial(o.scale_by_shampoo, precondition_every=2),
        exports=("scale_by_shampoo",),
        injectable=False,  # the longest side is static
    ),
    "scale_by_shampoo_half": Case(
        functools.partial(
            o.scale_by_shampoo, 0.9, exponent=0.5, precondition_every=2, grafting="sgd", max_dim=2
        ),
        injectable=False,
    ),
    "shampoo": Case(
        functools.partial(o.shampoo, 1e-2, precondition_every=2, weight_decay=0.1),
        ready=True,
        converges=lambda lr: o.shampoo(lr, b2=0.99),
        exports=("shampoo",),
        spike=3.0,
        injectable=False,
    ),
    "scale_by_soap": Case(
        functools.partial(o.scale_by_soap, precondition_every=2),
        converges=lambda lr: o.soap(lr),
        exports=("scale_by_soap", "soap"),
        injectable=False,  # the longest side is static
    ),
    "scale_by_mfac": Case(
        functools.partial(o.scale_by_mfac, window=2, damping=0.1),
        exports=("scale_by_mfac",),
        temporary=1.0,  # the combination of the stored gradients is a matrix product, which is not fused
        injectable=False,  # the window is static
    ),
}
