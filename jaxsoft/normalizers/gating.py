"""Gates and routing: the weights of the experts in a mixture of experts.

Gates take a row of router scores and return weights of the same shape, 0 for experts that are not chosen. Noise needs
an explicit `key`; where a function takes `key=None`, that is evaluation, without noise. The regularizers of routers
(`load_balance_loss`, `importance_loss`, `modality_routing_kl`, `router_z_loss`) are in `jaxsoft.losses`.

Example:
  >>> import jax
  >>> from jaxsoft import losses, normalizers
  >>> scores = jax.random.normal(jax.random.key(0), (16, 8))  # [tokens, experts]
  >>> gates = normalizers.top_k_gate(scores, 2, noise_std=1.0, key=jax.random.key(1))
  >>> balance = losses.load_balance_loss(jax.nn.softmax(scores), k=2)
  >>> penalty = losses.router_z_loss(scores).mean()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide
from jaxsoft.normalizers.masks import present_scores, top_k_mask
from jaxsoft.rows import temperature as divide_by_temperature
from jaxsoft.rows.inner import row_scalar, softmax_with


def top_k_gate(
    scores: Float[Array, "*rows experts"],
    k: int,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    renormalize: bool = True,
    noise_logits: Float[Array, ...] | None = None,
    noise_std: float | None = None,
    key: Array | None = None,
) -> Float[Array, "*rows experts"]:
    """`softmax(TopK(h, k))`: softmax gating that keeps the k experts with the largest scores of each row.

    With `renormalize`, softmax is taken over the k experts alone, which equals softmax over all experts divided
    by its sum over the k; without it, over all experts, and those not chosen are set to 0. The choice gets no
    gradient. Noise spreads the load in training, in one of two forms (the first is *reconstructed*):
    `h + n softplus(noise_logits)` (Shazeer et al., where it is learned) or `h + n noise_std / experts` (V-MoE),
    n standard normal.

    Args:
      scores: `[*rows, experts]`, floating: the router's outputs h.
      k: the number of experts that a row keeps, a static integer of 1 or more (all, where a row has fewer).
      axis: the axis of the experts.
      where: booleans that broadcast to the scores, True = counts.
      renormalize: whether the weights of the k experts sum to 1.
      noise_logits: broadcasts to the scores; the learned form of the noise.
      noise_std: a number, 0 or more (1.0 in V-MoE), divided by the number of experts that are not masked.
      key: the PRNG key of the noise, needed with either of the two.

    Returns:
      Weights of the scores' shape and dtype; 0 for experts not chosen, absent entries and rows without entries.
      Ties go to the smaller index.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range; both forms of noise; noise without a key.

    Reference:
      Nguyen et al., "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import top_k_gate
      >>> h = jnp.array([1.2, -0.3, 0.8, 0.1])
      >>> print(top_k_gate(h, 2).round(6), top_k_gate(h, 2, renormalize=False).round(6))
      [0.598688 0.       0.401312 0.      ] [0.449171 0.       0.301089 0.      ]
    """
    k = _checks.integer("k", k, at_least=1)
    _checks.flag("renormalize", renormalize)
    x, present, axis = present_scores(scores, axis, where, "top_k_gate")
    if noise_logits is not None and noise_std is not None:
        raise ValueError("noise_logits and noise_std are two forms of the noise: give one of them, got both")
    noisy = noise_logits is not None or noise_std is not None
    if noisy != (key is not None):
        raise ValueError(
            "key must be given if and only if noise_logits or noise_std is, got "
            + ("noise without a key" if noisy else "a key without noise")
        )
    if noise_logits is not None:
        _checks.floating("noise_logits", noise_logits)
        _checks.broadcastable("noise_logits", noise_logits, scores.shape, "the shape of the scores")
        sigma = jax.nn.softplus(jnp.where(present, noise_logits, 0).astype(x.dtype))
    elif noise_std is not None:
        _checks.number("noise_std", noise_std, at_least=0)
        sigma = noise_std / jnp.maximum(jnp.sum(present, axis=axis, keepdims=True), 1).astype(x.dtype)
    if key is not None:
        x = x + sigma * jax.random.normal(key, x.shape, x.dtype)
    chosen = top_k_mask(x, present, k, axis)
    y = softmax_with(x, axis=axis, where=chosen if renormalize else present)
    return jnp.where(chosen, y, 0).astype(scores.dtype)


def dense_to_sparse_gate(
    inputs: Float[Array, "*rows d"],
    weight: Float[Array, "d experts"],
    bias: Float[Array, " experts"] | None = None,
    *,
    temperature: float | Float[Array, ...] = 1.0,
    activation: Callable[[Array], Array] | None = None,
    input_transform: Callable[[Array], Array] | None = None,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows experts"]:
    """Softmax gating with a temperature: `softmax((activation(M(x) @ weight) + bias) / temperature)`.

    Dense gating at a high temperature, sparse in the limit 0. Plain softmax gating is the default; `activation`
    gives the activation dense-to-sparse gate and `input_transform` the modified gate (M bounded), both
    *reconstructed* from the papers' abstracts.

    Args:
      inputs: `[*rows, d]`, floating.
      weight: `[d, experts]`, floating.
      bias: `[experts]`, added after the activation.
      temperature: a positive scalar or `[*rows]`; learned or annealed.
      activation: a function such as `jax.nn.sigmoid`, `jnp.tanh`, `jax.nn.gelu`, applied to the linear outputs.
      input_transform: a bounded function such as `jnp.tanh` or `jax.nn.sigmoid`, applied to the inputs.
      where: booleans that broadcast to `[*rows, experts]`, True = counts. (A NaN inside `weight` or `inputs`
        is kept away if its expert, or its row, is masked altogether.)

    Returns:
      Weights `[*rows, experts]` in the promoted dtype of inputs and weight; 0 for absent experts.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, a temperature that is not positive.

    Reference:
      Nguyen et al., "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?"; Nguyen et al., "A
      General Theory for Softmax Gating Multinomial Logistic Mixture of Experts" (input transform).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import dense_to_sparse_gate
      >>> x, weight = jnp.array([1.0, 0.5]), jnp.array([[1.0, -0.5, 0.6, 0.0], [0.4, 0.4, 0.4, 0.2]])
      >>> print(dense_to_sparse_gate(x, weight, temperature=0.25).round(6))
      [0.821927 0.002037 0.165944 0.010091]
    """
    _check_matmul("inputs", inputs, "weight", weight)
    for name, function in (("activation", activation), ("input_transform", input_transform)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function of one array, got {_checks.describe(function)}")
    dtype = accumulation_dtype(inputs.dtype, weight.dtype)
    shape = (*inputs.shape[:-1], weight.shape[1])
    x, w = jnp.asarray(inputs).astype(dtype), jnp.asarray(weight).astype(dtype)
    if where is not None:
        _checks.boolean("where", where)
        _checks.broadcastable("where", where, shape, "[*rows, experts]")
        where = jnp.broadcast_to(where, shape)
        x = jnp.where(jnp.any(where, axis=-1, keepdims=True), x, 0)
        w = jnp.where(jnp.any(where, axis=tuple(range(where.ndim - 1))), w, 0)
    h = (x if input_transform is None else input_transform(x)) @ w
    h = h if activation is None else activation(h)
    if bias is not None:
        _checks.floating("bias", bias)
        _checks.shape("bias", bias, shape[-1:], "one number per expert")
        h = h + bias
    h, present, axis = present_scores(h, -1, where, "dense_to_sparse_gate")
    y = _tempered_softmax(h, temperature, axis, present)
    return y.astype(jnp.promote_types(inputs.dtype, weight.dtype))


def gumbel_softmax_gate(
    scores: Float[Array, "*rows experts"],
    *,
    key: Array | None,
    temperature: float | Float[Array, ...] = 1.0,
    num_samples: int = 1,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows experts"]:
    """Gating with Gumbel noise: `softmax((scores + gumbel) / temperature)` in training, without noise in evaluation.

    The details are *reconstructed*.

    Args:
      scores: `[*rows, experts]`, floating.
      key: a PRNG key; None for evaluation, `softmax(scores / temperature)`.
      temperature: a positive scalar or `[*rows]`; differentiable.
      num_samples: the number of draws to average, 1 or more; averaging is the other way to evaluate.
      axis: the axis of the experts.
      where: booleans that broadcast to the scores, True = counts.

    Returns:
      Weights of the scores' shape and dtype; 0 for absent entries and rows without entries.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range; several samples without a key.

    Reference:
      Chernov, "(GG) MoE vs. MLP on Tabular Data".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import gumbel_softmax_gate
      >>> print(gumbel_softmax_gate(jnp.array([1.2, -0.3, 0.8, 0.1]), key=None, temperature=0.5).round(6))
      [0.621149 0.030925 0.2791   0.068825]
    """
    num_samples = _checks.integer("num_samples", num_samples, at_least=1)
    if key is None and num_samples != 1:
        raise ValueError(f"num_samples={num_samples} needs a key, got key=None")
    x, present, axis = present_scores(scores, axis, where, "gumbel_softmax_gate")

    def draw(key):
        return _tempered_softmax(x + jax.random.gumbel(key, x.shape, x.dtype), temperature, axis, present)

    if key is None:
        y = _tempered_softmax(x, temperature, axis, present)
    elif num_samples == 1:
        y = draw(key)
    else:
        y = jnp.mean(jax.vmap(draw)(jax.random.split(key, num_samples)), axis=0)
    return y.astype(scores.dtype)


class SoftMoE(NamedTuple):
    """The two weights of a soft mixture of experts, each `[*batch, tokens, *slots]`.

    Attributes:
      dispatch: softmax over the tokens: the weights of the tokens in each slot.
      combine: softmax over all slots: the weights of the slots in each token's output.
    """

    dispatch: Array
    combine: Array


def soft_moe_dispatch_combine(
    tokens: Float[Array, "*batch tokens d"],
    slots: Float[Array, "d ..."],
    *,
    scale: float | Float[Array, ""] = 1.0,
    where: Bool[Array, "*batch tokens"] | None = None,
    noise_std: float = 0.0,
    key: Array | None = None,
) -> SoftMoE:
    """Soft MoE: every slot is a mean of tokens and every token a mean of slots, by softmax over cosines.

    The logits are `x_hat . (scale phi_hat)`, with tokens and slots divided by `sqrt(|.|^2 + 1e-6)`. With them

        slot_inputs = einsum("...ts,...td->...sd", dispatch, tokens)
        outputs = einsum("...ts,...sd->...td", combine, expert_of(slot_inputs))

    Args:
      tokens: `[*batch, tokens, d]`, floating.
      slots: `[d, slots]` or `[d, experts, slots]` (any number of slot axes): the learned slot parameters.
      scale: the learned scale, a scalar.
      where: `[*batch, tokens]` booleans, True = counts. A masked token is in no slot and gets no output.
      noise_std: standard deviation of Gaussian noise on the logits, 0 or more.
      key: the PRNG key of the noise, needed with `noise_std`.

    Returns:
      `SoftMoE(dispatch, combine)`, each `[*batch, tokens, *slots]` in the dtype of the tokens.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range; noise without a key, or a key without noise.

    Reference:
      Puigcerver et al., "From Sparse to Soft Mixtures of Experts".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import soft_moe_dispatch_combine
      >>> tokens = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
      >>> dispatch, combine = soft_moe_dispatch_combine(tokens, jnp.eye(2))
      >>> print((dispatch.T @ tokens).round(6))
      [[0.825978 0.700981]
       [0.526959 1.299019]]
    """
    _check_matmul("tokens", tokens, "slots", slots, rows=2)
    scale = row_scalar("scale", scale, (), accumulation_dtype(tokens.dtype))
    _checks.number("noise_std", noise_std, at_least=0)
    if (key is None) != (noise_std == 0):
        raise ValueError(
            f"key must be given if and only if noise_std > 0, got noise_std={noise_std} and key={key}"
        )
    dtype = accumulation_dtype(tokens.dtype, slots.dtype)
    x, phi = jnp.asarray(tokens).astype(dtype), jnp.asarray(slots).astype(dtype).reshape(slots.shape[0], -1)
    if where is not None:
        _checks.boolean("where", where)
        _checks.shape("where", where, tokens.shape[:-1], "one boolean per token")
        where = where[..., None]
        x = jnp.where(where, x, 0)
    logits = _unit(x, -1) @ (scale * _unit(phi, 0)).astype(dtype)
    if key is not None:
        logits = logits + noise_std * jax.random.normal(key, logits.shape, logits.dtype)
    shape = (*tokens.shape[:-1], *slots.shape[1:])
    return SoftMoE(
        *(softmax_with(logits, axis=a, where=where).astype(tokens.dtype).reshape(shape) for a in (-2, -1))
    )


def merge_experts(experts: Any, weights: Float[Array, "*rows experts"]) -> Any:
    """Merges the parameters of experts: `sum_i w_i theta_i`, one network per row instead of several.

    In SMEAR the weights are `softmax(router(mean of the hidden states))`, one row per example; the mean over a
    sequence should leave out padding.

    Args:
      experts: a pytree of floating arrays `[experts, ...]`, the parameters stacked.
      weights: `[*rows, experts]`, the output of a gate.

    Returns:
      The pytree with leaves `[*rows, ...]`, in the dtypes of `experts`, summed in float32 or wider.

    Raises:
      TypeError: an array that is not floating.
      ValueError: a leaf whose first axis is not the experts.

    Reference:
      Muqeeth et al., "Soft Merging of Experts with Adaptive Routing".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.normalizers import merge_experts
      >>> experts = {"weight": jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
      >>> print(merge_experts(experts, jax.nn.softmax(jnp.array([0.5, 1.0, 0.0])))["weight"].round(6))
      [2.758256 3.758256]
    """
    _checks.floating("weights", weights)
    if weights.ndim == 0:
        raise ValueError("weights must have shape [*rows, experts], got a scalar")
    n = weights.shape[-1]

    def merge(path, leaf):
        name = "experts" + jax.tree_util.keystr(path)
        _checks.floating(name, leaf)
        _checks.shape(name, leaf, (n, *leaf.shape[1:]), "one slice per expert, as many as in weights")
        dtype = accumulation_dtype(leaf.dtype, weights.dtype)
        out = jnp.tensordot(jnp.asarray(weights), jnp.asarray(leaf), 1, preferred_element_type=dtype)
        return out.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(merge, experts)


def drop_weak_experts(
    gates: Float[Array, "*rows experts"],
    *,
    threshold: float,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Float[Array, "*rows experts"]:
    """Drops the experts whose weight is below `threshold * max_j gates_j`, and renormalizes the others.

    For inference after a top-k gate: tokens that one expert dominates need no second one. The rule is
    *reconstructed*.

    Args:
      gates: `[*rows, experts]`, non-negative weights such as those of `top_k_gate`.
      threshold: the ratio mu, in [0, 1].
      axis: the axis of the experts.
      where: booleans that broadcast to the gates, True = counts.

    Returns:
      Weights of the gates' shape and dtype that sum to 1; 0 for dropped and absent experts, and in a row whose
      weights are all 0. The choice of experts gets no gradient.

    Raises:
      TypeError: gates that are not a floating array, a threshold that is not a number.
      ValueError: a threshold out of range, an axis or a mask that does not fit.

    Reference:
      Huang et al., "MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import drop_weak_experts
      >>> print(drop_weak_experts(jnp.array([[0.8, 0.2], [0.6, 0.4]]), threshold=0.3))
      [[1.  0. ]
       [0.6 0.4]]
    """
    _checks.number("threshold", threshold, at_least=0, at_most=1)
    x, present, axis = present_scores(gates, axis, where, "drop_weak_experts")
    best = jnp.max(lax.stop_gradient(x), axis=axis, keepdims=True, where=present, initial=0)
    kept = jnp.where(present & ~(x < threshold * best), x, 0)  # keeps a NaN, so that it shows
    return safe_divide(kept, jnp.sum(kept, axis=axis, keepdims=True)).astype(gates.dtype)


def wina_mask(
    activations: Float[Array, "*rows columns"],
    input_norms: Float[Array, " columns"],
    k: int,
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
) -> Bool[Array, "*rows columns"]:
    """The k inputs of a linear layer that matter most: the largest `|x_i| |W_i|`, W_i the weights of input i.

    `jnp.where(mask, activations, 0) @ weight` then reads only k rows of the weight.

    Args:
      activations: `[*rows, columns]`, floating: the inputs of the layer.
      input_norms: `[columns]`, the L2 norms, known ahead of time: `jnp.linalg.norm(weight, axis=1)` for a
        weight `[columns, outputs]` as in `activations @ weight`.
      k: the number of inputs to keep, a static integer of 1 or more.
      axis: the axis of the columns.
      where: booleans that broadcast to the activations, True = counts.

    Returns:
      Booleans of the activations' shape, at most k of them True in a row; ties go to the smaller index.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import wina_mask
      >>> print(wina_mask(jnp.array([0.5, -2.0, 0.1, 1.0]), jnp.array([2.236, 0.245, 3.742, 0.707]), 2))
      [ True False False  True]
    """
    k = _checks.integer("k", k, at_least=1)
    x, present, axis = present_scores(activations, axis, where, "wina_mask")
    norms = _along(axis, x, "input_norms", input_norms)
    return top_k_mask(jnp.abs(x) * jnp.abs(norms.astype(x.dtype)), present, k, axis)


def feature_selection_gate(
    features: Float[Array, "*rows d"], gate_logits: Float[Array, " d"], *, axis: int = -1
) -> Float[Array, "*rows d"]:
    """`features * sigmoid(gate_logits)`, one learned gate per feature, as in `x + gate(branch(x), w)`.

    The paper calls the gates hard because training drives them to 0 or 1. It trains them in a step of their own,
    for which `route_gradients` selects the parameters.

    Args:
      features: `[*rows, d]`, floating.
      gate_logits: `[d]`, floating.
      axis: the axis of the features.

    Returns:
      The gated features, in their shape and dtype.

    Raises:
      TypeError: an argument that is not floating.
      ValueError: an argument of a wrong shape.

    Reference:
      Roffo et al., "Hard-Attention Gates with Gradient Routing for Endoscopic Image Computing".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import feature_selection_gate
      >>> print(feature_selection_gate(jnp.array([1.0, 2.0, 3.0]), jnp.array([-1.0, 0.0, 2.0])).round(6))
      [0.268941 1.       2.642391]
    """
    _checks.floating("features", features)
    _checks.floating("gate_logits", gate_logits)
    axis = _checks.integer("axis", axis, at_least=-features.ndim, at_most=features.ndim - 1) % features.ndim
    dtype = accumulation_dtype(features.dtype)
    gates = jax.nn.sigmoid(_along(axis, features, "gate_logits", gate_logits).astype(dtype))
    return (jnp.asarray(features).astype(dtype) * gates).astype(features.dtype)


def route_gradients(params: Any, mask: Any) -> Any:
    """Returns `params`, with gradients only for the leaves that `mask` selects: the others are constants.

    Args:
      params: a pytree of arrays.
      mask: a pytree of Python booleans with the structure of `params`, or a prefix of it; True = trained.

    Returns:
      `params`, with unchanged values.

    Raises:
      TypeError: a mask of anything but booleans.
      ValueError: a mask whose structure does not fit.

    Reference:
      Roffo et al., "Hard-Attention Gates with Gradient Routing for Endoscopic Image Computing".

    Example:
      >>> import jax
      >>> from jaxsoft.normalizers import route_gradients
      >>> def loss(p):
      ...     p = route_gradients(p, {"gates": True, "network": False})
      ...     return p["gates"] * p["network"]
      >>> print({k: float(g) for k, g in jax.grad(loss)({"gates": 2.0, "network": 3.0}).items()})
      {'gates': 3.0, 'network': 0.0}
    """

    def route(trained, part):
        if not isinstance(trained, bool):
            raise TypeError(f"mask must hold booleans, got {_checks.describe(trained)}")
        return part if trained else lax.stop_gradient(part)

    return jax.tree.map(route, mask, params)


def _tempered_softmax(x: Any, temperature: Any, axis: int, present: Array) -> Array:
    x = divide_by_temperature(x, temperature, axis=axis)
    return softmax_with(cast(Array, x), axis=axis, where=present)


def _unit(x: Array, axis: int) -> Array:
    return x / jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-6)


def _along(axis: int, x: Any, name: str, vector: Any) -> Array:
    """Checks a vector over `axis` and gives it the axes to broadcast."""
    _checks.floating(name, vector)
    _checks.shape(name, vector, (x.shape[axis],), "one number per entry of the axis")
    return jnp.asarray(vector).reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _check_matmul(left: str, x: Any, right: str, weight: Any, rows: int = 1) -> None:
    """Checks the operands of `x @ weight`: dtypes, axes and their common size."""
    _checks.floating(left, x)
    _checks.floating(right, weight)
    if x.ndim < rows:
        raise ValueError(f"{left} must have {rows} axes or more, got shape {tuple(x.shape)}")
    if weight.ndim < 2 or (rows == 1 and weight.ndim > 2):
        raise ValueError(
            f"{right} must have {'two axes or more' if rows == 2 else 'two axes'}, got shape "
            f"{tuple(weight.shape)}"
        )
    _checks.shape(
        right, weight, (x.shape[-1], *weight.shape[1:]), f"its first axis is the last one of {left}"
    )
