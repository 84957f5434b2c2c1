"""Settings of all tests: two virtual devices, a persistent compilation cache, a float64 switch."""

import contextlib
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAXSOFT_CACHE", str(_ROOT / ".venv" / "jax_cache"))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Gives back the memory of a file's compiled programs, gigabytes over all tests."""
    yield
    jax.clear_caches()
