"""The example of the preference losses runs and prints its table."""

import importlib.util
import pathlib
import re
import sys

import pytest

_PATH = pathlib.Path(__file__).parents[2] / "examples" / "preference_losses.py"


@pytest.mark.slow  # compiles seven training loops
def test_table(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(_PATH.stem, _PATH)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "TRAIN", 16)
    monkeypatch.setattr(example, "TEST", 16)
    monkeypatch.setattr(example, "BATCH", 4)
    flags = ["--steps", "3", "--pretraining-steps", "3", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [str(_PATH), *flags])
    example.main()
    rows = capsys.readouterr().out.splitlines()[3:]
    names = [
        "reference",
        "likelihood of the chosen",
        "dpo",
        "ipo",
        "robust dpo",
        "f-dpo, jensen-shannon",
        "simpo",
    ]
    assert [row[:26].strip() for row in rows] == [*names, "mmpo"]
    numbers = {row[:26].strip(): [float(n) for n in re.findall(r"[\d.]+", row[26:])] for row in rows}
    assert len(numbers.pop("reference")) == 4
    for policy, policy_spread, reward, reward_spread, nats, nats_spread in numbers.values():
        assert 0 <= policy <= 1 and 0 <= reward <= 1 and 2 < nats < 6
        assert policy_spread == reward_spread == nats_spread == 0  # of one seed
    assert len({n[4] for n in numbers.values()}) > 3  # the losses differ
