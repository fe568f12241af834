"""Training: the flow-matching loss, its times, caption dropout, guidance distillation, and an optimizer step with EMA."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from fluxjax.arguments import convert_arguments
from fluxjax.schedule import time_shift
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar, ScalarLike


class TrainState(eqx.Module):
    """All that training changes; a pytree, saved and restored whole."""

    model: eqx.Module
    ema: eqx.Module
    optimizer: Any
    step: Array

    @classmethod
    def create(
        cls, model: eqx.Module, optimizer: optax.GradientTransformation, *, trainable: Any = eqx.is_inexact_array
    ) -> "TrainState":
        """Start from a model, its own average. `trainable`: as for `make_step`."""
        return cls(model, model, optimizer.init(eqx.filter(model, trainable)), jnp.zeros((), jnp.int32))


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


@convert_arguments
def logit_normal_times(
    key: PRNGKeyArray, count: int, *, mean: ScalarLike = 0.0, deviation: ScalarLike = 1.0, mu: ScalarLike = 0.0
) -> Float[Array, " count"]:
    """Draw times whose logit is normal, then shift them by `mu` as the sampler's are.

    **Source:** Esser et al. 2024, section 3.1 and eq. 23.
    """
    draws = jax.random.normal(key, (count,))
    logits = jnp.asarray(mean, draws.dtype) + jnp.asarray(deviation, draws.dtype) * draws
    return time_shift(jax.nn.sigmoid(logits), mu)


@convert_arguments
def flow_matching_loss(
    velocity: Callable[[Array, Scalar], Array], x0: Float[Array, "*shape"], t: Scalar, noise: Float[Array, "*shape"]
) -> Scalar:
    """Return the mean squared error of one example's velocity at x_t = (1 - t) x0 + t noise; the target is noise - x0.

    **Source:** Lipman et al. 2022, eq. 23; Esser et al. 2024, eq. 2.
    """
    predicted = velocity((1 - t) * x0 + t * noise, t)
    return jnp.mean(jnp.square(predicted.astype(jnp.float32) - (noise - x0)))


@convert_arguments
def drop_captions(key: PRNGKeyArray, captions: Any, empty: Any, rate: float) -> Any:
    """Replace each caption of a batch by the empty one with probability `rate`.

    **Arguments:** `captions`: a pytree of arrays with a leading batch axis (ids, or encoded text). `empty`: the same for
    the empty prompt, without that axis. `rate`: in [0, 1].
    **Source:** Ho & Salimans 2022, algorithm 1.
    """
    count = jax.tree.leaves(captions)[0].shape[0]
    dropped = jax.random.bernoulli(key, rate, (count,))

    def pick(full: Array, none: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *(1,) * none.ndim), none, full)

    return jax.tree.map(pick, captions, empty)


@convert_arguments
def guided_target(conditional: Array, unconditional: Array, scale: ScalarLike) -> Array:
    """Return the velocity a distilled network learns: classifier-free guidance of its teacher at `scale`.

    1 is the conditional velocity. **Source:** Meng et al. 2022, eq. 3, with w = scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)
