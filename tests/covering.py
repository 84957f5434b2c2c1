"""Covering designs: few calls of a function in which every two of its options meet, at all their values."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

_TRIES = 8


def pairs(
    options: dict[str, Sequence], forbidden: Callable[[dict], bool] = lambda pair: False
) -> list[dict[str, Any]]:
    """Rows, one value per option, such that every two values of two options occur together in a row.

    Greedy: a row starts from the first pair that is still missing; each further option, in a random order, takes the
    value that adds the most missing pairs; the best row of several tries counts. Each call gives the same rows.

    Args:
      options: the values of each option.
      forbidden: whether `{name: value, other: value}` must not occur.

    Raises:
      ValueError: a pair that fits into no row.
    """
    rng = random.Random(0)
    names, values = list(options), list(options.values())
    named = lambda row: {names[a]: values[a][i] for a, i in sorted(row)}
    items = [
        [(a, i) for i in range(len(v))] for a, v in enumerate(values)
    ]  # positions of an option and of its value
    allowed = {
        pair
        for two in itertools.combinations(items, 2)
        for pair in itertools.product(*two)
        if not forbidden(named(pair))
    }
    missing, rows = set(allowed), []

    def complete(row: dict, rest: list[int]) -> dict | None:
        """The row with values of the other options; None if each choice has a forbidden pair."""
        if not rest:
            return row
        joined = {item: {tuple(sorted((item, other))) for other in row.items()} for item in items[rest[0]]}
        fits = [item for item in joined if joined[item] <= allowed]
        fits.sort(key=lambda item: (-len(joined[item] & missing), rng.random()))
        return next(filter(None, (complete({**row, a: i}, rest[1:]) for a, i in fits)), None)

    def new(row: dict) -> set:
        return missing.intersection(itertools.combinations(sorted(row.items()), 2))

    while missing:
        first = dict(min(missing))
        rest = [a for a in range(len(names)) if a not in first]
        found = [complete(first, rng.sample(rest, len(rest))) for _ in range(_TRIES)]
        if None in found:
            raise ValueError(
                f"no row has {named(first.items())}: another option has no value that both allow"
            )
        best = max(found, key=lambda row: len(new(row)))
        rows.append(named(best.items()))
        missing -= new(best)
    return rows


def count_pairs(rows: list[dict]) -> int:
    """The number of different pairs in rows."""
    return len({pair for row in rows for pair in itertools.combinations(row.items(), 2)})
