"""Twisted sequential Monte Carlo: weighted particles that sample the posterior of a measurement.

Methods that only correct the estimate of x0 keep the prior's shares of modes; weights repair them.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import checked_times
from fluxjax.flow.posterior import Conditioned, ConditionedEvaluation
from fluxjax.flow.step import StepState, StochasticStep
from fluxjax.flow.velocity import initial_memory
from fluxjax.shapes import Array, Float, Int, PRNGKeyArray, Scalar


class Particles(eqx.Module):
    """The result of `twisted_sample`.

    - `x`: the particles, [particles, ...].
    - `log_weights`: normalized, [particles]: their exponentials sum to 1.
    - `log_evidence`: an estimate of log p(y); its exponential is unbiased.
    - `effective_sizes`: 1 / sum(weights^2) before each step and at the end, [nodes].
    """

    x: Array
    log_weights: Float[Array, " particles"]
    log_evidence: Float[Array, ""]
    effective_sizes: Float[Array, " nodes"]

    @convert_arguments
    def draw(self, count: int, *, key: PRNGKeyArray) -> Array:
        """Return particles drawn by their weights, with replacement: [count, ...]."""
        chosen = jax.random.categorical(key, self.log_weights, shape=(count,))
        return self.x[chosen]


class _Swarm(NamedTuple):
    """The particles at a node.

    - `step_state`: of the integrator, one for each particle.
    - `log_weights`: not normalized; relative to `log_evidence`.
    - `log_likelihood`: the approximate log p(y | x_t) that the weights contain.
    """

    x: Array
    step_state: StepState
    log_weights: Array
    log_likelihood: Array
    log_evidence: Scalar


class _Interval(NamedTuple):
    t: Scalar
    u: Scalar
    number: Scalar


class _Group(eqx.Module):
    """All particles, which may be divided over an axis of a mesh inside `jax.shard_map`."""

    axis: str | None = eqx.field(static=True)

    def gather(self, values: Array) -> Array:
        """Return the values of all particles."""
        if self.axis is None:
            return values
        return jax.lax.all_gather(values, self.axis, tiled=True)

    def shared(self, value: Array) -> Array:
        """Return a value that is the same on all devices, and known to `shard_map` as such."""
        if self.axis is None:
            return value
        return jax.lax.pmean(value, self.axis)

    def own_numbers(self, own: int) -> Int[Array, " own"]:
        """Return the numbers, among all particles, of those on this device."""
        numbers = jnp.arange(own, dtype=jnp.int32)
        if self.axis is None:
            return numbers
        return numbers + own * jax.lax.axis_index(self.axis)

    def take(self, tree: StepState, ancestors: Int[Array, " own"]) -> StepState:
        """Return the ancestor of each of this device's particles, from all particles."""
        return jax.tree.map(lambda leaf: self.gather(leaf)[ancestors], tree)


@convert_arguments
def twisted_sample(
    conditioned: Conditioned,
    x: Float[Array, "particles *shape"],
    times: Float[Array, " nodes"],
    *,
    step: StochasticStep,
    key: PRNGKeyArray,
    axis: str | None = None,
) -> Particles:
    """Sample the posterior by particles: drawn from a conditioned velocity, weighted, resampled.

    The weights make up for what the conditioned velocity approximates: with more particles, x is
    distributed as a run of the same steps with the prior's velocity, given y. Each step costs one
    evaluation of the conditioned velocity per particle.

    Resampling is systematic, whenever the effective size is below half of the particles.

    **Arguments:**

    - `conditioned`: the velocity with a measurement, whose std is above 0, and a `Gain`. Without
      derivatives of the velocity (`proximal()`), many more particles are needed.
    - `x`: normal noise, one row per particle. Under `jax.jit` the rows may be sharded over an axis
      of a mesh, such as `data`.
    - `times`: they fall to 0.
    - `step`: draws from a normal distribution and evaluates the velocity once, at its start, as
      `DDIM(1.0)`. A deterministic step would leave the particles to their first weights.
    - `key`: each particle's noise depends on its number, not on how particles are sharded.
    - `axis`: inside `jax.shard_map`, the mesh axis over which the rows of x are divided. The
      results are then this device's rows, and the same evidence on every device.

    **Raises:** `ValueError` for times that do not fall to 0 (traced ones are not checked), a step
    with other evaluations, a velocity with a memory, and as `Conditioned.evaluate`.
    **Source:** Wu et al. 2023 (twisted diffusion sampler), algorithm 1; Douc & Cappé 2005
    (systematic resampling).
    """
    times = checked_times("twisted_sample", step, times, x)
    _check(conditioned, step, times, x[0])
    wide = x.astype(times.dtype)
    group = _Group(axis)

    def body(swarm: _Swarm, interval: _Interval) -> tuple[_Swarm, Scalar]:
        return _advance(conditioned, step, group, swarm, interval, key)

    # Made from x, so that inside `shard_map` they vary over the same axes as what replaces them.
    zeros = jnp.sum(jnp.zeros_like(wide).reshape(len(x), -1), 1)
    start = _Swarm(wide, jax.vmap(step.init)(wide), zeros, zeros, jnp.sum(group.gather(zeros)))
    intervals = _Interval(times[:-1], times[1:], jnp.arange(len(times) - 1))
    end, sizes = jax.lax.scan(body, start, intervals)
    likelihood = jax.vmap(conditioned.measurement.log_likelihood)(end.x)
    log_weights = end.log_weights + likelihood - end.log_likelihood
    everyone = group.gather(log_weights)
    total = jax.nn.logsumexp(everyone)
    log_evidence = end.log_evidence + total - jnp.log(jnp.asarray(len(everyone), total.dtype))
    return Particles(
        end.x.astype(x.dtype),
        log_weights - total,
        group.shared(log_evidence),
        group.shared(jnp.append(sizes, _effective_size(everyone))),
    )


