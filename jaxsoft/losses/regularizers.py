"""Regularizers.

Objectives on weights, embeddings, codes and activations, to be added to a loss with a coefficient of your choice, and
the gradient reversal of domain adaptation. They give scalars, or one value per batch, unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, as_ids, safe_divide, scale_gradient, shape_by_moments
from jaxsoft.losses._common import IGNORE_INDEX, check_floats, is_zero
from jaxsoft.losses.classification import cross_entropy
from jaxsoft.normalizers.inner import present_scores
from jaxsoft.rows import Logits
from jaxsoft.rows.inner import softmax_with

# --- checks and helpers ----------------------------------------------------------------------------------


def _wide(name: str, x: Any) -> Array:
    """A checked floating array, in the accumulation dtype."""
    _checks.floating(name, x)
    return jnp.asarray(x, accumulation_dtype(x.dtype))


def _vectors(name: str, x: Any, where: Any, mask_name: str = "where") -> tuple[Array, Array]:
    """`[*batch, n, features]` with 0 for absent vectors, and which are present, `[*batch, n]`."""
    x = _wide(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape [*batch, n, features], got shape {x.shape}")
    if where is None:
        return x, jnp.ones(x.shape[:-1], bool)
    where = _mask(mask_name, where, x.shape[:-1])
    return jnp.where(where[..., None], x, 0), where


def _mask(name: str, where: Any, rows: tuple[int, ...]) -> Array:
    """A checked mask of rows."""
    _checks.boolean(name, where)
    _checks.shape(name, where, rows, "one boolean per row")
    return jnp.asarray(where)


def _sqrt(x: Array) -> Array:
    """The square root, with gradient 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def _leaves(name: str, params: Any) -> list[Array]:
    """The leaves of a pytree of weights, at least one, in the accumulation dtype."""
    leaves = [
        _wide(f"{name}{jax.tree_util.keystr(k)}", a) for k, a in jax.tree_util.tree_leaves_with_path(params)
    ]
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got {params!r}")
    return leaves


# --- weights ---------------------------------------------------------------------------------------------


def norm_loss(params: Any, *, axis: int = -1, target: float = 1.0) -> Float[Array, ""]:
    """Norm loss: `sum over output channels of (target - |w_c|)^2`, instead of weight decay.

    `w_c` are all weights of a layer that lead to its output c. Where weight decay pulls every weight to 0, this loss
    pulls every channel to the sphere (the oblique manifold). *Reconstructed* from the paper's abstract.

    Args:
      params: an array or a pytree of arrays; those with fewer than two axes (biases, scales) have no channels and
        are left out.
      axis: the axis of the outputs: -1 for flax kernels, `[..., inputs, outputs]`.
      target: the norm that a channel should have, 0 or more.

    Returns:
      A scalar, float32 or wider, to be multiplied with a coefficient of 0.01 or so. A channel of zeros costs
      `target^2`, with gradient 0.

    Raises:
      TypeError: a leaf that is not a floating array.
      ValueError: no array of two axes or more, or an axis out of range.

    Reference:
      Georgiou et al., "Norm Loss: An efficient yet effective regularization method for deep neural networks".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> weight = jnp.array([[3.0, 4.0], [0.6, 0.8], [0.3, 0.4]])
      >>> print(jaxsoft.losses.norm_loss(weight, axis=0))
      16.25
    """
    axis = _checks.integer("axis", axis)
    _checks.number("target", target, at_least=0)
    layers = [w for w in _leaves("params", params) if w.ndim >= 2]
    if not layers:
        raise ValueError("params must hold an array of two axes or more, got only arrays of fewer axes")
    losses = []
    for w in layers:
        if not -w.ndim <= axis < w.ndim:
            raise ValueError(
                f"axis must be in [{-w.ndim}, {w.ndim}) for weights of shape {w.shape}, got {axis}"
            )
        others = tuple(i for i in range(w.ndim) if i != axis % w.ndim)
        losses.append(jnp.sum((target - _sqrt(jnp.sum(w * w, axis=others))) ** 2))
    return jnp.sum(jnp.stack(losses))


