"""The record of gradient norms."""

import functools

from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "record_gradient_norm": Case(
        functools.partial(o.record_gradient_norm, 4),
        exports=("record_gradient_norm",),
        injectable=False,  # the size of an array and the order of a norm are static
    ),
}
