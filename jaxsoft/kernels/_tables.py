"""Measurements for each kind of device: whether kernels are faster than XLA, and with which block sizes.

Tables are JSON files that `python -m jaxsoft.tune` writes. The user's table takes precedence over the one shipped with
the library. A device without a table takes one of its generation, and work that was not measured takes the nearest that
was: kernels are refused only where they were slower, or where nothing is known. `explain` says which table and which
work decided. A file that cannot be read counts as missing: `explain` says so, without an exception or a warning.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxsoft.kernels import _device
from jaxsoft.kernels._device import Kernel, Work
from jaxsoft.kernels._sweep import Plan, Scores

FORMAT = 1
COMMAND = "python -m jaxsoft.tune"
SHIPPED = pathlib.Path(__file__).parent / "tables"
KINDS = ("dense", "linear", "attention")
PASSES = ("forward", "backward", "both")


class Row(NamedTuple):
    """A line of a table.

    Attributes:
      work: the work that was measured.
      direction: `"forward"`, `"backward"`, or `"both"` if the same sizes serve both.
      sizes: the best sizes by name; empty for the backend's own choice.
      ms: time of the kernels, in milliseconds.
      xla_ms: time of `implementation="xla"`.
      cudnn_ms: time of `implementation="cudnn"`; None if it was not measured.
    """

    work: Work
    direction: str
    sizes: dict[str, int]
    ms: float
    xla_ms: float
    cudnn_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The line as it is written in the file."""
        rest = {"pass": self.direction, "sizes": dict(self.sizes), "ms": self.ms, "xla_ms": self.xla_ms}
        if self.cudnn_ms is not None:
            rest["cudnn_ms"] = self.cudnn_ms
        return {**self.work._asdict(), **rest}

    @staticmethod
    def of_json(line: dict[str, Any]) -> Row:
        """Reads a line of the file; raises `KeyError`, `TypeError` or `ValueError` if it is not valid."""
        work = Work(line["kind"], *(int(line[name]) for name in Work._fields[1:]))
        sizes = {str(name): int(size) for name, size in line["sizes"].items()}
        times = [float(line[name]) for name in ("ms", "xla_ms", "cudnn_ms") if name in line]
        if work.kind not in KINDS or line["pass"] not in PASSES:
            raise ValueError(f"a line has an unknown kind {work.kind!r} or pass {line['pass']!r}")
        if any(size < 1 for size in sizes.values()) or any(not 0 < t < math.inf for t in times):
            raise ValueError("sizes and times must be above 0, and times finite")
        return Row(work, line["pass"], sizes, *times)


class Table(NamedTuple):
    """The measurements on one kind of device.

    Attributes:
      device_kind: the kind of device, as jax names it.
      implementation: the kernels that were measured.
      jax: the version of jax.
      rows: the lines.
    """

    device_kind: str
    implementation: str
    jax: str
    rows: tuple[Row, ...]

    def nearest(self, work: Work) -> list[Row]:
        """The lines of the nearest measured work of the same kind; empty if there is none."""
        same = [r for r in self.rows if r.work.kind == work.kind]
        best = min((r.work for r in same), key=work.distance, default=None)
        return [r for r in same if r.work == best]

    def write(self, path: pathlib.Path) -> None:
        """Writes the file, and creates its folder if needed."""
        head = {"format": FORMAT, **self._asdict(), "rows": None}
        lines = ",\n  ".join(json.dumps(r.to_json()) for r in self.rows)
        text = json.dumps(head, indent=1).replace('"rows": null', f'"rows": [\n  {lines}\n ]')
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")  # so that a reader never sees half a file
        beside.write_text(text + "\n")
        beside.replace(path)


class BrokenTable(ValueError):
    """A file is not a table, or has another format."""


def read(path: pathlib.Path) -> Table:
    """Reads a table; raises `BrokenTable`, or `OSError` if there is no such file."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise BrokenTable(f"{path} has format {content['format']!r}, this version reads {FORMAT}")
        rows = tuple(Row.of_json(line) for line in content["rows"])
        device_kind, implementation, version = (str(content[name]) for name in Table._fields[:3])
        return Table(device_kind, implementation, version, rows)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, BrokenTable):
            raise
        raise BrokenTable(
            f"{path} is not a table of block sizes ({type(error).__name__}: {error})"
        ) from error


# --- where tables are stored ---------------------------------------------------------------------------------------


def user_directory() -> pathlib.Path:
    """`$JAXSOFT_TUNING`, or `jaxsoft/tuning` in the user's cache."""
    given = os.environ.get("JAXSOFT_TUNING")
    if given:
        return pathlib.Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(cache) if cache else pathlib.Path("~/.cache").expanduser()) / "jaxsoft" / "tuning"


