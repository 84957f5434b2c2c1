"""Trains the small GPT of examples/train_lm.py with each normalizer in its attention, and compares the losses.

    python benchmarks/train_normalizers.py [any option of examples/train_lm.py]

Runs only the streamed variant, with equal seeds and, by default, small sizes. Prints a table (validation loss, ratio to
that of softmax, time per step) and writes benchmarks/results/train_normalizers.json.
"""

from __future__ import annotations

import pathlib
import sys

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import machine
import train_lm

SIZES = "--steps 150 --batch 8 --sequence 128 --width 128 --layers 2 --heads 4 --vocab 4096 --source-mb 1"


def main() -> None:
    parser = train_lm.make_parser()
    args = train_lm.parse_arguments(parser, [*SIZES.split(), "--sample-tokens", "1", *sys.argv[1:]])
    data = train_lm.load(args)
    rows = []
    for name in train_lm.NORMALIZERS:
        args.normalizer = name
        *_, result = train_lm.run(args, "ours", *data)
        rows.append(
            {
                "normalizer": name,
                "loss": result["validation_after"],
                "seconds_per_step": result["seconds_per_step"],
            }
        )
        print(f"{name:30} {rows[-1]['loss']:.4f}", flush=True)
    table = Table(title=f"{args.steps} steps of {args.batch} x {args.sequence} tokens")
    for title in ("normalizer", "validation loss", "to softmax", "ms per step"):
        table.add_column(title, justify="right" if title != "normalizer" else "left")
    for row in rows:
        row["to_softmax"] = row["loss"] / rows[0]["loss"]
        table.add_row(
            row["normalizer"],
            f"{row['loss']:.4f}",
            f"{row['to_softmax']:.3f}",
            f"{1e3 * row['seconds_per_step']:.0f}",
        )
    Console(width=100).print(table)
    out = pathlib.Path(__file__).parent / "results" / "train_normalizers.json"
    machine.save(out, {"sizes": SIZES, "options": sys.argv[1:], "rows": rows})


if __name__ == "__main__":
    main()
