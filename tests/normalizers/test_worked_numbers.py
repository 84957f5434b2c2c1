"""The worked numbers of the normalizers, their limits, and the closed forms of their gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, softmax

import jaxsoft
from jaxsoft import normalizers

X = [1.0, 2.0, -1.0, 0.5]
U = [1.0, 1.2, 0.5, -0.3]
W = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.5]
VALUES = np.array([[1.0, 0], [0, 1], [1, 1], [2, -1]])
G = np.array([0.3, -1.0, 2.0, 0.7])  # a cotangent
KEY = jax.random.key(3)

partial = functools.partial


def name_of(value):
    if isinstance(value, partial):
        return name_of(value.func) + "-" + "-".join(f"{k}={v}" for k, v in value.keywords.items())
    return getattr(value, "__name__", None)


FIRST_TWO = np.array([True, True, False, False])
NUMBERS = [  # normalizer, row, weights, weights @ VALUES where they are given
    (jaxsoft.softmax, X, [0.224208, 0.609460, 0.030343, 0.135989], [0.526529, 0.503814]),
    (jaxsoft.softmax_one, X, [0.207124, 0.563021, 0.028031, 0.125627], [0.486409, 0.465425]),
    (partial(jaxsoft.softmax_n, n=1.0), X, [0.207124, 0.563021, 0.028031, 0.125627], [0.486409, 0.465425]),
    (jaxsoft.softmax_one, [-10.0, -12.0], [0.000045, 0.000006], None),
    (partial(jaxsoft.sink_softmax, sink=0.7), X, [0.192272, 0.522649, 0.026021, 0.116619], None),
    (partial(jaxsoft.sink_softmax, sink=0.0), X, [0.207124, 0.563021, 0.028031, 0.125627], None),
    (partial(normalizers.masked_logit_softmax, mask=FIRST_TWO), X, [0.268941, 0.731059, 0, 0], None),
    (
        partial(normalizers.masked_logit_softmax, mask=FIRST_TWO, masked_logit=-1.5),
        X,
        [0.257569, 0.700146, 0.021143, 0.021143],
        None,
    ),
    (jaxsoft.clipped_softmax, X, [0.169049, 0.631352, 0, 0.063187], None),
    (
        partial(jaxsoft.clipped_softmax, zeta=1.0, gamma=-0.03),
        X,
        [0.200934, 0.597744, 0.001254, 0.110069],
        None,
    ),
    (partial(jaxsoft.scalable_softmax, scale=1.0), X, [0.179775, 0.719101, 0.011236, 0.089888], None),
    (jaxsoft.scalable_softmax, X, [0.259010, 0.470114, 0.078622, 0.192254], None),
    (jaxsoft.adaptive_temperature_softmax, X, [0.190735, 0.694977, 0.014366, 0.099922], None),
    (
        jaxsoft.adaptive_temperature_softmax,
        W,
        [0.030442, 0.037509, 0.046215, 0.056943, 0.070161, 0.086447, 0.106513, 0.565770],
        None,
    ),
    (
        partial(normalizers.entropy_target_softmax, entropy=0.8),
        X,
        [0.176821, 0.725371, 0.010507, 0.087301],
        None,
    ),
    (jaxsoft.self_adjust_softmax, X, [0.149472, 0.609460, 0, 0.067994], [0.285461, 0.541466]),
    (
        partial(jaxsoft.self_adjust_softmax, normalized=False),
        X,
        [0.224208, 1.218920, -0.030343, 0.067994],
        None,
    ),
    (partial(normalizers.quantized_softmax, bits=4), X, [0.2, 0.6, 0, 0.133333], None),
    (
        partial(normalizers.quantized_softmax, bits=4, bias=1 / 60),
        X,
        [0.216667, 0.616667, 0.016667, 0.15],
        None,
    ),
    (jaxsoft.softpick, X, [0.183026, 0.680543, 0, 0.069100], [0.321226, 0.611443]),
    (jaxsoft.softpick, [-1.0, -2.0], [0, 0], None),
    (jaxsoft.softpick, [0.0, 0.0, 0.0], [0, 0, 0], None),
    (jaxsoft.stablemax, X, [0.285714, 0.428571, 0.071429, 0.214286], None),
    (jaxsoft.taylor_softmax, X, [0.259740, 0.519481, 0.051948, 0.168831], None),
    (jaxsoft.sigmoid_weights, X, [0.404610, 0.648786, 0.084224, 0.291875], [1.072584, 0.441134]),
    (
        partial(jaxsoft.sigmoid_weights, bias=-math.log(4)),
        X,
        [0.404610, 0.648786, 0.084224, 0.291875],
        [1.072584, 0.441134],
    ),
    (jaxsoft.relu_weights, X, [0.25, 0.5, 0, 0.125], None),
    (partial(jaxsoft.relu_weights, power=2.0), X, [0.25, 1.0, 0, 0.0625], None),
    (normalizers.mpc_softmax, X, [0.223480, 0.617253, 0.026448, 0.132819], None),
    (partial(jaxsoft.sparse_softmax, k=2), X, [0.268941, 0.731059, 0, 0], None),
    (partial(jaxsoft.sparse_softmax, k=3), X, [0.231224, 0.628532, 0, 0.140244], None),
    (jaxsoft.sparsemax, X, [0, 1, 0, 0], None),
    (jaxsoft.sparsemax, U, [0.4, 0.6, 0, 0], None),
    (partial(jaxsoft.entmax, alpha=2.0), U, [0.4, 0.6, 0, 0], None),
    (jaxsoft.entmax15, X, [0.162070, 0.814649, 0, 0.023280], None),
    (jaxsoft.entmax15, U, [0.369994, 0.501648, 0.128358, 0], None),
    (jaxsoft.entmax, U, [0.369994, 0.501648, 0.128358, 0], None),
    (partial(jaxsoft.entmax, alpha=1.25), X, [0.199831, 0.712040, 0.000808, 0.087320], None),
    (partial(jaxsoft.entmax, alpha=1.25), U, [0.346194, 0.445674, 0.169944, 0.038188], None),
    (partial(jaxsoft.entmax, alpha=1.75), X, [0.098193, 0.901807, 0, 0], None),
    (partial(jaxsoft.entmax, alpha=1.75), U, [0.388604, 0.554050, 0.057346, 0], None),
    (partial(jaxsoft.entmax, alpha=1.0), X, [0.224208, 0.609460, 0.030343, 0.135989], None),
]


@pytest.mark.parametrize(("normalizer", "row", "weights", "output"), NUMBERS, ids=name_of)
def test_values(normalizer, row, weights, output, x64):
    x = jnp.array([row, row[::-1]])
    y = normalizer(x[0])
    close(y, weights)
    assert y.shape == x[0].shape and y.dtype == x.dtype
    if output is not None:
        close(y @ VALUES, output)
    if "mask" not in getattr(normalizer, "keywords", {}):
        close(normalizer(x), [weights, weights[::-1]])  # rows by themselves, entries in any order
        close(normalizer(x.T, axis=0), np.transpose([weights, weights[::-1]]))
    # Entries that are zeros in the numbers are so exactly.
    assert not jnp.any(jnp.where(jnp.array(weights) == 0, y, 0))


def test_mass_on_the_sink(x64):
    close(1 - jnp.sum(jaxsoft.sink_softmax(jnp.array(X), sink=0.7)), 0.142439)


def test_the_denominator_of_softpick(x64):
    x = jnp.array(X)
    close(jnp.expm1(x[1]) / jaxsoft.softpick(x)[1], 9.388180, 1e-6)


def test_quantized_bias(x64):
    x = jnp.array(X)
    bias = normalizers.quantized_softmax_bias_correction(jaxsoft.softmax(x), 4)
    close(bias, 0.016667)
    close(jnp.sum(normalizers.quantized_softmax(x, bits=4, bias=bias)), 1, 1e-14)
    long = jnp.zeros(64).at[0].set(4.0)
    p = jaxsoft.softmax(long)
    close(p[:2], [0.464277, 0.008504])
    rounded = normalizers.quantized_softmax(long, bits=4)
    close(rounded[:2], [0.466667, 0])
    close(jnp.sum(rounded), 0.466667)
    bias = normalizers.quantized_softmax_bias_correction(p, 4)
    close(bias, 0.008333)
    close(jnp.sum(normalizers.quantized_softmax(long, bits=4, bias=bias)), 1, 1e-14)
    # a bias for each row, and a gradient that goes straight through the rounding
    both = normalizers.quantized_softmax(jnp.stack([long, long]), bits=4, bias=jnp.array([0.0, 0.1]))
    close(both[1] - both[0], np.full(64, 0.1), 1e-14)
    gradient = jax.vjp(partial(normalizers.quantized_softmax, bits=4), x)[1](jnp.array(G))[0]
    close(gradient, jax.vjp(jaxsoft.softmax, x)[1](jnp.array(G))[0], 1e-14)


def test_softplus_attention(x64):
    """The table of a causal attention: normalized queries and keys, row t of t entries."""
    q = np.array([[1.0, 0], [1, 1], [0, 1], [2, 1]])
    k = np.array([[1.0, 1], [1, 0], [-1, 1], [1, 2]])
    cosines = (q / np.linalg.norm(q, axis=-1, keepdims=True)) @ (
        k / np.linalg.norm(k, axis=-1, keepdims=True)
    ).T
    cosines, causal = jnp.asarray(cosines), jnp.tri(4, dtype=bool)
    y = jaxsoft.softplus_attention_weights(cosines, scale=math.log(2), where=causal)
    close(y[0], [1, 0, 0, 0], 1e-7)
    close(y[1], [0.522993, 0.477007, 0, 0])
    close(y[2], [0.371140, 0.257721, 0.371140, 0])
    close(y[3], [0.300033, 0.291169, 0.132728, 0.276070])
    y = jaxsoft.reweighted_attention_weights(cosines, scale=math.log(2), where=causal)
    close(y[0], [1, 0, 0, 0], 1e-7)
    close(y[2], [0.498950, 0.002100, 0.498950, 0])
    close(y[3], [0.949006, 0.050940, 0, 0.000054])
    assert y[3, 2] == 0
    y = jaxsoft.reweighted_attention_weights(cosines, scale=math.log(2), power=3.0, where=causal)
    close(y[3], [0.588717, 0.327994, 0, 0.083289])
    # an offset for each row: that of the default
    offset = jnp.array([0.0, 0.0, 0.0, 1.0])
    given = jaxsoft.reweighted_attention_weights(
        cosines, scale=math.log(2), power=3.0, offset=offset, where=causal
    )
    close(given, y, 1e-14)


def test_reweighted_attention_of_long_and_of_equal_rows():
    """(n A)^15 overflows float32 for n > 370; a row whose weights are all equal gets zeros."""
    x = jnp.zeros(4096).at[7].set(1.0)
    f = partial(jaxsoft.reweighted_attention_weights, scale=4.0)
    y, pullback = jax.vjp(f, x)
    close(y, jnp.zeros(4096).at[7].set(1.0), 1e-6)
    assert jnp.all(jnp.isfinite(pullback(jnp.arange(4096.0))[0]))
    y, pullback = jax.vjp(f, jnp.full(8, 0.5))
    close(y, np.zeros(8), 1e-6)
    assert jnp.all(jnp.isfinite(pullback(jnp.arange(8.0))[0]))


# --- adaptive temperature --------------------------------------------------------------------------------


def beta_of(x):
    """The inverse temperature that was used, from the weights."""
    y = jaxsoft.adaptive_temperature_softmax(x)
    i, j = jnp.argmax(x, -1), jnp.argmin(x, -1)
    return (jnp.log(y[i]) - jnp.log(y[j])) / (x[i] - x[j])


def polynomial(h):
    return -0.037 * h**4 + 0.481 * h**3 - 2.3 * h**2 + 4.917 * h - 1.791


def test_adaptive_temperature_of_the_examples(x64):
    for row, entropy, beta in ((X, 1.014403, 1.292994), (W, 1.963321, 2.087397)):
        row = jnp.array(row)
        close(jaxsoft.entropy(row), entropy)
        close(beta_of(row), beta)
        close(polynomial(jaxsoft.entropy(row)), beta)


@pytest.mark.parametrize("n", [2, 3, 5, 80, 381, 382, 1000, 100_000])
def test_adaptive_temperature_of_flat_rows(n, x64):
    """An almost uniform row: entropies above 5.9445 (more than 381 entries) are left alone."""
    x = jnp.linspace(0, 1e-3, n)
    beta = max(polynomial(math.log(n)), 1)
    assert (beta == 1) == (n in (2, 382, 1000, 100_000))
    close(beta_of(x), beta, 1e-4)
    close(jaxsoft.adaptive_temperature_softmax(jnp.zeros(n)), np.full(n, 1 / n), 1e-15)


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_adaptive_temperature_of_random_rows(n, x64):
    """Against the formula, for rows of every entropy; never more entropy than before."""
    x = jnp.asarray(np.random.default_rng(n).normal(size=(6, n))) * jnp.array([0.5, 1, 2, 3, 5, 9])[:, None]
    p = np.asarray(jax.nn.softmax(x))
    h = -np.sum(p * np.log(p + 1e-300), -1)
    beta = np.where(h > 0.5, np.maximum(polynomial(h), 1), 1)
    y = jaxsoft.adaptive_temperature_softmax(x)
    close(y, jax.nn.softmax(jnp.asarray(beta)[:, None] * x), 1e-12)
    assert np.all(jaxsoft.entropy(jnp.log(jnp.maximum(y, 1e-300))) <= h + 1e-12)


def test_adaptive_temperature_where_it_begins(x64):
    """P crosses 1 at entropies 0.848582 and 5.944521 and is largest, 2.421388, at 4.412402."""
    for h, value in ((0.848582, 1.0), (5.944521, 1.0), (4.412402, 2.421388)):
        close(polynomial(h), value, 1e-5)
    for entropy, sharper in ((0.84, False), (0.86, True)):
        x = jnp.log(normalizers.entropy_target_softmax(jnp.array(X), entropy=entropy))
        assert (float(beta_of(x)) > 1 + 1e-9) == sharper


def test_adaptive_temperature_derivative(x64):
    """dx = beta dz + [active] (dz . x) P'(H) dH/dx; the second term is what `stop_gradient` leaves out."""
    x, g = jnp.array(X), jnp.array(G)
    p = jax.nn.softmax(x)
    h = -jnp.sum(p * jnp.log(p))
    beta, slope = polynomial(h), jax.grad(polynomial)(h)
    y = jax.nn.softmax(beta * x)
    dz = y * (g - g @ y)
    through = jnp.sum(dz * x) * slope * -p * (jnp.log(p) + h)
    close(jax.vjp(jaxsoft.adaptive_temperature_softmax, x)[1](g)[0], beta * dz + through, 1e-13)
    stopped = partial(jaxsoft.adaptive_temperature_softmax, stop_gradient=True)
    close(jax.vjp(stopped, x)[1](g)[0], beta * dz, 1e-13)


