"""Calibrates a classifier of handwritten digits, and says when not to trust it.

A small network is trained on images of the digits 0 to 7, a part of them labelled wrongly, until it is overconfident.
Half of the other images calibrate it, the other half tests it:

* temperature and matrix scaling: calibration errors, Brier score and likelihood before and after, and
  reliability diagrams (`reliability.png`);
* conformal prediction sets over random splits of these images: their coverage, beside what theory says;
* scores that tell the digits 8 and 9, which the network has never seen, from those it knows, and a selection of known
  ones with few false ones.

  python examples/calibrate_digits.py --out /tmp/calibration
"""

import argparse
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import jaxsoft
from jaxsoft import calibration, losses

matplotlib.use("Agg")
from matplotlib.figure import Figure

KNOWN, TRAIN, WIDTH = 8, 500, 128


def load(label_noise: float) -> tuple:
    """Images and labels to train on, a part of these labels wrong; known ones held out; images of 8 and 9."""
    random = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = random.permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    known = labels < KNOWN
    unknown, images, labels = images[~known], images[known], labels[known]
    wrong = random.random(TRAIN) < label_noise
    noisy = (labels[:TRAIN] + wrong * random.integers(1, KNOWN, TRAIN)) % KNOWN
    arrays = images[:TRAIN], noisy.astype(np.int32), images[TRAIN:], labels[TRAIN:], unknown
    return tuple(map(jnp.asarray, arrays))


def hidden(params: dict, x: jax.Array) -> jax.Array:
    """The input of the head."""
    return jax.nn.relu(x @ params["layer"] + params["bias"])


def logits_of(params: dict, x: jax.Array) -> jaxsoft.LinearLogits:
    """The logits as an expression: the functions of jaxsoft do not store them."""
    return jaxsoft.linear_logits(hidden(params, x), params["head"])


@functools.partial(jax.jit, static_argnums=(2,))
def train(images: jax.Array, labels: jax.Array, steps: int) -> dict:
    """The parameters after `steps` steps of Adam on all images."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "layer": jax.random.normal(keys[0], (images.shape[1], WIDTH)) / 8,
        "bias": jnp.zeros(WIDTH),
        "head": jax.random.normal(keys[1], (WIDTH, KNOWN)) / math.sqrt(WIDTH),
    }
    optimizer = optax.adam(3e-3)

    def loss(params):
        return losses.cross_entropy(logits_of(params, images), labels).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[0][0]


SCALINGS = ("none", "temperature", "matrix")
MEASURES = ("accuracy", "ECE", "adaptive", "classwise", "Brier", "NLL")


# --- scaling ------------------------------------------------------------------------------------------------


@jax.jit
def scaled_logits(held_out: jax.Array, labels: jax.Array, test: jax.Array) -> dict:
    """The test logits as they are, and scaled by fits to the logits held out."""
    temperature = calibration.fit_temperature(held_out, labels)
    matrix = calibration.fit_matrix_scaling(held_out, labels, l2=1e-2)
    return {
        "none": test,
        "temperature": jaxsoft.temperature(test, temperature),
        "matrix": calibration.apply_scaling(test, matrix),
    }


@jax.jit
def measures(logits: jax.Array, labels: jax.Array) -> dict:
    """Accuracy, calibration errors and proper scores."""
    confidence, correct = calibration.max_softmax_probability(logits), jaxsoft.top_k_accuracy(logits, labels)
    error = functools.partial(calibration.calibration_error, confidence, correct)
    return {
        "accuracy": correct.mean(),
        "ECE": error(),
        "adaptive": error(binning="equal_mass"),
        "classwise": calibration.classwise_calibration_error(jaxsoft.softmax(logits), labels),
        "Brier": losses.brier_loss(logits, labels).mean(),
        "NLL": losses.cross_entropy(logits, labels).mean(),
    }


@jax.jit
def diagram(logits: jax.Array, labels: jax.Array) -> calibration.Reliability:
    """Confidence and accuracy in ten bins."""
    confidence, correct = calibration.max_softmax_probability(logits), jaxsoft.top_k_accuracy(logits, labels)
    return calibration.reliability(confidence, correct, bins=10)


def draw(logits: dict, labels: jax.Array, path: pathlib.Path) -> None:
    """Reliability diagrams before and after."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("none", "temperature")):
        calibration.reliability_plot(diagram(logits[name], labels), ax=ax, title=f"scaling: {name}")
    figure.savefig(path)


# --- conformal prediction -----------------------------------------------------------------------------------

METHODS = {
    "LAC": {"method": "lac"},
    "APS": {"method": "aps"},
}


@functools.partial(jax.jit, static_argnames=("splits", "method"))
def coverage(logits, labels, alpha, *, splits: int, method: str) -> tuple[jax.Array, jax.Array]:
    """The coverage and the mean size of sets, for random splits into two halves."""
    n = logits.shape[0] // 2

    def of_split(key):
        order_key, key = jax.random.split(key)
        order = jax.random.permutation(order_key, logits.shape[0])
        x, y = logits[order], labels[order]
        options = METHODS[method] | {"share": jax.random.uniform(key, y.shape)}
        scores = calibration.nonconformity_score(x, y, **options)
        threshold = calibration.conformal_quantile(scores[:n], alpha)
        sets = calibration.prediction_set(x, threshold, **options)[n:]
        return jnp.take_along_axis(sets, y[n:, None], axis=1).mean(), sets.sum(1).mean()

    return jax.lax.map(of_split, jax.random.split(jax.random.key(1), splits))


