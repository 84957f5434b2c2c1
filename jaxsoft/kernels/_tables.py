"""What was measured on a kind of device: whether kernels are faster than XLA there, and with which sizes of blocks.

Tables are JSON files that `python -m jaxsoft.tune` writes. The user's own stands before the one that comes with
the library. A file that cannot be read counts as none: `explain` says so, nothing is raised or warned of.
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
from collections.abc import Iterator
from typing import Any, NamedTuple

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
      work: what was done.
      direction: `"forward"`, `"backward"`, or `"both"` where one size serves both.
      sizes: the best sizes by name; empty for the backend's own choice.
      ms: time of the kernels, in milliseconds.
      xla_ms: time of `implementation="xla"`.
    """

    work: Work
    direction: str
    sizes: dict[str, int]
    ms: float
    xla_ms: float

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        rest = {"pass": self.direction, "sizes": dict(self.sizes), "ms": self.ms, "xla_ms": self.xla_ms}
        return {**self.work._asdict(), **rest}

    @staticmethod
    def of_json(line: dict[str, Any]) -> Row:
        """From the file; raises `KeyError`, `TypeError` or `ValueError` if it is none."""
        work = Work(line["kind"], *(int(line[name]) for name in Work._fields[1:]))
        sizes = {str(name): int(size) for name, size in line["sizes"].items()}
        times = [float(line["ms"]), float(line["xla_ms"])]
        if work.kind not in KINDS or line["pass"] not in PASSES:
            raise ValueError(f"a line of kind {work.kind!r}, pass {line['pass']!r}")
        if any(size < 1 for size in sizes.values()) or any(not 0 < t < math.inf for t in times):
            raise ValueError("a size or time that is not above 0")
        return Row(work, line["pass"], sizes, *times)


class Table(NamedTuple):
    """What was measured on one kind of device.

    Attributes:
      device_kind: as jax names it.
      implementation: whose sizes these are.
      jax: the version.
      rows: the lines.
    """

    device_kind: str
    implementation: str
    jax: str
    rows: tuple[Row, ...]

    def nearest(self, work: Work) -> list[Row]:
        """The lines of the measured work that is nearest, of the same kind and size of numbers; none: empty."""
        same = [r for r in self.rows if (r.work.kind, r.work.itemsize) == (work.kind, work.itemsize)]
        best = min((r.work for r in same), key=work.distance, default=None)
        return [r for r in same if r.work == best]

    def write(self, path: pathlib.Path) -> None:
        """Writes the file, and the folder it is in."""
        head = {"format": FORMAT, **self._asdict(), "rows": None}
        lines = ",\n  ".join(json.dumps(r.to_json()) for r in self.rows)
        text = json.dumps(head, indent=1).replace('"rows": null', f'"rows": [\n  {lines}\n ]')
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")  # a reader never sees half of it
        beside.write_text(text + "\n")
        beside.replace(path)


class BrokenTable(ValueError):
    """A file that is no table, or one of another format."""


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
        raise BrokenTable(f"{path} is no table of block sizes ({type(error).__name__}: {error})") from error


# --- where tables are ----------------------------------------------------------------------------------------------


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
    """Where the user's table for a kind of device is."""
    return user_directory() / file_name(device_kind)


def table(device_kind: str) -> Table | None:
    """The table for a kind of device: the user's, else the library's, else None."""
    return _find(device_kind)[0]


_ignored = contextvars.ContextVar("ignored", default=False)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Within it, there are no tables: for measuring."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def _find(device_kind: str) -> tuple[Table | None, str | None]:
    if _ignored.get():
        return None, None
    try:
        return _load(device_kind, user_directory())
    except RuntimeError:  # no home directory
        return _load(device_kind, SHIPPED)


@functools.lru_cache(maxsize=32)
def _load(device_kind: str, directory: pathlib.Path) -> tuple[Table | None, str | None]:
    """A table, and what was wrong with the files that were passed over. Each is read once in a process."""
    wrong = None
    if not device_kind:
        return None, None
    for folder in (directory, SHIPPED):
        try:
            found = read(folder / file_name(device_kind))
        except BrokenTable as error:
            wrong = wrong or str(error)
            continue
        except OSError:
            continue
        if found.device_kind == device_kind:
            return found, wrong
        wrong = wrong or f"{folder / file_name(device_kind)} is of a {found.device_kind!r}"
    return None, wrong


def forget() -> None:
    """Reads the tables again when they are next asked for. What is compiled stays as it is."""
    _load.cache_clear()


# --- what they say ---------------------------------------------------------------------------------------------------


def objection(implementation: str, device_kind: str, work: Work) -> str | None:
    """Why kernels do not run some work unless they are asked for, or None: they were measured and not slower."""
    found, wrong = _find(device_kind)
    how = f"run {COMMAND}, or ask for it"
    if found is None or found.implementation != implementation:
        return f"it has not been measured on {device_kind!r}: {how}" + (f" ({wrong})" if wrong else "")
    rows = found.nearest(work)
    if not rows:
        what = f"{work.kind} rows in {8 * work.itemsize} bits"
        return f"it has not been measured on {device_kind!r} for {what}: {how}"
    ms, xla_ms = sum(r.ms for r in rows), sum(r.xla_ms for r in rows)
    if ms <= xla_ms:
        return None
    near = rows[0].work
    shape = f"{near.rows} x {near.columns}" + (f", {near.features} features" if near.features else "")
    return f"XLA was faster on {device_kind!r} at {shape} ({xla_ms:.3g} ms, it took {ms:.3g} ms)"


def sizes(
    blocks: tuple[tuple[str, int], ...], device_kind: str, implementation: str, work: Work, direction: str
) -> list[dict[str, int]]:
    """Sizes of blocks by name, to be tried in turn: the user's alone; else the table's, then none.

    Args:
      blocks: the user's, of `block_sizes`.
      device_kind: of the device.
      implementation: the kernels' name.
      work: what there is to do.
      direction: `"forward"`, `"backward"` or `"both"`.

    Returns:
      Sizes, one or two of them; what they do not name, the backend chooses.
    """
    if blocks:
        return [dict(blocks)]
    found = table(device_kind)
    measured = []
    if found is not None and found.implementation == implementation:
        rows = found.nearest(work)
        measured = [dict(r.sizes) for r in rows if r.direction in (direction, "both") and r.sizes]
    return [*measured[:1], {}]


def sweep_sizes(kernel: Kernel, scores: Scores, plan: Plan) -> list[dict[str, int]]:
    """`sizes` for a sweep; one whose plan has tiles is an attention's."""
    _, n, columns = scores.shape
    features = 0 if scores.values is not None else scores.left.shape[-1]
    kind = "attention" if plan.tiles is not None else "linear" if features else "dense"
    work = Work(kind, n, columns, features, scores.dtype.itemsize)
    return sizes(
        kernel.blocks, kernel.device_kind, kernel.name, work, "backward" if plan.entry_dtypes else "forward"
    )