# --- entropy target --------------------------------------------------------------------------------------


def test_entropy_target_is_met(x64):
    x = (
        jnp.asarray(np.random.default_rng(0).normal(size=(5, 50)))
        * jnp.array([1e-3, 1, 10, 1e3, 1e6])[:, None]
    )
    target = jnp.array([0.1, 1.0, 2.0, 3.0, 3.9])
    y = normalizers.entropy_target_softmax(x, entropy=target)
    safe = jnp.where(y > 0, y, 1)
    close(-jnp.sum(y * jnp.log(safe), -1), target, 1e-9)
    close(jnp.sum(y, -1), np.ones(5), 1e-12)
    # the temperature of the example: 0.708442
    x = jnp.array(X)
    y = normalizers.entropy_target_softmax(x, entropy=0.8)
    close((x[1] - x[0]) / jnp.log(y[1] / y[0]), 0.708442)
    close(y, jax.nn.softmax(x / 0.708442), 2e-6)


def test_entropy_target_derivative_in_the_target(x64):
    f = lambda h: jnp.array(G) @ normalizers.entropy_target_softmax(jnp.array(X), entropy=h)
    close(jax.grad(f)(0.8), (f(0.8 + 1e-5) - f(0.8 - 1e-5)) / 2e-5, 1e-8)


