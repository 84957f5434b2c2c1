"""Pallas kernels that run the library's row reductions and normalizers, for TPUs and GPUs (Mosaic).

No formula stands here: a kernel traces the `update` of a `RowReduction` on a tile of scores, and `jax.vjp` of it in the
backward pass. So any reduction, the user's own too, runs in every kernel. `implementation=` of `linear_logits`,
`reduce_rows`, `dot_product_attention` and others names one; `explain` says what runs a call, and why.
"""

from jaxsoft.kernels._choice import Decision, block_sizes, explain, interpreted

__all__ = ["Decision", "block_sizes", "explain", "interpreted"]
