"""The documentation runs, names what exists, and its generated pages hold every export."""

import importlib
import inspect
import json
import pathlib
import re
import sys
import textwrap

import pytest
from conformance.table import ENTRIES

import jaxsoft
from jaxsoft import losses
from jaxsoft.rows import reductions

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

import generate  # noqa: E402

pytestmark = pytest.mark.whole  # the cases are pages

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
    assert set(pages) == {path.relative_to(DOCS).as_posix() for path in PAGES} | {generate.TABLE}


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
def test_every_name_that_is_linked_exists(path):
    for name in re.findall(r"\]\[(jaxsoft[.\w]*)\]", path.read_text(encoding="utf-8")):
        resolve(name)


@pytest.mark.parametrize("package", generate.PACKAGES)
def test_every_export_is_documented_once(package):
    documented = re.findall(r"^::: (\S+)$", "\n".join(generate.pages().values()), re.MULTILINE)
    assert len(documented) == len(set(documented))
    things = {id(resolve(name)) for name in documented}
    names = generate.exported(package)
    assert names == [name for name in names if id(resolve(f"{package}.{name}")) in things]
    overview = generate.pages()[generate.address(package)]
    assert all(f"[`{name}`][" in overview for name in names)


def test_every_reduction_is_documented():
    page = generate.pages()["api/rows/reductions.md"]
    for name, thing in vars(reductions).items():
        if getattr(thing, "__module__", "") == reductions.__name__ and not name.startswith("_"):
            assert re.search(rf"^::: jaxsoft\.rows\.(reductions\.)?{name}$", page, re.MULTILINE), name


def test_every_module_with_exports_has_a_page_in_the_navigation():
    modules = {export.module for export in generate.exports()}
    assert "jaxsoft.losses.classification" in modules and len(modules) > 50

    def paths(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            path for inner in (entry.values() if isinstance(entry, dict) else entry) for path in paths(inner)
        ]

    in_navigation = paths(generate.navigation())
    assert len(in_navigation) == len(set(in_navigation))
    assert set(in_navigation) == set(generate.pages()) >= {generate.address(module) for module in modules}
    assert generate.address("jaxsoft.rows._weighted") == "api/rows/weighted.md"


def test_examples_of_modules_are_code():
    fenced = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    pages = [page for page in generate.pages().values() if ">>>" in page]
    assert pages and all(">>>" not in fenced.sub("", page) for page in pages)


def test_names_in_the_text_become_links():
    linked = '<autoref identifier="jaxsoft.losses.focal_loss" optional><code>focal_loss</code></autoref>'
    assert generate.linked("<p><code>focal_loss</code></p>") == f"<p>{linked}</p>"
    for same in (
        "<code>temperature</code>",
        "<a><code>focal_loss</code></a>",
        "<pre><code>focal_loss</code></pre>",
    ):
        assert generate.linked(same) == same  # an argument, a link, code


def test_the_literature_page_counts_its_rows():
    page = (DOCS / "literature.md").read_text(encoding="utf-8")
    states = re.findall(r"\| (complete|partly)[^|]* \|$", page, re.MULTILINE)
    total = int(re.search(r"list of (\d+) papers", page)[1])
    claim = f"{states.count('complete')} of {total} rows complete, {states.count('partly')} partly"
    assert claim in page, claim


LOSSES = sorted(
    {entry.export for entry in ENTRIES if entry.loss}
    | {f"jaxsoft.losses.{name}" for name in losses.__all__ if name.endswith(("_loss", "cross_entropy"))}
)


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_line_of_a_loss_holds_its_formula(name):
    assert re.search(r"`[^`]+`", inspect.getdoc(resolve(name)).partition("\n")[0])


def test_the_citation_is_of_this_version():
    assert f"\nversion: {jaxsoft.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_files_that_are_named_exist():
    """In code of the pages and of the docstrings: `examples/losses/robust.py`, ..."""
    folders = "examples|benchmarks|tests|docs|jaxsoft"
    named = re.compile(rf"`[^`\n]*?\b((?:{folders})/[\w/.-]*\.(?:py|md|json|toml|txt))\b[^`\n]*`")
    for path in (README, ROOT / "CONTRIBUTING.md", *PAGES, *(ROOT / "jaxsoft").rglob("*.py")):
        for name in named.findall(path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{relative(path)} names {name}"


def test_the_instructions_of_the_kernel_that_the_guide_follows():
    """`make kernels` counts them."""
    page = (DOCS / "guides" / "how-a-kernel-is-made.md").read_text(encoding="utf-8")
    said = re.search(r"spends ([\d.]+) instructions per score, its gradient ([\d.]+);", page)
    kernels = json.loads((ROOT / "benchmarks" / "results" / "compiled.json").read_text())["kernels"]
    forward, backward = kernels["soft count"], kernels["soft count gradient"]
    assert [float(n) for n in said.groups()] == [forward["instructions"], backward["instructions"]]
    assert forward["spills"] == backward["spills"] == [0, 0]


def test_the_license_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_steps_from_the_call_to_the_last_line_are_in_the_code():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d+\. `(\S+\.py)`, `(\w+)`: .*`([^`]+)`$", page, re.MULTILINE)
    assert len(steps) == len(re.findall(r"^\d+\. ", page, re.MULTILINE)) > 30

    def squeezed(code):
        return re.sub(r"\s", "", code).replace(",)", ")")

    for file, function, line in steps:
        code = (ROOT / "jaxsoft" / file).read_text(encoding="utf-8")
        assert re.search(rf"def {function}\b", code), (file, function)
        assert squeezed(line) in squeezed(code), (file, line)
