"""The example of the losses for imbalanced classes runs, and prints a row for each."""

import pathlib
import re
import runpy
import sys

_EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "imbalanced_losses.py"


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(_EXAMPLE), "--steps", "3", "--seeds", "1"])
    losses = runpy.run_path(str(_EXAMPLE), run_name="__main__")["LOSSES"]
    head, *table = capsys.readouterr().out.splitlines()
    assert "100 65 42 27 18 11 7 5 3 2" in head
    rows = dict(
        re.match(r"(.+?)  +(\d\.\d+) \+- \d\.\d+  +\d\.\d+ \+- \d\.\d+$", line).groups() for line in table[3:]
    )
    assert list(rows) == list(losses) and len(rows) == 7
    assert all(0 <= float(accuracy) <= 1 for accuracy in rows.values())
