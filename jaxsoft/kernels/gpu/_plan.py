"""How a sweep is cut into tiles: a function of lengths, of bytes of shared memory, and of what a user asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxsoft.kernels.gpu._narrow import Unsupported

# Bytes of shared memory per block of threads on Hopper, less some for barriers and reductions across warps.
SHARED_MEMORY = 232448 - 4096
# Rows of a warpgroup's tile: as many as a wgmma has.
WARPGROUP = 64
# Bytes of the longest swizzled line of shared memory.
_LINE = 128
# The most features that are kept whole in shared memory.
LONGEST_FEATURES = 256
# L2 budget, in bytes, for data that concurrent blocks share.
_CACHED = 24 * 2**20
# The largest number of parts of the minor axis that is tried by default, unless more are needed for one per processor.
_MOST_PARTS = 32
# The most registers of a thread, of 232, that may hold results of products: more spill.
_MOST_ACCUMULATORS = 160
# The most slots of a ring.
_MOST_STAGES = 6
# The most blocks of threads along the last axes of a CUDA grid.
_LARGEST_GRID = 65535


class TooLarge(Exception):
    """Blocks of these sizes do not fit into shared memory or registers; the message says why."""


class Sizes(NamedTuple):
    """How a sweep is cut.

    Attributes:
      groups: warpgroups that compute.
      minor: length of a tile along the minor axis.
      depth: features per step of a product.
      steps: steps of a product.
      resident: whether the product's side along the major axis stays in shared memory.
      stages: slots of the ring of tiles, or for a product of the ring of steps.
      tile_stages: for a product, slots of the ring of tiles, with the other operands.
      parts: parts of the minor axis, each with a carry of its own.
      together: blocks along the major axis that run side by side.
      blocks: blocks along the major axis.
      tiles: tiles along the minor axis.
    """

    groups: int
    minor: int
    depth: int
    steps: int
    resident: bool
    stages: int
    tile_stages: int
    parts: int
    together: int
    blocks: int
    tiles: int

    @property
    def major(self) -> int:
        """Length of a block of threads along the major axis."""
        return self.groups * WARPGROUP


class Needs(NamedTuple):
    """What decides how a sweep is cut.

    Attributes:
      matrices: the number of matrices.
      major: length of the major axis.
      minor: length of the minor axis.
      width: length of a tile along the minor axis.
      over: as in `Plan`.
      features: of the product; 0 for stored scores.
      item: bytes per number of the scores, or of the product's sides.
      alone: whether only one warpgroup can compute.
      accumulators: registers of a thread that hold results of products.
      bytes: `(warpgroups, features per step) -> bytes` of shared memory: fixed, per slot of the ring of tiles, and per
        slot of the ring of steps.
    """

    matrices: int
    major: int
    minor: int
    width: int
    over: str
    features: int
    item: int
    alone: bool
    accumulators: int
    bytes: Callable[[int, int], tuple[int, int, int]]


def widths(over: str, wanted: int | None, length: int, is_product: bool, skips: bool) -> tuple[int, ...]:
    """Lengths of a tile along the minor axis to try, the best first; `skips`: some tiles have nothing to do."""
    if wanted is not None:
        if wanted % 64 or wanted > 256:
            raise Unsupported(f"a tile must have 64, 128, 192 or 256 {over}, not {wanted}")
        return (wanted,)
    if over == "rows":
        return (64,)
    # 256 columns of a product read its rows less often; not if the last tile, or one that a mask cuts, would be mostly
    # empty.
    widest = is_product and not skips and -(-length // 256) * 256 <= 1.1 * length
    return (256, 128, 64) if widest else (128, 64)


def cut(needs: Needs, wanted: dict[str, int], processors: int) -> Sizes:
    """Block sizes with as many computing warpgroups as fit; raises `TooLarge` if one does not.

    Args:
      needs: what decides.
      wanted: block sizes that the user or a table of measurements asks for.
      processors: multiprocessors of the device.
    """
    if needs.accumulators > _MOST_ACCUMULATORS and needs.width > 64 and needs.over not in wanted:
        raise TooLarge(f"a tile of {needs.width} needs more registers than there are")
    name = "columns" if needs.over == "rows" else "rows"
    major = wanted.get(name, 2 * WARPGROUP)
    if major not in (WARPGROUP, 2 * WARPGROUP):
        raise Unsupported(f"a block must have {WARPGROUP} or {2 * WARPGROUP} {name}, not {major}")
    if major == WARPGROUP or needs.alone or needs.major <= WARPGROUP:
        return _cut_for(1, needs, wanted, processors)
    try:
        return _cut_for(2, needs, wanted, processors)
    except TooLarge:
        return _cut_for(1, needs, wanted, processors)


def _cut_for(groups: int, needs: Needs, wanted: dict[str, int], processors: int) -> Sizes:
    """Block sizes with this number of computing warpgroups: as many slots as fit into shared memory."""
    blocks, tiles = -(-needs.major // (groups * WARPGROUP)), -(-needs.minor // needs.width)
    resident = 0 < needs.features <= LONGEST_FEATURES
    depth = features(needs.features) if resident else _LINE // needs.item if needs.features else 0
    steps = -(-needs.features // depth) if depth else 0
    fixed, tile, step = needs.bytes(groups, depth)
    room, most, tile_stages = SHARED_MEMORY - fixed, wanted.get("stages", _MOST_STAGES), 0
    if needs.features:
        # Two tiles of the other operands if there is room for two steps beside them, else one.
        two = room - 2 * tile >= 2 * step
        tile_stages = min(2 if two else 1, tiles) if tile else 0
        stages = min(most, steps * tiles, (room - tile_stages * tile) // step)
    else:
        stages = min(most, tiles, room // tile)
    if stages < 1:
        raise TooLarge(
            f"a tile of the operands needs {fixed + tile + step} bytes of shared memory, more than there are"
        )
    together = blocks
    if needs.features:
        each = groups * WARPGROUP * needs.features * needs.item
        together = -(-blocks // -(-blocks // max(1, min(blocks, _CACHED // each))))
    if needs.matrices * -(-blocks // together) > _LARGEST_GRID:
        raise Unsupported(f"{needs.matrices} matrices need too many blocks of threads")
    parts = (
        1
        if needs.over == "rows"
        else wanted.get("parts") or _parts(needs, blocks, together, tiles, processors)
    )
    parts = max(1, min(parts, tiles))
    return Sizes(
        groups, needs.width, depth, steps, resident, stages, tile_stages, parts, together, blocks, tiles
    )


def _parts(needs: Needs, blocks: int, together: int, tiles: int, processors: int) -> int:
    """The number of parts of the minor axis with the least estimated time."""
    least = 1 if together == blocks else -(-processors // together)
    most = max(least, _MOST_PARTS, processors // (needs.matrices * blocks))

    def time(parts: int) -> int:
        """In tiles; the start and end of a part cost as much as 4 tiles."""
        return -(-needs.matrices * blocks * parts // processors) * (-(-tiles // parts) + 4)

    return min(range(least, most + 1), key=time)


def features(n: int) -> int:
    """Features in shared memory: rounded up to a multiple of 64, the rest are zeros."""
    return -(-n // 64) * 64
