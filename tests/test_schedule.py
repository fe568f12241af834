import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxjax import flow_times, resolution_mu, time_shift


@given(t=st.floats(0.01, 0.99), mu=st.floats(-2, 4))
def test_the_shift_multiplies_the_odds_by_exp_mu(t, mu):
    shifted = float(time_shift(jnp.float32(t), mu))
    odds = t / (1 - t) * math.exp(mu)
    # The shifted time carries float32's relative error of some 1e-7 a step, more where 1 - t is small.
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
