"""The benchmark of the optimizers' steps runs, small, and measures what it says."""

import importlib.util
import json
import pathlib
import sys

import pytest

_PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "optimizer_step.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_optimizer_step", _PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_tiny_run(benchmark, tmp_path, capsys):
    out = tmp_path / "results.json"
    names = ["lion_k", "stable_spam", "8-bit adamw, in pieces"]
    benchmark.main(["--params", "200000", "--repeats", "1", "--out", str(out), "--only", *names])
    rows = {row["step"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == names
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in rows.values())
    assert rows["lion_k"]["state_bytes_per_param"] == pytest.approx(4, abs=0.01)
    assert rows["8-bit adamw, in pieces"]["state_bytes_per_param"] < 2.1
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_results_hold_every_contestant(benchmark):
    record = json.loads(benchmark.RESULTS.read_text())
    assert [row["step"] for row in record["rows"]] == list(benchmark.CONTESTANTS)
