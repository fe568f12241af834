"""Predictions converted into each other, and models of other paths sampled as velocities.

The references are closed forms.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import DPMpp2M, Heun
from fluxjax.flow import (
    STRAIGHT,
    CustomPath,
    Discrete,
    VarianceExploding,
    VariancePreserving,
    as_velocity,
    convert_prediction,
    estimates,
    sample,
    uniform_times,
)
from fluxjax.flow.predictions import PREDICTIONS

PATHS = {
    "straight": STRAIGHT,
    "vp": VariancePreserving(),
    "ve": VarianceExploding(),
    "cosine": CustomPath(lambda t: jnp.cos(jnp.pi / 2 * t), lambda t: jnp.sin(jnp.pi / 2 * t)),
    "discrete": Discrete(jnp.linspace(0.9999, 0.005, 1000)),
}
X0, NOISE = jnp.float32([0.3, -1.2, 2.0]), jnp.float32([-0.7, 0.4, 1.1])


@functools.cache
def _conversions_program(name: str):
    """Return one program with every prediction of a path and all of its conversions."""
    path = PATHS[name]

    @jax.jit
    def run(t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = alpha * X0 + sigma * NOISE
        rate = jax.jacfwd(lambda t: path.alpha(t) * X0 + path.sigma(t) * NOISE)(t)
        truth = {
            "velocity": rate,
            "x0": X0,
            "noise": NOISE,
            "score": -NOISE / sigma,
            "v": alpha * NOISE - sigma * X0,
        }
        implied, converted = {}, {}
        for source in PREDICTIONS:
            image, noise = estimates(truth[source], x, t, source, path)
            implied[source] = alpha * image + sigma * noise
            for target in PREDICTIONS:
                converted[source, target] = convert_prediction(
                    truth[source], x, t, source=source, target=target, path=path
                )
        return x, truth, implied, converted, jnp.minimum(alpha, sigma)

    return run


@pytest.mark.parametrize("share", [1e-3, 0.4, 1 - 1e-3])
@pytest.mark.parametrize("name", PATHS)
def test_every_prediction_implies_the_same_and_converts_back(name, share):
    run = _conversions_program(name)
    x, truth, implied, converted, least = run(jnp.float32(share * PATHS[name].last))
    # x0 or the noise is divided by its factor on the path, and so is the rounding of float32.
    slack = 3e-6 * float(1 + 1 / least)
    for source in PREDICTIONS:
        np.testing.assert_allclose(implied[source], x, rtol=1e-4, atol=1e-4)
        for target in PREDICTIONS:
            expected = np.asarray(truth[target])
            atol = slack * np.abs(expected).max()
            found = converted[source, target]
            np.testing.assert_allclose(found, expected, rtol=slack, atol=atol)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_inverts_its_straight_time(name):
    path = PATHS[name]
    there_and_back = jax.jit(lambda t: path.time(path.straight(t)))
    for share in (0.01, 0.3, 0.9):
        t = jnp.float32(share * path.last)
        np.testing.assert_allclose(there_and_back(t), t, rtol=1e-4)


def test_a_velocity_has_both_estimates_at_both_ends():
    velocity = NOISE - X0
    for t, x in ((0.0, X0), (1.0, NOISE)):
        image, noise = estimates(velocity, x, jnp.float32(t), "velocity")
        np.testing.assert_allclose(image, X0, atol=1e-6)
        np.testing.assert_allclose(noise, NOISE, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "t", "end"), [("noise", 1.0, "start"), ("score", 1.0, "start"), ("x0", 0.0, "end")]
)
def test_where_a_prediction_determines_nothing_is_an_error(kind, t, end):
    with pytest.raises(
        eqx.EquinoxRuntimeError, match=f"the {end} of the path. Keep the times inside"
    ):
        eqx.filter_jit(as_velocity(lambda x, t: x, kind))(X0, jnp.float32(t)).block_until_ready()
    with pytest.raises(ValueError, match="Choose one of velocity, x0, noise, score, v"):
        as_velocity(lambda x, t: x, "eps")


MEAN, DEVIATION = 0.7, 0.4


def gaussian_model(path, kind):
    """The exact prediction for data N(MEAN, DEVIATION^2) on a path, in its own x and t."""

    def model(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        image = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
        noise = sigma / variance * (x - alpha * MEAN)
        truth = {
            "x0": image,
            "noise": noise,
            "score": -(x - alpha * MEAN) / variance,
            "v": alpha * noise - sigma * image,
        }
        if kind != "velocity":
            return truth[kind]
        rates = [jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in (path.alpha, path.sigma)]
        return rates[0] * image + rates[1] * noise

    return model


MODELS = [(name, kind) for name in PATHS for kind in PREDICTIONS]


def moments_at(t):
    """Return mean and deviation of x at t on the straight path."""
    return (1 - t) * MEAN, np.sqrt(((1 - t) * DEVIATION) ** 2 + t**2)


def check_samples(path, kind, step):
    """Sample a model; the flow keeps the quantile of every start."""
    velocity = as_velocity(gaussian_model(path, kind), kind, path)
    # Inside of both ends, where every prediction determines x0 and noise.
    first, last = (float(path.straight(jnp.float32(share * path.last))) for share in (0.98, 0.02))
    times, quantiles = uniform_times(200, first=first, last=last), np.linspace(-2, 2, 5)
    mean, deviation = moments_at(first)
    end = sample(velocity, mean + deviation * quantiles, times, step=step).x
    mean, deviation = moments_at(last)
    # Steps of 1 / 200 of order 2, and float32.
    np.testing.assert_allclose(end, mean + deviation * quantiles, atol=2e-3)


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_a_model_of_any_path_and_prediction_is_sampled_like_flux(name, kind):
    check_samples(PATHS[name], kind, Heun())


@pytest.mark.parametrize("name", PATHS)
def test_a_model_of_any_path_is_sampled_by_an_exponential_step(name):
    check_samples(PATHS[name], "noise", DPMpp2M())
