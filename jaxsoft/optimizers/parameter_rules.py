"""Rules that read the parameters.

Gradient transformations to put before an optimizer, as part of the loss, or after its direction, decoupled from it.
Most take a `mask`. The regularizers are those of `jaxsoft.losses`, as gradients, and a decay towards the start of
fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide, shape_by_moments
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask, Scalar


def _with_params(
    name: str, rule: Callable[[Any, Any], Any], mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """The stateless transformation of a rule `(gradients, parameters) -> updates` on trees in at least float32."""

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del extra
        _common.check_params(name, params)
        u = rule(_common.widen(updates), _common.widen(params))
        return _common.cast_like(u, updates), state

    return _common.masked(optax.GradientTransformationExtraArgs(optax.init_empty_state, update), mask)


def _unit_norms(p: jax.Array, axis: int) -> jax.Array:
    """The norm of each unit along an axis; the other axes stay with length 1."""
    if p.ndim and not -p.ndim <= axis < p.ndim:
        raise ValueError(f"axis must be in [{-p.ndim}, {p.ndim}) for a leaf of shape {p.shape}, got {axis}")
    others = tuple(i for i in range(p.ndim) if i != axis % p.ndim)
    square = jnp.sum(p * p, axis=others, keepdims=True)
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


# Regularizers, as gradients.


def add_norm_loss_gradient(
    coefficient: Scalar = 0.01, *, axis: int | None = None, target: Scalar = 1.0, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `coefficient norm_loss(params)`, which pulls the norm of each channel to `target`.

        g_c <- g_c - 2 coefficient (target - |w_c|) w_c / |w_c|        for each output channel c

    Use it instead of `optax.add_decayed_weights`: before an optimizer it acts as the loss itself
    (`jaxsoft.losses.norm_loss`), after its direction it is decoupled. Leaves with fewer than two axes pass unchanged.

    Args:
      coefficient: Weight of the loss, at least 0.
      axis: The axis of the outputs. None, the default: the last, for kernels of flax.
      target: The target norm, at least 0.
      mask: Leaves it applies to: a pytree of bools, or a function from the parameters to one. None: all.

    Returns:
      A stateless gradient transformation whose `update` needs the parameters. Updates keep their dtype.

    Raises:
      TypeError: for an axis that is not an integer.
      ValueError: for a number out of range, an axis that a leaf does not have, or without the parameters.

    References:
      "Norm Loss: An efficient yet effective regularization method for deep neural networks". *Reconstructed*
      from the abstract, as the loss is.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = add_norm_loss_gradient(0.5)
      >>> w = jnp.array([[0.0, 0.5], [5.0, 0.0]])
      >>> print(tx.update(jnp.zeros((2, 2)), tx.init(w), w)[0])
      [[ 0.  -0.5]
       [ 4.   0. ]]
    """
    _checks.number("coefficient", coefficient, at_least=0)
    _checks.number("target", target, at_least=0)
    axis = -1 if axis is None else _checks.integer("axis", axis)

    def leaf(g, p):
        if p.ndim < 2:
            return g
        norm = _unit_norms(p, axis)
        return g + coefficient * (2 * safe_divide(norm - target, norm) * p)

    return _with_params("add_norm_loss_gradient", lambda g, p: jax.tree.map(leaf, g, p), mask)


