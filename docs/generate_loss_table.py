"""Writes docs/losses-table.md: one row for each loss, from the lists in docs/losses/*.toml.

  python docs/generate_loss_table.py           writes the page
  python docs/generate_loss_table.py --check   fails if the page is not what would be written

An exported loss without a row, or a row without an exported loss, is an error.
"""

from __future__ import annotations

import pathlib
import sys
import tomllib
from typing import NamedTuple

from jaxsoft import losses

PAGE = pathlib.Path(__file__).with_name("losses-table.md")
LISTS = sorted(PAGE.with_name("losses").glob("*.toml"))


class Loss(NamedTuple):
    """A row of the table: a `[[loss]]` of a list.

    Attributes:
      name: the function's name in `jaxsoft.losses`.
      formula: of one row, in the notation that the page explains.
      statistics: what it is a function of: row reductions (names of `jaxsoft.rows.reductions`), or in words.
      passes: how often it reads the logits for its value; two where a statistic needs another one first; 0 where it
        reads none, or does not stream. The tests count it for the entries of the conformance table.
      variant: options or labels that make another row of the same loss.
      entry: the entry of the conformance table that stands for the row, if not the one of the loss's name.
      cost: of value and gradient, where it does not follow from `passes`.
      reference: the paper.
    """

    name: str
    formula: str
    statistics: tuple[str, ...]
    passes: int
    variant: str = ""
    entry: str = ""
    cost: str = ""
    reference: str = ""

    @property
    def streams(self) -> bool:
        """Whether it takes `linear_logits`."""
        return self.passes > 0


_CONTENT = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in LISTS}
FAMILIES = {family: tuple(Loss(**row) for row in c["loss"]) for family, c in _CONTENT.items() if "loss" in c}
# Exports of jaxsoft.losses that are none: targets, weights, means, heads.
NOT_LOSSES = {name for c in _CONTENT.values() for name in c.get("not_losses", [])}
NOT_LOSSES |= {"weighted_mean", "weighted_sum"}

HEAD = """\
<!-- Written by docs/generate_loss_table.py; do not edit. -->

# Table of losses

Each loss is a function of a few statistics of a row of logits, which are [row reductions](api/reductions.md).
In the formulas, `x` are the logits of the row, `y` its label, `lse` the log-sum-exp of `x` (`lse_N`: over the
classes that are not positive), `p = softmax(x)`, and `l = lse - x_y` the negative log-likelihood. Means run over
the classes that are not masked.

*Streams*: takes `linear_logits`, and never stores the logits. *Cost*: of the value and of the gradient, in matrix
products of the size of `hidden @ weight`: a pass over the logits computes them once for the value; its gradient
computes them again, and takes two products for the gradients of `hidden` and `weight`. (`weighted_sum` and
`weighted_mean` compute a chunk of rows once for all of it: 1 + 2.) A dash: the function reads no logits, or all of
them at once.
"""

COLUMNS = """\
| loss | formula | statistics | streams | cost | reference |
| --- | --- | --- | --- | --- | --- |
"""


def check_complete() -> None:
    """Raises if the lists and the exports of `jaxsoft.losses` differ."""
    listed = {loss.name for rows in FAMILIES.values() for loss in rows} | NOT_LOSSES
    exported = set(losses.__all__)
    if listed != exported:
        raise SystemExit(
            f"docs/losses: without a row: {sorted(exported - listed)}; not exported: {sorted(listed - exported)}"
        )


def line(loss: Loss) -> str:
    """A line of the table."""
    link = f"[`{loss.name}`][jaxsoft.losses.{loss.name}]" + (f", {loss.variant}" if loss.variant else "")
    statistics = ", ".join(f"`{s}`" if s.isidentifier() else s for s in loss.statistics)
    cost = loss.cost or (f"{loss.passes} + {3 * loss.passes}" if loss.streams else "-")
    formula = loss.formula.replace("|", "\\|")
    cells = link, f"`{formula}`", statistics, "yes" if loss.streams else "no", cost, loss.reference
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """The text of the page."""
    check_complete()
    sections = [HEAD]
    for family, rows in FAMILIES.items():
        title = family.replace("_", " ").capitalize()
        sections.append(f"\n## {title}\n\n{COLUMNS}{''.join(map(line, rows))}")
    return "".join(sections)


def main() -> None:
    """Writes the page, or with `--check` compares it."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{PAGE.name} is out of date: run python docs/generate_loss_table.py")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
