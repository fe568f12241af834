"""Keeping a part of an image: exact errors on a Gaussian prior, and the laws of masks."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine import branch, moments_of_step
from problems import PIXELS, Normal, falling_times, g8, moments_of_affine

from fluxjax import DDIM, DPMpp2M, Euler, flow_times
from fluxjax.flow import (
    AB2,
    FireFlow,
    Guided,
    Inpaint,
    KeepHistory,
    Midpoint,
    Projected,
    add_noise,
    evaluation_times,
    partial_times,
    sample,
    sdedit,
    start_time,
)

KEY = jax.random.key(0)
run = eqx.filter_jit(sample)
HALF = np.float32([0, 0, 0, 0, 1, 1, 1, 1])
# Where a step without repeats draws noise: for the kept part, and in the inner step. Its key is
# split into rounds, jumps, and these two.
ONCE = (branch(0, 0, 0), branch(0, 0, 1))
HIDDEN = slice(PIXELS // 2, PIXELS)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def known():
    return jnp.float64(np.cos(np.arange(PIXELS, dtype=np.float64)))


def noise():
    return jax.random.normal(jax.random.key(5), (PIXELS,), jnp.float64)


def hidden_errors(moments):
    """Return both errors of the hidden half, given the first half of G8 without noise."""
    posterior = g8("mask", std=1e-6).posterior
    mean, covariance = map(np.asarray, moments)
    true = np.asarray(posterior.covariance)[HIDDEN, HIDDEN]
    off = (mean - posterior.mean)[HIDDEN]
    mean_error = np.sqrt(off @ np.linalg.solve(true, off) / len(off))
    difference = np.linalg.norm(covariance[HIDDEN, HIDDEN] - true)
    return float(mean_error), float(difference / np.linalg.norm(true))


def run_moments(step, steps, names):
    start = jnp.zeros(PIXELS), jnp.float64(np.eye(PIXELS))
    prior, times = g8("mask").prior, falling_times(steps)
    return eqx.filter_jit(moments_of_step)(step, prior, times, names, start)


def test_one_fixed_noise_has_the_known_error():
    """That of diffusers' inpainting, which starts from the noise that it keeps adding."""
    prior, times = g8("mask").prior, falling_times(100)

    def draw(noise):
        return sample(prior, noise, times, step=Inpaint(Euler(), known(), HALF, noise)).x

    moments = jax.jit(lambda: moments_of_affine(draw, PIXELS))()
    assert hidden_errors(moments) == pytest.approx((0.454, 0.425), abs=0.0006)


@pytest.mark.parametrize(("steps", "mean_error"), [(100, 0.454), (1000, 0.453)])
def test_fresh_noise_has_the_known_error_which_more_steps_do_not_cure(steps, mean_error):
    step = Inpaint(Euler(), known(), HALF)
    found = hidden_errors(run_moments(step, steps, ONCE))
    assert found[0] == pytest.approx(mean_error, abs=0.0006)
    if steps == 100:
        assert found[1] == pytest.approx(0.352, abs=0.0006)


@pytest.mark.parametrize(
    ("repeats", "expected"),
    [(1, (0.346, 0.214)), (5, (0.133, 0.039)), (10, (0.077, 0.041)), (20, (0.042, 0.073))],
)
def test_repeats_have_the_known_error(repeats, expected):
    names = ONCE
    if repeats > 1:
        # Each round draws noise to go back up, for the kept part, and in the inner step.
        leaves = [(0,), (1, 0, 0), (1, 0, 1)]
        names = [branch(number, *leaf) for number in range(repeats) for leaf in leaves]
    step = Inpaint(DDIM(1.0), known(), HALF, repeats=repeats)
    found = hidden_errors(run_moments(step, 100, tuple(names)))
    assert found == pytest.approx(expected, abs=0.0006)


