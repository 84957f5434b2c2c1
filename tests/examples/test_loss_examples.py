"""The examples that compare losses run, and their tables have a row of plausible numbers for each loss."""

import pathlib
import re
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples" / "losses"
FAMILIES = (
    "alternative",
    "contrastive",
    "distillation",
    "imbalanced",
    "metric",
    "out_of_distribution",
    "preference",
    "ranking",
    "robust",
    "segmentation",
)
STEPS = {"preference": "12", "segmentation": "12"}  # the others take three: enough to tell the losses apart
NUMBER = re.compile(r"(-?\d+\.\d+) \+- (\d+\.\d+)")


def test_every_example_is_here():
    assert sorted(FAMILIES) == sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))


@pytest.mark.table
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table(family, monkeypatch, capsys):
    path = EXAMPLES / f"{family}.py"
    flags = ["--steps", STEPS.get(family, "3"), "--seeds", "1"] + ["--pretraining-steps", "3"] * (
        family == "preference"
    )
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = runpy.run_path(str(path), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if NUMBER.search(line)]
    assert len(rows) >= 5  # the baseline and four losses
    values = [[float(mean) for mean, _ in NUMBER.findall(row)] for row in rows]
    assert all(abs(value) < 100 for row in values for value in row)
    # The losses train differently; after so few steps most segmentation models still predict only background.
    assert len({tuple(row) for row in values}) > (1 if family == "segmentation" else len(rows) / 2)
    for name in module.get("LOSSES", []):
        assert any(row.startswith(name) for row in rows), name
