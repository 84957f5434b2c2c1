"""What a benchmark ran on, and the file of its results: one record per processor."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from importlib import metadata
from typing import Any

import jax


def processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The name of the processor; on Linux with family and model, since a virtual machine may hide the rest."""
    try:
        lines = pathlib.Path(cpuinfo).read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = about.get("model name", platform.machine())
    return f"{name} (family {about.get('cpu family', '?')}, model {about.get('model', '?')})"


def description() -> dict[str, Any]:
    """Processor, cores, device and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "optax")},
    }


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file of results; none if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _place(record: dict[str, Any]) -> tuple[str, str]:
    return record["machine"]["processor"], record["machine"]["device"]


def own(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of this processor and device; empty if there is none."""
    here = {"machine": description()}
    return next((record for record in records if _place(record) == _place(here)), {})


def save(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes what was measured; it replaces the record of this processor and device, if there is one."""
    records = load(path)
    others = [other for other in records if other is not own(records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps([*others, {"machine": description(), **record}], indent=1) + "\n", encoding="utf-8"
    )
