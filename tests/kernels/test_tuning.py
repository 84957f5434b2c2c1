"""Tables of measured block sizes: read, obeyed, doubted, and written by the tuner."""

import json
import tomllib
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jaxsoft
from jaxsoft import tune
from jaxsoft.attention import _run, dot_product_attention
from jaxsoft.kernels import _tables
from jaxsoft.kernels._sweep import Plan, Scores, Tiles
from jaxsoft.kernels._tables import Row, Table
from jaxsoft.kernels.inner import Kernel, Work, blocks, likely, measured_sizes

KIND = "TPU v5 lite"
ROWS = (
    Row(Work("dense", 1024, 4096, 0, 4), "forward", {"rows": 64, "columns": 256}, 1.0, 2.0),
    Row(Work("dense", 1024, 4096, 0, 4), "backward", {}, 2.0, 2.0),
    Row(Work("dense", 16, 128, 0, 4), "forward", {"rows": 8, "columns": 128}, 3.0, 1.0),
    Row(Work("linear", 1024, 4096, 64, 2), "forward", {"rows": 4096, "columns": 8192}, 1.0, 2.0),
    Row(Work("linear", 1024, 4096, 64, 2), "backward", {"rows": 128, "columns": 128}, 2.0, 1.5),
    Row(Work("attention", 512, 512, 64, 4), "both", {"rows": 64, "columns": 256}, 1.0, 2.0),
)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSOFT_TUNING", str(tmp_path))
    _tables.forget()
    yield tmp_path
    _tables.forget()


@pytest.fixture
def table(directory):
    written = Table(KIND, "pallas_tpu", "0", ROWS)
    written.write(_tables.user_path(KIND))
    return written


def on_device(kind=KIND, platform="tpu"):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_round_trip(table, directory):
    assert [p.name for p in directory.iterdir()] == ["tpu-v5-lite.json"]
    assert _tables.read(_tables.user_path(KIND)) == table
    assert _tables.table(KIND) == table
    assert _tables.table("TPU v6 lite") is None
    assert _tables.table("") is None


def test_shipped_tables_are_readable():
    for path in _tables.SHIPPED.glob("*.json"):
        assert _tables.file_name(_tables.read(path).device_kind) == path.name


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXSOFT_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _tables.user_path("NVIDIA H200") == tmp_path / "jaxsoft" / "tuning" / "nvidia-h200.json"


def _changed(change):
    content = {"format": 1, "device_kind": KIND, "implementation": "pallas_tpu", "jax": "0"}
    content["rows"] = [r.to_json() for r in ROWS]
    change(content)
    return json.dumps(content)


