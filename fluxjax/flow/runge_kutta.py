"""Integrators that combine velocities; all are exact where the velocity is constant."""

from typing import ClassVar

from fluxjax.flow.step import Step, X, scalar_like, start_time_only
from fluxjax.flow.velocity import Velocity
from fluxjax.shapes import PRNGKeyArray, Scalar


class _OneStep(Step):
    """A step that carries nothing to the next one."""

    def init(self, x: X) -> None:
        return None


class Euler(_OneStep):
    """Euler's method: x + (u - t) v.

    On the straight path of FLUX it equals DDIM with eta 0.

    **Source:** Song et al. 2021 (DDIM), eq. 12.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    evaluation_times = start_time_only

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: PRNGKeyArray | None,
    ) -> tuple[X, None, None]:
        return x + (u - t) * velocity(x, t), None, None


class Heun(_OneStep):
    """Heun's method: the mean of the velocities at both ends, the second one at Euler's result.

    Unlike the source, the last step is of order 2 as well, since the velocity is finite at t = 0.

    **Source:** Karras et al. 2022, algorithm 1.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: PRNGKeyArray | None,
    ) -> tuple[X, None, None]:
        first = velocity(x, t)
        second = velocity(x + (u - t) * first, u)
        return x + (u - t) / 2 * (first + second), None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
        return t, u


class Midpoint(_OneStep):
    """The midpoint method: the velocity at the middle time, after half of an Euler step.

    It equals RF-Solver.

    **Source:** Wang et al. 2024, algorithm 1.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: PRNGKeyArray | None,
    ) -> tuple[X, None, None]:
        half = (u - t) / 2
        return x + (u - t) * velocity(x + half * velocity(x, t), t + half), None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
        return t, t + (u - t) / 2


class RK4(_OneStep):
    """The classical Runge-Kutta method of order 4.

    **Source:** Kutta 1901.
    """

    order: ClassVar[int] = 4
    evaluations: ClassVar[int] = 4

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: PRNGKeyArray | None,
    ) -> tuple[X, None, None]:
        h = u - t
        first = velocity(x, t)
        second = velocity(x + h / 2 * first, t + h / 2)
        third = velocity(x + h / 2 * second, t + h / 2)
        fourth = velocity(x + h * third, u)
        return x + h / 6 * (first + 2 * second + 2 * third + fourth), None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
        return t, t + (u - t) / 2, u


class AB2(Step):
    """The Adams-Bashforth method of order 2, for steps of any lengths.

    The velocity is extrapolated from the last two nodes. The first step is Euler's.

    **Source:** Hairer et al. 1993, section III.5.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    evaluation_times = start_time_only

    def init(self, x: X) -> tuple[X, Scalar]:
        # Before the first step, pretend a step of infinite length: then nothing is extrapolated.
        return x * 0, scalar_like(x, float("inf"))

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: tuple[X, Scalar],
        *,
        key: PRNGKeyArray | None,
    ) -> tuple[X, tuple[X, Scalar], None]:
        previous_velocity, previous_length = state
        v = velocity(x, t)
        ratio = (u - t) / previous_length
        return x + (u - t) * (v + ratio / 2 * (v - previous_velocity)), (v, u - t), None
