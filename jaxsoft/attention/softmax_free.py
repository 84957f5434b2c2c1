"""Attention with a Gaussian kernel instead of softmax.

The kernel is `k(a, b) = exp(-scale ||a - b||^2 / 2)`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype, safe_divide
from jaxsoft.attention._layout import mask_of, prepare, scale_of, streamed


def newton_pseudo_inverse(
    matrix: Float[Array, "*batch M M"],
    *,
    iterations: int = 20,
    ridge: float = 0.0,
    positive_definite: bool = False,
) -> Float[Array, "*batch M M"]:
    """The inverse of `P = matrix + ridge I` by Newton's iteration `X <- 2 X - X P X`: matrix products only.

    Starts at `P^T / (||P||_1 ||P||_inf)`, from where it always converges (to the pseudo-inverse, if P is
    singular); about `2 log2(cond P) + 5` iterations reach the accuracy of the dtype. The derivative is that of
    the inverse, `dX = -X dP X`, not of the iteration: correct if P is regular and the iteration has converged.

    Args:
      matrix: `[*batch, M, M]`.
      iterations: the number of iterations, a static integer of 1 or more.
      ridge: added to the diagonal, 0 or more.
      positive_definite: whether the matrix is known to be symmetric and positive definite. The iteration then
        starts at `I / ||P||_inf`, from where half as many steps suffice.

    Returns:
      `[*batch, M, M]` in the dtype of the matrix, computed in float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: a matrix that is not square, or an argument out of range.

    Reference:
      Lu et al., "Softmax-free Linear Transformers". (The start in its code, `1.8 / ||P||_1^2`, may be too far away.)

    Example:
      >>> import jax.numpy as jnp, jaxsoft
      >>> print(jaxsoft.attention.newton_pseudo_inverse(jnp.array([[2.0, 1.0], [1.0, 3.0]])).round(3))
      [[ 0.6 -0.2]
       [-0.2  0.4]]
    """
    iterations = _checks.integer("iterations", iterations, at_least=1)
    _checks.number("ridge", ridge, at_least=0)
    _checks.flag("positive_definite", positive_definite)
    _checks.floating("matrix", matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must have shape [*batch, M, M], got shape {tuple(matrix.shape)}")
    p = matrix.astype(accumulation_dtype(matrix.dtype))
    p = p + ridge * jnp.eye(p.shape[-1], dtype=p.dtype)
    return _inverse(iterations, positive_definite, p).astype(matrix.dtype)


_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _inverse(iterations: int, positive_definite: bool, p: Array) -> Array:
    rows = jnp.max(jnp.sum(jnp.abs(p), axis=-1), axis=-1)[..., None, None]
    columns = jnp.max(jnp.sum(jnp.abs(p), axis=-2), axis=-1)[..., None, None]
    if positive_definite:
        x = safe_divide(jnp.broadcast_to(jnp.eye(p.shape[-1], dtype=p.dtype), p.shape), rows)
    else:
        x = safe_divide(jnp.swapaxes(p, -1, -2), rows * columns)
    return lax.fori_loop(0, iterations, lambda _, x: 2 * x - _product(x, _product(p, x)), x)


@_inverse.defjvp
def _inverse_jvp(iterations, positive_definite, primals, tangents):
    x = _inverse(iterations, positive_definite, *primals)
    return x, -_product(x, _product(tangents[0], x))


def _half_squared_distance(a: Array, b: Array) -> Array:
    """`||a_i - b_j||^2 / 2`, `[*batch, N, I, J]` for `[*batch, I, N, H]` and `[*batch, J, N, H]`."""

    def norms(x):
        return jnp.moveaxis(jnp.sum(x * x, axis=-1), -1, -2) / 2

    product = jnp.einsum("...inh,...jnh->...nij", a, b, precision=lax.Precision.HIGHEST)
    return jnp.maximum(norms(a)[..., :, None] + norms(b)[..., None, :] - product, 0)


def softmax_free_attention(
    query: Float[Array, "*batch T N H"],
    value: Float[Array, "*batch T N Hv"],
    *,
    landmarks: Float[Array, "*batch M N H"] | None = None,
    num_landmarks: int = 49,
    where: Bool[Array, "*batch T"] | None = None,
    symmetric: bool = False,
    ridge: float = 0.01,
    iterations: int = 20,
    scale: float | None = None,
) -> Float[Array, "*batch T N Hv"]:
    """Softmax-free attention (SOFT): `k(Q, L) pinv(k(L, L)) k(L, Q) V`, the Gaussian kernel through M landmarks.

    The queries are the keys, too. Linear in the length: `M` kernel values per token and head. The Nystrom
    approximation of `gaussian_kernel_attention(query, query, value)`, exact (with ridge 0) where the landmarks hold
    all distinct tokens; rows are not normalized. Not causal.

    Args:
      query: `[*batch, T, N, H]`, queries and keys in one.
      value: `[*batch, T, N, Hv]`.
      landmarks: `[*batch, M, N, H]`; by default the means of `num_landmarks` runs of tokens of (nearly) equal
        length (the authors' convolution and norm before that are left to the caller).
      num_landmarks: M if no landmarks are given; at most T are used. The default is the authors' 7 x 7.
      where: `[*batch, T]` tokens, True = counts. A masked token is absent, even if it or its value is NaN; its
        output is 0.
      symmetric: whether the inverse is normalized on both sides (SOFT++): `D^-1/2 pinv D^-1/2`, D the row sums
        of `k(L, L)`.
      ridge: added to the diagonal of `k(L, L)` before it is inverted; the authors' value.
      iterations: of `newton_pseudo_inverse`. `log2((M + ridge) / ridge) + 5` of them always suffice.
      scale: the factor of the squared distances, `1 / sqrt(H)` by default.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape or out of range.

    Reference:
      Lu et al., "Softmax-free Linear Transformers".

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsoft
      >>> q = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5]])[:, None]
      >>> v = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]])[:, None]
      >>> landmarks = jnp.array([[0.5, 0.5], [-0.5, 0.25]])[:, None]
      >>> out = jaxsoft.attention.softmax_free_attention(q, v, landmarks=landmarks)
      >>> print(np.asarray(out)[0, 0].round(3))
      [1.939 1.16 ]
    """
    _checks.flag("symmetric", symmetric)
    tokens, _, v, keep = prepare(query, query, value, where, mask_name="where")
    tokens = jnp.where(keep[..., None, None], tokens, 0)
    *batch, length, heads, width = tokens.shape
    if landmarks is None:
        count = min(_checks.integer("num_landmarks", num_landmarks, at_least=1), length)
        run = jnp.arange(length) * count // length == jnp.arange(count)[:, None]
        members = (run & keep[..., None, :]).astype(tokens.dtype)
        size = jnp.sum(members, axis=-1)
        points = safe_divide(jnp.einsum("...mt,...tnh->...mnh", members, tokens), size[..., None, None])
        present = size > 0
    else:
        _checks.floating("landmarks", landmarks)
        expected = (*batch, *landmarks.shape[-3:-2], heads, width)
        _checks.shape("landmarks", landmarks, expected, "[*batch, M, N, H], as the query")
        points, present = landmarks.astype(tokens.dtype), mask_of("", None, landmarks.shape[:-2])
    scale = scale_of(scale, width)
    near = jnp.exp(-scale * _half_squared_distance(tokens, points))  # [*batch, N, T, M]
    near = jnp.where(keep[..., None, :, None] & present[..., None, None, :], near, 0)
    # A landmark without tokens acts as a point far away from all others.
    both = (present[..., :, None] & present[..., None, :])[..., None, :, :]
    eye = jnp.eye(points.shape[-3], dtype=tokens.dtype)
    kernel = jnp.where(both, jnp.exp(-scale * _half_squared_distance(points, points)), eye)
    inverse = newton_pseudo_inverse(kernel, iterations=iterations, ridge=ridge, positive_definite=True)
    if symmetric:
        d = lax.rsqrt(jnp.sum(kernel, axis=-1))
        inverse = d[..., :, None] * inverse * d[..., None, :]
    read = jnp.einsum("...ntm,...tnv->...nmv", near, v)
    return jnp.einsum("...ntm,...nmv->...tnv", near, _product(inverse, read)).astype(query.dtype)


def gaussian_kernel_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    *,
    normalize: bool = False,
    key_where: Bool[Array, "*batch S"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "*batch T N Hv"]:
    """Attention with the Gaussian kernel, `sum_j exp(-scale ||q_i - k_j||^2 / 2) v_j`.

    Computed as softmax attention with scores `scale (q . k - ||k||^2 / 2)`, times `exp(logsumexp - scale
    ||q||^2 / 2)` where not normalized: exact, streamed, memory linear in the length, time as for softmax
    attention. The paper replaces the softmax kernel by a Gaussian one; scale and normalization are
    reconstructed. Without `normalize` the relative error grows with `scale ||q||^2` units in the last place, by
    cancellation.

    Args:
      query: `[*batch, T, N, H]`.
      key: `[*batch, S, K, H]`, N a multiple of K.
      value: `[*batch, S, K, Hv]`.
      normalize: whether to divide by the sum of the weights.
      key_where: `[*batch, S]`, True = counts. A masked key is absent, even if it or its value is NaN.
      is_causal: whether query i sees the keys up to i only.
      scale: the factor of the squared distances, `1 / sqrt(H)` by default.

    Returns:
      `[*batch, T, N, Hv]` in the query's dtype, computed in float32 or wider; 0 for a query that sees no key.

    Raises:
      TypeError: an argument of a wrong type or dtype.
      ValueError: an argument of a wrong shape.

    Reference:
      Song et al., "Unraveling the Gradient Descent Dynamics of Transformers".

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxsoft
      >>> q = jnp.array([[1.0, 0.0], [0.5, -1.0]])[:, None]
      >>> k = jnp.array([[1.0, 1.0], [0.0, 0.5], [-1.0, 0.0]])[:, None]
      >>> v = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[:, None]
      >>> print(np.asarray(jaxsoft.attention.gaussian_kernel_attention(q, k, v))[:, 0].round(3))
      [[0.945 0.886]
       [0.539 0.73 ]]
    """
    _checks.flag("normalize", normalize)
    q, k, v, _ = prepare(query, key, value, key_where, is_causal)
    scale = scale_of(scale, q.shape[-1])

    def energy(x):
        return scale * jnp.sum(x * x, axis=-1) / 2

    out, logsumexp = streamed(q, k, v, key_where, key_bias=-energy(k), is_causal=is_causal, scale=scale)
    if not normalize:
        out = out * jnp.exp(logsumexp - energy(q))[..., None]
    return out.astype(query.dtype)
