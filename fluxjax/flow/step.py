"""What an integrator is: one step of dx/dt = velocity(x, t), from the time t to the time u.

Steps assume the straight path x = (1 - t) x0 + t noise.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.flow.velocity import Velocity
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar

X = Float[Array, "*shape"]
"""The state that is integrated, of any shape."""

OptionalKey = PRNGKeyArray | None
"""The key of one step; None for a run without noise."""

EvaluationTimes = tuple[Scalar, ...]
"""The times at which one step evaluates the velocity."""

StepState = Any
"""What an integrator carries from one step to the next: a pytree of arrays, or None."""


class Step(eqx.Module):
    """An integrator.

    - `order`: of the global error.
    - `evaluations`: of the velocity, per step.
    - `first_evaluations`: further ones, before the first step; see `start`.
    - `rising`: whether times may also rise, from image to noise, as in an inversion.
    - `span`: the least and the greatest time at which the step is defined.
    """

    order: ClassVar[int]
    evaluations: ClassVar[int]
    first_evaluations: ClassVar[int] = 0
    rising: ClassVar[bool] = True
    span: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    @abstractmethod
    def init(self, x: X) -> StepState:
        """Return the state before the first step."""

    def start(self, velocity: Velocity, x: X, t: Scalar) -> StepState:
        """Return the state before the first step, which starts at t.

        It is `init(x)`, except for a step whose first state needs an evaluation of the velocity.
        """
        return self.init(x)

    @abstractmethod
    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: StepState,
        *,
        key: OptionalKey,
    ) -> tuple[X, StepState, Scalar | None]:
        """Take one step from t to u.

        **Returns:** the new x, the new state, and the log-density of what was drawn (None for a
        step that draws nothing).
        """

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes | None:
        """Return the times at which the step from t to u evaluates the velocity.

        What depends only on these times can then be computed once for all steps. None, the
        default, means that they are not known in advance.
        """
        return None


def start_time_only(step: Step, t: Scalar, u: Scalar) -> EvaluationTimes:
    """Return (t,): the `Step.evaluation_times` of a step that evaluates only at its start."""
    return (t,)


class StepAround(Step):
    """A step from noise to image that takes another one, whose properties and state it has."""

    rising: ClassVar[bool] = False
    span: ClassVar[tuple[float, float]] = (0.0, 1.0)
    step: eqx.AbstractVar[Step]

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.step.order

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return self.step.evaluations

    @property
    def first_evaluations(self) -> int:  # type: ignore[override]
        return self.step.first_evaluations

    def init(self, x: X) -> StepState:
        """Return the first state of the inner step."""
        return self.step.init(x)

    def start(self, velocity: Velocity, x: X, t: Scalar) -> StepState:
        """Return the first state of the inner step, which may evaluate the velocity."""
        return self.step.start(velocity, x, t)


class StochasticStep(Step):
    """A step whose result is drawn from a normal distribution.

    `order`: of the mean and the variance of x, for Gaussian data.
    """

    rising: ClassVar[bool] = False
    span: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @abstractmethod
    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: StepState
    ) -> tuple[X, Scalar, StepState]:
        """Return the mean and the standard deviation of x at u, and the new state."""

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: StepState,
        *,
        key: OptionalKey,
    ) -> tuple[X, StepState, Scalar]:
        """Take one step, as `Step`.

        The log-density is that of all of x at once; it is 0 for a step whose deviation is 0.
        """
        if key is None:
            raise ValueError(
                f"{type(self).__name__} draws noise. Pass key=jax.random.key(…) to `sample`."
            )
        # The dtype of x is kept: times, and so mean and deviation, may be wider.
        mean, deviation, state = self.moments(velocity, x, t, u, state)
        noise = jax.random.normal(key, x.shape, x.dtype)
        noisy = deviation > 0
        log_density = (
            -0.5 * jnp.square(noise)
            # The inner `where` keeps log(0) out of the gradient.
            - jnp.log(jnp.where(noisy, deviation, 1))
            - 0.5 * math.log(2 * math.pi)
        )
        log_prob = jnp.where(noisy, jnp.sum(log_density), 0)
        return (mean + deviation * noise).astype(x.dtype), state, log_prob


def time_dtype(x: Array) -> jnp.dtype:
    """Return the dtype of times that are used with x: float32, or float64 for a float64 x."""
    return wide_dtype(x.dtype)


def scalar_like(x: Array, value: float) -> Scalar:
    """Return a number as a scalar of the dtype that times have when they are used with x."""
    return jnp.asarray(value, time_dtype(x))
