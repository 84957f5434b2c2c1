"""Routers of mixtures of experts.

Losses that balance the load of the experts and keep a router's logits small. `load_balance_loss`, `importance_loss` and
`modality_routing_kl` are functions of a whole batch and give a scalar; `router_z_loss` gives one value per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.normalizers.inner import present_scores, top_k_mask
from jaxsoft.rows import Logits, logsumexp
from jaxsoft.rows.inner import rows_of


class _Shares(NamedTuple):
    """The mean router distribution of the tokens that count, and the experts that they may choose.

    Attributes:
      mean: `[experts]`, 0 where no token counts.
      present: `[experts]` booleans.
      any: scalar boolean, whether any token counts.
    """

    mean: Array
    present: Array
    any: Array


def _shares(p: Array, present: Array, axis_name: Any) -> _Shares:
    """`p` and `present` are `[tokens, experts]`; the sums include the devices of `axis_name`."""
    sums = (
        jnp.sum(jnp.where(present, p, 0), axis=0),
        jnp.sum(present, axis=0).astype(p.dtype),
        jnp.sum(jnp.any(present, axis=1)).astype(p.dtype),
    )
    total, count, tokens = sums if axis_name is None else lax.psum(sums, axis_name)
    return _Shares(safe_divide(total, tokens), count > 0, tokens > 0)


def _flat(probabilities: Any, axis: int, where: Any, name: str) -> tuple[Array, Array]:
    p, present, axis = present_scores(probabilities, axis, where, name)
    experts = p.shape[axis]
    p, present = (jnp.moveaxis(a, axis, -1).reshape(-1, experts) for a in (p, present))
    return p, present


def load_balance_loss(
    probabilities: Float[Array, "*tokens experts"],
    *,
    k: int = 1,
    kind: str = "switch",
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    axis_name: Any = None,
) -> Float[Array, ""]:
    """Load balance of a router, `experts * sum_e f_e P_e`: how unevenly a batch loads the experts.

    With P the mean router distribution over the tokens and f the experts' shares of all top-k choices
    (constants to the gradient), by `kind`:

    * `"switch"`: `experts * sum_e f_e P_e`, 1 at balance. V-MoE's gshard loss is this one with k = 1.
    * `"cv2"`: the squared coefficient of variation of P, `var_e(P) / mean_e(P)^2`, 0 at balance.
    * `"kl"`: `KL(P || uniform)`, 0 at balance.

    The hard constraints of Pavlitska et al. are not included.

    Args:
      probabilities: `[*tokens, experts]`, the router's softmax (or, for `"cv2"`, the weights of a gate).
      k: how many experts a token chooses, for `"switch"`.
      kind: which of the three.
      axis: the axis of the experts.
      where: booleans that broadcast to the probabilities, True = counts: `keep[..., None]` leaves out tokens.
      axis_name: the mesh axes, inside `shard_map` or `pmap`, whose devices hold the other parts of the batch. P
        and f are then averaged over the whole batch before they are multiplied.

    Returns:
      A scalar, float32 or wider; 0, with gradient 0, where no token counts.

    Raises:
      TypeError: probabilities that are not a floating array.
      ValueError: an unknown kind, k < 1, an axis or a mask that does not fit.

    Reference:
      Pavlitska et al., "Sparsely-gated Mixture-of-Expert Layers for CNN Interpretability"; Fedus et al., "Switch
      Transformers"; Riquelme et al., "Scaling Vision with Sparse Mixture of Experts".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.losses import load_balance_loss
      >>> h = jnp.array([[2.0, 0.0, -1.0], [1.5, 0.5, 0.0], [0.2, 0.1, 0.9], [1.0, 0.8, -0.5]])
      >>> p = jaxsoft.softmax(h)
      >>> print(load_balance_loss(p).round(6), load_balance_loss(p, kind="kl").round(6))
      1.398232 0.104528
    """
    k = _checks.integer("k", k, at_least=1)
    _checks.option("kind", kind, ("switch", "cv2", "kl"))
    p, present = _flat(probabilities, axis, where, "load_balance_loss")
    shares = _shares(p, present, axis_name)
    mean = shares.mean
    experts = jnp.sum(shares.present).astype(mean.dtype)
    if kind == "switch":
        chosen = jnp.sum(top_k_mask(p, present, k, 1), axis=0).astype(mean.dtype)
        chosen = chosen if axis_name is None else lax.psum(chosen, axis_name)
        return experts * jnp.sum(safe_divide(chosen, jnp.sum(chosen)) * mean)
    if kind == "cv2":
        average = safe_divide(jnp.sum(mean), experts)
        variance = safe_divide(jnp.sum(jnp.where(shares.present, mean - average, 0) ** 2), experts)
        return safe_divide(variance, average * average)
    positive = mean != 0
    return jnp.sum(jnp.where(positive, mean * jnp.log(jnp.where(positive, mean, 1) * experts), 0))


def importance_loss(
    gates: Float[Array, "*tokens experts"],
    *,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    axis_name: Any = None,
) -> Float[Array, ""]:
    """Importance loss: `var_e(I) / mean_e(I)^2` of the experts' importance I, their gates summed over the tokens.

    The squared coefficient of variation: `load_balance_loss` of the kind `"cv2"`.

    Args:
      gates: `[*tokens, experts]`, weights of a gate such as `top_k_gate`, or the router's softmax.
      axis: the axis of the experts.
      where: booleans that broadcast to the gates, True = counts.
      axis_name: as in `load_balance_loss`.

    Returns:
      A scalar, float32 or wider: 0 at balance, and where no token counts.

    Raises:
      TypeError: gates that are not a floating array.
      ValueError: an axis or a mask that does not fit.

    Reference:
      Pavlitska et al., "Sparsely-gated Mixture-of-Expert Layers for CNN Interpretability"; Shazeer et al.,
      "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import importance_loss
      >>> print(importance_loss(jnp.array([[1.0, 0.0], [0.5, 0.5]])))
      0.25
    """
    return load_balance_loss(gates, kind="cv2", axis=axis, where=where, axis_name=axis_name)


def modality_routing_kl(
    probabilities: Float[Array, "*tokens experts"],
    modality: Bool[Array, "*tokens"],
    *,
    low: float,
    high: float,
    axis: int = -1,
    where: Bool[Array, ...] | None = None,
    axis_name: Any = None,
) -> Float[Array, ""]:
    """Keeps the distance of two modalities' routing within a band: `relu(low - D) + relu(D - high)`.

    D is the symmetric divergence `(KL(P_a || P_b) + KL(P_b || P_a)) / 2` of the modalities' mean router
    distributions. The divergence is the paper's; the mean, the band and its form are *reconstructed*.

    Args:
      probabilities: `[*tokens, experts]`, the router's softmax.
      modality: `[*tokens]` booleans: the modality of each token.
      low: the smallest divergence that costs nothing, 0 or more.
      high: the largest one, `low` or more.
      axis: the axis of the experts.
      where: booleans that broadcast to the probabilities, True = counts.
      axis_name: as in `load_balance_loss`.

    Returns:
      A scalar, float32 or wider; 0, with gradient 0, if a modality has no tokens. Infinite if an expert has the
      probability 0 in one modality only.

    Raises:
      TypeError: an argument of a wrong dtype.
      ValueError: an argument of a wrong shape, or a `high` below `low`.

    Reference:
      Xia et al., "SMAR: Soft Modality-Aware Routing Strategy for MoE-based Multimodal Large Language Models
      Preserving Language Capabilities".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> from jaxsoft.losses import modality_routing_kl
      >>> p = jaxsoft.softmax(jnp.array([[2.0, 0.0, -1.0], [1.5, 0.5, 0.0], [0.2, 0.1, 0.9], [1.0, 0.8, -0.5]]))
      >>> is_image = jnp.array([False, False, True, True])
      >>> print(modality_routing_kl(p, is_image, low=0.0, high=0.1).round(6))
      0.202661
    """
    _checks.number("low", low, at_least=0)
    _checks.number("high", high, at_least=float(low) if _checks.is_concrete_number(low) else 0)
    p, present = _flat(probabilities, axis, where, "modality_routing_kl")
    _checks.boolean("modality", modality)
    rows = rows_of(probabilities.shape, axis % probabilities.ndim)
    _checks.shape("modality", modality, rows, "one boolean per token")
    second = jnp.asarray(modality).reshape(-1, 1)
    a, b = (_shares(p, present & m, axis_name) for m in (~second, second))
    both = a.any & b.any
    differ = (a.mean != b.mean) & both
    log_a, log_b = (jnp.log(jnp.where(differ, s.mean, 1)) for s in (a, b))
    divergence = jnp.sum(jnp.where(differ, (a.mean - b.mean) * (log_a - log_b), 0)) / 2
    band = jnp.maximum(low - divergence, 0) + jnp.maximum(divergence - high, 0)
    return jnp.where(both, band, 0)


def router_z_loss(
    logits: Logits, *, axis: int = -1, where: Bool[Array, ...] | None = None
) -> Float[Array, "*tokens"]:
    """The squared log-partition of each token's router logits, `logsumexp(h)^2`, which keeps the logits small.

    Args:
      logits: `[*tokens, experts]`, a floating array or `linear_logits`.
      axis: the axis of the experts.
      where: booleans that broadcast to the logits, True = counts.

    Returns:
      `[*tokens]`, float32 or wider, to be averaged and multiplied with 1e-3 or so; 0 for a token without experts.

    Raises:
      TypeError: logits that are not floating.
      ValueError: an axis or a mask that does not fit.

    Reference:
      Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.losses import router_z_loss
      >>> h = jnp.array([[2.0, 0.0, -1.0], [1.5, 0.5, 0.0], [0.2, 0.1, 0.9], [1.0, 0.8, -0.5]])
      >>> print(router_z_loss(h).mean().round(6))
      3.488954
    """
    value = logsumexp(logits, axis=axis, where=where)
    value = jnp.where(value == -jnp.inf, 0, value)
    return value * value
