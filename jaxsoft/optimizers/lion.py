"""Lion-K.

Lion with the sign replaced by the gradient of any convex function `kappa`, on one worker or with a vote of several.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask, Scalar

Kappa = Callable[[jax.Array], jax.Array]
"""The gradient of a convex function kappa with minimum at 0: a leaf to a leaf of the same shape."""

_MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's odd quintic


def _unit(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Gradient of the l2 norm along `axis` (None: all axes)."""
    return safe_divide(x, jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True)))


def _argmax_sign(x: jax.Array) -> jax.Array:
    """A subgradient of `max |x_i|`: the sign at the largest entries, shared evenly among ties.

    Ties are taken up to rounding: compiled code may compute the entries twice, with different last bits, so that no
    entry equals the maximum.
    """
    size = jnp.abs(x)
    largest = (size >= jnp.max(size) * (1 - 4 * jnp.finfo(x.dtype).eps)).astype(x.dtype)
    return jnp.sign(x) * largest / jnp.sum(largest)


def kappa_lp(p: Scalar) -> Kappa:
    """Gradient of the lp norm of a leaf, `sign(x) |x|^(p-1) / ||x||_p^(p-1)`; keeps `||wd params||_q <= 1`.

    Args:
      p: The exponent, greater than 1 (`1/p + 1/q = 1`).

    Returns:
      A function for the argument `kappa` of `lion_k`.

    Raises:
      ValueError: `p` is not greater than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import kappa_lp
      >>> print(kappa_lp(2.0)(jnp.array([0.0, -4.0])))
      [ 0. -1.]
    """
    _checks.number("p", p, above=1)

    def gradient(x: jax.Array) -> jax.Array:
        size = safe_divide(jnp.abs(x), jnp.max(jnp.abs(x)))  # in [0, 1]: no power overflows
        norm = jnp.sum(size**p) ** (1 / p)  # in [1, n], or 0
        return jnp.sign(x) * safe_divide(size, norm) ** (p - 1)

    return gradient


def kappa_huber(e: Scalar) -> Kappa:
    """Gradient of the Huber function of each entry, `clip(x / e, -1, 1)`: a sign, linear within `e` of 0.

    Args:
      e: Half-width of the linear part, positive.

    Returns:
      A function for the argument `kappa` of `lion_k`.

    Raises:
      ValueError: `e` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import kappa_huber
      >>> print(kappa_huber(0.5)(jnp.array([0.25, -3.0])))
      [ 0.5 -1. ]
    """
    _checks.number("e", e, above=0)
    return lambda x: jnp.clip(x / e, -1, 1)


def kappa_soft(e: Scalar) -> Kappa:
    """Gradient of `sum_i relu(|x_i| - e)`, `sign(x) [|x| > e]`: Lion's sign with a dead zone around 0.

    Args:
      e: Half-width of the dead zone, at least 0.

    Returns:
      A function for the argument `kappa` of `lion_k`.

    Raises:
      ValueError: `e` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import kappa_soft
      >>> print(kappa_soft(0.5)(jnp.array([0.25, -3.0])))
      [ 0. -1.]
    """
    _checks.number("e", e, at_least=0)
    return lambda x: jnp.where(jnp.abs(x) <= e, 0, jnp.sign(x))


def kappa_entropic(a: Scalar) -> Kappa:
    """Gradient of `sum_i log cosh(a x_i) / a`, `tanh(a x)`: Lion's sign made smooth.

    Args:
      a: Steepness, positive.

    Returns:
      A function for the argument `kappa` of `lion_k`.

    Raises:
      ValueError: `a` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import kappa_entropic
      >>> print(kappa_entropic(1.0)(jnp.array([0.0, 20.0])))
      [0. 1.]
    """
    _checks.number("a", a, above=0)
    return lambda x: jnp.tanh(a * x)


def kappa_group_l2(axis: int | tuple[int, ...] = -1) -> Kappa:
    """Gradient of the sum of l2 norms along `axis`: each vector along it is normalized to length 1.

    Args:
      axis: Axis (or axes) of a group; -1, the default, normalizes each row of a matrix. A scalar leaf is one
        group.

    Returns:
      A function for the argument `kappa` of `lion_k`.

    Raises:
      ValueError: in the first update, for an axis that a leaf does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import kappa_group_l2
      >>> print(kappa_group_l2()(jnp.array([[0.0, 4.0], [-2.0, 0.0]])))
      [[ 0.  1.]
       [-1.  0.]]
    """
    return lambda x: _unit(x, axis) if x.ndim else _unit(x)


