"""Second-order methods.

Preconditioners computed from gradients, and a Newton step for small problems. `shampoo` whitens matrices from both
sides. On badly scaled matrices it needs far fewer steps than Adagrad or Adam, at the price of eigendecompositions every
few steps. Start with `exponent=0.25`, the classical power, and the default grafting. `exponent=0.5` is the power that
the Kronecker approximation of Adagrad's matrix suggests; it amplifies rare directions more, and needs noisy
gradients, grafting and a larger `eps`.

`soap` is Adam in the eigenbasis of Shampoo's matrices. It takes the learning rates of Adam, and its second moments
change in every step, so that the bases may change rarely.

`scale_by_mfac` keeps the last gradients themselves, so it is for models of which dozens of copies fit in memory.
`gradient_regularized_newton_step` is a function of the full loss, for convex models such as softmax regression.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import optax
from jax import lax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask, Scalar, matmul

# Statistics of matrices: the last two axes of a leaf, any others are a batch.


def _sides(p: Any, max_dim: int) -> tuple[int, int]:
    """The sides of a leaf's matrices; 0 for a side without a statistic."""
    a, b = jnp.shape(p)[-2:] if jnp.ndim(p) >= 2 and jnp.size(p) else (0, 0)
    return a * (a <= max_dim), b * (b <= max_dim)


def _init_statistics(params: Any, side: int, max_dim: int) -> Any:
    """Zeros for the statistic of one side of each leaf, a square matrix; a scalar 0 where there is none."""

    def zeros(p):
        n = _sides(p, max_dim)[side]
        return jnp.zeros((*jnp.shape(p)[:-2], n, n) if n else (), _common.wide(p))

    return jax.tree.map(zeros, params)


def _is_matrix(x: jax.Array) -> bool:
    """Whether a statistic is a matrix; one that is not needed is a scalar 0."""
    return x.ndim >= 2


def _accumulate(rule: Callable[..., Any], g: Any, left: Any, right: Any) -> tuple[Any, Any]:
    """The statistics after `rule(old, new)` with `G G^T` from the left and `G^T G` from the right."""
    g = jax.tree.map(_common.whole, g)
    left = jax.tree.map(lambda g, s: rule(s, matmul(g, g.mT)) if _is_matrix(s) else s, g, left)
    right = jax.tree.map(lambda g, s: rule(s, matmul(g.mT, g)) if _is_matrix(s) else s, g, right)
    return left, right


# Shampoo.


