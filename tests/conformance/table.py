"""One entry for every public function of rows of scores: how to call it on a small example, and what holds for it.

`call(logits, inputs, where=None, axis=-1)` runs the function; `inputs` is what `make_inputs` makes. Options that
change the formula are entries of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxsoft
from jaxsoft import losses, normalizers, rows


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public function with a variant of its options.

    Attributes:
      export: the public name, e.g. `jaxsoft.losses.cross_entropy`.
      call: `(logits, inputs, *, where=None, axis=-1) -> array or tuple`.
      variant: what distinguishes it from the other entries of the same export.
      inputs: names of the inputs it reads besides the logits (keys of `make_inputs`).
      dense_only: whether it returns something of the logits' shape, so that it refuses expressions.
      shift: by how much its float results grow when 1 is added to every logit (None: not a law).
      scale_invariant: whether logits times a positive number give the same.
      where: whether it takes a mask.
      empty: its float results for a row without entries (None: not a law).
      differentiable: whether there is a gradient to test.
      second_order: whether its second derivatives are tested.
      low: tolerance, relative to max(1, |result|), of half-precision logits against float64 on the same numbers.
      huge: tolerance, relative to max(1, |result|), at logits of +-1e4: the losses that add up logits are exact
        to a unit in the last place of the logits only.
      loss: whether it takes labels, weights and ignore_index as losses do.
    """

    export: str
    call: Callable[..., Any]
    variant: str = ""
    inputs: tuple[str, ...] = ()
    dense_only: bool = False
    shift: float | None = None
    scale_invariant: bool = False
    where: bool = True
    empty: float | None = 0.0
    differentiable: bool = True
    second_order: bool = True
    low: float = 3e-6
    huge: float = 3e-6
    loss: bool = False

    @property
    def id(self) -> str:
        return self.export.removeprefix("jaxsoft.") + (f"[{self.variant}]" if self.variant else "")


