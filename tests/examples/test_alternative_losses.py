"""The example runs, and its table has a row for every loss."""

import importlib.util
import pathlib
import re

import pytest

PATH = pathlib.Path(__file__).parents[2] / "examples" / "alternative_losses.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("alternative_losses", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table(example, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["alternative_losses.py", "--steps", "3", "--seeds", "1"])
    example.main()
    header, columns, *rows = capsys.readouterr().out.splitlines()
    assert "3 steps" in header and "1 seeds" in header and "test accuracy" in columns
    assert len(rows) == len(example.LOSSES) >= 6
    for name, row in zip(example.LOSSES, rows):
        accuracy = re.fullmatch(rf"{re.escape(name)} +(0\.\d+) \+- 0\.0000 +\d+\.\d%", row)
        assert accuracy and 0.05 < float(accuracy[1]) <= 1
