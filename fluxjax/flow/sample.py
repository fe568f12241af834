"""Sampling: a velocity integrated over an array of times, in one loop or in segments of one."""

from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import checked_times, checked_velocity
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import OptionalKey, Step, StepState
from fluxjax.flow.velocity import AnyVelocity, Memory, MemoryCarrier, Velocity, initial_memory
from fluxjax.shapes import Array, Float, Int, PRNGKeyArray, Scalar


class Sample(NamedTuple):
    """The result of `sample`.

    - `x`: the state at the last time.
    - `history`: the state at every node, [nodes, ...], or None.
    - `evaluations`: how often the velocity was evaluated, in all.
    - `log_prob`: the log-density of what each stochastic step drew, [nodes - 1], or None.
    - `memory`: the final memory of a `StatefulVelocity`, or None.
    """

    x: Array
    history: Array | None
    evaluations: int
    log_prob: Array | None
    memory: Memory = None


class Carry(NamedTuple):
    """What one step passes to the next."""

    x: Array
    step_state: StepState
    memory: Memory


class Interval(NamedTuple):
    """The times `t` and `u` at both ends of a step, and the step's `number` from 0."""

    t: Scalar
    u: Scalar
    number: Scalar


@convert_arguments
def sample(
    velocity: AnyVelocity,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    step: Step = Euler(),
    key: PRNGKeyArray | None = None,
    history: bool = False,
) -> Sample:
    """Integrate dx/dt = velocity(x, t) from the first time to the last, in one `jax.lax.scan`.

    **Arguments:**

    - `velocity`: (x, t) -> dx/dt, a pytree (such as `eqx.Partial` of a network). It returns the
      shape of x and a floating-point dtype that is not wider than the one that x is integrated in.
    - `x`: the state at `times[0]`, of any shape. It is integrated in float32 (float64 if it is
      float64), and the result has the dtype of x.
    - `times`: at least two nodes in the order of integration, either all falling (from noise to
      image) or, if `step.rising` allows it, all rising (from image to noise, an inversion). They
      are an array, so that other times of the same number need no new compilation.
    - `step`: the integrator.
    - `key`: for stochastic steps; step number i uses `fold_in(key, i)`.
    - `history`: whether to return the state at every node.

    **Raises:** `ValueError` for fewer than two times, times that are not finite or not strictly
    monotonic, times that the step does not support (traced times are not checked), and for a
    velocity that returns another shape or a wider dtype.
    """
    times = checked_times("sample", step, times, x)
    wide = x.astype(times.dtype)
    field = checked_velocity("sample", velocity)

    def body(carry: Carry, interval: Interval) -> tuple[Carry, tuple[Array | None, Array | None]]:
        carry, log_prob = take_step(step, field, carry, interval, key)
        return carry, (carry.x if history else None, log_prob)

    intervals = Interval(times[:-1], times[1:], jnp.arange(len(times) - 1))
    before = first_carry("sample", step, velocity, wide, times[0])
    end, (path, log_prob) = jax.lax.scan(body, before, intervals)
    nodes = None
    if path is not None:
        nodes = jnp.concatenate([x[None], path.astype(x.dtype)])
    evaluations = step.first_evaluations + step.evaluations * (len(times) - 1)
    return Sample(end.x.astype(x.dtype), nodes, evaluations, log_prob, end.memory)


class SampleState(eqx.Module):
    """A sampling run between two steps; see `begin_sample` and `advance_sample`.

    - `x`: the current state, in float32 (float64 for a float64 start).
    - `step_state`: the state of the integrator.
    - `memory`: the memory of a `StatefulVelocity`, or None.
    - `estimate`: the x0 that the last step pointed to, where the straight line through both ends
      of the step meets t = 0. Before the first step it is x itself.
    - `finite_steps`: the number of leading steps after which every number of x was finite. It
      equals the number of steps taken, unless NaN or infinity appeared.
    """

    x: Array
    step_state: StepState
    memory: Memory
    estimate: Array
    finite_steps: Int[Array, ""]


@convert_arguments
def begin_sample(
    velocity: AnyVelocity,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    step: Step,
) -> SampleState:
    """Return the state before the first step of a run that `advance_sample` continues.

    **Arguments:** as for `sample`. `times` are all nodes of the run.
    **Raises:** as `sample`.
    """
    times = checked_times("begin_sample", step, times, x)
    carry = first_carry("begin_sample", step, velocity, x.astype(times.dtype), times[0])
    return SampleState(carry.x, carry.step_state, carry.memory, carry.x, jnp.int32(0))


