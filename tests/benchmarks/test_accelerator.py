"""The benchmark of kernels runs, small, tells right from wrong, and outlives kernels that crash or hang."""

import importlib
import json
import pathlib
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

_FOLDER = str(pathlib.Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, _FOLDER)
    try:
        names = ("accelerator", "device_run", "kernel_checks", "torch_peers")
        yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(_FOLDER)


@pytest.fixture
def benchmark(modules):
    return modules.accelerator


@pytest.fixture
def run(modules, tmp_path):
    made = modules.device_run.Run("pallas_tpu", True, 1000, 0, tmp_path / "record.json")
    made.save()
    return made


def test_tiny_run(benchmark, tmp_path, capsys):
    out = tmp_path / "new" / "results.json"
    benchmark.main(["--smoke", "--only", "decode", "--out", str(out), "--seed", "1"])
    record = json.loads(out.read_text())
    rows = {row["contestant"]: row for row in record["rows"][::-1] if row["case"].startswith("decode")}
    assert set(rows) == {"jaxsoft", "jaxsoft, with lengths", "cuDNN"}
    assert rows["jaxsoft"]["ms"] > 0 and rows["jaxsoft"]["bar"] == 0.8
    assert rows["jaxsoft"]["value"] * rows["jaxsoft"]["ms"] == pytest.approx(
        rows["jaxsoft, with lengths"]["value"] * rows["jaxsoft, with lengths"]["ms"]
    )
    assert rows["cuDNN"]["ms"] is None and rows["cuDNN"]["note"]
    assert set(record["ceilings"]) == {"copy", "product"} and record["doing"] is None
    assert out.with_suffix(".png").exists()
    assert "decode" in capsys.readouterr().out


def test_a_part_in_a_process_of_its_own(benchmark, tmp_path, monkeypatch):
    repository = str(pathlib.Path(_FOLDER).parent)
    monkeypatch.setenv("PYTHONPATH", repository)
    out = tmp_path / "results.json"
    benchmark.main(["--smoke", "--apart", "--only", "ceilings", "--out", str(out)])
    record = json.loads(out.read_text())
    assert len(record["rows"]) == 3 and record["left_out"] == []


def test_one_program_is_timed_once(benchmark, run):
    double = [benchmark.Contestant(name, lambda x: x * 2, (jnp.ones(4),)) for name in ("a", "b")]
    other = benchmark.Contestant("c", lambda x: x * 3, (jnp.ones(4),))
    rows = benchmark.time_all(run, "it", [*double, other])
    assert rows["a"] == rows["b"] | {"contestant": "a", "same_as": "b"}
    assert rows["b"]["ms"] > 0 and "same_as" not in rows["b"] | rows["c"]
    run.smoke = False
    assert [i for _, i in benchmark.ours(run)] == ["pallas_tpu", None, "xla"]


class TestChecks:
    def compare(self, modules, run, monkeypatch, function, wanted=(0,)):
        check = modules.kernel_checks.Check("it", function, (run.normal(4, 8),), wanted, (1e-4, 1e-2))
        monkeypatch.setitem(modules.kernel_checks.CHECKS, "rows", lambda run: [check])
        modules.kernel_checks.run_checks(run, "rows")
        return run.checks[-1]

    def test_right(self, modules, run, monkeypatch):
        found = self.compare(modules, run, monkeypatch, lambda i, x: jnp.sum(x.astype(jnp.float32) ** 2, -1))
        assert found["status"] == "passed" and len(found["errors"]) == 2

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda y: y * 1.001,  # the value and, within its bound, the gradient
            lambda y: y * jnp.nan,
            lambda y: y + 0.01 * jnp.arange(4),
            lambda y: jnp.where(jnp.arange(4) == 2, jnp.inf, y),
        ],
    )
    def test_wrong(self, modules, run, monkeypatch, wrong):
        def function(implementation, x):
            y = jnp.sum(x.astype(jnp.float32) ** 2, -1)
            return y if implementation == "reference" else wrong(y)

        found = self.compare(modules, run, monkeypatch, function)
        assert found["status"] == "failed" and "beyond" in found["reason"]

    def test_wrong_gradient(self, modules, run, monkeypatch):
        def function(implementation, x):
            x = x.astype(jnp.float32)
            stopped = x if implementation == "reference" else jax.lax.stop_gradient(x)
            return jnp.sum(x * stopped, -1)

        found = self.compare(modules, run, monkeypatch, function)
        assert found["status"] == "failed" and found["errors"] == [0, pytest.approx(0.5, abs=0.01)]

    def test_refused(self, modules, run, monkeypatch):
        def function(implementation, x):
            if implementation != "reference":
                raise ValueError("implementation='pallas_tpu' cannot run reductions: too wide")
            return jnp.sum(x, -1)

        found = self.compare(modules, run, monkeypatch, function)
        assert found["status"] == "refused" and "too wide" in found["reason"]

    def test_every_check_has_a_reference(self, modules, monkeypatch, tmp_path):
        """The shapes of accelerators, which no other test uses: nothing is computed."""
        run = modules.device_run.Run("xla", False, 1000, 0, tmp_path / "record.json")
        monkeypatch.setattr(
            type(run), "normal", lambda self, *shape, dtype=jnp.bfloat16, scale=1: jnp.zeros(shape, dtype)
        )
        names = []
        for make in modules.kernel_checks.CHECKS.values():
            jax.eval_shape(lambda make=make: names.extend(c.name for c in make(run)))
        assert len(names) == len(set(names)) > 60
        assert all(any(name in n for n in names) for name in modules.kernel_checks.NORMALIZERS)


