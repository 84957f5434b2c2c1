"""The machine code of the GPU kernels, compiled for an H200 on a machine that has none: `make kernels`.

    python benchmarks/compiled.py [--only NAME ...] [--accept NOTE] [--keep FOLDER]

Every kernel of `CASES` is lowered for an abstract H200 and compiled to instructions by the compiler in JAX's CUDA
plugin. Printed are, per kernel, the registers of a thread, the bytes that are spilled (stored and loaded), the number
of instructions in the loop over tiles, per score and thread, and how many of them are matrix products (HGMMA) or
special functions (MUFU), each beside the number accepted before. The steps of a product of many features, a loop in
that loop, do not count as instructions. The exit status is 1 if a kernel spills whose accepted code does not, or has
more instructions per score than accepted. `--accept` writes the new numbers instead, with a note on what was changed.

It needs jax, jax-cuda12-plugin, jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12 and nvidia-cuda-nvdisasm, and a C compiler for a
library that stands in for the driver.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

import jaxsoft
from jaxsoft.attention import dot_product_attention
from jaxsoft.rows import RowReduction, reduce_rows

RESULTS = pathlib.Path(__file__).parent / "results" / "compiled.json"

# Stands in for the CUDA libraries: says that there is one device of compute capability 9.0.
DRIVER = """
int cudaDeviceGetAttribute(int *value, int name, int device) { *value = name == 75 ? 9 : 0; return 0; }
int cuDeviceGetAttribute(int *value, int name, int device) { return cudaDeviceGetAttribute(value, name, device); }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
const char *cudaGetErrorString(int error) { return "there is no device"; }
int cuGetErrorString(int error, const char **text) { *text = "there is no device"; return 0; }
"""


class Case(NamedTuple):
    """A function that runs kernels.

    Attributes:
      kernels: the names of its kernels, in the order in which they are lowered.
      function: the function.
      args: shapes and dtypes of its arguments.
    """

    kernels: tuple[str, ...]
    function: Callable
    args: tuple


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def of_rows(function: Callable) -> Callable:
    return functools.partial(function, implementation="mosaic_gpu")


def total(function: Callable) -> Callable:
    return lambda *args: jnp.sum(function(*args).astype(jnp.float32))


def cross_entropy(hidden, weight, labels):
    logits = jaxsoft.linear_logits(hidden, weight, implementation="mosaic_gpu")
    return jaxsoft.losses.cross_entropy(logits, labels)


def attention(normalizer: Callable = jaxsoft.softmax) -> Callable:
    return functools.partial(
        dot_product_attention, normalizer=normalizer, is_causal=True, implementation="mosaic_gpu"
    )


def decode(query, key, value, lengths=None):
    return dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="mosaic_gpu"
    )


def soft_count(x, theta, width):
    """The first reduction of docs/guides/write-a-reduction.md, which how-a-kernel-is-made.md follows to here."""

    def update(state, tile, theta, width):
        return state + tile.sum(jax.nn.sigmoid((tile.x - theta[..., None]) / width[..., None]))

    reduction = RowReduction(lambda like, *_: like, update, args=(theta, width))
    return reduce_rows(x, reduction, implementation="mosaic_gpu")


ROWS = array(8192, 32768)
HEAD = (array(8192, 4096), array(4096, 131072), array(8192, dtype=jnp.int32))
HEADS = (array(4, 8192, 16, 128),) * 3
CACHE = (array(64, 1, 32, 128), *(array(64, 32768, 8, 128),) * 2)

CASES = [
    Case(("logsumexp",), of_rows(jaxsoft.logsumexp), (ROWS,)),
    Case(
        ("soft count", "soft count gradient"),
        jax.grad(total(soft_count)),
        (ROWS, *(array(8192, dtype=jnp.float32),) * 2),
    ),
    Case(("softmax", "softmax weights"), of_rows(jaxsoft.softmax), (ROWS,)),
    Case(("head forward", "head backward"), jax.grad(total(cross_entropy), (0, 1)), HEAD),
    Case(
        ("attention forward", "attention dQ", "attention dK, dV"),
        jax.grad(total(attention()), (0, 1, 2)),
        HEADS,
    ),
    Case(
        ("softpick forward", "softpick dQ", "softpick dK, dV"),
        jax.grad(total(attention(jaxsoft.softpick)), (0, 1, 2)),
        HEADS,
    ),
    Case(("sigmoid forward",), attention(jaxsoft.sigmoid_weights), HEADS),
    Case(("self-adjust forward",), attention(jaxsoft.self_adjust_softmax), HEADS),
    Case(("decode",), decode, CACHE),
    Case(("decode with lengths",), decode, (*CACHE, array(64, dtype=jnp.int32))),
]


class Code(NamedTuple):
    """What the compiler made of a kernel.

    Attributes:
      tile: the computing warpgroups and the size of their tiles, `"2 x 64 x 128"`.
      registers: registers per thread at the launch.
      spills: bytes stored and loaded per thread because registers do not suffice.
      instructions: instructions of the loop over tiles, per score and thread.
      products: HGMMA instructions in that loop.
      special: MUFU instructions in that loop.
    """

    tile: str
    registers: int
    spills: list[int]
    instructions: float
    products: int
    special: int


# --- lowering ----------------------------------------------------------------------------------------------------


def lowered(case: Case) -> Iterator[tuple[str, bytes]]:
    """Each kernel of a case: its name and its module."""
    from jax.experimental.mosaic.gpu import core

    modules = []
    serialize = core._run_serde_pass

    def kept(module, *, serialize: bool, ir_version: int | None = None, pass_=serialize):
        del ir_version  # the compiler of the plugin wants the format of the present version
        module = pass_(module, serialize=serialize)
        code = io.BytesIO()
        module.operation.write_bytecode(code)
        modules.append(code.getvalue())
        return module

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    core._run_serde_pass = kept
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            jax.jit(case.function).trace(*case.args).lower(lowering_platforms=("cuda",))
    finally:
        core._run_serde_pass = serialize
    if len(case.kernels) != len(modules):
        raise RuntimeError(f"expected the kernels {case.kernels}, got {len(modules)}")
    yield from zip(case.kernels, modules)


# --- compiling ---------------------------------------------------------------------------------------------------


def wheel(name: str, file: str) -> pathlib.Path:
    """A file of an installed package."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"compiled.py needs the package {name}: run it by `make kernels`")
    return next(pathlib.Path(str(f.locate())) for f in files if f.name == file)


