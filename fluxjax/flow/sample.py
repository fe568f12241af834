"""Sampling: a velocity integrated over an array of times, as one scan."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import Step, time_dtype
from fluxjax.flow.velocity import Velocity, initial_memory
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Int, PRNGKeyArray, Scalar


class Sample(NamedTuple):
    """The result of `sample`.

    `x`: the state at the last time. `history`: the state at every node, [nodes, ...], or None.
    `evaluations`: how often the velocity was evaluated, in all. `log_prob`: the log-density of what
    each stochastic step drew, [nodes - 1], or None. `memory`: the final memory of a
    `StatefulVelocity`, or None.
    """

    x: Array
    history: Array | None
    evaluations: int
    log_prob: Array | None
    memory: Any = None


class _Carry(NamedTuple):
    """What one step passes to the next."""

    x: Array
    step_state: Any
    memory: Any


class _Interval(NamedTuple):
    """The times `t` and `u` at both ends of a step, and the step's `index` from 0."""

    t: Scalar
    u: Scalar
    index: Scalar


@convert_arguments
def sample(
    velocity: Velocity,
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
    times = _checked_times("sample", step, times, x)
    wide = x.astype(times.dtype)
    field = _checked_velocity("sample", velocity)

    def body(carry: _Carry, interval: _Interval) -> tuple[_Carry, tuple[Any, Any]]:
        carry, log_prob = _take_step(step, field, carry, interval, key)
        return carry, (carry.x if history else None, log_prob)

    intervals = _Interval(times[:-1], times[1:], jnp.arange(len(times) - 1))
    end, (path, log_prob) = jax.lax.scan(body, _first_carry(step, velocity, wide), intervals)
    nodes = None
    if path is not None:
        nodes = jnp.concatenate([x[None], path.astype(x.dtype)])
    evaluations = step.evaluations * (len(times) - 1)
    return Sample(end.x.astype(x.dtype), nodes, evaluations, log_prob, end.memory)


class SampleState(eqx.Module):
    """The state of a sampling run between two steps; see `begin_sample` and `advance_sample`.

    `x`: the current state in float32 (float64 for a float64 start). `step_state`: the state of the
    integrator. `memory`: the memory of a `StatefulVelocity`, or None. `estimate`: the x0 that the
    last step pointed to, where the straight line through both ends of the step meets t = 0; before
    the first step, x itself. `finite_steps`: the number of leading steps after which every number
    of x was finite; it equals the number of steps taken unless NaN or infinity appeared.
    """

    x: Array
    step_state: Any
    memory: Any
    estimate: Array
    finite_steps: Int[Array, ""]


@convert_arguments
def begin_sample(
    velocity: Velocity,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    step: Step,
) -> SampleState:
    """Return the state before the first step of a run that `advance_sample` continues.

    Arguments and errors are those of `sample`.
    """
    times = _checked_times("begin_sample", step, times, x)
    carry = _first_carry(step, velocity, x.astype(times.dtype))
    return SampleState(carry.x, carry.step_state, carry.memory, carry.x, jnp.int32(0))


@convert_arguments
def advance_sample(
    velocity: Velocity,
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

    **Arguments:** `state`: from `begin_sample`, or from a call whose `stop` is now `start`.
    `times`: all nodes of the run. The others are those of `sample`, the same for all segments.
    **Returns:** the state at `times[stop]`.
    **Raises:** as `sample`, and `ValueError` unless 0 <= start <= stop <= steps (traced integers
    are not checked).
    """
    times = _checked_times("advance_sample", step, times, state.x)
    _check_segment(start, stop, len(times) - 1)
    field = _checked_velocity("advance_sample", velocity)

    def body(index: Scalar, state: SampleState) -> SampleState:
        before = _Carry(state.x, state.step_state, state.memory)
        interval = _Interval(times[index], times[index + 1], index)
        after, _ = _take_step(step, field, before, interval, key)
        all_before = state.finite_steps == jnp.asarray(index, jnp.int32)
        finite = all_before & jnp.all(jnp.isfinite(after.x))
        return SampleState(
            after.x,
            after.step_state,
            after.memory,
            _straight_estimate(before.x, after.x, interval),
            state.finite_steps + finite.astype(jnp.int32),
        )

    return jax.lax.fori_loop(start, stop, body, state)


def _check_segment(start: int | Array, stop: int | Array, steps: int) -> None:
    if isinstance(start, jax.core.Tracer) or isinstance(stop, jax.core.Tracer):
        return
    if not 0 <= int(start) <= int(stop) <= steps:
        raise ValueError(
            f"`advance_sample(start, stop)` needs 0 <= start <= stop <= {steps}, the number of "
            f"steps, got {start} and {stop}."
        )


def evaluation_times(step: Step, times: Float[Array, " nodes"]) -> Float[Array, " asked"] | None:
    """Return all times at which a step asks the velocity from the first node to the last, or None if they are not known."""
    asked = jax.vmap(step.evaluation_times)(times[:-1], times[1:])
    return None if asked is None else jnp.concatenate(asked)


def check_times(
    call: str,
    times: Array,
    *,
    step: str = "",
    rising: bool = True,
    span: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    """Check times of integration; of traced ones, only their count. `step`: the name of the step that takes them.

    **Raises:** `ValueError` for fewer than two, NaN or infinity, times outside of `span`, or that do not all fall, or rise
    where `rising` allows it.
    """
    if len(times) < 2:
        raise ValueError(
            f"`{call}(times)` needs at least 2 nodes, got {len(times)}. Make them with `flow_times(steps)`."
        )
    if isinstance(times, jax.core.Tracer):
        return
    check_finite(call, times=times)
    nodes = np.asarray(times, np.float64)
    ways = np.diff(nodes)
    if not (np.all(ways < 0) or np.all(ways > 0)):
        number = int(np.argmax(ways * np.sign(nodes[-1] - nodes[0]) <= 0))
        raise ValueError(
            f"`{call}(times)` needs times that fall, or rise, at every node, got {nodes[number]:g} and then "
            f"{nodes[number + 1]:g}. Make them with `flow_times(steps)`."
        )
    if nodes.min() < span[0] or nodes.max() > span[1]:
        raise ValueError(
            f"`{call}(times)` needs times from {span[0]:g} to {span[1]:g} for {step}, got {nodes.min():g} to {nodes.max():g}. "
            "1 is noise, 0 the image."
        )
    if ways[0] > 0 and not rising:
        raise ValueError(
            f"`{call}(times)` got rising times, and {step} only goes from noise to image. Pass falling times, or invert with "
            "a step that draws no noise, as `Euler()`, which is DDIM with eta 0."
        )


def _checked_times(call: str, step: Step, times: Array, x: Array) -> Array:
    """Return times in the dtype that they have beside x."""
    times = times.astype(time_dtype(x))
    check_times(call, times, step=type(step).__name__, rising=step.rising, span=step.span)
    return times


def _checked_velocity(call: str, velocity: Velocity) -> Velocity:
    """Return the velocity with a check of its values' shape, and a cast to the dtype of x."""

    def field(x: Array, t: Scalar, **memory: Any) -> Any:
        result = velocity(x, t, **memory)
        if not memory:
            return fitting_velocity(call, result, x)
        value, new_memory = result
        return fitting_velocity(call, value, x), new_memory

    return field


def fitting_velocity(call: str, value: Any, x: Array) -> Array:
    """Return a velocity's value in the dtype of x. **Raises:** `ValueError` for another shape or a wider dtype."""
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    narrower = (
        jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= jnp.finfo(x.dtype).bits
    )
    if shape != x.shape or not narrower:
        raise ValueError(
            f"`{call}(velocity)` needs a velocity that returns the shape of x and at most its precision, {x.dtype}"
            f"{list(x.shape)}, got {dtype}{list(shape)}. Reshape or cast what it returns."
        )
    return jnp.asarray(value, x.dtype)


def _first_carry(step: Step, velocity: Velocity, x: Array) -> _Carry:
    return _Carry(x, step.init(x), initial_memory(velocity, x))


def _take_step(
    step: Step, velocity: Velocity, carry: _Carry, interval: _Interval, key: PRNGKeyArray | None
) -> tuple[_Carry, Array | None]:
    """Take one step. Return its result, and the log-density of what it drew.

    The key of a step depends only on the step's index. A memory passes through all evaluations of
    the step, one after another.
    """
    t, u, index = interval
    memory = carry.memory
    if key is not None:
        key = jax.random.fold_in(key, index)

    def with_memory(x: Array, t: Scalar) -> Array:
        nonlocal memory
        value, memory = velocity(x, t, memory=memory)  # type: ignore[call-arg]
        return value

    field = velocity if memory is None else with_memory
    x, step_state, log_prob = step(field, carry.x, t, u, carry.step_state, key=key)
    return _Carry(x, step_state, memory), log_prob


def _straight_estimate(x: Array, end: Array, interval: _Interval) -> Array:
    """Return the x0 where the straight line through both ends of a step meets t = 0."""
    t, u, _ = interval
    return end - u * (end - x) / (u - t)


class Progress(NamedTuple):
    """A step taken: its `number` from 0, the time `t` that it reached, `x` there, and `x0`, the image that it pointed to."""

    number: int
    t: Array
    x: Array
    x0: Array


@convert_arguments
def stream(
    velocity: Velocity,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    step: Step = Euler(),
    key: PRNGKeyArray | None = None,
) -> Iterator[Progress]:
    """Integrate as `sample` does, a step at a time: for progress, previews, and to stop early.

    The step is compiled once for all. `x0` is where the straight line through both ends of the step meets t = 0, which for
    Euler's is the model's own estimate; it costs no evaluation. Arguments and errors as for `sample`.
    """
    return _steps(velocity, x, _checked_times("stream", step, times, x), step, key)


def _steps(
    velocity: Velocity, x: Array, times: Array, step: Step, key: PRNGKeyArray | None
) -> Iterator[Progress]:
    dtype = x.dtype
    carry = _first_carry(step, velocity, x.astype(times.dtype))
    for index in range(len(times) - 1):
        interval = _Interval(times[index], times[index + 1], jnp.asarray(index))
        carry, x0 = _compiled_step(step, velocity, carry, interval, key)
        yield Progress(index, interval.u, carry.x.astype(dtype), x0.astype(dtype))


@eqx.filter_jit
def _compiled_step(
    step: Step, velocity: Velocity, carry: _Carry, interval: _Interval, key: PRNGKeyArray | None
) -> tuple[_Carry, Array]:
    field = _checked_velocity("stream", velocity)
    after, _ = _take_step(step, field, carry, interval, key)
    return after, _straight_estimate(carry.x, after.x, interval)
