"""The example that calibrates a classifier runs, calibrates it, and keeps its promises of coverage."""

import json
import pathlib
import runpy
import sys

import pytest

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "calibrate_digits.py"


@pytest.mark.slow
def test_calibrate_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "calibration.json").read_text())

    before, scaled = record["scaling"]["none"], record["scaling"]["temperature"]
    assert before["accuracy"] == scaled["accuracy"] > 0.8
    assert scaled["ECE"] < before["ECE"] / 2 and scaled["NLL"] < before["NLL"]
    assert record["scaling"]["matrix"]["NLL"] < before["NLL"]

    # 100 splits: within three standard errors of the beta-binomial mean
    for name in ("LAC", "APS"):
        assert (
            abs(record["coverage"][name] - record["coverage"]["expected"]) < 3 * record["coverage"]["error"]
        ), name
        assert name in text

    assert len(record["unknown"]) == 7
    for name, row in record["unknown"].items():
        assert 0.6 < row["AUROC"] <= 1 and name in text
    assert (tmp_path / "reliability.png").stat().st_size > 10_000


def test_bad_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--alpha", "1.0"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "--alpha must lie in (0, 1)" in capsys.readouterr().err