@pytest.mark.parametrize("row", [[1.0, 1.0, 0.0], [2.0], [1.0, 1.0, 1.0]], ids=str)
def test_entropy_target_out_of_reach(row, x64):
    """Ties at the top or too few entries: the closest there is, with finite gradients."""
    y, pullback = jax.vjp(partial(normalizers.entropy_target_softmax, entropy=0.2), jnp.array(row))
    expected = np.array(row) == max(row)
    close(y, expected / expected.sum(), 1e-6)
    assert jnp.all(jnp.isfinite(pullback(jnp.arange(1.0, 1 + len(row)))[0]))


# --- closed forms of the gradients -----------------------------------------------------------------------


def family(f, derivative):
    """G1: y = f(x) / sum f(x)."""

    def vjp(x, g):
        s = jnp.sum(f(x))
        y = f(x) / s
        return derivative(x) / s * (g - g @ y)

    return vjp


def sinked(sink):
    def vjp(x, g):
        y = jnp.exp(x) / (jnp.sum(jnp.exp(x)) + math.exp(sink))
        return y * (g - g @ y)

    return vjp


def softpick_vjp(x, g):
    d = jnp.sum(jnp.abs(jnp.exp(x) - 1)) + jnp.exp(jnp.max(x)) * 1e-8  # eps counts in units of the largest
    delta = g @ (jnp.maximum(jnp.exp(x) - 1, 0) / d)
    return jnp.exp(x) / d * ((x > 0) * g - jnp.sign(x) * delta)


