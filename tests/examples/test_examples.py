"""The examples run, learn something, and refuse bad flags in one line."""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parents[2]


def _load(name):
    spec = importlib.util.spec_from_file_location(name, _ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_lm():
    return _load("train_lm")


def _environment(xla_flags=""):
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    # Equal initializers are compiled once for the three runs, and everything once for all runs of the tests.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return {**os.environ, **cache, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "XLA_FLAGS": xla_flags}


def _command(name, *flags):
    return [sys.executable, "-W", "error", str(_ROOT / "examples" / f"{name}.py"), *map(str, flags)]


def _run(name, *flags, **env):
    command = _command(name, *flags)
    return subprocess.run(command, env=_environment(**env), capture_output=True, text=True, timeout=600)


QUICKLY_COMPILED = {"xla_flags": "--xla_backend_optimization_level=0"}
one_run = pytest.mark.xdist_group("quick run of train_lm")  # in one process, which makes it once


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """A quick run of train_lm: the finished process and what it wrote."""
    out = tmp_path_factory.mktemp("runs")
    done = _run("train_lm", "--quick", "--z-loss", "1e-4", "--out", out)
    assert done.returncode == 0, done.stderr
    return done, json.loads((out / "train_lm.json").read_text()), out


@one_run
@pytest.mark.slow
def test_train_lm_learns(quick_run):
    _, record, _ = quick_run
    for name, run in record["runs"].items():
        assert all(map(math.isfinite, run["train_loss"])), name
        assert len(run["train_loss"]) == record["settings"]["steps"]
        assert run["validation_after"] < run["validation_before"] - 1, name
    baseline, ours = record["runs"]["baseline"], record["runs"]["ours"]
    assert ours["validation_after"] < baseline["validation_after"] + 0.05


@one_run
@pytest.mark.slow
def test_train_lm_streamed_equals_control(quick_run):
    _, record, _ = quick_run
    runs = record["runs"]
    assert len({run["start_checksum"] for run in runs.values()}) == 1
    assert abs(runs["ours"]["validation_after"] - runs["control"]["validation_after"]) < 1e-3
    np.testing.assert_allclose(runs["ours"]["train_loss"], runs["control"]["train_loss"], atol=1e-3)


@one_run
@pytest.mark.slow
def test_train_lm_writes_plain_text_and_a_plot(quick_run):
    done, record, out = quick_run
    assert done.stderr == ""
    assert all(line.isprintable() for line in done.stdout.splitlines()), "control characters"
    for heading in ("valid.", "step", "temporary", "peak", "growth", "control end", "a sample of ours"):
        assert heading in done.stdout
    assert record["runs"]["ours"]["sample"].startswith("The default value of")
    assert (out / "train_lm.png").stat().st_size > 10_000


@pytest.mark.slow
def test_train_lm_reads_a_text_and_takes_the_names(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    names = (
        "--loss",
        "max_suppression_loss",
        "--optimizer",
        "lion_k",
        "--tied",
        "--no-control",
        "--steps",
        10,
    )
    done = _run("train_lm", "--quick", "--text", text, "--out", tmp_path, *names, **QUICKLY_COMPILED)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "train_lm.json").read_text())["runs"]
    assert set(runs) == {"baseline", "ours"}
    assert runs["ours"]["validation_after"] < runs["ours"]["validation_before"]


@pytest.mark.slow
def test_train_classifier(tmp_path):
    flags = ("--loss", "cross_entropy", "focal_loss", "--epochs", 6, "--out", tmp_path)
    done = _run("train_classifier", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "train_classifier.json").read_text())
    assert len(rows) == 3
    for name, metrics in rows.items():
        assert len(metrics["accuracy"]) == 3
        assert min(metrics["accuracy"]) > 0.85, name
        assert all(map(math.isfinite, metrics["nll"] + metrics["ece"]))


sharded = pytest.mark.xdist_group("runs of train_sharded")
SHARDED = "--steps=6", "--save-every=3", "--batch=4", "--length=32", "--vocab=512", "--width=32", "--layers=1"


@pytest.fixture(scope="module")
def sharded_run():
    """A run of train_sharded on two processes of four devices, and the same on one device."""
    done = _run("train_sharded", *SHARDED, "--single", **QUICKLY_COMPILED)
    assert done.returncode == 0, done.stderr
    return done.stdout


@sharded
@pytest.mark.slow
def test_train_sharded_reaches_the_loss_of_one_device(sharded_run):
    shown = [line for line in sharded_run.splitlines() if line.startswith("8 devices") and " step " in line]
    assert len(shown) == 6  # once, by process 0
    first, last = (float(line.split()[-1]) for line in (shown[0], shown[-1]))
    assert last < first - 0.1
    (during, after) = re.search(r"differ by (\S+) at most .* by (\S+) after", sharded_run).groups()
    assert float(during) < 1e-4 and float(after) < 1e-4


