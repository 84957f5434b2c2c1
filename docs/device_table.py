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
from jaxsoft.kernels.inner import BACKENDS, tables
from jaxsoft.rows import softmax_top_k

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
    "attention, softmax": (_attention(), _heads),
    "the same with a bias": (_attention(), (*_heads, array(1, 16, 8192, 8192))),
    "the same with dropout": (
        lambda *a: _attention(dropout_rate=0.1, dropout_key=jax.random.key(0))(*a),
        _heads,
    ),
    "the same in float32": (_attention(), _wide),
    "attention, softmax_one": (_attention(normalizer=jaxsoft.softmax_one), _heads),
    "attention, softpick": (_attention(normalizer=jaxsoft.softpick), _heads),
    "attention, sparsemax": (_attention(normalizer=jaxsoft.sparsemax), _heads),
    "decode, 32768 keys": (dot_product_attention, _cache),
    "gradient of a head, 8192 x 4096 x 131072": (jax.grad(_head, (0, 1)), _layer),
    "the same by weighted_sum": (jax.grad(_weighted, (0, 1)), _layer),
    "logsumexp, 8192 x 32768": (jaxsoft.logsumexp, (array(8192, 32768),)),
    "logsumexp, 256 x 1048576": (jaxsoft.logsumexp, (array(256, 2**20),)),
    "softmax_top_k, 8192 x 32768": (lambda x: softmax_top_k(x, 5), (array(8192, 32768),)),
}


@contextlib.contextmanager
def on(device: Device) -> Iterator[None]:
    """Traces for a device, with cuDNN and with the tables that ship."""
    kind = AbstractDevice(device_kind=device.kind, num_cores=1, platform=device.platform)
    cudnn = mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, JAXSOFT_TUNING=empty), cudnn:
        tables.forget()
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind)):
            yield
    tables.forget()


def cell(call: str, device: Device) -> tuple[str, str]:
    """The implementation that runs a call on a device, of its last pass if it has several, and the reason."""
    function, arguments = CALLS[call]
    with on(device):
        decision = jaxsoft.kernels.explain(function, *arguments)[-1]
    here = {"cudnn", *(name for name, (platform, _) in BACKENDS.items() if platform == device.platform)}
    others = [f"{name}: {why}" for name, why in decision.reasons.items() if name in here]
    reason = f"{decision.implementation}: {decision.because}" if decision.because else "; ".join(others)
    # The table must not depend on the version of jax that writes it, and says the same of like devices.
    reason = re.sub(r"; measured with jax [^)]*", "", reason)
    reason = reason.replace(f", this is {device.kind!r}", "").replace(
        f"measured on {device.kind!r}", "measured"
    )
    reason = reason.replace(f" for {device.kind!r}", "").replace(f", this is a {device.platform.upper()}", "")
    return decision.implementation, reason


def text() -> str:
    """The table in Markdown, with its reasons as notes."""
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(d.name for d in DEVICES) + " |", "| --- |" + " --- |" * len(DEVICES)]
    for call in CALLS:
        cells = [cell(call, device) for device in DEVICES]
        words = [f"{name} ({notes.setdefault(reason, len(notes) + 1)})" for name, reason in cells]
        lines.append(f"| {call} | " + " | ".join(words) + " |")
    lines += ["", *(f"{i}. {reason}" for reason, i in notes.items())]
    return "\n".join(lines) + "\n"


def cells_of(table: str) -> dict[tuple[str, str], tuple[str, str]]:
    """The implementation and the reason for each call and name of a device, read from the table in Markdown."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", table, re.MULTILINE))
    names, _, *lines = (
        [part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line
    )
    cells = {(line[0], name): part.split(" (") for line in lines for name, part in zip(names[1:], line[1:])}
    return {key: (name, notes[number.strip(")")]) for key, (name, number) in cells.items()}


def written() -> str:
    """The table in the guide."""
    return GUIDE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip("\n") + "\n"


if __name__ == "__main__":
    before, rest = GUIDE.read_text(encoding="utf-8").split(BEGIN)
    GUIDE.write_text(f"{before}{BEGIN}\n{text()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
