"""The engine: rows of scores, reduced."""

from jaxsoft.rows import reductions
from jaxsoft.rows._driver import reduce_rows
from jaxsoft.rows._logits import LinearLogits, Logits, linear_logits
from jaxsoft.rows._reduction import RowReduction, Tile
from jaxsoft.rows._weighted import weighted_sum

__all__ = ["LinearLogits", "Logits", "RowReduction", "Tile", "linear_logits", "reduce_rows", "reductions", "weighted_sum"]
