"""What a sharded output layer moves and stores, predicted on paper for any number of devices.

    python -m jaxsoft.scaling --devices 4096 --model 8 --tokens 4194304 --features 8192 --vocab 131072

prints, for the value and gradients of a cross-entropy, the bytes that one device receives, its matrix operations and
its temporary memory, by placement. `--check` compiles the same step on eight virtual devices at small sizes, and
compares what the programs do with the formulas.
"""

from __future__ import annotations

import argparse
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft import losses
from jaxsoft._program import costs_of, received_per_byte

PLACEMENTS = ("vocabulary", "vocabulary and fsdp", "fsdp", "replicated")
LOSSES = ("cross_entropy", "weighted_mean")
# Numbers per row in the state of a cross-entropy: maximum, sum, the label's logit, and whether it was found.
_STATE = 4


class Step(NamedTuple):
    """The sizes of a training step's output layer.

    Attributes:
      tokens: rows, on all devices together.
      features: the width of hidden.
      vocab: columns.
      data: devices over which the rows are sharded.
      model: devices over which the columns are sharded; in `"fsdp"`, further devices for the rows.
      itemsize: bytes per number of hidden and weight.
    """

    tokens: int
    features: int
    vocab: int
    data: int
    model: int
    itemsize: int = 4


class Prediction(NamedTuple):
    """What one device does in a step.

    Attributes:
      moved: the bytes of the results of its collectives, by what they are for.
      received: the bytes that it receives in them, on a ring of the devices that take part in each.
      flops: operations of its matrix products.
      temporary: bytes of temporary memory.
    """

    moved: dict[str, float]
    received: float
    flops: float
    temporary: float

    @property
    def bytes_moved(self) -> float:
        """The bytes of all collectives."""
        return sum(self.moved.values())


