"""What a velocity is: a callable dx/dt = velocity(x, t), a pytree, with or without a memory."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx

from fluxjax.shapes import Array, Float, Scalar

Velocity = Callable[[Array, Scalar], Array]
"""(x, t) -> dx/dt, a pytree."""


class StatefulVelocity(eqx.Module):
    """A velocity that carries something from one evaluation to the next, as a cache or a momentum.

    Its call takes `memory` by keyword and then returns the value and the new memory; without it, it begins anew and returns
    the value alone. `sample` and `stream` carry the memory.
    """

    @abstractmethod
    def init(self, x: Float[Array, "*shape"]) -> Any:
        """Return the memory before the first evaluation, or None if there is nothing to remember after all."""

    @abstractmethod
    def __call__(
        self, x: Float[Array, "*shape"], t: Scalar, *condition: Any, memory: Any = None
    ) -> Any:
        """Return the value, and the memory if one was given."""


def initial_memory(velocity: Callable[..., Any], x: Float[Array, "*shape"]) -> Any:
    """Return the memory that a velocity begins with, None for most."""
    return velocity.init(x) if isinstance(velocity, StatefulVelocity) else None
