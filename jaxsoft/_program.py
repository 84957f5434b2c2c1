"""What a compiled program costs: bytes moved between devices, operations of matrix products, temporary memory.

Read off the text of the program, loops counted as often as they run.
"""

from __future__ import annotations

import collections
import json
import math
import re
from typing import Any, NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

# Instructions whose computation is of scalars
_OF_SCALARS = (
    "all-reduce",
    "reduce-scatter",
    "reduce",
    "sort",
    "scatter",
    "reduce-window",
    "select-and-scatter",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Costs(NamedTuple):
    """What one device does in one run of a program.

    Attributes:
      moved: by kind of collective, the bytes of its results, summed over all runs.
      received: the bytes that the device receives in them, on a ring of its group: of g devices, (g - 1) / g of what is
        gathered or scattered, twice that of what is reduced (which is a scatter and a gather).
      collectives: by kind of collective, how often it runs.
      flops: floating-point operations of matrix products.
      temporary: bytes of temporary memory.
    """

    moved: dict[str, float]
    received: float
    collectives: dict[str, int]
    flops: float
    temporary: int

    @property
    def bytes_moved(self) -> float:
        """The bytes of all collectives."""
        return sum(self.moved.values())


def costs_of(compiled: Any) -> Costs:
    """The costs of a compiled program, `jax.jit(f).lower(...).compile()`.

    A branch costs as much as its most expensive alternative. A loop whose number of steps XLA does not state counts
    as one step.
    """
    text = compiled.as_text()
    computations, entry = _parsed(text)
    devices = re.search(r"num_partitions=(\d+)", text)
    total = _cost(entry, computations, {}, int(devices[1]) if devices else 1)
    moved = {kind: n for kind, n in total.items() if kind in COLLECTIVES}
    counts = {kind: int(total[f"number of {kind}"]) for kind in moved}
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Costs(moved, total["received"], counts, total["flops"], temporary)


def _parsed(text: str) -> tuple[dict[str, list[tuple]], str]:
    """The instructions `(name, type, opcode, rest)` of each computation, and the name of the entry."""
    computations: dict[str, list[tuple]] = {}
    entry = current = ""
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            current = start[1]
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif (found := _INSTRUCTION.match(line)) is not None and current:
            computations[current].append(found.groups())
    return computations, entry


def _cost(name: str, computations: dict[str, list[tuple]], known: dict[str, Any], devices: int) -> Any:
    if name in known:
        return known[name]
    total: Any = collections.Counter()
    types = {instruction: kind for instruction, kind, _, _ in computations.get(name, ())}
    for _, kind, opcode, rest in computations.get(name, ()):
        base = opcode.removesuffix("-start")
        if base in COLLECTIVES:
            size = _result_bytes(kind, opcode)
            received = size * received_per_byte(base, _group(rest, devices))
            total.update({base: size, f"number of {base}": 1, "received": received})
        elif opcode == "dot":
            total["flops"] += _dot_flops(kind, rest, types)
        elif (
            opcode == "custom-call" and "matmul" in rest
        ):  # a product by a library, both operands two-dimensional
            total["flops"] += 2 * math.prod(_dims(kind)) * _contracted(kind, rest, types)
        if opcode in _OF_SCALARS:
            continue
        times = _trips(rest) if opcode == "while" else 1
        branches = _BRANCHES.search(rest)
        if branches is not None:
            costs = [
                _cost(b.strip().lstrip("%"), computations, known, devices) for b in branches[1].split(",")
            ]
            total.update(max(costs, key=lambda c: (c["flops"], sum(c.values()))))
        for called in _CALLED.findall(rest):
            total.update({k: n * times for k, n in _cost(called, computations, known, devices).items()})
    known[name] = total
    return total


def _group(rest: str, devices: int) -> int:
    """How many devices take part in a collective together, of all `devices`."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed[1].split(","))
    along = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if along:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", along[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", along[2]))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    return int(counted[1]) if counted else devices


def received_per_byte(kind: str, group: int) -> float:
    """The bytes that each of `group` devices receives per byte of a collective's result, see `Costs.received`."""
    others = (group - 1) / group
    return {"all-reduce": 2 * others, "reduce-scatter": group - 1, "collective-permute": 1}.get(kind, others)


def _trips(rest: str) -> int:
    found = re.search(r"backend_config=(\{.*\})", rest)
    if found is None:
        return 1
    try:
        config, _ = json.JSONDecoder().raw_decode(found[1])
    except json.JSONDecodeError:
        return 1
    return int(config.get("known_trip_count", {}).get("n", 1))


def _dims(kind: str) -> list[int]:
    """The dimensions of the first array of a type."""
    found = _ARRAY.search(kind)
    return [] if found is None or not found[2] else [int(n) for n in found[2].split(",")]


def _result_bytes(kind: str, opcode: str) -> float:
    """The bytes of a collective's results; an asynchronous one's type also holds its operands."""
    arrays = [
        _BYTES.get(dtype, int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype)) / 8 if dtype not in _BYTES else 0)
        * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(kind)
    ]
    if opcode.endswith("-start") and len(arrays) > 1 and not opcode.startswith("all-reduce"):
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def _dot_flops(kind: str, rest: str, types: dict[str, str]) -> float:
    left = _OPERAND.search(rest)
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    if left is None or contracting is None:
        return 0
    dims = _operand_dims(left[1], rest, types)
    return 2 * math.prod(_dims(kind)) * math.prod(dims[int(i)] for i in contracting[1].split(",") if i)


def _contracted(kind: str, rest: str, types: dict[str, str]) -> float:
    """The contracted size of `[m, k] @ [k, n]`, from the sizes of operands and result."""
    operands = _OPERAND.findall(rest.split(")")[0])[:2]
    sizes = [math.prod(_operand_dims(name, rest, types)) for name in operands]
    return math.sqrt(sizes[0] * sizes[1] / math.prod(_dims(kind)))


def _operand_dims(name: str, rest: str, types: dict[str, str]) -> list[int]:
    before = re.search(
        rf"(\S+\[[\d,]*\])\S* %{re.escape(name)}", rest
    )  # some versions print the operands' types
    return _dims(before[1] if before else types.get(name, ""))