def generalized_gaussian_rate(
    params: Any, *, shape: float | Float[Array, ""] | None = None, epsilon: float = 1e-8
) -> Float[Array, ""]:
    """BackSlash's rate of a model, `sum_i (|w_i| + epsilon)^shape`: the length of a code for its weights.

    Up to factors this is the negative log-likelihood of a generalized Gaussian prior: `shape = 2` is weight decay,
    `shape = 1` a Laplacian prior; trained models lie below 1. A smaller shape gives sparser weights. *Reconstructed*
    from the paper's abstract and public descriptions.

    Args:
      params: an array or a pytree of arrays.
      shape: the exponent, positive. None: the shape of the weights themselves, by `generalized_gaussian_shape`, a
        constant to the gradient.
      epsilon: positive; bounds the gradient at 0 if the shape is below 1.

    Returns:
      A scalar, float32 or wider, to be multiplied with a coefficient of 10 to 1000, divided by the number of weights.

    Raises:
      TypeError: a leaf that is not a floating array, or a shape that is not a number.
      ValueError: no array at all, or a number that is not positive.

    Reference:
      Wu et al., "BackSlash: Rate Constrained Optimized Training of Large Language Models".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.losses.generalized_gaussian_rate(jnp.array([0.5, -0.1, 0.0, 2.0]), shape=0.5).round(5))
      2.43765
    """
    _checks.number("epsilon", epsilon, above=0)
    leaves = _leaves("params", params)
    if shape is None:
        shape = generalized_gaussian_shape(params)
    else:
        _checks.number("shape", shape, above=0)
    rates = [jnp.sum((w * jnp.sign(w) + epsilon) ** shape) for w in leaves]  # |w|, with gradient 0 at 0
    return jnp.sum(jnp.stack(rates))


def generalized_gaussian_shape(params: Any) -> Float[Array, ""]:
    """The shape of the generalized Gaussian with the weights' moments: 1 for Laplacian, 2 for Gaussian weights.

    Solves `mean w^2 / (mean |w|)^2 = Gamma(1/s) Gamma(3/s) / Gamma(2/s)^2` for s by bisection.

    Args:
      params: an array or a pytree of arrays, taken together.

    Returns:
      A scalar between 0.1 and 10, float32 or wider, a constant to the gradient; 10 for weights that are all 0.

    Raises:
      TypeError: a leaf that is not a floating array.
      ValueError: no array at all.

    Reference:
      Wu et al., "BackSlash: Rate Constrained Optimized Training of Large Language Models".

    Example:
      >>> import jax, jaxsoft
      >>> weights = jax.random.laplace(jax.random.key(0), (10_000,))
      >>> print(jaxsoft.losses.generalized_gaussian_shape(weights).round(1))
      1.0
    """
    return shape_by_moments(_leaves("params", params))


# --- embeddings and codes --------------------------------------------------------------------------------


