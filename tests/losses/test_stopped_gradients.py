"""Arguments whose docstring calls them constants get the gradient 0, exactly, with the default options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import losses

RNG = np.random.default_rng(0)
X, T = (jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32) for _ in range(2))
P, Q = jax.nn.softmax(T), jax.nn.softmax(X)
LABELS = jnp.array([0, 2, 4])
TOP_P, TOP_IDS = jax.lax.top_k(P, 2)
LOG, OTHER, OLD, OLDER, MORE = (-jnp.asarray(RNG.exponential(size=(3, 4)), jnp.float32) for _ in range(5))
EDGES = jnp.linspace(-1.0, 1.0, 6)
ROW, EVIDENCE = X[:, 0], T[:, 0]

# By function: the call, as a function of the constants, and these.
CONSTANTS = {
    "distillation_loss": (lambda t: losses.distillation_loss(X, t, temperature=2.0), [T]),
    "low_temperature_distillation_loss": (lambda t: losses.low_temperature_distillation_loss(X, t), [T]),
    "alpha_divergence": (lambda t: losses.alpha_divergence(X, t, alpha=0.5), [T]),
    "alpha_divergence, clipped": (
        lambda t: losses.alpha_divergence(X, t, alpha=0.5, clip=2.0, stop_teacher_gradient=False),
        [T],
    ),
    "adaptive_alpha_divergence_loss": (lambda t: losses.adaptive_alpha_divergence_loss(X, t), [T]),
    "ensemble_distillation_loss": (lambda t, u: losses.ensemble_distillation_loss(X, [t, u]), [T, 2 * T]),
    "progressive_self_distillation_loss": (
        lambda p: losses.progressive_self_distillation_loss(X, LABELS, p, alpha=0.4),
        [P],
    ),
    "top_k_distillation_loss": (lambda p: losses.top_k_distillation_loss(X, TOP_IDS, p), [TOP_P]),
    "binary_distillation_loss": (lambda t: losses.binary_distillation_loss(X, t), [T]),
    "squared_log_prob_loss": (lambda t: losses.squared_log_prob_loss(X, LABELS, t), [EVIDENCE]),
    "adapt_soft_labels": (
        lambda p: losses.adapt_soft_labels(LABELS, p, discard_below=0.1, trust_above=0.3),
        [P],
    ),
    "graph_on_logits_loss": (lambda t: losses.graph_on_logits_loss(X, t, k=2), [T]),
    "prototype_relation_distillation_loss": (
        lambda p, f: losses.prototype_relation_distillation_loss(X, T, p, f),
        [2 * X + T, T - X],
    ),
    "dynamic_contrastive_distillation_loss": (
        lambda t: losses.dynamic_contrastive_distillation_loss(X[:, :3], t, k=1),
        [T[:, :3]],
    ),
    "histogram_loss": (lambda t, e: losses.histogram_loss(X, t, e), [ROW / 9, EDGES]),
    "hl_gauss_targets": (lambda t, e: losses.hl_gauss_targets(t, e), [ROW / 9, EDGES]),
    "two_hot_targets": (lambda t, c: losses.two_hot_targets(t, c), [ROW / 9, EDGES]),
    "categorical_projection_targets": (
        lambda a, p, c: losses.categorical_projection_targets(a, p, c),
        [X / 9, P, EDGES],
    ),
    "dpo_loss": (lambda a, b: losses.dpo_loss(LOG, OTHER, a, b), [OLD, OLDER]),
    "f_dpo_loss": (lambda a, b: losses.f_dpo_loss(LOG, OTHER, a, b, divergence="alpha"), [OLD, OLDER]),
    "xpo_loss": (lambda a, b: losses.xpo_loss(LOG, OTHER, a, b, MORE), [OLD, OLDER]),
    "margin_matching_loss": (
        lambda a, b, c, d: losses.margin_matching_loss(LOG, OTHER, a, b, c, d, bt_beta=1.5),
        [OLD, OLDER, MORE, -MORE],
    ),
    "direct_nash_loss": (
        lambda a, b, c, d: losses.direct_nash_loss(LOG, OTHER, a, b, c, d),
        [OLD, OLDER, MORE, -MORE],
    ),
    "sparse_po_loss": (
        lambda a, b: losses.sparse_po_loss(
            LOG, OTHER, a, b, MORE, -MORE, chosen_mask=-LOG, rejected_mask=-OTHER
        ),
        [OLD, OLDER],
    ),
    "token_rewards": (lambda a: losses.token_rewards(LOG, a, to_go=True), [OLD]),
    "oreo_loss": (lambda a, r: losses.oreo_loss(LOG, a, OTHER, r), [OLD, ROW]),
    "clipped_policy_loss": (lambda a, b: losses.clipped_policy_loss(LOG, a, b), [OLD, MORE]),
    "cispo_loss": (lambda a, b: losses.cispo_loss(LOG, a, b), [OLD, MORE]),
    "f_dpg_reward": (lambda a, b, z: losses.f_dpg_reward(a, b, log_partition=z), [LOG, OLD, OLDER]),
    "f_dpg_loss": (
        lambda a, q, z: losses.f_dpg_loss(LOG, a, q, log_partition=z, baseline=z),
        [OLD, OLDER, MORE],
    ),
    "list_mle_loss": (lambda r: losses.list_mle_loss(X, r), [T]),
    "pairwise_logistic_loss": (lambda r: losses.pairwise_logistic_loss(X, r), [T]),
    "approx_ndcg_loss": (lambda r: losses.approx_ndcg_loss(X, r), [T]),
    "softmax_loss_at_k": (lambda q: losses.softmax_loss_at_k(X, LABELS, quantile=q), [ROW]),
    "loss_based_weights": (lambda l: losses.loss_based_weights(l), [-LOG]),
    "feasible_learning_loss": (lambda m: losses.feasible_learning_loss(-LOG, m, epsilon=0.1), [-OTHER]),
    "feasible_dual_update": (
        lambda l: losses.feasible_dual_update(-OTHER, l, epsilon=0.1, learning_rate=0.1),
        [-LOG],
    ),
    "shrink_class_space_loss": (lambda p: losses.shrink_class_space_loss(X, p), [P]),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_get_no_gradient(name):
    call, constants = CONSTANTS[name]

    def total(constants):
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(call(*constants)))

    gradients = jax.jit(jax.grad(total))(constants)  # compiled, almost nothing is left to compute
    assert not any(np.any(g) for g in gradients), [i for i, g in enumerate(gradients) if np.any(g)]
