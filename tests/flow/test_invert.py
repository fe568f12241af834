"""Inversion: round trips on a mixture, and velocities that are steered to a known end."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PIXELS, falling_times, g8, m8

from fluxjax import Euler, stream
from fluxjax.flow import (
    Churn,
    FireFlow,
    Guided,
    Midpoint,
    Projected,
    Steered,
    advance_sample,
    begin_sample,
    evaluation_times,
    sample,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


run = eqx.filter_jit(sample)


@eqx.filter_jit
def evaluated(velocity, x, t):
    return velocity(x, t)


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


@eqx.filter_jit
def round_trips(velocity, images, times, step):
    def there_and_back(image):
        noise = sample(velocity, image, times[::-1], step=step).x
        return sample(velocity, noise, times, step=step).x

    return jax.vmap(there_and_back)(images)


# Bounds of order 2 from a first measurement with other draws, of which these errors are at most
# two thirds: a few images between two modes make most of the error. Euler's are within 15 % of it.
@pytest.mark.parametrize(
    ("step", "bounds"),
    [
        (FireFlow(), (0.044, 0.0031, 0.0002)),
        (Midpoint(), (0.084, 0.0039, 0.0003)),
        (Euler(), (0.45, 0.175, 0.085)),
    ],
    ids=["FireFlow", "Midpoint", "Euler"],
)
def test_images_of_a_mixture_return_from_their_noise(step, bounds):
    prior = m8().prior
    images = prior.draw(jax.random.key(0), 500)
    found = []
    for steps, bound in zip((8, 28, 100), bounds, strict=True):
        off = rms(np.subtract(round_trips(prior, images, falling_times(steps), step), images))
        assert off < bound
        found.append(off)
    least_order = 1 if step.order == 2 else 0.5
    assert found[0] / found[2] > (100 / 8) ** least_order


def test_fireflow_beats_midpoint_at_equal_evaluations():
    prior = m8().prior
    images = prior.draw(jax.random.key(1), 500)
    fireflow, midpoint = (
        rms(np.subtract(round_trips(prior, images, falling_times(steps), step), images))
        for steps, step in ((28, FireFlow()), (14, Midpoint()))
    )
    assert fireflow < midpoint / 2


def test_fireflow_is_of_order_2():
    prior = g8("mask").prior
    noise = jax.random.normal(jax.random.key(0), (PIXELS,))
    # The exact flow: an affine map with the square root of the covariance.
    vectors, values = np.asarray(prior.vectors), np.asarray(prior.values)
    exact = prior.mean + vectors * np.sqrt(values) @ vectors.T @ noise
    ends = [run(prior, noise, falling_times(steps), step=FireFlow()).x for steps in (64, 256)]
    errors = [rms(np.subtract(end, exact)) for end in ends]
    assert np.log2(errors[0] / errors[1]) / 2 == pytest.approx(2, abs=0.3)


def test_fireflow_evaluates_once_per_step_and_once_before():
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -x

    times = falling_times(6)
    drawn = run(counted, jnp.ones(3), times, step=FireFlow())
    jax.effects_barrier()
    middles = (times[:-1] + times[1:]) / 2
    assert len(calls) == drawn.evaluations == 7
    np.testing.assert_allclose(sorted(calls), sorted([1.0, *middles]))
    known = np.asarray(evaluation_times(FireFlow(), times))
    assert all(np.abs(known - call).min() < 1e-12 for call in calls)


def test_fireflow_runs_in_segments_in_a_stream_and_inside_another_step():
    prior, times = g8("mask").prior, falling_times(6)
    noise = jnp.linspace(-1, 1, PIXELS)
    whole = run(prior, noise, times, step=FireFlow()).x
    state = begin_sample(prior, noise, times, step=FireFlow())
    for start, stop in ((0, 2), (2, 6)):
        state = advance_sample(prior, state, times, start, stop, step=FireFlow())
    np.testing.assert_allclose(state.x, whole, rtol=1e-12)
    *_, last = stream(prior, noise, times, step=FireFlow())
    np.testing.assert_allclose(last.x, whole, rtol=1e-12)
    still = Churn(FireFlow(), rate=0.0)
    churned = run(prior, noise, times, step=still, key=jax.random.key(0))
    np.testing.assert_allclose(churned.x, whole, rtol=1e-12)
    with pytest.raises(ValueError, match=r"Call `start\(velocity, x, t\)`"):
        FireFlow().init(noise)


def test_a_memory_passes_through_the_first_evaluation_too():
    """A guided velocity with momentum: its memory after N + 1 evaluations, in all ways to run."""
    velocity = Guided(
        lambda x, t, condition: condition - t * x,
        jnp.ones(3),
        -jnp.ones(3),
        2.0,
        Projected(momentum=-0.5),
    )
    times, x, memory = falling_times(4), jnp.linspace(0.0, 1.0, 3), velocity.init(jnp.zeros(3))
    drawn = run(velocity, x, times, step=FireFlow())
    middle, memory = velocity(x, times[0], memory=memory)
    remembered = eqx.filter_jit(lambda x, t, memory: velocity(x, t, memory=memory))
    x, middle = np.asarray(x), np.asarray(middle)
    for t, u in itertools.pairwise(np.asarray(times)):
        half = (u - t) / 2
        middle, memory = remembered(x + half * middle, t + half, memory)
        x = x + (u - t) * np.asarray(middle)
    np.testing.assert_allclose(drawn.x, x, rtol=1e-12)
    np.testing.assert_allclose(drawn.memory.rule, memory.rule, rtol=1e-12)


def image_and_noise():
    image = jnp.float64(np.cos(np.arange(PIXELS, dtype=np.float64)))
    return image, jax.random.normal(jax.random.key(3), (PIXELS,))


@pytest.mark.parametrize("steps", [1, 5, 28])
def test_a_rate_of_1_reaches_its_end_exactly(steps):
    prior, times = g8("mask").prior, falling_times(steps)
    image, noise = image_and_noise()
    down = run(Steered(prior, image, 1.0, "image"), noise, times).x
    up = run(Steered(prior, noise, 1.0, "noise"), image, times[::-1]).x
    # x - (x - image) rounds twice.
    np.testing.assert_allclose(down, image, atol=1e-14)
    np.testing.assert_allclose(up, noise, atol=1e-14)


@pytest.mark.parametrize("towards", ["image", "noise"])
def test_a_rate_of_0_or_a_time_outside_changes_nothing(towards):
    prior, (image, noise) = g8("mask").prior, image_and_noise()
    t = jnp.float64(0.4)
    v = evaluated(prior, noise, t)
    for options in ({"rate": 0.0}, {"rate": 1.0, "low": 0.5}, {"rate": 1.0, "high": 0.3}):
        steered = Steered(prior, image, towards=towards, **options)
        np.testing.assert_array_equal(evaluated(steered, noise, t), v)


def test_the_steered_velocity_is_a_mean_with_the_straight_one():
    prior, (image, noise), t = g8("mask").prior, image_and_noise(), 0.4
    image, noise = np.asarray(image), np.asarray(noise)
    x = jnp.float64((1 - t) * image + t * noise + 0.1)

    @jax.jit
    def values(x):
        down, up = Steered(prior, image, 0.9, "image"), Steered(prior, noise, 0.5, "noise")
        return prior(x, t), down(x, t), up(x, t)

    v, down, up = map(np.asarray, values(x))
    np.testing.assert_allclose(down, 0.1 * v + 0.9 * (x - image) / t, rtol=1e-12)
    np.testing.assert_allclose(up, 0.5 * v + 0.5 * (noise - x) / (1 - t), rtol=1e-12)


def test_at_its_end_a_steered_velocity_is_finite_with_finite_gradients():
    prior, (image, noise) = g8("mask").prior, image_and_noise()
    for target, towards, end in ((image, "image", 0.0), (noise, "noise", 1.0)):
        steered = Steered(prior, target, 0.9, towards)
        value, plain = evaluated(steered, noise, end), evaluated(prior, noise, jnp.float64(end))
        np.testing.assert_array_equal(value, plain)
        slope = jax.jit(jax.jacobian(lambda x, v=steered, t=end: v(x, t)))(noise)
        assert np.all(np.isfinite(slope))


def test_rf_inversion_does_not_return_the_image():
    """With the rates of the paper: 0.5 up, and down 0.9 in the first quarter of the steps."""
    prior, times = g8("mask").prior, falling_times(28)
    image, _ = image_and_noise()

    def there_and_back(noise):
        up = run(Steered(prior, noise, 0.5, "noise"), image, times[::-1]).x
        down = Steered(prior, image, 0.9, "image", low=times[28 // 4 - 1])
        return run(down, up, times).x

    noises = jax.random.normal(jax.random.key(0), (200, PIXELS))
    # About 1: the deviation of a pixel is 1 in the prior.
    ends = jax.jit(jax.vmap(there_and_back))(noises)
    assert 0.5 < rms(np.subtract(ends, image)) < 1.5
    exact = run(prior, image, times[::-1], step=Midpoint()).x
    again = run(prior, exact, times, step=Midpoint()).x
    assert rms(np.subtract(again, image)) < 0.005


def test_misuse_names_the_remedy():
    prior, (image, _) = g8("mask").prior, image_and_noise()
    with pytest.raises(ValueError, match=r"`Steered\(towards\)` takes one of noise, image"):
        Steered(prior, image, 0.5, "up")
    with pytest.raises(ValueError, match=r"`Steered\(rate\)` needs finite numbers"):
        Steered(prior, image, float("inf"), "image")
    with pytest.raises(ValueError, match=r"`Steered\(target\)` needs the shape of x, \[8\]"):
        sample(Steered(prior, image[:4], 0.5, "image"), image, falling_times(3))
