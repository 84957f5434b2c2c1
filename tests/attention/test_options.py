"""Options of `dot_product_attention` together, against the plain formula: by row, over the keys that a query sees.

In a covering design every two values of two options meet in a call. Of the masks: 182 pairs in 36 calls.
Of all options, with 28 normalizers: 1544 pairs in 73 calls.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from covering import count_pairs, pairs
from helpers import near
from plain_normalizers import FORMULAS, SOFT

import jaxsoft
from jaxsoft import normalizers
from jaxsoft.attention import dot_product_attention

B, T, S, N, H, W = 2, 6, 9, 4, 3, 2
RATE = 0.3
partial = functools.partial


# --- who sees what -----------------------------------------------------------------------------------------------


def _not_third(q, k):
    return (q + 2 * k) % 3 != 0


LENGTHS = {"query_seq_lengths": np.array([5, 6]), "key_value_seq_lengths": np.array([9, 7])}
OFFSETS = {"0": 0, "static": 3, "per batch element": np.array([4, -1])}
# Queries and keys that do not follow one another; lengths then count positions.
POSITIONS = {
    "query_positions": np.array([4, 0, 7, 2, 5, 3]),
    "key_positions": np.array([[3, 8, 0, 5, 1, 7, 2, 6, 4], [0, 2, 1, 6, 8, 7, 3, 4, 5]]),
}
WINDOWS = {"none": None, "both": (4, 3), "left": (5, None)}
HIDDEN_BY = ["nothing", "mask", "head mask", "key mask", "segments", "predicate"]


def places(case):
    """What lengths count of each query, its position, `[B, 1, T, 1]`, and the positions of the keys, `[B, 1, 1, S]`."""
    t, s = np.arange(T), np.arange(S)
    if case["offset"] == "positions":
        t, s = POSITIONS["query_positions"], POSITIONS["key_positions"]
    t, s = np.broadcast_to(t, (B, T)), np.broadcast_to(s, (B, S))
    moved = t if case["offset"] == "positions" else t + np.broadcast_to(OFFSETS[case["offset"]], B)[:, None]
    return t[:, None, :, None], moved[:, None, :, None], s[:, None, None]


def mask_options(case, rng):
    """The arguments of a case's masks, and which keys each query sees, `[B, N, T, S]`."""
    options = {name: lengths for name, lengths in LENGTHS.items() if case[name]}
    options |= {"is_causal": case["causal"], "local_window_size": WINDOWS[case["window"]]}
    if case["offset"] == "positions":
        options |= POSITIONS
    else:
        options["query_offset"] = OFFSETS[case["offset"]]
    keep = np.ones((B, N, T, S), bool)
    t, position, s = places(case)
    if case["query_seq_lengths"]:
        keep &= t < options["query_seq_lengths"][:, None, None, None]
    if case["key_value_seq_lengths"]:
        keep &= s < options["key_value_seq_lengths"][:, None, None, None]
    left, right = WINDOWS[case["window"]] or (None, None)
    if case["causal"]:
        keep &= s <= position
    if left is not None:
        keep &= s >= position - left
    if right is not None:
        keep &= s <= position + right
    shape = {"mask": (B, 1, T, S), "head mask": (N, T, S), "key mask": (B, 1, 1, S)}.get(case["hidden by"])
    if shape is not None:
        options["mask"] = rng.random(shape) < 0.75
        keep &= options["mask"]
    if case["hidden by"].startswith("segments"):
        segments = {"query_segment_ids": (B, T), "key_segment_ids": (B, S)}
        options |= {name: np.sort(rng.random(shape) < 0.4) * 1 for name, shape in segments.items()}
        keep &= (options["query_segment_ids"][:, :, None] == options["key_segment_ids"][:, None])[:, None]
    if case["hidden by"].endswith("predicate"):
        options["mask_fn"] = _not_third
        keep &= _not_third(position, s)
    return options, keep


def split(options):
    """The arrays among the options, which are arguments of a compiled program, and the others."""
    arrays = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in options.items() if name not in arrays}


def _ones(tile, state, params):
    return (tile.keep.astype(tile.x.dtype),)


def _count(state, params):
    return (params["count"],)


@normalizers.defined_by(
    lambda rows: normalizers.Normalizer(None, _ones, _count, params={"count": rows.count()})
)
def counted():
    """A normalizer whose weights are the number of keys that the query sees."""


