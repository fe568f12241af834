"""Schedules of sampling times."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from fluxjax import flow_times
from fluxjax.flow import (
    beta_times,
    custom_times,
    exponential_times,
    karras_times,
    linear_quadratic_times,
    resolution_mu,
    static_times,
    time_shift,
    uniform_times,
)


@given(t=st.floats(0.01, 0.99), mu=st.floats(-2, 4))
def test_the_shift_multiplies_the_odds_by_exp_mu(t, mu):
    shifted = float(time_shift(jnp.float32(t), mu))
    odds = t / (1 - t) * math.exp(mu)
    # float32 has a relative error of some 1e-7 per operation, and more where 1 - t is small.
    assert shifted == pytest.approx(odds / (1 + odds), rel=1e-5)


@given(mu=st.floats(-5, 5))
def test_zero_and_one_are_fixed_points_of_the_shift(mu):
    np.testing.assert_array_equal(time_shift(jnp.array([0.0, 1.0]), mu), [0.0, 1.0])


@given(t=st.floats(0, 1), mu=st.floats(-3, 3))
def test_the_opposite_shift_undoes_it(t, mu):
    assert float(time_shift(time_shift(jnp.float32(t), mu), -mu)) == pytest.approx(t, abs=3e-6)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63), (16384, 3.23)])
def test_the_shift_by_resolution_is_linear_and_extrapolated(tokens, mu):
    assert resolution_mu(tokens) == pytest.approx(mu)


def test_schnell_times_are_uniform_and_end_in_an_exact_zero():
    np.testing.assert_array_equal(flow_times(4), np.float32([1, 0.75, 0.5, 0.25, 0]))


@given(steps=st.integers(1, 100), tokens=st.integers(1, 20_000))
def test_times_fall_strictly_from_exactly_1_to_exactly_0(steps, tokens):
    times = np.asarray(flow_times(steps, tokens=tokens))
    assert times.shape == (steps + 1,)
    assert times[0] == 1
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)


def test_a_given_mu_replaces_the_one_by_resolution():
    np.testing.assert_array_equal(flow_times(7, mu=resolution_mu(1024)), flow_times(7, tokens=1024))


def test_no_steps_and_two_shifts_are_refused():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        flow_times(0)
    with pytest.raises(ValueError, match="not both"):
        flow_times(4, tokens=256, mu=1.0)


RESPACINGS = {"karras": karras_times, "exponential": exponential_times, "beta": beta_times}


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("name", RESPACINGS)
def test_respaced_times_keep_the_ends_and_fall(name, steps):
    base = flow_times(steps, tokens=1024)
    times = np.asarray(RESPACINGS[name](base))
    assert times.shape == (steps + 1,)
    np.testing.assert_array_equal(times[[0, -2, -1]], np.asarray(base)[[0, -2, -1]])
    assert np.all(np.diff(times) < 0)
    with pytest.raises(ValueError, match="before a last 0"):
        RESPACINGS[name](uniform_times(4, last=0.1))


def test_respaced_times_are_spaced_as_their_name_says():
    base = flow_times(9)
    exponential = np.asarray(exponential_times(base), np.float64)[:-1]
    np.testing.assert_allclose(
        exponential[1:] / exponential[:-1], exponential[1] / exponential[0], rtol=1e-6
    )
    roots = np.asarray(karras_times(base, rho=5.0), np.float64)[:-1] ** 0.2
    np.testing.assert_allclose(np.diff(roots), roots[1] - roots[0], rtol=1e-5)
    # beta(1, 1) is the uniform distribution.
    np.testing.assert_allclose(beta_times(base, alpha=1.0, beta=1.0), base, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 5, 8, 40])
def test_linear_quadratic_times_are_linear_then_of_constant_curvature(steps):
    times = np.asarray(linear_quadratic_times(steps, threshold=0.05), np.float64)
    half = steps // 2
    np.testing.assert_allclose(times[: half + 1], 1 - 0.05 * np.arange(half + 1) / half, atol=1e-6)
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)
    np.testing.assert_allclose(np.diff(times[half:], n=3), 0, atol=1e-6)


def test_other_times():
    np.testing.assert_array_equal(linear_quadratic_times(1), [1, 0])
    np.testing.assert_allclose(
        uniform_times(4, first=0.9, last=0.1), [0.9, 0.7, 0.5, 0.3, 0.1], rtol=1e-6
    )
    np.testing.assert_allclose(static_times(2, shift=3.0), [1, 0.75, 0], rtol=1e-6)
    np.testing.assert_array_equal(custom_times([1, 0.5, 0]), np.float32([1, 0.5, 0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: custom_times([1, 0.5, 0.5]), "fall strictly"),
        (lambda: custom_times([1.2, 0]), "fall strictly"),
        (lambda: custom_times([1]), "at least 2 numbers"),
        (lambda: uniform_times(3, first=0.1, last=0.5), "1 >= first > last >= 0, got 0.1 and 0.5"),
        (lambda: uniform_times(0), "`uniform_times\\(steps\\)` needs at least 1 step, got 0"),
        (lambda: static_times(3, shift=0.0), "a positive factor, got 0.0. 1 is no shift"),
        (lambda: flow_times(2**31), "at most 16777216 steps, got 2147483648"),
        (lambda: flow_times(20, mu=40.0), "do not fall at every node"),
        (lambda: static_times(3, shift=float("inf")), "needs finite numbers"),
        (lambda: karras_times(flow_times(3), rho=0), "needs a positive number, got 0"),
        (lambda: beta_times(flow_times(3), alpha=-1.0), "needs a positive number, got -1"),
        (lambda: linear_quadratic_times(20, threshold=0.9), "do not fall at every node"),
        (lambda: custom_times([1, float("nan"), 0]), "fall strictly"),
        (lambda: linear_quadratic_times(3, threshold=1.0), "in \\(0, 1\\), got 1.0"),
    ],
)
def test_impossible_times_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
