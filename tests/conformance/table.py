"""One entry for every public function of rows of scores: how to call it on a small example, and what holds for it.

The entries of the losses stand by family in `conformance/losses`, those of decoding in `conformance/decoding.py`, the
others here. Options that change the formula are entries of their own.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import numpy as np

import conformance.decoding
import conformance.losses
import jaxsoft
from conformance.entry import Entry
from conformance.entry import normalizer_entry as _normalizer
from conformance.entry import statistic_entry as _statistic
from jaxsoft import calibration, normalizers, rows

FAMILIES = [
    importlib.import_module(f"conformance.losses.{module.name}")
    for module in pkgutil.iter_modules(conformance.losses.__path__)
]


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


_SCALED = 1e-3  # half a unit in the last place of 1e4 times a factor, in the exponent

_NORMALIZERS = [
    _statistic(jaxsoft.softmax, dense_only=True, shift=0.0, low=1e-2),
    _statistic(jaxsoft.log_softmax, dense_only=True, shift=0.0, empty=-np.inf, low=1e-2),
    _statistic(rows.online_softmax, "jaxsoft.rows", dense_only=True, shift=0.0, low=1e-2),
    _statistic(rows.two_pass_softmax, "jaxsoft.rows", dense_only=True, shift=0.0, low=1e-2),
    _statistic(
        rows.unified_max_softmax, "jaxsoft.rows", inputs=("reference",), dense_only=True, shift=0.0, low=1e-2
    ),
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
        normalizers.entropy_target_softmax,
        entropy=0.6,
        shift=0.0,
        scale_invariant=True,
        huge=_SCALED,
        jumps=True,
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
    _normalizer(normalizers.sparse_softmax, k=3, shift=0.0, least_columns=1),
    _normalizer(normalizers.sparsemax, shift=0.0),
    _normalizer(normalizers.entmax15, shift=0.0),
    _normalizer(normalizers.entmax, alpha=1.3, shift=0.0),
    _normalizer(normalizers.entmax, "rows", per_row={"alpha": "alpha"}, shift=0.0),
    _normalizer(normalizers.entmax, "alpha=2.5", alpha=2.5, shift=0.0),
]

_STATISTICS = [
    _statistic(jaxsoft.logsumexp, shift=1.0, empty=-np.inf, thorough=True),
    _statistic(
        jaxsoft.logsumexp, variant="exponent", method="exponent", shift=1.0, empty=-np.inf, thorough=True
    ),
    Entry(
        "jaxsoft.logsumexp",
        _reference_logsumexp,
        "reference",
        ("reference",),
        shift=1.0,
        empty=-np.inf,
        thorough=True,
    ),
    Entry(
        "jaxsoft.logsumexp",
        _weighted_logsumexp,
        "weights",
        ("class_weights",),
        shift=1.0,
        empty=-np.inf,
        thorough=True,
    ),
    Entry("jaxsoft.softcap", _softcapped, where=False, empty=-np.inf, low=1e-2),
    Entry("jaxsoft.temperature", _tempered, "", ("temperature",), empty=-np.inf, low=1e-2),
    _statistic(jaxsoft.top_k, k=3, shift=1.0, empty=-np.inf, least_columns=1, thorough=True),
    _statistic(jaxsoft.log_prob, inputs=("labels",), shift=0.0),
    _statistic(jaxsoft.entropy, shift=0.0, low=2e-5),
    _statistic(
        jaxsoft.label_rank,
        inputs=("labels",),
        shift=0.0,
        scale_invariant=True,
        differentiable=False,
        thorough=True,
    ),
    _statistic(
        jaxsoft.top_k_accuracy,
        inputs=("labels",),
        k=3,
        shift=0.0,
        scale_invariant=True,
        differentiable=False,
        least_columns=1,
    ),
    _statistic(rows.softmax_top_k, "jaxsoft.rows", k=3, shift=0.0, low=1e-2, least_columns=1),
    _statistic(
        rows.softmax_top_k,
        "jaxsoft.rows",
        variant="renormalize",
        k=3,
        renormalize=True,
        shift=0.0,
        low=1e-2,
        least_columns=1,
    ),
    Entry("jaxsoft.reduce_rows", _reduced, thorough=True),
]


def _energy(logits, inputs, *, where=None, axis=-1):
    return calibration.energy_score(logits, temperature=inputs["temperature"], where=where, axis=axis)


_CALIBRATION = [
    _statistic(calibration.max_softmax_probability, "jaxsoft.calibration", shift=0.0),
    _statistic(calibration.max_logit, "jaxsoft.calibration", shift=1.0, empty=-np.inf),
    Entry("jaxsoft.calibration.energy_score", _energy, "", ("temperature",), shift=1.0, empty=-np.inf),
    _statistic(calibration.least_confidence, "jaxsoft.calibration", shift=0.0, empty=1.0),
    _statistic(
        calibration.margin_score, "jaxsoft.calibration", shift=0.0, least_columns=1
    ),  # selects two entries
    _statistic(calibration.label_non_uniformity, "jaxsoft.calibration", shift=0.0),
    _statistic(
        calibration.nonconformity_score,
        "jaxsoft.calibration",
        inputs=("labels",),
        method="aps",
        share=0.7,
        shift=0.0,
    ),
    _statistic(calibration.nonconformity_score, "jaxsoft.calibration", "lac", inputs=("labels",), shift=0.0),
]


def _ranked(entries: list[Entry]) -> list[Entry]:
    """The entries with their ranks: thorough or the first of its family, the first of its export, or a variant."""
    ranked, seen = [], set()
    for entry in entries:
        family = getattr(entry.function, "__module__", entry.dense_only)
        leads = entry.thorough or family not in seen
        rank = "leading" if leads else "variant" if entry.export in seen else "export"
        ranked.append(dataclasses.replace(entry, rank=rank))
        seen |= {family, entry.export}
    return ranked


_LOSSES = [entry for family in FAMILIES for entry in getattr(family, "ENTRIES", [])]
ENTRIES = _ranked(_STATISTICS + _NORMALIZERS + _LOSSES + _CALIBRATION + conformance.decoding.ENTRIES)

# Exports that are no functions of one row of scores, or not of its numbers alone (random ones), and the tests of their
# laws: files that name them.
_TESTED_IN = {
    "tests/kernels/test_choice.py": "jaxsoft.kernels: Decision block_sizes explain interpreted",
    "tests/rows/test_linear_logits.py": "jaxsoft: LinearLogits linear_logits",
    "tests/rows/test_several_devices.py": "jaxsoft: shardings stored_logits; jaxsoft.rows: StoredLogits",
    "tests/rows/test_reductions.py": "jaxsoft: RowReduction; jaxsoft.rows: Tile",
    "tests/rows/test_weighted.py": "jaxsoft.losses: weighted_sum weighted_mean; jaxsoft.rows: weighted_sum",
    "tests/normalizers/test_unit_scaled.py": (
        "jaxsoft.losses: unit_scaled_cross_entropy; jaxsoft.normalizers: unit_scaled_softmax"
    ),
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
    "tests/attention/test_dot_product.py": (
        "jaxsoft.attention: dot_product_attention; jaxsoft.normalizers: Normalizer defined_by"
    ),
    "tests/attention/test_partial.py": (
        "jaxsoft.attention: PartialAttention decode_attention flax_attention_fn merge_partial_attention "
        "partial_attention"
    ),
    "tests/attention/test_several_devices.py": "jaxsoft.attention: zigzag_positions",
    "tests/attention/test_linear.py": (
        "jaxsoft.attention: lightning_attention lightning_slopes linear_attention magnitude_aware_linear_attention"
    ),
    "tests/merging/test_merging.py": (
        "jaxsoft.merging: bit_delta dare_delta della_delta diagonal_fisher fisher_merge model_kinship "
        "model_stock_merge star_delta"
    ),
    "tests/calibration/test_conformal.py": (
        "jaxsoft.calibration: benjamini_hochberg conformal_p_values conformal_quantile conformal_risk_control "
        "conformal_select prediction_set"
    ),
    "tests/calibration/test_measures.py": (
        "jaxsoft.calibration: calibration_error classwise_calibration_error reliability reliability_plot"
    ),
    "tests/calibration/test_out_of_distribution.py": (
        "jaxsoft.calibration: ClassGaussians KnnMemory SoftmaxCentroids fit_class_gaussians fit_softmax_centroids "
        "knn_memory_init knn_memory_logits knn_memory_update mahalanobis_score naive_bayes_logits odin_score "
        "perturb_inputs softmax_centroid_distance"
    ),
    "tests/calibration/test_scaling.py": (
        "jaxsoft.calibration: Scaling apply_scaling fit_matrix_scaling fit_temperature fit_vector_scaling"
    ),
    "tests/calibration/test_scores.py": "jaxsoft.calibration: clip_uncertainty",
    "tests/calibration/test_uncertainty.py": (
        "jaxsoft.calibration: cheat_corrected_confidence cheat_corrected_variance expected_pairwise_kl "
        "mix_probabilities mutual_information pair_covariance predictive_uncertainty t_similarity"
    ),
    "tests/norms/test_embedding.py": "jaxsoft.norms: stable_embedding stable_embedding_init",
    "tests/norms/test_layer.py": (
        "jaxsoft.norms: compress crms_norm decompress fold_into_linear layer_norm pre_ln_to_pre_rms "
        "pre_rms_to_pre_crms recenter rms_norm zero_mean_linear"
    ),
    "tests/norms/test_batch.py": (
        "jaxsoft.norms: alpha_batch_norm balanced_batch_norm balanced_batch_norm_init evonorm_b0 evonorm_s0"
    ),
    "tests/norms/test_running.py": (
        "jaxsoft.norms: PowerNormState UnifiedNormBackward UnifiedNormState power_norm power_norm_init "
        "unified_norm unified_norm_init"
    ),
    "tests/norms/test_placement.py": "jaxsoft.norms: mix_ln_num_post mix_ln_residual weight_condition",
    "tests/activations/test_activations.py": (
        "jaxsoft.activations: approximate_sign maxout mish mpc_gelu pade_activation pade_leaky_relu pade_neuron "
        "pade_neuron_init periodic_binarize relu_classifier"
    ),
    "tests/decoding/test_transforms.py": (
        "jaxsoft.decoding: Transform TransformedLogits adaptive_temperature allowed_token_ids chain epsilon_cutoff "
        "eta_cutoff frequency_penalty guidance knn_lm_interpolate logit_bias mask_logits min_p presence_penalty "
        "repetition_penalty softcap suppress_tokens temperature token_counts top_h top_k top_n_sigma top_p typical_p"
    ),
    "tests/decoding/test_sampling.py": (
        "jaxsoft.decoding: Beams Sample argmax beam_step log_prob sample sample_and_log_prob "
        "sample_without_replacement"
    ),
    "tests/decoding/test_speculative.py": (
        "jaxsoft.decoding: AcceptanceState EntropySwitch RollingEntropy Speculation acceptance_stop entropy_stop "
        "entropy_switch rolling_entropy speculative_accept"
    ),
    "tests/decoding/test_methods.py": (
        "jaxsoft.decoding: FusedLogits Resampled SoftNMS basis_aware_accept best_of_n_kl_bound best_of_n_kl_estimate "
        "best_of_n_policy bregman_top_k dynamic_logit_fusion fit_metric_energy frechet_mean_predict "
        "importance_resample soft_nms"
    ),
    "tests/heads/test_spherical.py": (
        "jaxsoft.heads: spherical_head spherical_loss spherical_refresh spherical_statistics spherical_top_k "
        "spherical_update"
    ),
    "tests/heads/test_partial.py": (
        "jaxsoft.heads: partial_fc_loss sample_classes sampled_margin_loss sampled_update"
    ),
    "tests/heads/test_sampled.py": (
        "jaxsoft.heads: augment_and_reduce_bound latent_augment_and_reduce_bound one_vs_each_bound "
        "sampled_softmax_loss"
    ),
    "tests/heads/test_shortlist.py": (
        "jaxsoft.heads: shortlist_cross_entropy shortlist_head shortlist_top_k"
    ),
    "tests/heads/test_quantized.py": ("jaxsoft.heads: vq_codebook vq_cross_entropy vq_logits vq_top_k"),
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
    "jaxsoft.calibration.CentroidDistance",
    "jaxsoft.calibration.PredictiveUncertainty",
    "jaxsoft.calibration.Reliability",
    "jaxsoft.calibration.RiskControl",
    "jaxsoft.calibration.Selection",
    "jaxsoft.heads.AugmentAndReduce",
    "jaxsoft.heads.ClassSample",
    "jaxsoft.heads.ShortlistHead",
    "jaxsoft.heads.SphericalHead",
    "jaxsoft.heads.SphericalStatistics",
    "jaxsoft.normalizers.Interpolant",
    "jaxsoft.normalizers.SoftMoE",
    "jaxsoft.normalizers.TemperatureNetwork",
    "jaxsoft.normalizers.TemperatureParameters",
    "jaxsoft.norms.BalancedBatchNormState",
    "jaxsoft.rows.Logits",
    "jaxsoft.rows.TopK",
)
ELSEWHERE = {
    f"{module.strip()}.{name}": path
    for tested_in in (_TESTED_IN, *(getattr(family, "TESTED_IN", {}) for family in FAMILIES))
    for path, exports in tested_in.items()
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
