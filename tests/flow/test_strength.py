"""SDEdit: the start of sampling by strength, and the laws of what it draws."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from problems import PIXELS, falling_times, g8, moments_of_affine

from fluxjax import DPMpp2M, Euler, flow_times
from fluxjax.flow import Midpoint, add_noise, partial_times, sample, sdedit, start_time


def field(x, t):
    return 0.3 * x - t


IMAGE, NOISE = jnp.linspace(-1, 1, 6), jnp.sin(jnp.arange(6.0) * 3)
TIMES = flow_times(10)


def test_noise_is_added_along_the_straight_path_with_exact_ends():
    np.testing.assert_array_equal(add_noise(IMAGE, NOISE, 0), IMAGE)
    np.testing.assert_array_equal(add_noise(IMAGE, NOISE, 1), NOISE)
    middle = add_noise(IMAGE, NOISE, 0.3)
    np.testing.assert_allclose(middle, 0.7 * IMAGE + 0.3 * NOISE, rtol=1e-6)


def test_a_half_precision_image_gets_noise_in_the_wider_dtype():
    image = IMAGE.astype(jnp.bfloat16)
    assert add_noise(image, image, 0.5).dtype == jnp.bfloat16
    assert add_noise(image, NOISE, 0.5).dtype == jnp.float32


def test_a_strength_skips_the_steps_that_diffusers_skips():
    for steps in (4, 10, 28):
        times = np.linspace(1, 0, steps + 1, dtype=np.float32)
        for hundredths in range(1, 101):
            strength = hundredths / 100
            # diffusers' `get_timesteps`, in its own words.
            first = int(max(steps - min(steps * strength, steps), 0))
            assert len(partial_times(times, strength)) == steps + 1 - first


@pytest.mark.parametrize(
    ("strength", "start"), [(0.3, 0.60), (0.5, 0.76), (0.6, 0.83), (0.8, 0.94)]
)
def test_shifted_times_start_much_later_than_the_strength(strength, start):
    times = flow_times(28, tokens=4096)
    assert float(start_time(times, strength)) == pytest.approx(start, abs=0.005)
    assert start_time(times, strength) == partial_times(times, strength)[0]


def test_a_map_of_strengths_becomes_a_map_of_times():
    strengths = np.float32([[0.0, 0.3, 0.55], [0.6, 0.99, 1.0]])
    starts = start_time(TIMES, strengths)
    for strength, start in zip(strengths.flat, np.asarray(starts).flat, strict=True):
        assert start == partial_times(TIMES, round(float(strength), 2))[0]
    np.testing.assert_array_equal(start_time(TIMES, strengths, "time"), strengths)
    np.testing.assert_array_equal(jax.jit(start_time)(TIMES, strengths), starts)


def test_the_rule_of_times_starts_at_the_strength_and_takes_all_steps():
    times = partial_times(TIMES, 0.35, "time")
    assert len(times) == len(TIMES)
    assert times[0] == jnp.float32(0.35)
    np.testing.assert_allclose(times, 0.35 * TIMES, rtol=1e-6)
    assert times[-1] == 0


@pytest.mark.parametrize("rule", ["steps", "time"])
@pytest.mark.parametrize("step", [Euler(), DPMpp2M()], ids=["Euler", "DPMpp2M"])
def test_strength_0_returns_the_image_and_strength_1_samples_from_noise(rule, step):
    drawn = sdedit(field, IMAGE, NOISE, partial_times(TIMES, 0, rule), step=step)
    np.testing.assert_array_equal(drawn.x, IMAGE)
    assert drawn.evaluations == 0
    drawn = sdedit(field, IMAGE, NOISE, partial_times(TIMES, 1, rule), step=step)
    np.testing.assert_array_equal(drawn.x, sample(field, NOISE, TIMES, step=step).x)


@pytest.mark.parametrize("step", [Euler(), DPMpp2M()], ids=["Euler", "DPMpp2M"])
def test_a_traced_strength_may_be_0(step):
    @jax.jit
    def run(strength):
        times = partial_times(TIMES, strength, "time")
        return sdedit(field, IMAGE, NOISE, times, step=step).x

    np.testing.assert_array_equal(run(0.0), IMAGE)
    times = partial_times(TIMES, 0.4, "time")
    expected = sdedit(field, IMAGE, NOISE, times, step=step).x
    # Compiled as one program, which rounds otherwise than two.
    np.testing.assert_allclose(run(0.4), expected, rtol=1e-5, atol=1e-6)


def test_from_a_gaussian_prior_the_result_has_the_moments_of_the_law():
    with jax.enable_x64(True):
        prior = g8("mask").prior
        image = jnp.cos(jnp.arange(PIXELS, dtype=jnp.float64))
        times = partial_times(falling_times(200), 0.6)
        t = float(times[0])

        def draw(noise):
            return sdedit(prior, image, noise, times, step=Midpoint()).x

        mean, covariance = jax.jit(lambda: moments_of_affine(draw, PIXELS))()
        # F = sqrt(covariance / covariance of x_t), which have the same eigenvectors.
        scatter = (1 - t) ** 2 * prior.covariance + t**2 * jnp.eye(PIXELS)
        factor = scipy.linalg.sqrtm(prior.covariance @ jnp.linalg.inv(scatter)).real
        expected = prior.mean + factor @ ((1 - t) * (image - prior.mean))
        # The midpoint method's error, 1 / steps^2: at 400 steps it is 1e-9.
        np.testing.assert_allclose(mean, expected, atol=1e-7)
        np.testing.assert_allclose(covariance, t**2 * factor @ factor.T, atol=1e-7)


def test_another_image_or_strength_of_equally_many_steps_compiles_nothing():
    traced = []

    @eqx.filter_jit
    def run(image, times):
        traced.append(times.shape)
        return sdedit(field, image, NOISE, times).x

    run(IMAGE, partial_times(TIMES, 0.6))
    run(2 * IMAGE, partial_times(TIMES, 0.55))  # 6 of 10 steps, too
    run(IMAGE, partial_times(TIMES, 0.3, "time"))
    run(IMAGE, partial_times(TIMES, 0.8, "time"))
    assert traced == [(7,), (11,)]


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), [0.5, 2.0]])
def test_strengths_outside_of_0_to_1_are_refused(strength):
    with pytest.raises(ValueError, match=r"`start_time\(strength\)` needs numbers in \[0, 1\]"):
        start_time(TIMES, strength)
    if not isinstance(strength, list):
        with pytest.raises(ValueError, match=r"`partial_times\(strength\)` needs numbers in"):
            partial_times(TIMES, strength)
        with pytest.raises(Exception, match="needs numbers in"):
            jax.block_until_ready(eqx.filter_jit(start_time)(TIMES, jnp.float32(strength)))


def test_misuse_names_the_remedy():
    with pytest.raises(ValueError, match="takes one of steps, time"):
        partial_times(TIMES, 0.5, "share")
    with pytest.raises(ValueError, match="Call it outside jit"):
        jax.jit(partial_times)(TIMES, 0.5)
    with pytest.raises(ValueError, match=r"`add_noise\(noise\)` takes a float array"):
        add_noise(IMAGE, NOISE[:3], 0.5)
    with pytest.raises(ValueError, match=r"`add_noise\(t\)`"):
        add_noise(IMAGE, NOISE, 1.5)
    with pytest.raises(ValueError, match=r"`sdedit\(times\)` needs numbers in \[0, 1\], got 1.5"):
        sdedit(field, IMAGE, NOISE, [1.5, 0.0])
    with pytest.raises(ValueError, match="rising times"):
        partial_times(TIMES[::-1], 0.5)