def predict(
    step: Step, placement: str, loss: str = "cross_entropy", block: int = 512, chunk: int = 512
) -> Prediction:
    """What one device moves, computes and stores for the value and gradients of a loss, to first order.

    Args:
      step: the sizes.
      placement: one of `PLACEMENTS`: columns over `model` and rows over `data`; the same with the weight's features
        over `data`; features over `data` and rows over both; the weight on every device and rows over `data`.
      loss: `"cross_entropy"`, per row, or `"weighted_mean"`, with the gradient in the forward pass.
      block: columns per block of a per-row loss.
      chunk: rows per chunk of `weighted_mean`.

    Returns:
      A `Prediction`.

    Raises:
      ValueError: an unknown placement or loss, or a size below 1.

    Example:
      >>> from jaxsoft.scaling import Step, predict
      >>> step = Step(tokens=1024, features=256, vocab=16384, data=2, model=4)
      >>> print(round(predict(step, "vocabulary").bytes_moved / 1e6, 2), "MB")
      4.75 MB
    """
    for name, value, known in (("placement", placement, PLACEMENTS), ("loss", loss, LOSSES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if min(step) < 1 or min(block, chunk) < 1:
        raise ValueError(f"all sizes must be at least 1, got {step}, block={block}, chunk={chunk}")
    n, d, b = step.tokens / step.data, step.features, step.itemsize
    v = step.vocab / step.model if placement.startswith("vocabulary") else step.vocab
    if placement == "fsdp":
        n /= step.model
    # What each collective is for, its kind, how many devices take part, and the bytes of its result.
    data, model, weight = step.data, step.model, d * v * b
    reads = 2 if loss == "cross_entropy" else 1
    collectives: list[tuple[str, str, int, float]] = []
    if placement.startswith("vocabulary"):
        of_hidden = "gradient of hidden, summed over the columns' devices"
        collectives.append((of_hidden, "all-reduce", model, n * d * b))
        collectives.append(("statistics of rows", "all-reduce", model, model * n * _STATE * 4))
    if placement in ("fsdp", "vocabulary and fsdp"):
        collectives.append(("weight, gathered", "all-gather", data, reads * weight))
        collectives.append(("gradient of weight, scattered", "reduce-scatter", data, weight / data))
        if placement == "fsdp":
            of_weight = "gradient of weight, summed over other rows' devices"
            collectives.append((of_weight, "all-reduce", model, weight / data))
    else:
        of_weight = "gradient of weight, summed over the rows' devices"
        collectives.append((of_weight, "all-reduce", data, weight))
    moved = {cause: size for cause, _, group, size in collectives if group > 1}
    received = sum(received_per_byte(kind, group) * size for _, kind, group, size in collectives)
    products = 4 if loss == "cross_entropy" else 3
    if loss == "cross_entropy":
        whole = 0 if placement in ("fsdp", "vocabulary and fsdp") or step.data == 1 else d * v * b
        temporary = whole + (1.5 if whole else 2.5) * n * min(block, v) * 4 + n * d * 4
    else:
        rows = min(chunk, n)
        gathered = d * v * b if placement in ("fsdp", "vocabulary and fsdp") and step.data > 1 else 0
        temporary = rows * v * 4 + d * v * 4 + gathered + 1.5 * rows * min(1024, v) * 4
    return Prediction(moved, received, products * 2 * n * d * v, temporary)


def measure(step: Step, placement: str, loss: str) -> Any:
    """The costs of the compiled step on virtual devices (`jaxsoft._program.Costs`)."""
    mesh = jax.make_mesh((step.data, step.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    hidden = P(("data", "model")) if placement == "fsdp" else P("data")
    weight = {
        "vocabulary": P(None, "model"),
        "vocabulary and fsdp": P("data", "model"),
        "fsdp": P("data"),
        "replicated": P(),
    }[placement]

    def run(h, w, labels):
        logits = jaxsoft.linear_logits(h, w, hidden_sharding=hidden, weight_sharding=weight)
        if loss == "weighted_mean":
            return losses.weighted_mean(losses.cross_entropy, logits, labels)
        return losses.cross_entropy(logits, labels).mean()

    def of(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    h, w = of((step.tokens, step.features), hidden), of((step.features, step.vocab), weight)
    labels = of((step.tokens,), P(hidden[0]), jnp.int32)
    results = NamedSharding(mesh, P()), (h.sharding, w.sharding)
    program = jax.jit(jax.value_and_grad(run, (0, 1)), out_shardings=results)
    return costs_of(program.lower(h, w, labels).compile())


def _size(x: float) -> str:
    power = min(int(math.log(max(x, 1), 1000)), 5)
    return f"{x / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the predictions; with `--check`, compares them with compiled programs, and returns 1 if one is far off."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxsoft.scaling", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--devices", type=int, default=8, help="all devices (default 8)")
    parser.add_argument("--model", type=int, default=4, help="devices that share the vocabulary (default 4)")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="rows on all devices together (default 1024)"
    )
    parser.add_argument("--features", type=int, default=256, help="width of hidden (default 256)")
    parser.add_argument("--vocab", type=int, default=16384, help="columns (default 16384)")
    parser.add_argument(
        "--itemsize", type=int, default=4, help="bytes per number of hidden and weight (default 4)"
    )
    parser.add_argument(
        "--check", action="store_true", help="compile small steps on 8 virtual devices, and compare"
    )
    given = parser.parse_args(arguments)
    if given.devices % given.model:
        parser.error(f"--devices must be a multiple of --model, got {given.devices} and {given.model}")
    step = Step(
        given.tokens, given.features, given.vocab, given.devices // given.model, given.model, given.itemsize
    )
    print(
        f"{step.data} x {step.model} devices, per device and step: bytes of the results of collectives, bytes received "
        "in them, matrix operations, temporary bytes"
    )
    for placement in PLACEMENTS:
        for loss in LOSSES:
            p = predict(step, placement, loss)
            print(
                f"  {placement:20} {loss:14} {_size(p.bytes_moved):>8} {_size(p.received):>8} {_size(p.flops):>8} "
                f"{_size(p.temporary):>8}"
            )
            for cause, size in p.moved.items():
                print(f"      {_size(size):>8}  {cause}")
    return _check() if given.check else 0


def _check() -> int:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    step, worst = Step(1024, 256, 16384, 2, 4), 1.0
    print(
        "\nmeasured over predicted, on 2 x 4 virtual devices: bytes of results, bytes received, matrix operations, "
        "temporary bytes"
    )
    for placement in PLACEMENTS:
        for loss in LOSSES:
            wanted, found = predict(step, placement, loss), measure(step, placement, loss)
            ratios = [
                found.bytes_moved / wanted.bytes_moved,
                found.received / wanted.received,
                found.flops / wanted.flops,
                found.temporary / wanted.temporary,
            ]
            worst = max(worst, *(max(r, 1 / r) for r in ratios))
            print(f"  {placement:20} {loss:14} " + " ".join(f"{r:6.2f}" for r in ratios))
    print(f"the largest difference is a factor of {worst:.2f}")
    return int(worst > 2)


if __name__ == "__main__":
    raise SystemExit(main())