def effective_entropy_loss(
    embeddings: Float[Array, "*batch n features"],
    *,
    decorrelation: float = 1.0,
    spacing: int | None = None,
    min_gap: float = 1e-7,
    where: Bool[Array, "*batch n"] | None = None,
) -> Float[Array, "*batch"]:
    """Effective entropy maximization: `-sum_j H_j + decorrelation sum_{i != j} cov_ij^2` of a batch of embeddings.

    `H_j` is the entropy of feature j over the batch, estimated from the gaps of its sorted values (m-spacings):
    `mean_i log((n + 1) / m (x_(i+m) - x_(i)))`. Embeddings must be bounded, by a sigmoid, say; otherwise they grow
    without limit. *Reconstructed* from the paper's abstract, constants included.

    Args:
      embeddings: `[*batch, n, features]`; one loss per n embeddings.
      decorrelation: the weight of the squared covariances (with n - 1 in the denominator) of different features.
      spacing: m; None: the square root of n, rounded.
      min_gap: smaller gaps count as this one, and have gradient 0.
      where: `[*batch, n]` booleans, True = counts.

    Returns:
      Losses `[*batch]`, float32 or wider; 0 where fewer than two embeddings count.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Chakraborty et al., "Improving Pre-Trained Self-Supervised Embeddings Through Effective Entropy
      Maximization"; Vasicek, "A Test for Normality Based on Sample Entropy".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> x = jnp.array([[0.05], [0.2], [0.35], [0.7], [0.9]])
      >>> print(jaxsoft.losses.effective_entropy_loss(x, spacing=1).round(6))
      -0.178384
    """
    _checks.number("decorrelation", decorrelation, at_least=0)
    _checks.number("min_gap", min_gap, above=0)
    if spacing is not None:
        spacing = _checks.integer("spacing", spacing, at_least=1)
    x, keep = _vectors("embeddings", embeddings, where)
    index = jnp.arange(x.shape[-2])[:, None]
    count = jnp.sum(keep, axis=-1)[..., None, None]
    wanted = jnp.round(jnp.sqrt(count)) if spacing is None else spacing
    m = jnp.clip(wanted, 1, jnp.maximum(count - 1, 1)).astype(count.dtype)
    n, m_float = count.astype(x.dtype), m.astype(x.dtype)

    ordered = jnp.sort(jnp.where(keep[..., None], x, jnp.inf), axis=-2)
    ordered = jnp.where(index < count, ordered, 0)
    partner = jnp.broadcast_to(jnp.minimum(index + m, x.shape[-2] - 1), x.shape)
    inside = index + m < count
    gap = jnp.where(inside, jnp.take_along_axis(ordered, partner, axis=-2) - ordered, 1)
    terms = jnp.where(inside, jnp.log((n + 1) / m_float * jnp.maximum(gap, min_gap)), 0)
    entropy = safe_divide(jnp.sum(terms, axis=-2, keepdims=True), jnp.maximum(n - m_float, 0))

    centred = jnp.where(keep[..., None], x - safe_divide(jnp.sum(x, axis=-2, keepdims=True), n), 0)
    covariance = safe_divide(jnp.einsum("...ni,...nj->...ij", centred, centred), jnp.maximum(n - 1, 0))
    others = covariance * (1 - jnp.eye(x.shape[-1], dtype=x.dtype))
    return decorrelation * jnp.sum(others**2, axis=(-2, -1)) - jnp.sum(entropy, axis=(-2, -1))


