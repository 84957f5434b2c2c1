"""A hook of mkdocs: writes the pages of the reference, their part of the navigation, and the table of losses.

A public package has a page that lists its exports, and one page for each of its modules that defines exports. Title and
introduction of a page are the docstring of its module. What is exported twice is documented once, under its shortest
name, on the page of the module that defines it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "tests")]

import loss_table  # noqa: E402

_ON_SCORES = "attention calibration decoding heads kernels losses normalizers rows"
_OTHERS = "activations flax merging norms optimizers"
PACKAGES = ["jaxsoft", *(f"jaxsoft.{name}" for name in sorted(f"{_ON_SCORES} {_OTHERS}".split()))]
# Public modules that are no packages: their public names are exports.
MODULES = ["jaxsoft.flax.linen", "jaxsoft.flax.nnx", "jaxsoft.rows.reductions"]
TABLE = "losses-table.md"
SOUGHT = ["jaxsoft.losses.classification", "jaxsoft.attention._dot_product"]
LISTS = "---\nsearch:\n  boost: 0.3\n---\n"  # pages of lists come after what they list


class Export(NamedTuple):
    """An object that the library exports.

    Attributes:
      names: its public names, the one that documents it first.
      thing: the object.
      module: where it is defined.
      line: at which line.
    """

    names: tuple[str, ...]
    thing: Any
    module: str
    line: int

    @property
    def doc(self) -> str:
        """Its docstring."""
        return "" if self.thing.__doc__ == type(self.thing).__doc__ else inspect.getdoc(self.thing) or ""

    @property
    def name(self) -> str:
        """Its name without the package."""
        return self.names[0].rpartition(".")[2]

    @property
    def link(self) -> str:
        """A link to where it is documented."""
        return f"[`{self.name}`][{self.names[0]}]"

    @property
    def summary(self) -> str:
        """The first line of its docstring, as a cell of a table."""
        return cell(self.doc.partition("\n")[0])


# --- what the library exports -------------------------------------------------------------------------------


@functools.cache
def _definitions(module: ModuleType) -> dict[str, int]:
    """The names that a module defines at its top level, and their lines."""
    lines = {}
    for node in ast.parse(inspect.getsource(module)).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        for target in targets:
            name = getattr(target, "id", getattr(target, "name", None))
            if isinstance(name, str):
                lines[name] = node.lineno
    return lines


def exported(package: str) -> list[str]:
    """The names that a package exports, without its modules."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [name for name in _definitions(module) if name[0] != "_"]
    return [n for n in names if n[:2] != "__" and not inspect.ismodule(getattr(module, n))]


def _defined_in(name: str, thing: Any) -> ModuleType:
    """The module that defines a thing under the name."""
    for module in [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] == "jaxsoft"]:
        if getattr(module, name, None) is thing and name in _definitions(module):
            return module
    raise ValueError(f"no module of jaxsoft defines {name}")


@functools.cache
def exports() -> list[Export]:
    """All exports, in the order of their definition."""
    names: dict[tuple[str, int], list[str]] = {}
    things = {}
    for package in (*PACKAGES, *MODULES):
        for name in exported(package):
            thing = getattr(importlib.import_module(package), name)
            names.setdefault((name, id(thing)), []).append(f"{package}.{name}")
            things[id(thing)] = thing
    found = []
    for (name, key), all_names in names.items():
        module = _defined_in(name, things[key])
        all_names.sort(key=lambda n: (n.count("."), n))
        found.append(Export(tuple(all_names), things[key], module.__name__, _definitions(module)[name]))
    return sorted(found, key=lambda e: (e.module.replace("._", "."), e.line))


def by_module(chosen: Iterable[Export]) -> dict[str, list[Export]]:
    """Exports grouped by the module that defines them."""
    groups: dict[str, list[Export]] = {}
    for export in chosen:
        groups.setdefault(export.module, []).append(export)
    return groups


# --- the pages ----------------------------------------------------------------------------------------------


