"""Losses of embeddings, not of one row of logits."""

TESTED_IN = {
    "tests/losses/test_metric.py": (
        "jaxsoft.losses: dot_regression_loss etf_classifier interval_quasimetric lorentz_distance "
        "lorentz_from_euclidean metric_mixup_loss nbc_softmax_loss neural_collapse_regularizer prototype_logits "
        "simplex_classifier stationary_representation_loss"
    ),
}
