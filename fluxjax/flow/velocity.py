"""What a velocity field is: a callable dx/dt = velocity(x, t), with or without a memory."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx

from fluxjax.shapes import Array, Float, Scalar

Velocity = Callable[[Array, Scalar], Array]
"""(x, t) -> dx/dt, a pytree."""

Memory = Any
"""What a velocity carries from one evaluation to the next: a pytree of arrays, or None."""

Condition = Any
"""What a velocity is conditioned on, such as an encoded prompt: a pytree of arrays."""


class StatefulVelocity(eqx.Module):
    """A velocity with a memory that goes from one evaluation to the next: a cache, a momentum.

    Called with `memory=`, it returns the value and the new memory. Called without, it starts from
    `init(x)` and returns only the value. `sample` and `stream` carry the memory.
    """

    @abstractmethod
    def init(self, x: Float[Array, "*shape"]) -> Memory:
        """Return the memory before the first evaluation, or None if this one needs no memory."""

    @abstractmethod
    def __call__(
        self, x: Float[Array, "*shape"], t: Scalar, *condition: Condition, memory: Memory = None
    ) -> Array | tuple[Array, Memory]:
        """Return the value; if a memory was passed, the value and the new memory."""


def initial_memory(velocity: Callable[..., Any], x: Float[Array, "*shape"]) -> Memory:
    """Return the memory that a velocity starts with: None unless it is a `StatefulVelocity`."""
    if isinstance(velocity, StatefulVelocity):
        return velocity.init(x)
    return None