def plain_self_adjust_vjp(x, g):
    p = jax.nn.softmax(x)
    return g * p + p * (g * x - g @ (x * p))


def self_adjust_vjp(x, g):
    p = jax.nn.softmax(x)
    a, b = min(float(x.min()), 0), max(float(x.max()), 0)
    w = (x - a) / (b - a)
    dx = p * (g * w - jnp.sum(g * w * p)) + g * p / (b - a)
    if x.min() < 0:
        dx = dx.at[x.argmin()].add(jnp.sum(g * p * (x - b)) / (b - a) ** 2)
    if x.max() > 0:
        dx = dx.at[x.argmax()].add(-jnp.sum(g * p * (x - a)) / (b - a) ** 2)
    return dx


def clipped_vjp(x, g):
    p = jax.nn.softmax(x)
    stretched = 1.2 * p - 0.1
    d = 1.2 * jnp.where((stretched > 0) & (stretched < 1), g, 0)
    return p * (d - d @ p)


def entmax_vjp(alpha):
    def vjp(x, g):
        y = jaxsoft.entmax(x, alpha=alpha)
        r = jnp.where(y > 0, jnp.where(y > 0, y, 1) ** (2 - alpha), 0)
        return r * (g - (r @ g) / jnp.sum(r))

    return vjp


def sparse_vjp(x, g):
    y = jnp.where(x >= jnp.sort(x)[-2], jnp.exp(x), 0)
    y = y / jnp.sum(y)
    return y * (g - g @ y)


def masked_vjp(x, g):
    y = jax.nn.softmax(jnp.where(FIRST_TWO, x, -1.5))
    return jnp.where(FIRST_TWO, y * (g - g @ y), 0)


def sigmoid_vjp(x, g):
    y = jax.nn.sigmoid(x - math.log(4))
    return y * (1 - y) * g


CLOSED = [
    (jaxsoft.softmax_one, sinked(0.0)),
    (partial(jaxsoft.softmax_n, n=2.5), sinked(math.log(2.5))),
    (partial(jaxsoft.sink_softmax, sink=0.7), sinked(0.7)),
    (jaxsoft.softpick, softpick_vjp),
    (jaxsoft.self_adjust_softmax, self_adjust_vjp),
    (partial(jaxsoft.self_adjust_softmax, normalized=False), plain_self_adjust_vjp),
    (jaxsoft.clipped_softmax, clipped_vjp),
    (
        jaxsoft.stablemax,
        family(
            lambda x: jnp.where(x < 0, 1 / (1 - x), 1 + x), lambda x: jnp.where(x < 0, 1 / (1 - x) ** 2, 1.0)
        ),
    ),
    (jaxsoft.taylor_softmax, family(lambda x: 1 + x + x**2 / 2, lambda x: 1 + x)),
    (
        partial(jaxsoft.taylor_softmax, order=4),
        family(lambda x: 1 + x + x**2 / 2 + x**3 / 6 + x**4 / 24, lambda x: 1 + x + x**2 / 2 + x**3 / 6),
    ),
    (
        partial(jaxsoft.softplus_attention_weights, scale=0.9, eps=0.0),
        family(
            lambda x: jax.nn.softplus(0.9 * math.log(4) * x),
            lambda x: 0.9 * math.log(4) * jax.nn.sigmoid(0.9 * math.log(4) * x),
        ),
    ),
    (jaxsoft.sigmoid_weights, sigmoid_vjp),
    (jaxsoft.relu_weights, lambda x, g: jnp.where(x > 0, g / 4, 0)),
    (partial(jaxsoft.relu_weights, power=3.0), lambda x, g: jnp.where(x > 0, 3 * x**2 * g / 4, 0)),
    (partial(normalizers.masked_logit_softmax, mask=FIRST_TWO, masked_logit=-1.5), masked_vjp),
    (partial(jaxsoft.sparse_softmax, k=2), sparse_vjp),
    (jaxsoft.sparsemax, entmax_vjp(2.0)),
    (jaxsoft.entmax15, entmax_vjp(1.5)),
    (partial(jaxsoft.entmax, alpha=1.25), entmax_vjp(1.25)),
    (partial(jaxsoft.entmax, alpha=1.75), entmax_vjp(1.75)),
]


@pytest.mark.parametrize(("normalizer", "formula"), CLOSED, ids=name_of)
@pytest.mark.parametrize("row", [X, U], ids=["x", "u"])
def test_gradients_in_closed_form(normalizer, formula, row, x64):
    x, g = jnp.array(row), jnp.array(G)
    y, pullback = jax.vjp(normalizer, x)
    close(pullback(g)[0], formula(x, g), 1e-12)
    # forward mode: a tangent against the same cotangent
    t = jnp.array([0.2, 0.5, -1.0, 0.4])
    close(g @ jax.jvp(normalizer, (x,), (t,))[1], formula(x, g) @ t, 1e-12)
    assert y.shape == x.shape


