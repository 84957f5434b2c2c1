"""Draws docs/images/normalizers-FAMILY.png: one picture for each family of normalizers.

  python docs/generate_normalizer_pictures.py

Three panels: the weight of a score that sweeps through a fixed row, the derivative of the weight in the score, and the
largest weight of rows that grow.
"""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import jaxsoft
from jaxsoft import normalizers

IMAGES = pathlib.Path(__file__).with_name("images")

partial = functools.partial
FAMILIES = {
    "exponential": {
        "softmax": jaxsoft.softmax,
        "softmax_one": jaxsoft.softmax_one,
        "scalable_softmax, scale 0.43": jaxsoft.scalable_softmax,
        "adaptive_temperature_softmax": jaxsoft.adaptive_temperature_softmax,
        "entropy_target_softmax, 0.8": partial(normalizers.entropy_target_softmax, entropy=0.8),
        "self_adjust_softmax": jaxsoft.self_adjust_softmax,
        "clipped_softmax": jaxsoft.clipped_softmax,
    },
    "rectified": {
        "softmax": jaxsoft.softmax,
        "softpick": jaxsoft.softpick,
        "stablemax": jaxsoft.stablemax,
        "taylor_softmax": jaxsoft.taylor_softmax,
        "sigmoid_weights": jaxsoft.sigmoid_weights,
        "relu_weights": jaxsoft.relu_weights,
        "softplus_attention_weights": partial(jaxsoft.softplus_attention_weights, scale=0.7),
    },
    "sparse": {
        "softmax": jaxsoft.softmax,
        "entmax, alpha 1.25": partial(jaxsoft.entmax, alpha=1.25),
        "entmax15": jaxsoft.entmax15,
        "sparsemax": jaxsoft.sparsemax,
        "sparse_softmax, k 2": partial(jaxsoft.sparse_softmax, k=2),
    },
}
FIXED = [1.0, 0.5, 0.0, -1.0]  # the other scores of the row
SWEEP = np.linspace(-4, 5, 400)
SIZES = [4, 16, 64, 256, 1024, 4096]


def weight(normalizer, score):
    """The weight of a score beside the fixed ones."""
    return normalizer(jnp.concatenate([score[None], jnp.array(FIXED)]))[0]


def largest(normalizer, n: int):
    """The largest weight of a row of n scores: one of 4, the others standard normal."""
    noise = np.random.default_rng(0).normal(size=(8, n)).astype(np.float32)
    noise[:, 0] = 4
    return float(jnp.mean(normalizer(jnp.asarray(noise))[:, 0]))


def draw(family: str) -> pathlib.Path:
    """Draws the picture of a family and returns its file."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for name, normalizer in FAMILIES[family].items():
        style = dict(color="0.6", linewidth=3) if name == "softmax" else dict(linewidth=1.4)
        both = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(weight, normalizer))))
        values, slopes = both(jnp.asarray(SWEEP, jnp.float32))
        panels[0].plot(SWEEP, values, label=name, **style)
        panels[1].plot(SWEEP, slopes, **style)
        panels[2].plot(SIZES, [largest(normalizer, n) for n in SIZES], marker=".", **style)
    panels[0].set(title=f"weight of a score beside {FIXED}", xlabel="score", ylim=(-0.03, 1.05))
    panels[1].set(title="derivative of that weight", xlabel="score")
    panels[2].set(title="weight of 4 among normal scores", xlabel="length of the row", xscale="log")
    panels[2].set(ylim=(-0.03, 1.05), xticks=SIZES, xticklabels=SIZES)
    panels[2].minorticks_off()
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.title.set_fontsize(10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    path = IMAGES / f"normalizers-{family}.png"
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(path, dpi=75)
    plt.close(figure)
    return path


def main() -> None:
    """Draws all of them."""
    for family in FAMILIES:
        path = draw(family)
        print(f"{path.name}: {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
