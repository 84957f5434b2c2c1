"""Softmax, losses and optimizers for JAX in which the logits are never stored.

The one-line change: write the logits as an expression instead of a matrix product.

    logits = hidden @ weight                          # an array of [tokens, vocab]
    logits = jaxsoft.linear_logits(hidden, weight)    # an expression: nothing is computed yet

    loss = jaxsoft.losses.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-4).mean()

Losses and functions of rows (`logsumexp`, `log_prob`, `entropy`, `top_k`, `label_rank`, `reduce_rows`) take a dense
array or `linear_logits`, and stream the latter. Normalizers (`softmax` and its alternatives) return an array of the
scores' shape, so they take dense scores; attention streams them.

The most used names of `rows` and `normalizers` are exported here as well; they are the same objects.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxsoft import kernels, normalizers, rows
from jaxsoft._version import __version__
from jaxsoft.normalizers import (
    adaptive_temperature_softmax,
    clipped_softmax,
    entmax,
    entmax15,
    gumbel_softmax,
    log_softmax,
    relu_weights,
    reweighted_attention_weights,
    scalable_softmax,
    self_adjust_softmax,
    sigmoid_weights,
    sink_softmax,
    softmax,
    softmax_n,
    softmax_one,
    softpick,
    softplus_attention_weights,
    sparse_softmax,
    sparsemax,
    stablemax,
    taylor_softmax,
)
from jaxsoft.rows import (
    LinearLogits,
    RowReduction,
    entropy,
    label_rank,
    linear_logits,
    log_prob,
    logsumexp,
    reduce_rows,
    shardings,
    softcap,
    stored_logits,
    temperature,
    top_k,
    top_k_accuracy,
)

if TYPE_CHECKING:
    from jaxsoft import (
        activations,
        attention,
        calibration,
        decoding,
        heads,
        losses,
        merging,
        norms,
        optimizers,
    )

__all__ = [
    "LinearLogits",
    "RowReduction",
    "__version__",
    "activations",
    "adaptive_temperature_softmax",
    "attention",
    "calibration",
    "clipped_softmax",
    "decoding",
    "entmax",
    "entmax15",
    "entropy",
    "gumbel_softmax",
    "heads",
    "kernels",
    "label_rank",
    "linear_logits",
    "log_prob",
    "log_softmax",
    "logsumexp",
    "losses",
    "merging",
    "normalizers",
    "norms",
    "optimizers",
    "reduce_rows",
    "relu_weights",
    "reweighted_attention_weights",
    "rows",
    "scalable_softmax",
    "self_adjust_softmax",
    "shardings",
    "sigmoid_weights",
    "sink_softmax",
    "softcap",
    "softmax",
    "softmax_n",
    "softmax_one",
    "softpick",
    "softplus_attention_weights",
    "sparse_softmax",
    "sparsemax",
    "stablemax",
    "stored_logits",
    "taylor_softmax",
    "temperature",
    "top_k",
    "top_k_accuracy",
]

_ON_FIRST_USE = (
    "activations",
    "attention",
    "calibration",
    "decoding",
    "heads",
    "losses",
    "merging",
    "norms",
    "optimizers",
)


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