def infomax_code_loss(
    logits: Float[Array, "n groups codes"],
    labels: Int[Array, " n"],
    *,
    redundancy: float = 1.0,
    where: Bool[Array, ...] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, ""]:
    """Discrete infomax codes: `-mean_g I(code_g; y) + redundancy mean_{g != h} I(code_g; code_h)`, of a batch.

    An example has one random code in each of several groups, with the probabilities `p = softmax(logits)`. Over the
    batch, the mutual information of a group's code and the label y is `H(mean p) - mean H(mean p of the label)`; that
    of two groups follows from their joint distribution `mean p_g p_h^T`. *Reconstructed* from the paper's abstract: the
    redundancy and both means are ours.

    Args:
      logits: `[n, groups, codes]`, a floating array.
      labels: `[n]` class ids: any integers, equal for the examples of one class.
      redundancy: the weight of the groups' mutual information, 0 or more. If it is not 0, an array
        `[groups, codes, groups, codes]` is formed.
      where: booleans that broadcast to the logits, True = counts: `keep[:, None, None]` leaves out examples.
      ignore_index: class id of examples to leave out; None: there is no such id.

    Returns:
      A scalar, float32 or wider, in nats; 0, with gradient 0, where nothing counts.

    Raises:
      TypeError: an argument of a wrong type or dtype, or logits that are `linear_logits`.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Lee et al., "Discrete Infomax Codes for Supervised Representation Learning".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> logits = jnp.array([[[9.0, 0.0]], [[9.0, 0.0]], [[0.0, 9.0]], [[0.0, 9.0]]])
      >>> print(jaxsoft.losses.infomax_code_loss(logits, jnp.array([0, 0, 1, 1])).round(2))  # -log 2 at best
      -0.69
    """
    _checks.number("redundancy", redundancy, at_least=0)
    x, present, _ = present_scores(logits, -1, where, "infomax_code_loss")
    if x.ndim != 3:
        raise ValueError(f"logits must have shape [n, groups, codes], got shape {x.shape}")
    n, groups, _ = x.shape
    _checks.integers("labels", labels)
    _checks.shape("labels", labels, (n,), "one id per example")
    ids = as_ids(labels)
    if ignore_index is not None:
        present &= (ids != _checks.integer("ignore_index", ignore_index))[:, None, None]
    p = softmax_with(jnp.where(present, x, 0), where=present)
    keep = jnp.any(present, axis=(1, 2))
    share = safe_divide(keep.astype(p.dtype), jnp.sum(keep).astype(p.dtype))  # weights of a mean
    same = ((ids[:, None] == ids) & keep[:, None] & keep).astype(p.dtype)
    by_label = jnp.einsum("nm,mgk->ngk", safe_divide(same, jnp.sum(same, axis=1, keepdims=True)), p)
    entropy = _entropy(jnp.einsum("n,ngk->gk", share, p), -1)
    information = entropy - jnp.einsum("n,ng->g", share, _entropy(by_label, -1))
    loss = -jnp.mean(information)
    if groups > 1 and not is_zero(redundancy):
        joint = jnp.einsum("n,ngk,nhl->gkhl", share, p, p)
        shared = entropy[:, None] + entropy - _entropy(joint, (1, 3))
        pairs = shared * (1 - jnp.eye(groups, dtype=p.dtype))
        loss = loss + redundancy * jnp.sum(pairs) / (groups * (groups - 1))
    return loss


def _entropy(p: Array, axis: Any) -> Array:
    """`-sum p log p`, with gradient 0 at 0."""
    positive = p > 0
    return -jnp.sum(jnp.where(positive, p * jnp.log(jnp.where(positive, p, 1)), 0), axis=axis)


def matrix_nuclear_norm(
    hidden: Float[Array, "*batch n features"], *, where: Bool[Array, "*batch n"] | None = None
) -> Float[Array, "*batch"]:
    """Matrix nuclear-norm: the sum of the `min(n, features)` largest column norms of the normalized rows, over n.

    Approximates the nuclear norm of a matrix of hidden states without a singular value decomposition: how spread out
    they are, as a measure of a model. The division by n is *reconstructed*.

    Args:
      hidden: `[*batch, n, features]`, one row per token.
      where: `[*batch, n]` booleans, True = counts.

    Returns:
      `[*batch]`, float32 or wider; 0 where no row counts.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Li et al., "Large Language Model Evaluation via Matrix Nuclear-Norm".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> hidden = jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
      >>> print(jaxsoft.losses.matrix_nuclear_norm(hidden).round(6))
      0.933288
    """
    x, keep = _vectors("hidden", hidden, where)
    x = safe_divide(x, _sqrt(jnp.sum(x * x, axis=-1, keepdims=True)))
    count = jnp.sum(keep, axis=-1)[..., None]
    norms = jnp.flip(jnp.sort(_sqrt(jnp.sum(x * x, axis=-2)), axis=-1), axis=-1)
    largest = jnp.where(jnp.arange(x.shape[-1]) < count, norms, 0)
    return safe_divide(jnp.sum(largest, axis=-1), count[..., 0].astype(x.dtype))


# --- layers ----------------------------------------------------------------------------------------------


