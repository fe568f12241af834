"""Sampling: a velocity integrated over an array of times, as one scan."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.integrate.base import Step, Velocity, begin, time_dtype
from fluxjax.integrate.runge_kutta import Euler
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar


class Sample(NamedTuple):
    """`x`: the end. `history`: x at every node, [nodes, ...], or None. `evaluations`: of the velocity, in all. `log_prob`: of
    what stochastic steps drew, the log-density of each, [nodes - 1], or None. `memory`: what a velocity that remembers
    has at the end, or None."""

    x: Array
    history: Array | None
    evaluations: int
    log_prob: Array | None
    memory: Any = None


def sample(
    velocity: Velocity,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    step: Step = Euler(),
    key: PRNGKeyArray | None = None,
    history: bool = False,
) -> Sample:
    """Integrate dx/dt = velocity(x, t) from the first time to the last.

    **Arguments:** `velocity`: (x, t) -> dx/dt, a pytree (`eqx.Partial` of a network). `x`: the state at `times[0]`, kept in
    its dtype, which should be float32. `times`: at least two nodes, in the order of travel; an array, so that other
    times of the same count compile nothing. `step`: the integrator. `key`: for stochastic steps. `history`: whether to
    return every node's state.
    **Raises:** `ValueError` for fewer than two times.
    """
    _check_times("sample", times)
    times = times.astype(time_dtype(x))
    arrays, static = eqx.partition(velocity, eqx.is_array)

    def body(carry, interval):
        x, state, memory = carry
        t, u, index = interval
        x, state, memory, told = _advance(step, eqx.combine(arrays, static), x, t, u, index, state, memory, key)
        return (x, state, memory), (x if history else None, told)

    intervals = (times[:-1], times[1:], jnp.arange(len(times) - 1))
    (end, _, memory), (path, log_prob) = jax.lax.scan(body, (x, step.init(x), begin(velocity, x)), intervals)
    nodes = None if path is None else jnp.concatenate([x[None], path])
    return Sample(end, nodes, step.evaluations * (len(times) - 1), log_prob, memory)


def asked_times(step: Step, times: Float[Array, " nodes"]) -> Float[Array, " asked"] | None:
    """Return all times at which a step asks the velocity from the first node to the last, or None if they are not known."""
    asked = jax.vmap(step.asked)(times[:-1], times[1:])
    return None if asked is None else jnp.concatenate(asked)


def _check_times(name: str, times: Array) -> None:
    if len(times) < 2:
        raise ValueError(f"`{name}(times)` needs at least 2 nodes, got {len(times)}. Make them with `flow_times(steps)`.")


def _advance(
    step: Step, velocity: Velocity, x: Array, t: Scalar, u: Scalar, index: Any, state: Any, memory: Any, key: Any
) -> tuple[Array, Any, Any, Any]:
    """Take one step; its key depends on its number alone. A memory passes through the step's evaluations one after another."""
    key = None if key is None else jax.random.fold_in(key, index)
    if memory is None:
        x, state, told = step(velocity, x, t, u, state, key=key)
        return x, state, None, told

    def remembering(x: Array, t: Scalar) -> Array:
        nonlocal memory
        value, memory = velocity(x, t, memory=memory)  # type: ignore[call-arg]
        return value

    x, state, told = step(remembering, x, t, u, state, key=key)
    return x, state, memory, told


class Progress(NamedTuple):
    """A step taken: its `number` from 0, the time `t` that it reached, `x` there, and `x0`, the image that it pointed to."""

    number: int
    t: Array
    x: Array
    x0: Array


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
    _check_times("stream", times)
    return _steps(velocity, x, times.astype(time_dtype(x)), step, key)


def _steps(velocity: Velocity, x: Array, times: Array, step: Step, key: PRNGKeyArray | None) -> Iterator[Progress]:
    state, memory = step.init(x), begin(velocity, x)
    for index in range(len(times) - 1):
        t, u = times[index], times[index + 1]
        x, state, memory, x0 = _compiled_step(step, velocity, x, t, u, jnp.asarray(index), state, memory, key)
        yield Progress(index, u, x, x0)


@eqx.filter_jit
def _compiled_step(step, velocity, x, t, u, index, state, memory, key):
    end, state, memory, _ = _advance(step, velocity, x, t, u, index, state, memory, key)
    return end, state, memory, end - u * (end - x) / (u - t)
