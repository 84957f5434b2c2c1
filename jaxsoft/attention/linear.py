"""Attention without softmax, in linear time.

A query reads sums over the keys, so that time and memory are linear in the length. In the formulas `phi` is a
feature map, `S_i = phi(q_i) . sum_j phi(k_j)` and `N` the number of keys that query i sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import jax.numpy as jnp
from jax import checkpoint, lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import safe_divide
from jaxsoft.attention._layout import by_key_head, from_blocks, from_key_head, prepare, scale_of, to_blocks


def decayed_sums(
    query: Array, key: Array, value: Array, slopes: Array, state: Array, block_size: int
) -> tuple[Array, Array]:
    """`o_i = sum_{j <= i} e^{-s (i - j)} (q_i . k_j) v_j + e^{-s (i + 1)} q_i @ state`, and the last state.

    Positions in the same block contribute by a masked product, earlier ones through the state. One state per block
    is kept.

    Args:
      query: `[*batch, K, G, T, R]`.
      key: `[*batch, K, T, R]`.
      value: `[*batch, K, T, V]`.
      slopes: `[K]`, s.
      state: `[*batch, K, R, V]`.
      block_size: positions per block.

    Returns:
      `[*batch, K, G, T, V]` and `[*batch, K, R, V]`.
    """
    length = query.shape[-2]
    size = max(min(block_size, length), 1)
    position = jnp.arange(size) + 1
    causal = position[:, None] >= position
    slope = slopes[:, None, None]

    def body(state, block):
        q, k, v, present = block
        p = jnp.minimum(position, present)  # padding does not age the state
        distance = jnp.where(causal, p[:, None] - p, 0)
        scores = jnp.einsum("...kgtr,...ksr->...kgts", q, k)
        scores = scores * jnp.where(causal, jnp.exp(-slope * distance), 0)[:, None]
        out = jnp.einsum("...kgts,...ksv->...kgtv", scores, v)
        q = q * jnp.exp(-slope * p[:, None])[:, None]
        out = out + jnp.einsum("...kgtr,...krv->...kgtv", q, state)
        k = k * jnp.exp(-slope * (present - p)[:, None])
        return jnp.exp(-slope * present) * state + jnp.einsum("...ksr,...ksv->...krv", k, v), out

    blocks = -(-length // size)
    present = jnp.minimum(length - jnp.arange(blocks) * size, size)
    xs = (*(to_blocks(x, -2, size) for x in (query, key, value)), present)
    state, out = lax.scan(checkpoint(body, prevent_cse=False), state, xs)
    return from_blocks(out, -2, length), state


def positive_features(x: Array) -> Array:
    """`elu(x) + 1`: `exp(x)` below 0, `1 + x` above."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def _linear(query, key, value, key_where, is_causal, feature_map, rotate, block_size):
    """The sums that a query reads: `sum_j phi(q).phi(k_j) v_j`, S, `sum_j v_j`, N; `[*batch, K, G, T, Hv or 1]`."""
    block_size = _checks.integer("block_size", block_size, at_least=1)
    for name, function in (("feature_map", feature_map), ("rotate", rotate)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function of features, got {_checks.describe(function)}")
    q, key, value, where = prepare(query, key, value, key_where, is_causal, self_only=True)
    query, dtype = q, query.dtype
    heads = key.shape[-2]
    keep = where[..., None, None]
    query, key = feature_map(query), jnp.where(keep, feature_map(key), 0)

    def by_head(x):
        return jnp.moveaxis(x, -2, -3)

    def seen(x):  # [*batch, K, S, ...] -> sums over the keys that each query sees, with an axis for G
        x = jnp.cumsum(x, axis=-2) if is_causal else jnp.sum(x, axis=-2, keepdims=True)
        return x[..., None, :, :]

    mass = jnp.sum(by_key_head(query, heads) * seen(by_head(key)), axis=-1, keepdims=True)
    count = seen(by_head(keep.astype(value.dtype)))
    if rotate is not None:
        query, key = rotate(query), jnp.where(keep, rotate(key), 0)
    q, k, v = by_key_head(query, heads), by_head(key), by_head(value)
    state = jnp.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), v.dtype)
    if is_causal:
        sums, _ = decayed_sums(q, k, v, jnp.zeros((heads,), v.dtype), state, block_size)
    else:
        sums = jnp.einsum("...kgtr,...krv->...kgtv", q, jnp.einsum("...ksr,...ksv->...krv", k, v))
    return sums, mass, seen(v), count, dtype