def _check(conditioned: Conditioned, step: StochasticStep, times: Array, x: Array) -> None:
    if step.evaluations != 1:
        raise ValueError(
            "`twisted_sample(step)` needs a step that evaluates the velocity once, got "
            f"{type(step).__name__} with {step.evaluations}. Use `DDIM(1.0)`."
        )
    if initial_memory(conditioned, x) is not None:
        raise ValueError(
            "`twisted_sample(conditioned)` evaluates many particles and keeps no memory. Leave out "
            f"the cache or momentum of its {type(conditioned.velocity).__name__}."
        )
    if not isinstance(times, jax.core.Tracer) and float(np.asarray(times)[-1]) != 0:
        raise ValueError(
            f"`twisted_sample(times)` needs times that fall to 0, got {float(times[-1]):g} as the "
            "last. The likelihood is that of x0."
        )


def _advance(
    conditioned: Conditioned,
    step: StochasticStep,
    group: _Group,
    swarm: _Swarm,
    interval: _Interval,
    key: PRNGKeyArray,
) -> tuple[_Swarm, Scalar]:
    """Weigh the particles at t, resample them, and draw them at u. Return their effective size."""
    t, u, number = interval
    noise_key, resample_key = jax.random.split(jax.random.fold_in(key, number))
    evaluation = jax.vmap(lambda x: conditioned.evaluate(x, t))(swarm.x)
    log_weights = swarm.log_weights + evaluation.log_likelihood - swarm.log_likelihood
    everyone = group.gather(log_weights)
    size = _effective_size(everyone)
    resampled = size < len(everyone) / 2
    ancestors = jnp.where(
        resampled, _systematic(everyone, resample_key), jnp.arange(len(everyone), dtype=jnp.int32)
    )
    own = group.own_numbers(len(log_weights))
    x, state, evaluation = group.take((swarm.x, swarm.step_state, evaluation), ancestors[own])
    # Equal weights after resampling: what they had in common goes into the evidence.
    total = jax.nn.logsumexp(everyone) - jnp.log(jnp.asarray(len(everyone), everyone.dtype))
    log_weights = jnp.where(resampled, 0, log_weights)
    log_evidence = swarm.log_evidence + jnp.where(resampled, total, 0)

    def move(
        x: Array, state: StepState, evaluation: ConditionedEvaluation, number: Scalar
    ) -> tuple[Array, StepState, Scalar]:
        noise = jax.random.normal(jax.random.fold_in(noise_key, number), x.shape, x.dtype)
        return _move(step, x, state, evaluation, (t, u), noise)

    x, state, ratio = jax.vmap(move)(x, state, evaluation, own)
    log_likelihood = evaluation.log_likelihood
    return _Swarm(x, state, log_weights + ratio, log_likelihood, log_evidence), size


def _move(
    step: StochasticStep,
    x: Array,
    state: StepState,
    evaluation: ConditionedEvaluation,
    ends: tuple[Scalar, Scalar],
    noise: Array,
) -> tuple[Array, StepState, Scalar]:
    """Return one particle at u, and log N(x; without the measurement) - log N(x; with it)."""
    t, u = ends
    # The step evaluates the velocity once, at x and t, where its value is known.
    plain, deviation, plain_state = step.moments(lambda *_: evaluation.velocity, x, t, u, state)
    mean, _, _ = step.moments(lambda *_: evaluation.conditioned, x, t, u, state)
    noisy = deviation > 0
    # Without noise no weight can make up for another mean.
    moved = jnp.where(noisy, mean + deviation * noise, plain)
    shift = (mean - plain) / jnp.where(noisy, deviation, 1)
    ratio = -jnp.sum(noise * shift) - 0.5 * jnp.sum(jnp.square(shift))
    return moved.astype(x.dtype), plain_state, jnp.where(noisy, ratio, 0).astype(x.dtype)


def _effective_size(log_weights: Array) -> Scalar:
    """Return 1 / sum(weights^2) of normalized weights."""
    return jnp.exp(2 * jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(2 * log_weights))


def _systematic(log_weights: Array, key: PRNGKeyArray) -> Int[Array, " particles"]:
    """Return the ancestor of each particle: one random offset, then even steps of the weights."""
    count = len(log_weights)
    cumulative = jnp.cumsum(jax.nn.softmax(log_weights))
    offset = jax.random.uniform(key, (), log_weights.dtype)
    positions = (jnp.arange(count, dtype=log_weights.dtype) + offset) / count
    # The last sum may be rounded to less than the last position.
    return jnp.minimum(jnp.searchsorted(cumulative, positions), count - 1).astype(jnp.int32)
