"""Inversion: from an image to noise by rising times, and back, perhaps toward another prompt."""

import equinox as eqx
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import check_same_shape
from fluxjax.flow.step import EvaluationTimes, OptionalKey, Step, X
from fluxjax.flow.velocity import (
    Memory,
    StatefulVelocity,
    Velocity,
    evaluate_with_memory,
    initial_memory,
)
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Scalar, ScalarLike


class FireFlow(Step):
    """FireFlow: the midpoint method with one evaluation per step, for inversion and back.

    The velocity at the middle of the step before takes the place of the one at the start of this
    step. With steps that do not change abruptly, it is of order 2 as well.

    **Source:** Deng et al. 2024, algorithm 1.
    """

    order = 2
    evaluations = 1
    first_evaluations = 1

    def init(self, x: X) -> X:
        raise ValueError(
            "FireFlow's first state is an evaluation of the velocity. Call `start(velocity, x, t)` "
            "instead of `init(x)`, as `sample` does."
        )

    def start(self, velocity: Velocity, x: X, t: Scalar) -> X:
        return velocity(x, t)

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: X,
        *,
        key: OptionalKey,
    ) -> tuple[X, X, None]:
        half = (u - t) / 2
        middle = velocity(x + half * state, t + half)
        return x + (u - t) * middle, middle, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes:
        # Only the first step evaluates at its start, but it is not known which one is the first.
        return t, t + (u - t) / 2


TOWARDS = ("noise", "image")
"""Where a `Steered` velocity leads: to a known noise at t = 1, or to a known image at t = 0."""


@convert_arguments
class Steered(StatefulVelocity):
    """A velocity mixed with the straight one to a known end, as in RF-Inversion.

    It is (1 - rate) v + rate w. Toward noise w = (noise - x) / (1 - t), for the inversion of an
    image (rising times, a rate of 0.5). Toward an image w = (x - image) / t, for editing (falling
    times from the inverted image, a rate of 0.9 in the first quarter of the steps). With a rate of
    1 the end is reached exactly. With a lower one, both ways together do not return the image.

    One evaluation of the velocity each. At the very end, where w is 0 / 0, it is v alone.

    **Arguments:**

    - `velocity`: (x, t) -> dx/dt.
    - `target`: the noise or the image, in the shape of x.
    - `rate`: usually in [0, 1]; 0 is the velocity itself.
    - `towards`: "noise" or "image".
    - `low`, `high`: the rate is used only at times from `low` to `high`, and is 0 at others.

    **Raises:** `ValueError` for another `towards`, for numbers that are not finite, and, when
    evaluated, for a target of another shape than x.
    **Source:** Rout et al. 2024, eq. 8 and 15, in FLUX's direction of time.
    """

    velocity: Velocity
    target: Float[Array, "*shape"]
    rate: ScalarLike
    towards: str = eqx.field(static=True)
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("Steered", rate=self.rate, low=self.low, high=self.high)
        if self.towards not in TOWARDS:
            raise ValueError(
                f"`Steered(towards)` takes one of {', '.join(TOWARDS)}, got {self.towards!r}."
            )

    def init(self, x: X) -> Memory:
        return initial_memory(self.velocity, x)

    def __call__(
        self, x: X, t: ScalarLike, *condition: object, memory: Memory = None
    ) -> X | tuple[X, Memory]:
        check_same_shape("Steered", x, target=self.target)
        time = jnp.asarray(t, x.dtype)
        v, after = evaluate_with_memory(self.velocity, memory, x, time, *condition)
        straight, left = self._straight(x, time)
        used = (self.low <= time) & (time <= self.high) & (left > 0)
        rate = jnp.where(used, jnp.asarray(self.rate, x.dtype), 0)
        steered = v + rate * (straight - v.astype(x.dtype))
        if memory is None:
            return steered
        return steered, after

    def _straight(self, x: X, t: Scalar) -> tuple[X, Scalar]:
        """Return the velocity that leads straight to the target, and the time that is left."""
        target = self.target.astype(x.dtype)
        if self.towards == "noise":
            left = 1 - t
            return (target - x) / jnp.where(left > 0, left, 1), left
        return (x - target) / jnp.where(t > 0, t, 1), t
