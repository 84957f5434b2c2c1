"""The covering design: `make test` leaves out no export, no law and no family, and what it leaves out comes back."""

import math
import types

import design
import pytest
from conformance import test_laws
from conformance.table import ENTRIES
from optimizers.test_common import CASES, RANKS

pytestmark = pytest.mark.whole

_LISTED = [f"{letter}-{number}" for letter in "abcdefgh" for number in range(3)]


def collected(law, kind, cases, monkeypatch, name, turn=0, pinned=()):
    """The names of the cases that a design keeps for a law."""
    monkeypatch.setenv("JAXSOFT_DESIGN", name)
    monkeypatch.setenv("JAXSOFT_TURN", str(turn))
    module = types.ModuleType("laws")
    if cases[0] == next(iter(CASES)):
        module.RANKS = RANKS

    def item(case):
        params = {"name": case} if isinstance(case, str) else {"entry": case}
        return types.SimpleNamespace(
            callspec=types.SimpleNamespace(params=params, id=case),
            module=module,
            function=types.SimpleNamespace(__name__=law, __qualname__=law),
            get_closest_marker=lambda marker: kind == marker or (marker == "pinned" and case in pinned),
        )

    items, left = [item(case) for case in cases], []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
    design.select(types.SimpleNamespace(hook=hook), items)
    assert len(items) + len(left) == len(cases)
    return {kept.callspec.params.get("name") or kept.callspec.params["entry"].id for kept in items}


@pytest.mark.parametrize("law", ["test_a", "test_b", "test_c"])
@pytest.mark.parametrize("kind", ["formula", "engine"])
@pytest.mark.parametrize("cases", [ENTRIES, list(CASES)], ids=["entries", "optimizers"])
def test_designs(law, kind, cases, monkeypatch):
    ranks = {}
    for case in cases:
        name, rank = (case, RANKS.get(case, "export")) if isinstance(case, str) else (case.id, case.rank)
        ranks.setdefault(rank, set()).add(name)
    kept = {name: collected(law, kind, cases, monkeypatch, name) for name in design.DESIGNS}
    assert kept["all"] == set.union(*ranks.values())
    if kind == "formula":
        assert ranks["leading"] | ranks["export"] <= kept["cover"]
    for rank, names in ranks.items():
        expected = len(names) / design.DESIGNS["cover"][kind][design.RANKS.index(rank)]
        assert math.floor(expected) <= len(kept["cover"] & names) <= math.ceil(expected), rank
    assert kept["newest"] <= ranks["leading"] and kept["newest"] and kept["fast"]


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("formula", ENTRIES), ("engine", ENTRIES), ("engine", list(CASES)), ("table", _LISTED)],
)
def test_after_some_turns_every_law_has_run_on_every_case(kind, cases, monkeypatch):
    shares = design.DESIGNS["cover"]
    turns = range(shares["table"] if kind == "table" else math.lcm(*shares[kind]))
    kept = [collected("test_a", kind, cases, monkeypatch, "cover", turn) for turn in turns]
    assert len(set.union(*kept)) == len(cases)


def test_lists_keep_a_case_of_each_value(monkeypatch):
    """A list that is a product is not cut along one of its parameters; the shortest keeps a case; pins stay."""
    kept = collected("test_a", "formula", _LISTED, monkeypatch, "cover")
    assert len(kept) == 6 and len({name[-1] for name in kept}) > 1
    assert len(collected("test_a", "formula", _LISTED[:2], monkeypatch, "cover")) == 1
    pinned = collected("test_a", "formula", _LISTED, monkeypatch, "cover", pinned=_LISTED[:12])
    assert kept | set(_LISTED[:12]) == pinned
    assert collected("test_a", "whole", _LISTED, monkeypatch, "cover") == set(_LISTED)


def test_every_export_and_family_leads():
    leading = {entry.export for entry in ENTRIES if entry.rank == "leading"}
    first = {entry.export for entry in ENTRIES if entry.rank in ("leading", "export")}
    assert first == {entry.export for entry in ENTRIES}
    families = {entry.function.__module__ for entry in ENTRIES if entry.function is not None}
    assert {e.function.__module__ for e in ENTRIES if e.function and e.export in leading} == families


@pytest.mark.parametrize("kind", ["formula", "engine"])
def test_every_entry_is_under_a_law_of_each_kind_in_each_run(kind, monkeypatch):
    laws = {
        name: "engine" if "engine" in [mark.name for mark in law.pytestmark] else "formula"
        for name, law in vars(test_laws).items()
        if name.startswith("test_")
    }
    kept = [collected(law, kind, ENTRIES, monkeypatch, "cover") for law in laws if laws[law] == kind]
    assert set.union(*kept) == {entry.id for entry in ENTRIES}


def test_unknown_settings_are_refused(monkeypatch):
    with pytest.raises(pytest.UsageError, match="JAXSOFT_DESIGN must be one of"):
        collected("test_a", "formula", ENTRIES[:1], monkeypatch, "everything")
    with pytest.raises(pytest.UsageError, match="JAXSOFT_TURN must be a number"):
        collected("test_a", "formula", ENTRIES[:1], monkeypatch, "cover", "first")
