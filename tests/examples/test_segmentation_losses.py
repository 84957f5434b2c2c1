"""The example of the overlap losses runs, and prints a row for each of them."""

import importlib.util
import pathlib
import sys

_PATH = pathlib.Path(__file__).parents[2] / "examples" / "segmentation_losses.py"


def test_every_loss_has_a_row(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("segmentation_losses", _PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    flags = ["--steps", "3", "--seeds", "1", "--width", "2"]
    monkeypatch.setattr(sys, "argv", ["segmentation_losses.py", *flags])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert "3 steps" in lines[0] and all(word in lines[2] for word in ("mean IoU", "mean Dice"))
    rows = lines[3:]
    assert [row[:28].strip() for row in rows] == list(example.LOSSES)
    for row in rows:
        scores = [float(cell) for cell in row[28:].replace("+-", " ").split()]
        assert len(scores) == 6 and all(0 <= score <= 1 for score in scores)
