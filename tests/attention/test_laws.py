"""Laws of `dot_product_attention`, `partial_attention` and `decode_attention`, one entry per set of array arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilations, is_float, trees_close

import jaxsoft
from jaxsoft.attention import (
    decode_attention,
    dot_product_attention,
    merge_partial_attention,
    partial_attention,
)

B, T, S, N, K, H, W = 1, 5, 6, 2, 1, 4, 3
BLOCKS = {"block_sizes": (2, 3)}


def _attend(a):
    normalizer = functools.partial(jaxsoft.scalable_softmax, scale=a.pop("ssmax"))
    out, statistics = dot_product_attention(
        **a, normalizer=normalizer, is_causal=True, softcap=3.0, return_statistics=True, **BLOCKS
    )
    return out, statistics.entropy


def _at_positions(a):
    return dot_product_attention(**a, local_window_size=(3, 1), **BLOCKS)


def _in_parts(a):
    query, key, value, mask = (a.pop(name) for name in ("query", "key", "value", "mask"))
    first = partial_attention(query, key[:, :4], value[:, :4], mask=mask[..., :4], **a, **BLOCKS)
    rest = partial_attention(query, key[:, 4:], value[:, 4:], mask=mask[..., 4:], key_offset=4, **a, **BLOCKS)
    return merge_partial_attention(first, rest).output()


def _decode(a, **options):
    return decode_attention(a.pop("query"), a.pop("key"), a.pop("value"), a.pop("lengths"), **a, **options)


ENTRIES = {
    "whole": (
        _attend,
        "mask bias key_value_seq_lengths query_seq_lengths query_segment_ids key_segment_ids query_offset scale "
        "alibi_slopes sinks ssmax",
    ),
    "positions": (_at_positions, "key_value_seq_lengths query_positions key_positions alibi_slopes"),
    "parts": (_in_parts, "mask key_value_seq_lengths sinks"),
    "decode": (functools.partial(_decode, splits=2), "lengths sinks"),
    "decode, unified": (functools.partial(_decode, unified_max=0.0), "lengths bias"),
}


def arrays_of(names, copies, B=B, T=T, S=S):
    """Several copies of each array argument, along a leading axis."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(copies, *shape)), jnp.float32)
    lengths = lambda least, most: jnp.asarray(rng.integers(least, most + 1, (copies, B)), jnp.int32)
    arrays = {
        "query": normal(B, T, N, H),
        "key": normal(B, S, K, H),
        "value": normal(B, S, K, W),
        "mask": jnp.asarray(rng.random((copies, B, 1, T, S)) < 0.6),
        "bias": normal(B, N, T, S),
        "lengths": lengths(min(T, S), S),
        "key_value_seq_lengths": lengths(min(1, S), S),
        "query_seq_lengths": lengths(min(1, T), T),
        "query_segment_ids": jnp.sort(jnp.asarray(rng.integers(0, 2, (copies, B, T)))),
        "key_segment_ids": jnp.sort(jnp.asarray(rng.integers(0, 2, (copies, B, S)))),
        "query_offset": lengths(0, 2),
        "scale": normal(N),
        "alibi_slopes": normal(N),
        "sinks": normal(N),
        "ssmax": normal(N),
        "query_positions": jnp.asarray(rng.integers(0, 6, (copies, B, T)), jnp.int32),
        "key_positions": jnp.asarray(rng.integers(0, 6, (copies, B, S)), jnp.int32),
    }
    return {name: arrays[name] for name in ("query", "key", "value", *names.split())}


@pytest.mark.parametrize("name", ENTRIES)
def test_vmap_and_grad_in_any_order(name):
    """`vmap` in `vmap`, each of which maps every other argument and shares the rest, and `grad` in any place."""
    function, names = ENTRIES[name]
    arrays = arrays_of(names, 2)
    integers = {k: v for k, v in arrays.items() if not is_float(v)}
    floats = {k: v for k, v in arrays.items() if is_float(v)}
    outer = [k for i, k in enumerate([*floats, *integers]) if i % 2]

    def value(floats, integers, weights):
        leaves = jax.tree.leaves(function({**floats, **integers}))
        return sum(jnp.vdot(a, w) for a, w in zip(leaves, weights))

    def axes(first):
        """`in_axes` of `value` for the `vmap` over the first index, or over the second one."""
        choose = lambda tree: {k: 0 if (k in outer) == first else None for k in tree}
        return choose(floats), choose(integers), 0

    def over_inner(*arrays):
        return jnp.sum(jax.vmap(value, axes(False))(*arrays))

    def over_both(*arrays):
        return jnp.sum(jax.vmap(jax.vmap(value, axes(False)), axes(True))(*arrays))

    @jax.jit
    def gradients(floats, integers, weights):
        def element(i, j):  # one after the other
            pick = lambda tree: {k: v[i if k in outer else j] for k, v in tree.items()}
            return jax.grad(value)(pick(floats), pick(integers), [w[i, j] for w in weights])

        indices = jnp.asarray([[0, 0, 1, 1], [0, 1, 0, 1]])
        each = jax.lax.map(lambda ij: element(*ij), tuple(indices))
        each = {k: v.reshape(2, 2, *v.shape[1:]) for k, v in each.items()}
        mapped = jax.vmap(jax.grad(over_inner), axes(True))(floats, integers, weights)
        return (
            {k: v.sum(1 if k in outer else 0) for k, v in each.items()},
            {k: v if k in outer else v.sum(0) for k, v in mapped.items()},
        )

    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(function, {k: v[0] for k, v in arrays.items()})
    weights = [jnp.asarray(rng.normal(size=(2, 2, *a.shape)), jnp.float32) for a in jax.tree.leaves(shapes)]
    trees_close(*gradients(floats, integers, weights), 2e-5)
    jax.eval_shape(jax.grad(over_both), floats, integers, weights)
    jax.eval_shape(jax.vmap(jax.vmap(jax.grad(value), axes(False)), axes(True)), floats, integers, weights)


@pytest.mark.parametrize("empty", ["B", "T", "S"])
@pytest.mark.parametrize("name", ENTRIES)
def test_empty_axes(name, empty):
    """Without keys, as without visible ones, the output is 0; all gradients are 0."""
    function, names = ENTRIES[name]
    arrays = {k: v[0] for k, v in arrays_of(names, 1, **{empty: 0}).items()}
    integers = {k: v for k, v in arrays.items() if not is_float(v)}
    floats = {k: v for k, v in arrays.items() if is_float(v)}

    def value(floats):
        results = function({**floats, **integers})
        return sum(jnp.sum(a) for a in jax.tree.leaves(results)), results

    gradient, results = jax.jit(jax.grad(value, has_aux=True))(floats)
    output = jax.tree.leaves(results)[0]
    assert output.shape == (*floats["query"].shape[:-1], W)
    assert all(jnp.all(a == 0) for a in jax.tree.leaves((results, gradient)))


@pytest.mark.parametrize("name", ["entmax15", "count", "unified"])
def test_a_second_gradient_outside_of_jit_compiles_nothing(name):
    arrays = {k: v[0] for k, v in arrays_of("mask lengths", 1).items()}
    mask, lengths = arrays.pop("mask"), arrays.pop("lengths")

    def total(arrays):
        if name == "unified":
            return jnp.sum(_decode({**arrays, "lengths": lengths}, unified_max=0.0))
        if name == "count":
            return jnp.sum(
                dot_product_attention(**arrays, normalizer=jaxsoft.scalable_softmax, mask=mask, **BLOCKS)
            )
        return jnp.sum(dot_product_attention(**arrays, normalizer=jaxsoft.entmax15, **BLOCKS))

    with compilations() as compiled:
        jax.grad(total)(arrays)
        assert compiled
        compiled.clear()
        jax.grad(total)(arrays)
        assert not compiled
