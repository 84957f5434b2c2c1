"""Normalization layers as pure functions."""

from __future__ import annotations

from jaxsoft.norms.embedding import stable_embedding, stable_embedding_init

__all__ = ["stable_embedding", "stable_embedding_init"]
