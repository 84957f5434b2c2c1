"""What `accelerator.py` checks: kernels against XLA in float32, with scores stored, on fresh random data."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from device_run import Run, compile_all, first_line, kernels_in, works

import jaxsoft
from jaxsoft import losses
from jaxsoft.attention import dot_product_attention
from jaxsoft.rows import softmax_top_k

NORMALIZERS = {
    "softmax": jaxsoft.softmax,
    "softmax_one": jaxsoft.softmax_one,
    "sink_softmax": functools.partial(jaxsoft.sink_softmax, sink=0.3),
    "scalable_softmax": jaxsoft.scalable_softmax,
    "softpick": jaxsoft.softpick,
    "stablemax": jaxsoft.stablemax,
    "sigmoid_weights": jaxsoft.sigmoid_weights,
    "self_adjust_softmax": jaxsoft.self_adjust_softmax,
    "taylor_softmax": jaxsoft.taylor_softmax,
    "relu_weights": jaxsoft.relu_weights,
    "softplus_attention_weights": functools.partial(jaxsoft.softplus_attention_weights, scale=4.16),
    "clipped_softmax": jaxsoft.clipped_softmax,
    "adaptive_temperature_softmax": jaxsoft.adaptive_temperature_softmax,
    "reweighted_attention_weights": functools.partial(jaxsoft.reweighted_attention_weights, scale=4.16),
    "sparsemax": jaxsoft.sparsemax,
    "entmax15": jaxsoft.entmax15,
}
TIMED_NORMALIZERS = (
    "softpick",
    "scalable_softmax",
    "softmax_one",
    "sinks",
    "stablemax",
    "sigmoid_weights",
    "self_adjust_softmax",
)


class Check(NamedTuple):
    """A function `(implementation, *args) -> floating array` to be compared with itself in float32.

    Attributes:
      name: what it is.
      function: gets `implementation` first, which is `"reference"` for the comparison.
      args: arrays.
      wanted: which of them are differentiated.
      bounds: of `|a - b| / |b|`: of values, and of gradients.
    """

    name: str
    function: Callable
    args: tuple
    wanted: tuple[int, ...]
    bounds: tuple[float, float]


def upcast(tree: Any) -> Any:
    half = (jnp.bfloat16, jnp.float16)
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype in half else a, tree)


def vector_jacobian(f: Callable, wanted: tuple[int, ...]) -> Callable:
    """`(cotangent, *args) -> value, gradients`."""

    def run(cotangent, *args):
        def of_wanted(*chosen):
            given = list(args)
            for i, a in zip(wanted, chosen):
                given[i] = a
            return f(*given)

        value, pull = jax.vjp(of_wanted, *(args[i] for i in wanted))
        return value, pull(cotangent.astype(value.dtype))

    return run


def distance(a: Any, b: Any) -> float:
    """`|a - b| / |b|`, equal infinities apart; NaN is never near."""
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    difference = jnp.where(a == b, 0, a - b)
    size = jnp.sqrt(jnp.sum(jnp.where(jnp.isfinite(b), b, 0) ** 2))
    return float(jnp.sqrt(jnp.sum(difference**2)) / jnp.maximum(size, 1e-20))


def logits_of(implementation: str, hidden, weight, **options) -> Any:
    """`linear_logits`, or for the comparison the stored array."""
    if implementation == "reference":
        return jaxsoft.linear_logits(hidden, weight, implementation="xla", **options).dense()
    return jaxsoft.linear_logits(hidden, weight, implementation=implementation, **options)


def named(implementation: str) -> str:
    return "xla" if implementation == "reference" else implementation


def row_checks(run: Run) -> Iterator[Check]:
    """Stored scores."""
    shapes = (
        [(3, 7), (24, 300)]
        if run.smoke
        else [(5, 1), (3, 7), (130, 1000), (257, 4099), (64, 32768), (4, 262147)]
    )

    def lse(implementation, x):
        return jaxsoft.logsumexp(x, implementation=named(implementation))

    for i, shape in enumerate(shapes):
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float16)[: 1 + (i % 2) + (i == 3)]:
            name = f"logsumexp {shape[0]} x {shape[1]} {jnp.dtype(dtype).name}"
            yield Check(name, lse, (run.normal(*shape, dtype=dtype, scale=3),), (0,), (1e-4, 1e-2))
    n, columns = (24, 300) if run.smoke else (130, 5003)
    x, labels = run.normal(n, columns, scale=3), run.integers(n, high=columns)
    labels = labels.at[0].set(-100)
    where = run.booleans(n, columns).at[1].set(False)
    hidden_by_nan = jnp.where(where, x, jnp.nan)
    holes = jnp.where(where, x, -jnp.inf)
    functions = {
        "softmax": lambda i, x: jaxsoft.softmax(x, implementation=named(i)),
        "softmax + top-k": lambda i, x: softmax_top_k(x, 5, implementation=named(i)).values,
        "top-k": lambda i, x: jaxsoft.top_k(x, 5, implementation=named(i)).values,
        "entropy": lambda i, x: jaxsoft.entropy(x, implementation=named(i)),
        "log-probability": lambda i, x: jaxsoft.log_prob(x, jnp.maximum(labels, 0), implementation=named(i)),
        "logsumexp, exponents": lambda i, x: jaxsoft.logsumexp(x, method="exponent", implementation=named(i)),
    }
    for name, f in functions.items():
        yield Check(f"{name} {n} x {columns} bfloat16", f, (x,), (0,), (1e-2, 2e-2))

    def masked(implementation, x, where):
        return jaxsoft.logsumexp(x, where=where, implementation=named(implementation))

    yield Check("logsumexp, NaN under a mask", masked, (hidden_by_nan, where), (0,), (1e-4, 1e-2))
    columns_masked = (hidden_by_nan.at[:, :9].set(jnp.nan), where & (jnp.arange(columns) > 8))
    yield Check("logsumexp, columns masked too", masked, columns_masked, (0,), (1e-4, 1e-2))
    yield Check("logsumexp, absent entries", lse, (holes,), (0,), (1e-4, 1e-2))
    yield Check("logsumexp, +-1e4", lse, (x.astype(jnp.float32) * 3000,), (0,), (1e-4, 1e-4))


def head_checks(run: Run) -> Iterator[Check]:
    """Linear heads."""

    def cross_entropy(implementation, hidden, weight, labels):
        return losses.cross_entropy(logits_of(implementation, hidden, weight), labels)

    bounds = (1e-4, 1e-2)
    shapes = (
        [(24, 16, 300)]
        if run.smoke
        else [(5, 64, 130), (130, 96, 1000), (257, 512, 4099), (1030, 2304, 32003)]
    )
    for n, d, v in shapes:
        for dtype in (jnp.bfloat16,) if n != 130 else (jnp.bfloat16, jnp.float16):
            args = (run.normal(n, d, dtype=dtype), run.normal(d, v, dtype=dtype, scale=d**-0.5))
            labels = run.integers(n, high=v).at[0].set(-100)
            name = f"cross-entropy {n} x {d} x {v} {jnp.dtype(dtype).name}"
            yield Check(name, cross_entropy, (*args, labels), (0, 1), bounds)
    n, d, v = (24, 16, 300) if run.smoke else (200, 256, 3001)
    hidden, weight = run.normal(n, d), run.normal(d, v, scale=d**-0.5)
    labels = run.integers(n, high=v).at[1].set(-100)
    bias, temperature = run.normal(v, dtype=jnp.float32), run.uniform(n)
    of_loss = {
        "smoothing, z-loss": functools.partial(losses.cross_entropy, label_smoothing=0.1, z_loss=1e-3),
        "focal": losses.focal_loss,
        "MaxSup": losses.max_suppression_loss,
        "Poly-1": losses.poly1_cross_entropy,
    }
    for name, loss in of_loss.items():

        def with_loss(implementation, hidden, weight, loss=loss):
            return loss(logits_of(implementation, hidden, weight), labels)

        yield Check(f"{name} {n} x {d} x {v}", with_loss, (hidden, weight), (0, 1), bounds)

    def options(implementation, hidden, weight, bias, temperature):
        logits = logits_of(implementation, hidden, weight, bias=bias, softcap=3.0, temperature=temperature)
        return losses.cross_entropy(logits, labels)

    everything = (hidden, weight, bias, temperature)
    yield Check("bias, softcap, temperatures", options, everything, (0, 1, 2, 3), bounds)

    def transposed(implementation, hidden, table):
        return losses.cross_entropy(logits_of(implementation, hidden, table, transpose_weight=True), labels)

    yield Check("an embedding table as head", transposed, (hidden, weight.T), (0, 1), bounds)
    where = jnp.arange(v) % 5 != 0

    def columns_masked(implementation, hidden, weight):
        present = jnp.where(labels >= 0, labels // 5 * 5 + 1, labels)
        if implementation == "reference":
            weight = jnp.where(where, weight, 0)
        return losses.cross_entropy(logits_of(implementation, hidden, weight), present, where=where)

    with_nan = jnp.where(where, weight, jnp.nan)
    yield Check("columns of NaN, masked", columns_masked, (hidden, with_nan), (0, 1), bounds)

    def best(implementation, hidden, weight):
        return jaxsoft.top_k(logits_of(implementation, hidden, weight), 8).values

    yield Check("top-k of a head", best, (hidden, weight), (), bounds)

    def entropy(implementation, hidden, weight):
        return jaxsoft.entropy(logits_of(implementation, hidden, weight))

    yield Check("entropy of a head", entropy, (hidden, weight), (0, 1), (1e-3, 2e-2))

    def summed(implementation, hidden, weight, weights):
        logits = logits_of(implementation, hidden, weight)
        if implementation == "reference":
            return jnp.sum(weights * losses.cross_entropy(logits, labels))
        return losses.weighted_sum(losses.cross_entropy, logits, labels, weights=weights)

    yield Check("weighted_sum", summed, (hidden, weight, temperature), (0, 1, 2), (1e-3, 1e-2))


def attention_checks(run: Run) -> Iterator[Check]:
    """Attention: every normalizer, then every mask."""
    bounds = (1e-2, 2e-2)

    def check(name, shape, dtype=jnp.bfloat16, extra=(), **options):
        b, t, s, n, k, h = shape
        q, key = run.normal(b, t, n, h, dtype=dtype), run.normal(b, s, k, h, dtype=dtype)
        value = run.normal(b, s, k, h, dtype=dtype)

        def attend(implementation, q, key, value, *floats):
            given = dict(zip([name for name, _ in extra], floats))
            return dot_product_attention(
                q, key, value, implementation=named(implementation), **options, **given
            )

        args = (q, key, value, *(a for _, a in extra))
        return Check(f"attention, {name}", attend, args, tuple(range(len(args))), bounds)

    small = (1, 40, 40, 2, 1, 16) if run.smoke else (1, 200, 200, 2, 1, 64)
    for name, normalizer in list(NORMALIZERS.items())[: 5 if run.smoke else None]:
        yield check(f"{name}, causal", small, normalizer=normalizer, is_causal=True)
    if run.smoke:
        shapes = {"ragged": (1, 19, 33, 1, 1, 16)}
    else:
        shapes = {
            "one query": (2, 1, 130, 4, 2, 64),
            "ragged": (2, 70, 130, 4, 2, 64),
            "127 of 128": (1, 127, 257, 2, 2, 128),
            "grouped": (2, 128, 512, 8, 2, 64),
            "heads of 96": (1, 130, 130, 2, 2, 96),
            "long": (1, 2048, 2048, 2, 1, 128),
        }
    for name, shape in shapes.items():
        yield check(name, shape)
    b, t, s, n, _, _ = shape = (2, 20, 36, 2, 1, 16) if run.smoke else (2, 130, 200, 4, 2, 64)
    mask = run.booleans(b, n, t, s).at[0, :, 0].set(False)
    lengths = jnp.asarray([s // 3, s])
    segments = [jnp.sort(run.integers(b, size, high=3), axis=-1) for size in (t, s)]
    yield check("mask", shape, mask=mask)
    yield check("window", shape, local_window_size=(7, 2))
    if run.smoke:
        return
    yield check("mask of heads", shape, mask=mask[:, :1, :1])
    yield check("lengths", shape, key_value_seq_lengths=lengths, query_seq_lengths=jnp.asarray([t, t // 2]))
    yield check("segments", shape, query_segment_ids=segments[0], key_segment_ids=segments[1])
    yield check("softcap", shape, softcap=5.0, is_causal=True)
    yield check("offset", shape, query_offset=jnp.asarray([3, 70]), is_causal=True)
    yield check("mask_fn", shape, mask_fn=lambda q, key: (q // 16) >= (key // 16))
    yield check("bias", shape, extra=[("bias", run.normal(b, n, t, s, dtype=jnp.float32))])
    yield check("bias of heads", shape, extra=[("bias", run.normal(1, n, 1, s, dtype=jnp.float32))])
    yield check("slopes", shape, extra=[("alibi_slopes", jnp.asarray([0.5, 0.1, 0.02, 0.0]))], is_causal=True)
    yield check("sinks", shape, extra=[("sinks", run.normal(n, dtype=jnp.float32))], is_causal=True)
    yield check("scales", shape, extra=[("scale", jnp.asarray([0.1, 0.2, 0.3, 0.4]))])
    yield check("float16", shape, dtype=jnp.float16, is_causal=True)


CHECKS = {"rows": row_checks, "head": head_checks, "attention": attention_checks}
SIDE_BY_SIDE = 8  # compiled at the same time


def run_checks(run: Run, group: str, first: int = 0) -> None:
    """Compares everything of a group from the given one on, and writes down what fails."""
    checks = list(enumerate(CHECKS[group](run)))[first:]
    if run.smoke:
        checks = checks[:: max(1, len(checks) // 2)]
    for at in range(0, len(checks), SIDE_BY_SIDE):
        some = checks[at : at + SIDE_BY_SIDE]
        if run.left() < 0:
            run.dropped += [f"check: {c.name}" for _, c in some]
        else:
            check_some(run, some)
    bad = [c for c in run.checks if c["status"] != "passed"]
    run.say(f"checks of {group} done; up to now {len(run.checks)}, {len(bad)} of them not passed")


def check_some(run: Run, checks: list[tuple[int, Check]]) -> None:
    """Compiled side by side."""
    theirs, mine, cotangents = {}, {}, {}
    for i, c in checks:
        reference, args = functools.partial(c.function, "reference"), upcast(c.args)
        shape = jax.eval_shape(reference, *args).shape
        cotangents[i] = run.normal(*shape, dtype=jnp.float32)
        theirs[i] = vector_jacobian(reference, c.wanted), (cotangents[i], *args)
        ours = functools.partial(c.function, run.implementation)
        mine[i] = vector_jacobian(ours, c.wanted), (cotangents[i], *c.args)
    with jax.default_matmul_precision("highest"):
        references = compile_all(theirs, run.save)
    compiled = compile_all(mine, run.save)
    for i, c in checks:
        run.begin(c.name, i)
        row: dict[str, Any] = {
            "name": c.name,
            "status": "failed",
            "reason": "",
            "kernels": None,
            "errors": [],
        }
        try:
            right, right_gradients = called(references[i], theirs[i][1])
            value, gradients = called(compiled[i], mine[i][1])
            bounds = [c.bounds[0]] + [c.bounds[1]] * len(c.wanted)
            row["errors"] = list(map(distance, (value, *gradients), (right, *right_gradients)))
            row["kernels"] = kernels_in(compiled[i])
            if all(e <= bound for e, bound in zip(row["errors"], bounds)):
                row["status"] = "passed"
            else:
                row["reason"] = "beyond " + ", ".join(f"{b:g}" for b in bounds)
        except Exception as error:
            refused = isinstance(error, ValueError) and "cannot run" in str(error)
            row |= {"status": "refused" if refused else "failed", "reason": first_line(error)}
        run.checks.append(row)
        if row["reason"] and not works():
            run.save()
            sys.exit(17)  # the next process goes on behind it
        run.finish()


def called(function: Any, args: tuple) -> Any:
    """The result; what failed to compile raises here."""
    if isinstance(function, Exception):
        raise function
    return function(*args)
