"""How sweeps on GPUs are cut, as a function of lengths and bytes: nothing is traced."""

import pytest

from jaxsoft.kernels.gpu._narrow import Unsupported
from jaxsoft.kernels.gpu._plan import SHARED_MEMORY, Needs, TooLarge, cut, widths


def needs(**given) -> Needs:
    """A head of 8192 x 4096 x 131072 in bfloat16: steps of 64 features."""

    def of_steps(groups, depth):
        return 0, 0, 2 * depth * (64 * groups + 256)

    head = Needs(1, 8192, 131072, 256, "columns", 4096, 2, False, 128, of_steps)
    return head._replace(**given)


def stored(item: int = 2, **given) -> Needs:
    """Stored scores of 8192 x 32768."""

    def of_tiles(groups, depth):
        return 0, 64 * groups * 128 * item, 0

    rows = Needs(1, 8192, 32768, 128, "columns", 0, item, False, 0, of_tiles)
    return rows._replace(**given)


def test_a_head():
    sizes = cut(needs(), {}, 132)
    assert (sizes.groups, sizes.major, sizes.minor, sizes.depth, sizes.steps) == (2, 128, 256, 64, 64)
    assert sizes.stages == SHARED_MEMORY // (2 * 64 * (128 + 256)) == 4
    assert (sizes.blocks, sizes.tiles) == (64, 512) and sizes.tile_stages == 0 and not sizes.resident
    # Blocks that run at the same time share the cache, and all processors have something to do.
    assert sizes.together * 128 * 4096 * 2 <= 24 * 2**20 and sizes.together * sizes.parts >= 132
    assert cut(needs(features=128), {}, 132).resident


def test_stored_rows():
    sizes = cut(stored(), {}, 132)
    assert (sizes.groups, sizes.stages, sizes.together, sizes.blocks, sizes.depth) == (2, 6, 64, 64, 0)
    # 64 blocks in parts: whole waves of 132 processors.
    assert 64 * sizes.parts / (-(-64 * sizes.parts // 132) * 132) > 0.9
    long = cut(stored(major=256, minor=2**20), {}, 132)
    assert long.blocks * long.parts == 132


def test_one_warpgroup():
    assert [cut(stored(**given), {}, 132).groups for given in ({"alone": True}, {"major": 64})] == [1, 1]
    assert cut(stored(), {"rows": 64}, 132).groups == 1
    half = SHARED_MEMORY // 2
    assert cut(stored(bytes=lambda groups, depth: (0, groups * (half + 1), 0)), {}, 132).groups == 1
    with pytest.raises(TooLarge, match="shared memory"):
        cut(stored(bytes=lambda groups, depth: (SHARED_MEMORY, 1, 0)), {}, 132)


def test_other_operands_of_a_product():
    """Two tiles of them if there is room for two steps beside them, else one."""
    each = SHARED_MEMORY // 8
    for tile, stages in ((1, (2, 6)), (3, (2, 2)), (5, (1, 3))):
        sizes = cut(needs(bytes=lambda groups, depth, tile=tile: (0, tile * each, each)), {}, 132)
        assert (sizes.tile_stages, sizes.stages) == stages


def test_what_a_user_asks_for():
    sizes = cut(stored(), {"parts": 7, "stages": 3}, 132)
    assert (sizes.parts, sizes.stages) == (7, 3)
    assert cut(stored(minor=300), {"parts": 7}, 132).parts == 3  # no more than tiles
    assert cut(needs(over="rows", width=64), {"parts": 7, "columns": 64}, 132).parts == 1
    with pytest.raises(Unsupported, match="64 or 128 rows, not 96"):
        cut(stored(), {"rows": 96}, 132)
    with pytest.raises(Unsupported, match="too many blocks"):
        cut(stored(matrices=70000), {}, 132)


def test_registers():
    with pytest.raises(TooLarge, match="registers"):
        cut(needs(accumulators=161), {}, 132)
    cut(needs(accumulators=161, width=64), {}, 132)
    cut(needs(accumulators=161), {"columns": 256}, 132)


def test_widths():
    assert widths("columns", None, 131072, True, False) == (256, 128, 64)
    # The last tile, or one that a mask cuts, would be mostly empty.
    assert (
        widths("columns", None, 1100, True, False) == widths("columns", None, 131072, True, True) == (128, 64)
    )
    assert widths("columns", None, 131072, False, False) == (128, 64)
    assert widths("rows", None, 8192, True, False) == (64,)
    assert widths("rows", 128, 8192, True, False) == (128,)
    with pytest.raises(Unsupported, match="64, 128, 192 or 256 columns, not 96"):
        widths("columns", 96, 8192, True, False)