def test_gradients_of_parameters_in_closed_form(x64):
    x, g = jnp.array(X), jnp.array(G)
    total = jnp.sum(jnp.exp(x))
    c, s = 2.5, 0.7
    y = jaxsoft.softmax_n(x, n=c)
    close(jax.grad(lambda c: g @ jaxsoft.softmax_n(x, n=c))(c), -(g @ y) / (c + total), 1e-14)
    y = jaxsoft.sink_softmax(x, sink=s)
    mass = math.exp(s) / (math.exp(s) + total)
    close(jax.grad(lambda s: g @ jaxsoft.sink_softmax(x, sink=s))(s), -mass * (g @ y), 1e-14)
    for scale in (0.43, 1.7, -0.6, 0.0):
        y = jaxsoft.scalable_softmax(x, scale=scale)
        close(y, jax.nn.softmax(scale * math.log(4) * x), 1e-14)
        dz = y * (g - g @ y)
        f = lambda s, b: g @ jaxsoft.scalable_softmax(x, scale=s, bias=b)
        close(jax.grad(f, (0, 1))(scale, 0.0), [math.log(4) * dz @ x, dz @ x], 1e-13)
        dx = jax.vjp(partial(jaxsoft.scalable_softmax, scale=scale), x)[1](g)[0]
        close(dx, scale * math.log(4) * dz, 1e-13)
    close(
        jaxsoft.scalable_softmax(x, scale=0.5, bias=-2.0), jax.nn.softmax((0.5 * math.log(4) - 2) * x), 1e-14
    )


@pytest.mark.parametrize("row", [X, U], ids=["x", "u"])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.75, 2.5])
def test_alpha_gradient(alpha, row, x64):
    """By finite differences and in closed form."""
    x, g = jnp.array(row), jnp.array(G)
    f = lambda a: g @ jaxsoft.entmax(x, alpha=a)
    gradient = jax.grad(f)(alpha)
    close(gradient, (f(alpha + 1e-6) - f(alpha - 1e-6)) / 2e-6, 1e-7)
    y = jaxsoft.entmax(x, alpha=alpha)
    safe = jnp.where(y > 0, y, 1)
    r = jnp.where(y > 0, safe ** (2 - alpha), 0)
    h, r = y * jnp.log(safe), r / jnp.sum(r)
    close(gradient, g @ ((y - r) / (alpha - 1) ** 2 - (h - r * jnp.sum(h)) / (alpha - 1)), 1e-9)


def test_alpha_of_each_row(x64):
    x = jnp.array([X, X, U, U])
    alpha = jnp.array([1.25, 1.75, 1.5, 2.0])
    y = jaxsoft.entmax(x, alpha=alpha)
    for row, a, expected in zip(x, (1.25, 1.75, 1.5, 2.0), y):
        close(jaxsoft.entmax(row, alpha=a), expected, 1e-12)
    gradient = jax.grad(lambda a: jnp.sum(jaxsoft.entmax(x, alpha=a) * G))(alpha)
    for row, a, expected in zip(x[:3], (1.25, 1.75, 1.5), gradient[:3]):
        close(jax.grad(lambda a: G @ jaxsoft.entmax(row, alpha=a))(a), expected, 1e-9)


@pytest.mark.parametrize(
    "normalizer",
    [
        jaxsoft.sparsemax,
        jaxsoft.entmax15,
        partial(jaxsoft.entmax, alpha=1.25),
        partial(jaxsoft.entmax, alpha=2.5),
        partial(normalizers.entropy_target_softmax, entropy=0.8),
        partial(jaxsoft.scalable_softmax, scale=-0.6),
        jaxsoft.adaptive_temperature_softmax,
        jaxsoft.softpick,
        jaxsoft.self_adjust_softmax,
    ],
    ids=name_of,
)
def test_second_derivatives(normalizer, x64):
    """Against finite differences of the gradient."""
    f = lambda x: jnp.sum(jnp.array(G) * normalizer(x) ** 2)
    x = jnp.asarray(np.random.default_rng(2).normal(size=6))
    G6 = jnp.array([*G, -0.4, 1.1])
    f = jax.jit(lambda x: jnp.sum(G6 * normalizer(x) ** 2))
    gradient = jax.jit(jax.grad(f))
    step = 1e-6
    numeric = [(gradient(x + step * e) - gradient(x - step * e)) / (2 * step) for e in jnp.eye(6)]
    assert np.max(np.abs(numeric)) > 0.05
    close(jax.jit(jax.hessian(f))(x), numeric, 1e-7)


# --- limits and extremes ---------------------------------------------------------------------------------


LOW = [[-200.0, -100.0], [-95.0, -90.0], [-200.0, -200.0], [-96.0, -300.0], [-1e4, -2e4]]


@pytest.mark.parametrize("row", LOW, ids=str)
def test_low_rows(row):
    """Rows below -88, at which exp(-max x) overflows float32: 0, with finite gradients."""
    x = jnp.array(row, jnp.float32)
    for normalizer in (
        jaxsoft.softmax_one,
        partial(jaxsoft.softmax_n, n=3.0),
        partial(jaxsoft.sink_softmax, sink=0.7),
        jaxsoft.softpick,
    ):
        y, pullback = jax.vjp(normalizer, x)
        close(y, [0, 0], 1e-37)
        close(pullback(jnp.array([1.0, -2.0]))[0], [0, 0], 1e-37)
        close(jax.jvp(normalizer, (x,), (jnp.ones(2),))[1], [0, 0], 1e-37)
    # sinks as low as the row
    for sink in (row[0], row[1] - 1):
        f = lambda x, s: jaxsoft.sink_softmax(x, sink=s)
        y, pullback = jax.vjp(f, x, jnp.float32(sink))
        p = softmax(np.array([*row, sink], np.float64))
        close(y, p[:2], 1e-6)
        dx, ds = pullback(jnp.array([1.0, -2.0]))
        delta = p[0] - 2 * p[1]
        close(dx, p[:2] * (np.array([1, -2]) - delta), 1e-6)
        close(ds, -p[2] * delta, 1e-6)


