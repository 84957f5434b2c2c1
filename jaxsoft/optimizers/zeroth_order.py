"""Zeroth-order optimization.

Training from values of the loss alone: there is no backward pass, and no activations are kept. Slow in steps and cheap
in memory, for fine-tuning a model where only inference fits, and for losses that have no gradient.

| | stores | use |
| --- | --- | --- |
| `mezo` | nothing beside what inference needs | SGD, its sign and conservative variants |
| `zo_value_and_grad` | the estimate and one perturbed copy | any optax optimizer: momentum, Adam; several blocks |
| `forward_gradient` | the estimate and its direction | the same, with exact slopes, if the loss has a forward mode |
| `zo_projection`, `shared_randomness_update` | one perturbed copy | workers that exchange one byte per step |
| `gp_gradient` | the points of the past | few parameters and few values: no new ones for a gradient |

```python
import functools

import jax
import jax.numpy as jnp

import jaxsoft

params, batch = {"w": jnp.ones(3)}, jnp.arange(3.0)


def loss_fn(params, batch):
    return jnp.sum((params["w"] - batch) ** 2)


optimizer = jaxsoft.optimizers.mezo(1e-6)
state = optimizer.init(jax.random.key(0))
step = jax.jit(functools.partial(optimizer.step, loss_fn), donate_argnums=0)
params, state, value = step(params, state, batch)
```

Why `mezo` needs no more memory than inference: the direction is a function of its key, written as one elementwise
expression, so the compiler computes it inside the loop that adds it to the parameters. The parameters are moved in
place, which donation allows. And the program contains the loss once, in a loop over the places where it is evaluated.
`python benchmarks/zeroth_order.py` measures it.

Keep parameters in float32, or pass `in_place=False` for lower precision. In place, replicas of a model round alike only
if they see the same data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask, Scalar

Distribution = Literal["normal", "rademacher"]
"""Distribution of the entries of a direction: standard normal, or -1 and 1 with equal probability."""

Differences = Literal["two_side", "one_side"]
"""`(L(p + eps z) - L(p - eps z)) / (2 eps)` or `(L(p + eps z) - L(p)) / eps`."""

Sign = Literal["scalar", "elementwise"] | None
"""Takes the sign of the projected gradient, of each entry of the estimate, or none."""

Estimator: TypeAlias = Callable[..., tuple[jax.Array, Any]]
"""`(params, key, *args, **kwargs) -> (value, estimate)`."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry-2x32
_PARITY = np.uint32(0x1BD11BDA)


# Random directions.


