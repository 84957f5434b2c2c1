"""Steps from a model of the loss.

Both methods need the loss itself, not only its gradient, as extra arguments of `update`, like the line searches of
optax. `stochastic_model_building` replaces the search for a step length by one quadratic model;
`scale_by_truncated_model` shortens steps for which a linear model predicts a loss below its lower bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsoft import _checks
from jaxsoft.optimizers import _common
from jaxsoft.optimizers._common import Scalar


def _rate(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _square_norms(g: Any) -> Any:
    return jax.tree.map(lambda g: jnp.sum(g * g), g)


class StochasticModelBuildingState(NamedTuple):
    """State of `stochastic_model_building`: steps taken, and the number of them taken from the model."""

    count: jax.Array
    model_count: jax.Array


def stochastic_model_building(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    zeta: Scalar = 0.99,
    sufficient_decrease: Scalar = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """SMB: a gradient step if it lowers the loss enough, else the minimum of a model built from that trial.

    With gradient g at the parameters and learning rate eta, the step `-eta g` is taken if it passes Armijo's test
    `f(params - eta g) <= f(params) - sufficient_decrease eta ||g||^2`. Else, with h the gradient at the trial
    point, each leaf takes the minimum of a quadratic model that interpolates both gradients:

        r = ||h - g|| / ||g||        step = -eta zeta^2 / (1 + 2 zeta r) ((r + 1/zeta - 1) g + h)

    In each leaf this is a descent direction for `g`, shortened where the gradient changes fast. (The paper writes the
    model with six inner products, which cancel to this.) There is no search: a step costs one more evaluation of the
    loss than plain SGD, and one more gradient if the test fails. It tolerates a learning rate about ten times too
    large for SGD, but not any. All evaluations must use the same batch, as for the line searches of optax:

        value, grad = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grad, state, params, value=value, value_fn=lambda p: loss(p, batch))

    Under `jit` the second gradient is computed only if it is needed (under `vmap`, always). If the gradient at the
    trial point is not finite, the step is not finite either: lower the learning rate.

    Args:
      learning_rate: A number or a schedule: length of the trial step. 1, the default, is large.
      zeta: Sharpness of the model, in (0, 1); smaller values give shorter steps.
      sufficient_decrease: The constant of Armijo's test, in (0, 1).

    Returns:
      A ready optimizer whose `update` needs the parameters and `value_fn`, a function from the parameters to the
      loss; `value`, the loss at the parameters, is computed if it is not given. `state.model_count` lets a
      schedule react: the authors lower the learning rate by 0.9 where more than 5% of an epoch's steps fail
      the test, and raise it by as much else.

    Raises:
      ValueError: for a number out of range, or if `update` is called without the parameters or `value_fn`.

    References:
      "Bolstering Stochastic Gradient Descent with Model Building".

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum(5.0 * x**2)
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = stochastic_model_building(0.5)  # a plain step would end at -4 x
      >>> updates, _ = tx.update(jax.grad(loss)(x), tx.init(x), x, value_fn=loss)
      >>> print((x + updates).round(2))
      [ 0.55 -1.09]
    """
    _common.check_learning_rate(learning_rate)
    _checks.number("zeta", zeta, above=0, below=1)
    _checks.number("sufficient_decrease", sufficient_decrease, above=0, below=1)

    def init(params: optax.Params) -> StochasticModelBuildingState:
        del params
        return StochasticModelBuildingState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        value: Any = None,
        value_fn: Any = None,
        **extra: Any,
    ):
        del extra
        if params is None:
            raise ValueError(
                "stochastic_model_building needs params: call update(updates, state, params, value_fn=...); "
                "got params=None"
            )
        if not callable(value_fn):
            raise ValueError(
                "stochastic_model_building needs value_fn, a function from the parameters to the loss of this "
                f"batch, got {_checks.describe(value_fn)}"
            )
        rate = _rate(learning_rate, state.count)
        g = _common.widen(updates)
        squares = _square_norms(g)
        trial = _common.cast_like(jax.tree.map(lambda p, g: p - rate * g, _common.widen(params), g), params)
        before = value_fn(params) if value is None else value
        square = _common.total(squares)
        dtype = _common.wide(before, square)
        bound = jnp.asarray(before, dtype) - sufficient_decrease * rate * square.astype(dtype)
        passed = jnp.asarray(value_fn(trial), dtype) <= bound

        def plain():
            return jax.tree.map(lambda g: (-rate * g).astype(g.dtype), g)

        def modelled():
            h = _common.widen(jax.grad(value_fn)(trial))

            def step(g, h, gg):
                yy = jnp.sum((h - g) ** 2)
                # A leaf whose squares underflow has no ratio: it stays unchanged, like one without a gradient.
                usable = ~(gg < jnp.finfo(g.dtype).tiny)
                square = yy / jnp.where(usable, gg, 1)
                r = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), square)
                scale = rate * zeta**2 / (1 + 2 * zeta * r)
                return jnp.where(usable, -scale * ((r + 1 / zeta - 1) * g + h), 0).astype(g.dtype)

            return jax.tree.map(step, g, h, squares)

        steps = lax.cond(passed, plain, modelled)
        new_state = StochasticModelBuildingState(
            jnp.asarray(optax.safe_increment(state.count)),
            state.model_count + jnp.asarray(~passed, jnp.int32),
        )
        return _common.cast_like(steps, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_truncated_model(
    learning_rate: optax.ScalarOrSchedule, lower_bound: Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    """The step of a linear model of the loss, cut off at a lower bound: Polyak's step as a cap.

        direction = min(1, (loss - lower_bound) / (learning_rate ||g||^2)) g

    A gradient step minimizes the linear model of the loss plus the squared distance. A model cut off at `lower_bound`
    predicts no loss below it, and the step ends where the model reaches it: the learning rate may then be far too
    large. The norm is that of the whole tree. Put `optax.scale_by_learning_rate` with the same learning rate after
    it:

        tx = optax.chain(scale_by_truncated_model(schedule), optax.scale_by_learning_rate(schedule))
        updates, state = tx.update(grad, state, params, value=loss)

    It is the truncated model of stochastic model-based minimization (aProx), and the linearized form of generalized
    implicit follow-the-regularized-leader. For a constant learning rate it equals
    `optax.polyak_sgd(learning_rate, f_min=lower_bound, variant="sps+")`; this one takes schedules and works in any
    chain.

    Args:
      learning_rate: A number or a schedule, positive, the same as in the following transformation.
      lower_bound: A lower bound of the loss. A loss below it gives direction 0.

    Returns:
      A gradient transformation whose `update` needs `value`, the loss of the batch that gave the gradient. Its
      state is `optax.ScaleByScheduleState`. Updates keep the dtype of the gradients.

    Raises:
      ValueError: for a learning rate that is not positive, or if `update` is called without `value`.

    References:
      "Stochastic model-based minimization of weakly convex functions"; "Generalized Implicit
      Follow-The-Regularized-Leader" (*Reconstructed*: its linearized instance).

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_truncated_model(learning_rate=1.0)
      >>> g = jnp.array([3.0, 4.0])
      >>> print(tx.update(g, tx.init(g), value=12.5)[0].round(4))  # 12.5 / 25 of the gradient
      [1.5 2. ]
    """
    if not callable(learning_rate):
        _checks.number("learning_rate", learning_rate, above=0)
    _checks.number("lower_bound", lower_bound)

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates: optax.Updates, state: Any, params: Any = None, *, value: Any = None, **extra: Any):
        del params, extra
        if value is None:
            raise ValueError(
                "scale_by_truncated_model needs value, the loss: call update(updates, state, params, value=loss); "
                "got value=None"
            )
        square = _common.total(_square_norms(_common.widen(updates)))
        room = jnp.maximum(jnp.asarray(value, square.dtype) - lower_bound, 0)
        drop = _rate(learning_rate, state.count) * square
        # Compares before dividing, which may overflow. If the gradient is not finite, the result is not finite either.
        whole = drop <= room
        factor = jnp.where(whole, 1, room / jnp.where(whole, 1, drop))
        u = jax.tree.map(lambda g: factor * g, _common.widen(updates))
        new_state = optax.ScaleByScheduleState(count=jnp.asarray(optax.safe_increment(state.count)))
        return _common.cast_like(u, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)
