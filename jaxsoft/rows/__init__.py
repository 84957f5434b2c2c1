"""The engine: reductions over rows of scores, stored or streamed.

`reduce_rows` runs row reductions over a dense array or over `linear_logits`, whose scores are never stored. The
reductions that come with the library are in `jaxsoft.rows.reductions`; a `RowReduction` of your own is a few pure
functions, without a derivative (see the guide "Write a reduction"). `weighted_sum` computes the gradient of a loss in
the forward pass.
"""

from jaxsoft.rows import reductions
from jaxsoft.rows._layout import shardings
from jaxsoft.rows._logits import LinearLogits, Logits, StoredLogits, linear_logits, stored_logits
from jaxsoft.rows._reduce import reduce_rows
from jaxsoft.rows._reduction import RowReduction, Tile
from jaxsoft.rows._softmax import online_softmax, softmax_top_k, two_pass_softmax, unified_max_softmax
from jaxsoft.rows._statistics import (
    entropy,
    label_rank,
    log_prob,
    logsumexp,
    softcap,
    temperature,
    top_k,
    top_k_accuracy,
)
from jaxsoft.rows._weighted import weighted_sum
from jaxsoft.rows.reductions import TopK

__all__ = [
    "LinearLogits",
    "Logits",
    "RowReduction",
    "StoredLogits",
    "Tile",
    "TopK",
    "entropy",
    "label_rank",
    "linear_logits",
    "log_prob",
    "logsumexp",
    "online_softmax",
    "reduce_rows",
    "reductions",
    "shardings",
    "softcap",
    "softmax_top_k",
    "stored_logits",
    "temperature",
    "top_k",
    "top_k_accuracy",
    "two_pass_softmax",
    "unified_max_softmax",
    "weighted_sum",
]
