"""Draws docs/images/memory.png: temporary memory of the loss of a large vocabulary, as the compiler states it.

  python docs/generate_memory_picture.py

Value and gradient of a mean cross-entropy, for hidden and weight, in float32 on a CPU; nothing is run.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import jaxsoft
from jaxsoft import losses

WIDTH, VOCABULARY = 512, 32768
TOKENS = [512, 1024, 2048, 4096, 8192, 16384]
LOSSES = {
    "hidden @ weight, optax": lambda hidden, weight, labels: optax.softmax_cross_entropy_with_integer_labels(
        hidden @ weight, labels
    ).mean(),
    "weighted_mean(cross_entropy, linear_logits(hidden, weight), labels)": lambda hidden, weight, labels: (
        losses.weighted_mean(losses.cross_entropy, jaxsoft.linear_logits(hidden, weight), labels)
    ),
    "cross_entropy(linear_logits(hidden, weight), labels).mean()": lambda hidden, weight, labels: (
        losses.cross_entropy(jaxsoft.linear_logits(hidden, weight), labels).mean()
    ),
}


def megabytes(loss, tokens: int) -> float:
    """Temporary memory of the compiled value and gradient."""
    shapes = [(tokens, WIDTH), (WIDTH, VOCABULARY)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments, labels).compile()
    memory = program.memory_analysis()
    assert memory is not None, "this backend does not state the memory of its programs"
    return memory.temp_size_in_bytes / 1e6


def main() -> None:
    """Draws it."""
    figure, panel = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for (name, loss), color in zip(LOSSES.items(), ("0.5", "tab:blue", "tab:green")):
        values = [megabytes(loss, tokens) for tokens in TOKENS]
        print(name, [f"{value:.1f}" for value in values])
        panel.plot(TOKENS, values, marker="o", color=color, label=name)
    panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="temporary memory, MB")
    panel.set_xticks(TOKENS, [str(tokens) for tokens in TOKENS])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set_title(f"loss and gradient, vocabulary {VOCABULARY}, width {WIDTH}, float32", fontsize=10)
    panel.legend(fontsize=8, frameon=False)
    figure.savefig(pathlib.Path(__file__).with_name("images") / "memory.png", dpi=90)


if __name__ == "__main__":
    main()
