"""Covering designs."""

import itertools

import pytest
from covering import count_pairs, pairs
from helpers import fails

pytestmark = pytest.mark.whole

OPTIONS = {"a": list("abcdef"), "b": [0, 1, 2], "c": [None, 1.5], "d": [False, True], "e": [(1, 2), 3, None]}


def _forbidden(pair):
    return pair == {"b": 2, "d": True} or (pair.get("a") == "f" and pair.get("e") is not None)


@pytest.mark.parametrize("forbidden", [lambda pair: False, _forbidden])
def test_every_pair_occurs_and_none_that_is_forbidden(forbidden):
    rows = pairs(OPTIONS, forbidden)
    assert all(list(row) == list(OPTIONS) and all(row[n] in OPTIONS[n] for n in row) for row in rows)
    for (a, xs), (b, ys) in itertools.combinations(OPTIONS.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert any((row[a], row[b]) == (x, y) for row in rows) != forbidden({a: x, b: y}), (a, x, b, y)
    assert 16 <= len(rows) <= 21  # at least 6 * 3, less the forbidden pairs
    assert rows == pairs(OPTIONS, forbidden)
    assert count_pairs(rows) == (94 if forbidden is _forbidden else 97)


def test_a_pair_that_fits_into_no_row():
    options = {"a": [0, 1], "b": [0, 1], "c": [0]}
    words = ["no row has {'a': 0, 'b': 0}"]
    fails(words, ValueError, lambda: pairs(options, lambda pair: pair == {"a": 0, "c": 0}))
