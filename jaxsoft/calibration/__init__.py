"""Calibration, uncertainty, out-of-distribution scores and conformal prediction.

Scores that read rows of logits take an array or `linear_logits`, stored or sharded. Every `*_score` of an input
is higher where the model knows it; other libraries use the opposite sign for outliers. `jaxsoft.entropy`,
`jaxsoft.losses.brier_loss` and `jaxsoft.normalizers.sdm_activation` belong here as well.

```python
import jax
import jax.numpy as jnp

import jaxsoft
from jaxsoft import calibration

hidden, weight = (
    jax.random.normal(jax.random.key(0), (6, 16)),
    jax.random.normal(jax.random.key(1), (16, 1000)),
)
labels = jnp.array([3, 14, 159, 265, 358, 979])
logits = jaxsoft.linear_logits(hidden, weight)  # no logits are stored

temperature = calibration.fit_temperature(logits, labels)
confidence = calibration.max_softmax_probability(jaxsoft.temperature(logits, temperature))
error = calibration.calibration_error(confidence, jaxsoft.top_k_accuracy(logits, labels))
```
"""

from __future__ import annotations

from jaxsoft.calibration.conformal import (
    RiskControl,
    Selection,
    benjamini_hochberg,
    conformal_p_values,
    conformal_quantile,
    conformal_risk_control,
    conformal_select,
    nonconformity_score,
    prediction_set,
)
from jaxsoft.calibration.measures import (
    Reliability,
    calibration_error,
    classwise_calibration_error,
    reliability,
    reliability_plot,
)
from jaxsoft.calibration.out_of_distribution import (
    CentroidDistance,
    ClassGaussians,
    KnnMemory,
    SoftmaxCentroids,
    fit_class_gaussians,
    fit_softmax_centroids,
    knn_memory_init,
    knn_memory_logits,
    knn_memory_update,
    mahalanobis_score,
    naive_bayes_logits,
    odin_score,
    perturb_inputs,
    softmax_centroid_distance,
)
from jaxsoft.calibration.scaling import (
    Scaling,
    apply_scaling,
    fit_matrix_scaling,
    fit_temperature,
    fit_vector_scaling,
)
from jaxsoft.calibration.scores import (
    clip_uncertainty,
    energy_score,
    label_non_uniformity,
    least_confidence,
    margin_score,
    max_logit,
    max_softmax_probability,
)
from jaxsoft.calibration.uncertainty import (
    PredictiveUncertainty,
    cheat_corrected_confidence,
    cheat_corrected_variance,
    expected_pairwise_kl,
    mix_probabilities,
    mutual_information,
    pair_covariance,
    predictive_uncertainty,
    t_similarity,
)

__all__ = [
    "CentroidDistance",
    "ClassGaussians",
    "KnnMemory",
    "PredictiveUncertainty",
    "Reliability",
    "RiskControl",
    "Scaling",
    "Selection",
    "SoftmaxCentroids",
    "apply_scaling",
    "benjamini_hochberg",
    "calibration_error",
    "cheat_corrected_confidence",
    "cheat_corrected_variance",
    "classwise_calibration_error",
    "clip_uncertainty",
    "conformal_p_values",
    "conformal_quantile",
    "conformal_risk_control",
    "conformal_select",
    "energy_score",
    "expected_pairwise_kl",
    "fit_class_gaussians",
    "fit_matrix_scaling",
    "fit_softmax_centroids",
    "fit_temperature",
    "fit_vector_scaling",
    "knn_memory_init",
    "knn_memory_logits",
    "knn_memory_update",
    "label_non_uniformity",
    "least_confidence",
    "mahalanobis_score",
    "margin_score",
    "max_logit",
    "max_softmax_probability",
    "mix_probabilities",
    "mutual_information",
    "naive_bayes_logits",
    "nonconformity_score",
    "odin_score",
    "pair_covariance",
    "perturb_inputs",
    "prediction_set",
    "predictive_uncertainty",
    "reliability",
    "reliability_plot",
    "softmax_centroid_distance",
    "t_similarity",
]