MASKS = {
    "causal": [False, True],
    "window": list(WINDOWS),
    "key_value_seq_lengths": [False, True],
    "query_seq_lengths": [False, True],
    "offset": [*OFFSETS, "positions"],
    "blocks": [(4, 5), (None, None)],
}
# The number of keys is counted by other code if neither an array nor a predicate hides some.
MASK_CASES = pairs({"hidden by": ["nothing"], **MASKS}) + pairs({"hidden by": HIDDEN_BY, **MASKS})


def test_visible_keys_and_their_number(x64):
    """Keys may be NaN that lengths or a mask of keys hide from all queries."""

    def run(case):
        options, keep = mask_options(case, np.random.default_rng(0))
        arrays, static = split(options)
        absent = np.zeros((B, S), bool)
        if case["key_value_seq_lengths"]:
            absent |= places(case)[2][:, 0, 0] >= LENGTHS["key_value_seq_lengths"][:, None]
        if case["hidden by"] == "key mask":
            absent |= ~options["mask"][:, 0, 0]
        keys = np.where(absent, np.nan, 0.0)[..., None, None]

        def visible(arrays, keys):
            query, key = jnp.zeros((B, T, N, H)), jnp.broadcast_to(keys, (B, S, N, H))
            value = keys + jnp.eye(S)[:, None]
            return dot_product_attention(
                query,
                key,
                jnp.broadcast_to(value, (B, S, N, S)),
                normalizer=counted,
                block_sizes=case["blocks"],
                **static,
                **arrays,
            )

        expected = keep * keep.sum(-1, keepdims=True)
        return jax.jit(visible)(arrays, keys), np.moveaxis(expected, 1, 2)

    for case in MASK_CASES:
        got, expected = run(case)
        np.testing.assert_array_equal(got, expected, str(case))


# --- all options -------------------------------------------------------------------------------------------------

# Options of the normalizers: numbers, and (as tuples) shapes of arrays; (N,) is one number per head.
ONE, ROWS = (N,), (B, N, T)
NORMALIZERS = {
    "softmax": {},
    "softmax_one": {},
    "softmax_n": {"n": (B, N, 1)},
    "sink_softmax": {"sink": ONE},
    "scalable_softmax": {},
    "scalable_softmax, arrays": {"scale": ONE, "bias": ROWS},
    "adaptive_temperature_softmax": {},
    "entropy_target_softmax": {"entropy": 0.5},
    "self_adjust_softmax": {},
    "self_adjust_softmax, plain": {"normalized": False},
    "clipped_softmax": {"zeta": ONE, "gamma": -0.05},
    "quantized_softmax": {"bits": 4, "bias": ONE},
    "softpick": {},
    "stablemax": {},
    "taylor_softmax": {"order": 4},
    "sigmoid_weights": {},
    "sigmoid_weights, bias": {"bias": ROWS},
    "relu_weights": {"power": 2.0},
    "relu_weights, power 1": {},
    "softplus_attention_weights": {"scale": ONE, "eps": 0.1},
    "reweighted_attention_weights": {"scale": ONE, "power": 2.0},
    "reweighted_attention_weights, offset": {"scale": 1.5, "power": 3.0, "offset": ONE, "eps": 0.1},
    "mpc_softmax": {"eps": 0.01},
    "sparse_softmax": {"k": 3},
    "sparsemax": {},
    "entmax15": {},
    "entmax": {"alpha": ONE},
    "gumbel_softmax": {"temperature": ONE},
}
BASE = {"n": 1.0, "zeta": 1.05, "scale": 0.8, "bias": -0.5, "alpha": 1.2, "temperature": 0.7, "offset": 0.3}
TAKE_SINKS = [
    "softmax",
    "softmax_one",
    "softmax_n",
    "sink_softmax",
    "scalable_softmax",
    "adaptive_temperature_softmax",
    "reweighted_attention_weights",
    "sparse_softmax",
]
# Statistics describe the scores as the normalizer first changes them: not at all, by a factor, or by more.
STATISTICS = [
    "softmax",
    "scalable_softmax",
    "clipped_softmax",
    "softplus_attention_weights",
    "reweighted_attention_weights",
]
OPTIONS = {
    "normalizer": list(NORMALIZERS),
    "key heads": [2, 1],
    "hidden by": ["nothing", "mask"],
    "offset": ["0", "per batch element"],
    "bias": [None, (B, 1, T, S)],
    "scale": [None, "per head"],
    "dropout": ["none", "own"],
    "causal": [False, True],
    "window": ["none", "both"],
    "key_value_seq_lengths": [False, True],
    "query_seq_lengths": [False, True],
    "softcap": [None, 1.5],
    "alibi_slopes": [False, True],
    "sinks": [False, True],
    "statistics": [False, True],
    "query dtype": ["float64", "float32"],
    "blocks": [(4, 5), (None, None)],
}
ALL_VALUES = {
    "normalizer": ["scalable_softmax, arrays", "sigmoid_weights"],
    "key heads": [2, 1, 4],
    "hidden by": ["nothing", "mask", "segments, predicate"],
    "offset": list(OFFSETS),
    "bias": [None, (B, 1, T, S), (N, 1, S)],
    "scale": [None, "per head", "number"],
    "dropout": ["none", "own", "broadcast"],
}


