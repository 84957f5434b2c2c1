"""Batch size.

When to raise the batch size, and how the other hyper-parameters follow it. The norm test reads gradients inside the
training step. Array sizes are static, so the loop outside acts on its result:

```python
import jax.numpy as jnp
import optax

import jaxsoft

inner, steps = optax.adamw(1e-3), 4
micro_gradients = {"w": jnp.cos(jnp.arange(32.0)).reshape(4, 8)}  # of four micro-batches of 32 examples

result = jaxsoft.optimizers.batch_size_norm_test(micro_gradients, theta=0.5, micro_batch_size=32)
steps = jaxsoft.optimizers.accumulation_steps(float(result.suggested), 32, current=steps)
tx = optax.MultiSteps(inner, every_k_schedule=steps)  # a new one when steps changes; the inner state stays
```
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Scalar


class NormTest(NamedTuple):
    """Result of `batch_size_norm_test`.

    Attributes:
      suggested: The batch size at which the test would just pass, a float, at least 0. NaN for NaN gradients,
        inf for a mean of 0.
      passed: Whether the current batch size is large enough.
      variance: The unbiased variance of the gradient of one example, summed over all entries.
      mean_square: The squared norm of the mean gradient.
    """

    suggested: jax.Array
    passed: jax.Array
    variance: jax.Array
    mean_square: jax.Array


def batch_size_norm_test(grads: Any, theta: Scalar = 0.5, *, micro_batch_size: int = 1) -> NormTest:
    """Whether the batch is large enough that its mean gradient is mostly signal (norm test).

    With the gradients `g_i` of the b examples of a batch and their mean `m`, the batch passes if

        variance / b <= theta^2 |m|^2        variance = sum_i |g_i - m|^2 / (b - 1)

    Otherwise it suggests `variance / (theta^2 |m|^2)` examples. With the mean gradients of K micro batches of size s
    instead of examples, the variance of an example is s times that of the means, and b = K s.

    The test reads gradients and returns numbers. Array sizes are static, so the loop that feeds the training step
    acts on these numbers: see `accumulation_steps`.

    Args:
      grads: A pytree whose leaves have a first axis of n >= 2 examples (`jax.vmap(jax.grad(loss),
        (None, 0))`) or micro batches (the gradients that are accumulated, or one per device).
      theta: Tolerated ratio of noise to signal, positive; usually 0.1 to 0.9.
      micro_batch_size: Examples per micro batch; 1 for gradients of single examples.

    Returns:
      A `NormTest`, in at least float32.

    Raises:
      ValueError: for a theta out of range, or leaves without a common first axis of at least 2.

    References:
      "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods". *Reconstructed*: the form for
      micro batches.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.optimizers import batch_size_norm_test
      >>> result = batch_size_norm_test(jnp.array([[1.0, 0.0], [0.5, 1.0], [1.5, -0.5], [1.0, 0.5]]))
      >>> print(result.passed, result.suggested.round(4))
      True 2.1961
    """
    _checks.number("theta", theta, above=0)
    size = _checks.integer("micro_batch_size", micro_batch_size, at_least=1)
    leaves = [jnp.asarray(g) for g in jax.tree.leaves(grads)]
    shapes = sorted({g.shape[:1] for g in leaves})
    if len(shapes) != 1 or not shapes[0] or shapes[0][0] < 2:
        raise ValueError(
            "grads must have leaves with the same first axis, of at least 2 examples or micro batches, "
            f"got first axes {shapes}"
        )
    n = shapes[0][0]
    leaves = [g.astype(_common.wide(g)) for g in leaves]
    means = [jnp.mean(g, axis=0) for g in leaves]
    variance = size * sum(jnp.sum((g - m) ** 2) for g, m in zip(leaves, means)) / (n - 1)
    mean_square = jnp.asarray(sum(jnp.sum(m * m) for m in means))
    variance = jnp.asarray(variance, mean_square.dtype)
    bound = theta**2 * mean_square
    # Without noise no examples are needed, for any mean; noise around a mean of 0 needs infinitely many.
    suggested = jnp.where(variance == 0, 0, variance / jnp.where(bound > 0, bound, 1))
    suggested = jnp.where((bound == 0) & (variance > 0), jnp.inf, suggested)
    suggested = jnp.where(jnp.isnan(variance + bound), jnp.nan, suggested)
    return NormTest(suggested, variance <= bound * (n * size), variance, mean_square)


def accumulation_steps(
    suggested: Any, micro_batch_size: int, *, current: int = 1, max_steps: int = 1024
) -> int:
    """How many micro batches to accumulate for a suggested batch size: a power of two that never falls.

    A plain Python function for the training loop. Each number of steps is compiled once, and powers of two keep them
    few. Use it with `optax.MultiSteps`, whose `every_k_schedule` may read it, or as the number of micro batches per
    step.

    Args:
      suggested: A concrete batch size in examples, as `batch_size_norm_test` suggests it. NaN changes nothing.
      micro_batch_size: Examples per micro batch, at least 1.
      current: The current number of steps, at least 1.
      max_steps: The largest number to return, at least `current`.

    Returns:
      `current`, or if that is too small the smallest sufficient power of two, but at most `max_steps`.

    Raises:
      ValueError: for a number out of range.

    References:
      "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods". The powers of two are ours.

    Example:
      >>> from jaxsoft.optimizers import accumulation_steps
      >>> [accumulation_steps(b, 32) for b in (10, 33, 150, float("inf"))]
      [1, 2, 8, 1024]
    """
    size = _checks.integer("micro_batch_size", micro_batch_size, at_least=1)
    current = _checks.integer("current", current, at_least=1)
    max_steps = _checks.integer("max_steps", max_steps, at_least=current)
    if not _checks.is_concrete_number(suggested):
        raise TypeError(f"suggested must be a concrete number, got {_checks.describe(suggested)}")
    needed = float(suggested) / size
    if math.isnan(needed) or needed <= current:
        return current
    if needed >= max_steps:
        return max_steps
    return min(max_steps, 2 ** math.ceil(math.log2(needed)))


class ScaledHyperparams(NamedTuple):
    """Result of `scale_hyperparams`; None for what was not given."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    steps: Any


