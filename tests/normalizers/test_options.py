"""Options of normalizers and gates together, against the plain formula of each row's entries that count.

In the covering design of a function every two values of two options meet in a call.
Together: 573 pairs in 142 calls of 28 functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import count_pairs, pairs
from helpers import near
from plain_normalizers import FORMULAS, SOFT, softmax_n

import jaxsoft
from jaxsoft import normalizers

ROWS, V = (2, 3), 5
KEY = jax.random.key(5)


class Array(NamedTuple):
    """An option that is an array of numbers in `[least, least + width]`: one per row, or one per entry."""

    least: float = 0.0
    width: float = 1.0
    per_entry: bool = False


class Function(NamedTuple):
    """A function of rows of scores.

    Attributes:
      plain: the formula, `(entries that count, **options) -> weights`; options are the row's numbers.
      options: the values of each option, besides `axis` and `where`.
      soft: the formula whose derivative it has, if not `plain`.
      call: `(scores, **options)`, by default the function itself.
      noise: `(options, shape) -> [draws, *shape]`, in the layout of the scores; the formula gets it as an option.
    """

    plain: Callable
    options: dict[str, list] = {}  # noqa: RUF012
    soft: Callable | None = None
    call: Callable | None = None
    noise: Callable | None = None


def _softmax(x):
    return softmax_n(x, n=0.0)[0]


def _best(x, k):
    return np.isin(np.arange(len(x)), np.argsort(-x, kind="stable")[:k])


def _top_k_gate(x, *, k, renormalize, noise_kind, noise_logits, noise=None):
    if noise_kind == "logits":
        x = x + np.log1p(np.exp(noise_logits)) * noise[0]
    if noise_kind == "std":
        x = x + 2.0 / len(x) * noise[0]
    best = _best(x, k)
    y = np.zeros(len(x))
    y[best] = _softmax(x[best]) if renormalize else _softmax(x)[best]
    return y


def _call_top_k_gate(x, *, noise_kind, noise_logits, k, **options):
    noise = {"none": {}, "logits": {"noise_logits": noise_logits}, "std": {"noise_std": 2.0}}[noise_kind]
    return normalizers.top_k_gate(x, k, key=KEY if noise else None, **noise, **options)


def _gumbel_softmax_gate(x, *, temperature, samples, noise=None):
    draws = noise if samples else [0.0]
    return np.mean([_softmax((x + g) / temperature) for g in draws], axis=0)


def _call_gumbel_softmax_gate(x, *, samples, **options):
    options |= {"key": KEY if samples else None, "num_samples": max(samples, 1)}
    return normalizers.gumbel_softmax_gate(x, **options)


def _gumbel_noise(o, shape):
    keys = jax.random.split(KEY, o["samples"]) if o["samples"] else [KEY]
    return jnp.stack([jax.random.gumbel(key, shape, jnp.float64) for key in keys])


def _streamed_noise(options, shape):
    """The noise of `gumbel_softmax`, up to a constant per row: it does not depend on the axis."""
    axis = shape.index(V)
    noise = jnp.log(normalizers.gumbel_softmax(jnp.zeros((*ROWS, V)), KEY))
    return jnp.moveaxis(noise, -1, axis)[None]


def _gumbel_softmax(x, *, temperature, hard, noise):
    y = _softmax((x + noise[0]) / temperature)
    return 1.0 * _best(x + noise[0], 1) if hard else y


def _drop_weak_experts(x, *, threshold):
    weights = np.exp(x)
    kept = np.where(weights < threshold * weights.max(), 0, weights)
    return kept / kept.sum()


def _sdm(x, *, similarity, distance):
    return _softmax(distance * np.log(2 + similarity) * x)


def _unit_scaled_softmax(x, *, multiplier):
    a = 1 / (1 + 4 / multiplier**2)
    return V ** (a / 2 + 1 - a) * _softmax(multiplier * x)


def _gumbel_sigmoid(x, *, temperature, hard, noisy, noise):
    z = x + noise[0] if noisy else x
    return 1.0 * (z > 0) if hard else 1 / (1 + np.exp(-z / temperature))


NORMALIZERS = {
    "softmax_n": {"n": [2.5, Array(1)]},
    "sink_softmax": {"sink": [0.5, Array()]},
    "scalable_softmax": {"scale": [0.43, Array(-1)], "bias": [0.7, Array(-0.5)]},
    "adaptive_temperature_softmax": {"coefficients": [(0.1, -1.0, 3.0), (2.0, 0.3)], "threshold": [0.5, 1.2]},
    "entropy_target_softmax": {"entropy": [0.4, Array(0.1, 0.5)]},
    "self_adjust_softmax": {"normalized": [True, False]},
    "clipped_softmax": {"zeta": [1.1, Array(1)], "gamma": [-0.1, Array(-1)]},
    "quantized_softmax": {"bits": [2, 4], "bias": [0.0, Array()]},
    "softpick": {"eps": [1e-8, 1e-10]},
    "taylor_softmax": {"order": [2, 4]},
    "sigmoid_weights": {"bias": [None, 0.4, Array(-0.5)]},
    "relu_weights": {"power": [1.0, 2.0]},
    "softplus_attention_weights": {"scale": [1.5, Array(1)], "eps": [1e-8, 0.3]},
    "reweighted_attention_weights": {
        "scale": [1.5, Array(1)],
        "power": [2.0, 3.0],
        "offset": [None, Array(0.2)],
        "eps": [1e-8, 0.3],
    },
    "mpc_softmax": {"eps": [1e-6, 0.5]},
    "sparse_softmax": {"k": [1, 3]},
    "entmax": {"alpha": [1.7, Array(1.05)]},
}
TEMPERATURE = {"temperature": [0.7, Array(0.5)]}
SDM = {"similarity": [1.5, Array()], "distance": [0.6, Array()]}
FUNCTIONS = {
    **{
        name: Function(
            lambda x, f=FORMULAS[name], **o: f(x, **o)[0], options, lambda x, f=SOFT[name], **o: f(x, **o)[0]
        )
        for name, options in NORMALIZERS.items()
    },
    "masked_logit_softmax": Function(
        lambda x, *, mask, masked_logit: _softmax(np.where(mask > 0.3, x, masked_logit)),
        {"mask": [Array(per_entry=True)], "masked_logit": [-1.0, 0.5]},
        call=lambda x, *, mask, **o: normalizers.masked_logit_softmax(x, mask > 0.3, **o),
    ),
    "gumbel_softmax": Function(
        _gumbel_softmax,
        TEMPERATURE | {"hard": [False, True]},
        lambda x, *, hard, **o: _gumbel_softmax(x, hard=False, **o),
        lambda x, **o: normalizers.gumbel_softmax(x, KEY, **o),
        _streamed_noise,
    ),
    "top_k_gate": Function(
        _top_k_gate,
        {
            "k": [1, 3],
            "renormalize": [True, False],
            "noise_kind": ["none", "logits", "std"],
            "noise_logits": [Array(-0.5, per_entry=True)],
        },
        None,
        _call_top_k_gate,
        lambda o, shape: jax.random.normal(KEY, (1, *shape), jnp.float64),
    ),
    "gumbel_softmax_gate": Function(
        _gumbel_softmax_gate,
        TEMPERATURE | {"samples": [0, 3]},
        None,
        _call_gumbel_softmax_gate,
        _gumbel_noise,
    ),
    "drop_weak_experts": Function(
        _drop_weak_experts,
        {"threshold": [0.2, 0.6]},
        call=lambda x, **o: normalizers.drop_weak_experts(jnp.exp(jnp.where(jnp.isnan(x), 0, x)), **o),
    ),
    "wina_mask": Function(
        lambda x, *, k: _best(np.abs(x), k),
        {"k": [1, 2]},
        lambda x, *, k: 0 * x,
        lambda x, *, k, axis, **o: normalizers.wina_mask(x, jnp.ones(V), k, axis=axis, **o).astype(float),
    ),
    "straight_through_one_hot": Function(lambda x: 1.0 * _best(x, 1), {}, _softmax),
    "sdm_activation": Function(_sdm, SDM),
    "sdm_log_softmax": Function(lambda x, **o: np.log(_sdm(x, **o)) / np.log(2 + o["similarity"]), SDM),
    "unit_scaled_softmax": Function(_unit_scaled_softmax, {"multiplier": [1.0, 0.5, 2.0]}),
    "gumbel_sigmoid": Function(
        _gumbel_sigmoid,
        {"temperature": [1.0, 0.5], "hard": [False, True], "noisy": [False, True]},
        lambda x, *, hard, **o: _gumbel_sigmoid(x, hard=False, **o),
        lambda x, *, noisy, axis, **o: normalizers.gumbel_sigmoid(x, key=KEY if noisy else None, **o),
        lambda o, shape: jax.random.logistic(KEY, (1, *shape), jnp.float64),
    ),
}
CONSTANTS = ("similarity", "distance", "mask")  # without gradient


def cases_of(name):
    return pairs({"axis": [-1, 0], "masked": [False, True], **FUNCTIONS[name].options})


def test_the_designs():
    designs = [cases_of(name) for name in FUNCTIONS]
    counted = f"{sum(map(count_pairs, designs))} pairs in {sum(map(len, designs))} calls of {len(designs)} functions"
    assert counted in __doc__


def at_axis(a, axis):
    """An array `[*rows, columns]` with its columns at an axis, and `[*rows]` as it is."""
    return jnp.moveaxis(a, -1, axis) if a.ndim > len(ROWS) else a


def make(function, case, rng):
    """The float arrays `{name: array}` of a case, its other options, and what counts; rows are the leading axes."""
    floats = {"scores": rng.normal(size=(*ROWS, V))}
    keep = np.ones((*ROWS, V), bool)
    if case["masked"]:
        keep = rng.random(keep.shape) < 0.7
        keep[0, 1], keep[1, 1] = False, True
        floats["scores"][1, 1, 3] = -np.inf
    floats["scores"][~keep] = np.nan
    others = {}
    for name in function.options:
        option = case[name]
        if isinstance(option, Array):
            floats[name] = option.least + option.width * rng.random((*ROWS, V) if option.per_entry else ROWS)
        else:
            others[name] = option
    return floats, others, keep


def plain(formula, floats, others, keep, noise, absent):
    """The weights `[*rows, columns]`."""
    y = np.full((*ROWS, V), absent)
    count = keep & (floats["scores"] != -np.inf)
    for row in np.ndindex(ROWS):
        here = count[row]
        if not here.any():
            continue
        options = {name: a[row] if a.ndim == len(ROWS) else a[row][here] for name, a in floats.items()}
        if noise is not None:
            options["noise"] = noise[(slice(None), *row)][:, here]
        y[row][here] = formula(options.pop("scores"), **options, **others)
    return y


@pytest.mark.whole  # the cases are normalizers
@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_together(name, x64):
    function = FUNCTIONS[name]
    call = function.call or getattr(normalizers, name)
    soft = function.soft or function.plain
    rng = np.random.default_rng(0)
    cases = [(case, *make(function, case, rng)) for case in cases_of(name)]
    weights = rng.normal(size=(*ROWS, V))

    def run(case, floats, others, keep):
        where = at_axis(keep, case["axis"]) if case["masked"] else None
        floats = {name: at_axis(a, case["axis"]) for name, a in floats.items()}
        y = call(floats.pop("scores"), axis=case["axis"], where=where, **floats, **others)
        y = jnp.moveaxis(y, case["axis"], -1)
        return jnp.sum(jnp.where(jnp.isfinite(y), weights * jnp.where(jnp.isfinite(y), y, 0), 0)), y

    @jax.jit
    def everything(all_floats):
        return [
            jax.grad(lambda floats, c=c: run(c[0], floats, *c[2:]), has_aux=True)(floats)
            for c, floats in zip(cases, all_floats)
        ]

    absent = -np.inf if name == "sdm_log_softmax" else 0.0
    for (case, floats, others, keep), (gradients, y) in zip(cases, everything([c[1] for c in cases])):
        noise = None
        if function.noise is not None:
            shape = at_axis(floats["scores"], case["axis"]).shape
            noise = np.moveaxis(function.noise(others, shape), {-1: -1, 0: 1}[case["axis"]], -1)
        np.testing.assert_allclose(
            y, plain(function.plain, floats, others, keep, noise, absent), 1e-9, 1e-9, err_msg=str(case)
        )
        for argument, a in floats.items():
            if argument in CONSTANTS:
                continue
            direction = rng.normal(size=a.shape)
            ends = [
                plain(soft, floats | {argument: a + step * direction}, others, keep, noise, 0.0)
                for step in (1e-6, -1e-6)
            ]
            assert not np.any(np.asarray(gradients[argument])[~np.isfinite(a)]), (case, argument)
            near(np.sum(gradients[argument] * direction), np.sum(weights * (ends[0] - ends[1])) / 2e-6, 3e-6)


# --- similarities normalized over banks ----------------------------------------------------------------------

QUERIES, GALLERY, BANK = 4, 5, 3
RETRIEVAL = {
    "dynamic": [False, True],
    "bank": ["[bank, gallery]", "[gallery, bank]", "linear_logits"],
    "log": [True, False],
    "k": [1, 2],
    "where": [False, True],
    "query_bank_where": [False, True],
    "gallery_bank_where": [False, True],
}


def _inverted(s, bank, beta, case):
    """One factor, of a query's similarities `[gallery]`, and of a bank `[bank, gallery]`; absent entries are NaN."""
    present = ~np.isnan(s)
    factor = np.full(GALLERY, -np.inf)
    for g in np.flatnonzero(present):
        counts = bank[:, g][~np.isnan(bank[:, g])]
        if len(counts):
            factor[g] = beta * s[g] - np.log(np.sum(np.exp(beta * counts)))
    factor = factor if case["log"] else np.exp(factor)
    hubs = set()
    for row in bank:
        here = np.flatnonzero(~np.isnan(row))
        hubs |= set(here[_best(row[here], case["k"])])
    if case["dynamic"] and not (present.any() and np.nanargmax(s) in hubs):
        factor = np.full(GALLERY, -np.inf if case["log"] else 0.0)
        factor[present] = np.log(s[present]) if case["log"] else s[present]
    return factor