def linear_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    *,
    key_where: Bool[Array, "*batch S"] | None = None,
    is_causal: bool = False,
    feature_map: Callable[[Array], Array] = positive_features,
    block_size: int = 256,
) -> Float[Array, "*batch T N Hv"]:
    """Linear attention, weights `phi(q_i) . phi(k_j) / S_i`: time and memory linear in the length.

    An attention of its own, not an approximation of softmax attention; its formula is evaluated exactly. The
    weights do not change when `phi(q)` is scaled; in `magnitude_aware_linear_attention` they do.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K.
      value: `[*batch, S, K, Hv]`.
      key_where: `[*batch, S]`, True = counts. A masked key is absent, even if it or its value is NaN.
      is_causal: whether query i sees the keys up to i only; then S = T.
      feature_map: phi, applied to `[..., H]`; `elu(x) + 1` by default. Non-negative, so that S does not vanish.
      block_size: positions per block where causal; the result does not depend on it.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider; 0 for a query that sees no key.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention".

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsoft
      >>> q = jnp.array([[0.5, -1.0], [2.0, 1.0]])[:, None]
      >>> k = jnp.array([[1.0, 0.5], [-0.5, 0.3], [0.2, -2.0]])[:, None]
      >>> v = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])[:, None]
      >>> print(np.asarray(jaxsoft.attention.linear_attention(q, k, v))[0, 0].round(3))
      [1.068 0.749]
    """
    sums, mass, _, _, dtype = _linear(query, key, value, key_where, is_causal, feature_map, None, block_size)
    return from_key_head(safe_divide(sums, mass)).astype(dtype)


def magnitude_aware_linear_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    *,
    form: str = "released",
    key_where: Bool[Array, "*batch S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    feature_map: Callable[[Array], Array] = positive_features,
    rotate: Callable[[Array], Array] | None = None,
    block_size: int = 256,
) -> Float[Array, "*batch T N Hv"]:
    """Magnitude-aware linear attention (MALA), weights `(1 + 1/z_i) c_i phi(q_i) . phi(k_j) - z_i / N`.

    `z_i = c_i S_i`. Rows sum to 1, individual weights may be negative, and the spread of the weights grows with
    the size of `phi(q)`, as that of softmax does. Linear in the length; an attention of its own, whose formula is
    evaluated exactly.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K.
      value: `[*batch, S, K, Hv]`.
      form: `"released"`, as the authors' code, `c = scale / N` and `1 / (z + 1e-6)`; or `"paper"`, `c = 1`
        (reconstructed).
      key_where: `[*batch, S]`, True = counts. A masked key is absent, even if it or its value is NaN.
      is_causal: whether query i sees the keys up to i only; then S = T, and N counts those keys.
      scale: the scale of the released form, `1 / sqrt(H)` by default.
      feature_map: phi, applied to `[..., H]`; `elu(x) + 1` by default. Non-negative.
      rotate: a rotary embedding, a function of `[*batch, length, heads, H]` that keeps the shape and treats each
        position alone. It is applied to phi(query) and phi(key) after z is computed, as in the released code;
        rows then no longer sum to exactly 1.
      block_size: positions per block where causal; the result does not depend on it.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider; 0 for a query that sees no key.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape, out of range, or an unknown option.

    Reference:
      Fan et al., "Rectifying Magnitude Neglect in Linear Attention".

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsoft
      >>> q = jnp.array([[0.5, -1.0], [2.0, 1.0]])[:, None]
      >>> k = jnp.array([[1.0, 0.5], [-0.5, 0.3], [0.2, -2.0]])[:, None]
      >>> v = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])[:, None]
      >>> attend = jaxsoft.attention.magnitude_aware_linear_attention
      >>> print(np.asarray(attend(q, k, v, form="paper"))[:, 0].round(3))
      [[ 1.53  -0.953]
       [ 0.419 -4.426]]
    """
    _checks.option("form", form, ("released", "paper"))
    if form == "paper" and scale is not None:
        raise ValueError(f"scale must be None for form='paper', which has no scale, got {scale!r}")
    sums, mass, values, count, dtype = _linear(
        query, key, value, key_where, is_causal, feature_map, rotate, block_size
    )
    if form == "paper":
        c, epsilon = jnp.ones_like(count), 0.0
    else:
        c, epsilon = safe_divide(jnp.asarray(scale_of(scale, query.shape[-1]), count.dtype), count), 1e-6
    z = c * mass
    out = (c + safe_divide(c, z + epsilon)) * sums - z * safe_divide(values, count)
    return from_key_head(out).astype(dtype)


