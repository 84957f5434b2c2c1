"""The guide's table of devices says what `explain` says."""

import itertools
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "docs"))

import device_table
from device_table import CALLS, DEVICES

WRITTEN = device_table.cells_of(device_table.written())
# H100 and H200 share a table, A100, L4 and B200 have no kernels: one of each is traced for all calls.
TRACED = [d for d in DEVICES if d.name in ("H200", "A100")]
OTHERS = [d for d in DEVICES if d not in TRACED]
HINT = "run python docs/device_table.py"


def test_it_has_every_call_and_device():
    assert list(WRITTEN) == [(call, d.name) for call, d in itertools.product(CALLS, DEVICES)], HINT


@pytest.mark.parametrize("call", CALLS)
def test_cells(call):
    for device in TRACED:
        assert WRITTEN[call, device.name] == device_table.cell(call, device), HINT


@pytest.mark.parametrize("device", OTHERS, ids=lambda d: d.name)
def test_other_devices(device):
    for call in ("attention, softmax", "logsumexp, 8192 x 32768"):
        assert WRITTEN[call, device.name] == device_table.cell(call, device), HINT


def test_like_devices_run_the_same():
    for call in CALLS:
        for same in (("H200", "H100"), ("A100", "L4", "B200"), ("TPU v5e", "TPU v6e")):
            assert len({WRITTEN[call, name] for name in same}) == 1