def compile_all(folder: pathlib.Path, names: list[str]) -> None:
    """Compiles `NAME/module` in the folder for each name, in a process of its own; writes `NAME/*.ptxas` and more."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        sys.exit("compiled.py found no C compiler (cc, gcc or clang): it needs one for twenty lines of C")
    libraries, cuda = folder / "lib", folder / "cuda"
    libraries.mkdir()
    (libraries / "driver.c").write_text(DRIVER)
    for library in ("libcudart.so.12", "libcuda.so.1"):
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", str(libraries / library), str(libraries / "driver.c")],
            check=True,
        )
    ptxas = wheel("nvidia-cuda-nvcc-cu12", "ptxas")
    (cuda / "bin").mkdir(parents=True)
    (cuda / "nvvm").symlink_to(ptxas.parent.parent / "nvvm")
    for tool in (ptxas, wheel("nvidia-cuda-nvdisasm", "nvdisasm")):
        (cuda / "bin" / tool.name).symlink_to(tool)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "MOSAIC_GPU_CUDA_ROOT": str(cuda),
        "MOSAIC_GPU_RUNTIME_LIB_PATH": str(wheel("jax-cuda12-plugin", "libmosaic_gpu_runtime.so")),
        **{f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "SASS")},
    }
    plugin = wheel("jax-cuda12-pjrt", "xla_cuda_plugin.so")
    subprocess.run(
        [sys.executable, __file__, "--compile", str(plugin), *(str(folder / name) for name in names)],
        env=environment,
        check=True,
    )


def compile_modules(plugin: str, folders: list[str]) -> None:
    """Runs in a process of its own, with an environment in which the plugin finds its tools and a device."""
    compile_module = ctypes.CDLL(plugin).MosaicGpuCompile
    compile_module.restype, compile_module.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
    for folder in folders:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        module = pathlib.Path(folder, "module").read_bytes()
        compile_module(module, len(module))  # it returns NULL, as there is no device to load the code into


# --- reading machine code ----------------------------------------------------------------------------------------


def parse(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The operations of a program, and for each which may follow it: pairs of indices."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)", line):
            code.append((found[1] or "", found[2], found[3]))
    following = []
    for at, (condition, operation, rest) in enumerate(code):
        target = re.search(r"`\(\.(L_x_\d+)\)", rest)
        if target and operation.split(".")[0] == "BRA":
            following.append((at, labels[target[1]]))
        if condition or operation.split(".")[0] not in ("BRA", "EXIT"):
            following.append((at, at + 1))
    return [operation for _, operation, _ in code], following


def loops(operations: list[str], following: list[tuple[int, int]], within: set[int]) -> list[set[int]]:
    """The outermost loops among some instructions: strongly connected ones."""
    pairs = [(a, b) for a, b in following if a in within and b in within]
    n = len(operations)
    graph = sparse.csr_array((np.ones(len(pairs)), tuple(np.transpose(pairs))), shape=(n, n))
    _, component = sparse.csgraph.connected_components(graph, connection="strong")
    found: dict[int, set[int]] = {}
    for at in within:
        found.setdefault(component[at], set()).add(at)
    return [loop for loop in found.values() if len(loop) > 1]


def main_loop(text: str) -> tuple[list[str], list[str]]:
    """The operations in the loop over tiles, and those of it that are in loops inside it.

    There may be two such loops, one for tiles that a mask cuts and one for all others: the shorter one counts.
    """
    operations, following = parse(text)

    def named(loop):
        return [operations[at] for at in sorted(loop)]

    computing = [
        loop
        for loop in loops(operations, following, set(range(len(operations))))
        if count(named(loop), "HGMMA", "MUFU") > 4
    ]
    loop = min(computing, key=len)
    entries = {b for a, b in following if b in loop and a not in loop}
    inside = loops(operations, following, loop - entries)
    return named(loop), named(set().union(*inside))


def count(operations: list[str], *names: str) -> int:
    return sum(operation.split(".")[0] in names for operation in operations)


def read(folder: pathlib.Path) -> Code:
    """What the compiler made of the kernel in a folder."""
    report = next(folder.glob("*.ptxas")).read_text()
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    tile = re.search(r"sweep_over_\w+?_(\d+)x64x(\d+)_", report)
    if registers is None or spills is None or tile is None:
        raise RuntimeError(f"the compiler says: {report}")
    loop, steps = main_loop(next(folder.glob("*.sass*")).read_text())
    return Code(
        f"{tile[1]} x 64 x {tile[2]}",
        int(registers[1]),
        [int(spills[1]), int(spills[2])],
        round((len(loop) - len(steps)) / (64 * int(tile[2]) / 128), 1),
        count(loop, "HGMMA"),
        count(loop, "MUFU"),
    )


# --- comparing ---------------------------------------------------------------------------------------------------


def objections(code: Code, accepted: Code | None) -> list[str]:
    """In what a kernel is worse than the accepted one."""
    if accepted is None:
        return []
    wrong = []
    if sum(code.spills) > 0 == sum(accepted.spills):
        wrong.append("spills")
    if code.instructions > accepted.instructions:
        wrong.append("more instructions")
    return wrong


def show(codes: dict[str, Code], accepted: dict[str, Code]) -> int:
    """Prints all kernels; returns how many are worse than accepted."""
    heads = ("kernel", "tile", "registers", "spills", "per score", "HGMMA", "MUFU")
    lines, wrong = [heads], 0
    for name, code in codes.items():
        old = accepted.get(name)
        before = code if old is None else old
        cells = [f"{a}" if a == b else f"{a} ({b})" for a, b in zip(code, before)]
        objection = objections(code, old)
        wrong += bool(objection)
        lines.append((name, *cells, *(objection and [", ".join(objection).upper()])))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0])).rstrip())
    print("Spills: bytes stored and loaded. Per score: instructions of a thread in the loop over tiles.")
    print("In parentheses: the accepted number, where it differs.")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", help="words: cases with a kernel whose name has one of them")
    parser.add_argument("--accept", metavar="NOTE", help="write these numbers as the accepted ones")
    parser.add_argument("--keep", type=pathlib.Path, help="a new folder that keeps all that is compiled")
    parser.add_argument("--compile", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        compile_modules(options.compile[0], options.compile[1:])
        return 0
    wanted = options.only or [""]
    cases = [case for case in CASES if any(word in name for word in wanted for name in case.kernels)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or pathlib.Path(temporary)
        names = []
        for case in cases:
            for name, module in lowered(case):
                (folder / name).mkdir(parents=True)
                (folder / name / "module").write_bytes(module)
                names.append(name)
        compile_all(folder.absolute(), names)
        codes = {name: read(folder / name) for name in names}
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"kernels": {}}
    accepted = {name: Code(**numbers) for name, numbers in content["kernels"].items()}
    wrong = show(codes, accepted)
    if options.accept:
        content["jax"] = jax.__version__
        content["kernels"].update({name: code._asdict() for name, code in codes.items()})
        changed = {
            name: {"instructions": code.instructions, "spills": code.spills}
            for name, code in codes.items()
            if code != accepted.get(name)
        }
        content.setdefault("history", []).append({"change": options.accept, **changed})
        RESULTS.write_text(written(content))
        return 0
    if wrong:
        print(f"{wrong} kernels are worse than accepted in {RESULTS.name}; `--accept` accepts them")
    return 1 if wrong else 0


def written(content: dict) -> str:
    """JSON with one line per kernel and per change."""
    kernels = ",\n  ".join(
        f"{json.dumps(name)}: {json.dumps(each)}" for name, each in content["kernels"].items()
    )
    history = ",\n  ".join(map(json.dumps, content["history"]))
    return f"""{{
 "jax": {json.dumps(content["jax"])},
 "kernels": {{
  {kernels}
 }},
 "history": [
  {history}
 ]
}}
"""


if __name__ == "__main__":
    sys.exit(main())