def add_rate_gradient(
    coefficient: Scalar, *, shape: Scalar | None = None, eps: Scalar = 1e-8, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `coefficient generalized_gaussian_rate(params)`, the code length of the weights.

        g <- g + coefficient shape sign(w) (|w| + eps)^(shape - 1)

    Before an optimizer it acts as the loss itself (`jaxsoft.losses.generalized_gaussian_rate`), after its direction it
    is decoupled. `shape=2` is a weight decay of twice the coefficient; `shape=1` pulls all weights equally to 0.

    Args:
      coefficient: Weight of the rate, at least 0: 10 to 1000 divided by the number of weights.
      shape: The exponent, positive. None: fitted to all weights in each step.
      eps: Positive; bounds the gradient at 0 where the shape is below 1.
      mask: Leaves it applies to: a pytree of bools, or a function from the parameters to one. None: all.

    Returns:
      A stateless gradient transformation whose `update` needs the parameters. Updates keep their dtype.

    Raises:
      ValueError: for a number out of range, or without the parameters.

    References:
      "BackSlash: Rate Constrained Optimized Training of Large Language Models". *Reconstructed*, as the rate is.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = add_rate_gradient(0.5, shape=1.0)
      >>> w = jnp.array([3.0, -4.0, 0.0])
      >>> print(tx.update(jnp.zeros(3), tx.init(w), w)[0])
      [ 0.5 -0.5  0. ]
    """
    _checks.number("coefficient", coefficient, at_least=0)
    if shape is not None:
        _checks.number("shape", shape, above=0)
    _checks.number("eps", eps, above=0)

    def rule(g, p):
        if not jax.tree.leaves(p):
            return g
        s = shape_by_moments(jax.tree.leaves(p)) if shape is None else shape

        def leaf(g, w):  # not jnp.abs(w), which the compiler would store, since the moments need it first
            return g + coefficient * (s * jnp.sign(w) * (w * jnp.sign(w) + eps) ** (s - 1))

        return jax.tree.map(leaf, g, p)

    return _with_params("add_rate_gradient", rule, mask)


class AddDecayedDeltasState(NamedTuple):
    """State of `add_decayed_deltas`: the parameters to which it decays."""

    reference: optax.Params


def add_decayed_deltas(
    weight_decay: Scalar, *, reference_dtype: Any = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Weight decay towards the initial parameters: `u <- u + weight_decay (params - reference)`.

    For fine-tuning: it keeps the difference to the pretrained model small. Put it after a direction, like
    `optax.add_decayed_weights`; with Adam's direction it is AdamR:

        optax.chain(optax.scale_by_adam(), add_decayed_deltas(0.01), optax.scale_by_learning_rate(1e-4))

    The reference is the argument of `init`; `optax.tree.set(opt_state, reference=params)` sets another one.

    Args:
      weight_decay: At least 0.
      reference_dtype: Dtype of the reference. None: that of the parameters, but at least float32.
      mask: Leaves it applies to: a pytree of bools, or a function from the parameters to one. None: all.

    Returns:
      A gradient transformation whose `update` needs the parameters. It keeps a copy of them.

    Raises:
      ValueError: for a negative weight decay, or without the parameters.

    References:
      "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models", AdamR. *Reconstructed*.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = add_decayed_deltas(0.5)
      >>> state = tx.init(jnp.array([1.0, 2.0]))
      >>> print(tx.update(jnp.zeros(2), state, jnp.array([1.5, 2.0]))[0])
      [0.25 0.  ]
    """
    _checks.number("weight_decay", weight_decay, at_least=0)
    dtype = _checks.floating_dtype("reference_dtype", reference_dtype)

    def init(params: optax.Params) -> AddDecayedDeltasState:
        def copied(p):  # a separate buffer: parameters are donated
            return jnp.array(p, _common.wide(p) if dtype is None else dtype, copy=True)

        return AddDecayedDeltasState(jax.tree.map(copied, params))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del extra
        _common.check_params("add_decayed_deltas", params)
        g, p = _common.widen(updates), _common.widen(params)
        u = jax.tree.map(
            lambda g, p, r: g + weight_decay * (p - r), g, p, _common.cast_like(state.reference, p)
        )
        return _common.cast_like(u, updates), state

    return _common.masked(optax.GradientTransformationExtraArgs(init, update), mask)


# Adapters and subspaces.


def scale_by_inverse_param_norm(
    eta: Scalar, *, axis: int | None = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Larger steps for units whose weights are small: `g_i <- g_i / sqrt(||w_i|| + 1 / eta^2)`.

    For the factor of a low-rank adapter that starts at 0 (B in W + B A), where dropout and a scaling factor help
    little: each output unit i starts with the factor `eta` and slows down as its weights grow. Put it after a
    direction, or before plain SGD; before Adam, which undoes any scale, it has no effect. Select the adapters with
    `mask`.

    Args:
      eta: The factor at w = 0, positive.
      axis: The axis of the units. None, the default: the last, for kernels of flax `[rank, outputs]`. In a leaf of
        one axis every entry is a unit.
      mask: Leaves it applies to: a pytree of bools, or a function from the parameters to one. None: all.

    Returns:
      A stateless gradient transformation whose `update` needs the parameters. Updates keep their dtype.

    Raises:
      TypeError: for an axis that is not an integer.
      ValueError: for an `eta` that is not positive, an axis that a leaf does not have, or without the parameters.

    References:
      "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws". *Reconstructed*: the paper's text says
      that the factor falls with the norm, but not its exact form.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_inverse_param_norm(2.0)
      >>> b = jnp.array([[0.0, 0.0], [0.0, 0.75]])
      >>> print(tx.update(jnp.ones((2, 2)), tx.init(b), b)[0])
      [[2. 1.]
       [2. 1.]]
    """
    _checks.number("eta", eta, above=0)
    axis = -1 if axis is None else _checks.integer("axis", axis)

    def leaf(g, p):
        return g / jnp.sqrt(_unit_norms(p, axis) + 1 / jnp.square(eta))

    return _with_params("scale_by_inverse_param_norm", lambda g, p: jax.tree.map(leaf, g, p), mask)


class ProjectOutSubspaceState(NamedTuple):
    """State of `project_out_subspace`: the protected directions of each kernel, as columns; 0 for other leaves."""

    bases: optax.Updates


def project_out_subspace(rank: int, *, mask: Mask = None) -> optax.GradientTransformationExtraArgs:
    """Removes changes of each kernel along given directions: `g <- g - U U^T g`.

    For continual learning: if U is an orthonormal basis of a layer's inputs on the earlier tasks, its outputs on them
    do not change. A kernel `[..., inputs, outputs]` is taken as a matrix `[n, outputs]`, with all axes but the last
    merged, and U is `[n, rank]`. Leaves with fewer than two axes pass unchanged.

    The bases are state. They start at 0, which projects nothing. Between tasks set them to a pytree like the
    parameters, with 0 in unused columns:

        opt_state = optax.tree.set(opt_state, bases=bases)

    Put it last, before the learning rate: a memory or a scale for each entry brings the removed directions back, and
    so does weight decay.

    Args:
      rank: Columns of each basis: static, at least 1.
      mask: Leaves it applies to: a pytree of bools, or a function from the parameters to one. None: all.

    Returns:
      A gradient transformation. Updates keep their dtype. With `optax.inject_hyperparams` list `rank` in
      `static_args`.

    Raises:
      TypeError: for a rank that is not a static integer.
      ValueError: for a rank below 1, or (by `update`) for a basis whose shape does not fit.

    References:
      "Maintaining Adversarial Robustness in Continuous Learning", and gradient projection memory before it.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = project_out_subspace(1)
      >>> state = tx.init(jnp.zeros((2, 1)))._replace(bases=jnp.array([[0.0], [1.0]]))
      >>> print(tx.update(jnp.array([[5.0], [2.0]]), state)[0])
      [[5.]
       [0.]]
    """
    rank = _checks.integer("rank", rank, at_least=1)

    def basis_shape(p: Any) -> tuple[int, ...]:
        return (math.prod(p.shape[:-1]), rank) if jnp.ndim(p) >= 2 else ()

    def init(params: optax.Params) -> ProjectOutSubspaceState:
        zeros = jax.tree.map(lambda p: jnp.zeros(basis_shape(p), _common.wide(p)), params)
        return ProjectOutSubspaceState(zeros)

    def leaf(g, u):
        if g.ndim < 2:
            return g
        _checks.shape("bases", u, basis_shape(g), f"all axes but the last of {g.shape}, and the rank")
        rows = g.reshape(u.shape[0], g.shape[-1])
        inside = jnp.matmul(u, jnp.matmul(u.T, rows, precision="highest"), precision="highest")
        return g - inside.reshape(g.shape)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        u = jax.tree.map(leaf, _common.widen(updates), _common.widen(state.bases))
        return _common.cast_like(u, updates), state

    return _common.masked(optax.GradientTransformationExtraArgs(init, update), mask)


# One rate for all.


class ScaleByAdagradNormState(NamedTuple):
    """State of `scale_by_adagrad_norm`: the sum of the squares of the initial value and of all norms."""

    sum_of_squares: jax.Array


def scale_by_adagrad_norm(initial: Scalar = 1.0) -> optax.GradientTransformationExtraArgs:
    """The direction of AdaGrad-Norm: the gradient over the root of the sum of all squared norms.

        s <- s + ||g||^2        direction = g / sqrt(s)        with s = initial^2 at first

    The norm is that of all leaves together. This is AdaGrad with a single step size; it keeps the direction of the
    gradient.

    Args:
      initial: Initial value of the root, at least 0. Far above the norms of all gradients together it gives plain SGD;
        with 0 the first step has length 1.

    Returns:
      A gradient transformation. It keeps one scalar. Updates keep their dtype.

    Raises:
      ValueError: for a negative `initial`.

    References:
      "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", one of its inner optimizers.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_adagrad_norm(0.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> u, state = tx.update(jnp.array([0.0, 5.0]), state)
      >>> print(u, state.sum_of_squares)
      [0. 1.] 25.0
    """
    _checks.number("initial", initial, at_least=0)

    def init(params: optax.Params) -> ScaleByAdagradNormState:
        dtype = _common.wide(*jax.tree.leaves(params))
        return ScaleByAdagradNormState(jnp.square(jnp.asarray(initial, dtype)))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        g = _common.widen(updates)
        squares = jax.tree.map(lambda x: jnp.sum(x * x), g)
        total = _common.total((squares, state.sum_of_squares)).astype(state.sum_of_squares.dtype)
        root = jnp.sqrt(jnp.where(total == 0, 1, total))  # with 0, all gradients are 0
        u = _common.cast_like(jax.tree.map(lambda g: g / root, g), updates)
        return u, ScaleByAdagradNormState(total)

    return optax.GradientTransformationExtraArgs(init, update)