def _forbidden(pair):
    normalizer = pair.get("normalizer")
    if normalizer is None:
        return False
    name = normalizer.split(",")[0]
    return bool(
        (pair.get("sinks") and name not in TAKE_SINKS) or (pair.get("statistics") and name not in STATISTICS)
    )


CASES = pairs(OPTIONS, _forbidden) + pairs(OPTIONS | ALL_VALUES, _forbidden)


def test_the_designs():
    for cases in (MASK_CASES, CASES):
        assert f"{count_pairs(cases)} pairs in {len(cases)} calls" in __doc__
    streams = {name for name in normalizers.__all__ if hasattr(getattr(normalizers, name), "define")}
    assert streams == {name.split(",")[0] for name in NORMALIZERS}
    given = {"normalizer", "dropout_rate", "dropout_key", "broadcast_dropout"}
    for case in CASES:
        floats, masks, *_ = make(case)
        given |= {*floats, *masks}
    # The others change the result at most by rounding; the residual is one of the statistics.
    given |= {"softcap", "block_sizes", "precision", "implementation", "return_statistics", "return_residual"}
    given |= {"axis_name", *POSITIONS}  # tests/attention/test_several_devices.py
    assert given == set(inspect.signature(dot_product_attention).parameters)


KEY = jax.random.key(5)


@functools.cache
def noise():
    """The noise of `gumbel_softmax` for each score, up to a constant per row."""
    with float64():
        weights = jax.jit(partial(jaxsoft.gumbel_softmax, key=KEY))(jnp.zeros((B, N, T, S)))
    return np.log(np.asarray(weights))


@functools.cache
def kept(broadcast):
    """Which weights dropout keeps, `[B, N, T, S]`."""
    zeros, eye = jnp.zeros((B, T, N, H)), jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, N, S))
    run = partial(dot_product_attention, dropout_rate=RATE, dropout_key=KEY, broadcast_dropout=broadcast)
    return np.moveaxis(np.asarray(jax.jit(run)(zeros, jnp.zeros((B, S, N, H)), eye)) > 0, 2, 1)


def make(case):
    """The float arguments, the masks' arguments, what each query sees, and the normalizer's fixed options."""
    rng = np.random.default_rng(sum(map(ord, case["normalizer"])))
    masks, keep = mask_options(case, rng)
    heads = case["key heads"]
    query = rng.normal(size=(B, T, N, H)).astype(case["query dtype"])
    floats = {
        "query": query,
        "key": rng.normal(size=(B, S, heads, H)),
        "value": rng.normal(size=(B, S, heads, W)),
    }
    # What lengths hide may be NaN.
    if case["query_seq_lengths"]:
        floats["query"][np.arange(T) >= LENGTHS["query_seq_lengths"][:, None]] = np.nan
    if case["key_value_seq_lengths"]:
        for name in ("key", "value"):
            floats[name][np.arange(S) >= LENGTHS["key_value_seq_lengths"][:, None]] = np.nan
    if case["bias"] is not None:
        floats["bias"] = rng.normal(size=case["bias"])
    if case["scale"] == "per head":
        floats["scale"] = 0.4 + rng.random(N)
    for name in ("alibi_slopes", "sinks"):
        if case[name]:
            floats[name] = rng.random(N)
    options = dict(NORMALIZERS[case["normalizer"]])
    for name, value in options.items():
        if isinstance(value, tuple):
            options[name] = BASE.get(name, 0.0) + rng.random(value) * (0.3 if name == "zeta" else 1.0)
    return floats, masks, keep, *split(options)


def per_query(a):
    """Numbers per head, or that broadcast to `[B, N, T]`, as `[B, N, T]`."""
    return np.broadcast_to(a[:, None] if np.ndim(a) == 1 else a, (B, N, T))


