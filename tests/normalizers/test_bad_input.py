"""Wrong arguments of the normalizers: an error that names the argument, what came and what was expected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fails

import jaxsoft
from jaxsoft import normalizers
from jaxsoft.normalizers import exponential, rectified, sparse, stochastic

pytestmark = pytest.mark.whole  # the cases are normalizers

N, C = 4, 6
X = np.linspace(-1, 1, N * C, dtype=np.float32).reshape(N, C)
LOGITS = jaxsoft.linear_logits(np.ones((N, 3), np.float32), np.ones((3, C), np.float32))
MASK = np.ones((N, C), bool)
ROWS = np.ones(N, np.float32)
KEY = jax.random.key(0)

partial = functools.partial
EVERY = {  # with what they need besides the scores
    jaxsoft.softmax: {},
    jaxsoft.log_softmax: {},
    jaxsoft.softmax_n: {},
    jaxsoft.softmax_one: {},
    jaxsoft.sink_softmax: dict(sink=0.5),
    normalizers.masked_logit_softmax: dict(mask=MASK),
    jaxsoft.scalable_softmax: {},
    jaxsoft.adaptive_temperature_softmax: {},
    normalizers.entropy_target_softmax: dict(entropy=0.8),
    jaxsoft.self_adjust_softmax: {},
    jaxsoft.clipped_softmax: {},
    normalizers.quantized_softmax: {},
    jaxsoft.softpick: {},
    jaxsoft.stablemax: {},
    jaxsoft.taylor_softmax: {},
    jaxsoft.sigmoid_weights: {},
    jaxsoft.relu_weights: {},
    jaxsoft.softplus_attention_weights: dict(scale=0.9),
    jaxsoft.reweighted_attention_weights: dict(scale=0.9),
    normalizers.mpc_softmax: {},
    jaxsoft.sparse_softmax: dict(k=2),
    jaxsoft.sparsemax: {},
    jaxsoft.entmax15: {},
    jaxsoft.entmax: {},
    jaxsoft.gumbel_softmax: dict(key=KEY),
}
every = pytest.mark.parametrize("normalizer", EVERY, ids=lambda f: f.__name__)


def test_every_normalizer_is_here():
    families = {module.__name__ for module in (exponential, rectified, sparse, stochastic)}
    named = {getattr(normalizers, name) for name in normalizers.__all__}
    assert {f for f in named if getattr(f, "__module__", "") in families} == set(EVERY)


@every
def test_scores_and_axis(normalizer):
    f = partial(normalizer, **EVERY[normalizer])
    fails([normalizer.__name__, "linear_logits", "logits.dense()"], TypeError, lambda: f(LOGITS))
    fails(["int64", "floating"], TypeError, lambda: f(np.ones((N, C), int)))
    fails(["complex64", "floating"], TypeError, lambda: f(X.astype(np.complex64)))
    fails(["floating", "3.0 of type float"], TypeError, lambda: f(3.0))
    fails(["floating", "of type list"], TypeError, lambda: f([1.0, 2.0]))
    fails(["floating", "None"], TypeError, lambda: f(None))
    fails(["axis", "[-2, 2)", "(4, 6)", "got 2"], ValueError, lambda: f(X, axis=2))
    fails(["axis", "[-2, 2)", "got -3"], ValueError, lambda: f(X, axis=-3))
    fails(["axis", "integer", "'last'"], TypeError, lambda: f(X, axis="last"))
    fails(["axis", "integer", "None"], TypeError, lambda: f(X, axis=None))
    fails(["axis", "integer", "(0, 1)"], TypeError, lambda: f(X, axis=(0, 1)))
    if "mask" not in EVERY[normalizer]:
        fails(["at least one axis", "scalar"], ValueError, lambda: f(np.float32(1)))


@every
def test_masks(normalizer):
    f = partial(normalizer, X, **EVERY[normalizer])
    fails(["where", "boolean", "float32"], TypeError, lambda: f(where=X))
    fails(["where", "boolean", "int"], TypeError, lambda: f(where=MASK.astype(int)))
    fails(["where", "boolean", "of type list"], TypeError, lambda: f(where=[True] * C))
    fails(["where", "broadcast", "(4, 6)", "(4,)"], ValueError, lambda: f(where=MASK[:, 0]))
    fails(["where", "broadcast", "(4, 6)", "(2, 4, 6)"], ValueError, lambda: f(where=np.stack([MASK] * 2)))


@every
def test_options_are_keywords(normalizer):
    positional = {"masked_logit_softmax": 2, "gumbel_softmax": 2}.get(normalizer.__name__, 1)
    with pytest.raises(TypeError, match="positional"):
        normalizer(X, *[MASK] * (positional - 1), -1)


PER_ROW = [
    (jaxsoft.softmax_n, "n"),
    (jaxsoft.sink_softmax, "sink"),
    (jaxsoft.scalable_softmax, "scale"),
    (jaxsoft.scalable_softmax, "bias"),
    (normalizers.entropy_target_softmax, "entropy"),
    (jaxsoft.clipped_softmax, "zeta"),
    (jaxsoft.clipped_softmax, "gamma"),
    (normalizers.quantized_softmax, "bias"),
    (jaxsoft.sigmoid_weights, "bias"),
    (jaxsoft.softplus_attention_weights, "scale"),
    (jaxsoft.reweighted_attention_weights, "scale"),
    (jaxsoft.reweighted_attention_weights, "offset"),
    (jaxsoft.reweighted_attention_weights, "power"),
    (jaxsoft.entmax, "alpha"),
    (jaxsoft.gumbel_softmax, "temperature"),
]


@pytest.mark.parametrize(("normalizer", "name"), PER_ROW, ids=lambda v: getattr(v, "__name__", v))
def test_options_of_rows(normalizer, name):
    options = {k: v for k, v in EVERY[normalizer].items() if k != name}
    f = lambda value: normalizer(X, **options, **{name: value})
    fails([name, "broadcast", "(4,)", "(6,)", "row"], ValueError, lambda: f(np.ones(C, np.float32)))
    fails([name, "broadcast", "(4,)", "(4, 6)"], ValueError, lambda: f(X))
    fails([name, "broadcast", "(4,)", "(4, 1)"], ValueError, lambda: f(ROWS[:, None]))
    fails([name, "floating", "int32"], TypeError, lambda: f(np.ones(N, np.int32)))
    fails([name, "floating", "bool"], TypeError, lambda: f(MASK[:, 0]))
    fails([name, "floating", "True of type bool"], TypeError, lambda: f(True))
    fails([name, "floating", "of type list"], TypeError, lambda: f([1.0] * N))
    fails([name, "floating", "'1'"], TypeError, lambda: f("1"))
    if name not in ("bias", "offset") or normalizer in (
        jaxsoft.scalable_softmax,
        normalizers.quantized_softmax,
    ):
        fails([name, "floating", "None"], TypeError, lambda: f(None))
    # valid: one number, one number per row, and a traced number
    for value in (1.5, np.float32(1.5), 1.5 * ROWS, 1.5 * ROWS[:1]):
        assert f(value).shape == X.shape
    assert jax.jit(f)(1.5).shape == X.shape


OPTIONS = [
    (jaxsoft.softmax_n, dict(n=-1.0), ValueError, ["n", ">= 0", "-1.0"]),
    (jaxsoft.softmax_n, dict(n=float("nan")), ValueError, ["n", ">= 0", "nan"]),
    (normalizers.entropy_target_softmax, dict(entropy=0.0), ValueError, ["entropy", "> 0", "0.0"]),
    (normalizers.entropy_target_softmax, dict(entropy=-1.0), ValueError, ["entropy", "> 0", "-1.0"]),
    (
        jaxsoft.adaptive_temperature_softmax,
        dict(threshold="low"),
        TypeError,
        ["threshold", "number", "'low'"],
    ),
    (normalizers.quantized_softmax, dict(bits=0), ValueError, ["bits", ">= 1 and <= 16", "got 0"]),
    (normalizers.quantized_softmax, dict(bits=17), ValueError, ["bits", ">= 1 and <= 16", "got 17"]),
    (normalizers.quantized_softmax, dict(bits=4.0), TypeError, ["bits", "static integer", "4.0"]),
    (jaxsoft.softpick, dict(eps=-1e-8), ValueError, ["eps", ">= 0", "-1e-08"]),
    (jaxsoft.softpick, dict(eps=None), TypeError, ["eps", "number", "None"]),
    (jaxsoft.taylor_softmax, dict(order=3), ValueError, ["order", "even", "odd", "got 3"]),
    (jaxsoft.taylor_softmax, dict(order=0), ValueError, ["order", ">= 2", "got 0"]),
    (jaxsoft.taylor_softmax, dict(order=-2), ValueError, ["order", ">= 2", "got -2"]),
    (jaxsoft.taylor_softmax, dict(order=2.0), TypeError, ["order", "static integer", "2.0"]),
    (jaxsoft.relu_weights, dict(power=0.0), ValueError, ["power", "> 0", "0.0"]),
    (jaxsoft.relu_weights, dict(power=-2), ValueError, ["power", "> 0", "-2.0"]),
    (jaxsoft.softplus_attention_weights, dict(eps=-1.0), ValueError, ["eps", ">= 0", "-1.0"]),
    (jaxsoft.reweighted_attention_weights, dict(eps=-1.0), ValueError, ["eps", ">= 0", "-1.0"]),
    (normalizers.mpc_softmax, dict(eps=-1.0), ValueError, ["eps", ">= 0", "-1.0"]),
    (jaxsoft.sparse_softmax, dict(k=0), ValueError, ["k must be", ">= 1", "got 0"]),
    (jaxsoft.sparse_softmax, dict(k=-3), ValueError, ["k must be", ">= 1", "got -3"]),
    (jaxsoft.sparse_softmax, dict(k=2.0), TypeError, ["k must be", "static integer", "2.0"]),
    (jaxsoft.sparse_softmax, dict(k=True), TypeError, ["k must be", "static integer", "True"]),
    (jaxsoft.sparse_softmax, dict(k=7), ValueError, ["k must be", "length of a row", "6", "got 7"]),
    (jaxsoft.sparse_softmax, dict(k=5, axis=0), ValueError, ["k must be", "length of a row", "4", "got 5"]),
    (jaxsoft.entmax, dict(alpha=0.9), ValueError, ["alpha", ">= 1", "0.9"]),
    (jaxsoft.entmax, dict(alpha=-1), ValueError, ["alpha", ">= 1", "-1.0"]),
    (jaxsoft.entmax, dict(alpha=float("nan")), ValueError, ["alpha", ">= 1", "nan"]),
    (jaxsoft.gumbel_softmax, dict(temperature=-0.5), ValueError, ["temperature", "> 0", "-0.5"]),
    (jaxsoft.gumbel_softmax, dict(temperature=0.0), ValueError, ["temperature", "> 0", "0.0"]),
    (normalizers.masked_logit_softmax, dict(mask=X), TypeError, ["mask", "boolean", "float32"]),
    (normalizers.masked_logit_softmax, dict(mask=MASK[:, :5]), ValueError, ["mask", "(4, 6)", "(4, 5)"]),
]


@pytest.mark.parametrize(
    ("normalizer", "options", "kind", "words"), OPTIONS, ids=lambda v: getattr(v, "__name__", None)
)
def test_options(normalizer, options, kind, words):
    options = {**EVERY[normalizer], **options}
    fails(words, kind, lambda: normalizer(X, **options))
    # at trace time
    fails(words, kind, lambda: jax.eval_shape(lambda x: normalizer(x, **options), jnp.asarray(X)))


def test_what_must_be_given():
    for normalizer, name in (
        (jaxsoft.sink_softmax, "sink"),
        (normalizers.entropy_target_softmax, "entropy"),
        (normalizers.masked_logit_softmax, "mask"),
        (jaxsoft.softplus_attention_weights, "scale"),
        (jaxsoft.reweighted_attention_weights, "scale"),
        (jaxsoft.gumbel_softmax, "key"),
    ):
        with pytest.raises(TypeError, match=name):
            normalizer(X)


def test_bias_correction():
    f = normalizers.quantized_softmax_bias_correction
    fails(["probabilities", "floating", "int64"], TypeError, lambda: f(np.ones(3, int), 8))
    fails(["bits", ">= 1 and <= 16", "got 17"], ValueError, lambda: f(X, 17))
    fails(["bits", "static integer", "8.0"], TypeError, lambda: f(X, 8.0))
    fails(["where", "boolean", "float32"], TypeError, lambda: f(X, 8, X))
    fails(["where", "(4, 6)", "(4,)"], ValueError, lambda: f(X, 8, MASK[:, 0]))