def test_high_rows_of_sinks():
    x = jnp.array([300.0, 299.0, -300.0])
    for normalizer in (jaxsoft.softmax_one, partial(jaxsoft.sink_softmax, sink=-500.0), jaxsoft.softpick):
        y, pullback = jax.vjp(normalizer, x)
        close(y, [0.731059, 0.268941, 0])
        assert jnp.all(jnp.isfinite(pullback(jnp.array([1.0, 2.0, 3.0]))[0]))
    close(jaxsoft.sink_softmax(x, sink=1e4), np.zeros(3), 0)


def test_no_mass_for_nothing_is_softmax(x64):
    x = jnp.array(X)
    close(jaxsoft.softmax_n(x, n=0.0), jax.nn.softmax(x), 1e-15)
    close(jaxsoft.sink_softmax(x, sink=-jnp.inf), jax.nn.softmax(x), 1e-15)
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: jaxsoft.softmax_n(x, n=0.0) @ G)(x)))


INVARIANT = [
    jaxsoft.softmax,
    jaxsoft.log_softmax,
    jaxsoft.scalable_softmax,
    partial(jaxsoft.scalable_softmax, scale=-0.6),
    jaxsoft.adaptive_temperature_softmax,
    partial(normalizers.entropy_target_softmax, entropy=0.8),
    jaxsoft.clipped_softmax,
    normalizers.quantized_softmax,
    normalizers.mpc_softmax,
    partial(jaxsoft.sparse_softmax, k=2),
    jaxsoft.sparsemax,
    jaxsoft.entmax15,
    partial(jaxsoft.entmax, alpha=1.25),
]


@pytest.mark.parametrize("normalizer", INVARIANT, ids=name_of)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shifts(normalizer, shift):
    """In float32; the scores of the example plus 1e4 are exact."""
    x, g = jnp.array(X), jnp.array(G, jnp.float32)
    y, pullback = jax.vjp(normalizer, x)
    moved, moved_pullback = jax.vjp(normalizer, x + shift)
    close(moved, y, 5e-6)
    close(moved_pullback(g)[0], pullback(g)[0], 1e-5)


EVERY = [
    *INVARIANT,
    jaxsoft.softmax_one,
    partial(jaxsoft.softmax_n, n=3.0),
    partial(jaxsoft.sink_softmax, sink=0.7),
    jaxsoft.self_adjust_softmax,
    partial(jaxsoft.self_adjust_softmax, normalized=False),
    jaxsoft.softpick,
    jaxsoft.stablemax,
    jaxsoft.taylor_softmax,
    jaxsoft.sigmoid_weights,
    jaxsoft.relu_weights,
    partial(jaxsoft.softplus_attention_weights, scale=0.9),
    partial(jaxsoft.reweighted_attention_weights, scale=0.9),
    partial(jaxsoft.gumbel_softmax, key=KEY),
    partial(jaxsoft.gumbel_softmax, key=KEY, hard=True),
]


@pytest.mark.parametrize("normalizer", [f for f in EVERY if name_of(f) != "log_softmax"], ids=name_of)
def test_rows_of_one_entry(normalizer, x64):
    """Rows with a single unmasked entry give the same number."""
    if "k" in getattr(normalizer, "keywords", {}):
        normalizer = partial(normalizer.func, k=1)
    for x in (1.5, -0.7, 0.0, -300.0):
        y, pullback = jax.vjp(normalizer, jnp.array([x]))
        assert jnp.isfinite(pullback(jnp.array([2.0]))[0]).all()
        only = jnp.array([True, False, False])
        among = jax.vjp(partial(normalizer, where=only), jnp.array([x, np.nan, 3.0]))
        close(among[0], [y[0], 0, 0], 1e-15)
        close(among[1](jnp.array([2.0, 3.0, 5.0]))[0], [pullback(jnp.array([2.0]))[0][0], 0, 0], 1e-15)
        if normalizer in INVARIANT and normalizer is not jaxsoft.clipped_softmax:
            close(y, [1], 1e-12)
            close(pullback(jnp.array([2.0]))[0], [0], 1e-12)


def test_scalable_softmax_of_one_key():
    """log 1 = 0: weight 1 for any score and scale."""
    for scale in (0.43, 1.0, -3.0):
        close(jaxsoft.scalable_softmax(jnp.array([[7.0], [-300.0]]), scale=scale), [[1], [1]], 0)
    gradient = jax.grad(lambda s: jnp.sum(jaxsoft.scalable_softmax(jnp.array([7.0]), scale=s)))(0.43)
    assert gradient == 0


