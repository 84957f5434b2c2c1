"""Borders: equal scores, margins that are just reached, and the smallest rows, lists and batches; values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import near

from jaxsoft import losses as L

pytestmark = pytest.mark.whole  # the cases are losses

LOG2 = np.log(2)
ONE, TWO = np.array([0.7]), np.array([0.7, -0.2])
RELEVANCE = np.array([2.0, 2.0, 1.0])
EQUAL = np.full(3, 0.4)
LEAD = np.array([1.0, 0.25, 0.0])  # the leads are 0.75, 1 and 0.25
E = np.exp


def at(f, x, *args, **options):
    """Value and gradient of `f(x, *args)`."""
    both = jax.jit(jax.value_and_grad(lambda x: jnp.sum(f(x, *args, **options))))
    return lambda: both(jnp.asarray(x))


# What is called; its value and its gradient.
CASES = {
    # equal relevance, equal scores
    "list_mle_loss, equal relevance": (
        at(L.list_mle_loss, TWO, np.array([1, 1])),
        (np.log1p(E(-0.9)), [-1 / (1 + E(0.9)), 1 / (1 + E(0.9))]),
    ),
    "list_mle_loss, equal scores": (
        at(L.list_mle_loss, EQUAL, np.array([0, 2, 1])),
        (np.log(3) + LOG2, [1 / 3 + 1 / 2, -2 / 3, 1 / 3 - 1 / 2]),
    ),
    "pairwise_logistic_loss, equal relevance": (
        at(L.pairwise_logistic_loss, TWO, np.array([1.0, 1.0])),
        (0, [0, 0]),
    ),
    "pairwise_logistic_loss, equal scores": (
        at(L.pairwise_logistic_loss, EQUAL, RELEVANCE),
        (LOG2, [-0.25, -0.25, 0.5]),
    ),
    "pairwise_logistic_loss, a margin just reached": (
        at(L.pairwise_logistic_loss, np.array([1.0, 0.25]), np.array([1, 0]), kind="hinge", margin=0.75),
        (0, None),
    ),
    "approx_ndcg_loss, equal scores": (
        at(L.approx_ndcg_loss, EQUAL[:2], np.array([1.0, 1.0])),
        (1 - 2 / np.log2(2.5) / (1 + 1 / np.log2(3)), [0, 0]),
    ),
    "approx_ndcg_loss, nothing relevant": (at(L.approx_ndcg_loss, TWO, np.zeros(2)), (0, [0, 0])),
    "softmax_loss_at_k, an equal k-th score": (
        at(L.softmax_loss_at_k, EQUAL, np.array(1), k=2),
        (0.5 * LOG2, [0.25, 0.25 * LOG2 - 0.5, 0.25]),
    ),
    "dual_focal_loss, equals of the label": (
        at(L.dual_focal_loss, np.array([0.4, 0.4, -0.6]), np.array(1), gamma=1.0),
        ((1 - (1 - E(-1)) / (2 + E(-1))) * np.log(2 + E(-1)), None),
    ),
    "dual_focal_loss, none below": (
        at(L.dual_focal_loss, EQUAL, np.array(2), gamma=1.0),
        (2 / 3 * np.log(3), None),
    ),
    "max_suppression_loss, equal scores": (
        at(L.max_suppression_loss, EQUAL, np.array(2), suppression=0.3),
        (np.log(3), [1 / 3 + 0.2, 1 / 3 - 0.1, -2 / 3 - 0.1]),
    ),
    "crammer_singer_loss, a margin just reached": (
        at(L.crammer_singer_loss, LEAD, np.array(0), margin=0.75),
        (0, [0, 0, 0]),
    ),
    "crammer_singer_loss, equal rivals": (
        at(L.crammer_singer_loss, EQUAL, np.array(1)),
        (1, [1, -1, 0]),
    ),
    "weston_watkins_loss, a margin just reached": (
        at(L.weston_watkins_loss, LEAD, np.array(0), margin=0.75),
        (0, [0, 0, 0]),
    ),
    "one_vs_rest_hinge_loss, margins just reached": (
        at(L.one_vs_rest_hinge_loss, np.array([1.0, -1.0]), np.array(0), power=1),
        (0, [0, 0]),
    ),
    "energy_margin_loss, just reached": (
        at(L.energy_margin_loss, np.array([0.0]), np.array(False), m_in=0.0),
        (0, [0]),
    ),
    "sparsemax_loss, equal scores": (
        at(L.sparsemax_loss, EQUAL, np.array(0)),
        (1 / 3, [-2 / 3, 1 / 3, 1 / 3]),
    ),
    "sparsemax_loss, the lead just reached": (
        at(L.sparsemax_loss, np.array([1.0, 0.0]), np.array(0)),
        (0, [0, 0]),
    ),
    "entmax15_loss, the lead just reached": (
        at(L.entmax15_loss, np.array([2.0, 0.0]), np.array(0)),
        (0, [0, 0]),
    ),
    # one and two classes
    **{
        f"{f.__name__}, one class": (at(f, ONE, np.array(0), **options), (0, [0]))
        for f, options in (
            (L.cross_entropy, dict(label_smoothing=0.1)),
            (L.cross_entropy, dict(label_smoothing=0.1, smoothing="others")),
            (L.poly_loss, {}),
            (L.focal_loss, {}),
            (L.max_suppression_loss, {}),
            (L.normalized_loss, {}),
            (L.normalized_loss, dict(loss="mae")),
            (L.symmetric_cross_entropy, {}),
            (L.weston_watkins_loss, {}),
            (L.crammer_singer_loss, {}),
            (L.one_vs_each_loss, {}),
            (L.sparsemax_loss, {}),
            (L.entmax15_loss, {}),
            (L.softmax_loss, {}),
            (L.pairwise_softmax_loss, {}),
            (L.brier_loss, {}),
            (L.confidence_penalty_loss, {}),
            (L.sparse_softmax_cross_entropy, dict(k=1)),
        )
    },
    "cross_entropy, two classes": (
        at(L.cross_entropy, TWO, np.array(1), label_smoothing=0.2, smoothing="others"),
        (np.log1p(E(0.9)) - 0.2 * 0.9, None),
    ),
    "normalized_loss, two classes": (
        at(L.normalized_loss, TWO, np.array(1), loss="mae"),
        (1 / (1 + E(-0.9)), None),
    ),
    "sparse_softmax_cross_entropy, k = 1": (
        at(L.sparse_softmax_cross_entropy, TWO, np.array(0), k=1),
        (0, [0, 0]),
    ),
    "sparse_softmax_cross_entropy, k = V": (
        at(L.sparse_softmax_cross_entropy, TWO, np.array(1), k=2),
        (np.log1p(E(0.9)), None),
    ),
    "softmax_loss_at_k, k = V": (
        at(L.softmax_loss_at_k, TWO, np.array(0), k=2),
        (-0.9 / (1 + E(-0.9)), None),
    ),
    # one example, one pair, one token
    "list_mle_loss, one item": (at(L.list_mle_loss, ONE, np.array([3])), (0, [0])),
    "pairwise_logistic_loss, one item": (at(L.pairwise_logistic_loss, ONE, np.array([3])), (0, [0])),
    "approx_ndcg_loss, one item": (at(L.approx_ndcg_loss, ONE, np.array([3])), (0, [0])),
    "group_relative_advantage, one": (at(L.group_relative_advantage, ONE), (0, [0])),
    "distance_covariance, two": (
        at(lambda x: L.distance_covariance(x, x), np.array([[0.0], [2.0]])),
        (1, None),
    ),
    "effective_entropy_loss, two": (
        at(L.effective_entropy_loss, np.array([[0.0], [0.5]])),
        (-np.log(3 * 0.5), [[2], [-2]]),
    ),
    "effective_entropy_loss, one": (at(L.effective_entropy_loss, np.array([[0.5]])), (0, [[0]])),
    "clip_loss, one pair": (at(L.clip_loss, np.array([[0.5]])), (0, [[0]])),
    "transducer_loss, one frame without labels": (
        at(L.transducer_loss, TWO[None, None], np.zeros(0, int)),
        (np.log1p(E(-0.9)), None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_borders(name, x64):
    call, (value, gradient) = CASES[name]
    got, slope = call()
    near(got, value, 1e-9)
    assert np.all(np.isfinite(slope))
    if gradient is not None:
        near(slope, gradient, 1e-9)
