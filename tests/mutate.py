"""Tests the tests: puts the slips of `tests/mutations` into copies of the package, and runs the tests that must fail.

    make mutate                                   # all slips, a quarter of an hour on two cores
    .venv/bin/python tests/mutate.py --only ranking   # those whose file, text or kind contains a word

The tests are those of the covering design, as in `make test` (`tests/design.py`; `$JAXSOFT_DESIGN` names another).
`--selected` runs nothing, and says which slips have a test in it.

A slip is *caught* if a test fails, *survived* if all of its tests pass. It is *broken* if it says nothing about the
tests: its text is not found once in the file, the package or the tests cannot be imported, no test was selected, time
ran out, or the tests fail without it. The exit status is 1 if a slip is broken, survived, or is caught although its
`gap` says that it is not. How a slip is written: see `tests/mutations/rows.toml`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib

from _pytest.mark.expression import Expression
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent
KINDS = (
    *("formula", "options together", "second values", "borders", "constants and NaN", "precision", "masks"),
    *("gradients", "sharding", "kernels", "optimizers"),
)
_DESIGN = os.environ.get("JAXSOFT_DESIGN", "cover")
TIMEOUT = 300  # seconds for the tests of one slip; the slowest take 60 on a busy machine

# Runs pytest in the current folder. Status 3, an internal error of pytest, also says that another package was imported.
_RUN = """
import pathlib, pytest, sys
status = pytest.main(sys.argv[1:])
if status < 2:
    import jaxsoft
    status = status if pathlib.Path(jaxsoft.__file__).is_relative_to(pathlib.Path.cwd()) else 3
sys.exit(status)
"""
# An exception that an editor shows at once is no slip that tests have to find.
_TYPO = re.compile(
    r"^(?:FAILED|ERROR) .* - (?:NameError|UnboundLocalError|ImportError|ModuleNotFoundError|SyntaxError)",
    re.M,
)
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", re.M)


@dataclasses.dataclass(frozen=True)
class Slip:
    """An entry of a file of slips."""

    file: str
    old: str
    new: str
    tests: str
    kind: str
    gap: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r} for {self.file}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a slip (caught, survived or broken), and by which test or why."""

    state: str
    detail: str
    seconds: float = 0.0


def read_slips(folder: pathlib.Path) -> list[Slip]:
    """The slips of all files of a folder."""
    files = sorted(folder.glob("*.toml"))
    return [Slip(**entry) for file in files for entry in tomllib.loads(file.read_text())["slip"]]


def run_tests(root: pathlib.Path, tests: str, slip: Slip | None = None, timeout: float = TIMEOUT) -> Outcome:
    """Runs tests on a copy of the package, with the slip in it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slip-") as temporary:
        copy = pathlib.Path(temporary).resolve()
        for path in root.iterdir():
            if path.name in ("jaxsoft", "tests"):
                shutil.copytree(path, copy / path.name)
            elif not path.name.startswith("."):
                (copy / path.name).symlink_to(path)
        if slip is not None:
            text = (copy / slip.file).read_text()
            if text.count(slip.old) != 1 or slip.old == slip.new:
                return Outcome(
                    "broken", f"old must occur once, and differ from new: {text.count(slip.old)} times"
                )
            (copy / slip.file).write_text(text.replace(slip.old, slip.new))
        cache = os.environ.get("JAXSOFT_CACHE", str(root / ".venv" / "jax_cache"))
        try:
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    _RUN,
                    "-x",
                    "-q",
                    "--tb=short",
                    "-p",
                    "no:cacheprovider",
                    *shlex.split(tests),
                ],
                cwd=copy,
                env={
                    **os.environ,
                    "PYTHONPATH": "",
                    "PYTEST_ADDOPTS": "",
                    "JAXSOFT_DESIGN": _DESIGN,
                    "JAXSOFT_CACHE": cache,
                    "COLUMNS": "400",
                },
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return Outcome("broken", f"more than {timeout:.0f} s", timeout)
    seconds = time.monotonic() - start
    if done.returncode == 0:
        return Outcome("survived", tests, seconds)
    failed = _FAILED.search(done.stdout)
    if done.returncode != 1 or failed is None or _TYPO.search(done.stdout):
        return Outcome(
            "broken", f"status {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}", seconds
        )
    return Outcome("caught", failed[1], seconds)


def selected(root: pathlib.Path, slips: list[Slip]) -> list[bool]:
    """Whether the design has a test of each slip, by one collection of all tests."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--collect-only", "-q"),
            *("-o", "addopts=--import-mode=importlib"),
            *("-p", "no:cacheprovider", "--doctest-modules", "jaxsoft", "tests"),
        ],
        cwd=root,
        env={**os.environ, "PYTEST_ADDOPTS": "", "JAXSOFT_DESIGN": _DESIGN},
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line for line in done.stdout.splitlines() if "::" in line]

    def has_test(tests: str) -> bool:
        where, *rest = [word for word in shlex.split(tests) if word != "--doctest-modules"]
        within = [n for n in names if n == where or n.startswith((f"{where}[", f"{where}::"))]
        if rest:
            _, words = rest  # of -k
            expression = Expression.compile(words)
            within = [n for n in within if expression.evaluate(lambda word, n=n: word.lower() in n.lower())]
        return bool(within)

    return [has_test(slip.tests) for slip in slips]


