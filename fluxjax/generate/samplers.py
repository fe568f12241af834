"""Timers, integrators, guidance rules and step caches by name, for command lines and
configurations.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from fluxjax.flow.exponential import DEIS2, RES2M, RES2S, DPMpp2M, DPMpp2S, UniPC2
from fluxjax.flow.guidance import ClassifierFree, Projected, Rule, ZeroStar
from fluxjax.flow.runge_kutta import AB2, RK4, Euler, Heun, Midpoint
from fluxjax.flow.step import Step
from fluxjax.flow.stochastic import (
    DDIM,
    ERSDE2,
    Churn,
    DPMpp2MSDE,
    Renoise,
    ReverseSDE,
    draws_noise,
)
from fluxjax.flow.times import (
    beta_times,
    exponential_times,
    flow_times,
    karras_times,
    linear_quadratic_times,
    resolution_mu,
    static_times,
    uniform_times,
)
from fluxjax.generate.cache import FirstBlock, StepCache, TeaCache
from fluxjax.generate.latents import image_tokens
from fluxjax.shapes import Times
from fluxjax.suggestions import suggestion
from fluxjax.zoo import FLUX1, Defaults, Family

INTEGRATORS: Mapping[str, Callable[[], Step]] = {
    "euler": Euler,
    "heun": Heun,
    "midpoint": Midpoint,
    "rk4": RK4,
    "ab2": AB2,
    "dpmpp_2s": DPMpp2S,
    "dpmpp_2m": DPMpp2M,
    "res_2s": RES2S,
    "res_2m": RES2M,
    "deis_2": DEIS2,
    "unipc_2": UniPC2,
    "ddim": lambda: DDIM(0.0),
    "ancestral": DDIM,
    "sde": ReverseSDE,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "er_sde": ERSDE2,
    "renoise": Renoise,
}
WITH_ETA: Mapping[str, Callable[[float], Step]] = {
    "ddim": DDIM,
    "sde": ReverseSDE,
    "dpmpp_2m_sde": DPMpp2MSDE,
}
"""The integrators that take an eta."""
WITH_SHIFT = "flux_static"
"""The timer that takes a shift."""
RULES: Mapping[str, Callable[[], Rule]] = {
    "cfg": ClassifierFree,
    "zero_star": ZeroStar,
    "apg": Projected,
}
CACHES: Mapping[str, Callable[[float], StepCache]] = {
    "first_block": FirstBlock,
    "teacache": TeaCache,
}
TIMERS = (
    "model",
    "uniform",
    "flux_static",
    "flux_dynamic",
    "karras",
    "exponential",
    "beta",
    "linear_quadratic",
)
_MOST_CHURN = math.sqrt(2) - 1
_LARGEST = float(np.finfo(np.float32).max)


def _resolution_shift(defaults: Defaults, tokens: int, steps: int) -> float:
    """Return FLUX.1's log-shift: linear in the number of image tokens."""
    return resolution_mu(tokens, base_shift=defaults.base_shift, max_shift=defaults.max_shift)


SHIFT_RULES: Mapping[str, Callable[[Defaults, int, int], float]] = {
    "resolution": _resolution_shift,
}
"""The log-shift of a family's times, from the defaults, the number of image tokens and of steps."""


def integrator(name: str, *, eta: float | None = None, churn: float | None = None) -> Step:
    """Return an integrator of `INTEGRATORS`.

    **Arguments:** `eta`: how much noise is drawn, in [0, 1], by those that take it; by default 0
    for ddim and 1 for the others. `churn`: by which t / (1 - t) grows before each step, in (0,
    sqrt(2) - 1], as noise is added (Karras et al. 2022, algorithm 2, where it is S_churn / N); for
    integrators that draw no noise themselves.
    **Raises:** `ValueError` for another name, an eta or a churn that is not taken, or one outside
    of its range.
    """
    step = _integrator(name, eta)
    if churn is None:
        return step
    if draws_noise(step):
        raise ValueError(
            f"{name} draws noise itself, so it takes no churn. Leave it out, or choose an "
            "integrator that draws none, as heun."
        )
    if not 0 < churn <= _MOST_CHURN:
        raise ValueError(f"churn is above 0 and at most {_MOST_CHURN:.4f}, got {churn}.")
    return Churn(step, churn)


