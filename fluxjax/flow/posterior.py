"""Velocities of the posterior: a prior's velocity, conditioned on a measurement y = A(x0) + noise.

    measurement = Measurement(Mask(mask), mask * image, std=0.05)
    conditioned = Conditioned(velocity, measurement, tmpd())
    x0 = sample(conditioned, noise, times, step=Midpoint()).x

With g the gradient of log p(y | x_t), the exact velocity is v - t / (1 - t) g: the estimate of x0
moves by t^2 / (1 - t) g, and the estimate of the noise by -t g. Methods differ in how they correct
the estimate of x0:

- `tmpd()` is exact for Gaussian data. It costs the most, and is best with `Midpoint`.
- `pigdm()` costs 3 evaluations per step. It is best with steps that draw noise, `DDIM(1.0)`.
- `dps()` costs the same. It has a larger error, and diverges in few steps with little noise.
- `proximal()` and `NullSpace()` need no derivative of the velocity, and 1 evaluation per step.
- `DDNM` is a step for measurements without noise: inpainting and super-resolution.

No correction of the estimate gives modes of the data their posterior shares; see
`fluxjax.flow.particles`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import cast_value
from fluxjax.flow.corrections import Corrected, Correction
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.step import X
from fluxjax.flow.velocity import Condition, Memory, StatefulVelocity, Velocity, initial_memory
from fluxjax.numeric import check_finite, is_concrete_number, wide_dtype
from fluxjax.shapes import Array, Scalar, ScalarLike


class ConditionedEvaluation(NamedTuple):
    """One evaluation of a `Conditioned` velocity.

    - `velocity`: without the measurement.
    - `conditioned`: with it.
    - `log_likelihood`: the approximate log p(y | x_t), and 0 where the velocity is unguided.
    """

    velocity: Array
    conditioned: Array
    log_likelihood: Scalar


@convert_arguments
class Conditioned(StatefulVelocity):
    """The `Velocity` of x0 given a measurement, for any integrator.

    It is (x - estimate) / t with the corrected estimate of x0; at t = 0 it is the prior's.

    **Arguments:**

    - `velocity`: of the prior; it may be `Guided`, which then guides the prior. With a memory, as
      of a cache, it can not be differentiated, so that only corrections such as `proximal()` and
      `NullSpace()` take it.
    - `measurement`: of one x0, in the shape of x. Use `jax.vmap` for several.
    - `correction`: of the estimate of x0.
    - `high`: the velocity is unguided at later times, and at t = 1. There the model's covariance
      is 0 / 0: rounding the velocity to bfloat16 changes it by 20 % at t = 0.99.

    **Raises:** `ValueError` for a `high` outside (0, 1], for a y that has not the shape of what is
    measured of x, and for a velocity with a memory whose derivative is needed.
    """

    velocity: Velocity
    measurement: Measurement
    correction: Correction
    high: ScalarLike = 0.98

    def __check_init__(self):
        check_finite("Conditioned", high=self.high)
        if not is_concrete_number(self.high):
            return
        high = np.asarray(self.high)
        if not np.all((high > 0) & (high <= 1)):
            raise ValueError(
                f"`Conditioned(high)` needs a time in (0, 1], got {self.high}. 1 is noise."
            )

    def init(self, x: X) -> Memory:
        memory = initial_memory(self.velocity, x)
        if memory is not None and self.correction.differentiates:
            raise ValueError(
                f"`Conditioned(velocity)` with {type(self.correction).__name__}"
                f" differentiates the velocity, and a {type(self.velocity).__name__} with a memory "
                "has no derivative. Leave out its cache or momentum, or use `proximal()`."
            )
        return memory

    def __call__(
        self, x: X, t: ScalarLike, *condition: Condition, memory: Memory = None
    ) -> X | tuple[X, Memory]:
        self._check(x)
        wide, t = _widened(x, t)
        inside, inner_t = self._guided_at(t)

        def guided() -> tuple[Array, Memory]:
            after = memory

            def field(x: Array) -> Array:
                # Only corrections that do not differentiate get here with a memory.
                nonlocal after
                value, after = self._evaluate(x, inner_t, condition, memory)
                return value

            corrected = self.correction(field, wide, inner_t, self.measurement)
            return _toward(wide, inner_t, corrected), after

        # The branch is chosen at run time, so that unguided steps cost one evaluation.
        value, after = jax.lax.cond(
            inside, guided, lambda: self._evaluate(wide, t, condition, memory)
        )
        value = value.astype(x.dtype)
        return value if memory is None else (value, after)

    def evaluate(self, x: X, t: ScalarLike) -> ConditionedEvaluation:
        """Return the velocity with and without the measurement, and the measurement's likelihood.

        The likelihood is meant for weights: with a covariance that is "model", its derivative is
        NaN where eigenvalues are equal, as for the hidden pixels of a mask.

        **Raises:** as the call, and `ValueError` for a correction that has no likelihood, or a
        measurement whose std is 0.
        """
        self._check(x)
        wide, t = _widened(x, t)
        inside, inner_t = self._guided_at(t)

        def field(x: Array) -> Array:
            return self._evaluate(x, inner_t, (), None)[0]

        def guided() -> ConditionedEvaluation:
            corrected, log_likelihood = self.correction.with_log_likelihood(
                field, wide, inner_t, self.measurement
            )
            conditioned = _toward(wide, inner_t, corrected)
            weight = log_likelihood.astype(wide.dtype)
            return ConditionedEvaluation(corrected.velocity, conditioned, weight)

        def unguided() -> ConditionedEvaluation:
            value, _ = self._evaluate(wide, t, (), None)
            # Made from x, as `jax.shard_map` wants both branches to vary over the same axes.
            return ConditionedEvaluation(value, value, jnp.sum(jnp.zeros_like(wide)))

        return jax.lax.cond(inside, guided, unguided)

    def _check(self, x: X) -> None:
        self.init(x)
        self.measurement.check(x)

    def _guided_at(self, t: Scalar) -> tuple[Array, Scalar]:
        """Return whether the velocity is guided at t, and a time at which it can be."""
        inside = (t > 0) & (t < 1) & (t <= jnp.asarray(self.high, t.dtype))
        # Under `jax.vmap` both branches are evaluated, and NaN would spoil the gradient of both.
        return inside, jnp.where(inside, t, 0.5)

    def _evaluate(
        self, x: X, t: Scalar, condition: tuple[Condition, ...], memory: Memory
    ) -> tuple[X, Memory]:
        """Return the velocity without the measurement, in the dtype of x, and the new memory."""
        if memory is None:
            return cast_value("Conditioned", self.velocity(x, t, *condition), x), None
        value, after = self.velocity(x, t, *condition, memory=memory)  # type: ignore[call-arg]
        return cast_value("Conditioned", value, x), after


def _widened(x: X, t: ScalarLike) -> tuple[X, Scalar]:
    """Return x and t in at least float32, in which estimates are corrected."""
    dtype = wide_dtype(x.dtype)
    return x.astype(dtype), jnp.asarray(t, dtype)


def _toward(x: X, t: Scalar, corrected: Corrected) -> X:
    """Return the velocity whose estimate of x0 is the corrected one."""
    return (x - corrected.estimate) / t