BROKEN = {
    "empty": "",
    "cut off": _changed(lambda c: None)[:-40],
    "no object": "[1, 2]",
    "no table": "{}",
    "of another format": _changed(lambda c: c.update(format=0)),
    "of another device": _changed(lambda c: c.update(device_kind="TPU v4")),
    "rows of text": _changed(lambda c: c.update(rows="many")),
    "a row of text": _changed(lambda c: c["rows"].append("x")),
    "no size": _changed(lambda c: c["rows"][0].pop("columns")),
    "a size of 0": _changed(lambda c: c["rows"][0]["sizes"].update(rows=0)),
    "a kind unknown": _changed(lambda c: c["rows"][0].update(kind="sparse")),
    "a time that is none": _changed(lambda c: c["rows"][0].update(ms=float("nan"))),
    "sizes in words": _changed(lambda c: c["rows"][0]["sizes"].update(rows="all")),
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_table_counts_as_none(directory, content):
    path = _tables.user_path(KIND)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with warnings.catch_warnings(), on_device():
        warnings.simplefilter("error")
        assert _tables.table(KIND) is None
        assert _tables.sizes((), KIND, "pallas_tpu", ROWS[0].work, "forward") == [{}]
        decision = jaxsoft.kernels.explain(jaxsoft.logsumexp, f32(1024, 4096))[0]
    assert decision.implementation == "xla"
    assert "has not been measured" in decision.reasons["pallas_tpu"]
    assert str(path) in decision.reasons["pallas_tpu"]


def test_a_directory_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXSOFT_TUNING", str(tmp_path / "file"))
    _tables.forget()
    assert _tables.table(KIND) is None


def test_the_nearest_work_counts():
    table = Table(KIND, "pallas_tpu", "0", ROWS)
    assert table.nearest(Work("dense", 2000, 9000, 0, 4)) == list(ROWS[:2])
    assert table.nearest(Work("dense", 3, 100, 0, 4)) == [ROWS[2]]
    assert table.nearest(Work("dense", 3, 100, 0, 2)) == [ROWS[2]]
    assert table.nearest(Work("linear", 1, 1, 1, 2)) == list(ROWS[3:5])
    wide = Row(Work("linear", 1, 1, 1, 4), "both", {}, 1.0, 1.0)  # the itemsize counts before the sizes
    table = table._replace(rows=(*ROWS, wide))
    assert table.nearest(Work("linear", 1024, 4096, 64, 4)) == [wide]
    assert table._replace(rows=ROWS[:3]).nearest(Work("linear", 1, 1, 1, 2)) == []


class TestSizes:
    def test_user_before_table_before_nothing(self, table):
        work = ROWS[0].work
        assert _tables.sizes((("rows", 16),), KIND, "pallas_tpu", work, "forward") == [{"rows": 16}]
        assert _tables.sizes((), KIND, "pallas_tpu", work, "forward") == [{"rows": 64, "columns": 256}, {}]
        assert _tables.sizes((), KIND, "pallas_tpu", work, "backward") == [{}]
        assert _tables.sizes((), KIND, "mosaic_gpu", work, "forward") == [{}]
        assert _tables.sizes((), "TPU v6 lite", "pallas_tpu", work, "forward") == [{}]
        with _tables.ignored():
            assert _tables.sizes((), KIND, "pallas_tpu", work, "forward") == [{}]

    def tiles(self, scores, plan=Plan(), blocks=(), kind=KIND):  # noqa: B008
        from jaxsoft.kernels.tpu import _sweep

        return _sweep.tiles_of(Kernel("pallas_tpu", False, kind, blocks), scores, plan)

    def test_of_a_sweep(self, table):
        scores = Scores(values=f32(1, 1024, 4096))
        assert self.tiles(scores) == Tiles(64, 256)
        assert self.tiles(scores, Plan(entry_dtypes=(jnp.float32,))) == self.tiles(scores, kind="TPU v6 lite")
        assert self.tiles(scores, blocks=(("columns", 128),)) == Tiles(256, 128)
        assert self.tiles(scores, Plan(tiles=Tiles(8, 16)), blocks=(("columns", 128),)) == Tiles(8, 16)

    def test_a_measured_size_that_does_not_fit_is_passed_over(self, table):
        half = jnp.bfloat16
        left, right = jax.ShapeDtypeStruct((1, 9000, 64), half), jax.ShapeDtypeStruct((1, 64, 9000), half)
        scores = Scores(left=left, right=right)
        assert self.tiles(scores) == self.tiles(scores, kind="TPU v6 lite")

    def test_of_a_sweep_of_an_attention(self, table):
        scores = Scores(left=f32(2, 512, 64), right=f32(2, 512, 64), transposed=True)
        for plan in (Plan(tiles=Tiles(64, 256)), Plan(tiles=Tiles(64, 256), over="rows")):
            found = _tables.sweep_sizes(Kernel("pallas_tpu", False, KIND), scores, plan)
            assert found == [{"rows": 64, "columns": 256}, {}]

    def test_of_an_attention(self, table):
        def sizes(given, user, tuned):
            with jaxsoft.kernels.block_sizes(**user):
                return _run._kernel_block_sizes(given, 1, 4096, 4096, tuned)

        tuned = {"rows": 64, "columns": 256}
        assert sizes((None, None), {}, tuned) == (64, 256)
        assert sizes((192, 384), {}, tuned) == (192, 384)
        assert sizes((192, 384), {"rows": 128, "columns": 512}, tuned) == (128, 512)
        assert sizes((None, None), {}, {}) == (128, 128)
        work = Work("attention", 600, 600, 64, 4)
        assert measured_sizes("pallas_tpu", work) == {}
        with on_device():
            assert measured_sizes("pallas_tpu", work) == tuned
            assert measured_sizes(None, work) == tuned
            assert measured_sizes("mosaic_gpu", work) == {}


class TestChoice:
    def explain(self, function, *args, **kwargs):
        with on_device():
            return jaxsoft.kernels.explain(function, *args, **kwargs)[0]

    def test_kernels_where_they_were_faster(self, table):
        assert self.explain(jaxsoft.logsumexp, f32(1024, 4096)).implementation == "pallas_tpu"
        q = f32(1, 512, 1, 64)
        assert self.explain(dot_product_attention, q, q, q).implementation == "pallas_tpu"

    def test_xla_where_it_was_faster(self, table):
        decision = self.explain(jaxsoft.logsumexp, f32(16, 128))
        assert decision.implementation == "xla"
        assert "XLA was faster on 'TPU v5 lite' at 16 x 128 in 32 bits (1 ms, it took 3 ms" in str(decision)
        # Forward and backward count together: 1 + 2 against 2 + 1.5.
        hidden, weight = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1024, 64), (64, 4096)))

        def head(hidden, weight):
            return jaxsoft.logsumexp(jaxsoft.linear_logits(hidden, weight))

        assert self.explain(head, hidden, weight).implementation == "pallas_tpu"
        slower = (*ROWS[:3], ROWS[3]._replace(ms=1.6), *ROWS[4:])
        table._replace(rows=slower).write(_tables.user_path(KIND))
        _tables.forget()
        assert self.explain(head, hidden, weight).implementation == "xla"

    def test_the_nearest_measurement_decides_and_is_named(self, table):
        decision = self.explain(jaxsoft.logsumexp, jax.ShapeDtypeStruct((900, 5000), jnp.bfloat16))
        assert decision.implementation == "pallas_tpu"
        where = "faster on 'TPU v5 lite' at 1024 x 4096 in 32 bits (3 ms, XLA took 4 ms"
        assert f"pallas_tpu, it was {where}; measured with jax 0, this is {jax.__version__})" in str(decision)
        table._replace(jax=jax.__version__).write(_tables.user_path(KIND))
        _tables.forget()
        assert self.explain(jaxsoft.logsumexp, f32(1024, 4096)).because == f"it was {where})"

    def test_xla_where_nothing_was_measured(self, table):
        table._replace(rows=ROWS[3:]).write(_tables.user_path(KIND))
        _tables.forget()
        decision = self.explain(jaxsoft.logsumexp, f32(16, 128))
        assert decision.implementation == "xla"
        assert "not been measured on 'TPU v5 lite' for dense rows" in str(decision)

    def test_what_is_asked_for_is_obeyed(self, table):
        for name in ("xla", "pallas_tpu"):
            decision = self.explain(jaxsoft.logsumexp, f32(16, 128), implementation=name)
            assert (decision.implementation, decision.because) == (name, "as requested")

    def test_blocks_of_attention_are_those_of_what_will_run(self, table):
        with on_device():
            assert likely(None, Work("attention", 512, 512, 64, 4))
            assert likely(None, Work("attention", 512, 512, 64, 2))
            assert not likely("xla", Work("attention", 512, 512, 64, 4))
            assert likely("pallas_tpu", Work("attention", 512, 512, 64, 2))


