"""The laws of `tests/conformance` over the TPU's kernels: interpreted, in ragged tiles, also in float64.

`tests/design.py` says which of them `make test` runs.
"""

import pytest
from conformance import test_laws
from conformance.table import ENTRIES
from conformance.test_laws import *  # noqa: F403 (the laws)

from jaxsoft import kernels
from jaxsoft.kernels.inner import choose
from jaxsoft.rows import _reduce, _sweeps

pytestmark = pytest.mark.kernels

# JAX's interpreter of kernels does not run in `shard_map`, and products in tiles are not those that the law looks
# for: `test_lowering.py` and `test_rows.py` have tests of both.
del test_on_a_mesh_as_on_one_device  # noqa: F821
del test_shards_of_columns_are_a_single_device  # noqa: F821
del test_products_are_in_the_dtype_asked_for  # noqa: F821


def prefer_kernels(what, implementation, work, case):
    """The choice of an implementation, where None is a kernel if it can run the case."""
    if implementation is None:
        try:
            return choose(what, "pallas_tpu", work, case)
        except ValueError:
            pass
    return choose(what, implementation, work, case)


@pytest.fixture(autouse=True)
def over_kernels(monkeypatch):
    """Runs a test over kernels wherever it could."""
    monkeypatch.setattr(_reduce, "choose", prefer_kernels)
    monkeypatch.setattr(_sweeps, "objection", lambda arrays, interpret: None)  # to float64
    monkeypatch.setattr(test_laws._Program, "over", "kernels")
    with kernels.interpreted(), kernels.block_sizes(rows=4, columns=3):
        yield


def test_kernels_run():
    entries = [entry for entry in ENTRIES if entry.rank == "leading"][::4]
    missing = [
        entry.id
        for entry in entries
        if all(
            decision.implementation == "xla"
            for decision in kernels.explain(entry.call, test_laws.scores(entry), test_laws.inputs_of(entry))
        )
    ]
    assert not missing, missing
