"""What an integrator is: one step of dx/dt = velocity(x, t), from t to u, on the straight path x = (1 - t) x0 + t noise."""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.flow.velocity import Velocity
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar


class Step(eqx.Module):
    """An integrator. `order`: of its global error; `evaluations`: of the velocity, per step. `rising`: whether times may also
    rise, from image to noise, as an inversion takes them. `span`: the times between which the step has a meaning."""

    order: ClassVar[int]
    evaluations: ClassVar[int]
    rising: ClassVar[bool] = True
    span: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    @abstractmethod
    def init(self, x: Float[Array, "*shape"]) -> Any:
        """Return the state before the first step."""

    @abstractmethod
    def __call__(
        self,
        velocity: Velocity,
        x: Float[Array, "*shape"],
        t: Scalar,
        u: Scalar,
        state: Any,
        *,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "*shape"], Any, Any]:
        """Go from t to u; return the new x, the new state, and the log-probability of what was drawn, or None."""

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...] | None:
        """Return the times at which the velocity is asked from t to u, so that what depends on them alone is computed once for
        all steps; None, by default, if that is not known."""
        return None


def at_start(step: Step, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
    """`Step.evaluation_times` of a step that asks at t alone."""
    return (t,)


class StochasticStep(Step):
    """A step to a draw from a normal distribution. `order`: of its mean and its variance on a Gaussian."""

    rising: ClassVar[bool] = False
    span: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @abstractmethod
    def moments(
        self, velocity: Velocity, x: Float[Array, "*shape"], t: Scalar, u: Scalar, state: Any
    ) -> tuple[Float[Array, "*shape"], Scalar, Any]:
        """Return the mean and the deviation of x at u, and the new state."""

    def __call__(
        self,
        velocity: Velocity,
        x: Float[Array, "*shape"],
        t: Scalar,
        u: Scalar,
        state: Any,
        *,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "*shape"], Any, Scalar]:
        """As `Step`; the log-probability is a density over all of x, and 0 for a step without noise."""
        if key is None:
            raise ValueError(
                f"{type(self).__name__} draws noise. Pass key=jax.random.key(…) to `sample`."
            )
        mean, deviation, state = self.moments(velocity, x, t, u, state)
        noise = jax.random.normal(key, x.shape, x.dtype)
        noisy = deviation > 0
        log_density = (
            -0.5 * jnp.square(noise)
            - jnp.log(jnp.where(noisy, deviation, 1))
            - 0.5 * math.log(2 * math.pi)
        )
        log_prob = jnp.where(noisy, jnp.sum(log_density), 0)
        return (mean + deviation * noise).astype(x.dtype), state, log_prob


def time_dtype(x: Array) -> jnp.dtype:
    """Return the dtype that times have beside x: float32, or its own float64."""
    return wide_dtype(x.dtype)


def scalar_like(x: Array, value: float) -> Scalar:
    """Return a number as times are beside x."""
    return jnp.asarray(value, time_dtype(x))
