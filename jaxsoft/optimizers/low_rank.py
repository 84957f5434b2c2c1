"""Fira.

Adam with moments of low rank and updates of full rank. Matrices only; the other leaves get Adam. Each new projector
costs a singular value decomposition, which is slow on accelerators: keep `update_every` in the hundreds.
`b1=0.0, b2=0.9, bias_correction=False` is RMSProp in place of Adam, the authors' Fira-RMSProp. GaLore, the method
without the residual, is `optax.contrib.galore`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask, Scalar, matmul, moving_average

_EPS = 1e-8  # added to norms in denominators, as in the authors' code


def _growth_factor(norm: jax.Array, last: jax.Array, gamma: Scalar) -> jax.Array:
    """The factor that limits this norm to `gamma` times the last one."""
    excess = norm / (gamma * (last + _EPS))
    limited = (last > 0) & (excess > 1)
    return jnp.where(limited, 1 / jnp.where(limited, excess, 1), 1)


class LimitNormGrowthState(NamedTuple):
    """State of `limit_norm_growth`: the last limited norm of each leaf (of all leaves, if global)."""

    norm: optax.Updates


def limit_norm_growth(
    gamma: Scalar = 1.01, *, per_leaf: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Limits the growth of the norm of each leaf to a factor of `gamma` per step; it may fall freely.

    With n the norm of a leaf and p the limited norm of the previous step:

        u <- u / max(n / (gamma (p + 1e-8)), 1)

    The first update, and one after a step of zeros, passes unchanged and sets p. A spike thus raises the norm by a
    fraction of at most `gamma - 1`, but gradients that really grow are held back for a while.

    Args:
      gamma: Largest growth in one step, at least 1; infinity limits nothing.
      per_leaf: Limit each leaf by its own norm. False: limit all by their common norm.

    Returns:
      A gradient transformation. It keeps one scalar per leaf. Updates keep their dtype.

    Raises:
      TypeError: for a `per_leaf` that is not a bool.
      ValueError: for a `gamma` below 1.

    References:
      "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", where it limits a part of
      the update. The common norm is ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = limit_norm_growth(gamma=2.0)
      >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> print(tx.update(jnp.array([300.0, 400.0]), state)[0].round(4))
      [6. 8.]
    """
    _checks.number("gamma", gamma, at_least=1)
    _checks.flag("per_leaf", per_leaf)

    def init(params: optax.Params) -> LimitNormGrowthState:
        return LimitNormGrowthState(_common.scalars_like(params))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        g = _common.widen(updates)
        squares = jax.tree.map(lambda g: jnp.sum(g * g), g)
        if not per_leaf:
            total = _common.total(squares)
            squares = jax.tree.map(lambda s: total.astype(s.dtype), squares)
        norms = jax.tree.map(jnp.sqrt, squares)
        factors = jax.tree.map(lambda n, p: _growth_factor(n, p, gamma), norms, state.norm)
        u = _common.cast_like(jax.tree.map(jnp.multiply, g, factors), updates)
        return u, LimitNormGrowthState(jax.tree.map(jnp.multiply, norms, factors))

    return optax.GradientTransformationExtraArgs(init, update)


# Fira.


class ScaleByFiraState(NamedTuple):
    """State of `scale_by_fira`: steps taken, and statistics of each leaf.

    For a matrix: the projector, both moments of the projected gradient, and the norm of the previous
    residual. For other leaves the moments are those of Adam, and the projector is a scalar 0.
    """

    count: jax.Array
    projector: optax.Updates
    mu: optax.Updates
    nu: optax.Updates
    residual_norm: optax.Updates


def _is_matrix(x: Any) -> bool:
    return jnp.ndim(x) == 2 and jnp.size(x) > 0


class _Side:
    """The side of a matrix that the projector acts on, and the products with it."""

    def __init__(self, shape: tuple[int, ...], projection: str):
        rows, columns = shape
        self.rows, self.columns = rows, columns
        self.right = (rows >= columns) == (projection == "std")
        self.axis = 1 if self.right else 0  # of the rank, in a projected matrix

    def projector_shape(self, rank: int) -> tuple[int, int]:
        return (self.columns if self.right else self.rows), rank

    def projected_shape(self, rank: int) -> tuple[int, int]:
        return (self.rows, rank) if self.right else (rank, self.columns)

    def singular_vectors(self, g: jax.Array, rank: int) -> jax.Array:
        u, _, vt = jnp.linalg.svd(g, full_matrices=False)
        return vt[:rank].T if self.right else u[:, :rank]

    def project(self, g: jax.Array, projector: jax.Array) -> jax.Array:
        return matmul(g, projector) if self.right else matmul(projector.T, g)

    def back(self, r: jax.Array, projector: jax.Array) -> jax.Array:
        return matmul(r, projector.T) if self.right else matmul(projector, r)