def test_a_jump_splits_the_step_and_repeats_it_as_a_whole():
    """The moments of r rounds of two steps, against the two kinds of steps one after another."""
    prior, jump, repeats = g8("mask").prior, 2, 3
    step = Inpaint(DDIM(1.0), known(), HALF, repeats=repeats, jump=jump)
    names = []
    for number in range(repeats):
        names.append(branch(number, 0))
        for inner in range(jump):
            names += [branch(number, 1, inner, 0), branch(number, 1, inner, 1)]
    mean, covariance = run_moments(step, 4, tuple(names))
    single = Inpaint(DDIM(1.0), known(), HALF)
    expected = jnp.zeros(PIXELS), jnp.eye(PIXELS)
    run = eqx.filter_jit(moments_of_step)
    nodes = falling_times(4)
    for t, u in itertools.pairwise(nodes):
        for number in range(repeats):
            if number > 0:
                scale = (1 - t) / (1 - u)
                fresh = jnp.eye(PIXELS) * (t**2 - (scale * u) ** 2)
                expected = scale * expected[0], scale**2 * expected[1] + fresh
            down = jnp.stack([t, (t + u) / 2, u])
            expected = run(single, prior, down, ONCE, expected)
    np.testing.assert_allclose(mean, expected[0], atol=1e-12)  # rounding
    np.testing.assert_allclose(covariance, expected[1], atol=1e-12)


@pytest.mark.parametrize("step", [Euler(), Midpoint(), AB2(), DPMpp2M()])
def test_a_mask_of_ones_is_plain_sampling(step):
    prior, times = g8("mask").prior, falling_times(9)
    x = run(prior, noise(), times, step=Inpaint(step, known(), 1.0), key=KEY).x
    # The same operations, in a program that also has those of the kept part.
    np.testing.assert_allclose(x, run(prior, noise(), times, step=step).x, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"repeats": 2, "jump": 2}])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_mask_of_zeros_returns_the_image_exactly(fresh, options):
    fixed = None if fresh else noise()
    step = Inpaint(DDIM(1.0), known(), 0.0, fixed, **options)
    x = run(g8("mask").prior, noise(), falling_times(7), step=step, key=KEY).x
    np.testing.assert_array_equal(x, known())


@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_a_constant_map_is_sdedit(strength):
    prior, times = g8("mask").prior, flow_times(10, mu=1.0)
    start = start_time(times, strength)
    step = Inpaint(Midpoint(), known(), start, noise())
    x = run(prior, noise(), times, step=step).x
    times = partial_times(times, strength)
    expected = eqx.filter_jit(sdedit)(prior, known(), noise(), times, step=Midpoint()).x
    np.testing.assert_allclose(x, expected, atol=1e-14)


def test_with_a_prior_of_independent_pixels_each_is_its_own_sdedit():
    variances = np.linspace(0.2, 2.0, PIXELS)
    prior = Normal(jnp.float64(np.sin(np.arange(8.0))), jnp.float64(np.diag(variances)))
    times, strengths = falling_times(20), np.linspace(0, 1, PIXELS)
    step = Inpaint(Euler(), known(), start_time(times, strengths), noise())
    x = np.asarray(run(prior, noise(), times, step=step).x)
    for pixel, strength in enumerate(strengths):
        left = partial_times(times, float(strength))
        alone = np.asarray(eqx.filter_jit(sdedit)(prior, known(), noise(), left).x)
        assert float(x[pixel]) == pytest.approx(float(alone[pixel]), abs=1e-14)


def test_from_a_partial_start_masks_work_alike():
    """A map of times above the first node changes nothing: those pixels are repainted at once."""
    prior, times = g8("mask").prior, falling_times(10)[4:]
    x = add_noise(known(), noise(), times[0])
    ends = [
        run(prior, x, times, step=Inpaint(Euler(), known(), mask, noise())).x
        for mask in (HALF, HALF * 0.7)
    ]
    np.testing.assert_array_equal(*ends)


