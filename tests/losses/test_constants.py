"""Inputs that are constants to the gradient: teachers, references, targets, judgements, weights made of losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import losses as L
from jaxsoft import normalizers

pytestmark = pytest.mark.whole  # the cases are losses

RNG = np.random.default_rng(0)
SHAPE = (3, 4)


def array(*shape):
    return jnp.asarray(0.1 + 0.8 * RNG.random(shape or SHAPE), jnp.float32)


Y = jnp.array([2, 0, 3])
X, T, P = array(), array(), jax.nn.softmax(3 * array())
PAIR = {name: array(3) for name in ("chosen", "rejected", "reference_chosen", "reference_rejected")}
TOKENS = dict(log_prob=array() - 1, old_log_prob=array() - 1, advantages=array())
SAMPLES = dict(log_prob=array() - 1, log_target=array(), proposal_log_prob=array() - 1)
BINS = jnp.linspace(0.0, 1.0, 5)
SQUARE, OTHER = array(4, 4), array(4, 4)
TEACHER = dict(logits=X, teacher_logits=T)
LIST = dict(scores=X, relevance=3 * T)


def hidden(function, **options):
    """The function of arrays that go by name, with fixed options."""
    return lambda **arrays: function(**arrays, **options)


# The function, its floating arrays, and which of them are constants.
CASES = {
    "list_mle_loss": (L.list_mle_loss, LIST, "relevance"),
    "pairwise_logistic_loss": (L.pairwise_logistic_loss, LIST, "relevance"),
    "pairwise_logistic_loss, hinge": (hidden(L.pairwise_logistic_loss, kind="hinge"), LIST, "relevance"),
    "approx_ndcg_loss": (L.approx_ndcg_loss, LIST, "relevance"),
    "softmax_loss_at_k": (
        lambda logits, quantile: L.softmax_loss_at_k(logits, Y, quantile=quantile),
        dict(logits=X, quantile=array(3)),
        "quantile",
    ),
    "emma_loss": (
        lambda logits, margin_lipschitz: L.emma_loss(
            logits, Y, margin_lipschitz=margin_lipschitz, radius=1e-3
        ),
        dict(logits=X, margin_lipschitz=array()),
        "",
    ),
    **{
        f"distillation_loss, {divergence}": (
            hidden(L.distillation_loss, divergence=divergence),
            TEACHER,
            "teacher_logits",
        )
        for divergence in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
    },
    "low_temperature_distillation_loss": (L.low_temperature_distillation_loss, TEACHER, "teacher_logits"),
    "alpha_divergence": (hidden(L.alpha_divergence, alpha=0.5), TEACHER, "teacher_logits"),
    "alpha_divergence, clipped": (
        hidden(L.alpha_divergence, alpha=-0.5, clip=3.0, stop_teacher_gradient=False),
        TEACHER,
        "teacher_logits",
    ),
    "adaptive_alpha_divergence_loss": (L.adaptive_alpha_divergence_loss, TEACHER, "teacher_logits"),
    "binary_distillation_loss": (L.binary_distillation_loss, TEACHER, "teacher_logits"),
    "graph_on_logits_loss": (hidden(L.graph_on_logits_loss, k=2), TEACHER, "teacher_logits"),
    "ensemble_distillation_loss": (
        lambda logits, first, second: L.ensemble_distillation_loss(logits, [first, second]),
        dict(logits=X, first=T, second=array()),
        "first second",
    ),
    "progressive_self_distillation_loss": (
        lambda logits, previous: L.progressive_self_distillation_loss(logits, Y, previous, alpha=0.4),
        dict(logits=X, previous=P),
        "previous",
    ),
    "squared_log_prob_loss": (
        lambda logits, teacher_log_prob: L.squared_log_prob_loss(logits, Y, teacher_log_prob),
        dict(logits=X, teacher_log_prob=-array(3)),
        "teacher_log_prob",
    ),
    **{
        f"top_k_distillation_loss, {tail}": (
            lambda logits, teacher_probabilities, tail=tail: L.top_k_distillation_loss(
                logits, jnp.tile(jnp.arange(2), (3, 1)), teacher_probabilities, tail=tail
            ),
            dict(logits=X, teacher_probabilities=P[:, :2]),
            "teacher_probabilities",
        )
        for tail in ("bucket", "drop", "renormalize")
    },
    "dynamic_contrastive_distillation_loss": (
        hidden(L.dynamic_contrastive_distillation_loss, k=2),
        dict(logits=SQUARE, teacher_logits=OTHER),
        "teacher_logits",
    ),
    "prototype_relation_distillation_loss": (
        L.prototype_relation_distillation_loss,
        dict(prototypes=X, features=SQUARE, old_prototypes=T, old_features=OTHER),
        "old_prototypes old_features",
    ),
    "adapt_soft_labels": (
        lambda logits, teacher_probabilities: L.cross_entropy(
            logits, L.adapt_soft_labels(Y, teacher_probabilities, discard_below=0.0, trust_above=0.0)[0]
        ),
        dict(logits=X, teacher_probabilities=P),
        "teacher_probabilities",
    ),
    "shrink_class_space_loss": (
        lambda strong_logits, weak: L.shrink_class_space_loss(strong_logits, weak, threshold=0.5),
        dict(strong_logits=X, weak=P),
        "weak",
    ),
    "target_surrogate_loss": (
        hidden(L.target_surrogate_loss, step_size=0.5),
        dict(outputs=X, anchors=T, gradients=array()),
        "anchors gradients",
    ),
    "hl_gauss_targets": (
        lambda logits, target: L.cross_entropy(logits, L.hl_gauss_targets(target, BINS)),
        dict(logits=X, target=array(3)),
        "target",
    ),
    "two_hot_targets": (
        lambda logits, target: L.cross_entropy(logits, L.two_hot_targets(target, BINS[:4])),
        dict(logits=X, target=array(3)),
        "target",
    ),
    "categorical_projection_targets": (
        lambda logits, atoms, mass: L.cross_entropy(
            logits, L.categorical_projection_targets(atoms, mass, BINS[:4])
        ),
        dict(logits=X, atoms=array(), mass=P),
        "atoms mass",
    ),
    "histogram_loss": (
        lambda logits, target: L.histogram_loss(logits, target, BINS),
        dict(logits=X, target=array(3)),
        "target",
    ),
    "cispo_loss": (L.cispo_loss, TOKENS, "old_log_prob advantages"),
    "clipped_policy_loss": (L.clipped_policy_loss, TOKENS, "old_log_prob advantages"),
    "f_dpg_loss": (
        hidden(L.f_dpg_loss, divergence="jensen_shannon"),
        SAMPLES | dict(baseline=array(), log_partition=array()),
        "log_target proposal_log_prob baseline log_partition",
    ),
    "f_dpg_reward": (
        lambda log_prob, log_target: log_prob * L.f_dpg_reward(log_prob, log_target),
        dict(log_prob=array(), log_target=array()),
        "log_target",
    ),
    **{
        f"dpo_loss, {kind}": (hidden(L.dpo_loss, kind=kind), PAIR, "reference_chosen reference_rejected")
        for kind in ("sigmoid", "hinge", "ipo", "robust")
    },
    **{
        f"f_dpo_loss, {divergence}": (
            hidden(L.f_dpo_loss, divergence=divergence),
            PAIR,
            "reference_chosen reference_rejected",
        )
        for divergence in ("forward_kl", "jensen_shannon", "alpha")
    },
    "xpo_loss": (
        hidden(L.xpo_loss, alpha=0.5),
        PAIR | dict(reference_sample=array(3)),
        "reference_chosen reference_rejected",
    ),
    "margin_matching_loss": (
        hidden(L.margin_matching_loss, bt_beta=0.7),
        PAIR | dict(chosen_score=array(3), rejected_score=array(3)),
        "reference_chosen reference_rejected chosen_score rejected_score",
    ),
    "direct_nash_loss": (
        L.direct_nash_loss,
        dict(
            first=array(3), second=array(3), reference_first=array(3), reference_second=array(3),
            first_win_rate=array(3), second_win_rate=array(3),
        ),
        "reference_first reference_second first_win_rate second_win_rate",
    ),
    "token_rewards": (L.token_rewards, dict(log_prob=X, reference=T), "reference"),
    **{
        f"oreo_loss, {kind}": (
            hidden(L.oreo_loss, kind=kind),
            dict(log_prob=X, reference=T, values=array(), reward=array(3)),
            "reference reward",
        )
        for kind in ("suffix", "token", "single_step", "trajectory")
    },
    "sparse_po_loss": (
        hidden(L.sparse_po_loss, chosen_mask=jnp.ones(SHAPE), rejected_mask=jnp.ones(SHAPE)),
        dict(
            chosen=X, rejected=array(), reference_chosen=T, reference_rejected=array(),
            chosen_kl=array(), rejected_kl=array(),
        ),
        "reference_chosen reference_rejected",
    ),
    "loss_based_weights": (
        lambda values, of: jnp.sum(values * L.loss_based_weights(of)),
        dict(values=X, of=T),
        "of",
    ),
    "easy_llp_weights": (
        lambda values, proportions: values * L.easy_llp_weights(proportions, priors=0.3, bag_size=4),
        dict(values=X, proportions=T),
        "",
    ),
    "feasible_learning_loss": (
        hidden(L.feasible_learning_loss, epsilon=0.2),
        dict(losses=X, multipliers=T),
        "multipliers",
    ),
    "generalized_gaussian_shape": (
        lambda w, v: jnp.sum(v) * L.generalized_gaussian_shape(w),
        dict(w=X, v=T),
        "w",
    ),
    "sdm_activation": (
        normalizers.sdm_activation,
        dict(logits=X, similarity=array(3), distance=array(3)),
        "similarity distance",
    ),
    "distance_quantile": (
        lambda x, distances, calibration: x * normalizers.distance_quantile(distances, calibration),
        dict(x=array(3), distances=array(3), calibration=array(2, 5)),
        "distances calibration",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_constants_have_no_gradient_and_the_others_have_one(name):
    function, arrays, constants = CASES[name]

    def total(arrays):
        leaves = jax.tree.leaves(function(**arrays))
        return sum(jnp.vdot(a, jnp.arange(1.0, a.size + 1).reshape(a.shape)) for a in leaves)

    gradient = jax.jit(jax.grad(total))(arrays)
    without = {key for key, a in gradient.items() if not np.any(a)}
    assert without == set(constants.split()), without
