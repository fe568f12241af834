"""Integrators: one step of dx/dt = velocity(x, t), from t to u."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx

from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar

Velocity = Callable[[Array, Scalar], Array]
"""(x, t) -> dx/dt, a pytree."""


class Step(eqx.Module):
    """An integrator. `order`: of its global error; `evaluations`: of the velocity, a step."""

    order: ClassVar[int]
    evaluations: ClassVar[int]

    @abstractmethod
    def init(self, x: Float[Array, "*shape"]) -> Any:
        """Return the state before the first step."""

    @abstractmethod
    def __call__(
        self, velocity: Velocity, x: Float[Array, "*shape"], t: Scalar, u: Scalar, state: Any, *, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "*shape"], Any, Any]:
        """Go from t to u; return the new x, the new state, and what else the step has to tell."""


class Euler(Step):
    """x + (u - t) v. On the straight path of FLUX this is DDIM with eta 0. Source: Song et al. 2021, eq. 12."""

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def init(self, x: Float[Array, "*shape"]) -> None:
        return None

    def __call__(
        self, velocity: Velocity, x: Float[Array, "*shape"], t: Scalar, u: Scalar, state: None, *, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "*shape"], None, None]:
        return x + (u - t) * velocity(x, t), None, None