def test_retrieval_options_together(x64):
    cases, rng = pairs(RETRIEVAL), np.random.default_rng(0)
    assert (len(cases), count_pairs(cases)) == (9, 96)
    cotangent = rng.normal(size=(QUERIES, GALLERY))
    points = []
    for case in cases:
        floats = {
            "similarities": 0.1 + rng.random((QUERIES, GALLERY)),
            "query_beta": 0.7,
            "gallery_beta": 3.0,
        }
        keeps = {}
        for name in ("similarities", "query_bank", "gallery_bank"):
            shape = (QUERIES if name == "similarities" else BANK, GALLERY)
            floats.setdefault(name, rng.normal(size=shape))
            masked = case["where" if name == "similarities" else name + "_where"]
            keeps[name] = rng.random(shape) < (0.7 if masked else 1.0)
        points.append((floats, keeps))

    def run(case, floats, keeps):
        floats, laid = dict(floats), (lambda a: a) if case["bank"] == "[bank, gallery]" else jnp.transpose
        options = {"bank_axis": 0 if case["bank"] == "[bank, gallery]" else 1}
        banks = []
        for name in ("query_bank", "gallery_bank"):
            bank = laid(
                floats.pop(name) if case["bank"] == "linear_logits" else hidden(floats.pop(name), keeps[name])
            )
            if case["bank"] == "linear_logits":
                bank = jaxsoft.linear_logits(bank, jnp.eye(BANK), block_size=2)
            banks.append(bank)
            if case[name + "_where"]:
                options[name + "_where"] = laid(keeps[name])
        if case["where"]:
            options["where"] = keeps["similarities"]
        s = hidden(floats.pop("similarities"), keeps["similarities"])
        options |= floats | {name: case[name] for name in ("dynamic", "log", "k")}
        y = normalizers.dual_inverted_softmax(s, *banks, **options)
        return jnp.sum(cotangent * jnp.where(jnp.isfinite(y), y, 0)), y

    def hidden(a, keep):
        return jnp.where(keep, a, jnp.nan)

    def plain(case, floats, keeps):
        a = {name: np.where(keep, floats[name], np.nan) for name, keep in keeps.items()}
        total = 0.0 if case["log"] else 1.0
        for name in ("query", "gallery"):
            factor = np.stack(
                [_inverted(s, a[name + "_bank"], floats[name + "_beta"], case) for s in a["similarities"]]
            )
            total = total + factor if case["log"] else total * factor
        return total

    @jax.jit
    def everything(points):
        return [
            jax.grad(lambda floats, case=case, keeps=keeps: run(case, floats, keeps), has_aux=True)(floats)
            for case, (floats, keeps) in zip(cases, points)
        ]

    for case, (floats, keeps), (gradients, y) in zip(cases, points, everything(points)):
        np.testing.assert_allclose(y, plain(case, floats, keeps), 1e-9, 1e-9, err_msg=str(case))
        for name, a in floats.items():
            direction = rng.normal(size=np.shape(a))
            ends = [plain(case, floats | {name: a + step * direction}, keeps) for step in (1e-6, -1e-6)]
            slopes = [np.sum(cotangent * np.where(np.isfinite(end), end, 0)) for end in ends]
            near(np.sum(gradients[name] * direction), (slopes[0] - slopes[1]) / 2e-6, 3e-6)
