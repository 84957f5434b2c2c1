"""The example of the losses on cosines runs and prints a row for each."""

import importlib.util
import pathlib
import re
import sys

_PATH = pathlib.Path(__file__).parents[2] / "examples" / "metric_losses.py"


def test_every_loss_has_a_row(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("metric_losses", _PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", [_PATH.name, "--steps", "3", "--seeds", "1"])
    example.main()
    rows = capsys.readouterr().out.splitlines()[3:]
    names = ["no training at all", *example.LOSSES]
    assert len(rows) == len(names)
    for name, row in zip(names, rows):
        numbers = [float(n) for n in re.findall(r"[\d.]+", row.removeprefix(name))]
        assert row.startswith(name) and len(numbers) == 8
        # Three steps after a random start: far above chance.
        assert all(30 < mean <= 100 for mean in numbers[::2][::2]), row