def address(module: str) -> str:
    """The address of a module's page; a package's is an index."""
    path = "/".join(["api", *(part.removeprefix("_") for part in module.split(".")[1:])])
    return f"{path}/index.md" if module in PACKAGES else f"{path}.md"


_EXAMPLE = re.compile(r"^Example:\n((?:  .*\n|\n)+)", re.MULTILINE)


def heading(module: str) -> tuple[str, str]:
    """Title and introduction of a page: the first line of the module's docstring, and the rest."""
    first, _, rest = (inspect.getdoc(importlib.import_module(module)) or module).partition("\n")
    rest = _EXAMPLE.sub(lambda m: f"```pycon\n{textwrap.dedent(m[1]).strip()}\n```\n", f"{rest.strip()}\n")
    return first.rstrip("."), rest.strip()


def found_first(module: str) -> bool:
    """Whether the search ranks a module's page above others: what is used first, and what the top level exports."""
    return module in SOUGHT or any(e.names[0].count(".") == 1 for e in by_module(exports())[module])


def module_page(module: str) -> str:
    """The page of a module: its docstring and its exports."""
    title, text = heading(module)
    members = [f"::: {export.names[0]}\n" for export in by_module(exports())[module]]
    front = ["---\nsearch:\n  boost: 4\n---\n"] if found_first(module) else []
    return "\n".join([*front, f"# {title}\n", f"{text}\n", *members])


def overview_page(package: str) -> str:
    """The page of a package: its docstring, and a table of its exports for each module that defines some."""
    title, text = heading(package)
    lines = [LISTS, f"# {package}\n", f"{title}.\n", f"{text}\n"]
    up = "../" * address(package).count("/")
    if package == PACKAGES[0]:
        lines.append("| | |\n| --- | --- |")
        lines += [f"| [{p}]({up}{address(p)}) | {cell(heading(p)[0])} |" for p in PACKAGES[1:]]
        lines.append("")
    places = {package} | {m for m in MODULES if m.startswith(package + ".") and package != PACKAGES[0]}
    own = [e for e in exports() if any(name.rpartition(".")[0] in places for name in e.names)]
    for module, members in by_module(own).items():
        lines.append(f"## [{heading(module)[0]}]({up}{address(module)})\n\n| | |\n| --- | --- |")
        lines += [f"| {export.link} | {export.summary} |" for export in members]
        lines.append("")
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text as a cell of a table, whose code may hold bars as they are."""
    parts = text.split("`")
    return "`".join([part.replace("|", "\\|") if i % 2 == 0 else part for i, part in enumerate(parts)])


def pages() -> dict[str, str]:
    """The pages of the reference: their texts by address."""
    texts = {address(package): overview_page(package) for package in PACKAGES}
    return texts | {address(module): module_page(module) for module in by_module(exports())}


def navigation() -> list[Any]:
    """The reference's part of the navigation: a section for each package."""
    sections = [address("jaxsoft")]
    for package in PACKAGES[1:]:
        own = [module for module in by_module(exports()) if module.startswith(package + ".")]
        title = {module: module.rpartition(".")[2].strip("_").replace("_", " ") for module in own}
        sections.append({package: [address(package), *({title[module]: address(module)} for module in own)]})
    return sections


# --- the table of losses ------------------------------------------------------------------------------------

HEAD = """\
---
hide: [toc]
search:
  boost: 0.3
---

# Table of losses

Each loss is a function of a few statistics of a row of logits, which are [row reductions](api/rows/reductions.md).
The table comes from tracing each loss on `linear_logits`, so that no logits are stored.

*Reads*: the reductions that the loss asks for, one line per pass over the logits; "its own" is a reduction that the
loss defines itself. *Forward* and *backward*: the cost of the value, and what the gradient adds, in matrix products of
the size of `hidden @ weight`, counted in the traced program. A pass computes the logits once for the value; its
gradient computes them again and takes two more products, for `hidden` and for `weight`. `weighted_sum` and
`weighted_mean` save the second computation. Two heads count twice, and `s` is the number of steps of a search. A dash:
the function reads no logits, or needs whole rows. Options and kinds of labels that change what is read have a line of
their own.

In the formulas `x` are the logits of the row, `y` its label and `p = softmax(x)`; each family's page explains the rest.
"""