class TestProcesses:
    def watched(self, benchmark, run, code, end=20.0, patience=20.0):
        return benchmark.watched([sys.executable, "-c", code], run.out, time.monotonic() + end, patience)

    def test_what_ended_a_process(self, benchmark, run):
        assert self.watched(benchmark, run, "pass") is None
        assert self.watched(benchmark, run, "raise SystemExit(17)") == "the process ended with 17"
        assert self.watched(benchmark, run, "import time; time.sleep(60)", patience=0.5).startswith("nothing")
        assert self.watched(benchmark, run, "import time; time.sleep(60)", end=0.5) == "no time was left"

    def test_checks_go_on_behind_one_that_hung(self, benchmark, run, monkeypatch):
        commands = []

        def watched(command, record, end, patience):
            commands.append(command)
            child = benchmark.Run("pallas_tpu", True, 1000, 0, record)
            child.load()
            if len(commands) == 1:
                child.checks.append({"name": "a", "status": "passed"})
                child.begin("b", 1)
                return "nothing happened for 75 s"
            child.checks.append({"name": "c", "status": "passed"})
            child.finish()
            return None

        monkeypatch.setattr(benchmark, "watched", watched)
        benchmark.isolated(run, "checks-rows", 75)
        assert [(c["name"], c["status"]) for c in run.checks] == [
            ("a", "passed"),
            ("b", "failed"),
            ("c", "passed"),
        ]
        assert [c[c.index("--part") + 2] for c in commands] == ["0", "2"]

    def test_times_of_a_part_that_crashed_stay(self, benchmark, run, monkeypatch):
        def watched(command, record, end, patience):
            child = benchmark.Run("pallas_tpu", True, 1000, 0, record)
            child.load()
            child.rows.append({"case": "x", "contestant": "jax.nn", "ms": 1.0})
            child.begin("x: jaxsoft")
            return "the process ended with -6"

        monkeypatch.setattr(benchmark, "watched", watched)
        benchmark.isolated(run, "attention", 75)
        assert [r["contestant"] for r in run.rows] == ["jax.nn"]
        assert run.dropped == ["the rest of attention: the process ended with -6 in x: jaxsoft"]

    def test_what_there_is_no_time_for(self, benchmark, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(benchmark, "device", lambda: ("tpu", "TPU v5 lite"))
        benchmark.main(["--seconds", "1", "--out", str(tmp_path / "r.json")])
        record = json.loads((tmp_path / "r.json").read_text())
        assert record["left_out"] == [f"{name}: no time was left" for name in benchmark.parts()]
        assert "left out: decode: no time was left" in capsys.readouterr().out


class TestReport:
    def test_bars(self, benchmark):
        at_least, at_most = {"case": "a", "contestant": "b"}, {"case": "a", "contestant": "b"}
        benchmark.judge(at_least, "of copy", 0.9, 0.85)
        benchmark.judge(at_most, "MiB", 300.0, 256, at_most=True)
        assert at_least["reached"] and not at_most["reached"]
        benchmark.judge(nothing := {}, "of copy", None, 0.85)
        assert nothing == {}

    def test_peers_in_pytorch(self, benchmark, run, monkeypatch):
        run.smoke = False
        case = "head 8 x 2 x 4, forward"
        run.rows = [
            {"case": case, "contestant": "dense XLA", "ms": 3.0},
            {"case": "other", "contestant": "x", "ms": 1.0},
        ]
        found = {
            "rows": [{"case": case, "contestant": "liger-kernel", "ms": 2.0, "peak_growth": 5}],
            "missing": ["peer y"],
        }
        done = types.SimpleNamespace(returncode=0, stdout="words\n" + json.dumps(found) + "\n", stderr="")
        monkeypatch.setattr(benchmark.subprocess, "run", lambda *args, **kwargs: done)
        benchmark.time_torch_peers(run)
        assert [row["contestant"] for row in run.rows] == ["dense XLA", "liger-kernel", "x"]
        assert run.rows[1]["value"] == 1.5 and run.dropped == ["peer y"]
        benchmark.report(run)
        done.returncode, done.stderr = 1, "Traceback\nNo module named 'torch'"
        benchmark.time_torch_peers(run)
        assert run.dropped[-1].endswith("No module named 'torch'")
