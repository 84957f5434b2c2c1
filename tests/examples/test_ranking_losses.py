"""The example of the ranking losses runs and prints its table."""

import importlib.util
import pathlib
import re
import sys

import pytest


@pytest.fixture(scope="module")
def example():
    path = pathlib.Path(__file__).parents[2] / "examples" / "ranking_losses.py"
    spec = importlib.util.spec_from_file_location("ranking_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["ranking_losses.py", *flags])
    example.main()


def test_table(example, monkeypatch, capsys):
    run(example, monkeypatch, "--steps", "3", "--seeds", "1")
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert all(metric in head for metric in example.METRICS)
    assert [row[:24].strip() for row in rows] == list(example.LOSSES)
    for row in rows:
        numbers = [float(n) for n in re.findall(r"(\S+) \+- ", row)]
        assert len(numbers) == len(example.METRICS) and all(0.1 < n <= 1 for n in numbers), row


def test_bad_flag(example, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(example, monkeypatch, "--steps", "0")
    assert "--steps must be 1 or more, got 0" in capsys.readouterr().err
