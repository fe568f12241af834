"""Sampling by the solvers of diffrax."""

import sys

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import Heun, flow_times
from fluxjax.flow import sample, sample_ode

MEAN, DEVIATION = 0.7, 0.4
X = jnp.linspace(-2, 2, 5)


def gaussian_velocity(x, t):
    """The exact velocity for data N(MEAN, DEVIATION^2)."""
    variance = ((1 - t) * DEVIATION) ** 2 + t**2
    return (t - (1 - t) * DEVIATION**2) / variance * (x - (1 - t) * MEAN) - MEAN


def test_an_adaptive_solver_keeps_its_tolerance_and_counts_its_evaluations():
    counts = []
    for tolerance in (1e-2, 1e-5):
        found = sample_ode(
            gaussian_velocity,
            X,
            flow_times(4),
            solver=diffrax.Tsit5(),
            rtol=tolerance,
            atol=tolerance,
        )
        np.testing.assert_allclose(found.x, MEAN + DEVIATION * X, atol=20 * tolerance)
        counts.append(int(found.evaluations))
    assert 0 < counts[0] < counts[1]


def test_one_step_per_interval_equals_our_integrator():
    times = flow_times(9, mu=1.0)
    theirs = sample_ode(gaussian_velocity, X, times, solver=diffrax.Heun(), history=True)
    ours = sample(gaussian_velocity, X, times, step=Heun(), history=True)
    np.testing.assert_allclose(theirs.history, ours.history, atol=1e-5)
    assert int(theirs.evaluations) == ours.evaluations == 18


def test_a_reversible_solver_returns_to_its_start():
    times = flow_times(10)
    there = sample_ode(gaussian_velocity, X, times, solver=diffrax.ReversibleHeun()).x
    back = sample_ode(gaussian_velocity, there, times[::-1], solver=diffrax.ReversibleHeun()).x
    np.testing.assert_allclose(back, X, atol=0.05)  # its two states are equal only at the start


def test_other_weights_and_times_compile_nothing():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(scale, times):
        velocity = eqx.Partial(lambda scale, x, t: scale * x, scale)
        return sample_ode(velocity, X, times, solver=diffrax.Dopri5(), rtol=1e-3, atol=1e-3).x

    for n in range(3):
        run(jnp.float32(n), flow_times(4, mu=float(n)))


def test_missing_arguments_and_diffrax_are_named(monkeypatch):
    with pytest.raises(ValueError, match="Pass both, or neither"):
        sample_ode(gaussian_velocity, X, flow_times(4), solver=diffrax.Tsit5(), rtol=1e-3)
    with pytest.raises(ValueError, match="at least 2 nodes"):
        sample_ode(gaussian_velocity, X, jnp.ones(1), solver=diffrax.Tsit5())
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install 'fluxjax\[ode\]'"):
        sample_ode(gaussian_velocity, X, flow_times(4), solver=None)
