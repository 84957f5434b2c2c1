"""Selections that a later pass applies to scores that it rounds otherwise."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft.rows import TopK
from jaxsoft.rows.inner import Selection, just_below

K, COLUMNS = 3, 12
COLS = np.arange(COLUMNS)


def best(x):
    order = np.argsort(-x, axis=-1, kind="stable")[..., : K + 1]
    return TopK(jnp.take_along_axis(jnp.asarray(x), order, -1), jnp.asarray(order, jnp.int32))


def selected(found, x):
    selection = Selection.of(found, K)
    return np.asarray(Selection(*(a[:, None] for a in selection)).holds(jnp.asarray(x), COLS))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_the_k_largest_are_held_however_they_are_rounded(size):
    rng = np.random.default_rng(0)
    x = (size * rng.normal(size=(50, COLUMNS))).astype(np.float32)
    x[:20, 0] = x[:20, 7] = np.sort(x[:20, 1:7], -1)[:, -K]  # the K-th largest, three times
    first = np.argsort(-x, axis=-1, kind="stable")[:, :K]
    expected = np.zeros(x.shape, bool)
    np.put_along_axis(expected, first, True, -1)
    for ulps in (0, 3, 8):
        noise = rng.integers(-ulps, ulps + 1, x.shape) * np.spacing(np.float32(np.abs(x).max()))
        equal = x == np.sort(x, -1)[:, -K, None]
        shaken = np.where(equal & (np.arange(50) < 20)[:, None], x, x + noise).astype(np.float32)
        np.testing.assert_array_equal(selected(best(x), shaken), expected)


def test_neighbours_among_floats():
    """Scores that differ by one unit in the last place are no ties, if nothing is rounded otherwise."""
    x = np.full((9, COLUMNS), -1, np.float32)
    x[:, 0], x[:, 1:K] = 9, (5 + np.arange(9, dtype=np.float32) / 7)[:, None]
    x[:, K] = np.nextafter(x[:, 1], np.float32(0))
    np.testing.assert_array_equal(selected(best(x), x), np.broadcast_to(COLS < K, x.shape))


def test_few_entries_and_nan():
    x = np.full((2, COLUMNS), -np.inf, np.float32)
    x[0, [4, 9]] = 1, 2
    x[1] = np.nan
    found = best(x)._replace(values=jnp.sort(jnp.asarray(x), axis=-1, descending=True)[:, : K + 1])
    assert np.all(selected(found, x)[0, [4, 9]])
    assert np.all(selected(found, x)[1])


def test_a_threshold_below_a_score():
    x = jnp.array([2.0, 1000.0, -jnp.inf, jnp.inf, jnp.nan])
    bound = just_below(x)
    assert np.all(bound[:2] < x[:2]) and np.all(bound[:2] > x[:2] * (1 - 1e-5))
    np.testing.assert_array_equal(bound[2:], x[2:])
    np.testing.assert_array_equal(just_below(jnp.float32(2), jnp.float32(1)), 1.5)
    assert just_below(jnp.float32(2), largest=jnp.float32(1e6)) < 1  # as its errors are those of large scores