def vq_commitment_loss(
    inputs: Float[Array, "*vectors features"],
    codes: Float[Array, "*vectors features"],
    *,
    beta: float = 0.25,
    where: Bool[Array, "*vectors"] | None = None,
) -> Float[Array, "*vectors"]:
    """Codebook and commitment loss: `mean (stop(z) - c)^2 + beta mean (z - stop(c))^2` of vectors and their codes.

    In the formula z are the inputs, c the codes. The layer's output is `inputs + stop_gradient(codes - inputs)`. The
    search for the nearest code in a large codebook streams, as in the example. The affine codebook and synchronized
    update of the second paper are not included.

    Args:
      inputs: `[*vectors, features]`, the outputs of the encoder.
      codes: the same shape: the code of each vector, taken from the codebook.
      beta: the weight of the commitment of the encoder to the codes, 0 or more.
      where: `[*vectors]` booleans, True = counts.

    Returns:
      Losses `[*vectors]`, float32 or wider, each a mean over the features; 0 where masked.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      van den Oord et al., "Neural Discrete Representation Learning"; Huh et al., "Straightening Out the
      Straight-Through Estimator: Overcoming Optimization Challenges in Vector Quantized Networks".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.rows import reductions
      >>> z, codebook = jnp.array([[0.5, -1.0]]), jnp.array([[2.0, 1.0], [0.3, -0.6]])
      >>> bias = -(codebook**2).sum(-1) / 2  # the nearest code has the largest z c - |c|^2 / 2
      >>> scores = jaxsoft.linear_logits(z, codebook, transpose_weight=True, bias=bias)
      >>> codes = codebook[jaxsoft.reduce_rows(scores, reductions.argmax())]
      >>> print(jaxsoft.losses.vq_commitment_loss(z, codes).round(6))
      [0.125]
    """
    _checks.number("beta", beta, at_least=0)
    z, c = _wide("inputs", inputs), _wide("codes", codes)
    if z.ndim == 0:
        raise ValueError("inputs must have shape [*vectors, features], got a scalar")
    _checks.shape("codes", c, z.shape, "the inputs' shape")
    if where is not None:
        where = _mask("where", where, z.shape[:-1])
        z, c = (jnp.where(where[..., None], a, 0) for a in (z, c))
    codebook = jnp.mean((lax.stop_gradient(z) - c) ** 2, axis=-1)
    return codebook + beta * jnp.mean((z - lax.stop_gradient(c)) ** 2, axis=-1)