HOPPER = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA GH200 480GB")
OTHERS = (
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA L4",
    "NVIDIA B200",
    "AMD Instinct MI300X",
    "TPU v5 lite",
    "NVIDIA L40S",
)


class TestShipped:
    """The tables that users get, without one of their own."""

    def kernels(self, kind, rows, columns, features, itemsize=2, device="NVIDIA H100 PCIe"):
        return _tables.verdict("mosaic_gpu", device, Work(kind, rows, columns, features, itemsize)).faster

    def test_a_generation_shares_a_table(self, directory):
        for kind in HOPPER:
            found = _tables.table(kind)
            assert found is not None and found.device_kind == "NVIDIA H200"
        for kind in OTHERS:
            assert _tables.table(kind) is None

    def test_the_own_table_of_a_device_comes_first(self, directory):
        written = Table("NVIDIA H100 NVL", "mosaic_gpu", "0", ROWS)
        written.write(_tables.user_path(written.device_kind))
        found = [_tables.table(kind) for kind in ("NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA H100 PCIe")]
        assert found[0] == written
        assert found[1] == _tables.read(_tables.SHIPPED / "nvidia-h200.json")
        assert found[2] == written  # the user's of the same generation, before the library's

    @pytest.mark.parametrize("rows, columns", [(8192, 32768), (65536, 1024), (4096, 4096), (2048, 128256)])
    def test_many_rows_go_to_kernels(self, directory, rows, columns):
        assert self.kernels("dense", rows, columns, 0)
        assert self.kernels("dense", rows, columns, 0, itemsize=4)

    @pytest.mark.parametrize(
        "rows, columns", [(256, 2**20), (256, 131072), (128, 32768), (1, 50257), (64, 1000)]
    )
    def test_few_rows_go_to_xla(self, directory, rows, columns):
        assert not self.kernels("dense", rows, columns, 0)

    def test_heads_and_attentions_go_to_kernels(self, directory):
        for rows, features, columns in ((8192, 4096, 131072), (512, 768, 50257), (32768, 8192, 128256)):
            assert self.kernels("linear", rows, columns, features)
        for queries, keys, width in ((1, 500, 64), (32, 2**17, 128), (1024, 1024, 256), (2**17, 2**17, 128)):
            assert self.kernels("attention", queries, keys, width)

    def test_explain_names_the_device_and_the_work(self, directory):
        with on_device(HOPPER[0], "gpu"):
            (decision,) = jaxsoft.kernels.explain(
                jaxsoft.logsumexp, jax.ShapeDtypeStruct((9000, 30000), jnp.bfloat16)
            )
            (few,) = jaxsoft.kernels.explain(jaxsoft.logsumexp, f32(256, 2**20))
        assert decision.implementation == "mosaic_gpu"
        assert "faster on 'NVIDIA H200' at 8192 x 32768 in 16 bits (0.515 ms, XLA took" in decision.because
        assert few.implementation == "xla"
        assert "XLA was faster on 'NVIDIA H200' at 256 x 1048576 in 16 bits" in few.reasons["mosaic_gpu"]

    def test_the_wheel_holds_them(self):
        root = _tables.SHIPPED.parents[2]
        if not (root / "pyproject.toml").exists():
            pytest.skip("this is not a checkout")
        wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
            "wheel"
        ]
        assert wheel == {"packages": ["jaxsoft"]}  # all files below it that git does not ignore
        ignored = (root / ".gitignore").read_text().split()
        for path in _tables.SHIPPED.glob("*.json"):
            assert not any(path.relative_to(root).match(f"*/{pattern}") for pattern in ignored)


