"""Which laws run on which cases: the full product, or a covering design fixed by rule (CONTRIBUTING.md).

A law is a test with a parameter `entry` (tests/conformance), `name` (tests/optimizers/test_common.py) or `case` (a
reduction; tests/rows, tests/kernels). It is of the formula, or, with the marker `engine`, of a mechanism that all
functions share, or, with the marker `mesh`, of that mechanism on several devices, or, with the marker `kernels`, runs
over kernels. Further parameters of a law (a dtype, a kind of mesh) take turns: a case has one of their values in each
design but "all". A case is

* leading: a reduction, an entry that is `thorough`, the first entry or the first optimizer of a family;
* an export: the first entry of any other export, any other optimizer;
* a variant: a further entry of an export;
* of a list: the cases of any other test with parameters;
* of a table: those of a test with the marker `table`, which are many or take long;
* plain: a test without parameters, of a file that counts as its list.

`$JAXSOFT_DESIGN` names a row of `DESIGNS`, where 1 is every case, n every n-th and at least one, with each law
beginning at another one, and 0 none. `$JAXSOFT_TURN` moves all beginnings by as many cases, so that what one run leaves
out, a later one runs. A list with the marker `whole` is in every design, and so is, except on the newest jax, a case
that a slip of `tests/mutations` names: it is the one that sees it.
"""

import functools
import os
import pathlib
import shlex
import tomllib
import zlib

import pytest

RANKS = ("leading", "export", "variant")
# Of the cases of each rank, one in how many runs under a law of either kind; and of the other ranks.
DESIGNS = {
    "all": dict(
        formula=(1, 1, 1), engine=(1, 1, 1), mesh=(1, 1, 1), kernels=(1, 1, 1), list=1, table=1, plain=1
    ),
    "cover": dict(
        formula=(1, 1, 4), engine=(4, 4, 4), mesh=(6, 12, 12), kernels=(18, 0, 0), list=8, table=12, plain=2
    ),
    # where only the libraries differ
    "newest": dict(
        formula=(16, 0, 0), engine=(12, 0, 0), mesh=(24, 0, 0), kernels=(0, 0, 0), list=24, table=24, plain=8
    ),
    "fast": dict(
        formula=(6, 12, 0), engine=(6, 0, 0), mesh=(24, 0, 0), kernels=(0, 0, 0), list=4, table=4, plain=1
    ),
}
KINDS = ("kernels", "mesh", "engine")


def share_of(design: str, item, rank: str) -> int:
    """One in how many cases of this rank a design runs under a law; 0 is none."""
    if rank not in RANKS:
        return DESIGNS[design][rank]
    kind = next((kind for kind in KINDS if item.get_closest_marker(kind)), "formula")
    return DESIGNS[design][kind][RANKS.index(rank)]


def case_of(item) -> tuple[str, str] | None:
    """The rank and the name of a test's case; None for whole lists and for examples of docstrings."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "entry" in params:
        entry = params["entry"]
        return entry.rank, entry.id
    if "name" in params and hasattr(item.module, "RANKS"):
        return item.module.RANKS.get(params["name"], "export"), params["name"]
    if hasattr(params.get("case"), "id"):
        return "leading", params["case"].id
    if not hasattr(item, "function") or item.get_closest_marker("whole"):
        return None
    if not params:
        return "plain", item.function.__qualname__
    return "table" if item.get_closest_marker("table") else "list", item.callspec.id


def _is_law(case: tuple[str, str] | None) -> bool:
    return case is not None and case[0] in RANKS


def _law(item, rank: str) -> tuple:
    """What takes turns: the cases of a rank under one test, the plain tests of a file."""
    return item.module, "" if rank == "plain" else item.function.__qualname__, rank


def group(items: list[pytest.Item]) -> None:
    """Puts tests that share compiled programs into one process: the laws of a case, and the other tests of a file.

    The files go first, those with slow tests before the others: the last groups are short, and no process waits long.
    """
    cases = [case_of(item) for item in items]
    names = [case[1] if _is_law(case) else item.nodeid.partition("::")[0] for item, case in zip(items, cases)]
    slow = {name for name, item in zip(names, items) if item.get_closest_marker("slow")}
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    order = sorted(
        range(len(items)), key=lambda i: (_is_law(cases[i]), names[i] not in slow, first[names[i]], i)
    )
    for item, name in zip(items, names):
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(name))
    items[:] = [items[i] for i in order]


@functools.cache
def pinned() -> frozenset[str]:
    """The tests and the cases that slips name."""
    files = (pathlib.Path(__file__).parent / "mutations").glob("*.toml")
    slips = [slip for file in files for slip in tomllib.loads(file.read_text(encoding="utf-8"))["slip"]]
    return frozenset(word for slip in slips for word in shlex.split(slip["tests"]) if "::" in word)


def select(config, items: list[pytest.Item]) -> None:
    """Deselects the cases that are not in the design of `$JAXSOFT_DESIGN`, "all" by default."""
    design, turn = os.environ.get("JAXSOFT_DESIGN", "all"), os.environ.get("JAXSOFT_TURN", "0")
    if design not in DESIGNS:
        raise pytest.UsageError(f"JAXSOFT_DESIGN must be one of {sorted(DESIGNS)}, got {design!r}")
    if not turn.isdecimal():
        raise pytest.UsageError(f"JAXSOFT_TURN must be a number, got {turn!r}")
    laws = {}  # by law and rank: the places of its cases, in their order
    further = {}  # by law and case: the places of the further parameters
    for item in items:
        if case := case_of(item):
            places = laws.setdefault(_law(item, case[0]), {})
            places.setdefault(case[1], len(places))
            if _is_law(case):
                places = further.setdefault((_law(item, case[0]), case[1]), {})
                places.setdefault(item.callspec.id, len(places))
    for (*_, rank), places in laws.items():
        if (
            rank not in RANKS
        ):  # in an order without a pattern: a list may be a product, as of functions and dtypes
            in_order = sorted(places, key=lambda name: zlib.crc32(name.encode()))
            places.update({name: i for i, name in enumerate(in_order)})

    def is_kept(item) -> bool:
        case = case_of(item)
        if case is None or (item.nodeid in pinned() and design != "newest"):
            return True
        law = _law(item, case[0])
        share = min(share_of(design, item, case[0]), len(laws[law]))
        begin = int(turn) + (0 if case[0] == "plain" else zlib.crc32(item.function.__name__.encode()))
        if share == 0 or (laws[law][case[1]] + begin) % share:
            return False
        if design == "all" or not _is_law(case):
            return True
        values = further[law, case[1]]
        return (values[item.callspec.id] + (laws[law][case[1]] + begin) // share) % len(values) == 0

    kept = [is_kept(item) for item in items]
    if left := [item for item, keep in zip(items, kept) if not keep]:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item, keep in zip(items, kept) if keep]