def _threefry_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The bits of `jax.random.bits(key, shape)` as one elementwise expression.

    On a CPU JAX computes random numbers by a loop of array operations, which stores several arrays of the given shape.
    Written out, all of it fuses into the operation that uses them, and nothing is stored.
    """
    k0, k1 = jax.random.key_data(key)
    # The compiler must not know the positions: it moves constant values out of a loop and would store them.
    _, one = _common.separate((k0, jnp.uint32(1)))
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        position = position + lax.broadcasted_iota(jnp.uint32, shape, axis) * (one * np.uint32(stride))
        stride *= shape[axis]

    keys = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = jnp.full(shape, k0), position + k1
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << np.uint32(distance)) | (x1 >> np.uint32(32 - distance)))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0 ^ x1


def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if str(jax.random.key_impl(key)) in ("fry", "threefry2x32") and math.prod(shape) < 2**32:
        return _threefry_bits(key, shape)
    return jax.random.bits(key, shape, jnp.uint32)


def _unit_interval(bits: jax.Array) -> jax.Array:
    """Uniform float32 numbers in [0, 1) from 32 random bits each."""
    return lax.bitcast_convert_type((bits >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32) - 1


class _Directions(NamedTuple):
    """Draws directions."""

    distribution: Distribution
    sparsity: Scalar

    def _draw_leaf(self, key: jax.Array, leaf: Any) -> jax.Array:
        bits = _bits(key, jnp.shape(leaf))
        if self.distribution == "rademacher":
            z = jnp.where(bits >> np.uint32(31), jnp.float32(1), jnp.float32(-1))
        else:  # like `jax.random.normal`
            low = np.nextafter(np.float32(-1), np.float32(0))
            u = _unit_interval(bits) * (np.float32(1) - low) + low
            z = np.float32(np.sqrt(2)) * lax.erf_inv(jnp.maximum(low, u))
        if not isinstance(self.sparsity, float) or self.sparsity != 0.0:
            kept = _unit_interval(_bits(jax.random.fold_in(key, 1), jnp.shape(leaf))) >= self.sparsity
            z = jnp.where(kept, z, 0)
        return z.astype(_common.wide(leaf))

    def draw(self, key: jax.Array, params: Any) -> Any:
        """One direction, shaped like the parameters, in their `wide` dtypes."""
        leaves, structure = jax.tree.flatten(params)
        if not leaves:
            return params
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten([self._draw_leaf(keys[i], leaf) for i, leaf in enumerate(leaves)])

    def move(self, params: Any, key: jax.Array, distance: Any) -> Any:
        """`params + distance z`, computed in at least float32, in the dtype of the parameters."""

        def move(p, z):
            return (jnp.asarray(p, z.dtype) + distance.astype(z.dtype) * z).astype(jnp.result_type(p))

        return jax.tree.map(move, params, self.draw(key, params))


def _directions(distribution: str, sparsity: Scalar) -> _Directions:
    _checks.option("distribution", distribution, ("normal", "rademacher"))
    _checks.number("sparsity", sparsity, at_least=0, below=1)
    return _Directions(distribution, sparsity)  # pyright: ignore[reportArgumentType]


def random_direction(
    key: jax.Array, params: Any, *, distribution: Distribution = "normal", sparsity: Scalar = 0.0
) -> Any:
    """The random direction z that this module's functions derive from a key.

    Leaf i, in the order of the flattened tree, is `jax.random.normal(jax.random.split(key, n)[i], shape)`,
    bit for bit if JAX draws numbers by their position in the array (`jax_threefry_partitionable`, its default). It is
    computed by one elementwise expression, which fuses into the operation that uses it: a direction that is only
    added to parameters is never stored.

    Args:
      key: A PRNG key. Keys of implementations other than Threefry work, but their directions are stored.
      params: A pytree of real arrays; only their shapes and dtypes matter.
      distribution: "normal", or "rademacher" (-1 or 1).
      sparsity: Fraction of the entries set to 0, in [0, 1), drawn independently from the same key.

    Returns:
      A pytree like `params`, in their dtypes but at least float32.

    Raises:
      ValueError: for an unknown distribution or a sparsity out of range.
      TypeError: for a leaf that is not real.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import random_direction
      >>> z = random_direction(jax.random.key(0), jnp.zeros(4), distribution="rademacher")
      >>> print(jnp.abs(z))
      [1. 1. 1. 1.]
    """
    return _directions(distribution, sparsity).draw(key, params)


# Estimates.


def _scalar_loss(loss_fn: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[Any], jax.Array]:
    """The loss as a function of the parameters, a scalar in at least float32."""

    def loss(params: Any) -> jax.Array:
        value = loss_fn(params, *args, **kwargs)
        shaped = hasattr(value, "shape") and value.shape == ()
        if not shaped or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"loss_fn must return a real scalar, got {_checks.describe(value)}")
        return value.astype(_common.wide(value))

    return loss


class _Difference(NamedTuple):
    """The slope of the loss along a direction, from two of its values."""

    eps: Scalar
    differences: Differences

    def places(self) -> list[Any]:
        """Where, along the direction, the two values are taken."""
        return [self.eps, -self.eps if self.differences == "two_side" else 0.0]

    def project(self, losses: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The value of the loss and its slope."""
        if self.differences == "two_side":
            return (losses[0] + losses[1]) / 2, (losses[0] - losses[1]) / (2 * self.eps)
        return losses[1], (losses[0] - losses[1]) / self.eps


def _difference(eps: Scalar, differences: Differences) -> _Difference:
    _checks.number("eps", eps, above=0)
    _checks.option("differences", differences, ("two_side", "one_side"))
    return _Difference(eps, differences)


def _mean_over_samples(
    estimate: Callable[[jax.Array], tuple[jax.Array, Any]], key: jax.Array, samples: int
) -> tuple[jax.Array, Any]:
    """The mean of `estimate(key)` over the keys of the samples, one at a time."""
    keys = jax.random.split(key, samples)
    if samples == 1:
        return estimate(keys[0])

    def step(total, key):
        return jax.tree.map(jnp.add, total, estimate(key)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(estimate, keys[0]))
    total, _ = lax.scan(step, zeros, keys)
    return jax.tree.map(lambda x: x / samples, total)


