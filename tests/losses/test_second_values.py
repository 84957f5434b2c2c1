"""Options at a second value, one off the default or on another branch, against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import near, sigmoid, softmax

from jaxsoft import losses

pytestmark = pytest.mark.whole  # the cases are losses

RNG = np.random.default_rng(0)
N, C = 4, 5
X, T = 2 * RNG.normal(size=(N, C)), 2 * RNG.normal(size=(N, C))
Y = np.array([2, 0, 4, 2])
W = 0.5 + RNG.random(C)
P = softmax(X)
P_Y = P[np.arange(N), Y]
NLL = -np.log(P_Y)
X_Y = X[np.arange(N), Y]
ONE_HOT = np.eye(C)[Y]
A, B, A0, B0 = RNG.normal(size=(4, 6)) - 1  # log-probabilities: chosen, rejected, the reference's
ADVANTAGES = np.array([1.0, -1, 2, -0.5, 1, -2])
RATIO = np.exp(3 * (A - A0))  # some far from 1
PAIRS = RNG.random((N, N))


def of_row(f, *rows):
    return np.stack([f(*row) for row in zip(*rows)])


def clipped_policy(log_ratio, advantage, dual_clip):
    rho = np.exp(np.clip(log_ratio, -0.5, 0.5))
    loss = np.maximum(-advantage * rho, -advantage * np.clip(rho, 0.7, 1.1))
    return np.where(advantage < 0, np.minimum(loss, -advantage * dual_clip), loss)


def f_dpo(derivative):
    margin = 0.7 * (derivative(A - A0) - derivative(B - B0))
    return 0.8 * np.logaddexp(0, -margin) + 0.2 * np.logaddexp(0, margin)


def hardest(weight, kl_weight, k=2, margin=0.3):
    x, t, out = 3 * X[:, :N], 3 * T[:, :N], []
    for i in range(N):
        others = sorted(set(range(N)) - {i}, key=lambda j: -t[i, j])[:k]
        chosen = [i, *others]
        p, q = softmax(t[i, chosen]), softmax(x[i, chosen])
        hinge = sum(max(margin + x[i, j] - x[i, i], 0) for j in others)
        out.append((1 - p[0]) * (-np.log(q[0]) + weight * hinge + kl_weight * np.sum(p * np.log(p / q))))
    return np.stack(out)


def spacings(x, m, min_gap):
    n = len(x)
    ordered = np.sort(x, axis=0)
    gaps = np.maximum(ordered[m:] - ordered[:-m], min_gap)
    entropy = np.mean(np.log((n + 1) / m * gaps), axis=0).sum()
    covariance = np.cov(x.T)
    return np.sum(covariance**2) - np.sum(np.diag(covariance) ** 2) - entropy


def standard_score(eps):
    return (X_Y - X.mean(1)) / (X.std(1) + eps)


def binary(t, x, gamma=0.0, alpha=None):
    """The focal binary cross-entropy of each class."""
    wrong = t * sigmoid(-x) + (1 - t) * sigmoid(x)
    balance = 1 if alpha is None else t * alpha + (1 - t) * (1 - alpha)
    return balance * wrong**gamma * (t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x))


def gumbel(low, high, cap):
    z = np.clip(X, low, high)
    terms = np.where(ONE_HOT, np.exp(-z), -np.log(-np.expm1(-np.exp(-z))))
    return np.clip(terms, 0, cap)


def similarity(cosine, power):
    return 2 * ((cosine + 1) / 2) ** power - 1


def sphereface2_balance(bias):
    """Both sides of the equation of `sphereface2_bias_init`, whose difference is 0."""
    at = similarity(0, 1.5)
    own, others = 30 * (at - 0.2) + bias, 30 * (at + 0.2) + bias
    return 0.6 * sigmoid(-own) - 0.4 * 6 * sigmoid(others)


def advantages(r, epsilon, unbiased, scale=True):
    centred = r - r.mean(-1, keepdims=True)
    return centred / (r.std(-1, keepdims=True, ddof=int(unbiased)) + epsilon) if scale else centred


def reward(log_ratio, limit):
    return -(np.clip(log_ratio, -limit, limit) + 1)  # -f' of t log t


L = losses
FOCAL_SUM = np.sum((1 - P) ** 1.5 * -np.log(P), 1)
GENERALIZED = (1 - P_Y**0.3) / (C - np.sum(P**0.3, 1))
CASES = {
    "active_passive_loss, q": (
        lambda: L.active_passive_loss(X, Y, active="generalized", q=0.3, alpha=2.0, beta=0.5),
        2 * GENERALIZED + 0.5 * (1 - P_Y),
    ),
    "active_passive_loss, gamma and label_floor": (
        lambda: L.active_passive_loss(
            X, Y, active="focal", passive="reverse", gamma=1.5, label_floor=0.01, alpha=0.0, beta=3.0
        ),
        3 * -np.log(0.01) * (1 - P_Y),
    ),
    "active_passive_loss, focal alone": (
        lambda: L.active_passive_loss(X, Y, active="focal", gamma=1.5, beta=0.0),
        (1 - P_Y) ** 1.5 * NLL / FOCAL_SUM,
    ),
    "symmetric_cross_entropy, label_floor": (
        lambda: L.symmetric_cross_entropy(X, Y, alpha=0.3, beta=0.2, label_floor=0.01),
        0.3 * NLL - 0.2 * np.log(0.01) * (1 - P_Y),
    ),
    "trades_loss, beta=0": (lambda: L.trades_loss(X, T, Y, beta=0.0), NLL),
    "trades_loss, beta": (
        lambda: L.trades_loss(X, T, Y, beta=0.4),
        NLL + 0.4 * np.sum(P * np.log(P / softmax(T)), 1),
    ),
    "focal_loss, class_weights": (
        lambda: L.focal_loss(X, Y, gamma=0.5, class_weights=W),
        W[Y] * (1 - P_Y) ** 0.5 * NLL,
    ),
    "focal_loss, gamma=0": (lambda: L.focal_loss(X, Y, gamma=0.0), NLL),
    "poly1_focal_loss": (
        lambda: L.poly1_focal_loss(X, Y, gamma=1.5, epsilon=-0.5),
        (1 - P_Y) ** 1.5 * NLL - 0.5 * (1 - P_Y) ** 2.5,
    ),
    "sigmoid_focal_loss, class_weights and alpha": (
        lambda: L.sigmoid_focal_loss(X, Y, gamma=1.5, alpha=0.9, class_weights=W),
        np.sum(W * binary(ONE_HOT, X, 1.5, 0.9), 1),
    ),
    "sigmoid_focal_loss, gamma=0 and alpha=0": (
        lambda: L.sigmoid_focal_loss(X, softmax(T), gamma=0.0, alpha=0.0),
        np.sum(binary(softmax(T), X, 0.0, 0.0), 1),
    ),
    "quality_focal_loss, gamma and alpha": (
        lambda: L.quality_focal_loss(X, softmax(T), gamma=1.5, alpha=0.3),
        (0.3 * softmax(T) + 0.7 * (1 - softmax(T)))
        * np.abs(softmax(T) - sigmoid(X)) ** 1.5
        * binary(softmax(T), X),
    ),
    "binary_distillation_loss, beta=0": (
        lambda: L.binary_distillation_loss(X, T, beta=0.0),
        np.sum(binary(sigmoid(T), X), 1),
    ),
    "gumbel_optimized_loss, the bounds": (
        lambda: L.gumbel_optimized_loss(X, Y, low=-1.0, high=0.5, cap=2.0, class_weights=W),
        np.sum(W * gumbel(-1.0, 0.5, 2.0), 1),
    ),
    "spherical_z_loss, eps": (
        lambda: L.spherical_z_loss(X, Y, a=0.7, b=0.3, eps=0.5),
        np.logaddexp(0, 0.7 * (0.3 - standard_score(0.5))) / 0.7,
    ),
    "spherical_z_loss, eps=0": (
        lambda: L.spherical_z_loss(X, Y, eps=0.0),
        np.logaddexp(0, -standard_score(0.0)),
    ),
    "crammer_singer_loss, margin": (
        lambda: L.crammer_singer_loss(X, Y, margin=3.0),
        np.maximum(np.max(X - X_Y[:, None] + 3 * (1 - ONE_HOT), 1), 0),
    ),
    "crammer_singer_loss, margin=0": (
        lambda: L.crammer_singer_loss(X, Y, margin=0.0),
        np.max(X, 1) - X_Y,
    ),
    "weston_watkins_loss, margin=0": (
        lambda: L.weston_watkins_loss(X, Y, margin=0.0, power=2),
        np.sum(np.maximum(X - X_Y[:, None], 0) ** 2, 1),
    ),
    "comp_sum_loss, tau=2": (lambda: L.comp_sum_loss(X, Y, tau=2.0), 1 - P_Y),
    "comp_sum_loss, tau=0": (lambda: L.comp_sum_loss(X, Y, tau=0.0), 1 / P_Y - 1),
    "energy_margin_loss, temperature": (
        lambda: L.energy_margin_loss(X, Y > 2, m_in=-3.0, m_out=-1.0, temperature=0.5),
        of_row(
            lambda e, out: max(-1 - e if out else e + 3, 0) ** 2,
            -0.5 * np.log(np.sum(np.exp(X / 0.5), 1)),
            Y > 2,
        ),
    ),
    "sphereface2_bias_init": (
        lambda: sphereface2_balance(
            L.sphereface2_bias_init(7, scale=30.0, margin=0.2, power=1.5, positive_weight=0.6)
        ),
        0.0,
    ),
    "softmax_loss_at_k, k": (
        lambda: L.softmax_loss_at_k(X, Y, k=2, temperature=0.5, weight_temperature=3.0),
        sigmoid((X_Y - np.sort(X, 1)[:, -2]) / 3)
        * np.log(np.sum((1 - ONE_HOT) * np.exp((X - X_Y[:, None]) / 0.5), 1)),
    ),
    "softmax_loss_at_k, k=1": (
        lambda: L.softmax_loss_at_k(X, Y, k=1),
        sigmoid(X_Y - np.max(X, 1)) * np.log(np.sum((1 - ONE_HOT) * np.exp(X - X_Y[:, None]), 1)),
    ),
    "dynamic_contrastive_distillation_loss, weights": (
        lambda: L.dynamic_contrastive_distillation_loss(
            3 * X[:, :N], 3 * T[:, :N], k=2, margin=0.3, margin_weight=0.4, distillation_weight=2.5
        ),
        hardest(0.4, 2.5),
    ),
    "dynamic_contrastive_distillation_loss, without": (
        lambda: L.dynamic_contrastive_distillation_loss(
            3 * X[:, :N], 3 * T[:, :N], k=1, margin_weight=0.0, distillation_weight=0.0
        ),
        hardest(0.0, 0.0, k=1),
    ),
    "metric_mixup_loss, margins": (
        lambda: L.metric_mixup_loss(PAIRS, PAIRS.T, positive_margin=0.2, negative_margin=0.8),
        PAIRS.T * np.maximum(PAIRS - 0.2, 0) + (1 - PAIRS.T) * np.maximum(0.8 - PAIRS, 0),
    ),
    "effective_entropy_loss, min_gap": (
        lambda: L.effective_entropy_loss(X, spacing=1, min_gap=0.6),
        spacings(X, 1, 0.6),
    ),
    "group_relative_advantage, epsilon": (
        lambda: L.group_relative_advantage(X, epsilon=0.5, unbiased=False),
        advantages(X, 0.5, unbiased=False),
    ),
    "group_relative_advantage, unbiased": (
        lambda: L.group_relative_advantage(X, epsilon=0.5),
        advantages(X, 0.5, unbiased=True),
    ),
    "group_relative_advantage, scale": (
        lambda: L.group_relative_advantage(X, scale=False),
        advantages(X, 0, unbiased=True, scale=False),
    ),
    "cispo_loss, max_log_ratio": (
        lambda: L.cispo_loss(3 * A, 3 * A0, ADVANTAGES, cap=100.0, max_log_ratio=0.5),
        -np.clip(RATIO, np.exp(-0.5), np.exp(0.5)) * ADVANTAGES * 3 * A,
    ),
    "cispo_loss, cap and floor": (
        lambda: L.cispo_loss(3 * A, 3 * A0, ADVANTAGES, cap=2.0, floor=0.5),
        -np.clip(RATIO, 0.5, 2) * ADVANTAGES * 3 * A,
    ),
    "clipped_policy_loss, every option": (
        lambda: L.clipped_policy_loss(
            3 * A, 3 * A0, ADVANTAGES, clip_low=0.3, clip_high=0.1, dual_clip=1.2, max_log_ratio=0.5
        ),
        clipped_policy(3 * (A - A0), ADVANTAGES, 1.2),
    ),
    "clipped_policy_loss, no bound": (
        lambda: L.clipped_policy_loss(
            3 * A, 3 * A0, ADVANTAGES, clip_low=0.3, clip_high=0.1, dual_clip=None, max_log_ratio=0.5
        ),
        clipped_policy(3 * (A - A0), ADVANTAGES, np.inf),
    ),
    "f_dpg_reward, max_log_ratio": (
        lambda: L.f_dpg_reward(3 * A, 3 * A0, divergence="reverse_kl", max_log_ratio=0.5),
        reward(3 * (A - A0), 0.5),
    ),
    "f_dpg_loss, max_log_ratio": (
        lambda: L.f_dpg_loss(3 * A, 3 * A0, divergence="reverse_kl", baseline=0.3, max_log_ratio=0.5),
        -(reward(3 * (A - A0), 0.5) - 0.3) * 3 * A,
    ),
    **{
        f"f_dpo_loss, {name} and label_smoothing": (
            lambda name=name: L.f_dpo_loss(
                A, B, A0, B0, beta=0.7, divergence=name, alpha=0.4, label_smoothing=0.2
            ),
            f_dpo(derivative),
        )
        for name, derivative in {
            "reverse_kl": lambda r: r,
            "forward_kl": lambda r: -np.exp(-r),
            "jensen_shannon": lambda r: np.log(sigmoid(r)),
            "alpha": lambda r: -np.exp(-0.4 * r) / 0.4,
        }.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_second_values(name, x64):
    call, expected = CASES[name]
    near(call(), expected, 1e-9)


def test_a_reversed_gradient_of_another_strength(x64):
    weight = jnp.asarray(RNG.normal(size=(C, N)))

    def loss(x, reverse):
        options = dict(discriminator=lambda x: x @ weight)
        if reverse:
            return jnp.sum(losses.domain_adversarial_loss(x, Y % N, strength=0.3, **options))
        return jnp.sum(losses.cross_entropy(x @ weight, Y % N))

    reversed_, plain = (jax.grad(loss)(jnp.asarray(X), reverse) for reverse in (True, False))
    near(reversed_, -0.3 * plain, 1e-12)
