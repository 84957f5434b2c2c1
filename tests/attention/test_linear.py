"""The laws of the linear-time attentions and of those that reuse weights; and linear attention's own formulas."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import near

from jaxsoft.attention import hyper, linear, reuse, softmax_free

pytestmark = pytest.mark.table
RANDOM_KEY = jax.random.key(0)
B, T, N, K, H, V = 2, 7, 4, 2, 4, 3


def twice(x):
    return jnp.repeat(x, N // K, axis=-2)


def follow(q, k, v, w, **options):
    _, shared = reuse.unified_softmax_attention(q, k, v, key_where=w, **options)
    return reuse.reuse_softmax_attention(shared, v[..., 2:0:-1] - v[..., :2])


def offsets(heads, sign):
    return jnp.sin(jnp.arange(heads * 5.0).reshape(heads, 5) * sign + 1).astype(jnp.float32)


def urpe(q, k, v, w, **options):
    heads = q.shape[-2]
    return reuse.urpe_attention(
        q, k, v, offsets(heads, 1), bias=offsets(heads, -1), key_where=w, block_size=3, **options
    )


small = dict(random_key=RANDOM_KEY, block_size=2, sample_size=3, min_seq_len=3, bits=3)
CASES = {
    "linear": lambda q, k, v, w: linear.linear_attention(q, k, v, key_where=w),
    "linear causal": lambda q, k, v, w: linear.linear_attention(
        q, k, v, key_where=w, is_causal=True, block_size=3
    ),
    "mala": lambda q, k, v, w: linear.magnitude_aware_linear_attention(q, k, v, key_where=w),
    "mala paper causal": lambda q, k, v, w: linear.magnitude_aware_linear_attention(
        q, k, v, form="paper", key_where=w, is_causal=True, block_size=3
    ),
    "lightning": lambda q, k, v, w: linear.lightning_attention(
        q, twice(k), twice(v), slopes=linear.lightning_slopes(q.shape[-2]), where=w, block_size=3
    ),
    "softmax free": lambda q, k, v, w: softmax_free.softmax_free_attention(
        q, twice(v), landmarks=jnp.cos(q[..., :3, :, :]), where=w
    ),
    "softmax free symmetric": lambda q, k, v, w: softmax_free.softmax_free_attention(
        q, twice(v), landmarks=jnp.cos(q[..., :3, :, :]), where=w, symmetric=True
    ),
    "gaussian": lambda q, k, v, w: softmax_free.gaussian_kernel_attention(q, k, v, key_where=w),
    "gaussian normalized causal": lambda q, k, v, w: softmax_free.gaussian_kernel_attention(
        q, k, v, key_where=w, is_causal=True, normalize=True
    ),
    "hyper": lambda q, k, v, w: hyper.hyper_attention(q, k, v, key_where=w, **small),
    "hyper causal": lambda q, k, v, w: hyper.hyper_attention(q, k, v, key_where=w, is_causal=True, **small),
    "scatterbrain": lambda q, k, v, w: hyper.scatterbrain_attention(
        q, k, v, random_key=RANDOM_KEY, window=2, key_where=w, num_features=6
    ),
    "scatterbrain causal": lambda q, k, v, w: hyper.scatterbrain_attention(
        q, k, v, random_key=RANDOM_KEY, window=1, key_where=w, num_features=6, is_causal=True
    ),
    "unified": lambda q, k, v, w: reuse.unified_softmax_attention(q, k, v, key_where=w)[0],
    "reused": follow,
    "reused causal": lambda q, k, v, w: follow(q, k, v, w, is_causal=True),
    "urpe": urpe,
    "urpe causal": lambda q, k, v, w: urpe(q, k, v, w, is_causal=True),
    "top k": lambda q, k, v, w: reuse.top_k_attention(q, k, v, k=3, key_where=w),
    "log mass": lambda q, k, v, w: reuse.long_context_log_mass(q, k, key_where=w)[..., None],
    "ngram": lambda q, k, v, w: (
        reuse.ngram_attention(
            jnp.asarray(np.arange(q.shape[-3]) % 3).astype(jnp.int32) * jnp.ones(q.shape[:-2], jnp.int32),
            v[..., 0, :],
            n=3,
            where=w,
            block_size=3,
        ).output
    ),
}
RANDOM = ("hyper", "hyper causal", "scatterbrain", "scatterbrain causal")
cases = pytest.mark.parametrize("name", CASES)


def arrays(seed=0, dtype=np.float64, length=T, batch=(B,)):
    rng = np.random.default_rng(seed)
    shapes = (*batch, length, N, H), (*batch, length, K, H), (*batch, length, K, V)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


@functools.cache
def program(name):
    """Value, cotangents and tangent."""

    def both(qkv, w, tangents, seed):
        f = lambda *qkv: CASES[name](*qkv, w)
        out, tangent = jax.jvp(f, qkv, tangents)
        cotangent = jnp.cos(seed + jnp.arange(out.size)).reshape(out.shape)
        # Fully masked, the logarithm of a mass is -inf.
        return out, tangent, cotangent, jax.vjp(f, *qkv)[1](jnp.where(jnp.isfinite(out), cotangent, 0))

    return jax.jit(both)


@functools.cache
def value(name):
    return jax.jit(CASES[name])


@functools.cache
def mapped(name):
    return jax.jit(jax.vmap(CASES[name]))


ALL = np.ones((B, T), bool)
SOME = np.array([[True] * 5 + [False] * 2, [True, False, True, True, False, True, True]])


@cases
def test_derivatives_are_those_of_finite_differences(name, x64):
    x, d, step = arrays(), arrays(1), 1e-6
    for mask in (ALL, SOME):
        out, tangent, cotangent, grads = program(name)(tuple(x), mask, tuple(d), 0.3)
        plus, minus = ([a + sign * step * b for a, b in zip(x, d)] for sign in (1, -1))
        difference = (value(name)(*plus, mask) - value(name)(*minus, mask)) / (2 * step)
        near(tangent, difference, 1e-6)
        near(sum(np.vdot(g, b) for g, b in zip(grads, d)), np.vdot(cotangent, tangent), 1e-8)
        assert np.isfinite(out).all()


@cases
def test_what_is_masked_does_not_exist(name, x64):
    x, d = arrays(), tuple(arrays(1))
    q, k, v = x
    hide = ~SOME[..., None, None]
    clean = program(name)((q, k, v), SOME, d, 0.3)
    poisoned = [np.where(hide, np.nan, a) for a in (q, k, v)]
    if name in ("lightning", "softmax free", "softmax free symmetric"):  # the mask is that of all tokens
        if name != "lightning":
            poisoned[0] = np.where(hide & (np.arange(T)[:, None, None] >= 3), np.nan, q)
    else:
        poisoned[0] = q
    dirty = program(name)(tuple(poisoned), SOME, d, 0.3)
    near(dirty[0], clean[0])
    for g, h in zip(dirty[3], clean[3]):
        near(g, h)
    for g in dirty[3][1:]:
        assert not np.any(np.where(hide, g, 0))
    if name not in ("hyper", "hyper causal"):  # which draw by length
        short = [a[:1, :5] for a in x]
        near(value(name)(*short, np.ones((1, 5), bool)), clean[0][:1, :5])
        assert not np.allclose(clean[0], value(name)(*x, ALL))


@cases
def test_fully_masked_gives_zero_output_and_gradients(name, x64):
    x, d = arrays(), arrays(1)
    out, tangent, _, grads = program(name)(tuple(x), np.zeros((B, T), bool), tuple(d), 0.3)
    assert np.all(out == (-np.inf if name == "log mass" else 0))
    for g in (tangent, *grads):
        assert not np.any(g)


@cases
def test_vmap_is_a_loop(name, x64):
    x = arrays(batch=(B, 2))
    masks = np.stack([SOME, ALL])
    near(mapped(name)(*x, masks), np.stack([value(name)(*(a[i] for a in x), masks[i]) for i in range(B)]))


@pytest.mark.parametrize("name", ["gaussian", "reused", "top k", "unified"])
def test_no_mask_is_a_mask_of_ones(name, x64):
    near(jax.jit(lambda *x: CASES[name](*x, None))(*arrays()), value(name)(*arrays(), ALL))


@cases
def test_half_precision_is_summed_in_single(name):
    half = [jnp.asarray(a, jnp.bfloat16) for a in arrays()]
    out = value(name)(*half, SOME)
    single = value(name)(*(a.astype(jnp.float32) for a in half), SOME)
    assert out.dtype == (jnp.float32 if name == "log mass" else jnp.bfloat16) and single.dtype == jnp.float32
    near(out.astype(jnp.float32), single, 2.0**-8)
    if name not in RANDOM:
        with float64():
            exact = value(name)(*(np.asarray(a.astype(jnp.float32), np.float64) for a in half), SOME)
        near(single, exact, 2e-5)


def sizes_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes_of(inner)


@cases
def test_nothing_of_the_size_of_the_scores_is_stored(name):
    length = 4096
    query = jax.ShapeDtypeStruct((length, 2, 4), jnp.float32)
    key = value = jax.ShapeDtypeStruct((length, 1, 4), jnp.float32)
    f = CASES[name]
    if name.startswith("hyper"):
        options = dict(
            random_key=RANDOM_KEY, min_seq_len=512, block_size=64, sample_size=64, is_causal="causal" in name
        )
        f = lambda q, k, v, w: hyper.hyper_attention(q, k, v, key_where=w, **options)
    gradient = jax.grad(lambda *qkv: f(*qkv, None).sum(), argnums=(0, 1, 2))
    assert max(sizes_of(jax.make_jaxpr(gradient)(query, key, value).jaxpr)) < length * length // 4


# --- linear attention --------------------------------------------------------------------------------------------

Q2 = [[0.5, -1], [2, 1]]
K3 = [[1, 0.5], [-0.5, 0.3], [0.2, -2]]
V3 = [[1, 0], [0, 1], [2, 2]]


def one_head(*xs):
    return [jnp.asarray(x, float)[:, None] for x in xs]


def weights_of(attend, q, k, **options):
    """The weights, read off as the output for identity values."""
    q, k = one_head(q, k)
    return attend(q, k, jnp.eye(k.shape[0])[:, None], **options)[:, 0]


def test_worked_numbers_of_linear_attention(x64):
    mala = linear.magnitude_aware_linear_attention
    near(weights_of(linear.linear_attention, Q2, K3)[0], [0.523123, 0.204435, 0.272442], 1e-6)
    paper = [[1.811727, -0.670741, -0.140986], [3.757103, -1.088217, -1.668886]]
    near(weights_of(mala, Q2, K3, form="paper"), paper, 1e-6)
    released = [[0.826849, -0.001846, 0.174996], [1.283393, -0.061132, -0.222261]]
    near(weights_of(mala, Q2, K3), released, 1e-6)
    out = mala(*one_head(Q2, K3, V3), form="paper")[:, 0]
    near(out, [[1.529755, -0.952713], [0.419331, -4.425989]], 1e-6)


def phi(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def rotation(x):
    """Rotates pairs of features by their position; as a rotary embedding, but with one angle."""
    xp = np if isinstance(x, np.ndarray) else jnp
    angle = np.arange(x.shape[-3])[:, None, None] * 0.3
    a, b = x[..., ::2], x[..., 1::2]
    turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    return xp.concatenate(turned, axis=-1)


def dense_linear(q, k, v, *, form, causal, rotate):
    """The formulas by loops over batch, heads and queries."""
    fq, fk = phi(q), phi(k)
    rq, rk = (rotation(fq), rotation(fk)) if rotate else (fq, fk)
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, i, h in np.ndindex(q.shape[:-1]):
        g, seen = h // (q.shape[-2] // k.shape[-2]), slice(0, i + 1 if causal else k.shape[1])
        n = len(range(k.shape[1])[seen])
        mass = fq[b, i, h] @ fk[b, seen, g].sum(0)
        products = rk[b, seen, g] @ rq[b, i, h]
        if form == "plain":
            weights = products / mass
        elif form == "paper":
            weights = (1 + 1 / mass) * products - mass / n
        else:
            z = mass / n / np.sqrt(q.shape[-1])
            weights = (1 + 1 / (z + 1e-6)) * products / n / np.sqrt(q.shape[-1]) - z / n
        out[b, i, h] = weights @ v[b, seen, g]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["plain", "paper", "released"])
def test_linear_attention_is_its_formula(form, causal, x64):
    q, k, v = arrays()
    for size in (1, 4, 100) if causal else (256,):
        options = dict(is_causal=causal, block_size=size)
        if form == "plain":
            near(
                linear.linear_attention(q, k, v, **options),
                dense_linear(q, k, v, form=form, causal=causal, rotate=False),
            )
            continue
        for rotate in (None, rotation):
            out = linear.magnitude_aware_linear_attention(q, k, v, form=form, rotate=rotate, **options)
            near(out, dense_linear(q, k, v, form=form, causal=causal, rotate=rotate is not None))


def test_only_the_magnitude_aware_weights_depend_on_the_magnitude(x64):
    q, k = np.array(Q2), np.array(K3)
    features = lambda x: jnp.exp(x)  # so that q + log 3 has three times the features
    plain = functools.partial(weights_of, linear.linear_attention, feature_map=features)
    near(plain(q + np.log(3), k), plain(q, k))
    aware = functools.partial(
        weights_of, linear.magnitude_aware_linear_attention, feature_map=features, form="paper"
    )
    assert np.all(np.std(aware(q + np.log(3), k), axis=-1) > np.std(aware(q, k), axis=-1))
    near(aware(q, k).sum(-1), 1)


def test_features_keep_their_precision_far_below_0():
    x = jnp.array([-30.0, -1.0, 0.0, 2.0])
    np.testing.assert_allclose(linear.positive_features(x), [np.exp(-30.0), np.exp(-1.0), 1, 3], rtol=1e-6)


# --- lightning attention -------------------------------------------------------------------------------------------


def dense_lightning(q, k, v, slopes):
    t = np.arange(q.shape[1])
    decay = np.where(t[:, None] >= t, np.exp(-slopes[:, None, None] * (t[:, None] - t)), 0)
    return np.einsum("bthd,bshd,hts,bshv->bthv", q, k, decay, v)


def test_worked_numbers_of_lightning_attention(x64):
    q, k, v = one_head([[1, 0], [0, 1], [1, 1]], [[1, 1], [0, 1], [1, 0]], [[1, 0], [0, 1], [2, 1]])
    out = linear.lightning_attention(q, k, v, slopes=jnp.array([0.5]))
    near(out[:, 0], [[1, 0], [0.606531, 1], [2.735759, 1.606531]], 1e-6)
    np.testing.assert_allclose(linear.lightning_slopes(8), 1.00001 * 2.0 ** -np.arange(1, 9), rtol=1e-6)
    last = linear.lightning_slopes(4, layer=7, num_layers=8)
    np.testing.assert_allclose(last, (1 - 7 / 7.00001 + 1e-5) * 4.0 ** -np.arange(1, 5), rtol=1e-6)


def test_lightning_attention_is_its_formula_for_every_block_size_and_split(x64):
    q, k, v = arrays()
    k, v = np.asarray(twice(k)), np.asarray(twice(v))
    slopes = np.array([0.5, 0.1, 0.0, 2.0])
    exact = dense_lightning(q, k, v, slopes)
    for size in (1, 3, 7, 256):
        out, state = linear.lightning_attention(q, k, v, slopes=slopes, block_size=size, return_state=True)
        near(out, exact)
        age = np.exp(-slopes[:, None] * (T - 1 - np.arange(T)))
        near(state, np.einsum("ht,bthd,bthv->bhdv", age, k, v))
    state, parts = None, []
    for cut in (slice(0, 4), slice(4, 5), slice(5, 7)):
        out, state = linear.lightning_attention(
            q[:, cut],
            k[:, cut],
            v[:, cut],
            slopes=slopes,
            initial_state=state,
            return_state=True,
            block_size=2,
        )
        parts.append(out)
    near(np.concatenate(parts, 1), exact)


def test_time_passes_over_padding(x64):
    q, k, v = arrays()
    k, v, slopes = np.asarray(twice(k)), np.asarray(twice(v)), np.array([0.5, 0.1, 0.0, 2.0])
    keep = SOME[..., None, None]
    out = linear.lightning_attention(q, k, v, slopes=slopes, where=SOME, block_size=3)
    near(out, np.where(keep, dense_lightning(q, k * keep, v * keep, slopes), 0))


def test_slopes_and_initial_state_have_gradients(x64):
    q, k, v = arrays()
    k, v, slopes = twice(k), twice(v), np.array([0.5, 0.1, 0.2, 1.0])
    state = np.random.default_rng(3).standard_normal((B, N, H, V))

    def f(slopes, state):
        out = linear.lightning_attention(q, k, v, slopes=slopes, initial_state=state, block_size=3)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    grads, step = jax.jit(jax.grad(f, argnums=(0, 1)))(slopes, state), 1e-6
    f = jax.jit(f)
    for h in range(N):
        d = step * np.eye(N)[h]
        near(grads[0][h], (f(slopes + d, state) - f(slopes - d, state)) / (2 * step), 1e-6)
    d = np.sin(np.arange(state.size)).reshape(state.shape)
    near(np.vdot(grads[1], d), (f(slopes, state + step * d) - f(slopes, state - step * d)) / (2 * step), 1e-6)


def test_lightning_attention_is_that_of_transformers(x64):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=8, num_attention_heads=2, head_dim=4, num_hidden_layers=3, block_size=4,
        layer_types=["linear_attention"] * 3,
    )  # fmt: skip
    layer = modeling.MiniMaxLightningAttention(config, layer_idx=1).double()
    slopes = linear.lightning_slopes(2, layer=1, num_layers=3)
    np.testing.assert_allclose(slopes, layer.slope_rate.flatten().numpy(), rtol=1e-6)
    # Leave out what is around the attention: the norm, the gate, the last projection.
    layer.norm, layer.out_proj = torch.nn.Identity(), torch.nn.Identity()
    torch.nn.init.zeros_(layer.output_gate.weight)  # a gate of 1/2
    x = torch.tensor(np.random.default_rng(0).standard_normal((2, 11, 8)))
    mask = np.ones((2, 11), bool)
    mask[1, :3] = False  # the padding is on the left
    with torch.no_grad():
        theirs = 2 * layer(x, None, torch.tensor(mask))[0].numpy()
        qkv = jax.nn.silu(jnp.asarray(layer.qkv_proj(x).numpy())).reshape(2, 11, 2, 12)
    ours = linear.lightning_attention(
        *jnp.split(qkv, 3, axis=-1), slopes=layer.slope_rate.flatten().numpy(), where=mask, block_size=4
    )
    near(ours.reshape(2, 11, 8), theirs, 1e-6)  # their decay is in float32


# --- bad input -----------------------------------------------------------------------------------------------------

X = jnp.zeros((3, 2, 4))
BAD = [
    (lambda: linear.linear_attention([1.0], X, X), TypeError, "query must be an array of floating dtype"),
    (lambda: linear.linear_attention(X[0], X, X), ValueError, "query must have shape"),
    (lambda: linear.linear_attention(X, X[..., :3], X), ValueError, "key must have shape"),
    (lambda: linear.linear_attention(X, X, X[:2]), ValueError, "value must have shape"),
    (lambda: linear.linear_attention(X, jnp.zeros((3, 3, 4)), jnp.zeros((3, 3, 4))), ValueError, "multiple of"),
    (lambda: linear.linear_attention(X[:2], X, X, is_causal=True), ValueError, "length 2"),
    (lambda: linear.linear_attention(X, X, X, is_causal=1), TypeError, "is_causal must be True or False"),
    (lambda: linear.linear_attention(X, X, X, key_where=jnp.ones(3)), TypeError, "key_where must be a boolean"),
    (lambda: linear.linear_attention(X, X, X, key_where=jnp.ones((2, 3), bool)), ValueError, "key_where must have"),
    (lambda: linear.linear_attention(X, X, X, feature_map=1), TypeError, "feature_map must be a function"),
    (lambda: linear.linear_attention(X, X, X, block_size=0), ValueError, "block_size"),
    (lambda: linear.magnitude_aware_linear_attention(X, X, X, form="code"), ValueError, "form must be one of"),
    (lambda: linear.magnitude_aware_linear_attention(X, X, X, form="paper", scale=1.0), ValueError, "scale must"),
    (lambda: linear.lightning_slopes(0), ValueError, "num_heads"),
    (lambda: linear.lightning_slopes(4, layer=1), ValueError, "layer"),
    (lambda: linear.lightning_attention(X, X[:2], X[:2], slopes=jnp.ones(2)), ValueError, "key must have shape"),
    (lambda: linear.lightning_attention(X, X, X, slopes=jnp.ones(3)), ValueError, "slopes must have shape"),
    (lambda: linear.lightning_attention(X, X, X, slopes=jnp.ones(2), where=jnp.ones(3)), TypeError, "^where must"),
    (
        lambda: linear.lightning_attention(X, X, X, slopes=jnp.ones(2), initial_state=jnp.ones((2, 4, 3))),
        ValueError,
        "initial_state must have shape",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[m for *_, m in BAD])
def test_bad_input_says_what_was_expected(call, error, match):
    with pytest.raises(error, match=match):
        call()
