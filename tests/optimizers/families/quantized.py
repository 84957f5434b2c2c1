"""States and gradients in 8 bits."""

import optax
from optimizers.case import Case

from jaxsoft import optimizers as o

CASES = {
    "quantize_state": Case(
        lambda: o.quantize_state(optax.adamw(1e-2), block_size=4, min_size=1),
        ready=True,
        converges=lambda lr: o.quantize_state(optax.adam(lr, b2=0.99), min_size=1),
        exports=("quantize_state",),
        # The old and the new moments of the one leaf in float32, and what the compiler makes of the maxima.
        temporary=4.0,
        injectable=False,
        strict=False,
    ),
    "quantize_state_in_pieces": Case(
        lambda: o.quantize_state(optax.adamw(1e-2), block_size=64, min_size=1, chunk_size=1 << 14),
        ready=True,
        # The updates, which are written over the gradients where these end with the step, and a copy of the
        # parameters, which the decay reads in the loop.
        temporary=2.1,
        injectable=False,
        compiles_once=False,
        strict=False,
    ),
    "quantize_state_in_pieces_sgd": Case(
        lambda: o.quantize_state(optax.trace(0.9), min_size=3, chunk_size=1 << 14),
        temporary=1.1,
        injectable=False,
        compiles_once=False,
    ),
    "quantize_state_stochastic": Case(
        lambda: o.quantize_state(
            optax.scale_by_lion(), min_size=1, stochastic_rounding=True, chunk_size=1 << 14
        ),
        temporary=2.1,
        injectable=False,
        compiles_once=False,
    ),
    "compress_gradients": Case(
        o.compress_gradients,
        exports=("compress_gradients",),
        temporary=0.25,  # the codes
        injectable=False,
    ),
    "compress_gradients_feedback": Case(
        lambda: o.compress_gradients("linear", error_feedback=True), temporary=1.25, injectable=False
    ),
}
