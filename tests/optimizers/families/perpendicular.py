"""The perpendicular gradient."""

from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "perpendicular_gradient": Case(
        o.perpendicular_gradient, exports=("perpendicular_gradient",), rescales_noise=True
    ),
}