def _damped_eigh(a: jax.Array, eps: Any) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of `a + eps max(eigenvalue) I`, negative rounding errors taken as 0, and eigenvectors."""
    values, vectors = jnp.linalg.eigh(a)
    values = jnp.maximum(values, 0)
    return values + eps * values[..., -1:], vectors


def _power(values: jax.Array, exponent: Any) -> jax.Array:
    """`values ** -exponent`, and 0 where `values` is 0."""
    return jnp.where(values > 0, jnp.where(values > 0, values, 1) ** -exponent, 0)


@jax.custom_jvp
def _inverse_power(a: jax.Array, exponent: Any, eps: Any) -> jax.Array:
    """`(a + eps max(eigenvalue) I) ** -exponent` of symmetric positive semidefinite matrices; 0 for `a = 0`."""
    values, vectors = _damped_eigh(a, eps)
    return matmul(vectors * _power(values, exponent)[..., None, :], vectors.mT)


@_inverse_power.defjvp
def _inverse_power_jvp(primals, tangents):
    # The derivative through the eigenvectors is infinite for equal eigenvalues, but that of the matrix function is
    # finite: in the basis of the eigenvectors it multiplies entry (i, j) by the divided difference of the power.
    a, exponent, eps = primals
    da, dexponent, deps = tangents
    values, vectors = _damped_eigh(a, eps)
    powers = _power(values, exponent)
    da = matmul(matmul(vectors.mT, da), vectors)
    top = values[..., -1] / (1 + eps)
    ridge = deps * top + eps * da[..., -1, -1]
    da = da + ridge[..., None, None] * jnp.eye(a.shape[-1], dtype=a.dtype)

    x, y = values[..., :, None], values[..., None, :]
    gap = x - y
    close = jnp.abs(gap) <= jnp.finfo(a.dtype).eps ** (1 / 3) * jnp.maximum(x, y)
    slope = -exponent * _power((x + y) / 2, exponent + 1)
    difference = (powers[..., :, None] - powers[..., None, :]) / jnp.where(close, 1, gap)
    tangent = da * jnp.where(close, slope, difference)
    log_values = jnp.log(jnp.where(values > 0, values, 1))
    tangent -= dexponent * (powers * log_values)[..., None] * jnp.eye(a.shape[-1], dtype=a.dtype)
    out = matmul(vectors * powers[..., None, :], vectors.mT)
    return out, matmul(matmul(vectors, tangent), vectors.mT)


def _matrix_norm(x: jax.Array) -> jax.Array:
    square = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _by_entry(g: jax.Array, v: jax.Array) -> jax.Array:
    """Adagrad's direction `g / sqrt(v)`, and 0 where `v` is 0."""
    return jnp.where(v > 0, g / jnp.sqrt(jnp.where(v > 0, v, 1)), 0)


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`: steps taken, momentum (or None), and statistics like the parameters.

    `left` and `right` hold the matrices of each leaf, `left_root` and `right_root` their cached roots, and `nu` the
    squares of the entries. Statistics that a leaf does not need are a scalar 0.
    """

    count: jax.Array
    mu: Any
    nu: Any
    left: Any
    right: Any
    left_root: Any
    right_root: Any


class _ShampooLeaf(NamedTuple):
    """Shampoo for one leaf. `correction` is the factor by which decaying statistics are too small."""

    eps: Any
    exponent: Any
    trace_normalize: bool
    grafting: str
    max_dim: int

    def init_second_moment(self, p: Any) -> jax.Array:
        needed = self.grafting == "diagonal" or not any(_sides(p, self.max_dim))
        return jnp.zeros_like(p, dtype=_common.wide(p)) if needed else jnp.zeros([], _common.wide(p))

    def root(self, correction: Any, s: jax.Array, other: jax.Array) -> jax.Array:
        """The inverse power of the statistic of one side; alone it takes the power -1/2."""
        if not _is_matrix(s):
            return s
        return _inverse_power(s / correction, self.exponent if _is_matrix(other) else 0.5, self.eps)

    def left_root(self, correction: Any, s: jax.Array, other: jax.Array) -> jax.Array:
        """The same with the factor of the trace."""
        root = self.root(correction, s, other)
        if not (_is_matrix(s) and _is_matrix(other) and self.trace_normalize):
            return root
        trace = jnp.trace(s, axis1=-2, axis2=-1)[..., None, None] / correction
        return root * _power(trace, 0.5 - 2 * self.exponent)

    def direction(
        self, correction: Any, g: jax.Array, v: jax.Array, left: jax.Array, right: jax.Array
    ) -> jax.Array:
        """The whitened gradient, with the length that grafting gives it."""
        if not (_is_matrix(left) or _is_matrix(right)):
            return _by_entry(g, v / correction)
        u = _common.whole(g)
        u = matmul(left, u) if _is_matrix(left) else u
        u = _common.placed_like(matmul(u, right) if _is_matrix(right) else u, g)
        if self.grafting == "none":
            return u
        norm = _matrix_norm(u)
        target = _matrix_norm(g if self.grafting == "sgd" else _by_entry(g, v / correction))
        return u * (target / jnp.where(norm > 0, norm, 1))


def scale_by_shampoo(
    b2: Scalar | None = None,
    eps: Scalar = 1e-6,
    *,
    b1: Scalar | None = None,
    exponent: Scalar = 0.25,
    trace_normalize: bool = True,
    precondition_every: Scalar = 10,
    grafting: Literal["none", "sgd", "diagonal"] = "none",
    max_dim: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """The direction of Shampoo: each gradient matrix, whitened from the left and from the right.

    For a leaf with gradient G of shape [..., a, b] (leading axes are a batch of matrices), at step t:

        L <- L + G G^T        R <- R + G^T G                    with b2:  L <- b2 L + (1 - b2) G G^T, ...
        direction = tr(L)^(2 exponent - 1/2)  L^-exponent  G  R^-exponent

    With `exponent` 1/4, the default, it is Shampoo, and the factor is 1. One step of the power iteration for
    the Kronecker product nearest to Adagrad's matrix H gives `H ~ (L x R) / tr(L)`, and hence
    `H^(-1/2) G = tr(L)^(1/2) L^(-1/2) G R^(-1/2)`: this is `exponent` 1/2. The factor makes the direction
    independent of the scale of the gradients. With `b2` the matrices are corrected for their start at 0. The
    roots of `L + eps max(eigenvalue) I` are computed by eigendecompositions under `lax.cond`, in each of the first
    `precondition_every` steps, where the matrices change most, and then at the multiples of this number.

    On a mesh with Explicit axes, every device has the whole gradient of each matrix within the step, and the
    matrices L and R and their roots; updates, momentum and `v` are placed as the parameters.

    A leaf with fewer than two axes takes Adagrad's direction `g / sqrt(v)`, with `v` the sum (or corrected
    mean) of its squares, and 0 where `v` is 0. A matrix with one side longer than `max_dim` is whitened from the
    other side only, `L^(-1/2) G`; one with two such sides is treated entry by entry.

    Args:
      b2: Decay of the statistics, in [0, 1). None: they are sums, as in Adagrad.
      eps: Damping relative to the largest eigenvalue, positive.
      b1: Decay of a moving average of the direction (corrected for its start at 0), in [0, 1). None: no momentum.
      exponent: Power of the inverse matrices, positive: 1/4 or 1/2.
      trace_normalize: Multiply by the factor with tr(L). It matters for an `exponent` other than 1/4.
      precondition_every: Steps between two computations of the roots, at least 1. Old roots amplify new components
        of a gradient: with more than 1 and `exponent` 1/2, use `grafting`.
      grafting: `"none"`; or take the norm of each matrix of the direction from another method: `"sgd"`, the norm of
        the gradient, or `"diagonal"`, that of `g / sqrt(v)`, which keeps `v` for every leaf.
      max_dim: Longest side that gets a matrix, a static integer.

    Returns:
      A gradient transformation. State: for an [a, b] leaf `2 (a^2 + b^2)` float32 numbers, and `a b` each for `b1`
      and `grafting="diagonal"`. Updates keep the dtype of the gradients. Under `optax.inject_hyperparams`,
      `max_dim` must be listed in `static_args`.

    Raises:
      TypeError: for a `trace_normalize` that is not a bool or a `max_dim` that is not a static integer.
      ValueError: for a rate or a number out of range, or an unknown `grafting`.

    References:
      "A New Perspective on Shampoo's Preconditioner"; "Shampoo: Preconditioned Stochastic Tensor Optimization".
      The rules for long sides and the damping relative to the largest eigenvalue are ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_shampoo()
      >>> g = jnp.array([[3.0, 0.0], [0.0, -0.1]])
      >>> print(tx.update(g, tx.init(g))[0].round(2) + 0.0)
      [[ 1.  0.]
       [ 0. -1.]]
    """
    if b2 is not None:
        _common.check_beta("b2", b2)
    _checks.number("eps", eps, above=0)
    if b1 is not None:
        _common.check_beta("b1", b1)
    _checks.number("exponent", exponent, above=0)
    _checks.flag("trace_normalize", trace_normalize)
    _common.check_steps("precondition_every", precondition_every, at_least=1)
    _checks.option("grafting", grafting, ("none", "sgd", "diagonal"))
    max_dim = _checks.integer("max_dim", max_dim, at_least=1)

    leafwise = _ShampooLeaf(eps, exponent, trace_normalize, grafting, max_dim)

    def init(params: optax.Params) -> ScaleByShampooState:
        return ScaleByShampooState(
            count=jnp.zeros([], jnp.int32),
            mu=None if b1 is None else _common.moments_like(params),
            nu=jax.tree.map(leafwise.init_second_moment, params),
            left=_init_statistics(params, 0, max_dim),
            right=_init_statistics(params, 1, max_dim),
            left_root=_init_statistics(params, 0, max_dim),
            right_root=_init_statistics(params, 1, max_dim),
        )

    def accumulate(old: jax.Array, new: jax.Array) -> jax.Array:
        return old + new if b2 is None else b2 * old + (1 - b2) * new

    # Branches made in `update` would be compiled anew in each call outside of `jit`.
    def new_roots(correction, left, right, old):
        del old
        return (
            jax.tree.map(functools.partial(leafwise.left_root, correction), left, right),
            jax.tree.map(functools.partial(leafwise.root, correction), right, left),
        )

    def old_roots(correction, left, right, old):
        del correction, left, right
        return old

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        correction = 1 if b2 is None else _common.bias_correction(b2, count)
        g = _common.widen(updates)
        left, right = _accumulate(accumulate, g, state.left, state.right)
        nu = jax.tree.map(lambda g, v: accumulate(v, g * g) if v.shape == g.shape else v, g, state.nu)

        roots = state.left_root, state.right_root
        if any(_is_matrix(s) for s in jax.tree.leaves((left, right))):
            due = (count <= precondition_every) | (count % precondition_every == 0)
            roots = lax.cond(due, new_roots, old_roots, correction, left, right, roots)
        direction = functools.partial(leafwise.direction, correction)
        u = jax.tree.map(direction, g, nu, *roots)
        mu = state.mu
        if b1 is not None:
            mu = _common.moving_average(b1, mu, u)
            start = _common.bias_correction(b1, count)
            u = jax.tree.map(lambda m: m / start, mu)
        new_state = ScaleByShampooState(count, mu, nu, left, right, *roots)
        return _common.cast_like(u, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar | None = 0.9,
    b2: Scalar | None = None,
    eps: Scalar = 1e-6,
    *,
    exponent: Scalar = 0.25,
    trace_normalize: bool = True,
    precondition_every: Scalar = 10,
    grafting: Literal["none", "sgd", "diagonal"] = "diagonal",
    max_dim: int = 8192,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo, ready to use: `params <- params - learning_rate (direction + weight_decay params)`.

    See `scale_by_shampoo` for the direction. With the default grafting each leaf takes a step as long as
    Adagrad's (with `b2`: as Adam's without momentum), so that learning rates carry over.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the momentum, in [0, 1). None: no momentum.
      b2: Decay of the statistics, in [0, 1). None: they are sums.
      eps: Damping relative to the largest eigenvalue, positive.
      exponent: Power of the inverse matrices, positive: 1/4 or 1/2.
      trace_normalize: See `scale_by_shampoo`.
      precondition_every: Steps between two computations of the roots, at least 1.
      grafting: Method that gives a step its length: `"none"`, `"sgd"` or `"diagonal"`.
      max_dim: Longest side that gets a matrix.
      weight_decay: Decoupled weight decay.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters.

    Raises:
      ValueError: as `scale_by_shampoo`, and for a negative learning rate or weight decay.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = shampoo(0.1)
      >>> params = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> g = jnp.array([[3.0, 0.0], [0.0, -0.1]])
      >>> print(optax.apply_updates(params, tx.update(g, tx.init(params), params)[0]).round(2) + 0.0)
      [[0.9 0. ]
       [0.  1.1]]
    """
    direction = scale_by_shampoo(
        b2,
        eps,
        b1=b1,
        exponent=exponent,
        trace_normalize=trace_normalize,
        precondition_every=precondition_every,
        grafting=grafting,
        max_dim=max_dim,
    )
    return _common.descend(direction, learning_rate, weight_decay, mask)


# SOAP.


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`: steps taken, moments, and statistics like the parameters.

    `mu` is in the basis of the parameters, `nu` in the eigenbasis. `left` and `right` hold the matrices of each leaf,
    `left_basis` and `right_basis` their eigenvectors, as columns. Statistics that a leaf does not need are a scalar 0.
    """

    count: jax.Array
    mu: Any
    nu: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


def _rotate(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """A matrix in the eigenbasis, `left^T x right`."""
    x = matmul(left.mT, x) if _is_matrix(left) else x
    return matmul(x, right) if _is_matrix(right) else x


def _rotate_back(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """A matrix in the basis of the parameters, `left x right^T`."""
    x = matmul(left, x) if _is_matrix(left) else x
    return matmul(x, right.mT) if _is_matrix(right) else x


def _eigenbasis(s: jax.Array) -> jax.Array:
    """The eigenvectors of a statistic, that of the largest eigenvalue first."""
    return jnp.flip(jnp.linalg.eigh(lax.stop_gradient(s))[1], -1) if _is_matrix(s) else s


def _turned(s: jax.Array, basis: jax.Array, nu: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The basis after a step of the power iteration, sorted by eigenvalues, and the moments of the sorted vectors."""
    if not _is_matrix(s):
        return basis, nu
    product = lax.stop_gradient(matmul(s, basis))
    order = jnp.argsort(-jnp.sum(basis * product, axis=-2), axis=-1)
    basis, _ = jnp.linalg.qr(jnp.take_along_axis(product, order[..., None, :], axis=-1))
    of_axis = order[..., :, None] if axis == -2 else order[..., None, :]
    return basis, _common.placed_like(jnp.take_along_axis(_common.whole(nu), of_axis, axis=axis), nu)


