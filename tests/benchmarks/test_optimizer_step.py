"""The benchmark of the optimizers' steps runs, small, and measures what it says."""

import importlib
import json
import pathlib
import sys

import pytest

_FOLDER = str(pathlib.Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, _FOLDER)
    try:
        yield importlib.import_module("optimizer_step")
    finally:
        sys.path.remove(_FOLDER)


def test_tiny_run(benchmark, tmp_path, capsys):
    out = tmp_path / "results.json"
    names = ["lion_k", "stable_spam", "8-bit adamw, in pieces"]
    benchmark.main(["--params", "200000", "--repeats", "1", "--out", str(out), "--only", *names])
    (record,) = json.loads(out.read_text())
    assert record["machine"] == benchmark.machine.description()
    rows = {row["step"]: row for row in record["rows"]}
    assert list(rows) == names
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in rows.values())
    assert rows["lion_k"]["state_bytes_per_param"] == pytest.approx(4, abs=0.01)
    assert rows["8-bit adamw, in pieces"]["state_bytes_per_param"] < 2.1
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_results_hold_every_contestant(benchmark):
    for record in json.loads(benchmark.RESULTS.read_text()):
        assert [row["step"] for row in record["rows"]] == list(benchmark.CONTESTANTS)


def test_results_are_kept_by_processor(benchmark, tmp_path, monkeypatch):
    machine, path = benchmark.machine, tmp_path / "results.json"
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Some CPU\ncpu family\t: 25\nmodel\t\t: 1\n\nmodel name: other\n"
    )
    assert machine.processor(str(cpuinfo)) == "Some CPU (family 25, model 1)"
    assert machine.processor(str(tmp_path / "none"))
    machine.save(path, {"x": 1})
    monkeypatch.setattr(machine, "processor", lambda: "another")
    assert machine.own(machine.load(path)) == {}
    machine.save(path, {"x": 2})
    machine.save(path, {"x": 3})
    assert [record["x"] for record in machine.load(path)] == [1, 3]
    assert machine.own(machine.load(path))["x"] == 3
