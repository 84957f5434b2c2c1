"""What the parts of `accelerator.py` share: sizes, random data, the clock, compilation, and the record of results."""

from __future__ import annotations

import concurrent.futures
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import machine
import numpy as np
from rich.console import Console


class Sizes(NamedTuple):
    """The sizes of what is timed.

    Attributes:
      rows: rows and columns of stored scores.
      heads: tokens, features and vocabulary of linear heads.
      attention: batch, heads, head size, length.
      decode: batch, query heads, key heads, head size, cached keys.
      copy: bytes of the copy.
      product: rows (and columns) of the square matrices of the product.
      repeats: timed samples per contestant.
    """

    rows: tuple = ((8192, 32768), (256, 1048576))
    heads: tuple = ((8192, 4096, 131072), (8192, 2304, 256000))
    attention: tuple = (4, 16, 128, 8192)
    decode: tuple = (64, 32, 8, 128, 32768)
    copy: int = 2**31
    product: int = 8192
    repeats: int = 7


SMOKE = Sizes(
    rows=((16, 512),),
    heads=((32, 16, 256),),
    attention=(1, 2, 16, 128),
    decode=(2, 4, 2, 16, 256),
    copy=2**20,
    product=128,
    repeats=1,
)


class Run:
    """One run: its settings, and its record, which is written after every step because a kernel may crash the process.

    Attributes:
      implementation: which kernels run.
      smoke: whether the shapes are tiny and the kernels interpreted.
      out: the file of the record.
      checks: results of the comparisons.
      rows: results of the timings.
      dropped: what was left out, and why.
      ceilings: what the machine can do, by name.
      doing: name and number of the current step; None between steps.
    """

    def __init__(self, implementation: str, smoke: bool, seconds: float, seed: int, out: pathlib.Path):
        self.implementation, self.smoke, self.out = implementation, smoke, out
        self.start, self.seconds, self.seed = time.monotonic(), seconds, seed
        self.random = np.random.default_rng(seed)
        self.sizes = SMOKE if smoke else Sizes()
        self.console = Console(width=200)
        self.checks: list[dict] = []
        self.rows: list[dict] = []
        self.dropped: list[str] = []
        self.ceilings: dict[str, float] = {}
        self.doing: tuple[str, int] | None = None

    def begin(self, name: str, number: int = 0) -> None:
        """Records which step begins."""
        self.doing = (name, number)
        self.save()

    def finish(self) -> None:
        """Records that the step is done."""
        self.doing = None
        self.save()

    def save(self) -> None:
        """Writes the record."""
        record = {
            "device": jax.devices()[0].device_kind,
            "machine": machine.description(),
            "implementation": self.implementation,
            "smoke": self.smoke,
            "ceilings": self.ceilings,
            "left_out": self.dropped,
            "doing": self.doing,
            "checks": self.checks,
            "rows": self.rows,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        beside = self.out.with_name(self.out.name + ".new")
        beside.write_text(json.dumps(record, indent=1) + "\n")
        beside.replace(self.out)

    def load(self) -> None:
        """Reads the record."""
        record = json.loads(self.out.read_text())
        self.ceilings, self.dropped, self.doing = record["ceilings"], record["left_out"], record["doing"]
        self.checks, self.rows = record["checks"], record["rows"]

    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def say(self, line: str) -> None:
        """Prints a line with the time."""
        self.console.print(f"{time.monotonic() - self.start:5.0f} s  {line}", markup=False, highlight=False)
        sys.stdout.flush()

    def normal(self, *shape: int, dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
        """Fresh normal random numbers; large arrays are drawn on the device."""
        if math.prod(shape) > 2**20:
            key = jax.random.key(self.random.integers(2**31))
            return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)
        return jnp.asarray(self.random.standard_normal(shape, np.float32) * np.float32(scale), dtype)

    def uniform(self, *shape: int) -> jax.Array:
        """Fresh random numbers between 1/2 and 3/2."""
        return jnp.asarray(self.random.random(shape, np.float32) + np.float32(0.5))

    def integers(self, *shape: int, high: int) -> jax.Array:
        """Fresh random integers, at least 0 and below `high`."""
        return jnp.asarray(self.random.integers(0, high, shape, np.int32))

    def booleans(self, *shape: int, probability: float = 0.7) -> jax.Array:
        """Fresh random booleans."""
        return jnp.asarray(self.random.random(shape, np.float32) < probability)


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:160] if lines else 'no reason'}"


def compile_all(functions: dict[Any, tuple[Callable, tuple]], alive: Callable[[], None]) -> dict[Any, Any]:
    """Compiles `name: (function, arguments)` in parallel; what failed is represented by its exception.

    Functions with the same program share one.

    Args:
      functions: what to compile.
      alive: called after each step.
    """
    futures, compiled = {}, {}
    programs: dict[tuple, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for name, (function, args) in functions.items():
            try:  # traced here: the caller's `with` blocks hold for this thread only
                traced = jax.jit(function).trace(*args)
                # Not the lowered text: kernels in it name the lines that traced them.
                text = re.sub(r" at 0x[0-9a-f]+", "", str(traced.jaxpr))
                program = (text, *(np.asarray(c).tobytes() for c in traced.jaxpr.consts))
                if program not in programs:
                    programs[program] = pool.submit(traced.lower().compile)
                futures[name] = programs[program]
            except Exception as error:
                compiled[name] = error
            alive()
        for name, future in futures.items():
            try:
                compiled[name] = future.result()
            except Exception as error:
                compiled[name] = error
            alive()
    return compiled


def kernels_in(compiled: Any) -> int | None:
    """How many Pallas kernels a compiled function calls; None if that is unknown (on a CPU they are interpreted)."""
    if jax.default_backend() == "cpu":
        return None
    try:
        return len(re.findall(r'custom_call_target="(?:mosaic_gpu|tpu_custom_call)', compiled.as_text()))
    except Exception:
        return None


def works() -> bool:
    """Whether the device still works: after an illegal memory access it does not."""
    try:
        return float(jax.jit(jnp.sum)(jnp.ones(8))) == 8
    except Exception:
        return False
