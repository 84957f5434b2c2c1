"""Common parts of the optimizers: precision of the state, checks, and the chain of ready optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import _checks

Scalar: TypeAlias = float | jax.Array
"""A hyper-parameter: a number, or a scalar array, which may be traced."""

Mask: TypeAlias = Any
"""A pytree of bools shaped like the parameters (or a prefix), a function from them to one, or None."""


def wide(*leaves: Any) -> jnp.dtype:
    """The dtype of statistics and moments: that of the leaves, but at least float32."""
    if any(getattr(x, "dtype", None) == jax.dtypes.float0 for x in leaves):
        raise TypeError(
            "updates must be floating, got a leaf of dtype float0, the gradient of an integer parameter: "
            "differentiate and update the floating parameters alone"
        )
    with jax.numpy_dtype_promotion("standard"):  # also where the user forbids it: the promotion is explicit
        dtype = jnp.result_type(*leaves, jnp.float32)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"updates and params must be real, got a leaf of dtype {dtype}: wrap the optimizer in "
            "optax.contrib.split_real_and_imaginary, which gives it both parts as real leaves"
        )
    return jnp.dtype(dtype)


def widen(tree: optax.Updates) -> optax.Updates:
    """Every leaf in its `wide` dtype (a no-op for float32)."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide(x)), tree)


def cast_like(tree: optax.Updates, like: optax.Updates) -> optax.Updates:
    """Every leaf in the dtype of its partner in `like`.

    Transformations return updates in the dtype of the gradients, as `optax.apply_if_finite`, `optax.MultiSteps` and
    `lax.scan` require.
    """
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def moments_like(params: optax.Params, dtype: Any = None) -> Any:
    """Zeros shaped (and sharded) like the parameters, in `dtype` or else in their `wide` dtype."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide(p) if dtype is None else dtype), params)


def whole(x: Any) -> jax.Array:
    """An array on every device, where Explicit mesh axes shard it: for a sort, a decomposition, a flat view.

    On Auto axes the compiler gathers by itself.
    """
    x = jnp.asarray(x)
    here = jax.typeof(x).sharding
    return jax.reshard(x, NamedSharding(here.mesh, P())) if any(here.spec) else x


def placed_like(tree: Any, like: Any) -> Any:
    """Every leaf placed as its partner of the same shape in `like`, where Explicit mesh axes shard that."""

    def place(x, y):
        wanted = jax.typeof(y).sharding
        if x.shape != jnp.shape(y) or not any(wanted.spec) or jax.typeof(x).sharding == wanted:
            return x
        return jax.reshard(x, wanted)

    return jax.tree.map(place, tree, like)


def scalars_like(params: optax.Params) -> Any:
    """One zero per leaf of the parameters."""
    return jax.tree.map(lambda p: jnp.zeros([], wide(p)), params)


def moving_average(decay: Scalar, old: Any, new: Any) -> Any:
    """`decay old + (1 - decay) new`, leaf by leaf, computed in at least float32."""

    def step(a, x):
        dtype = wide(a, x)
        return decay * a.astype(dtype) + (1.0 - decay) * x.astype(dtype)

    return jax.tree.map(step, old, new)


def total(tree: Any) -> jax.Array:
    """The sum of the leaves, arrays of one shape, in their common `wide` dtype; a scalar 0 without leaves."""
    leaves = jax.tree.leaves(tree)
    dtype = wide(*leaves)
    return jnp.asarray(sum((jnp.asarray(x, dtype) for x in leaves), jnp.zeros([], dtype)))


def to_float(x: Any) -> Any:
    """A float; an integer or a bool becomes one of weak type, which takes the dtype of what it is combined with."""
    with jax.numpy_dtype_promotion("standard"):
        return x * 1.0


def bias_correction(decay: Scalar, count: jax.Array) -> jax.Array:
    """`1 - decay ** count`, for `count >= 1`.

    Written as `-expm1(count log(decay))`, since in float32 `1 - 0.999 ** count` loses two of its seven digits at
    count = 1. The logarithm of a Python float is computed in double precision.
    """
    if isinstance(decay, float):
        with np.errstate(divide="ignore"):
            log_decay: Any = float(np.log(decay))
    else:
        log_decay = jnp.log(decay)
    return -jnp.expm1(to_float(count) * log_decay)


def separate(scalars: Any) -> Any:
    """The same values, hidden from the compiler.

    If a cheap function of a leaf is needed twice, the compiler finds both equal and stores the result, an array of the
    size of the leaf. With one of its scalars passed through here, the function is computed twice instead.
    """
    return jax.lax.optimization_barrier(scalars)


def as_key(value: jax.Array | int) -> jax.Array:
    """A PRNG key: the value itself, or that of an integer."""
    return value if isinstance(value, jax.Array) else jax.random.key(value)


def fold(key: jax.Array | None, *data: Any) -> jax.Array | None:
    """The key with these integers folded in, one after the other. No key stays no key."""
    return None if key is None else functools.reduce(jax.random.fold_in, data, key)


def broadcast(prefix: Any, tree: Any) -> Any:
    """A tree like `tree` with the entries of `prefix`, whose leaves stand for whole subtrees."""
    return jax.tree.map(lambda x, part: jax.tree.map(lambda _: x, part), prefix, tree)


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether a value is a function of the parameters, and not a tree of a class with `__call__`, such as a module."""
    return callable(value) and jax.tree_util.all_leaves([value])


def broadcast_mask(mask: Mask, params: Any) -> Any:
    """One flag per leaf of the parameters."""
    return broadcast(True if mask is None else mask(params) if is_function(mask) else mask, params)


def check_key(name: str, value: Any) -> None:
    """Checks a PRNG key, or an integer in its place."""
    if isinstance(value, bool) or not isinstance(value, (jax.Array, int, np.integer)):
        raise TypeError(f"{name} must be a PRNG key or an integer, got {_checks.describe(value)}")


def check_params(name: str, params: Any) -> None:
    """Checks that `update` was called with the parameters."""
    if params is None:
        raise ValueError(f"{name} needs params: call update(updates, state, params); got params=None")


def check_beta(name: str, value: Any) -> None:
    """Checks a decay rate of a moving average."""
    _checks.number(name, value, at_least=0, below=1)


def check_learning_rate(value: Any) -> None:
    """Checks a learning rate; a schedule passes."""
    if not callable(value):
        _checks.number("learning_rate", value, at_least=0)


def check_steps(name: str, value: Any, *, at_least: int) -> None:
    """Checks a number of steps: an integer or, as from `optax.inject_hyperparams`, an integer scalar."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        _checks.integer(name, value, at_least=at_least)
        return
    _checks.integers(name, value)
    _checks.number(name, value, at_least=at_least)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """The matrix product in full precision."""
    return jnp.matmul(x, y, precision="highest")


def masked(tx: optax.GradientTransformationExtraArgs, mask: Mask) -> optax.GradientTransformationExtraArgs:
    """The transformation of the parameters that the mask names, or of all."""
    return tx if mask is None else optax.with_extra_args_support(optax.masked(tx, mask))


def with_learning_rate(
    learning_rate: optax.ScalarOrSchedule, *directions: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The chain of these transformations and `params <- params - learning_rate u`."""
    check_learning_rate(learning_rate)
    return optax.with_extra_args_support(
        optax.chain(*directions, optax.scale_by_learning_rate(learning_rate))
    )


def descend(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """The ready optimizer of a direction u: `params <- params - learning_rate (u + weight_decay params)`."""
    _checks.number("weight_decay", weight_decay, at_least=0)
    return with_learning_rate(learning_rate, direction, optax.add_decayed_weights(weight_decay, mask))
