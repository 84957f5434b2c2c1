"""Retrieval scores normalized against hubs.

`s` are the similarities between queries and a gallery, `B` those between a bank (of queries, for example from
training) and the gallery. An item that is similar to the whole bank is a hub; dividing by its sum over the bank
corrects for that: `IS = exp(beta s_qg) / sum_b exp(beta B_bg)`, or in logarithms
`beta s_qg - logsumexp_b(beta B_bg)`. The bank may be an expression that is never stored: its sums stream.

Example:
  >>> import jax, jaxsoft
  >>> from jaxsoft import normalizers
  >>> keys = jax.random.split(jax.random.key(0), 3)
  >>> queries, gallery, bank = (jax.random.normal(k, (n, 8)) for k, n in zip(keys, (4, 100, 1000)))
  >>> streamed = jaxsoft.linear_logits(gallery, bank, transpose_weight=True)  # [gallery, bank]
  >>> normalizers.inverted_softmax(queries @ gallery.T, streamed, bank_axis=1).shape
  (4, 100)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype
from jaxsoft.normalizers.masks import present_scores, top_k_mask
from jaxsoft.rows import LinearLogits, Logits, logsumexp, top_k
from jaxsoft.rows.inner import check_axis


def inverted_softmax(
    similarities: Float[Array, "*queries gallery"],
    bank: Logits,
    *,
    beta: float | Float[Array, ""] = 20.0,
    bank_axis: int = 0,
    where: Bool[Array, ...] | None = None,
    bank_where: Bool[Array, ...] | None = None,
    log: bool = True,
) -> Float[Array, "*queries gallery"]:
    """Inverted softmax, `beta s_qg - logsumexp_b(beta B_bg)`: similarities normalized by each item's sum over a bank.

    Args:
      similarities: `[*queries, gallery]`, floating.
      bank: `[bank, gallery]` floats; or with `bank_axis=1` `[gallery, bank]`, which may be
        `linear_logits(gallery, bank_items, transpose_weight=True)`: streamed, never stored.
      beta: the inverse temperature, positive; differentiable.
      bank_axis: the axis of the bank's items, 0 or 1.
      where: booleans that broadcast to the similarities, True = counts.
      bank_where: booleans that broadcast to the bank, True = counts.
      log: whether to return logarithms, which rank the same and do not overflow.

    Returns:
      Scores of the similarities' shape and dtype. For an absent entry, and for an item whose bank is empty: -inf,
      or 0 with `log=False`, with gradient 0.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation"; Wang et al., "Balance Act: Mitigating
      Hubness in Cross-Modal Retrieval with Query and Gallery Banks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import inverted_softmax
      >>> s = jnp.array([[0.9, 0.8], [0.7, 0.75], [0.2, 0.6]])
      >>> print(inverted_softmax(s, jnp.array([[0.5, 0.9], [0.3, 0.7]]))[:2].round(6))
      [[ 7.98185 -2.01815]
       [ 3.98185 -3.01815]]
    """
    _checks.flag("log", log)
    s, present, _ = present_scores(similarities, -1, where, "inverted_softmax")
    scores = _log_inverted(s, present, bank, "bank", beta, "beta", bank_axis, bank_where)
    return (scores if log else jnp.exp(scores)).astype(similarities.dtype)


def dynamic_inverted_softmax(
    similarities: Float[Array, "*queries gallery"],
    bank: Logits,
    *,
    beta: float | Float[Array, ""] = 20.0,
    k: int = 1,
    bank_axis: int = 0,
    where: Bool[Array, ...] | None = None,
    bank_where: Bool[Array, ...] | None = None,
    log: bool = True,
) -> Float[Array, "*queries gallery"]:
    """Inverted softmax for the queries whose best item is a hub; the similarities of the others stay unchanged.

    An item is active if it is among the k best of any bank item; a query is normalized if its best item is
    active. The two kinds of rows are on different scales: compare scores within a row only.

    Args:
      similarities: `[*queries, gallery]`, floating.
      bank: as in `inverted_softmax`. (If it is streamed, its scale and temperature must be scalars.)
      beta: the inverse temperature, positive.
      k: the number of items that each bank item makes active, 1 or more.
      bank_axis: the axis of the bank's items, 0 or 1.
      where: booleans that broadcast to the similarities, True = counts.
      bank_where: booleans that broadcast to the bank, True = counts.
      log: whether normalized rows are logarithms; the other rows are the similarities either way.

    Returns:
      Scores of the similarities' shape and dtype; absent entries are -inf, or 0 with `log=False`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation"; Wang et al., "Balance Act: Mitigating
      Hubness in Cross-Modal Retrieval with Query and Gallery Banks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import dynamic_inverted_softmax
      >>> s = jnp.array([[0.9, 0.8], [0.7, 0.75]])
      >>> print(dynamic_inverted_softmax(s, jnp.array([[0.5, 0.9], [0.3, 0.7]])).round(6))
      [[ 0.9      0.8    ]
       [ 3.98185 -3.01815]]
    """
    _checks.flag("log", log)
    s, present, _ = present_scores(similarities, -1, where, "dynamic_inverted_softmax")
    scores = _log_inverted(s, present, bank, "bank", beta, "beta", bank_axis, bank_where)
    active = _active(s, present, bank, k, bank_axis, bank_where)
    if not log:
        scores = jnp.exp(scores)
    y = jnp.where(active, scores, jnp.where(present, s, -jnp.inf if log else 0))
    return y.astype(similarities.dtype)


def dual_inverted_softmax(
    similarities: Float[Array, "*queries gallery"],
    query_bank: Logits,
    gallery_bank: Logits,
    *,
    query_beta: float | Float[Array, ""] = 1 / 1.99,
    gallery_beta: float | Float[Array, ""] = 3.0,
    dynamic: bool = False,
    k: int = 1,
    floor: float = 1e-6,
    bank_axis: int = 0,
    where: Bool[Array, ...] | None = None,
    query_bank_where: Bool[Array, ...] | None = None,
    gallery_bank_where: Bool[Array, ...] | None = None,
    log: bool = True,
) -> Float[Array, "*queries gallery"]:
    """The product of two inverted softmaxes, `IS(s, query_bank) IS(s, gallery_bank)`.

    The published code uses the gallery bank in place of the similarities of both factors, apparently by mistake;
    here both factors are of the similarities, as the paper means.

    Args:
      similarities: `[*queries, gallery]`, floating.
      query_bank: similarities between a bank of queries and the gallery, as `bank` in `inverted_softmax`.
      gallery_bank: similarities between a bank of gallery-like items and the gallery, of the same form.
      query_beta: the inverse temperature of the first factor, positive.
      gallery_beta: the inverse temperature of the second factor, positive.
      dynamic: whether each factor is that of `dynamic_inverted_softmax`: in rows where it is not active, the
        similarity itself. The ranking within a row is then meaningful for positive similarities only: shift
        them, or keep `log=True`.
      k: the number of items that each bank item makes active, with `dynamic`.
      floor: the lower bound of similarities before their logarithm is taken, positive, with `dynamic` and `log`.
      bank_axis: the axis of the banks' items, 0 or 1.
      where: booleans that broadcast to the similarities, True = counts.
      query_bank_where: booleans that broadcast to the query bank, True = counts.
      gallery_bank_where: booleans that broadcast to the gallery bank, True = counts.
      log: whether to return logarithms, which rank the same and do not overflow.

    Returns:
      Scores of the similarities' shape and dtype; absent entries are -inf, or 0 with `log=False`.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Wang et al., "Balance Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery Banks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.normalizers import dual_inverted_softmax
      >>> s = jnp.array([[0.9, 0.8], [0.7, 0.75]])
      >>> banks = jnp.array([[0.5, 0.9], [0.3, 0.7]]), jnp.array([[1.0, 0.6], [0.5, 1.0]])
      >>> print(dual_inverted_softmax(s, *banks).round(6))
      [[-0.944567 -1.557692]
       [-1.645069 -1.732817]]
    """
    _checks.number("floor", floor, above=0)
    _checks.flag("dynamic", dynamic)
    _checks.flag("log", log)
    s, present, _ = present_scores(similarities, -1, where, "dual_inverted_softmax")
    factors = []
    for bank, name, beta, bank_where in (
        (query_bank, "query", query_beta, query_bank_where),
        (gallery_bank, "gallery", gallery_beta, gallery_bank_where),
    ):
        factor = _log_inverted(s, present, bank, f"{name}_bank", beta, f"{name}_beta", bank_axis, bank_where)
        if not log:
            factor = jnp.exp(factor)
        if dynamic:
            raw = jnp.log(jnp.maximum(s, floor)) if log else s
            raw = jnp.where(present, raw, -jnp.inf if log else 0)
            factor = jnp.where(_active(s, present, bank, k, bank_axis, bank_where), factor, raw)
        factors.append(factor)
    return (factors[0] + factors[1] if log else factors[0] * factors[1]).astype(similarities.dtype)


def _log_inverted(s, present, bank, bank_name, beta, beta_name, bank_axis, bank_where) -> Array:
    """`beta s - logsumexp_b(beta B)`, -inf where an entry is absent or an item's bank is empty."""
    _checks.number(beta_name, beta, above=0)
    bank_axis = _check_bank(bank, bank_name, bank_axis, s.shape[-1])
    if bank_where is not None:
        _checks.boolean(f"{bank_name}_where", bank_where)
        _checks.broadcastable(f"{bank_name}_where", bank_where, bank.shape, f"the shape of {bank_name}")
    if not isinstance(bank, LinearLogits):
        bank, bank_where, _ = present_scores(bank, bank_axis, bank_where, "a bank")
    log_sum = logsumexp(bank * beta, axis=bank_axis, where=bank_where)
    keep = present & (log_sum != -jnp.inf)
    return jnp.where(keep, beta * s - jnp.where(log_sum != -jnp.inf, log_sum, 0), -jnp.inf)


