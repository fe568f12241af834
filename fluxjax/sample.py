"""Sampling: a velocity integrated over an array of times, as one scan."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.integrate import Euler, Step, Velocity
from fluxjax.shapes import Array, Float, PRNGKeyArray


class Sample(NamedTuple):
    """`x`: the end. `history`: x at every node, [nodes, ...], or None. `evaluations`: of the velocity, in all."""

    x: Array
    history: Array | None
    evaluations: int


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
    if len(times) < 2:
        raise ValueError(f"`sample(times)` needs at least 2 nodes, got {len(times)}. Make them with `flow_times(steps)`.")
    arrays, static = eqx.partition(velocity, eqx.is_array)

    def body(carry, interval):
        x, state = carry
        t, u, index = interval
        one_key = None if key is None else jax.random.fold_in(key, index)
        x, state, _ = step(eqx.combine(arrays, static), x, t, u, state, key=one_key)
        return (x, state), x if history else None

    intervals = (times[:-1], times[1:], jnp.arange(len(times) - 1))
    (end, _), path = jax.lax.scan(body, (x, step.init(x)), intervals)
    nodes = None if path is None else jnp.concatenate([x[None], path])
    return Sample(end, nodes, step.evaluations * (len(times) - 1))
