"""What the kernels' machine code should take on an H200, beside what was measured: `python benchmarks/roofline.py`.

A model of three ceilings: bytes at the rate of a copy, products at the rate of a large product, both measured on the
same card, and instructions at four per cycle and multiprocessor (of a warp: 32 scores). Instructions per score are
those of `results/compiled.json`, before the first change that it lists and now; where masks cut some tiles only, those
of the other tiles. Rows are bound by the slower of memory and instructions. In attention, products and instructions of
a tile hardly overlap: their times add up. The product of a head overlaps with its copies if the second-level cache is
fast enough; the measured kernel is slower than this model, which knows nothing of power and latency.
"""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

RESULTS = pathlib.Path(__file__).parent / "results" / "compiled.json"

# Measured on the H200: bytes and operations per second, and the clock under load.
COPY, PRODUCT, CACHE, CLOCK = 4.13e12, 772e12, 11e12, 1.75e9
PROCESSORS = 132
# The fraction of issue slots that row kernels used when they were bound by instructions.
ISSUE = 0.62


class Work(NamedTuple):
    """A kernel on a shape.

    Attributes:
      kernel: its name in `compiled.json`.
      scores: the scores that it visits.
      products: operations of its products, per score.
      bytes: read and written.
      cached: bytes from the second-level cache, by width of a tile.
      measured: milliseconds before the first change; None if not measured alone.
    """

    kernel: str
    scores: float
    products: float
    bytes: float
    cached: dict[str, float]
    measured: float | None


ROWS = 8192 * 32768
HEAD = 8192 * 131072
CAUSAL = 4 * 16 * 8192 * (8192 + 128) / 2
HEADS = 4 * 16 * 8192 * 128 * 2
CACHED = 64 * 8 * 32768  # keys of all heads
TILES = {
    "128": 65536 * 2 * 2**20,
    "256": 32768 * 3 * 2**20,
}  # a tile of the head reads 128 + 128 or 128 + 256 lines

WORKS = [
    Work("logsumexp", ROWS, 0, 2 * ROWS, {}, 0.201),
    # Softmax took 0.535: the sweep of logsumexp, then XLA's pass (0.33). Predicted for a sweep that writes the weights:
    # 7 instructions per score, 0.26; for both, 0.40, which is 0.65 of a copy.
    Work("softmax weights", ROWS, 0, 4 * ROWS, {}, None),
    Work("head forward", HEAD, 2 * 4096, 0, TILES, 16.5),
    Work("attention forward", CAUSAL, 4 * 128, 4 * HEADS, {}, 2.97),
    Work("attention dQ", CAUSAL, 6 * 128, 6 * HEADS, {}, None),
    Work("attention dK, dV", CAUSAL, 8 * 128, 6 * HEADS, {}, None),
    # Predicted for softpick at 20 instructions per score: 2.9.
    Work("softpick forward", CAUSAL, 4 * 128, 4 * HEADS, {}, 7.2),
    Work("sigmoid forward", CAUSAL, 4 * 128, 4 * HEADS, {}, 4.4),
    # Lengths took 6.34, of which 4.2 were copies of the cache. Predicted without copies: as long as without lengths.
    # A tile has 64 rows, of which 4 are query heads.
    Work("decode", 64 * CACHED, 4 * 128, CACHED * 2 * 128 * 2, {}, 1.93),
    Work("decode with lengths", 64 * CACHED, 4 * 128, CACHED * 2 * 128 * 2, {}, 6.34),
]


def milliseconds(work: Work, instructions: float, width: str) -> float:
    """The time that the ceilings allow."""
    issue = work.scores * instructions / 32 / 4 / PROCESSORS / CLOCK
    if not work.products:
        return 1e3 * max(work.bytes / COPY, issue / ISSUE)
    product = work.scores * work.products / PRODUCT
    if work.cached:
        return 1e3 * (max(product, work.cached[width] / CACHE) + issue)
    return 1e3 * max(product + issue, work.bytes / COPY)


def weighted_sum(blocks: int) -> float:
    """Milliseconds of `weighted_sum` at 8192 x 4096 x 131072, with the gradient of a chunk in blocks of columns.

    Three products at 0.92 of the rate, and the bytes between them. The float32 logits of a chunk of 4096 rows are
    written, and read for the states and for their gradient, which is written in bfloat16. The product adds to the
    float32 gradient of the weight; of a block, which is a slice of it, the sum is another pass. Every block reads and
    writes the sum of the gradient of hidden. Measured with chunks of 512 rows: 86.5.
    """
    n, d, v, chunks = 8192, 4096, 131072, 2
    logits = n * v * (3 * 4 + 2)
    weight = chunks * d * v * 4 * (2 if blocks == 1 else 4)
    hidden = n * d * 4 * (0 if blocks == 1 else 3 * blocks)
    return 1e3 * (6 * n * d * v / (0.92 * PRODUCT) + (logits + weight + hidden) / COPY)


def main() -> None:
    content = json.loads(RESULTS.read_text())
    before, now = content["history"][0], content["kernels"]
    print(f"{'kernel':20}{'measured before':>17}{'modelled before':>17}{'predicted now':>15}  ms")
    for work in WORKS:
        measured = "-" if work.measured is None else f"{work.measured:.3g}"
        old = before.get(work.kernel)
        old = "-" if old is None else f"{milliseconds(work, old['instructions'], '128'):.3g}"
        width = now[work.kernel]["tile"].split()[-1]
        new = milliseconds(work, now[work.kernel]["instructions"], width)
        print(f"{work.kernel:20}{measured:>17}{old:>17}{new:15.3g}")
    for blocks in (16, 1):
        print(f"weighted_sum, the gradient of a chunk in {blocks:2} blocks: {weighted_sum(blocks):.3g} ms")
    print("Measured: H200, jax 0.11.2. The attention's backward pass took 15.7 ms, spills included.")


if __name__ == "__main__":
    main()
