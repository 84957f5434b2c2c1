"""Prints which versions are tested."""

import platform
from importlib.metadata import version

print(
    f"Python {platform.python_version()}, jax {version('jax')}, flax {version('flax')}, optax {version('optax')}"
)
