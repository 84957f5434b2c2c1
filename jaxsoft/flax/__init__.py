"""Modules for Flax.

`jaxsoft.flax.nnx` and `jaxsoft.flax.linen` have the same modules: an output layer whose logits are never stored, and a
module around any norm or activation of the library that has parameters or running statistics. Attention with any
normalizer needs none: `flax_attention_fn` gives Flax's own multi-head attention its function. Flax is an optional
dependency; only these two modules import it.
"""
