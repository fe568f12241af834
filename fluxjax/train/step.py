"""One step of an optimizer, with an exponential moving average of the weights."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from fluxjax.arguments import convert_arguments
from fluxjax.shapes import Array, PRNGKeyArray, Scalar, ScalarLike

Leaf = Any
"""A leaf of a pytree: an array, or something that is not trained."""

Trainable = Any
"""Which leaves are trained: a function of one leaf, or a pytree of booleans."""


class TrainState(eqx.Module):
    """All that training changes, as one pytree to save and restore.

    `model`: the current weights, a network or a dictionary of what is trained of one. `ema`: their
    exponential moving average; None for none. `optimizer`: the state of the optimizer. `step`: the
    number of steps taken.
    """

    model: PyTree
    ema: PyTree
    optimizer: optax.OptState
    step: Array

    @classmethod
    def create(
        cls,
        model: PyTree,
        optimizer: optax.GradientTransformation,
        *,
        trainable: Trainable = eqx.is_inexact_array,
    ) -> "TrainState":
        """Return the state before the first step, whose average is the model itself.

        **Arguments:** `model`: a network, or a pytree of several. `trainable`: as for `make_step`.
        """
        optimizer_state = optimizer.init(eqx.filter(model, trainable))
        return cls(model, model, optimizer_state, jnp.zeros((), jnp.int32))


@convert_arguments
def make_step(
    loss: Callable[..., Scalar],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    trainable: Trainable = eqx.is_inexact_array,
) -> Callable[..., tuple[TrainState, Scalar]]:
    """Return a jitted training step: (state, *batch, key=) -> (state, loss).

    **Arguments:**

    - `loss`: (model, *batch, key=) -> scalar. The model is a network, or a pytree of several.
    - `optimizer`: of optax.
    - `ema_decay`: of the averaged weights, in [0, 1). The first steps use a smaller one,
      min(ema_decay, (1 + step) / (10 + step)).
    - `trainable`: which leaves are trained, as a function of one leaf or a pytree of booleans. For
      an adapter it is `fluxjax.lora.trainable(lora)`; its loss takes the model as part of the
      batch.
    """

    @eqx.filter_jit
    def step(state: TrainState, *batch: Any, key: PRNGKeyArray) -> tuple[TrainState, Scalar]:
        trained, frozen = eqx.partition(state.model, trainable)

        def loss_of(trained: PyTree) -> Scalar:
            return loss(eqx.combine(trained, frozen), *batch, key=key)

        value, gradient = eqx.filter_value_and_grad(loss_of)(trained)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, trained)
        model = eqx.apply_updates(state.model, updates)
        ema = average(state.ema, model, decay_at(state.step, ema_decay))
        return TrainState(model, ema, optimizer_state, state.step + 1), value

    return step


def decay_at(step: Array, decay: ScalarLike) -> Scalar:
    """Return the decay of an average after `step` steps: smaller at first.

    A long average would otherwise be dominated by the first weights for a long time.
    """
    steps = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + steps) / (10 + steps))


@convert_arguments
def average(ema: PyTree, model: PyTree, decay: ScalarLike) -> PyTree:
    """Return decay * ema + (1 - decay) * model, leaf by leaf.

    **Arguments:** `ema`, `model`: pytrees of the same structure. Leaves that are not
    floating-point arrays are those of `model`. `decay`: in [0, 1].
    """

    def mix(averaged: Leaf, current: Leaf) -> Leaf:
        if eqx.is_inexact_array(averaged):
            # The average may be wider than the weights.
            return averaged + (1 - decay) * (current.astype(averaged.dtype) - averaged)
        return current

    return jax.tree.map(mix, ema, model)