def _check_bank(bank: Any, name: str, bank_axis: int, gallery: int) -> int:
    _checks.floating(name, bank)
    _checks.option("bank_axis", bank_axis, (0, 1, -1, -2))
    bank_axis %= 2
    if bank.ndim != 2 or bank.shape[1 - bank_axis] != gallery:
        layout = f"(bank, {gallery})" if bank_axis == 0 else f"({gallery}, bank)"
        raise ValueError(
            f"{name} must have shape {layout} with bank_axis={bank_axis} (a gallery of {gallery}, as in the "
            f"similarities), got shape {tuple(bank.shape)}"
        )
    if isinstance(bank, LinearLogits) and bank_axis == 0:
        raise ValueError(
            f"{name} as linear_logits streams over its last axis: make it linear_logits(gallery, bank_items, "
            "transpose_weight=True) and pass bank_axis=1, got bank_axis=0"
        )
    return bank_axis


def _active(s, present, bank, k, bank_axis, bank_where) -> Array:
    """`[*queries, 1]`: whether a query's best item is among the k best of any item of the bank."""
    if isinstance(bank, LinearLogits):
        bank = _transposed(lax.stop_gradient(bank))
        if bank_where is not None:
            bank_where = jnp.atleast_2d(bank_where).T
        gallery_axis = 1
    else:
        gallery_axis = 1 - check_axis(bank, bank_axis)
        bank = lax.stop_gradient(jnp.asarray(bank).astype(accumulation_dtype(bank.dtype)))
    best = top_k(bank, k, axis=gallery_axis, where=bank_where).indices.reshape(-1)
    n = s.shape[-1]
    hubs = jnp.zeros(n, bool).at[jnp.where(best < 0, n, best)].set(True, mode="drop")
    return jnp.any(top_k_mask(s, present, 1, -1) & hubs, axis=-1, keepdims=True)


def _transposed(bank: LinearLogits) -> LinearLogits:
    """`[bank, gallery]` logits whose rows rank the gallery as the columns of `[gallery, bank]` ones do."""
    for name in ("scale", "temperature"):
        value = getattr(bank, name)
        if value is not None and jnp.ndim(value):
            raise ValueError(f"the bank's {name} must be a scalar for dynamic normalization, got one per row")
    items = bank.weight if bank.transpose_weight else bank.weight.T
    # A bias shifts a bank item's whole row: it changes no ranking.
    return dataclasses.replace(
        bank, hidden=items, weight=bank.hidden, bias=None, softcap=None, transpose_weight=True
    )
