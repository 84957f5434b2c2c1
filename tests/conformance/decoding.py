"""Entries of decoding: many transforms in one, since a program costs more than what is in it.

Transforms that pass over the rows are read by the largest log-probability of what they leave: `sample_and_log_prob`,
greedily. It is finite whatever they reject.
"""

import jax
import jax.numpy as jnp

import jaxsoft
from conformance.entry import Entry
from jaxsoft import decoding

KEY = jax.random.key(0)


def _read(y, axis):
    axis = -1 if isinstance(y, decoding.TransformedLogits) else axis
    return decoding.sample_and_log_prob(y, KEY, greedy=True, axis=axis)


def _entry(variant, transforms, inputs=(), **options):
    """An entry of the transforms that a function makes from the inputs, each alone."""

    def call(logits, given, *, where=None, axis=-1):
        return tuple(_read(t(logits, where=where, axis=axis), axis).log_prob for t in transforms(given))

    return Entry("jaxsoft.decoding.Transform", call, variant, inputs, **options)


def _elementwise(given):
    counts = given["positive_mask"].astype(jnp.int32)
    penalty = given["temperature"]
    return (
        decoding.temperature(penalty),
        decoding.softcap(3.0),
        decoding.repetition_penalty(counts, penalty),
        decoding.presence_penalty(counts, penalty),
        decoding.chain(decoding.frequency_penalty(counts, 0.3), decoding.logit_bias(given["priors"])),
    )


def _best(given):
    return decoding.top_k(3), decoding.top_p(0.7, limit=6), decoding.top_h(0.7, limit=6)


def _likely(given):
    share = jnp.exp(-given["temperature"])
    return (
        decoding.min_p(share),
        decoding.epsilon_cutoff(share),
        decoding.eta_cutoff(0.1),
        decoding.top_n_sigma(0.8),
    )


def _sorted(logits, given, *, where=None, axis=-1):
    """Those that sort whole rows, which must be stored."""
    transform = decoding.chain(decoding.top_k(jnp.int32(6)), decoding.typical_p(0.95), decoding.top_p(0.9))
    return jaxsoft.softmax(transform(logits, where=where, axis=axis), axis=axis).astype(logits.dtype)


def _log_prob(logits, given, *, where=None, axis=-1):
    return decoding.log_prob(logits, given["labels"], where=where, axis=axis)


def _sample(logits, given, *, where=None, axis=-1):
    """Rows of equal numbers get equal noise, and under `vmap` all rows are number 0."""
    rows = (*logits.shape[: axis % logits.ndim], *logits.shape[axis % logits.ndim + 1 :])
    return decoding.sample_and_log_prob(
        logits, KEY, row_numbers=jnp.zeros(rows, jnp.int32), where=where, axis=axis
    )


ENTRIES = [
    _entry("best", _best, jumps=True, huge=1e-3),
    _entry("likely", _likely, ("temperature",), jumps=True, huge=1e-3),
    _entry("elementwise", _elementwise, ("temperature", "positive_mask", "priors"), huge=1e-3),
    Entry("jaxsoft.decoding.Transform", _sorted, "sorted", dense_only=True, shift=0.0, jumps=True, low=1e-2),
    Entry("jaxsoft.decoding.log_prob", _log_prob, "", ("labels",), shift=0.0),
    Entry("jaxsoft.decoding.sample_and_log_prob", _sample, shift=0.0, permutes=False),
]
