"""Learning rates by parameter.

These rules give each parameter its own learning rate: by its shape, so that hyper-parameters tuned on a small model
hold for a large one (muP, u-muP), or by its spectrum, so that layers that lag behind learn faster (TempBalance).
`scale_by_multipliers` applies them in any optax chain. For u-muP see also `jaxsoft.normalizers.unit_scaled_softmax`
and `jaxsoft.losses.unit_scaled_cross_entropy`.

```python
import jax
import optax

from jaxsoft.optimizers import mup_multipliers, scale_by_multipliers


def rate(param):
    return mup_multipliers("hidden", param.shape[0], 256).learning_rate if param.ndim == 2 else 1.0


def rates(params):
    return jax.tree.map(rate, params)


tx = optax.chain(optax.scale_by_adam(), scale_by_multipliers(rates), optax.scale_by_learning_rate(1e-3))
```
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Mask, Scalar


class MupMultipliers(NamedTuple):
    """Factors for one parameter, Python floats.

    Attributes:
      learning_rate: the global learning rate.
      weight_decay: a weight decay that is multiplied by the parameter's learning rate, as in AdamW.
      init_std: the standard deviation of the initial values.
      forward: the output of the parameter's layer.
      branch: the output of the parameter's residual branch, once per branch.
    """

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    init_std: float = 1.0
    forward: float = 1.0
    branch: float = 1.0


def _ratio(name: str, size: Any, base: Any) -> float:
    size = _checks.integer(name, size, at_least=1)
    base = _checks.integer(f"base_{name}", base, at_least=1)
    return size / base


def mup_multipliers(
    kind: Literal["input", "bias", "norm", "hidden", "output", "router", "expert", "attention"],
    fan_in: int,
    base_fan_in: int,
    *,
    fan_out: int | None = None,
    base_fan_out: int | None = None,
    optimizer: Literal["adam", "sgd"] = "adam",
    depth: int | None = None,
    base_depth: int | None = None,
) -> MupMultipliers:
    """muP: multipliers with which hyper-parameters tuned at a base width (and depth) hold at another one.

    With `r = fan_in / base_fan_in` and `q = fan_out / base_fan_out`:

    | kind | Adam rate | SGD rate | initial std | forward | weight decay |
    |---|---|---|---|---|---|
    | input, bias, norm | 1 | q | 1 | 1 | 1 (SGD: 1 / q) |
    | hidden, expert | 1 / r | q / r | r^(-1/2) | 1 | 1 / rate |
    | output, router | 1 | r | 1 | 1 / r | 1 (SGD: 1 / r) |
    | attention (logits; `fan_in` is the head's size) | | | | `sqrt(base_fan_in) / fan_in` | |

    In optax a decay after `scale_by_multipliers` is independent of it and needs no multiplier: see there. The initial
    std is relative to that of the base model. For parameters inside residual branches pass `depth`: the branches are
    multiplied by `(depth / base_depth)^(-1/2)`, and so are the rates of Adam.

    *Reconstructed*: the kinds `"router"` (as an output, for a fixed number of experts) and `"expert"` (as hidden,
    with the expert's own sizes), and the decay with depth.

    Args:
      kind: The kind of the parameter. `"input"` includes embeddings.
      fan_in: Its number of inputs, in this model.
      base_fan_in: The same in the base model.
      fan_out: Its number of outputs; needed for `optimizer="sgd"` with kinds other than output and router.
      base_fan_out: The same in the base model.
      optimizer: `"adam"`, also for other optimizers with steps of fixed size (Lion, Muon-like normalization); or
        `"sgd"`.
      depth: Number of residual branches, for a parameter inside one.
      base_depth: The same in the base model.

    Returns:
      The multipliers, Python floats.

    Raises:
      TypeError: for sizes that are not static integers.
      ValueError: for an unknown `kind` or `optimizer`, sizes below 1, or a missing size.

    References:
      "Research without Re-search: Maximal Update Parametrization Yields Accurate Loss Prediction across Scales";
      "Tensor Programs VI: Feature Learning in Infinite-Depth Neural Networks"; "mu-Parametrization for Mixture of
      Experts".

    Examples:
      >>> mup_multipliers("hidden", 1024, 256)
      MupMultipliers(learning_rate=0.25, weight_decay=4.0, init_std=0.5, forward=1.0, branch=1.0)
    """
    kinds = ("input", "bias", "norm", "hidden", "output", "router", "expert", "attention")
    _checks.option("kind", kind, kinds)
    _checks.option("optimizer", optimizer, ("adam", "sgd"))
    r = _ratio("fan_in", fan_in, base_fan_in)
    if kind == "attention":
        return MupMultipliers(forward=math.sqrt(base_fan_in) / fan_in)
    q = 1.0
    last = kind in ("output", "router")
    if optimizer == "sgd" and not last:
        for name, size in (("fan_out", fan_out), ("base_fan_out", base_fan_out)):
            if size is None:
                raise ValueError(f"{name} must be given for kind={kind!r} with optimizer='sgd', got None")
        q = _ratio("fan_out", fan_out, base_fan_out)
    branch = 1.0
    if depth is not None or base_depth is not None:
        branch = _ratio("depth", depth, base_depth) ** -0.5
    scaled = branch if optimizer == "adam" else 1.0

    if kind in ("hidden", "expert"):
        rate = q / r * scaled
        return MupMultipliers(rate, 1 / rate, r**-0.5, 1.0, branch)
    rate = (r if last and optimizer == "sgd" else q) * scaled
    return MupMultipliers(rate, 1 / rate, 1.0, 1 / r if last else 1.0, branch)


def u_mup_multipliers(
    kind: Literal["weight", "embedding", "bias", "norm", "output"],
    fan_in: int,
    *,
    branches: int | None = None,
) -> MupMultipliers:
    """u-muP: the multipliers of the unit-scaled parametrization, for Adam; there is no base model.

    | kind | rate | initial std | forward |
    |---|---|---|---|
    | weight (hidden) | `fan_in^(-1/2)` | 1 | `fan_in^(-1/2)` |
    | embedding (`fan_in` is its width, the model's) | `fan_in^(-1/2)` | 1 | 1 |
    | output | 1 | 1 | `1 / fan_in` |
    | bias, norm | 1 | 1 (the values of a new model) | 1 |

    Inside residual branches the rate is multiplied by `branches^(-1/2)` as well. Weight decay is independent of the
    learning rate: its multiplier is 1 / rate. (The backward pass of the output layer has `fan_in^(-1/2)`.)

    Args:
      kind: The kind of the parameter.
      fan_in: Its number of inputs; for embeddings the width of the model.
      branches: Number of residual branches of the model, for a parameter inside one.

    Returns:
      The multipliers, Python floats.

    Raises:
      TypeError: for sizes that are not static integers.
      ValueError: for an unknown `kind` or sizes below 1.

    References:
      "u-muP: The Unit-Scaled Maximal Update Parametrization".

    Examples:
      >>> u_mup_multipliers("weight", 1024).learning_rate
      0.03125
    """
    _checks.option("kind", kind, ("weight", "embedding", "bias", "norm", "output"))
    fan_in = _checks.integer("fan_in", fan_in, at_least=1)
    rate = fan_in**-0.5 if kind in ("weight", "embedding") else 1.0
    if branches is not None:
        rate *= _checks.integer("branches", branches, at_least=1) ** -0.5
    forward = {"weight": fan_in**-0.5, "output": 1 / fan_in}.get(kind, 1.0)
    return MupMultipliers(rate, 1 / rate, 1.0, forward, 1.0)


class ScaleByMultipliersState(NamedTuple):
    """State of `scale_by_multipliers` with `update_every`: steps taken, and one multiplier per leaf."""

    count: jax.Array
    multipliers: Any


def scale_by_multipliers(
    multipliers: Any,
    labels: Any = None,
    *,
    update_every: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each leaf of the updates by its own number: one learning rate per parameter.

    The numbers come as a pytree, or by label, or from a function of the parameters. The function is called in each
    step or, if it is costly, in the first step and then every `update_every` steps, under `lax.cond`. Put it before
    weight decay to leave the decay alone:

        optax.chain(optax.scale_by_adam(), scale_by_multipliers(rates, labels), optax.add_decayed_weights(0.1),
                    optax.scale_by_learning_rate(1e-3))

    Args:
      multipliers: A pytree of numbers like the parameters or a prefix of it; or with `labels`, a dict from labels
        to numbers; or a function from the parameters to a pytree.
      labels: None; or a pytree of labels like the parameters or a prefix of it, or a function from the parameters
        to one, as for `optax.partition`.
      update_every: Steps between two calls of the function `multipliers`, at least 1. None: it is called in each step.

    Returns:
      A gradient transformation. With `update_every` it keeps one number per leaf, else no state. With a function as
      `multipliers` its `update` needs the parameters. Updates keep the dtype of the gradients.

    Raises:
      ValueError: for a label without a multiplier, `update_every` without a function, or if `update` is called
        without the parameters where a function needs them.

    References:
      "u-muP: The Unit-Scaled Maximal Update Parametrization" (rates by shape); "Model Balancing Helps Low-data
      Training and Fine-tuning" (rates by spectrum).

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_multipliers({"hidden": 0.25, "bias": 1.0}, {"w": "hidden", "b": "bias"})
      >>> g = {"b": jnp.ones(2), "w": jnp.ones(2)}
      >>> print(tx.update(g, tx.init(g))[0])
      {'b': Array([1., 1.], dtype=float32), 'w': Array([0.25, 0.25], dtype=float32)}
    """
    if update_every is not None:
        _common.check_steps("update_every", update_every, at_least=1)
        if not _common.is_function(multipliers):
            raise ValueError("update_every needs multipliers to be a function of the parameters")
    if labels is not None and not isinstance(multipliers, Mapping):
        raise ValueError(
            f"multipliers must be a dict from labels to numbers where labels are given, got {type(multipliers)}"
        )
    from_params = _common.is_function(multipliers) or _common.is_function(labels)

    by_label: Any = multipliers

    def of_label(label: Hashable) -> Any:
        if label not in by_label:
            raise ValueError(f"multipliers must have an entry for label {label!r}, got {list(by_label)}")
        return by_label[label]

    def compute(params: Any, like: Any) -> Any:
        """One multiplier per leaf of `like`."""
        tree = multipliers(params) if _common.is_function(multipliers) else multipliers
        if labels is not None:
            tree = jax.tree.map(of_label, labels(params) if _common.is_function(labels) else labels)
        return _common.broadcast(tree, like)

    def init(params: optax.Params) -> Any:
        if update_every is None:
            return optax.EmptyState()
        return ScaleByMultipliersState(jnp.zeros([], jnp.int32), _common.scalars_like(params))

    # Branches made in `update` would be compiled anew in each call outside of `jit`.
    def fresh(params: Any, like: Any, old: Any) -> Any:
        return jax.tree.map(lambda m, old: jnp.asarray(m, old.dtype), compute(params, like), old)

    def kept(params: Any, like: Any, old: Any) -> Any:
        del params, like
        return old

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any):
        del extra
        if params is None and from_params:
            raise ValueError(
                "scale_by_multipliers needs params for a function of them: call update(updates, state, params); "
                "got params=None"
            )
        if update_every is None:
            factors = compute(params, updates)
        else:
            due = state.count % update_every == 0
            factors = lax.cond(due, fresh, kept, params, updates, state.multipliers)
            state = ScaleByMultipliersState(jnp.asarray(optax.safe_increment(state.count)), factors)
        u = jax.tree.map(lambda m, g: m * g, factors, _common.widen(updates))
        return _common.cast_like(u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_matrix(x: Any) -> bool:
    return jnp.ndim(x) >= 2 and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def hill_alpha(weight: jax.Array, *, tile: tuple[int, int] | None = None, floor: Scalar = 1e-5) -> jax.Array:
    """The tail exponent of a weight matrix's spectrum, by Hill's estimator above the median.

    With the eigenvalues e_1 <= ... <= e_N of `W^T W` that exceed `floor`, `i = N // 2` (from 0) and `n = N - i`:

        alpha = 1 + n / sum over j >= i of log(e_j / e_i)

    A small exponent, a heavy tail, marks a well-trained layer; a large one a layer that lags behind.

    Args:
      weight: [..., a, b]. Leading axes, as those of a convolution's kernel, are pooled.
      tile: None, or the sides of tiles into which the matrix is cut (remainders are dropped). The eigenvalues of all
        tiles are pooled, so the estimate does not depend on the shape of the matrix. *Reconstructed*.
      floor: Eigenvalues up to this number are ignored, at least 0.

    Returns:
      A scalar in at least float32; infinite if all eigenvalues above the median are equal.

    Raises:
      TypeError: for a weight that is not floating.
      ValueError: for a weight with fewer than two axes, or a tile that does not fit.

    References:
      "Model Balancing Helps Low-data Training and Fine-tuning"; "Eigenspectrum Analysis of Neural Networks without
      Aspect Ratio Bias" (tiles).

    Examples:
      >>> import jax.numpy as jnp
      >>> eigenvalues = jnp.array([0.1, 0.2, 0.4, 0.8, 1.6, 6.4])
      >>> print(hill_alpha(jnp.diag(jnp.sqrt(eigenvalues))).round(3))
      2.082
    """
    _checks.floating("weight", weight)
    _checks.number("floor", floor, at_least=0)
    if weight.ndim < 2:
        raise ValueError(f"weight must have at least 2 axes, got shape {weight.shape}")
    if tile is not None:
        a, b = (_checks.integer("tile", side, at_least=1) for side in tile)
        rows, columns = weight.shape[-2] // a, weight.shape[-1] // b
        if rows * columns == 0:
            raise ValueError(f"tile must fit into the matrix, got {tuple(tile)} for shape {weight.shape}")
        weight = weight[..., : rows * a, : columns * b].reshape(*weight.shape[:-2], rows, a, columns, b)
        weight = jnp.swapaxes(weight, -2, -3)
    values = jnp.linalg.svd(_common.whole(weight).astype(_common.wide(weight)), compute_uv=False)
    values = jnp.sort(jnp.ravel(values * values))
    size = values.shape[0]
    valid = jnp.sum(values > floor)
    start = size - valid + valid // 2
    tail = jnp.arange(size) >= start
    logs = jnp.log(jnp.where(tail, values, 1))
    count = size - start
    number = _common.to_float(count)
    spread = jnp.sum(logs) - number * logs[jnp.minimum(start, size - 1)]
    return jnp.where(spread > 0, 1 + number / jnp.where(spread > 0, spread, 1), jnp.inf).astype(values.dtype)


def temp_balance_multipliers(
    params: Any,
    *,
    mask: Mask = None,
    low: Scalar = 0.5,
    high: Scalar = 1.5,
    mode: Literal["linear", "sqrt", "log2", "step"] = "linear",
    min_eigenvalues: int = 50,
    tile: tuple[int, int] | None = None,
) -> Any:
    """TempBalance: learning-rate multipliers that let the layers with the lightest tails catch up.

    With the exponents alpha of all layers (`hill_alpha`):

    | mode | multiplier |
    |---|---|
    | `"linear"` | from `low` at the smallest alpha to `high` at the largest |
    | `"step"` | the same by rank, evenly spaced |
    | `"sqrt"` | sqrt(alpha) over the mean of it |
    | `"log2"` | log2(alpha) over the mean of it |

    Other leaves get 1, and so do all layers if their exponents are equal. It needs the singular values of every layer,
    so call it about once per epoch: `scale_by_multipliers(temp_balance_multipliers, update_every=1000)`.

    Args:
      params: A pytree of parameters.
      mask: Which leaves take part: a pytree of bools, or a function from the parameters to one. The authors leave
        out the first and the last layer. None: all floating leaves with two or more axes and enough eigenvalues.
      low: Multiplier of the heaviest tail, for `"linear"` and `"step"`.
      high: Multiplier of the lightest.
      mode: See above.
      min_eigenvalues: Leaves with fewer, `min(a, b)`, do not take part, static.
      tile: See `hill_alpha`.

    Returns:
      A pytree like `params` of scalars.

    Raises:
      ValueError: for an unknown `mode` or numbers out of range.

    References:
      "Model Balancing Helps Low-data Training and Fine-tuning".

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {"bias": jnp.ones(3), "even": jnp.diag(jnp.ones(4)), "heavy": jnp.diag(jnp.array([1.0, 1, 1, 9]))}
      >>> params["light"] = jnp.diag(jnp.array([1.0, 1.0, 1.0, 2.0]))
      >>> print(jax.tree.map(float, temp_balance_multipliers(params, min_eigenvalues=4, mode="step")))
      {'bias': 1.0, 'even': 1.5, 'heavy': 0.5, 'light': 1.0}
    """
    _checks.number("low", low, at_least=0)
    _checks.number("high", high, at_least=0)
    _checks.option("mode", mode, ("linear", "sqrt", "log2", "step"))
    min_eigenvalues = _checks.integer("min_eigenvalues", min_eigenvalues, at_least=1)
    chosen = _common.broadcast_mask(mask, params)
    leaves, treedef = jax.tree.flatten(params)
    taking_part = [
        i
        for i, (leaf, wanted) in enumerate(zip(leaves, jax.tree.leaves(chosen), strict=True))
        if wanted and _is_matrix(leaf) and min(jnp.shape(leaf)[-2:]) >= min_eigenvalues
    ]
    out: list[Any] = [jnp.ones([]) for _ in leaves]
    if taking_part:
        alphas = jnp.stack([hill_alpha(leaves[i], tile=tile) for i in taking_part])
        # A spectrum without a tail counts as the lightest.
        alphas = jnp.where(
            jnp.isinf(alphas), 2 * jnp.max(alphas, where=~jnp.isinf(alphas), initial=1.0), alphas
        )
        smallest, spread = jnp.min(alphas), jnp.max(alphas) - jnp.min(alphas)
        if mode == "linear":
            factors = low + (high - low) * (alphas - smallest) / jnp.where(spread > 0, spread, 1)
        elif mode == "step":
            factors = jnp.linspace(low, high, len(taking_part))[jnp.argsort(jnp.argsort(alphas))]
        else:
            measure = jnp.sqrt(alphas) if mode == "sqrt" else jnp.log2(alphas)
            factors = measure / jnp.mean(measure)
        factors = jnp.where(spread > 0, factors, 1)
        for k, i in enumerate(taking_part):
            out[i] = factors[k]
    return jax.tree.unflatten(treedef, out)
