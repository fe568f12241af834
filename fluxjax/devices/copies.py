"""Gradients in what all devices of a split network have a copy of."""

import equinox as eqx
import jax

from fluxjax.flow.velocity import (
    AnyVelocity,
    Condition,
    Memory,
    StatefulVelocity,
    evaluate_with_memory,
    initial_memory,
)
from fluxjax.shapes import Array, Float, Scalar


def mean_of_copies(x: Float[Array, "*shape"], axes: tuple[str, ...]) -> Float[Array, "*shape"]:
    """Return the mean of an array over axes of a mesh, on which all devices have the same array.

    The value stays as it is. Use it in `jax.shard_map` with `check_vma=False`, as in `on_mesh`, on
    the input of a network that is split over these axes, so that gradients in the input are right.
    Without it each device would get its own part of the gradient, times the number of devices: sums
    and gathers of a forward pass are transposed to sums over devices, and what follows the network
    has a copy of its output on each device.

    **Arguments:** `axes`: such as `("tensor", "context")`.
    """
    # Its transpose is a mean too: the gradients' parts are summed, and the copies counted once.
    return jax.lax.pmean(x, axes)


class SplitVelocity(StatefulVelocity):
    """The velocity of a network that is split over axes of a mesh, with the right gradients in x.

    It is for programs inside of `jax.shard_map`, as `mean_of_copies` is.
    """

    velocity: AnyVelocity
    axes: tuple[str, ...] = eqx.field(static=True)

    def init(self, x: Array) -> Memory:
        return initial_memory(self.velocity, x)

    def __call__(
        self, x: Array, t: Scalar, *condition: Condition, memory: Memory = None
    ) -> Array | tuple[Array, Memory]:
        value, after = evaluate_with_memory(
            self.velocity, memory, mean_of_copies(x, self.axes), t, *condition
        )
        return value if memory is None else (value, after)
