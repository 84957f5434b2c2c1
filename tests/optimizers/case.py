"""A gradient transformation under the laws of `test_common.py`; `families/` lists them."""

import dataclasses
from collections.abc import Callable

import optax


@dataclasses.dataclass(frozen=True)
class Case:
    """One gradient transformation of `jaxsoft.optimizers` in one setting.

    Attributes:
      make: makes a fresh transformation; a function of the library or a `functools.partial` of one, so that
        `optax.inject_hyperparams` can be tried on it. Intervals are short, so that periodic work
        happens within the tests.
      ready: whether it has a learning rate; else it is a direction or a part, and zero gradients give zero updates.
      converges: the same optimizer for a learning-rate schedule from 1e-2 to 0 over 4000 steps, which finds the
        minimum of a quadratic and of Rosenbrock's function.
      exports: the public names that the case tests.
      temporary: arrays of the size of the parameters that a donated step may store beside its inputs and outputs.
      spike: by how many usual distances one gradient a million times too large may move the parameters; None where
        the transformation is not made against spikes.
      low_precision: whether it keeps moments in bfloat16.
      injectable: whether all its numbers may be traced; False for a wrapper around another transformation.
      strict: whether it runs under `jax_numpy_dtype_promotion="strict"`; False around `optax.adam`, which does not.
      compiles_once: whether a second update outside of `jit` compiles nothing; False where a branch or a loop runs a
        function that the update is given, or the update of another transformation.
      rescales_noise: whether a leaf of one element is noise, seen as such only if its dtype is known.
    """

    make: Callable[[], optax.GradientTransformation]
    ready: bool = False
    converges: Callable[[optax.Schedule], optax.GradientTransformation] | None = None
    exports: tuple[str, ...] = ()
    temporary: float = 0.0
    spike: float | None = None
    low_precision: bool = False
    injectable: bool = True
    strict: bool = True
    compiles_once: bool = True
    rescales_noise: bool = False
