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
    """Integrate dx/dt = velocity(x, t) from the first time to the last.

    **Arguments:** `velocity`: (x, t) -> dx/dt, a pytree (`eqx.Partial` of a network), in the shape of x and a floating-point
    dtype. `x`: the state at `times[0]`. It is integrated in float32 at least, and comes back in its own dtype. `times`: at
    least two nodes, in the order of travel; an array, so that other times of the same count compile nothing. They fall, from
    noise to image, or rise, to invert an image, which `step.rising` says whether the step can. `step`: the integrator. `key`:
    for stochastic steps. `history`: whether to return every node's state.
    **Raises:** `ValueError` for fewer than two times, times that are not finite, that neither fall nor rise strictly, or that
    the step does not take (traced times are not checked); and for a velocity of another shape, or of a wider dtype.
    """
    times = _checked_times("sample", step, times, x)
    wide = x.astype(times.dtype)
    arrays, static = eqx.partition(velocity, eqx.is_array)

    def body(carry, interval):
        x, state, memory = carry
        t, u, index = interval
        field = _checked_velocity("sample", eqx.combine(arrays, static))
        x, state, memory, told = _advance(step, field, x, t, u, index, state, memory, key)
        return (x, state, memory), (x if history else None, told)

    intervals = (times[:-1], times[1:], jnp.arange(len(times) - 1))
    (end, _, memory), (path, log_prob) = jax.lax.scan(
        body, (wide, step.init(wide), initial_memory(velocity, wide)), intervals
    )
    nodes = None if path is None else jnp.concatenate([x[None], path.astype(x.dtype)])
    return Sample(end.astype(x.dtype), nodes, step.evaluations * (len(times) - 1), log_prob, memory)


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
    """Return a velocity whose values are cast to the dtype of x; it has to have their shape."""

    def field(x: Array, t: Scalar, **memory: Any) -> Any:
        given = velocity(x, t, **memory)
        value, *after = given if memory else (given,)
        value = fitting_velocity(call, value, x)
        return (value, *after) if memory else value

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


def _advance(
    step: Step,
    velocity: Velocity,
    x: Array,
    t: Scalar,
    u: Scalar,
    index: Any,
    state: Any,
    memory: Any,
    key: Any,
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
    dtype, x = x.dtype, x.astype(times.dtype)
    state, memory = step.init(x), initial_memory(velocity, x)
    for index in range(len(times) - 1):
        t, u = times[index], times[index + 1]
        x, state, memory, x0 = _compiled_step(
            step, velocity, x, t, u, jnp.asarray(index), state, memory, key
        )
        yield Progress(index, u, x.astype(dtype), x0.astype(dtype))


@eqx.filter_jit
def _compiled_step(step, velocity, x, t, u, index, state, memory, key):
    end, state, memory, _ = _advance(
        step, _checked_velocity("stream", velocity), x, t, u, index, state, memory, key
    )
    return end, state, memory, end - u * (end - x) / (u - t)
