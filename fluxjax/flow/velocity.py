"""What a velocity field is: a callable dx/dt = velocity(x, t), with or without a memory."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax

from fluxjax.shapes import Array, Float, Scalar

Loop = TypeVar("Loop")
"""What a loop passes from one iteration to the next: a pytree of arrays."""

Item = Any
"""What one iteration of a loop reads: a pytree of arrays, or None."""

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


AnyVelocity = Velocity | StatefulVelocity
"""A velocity with or without a memory, as `sample` takes them."""


def initial_memory(velocity: Callable[..., Any], x: Float[Array, "*shape"]) -> Memory:
    """Return the memory that a velocity starts with: None unless it is a `StatefulVelocity`."""
    if isinstance(velocity, StatefulVelocity):
        return velocity.init(x)
    return None


def evaluate_with_memory(
    velocity: Callable[..., Any], memory: Memory, *inputs: Any
) -> tuple[Array, Memory]:
    """Return velocity(*inputs) and its new memory; a memory of None stays None."""
    if memory is None:
        return velocity(*inputs), None
    return velocity(*inputs, memory=memory)


class MemoryCarrier:
    """A velocity with its memory, which passes through all evaluations of one step.

    Integrators know nothing of memories, so this object holds the current one. It lives only while
    a step is traced. A step that evaluates the velocity in a loop uses `scan_evaluations`.
    """

    def __init__(self, velocity: Velocity, memory: Memory):
        self.velocity = velocity
        self.memory = memory

    def __call__(self, x: Float[Array, "*shape"], t: Scalar) -> Float[Array, "*shape"]:
        value, self.memory = self.velocity(x, t, memory=self.memory)  # type: ignore[call-arg]
        return value


def scan_evaluations(
    velocity: Velocity,
    body: Callable[[Loop, Item], Loop],
    carry: Loop,
    items: Item = None,
    *,
    length: int | None = None,
) -> Loop:
    """Loop over items with `jax.lax.scan`, in a step whose `body` evaluates the velocity.

    The memory of a `MemoryCarrier` passes through the iterations. A plain scan would leave in it a
    value that exists only inside of the loop.

    **Arguments:** `body`: (carry, item) -> carry. `items`, `length`: as for `jax.lax.scan`.
    **Returns:** the last carry.
    """

    def iterate(before: tuple[Loop, Memory], item: Item) -> tuple[tuple[Loop, Memory], None]:
        carry, carrier.memory = before
        carry = body(carry, item)
        return (carry, carrier.memory), None

    # A velocity without memory: nothing is carried beside what the body carries.
    carrier = MemoryCarrier(velocity, None)
    if isinstance(velocity, MemoryCarrier):
        carrier = velocity
    before = carry, carrier.memory
    (carry, carrier.memory), _ = jax.lax.scan(iterate, before, items, length=length)
    return carry