@sharded
@pytest.mark.slow
def test_train_sharded_ends_when_a_process_is_killed_and_resumes_bit_equal(sharded_run, tmp_path):
    flags = *SHARDED, "--checkpoint", tmp_path / "saved"
    command = _command("train_sharded", *flags, "--kill-at", 5)
    pipes = dict(
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(**QUICKLY_COMPILED)
    )
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stdout:  # the last line is that of step 4
            last, began = line, time.monotonic()
        error = process.stderr.read()
    assert "step   4/6" in last and time.monotonic() - began < 10
    assert process.returncode == 1
    assert error.splitlines()[-1] == (
        "train_sharded.py: error: process 1 of 2, after step 4: was ended by SIGKILL; the others were ended, too"
    )
    done = _run("train_sharded", *flags, "--resume", **QUICKLY_COMPILED)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 3" in done.stdout
    results = [re.findall("8 devices +validation.*", out) for out in (done.stdout, sharded_run)]
    assert len(results[0]) == 1 and results[0] == results[1]


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("train_lm", "--vocab 100", "--vocab: must be an integer of 512 or more, got '100'"),
        ("train_lm", "--steps 0", "--steps: must be an integer of 1 or more, got '0'"),
        ("train_lm", "--width 30 --heads 4", "--heads: must divide --width 30, got 4"),
        ("train_lm", "--label-smoothing 1.5", "--label-smoothing: must be a number of 0 or more, 1 at most"),
        ("train_lm", "--learning-rate nan", "--learning-rate: must be a number"),
        ("train_lm", "--loss hinge", "invalid choice: 'hinge'"),
        ("train_lm", "--loss focal_loss --z-loss 1e-4", "--z-loss: focal_loss has no such option"),
        ("train_lm", "--text missing.txt", "--text: "),
        ("generate", "--chain beams=3", "--chain: knows no 'beams'"),
        ("generate", "--chain top_p=2", "top_p must be a number >= 0"),
        ("generate", "--tokens 0", "--tokens: must be an integer of 1 or more"),
        ("train_classifier", "--epochs 0", "--epochs: must be an integer from 1"),
        ("train_classifier", "--label-noise 2", "--label-noise: must be a number from 0"),
        ("train_classifier", "--loss hinge", "invalid choice: 'hinge'"),
        (
            "train_sharded",
            "--mesh data",
            "--mesh: must be names and sizes such as data=2,model=4, got 'data'",
        ),
        ("train_sharded", "--fsdp rows", "--fsdp: must be an axis of the mesh"),
        ("train_sharded", "--sequence data", "--sequence: must be another axis than --data, got 'data'"),
        ("train_sharded", "--length 30", "--length: must be divisible by the 4 devices along 'model'"),
        ("train_sharded", "--processes 3", "--processes: must divide the devices"),
        ("train_sharded", "--resume", "--resume: needs --checkpoint"),
    ],
)
def test_bad_flag_is_one_line(name, flags, words, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(_ROOT / "examples"))
    example = _load(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        example.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert words in error and error.count("\n") == 1


def test_bad_flag_of_a_process():
    done = _run("train_lm", "--text", "missing.txt")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "missing.txt" in done.stderr and "Traceback" not in done.stderr


def test_generate_writes_the_same_from_stored_and_never_stored_logits(monkeypatch):
    """An untrained model; what occurred is forbidden, also when the window has moved on."""
    monkeypatch.syspath_prepend(str(_ROOT / "examples"))
    example = _load("generate")
    flags = "--width 16 --heads 2 --layers 1 --sequence 8"
    args = example.train_lm.parse_arguments(example.train_lm.make_parser(), flags.split())
    graph, params = example.nnx.split(example.train_lm.GPT(args, 512, True, example.nnx.Rngs(0)))
    chain = tuple(example.read_chain("presence_penalty=1e4,temperature=1.5,top_k=40,top_p=0.9"))
    options = dict(texts=2, tokens=12, chain=chain, vocab=512, sequence=8, tied=False)
    prompt = np.array([5, 6, 7], np.int32)
    stored, never = (
        np.asarray(example.generate((*options.items(),), graph, s, params, prompt, jax.random.key(0)))
        for s in (True, False)
    )
    np.testing.assert_array_equal(stored, never)
    assert all(len({*row, *prompt}) == 15 for row in stored.tolist())


def test_tokenizer_loses_nothing(train_lm):
    text = "def f(self, __x__):\n\treturn 'héllo wörld' * 12_345  # ½ ∑ 日本語 \U0001f600\r\n"
    tokenizer = train_lm.Tokenizer("def f(self): return self.hello\n" * 3, 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" return self")) == 2
    assert len(tokenizer.tokens) <= 300


@pytest.mark.parametrize("name", ["softmax", "softpick", "softplus_attention_weights"])
def test_streamed_attention_equals_that_of_stored_scores(train_lm, name):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 2, 5))
    np.testing.assert_allclose(
        train_lm.attend(name, True, q, k, v), train_lm.attend(name, False, q, k, v), atol=1e-5
    )