def test_scalable_softmax_counts_the_visible_keys(x64):
    """Row t of a causal attention has t + 1 keys."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 5)))
    y = jaxsoft.scalable_softmax(x, scale=1.0, where=jnp.tri(5, dtype=bool))
    for t in range(5):
        close(y[t, : t + 1], jax.nn.softmax(math.log(t + 1) * x[t, : t + 1]), 1e-14)


def test_ties_at_the_top(x64):
    """Of equal scores the earlier one is larger."""
    f = partial(jaxsoft.sparse_softmax, k=2)
    x = jnp.array([[1.0, 3.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 0.0, 5.0]])
    y, pullback = jax.vjp(f, x)
    p = 1 / (1 + math.exp(2))
    close(y, [[p, 1 - p, 0, 0], [0.5, 0.5, 0, 0], [0.006693, 0, 0, 0.993307]])
    gradient = pullback(jnp.asarray([G] * 3))[0]
    assert not jnp.any(jnp.where(y == 0, gradient, 0))
    np.testing.assert_array_equal(jnp.sum(y > 0, -1), [2, 2, 2])
    # the first of them masked: the next one takes its place
    where = jnp.array([False, True, True, True])
    np.testing.assert_array_equal(f(x[0], where=where) > 0, [False, True, True, False])


def test_fewer_entries_than_k(x64):
    where = jnp.array([True, False, True, False])
    close(
        jaxsoft.sparse_softmax(jnp.array(X), k=3, where=where),
        jaxsoft.softmax(jnp.array(X), where=where),
        1e-15,
    )


def test_ties_at_the_threshold(x64):
    """Entries exactly at the threshold have weight 0; equal entries equal weights; gradients are finite."""
    for normalizer, row, weights in (
        (jaxsoft.sparsemax, [1.0, 0.0, 0.0, -1.0], [1, 0, 0, 0]),
        (jaxsoft.sparsemax, [1.0, 1.0, 0.5, 0.0], [0.5, 0.5, 0, 0]),
        (jaxsoft.entmax15, [2.0, 0.0, 0.0, -1.0], [1, 0, 0, 0]),
        (partial(jaxsoft.entmax, alpha=1.25), [4.0, 0.0, 0.0, 0.0], [1, 0, 0, 0]),
        (jaxsoft.sparsemax, [3.0] * 4, [0.25] * 4),
        (jaxsoft.entmax15, [3.0] * 4, [0.25] * 4),
        (partial(jaxsoft.entmax, alpha=1.25), [3.0] * 4, [0.25] * 4),
    ):
        y, pullback = jax.vjp(normalizer, jnp.array(row))
        close(y, weights, 1e-12)
        gradient = pullback(jnp.array(G))[0]
        assert jnp.all(jnp.isfinite(gradient))
        close(jnp.sum(gradient), 0, 1e-12)


THRESHOLD = [
    jaxsoft.sparsemax,
    jaxsoft.entmax15,
    partial(jaxsoft.entmax, alpha=1.1),
    partial(jaxsoft.entmax, alpha=1.25),
    partial(jaxsoft.entmax, alpha=1.75),
    partial(jaxsoft.entmax, alpha=3.0),
]


@pytest.mark.parametrize("normalizer", THRESHOLD, ids=name_of)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_thresholds_of_long_rows(normalizer, scale):
    """65536 columns in float32: the weights sum to 1, and are those of float64."""
    x = np.random.default_rng(4).normal(size=(2, 65536)).astype(np.float32) * np.float32(scale)
    y = jax.jit(normalizer)(jnp.asarray(x))
    close(np.sum(np.asarray(y, np.float64), -1), [1, 1], 1e-6)
    assert jnp.all(y >= 0)
    with_float64 = exact_entmax(x.astype(np.float64), getattr(normalizer, "keywords", {}).get("alpha", None))
    if with_float64 is not None:
        close(y, with_float64, 2e-6)
    g = jnp.cos(jnp.arange(65536.0))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(normalizer(x) * g)))(jnp.asarray(x))
    assert jnp.all(jnp.isfinite(gradient))


def exact_entmax(x, alpha):
    """By bisection."""
    if alpha is None:
        return None
    z = (alpha - 1) * (x - x.max(-1, keepdims=True))
    lo, hi = -np.ones((len(x), 1)), np.zeros((len(x), 1))
    for _ in range(70):
        mid = (lo + hi) / 2
        above = np.sum(np.maximum(z - mid, 0) ** (1 / (alpha - 1)), -1, keepdims=True) >= 1
        lo, hi = np.where(above, mid, lo), np.where(above, hi, mid)
    return np.maximum(z - lo, 0) ** (1 / (alpha - 1))


@pytest.mark.parametrize("normalizer", THRESHOLD, ids=name_of)
def test_huge_scores(normalizer, x64):
    x = jnp.array([1e4, -1e4, 1e4 - 0.25, 0.0])
    y, pullback = jax.vjp(normalizer, x)
    small, small_pullback = jax.vjp(normalizer, jnp.array([0.25, -1e3, 0.0, -50.0]))
    close(y, small, 1e-10)
    close(pullback(jnp.array(G))[0], small_pullback(jnp.array(G))[0], 1e-10)
    assert y[1] == 0 and y[3] == 0


def test_entmax_between_softmax_and_sparsemax(x64):
    x = jnp.array([X, U])
    close(jaxsoft.entmax(x, alpha=1.0), jax.nn.softmax(x), 1e-15)
    close(jaxsoft.entmax(x, alpha=1.002), jax.nn.softmax(x), 1e-2)
    close(jaxsoft.entmax(x, alpha=2.0), jaxsoft.sparsemax(x), 1e-15)
    close(jaxsoft.entmax(x, alpha=jnp.array(2.0)), jaxsoft.sparsemax(x), 1e-14)
    close(jax.jit(lambda a: jaxsoft.entmax(x, alpha=a))(1.5), jaxsoft.entmax15(x), 1e-14)
    assert int(jnp.sum(jaxsoft.entmax(x, alpha=1.1) == 0)) <= int(jnp.sum(jaxsoft.sparsemax(x) == 0))


def test_softpick_between_signs(x64):
    """The derivative at 0 is 0; near 0 nothing cancels."""
    x = jnp.array([0.0, 1.0, -1.0])
    gradient = jax.vjp(jaxsoft.softpick, x)[1](jnp.array([3.0, 1.0, 2.0]))[0]
    assert gradient[0] == 0
    tiny = jnp.array([1e-9, 3e-9, -4e-9])
    close(jaxsoft.softpick(tiny, eps=0.0), [0.125, 0.375, 0], 1e-8)


def test_self_adjust_of_rows_of_one_sign(x64):
    """The smallest and the largest score include an entry of 0; a row of zeros gives zeros."""
    for row in ([1.0, 2.0, 0.5], [-1.0, -2.0, -0.5]):
        x = jnp.array(row)
        a, b = min(min(row), 0), max(max(row), 0)
        close(jaxsoft.self_adjust_softmax(x), (x - a) / (b - a) * jax.nn.softmax(x), 1e-15)
    y, pullback = jax.vjp(jaxsoft.self_adjust_softmax, jnp.zeros(3))
    close(y, np.zeros(3), 0)
    assert jnp.all(jnp.isfinite(pullback(jnp.arange(3.0))[0]))


def test_taylor_is_not_monotone_below_minus_one(x64):
    y = jaxsoft.taylor_softmax(jnp.array([-1.0, -2.0, -4.0]))
    close(y, np.array([0.5, 1.0, 5.0]) / 6.5, 1e-15)


def test_mpc_softmax_is_almost_softmax_and_cut_off(x64):
    x = jnp.array([0.0, -1.0, -13.9, -14.1])
    y = normalizers.mpc_softmax(x)
    close(y[:2], jax.nn.softmax(x)[:2], 0.01)
    assert y[2] > 0 and y[3] == 0


# --- Gumbel noise ----------------------------------------------------------------------------------------


def noise_of(x, key):
    """The noise of each entry, up to a constant per row."""
    return jnp.log(jaxsoft.gumbel_softmax(x, key)) - x


def test_gumbel_numbers(x64):
    """The noise of the example, in place of that of the key."""
    x = jnp.array(X)
    moved = x + jnp.array([0.2, -0.4, 1.1, 0.3]) - noise_of(x, KEY)
    close(jaxsoft.gumbel_softmax(moved, KEY, temperature=0.5), [0.264154, 0.587885, 0.029269, 0.118692])
    close(jaxsoft.gumbel_softmax(moved, KEY), [0.286122, 0.426843, 0.095242, 0.191793])
    close(jaxsoft.gumbel_softmax(moved, KEY, hard=True), [0, 1, 0, 0], 1e-15)


def test_gumbel_noise_depends_on_key_row_and_column_only(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 7)))
    y = jaxsoft.gumbel_softmax(x, KEY)
    np.testing.assert_array_equal(jaxsoft.gumbel_softmax(x, KEY), y)
    close(jax.jit(jaxsoft.gumbel_softmax)(x, KEY), y, 1e-14)
    close(jaxsoft.gumbel_softmax(x[:3], KEY), y[:3], 1e-15)
    close(jaxsoft.gumbel_softmax(x.at[1].add(5.0), KEY)[2:], y[2:], 1e-15)
    close(jaxsoft.gumbel_softmax(x.T, KEY, axis=0).T, y, 1e-15)
    noise = noise_of(x, KEY)
    assert float(jnp.std(noise[:, 1] - noise[:, 0])) > 0.3  # each row has its own
    close(
        noise_of(x[:, :4], KEY) - noise[:, :4],
        np.broadcast_to((noise_of(x[:, :4], KEY) - noise[:, :4])[:, :1], (6, 4)),
        1e-13,
    )
    assert float(jnp.max(jnp.abs(jaxsoft.gumbel_softmax(x, jax.random.key(4)) - y))) > 0.1
    old_style = jax.random.PRNGKey(3)
    close(jaxsoft.gumbel_softmax(x, old_style), y, 1e-15)


def test_gumbel_samples_are_softmax():
    """Frequencies of hard samples, and of the largest soft weight, over 40000 rows."""
    n = 40_000
    x = jnp.broadcast_to(jnp.array(X), (n, 4))
    p = np.asarray(jax.nn.softmax(jnp.array(X)))
    deviation = np.sqrt(p * (1 - p) / n)
    hard = jaxsoft.gumbel_softmax(x, KEY, hard=True)
    assert np.all(np.abs(np.mean(np.asarray(hard), 0) - p) < 4 * deviation)
    soft = jaxsoft.gumbel_softmax(x, KEY, temperature=0.3)
    np.testing.assert_array_equal(jnp.argmax(soft, -1), jnp.argmax(hard, -1))
    # neighbours in a row and rows beside each other are independent: the noise is uncorrelated
    u = np.asarray(noise_of(jnp.zeros((n, 4)), KEY), np.float64)
    u -= u[:, 3:]  # differences of two Gumbel variables: logistic, variance pi^2 / 3
    assert np.all(np.abs(np.mean(u[:, :3], 0)) < 4 * math.pi / math.sqrt(3 * n))
    np.testing.assert_allclose(np.var(u[:, :3], 0), math.pi**2 / 3, rtol=0.05)
    np.testing.assert_allclose(np.corrcoef(u[:, :3].T)[np.triu_indices(3, 1)], 0.5, atol=0.03)
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.025


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_gradients(temperature, x64):
    """Hard samples have the gradient of the soft ones, in the scores and in the temperature."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
    g = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)))
    where = jnp.ones((3, 5), bool).at[1, 2].set(False)

    def f(x, tau, hard=False):
        return jnp.vdot(jaxsoft.gumbel_softmax(x, KEY, temperature=tau, hard=hard, where=where), g)

    soft = jax.grad(f, (0, 1))(x, temperature)
    hard = jax.grad(partial(f, hard=True), (0, 1))(x, temperature)
    close(hard[0], soft[0], 1e-13)
    close(hard[1], soft[1], 1e-13)
    h = 1e-6
    close(soft[1], (f(x, temperature + h) - f(x, temperature - h)) / (2 * h), 1e-8)
    # softmax of the perturbed scores over the temperature: -(1 / tau^2) sum dz (x + noise)
    z = jnp.where(where, x + jnp.where(where, noise_of(x, KEY), 0), -jnp.inf)
    y = jax.nn.softmax(z / temperature)
    dz = y * (g - jnp.sum(g * y, -1, keepdims=True))
    close(soft[0], dz / temperature, 1e-12)
    close(soft[1], -jnp.sum(jnp.where(where, dz * z, 0)) / temperature**2, 1e-12)
    values = jaxsoft.gumbel_softmax(x, KEY, temperature=temperature, hard=True, where=where)
    close(jnp.sort(values, -1), np.tile([0.0, 0, 0, 0, 1], (3, 1)), 1e-15)
    assert values[1, 2] == 0