class TestTuner:
    def test_smoke(self, tmp_path, capsys):
        out = tmp_path / "new" / "table.json"
        tune.main(["--smoke", "--out", str(out)])
        table = _tables.read(out)
        assert [(r.work.kind, r.direction) for r in table.rows] == [
            ("dense", "both"), ("linear", "forward"), ("linear", "backward"), ("attention", "both"),
        ]  # fmt: skip
        assert all(
            r.sizes in ({}, {"rows": 8, "columns": 128}, {"rows": 16, "columns": 128}) for r in table.rows
        )
        printed = capsys.readouterr().out
        assert "failed" not in printed and "cannot" not in printed
        assert f"written to {out}" in printed

    def cases(self):
        return (tune.dense(8, 128, jnp.float32)._replace(gradient=False),)

    def run(self, lines, **options):
        candidates = {"dense": ((8, 16), (128,))}
        with jaxsoft.kernels.interpreted():
            return tune.tune(
                "pallas_tpu", "x", self.cases(), candidates, out=None, repeats=1, say=lines.append, **options
            )

    def test_wrong_numbers_are_left_out(self, monkeypatch):
        right = tune.function

        def wrong(case, implementation):
            f, wanted = right(case, implementation)
            off = 0.1 * (implementation != "xla" and dict(blocks()).get("rows") != 16)
            return (lambda x: (1 + off) * f(x)), wanted

        monkeypatch.setattr(tune, "function", wrong)
        lines = []
        (row,) = self.run(lines).rows
        assert row.sizes == {"rows": 16, "columns": 128}
        assert sum("its results differ from XLA's" in line for line in lines) == 2

    def test_a_size_that_fails_does_not_end_it(self, monkeypatch):
        right = tune.compile_case

        def failing(case, implementation, args):
            if implementation != "xla" and dict(blocks()).get("rows") != 8:
                raise RuntimeError("out of memory\nand more")
            return right(case, implementation, args)

        monkeypatch.setattr(tune, "compile_case", failing)
        lines = []
        (row,) = self.run(lines).rows
        assert row.sizes == {"rows": 8, "columns": 128}
        assert sum(line.endswith("failed: RuntimeError: out of memory") for line in lines) == 2

    def test_no_time(self):
        lines = []
        assert self.run(lines, minutes=0).rows == ()
        assert lines == ["no time for: dense 8 x 128, float32"]

    def test_what_it_will_not_overwrite(self, tmp_path):
        out = tmp_path / "pyproject.toml"
        out.write_text("[project]")
        with pytest.raises(SystemExit, match="not a table"):
            tune.main(["--smoke", "--out", str(out)])
        assert out.read_text() == "[project]"
        Table(KIND, "pallas_tpu", "0", ROWS).write(out)
        with pytest.raises(SystemExit, match="TPU v5 lite"):
            tune.main(["--smoke", "--out", str(out)])

    def test_other_kinds_are_kept(self, tmp_path):
        out = tmp_path / "table.json"
        Table("interpreted", "pallas_tpu", "0", ROWS).write(out)
        tune.main(["--smoke", "--kinds", "dense", "--out", str(out)])
        table = _tables.read(out)
        assert table.rows[:3] == ROWS[3:]
        assert [r.work.kind for r in table.rows[3:]] == ["dense"]

    def test_without_an_accelerator(self):
        if jax.default_backend() != "cpu":
            pytest.skip("there is one")
        with pytest.raises(SystemExit, match="--smoke"):
            tune.main([])
