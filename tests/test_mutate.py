"""`tests/mutate.py` on a tiny package: what is caught, what survives, what is broken."""

import mutate
import pytest

_SLIP = (
    '[[slip]]\nfile = "jaxsoft/__init__.py"\nold = "{}"\nnew = "{}"\ntests = "{}"\nkind = "{}"\ngap = "{}"\n'
)
_TESTS = "tests/test_add.py -k one"
SLIPS = mutate.read_slips(mutate.ROOT / "tests" / "mutations")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of the time of a run
    (tmp_path / "jaxsoft").mkdir()
    (tmp_path / "jaxsoft" / "__init__.py").write_text("def add(a, b):\n    return a + b + 0\n")
    (tmp_path / "tests" / "mutations").mkdir(parents=True)
    (tmp_path / "tests" / "test_add.py").write_text(
        "import jaxsoft\n\n\ndef test_one():\n    assert jaxsoft.add(1, 2) == 3\n"
        "\n\ndef test_wrong():\n    assert jaxsoft.add(1, 2) == 4\n"
    )
    return tmp_path


def write(root, *slips):
    (root / "tests" / "mutations" / "a.toml").write_text("".join(_SLIP.format(*slip) for slip in slips))


def test_outcomes(root, capsys):
    write(
        root,
        ("a + b", "a - b", _TESTS, "formula", ""),
        ("b + 0", "b * 1", _TESTS, "masks", "equal"),
        ("return", "retrun", _TESTS, "borders", ""),
        ("a + b", "a + c", _TESTS, "borders", ""),
        ("a * b", "a - 7", _TESTS, "borders", ""),
        ("a, b", "a, b=0", "tests/test_add.py -k wrong", "gradients", ""),
        ("a + b", "b - a", "tests/test_add.py -k absent", "kernels", ""),
    )
    assert mutate.main([], root) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {line[1]: [int(n) for n in line[3:10:2]] for line in lines if "│" in line}
    assert table == {  # slips, caught, survived, broken
        "formula": [1, 1, 0, 0],
        "borders": [3, 0, 0, 3],
        "masks": [1, 0, 1, 0],
        "gradients": [1, 0, 0, 1],
        "kernels": [1, 0, 0, 1],
        "all": [7, 1, 1, 5],
    }
    assert mutate.main(["--only", "masks"], root) == 0  # survived, as its gap says


def test_selected(root, capsys):
    slips = [("a + b", "a - b", tests, "formula", "") for tests in (_TESTS, "tests/test_add.py::test_one")]
    write(root, *slips, ("a + b", "b - a", "tests/test_add.py -k absent", "kernels", ""))
    assert mutate.main(["--selected"], root) == 1
    out = capsys.readouterr().out
    assert "2 of 3 slips have a test in the design" in out and "tests/test_add.py -k absent" in out
    assert mutate.main(["--selected", "--only", "formula"], root) == 0


def test_status():
    def status(gap, state):
        slip = mutate.Slip("a", "b", "c", "d", "formula", gap)
        return mutate.status([slip], [mutate.Outcome(state, "")])

    assert [status("", state) for state in ("caught", "survived", "broken")] == [0, 1, 1]
    assert [status("why", state) for state in ("caught", "survived", "broken")] == [1, 0, 1]


def test_a_kind_must_be_known(root):
    write(root, ("a + b", "a - b", _TESTS, "style", ""))
    with pytest.raises(ValueError, match=r"kind must be one of formula, .* got 'style'"):
        mutate.main([], root)


@pytest.mark.parametrize("file", sorted({slip.file for slip in SLIPS}))
@pytest.mark.whole
def test_the_text_of_each_slip_is_in_the_code(file):
    text = (mutate.ROOT / file).read_text(encoding="utf-8")
    assert [slip.old for slip in SLIPS if slip.file == file and text.count(slip.old) != 1] == []
