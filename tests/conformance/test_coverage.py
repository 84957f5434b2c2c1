"""Every export has an entry in the conformance table and a complete docstring."""

import inspect
import pathlib
import re

import pytest

import jaxsoft
from conformance.table import ELSEWHERE, ENTRIES, canonical

pytestmark = pytest.mark.whole  # the cases are exports

ROOT = pathlib.Path(__file__).parents[2]
MODULES = [
    jaxsoft,
    jaxsoft.activations,
    jaxsoft.attention,
    jaxsoft.calibration,
    jaxsoft.decoding,
    jaxsoft.heads,
    jaxsoft.kernels,
    jaxsoft.losses,
    jaxsoft.merging,
    jaxsoft.normalizers,
    jaxsoft.norms,
    jaxsoft.optimizers,
    jaxsoft.rows,
]
EXPORTS = sorted(
    f"{module.__name__}.{name}"
    for module in MODULES
    for name in module.__all__
    if not name.startswith("__") and not inspect.ismodule(getattr(module, name))
)


OPTIMIZER_TESTS = [path.read_text() for path in (ROOT / "tests" / "optimizers").rglob("*.py")]


def lookup(export):
    module, _, name = export.rpartition(".")
    return getattr(next(m for m in MODULES if m.__name__ == module), name)


@pytest.mark.parametrize("export", EXPORTS)
def test_export_has_a_conformance_entry(export):
    if export.startswith("jaxsoft.optimizers."):
        if export.endswith("State"):
            return  # what the transforms carry
        name = export.rpartition(".")[2]
        assert any(re.search(rf"\b{name}\b", text) for text in OPTIMIZER_TESTS)
        return
    export = canonical(export)
    if export in ELSEWHERE:
        path, name = ELSEWHERE[export], export.rpartition(".")[2]
        assert path is None or re.search(rf"\b{name}\b", (ROOT / path).read_text()), (
            f"{path} does not name it"
        )
    else:
        assert export in {e.export for e in ENTRIES}


@pytest.mark.parametrize("export", EXPORTS)
def test_export_is_documented(export):
    thing = lookup(export)
    if export == "jaxsoft.rows.Logits":
        return
    doc = inspect.getdoc(thing) or ""
    assert doc, "no docstring"
    if inspect.isfunction(thing):
        doc = doc.replace("Examples:", "Example:")
        of_arguments = ("Args:", "Raises:") if inspect.signature(thing).parameters else ()
        for section in (*of_arguments, "Returns:", "Example:"):
            assert section in doc, f"docstring has no section {section}"
        assert ">>>" in doc


def test_every_entry_is_exported():
    assert {e.export for e in ENTRIES} <= set(EXPORTS)