def _block_ids(blocks: Any, params: Any) -> tuple[Any, int]:
    """The block number of each leaf, and the number of blocks."""
    labels = blocks(params) if _common.is_function(blocks) else blocks
    try:
        labels = _common.broadcast(labels, params)
    except ValueError as error:
        raise ValueError(f"blocks must be a pytree of labels, a prefix of params: {error}") from error
    order: dict[Any, int] = {}
    return jax.tree.map(lambda label: order.setdefault(label, len(order)), labels), max(len(order), 1)


def zo_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    eps: Scalar = 1e-3,
    samples: int = 1,
    differences: Differences = "two_side",
    sign: Sign = None,
    distribution: Distribution = "normal",
    sparsity: Scalar = 0.0,
    blocks: Any = None,
) -> Estimator:
    """A gradient from values of the loss alone, `mean_j rho_j z_j`, for any optax optimizer.

    Each sample j draws a random direction `z` shaped like the parameters p and computes

        rho = (L(p + eps z) - L(p - eps z)) / (2 eps)        gradient = rho z

    On a quadratic the two-sided difference is exact, `rho = <gradient, z>`. The expectation of the estimate is then the
    gradient; in d dimensions (for large d) its mean square is `(d + 2) / samples` times that of the gradient. With
    `optax.sgd` it is ZO-SGD, with `optax.sgd(momentum=0.9)` ZO-SGD-MMT, with `optax.adam` ZO-Adam. `mezo` stores no
    estimate at all.

    The loss is compiled once and evaluated `2 samples` times (times the number of blocks), one evaluation after the
    other. It must be the same function each time: no dropout, or a fixed key. Parameters in low precision lose
    perturbations below their resolution (bfloat16: `|p| / 256`): use a larger `eps` then.

    Args:
      loss_fn: `(params, *args, **kwargs) -> scalar`. Compute it in at least float32, since the estimate subtracts
        nearly equal values.
      eps: Length of the perturbation, positive; usually 1e-4 to 1e-2.
      samples: Number of directions to average over, at least 1.
      differences: "two_side", or "one_side": `rho = (L(p + eps z) - L(p)) / eps`.
      sign: "scalar" gives `sign(rho) z` (ZO-SGD-Sign), "elementwise" the sign of each entry of the estimate.
      distribution: Distribution of the entries of z, "normal" or "rademacher".
      sparsity: Fraction of the entries of z that are 0 (a new random mask for each sample). The expectation of
        the estimate is then `(1 - sparsity)` times the gradient.
      blocks: Labels of the leaves: a pytree that is a prefix of the parameters, or a function from them to one. Leaves
        with the same label are perturbed together, one label after the other, each with its own `rho`: more
        evaluations, less variance. None: all leaves together.

    Returns:
      A function `(params, key, *args, **kwargs) -> (value, gradients)`. The value is `(L(p + eps z) +
      L(p - eps z)) / 2` or, one-sided, `L(p)`; gradients have the dtypes of the parameters.

    Raises:
      ValueError: for an option out of range, or a loss that is not a real scalar.
      TypeError: for parameters that are not real.

    References:
      "Fine-Tuning Language Models with Just Forward Passes"; "Revisiting Zeroth-Order Optimization for
      Memory-Efficient LLM Fine-Tuning: A Benchmark".

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import zo_value_and_grad
      >>> loss = lambda p: jnp.sum(p**2)
      >>> estimate = zo_value_and_grad(loss, samples=2000)
      >>> value, gradient = jax.jit(estimate)(jnp.array([1.0, -2.0]), jax.random.key(0))
      >>> print(value.round(1), jnp.sign(gradient))
      5.0 [ 1. -1.]
    """
    difference = _difference(eps, differences)
    samples = _checks.integer("samples", samples, at_least=1)
    _checks.option("sign", sign, (None, "scalar", "elementwise"))
    directions = _directions(distribution, sparsity)

    def value_and_grad(params: Any, key: jax.Array, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        loss = _scalar_loss(loss_fn, args, kwargs)
        places = jnp.asarray(difference.places(), jnp.result_type(float))
        ids, count = _block_ids(0 if blocks is None else blocks, params)

        def estimate(key):
            def value_at(place_and_block):
                place, block = place_and_block
                here, place = _common.separate((key, place))  # a new draw: the direction is not stored
                moved = directions.move(params, here, place)
                if blocks is not None:
                    moved = jax.tree.map(lambda p, m, i: jnp.where(i == block, m, p), params, moved, ids)
                return loss(moved)

            grid = jnp.tile(places, count), jnp.repeat(jnp.arange(count), 2)
            losses = lax.map(value_at, grid).reshape(count, 2)
            values, rhos = jax.vmap(difference.project)(losses)
            if sign == "scalar":
                rhos = jnp.sign(rhos)
            grads = jax.tree.map(lambda i, z: rhos[i].astype(z.dtype) * z, ids, directions.draw(key, params))
            return jnp.mean(values), grads

        value, grads = _mean_over_samples(estimate, key, samples)
        if sign == "elementwise":
            grads = jax.tree.map(jnp.sign, grads)
        return value, _common.cast_like(grads, params)

    return value_and_grad


def zo_projection(
    loss_fn: Callable[..., Any],
    *,
    eps: Scalar = 1e-3,
    differences: Differences = "two_side",
    distribution: Distribution = "normal",
    sparsity: Scalar = 0.0,
) -> Estimator:
    """The only number that a zeroth-order step needs: the slope of the loss along the direction of a key.

    `rho = (L(p + eps z) - L(p - eps z)) / (2 eps)` with `z = random_direction(key, params)`. Workers that know each
    other's keys exchange only this number: see `shared_randomness_update`.

    Args:
      loss_fn: `(params, *args, **kwargs) -> scalar`.
      eps: Length of the perturbation, positive.
      differences: "two_side" or "one_side".
      distribution: Distribution of the entries of z, "normal" or "rademacher".
      sparsity: Fraction of the entries of z that are 0.

    Returns:
      A function `(params, key, *args, **kwargs) -> (value, rho)`, two scalars. The parameters get no rounding errors,
      so they stay equal on all workers.

    Raises:
      ValueError: for an option out of range, or a loss that is not a real scalar.

    References:
      "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using
      Shared Randomness".

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import random_direction, zo_projection
      >>> p, key = jnp.array([1.0, -2.0]), jax.random.key(0)
      >>> value, rho = zo_projection(lambda p: jnp.sum(p**2), eps=0.1)(p, key)
      >>> print(jnp.allclose(rho, 2 * p @ random_direction(key, p), atol=1e-4))
      True
    """
    difference = _difference(eps, differences)
    directions = _directions(distribution, sparsity)

    def projection(params: Any, key: jax.Array, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        loss = _scalar_loss(loss_fn, args, kwargs)
        places = jnp.asarray(difference.places(), jnp.result_type(float))

        def value_at(place):
            here, place = _common.separate((key, place))  # a new draw: the direction is not stored
            return loss(directions.move(params, here, place))

        return difference.project(lax.map(value_at, places))

    return projection


def forward_gradient(
    loss_fn: Callable[..., Any], *, samples: int = 1, distribution: Distribution = "normal"
) -> Estimator:
    """A gradient by forward-mode differentiation along random directions, `mean_j <gradient, z_j> z_j`.

    The slope along z is exact (one `jax.jvp`); `zo_value_and_grad` takes a difference of two values. No activations are
    kept for a backward pass. It costs about two evaluations of the loss.

    Args:
      loss_fn: `(params, *args, **kwargs) -> scalar`.
      samples: Number of directions to average over, at least 1.
      distribution: Distribution of the entries of z, "normal" or "rademacher".

    Returns:
      A function `(params, key, *args, **kwargs) -> (value, gradients)` with the exact value; gradients have
      the dtypes of the parameters. It is unbiased.

    Raises:
      ValueError: for an option out of range, or a loss that is not a real scalar.
      TypeError: for parameters that are not real.

    References:
      "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark".

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import forward_gradient
      >>> estimate = forward_gradient(lambda p: jnp.sum(p**2), samples=2000)
      >>> value, gradient = jax.jit(estimate)(jnp.array([1.0, -2.0]), jax.random.key(0))
      >>> print(value, jnp.sign(gradient))
      5.0 [ 1. -1.]
    """
    samples = _checks.integer("samples", samples, at_least=1)
    directions = _directions(distribution, 0.0)

    def value_and_grad(params: Any, key: jax.Array, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        loss = _scalar_loss(loss_fn, args, kwargs)
        primals = jax.tree.map(jnp.asarray, params)

        def estimate(key):
            z = directions.draw(key, primals)
            value, slope = jax.jvp(loss, (primals,), (_common.cast_like(z, primals),))
            return value, jax.tree.map(lambda z: slope.astype(z.dtype) * z, z)

        value, grads = _mean_over_samples(estimate, key, samples)
        return value, _common.cast_like(grads, params)

    return value_and_grad


def gp_gradient(
    params: Any,
    points: Any,
    values: jax.Array,
    *,
    lengthscale: Scalar,
    noise: Scalar,
    where: jax.Array | None = None,
) -> Any:
    """The gradient of a Gaussian process that was fitted to values of the loss, `d/dp k(p, X) (K + noise^2 I)^-1 y`.

    The posterior mean of the loss has a gradient everywhere, also where the loss was not evaluated: the values of the
    past replace finite differences. The kernel is `k(p, q) = exp(-|p - q|^2 / (2 lengthscale^2))`, and K holds the
    kernel of every two points. It needs n^2 numbers for n points, and dimensions so few that the points are near the
    parameters.

    Args:
      params: p, where the gradient is taken: arrays in any pytree.
      points: X, the same tree with a leading axis of size n: where the loss was evaluated.
      values: `[n]`, y, the losses there. The mean of the process is 0: subtract the mean of the values.
      lengthscale: the distance over which the loss changes, positive.
      noise: the standard deviation of the noise in the values relative to that of the loss, positive.
      where: `[n]` booleans, True = counts: a buffer need not be full.

    Returns:
      A gradient like `params`, with its dtypes; computed in float32 or wider. 0 if no point counts.

    Raises:
      TypeError: for leaves that are not real, values that are not floating, or a mask that is not boolean.
      ValueError: for trees or shapes that do not match, or a number out of range.

    References:
      "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients". The kernel is ours.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import gp_gradient
      >>> points = jax.random.normal(jax.random.key(0), (40, 2))
      >>> values = jnp.sum(points**2, axis=1)
      >>> mean = jnp.mean(values)
      >>> p = jnp.array([0.5, -0.25])
      >>> print(gp_gradient(p, points, values - mean, lengthscale=2.0, noise=0.01).round(1))
      [ 1.  -0.5]
    """
    _checks.number("lengthscale", lengthscale, above=0)
    _checks.number("noise", noise, above=0)
    _checks.floating("values", values)
    if values.ndim != 1:
        raise ValueError(f"values must have shape [n], got shape {values.shape}")
    (n,) = values.shape
    leaves, structure = jax.tree.flatten(params)
    if jax.tree.structure(points) != structure:
        raise ValueError(
            f"points must have the structure of params, {structure}, got {jax.tree.structure(points)}"
        )
    for point, leaf in zip(jax.tree.leaves(points), leaves):
        _checks.shape("points", point, (n, *jnp.shape(leaf)), "that of params after an axis of points")
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, (n,), "one boolean per point")
    dtype = _common.wide(*leaves, *jax.tree.leaves(points), values)
    params_wide, points_wide = (jax.tree.map(lambda x: jnp.asarray(x, dtype), t) for t in (params, points))
    p, unravel = ravel_pytree(params_wide)
    x, y = jax.vmap(lambda point: ravel_pytree(point)[0])(points_wide), jnp.asarray(values, dtype)
    counts = jnp.ones(n, bool) if where is None else jnp.asarray(where)
    x, y = jnp.where(counts[:, None], x, p), jnp.where(counts, y, 0)

    def kernel(a, b):
        gap = a[:, None] - b
        return jnp.where(counts, jnp.exp(-jnp.sum(gap * gap, axis=-1) / (2 * lengthscale**2)), 0)

    gram = jnp.where(counts[:, None], kernel(x, x), 0) + noise**2 * jnp.eye(n, dtype=dtype)
    weights = kernel(p[None], x)[0] * jax.scipy.linalg.solve(gram, y, assume_a="pos")
    gradient = _common.matmul(weights, x - p) / lengthscale**2
    return _common.cast_like(unravel(gradient), params)


# Steps.


def _decay(params: Any, rate: Any, mask: Mask) -> Any:
    """`(1 - rate) params` for the leaves of the mask."""

    def decay(p, flag):
        w = jnp.asarray(p, _common.wide(p))
        return (w - rate * flag * w).astype(jnp.result_type(p))

    return jax.tree.map(decay, params, _common.broadcast_mask(mask, params))


def _walk(params: Any, keys: jax.Array, distances: jax.Array, directions: _Directions) -> Any:
    """`params + sum_i distances_i z_i`, one direction at a time."""

    def step(params, direction):
        key, distance = direction
        return directions.move(params, key, distance), None

    return lax.scan(step, params, (keys, distances))[0]


class MezoState(NamedTuple):
    """State of `mezo`: steps taken and the key from which all directions are derived."""

    count: jax.Array
    key: jax.Array


class Mezo(NamedTuple):
    """What `mezo` returns, a pair of pure functions.

    Attributes:
      init: `key -> state`.
      step: `(loss_fn, params, state, *args, **kwargs) -> (params, state, value)`, where `loss_fn` is
        `(params, *args, **kwargs) -> scalar` and the value is that of `zo_value_and_grad`.
    """

    init: Callable[[jax.Array], MezoState]
    step: Callable[..., tuple[Any, MezoState, jax.Array]]


class _Search(NamedTuple):
    """How `mezo` evaluates the loss along a direction z."""

    directions: _Directions
    difference: _Difference
    sign: Sign
    conservative: bool
    in_place: bool

    def coefficient(self, losses: jax.Array) -> jax.Array:
        """The factor of z in the estimate."""
        _, rho = self.difference.project(losses)
        rho = jnp.where(jnp.isfinite(rho), rho, 0)
        return rho if self.sign is None else jnp.sign(rho)

    def explore(self, loss: Callable[[Any], jax.Array], params: Any, key: jax.Array, rate: Any) -> Any:
        """The parameters at the place of the last value, this place, and the values of the loss."""
        count = 5 if self.conservative else 2

        def visit(carry, index):
            moved, place, losses = carry
            step = rate * self.coefficient(losses)  # known from the third value on
            ahead = [*self.difference.places(), 0.0, -step, step][:count]
            target = jnp.stack([jnp.asarray(a, place.dtype) for a in ahead])[index]
            here, place = _common.separate((key, place))  # a new draw: the direction is not stored
            if self.in_place:
                moved = self.directions.move(moved, here, target - place)
                value = loss(moved)
            else:
                target, value = place, loss(self.directions.move(moved, here, target))
            return (moved, target, losses.at[index].set(value)), None

        dtype = jax.eval_shape(loss, params).dtype
        start = params, jnp.zeros([], dtype), jnp.zeros(count, dtype)
        return lax.scan(visit, start, jnp.arange(count))[0]


def _lowest(losses: jax.Array, step: jax.Array) -> jax.Array:
    """The step to the lowest of the values at p, p - step z and p + step z (the last three)."""
    stay, forth, back = jnp.where(jnp.isnan(losses[2:]), jnp.inf, losses[2:])
    return jnp.where(forth > stay, jnp.where(stay < back, 0, step), jnp.where(forth < back, -step, step))


def mezo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    samples: int = 1,
    differences: Differences = "two_side",
    sign: Sign = None,
    conservative: bool = False,
    distribution: Distribution = "normal",
    sparsity: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    in_place: bool = True,
) -> Mezo:
    """MeZO: stochastic gradient descent by values of the loss, in the memory of inference.

    One step is that of `optax.sgd` on `zo_value_and_grad`,

        rho = (L(p + eps z) - L(p - eps z)) / (2 eps)        p <- p - learning_rate (rho z + weight_decay p)

    but neither z nor a second copy of the parameters ever exists. The direction is computed from its key at each use,
    and the parameters are moved in place: to `p + eps z`, to `p - eps z`, and from there to the result. Jit the step
    with the parameters donated:

        step = jax.jit(functools.partial(optimizer.step, loss_fn), donate_argnums=0)
        params, state, value = step(params, state, batch)

    Moving in place rounds each parameter three times per step instead of once: in float32 the extra error is about one
    unit in the last place per step, and random. Do not move parameters in bfloat16 or float16 in place, since these
    errors are not small compared with the steps: use `in_place=False`, which evaluates the loss at perturbed copies and
    changes the parameters once. Under `shard_map`, replicas that see different data must not use `mezo` but
    `zo_projection` and `shared_randomness_update`.

    A step whose `rho` is not finite (an overflow at a perturbed place) is skipped: the parameters only decay.

    Args:
      learning_rate: A number or a schedule of the steps taken.
      eps: Length of the perturbation, positive; usually 1e-4 to 1e-2.
      samples: Directions per step, at least 1, each with its own `rho`; their mean is the step.
      differences: "two_side" or "one_side", as in `zo_value_and_grad`.
      sign: "scalar" steps by `sign(rho) z` (ZO-SGD-Sign); "elementwise", for one sample, by `sign(rho z)`.
      conservative: Whether to evaluate the loss at p and after a step forth and back, too, and to stay at the lowest of
        the three (ZO-SGD-Cons): five evaluations per step. For one sample.
      distribution: Distribution of the entries of z, "normal" or "rademacher".
      sparsity: Fraction of the entries of z that are 0, drawn again for each direction.
      weight_decay: Decoupled weight decay (for this method the same as an l2 penalty).
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one. Usually not
        biases and normalization scales.
      in_place: Whether to perturb the parameters themselves or a copy.

    Returns:
      A `Mezo` with `init(key)` and `step(loss_fn, params, state, *args)`. The direction of sample j of step t
      (from 0) is `random_direction(jax.random.split(jax.random.fold_in(key, t), samples)[j], params)`.

    Raises:
      ValueError: for an option out of range, for several samples where one is needed, or a loss that is not a
        real scalar.
      TypeError: for parameters that are not real.

    References:
      "Fine-Tuning Language Models with Just Forward Passes"; sign, conservative and sparse variants:
      "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark".

    Example:
      >>> import functools
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import mezo
      >>> loss_fn = lambda p, target: jnp.sum((p - target) ** 2)
      >>> optimizer = mezo(0.02)
      >>> step = jax.jit(functools.partial(optimizer.step, loss_fn), donate_argnums=0)
      >>> params, state = jnp.zeros(3), optimizer.init(jax.random.key(0))
      >>> for _ in range(500):
      ...     params, state, value = step(params, state, jnp.array([1.0, 2.0, 3.0]))
      >>> print(params.round(1))
      [1. 2. 3.]
    """
    _common.check_learning_rate(learning_rate)
    difference = _difference(eps, differences)
    samples = _checks.integer("samples", samples, at_least=1)
    _checks.option("sign", sign, (None, "scalar", "elementwise"))
    _checks.flag("conservative", conservative)
    _checks.flag("in_place", in_place)
    _checks.number("weight_decay", weight_decay, at_least=0)
    directions = _directions(distribution, sparsity)
    if samples > 1 and (conservative or sign == "elementwise"):
        raise ValueError(
            f"samples must be 1 with conservative=True or sign='elementwise', got {samples}: the mean of several "
            "directions would have to be stored (use zo_value_and_grad)"
        )
    if conservative and sign == "elementwise":
        raise ValueError("sign must be None or 'scalar' with conservative=True, got 'elementwise'")

    search = _Search(directions, difference, sign, conservative, in_place)

    def several(loss: Callable[[Any], jax.Array], params: Any, keys: jax.Array, rate: Any):
        """The step of the mean over several directions, and the mean value of the loss."""

        def sample(params, key):
            params, place, losses = search.explore(loss, params, key, rate)
            key, place = _common.separate((key, place))
            if in_place:
                params = directions.move(params, key, -place)
            return params, (difference.project(losses)[0], search.coefficient(losses))

        params, (values, coefficients) = lax.scan(sample, params, keys)
        params = _decay(params, rate * weight_decay, mask)
        return _walk(params, keys, -rate / samples * coefficients, directions), jnp.mean(values)

    def single(loss: Callable[[Any], jax.Array], params: Any, key: jax.Array, rate: Any):
        """The step along one direction, and the value of the loss."""
        params, place, losses = search.explore(loss, params, key, rate)
        value = losses[2] if conservative else difference.project(losses)[0]
        distance = -rate * search.coefficient(losses)
        if conservative:
            distance = _lowest(losses, -distance)
        key, place, distance = _common.separate((key, place, distance))

        def finish(p, z, flag):
            w = jnp.asarray(p, z.dtype) - place.astype(z.dtype) * z
            u = jnp.sign(z) if sign == "elementwise" else z
            w = w - rate * weight_decay * flag * w + distance.astype(z.dtype) * u
            return w.astype(p.dtype)

        drawn = directions.draw(key, params)
        return jax.tree.map(finish, params, drawn, _common.broadcast_mask(mask, params)), value

    def init(key: jax.Array) -> MezoState:
        return MezoState(jnp.zeros([], jnp.int32), key)

    def step(
        loss_fn: Callable[..., Any], params: Any, state: MezoState, *args: Any, **kwargs: Any
    ) -> tuple[Any, MezoState, jax.Array]:
        loss = _scalar_loss(loss_fn, args, kwargs)
        params = jax.tree.map(jnp.asarray, params)
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        keys = jax.random.split(jax.random.fold_in(state.key, state.count), samples)
        new_state = MezoState(jnp.asarray(optax.safe_increment(state.count)), state.key)
        if samples > 1:
            params, value = several(loss, params, keys, rate)
        else:
            params, value = single(loss, params, keys[0], rate)
        return params, new_state, value

    return Mezo(init, step)


def quantize_projection(rho: jax.Array, limit: Scalar) -> jax.Array:
    """A projected gradient in one byte: `round(127 clip(rho / limit, -1, 1))` as int8.

    Args:
      rho: Projected gradients of any shape, from `zo_projection`. One that is not finite becomes 0.
      limit: Magnitude of the largest code, positive, the same on all workers.

    Returns:
      Codes in -127..127, for `shared_randomness_update` with the same `limit`. The error is at most
      `limit / 254` within the limit.

    Raises:
      ValueError: if `limit` is not positive.
      TypeError: if `rho` is not an array of floats.

    References:
      "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using
      Shared Randomness". *Reconstructed*: one byte is the paper's, the linear code is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import quantize_projection
      >>> print(quantize_projection(jnp.array([0.5, -3.0, 0.0]), limit=2.0))
      [  32 -127    0]
    """
    _checks.floating("rho", rho)
    _checks.number("limit", limit, above=0)
    rho = jnp.where(jnp.isfinite(rho), rho, 0).astype(_common.wide(rho))
    return jnp.round(127 * jnp.clip(rho / limit, -1, 1)).astype(jnp.int8)


def shared_randomness_update(
    params: Any,
    rhos: jax.Array,
    keys: jax.Array,
    learning_rate: Scalar,
    *,
    limit: Scalar | None = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    distribution: Distribution = "normal",
    sparsity: Scalar = 0.0,
) -> Any:
    """Data-parallel training with one number per worker and step: `p <- p - learning_rate / N sum_i rho_i z_i`.

    Every worker i derives the keys of all workers (`jax.random.fold_in(step_key, i)`), computes its own `rho_i` on its
    own data with `zo_projection`, sends it to all others, as one byte if it is quantized, and applies this update. All
    perform the same operations in the same order, so their parameters stay equal bit for bit.

    Args:
      params: The parameters, overwritten in place if donated: directions are drawn one after the other and not stored.
      rhos: `[N]`, the numbers from the workers: floats, or the int8 codes of `quantize_projection`.
      keys: `[N]` keys, one per worker.
      learning_rate: A number at least 0.
      limit: The limit given to `quantize_projection`; only for codes.
      weight_decay: Decoupled weight decay, once for the step.
      mask: Which parameters decay: a pytree of bools, or a function from the parameters to one.
      distribution: As in `zo_projection`.
      sparsity: As in `zo_projection`.

    Returns:
      The new parameters.

    Raises:
      ValueError: for a number out of range, different numbers of keys and rhos, or codes without a limit.
      TypeError: for rhos that are neither floats nor int8.

    References:
      "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using
      Shared Randomness".

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import quantize_projection, shared_randomness_update, zo_projection
      >>> loss = lambda p, target: jnp.sum((p - target) ** 2)
      >>> targets = jnp.array([[1.0, 2.0], [3.0, 2.0]])
      >>> def step(t, params):
      ...     keys = jax.random.split(jax.random.fold_in(jax.random.key(0), t), 2)
      ...     _, rhos = jax.vmap(zo_projection(loss), in_axes=(None, 0, 0))(params, keys, targets)
      ...     codes = quantize_projection(rhos, limit=8.0)
      ...     return shared_randomness_update(params, codes, keys, 0.02, limit=8.0)
      >>> params = jax.lax.fori_loop(0, 300, step, jnp.zeros(2))
      >>> print(jnp.abs(params - 2).max() < 0.5)
      True
    """
    _checks.number("learning_rate", learning_rate, at_least=0)
    _checks.number("weight_decay", weight_decay, at_least=0)
    directions = _directions(distribution, sparsity)
    rhos = jnp.asarray(rhos)
    workers = jax.eval_shape(jax.vmap(jax.random.key_data), keys).shape[0]
    _checks.shape("rhos", rhos, (workers,), "one per key")
    if rhos.dtype == jnp.int8:
        if limit is None:
            raise ValueError("limit must be a number for int8 rhos, got None")
        _checks.number("limit", limit, above=0)
        rhos = rhos.astype(jnp.float32) * (limit / 127)
    elif limit is not None:
        raise ValueError(f"limit must be None for rhos that are not int8, got {limit!r}")
    _checks.floating("rhos", rhos)
    params = jax.tree.map(jnp.asarray, params)
    params = _decay(params, learning_rate * weight_decay, mask)
    return _walk(params, keys, -learning_rate / workers * rhos.astype(_common.wide(rhos)), directions)