def scale_by_fira(
    rank: int,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    *,
    update_every: Scalar = 200,
    scale: Scalar = 1.0,
    gamma: Scalar = 1.01,
    projection: Literal["std", "reverse_std"] = "std",
    scaling: Literal["column", "matrix"] = "column",
    align_signs: bool = True,
    bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The direction of Fira: Adam in a subspace of low rank, and the residual of the gradient scaled alike.

    For each matrix G, at step t (from 1), with P the leading `rank` left singular vectors of the gradient
    of steps 1, 1 + `update_every`, ... (right singular vectors act in the same way from the other side):

        R = P^T G        m <- b1 m + (1 - b1) R        v <- b2 v + (1 - b2) R^2        psi = m / (sqrt(v) + eps)
        phi_j = |psi_j| / (|R_j| + 1e-8)               for each column j
        S = (G - scale P R)_j phi_j                    limited to `gamma` times the norm of the last S
        direction = sqrt(1 - b2^t) / (1 - b1^t) (scale P psi + S)

    On a mesh with Explicit axes, every device has the whole gradient of each matrix within the step, and the whole
    projector and moments of it; updates and the other moments are placed as the parameters.

    The state has rank times (twice the longer side plus the shorter side) numbers, where Adam has twice the product
    of the sides, and yet the update has full rank. Leaves that are not matrices (with two axes, none of them empty)
    get plain Adam: reshape kernels with more axes, or leave them to it.

    phi is large where R_j is small, and then the limiter, which does not act on the first step, sets the size of S.
    The moments are kept when P is recomputed.

    Args:
      rank: Rank of the moments: static, at least 1, and at most the shorter side of every matrix.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment without bias correction, at least 0.
      update_every: Steps between new projectors, at least 1. Each needs a singular value decomposition.
      scale: Weight of the part in the subspace, at least 0.
      gamma: Largest growth of the norm of S in one step, at least 1; infinity limits nothing.
      projection: "std", the authors' choice, projects the shorter side of a matrix; "reverse_std" projects the
        longer one, as `optax.contrib.galore` does: the moments are smaller and the projector larger.
      scaling: "column" has one phi per vector of length rank; "matrix" one for all, |psi| / |R|.
      align_signs: Give new singular vectors the signs of the old ones. The signs are arbitrary, and a flipped axis
        would make its moments wrong. The authors' code does not align them.
      bias_correction: Correct the moments for their start at 0, by the factor before the direction. False: without
        the factor, as in RMSProp.

    Returns:
      A gradient transformation. All state is in at least float32; updates keep the dtype of the gradients.
      With `optax.inject_hyperparams` list `rank` in `static_args`.

    Raises:
      TypeError: for a rank that is not static, or a switch that is not a bool.
      ValueError: for a number out of range, a rank above the shorter side of a matrix (by `init`), or an
        unknown option.

    References:
      "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?". The signs, "matrix" and
      the restart of the limiter after a residual of 0 are *Reconstructed* or ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_fira(rank=1)
      >>> params = jnp.zeros((3, 4))
      >>> state = tx.init(params)
      >>> print(state.projector.shape, state.mu.shape)
      (3, 1) (1, 4)
      >>> updates, _ = tx.update(jnp.ones((3, 4)), state)
      >>> print(updates[0].round(2))
      [0.58 0.58 0.58 0.58]
    """
    rank = _checks.integer("rank", rank, at_least=1)
    _common.check_beta("b1", b1)
    _common.check_beta("b2", b2)
    _checks.number("eps", eps, at_least=0)
    _common.check_steps("update_every", update_every, at_least=1)
    _checks.number("scale", scale, at_least=0)
    _checks.number("gamma", gamma, at_least=1)
    _checks.option("projection", projection, ("std", "reverse_std"))
    _checks.option("scaling", scaling, ("column", "matrix"))
    _checks.flag("align_signs", align_signs)
    _checks.flag("bias_correction", bias_correction)

    def init(params: optax.Params) -> ScaleByFiraState:
        def moment(p):
            if not _is_matrix(p):
                return jnp.zeros_like(p, dtype=_common.wide(p))
            if rank > min(p.shape):
                raise ValueError(
                    f"rank must be at most the shorter side of every matrix, got {rank} and a matrix of shape "
                    f"{tuple(p.shape)}: choose a smaller rank, or optax.partition for such matrices"
                )
            return jnp.zeros(_Side(p.shape, projection).projected_shape(rank), _common.wide(p))

        def projector(p):
            shape = _Side(p.shape, projection).projector_shape(rank) if _is_matrix(p) else ()
            return jnp.zeros(shape, _common.wide(p))

        return ScaleByFiraState(
            count=jnp.zeros([], jnp.int32),
            projector=jax.tree.map(projector, params),
            mu=jax.tree.map(moment, params),
            nu=jax.tree.map(moment, params),
            residual_norm=_common.scalars_like(params),
        )

    def new_projector(g, old):
        if not _is_matrix(g):
            return old
        new = _Side(g.shape, projection).singular_vectors(lax.stop_gradient(g), rank)
        return jnp.where(jnp.sum(old * new, axis=0) < 0, -new, new) if align_signs else new

    # Branches made in `update` would be compiled anew in each call outside of `jit`.
    def refreshed(g, old):
        return jax.tree.map(new_projector, g, old)

    def kept(g, old):
        del g
        return old

    def projected(g, projector):
        return _Side(g.shape, projection).project(g, projector) if _is_matrix(g) else g

    def full_rank(g, projector, r, psi, last):
        """The update of a leaf without bias correction, and the norm of its residual."""
        if not _is_matrix(g):
            return psi, last
        side = _Side(g.shape, projection)
        axis = side.axis if scaling == "column" else None
        norm_psi, norm_r = (jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True)) for x in (psi, r))
        residual = (g - scale * side.back(r, projector)) * (norm_psi / (norm_r + _EPS))
        length = jnp.sqrt(jnp.sum(residual * residual))
        factor = _growth_factor(length, last, gamma)
        return scale * side.back(psi, projector) + factor * residual, factor * length

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        g = jax.tree.map(lambda g: _common.whole(g) if _is_matrix(g) else g, _common.widen(updates))
        projector = lax.cond(state.count % update_every == 0, refreshed, kept, g, state.projector)
        r = jax.tree.map(projected, g, projector)
        mu = moving_average(b1, state.mu, r)
        nu = moving_average(b2, state.nu, jax.tree.map(jnp.square, r))

        psi = jax.tree.map(lambda m, v: safe_divide(m, jnp.sqrt(v) + eps), mu, nu)
        both = jax.tree.map(full_rank, g, projector, r, psi, state.residual_norm)
        u = _common.placed_like(jax.tree.map(lambda _, pair: pair[0], g, both), updates)
        residual_norm = jax.tree.map(lambda _, pair: pair[1], g, both)
        step = 1
        if bias_correction:
            step = jnp.sqrt(_common.bias_correction(b2, count)) / _common.bias_correction(b1, count)
        u = _common.cast_like(jax.tree.map(lambda u: step * u, u), updates)
        return u, ScaleByFiraState(count, projector, mu, nu, residual_norm)

    return optax.GradientTransformationExtraArgs(init, update)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    *,
    update_every: Scalar = 200,
    scale: Scalar = 1.0,
    gamma: Scalar = 1.01,
    projection: Literal["std", "reverse_std"] = "std",
    scaling: Literal["column", "matrix"] = "column",
    align_signs: bool = True,
    bias_correction: bool = True,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira, ready to use: `params <- params - learning_rate (direction + weight_decay params)`.

    See `scale_by_fira` for the direction. The authors' code decays after the step, which differs by
    `learning_rate^2 weight_decay direction`; here the decay is that of `optax.adamw`.

    Args:
      learning_rate: A number or a schedule.
      rank: Rank of the moments: static, at least 1, and at most the shorter side of every matrix.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, at least 0.
      update_every: Steps between new projectors, at least 1.
      scale: Weight of the part in the subspace, at least 0; the authors pre-train with 0.25.
      gamma: Largest growth of the norm of the residual in one step, at least 1.
      projection: "std" projects the shorter side of a matrix, "reverse_std" the longer one.
      scaling: "column" or "matrix".
      align_signs: Give new singular vectors the signs of the old ones.
      bias_correction: Correct the moments for their start at 0.
      weight_decay: Decoupled weight decay.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters. With `optax.inject_hyperparams` list
      `rank` in `static_args`.

    Raises:
      TypeError: as `scale_by_fira`.
      ValueError: as `scale_by_fira`, and for a negative learning rate or weight decay.

    References:
      "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = fira(0.1, rank=2, eps=0.0)
      >>> params = jnp.eye(2)
      >>> updates, _ = tx.update(jnp.eye(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(4))
      [[0.9 0. ]
       [0.  0.9]]
    """
    direction = scale_by_fira(
        rank,
        b1,
        b2,
        eps,
        update_every=update_every,
        scale=scale,
        gamma=gamma,
        projection=projection,
        scaling=scaling,
        align_signs=align_signs,
        bias_correction=bias_correction,
    )
    return _common.descend(direction, learning_rate, weight_decay, mask)
