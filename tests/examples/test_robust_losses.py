"""The example of the losses for wrong labels runs, and its table has a row for each."""

import importlib.util
import pathlib
import sys

import jax.numpy as jnp
import pytest

PATH = pathlib.Path(__file__).parents[2] / "examples" / "robust_losses.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("robust_losses", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["robust_losses.py", "--steps", "3", "--seeds", "1"])
    example.main()
    heading, columns, *rows = capsys.readouterr().out.splitlines()
    assert heading.startswith("40% wrong labels, 3 steps")
    assert columns.split() == ["loss", "test", "train,", "right", "train,", "wrong"]
    assert [row[:22].strip() for row in rows] == list(example.LOSSES)
    for row in rows:
        numbers = [float(cell) for cell in row[22:].replace("+-", " ").split()]
        assert len(numbers) == 6 and all(0 <= number <= 1 for number in numbers)
    assert len({row[22:] for row in rows}) > 4  # the losses do train differently


def test_the_noise(example):
    _, right, given, _, _ = example.load(0.4)
    assert abs(jnp.mean(right != given) - 0.4) < 0.05
    assert given.min() == 0 and given.max() == 9


def test_bad_flags(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["robust_losses.py", "--noise", "1.5"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--noise must be between 0 and 1" in capsys.readouterr().err
