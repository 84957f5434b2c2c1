"""Pallas kernels that run the library's row reductions and normalizers, for TPUs and GPUs (Mosaic).

A kernel contains no formula: it traces the `update` of a `RowReduction` on a tile of scores, and in the backward pass
`jax.vjp` of it. So every reduction, a user's own included, runs in every kernel. The `implementation=` of
`linear_logits`, `reduce_rows`, `dot_product_attention` and others names a backend; `explain` says what runs a call, and
why.
"""

from jaxsoft.kernels._choice import Decision, explain
from jaxsoft.kernels._device import block_sizes, interpreted

__all__ = ["Decision", "block_sizes", "explain", "interpreted"]
