"""Wrong arguments of the losses: an error that names the argument, what came and what was expected."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft import losses

N, C = 4, 6
X, Y = np.ones((N, C), np.float32), np.arange(N, dtype=np.int32)
LOGITS = jaxsoft.linear_logits(np.ones((N, 3), np.float32), np.ones((3, C), np.float32))
ONES = np.ones(N, np.float32)
MASK = np.ones((N, C), bool)

WITH_IDS = [
    losses.cross_entropy,
    losses.dual_focal_loss,
    losses.focal_loss,
    losses.max_suppression_loss,
    losses.poly1_cross_entropy,
    losses.poly1_focal_loss,
    losses.poly_loss,
    losses.spherical_z_loss,
]
SOFT = [losses.cross_entropy, losses.poly_loss, losses.poly1_cross_entropy]
EVERY = [*WITH_IDS, losses.decoupled_softmax_loss]


def labels_of(loss):
    return Y[:, None] if loss is losses.decoupled_softmax_loss else Y


def check(words, kind, call):
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind, error.value
    for word in words:
        assert word in str(error.value), str(error.value)


def test_every_loss_is_here():
    reducers = {"weighted_mean", "weighted_sum"}
    of_routers = {
        "importance_loss",
        "load_balance_loss",
        "modality_routing_kl",
        "router_z_loss",
    }  # test_routing.py
    assert {f.__name__ for f in EVERY} == set(losses.__all__) - reducers - of_routers


every = pytest.mark.parametrize("loss", EVERY, ids=lambda f: f.__name__)
with_ids = pytest.mark.parametrize("loss", WITH_IDS, ids=lambda f: f.__name__)
logits_kinds = pytest.mark.parametrize("logits", [X, LOGITS], ids=["dense", "streamed"])


@every
@logits_kinds
def test_logits_and_axis(loss, logits):
    y = labels_of(loss)
    check(["logits", "int64", "floating"], TypeError, lambda: loss(np.ones((N, C), int), y))
    check(["logits", "3.0", "floating"], TypeError, lambda: loss(3.0, y))
    check(["axis", "[-2, 2)", "(4, 6)", "got 2"], ValueError, lambda: loss(logits, y, axis=2))
    check(["axis", "integer", "'last'"], TypeError, lambda: loss(logits, y, axis="last"))


@with_ids
@logits_kinds
def test_labels(loss, logits):
    check(["labels", "(4,)", "(3,)"], ValueError, lambda: loss(logits, Y[:3]))
    check(["labels", "(4,)", "(4, 6)"], ValueError, lambda: loss(logits, np.zeros((N, C), np.int32)))
    check(["labels", "(4,)", "()"], ValueError, lambda: loss(logits, np.int32(1)))
    check(["labels", "integer", "bool"], TypeError, lambda: loss(logits, Y > 1))
    check(["labels", "integer", "bool"], TypeError, lambda: loss(logits, MASK))
    check(["labels", "array", "[0, 1, 2, 3] of type list"], TypeError, lambda: loss(logits, [0, 1, 2, 3]))
    check(["labels", "array", "1 of type int"], TypeError, lambda: loss(logits, 1))
    check(["labels", "integer", "complex64"], TypeError, lambda: loss(logits, ONES.astype(np.complex64)))
    floats = Y.astype(np.float32)  # ids, stored as floats
    if loss in SOFT:
        check(["labels", "float32", "(4, 6)", "(4,)", "integers"], ValueError, lambda: loss(logits, floats))
    else:
        check(["labels", "integer", "float32", "(4,)"], TypeError, lambda: loss(logits, floats))
        check(["labels", "integer", "float32", "(4, 6)"], TypeError, lambda: loss(logits, X / C))


@logits_kinds
def test_labels_of_many_positives(logits):
    loss = losses.decoupled_softmax_loss
    check(["labels", "(4, 'k')", "(4,)"], ValueError, lambda: loss(logits, Y))
    check(["labels", "(4, 'k')", "(3, 1)"], ValueError, lambda: loss(logits, Y[:3, None]))
    check(["labels", "(4, 6)", "(4, 5)", "booleans"], ValueError, lambda: loss(logits, MASK[:, :5]))
    check(["labels", "integer", "boolean", "float32"], TypeError, lambda: loss(logits, X))
    check(["labels", "integer", "boolean", "of type list"], TypeError, lambda: loss(logits, [[0]]))


@every
@logits_kinds
def test_masks_and_weights(loss, logits):
    y = labels_of(loss)
    check(["where", "boolean", "float32"], TypeError, lambda: loss(logits, y, where=X))
    check(["where", "boolean", "of type list"], TypeError, lambda: loss(logits, y, where=[True] * C))
    check(["where", "broadcast", "(4, 6)", "(4,)"], ValueError, lambda: loss(logits, y, where=MASK[:, 0]))
    check(
        ["where", "broadcast", "(4, 6)", "(2, 4, 6)"],
        ValueError,
        lambda: loss(logits, y, where=np.stack([MASK] * 2)),
    )
    check(["weights", "(4,)", "(6,)"], ValueError, lambda: loss(logits, y, weights=np.ones(C, np.float32)))
    check(["weights", "(4,)", "(4, 6)"], ValueError, lambda: loss(logits, y, weights=X))
    check(["weights", "(4,)", "(4, 1)"], ValueError, lambda: loss(logits, y, weights=ONES[:, None]))
    check(["weights", "floating", "int32"], TypeError, lambda: loss(logits, y, weights=Y))
    check(["weights", "floating", "2.0 of type float"], TypeError, lambda: loss(logits, y, weights=2.0))
    check(["ignore_index", "integer", "1.5"], TypeError, lambda: loss(logits, y, ignore_index=1.5))


CE, FOCAL, DUAL = losses.cross_entropy, losses.focal_loss, losses.dual_focal_loss
OPTIONS = [
    (CE, dict(label_smoothing=-0.1), ValueError, ["label_smoothing", ">= 0 and <= 1", "-0.1"]),
    (CE, dict(label_smoothing=1.5), ValueError, ["label_smoothing", ">= 0 and <= 1", "1.5"]),
    (CE, dict(label_smoothing=float("nan")), ValueError, ["label_smoothing", ">= 0 and <= 1", "nan"]),
    (CE, dict(label_smoothing="0.1"), TypeError, ["label_smoothing", "number", "'0.1'"]),
    (CE, dict(label_smoothing=True), TypeError, ["label_smoothing", "number", "True"]),
    (CE, dict(label_smoothing=ONES), TypeError, ["label_smoothing", "number", "(4,)"]),
    (CE, dict(label_smoothing=None), TypeError, ["label_smoothing", "number", "None"]),
    (CE, dict(smoothing="other"), ValueError, ["smoothing", "'uniform', 'others'", "'other'"]),
    (CE, dict(smoothing=None), ValueError, ["smoothing", "'uniform', 'others'", "None"]),
    (CE, dict(z_loss=-1e-4), ValueError, ["z_loss", ">= 0", "-0.0001"]),
    (CE, dict(z_loss="1e-4"), TypeError, ["z_loss", ">= 0", "'1e-4'"]),
    (CE, dict(class_weights=ONES), ValueError, ["class_weights", "(6,)", "(4,)"]),
    (CE, dict(class_weights=X), ValueError, ["class_weights", "(6,)", "(4, 6)"]),
    (CE, dict(class_weights=np.arange(C)), TypeError, ["class_weights", "floating", "int64"]),
    (CE, dict(class_weights=[1.0] * C), TypeError, ["class_weights", "floating", "of type list"]),
    (FOCAL, dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
    (FOCAL, dict(gamma=None), TypeError, ["gamma", ">= 0", "None"]),
    (FOCAL, dict(class_weights=ONES), ValueError, ["class_weights", "(6,)", "(4,)"]),
    (FOCAL, dict(class_weights=np.arange(C)), TypeError, ["class_weights", "floating", "int64"]),
    (DUAL, dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
    (losses.poly1_focal_loss, dict(gamma=-1.0), ValueError, ["gamma", ">= 0", "-1.0"]),
    (losses.poly1_focal_loss, dict(epsilon="x"), TypeError, ["epsilon", "number", "'x'"]),
    (losses.poly1_cross_entropy, dict(epsilon=(1.0, 2.0)), TypeError, ["epsilon", "number", "(1.0, 2.0)"]),
    (losses.poly_loss, dict(epsilon=(1.0, "b")), TypeError, ["epsilon[1]", "number", "'b'"]),
    (losses.poly_loss, dict(epsilon=None), TypeError, ["epsilon", "number", "None"]),
    (losses.poly_loss, dict(label_smoothing=2), ValueError, ["label_smoothing", ">= 0 and <= 1", "2"]),
    (losses.max_suppression_loss, dict(suppression=-0.1), ValueError, ["suppression", ">= 0", "-0.1"]),
    (losses.spherical_z_loss, dict(a=0.0), ValueError, ["a must be", "> 0", "0.0"]),
    (losses.spherical_z_loss, dict(b="b"), TypeError, ["b must be", "number", "'b'"]),
    (losses.spherical_z_loss, dict(eps=-1.0), ValueError, ["eps", ">= 0", "-1.0"]),
]


@logits_kinds
@pytest.mark.parametrize("i", range(len(OPTIONS)))
def test_options(i, logits):
    loss, options, kind, words = OPTIONS[i]
    check(words, kind, lambda: loss(logits, Y, **options))


@logits_kinds
def test_smoothing_to_others_needs_ids(logits):
    q = X / C
    check(
        ["smoothing='others'", "class ids", "distributions"],
        ValueError,
        lambda: CE(logits, q, smoothing="others", label_smoothing=0.1),
    )
    CE(logits, q, smoothing="others")  # nothing is smoothed


@logits_kinds
def test_reducers(logits):
    mean, total = losses.weighted_mean, losses.weighted_sum
    for reducer in (mean, total):
        check(
            ["weights", "(4,)", "(6,)"],
            ValueError,
            lambda r=reducer: r(CE, logits, Y, weights=np.ones(C, np.float32)),
        )
        check(["weights", "floating", "int32"], TypeError, lambda r=reducer: r(CE, logits, Y, weights=Y))
        check(["labels", "integer", "bool"], TypeError, lambda r=reducer: r(CE, logits, Y > 1))
        check(["chunk_size", ">= 1", "0"], ValueError, lambda r=reducer: r(CE, logits, Y, chunk_size=0))
        check(["chunk_size", "integer", "2.5"], TypeError, lambda r=reducer: r(CE, logits, Y, chunk_size=2.5))
        check(["axis", "[-2, 2)", "(4, 6)"], ValueError, lambda r=reducer: r(CE, logits, Y, axis=5))
        check(
            ["where", "broadcast", "(4, 6)", "(4,)"],
            ValueError,
            lambda r=reducer: r(CE, logits, Y, where=MASK[:, 0]),
        )
        check(["where", "boolean", "float32"], TypeError, lambda r=reducer: r(CE, logits, Y, where=X))
        check(["label_smoothing", "1.5"], ValueError, lambda r=reducer: r(CE, logits, Y, label_smoothing=1.5))
        check(["logits", "floating", "int32"], TypeError, lambda r=reducer: r(CE, Y[:, None], Y))
    # Labels with other leading axes than the rows'.
    for reducer in (mean, total):
        check(["(4,)", "(3,)"], ValueError, lambda r=reducer: r(CE, logits, Y[:3]))


def test_a_loss_that_is_not_by_row():
    check(
        ["loss", "(4,)", "()"],
        ValueError,
        lambda: losses.weighted_sum(lambda logits, y, axis=-1: jnp.sum(CE(logits, y)), LOGITS, Y),
    )
