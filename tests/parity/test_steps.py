"""Integrators against the schedulers of diffusers in flow mode.

Both use the nodes of the scheduler and the same velocity field.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from fluxjax import DPMpp2M, Heun, UniPC2
from fluxjax.flow import sample

START = np.linspace(-2, 2, 7, dtype=np.float32)[None]  # UniPC needs a batch axis


def velocity(x, t):
    return jnp.sin(2 * x + t) - 0.5 * x


def theirs(scheduler) -> list[np.ndarray]:
    """Return x after every call of a scheduler."""
    x, path = torch.from_numpy(START), []
    for t in scheduler.timesteps:
        # Some schedulers round their timesteps to whole numbers, but not their sigmas.
        sigma = scheduler.sigmas[scheduler.step_index or 0]
        output = torch.sin(2 * x + sigma) - 0.5 * x
        x = scheduler.step(output, t, x, return_dict=False)[0]
        path.append(x.numpy())
    return path


def ours(step, nodes):
    return np.asarray(
        sample(velocity, jnp.asarray(START), jnp.asarray(nodes), step=step, history=True).history
    )


@pytest.mark.parametrize("count", [2, 7, 20])
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_multistep_solvers_take_the_same_path(kind, count):
    scheduler = kind(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    scheduler.set_timesteps(count)
    scheduler.set_begin_index(0)
    path = ours(
        DPMpp2M() if kind is DPMSolverMultistepScheduler else UniPC2(), scheduler.sigmas.numpy()
    )
    # Both in float32; ratios of clock differences lose some digits.
    np.testing.assert_allclose(path[1:], theirs(scheduler), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("count", [3, 10])
def test_heun_takes_the_same_path_except_for_the_last_step(count):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(count)
    scheduler.set_begin_index(0)
    nodes = np.concatenate([scheduler.sigmas.numpy()[:1], scheduler.sigmas.numpy()[1::2]])
    path = ours(Heun(), nodes)
    # Every second call ends a step. diffusers takes the last step, to 0, by Euler's method, though
    # the velocity is finite there.
    np.testing.assert_allclose(path[1:-1], theirs(scheduler)[1::2], rtol=1e-5, atol=1e-5)
    assert np.abs(path[-1] - theirs_last(scheduler)).max() > 1e-5


def theirs_last(scheduler) -> np.ndarray:
    scheduler.set_timesteps(scheduler.num_inference_steps)
    scheduler.set_begin_index(0)
    return theirs(scheduler)[-1]
