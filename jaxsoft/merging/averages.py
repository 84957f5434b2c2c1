"""Averages of models.

Averages weighted by Fisher information or pulled towards the common base, and a measure of how alike models are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.result_type(x, jnp.float32))


def _check_alike(name: str, trees: Sequence[Any], like: Any, least: int) -> None:
    """Checks that `trees` is a sequence of at least `least` trees with the structure and shapes of `like`."""
    if not isinstance(trees, (list, tuple)) or len(trees) < least:
        raise ValueError(f"{name} must be a list of at least {least} pytrees, got {_checks.describe(trees)}")
    expected = [jnp.shape(x) for x in jax.tree.leaves(like)]
    for i, tree in enumerate(trees):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
        if jax.tree.structure(tree) != jax.tree.structure(like) or shapes != expected:
            raise ValueError(
                f"{name}[{i}] must be a pytree with leaves of shapes {expected}, got shapes {shapes}"
            )


def diagonal_fisher(
    logits_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    *,
    labels: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Any:
    """The diagonal of the Fisher matrix of a classifier: the effect of each parameter on its predictions.

        F = mean over the examples of  E_{y ~ p(. | x)} (d log p(y | x) / d params)^2

    By default the expectation is exact, with one backward pass per class. With `key` one label per example is drawn
    from the model. With `labels` these are used instead: the empirical Fisher, a different quantity. Examples are
    processed one by one, in the memory of one.

    Args:
      logits_fn: A function from the parameters and one example to its logits, [classes].
      params: A pytree of parameters.
      inputs: A pytree of examples, with a leading axis.
      labels: None, or class ids of shape [examples].
      key: None, or a PRNG key.

    Returns:
      A pytree like `params`, in at least float32.

    Raises:
      TypeError: for labels that are not integers.
      ValueError: for both `labels` and `key`, inputs without a common leading axis, or logits that do not have exactly
        one axis.

    References:
      "Merging Models with Fisher-Weighted Averaging".

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0]])
      >>> fisher = diagonal_fisher(lambda w, x: x @ w, jnp.zeros((2, 2)), x)
      >>> print(fisher)  # p (1 - p) x^2
      [[0.25 0.25]
       [1.   1.  ]]
    """
    if labels is not None and key is not None:
        raise ValueError("labels and key must not both be given: labels are either known or drawn")
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(
            "inputs must be a pytree of arrays with one common leading axis over the examples, got leaves of shapes "
            f"{[jnp.shape(x) for x in jax.tree.leaves(inputs)]}"
        )
    n = sizes.pop()[0]
    if labels is not None:
        _checks.integers("labels", labels)
        _checks.shape("labels", labels, (n,), "one per example")

    def log_prob(params: Any, x: Any) -> jax.Array:
        logits = logits_fn(params, x)
        if logits.ndim != 1:
            raise ValueError(f"logits_fn must return logits of shape [classes], got shape {logits.shape}")
        return jax.nn.log_softmax(_wide(logits))

    def one(x: Any, label: Any, key: Any) -> Any:
        values, pull = jax.vjp(lambda p: log_prob(p, x), params)
        if labels is None and key is None:
            cotangents, weights = jnp.eye(values.shape[0], dtype=values.dtype), jnp.exp(values)
        else:
            drawn = label if key is None else jax.random.categorical(key, values)
            cotangents = jax.nn.one_hot(drawn, values.shape[0], dtype=values.dtype)[None]
            weights = jnp.ones(1, values.dtype)
        (scores,) = jax.vmap(pull)(cotangents)
        return jax.tree.map(
            lambda g: jnp.tensordot(weights.astype(_wide(g).dtype), _wide(g) ** 2, axes=1), scores
        )

    def add(total: Any, example: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*example)), None

    keys = None if key is None else jax.random.split(key, n)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(_wide(p)), params)
    total, _ = lax.scan(add, zeros, (inputs, labels, keys))
    return jax.tree.map(lambda f: f / n, total)


def fisher_merge(
    models: Sequence[Any], fishers: Sequence[Any], weights: Sequence[float] | None = None
) -> Any:
    """The average of models, each parameter weighted by its Fisher information.

        merged = sum_i w_i F_i theta_i / sum_i w_i F_i

    entry by entry: the mode of the product of their Gaussian (Laplace) posteriors. An entry without information in any
    model, all `F_i` = 0, becomes the plain weighted mean.

    Args:
      models: Pytrees of parameters with the same shapes.
      fishers: One pytree per model, with entries of at least 0: the `diagonal_fisher` of each.
      weights: One positive number per model. None: equal.

    Returns:
      A pytree like a model, in its dtypes; computed in at least float32.

    Raises:
      ValueError: for trees that do not match, a wrong number of them, or weights that are not positive.

    References:
      "Merging Models with Fisher-Weighted Averaging".

    Examples:
      >>> import jax.numpy as jnp
      >>> models = [jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0])]
      >>> fishers = [jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])]
      >>> print(fisher_merge(models, fishers))
      [1.5 4. ]
    """
    _check_alike("models", models, models[0] if models else None, 1)
    _check_alike("fishers", fishers, models[0], 1)
    w = [1.0] * len(models) if weights is None else list(weights)
    if len(fishers) != len(models) or len(w) != len(models):
        raise ValueError(
            f"fishers and weights must have one entry per model, got {len(fishers)} and {len(w)} for {len(models)}"
        )
    for i, value in enumerate(w):
        _checks.number(f"weights[{i}]", value, above=0)

    def leaf(*leaves: Any) -> jax.Array:
        thetas, fs = (
            jnp.stack([_wide(x) for x in half]) for half in (leaves[: len(models)], leaves[len(models) :])
        )
        top = jnp.max(fs, axis=0)
        shares = jnp.where(top > 0, fs / jnp.where(top > 0, top, 1), 1)  # in [0, 1]: no sum underflows
        shares = shares * jnp.asarray(w, shares.dtype).reshape(-1, *[1] * (shares.ndim - 1))
        merged = jnp.sum(shares * thetas, axis=0) / jnp.sum(shares, axis=0)
        return merged.astype(jnp.result_type(leaves[0]))

    return jax.tree.map(leaf, *models, *fishers)


def model_stock_merge(base: Any, models: Sequence[Any]) -> Any:
    """Model Stock: the mean of a few fine-tuned models, pulled towards their base the more they disagree.

    For each leaf, with the deltas d_i = models_i - base of the N models and c the mean of their pairwise cosines:

        t = N c / (1 + (N - 1) c)        merged = base + t (mean of the d_i)

    For models scattered on a sphere around a centre this is the point nearest to the centre in the plane of base and
    models: it approximates the mean of many more models. Equal models give themselves (t = 1). Orthogonal deltas give
    the base (t = 0), and so do opposed ones, with c < 0.

    Args:
      base: The parameters before fine-tuning.
      models: Two or more pytrees like it.

    Returns:
      A pytree like `base`, in its dtypes; computed in at least float32.

    Raises:
      ValueError: for fewer than two models or trees that do not match.

    References:
      "Model Stock: All we need is just a few fine-tuned models".

    Examples:
      >>> import jax.numpy as jnp
      >>> models = [jnp.array([3.0, 0.0, 3.0]), jnp.array([3.0, 3.0, 0.0])]
      >>> print(model_stock_merge(jnp.zeros(3), models).round(4))
      [2. 1. 1.]
    """
    _check_alike("models", models, base, 2)
    n = len(models)

    def leaf(base: Any, *thetas: Any) -> jax.Array:
        wide = _wide(base)
        deltas = jnp.stack([_wide(x).astype(wide.dtype) - wide for x in thetas])
        flat = deltas.reshape(n, -1)
        norm = jnp.sqrt(jnp.sum(flat * flat, axis=1, keepdims=True))
        total = jnp.sum(flat / jnp.where(norm > 0, norm, 1), axis=0)
        # The sum of all pairwise products of unit vectors is the squared length of their sum.
        cosine = jnp.clip((jnp.sum(total * total) - jnp.sum(norm > 0)) / (n * (n - 1)), 0, 1)
        t = n * cosine / (1 + (n - 1) * cosine)
        return (wide + t * jnp.mean(deltas, axis=0)).astype(jnp.result_type(base))

    return jax.tree.map(leaf, base, *models)


def model_kinship(base: Any, models: Sequence[Any], *, measure: str = "pearson") -> jax.Array:
    """The similarity of fine-tuned models: the measure of each pair of deltas, over all parameters together.

    Merging gains little from models that are too similar. The kinship of a group is the mean over its pairs.

    Args:
      base: The parameters before fine-tuning, a pytree.
      models: At least two pytrees like `base`.
      measure: `"pearson"` (the correlation), `"cosine"`, or `"euclidean"` (a distance: 0 is equal).

    Returns:
      `[models, models]`, symmetric, in at least float32. The correlation with a constant delta and the cosine with a
      delta of 0 are 0, also on the diagonal.

    Raises:
      ValueError: for fewer than two models, for a tree unlike `base`, or for an unknown measure.

    References:
      "Exploring Model Kinship for Merging Large Language Models".

    Examples:
      >>> import jax.numpy as jnp
      >>> models = [jnp.array([1.0, 2.0, 0.0]), jnp.array([2.0, 1.0, 0.0])]
      >>> print(model_kinship(jnp.zeros(3), models)[0, 1].round(4))
      0.5
    """
    _checks.option("measure", measure, ("pearson", "cosine", "euclidean"))
    _check_alike("models", models, base, 2)
    n = len(models)
    leaves = [
        jnp.stack([(_wide(x) - _wide(b)).reshape(-1) for x in alike])
        for b, *alike in zip(jax.tree.leaves(base), *map(jax.tree.leaves, models))
    ]
    if measure == "euclidean":
        return jnp.sqrt(sum(jnp.sum((d[:, None] - d) ** 2, axis=-1) for d in leaves))
    if measure == "pearson":
        mean = sum((jnp.sum(d, axis=1) for d in leaves), jnp.zeros(n)) / sum(d.shape[1] for d in leaves)
        leaves = [d - mean[:, None] for d in leaves]
    products = sum((d @ d.T for d in leaves), jnp.zeros((n, n)))
    norm = jnp.sqrt(jnp.diagonal(products))
    return safe_divide(products, norm[:, None] * norm)
