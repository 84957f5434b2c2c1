"""The covering design: `make test` leaves out no export, no law and no family."""

import types

import design
import pytest
from conformance.table import ENTRIES
from optimizers.test_common import CASES, RANKS


def collected(law, kind, cases, monkeypatch, name):
    """The names of the cases that a design keeps for a law."""
    monkeypatch.setenv("JAXSOFT_DESIGN", name)

    def item(case):
        params = {"name": case} if isinstance(case, str) else {"entry": case}
        return types.SimpleNamespace(
            callspec=types.SimpleNamespace(params=params),
            module=types.SimpleNamespace(RANKS=RANKS),
            function=types.SimpleNamespace(__name__=law),
            get_closest_marker=lambda marker: kind == marker,
        )

    items, left = [item(case) for case in cases], []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
    design.select(types.SimpleNamespace(hook=hook), items)
    assert len(items) + len(left) == len(cases)
    return {design.case_of(kept)[1] for kept in items}


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
    assert ranks["leading"] <= kept["cover"]
    if kind == "formula":
        assert ranks["export"] <= kept["cover"]
    for rank, names in ranks.items():
        share = len(kept["cover"] & names) / len(names)
        assert share == 1 or abs(share - 1 / 3) <= 1 / len(names), rank
    assert kept["newest"] <= ranks["leading"] and kept["newest"] and kept["fast"]


def test_every_export_and_family_leads():
    leading = {entry.export for entry in ENTRIES if entry.rank == "leading"}
    first = {entry.export for entry in ENTRIES if entry.rank in ("leading", "export")}
    assert first == {entry.export for entry in ENTRIES}
    families = {entry.function.__module__ for entry in ENTRIES if entry.function is not None}
    assert {e.function.__module__ for e in ENTRIES if e.function and e.export in leading} == families


def test_variants_take_turns(monkeypatch):
    """Over the laws, every variant runs under some of them."""
    laws = [f"test_{i}" for i in range(12)]
    kept = [collected(law, "formula", ENTRIES, monkeypatch, "cover") for law in laws]
    assert set.union(*kept) == {entry.id for entry in ENTRIES}


def test_an_unknown_design_is_refused(monkeypatch):
    with pytest.raises(pytest.UsageError, match="JAXSOFT_DESIGN must be one of"):
        collected("test_a", "formula", ENTRIES[:1], monkeypatch, "everything")
