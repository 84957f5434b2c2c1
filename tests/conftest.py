"""Settings of all tests: eight virtual devices, a persistent compilation cache, a float64 switch."""

import contextlib
import functools
import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The number of XLA's threads. A warpgroup of an interpreted GPU kernel that waits for another one holds a thread, and
# so does the call of the kernel, and a virtual device that waits for the others. With one thread per core, all of two
# may wait forever.
os.environ.setdefault("NPROC", "16")
# Compiling dominates the tests; with few optimizations, and each program compiled in one piece, it takes a third of the
# time. One flag exists in the oldest versions only. `JAXSOFT_OPTIMIZED=1` runs the tests with the code that users run.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_force_host_platform_device_count=8"]
    + (
        []
        if os.environ.get("JAXSOFT_OPTIMIZED")
        else ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
        + (
            ["--xla_cpu_use_fusion_emitters=false"]
            if importlib.metadata.version("jaxlib").startswith("0.10.")
            else []
        )
    )
    + [os.environ.get("XLA_FLAGS", "")]
)

import design
import jax
import numpy as np
import pytest
from jax._src.interpreters import mlir

_ROOT = pathlib.Path(__file__).parent.parent
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAXSOFT_CACHE", str(_ROOT / ".venv" / "jax_cache"))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of the time of lowering
gc.set_threshold(50_000, 20, 20)  # tracing makes millions of objects, few of them in cycles
# JAX makes a new MLIR context for every program, a fifth of the time of a small one. The programs of a file share one.
# (A private name of JAX: without it, the tests are only slower.)
_make_context = functools.lru_cache(getattr(mlir, "make_ir_context", None))
if hasattr(mlir, "make_ir_context"):
    mlir.make_ir_context = _make_context


@contextlib.contextmanager
def float64():
    """Runs what is inside with 64-bit types."""
    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(True):
            yield
    else:
        from jax.experimental import enable_x64

        with enable_x64():
            yield


@pytest.fixture
def x64():
    with float64():
        yield


_MEMORY = 4 << 30  # bytes


def _memory() -> int:
    """The memory of this process; where it is unknown, more than any bound."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 60


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Frees compiled programs after a file if they take much memory; else the next file shares the small ones."""
    yield
    _make_context.cache_clear()
    if _memory() > _MEMORY:
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(config, items):
    design.select(config, items)
    design.group(items)


def pytest_collection_finish():
    """What the modules hold lives as long as the process: no collection of garbage need look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def new_random_numbers(request, monkeypatch):
    """Resets a file's `RNG` for each test, so that its numbers do not depend on the tests that ran before."""
    if isinstance(getattr(request.module, "RNG", None), np.random.Generator):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(0))