def scale_hyperparams(
    kappa: Scalar,
    *,
    optimizer: str = "adam",
    learning_rate: Scalar,
    b1: Scalar | None = None,
    b2: Scalar | None = None,
    eps: Scalar | None = None,
    steps: Scalar | None = None,
) -> ScaledHyperparams:
    """Hyper-parameters for a batch `kappa` times as large, under which training follows the same path.

    | | learning rate | b1, b2 | eps | steps |
    |---|---|---|---|---|
    | "sgd" | kappa lr | unchanged | unchanged | steps / kappa |
    | "adam" | sqrt(kappa) lr | 1 - kappa (1 - b) | eps / sqrt(kappa) | steps / kappa |

    With these rules both runs follow the same stochastic differential equation, if gradients are mostly noise. For
    decoupled weight decay keep the product `learning_rate weight_decay steps`.

    Args:
      kappa: New batch size over the old one, positive; less than 1 for smaller batches.
      optimizer: "sgd"; or "adam", also for RMSprop and AdamW.
      learning_rate: The old learning rate, at least 0.
      b1: The old decay of the first moment, in [0, 1), or None.
      b2: The old decay of the second moment, in [0, 1), or None.
      eps: The old eps, at least 0, or None.
      steps: The old number of steps, or None. The result is not rounded.

    Returns:
      A `ScaledHyperparams`.

    Raises:
      ValueError: for a number out of range, or if `kappa (1 - b)` exceeds 1, where the rule ends.

    References:
      "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"; the square root also in "Learning Rates
      as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training".

    Example:
      >>> from jaxsoft.optimizers import scale_hyperparams
      >>> new = scale_hyperparams(4.0, learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-8)
      >>> print(round(new.learning_rate, 6), round(new.b1, 6), round(new.b2, 6), new.eps)
      0.002 0.6 0.996 5e-09
    """
    _checks.option("optimizer", optimizer, ("sgd", "adam"))
    _checks.number("kappa", kappa, above=0)
    _checks.number("learning_rate", learning_rate, at_least=0)
    shorter = None if steps is None else steps / kappa
    for name, rate in (("b1", b1), ("b2", b2)):
        if rate is not None:
            _common.check_beta(name, rate)
    if eps is not None:
        _checks.number("eps", eps, at_least=0)
    if steps is not None:
        _checks.number("steps", steps, at_least=0)
    if optimizer == "sgd":
        return ScaledHyperparams(kappa * learning_rate, b1, b2, eps, shorter)

    def decay(name: str, rate: Scalar | None) -> Any:
        if rate is None:
            return None
        new = 1 - kappa * (1 - rate)
        if _checks.is_concrete_number(new) and float(new) < 0:
            raise ValueError(
                f"kappa must be at most 1 / (1 - {name}) = {1 / (1 - float(rate)):g}, got {kappa}"
            )
        return new

    root = kappa**0.5
    return ScaledHyperparams(
        root * learning_rate, decay("b1", b1), decay("b2", b2), None if eps is None else eps / root, shorter
    )


