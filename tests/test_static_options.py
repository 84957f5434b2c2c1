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
from jaxsoft import attention, calibration, losses, normalizers, rows

pytestmark = pytest.mark.whole  # the cases are losses

N, C = 4, 6
X, ONES, IDS = np.ones((N, C), np.float32), np.ones(N, np.float32), np.arange(N, dtype=np.int32)
Q = np.ones((1, 4, 2, 4), np.float32)
KEY = jax.random.key(0)

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
    (losses.cosine_logits, dict(features=X, weight=X.T)),
    (losses.distance_covariance, dict(x=X, y=X)),
    (losses.group_relative_advantage, dict(rewards=X)),
    (losses.token_rewards, dict(log_prob=X, reference=X)),
    (losses.tversky_loss, dict(logits=X, labels=IDS)),
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
