"""Runs a part of `make test` and keeps its minutes: `python tests/parts.py "the docs" mkdocs build`.

Without arguments it prints the minutes of each part at its last run.
"""

import json
import pathlib
import subprocess
import sys
import time

KEPT = pathlib.Path(__file__).parent.parent / "build" / "parts.json"


def read() -> dict[str, float]:
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}


def report() -> None:
    parts = read()
    for name, seconds in parts.items():
        print(f"{seconds / 60:6.1f} min  {name}")
    print(f"{sum(parts.values()) / 60:6.1f} min  in all")


def run(name: str, command: list[str]) -> int:
    print(f"== {name}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    parts = read()
    parts.pop(name, None)  # the latest comes last
    parts[name] = round(time.monotonic() - start, 1)
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(parts, indent=1), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]) if sys.argv[1:] else report())
