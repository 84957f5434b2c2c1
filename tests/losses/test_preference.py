"""Losses of preference optimization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float64
from helpers import close, sigmoid
from jax.test_util import check_grads

import jaxsoft
from jaxsoft import losses

RNG = np.random.default_rng(0)
PAIRS = (2, 3)
CHOSEN, REJECTED, REF_W, REF_L, EXTRA, EXTRA2 = (RNG.normal(-2, 1.5, size=PAIRS) for _ in range(6))
FOUR = [CHOSEN, REJECTED, REF_W, REF_L]
MEANS = [-0.05 - np.abs(a) for a in (CHOSEN, REJECTED)]  # mean log-probabilities
RATES = [RNG.random(PAIRS) for _ in range(2)]
DPO = losses.dpo_loss


def softplus(x):
    return np.logaddexp(x, 0)


# Every loss: the function, its arguments, how many of them have a gradient (`WITH_GRADIENT`), its formula in NumPy.
WITH_GRADIENT = {1: [0], 2: [0, 1], 3: [0, 1, 2], 5: [0, 1, 4]}


def reference(function):
    """A formula of the two log-ratios and any further arguments."""
    return lambda w, l, rw, rl, *more: function(w - rw, l - rl, *more)


def smoothed(right, wrong):
    return reference(lambda w, l: right * softplus(-0.3 * (w - l)) + wrong * softplus(0.3 * (w - l)))


def f_dpo(f):
    return reference(lambda w, l: softplus(-0.3 * (f(np.exp(w)) - f(np.exp(l)))))


def soft(scale):
    def loss(w, l, a, b):
        p = sigmoid(scale * (a - b))
        return p * softplus(-0.3 * (w - l)) + (1 - p) * softplus(0.3 * (w - l))

    return reference(loss)


def kind_of_dpo(kind, formula, baseline=0.0):
    """A kind of DPO, with its formula of the two rewards."""
    loss = functools.partial(DPO, beta=0.3, kind=kind, baseline=baseline)
    return loss, FOUR, 2, reference(lambda w, l: formula(0.3 * (w - baseline), 0.3 * (l - baseline)))


def judged(kind, phi):
    """KTO with arrays of floats for all its arguments: what is above -2 is desirable."""

    def loss(log_prob, ref, judge, baseline, **options):
        options |= dict(desirable_weight=1.5, undesirable_weight=0.7, beta=0.3, kind=kind)
        return losses.kto_loss(log_prob, ref, judge > -2, baseline=baseline, **options)

    def formula(log_prob, ref, judge, baseline):
        u = 0.3 * (log_prob - ref - baseline)
        return np.where(judge > -2, 1.5 * phi(u), 0.7 * phi(-u))

    return loss, [CHOSEN, REF_W, EXTRA, EXTRA2], 1, formula


def orpo(beta):
    def loss(w, l, nll=None):
        odds = np.exp(w) / (1 - np.exp(w)) * (1 - np.exp(l)) / np.exp(l)
        return (-w if nll is None else nll) - beta * np.log(odds / (1 + odds))

    return loss


F_DPO = functools.partial(losses.f_dpo_loss, beta=0.3)
CASES = {
    "sigmoid": (functools.partial(DPO, beta=0.3), FOUR, 2, smoothed(1, 0)),
    "conservative": (functools.partial(DPO, beta=0.3, label_smoothing=0.2), FOUR, 2, smoothed(0.8, 0.2)),
    "robust": (
        functools.partial(DPO, beta=0.3, kind="robust", label_smoothing=0.2),
        FOUR,
        2,
        smoothed(0.8 / 0.6, -0.2 / 0.6),
    ),
    "hinge": (
        functools.partial(DPO, beta=0.3, kind="hinge"),
        FOUR,
        2,
        reference(lambda w, l: np.maximum(1 - 0.3 * (w - l), 0)),
    ),
    "ipo": (
        functools.partial(DPO, beta=0.3, kind="ipo"),
        FOUR,
        2,
        reference(lambda w, l: (w - l - 1 / 0.6) ** 2),
    ),
    "sppo": (
        functools.partial(DPO, beta=0.3, kind="sppo_hard"),
        FOUR,
        2,
        reference(lambda w, l: (w - 1 / 0.6) ** 2 + (l + 1 / 0.6) ** 2),
    ),
    "reverse_kl": (F_DPO, FOUR, 2, f_dpo(lambda u: np.log(u) + 1)),
    "forward_kl": (functools.partial(F_DPO, divergence="forward_kl"), FOUR, 2, f_dpo(lambda u: -1 / u)),
    "jensen_shannon": (
        functools.partial(F_DPO, divergence="jensen_shannon"),
        FOUR,
        2,
        f_dpo(lambda u: np.log(2 * u / (1 + u))),
    ),
    "alpha": (
        functools.partial(F_DPO, divergence="alpha", alpha=0.7),
        FOUR,
        2,
        f_dpo(lambda u: (1 - u**-0.7) / 0.7),
    ),
    "simpo": (losses.simpo_loss, FOUR[:2], 2, lambda w, l: softplus(-(2 * (w - l) - 0.5))),
    "simpo_smooth": (
        functools.partial(losses.simpo_loss, beta=3.0, gamma_beta_ratio=0.4, label_smoothing=0.1),
        FOUR[:2],
        2,
        lambda w, l: 0.9 * softplus(-3 * (w - l - 0.4)) + 0.1 * softplus(3 * (w - l - 0.4)),
    ),
    "simpo_hinge": (
        functools.partial(losses.simpo_loss, kind="hinge"),
        FOUR[:2],
        2,
        lambda w, l: np.maximum(1 - 2 * (w - l - 0.25), 0),
    ),
    "xpo": (
        functools.partial(losses.xpo_loss, beta=0.3, alpha=0.05),
        [*FOUR, EXTRA],
        5,
        reference(lambda w, l, sample: softplus(-0.3 * (w - l)) + 0.05 * sample),
    ),
    "xpo_ipo": (
        functools.partial(losses.xpo_loss, beta=0.3, alpha=0.05, kind="ipo"),
        [*FOUR, EXTRA],
        5,
        reference(lambda w, l, sample: (w - l - 1 / 0.6) ** 2 + 0.05 * sample),
    ),
    "mmpo": (
        functools.partial(losses.margin_matching_loss, bt_beta=1.3, beta=0.3),
        [*FOUR, EXTRA, EXTRA2],
        2,
        soft(1.3),
    ),
    "dno": (functools.partial(losses.direct_nash_loss, eta=1.5, beta=0.3), [*FOUR, *RATES], 2, soft(1.5)),
    "nca": kind_of_dpo("nca", lambda w, l: softplus(-w) + softplus(w) / 2 + softplus(l) / 2),
    "bco": kind_of_dpo("bco", lambda w, l: softplus(-w) + softplus(l), baseline=0.4),
    "apo_zero": kind_of_dpo("apo_zero", lambda w, l: 1 - sigmoid(w) + sigmoid(l)),
    "apo_down": kind_of_dpo("apo_down", lambda w, l: sigmoid(w) + 1 - sigmoid(w - l)),
    "kto": judged("kto", lambda u: 1 - sigmoid(u)),
    "bco, unpaired": judged("bco", lambda u: softplus(-u)),
    "cpo": (
        functools.partial(losses.cpo_loss, beta=0.3, label_smoothing=0.1),
        FOUR[:2],
        2,
        lambda w, l: 0.9 * softplus(-0.3 * (w - l)) + 0.1 * softplus(0.3 * (w - l)) - w,
    ),
    "cpo_ipo": (
        functools.partial(losses.cpo_loss, beta=0.3, alpha=0.5, kind="ipo"),
        [*FOUR[:2], EXTRA],
        3,
        lambda w, l, nll: (w - l - 1 / 0.6) ** 2 + 0.5 * nll,
    ),
    "orpo": (losses.orpo_loss, MEANS, 2, orpo(0.1)),
    "orpo_nll": (functools.partial(losses.orpo_loss, beta=0.4), [*MEANS, EXTRA], 3, orpo(0.4)),
}
every = pytest.mark.parametrize("name", CASES)


def arrays(given, dtype=jnp.float32):
    return [jnp.asarray(a, dtype) for a in given]


@every
def test_formula_jit_and_vmap(name):
    loss, given, _, formula = CASES[name]
    values = loss(*arrays(given))
    assert values.shape == PAIRS and values.dtype == jnp.float32
    close(values, formula(*given), 1e-5)
    close(jax.jit(loss)(*arrays(given)), values)
    close(jax.jit(jax.vmap(loss, in_axes=1, out_axes=1))(*arrays(given)), values)
    one = loss(*(jnp.asarray(a[1, 2], jnp.float32) for a in given))
    assert one.shape == ()
    close(one, values[1, 2])


@every
def test_gradient(name, x64):
    loss, given, free, formula = CASES[name]
    given = arrays(given, jnp.float64)
    close(loss(*given), formula(*map(np.asarray, given)), 1e-12)
    assert loss(*given).dtype == jnp.float64
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=PAIRS))
    with_gradient = WITH_GRADIENT[free]

    @jax.jit
    def total(*some):
        full = list(given)
        for i, a in zip(with_gradient, some):
            full[i] = a
        return jnp.vdot(cotangent, loss(*full))

    check_grads(total, [given[i] for i in with_gradient], 1, modes=["fwd", "rev"])
    gradients = jax.jit(jax.grad(lambda given: jnp.vdot(cotangent, loss(*given))))(given)
    assert [bool(np.any(g)) for g in gradients] == [i in with_gradient for i in range(len(given))]


@every
def test_masks_and_weights(name):
    loss, given, _, _ = CASES[name]
    where = jnp.array([[True, False, True], [True, True, False]])
    weights = jnp.array([[0.5, 1.0, 0.0], [2.0, 1.0, 3.0]])
    plain, every_one = arrays(given), tuple(range(len(given)))

    @jax.jit
    def run(given):
        def total(*given):
            return jnp.sum(jnp.sin(loss(*given, where=where, weights=weights)))

        return jax.grad(total, every_one)(*given), loss(*given, where=where, weights=weights)

    _, clean = run(plain)
    close(clean, jnp.where(where, weights * loss(*plain), 0))
    for hole in (jnp.nan, jnp.inf, -jnp.inf):
        gradients, values = run([jnp.where(where, a, hole) for a in plain])
        close(values, clean)
        for g in gradients:
            assert not np.any(np.asarray(g)[~np.asarray(where)])
            assert np.all(np.isfinite(g))
    nothing = jax.jit(jax.grad(lambda a: jnp.sum(loss(a, *plain[1:], where=jnp.zeros((), bool)))))
    assert not np.any(nothing(jnp.full(PAIRS, jnp.nan)))
    hidden = loss(*[a.at[0, 2].set(jnp.nan) for a in plain], weights=weights)
    assert hidden[0, 2] == 0 and np.all(np.isfinite(hidden))


@every
def test_low_precision_and_large_numbers(name):
    loss, given, _, formula = CASES[name]
    low = arrays(given, jnp.bfloat16)
    values = loss(*low)
    assert values.dtype == jnp.float32
    close(values, formula(*(np.asarray(a, np.float64) for a in low)), 1e-5)
    signs = np.array([1, -1]) * 1e4
    far = [jnp.asarray(np.where(i % 2, signs, -signs), jnp.float32) for i in range(len(given))]
    value, gradient = jax.jit(jax.value_and_grad(lambda w: jnp.sum(loss(w, *far[1:]))))(far[0])
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_worked_numbers(x64):
    pair = arrays([[0.8], [-0.5], [0.0], [0.0]], jnp.float64)
    close(DPO(*pair), 0.630258)
    close(DPO(*pair, kind="hinge"), 0.87)
    close(DPO(*pair, kind="ipo"), 13.69)
    close(DPO(*pair, label_smoothing=0.1), 0.643258)
    close(DPO(*pair, kind="robust", label_smoothing=0.1), 0.614008)
    close(DPO(*pair, kind="sppo_hard"), 37.89)
    close(losses.f_dpo_loss(*pair, divergence="forward_kl"), 0.634975)
    close(losses.f_dpo_loss(*pair, divergence="jensen_shannon"), 0.663453)
    close(losses.f_dpo_loss(*pair, divergence="alpha"), 0.633659)
    close(losses.simpo_loss(*arrays([-0.9, -1.4], jnp.float64)), 0.474077)
    rates = arrays([[0.7], [0.4]], jnp.float64)
    close(losses.direct_nash_loss(*pair, *rates), 0.685581)
    scores = arrays([[3.0], [2.0]], jnp.float64)
    close(losses.margin_matching_loss(*pair, *scores, bt_beta=1.0), 0.665221)
    close(losses.xpo_loss(*pair, jnp.array([-30.0])), 0.629958)


def test_limits(x64):
    four = arrays(FOUR, jnp.float64)
    dpo = DPO(*four)
    sure = jnp.full(PAIRS, 1e4)
    close(losses.margin_matching_loss(*four, sure, 0 * sure, bt_beta=1.0), dpo, 1e-14)
    swapped = losses.margin_matching_loss(*four, 0 * sure, sure, bt_beta=1.0)
    close(swapped, DPO(four[1], four[0], four[3], four[2]), 1e-14)
    close(losses.f_dpo_loss(*four), dpo, 1e-14)
    close(losses.f_dpo_loss(*four, divergence="alpha", alpha=1e-6), dpo, 1e-5)
    forward = losses.f_dpo_loss(*four, divergence="forward_kl")
    close(losses.f_dpo_loss(*four, divergence="alpha", alpha=1.0), forward, 1e-14)
    close(DPO(*four, kind="robust"), dpo, 0)
    close(losses.xpo_loss(*four, four[0], alpha=0.0), dpo, 0)
    zeros = [jnp.zeros(PAIRS)] * 2
    plain = losses.simpo_loss(*four[:2], beta=0.1, gamma_beta_ratio=0.0)
    close(plain, DPO(*four[:2], *zeros), 1e-14)
    equal = jnp.full(PAIRS, 0.3)
    even = losses.direct_nash_loss(*four, equal, equal)
    close(even, (dpo + DPO(four[1], four[0], four[3], four[2])) / 2, 1e-14)
    # KTO of both responses is a kind of DPO, and CPO is DPO with a flat reference.
    for single, kind in (("kto", "apo_zero"), ("bco", "bco")):
        one = functools.partial(losses.kto_loss, baseline=0.3, kind=single)
        yes, no = jnp.ones(PAIRS, bool), jnp.zeros(PAIRS, bool)
        pair = DPO(*four, kind=kind, baseline=0.3)
        close(one(four[0], four[2], yes) + one(four[1], four[3], no), pair, 1e-12)
    flat = DPO(*four[:2], *zeros, kind="hinge")
    close(losses.cpo_loss(*four[:2], alpha=0.0, kind="hinge"), flat, 1e-14)
    for kind in ("sigmoid", "hinge", "ipo", "sppo_hard", "nca", "bco", "apo_zero", "apo_down"):
        # Smoothing swaps the pair.
        both = DPO(*four, kind=kind), DPO(four[1], four[0], four[3], four[2], kind=kind)
        close(DPO(*four, kind=kind, label_smoothing=0.3), 0.7 * both[0] + 0.3 * both[1], 1e-12)
    # Robust DPO is unbiased: over labels that are wrong with probability e its mean is the clean loss.
    robust = functools.partial(DPO, kind="robust", label_smoothing=0.3)
    mean = 0.7 * robust(*four) + 0.3 * robust(four[1], four[0], four[3], four[2])
    close(mean, dpo, 1e-12)


def test_minimum_of_margin_matching(x64):
    gap, zero = jnp.array(0.8), jnp.array(0.0)

    def loss(w):
        return losses.margin_matching_loss(w, zero, zero, zero, gap, zero, bt_beta=1.5, beta=0.2)

    w = 1.5 * gap / 0.2
    close(jax.jit(jax.grad(loss))(w), 0, 1e-14)
    assert jax.jit(jax.grad(jax.grad(loss)))(w) > 0


def test_impossible_responses():
    zero = jnp.zeros(())
    value, gradient = jax.value_and_grad(lambda l: DPO(zero, l, zero, zero))(jnp.array(-jnp.inf))
    assert value == 0 and gradient == 0
    assert DPO(jnp.array(-jnp.inf), zero, zero, zero) == jnp.inf
    value, gradient = jax.value_and_grad(
        lambda w: losses.f_dpo_loss(w, zero, zero, zero, divergence="forward_kl")
    )(jnp.array(-1000.0))
    assert np.isfinite(value) and value > 1e30 and np.isfinite(gradient)  # exponents are clamped


def test_odds_of_certain_responses():
    """A response without tokens has the mean log-probability 0, whose odds are infinite."""
    loss = jax.value_and_grad(lambda w, l: losses.orpo_loss(w, l), (0, 1))
    for w, l in ((0.0, -1.0), (-1.0, 0.0), (-1e-6, -1e-5), (-50.0, -1.0), (-jnp.inf, -1.0)):
        value, gradients = jax.jit(loss)(jnp.float32(w), jnp.float32(l))
        assert np.all(np.isfinite(gradients)) and np.isfinite(value) == (w > -jnp.inf)
    m = -np.float64(np.float32(1e-5))
    near_one = losses.orpo_loss(jnp.float32(m), jnp.float32(-1.0), beta=1.0)
    np.testing.assert_allclose(near_one + m, orpo(1.0)(m, -1.0) + m, rtol=1e-5)


def test_traced_hyper_parameters():
    four = arrays(FOUR)
    run = jax.jit(lambda b, e: DPO(*four, beta=b, label_smoothing=e, kind="robust"))
    close(run(0.2, 0.1), DPO(*four, beta=0.2, kind="robust", label_smoothing=0.1))
    run = jax.jit(lambda b: DPO(*four, beta=0.2, kind="bco", baseline=b))
    close(run(0.5), DPO(*four, beta=0.2, kind="bco", baseline=0.5))
    run = jax.jit(lambda a: losses.f_dpo_loss(*four, divergence="alpha", alpha=a))
    close(run(0.3), losses.f_dpo_loss(*four, divergence="alpha", alpha=0.3))


def test_sequence_log_prob(x64):
    x = RNG.normal(size=(2, 3, 4))
    where = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    sums = np.where(where, x, 0).sum(-1)
    hidden = jnp.asarray(np.where(where, x, np.nan))
    for reduction, expected in (("sum", sums), ("mean", sums / np.array([3, 1, 1]))):
        function = functools.partial(losses.sequence_log_prob, where=jnp.asarray(where), reduction=reduction)
        values, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(function(x) ** 2)))(hidden)
        close(function(hidden), expected, 1e-14)
        close(values, (expected**2).sum(), 1e-12)
        assert not np.any(np.asarray(gradient)[:, ~where]) and np.all(np.isfinite(gradient))
        close(jax.jit(jax.vmap(function))(hidden), expected, 1e-14)
    close(losses.sequence_log_prob(jnp.asarray(x), reduction="mean"), x.mean(-1), 1e-14)
    assert losses.sequence_log_prob(jnp.ones((2, 0)), reduction="mean").tolist() == [0, 0]
    assert losses.sequence_log_prob(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32


def test_logits_that_are_not_stored(x64):
    rng = np.random.default_rng(3)
    hidden, reference = (jnp.asarray(rng.normal(size=(2, 3, 4, 5))) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=(5, 11)))
    tokens = jnp.asarray(rng.integers(0, 11, (2, 3, 4)), jnp.int32)
    where = jnp.asarray(rng.random((2, 3, 4)) < 0.7)

    def loss(lazy, hidden, weight):
        def log_prob(hidden):
            logits = jaxsoft.linear_logits(hidden, weight, block_size=4) if lazy else hidden @ weight
            return losses.sequence_log_prob(jaxsoft.log_prob(logits, tokens), where=where)

        chosen, rejected = log_prob(hidden)
        pairs = DPO(chosen, rejected, *log_prob(reference), kind="nca")
        alone = losses.kto_loss(chosen, rejected, rejected > -3) + losses.orpo_loss(chosen / 4, rejected / 4)
        return jnp.sum(jnp.sin(pairs + alone + losses.cpo_loss(chosen, rejected)))

    grad = jax.jit(jax.value_and_grad(loss, (1, 2)), static_argnums=0)
    for a, b in zip(
        jax.tree.leaves(grad(True, hidden, weight)), jax.tree.leaves(grad(False, hidden, weight))
    ):
        close(a, b, 1e-12)


# SparsePO.

TOKENS = {
    "chosen": RNG.normal(size=(2, 3, 4)),
    "rejected": RNG.normal(size=(2, 3, 5)),
    "reference_chosen": RNG.normal(size=(2, 3, 4)),
    "reference_rejected": RNG.normal(size=(2, 3, 5)),
    "chosen_kl": RNG.random((2, 3, 4)),
    "rejected_kl": RNG.random((2, 3, 5)),
}
MASKS = {
    "chosen_mask": RNG.random((2, 3, 4)) * (RNG.random((2, 3, 4)) < 0.7),
    "rejected_mask": RNG.random((2, 3, 5)) * (RNG.random((2, 3, 5)) < 0.7),
    "chosen_kl_mask": RNG.random((2, 3, 4)),
    "rejected_kl_mask": RNG.random((2, 3, 5)),
}


def test_sparse_po_worked_number(x64):
    ratios = arrays([[0.2, -0.1, 0.2], [-0.2, -0.5]], jnp.float64)
    divergences = arrays([[0.02, 0.05, 0.01], [0.03, 0.04]], jnp.float64)
    zeros = [jnp.zeros_like(r) for r in ratios]
    masks = dict(chosen_mask=jnp.array([1, 0, 0.5]), rejected_mask=jnp.array([0.3, 1]))
    close(losses.sparse_po_loss(*ratios, *zeros, *divergences, **masks), 0.652221)


def test_sparse_po(x64):
    t, m = TOKENS, MASKS
    u = (m["chosen_mask"] * (t["chosen"] - t["reference_chosen"])).sum(-1)
    u = u - (m["rejected_mask"] * (t["rejected"] - t["reference_rejected"])).sum(-1)
    delta = (m["rejected_kl_mask"] * t["rejected_kl"]).sum(-1) - (m["chosen_kl_mask"] * t["chosen_kl"]).sum(
        -1
    )
    given = arrays(t.values(), jnp.float64)
    masks = {name: jnp.asarray(mask) for name, mask in m.items()}
    loss = functools.partial(losses.sparse_po_loss, beta=0.3)
    close(loss(*given, **masks), softplus(-0.3 * (u - delta)), 1e-12)
    close(jax.jit(loss)(*given, **masks), loss(*given, **masks), 1e-12)
    close(jax.vmap(lambda a, m: loss(*a, **m))(given, masks), loss(*given, **masks), 1e-12)
    cotangent = jnp.asarray(RNG.normal(size=PAIRS))

    def total(w, l, kl_w, kl_l, masks):
        return jnp.vdot(cotangent, loss(w, l, *given[2:4], kl_w, kl_l, **masks))

    check_grads(jax.jit(total), (*given[:2], *given[4:], masks), 1)
    # Full masks: DPO of the sums, with a margin that the divergences add.
    ones = dict(chosen_mask=jnp.ones((2, 3, 4)), rejected_mask=jnp.ones((2, 3, 5)))
    none = [0 * given[4], 0 * given[5]]
    sums = [losses.sequence_log_prob(a) for a in given[:4]]
    close(loss(*given[:4], *none, **ones), DPO(*sums, beta=0.3), 1e-12)
    # A mask of 0 hides what is not finite, and a pair that does not count has no gradient.
    common = {name: jnp.asarray(m[name]) for name in ("chosen_mask", "rejected_mask")}
    both = list(common.values())
    holes = [jnp.where(both[i % 2] == 0, jnp.nan, a) for i, a in enumerate(given)]
    value, gradients = jax.jit(jax.value_and_grad(lambda a: jnp.sum(loss(*a, **common))))(holes)
    close(value, jnp.sum(loss(*given, **common)), 1e-12)
    for i, g in enumerate(gradients):
        assert np.all(np.isfinite(g)) and not np.any(np.asarray(g)[np.asarray(both[i % 2]) == 0])
    where = jnp.array([[True, False, True], [True, True, False]])
    holes = [jnp.where(where[..., None], a, jnp.nan) for a in given]
    value, gradients = jax.jit(jax.value_and_grad(lambda a: jnp.sum(loss(*a, **masks, where=where))))(holes)
    close(value, jnp.sum(jnp.where(where, loss(*given, **masks), 0)), 1e-12)
    assert all(np.all(np.isfinite(g)) for g in gradients)


# Extrapolation.


def test_extrapolate_log_probs(x64):
    new, old = arrays([[1.4, 0.2, 0.0], [1.0, 0.5, 0.0]], jnp.float64)
    function = jax.jit(losses.extrapolate_log_probs, static_argnames=("alpha", "axis"))
    close(jnp.exp(function(new, old)), [0.683595, 0.166895, 0.149510])
    p, q = jaxsoft.softmax(new), jaxsoft.softmax(old)
    policy = p * (p / q) ** 0.7
    close(jnp.exp(function(new, old, alpha=0.7)), policy / policy.sum(), 1e-14)
    close(function(new, old, alpha=0.0), jaxsoft.log_softmax(new), 1e-14)
    close(function(new + 5, old - 3), function(new, old), 1e-14)
    x, y = (jnp.asarray(RNG.normal(size=(4, 2, 3))) for _ in range(2))
    close(
        jax.jit(functools.partial(function, axis=0))(x, y), jnp.moveaxis(function(x.T, y.T), -1, 0).mT, 1e-14
    )
    check_grads(jax.jit(lambda x, y: jnp.sin(function(x, y))), (x, y), 1)
    # Absent entries, in either.
    new = jnp.array([1.0, -jnp.inf, 2.0, jnp.nan, 0.5])
    old = jnp.array([0.5, 1.0, -jnp.inf, 3.0, 0.0])
    where = jnp.array([True, True, True, False, True])
    got = function(new, old, where=where)
    close(got[jnp.array([0, 4])], function(new[jnp.array([0, 4])], old[jnp.array([0, 4])]), 1e-14)
    assert np.all(np.isneginf(got[1:4]))
    gradient = jax.jit(jax.grad(lambda new: function(new, old, where=where)[0]))(new)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[1:4])
    with pytest.raises(TypeError, match=r"logits\.dense"):
        losses.extrapolate_log_probs(
            jaxsoft.linear_logits(jnp.ones((2, 3)), jnp.ones((3, 4))), jnp.ones((2, 4))
        )


def test_extrapolated_heads_are_a_head(x64):
    (h, g), (v, w) = (RNG.normal(size=(2, 4, 3)), RNG.normal(size=(2, 3, 6)))
    tokens = jnp.array([0, 5, 2, 2])
    lazy = jaxsoft.linear_logits(
        jnp.concatenate([1.3 * h, -0.3 * g], -1), jnp.concatenate([v, w]), block_size=4
    )
    rows = losses.extrapolate_log_probs(jnp.asarray(h @ v), jnp.asarray(g @ w))
    close(jaxsoft.log_prob(lazy, tokens), rows[jnp.arange(4), tokens], 1e-12)


def test_extrapolate_policy():
    old = {"a": jnp.array([1.0, -2.0]), "b": [jnp.ones((2, 2), jnp.bfloat16), jnp.array(3)]}
    new = {"a": jnp.array([1.5, -1.0]), "b": [3 * jnp.ones((2, 2), jnp.bfloat16), jnp.array(7)]}
    got = jax.jit(losses.extrapolate_policy)(new, old, alpha=0.5)
    close(got["a"], [1.75, -0.5])
    assert got["b"][0].dtype == jnp.bfloat16 and got["b"][1] == 7
    close(got["b"][0], np.full((2, 2), 4.0), 0)
    for alpha, expected in ((0.0, new), (-1.0, old)):
        same = losses.extrapolate_policy(new, old, alpha=alpha)
        close(same["a"], expected["a"], 0)
    with pytest.raises(ValueError, match=r"old\['a'\] must have shape \(2,\)"):
        losses.extrapolate_policy(new, {**old, "a": jnp.ones(3)})
    with pytest.raises(ValueError):
        losses.extrapolate_policy(new, {"a": old["a"]})


# Tokens.

LOG_PROB, REFERENCE, VALUES = [-1.2, -0.4, -0.9], [-1.0, -0.7, -1.1], [0.6, 0.7, 0.9]


def test_token_rewards(x64):
    log_prob, reference = arrays([LOG_PROB, REFERENCE], jnp.float64)
    rewards = losses.token_rewards(log_prob, reference)
    close(rewards, [-0.02, 0.03, 0.02], 1e-12)
    close(losses.token_rewards(log_prob, reference, to_go=True), [0.03, 0.05, 0.02], 1e-12)
    x, y = (jnp.asarray(RNG.normal(size=(2, 3, 4))) for _ in range(2))
    where = jnp.asarray(RNG.random((2, 3, 4)) < 0.6)
    run = jax.jit(
        lambda x, y, to_go: losses.token_rewards(x, y, beta=0.3, where=where, to_go=to_go), static_argnums=2
    )
    expected = np.where(where, 0.3 * (x - y), 0)
    holes = [jnp.where(where, a, jnp.nan) for a in (x, y)]
    close(run(*holes, False), expected, 1e-12)
    close(run(*holes, True), np.flip(np.flip(expected, -1).cumsum(-1), -1), 1e-12)
    # The implicit reward of sequences is the margin of DPO.
    margin = losses.token_rewards(x, y, where=where).sum(-1)
    sums = [losses.sequence_log_prob(a, where=where) for a in (x, y)]
    close(softplus(-margin), DPO(sums[0], jnp.zeros(PAIRS), sums[1], jnp.zeros(PAIRS)), 1e-12)
    check_grads(jax.jit(lambda x: jnp.sin(losses.token_rewards(x, y, to_go=True))), (x,), 1)
    grad = jax.grad(lambda x, y: jnp.sum(jnp.sin(run(x, y, True))), (0, 1))(*holes)
    assert np.all(np.isfinite(grad[0])) and not np.any(grad[1])


def oreo(kind, log_prob, reference, values, reward, states, beta=0.1, clip=np.inf):
    """The residuals of one sequence without padding, by loops."""
    at = np.flatnonzero(states)[: 1 if kind == "trajectory" else None]
    errors = []
    for i, t in enumerate(at):
        single = kind == "single_step"
        end = at[i + 1] if single and i + 1 < len(at) else len(log_prob)
        gain = np.clip(np.sum((log_prob - reference)[t:end]), -clip, clip)
        errors.append(beta * gain + values[t] - (reward if end == len(log_prob) else values[end]))
    return np.array(errors)


def test_oreo_worked_numbers(x64):
    given = arrays([LOG_PROB, REFERENCE, VALUES, 1.0], jnp.float64)
    loss = jax.jit(functools.partial(losses.oreo_loss, beta=0.1), static_argnames="kind")
    policy, value = loss(*given)
    close([policy, value], [0.0686, 0.0686], 1e-12)
    close(jax.grad(lambda v: loss(*given[:2], v, given[3])[1])(given[2]), [-0.246667, -0.166667, -0.053333])
    close(jax.grad(lambda p: loss(p, *given[1:])[0])(given[0]), [-0.024667, -0.041333, -0.046667])
    close(loss(*given, kind="single_step")[0], 0.016567)
    # Each loss has its own gradient, and references and rewards have none.
    for i, free in enumerate((0, 2)):
        gradients = jax.grad(lambda a: loss(*a)[i])(given)
        assert [bool(np.any(g)) for g in gradients] == [j == free for j in range(4)]


@pytest.mark.parametrize("kind", ["suffix", "token", "single_step", "trajectory"])
def test_oreo(kind, x64):
    rng = np.random.default_rng(5)
    shape = (2, 3, 6)
    log_prob, reference, values = (rng.normal(size=shape) for _ in range(3))
    reward = rng.normal(size=shape[:2])
    where = rng.random(shape) < 0.7
    states = rng.random(shape) < 0.6
    where[0, 1] = False
    given = arrays([log_prob, reference, values, reward], jnp.float64)

    for clip in (None, 0.6):
        loss = functools.partial(losses.oreo_loss, beta=0.1, kind=kind, clip=clip)
        policy, value = jax.jit(loss)(*given, where=jnp.asarray(where), states=jnp.asarray(states))
        for i in np.ndindex(2, 3):
            kept = [a[i][where[i]] for a in (log_prob, reference, values)]
            e = oreo(kind, *kept, reward[i], states[i][where[i]], clip=clip or np.inf)
            close(policy[i], np.mean(e**2) if len(e) else 0, 1e-12)
        close(policy, value, 1e-12)

    def total(function, i):
        cotangent = jnp.asarray(np.random.default_rng(6).normal(size=(2, 3)))
        return jax.jit(lambda *a: jnp.vdot(cotangent, function(*a)[i]))

    masked = functools.partial(loss, clip=None, where=jnp.asarray(where), states=jnp.asarray(states))
    if kind != "token":  # there the gradient is no derivative
        check_grads(lambda p: total(masked, 0)(p, *given[1:]), (given[0],), 1)
    check_grads(lambda v: total(masked, 1)(*given[:2], v, given[3]), (given[2],), 1)
    close(jax.jit(jax.vmap(loss))(*given)[0], jax.jit(loss)(*given)[0], 1e-14)
    # NaN under the masks. A value counts only where there is a state.
    holes = [jnp.where(where, a, jnp.nan) for a in given[:2]]
    holes += [jnp.where(where & states, given[2], jnp.nan), given[3].at[0, 1].set(jnp.nan)]
    for i in range(2):
        clean, expected = jax.jit(jax.value_and_grad(total(masked, i), (0, 2)))(*given)
        value, gradients = jax.jit(jax.value_and_grad(total(masked, i), (0, 2)))(*holes)
        close(value, clean, 1e-12)
        close(gradients[0], np.where(where, expected[0], 0), 1e-12)
        close(gradients[1], np.where(where & states, expected[1], 0), 1e-12)


def test_oreo_token_gradient(x64):
    given = arrays([LOG_PROB, REFERENCE, VALUES, 1.0], jnp.float64)
    e = np.array([-0.37, -0.25, -0.08])
    gradient = jax.grad(lambda p: losses.oreo_loss(p, *given[1:], beta=0.1, kind="token")[0])(given[0])
    close(gradient, 2 * 0.1 * e / 3, 1e-12)


def test_oreo_with_a_divergence(x64):
    """The policy's loss grows by the mean over all tokens that count; the value's does not."""
    rng = np.random.default_rng(8)
    log_prob, reference, values, kl = (jnp.asarray(rng.normal(size=(2, 5))) for _ in range(4))
    where, states = (jnp.asarray(rng.random((2, 5)) < p) for p in (0.7, 0.5))
    where = where.at[1].set(False)
    holes = [jnp.where(where, a, jnp.nan) for a in (log_prob, reference, values)]
    plain = functools.partial(losses.oreo_loss, *holes, jnp.ones(2), beta=0.1, where=where, states=states)

    @jax.jit
    def both(kl, coefficient):
        return plain(), plain(kl=kl, kl_coefficient=coefficient)

    (policy, value), (with_kl, same) = both(jnp.where(where, kl, jnp.nan), 0.3)
    mean = np.array([np.mean(kl[0][where[0]]), 0])
    close(with_kl, policy + 0.3 * mean, 1e-14)
    close(same, value, 0)
    total = lambda kl, coefficient: jnp.sum(both(kl, coefficient)[1][0])
    gradient, of_coefficient = jax.grad(total, (0, 1))(kl, 0.3)
    close(gradient, 0.3 * where / np.maximum(where.sum(1, keepdims=True), 1), 1e-14)
    assert of_coefficient == 0


def test_oreo_is_zero_for_the_optimal_policy(x64):
    # One step, three actions: V = beta log sum ref e^(R / beta), and pi = ref e^((R - V) / beta).
    beta, rewards = 0.5, jnp.array([1.0, 0.0, 0.3])
    reference = jaxsoft.log_softmax(jnp.array([0.2, -0.3, 0.9]))
    value = beta * jaxsoft.logsumexp(reference + rewards / beta)
    log_prob = reference + (rewards - value) / beta
    policy, _ = losses.oreo_loss(
        log_prob[:, None], reference[:, None], jnp.full((3, 1), value), rewards, beta=beta
    )
    close(policy, 0, 1e-14)


def test_low_precision_of_tokens():
    low = [jnp.asarray(a, jnp.bfloat16) for a in (LOG_PROB, REFERENCE, VALUES)]
    policy, value = losses.oreo_loss(*low, jnp.array(1.0, jnp.bfloat16), beta=0.1)
    assert policy.dtype == value.dtype == jnp.float32
    wide = [jnp.asarray(a, jnp.float32) for a in low]
    close(policy, losses.oreo_loss(*wide, jnp.array(1.0), beta=0.1)[0])
    assert losses.token_rewards(*low[:2]).dtype == jnp.float32
    assert losses.extrapolate_log_probs(*low[:2]).dtype == jnp.float32
    with float64():
        assert losses.token_rewards(*arrays([LOG_PROB, REFERENCE], jnp.float64)).dtype == jnp.float64


ONES = jnp.ones(4)
INTS = jnp.ones(4, jnp.int32)
SPARSE = dict(chosen_mask=ONES, rejected_mask=ONES)
BAD = [
    (lambda: DPO(ONES, ONES, ONES, jnp.ones(3)), ValueError, r"reference_rejected must have shape \(4,\)"),
    (lambda: DPO(ONES, INTS, ONES, ONES), TypeError, "rejected must be an array of floating dtype"),
    (lambda: DPO(1.0, 1.0, 1.0, 1.0), TypeError, "chosen must be an array of floating dtype"),
    (lambda: DPO(*[ONES] * 4, beta=0.0), ValueError, "beta must be a number > 0"),
    (lambda: DPO(*[ONES] * 4, beta="x"), TypeError, "beta must be a number > 0"),
    (lambda: DPO(*[ONES] * 4, kind="exo"), ValueError, "kind must be one of 'sigmoid', 'hinge'"),
    (
        lambda: DPO(*[ONES] * 4, label_smoothing=1.5),
        ValueError,
        "label_smoothing must be a number >= 0 and <= 1",
    ),
    (
        lambda: DPO(*[ONES] * 4, kind="robust", label_smoothing=0.5),
        ValueError,
        "label_smoothing must be a number >= 0 and < 0.5",
    ),
    (lambda: DPO(*[ONES] * 4, baseline=jnp.ones(3)), ValueError, r"baseline must broadcast to shape \(4,\)"),
    (lambda: DPO(*[ONES] * 4, baseline="x"), TypeError, "baseline must be a number"),
    (lambda: losses.cpo_loss(ONES, ONES, kind="nca"), ValueError, "kind must be one of 'sigmoid'"),
    (lambda: losses.cpo_loss(ONES, ONES, jnp.ones(3)), ValueError, r"chosen_nll must have shape \(4,\)"),
    (lambda: losses.cpo_loss(ONES, ONES, alpha=-1.0), ValueError, "alpha must be a number >= 0"),
    (lambda: losses.orpo_loss(ONES, INTS), TypeError, "rejected must be an array of floating"),
    (lambda: losses.orpo_loss(ONES, ONES, beta=-1.0), ValueError, "beta must be a number >= 0"),
    (lambda: losses.kto_loss(ONES, ONES, ONES), TypeError, "desirable must be a boolean array"),
    (
        lambda: losses.kto_loss(ONES, ONES, jnp.ones(3, bool)),
        ValueError,
        r"desirable must have shape \(4,\)",
    ),
    (
        lambda: losses.kto_loss(ONES, ONES, ONES > 0, kind="apo"),
        ValueError,
        "kind must be one of 'kto', 'bco'",
    ),
    (
        lambda: losses.kto_loss(ONES, ONES, ONES > 0, desirable_weight=-1.0),
        ValueError,
        "desirable_weight must be a number >= 0",
    ),
    (lambda: DPO(*[ONES] * 4, where=ONES), TypeError, "where must be a boolean array"),
    (lambda: DPO(*[ONES] * 4, where=jnp.ones(3, bool)), ValueError, r"where must broadcast to shape \(4,\)"),
    (lambda: DPO(*[ONES] * 4, weights=jnp.ones(3)), ValueError, r"weights must have shape \(4,\)"),
    (lambda: DPO(*[ONES] * 4, weights=1j * ONES), TypeError, "weights must be an array of real numbers"),
    (lambda: F_DPO(*[ONES] * 4, divergence="total_variation"), ValueError, "divergence must be one of"),
    (lambda: F_DPO(*[ONES] * 4, divergence="alpha", alpha=0.0), ValueError, "alpha must be a number > 0"),
    (lambda: losses.simpo_loss(ONES, ONES, gamma_beta_ratio=-0.1), ValueError, "gamma_beta_ratio must be"),
    (lambda: losses.simpo_loss(ONES, ONES, kind="ipo"), ValueError, "kind must be one of 'sigmoid', 'hinge'"),
    (lambda: losses.xpo_loss(*[ONES] * 5, alpha=-1.0), ValueError, "alpha must be a number >= 0"),
    (lambda: losses.xpo_loss(*[ONES] * 5, kind="hinge"), ValueError, "kind must be one of 'sigmoid', 'ipo'"),
    (lambda: losses.margin_matching_loss(*[ONES] * 6), TypeError, "bt_beta"),
    (
        lambda: losses.margin_matching_loss(*[ONES] * 6, bt_beta=-1.0),
        ValueError,
        "bt_beta must be a number >= 0",
    ),
    (
        lambda: losses.margin_matching_loss(*[ONES] * 5, jnp.ones(()), bt_beta=1.0),
        ValueError,
        "rejected_score must have shape",
    ),
    (lambda: losses.direct_nash_loss(*[ONES] * 6, eta=-1.0), ValueError, "eta must be a number >= 0"),
    (
        lambda: losses.direct_nash_loss(*[ONES] * 5, jnp.ones(3)),
        ValueError,
        r"second_win_rate must have shape \(4,\) \(that of first\)",
    ),
    (lambda: losses.sparse_po_loss(*[ONES] * 6), TypeError, "chosen_mask"),
    (
        lambda: losses.sparse_po_loss(*[ONES] * 5, jnp.ones(3), **SPARSE),
        ValueError,
        r"rejected_kl must have shape \(4,\)",
    ),
    (
        lambda: losses.sparse_po_loss(*[jnp.ones(())] * 6, **SPARSE),
        ValueError,
        "chosen must have an axis of tokens",
    ),
    (
        lambda: losses.sparse_po_loss(*[ONES] * 6, chosen_mask=ONES > 0, rejected_mask=ONES),
        TypeError,
        "chosen_mask must be an array of floating",
    ),
    (lambda: losses.sequence_log_prob(ONES, reduction="max"), ValueError, "reduction must be one of"),
    (
        lambda: losses.sequence_log_prob(jnp.ones(())),
        ValueError,
        "token_log_probs must have an axis of tokens",
    ),
    (lambda: losses.sequence_log_prob([1.0]), TypeError, "token_log_probs must be an array"),
    (lambda: losses.token_rewards(ONES, ONES, beta=-1.0), ValueError, "beta must be a number > 0"),
    (lambda: losses.token_rewards(ONES, ONES, to_go=2), TypeError, "to_go must be True or False"),
    (lambda: losses.oreo_loss(ONES, ONES, ONES, ONES), ValueError, r"reward must have shape \(\)"),
    (lambda: losses.oreo_loss(*[ONES] * 3, jnp.ones(()), kind="step"), ValueError, "kind must be one of"),
    (lambda: losses.oreo_loss(*[ONES] * 3, jnp.ones(()), clip=0.0), ValueError, "clip must be a number > 0"),
    (lambda: losses.oreo_loss(*[ONES] * 3, jnp.ones(()), states=ONES), TypeError, "states must be a boolean"),
    (
        lambda: losses.oreo_loss(*[ONES] * 3, jnp.ones(()), kl=jnp.ones(3)),
        ValueError,
        r"kl must have shape \(4,\)",
    ),
    (
        lambda: losses.oreo_loss(*[ONES] * 3, jnp.ones(()), kl_coefficient=-1.0),
        ValueError,
        "kl_coefficient must be a number >= 0",
    ),
    (lambda: losses.extrapolate_policy(ONES, ONES, alpha=None), TypeError, "alpha must be a number"),
    (
        lambda: losses.extrapolate_log_probs(ONES, jnp.ones(3)),
        ValueError,
        r"old_logits must have shape \(4,\)",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