def make_inputs(seed: int, leading: tuple[int, ...], columns: int, dtype=np.float32) -> dict[str, Any]:
    """Labels and other inputs; every label and every positive lies in the first half of the columns."""
    rng = np.random.default_rng(seed)
    half = max(1, (columns + 1) // 2)
    q = rng.random((*leading, columns)) * (np.arange(columns) < half)
    ids = np.stack(
        [rng.permutation(np.arange(max(half, 3)))[:3] % half for _ in range(int(np.prod(leading)))]
    ).reshape(*leading, 3)
    ids[..., 2] = -100
    ids[..., 1] = np.where(ids[..., 1] == ids[..., 0], -100, ids[..., 1])
    mask = np.zeros((*leading, columns), bool)
    np.put_along_axis(mask, ids[..., :1], True, axis=-1)
    return dict(
        labels=jnp.asarray(ids[..., 0], jnp.int32),
        soft=jnp.asarray(q / q.sum(-1, keepdims=True), dtype),
        positives=jnp.asarray(ids, jnp.int32),
        positive_mask=jnp.asarray(mask),
        class_weights=jnp.asarray(0.5 + rng.random(columns), dtype),
        reference=jnp.asarray(rng.normal(size=leading), dtype),
        temperature=jnp.asarray(0.5 + rng.random(leading), dtype),
        alpha=jnp.asarray(1.2 + rng.random(leading), dtype),
    )


def _loss(function, variant="", labels="labels", **options):
    """An entry of a loss with shift-invariant softmax statistics, unless said otherwise."""
    entry_options = {k: options.pop(k) for k in list(options) if k in Entry.__dataclass_fields__}
    extra = ("class_weights",) if options.get("class_weights") else ()

    def call(logits, inputs, *, where=None, axis=-1, **more):
        arrays = {k: inputs[k] for k in extra}
        target = inputs[labels]
        if labels in ("soft", "positive_mask"):
            target = jnp.moveaxis(target, -1, axis)
        return function(logits, target, where=where, axis=axis, **{**options, **arrays}, **more)

    return Entry(
        f"jaxsoft.losses.{function.__name__}",
        call,
        variant,
        (labels, *extra),
        **{"shift": 0.0, "loss": True, **entry_options},
    )


def _statistic(function, module="jaxsoft", variant="", inputs=(), **options):
    entry_options = {k: options.pop(k) for k in list(options) if k in Entry.__dataclass_fields__}

    def call(logits, given, *, where=None, axis=-1):
        mask = {} if not entry_options.get("where", True) else {"where": where}
        return function(logits, *(given[k] for k in inputs), axis=axis, **mask, **options)

    return Entry(f"{module}.{function.__name__}", call, variant, tuple(inputs), **entry_options)


def _weighted_logsumexp(logits, inputs, *, where=None, axis=-1):
    return jaxsoft.logsumexp(logits, weights=inputs["class_weights"], where=where, axis=axis)


def _reference_logsumexp(logits, inputs, *, where=None, axis=-1):
    return jaxsoft.logsumexp(
        logits, method="reference", reference=inputs["reference"], where=where, axis=axis
    )


def _softcapped(logits, inputs, *, where=None, axis=-1):
    return jaxsoft.logsumexp(jaxsoft.softcap(logits, 3.0), where=where, axis=axis)


def _tempered(logits, inputs, *, where=None, axis=-1):
    logits = jaxsoft.temperature(logits, inputs["temperature"], axis=axis)
    return jaxsoft.logsumexp(logits, where=where, axis=axis)


def _reduced(logits, inputs, *, where=None, axis=-1):
    wanted = {"mean": rows.reductions.mean(), "p2": rows.reductions.sum_of_squared_probabilities()}
    return tuple(jaxsoft.reduce_rows(logits, wanted, where=where, axis=axis).values())


def _normalizer(function, variant="", per_row=(), **options):
    """An entry of a normalizer; `per_row` are options that come from the inputs, one number a row."""
    entry_options = {k: options.pop(k) for k in list(options) if k in Entry.__dataclass_fields__}
    module = "jaxsoft" if function.__name__ in jaxsoft.__all__ else "jaxsoft.normalizers"

    def call(logits, given, *, where=None, axis=-1):
        arrays = {name: given[source] for name, source in dict(per_row).items()}
        fixed = {**options, "k": min(options["k"], logits.shape[axis])} if "k" in options else options
        return function(logits, where=where, axis=axis, **arrays, **fixed)

    return Entry(
        f"{module}.{function.__name__}",
        call,
        variant,
        tuple(dict(per_row).values()),
        dense_only=True,
        **{"low": 1e-2, **entry_options},
    )


_SCALED = 1e-3  # half a unit in the last place of 1e4 times a factor, in the exponent

_NORMALIZERS = [
    _normalizer(normalizers.softmax_n, n=2.5),
    _normalizer(normalizers.softmax_n, "rows", per_row={"n": "temperature"}),
    _normalizer(normalizers.softmax_one),
    _normalizer(normalizers.sink_softmax, per_row={"sink": "reference"}),
    _normalizer(normalizers.scalable_softmax, shift=0.0, huge=_SCALED),
    _normalizer(
        normalizers.scalable_softmax, "rows", per_row={"scale": "temperature", "bias": "reference"}, shift=0.0
    ),
    _normalizer(normalizers.adaptive_temperature_softmax, shift=0.0, huge=_SCALED),
    _normalizer(
        normalizers.entropy_target_softmax, entropy=0.6, shift=0.0, scale_invariant=True, huge=_SCALED
    ),
    _normalizer(normalizers.self_adjust_softmax),
    _normalizer(normalizers.self_adjust_softmax, "plain", normalized=False),
    _normalizer(normalizers.clipped_softmax, shift=0.0),
    _normalizer(normalizers.softpick),
    _normalizer(normalizers.stablemax),
    _normalizer(normalizers.taylor_softmax, order=4),
    _normalizer(normalizers.sigmoid_weights),
    _normalizer(normalizers.sigmoid_weights, "bias", per_row={"bias": "reference"}),
    _normalizer(normalizers.relu_weights, power=2.0),
    _normalizer(normalizers.softplus_attention_weights, scale=1.5),
    _normalizer(normalizers.reweighted_attention_weights, scale=1.5, power=3.0, offset=0.5),
    _normalizer(normalizers.mpc_softmax, shift=0.0),
    _normalizer(normalizers.sparse_softmax, k=3, shift=0.0),
    _normalizer(normalizers.sparsemax, shift=0.0),
    _normalizer(normalizers.entmax15, shift=0.0),
    _normalizer(normalizers.entmax, alpha=1.3, shift=0.0),
    _normalizer(normalizers.entmax, "rows", per_row={"alpha": "alpha"}, shift=0.0),
    _normalizer(normalizers.entmax, "alpha=2.5", alpha=2.5, shift=0.0),
]

_SUMS = 5e-4  # half a unit in the last place of 1e4

ENTRIES: list[Entry] = [
    # statistics
    _statistic(jaxsoft.logsumexp, shift=1.0, empty=-np.inf),
    _statistic(jaxsoft.logsumexp, variant="exponent", method="exponent", shift=1.0, empty=-np.inf),
    Entry("jaxsoft.logsumexp", _reference_logsumexp, "reference", ("reference",), shift=1.0, empty=-np.inf),
    Entry("jaxsoft.logsumexp", _weighted_logsumexp, "weights", ("class_weights",), shift=1.0, empty=-np.inf),
    Entry("jaxsoft.softcap", _softcapped, where=False, empty=-np.inf, low=1e-2),
    Entry("jaxsoft.temperature", _tempered, "", ("temperature",), empty=-np.inf, low=1e-2),
    _statistic(jaxsoft.top_k, k=3, shift=1.0, empty=-np.inf),
    _statistic(jaxsoft.log_prob, inputs=("labels",), shift=0.0),
    _statistic(jaxsoft.entropy, shift=0.0, low=2e-5),
    _statistic(jaxsoft.label_rank, inputs=("labels",), shift=0.0, scale_invariant=True, differentiable=False),
    _statistic(rows.softmax_top_k, "jaxsoft.rows", k=3, shift=0.0, low=1e-2),
    _statistic(
        rows.softmax_top_k, "jaxsoft.rows", variant="renormalize", k=3, renormalize=True, shift=0.0, low=1e-2
    ),
    Entry("jaxsoft.reduce_rows", _reduced),
    # normalizers
    _statistic(jaxsoft.softmax, dense_only=True, shift=0.0, low=1e-2),
    _statistic(jaxsoft.log_softmax, dense_only=True, shift=0.0, empty=-np.inf, low=1e-2),
    *_NORMALIZERS,
    _statistic(rows.online_softmax, "jaxsoft.rows", dense_only=True, shift=0.0, low=1e-2),
    _statistic(rows.two_pass_softmax, "jaxsoft.rows", dense_only=True, shift=0.0, low=1e-2),
    _statistic(
        rows.unified_max_softmax, "jaxsoft.rows", inputs=("reference",), dense_only=True, shift=0.0, low=1e-2
    ),
    # losses
    _loss(losses.cross_entropy),
    _loss(losses.cross_entropy, "soft", "soft", label_smoothing=0.1, z_loss=0.01, shift=None, huge=_SUMS),
    _loss(losses.cross_entropy, "smooth", label_smoothing=0.1, z_loss=0.01, shift=None, huge=_SUMS),
    _loss(losses.cross_entropy, "others", label_smoothing=0.1, smoothing="others", huge=_SUMS),
    _loss(losses.cross_entropy, "weighted", label_smoothing=0.1, class_weights=True, huge=_SUMS),
    _loss(
        losses.cross_entropy,
        "weighted-others",
        label_smoothing=0.1,
        smoothing="others",
        class_weights=True,
        huge=_SUMS,
    ),
    _loss(losses.poly_loss, epsilon=(0.5, -0.2, 0.1)),
    _loss(losses.poly_loss, "soft", "soft", label_smoothing=0.1, low=2e-5, huge=_SUMS),
    _loss(losses.poly1_cross_entropy, epsilon=-1.0),
    _loss(losses.focal_loss, gamma=2.0),
    _loss(losses.focal_loss, "weighted", gamma=1.5, class_weights=True),
    _loss(losses.poly1_focal_loss),
    _loss(losses.dual_focal_loss, second_order=False),
    _loss(losses.max_suppression_loss, huge=_SUMS, second_order=False),
    _loss(losses.spherical_z_loss, scale_invariant=True, low=2e-5),
    _loss(losses.spherical_z_loss, "a,b", a=0.5, b=2.0, scale_invariant=True, low=2e-5),
    _loss(losses.decoupled_softmax_loss, labels="positives"),
    _loss(losses.decoupled_softmax_loss, "mask", labels="positive_mask"),
]

# Exports that are no functions of one row of scores, or not of its numbers alone (random ones), and the tests of their
# laws: files that name them.
_TESTED_IN = {
    "tests/rows/test_linear_logits.py": "jaxsoft: LinearLogits linear_logits",
    "tests/rows/test_reductions.py": "jaxsoft: RowReduction; jaxsoft.rows: Tile",
    "tests/rows/test_weighted.py": "jaxsoft.losses: weighted_sum weighted_mean; jaxsoft.rows: weighted_sum",
    "tests/normalizers/test_worked_numbers.py": (
        "jaxsoft: gumbel_softmax; jaxsoft.normalizers: masked_logit_softmax quantized_softmax"
    ),
    "tests/normalizers/test_gating.py": (
        "jaxsoft.normalizers: dense_to_sparse_gate drop_weak_experts feature_selection_gate merge_experts "
        "gumbel_softmax_gate route_gradients soft_moe_dispatch_combine top_k_gate wina_mask"
    ),
    "tests/normalizers/test_masks.py": (
        "jaxsoft.normalizers: exponential_temperature_schedule gumbel_sigmoid gumbel_softmax_interpolant "
        "straight_through_one_hot"
    ),
    "tests/normalizers/test_pooling.py": "jaxsoft.normalizers: soft_pool",
    "tests/normalizers/test_retrieval.py": (
        "jaxsoft.normalizers: dual_inverted_softmax dynamic_inverted_softmax inverted_softmax"
    ),
    "tests/normalizers/test_similarity.py": (
        "jaxsoft.normalizers: distance_quantile sdm_activation sdm_log_softmax similarity_count"
    ),
    "tests/normalizers/test_temperature.py": (
        "jaxsoft.normalizers: noisy_logits quantized_softmax_bias_correction temperature_network"
    ),
    "tests/losses/test_routing.py": (
        "jaxsoft.losses: importance_loss load_balance_loss modality_routing_kl router_z_loss"
    ),
    "tests/attention/test_dot_product.py": (
        "jaxsoft.attention: dot_product_attention; jaxsoft.normalizers: Normalizer defined_by"
    ),
    "tests/attention/test_partial.py": (
        "jaxsoft.attention: PartialAttention decode_attention flax_attention_fn merge_partial_attention "
        "partial_attention"
    ),
    "tests/attention/test_linear.py": (
        "jaxsoft.attention: lightning_attention lightning_slopes linear_attention magnitude_aware_linear_attention"
    ),
    "tests/attention/test_softmax_free.py": (
        "jaxsoft.attention: gaussian_kernel_attention newton_pseudo_inverse softmax_free_attention"
    ),
    "tests/attention/test_hyper.py": (
        "jaxsoft.attention: angular_lsh_buckets hyper_attention scatterbrain_attention"
    ),
    "tests/attention/test_reuse.py": (
        "jaxsoft.attention: SharedSoftmax attention_entropy_regularizer long_context_log_mass "
        "ngram_attention reuse_softmax_attention top_k_attention unified_softmax_attention urpe_attention"
    ),
}
# What functions return or take, without laws of its own.
_TYPES = (
    "jaxsoft.attention.AttentionStatistics",
    "jaxsoft.attention.NgramAttention",
    "jaxsoft.normalizers.Interpolant",
    "jaxsoft.normalizers.SoftMoE",
    "jaxsoft.normalizers.TemperatureNetwork",
    "jaxsoft.normalizers.TemperatureParameters",
    "jaxsoft.rows.Logits",
    "jaxsoft.rows.TopK",
)
ELSEWHERE = {
    f"{module.strip()}.{name}": path
    for path, exports in _TESTED_IN.items()
    for group in exports.split(";")
    for module, names in [group.split(":")]
    for name in names.split()
} | dict.fromkeys(_TYPES)

_SAME = {f"jaxsoft.rows.{name}": f"jaxsoft.{name}" for name in rows.__all__ if name in jaxsoft.__all__} | {
    f"jaxsoft.normalizers.{name}": f"jaxsoft.{name}"
    for name in normalizers.__all__
    if name in jaxsoft.__all__
}


def canonical(export: str) -> str:
    """The name under which an export stands in the table."""
    return _SAME.get(export, export)