def reference(docstring: str) -> str:
    """The first paper of a docstring's reference, shortened: authors, and the title up to its colon."""
    section = re.search(r"^References?:\n((?: .*\n?)+)", docstring, re.MULTILINE)
    text = " ".join(section[1].split()) if section else ""
    paper = re.match(r'(.*?),? "(.*?)[,.]?"', text)
    if paper is None:
        return ""
    authors = re.split(r", and |, | and ", paper[1])
    who = f"{authors[0]} et al." if len(authors) > 2 else " and ".join(authors)
    title = paper[2].partition(":")[0]
    return f"{who}, {title}"


def reduction_link(name: str) -> str:
    """A link to a reduction; the text itself for one that the library does not export."""
    return name if " " in name else f"[`{name}`][jaxsoft.rows.reductions.{name}]"


def table_line(export: Export, options: str, trace: Any) -> str:
    """A line of the table; a loss with other options has neither formula nor reference again."""
    what = [f"{export.link}, {options}"]
    if not options:
        what = [export.link, export.summary]
        if paper := reference(export.doc):
            what.append(f"<small>{cell(paper)}</small>")
    cells = ["-", "-", "-"]
    if trace is not None:
        passes = [", ".join(map(reduction_link, names)) for names in trace.passes]
        cells = ["<br>".join(passes), trace.value, trace.gradient]
    return f"| {'<br>'.join(what)} | {' | '.join(map(str, cells))} |"


def table_page(rows: Iterable[tuple[str, str, Any]]) -> str:
    """The table of losses, from the rows of `loss_table.rows`."""
    by_name: dict[str, list[tuple[str, Any]]] = {}
    for name, *row in rows:
        by_name.setdefault(f"jaxsoft.losses.{name}", []).append(tuple(row))
    text = [HEAD]
    for module, members in by_module(e for e in exports() if set(e.names) & set(by_name)).items():
        text.append(
            f"\n## {heading(module)[0]}\n\n| loss | reads | forward | backward |\n| --- | --- | --- | --- |"
        )
        for export in members:
            text += [table_line(export, *row) for name in export.names for row in by_name.get(name, [])]
    return "\n".join([*text, ""])


@functools.cache
def losses_table() -> str:
    """The page of the table of losses."""
    return table_page(loss_table.rows())


# --- links from code in the text ----------------------------------------------------------------------------

_CODE = re.compile(r"<(a|h\d|pre|autoref)\b.*?</\1>|<code>([A-Za-z_][\w.]*)</code>", re.DOTALL)


@functools.cache
def _targets() -> dict[str, str]:
    """What a name in the text links to: names of exports, whole or from the package on, that mean one thing."""
    targets: dict[str, set[str]] = {}
    for export in exports():
        for name in export.names:
            parts = name.split(".")
            for i in range(len(parts)):
                targets.setdefault(".".join(parts[i:]), set()).add(export.names[0])
    functions = [export.thing for export in exports() if inspect.isfunction(export.thing)]
    arguments = {name for function in functions for name in inspect.signature(function).parameters}
    return {name: next(iter(t)) for name, t in targets.items() if len(t) == 1 and name not in arguments}


def linked(html: str) -> str:
    """The text with links on the names of exports that stand in it as code."""

    def replace(match: re.Match[str]) -> str:
        target = _targets().get(match[2] or "")
        return f'<autoref identifier="{target}" optional>{match[0]}</autoref>' if target else match[0]

    return _CODE.sub(replace, html)


# --- mkdocs -------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Fills in the navigation's entry `API`."""
    config.nav = [{"API": navigation()} if "API" in entry else entry for entry in config.nav]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for path, text in {**pages(), TABLE: losses_table()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **kwargs: Any) -> str:
    """Links the names of exports."""
    return linked(html)