def lightning_slopes(num_heads: int, *, layer: int = 0, num_layers: int | None = None) -> Float[Array, " N"]:
    """The decay rates of `lightning_attention`: `2^(-8 h / N)` for heads h = 1 to N, smaller in later layers.

    The factor of layer l of L is `1 - l / (L - 1 + 1e-5) + 1e-5`: from about 1 down to about 1e-5.

    Args:
      num_heads: N.
      layer: l, from 0 on.
      num_layers: L; needed for a layer above 0.

    Returns:
      `[N]` float32.

    Raises:
      TypeError: an argument that is not a static integer.
      ValueError: an argument out of range.

    Reference:
      MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention".

    Example:
      >>> import jaxsoft
      >>> print(jaxsoft.attention.lightning_slopes(4).round(4))
      [0.25   0.0625 0.0156 0.0039]
    """
    n = _checks.integer("num_heads", num_heads, at_least=1)
    layers = _checks.integer("num_layers", 1 if num_layers is None else num_layers, at_least=1)
    index = _checks.integer("layer", layer, at_least=0, at_most=layers - 1)
    factor = 1 - index / (layers - 1 + 1e-5) + 1e-5
    return jnp.asarray([factor * 2 ** (-8 * (h + 1) / n) for h in range(n)], jnp.float32)


@overload
def lightning_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    slopes: Array,
    where: Array | None = None,
    initial_state: Array | None = None,
    return_state: Literal[False] = False,
    block_size: int = 256,
) -> Float[Array, "*batch T N Hv"]: ...


@overload
def lightning_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    slopes: Array,
    where: Array | None = None,
    initial_state: Array | None = None,
    return_state: Literal[True],
    block_size: int = 256,
) -> tuple[Float[Array, "*batch T N Hv"], Float[Array, "*batch N H Hv"]]: ...


def lightning_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch T N H"],
    value: Float[Array, "*batch T N Hv"],
    *,
    slopes: Float[Array, " N"],
    where: Bool[Array, "*batch T"] | None = None,
    initial_state: Float[Array, "*batch N H Hv"] | None = None,
    return_state: bool = False,
    block_size: int = 256,
) -> Any:
    """Lightning attention: `o_t = sum_{u <= t} e^{-s (t - u)} (q_t . k_u) v_u`.

    Causal, without scale or normalizer. Time and memory are linear in the length; one more token costs
    `H * Hv` per head, however many came before. The formula is evaluated exactly. In the MiniMax models SiLU is
    applied before it (to all three), RMSNorm over the heads and a gate after it.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, T, N, H]`, as many heads and positions as the query.
      value: `[*batch, T, N, Hv]`.
      slopes: `[N]`, the decay rates s, 0 or more: `lightning_slopes`.
      where: `[*batch, T]` tokens, True = counts. A masked token adds nothing and its output is 0, but it
        takes one step of decay, as in the released models.
      initial_state: `[*batch, N, H, Hv]`, the state that an earlier call returned.
      return_state: whether to return the state after the last position, too.
      block_size: positions per block; the result does not depend on it.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider; with `return_state` the pair of
      this and the state `[*batch, N, H, Hv]`, float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention".

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> q = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[:, None]
      >>> k = jnp.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])[:, None]
      >>> v = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])[:, None]
      >>> slopes = jnp.array([0.5])
      >>> attend = jaxsoft.attention.lightning_attention
      >>> print(attend(q, k, v, slopes=slopes)[:, 0].round(6))
      [[1.       0.      ]
       [0.606531 1.      ]
       [2.735759 1.606531]]
      >>> _, state = attend(q[:2], k[:2], v[:2], slopes=slopes, return_state=True)
      >>> print(attend(q[2:], k[2:], v[2:], slopes=slopes, initial_state=state)[:, 0].round(6))
      [[2.735759 1.606531]]
    """
    block_size = _checks.integer("block_size", block_size, at_least=1)
    _checks.flag("return_state", return_state)
    q, key, value, where = prepare(query, key, value, where, mask_name="where")
    query, dtype = q, query.dtype
    _checks.shape("key", key, query.shape, "[*batch, T, N, H], as the query")
    *batch, _, n, h = query.shape
    _checks.floating("slopes", slopes)
    _checks.shape("slopes", slopes, (n,), "one number per head")
    shape = (*batch, n, h, value.shape[-1])
    if initial_state is None:
        state = jnp.zeros(shape, value.dtype)
    else:
        _checks.floating("initial_state", initial_state)
        _checks.shape("initial_state", initial_state, shape, "[*batch, N, H, Hv]")
        state = initial_state.astype(jnp.promote_types(value.dtype, initial_state.dtype))
    query = jnp.where(where[..., None, None], query, 0)
    q, k, v = (jnp.moveaxis(x, -2, -3).astype(state.dtype) for x in (query, key, value))
    out, state = decayed_sums(q[..., None, :, :], k, v, slopes.astype(state.dtype), state, block_size)
    out = jnp.moveaxis(out[..., 0, :, :], -3, -2).astype(dtype)
    return (out, state) if return_state else out