@convert_arguments
def advance_sample(
    velocity: AnyVelocity,
    state: SampleState,
    times: Float[Array, " nodes"],
    start: int | Int[Array, ""],
    stop: int | Int[Array, ""],
    *,
    step: Step,
    key: PRNGKeyArray | None = None,
) -> SampleState:
    """Take the steps number `start` to `stop` - 1, step i going from `times[i]` to `times[i + 1]`.

    All steps in any segments give the x of `sample` over the same times. With Python integers the
    loop is a scan, which has reverse-mode gradients. With traced integers it is a while loop, so
    that one compiled program serves segments of every length.

    **Arguments:**

    - `state`: from `begin_sample`, or from a call whose `stop` is now `start`.
    - `times`: all nodes of the run, not only those of the segment.
    - `start`, `stop`: numbers of steps, Python integers or integer scalars.
    - `velocity`, `step`, `key`: as for `sample`, and the same for all segments.

    **Returns:** the state at `times[stop]`.
    **Raises:** as `sample`, and `ValueError` unless 0 <= start <= stop <= steps (traced integers
    are not checked).
    """
    times = checked_times("advance_sample", step, times, state.x)
    _check_segment(start, stop, len(times) - 1)
    field = checked_velocity("advance_sample", velocity)

    def body(index: Scalar, state: SampleState) -> SampleState:
        before = Carry(state.x, state.step_state, state.memory)
        interval = Interval(times[index], times[index + 1], index)
        after, _ = take_step(step, field, before, interval, key)
        # Once a step is not finite, no later one counts, even if it is finite again.
        all_before = state.finite_steps == jnp.asarray(index, jnp.int32)
        finite = all_before & jnp.all(jnp.isfinite(after.x))
        return SampleState(
            after.x,
            after.step_state,
            after.memory,
            straight_estimate(before.x, after.x, interval),
            state.finite_steps + finite.astype(jnp.int32),
        )

    return jax.lax.fori_loop(start, stop, body, state)


def _check_segment(start: int | Array, stop: int | Array, steps: int) -> None:
    """**Raises:** `ValueError` for known numbers of steps that are not those of the times."""
    # Indices out of range would be clamped by JAX, and give steps of length 0.
    if isinstance(start, jax.core.Tracer) or isinstance(stop, jax.core.Tracer):
        return
    if not 0 <= int(start) <= int(stop) <= steps:
        raise ValueError(
            f"`advance_sample(start, stop)` needs 0 <= start <= stop <= {steps}, the number of "
            f"steps, got {start} and {stop}."
        )


def first_carry(call: str, step: Step, velocity: AnyVelocity, x: Array, t: Scalar) -> Carry:
    """Return what is passed to the first step, which starts at t."""
    memory = initial_memory(velocity, x)
    field = checked_velocity(call, velocity)
    if memory is None:
        return Carry(x, step.start(field, x, t), None)
    carrier = MemoryCarrier(field, memory)
    step_state = step.start(carrier, x, t)
    return Carry(x, step_state, carrier.memory)


def take_step(
    step: Step, velocity: AnyVelocity, carry: Carry, interval: Interval, key: OptionalKey
) -> tuple[Carry, Array | None]:
    """Take one step. Return its result, and the log-density of what it drew.

    The key of a step depends only on the step's number. A memory passes through all evaluations of
    the step, one after another.
    """
    t, u, number = interval
    # Folding in the number, instead of splitting a key at each step, gives a step the same key in
    # every segment of a run.
    if key is not None:
        key = jax.random.fold_in(key, number)

    if carry.memory is None:
        field = cast(Velocity, velocity)
        x, step_state, log_prob = step(field, carry.x, t, u, carry.step_state, key=key)
        return Carry(x, step_state, None), log_prob
    carrier = MemoryCarrier(cast(Velocity, velocity), carry.memory)
    x, step_state, log_prob = step(carrier, carry.x, t, u, carry.step_state, key=key)
    return Carry(x, step_state, carrier.memory), log_prob


def straight_estimate(x: Array, end: Array, interval: Interval) -> Array:
    """Return the x0 where the straight line through both ends of a step meets t = 0."""
    t, u, _ = interval
    return end - u * (end - x) / (u - t)


@convert_arguments
def evaluation_times(step: Step, times: Float[Array, " nodes"]) -> Float[Array, " times"] | None:
    """Return all times at which an integrator evaluates the velocity, from first node to last.

    **Arguments:** `times`: the nodes.
    **Returns:** the times, repeated if they are evaluated repeatedly, in no particular order; None
    if `step.evaluation_times` does not know them.
    """
    # One array per evaluation of a step, each with one time per step.
    by_stage = jax.vmap(step.evaluation_times)(times[:-1], times[1:])
    if by_stage is None:
        return None
    return jnp.concatenate(by_stage)
