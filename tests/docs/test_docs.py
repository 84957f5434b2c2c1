"""The documentation runs, names what exists, and its generated table is up to date."""

import importlib
import importlib.util
import inspect
import itertools
import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import pytest
from conformance.entry import make_inputs
from conformance.table import ENTRIES

import jaxsoft
from jaxsoft.rows import reductions

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
FENCE = re.compile(r"^( *)```python[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*\Z")


def relative(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    """The python blocks of a page that are to run, with the line each starts at."""
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if not NOT_RUN.search(text[: match.start()]):
            yield text.count("\n", 0, match.start()) + 1, textwrap.dedent(match[2])


WITH_CODE = [path for path in [README, *PAGES] if path.exists() and list(blocks(path))]


@pytest.mark.parametrize("path", WITH_CODE, ids=relative)
def test_python_blocks_run(path):
    namespace = {"__name__": "page"}
    for line, code in blocks(path):
        # Blank lines before the code: errors then name the line of the page.
        exec(compile("\n" * line + code, str(path), "exec"), namespace)


def test_a_block_is_skipped_only_with_a_reason(tmp_path):
    page = tmp_path / "page.md"
    fence = "```python\n{}\n```\n"
    page.write_text(
        fence.format(1)
        + "<!-- not run: slow -->\n"
        + fence.format(2)
        + "<!-- not run: -->\n"
        + fence.format(3)
    )
    assert [code for _, code in blocks(page)] == ["1\n", "3\n"]


def test_every_page_of_the_navigation_exists_and_every_page_is_in_it():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", config, re.MULTILINE)
    assert len(pages) == len(set(pages)) > 5
    assert set(pages) == {path.relative_to(DOCS).as_posix() for path in PAGES}


def resolve(name):
    """The object of a dotted name that starts with a module."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            thing = getattr(thing, part)
        return thing
    raise AttributeError(name)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_every_name_that_is_linked_or_documented_exists(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"^::: (\S+)|\]\[(jaxsoft[.\w]*)\]", text, re.MULTILINE):
        resolve("".join(name))


def test_every_reduction_is_on_its_page():
    page = (DOCS / "api" / "reductions.md").read_text(encoding="utf-8")
    for name, thing in vars(reductions).items():
        if getattr(thing, "__module__", "") == reductions.__name__ and not name.startswith("_"):
            assert f"::: jaxsoft.rows.reductions.{name}\n" in page or f"[jaxsoft.rows.{name}]" in page, name


def test_the_literature_page_counts_its_rows():
    page = (DOCS / "literature.md").read_text(encoding="utf-8")
    states = re.findall(r"\| (complete|partly)[^|]* \|$", page, re.MULTILINE)
    total = int(re.search(r"list of (\d+) papers", page)[1])
    claim = f"{states.count('complete')} of {total} rows complete, {states.count('partly')} partly"
    assert claim in page, claim


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_loss_table", DOCS / "generate_loss_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_losses_is_up_to_date(generator):
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page()


def test_the_table_of_losses_must_be_complete(generator, monkeypatch):
    rows = tuple(row for row in generator.FAMILIES["classification"] if row.name != "focal_loss")
    monkeypatch.setitem(generator.FAMILIES, "classification", rows)
    with pytest.raises(SystemExit, match="focal_loss"):
        generator.page()


def passes(jaxpr):
    """How often a program runs the engine."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "run":
            count += 1
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count += passes(inner)
    return count


def test_the_table_of_losses_tells_the_truth(generator):
    entries = {entry.id: entry for entry in ENTRIES}
    hidden, weight = jnp.ones((2, 3)), jnp.ones((3, 5))
    counted = 0
    for row in itertools.chain.from_iterable(generator.FAMILIES.values()):
        for statistic in row.statistics:
            assert not statistic.isidentifier() or inspect.isfunction(getattr(reductions, statistic)), row
        entry = entries.get("losses." + (row.entry or row.name))
        if entry is None or not row.streams:
            assert entry is None or entry.dense_only, row
            continue
        given = make_inputs(0, (2,), 5)

        def call(hidden, weight, entry=entry, given=given):
            return entry.call(jaxsoft.linear_logits(hidden, weight), {k: given[k] for k in entry.inputs})

        assert passes(jax.make_jaxpr(call)(hidden, weight).jaxpr) == row.passes, row
        counted += 1
    assert counted > 50


def test_the_license_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
