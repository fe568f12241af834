"""Inverse problems whose posterior is known: G8, of a Gaussian prior, and M8, of a mixture.

All in float64: use them inside `jax.enable_x64(True)`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.flow import sample
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.operators import Blur, Downsample, Mask

PIXELS = 8


class Normal(eqx.Module):
    """A normal prior and its velocity E[noise - x0 | x_t = x]."""

    mean: jax.Array
    covariance: jax.Array
    # The covariance's, so that all of its inverses are matrix products.
    values: jax.Array
    vectors: jax.Array

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, covariance
        self.values, self.vectors = jnp.linalg.eigh(covariance)

    def __call__(self, x, t):
        scatter = (1 - t) ** 2 * self.values + t**2
        gain = (t - (1 - t) * self.values) / scatter
        rotated = (x - (1 - t) * self.mean) @ self.vectors
        return self.vectors @ (gain * rotated) - self.mean

    @eqx.filter_jit
    def posterior(self, matrix, y, std):
        """Return the normal distribution of x0 given y = matrix x0 + std noise."""
        s = matrix @ self.covariance @ matrix.T + std**2 * jnp.eye(len(matrix))
        gain = jnp.linalg.solve(s, matrix @ self.covariance).T
        mean = self.mean + gain @ (y - matrix @ self.mean)
        return Normal(mean, self.covariance - gain @ matrix @ self.covariance)

    @eqx.filter_jit
    def log_evidence(self, matrix, y, std):
        s = matrix @ self.covariance @ matrix.T + std**2 * jnp.eye(len(matrix))
        return jax.scipy.stats.multivariate_normal.logpdf(y, matrix @ self.mean, s)


class Mixture(eqx.Module):
    """A mixture of normal distributions of one covariance, and its velocity."""

    means: jax.Array
    covariance: jax.Array
    weights: jax.Array
    values: jax.Array
    vectors: jax.Array

    def __init__(self, means, covariance, weights):
        self.means, self.covariance, self.weights = means, covariance, weights
        self.values, self.vectors = jnp.linalg.eigh(covariance)

    def modes(self, t, x):
        """Return the probability of each mode given x_t = x."""
        scatter = (1 - t) ** 2 * self.values + t**2
        off = (x - (1 - t) * self.means) @ self.vectors
        return jax.nn.softmax(jnp.log(self.weights) - 0.5 * off**2 @ (1 / scatter))

    def __call__(self, x, t):
        scatter = (1 - t) ** 2 * self.values + t**2
        gain = (t - (1 - t) * self.values) / scatter
        off = (x - (1 - t) * self.means) @ self.vectors
        each = (gain * off) @ self.vectors.T - self.means
        return self.modes(t, x) @ each

    @eqx.filter_jit
    def posterior(self, matrix, y, std):
        each = [Normal(mean, self.covariance) for mean in self.means]
        posteriors = [normal.posterior(matrix, y, std) for normal in each]
        evidence = jnp.stack([normal.log_evidence(matrix, y, std) for normal in each])
        weights = jax.nn.softmax(jnp.log(self.weights) + evidence)
        means = jnp.stack([posterior.mean for posterior in posteriors])
        return Mixture(means, posteriors[0].covariance, weights)

    @eqx.filter_jit
    def log_evidence(self, matrix, y, std):
        each = [Normal(mean, self.covariance).log_evidence(matrix, y, std) for mean in self.means]
        return jax.nn.logsumexp(jnp.log(self.weights) + jnp.stack(each))

    @eqx.filter_jit
    def draw(self, key, count):
        """Return draws whose shares of modes are the weights, but for rounding."""
        edges = jnp.cumsum(self.weights)
        modes = jnp.searchsorted(
            edges, (jnp.arange(count, dtype=edges.dtype) + 0.5) / count * edges[-1]
        )
        noise = jax.random.normal(key, (count, PIXELS))
        return self.means[modes] + noise @ jnp.linalg.cholesky(self.covariance).T


class Problem(NamedTuple):
    """A prior, a measurement of it, and the exact posterior, a prior of the same kind."""

    prior: Normal | Mixture
    measurement: Measurement
    matrix: jax.Array
    posterior: Normal | Mixture

    @property
    def observed(self):
        """The y that `matrix`, which has no rows for hidden pixels, belongs to."""
        y = self.measurement.y
        if isinstance(self.measurement.operator, Mask):
            return jnp.float64(np.asarray(y)[np.asarray(self.measurement.operator.mask) > 0])
        return y


def _problem(prior, operator, y, std):
    matrix = np.asarray(jax.jit(jax.jacobian(operator))(jnp.zeros(PIXELS)))
    seen = np.any(matrix != 0, 1)
    matrix, rows = jnp.float64(matrix[seen]), jnp.float64(np.asarray(y)[seen])
    return Problem(prior, Measurement(operator, y, std), matrix, prior.posterior(matrix, rows, std))


def _decaying(scale, variance=1.0):
    i = np.arange(PIXELS, dtype=np.float64)
    return jnp.float64(variance * scale ** np.abs(i[:, None] - i))


OPERATORS = ("mask", "blur", "down")


def operator_named(name):
    """Return an operator of G8: the first half seen, (1/4, 1/2, 1/4) circular, means of pairs."""
    operators = {
        "mask": Mask(jnp.float64([1, 1, 1, 1, 0, 0, 0, 0])),
        "blur": Blur(jnp.float64([0.25, 0.5, 0.25]), axes=(-1,)),
        "down": Downsample(2, axes=(-1,)),
    }
    return operators[name]


@functools.cache
def g8(name, std=0.2):
    """Return G8 with the operator `name`: y is that of cos(i), without noise."""
    i = np.arange(PIXELS, dtype=np.float64)
    prior = Normal(jnp.float64(0.5 * np.sin(i)), _decaying(0.8))
    operator = operator_named(name)
    return _problem(prior, operator, eqx.filter_jit(operator)(np.cos(i)), std)


@functools.cache
def m8():
    """Return M8: four modes, pixels 0 and 3 seen."""
    i = np.arange(PIXELS, dtype=np.float64)
    k = np.arange(4, dtype=np.float64)[:, None]
    means = jnp.float64(1.5 * np.cos(2 * np.pi * (k + 1) * i / PIXELS + k))
    prior = Mixture(means, _decaying(0.6, 0.3), jnp.float64([0.4, 0.3, 0.2, 0.1]))
    operator = Mask(jnp.float64([1, 0, 0, 1, 0, 0, 0, 0]))
    return _problem(prior, operator, jnp.float64([0.3, 0, 0, -0.2, 0, 0, 0, 0]), 0.3)


def falling_times(steps):
    """Return uniform times from 1 to 0 in float64."""
    return jnp.float64(np.linspace(1.0, 0.0, steps + 1))


def affine_moments(step, velocity, times):
    """Return the exact mean and covariance of x at the last time, from N(0, 1) at the first.

    `velocity` must be affine in x, so that each step maps x and its noise affinely: the map is
    read off at 0 and at the unit vectors. For steps without a state; a `StochasticStep`'s noise
    is white.
    """
    eye = jnp.eye(PIXELS, dtype=jnp.float64)

    def advance(moments, interval):
        mean, covariance = moments
        t, u = interval

        def move(x):
            if hasattr(step, "moments"):
                end, deviation, _ = step.moments(velocity, x, t, u, step.init(x))
                return end, deviation
            end, _, _ = step(velocity, x, t, u, step.init(x), key=None)
            return end, jnp.zeros((), end.dtype)

        # In one batch, so that the step is compiled once.
        values, deviations = jax.vmap(move)(jnp.concatenate([jnp.zeros((1, PIXELS)), eye]))
        at_zero, deviation = values[0], deviations[0]
        columns = values[1:] - at_zero
        mean = at_zero + mean @ columns
        return (mean, columns.T @ covariance @ columns + deviation**2 * eye), None

    start = (jnp.zeros(PIXELS), eye)
    return jax.lax.scan(advance, start, (times[:-1], times[1:]))[0]


def moments_of_affine(draw: Callable, noises: int):
    """Return the exact mean and covariance of draw(z), affine in a flat z of N(0, 1) numbers."""
    zero = jnp.zeros(noises)
    columns = jax.jacfwd(draw)(zero)
    return draw(zero), columns @ columns.T


def errors(moments, posterior):
    """Return the RMS mean error in posterior deviations, and the relative covariance error."""
    (mean, covariance), (exact_mean, exact) = (
        map(np.asarray, pair) for pair in (moments, (posterior.mean, posterior.covariance))
    )
    off = mean - exact_mean
    mean_error = np.sqrt(off @ np.linalg.solve(exact, off) / PIXELS)
    return float(mean_error), float(np.linalg.norm(covariance - exact) / np.linalg.norm(exact))


def draw_many(velocity, key, count, times, step):
    """Return draws [count, 8] of `sample` with a velocity, each with noise of its own."""
    noise_key, step_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (count, PIXELS))
    keys = jax.random.split(step_key, count)

    @eqx.filter_jit
    def run(velocity, noise, keys):
        return jax.vmap(lambda x, key: sample(velocity, x, times, step=step, key=key).x)(
            noise, keys
        )

    return run(velocity, noise, keys)


def sliced_w2(first, second, directions=256, seed=0):
    """Return the sliced 2-Wasserstein distance of two sets of equally many draws."""
    projections = np.random.default_rng(seed).normal(size=(directions, first.shape[1]))
    projections /= np.linalg.norm(projections, axis=1, keepdims=True)
    one = np.sort(projections @ np.asarray(first).T)
    two = np.sort(projections @ np.asarray(second).T)
    return float(np.sqrt(np.mean((one - two) ** 2)))


@eqx.filter_jit
def mode_shares(draws, mixture):
    """Return the mean probability of each mode given a draw, for draws of any distribution."""
    return jnp.mean(jax.vmap(lambda x: mixture.modes(0.0, x))(draws), 0)


def mode_distance(draws, mixture):
    """Return the total variation between the shares of modes in draws and a mixture's weights."""
    return float(0.5 * jnp.sum(jnp.abs(mode_shares(draws, mixture) - mixture.weights)))
