r"""Exact conversion of Pre-LN models to Pre-RMSNorm and Pre-CRMSNorm.

If everything that is added to the residual stream has mean zero, so has the stream, and its layer norm is its RMS
norm. Parameters can be changed so that this holds, without changing the model: a layer norm ignores the mean of its
input. A stream with mean zero is known from all features but the last, so its last feature need not be stored.

The functions for whole trees are told, by regular expressions of paths, which leaves write into the stream (embeddings
and the last linear layer of each branch) and which linear layers read it, each through a norm:

```python
import jax.numpy as jnp
from jaxsoft.norms import pre_ln_to_pre_rms, pre_rms_to_pre_crms

block = {
    "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "up": {"kernel": jnp.ones((4, 16)), "bias": jnp.zeros(16)},
    "down": {"kernel": jnp.ones((16, 4)), "bias": jnp.zeros(4)},
}
params = {"embed": {"embedding": jnp.ones((10, 4))}, "block_0": block, "block_1": block}

roles = dict(
    writes=["embed/embedding", r"block_\d+/down/(kernel|bias)"],
    reads={r"(block_\d+)/norm": [r"\1/up"]},
)
rms = pre_ln_to_pre_rms(params, **roles)  # for rms_norm(stream, scale, eps=eps of the layer norms)
crms = pre_rms_to_pre_crms(rms, **roles)  # for crms_norm(stream, eps=...); the stream has 3 features
assert crms["block_0"]["up"]["kernel"].shape == (3, 16)
```

The layout is Flax's: a kernel has its inputs first and its outputs last. Layers may be stacked, with the same leading
axes in all leaves of a norm and its readers, as `nn.scan` stacks them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsoft import _checks
from jaxsoft.norms._common import wide
from jaxsoft.norms.layer import recenter

_MEAN_ZERO = 1e-3  # largest mean of a leaf with mean zero, as a part of its root mean square


def zero_mean_linear(
    kernel: Float[Array, "*inputs features"], bias: Float[Array, " features"] | None = None
) -> tuple[Array, Array | None]:
    """A linear layer whose outputs have mean zero over the features: `recenter` of its outputs, in its parameters.

    Args:
      kernel: inputs first, features last.
      bias: one number per feature. None: no bias.

    Returns:
      The new kernel and bias: each row minus its mean.

    Raises:
      TypeError: arrays that are not floating.
      ValueError: a bias that does not fit.

    Reference:
      "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import zero_mean_linear
      >>> kernel, bias = zero_mean_linear(jnp.array([[1.0, 3.0], [4.0, 0.0]]), jnp.array([1.0, 0.0]))
      >>> print(jnp.array([1.0, 1.0]) @ kernel + bias)
      [ 1.5 -1.5]
    """
    _checks.floating("kernel", kernel)
    if bias is not None:
        _checks.floating("bias", bias)
        _checks.shape("bias", bias, tuple(kernel.shape[-1:]), "the features of the kernel")
    return recenter(kernel), None if bias is None else recenter(bias)


def fold_into_linear(
    kernel: Float[Array, "*layers inputs *outputs"],
    bias: Float[Array, "*layers *outputs"] | None = None,
    *,
    scale: Float[Array, "*layers inputs"] | None = None,
    shift: Float[Array, "*layers inputs"] | None = None,
) -> tuple[Array, Array | None]:
    """The linear layer that does `(scale x + shift) @ kernel + bias` to x.

    So the parameters of a norm, or a whole norm with fixed statistics (`scale / sqrt(variance + eps)` of a
    `unified_norm` after training), cost nothing.

    Args:
      kernel: inputs first; any number of axes of outputs.
      bias: the shape of the outputs. None: 0.
      scale: one number per input. None: 1.
      shift: one number per input. None: 0.

    Returns:
      The new kernel and bias, in the kernel's dtype. The bias is None if neither `bias` nor `shift` is given.

    Raises:
      TypeError: arrays that are not floating.
      ValueError: shapes that do not fit.

    Reference:
      "Unified Normalization for Accelerating and Stabilizing Transformers"; "Pre-RMSNorm and Pre-CRMSNorm Transformers:
      Equivalent and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import fold_into_linear
      >>> kernel, bias = fold_into_linear(jnp.ones((2, 1)), scale=jnp.array([2.0, 3.0]), shift=jnp.array([1.0, 0.5]))
      >>> print(kernel.T, bias)
      [[2. 3.]] [1.5]
    """
    _checks.floating("kernel", kernel)
    given = {name: v for name, v in (("scale", scale), ("shift", shift)) if v is not None}
    y = wide(kernel)
    new_bias = None if bias is None else wide(bias)
    for name, vector in given.items():
        _checks.floating(name, vector)
        _checks.shape(name, vector, tuple(kernel.shape[: vector.ndim]), "the leading axes of the kernel")
        axis = vector.ndim - 1
        vector = wide(vector).reshape(*vector.shape, *(1,) * (kernel.ndim - vector.ndim))
        if bias is not None:
            _checks.floating("bias", bias)
            outputs = kernel.shape[:axis] + kernel.shape[axis + 1 :]
            _checks.shape("bias", bias, outputs, "the kernel without its inputs")
        if name == "shift":
            moved = jnp.sum(vector * wide(kernel), axis=axis)
            new_bias = moved if new_bias is None else new_bias + moved
        else:
            y = y * vector
    return y.astype(kernel.dtype), None if new_bias is None else new_bias.astype(kernel.dtype)


def pre_ln_to_pre_rms(params: Mapping, *, writes: Sequence[str], reads: Mapping[str, Sequence[str]]) -> dict:
    r"""The parameters of a Pre-RMSNorm model that computes what a Pre-LN model does.

    What writes into the stream gets mean zero (`recenter`), and the biases of the norms move into the layers that read
    them. Their scales stay. The new model has RMS norms with the `eps` of the layer norms, and a bias in each layer
    that reads a norm with a bias.

    Args:
      params: nested dicts. Norms have `scale` and `bias`, linear layers `kernel` and perhaps `bias`, as in Flax
        (`nnx.to_pure_dict` gives the dicts of an `nnx.State`).
      writes: regular expressions of the paths of all leaves whose last axis is that of the stream and which are added
        to it: embeddings, kernels and biases. Keys are joined by "/"; an expression fits the whole path.
      reads: for an expression of the paths of norms, the linear layers that read such a norm. A layer may refer to
        groups of the expression (`\1`). A table of embeddings that is also the head must be copied first: the head
        reads the stream, and the table writes into it.

    Returns:
      Nested dicts like `params`, without the biases of the norms.

    Raises:
      TypeError: expressions that are a single string, leaves that are not floating.
      ValueError: an expression that fits nothing, a layer that does not exist, shapes that do not fit.

    Reference:
      "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import pre_ln_to_pre_rms
      >>> norm, linear = {"scale": jnp.ones(2), "bias": jnp.ones(2)}, {"kernel": jnp.ones((2, 1))}
      >>> params = {"embed": {"embedding": jnp.array([[1.0, 3.0]])}, "norm": norm, "head": linear}
      >>> new = pre_ln_to_pre_rms(params, writes=["embed/embedding"], reads={"norm": ["head"]})
      >>> print(new["embed"]["embedding"], new["head"]["bias"], sorted(new["norm"]))
      [[-1.  1.]] [2.] ['scale']
    """
    leaves = dict(_flatten(params))
    for norm, readers in _sites(leaves, reads):
        shift = leaves.pop(f"{norm}/bias", None)
        for reader in readers if shift is not None else ():
            kernel, bias = fold_into_linear(
                leaves[f"{reader}/kernel"], leaves.get(f"{reader}/bias"), shift=shift
            )
            leaves |= {f"{reader}/kernel": kernel, f"{reader}/bias": bias}
    for path in _fitting(leaves, "writes", writes):
        leaves[path] = recenter(leaves[path])
    return _unflatten(leaves, params)


def pre_rms_to_pre_crms(
    params: Mapping, *, writes: Sequence[str], reads: Mapping[str, Sequence[str]]
) -> dict:
    """The parameters of a Pre-CRMSNorm model that computes what a Pre-RMSNorm model with a stream of mean zero does.

    The stream loses its last feature, the scales of the norms move into the layers that read them, and the norms have
    no parameters left.

    Args:
      params: nested dicts, such as those of `pre_ln_to_pre_rms`.
      writes: as for `pre_ln_to_pre_rms`.
      reads: as for `pre_ln_to_pre_rms`.

    Returns:
      Nested dicts like `params`, without the norms.

    Raises:
      TypeError: as `pre_ln_to_pre_rms`.
      ValueError: as `pre_ln_to_pre_rms`; leaves that write into the stream without mean zero; norms with a bias.

    Reference:
      "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft.norms import pre_rms_to_pre_crms
      >>> norm, linear = {"scale": jnp.array([2.0, 3.0])}, {"kernel": jnp.ones((2, 1))}
      >>> params = {"embed": {"embedding": jnp.array([[-1.0, 1.0]])}, "norm": norm, "head": linear}
      >>> new = pre_rms_to_pre_crms(params, writes=["embed/embedding"], reads={"norm": ["head"]})
      >>> print(new["embed"]["embedding"], new["head"]["kernel"], sorted(new))
      [[-1.]] [[-1.]] ['embed', 'head']
    """
    leaves = dict(_flatten(params))
    for norm, readers in _sites(leaves, reads):
        if f"{norm}/bias" in leaves:
            raise ValueError(f"params: norm {norm!r} has a bias; convert with pre_ln_to_pre_rms first")
        scale = leaves.pop(f"{norm}/scale", None)
        for reader in readers:
            kernel, _ = fold_into_linear(leaves[f"{reader}/kernel"], scale=scale)
            axis = 0 if scale is None else scale.ndim - 1
            first, last = jnp.split(wide(kernel), [kernel.shape[axis] - 1], axis)
            leaves[f"{reader}/kernel"] = (first - last).astype(kernel.dtype)
    for path in _fitting(leaves, "writes", writes):
        _check_mean_zero(path, leaves[path])
        leaves[path] = leaves[path][..., :-1]
    return _unflatten(leaves, params)


def _check_mean_zero(path: str, leaf: Any) -> None:
    if isinstance(leaf, jax.core.Tracer):
        return
    y = wide(leaf)
    if bool(jnp.max(jnp.abs(jnp.mean(y, axis=-1)), initial=0) > _MEAN_ZERO * jnp.sqrt(jnp.mean(y * y))):
        raise ValueError(
            f"params: {path!r} must have mean zero over its last axis; use pre_ln_to_pre_rms first"
        )


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts by their paths."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _unflatten(leaves: Mapping[str, Any], like: Mapping, prefix: str = "") -> dict:
    """Nested dicts like others, with leaves by their paths; a leaf or a dict that lost its leaves is left out."""
    out = {}
    for key, value in like.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner = _unflatten(leaves, value, f"{path}/")
            bias = f"{path}/bias"
            if "kernel" in value and bias in leaves:
                inner["bias"] = leaves[bias]
            if inner or not value:
                out[key] = inner
        elif path in leaves:
            out[key] = leaves[path]
    return out


def _fitting(paths: Mapping[str, Any], name: str, expressions: Sequence[str]) -> list[str]:
    """The paths that some expression fits; each must fit one."""
    if isinstance(expressions, str):
        raise TypeError(f"{name} must be a sequence of regular expressions, got the string {expressions!r}")
    found: dict[str, None] = {}
    for expression in expressions:
        fitting = [path for path in paths if re.fullmatch(expression, path)]
        if not fitting:
            raise ValueError(f"{name}: {expression!r} fits no path of params; there are {', '.join(paths)}")
        found |= dict.fromkeys(fitting)
    return list(found)


def _sites(leaves: Mapping[str, Any], reads: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[str]]]:
    """The norms, each with the linear layers that read it."""
    parents = dict.fromkeys(path.rpartition("/")[0] for path in leaves if path.endswith(("/scale", "/bias")))
    norms = {path: None for path in parents if f"{path}/kernel" not in leaves}
    for expression, templates in reads.items():
        for norm in _fitting(norms, "reads", [expression]):
            match = re.fullmatch(expression, norm)
            assert match is not None
            readers = [match.expand(template) for template in templates]
            for reader in readers:
                if f"{reader}/kernel" not in leaves:
                    raise ValueError(f"reads: params have no {reader + '/kernel'!r}, which reads {norm!r}")
            yield norm, readers