def scale_by_soap(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    *,
    precondition_every: Scalar = 10,
    max_dim: int = 10000,
) -> optax.GradientTransformationExtraArgs:
    """The direction of SOAP: Adam in the eigenbasis of Shampoo's matrices.

    For a leaf with gradient G of shape [..., a, b] (leading axes are a batch of matrices), with `Q_L` and `Q_R` the
    eigenvectors of L and R:

        m <- b1 m + (1 - b1) G                       v <- b2 v + (1 - b2) (Q_L^T G Q_R)^2
        direction = sqrt(1 - b2^t) / (1 - b1^t)  Q_L [(Q_L^T m Q_R) / (sqrt(v) + eps)] Q_R^T
        L <- b2 L + (1 - b2) G G^T                   R <- b2 R + (1 - b2) G^T G

    The first step only sets L, R and, by an eigendecomposition, the bases: its direction is 0, and t counts from the
    second one. Every `precondition_every` steps each basis takes a step of the power iteration: `Q <- qr(L Q)`, with
    the columns sorted by eigenvalue, and v with them. The bases are constants to the gradient.

    On a mesh with Explicit axes, every device has the whole gradient of each matrix within the step, and the matrices L
    and R and their bases; updates and moments are placed as the parameters.

    A leaf with fewer than two axes gets Adam. A matrix with one side longer than `max_dim` is rotated on the other side
    only; one with two such sides gets Adam.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment and of L and R, in [0, 1).
      eps: Added to the root of the second moment without bias correction, at least 0.
      precondition_every: Steps between two changes of the bases, at least 1.
      max_dim: Longest side that gets a matrix, a static integer.

    Returns:
      A gradient transformation. State: for an [a, b] leaf `2 (a^2 + b^2 + a b)` float32 numbers. Updates keep the dtype
      of the gradients. Under `optax.inject_hyperparams`, `max_dim` must be listed in `static_args`.

    Raises:
      TypeError: for a `max_dim` that is not a static integer.
      ValueError: for a rate or a number out of range.

    References:
      Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam". The authors' code gives each axis of a leaf
      with more than two a matrix of its own; here only the last two have one.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_soap()
      >>> g = jnp.array([[3.0, 0.0], [0.0, -0.1]])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(updates + 0.0)  # the first step sets the basis
      [[0. 0.]
       [0. 0.]]
      >>> print(tx.update(g, state)[0].round(2) + 0.0)
      [[ 1.  0.]
       [ 0. -1.]]
    """
    _common.check_beta("b1", b1)
    _common.check_beta("b2", b2)
    _checks.number("eps", eps, at_least=0)
    _common.check_steps("precondition_every", precondition_every, at_least=1)
    max_dim = _checks.integer("max_dim", max_dim, at_least=1)

    def init(params: optax.Params) -> ScaleBySoapState:
        return ScaleBySoapState(
            count=jnp.zeros([], jnp.int32),
            mu=_common.moments_like(params),
            nu=_common.moments_like(params),
            left=_init_statistics(params, 0, max_dim),
            right=_init_statistics(params, 1, max_dim),
            left_basis=_init_statistics(params, 0, max_dim),
            right_basis=_init_statistics(params, 1, max_dim),
        )

    # Branches made in `update` would be compiled anew in each call outside of `jit`.
    def kept(left, right, left_basis, right_basis, nu):
        del left, right
        return left_basis, right_basis, nu

    def turned(left, right, left_basis, right_basis, nu):
        pairs = jax.tree.map(functools.partial(_turned, axis=-2), left, left_basis, nu)
        left_basis, nu = (jax.tree.map(lambda _, pair, i=i: pair[i], left, pairs) for i in (0, 1))
        pairs = jax.tree.map(functools.partial(_turned, axis=-1), right, right_basis, nu)
        right_basis, nu = (jax.tree.map(lambda _, pair, i=i: pair[i], right, pairs) for i in (0, 1))
        return left_basis, right_basis, nu

    def first(left, right, left_basis, right_basis, nu):
        del left_basis, right_basis
        return jax.tree.map(_eigenbasis, left), jax.tree.map(_eigenbasis, right), nu

    def rotated(g, left, right):
        return _common.placed_like(_rotate(_common.whole(g), left, right), g) if left.ndim + right.ndim else g

    def direction(g, m, v, left, right):
        some = v > 0
        root = jnp.where(some, jnp.sqrt(jnp.where(some, v, 1)), 0)
        u = safe_divide(rotated(m, left, right), root + eps)
        if not left.ndim + right.ndim:
            return u
        return _common.placed_like(_rotate_back(_common.whole(u), left, right), g)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        begins = count == 1
        g = _common.widen(updates)
        bases = state.left_basis, state.right_basis
        squares = jax.tree.map(lambda g, *bases: jnp.square(rotated(g, *bases)), g, *bases)

        def unless_first(new, old):
            return jax.tree.map(lambda new, old: jnp.where(begins, old, new), new, old)

        mu = unless_first(_common.moving_average(b1, state.mu, g), state.mu)
        nu = unless_first(_common.moving_average(b2, state.nu, squares), state.nu)
        t = jnp.maximum(count - 1, 1)
        step = jnp.sqrt(_common.bias_correction(b2, t)) / _common.bias_correction(b1, t)
        u = jax.tree.map(lambda u: step * u, jax.tree.map(direction, g, mu, nu, *bases))
        u = unless_first(u, jax.tree.map(lambda g: 0 * g, g))  # a NaN shows

        left, right = _accumulate(lambda old, new: b2 * old + (1 - b2) * new, g, state.left, state.right)
        if any(_is_matrix(s) for s in jax.tree.leaves((left, right))):
            due = jnp.where((count - 1) % precondition_every == 0, 1, 0)
            *bases, nu = lax.switch(jnp.where(begins, 2, due), (kept, turned, first), left, right, *bases, nu)
        new_state = ScaleBySoapState(count, mu, nu, left, right, *bases)
        return _common.cast_like(u, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    *,
    precondition_every: Scalar = 10,
    max_dim: int = 10000,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP, ready to use: `params <- params - learning_rate (direction + weight_decay params)`.

    See `scale_by_soap` for the direction. The authors' code decays after the step, and not in the first one.

    Args:
      learning_rate: A number or a schedule; 3e-3 in the authors' code.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment and of the matrices, in [0, 1).
      eps: Added to the root of the second moment, at least 0.
      precondition_every: Steps between two changes of the bases, at least 1.
      max_dim: Longest side that gets a matrix.
      weight_decay: Decoupled weight decay.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.

    Returns:
      A gradient transformation whose `update` needs the parameters. Under `optax.inject_hyperparams`, `max_dim` must be
      listed in `static_args`.

    Raises:
      TypeError: as `scale_by_soap`.
      ValueError: as `scale_by_soap`, and for a negative learning rate or weight decay.

    References:
      Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = soap(1.0)
      >>> params, g = jnp.ones((2, 2)), jnp.array([[3.0, 0.0], [0.0, -0.1]])
      >>> _, state = tx.update(g, tx.init(params), params)
      >>> print(tx.update(g, state, params)[0].round(2) + 0.0)
      [[-1.  0.]
       [ 0.  1.]]
    """
    direction = scale_by_soap(b1, b2, eps, precondition_every=precondition_every, max_dim=max_dim)
    return _common.descend(direction, learning_rate, weight_decay, mask)


# M-FAC.


class ScaleByMfacState(NamedTuple):
    """State of `scale_by_mfac`: steps taken, the last gradients, and the part of each leaf in their products."""

    count: jax.Array
    window: Any
    gram: Any


def scale_by_mfac(window: int = 32, damping: Scalar = 1e-3) -> optax.GradientTransformationExtraArgs:
    """The direction of M-FAC: the gradient times the inverse of the damped empirical Fisher matrix.

    The rows of a matrix G are the last m gradients, each over the whole tree and including the newest:

        F = damping I + G^T G / m        direction = F^-1 g

    F is never formed. Because `g` is a row of G, say the k-th, the direction is
    `m G^T (m damping I + G G^T)^-1 e_k`: one m x m solve, without the cancellation of the usual formula. The
    products `G G^T` are kept, so a step costs three passes over the stored gradients. In the first steps the
    missing gradients count as 0, and m stays the same. For momentum put `optax.ema` after it; weight decay composes
    as usual.

    The length of the direction is about `m / ||g||` for large gradients and `||g|| / damping` for small ones. If the
    damping is below the rounding error of the products, that error replaces it.

    Args:
      window: The number m of gradients kept, a static integer of at least 1: 4 m bytes per parameter. The paper
        takes 1024, on small models.
      damping: Positive. The authors' code has 1e-5, with gradients that include weight decay.

    Returns:
      A gradient transformation. Updates keep the dtype of the gradients. Under `optax.inject_hyperparams`,
      `window` must be listed in `static_args`.

    Raises:
      TypeError: for a `window` that is not a static integer.
      ValueError: for a `window` below 1 or a damping that is not positive.

    References:
      "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information".

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_mfac(window=1, damping=1.0)
      >>> g = jnp.array([1.0, -1.0, 1.0])
      >>> print(tx.update(g, tx.init(g))[0].round(2))  # g / (1 + ||g||^2)
      [ 0.25 -0.25  0.25]
    """
    m = _checks.integer("window", window, at_least=1)
    _checks.number("damping", damping, above=0)

    def init(params: optax.Params) -> ScaleByMfacState:
        return ScaleByMfacState(
            count=jnp.zeros([], jnp.int32),
            # Copies of zeros like the parameter lie where it does.
            window=jax.tree.map(lambda p: jnp.stack([p] * m), _common.moments_like(params)),
            gram=jax.tree.map(lambda p: jnp.zeros((m, m), _common.wide(p)), params),
        )

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del params, extra
        k = state.count % m
        g = _common.widen(updates)
        rows = jax.tree.map(lambda rows, g: lax.dynamic_update_index_in_dim(rows, g, k, 0), state.window, g)

        def products(gram, rows, g):
            new = jnp.sum(rows * g, axis=tuple(range(1, rows.ndim)))
            return jnp.asarray(gram).at[k].set(new).at[:, k].set(new)

        gram = jax.tree.map(products, state.gram, rows, g)
        total = jnp.broadcast_to(_common.total(gram), (m, m))
        rounding = jnp.finfo(total.dtype).eps * m * jnp.trace(total)
        matrix = total + jnp.maximum(m * damping, rounding) * jnp.eye(m, dtype=total.dtype)
        unit = jnp.zeros(m, total.dtype).at[k].set(1)
        weights = m * jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), unit)
        u = jax.tree.map(
            lambda rows: jnp.tensordot(weights.astype(rows.dtype), rows, axes=1, precision="highest"), rows
        )
        new_state = ScaleByMfacState(jnp.asarray(optax.safe_increment(state.count)), rows, gram)
        return _common.cast_like(u, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


# Newton.


def gradient_regularized_newton_step(
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    radius: Scalar,
    *,
    curvature: Callable[[Any, Any], Any] | None = None,
    sufficient_decrease: Scalar = 1e-4,
    max_trials: int = 20,
    cg_steps: int = 100,
    cg_tol: Scalar = 1e-6,
) -> tuple[Any, jax.Array, jax.Array]:
    """One Newton step damped by the norm of the gradient: `params - (B + (||g|| / radius) I)^-1 g`.

    B is the Hessian of the loss or an approximation of it. The damping vanishes at the solution, which keeps
    Newton's fast convergence, and bounds the step by `radius` if B is positive semidefinite. A step that violates
    Armijo's rule `loss(new) <= loss + sufficient_decrease <g, step>`, or does not descend, is tried again with half
    the radius; after an accepted step the radius is doubled. The loss never increases.

    *Reconstructed*: the paper adapts the radius by a measure of smoothness along the gradient; Armijo's rule
    in its place is ours.

    Args:
      loss_fn: A function from the parameters to a scalar loss of the full data, differentiable twice (once
        with `curvature`).
      params: A pytree of floating arrays.
      radius: Positive; start with the length of a step you would trust. `jnp.inf` is Newton's method (it cannot be
        halved: use it on quadratics only).
      curvature: A function `(params, vector) -> B vector` with B symmetric, e.g. a Gauss-Newton product. None: the
        Hessian, by forward-over-reverse differentiation.
      sufficient_decrease: Armijo's constant, in (0, 1/2].
      max_trials: Largest number of steps tried, static; if none is accepted the parameters stay the same.
      cg_steps: Largest number of conjugate gradient iterations per trial, static.
      cg_tol: Relative residual at which the iterations stop, at least 0.

    Returns:
      The new parameters, the radius for the next step, and the loss at the new parameters.

    Raises:
      TypeError: for a `loss_fn` or `curvature` that is not callable.
      ValueError: for a number out of range.

    References:
      "Gradient-Normalized Smoothness for Optimization with Approximate Hessians".

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum(jnp.array([1.0, 10.0]) * (x - 3.0) ** 2)
      >>> x, radius, value = gradient_regularized_newton_step(loss, jnp.zeros(2), jnp.inf)
      >>> print(x.round(4), value.round(4))
      [3. 3.] 0.0
    """
    for name, function in (("loss_fn", loss_fn), ("curvature", curvature)):
        if not callable(function) and not (name == "curvature" and function is None):
            raise TypeError(f"{name} must be a function, got {_checks.describe(function)}")
    _checks.number("radius", radius, above=0)
    _checks.number("sufficient_decrease", sufficient_decrease, above=0, at_most=0.5)
    max_trials = _checks.integer("max_trials", max_trials, at_least=1)
    cg_steps = _checks.integer("cg_steps", cg_steps, at_least=1)
    _checks.number("cg_tol", cg_tol, at_least=0)

    value = loss_fn(params)
    if curvature is None:
        g, product = jax.linearize(jax.grad(loss_fn), params)
    else:
        g, product = jax.grad(loss_fn)(params), lambda v: curvature(params, v)
    norm = optax.tree.norm(g)
    tol: Any = cg_tol

    def attempt(carry):
        trial, _, radius, _, _ = carry
        damping = norm / radius

        def damped(v):
            return jax.tree.map(lambda b, v: (b + damping * v).astype(v.dtype), product(v), v)

        step, _ = jax.scipy.sparse.linalg.cg(damped, g, tol=tol, maxiter=cg_steps)
        new = jax.tree.map(lambda p, s: (p - s).astype(jnp.result_type(p)), params, step)
        new_value = loss_fn(new)
        decrease = jnp.asarray(optax.tree.vdot(g, step))
        accepted = (decrease >= 0) & (new_value <= value - sufficient_decrease * decrease)
        new, new_value = optax.tree.where(accepted, (new, new_value), (params, value))
        return trial + 1, accepted, radius * jnp.where(accepted, 2, 0.5), new, new_value

    def trying(carry):
        trial, accepted, *_ = carry
        return ~accepted & (trial < max_trials)

    start = (0, jnp.asarray(False), jnp.asarray(radius, _common.wide(norm)), params, value)
    _, _, new_radius, new_params, new_value = lax.while_loop(trying, attempt, start)
    return new_params, new_radius, new_value
