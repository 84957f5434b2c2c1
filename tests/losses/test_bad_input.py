"""Wrong arguments of the losses: an error that names the argument, what came and what was expected."""

import functools
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from conformance.entry import make_inputs
from conformance.table import ENTRIES, FAMILIES
from helpers import fails

import jaxsoft
from jaxsoft import losses

pytestmark = pytest.mark.whole  # the cases are losses

N, C = 4, 6
X, Y = np.ones((N, C), np.float32), np.arange(N, dtype=np.int32)
LOGITS = jaxsoft.linear_logits(np.ones((N, 3), np.float32), np.ones((3, C), np.float32))
ONES = np.ones(N, np.float32)
MASK = np.ones((N, C), bool)

EVERY = sorted({e.function: e for e in ENTRIES if e.loss}, key=lambda f: f.__name__)
WITH_IDS = [f for f in EVERY if any(e.function is f and e.inputs[0] == "labels" for e in ENTRIES)]
WITH_POSITIVES = [f for f in EVERY if any(e.function is f and e.inputs[0] == "positives" for e in ENTRIES)]
SOFT = [f for family in FAMILIES for f in getattr(family, "SOFT", [])]
OPTIONS = [case for family in FAMILIES for case in getattr(family, "BAD_OPTIONS", [])]
CE = losses.cross_entropy


def example(loss):
    """A call `(logits, labels, **options)` of a loss with its other required arguments, and valid labels."""
    entry = next(e for e in ENTRIES if e.function is loss)
    given = make_inputs(0, (N,), C)
    arrays = {option: given[source] for option, source in entry.arrays.items()}
    return functools.partial(loss, **entry.options, **arrays), given[entry.inputs[0]]


every = pytest.mark.parametrize("loss", EVERY, ids=lambda f: f.__name__)
with_ids = pytest.mark.parametrize("loss", WITH_IDS, ids=lambda f: f.__name__)
with_positives = pytest.mark.parametrize("loss", WITH_POSITIVES, ids=lambda f: f.__name__)
logits_kinds = pytest.mark.parametrize("logits", [X, LOGITS], ids=["dense", "streamed"])


@every
@logits_kinds
def test_logits_and_axis(loss, logits):
    loss, y = example(loss)
    fails(["logits", "int64", "floating"], TypeError, lambda: loss(np.ones((N, C), int), y))
    fails(["logits", "3.0", "floating"], TypeError, lambda: loss(3.0, y))
    fails(["axis", "[-2, 2)", "(4, 6)", "got 2"], ValueError, lambda: loss(logits, y, axis=2))
    fails(["axis", "integer", "'last'"], TypeError, lambda: loss(logits, y, axis="last"))


@with_ids
@logits_kinds
def test_labels(loss, logits):
    soft = loss in SOFT
    loss, _ = example(loss)
    fails(["labels", "(4,)", "(3,)"], ValueError, lambda: loss(logits, Y[:3]))
    fails(["labels", "(4,)", "(4, 6)"], ValueError, lambda: loss(logits, np.zeros((N, C), np.int32)))
    fails(["labels", "(4,)", "()"], ValueError, lambda: loss(logits, np.int32(1)))
    fails(["labels", "integer", "bool"], TypeError, lambda: loss(logits, Y > 1))
    fails(["labels", "integer", "bool"], TypeError, lambda: loss(logits, MASK))
    fails(["labels", "array", "[0, 1, 2, 3] of type list"], TypeError, lambda: loss(logits, [0, 1, 2, 3]))
    fails(["labels", "array", "1 of type int"], TypeError, lambda: loss(logits, 1))
    fails(["labels", "integer", "complex64"], TypeError, lambda: loss(logits, ONES.astype(np.complex64)))
    floats = Y.astype(np.float32)  # ids, stored as floats
    if soft:
        fails(["labels", "float32", "(4, 6)", "(4,)", "integers"], ValueError, lambda: loss(logits, floats))
    else:
        fails(["labels", "integer", "float32", "(4,)"], TypeError, lambda: loss(logits, floats))
        fails(["labels", "integer", "float32", "(4, 6)"], TypeError, lambda: loss(logits, X / C))


@with_positives
@logits_kinds
def test_labels_of_many_positives(loss, logits):
    loss, _ = example(loss)
    fails(["labels", "(4, 'k')", "(4,)"], ValueError, lambda: loss(logits, Y))
    fails(["labels", "(4, 'k')", "(3, 1)"], ValueError, lambda: loss(logits, Y[:3, None]))
    fails(["labels", "(4, 6)", "(4, 5)", "booleans"], ValueError, lambda: loss(logits, MASK[:, :5]))
    fails(["labels", "integer", "boolean", "float32"], TypeError, lambda: loss(logits, X))
    fails(["labels", "integer", "boolean", "of type list"], TypeError, lambda: loss(logits, [[0]]))


