"""A number that is traced, given for an option: it works, or the error names the option."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance.entry import make_inputs
from conformance.table import ENTRIES

import jaxsoft
from jaxsoft import activations, attention, calibration, decoding, heads, losses, normalizers, norms, rows

pytestmark = pytest.mark.whole  # the cases are losses

N, C = 4, 6
X, ONES, IDS = np.ones((N, C), np.float32), np.ones(N, np.float32), np.arange(N, dtype=np.int32)
Q = np.ones((1, 4, 2, 4), np.float32)
KEY = jax.random.key(0)
POWER, UNIFIED = norms.power_norm_init(C), norms.unified_norm_init(C)
HEAD = heads.SphericalHead(X, np.eye(C, dtype=np.float32), X[0], X[0], np.eye(C, dtype=np.float32))
GRADIENT = heads.SphericalStatistics(X, X[0], HEAD.covariance, ONES[0])

# Functions with the arguments that they need.
CASES = [
    (jaxsoft.linear_logits, dict(hidden=X, weight=X.T)),
    (jaxsoft.softcap, dict(logits=jaxsoft.linear_logits(X, X.T), cap=3.0)),
    (rows.softmax_top_k, dict(logits=X, k=2)),
    *((f, dict(scores=X)) for f in (normalizers.relu_weights, normalizers.softmax_n, normalizers.entmax)),
    *(
        (f, dict(scores=X))
        for f in (normalizers.adaptive_temperature_softmax, normalizers.self_adjust_softmax)
    ),
    (normalizers.gumbel_softmax, dict(scores=X, key=KEY)),
    (normalizers.sparse_softmax, dict(scores=X, k=2)),
    (normalizers.softplus_attention_weights, dict(scores=X, scale=0.9)),
    (normalizers.mpc_softmax, dict(scores=X)),
    (normalizers.quantized_softmax, dict(scores=X)),
    (normalizers.top_k_gate, dict(scores=X, k=2)),
    (normalizers.gumbel_sigmoid, dict(logits=X, key=KEY)),
    (normalizers.soft_pool, dict(x=X, window=2, axes=(1,))),
    (normalizers.inverted_softmax, dict(similarities=X, bank=X)),
    (normalizers.dynamic_inverted_softmax, dict(similarities=X, bank=X)),
    (normalizers.dual_inverted_softmax, dict(similarities=X, query_bank=X, gallery_bank=X)),
    (normalizers.temperature_network, dict()),
    (attention.dot_product_attention, dict(query=Q, key=Q, value=Q, dropout_key=KEY)),
    (attention.partial_attention, dict(query=Q, key=Q, value=Q)),
    (attention.hyper_attention, dict(random_key=KEY, query=Q, key=Q, value=Q)),
    (attention.linear_attention, dict(query=Q, key=Q, value=Q)),
    (attention.lightning_attention, dict(query=Q, key=Q, value=Q, slopes=np.ones(2, np.float32))),
    (attention.top_k_attention, dict(query=Q, key=Q, value=Q, k=2)),
    (attention.unified_softmax_attention, dict(query=Q, key=Q, value=Q)),
    (attention.attention_entropy_regularizer, dict(scores=X, threshold=0.5)),
    (attention.newton_pseudo_inverse, dict(matrix=np.eye(4, dtype=np.float32))),
    (attention.softmax_free_attention, dict(query=Q, value=Q)),
    (attention.gaussian_kernel_attention, dict(query=Q, key=Q, value=Q)),
    (calibration.energy_score, dict(logits=X)),
    (calibration.clip_uncertainty, dict(confidence=ONES)),
    (calibration.fit_temperature, dict(logits=X, labels=IDS)),
    (calibration.fit_vector_scaling, dict(logits=X, labels=IDS)),
    (calibration.calibration_error, dict(confidence=ONES, correct=ONES)),
    (calibration.nonconformity_score, dict(logits=X, labels=IDS, method="aps")),
    (calibration.prediction_set, dict(logits=X, threshold=0.5, method="aps")),
    (calibration.conformal_quantile, dict(scores=ONES, alpha=0.1)),
    (calibration.conformal_risk_control, dict(losses=X, thresholds=np.arange(C), alpha=0.1)),
    (calibration.benjamini_hochberg, dict(p_values=ONES, level=0.1)),
    (calibration.conformal_select, dict(calibration=ONES, scores=ONES, level=0.1)),
    (calibration.odin_score, dict(apply_fn=lambda x: x, inputs=X)),
    (calibration.fit_class_gaussians, dict(features=X, labels=IDS, classes=C)),
    (calibration.knn_memory_logits, dict(memory=calibration.knn_memory_init(5, C), features=X, classes=4)),
    (
        calibration.knn_memory_update,
        dict(memory=calibration.knn_memory_init(5, C), features=X, labels=IDS, classes=4),
    ),
    (calibration.mix_probabilities, dict(logits=X, robust_logits=X, weight=0.5)),
    (calibration.t_similarity, dict(logits=X)),
    (calibration.cheat_corrected_confidence, dict(log_prob=X, second_log_prob=X)),
    *(
        (getattr(decoding, name), {name: value})
        for name, value in (
            *(("temperature", 0.7), ("top_k", 2), ("top_p", 0.9), ("min_p", 0.1), ("typical_p", 0.9)),
            *(("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1), ("top_n_sigma", 1.0), ("top_h", 0.4)),
        )
    ),
    (decoding.adaptive_temperature, dict()),
    *(
        (getattr(decoding, name), {"counts": np.ones((N, C), np.int32), name: 1.5})
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    ),
    (decoding.guidance, dict(other=X, guidance_scale=1.5)),
    (decoding.knn_lm_interpolate, dict(distances=X, values=np.ones((N, C), np.int32))),
    (decoding.bregman_top_k, dict(penalty=0.1)),
    (decoding.basis_aware_accept, dict(probs=X / C, embedding=X.T, delta=0.2)),
    (decoding.token_counts, dict(tokens=IDS[None], columns=5)),
    (decoding.sample, dict(logits=X, key=KEY)),
    (decoding.sample_without_replacement, dict(logits=X, key=KEY, k=2)),
    (decoding.beam_step, dict(logits=X, scores=ONES)),
    (
        decoding.speculative_accept,
        dict(draft_tokens=IDS[:1], draft_logits=X[:1], target_logits=X[:2], key=KEY),
    ),
    (decoding.acceptance_stop, dict(head_logits=X[0, :2], state=decoding.AcceptanceState.start())),
    (decoding.entropy_stop, dict(draft_logits=X, length=1)),
    (decoding.entropy_switch, dict(logits=X[0], state=decoding.EntropySwitch.start(), threshold=1.0)),
    (decoding.dynamic_logit_fusion, dict(logits=X, tuned_logits=X[None], base_logits=X)),
    (decoding.fit_metric_energy, dict(metrics=X, targets=X[0])),
    (decoding.best_of_n_policy, dict(probs=X, rewards=X, n=3)),
    (decoding.best_of_n_kl_estimate, dict(log_prob=-X, n=3)),
    (decoding.soft_nms, dict(boxes=X[:, :4], scores=ONES)),
    (heads.spherical_head, dict(weight=X)),
    (heads.spherical_update, dict(head=HEAD, labels=IDS, gradient=GRADIENT, learning_rate=0.1)),
    (heads.shortlist_head, dict(weight=X, rank=2)),
    (heads.shortlist_top_k, dict(hidden=X, head=heads.ShortlistHead(X, X.T[:, :2], X[:, :2]), k=2, size=3)),
    (heads.sample_classes, dict(key=KEY, labels=IDS, classes=C, size=5)),
    (heads.partial_fc_loss, dict(features=X, weight=X.T, labels=IDS, key=KEY, size=4)),
    (heads.augment_and_reduce_bound, dict(logits=X, labels=IDS)),
    (heads.vq_top_k, dict(hidden=X, codebook=X, codes=IDS, k=2)),
    (heads.vq_codebook, dict(weight=X, size=2, key=KEY)),
    (losses.cosine_logits, dict(features=X, weight=X.T)),
    (losses.distance_covariance, dict(x=X, y=X)),
    (losses.group_relative_advantage, dict(rewards=X)),
    (losses.token_rewards, dict(log_prob=X, reference=X)),
    (losses.tversky_loss, dict(logits=X, labels=IDS)),
    *((f, dict(x=X)) for f in (norms.layer_norm, norms.rms_norm, norms.crms_norm)),
    (norms.power_norm, dict(x=X, state=POWER[0], backward=POWER[1], train=True)),
    (norms.unified_norm, dict(x=X, state=UNIFIED[0], backward=UNIFIED[1], train=True)),
    (norms.evonorm_b0, dict(x=Q, running_variance=ONES, train=True)),
    (norms.evonorm_s0, dict(x=Q)),
    (norms.alpha_batch_norm, dict(x=Q, mean=ONES, variance=ONES, source_weight=0.5)),
    (norms.balanced_batch_norm, dict(x=Q, state=norms.balanced_batch_norm_init(4), train=True)),
    (norms.mix_ln_residual, dict(x=X, branch=jnp.sin, norm=norms.rms_norm, layer=0, num_post=1)),
    (norms.mix_ln_num_post, dict(layers=4)),
    (norms.weight_condition, dict(weight=X)),
    (activations.maxout, dict(x=X, pieces=2)),
    (activations.relu_classifier, dict(logits=X)),
    (activations.periodic_binarize, dict(weight=X)),
    (activations.approximate_sign, dict(x=X)),
]
LOSSES = {e.function: e for e in ENTRIES if e.loss}


def traced_options(function, given):
    """The options that are numbers or switches, each with a value to trace."""
    for name, parameter in inspect.signature(function).parameters.items():
        value, kind = given.get(name, parameter.default), str(parameter.annotation)
        if value is None and kind.startswith(("bool", "int", "float")):
            value = {"b": False, "i": 1, "f": 0.5}[kind[0]]
        if isinstance(value, (bool, int, float)):
            yield name, jnp.asarray(value)


def check(function, given):
    def traced(**more):
        def arrays(more):
            return [x for x in jax.tree.leaves(function(**{**given, **more})) if isinstance(x, jax.Array)]

        return jax.eval_shape(arrays, more)

    traced()  # the case itself is valid
    for name, value in traced_options(function, given):
        try:
            traced(**{name: value})
        except Exception as error:
            assert type(error) in (TypeError, ValueError) and name in str(error), (name, error)


@pytest.mark.parametrize(("function", "given"), CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_options(function, given):
    check(function, given)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_options_of_losses(loss):
    entry, inputs = LOSSES[loss], make_inputs(0, (N,), C)
    arrays = {option: inputs[source] for option, source in entry.arrays.items()}
    check(functools.partial(loss, X, inputs[entry.inputs[0]]), {**entry.options, **arrays})
