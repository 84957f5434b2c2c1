"""What the engine promises: the same numbers as dense logits, in a small part of their memory."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import float64

import jaxsoft
from jaxsoft import losses

LOSSES = [
    losses.cross_entropy,
    lambda x, y: losses.cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-2),
    lambda x, y: losses.cross_entropy(x, y, label_smoothing=0.1, smoothing="others"),
    lambda x, y: losses.poly_loss(x, y, epsilon=(0.5, -0.2)),
    losses.focal_loss,
    losses.poly1_focal_loss,
    losses.dual_focal_loss,
    losses.max_suppression_loss,
    losses.spherical_z_loss,
    lambda x, y: losses.decoupled_softmax_loss(x, jnp.stack([y, jnp.full_like(y, -100)], -1)),
]


def all_losses(hidden, weight, labels, cotangents, dense, block_size):
    logits = jaxsoft.linear_logits(hidden, weight, block_size=block_size)
    logits = logits.dense() if dense else logits
    return jnp.stack([jnp.vdot(c, f(logits, labels)) for c, f in zip(cotangents, LOSSES)])


@pytest.mark.table
@pytest.mark.parametrize(
    "vocab, block_sizes, dtype, tolerance",
    [
        (1, (512,), np.float32, 1e-5),
        (7, (1, 3), np.float64, 1e-10),
        (1000, (128, None), np.float32, 1e-5),
        (4099, (512, 4098), np.float64, 1e-10),
        (50257, (1024,), np.float32, 1e-5),
    ],
)
def test_values_and_gradients_of_every_loss_are_those_of_dense_logits(vocab, block_sizes, dtype, tolerance):
    with float64():
        rng = np.random.default_rng(vocab)
        n, d = 6, 8
        hidden = jnp.asarray(rng.normal(size=(n, d)), dtype)
        weight = jnp.asarray(rng.normal(size=(d, vocab)), dtype)
        labels = jnp.asarray(rng.integers(0, vocab, n), jnp.int32)
        cotangents = jnp.asarray(rng.normal(size=(len(LOSSES), n)), dtype)

        def run(dense, block_size):
            def f(hidden, weight):
                out = all_losses(hidden, weight, labels, cotangents, dense, block_size)
                return out, out

            return jax.jit(jax.jacrev(f, (0, 1), has_aux=True))(hidden, weight)

        expected = run(True, None)
        for block_size in block_sizes:
            for a, b in zip(jax.tree.leaves(run(False, block_size)), jax.tree.leaves(expected)):
                a, b = np.asarray(a), np.asarray(b)
                for loss in range(len(LOSSES)):  # relative to the size of each loss's value and gradients
                    scale = max(np.abs(b[loss]).max(), 1.0 if vocab == 1 else 1e-30)
                    assert np.abs(a[loss] - b[loss]).max() <= tolerance * scale


def temporary_bytes(f, tokens, dim=512, vocab=32768):
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, dim), (dim, vocab))]
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*arrays, labels).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_compiled_temporary_memory():
    def dense(h, w, y):
        return optax.softmax_cross_entropy_with_integer_labels(h @ w, y).mean()

    def recomputing(h, w, y):
        return losses.cross_entropy(jaxsoft.linear_logits(h, w), y).mean()

    def forward_gradient(h, w, y):
        return losses.weighted_mean(losses.cross_entropy, jaxsoft.linear_logits(h, w), y)

    small = temporary_bytes(recomputing, 2048)
    assert small <= temporary_bytes(dense, 2048) / 30
    assert temporary_bytes(forward_gradient, 2048) <= temporary_bytes(dense, 2048) / 6

    # Four times the tokens: twice the memory, beyond the gradient of hidden, which the loop carries (and, with an
    # ignore_index, beyond the copy of hidden in which ignored rows are zeroed).
    def no_ignored(h, w, y):
        return losses.cross_entropy(jaxsoft.linear_logits(h, w), y, ignore_index=None).mean()

    def beyond(f, tokens):
        return temporary_bytes(f, tokens) - 4 * tokens * 512

    assert beyond(no_ignored, 8192) <= 2 * beyond(no_ignored, 2048)
    assert beyond(recomputing, 8192) <= 2 * small


def test_dense_cross_entropy_stores_no_second_array_of_the_logits_size():
    arrays = jax.ShapeDtypeStruct((1024, 4096), jnp.float32), jax.ShapeDtypeStruct((1024,), jnp.int32)
    f = jax.jit(jax.value_and_grad(lambda x, y: losses.cross_entropy(x, y).mean()))
    assert f.lower(*arrays).compile().memory_analysis().temp_size_in_bytes < 1024 * 4096


def test_import_is_light_and_silent(tmp_path):
    """With byte code, which installed packages have; the first of the runs may make it."""
    program = (
        "import sys, time, jax, optax; BEFORE = set(sys.modules); start = time.process_time(); import jaxsoft; "
        "print(time.process_time() - start); "
        "assert not {'flax', 'jax.experimental.pallas', 'torch', 'chex'} & (set(sys.modules) - BEFORE); "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:jaxsoft", "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
            | {"PYTHONPYCACHEPREFIX": str(tmp_path)},
        )
        for _ in range(3)
    ]
    assert min(float(r.stdout) for r in runs) <= 0.15
    assert all(r.stderr == "" for r in runs)
