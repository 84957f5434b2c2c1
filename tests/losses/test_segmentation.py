"""Overlap losses against the formulas written out in numpy, their identities, masks and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import float64
from helpers import close, fails, sigmoid, softmax
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxsoft
from jaxsoft.losses import dice_semimetric_loss, jaccard_metric_loss, tversky_loss

X, T = np.array([[0.8], [0.3], [0.6]]), np.array([[0.9], [0.1], [0.5]])
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 4, 5, 6)) * 2  # images, height, width, classes
IDS = RNG.integers(0, 4, (3, 4, 5)).astype(np.int32)  # the classes 4 and 5 are absent
IDS[1] = np.minimum(IDS[1], 2)
SOFT = RNG.dirichlet(np.full(6, 0.3), (3, 4, 5))
KEEP = RNG.random((3, 4, 5)) < 0.7
WEIGHTS = RNG.random((3, 4, 5))
CLASS_WEIGHTS = 0.5 + RNG.random(6)


def oracle(
    logits, labels, alpha, beta, *, kind=1, s=1e-3, norm=1, log=False, gamma=1, classes=None, weights=None,
    aggregation="batch", class_weights=None, activation="softmax",
):  # fmt: skip
    """The loss by loops over images and classes."""
    x = (softmax if activation == "softmax" else sigmoid)(logits)
    soft = labels.dtype.kind == "f"
    t = labels if soft else np.eye(x.shape[-1])[labels]
    classes = classes or ("all" if soft else "present")
    w = np.ones(x.shape[:-1]) if weights is None else weights

    def one(x, t, w):
        tp, x_size, t_size, distance = ((w * a).sum() for a in (x * t, x**norm, t**norm, abs(x - t) ** norm))
        if kind == 1:
            tp = (x_size + t_size - distance) / 2
            fp, fn = x_size - tp, t_size - tp
        else:
            fp, fn = ((w * np.maximum(a, 0) ** norm).sum() for a in (x - t, t - x))
        score = (tp + s) / (tp + alpha * fp + beta * fn + s)
        return (-np.log(score) if log else 1 - score) ** gamma

    parts = [(x, t, w)] if aggregation == "batch" else zip(x, t, w)
    matrix = np.array(
        [
            [
                one(x[..., c], t[..., c], w)
                if classes == "all" or ((t[..., c] > 0.01) & (w > 0)).any()
                else np.nan
                for c in range(x.shape[-1])
            ]
            for x, t, w in parts
        ]
    )
    if class_weights is not None:
        matrix = matrix * class_weights
    if aggregation == "class":
        return np.nanmean([np.nanmean(column) for column in matrix.T if not np.isnan(column).all()])
    means = np.nanmean(matrix, axis=1)
    return means[0] if aggregation == "batch" else means


def test_worked_numbers(x64):
    plain = dict(activation=None)
    close(jaccard_metric_loss(X, T, **plain), 0.222099)
    plain["smoothing"] = 0.0
    close(jaccard_metric_loss(X, T, **plain), 0.222222)
    close(jaccard_metric_loss(X, T, kind=2, **plain), 0.275862)
    close(dice_semimetric_loss(X, T, **plain), 0.125)
    close(dice_semimetric_loss(X, T, kind=2, **plain), 0.16)
    close(dice_semimetric_loss(X, T, log=True, gamma=2.0, **plain), np.log(1 - 0.125) ** 2, 1e-12)
    # The usual soft losses, which are not 0 at x = t.
    close(1 - (X * T).sum() / (X + T - X * T).sum(), 0.511628)
    close(1 - 2 * (X * T).sum() / (X + T).sum(), 0.34375)
    for kind in (1, 2):
        at_labels = jax.jit(jax.value_and_grad(lambda x, k=kind: tversky_loss(x, T, kind=k, **plain)))
        value, gradient = at_labels(jnp.asarray(T))
        assert value == 0 and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("labels", [IDS, SOFT], ids=["ids", "soft"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(kind=2, aggregation="image"),
        dict(aggregation="class", norm=2),
        dict(classes="all", log=True, gamma=1.5, norm=2, kind=2),
        dict(classes="present", aggregation="image", activation="sigmoid", class_weights=CLASS_WEIGHTS),
        dict(weights=WEIGHTS * KEEP, aggregation="class", smoothing=0.5),
    ],
    ids=str,
)
def test_formula(labels, options, x64):
    expected = {("s" if k == "smoothing" else k): v for k, v in options.items()}
    for alpha, beta in ((0.3, 0.7), (1, 1)):
        loss = functools.partial(tversky_loss, alpha=alpha, beta=beta, **options)
        close(jax.jit(loss)(IMAGES, labels), oracle(IMAGES, labels, alpha, beta, **expected), 1e-12)


def test_hard_labels_give_the_usual_soft_losses(x64):
    t = np.eye(6)[IDS]
    x = np.asarray(jaxsoft.softmax(jnp.asarray(IMAGES)))
    both, x_sum, t_sum = (a.sum((0, 1, 2))[:4] for a in (x * t, x, t))
    for kind in (1, 2):
        options = dict(smoothing=0.0, kind=kind)
        usual = (
            (jaccard_metric_loss, both / (x_sum + t_sum - both)),
            (dice_semimetric_loss, 2 * both / (x_sum + t_sum)),
            (tversky_loss, both / (both + 0.3 * (x_sum - both) + 0.7 * (t_sum - both))),
        )
        for loss, score in usual:
            close(jax.jit(functools.partial(loss, **options))(IMAGES, IDS), np.mean(1 - score), 1e-12)
    soft = jax.jit(functools.partial(jaccard_metric_loss, classes="present"))(IMAGES, t)
    close(jax.jit(jaccard_metric_loss)(IMAGES, IDS), soft, 1e-12)


def test_hard_labels_give_the_loss_of_optax(x64):
    t = jnp.asarray(np.eye(6)[IDS])
    theirs = functools.partial(optax.losses.dice_loss, smooth=1.0)
    ours = functools.partial(tversky_loss, aggregation="image", classes="all", smoothing=1.0)
    for alpha, beta in ((0.5, 0.5), (0.2, 0.9)):
        both = [
            jax.jit(lambda x, f=f, a=alpha, b=beta: jax.vjp(lambda x: f(x, t, alpha=a, beta=b), x))(IMAGES)
            for f in (theirs, ours)
        ]
        (expected, pull_theirs), (values, pull_ours) = both
        close(values, expected, 1e-12)
        cotangent = jnp.asarray([0.3, -1.2, 2.0])
        close(pull_ours(cotangent)[0], pull_theirs(cotangent)[0], 1e-12)


@pytest.mark.parametrize("labels", [IDS, SOFT], ids=["ids", "soft"])
def test_gradients_jit_vmap_axes_and_dtypes(labels, x64):
    options = dict(aggregation="image", gamma=1.5, weights=jnp.asarray(WEIGHTS))
    cotangent = jnp.asarray([0.3, -1.2, 2.0])
    f = jax.jit(lambda x: jnp.vdot(cotangent, tversky_loss(x, labels, kind=2, **options)))
    check_grads(f, (jnp.asarray(IMAGES),), 2, rtol=1e-5)
    by_image = functools.partial(jaccard_metric_loss, aggregation="image")
    values = by_image(IMAGES, labels)
    close(jax.jit(by_image)(IMAGES, labels), values, 1e-12)
    moved = labels if labels is IDS else np.moveaxis(labels, -1, 1)
    close(jax.jit(functools.partial(by_image, axis=1))(np.moveaxis(IMAGES, -1, 1), moved), values, 1e-12)
    close(jax.jit(jax.vmap(jaccard_metric_loss))(IMAGES, labels), values, 1e-12)
    flat = labels.reshape(3, 20, *labels.shape[3:])
    close(jax.jit(by_image)(IMAGES.reshape(3, 20, 6), flat), values, 1e-12)
    low = jnp.asarray(IMAGES, jnp.bfloat16)
    value, gradient = jax.jit(jax.value_and_grad(jaccard_metric_loss))(low, labels)
    close(value, jax.jit(jaccard_metric_loss)(low.astype(jnp.float64), labels), 1e-6)
    assert gradient.dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(gradient))
    assert value.dtype == jnp.float32


def test_huge_logits_and_a_perfect_segmentation():
    logits = jnp.where(jax.nn.one_hot(IDS, 6) > 0, 1e4, -1e4)
    for kind in (1, 2):
        run = jax.jit(jax.value_and_grad(functools.partial(jaccard_metric_loss, kind=kind)))
        value, gradient = run(logits, IDS)
        assert value == 0 and jnp.all(gradient == 0)
    bare = functools.partial(dice_semimetric_loss, smoothing=0.0, classes="all")
    value, gradient = jax.jit(jax.value_and_grad(bare))(-logits, IDS)
    assert 0 <= value <= 1 and jnp.all(jnp.isfinite(gradient))
    # Without smoothing, a class that is nowhere costs nothing, and -log of the score 0 is infinite.
    ids = jnp.zeros((4,), jnp.int32)
    sure = jnp.array([[1.0, 0.0]] * 4)
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(bare, activation=None)))(sure, ids)
    assert value == 0 and jnp.all(jnp.isfinite(gradient))
    wrong = dice_semimetric_loss(1 - sure, ids, activation=None, smoothing=0.0, log=True)
    assert wrong == jnp.inf


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
def test_absent_pixels_and_classes(activation, x64):
    run = jax.jit(
        lambda x, y, **options: jax.value_and_grad(
            lambda x: tversky_loss(x, y, activation=activation, gamma=1.5, **options)
        )(x)
    )
    keep = KEEP.reshape(-1)
    x, ids, soft = IMAGES.reshape(-1, 6), IDS.reshape(-1), SOFT.reshape(-1, 6)
    if activation is None:
        x = soft[::-1]
    spoiled = np.where(keep[:, None], x, np.nan)
    expected, gradient = run(x[keep], ids[keep])
    cases = [
        (np.where(keep, ids, -100), {}),
        (ids, dict(where=keep[:, None])),
        (ids, dict(weights=keep.astype(float))),
    ]
    for labels, options in cases:
        value, g = run(spoiled, labels, **options)
        close(value, expected, 1e-12)
        close(np.asarray(g)[keep], gradient, 1e-12)
        assert not np.any(np.asarray(g)[~keep])
    # Soft labels, with NaN among them; and classes that are absent everywhere.
    expected, gradient = run(x[keep][:, :4], soft[keep][:, :4])
    where = keep[:, None] & (np.arange(6) < 4)
    value, g = run(np.where(where, x, np.nan), np.where(where, soft, np.nan), where=where)
    close(value, expected, 1e-12)
    close(np.asarray(g)[keep][:, :4], gradient, 1e-12)
    assert not np.any(np.asarray(g)[~where])
    value, g = run(np.full_like(x, np.nan), ids, where=np.zeros((60, 1), bool))
    assert value == 0 and not np.any(g)
    value, g = run(np.full_like(x, np.nan), np.full_like(ids, -100))
    assert value == 0 and not np.any(g)


def test_an_image_without_pixels_and_labels_out_of_range():
    logits = jnp.asarray(IMAGES, jnp.float32)
    labels = jnp.asarray(IDS).at[0].set(-100)
    by_image = jax.jit(functools.partial(jaccard_metric_loss, aggregation="image"))
    values = by_image(logits, labels)
    assert values[0] == 0 and jnp.all(values[1:] > 0)
    bad = labels.at[1, 0, 0].set(6)

    values = by_image(logits, bad)
    np.testing.assert_array_equal(jnp.isnan(values), [False, True, False])
    assert jnp.isnan(jax.jit(jaccard_metric_loss)(logits, bad))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(by_image(x, bad))))(logits)
    assert jnp.any(jnp.isnan(gradient[1])) and not jnp.any(jnp.isnan(gradient[0]))


def test_a_batch_over_two_devices(x64):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    logits, ids = jnp.asarray(IMAGES[:2]), jnp.asarray(IDS[:2])
    for aggregation in ("batch", "class"):
        loss = functools.partial(tversky_loss, aggregation=aggregation)
        sharded = jax.shard_map(
            functools.partial(loss, axis_name="data"),
            mesh=mesh,
            in_specs=(P("data"), P("data")),
            out_specs=P(),
        )
        with jax.set_mesh(mesh):
            put = [jax.device_put(a, jax.sharding.NamedSharding(mesh, P("data"))) for a in (logits, ids)]
            value, gradient = jax.device_get(jax.jit(jax.value_and_grad(sharded))(*put))
        expected, g = jax.jit(jax.value_and_grad(loss))(logits, ids)
        close(value, expected, 1e-12)
        close(gradient, g, 1e-12)


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (dict(alpha=-1.0), ValueError, ["alpha", ">= 0", "-1.0"]),
        (dict(beta="x"), TypeError, ["beta", ">= 0", "'x'"]),
        (dict(smoothing=-1e-3), ValueError, ["smoothing", ">= 0", "-0.001"]),
        (dict(gamma=0.5), ValueError, ["gamma", ">= 1", "0.5"]),
        (dict(kind=3), ValueError, ["kind", "1, 2", "3"]),
        (dict(activation="relu"), ValueError, ["activation", "'softmax', 'sigmoid', None", "'relu'"]),
        (dict(aggregation="mean"), ValueError, ["aggregation", "'batch', 'image', 'class'", "'mean'"]),
        (dict(classes="some"), ValueError, ["classes", "'present', 'all', None", "'some'"]),
        (dict(norm=1.5), TypeError, ["norm", "integer", "1.5"]),
        (dict(norm=0), ValueError, ["norm", ">= 1", "0"]),
        (dict(log="yes"), TypeError, ["log", "True or False", "'yes'"]),
        (dict(class_weights=np.ones(4, np.float32)), ValueError, ["class_weights", "(6,)", "(4,)"]),
        (dict(weights=np.ones(6, np.float32)), ValueError, ["weights", "(3, 4, 5)", "(6,)"]),
        (dict(where=np.ones((3, 4, 5), bool)), ValueError, ["where", "(3, 4, 5, 6)", "(3, 4, 5)"]),
        (dict(ignore_index=1.5), TypeError, ["ignore_index", "integer", "1.5"]),
        (dict(labels=IDS[:1]), ValueError, ["labels", "(3, 4, 5)", "(1, 4, 5)"]),
        (dict(labels=IDS > 0), TypeError, ["labels", "integer", "bool"]),
        (dict(logits=IMAGES.astype(int)), TypeError, ["logits", "floating", "int64"]),
        (dict(axis=4), ValueError, ["axis", "[-4, 4)", "4"]),
    ],
)  # fmt: skip
def test_bad_input(call, kind, words):
    given = dict(logits=np.asarray(IMAGES, np.float32), labels=IDS) | call
    fails(words, kind, lambda: tversky_loss(given.pop("logits"), given.pop("labels"), **given))


def test_expressions_and_single_rows_are_refused():
    logits = jaxsoft.linear_logits(np.ones((4, 3), np.float32), np.ones((3, 6), np.float32))
    with pytest.raises(TypeError, match=r"logits\.dense\(\)"):
        jaccard_metric_loss(logits, np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="images"):
        jaccard_metric_loss(np.ones(6, np.float32), np.int32(0), aggregation="image")


def test_the_loss_of_a_batch_is_float32_or_wider():
    half = jnp.asarray(IMAGES, jnp.float16)
    assert jax.eval_shape(jaccard_metric_loss, half, IDS).dtype == jnp.float32
    with float64():
        assert jax.eval_shape(jaccard_metric_loss, jnp.asarray(IMAGES), IDS).dtype == jnp.float64