def file_name(device_kind: str) -> str:
    """The name of a device's table: `nvidia-h200.json`."""
    return (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") or "unknown") + ".json"


def user_path(device_kind: str) -> pathlib.Path:
    """The path of the user's table for a kind of device."""
    return user_directory() / file_name(device_kind)


def table(device_kind: str) -> Table | None:
    """The table for a kind of device or its generation: the user's, else the shipped one, else None."""
    return _find(device_kind)[0]


_ignored = contextvars.ContextVar("ignored", default=False)


def ignored() -> contextlib.AbstractContextManager[None]:
    """Ignores all tables inside the context, for measuring."""
    return _device.setting(_ignored, True)


def _find(device_kind: str) -> tuple[Table | None, str | None]:
    if _ignored.get():
        return None, None
    try:
        return _load(device_kind, user_directory())
    except RuntimeError:  # no home directory
        return _load(device_kind, SHIPPED)


@functools.lru_cache(maxsize=32)
def _load(device_kind: str, directory: pathlib.Path) -> tuple[Table | None, str | None]:
    """A table, and what was wrong with the first invalid file, if any. Each file is read once per process."""
    if not device_kind:
        return None, None
    own = [folder / file_name(device_kind) for folder in (directory, SHIPPED)]
    found, wrong = _first_table(own, lambda kind: kind == device_kind)
    if found is None:
        others = [path for folder in (directory, SHIPPED) for path in sorted(folder.glob("*.json"))]
        related = _device.generation(device_kind)
        found, _ = _first_table(others, lambda kind: _device.generation(kind) == related)
    return found, wrong


def _first_table(paths: list[pathlib.Path], fits: Callable[[str], bool]) -> tuple[Table | None, str | None]:
    """The first table of a device that fits, and what was wrong with the first invalid file, if any."""
    wrong = None
    for path in paths:
        try:
            found = read(path)
        except BrokenTable as error:
            wrong = wrong or str(error)
            continue
        except OSError:
            continue
        if fits(found.device_kind):
            return found, wrong
        wrong = wrong or f"{path} is the table of a {found.device_kind!r}"
    return None, wrong


def forget() -> None:
    """Clears the cache, so that tables are read again when next needed. Compiled functions stay as they are."""
    _load.cache_clear()


# --- looking up work in tables ---------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the tables say about an implementation for some work.

    Attributes:
      faster: whether it runs unless the user requests another one.
      reason: the measurement, or why there is none.
    """

    faster: bool
    reason: str


def verdict(implementation: str, device_kind: str, work: Work) -> Verdict:
    """Whether kernels run some work unless the user requests something else, and the measurement that decides."""
    found, wrong = _find(device_kind)
    rows = [] if found is None or found.implementation != implementation else found.nearest(work)
    if found is None or not rows:
        how = f"run {COMMAND}, or request it with the argument implementation" + (
            f"; {wrong}" if wrong else ""
        )
        what = f" for {work.kind} rows" if found is not None else ""
        return Verdict(False, f"it has not been measured on {device_kind!r}{what}: {how}")
    return _verdict(found, rows, "XLA", sum(r.ms for r in rows), sum(r.xla_ms for r in rows), wrong)


def cudnn_verdict(device_kind: str, work: Work) -> Verdict:
    """Whether cuDNN runs an attention unless the user requests something else: where it was not slower than kernels.

    It does where no kernels were measured: XLA takes many more passes over the scores.
    """
    found, wrong = _find(device_kind)
    if found is None:
        return Verdict(True, f"the library has no measured kernels for {device_kind!r}")
    rows = found._replace(rows=tuple(r for r in found.rows if r.cudnn_ms is not None)).nearest(work)
    if not rows:
        return Verdict(False, f"it has not been measured on {device_kind!r}: run {COMMAND}")
    ms, xla_ms = sum(r.ms for r in rows), sum(r.xla_ms for r in rows)
    name = found.implementation if ms <= xla_ms else "XLA"
    return _verdict(found, rows, name, sum(r.cudnn_ms or 0 for r in rows), min(ms, xla_ms), wrong)


def _verdict(
    found: Table, rows: list[Row], other: str, ms: float, other_ms: float, wrong: str | None
) -> Verdict:
    """The comparison of an implementation with another one."""
    where = f"on {found.device_kind!r} at {rows[0].work}"
    notes = (
        [] if found.jax == jax.__version__ else [f"measured with jax {found.jax}, this is {jax.__version__}"]
    )
    note = "".join(f"; {text}" for text in (*notes, *([wrong] if wrong else [])))
    if ms <= other_ms:
        return Verdict(True, f"it was faster {where} ({ms:.3g} ms, {other} took {other_ms:.3g} ms{note})")
    return Verdict(False, f"{other} was faster {where} ({other_ms:.3g} ms, it took {ms:.3g} ms{note})")


def sizes(
    blocks: tuple[tuple[str, int], ...], device_kind: str, implementation: str, work: Work, direction: str
) -> list[dict[str, int]]:
    """Block sizes by name, to be tried in order: only the user's if given; else the table's if any, then `{}`.

    Args:
      blocks: the user's sizes, from `block_sizes`.
      device_kind: the kind of device.
      implementation: the name of the kernels.
      work: the size of the pass.
      direction: `"forward"`, `"backward"` or `"both"`.

    Returns:
      One or two dicts of sizes; the backend chooses the sizes that a dict does not name.
    """
    if blocks:
        return [dict(blocks)]
    found = table(device_kind)
    measured = []
    if found is not None and found.implementation == implementation:
        rows = [r for r in found.nearest(work) if r.work.itemsize == work.itemsize]
        measured = [dict(r.sizes) for r in rows if r.direction in (direction, "both") and r.sizes]
    return [*measured[:1], {}]


def sweep_sizes(kernel: Kernel, scores: Scores, plan: Plan) -> list[dict[str, int]]:
    """`sizes` for a sweep; a plan that has tiles belongs to attention."""
    _, n, columns = scores.shape
    features = 0 if scores.values is not None else scores.left.shape[-1]
    kind = "attention" if plan.tiles is not None else "linear" if features else "dense"
    work = Work(kind, n, columns, features, scores.dtype.itemsize)
    return sizes(
        kernel.blocks, kernel.device_kind, kernel.name, work, "backward" if plan.entry_dtypes else "forward"
    )