def test_a_memory_passes_through_the_inner_loops():
    """A jump of 3 everywhere repainted is sampling at three times as many nodes."""

    def network(x, t, condition):
        return condition - t * x

    ones = np.ones(PIXELS)
    momentum = Projected(momentum=-0.5)
    ends = jnp.float64(ones), jnp.float64(-ones)
    velocity = Guided(network, *ends, 2.0, momentum)
    step = Inpaint(Euler(), known(), 1.0, noise(), jump=3)
    coarse = run(velocity, noise(), falling_times(4), step=step)
    fine = run(velocity, noise(), falling_times(12))
    np.testing.assert_allclose(coarse.x, fine.x, rtol=1e-12)
    np.testing.assert_allclose(coarse.memory.rule, fine.memory.rule, rtol=1e-12)
    plain = run(Guided(network, *ends, 2.0), noise(), falling_times(12)).x
    assert np.abs(np.subtract(plain, fine.x)).max() > 1e-3


def test_evaluations_and_their_times_are_passed_on():
    times = falling_times(6)
    step = Inpaint(Midpoint(), known(), HALF, repeats=3, jump=2)
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -x

    drawn = run(counted, noise(), times, step=step, key=KEY)
    jax.effects_barrier()
    assert len(calls) == drawn.evaluations == 2 * 3 * 2 * 6
    np.testing.assert_allclose(np.unique(calls), np.unique(evaluation_times(step, times)))
    assert evaluation_times(Inpaint(AB2(), known(), HALF), times) is not None


def test_the_history_of_another_run_is_kept_outside_of_the_mask():
    prior, times = g8("mask").prior, falling_times(20)[8:]
    up = run(prior, known(), times[::-1], step=FireFlow(), history=True)
    history = up.history[::-1]
    other = Normal(known(), prior.covariance)

    def edited(mask, step=Euler()):
        return run(other, up.x, times, step=KeepHistory(step, history, mask)).x

    np.testing.assert_array_equal(edited(0.0), known())
    plain = run(other, up.x, times).x
    np.testing.assert_allclose(edited(1.0), plain, atol=1e-14)
    half = edited(HALF)
    kept, change = np.split(np.subtract(half, known()), 2)
    np.testing.assert_array_equal(kept, 0)
    assert np.all(np.abs(change) > 1e-3)
    # Grey is a mean: with equal prompts and one integrator it is the inversion's own round trip.
    same = run(prior, up.x, times, step=KeepHistory(FireFlow(), history, 0.5)).x
    assert np.abs(np.subtract(same, known())).max() < 1e-3  # the error of FireFlow at 12 steps


def test_a_history_that_is_too_short_is_an_error():
    times = falling_times(5)
    step = KeepHistory(Euler(), jnp.zeros((4, PIXELS)), 0.5)
    with pytest.raises(Exception, match="fewer nodes than this run"):
        jax.block_until_ready(sample(g8("mask").prior, noise(), times, step=step).x)


def test_misuse_names_the_remedy():
    prior, times = g8("mask").prior, falling_times(3)
    with pytest.raises(ValueError, match=r"`Inpaint\(mask\)` needs numbers in \[0, 1\], got 1.5"):
        Inpaint(Euler(), known(), 1.5)
    with pytest.raises(ValueError, match=r"`KeepHistory\(mask\)` needs numbers in \[0, 1\]"):
        KeepHistory(Euler(), known()[None], -1.0)
    with pytest.raises(ValueError, match=r"needs at least 1 for both, got 0 and 1"):
        Inpaint(Euler(), known(), HALF, repeats=0)
    with pytest.raises(ValueError, match=r"Pass key=jax.random.key"):
        sample(prior, noise(), times, step=Inpaint(Euler(), known(), HALF))
    with pytest.raises(ValueError, match=r"Pass key=jax.random.key"):
        sample(prior, noise(), times, step=Inpaint(Euler(), known(), HALF, noise(), repeats=2))
    with pytest.raises(ValueError, match=r"`Inpaint\(mask\)` needs the shape of x, \[8\]"):
        sample(prior, noise(), times, step=Inpaint(Euler(), known(), HALF[:3]), key=KEY)
    with pytest.raises(ValueError, match=r"`Inpaint\(image\)` needs the shape of x, \[8\]"):
        sample(prior, noise(), times, step=Inpaint(Euler(), known()[:4], 1.0), key=KEY)
    with pytest.raises(ValueError, match="rising times"):
        sample(prior, known(), times[::-1], step=Inpaint(Euler(), known(), HALF), key=KEY)
