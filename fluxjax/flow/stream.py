"""Sampling one step at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import checked_times, checked_velocity
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.sample import Carry, Interval, first_carry, straight_estimate, take_step
from fluxjax.flow.step import OptionalKey, Step
from fluxjax.flow.velocity import AnyVelocity
from fluxjax.shapes import Array, Float, PRNGKeyArray


class Progress(NamedTuple):
    """One step of a sampling run.

    `number`: of the step, from 0. `t`: the time that it reached. `x`: the state there. `x0`: the
    image that it pointed to, where the straight line through both ends of the step meets t = 0.
    """

    number: int
    t: Array
    x: Array
    x0: Array


@convert_arguments
def stream(
    velocity: AnyVelocity,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    step: Step = Euler(),
    key: PRNGKeyArray | None = None,
) -> Iterator[Progress]:
    """Integrate as `sample` does, one step at a time: for progress, previews, and to stop early.

    The step is compiled once for all steps, and `x0` needs no further evaluation; for Euler's
    steps it is the model's own estimate.

    **Arguments:** as `sample`.
    **Returns:** an iterator over the steps, which takes each step when it is asked for it.
    **Raises:** as `sample`; what concerns the times, before the first step.
    """
    times = checked_times("stream", step, times, x)
    return _steps(velocity, x, times, step, key)


def _steps(
    velocity: AnyVelocity, x: Array, times: Array, step: Step, key: OptionalKey
) -> Iterator[Progress]:
    """Yield the progress after each step, of which each is one call of a compiled program."""
    dtype = x.dtype
    carry = _compiled_start("stream", step, velocity, x.astype(times.dtype), times[0])
    for index in range(len(times) - 1):
        # An array, since a Python number would be compiled anew for every step.
        number = jnp.asarray(index)
        interval = Interval(times[index], times[index + 1], number)
        carry, x0 = _compiled_step(step, velocity, carry, interval, key)
        yield Progress(index, interval.u, carry.x.astype(dtype), x0.astype(dtype))


_compiled_start = eqx.filter_jit(first_carry)


@eqx.filter_jit
def _compiled_step(
    step: Step, velocity: AnyVelocity, carry: Carry, interval: Interval, key: OptionalKey
) -> tuple[Carry, Array]:
    """Take a step; return the new state, and the image that the step points to."""
    field = checked_velocity("stream", velocity)
    after, _ = take_step(step, field, carry, interval, key)
    return after, straight_estimate(carry.x, after.x, interval)