def kappa_nuclear(steps: int | None = None) -> Kappa:
    """Gradient of the nuclear norm, `U V^T` of the singular value decomposition: Muon with decay.

    The last two axes of a leaf form the matrix and leading axes are a batch of matrices; a leaf with fewer
    than two axes is one column, for which the nuclear norm is the l2 norm.

    Args:
      steps: None: the exact decomposition (directions with a singular value at rounding level are dropped).
        Otherwise the number of Newton-Schulz steps with Muon's coefficients: only matrix products, hence much faster
        on accelerators, with singular values scattered around 1 (about 0.7 to 1.2 after 5 steps).

    Returns:
      A function for the argument `kappa` of `lion_k`.

    Raises:
      ValueError: `steps` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import kappa_nuclear
      >>> print(kappa_nuclear()(jnp.array([[2.0, 0.0], [0.0, 5.0]])).round(4))
      [[1. 0.]
       [0. 1.]]
    """
    if steps is not None:
        steps = _checks.integer("steps", steps, at_least=1)

    def exact(x: jax.Array) -> jax.Array:
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        noise = s[..., :1] * max(x.shape[-2:]) * jnp.finfo(x.dtype).eps
        return jnp.matmul(u * (s > noise)[..., None, :], vt, precision="highest")

    def newton_schulz(x: jax.Array) -> jax.Array:
        if x.shape[-2] > x.shape[-1]:  # the products below are smaller for a wide matrix
            return newton_schulz(x.mT).mT
        a, b, c = _MUON_COEFFICIENTS
        x = _unit(x, axis=(-2, -1))  # singular values into [0, 1]
        for _ in range(steps or 0):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    def gradient(x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return _unit(x)
        matrices = _common.whole(x)
        return _common.placed_like(exact(matrices) if steps is None else newton_schulz(matrices), x)

    return gradient


_KAPPAS: dict[str, Kappa] = {
    "l1": jnp.sign,
    "l2": _unit,
    "sq": lambda x: x,
    "linf": _argmax_sign,
    "group_l2": kappa_group_l2(),
    "nuclear": kappa_nuclear(),
}


def _kappa_gradient(kappa: str | Kappa) -> Kappa:
    if callable(kappa):
        return kappa
    if kappa not in _KAPPAS:
        raise ValueError(
            f"kappa must be one of {', '.join(map(repr, _KAPPAS))}, the result of kappa_lp, kappa_huber, "
            "kappa_soft, kappa_entropic, kappa_group_l2 or kappa_nuclear, or a callable leaf -> leaf, "
            f"got {kappa!r}"
        )
    return _KAPPAS[kappa]


def _majority(vote: jax.Array, axis_name: Hashable) -> jax.Array:
    """The sign of the sum of the workers' signs. A worker whose vote is NaN abstains."""
    workers = lax.psum(1, axis_name)  # a Python integer: axis sizes are static
    ballot = jnp.where(jnp.isnan(vote), 0, vote).astype(jnp.int8)
    # One byte per entry on the wire if the sum fits.
    total = lax.psum(ballot if workers <= 127 else ballot.astype(jnp.int32), axis_name)
    return jnp.sign(total).astype(vote.dtype)


def scale_by_lion_k(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    kappa: str | Kappa = "l1",
    *,
    mu_dtype: Any = None,
    axis_name: Hashable | None = None,
    vote: Literal["majority", "mean"] = "majority",
) -> optax.GradientTransformationExtraArgs:
    """The direction of Lion-K: the gradient of a convex function at an interpolated momentum.

    With gradient `g` and momentum `m`, for each leaf:

        c = b1 m + (1 - b1) g        direction = kappa'(c)        m <- b2 m + (1 - b2) g

    Used with decoupled weight decay `wd` it minimizes `f(params) + kappa*(wd params) / wd`, with `kappa*` the
    convex conjugate:

    | kappa | kappa(x) | direction | effect on `wd params` |
    |---|---|---|---|
    | `"l1"` (Lion) | sum of abs(x) | sign(x) | largest entry at most 1 |
    | `"l2"` | norm of the leaf | x / norm | norm at most 1 |
    | `"sq"` | half the squared norm | x | squared norm / 2: SGD with momentum and decay |
    | `kappa_lp(p)` | p-norm | | dual norm at most 1 |
    | `"linf"` | largest abs(x) | sign at the largest entries | l1 norm at most 1: sparse |
    | `kappa_huber(e)` | Huber | clip(x / e, -1, 1) | box and e/2 times the squared norm |
    | `kappa_soft(e)` | sum of relu(abs(x) - e) | sign outside e | box and e times the l1 norm |
    | `"group_l2"`, `kappa_group_l2(axis)` | sum of row norms | normalized rows | row norms at most 1 |
    | `kappa_entropic(a)` | log cosh(a x) / a | tanh(a x) | box with a smooth barrier |
    | `"nuclear"`, `kappa_nuclear(steps)` | nuclear norm | U V^T | spectral norm at most 1 |

    Norms are those of one leaf. Under `jit` a leaf may be sharded; inside `shard_map` it is the local shard.

    Distributed Lion: with `axis_name`, inside `shard_map` (or `vmap`), each worker keeps its own momentum of
    its own gradients and only directions are exchanged: as a majority vote of signs, `sign(sum_i sign(c_i))`,
    one byte per entry for up to 127 workers, or as their mean. Do not average the gradients then. With one worker it
    is Lion. In a vote a worker whose momentum is not finite abstains.

    Args:
      b1: Weight of the momentum in the direction, in [0, 1).
      b2: Decay of the momentum, in (0, 1). The theory needs `b2 >= b1`.
      kappa: A name, a factory's result, or any callable from a leaf to a leaf. Under
        `optax.inject_hyperparams` a callable must be listed in `static_args`.
      mu_dtype: Dtype of the momentum. None: that of the parameters, but at least float32.
      axis_name: Name (or names) of the mapped axis over which the directions are combined. None: no exchange.
      vote: With `axis_name`, `"majority"` (needs `kappa="l1"`) or `"mean"`.

    Returns:
      A gradient transformation. Its state is `optax.ScaleByLionState`, so that a run can change between
      `optax.lion` and this one from a checkpoint. Updates keep the dtype of the gradients.

    Raises:
      ValueError: for a rate out of range, an unknown `kappa` or `vote`, a majority vote of anything but
        signs, or a `kappa` that changes the shape of a leaf.

    References:
      "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts"; "Symbolic Discovery of
      Optimization Algorithms" (Lion). The table of functions and the vote ("Communication Efficient
      Distributed Training with Distributed Lion") are reconstructed from the idea, not from their code.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_lion_k(kappa="l2")
      >>> state = tx.init(jnp.zeros(4))
      >>> direction, state = tx.update(jnp.array([3.0, -3.0, 3.0, 3.0]), state)
      >>> print(direction.round(4))
      [ 0.5 -0.5  0.5  0.5]
    """
    _common.check_beta("b1", b1)
    _checks.number("b2", b2, above=0, below=1)
    _checks.option("vote", vote, ("majority", "mean"))
    if axis_name is not None and vote == "majority" and kappa != "l1":
        raise ValueError(f"kappa must be 'l1' for a majority vote (or vote='mean'), got {kappa!r}")
    gradient = _kappa_gradient(kappa)
    mu_dtype = _checks.floating_dtype("mu_dtype", mu_dtype)

    def init(params: optax.Params) -> optax.ScaleByLionState:
        return optax.ScaleByLionState(jnp.zeros([], jnp.int32), _common.moments_like(params, mu_dtype))

    def direction(g: jax.Array, mu: jax.Array) -> jax.Array:
        # The textbook formula b1 m + (1 - b1) g and the update of the momentum both read the old momentum; the compiler
        # then copies it to overwrite the state in place. Computing the same number from the new momentum,
        # mu = b2 m + (1 - b2) g, needs no copy and is three times faster on CPU. It must be the momentum before it is
        # rounded to a lower precision: that error is as large as the part of the gradient.
        c = (b1 / b2) * mu + ((b2 - b1) / b2) * g
        if c.size == 0:
            return c
        u = gradient(c)
        if jnp.shape(u) != c.shape:
            raise ValueError(f"kappa must keep the shape {c.shape} of its argument, got shape {jnp.shape(u)}")
        if axis_name is None:
            return u
        return _majority(u, axis_name) if vote == "majority" else lax.pmean(u, axis_name)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        g = _common.widen(updates)
        mu = _common.moving_average(b2, state.mu, g)
        u = jax.tree.map(direction, g, mu)
        count = jnp.asarray(optax.safe_increment(state.count))
        return _common.cast_like(u, updates), optax.ScaleByLionState(count, _common.cast_like(mu, state.mu))

    return optax.GradientTransformationExtraArgs(init, update)


def lion_k(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    kappa: str | Kappa = "l1",
    *,
    mu_dtype: Any = None,
    axis_name: Hashable | None = None,
    vote: Literal["majority", "mean"] = "majority",
    weight_decay: Scalar = 1e-3,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion-K, ready to use: `params <- params - learning_rate (kappa'(c) + weight_decay params)`.

    `kappa="l1"` is `optax.lion` without its copy of the momentum (three times faster on CPU, large leaves).
    See `scale_by_lion_k` for the formulas, the choice of `kappa` and distributed Lion.

    Args:
      learning_rate: A number or a schedule. For Lion 3 to 10 times smaller than for AdamW.
      b1: Weight of the momentum in the direction, in [0, 1).
      b2: Decay of the momentum, in (0, 1).
      kappa: See `scale_by_lion_k`.
      mu_dtype: Dtype of the momentum.
      axis_name: See `scale_by_lion_k`.
      vote: See `scale_by_lion_k`.
      weight_decay: Decoupled weight decay. For Lion 3 to 10 times larger than for AdamW.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters.

    Raises:
      ValueError: as `scale_by_lion_k`, and for a negative learning rate or weight decay.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = lion_k(0.1, weight_decay=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, 1.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(4))
      [ 0.9 -2.1]
    """
    direction = scale_by_lion_k(b1, b2, kappa, mu_dtype=mu_dtype, axis_name=axis_name, vote=vote)
    return _common.descend(direction, learning_rate, weight_decay, mask)