def expected_coverage(n: int, m: int, alpha: float) -> tuple[float, float]:
    """Mean and deviation of the coverage of m examples by n others: beta-binomial, without equal scores."""
    k = math.ceil((n + 1) * (1 - alpha))
    mean = k / (n + 1)
    return mean, math.sqrt(mean * (1 - mean) * (n + 1 + m) / ((n + 2) * m))


# --- unknown inputs -----------------------------------------------------------------------------------------


@jax.jit
def known_scores(params: dict, images: jax.Array, labels: jax.Array, x: jax.Array) -> dict:
    """Scores that are higher for inputs that the network knows, from its training images and labels."""
    gaussians = calibration.fit_class_gaussians(hidden(params, images), labels, classes=KNOWN, ridge=1e-3)
    logits = logits_of(params, x)
    return {
        "maximum probability": calibration.max_softmax_probability(logits),
        "maximum logit": calibration.max_logit(logits),
        "energy": calibration.energy_score(logits),
        "minus entropy": -jaxsoft.entropy(logits),
        "margin": calibration.margin_score(logits),
        "ODIN": calibration.odin_score(lambda x: logits_of(params, x), x, temperature=10.0, eps=0.02),
        "Mahalanobis": calibration.mahalanobis_score(hidden(params, x), gaussians),
    }


@jax.jit
def found(calibration_scores: jax.Array, scores: jax.Array) -> jax.Array:
    """Which inputs are unknown, where a share of 0.2 may be false."""
    p = calibration.conformal_p_values(calibration_scores, scores)
    return calibration.benjamini_hochberg(p, 0.2)


def main() -> None:
    """Prints three tables and writes them, with a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label-noise", type=float, default=0.1, help="share of wrong labels (%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="steps of training (%(default)s)")
    parser.add_argument("--splits", type=int, default=100, help="splits for the coverage (%(default)s)")
    parser.add_argument("--alpha", type=float, default=0.1, help="rate of errors of the sets (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few steps of training")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("calibration"), help="(%(default)s)")
    args = parser.parse_args()
    if not 0 < args.alpha < 1 or not 0 <= args.label_noise < 1:
        parser.error("--alpha must lie in (0, 1), --label-noise in [0, 1)")
    args.out.mkdir(parents=True, exist_ok=True)

    images, labels, held_out, held_out_labels, unknown = load(args.label_noise)
    params = train(images, labels, 1000 if args.quick else args.steps)
    logits = logits_of(params, held_out).dense()
    n = len(held_out) // 2
    (first, test), (first_labels, test_labels) = ((a[:n], a[n:]) for a in (logits, held_out_labels))
    record: dict = {}

    scaled = scaled_logits(first, first_labels, test)
    record["scaling"] = {name: jax.device_get(measures(x, test_labels)) for name, x in scaled.items()}
    print(f"{'scaling':20}" + "".join(f"{measure:>11}" for measure in MEASURES))
    for name in SCALINGS:
        print(f"{name:20}" + "".join(f"{record['scaling'][name][m]:11.4f}" for m in MEASURES))
    draw(scaled, test_labels, args.out / "reliability.png")

    mean, deviation = expected_coverage(n, len(held_out) - n, args.alpha)
    error = deviation / math.sqrt(args.splits)
    print(f"\nsets, {args.splits} splits: the coverage should be {mean:.4f} +- {error:.4f}")
    record["coverage"] = {"expected": mean, "error": error}
    for name in METHODS:
        covered, size = coverage(logits, held_out_labels, args.alpha, splits=args.splits, method=name)
        record["coverage"][name] = float(covered.mean())
        print(f"{name:20} coverage {covered.mean():.4f}   size {size.mean():.3f}")

    both = known_scores(params, images, labels, jnp.concatenate([held_out, unknown]))
    is_known = np.repeat([1, 0], [len(held_out) - n, len(unknown)])
    record["unknown"] = {}
    print(f"\n{'score':20}{'AUROC':>9}{'found':>9}{'false':>9}")
    for name, scores in jax.device_get(both).items():
        is_found = np.asarray(found(scores[:n], scores[n:]))
        row = {
            "AUROC": roc_auc_score(is_known, scores[n:]),
            "found": is_found[is_known == 0].mean(),
            "false": is_found[is_known == 1].sum() / max(is_found.sum(), 1),
        }
        record["unknown"][name] = row
        print(f"{name:20}" + "".join(f"{value:9.4f}" for value in row.values()))
    print(
        "found: share of the unknown digits that are found, with a share of 0.2 false ones allowed; false: their share"
    )
    (args.out / "calibration.json").write_text(json.dumps(record, indent=1, default=float))


if __name__ == "__main__":
    main()