def forward_forward_loss(
    positive: Float[Array, "*rows features"],
    negative: Float[Array, "*rows features"],
    *,
    threshold: float = 1.0,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows"]:
    """Forward-forward loss of one layer: `softplus(threshold - G(positive)) + softplus(G(negative) - threshold)`.

    The goodness `G = mean h^2` of a layer's activations should be above the threshold for real data and below it
    for negative data. Each layer is trained on its own: pass its inputs through `stop_gradient`.

    Args:
      positive: `[*rows, features]`, activations for real data.
      negative: the same shape, activations for negative data.
      threshold: of the goodness; may be traced.
      axis: the axis of the features.
      where: booleans that broadcast to the activations, True = counts, in both.

    Returns:
      Losses `[*rows]`, float32 or wider; 0 for a row without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Hinton, "The Forward-Forward Algorithm"; Park et al., "Forward Learning of Graph Neural Networks".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> positive, negative = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[0.2, 0.1, 0.6]])
      >>> print(jaxsoft.losses.forward_forward_loss(positive, negative).round(6))
      [0.738762]
    """
    _checks.number("threshold", threshold)
    _checks.floating("positive", positive)
    check_floats("negative", negative, positive.shape, "the shape of positive")

    def goodness(h):
        h, present, at = present_scores(h, axis, where, "forward_forward_loss")
        count = jnp.sum(present, axis=at)
        return safe_divide(jnp.sum(h * h, axis=at), count.astype(h.dtype)), count > 0

    (good, some), (bad, also) = goodness(positive), goodness(negative)
    return jnp.where(some & also, jax.nn.softplus(threshold - good) + jax.nn.softplus(bad - threshold), 0)


# --- domain adaptation -----------------------------------------------------------------------------------


def gradient_reversal(x: Any, strength: float | Float[Array, ""] = 1.0) -> Any:
    """`x` itself, with the derivative `-strength`: the layers before it learn the opposite of those after it.

    Args:
      x: a floating array, or a pytree of floating arrays.
      strength: the factor; may be traced, and has no gradient of its own. Usually raised from 0 to 1 over
        training, by `domain_adversarial_schedule`.

    Returns:
      `x`, exactly. Its derivatives, forward and reverse, are `-strength` times those of the identity.

    Raises:
      TypeError: a leaf that is not a floating array, or a strength that is not a number.

    Reference:
      Ganin et al., "Domain-Adversarial Training of Neural Networks".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.losses import gradient_reversal
      >>> print(jax.value_and_grad(lambda x: gradient_reversal(x, 0.5) ** 2)(jnp.array(3.0)))
      (Array(9., dtype=float32, weak_type=True), Array(-3., dtype=float32, weak_type=True))
    """
    _checks.number("strength", strength)

    def reverse(path, leaf):
        _checks.floating(f"x{jax.tree_util.keystr(path)}", leaf)
        return scale_gradient(leaf, -jnp.asarray(strength))

    return jax.tree_util.tree_map_with_path(reverse, x)


def domain_adversarial_schedule(progress: Any, *, rate: float = 10.0) -> Float[Array, "*shape"]:
    """The strength of `gradient_reversal` over training, `2 / (1 + e^(-rate progress)) - 1`: from 0 towards 1.

    Args:
      progress: the completed share of the training, in [0, 1]; a number or an array.
      rate: how fast the strength grows.

    Returns:
      The strength, an array of the shape of `progress`, float32 or wider.

    Raises:
      TypeError: a rate that is not a number.

    Reference:
      Ganin et al., "Domain-Adversarial Training of Neural Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import domain_adversarial_schedule
      >>> print(domain_adversarial_schedule(jnp.array([0.0, 0.25, 0.5, 1.0])).round(4))
      [0.     0.8483 0.9866 0.9999]
    """
    _checks.number("rate", rate)
    progress = jnp.asarray(progress)
    return jnp.tanh(rate / 2 * progress.astype(accumulation_dtype(progress.dtype)))


def domain_adversarial_loss(
    features: Float[Array, "*rows features"],
    domains: Int[Array, "*rows"],
    *,
    discriminator: Callable[[Array], Logits],
    strength: float | Float[Array, ""] = 1.0,
    weights: Float[Array, "*rows"] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Float[Array, "*rows"]:
    """Domain-adversarial loss: `cross_entropy(discriminator(gradient_reversal(features)), domains)`.

    Added to the loss of a task. The discriminator learns to tell the domains apart; the network below gets the reversed
    gradient and learns features that do not tell the domain.

    Args:
      features: `[*rows, features]`, of examples of all domains.
      domains: `[*rows]` ids of the domains.
      discriminator: a function from features to logits `[*rows, domains]` (an array or `linear_logits`), which closes
        over its parameters, as in `lambda h: h @ params["kernel"]`.
      strength: of `gradient_reversal`.
      weights: `[*rows]`, multiply the losses.
      ignore_index: id of examples to leave out.

    Returns:
      Losses `[*rows]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Ganin et al., "Domain-Adversarial Training of Neural Networks".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> features, kernel = jnp.array([[1.0, 0.0], [0.5, 2.0]]), jnp.array([[1.0, -1.0], [0.0, 1.0]])
      >>> loss = jaxsoft.losses.domain_adversarial_loss
      >>> print(loss(features, jnp.array([0, 1]), discriminator=lambda h: h @ kernel).round(6))
      [0.126928 0.313262]
    """
    if not callable(discriminator):
        raise TypeError(
            f"discriminator must be a function from features to logits, got {_checks.describe(discriminator)}"
        )
    logits = discriminator(gradient_reversal(features, strength))
    return cross_entropy(logits, domains, weights=weights, ignore_index=ignore_index)
