"""The table of devices in the guide on kernels: what `explain` says for each of them, and why.

Nothing is listed by hand: each call is traced for a device that is not there. `python docs/device_table.py` writes the
table into the guide, and a test holds that it is up to date.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

import jaxsoft
from jaxsoft import losses
from jaxsoft.attention import dot_product_attention
from jaxsoft.kernels.inner import tables

GUIDE = pathlib.Path(__file__).parent / "guides" / "kernels.md"
BEGIN, END = "<!-- devices: written by docs/device_table.py -->\n", "<!-- devices: end -->\n"


class Device(NamedTuple):
    """A device that need not be there.

    Attributes:
      name: its name in the table.
      kind: its kind, as jax names it.
      platform: `"gpu"` or `"tpu"`.
    """

    name: str
    kind: str
    platform: str


DEVICES = (
    Device("H200", "NVIDIA H200", "gpu"),
    Device("H100", "NVIDIA H100 80GB HBM3", "gpu"),
    Device("A100", "NVIDIA A100-SXM4-80GB", "gpu"),
    Device("L4", "NVIDIA L4", "gpu"),
    Device("B200", "NVIDIA B200", "gpu"),
    Device("MI300X", "AMD Instinct MI300X", "gpu"),
    Device("TPU v5e", "TPU v5 lite", "tpu"),
    Device("TPU v6e", "TPU v6 lite", "tpu"),
)


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array that is not stored."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _attention(**options: Any) -> Callable:
    return functools.partial(dot_product_attention, is_causal=True, **options)


def _head(hidden, weight):
    logits = jaxsoft.linear_logits(hidden, weight)
    return losses.cross_entropy(logits, jnp.zeros(len(hidden), jnp.int32)).sum()


def _weighted(hidden, weight):
    logits = jaxsoft.linear_logits(hidden, weight)
    return losses.weighted_sum(losses.cross_entropy, logits, jnp.zeros(len(hidden), jnp.int32))


_heads = (array(4, 8192, 16, 128),) * 3
_wide = (array(4, 8192, 16, 128, dtype=jnp.float32),) * 3
_cache = (array(64, 1, 32, 128), array(64, 32768, 8, 128), array(64, 32768, 8, 128))
_layer = array(8192, 4096), array(4096, 131072)

CALLS: dict[str, tuple[Callable, tuple]] = {
    "attention, softmax, T=8192": (_attention(), _heads),
    "the same, a window of 1024": (_attention(local_window_size=(1024, 0)), _heads),
    "the same, a bias": (_attention(), (*_heads, array(1, 16, 8192, 8192))),
    "the same, dropout": (lambda *a: _attention(dropout_rate=0.1, dropout_key=jax.random.key(0))(*a), _heads),
    "the same, float32": (_attention(), _wide),
    "attention, softmax_one": (_attention(normalizer=jaxsoft.softmax_one), _heads),
    "attention, scalable_softmax": (_attention(normalizer=jaxsoft.scalable_softmax), _heads),
    "attention, softpick": (_attention(normalizer=jaxsoft.softpick), _heads),
    "attention, sigmoid_weights": (_attention(normalizer=jaxsoft.sigmoid_weights), _heads),
    "attention, sparsemax": (_attention(normalizer=jaxsoft.sparsemax), _heads),
    "attention, sparse_softmax (k=3)": (
        _attention(normalizer=functools.partial(jaxsoft.sparse_softmax, k=3)),
        _heads,
    ),
    "decode, 64 x 32 heads, 32768 keys": (dot_product_attention, _cache),
    "cross_entropy of a head, 8192 x 4096 x 131072": (_head, _layer),
    "its gradient": (jax.grad(_head, (0, 1)), _layer),
    "weighted_sum of it": (jax.grad(_weighted, (0, 1)), _layer),
    "logsumexp, 8192 x 32768": (jaxsoft.logsumexp, (array(8192, 32768),)),
    "logsumexp, 256 x 1048576": (jaxsoft.logsumexp, (array(256, 2**20),)),
    "softmax_top_k(5), 8192 x 32768": (lambda x: jaxsoft.rows.softmax_top_k(x, 5), (array(8192, 32768),)),
}


@contextlib.contextmanager
def on(device: Device) -> Iterator[None]:
    """Traces for a device, with the tables that ship."""
    kind = AbstractDevice(device_kind=device.kind, num_cores=1, platform=device.platform)
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, JAXSOFT_TUNING=empty):
        tables.forget()
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind)):
            yield
    tables.forget()


def cell(call: str, device: Device) -> tuple[str, str]:
    """The implementation of the last pass of a call on a device, and the reason."""
    function, arguments = CALLS[call]
    with on(device):
        decision = jaxsoft.kernels.explain(function, *arguments)[-1]
    own = {"gpu": "mosaic_gpu", "tpu": "pallas_tpu"}[device.platform]
    reason = decision.because or decision.reasons[own]
    # The table must not depend on the version of jax that writes it.
    return decision.implementation, re.sub(r"; measured with jax [^)]*", "", reason)


def rows() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """For each call, the cells of all devices."""
    for call in CALLS:
        yield call, [cell(call, device) for device in DEVICES]


def text() -> str:
    """The table in Markdown, with its reasons as notes."""
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(d.name for d in DEVICES) + " |", "| --- |" + " --- |" * len(DEVICES)]
    for call, cells in rows():
        words = [f"{name} ({notes.setdefault(reason, len(notes) + 1)})" for name, reason in cells]
        lines.append(f"| {call} | " + " | ".join(words) + " |")
    lines += ["", *(f"{i}. {reason}" for reason, i in notes.items())]
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table in the guide."""
    return GUIDE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip("\n") + "\n"


if __name__ == "__main__":
    before, rest = GUIDE.read_text(encoding="utf-8").split(BEGIN)
    GUIDE.write_text(f"{before}{BEGIN}\n{text()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
