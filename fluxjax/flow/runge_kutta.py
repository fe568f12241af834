"""Integrators in the velocity, exact where it is constant."""

from typing import ClassVar

from fluxjax.flow.step import Step, at_start, scalar_like
from fluxjax.flow.velocity import Velocity
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar

X = Float[Array, "*shape"]


class _Single(Step):
    """A step that remembers nothing."""

    def init(self, x: X) -> None:
        return None


class Euler(_Single):
    """x + (u - t) v. On the straight path of FLUX this is DDIM with eta 0. Source: Song et al. 2021, eq. 12."""

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    evaluation_times = at_start

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: PRNGKeyArray | None,
    ):
        return x + (u - t) * velocity(x, t), None, None


class Heun(_Single):
    """The mean of the velocities at both ends, the second at Euler's end. Source: Karras et al. 2022, algorithm 1, but with the
    last step of order 2 as well, since the velocity is finite at 0."""

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
    ):
        v = velocity(x, t)
        return x + (u - t) / 2 * (v + velocity(x + (u - t) * v, u)), None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
        return t, u


class Midpoint(_Single):
    """The velocity halfway, at Euler's half step. RF-Solver is the same. Source: Wang et al. 2024, algorithm 1."""

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
    ):
        half = (u - t) / 2
        return x + (u - t) * velocity(x + half * velocity(x, t), t + half), None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
        return t, t + (u - t) / 2


class RK4(_Single):
    """The classical Runge-Kutta step. Source: Kutta 1901."""

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
    ):
        h = u - t
        first = velocity(x, t)
        second = velocity(x + h / 2 * first, t + h / 2)
        third = velocity(x + h / 2 * second, t + h / 2)
        fourth = velocity(x + h * third, u)
        return x + h / 6 * (first + 2 * second + 2 * third + fourth), None, None

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
        return t, t + (u - t) / 2, u


class AB2(Step):
    """The velocity extrapolated from the last two nodes, however they are spaced; the first step is Euler's.

    **Source:** Hairer et al. 1993, section III.5.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    evaluation_times = at_start

    def init(self, x: X) -> tuple[X, Scalar]:
        # A step of infinite length before the first: nothing is extrapolated.
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
    ):
        before, length = state
        v = velocity(x, t)
        ratio = (u - t) / length
        return x + (u - t) * (v + ratio / 2 * (v - before)), (v, u - t), None
