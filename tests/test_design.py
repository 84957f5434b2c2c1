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


def collected(law, kind, cases, monkeypatch, name, turn=0):
    """The names of the cases that a design keeps for a law."""
    monkeypatch.setenv("JAXSOFT_DESIGN", name)
    monkeypatch.setenv("JAXSOFT_TURN", str(turn))
    module = types.ModuleType("laws")
    if cases[0] == next(iter(CASES)):
        module.RANKS = RANKS

    def item(case):
        params = {"name": case} if isinstance(case, str) else {"entry": case}
        return types.SimpleNamespace(
            callspec=types.SimpleNamespace(params=params, id=case if isinstance(case, str) else case.id),
            module=module,
            function=types.SimpleNamespace(__name__=law, __qualname__=law),
            get_closest_marker=lambda marker: kind == marker,
            nodeid=f"tests/test_laws.py::{law}[{case if isinstance(case, str) else case.id}]",
        )

    items, left = [item(case) for case in cases], []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
    design.select(types.SimpleNamespace(hook=hook), items)
    assert len(items) + len(left) == len(cases)
    return {kept.callspec.params.get("name") or kept.callspec.params["entry"].id for kept in items}


@pytest.mark.parametrize("law", ["test_a", "test_b", "test_c"])
@pytest.mark.parametrize("kind", ["formula", "engine", "mesh"])
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
    [("formula", ENTRIES), ("engine", ENTRIES), ("mesh", list(CASES)), ("table", _LISTED)],
)
def test_after_some_turns_every_law_has_run_on_every_case(kind, cases, monkeypatch):
    shares = design.DESIGNS["cover"]
    turns = range(shares["table"] if kind == "table" else math.lcm(*shares[kind]))
    kept = [collected("test_a", kind, cases, monkeypatch, "cover", turn) for turn in turns]
    assert len(set.union(*kept)) == len(cases)


def test_lists(monkeypatch):
    """A list that is a product is not cut along one of its parameters; the shortest keeps a case."""
    kept = collected("test_a", "formula", _LISTED, monkeypatch, "cover")
    assert len(kept) == len(_LISTED) / design.DESIGNS["cover"]["list"]
    assert len({name[-1] for name in kept}) > 1
    assert len(collected("test_a", "formula", _LISTED[:2], monkeypatch, "cover")) == 1
    assert collected("test_a", "whole", _LISTED, monkeypatch, "cover") == set(_LISTED)
    names = [f"tests/test_laws.py::test_a[{name}]" for name in _LISTED[:12]]
    monkeypatch.setattr(design, "pinned", lambda: frozenset(names))
    assert collected("test_a", "formula", _LISTED, monkeypatch, "cover") == kept | set(_LISTED[:12])


def test_slips_name_cases():
    assert "tests/conformance/test_laws.py::test_a_row_without_entries[softcap]" in design.pinned()
    assert len(design.pinned()) > 40


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


def test_further_parameters_of_a_law_take_turns(monkeypatch):
    """A case of a law has one of them in a run, another case another one, and all after some turns."""
    module, entries = types.ModuleType("laws"), [entry for entry in ENTRIES if entry.rank == "leading"]

    def item(entry, value):
        return types.SimpleNamespace(
            callspec=types.SimpleNamespace(params={"entry": entry, "dtype": value}, id=f"{entry.id}-{value}"),
            module=module,
            function=types.SimpleNamespace(__name__="test_a", __qualname__="test_a"),
            get_closest_marker=lambda marker: marker == "engine",
            nodeid=f"tests/test_laws.py::test_a[{entry.id}-{value}]",
        )

    def kept(turn):
        items = [item(entry, value) for value in "ab" for entry in entries]
        monkeypatch.setenv("JAXSOFT_DESIGN", "cover")
        monkeypatch.setenv("JAXSOFT_TURN", str(turn))
        hook = types.SimpleNamespace(pytest_deselected=lambda items: None)
        design.select(types.SimpleNamespace(hook=hook), items)
        return [(i.callspec.params["entry"].id, i.callspec.params["dtype"]) for i in items]

    share = design.DESIGNS["cover"]["engine"][0]
    first = kept(0)
    assert len({entry for entry, _ in first}) == len(first) and len(first) >= len(entries) // share
    assert {value for _, value in first} == {"a", "b"}
    assert len(set().union(*map(kept, range(2 * share)))) == 2 * len(entries)
