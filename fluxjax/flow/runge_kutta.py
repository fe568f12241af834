"""Integrators that combine velocities; all are exact where the velocity is constant."""

from fluxjax.flow.step import (
    EvaluationTimes,
    OptionalKey,
    Step,
    X,
    scalar_like,
    start_time_only,
)
from fluxjax.flow.velocity import Velocity
from fluxjax.shapes import Scalar


class _OneStep(Step):
    """A step that carries nothing to the next one."""

    def init(self, x: X) -> None:
        return None


class Euler(_OneStep):
    """Euler's method: x + (u - t) v.

    On the straight path of FLUX it equals DDIM with eta 0.

    **Source:** Song et al. 2021 (DDIM), eq. 12.
    """

    order = 1
    evaluations = 1

    evaluation_times = start_time_only

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: OptionalKey,
    ) -> tuple[X, None, None]:
        return x + (u - t) * velocity(x, t), None, None


class Heun(_OneStep):
    """Heun's method: the mean of the velocities at both ends, the second one at Euler's result.

    Unlike the source, the last step is of order 2 as well, since the velocity is finite at t = 0.

    **Source:** Karras et al. 2022, algorithm 1.
    """

    order = 2
    evaluations = 2

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: OptionalKey,
    ) -> tuple[X, None, None]:
        h = u - t
        first = velocity(x, t)
        second = velocity(x + h * first, u)
        return x + h / 2 * (first + second), None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes:
        return t, u


class Midpoint(_OneStep):
    """The midpoint method: the velocity at the middle time, after half of an Euler step.

    It equals RF-Solver.

    **Source:** Wang et al. 2024, algorithm 1.
    """

    order = 2
    evaluations = 2

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: OptionalKey,
    ) -> tuple[X, None, None]:
        half = (u - t) / 2
        x_middle = x + half * velocity(x, t)
        v_middle = velocity(x_middle, t + half)
        return x + (u - t) * v_middle, None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes:
        return t, t + (u - t) / 2


class RK4(_OneStep):
    """The classical Runge-Kutta method of order 4.

    **Source:** Kutta 1901.
    """

    order = 4
    evaluations = 4

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: OptionalKey,
    ) -> tuple[X, None, None]:
        h = u - t
        first = velocity(x, t)
        second = velocity(x + h / 2 * first, t + h / 2)
        third = velocity(x + h / 2 * second, t + h / 2)
        fourth = velocity(x + h * third, u)
        total = first + 2 * second + 2 * third + fourth
        return x + h / 6 * total, None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes:
        return t, t + (u - t) / 2, u


class AB2(Step):
    """The Adams-Bashforth method of order 2, for steps of any lengths.

    The velocity is extrapolated from the last two nodes. The first step is Euler's.

    **Source:** Hairer et al. 1993, section III.5.
    """

    order = 2
    evaluations = 1

    evaluation_times = start_time_only

    def init(self, x: X) -> tuple[X, Scalar]:
        # A previous step of infinite length, so that the first step extrapolates nothing.
        return x * 0, scalar_like(x, float("inf"))

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: tuple[X, Scalar],
        *,
        key: OptionalKey,
    ) -> tuple[X, tuple[X, Scalar], None]:
        previous_velocity, previous_length = state
        v = velocity(x, t)
        length = u - t
        ratio = length / previous_length
        extrapolated = v + ratio / 2 * (v - previous_velocity)
        return x + length * extrapolated, (v, length), None
