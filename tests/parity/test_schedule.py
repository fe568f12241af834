import numpy as np
import pytest

from fluxjax import flow_times, resolution_mu

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16384])
def test_dev_times_equal_diffusers_scheduler(steps, tokens):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=resolution_mu(tokens))
    np.testing.assert_allclose(flow_times(steps, tokens=tokens), scheduler.sigmas, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_schnell_times_equal_diffusers_scheduler(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    np.testing.assert_allclose(flow_times(steps), scheduler.sigmas, rtol=1e-6)
