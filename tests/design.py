"""Which laws run on which cases: the full product, or a covering design fixed by rule (CONTRIBUTING.md).

A law is a test with a parameter `entry` (tests/conformance), `name` (tests/optimizers/test_common.py) or `case` (a
reduction; tests/rows, tests/kernels). It is of the formula, or, with the marker `engine`, of a mechanism that all
functions share, or, with the marker `kernels`, runs over kernels. With the marker `table`, any other test is a law of
its own cases, all of one rank. A case is

* leading: a reduction, an entry that is `thorough`, the first entry or the first optimizer of a family;
* an export: the first entry of any other export, any other optimizer;
* a variant: a further entry of an export;
* of a table: see above.

`$JAXSOFT_DESIGN` names a row of `DESIGNS`, where 1 is every case, n every n-th, with each law beginning at another one,
and 0 none. Nothing is left out by hand.
"""

import os
import zlib

import pytest

RANKS = ("leading", "export", "variant")
# Of the cases of each rank, one in how many runs under a law of either kind; and of a table's.
DESIGNS = {
    "all": dict(formula=(1, 1, 1), engine=(1, 1, 1), kernels=(1, 1, 1), table=1),
    "cover": dict(formula=(1, 1, 3), engine=(1, 3, 3), kernels=(18, 0, 0), table=2),
    # where only the libraries differ
    "newest": dict(formula=(4, 0, 0), engine=(3, 0, 0), kernels=(0, 0, 0), table=4),
    "fast": dict(formula=(6, 12, 0), engine=(6, 0, 0), kernels=(0, 0, 0), table=4),
}


def share_of(design: str, item, rank: str) -> int:
    """One in how many cases of this rank a design runs under a law; 0 is none."""
    if rank == "table":
        return DESIGNS[design]["table"]
    kind = next((kind for kind in ("kernels", "engine") if item.get_closest_marker(kind)), "formula")
    return DESIGNS[design][kind][RANKS.index(rank)]


def case_of(item) -> tuple[str, str] | None:
    """The rank and the name of a law's case; None for other tests."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "entry" in params:
        entry = params["entry"]
        return entry.rank, entry.id
    if "name" in params and hasattr(item.module, "RANKS"):
        return item.module.RANKS.get(params["name"], "export"), params["name"]
    if hasattr(params.get("case"), "id"):
        return "leading", params["case"].id
    if params and item.get_closest_marker("table"):
        return "table", item.callspec.id
    return None


def group(items: list[pytest.Item]) -> None:
    """Sorts the laws by case, those of a case in one process, so that they share its compiled programs."""
    cases = {i: case_of(item) for i, item in enumerate(items)}
    laws = [i for i, case in cases.items() if case is not None and case[0] != "table"]
    order = {case: i for i, case in reversed(cases.items())}
    ordered = sorted(laws, key=lambda i: order[cases[i]])
    for i, item in zip(laws, [items[i] for i in ordered]):
        items[i] = item
        item.add_marker(pytest.mark.xdist_group(case_of(item)[1]))


def select(config, items: list[pytest.Item]) -> None:
    """Deselects the laws that are not in the design of `$JAXSOFT_DESIGN`, "all" by default."""
    design = os.environ.get("JAXSOFT_DESIGN", "all")
    if design not in DESIGNS:
        raise pytest.UsageError(f"JAXSOFT_DESIGN must be one of {sorted(DESIGNS)}, got {design!r}")
    kept, left, turns = [], [], {}
    for item in items:
        case = case_of(item)
        if case is None:
            kept.append(item)
            continue
        law = item.function.__name__
        share = share_of(design, item, case[0])
        turn = turns.setdefault((law, case[0]), {})  # by case
        index = turn.setdefault(case[1], len(turn)) + zlib.crc32(law.encode())
        (kept if share and index % share == 0 else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept
