"""The stable embedding: oracle, init, padding, precision, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft.norms import stable_embedding, stable_embedding_init


def make(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    table = 3 * jax.random.normal(keys[0], (11, 8), dtype)
    ids = jax.random.randint(keys[1], (2, 5), 0, 11)
    return table, ids, 1 + jax.random.normal(keys[2], (8,), dtype), jax.random.normal(keys[3], (8,), dtype)


def test_equals_torch():
    torch = pytest.importorskip("torch")
    table, ids, scale, bias = make()
    weight = torch.tensor(np.asarray(table), requires_grad=True)
    rows = torch.nn.functional.embedding(torch.tensor(np.asarray(ids)), weight, padding_idx=3)
    layer = torch.nn.functional.layer_norm(
        rows, (8,), torch.tensor(np.asarray(scale)), torch.tensor(np.asarray(bias)), 1e-5
    )
    cotangent = np.random.default_rng(0).standard_normal(layer.shape).astype(np.float32)
    layer.backward(torch.tensor(cotangent))
    ours, vjp = jax.vjp(lambda table: stable_embedding(table, ids, scale, bias, padding_id=3), table)
    np.testing.assert_allclose(ours, layer.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vjp(jnp.asarray(cotangent))[0], weight.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_another_eps_and_no_padding(x64):
    table, ids, scale, bias = make(jnp.float64)
    rows = np.asarray(table)[np.asarray(ids)]
    unit = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(
        stable_embedding(table, ids, scale, bias, eps=0.5), unit * scale + bias, rtol=1e-12
    )


def test_padding_is_the_bias():
    table, _, scale, bias = make()
    table = table.at[3].set(0)
    np.testing.assert_array_equal(stable_embedding(table, jnp.array(3), scale, bias, padding_id=3), bias)
    assert jnp.all(stable_embedding(table, jnp.array([3, 1]))[0] == 0)


def test_id_out_of_range_is_nan():
    table, *_ = make()
    out = stable_embedding(table, jnp.array([-1, 11, 0]))
    assert np.all(np.isnan(out[:2])) and np.all(np.isfinite(out[2]))
    gradient = jax.grad(lambda t: jnp.sum(jnp.sin(stable_embedding(t, jnp.array([1, 4])))))(table)
    assert np.all(np.isfinite(gradient))


def test_low_precision_is_computed_in_float32():
    table, ids, scale, bias = make(jnp.bfloat16)
    low = stable_embedding(table, ids, scale, bias)
    assert low.dtype == jnp.bfloat16
    high = stable_embedding(
        *(x.astype(jnp.float32) if x is not ids else x for x in (table, ids, scale, bias))
    )
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


def test_init():
    table = stable_embedding_init(jax.random.key(0), 500, 40, padding_id=7)
    bound = np.sqrt(6 / 540)
    assert np.all(table[7] == 0)
    assert 0.99 * bound < jnp.max(jnp.abs(table)) <= bound
    np.testing.assert_allclose(jnp.std(table), bound / np.sqrt(3), rtol=0.02)
    assert stable_embedding_init(jax.random.key(0), 5, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_transforms():
    table, ids, scale, bias = make()
    expected = stable_embedding(table, ids, scale, bias)
    np.testing.assert_allclose(
        jax.jit(stable_embedding)(table, ids, scale, bias), expected, rtol=1e-5, atol=1e-6
    )
    rows = jax.vmap(lambda i: stable_embedding(table, i, scale, bias))(ids)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
    shape = jax.eval_shape(stable_embedding, table, jnp.zeros((0, 3), jnp.int32))
    assert shape.shape == (0, 3, 8)


def test_errors():
    table, ids, scale, _ = make()
    for call, error, words in [
        (lambda: stable_embedding(ids, ids), TypeError, "table"),
        (lambda: stable_embedding(table[0], ids), ValueError, "table"),
        (lambda: stable_embedding(table, table), TypeError, "ids"),
        (lambda: stable_embedding(table, ids, scale[:3]), ValueError, "scale"),
        (lambda: stable_embedding(table, ids, None, scale[:3]), ValueError, "bias"),
        (lambda: stable_embedding(table, ids, padding_id=11), ValueError, "padding_id"),
        (lambda: stable_embedding(table, ids, eps=0.0), ValueError, "eps"),
        (lambda: stable_embedding_init(jax.random.key(0), 0, 3), ValueError, "vocabulary"),
        (lambda: stable_embedding_init(jax.random.key(0), 3, 2.5), TypeError, "features"),
        (lambda: stable_embedding_init(jax.random.key(0), 3, 2, padding_id=3), ValueError, "padding_id"),
        (lambda: stable_embedding_init(jax.random.key(0), 3, 2, dtype=jnp.int32), TypeError, "dtype"),
    ]:
        with pytest.raises(error, match=words):
            call()