def plain(case, formulas, keep, floats, arrays, constants):
    """The output `[B, T, N, W]` and the statistics `[B, T, N]` (log-sum-exp, maximum, entropy)."""
    name = case["normalizer"].split(",")[0]
    formula, groups = formulas[name], N // case["key heads"]
    scale = floats.get("scale", np.full(N, {None: H**-0.5, "number": 0.9}.get(case["scale"])))
    bias = np.broadcast_to(floats.get("bias", 0.0), (B, N, T, S))
    slopes = floats.get("alibi_slopes", np.zeros(N))
    offset = np.broadcast_to(OFFSETS[case["offset"]], B)
    arrays = {name: per_query(a) for name, a in arrays.items()}
    out, statistics = np.zeros((B, T, N, W)), np.zeros((3, B, T, N))
    statistics[:2] = -np.inf
    for b, n, t in np.ndindex(B, N, T):
        (s,) = np.nonzero(keep[b, n, t])
        if not len(s):
            continue
        x = scale[n] * (floats["key"][b, s, n // groups] @ floats["query"][b, t, n].astype(np.float64))
        x = x if case["softcap"] is None else case["softcap"] * np.tanh(x / case["softcap"])
        x = x + bias[b, n, t, s] + slopes[n] * (s - (t + offset[b]))
        options = {name: a[b, n, t] for name, a in arrays.items()} | constants
        if case["sinks"]:
            options["mass"] = np.exp(floats["sinks"][n])
        if name == "gumbel_softmax":
            options["noise"] = noise()[b, n, t, s]
        y, z = formula(x, **options)
        if case["dropout"] != "none":
            y = np.where(kept(case["dropout"] == "broadcast")[b, n, t, s], y / (1 - RATE), 0)
        out[b, t, n] = y @ floats["value"][b, s, n // groups]
        z = z[np.isfinite(z)]
        if len(z):
            lse = np.log(np.sum(np.exp(z - z.max()))) + z.max()
            statistics[:, b, t, n] = lse, z.max(), lse - np.exp(z - lse) @ z
    return [out, *statistics] if case["statistics"] else [out]


@pytest.mark.table
@pytest.mark.parametrize("i", range(len(CASES)))
def test_options_together(i, x64):
    """Values, and derivatives along a random direction of each float argument (by differences of the formula)."""
    case = CASES[i]
    floats, masks, keep, arrays, constants = make(case)
    masks, static = split(masks)
    normalizer = partial(getattr(normalizers, case["normalizer"].split(",")[0]), **constants)
    if case["normalizer"] == "gumbel_softmax":
        normalizer = partial(normalizer, key=KEY)
    if case["scale"] == "number":
        static["scale"] = 0.9
    if case["dropout"] != "none":
        static |= {
            "dropout_rate": RATE,
            "dropout_key": KEY,
            "broadcast_dropout": case["dropout"] == "broadcast",
        }

    def run(floats, arrays, masks):
        return dot_product_attention(
            **floats,
            **masks,
            **static,
            normalizer=partial(normalizer, **arrays),
            softcap=case["softcap"],
            block_sizes=case["blocks"],
            return_statistics=case["statistics"],
        )

    rng = np.random.default_rng(1)
    expected = plain(case, FORMULAS, keep, floats, arrays, constants)
    cotangents = [rng.normal(size=a.shape) * np.isfinite(a) for a in expected]

    def total(results):
        return sum(np.sum(c * np.where(c == 0, 0, a)) for c, a in zip(cotangents, results))

    @jax.jit
    def value_and_gradient(floats, arrays, masks):
        def contracted(floats, arrays):
            results = jax.tree.leaves(run(floats, arrays, masks))
            return sum(jnp.sum(c * jnp.where(c == 0, 0, a)) for c, a in zip(cotangents, results)), results

        return jax.grad(contracted, (0, 1), has_aux=True)(floats, arrays)

    gradients, results = value_and_gradient(floats, arrays, masks)
    tolerance = 1e-6 if case["query dtype"] == "float32" else 1e-9
    for a, b in zip(results, expected, strict=True):
        near(a, b, tolerance)

    for which, name in [(0, name) for name in floats] + [(1, name) for name in arrays]:
        a, formulas = (floats, arrays)[which][name], FORMULAS if name == "value" else SOFT
        direction = rng.normal(size=a.shape)
        ends = []
        for step in (1e-6, -1e-6):
            changed = [dict(floats), dict(arrays)]
            changed[which][name] = a + step * direction
            ends.append(total(plain(case, formulas, keep, *changed, constants)))
        gradient = np.asarray(gradients[which][name], np.float64)
        assert not np.any(gradient[np.isnan(a)]), name
        near(np.sum(gradient * direction), (ends[0] - ends[1]) / 2e-6, 3e-6)
