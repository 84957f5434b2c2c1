"""Rules that read the parameters, and AdaGrad-Norm."""

import functools

import optax
from optimizers.case import Case

from jaxsoft import optimizers as o


def norm_loss_descent(coefficient=0.1, target=1.0):
    return optax.chain(o.add_norm_loss_gradient(coefficient, target=target), optax.sgd(1e-2))


def rate_descent(coefficient=0.1, eps=1e-4):
    return optax.chain(o.add_rate_gradient(coefficient, eps=eps), optax.sgd(1e-2))


def delta_descent(weight_decay=0.1):
    return optax.chain(o.add_decayed_deltas(weight_decay), optax.sgd(1e-2))


def inverse_norm_descent(eta=3.0):
    return optax.chain(o.scale_by_inverse_param_norm(eta), optax.sgd(1e-2))


CASES = {
    "add_norm_loss_gradient": Case(norm_loss_descent, ready=True, exports=("add_norm_loss_gradient",)),
    "add_rate_gradient": Case(rate_descent, ready=True, exports=("add_rate_gradient",)),
    "add_decayed_deltas": Case(delta_descent, ready=True, exports=("add_decayed_deltas",)),
    "scale_by_inverse_param_norm": Case(
        inverse_norm_descent, ready=True, exports=("scale_by_inverse_param_norm",)
    ),
    # The rank is a shape.
    "project_out_subspace": Case(
        functools.partial(o.project_out_subspace, 2), exports=("project_out_subspace",), injectable=False
    ),
    "scale_by_adagrad_norm": Case(o.scale_by_adagrad_norm, exports=("scale_by_adagrad_norm",)),
}