def _integrator(name: str, eta: float | None) -> Step:
    """Return the integrator of a name.

    **Raises:** `ValueError` for an unknown name, or an eta that it does not take.
    """
    if name not in INTEGRATORS:
        known = ", ".join(INTEGRATORS)
        near = suggestion(name, INTEGRATORS)
        raise ValueError(f"There is no integrator {name!r}. Choose one of {known}.{near}")
    if eta is None:
        return INTEGRATORS[name]()
    if name not in WITH_ETA:
        known = ", ".join(WITH_ETA)
        raise ValueError(f"{name} takes no eta. Leave it out, or choose one of {known}.")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is in [0, 1], got {eta}.")
    return WITH_ETA[name](eta)


def step_cache(text: str) -> StepCache:
    """Return a cache of `CACHES` from NAME:THRESHOLD, or the first block's from only THRESHOLD.

    **Raises:** `ValueError` for another name, or a threshold that is not a finite number from 0 on.
    """
    name, colon, number = text.rpartition(":")
    if not colon:
        name = "first_block"
    try:
        threshold = float(number)
    except ValueError:
        threshold = -1.0
    if name not in CACHES or not 0 <= threshold <= _LARGEST:
        forms = " or ".join(CACHES)
        raise ValueError(
            f"{text!r} is not a step cache. Write a threshold from 0 on, as 0.1, or "
            f"{forms}:THRESHOLD."
        )
    return CACHES[name](threshold)


def model_times(
    defaults: Defaults, steps: int, height: int, width: int, *, family: Family = FLUX1
) -> Times:
    """Return the model's own schedule for an image of `height` x `width` pixels.

    **Returns:** [steps + 1], falling from 1 to 0.
    """
    if not defaults.shift:
        return flow_times(steps)
    return _shifted_times(defaults, steps, height, width, family)


def timer(
    name: str,
    steps: int,
    defaults: Defaults,
    height: int,
    width: int,
    *,
    shift: float | None = None,
) -> Times:
    """Return the times of a timer of `TIMERS` for an image of `height` x `width` pixels.

    "model": as the model is meant to be sampled. "flux_static": shifted by the factor `shift`, 3 by
    default. "flux_dynamic": shifted by the resolution, with the log-shifts of the defaults.
    "karras", "exponential", "beta": the model's times, respaced.
    **Raises:** `ValueError` for another name, a shift that is not taken or not a finite number
    above 0, or no steps.
    """
    if name not in TIMERS:
        known = ", ".join(TIMERS)
        near = suggestion(name, TIMERS)
        raise ValueError(f"There is no timer {name!r}. Choose one of {known}.{near}")
    if shift is not None and name != WITH_SHIFT:
        raise ValueError(f"The timer {name} takes no shift. Leave it out, or choose flux_static.")
    if shift is not None and not 0 < shift <= _LARGEST:
        raise ValueError(
            f"`timer(shift)` needs a finite factor above 0, got {shift}. Choose one, as 3."
        )
    if name == WITH_SHIFT:
        return static_times(steps, shift=3.0 if shift is None else shift)
    if name == "uniform":
        return uniform_times(steps)
    if name == "linear_quadratic":
        return linear_quadratic_times(steps)
    if name == "flux_dynamic":
        return _shifted_times(defaults, steps, height, width, FLUX1)
    times = model_times(defaults, steps, height, width)
    if name == "model":
        return times
    respaced = {"karras": karras_times, "exponential": exponential_times, "beta": beta_times}
    return respaced[name](times)


def _shifted_times(
    defaults: Defaults, steps: int, height: int, width: int, family: Family
) -> Times:
    tokens = image_tokens(height, width)
    return flow_times(steps, mu=SHIFT_RULES[family.shift_rule](defaults, tokens, steps))
