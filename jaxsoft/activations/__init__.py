"""Activations and neurons as pure functions."""

from __future__ import annotations

from jaxsoft.activations.binary import approximate_sign, periodic_binarize
from jaxsoft.activations.elementwise import maxout, mish, mpc_gelu, relu_classifier
from jaxsoft.activations.pade import pade_activation, pade_leaky_relu, pade_neuron, pade_neuron_init

__all__ = [
    "approximate_sign",
    "maxout",
    "mish",
    "mpc_gelu",
    "pade_activation",
    "pade_leaky_relu",
    "pade_neuron",
    "pade_neuron_init",
    "periodic_binarize",
    "relu_classifier",
]