# Means of the authors' 1000 bootstrap fits, and the rounded numbers of the paper.
_STEP_LAW_RATE = {False: (math.exp(0.5863078), -0.7129223, 0.3074910), True: (1.79, -0.713, 0.307)}
_STEP_LAW_BATCH = {False: (math.exp(-0.5435422), 0.5709444), True: (0.58, 0.571)}


def step_law_learning_rate(params: Scalar, tokens: Scalar, *, rounded: bool = False) -> Any:
    """The best peak learning rate of AdamW for a language model, `1.797 params^-0.713 tokens^0.307` (Step Law).

    Args:
      params: Number of parameters without embeddings, positive.
      tokens: Number of training tokens, positive.
      rounded: Whether to use the paper's rounded constants (1.79, -0.713, 0.307).

    Returns:
      The learning rate. A float for numbers, an array for arrays.

    Raises:
      ValueError: for a number that is not positive.

    References:
      "Predictable Scale: Part I -- Optimal Hyperparameter Scaling Law in Large Language Model Pretraining".

    Example:
      >>> from jaxsoft.optimizers import step_law_learning_rate
      >>> print(f"{step_law_learning_rate(1e9, 1e11):.6e}")
      1.662381e-03
    """
    _checks.number("params", params, above=0)
    _checks.number("tokens", tokens, above=0)
    _checks.flag("rounded", rounded)
    factor, a, b = _STEP_LAW_RATE[rounded]
    return factor * params**a * tokens**b


def step_law_batch_size(tokens: Scalar, *, rounded: bool = False) -> Any:
    """The best batch size of a language model, in tokens: `0.5807 tokens^0.571` (Step Law).

    Args:
      tokens: Number of training tokens, positive.
      rounded: Whether to use the paper's rounded constants (0.58, 0.571).

    Returns:
      Tokens per batch, not rounded. A float for numbers, an array for arrays.

    Raises:
      ValueError: for a number that is not positive.

    References:
      "Predictable Scale: Part I -- Optimal Hyperparameter Scaling Law in Large Language Model Pretraining".

    Example:
      >>> from jaxsoft.optimizers import step_law_batch_size
      >>> print(f"{step_law_batch_size(1e11):.6e}")
      1.107468e+06
    """
    _checks.number("tokens", tokens, above=0)
    _checks.flag("rounded", rounded)
    factor, a = _STEP_LAW_BATCH[rounded]
    return factor * tokens**a