def table_of(slips: list[Slip], outcomes: list[Outcome]) -> Table:
    """The number of slips and of each outcome, by kind."""
    table = Table("kind", title="slips")
    for name in ("slips", "caught", "survived", "broken", "rate"):
        table.add_column(name, justify="right")
    for kind in (*KINDS, "all"):
        states = [o.state for s, o in zip(slips, outcomes) if kind in (s.kind, "all")]
        if states:
            counts = [states.count(state) for state in ("caught", "survived", "broken")]
            table.add_row(kind, *map(str, (len(states), *counts)), f"{counts[0] / len(states):.0%}")
    return table


def status(slips: list[Slip], outcomes: list[Outcome]) -> int:
    """1 if a slip is broken, survived, or is caught although its `gap` says that it is not."""
    return int(any(o.state != ("survived" if s.gap else "caught") for s, o in zip(slips, outcomes)))


def main(arguments: list[str] | None = None, root: pathlib.Path = ROOT) -> int:
    """Runs the slips; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="slips whose file, text or kind contains it"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="slips tested at the same time")
    parser.add_argument(
        "--selected", action="store_true", help="run nothing; say which slips have a test in the design"
    )
    options = parser.parse_args(arguments)
    slips = [
        s
        for s in read_slips(root / "tests" / "mutations")
        if options.only in "\n".join((s.file, s.new, s.kind))
    ]
    if not slips:
        parser.error(f"--only: no slip contains {options.only!r}")
    console = Console(soft_wrap=True, highlight=False)
    if options.selected:
        found = selected(root, slips)
        for slip in (slip for slip, has in zip(slips, found) if not has):
            console.print(f"no test of the design: {slip.file}: {slip.tests}", markup=False)
        console.print(f"{sum(found)} of {len(slips)} slips have a test in the design ({_DESIGN})")
        return int(not all(found))

    def run_all(f, items, tell):
        outcomes = {}
        with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
            running = {pool.submit(f, item): item for item in items}
            for future in concurrent.futures.as_completed(running):
                item, outcome = running[future], future.result()
                outcomes[item] = outcome
                console.print(f"{len(outcomes):3}/{len(items)} {outcome.seconds:4.0f} s", end=" ")
                console.print(tell(item, outcome), markup=False)
        return outcomes

    def tell(slip, outcome):
        state = outcome.state if outcome.state == "caught" else outcome.state.upper()
        line = next((a for a in slip.new.splitlines() if a not in slip.old), slip.new).strip()
        return f"{state:8} {slip.file}: {line}\n{'':17}{outcome.detail}" + (
            f"\n{'':17}gap: {slip.gap}" if slip.gap else ""
        )

    console.print("The tests without slips")
    unchanged = run_all(
        lambda tests: run_tests(root, tests),
        sorted({s.tests for s in slips}),
        lambda tests, o: f"{'pass' if o.state == 'survived' else 'FAIL'} {tests}",
    )
    console.print("The slips")

    def test(slip):
        before = unchanged[slip.tests]
        if before.state != "survived":
            return Outcome("broken", f"without the slip: {before.detail}")
        return run_tests(root, slip.tests, slip)

    by_slip = run_all(test, slips, tell)
    outcomes = [by_slip[slip] for slip in slips]
    console.print(table_of(slips, outcomes))
    return status(slips, outcomes)


if __name__ == "__main__":
    sys.exit(main())
