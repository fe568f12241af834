"""Training: the flow-matching loss, its times, caption dropout, guidance distillation, and an optimizer step with EMA."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from fluxjax.arguments import convert_arguments
from fluxjax.shapes import Array, PRNGKeyArray, Scalar, ScalarLike


class TrainState(eqx.Module):
    """All that training changes; a pytree, saved and restored whole."""

    model: eqx.Module
    ema: eqx.Module
    optimizer: Any
    step: Array

    @classmethod
    def create(
        cls,
        model: eqx.Module,
        optimizer: optax.GradientTransformation,
        *,
        trainable: Any = eqx.is_inexact_array,
    ) -> "TrainState":
        """Start from a model, its own average. `trainable`: as for `make_step`."""
        return cls(
            model, model, optimizer.init(eqx.filter(model, trainable)), jnp.zeros((), jnp.int32)
        )


@convert_arguments
def make_step(
    loss: Callable[..., Scalar],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    trainable: Any = eqx.is_inexact_array,
) -> Callable[..., tuple[TrainState, Scalar]]:
    """Return a jitted `step(state, *batch, key) -> (state, loss)`.

    **Arguments:** `loss`: (model, *batch, key=) -> scalar. `ema_decay`: of the averaged weights, in [0, 1); the first
    steps average over fewer: min(ema_decay, (1 + step) / (10 + step)). `trainable`: which leaves are, as a function of one or
    a tree of booleans; an adapter's are `fluxjax.trainable(lora)`, and its loss takes the model as an argument of the batch.
    """

    @eqx.filter_jit
    def step(state: TrainState, *batch: Any, key: PRNGKeyArray) -> tuple[TrainState, Scalar]:
        trained, frozen = eqx.partition(state.model, trainable)

        def loss_of(trained: eqx.Module) -> Scalar:
            return loss(eqx.combine(trained, frozen), *batch, key=key)

        value, gradient = eqx.filter_value_and_grad(loss_of)(trained)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, trained)
        model = eqx.apply_updates(state.model, updates)
        age = state.step.astype(jnp.float32)
        ema = average(state.ema, model, jnp.minimum(ema_decay, (1 + age) / (10 + age)))
        return TrainState(model, ema, optimizer_state, state.step + 1), value

    return step


@convert_arguments
def average(ema: eqx.Module, model: eqx.Module, decay: ScalarLike) -> eqx.Module:
    """Return decay * ema + (1 - decay) * model, leaf by leaf."""

    def mix(a: Any, b: Any) -> Any:
        return a + (1 - decay) * (b - a) if eqx.is_inexact_array(a) else b

    return jax.tree.map(mix, ema, model)
