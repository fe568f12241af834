"""Schedules of times against those of diffusers."""

import numpy as np
import pytest

from fluxjax import flow_times
from fluxjax.flow import beta_times, exponential_times, karras_times, resolution_mu, static_times

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16384])
def test_dev_times_equal_diffusers_scheduler(steps, tokens):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=resolution_mu(tokens))
    np.testing.assert_allclose(flow_times(steps, tokens=tokens), scheduler.sigmas, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_schnell_times_equal_diffusers_scheduler(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    np.testing.assert_allclose(flow_times(steps), scheduler.sigmas, rtol=1e-6)


SPACINGS = {
    "use_karras_sigmas": karras_times,
    "use_exponential_sigmas": exponential_times,
    "use_beta_sigmas": beta_times,
}


@pytest.mark.parametrize("steps", [1, 2, 5, 28])
@pytest.mark.parametrize("shift", ["none", "dynamic", "static"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_respaced_times_equal_diffusers_scheduler(spacing, shift, steps):
    kind = {"none": {}, "dynamic": {"use_dynamic_shifting": True}, "static": {"shift": 3.0}}[shift]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**kind, **{spacing: True})
    scheduler.set_timesteps(
        sigmas=np.linspace(1, 1 / steps, steps), mu=1.1 if shift == "dynamic" else None
    )
    base = (
        static_times(steps, shift=3.0)
        if shift == "static"
        else flow_times(steps, mu=1.1 if shift == "dynamic" else None)
    )
    np.testing.assert_allclose(SPACINGS[spacing](base), scheduler.sigmas, atol=1e-6)