@every
@logits_kinds
def test_masks_and_weights(loss, logits):
    loss, y = example(loss)
    fails(["where", "boolean", "float32"], TypeError, lambda: loss(logits, y, where=X))
    fails(["where", "boolean", "of type list"], TypeError, lambda: loss(logits, y, where=[True] * C))
    fails(["where", "broadcast", "(4, 6)", "(4,)"], ValueError, lambda: loss(logits, y, where=MASK[:, 0]))
    fails(
        ["where", "broadcast", "(4, 6)", "(2, 4, 6)"],
        ValueError,
        lambda: loss(logits, y, where=np.stack([MASK] * 2)),
    )
    fails(["weights", "(4,)", "(6,)"], ValueError, lambda: loss(logits, y, weights=np.ones(C, np.float32)))
    fails(["weights", "(4,)", "(4, 6)"], ValueError, lambda: loss(logits, y, weights=X))
    fails(["weights", "(4,)", "(4, 1)"], ValueError, lambda: loss(logits, y, weights=ONES[:, None]))
    fails(
        ["weights", "numbers or booleans", "complex64"], TypeError, lambda: loss(logits, y, weights=ONES * 1j)
    )
    fails(["weights", "numbers or booleans", "2.0 of"], TypeError, lambda: loss(logits, y, weights=2.0))
    if "ignore_index" in inspect.signature(loss).parameters:
        fails(["ignore_index", "integer", "1.5"], TypeError, lambda: loss(logits, y, ignore_index=1.5))


@logits_kinds
@pytest.mark.parametrize("i", range(len(OPTIONS)))
def test_options(i, logits):
    loss, options, kind, words = OPTIONS[i]
    call, y = example(loss)
    fails(words, kind, lambda: call(logits, y, **options))


@logits_kinds
def test_smoothing_to_others_needs_ids(logits):
    q = X / C
    fails(
        ["smoothing='others'", "class ids", "distributions"],
        ValueError,
        lambda: CE(logits, q, smoothing="others", label_smoothing=0.1),
    )
    CE(logits, q, smoothing="others")  # nothing is smoothed


@logits_kinds
def test_reducers(logits):
    mean, total = losses.weighted_mean, losses.weighted_sum
    for reducer in (mean, total):
        fails(
            ["weights", "(4,)", "(6,)"],
            ValueError,
            lambda r=reducer: r(CE, logits, Y, weights=np.ones(C, np.float32)),
        )
        words = ["weights", "numbers or booleans", "complex64"]
        fails(words, TypeError, lambda r=reducer: r(CE, logits, Y, weights=ONES * 1j))
        fails(["labels", "integer", "bool"], TypeError, lambda r=reducer: r(CE, logits, Y > 1))
        fails(["chunk_size", ">= 1", "0"], ValueError, lambda r=reducer: r(CE, logits, Y, chunk_size=0))
        fails(["chunk_size", "integer", "2.5"], TypeError, lambda r=reducer: r(CE, logits, Y, chunk_size=2.5))
        fails(["axis", "[-2, 2)", "(4, 6)"], ValueError, lambda r=reducer: r(CE, logits, Y, axis=5))
        fails(
            ["where", "broadcast", "(4, 6)", "(4,)"],
            ValueError,
            lambda r=reducer: r(CE, logits, Y, where=MASK[:, 0]),
        )
        fails(["where", "boolean", "float32"], TypeError, lambda r=reducer: r(CE, logits, Y, where=X))
        fails(["label_smoothing", "1.5"], ValueError, lambda r=reducer: r(CE, logits, Y, label_smoothing=1.5))
        fails(["logits", "floating", "int32"], TypeError, lambda r=reducer: r(CE, Y[:, None], Y))
    # Labels with other leading axes than the rows'.
    for reducer in (mean, total):
        fails(["(4,)", "(3,)"], ValueError, lambda r=reducer: r(CE, logits, Y[:3]))


def test_a_loss_that_is_not_by_row():
    fails(
        ["loss", "(4,)", "()"],
        ValueError,
        lambda: losses.weighted_sum(lambda logits, y, axis=-1: jnp.sum(CE(logits, y)), LOGITS, Y),
    )
