"""Runs a part of `make test` and keeps its minutes: `python tests/parts.py "the docs" mkdocs build`.

Without arguments it prints the minutes of each part at its last run.
"""

import pathlib
import subprocess
import sys
import time

KEPT = (
    pathlib.Path(__file__).parent.parent / "build" / "parts"
)  # a file per part, since parts may run side by side


def report() -> None:
    files = sorted(KEPT.iterdir(), key=lambda path: path.stat().st_mtime) if KEPT.exists() else []
    seconds = [float(path.read_text(encoding="utf-8")) for path in files]
    for path, part in zip(files, seconds):
        print(f"{part / 60:6.1f} min  {path.name}")
    print(f"{sum(seconds) / 60:6.1f} min  sum of the parts; some run side by side")


def run(name: str, command: list[str]) -> int:
    print(f"== {name}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / name).write_text(f"{time.monotonic() - start:.1f}", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]) if sys.argv[1:] else report())
