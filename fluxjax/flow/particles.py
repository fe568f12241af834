"""Twisted sequential Monte Carlo: weighted particles that sample the posterior of a measurement.

    conditioned = Conditioned(velocity, measurement, tmpd())
    noise = jax.random.normal(noise_key, (16, *shape))
    particles = twisted_sample(conditioned, noise, times, step=DDIM(1.0), key=key)
    x0 = particles.draw(1, key=draw_key)[0]

Methods that only correct the estimate of x0 keep the prior's shares of modes; weights repair them.
The log-evidence compares priors, or operators, for one measurement.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import checked_times
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.posterior import Conditioned, ConditionedEvaluation
from fluxjax.flow.sample import Interval
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
    `Conditioned.evaluate` per particle. With a covariance that is "model", as of `tmpd()`, that
    includes a Jacobian-vector product of the velocity for each entry of y.

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
    _check(conditioned, step, times, x)
    wide = x.astype(times.dtype)
    group = _Group(axis)
    # Made from x, so that inside `shard_map` they vary over the same axes as what replaces them.
    zeros = jnp.sum(jnp.zeros_like(wide).reshape(len(x), -1), 1)
    run = _Run(conditioned, step, group, key)
    start = _Swarm(wide, jax.vmap(step.init)(wide), zeros, zeros, jnp.sum(group.gather(zeros)))
    intervals = Interval(times[:-1], times[1:], jnp.arange(len(times) - 1))
    # Not the method itself, which JAX would have to hash with the arrays of its run.
    end, sizes = jax.lax.scan(lambda swarm, node: run.advance(swarm, node), start, intervals)
    # At t = 0 the approximate likelihood gives way to the exact one.
    likelihood = jax.vmap(conditioned.measurement.log_likelihood)(end.x)
    own_weights = end.log_weights + likelihood - end.log_likelihood
    weights = group.gather(own_weights)
    sizes = jnp.append(sizes, _effective_size(weights))
    return Particles(
        end.x.astype(x.dtype),
        own_weights - jax.nn.logsumexp(weights),
        group.shared(end.log_evidence + _log_mean(weights)),
        group.shared(sizes),
    )


def _check(conditioned: Conditioned, step: StochasticStep, times: Array, x: Array) -> None:
    """**Raises:** `ValueError` for what `twisted_sample` would weight or evaluate wrongly."""
    name = type(step).__name__
    if len(x) == 0:
        raise ValueError("`twisted_sample(x)` needs at least 1 row, one per particle, got none.")
    if step.evaluations != 1:
        raise ValueError(
            "`twisted_sample(step)` needs a step that evaluates the velocity once, got "
            f"{name} with {step.evaluations}. Use `DDIM(1.0)`."
        )
    if any(map(_is_measurement, jax.tree.leaves(step, is_leaf=_is_measurement))):
        # The particles would be weighted as if they were drawn from the prior.
        raise ValueError(
            f"`twisted_sample(step)` needs a step of the prior, and {name} holds a measurement "
            "itself. Use `DDIM(1.0)`."
        )
    if initial_memory(conditioned, x[0]) is not None:
        raise ValueError(
            "`twisted_sample(conditioned)` evaluates many particles and keeps no memory. Leave out "
            f"the cache or momentum of its {type(conditioned.velocity).__name__}."
        )
    if not isinstance(times, jax.core.Tracer) and float(np.asarray(times)[-1]) != 0:
        raise ValueError(
            f"`twisted_sample(times)` needs times that fall to 0, got {float(times[-1]):g} as the "
            "last. The likelihood is that of x0."
        )


def _is_measurement(node: object) -> bool:
    return isinstance(node, Measurement)


class _Run(eqx.Module):
    """What stays the same over all steps."""

    conditioned: Conditioned
    step: StochasticStep
    group: _Group
    key: PRNGKeyArray

    def advance(self, swarm: _Swarm, interval: Interval) -> tuple[_Swarm, Scalar]:
        """Weigh the particles at t, resample them, and draw them at u.

        **Returns:** the particles, and their effective size before they were resampled.
        """
        t, u, number = interval
        noise_key, resample_key = jax.random.split(jax.random.fold_in(self.key, number))
        evaluation = jax.vmap(lambda x: self.conditioned.evaluate(x, t))(swarm.x)
        change = evaluation.log_likelihood - swarm.log_likelihood
        own_weights = swarm.log_weights + change
        weights = self.group.gather(own_weights)
        size = _effective_size(weights)
        resampled = size < len(weights) / 2
        same = jnp.arange(len(weights), dtype=jnp.int32)
        ancestors = jnp.where(resampled, _systematic(weights, resample_key), same)
        numbers = self.group.own_numbers(len(own_weights))
        before = (swarm.x, swarm.step_state, evaluation)
        x, state, evaluation = self.group.take(before, ancestors[numbers])

        def move(
            x: Array, state: StepState, evaluation: ConditionedEvaluation, number: Scalar
        ) -> _Moved:
            noise = jax.random.normal(jax.random.fold_in(noise_key, number), x.shape, x.dtype)
            return _move(self.step, _Particle(x, state, evaluation), (t, u), noise)

        moved = jax.vmap(move)(x, state, evaluation, numbers)
        # Weights are equal after resampling: their mean goes into the evidence.
        kept_weights = jnp.where(resampled, 0, own_weights)
        log_evidence = swarm.log_evidence + jnp.where(resampled, _log_mean(weights), 0)
        swarm = _Swarm(
            moved.x,
            moved.step_state,
            kept_weights + moved.log_ratio,
            evaluation.log_likelihood,
            log_evidence,
        )
        return swarm, size


class _Particle(NamedTuple):
    """One particle at t, with the velocity there."""

    x: Array
    step_state: StepState
    evaluation: ConditionedEvaluation


class _Moved(NamedTuple):
    """One particle at u.

    - `log_ratio`: log N(x; without the measurement) - log N(x; with it), of the two steps that
      could have drawn x.
    """

    x: Array
    step_state: StepState
    log_ratio: Scalar


def _move(
    step: StochasticStep, particle: _Particle, ends: tuple[Scalar, Scalar], noise: Array
) -> _Moved:
    """Draw a particle by the step of the conditioned velocity."""
    t, u = ends
    x, state, evaluation = particle
    # The step evaluates the velocity once, at x and t, where its value is known.
    plain, deviation, plain_state = step.moments(lambda *_: evaluation.velocity, x, t, u, state)
    mean, _, _ = step.moments(lambda *_: evaluation.conditioned, x, t, u, state)
    noisy = deviation > 0
    # Without noise no weight can make up for another mean.
    end = jnp.where(noisy, mean + deviation * noise, plain)
    shift = (mean - plain) / jnp.where(noisy, deviation, 1)
    log_ratio = -jnp.sum(noise * shift) - 0.5 * jnp.sum(jnp.square(shift))
    log_ratio = jnp.where(noisy, log_ratio, 0)
    return _Moved(end.astype(x.dtype), plain_state, log_ratio.astype(x.dtype))


def _log_mean(log_weights: Array) -> Scalar:
    """Return log(mean(weights))."""
    count = jnp.asarray(len(log_weights), log_weights.dtype)
    return jax.nn.logsumexp(log_weights) - jnp.log(count)


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
