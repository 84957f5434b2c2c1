"""Plain formulas of the normalizers in numpy, for the scores `x` of one row that count: absent ones are cut away.

Each returns the weights and the scores as the normalizer first changes them. `mass` is added to the denominator of the
exponential ones. Options are numbers.
"""

import math

import numpy as np


def _share(e, mass=0.0):
    total = np.sum(e) + mass
    return e / total if total else 0 * e


def _probabilities(z, mass=0.0):
    return _share(np.exp(z), mass), z


def _entropy(z):
    p, _ = _probabilities(z - z.max())
    return -np.sum(p * np.log(np.where(p > 0, p, 1)))


def _root(falling, low, high):
    """Where a falling function is 0, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def softmax_n(x, mass=0.0, n=1.0):
    return _probabilities(x, mass + n)


def sink_softmax(x, mass=0.0, *, sink):
    return _probabilities(x, mass + np.exp(sink))


def scalable_softmax(x, mass=0.0, scale=0.43, bias=0.0):
    return _probabilities((scale * np.log(len(x)) + bias) * x, mass)


_ADAPTIVE = (-0.037, 0.481, -2.3, 4.917, -1.791)


def adaptive_temperature_softmax(x, mass=0.0, coefficients=_ADAPTIVE, threshold=0.5):
    h = _entropy(x)
    beta = np.polyval(coefficients, h)
    return _probabilities(beta * x if h > threshold and beta > 1 else x, mass)


def entropy_target_softmax(x, *, entropy):
    shifted = x - x.max()
    log_beta = _root(lambda a: _entropy(np.exp(a) * shifted) - entropy, -8.0, 8.0)
    return _probabilities(np.exp(log_beta) * shifted)


def self_adjust_softmax(x, mass=0.0, normalized=True):
    a, b = (min(0, x.min()), max(0, x.max())) if normalized else (0.0, 1.0)
    return (x - a) / (b - a) * _probabilities(x, mass)[0], x


def clipped_softmax(x, zeta=1.1, gamma=-0.1):
    return np.clip((zeta - gamma) * _probabilities(x)[0] + gamma, 0, 1), x


def quantized_softmax(x, bits=8, bias=0.0):
    levels = 2**bits - 1
    return np.round(levels * _probabilities(x)[0]) / levels + bias, x


def unquantized_softmax(x, bits=8, bias=0.0):
    """The function whose gradient `quantized_softmax` has."""
    return _probabilities(x)[0] + bias, x


def softpick(x, eps=1e-8):
    unit = np.exp(max(0, x.max()))
    return np.maximum(np.expm1(x), 0) / (np.sum(np.abs(np.expm1(x))) + eps * unit), x


def stablemax(x):
    return _share(np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))), x


def taylor_softmax(x, order=2):
    return _share(sum(x**i / math.factorial(i) for i in range(order + 1))), x


def sigmoid_weights(x, bias=None):
    bias = -np.log(len(x)) if bias is None else bias
    return 1 / (1 + np.exp(-(x + bias))), x


def relu_weights(x, power=1.0):
    return np.maximum(x, 0) ** power / len(x), x


def softplus_attention_weights(x, *, scale, eps=1e-8):
    z = scale * np.log(len(x)) * x
    a = np.logaddexp(0, z)
    return a / (np.sum(a) + eps), z


def reweighted_attention_weights(x, mass=0.0, *, scale, power=15.0, offset=None, eps=1e-8):
    n = len(x)
    offset = (0.0 if n <= 3 else 1.0) if offset is None else offset
    excess = np.maximum(n * softplus_attention_weights(x, scale=scale, eps=eps)[0] - offset, 0)
    with np.errstate(divide="ignore"):
        return _share(excess**power, mass), power * np.log(excess)


def mpc_softmax(x, eps=1e-6):
    z = x - x.max() - eps
    return _share(np.where(z >= -14, (1 + z / 32) ** 32, 0)), x


def sparse_softmax(x, mass=0.0, k=10):
    best = np.argsort(-x, kind="stable")[:k]
    return _probabilities(np.where(np.isin(np.arange(len(x)), best), x, -np.inf), mass)


def entmax(x, alpha=1.5):
    if alpha == 1:
        return _probabilities(x)
    u = (alpha - 1) * (x - x.max())
    power = lambda tau: np.maximum(u - tau, 0) ** (1 / (alpha - 1))
    return power(_root(lambda tau: np.sum(power(tau)) - 1, -1.0, 0.0)), x


def gumbel_softmax(x, *, noise, temperature=1.0):
    """`noise` is that of these entries, up to a constant."""
    return _probabilities((x + noise) / temperature)


FORMULAS = {
    "softmax": _probabilities,
    "softmax_one": softmax_n,
    "sparsemax": lambda x: entmax(x, alpha=2.0),
    "entmax15": entmax,
    **{
        f.__name__: f
        for f in (
            softmax_n,
            sink_softmax,
            scalable_softmax,
            adaptive_temperature_softmax,
            entropy_target_softmax,
            self_adjust_softmax,
            clipped_softmax,
            quantized_softmax,
            softpick,
            stablemax,
            taylor_softmax,
            sigmoid_weights,
            relu_weights,
            softplus_attention_weights,
            reweighted_attention_weights,
            mpc_softmax,
            sparse_softmax,
            entmax,
            gumbel_softmax,
        )
    },
}
"""The formula of each public normalizer, by its name."""
SOFT = FORMULAS | {"quantized_softmax": unquantized_softmax}
"""The functions whose derivatives they have."""
