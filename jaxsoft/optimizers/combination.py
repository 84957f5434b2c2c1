"""Several gradients combined into one.

Pure functions of the gradients of several tasks, domains, modalities, examples or micro-batches. Their result is one
gradient, for any optimizer. Gradients come stacked: a pytree whose leaves have a leading axis over the objectives, as
from `jax.jacrev` of a vector of losses or from `jax.vmap(jax.grad(...))`. Inner products are taken over the whole
tree, in at least float32.

```python
import jax
import jax.numpy as jnp
import optax

import jaxsoft

params, task_batches = {"w": jnp.ones(3)}, jnp.eye(3)[:2]
tx = optax.adam(1e-3)
state = tx.init(params)


def task_loss(params, target):
    return jnp.sum((params["w"] - 2 * target) ** 2)


grads = jax.vmap(jax.grad(task_loss), in_axes=(None, 0))(params, task_batches)
gradient, weights = jaxsoft.optimizers.min_norm_gradient(grads)
updates, state = tx.update(gradient, state, params)
```
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Scalar

_MOST_OBJECTIVES = 8  # of preference_gradient, which tries every vertex


def _count(grads: Any) -> int:
    """The size of the common leading axis of all leaves."""
    sizes = {jnp.shape(g)[:1] for g in jax.tree.leaves(grads)}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(
            "grads must be a pytree of arrays with one common leading axis over the objectives, got leaves of "
            f"shapes {[jnp.shape(g) for g in jax.tree.leaves(grads)]}"
        )
    return sizes.pop()[0]


def _products(x: Any, y: Any) -> jax.Array:
    """Inner products of the members of two stacked trees: [n, m]."""

    def leaf(x, y):
        dtype = _common.wide(x, y)
        x, y = (jnp.reshape(jnp.asarray(z, dtype), (jnp.shape(z)[0], -1)) for z in (x, y))
        return jnp.matmul(x, y.T, precision="highest")

    return _common.total(jax.tree.map(leaf, x, y))


def _combine(weights: jax.Array, grads: Any) -> Any:
    """`sum_k weights[k] grads[k]`, in the dtype of the gradients."""

    def leaf(g):
        wide = jnp.asarray(g, _common.wide(g))
        out = jnp.tensordot(weights.astype(wide.dtype), wide, axes=1, precision="highest")
        return out.astype(jnp.result_type(g))

    return jax.tree.map(leaf, grads)


def _one(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def _check_same_tree(name: str, tree: Any, grads: Any) -> None:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
    expected = [jnp.shape(g)[1:] for g in jax.tree.leaves(grads)]
    if jax.tree.structure(tree) != jax.tree.structure(grads) or shapes != expected:
        raise ValueError(
            f"{name} must be a pytree like one of the grads, with leaves of shapes {expected}, got shapes {shapes}"
        )


def _min_norm_weights(gram: jax.Array, max_steps: int) -> jax.Array:
    """The point of the simplex with the smallest `w^T gram w`."""
    n = gram.shape[0]
    if n == 2:
        apart = gram[0, 0] - 2 * gram[0, 1] + gram[1, 1]
        first = jnp.clip((gram[1, 1] - gram[0, 1]) / jnp.where(apart > 0, apart, 1), 0, 1)
        first = jnp.where(apart > 0, first, 0.5)
        return jnp.stack([first, 1 - first])
    # Pairwise Frank-Wolfe: an exact line search moves weight from the worst member in use to the best one. Unlike plain
    # Frank-Wolfe it converges geometrically.
    tolerance = 4 * jnp.finfo(gram.dtype).eps * jnp.max(jnp.diag(gram))

    def ends(w):
        slope = gram @ w
        worst = jnp.argmax(jnp.where(w > 0, slope, -jnp.inf))
        best = jnp.argmin(slope)
        return worst, best, slope[worst] - slope[best]

    def improve(carry):
        step, w = carry
        worst, best, gap = ends(w)
        curvature = gram[worst, worst] - 2 * gram[worst, best] + gram[best, best]
        amount = jnp.minimum(
            jnp.where(curvature > 0, gap / jnp.where(curvature > 0, curvature, 1), 1), w[worst]
        )
        return step + 1, w.at[worst].add(-amount).at[best].add(amount)

    def far(carry):
        step, w = carry
        return (step < max_steps) & (ends(w)[2] > tolerance)

    return lax.while_loop(far, improve, (0, jnp.full(n, 1 / n, gram.dtype)))[1]


def min_norm_gradient(grads: Any, *, max_steps: int = 1000) -> tuple[Any, jax.Array]:
    """MGDA: the shortest convex combination of the gradients, a descent direction for every objective.

        weights = argmin over the simplex of || sum_k weights_k g_k ||^2        gradient = sum_k weights_k g_k

    Then `<gradient, g_k> >= ||gradient||^2` for each k, and a gradient of 0 means that the point is Pareto
    stationary. Two objectives have a closed form; more need pairwise Frank-Wolfe steps on the matrix of inner
    products, until the duality gap is at rounding level. Short gradients get large weights: to avoid that, normalize
    the gradients first. The weights are constants under differentiation.

    Args:
      grads: A pytree with a leading axis over the objectives.
      max_steps: Largest number of steps for three or more objectives, static.

    Returns:
      The gradient, a pytree without the leading axis in the dtype of `grads`, and the weights, of shape
      [objectives]: at least 0, with sum 1.

    Raises:
      ValueError: for leaves without a common leading axis, or `max_steps` below 1.

    References:
      "Pareto Domain Adaptation"; "Multi-Task Learning as Multi-Objective Optimization".

    Examples:
      >>> import jax.numpy as jnp
      >>> gradient, weights = min_norm_gradient(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
      >>> print(gradient, weights)
      [1. 1.] [0.5 0.5]
    """
    max_steps = _checks.integer("max_steps", max_steps, at_least=1)
    _count(grads)
    weights = _min_norm_weights(lax.stop_gradient(_products(grads, grads)), max_steps)
    return _combine(weights, grads), weights


def preference_gradient(grads: Any, preference: Any) -> tuple[Any, jax.Array]:
    """ParetoDA: the convex combination closest to a preferred gradient that ascends no objective.

        maximize  <d, preference>   over   d = sum_k weights_k g_k,   weights in the simplex,
        subject to  <d, g_k> >= 0  for every k

    The preferred gradient is that of the actual goal, e.g. the loss on held-out data. The linear program is solved
    exactly, by trying every vertex, hence at most 8 objectives. The shortest combination (`min_norm_gradient`) always
    satisfies the constraints; of equal vertices the first wins. The weights are constants under differentiation.

    *Reconstructed*: the paper's program may also constrain only the worst objectives.

    Args:
      grads: A pytree with a leading axis over at most 8 objectives.
      preference: A pytree like `grads` without that axis.

    Returns:
      The gradient, a pytree without the leading axis in the dtype of `grads`, and the weights, of shape
      [objectives]: at least 0, with sum 1.

    Raises:
      ValueError: for leaves without a common leading axis, too many objectives, or a `preference` that does not
        match.

    References:
      "Pareto Domain Adaptation".

    Examples:
      >>> import jax.numpy as jnp
      >>> grads = jnp.array([[1.0, 0.0], [-0.5, 0.5]])
      >>> gradient, weights = preference_gradient(grads, jnp.array([1.0, 0.0]))
      >>> print(gradient.round(2), weights.round(2))
      [0.25 0.25] [0.5 0.5]
    """
    n = _count(grads)
    if n > _MOST_OBJECTIVES:
        raise ValueError(f"grads must stack at most {_MOST_OBJECTIVES} objectives, got {n}")
    _check_same_tree("preference", preference, grads)
    gram = lax.stop_gradient(_products(grads, grads))
    gain = lax.stop_gradient(_products(grads, _one(preference)))[:, 0]

    # At a vertex n - 1 of the 2 n inequalities are equalities. Scaling a constraint does not change it.
    length = jnp.sqrt(jnp.diag(gram))
    scale = jnp.where(length > 0, length, 1)
    cosines = gram / scale[:, None] / jnp.max(scale)
    constraints = jnp.concatenate([jnp.eye(n, dtype=gram.dtype), cosines])
    choices = np.array(list(itertools.combinations(range(2 * n), n - 1)), dtype=int)
    rows = jnp.concatenate([constraints[choices], jnp.ones((len(choices), 1, n), gram.dtype)], axis=1)
    right = jnp.zeros((len(choices), n, 1), gram.dtype).at[:, -1].set(1)
    vertices = jnp.linalg.solve(rows, right)[..., 0]
    slack = jnp.min(jnp.matmul(vertices, constraints.T, precision="highest"), axis=-1)
    feasible = slack >= -256 * jnp.finfo(gram.dtype).eps  # False for NaN, the singular choices

    fallback = _min_norm_weights(gram, 1000)
    candidates = jnp.concatenate(
        [jnp.where(feasible[:, None], jnp.maximum(vertices, 0), fallback), fallback[None]]
    )
    candidates = candidates / jnp.sum(candidates, axis=-1, keepdims=True)
    weights = candidates[jnp.argmax(jnp.matmul(candidates, gain, precision="highest"))]
    return _combine(weights, grads), weights


def combine_orthogonal_gradients(main: Any, auxiliary: Any, eta: Scalar = 1.0) -> Any:
    """Adds to a gradient the part of another that is orthogonal to it.

        main + eta (auxiliary - (<auxiliary, main> / <main, main>) main)

    The inner product with `main` stays `||main||^2`: to first order the auxiliary objective does not slow down the
    main one. If `main` is 0 the whole auxiliary gradient is added.

    Args:
      main: A pytree, the gradient to keep.
      auxiliary: A pytree like it.
      eta: Weight of the orthogonal part.

    Returns:
      A pytree in the dtypes of `main`. Inner products are those of the whole tree.

    Raises:
      ValueError: for trees that do not match.

    References:
      "ODICE: Revealing the Mystery of Distribution Correction Estimation via Orthogonal-gradient Update". The weight
      `eta` is *Reconstructed*.

    Examples:
      >>> import jax.numpy as jnp
      >>> main, auxiliary = jnp.array([2.0, 0.0]), jnp.array([-1.0, 3.0])
      >>> print(combine_orthogonal_gradients(main, auxiliary, eta=0.5))
      [2.  1.5]
    """
    _checks.number("eta", eta)
    _check_same_tree("auxiliary", auxiliary, _one(main))
    square = _products(_one(main), _one(main))
    along = jnp.reshape(_products(_one(auxiliary), _one(main)) / jnp.where(square > 0, square, 1), ())

    def leaf(m, a):
        dtype = _common.wide(m, a)
        m_wide, a_wide = jnp.asarray(m, dtype), jnp.asarray(a, dtype)
        return (m_wide + eta * (a_wide - along * m_wide)).astype(jnp.result_type(m))

    return jax.tree.map(leaf, main, auxiliary)


def project_conflicting_gradients(
    grads: Any, key: jax.Array, *, reduction: Literal["mean", "sum"] = "mean"
) -> tuple[Any, jax.Array]:
    """PCGrad: each gradient loses what conflicts with another one, before they are averaged.

    For each objective i, going through the others j in random order:

        if <p_i, g_j> < 0:    p_i <- p_i - (<p_i, g_j> / ||g_j||^2) g_j        (p_i starts as g_i)

    The projections are computed on the matrix of inner products; the gradients are read only twice. The weights are
    constants under differentiation.

    Args:
      grads: A pytree with a leading axis over the objectives.
      key: A PRNG key for the orders; without effect for two objectives.
      reduction: `"mean"` or `"sum"` of the projected gradients.

    Returns:
      The gradient, a pytree without the leading axis in the dtype of `grads`, and its weights on `grads`, of shape
      [objectives].

    Raises:
      ValueError: for leaves without a common leading axis, or an unknown `reduction`.

    References:
      "Gradient Surgery for Multi-Task Learning", the baseline of "Pareto Domain Adaptation".

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> gradient, weights = project_conflicting_gradients(grads, jax.random.key(0))
      >>> print(gradient, weights)
      [0.25 0.75] [1.   0.75]
    """
    _checks.option("reduction", reduction, ("mean", "sum"))
    n = _count(grads)
    gram = lax.stop_gradient(_products(grads, grads))
    square = jnp.diag(gram)

    def project(i, key):
        def against(step, own):
            j = order[step]
            product = own @ gram[:, j]
            conflict = (product < 0) & (j != i)
            return own.at[j].add(-jnp.where(conflict, product / jnp.where(square[j] > 0, square[j], 1), 0))

        order = jax.random.permutation(key, n)
        return lax.fori_loop(0, n, against, jnp.zeros(n, gram.dtype).at[i].set(1))

    own = jax.vmap(project)(jnp.arange(n), jax.random.split(key, n))
    weights = jnp.mean(own, axis=0) if reduction == "mean" else jnp.sum(own, axis=0)
    return _combine(weights, grads), weights


def gradient_modulation_coefficients(
    scores: jax.Array, running_scores: jax.Array, alpha: Scalar = 1.0
) -> jax.Array:
    """Adaptive gradient modulation: a factor for the gradient of each modality.

        r_m = exp(mean over j != m of s_j - s_m)        the same of the running scores: t_m
        coefficient_m = exp(alpha (t_m - r_m))

    The score of a modality is its own mean cross-entropy; for two modalities a, v with logits F(a, v) the
    cross-entropy of `(F(a, v) - F(0, v) + F(a, 0)) / 2`, where 0 pads the other modality. A modality that is better
    than usual, compared with the others, is held back (coefficient below 1). Multiply the gradient into its logits by
    the coefficient: `lax.stop_gradient(1 - c) * x + c * x`. Update the running means afterwards.

    Args:
      scores: Losses of the modalities in this batch, [..., modalities] with at least 2.
      running_scores: Their means over the past, of the same shape.
      alpha: Strength, at least 0.

    Returns:
      The coefficients, [..., modalities], in at least float32. They are constants under differentiation.

    Raises:
      ValueError: for fewer than two modalities, shapes that differ, or a negative `alpha`.

    References:
      "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation". For three and more modalities the
      mean of the others is *Reconstructed* (the authors' script takes twice the distance to the mean of all).

    Examples:
      >>> import jax.numpy as jnp
      >>> print(gradient_modulation_coefficients(jnp.array([0.5, 1.0]), jnp.array([0.6, 0.9])).round(4))
      [0.7417 1.1437]
    """
    _checks.floating("scores", scores)
    _checks.floating("running_scores", running_scores)
    _checks.number("alpha", alpha, at_least=0)
    if scores.ndim < 1 or scores.shape[-1] < 2:
        raise ValueError(
            f"scores must have at least 2 modalities along the last axis, got shape {scores.shape}"
        )
    _checks.shape("running_scores", running_scores, scores.shape, "as scores")
    dtype = _common.wide(scores, running_scores)
    scores, running_scores = (lax.stop_gradient(jnp.asarray(s, dtype)) for s in (scores, running_scores))
    m = scores.shape[-1]

    def ratio(s):
        return jnp.exp(m / (m - 1) * (jnp.mean(s, axis=-1, keepdims=True) - s))

    return jnp.exp(alpha * (ratio(running_scores) - ratio(scores)))


def gradient_coherence(grads: Any) -> jax.Array:
    """How much gradients agree: `||mean_i g_i||^2 / mean_i ||g_i||^2`, from 0 to 1.

    1 for m equal gradients, 1/m for orthogonal ones, 0 if all are 0. m times it, the "m-coherence", is the number of
    gradients that an average one helps.

    Args:
      grads: A pytree with a leading axis over the m gradients, of examples or of micro-batches.

    Returns:
      A scalar in at least float32.

    Raises:
      ValueError: for leaves without a common leading axis.

    References:
      "On the Generalization Mystery in Deep Learning".

    Examples:
      >>> import jax.numpy as jnp
      >>> print(gradient_coherence(jnp.array([[1.0, 2.0], [3.0, 0.0], [-1.0, 1.0], [2.0, 2.0]])).round(4))
      0.5208
    """
    m = _count(grads)

    def norms(g):
        g = jnp.asarray(g, _common.wide(g))
        return jnp.stack([jnp.sum(jnp.mean(g, axis=0) ** 2), jnp.sum(g * g) / m])

    of_mean, mean = _common.total([norms(g) for g in jax.tree.leaves(grads)])
    return jnp.where(mean > 0, of_mean / jnp.where(mean > 0, mean, 1), 0)


def winsorized_mean_gradient(grads: Any, trim: int = 1) -> Any:
    """The mean of gradients, each coordinate clipped to its `trim`-th smallest and largest of the m values.

    In each coordinate up to `trim` extreme values at each end count no more than the next one. `trim` 0 gives the mean;
    the largest `trim` gives the median, e.g. 1 for three micro-batches. Coordinates are sorted, which takes m times the
    memory.

    Args:
      grads: A pytree with a leading axis over the m gradients.
      trim: Number of values clipped at each end, a static integer with `0 <= 2 trim < m`.

    Returns:
      A pytree without the leading axis, in the dtype of `grads`.

    Raises:
      ValueError: for leaves without a common leading axis, or a `trim` out of range.

    References:
      "On the Generalization Mystery in Deep Learning". The clipping is *Reconstructed*.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(winsorized_mean_gradient(jnp.array([[1.0, 2.0], [3.0, 0.0], [-1.0, 1.0], [2.0, 2.0]])))
      [1.5 1.5]
    """
    m = _count(grads)
    trim = _checks.integer("trim", trim, at_least=0, at_most=(m - 1) // 2)

    def leaf(g):
        wide = jnp.sort(jnp.asarray(g, _common.wide(g)), axis=0)
        clipped = jnp.clip(wide, wide[trim], wide[m - 1 - trim])
        return jnp.mean(clipped, axis=0).astype(jnp.result_type(g))

    return jax.tree.map(leaf, grads)
