"""Draws docs/images/truncations.png: what truncations keep of rows that grow less certain.

  python docs/generate_decoding_picture.py

The rows are normally distributed logits of 1000 tokens, divided by temperatures. Two panels: how many tokens are kept,
and their probability before the others were rejected, over the entropy of the row.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import jaxsoft
from jaxsoft import decoding

IMAGE = pathlib.Path(__file__).with_name("images") / "truncations.png"
TOKENS, ROWS = 1000, 120
TRANSFORMS = {
    "top_k(50)": decoding.top_k(50),
    "top_p(0.9)": decoding.top_p(0.9),
    "min_p(0.05)": decoding.min_p(0.05),
    "typical_p(0.9)": decoding.typical_p(0.9),
    "eta_cutoff(2e-3)": decoding.eta_cutoff(2e-3),
    "top_n_sigma(1)": decoding.top_n_sigma(1.0),
    "top_h(0.4)": decoding.top_h(0.4, limit=TOKENS),
}


def main() -> None:
    """Draws the picture."""
    row = 5 * np.random.default_rng(0).standard_normal(TOKENS)
    x = jnp.asarray(row / np.geomspace(0.5, 20, ROWS)[:, None], jnp.float32)
    entropy = jaxsoft.entropy(x)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, transform in TRANSFORMS.items():
        kept = transform(x) > -jnp.inf
        left.plot(entropy, kept.sum(-1), label=name)
        right.plot(entropy, jnp.sum(jax.nn.softmax(x) * kept, -1), label=name)
    left.set(yscale="log", ylabel=f"tokens kept, of {TOKENS}")
    right.set(ylim=(0, 1.02), ylabel="their probability")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.set_xlabel("entropy of the row, nats")
        axes.grid(alpha=0.3)
    figure.savefig(IMAGE, dpi=110)


if __name__ == "__main__":
    main()
