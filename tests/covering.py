"""Covering designs: few calls of a function in which every two of its options meet, at all their values."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any


def pairs(
    options: dict[str, Sequence], forbidden: Callable[[dict], bool] = lambda pair: False
) -> list[dict[str, Any]]:
    """Rows, one value per option, such that every two values of two options occur together in a row.

    Greedy and deterministic: a row starts from the first pair that is still missing; each further option takes the
    value that adds the most missing pairs.

    Args:
      options: the values of each option.
      forbidden: whether `{name: value, other: value}` must not occur.

    Raises:
      ValueError: a pair that fits into no row.
    """
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

    def complete(row: dict) -> dict | None:
        """The row with values of the options that it lacks; None if each choice has a forbidden pair."""
        if len(row) == len(names):
            return row
        a = min(set(range(len(names))) - row.keys())
        joined = {item: {tuple(sorted((item, other))) for other in row.items()} for item in items[a]}
        fits = [item for item in items[a] if joined[item] <= allowed]
        fits.sort(key=lambda item: -len(joined[item] & missing))
        return next(filter(None, (complete({**row, a: i}) for _, i in fits)), None)

    while missing:
        first = min(missing)
        row = complete(dict(first))
        if row is None:
            raise ValueError(
                f"no row has {named(first)}: another option has no value that is allowed with both"
            )
        rows.append(named(row.items()))
        missing -= set(itertools.combinations(sorted(row.items()), 2))
    return rows
