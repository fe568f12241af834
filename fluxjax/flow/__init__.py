"""Velocity fields: schedules of times, integrators, guidance, sampling.

Nothing here knows a network. A velocity is any pytree that is called as velocity(x, t) and returns
dx/dt, with t falling from 1 (noise) to 0 (data).
"""

from fluxjax.flow.corrections import Corrected, Correction, NullSpace
from fluxjax.flow.ddnm import DDNM
from fluxjax.flow.design import (
    MeasurementChoice,
    choose_measurements,
    contrastive_gain,
    moment_gain,
    window_masks,
)
from fluxjax.flow.exponential import DEIS2, RES2M, RES2S, DPMpp2M, DPMpp2S, UniPC2
from fluxjax.flow.flow_edit import FlowEdit, edit_mask
from fluxjax.flow.gains import Gain, dps, pigdm, proximal, tmpd
from fluxjax.flow.guidance import ClassifierFree, Guided, Projected, Rule, WeakModel, ZeroStar
from fluxjax.flow.inpaint import Inpaint, KeepHistory
from fluxjax.flow.invert import FireFlow, Steered
from fluxjax.flow.learned_times import fit_times, plan_times
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.mixing import ImageGuided, Mixed, SlidingWindows
from fluxjax.flow.noise import (
    NoiseFit,
    NoisePrior,
    NormalNoise,
    RadialNoise,
    optimize_noise,
    randomize_then_optimize,
)
from fluxjax.flow.normal_equations import (
    Linearized,
    adjoint,
    linearize,
    pseudo_inverse,
    solve_normal,
)
from fluxjax.flow.ode import sample_ode
from fluxjax.flow.operators import Blur, Composition, Decoded, Downsample, LinearMap, Mask, Operator
from fluxjax.flow.optimize import pnp_flow, red_diff
from fluxjax.flow.particles import Particles, twisted_sample
from fluxjax.flow.paths import STRAIGHT, CustomPath, Discrete, VarianceExploding, VariancePreserving
from fluxjax.flow.posterior import Conditioned, ConditionedEvaluation
from fluxjax.flow.predictions import as_velocity, convert_prediction, estimates
from fluxjax.flow.restore import Decoupled, FlowDPS, Nudged
from fluxjax.flow.runge_kutta import AB2, RK4, Euler, Heun, Midpoint
from fluxjax.flow.sample import (
    Sample,
    SampleState,
    advance_sample,
    begin_sample,
    evaluation_times,
    sample,
)
from fluxjax.flow.step import Step, StochasticStep
from fluxjax.flow.stochastic import DDIM, ERSDE2, Churn, DPMpp2MSDE, Renoise, ReverseSDE, ancestral
from fluxjax.flow.stream import Progress, stream
from fluxjax.flow.strength import add_noise, partial_times, sdedit, start_time
from fluxjax.flow.times import (
    beta_times,
    custom_times,
    exponential_times,
    flow_times,
    karras_times,
    linear_quadratic_times,
    resolution_mu,
    static_times,
    time_shift,
    uniform_times,
)
from fluxjax.flow.velocity import StatefulVelocity, Velocity, initial_memory

__all__ = [
    "AB2",
    "DDIM",
    "DDNM",
    "DEIS2",
    "ERSDE2",
    "RES2M",
    "RES2S",
    "RK4",
    "STRAIGHT",
    "Blur",
    "Churn",
    "ClassifierFree",
    "Composition",
    "Conditioned",
    "ConditionedEvaluation",
    "Corrected",
    "Correction",
    "CustomPath",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2S",
    "Decoded",
    "Decoupled",
    "Discrete",
    "Downsample",
    "Euler",
    "FireFlow",
    "FlowDPS",
    "FlowEdit",
    "Gain",
    "Guided",
    "Heun",
    "ImageGuided",
    "Inpaint",
    "KeepHistory",
    "LinearMap",
    "Linearized",
    "Mask",
    "Measurement",
    "MeasurementChoice",
    "Midpoint",
    "Mixed",
    "NoiseFit",
    "NoisePrior",
    "NormalNoise",
    "Nudged",
    "NullSpace",
    "Operator",
    "Particles",
    "Progress",
    "Projected",
    "RadialNoise",
    "Renoise",
    "ReverseSDE",
    "Rule",
    "Sample",
    "SampleState",
    "SlidingWindows",
    "StatefulVelocity",
    "Steered",
    "Step",
    "StochasticStep",
    "UniPC2",
    "VarianceExploding",
    "VariancePreserving",
    "Velocity",
    "WeakModel",
    "ZeroStar",
    "add_noise",
    "adjoint",
    "advance_sample",
    "ancestral",
    "as_velocity",
    "begin_sample",
    "beta_times",
    "choose_measurements",
    "contrastive_gain",
    "convert_prediction",
    "custom_times",
    "dps",
    "edit_mask",
    "estimates",
    "evaluation_times",
    "exponential_times",
    "fit_times",
    "flow_times",
    "initial_memory",
    "karras_times",
    "linear_quadratic_times",
    "linearize",
    "moment_gain",
    "optimize_noise",
    "partial_times",
    "pigdm",
    "plan_times",
    "pnp_flow",
    "proximal",
    "pseudo_inverse",
    "randomize_then_optimize",
    "red_diff",
    "resolution_mu",
    "sample",
    "sample_ode",
    "sdedit",
    "solve_normal",
    "start_time",
    "static_times",
    "stream",
    "time_shift",
    "tmpd",
    "twisted_sample",
    "uniform_times",
    "window_masks",
]
