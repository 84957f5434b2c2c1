"""Losses on cosines. A scale of 8 keeps logits of 1e4 exact."""

from conformance.entry import loss_entry
from jaxsoft import losses

COSFACE, ARCFACE = losses.additive_margin_loss, losses.additive_angular_margin_loss
CAUCHY, SPHEREFACE2, CIRCLE = losses.wrapped_cauchy_loss, losses.sphereface2_loss, losses.circle_loss
G = {"class_concentration": "class_weights"}
MILD = dict(scale=2.0, margin=0.25, stop_weight_gradient=False, shift=None)

ENTRIES = [
    loss_entry(losses.normalized_softmax_loss, scale=8.0),
    loss_entry(COSFACE, scale=8.0, margin=0.25),
    loss_entry(ARCFACE, scale=8.0, shift=None),
    loss_entry(ARCFACE, "easy margin", scale=8.0, easy_margin=True, shift=None),
    loss_entry(CAUCHY, arrays=G, scale=10.0, shift=None),
    loss_entry(SPHEREFACE2, scale=4.0, bias=0.5, shift=None),
    loss_entry(SPHEREFACE2, "power", scale=4.0, bias=-0.5, power=2.5, shift=None),
    # With constant weights, its gradient is not that of finite differences: tests/losses/test_margin.py.
    loss_entry(CIRCLE, labels="positives", **MILD),
    loss_entry(CIRCLE, "mask", labels="positive_mask", **MILD),
]

TESTED_IN = {
    "tests/losses/test_margin.py": (
        "jaxsoft.losses: cosine_logits l2_normalize sphereface2_bias_init wrapped_cauchy_logits"
    ),
}

_SCALED = [losses.normalized_softmax_loss, COSFACE, ARCFACE, CAUCHY, SPHEREFACE2, CIRCLE]
BAD_OPTIONS = [
    *((f, dict(scale=0.0), ValueError, ["scale", "> 0", "0.0"]) for f in _SCALED),
    *((f, dict(scale="64"), TypeError, ["scale", "number > 0", "'64'"]) for f in _SCALED),
    *(
        (f, dict(margin=-0.1), ValueError, ["margin", ">= 0", "-0.1"])
        for f in (COSFACE, ARCFACE, SPHEREFACE2, CIRCLE)
    ),
    (ARCFACE, dict(margin=28.6), ValueError, ["margin", "<= 3.14", "28.6"]),
    (ARCFACE, dict(easy_margin="yes"), TypeError, ["easy_margin", "True or False", "'yes'"]),
    (CAUCHY, dict(class_concentration=None), TypeError, ["class_concentration", "floating", "None"]),
    (SPHEREFACE2, dict(power=0.0), ValueError, ["power", "> 0", "0.0"]),
    (SPHEREFACE2, dict(positive_weight=1.5), ValueError, ["positive_weight", "<= 1", "1.5"]),
    (SPHEREFACE2, dict(bias="b"), TypeError, ["bias", "number", "'b'"]),
    (SPHEREFACE2, dict(straight_through=2), TypeError, ["straight_through", "True or False", "2"]),
    (CIRCLE, dict(stop_weight_gradient=None), TypeError, ["stop_weight_gradient", "True or False", "None"]),
]
