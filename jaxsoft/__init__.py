"""Softmax, losses and optimizers for JAX in which the logits are never stored.

logits = hidden @ kernel                          # an array of [tokens, vocab]
logits = jaxsoft.linear_logits(hidden, kernel)    # an expression: nothing is computed yet

loss = jaxsoft.losses.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-4).mean()
"""

from jaxsoft import losses, normalizers, optimizers, rows
from jaxsoft._version import __version__
from jaxsoft.normalizers import log_softmax, softmax
from jaxsoft.rows import (
    LinearLogits,
    RowReduction,
    entropy,
    label_rank,
    linear_logits,
    log_prob,
    logsumexp,
    reduce_rows,
    softcap,
    temperature,
    top_k,
)

__all__ = [
    "LinearLogits",
    "RowReduction",
    "__version__",
    "entropy",
    "label_rank",
    "linear_logits",
    "log_prob",
    "log_softmax",
    "logsumexp",
    "losses",
    "normalizers",
    "optimizers",
    "reduce_rows",
    "rows",
    "softcap",
    "softmax",
    "temperature",
    "top_k",
]
