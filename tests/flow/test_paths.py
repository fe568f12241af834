"""Predictions turned into each other, and models of other paths sampled as velocities, against closed forms."""

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


@pytest.mark.parametrize("share", [1e-3, 0.4, 1 - 1e-3])
@pytest.mark.parametrize("name", PATHS)
def test_every_prediction_says_the_same_and_turns_back(name, share):
    path = PATHS[name]
    t = jnp.float32(share * path.last)
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
    # What a prediction does not see directly is divided by the path's share of it, so float32's rounding is too.
    slack = 3e-6 * float(1 + 1 / jnp.minimum(alpha, sigma))
    for source in PREDICTIONS:
        image, noise = estimates(truth[source], x, t, source, path)
        np.testing.assert_allclose(alpha * image + sigma * noise, x, rtol=1e-4, atol=1e-4)
        for target in PREDICTIONS:
            found = convert_prediction(truth[source], x, t, source=source, target=target, path=path)
            np.testing.assert_allclose(
                found, truth[target], rtol=slack, atol=slack * float(jnp.abs(truth[target]).max())
            )


@pytest.mark.parametrize("name", PATHS)
def test_a_path_finds_the_time_of_a_share_of_noise(name):
    path = PATHS[name]
    for share in (0.01, 0.3, 0.9):
        t = jnp.float32(share * path.last)
        np.testing.assert_allclose(path.time(path.straight(t)), t, rtol=1e-4)


def test_a_velocity_has_both_estimates_at_both_ends():
    velocity = NOISE - X0
    for t, x in ((0.0, X0), (1.0, NOISE)):
        image, noise = estimates(velocity, x, jnp.float32(t), "velocity")
        np.testing.assert_allclose(image, X0, atol=1e-6)
        np.testing.assert_allclose(noise, NOISE, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "t", "end"), [("noise", 1.0, "start"), ("score", 1.0, "start"), ("x0", 0.0, "end")]
)
def test_where_a_prediction_says_nothing_is_an_error(kind, t, end):
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


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_a_model_of_any_path_and_prediction_is_sampled_as_flux_is(name, kind):
    path = PATHS[name]
    velocity = as_velocity(gaussian_model(path, kind), kind, path)
    # Inside, where every prediction says something.
    first, last = (float(path.straight(jnp.float32(share * path.last))) for share in (0.98, 0.02))
    times = uniform_times(200, first=first, last=last)
    start = jnp.linspace(-2, 2, 5)

    def quantile(t):
        """The flow keeps the quantile: mean and deviation of x at t, on the straight path."""
        return (1 - t) * MEAN, jnp.sqrt(((1 - t) * DEVIATION) ** 2 + t**2)

    (mean, deviation), (end_mean, end_deviation) = quantile(times[0]), quantile(times[-1])
    for step in (Heun(), DPMpp2M()):
        end = sample(velocity, mean + deviation * start, times, step=step).x
        # Steps of 1 / 200 of order 2, and float32.
        np.testing.assert_allclose(end, end_mean + end_deviation * start, atol=2e-3)
