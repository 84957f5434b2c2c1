"""What distributed optimizers move between devices, read off compiled programs."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxsoft import optimizers as o
from jaxsoft._program import costs_of

WORKERS, SHAPE = 8, (64, 128)
ENTRIES = SHAPE[0] * SHAPE[1]


def costs(step):
    """Of `step(params, batch)` by all workers, each with its own batch."""
    mesh = jax.make_mesh((WORKERS,), ("workers",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("workers")), out_specs=P(), check_vma=False)
    params, batch = (
        jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        jax.ShapeDtypeStruct((WORKERS, *SHAPE), jnp.float32),
    )
    return costs_of(jax.jit(f).lower(params, batch).compile())


def stepped(tx):
    def step(params, batch):
        updates, _ = tx.update(batch[0], tx.init(params), params)
        return params + updates

    return step


def test_majority_vote_moves_a_byte_per_entry():
    found = costs(stepped(o.lion_k(1e-3, axis_name="workers")))
    assert found.moved == {"all-reduce": ENTRIES}


def test_compressed_gradients_move_a_byte_per_entry_and_worker():
    found = costs(stepped(o.compress_gradients(axis_name="workers")))
    scales = found.bytes_moved - WORKERS * ENTRIES
    assert 0 < scales <= 0.05 * WORKERS * ENTRIES


def test_shared_randomness_moves_a_byte_per_worker():
    key = jax.random.key(0)

    def step(params, batch):
        loss = lambda params, target: jnp.mean((params - target) ** 2)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(WORKERS))
        _, rho = o.zo_projection(loss)(params, keys[lax.axis_index("workers")], batch[0])
        codes = lax.all_gather(o.quantize_projection(rho, 8.0), "workers")
        return o.shared_randomness_update(params, codes, keys, 0.02, limit=8.0)

    assert costs(step).moved == {"all-gather": WORKERS}
