"""Pade activations and neurons.

A ratio of two learned polynomials, of the input (`pade_activation`), or of linear maps of the input's powers
(`pade_neuron`). The safe forms keep the denominator away from 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft import _checks
from jaxsoft._numerics import accumulation_dtype

_NUMERATOR = (3.35583603e-02, 5.05000375e-01, 1.65343934, 2.01001052, 9.31901999e-01, 1.52424124e-01)
_DENOMINATOR = (3.30847488e-06, 3.98021568, 5.12471206e-07, 3.01830109e-01)


def _absolute(x: jax.Array) -> jax.Array:
    """`|x|`, whose derivative at 0 is 0; that of `jnp.abs` is 1."""
    return x * jnp.sign(x)


def _polynomial(coefficients: jax.Array, x: jax.Array) -> jax.Array:
    """`c_0 + c_1 x + c_2 x^2 + ...`."""
    total = jnp.zeros_like(x)
    for c in reversed(list(coefficients)):
        total = total * x + c
    return total


def pade_leaky_relu(dtype: Any = jnp.float32) -> tuple[Float[Array, " 6"], Float[Array, " 4"]]:
    """Numerator and denominator of a `pade_activation` close to leaky ReLU, from which to train.

    Args:
      dtype: floating dtype of the coefficients.

    Returns:
      Six coefficients of the numerator and four of the denominator, for every form but "C".

    Raises:
      TypeError: a dtype that is not floating.

    Reference:
      Molina et al., "Pade Activation Units: End-to-end Learning of Flexible Activation Functions in Deep Networks".

    Example:
      >>> from jaxsoft.activations import pade_leaky_relu
      >>> numerator, denominator = pade_leaky_relu()
      >>> print(numerator.shape, denominator.shape)
      (6,) (4,)
    """
    dtype = _checks.floating_dtype("dtype", dtype)
    return jnp.array(_NUMERATOR, dtype), jnp.array(_DENOMINATOR, dtype)


def pade_activation(
    x: Float[Array, "*shape"],
    numerator: Float[Array, " m"],
    denominator: Float[Array, " n"],
    *,
    form: str = "A",
) -> Float[Array, "*shape"]:
    """Pade activation unit: a ratio of polynomials `P(x) / Q(x)` with learned coefficients.

    `P = a_0 + a_1 x + ... + a_m x^m`, and Q by the form:

    | form | Q | |
    | --- | --- | --- |
    | "A" | `1 + |b_1 x| + ... + |b_n x^n|` | the paper's code |
    | "B" | `1 + |b_1 x + ... + b_n x^n|` | the paper's text |
    | "C" | `0.1 + |b_0 + b_1 x + ... + b_n x^n|` | |
    | "nonsafe" | `1 + b_1 x + ... + b_n x^n` | has poles |

    A layer shares its coefficients. The randomized form "D" of the authors' library is "B" with
    `numerator * jax.random.uniform(key, numerator.shape, minval=0.9, maxval=1.1)` in training.

    Args:
      x: any shape; in float32 and degree 5, absolute values up to 1e7.
      numerator: `a_0` to `a_m`.
      denominator: `b_1` to `b_n`, in form "C" `b_0` to `b_n`.
      form: "A", "B", "C" or "nonsafe".

    Returns:
      An array like x, computed in float32 at least.

    Raises:
      TypeError: arrays that are not floating.
      ValueError: coefficients that are not vectors, an unknown form.

    Reference:
      Molina et al., "Pade Activation Units: End-to-end Learning of Flexible Activation Functions in Deep Networks".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.activations import pade_activation, pade_leaky_relu
      >>> print(pade_activation(jnp.array([-2.0, 0.0, 2.0]), *pade_leaky_relu()).round(4))
      [-0.0188  0.0336  2.0012]
    """
    for name, value in (("x", x), ("numerator", numerator), ("denominator", denominator)):
        _checks.floating(name, value)
        if name != "x" and (value.ndim != 1 or not value.size):
            raise ValueError(f"{name} must be a vector of coefficients, got shape {tuple(value.shape)}")
    _checks.option("form", form, ("A", "B", "C", "nonsafe"))
    dtype = accumulation_dtype(x.dtype, numerator.dtype, denominator.dtype)
    y, a, b = (jnp.asarray(v).astype(dtype) for v in (x, numerator, denominator))
    if form == "A":
        below = 1 + _absolute(y) * _polynomial(_absolute(b), _absolute(y))
    elif form == "B":
        below = 1 + _absolute(y * _polynomial(b, y))
    elif form == "C":
        below = 0.1 + _absolute(_polynomial(b, y))
    else:
        below = 1 + y * _polynomial(b, y)
    return (_polynomial(a, y) / below).astype(x.dtype)


def pade_neuron_init(
    key: Array, inputs: int, outputs: int, *, degrees: tuple[int, int] = (2, 1), dtype: Any = jnp.float32
) -> tuple[Array, Array, Array]:
    """The parameters of a `pade_neuron` that begins as a linear one (with form "A").

    The first power's kernel is uniform with variance `1 / inputs` (Kaiming), the bias uniform in `+-1 / sqrt(inputs)`,
    everything else 0. With form "S" such a neuron begins as the mean of a linear one and its bias.

    Args:
      key: a PRNG key.
      inputs: number of inputs.
      outputs: number of outputs.
      degrees: those of numerator and denominator, not both 0.
      dtype: floating dtype of the parameters.

    Returns:
      Numerator `[degree, inputs, outputs]`, denominator `[degree, inputs, outputs]` and bias `[outputs]`.

    Raises:
      TypeError: sizes that are not static integers, a dtype that is not floating.
      ValueError: sizes below 1, degrees below 0 or both 0.

    Reference:
      "PAON: A New Neuron Model using Pade Approximants".

    Example:
      >>> import jax
      >>> from jaxsoft.activations import pade_neuron_init
      >>> print(*(p.shape for p in pade_neuron_init(jax.random.key(0), 3, 4, degrees=(2, 1))))
      (2, 3, 4) (1, 3, 4) (4,)
    """
    inputs = _checks.integer("inputs", inputs, at_least=1)
    outputs = _checks.integer("outputs", outputs, at_least=1)
    m, n = (_checks.integer("degrees", degree, at_least=0) for degree in degrees)
    if m + n == 0:
        raise ValueError("degrees must not both be 0")
    dtype = _checks.floating_dtype("dtype", dtype)
    keys = jax.random.split(key)
    bound = inputs**-0.5
    first = jax.random.uniform(
        keys[0], (min(m, 1), inputs, outputs), dtype, -(3**0.5) * bound, 3**0.5 * bound
    )
    numerator = jnp.concatenate([first, jnp.zeros((m - len(first), inputs, outputs), dtype)])
    bias = jax.random.uniform(keys[1], (outputs,), dtype, -bound, bound)
    return numerator, jnp.zeros((n, inputs, outputs), dtype), bias


def pade_neuron(
    x: Float[Array, "*shape inputs"],
    numerator: Float[Array, "m inputs outputs"],
    denominator: Float[Array, "n inputs outputs"],
    bias: Float[Array, " outputs"],
    *,
    form: str = "A",
) -> Float[Array, "*shape outputs"]:
    """Pade neuron: a ratio of polynomials whose powers of x go through linear maps.

    With `p_i = x^i @ numerator[i - 1]` and `q_j = x^j @ denominator[j - 1]` (powers of each input) and the sums
    `P_k = bias + p_1 + ... + p_k` and `Q_k = 1 + q_1 + ... + q_k`:

    * form "A" (absolute): `P_m / (1 + |q_1| + ... + |q_n|)`,
    * form "S" (smooth): `(Q_n P_m + Q_(n-1) P_(m-1)) / (Q_n^2 + Q_(n-1)^2)`; without a numerator (m = 0)
      `Q_n bias / (Q_n^2 + Q_(n-1)^2)`.

    Without a denominator (n = 0) both are the polynomial `P_m`. Form "S" divides by 0 where two sums are 0 at once.

    Args:
      x: inputs along the last axis.
      numerator: one kernel per power.
      denominator: one kernel per power.
      bias: one number per output.
      form: "A" or "S".

    Returns:
      The outputs, computed in float32 at least and returned in the dtype of x.

    Raises:
      TypeError: arrays that are not floating.
      ValueError: shapes that do not fit, an unknown form.

    Reference:
      "PAON: A New Neuron Model using Pade Approximants".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.activations import pade_neuron
      >>> numerator, denominator = jnp.array([[[0.3], [-0.2]]]), jnp.array([[[0.2], [0.1]]])
      >>> print(pade_neuron(jnp.array([1.0, -2.0]), numerator, denominator, jnp.array([0.5])))
      [1.2]
    """
    _checks.option("form", form, ("A", "S"))
    for name, value in (("x", x), ("numerator", numerator), ("denominator", denominator), ("bias", bias)):
        _checks.floating(name, value)
    if x.ndim < 1 or bias.ndim != 1:
        raise ValueError(
            f"x must have an axis and bias one, got shapes {tuple(x.shape)} and {tuple(bias.shape)}"
        )
    for name, value in (("numerator", numerator), ("denominator", denominator)):
        expected = (value.shape[0] if value.ndim else 0, x.shape[-1], bias.shape[0])
        _checks.shape(name, value, expected, "degree, inputs, outputs")
    dtype = accumulation_dtype(x.dtype)
    y, above, below, start = (jnp.asarray(v).astype(dtype) for v in (x, numerator, denominator, bias))
    p, q = _terms(y, above), _terms(y, below)
    top = start + sum(p)
    if not q:
        out = top + jnp.zeros_like(top)
    elif form == "A":
        out = top / (1 + sum(_absolute(term) for term in q))
    else:
        last, before = 1 + sum(q), 1 + sum(q[:-1])
        lower = before * (start + sum(p[:-1])) if p else 0
        out = (last * top + lower) / (last * last + before * before)
    return out.astype(x.dtype)


def _terms(x: jax.Array, kernels: jax.Array) -> list[jax.Array]:
    """`x^1 @ kernels[0]`, `x^2 @ kernels[1]`, ..."""
    terms, power = [], jnp.ones_like(x)
    for kernel in kernels:
        power = power * x
        terms.append(power @ kernel)
    return terms
